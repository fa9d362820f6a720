"""Real adapters in every dialect, and back bit for bit; and what a dialect cannot hold."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from loras import (
    LORAS,
    MODULE,
    Maker,
    convert,
    deltas,
    kohya_file,
    named,
    needs_loras,
    raw,
    save,
    target,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "naming"))
from tagged import needs_lists, shapes_of

from weightops.errors import MismatchError, UsageError
from weightops.files.checkpoint import open_checkpoint
from weightops.lora.adapters import read_adapters
from weightops.lora.dialects import DIALECTS

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


# ------------------------------------------------------------------------------------------------ what a dialect lacks


def told(source: Path, to: str, architecture: str | None = None) -> str:
    """Why a file is not written in the dialect."""
    with pytest.raises(MismatchError) as caught:
        convert(source, to, source.parent / "refused", architecture=architecture)
    assert not (source.parent / "refused").exists()
    return str(caught.value).removeprefix(f"{source}: ")


@pytest.mark.parametrize("to", ["peft", "diffusers"])
def test_what_pefts_dora_cannot_say_is_refused(to: str, tmp_path: Path) -> None:
    maker = Maker(10)
    inward = {MODULE.format("q"): maker.lora(16, 8, 2) | {".dora_scale": maker(1, 8)}}
    assert told(save(tmp_path / "a.safetensors", named(inward)), to, "sd15") == (
        f"{MODULE.format('q')!r} has a magnitude for each input, [1, 8], and {to}'s DoRA one for each output"
    )
    some = {
        MODULE.format("q"): maker.lora(16, 8, 2) | {".dora_scale": maker(16, 1)},
        MODULE.format("k"): maker.lora(16, 8, 2),
    }
    assert told(save(tmp_path / "b.safetensors", named(some)), to, "sd15") == (
        f"has magnitudes (DoRA) for some modules, and none for {MODULE.format('k')!r}: {to} has them for all or none"
    )
    loha = {".hada_w1_a": maker(16, 2), ".hada_w1_b": maker(2, 8), ".hada_w2_a": maker(16, 2),
            ".hada_w2_b": maker(2, 8), ".dora_scale": maker(1, 8)}  # fmt: skip
    assert told(save(tmp_path / "d.safetensors", named({MODULE.format("q"): loha})), to, "sd15") == (
        f"{MODULE.format('q')!r} is a loha with magnitudes, and {to} has them for LoRA alone"
    )
    core = {MODULE.format("q"): {".lora_up.weight": maker(16, 2), ".lora_mid.weight": maker(2, 2, 1, 1),
                                  ".lora_down.weight": maker(2, 8)}}  # fmt: skip
    assert told(save(tmp_path / "c.safetensors", named(core)), to, "sd15") == (
        f"{to} has no Tucker cores (lora_mid): {MODULE.format('q')!r}"
    )


def test_a_convolutions_magnitudes_have_the_shape_that_peft_gives_them(tmp_path: Path) -> None:
    maker = Maker(11)
    module = "lora_unet_down_blocks_0_resnets_0_conv1"
    parts = maker.lora(16, 8, 2, kernel=(3, 3)) | {".dora_scale": maker(16, 1, 1, 1)}
    source = save(tmp_path / "a.safetensors", named({module: parts}))
    convert(source, "peft", tmp_path / "out", architecture="sd15", check=True)
    found = raw(tmp_path / "out")["base_model.model.down_blocks.0.resnets.0.conv1.lora_magnitude_vector"]
    assert found == ("F32", (1, 16, 1, 1), raw(source)[f"{module}.dora_scale"][2])
    convert(tmp_path / "out", "kohya", tmp_path / "back.safetensors", architecture="sd15", check=True)
    back = {k: t for k, t in raw(tmp_path / "back.safetensors").items() if not k.endswith(".alpha")}
    assert back == raw(source)


def test_a_peft_folder_holds_one_family(tmp_path: Path) -> None:
    maker = Maker(12)
    modules = {MODULE.format("q"): maker.lora(16, 8, 2), MODULE.format("k"): {".diff": maker(16, 8)}}
    assert told(save(tmp_path / "a.safetensors", named(modules)), "peft", "sd15") == (
        "a PEFT folder holds one family of PEFT's, found full, lora"
    )


def test_a_kronecker_product_that_peft_cannot_load_is_written_with_a_warning(tmp_path: Path) -> None:
    maker = Maker(13)
    parts = {".lokr_w1": maker(8, 2), ".lokr_w2_a": maker(4, 1), ".lokr_w2_b": maker(1, 8), ".alpha": torch.tensor(1.0)}
    source = save(tmp_path / "a.safetensors", named({MODULE.format("q"): parts}))
    report = convert(source, "peft", tmp_path / "out", architecture="sd15")
    assert report.warnings == [
        "PEFT would share out these LoKr modules to other factors, and cannot load them; weightops can"
    ]
    convert(tmp_path / "out", "kohya", tmp_path / "back.safetensors", architecture="sd15")
    assert raw(tmp_path / "back.safetensors") == raw(source)


def test_an_alpha_that_means_nothing_is_named_where_it_is_left_out(tmp_path: Path) -> None:
    maker = Maker(14)
    parts = {".lokr_w1": maker(4, 2), ".lokr_w2": maker(4, 4), ".alpha": torch.tensor(4.0)}
    source = save(tmp_path / "a.safetensors", named({MODULE.format("q"): parts}))
    report = convert(source, "peft", tmp_path / "out", architecture="sd15")
    assert [(u.key, u.reason) for u in report.account.unused] == [
        (f"{MODULE.format('q')}.alpha", "two whole LoKr factors have strength 1")
    ]
    convert(source, "diffusers", tmp_path / "out.safetensors", architecture="sd15")
    convert(tmp_path / "out.safetensors", "kohya", tmp_path / "back.safetensors", architecture="sd15")
    assert raw(tmp_path / "back.safetensors") == raw(source)


def test_text_encoders_have_names_in_every_dialect_or_are_refused(tmp_path: Path) -> None:
    maker = Maker(15)
    umt5 = {"text_encoder.encoder.block.0.layer.0.SelfAttention.q": maker.lora(16, 16, 2, 2.0),
            "transformer.blocks.0.attn1.to_q": maker.lora(16, 16, 2, 2.0)}  # fmt: skip
    source = save(tmp_path / "a.safetensors", named(umt5))
    convert(source, "comfy", tmp_path / "comfy.safetensors", architecture="wan")
    assert {k.rpartition(".lora")[0] for k in raw(tmp_path / "comfy.safetensors") if "lora_A" in k} == {
        "diffusion_model.blocks.0.self_attn.q",
        "text_encoders.umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    }
    convert(tmp_path / "comfy.safetensors", "diffusers", tmp_path / "back.safetensors", architecture="wan")
    assert deltas(tmp_path / "back.safetensors").keys() == umt5.keys()
    assert told(source, "kohya", "wan") == "kohya has no names for the text_encoder of Wan 2.1 and 2.2"


def test_a_folder_is_not_named_like_a_file_nor_a_file_like_a_folder(tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "a.safetensors", [4, 4, 4], [1, 1, 1], {})
    with pytest.raises(UsageError, match="a folder is written here"):
        convert(source, "peft", tmp_path / "out.safetensors", architecture="sd15")
    with pytest.raises(UsageError, match=r"must end in \.safetensors"):
        convert(source, "comfy", tmp_path / "out", architecture="sd15")
