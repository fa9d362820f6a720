"""convert of a LoRA, as the verb: words that mean something, files that are whole, a check that can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save
from safetensors.torch import load_file
from torch import Tensor

import weightops
from weightops.errors import MismatchError, UsageError, ValueRefused, WeightopsError
from weightops.files.checkpoint import open_checkpoint
from weightops.ops import adapter_check

MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


ONLY = "says something only of a checkpoint, and lora.safetensors is a LoRA"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lora(**more: Tensor) -> str:
    factors = {
        "lora_down.weight": torch.randn(4, 768),
        "lora_up.weight": torch.randn(320, 4),
        "alpha": torch.tensor(2.0),
    }
    save(Path("lora.safetensors"), {f"{MODULE}.{part}": tensor for part, tensor in factors.items()} | more)
    return "lora.safetensors"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"to": "original"}, "--to: lora.safetensors is a LoRA, and original is a layout of checkpoints"),
        ({"to": "kohya", "shard_size": 1 << 20}, "--shard-size: " + ONLY),
        ({"to": "kohya", "drop": ["vae"]}, "--drop: " + ONLY),
        ({"to": "comfy", "prediction": "epsilon"}, "--prediction: " + ONLY),
        ({"to": "diffusers", "no_tokenizer": True}, "--no-tokenizer: " + ONLY),
        ({"alpha": "fold"}, "--alpha: says something only with --to"),
        ({"architecture": "sd15"}, "--architecture: says something only with --to"),
        ({"to": "kohya", "architecture": "sd51"}, "--architecture: unknown architecture 'sd51'"),
        ({"to": "kohya", "alpha": "drop"}, "--alpha: found 'drop', expected carry or fold"),
        ({"to": "kohya", "dtype": "fp16", "check": True}, "--check: compares bytes, but --dtype fp16 changes"),
        ({"to": "comfy", "alpha": "fold", "check": True}, "--check: compares bytes, but a strength that is folded"),
    ],
)  # fmt: skip
def test_words_that_say_nothing_of_a_lora_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        weightops.convert(lora(), output="out.safetensors", **words)
    assert str(caught.value).startswith(message)
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize("words", [{"to": "kohya"}, {"alpha": "fold"}, {"architecture": "sd15"}])
def test_words_of_loras_are_refused_for_a_checkpoint(words: dict[str, Any]) -> None:
    save(Path("vae.safetensors"), {"decoder.conv_in.weight": torch.randn(4, 4, 3, 3)})
    with pytest.raises(UsageError):
        weightops.convert("vae.safetensors", output="out.safetensors", **words)


def test_strict_names_what_a_dialect_has_no_place_for() -> None:
    path = lora(**{"<token>": torch.randn(768)})
    assert weightops.convert(path, to="peft", output="loose").account.surprises() == ["<token>"]
    with pytest.raises(MismatchError) as caught:
        weightops.convert(path, to="peft", output="out", strict=True)
    assert str(caught.value).startswith("--strict: 1 tensor has no place in peft names: '<token>'")
    assert not Path("out").exists()


def test_the_check_finds_a_factor_and_an_alpha_that_are_not_as_they_were() -> None:
    path = lora()
    given = load_file(path)
    assert weightops.convert(path, to="comfy", output="good.safetensors", check=True).checked == {
        "tensors": 2, "bytes": 4 * (4 * 768 + 320 * 4),
    }  # fmt: skip
    for part, wrong in (("lora_up.weight", torch.zeros(320, 4)), ("alpha", torch.tensor(3.0))):
        save(Path("other.safetensors"), given | {f"{MODULE}.{part}": wrong})
        weightops.convert("other.safetensors", to="comfy", output="bad.safetensors", force=True)
        with open_checkpoint(path) as opened, pytest.raises(ValueRefused):
            adapter_check.check_adapters(opened, Path("bad.safetensors"), drop=(), architecture=None)


def test_a_new_dtype_rounds_factors_once_and_carries_alpha() -> None:
    path = lora()
    weightops.convert(path, to="kohya", dtype="fp16", output="half.safetensors")
    given, found = load_file(path), load_file("half.safetensors")
    assert found.keys() == given.keys()
    assert all(torch.equal(found[key], tensor.half()) for key, tensor in given.items() if "weight" in key)
    assert float(found[f"{MODULE}.alpha"]) == 2.0


def test_a_factor_that_the_new_dtype_cannot_hold_is_named() -> None:
    path = lora(**{f"{MODULE.replace('to_k', 'to_v')}.lora_down.weight": torch.full((4, 768), 1e6),
                   f"{MODULE.replace('to_k', 'to_v')}.lora_up.weight": torch.randn(320, 4)})  # fmt: skip
    with pytest.raises(WeightopsError, match="the result is too large for F16, though every input is finite"):
        weightops.convert(path, to="kohya", dtype="fp16", output="out.safetensors")
    assert not Path("out.safetensors").exists()
