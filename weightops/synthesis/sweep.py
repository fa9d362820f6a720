"""Rows read block by block, by one process or by several that each read a share, and what these add up to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from weightops.diffusion.processes import Processes


class Tick(Protocol):
    """Called with how many of how many rows are read; title: in which pass."""

    def __call__(self, done: int, total: int, title: str | None = None, /) -> None: ...


class Source(Protocol):
    """What gives rows [n, d] in float32, as many at a time as take `nbytes`: a space."""

    def blocks(self, indices: Sequence[int], nbytes: int) -> Iterator[tuple[slice, Tensor]]: ...


@dataclass(slots=True)
class Sweep:
    """Rows of the members that this process reads, on its device. values: that were read so far, by this process.

    nbytes: of a block in float32. band: bytes of a part of a large matrix that is copied at a time.
    """

    source: Source
    members: Sequence[int]
    nbytes: int
    band: int
    device: str
    processes: Processes
    tick: Tick
    values: int = 0

    def blocks(self, title: str, members: Sequence[int] | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Every block, in float32, and which of the members it holds."""
        asked = self.members if members is None else members
        for where, rows in self.source.blocks(asked, self.nbytes):
            self.values += rows.numel()
            yield where, rows.to(self.device)
            self.tick(where.stop, len(asked), title)

    def bands(self, matrix: Tensor) -> Iterator[slice]:
        """Bands of the rows of a matrix [d, l]."""
        height = max(1, self.band // (8 * max(1, matrix.shape[1])))
        for start in range(0, len(matrix), height):
            yield slice(start, min(start + height, len(matrix)))

    def summed(self, matrix: Tensor) -> Tensor:
        """The sum of all processes' matrices, in place."""
        if self.processes.count > 1:
            for band in self.bands(matrix) if matrix.ndim == 2 else [slice(None)]:
                matrix[band] = self.processes.sum(matrix[band].contiguous())
        return matrix

    def shared(self, tensor: Tensor) -> Tensor:
        """The first process's tensor: no two machines compute eigenvectors to the same bit."""
        # What travels is memory: a tensor that lies by columns here and by rows there would arrive as its transpose.
        return self.processes.sum(tensor.contiguous() if self.processes.is_main else tensor.new_zeros(tensor.shape))


def share(members: Sequence[int], processes: Processes) -> tuple[int, list[int]]:
    """The members whose rows this process reads, one after another as they lie in the file, and where they begin."""
    each, more = divmod(len(members), processes.count)
    start = processes.index * each + min(processes.index, more)
    return start, list(members[start : start + each + (processes.index < more)])


def unseen(_done: int, _total: int, _title: str | None = None) -> None:
    """No progress is shown."""
