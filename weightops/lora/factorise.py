"""The best factors of a given matrix, and what rounding puts into a difference.

Tensors in, tensors out. It knows no file, no name and no family.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from weightops.errors import ValueRefused
from weightops.lora.lowrank import CHUNK, Factorised, LowRank, bands, gram_of, report, wide
from weightops.lora.rank import RankRule

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

# The error of a randomised factorisation over the smallest possible one, less one.
TOLERANCE = 0.005
# What the estimate may take up of it after one, two, three and more iterations. On power laws it is the true excess,
# give or take a third, after three. On plateaus and nearly flat spectra the truth can be five times as much after two
# and three times after three: so measured on thousands of them, of which none then missed the tolerance.
_TRUST = (0.0, 0.2, 0.35, 0.45)

_OVERSAMPLING = 8  # and up to the next multiple of 16, which a matrix product takes no longer for
_ITERATIONS = 12  # after which the exact method takes over
_NARROW = 5  # a matrix with fewer rows or columns than so many subspaces is factorised exactly: that is as fast
_CACHED = 1 << 16  # values that stay in a core's cache
# Below this share of the squared norm the difference of two float32 energies tells too little.
_DOUBLE = 1e-5
_ROUNDING = 1e-13  # of the squared norm: what factors in float32 cannot hold


def factorise(matrix: Tensor, rule: RankRule | int, *, generator: torch.Generator, method: str = "auto") -> Factorised:
    """The best approximation of `matrix` [out, n] that `rule` allows: its error is at most 1.005 times the optimum.

    What factors in float32 cannot hold, 1e-7 of the matrix's norm, comes on top.
    exact: the eigenvectors of the smaller Gram matrix, in float64. They tell singular values above 1e-8 of the
    largest, which is finer than a float32 SVD does; a float64 matrix takes the SVD itself. randomised: subspace
    iteration, `_subspace`. auto: randomised where the matrix is wide and tall enough for it to be faster, and the rule
    has a largest rank and does not need all singular values; exact otherwise, and where it does not converge.

    Singular values below what float32 tells from zero beside the largest count as zero. Signs and the split are those
    of `truncate`. Takes what `factorise_nbytes` says. generator: on the CPU.
    Source: Eckart & Young 1936 (the optimum); Halko, Martinsson & Tropp 2011. Raises ValueRefused for NaN and Inf.
    """
    return _factorise(matrix[None], rule, [generator], method)[0]


def factorise_many(
    matrices: Sequence[Tensor], rule: RankRule | int, *, generators: Sequence[torch.Generator], method: str = "auto"
) -> list[Factorised]:
    """`factorise` of each; matrices of one shape on a CUDA device are done together, until the last has converged.

    The bytes then depend on which matrices were handed in together: group them by their shapes, not by the memory.
    """
    import torch

    together = len({(m.shape, m.dtype, m.device) for m in matrices}) == 1 and matrices[0].is_cuda
    if together:
        return _factorise(torch.stack(list(matrices)), rule, generators, method)
    pairs = zip(matrices, generators, strict=True)
    return [factorise(m, rule, generator=g, method=method) for m, g in pairs]


def factorise_nbytes(out: int, n: int, rule: RankRule | int, *, double: bool = False) -> int:
    """The bytes that `factorise` takes at most beside a matrix [out, n] in float32, or in float64 (`double`)."""
    rule = RankRule("rank", rule) if isinstance(rule, int) else rule
    width = min(rule.most(out, n) + _OVERSAMPLING + 16, out, n)
    least = min(out, n)
    banded = 16 * CHUNK
    # What is decomposed whole in float64: a copy, the vectors of both sides, and room to work.
    whole = 8 * (2 * out * n + 4 * least * least) if double else 0
    if rule.needs_all or _NARROW * width > least:
        return max(whole, banded + 8 * (4 * least * least + 2 * width * (out + n)))
    # In float64, where it comes to that: Q, its image, the residual and what QR makes of them; and the factors.
    return max(whole, banded + 8 * 5 * width * (out + n))


def spectrum(matrix: Tensor) -> tuple[list[float], float]:
    """All singular values of a matrix, largest first, and the sum of their squares; as exact as `factorise`'s own.

    Raises ValueRefused for NaN and Inf.
    """
    import torch

    work = wide(matrix)
    energy = float(_energy(work[None])[0])
    if not math.isfinite(energy):
        raise ValueRefused("", "the matrix holds NaN or Inf")
    work = work if work.shape[0] >= work.shape[1] else work.mT
    if work.dtype is torch.float64:
        values = torch.linalg.svdvals(work)
    else:
        values = torch.linalg.eigvalsh(gram_of(work[None], CHUNK)[0]).clamp_min(0).sqrt().flip(-1)
    return values.where(values > _zero(work, values), 0).tolist(), energy


def _zero(matrix: Tensor, values: Tensor) -> float:
    """Singular values up to this are not told from zero."""
    import torch

    precise = matrix.dtype is torch.float64
    return torch.finfo(matrix.dtype).eps * (max(matrix.shape) if precise else 1) * max(values.tolist(), default=0.0)


class _Found(NamedTuple):
    """Of a stack of matrices: singular values, unit right vectors [b, n, l], and stack @ right where it is known."""

    values: Tensor
    right: Tensor
    image: Tensor | None
    method: str
    iterations: int


def _factorise(
    stack: Tensor, rule: RankRule | int, generators: Sequence[torch.Generator], method: str
) -> list[Factorised]:
    """Of a stack [b, out, n] of matrices."""
    import torch

    rule = RankRule("rank", rule) if isinstance(rule, int) else rule
    work = wide(stack)
    _, out, n = work.shape
    energy = _energy(work)
    if not bool(energy.isfinite().all()):
        raise ValueRefused("", "the matrix holds NaN or Inf")
    most = rule.most(out, n)
    width = min(-(-(most + _OVERSAMPLING) // 16) * 16, out, n)
    # Few rows and many columns: it is on the rows' side that most is done beside the products.
    turned = work if out <= n else work.mT
    found = None
    if method == "randomised" or (method == "auto" and not rule.needs_all and _NARROW * width <= min(out, n)):
        start = torch.stack([torch.randn(max(out, n), width, generator=g) for g in generators])
        found = _subspace(turned, start.to(work), most, energy)
    if found is None:
        turned = turned.mT
        found = _exact(turned)
    flipped = (out > n) == (found.method == "randomised")
    return [_finish(m, found, i, rule, float(energy[i]), flipped) for i, m in enumerate(turned)]


def _finish(matrix: Tensor, found: _Found, number: int, rule: RankRule, energy: float, flipped: bool) -> Factorised:
    """The factors of one matrix of the stack, or of its transpose where it is `flipped`."""
    values = found.values[number]
    values = values.where(values > _zero(matrix, values), 0)
    rank = rule.choose(values.tolist(), matrix.shape[0], matrix.shape[1], energy)
    right = found.right[number][:, :rank]
    image = _times(matrix[None], right[None])[0] if found.image is None else found.image[number][:, :rank]
    half = values[:rank].sqrt().to(image.dtype)
    best = LowRank((image / half).to(matrix.dtype), (half[:, None] * right.mT).to(matrix.dtype))
    lost = max(energy - float(values[:rank].square().sum()), 0.0)
    best = best.transpose() if flipped else best
    return report(best, values[:rank].tolist(), lost, found.method, found.iterations)


def _energy(stack: Tensor) -> Tensor:
    """The squared Frobenius norms [b], in float64."""
    total = stack.new_zeros(len(stack)).double()
    for _, band in bands(stack, _CACHED):
        total += band.square().sum((1, 2))
    return total


def _times(stack: Tensor, right: Tensor) -> Tensor:
    """stack @ right [b, m, l]; in float64 where `right` is, without a float64 copy of the stack."""
    import torch

    if stack.dtype == right.dtype:
        return stack @ right
    return torch.cat([band @ right for _, band in bands(stack, CHUNK)], 1)


def _transposed_times(stack: Tensor, left: Tensor) -> Tensor:
    """stackᵀ @ left [b, n, l], alike."""
    if stack.dtype == left.dtype:
        return (left.mT @ stack).mT
    total = left.new_zeros(stack.shape[0], stack.shape[2], left.shape[2])
    for rows, band in bands(stack, CHUNK):
        total += band.mT @ left[:, rows]
    return total


def _exact(stack: Tensor) -> _Found:
    """All singular values and right vectors of a stack [b, m, n] with m ≥ n."""
    import torch

    if stack.dtype is torch.float64:
        _, values, right = torch.linalg.svd(stack, full_matrices=False)
        return _Found(values, right.mT, None, "exact", 0)
    squares, vectors = torch.linalg.eigh(gram_of(stack, CHUNK))
    return _Found(squares.clamp_min(0).sqrt().flip(-1), vectors.flip(-1), None, "exact", 0)


def _subspace(stack: Tensor, start: Tensor, k: int, energy: Tensor, spent: int = 0) -> _Found | None:
    """Randomised subspace iteration until the best k are within TOLERANCE; None where that takes too long.

    Each iteration, Q → M Mᵀ Q, takes two products; between them the Ritz vectors of Q and their residual bound the
    energy of the best rank k from above, `_most_energy`; what the second product keeps of it is known, and is the
    answer. Half the smallest Ritz value is subtracted from M Mᵀ: it doubles the rate at which the directions that
    decide are told apart, and costs nothing.
    Products are in float32; what is summed and decomposed, in float64. Where so little is lost that the difference
    of two energies cannot tell it, it goes on in float64, a band of the matrix at a time.

    Source: Halko, Martinsson & Tropp 2011, arXiv:0909.4061, algorithm 4.4; Musco & Musco 2015, arXiv:1504.05477 (what
    iterations gain without a gap); Feng, Yu, Xie & Tang 2024, arXiv:2404.09276 (the shift).
    """
    import torch

    q = torch.linalg.qr(_times(stack, start)).Q
    for iteration in range(spent + 1, spent + _ITERATIONS + 1):
        basis, core = torch.linalg.qr(_transposed_times(stack, q))
        ritz, vectors = torch.linalg.eigh(_gram(core.mT))  # the values of M Mᵀ, largest last
        right, inside = basis @ vectors.to(q), q @ (core.mT @ vectors.to(q))
        image = _times(stack, right)  # of which Q holds what is inside
        squares, turn = torch.linalg.eigh(_gram(image))
        best = squares.shape[-1] - k
        lost = energy - squares[..., best:].sum(-1)
        if q.dtype is torch.float32 and bool((lost < _DOUBLE * energy).any()):
            return _subspace(stack, right.double(), k, energy, iteration)
        done = lost <= _ROUNDING * energy
        trust = _TRUST[min(iteration, len(_TRUST)) - 1]
        if trust:
            least = energy - _most_energy(ritz, image - inside, k)
            done |= lost <= (1 + trust * TOLERANCE) ** 2 * least
        if bool(done.all()):
            turn = turn[..., best:].flip(-1).to(q)
            values = squares[..., best:].flip(-1).clamp_min(0).sqrt()
            return _Found(values, right @ turn, image @ turn, "randomised", iteration)
        shift = ritz[..., :1] / (2 * ritz).clamp_min(1e-300)
        q = torch.linalg.qr(image - inside * shift.clamp(0, 0.5).to(q)[..., None, :]).Q
    return None


def _gram(columns: Tensor) -> Tensor:
    """columnsᵀ columns in float64."""
    columns = columns.double()
    return columns.mT @ columns


def _most_energy(ritz: Tensor, residual: Tensor, k: int) -> Tensor:
    """An upper bound [b] of the energy of the best rank k, from a subspace's Ritz values (of M Mᵀ) and their residual.

    In a basis of Q's Ritz vectors and its complement M Mᵀ is [[S², Gᵀ], [G, K]], and G = residual · S, for
    residual = (I − QQᵀ) M V. If no eigenvalue of K exceeds κ, those of M Mᵀ do not exceed those of [[S², Gᵀ], [G, κI]],
    of which only 2 l are not κ. κ is the Ritz value halfway between k + 1 and the last: from a random start, nothing
    larger is left outside for long, and by how much that errs was measured (`_TRUST`).
    Source: Loewner's order and Courant & Fischer; Halko, Martinsson & Tropp 2011, section 4.4 (residuals as measures).
    """
    import torch

    width = ritz.shape[-1]
    ritz = ritz.clamp_min(0)
    root = ritz.sqrt()
    squares, vectors = torch.linalg.eigh(root[..., :, None] * _gram(residual) * root[..., None, :])
    coupling = squares.clamp_min(0).sqrt()[..., None] * vectors.mT
    outside = ritz[..., [(width - k - 1) // 2]] if k < width else torch.zeros_like(ritz[..., :1])
    top = torch.cat([torch.diag_embed(ritz), coupling.mT], -1)
    bottom = torch.cat([coupling, torch.diag_embed(outside.expand_as(ritz))], -1)
    most: Tensor = torch.linalg.eigvalsh(torch.cat([top, bottom], -2))[..., 2 * width - k :].sum(-1)
    return most


# ------------------------------------------------------------------------------------------------ rounding


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """What rounding alone puts into a difference: its expected Frobenius norm and largest singular value."""

    norm: float
    largest: float

    def above(self, singular_values: Sequence[float]) -> int:
        """How many singular values stand above the noise: from this index on they are of the size of rounding."""
        return sum(1 for v in singular_values if v > self.largest)


def noise_floor(*stored: Tensor, rows: int | None = None) -> NoiseFloor:
    """The rounding noise that a difference [out, n] inherits from the dtypes in which these matrices are stored.

    Each value is taken to be off by an error uniform within half a unit of its last place (variance ulp²/12). Of a
    model that began as the stored values of another, and hardly moved, that is more than there is. The largest
    singular value of such noise is at most √(largest sum of variances of a row) + √(that of a column), nearly; for
    equal variances that is (√out + √n) √variance, and is attained. rows: estimated from about so many of them.
    Source: Marchenko & Pastur 1967, Bai & Yin 1993 (the edge); Bandeira & van Handel 2016, arXiv:1408.6185 (unequal).
    """
    import torch

    out, n = stored[0].shape
    step = max(1, out // rows) if rows else 1
    variance = torch.zeros(-(-out // step), n, device=stored[0].device)
    for matrix in stored:
        info = torch.finfo(matrix.dtype)
        # Below the smallest normal number the unit stays what it is there. frexp's mantissa is in [0.5, 1).
        magnitude = matrix[::step].float().abs().clamp_min(info.tiny)
        ulp = magnitude / torch.frexp(magnitude).mantissa * (info.eps / 2)
        variance += ulp.square() / 12
    share = out / max(len(variance), 1)
    of_rows, of_columns = variance.double().sum(1), variance.double().sum(0) * share
    largest = math.sqrt(float(of_rows.max())) + math.sqrt(float(of_columns.max()))
    return NoiseFloor(math.sqrt(float(of_rows.sum()) * share), largest)
