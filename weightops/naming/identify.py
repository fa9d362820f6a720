"""Which component is this key, and which kind and architecture is this header? Names decide; no values are read."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.naming.keymap import ARCHITECTURES, NETWORKS, Architecture
from weightops.naming.recognise import Match, Unsure, agrees, canonical_shapes, is_marked, recognise, variant_of

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
    ("model.model.", MODEL),  # ComfyUI's HunyuanVideo
    ("diffusion_model.", MODEL),
    ("unet.", "unet"),
    ("transformer.", "transformer"),
    ("transformer_2.", "transformer_2"),
    ("first_stage_model.", "vae"),
    ("vae.", "vae"),
    ("cond_stage_model.transformer.", "text_encoder"),
    ("cond_stage_model.model.", "text_encoder"),
    ("cond_stage_model.", "text_encoder"),
    ("conditioner.embedders.0.transformer.", "text_encoder"),
    ("conditioner.embedders.0.model.", "text_encoder"),
    ("conditioner.embedders.0.", "text_encoder"),
    ("conditioner.embedders.1.model.", "text_encoder_2"),
    ("conditioner.embedders.1.", "text_encoder_2"),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_l.", "text_encoder"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("text_encoders.clip_g.", "text_encoder_2"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_3"),
    ("text_encoders.t5xxl.", "text_encoder_3"),
    ("text_encoders.umt5xxl.transformer.", "text_encoder"),
    ("text_encoders.umt5xxl.", "text_encoder"),
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

_ADAPTER = re.compile(
    r"[._:](lora_up|lora_down|lora_mid|lora_A|lora_B|lora\.up|lora\.down|lora_magnitude_vector|hada_w[12]_[ab]|hada_t[12]"
    r"|lokr_w[12](_[ab])?|lokr_t2|oft_blocks|oft_R|dora_scale|lora_linear_layer|to_[qkv]_lora|to_out_lora"
    r"|(qkv|proj)_lora[12]?)\b|\.([ab][12]\.weight|on_input|diff|diff_b|w_norm|b_norm|(set|reshape)_(weight|bias))$"
    r"|^(unet|text_encoder):\d+:(up|down)$|^(lora_unet|lora_te[123]?|lora_transformer|lycoris)_"
)
_VAE = ("decoder.conv_in.weight", "decoder.conv_in.bias", "encoder.conv_in.weight", "decoder.conv1.weight")
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


_TEXT_ENCODERS = frozenset({"text_encoder", "text_encoder_2", "text_encoder_3"})


_ROLES: dict[str | None, tuple[str, ...]] = {
    MODEL: ("unet", "transformer"),
    "unet": ("unet", "transformer"),
    "transformer": ("transformer", "unet"),
    "transformer_2": ("transformer",),
    "vae": ("vae",),
    "text_encoder": ("text_encoder",),
    "text_encoder_2": ("text_encoder",),
    "text_encoder_3": ("text_encoder",),
    None: ("unet", "transformer", "vae", "text_encoder"),
}


@dataclass(frozen=True, slots=True)
class Part:
    """The tensors of one component: key -> name without the component's prefix, and the network that it is."""

    bodies: Mapping[str, str]
    found: Match | Unsure

    @property
    def match(self) -> Match | None:
        return self.found if isinstance(self.found, Match) else None


@dataclass(frozen=True, slots=True)
class Identity:
    """What a header is. `architecture` is that of the diffusion model; of a VAE or a text encoder alone, its variant.

    kind: checkpoint, lora, vae, text_encoder, embedding, controlnet or unknown. components: key -> component.
    possible: what it may be, where names and shapes cannot tell. strangers: keys within a known
    network's component that are none of its tensors.
    """

    kind: str
    architecture: str | None
    spelling: str | None
    variant: str | None
    parts: Mapping[str, Part]
    components: Mapping[str, str]
    possible: tuple[str, ...] = ()

    @property
    def strangers(self) -> tuple[str, ...]:
        found: list[str] = []
        for part in self.parts.values():
            if part.match is not None:
                strange = set(part.match.strangers)
                found.extend(key for key, body in part.bodies.items() if body in strange)
        return tuple(found)


def identify(tensors: Mapping[str, TensorInfo]) -> Identity:
    """Everything that a header's names and shapes tell. Adapters are looked at more closely in weightops.lora."""
    if any(_ADAPTER.search(key) for key in tensors) or _is_pairs(tensors):
        return Identity("lora", None, None, None, {}, dict.fromkeys(tensors, "adapter"))
    groups: dict[str | None, dict[str, str]] = {}
    for key in tensors:
        groups.setdefault(component_of(key), {})[key] = body_of(key)
    parts = {group: _part(group, bodies, tensors) for group, bodies in groups.items() if group in _ROLES}
    parts |= {"ema": _average(groups["ema"], tensors)} if "ema" in groups else {}
    kind = _kind(tensors, groups, parts)
    model = next((parts[g] for g in (MODEL, "unet", "transformer", None) if g in parts), None)
    match = model.match if model is not None and kind != "unknown" else None
    architecture = architecture_with(match.network.name) if match is not None else None
    if match is None and kind in ("vae", "text_encoder") and len(set(parts) - {"ema"}) == 1:
        match = next(iter(parts.values())).match
    if kind == "unknown":
        averaged = _averaged(groups, tensors)
        if averaged is not None:
            return averaged
    components = _components(tensors, groups, kind, architecture, match)
    renamed = {components[next(iter(part.bodies))]: part for part in parts.values() if part.bodies}
    if match is None:
        unsure = model or (next(iter(parts.values())) if len(parts) == 1 else None)
        return Identity(kind, None, None, None, renamed, components, _possible(unsure))
    named = architecture.name if architecture is not None else match.variant or match.network.name
    return Identity(kind, named, match.spelling, match.variant, renamed, components)


def _possible(part: Part | None) -> tuple[str, ...]:
    """What a part may be, in the words of the answer: architectures, or networks that are no diffusion model."""
    if part is None or not isinstance(part.found, Unsure):
        return ()
    found = ((architecture_with(name), name) for name in part.found.possible)
    return tuple(sorted(name if architecture is None else architecture.name for architecture, name in found))


def _averaged(groups: Mapping[str | None, dict[str, str]], tensors: Mapping[str, TensorInfo]) -> Identity | None:
    """A file of LDM's average alone, with or without its prefix."""
    if len(groups) != 1 or any("." in body for keys in groups.values() for body in keys.values()):
        return None
    part = _average(next(iter(groups.values())), tensors)
    architecture = architecture_with(part.match.network.name) if part.match is not None else None
    if part.match is None or architecture is None:
        return None
    components = dict.fromkeys(tensors, "ema")
    return Identity("checkpoint", architecture.name, "ema", part.match.variant, {"ema": part}, components)


def _is_pairs(tensors: Mapping[str, TensorInfo]) -> bool:
    """A list of factors, up and down in turn, as cloneofsimo/lora pickled them."""
    shapes = [info.spec.shape for key, info in tensors.items() if key.isdecimal()]
    if not shapes or len(shapes) < len(tensors) or len(shapes) % 2:
        return False
    return all(len(u) == len(d) >= 2 and u[1] == d[0] for u, d in zip(shapes[::2], shapes[1::2], strict=True))


def _part(group: str | None, bodies: dict[str, str], tensors: Mapping[str, TensorInfo]) -> Part:
    shapes = {body: tensors[key].spec.shape for key, body in bodies.items() if not _beside(body)}
    return Part(bodies, recognise(shapes, _ROLES[group]))


def _beside(body: str) -> bool:
    """Is it a tensor that may stand in any file: a mark of how the weights are stored?"""
    return body in MARKERS or body in SCHEDULE or body == "scaled_fp8" or body.startswith("__")


def _average(bodies: dict[str, str], tensors: Mapping[str, TensorInfo]) -> Part:
    """LDM's average of the weights, whose names have lost their dots, or any other copy of them."""
    plain = {key: body.removeprefix("diffusion_model") for key, body in bodies.items()}
    for _, network in NETWORKS:
        table = network.tables().get("original") if network.role == "unet" else None
        if table is None or not plain:
            continue
        claims = {body: table.squashed(body) for body in plain.values() if body not in ("decay", "num_updates")}
        known = {body: claim for body, claim in claims.items() if claim is not None}
        shapes = {body: tensors[key].spec.shape for key, body in plain.items()}
        canonical = canonical_shapes(known, shapes)
        if not known or len(known) < len(claims) or not is_marked(network, known.values()):
            continue
        if all(agrees(name, shape, network.needs) for name, shape in canonical):
            return Part(plain, Match(network, "original", variant_of(network, canonical)))
    return Part(bodies, Unsure())


def architecture_with(network: str) -> Architecture | None:
    """The architecture whose diffusion model is this network."""
    return next((a for _, a in ARCHITECTURES if a.components[0].network == network), None)


def _kind(tensors: Mapping[str, TensorInfo], groups: Mapping[str | None, Any], parts: Mapping[str | None, Part]) -> str:
    if not tensors:
        return "unknown"
    # Averages and optimizer states say how a file was trained, not what it is.
    found = groups.keys() - {"ema", "optimizer"}
    bodies = {body for keys in groups.values() for body in keys.values()}
    if "controlnet" in found or any(mark in bodies for mark in _CONTROL):
        return "controlnet"
    if found & {MODEL, "unet", "transformer", "transformer_2"}:
        return "checkpoint"
    alone = parts[None].match if None in parts else None
    role = alone.network.role if alone is not None else None
    if role in ("unet", "transformer"):
        return "checkpoint"
    if found == {"vae"} or (found == {None} and (role == "vae" or any(mark in bodies for mark in _VAE))):
        return "vae"
    if found and found <= _TEXT_ENCODERS:
        return "text_encoder"
    if found == {None} and (role == "text_encoder" or any(all(m in bodies for m in marks) for marks in _TEXT)):
        return "unknown" if any(key.startswith(_WHOLE) for key in tensors) else "text_encoder"
    if len(tensors) <= 3 and all(key in _EMBEDDING or _TOKEN.fullmatch(key) for key in tensors):
        return "embedding"
    return "unknown"


def _components(
    tensors: Mapping[str, TensorInfo], groups: Mapping[str | None, Any], kind: str,
    architecture: Architecture | None, match: Match | None,
) -> dict[str, str]:  # fmt: skip
    """key -> component, for every key; named as diffusers names them, where the architecture is known."""
    role = match.network.role if match is not None else None
    model = role if role in ("unet", "transformer") else MODEL
    # A key without a prefix belongs to the diffusion model only where that has none either.
    prefixed = not {MODEL, "unet", "transformer"}.isdisjoint(groups)
    alone = "other" if prefixed else {"checkpoint": model, "unknown": "other"}.get(kind, kind)
    named: dict[str | None, str] = {None: alone, MODEL: model}
    found = {}
    for group, keys in groups.items():
        for key in keys:
            found[key] = named.get(group) or group or alone
    if architecture is not None:
        places = [(c.prefix, c.name) for c in architecture.components if c.prefix]
        places += [(c.comfy, c.name) for c in architecture.components if c.comfy]
        for prefix, name in sorted(places, key=lambda place: -len(place[0])):
            stem = prefix.removesuffix("transformer.").removesuffix("model.") if name != model else prefix
            found |= {key: name for key in tensors if key.startswith(stem or prefix) and found[key] != "ema"}
    return {key: found[key] for key in tensors}


# Names that stand beside weights whose values mean nothing without them. Source: ComfyUI (scaled fp8), bitsandbytes,
# transformers (fp8 in blocks), quanto, GPTQ and AWQ, nunchaku.
_SCALES = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|scale_input|(weight|input)_scale(_2)?|absmax|quant_state\..+|quant_map|SCB"
    r"|weight_scale_inv|weight\._(data|scale)|qweight|qzeros|wscales)$"
)


def quantised(tensors: Iterable[str]) -> str | None:
    """The first key which says that the weights are codes with scales beside them; arithmetic on those is wrong."""
    return next((key for key in tensors if _SCALES.search(key)), None)
