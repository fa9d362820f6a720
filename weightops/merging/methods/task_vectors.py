"""Differences of models made sparse, by magnitude or by chance, and added up, or the mean taken of those that agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightops.errors import UsageError
from weightops.merging.election import elected
from weightops.merging.looks import kept, kept_between, ranked
from weightops.merging.method import Share, Weights, merge_method
from weightops.plan import Grain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from torch import Generator, Tensor

    from weightops.merging.method import Delta

    Limits = Sequence[Sequence[float]]


# ------------------------------------------------------------------------------------------------ by magnitude


def _magnitudes(*deltas: Tensor, density: float, **_parameters: Any) -> Sequence[Tensor]:
    return deltas if density < 1 else ()


def _largest(count: int, *, density: float, **_parameters: Any) -> list[int]:
    """The rank of the smallest of the largest: there are density · values of them, rounded, and at least one."""
    return [max(1, round(density * count))]


def _trimmed(deltas: Sequence[Tensor], weights: Weights, found: Limits) -> Iterator[Tensor]:
    """wᵢ·δᵢ of each difference, 0 where its magnitude is not among the largest."""
    limits = [limit for (limit,) in found] or [0.0] * len(deltas)
    return (kept(delta, limit).mul_(w) for delta, w, limit in zip(deltas, weights, limits, strict=True))


@merge_method(Grain.VALUES, looks=ranked(_magnitudes, _largest), decides=True, copies=3)
def magnitude(*deltas: Delta, found: Limits, weights: Weights, density: Share = 0.5) -> Delta:
    """Σ wᵢ·δᵢ, where δᵢ keeps the largest values of Δᵢ, so many that their share of all is `density`.

    What equals the smallest value that is kept is kept too; nothing is rescaled.
    Source: the trimming of Yadav et al. 2023, arXiv:2306.01708, without the election. PEFT's magnitude_prune is the
    same, but for rounding the number of values down, and of equal ones it keeps some.
    """
    return _sum(_trimmed(deltas, weights, found))


@merge_method(Grain.VALUES, looks=ranked(_magnitudes, _largest), decides=True, copies=4, each=1)
def ties(
    *deltas: Delta, found: Limits, weights: Weights, density: Share = 0.2, count_votes: bool = False,
    normalize: bool = True,
) -> Delta:  # fmt: skip
    """Trimmed as by magnitude; then for each value a sign is elected, and the mean taken of those that agree.

    The sign is that of Σ wᵢ·δᵢ, or, with count_votes, that of most wᵢ·δᵢ. The mean is weighted, so that weights are
    shares and not strengths: doubled, they give the same. Without normalize it is the sum, and they are strengths.
    Under a negative weight a change votes as what it would add, and stands in the mean with |w|. A tie leaves 0.
    Source: Yadav et al. 2023, arXiv:2306.01708, without weights; their code trims the whole model as one vector, and
    gives a tie to the sign of most values. mergekit keeps all by default (density 1), divides by the sum of signed
    weights, and as PEFT gives a tie to the positive; PEFT votes without weights and divides by the number of those that
    agree; sd-mecha counts votes by default, and keeps one value more.
    """
    return elected([*_trimmed(deltas, weights, found)], weights, count_votes=count_votes, normalize=normalize)


# ------------------------------------------------------------------------------------------------ without the outliers


def _refuse_gamma(name: str) -> Callable[[int, Mapping[str, Any]], None]:
    def refuse(_count: int, parameters: Mapping[str, Any]) -> None:
        density, gamma = parameters["density"], parameters["gamma"]
        if gamma < 0 or density + gamma > 1 + 1e-12:
            what = f"found {gamma:g} with a density of {density:g}, expected 0 or more and at most {1 - density:g}"
            raise UsageError(f"{name}, gamma", what)

    return refuse


def _all_magnitudes(*deltas: Tensor, **_parameters: Any) -> Sequence[Tensor]:
    return deltas


def _following(count: int, *, density: float, gamma: float, **_parameters: Any) -> list[int]:
    """The ranks of the first and the last of those that follow the largest."""
    above = min(round(gamma * count), count - 1)
    return [above + 1, above + max(1, round(density * count))]


def _crumbs(deltas: Sequence[Tensor], weights: Weights, found: Limits) -> Iterator[Tensor]:
    for delta, weight, (high, low) in zip(deltas, weights, found, strict=True):
        yield kept_between(delta, low, high).mul_(weight)


_FOLLOWING = ranked(_all_magnitudes, _following)


@merge_method(Grain.VALUES, looks=_FOLLOWING, decides=True, copies=4, refuse=_refuse_gamma("breadcrumbs"))
def breadcrumbs(*deltas: Delta, found: Limits, weights: Weights, density: Share = 0.9, gamma: float = 0.01) -> Delta:
    """Σ wᵢ·δᵢ, where δᵢ leaves out the largest values of Δᵢ, `gamma` of all, and keeps the next ones, `density` of all.

    What equals the largest or the smallest value that is kept is kept too.
    Source: Davari and Belilovsky 2023, arXiv:2312.06795; whole tensors are ranked, where their code takes the last axis
    of each. mergekit rounds both numbers of values down, and before 0.1.5 kept nothing of a tensor of which gamma is
    less than one value; its density is 1 by default, and then it keeps everything, whatever gamma is.
    """
    return _sum(_crumbs(deltas, weights, found))


@merge_method(Grain.VALUES, looks=_FOLLOWING, decides=True, copies=4, each=1, refuse=_refuse_gamma("breadcrumbs_ties"))
def breadcrumbs_ties(
    *deltas: Delta, found: Limits, weights: Weights, density: Share = 0.9, gamma: float = 0.01,
    count_votes: bool = False, normalize: bool = True,
) -> Delta:  # fmt: skip
    """As by breadcrumbs; then for each value a sign is elected, and the mean taken of those that agree, as by ties.

    Source: Davari and Belilovsky 2023, arXiv:2312.06795, and Yadav et al. 2023, arXiv:2306.01708. mergekit does not
    take the mean by default.
    """
    return elected([*_crumbs(deltas, weights, found)], weights, count_votes=count_votes, normalize=normalize)


# ------------------------------------------------------------------------------------------------ by chance


@merge_method(Grain.VALUES, copies=4)
def dare(*deltas: Delta, random: Generator, weights: Weights, density: Share = 0.5) -> Delta:
    """Σ wᵢ·δᵢ, where δᵢ keeps each value of Δᵢ by chance, `density` of them, divided by density: Σ wᵢ·Δᵢ on average.

    Source: Yu et al. 2023, arXiv:2311.03099, who drop up to 0.9 and more. PEFT's dare_linear is the same; mergekit
    rescales so that the sum of magnitudes is as before. sd-mecha's ties_sum_with_dropout drops 0.9 by default.
    """
    return _sum(_dropped(deltas, weights, random, density))


@merge_method(Grain.VALUES, decides=True, copies=4, each=1)
def dare_ties(
    *deltas: Delta, random: Generator, weights: Weights, density: Share = 0.5, count_votes: bool = False,
    normalize: bool = True,
) -> Delta:  # fmt: skip
    """Dropped as by dare; then for each value a sign is elected, and the mean taken of those that agree, as by ties.

    The mean is of those that were kept, so that it is larger than without dropping wherever several agree; without
    normalize, which is mergekit's default here, it is not.
    Source: Yu et al. 2023, arXiv:2311.03099, and Yadav et al. 2023, arXiv:2306.01708.
    """
    changes = [*_dropped(deltas, weights, random, density)]
    return elected(changes, weights, count_votes=count_votes, normalize=normalize)


def _refuse_epsilon(_count: int, parameters: Mapping[str, Any]) -> None:
    density, epsilon = parameters["density"], parameters["epsilon"]
    if epsilon < 0:
        raise UsageError("della, epsilon", f"found {epsilon:g}, expected 0 or more")
    if density < 1 and not epsilon < density <= 1 - epsilon + 1e-12:
        what = f"found {epsilon:g} with a density of {density:g}"
        raise UsageError("della, epsilon", f"{what}, expected less than {density:g} and at most {1 - density:g}")


@merge_method(Grain.ROWS, decides=True, copies=5, each=1, refuse=_refuse_epsilon)
def della(
    *deltas: Delta, random: Generator, weights: Weights, density: Share = 0.5, epsilon: float = 0.15,
    count_votes: bool = False, normalize: bool = True,
) -> Delta:  # fmt: skip
    """As dare_ties, but the larger a value is within its row, the likelier it is kept: density ± epsilon, by rank.

    A row is all that leads to one output; a tensor of one axis is one row. Each value is divided by its own chance.
    With a density of 1 all are kept, whatever epsilon is.
    Source: Deep et al. 2024, arXiv:2406.11617; the range is that of its authors' code (whose epsilon is 0.05), and of
    mergekit (0.15), which divides not by the chance but restores the sum of magnitudes, and which of convolutions ranks
    the second axis. sd-mecha ranks the whole matrix, in a range half as wide, and divides all by the density.
    """
    changes = [*_dropped(deltas, weights, random, density, epsilon if density < 1 else 0.0)]
    return elected(changes, weights, count_votes=count_votes, normalize=normalize)


def _dropped(
    deltas: Sequence[Tensor], weights: Weights, random: Generator, density: float, epsilon: float = 0.0
) -> Iterator[Tensor]:
    """wᵢ·δᵢ of each difference, 0 where it was dropped by chance, else rescaled."""
    import torch

    for delta, weight in zip(deltas, weights, strict=True):
        # In float32 whatever the difference is in: the same values are kept. 2⁻²⁴ is fine enough a step of chances.
        drawn = torch.rand(delta.shape, generator=random, dtype=torch.float32).to(delta.device)
        if not epsilon:
            # 1 where it is kept: in floats, since masks of booleans take torch several times as long.
            whether = drawn.neg_().add_(density).sign_().relu_().to(delta.dtype)
            yield whether.mul_(delta).mul_(weight / density)
            continue
        chance = _chances(delta, density, epsilon)
        whether = (chance - drawn).sign_().relu_()
        yield whether.mul_(delta).div_(chance).mul_(weight)


def _chances(change: Tensor, density: float, epsilon: float) -> Tensor:
    """The chance of each value to be kept: density ± epsilon, evenly by the rank of its magnitude in its row."""
    import torch

    rows = change.reshape(1, -1) if change.ndim < 2 else change.flatten(1)
    order = rows.abs().argsort(dim=1, stable=True)
    n = rows.shape[1]
    low, high = (density - epsilon, density + epsilon) if n > 1 else (density, density)
    ramp = torch.linspace(low, high, n, dtype=change.dtype, device=change.device)
    return torch.empty_like(rows).scatter_(1, order, ramp.expand_as(rows)).reshape(change.shape)


def _sum(changes: Iterator[Tensor]) -> Tensor:
    """They are used up."""
    total = next(changes)
    for change in changes:
        total.add_(change)
    return total
