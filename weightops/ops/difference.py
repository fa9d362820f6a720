"""What is done with the difference of two weights: factors of it, its singular values, its size. Tensors in and out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

from weightops.lora.lowrank import Factorised, LowRank, factorise_many, noise_floor, norm, spectrum
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
    """Of a sample of one matrix: ‖ΔW‖², ‖W‖² of the base, and whether all its bytes are equal."""

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


def extracted(
    weights: Sequence[Weight], rank: int, *, seed: int, clamp_quantile: float | None
) -> Callable[[Sequence[Tensor], Sequence[Tensor], Block], list[Found]]:
    """The compute function of one or several matrices of one shape: down and up of each, or its whole difference."""

    def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block) -> list[Found]:
        pairs = _split(weights, inputs)
        if len(outputs) == len(weights):
            return [
                _whole(difference(w, mine, theirs), out, w, mine, theirs)
                for w, (mine, theirs), out in zip(weights, pairs, outputs, strict=True)
            ]
        deltas = [difference(w, mine, theirs) for w, (mine, theirs) in zip(weights, pairs, strict=True)]
        generators = [generator_for(seed, w.name, 0) for w in weights]
        factorised = factorise_many(deltas, rank, generators=generators)
        return [
            _factors(found, delta, outputs[2 * i : 2 * i + 2], weights[i], *pairs[i], clamp_quantile)
            for i, (found, delta) in enumerate(zip(factorised, deltas, strict=True))
        ]

    return compute


def _whole(delta: Tensor, out: Tensor, weight: Weight, tuned: Sequence[Tensor], base: Sequence[Tensor]) -> Found:
    store(delta.reshape(out.shape), out)
    floor = _floor(weight, tuned, base)
    return Found(_norm([delta]), _norm(base), _norm([delta], out), 1.0, floor[0], floor[1], 0, "whole")


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
        lost = math.hypot(found.error * found.norm, _distance(found.lowrank, written))
    else:
        lost = residual(delta, written)
    noise, edge = _floor(weight, tuned, base)
    above = sum(1 for v in found.singular_values if v > edge)
    return Found(found.norm, _norm(base), lost, found.energy, noise, edge, above, found.method)


def _distance(best: LowRank, written: LowRank) -> float:
    """‖best − written‖ where both are nearly the same.

    (U + dU)(D + dD) − UD = dU·D + U·dD + dU·dD; what the best factors leave is orthogonal to the first two, and the
    third is of the second order, so that squares add up.
    """
    import torch

    count = best.rank
    up, down = written.up[:, :count].double(), written.down[:count].double()
    left, right = up - best.up.double(), down - best.down.double()
    return norm(LowRank(torch.cat([left, best.up.double()], 1), torch.cat([down, right], 0)))


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


def _norm(tensors: Sequence[Tensor], less: Tensor | None = None) -> float:
    """The Frobenius norm of tensors together, or of one less another; a piece that stays in the cache at a time."""
    import torch

    total = []
    for tensor in tensors:
        values, other = tensor.reshape(-1), None if less is None else less.reshape(-1)
        for start in range(0, len(values), WORKING_VALUES):
            part = slice(start, start + WORKING_VALUES)
            piece = values[part].to(torch.promote_types(values.dtype, torch.float32))
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
    """The compute function of a bias's difference."""
    store(inputs[0].double() - inputs[1].double(), outputs[0])


# ------------------------------------------------------------------------------------------------ scans


def spectra(weight: Weight, nbytes: int) -> Callable[[Sequence[Tensor], Sequence[Tensor], Block], Spectrum]:
    """A scan: all singular values of a difference. nbytes: of one rank of its factors."""

    def compute(inputs: Sequence[Tensor], _outputs: Sequence[Tensor], _block: Block) -> Spectrum:
        ((mine, theirs),) = _split([weight], inputs)
        values, energy = spectrum(difference(weight, mine, theirs))
        return Spectrum(values, energy, nbytes)

    return compute


def looked(inputs: Sequence[Tensor], _outputs: Sequence[Tensor], _block: Block) -> Look:
    """A scan of a sample: how large the difference is."""
    mine, theirs = (t.double() for t in inputs)
    return Look(float((mine - theirs).square().sum()), float(theirs.square().sum()), bool((mine == theirs).all()))


def equal(inputs: Sequence[memoryview], _outputs: Sequence[memoryview], _block: Block) -> bool:
    """A scan of bytes: are these equal?"""
    import numpy as np

    mine, theirs = (np.frombuffer(data, dtype=np.uint8) for data in inputs)
    return bool(np.array_equal(mine, theirs))
