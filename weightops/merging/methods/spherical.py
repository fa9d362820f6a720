"""Models as directions and lengths: arcs between directions, and their centre. It takes inner products alone."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from weightops.errors import MismatchError, UsageError
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
    from weightops.merging.method import Either

    Numbers = Sequence[float]

_OPPOSITE = 1e-3  # the sine of an angle beyond which rounding would decide which way round an arc goes


def _refuse_other_than_two(method: str) -> Callable[[int, Mapping[str, Any]], None]:
    def refuse(count: int, _parameters: Mapping[str, Any]) -> None:
        if count != 2:
            raise UsageError(method, f"found {count} models, expected two", "karcher takes any number of them")

    return refuse_shares(method, refuse)


def _without_direction(name: str, models: Sequence[Tensor], own: Numbers) -> Numbers:
    """What stands where no direction is between theirs: of a single value, whose only directions are + and −, the mean.

    Raises MismatchError for all others.
    """
    if models[0].numel() == 1:
        return own
    what = "models point in opposite directions, and no arc between them is shorter than the others"
    raise MismatchError(name, what, "leave one of them out, or take weighted_sum")


# ------------------------------------------------------------------------------------------------ two


def _arc(gram: Gram, t: float) -> tuple[float, float] | None:
    """sin((1−t)ω)/sin ω and sin(tω)/sin ω, where ω is the angle between the two; None where they are opposite."""
    # Products and differences of these three numbers alone: a cosine near 1 has lost the digits of a small angle.
    product = math.sqrt(max(gram[0][0], 0.0)) * math.sqrt(max(gram[1][1], 0.0))
    if not product:
        return 1 - t, t
    sine = math.sqrt(max((product - gram[0][1]) * (product + gram[0][1]), 0.0)) / product
    angle = math.atan2(sine, gram[0][1] / product)
    if gram[0][1] < 0 and sine < _OPPOSITE:
        return None
    if not sine:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@merge_method(Grain.VALUES, looks=GRAM, linear=True, copies=1, shares=True, refuse=_refuse_other_than_two("slerp"))
def slerp(*models: Either, weights: Weights, found: Gram) -> Either:
    """Of two models: a direction on the arc between theirs, t = w₂/(w₁+w₂) of the way, and a length between theirs.

    Lengths and the angle are those of the whole tensor, taken as one vector. Weights are shares, not strengths:
    doubled, they give the same. Where one is zero, the other's direction is kept, and all is linear.
    Source: Shoemake 1985, Animating rotation with quaternion curves. sd-mecha's slerp is this one. mergekit's slerp and
    nuslerp are what nuslerp is here; its slerp is linear wherever |cos| is over 0.9995, as it is between most models of
    one family. Opposite directions, between which there is no one arc, all of them take linearly, which leaves next to
    nothing of both; here they are refused, unless a tensor has but one value.
    """
    own = shares(weights)
    a, b = (math.sqrt(max(found[i][i], 0.0)) for i in range(2))
    if not (a and b):
        return combined(models, own)
    arc = _arc(found, own[1])
    if arc is None:
        return combined(models, _without_direction("slerp", models, own))
    length = own[0] * a + own[1] * b
    return combined(models, (arc[0] * length / a, arc[1] * length / b))


@merge_method(Grain.VALUES, looks=GRAM, linear=True, copies=1, shares=True, refuse=_refuse_other_than_two("nuslerp"))
def nuslerp(*models: Either, weights: Weights, found: Gram) -> Either:
    """(sin((1−t)ω)·A + sin(tω)·B) / sin ω, with t = w₂/(w₁+w₂), ω the angle between A and B: slerp of the models
    themselves, not of their directions.

    The longer one pulls the direction towards itself. Of equal lengths it is slerp.
    Source: mergekit's nuslerp, with nuslerp_flatten as by default; its row_wise is nuslerp_rows. Negative weights are
    refused, as are opposite directions; mergekit takes these linearly.
    """
    own = shares(weights)
    arc = _arc(found, own[1])
    return combined(models, _without_direction("nuslerp", models, own) if arc is None else arc)


@merge_method(Grain.ROWS, looks=GRAM, copies=5, shares=True, refuse=_refuse_other_than_two("nuslerp_rows"))
def nuslerp_rows(*models: Either, weights: Weights, found: Gram) -> Either:
    """(sin((1−t)ωᵣ)·Aᵣ + sin(tωᵣ)·Bᵣ) / sin ωᵣ for each row r, that is for all that leads to one output: nuslerp of
    rows.

    A tensor of one axis is one row. Rows that are opposite to within a thousandth are taken linearly: one row that has
    turned round is no reason to refuse a weight.
    Source: mergekit's nuslerp without nuslerp_flatten, and with nuslerp_row_wise off: on, it takes the columns. Of
    convolutions it takes the last axis of the kernel for a row.
    """
    import torch

    first, second = shares(weights)
    if models[0].ndim < 2:
        arc = _arc(found, second)
        return combined(models, _without_direction("nuslerp_rows", models, (first, second)) if arc is None else arc)
    a, b = (m.flatten(1) for m in models)
    lengths = [torch.linalg.vector_norm(m, dim=1, keepdim=True) for m in (a, b)]
    zero = [length == 0 for length in lengths]
    u, v = (m / n.masked_fill_(z, 1.0) for m, n, z in zip((a, b), lengths, zero, strict=True))
    # sin ω/2 and cos ω/2, of which neither loses digits where the other is near 1.
    half_sine, half_cosine = (torch.linalg.vector_norm(x, dim=1, keepdim=True) / 2 for x in (u - v, u + v))
    # Not atan2, whose last bit depends on how many rows there are.
    angle, sine = 2 * torch.atan(half_sine / half_cosine), 2 * half_sine * half_cosine
    straight = (sine == 0) | (half_cosine < _OPPOSITE / 2) | zero[0] | zero[1]
    sine = sine.masked_fill_(straight, 1.0)
    numbers = [(torch.sin(t * angle) / sine).masked_fill_(straight, t) for t in (first, second)]
    result: Tensor = (a * numbers[0]).addcmul_(b, numbers[1])
    return result.reshape(models[0].shape)


# ------------------------------------------------------------------------------------------------ any number


@merge_method(Grain.VALUES, looks=GRAM, linear=True, copies=1, shares=True, refuse=refuse_shares("multislerp"))
def multislerp(*models: Either, weights: Weights, found: Gram) -> Either:
    """exp_m(Σ wᵢ·log_m(ûᵢ)) · Σ wᵢ‖modelᵢ‖: the models' directions ûᵢ averaged in the tangent space at their mean m.

    m is the direction of Σ wᵢ·ûᵢ; weights are shares. It is one step of karcher; a model that is zero has no direction
    and counts with its length only.
    Source: Buss and Fillmore 2001, Spherical averages and applications to spherical splines. mergekit's multislerp
    takes for log_m the shadow on the tangent space, ûᵢ − ⟨ûᵢ,m⟩·m; since these sum to nothing at the mean, its result
    is m itself.
    """
    return _centred("multislerp", models, weights, found, max_iter=1, tol=0.0)


_LIMITS = within("karcher", max_iter=(1, math.inf), tol=(0, math.inf))


@merge_method(Grain.VALUES, looks=GRAM, linear=True, copies=1, shares=True, refuse=refuse_shares("karcher", _LIMITS))
def karcher(*models: Either, weights: Weights, found: Gram, max_iter: int = 10, tol: float = 1e-5) -> Either:
    """argmin_u Σ wᵢ·∠(u, ûᵢ)² · Σ wᵢ‖modelᵢ‖: the direction in the middle of all models' by angle, at their mean
    length.

    From the direction of Σ wᵢ·ûᵢ it follows the mean of the tangents to all, at most max_iter times, until that is
    not longer than tol. Weights are shares. A model that is zero has no direction and counts with its length only. Of
    two models it is slerp, as near as tol.
    Source: Karcher 1977; the iteration is that of Buss and Fillmore 2001. mergekit's karcher has no weights, takes
    models shorter than tol for zero and those nearer than tol for none, and computes in the dtype of the file. Where
    directions cancel out it takes the first; here that is refused, unless a tensor has but one value.
    """
    return _centred("karcher", models, weights, found, max_iter=max_iter, tol=tol)


def _centred(
    name: str, models: Sequence[Tensor], weights: Weights, found: Gram, *, max_iter: int, tol: float
) -> Tensor:
    own = shares(weights)
    numbers = _centre(tuple(map(tuple, found)), own, max_iter, tol)
    return combined(models, _without_direction(name, models, own) if numbers is None else numbers)


@lru_cache(maxsize=256)  # each part of a tensor asks for the same
def _centre(gram: tuple[Numbers, ...], weights: Numbers, max_iter: int, tol: float) -> Numbers | None:
    """The centre on the sphere, as numbers of the models; None where there is no one direction in their middle."""
    lengths = [math.sqrt(max(gram[i][i], 0.0)) for i in range(len(weights))]
    kept = [i for i, weight in enumerate(weights) if weight and lengths[i]]
    if not kept:
        return weights
    cosines = [[gram[i][j] / (lengths[i] * lengths[j]) for j in kept] for i in kept]

    def length(numbers: Numbers) -> float:
        rows = (math.fsum(c * x for c, x in zip(row, numbers, strict=True)) for row in cosines)
        return math.sqrt(max(math.fsum(x * r for x, r in zip(numbers, rows, strict=True)), 0.0))

    mean = shares([weights[i] for i in kept])
    if length(mean) < _OPPOSITE:
        return None
    centre = [x / length(mean) for x in mean]
    for _ in range(max_iter):
        pulls, inward = [], []
        for share, row in zip(mean, cosines, strict=True):
            cosine = math.fsum(c * x for c, x in zip(row, centre, strict=True))
            sine = math.sqrt(max((1 - cosine) * (1 + cosine), 0.0))
            if cosine < 0 and sine < _OPPOSITE:
                return None
            pulls.append(share * (math.atan2(sine, cosine) / sine if sine else 1.0))
            inward.append(pulls[-1] * cosine)
        step = [p - math.fsum(inward) * x for p, x in zip(pulls, centre, strict=True)]
        distance = length(step)
        along = math.sin(distance) / distance if distance else 1.0
        centre = [math.cos(distance) * x + along * s for x, s in zip(centre, step, strict=True)]
        centre = [x / length(centre) for x in centre]
        if distance <= tol:
            break
    mean_length = math.fsum(w * n for w, n in zip(weights, lengths, strict=True))
    numbers = [0.0] * len(weights)
    for i, x in zip(kept, centre, strict=True):
        numbers[i] = x * mean_length / lengths[i]
    return tuple(numbers)
