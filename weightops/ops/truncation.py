"""What is done with sums of changes: factors of them, cut to a rank and written; singular values. Pure tensors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from weightops.errors import ValueRefused, quote
from weightops.lora.compat import CompatTerm, merged
from weightops.lora.factorise import factorise_many, factorise_nbytes, spectrum
from weightops.lora.lowrank import (
    LowRank,
    add,
    kronecker_nbytes,
    norm,
    singular_values,
    truncate_kronecker,
    truncate_many,
    truncate_nbytes,
)
from weightops.lora.rank import Spectrum
from weightops.merging.method import store
from weightops.merging.rounding import generator_for
from weightops.ops.difference import distance, distance_nbytes, frobenius
from weightops.ops.sums import Sum, factors, kronecker, total

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from weightops.lora.lowrank import Factorised
    from weightops.plan import Block

    Compute = Callable[[Sequence[Tensor], Sequence[Tensor], Block], "list[Found]"]


class Found(NamedTuple):
    """Of one sum: its Frobenius norm, the share of its square that the best factors keep, and what those that were
    written lack of it, their rounding included."""

    norm: float
    kept: float
    lost: float
    method: str


def cut(sums: Sequence[Sum], rank: int, *, scales: Sequence[float], seed: int) -> Compute:
    """The compute function that writes down and up of each sum, at its best approximation of this rank.

    The sums are of one shape. scales: by which each is larger than what is written (they stand in its alpha).
    """

    def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block) -> list[Found]:
        best = _best(sums, _shares(sums, inputs), rank, seed)
        return [
            _written(found, outputs[2 * i], outputs[2 * i + 1], scale)
            for i, (found, scale) in enumerate(zip(best, scales, strict=True))
        ]

    return compute


def cut_nbytes(of: Sum, rank: int) -> int:
    """The most that `cut` takes for one sum beside its inputs and outputs."""
    if of.is_kronecker:
        values = sum(source.spec.values for source in of.terms[0].parts.values())
        work = 24 * values + kronecker_nbytes(*of.kronecker_sides, rank)
        return max(work, distance_nbytes(of.out, of.n, rank) + 8 * rank * (of.out + of.n))
    stored = sum(term.product_rank for term in of.terms) if of.is_product else 0
    if of.is_product:
        work = truncate_nbytes(of.out, of.n, stored, rank)
    else:
        work = factorise_nbytes(of.out, of.n, rank, double=any(term.is_double for term in of.terms))
    return _then(of, max(work, distance_nbytes(of.out, of.n, rank) + 4 * rank * (of.out + of.n)))


def _then(of: Sum, nbytes: int) -> int:
    """What a sum takes, and `nbytes` beside it: of a matrix all that made it is gone by then."""
    return of.nbytes() + nbytes if of.is_product else max(of.nbytes(), of.matrix_nbytes() + nbytes)


def _best(sums: Sequence[Sum], shares: Sequence[Sequence[Tensor]], rank: int, seed: int) -> list[Factorised]:
    if all(of.is_kronecker for of in sums):
        return [truncate_kronecker(*kronecker(of, given), rank) for of, given in zip(sums, shares, strict=True)]
    totals = [total(of, given) for of, given in zip(sums, shares, strict=True)]
    products = [found for found in totals if isinstance(found, LowRank)]
    if len(products) == len(totals):
        return truncate_many(products, [rank] * len(products))
    whole = [found.dense() if isinstance(found, LowRank) else found for found in totals]
    return factorise_many(whole, rank, generators=[generator_for(seed, of.name, 0) for of in sums])


def _shares(sums: Sequence[Sum], inputs: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    found, position = [], 0
    for of in sums:
        count = sum(term.count for term in of.terms)
        found.append(inputs[position : position + count])
        position += count
    return found


def _written(found: Factorised, down: Tensor, up: Tensor, scale: float) -> Found:
    """Fill both outputs, and say what they hold; ranks that are not there are zeros."""
    _fill(found.lowrank, down, up)
    lost = math.hypot(found.error * found.norm, distance(found.lowrank, _as_written(down, up)))
    if not scale:  # an alpha of 0: nothing is lost of nothing
        return Found(0.0, 1.0, 0.0, found.method)
    return Found(abs(scale) * found.norm, found.energy, abs(scale) * lost, found.method)


def _fill(lowrank: LowRank, down: Tensor, up: Tensor) -> None:
    for given, rows in ((lowrank.down, down.reshape(len(down), -1)), (lowrank.up.mT, up.reshape(len(up), -1).mT)):
        rows[len(given) :] = 0
        store(given, rows[: len(given)])


def _as_written(down: Tensor, up: Tensor) -> LowRank:
    return LowRank(up.reshape(len(up), -1), down.reshape(len(down), -1))


def joined(of: Sum, *, scale: float = 1.0) -> Compute:
    """The compute function that writes down and up of a sum exactly: the factors of all terms, side by side.

    Where these would be more than the matrix has rows or columns, they are the matrix and an identity. Of each term a
    power of two is moved from one factor to the other, so that both are of one size: what is small in half precision
    has few digits.
    """

    def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block) -> list[Found]:
        found: LowRank | Tensor
        if of.is_product and sum(term.product_rank for term in of.terms) <= min(of.out, of.n):
            pairs = zip(of.terms, of.split(inputs), strict=True)
            parts = [_balanced(factors(term, given, of.out)) for term, given in pairs]
            found = parts[0] if len(parts) == 1 else add(*parts)
            if not bool(found.up.isfinite().all() and found.down.isfinite().all()):
                raise ValueRefused("", f"{quote(of.name)} holds NaN or Inf")
        else:
            found = _with_identity(total(of, inputs))
        down, up = outputs
        _fill(found, down, up)
        lost = distance(found, _as_written(down, up))
        return [Found(abs(scale) * norm(found), 1.0, abs(scale) * lost, "joined")]

    return compute


def joined_nbytes(of: Sum) -> int:
    """The most that `joined` takes beside its inputs and outputs."""
    rank = of.most
    size = 8 if any(term.is_double for term in of.terms) else 4
    if not of.is_product or sum(term.product_rank for term in of.terms) > rank:
        return _then(of, 3 * size * of.out * of.n + distance_nbytes(of.out, of.n, rank))
    return of.nbytes() + 3 * size * rank * (of.out + of.n) + distance_nbytes(of.out, of.n, rank)


def _with_identity(found: LowRank | Tensor) -> LowRank:
    """A matrix as a product: its shorter side is the rank."""
    import torch

    matrix = found.dense() if isinstance(found, LowRank) else found
    out, n = matrix.shape
    unit = torch.eye(min(out, n), dtype=matrix.dtype, device=matrix.device)
    return LowRank(unit, matrix) if out <= n else LowRank(matrix, unit)


def _balanced(lowrank: LowRank) -> LowRank:
    import torch

    up, down = (float(torch.linalg.vector_norm(f, dtype=torch.float64)) for f in (lowrank.up, lowrank.down))
    if not (up and down and math.isfinite(up) and math.isfinite(down)):
        return lowrank
    factor = 2.0 ** round(math.log2(down / up) / 2)
    return LowRank(lowrank.up * factor, lowrank.down / factor)


def whole(of: Sum) -> Compute:
    """The compute function that writes a sum itself."""

    def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block) -> list[Found]:
        found = total(of, inputs)
        matrix = found.dense() if isinstance(found, LowRank) else found
        store(matrix.reshape(outputs[0].shape), outputs[0])
        lost = frobenius([matrix], outputs[0])
        return [Found(frobenius([matrix]), 1.0, lost, "whole")]

    return compute


def whole_nbytes(of: Sum) -> int:
    """The most that `whole` takes beside its inputs and outputs."""
    return _then(of, 8 * of.out * of.n)


def as_peer(of: Sum, *, concat: bool) -> Compute:
    """The compute function that writes what sd-scripts makes of plain LoRAs, and says how far that is off their sum."""

    def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block) -> list[Found]:
        terms = []
        for term, given in zip(of.terms, of.split(inputs), strict=True):
            at = dict(zip(term.parts, given, strict=True))
            terms.append(CompatTerm(at["up"].flatten(1), at["down"].flatten(1), term.alpha, term.strength))
        up, down, alpha = merged(terms, concat=concat, label="", module=of.name)
        _fill(LowRank(up, down), outputs[0], outputs[1])
        meant = total(of, inputs)
        assert isinstance(meant, LowRank)
        size, lost = norm(meant), norm(add(meant, _as_written(*outputs).scale(-alpha / len(down))))
        kept = max(0.0, 1 - (lost / size) ** 2) if size else 1.0
        return [Found(size, kept, lost, "sd-scripts")]

    return compute


def as_peer_nbytes(of: Sum) -> int:
    """The most that `as_peer` takes beside its inputs and outputs."""
    rank = sum(term.product_rank for term in of.terms)
    return of.nbytes() + 40 * rank * (of.out + of.n) + 96 * rank * rank + (8 << 20)


def as_it_is(of: Sum, *, scale: float) -> Compute:
    """The compute function that copies the parts of a sum of one term, in another dtype where the outputs have one."""
    term = of.terms[0]

    def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block) -> list[Found]:
        found = total(of, inputs)
        assert isinstance(found, LowRank)
        for given, out in zip(inputs, outputs, strict=True):
            if given.dtype == out.dtype:
                out.copy_(given.reshape(out.shape))
            else:
                store(given.reshape(out.shape), out)
        lost = 0.0
        if any(given.dtype != out.dtype for given, out in zip(inputs, outputs, strict=True)):
            lost = distance(found, factors(term, outputs, of.out))
        return [Found(abs(scale) * norm(found), 1.0, abs(scale) * lost, "kept")]

    return compute


def as_it_is_nbytes(of: Sum) -> int:
    """The most that `as_it_is` takes beside its inputs and outputs."""
    rank = of.terms[0].product_rank
    return 2 * of.nbytes() + 16 * rank * (of.out + of.n) + distance_nbytes(of.out, of.n, rank)


def spectra(
    of: Sum, nbytes: int, *, scale: float = 1.0
) -> Callable[[Sequence[Tensor], Sequence[Tensor], Block], Spectrum]:
    """A scan: the singular values of a sum. nbytes: of one rank's factors."""

    def compute(inputs: Sequence[Tensor], _outputs: Sequence[Tensor], _block: Block) -> Spectrum:
        if of.is_kronecker:
            small, large = (singular_values(x) for x in kronecker(of, inputs))
            values = sorted((a * b for a in small for b in large), reverse=True)
            energy = math.fsum(v * v for v in values)
        elif isinstance(found := total(of, inputs), LowRank):
            values = list(singular_values(found))
            energy = math.fsum(v * v for v in values)
        else:
            values, energy = spectrum(found)
        return Spectrum([abs(scale) * v for v in values], scale * scale * energy, nbytes)

    return compute


def spectra_nbytes(of: Sum) -> int:
    """The most that `spectra` takes beside its inputs."""
    side = min(of.out, of.n)
    if of.is_kronecker:
        values = sum(source.spec.values for source in of.terms[0].parts.values())
        return 24 * values + kronecker_nbytes(*of.kronecker_sides, 0)
    if not of.is_product:
        # A float64 matrix takes the decomposition itself, others their Gram matrix, a band at a time.
        doubles = 24 * of.out * of.n if any(term.is_double for term in of.terms) else 0
        return _then(of, 24 * side * side + doubles + (16 << 20))
    stored = sum(term.product_rank for term in of.terms)
    return of.nbytes() + truncate_nbytes(of.out, of.n, stored, min(stored, side))


def squared(inputs: Sequence[Tensor], _outputs: Sequence[Tensor], _block: Block) -> float:
    """A scan: the squared Frobenius norm of what is read."""
    return math.fsum(frobenius([given]) ** 2 for given in inputs)
