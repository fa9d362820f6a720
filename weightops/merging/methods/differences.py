"""One model's difference added to another model, value by value as far as the two agree, or do not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weightops.merging.method import merge_method
from weightops.plan import Grain

if TYPE_CHECKING:
    from torch import Tensor


def _part_of_both(first: Tensor, second: Tensor) -> Tensor:
    """first / (first + second), of values that are not negative, which are written over; 0 where both are 0."""
    both = second.add_(first)
    return first.div_(both).masked_fill_(both == 0, 0.0)


@merge_method(Grain.VALUES, copies=4)
def train_difference(a: Tensor, b: Tensor, base: Tensor, /, *, alpha: float = 1.0) -> Tensor:
    """A + (B − base)·1.8·α·|B−A| / (|B−A| + |B−base|): what B learned, as if A were trained on it.

    A is the model that learns and B the one that it learns from; where B and A are alike, nothing is added.
    Source: supermerger (trainDifference) and sd-mecha (train_difference_mask), which are the same.
    """
    learned = b - base
    share = _part_of_both((b - a).abs_(), learned.abs())
    return learned.mul_(share).mul_(1.8 * alpha).add_(a)


@merge_method(Grain.VALUES, copies=4)
def add_opposite(a: Tensor, b: Tensor, base: Tensor, /, *, alpha: float = 1.0) -> Tensor:
    """A + (B − base)·2·α·|A−B| / (|A−B| + |A+B−2·base|): what B learned, where A learned the opposite.

    Twice the difference where A and B moved from the base in opposite ways by as much, nothing where they moved alike.
    Source: sd-mecha (add_opposite_mask), which is the same.
    """
    learned = b - base
    alike = (a - base).add_(learned).abs_()
    share = _part_of_both((a - b).abs_(), alike)
    return learned.mul_(share).mul_(2.0 * alpha).add_(a)


def _opposed(first: Tensor, second: Tensor) -> Tensor:
    """max(0, −first·second) / max(|first|, |second|)²: how much two values cancel, 1 if wholly; 0 where both are 0."""
    import torch

    alike = torch.signbit(first) == torch.signbit(second)
    first, second = first.abs(), second.abs()
    larger = torch.maximum(first, second)
    share = torch.minimum(first, second, out=first).div_(larger)
    return share.masked_fill_(alike.logical_or_(larger == 0), 0.0)


@merge_method(Grain.VALUES, copies=6)
def add_strict_opposite(a: Tensor, b: Tensor, base: Tensor, /, *, alpha: float = 1.0) -> Tensor:
    """A + (B − base)·2·α·max(0, (base−A)·(B−base)) / max(|A−base|, |B−base|)²: only where A and B moved oppositely.

    Like add_opposite, but where one of them did not move, or they moved the same way, nothing is added at all.
    Source: sd-mecha (add_strict_opposite_mask), which is the same; here the quotient is a ratio of two magnitudes, so
    that the squares of small ones cannot vanish.
    """
    learned, other = b - base, a - base
    return learned.mul_(_opposed(other, learned)).mul_(2.0 * alpha).add_(a)


# double: where the cosine is near 0, float32's error of the power is the result.
@merge_method(Grain.VALUES, double=True, copies=6)
def multiply_quotient(a: Tensor, b: Tensor, base: Tensor, /, *, alpha: float = 1.0) -> Tensor:
    """Re(A·(B/base)^(α·m)), m = max(0, −log|A/base|·log|B/base|) / max(log²|A/base|, log²|B/base|): opposite growth.

    What B multiplied the base by, A is multiplied by, as far as A grew where B shrank or the other way round; where
    they went the same way, or one of the three values is 0, it is A. A quotient below 0 turns the value by cos(π·α·m).
    Source: sd-mecha (multiply_quotient), which is the same but for NaN, which it replaces by A.
    """
    import torch

    of_base = base.abs().log_()
    grown = b.abs().log_().sub_(of_base)
    power = _opposed(a.abs().log_().sub_(of_base), grown).mul_(alpha)
    factor = torch.mul(grown, power, out=grown).exp_()
    factor.mul_(torch.where((b < 0) == (base < 0), 1.0, torch.cos(math.pi * power)))
    factor.masked_fill_(power.isnan().logical_or_(power == 0), 1.0)
    return factor.mul_(a).masked_fill_(b.isnan().logical_or_(base.isnan()), math.nan)


@merge_method(Grain.VALUES, copies=4)
def similarity_add_difference(
    a: Tensor, b: Tensor, base: Tensor, /, *, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """(1 − s)·(A + α·(B − base)) + s·lerp(A, B, α/2), s = β·(A·B / max(|A|, |B|)² + 1) / 2: by likeness.

    Where A and B are alike in value (s near beta) they are averaged, where they differ the difference is added.
    Source: meh (similarity_add_difference), which is the same.
    """
    import torch

    larger = torch.maximum(a.abs(), b.abs())
    similarity = (a / larger).mul_(b / larger).add_(1.0).mul_(beta / 2).masked_fill_(larger == 0, beta)
    summed = torch.lerp(a, b, alpha / 2)
    added = (b - base).mul_(alpha).add_(a)
    return torch.lerp(added, summed, similarity, out=added)
