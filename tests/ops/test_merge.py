"""merge: what becomes of every tensor, against arithmetic done by hand."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import save
from safetensors import safe_open

import weightops
from weightops import __version__
from weightops.files.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from weightops.ops.report import Report

UNET = "model.diffusion_model.out.2.weight"
UNET_2 = "model.diffusion_model.out.2.bias"
VAE = "first_stage_model.decoder.conv_in.weight"
TEXT = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
TEXT_2 = "conditioner.embedders.1.model.ln_final.weight"
EMA = "model_ema.diffusion_modelout2weight"
IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
BETAS = "betas"

A = {UNET: [1.0, 2.0], VAE: [10.0], TEXT: [100.0]}
B = {UNET: [3.0, 6.0], VAE: [20.0], TEXT: [200.0]}
C = {UNET: [2.0, 1.0], VAE: [30.0], TEXT: [300.0]}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(
    name: str,
    values: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """A file of these tensors, in this folder; a tensor keeps its own dtype."""
    tensors = {k: v if isinstance(v, torch.Tensor) else torch.tensor(v, dtype=dtype) for k, v in values.items()}
    save(Path(f"{name}.safetensors"), tensors, metadata)
    return f"{name}.safetensors"


def merged(*models: str, **words: Any) -> tuple[Report, dict[str, Tensor], dict[str, str]]:
    report = weightops.merge(*models, output="out.safetensors", force=True, **words)
    with safe_open("out.safetensors", "pt") as file:
        return report, {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def values(*models: str, **words: Any) -> dict[str, list[float]]:
    return {key: tensor.tolist() for key, tensor in merged(*models, **words)[1].items()}


def pair() -> tuple[str, str]:
    return make("a", A), make("b", B)


def close(found: Mapping[str, Sequence[float]], expected: Mapping[str, Sequence[float]]) -> bool:
    return found.keys() == expected.keys() and all(found[k] == pytest.approx(expected[k]) for k in found)


# ------------------------------------------------------------------------------------------------ weights


def test_alpha_is_the_share_of_the_second_model() -> None:
    found = values(*pair(), alpha=0.75)
    assert found == {UNET: [2.5, 5.0], VAE: [10.0], TEXT: [175.0]}


def test_two_models_are_averaged_where_nothing_is_said() -> None:
    assert values(*pair())[UNET] == [2.0, 4.0]


@pytest.mark.parametrize(
    ("alpha", "share"), [(0.0, [1.0, 2.0]), (1.0, [3.0, 6.0]), (-1.0, [-1.0, -2.0]), (2.0, [5.0, 10.0])]
)
def test_alpha_may_lie_outside_of_zero_and_one(alpha: float, share: list[float]) -> None:
    assert values(*pair(), alpha=alpha)[UNET] == share


def test_weights_are_normalised_to_a_sum_of_one() -> None:
    found = values(*pair(), make("c", C), weights=(1, 2, 5))
    assert found == {UNET: [2.125, 2.375], VAE: [10.0], TEXT: [250.0]}


def test_weights_may_be_taken_as_they_are() -> None:
    found = values(*pair(), make("c", C), weights=(1, 2, -0.5), normalize=False)
    assert found == {UNET: [6.0, 13.5], VAE: [10.0], TEXT: [350.0]}


def test_any_number_of_models_is_averaged() -> None:
    models = [make(f"m{i}", {UNET: [float(i)]}) for i in range(9)]
    assert values(*models)[UNET] == [4.0]


def test_one_model_may_stand_twice() -> None:
    a, b = pair()
    assert values(a, a, b, weights=(1, 1, 2))[UNET] == [2.0, 4.0]


# ------------------------------------------------------------------------------------------------ differences


def test_a_base_carries_the_difference_of_the_second_model_over() -> None:
    found = values(*pair(), base=make("c", C))
    assert found == {UNET: [2.0, 7.0], VAE: [10.0], TEXT: [0.0]}


def test_alpha_scales_the_difference_of_the_second_model_from_the_base() -> None:
    found = values(*pair(), base=make("c", C), alpha=0.5)
    assert found == {UNET: [1.5, 4.5], VAE: [10.0], TEXT: [50.0]}


def test_one_model_and_a_base_scale_what_it_learned() -> None:
    found = values(make("b", B), base=make("c", C), alpha=0.5)
    assert found == {UNET: [2.5, 3.5], VAE: [20.0], TEXT: [250.0]}


def test_weights_of_differences_are_not_normalised() -> None:
    found = values(
        *pair(), make("d", {UNET: [2.0, 5.0], VAE: [0.0], TEXT: [300.0]}), base=make("c", C), weights=(1, 2, 3)
    )
    assert found == {UNET: [2 - 1 + 2 + 0, 1 + 1 + 10 + 12], VAE: [10.0], TEXT: [300 - 200 - 200 + 0]}


def test_the_result_has_the_names_and_the_metadata_of_the_first_model_not_of_the_base() -> None:
    base = make("c", {**C, "extra": [1.0]}, metadata={"whose": "base"})
    report, found, metadata = merged(make("a", A, metadata={"whose": "first"}), make("b", B), base=base)
    assert found.keys() == A.keys()
    assert metadata["whose"] == "first"
    assert [(u.source, u.key, u.reason, u.asked) for u in report.account.unused if u.key == "extra"] == [
        ("c.safetensors", "extra", "not in a.safetensors", False)
    ]


# ------------------------------------------------------------------------------------------------ in words


@pytest.mark.parametrize(
    ("words", "summary"),
    [
        ({"alpha": 0.7}, "0.3 × a + 0.7 × b"),
        ({}, "0.5 × a + 0.5 × b"),
        ({"alpha": -0.5}, "1.5 × a − 0.5 × b"),
        ({"alpha": 1.25}, "−0.25 × a + 1.25 × b"),
        ({"weights": (1, 2)}, "0.333333 × a + 0.666667 × b"),
        ({"weights": (-1, 0.25), "normalize": False}, "−1 × a + 0.25 × b"),
        ({"base": "c.safetensors"}, "a + 1 × (b − c)"),
        ({"base": "c.safetensors", "alpha": -0.7}, "a − 0.7 × (b − c)"),
        ({"base": "c.safetensors", "weights": (0.5, -1)}, "c + 0.5 × (a − c) − 1 × (b − c)"),
    ],
)
def test_the_report_says_the_formula_in_words(words: dict[str, Any], summary: str) -> None:
    make("c", C)
    assert merged(*pair(), **words)[0].summary == summary


def test_files_of_one_name_are_told_apart_in_the_formula() -> None:
    for folder, content in (("x", A), ("y", B)):
        Path(folder).mkdir()
        make(f"{folder}/model", content)
    report = weightops.merge("x/model.safetensors", "y/model.safetensors", output="o.safetensors", alpha=0.7)
    assert report.summary == "0.3 × x/model.safetensors + 0.7 × y/model.safetensors"


def test_the_report_counts_by_component() -> None:
    report, *_ = merged(*pair(), drop=["text_encoder"])
    assert report.groups == [
        {"component": "text_encoder", "tensors": 1, "merged": 0, "copied": 0, "dropped": 1},
        {"component": "vae", "tensors": 1, "merged": 0, "copied": 1, "dropped": 0},
        {"component": "model", "tensors": 1, "merged": 1, "copied": 0, "dropped": 0},
    ]
    assert (report.account.used, report.account.copied) == ([UNET], [VAE])


# ------------------------------------------------------------------------------------------------ VAE, text encoders


def test_the_vae_is_kept_from_the_first_model() -> None:
    report, found, _ = merged(*pair(), alpha=0.7)
    assert found[VAE].tolist() == [10.0]
    assert report.account.copied == [VAE]
    assert [(u.source, u.key, u.reason, u.asked) for u in report.account.unused] == [
        ("b.safetensors", VAE, "the VAE is taken from model 1", True)
    ]


@pytest.mark.parametrize("vae", ["2", 2])
def test_the_vae_may_be_taken_from_another_model(vae: str | int) -> None:
    report, found, _ = merged(*pair(), vae=vae)
    assert found[VAE].tolist() == [20.0]
    assert found[UNET].tolist() == [2.0, 4.0]
    assert [(u.source, u.key, u.reason, u.asked) for u in report.account.unused] == [
        ("a.safetensors", VAE, "the VAE is taken from model 2", True)
    ]


def test_with_a_base_models_are_counted_without_it() -> None:
    assert values(*pair(), base=make("c", C), vae="2")[VAE] == [20.0]


def test_the_vae_may_be_merged() -> None:
    assert values(*pair(), vae="merge")[VAE] == [15.0]


def test_a_file_that_is_only_a_vae_is_merged() -> None:
    bare = {"decoder.conv_in.weight": [1.0], "encoder.conv_in.weight": [2.0]}
    other = {"decoder.conv_in.weight": [3.0], "encoder.conv_in.weight": [4.0]}
    assert list(values(make("a", bare), make("b", other)).values()) == [[2.0], [3.0]]
    prefixed = [{f"first_stage_model.{k}": v for k, v in part.items()} for part in (bare, other)]
    assert list(values(make("a", prefixed[0]), make("b", prefixed[1])).values()) == [[2.0], [3.0]]


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_the_vae_may_come_from_a_file_in_any_wrapping(prefix: str) -> None:
    vae = make("vae", {f"{prefix}decoder.conv_in.weight": [7.0], f"{prefix}encoder.conv_in.weight": [8.0]})
    report, found, _ = merged(*pair(), vae=vae)
    assert found[VAE].tolist() == [7.0]
    assert sorted((u.source, u.key, u.reason, u.asked) for u in report.account.unused) == [
        ("a.safetensors", VAE, "the VAE is taken from --vae", True),
        ("b.safetensors", VAE, "the VAE is taken from --vae", True),
        ("vae.safetensors", f"{prefix}encoder.conv_in.weight", "not in a.safetensors", False),
    ]


def test_the_vae_may_come_out_of_a_whole_checkpoint() -> None:
    report, found, _ = merged(*pair(), vae=make("c", C))
    assert (found[VAE].tolist(), found[UNET].tolist()) == ([30.0], [2.0, 4.0])
    assert {(u.key, u.reason) for u in report.account.unused if u.source == "c.safetensors"} == {
        (UNET, "only the VAE is taken from --vae"),
        (TEXT, "only the VAE is taken from --vae"),
    }


def test_the_vae_of_a_file_keeps_its_own_dtype_unless_one_is_asked_for() -> None:
    vae = make("vae", {"decoder.conv_in.weight": torch.tensor([1 / 3], dtype=torch.float64)})
    assert merged(*pair(), vae=vae)[1][VAE].dtype is torch.float64
    assert merged(*pair(), vae=vae, dtype="fp16")[1][VAE].dtype is torch.float16


def test_text_encoders_are_merged_or_taken_from_one_model() -> None:
    one = {UNET: [1.0], TEXT: [1.0], TEXT_2: [5.0]}
    two = {UNET: [2.0], TEXT: [2.0], TEXT_2: [7.0]}
    models = make("one", one), make("two", two)
    assert values(*models) == {UNET: [1.5], TEXT: [1.5], TEXT_2: [6.0]}
    assert values(*models, text_encoder="1") == {UNET: [1.5], TEXT: [1.0], TEXT_2: [5.0]}
    assert values(*models, text_encoder=2) == {UNET: [1.5], TEXT: [2.0], TEXT_2: [7.0]}
    report, *_ = merged(*models, text_encoder="2")
    assert {(u.source, u.reason) for u in report.account.unused} == {
        ("one.safetensors", "the text encoder is taken from model 2")
    }


def test_vae_and_text_encoder_may_come_from_different_places() -> None:
    vae = make("vae", {"decoder.conv_in.weight": [7.0]})
    report, found, _ = merged(*pair(), vae=vae, text_encoder="2")
    assert {k: v.tolist() for k, v in found.items()} == {UNET: [2.0, 4.0], VAE: [7.0], TEXT: [200.0]}
    assert {(u.source, u.key) for u in report.account.unused} == {
        ("a.safetensors", VAE), ("a.safetensors", TEXT), ("b.safetensors", VAE),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ what does not fit


def test_what_only_one_model_has_is_kept_from_the_first_and_reported_from_the_others() -> None:
    a = make("a", {UNET: [1.0], "only_a": [5.0]})
    b = make("b", {UNET: [3.0], "only_b": [6.0]})
    report, found, _ = merged(a, b)
    assert {k: v.tolist() for k, v in found.items()} == {UNET: [2.0], "only_a": [5.0]}
    assert report.account.kept == [("only_a", "not in b.safetensors")]
    assert [(u.source, u.key, u.reason, u.asked) for u in report.account.unused] == [
        ("b.safetensors", "only_b", "not in a.safetensors", False)
    ]
    assert report.warnings == [
        "1 tensor kept from a.safetensors unmerged: 'only_a'",
        "1 tensor of b.safetensors left out: 'only_b'",
    ]


def test_what_one_of_three_lacks_is_kept_from_the_first() -> None:
    a, b = pair()
    report, found, _ = merged(a, b, make("c", {UNET: [1.0, 1.0]}))
    assert found[TEXT].tolist() == [100.0]
    assert report.account.kept == [(TEXT, "not in c.safetensors")]
    assert ("b.safetensors", TEXT, "kept from a.safetensors") in {
        (u.source, u.key, u.reason) for u in report.account.unused
    }


def test_other_shapes_are_kept_from_the_first_when_that_is_asked_for() -> None:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    a = make("inpainting", {key: torch.ones(3, 9, 1, 1), UNET: [1.0]})
    b = make("plain", {key: torch.zeros(3, 4, 1, 1), UNET: [3.0]})
    report, found, _ = merged(a, b, on_mismatch="keep-first")
    assert found[key].shape == (3, 9, 1, 1)
    assert found[UNET].tolist() == [2.0]
    reason = "F32 [3, 4, 1, 1] in plain.safetensors, F32 [3, 9, 1, 1] in inpainting.safetensors"
    assert report.account.kept == [(key, reason)]
    assert [(u.key, u.reason, u.asked) for u in report.account.unused] == [
        (key, "kept from inpainting.safetensors", False)
    ]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.int8])
def test_integers_and_booleans_are_copied_from_the_first_with_a_note(dtype: torch.dtype) -> None:
    a = make("a", {UNET: [1.0], IDS: torch.tensor([[0, 1]], dtype=dtype)})
    b = make("b", {UNET: [3.0], IDS: torch.tensor([[1, 0]], dtype=dtype)})
    report, found, _ = merged(a, b, dtype="fp16")
    assert found[IDS].dtype is dtype
    assert found[IDS].tolist() == torch.tensor([[0, 1]], dtype=dtype).tolist()
    assert (report.account.copied, report.account.kept) == ([IDS], [])
    code = {"int64": "I64", "int32": "I32", "uint8": "U8", "bool": "BOOL", "int8": "I8"}[str(dtype).split(".")[1]]
    assert [(u.key, u.reason, u.asked) for u in report.account.unused] == [
        (IDS, f"{code} is not averaged: copied from a.safetensors", True)
    ]


def test_positions_that_one_model_lacks_are_no_surprise() -> None:
    """Some files hold the numbers from 0 to 76, and others leave them to whoever loads them."""
    a = make("a", {UNET: [1.0], IDS: torch.tensor([0, 1])})
    b = make("b", {UNET: [3.0]})
    report, *_ = merged(a, b, strict=True)
    assert (report.account.copied, report.account.kept, report.account.surprises()) == ([IDS], [], [])
    report, *_ = merged(b, a, strict=True)
    assert [(u.key, u.asked) for u in report.account.unused] == [(IDS, True)]


def test_integers_that_another_model_lacks_or_shapes_otherwise_are_kept_and_said() -> None:
    counter = "model.diffusion_model.counter"
    a = make("a", {UNET: [1.0], counter: torch.tensor([0, 1])})
    assert merged(a, make("b", {UNET: [3.0]}))[0].account.kept == [(counter, "not in b.safetensors")]
    a = make("a", {UNET: [1.0], IDS: torch.tensor([0, 1])})
    report, *_ = merged(a, make("b", {UNET: [3.0], IDS: torch.tensor([[0, 1]])}))
    assert report.account.kept == [(IDS, "I64 [1, 2] in b.safetensors, I64 [2] in a.safetensors")]


def test_floats_against_integers_of_one_name_are_a_mismatch() -> None:
    a, b = make("a", {UNET: [1.0], "x": [1.0]}), make("b", {UNET: [1.0], "x": torch.tensor([1])})
    report, found, _ = merged(a, b, on_mismatch="keep-first")
    assert found["x"].tolist() == [1.0]
    assert report.account.kept == [("x", "I64 [1] in b.safetensors, F32 [1] in a.safetensors")]


def test_the_noise_schedule_is_copied_not_averaged() -> None:
    a, b = make("a", {UNET: [1.0], BETAS: [0.25]}), make("b", {UNET: [3.0], BETAS: [0.75]})
    report, found, _ = merged(a, b, strict=True)
    assert found[BETAS].tolist() == [0.25]
    assert [(u.key, u.reason) for u in report.account.unused] == [(BETAS, "the schedule is copied from a.safetensors")]


def test_empty_and_scalar_tensors_are_merged_like_others() -> None:
    a = make("a", {UNET: [1.0], "empty": torch.zeros(0, 4), "scalar": torch.tensor(1.0)})
    b = make("b", {UNET: [3.0], "empty": torch.zeros(0, 4), "scalar": torch.tensor(4.0)})
    report, found, _ = merged(a, b)
    assert found["empty"].shape == (0, 4)
    assert (found["scalar"].shape, found["scalar"].item()) == ((), 2.5)
    assert sorted(report.account.used) == sorted([UNET, "empty", "scalar"])


# ------------------------------------------------------------------------------------------------ what may be dropped


def test_ema_copies_that_the_other_lacks_are_warned_of_once() -> None:
    report, *_ = merged(make("a", {UNET: [1.0], EMA: [1.0]}), make("b", {UNET: [3.0]}))
    assert report.warnings == [
        "1 ema tensor kept from a.safetensors unmerged, 50% of the output; --drop ema leaves them out"
    ]
    assert report.account.kept == [(EMA, "not in b.safetensors")]


def test_many_tensors_left_out_are_counted_by_component() -> None:
    others = {f"first_stage_model.{i}": [1.0] for i in range(4)} | {f"cond_stage_model.{i}": [1.0] for i in range(2)}
    report, *_ = merged(make("a", {UNET: [1.0]}), make("b", {UNET: [3.0], **others}))
    (warning,) = report.warnings
    assert warning.startswith("6 tensors of b.safetensors left out (4 vae, 2 text_encoder): 'cond_stage_model.0', ")


def test_a_vae_that_still_has_its_ema_copy_is_merged_and_can_be_taken() -> None:
    own = {"decoder.conv_in.weight": [1.0], "model_ema.decoderconv_inweight": [1.0]}
    trained, other = make("trained", own), make("other", {"decoder.conv_in.weight": [3.0]})
    _, found, _ = merged(trained, other)
    assert found["decoder.conv_in.weight"].tolist() == [2.0]
    a = make("a", {UNET: [1.0], "first_stage_model.decoder.conv_in.weight": [7.0]})
    _, found, _ = merged(a, make("b", {UNET: [3.0]}), vae=trained)
    assert found["first_stage_model.decoder.conv_in.weight"].tolist() == [1.0]


def test_ema_copies_are_merged_reported_and_can_be_dropped() -> None:
    a, b = make("a", {UNET: [1.0], EMA: [1.0] * 8}), make("b", {UNET: [3.0], EMA: [3.0] * 8})
    report, found, _ = merged(a, b)
    assert found[EMA].tolist() == [2.0] * 8
    assert report.warnings == ["1 ema tensor, 89% of the output; --drop ema leaves them out"]
    report, found, _ = merged(a, b, drop=["ema"])
    assert found.keys() == {UNET}
    assert report.warnings == []
    assert {(u.source, u.key, u.reason, u.asked) for u in report.account.unused} == {
        ("a.safetensors", EMA, "--drop ema", True),
        ("b.safetensors", EMA, "--drop ema", True),
    }


@pytest.mark.parametrize(
    ("component", "key"),
    [
        ("optimizer", "optimizer_states.0.exp_avg"),
        ("schedule", BETAS),
        ("vae", VAE),
        ("text_encoder", TEXT),
        ("text_encoder", TEXT_2),
        ("safety_checker", "safety_checker.concept_embeds"),
    ],
)
def test_components_can_be_dropped(component: str, key: str) -> None:
    a, b = make("a", {UNET: [1.0], key: [1.0]}), make("b", {UNET: [3.0], key: [1.0]})
    assert values(a, b).keys() == {UNET, key}
    assert values(a, b, drop=[component], strict=True) == {UNET: [2.0]}


# ------------------------------------------------------------------------------------------------ dtypes


def test_the_first_models_dtypes_are_kept_tensor_by_tensor() -> None:
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
    a = make("a", {f"t{i}": torch.tensor([1.0]).to(d) for i, d in enumerate(dtypes)})
    b = make("b", {f"t{i}": torch.tensor([2.0]).to(d) for i, d in enumerate(reversed(dtypes))})
    _, found, _ = merged(a, b)
    assert [found[f"t{i}"].dtype for i in range(6)] == dtypes
    assert {found[f"t{i}"].item() for i in range(6)} == {1.5}


@pytest.mark.parametrize(
    ("word", "dtype"),
    [
        ("fp32", torch.float32),
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
        ("fp8_e4m3", torch.float8_e4m3fn),
        ("fp8_e5m2", torch.float8_e5m2),
    ],
)
def test_every_float_takes_the_dtype_that_is_asked_for(word: str, dtype: torch.dtype) -> None:
    a = make("a", {UNET: torch.tensor([1 / 3], dtype=torch.float16), VAE: [0.3], IDS: torch.tensor([7])})
    b = make("b", {UNET: torch.tensor([2 / 3], dtype=torch.float16), VAE: [0.4], IDS: torch.tensor([8])})
    _, found, _ = merged(a, b, dtype=word)
    halves = torch.tensor([1 / 3, 2 / 3]).half().double()
    assert torch.equal(found[UNET].float(), (halves.sum() / 2).reshape(1).float().to(dtype).float())
    assert torch.equal(found[VAE].float(), torch.tensor([0.3]).to(dtype).float())
    assert (found[IDS].dtype, found[IDS].item()) == (torch.int64, 7)


def test_fp16_into_fp32_is_not_rounded_through_fp16() -> None:
    a = make("a", {UNET: torch.tensor([1.0009765625], dtype=torch.float16)})
    b = make("b", {UNET: torch.tensor([1.0], dtype=torch.float16)})
    assert values(a, b, dtype="fp32")[UNET] == [1.00048828125]


# ------------------------------------------------------------------------------------------------ markers, metadata


def test_v_prediction_markers_are_kept_and_a_difference_is_warned_of() -> None:
    plain = make("plain", {UNET: [1.0]})
    marked = make("marked", {UNET: [3.0], "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    report, found, _ = merged(marked, plain)
    assert found.keys() == {UNET, "v_pred", "ztsnr"}
    text = (
        "plain.safetensors and marked.safetensors differ in 'v_pred', 'ztsnr': one may predict v and the other "
        "noise, and a mixture samples badly"
    )
    assert report.warnings[0] == text
    assert merged(plain, marked)[0].warnings[0].startswith("marked.safetensors and plain.safetensors differ in")


def test_models_with_the_same_markers_go_together_even_strictly() -> None:
    a = make("a", {UNET: [1.0], "v_pred": torch.zeros(0)})
    b = make("b", {UNET: [3.0], "v_pred": torch.zeros(0)})
    report, found, _ = merged(a, b, strict=True)
    assert found.keys() == {UNET, "v_pred"}
    assert report.warnings == []
    assert [(u.key, u.reason, u.asked) for u in report.account.unused] == [
        ("v_pred", "the marker is copied from a.safetensors", True)
    ]


@pytest.mark.parametrize(
    ("mine", "its", "differ"),
    [
        ({"modelspec.prediction_type": "v"}, {}, "'modelspec.prediction_type'"),
        ({}, {"ss_zero_terminal_snr": "True"}, "'ss_zero_terminal_snr'"),
        ({"ss_v_parameterization": "True"}, {"ss_v_parameterization": "False"}, "'ss_v_parameterization'"),
        ({"modelspec.prediction_type": "v"}, {"modelspec.prediction_type": "v"}, None),
        ({"modelspec.prediction_type": "epsilon"}, {}, None),
        ({"ss_v_parameterization": "False"}, {"ss_zero_terminal_snr": "None"}, None),
    ],
)
def test_markers_in_metadata_count_like_marker_tensors(
    mine: dict[str, str], its: dict[str, str], differ: str | None
) -> None:
    report, *_ = merged(make("a", {UNET: [1.0]}, metadata=mine), make("b", {UNET: [3.0]}, metadata=its))
    assert len(report.warnings) == (differ is not None)
    assert differ is None or f"differ in {differ}:" in report.warnings[0]


def test_metadata_of_the_first_model_is_kept_but_not_what_speaks_of_its_bytes() -> None:
    said = {
        "modelspec.title": "A", "ss_output_name": "a", "ztsnr": "true", "custom": "Grüße \u4e16",
        "modelspec.hash_sha256": "0x12", "sshs_model_hash": "34", "sshs_legacy_hash": "56", "weightops": "{}",
    }  # fmt: skip
    a, b = make("a", A, metadata=said), make("b", B, metadata={"modelspec.title": "B", "other": "b"})
    metadata = merged(a, b)[2]
    recipe = metadata.pop("weightops")
    assert metadata == {
        "format": "pt", "modelspec.title": "A", "ss_output_name": "a", "ztsnr": "true", "custom": "Grüße \u4e16",
    }  # fmt: skip
    assert recipe != "{}"


def test_the_recipe_says_how_the_file_was_made() -> None:
    Path("far").mkdir()
    make("far/b", B)
    report, _, metadata = merged(make("a", A), "far/b.safetensors", alpha=0.25, drop=["ema"])
    recipe = json.loads(metadata["weightops"])
    assert recipe == {
        "command": "merge",
        "version": __version__,
        "merge": {
            "method": "weighted_sum",
            "inputs": [{"model": 0}, {"model": 1}],
            "parameters": {"weights": [0.75, 0.25], "normalize": True},
        },
        "like": 0,
        "numbered": [0, 1],
        "vae": "1",
        "text_encoder": "merge",
        "dtype": "keep",
        "drop": ["ema"],
        "on_mismatch": "error",
        "inputs": [
            {"name": "a.safetensors", "hash": report.inputs[0]["hash"]},
            {"name": "b.safetensors", "hash": report.inputs[1]["hash"]},
        ],
    }
    assert all(re.fullmatch(r"xxh3_128:[0-9a-f]{32}", entry["hash"]) for entry in recipe["inputs"])
    assert recipe["inputs"][0]["hash"] != recipe["inputs"][1]["hash"]


def test_the_recipe_names_the_base_and_the_vae_file_too() -> None:
    a, b = pair()
    vae = make("vae", {"decoder.conv_in.weight": [7.0]})
    recipe = json.loads(merged(a, b, base=make("c", C), vae=vae)[2]["weightops"])
    assert [entry["name"] for entry in recipe["inputs"]] == [
        "c.safetensors", "a.safetensors", "b.safetensors", "vae.safetensors",
    ]  # fmt: skip
    assert recipe["vae"] == {"file": 3}  # of the inputs


def test_the_recipe_holds_no_path_and_no_date(tmp_path: Path) -> None:
    a, b = pair()
    weightops.merge(str(tmp_path / a), str(tmp_path / b), output=str(tmp_path / "out.safetensors"))
    written = Path("out.safetensors").read_bytes()
    assert str(tmp_path).encode() not in written
    assert not re.search(rb"20[0-9][0-9]-[01][0-9]", written)


def test_the_same_work_gives_the_same_bytes() -> None:
    a, b = pair()
    first = weightops.merge(a, b, output="one.safetensors", alpha=0.3, threads=1, memory=1 << 26)
    Path("copy").mkdir()
    for name in (a, b):
        (Path("copy") / name).write_bytes(Path(name).read_bytes())
    second = weightops.merge(f"copy/{a}", f"copy/{b}", output="two.safetensors", alpha=0.3, threads=2, memory=1 << 28)
    assert Path("one.safetensors").read_bytes() == Path("two.safetensors").read_bytes()
    assert [i["hash"] for i in first.inputs] == [i["hash"] for i in second.inputs]


def test_a_hash_changes_with_what_was_read_and_only_with_that() -> None:
    a = make("a", A)
    hashes = [
        merged(a, make("b", {**B, **other}))[0].inputs[1]["hash"]
        for other in ({}, {"unused": [1.0]}, {UNET: [3.0, 6.000001]})
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_names_that_are_no_unicode_are_merged_all_the_same() -> None:
    try:
        odd = Path(b"\xff.safetensors".decode(errors="surrogateescape"))
        odd.write_bytes(Path(make("a", A)).read_bytes())
    except (OSError, UnicodeError):
        pytest.skip("this file system takes Unicode only")
    recipe = json.loads(merged(str(odd), make("b", B))[2]["weightops"])
    assert recipe["inputs"][0]["name"] == "\ufffd.safetensors"


# ------------------------------------------------------------------------------------------------ values


def test_nonfinite_values_are_written_when_that_is_asked_for() -> None:
    a, b = make("a", {UNET: [1.0, math.nan], VAE: [math.inf]}), make("b", {UNET: [math.inf, 1.0], VAE: [1.0]})
    found = values(a, b, allow_nonfinite=True)
    assert found[UNET][0] == math.inf
    assert math.isnan(found[UNET][1])
    assert found[VAE] == [math.inf]


def test_a_model_of_weight_zero_has_no_part_in_the_result() -> None:
    a, b = make("a", {UNET: [1.0, -0.0]}), make("b", {UNET: [math.nan, math.inf]})
    found = values(a, b, alpha=0)[UNET]
    assert (found, math.copysign(1.0, found[1])) == ([1.0, 0.0], -1.0)
    assert values(a, b, a, weights=(1, 0, 1))[UNET] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("dtype", "held", "over"),
    [
        ("fp16", 65504.0, 65520.0),
        ("bf16", 3.3895314e38, 3.4e38),
        ("fp8_e4m3", 448.0, 480.0),
        ("fp8_e5m2", 57344.0, 65536.0),
    ],
)
def test_the_largest_value_of_a_dtype_is_held(dtype: str, held: float, over: float) -> None:
    a = make("a", {UNET: [held, -held]})
    assert values(a, make("b", {UNET: [held, -held]}), dtype=dtype)[UNET] == pytest.approx([held, -held])
    c = make("c", {UNET: [over, -over]})
    assert not any(
        map(math.isfinite, values(c, make("d", {UNET: [over, -over]}), dtype=dtype, allow_nonfinite=True)[UNET])
    )


def test_a_copy_into_a_narrower_dtype_is_no_clipping() -> None:
    """torch casts Inf, and everything above 448, to 448 in F8_E4M3."""
    a, b = make("a", {UNET: [1.0], VAE: [math.inf, 1e6]}), make("b", {UNET: [1.0], VAE: [1.0, 1.0]})
    assert all(map(math.isnan, values(a, b, dtype="fp8_e4m3", allow_nonfinite=True)[VAE]))


# ------------------------------------------------------------------------------------------------ the output


@pytest.mark.parametrize(
    ("names", "words", "output"),
    [
        (("a", "b"), {"alpha": 0.7}, "a+b-0.7.safetensors"),
        (("a", "b"), {}, "a+b-0.5.safetensors"),
        (("a.v1", "b.v2"), {"alpha": -0.25}, "a.v1+b.v2--0.25.safetensors"),
        (("a", "b", "c"), {}, "a+b+c.safetensors"),
        (("x" * 100, "y" * 100), {}, f"{'x' * 60}+{'y' * 60}-0.5.safetensors"),
        (("ü" * 80, "世" * 60, "c"), {}, f"{'ü' * 60}+{'世' * 26}.safetensors"),
    ],
)
def test_without_a_name_the_output_is_named_after_the_inputs(
    names: Sequence[str], words: dict[str, Any], output: str
) -> None:
    Path("in").mkdir()
    report = weightops.merge(*[make(f"in/{name}", A) for name in names], **words)
    assert report.output == output
    assert Path(output).is_file()
    assert len(output.encode()) <= 255


def test_a_difference_is_named_after_base_and_model() -> None:
    report = weightops.merge(make("b", B), base=make("c", C), alpha=0.5)
    assert report.output == "c+b-0.5.safetensors"


def test_the_output_may_take_the_place_of_an_input_when_forced() -> None:
    a, b = pair()
    weightops.merge(a, b, output=a, force=True)
    with safe_open(a, "pt") as file:
        assert file.get_tensor(UNET).tolist() == [2.0, 4.0]


def test_a_dry_run_says_the_exact_size_and_writes_nothing() -> None:
    a, b = pair()
    before = sorted(p.name for p in Path().iterdir())
    dry = weightops.merge(a, b, output="out.safetensors", dtype="fp16", dry_run=True)
    assert sorted(p.name for p in Path().iterdir()) == before
    real = weightops.merge(a, b, output="out.safetensors", dtype="fp16")
    assert dry.bytes_written == real.bytes_written == Path("out.safetensors").stat().st_size
    assert dry.account == real.account
    assert (dry.dry_run, real.dry_run) == (True, False)
    assert [i["hash"] for i in dry.inputs] == [None, None]


def test_the_report_is_json_with_the_fields_that_scripts_rely_on() -> None:
    report, *_ = merged(*pair(), alpha=0.7)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found.keys() >= {
        "command", "version", "inputs", "output", "bytes_written", "keys", "seconds", "peak_memory_bytes", "warnings",
    }  # fmt: skip
    assert (found["command"], found["version"], found["output"]) == ("merge", __version__, "out.safetensors")
    assert found["bytes_written"] == Path("out.safetensors").stat().st_size
    assert [i["path"] for i in found["inputs"]] == ["a.safetensors", "b.safetensors"]
    assert [i["bytes"] for i in found["inputs"]] == [Path(i["path"]).stat().st_size for i in found["inputs"]]
    assert (found["keys"]["used"], found["keys"]["copied"], found["keys"]["kept"]) == (2, 1, [])
    assert found["keys"]["unused"] == [
        {"key": VAE, "source": "b.safetensors", "reason": "the VAE is taken from model 1", "asked": True}
    ]


def test_the_output_opens_everywhere_and_begins_as_the_format_wants() -> None:
    merged(*pair())
    written = Path("out.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", written[:8])
    assert length % 8 == 0
    with open_checkpoint("out.safetensors") as found:
        assert found.tensors.keys() == A.keys()
