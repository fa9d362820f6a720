"""convert: bytes stay, dtypes change on request, and everything in the file is accounted for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from weightops.errors import FormatError, MismatchError, UsageError, ValueRefused
from weightops.files.checkpoint import open_checkpoint
from weightops.ops.convert import convert

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
PICKLES = sorted([*SHARED.glob("loras/pickle/*.pt"), *SHARED.glob("checkpoints/*.pth")])


def tensors_of(found: object, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of what torch.load gives, named by their path."""
    if isinstance(found, torch.Tensor):
        return {name or "tensor": found}
    pairs = found.items() if isinstance(found, dict) else enumerate(found)  # type: ignore[call-overload]
    parts = [tensors_of(value, f"{name}.{key}" if name else str(key)) for key, value in pairs]
    return {key: value for part in parts for key, value in part.items()}


@pytest.mark.skipif(not PICKLES, reason="the real pickles of ../shared/data are not here")
@pytest.mark.parametrize("path", PICKLES, ids=lambda p: p.name)
def test_real_pickles_become_the_tensors_that_torch_loads(path: Path, tmp_path: Path) -> None:
    convert(path, output=tmp_path / "out.safetensors")
    expected = tensors_of(torch.load(path, weights_only=True, map_location="cpu"))
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


def test_inspecting_and_converting_a_pickle_imports_no_torch(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(3), "i": torch.arange(4)}, "epoch": 3}, tmp_path / "m.ckpt")
    code = (
        "import sys; from weightops.ops.convert import convert; from weightops.ops.inspect import inspect;"
        "inspect('m.ckpt'); convert('m.ckpt', verify=True); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert torch.equal(load_file(tmp_path / "m.safetensors")["w"], torch.ones(3))


def test_without_a_dtype_bytes_and_metadata_stay(tmp_path: Path) -> None:
    given = {"a": torch.tensor([float("nan"), 1.0]).half(), "b": torch.arange(5), "c": torch.zeros(0, 3)}
    save_file(given, tmp_path / "a.safetensors", {"format": "pt", "sshs_model_hash": "00", "ss_tag": "x"})
    report = convert(tmp_path / "a.safetensors", output=tmp_path / "b.safetensors")
    assert sorted(report.account.copied) == ["a", "b", "c"]
    found = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(found[k].view(torch.uint8), given[k].view(torch.uint8)) for k in given)
    with open_checkpoint(tmp_path / "b.safetensors") as opened:
        assert opened.metadata["ss_tag"] == "x"
        assert "sshs_model_hash" not in opened.metadata


def test_a_dtype_is_for_floating_tensors_alone(tmp_path: Path) -> None:
    given = {"a": torch.randn(300, 7), "b": torch.arange(5), "h": torch.randn(4).half()}
    save_file(given, tmp_path / "a.safetensors")
    report = convert(tmp_path / "a.safetensors", output=tmp_path / "b.safetensors", dtype="fp16", verify=True)
    found = load_file(tmp_path / "b.safetensors")
    assert torch.equal(found["a"], given["a"].half())
    assert torch.equal(found["b"], given["b"])
    assert torch.equal(found["h"], given["h"])
    assert (report.account.used, sorted(report.account.copied)) == (["a"], ["b", "h"])


def test_what_a_dtype_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1e6, 1.0])}, tmp_path / "a.safetensors")
    with pytest.raises(ValueRefused, match="w") as caught:
        convert(tmp_path / "a.safetensors", output=tmp_path / "b.safetensors", dtype="fp16")
    assert "bf16" in str(caught.value.hint)
    assert not (tmp_path / "b.safetensors").exists()
    convert(tmp_path / "a.safetensors", output=tmp_path / "b.safetensors", dtype="fp16", allow_nonfinite=True)
    assert load_file(tmp_path / "b.safetensors")["w"][0] == float("inf")


def test_dropped_components_are_named_and_an_empty_result_is_refused(tmp_path: Path) -> None:
    save_file({"model_ema.a": torch.ones(2), "first_stage_model.b": torch.ones(2)}, tmp_path / "a.safetensors")
    report = convert(tmp_path / "a.safetensors", output=tmp_path / "b.safetensors", drop=["ema"])
    assert [(u.key, u.reason, u.asked) for u in report.account.unused] == [("model_ema.a", "--drop ema", True)]
    assert list(load_file(tmp_path / "b.safetensors")) == ["first_stage_model.b"]
    with pytest.raises(UsageError, match="leaves nothing"):
        convert(tmp_path / "a.safetensors", output=tmp_path / "c.safetensors", drop=["ema", "vae"])
    with pytest.raises(UsageError, match="unknown component 'unte'"):
        convert(tmp_path / "a.safetensors", output=tmp_path / "c.safetensors", drop=["unte"])


def test_what_stands_beside_the_tensors_is_reported_and_refused_when_strict(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(3)}, "epoch": 3}, tmp_path / "m.ckpt")
    report = convert(tmp_path / "m.ckpt", output=tmp_path / "b.safetensors")
    assert [u.key for u in report.account.unused] == ["epoch"]
    with pytest.raises(MismatchError, match="epoch"):
        convert(tmp_path / "m.ckpt", output=tmp_path / "c.safetensors", strict=True)


def test_an_input_is_not_overwritten_and_a_file_without_tensors_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(Exception, match="is also an input"):
        convert(tmp_path / "a.safetensors", output=tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == before
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(FormatError, match="holds no tensors"):
        convert(tmp_path / "empty.safetensors", output=tmp_path / "b.safetensors")


def test_the_default_name_is_the_inputs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    torch.save({"w": torch.ones(2)}, tmp_path / "deep" / "model.ckpt")
    assert convert("deep/model.ckpt").output == "model.safetensors"
    assert (tmp_path / "model.safetensors").is_file()


# ------------------------------------------------------------------------------------------------ words and names


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (
            {"to": "diffuser"},
            "--to: unknown layout 'diffuser'",
            "known are original, diffusers, comfy, kohya, onetrainer, peft, lora",
        ),
        (
            {"to": "original", "prediction": "v"},
            "--prediction: unknown word 'v'",
            "known are epsilon, v_prediction",
        ),
        ({"prediction": "epsilon"}, "--prediction: says something only with --to", None),
        ({"like": "x"}, "--like: says something only with --to diffusers", None),
        ({"to": "comfy", "no_tokenizer": True}, "--no-tokenizer: says something only with --to diffusers", None),
        ({"shard_size": 0}, "--shard-size: found 0, expected a number of bytes", None),
    ],
    ids=str,
)
def test_words_that_mean_nothing_are_wrong_use(
    words: dict[str, Any], message: str, hint: str | None, tmp_path: Path
) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(UsageError) as caught:
        convert(tmp_path / "a.safetensors", **words)
    assert (str(caught.value), caught.value.hint) == (message, hint)


def unet() -> dict[str, torch.Tensor]:
    """As much of a UNet as it takes to be known."""
    return {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": torch.ones(4, 4, 1, 1),
        "model.diffusion_model.input_blocks.1.1.proj_in.bias": torch.ones(4),
        "model.diffusion_model.input_blocks.10.0.in_layers.2.weight": torch.ones(4, 4, 3, 3),
    }


def test_each_layout_has_a_default_name_that_is_never_the_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(unet(), "v1.5.safetensors")
    torch.save(unet(), "old.ckpt")
    before = Path("v1.5.safetensors").read_bytes()
    assert convert("v1.5.safetensors", to="original").output == "v1.5-original.safetensors"
    assert convert("v1.5.safetensors", to="comfy").output == "v1.5-comfy.safetensors"
    assert convert("old.ckpt", to="original").output == "old.safetensors"
    assert convert("v1.5.safetensors", shard_size=100).output == "v1.5-sharded"
    assert Path("v1.5.safetensors").read_bytes() == before


def test_a_folder_is_named_as_one_and_a_file_as_one(tmp_path: Path) -> None:
    save_file(unet(), tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"the output's name must end in \.safetensors"):
        convert(tmp_path / "a.safetensors", to="original", output=tmp_path / "b")
    with pytest.raises(UsageError, match=r"its name must not end in \.safetensors"):
        convert(tmp_path / "a.safetensors", shard_size=100, output=tmp_path / "b.safetensors")


# ------------------------------------------------------------------------------------------------ shards, --check


def test_names_stay_in_shards_and_the_shards_can_be_opened(tmp_path: Path) -> None:
    given = {name: torch.rand(10) for name in "abcde"}
    save_file(given, tmp_path / "a.safetensors", {"of": "mine"})
    report = convert(tmp_path / "a.safetensors", output=tmp_path / "out", shard_size=80, check=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *(f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)), "model.safetensors.index.json",
    ]  # fmt: skip
    assert report.summary == "a, as it is, in 3 safetensors files"
    assert report.checked == {"tensors": 5, "bytes": 200}
    with open_checkpoint(tmp_path / "out") as opened:
        assert (opened.container, opened.metadata["of"]) == ("shards", "mine")
    convert(tmp_path / "out", output=tmp_path / "back.safetensors", check=True)
    found = load_file(tmp_path / "back.safetensors")
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) for name in given)


def test_one_shard_is_a_folder_with_one_file(tmp_path: Path) -> None:
    save_file({"a": torch.rand(10)}, tmp_path / "a.safetensors")
    report = convert(tmp_path / "a.safetensors", output=tmp_path / "out", shard_size=1 << 30, check=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert report.summary == "a, as it is, in 1 safetensors file"


def test_a_check_reads_every_dtype_and_every_container(tmp_path: Path) -> None:
    given = {"f": torch.rand(3, 5), "i": torch.arange(4), "e": torch.zeros(0, 3), "s": torch.tensor(7.0)}
    torch.save({"t": given["f"].T, **given}, tmp_path / "m.ckpt")  # one of them with strides
    report = convert(tmp_path / "m.ckpt", output=tmp_path / "out.safetensors", check=True, verify=True)
    assert report.checked == {"tensors": 5, "bytes": 60 + 60 + 32 + 4}
    assert report.to_dict()["checked"] == report.checked
    assert torch.equal(load_file(tmp_path / "out.safetensors")["t"], given["f"].T)
