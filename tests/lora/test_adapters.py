"""Keys of adapter files, grouped and resolved: what is whole is understood, what is odd is named, nothing crashes."""

from __future__ import annotations

import contextlib
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from conftest import save_raw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loras import SHARED, Maker, convert, header, named, save

sys.path.insert(0, str(Path(__file__).parents[1] / "naming"))
from tagged import needs_lists, shapes_of

from weightops.errors import FormatError, MismatchError, WeightopsError
from weightops.files.checkpoint import open_checkpoint
from weightops.files.tensor import TensorInfo, TensorSpec
from weightops.lora.adapters import AdapterFile, group, read_adapters
from weightops.lora.dialects import DIALECTS
from weightops.lora.family import FAMILIES
from weightops.lora.targets import Look, resolve

if TYPE_CHECKING:
    from torch import Tensor

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_{}"
FLUX = "lora_unet_double_blocks_0_img_attn_proj"
_A, _B = ".lora_down.weight", ".lora_up.weight"


def refused(tensors: dict[str, Tensor], folder: Path, kind: type[WeightopsError] = FormatError, **how: str) -> str:
    """Why the file is not converted, less its name; and the hint."""
    source = save(folder / "a.safetensors", tensors)
    with pytest.raises(kind) as caught:
        convert(source, "diffusers", folder / "out.safetensors", **how)
    assert str(caught.value).startswith(f"{source}: ")
    assert not (folder / "out.safetensors").exists()
    return str(caught.value).removeprefix(f"{source}: ") + (f" | {caught.value.hint}" if caught.value.hint else "")


CUT = " | it may be cut short or mangled"


def test_up_without_down_is_refused_by_name(tmp_path: Path) -> None:
    assert (
        refused({UNET.format("q") + _B: torch.ones(8, 2)}, tmp_path)
        == f"{UNET.format('q')!r} has 'up', but no down{CUT}"
    )


def test_factors_that_do_not_meet_are_refused_with_their_shapes(tmp_path: Path) -> None:
    tensors = {UNET.format("q") + _B: torch.ones(8, 2), UNET.format("q") + _A: torch.ones(3, 8)}
    assert refused(tensors, tmp_path) == (
        f"{UNET.format('q')!r} has factors that do not meet: up [8, 2], down [3, 8]{CUT}"
    )


def test_two_families_for_one_module_are_refused(tmp_path: Path) -> None:
    maker = Maker()
    loha = {".hada_w1_a": maker(8, 2), ".hada_w1_b": maker(2, 8), ".hada_w2_a": maker(8, 2), ".hada_w2_b": maker(2, 8)}
    tensors = named({UNET.format("q"): maker.lora(8, 8, 2) | loha})
    assert refused(tensors, tmp_path) == f"{UNET.format('q')!r} is of 2 families at once: loha, lora{CUT}"


def test_two_keys_for_one_part_are_refused(tmp_path: Path) -> None:
    stem = f"unet.{UNET.format('q')}"
    tensors = {f"{stem}.lora_A.weight": torch.ones(2, 8), f"{stem}.lora_down.weight": torch.ones(2, 8)}
    assert refused(tensors, tmp_path) == (
        f"'{stem}.lora_down.weight' says the same as '{stem}.lora_A.weight' (and 1 more){CUT}"
    )


def test_two_names_of_one_module_are_refused(tmp_path: Path) -> None:
    maker = Maker()
    other = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    tensors = named({UNET.format("q"): maker.lora(8, 8, 2), other: maker.lora(8, 8, 2)})
    names = sorted((UNET.format("q"), other))
    assert refused(tensors, tmp_path, MismatchError, architecture="sd15") == (
        f"{names[0]!r} and {names[1]!r} both change down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    )


def test_a_pack_and_one_of_its_parts_are_refused(tmp_path: Path) -> None:
    maker = Maker()
    pack, part = "lora_unet_double_blocks_0_img_attn_qkv", "transformer.transformer_blocks.0.attn.to_k"
    tensors = named({pack: maker.lora(24, 8, 2), part: maker.lora(8, 8, 2)})
    assert refused(tensors, tmp_path, MismatchError, architecture="flux") == (
        f"{pack!r} and {part!r} both change transformer_blocks.0.attn.to_k"
    )


def test_rank_zero_is_refused(tmp_path: Path) -> None:
    tensors = {UNET.format("q") + _B: torch.ones(8, 0), UNET.format("q") + _A: torch.ones(0, 8)}
    assert refused(tensors, tmp_path) == f"{UNET.format('q')!r} has rank 0{CUT}"


def test_an_alpha_of_several_numbers_is_refused(tmp_path: Path) -> None:
    tensors = named({UNET.format("q"): Maker().lora(8, 8, 2) | {".alpha": torch.ones(2)}})
    assert refused(tensors, tmp_path) == f"{UNET.format('q')!r} has an alpha of shape [2], expected one number{CUT}"


def test_an_alpha_alone_is_refused(tmp_path: Path) -> None:
    tensors = named({UNET.format("q"): Maker().lora(8, 8, 2)}) | {UNET.format("k") + ".alpha": torch.ones(())}
    assert refused(tensors, tmp_path) == f"{UNET.format('k')!r} has alpha, and nothing that it belongs to{CUT}"


def test_mangled_names_are_refused_with_the_nearest_scheme(tmp_path: Path) -> None:
    """As naive conversions leave them: even the dot before the ending is an underscore."""
    keys = [f"lora_unet_unet_down_blocks_0_attn1_to_q_lora_{part}.weight" for part in ("down", "up")]
    tensors = {key: torch.ones(4, 4) for key in keys}
    assert refused(tensors, tmp_path) == (
        f"keys of no known scheme: {keys[0]!r}, {keys[1]!r} | kohya's names are nearest: "
        "lora_unet_<module>.lora_down.weight, .lora_up.weight and .alpha"
    )


def test_names_of_no_architecture_are_refused(tmp_path: Path) -> None:
    tensors = named({"lora_unet_nowhere_to_be_found": Maker().lora(8, 8, 2)})
    assert refused(tensors, tmp_path, MismatchError) == (
        "no known architecture has modules of these names: 'lora_unet_nowhere_to_be_found'"
    )


def test_one_unknown_module_among_many_is_named(tmp_path: Path) -> None:
    modules = {
        f"lora_unet_down_blocks_0_attentions_{a}_transformer_blocks_0_{b}_to_{c}": Maker().lora(320, 320, 2)
        for a in (0, 1) for b in ("attn1",) for c in ("q", "k", "v", "out_0")
    }  # fmt: skip
    modules |= {f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_{c}": Maker().lora(1280, 1280, 2)
                for c in ("q", "k", "v", "out_0")}  # fmt: skip
    modules["lora_unet_down_blocks_0_attentions_0_to_w"] = Maker().lora(8, 8, 2)
    assert refused(named(modules), tmp_path, MismatchError, architecture="sd15") == (
        "sd15 has no modules of these names: 'lora_unet_down_blocks_0_attentions_0_to_w'"
    )


def test_names_of_several_architectures_ask_which(tmp_path: Path) -> None:
    tensors = named({"lora_unet_double_blocks_0_img_mlp_0": Maker().lora(8, 8, 2)})
    message = refused(tensors, tmp_path, MismatchError)
    assert message == (
        "cannot tell which model it is for: chroma, flux, flux2, hunyuan_video have modules of these names and sizes | "
        "--architecture chroma says which"
    )
    for architecture, name in (("flux", "ff.net.0.proj"), ("flux2", "ff.linear_in")):
        out = tmp_path / f"{architecture}.safetensors"
        convert(tmp_path / "a.safetensors", "diffusers", out, architecture=architecture)
        assert f"transformer.transformer_blocks.0.{name}.lora_A.weight" in header(out)[0]


def test_what_the_metadata_says_decides_between_them_and_never_against_names(tmp_path: Path) -> None:
    for hint, expected in (("flux1", "flux"), ("chroma", "chroma"), ("sd_v1", None), ("", None)):
        source = save(tmp_path / "a.safetensors", named({FLUX: Maker().lora(8, 8, 2)}), {"ss_base_model_version": hint})
        with open_checkpoint(source) as opened:
            assert read_adapters(opened).architecture == expected


def test_what_several_architectures_would_write_alike_needs_no_choice(tmp_path: Path) -> None:
    """Of a size that is neither Stable Diffusion 1's nor 2's: their names are one in diffusers' spelling."""
    source = save(tmp_path / "a.safetensors", named({UNET.format("q"): Maker().lora(8, 8, 2)}))
    report = convert(source, "diffusers", tmp_path / "out.safetensors")
    assert report.warnings == ["sd15 and sd2 have modules of these names and sizes, and are written alike"]


@needs_lists
@pytest.mark.parametrize(
    "name",
    [
        "toolkit_LoRA-v1A-UNET", "toolkit_LoRA-v1A-CLIP", "invoke_flux_lora_kohya_format",
        "invoke_flux_lora_diffusers_format", "invoke_flux_control_lora_format",
        "invoke_qwen_image_lora_diffusers_format",
    ],
)  # fmt: skip
def test_half_of_a_file_is_refused(name: str) -> None:
    """Cut anywhere between two factors; the odd part is named."""
    shapes = shapes_of(name)
    keys = [k for k in shapes if k.endswith((".lora_down.weight", ".lora_A.weight"))]
    found = group("a", infos({k: s for k, s in shapes.items() if k != keys[len(keys) // 2]}))
    stem = keys[len(keys) // 2].rpartition(".lora_")[0]
    with pytest.raises(FormatError, match="but no down") as caught:
        found.check()
    assert repr(stem) in str(caught.value)


# ------------------------------------------------------------------------------------------------ any keys at all


def infos(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    """Tensors of these shapes that no file holds; a rank that a list does not tell is 4."""
    specs = {k: TensorSpec("F32", tuple(4 if n < 0 else n for n in shape)) for k, shape in shapes.items()}
    return {key: TensorInfo(spec, 0, 0, spec.nbytes) for key, spec in specs.items()}


def lists() -> list[str]:
    names = sorted(p.name.removesuffix(".json.gz") for p in (SHARED / "keys").glob("*ora*.json.gz"))
    return [n for n in names if "lokr" in n or "LoRA" in n or "lora" in n]


@functools.cache
def pool() -> dict[str, tuple[int, ...]]:
    """A few keys of every list of a real adapter, and of every ending that we know."""
    found: dict[str, tuple[int, ...]] = {}
    for name in lists():
        shapes = shapes_of(name)
        found |= dict(list(shapes.items())[:24])
    return found


def resolved(shapes: dict[str, tuple[int, ...]]) -> AdapterFile:
    """As `read_adapters` does, of a header that no file has."""
    found = group("a", infos(shapes))
    looks = [Look(a.beginning, a.body, a.family.shape(a.shapes) if a.family.form(a.keys) else None, a.family.flat)
             for a in found.adapters]  # fmt: skip
    result = resolve(looks, found.left)
    assert len(result.targets) == len(found.adapters)
    return found


@needs_lists
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(data=st.data())
def test_any_keys_of_real_adapters_are_read_without_a_crash(data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.sampled_from(sorted(pool())), min_size=1, max_size=12, unique=True))
    resolved({key: pool()[key] for key in keys})


NAMES = (
    UNET.format("q"), "lora_unet_input_blocks_1_1_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "lora_unet_double_blocks_0_img_attn_qkv",
    "lora_unet_single_blocks_0_linear1", "lora_unet_final_layer_adaLN_modulation_1", "single_blocks.0.linear1",
    "transformer.single_transformer_blocks.0.attn.to_q", "transformer.single_transformer_blocks.0.proj_mlp",
    "transformer.norm_out.linear", "diffusion_model.layers.0.attention.qkv", "double_blocks.0", "single_blocks.0",
    "transformer.single_transformer_blocks.0.attn.to_k", "base_model.model.transformer_blocks.0.attn.to_q",
    "text_encoder.text_model.encoder.layers.0", "x", "",
)  # fmt: skip
DTYPES_ = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "F8_E4M3": 1, "I64": 8, "BOOL": 1, "U8": 1}
shapes_ = st.lists(st.sampled_from((0, 1, 2, 3, 4, 8, 24)), max_size=4).map(tuple)


def fitting(part: str, out: int, rank: int) -> tuple[int, ...]:
    """A shape with which the parts of a module of 8 inputs fit together."""
    shapes = {
        "up": (out, rank), "down": (rank, 8), "mid": (rank, rank, 1, 1), "bias": (out,), "diff": (out, 8),
        "diff_b": (out,), "hada_w1_a": (out, rank), "hada_w2_a": (out, rank), "hada_w1_b": (rank, 8),
        "hada_w2_b": (rank, 8), "lokr_w1": (out // 4, 2), "lokr_w1_a": (out // 4, rank), "lokr_w1_b": (rank, 2),
        "lokr_w2": (4, 4), "lokr_w2_a": (4, rank), "lokr_w2_b": (rank, 4), "dora_scale": (out, 1), "w_norm": (out,),
        "b_norm": (out,), "set_weight": (out, 8), "set_bias": (out,),
    }  # fmt: skip
    return shapes.get(part, ())


@st.composite
def odd_files(draw: st.DrawFn) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Tensors under names of modules and parts that are known, of any shapes, or of such as fit together."""
    found = {}
    sane = draw(st.booleans())
    for _ in range(draw(st.integers(1, 4))):
        out, rank = draw(st.sampled_from((8, 24, 32, 56))), draw(st.integers(1, 3))
        same_dtype = draw(st.sampled_from(list(DTYPES_)))
        name = draw(st.sampled_from(NAMES))
        family = draw(st.sampled_from([family for _, family in FAMILIES]))
        parts = [
            *draw(st.sampled_from(family.forms)),
            *draw(st.lists(st.sampled_from(("alpha", "dora_scale", "bias", "diff_b")))),
        ]
        endings = draw(st.sampled_from(list(DIALECTS.values()))).endings
        for part in parts:
            dtype = same_dtype if sane else draw(st.sampled_from(list(DTYPES_)))
            shape = fitting(part, out, rank) if sane else draw(shapes_)
            size = DTYPES_[dtype] * torch.Size(shape).numel()
            pattern = draw(st.sampled_from((b"\0", b"?", b"\xff", bytes(40) + b"?" * 24)))
            found[name + endings[part]] = dtype, shape, (pattern * size)[:size]
    return found


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(tensors=odd_files(), to=st.sampled_from(list(DIALECTS)), alpha=st.sampled_from(("carry", "fold")),
       architecture=st.sampled_from((None, "flux", "sd15")))  # fmt: skip
def test_a_file_of_odd_shapes_is_converted_or_refused(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[str, tuple[int, ...], bytes]], to: str,
    alpha: str, architecture: str | None,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("odd")
    source = save_raw(folder / "a.safetensors", tensors)
    out = folder / ("out" if DIALECTS[to].folder else "out.safetensors")
    with contextlib.suppress(WeightopsError):
        convert(source, to, out, alpha=alpha, architecture=architecture)
    assert out.exists() or not list(folder.glob("out*"))
