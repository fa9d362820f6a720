"""Signs that several changes elect, value by value. Knows tensors alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def elected(
    changes: Sequence[Tensor], weights: Sequence[float], *, count_votes: bool, normalize: bool,
    factors: Sequence[float] = (),
) -> Tensor:  # fmt: skip
    """Of weighted changes, those of the elected sign, added up; with `normalize`, over the |w| of these: their mean.

    The sign is that of their sum, or with count_votes that of most; a tie leaves 0. factors: numbers, not negative, by
    which each counts beside in sum and mean, but not in the vote. The changes are used up. NaN stays NaN.
    """
    import torch

    # In floats throughout: masks of booleans take torch several times as long.
    sign = torch.zeros_like(changes[0])
    for change in changes:
        sign.add_(change.sign() if count_votes else change)
    sign.sign_()
    total = torch.zeros_like(sign)
    share = torch.zeros_like(sign) if normalize else None
    for change, weight, factor in zip(changes, weights, factors or [1.0] * len(changes), strict=True):
        agreeing = change.mul_(sign).relu_()
        total.add_(agreeing, alpha=factor)
        if share is not None:
            share.add_(agreeing.sign_(), alpha=factor * abs(weight))
    total.mul_(sign)
    # Where none agrees, the sum is 0, whatever it is divided by.
    return total if share is None else total.div_(share.clamp_min_(torch.finfo(share.dtype).tiny))
