"""Wan, Qwen-Image, Z-Image, HunyuanVideo and Lumina2: our tables against real lists, diffusers and ComfyUI."""

from __future__ import annotations

import inspect
import re
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tagged import KEYS, assert_equal, from_canonical, needs_lists, shapes_of, tagged, to_canonical

from weightops.files.tensor import TensorInfo, TensorSpec
from weightops.naming.identify import identify
from weightops.naming.keymap import ARCHITECTURES, NETWORKS, Config, Count, Dim, Has, Table
from weightops.naming.recognise import Match, recognise

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

ROLES = ("transformer", "unet")
WAN, QWEN, Z_IMAGE = "wan_transformer", "qwen_image_transformer", "z_image_transformer"
HUNYUAN, LUMINA2 = "hunyuan_video_transformer", "lumina2_transformer"
OURS = {"wan": WAN, "qwen_image": QWEN, "z_image": Z_IMAGE, "hunyuan_video": HUNYUAN, "lumina2": LUMINA2}

# list -> network, spelling, variant, and the same model in diffusers' names.
LISTS = {
    "diffusers_hunyuan_video": (HUNYUAN, "diffusers", "hunyuan_video", "diffusers_hunyuan_video"),
    "diffusers_lumina2": (LUMINA2, "diffusers", "lumina2", "diffusers_lumina2"),
    "diffusers_qwen_image": (QWEN, "diffusers", "qwen_image", "diffusers_qwen_image"),
    "diffusers_wan21_i2v_14b": (WAN, "diffusers", "wan21_i2v_14b", "diffusers_wan21_i2v_14b"),
    "diffusers_wan21_t2v_14b": (WAN, "diffusers", "wan_t2v_14b", "diffusers_wan21_t2v_14b"),
    "diffusers_wan21_t2v_1_3b": (WAN, "diffusers", "wan_t2v_1_3b", "diffusers_wan21_t2v_1_3b"),
    "diffusers_wan22_i2v_14b": (WAN, "diffusers", "wan22_i2v_14b", "diffusers_wan22_i2v_14b"),
    "diffusers_z_image": (Z_IMAGE, "diffusers", "z_image", "diffusers_z_image"),
    "orig_comfy_hunyuan_video": (HUNYUAN, "comfy", "hunyuan_video", "diffusers_hunyuan_video"),
    "orig_comfy_lumina2": (LUMINA2, "original", "lumina2", "diffusers_lumina2"),
    "orig_comfy_qwen_image": (QWEN, "diffusers", "qwen_image", "diffusers_qwen_image"),
    "orig_comfy_wan21_i2v_14b": (WAN, "original", "wan21_i2v_14b", "diffusers_wan21_i2v_14b"),
    "orig_comfy_z_image": (Z_IMAGE, "comfy", "z_image", "diffusers_z_image"),
    "orig_hunyuan_video_tencent": (HUNYUAN, "original", "hunyuan_video", "diffusers_hunyuan_video"),
    "orig_wan21_t2v_14b": (WAN, "original", "wan_t2v_14b", "diffusers_wan21_t2v_14b"),
    "orig_wan21_t2v_1_3b": (WAN, "original", "wan_t2v_1_3b", "diffusers_wan21_t2v_1_3b"),
    "orig_wan22_i2v_14b": (WAN, "original", "wan22_i2v_14b", "diffusers_wan22_i2v_14b"),
}
IN_DIFFUSERS = [name for name in LISTS if name.startswith("diffusers_")]
# ComfyUI's names of HunyuanVideo have no converter; Qwen-Image needs none.
CONVERTIBLE = [
    "orig_comfy_lumina2",
    "orig_comfy_wan21_i2v_14b",
    "orig_comfy_z_image",
    "orig_hunyuan_video_tencent",
    "orig_wan21_t2v_14b",
    "orig_wan21_t2v_1_3b",
    "orig_wan22_i2v_14b",
]

CONVERTERS = {
    HUNYUAN: "convert_hunyuan_video_transformer_to_diffusers",
    LUMINA2: "convert_lumina2_to_diffusers",
    WAN: "convert_wan_transformer_to_diffusers",
    Z_IMAGE: "convert_z_image_transformer_checkpoint_to_diffusers",
}

# Released sizes that no list holds: network, what diffusers' class is made of, variant.
SIZES = {
    "wan 2.1 first and last frame": (
        WAN, {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120, "pos_embed_seq_len": 514},
        "wan21_flf2v_14b",
    ),
    "wan 2.2 of 5B": (
        WAN,
        {"num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336, "num_layers": 30},
        "wan22_ti2v_5b",
    ),
    "qwen image layered": (QWEN, {"use_additional_t_cond": True, "use_layer3d_rope": True}, "qwen_image"),
    "hunyuan image to video": (HUNYUAN, {"in_channels": 33, "guidance_embeds": False}, "hunyuan_video_i2v"),
    "skyreels image to video": (HUNYUAN, {"in_channels": 32}, "skyreels_v1_i2v"),
}  # fmt: skip

# Small models of every kind.
_WAN = {"num_attention_heads": 1, "ffn_dim": 20, "text_dim": 12, "freq_dim": 8, "in_channels": 3, "out_channels": 3}
TINY = {
    "wan": (WAN, {**_WAN, "num_layers": 2}),
    "wan with image": (WAN, {**_WAN, "num_layers": 3, "image_dim": 10, "added_kv_proj_dim": 128}),
    "wan with frames": (
        WAN, {**_WAN, "num_layers": 1, "image_dim": 10, "added_kv_proj_dim": 128, "pos_embed_seq_len": 6},
    ),
    "qwen image": (
        QWEN,
        {"num_attention_heads": 1, "num_layers": 2, "in_channels": 8, "out_channels": 2, "joint_attention_dim": 12},
    ),
    "qwen image layered": (
        QWEN,
        {"num_attention_heads": 2, "num_layers": 1, "in_channels": 8, "out_channels": 2, "joint_attention_dim": 12,
         "use_additional_t_cond": True, "use_layer3d_rope": True},
    ),
    "z image": (
        Z_IMAGE,
        {"dim": 256, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "in_channels": 3,
         "cap_feat_dim": 12},
    ),
    "z image omni": (
        Z_IMAGE,
        {"dim": 128, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 1, "n_kv_heads": 1, "in_channels": 3,
         "cap_feat_dim": 12, "siglip_feat_dim": 10},
    ),
    "hunyuan video": (
        HUNYUAN,
        {"num_attention_heads": 1, "num_layers": 2, "num_single_layers": 3, "num_refiner_layers": 1, "in_channels": 3,
         "out_channels": 3, "text_embed_dim": 12, "pooled_projection_dim": 10},
    ),
    "hunyuan video without guidance": (
        HUNYUAN,
        {"num_attention_heads": 2, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 2, "in_channels": 5,
         "out_channels": 3, "text_embed_dim": 12, "pooled_projection_dim": 10, "guidance_embeds": False},
    ),
    "lumina2": (
        LUMINA2,
        {"hidden_size": 192, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1,
         "in_channels": 3, "cap_feat_dim": 12},
    ),
}  # fmt: skip


def diffusers() -> Any:
    """The library, which warns when it is imported."""
    pytest.importorskip("diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        from diffusers.loaders import single_file_utils

        assert single_file_utils
    return diffusers


def made(class_name: str, values: dict[str, Any]) -> Shapes:
    """Names and shapes of what a class of diffusers makes of a configuration."""
    library = diffusers()
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = getattr(library, class_name)(**values)
    return shapes_in(model.state_dict())


def built(network: str, values: dict[str, Any]) -> Shapes:
    config = NETWORKS.get(network).config
    assert config is not None
    return made(config.class_name, values)


def converted(network: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers' converter makes of a copy: it empties what it is given."""
    return getattr(diffusers().loaders.single_file_utils, CONVERTERS[network])(dict(tensors))


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
            return size
        case Count():
            before = value.template.removesuffix("{}")
            return len({name.removeprefix(before).split(".")[0] for name in shapes if name.startswith(before)})
        case Has():
            return resolved(value.yes if value.name in shapes else value.no, shapes)
        case list():
            return [resolved(inner, shapes) for inner in value]
    return value


def blocks_of(network: str, name: str) -> list[str]:
    """The blocks that a canonical tensor stands in."""
    found, words = [], name.split(".")
    for block, prefixes in NETWORKS.get(network).blocks:
        for prefix in prefixes:
            wanted = prefix.split(".")
            pairs = list(zip(words, wanted, strict=False))
            if len(words) >= len(wanted) and all((w == "{}" and word.isdigit()) or w == word for word, w in pairs):
                found.append(block.format(*(word for word, w in pairs if w == "{}")))
    return found


def name_of(shapes: Shapes) -> str | None:
    """The network of these tensors, None where there is none or several."""
    found = recognise(shapes, ROLES)
    return found.network.name if isinstance(found, Match) else None


def table_of(network: str, spelling: str) -> Table:
    return NETWORKS.get(network).tables()[spelling]


def times(count: int, rows: Shapes) -> Shapes:
    """These rows, once for each of so many blocks."""
    return {name.format(i): shape for i in range(count) for name, shape in rows.items()}


# ------------------------------------------------------------------------------------------------ names and values


@needs_lists
@pytest.mark.parametrize("name", LISTS)
def test_every_key_of_a_list_becomes_one_of_diffusers_names_and_shapes_and_comes_back(name: str) -> None:
    network, spelling, _, twin = LISTS[name]
    tensors = tagged(shapes_of(name))
    found = to_canonical(network, spelling, tensors)
    assert shapes_in(found) == shapes_of(twin)
    if name == "orig_comfy_hunyuan_video":  # see the norms below
        tensors = {scaled(key): tensor for key, tensor in tensors.items()}
    assert_equal(from_canonical(network, spelling, found), tensors)


@needs_lists
@pytest.mark.parametrize("name", CONVERTIBLE)
def test_every_value_stands_where_diffusers_converter_puts_it(name: str) -> None:
    network, spelling, *_ = LISTS[name]
    tensors = tagged(shapes_of(name))
    assert_equal(to_canonical(network, spelling, tensors), converted(network, tensors))


@needs_lists
def test_qwen_image_is_published_in_diffusers_names() -> None:
    assert shapes_of("orig_comfy_qwen_image") == shapes_of("diffusers_qwen_image")


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


@pytest.mark.parametrize("kind", ["wan", "wan with image", "z image", "z image omni"])
def test_small_models_are_read_by_diffusers_converter_where_it_knows_no_sizes(kind: str) -> None:
    network, values = TINY[kind]
    canonical = tagged(built(network, values))
    spelling = NETWORKS.get(network).spellings[0].name
    assert_equal(canonical, converted(network, from_canonical(network, spelling, canonical)))


def test_diffusers_converter_leaves_wans_positions_of_frames_behind() -> None:
    network, values = TINY["wan with frames"]
    canonical = tagged(built(network, values))
    theirs = converted(network, from_canonical(network, "original", canonical))
    left, place = "img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"
    assert theirs.keys() - canonical.keys() == {left}
    assert canonical.keys() - theirs.keys() == {place}
    assert torch.equal(theirs[left], canonical[place])


def test_the_norm_before_wans_cross_attention_has_two_numbers() -> None:
    original, ours = table_of(WAN, "original"), table_of(WAN, "diffusers")
    claim = original.claim("blocks.7.norm3.weight")
    assert claim is not None
    assert claim.names == ("blocks.7.norm2.weight",)
    # The other norms have no weights, in either spelling.
    assert original.claim("blocks.7.norm2.weight") is None
    assert ours.claim("blocks.7.norm3.weight") is None


@pytest.mark.parametrize(
    ("network", "key", "shape", "bands"),
    [
        (HUNYUAN, "single_blocks.7.linear1.weight", (21504, 3072), (3072, 3072, 3072, 12288)),
        (HUNYUAN, "single_blocks.7.linear1.bias", (21504,), (3072, 3072, 3072, 12288)),
        (HUNYUAN, "double_blocks.7.txt_attn_qkv.bias", (9216,), (3072, 3072, 3072)),
        (LUMINA2, "layers.7.attention.qkv.weight", (3840, 2304), (2304, 768, 768)),
        (LUMINA2, "context_refiner.1.attention.qkv.weight", (24, 8), (8, 8, 8)),
        (Z_IMAGE, "noise_refiner.1.attention.qkv.weight", (11520, 3840), (3840, 3840, 3840)),
    ],
)
def test_packed_projections_are_cut_where_each_part_begins(
    network: str, key: str, shape: tuple[int, ...], bands: tuple[int, ...]
) -> None:
    tensors = {key: torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)}
    if key.endswith("bias"):  # a bias is cut as its weight is
        tensors[key.removesuffix("bias") + "weight"] = torch.zeros(()).expand(shape[0], min(bands))
    found = to_canonical(network, NETWORKS.get(network).spellings[0].name, tensors)
    assert tuple(len(t) for name, t in found.items() if name.endswith(key.rpartition(".")[2])) == bands


@pytest.mark.parametrize(
    ("network", "spelling", "key", "swapped"),
    [
        (HUNYUAN, "original", "final_layer.adaLN_modulation.1.weight", True),
        (HUNYUAN, "comfy", "final_layer.adaLN_modulation.1.bias", True),
        (HUNYUAN, "original", "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.weight", False),
        (HUNYUAN, "diffusers", "norm_out.linear.weight", False),
        (LUMINA2, "original", "final_layer.adaLN_modulation.1.weight", False),
        (Z_IMAGE, "comfy", "final_layer.adaLN_modulation.1.weight", False),
        (QWEN, "diffusers", "norm_out.linear.weight", False),
    ],
)
def test_only_hunyuans_final_modulation_is_swapped(network: str, spelling: str, key: str, swapped: bool) -> None:
    claim = table_of(network, spelling).claim(key)
    assert claim is not None
    assert claim.rule.swapped is swapped


# --------------------------------------------------------------------------------------- ComfyUI's HunyuanVideo

# What ComfyUI renames when it loads Tencent's names, in this order. Source: FORMATS §5; its supported_models.py.
RENAMED = (
    ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
    ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
    ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
    ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
    ("_mod.linear.", "_mod.lin."),
    ("_attn_qkv.", "_attn.qkv."),
    ("mlp.fc1.", "mlp.0."),
    ("mlp.fc2.", "mlp.2."),
    ("_attn_q_norm.", "_attn.norm.query_norm."),
    ("_attn_k_norm.", "_attn.norm.key_norm."),
    (".q_norm.", ".norm.query_norm."),
    (".k_norm.", ".norm.key_norm."),
    ("_attn_proj.", "_attn.proj."),
    (".modulation.linear.", ".modulation.lin."),
    ("_in.mlp.2.", "_in.out_layer."),
    ("_in.mlp.0.", "_in.in_layer."),
)


def renamed(key: str) -> str:
    for theirs, comfys in RENAMED:
        key = key.replace(theirs, comfys)
    return key


def scaled(key: str) -> str:
    """ComfyUI's norms, as files have called them since Flux."""
    return key.replace("query_norm.weight", "query_norm.scale").replace("key_norm.weight", "key_norm.scale")


@needs_lists
def test_comfyuis_names_say_what_tencents_say_that_it_renames() -> None:
    tensors = tagged(shapes_of("orig_hunyuan_video_tencent"))
    comfys = {renamed(key): tensor for key, tensor in tensors.items()}
    assert shapes_in(comfys) == shapes_of("orig_comfy_hunyuan_video")
    expected = to_canonical(HUNYUAN, "original", tensors)
    assert_equal(to_canonical(HUNYUAN, "comfy", comfys), expected)
    assert_equal(to_canonical(HUNYUAN, "comfy", {scaled(key): t for key, t in comfys.items()}), expected)


@needs_lists
def test_diffusers_cannot_read_comfyuis_hunyuan_video() -> None:
    theirs = converted(HUNYUAN, tagged(shapes_of("orig_comfy_hunyuan_video")))
    assert len(shapes_of("diffusers_hunyuan_video").keys() - theirs.keys()) > 800


# ------------------------------------------------------------------------------------------------ recognition


@needs_lists
@pytest.mark.parametrize("name", LISTS)
def test_every_list_is_recognised_with_its_spelling_and_size(name: str) -> None:
    found = recognise(shapes_of(name), ROLES)
    assert isinstance(found, Match)
    assert (found.network.name, found.spelling, found.variant, found.strangers) == (*LISTS[name][:3], ())


@needs_lists
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer."])
@pytest.mark.parametrize("name", LISTS)
def test_every_list_is_a_checkpoint_of_its_architecture_under_every_prefix(name: str, prefix: str) -> None:
    network, spelling, variant, _ = LISTS[name]
    shapes = shapes_of(name)
    found = identify({prefix + key: TensorInfo(TensorSpec("BF16", s), 0, 0, 0) for key, s in shapes.items()})
    assert OURS[found.architecture or ""] == network
    assert (found.kind, found.spelling, found.variant, found.strangers) == ("checkpoint", spelling, variant, ())
    assert set(found.components.values()) == {"transformer"}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_without_a_list_are_recognised_in_every_spelling(size: str) -> None:
    network, values, variant = SIZES[size]
    canonical = tagged(built(network, values))
    for spelling in NETWORKS.get(network).tables():
        written = from_canonical(network, spelling, canonical)
        found = recognise(shapes_in(written), ROLES)
        assert isinstance(found, Match), found
        assert (found.network.name, found.spelling, found.variant) == (network, spelling, variant)
        assert shapes_in(to_canonical(network, spelling, written)) == shapes_in(canonical)


@needs_lists
@pytest.mark.parametrize("name", LISTS)
def test_a_list_with_small_sizes_is_recognised(name: str) -> None:
    found = recognise({key: tuple(min(s, 3) for s in shape) for key, shape in shapes_of(name).items()}, ROLES)
    assert isinstance(found, Match)
    assert (found.network.name, found.spelling, found.variant) == (*LISTS[name][:2], None)


@needs_lists
@pytest.mark.parametrize("name", LISTS)
def test_a_part_of_a_file_is_its_own_network_or_not_told(name: str) -> None:
    keys = list(shapes_of(name).items())
    for part in (keys[::3], keys[1::3], keys[: len(keys) // 2], keys[len(keys) // 2 :], keys[:5], keys[-5:]):
        assert name_of(dict(part)) in (LISTS[name][0], None)
    assert name_of(dict(keys[::3])) == LISTS[name][0]


@pytest.mark.parametrize(
    ("network", "spelling", "extra"),
    [
        (QWEN, "diffusers", "__index_timestep_zero__"),
        (LUMINA2, "original", "norm_final.weight"),
        (Z_IMAGE, "comfy", "norm_final.weight"),
    ],
)
def test_tensors_that_mean_nothing_elsewhere_are_no_strangers(network: str, spelling: str, extra: str) -> None:
    values = next(values for owner, values in TINY.values() if owner == network)
    canonical = tagged(built(network, values))
    written = from_canonical(network, spelling, canonical) | {extra: torch.empty(0)}
    found = recognise(shapes_in(written), ROLES)
    assert isinstance(found, Match)
    assert (found.network.name, found.strangers) == (network, ())
    assert_equal(to_canonical(network, spelling, written), canonical)
    if network in CONVERTERS:  # diffusers drops it too; its sizes for Lumina2 are fixed
        sizes = built(network, {"num_layers": 1, "num_refiner_layers": 1} if network == LUMINA2 else values)
        written = from_canonical(network, spelling, tagged(sizes)) | {extra: torch.empty(0)}
        assert shapes_in(converted(network, written)) == sizes


# ------------------------------------------------------------------------------------------------ relatives


@needs_lists
@pytest.mark.parametrize(
    "name", sorted({p.name.removesuffix(".json.gz") for p in KEYS.glob("*.json.gz")} - set(LISTS))
)  # fmt: skip
def test_other_networks_are_never_taken_for_one_of_these(name: str) -> None:
    keys = list(shapes_of(name).items())
    tiny = [(key, tuple(min(size, 3) for size in shape)) for key, shape in keys]
    for part in (keys, tiny, keys[::3], keys[1::3]):
        assert name_of(dict(part)) not in OURS.values()


@pytest.mark.parametrize(
    ("class_name", "values"),
    [
        ("WanVACETransformer3DModel", {**_WAN, "num_layers": 2, "vace_layers": [0], "vace_in_channels": 4}),
        ("WanAnimateTransformer3DModel", {}),
        ("SkyReelsV2Transformer3DModel", {**_WAN, "num_layers": 2, "inject_sample_info": True}),
        ("AnyFlowTransformer3DModel", {}),
        ("HeliosTransformer3DModel", {}),
        ("SanaVideoTransformer3DModel", {}),
        ("QwenImage21Transformer2DModel", {}),
        ("NucleusMoEImageTransformer2DModel", {}),
        ("HunyuanImageTransformer2DModel", {}),
        ("HunyuanVideo15Transformer3DModel", {"num_layers": 1, "num_refiner_layers": 1}),
        ("HunyuanVideoFramepackTransformer3DModel", {"has_image_proj": True, "has_clean_x_embedder": True}),
        ("MotifVideoTransformer3DModel", {}),
        ("LuminaNextDiT2DModel", {"num_layers": 2, "num_kv_heads": 8, "cross_attention_dim": 12}),
        ("Ideogram4Transformer2DModel", {}),
        ("BriaFibo2Transformer2DModel", {}),
    ],
)
def test_relatives_are_not_taken_for_one_of_these(class_name: str, values: dict[str, Any]) -> None:
    if not hasattr(diffusers(), class_name):
        pytest.skip(f"this version of diffusers has no {class_name}")
    assert name_of(made(class_name, values)) not in OURS.values()


# What relatives that no library here can build add to the names of one of these. Source: ComfyUI's model detection.
ADDED = {
    "lumina2 as newbie": ("lumina2", "original", (
        "clip_text_pooled_proj.0.weight", "clip_text_pooled_proj.1.weight", "clip_text_pooled_proj.1.bias",
        "time_text_embed.1.weight", "time_text_embed.1.bias",
    )),
    "lumina2 as omnigen2": ("lumina2", "diffusers", (
        "image_index_embedding", "ref_image_patch_embedder.weight", "ref_image_patch_embedder.bias",
        "ref_image_refiner.0.attn.to_q.weight",
    )),
    "z image of pixels": ("z image", "comfy", (
        "dec_net.cond_embed.weight", "dec_net.cond_embed.bias", "dec_net.final_layer.linear.weight",
        "dec_net.final_layer.linear.bias", "__x0__",
    )),
    "wan with a camera": ("wan", "original", (
        "control_adapter.conv.weight", "control_adapter.conv.bias",
        "control_adapter.residual_blocks.0.conv1.weight", "control_adapter.residual_blocks.0.conv1.bias",
    )),
    "wan from speech": ("wan", "original", (
        "cond_encoder.weight", "cond_encoder.bias", "trainable_cond_mask.weight",
        "casual_audio_encoder.encoder.final_linear.weight",
    )),
    "hunyuan video 1.5": ("hunyuan video", "comfy", (
        "cond_type_embedding.weight", "vision_in.proj.0.weight", "vision_in.proj.0.bias", "byt5_in.fc1.weight",
    )),
    "qwen image controlled": ("qwen image", "diffusers", (
        "controlnet_x_embedder.weight", "controlnet_x_embedder.bias", "controlnet_blocks.0.weight",
    )),
    "invented": ("z image", "diffusers", ("a.weight", "a.bias", "layers.0.attention.to_r.weight")),
}  # fmt: skip


@pytest.mark.parametrize("relative", ADDED)
def test_a_relative_with_tensors_of_its_own_is_unknown(relative: str) -> None:
    kind, spelling, added = ADDED[relative]
    network, values = TINY[kind]
    shapes = shapes_in(from_canonical(network, spelling, tagged(built(network, values))))
    assert name_of(shapes) == network
    assert name_of(shapes | dict.fromkeys(added, (3, 3))) is None


@pytest.mark.parametrize(
    "added",
    [("ref_conv.weight", "ref_conv.bias"), ("patch_embedding_pose.weight", "patch_embedding_pose.bias")],
    ids=["fun control", "scail"],
)
def test_wan_with_one_more_embedder_is_wan_and_names_it(added: tuple[str, str]) -> None:
    network, values = TINY["wan"]
    shapes = shapes_in(from_canonical(network, "original", tagged(built(network, values))))
    found = recognise(shapes | dict.fromkeys(added, (3, 3)), ROLES)
    assert isinstance(found, Match)
    assert (found.network.name, found.strangers) == (network, added)


@needs_lists
@pytest.mark.parametrize("name", ["orig_comfy_hunyuan_video", "orig_hunyuan_video_tencent"])
def test_the_refiner_of_hunyuan_image_has_no_names_of_its_own_and_is_unknown(name: str) -> None:
    shapes = {key: shape for key, shape in shapes_of(name).items() if not key.startswith("vector_in.")}
    assert name_of(shapes) == HUNYUAN
    assert name_of(shapes | {"img_in.proj.weight": (3328, 128, 1, 1, 1)}) is None


@needs_lists
def test_mage_flow_has_qwen_images_names_and_none_of_its_sizes() -> None:
    """Not to be told from a small Qwen-Image: twelve blocks, patches of one latent pixel, Qwen3-VL for the text."""
    shapes = {k: s for k, s in shapes_of("diffusers_qwen_image").items() if not k.startswith("transformer_blocks.")}
    shapes |= {k: s for k, s in shapes_of("diffusers_qwen_image").items() if k.split(".")[1] in map(str, range(12))}
    shapes |= {
        "txt_norm.weight": (2560,),
        "txt_in.weight": (3072, 2560),
        "img_in.weight": (3072, 128),
        "proj_out.weight": (128, 3072),
        "proj_out.bias": (128,),
    }
    found = recognise(shapes, ROLES)
    assert isinstance(found, Match)
    assert (found.network.name, found.variant) == (QWEN, None)


# ------------------------------------------------------------------------------------------------ LoRA


@needs_lists
@pytest.mark.parametrize("name", [*CONVERTIBLE, "orig_comfy_qwen_image", "orig_comfy_hunyuan_video", *IN_DIFFUSERS])
def test_every_module_is_found_by_its_flattened_name(name: str) -> None:
    network, spelling, *_ = LISTS[name]
    table = table_of(network, spelling)
    for module in {key.rpartition(".")[0] for key in shapes_of(name) if key.endswith(".weight")}:
        found, dotted = table.flattened(module.replace(".", "_")), table.module(module)
        assert found is not None, module
        assert dotted is not None, module
        assert (found.names, found.rule) == (dotted.names, dotted.rule)


@pytest.mark.parametrize(
    ("shapes", "network"),
    [
        (times(60, {"transformer_blocks.{}.attn.to_q.weight": (3072, 3072)}), QWEN),
        (times(60, {"transformer_blocks.{}.attn.add_k_proj.weight": (3072, 3072)}), QWEN),
        (times(1, {"transformer_blocks.{}.img_mlp.net.0.proj.weight": (12288, 3072)}), QWEN),
        # Flux.1, HunyuanVideo and a part of Qwen-Image have these.
        (times(19, {"transformer_blocks.{}.attn.to_q.weight": (3072, 3072)}), None),
        (times(40, {"single_transformer_blocks.{}.attn.to_q.weight": (3072, 3072)}), HUNYUAN),
        (times(20, {"double_blocks.{}.img_attn_qkv.weight": (9216, 3072)}), HUNYUAN),
        (times(20, {"double_blocks.{}.img_attn.qkv.weight": (9216, 3072)}), HUNYUAN),
        (times(40, {"blocks.{}.self_attn.q.weight": (5120, 5120)}), WAN),
        (times(30, {"blocks.{}.ffn.0.weight": (14336, 3072)}), WAN),
        (times(30, {"blocks.{}.attn1.to_q.weight": (1536, 1536)}), WAN),
        # Cosmos and Anima have these.
        (times(28, {"blocks.{}.self_attn.q_proj.weight": (2048, 2048)}), None),
        (times(28, {"blocks.{}.mlp.layer1.weight": (8192, 2048)}), None),
        (times(30, {"layers.{}.attention.to_q.weight": (3840, 3840)}), Z_IMAGE),
        (times(30, {"layers.{}.attention.qkv.weight": (11520, 3840)}), Z_IMAGE),
        (times(26, {"layers.{}.attention.out.weight": (2304, 2304)}), LUMINA2),
        (times(26, {"layers.{}.attn.to_k.weight": (768, 2304)}), LUMINA2),
        # Lumina-Next has this.
        (times(24, {"layers.{}.attention.wq.weight": (2304, 2304)}), None),
    ],
)
def test_shapes_tell_loras_for_equal_names_apart(shapes: Shapes, network: str | None) -> None:
    assert name_of(shapes) == network


@needs_lists
@pytest.mark.parametrize(
    ("name", "prefix", "networks"),
    [
        # Queries and keys of two blocks: HunyuanVideo and Flux.1 have those too.
        ("invoke_qwen_image_lora_diffusers_format", "", {QWEN, HUNYUAN}),
        ("invoke_qwen_image_lora_kohya_format", "lora_unet_", {QWEN}),
        ("invoke_anima_lora_kohya_format", "lora_unet_", set()),
        ("invoke_anima_lora_peft_format", "diffusion_model.", set()),
        ("invoke_krea2_lora_kohya_format", "lora_unet_", set()),
    ],
)
def test_modules_of_real_loras_are_known_to_their_own_network(name: str, prefix: str, networks: set[str]) -> None:
    suffix = re.compile(r"\.(alpha|lora_\w+\.weight|lokr_w\d)$")
    modules = {suffix.sub("", key).removeprefix(prefix) for key in shapes_of(name)}
    assert modules
    found = set()
    for network in OURS.values():
        for table in NETWORKS.get(network).tables().values():
            find = table.flattened if prefix == "lora_unet_" else table.module
            if all(find(module) is not None for module in modules):
                found.add(network)
    assert found == networks


# ------------------------------------------------------------------------------------------------ blocks and configs


@needs_lists
@pytest.mark.parametrize("name", IN_DIFFUSERS)
def test_every_tensor_of_a_list_stands_in_one_block(name: str) -> None:
    network, _, variant, _ = LISTS[name]
    found = {key: blocks_of(network, key) for key in shapes_of(name)}
    assert {key: blocks for key, blocks in found.items() if len(blocks) != 1} == {}
    counts = next(v.counts for v in NETWORKS.get(network).variants if v.name == variant)
    named = {prefix for _, prefixes in NETWORKS.get(network).blocks for prefix in prefixes}
    assert len({blocks[0] for blocks in found.values()}) == 2 + sum(n for t, n in counts.items() if t in named)


@pytest.mark.parametrize("kind", TINY)
def test_every_tensor_of_a_small_model_stands_in_one_block(kind: str) -> None:
    network, values = TINY[kind]
    assert {name for name in built(network, values) if len(blocks_of(network, name)) != 1} == set()


@needs_lists
@pytest.mark.parametrize("name", IN_DIFFUSERS)
def test_diffusers_builds_a_list_from_our_configuration(name: str) -> None:
    network, shapes = LISTS[name][0], shapes_of(name)
    assert built(network, resolved(NETWORKS.get(network).config, shapes)) == shapes


@pytest.mark.parametrize(("network", "values"), [*TINY.values(), *(size[:2] for size in SIZES.values())])
def test_diffusers_builds_any_size_from_our_configuration(network: str, values: dict[str, Any]) -> None:
    shapes = built(network, values)
    config = resolved(NETWORKS.get(network).config, shapes)
    assert built(network, config) == shapes
    assert {key: config[key] for key in values} == values


@pytest.mark.parametrize("network", OURS.values())
def test_a_configuration_says_everything_that_diffusers_class_asks_for(network: str) -> None:
    config = NETWORKS.get(network).config
    assert config is not None
    asked = inspect.signature(getattr(diffusers(), config.class_name)).parameters
    assert sorted(config.values) == sorted(asked)


@pytest.mark.parametrize("architecture", OURS)
def test_an_architecture_names_its_network_and_prefixes_that_do_not_overlap(architecture: str) -> None:
    components = ARCHITECTURES.get(architecture).components
    assert components[0].network == OURS[architecture]
    assert components[0].kohya_spelling in NETWORKS.get(OURS[architecture]).tables()
    assert components[0].spelling in NETWORKS.get(OURS[architecture]).tables()
    prefixes = [c.prefix for c in components]
    assert all(prefixes)
    assert not [(a, b) for a in prefixes for b in prefixes if a is not b and a.startswith(b)]
