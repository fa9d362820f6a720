"""Which component is this key, and which kind and architecture is this header? Names decide; no values are read."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from weightops.files.tensor import TensorInfo

# Where the diffusion model itself stands in a single file; its name (unet, transformer) follows from the architecture.
MODEL = "model"

# The beginning of a key -> the component. The first that fits counts.
# Source: FORMATS §1, §3, §4: LDM, SGM and ComfyUI single files, and diffusers' folder names.
PREFIXES: tuple[tuple[str, str], ...] = (
    ("model_ema.", "ema"),
    ("model.diffusion_model.", MODEL),
    ("diffusion_model.", MODEL),
    ("unet.", "unet"),
    ("transformer.", "transformer"),
    ("transformer_2.", "transformer_2"),
    ("first_stage_model.", "vae"),
    ("vae.", "vae"),
    ("cond_stage_model.", "text_encoder"),
    ("conditioner.embedders.0.", "text_encoder"),
    ("conditioner.embedders.1.", "text_encoder_2"),
    ("text_encoders.clip_l.", "text_encoder"),
    ("text_encoders.clip_g.", "text_encoder_2"),
    ("text_encoders.t5xxl.", "text_encoder_3"),
    ("text_encoders.", "text_encoder"),
    ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder_3.", "text_encoder_3"),
    ("image_encoder.", "image_encoder"),
    ("safety_checker.", "safety_checker"),
    ("control_model.", "controlnet"),
    ("controlnet.", "controlnet"),
    ("optimizer_states.", "optimizer"),
    ("optimizer.", "optimizer"),
)

# Whole keys: the noise schedule's buffers, and empty tensors that mark how a model was trained.
SCHEDULE = frozenset({
    "alphas_cumprod", "alphas_cumprod_prev", "betas", "log_one_minus_alphas_cumprod", "logvar",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance",
    "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
})  # fmt: skip
MARKERS = frozenset({"v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"})

# Metadata that says the same as a marker tensor.
MARKER_METADATA = ("modelspec.prediction_type", "ss_v_parameterization", "ss_zero_terminal_snr")

# A key (without the diffusion model's prefix) that only this architecture has, in any of its spellings; the first
# that is found counts, so the more particular stand first. Source: FORMATS §1.
ARCHITECTURES: tuple[tuple[str, str], ...] = (
    ("input_blocks.4.1.transformer_blocks.3.norm1.weight", "sdxl_refiner"),
    ("down_blocks.1.attentions.0.transformer_blocks.3.norm1.weight", "sdxl_refiner"),
    ("input_blocks.7.1.transformer_blocks.9.norm1.weight", "sdxl"),
    ("down_blocks.2.attentions.0.transformer_blocks.9.norm1.weight", "sdxl"),
    ("single_stream_modulation.lin.weight", "flux2"),
    ("single_stream_modulation.linear.weight", "flux2"),
    ("distilled_guidance_layer.in_proj.bias", "chroma"),
    ("double_blocks.0.img_attn.norm.key_norm.scale", "flux"),
    ("double_blocks.0.img_attn.norm.key_norm.weight", "flux"),
    ("time_text_embed.text_embedder.linear_1.weight", "flux"),
    ("joint_blocks.0.context_block.adaLN_modulation.1.bias", "sd3"),
    ("pos_embed.pos_embed", "sd3"),
    ("head.modulation", "wan"),
    ("condition_embedder.time_proj.weight", "wan"),
    ("layers.0.adaLN_modulation.0.weight", "z_image"),
    ("layers.0.adaLN_modulation.1.weight", "lumina2"),
    ("time_caption_embed.caption_embedder.0.weight", "lumina2"),
    ("transformer_blocks.0.img_mod.1.weight", "qwen_image"),
    ("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.weight", "hunyuan_video"),
    ("context_embedder.token_refiner.refiner_blocks.0.norm1.weight", "hunyuan_video"),
)
# SD1 and SD2 have the same names: SD1 projects with a 1x1 convolution, SD2 with a matrix.
_SD_PROJECTIONS = ("input_blocks.1.1.proj_in.weight", "down_blocks.0.attentions.0.proj_in.weight")
_UNETS = frozenset({"sd15", "sd2", "sdxl", "sdxl_refiner"})

_ADAPTER = re.compile(
    r"[._:](lora_up|lora_down|lora_A|lora_B|lora\.up|lora\.down|hada_w1_a|lokr_w1|lokr_w1_a|lokr_w2|oft_blocks|oft_R"
    r"|lora_mid|dora_scale|lora_linear_layer|to_[qkv]_lora|to_out_lora)\b|^(unet|text_encoder):\d+:(up|down)$"
)
_VAE = ("decoder.conv_in.weight", "decoder.conv_in.bias", "encoder.conv_in.weight", "decoder.conv1.weight")
_TEXT = (
    "text_model.encoder.layers.0.self_attn.q_proj.weight",
    "encoder.layers.0.self_attn.q_proj.weight",
    "transformer.resblocks.0.attn.in_proj_weight",
    "encoder.block.0.layer.0.SelfAttention.q.weight",
)
_EMBEDDING = frozenset({"emb_params", "clip_l", "clip_g", "t5xxl", "string_to_param.*"})
_CONTROL = ("controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight", "controlnet_blocks.0.weight")


def component_of(key: str) -> str | None:
    """The component that a key's beginning names, None where it names none (a file of one component)."""
    for prefix, component in PREFIXES:
        if key.startswith(prefix):
            return component
    if key in SCHEDULE:
        return "schedule"
    return "marker" if key in MARKERS else None


def body_of(key: str) -> str:
    """The key without the prefix that names its component."""
    for prefix, _ in PREFIXES:
        if key.startswith(prefix):
            return key[len(prefix) :]
    return key


def architecture_of(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The architecture whose own names stand in the header; None is an honest answer."""
    bodies = {body_of(key): info for key, info in tensors.items() if component_of(key) in _DIFFUSION}
    for mark, architecture in ARCHITECTURES:
        if mark in bodies:
            return architecture
    for mark in _SD_PROJECTIONS:
        if mark in bodies:
            return "sd15" if len(bodies[mark].spec.shape) == 4 else "sd2"
    return None


_DIFFUSION = frozenset({MODEL, "unet", "transformer", None})


def kind_of(tensors: Mapping[str, TensorInfo]) -> str:
    """checkpoint, lora, vae, text_encoder, embedding, controlnet or unknown."""
    if not tensors:
        return "unknown"
    if any(_ADAPTER.search(key) for key in tensors):
        return "lora"
    found = {component_of(key) for key in tensors}
    bodies = {body_of(key) for key in tensors}
    if "controlnet" in found or any(mark in bodies for mark in _CONTROL):
        return "controlnet"
    if architecture_of(tensors) is not None or found & {MODEL, "unet", "transformer"}:
        return "checkpoint"
    if found == {"vae"} or (found == {None} and any(mark in bodies for mark in _VAE)):
        return "vae"
    if found <= {"text_encoder", "text_encoder_2", "text_encoder_3"}:
        return "text_encoder"
    if found == {None} and any(mark in bodies for mark in _TEXT):
        return "text_encoder"
    if len(tensors) <= 3 and any(key in _EMBEDDING for key in tensors):
        return "embedding"
    return "unknown"


def components_of(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """key -> component, for every key. The diffusion model is called unet or transformer where that is known."""
    architecture = architecture_of(tensors)
    model = MODEL if architecture is None else "unet" if architecture in _UNETS else "transformer"
    kind = kind_of(tensors)
    alone = {"checkpoint": model, "unknown": "other", "lora": "adapter"}.get(kind, kind)
    found: dict[str, str] = {}
    for key in tensors:
        component = component_of(key)
        if kind == "lora":
            found[key] = alone
        else:
            found[key] = alone if component is None else model if component == MODEL else component
    return found


def only(components: Iterable[str], name: str) -> bool:
    """Is everything of the one component?"""
    return set(components) == {name}
