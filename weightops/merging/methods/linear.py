"""Weighted sums of models and of their differences from a base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightops.merging.method import Weights, merge_method
from weightops.plan import Grain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def _lerp(models: Sequence[Tensor], out: Tensor, *, weights: Weights) -> bool:
    """Two half-precision models whose weights sum to one: torch's lerp on half types works in float32 inside."""
    import torch

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


@merge_method(Grain.ROWS, shortcut=_lerp)
def weighted_sum(*models: Tensor, weights: Weights) -> Tensor:
    """Σ wᵢ·modelᵢ: models blended by weight; for two and --alpha, (1−α)·A + α·B.

    Source: Wortsman et al. 2022, arXiv:2203.05482 (model soups). The weights are used as they are given;
    it is the command that normalises them.
    """
    first, *rest = [(m, w) for m, w in zip(models, weights, strict=True) if w] or [(models[0], 0.0)]
    total = first[0] * first[1]
    for model, weight in rest:
        total.add_(model, alpha=weight)
    return total


@merge_method(Grain.ROWS)
def add_difference(base: Tensor, /, *models: Tensor, weights: Weights) -> Tensor:
    """base + Σ wᵢ·(modelᵢ − base): what each model learned from the base, added up; with --alpha, A + α·(B − C).

    Source: Ilharco et al. 2023, arXiv:2212.04089 (task arithmetic). sd-mecha and supermerger write it as
    a + α(b − c), which are the weights 1 and α. Weights of differences are not normalised.
    """
    total = base.clone()
    for model, weight in zip(models, weights, strict=True):
        total.add_(model - base, alpha=weight)
    return total
