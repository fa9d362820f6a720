"""A LoRA file of any family and dialect as exact factors under canonical names: what it has, and its values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from weightops.errors import MismatchError, ValueRefused, WeightopsError, listing, quote
from weightops.files.checkpoint import open_checkpoint
from weightops.lora.adapters import read_adapters
from weightops.lora.dialects import DIALECTS
from weightops.lora.family import Parts
from weightops.naming.keymap import ARCHITECTURES
from weightops.ops.adapter_modules import check_held
from weightops.ops.dialect import State, pieces_of
from weightops.synthesis.layout import Layout, Module

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from weightops.files.checkpoint import Checkpoint
    from weightops.lora.adapters import AdapterFile
    from weightops.lora.pieces import Piece, Source

    Leaves = dict[tuple[str, tuple[tuple[int, int], ...], int, int], bytes]

_KEPT = 64  # kinds of headers that are remembered


@dataclass(frozen=True, slots=True)
class Member:
    """What a LoRA changes, from its header: its modules by (component, name).

    The rank of a module is that of its product of two factors, whatever family it is of.
    """

    label: str
    architecture: str
    modules: Mapping[tuple[str, str], Module]


class Reader:
    """Reads LoRAs, of which many are alike: what is the same in their headers is worked out once, and held once.

    architecture: the one that is meant, where names and shapes fit several.
    """

    def __init__(self, architecture: str | None = None) -> None:
        self.architecture = architecture
        self._found: dict[bytes, AdapterFile] = {}
        self._modules: dict[tuple[Module, ...], dict[tuple[str, str], Module]] = {}

    def member(self, file: str | os.PathLike[str]) -> Member:
        """What the file changes. Reads little but its header. Raises MismatchError, FormatError."""
        with open_checkpoint(file) as opened:
            return self._looked_at(opened)[0]

    def factors(
        self, file: str | os.PathLike[str], layout: Layout, *, pad: bool = False
    ) -> tuple[list[tuple[Tensor, Tensor]], str]:
        """The factors of a layout's modules, exactly, in float64, strengths folded in, and the file's hash.

        pad: ranks and modules that the file lacks are zeros. The hash is XXH3-128 of all tensors that were read.
        Raises MismatchError for a file of other modules, ValueRefused for NaN or Inf.
        """
        import torch

        from weightops.engine.run import hash_of

        with open_checkpoint(file) as opened:
            member, pieces = self._looked_at(opened)
            check_fits(member, layout, pad=pad)
            leaves: Leaves = {}
            found = []
            for module in layout.modules:
                piece = pieces.get((module.component, module.name))
                if piece is None:
                    zeros = torch.zeros(module.out, module.rank, dtype=torch.float64)
                    found.append((zeros, torch.zeros(module.rank, module.n, dtype=torch.float64)))
                    continue
                up, down = _product(opened, piece, leaves)
                lacking = module.rank - up.shape[1]
                if lacking:
                    up = torch.nn.functional.pad(up, (0, lacking))
                    down = torch.nn.functional.pad(down, (0, 0, 0, lacking))
                found.append((up, down))
            return found, hash_of(leaves)

    def _looked_at(self, opened: Checkpoint) -> tuple[Member, dict[tuple[str, str], Piece]]:
        """What the file changes, and the pieces that do, each a product of two factors."""
        found = self._adapters(opened)
        check_held(opened, found)
        found.check()
        state = State(opened, found, DIALECTS["diffusers"], ARCHITECTURES.get(found.architecture or ""))
        if found.embeddings:
            what = f"holds an embedding beside its modules: {listing(found.embeddings)}"
            raise MismatchError(opened.label, what, "a space holds changes of weights alone")
        pieces = pieces_of(state, ())
        for piece in pieces:
            why = _why_not(piece)
            if why:
                raise MismatchError(
                    opened.label, f"{quote(piece.adapter)} {why}, and is no product of two factors",
                    "weightops convert --to lora --base MODEL makes a plain LoRA of it",
                )  # fmt: skip
        modules = tuple(map(_module, pieces))
        held = self._modules.setdefault(modules, {(m.component, m.name): m for m in modules})
        by_name = {(p.component, p.name): p for p in pieces}
        return Member(opened.label, state.architecture.name, held), by_name

    def _adapters(self, opened: Checkpoint) -> AdapterFile:
        import xxhash

        said = repr([(key, info.spec) for key, info in opened.tensors.items()]) + repr(sorted(opened.metadata.items()))
        digest = xxhash.xxh3_128_digest(said.encode(errors="surrogatepass"))
        found = self._found.get(digest)
        if found is None:
            if len(self._found) >= _KEPT:
                self._found.clear()
            found = self._found[digest] = read_adapters(opened, architecture=self.architecture)
        return replace(found, label=opened.label)


def read_member(file: str | os.PathLike[str], *, architecture: str | None = None) -> Member:
    """What one file changes: see Reader."""
    return Reader(architecture).member(file)


def read_factors(
    file: str | os.PathLike[str], layout: Layout, *, pad: bool = False
) -> tuple[list[tuple[Tensor, Tensor]], str]:
    """The factors and the hash of one file: see Reader."""
    return Reader(layout.architecture).factors(file, layout, pad=pad)


def layout_of(members: Sequence[Member]) -> Layout:
    """The modules that any of them changes, each at its largest rank. All are of one architecture."""
    found: dict[tuple[str, str], Module] = {}
    for member in members:
        for place, module in member.modules.items():
            before = found.get(place, module)
            # A kernel may be flattened in one file, and stand with its axes in another.
            shape = max(before.shape, module.shape, key=len)
            found[place] = replace(module, shape=shape, rank=max(before.rank, module.rank))
    order = [c.name for c in ARCHITECTURES.get(members[0].architecture).components]
    places = sorted(found, key=lambda place: (order.index(place[0]), place[1]))
    return Layout(members[0].architecture, tuple(found[place] for place in places))


def check_fits(member: Member, layout: Layout, *, pad: bool) -> None:
    """Refuse a LoRA that the layout cannot hold: of another model, of other modules, of another rank. MismatchError."""
    if member.architecture != layout.architecture:
        what = f"is for {member.architecture}, and the space is of {layout.architecture}"
        raise MismatchError(member.label, what, "a space holds LoRAs of one base model")
    known = {(m.component, m.name): m for m in layout.modules}
    strange = [m.key for place, m in member.modules.items() if place not in known]
    if strange:
        what = f"changes what the space has not: {listing(strange)}"
        raise MismatchError(member.label, what, "--others pad takes all modules into a new space")
    lacking = [m.key for place, m in known.items() if place not in member.modules]
    if lacking and not pad:
        what = f"changes {len(member.modules):,} of the space's {len(known):,} modules; it lacks {listing(lacking)}"
        raise MismatchError(member.label, what, "--others pad takes what it lacks for no change")
    for place, module in member.modules.items():
        wanted = known[place]
        if math.prod(module.shape) != math.prod(wanted.shape) or module.out != wanted.out:
            what = f"{module.key} is {list(module.shape)}, and {list(wanted.shape)} in the space"
            raise MismatchError(member.label, what, "a space holds LoRAs of one base model")
        if module.rank != wanted.rank and not (pad and module.rank < wanted.rank):
            what = f"{module.key} has rank {module.rank}, and {wanted.rank} in the space"
            hint = f"--others pad fills up lower ranks; weightops resize --rank {wanted.rank} cuts higher ones"
            raise MismatchError(member.label, what, hint)


# ------------------------------------------------------------------------------------------------ reading


def _why_not(piece: Piece) -> str:
    if "dora_scale" in piece.parts:
        return "has a magnitude (DoRA)"
    if piece.family.lowrank is None or piece.shape is None:
        return f"is of the family {piece.family.name}"
    if any(part in piece.parts for part in (*piece.family.of_bias, "reshape_weight")):
        return "changes a bias, or the size of its weight"
    return ""


def _module(piece: Piece) -> Module:
    assert piece.shape is not None
    assert piece.family.product_rank is not None
    return Module(piece.component, piece.name, piece.shape, piece.family.product_rank(piece.shapes))


def _product(opened: Checkpoint, piece: Piece, leaves: Leaves) -> tuple[Tensor, Tensor]:
    import xxhash

    assert piece.family.lowrank is not None
    assert piece.shape is not None
    tensors = {}
    for part, source in piece.parts.items():
        data, tensors[part] = _read(opened, source)
        leaves[source.key, source.bands or (), 0, len(data)] = xxhash.xxh3_128_digest(data)
        if not bool(tensors[part].isfinite().all()):
            raise ValueRefused(opened.label, f"tensor {quote(source.key)} holds NaN or Inf")
    try:
        up, down = piece.family.lowrank(Parts(tensors, piece.alpha, piece.shape))
    except WeightopsError as e:
        raise type(e)(opened.label, f"{quote(piece.adapter)}: {e.what}", e.hint) from None
    if not (bool(up.isfinite().all()) and bool(down.isfinite().all())):
        raise ValueRefused(opened.label, f"{quote(piece.adapter)} makes NaN or Inf: its alpha is {piece.alpha}")
    return up, down


def _read(opened: Checkpoint, source: Source) -> tuple[memoryview, Tensor]:
    """The bytes of the rows that hold a part, and its values in float64."""
    from weightops.engine.tensors import as_tensor

    slot = source.rows(opened.tensors[source.key].spec)
    data = memoryview(bytearray(slot.spec.nbytes))
    opened.read_bytes(slot, 0, len(data), data)
    whole = as_tensor(data, slot.spec).double()
    return data, whole if source.columns is None else whole[:, source.columns[0] : source.columns[1]]
