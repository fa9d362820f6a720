"""Weights that are shares of one whole, and sums of models by weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weightops.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from torch import Tensor

    from weightops.merging.method import Weights


def shares(weights: Weights) -> tuple[float, ...]:
    """Of a whole of 1."""
    total = math.fsum(weights)
    return tuple(w / total for w in weights)


def refuse_shares(
    method: str, *others: Callable[[int, Mapping[str, Any]], None]
) -> Callable[[int, Mapping[str, Any]], None]:
    """A MergeMethod's `refuse`: UsageError for weights that are none of one whole, and for what the others refuse."""

    def refuse(count: int, parameters: Mapping[str, Any]) -> None:
        for weight in parameters["weights"]:
            if weight < 0:
                raise UsageError(f"{method}, weights", f"found {weight:g}, expected none below 0")
        if not math.fsum(parameters["weights"]):
            raise UsageError(f"{method}, weights", "found 0 for all, expected one above 0")
        for other in others:
            other(count, parameters)

    return refuse


def combined(models: Sequence[Tensor], numbers: Sequence[float]) -> Tensor:
    """Σ nᵢ·modelᵢ."""
    total = models[0] * numbers[0]
    for model, number in zip(models[1:], numbers[1:], strict=True):
        total.add_(model, alpha=number)
    return total
