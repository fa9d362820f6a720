"""CLIP, OpenCLIP, T5 and UMT5: our tables against real lists, diffusers' converters and transformers' classes."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tagged import assert_equal, from_canonical, needs_lists, shapes_of, tagged, to_canonical
from test_unets import configured, header, library, recognised, shapes_in

from weightops.naming.identify import identify
from weightops.naming.keymap import ARCHITECTURES, NETWORKS, Component

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

# (list, prefix in the file) -> network, spelling, variant, tensors.
LISTS = {
    ("transformers_clip_l", ""): ("clip", "flat", "clip_l", 196),
    ("transformers_clip_h_sd2", ""): ("clip", "flat", "clip_h", 372),
    ("transformers_clip_bigG", ""): ("clip", "transformers", "clip_bigg", 517),
    ("transformers_t5_xxl_enc", ""): ("t5", "transformers", "t5_xxl", 220),
    ("transformers_umt5_xxl_enc", ""): ("umt5", "transformers", "umt5_xxl", 243),
    ("toolkit_CLIP-v1-SD", ""): ("clip", "flat", "clip_l", 197),
    ("toolkit_CLIP-v2-SD", ""): ("clip", "openclip", "clip_h", 294),
    ("toolkit_CLIP-v2-WD", ""): ("clip", "openclip", "clip_h", 280),
    ("toolkit_CLIP-XL-SD", ""): ("clip", "openclip", "clip_bigg", 390),
    ("sdmecha_sd1-ldm", "cond_stage_model.transformer."): ("clip", "transformers", "clip_l", 197),
    ("sdmecha_sd1-kohya", "te."): ("clip", "transformers", "clip_l", 196),
    ("sdmecha_sdxl-sgm", "conditioner.embedders.0.transformer."): ("clip", "transformers", "clip_l", 197),
    ("sdmecha_sdxl-sgm", "conditioner.embedders.1.model."): ("clip", "openclip", "clip_bigg", 390),
    ("sdmecha_sdxl-kohya", "te1."): ("clip", "transformers", "clip_l", 197),
    ("sdmecha_sdxl-kohya", "te2."): ("clip", "transformers", "clip_bigg", 517),
    ("sdmecha_flux-flux", "text_encoders.clip_l.transformer."): ("clip", "transformers", "clip_l", 196),
    ("sdmecha_flux-flux", "text_encoders.t5xxl.transformer."): ("t5", "transformers", "t5_xxl", 219),
    ("sdmecha_sd3-comfyui", "text_encoders.clip_l.transformer."): ("clip", "transformers", "clip_l", 197),
    ("sdmecha_sd3-comfyui", "text_encoders.clip_g.transformer."): ("clip", "transformers", "clip_bigg", 517),
    ("sdmecha_sd3-comfyui", "text_encoders.t5xxl.transformer."): ("t5", "transformers", "t5_xxl", 219),
}

# The single files of these have OpenCLIP's names.
OPENCLIP = {"sd2": "toolkit_CLIP-v2-SD", "sdxl": "toolkit_CLIP-XL-SD", "sdxl_refiner": "toolkit_CLIP-XL-SD"}

# Small models: network, class and configuration in transformers.
TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clip": ("clip", "CLIPText", {
        "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2,
        "vocab_size": 20, "max_position_embeddings": 7, "projection_dim": 6,
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    }),
    "t5": ("t5", "T5", {
        "d_model": 8, "d_ff": 12, "d_kv": 4, "num_heads": 2, "num_layers": 3, "vocab_size": 20,
        "feed_forward_proj": "gated-gelu",
    }),
    "t5 of one block": ("t5", "T5", {
        "d_model": 8, "d_ff": 12, "d_kv": 4, "num_heads": 2, "num_layers": 1, "vocab_size": 20,
        "feed_forward_proj": "gated-gelu",
    }),
    "umt5": ("umt5", "UMT5", {"d_model": 8, "d_ff": 12, "d_kv": 4, "num_heads": 2, "num_layers": 3, "vocab_size": 20}),
    "umt5 of two blocks": (
        "umt5", "UMT5", {"d_model": 8, "d_ff": 12, "d_kv": 4, "num_heads": 2, "num_layers": 2, "vocab_size": 20},
    ),
}  # fmt: skip


def part_of(name: str, prefix: str) -> Shapes:
    return {key.removeprefix(prefix): shape for key, shape in shapes_of(name).items() if key.startswith(prefix)}


def built(model: str, config: str, values: dict[str, Any]) -> Shapes:
    """Names and shapes of what a class of transformers makes of a configuration."""
    transformers = library("transformers")
    values = {key: value for key, value in values.items() if key not in ("architectures", "model_type")}
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        made = getattr(transformers, model)(getattr(transformers, config)(**values))
    return {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}


def tiny(name: str) -> Shapes:
    """Under canonical names, whatever this version of transformers calls them."""
    network, stem, values = TINY[name]
    model = "CLIPTextModelWithProjection" if network == "clip" else f"{stem}EncoderModel"
    return built(model, f"{stem}Config", values)


def encoder(architecture: str, name: str) -> Component:
    return next(c for c in ARCHITECTURES.get(architecture).components if c.name == name)


def kept(component: Component, tensors: dict[str, Any]) -> dict[str, Any]:
    """What diffusers' class has a place for."""
    return {key: value for key, value in tensors.items() if not key.startswith(component.omits or ("-",))}


# ------------------------------------------------------------------------------------------------ names and values


@needs_lists
@pytest.mark.parametrize(("name", "prefix"), LISTS)
def test_every_key_of_a_list_is_claimed_and_comes_back(name: str, prefix: str) -> None:
    network, spelling, _, count = LISTS[name, prefix]
    tensors = tagged(part_of(name, prefix))
    assert len(tensors) == count
    assert_equal(from_canonical(network, spelling, to_canonical(network, spelling, tensors)), tensors)


@needs_lists
@pytest.mark.parametrize(
    ("name", "prefix", "twin", "extra"),
    [
        ("toolkit_CLIP-v1-SD", "", "transformers_clip_l", {"text_model.embeddings.position_ids"}),
        ("sdmecha_sd1-kohya", "te.", "transformers_clip_l", set()),
        ("toolkit_CLIP-v2-WD", "", "transformers_clip_h_sd2", set()),
        ("toolkit_CLIP-XL-SD", "", "transformers_clip_bigG", {"logit_scale"}),
        ("sdmecha_sd3-comfyui", "text_encoders.clip_g.transformer.", "transformers_clip_bigG", set()),
        ("sdmecha_sd3-comfyui", "text_encoders.t5xxl.transformer.", "transformers_t5_xxl_enc", set()),
    ],
)
def test_a_file_has_the_names_and_shapes_of_transformers(name: str, prefix: str, twin: str, extra: set[str]) -> None:
    network, spelling, *_ = LISTS[name, prefix]
    found = shapes_in(to_canonical(network, spelling, tagged(part_of(name, prefix))))
    assert extra <= set(found)
    expected = shapes_in(to_canonical(network, LISTS[twin, ""][1], tagged(shapes_of(twin))))
    # The table of tokens, which T5 has under two names, is stored once in single files.
    expected.pop("encoder.embed_tokens.weight", None)
    assert {key: shape for key, shape in found.items() if key not in extra} == expected


@needs_lists
@pytest.mark.parametrize("architecture", OPENCLIP)
def test_openclip_becomes_what_diffusers_makes_of_it(architecture: str) -> None:
    component = encoder(architecture, "text_encoder" if architecture == "sd2" else "text_encoder_2")
    tensors = tagged(shapes_of(OPENCLIP[architecture]))
    if architecture != "sd2":  # nothing is mixed along columns but in the projection; the copies are large
        tensors = {k: t[:, :2] if t.dim() == 2 and k != "text_projection" else t for k, t in tensors.items()}
    theirs = library("diffusers.loaders.single_file_utils").convert_open_clip_checkpoint(
        SimpleNamespace(config=SimpleNamespace(hidden_size=1024 if architecture == "sd2" else 1280)),
        {component.prefix + key: tensor for key, tensor in tensors.items()},
        prefix=component.prefix,
    )
    assert_equal(kept(component, to_canonical(component.network, component.spelling, tensors)), theirs)


@needs_lists
def test_sd2_leaves_the_last_layer_out_as_diffusers_does() -> None:
    component = encoder("sd2", "text_encoder")
    found = kept(component, to_canonical("clip", "openclip", tagged(shapes_of("toolkit_CLIP-v2-SD"))))
    expected = to_canonical("clip", "flat", tagged(shapes_of("transformers_clip_h_sd2")))
    assert shapes_in(found) == shapes_in(expected)


@needs_lists
@pytest.mark.parametrize(
    ("architecture", "name"), [("sd15", "sdmecha_sd1-ldm"), ("sdxl", "sdmecha_sdxl-sgm")]
)  # fmt: skip
def test_clip_l_becomes_what_diffusers_makes_of_it(architecture: str, name: str) -> None:
    component = encoder(architecture, "text_encoder")
    tensors = tagged(part_of(name, component.prefix))
    single_file = library("diffusers.loaders.single_file_utils")
    theirs = single_file.convert_ldm_clip_checkpoint({component.prefix + k: tensor for k, tensor in tensors.items()})
    ours = to_canonical(component.network, component.spelling, tensors)
    assert_equal(ours, theirs)
    # Which positions there are is no weight: transformers counts them itself since version 4.31.
    assert set(ours) - set(kept(component, ours)) == {"text_model.embeddings.position_ids"}


@needs_lists
def test_queries_keys_and_values_are_three_bands_and_the_projection_is_turned() -> None:
    shapes = shapes_of("toolkit_CLIP-v2-SD")
    tensors = tagged(shapes) | {"text_projection": torch.arange(12.0).reshape(3, 4)}
    found = to_canonical("clip", "openclip", tensors)
    whole = tensors["transformer.resblocks.5.attn.in_proj_weight"]
    for number, part in enumerate("qkv"):
        band = found[f"text_model.encoder.layers.5.self_attn.{part}_proj.weight"]
        assert torch.equal(band[:, 0], whole[1024 * number : 1024 * (number + 1), 0])
    assert torch.equal(found["text_projection.weight"], torch.arange(12.0).reshape(3, 4).T)


def test_wans_own_names_of_umt5_are_those_of_its_module() -> None:
    canonical = tagged({k: s for k, s in tiny("umt5").items() if k != "encoder.embed_tokens.weight"})
    written = from_canonical("umt5", "original", canonical)
    block = {
        "attn.k", "attn.o", "attn.q", "attn.v", "ffn.fc1", "ffn.fc2", "ffn.gate.0", "norm1", "norm2",
        "pos_embedding.embedding",
    }  # fmt: skip
    expected = {f"blocks.{n}.{name}.weight" for n in range(3) for name in block}
    assert set(written) == expected | {"token_embedding.weight", "norm.weight"}
    # Its gate is the half with the GELU, which transformers calls wi_0.
    gate = canonical["encoder.block.1.layer.1.DenseReluDense.wi_0.weight"]
    assert torch.equal(written["blocks.1.ffn.gate.0.weight"], gate)
    assert_equal(to_canonical("umt5", "original", written), canonical)
    assert recognised(shapes_in(written)) == ("umt5", "original", None, ())


# ------------------------------------------------------------------------------------------------ recognition


@needs_lists
@pytest.mark.parametrize(("name", "prefix"), LISTS)
def test_each_list_is_recognised_with_its_spelling_and_variant(name: str, prefix: str) -> None:
    network, spelling, variant, _ = LISTS[name, prefix]
    shapes = part_of(name, prefix)
    assert recognised(shapes) == (network, spelling, variant, ())
    found = identify(header(shapes))
    assert (found.kind, found.spelling, found.variant) == ("text_encoder", spelling, variant)


@needs_lists
@pytest.mark.parametrize(("name", "prefix"), LISTS)
def test_a_part_of_a_file_is_recognised_or_left_alone(name: str, prefix: str) -> None:
    network, spelling, *_ = LISTS[name, prefix]
    keys = list(part_of(name, prefix).items())
    for part in (keys[::3], keys[1::3], keys[: len(keys) // 2], keys[len(keys) // 2 :]):
        found = recognised(dict(part))
        assert found is not None
        assert found[:2] == (network, spelling)


@pytest.mark.parametrize("name", TINY)
def test_a_small_model_is_recognised_in_every_spelling_and_comes_back(name: str) -> None:
    network, _, _ = TINY[name]
    canonical = tagged({k: s for k, s in tiny(name).items() if k != "encoder.embed_tokens.weight"})
    for spelling in NETWORKS.get(network).tables():
        tensors = canonical
        if spelling == "flat":  # CLIPTextModel, which has no projection
            tensors = {key: tensor for key, tensor in canonical.items() if not key.startswith("text_projection")}
        written = from_canonical(network, spelling, tensors)
        assert recognised(shapes_in(written)) == (network, spelling, None, ())
        assert_equal(to_canonical(network, spelling, written), tensors)


@pytest.mark.parametrize("name", [name for name in TINY if name != "clip"])
@pytest.mark.parametrize("missing", ["shared.weight", "encoder.embed_tokens.weight"])
def test_either_name_of_the_table_of_tokens_may_be_missing(name: str, missing: str) -> None:
    shapes = {key: shape for key, shape in tiny(name).items() if key != missing}
    assert len(shapes) == len(tiny(name)) - 1
    assert recognised(shapes) == (TINY[name][0], "transformers", None, ())
    assert recognised(shapes | {"logit_scale": ()}) == (TINY[name][0], "transformers", None, ())


@needs_lists
def test_umt5_is_never_taken_for_t5() -> None:
    shapes = shapes_of("transformers_umt5_xxl_enc")
    for blocks in range(2, 24):
        part = {k: s for k, s in shapes.items() if ".block." not in k or int(k.split(".")[2]) < blocks}
        found = recognised(part)
        assert found is not None
        assert found[0] == "umt5"


@pytest.mark.parametrize(
    ("model", "values"),
    [
        ("T5Model", {"feed_forward_proj": "gated-gelu"}),
        ("T5Encoder", {"feed_forward_proj": "relu"}),
        ("UMT5Model", {}),
        ("Bert", {"num_hidden_layers": 2}),
        ("CLIPVision", {"num_hidden_layers": 3}),
    ],
)
def test_relatives_stay_unknown(model: str, values: dict[str, Any]) -> None:
    if "T5" in model:
        values = {"d_model": 8, "d_ff": 12, "d_kv": 4, "num_heads": 2, "num_layers": 3, "vocab_size": 20, **values}
    stem = model.removesuffix("Model").removesuffix("Encoder")
    class_name = {"T5Encoder": "T5EncoderModel", "Bert": "BertModel", "CLIPVision": "CLIPVisionModel"}.get(model, model)
    assert recognised(built(class_name, f"{stem}Config", values)) is None


@needs_lists
@pytest.mark.parametrize("name", ["toolkit_LoRA-v1-CLIP", "toolkit_LoRA-v1A-CLIP"])
def test_kohyas_modules_of_clip_are_flattened_names_of_transformers(name: str) -> None:
    component = encoder("sd15", "text_encoder")
    table = NETWORKS.get(component.network).tables()[component.kohya_spelling]
    stems = {key.partition(".")[0].removeprefix(component.kohya + "_") for key in shapes_of(name)}
    claims = [table.flattened(stem) for stem in stems]
    assert len({c.names for c in claims if c is not None}) == len(stems) == 72


# ------------------------------------------------------------------------------------------------ configurations

# architecture, component, list, official values of config.json.
CONFIGS = {
    "sd15": ("text_encoder", "transformers_clip_l", {
        "architectures": ["CLIPTextModel"], "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072,
        "max_position_embeddings": 77, "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768,
        "vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    }),
    "sd2": ("text_encoder", "toolkit_CLIP-v2-SD", {
        "architectures": ["CLIPTextModel"], "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096,
        "max_position_embeddings": 77, "num_attention_heads": 16, "num_hidden_layers": 23, "projection_dim": 512,
        "vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    }),
    "sdxl": ("text_encoder_2", "toolkit_CLIP-XL-SD", {
        "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "hidden_size": 1280,
        "intermediate_size": 5120, "max_position_embeddings": 77, "num_attention_heads": 20, "num_hidden_layers": 32,
        "projection_dim": 1280, "vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    }),
    "sdxl_refiner": ("text_encoder_2", "toolkit_CLIP-XL-SD", {
        "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "hidden_size": 1280,
        "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280,
    }),
}  # fmt: skip


@needs_lists
@pytest.mark.parametrize("architecture", CONFIGS)
def test_transformers_class_makes_the_same_names_and_shapes_of_our_configuration(architecture: str) -> None:
    folder, name, official = CONFIGS[architecture]
    component = encoder(architecture, folder)
    spelling = LISTS[name, ""][1]
    shapes = shapes_in(kept(component, to_canonical("clip", spelling, tagged(shapes_of(name)))))
    values = configured("clip", shapes, component.config)
    assert {key: values[key] for key in official} == official
    pipeline = ARCHITECTURES.get(architecture).pipeline
    assert pipeline is not None
    assert pipeline.classes[folder] == ("transformers", values["architectures"][0])
    found = built(values["architectures"][0], "CLIPTextConfig", values)
    # Since version 5.6 CLIPTextModel has no "text_model." before its names.
    spelled = "transformers" if any(key.startswith("text_model.") for key in found) else "flat"
    assert shapes_in(to_canonical("clip", spelled, meta(found))) == shapes


@needs_lists
@pytest.mark.parametrize(
    ("network", "name", "official"),
    [
        ("t5", "transformers_t5_xxl_enc", {"vocab_size": 32128, "model_type": "t5"}),
        ("umt5", "transformers_umt5_xxl_enc", {"vocab_size": 256384, "model_type": "umt5"}),
    ],
)
def test_t5s_configuration_makes_the_list(network: str, name: str, official: dict[str, Any]) -> None:
    official |= {
        "d_ff": 10240, "d_kv": 64, "d_model": 4096, "dense_act_fn": "gelu_new", "feed_forward_proj": "gated-gelu",
        "num_heads": 64, "num_layers": 24, "relative_attention_num_buckets": 32,
    }  # fmt: skip
    config = NETWORKS.get(network).config
    assert config is not None
    assert config.library == "transformers"
    values = configured(network, shapes_of(name))
    assert {key: values[key] for key in official} == official
    assert values["architectures"] == [config.class_name]
    assert built(config.class_name, config.class_name.replace("EncoderModel", "Config"), values) == shapes_of(name)


def meta(shapes: Shapes) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
