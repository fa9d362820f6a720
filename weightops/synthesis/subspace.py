"""The leading components of rows that are read block by block: a random subspace, turned towards them pass by pass.

One pass over the rows gives Z = XᵀX Q for the subspace Q [d, l]. Everything else is done on bands of Q, Z and the
subspace before it, which are all that is held, and on l×l matrices, so that it goes on in bounded memory and from one
pass to the next by a file. Knows no file and no LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from weightops.synthesis.gram import NO_VARIANCE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from weightops.synthesis.sweep import Sweep

_STREAM = 2  # of the draws from one seed: no other part of a synthesis draws from it
# Passes are in float32 until the angle is below the first, or the residual below the second of the largest variance:
# float32 keeps 1e-6 of that, and what its rounding leaves is to be gone at the end.
_FINE = (1e-2, 1e-4)
# Of a direction's own length: what rounding leaves of one that depends on the others.
_DEPENDENT = 1e-14


@dataclass(slots=True)
class Iterating:
    """Where an iteration stands after `passes` of them. basis [d, l]: of the subspace; float64 once it is fine.

    before [d, l]: that of the pass before, in the same coordinates; None before the first. mean [d] float64, None
    before the first pass. explained: the variance that was caught.
    """

    basis: Tensor
    before: Tensor | None = None
    mean: Tensor | None = None
    passes: int = 0
    reached: float = 1.0
    explained: float = 0.0


class Keep(Protocol):
    """Where an iteration is kept, that it may be gone on with."""

    def load(self) -> Iterating | None: ...

    def save(self, state: Iterating) -> None: ...


class Found(NamedTuple):
    """mean [d]; basis [k, d], orthonormal rows; variances [k]; total variance; all float64, on the CPU.

    reached: a bound of the sine of the largest angle to the true subspace (0: exact), by its residual over the gap
    behind the last component; change: of the variance that was caught, in the last pass, as a share of it.
    """

    mean: Tensor
    basis: Tensor
    variances: Tensor
    total: float
    passes: int
    reached: float
    change: float


def iterate(
    sweep: Sweep, n: int, d: int, components: int, width: int, *, tolerance: float, passes: int, seed: int,
    keep: Keep | None = None,
) -> Found:  # fmt: skip
    """The first components of n rows, by a subspace of `width` dimensions, until it is sure to `tolerance`.

    Each pass adds a factor to the Chebyshev polynomial that damps the variances below the subspace's least: fewer
    passes by a half than by powers alone, where the spectrum falls slowly. The first passes are in float32, the last
    in float64. keep: where the state is kept after each pass, and found again.
    Source: Halko, Martinsson & Tropp 2011 (random subspaces); Rutishauser 1970 (Chebyshev); Davis & Kahan 1970 (the
    bound); Stathopoulos & Wu 2002 (orthonormal by Gram matrices).
    """
    state = (_kept(sweep, keep, d) if keep is not None else None) or _start(sweep, d, width, seed)
    while True:
        applied, total = _applied(sweep, state, n)
        values, vectors = _turned(sweep, state.basis, applied)
        k = max(1, min(components, int((values > NO_VARIANCE * values[0]).sum())))
        residual = _residual(sweep, state.basis, applied, values[:k], vectors[:, :k])
        gap = float(values[k - 1] - (values[k] if len(values) > k else 0.0))
        state.reached = min(1.0, residual / gap) if gap > 0 else 1.0
        explained, before = float(values[:k].sum()), state.explained
        state.explained = explained
        state.passes += 1
        fine = state.basis.dtype.itemsize == 8
        if fine and (state.reached <= tolerance or state.passes >= passes):
            break
        _advance(sweep, state, applied, float(values[-1]) if len(values) > k else 0.0, vectors)
        near = state.reached <= _FINE[0] or residual <= _FINE[1] * float(values[0])
        if not fine and (near or state.passes >= passes - 1):
            state.basis = state.basis.double()
            state.before = None if state.before is None else state.before.double()
        if keep is not None and sweep.processes.is_main:
            keep.save(state)
    del applied
    basis = _times(sweep, state.basis, vectors[:, :k]).mT
    assert state.mean is not None
    change = abs(explained - before) / explained if explained > 0 else 0.0
    return Found(
        state.mean.cpu(), with_signs(basis).cpu(), values[:k].clamp_min(0).cpu(), total, state.passes,
        state.reached, change,
    )  # fmt: skip


def _start(sweep: Sweep, d: int, width: int, seed: int) -> Iterating:
    """A random subspace, the same in every process."""
    import numpy as np
    import torch

    generator = np.random.default_rng((_STREAM, seed))
    basis = torch.empty(d, width)
    for band in sweep.bands(basis):
        drawn = generator.standard_normal((band.stop - band.start, width), dtype=np.float32)
        basis[band] = torch.from_numpy(drawn)
    return Iterating(orthonormalised(sweep, basis.to(sweep.device))[0])


def _kept(sweep: Sweep, keep: Keep, d: int) -> Iterating | None:
    """What the first process has kept, in every process."""
    import torch

    found = keep.load() if sweep.processes.is_main else None
    said = [0.0] * 7
    if found is not None:
        said = [1.0, found.passes, found.reached, found.explained, found.basis.shape[1], found.basis.dtype.itemsize]
        said.append(float(found.before is not None))
    there, passes, reached, explained, width, itemsize, twice = sweep.shared(
        torch.tensor(said, dtype=torch.float64, device=sweep.device)
    ).tolist()
    if not there:
        return None

    def passed(own: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = torch.zeros(shape, dtype=dtype) if own is None else own
        return sweep.summed(made.to(sweep.device))

    dtype = torch.float64 if itemsize == 8 else torch.float32
    shape = (d, int(width))
    return Iterating(
        passed(None if found is None else found.basis, shape, dtype),
        passed(None if found is None else found.before, shape, dtype) if twice else None,
        passed(None if found is None else found.mean, (d,), torch.float64), int(passes), reached, explained,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ one pass


def _applied(sweep: Sweep, state: Iterating, n: int) -> tuple[Tensor, float]:
    """Z = C Q [d, l] for the covariance C of all processes' rows, and its trace.

    Before the mean is known, rows are taken from the first block's mean, and the rest is put right afterwards.
    """
    import torch

    title = f"pass {state.passes + 1}"
    dtype = state.basis.dtype
    found = torch.zeros_like(state.basis, memory_format=torch.contiguous_format)
    away = state.mean if state.mean is not None else _first_mean(sweep, len(state.basis))
    shift = away.to(dtype)
    sums = torch.zeros(len(away) + 1, dtype=torch.float64, device=away.device)
    for _, rows in sweep.blocks(title):
        if state.mean is None:
            sums[:-1] += rows.sum(0, dtype=torch.float64)
        rows = rows.to(dtype).sub_(shift)
        found.addmm_(rows.mT, rows @ state.basis)
        sums[-1] += torch.linalg.vector_norm(rows, dtype=torch.float64).square()
    sweep.summed(found)
    sums = sweep.summed(sums)
    total = float(sums[-1])
    if state.mean is None:
        rest = sums[:-1] / n - away
        found.addr_(rest.to(dtype), rest.to(dtype) @ state.basis, alpha=-n)
        total -= n * float(rest.square().sum())
        state.mean = away + rest
    return found.div_(n - 1), max(total, 0.0) / (n - 1)


def _first_mean(sweep: Sweep, d: int) -> Tensor:
    """The mean of the first process's first block [d], float64: near enough to all rows for differences to be small."""
    import torch

    found = torch.zeros(d, dtype=torch.float64, device=sweep.device)
    if sweep.processes.is_main:
        _, rows = next(iter(sweep.source.blocks(sweep.members, sweep.nbytes)))
        found += rows.to(sweep.device).mean(0, dtype=torch.float64)
    return sweep.shared(found)


def _turned(sweep: Sweep, basis: Tensor, applied: Tensor) -> tuple[Tensor, Tensor]:
    """The variances within the subspace, the largest first, and the directions in it [l, l]: Rayleigh and Ritz."""
    import torch

    inner = _inner(sweep, basis, applied)
    values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    return sweep.shared(values.flip(0).contiguous()), sweep.shared(vectors.flip(1).contiguous())


def _residual(sweep: Sweep, basis: Tensor, applied: Tensor, values: Tensor, vectors: Tensor) -> float:
    """‖C V − V Λ‖₂ of the leading directions V: how far they are from staying where they are."""
    import torch

    scaled = vectors * values
    square = vectors.new_zeros(vectors.shape[1], vectors.shape[1])
    for band in sweep.bands(basis):
        apart = applied[band].double() @ vectors - basis[band].double() @ scaled
        square.addmm_(apart.mT, apart)
    found = torch.linalg.eigvalsh(square)[-1].clamp_min(0).sqrt()
    return float(sweep.shared(found))


def _advance(sweep: Sweep, state: Iterating, applied: Tensor, edge: float, vectors: Tensor) -> None:
    """The next basis: (C − b/2) Q − b²/16 Q₋₁, Chebyshev's recurrence on [0, b], made orthonormal again; in place.

    b is the least variance within the subspace: never more than its last dimension's, and nearer to it each time.
    """
    edge = max(edge, 0.0)
    applied.add_(state.basis, alpha=-edge / 2)
    if state.before is not None:
        applied.add_(state.before, alpha=-edge * edge / 16)
    made, turn = orthonormalised(sweep, applied, vectors)
    state.basis, state.before = made, _times(sweep, state.basis, turn)


def orthonormalised(sweep: Sweep, matrix: Tensor, vectors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of a matrix' columns [d, l], in its place, and the turn [l, l] that makes it.

    vectors [l, l]: what turns the columns first, nearly apart. Twice, for the first time leaves what the columns'
    dependence magnifies. Columns that depend on others are left out.
    """
    import torch

    turn, total = vectors, None
    for _ in range(2):
        inner = _inner(sweep, matrix, matrix)
        first = torch.eye(len(inner), dtype=inner.dtype, device=inner.device) if turn is None else turn
        step = sweep.shared(first @ _whitening(first.mT @ inner @ first))
        matrix = _times(sweep, matrix, step)
        total = step if total is None else total @ step
        turn = None
    assert total is not None
    return matrix, total


def _whitening(inner: Tensor) -> Tensor:
    """M such that Mᵀ G M = 1 for a Gram matrix G, nearest to a scaling where its columns are independent."""
    import torch

    lengths = inner.diagonal().clamp_min(0).sqrt()
    there = lengths > 0
    scale = torch.where(there, 1 / lengths, 0.0)
    values, vectors = torch.linalg.eigh(scale[:, None] * inner * scale)
    kept = values > _DEPENDENT * len(values)
    found = scale[:, None] * vectors[:, kept] / values[kept].sqrt()
    made: Tensor = found @ vectors.mT if bool(kept.all()) else found
    return made


def _times(sweep: Sweep, matrix: Tensor, turn: Tensor) -> Tensor:
    """matrix [d, l] @ turn [l, m], m ≤ l, in the matrix' place."""
    width = turn.shape[1]
    for band in sweep.bands(matrix):
        matrix[band, :width] = (matrix[band].double() @ turn).to(matrix.dtype)
    return matrix[:, :width]


def with_signs(basis: Tensor) -> Tensor:
    """Rows [k, d] such that the entry of the largest magnitude in each is positive, in place."""
    for row in basis:
        if float(row[row.abs().argmax()]) < 0:
            row.neg_()
    return basis


def _inner(sweep: Sweep, a: Tensor, b: Tensor) -> Tensor:
    """aᵀb [l, l] in float64."""
    found = None
    for band in sweep.bands(a):
        part = a[band].double().mT @ b[band].double()
        found = part if found is None else found.add_(part)
    assert found is not None
    return found
