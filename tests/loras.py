"""LoRA files for tests: made, converted in one call, read by other hands than ours, and their ΔW in float64."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from weightops.engine.run import ignore
from weightops.files.checkpoint import open_checkpoint
from weightops.lora.dialects import DIALECTS
from weightops.ops.dialect import plan_dialect
from weightops.ops.produce import produce

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from weightops.ops.report import Report

SHARED = Path(__file__).parents[2] / "shared" / "data"

LORAS = SHARED / "loras"
needs_loras = pytest.mark.skipif(not LORAS.is_dir(), reason="the real adapters (../shared/data/loras) are not here")

Raw = dict[str, tuple[str, tuple[int, ...], bytes]]

torch.set_num_threads(1)


def convert(path: Path, to: str, output: Path, *, check: bool = False, **options: Any) -> Report:
    """Write the adapter file in the dialect `to`."""
    with open_checkpoint(path) as opened:
        return produce(
            "convert", plan_dialect(opened, to=to, **options), output, memory=64 << 20, device="cpu", threads=1,
            force=False, dry_run=False, check=check, on_progress=ignore,
        )  # fmt: skip


def target(folder: Path, to: str) -> Path:
    """What a conversion to this dialect is called."""
    return folder / (to if DIALECTS[to].folder else f"{to}.safetensors")


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # One tensor may stand under two names.
    save_file({k: t.clone().contiguous() for k, t in tensors.items()}, path, dict(metadata) if metadata else None)
    return path


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header, and all bytes after it."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def metadata_of(path: Path) -> dict[str, str]:
    found: dict[str, str] = header(path)[0].get("__metadata__", {})
    return found


def raw(path: Path) -> Raw:
    """Every tensor of a file, or of a folder of PEFT files: (dtype, shape, bytes)."""
    if path.is_dir():
        files = sorted(path.rglob("adapter_model.safetensors"))
        parts = [(f.parent.relative_to(path).as_posix(), raw(f)) for f in files]
        return {f"{part}/{key}" if part != "." else key: t for part, ts in parts for key, t in ts.items()}
    head, data = header(path)
    head.pop("__metadata__", None)
    return {k: (v["dtype"], tuple(v["shape"]), data[slice(*v["data_offsets"])]) for k, v in head.items()}


def tensors_of(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


# ------------------------------------------------------------------------------------------------ ΔW


def tucker(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """up [out, r], core [r, r, …], down [r, in]."""
    return torch.einsum("mn...,om,ni->oi...", core, up, down)


def delta(given: Mapping[str, Tensor], alpha: float | None) -> Tensor:
    """ΔW of a module's parts, as the papers and LyCORIS have it. Source: METHODS, LoRA algorithms."""
    p = {k: t.double() for k, t in given.items()}
    if "up" in p:
        rank, kernel = len(p["down"]), p["down"].shape[2:]
        scale = 1.0 if alpha is None else alpha / rank
        if "mid" in p:
            return scale * tucker(p["mid"], p["up"].flatten(1), p["down"].flatten(1))
        product = p["up"].flatten(1) @ p["down"].flatten(1)
        return scale * product.reshape(len(p["up"]), p["down"].shape[1], *kernel)
    if "hada_w1_a" in p:
        scale = 1.0 if alpha is None else alpha / len(p["hada_w1_b"])
        if "hada_t1" in p:
            halves = [tucker(p[f"hada_t{n}"], p[f"hada_w{n}_a"].T, p[f"hada_w{n}_b"]) for n in (1, 2)]
            return scale * halves[0] * halves[1]
        return scale * (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
    if any(k.startswith("lokr") for k in p):
        return _kronecker(p, alpha)
    return p["diff"]


def _kronecker(p: Mapping[str, Tensor], alpha: float | None) -> Tensor:
    first = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    if "lokr_w2" in p:
        second = p["lokr_w2"]
    elif "lokr_t2" in p:
        second = tucker(p["lokr_t2"], p["lokr_w2_a"].T, p["lokr_w2_b"])
    else:
        second = p["lokr_w2_a"] @ p["lokr_w2_b"].flatten(1)
    rank = next((len(p[k]) for k in ("lokr_w2_b", "lokr_w1_b") if k in p), None)
    scale = 1.0 if rank is None or alpha is None else alpha / rank  # whole factors: 1, whatever alpha says
    first = first.reshape(*first.shape, *[1] * (second.dim() - 2))
    return scale * torch.kron(first, second.contiguous())


PARTS = (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b",
    "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "diff", "diff_b", "w_norm", "b_norm", "set_weight", "set_bias",
    "reshape_weight", "alpha", "dora_scale",
)  # fmt: skip
ENDINGS = {f".{part}": part for part in PARTS} | {
    ".lora_up.weight": "up", ".lora_down.weight": "down", ".lora_mid.weight": "mid", ".lora_up.bias": "bias",
    ".lora_B.weight": "up", ".lora_A.weight": "down", ".lora_B.bias": "bias", ".lora_magnitude_vector": "dora_scale",
}  # fmt: skip


def modules_of(path: Path) -> dict[str, tuple[dict[str, Tensor], float | None]]:
    """Module -> its parts, and its alpha, from wherever the file has that. Names as the file has them."""
    if path.is_dir():
        found = {}
        for file in sorted(path.rglob("adapter_model.safetensors")):
            config = json.loads((file.parent / "adapter_config.json").read_text())
            part = file.parent.relative_to(path).as_posix()
            found |= {f"{part}/{name}" if part != "." else name: m for name, m in _modules(file, {"": config}).items()}
        return found
    told: dict[str, dict[str, Any]] = {}
    for key, value in json.loads(metadata_of(path).get("lora_adapter_metadata", "{}")).items():
        component, _, name = key.partition(".")
        told.setdefault(component, {})[name] = value
    return _modules(path, told)


def _modules(path: Path, told: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[dict[str, Tensor], float | None]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors_of(path).items():
        ending = next(e for e in sorted(ENDINGS, key=len, reverse=True) if key.endswith(e))
        found.setdefault(key.removesuffix(ending), {})[ENDINGS[ending]] = tensor
    return {name: (parts, _alpha(name, parts, told)) for name, parts in found.items()}


def _alpha(name: str, parts: dict[str, Tensor], told: Mapping[str, Mapping[str, Any]]) -> float | None:
    given = parts.pop("alpha", None)
    if given is not None:
        return float(given)
    component, _, rest = name.partition(".")
    config = told.get(component)
    if config is None and "" in told:
        config, rest = told[""], name.removeprefix("base_model.model.")
    if config is None:
        return None
    key = next((k for k in config["alpha_pattern"] if re.match(rf"(.*\.)?({k})$", rest)), None)  # as PEFT does
    alpha = config.get("lora_alpha", config.get("alpha")) if key is None else config["alpha_pattern"][key]
    rank = next(len(parts[p]) for p in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "lokr_w2") if p in parts)
    told_rank = next((r for k, r in config["rank_pattern"].items() if re.match(rf"(.*\.)?({k})$", rest)), config["r"])
    assert told_rank == rank or "lokr_w2" in parts, f"{name} has rank {rank}, and is said to have {told_rank}"
    return alpha * math.sqrt(rank) if config.get("use_rslora") else float(alpha)


def deltas(path: Path) -> dict[str, Tensor]:
    """Module -> ΔW, of a file in any written dialect."""
    return {name: delta(parts, alpha) for name, (parts, alpha) in modules_of(path).items()}


# ------------------------------------------------------------------------------------------------ making


class Maker:
    """Random tensors, different with each call and the same in each run."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def lora(self, out: int, features: int, rank: int, alpha: float | None = None, kernel: Sequence[int] = ()) -> Any:
        """Parts of a LoRA under kohya's endings."""
        found = {
            ".lora_down.weight": self(rank, features, *kernel),
            ".lora_up.weight": self(out, rank, *[1] * len(kernel)),
        }
        return found if alpha is None else found | {".alpha": torch.tensor(alpha, dtype=self.dtype)}


def named(modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Modules and their parts as one file's tensors."""
    return {name + ending: tensor for name, parts in modules.items() for ending, tensor in parts.items()}


# Of Stable Diffusion's UNet, in the diffusers' and LDM's names.
UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
UNET_IN_LDM = "input_blocks.1.1.transformer_blocks.0.attn2"
MODULE = f"lora_unet_{UNET.replace('.', '_')}_to_{{}}"


def kohya_file(path: Path, ranks: list[int], alphas: list[float], metadata: dict[str, str]) -> Path:
    """A LoRA of three modules, queries, keys and values."""
    maker = Maker(5)
    modules = {
        MODULE.format(name): maker.lora(16, 16, rank, alpha)
        for name, rank, alpha in zip(("q", "k", "v"), ranks, alphas, strict=True)
    }
    return save(path, named(modules), metadata)
