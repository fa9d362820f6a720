"""IA3: a factor for each output, or each input, of a module. Liu et al. 2022, arXiv:2205.05638."""

from weightops.lora.family import FAMILIES, Family

FAMILIES.register("ia3", Family("ia3", forms=(("ia3", "on_input"),)))
