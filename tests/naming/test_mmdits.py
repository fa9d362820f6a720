"""SD3, Flux.1, Flux.2 and Chroma: our tables against lists of real models, diffusers' converters and its classes."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tagged import KEYS, assert_equal, from_canonical, needs_lists, shapes_of, tagged, to_canonical

from weightops.files.tensor import TensorInfo, TensorSpec
from weightops.naming.identify import identify
from weightops.naming.keymap import ARCHITECTURES, NETWORKS, Config, Count, Dim, Has, Which, swaps
from weightops.naming.recognise import Match, recognise

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

ROLES = ("transformer", "unet")
OURS = {"chroma_transformer", "flux2_transformer", "flux_transformer", "sd3_transformer"}

# list -> network, spelling, variant, and the same model in diffusers' names.
LISTS = {
    "diffusers_chroma1": ("chroma_transformer", "diffusers", "chroma1", "diffusers_chroma1"),
    "diffusers_flux2_dev": ("flux2_transformer", "diffusers", "flux2_dev", "diffusers_flux2_dev"),
    "diffusers_flux2_klein_4b": ("flux2_transformer", "diffusers", "flux2_klein_4b", "diffusers_flux2_klein_4b"),
    "diffusers_flux_dev": ("flux_transformer", "diffusers", "flux_dev", "diffusers_flux_dev"),
    "diffusers_flux_schnell": ("flux_transformer", "diffusers", "flux_schnell", "diffusers_flux_schnell"),
    "diffusers_sd35_large": ("sd3_transformer", "diffusers", "sd35_large", "diffusers_sd35_large"),
    "diffusers_sd3_medium": ("sd3_transformer", "diffusers", "sd3_medium", "diffusers_sd3_medium"),
    "orig_chroma_bfl": ("chroma_transformer", "original", "chroma1", "diffusers_chroma1"),
    "orig_comfy_chroma": ("chroma_transformer", "comfy", "chroma1", "diffusers_chroma1"),
    "orig_comfy_flux2_dev": ("flux2_transformer", "comfy", "flux2_dev", "diffusers_flux2_dev"),
    "orig_comfy_flux2_klein_4b": ("flux2_transformer", "comfy", "flux2_klein_4b", "diffusers_flux2_klein_4b"),
    "orig_comfy_flux_dev": ("flux_transformer", "comfy", "flux_dev", "diffusers_flux_dev"),
    "orig_flux2_dev": ("flux2_transformer", "original", "flux2_dev", "diffusers_flux2_dev"),
    "orig_flux_dev_bfl": ("flux_transformer", "original", "flux_dev", "diffusers_flux_dev"),
    "orig_sd35_large": ("sd3_transformer", "original", "sd35_large", "diffusers_sd35_large"),
    "orig_sd3_medium": ("sd3_transformer", "original", "sd3_medium", "diffusers_sd3_medium"),
    "sdmecha_flux-flux": ("flux_transformer", "original", "flux_dev", "diffusers_flux_dev"),
    "sdmecha_sd3-comfyui": ("sd3_transformer", "original", "sd3_medium", "diffusers_sd3_medium"),
}
CONVERTIBLE = [name for name in LISTS if not name.startswith("diffusers_")]

CONVERTERS = {
    "chroma_transformer": "convert_chroma_transformer_checkpoint_to_diffusers",
    "flux2_transformer": "convert_flux2_transformer_checkpoint_to_diffusers",
    "flux_transformer": "convert_flux_transformer_checkpoint_to_diffusers",
    "sd3_transformer": "convert_sd3_transformer_checkpoint_to_diffusers",
}

# Released sizes that no list holds.
KLEIN_9B = {
    "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288,
    "guidance_embeds": False,
}  # fmt: skip
SD35_MEDIUM = {
    "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip

# Small models of every kind: a label, the network, what makes it small.
TINY = {
    "flux": ("flux_transformer", {
        "num_layers": 2, "num_single_layers": 3, "num_attention_heads": 1, "joint_attention_dim": 12,
        "pooled_projection_dim": 8, "in_channels": 4, "guidance_embeds": True,
    }),
    "flux without guidance": ("flux_transformer", {
        "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 12,
        "pooled_projection_dim": 8, "in_channels": 12, "out_channels": 4,
    }),
    "flux2": ("flux2_transformer", {
        "num_layers": 2, "num_single_layers": 3, "num_attention_heads": 1, "joint_attention_dim": 12,
        "in_channels": 8, "timestep_guidance_channels": 16,
    }),
    "flux2 without guidance": ("flux2_transformer", {
        "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 12,
        "in_channels": 8, "timestep_guidance_channels": 16, "guidance_embeds": False,
    }),
    "chroma": ("chroma_transformer", {
        "num_layers": 2, "num_single_layers": 3, "num_attention_heads": 1, "joint_attention_dim": 12,
        "in_channels": 4, "approximator_num_channels": 16, "approximator_hidden_dim": 20, "approximator_layers": 2,
    }),
    "sd3": ("sd3_transformer", {
        "num_layers": 3, "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 128,
        "pooled_projection_dim": 8, "pos_embed_max_size": 6, "in_channels": 4, "out_channels": 4,
    }),
    "sd3 with norms and a second attention": ("sd3_transformer", {
        "num_layers": 4, "num_attention_heads": 1, "joint_attention_dim": 12, "caption_projection_dim": 64,
        "pooled_projection_dim": 8, "pos_embed_max_size": 6, "in_channels": 4, "out_channels": 4,
        "dual_attention_layers": (0, 1), "qk_norm": "rms_norm",
    }),
}  # fmt: skip


def transformer_of(name: str) -> Shapes:
    """The diffusion model of a list, without the prefix of a single file."""
    shapes, prefix = shapes_of(name), "model.diffusion_model."
    inside = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    return inside or shapes


def built(network: str, values: dict[str, Any]) -> Shapes:
    """Names and shapes of what diffusers' class makes of a configuration."""
    pytest.importorskip("diffusers")
    config = NETWORKS.get(network).config
    assert config is not None
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        import diffusers

        model = getattr(diffusers, config.class_name)(**values)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def converted(network: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers' converter makes of the first columns, so that copies of the large matrices fit in memory."""
    pytest.importorskip("diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.loaders import single_file_utils

        return getattr(single_file_utils, CONVERTERS[network])(narrowed(tensors))


def narrowed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor[:, :2] if tensor.dim() == 2 else tensor for key, tensor in tensors.items()}


def shapes_in(tensors: dict[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def resolved(value: Any, shapes: Shapes) -> Any:
    """A value of a configuration, from the shapes of canonical tensors."""
    match value:
        case Config():
            return {key: resolved(inner, shapes) for key, inner in value.values.items()}
        case Dim():
            size, rest = divmod(shapes[value.name][value.axis], value.divide)
            assert rest == 0, value
            return math.isqrt(size) if value.root else size
        case Count():
            return len(numbers(value.template.removesuffix("{}"), "", shapes))
        case Which():
            return numbers(*value.template.split("{}"), shapes)
        case Has():
            return value.yes if value.name in shapes else value.no
        case list():
            return [resolved(inner, shapes) for inner in value]
    return value


def numbers(before: str, after: str, shapes: Shapes) -> list[int]:
    """The numbers between these two in the names; nothing after them means anything."""
    rests = [name.removeprefix(before).partition(".") for name in shapes if name.startswith(before)]
    return sorted({int(number) for number, dot, rest in rests if not after or dot + rest == after})


def blocks_of(network: str, name: str) -> list[str]:
    """The blocks that a canonical tensor stands in."""
    found, words = [], name.split(".")
    for block, prefixes in NETWORKS.get(network).blocks:
        for prefix in prefixes:
            wanted = prefix.split(".")
            pairs = list(zip(words, wanted, strict=False))
            if len(words) > len(wanted) and all((w == "{}" and word.isdigit()) or w == word for word, w in pairs):
                found.append(block.format(*(word for word, w in pairs if w == "{}")))
    return found


# ------------------------------------------------------------------------------------------------ names and values


@needs_lists
@pytest.mark.parametrize("name", LISTS)
def test_every_key_of_a_list_becomes_one_of_diffusers_names_and_shapes(name: str) -> None:
    network, spelling, _, twin = LISTS[name]
    found = to_canonical(network, spelling, tagged(transformer_of(name)))
    assert shapes_in(found) == shapes_of(twin)


@needs_lists
@pytest.mark.parametrize("name", CONVERTIBLE)
def test_every_value_stands_where_diffusers_converter_puts_it_and_comes_back(name: str) -> None:
    network, spelling, *_ = LISTS[name]
    tensors = tagged(transformer_of(name))
    ours = to_canonical(network, spelling, tensors)
    assert_equal(from_canonical(network, spelling, ours), tensors)
    # diffusers reads ComfyUI's names of norms for Flux.2 alone (see below); the original names then stand in.
    if spelling == "comfy" and network != "flux2_transformer":
        tensors = from_canonical(network, "original", ours)
    assert_equal(narrowed(ours), converted(network, tensors))


@needs_lists
@pytest.mark.parametrize("name", ["orig_comfy_chroma", "orig_comfy_flux_dev"])
def test_diffusers_cannot_read_the_norms_that_comfyui_writes(name: str) -> None:
    with pytest.raises(KeyError, match=r"norms?\..*scale"):
        converted(LISTS[name][0], tagged(transformer_of(name)))


@pytest.mark.parametrize(("network", "values"), [("flux2_transformer", KLEIN_9B), ("sd3_transformer", SD35_MEDIUM)])
def test_sizes_without_a_list_are_written_as_diffusers_converter_reads_them(
    network: str, values: dict[str, Any]
) -> None:
    canonical = tagged(built(network, values))
    original = from_canonical(network, "original", canonical)
    assert_equal(narrowed(canonical), converted(network, original))
    assert_equal(to_canonical(network, "original", original), canonical)


def test_klein_9b_has_as_many_parameters_as_were_released() -> None:
    assert sum(math.prod(shape) for shape in built("flux2_transformer", KLEIN_9B).values()) == 9_078_581_248


@pytest.mark.parametrize("kind", TINY)
def test_small_models_are_written_in_every_spelling_and_come_back(kind: str) -> None:
    network, values = TINY[kind]
    canonical = tagged(built(network, values))
    for spelling in NETWORKS.get(network).tables():
        written = from_canonical(network, spelling, canonical)
        found = recognise(shapes_in(written), ROLES)
        assert isinstance(found, Match), found
        assert (found.network.name, found.spelling, found.variant, found.strangers) == (network, spelling, None, ())
        assert_equal(to_canonical(network, spelling, written), canonical)


@pytest.mark.parametrize("kind", [k for k in TINY if TINY[k][0] in ("flux2_transformer", "sd3_transformer")])
def test_small_models_are_read_by_diffusers_converter_where_it_knows_no_sizes(kind: str) -> None:
    network, values = TINY[kind]
    canonical = tagged(built(network, values))
    assert_equal(narrowed(canonical), converted(network, from_canonical(network, "original", canonical)))


@pytest.mark.parametrize(
    ("network", "key", "shape", "bands"),
    [
        ("flux_transformer", "single_blocks.7.linear1.weight", (21504, 3072), (3072, 3072, 3072, 12288)),
        ("flux_transformer", "single_blocks.7.linear1.bias", (21504,), (3072, 3072, 3072, 12288)),
        ("chroma_transformer", "single_blocks.7.linear1.weight", (18, 4), (4, 4, 4, 6)),
        ("flux2_transformer", "single_blocks.7.linear1.weight", (27648, 3072), (27648,)),
        ("sd3_transformer", "joint_blocks.7.x_block.attn2.qkv.bias", (4608,), (1536, 1536, 1536)),
    ],
)
def test_packed_projections_are_cut_where_each_part_begins(
    network: str, key: str, shape: tuple[int, ...], bands: tuple[int, ...]
) -> None:
    tensors = {key: torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)}
    if key.endswith("bias"):  # a bias is cut as its weight is
        tensors[key.removesuffix("bias") + "weight"] = torch.zeros(()).expand(shape[0], min(bands))
    found = to_canonical(network, "original", tensors)
    heights = [len(t) for name, t in found.items() if name.endswith(key.rpartition(".")[2])]
    assert tuple(heights) == bands


# ------------------------------------------------------------------------------------------------ shift and scale


@needs_lists
@pytest.mark.parametrize(("name", "last"), [("orig_sd3_medium", 23), ("orig_sd35_large", 37)])
def test_only_the_last_blocks_modulation_is_swapped_whatever_its_number(name: str, last: int) -> None:
    tensors = tagged(transformer_of(name))
    found = to_canonical("sd3_transformer", "original", tensors)
    for number in range(last + 1):
        for leaf in ("weight", "bias"):
            before = tensors[f"joint_blocks.{number}.context_block.adaLN_modulation.1.{leaf}"]
            after = found[f"transformer_blocks.{number}.norm1_context.linear.{leaf}"]
            half = len(before) // 2
            first = before[half] if number == last else before[0]
            assert torch.equal(after[0], first), (number, leaf)


def test_a_bias_without_its_weight_does_not_tell_whether_it_is_swapped() -> None:
    claim = NETWORKS.get("sd3_transformer").tables()["original"].claim(
        "joint_blocks.23.context_block.adaLN_modulation.1.bias"
    )  # fmt: skip
    assert claim is not None
    assert swaps(claim.rule, 3072, None) is None
    assert swaps(claim.rule, 3072, 1536) is True
    assert swaps(claim.rule, 9216, 1536) is False


@pytest.mark.parametrize("network", ["flux2_transformer", "flux_transformer", "sd3_transformer"])
def test_the_final_modulation_is_always_swapped(network: str) -> None:
    for leaf in ("weight", "bias"):
        claim = NETWORKS.get(network).tables()["original"].claim(f"final_layer.adaLN_modulation.1.{leaf}")
        assert claim is not None
        assert swaps(claim.rule, 3072, None) is True


# ------------------------------------------------------------------------------------------------ recognition


@needs_lists
@pytest.mark.parametrize("name", LISTS)
def test_every_list_is_recognised_with_its_spelling_and_size(name: str) -> None:
    found = recognise(transformer_of(name), ROLES)
    assert isinstance(found, Match)
    assert (found.network.name, found.spelling, found.variant, found.strangers) == (*LISTS[name][:3], ())


@pytest.mark.parametrize(
    ("network", "values", "variant"),
    [
        ("flux_transformer", {"guidance_embeds": True, "in_channels": 384, "out_channels": 64}, "flux_fill"),
        ("flux_transformer", {"guidance_embeds": True, "in_channels": 128, "out_channels": 64}, "flux_control"),
        ("flux_transformer", {"guidance_embeds": True, "in_channels": 256, "out_channels": 64}, None),
        ("flux_transformer", {"guidance_embeds": True, "num_layers": 8}, "flux_dev"),
        ("flux_transformer", {"guidance_embeds": True, "num_layers": 20}, None),
        ("flux2_transformer", KLEIN_9B, "flux2_klein_9b"),
        ("sd3_transformer", SD35_MEDIUM, "sd35_medium"),
    ],
)
def test_sizes_without_a_list_are_recognised_in_every_spelling(
    network: str, values: dict[str, Any], variant: str | None
) -> None:
    canonical = {
        name: torch.empty(shape, device="meta") for name, shape in built(network, values).items()
    }  # fmt: skip
    for spelling in NETWORKS.get(network).tables():
        found = recognise(shapes_in(from_canonical(network, spelling, canonical)), ROLES)
        assert isinstance(found, Match), found
        assert (found.network.name, found.spelling, found.variant) == (network, spelling, variant)


@needs_lists
@pytest.mark.parametrize("name", LISTS)
def test_a_part_of_a_file_is_its_own_network_or_not_told(name: str) -> None:
    keys = list(transformer_of(name).items())
    for part in (keys[::3], keys[1::3], keys[: len(keys) // 2], keys[len(keys) // 2 :], keys[:5], keys[-5:]):
        found = recognise(dict(part), ROLES)
        assert not isinstance(found, Match) or found.network.name == LISTS[name][0]


@needs_lists
@pytest.mark.parametrize(
    "name", sorted({p.name.removesuffix(".json.gz") for p in KEYS.glob("*.json.gz")} - set(LISTS))
)  # fmt: skip
def test_other_networks_are_never_taken_for_one_of_these(name: str) -> None:
    keys = list(shapes_of(name).items())
    tiny = [(key, tuple(min(size, 3) for size in shape)) for key, shape in keys]
    for part in (keys, tiny, keys[::3], keys[1::3], keys[: len(keys) // 2], keys[len(keys) // 2 :]):
        found = recognise(dict(part), ROLES)
        assert not isinstance(found, Match) or found.network.name not in OURS, found


@needs_lists
@pytest.mark.parametrize("name", ["orig_chroma_bfl", "orig_comfy_chroma"])
def test_chroma_radiance_is_not_chroma(name: str) -> None:
    shapes = {k: s for k, s in transformer_of(name).items() if not k.startswith(("img_in.", "final_layer."))}
    shapes |= {
        "img_in_patch.weight": (3072, 3, 16, 16),
        "img_in_patch.bias": (3072,),
        "nerf_image_embedder.embedder.0.weight": (64, 67),
        "nerf_image_embedder.embedder.0.bias": (64,),
        "nerf_blocks.0.param_generator.weight": (49152, 3072),
        "nerf_blocks.0.param_generator.bias": (49152,),
        "nerf_blocks.0.norm.scale": (64,),
        "nerf_final_layer_conv.norm.scale": (64,),
        "nerf_final_layer_conv.conv.weight": (3, 64, 3, 3),
        "nerf_final_layer_conv.conv.bias": (3,),
    }
    assert not isinstance(recognise(shapes, ROLES), Match)


@needs_lists
@pytest.mark.parametrize("name", CONVERTIBLE)
def test_every_module_is_found_by_its_flattened_name(name: str) -> None:
    network, spelling, *_ = LISTS[name]
    table = NETWORKS.get(network).tables()[spelling]
    modules = {key.rpartition(".")[0] for key in transformer_of(name) if key.endswith(".weight")}
    for module in modules:
        found, dotted = table.flattened(module.replace(".", "_")), table.module(module)
        assert found is not None
        assert dotted is not None
        assert (found.names, found.rule) == (dotted.names, dotted.rule)


# ------------------------------------------------------------------------------------------------ blocks and configs


@needs_lists
@pytest.mark.parametrize("name", [name for name in LISTS if name.startswith("diffusers_")])
def test_every_tensor_stands_in_one_block(name: str) -> None:
    network = LISTS[name][0]
    found = {key: blocks_of(network, key) for key in shapes_of(name)}
    assert {key: blocks for key, blocks in found.items() if len(blocks) != 1} == {}
    counts = next(v.counts for v in NETWORKS.get(network).variants if v.name == LISTS[name][2])
    depth = sum(counts[t] for t in ("transformer_blocks.{}", "single_transformer_blocks.{}") if t in counts)
    assert len({blocks[0] for blocks in found.values()}) == 2 + depth


@needs_lists
@pytest.mark.parametrize("name", [name for name in LISTS if name.startswith("diffusers_")])
def test_diffusers_builds_a_list_from_our_configuration(name: str) -> None:
    network, shapes = LISTS[name][0], shapes_of(name)
    assert built(network, resolved(NETWORKS.get(network).config, shapes)) == shapes


@pytest.mark.parametrize(
    ("network", "values"),
    [
        *TINY.values(),
        ("flux_transformer", {"guidance_embeds": True, "in_channels": 384, "out_channels": 64}),
        ("flux2_transformer", KLEIN_9B),
        ("sd3_transformer", SD35_MEDIUM),
    ],
)
def test_diffusers_builds_any_size_from_our_configuration(network: str, values: dict[str, Any]) -> None:
    shapes = built(network, values)
    config = resolved(NETWORKS.get(network).config, shapes)
    assert built(network, config) == shapes
    for key, value in values.items():
        assert config[key] == (list(value) if isinstance(value, tuple) else value), key


@pytest.mark.parametrize("network", sorted(OURS))
def test_a_configuration_says_everything_that_diffusers_class_asks_for(network: str) -> None:
    pytest.importorskip("diffusers")
    import diffusers

    config = NETWORKS.get(network).config
    assert config is not None
    asked = inspect.signature(getattr(diffusers, config.class_name)).parameters
    assert sorted(config.values) == sorted(asked)


# ------------------------------------------------------------------------------------------------ architectures


@needs_lists
@pytest.mark.parametrize(("name", "architecture"), [("sdmecha_flux-flux", "flux"), ("sdmecha_sd3-comfyui", "sd3")])
def test_the_parts_of_a_single_file_are_the_networks_that_its_architecture_names(name: str, architecture: str) -> None:
    tensors = {key: TensorInfo(TensorSpec("F16", shape), 0, 0, 0) for key, shape in shapes_of(name).items()}
    found = identify(tensors)
    assert (found.architecture, found.strangers) == (architecture, ())
    for component in ARCHITECTURES.get(architecture).components:
        match = found.parts[component.name].match
        assert match is not None
        assert (match.network.name, match.spelling) == (component.network, component.spelling)
        assert component.variant in (None, match.variant)
        bodies = found.parts[component.name].bodies
        assert all(key.startswith(component.prefix) or body == "logit_scale" for key, body in bodies.items())


@pytest.mark.parametrize("architecture", ["chroma", "flux", "flux2", "sd3"])
def test_components_are_of_known_networks_spellings_and_sizes_under_prefixes_of_their_own(architecture: str) -> None:
    components = ARCHITECTURES.get(architecture).components
    for component in components:
        network = NETWORKS.get(component.network)
        spellings = {component.spelling, component.comfy_spelling, component.kohya_spelling} - {""}
        assert spellings <= network.tables().keys()
        assert component.variant in (None, *(v.name for v in network.variants))
    prefixes = [c.prefix for c in components]
    assert all(prefixes)
    assert not [(a, b) for a in prefixes for b in prefixes if a is not b and a.startswith(b)]


@pytest.mark.parametrize(("architecture", "scale", "shift"), [
    ("chroma", 0.3611, 0.1159), ("flux", 0.3611, 0.1159), ("sd3", 1.5305, 0.0609),
])  # fmt: skip
def test_latents_are_scaled_as_the_architecture_has_them(architecture: str, scale: float, shift: float) -> None:
    vae = next(c for c in ARCHITECTURES.get(architecture).components if c.name == "vae")
    assert (vae.config["scaling_factor"], vae.config["shift_factor"]) == (scale, shift)
