"""merge refuses early, by name, with numbers: every message whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import save

import weightops
from weightops.errors import (
    FormatError,
    MemoryRefused,
    MismatchError,
    OutputError,
    TruncatedError,
    UsageError,
    ValueRefused,
    WeightopsError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

UNET = "model.diffusion_model.out.2.weight"
VAE = "first_stage_model.decoder.conv_in.weight"
TEXT = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
COUNTER = "model.diffusion_model.counter"
SDXL = "model.diffusion_model.output_blocks.0.1.norm.weight"
SD15 = "model.diffusion_model.input_blocks.1.1.proj_in.weight"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(name: str, values: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> str:
    tensors = {k: v if isinstance(v, torch.Tensor) else torch.tensor(v) for k, v in values.items()}
    save(Path(f"{name}.safetensors"), tensors, metadata)
    return f"{name}.safetensors"


def refused(*models: str, kind: type[WeightopsError], **words: Any) -> tuple[str, str | None]:
    """Message and hint; no file was written, and none changed."""
    before = {p.name: p.read_bytes() for p in Path().iterdir() if p.is_file()}
    with pytest.raises(WeightopsError) as caught:
        weightops.merge(*models, **{"output": "out.safetensors", **words})
    assert type(caught.value) is kind
    assert {p.name: p.read_bytes() for p in Path().iterdir() if p.is_file()} == before
    return str(caught.value), caught.value.hint


@pytest.fixture
def models() -> list[str]:
    """Three whole models, a, b and c."""
    return [make(n, {UNET: [v, v], VAE: [v], TEXT: [v]}) for n, v in (("a", 1.0), ("b", 2.0), ("c", 4.0))]


# ------------------------------------------------------------------------------------------------ wrong use

SHOWS = "--list-methods shows what each method takes"
COMPONENTS = "known are ema, optimizer, schedule, vae, text_encoder, safety_checker"


@pytest.mark.parametrize(
    ("count", "words", "message", "hint"),
    [
        (0, {}, "merge: found 0 models, expected two or more, or a recipe", None),
        (1, {}, "merge: found 1 model, expected two or more, or a recipe", None),
        (2, {"alpha": 0.5, "weights": (1, 1)}, "--alpha: given together with --weights, expected one of the two", None),
        (3, {"alpha": 0.5}, "--alpha: is for two models, found 3", "give --weights, one per model"),
        (2, {"alpha": math.nan}, "--alpha: found nan, expected a finite number", None),
        (2, {"alpha": -math.inf}, "--alpha: found -inf, expected a finite number", None),
        (3, {"alpha": 0.5, "base": "a.safetensors"}, "--alpha: says nothing for 3 models and a base",
         "give --weights, one per model"),
        (2, {"weights": (1, 2, 3)}, "--weights: found 3 weights for 2 models, expected one for each", None),
        (2, {"weights": ()}, "--weights: found 0 weights for 2 models, expected one for each", None),
        (2, {"weights": (1, math.inf)}, "--weights: found a weight that is not a finite number", None),
        (2, {"weights": (1, -1)}, "--weights: the weights sum to 0 and cannot be normalised", "add --no-normalize"),
        (3, {"weights": (0.1, 0.2, -0.3)}, "--weights: the weights sum to 0 and cannot be normalised",
         "add --no-normalize"),
        (2, {"weights": (0, 0)}, "--weights: the weights sum to 0 and cannot be normalised", "add --no-normalize"),
        (2, {"method": "weigthed_sum"}, "unknown merge method 'weigthed_sum'", "did you mean 'weighted_sum'?"),
        (2, {"method": "add_difference"}, "--base: add_difference needs a base", SHOWS),
        (2, {"parameters": {"drop": 1}}, "--set: weighted_sum has no parameter 'drop'", "it has weights, normalize"),
        (2, {"parameters": {"weights": "1,2"}}, "--set: found weights, which are given with --weights", None),
        (2, {"dtype": "fp17"}, "--dtype: unknown dtype 'fp17'", "known: keep, fp32, fp16, bf16, fp8_e4m3, fp8_e5m2"),
        (2, {"drop": ["emma"]}, "--drop: unknown component 'emma'", COMPONENTS),
        (2, {"drop": "ema"}, "--drop: unknown component 'e'", COMPONENTS),
        (2, {"drop": ["vae"], "vae": "c.safetensors"}, "--drop: drops the VAE that --vae takes from 'c.safetensors'",
         None),
        (2, {"on_mismatch": "ignore"}, "--on-mismatch: found 'ignore', expected error or keep-first", None),
        (2, {"vae": "0"}, "--vae: there is no model 0, expected 1 to 2", None),
        (2, {"vae": "3"}, "--vae: there is no model 3, expected 1 to 2", None),
        (2, {"vae": "3", "base": "c.safetensors"}, "--vae: there is no model 3, expected 1 to 2", None),
        (2, {"vae": "9" * 5000}, f"--vae: there is no model {'9' * 20}, expected 1 to 2", None),
        (2, {"vae": "no.safetensors"}, "no.safetensors: no such file", None),
        (2, {"text_encoder": "3"}, "--text-encoder: there is no model 3, expected 1 to 2", None),
        (2, {"text_encoder": "b.safetensors"},
         "--text-encoder: found 'b.safetensors', expected the number of a model, or merge", None),
        (2, {"output": "out.ckpt"}, "out.ckpt: the output's name must end in .safetensors", None),
        (2, {"output": "out"}, "out: the output's name must end in .safetensors", None),
    ],
)  # fmt: skip
def test_wrong_use_is_refused(
    models: list[str], count: int, words: dict[str, Any], message: str, hint: str | None
) -> None:
    assert refused(*models[:count], kind=UsageError, **words) == (message, hint)


def test_a_memory_too_small_is_refused_before_the_start_with_the_number_that_would_do(models: list[str]) -> None:
    a, b = (make(n, {UNET: torch.zeros(1 << 20)}) for n in ("x", "y"))
    for dry_run in (False, True):
        message, hint = refused(a, b, kind=MemoryRefused, memory=1000, dry_run=dry_run)
        assert message.startswith(
            "--memory: 1,000 bytes are too few: 'model.diffusion_model.out.2.weight' alone takes "
        )
        assert hint is not None
        assert hint.endswith("MiB would do")
    weightops.merge(a, b, output="out.safetensors", memory=int(hint.split()[1].removesuffix("MiB")) << 20)


# ------------------------------------------------------------------------------------------ models that do not fit

SPELLINGS = "these seem to be different architectures, or different spellings of one"


def test_models_without_a_common_name_are_refused() -> None:
    a, b = make("a", {UNET: [1.0], IDS: [1]}), make("b", {"out.2.weight": [1.0]})
    message = "b.safetensors: has no tensor name in common with a.safetensors: nothing to merge"
    assert refused(a, b, kind=MismatchError) == (message, SPELLINGS)
    assert refused(a, a, b, kind=MismatchError) == (message, SPELLINGS)
    assert refused(a, base=b, kind=MismatchError) == (message, SPELLINGS)


def test_a_merge_that_would_be_a_copy_of_the_first_model_is_refused() -> None:
    a = make("a", {UNET: [1.0], VAE: [1.0]})
    b = make("b", {"unet.x": [1.0], VAE: [1.0]})
    assert refused(a, b, kind=MismatchError) == (
        "b.safetensors: nothing of it can be merged into a.safetensors: the result would be a copy",
        "not in a.safetensors; the VAE is taken from model 1",
    )
    weightops.merge(a, b, vae="merge", output="fine.safetensors")
    weightops.merge(a, b, vae="2", output="fine-too.safetensors")
    a, b = make("a", {IDS: [1, 2]}), make("b", {IDS: [3, 4]})
    assert refused(a, b, kind=MismatchError) == (
        "b.safetensors: nothing of it can be merged into a.safetensors: the result would be a copy",
        "I64 is not averaged: copied from a.safetensors",
    )
    a, b = make("a", {UNET: [1.0]}), make("b", {UNET: [1.0, 2.0]})
    assert refused(a, b, on_mismatch="keep-first", kind=MismatchError) == (
        "b.safetensors: nothing of it can be merged into a.safetensors: the result would be a copy",
        "kept from a.safetensors",
    )


def test_a_file_without_tensors_is_refused(models: list[str]) -> None:
    empty = make("empty", {})
    message = "empty.safetensors: holds no tensors: nothing to merge"
    assert refused(models[0], empty, kind=MismatchError) == (message, None)
    assert refused(empty, models[0], kind=MismatchError) == (message, None)


def test_dropping_everything_is_refused() -> None:
    a, b = make("a", {VAE: [1.0]}), make("b", {VAE: [2.0]})
    assert refused(a, b, drop=["vae"], kind=UsageError) == ("--drop: leaves nothing of a.safetensors to write", None)


def test_the_model_that_is_of_another_architecture_is_the_one_named() -> None:
    a, c = (make(name, {SD15: torch.zeros(2, 2, 1, 1), UNET: [1.0]}) for name in "ac")
    message, _ = refused(a, make("b", {SDXL: [1.0], UNET: [1.0]}), c, kind=MismatchError)
    assert message.startswith("b.safetensors: different architectures cannot be merged: ")


def test_different_architectures_are_refused() -> None:
    a = make("a", {SD15: torch.zeros(2, 2, 1, 1), UNET: [1.0]})
    b = make("b", {SDXL: [1.0], UNET: [1.0]})
    assert refused(a, b, kind=MismatchError) == (
        "b.safetensors: different architectures cannot be merged: a.safetensors is sd15, b.safetensors is sdxl",
        None,
    )
    c = make("c", {SD15: torch.zeros(2, 2), UNET: [1.0]})
    assert refused(a, a, base=c, kind=MismatchError) == (
        "a.safetensors: different architectures cannot be merged: c.safetensors is sd2, a.safetensors is sd15",
        None,
    )


def test_other_shapes_are_refused_by_name_with_both_shapes() -> None:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    inpainting = make("inpainting", {key: torch.zeros(320, 9, 3, 3), UNET: [1.0]})
    plain = make("plain", {key: torch.zeros(320, 4, 3, 3), UNET: [1.0]})
    assert refused(plain, inpainting, kind=MismatchError) == (
        "inpainting.safetensors: tensor 'model.diffusion_model.input_blocks.0.0.weight' is F32 [320, 9, 3, 3], "
        "but F32 [320, 4, 3, 3] in plain.safetensors",
        "--on-mismatch keep-first takes such tensors from the first model",
    )


def test_adapters_are_refused() -> None:
    a = make("a", {"lora_unet_x.lora_up.weight": [1.0], "lora_unet_x.lora_down.weight": [1.0]})
    assert refused(a, a, kind=MismatchError) == (
        "a.safetensors: is a LoRA: a sum of factors is not the sum of what they do, and merge takes checkpoints",
        "in a recipe, lora: FILE adds one; combine makes one LoRA of several",
    )


def test_quantised_weights_are_refused() -> None:
    a = make("a", {UNET: torch.zeros(4).to(torch.float8_e4m3fn), f"{UNET[:-7]}.scale_weight": [2.0]})
    b = make("b", {UNET: torch.zeros(4)})
    assert refused(b, a, kind=MismatchError) == (
        "a.safetensors: is quantised: 'model.diffusion_model.out.2.scale_weight' scales weights that mean nothing "
        "without it",
        "merge the fp16, bf16 or fp32 release instead",
    )


# ------------------------------------------------------------------------------------------------ --strict

WITHOUT = "Without --strict they are kept from the first model or left out, and named"


@pytest.mark.parametrize(
    ("mine", "its", "keys", "reasons"),
    [
        ({"x": [1.0]}, {}, "1 tensor cannot be merged: 'x'", "not in b.safetensors"),
        ({}, {"x": [1.0]}, "1 tensor cannot be merged: 'x'", "not in a.safetensors"),
        ({COUNTER: [1]}, {}, f"1 tensor cannot be merged: '{COUNTER}'", "not in b.safetensors"),
        ({IDS: [1]}, {IDS: [[1]]}, f"1 tensor cannot be merged: '{IDS}'",
         "I64 [1, 1] in b.safetensors, I64 [1] in a.safetensors; kept from a.safetensors"),
        ({f"x{i}": [1.0] for i in range(9)}, {}, "9 tensors cannot be merged: 'x0', 'x1', 'x2', 'x3', 'x4' "
         "(and 4 more)", "not in b.safetensors"),
    ],
)  # fmt: skip
def test_strict_refuses_what_does_not_go_together_by_name(
    mine: dict[str, Any], its: dict[str, Any], keys: str, reasons: str
) -> None:
    a, b = make("a", {UNET: [1.0], **mine}), make("b", {UNET: [1.0], **its})
    assert refused(a, b, strict=True, kind=MismatchError) == (f"--strict: {keys}", f"{reasons}. {WITHOUT}")
    weightops.merge(a, b, output="fine.safetensors")


def test_strict_refuses_other_shapes_even_where_they_may_be_kept() -> None:
    a, b = make("a", {UNET: [1.0], "x": [1.0]}), make("b", {UNET: [1.0], "x": [1.0, 2.0]})
    message, _ = refused(a, b, strict=True, on_mismatch="keep-first", kind=MismatchError)
    assert message == "--strict: 1 tensor cannot be merged: 'x'"


def test_strict_refuses_models_whose_markers_differ() -> None:
    a, b = make("a", {UNET: [1.0], "v_pred": torch.zeros(0)}), make("b", {UNET: [1.0]})
    assert refused(a, b, strict=True, kind=MismatchError) == (
        "--strict: b.safetensors and a.safetensors differ in 'v_pred': one may predict v and the other noise, "
        "and a mixture samples badly",
        None,
    )
    c = make("c", {UNET: [1.0]}, {"modelspec.prediction_type": "v"})
    message, _ = refused(b, c, strict=True, kind=MismatchError)
    assert message.startswith("--strict: c.safetensors and b.safetensors differ in 'modelspec.prediction_type': ")


def test_strict_accepts_what_was_asked_for(models: list[str]) -> None:
    report = weightops.merge(*models, output="out.safetensors", strict=True, vae="2", text_encoder="3")
    assert report.account.surprises() == []


# ------------------------------------------------------------------------------------------------ the VAE


def test_a_vae_that_does_not_fit_is_refused(models: list[str]) -> None:
    a, b, _ = models
    other = make("other", {"decoder.conv_in.weight": [1.0, 2.0]})
    assert refused(a, b, vae=other, kind=MismatchError) == (
        "other.safetensors: tensor 'decoder.conv_in.weight' is F32 [2], but F32 [1] in a.safetensors",
        None,
    )
    text = make("text", {TEXT: [1.0]})
    assert refused(a, b, vae=text, kind=MismatchError) == (
        "text.safetensors: holds no VAE, expected a VAE or a checkpoint with one",
        None,
    )
    spelled = make("spelled", {"decoder.conv_in.bias": [1.0]})
    assert refused(a, b, vae=spelled, kind=MismatchError) == (
        f"spelled.safetensors: lacks 1 of 1 VAE tensors: '{VAE}'",
        "it may be of another architecture",
    )


def test_a_vae_for_a_model_that_has_none_is_refused(models: list[str]) -> None:
    a = make("bare", {UNET: [1.0, 1.0], TEXT: [1.0]})
    message = "bare.safetensors: holds no VAE that --vae could replace"
    assert refused(a, models[1], vae=models[2], kind=MismatchError) == (message, None)
    assert refused(a, models[1], vae="2", kind=MismatchError) == (message, None)
    message = "bare.safetensors: holds no text encoder that --text-encoder could replace"
    bare = make("bare", {UNET: [1.0, 1.0], VAE: [1.0]})
    assert refused(bare, models[1], text_encoder="2", kind=MismatchError) == (message, None)


def test_a_component_that_the_chosen_model_lacks_is_refused_by_name(models: list[str]) -> None:
    bare = make("bare", {UNET: [1.0, 1.0]})
    assert refused(models[0], bare, vae="2", kind=MismatchError) == (
        f"bare.safetensors: has no tensor '{VAE}', so its VAE cannot take the place of the first's",
        "--vae 1 keeps the first model's",
    )
    assert refused(models[0], bare, text_encoder="2", kind=MismatchError) == (
        f"bare.safetensors: has no tensor '{TEXT}', so its text encoder cannot take the place of the first's",
        "--text-encoder 1 keeps the first model's",
    )


# ------------------------------------------------------------------------------------------------ values

ALLOW = "--allow-nonfinite writes it all the same"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_a_value_that_is_not_finite_is_named_with_its_file_and_tensor(bad: float, dtype: torch.dtype) -> None:
    good = make("good", {UNET: torch.ones(100_000).to(dtype), VAE: torch.ones(10).to(dtype)})
    broken = torch.ones(100_000)
    broken[77_777] = bad
    other = make("other", {UNET: broken.to(dtype), VAE: torch.ones(10).to(dtype)})
    message = f"other.safetensors: tensor '{UNET}' holds NaN or Inf"
    assert refused(good, other, kind=ValueRefused) == (message, ALLOW)
    assert refused(other, good, kind=ValueRefused) == (message, ALLOW)
    assert refused(good, good, base=other, kind=ValueRefused) == (message, ALLOW)


def test_a_value_that_is_copied_is_looked_at_too() -> None:
    a, b = make("a", {UNET: [1.0], VAE: [math.nan]}), make("b", {UNET: [1.0], VAE: [1.0]})
    for dtype in ("keep", "fp8_e4m3"):
        assert refused(a, b, dtype=dtype, kind=ValueRefused) == (
            f"a.safetensors: tensor '{VAE}' holds NaN or Inf",
            ALLOW,
        )
    weightops.merge(a, b, vae="2", output="fine.safetensors")


@pytest.mark.parametrize(
    ("dtype", "value", "code"),
    [("fp16", 70000.0, "F16"), ("fp8_e4m3", 500.0, "F8_E4M3"), ("fp8_e5m2", 70000.0, "F8_E5M2")],
)
@pytest.mark.parametrize("key", [UNET, VAE])
def test_a_result_that_the_dtype_cannot_hold_is_named(dtype: str, value: float, code: str, key: str) -> None:
    a, b = (make(n, {UNET: [1.0], VAE: [1.0], key: [value]}) for n in ("a", "b"))
    assert refused(a, b, dtype=dtype, kind=ValueRefused) == (
        f"{key}: the result is too large for {code}, though every input is finite",
        "--dtype bf16 or --dtype fp32 can hold it",
    )
    weightops.merge(a, b, dtype="bf16", output="fine.safetensors")


def test_halves_whose_sum_overflows_are_named() -> None:
    a, b = (make(n, {UNET: torch.full((10,), 60000.0).half()}) for n in ("a", "b"))
    message, hint = refused(a, b, weights=(1, 1), normalize=False, kind=ValueRefused)
    assert message == f"{UNET}: the result is too large for F16, though every input is finite"
    assert hint == "--dtype bf16 or --dtype fp32 can hold it"


# ------------------------------------------------------------------------------------------------ files


def test_a_damaged_input_is_refused_and_nothing_is_left(models: list[str]) -> None:
    Path("cut.safetensors").write_bytes(Path(models[1]).read_bytes()[:-3])
    message, _ = refused(models[0], "cut.safetensors", kind=TruncatedError)
    assert message.startswith("cut.safetensors: tensor '")
    Path("page.safetensors").write_text("<!DOCTYPE html><html></html>")
    message, _ = refused(models[0], "page.safetensors", kind=FormatError)
    assert message == "page.safetensors: a web page, expected safetensors"


def test_an_existing_output_and_an_input_are_not_written(models: list[str]) -> None:
    a, b, c = models
    force = "choose another name, or replace it with --force"
    assert refused(a, b, output=c, kind=OutputError) == ("c.safetensors: exists", force)
    assert refused(a, b, output=a, kind=OutputError) == (
        "a.safetensors: is also an input, and an input is never written",
        "choose another name, or replace it with --force once the result is whole",
    )
    assert refused(a, b, output="no/out.safetensors", kind=OutputError) == (
        "no/out.safetensors: the folder 'no' does not exist",
        "make it first",
    )
