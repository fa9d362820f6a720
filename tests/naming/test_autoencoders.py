"""The autoencoders of LDM, Flux.2 and Wan: our tables against real lists, diffusers' converters and its classes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest
from tagged import assert_equal, from_canonical, needs_lists, shapes_of, tagged, to_canonical
from test_unets import configured, header, library, made, recognised, shapes_in

from weightops.naming.identify import identify
from weightops.naming.keymap import ARCHITECTURES, NETWORKS

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

KL, F4, FLUX2, WAN, WAN22 = (
    "autoencoder_kl", "autoencoder_kl_f4", "autoencoder_kl_flux2", "autoencoder_wan", "autoencoder_wan22",
)  # fmt: skip

# list -> prefix in the file, network, spelling, variant, and the same model in diffusers' names.
LISTS = {
    "diffusers_flux2_vae": ("", FLUX2, "diffusers", "flux2_vae", "diffusers_flux2_vae"),
    "diffusers_flux_vae": ("", KL, "diffusers", "flux_vae", "diffusers_flux_vae"),
    "diffusers_qwen_image_vae": ("", WAN, "diffusers", "wan21_vae", "diffusers_wan_vae"),
    "diffusers_sd_vae": ("", KL, "diffusers", "sd_vae", "diffusers_sd_vae"),
    "diffusers_wan_vae": ("", WAN, "diffusers", "wan21_vae", "diffusers_wan_vae"),
    "orig_wan21_vae": ("", WAN, "original", "wan21_vae", "diffusers_wan_vae"),
    "sdmecha_flux-flux": ("vae.", KL, "original", "flux_vae", "diffusers_flux_vae"),
    "sdmecha_sd1-kohya": ("vae.", KL, "diffusers", "sd_vae", "diffusers_sd_vae"),
    "sdmecha_sd1-ldm": ("first_stage_model.", KL, "original", "sd_vae", "diffusers_sd_vae"),
    "sdmecha_sd3-comfyui": ("first_stage_model.", KL, "original", "flux_vae", "diffusers_flux_vae"),
    "sdmecha_sdxl-kohya": ("first_stage_model.", KL, "original", "sd_vae", "diffusers_sd_vae"),
    "sdmecha_sdxl-sgm": ("first_stage_model.", KL, "original", "sd_vae", "diffusers_sd_vae"),
    "toolkit_VAE-v1-SD": ("", KL, "original", "sd_vae", "diffusers_sd_vae"),
}
ORIGINAL = [name for name, row in LISTS.items() if row[2] == "original"]
IN_DIFFUSERS = [name for name in LISTS if name.startswith("diffusers_")]

CLASSES = {
    KL: "AutoencoderKL",
    F4: "AutoencoderKL",
    FLUX2: "AutoencoderKLFlux2",
    WAN: "AutoencoderKLWan",
    WAN22: "AutoencoderKLWan",
}

# Wan 2.2's own, of which there is no list.
WAN22_VALUES = {
    "base_dim": 160, "decoder_base_dim": 256, "in_channels": 12, "is_residual": True, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16, "z_dim": 48,
}  # fmt: skip
LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 4,
}
THREE_LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 2,
    "norm_num_groups": 4,
}
UPSCALER = {**THREE_LEVELS, "block_out_channels": (128, 256, 512), "norm_num_groups": 32}

# Small models: network, what diffusers' class is made of.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "four levels": (KL, {**LEVELS, "block_out_channels": (8, 8, 12, 16)}),
    "four levels without quant convolutions": (
        KL,
        {**LEVELS, "block_out_channels": (8, 12, 12, 16), "latent_channels": 5, "use_quant_conv": False,
         "use_post_quant_conv": False},
    ),
    "flux2": (FLUX2, {**LEVELS, "block_out_channels": (8, 8, 12, 16), "latent_channels": 3}),
    "wan": (WAN, {"base_dim": 4, "z_dim": 2}),
    "wan without time": (WAN, {"base_dim": 4, "z_dim": 2, "temperal_downsample": [False, False, False]}),
    "wan 2.2": (
        WAN22,
        {"base_dim": 4, "decoder_base_dim": 8, "in_channels": 12, "is_residual": True, "out_channels": 12,
         "patch_size": 2, "z_dim": 3},
    ),
}  # fmt: skip


def part_of(name: str) -> Shapes:
    """The autoencoder of a list, without the prefix of a single file."""
    prefix = LISTS[name][0]
    return {key.removeprefix(prefix): shape for key, shape in shapes_of(name).items() if key.startswith(prefix)}


def tiny(name: str) -> Shapes:
    network, values = TINY[name]
    return made(CLASSES[network], values)


def converted(network: str, tensors: dict[str, Tensor], levels: int = 4) -> dict[str, Tensor]:
    """What diffusers' converters make of the authors' names."""
    single_file = library("diffusers.loaders.single_file_utils")
    if network == WAN:
        return single_file.convert_wan_vae_to_diffusers(dict(tensors))
    types = {"down_block_types": ["x"] * levels, "up_block_types": ["x"] * levels}
    return single_file.convert_ldm_vae_checkpoint({f"first_stage_model.{k}": t for k, t in tensors.items()}, types)


# ------------------------------------------------------------------------------------------------ names and values


@needs_lists
@pytest.mark.parametrize("name", LISTS)
def test_every_key_of_a_list_becomes_one_of_diffusers_names_and_shapes(name: str) -> None:
    _, network, spelling, _, twin = LISTS[name]
    assert shapes_in(to_canonical(network, spelling, tagged(part_of(name)))) == shapes_of(twin)


@needs_lists
@pytest.mark.parametrize("name", ORIGINAL)
def test_every_value_stands_where_diffusers_converter_puts_it_and_comes_back(name: str) -> None:
    _, network, spelling, _, _ = LISTS[name]
    tensors = tagged(part_of(name))
    ours = to_canonical(network, spelling, tensors)
    assert_equal(ours, converted(network, tensors))
    assert_equal(from_canonical(network, spelling, ours), tensors)


@needs_lists
def test_weights_of_the_middle_attention_are_convolutions_in_the_original_and_biases_stay_vectors() -> None:
    found = shapes_in(from_canonical(KL, "original", tagged(shapes_of("diffusers_sd_vae"))))
    assert found["encoder.mid.attn_1.q.weight"] == found["decoder.mid.attn_1.proj_out.weight"] == (512, 512, 1, 1)
    assert found["encoder.mid.attn_1.q.bias"] == (512,)


@needs_lists
def test_diffusers_names_of_before_version_0_14_are_read() -> None:
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    canonical, old = tagged(shapes_of("diffusers_sd_vae")), {}
    for key, tensor in canonical.items():
        stem, _, leaf = key.rpartition(".")
        module = next((m for m in renames if stem.endswith(f"attentions.0.{m}")), None)
        old[f"{stem.removesuffix(module)}{renames[module]}.{leaf}" if module else key] = tensor
    assert len(set(old) - set(canonical)) == 16
    assert recognised(shapes_in(old)) == (KL, "diffusers_old", "sd_vae", ())
    assert_equal(to_canonical(KL, "diffusers_old", old), canonical)


@pytest.mark.parametrize("spelling", ["original", "diffusers", "diffusers_old"])
def test_the_upscalers_three_levels_are_counted_from_their_own_end(spelling: str) -> None:
    canonical = tagged(made("AutoencoderKL", UPSCALER))
    written = from_canonical(F4, spelling, canonical)
    assert_equal(to_canonical(F4, spelling, written), canonical)
    if spelling == "original":
        assert_equal(converted(F4, written, levels=3), canonical)


@needs_lists
def test_the_authors_of_flux2_put_the_quant_convolutions_inside() -> None:
    canonical = tagged(shapes_of("diffusers_flux2_vae"))
    written = from_canonical(FLUX2, "original", canonical)
    inner = {"encoder.quant_conv.weight", "encoder.quant_conv.bias"}
    inner |= {"decoder.post_quant_conv.weight", "decoder.post_quant_conv.bias"}
    assert inner <= set(written)
    assert_equal(to_canonical(FLUX2, "original", written), canonical)
    outer = {key.removeprefix("encoder.").removeprefix("decoder.") if key in inner else key: tensor
             for key, tensor in written.items()}  # fmt: skip
    assert recognised(shapes_in(outer)) == (FLUX2, "original", "flux2_vae", ())
    assert_equal(to_canonical(FLUX2, "original", outer), canonical)
    rest = {key: tensor for key, tensor in outer.items() if not key.startswith("bn.")}
    assert_equal(converted(KL, rest), {key: t for key, t in canonical.items() if not key.startswith("bn.")})


def test_wan_22_is_named_as_diffusers_script_names_it() -> None:
    canonical = tagged(made("AutoencoderKLWan", WAN22_VALUES))
    written = from_canonical(WAN22, "original", canonical)
    assert len(written) == len(canonical) == 196
    assert recognised(shapes_in(written)) == (WAN22, "original", "wan22_vae", ())
    assert_equal({wan22_script(key): tensor for key, tensor in written.items()}, canonical)
    assert_equal(to_canonical(WAN22, "original", written), canonical)
    # Keys of Wan2.2_VAE.pth, with their shapes.
    known = {
        "encoder.conv1.weight": (160, 12, 3, 3, 3),
        "encoder.downsamples.1.downsamples.0.shortcut.weight": (320, 160, 1, 1, 1),
        "encoder.downsamples.1.downsamples.2.time_conv.weight": (320, 320, 3, 1, 1),
        "encoder.head.2.weight": (96, 640, 3, 3, 3),
        "conv1.weight": (96, 96, 1, 1, 1),
        "decoder.conv1.weight": (1024, 48, 3, 3, 3),
        "decoder.upsamples.0.upsamples.3.time_conv.weight": (2048, 1024, 3, 1, 1),
        "decoder.head.2.weight": (12, 256, 3, 3, 3),
    }
    found = shapes_in(written)
    assert {key: found[key] for key in known} == known


def wan22_script(key: str) -> str:
    """What scripts/convert_wan_to_diffusers.py of diffusers' repository (not in the package) calls a key."""
    ends = {
        "encoder.conv1": "encoder.conv_in", "encoder.head.0": "encoder.norm_out", "encoder.head.2": "encoder.conv_out",
        "decoder.conv1": "decoder.conv_in", "decoder.head.0": "decoder.norm_out", "decoder.head.2": "decoder.conv_out",
        "conv1": "quant_conv", "conv2": "post_quant_conv",
    }  # fmt: skip
    inner = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
    middle = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
    stem, leaf = key.rsplit(".", 1)
    if stem in ends:
        return f"{ends[stem]}.{leaf}"
    coder, kind, number, *rest = stem.split(".")
    if kind == "middle":
        rest = ["mid_block", middle[number], inner.get(".".join(rest), ".".join(rest))]
    else:
        name = ".".join(rest[2:])
        if name.startswith(("resample", "time_conv")):
            rest = ["downsampler" if coder == "encoder" else "upsampler", name]
        else:
            rest = ["resnets", rest[1], inner.get(name, name).replace("shortcut", "conv_shortcut")]
        rest = ["down_blocks" if coder == "encoder" else "up_blocks", number, *rest]
    return ".".join([coder, *rest, leaf])


# ------------------------------------------------------------------------------------------------ recognition


@needs_lists
@pytest.mark.parametrize("name", LISTS)
def test_each_list_is_recognised_with_its_spelling_and_variant(name: str) -> None:
    _, network, spelling, variant, _ = LISTS[name]
    assert recognised(part_of(name)) == (network, spelling, variant, ())
    found = identify(header(part_of(name)))
    assert (found.kind, found.spelling, found.variant) == ("vae", spelling, variant)


@needs_lists
@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_an_encoder_or_a_decoder_alone_is_recognised(name: str, half: str) -> None:
    _, network, spelling, variant, _ = LISTS[name]
    part = {key: shape for key, shape in part_of(name).items() if key.startswith(f"{half}.")}
    if network == FLUX2:  # but for its batch norm, it is one of the others, with more channels
        network, variant = KL, None
    assert recognised(part) == (network, spelling, variant, ())
    assert identify(header(part)).kind == "vae"


@pytest.mark.parametrize("name", TINY)
def test_a_small_model_is_recognised_in_every_spelling_and_comes_back(name: str) -> None:
    network, _ = TINY[name]
    canonical = tagged(tiny(name))
    for spelling in NETWORKS.get(network).tables():
        written = from_canonical(network, spelling, canonical)
        assert recognised(shapes_in(written)) == (network, spelling, None, ())
        assert_equal(to_canonical(network, spelling, written), canonical)
        for half in ("encoder", "decoder"):
            part = {k: s for k, s in shapes_in(written).items() if k.startswith(f"{half}.")}
            # Without its batch norm Flux.2's is one of the others, but for the authors' place of quant convolutions.
            strangers = tuple(key for key in part if "quant_conv" in key)
            assert recognised(part) == (KL if network == FLUX2 else network, spelling, None, strangers)


@pytest.mark.parametrize("name", [n for n in TINY if TINY[n][0] in (KL, WAN)])
def test_a_small_model_is_written_as_diffusers_converter_reads_it(name: str) -> None:
    network, _ = TINY[name]
    canonical = tagged(tiny(name))
    assert_equal(converted(network, from_canonical(network, "original", canonical)), canonical)


def test_which_level_comes_first_is_not_guessed_where_only_three_are_there() -> None:
    shapes = made("AutoencoderKL", {**THREE_LEVELS, "block_out_channels": (8, 12, 16)})
    assert recognised(shapes) is None
    assert recognised(shapes_in(from_canonical(F4, "original", tagged(shapes)))) is None
    assert identify(header(shapes)).possible == (KL, F4)


def test_the_upscalers_autoencoder_is_recognised_by_its_sizes() -> None:
    shapes = made("AutoencoderKL", UPSCALER)
    assert recognised(shapes) == (F4, "diffusers", "upscaler_vae", ())
    # The authors count levels from the other end, so that three are like the first three of four.
    assert recognised(shapes_in(from_canonical(F4, "original", tagged(shapes)))) is None


@pytest.mark.parametrize(
    "name",
    [
        "AsymmetricAutoencoderKL", "AutoencoderDC", "AutoencoderKLAllegro", "AutoencoderKLCogVideoX",
        "AutoencoderKLCosmos", "AutoencoderKLHunyuanVideo", "AutoencoderKLLTXVideo", "AutoencoderKLMagvit",
        "AutoencoderKLMochi", "AutoencoderKLQwenImage21", "AutoencoderKLTemporalDecoder", "AutoencoderOobleck",
        "AutoencoderTiny", "ConsistencyDecoderVAE",
    ],
)  # fmt: skip
def test_other_autoencoders_stay_unknown(name: str) -> None:
    if not hasattr(library("diffusers"), name):
        pytest.skip(f"this diffusers has no {name}")
    assert recognised(made(name, {})) is None


# ------------------------------------------------------------------------------------------------ configurations


@needs_lists
@pytest.mark.parametrize("name", IN_DIFFUSERS)
def test_diffusers_class_makes_the_same_names_and_shapes_of_our_configuration(name: str) -> None:
    network, shapes = LISTS[name][1], shapes_of(name)
    class_name = "AutoencoderKLQwenImage" if "qwen" in name else CLASSES[network]
    config = NETWORKS.get(network).config
    assert config is not None
    assert config.class_name == CLASSES[network]
    assert made(class_name, configured(network, shapes)) == shapes


@pytest.mark.parametrize(("network", "values"), [(F4, UPSCALER), (WAN22, WAN22_VALUES)])
def test_sizes_without_a_list_are_configured_as_they_were_made(network: str, values: dict[str, Any]) -> None:
    shapes = made(CLASSES[network], values)
    found = configured(network, shapes)
    assert made(CLASSES[network], found) == shapes
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()} == {k: found[k] for k in values}


@needs_lists
@pytest.mark.parametrize("name", ["diffusers_wan_vae", "diffusers_qwen_image_vae"])
def test_the_latents_of_wan_21_are_scaled_as_diffusers_scales_them(name: str) -> None:
    class_ = getattr(library("diffusers"), "AutoencoderKLQwenImage" if "qwen" in name else "AutoencoderKLWan")
    defaults = {key: p.default for key, p in inspect.signature(class_.__init__).parameters.items()}
    values = configured(WAN, shapes_of(name))
    assert {key: defaults[key] for key in values} == values


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("sd15", {"scaling_factor": 0.18215, "shift_factor": None, "sample_size": 512}),
        ("sd2", {"scaling_factor": 0.18215, "shift_factor": None, "sample_size": 768}),
        ("sdxl", {"scaling_factor": 0.13025, "shift_factor": None, "sample_size": 1024}),
        ("sdxl_refiner", {"scaling_factor": 0.13025, "shift_factor": None, "sample_size": 1024}),
    ],
)
def test_each_architecture_scales_latents_in_its_own_way(architecture: str, expected: dict[str, Any]) -> None:
    vae = next(c for c in ARCHITECTURES.get(architecture).components if c.name == "vae")
    shapes = made("AutoencoderKL", {**LEVELS, "block_out_channels": (8, 8, 12, 16)})
    values = configured(vae.network, shapes, vae.config)
    assert {key: values[key] for key in expected} == expected
