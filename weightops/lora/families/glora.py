"""GLoRA: ΔW = b1 b2 + (W a1) a2. Chavan et al. 2023, arXiv:2306.07967. Older LyCORIS files have the pairs reversed."""

from weightops.lora.family import FAMILIES, Family, Shape, Shapes


def _reversed(shapes: Shapes) -> bool:
    """Is b1 [rank, in] and b2 [out, rank], as LyCORIS wrote them before 3.0?"""
    return shapes["b1"][0] == shapes["a1"][0] if shapes["b1"] and shapes["a1"] else False


def _rank(shapes: Shapes) -> int | None:
    return shapes["b1"][0] if _reversed(shapes) else shapes["b2"][0]


def _shape(shapes: Shapes) -> Shape | None:
    b1, b2 = shapes["b1"], shapes["b2"]
    if len(b1) < 2 or len(b2) < 2:
        return None
    return (b2[0], *b1[1:]) if _reversed(shapes) else (b1[0], *b2[1:])


FAMILIES.register("glora", Family("glora", forms=(("a1", "a2", "b1", "b2"),), rank=_rank, shape=_shape))
