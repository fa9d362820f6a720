"""Settings of merge methods that must lie between limits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from weightops.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def within(method: str, **limits: tuple[float, float]) -> Callable[[int, Mapping[str, Any]], None]:
    """A MergeMethod's `refuse`: UsageError for one of these parameters below its first limit or above its second."""

    def refuse(count: int, parameters: Mapping[str, Any]) -> None:
        for name, (low, high) in limits.items():
            if not low <= parameters[name] <= high:
                expected = f"a number from {low:g} to {high:g}" if high < math.inf else f"a number from {low:g} on"
                raise UsageError(f"{method}, {name}", f"found {parameters[name]:g}, expected {expected}")

    return refuse
