"""LowRank: a change of a weight as two thin factors; its algebra, its truncation, and the factors of a given matrix.

The one home of low-rank algebra: tensors in, tensors out. It knows no file, no name and no family.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from weightops.errors import ValueRefused
from weightops.lora.rank import RankRule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from torch import Tensor

CHUNK = 1 << 20  # values that are held in float64 at a time
_BLOCK = 1 << 18  # as many on a CPU where they are few columns: they stay in its caches
_PANEL = 32  # columns of a Gram matrix that a CPU computes together
# Of the product of the factors' norms: what products in float64 leave of factors that cancel.
_CANCELLED = 1e-14
# float64 Gram matrices square the condition: singular values below this, of the product of the factors' norms, lose
# more than six digits, and QR takes over.
_GRAM_LIMIT = 1e-5


@dataclass(frozen=True, slots=True, eq=False)
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
        return wide(self.up) @ wide(self.down)

    def scale(self, factor: float) -> LowRank:
        return LowRank(wide(self.up) * factor, self.down)

    def transpose(self) -> LowRank:
        return LowRank(self.down.mT, self.up.mT)

    def rows(self, rows: slice) -> LowRank:
        """The change of these rows of the weight."""
        return LowRank(self.up[rows], self.down)


@dataclass(frozen=True, slots=True, eq=False)
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


def wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 where it is that already."""
    import torch

    return tensor if tensor.dtype is torch.float64 else tensor.float()


def report(lowrank: LowRank, values: Sequence[float], lost: float, method: str, iterations: int = 0) -> Factorised:
    """A best approximation, its signs made certain in place, and what it keeps. lost: the squared norm of the rest."""
    import torch

    down = lowrank.down
    parts = torch.split(down, max(1, _size(down) // max(1, down.shape[1])))
    largest = torch.cat([part.gather(1, part.abs().argmax(1, keepdim=True)) for part in parts])
    sign = torch.where(largest < 0, -1.0, 1.0).to(down.dtype)
    lowrank.up.mul_(sign.mT)
    down.mul_(sign)
    kept = sum(v * v for v in values)
    share = kept / (kept + lost) if kept + lost > 0 else 1.0
    error = math.sqrt(lost / (kept + lost)) if kept + lost > 0 else 0.0
    return Factorised(lowrank, tuple(values), share, error, math.sqrt(kept + lost), method, iterations)


# ------------------------------------------------------------------------------------------------ products by bands


def bands(stack: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Bands of rows of a stack [b, m, n], in float64, of about so many values."""
    height = max(1, size // max(1, stack.shape[0] * stack.shape[2]))
    for start in range(0, stack.shape[1], height):
        rows = slice(start, start + height)
        yield rows, wide(stack[:, rows]).double()  # F16 to float64 is several times as slow as by way of float32


def gram_of(stack: Tensor, size: int) -> Tensor:
    """stackᵀ stack [b, n, n] in float64, a band of rows at a time."""
    import torch

    width = stack.shape[2]
    total = stack.new_zeros(len(stack), width, width, dtype=torch.float64)
    # A CPU is kept busy by a few columns, and need not compute what lies below the diagonal.
    step = max(1, width if stack.is_cuda else _PANEL)
    for _, band in bands(stack, size):
        for start in range(0, width, step):
            panel = slice(start, start + step)
            total[:, panel, start:].baddbmm_(band[..., panel].mT, band[..., start:])
    return total.triu_().add_(total.triu(1).mT)


def _gram(stack: Tensor) -> Tensor:
    return gram_of(stack, _size(stack))


def _size(stack: Tensor) -> int:
    return CHUNK if stack.is_cuda else _BLOCK


# ------------------------------------------------------------------------------------------------ algebra of factors


def add(*parts: LowRank) -> LowRank:
    """The sum of changes, exactly: factors side by side, ranks added."""
    import torch

    if len({p.shape for p in parts}) != 1:
        raise ValueError(f"changes of {len(parts)} shapes: {sorted({p.shape for p in parts})}")
    return LowRank(torch.cat([wide(p.up) for p in parts], 1), torch.cat([wide(p.down) for p in parts], 0))


def norm(a: LowRank) -> float:
    """‖ΔA‖, the Frobenius norm. Where factors cancel, right to 1e-8 of the product of their norms."""
    return math.sqrt(max(float((_gram(a.up[None]) * _gram(a.down.mT[None])).sum()), 0.0))


# ------------------------------------------------------------------------------------------------ truncation


class _Core(NamedTuple):
    """The singular value decompositions of a stack [b] of products.

    left_basis [b, out, r] @ left and right @ right_basis [b, r, n] are the unit vectors; the bases are in any dtype.
    limit: singular values below it are not to be trusted.
    """

    values: Tensor
    left_basis: Tensor
    left: Tensor
    right: Tensor
    right_basis: Tensor
    limit: Tensor
    method: str


def singular_values(lowrank: LowRank) -> tuple[float, ...]:
    """All singular values of ΔW, largest first, min(out, rank, n) of them; those that rounding made are zero."""
    import torch

    up, down = _thin(lowrank.up[None], lowrank.down[None])
    _, _, square, limit = _squared(up, down)
    values = torch.linalg.eigvalsh(square).clamp_min(0).sqrt().flip(-1)
    if bool((values < limit[:, None]).any()):
        left, right = (torch.linalg.qr(basis.double(), mode="r").R for basis in (up, down.mT))
        values = _above_rounding(torch.linalg.svdvals(left @ right.mT), left, right)
    return tuple(values[0].tolist())


def truncate(lowrank: LowRank, rule: RankRule | int) -> Factorised:
    """The best approximation of `up @ down` that `rule` allows, in the Frobenius norm; ΔW is never built.

    Singular values are split evenly (their square roots) between up and down; of each row of down, the entry of the
    largest magnitude is positive. A rule that asks for more than there is keeps what there is.

    In float64, a band of the factors at a time. The eigenvectors of their Gram matrices are 3 to 4 times as fast as
    QR of both factors and the SVD of the core, but square the condition: QR takes over where a value that is kept is
    below 1e-5 ‖up‖‖down‖, as of factors that nearly cancel, or that have fewer ranks than it seems.
    Takes what `truncate_nbytes` says.
    Source: Eckart & Young 1936 (optimality); QR recompression of a factored matrix. Raises ValueRefused.
    """
    return _truncate(lowrank.up[None], lowrank.down[None], [rule])[0]


def truncate_many(lowranks: Sequence[LowRank], rules: Sequence[RankRule | int]) -> list[Factorised]:
    """`truncate` of each by its own rule; those of one shape, rank and dtype on a CUDA device are done together."""
    groups: dict[object, list[int]] = {}
    for i, (a, _) in enumerate(zip(lowranks, rules, strict=True)):
        key = (a.shape, a.rank, a.up.dtype, a.down.dtype, a.up.device) if a.up.is_cuda else i
        groups.setdefault(key, []).append(i)
    found: dict[int, Factorised] = {}
    for group in groups.values():
        up, down = _stacked([lowranks[i].up for i in group]), _stacked([lowranks[i].down for i in group])
        found.update(zip(group, _truncate(up, down, [rules[i] for i in group]), strict=True))
    return [found[i] for i in range(len(lowranks))]


def truncate_kronecker(a: LowRank, b: LowRank, rule: RankRule | int) -> Factorised:
    """The best approximation of A ⊗ B that `rule` allows, split and signed as `truncate` does it.

    Its singular values are the products of theirs, and its vectors the Kronecker products of theirs, so that matrices
    of thousands of rows come down to two small ones. Takes what `kronecker_nbytes` says.
    Source: Van Loan 2000, The ubiquitous Kronecker product (the singular value decomposition of one).
    """
    import torch

    rule = RankRule("rank", rule) if isinstance(rule, int) else rule
    dtype = torch.promote_types(torch.promote_types(a.up.dtype, b.up.dtype), torch.float32)
    first, second = (truncate(LowRank(x.up.double(), x.down.double()), min(x.shape)) for x in (a, b))
    sizes = [torch.tensor(x.singular_values, dtype=torch.float64, device=a.up.device) for x in (first, second)]
    values, order = torch.outer(*sizes).flatten().sort(descending=True, stable=True)
    energy = float(values.square().sum())
    out, n = a.shape[0] * b.shape[0], a.shape[1] * b.shape[1]
    sorted_values = values.tolist()
    rank = rule.choose(sorted_values, out, n, energy)
    i, j = order[:rank] // max(len(sizes[1]), 1), order[:rank] % max(len(sizes[1]), 1)
    up = (first.lowrank.up[:, None, i] * second.lowrank.up[None, :, j]).flatten(0, 1).to(dtype)
    down = (first.lowrank.down[i, :, None] * second.lowrank.down[j, None, :]).flatten(1).to(dtype)
    return report(LowRank(up, down), sorted_values[:rank], sum(v * v for v in sorted_values[rank:]), "kronecker")


def kronecker_nbytes(a: tuple[int, int], b: tuple[int, int], kept: int) -> int:
    """The bytes that `truncate_kronecker` takes at most beside factors of matrices of these sizes."""
    small = sum(truncate_nbytes(*x, min(x), min(x)) + 32 * min(x) * (x[0] + x[1]) for x in (a, b))
    return small + 48 * min(a) * min(b) + 24 * kept * (a[0] * b[0] + a[1] * b[1])


def truncate_nbytes(out: int, n: int, rank: int, kept: int) -> int:
    """The bytes that `truncate` takes at most on a CPU beside its factors, which may be of any dtype.

    With its result of `kept` ranks; `singular_values` takes no more.
    """
    width = min(rank, out, n)
    product = 8 * (out * n + width * width) if rank > width else 0
    band = 20 * min(max(_BLOCK, out + n), rank * (out + n))  # in float64, and what the next is made from
    # QR's bases, and then a float64 copy of one factor, or the result; beside them, what decomposes the core.
    copies = 8 * max(width * max(out, n), kept * (out + n))
    return product + 8 * width * (out + n) + copies + band + 48 * width * width + 2048 * (width + 1)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    import torch

    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))


def _truncate(up: Tensor, down: Tensor, rules: Sequence[RankRule | int]) -> list[Factorised]:
    """Of stacks of factors [b, out, r] and [b, r, n]."""
    import torch

    dtype = torch.promote_types(torch.promote_types(up.dtype, down.dtype), torch.float32)
    parsed = [RankRule("rank", rule) if isinstance(rule, int) else rule for rule in rules]
    return _decomposed(*_thin(up, down), parsed, dtype, _by_gram)


def _decomposed(
    up: Tensor, down: Tensor, rules: Sequence[RankRule], dtype: torch.dtype,
    decompose: Callable[[Tensor, Tensor], _Core],
) -> list[Factorised]:  # fmt: skip
    """The same by one of the ways to decompose, or by QR where that is not to be trusted."""
    core = decompose(up, down)
    values, limits = core.values.tolist(), core.limit.tolist()
    energies = core.values.square().sum(-1).tolist()
    out, n = up.shape[1], down.shape[2]
    ranks = [rule.choose(v, out, n, energy) for rule, v, energy in zip(rules, values, energies, strict=True)]
    doubted = [i for i, rank in enumerate(ranks) if rank and values[i][rank - 1] < limits[i]]
    if doubted and len(doubted) == len(ranks):
        return _decomposed(up, down, rules, dtype, _by_qr)
    ups, downs = _factors(core, max(ranks), dtype)
    found = []
    for i, rank in enumerate(ranks):
        lost = sum(v * v for v in values[i][rank:])
        found.append(report(LowRank(ups[i, :, :rank], downs[i, :rank]), values[i][:rank], lost, core.method))
    if doubted:
        again = _decomposed(up[doubted], down[doubted], [rules[i] for i in doubted], dtype, _by_qr)
        for i, better in zip(doubted, again, strict=True):
            found[i] = better
    return found


def _factors(core: _Core, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """up [b, out, rank] and down [b, rank, n]."""
    half = core.values[:, :rank].sqrt()
    factors = []
    # Both as rows: of a tall matrix and a narrow one the product takes twice as long.
    for basis, vectors in ((core.left_basis, core.left.mT), (core.right_basis.mT, core.right)):
        rows = half[..., None] * vectors[:, :rank]
        factor = half.new_empty(len(half), rank, basis.shape[1], dtype=dtype)
        for columns, band in bands(basis, _size(basis)):
            factor[..., columns] = rows @ band.mT
        factors.append(factor)
    return factors[0].mT, factors[1]


def _thin(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The factors; where their ranks are more than rows or columns, their product in float64 beside the identity."""
    import torch

    count, out, rank = up.shape
    n = down.shape[2]
    if rank <= min(out, n):
        return up, down
    whole = up.new_zeros(count, out, n, dtype=torch.float64)
    height = max(1, _size(up) // max(1, count * (out + n)))
    for left, right in zip(torch.split(up, height, 2), torch.split(down, height, 1), strict=True):
        whole.baddbmm_(left.double(), right.double())
    # Of factors that cancel only rounding is left, whose size nothing but theirs can tell.
    sizes = [torch.linalg.vector_norm(f, dim=(1, 2), dtype=torch.float64) for f in (up, down, whole)]
    whole[sizes[2] <= _CANCELLED * sizes[0] * sizes[1]] = 0
    one = torch.eye(min(out, n), dtype=whole.dtype, device=whole.device).expand(count, -1, -1)
    return (one, whole) if out <= n else (whole, one)


def _squared(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """upᵀup; a root of down·downᵀ; rootᵀ(upᵀup)root, whose eigenvalues are the squared singular values; the limit."""
    import torch

    left, right = _gram(up), _gram(down.mT)
    traces = [gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in (left, right)]
    limit = _GRAM_LIMIT * (traces[0] * traces[1]).sqrt()
    if not bool(limit.isfinite().all()):  # a sum of squares is finite where each value is
        raise ValueRefused("", "its factors hold NaN or Inf")
    root, failed = torch.linalg.cholesky_ex(right)
    if bool(failed.any()):  # down has fewer ranks than it seems
        weights, vectors = torch.linalg.eigh(right)
        root = torch.where(failed[:, None, None] == 0, root, vectors * weights.clamp_min(0).sqrt()[:, None])
    return left, root, root.mT @ left @ root, limit


def _by_gram(up: Tensor, down: Tensor) -> _Core:
    import torch

    gram, root, square, limit = _squared(up, down)
    squares, turned = torch.linalg.eigh(square)
    values = squares.clamp_min(0).sqrt().flip(-1)
    divisor = values.clamp_min(1e-150)[:, None]  # of values that are zero the vectors are not used
    left = root @ turned.flip(-1) / divisor
    return _Core(values, up, left, (gram @ left / divisor).mT, down, limit, "gram")


def _by_qr(up: Tensor, down: Tensor) -> _Core:
    import torch

    left_basis, left = torch.linalg.qr(up.double())
    right_basis, right = torch.linalg.qr(down.mT.double())
    x, values, y = torch.linalg.svd(left @ right.mT)
    values = _above_rounding(values, left, right)
    return _Core(values, left_basis, x, y, right_basis.mT, values.new_zeros(len(values)), "qr")


def _above_rounding(values: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Singular values of left @ right.mT, with zeros where rounding made them."""
    import torch

    size = torch.linalg.matrix_norm(left) * torch.linalg.matrix_norm(right)
    return values.where(values > values.shape[-1] * torch.finfo(values.dtype).eps * size[:, None], 0)
