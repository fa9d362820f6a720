"""Which component is this key, and which kind and architecture is this header? Names decide; no values are read."""

from __future__ import annotations

import functools
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
    ("model.model_sampling.", "schedule"),
    ("denoiser.", "schedule"),
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
    ("te.", "text_encoder"),
    ("te1.", "text_encoder"),
    ("te2.", "text_encoder_2"),
    ("te3.", "text_encoder_3"),
    ("image_encoder.", "image_encoder"),
    ("safety_checker.", "safety_checker"),
    ("control_model.", "controlnet"),
    ("controlnet.", "controlnet"),
    ("optimizer_states.", "optimizer"),
    ("optimizer.", "optimizer"),
)

# Text encoders alone, whose own names begin like a component's.
_BARE = ("transformer.resblocks.", "transformer.text_model.")

# What diffusers calls a component where the prefix alone does not tell.
_RENAMED: dict[tuple[str | None, str], str] = {
    ("sdxl_refiner", "text_encoder"): "text_encoder_2",
    ("flux", "text_encoder_3"): "text_encoder_2",
    ("chroma", "text_encoder_3"): "text_encoder",
}

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

# (architecture, spelling, keys): keys, without the diffusion model's prefix, that together only this architecture has
# in this spelling. The first row of which all keys are found counts, so relatives stand before the model that they
# descend from. None: a relative that is not named here, and must not be taken for its ancestor.
# Source: FORMATS §1; for the Nones ComfyUI 0b61ce5, model_detection.py.
ARCHITECTURES: tuple[tuple[str | None, str | None, tuple[str, ...]], ...] = (
    # UNets
    (None, None, ("input_blocks.1.1.time_stack.0.attn1.to_q.weight",)),  # Stable Video Diffusion
    (None, None, ("down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_q.weight",)),
    (None, None, ("down_blocks.0.temp_attentions.0.proj_in.weight",)),  # ModelScope, text to video
    ("sdxl_refiner", "original", ("input_blocks.4.1.transformer_blocks.3.norm1.weight",)),
    ("sdxl_refiner", "diffusers", ("down_blocks.1.attentions.0.transformer_blocks.3.norm1.weight",)),
    ("sdxl", "original", ("input_blocks.7.1.transformer_blocks.9.norm1.weight",)),
    ("sdxl", "diffusers", ("down_blocks.2.attentions.0.transformer_blocks.9.norm1.weight",)),
    # the Flux family, in which each descendant keeps most of the names
    ("flux2", "original", ("single_stream_modulation.lin.weight",)),
    ("flux2", "diffusers", ("single_stream_modulation.linear.weight",)),
    (None, None, ("distilled_guidance_layer.in_proj.bias", "nerf_blocks.0.norm.scale")),  # Chroma Radiance
    (None, None, ("distilled_guidance_layer.in_proj.bias", "nerf_blocks.0.norm.weight")),
    ("chroma", "diffusers", ("distilled_guidance_layer.in_proj.bias", "context_embedder.weight")),
    ("chroma", "original", ("distilled_guidance_layer.in_proj.bias", "txt_in.weight")),
    (None, None, ("cond_type_embed.weight",)),  # HunyuanVideo 1.5
    (None, None, ("cond_type_embedding.weight",)),
    (None, None, ("byt5_in.fc1.weight",)),  # HunyuanImage
    ("hunyuan_video", "original", (
        "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.weight",
        "vector_in.in_layer.weight",
    )),
    ("hunyuan_video", "diffusers", (
        "context_embedder.token_refiner.refiner_blocks.0.norm1.weight",
        "time_text_embed.text_embedder.linear_1.weight",
    )),
    ("flux", "original", (
        "double_blocks.0.img_attn.norm.key_norm.scale", "vector_in.in_layer.weight", "img_in.weight",
    )),
    ("flux", "original", (
        "double_blocks.0.img_attn.norm.key_norm.weight", "vector_in.in_layer.weight", "img_in.weight",
    )),
    ("flux", "diffusers", (
        "single_transformer_blocks.0.norm.linear.weight",
        "time_text_embed.text_embedder.linear_1.weight",
        "x_embedder.weight",
    )),
    # other transformers
    ("sd3", "original", ("joint_blocks.0.context_block.adaLN_modulation.1.bias",)),
    ("sd3", "diffusers", ("pos_embed.proj.weight", "time_text_embed.text_embedder.linear_1.weight")),
    ("wan", "original", ("head.modulation",)),
    ("wan", "diffusers", ("condition_embedder.time_proj.weight",)),
    ("z_image", "original", ("layers.0.adaLN_modulation.0.weight", "layers.0.attention.qkv.weight")),
    ("z_image", "diffusers", ("layers.0.adaLN_modulation.0.weight", "layers.0.attention.to_q.weight")),
    ("lumina2", "original", ("layers.0.adaLN_modulation.1.weight", "noise_refiner.0.adaLN_modulation.1.weight")),
    (None, None, ("time_caption_embed.caption_embedder.0.weight", "image_index_embedding")),  # OmniGen2
    ("lumina2", "diffusers", ("time_caption_embed.caption_embedder.0.weight",)),
    ("qwen_image", "diffusers", ("transformer_blocks.0.img_mod.1.weight",)),  # its own names are diffusers'
)  # fmt: skip
# SD1 and SD2 have the same names: SD1 projects with a 1x1 convolution, SD2 with a matrix.
_SD_PROJECTIONS = (
    ("original", "input_blocks.1.1.proj_in.weight"),
    ("diffusers", "down_blocks.0.attentions.0.proj_in.weight"),
)
_UNETS = frozenset({"sd15", "sd2", "sdxl", "sdxl_refiner"})

_ADAPTER = re.compile(
    r"[._:](lora_up|lora_down|lora_A|lora_B|lora\.up|lora\.down|hada_w[12]_[ab]|lokr_w[12](_[ab])?|lokr_t2|oft_blocks|oft_R"
    r"|lora_mid|dora_scale|lora_linear_layer|to_[qkv]_lora|to_out_lora|(qkv|proj)_lora[12]?)\b"
    r"|^(unet|text_encoder):\d+:(up|down)$|^(lora_unet|lora_te[123]?|lora_transformer|lycoris)_"
)
_VAE = ("decoder.conv_in.weight", "decoder.conv_in.bias", "encoder.conv_in.weight", "decoder.conv1.weight")
_VAE_SPELLINGS = (
    ("original", "decoder.mid.block_1.conv1.weight"),
    ("original", "encoder.mid.block_1.conv1.weight"),
    ("original", "decoder.conv1.weight"),  # Wan
    ("diffusers", "decoder.mid_block.resnets.0.conv1.weight"),
    ("diffusers", "encoder.mid_block.resnets.0.conv1.weight"),
)
_TEXT = (
    ("text_model.encoder.layers.0.self_attn.q_proj.weight", "text_model.embeddings.token_embedding.weight"),
    ("encoder.layers.0.self_attn.q_proj.weight", "embeddings.token_embedding.weight"),
    ("transformer.resblocks.0.attn.in_proj_weight", "token_embedding.weight"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight",),
)
_WHOLE = ("vision_model.", "visual.", "decoder.block.")  # beside a text encoder: all of a CLIP or a T5
_EMBEDDING = frozenset({"emb_params", "clip_l", "clip_g", "t5xxl", "string_to_param.*"})
_TOKEN = re.compile(r"<.+>")
_CONTROL = ("controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight", "controlnet_blocks.0.weight")


_BEGINNINGS = tuple(prefix for prefix, _ in PREFIXES)


@functools.lru_cache(maxsize=1 << 16)
def _prefix_of(key: str) -> tuple[str, str] | None:
    if not key.startswith(_BEGINNINGS) or key.startswith(_BARE):
        return None
    return next((row for row in PREFIXES if key.startswith(row[0])), None)


# Components that a user may leave out of a file.
DROPPABLE = ("ema", "optimizer", "schedule", "vae", "text_encoder", "safety_checker")


def component_of(key: str) -> str | None:
    """The component that a key's beginning names, None where it names none (a file of one component)."""
    found = _prefix_of(key)
    if found is not None:
        return found[1]
    if key in SCHEDULE:
        return "schedule"
    return "marker" if key in MARKERS else None


def family_of(component: str) -> str:
    """text_encoder for each of several text encoders; anything else is itself."""
    return "text_encoder" if component.startswith("text_encoder") else component


def body_of(key: str) -> str:
    """The key without the prefix that names its component."""
    found = _prefix_of(key)
    return key if found is None else key[len(found[0]) :]


def architecture_of(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The architecture whose own names stand in the header; None is an honest answer."""
    return _identify(tensors)[0]


def _identify(tensors: Mapping[str, TensorInfo]) -> tuple[str | None, str | None]:
    """Architecture and spelling of the diffusion model."""
    bodies = {body_of(key): info for key, info in tensors.items() if component_of(key) in _DIFFUSION}
    for architecture, spelling, marks in ARCHITECTURES:
        if all(mark in bodies for mark in marks):
            return architecture, spelling
    for spelling, mark in _SD_PROJECTIONS:
        if mark in bodies:
            architecture = {4: "sd15", 2: "sd2"}.get(len(bodies[mark].spec.shape))
            return architecture, spelling if architecture else None
    return None, None


def spelling_of(tensors: Mapping[str, TensorInfo]) -> str | None:
    """original (the authors' names, as single files have them) or diffusers; None where it cannot be told."""
    kind = kind_of(tensors)
    if kind in ("checkpoint", "controlnet"):
        return _identify(tensors)[1]
    if kind == "vae":
        bodies = {body_of(key) for key in tensors}
        return next((spelling for spelling, mark in _VAE_SPELLINGS if mark in bodies), None)
    return None


_DIFFUSION = frozenset({MODEL, "unet", "transformer", "controlnet", None})
_TEXT_ENCODERS = frozenset({"text_encoder", "text_encoder_2", "text_encoder_3"})


def kind_of(tensors: Mapping[str, TensorInfo]) -> str:
    """checkpoint, lora, vae, text_encoder, embedding, controlnet or unknown."""
    if not tensors:
        return "unknown"
    if any(_ADAPTER.search(key) for key in tensors):
        return "lora"
    # Averages and optimizer states say how a file was trained, not what it is.
    found = {component_of(key) for key in tensors} - {"ema", "optimizer"}
    bodies = {body_of(key) for key in tensors}
    if "controlnet" in found or any(mark in bodies for mark in _CONTROL):
        return "controlnet"
    if architecture_of(tensors) is not None or found & {MODEL, "unet", "transformer"}:
        return "checkpoint"
    if found == {"vae"} or (found == {None} and any(mark in bodies for mark in _VAE)):
        return "vae"
    if found and found <= _TEXT_ENCODERS:
        return "text_encoder"
    if found == {None} and any(all(mark in bodies for mark in marks) for marks in _TEXT):
        return "unknown" if any(key.startswith(_WHOLE) for key in tensors) else "text_encoder"
    if len(tensors) <= 3 and all(key in _EMBEDDING or _TOKEN.fullmatch(key) for key in tensors):
        return "embedding"
    return "unknown"


def components_of(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """key -> component, for every key. The diffusion model is called unet or transformer where that is known."""
    kind, architecture = kind_of(tensors), architecture_of(tensors)
    if kind == "lora":
        return dict.fromkeys(tensors, "adapter")
    model = MODEL if architecture is None else "unet" if architecture in _UNETS else "transformer"
    found = {key: component_of(key) for key in tensors}
    # A key without a prefix belongs to the diffusion model only where that has none either.
    prefixed = not {MODEL, "unet", "transformer"}.isdisjoint(found.values())
    alone = "other" if prefixed else {"checkpoint": model, "unknown": "other"}.get(kind, kind)
    named = {None: alone, MODEL: model}
    return {key: _RENAMED.get((architecture, c or ""), named.get(c, c or alone)) for key, c in found.items()}


# Names that stand beside weights whose values mean nothing without them. Source: ComfyUI (scaled fp8), bitsandbytes.
_SCALES = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|scale_input|(weight|input)_scale(_2)?|absmax|quant_state\..+|quant_map|SCB)$"
)


def quantised(tensors: Iterable[str]) -> str | None:
    """The first key which says that the weights are codes with scales beside them; arithmetic on those is wrong."""
    return next((key for key in tensors if _SCALES.search(key)), None)
