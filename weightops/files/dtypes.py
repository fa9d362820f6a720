"""The format's dtype codes and their bits, written out. Knows no tensor library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dtype:
    """`bits` of one value; `kind` is one of float, int, bool, complex, scale (a bare power-of-two exponent)."""

    code: str
    bits: int
    kind: str


# In the order of the library's own enumeration: its writer lays tensors out by this order, descending.
# Source: huggingface/safetensors 0.8, safetensors/src/tensor.rs, `enum Dtype`.
DTYPES: dict[str, Dtype] = {
    "BOOL": Dtype("BOOL", 8, "bool"),
    "F4": Dtype("F4", 4, "float"),
    "F6_E2M3": Dtype("F6_E2M3", 6, "float"),
    "F6_E3M2": Dtype("F6_E3M2", 6, "float"),
    "U8": Dtype("U8", 8, "int"),
    "I8": Dtype("I8", 8, "int"),
    "F8_E5M2": Dtype("F8_E5M2", 8, "float"),
    "F8_E4M3": Dtype("F8_E4M3", 8, "float"),
    "F8_E8M0": Dtype("F8_E8M0", 8, "scale"),
    "F8_E4M3FNUZ": Dtype("F8_E4M3FNUZ", 8, "float"),
    "F8_E5M2FNUZ": Dtype("F8_E5M2FNUZ", 8, "float"),
    "I16": Dtype("I16", 16, "int"),
    "U16": Dtype("U16", 16, "int"),
    "F16": Dtype("F16", 16, "float"),
    "BF16": Dtype("BF16", 16, "float"),
    "I32": Dtype("I32", 32, "int"),
    "U32": Dtype("U32", 32, "int"),
    "F32": Dtype("F32", 32, "float"),
    "C64": Dtype("C64", 64, "complex"),
    "F64": Dtype("F64", 64, "float"),
    "I64": Dtype("I64", 64, "int"),
    "U64": Dtype("U64", 64, "int"),
}

ORDER: dict[str, int] = {code: i for i, code in enumerate(DTYPES)}

# What weighted sums and the like are computed on. F4, F6 and F8_E8M0 are parts of block-scaled formats:
# without the scales beside them their values mean nothing, so they are copied, never calculated with.
ARITHMETIC = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})

# The words of the command line for output dtypes.
DTYPE_WORDS: dict[str, str] = {
    "fp32": "F32",
    "fp16": "F16",
    "bf16": "BF16",
    "fp8_e4m3": "F8_E4M3",
    "fp8_e5m2": "F8_E5M2",
}
