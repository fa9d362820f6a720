"""LoRA: ΔW = up · down, for convolutions also with a Tucker core. Hu et al. 2021, arXiv:2106.09685; LyCORIS (LoCon).

A kernel is the matrix [out, in·k·k]: down [rank, in, k, k] looks at the window, up [out, rank, 1, 1] mixes. With a core
(lora_mid, "CP"), down is [rank, in, 1, 1] and the core [rank, rank, k, k] looks: ΔW = up · (mid ×₂ down).
rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) scales by alpha/√rank; LyCORIS writes alpha·√rank for it, and so does our
reader of PEFT's settings, so that alpha/rank is right for all.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weightops.lora.family import FAMILIES, Described, Family, Parts, Shape, Shapes, over_rank, same

if TYPE_CHECKING:
    from torch import Tensor


def _meet(shapes: Shapes) -> bool:
    up, down = shapes["up"], shapes["down"]
    if len(up) < 2 or not down or math.prod(up[2:]) != 1:
        return False
    if "mid" not in shapes:
        return same(up[1], down[0])
    mid = shapes["mid"]
    flat = len(down) > 1 and math.prod(down[2:]) == 1
    return flat and len(mid) > 1 and same(up[1], mid[0]) and same(mid[1], down[0])


def _rank(shapes: Shapes) -> int | None:
    return shapes["down"][0] if shapes["down"] else None


def _shape(shapes: Shapes) -> Shape | None:
    up, down = shapes["up"], shapes["down"]
    if len(up) < 2 or len(down) < 2:
        return None
    kernel = shapes["mid"][2:] if "mid" in shapes else down[2:]
    return (up[0], down[1], *kernel)


def _scale(p: Described) -> float:
    return over_rank(p.alpha, _rank(p.shapes))


def _up(p: Parts, rows: slice) -> Tensor:
    """[rows, rank], scale folded in."""
    return p["up"][rows].flatten(1) * _scale(p)


def _down(p: Parts) -> Tensor:
    """[rank, in·k·k], the core multiplied in."""
    import torch

    if "mid" not in p:
        return p["down"].flatten(1)
    return torch.einsum("mn...,ni->mi...", p["mid"], p["down"].flatten(1)).flatten(1)


def _delta(p: Parts, rows: slice) -> Tensor:
    up = _up(p, rows)
    return (up @ _down(p)).reshape(len(up), *p.shape[1:])


def _lowrank(p: Parts) -> tuple[Tensor, Tensor]:
    return _up(p, slice(None)), _down(p)


def _bias(p: Parts) -> Tensor:
    """PEFT's lora_bias: the bias of `up`, which is scaled like ΔW."""
    return p["bias"] * _scale(p)


FAMILIES.register(
    "lora",
    Family(
        "lora",
        forms=(("up", "down"), ("up", "down", "mid")),
        optional=("bias", "reshape_weight"),
        meet=_meet,
        rank=_rank,
        shape=_shape,
        rows=("up", "bias"),
        of_bias=("bias",),
        scale=_scale,
        delta=_delta,
        bias=_bias,
        lowrank=_lowrank,
        product_rank=lambda shapes: shapes["up"][1],
    ),
)
