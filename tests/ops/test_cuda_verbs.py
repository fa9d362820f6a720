"""fuse, extract, resize, combine and convert --to lora on a CUDA device: what the CPU makes.

To the last place, or to the error's own tolerance. What is done at once there is done so on a CPU in test_at_once.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import save
from safetensors.torch import load_file
from test_at_once import VERBS, assert_same, made_by, prepare

from weightops.errors import ValueRefused
from weightops.ops.extract import extract
from weightops.ops.fuse import fuse
from weightops.ops.resize import resize

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = {"a": (640, 640), "b": (640, 640), "c": (640, 640), "d": (320, 2048), "e": (256, 64, 3, 3)}


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    base, lora = {}, {}
    for name, shape in SHAPES.items():
        base[f"block.{name}.weight"] = 0.03 * torch.randn(shape, generator=generator)
        lora[f"lora_unet_block_{name}.lora_down.weight"] = 0.02 * torch.randn(8, *shape[1:], generator=generator)
        ones = (1,) * (len(shape) - 2)
        lora[f"lora_unet_block_{name}.lora_up.weight"] = 0.1 * torch.randn(shape[0], 8, *ones, generator=generator)
    save(Path("f32.safetensors"), base)
    save(Path("bf16.safetensors"), {k: t.bfloat16() for k, t in base.items()})
    save(Path("lora.safetensors"), lora)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("file", ["f32.safetensors", "bf16.safetensors"])
def test_fuse_makes_what_the_cpu_makes(file: str, rounding: str) -> None:
    cpu, cuda = (
        fuse(file, "lora.safetensors:0.7", rounding=rounding, device=device, output=f"{device}.safetensors")
        for device in ("cpu", "cuda")
    )
    ours, theirs = load_file("cpu.safetensors"), load_file("cuda.safetensors")
    for key, tensor in ours.items():
        # A value beside the middle of two may be rounded to the other; by chance, any may.
        step = 0.0 if tensor.dtype is torch.float32 else 2**-7
        torch.testing.assert_close(theirs[key].double(), tensor.double(), rtol=step + 1e-6, atol=1e-7)
    assert cuda.details["survived"] == pytest.approx(cpu.details["survived"], abs=0.01)


def test_extract_groups_equal_shapes_and_finds_what_the_cpu_finds() -> None:
    fuse("f32.safetensors", "lora.safetensors", output="tuned.safetensors", device="cpu")
    for device in ("cpu", "cuda"):
        report = extract("tuned.safetensors", "f32.safetensors", rank=8, device=device, output=f"{device}.safetensors",
                         verify=True)  # fmt: skip
        assert report.details["error"] < 1e-4
        assert len(report.details["modules"]) == len(SHAPES)
    ours, theirs = load_file("cpu.safetensors"), load_file("cuda.safetensors")
    assert ours.keys() == theirs.keys()
    for name in SHAPES:
        product = [
            t[f"lora_unet_block_{name}.lora_up.weight"].flatten(1).double()
            @ t[f"lora_unet_block_{name}.lora_down.weight"].flatten(1).double()
            for t in (ours, theirs)
        ]
        torch.testing.assert_close(product[1], product[0], rtol=0, atol=1e-5 * float(product[0].norm()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("verb", VERBS)
def test_factors_are_those_that_the_cpu_makes(verb: str, dtype: torch.dtype) -> None:
    """Of every family, many modules at once; what goes by chance, too: the CPU draws for both."""
    prepare(dtype)
    one, other = (made_by(verb, device, device) for device in ("cpu", "cuda"))
    assert_same(one, other, 1e-5 if dtype is torch.float32 else 2e-3)


def test_a_module_that_is_not_finite_is_named_on_the_device() -> None:
    prepare()
    tensors = load_file("b.safetensors")
    broken = sorted(key for key in tensors if key.endswith("lora_up.weight"))[3]
    tensors[broken][0, 0] = float("nan")
    save(Path("b.safetensors"), tensors)
    with pytest.raises(ValueRefused, match=broken.partition(".")[0]):
        resize("b.safetensors", rank=4, device="cuda", output="x.safetensors")
    assert not Path("x.safetensors").exists()


def test_a_real_size_of_factors_is_cut_on_the_device() -> None:
    """Shapes, ranks and dtypes of SDXL's attentions, twenty at once."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for n in range(20):
        tensors[f"lora_unet_block_{n}.lora_down.weight"] = 0.02 * torch.randn(64, 1280, generator=generator)
        tensors[f"lora_unet_block_{n}.lora_up.weight"] = 0.02 * torch.randn(1280, 64, generator=generator)
    save(Path("lora.safetensors"), {key: tensor.half() for key, tensor in tensors.items()})
    reports = [resize("lora.safetensors", rank=16, device=device, output=f"{device}.safetensors", verify=True)
               for device in ("cpu", "cuda")]  # fmt: skip
    assert reports[1].details["error"] == pytest.approx(reports[0].details["error"], rel=1e-4)
