"""The names and shapes of real models, each with the answer it must get; and lists made of them, never seen before."""

from __future__ import annotations

import functools
import random
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import pytest
from tagged import KEYS, needs_lists, shapes_of

from weightops.files.checkpoint import Checkpoint
from weightops.files.tensor import TensorInfo, TensorSpec
from weightops.lora.adapters import read_adapters
from weightops.naming.identify import identify, quantised
from weightops.naming.keymap import ARCHITECTURES, NETWORKS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from weightops.lora.adapters import AdapterFile
    from weightops.naming.identify import Identity
    from weightops.naming.keymap import Component

Shapes = dict[str, tuple[int, ...]]


class Row(NamedTuple):
    """What a list is. The architecture of a VAE or a text encoder is its variant; of a model that is not ours, None."""

    kind: str
    architecture: str | None
    spelling: str | None
    variant: str | None


LISTS: dict[str, Row] = {
    "diffusers_auraflow": Row("unknown", None, None, None),
    "diffusers_chroma1": Row("checkpoint", "chroma", "diffusers", "chroma1"),
    "diffusers_cogvideox_5b": Row("unknown", None, None, None),
    "diffusers_ernie_image": Row("unknown", None, None, None),
    "diffusers_flux2_dev": Row("checkpoint", "flux2", "diffusers", "flux2_dev"),
    "diffusers_flux2_klein_4b": Row("checkpoint", "flux2", "diffusers", "flux2_klein_4b"),
    "diffusers_flux2_vae": Row("vae", "flux2_vae", "diffusers", "flux2_vae"),
    "diffusers_flux_dev": Row("checkpoint", "flux", "diffusers", "flux_dev"),
    "diffusers_flux_schnell": Row("checkpoint", "flux", "diffusers", "flux_schnell"),
    "diffusers_flux_vae": Row("vae", "flux_vae", "diffusers", "flux_vae"),
    "diffusers_hidream_i1": Row("unknown", None, None, None),
    "diffusers_hunyuan_video": Row("checkpoint", "hunyuan_video", "diffusers", "hunyuan_video"),
    "diffusers_hunyuan_video15": Row("unknown", None, None, None),
    "diffusers_krea2": Row("unknown", None, None, None),
    "diffusers_ltx2": Row("unknown", None, None, None),
    "diffusers_ltx_video": Row("unknown", None, None, None),
    "diffusers_lumina2": Row("checkpoint", "lumina2", "diffusers", "lumina2"),
    "diffusers_mochi": Row("unknown", None, None, None),
    "diffusers_pixart_sigma": Row("unknown", None, None, None),
    "diffusers_qwen_image": Row("checkpoint", "qwen_image", "diffusers", "qwen_image"),
    # Qwen-Image's VAE has Wan 2.1's names and shapes.
    "diffusers_qwen_image_vae": Row("vae", "wan21_vae", "diffusers", "wan21_vae"),
    "diffusers_sana_1600m": Row("unknown", None, None, None),
    "diffusers_sd15_inpaint_unet": Row("checkpoint", "sd15", "diffusers", "sd15_inpaint"),
    "diffusers_sd15_unet": Row("checkpoint", "sd15", "diffusers", "sd15"),
    "diffusers_sd21_unet": Row("checkpoint", "sd2", "diffusers", "sd2"),
    "diffusers_sd35_large": Row("checkpoint", "sd3", "diffusers", "sd35_large"),
    "diffusers_sd3_medium": Row("checkpoint", "sd3", "diffusers", "sd3_medium"),
    "diffusers_sd_vae": Row("vae", "sd_vae", "diffusers", "sd_vae"),
    "diffusers_sdxl_refiner_unet": Row("checkpoint", "sdxl_refiner", "diffusers", "sdxl_refiner"),
    "diffusers_sdxl_unet": Row("checkpoint", "sdxl", "diffusers", "sdxl"),
    "diffusers_wan21_i2v_14b": Row("checkpoint", "wan", "diffusers", "wan21_i2v_14b"),
    "diffusers_wan21_t2v_14b": Row("checkpoint", "wan", "diffusers", "wan_t2v_14b"),
    "diffusers_wan21_t2v_1_3b": Row("checkpoint", "wan", "diffusers", "wan_t2v_1_3b"),
    "diffusers_wan22_i2v_14b": Row("checkpoint", "wan", "diffusers", "wan22_i2v_14b"),
    "diffusers_wan_vae": Row("vae", "wan21_vae", "diffusers", "wan21_vae"),
    "diffusers_z_image": Row("checkpoint", "z_image", "diffusers", "z_image"),
    "orig_chroma_bfl": Row("checkpoint", "chroma", "original", "chroma1"),
    "orig_comfy_chroma": Row("checkpoint", "chroma", "comfy", "chroma1"),
    "orig_comfy_flux2_dev": Row("checkpoint", "flux2", "comfy", "flux2_dev"),
    "orig_comfy_flux2_klein_4b": Row("checkpoint", "flux2", "comfy", "flux2_klein_4b"),
    "orig_comfy_flux_dev": Row("checkpoint", "flux", "comfy", "flux_dev"),
    "orig_comfy_hunyuan_video": Row("checkpoint", "hunyuan_video", "comfy", "hunyuan_video"),
    "orig_comfy_lumina2": Row("checkpoint", "lumina2", "original", "lumina2"),
    # Its authors' names are diffusers'.
    "orig_comfy_qwen_image": Row("checkpoint", "qwen_image", "diffusers", "qwen_image"),
    "orig_comfy_wan21_i2v_14b": Row("checkpoint", "wan", "original", "wan21_i2v_14b"),
    "orig_comfy_z_image": Row("checkpoint", "z_image", "comfy", "z_image"),
    "orig_flux2_dev": Row("checkpoint", "flux2", "original", "flux2_dev"),
    "orig_flux_dev_bfl": Row("checkpoint", "flux", "original", "flux_dev"),
    "orig_hunyuan_video_tencent": Row("checkpoint", "hunyuan_video", "original", "hunyuan_video"),
    "orig_sd35_large": Row("checkpoint", "sd3", "original", "sd35_large"),
    "orig_sd3_medium": Row("checkpoint", "sd3", "original", "sd3_medium"),
    "orig_wan21_t2v_14b": Row("checkpoint", "wan", "original", "wan_t2v_14b"),
    "orig_wan21_t2v_1_3b": Row("checkpoint", "wan", "original", "wan_t2v_1_3b"),
    "orig_wan21_vae": Row("vae", "wan21_vae", "original", "wan21_vae"),
    "orig_wan22_i2v_14b": Row("checkpoint", "wan", "original", "wan22_i2v_14b"),
    "sdmecha_flux-flux": Row("checkpoint", "flux", "original", "flux_dev"),
    # kohya's folders: a prefix for each component, and diffusers' names.
    "sdmecha_sd1-kohya": Row("checkpoint", "sd15", "diffusers", "sd15"),
    "sdmecha_sd1-ldm": Row("checkpoint", "sd15", "original", "sd15"),
    "sdmecha_sd3-comfyui": Row("checkpoint", "sd3", "original", "sd3_medium"),
    "sdmecha_sdxl-diffusers_unet_only": Row("checkpoint", "sdxl", "diffusers", "sdxl"),
    "sdmecha_sdxl-kohya": Row("checkpoint", "sdxl", "original", "sdxl"),
    "sdmecha_sdxl-sgm": Row("checkpoint", "sdxl", "original", "sdxl"),
    "toolkit_CLIP-XL-SD": Row("text_encoder", "clip_bigg", "openclip", "clip_bigg"),
    "toolkit_CLIP-v1-SD": Row("text_encoder", "clip_l", "flat", "clip_l"),
    "toolkit_CLIP-v2-SD": Row("text_encoder", "clip_h", "openclip", "clip_h"),
    "toolkit_CLIP-v2-WD": Row("text_encoder", "clip_h", "openclip", "clip_h"),
    "toolkit_ControlNet-v1-SD": Row("controlnet", None, None, None),
    "toolkit_Depth-v2-SD": Row("unknown", None, None, None),
    "toolkit_UNET-XL-Refiner": Row("checkpoint", "sdxl_refiner", "original", "sdxl_refiner"),
    "toolkit_UNET-XL-SD": Row("checkpoint", "sdxl", "original", "sdxl"),
    "toolkit_UNET-v1-EMA": Row("checkpoint", "sd15", "ema", "sd15"),
    "toolkit_UNET-v1-Inpainting": Row("checkpoint", "sd15", "original", "sd15_inpaint"),
    "toolkit_UNET-v1-Pix2Pix-EMA": Row("checkpoint", "sd15", "ema", "sd15_pix2pix"),
    "toolkit_UNET-v1-Pix2Pix": Row("checkpoint", "sd15", "original", "sd15_pix2pix"),
    "toolkit_UNET-v1-SD": Row("checkpoint", "sd15", "original", "sd15"),
    "toolkit_UNET-v2-Depth": Row("checkpoint", "sd2", "original", "sd2_depth"),
    "toolkit_UNET-v2-Inpainting": Row("checkpoint", "sd2", "original", "sd2_inpaint"),
    "toolkit_UNET-v2-SD": Row("checkpoint", "sd2", "original", "sd2"),
    "toolkit_VAE-v1-SD": Row("vae", "sd_vae", "original", "sd_vae"),
    "transformers_clip_bigG": Row("text_encoder", "clip_bigg", "transformers", "clip_bigg"),
    "transformers_clip_h_sd2": Row("text_encoder", "clip_h", "flat", "clip_h"),
    "transformers_clip_l": Row("text_encoder", "clip_l", "flat", "clip_l"),
    "transformers_t5_xxl_enc": Row("text_encoder", "t5_xxl", "transformers", "t5_xxl"),
    "transformers_umt5_xxl_enc": Row("text_encoder", "umt5_xxl", "transformers", "umt5_xxl"),
}


class Held(NamedTuple):
    """A component of a file of several: how many tensors, and which network they are."""

    tensors: int
    network: str | None = None
    spelling: str | None = None
    variant: str | None = None


COMPONENTS: dict[str, dict[str, Held]] = {
    "sdmecha_flux-flux": {
        "transformer": Held(780, "flux_transformer", "original", "flux_dev"),
        "text_encoder": Held(196, "clip", "transformers", "clip_l"),
        "text_encoder_2": Held(219, "t5", "transformers", "t5_xxl"),
        "vae": Held(244, "autoencoder_kl", "original", "flux_vae"),
    },
    "sdmecha_sd1-kohya": {
        "text_encoder": Held(196, "clip", "transformers", "clip_l"),
        "unet": Held(686, "sd15_unet", "diffusers", "sd15"),
        "vae": Held(248, "autoencoder_kl", "diffusers", "sd_vae"),
    },
    "sdmecha_sd1-ldm": {
        "schedule": Held(12),
        "text_encoder": Held(197, "clip", "transformers", "clip_l"),
        "vae": Held(248, "autoencoder_kl", "original", "sd_vae"),
        "unet": Held(686, "sd15_unet", "original", "sd15"),
        "ema": Held(688, "sd15_unet", "original", "sd15"),
    },
    "sdmecha_sd3-comfyui": {
        # SD3's VAE has Flux's names and shapes.
        "vae": Held(244, "autoencoder_kl", "original", "flux_vae"),
        "transformer": Held(491, "sd3_transformer", "original", "sd3_medium"),
        "schedule": Held(1),
        "text_encoder": Held(198, "clip", "transformers", "clip_l"),
        "text_encoder_2": Held(518, "clip", "transformers", "clip_bigg"),
        "text_encoder_3": Held(220, "t5", "transformers", "t5_xxl"),
    },
    "sdmecha_sdxl-kohya": {
        "vae": Held(248, "autoencoder_kl", "original", "sd_vae"),
        "text_encoder": Held(197, "clip", "transformers", "clip_l"),
        "text_encoder_2": Held(517, "clip", "transformers", "clip_bigg"),
        "unet": Held(1680, "sdxl_unet", "original", "sdxl"),
    },
    "sdmecha_sdxl-sgm": {
        "schedule": Held(12),
        "marker": Held(4),
        "text_encoder": Held(197, "clip", "transformers", "clip_l"),
        "text_encoder_2": Held(390, "clip", "openclip", "clip_bigg"),
        "vae": Held(248, "autoencoder_kl", "original", "sd_vae"),
        "unet": Held(1680, "sdxl_unet", "original", "sdxl"),
    },
}


class Lora(NamedTuple):
    """What an adapter file is: its architecture, or those that it may be; families and targets count modules."""

    architecture: str | tuple[str, ...] | None
    spelling: str | None
    dialect: str
    families: dict[str, int]
    modules: int
    targets: dict[str, int]


LORAS: dict[str, Lora] = {
    "invoke_anima_lora_kohya_format": Lora(None, None, "kohya", {"lora": 11}, 11, {}),
    "invoke_anima_lora_kohya_with_te_format": Lora(None, None, "kohya", {"lora": 9}, 9, {}),
    "invoke_anima_lora_lokr_format": Lora(None, None, "comfy", {"lokr+dora": 2, "lokr": 1}, 3, {}),
    "invoke_anima_lora_peft_format": Lora(None, None, "comfy", {"lora": 6}, 6, {}),
    "invoke_flux_control_lora_format": Lora(
        "flux", "original", "bare", {"lora": 314, "set": 152}, 466, {"transformer": 466}
    ),
    # Blocks 0 alone, whose six names all four have; and the shapes, which were made up for a test, are nobody's.
    "invoke_flux_lokr_bfl_format": Lora(
        ("chroma", "flux", "flux2", "hunyuan_video"), None, "comfy", {"lokr": 6}, 6, {}
    ),
    # No module of it is a modulation, which Flux has and Chroma has not; all others are named and sized alike, and
    # both have 19 and 38 blocks.
    "invoke_flux_lora_diffusers_base_model_format": Lora(("chroma", "flux"), None, "peft", {"lora": 381}, 381, {}),
    "invoke_flux_lora_diffusers_format": Lora(
        "flux", "diffusers", "diffusers", {"lora": 494}, 494, {"transformer": 494}
    ),
    "invoke_flux_lora_diffusers_no_proj_mlp_format": Lora(
        ("chroma", "flux"),
        None,
        "diffusers",
        {"lora": 342},
        342,
        {},  # as above
    ),
    "invoke_flux_lora_kohya_format": Lora("flux", "original", "kohya", {"lora": 304}, 304, {"transformer": 304}),
    # Chroma and HunyuanVideo have these modules too; XLabs trained neither.
    "invoke_flux_lora_xlabs_format": Lora("flux", "original", "xlabs", {"lora": 12}, 12, {"transformer": 12}),
    "invoke_krea2_lora_kohya_format": Lora(None, None, "kohya", {"lora": 40}, 40, {}),
    # to_q and to_k of blocks 0 and 1, 3072 wide: five models of this width have them.
    "invoke_qwen_image_lora_diffusers_format": Lora(
        ("chroma", "flux", "flux2", "hunyuan_video", "qwen_image"), None, "bare, kohya endings", {"lora": 3}, 3, {}
    ),
    "invoke_qwen_image_lora_kohya_format": Lora("qwen_image", "diffusers", "kohya", {"lokr": 8}, 8, {"transformer": 8}),
    "toolkit_LoRA-v1-CLIP": Lora("sd15", "transformers", "kohya", {"lora": 72}, 72, {"text_encoder": 72}),
    "toolkit_LoRA-v1-UNET": Lora("sd15", "diffusers", "kohya", {"lora": 192}, 192, {"unet": 192}),
    "toolkit_LoRA-v1A-CLIP": Lora("sd15", "transformers", "kohya", {"lora": 72}, 72, {"text_encoder": 72}),
    "toolkit_LoRA-v1A-UNET": Lora("sd15", "diffusers", "kohya", {"lora": 192}, 192, {"unet": 192}),
}

OURS = [name for name, row in LISTS.items() if row.architecture]
MODELS = [name for name, row in LISTS.items() if row.kind == "checkpoint" and name not in COMPONENTS]

pytestmark = needs_lists


@functools.cache
def listed(name: str) -> Shapes:
    return shapes_of(name)


def header(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {key: TensorInfo(TensorSpec("F16", tuple(shape)), 0, 0, 0) for key, shape in shapes.items()}


def identity(shapes: Mapping[str, tuple[int, ...]]) -> Identity:
    return identify(header(shapes))


@functools.cache
def identified(name: str) -> Identity:
    return identity(listed(name))


def adapters(shapes: Mapping[str, tuple[int, ...]]) -> AdapterFile:
    return read_adapters(Checkpoint("made up", "safetensors", [], header(shapes)))


# ------------------------------------------------------------------------------------------------ the field's lists


def test_the_tables_have_a_row_for_every_list() -> None:
    there = sorted(p.name.removesuffix(".json.gz") for p in KEYS.glob("*.json.gz"))
    assert sorted([*LISTS, *LORAS]) == there


@pytest.mark.parametrize("name", LISTS)
def test_every_list_is_named_rightly_or_not_at_all(name: str) -> None:
    found = identified(name)
    assert Row(found.kind, found.architecture, found.spelling, found.variant) == LISTS[name]
    assert found.possible == ()


@pytest.mark.parametrize("name", OURS)
def test_no_key_of_a_model_of_ours_is_unclaimed(name: str) -> None:
    found = identified(name)
    assert found.strangers == ()
    for part in found.parts.values():
        assert part.match is not None
        assert part.match.strangers == ()
        table = part.match.table
        for body in part.bodies.values():
            squashed = body.removeprefix("diffusion_model")
            known = table.claim(body) or table.is_extra(body) or table.squashed(squashed)
            assert known or squashed in ("decay", "num_updates"), body


@pytest.mark.parametrize("name", LISTS)
def test_every_key_has_one_component(name: str) -> None:
    found = identified(name)
    assert found.components.keys() == listed(name).keys()
    alone = {
        "unknown": "other",
        "checkpoint": "unet"
        if (LISTS[name].architecture or "") in ("sd15", "sd2", "sdxl", "sdxl_refiner")
        else "transformer",
    }.get(LISTS[name].kind, LISTS[name].kind)
    alone = "ema" if LISTS[name].spelling == "ema" else alone
    expected = COMPONENTS.get(name, {alone: Held(len(listed(name)))})
    assert Counter(found.components.values()) == {c: held.tensors for c, held in expected.items()}


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_component_of_a_whole_checkpoint_is_known(name: str) -> None:
    found = identified(name)
    counted = Counter(found.components.values())
    for component, held in COMPONENTS[name].items():
        match = found.parts[component].match if component in found.parts else None
        network = match and match.network.name
        assert Held(counted[component], network, match and match.spelling, match and match.variant) == held


@pytest.mark.parametrize("name", LORAS)
def test_every_adapter_list_is_named_rightly_or_not_at_all(name: str) -> None:
    assert identified(name).kind == "lora"
    found = adapters(listed(name))
    assert (
        Lora(
            found.possible or found.architecture,
            found.spelling,
            found.dialect or "",
            dict(Counter(a.label for a in found.adapters)),
            len({a.name for a in found.adapters}),
            dict(Counter(a.component for a in found.adapters if a.component)),
        )
        == LORAS[name]
    )
    assert (found.left, found.embeddings, found.indexed, found.problems) == ([], [], [], [])
    assert all((a.target is None) == (found.architecture is None) for a in found.adapters)


def test_no_list_is_taken_for_quantised() -> None:
    assert [name for name in [*LISTS, *LORAS] if quantised(listed(name))] == []


# ------------------------------------------------------------------------------------------------ lists never seen


def tiny(shapes: Shapes) -> Shapes:
    """The same model, a sixteenth as wide; kernels stay."""
    return {key: tuple(max(1, d // 16) if d > 16 else d for d in shape) for key, shape in shapes.items()}


def first_blocks(shapes: Shapes) -> Shapes:
    """What has no number above 1 in its name: the first two of everything that is numbered."""
    words = {key: key.replace("_", ".").split(".") for key in shapes}
    return {key: shapes[key] for key in shapes if not any(w.isdecimal() and int(w) > 1 for w in words[key])}


def networks(found: Identity) -> dict[str, tuple[str, str] | None]:
    return {n: p.match and (p.match.network.name, p.match.spelling) for n, p in found.parts.items()}


@pytest.mark.parametrize("name", LISTS)
def test_a_tiny_model_is_known_by_its_names(name: str) -> None:
    found, whole = identity(tiny(listed(name))), identified(name)
    assert (found.kind, found.spelling) == (whole.kind, whole.spelling)
    assert found.variant is None
    if whole.kind == "checkpoint":
        assert found.architecture == whole.architecture
    assert networks(found) == networks(whole)


@pytest.mark.parametrize("name", LISTS)
def test_a_piece_of_a_list_is_never_taken_for_something_else(name: str) -> None:
    shapes = listed(name)
    keys = list(shapes)
    for piece in (
        {key: shapes[key] for number, key in enumerate(keys) if number % 3},
        {key: shapes[key] for key in keys[::3]},
        first_blocks(shapes),
    ):
        check_piece(name, identity(piece))


def check_piece(name: str, found: Identity) -> None:
    """The right answer, or none: then the right one is among those that it may be."""
    row = LISTS[name]
    assert found.kind in (row.kind, "unknown")
    assert found.spelling in (row.spelling, None)
    assert found.variant in (row.variant, None)
    match = next(iter(identified(name).parts.values())).match
    network = match.network.name if match is not None and row.kind != "checkpoint" else None
    if found.architecture is not None:
        assert found.architecture in (row.architecture, network)
    elif row.architecture is not None:
        assert {row.architecture, network} & set(found.possible)


@pytest.mark.parametrize("name", [name for name in LISTS if LISTS[name].architecture is None])
def test_a_shard_of_blocks_of_a_model_that_is_not_ours_is_nobodys(name: str) -> None:
    """As they lie in a sharded checkpoint, whose first and last tensors are in other files."""
    shapes = listed(name)
    keys = [key for key in shapes if any(word.isdecimal() for word in key.split("."))]
    for start in range(0, len(keys), 40):
        found = identity({key: shapes[key] for key in keys[start : start + 80]})
        # Half of a ControlNet is half of the UNet that it was copied from.
        assert found.architecture in (None, *(["sd15"] if "ControlNet" in name else []))


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer.", "unet."])
def test_a_diffusion_model_is_the_same_under_every_prefix(prefix: str) -> None:
    for name in MODELS:
        if LISTS[name].spelling != "ema":
            found = identity({prefix + key: shape for key, shape in listed(name).items()})
            assert Row(found.kind, found.architecture, found.spelling, found.variant) == LISTS[name], name


@pytest.mark.parametrize("name", COMPONENTS)
def test_one_component_of_a_checkpoint_is_known_alone(name: str) -> None:
    whole = identified(name)
    for component, held in COMPONENTS[name].items():
        if held.network is None:
            continue
        alone = {key: listed(name)[key] for key, c in whole.components.items() if c == component}
        bare = {whole.parts[component].bodies[key]: shape for key, shape in alone.items()}
        for shapes in (alone, bare):
            found = identity(shapes)
            if component in ("unet", "transformer", "ema"):
                assert (found.kind, found.architecture) == ("checkpoint", LISTS[name].architecture), component
                assert found.spelling == ("ema" if component == "ema" else held.spelling)
            else:
                kind = "vae" if component == "vae" else "text_encoder"
                assert (found.kind, found.architecture, found.spelling) == (kind, held.variant, held.spelling), (
                    component
                )
            assert found.variant == held.variant
            assert found.strangers == ()


FOREIGN: Shapes = {"foreign.a.weight": (3,), "foreign.b": (2, 2), "blocks.0.foreign": ()}


@pytest.mark.parametrize("name", LISTS)
def test_foreign_keys_are_never_claimed_in_silence(name: str) -> None:
    prefix = next((p for p in ("model.diffusion_model.", "unet.") if any(k.startswith(p) for k in listed(name))), "")
    for count in (1, 3):
        foreign = {prefix + key: FOREIGN[key] for key in list(FOREIGN)[:count]}
        found = identity({**listed(name), **foreign})
        assert found.components.keys() > foreign.keys()
        if found.architecture is not None:
            assert set(found.strangers) == foreign.keys()
        for key in foreign:
            part = found.parts.get(found.components[key])
            assert part is None or part.match is None or key in found.strangers


# ------------------------------------------------------------------------------------------------ adapters never seen


@pytest.mark.parametrize("name", LORAS)
def test_a_piece_of_an_adapter_is_never_taken_for_another(name: str) -> None:
    shapes, row = listed(name), LORAS[name]
    keys = list(shapes)
    right = row.architecture if isinstance(row.architecture, tuple) else (row.architecture,)
    for piece in (
        {key: shapes[key] for number, key in enumerate(keys) if number % 3},
        {key: shapes[key] for number, key in enumerate(keys) if number // 6 % 2},
        first_blocks(shapes),
    ):
        found = adapters(piece)
        assert found.architecture in (*right, None)
        if found.possible and row.architecture is not None:
            assert set(right) & set(found.possible)


@pytest.mark.parametrize("name", LORAS)
def test_foreign_keys_of_an_adapter_are_left_over_by_name(name: str) -> None:
    found = adapters({**listed(name), **FOREIGN})
    assert sorted(found.left) == sorted(FOREIGN)


def models() -> Iterator[tuple[str, str]]:
    """Architecture and list, of every size of every diffusion model in canonical names."""
    for name in MODELS:
        row = LISTS[name]
        assert row.architecture is not None
        network = NETWORKS.get(ARCHITECTURES.get(row.architecture).components[0].network)
        if row.spelling == network.canonical:
            yield row.architecture, name


def test_every_architecture_has_a_list_of_canonical_names() -> None:
    assert {architecture for architecture, _ in models()} == {name for name, _ in ARCHITECTURES}


def dialects(component: Component) -> dict[str, tuple[str, str, bool]]:
    """Dialect -> what a key begins with, the spelling of its name, whether dots become underscores."""
    canonical = NETWORKS.get(component.network).canonical
    return {
        "kohya": (f"{component.kohya}_", component.kohya_spelling or canonical, True),
        "onetrainer": ("lora_transformer_", canonical, True),
        "comfy": ("diffusion_model.", component.comfy_spelling or component.spelling, False),
        "diffusers": (f"{component.name}.", canonical, False),
        "peft": ("base_model.model.", canonical, False),
    }


def made(component: Component, dialect: str, weights: Shapes) -> tuple[Shapes, dict[str, tuple[str, ...]]]:
    """A LoRA of rank 4 for these canonical modules: its keys with shapes, and module -> what it changes."""
    prefix, spelling, flat = dialects(component)[dialect]
    table = NETWORKS.get(component.network).tables()[spelling]
    down, up = (".lora_down.weight", ".lora_up.weight") if flat else (".lora_A.weight", ".lora_B.weight")
    shapes: Shapes = {}
    meant = {}
    for name, shape in weights.items():
        spelled = table.spelled_module(name)
        assert spelled is not None, f"{name} has no name in {spelling}"
        _, key, names = spelled
        if not all(n in weights for n in names):
            continue
        module = prefix + (key.replace(".", "_") if flat else key)
        shapes[module + down] = (4, *shape[1:])
        shapes[module + up] = (sum(weights[n][0] for n in names), 4, *(1 for _ in shape[2:]))
        meant[module] = names
    return shapes, meant


def matrices(name: str) -> Shapes:
    """The modules of a list that a LoRA may change."""
    return {k.removesuffix(".weight"): s for k, s in listed(name).items() if k.endswith(".weight") and len(s) > 1}


def check_made(architecture: str, shapes: Shapes, meant: Mapping[str, Sequence[str]]) -> bool:
    """Is it resolved, and every target right? If it is not, the right architecture is among those it may be for."""
    found = adapters(shapes)
    assert (found.left, found.problems) == ([], [])
    if found.architecture is None:
        assert architecture in found.possible
        return False
    assert found.architecture == architecture
    assert {a.name: a.target and a.target.names for a in found.adapters} == meant
    return True


@pytest.mark.parametrize("dialect", ["kohya", "onetrainer", "comfy", "diffusers", "peft"])
def test_a_made_up_lora_for_all_modules_is_resolved(dialect: str) -> None:
    for architecture, name in models():
        component = ARCHITECTURES.get(architecture).components[0]
        shapes, meant = made(component, dialect, matrices(name))
        assert check_made(architecture, shapes, meant), name


@pytest.mark.parametrize("dialect", ["kohya", "onetrainer", "comfy", "diffusers", "peft"])
def test_a_made_up_lora_for_some_modules_is_resolved_or_may_be_the_right_one(dialect: str) -> None:
    unsure = set()
    for architecture, name in models():
        component = ARCHITECTURES.get(architecture).components[0]
        weights = matrices(name)
        attention = {k: s for k, s in weights.items() if "attn" in k or "attention" in k}
        if not check_made(architecture, *made(component, dialect, attention)):
            unsure.add((architecture, "attention"))
        blocks = {k: s for k, s in first_blocks(weights).items() if any(w.isdecimal() for w in k.split("."))}
        if not check_made(architecture, *made(component, dialect, blocks)):
            unsure.add((architecture, "two blocks"))
    # Flux and Chroma have the same attention, in as many blocks; Flux and HunyuanVideo have the same first two blocks.
    assert unsure == {("chroma", "attention"), ("flux", "attention"), ("flux", "two blocks")}


@pytest.mark.parametrize("seed", range(3))
def test_a_made_up_lora_for_a_few_modules_is_resolved_or_may_be_the_right_one(seed: int) -> None:
    draw = random.Random(seed)
    for architecture, name in models():
        component = ARCHITECTURES.get(architecture).components[0]
        weights = matrices(name)
        for count in (1, 2, 4, 12):
            chosen = draw.sample(sorted(weights), count)
            for dialect in dialects(component):
                shapes, meant = made(component, dialect, {k: s for k, s in weights.items() if k in chosen})
                if shapes:
                    check_made(architecture, shapes, meant)


TEXT_ENCODERS = {
    "clip_l": "transformers_clip_l",
    "clip_h": "transformers_clip_h_sd2",
    "clip_bigg": "transformers_clip_bigG",
    "t5_xxl": "transformers_t5_xxl_enc",
    "umt5_xxl": "transformers_umt5_xxl_enc",
}


def linear(name: str) -> Shapes:
    """The matrices of a text encoder's blocks, in canonical names."""
    match = identified(name).parts["text_encoder"].match
    assert match is not None
    claims = ((match.table.claim(key), shape) for key, shape in listed(name).items())
    names = {claim.names[0]: shape for claim, shape in claims if claim is not None and len(shape) == 2}
    return {n.removesuffix(".weight"): s for n, s in names.items() if any(w.isdecimal() for w in n.split("."))}


def test_a_made_up_lora_for_text_encoders_too_names_each_of_them() -> None:
    seen = set()
    for architecture, name in models():
        parts = [c for c in ARCHITECTURES.get(architecture).components if c.kohya and c.name.startswith("text_encoder")]
        shapes, meant = made(ARCHITECTURES.get(architecture).components[0], "kohya", matrices(name))
        homes = dict.fromkeys(meant, ARCHITECTURES.get(architecture).components[0].name)
        for component in parts:
            more, names = made(component, "kohya", linear(TEXT_ENCODERS[component.variant or ""]))
            found = adapters(more)  # alone, it may be any architecture's with such a text encoder
            assert architecture in (found.architecture, *found.possible), (name, component.name)
            shapes, meant, homes = {**shapes, **more}, {**meant, **names}, homes | dict.fromkeys(names, component.name)
            seen.add((architecture, component.name))
        assert check_made(architecture, shapes, meant), name
        assert {a.name: a.component for a in adapters(shapes).adapters} == homes
    assert {"sd15", "sd2", "sdxl", "sd3", "flux"} <= {architecture for architecture, _ in seen}
