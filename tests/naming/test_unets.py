"""The UNets of Stable Diffusion 1, 2, XL and its refiner: our tables against real lists, diffusers and ai-toolkit."""

from __future__ import annotations

import functools
import gzip
import inspect
import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tagged import KEYS, assert_equal, from_canonical, needs_lists, shapes_of, tagged, to_canonical

from weightops.files.tensor import TensorInfo, TensorSpec
from weightops.naming.identify import SCHEDULE, identify
from weightops.naming.keymap import ARCHITECTURES, NETWORKS, Count, Dim, Has
from weightops.naming.recognise import Match, recognise, row_of

if TYPE_CHECKING:
    from collections.abc import Mapping

Shapes = dict[str, tuple[int, ...]]

# list -> network, spelling, variant, and a list of the same names in diffusers' spelling (of the same shapes but for
# the first convolution, where the variants differ).
LISTS = {
    "diffusers_sd15_inpaint_unet": ("sd15_unet", "diffusers", "sd15_inpaint", "diffusers_sd15_inpaint_unet"),
    "diffusers_sd15_unet": ("sd15_unet", "diffusers", "sd15", "diffusers_sd15_unet"),
    "diffusers_sd21_unet": ("sd2_unet", "diffusers", "sd2", "diffusers_sd21_unet"),
    "diffusers_sdxl_refiner_unet": (
        "sdxl_refiner_unet", "diffusers", "sdxl_refiner", "diffusers_sdxl_refiner_unet",
    ),
    "diffusers_sdxl_unet": ("sdxl_unet", "diffusers", "sdxl", "diffusers_sdxl_unet"),
    "sdmecha_sd1-kohya": ("sd15_unet", "diffusers", "sd15", "diffusers_sd15_unet"),
    "sdmecha_sd1-ldm": ("sd15_unet", "original", "sd15", "diffusers_sd15_unet"),
    "sdmecha_sdxl-diffusers_unet_only": ("sdxl_unet", "diffusers", "sdxl", "diffusers_sdxl_unet"),
    "sdmecha_sdxl-kohya": ("sdxl_unet", "original", "sdxl", "diffusers_sdxl_unet"),
    "sdmecha_sdxl-sgm": ("sdxl_unet", "original", "sdxl", "diffusers_sdxl_unet"),
    "toolkit_UNET-XL-Refiner": ("sdxl_refiner_unet", "original", "sdxl_refiner", "diffusers_sdxl_refiner_unet"),
    "toolkit_UNET-XL-SD": ("sdxl_unet", "original", "sdxl", "diffusers_sdxl_unet"),
    "toolkit_UNET-v1-Inpainting": ("sd15_unet", "original", "sd15_inpaint", "diffusers_sd15_inpaint_unet"),
    "toolkit_UNET-v1-Pix2Pix": ("sd15_unet", "original", "sd15_pix2pix", "diffusers_sd15_unet"),
    "toolkit_UNET-v1-SD": ("sd15_unet", "original", "sd15", "diffusers_sd15_unet"),
    "toolkit_UNET-v2-Depth": ("sd2_unet", "original", "sd2_depth", "diffusers_sd21_unet"),
    "toolkit_UNET-v2-Inpainting": ("sd2_unet", "original", "sd2_inpaint", "diffusers_sd21_unet"),
    "toolkit_UNET-v2-SD": ("sd2_unet", "original", "sd2", "diffusers_sd21_unet"),
}  # fmt: skip
ORIGINAL = [name for name, row in LISTS.items() if row[1] == "original"]
IN_DIFFUSERS = [name for name in LISTS if name.startswith("diffusers_")]
PREFIXES = ("model.diffusion_model.", "unet.")

ARCHITECTURE_OF = {
    "sd15_unet": "sd15",
    "sd2_unet": "sd2",
    "sdxl_refiner_unet": "sdxl_refiner",
    "sdxl_unet": "sdxl",
}

# Small models with the blocks of the real ones: network -> what diffusers' class is made of.
FOUR = {
    "block_out_channels": (32, 32, 64, 64),
    "attention_head_dim": 8,
    "cross_attention_dim": 12,
}
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
    "use_linear_projection": True,
}
TINY: dict[str, dict[str, Any]] = {
    "sd15_unet": FOUR,
    "sd2_unet": {**FOUR, "use_linear_projection": True},
    "sdxl_unet": {
        **XL,
        "attention_head_dim": 8,
        "block_out_channels": (32, 32, 64),
        "cross_attention_dim": 12,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
    },
    "sdxl_refiner_unet": {
        **FOUR,
        **XL,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 2,
    },
}

# Relatives, at the sizes they were released in.
KOLORS = {
    **XL,
    "addition_time_embed_dim": 256,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "projection_class_embeddings_input_dim": 5632,
    "transformer_layers_per_block": (1, 2, 10),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
UPSCALER = {
    "attention_head_dim": 8,
    "block_out_channels": (256, 512, 512, 1024),
    "cross_attention_dim": 1024,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "in_channels": 7,
    "num_class_embeds": 1000,
    "only_cross_attention": (True, True, True, False),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
}
UNCLIP = {
    "attention_head_dim": (5, 10, 20, 20),
    "class_embed_type": "projection",
    "cross_attention_dim": 1024,
    "projection_class_embeddings_input_dim": 2048,
    "use_linear_projection": True,
}
PROJECTIONS = (".1.proj_in.weight", ".1.proj_out.weight")
BK_SDM = {"cross_attention_dim": 768, "layers_per_block": 1}


def part_of(name: str) -> Shapes:
    """The UNet of a list, without the prefix of a single file."""
    shapes = shapes_of(name)
    for prefix in PREFIXES:
        inside = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        if inside:
            return inside
    return shapes


def library(name: str) -> Any:
    """diffusers or transformers, which warn when they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def made(class_name: str, values: Mapping[str, Any]) -> Shapes:
    """Names and shapes of what a class of diffusers makes of a configuration."""
    diffusers = library("diffusers")
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = getattr(diffusers, class_name)(**values)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def ldm_unet(tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What diffusers' converter makes of the authors' names."""
    single_file = library("diffusers.loaders.single_file_utils")
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in tensors.items()}
    return single_file.convert_ldm_unet_checkpoint(prefixed, dict(values))


def resolved(value: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """A value of a configuration, from the shapes of canonical tensors."""
    match value:
        case Dim():
            size, rest = divmod(shapes[value.name][value.axis], value.divide)
            assert rest == 0, value
            return size
        case Count():
            before = value.template.removesuffix("{}")
            return len({name.removeprefix(before).split(".")[0] for name in shapes if name.startswith(before)})
        case Has():
            return value.yes if value.name in shapes else value.no
        case list():
            return [resolved(inner, shapes) for inner in value]
        case dict():
            return {key: resolved(inner, shapes) for key, inner in value.items()}
    return value


def configured(network: str, shapes: Shapes, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json of a network, as one component of an architecture has it."""
    config = NETWORKS.get(network).config
    assert config is not None
    return resolved({**config.values, **(overrides or {})}, shapes)


def header(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {key: TensorInfo(TensorSpec("F16", shape), 0, 0, 0) for key, shape in shapes.items()}


def shapes_in(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def recognised(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str, str | None, tuple[str, ...]] | None:
    found = recognise(shapes, ("unet", "transformer", "vae", "text_encoder"))
    return (found.network.name, found.spelling, found.variant, found.strangers) if isinstance(found, Match) else None


# ------------------------------------------------------------------------------------------------ names and values


@needs_lists
@pytest.mark.parametrize("name", LISTS)
def test_every_key_of_a_list_becomes_one_of_diffusers_names_and_shapes(name: str) -> None:
    network, spelling, _, twin = LISTS[name]
    found, expected = shapes_in(to_canonical(network, spelling, tagged(part_of(name)))), shapes_of(twin)
    channels = found["conv_in.weight"][1]
    expected["conv_in.weight"] = (expected["conv_in.weight"][0], channels, 3, 3)
    assert found == expected


@needs_lists
@pytest.mark.parametrize("name", ORIGINAL)
def test_every_value_stands_where_diffusers_converter_puts_it_and_comes_back(name: str) -> None:
    network, spelling, *_ = LISTS[name]
    tensors = tagged(part_of(name))
    ours = to_canonical(network, spelling, tensors)
    assert_equal(ours, ldm_unet(tensors, configured(network, shapes_in(ours))))
    assert_equal(from_canonical(network, spelling, ours), tensors)


@functools.cache
def aitoolkit(name: str) -> dict[str, Any]:
    """ai-toolkit's map of a whole single file, made independently of diffusers' converter."""
    with gzip.open(KEYS / "keymaps" / f"aitoolkit_{name}.json.gz") as file:
        return json.load(file)


# What ai-toolkit puts before diffusers' names.
BEFORE = {
    "sd1": {"unet": "unet_", "vae": "vae_", "text_encoder": "te_"},
    "sd2": {"unet": "unet_", "vae": "vae_", "text_encoder": "te_"},
    "sdxl": {"unet": "unet_", "vae": "vae_", "text_encoder": "te0_", "text_encoder_2": "te1_"},
    "refiner": {"unet": "unet_", "vae": "vae_", "text_encoder_2": "te1_"},
}
TOOLKIT = {"sd1": "sd15", "sd2": "sd2", "sdxl": "sdxl", "refiner": "sdxl_refiner"}


@needs_lists
@pytest.mark.parametrize("name", TOOLKIT)
def test_every_name_of_a_whole_file_is_where_ai_toolkit_has_it(name: str) -> None:
    keymap, seen = aitoolkit(name), 0
    packed = {key: row["cat"] for key, row in keymap["ldm_diffusers_operator_map"].items()}
    squared = {key for key, (there, here) in keymap["ldm_diffusers_shape_map"].items() if len(there) > len(here)}
    for component in ARCHITECTURES.get(TOOLKIT[name]).components:
        table = NETWORKS.get(component.network).tables()[component.spelling]
        before = BEFORE[name][component.name]
        pairs = {key: [value] for key, value in keymap["ldm_diffusers_keymap"].items()} | packed
        for key, values in pairs.items():
            if not key.startswith(component.prefix):
                continue
            claim = table.claim(key.removeprefix(component.prefix))
            assert claim is not None, key
            assert [before + n for n in claim.names] == values, key
            assert (claim.rule.squared and claim.leaf == "weight") == (key in squared), key
            seen += 1
    assert seen == len(keymap["ldm_diffusers_keymap"]) + len(packed)


@needs_lists
@pytest.mark.parametrize("name", ["ssd", "vega"])
def test_smaller_relatives_of_sdxl_have_its_names(name: str) -> None:
    table = NETWORKS.get("sdxl_unet").tables()["original"]
    pairs = aitoolkit(name)["ldm_diffusers_keymap"].items()
    found = {key: value for key, value in pairs if key.startswith("model.diffusion_model.")}
    for key, value in found.items():
        claim = table.claim(key.removeprefix("model.diffusion_model."))
        assert claim is not None, key
        assert ["unet_" + n for n in claim.names] == [value], key
    shapes = shapes_of("toolkit_UNET-XL-SD")
    smaller = {k: shapes[k] for k in (key.removeprefix("model.diffusion_model.") for key in found)}
    assert recognised(smaller) == ("sdxl_unet", "original", None, ())


@needs_lists
@pytest.mark.parametrize(("name", "omitted"), [("sd2", 14), ("sdxl", 2), ("refiner", 1)])
def test_what_ai_toolkit_finds_no_place_for_is_what_diffusers_omits(name: str, omitted: int) -> None:
    with gzip.open(KEYS / "keymaps" / f"aitoolkit_{name}_unmatched.json.gz") as file:
        unmatched = json.load(file)["ldm"]
    count = 0
    for component in ARCHITECTURES.get(TOOLKIT[name]).components:
        table = NETWORKS.get(component.network).tables()[component.spelling]
        for key in [k for k in unmatched if k.startswith(component.prefix)]:
            claim = table.claim(key.removeprefix(component.prefix))
            assert claim is not None, key
            # ai-toolkit leaves the projection of SDXL's and the refiner's encoder out, for it is transposed.
            if claim.rule.transposed and component.variant == "clip_bigg":
                assert not claim.names[0].startswith(component.omits)
                continue
            assert all(n.startswith(component.omits) for n in claim.names), key
            count += 1
    assert count == omitted
    assert all(k.startswith(("cond_stage_model.", "conditioner.", "model_ema.")) or k in SCHEDULE for k in unmatched)


# ------------------------------------------------------------------------------------------------ recognition


@needs_lists
@pytest.mark.parametrize("name", LISTS)
def test_each_list_is_recognised_with_its_spelling_and_variant(name: str) -> None:
    network, spelling, variant, _ = LISTS[name]
    assert recognised(part_of(name)) == (network, spelling, variant, ())
    found = identify(header(shapes_of(name)))
    assert (found.architecture, found.kind) == (ARCHITECTURE_OF[network], "checkpoint")
    assert (found.spelling, found.variant, found.strangers) == (spelling, variant, ())


@needs_lists
@pytest.mark.parametrize("name", LISTS)
def test_a_part_of_a_file_is_recognised_where_its_names_are_no_other_models(name: str) -> None:
    network, spelling, *_ = LISTS[name]
    keys = list(part_of(name).items())
    for part in (keys[::3], keys[1::3], keys[: len(keys) // 2], keys[len(keys) // 2 :]):
        found = recognised(dict(part))
        assert found is not None
        assert found[:2] == (network, spelling)


@needs_lists
@pytest.mark.parametrize("name", ["toolkit_UNET-v1-EMA", "toolkit_UNET-v1-Pix2Pix-EMA"])
def test_an_average_whose_names_lost_their_dots_is_recognised_beside_its_model(name: str) -> None:
    ema = {f"model_ema.diffusion_model{key}": shape for key, shape in shapes_of(name).items()}
    whole = {f"model.diffusion_model.{key}": shape for key, shape in shapes_of("toolkit_UNET-v1-SD").items()}
    found = identify(header(whole | ema)).parts["ema"].match
    assert found is not None
    assert (found.network.name, found.spelling) == ("sd15_unet", "original")
    assert found.variant == ("sd15_pix2pix" if "Pix2Pix" in name else "sd15")


@pytest.mark.parametrize("network", TINY)
def test_a_small_model_is_recognised_in_every_spelling_and_comes_back(network: str) -> None:
    shapes = made("UNet2DConditionModel", TINY[network])
    canonical = tagged(shapes)
    for spelling in NETWORKS.get(network).tables():
        written = from_canonical(network, spelling, canonical)
        assert recognised(shapes_in(written)) == (network, spelling, None, ())
        assert_equal(to_canonical(network, spelling, written), canonical)
        single = {f"model.diffusion_model.{key}": tuple(tensor.shape) for key, tensor in written.items()}
        assert identify(header(single)).architecture == ARCHITECTURE_OF[network]


@pytest.mark.parametrize("network", TINY)
def test_a_small_model_is_written_as_diffusers_converter_reads_it(network: str) -> None:
    canonical = tagged(made("UNet2DConditionModel", TINY[network]))
    written = from_canonical(network, "original", canonical)
    assert_equal(ldm_unet(written, {"layers_per_block": 2, **TINY[network]}), canonical)


@pytest.mark.parametrize("values", [UPSCALER, UNCLIP], ids=["the x4 upscaler", "unCLIP"])
def test_relatives_with_other_blocks_or_embeddings_stay_unknown(values: dict[str, Any]) -> None:
    shapes = made("UNet2DConditionModel", values)
    assert recognised(shapes) is None
    assert identify(header({f"unet.{key}": shape for key, shape in shapes.items()})).architecture is None


@pytest.mark.parametrize(
    "name", ["UNet3DConditionModel", "UNetMotionModel", "UNetSpatioTemporalConditionModel", "UNet2DModel"]
)
def test_models_that_grew_from_these_are_not_taken_for_them(name: str) -> None:
    assert recognised(made(name, {})) is None


@needs_lists
def test_a_controlnet_is_none_of_these_networks() -> None:
    assert recognised(shapes_of("toolkit_ControlNet-v1-SD")) is None


def test_kolors_is_not_taken_for_sdxl() -> None:
    assert recognised(made("UNet2DConditionModel", KOLORS)) == ("kolors_unet", "diffusers", "kolors", ())


def test_a_model_with_one_resnet_to_a_level_is_of_no_released_size() -> None:
    assert recognised(made("UNet2DConditionModel", BK_SDM)) == ("sd15_unet", "diffusers", None, ())


@needs_lists
def test_sd1_projects_with_a_convolution_and_sd2_with_a_matrix() -> None:
    key = "input_blocks.1.1.proj_in.weight"
    assert recognised({key: (4, 4, 1, 1)}) == ("sd15_unet", "original", None, ())
    assert recognised({key: (4, 4)}) == ("sd2_unet", "original", None, ())
    assert recognised({key: (16,)}) is None
    sd1 = {k: s[:2] if "proj_" in k else s for k, s in part_of("toolkit_UNET-v1-SD").items()}
    sd2 = {k: (*s, 1, 1) if k.endswith(PROJECTIONS) else s for k, s in part_of("toolkit_UNET-v2-SD").items()}
    assert recognised(sd1) == ("sd2_unet", "original", None, ())
    assert recognised(sd2) == ("sd15_unet", "original", None, ())


@needs_lists
@pytest.mark.parametrize("name", IN_DIFFUSERS)
def test_a_variant_knows_every_matrix_that_loras_change(name: str) -> None:
    network, _, variant, _ = LISTS[name]
    rows = next(v.shapes for v in NETWORKS.get(network).variants if v.name == variant)
    for key, shape in shapes_of(name).items():
        if ".transformer_blocks." in key and len(shape) == 2:
            assert row_of(key, rows) == shape, key


@needs_lists
@pytest.mark.parametrize(("name", "modules"), [("LoRA-v1-UNET", 192), ("LoRA-v1A-UNET", 192)])
def test_kohyas_modules_of_sd1_are_flattened_names_of_diffusers(name: str, modules: int) -> None:
    component = ARCHITECTURES.get("sd15").components[0]
    table = NETWORKS.get(component.network).tables()[component.kohya_spelling]
    stems = {key.partition(".")[0].removeprefix(component.kohya + "_") for key in shapes_of(f"toolkit_{name}")}
    claims = [table.flattened(stem) for stem in stems]
    assert len({c.names for c in claims if c is not None}) == len(stems) == modules


# ------------------------------------------------------------------------------------------------ blocks, folders


@needs_lists
@pytest.mark.parametrize("name", IN_DIFFUSERS)
def test_each_tensor_is_in_one_block(name: str) -> None:
    blocks = NETWORKS.get(LISTS[name][0]).blocks
    assert len({block for block, _ in blocks}) == len(blocks)
    used = set()
    for key in shapes_of(name):
        found = [block for block, prefixes in blocks for p in prefixes if f"{key}.".startswith(f"{p}.")]
        assert len(found) == 1, (key, found)
        used |= {*found}
    assert used == {block for block, _ in blocks}


@needs_lists
@pytest.mark.parametrize("name", ORIGINAL)
def test_blocks_are_the_authors_own(name: str) -> None:
    network, spelling, *_ = LISTS[name]
    words = {"input_blocks": "IN", "middle_block": "M", "output_blocks": "OUT"}
    table = NETWORKS.get(network).tables()[spelling]
    for key in part_of(name):
        claim = table.claim(key)
        assert claim is not None
        block = next(b for b, prefixes in NETWORKS.get(network).blocks if claim.names[0].startswith(prefixes))
        kind, number, *_ = key.split(".")
        if kind in words:
            assert block == ("M00" if kind == "middle_block" else f"{words[kind]}{int(number):02}")


@needs_lists
@pytest.mark.parametrize("name", IN_DIFFUSERS)
def test_diffusers_class_makes_the_same_names_and_shapes_of_our_configuration(name: str) -> None:
    shapes = shapes_of(name)
    values = configured(LISTS[name][0], shapes)
    assert made("UNet2DConditionModel", values) == shapes


@needs_lists
@pytest.mark.parametrize("name", IN_DIFFUSERS)
def test_our_configuration_is_the_official_one(name: str) -> None:
    manifest = json.loads((KEYS / "MANIFEST.json").read_text(encoding="utf-8"))["lists"]
    official = next(row["config"] for row in manifest if row.get("file") == f"{name}.json.gz")
    values = configured(LISTS[name][0], shapes_of(name))
    assert {key: values[key] for key in official} == official


@pytest.mark.parametrize("name", sorted(ARCHITECTURE_OF.values()))
def test_a_pipeline_names_what_diffusers_and_transformers_have(name: str) -> None:
    architecture = ARCHITECTURES.get(name)
    pipeline = architecture.pipeline
    assert pipeline is not None
    libraries = {"diffusers": library("diffusers"), "transformers": library("transformers")}
    for where, class_name in pipeline.classes.values():
        assert (where is None) == (class_name is None)
        assert where is None or hasattr(libraries[where], str(class_name))
    class_ = getattr(libraries["diffusers"], pipeline.class_name)
    expected = set(inspect.signature(class_.__init__).parameters) - {"self"}
    folders = {folder for folder, (where, _) in pipeline.classes.items() if where is not None}
    assert set(pipeline.classes) | set(pipeline.settings) == expected
    assert {c.name for c in architecture.components} | {"scheduler"} | set(pipeline.tokenizers) == folders
    for component in architecture.components:
        config = NETWORKS.get(component.network).config
        assert config is not None
        architectures = component.config.get("architectures", config.values.get("architectures"))
        assert pipeline.classes[component.name][1] == (architectures[0] if architectures else config.class_name)


@pytest.mark.parametrize("name", sorted(ARCHITECTURE_OF.values()))
def test_a_scheduler_of_diffusers_takes_our_settings(name: str) -> None:
    pipeline = ARCHITECTURES.get(name).pipeline
    assert pipeline is not None
    class_ = getattr(library("diffusers"), str(pipeline.classes["scheduler"][1]))
    scheduler = class_.from_config(dict(pipeline.scheduler))
    known = {key: value for key, value in pipeline.scheduler.items() if key in scheduler.config}
    assert {key: scheduler.config[key] for key in known} == known
    assert {"beta_start", "beta_end", "beta_schedule", "prediction_type", "steps_offset"} <= set(known)
    assert round(float(scheduler.alphas_cumprod[-1]), 6) == 0.00466
