"""What is this file, by its names and shapes? An honest None is allowed, a wrong answer is not (see test_lists)."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightops.files.tensor import TensorInfo, TensorSpec
from weightops.naming.identify import body_of, component_of, identify, quantised
from weightops.naming.keymap import NETWORKS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FIXTURE = Path(__file__).parents[2] / "fixtures" / "headers" / "sdxl.json.gz"


def header(shapes: Mapping[str, Iterable[int]]) -> dict[str, TensorInfo]:
    return {key: TensorInfo(TensorSpec("F16", tuple(shape)), 0, 0, 0) for key, shape in shapes.items()}


def named(*keys: str) -> dict[str, TensorInfo]:
    return header(dict.fromkeys(keys, (4, 4)))


@functools.cache
def sdxl() -> dict[str, tuple[int, ...]]:
    """A real header: SDXL base as one file."""
    if not FIXTURE.is_file():
        pytest.skip("the fixture is not here")
    with gzip.open(FIXTURE) as file:
        return {key: tuple(shape) for key, (_, shape) in json.load(file).items()}


def unet() -> dict[str, tuple[int, ...]]:
    """The same, its UNet alone, under bare names."""
    prefix = "model.diffusion_model."
    return {key.removeprefix(prefix): shape for key, shape in sdxl().items() if key.startswith(prefix)}


# ------------------------------------------------------------------------------------------------ components


@pytest.mark.parametrize(
    ("key", "component", "body"),
    [
        ("model.diffusion_model.out.0.weight", "model", "out.0.weight"),
        ("diffusion_model.out.0.weight", "model", "out.0.weight"),
        ("model_ema.diffusion_modelout0weight", "ema", "diffusion_modelout0weight"),
        ("first_stage_model.decoder.conv_in.weight", "vae", "decoder.conv_in.weight"),
        ("vae.decoder.conv_in.weight", "vae", "decoder.conv_in.weight"),
        ("conditioner.embedders.1.model.ln_final.bias", "text_encoder_2", "ln_final.bias"),
        ("text_encoders.t5xxl.transformer.shared.weight", "text_encoder_3", "shared.weight"),
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


def test_a_key_of_no_component_is_not_counted_to_a_model_that_has_a_prefix() -> None:
    found = identify(named("model.diffusion_model.x", "depth_model.x", "global_step", "v_pred", "betas")).components
    assert list(found.values()) == ["model", "other", "other", "marker", "schedule"]


def test_the_refiners_text_encoder_is_the_second() -> None:
    """In its own files it stands where the first of SDXL base stands; its only one, it is SDXL's second."""
    found = identify(
        header({
            "model.diffusion_model.label_emb.0.0.weight": (1536, 2560),
            "model.diffusion_model.output_blocks.11.0.in_layers.2.weight": (384, 768, 3, 3),
            "conditioner.embedders.0.model.ln_final.bias": (1280,),
        })
    )  # fmt: skip
    assert found.architecture == "sdxl_refiner"
    assert list(found.components.values()) == ["unet", "unet", "text_encoder_2"]


# ------------------------------------------------------------------------------------------------ kinds


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
    assert identify(named(*keys)).kind == kind


def test_a_list_of_factors_up_and_down_in_turn_is_an_adapter() -> None:
    """As cloneofsimo/lora pickled it."""
    pairs = {"0": (320, 4), "1": (4, 320), "2": (640, 4, 1, 1), "3": (4, 640, 3, 3)}
    assert identify(header(pairs)).kind == "lora"
    assert identify(header({**pairs, "3": (5, 640, 3, 3)})).kind == "unknown"
    assert identify(header({**pairs, "x": (1,)})).kind == "unknown"


# ------------------------------------------------------------------------------------------------ architectures


def test_a_whole_checkpoint_is_known_with_its_parts() -> None:
    found = identify(header(sdxl()))
    assert (found.kind, found.architecture, found.spelling, found.variant) == ("checkpoint", "sdxl", "original", "sdxl")
    assert {
        name: part.match and (part.match.network.name, part.match.variant) for name, part in found.parts.items()
    } == {
        "unet": ("sdxl_unet", "sdxl"),
        "vae": ("autoencoder_kl", "sd_vae"),
        "text_encoder": ("clip", "clip_l"),
        "text_encoder_2": ("clip", "clip_bigg"),
    }
    assert found.components.keys() == sdxl().keys()
    assert (found.strangers, found.possible) == ((), ())


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "unet.", ""])
def test_a_unet_alone_is_known_under_every_prefix(prefix: str) -> None:
    found = identify(header({prefix + key: shape for key, shape in unet().items()}))
    assert (found.kind, found.architecture, found.variant) == ("checkpoint", "sdxl", "sdxl")
    assert set(found.components.values()) == {"unet"}


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_a_few_strange_keys_in_a_known_model_are_named_and_many_make_it_unknown(prefix: str) -> None:
    model = {prefix + key: shape for key, shape in unet().items()}
    two = {f"{prefix}adapter.proj.weight": (4, 4), f"{prefix}input_blocks.4.1.strange": ()}
    found = identify(header({**model, **two}))
    assert found.architecture == "sdxl"
    assert found.strangers == tuple(two)
    found = identify(header({**model, **two, f"{prefix}third": (1,)}))
    assert (found.architecture, found.strangers) == (None, ())


def test_a_model_of_another_size_is_known_by_its_names_and_is_no_variant() -> None:
    found = identify(header({key: tuple(min(d, 6) for d in shape) for key, shape in unet().items()}))
    assert (found.architecture, found.variant) == ("sdxl", None)


def test_blocks_of_a_size_that_no_release_has_may_be_a_piece_of_anything() -> None:
    """One shard of a model that is not ours: its blocks are named as another's."""
    blocks = {f"transformer_blocks.{i}.attn.to_q.weight": (2048, 2048) for i in range(6)}
    context = {f"transformer_blocks.{i}.ff_context.net.2.weight": (2048, 8192) for i in range(6)}
    found = identify(header(blocks | context))
    assert found.architecture is None
    assert "flux" in found.possible


def test_what_a_file_may_be_is_said_in_the_words_of_the_answer() -> None:
    shared = {f"transformer_blocks.{i}.attn.to_q.weight": (3072, 3072) for i in range(4)}
    assert identify(header(shared)).possible == ("chroma", "flux", "flux2", "hunyuan_video", "qwen_image")
    middle = {"decoder.mid_block.resnets.0.conv1.weight": (512, 512, 3, 3)}
    assert "autoencoder_kl" in identify(header(middle)).possible


def test_what_a_checkpoint_may_be_is_said_of_its_diffusion_model() -> None:
    """Not of its VAE, which comes first."""
    vae = {"vae.decoder.mid_block.resnets.0.conv1.weight": (512, 512, 3, 3)}
    model = {f"transformer.transformer_blocks.{i}.attn.to_q.weight": (3072, 3072) for i in range(4)}
    assert identify(header(vae | model)).possible == ("chroma", "flux", "flux2", "hunyuan_video", "qwen_image")


def test_a_piece_of_a_file_is_no_variant_for_what_it_lacks() -> None:
    """Flux schnell is dev without guidance, and a shard of dev may be without it too."""
    blocks = {f"double_blocks.{i}.img_mod.lin.weight": (18432, 3072) for i in range(19)}
    ends = {"img_in.weight": (3072, 64), "final_layer.linear.weight": (64, 3072), "txt_in.weight": (3072, 4096)}
    assert identify(header(blocks | ends)).architecture == "flux"
    assert identify(header(blocks | ends)).variant is None
    more = {"vector_in.in_layer.weight": (3072, 768), "final_layer.adaLN_modulation.1.weight": (6144, 3072)}
    assert identify(header(blocks | ends | more)).variant == "flux_schnell"
    guidance = {"guidance_in.in_layer.weight": (3072, 256)}
    assert identify(header(blocks | ends | more | guidance)).variant == "flux_dev"
    assert identify(header(blocks | guidance)).variant is None


def test_an_average_of_the_weights_alone_is_known_by_its_names_without_dots() -> None:
    average = {"diffusion_model" + key.replace(".", ""): shape for key, shape in unet().items()}
    for prefix in ("model_ema.", ""):
        found = identify(header({prefix + key: shape for key, shape in average.items()}))
        assert (found.kind, found.architecture, found.spelling) == ("checkpoint", "sdxl", "ema")


def test_video_models_are_not_taken_for_the_image_models_they_grew_from() -> None:
    found = identify(named(
        "down_blocks.0.attentions.0.proj_in.weight",
        "down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_q.weight",
    ))  # fmt: skip
    assert found.architecture is None


# ------------------------------------------------------------------------------------------------ hostile names


def test_a_name_with_a_mark_where_a_number_stands_is_no_name_of_a_model() -> None:
    for mark in ("#", "{}", "", "007", "²", "+1", "-1", "1 ", "٣", "0x1", "1_0"):
        key = f"double_blocks.{mark}.img_mod.lin.weight"
        assert identify(header({key: (18432, 3072)})).architecture is None
        assert identify(named(f"input_blocks.{mark}.0.in_layers.0.weight")).architecture is None


WORDS = sorted({w for _, n in NETWORKS for t in n.tables().values() for r in t.rules[:40] for w in r.key.split(".")})
KEYS = st.one_of(
    st.lists(
        st.sampled_from([*WORDS, "0", "1", "07", "#", "weight", "bias", "model", "vae", "lora_A"]), max_size=6
    ).map(".".join),
    st.text(max_size=12),
)
SHAPES = st.lists(st.integers(0, 5), max_size=5).map(tuple)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS, SHAPES, max_size=8))
def test_any_names_and_shapes_have_an_answer(shapes: dict[str, tuple[int, ...]]) -> None:
    found = identify(header(shapes))
    assert list(found.components) == list(shapes)
    assert found.architecture is None or found.possible == ()


# ------------------------------------------------------------------------------------------------ codes


@pytest.mark.parametrize(
    ("key", "is_scale"),
    [
        ("scaled_fp8", True),
        ("model.diffusion_model.scaled_fp8", True),
        ("blocks.0.ffn.0.scale_weight", True),
        ("blocks.0.ffn.0.weight_scale", True),
        ("blocks.0.ffn.0.weight_scale_2", True),
        ("blocks.0.ffn.0.weight_scale_inv", True),
        ("blocks.0.ffn.0.weight._scale", True),
        ("blocks.0.ffn.0.qweight", True),
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
