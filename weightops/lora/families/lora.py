"""LoRA: ΔW = up · down, for convolutions also with a Tucker core. Hu et al. 2021, arXiv:2106.09685; LyCORIS."""

from weightops.lora.family import FAMILIES, Family, Shape, Shapes


def _rank(shapes: Shapes) -> int | None:
    return shapes["down"][0] if shapes["down"] else None


def _shape(shapes: Shapes) -> Shape | None:
    up, down = shapes["up"], shapes["down"]
    if len(up) < 2 or len(down) < 2:
        return None
    kernel = shapes["mid"][2:] if "mid" in shapes else down[2:]
    return (up[0], down[1], *kernel)


FAMILIES.register(
    "lora",
    Family("lora", forms=(("up", "down"), ("up", "down", "mid")), optional=("bias",), rank=_rank, shape=_shape,
           rows=("up", "bias")),
)  # fmt: skip
