"""Means other than the arithmetic one: of values' logarithms (geometric), and of their squares (euclidean)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weightops.merging.limits import within
from weightops.merging.looks import GRAM
from weightops.merging.method import merge_method
from weightops.plan import Grain

if TYPE_CHECKING:
    from weightops.merging.looks import Gram
    from weightops.merging.method import Delta, Either


@merge_method(Grain.VALUES, copies=4, refuse=within("geometric_sum", alpha=(0, 1)))
def geometric_sum(a: Either, b: Either, /, *, alpha: float = 0.5) -> Either:
    """Re(A^(1−α) · B^α): the weighted geometric mean, value by value, of complex powers.

    Where the signs agree it is ±|A|^(1−α)·|B|^α; where they do not, that times ±cos(π·α), so 0 at the default.
    Source: sd-mecha (geometric_sum), which is the same; here without complex numbers, and alpha is from 0 to 1.
    """
    import torch

    size = a.abs().pow_(1 - alpha)
    size.mul_(b.abs().pow_(alpha))
    turned = math.sin(math.pi * (0.5 - alpha))  # cos(π·α), and just 0 at one half
    below = a < 0
    size = torch.where(below == (b < 0), size, size * turned)
    return torch.where(below, -size, size)


@merge_method(Grain.VALUES, decides=True, copies=2, refuse=within("multiply_difference", alpha=(0, 1)))
def multiply_difference(a: Delta, b: Delta, /, *, alpha: float = 0.5, beta: float = 0.5) -> Delta:
    """±|A|^(1−α)·|B|^α, in the signs of (1−β)·A + β·B: the weighted geometric mean of two differences' magnitudes.

    What only one of them changed is left as it is.
    Source: meh (multiply_difference), which is the same.
    """
    import torch

    size = a.abs().pow_(1 - alpha)
    other = b.abs().pow_(alpha)
    size.mul_(other)
    return size.copysign_(torch.lerp(a, b, beta, out=other))


@merge_method(Grain.VALUES, looks=GRAM, decides=True, copies=4, refuse=within("euclidean_add", alpha=(0, 1)))
def euclidean_add(a: Delta, b: Delta, /, *, alpha: float = 0.5, found: Gram) -> Delta:
    """±√((1−α)·(A/‖A‖)² + α·(B/‖B‖)²), in the signs and of the length of (1−α)·A + α·B: differences added as lengths.

    Both count alike, however long they are, and their values do not cancel out within a magnitude, only in its sign.
    Source: meh (euclidean_add_difference), which is the same; where a difference is nothing, so is its term.
    """
    import torch

    (aa, ab), (_, bb) = found
    target = (1 - alpha) ** 2 * aa + 2 * alpha * (1 - alpha) * ab + alpha**2 * bb
    length = (1 - alpha) * (aa != 0) + alpha * (bb != 0)
    scale = math.sqrt(max(target, 0.0) / length) if length else 0.0
    first = (a * (scale * math.sqrt((1 - alpha) / aa) if aa else 0.0)).abs_()
    second = (b * (scale * math.sqrt(alpha / bb) if bb else 0.0)).abs_()
    # √(x² + y²) without squares of small values, and not torch.hypot: its last bit depends on where a value stands.
    larger = torch.maximum(first, second)
    ratio = torch.minimum(first, second, out=first).div_(larger).masked_fill_(larger == 0, 0.0)
    size = ratio.square_().add_(1.0).sqrt_().mul_(larger)
    return size.copysign_(torch.lerp(a, b, alpha, out=second))
