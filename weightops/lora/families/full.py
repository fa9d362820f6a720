"""Whole differences and whole weights: diff and diff_b, w_norm and b_norm (LyCORIS), set_weight (ComfyUI).

A set weight is W' itself. ComfyUI sets it whatever the strength; here a strength means the same as everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightops.lora.family import FAMILIES, Family, Parts, Shape, Shapes

if TYPE_CHECKING:
    from torch import Tensor


def _diff(shapes: Shapes) -> Shape | None:
    return shapes.get("diff")


def _norm(shapes: Shapes) -> Shape | None:
    return shapes.get("w_norm")


def _set(shapes: Shapes) -> Shape | None:
    return shapes.get("set_weight")


def _diff_rows(p: Parts, rows: slice) -> Tensor:
    found = p["diff"][rows]
    return found.reshape(len(found), *p.shape[1:])


def _norm_rows(p: Parts, rows: slice) -> Tensor:
    found = p["w_norm"][rows]
    return found.reshape(len(found), *p.shape[1:])


def _set_rows(weight: Tensor, p: Parts, rows: slice) -> Tensor:
    found = p["set_weight"][rows]
    return found.reshape(len(found), *p.shape[1:])


FAMILIES.register(
    "full",
    Family(
        "full",
        forms=(("diff",), ("diff_b",), ("diff", "diff_b")),
        shape=_diff,
        rows=("diff", "diff_b"),
        of_bias=("diff_b",),
        delta=_diff_rows,
        bias=lambda p: p["diff_b"],
    ),
)
FAMILIES.register(
    "norm",
    Family(
        "norm",
        forms=(("w_norm",), ("b_norm",), ("w_norm", "b_norm")),
        shape=_norm,
        rows=("w_norm", "b_norm"),
        of_bias=("b_norm",),
        delta=_norm_rows,
        bias=lambda p: p["b_norm"],
    ),
)
FAMILIES.register(
    "set",
    Family(
        "set",
        forms=(("set_weight",), ("set_bias",), ("set_weight", "set_bias")),
        optional=("reshape_weight",),
        shape=_set,
        rows=("set_weight", "set_bias"),
        of_bias=("set_bias",),
        apply=_set_rows,
        bias=lambda p: p["set_bias"],
        sets=True,
    ),
)
