"""Filters: differences smoothed over neighbouring values, and models crossed over by frequency."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weightops.merging.limits import within
from weightops.merging.method import WORKING_VALUES, Weights, merge_method
from weightops.plan import Grain

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from weightops.merging.method import Delta, Either

# A Gaussian of σ = 1, cut off at four of it.
_REACH = 4
_GAUSSIAN = tuple(math.exp(-(x**2) / 2) for x in range(-_REACH, _REACH + 1))


def _smoothing_nbytes(shape: Sequence[int]) -> int:
    """Of the boxes of a step, or of the rows that are blurred at once, whichever are more; in float64."""
    lengths = [n for n in shape if n != 1] or [1]
    if 0 in lengths:
        return 0
    in_row, size = math.prod(lengths[1:]), math.prod(3 for _ in lengths)
    boxes = min(lengths[0], max(1, WORKING_VALUES // (in_row * size))) * in_row * size
    rows = min(lengths[0], max(1, WORKING_VALUES // in_row))
    wider = max((1 + 2 * _REACH / n for n in lengths[1:]), default=1.0)  # beyond the edges
    blurred = 12 * (rows + 2 * _REACH) * in_row + math.ceil(8 * (1 + 2 * wider) * rows * in_row)
    # Two lots of boxes, where their values stand, and the rows that are in them.
    boxed = 24 * boxes + 16 * (boxes // size + 2 * in_row)
    return max(boxed, blurred) + 4096


@merge_method(Grain.TENSOR, copies=3, beside=_smoothing_nbytes)
def smooth_add(*deltas: Delta, weights: Weights) -> Delta:
    """Σ wᵢ·gauss(median(Δᵢ)): differences smoothed, by the median of each value's neighbours and then a Gaussian.

    Along every axis of the tensor: the median of the box of 3 × 3 × … values around each, then a Gaussian of σ = 1
    that is cut off at 4. Beyond an edge the values come back, the one at the edge first.
    Source: supermerger (smoothAdd), with scipy's median_filter(size=3) and gaussian_filter(sigma=1), which is the same.
    Neighbouring channels have nothing to do with one another: it takes away most of what differs from row to row.
    """
    import torch

    shape = [n for n in deltas[0].shape if n != 1] or [1]  # along an axis of one value nothing changes
    total = torch.zeros_like(deltas[0].reshape(shape))
    if total.numel() == 0:
        return total.reshape(deltas[0].shape)
    for delta, weight in zip(deltas, weights, strict=True):
        if weight:
            _add_blurred(total, _median_of_box(delta.reshape(shape)), weight)
    return total.reshape(deltas[0].shape)


def _add_blurred(total: Tensor, values: Tensor, weight: float) -> None:
    """total += weight · gauss(values), in float64 but for the last step, some rows at a time."""
    import torch

    weights = [weight_at / math.fsum(_GAUSSIAN) for weight_at in _GAUSSIAN]
    step = max(1, WORKING_VALUES * len(values) // values.numel())
    for start in range(0, len(values), step):
        rows = slice(start, min(start + step, len(values)))
        blurred = _rows_around(values, rows, _REACH).double()
        for axis in range(values.ndim):
            wide = blurred if axis == 0 else _all_around(blurred, axis, _REACH)
            length = wide.shape[axis] - 2 * _REACH
            blurred = torch.zeros_like(wide.narrow(axis, 0, length), memory_format=torch.contiguous_format)
            for place, weight_at in enumerate(weights):
                blurred.add_(wide.narrow(axis, place, length), alpha=weight_at)
        total[rows].add_(blurred.to(total.dtype), alpha=weight)


def _median_of_box(values: Tensor) -> Tensor:
    """The median of each value and those next to it along all axes, diagonally too; some rows at a time."""
    import torch

    result: Tensor = torch.empty_like(values, memory_format=torch.contiguous_format)
    size, in_row = 3**values.ndim, values.numel() // len(values)
    step = max(1, WORKING_VALUES // (in_row * size))
    places = torch.empty(0)
    for start in range(0, len(values), step):
        rows = slice(start, min(start + step, len(values)))
        seen = _rows_around(values, rows, 1)
        # Where each box's values stand is the same in all steps. To look it up takes a tenth of the time of mirroring,
        # and of copying boxes of three by three by three.
        places = _places_of_boxes(seen) if start == 0 else places
        boxes = seen.reshape(-1).index_select(0, places[: (rows.stop - start) * in_row * size]).reshape(-1, size)
        if boxes.is_cuda:
            found = boxes.median(1).values
        else:
            # On the CPU numpy's selection is several times as fast as torch's, but puts NaN above all.
            table = boxes.numpy()
            table.partition(size // 2, axis=1)
            found = torch.from_numpy(table[:, size // 2])
        result[rows] = found.reshape(result[rows].shape)
    return result.masked_fill_(values.isnan(), math.nan)


def _places_of_boxes(seen: Tensor) -> Tensor:
    """Of each box of three values along every axis, one after another, where its values stand in a flat tensor.

    The tensor begins and ends with a row more than has boxes; along the other axes it is mirrored.
    """
    import torch

    places = torch.arange(seen.numel(), device=seen.device).reshape(seen.shape)
    for axis in range(1, seen.ndim):
        places = _all_around(places, axis, 1)
    for axis in range(seen.ndim):
        places = places.unfold(axis, 3, 1)
    return places.reshape(-1)


def _rows_around(values: Tensor, rows: slice, reach: int) -> Tensor:
    """A copy of these rows and of so many before and after them, mirrored at the edges."""
    return values.index_select(0, _mirrored(rows.start - reach, rows.stop + reach, len(values), values.device))


def _all_around(values: Tensor, axis: int, reach: int) -> Tensor:
    length = values.shape[axis]
    return values.index_select(axis, _mirrored(-reach, length + reach, length, values.device))


def _mirrored(start: int, stop: int, length: int, device: torch.device) -> Tensor:
    """… 1 0 0 1 2 … n−1 n−1 n−2 …: the places from start to stop, of a line that is mirrored at both ends."""
    import torch

    places = torch.arange(start, stop, device=device).remainder_(2 * length)
    return torch.minimum(places, 2 * length - 1 - places)


# ------------------------------------------------------------------------------------------------ frequencies


@merge_method(Grain.TENSOR, double=True, copies=4, refuse=within("crossover", alpha=(0, 1), tilt=(0, 2)))
def crossover(a: Either, b: Either, /, *, alpha: float = 0.5, tilt: float = 0.0) -> Either:
    """F⁻¹((1 − f)·F(A) + f·F(B)), F the Fourier transform along all axes: A's low frequencies with B's high ones.

    alpha: the share of frequencies from B, 0 is A and 1 is B. A frequency is the root mean square of those along the
    axes, each from 0 to 1. tilt: 0, a sharp cut at 1 − α; up to 1, ever softer, until it is the weighted sum; from
    there on, turned round, up to 2: B's low frequencies, below α, with A's high ones.
    Source: sd-mecha (crossover), which is the same but for axes of one value, which it counts among the axes, and for
    a tilt of just 2, where it cuts at 1 − α; its tilts of 2 to 4 are those of 2 to 0.
    """
    import torch

    if alpha in (0, 1) or a.numel() == 0:
        return (b if alpha == 1 else a).clone()
    if tilt == 1:
        return torch.lerp(a, b, alpha)
    shape = [n for n in a.shape if n != 1] or [1]
    # The transform is linear. Of the difference, it leaves what is alike in A and B as it is, bit for bit.
    spectrum = torch.fft.rfftn((b - a).reshape(shape))
    spectrum.mul_(_filter(_radii(shape, a.device), alpha, tilt))
    crossed: Tensor = torch.fft.irfftn(spectrum, s=shape)
    return crossed.reshape(a.shape).add_(a)


def _radii(shape: Sequence[int], device: torch.device) -> Tensor:
    """Of each frequency of a real transform, the root mean square of those along the axes, each from 0 to 1."""
    import torch

    squares = torch.zeros((*shape[:-1], shape[-1] // 2 + 1), dtype=torch.float64, device=device)
    for axis, length in enumerate(shape):
        places = torch.arange(squares.shape[axis], dtype=torch.float64, device=device)
        along = torch.minimum(places, length - places) / max(length // 2, 1)
        squares.add_(along.square().reshape(-1, *(1 for _ in shape[axis + 1 :])))
    return squares.div_(len(shape)).sqrt_()


def _filter(radii: Tensor, alpha: float, tilt: float) -> Tensor:
    """The share of B at each frequency: a line of this tilt, through what `alpha` says."""
    if tilt == 0:
        return (radii > 1 - alpha).to(radii.dtype)
    if tilt == 2:
        return (radii < alpha).to(radii.dtype)
    steepness = 1 / math.tan(math.pi * tilt / 2)
    middle = 1 - alpha if tilt < 1 else alpha
    return radii.sub_(middle).mul_(steepness).add_(alpha).clamp_(0, 1)


@merge_method(
    Grain.TENSOR, double=True, decides=True, copies=9,
    refuse=within("distribution_crossover", alpha=(0, 1), ramp=(0, math.inf)),
)  # fmt: skip
def distribution_crossover(a: Tensor, b: Tensor, base: Tensor, /, *, alpha: float = 0.5, ramp: float = 0.0) -> Tensor:
    """P⁻¹F⁻¹((1 − f)·F(P·A) + f·F(P·B)), P the order of the base's values: a crossover along the sorted base.

    All values in one line, from where the base is least to where it is greatest; of its frequencies, from 0 to 1,
    those from 1 − α on are B's. ramp: over how much of them A's go over into B's.
    Source: meh (distribution_crossover), which is the same but that its alpha is the share of A, and its ramp beta.
    """
    import torch

    if a.numel() == 0:
        return a.clone()
    order = base.reshape(-1).argsort(stable=True)
    line = (b - a).reshape(-1)[order]
    spectrum = torch.fft.rfft(line)
    places = torch.arange(len(spectrum), dtype=torch.float64, device=a.device).div_(len(spectrum))
    below = places.sub_(1 - alpha)
    passed = below.div_(ramp).add_(0.5).clamp_(0, 1) if ramp else (below >= 0).double()
    line = torch.fft.irfft(spectrum.mul_(passed), n=len(line))
    result = a.reshape(-1).clone()
    result[order] += line
    return result.masked_fill_(base.reshape(-1).isnan(), math.nan).reshape(a.shape)
