"""GLoRA: ΔW = b1 b2 + (W a1) a2. Chavan et al. 2023, arXiv:2306.07967. Older LyCORIS files have the pairs reversed.

A and B are the paper's two supports, one for the weight and one for the sum; its C, D and E have no place in the files.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weightops.lora.family import FAMILIES, Described, Family, Parts, Shape, Shapes, over_rank, same

if TYPE_CHECKING:
    from torch import Tensor


def _reversed(shapes: Shapes) -> bool:
    """Is b1 [rank, in] and b2 [out, rank], as LyCORIS wrote them before 3.0?

    Of a square weight both readings can be multiplied: then the rank is the shorter side, and the newer one if none is.
    """
    a1, a2, b1, b2 = (shapes[part] for part in ("a1", "a2", "b1", "b2"))
    if min(map(len, (a1, a2, b1, b2))) < 2:
        return False
    older = b2[1] == b1[0] and a2[1] == a1[0]
    newer = b1[1] == b2[0] and a1[1] == a2[0]
    return older and (not newer or b1[0] < b1[1])


def _meet(shapes: Shapes) -> bool:
    a1, a2, b1, b2 = (shapes[part] for part in _pairs(shapes))
    if min(map(len, (a1, a2, b1, b2))) < 2 or math.prod((*a1[2:], *a2[2:], *b1[2:])) != 1:
        return False
    return same(a1[1], a2[0]) and same(b1[1], b2[0]) and same(a1[0], a2[1]) and same(a1[0], b2[1])


def _pairs(shapes: Shapes) -> tuple[str, str, str, str]:
    return ("a2", "a1", "b2", "b1") if _reversed(shapes) else ("a1", "a2", "b1", "b2")


def _rank(shapes: Shapes) -> int | None:
    down = shapes["b1"] if _reversed(shapes) else shapes["b2"]
    return down[0] if down else None


def _shape(shapes: Shapes) -> Shape | None:
    b1, b2 = shapes["b1"], shapes["b2"]
    if len(b1) < 2 or len(b2) < 2:
        return None
    return (b2[0], *b1[1:]) if _reversed(shapes) else (b1[0], *b2[1:])


def _scale(p: Described) -> float:
    return over_rank(p.alpha, _rank(p.shapes))


def _apply(weight: Tensor, p: Parts, rows: slice) -> Tensor:
    """Row by row: W a1 mixes the inputs of each output. A kernel's window stays as it is."""
    import torch

    a1, a2, b1, b2 = (p[part].flatten(1) for part in _pairs(p.shapes))
    added = (b1[rows] @ b2).reshape(weight.shape)
    mixed: Tensor = torch.einsum("or...,ri->oi...", torch.einsum("oi...,ir->or...", weight, a1), a2)
    return weight + (added + mixed) * _scale(p)


FAMILIES.register(
    "glora",
    Family(
        "glora",
        forms=(("a1", "a2", "b1", "b2"),),
        meet=_meet,
        rank=_rank,
        shape=_shape,
        scale=_scale,
        apply=_apply,
    ),
)
