"""Values of one model in place of another's: those that are near, within bounds, in a region, or of a rank."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weightops.merging.limits import within
from weightops.merging.method import merge_method
from weightops.plan import Grain

if TYPE_CHECKING:
    from weightops.merging.method import Either


@merge_method(Grain.VALUES, copies=3, refuse=within("nearswap", threshold=(0, math.inf)))
def nearswap(a: Either, b: Either, /, *, threshold: float) -> Either:
    """lerp(A, B, min(1, t/|A−B|)): B's values where they are within the threshold t of A's; elsewhere A moved by t.

    threshold: in units of the weights; the recipes of its author use 0.0001.
    Source: alchemonaut, QuartetAnemoi-70B-t0.0001; mergekit's nearswap (its t) is the same for differences of 1e-6 on.
    """
    import torch

    step = b - a
    near = step.abs() <= threshold
    return torch.where(near, b, step.clamp_(-threshold, threshold).add_(a))


@merge_method(Grain.VALUES, decides=True, copies=8, refuse=within("clamp", stiffness=(0, 1)))
def clamp(model: Either, /, *bounds: Either, stiffness: float = 0.0) -> Either:
    """min(max(model, low), high), low and high the least and the greatest of the bounds: a model kept between others.

    stiffness: 0, those bounds; 1, of the bounds below and above their mean those nearest to it; between, blended.
    Source: sd-mecha (clamp), which is the same.
    """
    import torch

    low = high = bounds[0]
    for bound in bounds[1:]:
        low, high = torch.minimum(low, bound), torch.maximum(high, bound)
    if stiffness:
        total = bounds[0].clone()
        for bound in bounds[1:]:
            total.add_(bound)
        below, above = low, high
        for bound in bounds:
            times = bound * len(bounds)  # beside the sum: a bound that is the mean itself must not miss it by rounding
            below = torch.where((times <= total) & (bound > below), bound, below)
            above = torch.where((times >= total) & (bound < above), bound, above)
        low, high = torch.lerp(low, below, stiffness), torch.lerp(high, above, stiffness)
    return torch.minimum(torch.maximum(model, low), high)


def _region(width: float, offset: float, count: int) -> tuple[int, int, bool]:
    """Of `count` things in a ring, a share of `width` from `offset` on: start, stop, and is it all but these?"""
    offset %= 1.0
    if width + offset <= 1:
        return round(offset * count), round((width + offset) * count), False
    return round((width + offset - 1) * count), round(offset * count), True


# TENSOR, though a row would do: no part knows which rows of the whole it is.
@merge_method(Grain.TENSOR, copies=1, refuse=within("tensor_sum", width=(0, 1)))
def tensor_sum(a: Either, b: Either, /, *, width: float = 0.5, offset: float = 0.0) -> Either:
    """A, with B's rows in [offset, offset + width) of axis 0, as shares of it, round the end: rows exchanged.

    width: the share of rows from B. offset: where they begin; beyond the last row they go on at the first.
    Source: supermerger (tensor), sd-mecha (tensor_sum), which rounds the ends of the region to the nearest row as is
    done here; meh and supermerger round them down, and call width and offset alpha and beta.
    """
    start, stop, without = _region(width, offset, len(a))
    outer, inner = (b, a) if without else (a, b)
    result = outer.clone()
    result[start:stop] = inner[start:stop]
    return result


@merge_method(Grain.TENSOR, decides=True, copies=11, refuse=within("top_k_tensor_sum", width=(0, 1)))
def top_k_tensor_sum(a: Either, b: Either, /, *, width: float = 1.0, offset: float = 0.0) -> Either:
    """A's own values set in the order of B's: where B's value is the k-th of all, A's k-th; the rest is left as it is.

    Which of A's values are set so: those whose ranks of magnitude, from the smallest, are in (offset, offset + width]
    as shares of all, round the end. Values of one magnitude go together.
    Source: meh (top_k_tensor_sum), which is the same; sd-mecha takes one value more at the lower end.
    """
    values = a.reshape(-1)
    order = b.reshape(-1).argsort(stable=True)
    ordered = values.sort().values
    start, stop, without = _region(width, offset, len(values))
    sizes = ordered.abs()
    lowest = sizes.kthvalue(start).values if start else -1.0
    highest = sizes.kthvalue(stop).values if 0 < stop < len(sizes) else (math.inf if stop else -1.0)
    taken = (sizes > lowest).logical_and_(sizes <= highest)
    if without:
        taken.logical_not_()
    result = values.clone()
    result[order[taken]] = ordered[taken]
    # A value that is none has no rank: it stays where it is, to be seen.
    return result.masked_fill_(values.isnan() | b.reshape(-1).isnan(), math.nan).reshape(a.shape)
