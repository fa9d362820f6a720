"""convert from the command line: words in, a folder or a file and its report out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commandline import weightops_here
from conftest import save
from safetensors.torch import load_file

from weightops.ops.layout import LAYOUTS

UNET = {
    "model.diffusion_model.input_blocks.0.0.weight": torch.ones(64, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.1.proj_in.weight": torch.ones(64, 64, 1, 1),
    "model.diffusion_model.input_blocks.1.1.proj_in.bias": torch.ones(64),
    "model.diffusion_model.input_blocks.10.0.in_layers.2.weight": torch.rand(64, 64, 3, 3),
    "model_ema.decay": torch.tensor(0.5),
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("a.safetensors"), UNET)


def test_the_layouts_of_the_help_are_those_of_the_library() -> None:
    done = weightops_here("convert", "--help")
    assert f"[{'|'.join(LAYOUTS)}" in done.out
    assert "[epsilon|v_prediction]" in done.out


def test_a_layout_is_written_checked_and_reported() -> None:
    done = weightops_here("convert", "a.safetensors", "--to", "comfy", "--check", "--shard-size", "20KB")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == "Stable Diffusion 1.x, original → comfy: 1 component, 5 tensors"
    assert "0 used, 5 copied, 0 unused" in lines
    assert "       checked: 5 tensors came back, 173.3 kB, byte for byte" in lines
    assert Path("a-sharded/model.safetensors.index.json").is_file()


def test_what_is_lost_is_said_on_stderr_and_counted(tmp_path: Path) -> None:
    words = ["convert", "a.safetensors", "--to", "diffusers", "--json"]
    done = weightops_here(*words, "--like", "like")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[0] == "error: --like: no such folder: like"
    for folder, name, text in (
        ("unet", "config.json", "{}"),
        ("scheduler", "scheduler_config.json", "{}"),
    ):
        (Path("like") / folder).mkdir(parents=True)
        (Path("like") / folder / name).write_text(text)
    done = weightops_here(*words, "--like", "like")
    assert done.code == 1
    assert done.err.splitlines() == [
        "error: a.safetensors: has no tensor conv_out.weight, from which its config.json follows"
    ]
    done = weightops_here(
        "convert", "a.safetensors", "--to", "original", "--drop", "ema", "--json", "-o", "b.safetensors"
    )
    found = json.loads(done.out)
    assert found["components"] == [
        {"component": "unet", "tensors": 4, "copied": 4, "cast": 0, "split": 0, "fused": 0, "dropped": 0},
        {"component": "ema", "tensors": 1, "copied": 0, "cast": 0, "split": 0, "fused": 0, "dropped": 1},
    ]
    assert "checked" not in found
    assert load_file("b.safetensors").keys() == UNET.keys() - {"model_ema.decay"}


def test_names_stay_without_a_layout_and_the_shards_are_opened(tmp_path: Path) -> None:
    assert weightops_here("convert", "a.safetensors", "--shard-size", "1KiB", "-q") == (0, "", "")
    done = weightops_here("inspect", "a-sharded", "--json")
    assert json.loads(done.out)["tensors"] == len(UNET)


def test_a_size_that_is_none_is_wrong_use() -> None:
    done = weightops_here("convert", "a.safetensors", "--shard-size", "big")
    assert done.code == 2
    assert done.err.splitlines() == ["error: --shard-size: found 'big', expected a size such as 512MiB or 2GiB"]
