"""The file that training writes is the LoRA that was trained, in every dialect, for diffusers, our loader and fuse."""

from __future__ import annotations

import functools
import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest
from trained import Trained, image, images, model, quietly, root, train, train_and_look

from weightops.diffusion.adapters import wear
from weightops.diffusion.extras import hushed
from weightops.diffusion.models import Loaded, load
from weightops.diffusion.written import auto_v1, write_lora
from weightops.files.held import Held
from weightops.lineage import read_recipe
from weightops.lora.dialects import DIALECTS
from weightops.ops.fuse import fuse
from weightops.ops.inspect import inspect

if TYPE_CHECKING:
    from pathlib import Path

    import torch

pytestmark = quietly

NEAR = 1e-5
SOME = {"rank": 8, "alpha": 4, "lr": 2e-2, "dialect": "diffusers"}
# Of a UNet's many modules a part: it is quicker.
FEW = {"targets": ("attn1.to_q", "attn2.to_k", "attn2.to_out.0")}
MORE = {
    "targets": ("attn2.to_v", "conv1", "conv_shortcut"),
    "conv_rank": 3,
    "conv_alpha": 2,
    "train_text_encoder": True,
}


@functools.cache
def runs(architecture: str, name: str) -> Trained:
    more = {"some": {}, "more": MORE, "dora": {"dora": True}, "both": {**MORE, "dora": True}}[name]
    words: dict[str, Any] = {**SOME, **({} if architecture == "flux" else FEW), **more}
    return train_and_look(root() / f"{architecture}-{name}.safetensors", architecture, **words)


@functools.cache
def shown(architecture: str, name: str) -> torch.Tensor:
    """What the network makes that was trained."""
    return image(runs(architecture, name).loaded.pipe)


@functools.cache
def fresh(architecture: str) -> Loaded:
    """The model, which wears what a test puts on it."""
    return load(model(architecture), where="test", device="cpu")


def written(architecture: str, dialect: str, name: str, folder: Path) -> Path:
    """The trained LoRA in a dialect."""
    run = runs(architecture, name)
    path = folder / (f"{dialect}.safetensors" if dialect != "peft" else dialect)
    write_lora(run.lora, run.told, path, dialect=dialect, steps=2, epoch=1, force=False)
    return path


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def as_diffusers_loads_it(architecture: str, path: Path) -> torch.Tensor:
    pipe: Any = fresh(architecture).pipe
    wear(fresh(architecture), [])
    with hushed():
        pipe.load_lora_weights(path.parent, weight_name=path.name, local_files_only=True)
        try:
            return image(pipe)
        finally:
            pipe.unload_lora_weights()


def fused(architecture: str, path: Path, folder: Path) -> torch.Tensor:
    fuse(model(architecture), path, output=folder / "fused", device="cpu")
    return image(load(folder / "fused", where="test", device="cpu").pipe)


# ------------------------------------------------------------------------------------------------ the same images

# Each dialect with each model: does diffusers' own loader read it? Others it refuses, or takes and does nothing with.
CASES = {
    ("sd15", "kohya"): True,
    ("sd15", "diffusers"): True,
    ("sd15", "peft"): False,
    ("sd15", "comfy"): False,
    ("sd15", "onetrainer"): True,
    ("sdxl", "kohya"): True,
    ("sdxl", "diffusers"): True,
    ("sdxl", "onetrainer"): True,
    ("flux", "kohya"): False,  # it takes every model for one of the released size
    ("flux", "diffusers"): True,
    ("flux", "peft"): False,
    ("flux", "comfy"): False,
    ("flux", "onetrainer"): True,
}


@pytest.mark.parametrize(("architecture", "dialect"), CASES)
def test_every_dialect_makes_the_images_of_the_network_that_was_trained(
    architecture: str, dialect: str, tmp_path: Path
) -> None:
    path = written(architecture, dialect, "some", tmp_path)
    wanted = shown(architecture, "some")
    assert apart(plain(architecture), wanted) > 1e-2
    wear(fresh(architecture), [path])
    assert fresh(architecture).loras[0].way == "adapter"
    assert apart(image(fresh(architecture).pipe), wanted) < NEAR
    if CASES[architecture, dialect]:
        assert apart(as_diffusers_loads_it(architecture, path), wanted) < NEAR
    if dialect == "kohya":
        assert apart(fused(architecture, path, tmp_path), wanted) < NEAR
    else:
        assert added(architecture, path) == pytest.approx(added_by_default(architecture), rel=1e-6)


@functools.cache
def plain(architecture: str) -> torch.Tensor:
    wear(fresh(architecture), [])
    return image(fresh(architecture).pipe)


@functools.cache
def added_by_default(architecture: str) -> dict[str, float]:
    (root() / f"{architecture}-default").mkdir()
    return added(architecture, written(architecture, "kohya", "some", root() / f"{architecture}-default"))


def added(architecture: str, path: Path) -> dict[str, float]:
    """How much fuse adds to each module. A pack may say of one that it is not changed."""
    report = fuse(model(architecture), path, output=Held("fused"), device="cpu")
    return {module["name"]: module["delta_norm"] for module in report.details["modules"] if module["delta_norm"]}


@pytest.mark.parametrize(("name", "dialect"), [("more", "kohya"), ("more", "peft"), ("both", "diffusers")])
def test_convolutions_text_encoders_and_magnitudes_are_written_too(name: str, dialect: str, tmp_path: Path) -> None:
    path = written("sd15", dialect, name, tmp_path)
    wear(fresh("sd15"), [path])
    assert fresh("sd15").loras[0].way == ("fused" if name == "both" else "adapter")
    assert apart(image(fresh("sd15").pipe), shown("sd15", name)) < NEAR
    changed = {part.component: len(part.modules) for part in runs("sd15", name).lora.parts}
    assert changed["text_encoder"] == 8
    assert sum(module.is_large for module in runs("sd15", name).lora.parts[0].modules) == 22
    if (name, dialect) == ("more", "kohya"):  # of magnitudes in text encoders diffusers takes none
        assert apart(as_diffusers_loads_it("sd15", path), shown("sd15", name)) < NEAR


@pytest.mark.parametrize("dialect", ["kohya", "comfy"])
def test_magnitudes_beside_modules_that_do_not_train_are_packed_with_them(dialect: str, tmp_path: Path) -> None:
    """A pack needs all magnitudes: those of modules that did not train are the lengths that their weights have."""
    path = written("flux", dialect, "dora", tmp_path)
    wear(fresh("flux"), [path])
    assert fresh("flux").loras[0].way == "fused"
    assert apart(image(fresh("flux").pipe), shown("flux", "dora")) < NEAR


def test_the_images_tell_one_alpha_from_another(tmp_path: Path) -> None:
    path = written("flux", "diffusers", "some", tmp_path)
    wear(fresh("flux"), [(path, 0.5)])
    assert apart(image(fresh("flux").pipe), shown("flux", "some")) > 1e-3


# ------------------------------------------------------------------------------------------------ what it says


@pytest.mark.parametrize("dialect", DIALECTS)
def test_rank_and_alpha_are_said_as_they_are(dialect: str, tmp_path: Path) -> None:
    found = inspect(written("sd15", dialect, "some", tmp_path)).to_dict()
    assert found["architecture"] == "sd15"
    count = runs("sd15", "some").report.modules
    assert found["lora"]["ranks"] == {"8": count}
    assert found["lora"]["alphas"] == {"4": count}
    assert (found["metadata"]["ss_network_dim"], found["metadata"]["ss_network_alpha"]) == ("8", "4")


def metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        found: dict[str, str] = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    return found


def test_the_metadata_says_what_was_done_in_the_fields_words(tmp_path: Path) -> None:
    course = {"batch": 2, "accumulate": 2, "lr": 3e-4, "schedule": "cosine", "warmup": 1, "steps": 2, "seed": 7}
    looks = {"snr_gamma": 5.0, "noise_offset": 0.05, "flip": True, "center_crop": True}
    train(tmp_path / "style.safetensors", "sdxl", rank=2, targets=("attn2.to_k",), **course, **looks)
    found = metadata(tmp_path / "style.safetensors")
    assert found.items() >= {
        "ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "2",
        "ss_base_model_version": "sdxl_base_v1-0", "ss_sd_model_name": "sdxl", "ss_learning_rate": "0.0003",
        "ss_optimizer": "AdamW", "ss_lr_scheduler": "cosine", "ss_lr_warmup_steps": "1", "ss_num_train_images": "4",
        "ss_num_epochs": "2", "ss_steps": "2", "ss_epoch": "2", "ss_batch_size_per_device": "2",
        "ss_gradient_accumulation_steps": "2", "ss_seed": "7", "ss_resolution": "(64, 64)", "ss_mixed_precision": "no",
        "ss_noise_offset": "0.05", "ss_min_snr_gamma": "5.0", "ss_output_name": "style",
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models", "modelspec.title": "style",
        "modelspec.prediction_type": "epsilon", "modelspec.resolution": "64x64",
    }.items()  # fmt: skip
    assert json.loads(found["ss_dataset_dirs"]) == {"sprites-4": {"n_repeats": 1, "img_count": 4}}
    tags = json.loads(found["ss_tag_frequency"])["sprites-4"]
    captions = (images() / "metadata.csv").read_text().splitlines()[1:]
    assert sum(tags.values()) == 4
    assert all(any(tag in line for line in captions) for tag in tags)
    recipe = read_recipe(found["weightops"], "")
    assert recipe["command"] == "train"
    assert recipe["words"]["noise_offset"] == 0.05
    assert recipe["data"].startswith("xxh3_128:")
    assert [entry["name"] for entry in recipe["inputs"]] == ["sdxl"]
    assert set(recipe["versions"]) >= {"torch", "diffusers", "peft"}
    # Neither a place nor an hour.
    assert str(root()) not in json.dumps(found)
    assert not {"modelspec.date", "ss_training_started_at"} & found.keys()


def test_the_hashes_are_those_of_the_tensors(tmp_path: Path) -> None:
    path = written("sd15", "kohya", "some", tmp_path)
    data = path.read_bytes()
    found = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert metadata(path)["sshs_model_hash"] == found
    assert metadata(path)["modelspec.hash_sha256"] == f"0x{found}"


def test_the_same_work_writes_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        train(folder / "lora.safetensors", seed=3)
    assert (tmp_path / "lora.safetensors").read_bytes() == (tmp_path / "elsewhere/lora.safetensors").read_bytes()


CONV = {"conv_dim": "3", "conv_alpha": "2"}


@pytest.mark.parametrize(
    ("architecture", "name", "words"),
    [
        ("sd2", "some", {"ss_base_model_version": "sd_v2_v", "ss_v2": "True", "ss_v_parameterization": "True",
                         "modelspec.architecture": "stable-diffusion-v2-768-v/lora", "modelspec.prediction_type": "v"}),
        ("flux", "some", {"ss_base_model_version": "flux1", "ss_network_module": "networks.lora_flux",
                          "modelspec.architecture": "flux-1-dev/lora", "modelspec.implementation": "diffusers"}),
        ("sd15", "more", {"ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora",
                          "ss_network_args": json.dumps(CONV)}),
        ("sd15", "both", {"ss_network_module": "lycoris.kohya",
                          "ss_network_args": json.dumps({"algo": "lora", "dora_wd": "True", **CONV})}),
    ],
)  # fmt: skip
def test_each_base_and_kind_of_lora_is_called_by_its_name(
    architecture: str, name: str, words: dict[str, str]
) -> None:  # fmt: skip
    found = metadata(root() / f"{architecture}-{name}.safetensors" if runs(architecture, name) else root())
    assert found.items() >= words.items()
    assert ("modelspec.prediction_type" in found) == (architecture != "flux")


def test_the_short_hash_of_a_file_is_that_of_the_web_uis(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "base.safetensors").write_bytes(data)
    assert auto_v1(tmp_path / "base.safetensors") == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    (tmp_path / "short.safetensors").write_bytes(data[:0x100000])
    assert auto_v1(tmp_path / "short.safetensors") is None
    assert auto_v1(tmp_path) is None
