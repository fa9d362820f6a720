"""The network of diffusion in a space of latents: an MLP of residual blocks, told of the time and of the condition.

Where they enter is `conditioning`:

    adanorm   a layer norm's scale and shift come from the embedded time and condition, added to each other
    adalora   they come from the time alone; then the condition y makes two low-rank matrices, x* = x + x·A(y)·B(y),
              A [w, r], B [r, w]; B begins at zero, so that x* begins as x

Source: "LoRA Diffusion: zero-shot LoRA synthesis", arXiv:2412.02352. Knows no loss and no course of the noise.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weightops.synthesis.descent import starting
from weightops.synthesis.schedule import TIMES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weightops.synthesis.descent import Weights

CONDITIONINGS = ("adanorm", "adalora")
BLOCKS = 3
_NARROWER = 4  # than the blocks: the embedded condition of AdaLoRA
_WAVES = 32  # sines and cosines of a time, each


def shapes_of(latents: int, conditions: int, width: int, conditioning: str, rank: int) -> dict[str, tuple[int, ...]]:
    """The weights' names and shapes."""
    shapes: dict[str, tuple[int, ...]] = {
        "in": (latents, width), "in-bias": (width,),
        "time.first": (2 * _WAVES, width), "time.first-bias": (width,),
        "time.second": (width, width), "time.second-bias": (width,),
        "norms": (width, 2 * (BLOCKS + 1) * width), "norms-bias": (2 * (BLOCKS + 1) * width,),
        "out": (width, latents), "out-bias": (latents,),
    }  # fmt: skip
    embedded = max(1, width // _NARROWER)
    if conditions and conditioning == "adalora":
        shapes |= {"condition": (conditions, embedded), "condition.none": (embedded,)}
    elif conditions:
        shapes |= {
            "condition.first": (conditions, width), "condition.first-bias": (width,),
            "condition.second": (width, width), "condition.second-bias": (width,), "condition.none": (width,),
        }  # fmt: skip
    for i in range(BLOCKS):
        shapes |= {
            f"{i}.first": (width, width), f"{i}.first-bias": (width,),
            f"{i}.second": (width, width), f"{i}.second-bias": (width,),
        }  # fmt: skip
        if conditions and conditioning == "adalora":
            shapes |= {
                f"{i}.lora-a": (embedded, width * rank), f"{i}.lora-a-bias": (width * rank,),
                f"{i}.lora-b": (embedded, rank * width), f"{i}.lora-b-bias": (rank * width,),
            }  # fmt: skip
    return shapes


def begun(latents: int, conditions: int, width: int, conditioning: str, rank: int, seed: int) -> Weights:
    """New weights: scales, shifts, AdaLoRA's B and what is said are zero."""
    zero = {"out", "norms", *(f"{i}.lora-b" for i in range(BLOCKS))}
    weights = starting(shapes_of(latents, conditions, width, conditioning, rank), seed, zero=frozenset(zero))
    for i in range(BLOCKS if "0.lora-a" in weights else 0):
        weights[f"{i}.lora-a"] /= math.sqrt(width)  # as a matrix [in, out] begins, which A(y) is for x
    return weights


def denoised(
    weights: Mapping[str, Tensor], noisy: Tensor, times: Tensor, condition: Tensor | None, rank: int,
    *, unasked: Tensor | None = None, kept: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What the network says of noisy latents [b, m] at times [b], of conditions [b, c] (None: of none).

    unasked [b]: where the condition is not to be seen; kept: [b, BLOCKS·w], of dropout. Differentiable.
    """
    from torch.nn.functional import silu

    x = _dense(weights, "in", noisy)
    seen = _embedded(weights, "time", _waves(times))
    y = _condition(weights, condition, unasked, len(x))
    is_lora = "0.lora-a" in weights
    # Of AdaNorm the condition is seen where the time is.
    seen = silu(seen if y is None or is_lora else seen + y)
    # A scale and a shift for each block and for what is said, all at once.
    norms = _dense(weights, "norms", seen).chunk(2 * (BLOCKS + 1), dim=-1)
    for i in range(BLOCKS):
        inner = _normed(x, *norms[2 * i : 2 * i + 2])
        if is_lora and y is not None:
            inner = adapted(weights, str(i), inner, y, rank)
        inner = silu(_dense(weights, f"{i}.first", inner))
        if kept is not None:
            inner = inner * kept[:, i * x.shape[1] : (i + 1) * x.shape[1]]
        x = x + _dense(weights, f"{i}.second", inner)
    return _dense(weights, "out", _normed(x, *norms[-2:]))


def _condition(
    weights: Mapping[str, Tensor], condition: Tensor | None, unasked: Tensor | None, count: int
) -> Tensor | None:
    """The embedded condition y [count, e], or what stands for none; None of a network that knows no conditions."""
    import torch

    if "condition.none" not in weights:
        return None
    nothing = weights["condition.none"].expand(count, -1)
    if condition is None:
        return nothing
    # A(y)·B(y) is quadratic in y as it is: more layers learn the members by heart sooner.
    is_straight = "condition" in weights
    y = condition @ weights["condition"] if is_straight else _embedded(weights, "condition", condition)
    return y if unasked is None else torch.where(unasked[:, None], nothing, y)


def adapted(weights: Mapping[str, Tensor], block: str, x: Tensor, y: Tensor, rank: int) -> Tensor:
    """x + x·A(y)·B(y) of x and y [b, w]: another low-rank matrix for each."""
    width = x.shape[-1]
    a = _dense(weights, f"{block}.lora-a", y).view(-1, width, rank)
    b = _dense(weights, f"{block}.lora-b", y).view(-1, rank, width)
    # Sums of products, and not products of matrices: one small matrix for each row is slow to multiply with.
    low = (x[:, :, None] * a).sum(1)
    changed: Tensor = x + (low[:, :, None] * b).sum(1)
    return changed


def _dense(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    import torch

    return torch.addmm(weights[f"{name}-bias"], x, weights[name])


def _embedded(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    from torch.nn.functional import silu

    return _dense(weights, f"{name}.second", silu(_dense(weights, f"{name}.first", x)))


def _normed(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    from torch.nn.functional import layer_norm

    return layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def _waves(times: Tensor) -> Tensor:
    """Sines and cosines [b, 2 waves] of times, from one turn in all of them to one in two."""
    import torch

    turns = torch.logspace(0, math.log10(TIMES / 4), _WAVES, device=times.device)
    angles = times[:, None] / TIMES * turns * math.pi
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
