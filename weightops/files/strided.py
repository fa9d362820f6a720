"""Values that lie apart in a file, put into row-major order. Knows no pickles, though only they hold such tensors."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from weightops.files.dtypes import DTYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from weightops.files.source import ByteSource
    from weightops.files.tensor import TensorInfo

_READ_BYTES = 4 << 20  # of one read, and of the only memory that is taken
_GAP_BYTES = 64 << 10  # a read of its own costs more than so many unwanted bytes
_GATHER_BYTES = 256 << 10  # of stored bytes: of few rows, each row's part stays in the cache until its last value


def read_strided(source: ByteSource, info: TensorInfo, begin: int, end: int, out: memoryview) -> None:
    """Fill `out` with the row-major bytes `begin` to `end` of a tensor, both multiples of its value's size.

    Takes at most 4 MiB, whatever the strides.
    """
    if info.strides is None or begin == end:
        source.read_into(info.start + begin, out)
        return
    import numpy as np

    size = DTYPES[info.spec.dtype].bits // 8
    values = np.frombuffer(out, f"u{size}")
    buffer = np.empty(min(_READ_BYTES, info.stop - info.start), np.uint8).data
    axes = sorted(range(len(info.strides)), key=info.strides.__getitem__, reverse=True)
    steps = tuple(info.strides[axis] * size for axis in axes)
    done = 0
    while done < len(values):
        first, shape = _block(info.spec.shape, info.strides, begin // size + done, end // size)
        block = values[done : done + prod(shape)].reshape(shape)
        _fill(source, info.start + first * size, steps, block.transpose(axes), buffer)
        done += block.size


def _fill(source: ByteSource, start: int, steps: tuple[int, ...], into: NDArray[Any], buffer: memoryview) -> None:
    """Read what lies `steps` bytes apart from byte `start` on; the steps go from the longest to the shortest."""
    import numpy as np

    step, *inner_steps = steps
    inner = into.itemsize + sum((n - 1) * s for n, s in zip(into.shape[1:], inner_steps, strict=True))
    alone = step - inner > _GAP_BYTES
    if inner_steps and (alone or inner > len(buffer)):
        for i in range(len(into)):
            _fill(source, start + i * step, steps[1:], into[i], buffer)
        return
    count = 1 if alone else (len(buffer) - inner) // step + 1 if step else len(into)
    few = _GATHER_BYTES // max(step, 1) + 1
    for i in range(0, len(into), count):
        part = into[i : i + count]
        span = buffer[: inner + (len(part) - 1) * step]
        source.read_into(start + i * step, span)
        stored = np.ndarray(part.shape, part.dtype, span, strides=steps)
        for j in range(0, len(part), few):
            part[j : j + few] = stored[j : j + few]


def _block(shape: tuple[int, ...], strides: tuple[int, ...], at: int, end: int) -> tuple[int, tuple[int, ...]]:
    """The largest block of whole indices from value `at` on that ends by `end`: its first stored value, its shape."""
    axis, inner = len(shape) - 1, 1
    while axis > 0 and at % (inner * shape[axis]) == 0 and at + inner * shape[axis] <= end:
        inner *= shape[axis]
        axis -= 1
    count = min((end - at) // inner, shape[axis] - at // inner % shape[axis])
    first, rest = 0, at
    for n, step in zip(reversed(shape), reversed(strides), strict=True):
        first += rest % n * step
        rest //= n
    return first, (*(1 for _ in shape[:axis]), count, *shape[axis + 1 :])
