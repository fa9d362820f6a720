"""diffusers' own converters of LoRA names, on files of real widths, against ours. Where they are wrong is said."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from loras import Maker, convert, modules_of, named, save, tensors_of

sys.path.insert(0, str(Path(__file__).parents[1] / "naming"))
from tagged import needs_lists, shapes_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("diffusers")
    from diffusers.loaders import lora_conversion_utils as theirs

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

pytestmark = needs_lists


class Case(NamedTuple):
    """A converter, the list of its model, and what stands before its names in a file.

    takes: the modules that it has no error for. unscaled: those whose alpha it drops. wrong: what it changes
    otherwise than its own conversion of checkpoints would have it.
    """

    converter: Callable[[Any], Any]
    names: str
    prefix: str
    architecture: str
    flat: bool = True
    peft: bool = False
    alpha: bool = True
    takes: str = ""
    unscaled: str = "^$"
    wrong: tuple[str, ...] = ()
    blocks: int = 2


_BLOCKS = r"(double|single)_blocks"
CASES = {
    "Flux, kohya": Case(
        theirs._convert_kohya_flux_lora_to_diffusers, "orig_flux_dev_bfl", "lora_unet_", "flux", unscaled="final_layer"
    ),
    "Flux, ComfyUI": Case(
        theirs._convert_kohya_flux_lora_to_diffusers, "orig_flux_dev_bfl", "diffusion_model.", "flux", flat=False,
        unscaled="final_layer",
    ),
    "Flux, OneTrainer": Case(  # of a block's other layers it forgets the names
        theirs._convert_kohya_flux_lora_to_diffusers, "diffusers_flux_dev", "lora_transformer_", "flux",
        takes=r"attn|embed|^proj_out|^norm_out",
    ),
    "Flux, fal": Case(
        theirs._convert_fal_kontext_lora_to_diffusers, "orig_flux_dev_bfl", "base_model.model.", "flux", flat=False,
        peft=True, alpha=False, takes=rf"{_BLOCKS}|final_layer.linear", blocks=99,
    ),
    "HunyuanVideo": Case(  # of the final layer it swaps the halves of down as well, and it cuts the refiner's
        theirs._convert_hunyuan_video_lora_to_diffusers, "orig_hunyuan_video_tencent", "diffusion_model.",
        "hunyuan_video", flat=False, peft=True, alpha=False, takes="^(?!txt_in)", wrong=("norm_out.linear",),
    ),
    "Lumina 2": Case(
        theirs._convert_non_diffusers_lumina2_lora_to_diffusers, "orig_comfy_lumina2", "diffusion_model.", "lumina2",
        flat=False, peft=True, alpha=False, takes="refiner|^layers",
    ),
    "Wan": Case(
        theirs._convert_non_diffusers_wan_lora_to_diffusers, "orig_wan21_t2v_1_3b", "diffusion_model.", "wan",
        flat=False, peft=True, unscaled="^(head|text|time)",
    ),
    "Wan, musubi": Case(
        theirs._convert_musubi_wan_lora_to_diffusers, "orig_wan21_t2v_1_3b", "lora_unet_", "wan", takes="^blocks"
    ),
    "Qwen-Image": Case(
        theirs._convert_non_diffusers_qwen_lora_to_diffusers, "diffusers_qwen_image", "lora_unet_", "qwen_image"
    ),
    "Z-Image": Case(
        theirs._convert_non_diffusers_z_image_lora_to_diffusers, "diffusers_z_image", "lora_unet_", "z_image"
    ),
    "Flux.2": Case(  # it does not swap the halves of the final layer
        theirs._convert_non_diffusers_flux2_lora_to_diffusers, "orig_flux2_dev", "diffusion_model.", "flux2",
        flat=False, peft=True, alpha=False, wrong=("norm_out.linear",),
    ),
    "Flux.2, kohya": Case(
        theirs._convert_kohya_flux2_lora_to_diffusers, "orig_flux2_dev", "lora_unet_", "flux2",
        takes=rf"{_BLOCKS}|^(img|txt|time)_in|final_layer.linear",
    ),
}  # fmt: skip


def modules_in(case: Case) -> dict[str, tuple[int, ...]]:
    """The matrices of a list, of its first blocks."""
    found = {}
    for key, shape in shapes_of(case.names).items():
        block = re.search(r"(?:blocks|layers|refiner)\.(\d+)\.", key)
        first = block is None or int(block[1]) < case.blocks
        if key.endswith(".weight") and len(shape) == 2 and first and re.search(case.takes, key):
            found[key.removesuffix(".weight")] = shape
    return found


def probed(up: Tensor, down: Tensor, alpha: float | None) -> Tensor:
    """ΔW times a random vector: whole, the matrices of real width would take gigabytes."""
    vector = torch.randn(down.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return (1.0 if alpha is None else alpha / len(down)) * (up.double() @ (down.double() @ vector))


def in_theirs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Module -> ΔW, probed, of what a converter gives. It forgets some "transformer."."""
    downs = {k.removesuffix(".lora_A.weight"): t for k, t in tensors.items() if k.endswith(".lora_A.weight")}
    found = {name: probed(tensors[f"{name}.lora_B.weight"], t, None) for name, t in downs.items()}
    return {f"transformer.{name.removeprefix('transformer.')}": change for name, change in found.items()}


def in_ours(path: Path) -> dict[str, Tensor]:
    return {name: probed(parts["up"], parts["down"], alpha) for name, (parts, alpha) in modules_of(path).items()}


@pytest.mark.parametrize("name", CASES)
def test_diffusers_converter_finds_the_same_modules_and_changes(name: str, tmp_path: Path) -> None:
    case, maker = CASES[name], Maker(4)
    modules = {}
    for number, (module, (out, features)) in enumerate(modules_in(case).items()):
        alpha = (1.0, 3.0)[number % 2] if case.alpha and not re.search(case.unscaled, module) else None
        parts = maker.lora(out, features, 2, alpha)
        if case.peft:
            parts = {k.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): t for k, t in parts.items()}
        modules[case.prefix + (module.replace(".", "_") if case.flat else module)] = parts
    source = save(tmp_path / "lora.safetensors", named(modules))
    convert(source, "diffusers", tmp_path / "out.safetensors", architecture=case.architecture)
    ours = in_ours(tmp_path / "out.safetensors")
    expected = in_theirs(case.converter(named(modules)))
    assert ours.keys() == expected.keys()
    bad = [n for n, change in expected.items() if (change - ours[n]).abs().max() > 3e-6 * change.abs().max()]
    assert bad == [f"transformer.{n}" for n in case.wrong]


def xlabs(maker: Maker) -> dict[str, Tensor]:
    sizes = {"qkv_lora1": 9216, "qkv_lora2": 9216, "proj_lora1": 3072, "proj_lora2": 3072}
    found = {}
    for block in range(2):
        for name, out in sizes.items():
            stem = f"double_blocks.{block}.processor.{name}"
            found |= {f"{stem}.down.weight": maker(2, 3072), f"{stem}.up.weight": maker(out, 2)}
        stem = f"single_blocks.{block}.processor"
        found |= {f"{stem}.qkv_lora.down.weight": maker(2, 3072), f"{stem}.qkv_lora.up.weight": maker(9216, 2)}
        found |= {f"{stem}.proj_lora.down.weight": maker(2, 15360), f"{stem}.proj_lora.up.weight": maker(3072, 2)}
    return found


def test_xlabs_adapters_are_read_as_diffusers_reads_them(tmp_path: Path) -> None:
    tensors = xlabs(Maker(6))
    source = save(tmp_path / "lora.safetensors", tensors)
    report = convert(source, "diffusers", tmp_path / "out.safetensors", architecture="flux")
    assert ": 24 modules, xlabs → diffusers, no alpha: strength 1" in report.summary
    theirs_ = theirs._convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    found = tensors_of(tmp_path / "out.safetensors")
    assert found.keys() == theirs_.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in theirs_.items())


def test_bfls_control_adapters_are_read_as_diffusers_reads_them(tmp_path: Path) -> None:
    """Factors, biases, and norms that are set: names and values, to the bit."""
    shapes, maker = shapes_of("invoke_flux_control_lora_format"), Maker(7, torch.bfloat16)
    # One rank for all, and a small one: it is 128 in theirs.
    small = {k: tuple(2 if n == 128 and "lora_" in k else n for n in shape) for k, shape in shapes.items()}
    tensors = {key: maker(*shape) for key, shape in small.items()}
    source = save(tmp_path / "lora.safetensors", tensors)
    convert(source, "diffusers", tmp_path / "out.safetensors", architecture="flux")
    theirs_ = theirs._convert_bfl_flux_control_lora_to_diffusers(dict(tensors))
    found = tensors_of(tmp_path / "out.safetensors")
    assert found.keys() == theirs_.keys()
    # It swaps the halves of a down, too, which stand for no outputs.
    bad = [key for key, tensor in theirs_.items() if not torch.equal(found[key], tensor)]
    assert bad == ["transformer.norm_out.linear.lora_A.weight"]
    convert(tmp_path / "out.safetensors", "comfy", tmp_path / "back.safetensors", architecture="flux")
    assert torch.equal(
        tensors_of(tmp_path / "back.safetensors")["diffusion_model.double_blocks.3.img_attn.norm.key_norm.set_weight"],
        tensors["double_blocks.3.img_attn.norm.key_norm.scale"],
    )
