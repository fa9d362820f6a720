"""blocks: the names that `--blocks` knows in a checkpoint or a LoRA, and what they hold. From headers alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops.errors import MismatchError, UsageError
from weightops.files.checkpoint import open_checkpoint
from weightops.lora.adapters import read_adapters
from weightops.naming.block_layout import lay_out
from weightops.naming.identify import MODEL, identify
from weightops.naming.keymap import ARCHITECTURES, NETWORKS
from weightops.naming.presets import list_lengths

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from weightops.files.checkpoint import Checkpoint
    from weightops.lora.adapters import Adapter, AdapterFile
    from weightops.naming.block_layout import Name, Part
    from weightops.naming.identify import Identity
    from weightops.naming.keymap import Network


@dataclass(slots=True)
class Holding:
    """A block, by the name that rules call it by (None: tensors in no block), and what of it is in the file."""

    name: str | None
    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0
    modules: set[str] = field(default_factory=set)

    def to_dict(self, *, of_lora: bool) -> dict[str, Any]:
        found = {"name": self.name, "tensors": self.tensors, "parameters": self.parameters, "bytes": self.nbytes}
        return {**found, "modules": len(self.modules)} if of_lora else found


@dataclass(frozen=True, slots=True)
class Held:
    """A component's blocks, from the first to the last. lists: how many numbers a list for it may have."""

    component: str
    network: str | None
    blocks: tuple[Holding, ...]
    lists: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockTable:
    """The blocks of a file, component by component, the diffusion model's first."""

    path: str
    kind: str
    architecture: str | None
    components: tuple[Held, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON document that scripts may rely on."""
        of_lora = self.kind == "lora"
        return {
            "path": self.path,
            "kind": self.kind,
            "architecture": self.architecture,
            "components": {
                held.component: {
                    "network": held.network,
                    "lists": list(held.lists),
                    "blocks": [holding.to_dict(of_lora=of_lora) for holding in held.blocks],
                }
                for held in self.components
            },
        }


def blocks(path: str | os.PathLike[str], *, architecture: str | None = None) -> BlockTable:
    """Which blocks the file or folder `path` has, and how much is in each.

    Of a LoRA these are the blocks that it changes, and a packed module stands in that of what it packs. architecture:
    the one that a LoRA is for, where its names and sizes fit several. Raises WeightopsError. Never imports torch.
    """
    if architecture is not None:
        ARCHITECTURES.get(architecture)
    with open_checkpoint(path) as opened:
        identity = identify(opened.tensors)
        if identity.kind != "lora":
            if architecture is not None:
                raise UsageError("--architecture", f"is what a LoRA is for, and {opened.label} is none")
            keys = _of_checkpoint(opened, identity)
            return _table(opened, identity.kind, identity.architecture, keys, whole=True)
        found = read_adapters(opened, architecture=architecture)
        if found.indexed:
            found.check()
        if found.architecture is None and found.possible:
            several = ", ".join(found.possible)
            what = f"cannot tell which model it is for: {several} have modules of these names and sizes"
            raise MismatchError(opened.label, what, f"--architecture {found.possible[0]} says which")
        return _table(opened, "lora", found.architecture, _of_lora(found), whole=False)


def networks_of(identity: Identity, names: Mapping[Name, Any]) -> dict[Name, Network | None]:
    """The network of each tensor, given by component and canonical name."""
    known = {c: part.match.network for c, part in identity.parts.items() if part.match is not None}
    return {name: known.get(name[0]) for name in names}


def _of_checkpoint(opened: Checkpoint, identity: Identity) -> dict[str, tuple[Name, Network | None, str]]:
    """key -> its canonical name, its network, its module."""
    found: dict[str, tuple[Name, Network | None, str]] = {}
    for component, part in identity.parts.items():
        if part.match is None or identity.architecture is None:
            continue
        for key, body in part.bodies.items():
            # LDM's averages have lost their dots.
            claim = part.match.table.claim(body) or part.match.table.squashed(body.removeprefix("diffusion_model"))
            if claim is not None:
                found[key] = (component, claim.names[0]), part.match.network, ""
    for key in opened.tensors:
        # As in `fuse`: of an unknown model the keys themselves are the names.
        component = "" if identity.architecture is None else identity.components[key]
        found.setdefault(key, ((component, key), None, ""))
    return {key: found[key] for key in opened.tensors}


# Where kohya's names have a number, for models that are not known.
_NUMBER = re.compile(r"_(\d+)(?=_)")
_ENCODERS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}


def _of_lora(found: AdapterFile) -> dict[str, tuple[Name, Network | None, str]]:
    """The same of an adapter file's modules."""
    networks = {}
    if found.architecture is not None:
        components = ARCHITECTURES.get(found.architecture).components
        networks = {component.name: NETWORKS.get(component.network) for component in components}
    keys: dict[str, tuple[Name, Network | None, str]] = {}
    for adapter in found.adapters:
        name = _name_of(adapter)
        network = networks.get(name[0]) if adapter.target is not None else None
        keys |= dict.fromkeys(adapter.keys.values(), (name, network, adapter.name))
    return keys


def _name_of(adapter: Adapter) -> Name:
    if adapter.target is not None and adapter.component is not None:
        return adapter.component, f"{adapter.target.names[0]}.weight"
    body = _NUMBER.sub(r".\1.", adapter.body).replace("._", ".") if adapter.beginning.flat else adapter.body
    part = adapter.beginning.part
    return "" if part in (MODEL, "any") else _ENCODERS.get(part, "text_encoder"), f"{body}.weight"


def _table(
    opened: Checkpoint, kind: str, architecture: str | None,
    keys: Mapping[str, tuple[Name, Network | None, str]], *, whole: bool,
) -> BlockTable:  # fmt: skip
    layout = lay_out({name: network for name, network, _ in keys.values()})
    found: dict[tuple[str, str | None], Holding] = {}
    for key, (name, _, module) in keys.items():
        part, block = layout.homes[name]
        shown = None if block is None else part.shown(block)
        holding = found.setdefault((part.component, block), Holding(shown))
        spec = opened.tensors[key].spec
        holding.tensors += 1
        holding.parameters += spec.values
        holding.nbytes += spec.nbytes
        holding.modules.add(module)
    in_order = sorted(layout.parts.values(), key=lambda part: not part.is_model)
    return BlockTable(opened.label, kind, architecture, tuple(_held(part, found, whole=whole) for part in in_order))


def _held(part: Part, found: Mapping[tuple[str, str | None], Holding], *, whole: bool) -> Held:
    names = [*dict.fromkeys((*part.order, *part.tensors)), None]
    rows = tuple(found[part.component, block] for block in names if (part.component, block) in found)
    network = None if part.network is None else part.network.name
    lists = list_lengths(network, part.order) if whole and part.is_model and part.order else []
    return Held(part.component or MODEL, network, rows, tuple(lists))
