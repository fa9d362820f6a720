"""Factors as an ordinary LoRA file, in a dialect of the field, with metadata that is true of it.

The same factors, words and name write the same bytes: no date and no path stands in them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion.written import (
    DATA_HASHES,
    NETWORK_MODULES,
    SPECS,
    held_of,
    not_held,
    spelled_in_files,
    threads_kept,
)
from weightops.engine.chunks import DEFAULT_MEMORY
from weightops.engine.run import ignore
from weightops.errors import UsageError, ValueRefused, WeightopsError, quote
from weightops.lineage import KEY
from weightops.lora.dialects import DIALECTS
from weightops.lora.lowrank import LowRank, norm, truncate
from weightops.ops.dialect import plan_dialect
from weightops.ops.dialect_settings import told_of_base
from weightops.ops.produce import produce

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from weightops.ops.produce import Planned
    from weightops.synthesis.layout import Factors, Layout, Module

DTYPES = ("fp32", "fp16", "bf16")
# Of two variants, which the factors do not tell apart, a ModelSpec has no name for both.
_SEVERAL = ("sd2", "flux")


@dataclass(frozen=True, slots=True)
class Written:
    """A LoRA file. ranks: how many modules have each. error: ‖ΔW lost by the rank‖ / ‖ΔW‖, over all modules."""

    path: Path
    bytes_written: int
    ranks: Mapping[int, int]
    error: float


def write_lora(
    output: str | os.PathLike[str], layout: Layout, factors: Factors, *, recipe: Mapping[str, Any],
    dialect: str = "kohya", rank: int | None = None, dtype: str = "fp32", force: bool = False, dry_run: bool = False,
) -> Written:  # fmt: skip
    """Write factors, up [out, r] and down [r, n] of each module of the layout, as a LoRA whose alpha is its rank.

    Of a UNet at several ranks, in kohya's names, the alpha of all is the rank that most modules have.

    rank: the best truncation of each module's ΔW to so many (None: the factors as they are); what has fewer keeps them.
    dialect: peft writes a folder. recipe: what the file says of how it was made, of which `command`, and `inputs` with
    their names and hashes, are read by others. dry_run: find out whether it could be written, and how large.
    Raises UsageError where the dialect cannot hold it, ValueRefused, OutputError.
    """
    path = Path(output)
    _check_words(dialect, rank, dtype)
    with threads_kept():
        made, lost, whole = _cut(layout, factors, rank, str(path))
        planned = _planned(layout, made, dialect, dtype)
        metadata = {**planned.plan.metadata, **_metadata(layout, made, path, dialect, recipe)}
        planned.plan = replace(
            planned.plan, metadata=metadata, recipe=None, data_hashes=DATA_HASHES, refuse_nonfinite=True
        )
        report = produce(
            "synth", planned, path, memory=DEFAULT_MEMORY, device="cpu", threads=1, force=force, dry_run=dry_run,
            check=False, on_progress=ignore,
        )  # fmt: skip
    ranks = dict(sorted(Counter(up.shape[1] for up, _ in made).items()))
    return Written(path, report.bytes_written, ranks, math.sqrt(lost / whole) if whole else 0.0)


def _check_words(dialect: str, rank: int | None, dtype: str) -> None:
    if dialect not in DIALECTS:
        raise UsageError("--dialect", f"found {quote(dialect)}, expected {', '.join(DIALECTS)}")
    if rank is not None and rank < 1:
        raise UsageError("--rank", f"found {rank}, expected 1 or more")
    if dtype not in DTYPES:
        raise UsageError("--dtype", f"found {quote(dtype)}, expected {', '.join(DTYPES)}")


def _cut(
    layout: Layout, factors: Factors, rank: int | None, label: str
) -> tuple[list[tuple[Tensor, Tensor]], float, float]:
    """The factors in float32 at this rank, and the squared norms of what is lost and of the whole."""
    found = []
    lost = whole = 0.0
    for module, (up, down) in zip(layout.modules, factors, strict=True):
        if up.ndim != 2 or up.shape[0] != module.out or down.shape != (up.shape[1], module.n):
            raise ValueError(f"{module.key} of {list(module.shape)}: found {list(up.shape)}, {list(down.shape)}")
        if not all(bool(factor.detach().float().isfinite().all()) for factor in (up, down)):
            raise ValueRefused(label, f"the factors of {quote(module.key)} hold NaN, or numbers that float32 does not")
        change = LowRank(up.detach().cpu().double(), down.detach().cpu().double())
        if rank is not None and rank < change.rank:
            cut = truncate(change, rank)
            lost, whole = lost + (cut.error * cut.norm) ** 2, whole + cut.norm**2
            change = _at_least_one(cut.lowrank)
        elif rank is not None:
            whole += norm(change) ** 2
        found.append((change.up.float().contiguous(), change.down.float().contiguous()))
    return found, lost, whole


def _at_least_one(lowrank: LowRank) -> LowRank:
    """A module that does not change keeps its place in the file, with one rank of zeros."""
    if lowrank.rank:
        return lowrank
    out, n = lowrank.shape
    return LowRank(lowrank.up.new_zeros(out, 1), lowrank.down.new_zeros(1, n))


def _planned(layout: Layout, factors: Sequence[tuple[Tensor, Tensor]], dialect: str, dtype: str) -> Planned:
    import torch

    tensors: dict[str, Tensor] = {}
    common = Counter(up.shape[1] for up, _ in factors).most_common(1)[0][0]
    # diffusers 0.42 does not find the alphas of a UNet's attention layers in kohya's names where they differ from most:
    # all have one, and factors by which they are as strong as they were.
    one = "unet" in layout.components and dialect in ("kohya", "onetrainer")
    for module, (up, down) in zip(layout.modules, factors, strict=True):
        start = f"{module.component}.{spelled_in_files(module.component, module.name)}"
        rank, kernel = up.shape[1], module.shape[2:]
        tensors[f"{start}.lora_A.weight"] = down.reshape(rank, *module.shape[1:])
        alpha = common if one else rank
        up = up if alpha == rank else (up.double() * (rank / alpha)).float()
        tensors[f"{start}.lora_B.weight"] = up.reshape(module.out, rank, *[1] * len(kernel))
        tensors[f"{start}.alpha"] = torch.tensor(float(alpha))
    try:
        held = held_of(tensors, "the LoRA")
        return plan_dialect(held.open(), to=dialect, architecture=layout.architecture, dtype=dtype)
    except WeightopsError as e:
        raise not_held(dialect, e) from None


# ------------------------------------------------------------------------------------------------ metadata


def _metadata(
    layout: Layout, factors: Sequence[tuple[Tensor, Tensor]], path: Path, dialect: str, recipe: Mapping[str, Any]
) -> dict[str, str]:
    """kohya's words and a ModelSpec's as far as they are known, and our recipe."""
    architecture = layout.architecture
    found = {
        **told_of_base("kohya", architecture),
        "ss_network_module": NETWORK_MODULES.get(architecture, "networks.lora"),
        "ss_output_name": path.name.removesuffix(".safetensors"),
    }
    large = {up.shape[1] for module, (up, _) in zip(layout.modules, factors, strict=True) if _is_large(module)}
    if len(large) == 1:
        size = str(large.pop())
        found["ss_network_args"] = json.dumps({"conv_dim": size, "conv_alpha": size})
    if architecture in SPECS and architecture not in _SEVERAL:
        spec, implementation = SPECS[architecture]
        found |= {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{spec}/lora",
            "modelspec.implementation": "diffusers" if dialect in ("diffusers", "peft") else implementation,
            "modelspec.title": found["ss_output_name"],
        }
    said = {"version": __version__, "inputs": [], **recipe}
    found[KEY] = json.dumps(said, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return found


def _is_large(module: Module) -> bool:
    """Is it a convolution with a kernel larger than 1×1?"""
    return max(module.shape[2:], default=1) > 1
