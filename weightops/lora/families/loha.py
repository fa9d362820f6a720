"""LoHa: ΔW = (w1_a w1_b) ∘ (w2_a w2_b), of convolutions also with cores. Hyeon-Woo et al. 2021, arXiv:2108.06098."""

from weightops.lora.family import FAMILIES, Family, Shape, Shapes


def _rank(shapes: Shapes) -> int | None:
    return shapes["hada_w1_b"][0] if shapes["hada_w1_b"] else None


def _shape(shapes: Shapes) -> Shape | None:
    a, b = shapes["hada_w1_a"], shapes["hada_w1_b"]
    if len(a) != 2 or len(b) != 2:
        return None
    if "hada_t1" in shapes:
        # Tucker: w_a is [rank, out], w_b [rank, in].
        return (a[1], b[1], *shapes["hada_t1"][2:])
    return (a[0], b[1])


_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
FAMILIES.register(
    "loha",
    Family("loha", forms=(_FACTORS, (*_FACTORS, "hada_t1", "hada_t2")), rank=_rank, shape=_shape,
           rows=("hada_w1_a", "hada_w2_a"), flat=True),
)  # fmt: skip
