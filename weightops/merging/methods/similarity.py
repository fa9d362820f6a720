"""Blends whose share follows from how alike two models are in direction: by column, by row, by tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightops.merging.limits import within
from weightops.merging.method import Look, merge_method
from weightops.plan import Grain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from torch import Tensor

    from weightops.merging.method import Delta

    Array = np.ndarray[Any, np.dtype[np.float64]]

# ------------------------------------------------------------------------------------------------ by column


@dataclass(frozen=True, slots=True)
class Similarities:
    """How alike two models are in each column of a tensor, and between which limits those of all tensors lie.

    sample: what the limits are taken of.
    """

    columns: Array
    sample: Array
    low: float
    high: float


def _column_sums(a: Tensor, b: Tensor, *, found: None, **_parameters: Any) -> Array:
    import torch

    a, b = a.double(), b.double()
    products = [x.mul(y).sum(0).reshape(-1) for x, y in ((a, a), (a, b), (b, b))]
    sums: Array = torch.stack(products).cpu().numpy()
    return sums


def _added_up(values: Sequence[Array]) -> Array:
    total = values[0].copy()
    for value in values[1:]:
        total += value
    return total


def _cosine(aa: Array, ab: Array, bb: Array) -> Array:
    """0 where one of them is nothing."""
    import numpy as np

    lengths = np.sqrt(aa) * np.sqrt(bb)
    cosines: Array = np.divide(ab, lengths, out=np.zeros_like(ab), where=lengths != 0)
    return cosines.clip(-1.0, 1.0)


def _limited(columns: Array, sample: Array) -> Similarities:
    return Similarities(columns, sample, *_limits([sample]))


def _limits(samples: Sequence[Array]) -> tuple[float, float]:
    """The least and greatest without those under the 1st percentile, and then without those over the 99th."""
    import numpy as np

    ordered = np.concatenate(samples)
    ordered = ordered[~np.isnan(ordered)]
    ordered.sort()
    if not len(ordered):
        return 0.0, 0.0
    left = ordered[np.searchsorted(ordered, _percentile(ordered, 0.01)) :]
    last = np.searchsorted(left, _percentile(left, 0.99), side="right")
    return float(left[0]), float(left[last - 1])


def _percentile(ordered: Array, share: float) -> float:
    """Halfway between the two values next to its place."""
    place = (len(ordered) - 1) * share
    return float((ordered[math.floor(place)] + ordered[math.ceil(place)]) / 2)


def _normalised(values: Sequence[Array], found: None, **_parameters: Any) -> Similarities:
    """Of columns of length 1: each one's cosine, half and half with that of the whole tensor of such columns."""
    import numpy as np

    aa, ab, bb = _added_up(values)
    columns = _cosine(aa, ab, bb)
    lengths = math.sqrt(np.count_nonzero(aa)) * math.sqrt(np.count_nonzero(bb))
    whole = float(columns.sum()) / lengths if lengths else 0.0
    return _limited((columns + whole) / 2, columns)


def _combined(values: Sequence[Array], found: None, **_parameters: Any) -> Similarities:
    """Each column's cosine, half and half with that of the whole tensor."""
    aa, ab, bb = _added_up(values)
    whole = _cosine(aa.sum(keepdims=True), ab.sum(keepdims=True), bb.sum(keepdims=True))
    columns = (_cosine(aa, ab, bb) + whole) / 2
    return _limited(columns, columns)


def _over_all_tensors(found: Mapping[str, Similarities], **_parameters: Any) -> dict[str, Similarities]:
    low, high = _limits([each.sample for each in found.values()])
    return {name: replace(each, low=low, high=high) for name, each in found.items()}


def _blended(a: Tensor, b: Tensor, found: Similarities, less: float) -> Tensor:
    """lerp(B, A, k), k = (similarity − low) / (high − low) − less, from 0 to 1."""
    import torch

    columns = torch.as_tensor(found.columns, device=a.device).reshape(a.shape[1:])
    # Where all are equally alike there is no order among them: they count as the most alike.
    spread = found.high - found.low
    share = (columns - found.low) / spread if spread else torch.where(columns.isnan(), columns, 1.0)
    return torch.lerp(b, a, share.sub(less).clamp_(0, 1).to(a.dtype))


@merge_method(
    Grain.ROWS, looks=(Look(_column_sums, _normalised, _added_up, _over_all_tensors),), copies=6
)  # fmt: skip
def cosine_a(a: Tensor, b: Tensor, /, *, alpha: float = 0.5, found: Similarities) -> Tensor:
    """k·A + (1−k)·B, k = clamp((s − min s) / (max s − min s) − |α|, 0, 1), s by column: A's structure, B's details.

    s: half the cosine of A's and B's columns (all of axis 0, for each place in the others), half that of the whole
    tensors of columns of length 1. Its least and greatest are those of the cosines of all columns of all merged
    tensors, without the outermost hundredths: a pass more. At alpha 1 all but the most alike is B's.
    Source: supermerger (cosineA), which is the same where it keeps the VAE out, as the command does. sd-mecha's
    add_cosine_a has no limits and no other tensors: k = clamp(cosine − α, 0, 1), of columns alone.
    """
    return _blended(a, b, found, abs(alpha))


@merge_method(
    Grain.ROWS, looks=(Look(_column_sums, _combined, _added_up, _over_all_tensors),), copies=6
)  # fmt: skip
def cosine_b(a: Tensor, b: Tensor, /, *, alpha: float = 0.5, found: Similarities) -> Tensor:
    """k·A + (1−k)·B, k = clamp((s − min s) / (max s − min s) − α, 0, 1), s by column: B's structure, A's details.

    s: half the cosine of A's and B's columns (all of axis 0, for each place in the others), half that of the whole
    tensors. Its least and greatest are those of all columns of all merged tensors, without the outermost hundredths: a
    pass more. At alpha 1 all but the most alike is B's.
    Source: supermerger (cosineB), which is the same where it keeps the VAE out, as the command does. sd-mecha's
    add_cosine_b has no limits and no other tensors: k = clamp(s − α, 0, 1).
    """
    return _blended(a, b, found, alpha)


# ------------------------------------------------------------------------------------------------ by row


def _inner_of_a_line(a: Tensor, b: Tensor, *, found: None, **_parameters: Any) -> tuple[float, float, float] | None:
    """Of a tensor with one axis, whose parts are not its rows."""
    if a.ndim > 1:
        return None
    a, b = a.double(), b.double()
    return float(a @ a), float(a @ b), float(b @ b)


def _cosine_of_a_line(
    values: Sequence[tuple[float, float, float] | None], found: None, **_parameters: Any
) -> float | None:
    seen = [v for v in values if v is not None]
    if not seen:
        return None
    aa, ab, bb = (math.fsum(column) for column in zip(*seen, strict=True))
    lengths = math.sqrt(aa) * math.sqrt(bb)
    return max(-1.0, min(ab / lengths, 1.0)) if lengths else 0.0


# double: a small power of a cosine near −1 would show float32's last bit.
@merge_method(
    Grain.ROWS, looks=(Look(_inner_of_a_line, _cosine_of_a_line),), double=True, copies=2,
    refuse=within("extract_features", alpha=(0, 1), beta=(0, 1), gamma=(0, math.inf)),
)  # fmt: skip
def extract_features(
    a: Delta, b: Delta, /, *, alpha: float = 0.5, beta: float = 0.0, gamma: float = 1.0, found: float | None
) -> Delta:
    """lerp(A, B, α)·lerp(d, 1−d, β), d = ((cos(A, B) + 1) / 2)^gamma along the last axis: what two differences share.

    alpha: from A's features at 0 to B's at 1. beta: 0 keeps what they share, 1 what they do not. gamma: above 1, only
    what is very much alike counts as shared; below, all but the very unlike.
    The last axis is a row of a matrix, and a row of the kernel in a convolution.
    Source: supermerger (extract), which is the same; its own gamma begins at 0.3.
    """
    import torch

    if found is None:
        lengths = torch.linalg.vector_norm(a, dim=-1).mul_(torch.linalg.vector_norm(b, dim=-1))
        cosine = (a * b).sum(-1).div_(lengths).masked_fill_(lengths == 0, 0.0).clamp_(-1, 1).unsqueeze(-1)
    else:
        cosine = torch.full((1,), found, dtype=a.dtype, device=a.device)
    shared = cosine.add_(1).div_(2).pow_(gamma)
    shared = torch.lerp(shared, 1 - shared, beta)
    return torch.lerp(a, b, alpha).mul_(shared)
