"""synth edit: a LoRA moved along what a label says, by least squares over what was learnt of a space."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion.axes import stem_of
from weightops.diffusion.extras import need
from weightops.diffusion.image_folder import slug
from weightops.diffusion.image_records import digest_of, inputs_of
from weightops.diffusion.threads import one_thread
from weightops.errors import UsageError, quote
from weightops.lora.dialects import DIALECTS
from weightops.lora.lowrank import LowRank, add, truncate
from weightops.synthesis.conditions import read_conditions
from weightops.synthesis.directions import direction_of, directions_of
from weightops.synthesis.fitted import load_fitted
from weightops.synthesis.lora_file import write_lora
from weightops.synthesis.memorised import relative
from weightops.synthesis.places import keep_inputs, place_of, with_own_space

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from weightops.synthesis.directions import Direction
    from weightops.synthesis.fitted import Fitted
    from weightops.synthesis.places import Placed

    Place = str | os.PathLike[str]


@dataclass(slots=True)
class EditReport:
    """A LoRA that was moved, or without one what there is to move along. amount: of the label, in its own units.

    labels: of each its deviation, share (R²) and null, as `directions.Direction` has them. change: ‖ΔW − ΔW₀‖ / ‖ΔW₀‖,
    ΔW₀ the LoRA that was given.
    """

    fitted: str
    labels: list[dict[str, Any]]
    loras: int
    inputs: list[dict[str, Any]] = field(default_factory=list)
    lora: str | None = None
    output: str | None = None
    label: str | None = None
    strength: float = 0.0
    amount: float = 0.0
    change: float = 0.0
    ranks: dict[int, int] = field(default_factory=dict)
    error: float = 0.0
    bytes_written: int = 0
    dry_run: bool = False
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document that scripts may rely on."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"command": "synth edit", "version": __version__, **found}


def edit(
    lora: Place | None,
    fitted: Place,
    *,
    label: str | None = None,
    strength: float | None = None,
    output: Place | None = None,
    labels: Place | None = None,
    rank: int | None = None,
    dialect: str = "kohya",
    dtype: str = "fp32",
    space: Place | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> EditReport:
    """Move a LoRA along the direction of a label, and write it; without a label, say which there are.

    lora: a LoRA file of the space's modules, or a member's name where the space is at hand. What the model leaves out
    of it stays. strength: in deviations that the label has among the LoRAs that were learnt from. labels: a CSV or NPZ
    file with labels for them; None: the space's conditions. space: its folder, where `fitted` does not lie in it.

    Raises WeightopsError: for a label that never changes, or that other labels say as well.
    """
    started = time.perf_counter()
    need("synth edit", "torch", extra="synthesis")
    found = with_own_space(load_fitted(fitted), space)
    with one_thread(found.numbers):
        report = _edited(
            lora, fitted, found, label, strength, output, labels, rank, dialect, dtype, force=force, dry_run=dry_run
        )
    report.seconds = time.perf_counter() - started
    return report


def _edited(
    lora: Place | None, fitted: Place, found: Fitted, label: str | None, strength: float | None,
    output: Place | None, labels: Place | None, rank: int | None, dialect: str, dtype: str, *, force: bool,
    dry_run: bool,
) -> EditReport:  # fmt: skip
    kept, numbers, names, warnings = _labels(found, labels)
    where = "--label" if labels is None else os.fspath(labels)
    directions = directions_of(found.latents[kept], numbers, names, where=where)
    report = EditReport(os.fspath(fitted), [_told(d) for d in directions], len(kept), dry_run=dry_run)
    report.warnings += warnings
    report.inputs = [{"path": os.fspath(path)} for path in (lora, fitted) if path is not None]
    if label is None:
        if strength is not None or lora is not None:
            raise UsageError("--label", "is lacking: along what?", f"there are {', '.join(names[:12])}")
        return report
    if lora is None:
        raise UsageError("synth edit", "found no LoRA to move", "weightops synth edit LORA FITTED --label NAME …")
    if strength is None or not math.isfinite(strength):
        found_it = "is lacking" if strength is None else f"found {strength}"
        raise UsageError("--strength", f"{found_it}, expected a number of the label's deviations, such as 1 or -0.5")
    direction = direction_of(directions, label, names, where="--label")
    placed = place_of(os.fspath(lora), found)
    if placed.row is None:
        what = "is a member by its name alone, of which the model has but a part"
        raise UsageError(placed.name, what, "name its file, or the space with --space DIR")
    before = [(up[None], down[None]) for up, down in found.layout.unflatten(placed.row)]
    factors = _moved(found, placed, direction, strength)
    target = _target(output, placed, direction, strength, dialect)
    keep_inputs(target, fitted, lora, labels)
    written = write_lora(
        target, found.layout, factors, dialect=dialect, rank=rank, dtype=dtype,
        recipe=_recipe(fitted, placed, direction, strength, rank, dialect, dtype), force=force, dry_run=dry_run,
    )  # fmt: skip
    report.lora, report.output, report.label, report.strength = placed.name, str(target), label, strength
    report.amount = strength * direction.deviation
    report.change = relative([(up[None].double(), down[None].double()) for up, down in factors], before)[0]
    report.ranks, report.error, report.bytes_written = dict(written.ranks), written.error, written.bytes_written
    if direction.is_chance:
        what = f"explains {direction.share:.2%} of how the LoRAs differ, and shuffled it would explain up to"
        report.warnings.append(f"{quote(label)} {what} {direction.null:.2%}: no more than chance")
    return report


def _told(direction: Direction) -> dict[str, Any]:
    return {
        "label": direction.label, "deviation": direction.deviation, "share": direction.share, "null": direction.null
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ labels


def _labels(fitted: Fitted, file: Place | None) -> tuple[list[int], NDArray[np.float64], tuple[str, ...], list[str]]:
    """Positions among the trained, their labels [n, c], the labels' names, and warnings. Raises UsageError."""
    import numpy as np

    if file is None:
        if fitted.nearest is None:
            what = "has no conditions that could be labels"
            raise UsageError(fitted.label, what, "--labels FILE.csv names some: name,smiling,…")
        standard = fitted.nearest.standard
        values = fitted.nearest.points * standard.deviation + standard.mean
        return list(range(len(values))), values, tuple(fitted.condition_names), []
    found = read_conditions(file)
    kept = [i for i, name in enumerate(fitted.trained_names) if name in found.rows]
    if not kept:
        what = f"says nothing of the {len(fitted.trained_names):,} LoRAs that {fitted.label} was learnt from"
        raise UsageError(found.label, what, f"it names them, as {quote(fitted.trained_names[0])}")
    lacking = len(fitted.trained_names) - len(kept)
    warnings = [f"{found.label}: says nothing of {lacking:,} LoRAs, which are left out"] if lacking else []
    return kept, np.stack([found.rows[fitted.trained_names[i]] for i in kept]), found.names, warnings


# ------------------------------------------------------------------------------------------------ the LoRA


def _moved(fitted: Fitted, placed: Placed, direction: Direction, strength: float) -> list[tuple[Tensor, Tensor]]:
    """The factors [out, r] of the LoRA's own row, and what the model makes of the way from its latents on."""
    import torch

    assert placed.row is not None
    ends = torch.stack([placed.latents, placed.latents])
    ends[1] += (strength * torch.from_numpy(direction.latents)).float()
    if fitted.pca is not None:
        made = fitted.rows_of(ends).double().detach()
        return list(fitted.layout.unflatten(placed.row + (made[1] - made[0])))
    own = fitted.layout.unflatten(placed.row)
    return [
        _sum(pair, (up, down), module.rank)
        for pair, (up, down), module in zip(own, fitted.factors_of(ends), fitted.layout.modules, strict=True)
    ]


def _sum(own: tuple[Tensor, Tensor], ends: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """A module's own change, and the difference of two, at the best of its rank."""
    up, down = ends[0].double(), ends[1].double()
    whole = add(LowRank(*own), LowRank(up[1], down[1]), LowRank(up[0], down[0]).scale(-1.0))
    kept = truncate(whole, rank).lowrank
    return kept.up, kept.down


def _target(output: Place | None, placed: Placed, direction: Direction, strength: float, dialect: str) -> Path:
    if output is not None:
        return Path(output)
    ending = ".safetensors" if dialect not in DIALECTS or not DIALECTS[dialect].folder else ""
    return Path(f"{slug(stem_of(placed.name), 60)}-{slug(direction.label, 40)}{strength:+g}{ending}")


def _recipe(
    fitted: Place, placed: Placed, direction: Direction, strength: float, rank: int | None, dialect: str,
    dtype: str,
) -> dict[str, Any]:  # fmt: skip
    digest = digest_of(os.fspath(fitted))
    hashes = [(os.fspath(fitted), None if digest is None else digest.hash)]
    if placed.hash is not None:
        hashes.append((placed.name, placed.hash))
    settings = {"rank": rank, "dialect": dialect, "dtype": dtype, "label": direction.label, "strength": strength}
    direction_said = {"deviation": direction.deviation, "share": direction.share, "null": direction.null}
    return {
        "command": "synth edit", "inputs": inputs_of(hashes), "settings": settings, "lora": placed.name,
        "direction": direction_said,
    }  # fmt: skip
