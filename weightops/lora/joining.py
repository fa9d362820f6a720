"""Adapters of several modules, written as one of the tensor that packs them; exactly, or with strengths folded.

Source: FORMATS §7. Rows of a packed weight are rows of `up`; the parts share `down`, or `up` is block-diagonal.
Knows names, shapes and bytes; no files, no devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightops.errors import MismatchError, quote
from weightops.files.tensor import TensorSpec
from weightops.lora.pieces import Fill, Fills, Piece, Source, scaled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Joined:
    """Pieces written as one adapter of a packed module.

    parts: part -> (spec of the whole, what fills it). folded: the pieces whose strengths differ, and are multiplied
    into their `up`.
    """

    parts: Mapping[str, tuple[TensorSpec, Fills]]
    alpha: float | None
    folded: int = 0


def join(
    pieces: Sequence[Piece | None], rows: Sequence[int | None], same: Callable[[Source, Source], bool], label: str,
    module: str,
) -> Joined:  # fmt: skip
    """One adapter of the module that packs these pieces, in order; None: a module that no adapter changes.

    rows: of each module, None where not known. same: do two sources hold the same bytes? Raises MismatchError.
    """
    there = [p for p in pieces if p is not None]
    first = there[0]
    if len({frozenset(p.parts) for p in there}) > 1 or ("dora_scale" in first.parts and len(there) < len(pieces)):
        raise MismatchError(label, f"{quote(module)} would join adapters of different parts")
    if "reshape_weight" in first.parts:
        raise MismatchError(label, f"{quote(module)} would join adapters that give their weights other shapes")
    if any(_is_inward(p) for p in there):
        raise MismatchError(
            label,
            f"{quote(module)} would join magnitudes for each input: their norms would run over the rows of all",
            "--to diffusers needs no packing",
        )
    heights_ = [p.height if p is not None else h for p, h in zip(pieces, rows, strict=True)]
    if any(h is None for h in heights_):
        raise MismatchError(
            label,
            f"{quote(module)} packs modules that this file does not change, and their sizes are not known",
            "--to diffusers needs no packing",
        )
    starts = [sum(h or 0 for h in heights_[:n]) for n in range(len(heights_))]
    total = sum(h or 0 for h in heights_)
    cut = set(first.family.rows) | {"dora_scale"}
    shared = [part for part in first.parts if part not in cut]
    alike = "hada_t1" not in first.parts and all(
        p.alpha == first.alpha and all(same(first.parts[part], p.parts[part]) for part in shared) for p in there[1:]
    )
    _check_rows(there, cut if alike else set(first.parts), label, module)
    if alike:
        return _stacked(pieces, starts, total, cut, label, module)
    if first.family.name != "lora" or "mid" in first.parts:
        raise MismatchError(
            label,
            f"{quote(module)} would join {len(there)} adapters of the family {first.family.name}, which is not exact",
            "--to diffusers keeps them apart",
        )
    return _diagonal(pieces, starts, total)


def _is_inward(piece: Piece) -> bool:
    """Is its magnitude one for each input, and not for each output?"""
    scale = piece.parts.get("dora_scale")
    return scale is not None and scale.spec.rows != piece.height


def _check_rows(pieces: Sequence[Piece], parts: Iterable[str], label: str, module: str) -> None:
    """Rows of one tensor have one dtype and one width; the columns of `up` are each piece's own."""
    for part in parts:
        specs = {(p.parts[part].spec.dtype, p.parts[part].spec.shape[1:]) for p in pieces if part in p.parts}
        if part == "up":
            specs = {(dtype, shape[1:]) for dtype, shape in specs}
        if len(specs) > 1:
            raise MismatchError(label, f"{quote(module)} would join tensors ({part}) whose dtypes or widths differ")


def _stacked(
    pieces: Sequence[Piece | None], starts: Sequence[int], total: int, cut: set[str], label: str, module: str
) -> Joined:
    """Pieces that share all but their rows."""
    first = next(p for p in pieces if p is not None)
    parts: dict[str, tuple[TensorSpec, Fills]] = {}
    height = first.height or 1
    for part, source in first.parts.items():
        if part not in cut:
            parts[part] = source.spec, (Fill(0, source),)
            continue
        # A row of LoKr's first factor stands for as many as the second one has, which they share.
        step = height // source.spec.rows if part != "dora_scale" else 1
        if any(start % step for start in (*starts, total)):
            raise MismatchError(label, f"{quote(module)}: rows that no adapter changes are no multiple of {step}")
        fills = (Fill(s // step, p.parts[part]) for p, s in zip(pieces, starts, strict=True) if p is not None)
        parts[part] = source.spec.with_rows(total // step), tuple(fills)
    return Joined(parts, first.alpha)


def _diagonal(pieces: Sequence[Piece | None], starts: Sequence[int], total: int) -> Joined:
    """`down` stacked and `up` block-diagonal: the rank is the sum, and alpha grows with it."""
    there = [(p, start) for p, start in zip(pieces, starts, strict=True) if p is not None]
    alpha, folds = _one_strength([p for p, _ in there])
    first = there[0][0]
    rank = sum(p.parts["down"].spec.rows for p, _ in there)
    ups, downs = [], []
    column = 0
    for (piece, start), fold in zip(there, folds, strict=True):
        up, down = piece.parts["up"], piece.parts["down"]
        ups.append(Fill(start, up, (column, column + down.spec.rows), fold))
        downs.append(Fill(column, down))
        column += down.spec.rows
    up_spec, down_spec = first.parts["up"].spec, first.parts["down"].spec
    parts: dict[str, tuple[TensorSpec, Fills]] = {
        "up": (TensorSpec(up_spec.dtype, (total, rank, *up_spec.shape[2:])), tuple(ups)),
        "down": (down_spec.with_rows(rank), tuple(downs)),
    }
    for part in ("bias", "dora_scale"):
        if part in first.parts:
            strengths = folds if part == "bias" else [None] * len(there)
            fills = tuple(Fill(start, p.parts[part], None, f) for (p, start), f in zip(there, strengths, strict=True))
            parts[part] = first.parts[part].spec.with_rows(total), fills
    return Joined(parts, alpha, sum(f is not None for f in folds))


def _one_strength(pieces: Sequence[Piece]) -> tuple[float | None, list[float | None]]:
    """The alpha of them all together where their strengths are equal; else none, and what each is multiplied by."""
    ranks = [p.parts["down"].spec.rows for p in pieces]
    alphas = [float(r) if p.alpha is None else p.alpha for p, r in zip(pieces, ranks, strict=True)]
    # Compared without a division.
    equal = all(a * ranks[0] == alphas[0] * r for a, r in zip(alphas, ranks, strict=True))
    if equal and all(p.alpha is None for p in pieces):
        return None, [None] * len(pieces)
    alpha = scaled(alphas[0], sum(ranks), ranks[0]) if equal else None
    if alpha is not None:
        return alpha, [None] * len(pieces)
    return None, [None if a == r else a / r for a, r in zip(alphas, ranks, strict=True)]
