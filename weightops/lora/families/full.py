"""Whole differences and whole weights: diff, diff_b, w_norm, b_norm, set_weight. Source: FORMATS §6; LyCORIS."""

from weightops.lora.family import FAMILIES, Family, Shape, Shapes


def _diff(shapes: Shapes) -> Shape | None:
    return shapes.get("diff")


def _norm(shapes: Shapes) -> Shape | None:
    return shapes.get("w_norm")


def _set(shapes: Shapes) -> Shape | None:
    return shapes.get("set_weight")


FAMILIES.register(
    "full",
    Family("full", forms=(("diff",), ("diff_b",), ("diff", "diff_b")), shape=_diff, rows=("diff", "diff_b")),
)
FAMILIES.register(
    "norm",
    Family("norm", forms=(("w_norm",), ("b_norm",), ("w_norm", "b_norm")), shape=_norm, rows=("w_norm", "b_norm")),
)
FAMILIES.register(
    "set",
    Family(
        "set",
        forms=(("set_weight",), ("set_bias",), ("set_weight", "set_bias")),
        optional=("reshape_weight",),
        shape=_set,
        rows=("set_weight", "set_bias"),
    ),
)
