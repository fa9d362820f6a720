"""Which block each tensor stands in, and the order of a model's blocks. Of an unknown model its numbers tell."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from weightops.naming.identify import body_of, component_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from weightops.naming.keymap import Network

Name = tuple[str, str]
Block = tuple[str, str]

# Components whose tensors, where no network is known, are taken for the diffusion model's.
_MODELS = frozenset({"", "model", "unet", "transformer", "transformer_2", "other", "ema"})

# A file may hold any name: no block has a number of more digits.
_NUMBERED = re.compile(r"(.*[^0-9]|)([0-9]{1,6})")
_NUMBER = re.compile(r"[0-9]{1,6}")


@dataclass(slots=True)
class Part:
    """A component: its network (None: unknown), and the names of its blocks from the first to the last."""

    component: str
    network: Network | None
    order: tuple[str, ...] = ()
    tensors: dict[str, list[Name]] = field(default_factory=dict)
    loose: list[Name] = field(default_factory=list)

    @property
    def is_model(self) -> bool:
        """Is it a diffusion model, or an average of one?"""
        if self.network is None:
            return self.component in _MODELS
        return self.network.role in ("unet", "transformer")

    def shown(self, block: str) -> str:
        """The block's name among those of all components: a text encoder's bears its own."""
        return block if self.is_model else f"{self.component}.{block}"


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts by component, and the part and block of each tensor; None: in no block."""

    parts: Mapping[str, Part]
    homes: Mapping[Name, tuple[Part, str | None]]


def lay_out(names: Mapping[Name, Network | None]) -> Layout:
    """Every tensor into its block. names: (component, canonical name) -> its network."""
    parts: dict[str, Part] = {}
    bodies: dict[str, dict[Name, str]] = {}
    for name, network in names.items():
        component, body = name
        if network is None:
            # A file of an unknown model comes under whole keys.
            component, body = component or component_of(body) or "", body_of(body)
        part = parts.setdefault(component, Part(component, network))
        part.network = part.network or network
        bodies.setdefault(component, {})[name] = body
    homes: dict[Name, tuple[Part, str | None]] = {}
    for component, part in parts.items():
        found = _by_numbers(bodies[component]) if part.network is None else _by_table(part.network, bodies[component])
        part.order = found.order
        for name in bodies[component]:
            block = found.blocks.get(name)
            homes[name] = part, block
            (part.loose if block is None else part.tensors.setdefault(block, [])).append(name)
    return Layout(parts, homes)


@dataclass(frozen=True, slots=True)
class _Found:
    blocks: Mapping[Name, str]
    order: tuple[str, ...]


def blocks_in(network: Network, name: str) -> list[str]:
    """The blocks of the network's table that claim a canonical name: one, where the table is right."""
    found = []
    prefixes = {prefix: block for block, of in network.blocks for prefix in of}
    words = name.split(".")
    for stop in range(1, len(words) + 1):
        block = prefixes.get(".".join(words[:stop]))
        if block is not None:
            found.append(block)
        if _NUMBER.fullmatch(words[stop - 1]):
            block = prefixes.get(".".join([*words[: stop - 1], "{}"]))
            if block is not None:
                found.append(block.format(words[stop - 1]))
    return found


def _by_table(network: Network, bodies: Mapping[Name, str]) -> _Found:
    blocks: dict[Name, str] = {}
    found: dict[str, set[int]] = {}
    for name, body in bodies.items():
        claims = blocks_in(network, body)
        if claims:
            blocks[name] = claims[0]
            group, number = parted(claims[0])
            found.setdefault(group, set()).add(number or 0)
    order: list[str] = []
    for block, _ in network.blocks:
        if "{}" not in block:
            order.append(block)
            continue
        numbers = found.get(parted(block.format(0))[0], set())
        # A LoRA may leave some out, which count; but a number alone may be any.
        last = max(numbers, default=-1)
        order.extend(block.format(n) for n in (range(last + 1) if last < len(bodies) else sorted(numbers)))
    return _Found(blocks, tuple(order))


def _by_numbers(bodies: Mapping[Name, str]) -> _Found:
    """Blocks are what has a number that others have too, with a module below it; other modules go by a first word."""
    split: dict[Name, tuple[str, int]] = {}
    members: dict[str, set[int]] = {}
    for name, body in bodies.items():
        words = body.split(".")
        place = next((n for n, word in enumerate(words) if n and _NUMBER.fullmatch(word)), None)
        if place is None:
            continue
        group, number = ".".join(words[:place]), int(words[place])
        split[name] = group, number
        if len(words) > place + 2:  # time_embed.0.weight is a layer, and no block
            members.setdefault(group, set()).add(number)
    blocks: dict[Name, str] = {}
    numbered: set[tuple[str, int]] = set()
    for name, body in bodies.items():
        group, number = split.get(name, ("", 0))
        if len(members.get(group, ())) > 1:
            blocks[name] = f"{group}.{number}"
            numbered.add((group, number))
        elif "." in body:
            blocks[name] = body.partition(".")[0]
    return _Found(blocks, tuple(f"{group}.{number}" for group, number in sorted(numbered)))


def blocks_of(names: Mapping[Name, Network | None]) -> Mapping[Name, str]:
    """The block each tensor stands in ("IN04", "double.3", "text_encoder.5"); one that is in no block is not there."""
    homes = lay_out(names).homes
    return {name: part.shown(block) for name, (part, block) in homes.items() if block is not None}


def parted(block: str) -> tuple[str, int | None]:
    """A block's name, as a user may write it, as group and number: IN04, in4 and IN.4 are one."""
    found = _NUMBERED.fullmatch(block.lower())
    if found is None:
        return block.lower(), None
    return found[1].rstrip("."), int(found[2])


def ranges(shown: Sequence[str]) -> list[str]:
    """Names of blocks in few words: IN00-IN11, M00, OUT00-OUT11."""
    found: list[list[str]] = []
    for block in shown:
        group, number = parted(block)
        last = parted(found[-1][-1]) if found else None
        if last is not None and number is not None and last == (group, number - 1):
            found[-1].append(block)
        else:
            found.append([block])
    return [run[0] if len(run) == 1 else f"{run[0]}-{_short_end(run[0], run[-1])}" for run in found]


def _short_end(first: str, last: str) -> str:
    """double.0-18, but IN00-IN11, as both are written."""
    return last.rpartition(".")[2] if "." in first else last


def all_shown(parts: Iterable[Part]) -> list[str]:
    """The names of all blocks that hold something, the diffusion model's first, each once."""
    in_order = sorted(parts, key=lambda part: not part.is_model)
    held = ((part, block) for part in in_order for block in (*part.order, *part.tensors) if block in part.tensors)
    return list(dict.fromkeys(part.shown(block) for part, block in held))
