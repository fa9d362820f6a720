"""IA3: a factor for each output, or each input, of a module. Liu et al. 2022, arXiv:2205.05638.

LyCORIS stores the factor's distance from 1: W' = W·(1 + ia3).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weightops.errors import MismatchError
from weightops.lora.family import FAMILIES, Family, Parts, Shape, Shapes

if TYPE_CHECKING:
    from torch import Tensor


def _fits(shapes: Shapes, shape: Shape) -> bool:
    """Which of the two sides it is, a number in the file says."""
    return len(shape) > 1 and math.prod(shapes["ia3"]) in shape[:2] and math.prod(shapes["on_input"]) == 1


def _apply(weight: Tensor, p: Parts, rows: slice) -> Tensor:
    ones = [1] * (weight.ndim - 2)
    axis = int(bool(p["on_input"].item()))
    if p["ia3"].numel() != p.shape[axis]:
        side = "input" if axis else "output"
        raise MismatchError(
            "", f"an IA3 of {p['ia3'].numel()} numbers, one for each {side}, does not fit {list(p.shape)}"
        )
    if axis:
        return weight * (1 + p["ia3"].reshape(1, -1, *ones))
    return weight * (1 + p["ia3"].reshape(-1, 1, *ones)[rows])


FAMILIES.register("ia3", Family("ia3", forms=(("ia3", "on_input"),), fits=_fits, apply=_apply))
