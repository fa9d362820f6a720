"""Every scheme that adapters are found in is read as the same adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from loras import (
    UNET,
    UNET_IN_LDM,
    Maker,
    convert,
    modules_of,
    named,
    raw,
    save,
    tensors_of,
)

if TYPE_CHECKING:
    from pathlib import Path

_TEXT = "text_model.encoder.layers.0.self_attn"
_OUT = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
_PROJ = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def scheme(unet: str, up: str, down: str, text: str = "", *, flat: bool = False) -> dict[tuple[str, str], str]:
    """(canonical module, up or down) -> key. `{}` in the names stands for the projection, `{o}` for out without 0."""
    found = {}
    for name, out in _OUT.items():
        for part, ending in (("up", up), ("down", down)):
            stem = unet.format(name, o=out)
            found[f"{UNET}.{name}", part] = (stem.replace(".", "_") if flat else stem) + ending.format(o=out)
            if text:
                stem = text.format(_PROJ[out], o=out)
                found[f"{_TEXT}.{_PROJ[out]}", part] = (stem.replace(".", "_") if flat else stem) + ending.format(o=out)
    return found


def both(unet: dict[tuple[str, str], str], text: dict[tuple[str, str], str]) -> dict[tuple[str, str], str]:
    return {k: v for k, v in unet.items() if k[0].startswith(UNET)} | {
        k: v for k, v in text.items() if k[0].startswith(_TEXT)
    }


_PEFT, _KOHYA = (".lora_B.weight", ".lora_A.weight"), (".lora_up.weight", ".lora_down.weight")
_PROCESSOR = (".processor.{o}_lora.up.weight", ".processor.{o}_lora.down.weight")
SCHEMES = {
    "kohya": scheme(f"lora.unet.{UNET}.{{}}", *_KOHYA, f"lora.te.{_TEXT}.{{}}", flat=True),
    "kohya, LDM's names": scheme(f"lora.unet.{UNET_IN_LDM}.{{}}", *_KOHYA, flat=True),
    "diffusers to 0.19": scheme(UNET, *_PROCESSOR),
    "diffusers to 0.24": both(
        scheme(f"unet.{UNET}", *_PROCESSOR),
        scheme("", ".{o}_lora.up.weight", ".{o}_lora.down.weight", f"text_encoder.{_TEXT}"),
    ),
    "diffusers from 0.25": both(
        scheme(f"unet.{UNET}.{{}}", ".lora.up.weight", ".lora.down.weight"),
        scheme("", ".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight", f"text_encoder.{_TEXT}.{{}}"),
    ),
    "diffusers": scheme(f"unet.{UNET}.{{}}", *_PEFT, f"text_encoder.{_TEXT}.{{}}"),
    "ComfyUI": scheme(f"diffusion_model.{UNET_IN_LDM}.{{}}", *_PEFT, f"text_encoders.clip_l.transformer.{_TEXT}.{{}}"),
    "ComfyUI, diffusers' names": scheme(f"diffusion_model.{UNET}.{{}}", *_PEFT),
    "no prefix, kohya's endings": scheme(f"{UNET}.{{}}", *_KOHYA),
    "no prefix": scheme(f"{UNET}.{{}}", *_PEFT),
    "PEFT": scheme(f"base_model.model.{UNET}.{{}}", *_PEFT),
    "PEFT, not saved by it": scheme(
        f"base_model.model.unet.{UNET}.{{}}", ".lora_B.default.weight", ".lora_A.default.weight"
    ),
    "mochi": scheme(f"{UNET}.{{}}", ".lora_B", ".lora_A"),
    "LyCORIS": scheme(f"lycoris.{UNET}.{{}}", *_KOHYA, flat=True),
    "mixed": both(
        scheme(f"lora.unet.{UNET}.{{}}", *_KOHYA, flat=True),
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
