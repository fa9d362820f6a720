"""Real LoRA files, which nobody here wrote, fused into a checkpoint of Stable Diffusion's full size and names."""

from __future__ import annotations

import functools
import gzip
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from loras import LORAS, needs_loras
from safetensors import safe_open
from safetensors.torch import load_file

from weightops.ops.fuse import fuse

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

LAYOUT = Path(__file__).parents[2] / "weightops" / "cli" / "sd15.json.gz"
UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer."
STRENGTHS = {
    "catundchat_sd15": 0.7,
    "hyper07_peft": -0.25,
    "lycoris_smart_falcon_16_lokr": 1.0,
    "lycoris_smart_falcon_4_lokr": 0.4,
}


def random_checkpoint(path: Path) -> None:
    """2.1 GB in half precision: every row a stretch of one pool of random numbers."""
    layout = json.loads(gzip.decompress(LAYOUT.read_bytes()))
    generator = torch.Generator().manual_seed(0)
    pool = (0.03 * torch.randn(1 << 24, generator=generator)).half().numpy().tobytes()
    head: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    sizes = {}
    for key, (dtype, shape) in layout.items():
        sizes[key] = math.prod(shape) * (8 if dtype == "I64" else 2)
        head[key] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + sizes[key]]}
        position += sizes[key]
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, nbytes in enumerate(sizes.values()):
            start = number * 7919 * 2 % (len(pool) // 2)
            while nbytes:
                part = pool[start : start + nbytes]
                file.write(part)
                nbytes, start = nbytes - len(part), 0


def places() -> dict[str, str]:
    """diffusers' module, with its component -> the checkpoint's key, by diffusers' own converter over names."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    layout = json.loads(gzip.decompress(LAYOUT.read_bytes()))
    config = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None}
    names = convert_ldm_unet_checkpoint({key: key for key in layout}, config)
    found = {f"unet.{name}": key for name, key in names.items() if key is not None}
    found |= {f"text_encoder.{key.removeprefix(TEXT)}": key for key in layout if key.startswith(TEXT)}
    return {name.removesuffix(".weight"): key for name, key in found.items() if name.endswith(".weight")}


def changes(path: Path, modules: Mapping[str, str]) -> dict[str, Callable[[], Tensor]]:
    """Key of the checkpoint -> what makes ΔW in float64, each dialect read as the tool that wrote it does."""
    from lycoris.functional import lokr

    tensors = {key: tensor.double() for key, tensor in load_file(path).items()}
    flat = {("lora_unet_" if n.startswith("unet.") else "lora_te_") + n.partition(".")[2].replace(".", "_"): key
            for n, key in modules.items()}  # fmt: skip
    found = {}
    if "lokr" in path.name:
        for name in {key.partition(".")[0] for key in tensors}:
            p = {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(name + ".")}
            factors = [p.get(f"lokr_{part}") for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")]
            found[flat[name]] = functools.partial(lokr.diff_weight, *factors, gamma=float(p["alpha"]))
        return found
    for key, up in tensors.items():
        if key.endswith("_lora.up.weight"):  # diffusers to 0.24
            module, _, which = key.removesuffix("_lora.up.weight").rpartition(".processor.")
            module = "unet." + module.removeprefix("unet.") + "." + {"to_out": "to_out.0"}.get(which, which)
            found[modules[module]] = functools.partial(torch.matmul, up, tensors[key.replace(".up.", ".down.")])
        elif key.endswith(".lora_B.weight"):
            config = json.loads(path.with_name(path.stem + ".adapter_config.json").read_text())
            module = "unet." + key.removesuffix(".lora_B.weight").removeprefix("base_model.model.")
            scaled = config["lora_alpha"] / config["r"] * up
            found[modules[module]] = functools.partial(torch.matmul, scaled, tensors[key.replace("lora_B", "lora_A")])
    return found


def _as_published(name: str, folder: Path) -> Path:
    """The file, or, where it has a configuration beside it, PEFT's folder of both."""
    config = LORAS / f"{name}.adapter_config.json"
    if not config.exists():
        return LORAS / f"{name}.safetensors"
    (folder / name).mkdir()
    shutil.copy(config, folder / name / "adapter_config.json")
    shutil.copy(LORAS / f"{name}.safetensors", folder / name / "adapter_model.safetensors")
    return folder / name


@needs_loras
def test_real_loras_fuse_into_a_checkpoint_of_full_size(tmp_path: Path) -> None:
    """All at once, of three dialects and two families: every module used, every value the oracle's."""
    pytest.importorskip("lycoris")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = places()
    random_checkpoint(tmp_path / "base.safetensors")
    loras = [f"{_as_published(name, tmp_path)}:{strength}" for name, strength in STRENGTHS.items()]
    report = fuse(tmp_path / "base.safetensors", *loras, output=tmp_path / "out.safetensors")
    assert report.account.unused == []
    wanted: dict[str, list[tuple[float, Callable[[], Tensor]]]] = {}
    for name, strength in STRENGTHS.items():
        with safe_open(LORAS / f"{name}.safetensors", "pt") as opened:
            assert set(opened.keys()) <= set(report.account.used)
        mine = changes(LORAS / f"{name}.safetensors", modules)
        assert len(mine) == (350 if "lokr" in name else 128)
        for key, delta in mine.items():
            wanted.setdefault(key, []).append((strength, delta))
    with safe_open(tmp_path / "base.safetensors", "pt") as base, safe_open(tmp_path / "out.safetensors", "pt") as out:
        for key in base.keys():  # noqa: SIM118 - it is no mapping
            before, after = base.get_tensor(key), out.get_tensor(key)
            if key not in wanted:
                assert torch.equal(before, after), key
                continue
            (strength, delta), *more = wanted[key]
            added = delta().flatten(1).mul_(strength)
            for strength, delta in more:
                added.add_(delta().flatten(1), alpha=strength)
            most, others = max(map(abs, map(float, torch.aminmax(added)))), 0
            # A piece at a time, which stays in a processor's cache: that takes a quarter of the time.
            for old, new, change in zip(*(t.flatten().split(1 << 16) for t in (before, after, added)), strict=True):
                start = old.double()
                exact = start + change
                off = (new.double() - exact).abs()
                # Half a unit in the last place, and what float32 leaves open of sums whose terms may cancel.
                operands = start.abs() + most
                assert bool((off <= exact.abs() * 2**-11 + 2**-25 + operands * 2**-21).all()), key
                others += int((new != exact.half()).sum())
            assert others < 1e-3 * before.numel(), key
    for name in ("base", "out"):  # pytest keeps what tests leave behind
        (tmp_path / f"{name}.safetensors").unlink()
