"""verify() reads what was written: it passes good work and catches a flipped byte."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import save

import weightops
from weightops.errors import ValueRefused
from weightops.files.checkpoint import open_checkpoint
from weightops.ops.merge import _settings, plan_merge
from weightops.ops.verify import ulps, verify

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip
MERGED = "model.diffusion_model.out.2.weight"
COPIED = "first_stage_model.decoder.conv_in.weight"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def random(seed: int, dtype: torch.dtype, count: int = 4000) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(dtype: torch.dtype) -> tuple[str, str]:
    for number, name in enumerate("ab"):
        tensors = {MERGED: random(number, dtype), COPIED: random(number + 2, dtype), "ids": torch.arange(5)}
        save(Path(f"{name}.safetensors"), tensors)
    return "a.safetensors", "b.safetensors"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("words", [{"alpha": 0.7}, {"alpha": 2.5}, {"dtype": "fp16"}], ids=str)
def test_good_work_passes(dtype: torch.dtype, words: dict[str, Any]) -> None:
    found = weightops.merge(*pair(dtype), output="out.safetensors", check=True, **words).verified
    assert found is not None
    assert found["blocks"] == 3
    assert found["values"] >= 8000
    assert 0.0 <= found["largest_ulp"] <= 1.0


def test_good_work_passes_where_operands_cancel_out() -> None:
    """float32 leaves 1e-8 where 0.7·a + 0.3·b is nothing: many units of so small a BF16, and yet as promised."""
    a = random(0, torch.bfloat16, 100_000)
    save(Path("a.safetensors"), {MERGED: a})
    save(Path("b.safetensors"), {MERGED: (a.double() * -7 / 3).bfloat16()})
    report = weightops.merge("a.safetensors", "b.safetensors", output="o.safetensors", alpha=0.3, check=True)
    assert report.verified is not None


def test_good_work_passes_with_overflows_that_are_allowed() -> None:
    for name in "ab":
        save(Path(f"{name}.safetensors"), {MERGED: torch.tensor([1e6, torch.inf, torch.nan, 1.0])})
    for dtype in ("fp16", "fp8_e4m3", "fp8_e5m2"):
        report = weightops.merge(
            "a.safetensors", "b.safetensors", output="o.safetensors", dtype=dtype, allow_nonfinite=True, check=True,
            force=True,
        )  # fmt: skip
        assert report.verified is not None


@pytest.mark.parametrize("dtype", DTYPES[:6], ids=str)
@pytest.mark.parametrize("key", [MERGED, COPIED, "ids"])
@pytest.mark.parametrize("flip", [0xFF, 0x7F, 0x80])
def test_a_flipped_byte_is_caught(dtype: torch.dtype, key: str, flip: int) -> None:
    models = pair(dtype)
    weightops.merge(*models, output="out.safetensors", alpha=0.7)
    with open_checkpoint("out.safetensors") as written:
        info = written.tensors[key]
    data = bytearray(Path("out.safetensors").read_bytes())
    size = info.spec.nbytes // info.spec.values
    at = info.start + 3 * size + size - 1  # the highest byte of the fourth value: sign and exponent
    data[at] ^= flip
    Path("out.safetensors").write_bytes(data)
    words: Mapping[str, Any] = {
        "vae": "1", "text_encoder": "merge", "dtype": "keep", "drop": (), "on_mismatch": "error", "strict": False,
        "allow_nonfinite": False,
    }  # fmt: skip
    settings = _settings(2, 0.7, None, True, False, None, {}, **words)
    opened = [open_checkpoint(m) for m in models]
    with opened[0], opened[1], pytest.raises(ValueRefused) as caught:
        verify(plan_merge(opened, settings).plan, Path("out.safetensors"), label="out.safetensors")
    assert str(caught.value).startswith(f"out.safetensors: tensor '{key}' is ")
    assert str(caught.value).endswith(" units in the last place off its float64 reference")
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    ("found", "exact", "units"),
    [
        (1.0, 1.0, 0.0),
        (1.0009765625, 1.0, 1.0),
        (0.99951171875, 1.0, 0.5),
        (2.0, 2.0009765625, 0.5),
        (6e-8, 0.0, 1.0),
        (6e-5, 0.0, 1006.0),
        (float("nan"), 1.0, float("inf")),
        (1.0, float("nan"), float("inf")),
        (float("nan"), float("nan"), 0.0),
        (float("inf"), 1e9, 0.0),
        (float("inf"), 1.0, float("inf")),
        (-float("inf"), 1e9, float("inf")),
        (65504.0, 1e9, 1907.0),
    ],
)
def test_units_in_the_last_place_of_fp16(found: float, exact: float, units: float) -> None:
    distance = ulps(torch.tensor([found]).half(), torch.tensor([exact], dtype=torch.float64))
    assert distance == pytest.approx(units, rel=1e-2)


def test_units_of_nothing_are_none() -> None:
    assert ulps(torch.zeros(0), torch.zeros(0, dtype=torch.float64)) == 0.0
