"""One of the many pairs of factors that make the same ΔW: balanced, and turned towards a reference. Pure tensors.

ΔW = BA is the same for (BG, G⁻¹A), whatever the invertible G, so that rows of factors are comparable only once G is
chosen alike for all. The singular value decomposition with √S on both sides leaves a rotation (and signs) free; the
orthogonal Procrustes problem against one reference that all share decides it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from weightops.synthesis.layout import Factors

# Of the largest singular value: what float64 leaves of a rank that is not there.
_NOTHING = 1e-13


def balanced(factors: Factors) -> list[tuple[Tensor, Tensor]]:
    """U√S and √SVᵀ of each ΔW = USVᵀ, in float64, as wide as the factors: ranks that are not there are zero.

    up [..., out, r], down [..., r, n]; ΔW itself is never built.
    Source: QR of both factors, and the SVD of the r×r core.
    """
    return [_balanced(up.double(), down.double()) for up, down in factors]


def _balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    rank = up.shape[-1]
    left, first = torch.linalg.qr(up)  # [..., out, p], [..., p, r], p = min(out, r)
    right, second = torch.linalg.qr(down.mT)
    u, values, v = torch.linalg.svd(first @ second.mT, full_matrices=False)
    values = torch.where(values > _NOTHING * values[..., :1], values, 0)
    half = values.sqrt()
    made = (left @ u) * half[..., None, :], half[..., None] * (v @ right.mT)
    lacking = rank - half.shape[-1]  # where the rank exceeds a side of the matrix
    if not lacking:
        return made
    pad = torch.nn.functional.pad
    return pad(made[0], (0, lacking)), pad(made[1], (0, 0, 0, lacking))


def aligned(factors: Factors, reference: Factors) -> list[tuple[Tensor, Tensor]]:
    """Balanced factors [..., r] turned towards the reference's: (BQ, QᵀA) with Q orthogonal, ΔW as it was.

    Q makes ‖BQ − B₀‖² + ‖QᵀA − A₀‖² least, which is the polar factor of BᵀB₀ + AA₀ᵀ. Whatever rotation the balance
    left free within equal singular values goes into Q, so that the result is the same; a direction in which the LoRA
    and the reference have nothing in common stays free.
    Source: Schönemann 1966, A generalized solution of the orthogonal Procrustes problem.
    """
    import torch

    found = []
    for (up, down), (first, second) in zip(factors, reference, strict=True):
        u, _, v = torch.linalg.svd(up.mT @ first.to(up.dtype) + down @ second.to(down.dtype).mT)
        turn = u @ v
        found.append((up @ turn, turn.mT @ down))
    return found


def delta_gram(a: Factors, b: Factors) -> Tensor:
    """⟨ΔWᵢ, ΔWⱼ⟩ over all modules [na, nb], in float64: Σ tr((BⱼᵀBᵢ)(AᵢAⱼᵀ)), so that no ΔW is built.

    a, b: factors with one leading axis, of as many members.
    """
    import torch

    total: Tensor | None = None
    for (up, down), (other_up, other_down) in zip(a, b, strict=True):
        na, out, r = up.shape
        nb, _, s = other_up.shape
        lefts = up.double().mT.reshape(na * r, out) @ other_up.double().permute(1, 0, 2).reshape(out, nb * s)
        rights = down.double().reshape(na * r, -1) @ other_down.double().reshape(nb * s, -1).mT
        found = torch.einsum("irjs,irjs->ij", lefts.view(na, r, nb, s), rights.view(na, r, nb, s))
        total = found if total is None else total + found
    assert total is not None
    return total


def delta_norms(factors: Factors) -> Tensor:
    """‖ΔW‖ over all modules [...], in float64."""
    import torch

    total: Tensor | None = None
    for up, down in factors:
        left, right = up.double().mT @ up.double(), down.double() @ down.double().mT
        found = torch.einsum("...rs,...rs->...", left, right)
        total = found if total is None else total + found
    assert total is not None
    return total.clamp_min(0).sqrt()
