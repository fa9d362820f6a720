"""A .ckpt, shards and a diffusers folder merge with a single file of the same names, equal to arithmetic by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from conftest import save
from safetensors.torch import load_file

import weightops

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    Maker = Callable[[str, Mapping[str, Tensor]], str]

SINGLE = {
    "model.diffusion_model.out.2.weight": (3, 5, 1, 1),
    "model.diffusion_model.out.2.bias": (3,),
    "first_stage_model.decoder.conv_in.weight": (4, 2),
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": (6,),
}
FOLDER = {
    "unet.conv_out.weight": (3, 5, 1, 1),
    "unet.conv_out.bias": (3,),
    "vae.decoder.conv_in.weight": (4, 2),
    "text_encoder.text_model.final_layer_norm.weight": (6,),
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def random(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator).half() for key, shape in shapes.items()}


def single(name: str, tensors: Mapping[str, Tensor]) -> str:
    save(Path(f"{name}.safetensors"), tensors)
    return f"{name}.safetensors"


def ckpt(name: str, tensors: Mapping[str, Tensor]) -> str:
    torch.save({"state_dict": dict(tensors), "global_step": 840000, "epoch": 3}, f"{name}.ckpt")
    return f"{name}.ckpt"


def legacy(name: str, tensors: Mapping[str, Tensor]) -> str:
    torch.save(dict(tensors), f"{name}.pt", _use_new_zipfile_serialization=False)
    return f"{name}.pt"


def strided(name: str, tensors: Mapping[str, Tensor]) -> str:
    """Every matrix transposed in memory, and all bytes in one storage."""
    torch.save({k: v.mT.contiguous().mT if v.ndim == 2 else v for k, v in tensors.items()}, f"{name}.pth")
    return f"{name}.pth"


def shards(name: str, tensors: Mapping[str, Tensor]) -> str:
    keys, weight_map = list(tensors), {}
    for number, part in enumerate((keys[:1], keys[1:3], keys[3:])):
        file = f"{name}-{number + 1:05}-of-00003.safetensors"
        save(Path(file), {key: tensors[key] for key in part})
        weight_map |= dict.fromkeys(part, file)
    weight_map = {key: Path(file).name for key, file in weight_map.items()}
    Path(f"{name}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return f"{name}.safetensors.index.json"


def diffusers(name: str, tensors: Mapping[str, Tensor]) -> str:
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    for component in dict.fromkeys(key.split(".")[0] for key in tensors):
        index[component] = ["diffusers", "AModel"]
        part = {key.removeprefix(f"{component}."): t for key, t in tensors.items() if key.startswith(f"{component}.")}
        (Path(name) / component).mkdir(parents=True)
        file = "model.safetensors" if component == "text_encoder" else "diffusion_pytorch_model.safetensors"
        save(Path(name) / component / file, part)
    (Path(name) / "model_index.json").write_text(json.dumps(index))
    return name


@pytest.mark.parametrize("place", ["first", "second", "both"])
@pytest.mark.parametrize("maker", [ckpt, legacy, strided, shards, diffusers], ids=lambda m: m.__name__)
def test_every_container_merges_with_a_single_file(maker: Maker, place: str) -> None:
    shapes = FOLDER if maker is diffusers else SINGLE
    a, b = random(shapes, 1), random(shapes, 2)
    first = (single if place == "second" else maker)("a", a)
    second = (single if place == "first" else maker)("b", b)
    report = weightops.merge(first, second, output="out.safetensors", alpha=0.7, verify=True)
    found = load_file("out.safetensors")
    assert found.keys() == a.keys()
    for key, tensor in found.items():
        exact = a[key].double() if ".decoder." in key else 0.3 * a[key].double() + 0.7 * b[key].double()
        assert tensor.dtype is torch.float16
        assert ((tensor.double() - exact).abs() <= 2.0**-11 * exact.abs() + 2.0**-25).all(), key
    assert (len(report.account.used), report.account.kept) == (3, [])
    assert [entry["path"] for entry in report.inputs] == [first, second]
    assert report.summary == "0.3 × a + 0.7 × b"
    assert report.verified is not None


def test_what_a_pickle_holds_beside_its_weights_is_reported() -> None:
    a = random(SINGLE, 1)
    report = weightops.merge(single("a", a), ckpt("b", a), output="out.safetensors")
    assert {(u.source, u.key, u.asked) for u in report.account.unused if "decoder" not in u.key} == {
        ("b.ckpt", "global_step", True),
        ("b.ckpt", "epoch", True),
    }


def test_shards_may_be_named_by_their_folder() -> None:
    a = random(SINGLE, 1)
    Path("sharded-1.5").mkdir()
    shards("sharded-1.5/model", a)
    report = weightops.merge("sharded-1.5", single("b", a))
    assert report.output == "sharded-1.5+b-0.5.safetensors"
    assert all(torch.equal(tensor, a[key]) for key, tensor in load_file(report.output).items())
