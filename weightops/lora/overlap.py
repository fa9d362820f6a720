"""How low-rank changes of one weight meet: their angles, where their signs differ, how strongly each still acts.

Numbers only; ΔW is never built, but for signs, and then a band of it at a time.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from weightops.lora.lowrank import CHUNK, LowRank, inner, wide

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# Singular values below this, of the largest, are no ranks: of factors in float32 or less, and in float64.
_NO_RANK = 1e-6
_NO_RANK_DOUBLE = 1e-12
# Of the product of the factors' norms, squared: what the squared norm of factors that cancel may be off by.
_ROUNDING = 1e-14


class SignConflicts(NamedTuple):
    """Of the entries in which both changes are non-zero, the share that are of opposite signs.

    weighted: the same, each entry counted by the smaller of the two magnitudes: the share of what they have in common
    that cancels rather than adds.
    """

    share: float
    weighted: float


def gram(parts: Sequence[LowRank]) -> list[list[float]]:
    """<Δi, Δj> of every two of changes of one shape. The square of a change whose factors cancel is zero."""
    rows = [[0.0] * len(parts) for _ in parts]
    for i, a in enumerate(parts):
        rows[i][i] = _square(a)
        for j, b in enumerate(parts[:i]):
            rows[i][j] = rows[j][i] = inner(a, b)
    return rows


def cosine(a: LowRank, b: LowRank) -> float:
    """<ΔA, ΔB> / (‖ΔA‖ ‖ΔB‖), in -1..1; 0 where one of the two is zero."""
    (aa, ab), (_, bb) = gram([a, b])
    return max(-1.0, min(ab / math.sqrt(aa) / math.sqrt(bb), 1.0)) if aa > 0 and bb > 0 else 0.0


def predicted_strengths(parts: Sequence[LowRank]) -> tuple[float, ...]:
    """Of each change, <ΣΔ, Δi> / ‖Δi‖²: at 1 it acts in the sum as strongly as alone, at 0 not at all, below against.

    A change that is zero acts as alone: 1.
    """
    return tuple(math.fsum(row) / row[i] if row[i] > 0 else 1.0 for i, row in enumerate(gram(parts)))


def _square(a: LowRank) -> float:
    """‖ΔA‖², zero where it is no more than rounding."""
    import torch

    found = inner(a, a)
    factors = [float(torch.linalg.vector_norm(f, dtype=torch.float64)) for f in (a.up, a.down)]
    return found if found > _ROUNDING * (factors[0] * factors[1]) ** 2 else 0.0


def principal_angles(a: LowRank, b: LowRank) -> tuple[float, ...]:
    """The angles between the column spaces of ΔA and ΔB, in radians, smallest first; as many as the smaller rank.

    Of the products, not of `up` alone: ranks that `down` lacks are not there. An angle's cosine tells it to 1e-8 at
    best where it is small, its sine where it is large: each is taken where it tells more.
    Takes float64 copies of one change's factors at a time, and orthonormal bases like both `up`.
    Source: Björck & Golub 1973; Knyazev & Argentati 2002, algorithm 3.1.
    """
    import torch

    if a.shape[0] != b.shape[0]:
        raise ValueError(f"columns of {a.shape[0]} and of {b.shape[0]} rows")
    many, few = sorted((_column_space(a), _column_space(b)), key=lambda basis: -basis.shape[1])
    shared = many.mT @ few
    cosines = torch.linalg.svdvals(shared).clamp(0, 1)
    sines = torch.linalg.svdvals(few - many @ shared).clamp(0, 1).flip(0)
    angles = torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())
    return tuple(angles.tolist())


def _column_space(a: LowRank) -> Tensor:
    """An orthonormal basis [out, rank] of ΔA's columns, in float64; of the numerical rank."""
    import torch

    basis, left = torch.linalg.qr(a.up.double())
    right = torch.linalg.qr(a.down.mT.double(), mode="r").R
    vectors, values, _ = torch.linalg.svd(left @ right.mT, full_matrices=False)
    least = _NO_RANK_DOUBLE if torch.float64 in (a.up.dtype, a.down.dtype) else _NO_RANK
    sizes = values.tolist()
    # Not beside the largest alone: of factors that cancel, it is rounding itself.
    limit = max(least * max(sizes, default=0.0), 1e-15 * len(sizes) * float(left.norm() * right.norm()))
    found: Tensor = basis @ vectors[:, : sum(1 for v in sizes if v > limit)]
    return found


def sign_conflicts(a: LowRank, b: LowRank, rows: Sequence[int] | None = None) -> SignConflicts:
    """How often these rows of ΔA and ΔB (None: all) are of opposite signs; zeros where they have nothing in common.

    In float32, or float64 where the factors are; a band of rows at a time.
    """
    import torch

    if a.shape != b.shape:
        raise ValueError(f"changes of 2 shapes: {sorted({a.shape, b.shape})}")
    out, n = a.shape
    wanted = torch.arange(out, device=a.up.device) if rows is None else torch.tensor(rows, device=a.up.device)
    downs = [wide(change.down) for change in (a, b)]
    both = against = 0
    common = lost = 0.0
    for band in torch.split(wanted.long(), max(1, CHUNK // max(1, n))):
        x, y = (wide(change.up[band]) @ down for change, down in zip((a, b), downs, strict=True))
        smaller = torch.minimum(x.abs(), y.abs())
        opposite = x.signbit() != y.signbit()
        both += int(smaller.count_nonzero())
        common += float(smaller.sum(dtype=torch.float64))
        smaller *= opposite
        against += int(smaller.count_nonzero())
        lost += float(smaller.sum(dtype=torch.float64))
    return SignConflicts(against / both if both else 0.0, lost / common if common else 0.0)
