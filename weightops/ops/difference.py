"""What is done with the difference of two weights: factors of it, its singular values, its size. Tensors in and out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

from weightops.errors import ValueRefused, quote
from weightops.lora.factorise import factorise_many, factorise_nbytes, noise_floor, spectrum
from weightops.lora.lowrank import Factorised, LowRank
from weightops.lora.rank import Spectrum
from weightops.merging.method import WORKING_VALUES, store
from weightops.merging.rounding import generator_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from weightops.naming.slots import Place
    from weightops.plan import Block

# Rows of which the rounding noise of a matrix is estimated.
_NOISE_ROWS = 64
_BAND = 1 << 20  # values that are subtracted at a stroke
_DISTANCE_BAND = 1 << 18  # of factors, in float64


class Weight(Protocol):
    """One weight of both models: in how many pieces each has it, and its shape."""

    @property
    def name(self) -> str: ...
    @property
    def tuned(self) -> tuple[Place, ...]: ...
    @property
    def base(self) -> tuple[Place, ...]: ...
    @property
    def out(self) -> int: ...
    @property
    def n(self) -> int: ...
    @property
    def is_double(self) -> bool: ...


class Found(NamedTuple):
    """Of one matrix: Frobenius norms of ΔW, of the base's weight, and of what the written factors lack of ΔW.

    kept: the share of ΔW's squared norm in the best factors of this rank, before they are rounded. noise, edge: the
    norm and the largest singular value of what the rounding of the inputs makes of nothing. above: of the ranks that
    are written, so many have singular values above the edge.
    """

    norm: float
    weight: float
    lost: float
    kept: float
    noise: float
    edge: float
    above: int
    method: str


class Look(NamedTuple):
    """Of a sample of one matrix: ‖ΔW‖², ‖W‖² of the base, and whether all its values are equal."""

    delta: float
    weight: float
    equal: bool


def _split(weights: Sequence[Weight], inputs: Sequence[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Each weight's own inputs: those of the tuned model, then those of the base."""
    found = []
    position = 0
    for weight in weights:
        middle, end = position + len(weight.tuned), position + len(weight.tuned) + len(weight.base)
        found.append((list(inputs[position:middle]), list(inputs[middle:end])))
        position = end
    return found


def _turned(tensors: Sequence[Tensor], places: Sequence[Place]) -> list[Tensor]:
    return [t.T if at.transposed else t for t, at in zip(tensors, places, strict=True)]


def difference(weight: Weight, tuned: Sequence[Tensor], base: Sequence[Tensor]) -> Tensor:
    """ΔW as a matrix [out, n], in float32, or float64 where one of the two is; a band at a time."""
    import torch

    wide = torch.float64 if torch.float64 in {t.dtype for t in (*tuned, *base)} else torch.float32
    found = torch.empty(weight.out, weight.n, dtype=wide, device=tuned[0].device)
    height = max(1, _BAND // max(weight.n, 1))
    start = 0
    for mine, theirs in zip(_turned(tuned, weight.tuned), _turned(base, weight.base), strict=True):
        for row in range(0, len(mine), height):
            a, b = (t[row : row + height].flatten(1).to(wide) for t in (mine, theirs))
            torch.sub(a, b, out=found[start + row : start + row + len(a)])
        start += len(mine)
    return found


def difference_nbytes(weight: Weight) -> int:
    """The bytes that `difference` takes: ΔW, and a band of either weight."""
    size, values = (8 if weight.is_double else 4), weight.out * weight.n
    return size * (values + 2 * min(values, max(_BAND, weight.n)))


def whole_nbytes(weight: Weight) -> int:
    """The bytes that `extracted` takes for one matrix beside its inputs and outputs, where ΔW itself is written."""
    return difference_nbytes(weight) + _floor_nbytes(weight)


def extracted_nbytes(weight: Weight, rank: int) -> int:
    """The same where factors are written."""
    doubles = 8 * weight.out * weight.n if weight.is_double else 0  # singular vectors of all of it
    found = factorise_nbytes(weight.out, weight.n, rank) + doubles
    return difference_nbytes(weight) + max(found, distance_nbytes(weight.out, weight.n, rank), _floor_nbytes(weight))


def spectra_nbytes(weight: Weight) -> int:
    """The bytes that `spectra` takes beside its inputs."""
    side = min(weight.out, weight.n)
    doubles = 8 * weight.out * weight.n if weight.is_double else 0
    return difference_nbytes(weight) + max(24 * side * side + doubles + 16 * _BAND, _floor_nbytes(weight))


def distance_nbytes(out: int, n: int, rank: int) -> int:
    """Of `distance`: bands of both factors, three products of twice the rank."""
    return 48 * min(_DISTANCE_BAND, rank * (out + n)) + 96 * rank * rank


def _floor_nbytes(weight: Weight) -> int:
    """Of `_floor`: six copies of the rows that it looks at, in float32, and one in float64."""
    return 32 * min(weight.out, 2 * _NOISE_ROWS) * weight.n


def extracted(
    weights: Sequence[Weight], rank: int, *, seed: int, clamp_quantile: float | None
) -> Callable[[Sequence[Tensor], Sequence[Tensor], Block], list[Found]]:
    """The compute function of one or several matrices of one shape: down and up of each, or its whole difference."""

    def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block) -> list[Found]:
        pairs = _split(weights, inputs)
        if len(outputs) == len(weights):
            return [
                _whole(_finite(w, mine, theirs), out, w, mine, theirs)
                for w, (mine, theirs), out in zip(weights, pairs, outputs, strict=True)
            ]
        deltas = [_finite(w, mine, theirs) for w, (mine, theirs) in zip(weights, pairs, strict=True)]
        generators = [generator_for(seed, w.name, 0) for w in weights]
        factorised = factorise_many(deltas, rank, generators=generators)
        return [
            _factors(found, delta, outputs[2 * i : 2 * i + 2], weights[i], *pairs[i], clamp_quantile)
            for i, (found, delta) in enumerate(zip(factorised, deltas, strict=True))
        ]

    return compute


def _finite(weight: Weight, tuned: Sequence[Tensor], base: Sequence[Tensor]) -> Tensor:
    """ΔW. Raises ValueRefused for NaN and Inf, which have no factors."""
    delta = difference(weight, tuned, base)
    if not all(math.isfinite(float(extreme)) for extreme in delta.aminmax()):
        raise not_finite(weight.name, "TUNED or BASE")
    return delta


def not_finite(name: str, where: str) -> ValueRefused:
    """The refusal of a matrix that holds NaN or Inf in one of the two."""
    hint = f"--exclude {quote(name)} leaves it out"
    return ValueRefused(where, f"{quote(name)} holds NaN or Inf, and has no factors", hint)


def _whole(delta: Tensor, out: Tensor, weight: Weight, tuned: Sequence[Tensor], base: Sequence[Tensor]) -> Found:
    store(delta.reshape(out.shape), out)
    floor = _floor(weight, tuned, base)
    return Found(frobenius([delta]), frobenius(base), frobenius([delta], out), 1.0, floor[0], floor[1], 0, "whole")


def _factors(
    found: Factorised, delta: Tensor, outputs: Sequence[Tensor], weight: Weight, tuned: Sequence[Tensor],
    base: Sequence[Tensor], clamp_quantile: float | None,
) -> Found:  # fmt: skip
    down, up = outputs
    best = found.lowrank if clamp_quantile is None else clamped(found, clamp_quantile)
    for given, out in ((best.down, down), (best.up, up)):
        rows = given if out is down else given.mT  # ranks that are not there are zeros
        padded = out.reshape(len(out), -1) if out is down else out.reshape(len(out), -1).mT
        padded[len(rows) :] = 0
        store(rows, padded[: len(rows)])
    written = LowRank(up.reshape(len(up), -1), down.reshape(len(down), -1))
    if clamp_quantile is None:
        lost = math.hypot(found.error * found.norm, distance(found.lowrank, written))
    else:
        lost = residual(delta, written)
    noise, edge = _floor(weight, tuned, base)
    above = sum(1 for v in found.singular_values if v > edge)
    return Found(found.norm, frobenius(base), lost, found.energy, noise, edge, above, found.method)


def distance(best: LowRank, written: LowRank) -> float:
    """‖best − written‖ where both are nearly the same.

    (U + dU)(D + dD) − UD = dU·D + U·dD + dU·dD; what the best factors leave is orthogonal to the first two, and the
    third is of the second order, so that squares add up.
    """
    count = best.rank
    left = _gram_with_error(best.up, written.up[:, :count])
    right = _gram_with_error(best.down.mT, written.down[:count].mT, of_written=True)
    return math.sqrt(max(float((left * right).sum()), 0.0))


def _gram_with_error(best: Tensor, written: Tensor, *, of_written: bool = False) -> Tensor:
    """The Gram matrix, in float64, of [error, best] side by side; or of [written, error]."""
    import torch

    width = best.shape[1]
    found = best.new_zeros(2 * width, 2 * width, dtype=torch.float64)
    height = max(1, _DISTANCE_BAND // max(2 * width, 1))
    for row in range(0, len(best), height):
        given, made = best[row : row + height].double(), written[row : row + height].double()
        both = torch.cat([made, made - given] if of_written else [made - given, given], 1)
        found.addmm_(both.mT, both)
    return found


def residual(delta: Tensor, written: LowRank) -> float:
    """‖ΔW − up·down‖, computed as it stands."""
    total = 0.0
    height = max(1, _BAND // max(delta.shape[1], 1))
    down = written.down.to(delta.dtype)
    for row in range(0, len(delta), height):
        band = slice(row, row + height)
        total += float((delta[band] - written.up[band].to(delta.dtype) @ down).double().square().sum())
    return math.sqrt(total)


def clamped(found: Factorised, quantile: float) -> LowRank:
    """The factors as other extractors clamp them: U·S and Vh, both to ± one quantile of all their signed values.

    Source: kohya's sd-scripts, networks/extract_lora_from_models.py (clamp_quantile).
    """
    import numpy as np
    import torch

    root = torch.tensor(found.singular_values, dtype=torch.float64, device=found.lowrank.up.device).sqrt()
    up, down = found.lowrank.up.double() * root, found.lowrank.down.double() / root[:, None]
    high = float(np.quantile(torch.cat([up.flatten(), down.flatten()]).cpu().numpy(), quantile))
    return LowRank(up.clamp(-high, high), down.clamp(-high, high))


def frobenius(tensors: Sequence[Tensor], less: Tensor | None = None) -> float:
    """The Frobenius norm of tensors together, or of one less another; a piece that stays in the cache at a time."""
    import torch

    total = []
    for tensor in tensors:
        values, other = tensor.reshape(-1), None if less is None else less.reshape(-1)
        for start in range(0, len(values), WORKING_VALUES):
            part = slice(start, start + WORKING_VALUES)
            piece = values[part].to(torch.float64 if values.dtype is torch.float64 else torch.float32)
            piece = piece if other is None else piece - other[part].to(piece.dtype)
            total.append(float(torch.dot(piece, piece)))
    return math.sqrt(math.fsum(total))


def _floor(weight: Weight, tuned: Sequence[Tensor], base: Sequence[Tensor]) -> tuple[float, float]:
    """The norm and the largest singular value of rounding alone.

    A finetune in the base's own dtype began with the base's stored values, and one rounding lies between them; where
    the base is stored more coarsely than the finetune, its rounding counts beside the finetune's.
    """
    import torch

    norms, largest = [], []
    mine, theirs = _turned(tuned, weight.tuned), _turned(base, weight.base)
    for a, b in zip(mine, theirs, strict=True):
        stored = [a.flatten(1), b.flatten(1)] if torch.finfo(b.dtype).eps > torch.finfo(a.dtype).eps else [a.flatten(1)]
        floor = noise_floor(*stored, rows=_NOISE_ROWS)
        norms.append(floor.norm)
        largest.append(floor.largest)
    return math.hypot(*norms), math.hypot(*largest)


def subtracted(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block) -> None:
    """The compute function of a bias's difference: of all parts that are packed in it."""
    half, start = len(inputs) // 2, 0
    for mine, theirs in zip(inputs[:half], inputs[half:], strict=True):
        store(mine.double() - theirs.double(), outputs[0][start : start + len(mine)])
        start += len(mine)


# ------------------------------------------------------------------------------------------------ scans


def spectra(
    weight: Weight, nbytes: int
) -> Callable[[Sequence[Tensor], Sequence[Tensor], Block], tuple[Spectrum, Found]]:
    """A scan: all singular values of a difference, and what is lost where none is kept. nbytes: of a rank's factors."""

    def compute(inputs: Sequence[Tensor], _outputs: Sequence[Tensor], _block: Block) -> tuple[Spectrum, Found]:
        ((mine, theirs),) = _split([weight], inputs)
        delta = _finite(weight, mine, theirs)
        values, energy = spectrum(delta)
        size, (noise, edge) = frobenius([delta]), _floor(weight, mine, theirs)
        return Spectrum(values, energy, nbytes), Found(size, frobenius(theirs), size, 0.0, noise, edge, 0, "none")

    return compute


def looked(weight: Weight) -> Callable[[Sequence[Tensor], Sequence[Tensor], Block], Look]:
    """A scan of a sample: how large the difference is."""
    across = weight.tuned[0].transposed != weight.base[0].transposed

    def compute(inputs: Sequence[Tensor], _outputs: Sequence[Tensor], _block: Block) -> Look:
        mine, theirs = (t.double() for t in inputs)
        mine = mine.T if across else mine
        return Look(float((mine - theirs).square().sum()), float(theirs.square().sum()), bool((mine == theirs).all()))

    return compute


def equal(inputs: Sequence[memoryview], _outputs: Sequence[memoryview], _block: Block) -> bool:
    """A scan of bytes: are these equal?"""
    import numpy as np

    mine, theirs = (np.frombuffer(data, dtype=np.uint8) for data in inputs)
    return bool(np.array_equal(mine, theirs))


def equal_values(*, across: bool) -> Callable[[Sequence[Tensor], Sequence[Tensor], Block], bool]:
    """A scan of tensors of two dtypes, or one of which lies across the other: are their values equal?"""

    def compute(inputs: Sequence[Tensor], _outputs: Sequence[Tensor], _block: Block) -> bool:
        mine, theirs = inputs[0].T if across else inputs[0], inputs[1]
        height = max(1, _BAND // max(theirs[0].numel(), 1))
        bands = (slice(row, row + height) for row in range(0, len(theirs), height))
        return all(bool((mine[band].double() == theirs[band].double()).all()) for band in bands)

    return compute


def equal_nbytes(shape: Sequence[int]) -> int:
    """The bytes that `equal_values` takes beside its inputs."""
    values, row = math.prod(shape), math.prod(shape[1:])
    return 24 * min(values, max(_BAND, row))
