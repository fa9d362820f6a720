"""What a tensor is and where its bytes are: TensorSpec, TensorInfo, Slot. Frozen values, no I/O."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from weightops.files.dtypes import DTYPES


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype code and shape. A row is everything under one index of axis 0; a scalar is one row."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.values * DTYPES[self.dtype].bits // 8

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row; only for dtypes whose rows fill whole bytes."""
        return self.nbytes // self.rows if self.rows else 0

    @property
    def row_values(self) -> int:
        return self.values // self.rows if self.rows else 0

    def flat(self) -> TensorSpec:
        """The same values as one axis, for work that may be cut between any two values."""
        return TensorSpec(self.dtype, (self.values,))

    def as_bytes(self) -> TensorSpec:
        """The same bytes as U8, for copies: any dtype, sub-byte ones too, may then be cut anywhere."""
        return TensorSpec("U8", (self.nbytes,))

    def with_rows(self, rows: int) -> TensorSpec:
        return TensorSpec(self.dtype, (rows, *self.shape[1:]))

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class TensorInfo(NamedTuple):
    """A tensor of a file: `spec`, and bytes `start` to `stop` (absolute) of file number `shard` of its checkpoint.

    A named tuple, for a header may hold a hundred thousand of them. `strides` (in values) is set where
    the values do not lie in row-major order, which only pickles can say; `start` is then that of the first value.
    """

    spec: TensorSpec
    shard: int
    start: int
    stop: int
    strides: tuple[int, ...] | None = None


class Piece(NamedTuple):
    """`nbytes` bytes at `offset` from the beginning of a tensor."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Slot:
    """Bands of rows of the tensor that a file stores under `key` (the file's own spelling).

    `spec` is the slot's own dtype and shape. `bands` are ranges of rows of that height's size within the
    stored tensor, in the order in which they make up the slot; None: all of it, from the beginning.
    """

    key: str
    spec: TensorSpec
    bands: tuple[tuple[int, int], ...] | None = None

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Where bytes `start` to `stop` of the slot lie in the stored tensor, in order."""
        if self.bands is None:
            return [Piece(start, stop - start)]
        row = self.spec.row_nbytes
        found, position = [], 0
        for first, last in self.bands:
            height = (last - first) * row
            low, high = max(start, position), min(stop, position + height)
            if low < high:
                found.append(Piece(first * row + low - position, high - low))
            position += height
        return found
