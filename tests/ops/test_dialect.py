"""Adapter files in other dialects: real ones bit for bit, made ones by ΔW; metadata; what is said."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from loras import SHARED, Maker, convert, delta, deltas, header, metadata_of, modules_of, named, raw, save, tensors_of

sys.path.insert(0, str(Path(__file__).parents[1] / "naming"))
from tagged import needs_lists, shapes_of

from weightops.errors import FormatError, MismatchError
from weightops.files.checkpoint import open_checkpoint
from weightops.lora.adapters import read_adapters
from weightops.lora.dialects import DIALECTS

if TYPE_CHECKING:
    from torch import Tensor

LORAS = SHARED / "loras"
needs_loras = pytest.mark.skipif(not LORAS.is_dir(), reason="the real adapters (../shared/data/loras) are not here")

# Name -> the dialect and family that it is of, and the dialect in which it can be written as it was.
REAL = {
    "catundchat_sd15": ("diffusers processor", "lora", None),
    "hyper07_peft": ("peft", "lora", "peft"),
    "lycoris_smart_falcon_4_lokr": ("kohya", "lokr", "kohya"),
    "lycoris_smart_falcon_16_lokr": ("kohya", "lokr", "kohya"),
}


def real(name: str, folder: Path) -> Path:
    """A real file, or the folder that it was in."""
    if name != "hyper07_peft":
        return LORAS / f"{name}.safetensors"
    made = folder / name
    made.mkdir()
    shutil.copy(LORAS / f"{name}.safetensors", made / "adapter_model.safetensors")
    shutil.copy(LORAS / f"{name}.adapter_config.json", made / "adapter_config.json")
    return made


def target(folder: Path, to: str) -> Path:
    return folder / (to if DIALECTS[to].folder else f"{to}.safetensors")


@needs_loras
@needs_lists
@pytest.mark.parametrize("name", REAL)
def test_real_adapters_are_identified_and_fit_the_model_that_they_are_for(name: str, tmp_path: Path) -> None:
    encoder = {f"text_model.{key}": shape for key, shape in shapes_of("transformers_clip_l").items()}
    bases = {"unet": shapes_of("diffusers_sd15_unet"), "text_encoder": encoder}
    with open_checkpoint(real(name, tmp_path)) as opened:
        found = read_adapters(opened)
    found.check()
    assert (found.dialect, found.architecture) == (REAL[name][0], "sd15")
    assert {a.family.name for a in found.adapters} == {REAL[name][1]}
    for adapter in found.adapters:
        assert adapter.target is not None
        assert adapter.component is not None
        (module,) = adapter.target.names
        shape, base = adapter.family.shape(adapter.shapes), bases[adapter.component][f"{module}.weight"]
        assert shape is not None
        # The real LoKr have kernels flattened into their factors.
        assert shape == base or (adapter.family.flat and (shape[0], math.prod(shape)) == (base[0], math.prod(base)))


@needs_loras
@pytest.mark.parametrize("name", REAL)
def test_real_adapters_go_through_every_dialect_and_come_back_to_the_bit(name: str, tmp_path: Path) -> None:
    source = real(name, tmp_path)
    convert(source, "kohya", tmp_path / "direct.safetensors")
    direct = raw(tmp_path / "direct.safetensors")
    own = REAL[name][2]
    if own == "kohya":
        assert direct == raw(source)
    for to in DIALECTS:
        convert(source, to, target(tmp_path, to))
        back = tmp_path / f"{to}-kohya.safetensors"
        convert(target(tmp_path, to), "kohya", back)
        assert raw(back) == direct, to
        if own == "peft":
            convert(target(tmp_path, to), own, tmp_path / f"{to}-again")
            assert raw(tmp_path / f"{to}-again") == raw(source), to


@needs_loras
def test_a_folder_of_several_components_holds_each_in_its_own_and_opens_as_one(tmp_path: Path) -> None:
    convert(LORAS / "lycoris_smart_falcon_4_lokr.safetensors", "peft", tmp_path / "out")
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")) == [
        "text_encoder/adapter_config.json", "text_encoder/adapter_model.safetensors",
        "unet/adapter_config.json", "unet/adapter_model.safetensors",
    ]  # fmt: skip
    with open_checkpoint(tmp_path / "out") as opened:
        found = read_adapters(opened)
    found.check()
    assert {a.component for a in found.adapters} == {"unet", "text_encoder"}
    assert len(found.adapters) == 350


@needs_loras
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("cloneofsimo_lora_disney.safetensors", "text_encoder:0:down"),
        ("cloneofsimo_analog_svd_rank4.safetensors", "text_encoder:0:down"),
        ("pickle/cloneofsimo_lora_pop.pt", "0"),
        ("pickle/cloneofsimo_lora_kiriko2.text_encoder.pt", "0"),
    ],
)
def test_modules_named_by_number_are_identified_and_refused(name: str, key: str, tmp_path: Path) -> None:
    with open_checkpoint(LORAS / name) as opened:
        assert read_adapters(opened).dialect == "cloneofsimo"
    with pytest.raises(MismatchError) as caught:
        convert(LORAS / name, "kohya", tmp_path / "out.safetensors")
    assert str(caught.value) == (
        f"{LORAS / name}: names its modules by number ({key!r}), in the order in which the trainer's own copy of the "
        "model listed them, and that order cannot be proved from the file"
    )
    assert not (tmp_path / "out.safetensors").exists()


# ------------------------------------------------------------------------------------------------ schemes

_UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
_TEXT = "text_model.encoder.layers.0.self_attn"
_IN_LDM = "input_blocks.1.1.transformer_blocks.0.attn2"
_OUT = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
_PROJ = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def scheme(unet: str, up: str, down: str, text: str = "", *, flat: bool = False) -> dict[tuple[str, str], str]:
    """(canonical module, up or down) -> key. `{}` in the names stands for the projection, `{o}` for out without 0."""
    found = {}
    for name, out in _OUT.items():
        for part, ending in (("up", up), ("down", down)):
            stem = unet.format(name, o=out)
            found[f"{_UNET}.{name}", part] = (stem.replace(".", "_") if flat else stem) + ending.format(o=out)
            if text:
                stem = text.format(_PROJ[out], o=out)
                found[f"{_TEXT}.{_PROJ[out]}", part] = (stem.replace(".", "_") if flat else stem) + ending.format(o=out)
    return found


def both(unet: dict[tuple[str, str], str], text: dict[tuple[str, str], str]) -> dict[tuple[str, str], str]:
    return {k: v for k, v in unet.items() if k[0].startswith(_UNET)} | {
        k: v for k, v in text.items() if k[0].startswith(_TEXT)
    }


_PEFT, _KOHYA = (".lora_B.weight", ".lora_A.weight"), (".lora_up.weight", ".lora_down.weight")
_PROCESSOR = (".processor.{o}_lora.up.weight", ".processor.{o}_lora.down.weight")
SCHEMES = {
    "kohya": scheme(f"lora.unet.{_UNET}.{{}}", *_KOHYA, f"lora.te.{_TEXT}.{{}}", flat=True),
    "kohya, LDM's names": scheme(f"lora.unet.{_IN_LDM}.{{}}", *_KOHYA, flat=True),
    "diffusers to 0.19": scheme(_UNET, *_PROCESSOR),
    "diffusers to 0.24": both(
        scheme(f"unet.{_UNET}", *_PROCESSOR),
        scheme("", ".{o}_lora.up.weight", ".{o}_lora.down.weight", f"text_encoder.{_TEXT}"),
    ),
    "diffusers from 0.25": both(
        scheme(f"unet.{_UNET}.{{}}", ".lora.up.weight", ".lora.down.weight"),
        scheme("", ".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight", f"text_encoder.{_TEXT}.{{}}"),
    ),
    "diffusers": scheme(f"unet.{_UNET}.{{}}", *_PEFT, f"text_encoder.{_TEXT}.{{}}"),
    "ComfyUI": scheme(f"diffusion_model.{_IN_LDM}.{{}}", *_PEFT, f"text_encoders.clip_l.transformer.{_TEXT}.{{}}"),
    "ComfyUI, diffusers' names": scheme(f"diffusion_model.{_UNET}.{{}}", *_PEFT),
    "no prefix, kohya's endings": scheme(f"{_UNET}.{{}}", *_KOHYA),
    "no prefix": scheme(f"{_UNET}.{{}}", *_PEFT),
    "PEFT": scheme(f"base_model.model.{_UNET}.{{}}", *_PEFT),
    "PEFT, not saved by it": scheme(
        f"base_model.model.unet.{_UNET}.{{}}", ".lora_B.default.weight", ".lora_A.default.weight"
    ),
    "mochi": scheme(f"{_UNET}.{{}}", ".lora_B", ".lora_A"),
    "LyCORIS": scheme(f"lycoris.{_UNET}.{{}}", *_KOHYA, flat=True),
    "mixed": both(
        scheme(f"lora.unet.{_UNET}.{{}}", *_KOHYA, flat=True),
        scheme("", *_PEFT, f"text_encoder.{_TEXT}.{{}}"),
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_one_adapter_is_read_from_every_scheme(name: str, tmp_path: Path) -> None:
    maker = Maker(1)
    keys = SCHEMES[name]
    factors = {}
    for module in dict.fromkeys(SCHEMES["kohya"][place] for place in SCHEMES["kohya"]):
        factors[module] = maker(16 if "up" in module else 2, 2 if "up" in module else 16)
    kohya = SCHEMES["kohya"]
    tensors = {key: factors[kohya[place]] for place, key in keys.items()}
    source = save(tmp_path / "source.safetensors", tensors)
    convert(source, "kohya", tmp_path / "out.safetensors", architecture="sd15")
    found = {k: t for k, t in tensors_of(tmp_path / "out.safetensors").items() if not k.endswith(".alpha")}
    assert found.keys() == {kohya[place] for place in keys}
    assert all(torch.equal(tensor, factors[key]) for key, tensor in found.items())
    alphas = {k: t for k, t in tensors_of(tmp_path / "out.safetensors").items() if k.endswith(".alpha")}
    assert len(alphas) == len(keys) / 2
    assert all(float(alpha) == 2 for alpha in alphas.values())


def test_a_file_of_two_dialects_is_written_in_one(tmp_path: Path) -> None:
    keys = list(SCHEMES["mixed"].values())
    assert any(key.startswith("lora_unet_") for key in keys)
    assert any(key.startswith("text_encoder.") for key in keys)
    maker = Maker(2)
    source = save(tmp_path / "source.safetensors", {k: maker(4, 4) for k in keys})
    convert(source, "diffusers", tmp_path / "out.safetensors", architecture="sd15")
    assert {k.split(".")[0] for k in tensors_of(tmp_path / "out.safetensors")} == {"unet", "text_encoder"}


def test_onetrainers_flux_counts_its_text_encoders_from_one(tmp_path: Path) -> None:
    """T5 is lora_te2 there, and lora_te3 in kohya's names; what an embedding is stays an embedding."""
    maker = Maker(3)
    modules = {
        "lora_transformer_transformer_blocks_0_attn_to_out_0": maker.lora(16, 16, 2, 1.0),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": maker.lora(32, 16, 2, 1.0),
        "lora_te2_encoder_block_3_layer_0_SelfAttention_q": maker.lora(16, 16, 2, 1.0),
    }
    embedding = {"bundle_emb.token.t5": maker(4, 16), "bundle_emb.token.clip_l": maker(4, 16)}
    source = save(tmp_path / "source.safetensors", named(modules) | embedding)
    report = convert(source, "kohya", tmp_path / "there.safetensors", architecture="flux")
    found = tensors_of(tmp_path / "there.safetensors")
    assert {key.partition(".")[0] for key in found} == {
        "lora_unet_double_blocks_0_img_attn_proj", "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te3_encoder_block_3_layer_0_SelfAttention_q", "bundle_emb",
    }  # fmt: skip
    assert all(torch.equal(found[key], tensor) for key, tensor in embedding.items())
    assert not report.account.unused
    convert(tmp_path / "there.safetensors", "onetrainer", tmp_path / "back.safetensors", architecture="flux")
    assert raw(tmp_path / "back.safetensors") == raw(source)
    report = convert(source, "peft", tmp_path / "out", architecture="flux")
    assert [(u.key, u.reason, u.asked) for u in report.account.unused] == [
        (key, "an embedding has no place in a PEFT folder", False) for key in sorted(embedding)
    ]


def test_wan_fun_and_distilled_wan_are_read(tmp_path: Path) -> None:
    maker = Maker(4)
    fun = {"lora_unet__blocks_0_cross_attn_k": maker.lora(16, 16, 2, 1.0)}
    source = save(tmp_path / "fun.safetensors", named(fun))
    convert(source, "diffusers", tmp_path / "fun-out.safetensors")
    assert list(modules_of(tmp_path / "fun-out.safetensors")) == ["transformer.blocks.0.attn2.to_k"]
    distilled = {
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": maker(2, 16),
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight": maker(16, 2),
        "diffusion_model.blocks.0.self_attn.q.diff_b": maker(16),
        "diffusion_model.blocks.0.norm3.diff": maker(16),
        "diffusion_model.blocks.0.norm3.diff_b": maker(16),
        "diffusion_model.head.head.diff": maker(64, 16),
        "diffusion_model.head.head.diff_b": maker(64),
    }
    source = save(tmp_path / "distilled.safetensors", distilled)
    convert(source, "diffusers", tmp_path / "there.safetensors")
    found = tensors_of(tmp_path / "there.safetensors")
    assert sorted(found) == [
        "transformer.blocks.0.attn1.to_q.diff_b", "transformer.blocks.0.attn1.to_q.lora_A.weight",
        "transformer.blocks.0.attn1.to_q.lora_B.weight", "transformer.blocks.0.norm2.diff",
        "transformer.blocks.0.norm2.diff_b", "transformer.proj_out.diff", "transformer.proj_out.diff_b",
    ]  # fmt: skip
    assert torch.equal(found["transformer.blocks.0.norm2.diff"], distilled["diffusion_model.blocks.0.norm3.diff"])
    convert(tmp_path / "there.safetensors", "comfy", tmp_path / "back.safetensors")
    back = {k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t
            for k, t in raw(tmp_path / "back.safetensors").items()}  # fmt: skip
    assert back == raw(source)


# ------------------------------------------------------------------------------------------------ metadata

_MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_{}"
_LEGACY = {
    "format": "pt", "ss_network_dim": "4", "ss_network_alpha": "1.0", "ss_base_model_version": "sd_v1-5",
    "ss_tag_frequency": '{"a": {"b": 1}}', "sshs_model_hash": "0" * 64, "sshs_legacy_hash": "e3b0c442",
    "modelspec.hash_sha256": "0x" + "0" * 64, "modelspec.architecture": "stable-diffusion-v1/lora",
}  # fmt: skip


def kohya_file(path: Path, ranks: list[int], alphas: list[float], metadata: dict[str, str]) -> Path:
    maker = Maker(5)
    modules = {
        _MODULE.format(name): maker.lora(16, 16, rank, alpha)
        for name, rank, alpha in zip(("q", "k", "v"), ranks, alphas, strict=True)
    }
    return save(path, named(modules), metadata)


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
    source = save(
        tmp_path / "a.safetensors", {key: maker(4, 4) for key in SCHEMES["diffusers"].values() if "unet" in key},
        {"lora_adapter_metadata": json.dumps(told)},
    )  # fmt: skip
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
    assert str(caught.value) == f"{source}: {_MODULE.format('k')!r} has alpha {value}, expected a finite number"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64], ids=str)
def test_an_alpha_tensor_keeps_its_dtype_where_it_stays_a_tensor(dtype: torch.dtype, tmp_path: Path) -> None:
    maker = Maker(7)
    parts = maker.lora(16, 16, 4) | {".alpha": torch.tensor([2], dtype=dtype)}
    source = save(tmp_path / "a.safetensors", named({_MODULE.format("q"): parts}))
    convert(source, "comfy", tmp_path / "there.safetensors", architecture="sd15")
    convert(tmp_path / "there.safetensors", "kohya", tmp_path / "back.safetensors", architecture="sd15")
    assert raw(tmp_path / "back.safetensors") == raw(source)


def test_alpha_goes_into_the_factors_where_it_is_folded(tmp_path: Path) -> None:
    """Rounded once: to the factors' own dtype."""
    maker = Maker(8, torch.float16)
    modules = {
        _MODULE.format("q"): maker.lora(16, 16, 3, 2.0),
        _MODULE.format("k"): {
            ".hada_w1_a": maker(16, 2), ".hada_w1_b": maker(2, 16), ".hada_w2_a": maker(16, 2),
            ".hada_w2_b": maker(2, 16), ".alpha": torch.tensor(3.0),
        },
        _MODULE.format("v"): {".lokr_w1": maker(4, 4), ".lokr_w2_a": maker(4, 2), ".lokr_w2_b": maker(2, 4),
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
        "lora_B.weight": (modules[_MODULE.format("q")][".lora_up.weight"].double() * (2.0 / 3)).half(),
        "hada_w1_a": (modules[_MODULE.format("k")][".hada_w1_a"].double() * 1.5).half(),
        "lokr_w1": (modules[_MODULE.format("v")][".lokr_w1"].double() * 0.25).half(),
    }
    for ending, tensor in expected.items():
        (key,) = (k for k in found if k.endswith(ending))
        assert torch.equal(found[key], tensor)
    for name, change in deltas(source).items():
        out = deltas(tmp_path / "out.safetensors")[
            f"diffusion_model.{_IN_LDM}.to_{name[-1]}"
        ]
        assert torch.allclose(out, change, rtol=2e-3, atol=1e-2)


def test_text_encoders_can_be_left_out(tmp_path: Path) -> None:
    maker = Maker(9)
    keys = list(SCHEMES["kohya"].values())
    source = save(tmp_path / "a.safetensors", {k: maker(4, 4) for k in keys})
    report = convert(source, "diffusers", tmp_path / "out.safetensors", drop=("text_encoder",), architecture="sd15")
    assert {k.split(".")[0] for k in tensors_of(tmp_path / "out.safetensors")} == {"unet"}
    dropped = {k for k in keys if k.startswith("lora_te_")}
    assert {u.key for u in report.account.unused} == dropped
    assert {(u.reason, u.asked) for u in report.account.unused} == {("--drop text_encoder", True)}
    accounted = [*report.account.used, *report.account.copied, *(u.key for u in report.account.unused)]
    assert sorted(accounted) == sorted(keys)
