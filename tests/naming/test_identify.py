"""What is this file? Names decide; an honest None is allowed, a wrong answer is not."""

from __future__ import annotations

import functools
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from weightops.files.tensor import TensorInfo, TensorSpec
from weightops.naming.identify import (
    ARCHITECTURES,
    architecture_of,
    body_of,
    component_of,
    components_of,
    kind_of,
    quantised,
    spelling_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ROOT = Path(__file__).parents[2]
KEYS = ROOT.parent / "shared" / "data" / "keys"

# The field's own key lists: file -> architecture, kind, spelling.
LISTS: dict[str, tuple[str | None, str, str | None]] = {
    "diffusers_auraflow": (None, "unknown", None),
    "diffusers_chroma1": ("chroma", "checkpoint", "diffusers"),
    "diffusers_cogvideox_5b": (None, "unknown", None),
    "diffusers_ernie_image": (None, "unknown", None),
    "diffusers_flux2_dev": ("flux2", "checkpoint", "diffusers"),
    "diffusers_flux2_klein_4b": ("flux2", "checkpoint", "diffusers"),
    "diffusers_flux2_vae": (None, "vae", "diffusers"),
    "diffusers_flux_dev": ("flux", "checkpoint", "diffusers"),
    "diffusers_flux_schnell": ("flux", "checkpoint", "diffusers"),
    "diffusers_flux_vae": (None, "vae", "diffusers"),
    "diffusers_hidream_i1": (None, "unknown", None),
    "diffusers_hunyuan_video": ("hunyuan_video", "checkpoint", "diffusers"),
    "diffusers_hunyuan_video15": (None, "unknown", None),
    "diffusers_krea2": (None, "unknown", None),
    "diffusers_ltx2": (None, "unknown", None),
    "diffusers_ltx_video": (None, "unknown", None),
    "diffusers_lumina2": ("lumina2", "checkpoint", "diffusers"),
    "diffusers_mochi": (None, "unknown", None),
    "diffusers_pixart_sigma": (None, "unknown", None),
    "diffusers_qwen_image": ("qwen_image", "checkpoint", "diffusers"),
    "diffusers_qwen_image_vae": (None, "vae", "diffusers"),
    "diffusers_sana_1600m": (None, "unknown", None),
    "diffusers_sd15_inpaint_unet": ("sd15", "checkpoint", "diffusers"),
    "diffusers_sd15_unet": ("sd15", "checkpoint", "diffusers"),
    "diffusers_sd21_unet": ("sd2", "checkpoint", "diffusers"),
    "diffusers_sd35_large": ("sd3", "checkpoint", "diffusers"),
    "diffusers_sd3_medium": ("sd3", "checkpoint", "diffusers"),
    "diffusers_sd_vae": (None, "vae", "diffusers"),
    "diffusers_sdxl_refiner_unet": ("sdxl_refiner", "checkpoint", "diffusers"),
    "diffusers_sdxl_unet": ("sdxl", "checkpoint", "diffusers"),
    "diffusers_wan21_i2v_14b": ("wan", "checkpoint", "diffusers"),
    "diffusers_wan21_t2v_14b": ("wan", "checkpoint", "diffusers"),
    "diffusers_wan21_t2v_1_3b": ("wan", "checkpoint", "diffusers"),
    "diffusers_wan22_i2v_14b": ("wan", "checkpoint", "diffusers"),
    "diffusers_wan_vae": (None, "vae", "diffusers"),
    "diffusers_z_image": ("z_image", "checkpoint", "diffusers"),
    "invoke_anima_lora_kohya_format": (None, "lora", None),
    "invoke_anima_lora_kohya_with_te_format": (None, "lora", None),
    "invoke_anima_lora_lokr_format": (None, "lora", None),
    "invoke_anima_lora_peft_format": (None, "lora", None),
    "invoke_flux_control_lora_format": (None, "lora", None),
    "invoke_flux_lokr_bfl_format": (None, "lora", None),
    "invoke_flux_lora_diffusers_base_model_format": (None, "lora", None),
    "invoke_flux_lora_diffusers_format": (None, "lora", None),
    "invoke_flux_lora_diffusers_no_proj_mlp_format": (None, "lora", None),
    "invoke_flux_lora_kohya_format": (None, "lora", None),
    "invoke_flux_lora_xlabs_format": (None, "lora", None),
    "invoke_krea2_lora_kohya_format": (None, "lora", None),
    "invoke_qwen_image_lora_diffusers_format": (None, "lora", None),
    "invoke_qwen_image_lora_kohya_format": (None, "lora", None),
    "orig_chroma_bfl": ("chroma", "checkpoint", "original"),
    "orig_comfy_chroma": ("chroma", "checkpoint", "original"),
    "orig_comfy_flux2_dev": ("flux2", "checkpoint", "original"),
    "orig_comfy_flux2_klein_4b": ("flux2", "checkpoint", "original"),
    "orig_comfy_flux_dev": ("flux", "checkpoint", "original"),
    "orig_comfy_hunyuan_video": ("hunyuan_video", "checkpoint", "original"),
    "orig_comfy_lumina2": ("lumina2", "checkpoint", "original"),
    "orig_comfy_qwen_image": ("qwen_image", "checkpoint", "diffusers"),
    "orig_comfy_wan21_i2v_14b": ("wan", "checkpoint", "original"),
    "orig_comfy_z_image": ("z_image", "checkpoint", "original"),
    "orig_flux2_dev": ("flux2", "checkpoint", "original"),
    "orig_flux_dev_bfl": ("flux", "checkpoint", "original"),
    "orig_hunyuan_video_tencent": ("hunyuan_video", "checkpoint", "original"),
    "orig_sd35_large": ("sd3", "checkpoint", "original"),
    "orig_sd3_medium": ("sd3", "checkpoint", "original"),
    "orig_wan21_t2v_14b": ("wan", "checkpoint", "original"),
    "orig_wan21_t2v_1_3b": ("wan", "checkpoint", "original"),
    "orig_wan21_vae": (None, "vae", "original"),
    "orig_wan22_i2v_14b": ("wan", "checkpoint", "original"),
    "sdmecha_flux-flux": ("flux", "checkpoint", "original"),
    "sdmecha_sd1-kohya": ("sd15", "checkpoint", "diffusers"),
    "sdmecha_sd1-ldm": ("sd15", "checkpoint", "original"),
    "sdmecha_sd3-comfyui": ("sd3", "checkpoint", "original"),
    "sdmecha_sdxl-diffusers_unet_only": ("sdxl", "checkpoint", "diffusers"),
    "sdmecha_sdxl-kohya": ("sdxl", "checkpoint", "original"),
    "sdmecha_sdxl-sgm": ("sdxl", "checkpoint", "original"),
    "toolkit_CLIP-XL-SD": (None, "text_encoder", None),
    "toolkit_CLIP-v1-SD": (None, "text_encoder", None),
    "toolkit_CLIP-v2-SD": (None, "text_encoder", None),
    "toolkit_CLIP-v2-WD": (None, "text_encoder", None),
    "toolkit_ControlNet-v1-SD": ("sd15", "controlnet", "original"),
    "toolkit_Depth-v2-SD": (None, "unknown", None),
    "toolkit_LoRA-v1-CLIP": (None, "lora", None),
    "toolkit_LoRA-v1-UNET": (None, "lora", None),
    "toolkit_LoRA-v1A-CLIP": (None, "lora", None),
    "toolkit_LoRA-v1A-UNET": (None, "lora", None),
    "toolkit_UNET-XL-Refiner": ("sdxl_refiner", "checkpoint", "original"),
    "toolkit_UNET-XL-SD": ("sdxl", "checkpoint", "original"),
    "toolkit_UNET-v1-EMA": (None, "unknown", None),
    "toolkit_UNET-v1-Inpainting": ("sd15", "checkpoint", "original"),
    "toolkit_UNET-v1-Pix2Pix-EMA": (None, "unknown", None),
    "toolkit_UNET-v1-Pix2Pix": ("sd15", "checkpoint", "original"),
    "toolkit_UNET-v1-SD": ("sd15", "checkpoint", "original"),
    "toolkit_UNET-v2-Depth": ("sd2", "checkpoint", "original"),
    "toolkit_UNET-v2-Inpainting": ("sd2", "checkpoint", "original"),
    "toolkit_UNET-v2-SD": ("sd2", "checkpoint", "original"),
    "toolkit_VAE-v1-SD": (None, "vae", "original"),
    "transformers_clip_bigG": (None, "text_encoder", None),
    "transformers_clip_h_sd2": (None, "text_encoder", None),
    "transformers_clip_l": (None, "text_encoder", None),
    "transformers_t5_xxl_enc": (None, "text_encoder", None),
    "transformers_umt5_xxl_enc": (None, "text_encoder", None),
}

# Files of several components: component -> tensors.
COMPONENTS: dict[str, dict[str, int]] = {
    "sdmecha_flux-flux": {"transformer": 780, "text_encoder": 196, "text_encoder_2": 219, "vae": 244},
    "sdmecha_sd1-kohya": {"text_encoder": 196, "unet": 686, "vae": 248},
    "sdmecha_sd1-ldm": {"schedule": 12, "text_encoder": 197, "vae": 248, "unet": 686, "ema": 688},
    "sdmecha_sd3-comfyui": {
        "vae": 244, "transformer": 491, "schedule": 1,
        "text_encoder": 198, "text_encoder_2": 518, "text_encoder_3": 220,
    },
    "sdmecha_sdxl-kohya": {"vae": 248, "text_encoder": 197, "text_encoder_2": 517, "unet": 1680},
    "sdmecha_sdxl-sgm": {
        "schedule": 12, "text_encoder": 197, "text_encoder_2": 390, "marker": 4, "vae": 248, "unet": 1680,
    },
}  # fmt: skip

present = pytest.mark.skipif(not KEYS.is_dir(), reason="../shared/data/keys is not here")


def header(shapes: Mapping[str, Iterable[int]]) -> dict[str, TensorInfo]:
    return {key: TensorInfo(TensorSpec("F16", tuple(shape)), 0, 0, 0) for key, shape in shapes.items()}


def named(*keys: str) -> dict[str, TensorInfo]:
    return header(dict.fromkeys(keys, (4, 4)))


@functools.cache
def listed(name: str) -> dict[str, list[int]]:
    with gzip.open(KEYS / f"{name}.json.gz") as file:
        return {key: value["shape"] for key, value in json.load(file).items()}


def identity(tensors: Mapping[str, TensorInfo]) -> tuple[str | None, str, str | None]:
    return architecture_of(tensors), kind_of(tensors), spelling_of(tensors)


# ------------------------------------------------------------------------------------------------ the field's lists


@present
def test_the_table_has_a_row_for_every_list() -> None:
    assert sorted(LISTS) == sorted(p.name.removesuffix(".json.gz") for p in KEYS.glob("*.json.gz"))


@present
@pytest.mark.parametrize("name", LISTS)
def test_every_list_of_the_field_is_named_rightly_or_not_at_all(name: str) -> None:
    assert identity(header(listed(name))) == LISTS[name]


@present
@pytest.mark.parametrize("name", LISTS)
def test_every_key_has_one_component_and_a_file_of_one_component_has_one(name: str) -> None:
    tensors = header(listed(name))
    found = Counter(components_of(tensors).values())
    assert found.total() == len(tensors)
    alone = {
        "lora": "adapter",
        "unknown": "other",
        "checkpoint": "unet" if (LISTS[name][0] or "").startswith("sd") and LISTS[name][0] != "sd3" else "transformer",
    }.get(LISTS[name][1], LISTS[name][1])
    assert dict(found) == COMPONENTS.get(name, {alone: len(tensors)})


@present
@pytest.mark.parametrize("name", LISTS)
def test_tiny_models_of_an_architecture_are_recognised(name: str) -> None:
    tiny = {key: [min(d, 3) for d in shape] for key, shape in listed(name).items()}
    assert identity(header(tiny)) == LISTS[name]


@present
@pytest.mark.parametrize("name", LISTS)
def test_a_part_of_a_file_is_never_taken_for_something_else(name: str) -> None:
    keys = list(listed(name).items())
    architecture, kind, spelling = LISTS[name]
    # What is left of an adapter or a controlnet without the keys that mark it may be anything.
    kinds = {kind, "unknown"} | ({"checkpoint"} if kind in ("lora", "controlnet") else set())
    if name in COMPONENTS:  # a part may be all of one component
        kinds |= {"vae", "text_encoder"}
    for part in (keys[::3], keys[1::3], keys[: len(keys) // 2], keys[len(keys) // 2 :]):
        found = identity(header(dict(part)))
        assert found[0] in (architecture, None)
        assert found[1] in kinds
        assert found[2] in (spelling, None)


@present
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer.", "unet."])
def test_a_diffusion_model_is_the_same_under_every_prefix(prefix: str) -> None:
    for name, (architecture, kind, spelling) in LISTS.items():
        if kind == "checkpoint" and name not in COMPONENTS:
            prefixed = {prefix + key: shape for key, shape in listed(name).items()}
            assert identity(header(prefixed)) == (architecture, kind, spelling), name


# ------------------------------------------------------------------------------------------------ by hand


def test_every_row_of_the_table_can_be_reached() -> None:
    for architecture, spelling, marks in ARCHITECTURES:
        found = named(*marks)
        assert architecture_of(found) == architecture, marks
        assert spelling_of(found) == spelling, marks


def test_sd1_projects_with_a_convolution_and_sd2_with_a_matrix() -> None:
    key = "model.diffusion_model.input_blocks.1.1.proj_in.weight"
    assert architecture_of(header({key: (4, 4, 1, 1)})) == "sd15"
    assert architecture_of(header({key: (4, 4)})) == "sd2"
    assert architecture_of(header({key: (16,)})) is None


def test_video_models_are_not_taken_for_the_image_models_they_grew_from() -> None:
    assert architecture_of(named(
        "down_blocks.0.attentions.0.proj_in.weight",
        "down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_q.weight",
    )) is None  # fmt: skip


@pytest.mark.parametrize(
    ("key", "component", "body"),
    [
        ("model.diffusion_model.out.0.weight", "model", "out.0.weight"),
        ("diffusion_model.out.0.weight", "model", "out.0.weight"),
        ("model_ema.diffusion_modelout0weight", "ema", "diffusion_modelout0weight"),
        ("first_stage_model.decoder.conv_in.weight", "vae", "decoder.conv_in.weight"),
        ("vae.decoder.conv_in.weight", "vae", "decoder.conv_in.weight"),
        ("conditioner.embedders.1.model.ln_final.bias", "text_encoder_2", "model.ln_final.bias"),
        ("text_encoders.t5xxl.transformer.shared.weight", "text_encoder_3", "transformer.shared.weight"),
        ("text_encoders.qwen25_7b.model.norm.weight", "text_encoder", "qwen25_7b.model.norm.weight"),
        ("te2.text_projection.weight", "text_encoder_2", "text_projection.weight"),
        ("transformer.transformer_blocks.0.norm.weight", "transformer", "transformer_blocks.0.norm.weight"),
        ("transformer.resblocks.0.ln_1.bias", None, "transformer.resblocks.0.ln_1.bias"),
        ("optimizer_states.0.step", "optimizer", "0.step"),
        ("alphas_cumprod", "schedule", "alphas_cumprod"),
        ("denoiser.sigmas", "schedule", "sigmas"),
        ("v_pred", "marker", "v_pred"),
        ("text_encoder_of_mine.weight", None, "text_encoder_of_mine.weight"),
        ("", None, ""),
    ],
)
def test_a_key_begins_with_its_component(key: str, component: str | None, body: str) -> None:
    assert (component_of(key), body_of(key)) == (component, body)


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ((), "unknown"),
        (("x",), "unknown"),
        (("emb_params",), "embedding"),
        (("clip_l", "clip_g"), "embedding"),
        (("<my-token>",), "embedding"),
        (("<a>", "weight"), "unknown"),
        (("unet:0:up", "unet:0:down", "<s1>"), "lora"),
        (("lora_unet_x.diff",), "lora"),
        (("lora_te1_x.hada_w1_a",), "lora"),
        (("lycoris_x.lokr_w1",), "lora"),
        (("a.lora_linear_layer.up.weight",), "lora"),
        (("a.lora_A.default.weight",), "lora"),
        (("a.explora_up.weight",), "unknown"),
        (("encoder.conv_in.weight", "decoder.conv_in.weight", "model_ema.decoderconv_inweight"), "vae"),
        (("model_ema.x", "model_ema.decay"), "unknown"),
        (("control_model.input_blocks.0.0.weight",), "controlnet"),
        (("controlnet_cond_embedding.conv_in.weight",), "controlnet"),
        (("vae.decoder.conv_in.weight",), "vae"),
        (("first_stage_model.quant_conv.weight",), "vae"),
        (("cond_stage_model.transformer.text_model.final_layer_norm.bias",), "text_encoder"),
        (("text_encoders.clip_l.x", "text_encoders.t5xxl.x"), "text_encoder"),
        (("model.diffusion_model.x",), "checkpoint"),
        (("unet.x", "vae.x", "text_encoder.x"), "checkpoint"),
        (("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"), "text_encoder"),
        (("encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.block.0.layer.0.x"), "unknown"),
        (("encoder.layers.0.self_attn.q_proj.weight", "embeddings.patch_embedding.weight"), "unknown"),
    ],
)
def test_kinds(keys: tuple[str, ...], kind: str) -> None:
    assert kind_of(named(*keys)) == kind


def test_a_key_of_no_component_is_not_counted_to_a_model_that_has_a_prefix() -> None:
    found = components_of(named("model.diffusion_model.x", "depth_model.x", "global_step", "v_pred", "betas"))
    assert list(found.values()) == ["model", "other", "other", "marker", "schedule"]


def test_the_refiners_text_encoder_is_the_second() -> None:
    found = components_of(
        named(
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.3.norm1.weight",
            "conditioner.embedders.0.model.ln_final.bias",
        )
    )
    assert list(found.values()) == ["unet", "text_encoder_2"]


@pytest.mark.parametrize(
    ("key", "is_scale"),
    [
        ("scaled_fp8", True),
        ("model.diffusion_model.scaled_fp8", True),
        ("blocks.0.ffn.0.scale_weight", True),
        ("blocks.0.ffn.0.weight_scale", True),
        ("blocks.0.ffn.0.weight_scale_2", True),
        ("blocks.0.ffn.0.weight.absmax", True),
        ("blocks.0.ffn.0.weight.quant_state.bitsandbytes__nf4", True),
        ("blocks.0.scale_shift_table", False),
        ("double_blocks.0.img_attn.norm.key_norm.scale", False),
        ("logit_scale", False),
        ("layer_scale_weight", False),
    ],
)
def test_scales_beside_the_weights_are_known(key: str, is_scale: bool) -> None:
    assert quantised(["x.weight", key]) == (key if is_scale else None)


def test_no_list_of_the_field_is_taken_for_quantised() -> None:
    if not KEYS.is_dir():
        pytest.skip("../shared/data/keys is not here")
    assert [name for name in LISTS if quantised(listed(name))] == []
