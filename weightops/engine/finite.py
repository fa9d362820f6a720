"""Find NaN and Inf in bytes of any floating dtype, without torch and at memory speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# dtype -> (width in bytes, the least bits of a positive value that is not finite): Inf, and above it every NaN.
_LIMITS: Mapping[str, tuple[int, int]] = {
    "F64": (8, 0x7FF0_0000_0000_0000),
    "F32": (4, 0x7F80_0000),
    "C64": (4, 0x7F80_0000),  # pairs of F32
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F8_E5M2": (1, 0x7C),
    "F8_E4M3": (1, 0x7F),  # no Inf, one NaN of either sign
}
# One NaN: where minus zero would be; for a bare exponent, the largest.
_SINGLE: Mapping[str, int] = {"F8_E4M3FNUZ": 0x80, "F8_E5M2FNUZ": 0x80, "F8_E8M0": 0xFF}


def first_nonfinite(data: memoryview, dtype: str) -> int | None:
    """The index of the first value that is NaN or Inf, or None. Dtypes without such values have none.

    As integers, floats of one sign are ordered like their magnitudes, so two maxima tell: that of the signed
    integers for the positive values, that of the unsigned ones for the negative. `isfinite` takes ten times as long.
    """
    import numpy as np

    if not len(data):
        return None
    if dtype in _SINGLE:
        found = np.frombuffer(data, np.uint8) == _SINGLE[dtype]
        return int(found.argmax()) if found.any() else None
    if dtype not in _LIMITS:
        return None
    width, limit = _LIMITS[dtype]
    signed = np.frombuffer(data, f"<i{width}")
    unsigned = signed.view(f"<u{width}")
    sign = 1 << (8 * width - 1)
    if int(signed.max()) < limit and int(unsigned.max()) < sign | limit:
        return None
    index = int(((unsigned & np.array(sign - 1, unsigned.dtype)) >= limit).argmax())
    return index // 2 if dtype == "C64" else index
