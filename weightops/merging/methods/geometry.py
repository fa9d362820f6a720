"""Where models lie to each other: what is new in each, how far apart they are, and what is in their middle."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import chain, combinations
from typing import TYPE_CHECKING

from weightops.errors import UsageError
from weightops.merging.limits import within
from weightops.merging.looks import GRAM
from weightops.merging.method import Weights, merge_method
from weightops.merging.shares import combined, refuse_shares, shares
from weightops.plan import Grain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from torch import Tensor

    from weightops.merging.looks import Gram
    from weightops.merging.method import Delta, Either

    Numbers = Sequence[float]

_DEPENDENT = 1e-12  # the share of a squared norm that rounding leaves of a difference that is no news


# ------------------------------------------------------------------------------------------------ orthogonal


@merge_method(Grain.VALUES, looks=GRAM, linear=True, copies=1)
def orthogonal(*deltas: Delta, weights: Weights, found: Gram) -> Delta:
    """Σ wᵢ·δᵢ', where δᵢ' is what is new in δᵢ: what those before it span is taken away, so that order counts.

    Of a difference that is a sum of those before it nothing is left. Weights are strengths.
    Source: Gram-Schmidt, with the inner product of whole tensors. sd-mecha's perpendicular, and its add_perpendicular,
    are the case of two: δ₂ − δ₁·⟨δ₁,δ₂⟩/‖δ₁‖².
    """
    count = len(weights)
    if not all(map(math.isfinite, chain(*found))):
        return combined(deltas, [math.nan] * count)

    def inner(x: Numbers, y: Numbers) -> float:
        return math.fsum(p * g * q for p, row in zip(x, found, strict=True) for g, q in zip(row, y, strict=True))

    kept: list[tuple[list[float], float]] = []
    total = [0.0] * count
    for i, weight in enumerate(weights):
        new = [float(i == j) for j in range(count)]
        for other, squared in kept:
            share = inner(new, other) / squared
            new = [x - share * y for x, y in zip(new, other, strict=True)]
        squared = inner(new, new)
        if squared > _DEPENDENT * found[i][i]:
            kept.append((new, squared))
            total = [x + weight * y for x, y in zip(total, new, strict=True)]
    return combined(deltas, total)


# ------------------------------------------------------------------------------------------------ model stock


def _refuse_single(name: str) -> Callable[[int, Mapping[str, Any]], None]:
    def refuse(count: int, _parameters: Mapping[str, Any]) -> None:
        if count < 2:
            raise UsageError(name, f"found {count} model beside the base, expected two or more")

    return refuse


@merge_method(Grain.VALUES, looks=GRAM, linear=True, copies=1, refuse=_refuse_single("model_stock"))
def model_stock(*deltas: Delta, found: Gram) -> Delta:
    """t · mean(δᵢ), t = N·cos θ / (1 + (N−1)·cos θ): the mean of N models, as far from the base as their angle allows.

    cos θ is the mean over all pairs of differences; a pair with a difference of nothing has 0. Where it is negative
    they agree on nothing, and t is 0. There are no weights: it takes models of one kind, tuned alike.
    Source: Jang et al. 2024, arXiv:2403.19522. mergekit has the same angle, but takes all products of lengths under
    1e-6 for 1e-6, and lets t be negative, without bound as cos θ nears −1/(N−1); sd-mecha takes the angles of
    neighbours in the list only, and of the last axis.
    """
    count = len(deltas)
    lengths = [math.sqrt(max(found[i][i], 0.0)) for i in range(count)]
    cosines = [
        found[i][j] / (lengths[i] * lengths[j]) if lengths[i] * lengths[j] else 0.0
        for i, j in combinations(range(count), 2)
    ]
    cosine = math.fsum(cosines) / len(cosines)
    t = 0.0 if cosine < 0 else count * cosine / (1 + (count - 1) * cosine)
    return combined(deltas, [t / count] * count)


@merge_method(Grain.ROWS, looks=GRAM, copies=2, refuse=_refuse_single("model_stock_rows"))
def model_stock_rows(*deltas: Delta, found: Gram) -> Delta:
    """model_stock of each row of a weight, that is of all that leads to one output, by the angle of the rows alone.

    A tensor of one axis is one row.
    Source: Jang et al. 2024, arXiv:2403.19522, who take whole layers. It is mergekit's filter_wise, but for what
    model_stock says, and for convolutions, of which mergekit and sd-mecha take the last axis of the kernel for a row.
    """
    import torch

    if deltas[0].ndim < 2:
        return model_stock(*deltas, found=found)
    count = len(deltas)
    rows = [d.flatten(1) for d in deltas]

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(1, dtype=torch.float64)

    squares = [inner(row, row) for row in rows]
    total = torch.zeros_like(squares[0])
    for i, j in combinations(range(count), 2):
        product = (squares[i] * squares[j]).sqrt_()
        total.add_(inner(rows[i], rows[j]) / product.masked_fill_(product == 0, 1.0))
    cosine = (total / (count * (count - 1) / 2)).clamp_(min=0.0)
    t = count * cosine / (1 + (count - 1) * cosine)
    mean = combined(rows, [1.0 / count] * count)
    return mean.mul_(t.to(mean.dtype)[:, None]).reshape(deltas[0].shape)


# ------------------------------------------------------------------------------------------------ geometric median


def _refuse_eps(_count: int, parameters: Mapping[str, Any]) -> None:
    if parameters["eps"] <= 0:
        raise UsageError("geometric_median, eps", f"found {parameters['eps']:g}, expected more than 0")


_LIMITS = within("geometric_median", max_iter=(0, math.inf))
_REFUSE = refuse_shares("geometric_median", _LIMITS, _refuse_eps)


@merge_method(Grain.VALUES, looks=GRAM, linear=True, copies=1, shares=True, refuse=_REFUSE)
def geometric_median(*models: Either, weights: Weights, found: Gram, eps: float = 1e-6, max_iter: int = 100) -> Either:
    """argmin_m Σ wᵢ·‖modelᵢ − m‖: the point with the smallest sum of distances; a model far from all others pulls no
    more than one nearby.

    Distances are of whole tensors. From the weighted mean on, max_iter times, each model is taken with
    wᵢ / max(‖modelᵢ − m‖, eps). Of two models with equal weights it is the mean; a model with more than half of all
    weight is the median.
    Source: Weiszfeld 1937; smoothed by eps as in Pillutla et al. 2022, arXiv:1912.13445. sd-mecha's has no weights, and
    stops where the sum of distances no longer changes, which is some digits early.
    """
    numbers = _median(tuple(map(tuple, found)), tuple(weights), eps, max_iter)
    return combined(models, numbers)


@lru_cache(maxsize=256)  # each part of a tensor asks for the same
def _median(gram: tuple[Numbers, ...], weights: Numbers, eps: float, max_iter: int) -> Numbers:
    """The geometric median as numbers of the models, which sum to one."""
    places = range(len(weights))
    # Squared distances, not inner products: beside the models' lengths those between them are small.
    apart = [[max(gram[i][i] - 2 * gram[i][j] + gram[j][j], 0.0) if i != j else 0.0 for j in places] for i in places]

    def distances(numbers: Numbers) -> list[float]:
        rows = [math.fsum(n * a for n, a in zip(numbers, row, strict=True)) for row in apart]
        spread = math.fsum(n * r for n, r in zip(numbers, rows, strict=True)) / 2
        return [math.sqrt(max(r - spread, 0.0)) for r in rows]

    numbers = shares(weights)
    for _ in range(max_iter):
        before = numbers
        numbers = shares([w / max(d, eps) for w, d in zip(weights, distances(before), strict=True)])
        if numbers == before:
            break
    return numbers
