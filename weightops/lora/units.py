"""Pieces as a dialect writes them: its names of their modules, the packs that it has joined, strengths folded.

Knows names, shapes and spellings; reads nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from weightops.errors import MismatchError, quote
from weightops.lora.joining import join
from weightops.lora.pieces import Fill, Fills, Piece, Source, swapped_halves
from weightops.naming.keymap import EQUAL, IN, NETWORKS, Architecture, Component, Rule, Table, swaps
from weightops.naming.recognise import row_of

if TYPE_CHECKING:
    from weightops.files.tensor import TensorSpec
    from weightops.lora.dialects import Dialect

# ComfyUI's names of the text encoders within a model.
_COMFY_ENCODERS = {
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_h": "text_encoders.clip_h.transformer.",
    "clip_bigg": "text_encoders.clip_g.transformer.",
    "t5_xxl": "text_encoders.t5xxl.transformer.",
    "umt5": "text_encoders.umt5xxl.transformer.",
    "umt5_xxl": "text_encoders.umt5xxl.transformer.",
}

# Families whose strength is alpha / rank, and the part that a folded strength is multiplied into.
STRENGTH_GOES_INTO = {"lora": ("up", "bias"), "loha": ("hada_w1_a",), "lokr": ("lokr_w1", "lokr_w1_a")}

Same = Callable[[Source, Source], bool]


@dataclass(frozen=True, slots=True)
class Unit:
    """An adapter as it is to be written: its module's name in the target, and what fills each part.

    `prefix` stands before the module. pieces: what it is made of. folded: how many of them in another strength.
    """

    component: str
    prefix: str
    module: str
    family: str
    parts: Mapping[str, tuple[TensorSpec, Fills]]
    alpha: float | None
    rank: int | None
    pieces: tuple[Piece, ...]
    folded: int = 0

    @property
    def name(self) -> str:
        return self.prefix + self.module


@dataclass(frozen=True, slots=True)
class Target:
    """Where pieces go: a dialect of an architecture's adapters. `variant`: the sizes of its network, if known."""

    dialect: Dialect
    architecture: Architecture
    variant: str | None
    label: str

    def place(self, component: str) -> Component:
        return next(c for c in self.architecture.components if c.name == component)

    def table(self, place: Component) -> Table:
        network = NETWORKS.get(place.network)
        spelling = ""
        if self.dialect.name == "kohya":
            spelling = place.kohya_spelling
        elif self.dialect.name == "comfy" and not _is_encoder(place):
            spelling = place.comfy_spelling or place.spelling
        return network.tables()[spelling or network.canonical]

    def prefix(self, place: Component) -> str:
        """What stands before the names of a component's modules. Raises MismatchError where there is no such name."""
        if self.dialect.name == "kohya":
            if not place.kohya:
                raise MismatchError(self.label, f"kohya has no names for the {place.name} of {self.architecture.title}")
            return place.kohya + "_"
        if self.dialect.name == "onetrainer":
            encoders = [c.name for c in self.architecture.components if _is_encoder(c)]
            number = str(encoders.index(place.name) + 1) if _is_encoder(place) and len(encoders) > 1 else ""
            return f"lora_te{number}_" if _is_encoder(place) else f"lora_{place.name}_"
        if self.dialect.name == "comfy":
            if not _is_encoder(place):
                return "diffusion_model."
            prefix = _COMFY_ENCODERS.get(place.variant or place.network)
            if prefix is None:
                raise MismatchError(self.label, f"ComfyUI has no names for the {place.name} of this model that we know")
            return prefix
        return "base_model.model." if self.dialect.name == "peft" else f"{place.name}."


def _is_encoder(place: Component) -> bool:
    return place.name.startswith("text_encoder")


def units_of(target: Target, component: str, pieces: Sequence[Piece], same: Same) -> list[Unit]:
    """The pieces of a component under the names of the target, those that it packs together joined.

    same: do two sources hold the same bytes? Raises MismatchError for what has no name, or cannot be joined.
    """
    place = target.place(component)
    table, prefix = target.table(place), target.prefix(place)
    by_name = {(p.family.name, p.name): p for p in pieces}
    done: set[tuple[str, str]] = set()
    found = []
    for piece in pieces:
        if (piece.family.name, piece.name) in done:
            continue
        spelled = table.spelled_module(piece.name)
        if spelled is None:
            what = f"{piece.name} of the {component} has no name in {target.dialect.name}'s spelling"
            raise MismatchError(target.label, what)
        rule, module, names = spelled
        module = module.replace(".", "_") if target.dialect.flat else module
        if len(names) == 1:
            found.append(_single(target, piece, rule, prefix, module))
            continue
        group = [by_name.get((piece.family.name, name)) for name in names]
        done |= {(piece.family.name, name) for name in names}
        rows = [_rows_of(target, place, names, group, rule, n) for n in range(len(names))]
        joined = join(group, rows, same, target.label, prefix + module)
        rank = piece.family.rank({part: spec.shape for part, (spec, _) in joined.parts.items()})
        made_of = tuple(p for p in group if p is not None)
        found.append(
            Unit(component, prefix, module, piece.family.name, joined.parts, joined.alpha, rank, made_of, joined.folded)
        )
    return found


def _single(target: Target, piece: Piece, rule: Rule, prefix: str, module: str) -> Unit:
    parts = dict(piece.parts)
    if rule.swapped or rule.swapped_when is not None:
        shape = piece.shape
        rows = shape[0] if shape else piece.height
        features = shape[1] if shape is not None and len(shape) > 1 else None
        swapped = swaps(rule, rows, features) if rows is not None else None
        if rows is None or swapped is None or rows % 2:
            what = f"{quote(piece.adapter)}: its halves may have to trade places, and its shapes do not tell"
            raise MismatchError(target.label, what)
        if swapped:
            parts = swapped_halves(parts, piece.family, piece.adapter, rows, target.label)
    filled: dict[str, tuple[TensorSpec, Fills]] = {part: (s.spec, (Fill(0, s),)) for part, s in parts.items()}
    return Unit(piece.component, prefix, module, piece.family.name, filled, piece.alpha, piece.rank, (piece,))


def _rows_of(
    target: Target, place: Component, names: Sequence[str], group: Sequence[Piece | None], rule: Rule, number: int
) -> int | None:
    """The rows of a module that the file does not change; None: of one that it does, or not known."""
    if group[number] is not None:
        return None
    shape = next(p for p in group if p is not None).shape
    features = shape[1] if shape is not None and len(shape) > 1 else None
    found = [None if p is None else p.height for p in group]
    return rows_of_pack(target, place, names, found, features, rule, number)


def rows_of_pack(
    target: Target, place: Component, names: Sequence[str], heights: Sequence[int | None], features: int | None,
    rule: Rule, number: int,
) -> int | None:  # fmt: skip
    """The rows of a module in a pack: from its equals, of these heights, or from the architecture's sizes."""
    if rule.heights[number] == IN:
        return features
    equals = (h for h, height in zip(heights, rule.heights, strict=True) if h is not None and height == EQUAL)
    if (height := next(equals, None)) is not None:
        return height
    rows = {
        row[0]
        for v in NETWORKS.get(place.network).variants
        if (row := row_of(f"{names[number]}.weight", v.shapes)) is not None
        and target.variant in (None, v.name)
        and (features is None or len(row) < 2 or row[1] in (None, features))
    }
    return rows.pop() if len(rows) == 1 else None


def folded(unit: Unit) -> Unit:
    """The strength alpha / rank multiplied into one factor, and no alpha."""
    if unit.family not in STRENGTH_GOES_INTO:
        return unit
    strength = 1.0 if unit.alpha is None or not unit.rank else unit.alpha / unit.rank
    parts = dict(unit.parts)
    for part in STRENGTH_GOES_INTO[unit.family]:
        if part in parts and strength != 1.0:
            spec, fills = parts[part]
            already = [1.0 if f.strength is None else f.strength for f in fills]
            parts[part] = spec, tuple(f._replace(strength=strength * a) for f, a in zip(fills, already, strict=True))
    return replace(unit, parts=parts, alpha=None)
