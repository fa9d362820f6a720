"""verify() reads what was written: it passes good work and catches a flipped byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import save

import weightops
from weightops.engine.run import run
from weightops.errors import ValueRefused
from weightops.files.checkpoint import open_checkpoint
from weightops.files.folder import OutputFile
from weightops.files.tensor import Slot, TensorSpec
from weightops.merging.recipe import Model, Recipe, merged
from weightops.ops.merge_plan import Wish, plan_merge
from weightops.ops.verify import ulps, verify
from weightops.plan import Grain, Input, Plan, Task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from weightops.files.checkpoint import Checkpoint
    from weightops.plan import Block

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
    found = weightops.merge(*pair(dtype), output="out.safetensors", verify=True, **words).verified
    assert found is not None
    assert found["blocks"] == 3
    assert found["values"] >= 8000
    assert 0.0 <= found["largest_ulp"] <= 1.0


def test_good_work_passes_where_operands_cancel_out() -> None:
    """float32 leaves 1e-8 where 0.7·a + 0.3·b is nothing: many units of so small a BF16, and yet as promised."""
    a = random(0, torch.bfloat16, 100_000)
    save(Path("a.safetensors"), {MERGED: a})
    save(Path("b.safetensors"), {MERGED: (a.double() * -7 / 3).bfloat16()})
    report = weightops.merge("a.safetensors", "b.safetensors", output="o.safetensors", alpha=0.3, verify=True)
    assert report.verified is not None


def test_good_work_passes_with_overflows_that_are_allowed() -> None:
    for name in "ab":
        save(Path(f"{name}.safetensors"), {MERGED: torch.tensor([1e6, torch.inf, torch.nan, 1.0])})
    for dtype in ("fp16", "fp8_e4m3", "fp8_e5m2"):
        report = weightops.merge(
            "a.safetensors", "b.safetensors", output="o.safetensors", dtype=dtype, allow_nonfinite=True, verify=True,
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
    root = merged("weighted_sum", [Model("a"), Model("b")], {"weights": (1 - 0.7, 0.7)})
    recipe = Recipe(root, Model("a"), (Model("a"), Model("b")))
    opened = [open_checkpoint(m) for m in models]
    plan = plan_merge(recipe, dict(zip("ab", opened, strict=True)), Wish()).planned.plan
    with opened[0], opened[1], pytest.raises(ValueRefused) as caught:
        verify(plan, Path("out.safetensors"), label="out.safetensors")
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


# ------------------------------------------------------------------------------------------------ any plan


def turned(inputs: Sequence[memoryview], outputs: Sequence[memoryview], _block: Block) -> None:
    outputs[0][:] = inputs[0][::-1]


def fours(_inputs: Sequence[memoryview], outputs: Sequence[memoryview], _block: Block) -> None:
    outputs[0][:] = bytes([4]) * len(outputs[0])


def fused(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block) -> None:
    w, up, down = (t if t.dtype == torch.float64 else t.float() for t in inputs)
    outputs[0].copy_(w + up @ down)


def halves(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block) -> None:
    """Two outputs of different heights, from one whole matrix."""
    outputs[0].copy_(inputs[0][:, :2] / 2)
    outputs[1].copy_(inputs[0][:2] / 2)


def any_plan(source: Checkpoint) -> Plan:
    w, up, down = (source.slot(key) for key in ("w", "up", "down"))
    outputs = {
        "turned": w.spec, "fours": TensorSpec("U8", (70,)), "fused": w.spec, "copied": w.spec,
        "left": TensorSpec("BF16", (300, 2)), "top": TensorSpec("BF16", (2, 400)), "none": TensorSpec("F16", (0, 3)),
    }  # fmt: skip
    slots = {key: Slot(key, spec) for key, spec in outputs.items()}
    tasks = (
        Task("turned", (Input(0, w),), (slots["turned"],), turned, Grain.TENSOR, raw=True),
        Task("fours", (), (slots["fours"],), fours, raw=True),
        Task("fused", (Input(0, w), Input(0, up), Input(0, down, shared=True)), (slots["fused"],), fused),
        Task("copied", (Input(0, w),), (slots["copied"],)),
        Task("halves", (Input(0, w),), (slots["left"], slots["top"]), halves, Grain.TENSOR),
        Task("none", (), (slots["none"],), fours, raw=True),
    )
    files = (
        OutputFile("a/1.safetensors", {key: f"{key}.weight" for key in ("turned", "fours", "fused", "top")}),
        OutputFile("2.safetensors", {key: key for key in ("copied", "left", "none")}),
    )
    return Plan((source,), outputs, tasks, files=files)


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("flipped", [None, "turned", "fours", "fused", "copied", "left", "top"])
def test_any_plan_is_checked_wherever_its_tensors_stand(tmp_path: Path, folder: bool, flipped: str | None) -> None:
    """Whole tensors, shared inputs, several outputs, bytes, none at all; under other names, in several files."""
    half = torch.float16
    made = torch.Generator().manual_seed(0)
    tensors = {k: torch.randn(*s, generator=made).to(half) for k, s in (("w", (300, 400)), ("up", (300, 4)))}
    tensors["down"] = torch.randn(4, 400, generator=made).to(half)
    with open_checkpoint(save(tmp_path / "in.safetensors", tensors)) as source:
        plan = any_plan(source)
        if not folder:
            plan = replace(plan, files=())
        run(plan, tmp_path / "out", memory=1 << 24)
        if flipped is None:
            found = verify(plan, tmp_path / "out", label="out")
            assert found["blocks"] == 6
            assert found["values"] == 2 * 300 * 400 + 70 + 2 * 300 * 400 + 300 * 2 + 2 * 400
            assert found["largest_ulp"] <= 0.6
            return
        places = {key: (f.path, name) for f in plan.files for key, name in f.keys.items()}
        path, name = places.get(flipped, ("", flipped))
        with open_checkpoint(tmp_path / "out" / path) as written:
            info = written.tensors[name]
        data = bytearray((tmp_path / "out" / path).read_bytes())
        data[info.start + 3] ^= 0x7F
        (tmp_path / "out" / path).write_bytes(data)
        task = "halves" if flipped in ("left", "top") else flipped
        with pytest.raises(ValueRefused, match=rf"^out: tensor '{task}' is .* off its float64 reference$"):
            verify(plan, tmp_path / "out", label="out")
