"""What a set of adapters does to one band of a weight: the sum of their changes, one rounding, and what survives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from weightops.merging.method import WORKING_VALUES, store
from weightops.merging.rounding import generator_for, store_stochastic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor

    from weightops.lora.family import Family, Parts
    from weightops.plan import Block

# Values of a weight that are changed at a stroke: larger bands leave the cache between one operation and the next.
BAND_VALUES = 2 * WORKING_VALUES

# Below this share of what was meant, another dtype is tried beside the one that is written.
WORTH_A_LOOK = 0.99


@dataclass(frozen=True, slots=True)
class Change:
    """One adapter's change of a band of a weight, or of a bias.

    parts: names, in the order of the task's inputs after the weight. cut: those of which a block's own rows come; the
    others come whole. columns: of the parts that are some columns of what is read. shape: of the whole weight.
    """

    family: Family
    parts: tuple[str, ...]
    cut: frozenset[str]
    columns: dict[str, tuple[int, int]]
    alpha: float | None
    strength: float
    shape: tuple[int, ...]
    of_bias: bool


class Survival(NamedTuple):
    """Sums over the values of a block: ‖meant‖², ⟨added, meant⟩, ‖added − meant‖², ‖W‖²; and the last two of these
    sums for the dtype that was tried beside it (None: it was not)."""

    meant: float
    along: float
    off: float
    weight: float
    other: tuple[float, float] | None = None


def fused(
    changes: Sequence[Change], *, name: str, seed: int | None, other: str | None, whole: bool, transposed: bool = False
) -> Callable[[Sequence[Tensor], Sequence[Tensor], Block], Any]:
    """The compute function: inputs are the weight's rows and then each change's parts.

    seed: of stochastic rounding, None for nearest. other: a dtype to try where little survives. whole: a block is
    changed at one stroke, for rows depend on each other; else in bands that stay in the cache.
    """

    def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block) -> Survival:
        import torch

        given, out = inputs[0], outputs[0]
        # float32's own sums would be off by units in the last place of a float32 result.
        wide = torch.float64 if {given.dtype, out.dtype} & {torch.float32, torch.float64} else torch.float32
        generator = None if seed is None else generator_for(seed, name, block.number, out.device)
        shared = [None if p in c.cut else t.to(wide) for (c, p), t in zip(_flat(changes), inputs[1:], strict=True)]
        rows = len(given) if given.ndim else 1
        step = rows if whole or transposed else max(1, BAND_VALUES * rows // max(given.numel(), 1))
        found = []
        for start in range(0, rows, max(step, 1)):
            band = slice(start, start + step) if step < rows else slice(None)
            weight = (given if step >= rows else given[band]).to(wide)
            parts = [_own(t, band, wide) if s is None else s for t, s in zip(inputs[1:], shared, strict=True)]
            result = _changed(changes, weight.T if transposed else weight, parts, block.start + start)
            result = result.T.contiguous() if transposed else result
            written = out if step >= rows else out[band]
            if generator is None:
                store(result, written)
            else:
                store_stochastic(result, written, generator)
            found.append(survival(weight, result, written, other))
        return _together(found)

    return compute


def _flat(changes: Sequence[Change]) -> list[tuple[Change, str]]:
    return [(change, part) for change in changes for part in change.parts]


def _own(tensor: Tensor, band: slice, wide: torch.dtype) -> Tensor:
    return tensor[band].to(wide)


def _together(found: Sequence[Survival]) -> Survival:
    beside = None
    if any(f.other is not None for f in found):
        pairs = [f.other or (f.along, f.off) for f in found]
        beside = sum(p[0] for p in pairs), sum(p[1] for p in pairs)
    meant, along = sum(f.meant for f in found), sum(f.along for f in found)
    return Survival(meant, along, sum(f.off for f in found), sum(f.weight for f in found), beside)


def _changed(changes: Sequence[Change], weight: Tensor, inputs: Sequence[Tensor], start: int) -> Tensor:
    """W + Σ λᵢ·(W'ᵢ − W): each change is of the original W, of which these are the rows from `start` on."""
    total: Tensor | None = None
    position = 0
    for change in changes:
        given = inputs[position : position + len(change.parts)]
        position += len(change.parts)
        found = _one(change, weight, given, start)
        # The first is taken as it is: adding its difference would round once more.
        total = found if total is None else total + (found - weight)
    assert total is not None
    return total


def _one(change: Change, weight: Tensor, given: Sequence[Tensor], start: int) -> Tensor:
    from weightops.lora.family import Parts, change_bias
    from weightops.lora.family import change as change_weight

    tensors = {}
    for part, tensor in zip(change.parts, given, strict=True):
        columns = change.columns.get(part)
        tensors[part] = tensor if columns is None else tensor[:, columns[0] : columns[1]]
    height = len(weight)
    if change.cut:  # the parts are those of a weight that has these rows alone
        shape, rows = (height, *change.shape[1:]), None
    else:
        shape, rows = change.shape, slice(start, start + height)
    parts = Parts(tensors, change.alpha, shape)
    if change.of_bias:
        found = change_bias(change.family, parts, weight, change.strength)
        assert found is not None
        return found
    if change.family.name == "lora" and change.cut and weight.shape == shape and "dora_scale" not in tensors:
        return _added(change.family, parts, weight, change.strength)
    return change_weight(change.family, parts, weight, change.strength, rows)


def _added(family: Family, parts: Parts, weight: Tensor, strength: float) -> Tensor:
    """W + λ·up·down in one pass over W: the product is added where it is made."""
    import torch

    assert family.lowrank is not None
    up, down = family.lowrank(parts)
    return torch.addmm(weight.reshape(len(weight), -1), up, down, alpha=strength).reshape(weight.shape)


def survival(before: Tensor, meant: Tensor, stored: Tensor, other: str | None) -> Survival:
    """How much of a change its rounding leaves: before, meant and stored are W, W + Σ and what is written of it."""
    if meant.shape != before.shape:  # a wider weight: nothing of it was there before
        return Survival(0.0, 0.0, 0.0, 0.0)
    before, meant, stored = before.reshape(-1), meant.reshape(-1), stored.reshape(-1)
    found = [0.0, 0.0, 0.0, 0.0]
    for start in range(0, len(before), WORKING_VALUES):  # pieces that stay in the cache
        part = slice(start, start + WORKING_VALUES)
        weight = before[part]
        wanted = meant[part] - weight
        found = [
            a + b for a, b in zip(found, (*_sums(wanted, meant[part], stored[part]), _dot(weight, weight)), strict=True)
        ]
    total, along, off, norm = found
    beside = None
    if other is not None and total and along < WORTH_A_LOOK * total:
        beside = _beside(before, meant, other)
    return Survival(total, along, off, norm, beside)


def _beside(before: Tensor, meant: Tensor, other: str) -> tuple[float, float]:
    """The same two sums for another dtype."""
    import torch

    tried = torch.empty_like(meant, dtype=getattr(torch, other))
    store(meant, tried)
    return _sums(meant - before, meant, tried)[1:]


def _sums(wanted: Tensor, meant: Tensor, stored: Tensor) -> tuple[float, float, float]:
    """‖wanted‖², ⟨added, wanted⟩ and ‖added − wanted‖²; added − wanted is stored − meant, small and exact."""
    rest = stored.to(meant.dtype) - meant
    total = _dot(wanted, wanted)
    return total, total + _dot(rest, wanted), _dot(rest, rest)


def _dot(a: Tensor, b: Tensor) -> float:
    import torch

    return float(torch.dot(a, b))
