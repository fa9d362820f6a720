"""NaN and Inf are found in the bytes of every floating dtype, exactly where torch sees them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weightops.engine.finite import first_nonfinite
from weightops.engine.tensors import TORCH_DTYPES
from weightops.files.dtypes import DTYPES

PART = 1 << 18  # values looked at in one go

CODES = {
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", None),
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(bytearray(tensor.view(torch.uint8).numpy().tobytes()))


@pytest.mark.parametrize("dtype", CODES)
def test_every_code_is_judged_as_torch_judges_it(dtype: str) -> None:
    if CODES[dtype] is None:
        pytest.skip(f"this torch does not know {dtype}")
    bits = DTYPES[dtype].bits
    codes = torch.arange(2**bits, dtype=torch.int32).to(torch.uint8 if bits == 8 else torch.uint16)
    data = bytes_of(codes)
    finite = codes.view(CODES[dtype]).float().isfinite()
    size = bits // 8
    found = [first_nonfinite(data[i * size : (i + 1) * size], dtype) is None for i in range(2**bits)]
    assert found == finite.tolist()
    assert not all(found)
    assert first_nonfinite(data, dtype) == finite.tolist().index(False)


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_wide_codes_are_judged_as_numpy_judges_them(dtype: str) -> None:
    word, kind = {"F32": ("<u4", "<f4"), "F64": ("<u8", "<f8")}[dtype]
    nbits, fraction = {"F32": (32, 23), "F64": (64, 52)}[dtype]
    chance = np.random.default_rng(0)
    ones = ((1 << nbits - 1 - fraction) - 1) << fraction  # the exponent of NaN and Inf
    edges = [0, 1, ones - 1, ones, ones + 1, (1 << nbits) - 1, 1 << nbits - 1, ones | 1 << nbits - 1, ones >> 1]
    codes = np.array([*edges, *chance.integers(0, 1 << nbits, 3000, dtype=np.uint64)], np.uint64)
    codes[1000:1500] |= np.uint64(ones)
    values = codes.astype(word)
    finite = np.isfinite(values.view(kind))
    assert 500 < (~finite).sum() < 1500
    data = values.tobytes()
    size = nbits // 8
    for i in range(len(values)):
        assert (first_nonfinite(memoryview(data)[i * size : (i + 1) * size], dtype) is None) == finite[i]


@pytest.mark.parametrize("dtype", ["F16", "F32", "F8_E4M3", "F8_E5M2FNUZ"])
@pytest.mark.parametrize("index", [0, 1, PART - 1, PART, PART + 1, 2 * PART + 6])
def test_the_first_one_is_found_wherever_it_stands(dtype: str, index: int) -> None:
    values = torch.ones(2 * PART + 7).to(TORCH_DTYPES[dtype])
    assert first_nonfinite(bytes_of(values), dtype) is None
    as_float = values.float()
    as_float[index:] = float("nan")
    assert first_nonfinite(bytes_of(as_float.to(values.dtype)), dtype) == index


def test_either_part_of_a_complex_value_may_be_the_bad_one() -> None:
    values = torch.ones(100, dtype=torch.complex64)
    assert first_nonfinite(bytes_of(values), "C64") is None
    for bad in (complex(1, float("inf")), complex(float("nan"), 0)):
        values[70] = bad
        assert first_nonfinite(bytes_of(values), "C64") == 70


@pytest.mark.parametrize("dtype", [d for d in DTYPES if DTYPES[d].kind in ("bool", "int") or DTYPES[d].bits < 8])
def test_dtypes_without_such_values_have_none(dtype: str) -> None:
    assert first_nonfinite(memoryview(bytes(range(256)) * 3), dtype) is None
    assert first_nonfinite(memoryview(b"\xff" * 48), dtype) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_has_no_nonfinite_value(dtype: str) -> None:
    assert first_nonfinite(memoryview(b""), dtype) is None


def test_a_short_part_after_a_long_one_is_not_judged_by_what_the_long_one_left() -> None:
    assert first_nonfinite(bytes_of(torch.full((5000,), float("nan"))), "F32") == 0
    assert first_nonfinite(bytes_of(torch.ones(10)), "F32") is None
    assert first_nonfinite(bytes_of(torch.full((10,), float("inf"), dtype=torch.float16)), "F16") == 0
    assert first_nonfinite(bytes_of(torch.ones(11, dtype=torch.float64)), "F64") is None


def test_bytes_need_not_be_aligned() -> None:
    values = torch.ones(100)
    values[41] = float("inf")
    data = memoryview(b"x" + bytes(bytes_of(values)))
    assert first_nonfinite(data[1:], "F32") == 41
