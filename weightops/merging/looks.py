"""First looks that several merge methods share: inner products, and the values at given ranks of magnitude."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from weightops.merging.method import Look

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    Gram = list[list[float]]
    # Of one quantity: the ranks that are sought, and of whole ranks the bin, and the rank among those in the bin.
    Sought = tuple[tuple[float, ...], Mapping[int, tuple[int, int]]]

# What a look keeps of the parts of a block of a million values, for each model, at most: histograms of 15 and 16 bits.
LOOK_NBYTES = 5 << 20

# ------------------------------------------------------------------------------------------------ inner products


def _inner(*models: Tensor, found: None, **_parameters: Any) -> Gram:
    import torch

    flat = [m.double().reshape(-1) for m in models]
    rows = [[0.0] * len(flat) for _ in flat]
    for i, a in enumerate(flat):
        for j in range(i + 1):
            rows[i][j] = rows[j][i] = float(torch.dot(a, flat[j]))
    return rows


def _total(values: Sequence[Gram], found: None, **_parameters: Any) -> Gram:
    count = len(values[0])
    return [[_sum([v[i][j] for v in values]) for j in range(count)] for i in range(count)]


def _sum(values: Sequence[float]) -> float:
    """Exact; NaN where some are infinite, as models are that hold Inf or NaN."""
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan


# Of all models of a method: found[i][j] = ⟨modelᵢ, modelⱼ⟩ (Frobenius), in float64.
GRAM = (Look(_inner, _total),)

# ------------------------------------------------------------------------------------------------ ranks of magnitude

# The bits of a float32 that the second look tells apart; the sign, which is left out, and the others are the first's.
# With fewer, neighbouring values fall into one bin, and each count waits for the one before.
_LOW = 16
_MAGNITUDE = 0x7FFFFFFF


def ranked(quantities: Callable[..., Sequence[Tensor]], ranks: Callable[..., Sequence[float]]) -> tuple[Look, Look]:
    """Two looks that find, of each quantity, exactly the values of given ranks of magnitude in a whole tensor.

    quantities: `quantities(*models, **parameters)`, tensors that are ranked by magnitude, as float32, so that what
    compares them with what is found must round them so (see `reaches`, `kept`); none, where no rank matters. ranks:
    `ranks(count, **parameters)`, of `count` values, the largest has rank 1; between two of them, as 2.5, it is what
    lies between their values in proportion. found[q][k]: the value of the k-th rank of quantity q.
    In integers: by a histogram of the upper bits of float32, and then of the lower bits in the bins that matter.
    """

    def upper(*models: Tensor, found: None, **parameters: Any) -> list[Tensor]:
        import torch

        counts = []
        for q in quantities(*models, **parameters):
            codes = _codes(q)
            codes >>= _LOW
            counts.append(torch.bincount(codes, minlength=1 << (31 - _LOW)))
        return counts

    def fold_upper(values: Sequence[Sequence[Tensor]]) -> list[tuple[Any, Any]]:
        return [_counted(_added(each).cpu().numpy()) for each in zip(*values, strict=True)]

    def together_upper(values: Sequence[Sequence[tuple[Any, Any]]], found: None, **parameters: Any) -> list[Sought]:
        import numpy as np

        sought: list[Sought] = []
        for each in zip(*values, strict=True):
            counts = np.zeros(1 << (31 - _LOW), dtype=np.int64)
            for bins, numbers in each:
                counts[bins] += numbers
            above = np.cumsum(counts[::-1])[::-1]  # so many stand in this bin or a higher one
            count = int(above[0])
            wanted = tuple(min(max(rank, 1), max(count, 1)) for rank in ranks(count, **parameters))
            places = {}
            for rank in {whole for r in wanted for whole in (math.floor(r), math.ceil(r))}:
                place = int(np.flatnonzero(above >= rank)[-1]) if count else 0
                places[rank] = place, rank - (int(above[place + 1]) if place + 1 < len(above) else 0)
            sought.append((wanted, places))
        return sought

    def lower(*models: Tensor, found: list[Sought], **parameters: Any) -> list[list[Any]]:
        seen = []
        for q, (_, places) in zip(quantities(*models, **parameters), found, strict=True):
            seen.append(_inside(_codes(q), _bins(places)))
        return seen

    def fold_lower(values: Sequence[Sequence[Any]]) -> list[list[Any]]:
        return [[_tallied(same) for same in zip(*each, strict=True)] for each in zip(*values, strict=True)]

    def together_lower(values: Sequence[Sequence[Any]], found: list[Sought], **parameters: Any) -> list[list[float]]:
        import numpy as np

        limits = []
        for each, (wanted, places) in zip(zip(*values, strict=True), found, strict=True):
            counts = {place: np.zeros(1 << _LOW, dtype=np.int64) for place in _bins(places)}
            for own in each:
                for place, low, numbers in own:
                    counts[place][low] += numbers
            at = {}
            for rank, (place, inside) in places.items():
                above = np.cumsum(counts[place][::-1])[::-1]
                low = int(np.flatnonzero(above >= inside)[-1]) if above[0] else 0
                at[rank] = float(np.uint32((place << _LOW) + low).view(np.float32))
            limits.append([_between(at[math.floor(rank)], at[math.ceil(rank)], rank % 1) for rank in wanted])
        return limits

    return Look(upper, together_upper, fold_upper), Look(lower, together_lower, fold_lower)


def _between(first: float, second: float, share: float) -> float:
    return first if first == second else first + share * (second - first)


def _bins(places: Mapping[int, tuple[int, int]]) -> list[int]:
    return sorted({place for place, _ in places.values()})


def _codes(quantity: Tensor) -> Tensor:
    """The bits of magnitudes as float32, in a tensor of its own: integers in their order; NaN is above all."""
    import torch

    return quantity.reshape(-1).to(torch.float32).contiguous().view(torch.int32) & _MAGNITUDE


def _added(counts: Sequence[Tensor]) -> Tensor:
    total = counts[0].clone()
    for other in counts[1:]:
        total += other
    return total


def _inside(codes: Tensor, places: Sequence[int]) -> list[tuple[int, Any]]:
    """Of each of these bins of the upper bits, the lower bits of those that are in it. The codes are used up."""
    import numpy as np

    if codes.device.type != "cpu":
        low = codes & ((1 << _LOW) - 1)
        codes >>= _LOW
        return [(place, low[codes == place].cpu().numpy().astype(np.uint16)) for place in places]
    # numpy compares and picks integers in a fraction of torch's time. Those below the bin wrap around, to far above it.
    found, below, lowest = [], codes.numpy().view(np.uint32), 0
    for place in places:
        below -= np.uint32((place << _LOW) - lowest)
        lowest = place << _LOW
        found.append((place, below[below < np.uint32(1 << _LOW)].astype(np.uint16)))
    return found


def _tallied(same: Sequence[tuple[int, Any]]) -> tuple[int, Any, Any]:
    """What the parts of a block have in one bin: which lower bits, and how many have them."""
    import numpy as np

    parts = [low for _, low in same]
    if sum(map(len, parts)) <= 1 << _LOW:  # so few that counting them part by part would take longer
        parts = [np.concatenate(parts)]
    counts = np.bincount(parts[0], minlength=1 << _LOW)
    for low in parts[1:]:
        counts += np.bincount(low, minlength=1 << _LOW)
    return (same[0][0], *_counted(counts))


def _counted(counts: Any) -> tuple[Any, Any]:
    import numpy as np

    found = np.flatnonzero(counts)
    return found.astype(np.uint16), counts[found].astype(np.uint32)


def reaches(quantity: Tensor, limit: float) -> Tensor:
    """Is its magnitude at least so large, as `ranked` compares? NaN is."""
    import torch

    return ~(quantity.abs().to(torch.float32) < limit)


def kept(values: Tensor, limit: float) -> Tensor:
    """A tensor of its own: values whose magnitudes reach the limit, and 0 in place of the others. NaN is kept."""
    import torch

    # One pass, which masks would make of many.
    return torch.nn.functional.hardshrink(values, _below(limit, wide=values.dtype is torch.float64))


def kept_between(values: Tensor, low: float, high: float) -> Tensor:
    """The same of those whose magnitudes reach `low`, and do not exceed `high`."""
    import numpy as np

    found = kept(values, low)
    if not high < math.inf:  # or it is NaN
        return found
    above = (np.float32(high).view(np.uint32) + np.uint32(1)).view(np.float32)
    return found.sub_(kept(values, float(above)))


def _below(limit: float, *, wide: bool) -> float:
    """The largest number that does not reach a limit, which is a float32; in float64, where it is `wide`."""
    import numpy as np

    if not limit > 0:  # nothing is below it, or it is NaN
        return -1.0
    single = np.float32(limit)
    before = float(np.nextafter(single, np.float32(0)))
    if not wide:
        return before
    # Half way between the two, float64 rounds to the even one.
    middle = (before + (limit if math.isfinite(limit) else 2.0**128)) / 2
    return middle if single.view(np.uint32) % 2 else math.nextafter(middle, 0.0)
