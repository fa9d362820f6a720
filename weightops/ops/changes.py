"""What a set of adapters does to one band of a weight: the sum of their changes, one rounding, and what survives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.engine.chunks import BLOCK_VALUES
from weightops.merging.method import WORKING_VALUES
from weightops.merging.rounding import generator_for
from weightops.ops.products import TILE_VALUES, add_products, are_products, factors, store_rounded
from weightops.ops.survival import Survival, survival, together

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import EllipsisType

    import torch
    from torch import Tensor

    from weightops.files.tensor import TensorSpec
    from weightops.lora.family import Family, Parts, Told
    from weightops.lora.pieces import Bands
    from weightops.plan import Block, Input

# Values of a weight that are changed at a stroke: larger bands leave the cache between one operation and the next.
BAND_VALUES = 2 * WORKING_VALUES


@dataclass(frozen=True, slots=True)
class Change:
    """One adapter's change of a band of a weight, or of a bias.

    parts: names, in the order of the task's inputs after the weight. cut: those of which a block's own rows come; the
    others come whole. columns: of the parts that are some columns of what is read. shape: of the whole weight that the
    parts describe. window: the weight's own rows of that one, if it is one of several. frame: so many further inputs
    are, stacked, that whole weight as it was, for where its rows depend on each other.
    """

    family: Family
    parts: tuple[str, ...]
    cut: frozenset[str]
    columns: dict[str, tuple[int, int]]
    alpha: float | None
    told: Told
    strength: float
    shape: tuple[int, ...]
    of_bias: bool
    window: Bands | None = None
    frame: int = 0

    @property
    def count(self) -> int:
        return len(self.parts) + self.frame


def fused(
    changes: Sequence[Change], *, name: str, seed: int | None, other: str | None, whole: bool, transposed: bool = False,
    scaled: bool = False,
) -> Callable[[Sequence[Tensor], Sequence[Tensor], Block], Any]:  # fmt: skip
    """The compute function: inputs are the weight's rows and then each change's parts.

    seed: of stochastic rounding, None for nearest. other: a dtype to try where little survives. whole: a block is
    changed at one stroke, for rows depend on each other; else in bands that stay in the cache. scaled: the weight is
    codes, whose one scale is the next input.
    """
    products = are_products(changes) and not (whole or transposed or scaled)

    def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block) -> Survival:
        import torch

        given, out, parts = inputs[0], outputs[0], inputs[2 if scaled else 1 :]
        # float32's own sums would be off by units in the last place of a float32 result.
        wide = torch.float64 if {given.dtype, out.dtype} & {torch.float32, torch.float64} else torch.float32
        generator = None if seed is None else generator_for(seed, name, block.number, out.device)
        if products and wide is torch.float32:
            return add_products(given, out, *factors(changes, parts), generator=generator, other=other)
        scale = inputs[1].to(wide).reshape(()) if scaled else None
        found = []
        for band, weight, result in changed_bands(
            changes, given, parts, wide=wide, start=block.start, whole=whole, transposed=transposed, scale=scale
        ):
            written = out[band]
            store_rounded(result, written, generator)
            found.append(survival(weight, result, written, other))
        return together(found)

    return compute


def copies_of(changes: Sequence[Change], parts: Sequence[Input], given: TensorSpec, rows: int) -> int:
    """The values of working copies of the parts, while so many rows of the weight are changed at a stroke."""
    found = 0
    for (change, part), entry in zip(_flat(changes), parts, strict=True):
        read = entry.slot.spec
        found += 2 * min(rows * read.row_values, read.values) if part in change.cut else read.values
        if part in _CORES:
            found += 2 * read.rows * given.row_values
    return found


def work_nbytes(
    changes: Sequence[Change], parts: Sequence[Input], given: TensorSpec, made: TensorSpec, *, seed: int | None,
    whole: bool, scaled: bool,
) -> int:  # fmt: skip
    """The most that the compute function of `fused` takes beside its inputs and outputs, of `given` and `made`.

    Measured, as a test does: copies of what is changed at a stroke, and of the parts.
    """
    size, several = 8 if {given.dtype, made.dtype} & {"F32", "F64"} else 4, len(changes) > 1
    by_chance = 14 * size * min(given.values, WORKING_VALUES) if seed is not None else 0
    if size == 4 and are_products(changes) and not (whole or scaled):
        tile = min(given.values, TILE_VALUES)
        factors_nbytes = 4 * copies_of(changes, parts, given, max(1, BLOCK_VALUES // max(given.row_values, 1)))
        tiles_nbytes = max(4 * (6 if made.dtype.startswith("F8") else 4) * tile, 12 * tile + by_chance)
        return factors_nbytes * (2 if several else 1) + tiles_nbytes + _SMALL
    rows = given.rows if whole else min(given.rows, max(1, BAND_VALUES // max(given.row_values, 1)))
    stroke = rows * max(given.row_values, made.row_values)
    copies = (7 if several else 6) if whole else (9 if several else 7)
    most = max(size * copies * stroke, size * 3 * stroke + by_chance)
    return size * copies_of(changes, parts, given, rows) + most + _SMALL


# Bytes of tensors of a few numbers.
_SMALL = 1 << 12
# Parts with which others are multiplied to something as wide as the weight.
_CORES = ("mid", "hada_t1", "hada_t2", "lokr_t2")


def changed_bands(
    changes: Sequence[Change], given: Tensor, parts: Sequence[Tensor], *, wide: torch.dtype, start: int, whole: bool,
    transposed: bool = False, scale: Tensor | None = None,
) -> Iterator[tuple[slice | EllipsisType, Tensor, Tensor]]:  # fmt: skip
    """W and W + Σ in the dtype `wide`, some rows at a time and which these are; the first is row `start` of W.

    Without changes, W + Σ is W. scale: by which `given` is to be multiplied, and frames with it.
    """
    shared = [None if p in c.cut else t.to(wide) for (c, p), t in zip(_flat(changes), parts, strict=True)]
    if scale is not None:
        shared = [t if p or t is None else t * scale for (_, p), t in zip(_flat(changes), shared, strict=True)]
    rows = len(given) if given.ndim else 1
    step = rows if whole or transposed else max(1, BAND_VALUES * rows // max(given.numel(), 1))
    for first in range(0, rows, max(step, 1)):
        band = slice(first, first + step) if step < rows else ...
        weight = given[band].to(wide)
        if scale is not None:
            weight = weight * scale
        own = [t[band].to(wide) if s is None else s for t, s in zip(parts, shared, strict=True)]
        result = _changed(changes, weight.T if transposed else weight, own, start + first)
        result = result.T.contiguous() if transposed else result
        yield band, _padded(weight, result.shape), result


def _flat(changes: Sequence[Change]) -> list[tuple[Change, str]]:
    return [(change, part) for change in changes for part in (*change.parts, *[""] * change.frame)]


def _changed(changes: Sequence[Change], weight: Tensor, inputs: Sequence[Tensor], start: int) -> Tensor:
    """W + Σ λᵢ·(W'ᵢ − W): each change is of the original W, of which these are the rows from `start` on."""
    total: Tensor | None = None
    position = 0
    for change in changes:
        given = inputs[position : position + change.count]
        position += change.count
        found = _one(change, _padded(weight, change.shape), given, start)
        if total is None:  # the first is taken as it is: adding its difference would round once more
            total = found
            continue
        shape = tuple(map(max, found.shape, total.shape))
        total = _padded(total, shape) + (_padded(found, shape) - _padded(weight, shape))
    return weight if total is None else total


def added(
    changes: Sequence[Change],
) -> Callable[[Sequence[Tensor], Tensor | None, slice, torch.dtype], Tensor]:
    """A function of the parts, of rows of a weight W, which these are, and a dtype to work in: Σ λᵢ·(W'ᵢ − W) there.

    W may be None where no change depends on it (see `depends`).
    """

    plain = not depends(changes) and all(c.window is None and not c.of_bias and c.strength == 1 for c in changes)

    def change(parts: Sequence[Tensor], weight: Tensor | None, rows: slice, working: torch.dtype) -> Tensor:
        import torch

        given = [t.to(working) for t in parts]
        height = rows.stop - rows.start
        if plain:  # nothing but products: no zeros to add them to
            return _sum_of_deltas(changes, given, height, rows.start)
        if weight is None or not depends(changes):
            weight = torch.zeros((height, *changes[0].shape[1:]), dtype=working, device=given[0].device)
        return _changed(changes, weight, given, rows.start) - weight

    return change


def _sum_of_deltas(changes: Sequence[Change], inputs: Sequence[Tensor], height: int, start: int) -> Tensor:
    """Σ ΔWᵢ of adapters that are additions, of so many rows from `start` on."""
    total: Tensor | None = None
    position = 0
    for change in changes:
        parts, rows = _parts(change, inputs[position : position + change.count], height, start)
        position += change.count
        assert change.family.delta is not None
        delta = change.family.delta(parts, slice(None) if rows is None else rows)
        total = delta if total is None else total + delta
    assert total is not None
    return total


def depends(changes: Sequence[Change]) -> bool:
    """Does any depend on the weight that it changes?"""
    return any(
        change.family.sets or (not change.of_bias and (change.family.delta is None or "dora_scale" in change.parts))
        for change in changes
    )


def _padded(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight with zeros for the inputs that the shape has more; its rows may be a band's."""
    import torch

    more = [max(wide - narrow, 0) for narrow, wide in zip(weight.shape[1:], shape[1:], strict=True)]
    if not any(more):
        return weight
    return torch.nn.functional.pad(weight, [n for wider in reversed(more) for n in (0, wider)])


def _one(change: Change, weight: Tensor, given: Sequence[Tensor], start: int) -> Tensor:
    from weightops.lora.family import Parts, change_bias
    from weightops.lora.family import change as change_weight

    if change.window is not None:
        parts = Parts(_tensors(change, given), change.alpha, change.shape, change.told)
        return _through_window(change, parts, weight, given[len(change.parts) :], start)
    parts, rows = _parts(change, given, len(weight), start)
    if change.of_bias:
        found = change_bias(change.family, parts, weight, change.strength)
        assert found is not None
        return found
    return change_weight(change.family, parts, weight, change.strength, rows)


def _parts(change: Change, given: Sequence[Tensor], height: int, start: int) -> tuple[Parts, slice | None]:
    """The parts, and which rows of what they describe are meant: None for all."""
    from weightops.lora.family import Parts

    if change.cut:  # the parts are those of a weight that has these rows alone
        shape, rows = (height, *change.shape[1:]), None
    else:
        shape, rows = change.shape, slice(start, start + height)
    return Parts(_tensors(change, given), change.alpha, shape, change.told), rows


def _tensors(change: Change, given: Sequence[Tensor]) -> dict[str, Tensor]:
    tensors = {}
    for part, tensor in zip(change.parts, given, strict=False):
        columns = change.columns.get(part)
        tensors[part] = tensor if columns is None else tensor[:, columns[0] : columns[1]]
    return tensors


def _through_window(change: Change, parts: Parts, weight: Tensor, frame: Sequence[Tensor], start: int) -> Tensor:
    """These rows of what the parts make of a taller weight."""
    import torch

    from weightops.lora.family import change as change_weight

    assert change.window is not None
    if not frame:
        found, position = [], 0
        for low, high in change.window:
            a, b = max(start, position), min(start + len(weight), position + high - low)
            if a < b:
                rows = slice(low + a - position, low + b - position)
                own = weight[a - start : b - start]
                found.append(change_weight(change.family, parts, own, change.strength, rows))
            position += high - low
        return torch.cat(found) if len(found) > 1 else found[0] if found else weight
    order = torch.cat([torch.arange(low, high, device=weight.device) for low, high in change.window])
    stacked = torch.cat([tensor.reshape(len(tensor), *weight.shape[1:]) for tensor in frame])
    if len(order) == len(stacked):  # all its rows, in another order
        stacked = stacked[order.argsort()]
    return change_weight(change.family, parts, stacked, change.strength)[order]
