"""LoKr: ΔW = w1 ⊗ w2. Edalati et al. 2022, arXiv:2212.10650 (KronA); LyCORIS.

Each factor is whole or a product, w2 also with a Tucker core. Of a convolution, ΔW flattened to [out, in·k·k] is
w1 ⊗ w2 with w2 flattened to [out2, in2·k·k]: the kernel is innermost in both.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weightops.lora.family import FAMILIES, Described, Family, Parts, Shape, Shapes, over_rank, same

if TYPE_CHECKING:
    from torch import Tensor


def _meet(shapes: Shapes) -> bool:
    return _meets(shapes, "lokr_w1", None) and _meets(shapes, "lokr_w2", shapes.get("lokr_t2"))


def _meets(shapes: Shapes, factor: str, core: Shape | None) -> bool:
    if factor in shapes:
        return len(shapes[factor]) == 2 or (factor == "lokr_w2" and len(shapes[factor]) > 2)
    a, b = shapes[f"{factor}_a"], shapes[f"{factor}_b"]
    if len(a) != 2 or len(b) < 2:
        return False
    if core is None:
        return same(a[1], b[0])
    return len(b) == 2 and len(core) > 2 and same(core[0], a[0]) and same(core[1], b[0])


def _rank(shapes: Shapes) -> int | None:
    """That of the factorised side; two whole factors have none."""
    if "lokr_w2_b" in shapes:
        return shapes["lokr_w2_b"][0] if shapes["lokr_w2_b"] else None
    return shapes["lokr_w1_b"][0] if shapes.get("lokr_w1_b") else None


def _first(shapes: Shapes) -> Shape | None:
    if "lokr_w1" in shapes:
        return shapes["lokr_w1"]
    a, b = shapes["lokr_w1_a"], shapes["lokr_w1_b"]
    return (a[0], b[1]) if len(a) == 2 and len(b) == 2 else None


def _second(shapes: Shapes) -> Shape | None:
    if "lokr_w2" in shapes:
        return shapes["lokr_w2"]
    a, b = shapes["lokr_w2_a"], shapes["lokr_w2_b"]
    if len(a) < 2 or len(b) < 2:
        return None
    if "lokr_t2" in shapes:
        return (a[1], b[1], *shapes["lokr_t2"][2:])
    return (a[0], *b[1:])


def _shape(shapes: Shapes) -> Shape | None:
    """Of a convolution whose kernel was factorised flat, [out, in·k·k]: the kernel's own axes are not in the file."""
    first, second = _first(shapes), _second(shapes)
    if first is None or second is None or len(first) < 2 or len(second) < 2:
        return None
    return (first[0] * second[0], first[1] * second[1], *second[2:])


def _scale(p: Described) -> float:
    """alpha / rank; 1 where both factors are whole, whatever alpha says, unless the trainer's rank is named.

    LyCORIS, ComfyUI and diffusers take 1, and LyCORIS writes alpha = its network_dim there. PEFT scales by alpha / r.
    """
    rank = _rank(p.shapes)
    return over_rank(p.alpha, rank if rank is not None else p.told.full_rank)


def _left(p: Parts) -> tuple[Tensor, Tensor]:
    """w1 as a product; a whole w1 is one with I, on its shorter side."""
    return _split(p["lokr_w1"]) if "lokr_w1" in p else (p["lokr_w1_a"], p["lokr_w1_b"])


def _right(p: Parts) -> tuple[Tensor, Tensor] | None:
    """w2 [out2, in2·k·k] as a product, the core multiplied in; None: it is whole."""
    import torch

    if "lokr_w2" in p:
        return None
    a, b = p["lokr_w2_a"], p["lokr_w2_b"]
    if "lokr_t2" in p:
        return a.T, torch.einsum("pq...,qi->pi...", p["lokr_t2"], b).flatten(1)
    return a, b.flatten(1)


def _split(whole: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    unit = torch.eye(min(whole.shape), dtype=whole.dtype, device=whole.device)
    return (whole, unit) if whole.shape[1] <= whole.shape[0] else (unit, whole)


def _delta(p: Parts, rows: slice) -> Tensor:
    """Row o of ΔW is row o // out2 of w1 times row o % out2 of w2, each value with each."""
    import torch

    w1 = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    product = _right(p)
    w2 = p["lokr_w2"].flatten(1) if product is None else product[0]
    wanted = torch.arange(p.shape[0], device=w1.device)[rows]
    first, second = wanted // len(w2), wanted % len(w2)
    if product is None:
        w2 = w2[second]
    elif len(wanted) < len(w2):  # a low band meets few rows of w2, a tall one meets them all, again and again
        w2 = w2[second] @ product[1]
    else:
        w2 = (w2 @ product[1])[second]
    return ((w1 * _scale(p))[first, :, None] * w2[:, None, :]).reshape(len(wanted), *p.shape[1:])


def _kronecker(p: Parts) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    a, b = _left(p)
    return (a * _scale(p), b), _right(p) or _split(p["lokr_w2"].flatten(1))


def _sides(shapes: Shapes) -> tuple[tuple[int, int], tuple[int, int]]:
    first, second = _first(shapes), _second(shapes)
    assert first is not None
    assert second is not None
    return (first[0], first[1]), (second[0], math.prod(second[1:]))


def _lowrank(p: Parts) -> tuple[Tensor, Tensor]:
    """(a1 b1) ⊗ (a2 b2) = (a1 ⊗ a2)(b1 ⊗ b2): the mixed-product property. The rank is the product of both."""
    import torch

    (a1, b1), (a2, b2) = _kronecker(p)
    return torch.kron(a1, a2.contiguous()), torch.kron(b1, b2)


def _product_rank(shapes: Shapes) -> int:
    """Of a whole factor, its shorter side."""
    first, second = shapes.get("lokr_w1"), shapes.get("lokr_w2")
    left = shapes["lokr_w1_b"][0] if first is None else min(first)
    right = shapes["lokr_w2_b"][0] if second is None else min(second[0], math.prod(second[1:]))
    return left * right


FAMILIES.register(
    "lokr",
    Family(
        "lokr",
        forms=(
            ("lokr_w1", "lokr_w2"),
            ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
            ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
            ("lokr_w1_a", "lokr_w1_b", "lokr_w2"),
            ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"),
            ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        ),
        meet=_meet,
        rank=_rank,
        shape=_shape,
        rows=("lokr_w1", "lokr_w1_a"),
        uniform_rows=True,
        flat=True,
        scale=_scale,
        delta=_delta,
        lowrank=_lowrank,
        product_rank=_product_rank,
        kronecker=_kronecker,
        kronecker_sides=_sides,
    ),
)
