"""What turns written values into the original ones, bit for bit, as few bytes: whole numbers only, and no torch.

A float's code is the whole number that its bits are. What is kept of a value is its code less the one that the written
value predicts: small where a change was small, and exact whatever the prediction was worth. Since the prediction is
made again years later, perhaps on another machine, no step of it may depend on one: where it would (NaN, Inf, what
flushing small values to zero would touch) it is defined here.
"""

from __future__ import annotations

import functools
import math
import struct
import zlib
from typing import TYPE_CHECKING, Any

from weightops.files.dtypes import DTYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DIGEST = struct.Struct("<Q")
_LENGTH = struct.Struct("<Q")
_SAMPLE = 1 << 16
_WORTHWHILE = 0.98  # of the sample: random bits, as the last ones of a float32 are, would take half of the time


class Damaged(Exception):
    """The bytes are not what was encoded; says why, for an error that says where."""


def itemsize(dtype: str) -> int:
    """Bytes of a code; those of dtypes of less than a byte are taken together."""
    return max(DTYPES[dtype].bits // 8, 1)


def work_nbytes(values: int, original: str, written: str | None) -> int:
    """The most that `encode` or `decode` takes beside what it is given, with the prediction, for so many values."""
    size = itemsize(original)
    return values * (3 * size + 2 if written in (None, original) else max(4 * size + 2, 26)) + (1 << 19)


# ------------------------------------------------------------------------------------------------ bytes


def encode(original: NDArray[Any], predicted: NDArray[Any] | None, *, text: bool = False) -> bytes:
    """The codes `original`, given those that will be at hand again (None: nothing will be).

    A digest of the original bytes, the length of each plane (of the lowest bytes, the next, …), and the planes:
    deflated, or as they are where that is no longer, or nothing for zeros. text: bytes in which words are repeated.
    """
    import numpy as np
    import xxhash

    bits = 8 * original.itemsize
    # Zigzag: 0, −1, 1, −2, … as 0, 1, 2, 3, …, so that the higher bytes of small differences are zeros.
    codes = original - predicted if predicted is not None else original.copy()
    sign = np.negative(codes >> (bits - 1))
    codes <<= 1
    codes ^= sign
    del sign
    planes = []
    for number in range(original.itemsize):
        plane = np.ascontiguousarray(codes.view(np.uint8)[_places(number, original.itemsize)])
        planes.append(_deflated(plane.data, text) if plane.any() else b"")
    head = _DIGEST.pack(xxhash.xxh3_64_intdigest(original.data))
    return b"".join([head, *(_LENGTH.pack(len(plane)) for plane in planes), *planes])


def decode(data: memoryview, values: int, size: int, predicted: NDArray[Any] | None) -> NDArray[Any]:
    """What was encoded: so many codes of `size` bytes. Raises Damaged; takes no more memory, whatever `data` says."""
    import numpy as np
    import xxhash

    if len(data) < smallest(size):
        raise Damaged(f"holds {len(data):,} bytes, expected at least {smallest(size)}")
    lengths = [_LENGTH.unpack_from(data, _DIGEST.size + n * _LENGTH.size)[0] for n in range(size)]
    if smallest(size) + sum(lengths) != len(data):
        raise Damaged(f"holds {len(data):,} bytes, expected {smallest(size) + sum(lengths):,}")
    codes = np.zeros(values, f"<u{size}")
    position = smallest(size)
    for number, length in enumerate(lengths):
        part = data[position : position + length]
        position += length
        if length:
            codes.view(np.uint8)[_places(number, size)] = np.frombuffer(_inflated(part, values), np.uint8)
    sign = np.negative(codes & 1)
    codes >>= 1
    codes ^= sign
    del sign
    if predicted is not None:
        codes += predicted
    if xxhash.xxh3_64_intdigest(codes.data) != _DIGEST.unpack_from(data)[0]:
        raise Damaged("gives other bytes than those that it was made of")
    return codes


def smallest(size: int) -> int:
    """The fewest bytes that codes of `size` bytes become."""
    return _DIGEST.size + size * _LENGTH.size


def largest(values: int, size: int) -> int:
    """The most bytes that so many codes of `size` bytes become."""
    return smallest(size) + values * size


def _places(number: int, size: int) -> slice:
    return slice(number, None, size)


def _deflated(plane: memoryview, text: bool) -> bytes:
    """Runs and frequencies alone: level 6 finds nothing more in such bytes, and takes nine times as long."""
    strategy, level = (zlib.Z_DEFAULT_STRATEGY, 9) if text else (zlib.Z_RLE, 1)

    def deflate(data: memoryview) -> bytes:
        made = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
        return made.compress(data) + made.flush()

    sample = plane[:_SAMPLE]
    if len(plane) > len(sample) and len(deflate(sample)) > _WORTHWHILE * len(sample):
        return bytes(plane)
    found = deflate(plane)
    return found if len(found) < len(plane) else bytes(plane)


def _inflated(part: memoryview, nbytes: int) -> bytes | memoryview:
    if len(part) == nbytes:
        return part
    if len(part) > nbytes:
        raise Damaged(f"holds {len(part):,} bytes for {nbytes:,}")
    made = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        found = made.decompress(part, nbytes + 1)  # never more, whatever it would become
    except zlib.error:
        raise Damaged("cannot be inflated") from None
    if len(found) != nbytes or not made.eof or made.unused_data:
        raise Damaged(f"becomes other than {nbytes:,} bytes")
    return found


# ------------------------------------------------------------------------------------------------ prediction


def predict(written: NDArray[Any], dtype: str, original: str) -> NDArray[Any]:
    """Codes of the dtype `original` near the values that the codes `written` stand for; of NaN and Inf, anything."""
    if dtype == original:
        return written
    return _from_float32(_as_float32(written, dtype), original)


def _as_float32(codes: NDArray[Any], dtype: str) -> NDArray[Any]:
    """float32 codes of the same values."""
    import numpy as np

    if dtype == "F32":
        return codes
    if dtype == "BF16":
        return codes.astype(np.uint32) << 16
    if dtype == "F16":
        with np.errstate(all="ignore"):
            wide: NDArray[Any] = codes.view(np.float16).astype(np.float32).view(np.uint32)
        wide[codes & 0x7C00 == 0x7C00] = 0
        return wide
    if dtype == "F64":
        # Rounded half up, and what is out of float32's normal range is 0.
        size = codes & ((1 << 63) - 1)
        normal = (size >> 52 >= 897) & (size >> 52 < 1150)
        size = (size - (896 << 52) + (1 << 28)) >> 29
        return np.where(normal, size | (codes >> 63 << 31), 0).astype(np.uint32)
    values = np.array([0.0 if math.isnan(v) else v for v in _values(dtype)], np.float32)
    found: NDArray[Any] = values.view(np.uint32)[codes]
    return found


def _from_float32(codes: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Codes of the nearest values of another dtype."""
    import numpy as np

    if dtype == "F32":
        return codes
    if dtype == "BF16":
        short: NDArray[Any] = ((codes + 0x7FFF + (codes >> 16 & 1)) >> 16).astype(np.uint16)
        return short
    if dtype == "F64":
        size = codes & 0x7FFFFFFF
        wide = size.astype(np.uint64) << 29
        wide += 896 << 52
        wide[size < 0x00800000] = 0
        return wide | (codes & 0x80000000).astype(np.uint64) << 32
    with np.errstate(all="ignore"):
        half: NDArray[Any] = codes.view(np.float32).astype(np.float16).view(np.uint16)
    half[codes & 0x7FFFFFFF >= 0x7F800000] = 0
    return half if dtype == "F16" else _nearest_bytes(dtype)[half]


@functools.cache
def _nearest_bytes(dtype: str) -> NDArray[Any]:
    """For each float16 code, the code of the nearest value of a dtype of one byte."""
    import numpy as np

    values = np.array(_values(dtype))
    codes = np.flatnonzero(np.isfinite(values))
    codes = codes[np.argsort(values[codes], kind="stable")].astype(np.uint8)
    known = values[codes]
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    with np.errstate(all="ignore"):
        found = np.searchsorted((known[1:] + known[:-1]) / 2, np.nan_to_num(half))
    nearest: NDArray[Any] = codes[found]
    return nearest


@functools.cache
def _values(dtype: str) -> tuple[float, ...]:
    """The value of each code of a dtype of one byte; NaN also for Inf."""
    exponent_bits, bias, is_special = _BYTES[dtype]
    mantissa_bits = 7 - exponent_bits
    found = []
    for code in range(256):
        exponent, mantissa = code >> mantissa_bits & ((1 << exponent_bits) - 1), code & ((1 << mantissa_bits) - 1)
        value = math.ldexp(mantissa + (bool(exponent) << mantissa_bits), max(exponent, 1) - bias - mantissa_bits)
        found.append(math.nan if is_special(code) else -value if code & 128 else value)
    return tuple(found)


# Bits of the exponent, its bias, and which codes are NaN or Inf. Source: Micikevicius et al. 2022, arXiv:2209.05433;
# Noune et al. 2022, arXiv:2206.02915 (FNUZ).
_BYTES: dict[str, tuple[int, int, Any]] = {
    "F8_E4M3": (4, 7, lambda code: code & 0x7F == 0x7F),
    "F8_E5M2": (5, 15, lambda code: code & 0x7C == 0x7C),
    "F8_E4M3FNUZ": (4, 8, lambda code: code == 0x80),
    "F8_E5M2FNUZ": (5, 16, lambda code: code == 0x80),
}
