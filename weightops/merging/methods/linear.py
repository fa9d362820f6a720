"""Weighted sums of models, and of their differences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weightops.errors import UsageError
from weightops.merging.method import Weights, cancel_out, merge_method
from weightops.plan import Grain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from torch import Tensor

    from weightops.merging.method import Delta, Either


def _refuse_no_sum(_count: int, parameters: Mapping[str, Any]) -> None:
    if parameters["normalize"] and cancel_out(parameters["weights"]):
        raise UsageError(
            "weighted_sum, weights", "they sum to 0 and cannot be normalised", "--no-normalize takes them as they are"
        )


def _shares(weights: Weights, normalize: bool) -> Weights:
    total = math.fsum(weights)
    # 1.4 and -0.4 sum to 1 less one last place: divided by that, what cancels out exactly no longer would.
    return weights if not normalize or abs(total - 1.0) < 1e-12 else tuple(w / total for w in weights)


def _lerp(models: Sequence[Tensor], out: Tensor, *, weights: Weights, normalize: bool) -> bool:
    """Two half-precision models whose weights sum to one: torch's lerp on half types works in float32 inside."""
    import torch

    weights = _shares(weights, normalize)
    # At 0 and 1 one model alone is the result, bit for bit; a + 0·(b − a) would lose the sign of its zeros.
    if len(models) != 2 or abs(sum(weights) - 1.0) > 1e-12 or 0.0 in weights:
        return False
    if any(t.dtype not in (torch.float16, torch.bfloat16) or t.dtype != out.dtype for t in models):
        return False
    torch.lerp(models[0], models[1], weights[1], out=out)
    _mend(models, out, weights)
    return True


def _mend(models: Sequence[Tensor], out: Tensor, weights: Weights) -> None:
    """Where two models nearly cancel, float32's last bit can exceed the result's: do those few values in float64.

    float32 is off by 2⁻²³ of the first operand at most, which is over one unit of a result that is smaller than it
    by 2⁻¹³ in F16, by 2⁻¹⁶ in BF16. The bits of two magnitudes, as integers, differ by the ratio's exponent.
    """
    import torch

    half = out.dtype is torch.float16
    limit = 12 << 10 if half else 14 << 7
    first, result = (t.view(torch.int16) for t in (models[0], out))
    if out.is_cuda:
        found = ((first & 0x7FFF) - (result & 0x7FFF) > limit).nonzero().flatten()
    else:
        # On the CPU numpy's loops over integers are several times as fast as torch's.
        import numpy as np

        bits = first.numpy()
        # F16's smallest number is 2⁻²⁴: beside operands up to 1, an error of 2⁻²³ of them is within one unit.
        if half and bits.max() <= 0x3C00 and bits.view(np.uint16).max() <= 0xBC00:
            return
        ratio = bits & 0x7FFF
        ratio -= result.numpy() & 0x7FFF
        found = torch.from_numpy(np.flatnonzero(ratio > limit))
    a, b = (m[found].double() for m in models)
    out[found] = (a * weights[0] + b * weights[1]).to(out.dtype)


def _combined(models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ wᵢ·modelᵢ; a weight of 0 leaves its model out, whatever is in it."""
    first, *rest = [(m, w) for m, w in zip(models, weights, strict=True) if w] or [(models[0], 0.0)]
    total = first[0] * first[1]
    for model, weight in rest:
        total.add_(model, alpha=weight)
    return total


@merge_method(Grain.VALUES, shortcut=_lerp, refuse=_refuse_no_sum, linear=True, copies=1)
def weighted_sum(*models: Either, weights: Weights, normalize: bool = True) -> Either:
    """Σ wᵢ·modelᵢ / Σ wᵢ: models blended by weight; for two and --alpha, (1−α)·A + α·B.

    Source: Wortsman et al. 2022, arXiv:2203.05482 (model soups). Without normalize, the weights are used as they are.
    sd-scripts takes them so, mergekit divides by their sum.
    """
    return _combined(models, _shares(weights, normalize))


@merge_method(Grain.VALUES, linear=True, copies=1)
def n_average(*models: Either) -> Either:
    """(model₁ + … + modelₙ) / n: the plain mean of any number of models.

    Kept as a running mean, so that equal models give themselves, bit for bit.
    Source: Wortsman et al. 2022, arXiv:2203.05482 (the uniform soup). sd-mecha's n_average is the same.
    """
    mean = models[0].clone()
    for count, model in enumerate(models[1:], start=2):
        mean.lerp_(model, 1 / count)
    return mean


@merge_method(Grain.VALUES, linear=True, copies=1)
def triple_sum(a: Either, b: Either, c: Either, /, *, alpha: float = 1 / 3, beta: float = 1 / 3) -> Either:
    """(1 − α − β)·A + α·B + β·C: three models blended at once.

    The defaults make it the mean of the three. Source: supermerger (Triple sum) and meh (triple_sum), which have no
    defaults and are the same otherwise.
    """
    return _combined((a, b, c), (1.0 - alpha - beta, alpha, beta))


@merge_method(Grain.VALUES, linear=True, copies=1)
def sum_twice(a: Either, b: Either, c: Either, /, *, alpha: float = 0.5, beta: float = 0.5) -> Either:
    """(1 − β)·((1 − α)·A + α·B) + β·C: two models blended, and a third blended into what comes out.

    Source: supermerger (sum Twice) and meh (sum_twice), which are the same.
    """
    return _combined((a, b, c), ((1.0 - beta) * (1.0 - alpha), (1.0 - beta) * alpha, beta))


@merge_method(Grain.VALUES, linear=True, copies=2)
def add_difference(base: Tensor, /, *models: Tensor, weights: Weights) -> Tensor:
    """base + Σ wᵢ·(modelᵢ − base): what each model learned from the base, added up; with --alpha, A + α·(B − C).

    Source: Ilharco et al. 2023, arXiv:2212.04089 (task arithmetic). sd-mecha and supermerger write it as
    a + α(b − c), which are the weights 1 and α. Weights of differences are not normalised.
    """
    total = base.clone()
    for model, weight in zip(models, weights, strict=True):
        total.add_(model - base, alpha=weight)
    return total


@merge_method(Grain.VALUES, linear=True, copies=1)
def difference(model: Tensor, base: Tensor, /) -> Delta:
    """model − base: what a model learned from the base.

    Source: Ilharco et al. 2023, arXiv:2212.04089 (the task vector).
    """
    return model - base


@merge_method(Grain.VALUES, linear=True, copies=1)
def add(model: Tensor, /, *deltas: Delta, weights: Weights) -> Tensor:
    """model + Σ wᵢ·Δᵢ: differences, and what LoRAs add, each at its strength, added to a model.

    Source: Ilharco et al. 2023, arXiv:2212.04089 (task arithmetic).
    """
    total = model.clone()
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    return total


@merge_method(Grain.VALUES, linear=True, copies=1)
def sum_(*deltas: Delta, weights: Weights) -> Delta:
    """Σ wᵢ·Δᵢ: differences, and what LoRAs add, each at its strength, added up.

    Source: Ilharco et al. 2023, arXiv:2212.04089 (task arithmetic). Nothing is normalised, as in mergekit's
    task_arithmetic at its default.
    """
    return _combined(deltas, weights)
