"""Weights as matrices [out, in·kernel], each of them whole: their best approximations of low rank, their rotations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weightops.errors import MismatchError, UsageError
from weightops.merging.method import merge_method
from weightops.plan import Grain

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from torch import Tensor

    from weightops.merging.method import Delta, Either

_HALF_ROUND = 1e-4  # the sine of an angle so near to half a round that rounding would decide which way it is gone

# ------------------------------------------------------------------------------------------------ low rank


def _refuse_rank(_count: int, parameters: Mapping[str, Any]) -> None:
    rank = parameters["rank"]
    if rank <= 0 or (rank > 1 and rank != int(rank)):
        expected = "expected a whole number of 1 or more, or a share of the full rank between 0 and 1"
        raise UsageError("truncate_rank, rank", f"found {rank:g}, {expected}")


@merge_method(Grain.TENSOR, copies=6, refuse=_refuse_rank)
def truncate_rank(delta: Delta, /, *, rank: float = 8.0) -> Delta:
    """The best approximation of δ, as a matrix [out, in·kernel], whose rank is `rank`, or that share of the full rank.

    A number below 1 is a share, of which at least 1 is kept. Tensors of one axis, and those whose rank is not above it,
    stay as they are. From the eigenvectors of the smaller of δδᵀ and δᵀδ, in float64, so that it is exact to float32's
    last digits; on one CPU core that is 1 s for 1280 inputs or outputs, whichever are fewer, and 8 s for 2560.
    Source: Eckart and Young 1936. sd-mecha's is found by random vectors and two iterations, unless told otherwise.
    """
    import torch

    if delta.ndim < 2 or not delta.numel():
        return delta.clone()
    matrix = delta.flatten(1)
    full = min(matrix.shape)
    kept = max(1, round(rank * full)) if rank < 1 else int(rank)
    if kept >= full:
        return delta.clone()
    if not bool(torch.isfinite(matrix).all()):
        return torch.full_like(delta, math.nan)
    wide = matrix if len(matrix) == full else matrix.T
    inner = torch.zeros(full, full, dtype=torch.float64, device=delta.device)
    # Squares of numbers under 1e-154 are zero: divided by the largest they are not.
    scale = float(matrix.abs().max()) or 1.0
    bands = [slice(start, start + full) for start in range(0, wide.shape[1], full)]
    for band in bands:
        part = wide[:, band].double() / scale
        inner.addmm_(part, part.T)
    basis = torch.linalg.eigh(inner).eigenvectors[:, full - kept :]
    del inner
    result = torch.empty_like(wide)
    for band in bands:
        result[:, band] = basis @ (basis.T @ wide[:, band].double())
    return (result if wide is matrix else result.T).reshape(delta.shape)


# ------------------------------------------------------------------------------------------------ rotations


@merge_method(Grain.TENSOR, copies=20)
def rotate(
    a: Either, b: Either, /, *, alignment: float = 1.0, alpha: float = 0.0, centralization: float = 1.0
) -> Either:
    """(A + α·(B·Qᵀ − A))·Q^alignment, where Q is the rotation of the inputs that brings A nearest to B.

    A and B are matrices [out, in·kernel] less centralization · the mean of their rows; of the means, that is taken
    which lies `alignment` of the way from A's to B's. Q minimises ‖A·Q − B‖; a part of the way, it is the shortest
    rotation, without a reflection. So alignment 0 and alpha 0 are A, 1 and 1 are B. What A and B do not share is turned
    as little as may be. Tensors of one axis are A + α·(B − A).
    It takes a singular value decomposition in float64 of as many rows as there are inputs, or outputs if these are
    fewer, twice as many for a part of the way; and up to twenty copies of the weight. On one CPU core that is 2 s for
    1280 x 1280 and 16 s for 2560 x 2560: models of many such weights want a GPU.
    Source: Schoenemann 1966 (orthogonal Procrustes problem). sd-mecha's rotate takes convolutions as matrices
    [out·in, kernel], keeps Q in float16 for the next merge, and for weights with fewer outputs than inputs adds to A·Q
    what A has outside of B's rows.
    """
    import torch

    if a.ndim < 2 or torch.equal(a, b):
        return torch.lerp(a, b, alpha)
    if alignment == alpha == 0:
        return a.clone()
    if alignment == alpha == 1:
        return b.clone()
    x, y = (m.flatten(1).double() for m in (a, b))
    if not bool((torch.isfinite(x) & torch.isfinite(y)).all()):
        return torch.full_like(a, math.nan)
    mean_x, mean_y = (m.mean(0, keepdim=True) * centralization for m in (x, y))
    x, y = x - mean_x, y - mean_y
    turned = _aligned(x, y) if alignment == 1 else None
    turned = _turned(x, y, alignment, alpha) if turned is None else turned.lerp_(y, alpha)
    return turned.add_(torch.lerp(mean_x, mean_y, alignment)).reshape(a.shape).to(a.dtype)


def _aligned(x: Tensor, y: Tensor) -> Tensor | None:
    """x·Q [m, n] of fewer rows than columns, where the rows of x and y tell all of Q that matters; else None."""
    import torch

    if len(x) >= x.shape[1]:
        return None
    # x = RₓᵀQₓᵀ and y = RᵧᵀQᵧᵀ: between these orthonormal bases of their rows, Q is the rotation that fits Rₓ·Rᵧᵀ.
    left = torch.linalg.qr(x.T, mode="r").R
    basis, right = torch.linalg.qr(y.T)
    u, values, vh = torch.linalg.svd(left @ right.T)
    rotated: Tensor = left.T @ u
    unseen = values <= len(values) * torch.finfo(values.dtype).eps * values[0]
    if torch.linalg.vector_norm(rotated[:, unseen]) > 1e-10 * torch.linalg.vector_norm(rotated):
        return None
    result: Tensor = rotated @ vh @ basis.T
    return result


def _turned(x: Tensor, y: Tensor, alignment: float, alpha: float) -> Tensor:
    """(x + α·(y·Qᵀ − x))·Q^alignment, of which Q moves nothing outside of the span of both models' rows."""
    import torch

    outputs, inputs = x.shape
    basis = torch.linalg.qr(torch.cat((x, y)).T).Q if 2 * outputs < inputs else None
    inside = [x, y] if basis is None else [x @ basis, y @ basis]
    rotation = _rotation(*inside, proper=alignment != round(alignment))
    moved: Tensor = inside[0] @ _power(rotation, alignment)
    if alpha:
        moved.lerp_(inside[1] @ _power(rotation, alignment - 1), alpha)
    # Both models lie in the span, so that nothing is left outside.
    return moved if basis is None else moved @ basis.T


def _rotation(x: Tensor, y: Tensor, *, proper: bool) -> Tensor:
    """Q [n, n], orthogonal, with the least ‖x·Q − y‖, and nearest to 1 where that is open. proper: of determinant 1."""
    import torch

    u, values, vh = torch.linalg.svd(x.T @ y)
    seen = int((values > len(values) * torch.finfo(values.dtype).eps * values[0]).sum())
    rest, rest_h = u[:, seen:], vh[seen:]
    p, _, qh = torch.linalg.svd(rest.T @ rest_h.T)
    rotation: Tensor = u[:, :seen] @ vh[:seen] + rest @ (p @ qh) @ rest_h
    if proper and torch.linalg.slogdet(rotation).sign < 0:
        # Turned back is the direction that matters least.
        last, last_h = (rest @ p[:, -1:], qh[-1:] @ rest_h) if len(rest_h) else (u[:, -1:], vh[-1:])
        rotation -= 2 * last @ last_h
    return rotation


def _power(rotation: Tensor, t: float) -> Tensor:
    """Qᵗ, of an orthogonal Q; for a t that is not whole, of a rotation, in every plane by t of the angle θ.

    Q is cos θ + J·sin θ, where J turns by a right angle; and its power cos tθ + J·sin tθ. Both cos tθ and
    sin tθ / sin θ are functions of cos θ, which is the symmetric part of Q: no complex eigenvectors are needed, and
    none of those that planes of nearly one angle share.
    Raises MismatchError for half a round, in which no plane is the one to turn in.
    """
    import torch

    if t == 0:
        return torch.eye(len(rotation), dtype=rotation.dtype, device=rotation.device)
    if t == 1:
        return rotation
    if t == -1:
        return rotation.T
    cosines, vectors = torch.linalg.eigh((rotation + rotation.T) / 2)
    cosines = cosines.clamp_(-1.0, 1.0)
    sines = ((1 - cosines) * (1 + cosines)).sqrt()
    angles = torch.atan2(sines, cosines)
    near = sines < _HALF_ROUND
    if t != round(t) and bool((near & (cosines < 0)).any()):
        what = "a part of the rotation between the two is half a round, whose parts go either way"
        raise MismatchError("rotate", what, "take an alignment of 0 or 1")
    # The limit at the ends, where t is whole or the angle 0: t·cos((t−1)θ).
    shares = torch.where(near, t * torch.cos((t - 1) * angles), torch.sin(t * angles) / sines)
    straight: Tensor = (vectors * torch.cos(t * angles)) @ vectors.T
    return straight.addmm_((vectors * shares) @ vectors.T, (rotation - rotation.T) / 2)
