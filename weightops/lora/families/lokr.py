"""LoKr: ΔW = w1 ⊗ w2, each whole or a product, w2 also with a core. Edalati et al. 2022, arXiv:2212.10650."""

from weightops.lora.family import FAMILIES, Family, Shape, Shapes


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
        rank=_rank,
        shape=_shape,
        rows=("lokr_w1", "lokr_w1_a"),
        uniform_rows=True,
        flat=True,
    ),
)
