"""OFT, BOFT: W' = R W with orthogonal blocks. Qiu et al. 2023, arXiv:2306.07280; Liu et al. 2023, arXiv:2311.06243."""

from weightops.lora.family import FAMILIES, Family

FAMILIES.register("oft", Family("oft", forms=(("oft_blocks",), ("oft_blocks", "rescale"))))
# PEFT's second version keeps the upper triangles of skew matrices, and turns the inputs.
FAMILIES.register("oftv2", Family("oftv2", forms=(("oft_R",),)))
