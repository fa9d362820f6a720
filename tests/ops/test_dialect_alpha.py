"""What stands beside the factors: alpha in its place or folded, dim, hashes and the rest of the metadata."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING

import pytest
import torch
from loras import (
    LORAS,
    MODULE,
    UNET,
    UNET_IN_LDM,
    Maker,
    convert,
    deltas,
    header,
    kohya_file,
    metadata_of,
    modules_of,
    named,
    needs_loras,
    raw,
    save,
    target,
    tensors_of,
)

from weightops.errors import FormatError
from weightops.lora.dialects import DIALECTS

if TYPE_CHECKING:
    from pathlib import Path

_LEGACY = {
    "format": "pt", "ss_network_dim": "4", "ss_network_alpha": "1.0", "ss_base_model_version": "sd_v1-5",
    "ss_tag_frequency": '{"a": {"b": 1}}', "sshs_model_hash": "0" * 64, "sshs_legacy_hash": "e3b0c442",
    "modelspec.hash_sha256": "0x" + "0" * 64, "modelspec.architecture": "stable-diffusion-v1/lora",
}  # fmt: skip


@needs_loras
@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfy", "onetrainer"])
def test_hashes_of_the_data_are_those_of_the_file_that_is_written(to: str, tmp_path: Path) -> None:
    source = LORAS / "lycoris_smart_falcon_4_lokr.safetensors"
    given = metadata_of(source)
    convert(source, to, tmp_path / "out.safetensors")
    head, data = header(tmp_path / "out.safetensors")
    found = head["__metadata__"]
    assert found["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert (found["sshs_model_hash"] == given["sshs_model_hash"]) == (data == header(source)[1])
    assert "sshs_legacy_hash" not in found
    kept = {k: v for k, v in given.items() if not k.startswith("sshs_")}
    assert {k: v for k, v in found.items() if k not in ("sshs_model_hash", "weightops", "format")} == kept


def test_a_model_spec_keeps_its_architecture_and_gets_its_own_hash(tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "a.safetensors", [4, 4, 4], [1, 1, 1], _LEGACY)
    convert(source, "diffusers", tmp_path / "out.safetensors", architecture="sd15")
    head, data = header(tmp_path / "out.safetensors")
    found, digest = head["__metadata__"], hashlib.sha256(data).hexdigest()
    assert found["modelspec.hash_sha256"] == f"0x{digest}"
    assert found["sshs_model_hash"] == digest
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert found["ss_tag_frequency"] == _LEGACY["ss_tag_frequency"]
    assert "sshs_legacy_hash" not in found


def test_hashes_that_were_not_there_are_not_invented(tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "a.safetensors", [4, 4, 4], [1, 1, 1], {"format": "pt"})
    convert(source, "comfy", tmp_path / "out.safetensors")
    assert metadata_of(tmp_path / "out.safetensors").keys() == {"format", "weightops"}


@pytest.mark.parametrize(
    ("ranks", "alphas", "alpha", "expected"),
    [
        ([4, 4, 4], [1.0, 1.0, 1.0], "carry", ("4", "1.0")),  # as it was spelled
        ([4, 4, 4], [2.5, 2.5, 2.5], "carry", ("4", "2.5")),
        ([4, 4, 4], [1.0, 1.0, 1.0], "fold", ("4", "4")),
        ([4, 2, 4], [1.0, 1.0, 1.0], "carry", ("Dynamic", "1.0")),
        ([4, 4, 4], [1.0, 2.0, 1.0], "carry", ("4", "Dynamic")),
        ([4, 2, 4], [1.0, 1.0, 1.0], "fold", ("Dynamic", "Dynamic")),
        ([3, 3, 3], [1.0, 1.0, 1.0], "carry", ("3", "1.0")),  # whatever the metadata said
    ],
)
def test_dim_and_alpha_in_the_metadata_are_true(
    ranks: list[int], alphas: list[float], alpha: str, expected: tuple[str, str], tmp_path: Path
) -> None:
    source = kohya_file(tmp_path / "a.safetensors", ranks, alphas, _LEGACY)
    convert(source, "kohya", tmp_path / "out.safetensors", alpha=alpha)
    found = metadata_of(tmp_path / "out.safetensors")
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == expected


def test_alpha_of_an_odd_number_loses_no_digit_in_the_metadata(tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "a.safetensors", [4, 4, 4], [0.123456789] * 3, _LEGACY)
    convert(source, "kohya", tmp_path / "out.safetensors")
    single = float(torch.tensor(0.123456789))
    assert float(metadata_of(tmp_path / "out.safetensors")["ss_network_alpha"]) == single


@pytest.mark.parametrize("to", DIALECTS)
def test_the_configuration_of_peft_stands_in_diffusers_header_alone(to: str, tmp_path: Path) -> None:
    told = {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {}, "unet.rank_pattern": {}}
    maker = Maker(6)
    parts = {".lora_A.weight": maker(4, 4), ".lora_B.weight": maker(4, 4)}
    modules = {f"unet.{UNET}.{name}": parts for name in ("to_q", "to_out.0")}
    source = save(tmp_path / "a.safetensors", named(modules), {"lora_adapter_metadata": json.dumps(told)})
    convert(source, to, target(tmp_path, to), architecture="sd15")
    files = [target(tmp_path, to)] if to != "peft" else [tmp_path / "peft" / "adapter_model.safetensors"]
    assert [("lora_adapter_metadata" in metadata_of(f)) for f in files] == [to == "diffusers"]
    # rank 4 in truth: the header's alpha counts, its rank does not
    assert {alpha for _, alpha in modules_of(target(tmp_path, to)).values()} == {8.0}


def test_strength_one_needs_no_header(tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "a.safetensors", [4, 2, 4], [4, 2, 4], _LEGACY)
    convert(source, "diffusers", tmp_path / "out.safetensors", architecture="sd15")
    assert "lora_adapter_metadata" not in metadata_of(tmp_path / "out.safetensors")


# ------------------------------------------------------------------------------------------------ alpha


@pytest.mark.parametrize("value", [0.0, -2.0, 1e-3, 3.0])
@pytest.mark.parametrize("to", DIALECTS)
def test_any_finite_alpha_is_a_strength(value: float, to: str, tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "a.safetensors", [4, 4, 4], [value, 1.0, value], {})
    convert(source, to, target(tmp_path, to), architecture="sd15")
    convert(target(tmp_path, to), "kohya", tmp_path / "back.safetensors", architecture="sd15")
    assert raw(tmp_path / "back.safetensors") == raw(source)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("to", DIALECTS)
def test_an_alpha_that_is_no_number_is_refused(value: float, to: str, tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "a.safetensors", [4, 4, 4], [1.0, value, 1.0], {})
    with pytest.raises(FormatError) as caught:
        convert(source, to, target(tmp_path, to), architecture="sd15")
    assert str(caught.value) == f"{source}: {MODULE.format('k')!r} has alpha {value}, expected a finite number"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64], ids=str)
def test_an_alpha_tensor_keeps_its_dtype_where_it_stays_a_tensor(dtype: torch.dtype, tmp_path: Path) -> None:
    maker = Maker(7)
    parts = maker.lora(16, 16, 4) | {".alpha": torch.tensor([2], dtype=dtype)}
    source = save(tmp_path / "a.safetensors", named({MODULE.format("q"): parts}))
    convert(source, "comfy", tmp_path / "there.safetensors", architecture="sd15")
    convert(tmp_path / "there.safetensors", "kohya", tmp_path / "back.safetensors", architecture="sd15")
    assert raw(tmp_path / "back.safetensors") == raw(source)


def test_alpha_goes_into_the_factors_where_it_is_folded(tmp_path: Path) -> None:
    """Rounded once: to the factors' own dtype."""
    maker = Maker(8, torch.float16)
    modules = {
        MODULE.format("q"): maker.lora(16, 16, 3, 2.0),
        MODULE.format("k"): {
            ".hada_w1_a": maker(16, 2), ".hada_w1_b": maker(2, 16), ".hada_w2_a": maker(16, 2),
            ".hada_w2_b": maker(2, 16), ".alpha": torch.tensor(3.0),
        },
        MODULE.format("v"): {".lokr_w1": maker(4, 4), ".lokr_w2_a": maker(4, 2), ".lokr_w2_b": maker(2, 4),
                              ".alpha": torch.tensor(0.5)},
    }  # fmt: skip
    source = save(tmp_path / "a.safetensors", named(modules))
    report = convert(source, "comfy", tmp_path / "out.safetensors", alpha="fold", check=True)
    found = tensors_of(tmp_path / "out.safetensors")
    assert not any(key.endswith(".alpha") for key in found)
    unused = {u.key: u.reason for u in report.account.unused}
    assert unused == {f"{name}.alpha": "its strength is folded into the factors" for name in modules}
    assert "alpha folded into the factors" in report.summary
    expected = {
        "lora_B.weight": (modules[MODULE.format("q")][".lora_up.weight"].double() * (2.0 / 3)).half(),
        "hada_w1_a": (modules[MODULE.format("k")][".hada_w1_a"].double() * 1.5).half(),
        "lokr_w1": (modules[MODULE.format("v")][".lokr_w1"].double() * 0.25).half(),
    }
    for ending, tensor in expected.items():
        (key,) = (k for k in found if k.endswith(ending))
        assert torch.equal(found[key], tensor)
    for name, change in deltas(source).items():
        out = deltas(tmp_path / "out.safetensors")[f"diffusion_model.{UNET_IN_LDM}.to_{name[-1]}"]
        assert torch.allclose(out, change, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_a_folded_strength_and_another_dtype_are_rounded_once(to: str, tmp_path: Path) -> None:
    """Strength 0 too: it is no missing one."""
    maker = Maker(16)
    modules = {MODULE.format("q"): maker.lora(16, 16, 3, 2.0), MODULE.format("k"): maker.lora(16, 16, 2, 0.0)}
    source = save(tmp_path / "a.safetensors", named(modules))
    convert(source, to, tmp_path / "out.safetensors", alpha="fold", dtype="bf16", architecture="sd15", check=True)
    ups = {"q": 2.0 / 3, "k": 0.0}
    for name, tensor in tensors_of(tmp_path / "out.safetensors").items():
        if name.endswith((".lora_up.weight", ".lora_B.weight")):
            projection = name.rpartition(".lora_")[0][-1]
            given = modules[MODULE.format(projection)][".lora_up.weight"]
            assert torch.equal(tensor, (given.double() * ups[projection]).bfloat16())


def test_text_encoders_can_be_left_out(tmp_path: Path) -> None:
    maker = Maker(9)
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    source = save(tmp_path / "a.safetensors", named({name: maker.lora(4, 4, 2) for name in (MODULE.format("q"), text)}))
    keys = list(raw(source))
    report = convert(source, "diffusers", tmp_path / "out.safetensors", drop=("text_encoder",), architecture="sd15")
    assert {k.split(".")[0] for k in tensors_of(tmp_path / "out.safetensors")} == {"unet"}
    dropped = {k for k in keys if k.startswith("lora_te_")}
    assert {u.key for u in report.account.unused} == dropped
    assert {(u.reason, u.asked) for u in report.account.unused} == {("--drop text_encoder", True)}
    accounted = [*report.account.used, *report.account.copied, *(u.key for u in report.account.unused)]
    assert sorted(accounted) == sorted(keys)
