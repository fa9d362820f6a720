"""LowRank: a change of a weight as two thin factors; its algebra, its truncation, and the factors of a given matrix.

The one home of low-rank algebra: tensors in, tensors out. It knows no file, no name and no family.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from weightops.errors import ValueRefused
from weightops.lora.rank import RankRule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The error of a randomised factorisation over the smallest possible one, less one.
TOLERANCE = 0.005
# Of the tolerance, what the estimate may take up: over the spectra of the tests, noise and plateaus among them, the
# true excess was at most 1.25 times what was estimated.
_TRUST = 0.7

_OVERSAMPLING = 8  # and up to the next multiple of 16, which a matrix product takes no longer for
_ITERATIONS = 12  # after which the exact method takes over
_NARROW = 4  # a matrix with fewer rows or columns than so many subspaces is factorised exactly: that is faster
_CHUNK = 1 << 20  # values that are held in float64 at a time
# Below this share of the squared norm the difference of two float32 energies tells too little.
_DOUBLE = 1e-5
# float64 Gram matrices square the condition: singular values below this, of the product of the factors' norms, lose
# more than six digits, and QR takes over.
_GRAM_LIMIT = 1e-5


@dataclass(frozen=True, slots=True)
class LowRank:
    """ΔW = up @ down, with up [out, rank] and down [rank, n]; every scale is folded in."""

    up: Tensor
    down: Tensor

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0]:
            raise ValueError(f"factors that do not meet: {list(self.up.shape)}, {list(self.down.shape)}")

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def dense(self) -> Tensor:
        """ΔW itself [out, n], in float32 or better."""
        return _wide(self.up) @ _wide(self.down)

    def scale(self, factor: float) -> LowRank:
        return LowRank(_wide(self.up) * factor, self.down)

    def transpose(self) -> LowRank:
        return LowRank(self.down.mT, self.up.mT)

    def rows(self, rows: slice) -> LowRank:
        """The change of these rows of the weight."""
        return LowRank(self.up[rows], self.down)

    def first(self, rank: int) -> LowRank:
        """The first ranks: of a truncation or factorisation, its best approximation of that rank."""
        return LowRank(self.up[:, :rank], self.down[:rank])


@dataclass(frozen=True, slots=True)
class Factorised:
    """A best approximation and what it keeps.

    singular_values: those kept, largest first. energy: the share of the squared Frobenius norm that is kept. error:
    the Frobenius norm of what is lost, over `norm`, that of the whole. method: exact, randomised, gram or qr.
    """

    lowrank: LowRank
    singular_values: tuple[float, ...]
    energy: float
    error: float
    norm: float
    method: str
    iterations: int = 0


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 where it is that already."""
    import torch

    return tensor if tensor.dtype is torch.float64 else tensor.float()


# ------------------------------------------------------------------------------------------------ algebra of factors


def add(*parts: LowRank) -> LowRank:
    """The sum of changes, exactly: factors side by side, ranks added."""
    import torch

    if len({p.shape for p in parts}) != 1:
        raise ValueError(f"changes of {len(parts)} shapes: {sorted({p.shape for p in parts})}")
    return LowRank(torch.cat([_wide(p.up) for p in parts], 1), torch.cat([_wide(p.down) for p in parts], 0))


def inner(a: LowRank, b: LowRank) -> float:
    """<ΔA, ΔB>, the Frobenius inner product: Σ (upAᵀ upB) ∘ (downA downBᵀ), in float64. ΔW is never built."""
    left = a.up.double().mT @ b.up.double()
    return float((left * (a.down.double() @ b.down.double().mT)).sum())


def norm(a: LowRank) -> float:
    """‖ΔA‖, the Frobenius norm. Where factors cancel, right to 1e-8 of the product of their norms."""
    return math.sqrt(max(inner(a, a), 0.0))


# ------------------------------------------------------------------------------------------------ truncation


class _Core(NamedTuple):
    """The singular value decomposition of u @ d: unit vectors u' @ left and right @ d', for bases u' and d'."""

    values: Tensor
    left_basis: Tensor
    left: Tensor
    right: Tensor
    right_basis: Tensor
    method: str


def singular_values(lowrank: LowRank) -> tuple[float, ...]:
    """All singular values of ΔW, largest first, min(out, rank, n) of them; those that rounding made are zero."""
    up, down = _thin(lowrank)
    return tuple(_decompose(up, down, up.shape[1]).values.tolist())


def truncate(lowrank: LowRank, rule: RankRule | int) -> Factorised:
    """The best approximation of `up @ down` that `rule` allows, in the Frobenius norm; ΔW is never built.

    Singular values are split evenly (their square roots) between up and down; of each row of down, the entry of the
    largest magnitude is positive. A rule that asks for more than there is keeps what there is.

    In float64. The eigenvectors of the factors' Gram matrices are 2 to 5 times as fast as QR of both factors and
    the SVD of the core; they square the condition, so that QR takes over where a value that is kept lies below
    1e-5 ‖up‖‖down‖: factors that nearly cancel, or that have fewer ranks than it seems.
    Source: Eckart & Young 1936 (optimality); QR recompression of a factored matrix.
    """
    rule = RankRule("rank", rule) if isinstance(rule, int) else rule
    up, down = _thin(lowrank)
    out, n = lowrank.shape
    core = _decompose(up, down, 0)
    energy = float(core.values.square().sum())
    rank = rule.choose(core.values.tolist(), out, n, energy)
    trusted = _decompose(up, down, rank)
    if trusted.method != core.method:
        core, energy = trusted, float(trusted.values.square().sum())
        rank = rule.choose(core.values.tolist(), out, n, energy)
    half = core.values[:rank].sqrt()
    left = core.left_basis @ (core.left[:, :rank] * half)
    right = (half[:, None] * core.right[:rank]) @ core.right_basis
    return _report(left, right, core.values, rank, energy, lowrank.up.dtype, core.method)
