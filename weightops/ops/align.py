"""Where other models have the tensors of the first: under its keys, or, spelled otherwise, by their canonical names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightops.files.tensor import Slot, TensorSpec
from weightops.naming.slots import Place, place

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightops.files.checkpoint import Checkpoint
    from weightops.naming.identify import Identity

# A component and a canonical name.
Name = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a model has all, or one band, of a tensor of the first model. shape: as the first model has it."""

    slot: Slot
    shape: tuple[int, ...]
    transposed: bool = False


class Alignment:
    """The first model's tensors in each of the others; names are only looked up where keys differ."""

    def __init__(self, first: Checkpoint, identity: Identity) -> None:
        self.first = first
        self.identity = identity
        self._pieces: dict[str, list[tuple[Name, Place]]] | None = None
        self._views: dict[int, dict[Name, Place]] = {}
        self._alike: dict[int, dict[str, str]] = {}

    def add(self, number: int, model: Checkpoint, identity: Identity) -> None:
        """Take in a model; its names are read where it lacks a key of the first and both have known networks."""
        if model.tensors.keys() >= self.first.tensors.keys():
            return
        self.names("")
        known = {c: part.match.network.name for c, part in self.identity.parts.items() if part.match is not None}
        self._views[number] = {
            name: found
            for name, found in places_of(model, identity).items()
            if (part := identity.parts[name[0]]).match is not None and known.get(name[0]) == part.match.network.name
        }

    def names(self, key: str) -> list[tuple[Name, Place]]:
        """The canonical tensors that the first model's tensor holds, in order; none where its names are unknown."""
        if self._pieces is None:
            self._pieces = {}
            for name, found in places_of(self.first, self.identity).items():
                self._pieces.setdefault(found.slot.key, []).append((name, found))
        return self._pieces.get(key, [])

    def find(self, number: int, model: Checkpoint, key: str) -> tuple[Spot, ...] | None:
        """Where the model has the first model's tensor `key`: whole, or piece by piece in the first's order."""
        info = model.tensors.get(key)
        if info is not None:
            return (Spot(Slot(key, info.spec), info.spec.shape),)
        view = self._views.get(number)
        pieces = (self._pieces or {}).get(key, [])
        if view is None or not pieces or any(name not in view for name, _ in pieces):
            return None
        return tuple(self._spot(mine, view[name]) for name, mine in pieces)

    def _spot(self, mine: Place, theirs: Place) -> Spot:
        """The other model's piece, in the shape that the first has: a transposed one twice turned stays as it is."""
        if mine.transposed == theirs.transposed:
            return Spot(theirs.slot, theirs.slot.spec.shape)
        return Spot(theirs.slot, theirs.slot.spec.shape[::-1], transposed=True)

    def pieces(self, key: str) -> tuple[Slot, ...]:
        """The bands of the first model's tensor, as `find` numbers them."""
        return tuple(mine.slot for _, mine in (self._pieces or {}).get(key, []))

    def counterparts(self, number: int) -> Mapping[str, str]:
        """Keys of the model -> the first's key that holds the same canonical tensor, where they are spelled apart."""
        if number not in self._alike:
            mine = {name: key for key, found in (self._pieces or {}).items() for name, _ in found}
            view = self._views.get(number, {})
            self._alike[number] = {found.slot.key: mine[name] for name, found in view.items() if name in mine}
        return self._alike[number]


def places_of(model: Checkpoint, identity: Identity) -> dict[Name, Place]:
    """Where a model has each canonical tensor of the networks that are known, averages apart."""
    found: dict[Name, Place] = {}
    for component, part in identity.parts.items():
        if part.match is not None and component != "ema":
            placing = place(part.match.table, part.bodies, model.tensors)
            found |= {(component, name): where for name, where in placing.places.items()}
    return found


def same_cut(spots: Sequence[Spot], pieces: Sequence[Slot]) -> tuple[Spot, ...]:
    """A tensor that a model has whole, under the first's key, cut as the first's pieces are."""
    if len(spots) == len(pieces) and spots[0].slot.key != pieces[0].key:
        return tuple(spots)
    dtype = spots[0].slot.spec.dtype
    return tuple(Spot(Slot(spots[0].slot.key, TensorSpec(dtype, p.spec.shape), p.bands), p.spec.shape) for p in pieces)
