"""What a set of adapters does to one band of a weight: the sum of their changes, one rounding, and what survives it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from weightops.merging.method import store
from weightops.merging.rounding import generator_for, store_stochastic

if TYPE_CHECKING:
    from torch import Tensor

    from weightops.lora.family import Family
    from weightops.plan import Block

# Below this share of what was meant, another dtype is tried beside the one that is written.
WORTH_A_LOOK = 0.99


@dataclass(frozen=True, slots=True)
class Change:
    """One adapter's change of a band of a weight, or of a bias.

    parts: names, in the order of the task's inputs after the weight. columns: of the parts that are some columns of
    what is read. shape: of the whole weight. whole: the parts are for all its rows, not for the rows of a block.
    """

    family: Family
    parts: tuple[str, ...]
    columns: dict[str, tuple[int, int]]
    alpha: float | None
    strength: float
    shape: tuple[int, ...]
    of_bias: bool
    whole: bool


class Survival(NamedTuple):
    """Sums over the values of a block: ‖meant‖², ⟨added, meant⟩, ‖added − meant‖², ‖W‖²; and the last two of these
    sums for the dtype that was tried beside it (None: it was not)."""

    meant: float
    along: float
    off: float
    weight: float
    other: tuple[float, float] | None = None


def fused(
    changes: Sequence[Change], *, name: str, seed: int | None, other: str | None, transposed: bool = False
) -> Callable[[Sequence[Tensor], Sequence[Tensor], Block], Any]:
    """The compute function: inputs are the weight's rows and then each change's parts.

    seed: of stochastic rounding, None for nearest. other: a dtype to try where little survives.
    """

    def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block) -> Survival:
        import torch

        wide = torch.float64 if inputs[0].dtype is torch.float64 or outputs[0].dtype is torch.float64 else torch.float32
        weight = inputs[0].to(wide)
        if transposed:
            weight = weight.T
        result = _changed(changes, weight, inputs[1:], block)
        written = result.T if transposed else result
        if seed is None:
            store(written, outputs[0])
        else:
            store_stochastic(written, outputs[0], generator_for(seed, name, block.number, written.device))
        return survival(inputs[0].to(wide), written, outputs[0], other)

    return compute


def _changed(changes: Sequence[Change], weight: Tensor, inputs: Sequence[Tensor], block: Block) -> Tensor:
    """W + Σ λᵢ·(W'ᵢ − W): each change is of the original W."""
    total: Tensor | None = None
    position = 0
    for change in changes:
        given = inputs[position : position + len(change.parts)]
        position += len(change.parts)
        found = _one(change, weight, given, block)
        # The first is taken as it is: adding its difference would round once more.
        total = found if total is None else total + (found - weight)
    assert total is not None
    return total


def _one(change: Change, weight: Tensor, given: Sequence[Tensor], block: Block) -> Tensor:
    from weightops.lora.family import Parts, change_bias
    from weightops.lora.family import change as change_weight

    tensors = {}
    for part, tensor in zip(change.parts, given, strict=True):
        columns = change.columns.get(part)
        tensors[part] = (tensor if columns is None else tensor[:, columns[0] : columns[1]]).to(weight.dtype)
    rows = slice(block.start, block.stop) if change.whole else None
    shape = change.shape if change.whole else (len(weight), *change.shape[1:])
    parts = Parts(tensors, change.alpha, shape)
    if change.of_bias:
        found = change_bias(change.family, parts, weight, change.strength)
        assert found is not None
        return found
    return change_weight(change.family, parts, weight, change.strength, rows)


def survival(before: Tensor, meant: Tensor, stored: Tensor, other: str | None) -> Survival:
    """How much of a change its rounding leaves; all in the dtype of `before`, float32 or float64."""
    import torch

    if meant.shape != before.shape:  # a wider weight: nothing of it was there before
        return Survival(0.0, 0.0, 0.0, 0.0)
    wanted = (meant - before).flatten()
    added = stored.to(before.dtype).sub_(before).flatten()
    sums = _sums(wanted, added)
    weight = float(torch.linalg.vector_norm(before)) ** 2
    beside = None
    if other is not None and sums[0] and sums[1] < WORTH_A_LOOK * sums[0]:
        tried = torch.empty_like(stored, dtype=getattr(torch, other))
        store(meant, tried)
        beside = _sums(wanted, tried.to(before.dtype).sub_(before).flatten())[1:]
    return Survival(*sums, weight, beside)


def _sums(wanted: Tensor, added: Tensor) -> tuple[float, float, float]:
    import torch

    meant = float(torch.linalg.vector_norm(wanted)) ** 2
    # ⟨added, meant⟩ = ‖meant‖² + ⟨added − meant, meant⟩: the second term is small, and float32 sums it well.
    rest = added - wanted
    return meant, meant + float(torch.dot(rest, wanted)), float(torch.linalg.vector_norm(rest)) ** 2
