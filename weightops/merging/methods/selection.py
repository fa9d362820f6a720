"""Differences of models taken where they vary most, where one model alone has changed, or where they matter most."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weightops.errors import UsageError
from weightops.merging.election import elected
from weightops.merging.looks import kept, ranked, reaches
from weightops.merging.method import Look, Share, Weights, merge_method
from weightops.plan import Grain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from torch import Tensor

    from weightops.merging.method import Delta

    Limits = Sequence[Sequence[float]]
    # Of each model, the values that it shares with others and those that it alone has changed.
    Counts = Sequence[Sequence[int]]


# ------------------------------------------------------------------------------------------------ where they vary


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    """Of each value, over the models."""
    mean = deltas[0].clone()
    for delta in deltas[1:]:
        mean.add_(delta)
    mean.div_(len(deltas))
    total = (deltas[0] - mean).square_()
    for delta in deltas[1:]:
        total.add_((delta - mean).square_())
    return total.div_(len(deltas))


def _variances(*deltas: Tensor, density: float, **_parameters: Any) -> Sequence[Tensor]:
    return (_variance(deltas),) if density < 1 else ()


def _most_varied(count: int, *, density: float, **_parameters: Any) -> list[int]:
    return [max(1, round(density * count))]


def _selected(deltas: Sequence[Tensor], limits: Limits) -> list[Tensor]:
    """The differences, 0 where their variance is below the limit. They are tensors of their own."""
    if not limits or not limits[0][0] > 0:
        return [delta.clone() for delta in deltas]
    # 1 where it is selected: in floats, since masks of booleans take torch several times as long.
    whether = kept(_variance(deltas), limits[0][0]).sign_()
    return [delta * whether for delta in deltas]


def _squares(*deltas: Tensor, found: Limits, **_parameters: Any) -> list[float]:
    import torch

    return [float(chosen.double().square_().sum(dtype=torch.float64)) for chosen in _selected(deltas, found)]


def _shares_of_squares(
    values: Sequence[Sequence[float]], found: Limits, **_parameters: Any
) -> tuple[Limits, list[float]]:
    squares = [math.fsum(each) for each in zip(*values, strict=True)]
    total = math.fsum(squares)
    return found, [s / total if total > 0 else 0.0 for s in squares]


@merge_method(
    Grain.VALUES, looks=(*ranked(_variances, _most_varied), Look(_squares, _shares_of_squares)), decides=True,
    copies=4, shares=True, each=1,
)  # fmt: skip
def sce(*deltas: Delta, found: tuple[Limits, Sequence[float]], weights: Weights, density: Share = 1.0) -> Delta:
    """Σ ηᵢwᵢ·δᵢ / Σ ηᵢ|wᵢ| over those that agree with the sign of Σ wᵢ·δᵢ, ηᵢ = mean(δᵢ²): δᵢ keeps of Δᵢ what varies
    most over the models, `density` of all.

    So the model that has changed more of a tensor counts more in it. Weights are shares, not strengths: doubled, they
    give the same. What varies as much as the least that is kept is kept too; a tie of signs leaves 0.
    Source: Wan et al. 2024, arXiv:2408.07990 (FuseChat: select, calculate, erase), without weights. mergekit's density
    is a share of the values that vary at all, and it gives a tie to the positive; and where the ηᵢ sum to less than
    10⁻⁶, as those of most finetunes of image models do, it takes them all for equal.
    """
    limits, factors = found
    changes = [chosen.mul_(w) for chosen, w in zip(_selected(deltas, limits), weights, strict=True)]
    return elected(changes, weights, count_votes=False, normalize=True, factors=factors)


# ------------------------------------------------------------------------------------------------ where one has changed


def _refuse_below_zero(name: str, *settings: str) -> Callable[[int, Mapping[str, Any]], None]:
    def refuse(_count: int, parameters: Mapping[str, Any]) -> None:
        for setting in settings:
            if parameters[setting] < 0:
                raise UsageError(f"{name}, {setting}", f"found {parameters[setting]:g}, expected 0 or more")

    return refuse


def _changed(delta: Tensor, weight: float, threshold: float) -> Tensor:
    """The values of a difference that are more than the threshold, else 0; of a model of weight 0 none is."""
    import torch

    return torch.nn.functional.hardshrink(delta, threshold) if weight else torch.zeros_like(delta)


def _whether(values: Tensor) -> Tensor:
    """In their place, 1 for each that is not 0."""
    return values.sign_().abs_()


@merge_method(Grain.VALUES, decides=True, copies=4, refuse=_refuse_below_zero("ram", "threshold"))
def ram(*deltas: Delta, weights: Weights, threshold: float = 1e-5) -> Delta:
    """Σ wᵢ·δᵢ / n: n is the number of models that have changed a value by more than `threshold`, so that what one model
    alone has changed is kept whole, and what several have is their mean.

    Weights are strengths; a model of weight 0 counts for none. n is at least 1.
    Source: Yuan et al. 2026, arXiv:2601.13572 (reinforced agent merging), without weights. mergekit's ram is the same.
    """
    import torch

    total, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        values = _changed(delta, weight, threshold)
        total.add_(values, alpha=weight)
        count.add_(_whether(values))
    return total.div_(count.clamp_min_(1))


def _counts(*deltas: Tensor, found: None, weights: Weights, threshold: float, **_parameters: Any) -> list[list[int]]:
    import torch

    def whether(number: int) -> Tensor:
        return _whether(_changed(deltas[number], weights[number], threshold)).nan_to_num_(1.0)

    shared = whether(0)
    for number in range(1, len(deltas)):
        shared.add_(whether(number))
    shared.sub_(1).clamp_(0, 1)
    counts = []
    for number in range(len(deltas)):
        own = whether(number)
        count = int(own.sum(dtype=torch.float64))
        counts.append([both := int(own.mul_(shared).sum(dtype=torch.float64)), count - both])
    return counts


def _all_counts(values: Sequence[Counts], found: None, **_parameters: Any) -> list[list[int]]:
    return [[sum(v[0] for v in each), sum(v[1] for v in each)] for each in zip(*values, strict=True)]


def _counts_everywhere(found: Mapping[str, Counts], **parameters: Any) -> Mapping[str, Counts]:
    return dict.fromkeys(found, _all_counts(list(found.values()), None)) if found else {}


@merge_method(
    Grain.VALUES, looks=(Look(_counts, _all_counts, everywhere=_counts_everywhere),), decides=True, copies=5,
    refuse=_refuse_below_zero("ram_plus", "threshold", "rescale", "limit"),
)  # fmt: skip
def ram_plus(
    *deltas: Delta, found: Counts, weights: Weights, threshold: float = 1e-5, rescale: float = 0.1, limit: float = 0.2
) -> Delta:
    """As by ram, but what one model alone has changed is taken 1 + rescale·min(ρᵢ, limit) times: ρᵢ is the number of
    values that it shares with others over that of those that it alone has changed.

    ρ is that of whole models: a pass over all of them comes first.
    Source: Yuan et al. 2026, arXiv:2601.13572 (reinforced agent merging, RAM+), without weights. mergekit's ramplus_tl
    takes the ρ of each tensor; the authors' code bounds ρ by 1, with a rescale of 0.05.
    """
    import torch

    factors = [1 + rescale * min(shared / alone, limit) if alone else 1.0 for shared, alone in found]
    total, raised, count = (torch.zeros_like(deltas[0]) for _ in range(3))
    for delta, weight, factor in zip(deltas, weights, factors, strict=True):
        values = _changed(delta, weight, threshold)
        total.add_(values, alpha=weight)
        raised.add_(values, alpha=weight * factor)
        count.add_(_whether(values))
    total.div_(count.clamp_min_(1))
    # 1 where one model has changed a value, or none, and both are 0.
    return total.lerp_(raised, count.neg_().add_(2).clamp_(0, 1))


# ------------------------------------------------------------------------------------------------ where they matter


def _importance(a: Tensor, b: Tensor) -> Tensor:
    """|b − a|, times the divergence of the row in which it stands."""
    rows = [m.reshape(1, -1) if m.ndim < 2 else m.flatten(1) for m in (a, b)]
    p, q = rows[1].log_softmax(1), rows[0].log_softmax(1)
    divergence = (p.exp() * (p - q)).sum(1, keepdim=True).clamp_min_(0)
    return ((rows[1] - rows[0]).abs_() * divergence).reshape(a.shape)


def _importances(a: Tensor, b: Tensor, **_parameters: Any) -> Sequence[Tensor]:
    return (_importance(a, b),)


def _quartiles(count: int, **_parameters: Any) -> list[float]:
    """The ranks of the first, second and third quartile, between two values in proportion."""
    return [count - max(count - 1, 0) * quarter / 4 for quarter in (1, 2, 3)]


@merge_method(Grain.ROWS, looks=ranked(_importances, _quartiles), double=True, decides=True, copies=7)
def arcee_fusion(a: Tensor, b: Tensor, /, *, found: Limits, fence: float = 1.5) -> Tensor:
    """B where I = |B − A|·KL(softmax(Bᵣ) ‖ softmax(Aᵣ)) ≥ median(I) + fence·(Q₃ − Q₁)(I), else A: what matters most, by
    its change and by the divergence of its row r.

    A row is all that leads to one output; a tensor of one axis is one row. With a fence of 0 half of all are B's.
    Source: Arcee AI's mergekit, arcee_fusion, which computes in the dtype of the file: of rows whose softmax changes by
    10⁻⁴ float32 leaves of the divergence little but rounding. Of convolutions its rows are those of the kernel, its
    quartiles are values and not between two, and of a tensor of more than a million values those of a sample, which
    differs from run to run.
    """
    import torch

    first, median, third = found[0]
    matters = reaches(_importance(a, b), median + fence * (third - first))
    return a + torch.where(matters, b - a, 0.0)
