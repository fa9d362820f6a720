"""How LoRAs get in each other's way: a scan of what each changes of every module, before they are combined."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from weightops.lora.lowrank import LowRank
from weightops.lora.overlap import meeting, sign_conflicts
from weightops.ops.sums import Sum, add_products, bands, by_file, by_rows, refuse_nonfinite
from weightops.plan import Grain, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from weightops.files.checkpoint import Checkpoint
    from weightops.plan import Block

_ROWS = 16  # of which signs are compared


class Pair(NamedTuple):
    """Two files in one module. angles: the smallest principal one between their column spaces, and the mean of the
    squared cosines of all; None: of a change that has no factors. conflicts: of weighted changes, the share of values
    of opposite signs; cancelled: of what they have in common, value by value, the share that has opposite signs.
    """

    a: int
    b: int
    smallest_angle: float | None
    shared: float | None
    conflicts: float
    cancelled: float


class Met(NamedTuple):
    """One module: the files that change it, the inner products of their changes as they stand, and their pairs."""

    files: tuple[int, ...]
    gram: list[list[float]]
    pairs: list[Pair]


def meetings(sums: Sequence[Sum], sources: Sequence[Checkpoint], weights: Sequence[float]) -> list[Task]:
    """A scan of each module, whose value is a `Met`. The terms are of strength 1, and files of these weights."""
    return [
        Task(of.name, tuple(of.inputs(sources)), (), _met(of, weights), Grain.TENSOR, work_nbytes=_met_nbytes(of))
        for of in sums
    ]


def _by_factors(of: Sum) -> bool:
    """Is it by Gram matrices of factors that changes are compared? Of many ranks these are larger than the changes."""
    return of.is_product and sum(t.product_rank for t in of.terms) ** 2 <= 4 * len(of.files) * of.out * of.n


def _met_nbytes(of: Sum) -> int:
    rows = (96 + 8 * len(of.files)) * _ROWS * of.n
    if not _by_factors(of):
        return of.by_rows_nbytes() + of.bands_nbytes(len(of.files)) + rows
    rank = sum(term.product_rank for term in of.terms)
    return of.nbytes() + 16 * rank * (of.out + of.n) + 64 * rank * rank + rows + (8 << 20)


def _met(of: Sum, weights: Sequence[float]) -> Callable[[Sequence[Tensor], Sequence[Tensor], Block], Met]:
    def compute(inputs: Sequence[Tensor], _outputs: Sequence[Tensor], _block: Block) -> Met:
        import torch

        rows = sorted({of.out * n // min(_ROWS, of.out) for n in range(min(_ROWS, of.out))})
        if _by_factors(of):
            products = [part for part in by_file(of, inputs).values() if isinstance(part, LowRank)]
            for part in products:
                refuse_nonfinite(of, part)
            inner, angles = meeting(products)
        else:
            products = []
            inner, sample = _looked_through(of, inputs, rows)
        pairs = []
        for i, j in itertools.combinations(range(len(of.files)), 2):
            files = of.files[i], of.files[j]
            first, second = (weights[file] for file in files)
            if products:
                found = angles[i, j]
                shared = math.fsum(math.cos(angle) ** 2 for angle in found) / len(found) if found else 0.0
                signs = sign_conflicts(products[i].scale(first), products[j].scale(second), rows)
                pairs.append(Pair(*files, found[0] if found else None, shared, *signs))
                continue
            x, y = sample[i] * first, sample[j] * second
            product, smaller = x.sign() * y.sign(), torch.minimum(x.abs(), y.abs())
            both, common = int(product.abs().sum()), float(smaller.sum(dtype=torch.float64))
            share = int((product < 0).sum()) / both if both else 0.0
            lost = float(smaller[product < 0].sum(dtype=torch.float64)) / common if common else 0.0
            pairs.append(Pair(*files, None, None, share, lost))
        return Met(of.files, inner, pairs)

    return compute


def _looked_through(of: Sum, inputs: Sequence[Tensor], rows: Sequence[int]) -> tuple[list[list[float]], list[Tensor]]:
    """The inner products of the files' changes, and these rows of each; every change is computed once."""
    import torch

    changes = list(by_rows(of, inputs).values())
    inner = [[0.0] * len(changes) for _ in changes]
    sample: list[list[Tensor]] = [[] for _ in changes]
    for band, each in bands(changes):
        add_products(inner, each)
        here = [row - band.start for row in rows if band.start <= row < band.stop]
        for found, change in zip(sample, each, strict=True):
            refuse_nonfinite(of, change)
            found.append(change[here])
    return inner, [torch.cat(found) for found in sample]


def interference(met: Mapping[str, Met], weights: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    """The report: per module and over all of them, for files of these weights and names.

    Each pair's cosine; the smallest principal angle between their column spaces, in degrees, and how much of these they
    share (mean squared cosine); how many of their values have opposite signs, and how much of what they have in common
    is cancelled by that (both of a sample of rows). `strengths`: how strongly each acts in the weighted sum, 1 as if it
    were alone: ⟨Σ wⱼΔⱼ, wᵢΔᵢ⟩ / ‖wᵢΔᵢ‖².
    """
    rows = []
    count = len(names)
    whole = [[0.0] * count for _ in range(count)]
    for name, found in met.items():
        for i, a in enumerate(found.files):
            for j, b in enumerate(found.files):
                whole[a][b] += found.gram[i][j]
        if len(found.files) < 2:
            continue
        strengths = _strengths(found.gram, [weights[file] for file in found.files])
        rows.append({
            "name": name,
            "strengths": {names[file]: s for file, s in zip(found.files, strengths, strict=True)},
            "pairs": [_pair(pair, found, names, weights) for pair in found.pairs],
        })  # fmt: skip
    pairs = []
    for i in range(count):
        for j in range(i + 1, count):
            cosine = _cosine(whole[i][j], whole[i][i], whole[j][j], weights[i] * weights[j])
            pairs.append({"a": names[i], "b": names[j], "cosine": cosine})
    return {
        "modules": rows, "pairs": pairs,
        "strengths": dict(zip(names, _strengths(whole, weights), strict=True)),
        "norms": {name: math.sqrt(max(whole[n][n], 0.0)) for n, name in enumerate(names)},
    }  # fmt: skip


def _pair(pair: Pair, found: Met, names: Sequence[str], weights: Sequence[float]) -> dict[str, Any]:
    i, j = found.files.index(pair.a), found.files.index(pair.b)
    both = weights[pair.a] * weights[pair.b]
    return {
        "a": names[pair.a], "b": names[pair.b],
        "cosine": _cosine(found.gram[i][j], found.gram[i][i], found.gram[j][j], both),
        "smallest_angle": None if pair.smallest_angle is None else math.degrees(pair.smallest_angle),
        "shared": pair.shared,
        "sign_conflicts": pair.conflicts,
        "cancelled": pair.cancelled,
    }  # fmt: skip


def _cosine(inner: float, a: float, b: float, sign: float) -> float:
    """Of the weighted changes; 0 where one of them is nothing."""
    size = math.sqrt(max(a, 0.0) * max(b, 0.0))
    return math.copysign(1.0, sign) * inner / size if size and sign else 0.0


def _strengths(inner: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float | None]:
    """None for what is nothing alone."""
    return [
        math.fsum(w * v for w, v in zip(weights, row, strict=True)) / (weights[i] * row[i])
        if weights[i] and row[i] > 0 else None
        for i, row in enumerate(inner)
    ]  # fmt: skip
