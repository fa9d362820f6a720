"""LoHa: ΔW = (w1_a w1_b) ∘ (w2_a w2_b). Hyeon-Woo et al. 2021, arXiv:2108.06098 (FedPara); LyCORIS.

For convolutions also with Tucker cores, one for each matrix: w_a [rank, out], w_b [rank, in], t [rank, rank, k, k].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightops.lora.family import FAMILIES, Described, Family, Parts, Shape, Shapes, over_rank, same

if TYPE_CHECKING:
    from torch import Tensor


def _meet(shapes: Shapes) -> bool:
    a1, b1, a2, b2 = (shapes[part] for part in _FACTORS)
    if {len(a1), len(b1), len(a2), len(b2)} != {2}:
        return False
    if "hada_t1" not in shapes:
        return same(a1[1], b1[0]) and same(a2[1], b2[0]) and same(a1[0], a2[0]) and same(b1[1], b2[1])
    t1, t2 = shapes["hada_t1"], shapes["hada_t2"]
    if len(t1) < 3 or t1[2:] != t2[2:] or not (same(a1[1], a2[1]) and same(b1[1], b2[1])):
        return False
    return all(same(t[0], a[0]) and same(t[1], b[0]) for t, a, b in ((t1, a1, b1), (t2, a2, b2)))


def _rank(shapes: Shapes) -> int | None:
    return shapes["hada_w1_b"][0] if shapes["hada_w1_b"] else None


def _shape(shapes: Shapes) -> Shape | None:
    a, b = shapes["hada_w1_a"], shapes["hada_w1_b"]
    if len(a) != 2 or len(b) != 2:
        return None
    if "hada_t1" in shapes:
        return (a[1], b[1], *shapes["hada_t1"][2:])
    return (a[0], b[1])


def _scale(p: Described) -> float:
    return over_rank(p.alpha, _rank(p.shapes))


def _factor(p: Parts, a: str, b: str, t: str, rows: slice) -> tuple[Tensor, Tensor]:
    """One of the two matrices that are multiplied, as a product: [rows, rank] and [rank, in·k·k]."""
    import torch

    if t in p:
        return p[a].T[rows], torch.einsum("pq...,qi->pi...", p[t], p[b]).flatten(1)
    return p[a][rows], p[b]


def _factors(p: Parts, rows: slice) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    first = _factor(p, "hada_w1_a", "hada_w1_b", "hada_t1", rows)
    return first, _factor(p, "hada_w2_a", "hada_w2_b", "hada_t2", rows)


def _delta(p: Parts, rows: slice) -> Tensor:
    (a1, b1), (a2, b2) = _factors(p, rows)
    return (((a1 * _scale(p)) @ b1) * (a2 @ b2)).reshape(len(a1), *p.shape[1:])


def _lowrank(p: Parts) -> tuple[Tensor, Tensor]:
    """Rank² columns: (a1 b1) ∘ (a2 b2) = (a1 • a2)(b1 * b2), all products of two values of a row (• of a column, *).

    Source: Khatri & Rao 1968; Slyusar 1998, the face-splitting product.
    """
    (a1, b1), (a2, b2) = _factors(p, slice(None))
    up = (a1 * _scale(p))[:, :, None] * a2[:, None, :]
    down = b1[:, None, :] * b2[None, :, :]
    return up.flatten(1), down.flatten(0, 1)


_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
FAMILIES.register(
    "loha",
    Family(
        "loha",
        forms=(_FACTORS, (*_FACTORS, "hada_t1", "hada_t2")),
        meet=_meet,
        rank=_rank,
        shape=_shape,
        rows=("hada_w1_a", "hada_w2_a"),
        flat=True,
        scale=_scale,
        delta=_delta,
        lowrank=_lowrank,
        product_rank=lambda shapes: shapes["hada_w1_b"][0] * shapes["hada_w2_b"][0],
    ),
)
