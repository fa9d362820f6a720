"""How low-rank changes of one weight meet: their angles, where their signs differ, how strongly each still acts.

Numbers only; ΔW is never built, but for signs, and then a band of it at a time.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from weightops.lora.lowrank import CHUNK, LowRank, add, gram_of, wide

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# Singular values below this, of the largest, are no directions: Gram matrices square it.
_NO_RANK = 1e-4
# Of the product of the factors' norms, squared: what the squared norm of factors that cancel may be off by.
_ROUNDING = 1e-14


class SignConflicts(NamedTuple):
    """Of the entries in which both changes are non-zero, the share that are of opposite signs.

    weighted: the same, each entry counted by the smaller of the two magnitudes: the share of what they have in common
    that cancels rather than adds.
    """

    share: float
    weighted: float


class Meeting(NamedTuple):
    """Changes of one shape: the inner products of every two, and the angles between the column spaces of a < b.

    angles: in radians, smallest first, as many as the smaller rank has.
    """

    gram: list[list[float]]
    angles: dict[tuple[int, int], tuple[float, ...]]


def gram(parts: Sequence[LowRank]) -> list[list[float]]:
    """<Δi, Δj> of every two of changes of one shape. The square of a change whose factors cancel is zero."""
    left, right = _grams(parts)
    return _inner(parts, left, right)


def meeting(parts: Sequence[LowRank]) -> Meeting:
    """How changes of one shape lie to each other, from the Gram matrices of all their factors; ΔW is never built.

    The column spaces are those of the products, not of `up` alone, without what is below 1e-4 of their largest singular
    value. Angles are right to about 1e-6.
    Source: Björck & Golub 1973 (cosines as singular values).
    """
    import torch

    left, right = _grams(parts)
    ends = list(itertools.accumulate(part.rank for part in parts))
    own = [slice(end - part.rank, end) for part, end in zip(parts, ends, strict=True)]
    spaces = [_column_space(left[at, at], right[at, at]) for at in own]
    angles = {}
    for i, j in itertools.combinations(range(len(parts)), 2):
        cosines = torch.linalg.svdvals(spaces[i].mT @ left[own[i], own[j]] @ spaces[j]).clamp(0, 1)
        angles[i, j] = tuple(cosines.acos().tolist())
    return Meeting(_inner(parts, left, right), angles)


def _grams(parts: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """All columns of `up`, and all rows of `down`, with each other, in float64."""
    whole = add(*parts)
    return tuple(gram_of(factor[None], CHUNK // 4)[0] for factor in (whole.up, whole.down.mT))  # type: ignore[return-value]


def _inner(parts: Sequence[LowRank], left: Tensor, right: Tensor) -> list[list[float]]:
    ends = list(itertools.accumulate(part.rank for part in parts))
    own = [slice(end - part.rank, end) for part, end in zip(parts, ends, strict=True)]
    found = [[0.0] * len(parts) for _ in parts]
    there: list[tuple[int, slice]] = []
    for i, a in enumerate(own):
        square = float((left[a, a] * right[a, a]).sum())
        if square <= _ROUNDING * float(left[a, a].trace() * right[a, a].trace()):
            continue
        found[i][i] = square
        for j, b in there:
            found[i][j] = found[j][i] = float((left[a, b] * right[a, b]).sum())
        there.append((i, a))
    return found


def _column_space(left: Tensor, right: Tensor) -> Tensor:
    """By which `up` is multiplied to have an orthonormal basis of ΔW's columns: [rank, numerical rank]."""
    import torch

    weights, vectors = torch.linalg.eigh(right)
    root = vectors * weights.clamp_min(0).sqrt()
    squares, turned = torch.linalg.eigh(root.mT @ left @ root)
    largest = max(float(squares[-1]), 0.0) if len(squares) else 0.0
    there = squares > max(_NO_RANK**2 * largest, _ROUNDING * float(left.trace() * right.trace()))
    found: Tensor = root @ turned[:, there] / squares[there].sqrt()
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
