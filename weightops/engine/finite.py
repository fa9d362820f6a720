"""Find NaN and Inf in bytes of any floating dtype, without torch: an exponent of all ones, at memory speed."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_scratch = threading.local()

# dtype -> (unsigned integer of its width, bits that are all set exactly in NaN and Inf)
_MASKS: Mapping[str, tuple[str, int]] = {
    "F64": ("u8", 0x7FF0_0000_0000_0000),
    "F32": ("u4", 0x7F80_0000),
    "C64": ("u4", 0x7F80_0000),
    "F16": ("u2", 0x7C00),
    "BF16": ("u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),  # no Inf; NaN alone has all seven bits
}
_SINGLE = {"F8_E4M3FNUZ": 0x80, "F8_E5M2FNUZ": 0x80}  # one NaN, where minus zero would be


def first_nonfinite(data: memoryview, dtype: str) -> int | None:
    """The index of the first value that is NaN or Inf, or None. Dtypes without such values have none."""
    import numpy as np

    if dtype in _SINGLE:
        values = np.frombuffer(data, np.uint8)
        found = values == _SINGLE[dtype]
        return int(found.argmax()) if found.any() else None
    if dtype not in _MASKS:
        return None
    width, mask = _MASKS[dtype]
    values = np.frombuffer(data, "<" + width)
    for start in range(0, len(values), 1 << 18):
        part = values[start : start + (1 << 18)]
        masked = np.bitwise_and(part, mask, out=_room(part))
        if masked.max(initial=0) == mask:
            return start + int((masked == mask).argmax())
    return None


def _room(like: Any) -> Any:
    """Scratch of this thread: allocating per call would cost more than the test itself."""
    import numpy as np

    held = getattr(_scratch, "room", None)
    if held is None or held.nbytes < like.nbytes:
        held = _scratch.room = np.empty(like.nbytes, np.uint8)
    return held[: like.nbytes].view(like.dtype)
