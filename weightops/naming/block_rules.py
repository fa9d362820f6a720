"""What a rule of block weights says of which tensor, once the blocks of a model are laid out."""

from __future__ import annotations

import difflib
import fnmatch
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from weightops.errors import UsageError, listing, quote
from weightops.naming.block_layout import Block, Name, all_shown, parted, ranges
from weightops.naming.layer_kinds import KINDS, is_kind
from weightops.naming.presets import FLUX_ENCODERS, OF_LORA, lengths, meaning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from weightops.naming.block_layout import Layout, Part


@dataclass(frozen=True, slots=True)
class Curve:
    """A value for each depth u from 0 to 1, and one for what is not the diffusion model (None: it says nothing)."""

    at: Callable[[float], float]
    base: float | None = None


@dataclass(frozen=True, slots=True)
class Selector:
    """One part of a selector: words of which one has to hold, or, `without`, none."""

    words: tuple[str, ...]
    without: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """A part of a spec. where: the character it begins at, from 1. selectors: None for a list, or a curve by itself."""

    text: str
    where: int
    selectors: tuple[Selector, ...] | None
    value: float | Curve | tuple[float, ...]


def said(rule: Rule) -> str:
    """A rule, and where it stands, as messages have it."""
    return f"{quote(rule.text, 60)} (character {rule.where})"


class _Chosen(NamedTuple):
    """The tensors that a part of a selector is about. blocks: those that it names, None where it names layers."""

    names: frozenset[Name]
    blocks: frozenset[Block] | None


class Reader:
    """Rules, applied to the tensors of a layout."""

    def __init__(self, layout: Layout, where: str) -> None:
        self.layout = layout
        self.where = where
        self.everything = frozenset(layout.homes)
        self._blocks: dict[tuple[str, int | None], list[tuple[Part, str]]] = {}
        for part in layout.parts.values():
            for block in dict.fromkeys((*part.order, *part.tensors)):
                self._blocks.setdefault(parted(part.shown(block)), []).append((part, block))

    def read(self, rule: Rule) -> dict[Name, float]:
        if isinstance(rule.value, tuple):
            found = self._list(rule, rule.value)
        elif rule.selectors is None:
            assert isinstance(rule.value, Curve)
            found = self._alone(rule.value)
        else:
            found = self._selected(rule, rule.selectors, rule.value)
        if not found:
            raise UsageError(self.where, f"{said(rule)} matches nothing", f"there are {there(self.layout)}")
        return found

    # -------------------------------------------------------------------------------- lists and curves by themselves

    def _list(self, rule: Rule, numbers: tuple[float, ...]) -> dict[Name, float]:
        models = [part for part in self.layout.parts.values() if part.is_model and part.order]
        if not models:
            what = f"{said(rule)} is a number for each block of a diffusion model, and there is none here"
            raise UsageError(self.where, what, f"there are {there(self.layout)}")
        found: dict[Name, float] = {}
        for part in models:
            network = None if part.network is None else part.network.name
            meant = meaning(network, part.order, len(numbers))
            if meant is None:
                what = f"{len(numbers)} numbers (character {rule.where}), expected {lengths(network, part.order)}"
                raise UsageError(self.where, f"found {what}", f"there are {there(self.layout)}")
            by_word = dict(zip(meant, numbers, strict=True))
            # What LoRA's lists leave out has no LoRA in it, or is not to have one.
            left = dict.fromkeys(part.order, 0.0) if meant in OF_LORA else {}
            for block, number in {**left, **by_word}.items():
                found |= dict.fromkeys(part.tensors.get(block, ()), number)
            for word in by_word.keys() & {"BASE", *FLUX_ENCODERS}:
                found |= dict.fromkeys(self._of_component(word) or (), by_word[word])
        return found

    def _alone(self, curve: Curve) -> dict[Name, float]:
        found: dict[Name, float] = {}
        for part in self.layout.parts.values():
            if part.is_model:
                for block, u in _depths(part.order):
                    found |= dict.fromkeys(part.tensors.get(block, ()), curve.at(u))
            elif curve.base is not None:
                found |= dict.fromkeys(_names_in(part), curve.base)
        return found

    # -------------------------------------------------------------------------------- selectors

    def _selected(self, rule: Rule, selectors: tuple[Selector, ...], value: float | Curve) -> dict[Name, float]:
        names = self.everything
        blocks: frozenset[Block] | None = None
        for selector in selectors:
            chosen = self._chosen(rule, selector)
            if not names & chosen.names:
                words = f"{'NOT ' if selector.without else ''}{' '.join(selector.words)}"
                raise UsageError(
                    self.where, f"{said(rule)} matches nothing: no tensor is {quote(words)} and all before it",
                    f"what is before it has {', '.join(self._kinds_of(names)) or 'no layers of known kinds'}",
                )  # fmt: skip
            names &= chosen.names
            if chosen.blocks is not None:
                blocks = chosen.blocks if blocks is None else blocks & chosen.blocks
        if not isinstance(value, Curve):
            return dict.fromkeys((name for name in self.layout.homes if name in names), value)
        found: dict[Name, float] = {}
        for part in self.layout.parts.values():
            domain = [block for block in part.order if blocks is None or (part.component, block) in blocks]
            for block, u in _depths(domain):
                found |= dict.fromkeys((n for n in part.tensors.get(block, ()) if n in names), value.at(u))
        return found

    def _chosen(self, rule: Rule, selector: Selector) -> _Chosen:
        found = [self._word(rule, word) for word in selector.words]
        names = frozenset[Name]().union(*(chosen.names for chosen in found))
        blocks: frozenset[Block] | None = None
        named = [chosen.blocks for chosen in found if chosen.blocks is not None]
        if len(named) == len(found):
            blocks = frozenset[Block]().union(*named)
        if not selector.without:
            return _Chosen(names, blocks)
        return _Chosen(self.everything - names, None if blocks is None else self._all_blocks() - blocks)

    def _all_blocks(self) -> frozenset[Block]:
        return frozenset((p.component, block) for p in self.layout.parts.values() for block in (*p.order, *p.tensors))

    def _word(self, rule: Rule, word: str) -> _Chosen:
        if word == "*":
            return _Chosen(self.everything, self._all_blocks())
        low = word.lower()
        component = self._of_component(word)
        if component is not None:
            held = {self.layout.homes[name][0].component for name in component}
            chosen = _Chosen(frozenset(component), frozenset(b for b in self._all_blocks() if b[0] in held))
        elif low in KINDS:
            homes = self.layout.homes.items()
            chosen = _Chosen(frozenset(n for n, (part, _) in homes if is_kind(low, n[1], part.network)), None)
        else:
            chosen = self._blocks_called(rule, word) or self._tensors_called(low)
        if not chosen.names:
            raise UsageError(self.where, f"{said(rule)} matches nothing: {self._why_not(word)}", self._nearest(word))
        return chosen

    def _of_component(self, word: str) -> list[Name] | None:
        """The tensors of a component, of BASE, or of the text encoders of a kind; None: the word is none of these."""
        low = word.lower()
        if low == "base":
            parts = [part for part in self.layout.parts.values() if not part.is_model]
        elif low in ("clip", "t5"):
            of = ("clip",) if low == "clip" else ("t5", "umt5")
            parts = [p for p in self.layout.parts.values() if p.network is not None and p.network.name in of]
        elif low in _COMPONENTS or low in self.layout.parts:
            parts = [part for part in self.layout.parts.values() if part.component == low]
        else:
            return None
        return [name for part in parts for name in _names_in(part)]

    def _blocks_called(self, rule: Rule, word: str) -> _Chosen | None:
        """What a block, a kind of blocks or a range of them stands for; None: the word is none of these."""
        found = self._block(word)
        if found is None and "-" in word:
            found = self._range(rule, word)
        if found is None:
            return None
        blocks = frozenset((part.component, block) for part, block in found)
        return _Chosen(frozenset(n for part, block in found for n in part.tensors.get(block, ())), blocks)

    def _block(self, word: str) -> list[tuple[Part, str]] | None:
        group, number = parted(word)
        group = _GROUPS.get(group, group)
        one = self._blocks.get((group, number))
        if one is not None:
            return one
        if number is None:
            return [entry for (of, n), found in self._blocks.items() if of == group and n is not None
                    for entry in found] or None  # fmt: skip
        return None

    def _range(self, rule: Rule, word: str) -> list[tuple[Part, str]] | None:
        first, _, last = word.rpartition("-")
        if last.isdecimal():
            last = f"{parted(first)[0]}.{last}"
        ends = [self._block(first), self._block(last)]
        if not any(ends):
            return None
        for end, text in zip(ends, (first, last), strict=True):
            if not end:
                what = f"{said(rule)}: there is no block {quote(text)}"
                raise UsageError(self.where, what, self._nearest(text))
        found = []
        for part in self.layout.parts.values():
            places = [[part.order.index(b) for p, b in end or () if p is part and b in part.order] for end in ends]
            if all(places):
                every = [place for end in places for place in end]
                found += [(part, block) for block in part.order[min(every) : max(every) + 1]]
        if not found:
            raise UsageError(self.where, f"{said(rule)}: {quote(first)} and {quote(last)} are of two components")
        return found

    def _tensors_called(self, word: str) -> _Chosen:
        """Patterns, and beginnings of words."""
        if any(c in word for c in "*?["):
            named = frozenset(
                (part.component, block) for found in self._blocks.values() for part, block in found
                if fnmatch.fnmatchcase(part.shown(block).lower(), word)
            )  # fmt: skip
            of_blocks = {n for c, block in named for n in self.layout.parts[c].tensors.get(block, ())}
            pattern = re.compile(fnmatch.translate(word))
            called = {n for n in self.everything if pattern.match(n[1].lower()) or pattern.match(".".join(n).lower())}
            return _Chosen(frozenset(of_blocks | called), named if of_blocks and called <= of_blocks else None)
        # Whole parts of words: proj is also proj_in, attn is attn2; but blocks.1 is not blocks.10, nor a all of attn.
        end = r"(?!\d)" if word[-1:].isdigit() else r"(?![a-z])"
        begins = re.compile(rf"\.{re.escape(word)}{end}")
        found = {n for n in self.everything if begins.search(f".{n[1].lower()}")}
        as_trained = _ELEMENTS.get(word)
        if as_trained is not None:
            found |= {n for n in self.everything if as_trained.search(n[1]) and self._is_of_unet(n)}
        return _Chosen(frozenset(found), None)

    def _is_of_unet(self, name: Name) -> bool:
        network = self.layout.homes[name][0].network
        return network is not None and network.role == "unet"

    # -------------------------------------------------------------------------------- what to say

    def _kinds_of(self, names: frozenset[Name]) -> list[str]:
        homes = self.layout.homes
        return [kind for kind in KINDS if any(is_kind(kind, n[1], homes[n][0].network) for n in names)]

    def _why_not(self, word: str) -> str:
        low = word.lower()
        if low in KINDS:
            return f"no layer here is {low}"
        if low in _COMPONENTS:
            return f"there is no {low}, but {listing(part or 'model' for part in self.layout.parts)}"
        if low in ("base", "clip", "t5"):
            return f"there is no {'text encoder or VAE' if low == 'base' else word}"
        return f"no block, layer or tensor is called {quote(word)}"

    def _nearest(self, word: str) -> str:
        shown = all_shown(self.layout.parts.values())
        known = {name.lower(): name for name in (*shown, *KINDS, *(part for part in self.layout.parts if part))}
        near = [] if word.lower() in known else difflib.get_close_matches(word.lower(), known, n=1)
        return (f"did you mean {known[near[0]]}? " if near else "") + f"there are {there(self.layout)}"


_COMPONENTS = frozenset({
    "unet", "transformer", "transformer_2", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder",
    "ema",
})  # fmt: skip

# What sd-webui-lora-block-weight calls Flux's blocks, and the middle one.
_GROUPS = {"d": "double", "s": "single", "mid": "m"}

# Layers as supermerger lists them, by LDM's names, which are other words in canonical names.
_ELEMENTS = {
    "in_layers": re.compile(r"\.resnets\.\d+\.(norm1|conv1)\."),
    "in_layers.0": re.compile(r"\.resnets\.\d+\.norm1\."),
    "in_layers.2": re.compile(r"\.resnets\.\d+\.conv1\."),
    "emb_layers": re.compile(r"\.time_emb_proj\."),
    "emb_layers.1": re.compile(r"\.time_emb_proj\."),
    "out_layers": re.compile(r"\.resnets\.\d+\.(norm2|conv2)\."),
    "out_layers.0": re.compile(r"\.resnets\.\d+\.norm2\."),
    "out_layers.3": re.compile(r"\.resnets\.\d+\.conv2\."),
    "skip_connection": re.compile(r"\.conv_shortcut\."),
    "op": re.compile(r"\.downsamplers\."),
    "time_embed": re.compile(r"^time_embedding\."),
    "label_emb": re.compile(r"^add_embedding\."),
}


def there(layout: Layout) -> str:
    """Which blocks there are, in few words."""
    found = ranges(all_shown(layout.parts.values()))
    return ", ".join(found[:12]) + (f" (and {len(found) - 12:,} more)" if len(found) > 12 else "")


def _names_in(part: Part) -> list[Name]:
    return [*(name for names in part.tensors.values() for name in names), *part.loose]


def _depths(blocks: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Each block with its u: 0 at the first, 1 at the last."""
    for place, block in enumerate(blocks):
        yield block, place / max(1, len(blocks) - 1)
