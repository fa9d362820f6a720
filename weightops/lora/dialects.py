"""How the field's tools spell adapters: what stands before a module's name, what after it, and where alpha is.

Literal tables. A dialect is a beginning and an ending; the name in between belongs to weightops.naming.
Source: FORMATS §6; each row names the tool that writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

# The diffusion model, whichever of unet and transformer it is.
MODEL = "model"


class Beginning(NamedTuple):
    """What stands before the module's name. flat: the name's dots are underscores. `part`: of the pipeline."""

    text: str
    part: str
    flat: bool
    dialect: str


# The first that fits counts, so longer ones stand before their own beginnings.
BEGINNINGS: tuple[Beginning, ...] = (
    Beginning("lora_unet__", MODEL, True, "kohya"),  # Wan-Fun: the name's own beginning, flattened
    Beginning("lora_unet_", MODEL, True, "kohya"),
    Beginning("oft_unet_", MODEL, True, "kohya"),  # sd-scripts' networks/oft.py and oft_flux.py
    Beginning("lora_transformer_", MODEL, True, "onetrainer"),
    Beginning("lora_te1_", "te1", True, "kohya"),
    Beginning("lora_te2_", "te2", True, "kohya"),
    Beginning("lora_te3_", "te3", True, "kohya"),
    Beginning("lora_te_", "te", True, "kohya"),
    Beginning("lycoris_", MODEL, True, "lycoris"),  # SimpleTuner, and LyCORIS' own wrapper
    Beginning("unet.base_model.model.", MODEL, False, "peft"),
    Beginning("transformer.base_model.model.", MODEL, False, "peft"),
    Beginning("transformer_2.base_model.model.", MODEL, False, "peft"),
    Beginning("text_encoder.base_model.model.", "te1", False, "peft"),
    Beginning("text_encoder_2.base_model.model.", "te2", False, "peft"),
    Beginning("text_encoder_3.base_model.model.", "te3", False, "peft"),
    Beginning("base_model.model.unet.", MODEL, False, "peft"),
    Beginning("base_model.model.transformer.", MODEL, False, "peft"),
    Beginning("base_model.model.", "any", False, "peft"),
    Beginning("model.diffusion_model.", MODEL, False, "comfy"),
    Beginning("diffusion_model.", MODEL, False, "comfy"),
    Beginning("text_encoders.clip_l.transformer.", "te.clip_l", False, "comfy"),
    Beginning("text_encoders.clip_l.", "te.clip_l", False, "comfy"),
    Beginning("text_encoders.clip_h.transformer.", "te.clip_h", False, "comfy"),
    Beginning("text_encoders.clip_g.transformer.", "te.clip_bigg", False, "comfy"),
    Beginning("text_encoders.clip_g.", "te.clip_bigg", False, "comfy"),
    Beginning("text_encoders.t5xxl.transformer.", "te.t5_xxl", False, "comfy"),
    Beginning("text_encoders.t5xxl.", "te.t5_xxl", False, "comfy"),
    Beginning("text_encoders.umt5xxl.transformer.", "te.umt5_xxl", False, "comfy"),
    Beginning("text_encoders.umt5xxl.", "te.umt5_xxl", False, "comfy"),
    Beginning("transformer.text_model.", "any", False, "bare"),  # a CLIP alone, whose own name begins so
    Beginning("transformer_2.", MODEL, False, "diffusers"),
    Beginning("transformer.", MODEL, False, "diffusers"),
    Beginning("unet.", MODEL, False, "diffusers"),
    Beginning("text_encoder_2.", "te2", False, "diffusers"),
    Beginning("text_encoder_3.", "te3", False, "diffusers"),
    Beginning("text_encoder.", "te1", False, "diffusers"),
    Beginning("", "any", False, "bare"),
)


class Ending(NamedTuple):
    """What stands after the module's name: the part that the tensor is. `body` is put back onto the name."""

    text: str
    part: str
    scheme: str
    body: str = ""


# Each key has at most one of these; the longest that fits counts.
ENDINGS: tuple[Ending, ...] = (
    Ending(".lora_up.weight", "up", "kohya"),
    Ending(".lora_down.weight", "down", "kohya"),
    Ending(".lora_mid.weight", "mid", "kohya"),
    Ending(".lora_up.bias", "bias", "kohya"),
    Ending(".lora_A.weight", "down", "peft"),
    Ending(".lora_B.weight", "up", "peft"),
    Ending(".lora_B.bias", "bias", "peft"),
    Ending(".lora_A.default.weight", "down", "peft default"),
    Ending(".lora_B.default.weight", "up", "peft default"),
    Ending(".lora_B.default.bias", "bias", "peft default"),
    Ending(".lora_A", "down", "mochi"),
    Ending(".lora_B", "up", "mochi"),
    Ending(".lora.up.weight", "up", "diffusers 0.25"),
    Ending(".lora.down.weight", "down", "diffusers 0.25"),
    Ending(".lora_linear_layer.up.weight", "up", "diffusers text encoder"),
    Ending(".lora_linear_layer.down.weight", "down", "diffusers text encoder"),
    # diffusers to 0.24 hung its LoRAs on attention processors
    Ending(".processor.to_q_lora.up.weight", "up", "diffusers processor", ".to_q"),
    Ending(".processor.to_q_lora.down.weight", "down", "diffusers processor", ".to_q"),
    Ending(".processor.to_k_lora.up.weight", "up", "diffusers processor", ".to_k"),
    Ending(".processor.to_k_lora.down.weight", "down", "diffusers processor", ".to_k"),
    Ending(".processor.to_v_lora.up.weight", "up", "diffusers processor", ".to_v"),
    Ending(".processor.to_v_lora.down.weight", "down", "diffusers processor", ".to_v"),
    Ending(".processor.to_out_lora.up.weight", "up", "diffusers processor", ".to_out.0"),
    Ending(".processor.to_out_lora.down.weight", "down", "diffusers processor", ".to_out.0"),
    Ending(".processor.add_q_proj_lora.up.weight", "up", "diffusers processor", ".add_q_proj"),
    Ending(".processor.add_q_proj_lora.down.weight", "down", "diffusers processor", ".add_q_proj"),
    Ending(".processor.add_k_proj_lora.up.weight", "up", "diffusers processor", ".add_k_proj"),
    Ending(".processor.add_k_proj_lora.down.weight", "down", "diffusers processor", ".add_k_proj"),
    Ending(".processor.add_v_proj_lora.up.weight", "up", "diffusers processor", ".add_v_proj"),
    Ending(".processor.add_v_proj_lora.down.weight", "down", "diffusers processor", ".add_v_proj"),
    Ending(".self_attn.to_q_lora.up.weight", "up", "diffusers processor", ".self_attn.q_proj"),
    Ending(".self_attn.to_q_lora.down.weight", "down", "diffusers processor", ".self_attn.q_proj"),
    Ending(".self_attn.to_k_lora.up.weight", "up", "diffusers processor", ".self_attn.k_proj"),
    Ending(".self_attn.to_k_lora.down.weight", "down", "diffusers processor", ".self_attn.k_proj"),
    Ending(".self_attn.to_v_lora.up.weight", "up", "diffusers processor", ".self_attn.v_proj"),
    Ending(".self_attn.to_v_lora.down.weight", "down", "diffusers processor", ".self_attn.v_proj"),
    Ending(".self_attn.to_out_lora.up.weight", "up", "diffusers processor", ".self_attn.out_proj"),
    Ending(".self_attn.to_out_lora.down.weight", "down", "diffusers processor", ".self_attn.out_proj"),
    # XLabs, for Flux
    Ending(".processor.qkv_lora1.up.weight", "up", "xlabs", ".img_attn.qkv"),
    Ending(".processor.qkv_lora1.down.weight", "down", "xlabs", ".img_attn.qkv"),
    Ending(".processor.qkv_lora2.up.weight", "up", "xlabs", ".txt_attn.qkv"),
    Ending(".processor.qkv_lora2.down.weight", "down", "xlabs", ".txt_attn.qkv"),
    Ending(".processor.proj_lora1.up.weight", "up", "xlabs", ".img_attn.proj"),
    Ending(".processor.proj_lora1.down.weight", "down", "xlabs", ".img_attn.proj"),
    Ending(".processor.proj_lora2.up.weight", "up", "xlabs", ".txt_attn.proj"),
    Ending(".processor.proj_lora2.down.weight", "down", "xlabs", ".txt_attn.proj"),
    Ending(".processor.qkv_lora.up.weight", "up", "xlabs", ".qkv"),
    Ending(".processor.qkv_lora.down.weight", "down", "xlabs", ".qkv"),
    Ending(".processor.proj_lora.up.weight", "up", "xlabs", ".linear2"),
    Ending(".processor.proj_lora.down.weight", "down", "xlabs", ".linear2"),
    # LyCORIS
    Ending(".hada_w1_a", "hada_w1_a", "lycoris"),
    Ending(".hada_w1_b", "hada_w1_b", "lycoris"),
    Ending(".hada_w2_a", "hada_w2_a", "lycoris"),
    Ending(".hada_w2_b", "hada_w2_b", "lycoris"),
    Ending(".hada_t1", "hada_t1", "lycoris"),
    Ending(".hada_t2", "hada_t2", "lycoris"),
    Ending(".lokr_w1", "lokr_w1", "lycoris"),
    Ending(".lokr_w1_a", "lokr_w1_a", "lycoris"),
    Ending(".lokr_w1_b", "lokr_w1_b", "lycoris"),
    Ending(".lokr_w2", "lokr_w2", "lycoris"),
    Ending(".lokr_w2_a", "lokr_w2_a", "lycoris"),
    Ending(".lokr_w2_b", "lokr_w2_b", "lycoris"),
    Ending(".lokr_t2", "lokr_t2", "lycoris"),
    Ending(".a1.weight", "a1", "lycoris"),
    Ending(".a2.weight", "a2", "lycoris"),
    Ending(".b1.weight", "b1", "lycoris"),
    Ending(".b2.weight", "b2", "lycoris"),
    Ending(".oft_blocks", "oft_blocks", "lycoris"),
    Ending(".oft_blocks.0", "oft_blocks.0", "kohya"),  # for Flux, each of a packed module's bands its own
    Ending(".oft_blocks.1", "oft_blocks.1", "kohya"),
    Ending(".oft_blocks.2", "oft_blocks.2", "kohya"),
    Ending(".oft_blocks.3", "oft_blocks.3", "kohya"),
    Ending(".rescale", "rescale", "lycoris"),
    Ending(".on_input", "on_input", "lycoris"),
    Ending(".diff", "diff", "lycoris"),
    Ending(".diff_b", "diff_b", "lycoris"),
    Ending(".w_norm", "w_norm", "lycoris"),
    Ending(".b_norm", "b_norm", "lycoris"),
    Ending(".oft_R.weight", "oft_R", "peft"),
    Ending(".oft_R.default.weight", "oft_R", "peft default"),
    Ending(".set_weight", "set_weight", "comfy"),
    Ending(".set_bias", "set_bias", "comfy"),
    Ending(".reshape_weight", "reshape_weight", "comfy"),
    # any of them
    Ending(".alpha", "alpha", "any"),
    Ending(".dora_scale", "dora_scale", "any"),
    Ending(".lora_magnitude_vector", "dora_scale", "peft"),
    Ending(".lora_magnitude_vector.weight", "dora_scale", "peft"),
    Ending(".lora_magnitude_vector.default.weight", "dora_scale", "peft default"),
    Ending(".magnitude", "dora_scale", "ai-toolkit"),
)

_BY_TEXT = {ending.text: ending for ending in ENDINGS}
_LONGEST = max(text.count(".") for text in _BY_TEXT)


def ending_of(key: str) -> Ending | None:
    """The longest ending that the key has."""
    words = key.split(".")
    for count in range(min(_LONGEST, len(words) - 1), 0, -1):
        found = _BY_TEXT.get("." + ".".join(words[-count:]))
        if found is not None:
            return found
    return None


def beginning_of(key: str) -> Beginning:
    """The first beginning that the key has; the empty one stands last."""
    return next(beginning for beginning in BEGINNINGS if key.startswith(beginning.text))


@dataclass(frozen=True, slots=True)
class Dialect:
    """A way of writing adapters. `endings`: part -> what is written after the name; `alpha`: where the scale stands.

    alpha: tensor (beside the factors), header (diffusers' `lora_adapter_metadata`), config (PEFT's json). flat: the
    dots of names are underscores. folder: a folder is written, with a file for each component.
    """

    name: str
    endings: dict[str, str]
    alpha: str
    flat: bool = False
    folder: bool = False


_LYCORIS = {
    "hada_w1_a": ".hada_w1_a",
    "hada_w1_b": ".hada_w1_b",
    "hada_w2_a": ".hada_w2_a",
    "hada_w2_b": ".hada_w2_b",
    "hada_t1": ".hada_t1",
    "hada_t2": ".hada_t2",
    "lokr_w1": ".lokr_w1",
    "lokr_w1_a": ".lokr_w1_a",
    "lokr_w1_b": ".lokr_w1_b",
    "lokr_w2": ".lokr_w2",
    "lokr_w2_a": ".lokr_w2_a",
    "lokr_w2_b": ".lokr_w2_b",
    "lokr_t2": ".lokr_t2",
    "a1": ".a1.weight",
    "a2": ".a2.weight",
    "b1": ".b1.weight",
    "b2": ".b2.weight",
    "oft_blocks": ".oft_blocks",
    "oft_blocks.0": ".oft_blocks.0",
    "oft_blocks.1": ".oft_blocks.1",
    "oft_blocks.2": ".oft_blocks.2",
    "oft_blocks.3": ".oft_blocks.3",
    "oft_R": ".oft_R.weight",
    "rescale": ".rescale",
    "ia3": ".weight",
    "on_input": ".on_input",
    "diff": ".diff",
    "diff_b": ".diff_b",
    "w_norm": ".w_norm",
    "b_norm": ".b_norm",
    "set_weight": ".set_weight",
    "set_bias": ".set_bias",
    "reshape_weight": ".reshape_weight",
    "alpha": ".alpha",
    "dora_scale": ".dora_scale",
}
_KOHYA = _LYCORIS | {
    "up": ".lora_up.weight",
    "down": ".lora_down.weight",
    "mid": ".lora_mid.weight",
    "bias": ".lora_up.bias",
}
_PEFT = _LYCORIS | {
    "up": ".lora_B.weight",
    "down": ".lora_A.weight",
    "mid": ".lora_mid.weight",
    "bias": ".lora_B.bias",
}

DIALECTS: dict[str, Dialect] = {
    "kohya": Dialect("kohya", _KOHYA, "tensor", flat=True),
    "onetrainer": Dialect("onetrainer", _KOHYA, "tensor", flat=True),
    "comfy": Dialect("comfy", _PEFT, "tensor"),
    # Whole tensors of the model stand among diffusers' factors under their own names.
    "diffusers": Dialect(
        "diffusers",
        _PEFT | {"dora_scale": ".lora_magnitude_vector", "set_weight": ".weight", "set_bias": ".bias"},
        "header",
    ),
    "peft": Dialect("peft", _PEFT | {"dora_scale": ".lora_magnitude_vector"}, "config", folder=True),
}
