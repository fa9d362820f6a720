"""synth sample: new LoRAs from what was learnt of a space: drawn, from a condition, between two, or around one."""

from __future__ import annotations

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
from weightops.errors import Interrupted, OutputError, UsageError, quote
from weightops.lora.dialects import DIALECTS
from weightops.ops.report import peak_memory_bytes
from weightops.synthesis.draws import GUIDANCE, SPREAD, STEPS, Asked, Drawn, asked_of, drawn_of
from weightops.synthesis.fitted import load_fitted
from weightops.synthesis.lora_file import write_lora
from weightops.synthesis.memorised import REMEMBERED, Members
from weightops.synthesis.places import keep_inputs, with_own_space

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from weightops.synthesis.fitted import Fitted
    from weightops.synthesis.layout import Factors

    Place = str | os.PathLike[str]

_FAR = 4  # deviations of a condition's number, beyond which nothing like it was learnt from
_TELLS_NOTHING = 0.9  # of the latents' variance, that regression on the condition leaves
_SHOWN = 64  # numbers of a condition that a LoRA's metadata repeat
_TOGETHER = 8  # LoRAs whose factors are made at a time


@dataclass(slots=True)
class SampleReport:
    """LoRAs that were made. files: of each its path, size, label, ranks and nearest training member.

    by: how. usual_distance: the median distance from a training member to the nearest other one.
    """

    fitted: str
    output: str
    by: str
    files: list[dict[str, Any]] = field(default_factory=list)
    usual_distance: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    bytes_written: int = 0
    dry_run: bool = False
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document that scripts may rely on."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"command": "synth sample", "version": __version__, "inputs": [{"path": self.fitted}], **found}


def sample(
    fitted: Place,
    *,
    output: Place | None = None,
    count: int = 1,
    seed: int = 0,
    condition: str | None = None,
    embedder: str | None = None,
    between: tuple[str, str] | None = None,
    at: float | Sequence[float] | None = None,
    around: str | None = None,
    spread: float | None = None,
    by: str | None = None,
    guidance: float | None = None,
    steps: int | None = None,
    rank: int | None = None,
    dialect: str = "kohya",
    dtype: str = "fp32",
    space: Place | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> SampleReport:
    """Make `count` LoRAs of a fitted model, and write them as ordinary LoRA files: one to a file, several to a folder.

    condition: numbers, a CSV or NPZ file (each row is one), an image or a folder of them; `count` of each. between:
    two LoRAs, and at: how far from the first to the second, one or several. around: a LoRA, and spread: how far from
    it, in deviations of the training members' latents. A LoRA is a member's name or a file. by: gaussian (their mean
    and deviations), prior (a VAE's), diffusion, ridge, nearest, mean; None: the best that `fitted` has, of a condition
    diffusion or else ridge. guidance, steps: of diffusion. rank: the best of it that each can be.

    space: its folder, where `fitted` does not lie in it. Raises WeightopsError.
    """
    started = time.perf_counter()
    need("synth sample", "torch", extra="synthesis")
    asked = asked_of(by, count, seed, condition, embedder, between, at, around, spread, guidance, steps)
    found = with_own_space(load_fitted(fitted), space)
    _check_space(found)
    with one_thread(found.numbers):
        drawn = drawn_of(found, asked)
    targets = _targets(output, found, drawn, dialect, force=force)
    for target in targets:
        keep_inputs(target, fitted, around, condition, embedder, *(between or ()))
    settings = _settings(asked, drawn.by, rank, dialect, dtype)
    report = SampleReport(
        os.fspath(fitted), os.fspath(output) if output is not None else str(targets[0]), drawn.by,
        settings=settings, dry_run=dry_run, warnings=_far(found, drawn) + _wide(found, rank),
    )  # fmt: skip
    if len(targets) > 1 and not dry_run:
        _make_folder(targets[0].parent)
    try:
        with one_thread(found.numbers):
            _make(found, drawn, targets, os.fspath(fitted), report, force=force)
    except Interrupted:
        if dry_run or not report.files:
            raise
        what = f"interrupted: {len(report.files):,} of {len(targets):,} LoRAs are written, each of them whole"
        raise Interrupted(report.output, what, "--force makes all of them anew") from None
    report.warnings += _remembered(report, asked)
    report.seconds, report.peak_memory_bytes = time.perf_counter() - started, peak_memory_bytes()
    return report


def _make(
    found: Fitted, drawn: Drawn, targets: Sequence[Path], fitted: str, report: SampleReport, *, force: bool
) -> None:
    """Each LoRA as a file, with what it is near to; the report says what there is."""
    settings, dry_run = report.settings, report.dry_run
    rank, dialect, dtype = settings["rank"], settings["dialect"], settings["dtype"]
    members = Members(found)
    report.usual_distance = members.usual
    digest = digest_of(fitted)
    inputs = inputs_of([(fitted, None if digest is None else digest.hash), *drawn.files])
    for number, factors in enumerate(_factors(found, drawn.latents, rank)):
        near = members.nearest(drawn.latents[number], factors)
        nearest = {"name": near.name, "distance": near.distance, "usual": members.usual}
        told = {
            "command": "synth sample", "inputs": inputs, "settings": settings, "number": number,
            "label": drawn.labels[number], "nearest": nearest, **_condition_said(drawn, number),
        }  # fmt: skip
        target = targets[number]
        # What only would be written may be for a folder that only would be made.
        there = target if not dry_run or target.parent.is_dir() else target.parent.with_name(target.name)
        written = write_lora(
            there, found.layout, factors, dialect=dialect, rank=rank, dtype=dtype, recipe=told, force=force,
            dry_run=dry_run,
        )  # fmt: skip
        report.files.append({
            "path": str(target), "label": drawn.labels[number], "bytes": written.bytes_written,
            "nearest": near.name, "distance": near.distance, "distance_to_file": near.to_file,
            "ranks": {str(r): n for r, n in written.ranks.items()}, "error": written.error,
        })  # fmt: skip
        report.bytes_written += written.bytes_written


def _check_space(fitted: Fitted) -> None:
    if fitted.pca is None and fitted.space is None:
        what = "is learnt from ΔW, so that a new LoRA is a sum of the space's, and needs the space"
        raise UsageError(fitted.label, what, "--space DIR names its folder")


# ------------------------------------------------------------------------------------------------ files


def _factors(fitted: Fitted, latents: Tensor, rank: int | None) -> Any:
    """The factors [out, r] of each of latents [n, m], a few at a time."""
    for start in range(0, len(latents), _TOGETHER):
        part = latents[start : start + _TOGETHER]
        # A change that is a sum of the space's has many ranks: as many are kept as its LoRAs have, or as are asked for.
        made: Factors = (
            fitted.layout.unflatten(fitted.rows_of(part))
            if fitted.pca is not None or rank is None
            else fitted.factors_of(part, rank=rank)
        )
        for i in range(len(part)):
            yield [(up[i].detach(), down[i].detach()) for up, down in made]


def _targets(output: Place | None, fitted: Fitted, drawn: Drawn, dialect: str, *, force: bool) -> list[Path]:
    """A file for each LoRA: `output` itself for one, names in the folder `output` for several. Raises OutputError."""
    if dialect not in DIALECTS:
        raise UsageError("--dialect", f"found {quote(dialect)}, expected {', '.join(DIALECTS)}")
    ending = "" if DIALECTS[dialect].folder else ".safetensors"
    several = len(drawn.labels) > 1
    stem = f"{slug(stem_of(fitted.label), 60)}-{slug(drawn.labels[0], 60) if not several else 'samples'}"
    place = Path(output) if output is not None else Path(stem if several else f"{stem}{ending}")
    if not several:
        return [place]
    if place.suffix == ".safetensors":
        raise UsageError(str(place), f"names one file, but {len(drawn.labels):,} LoRAs are to be made", "name a folder")
    if os.path.lexists(place) and not place.is_dir():
        raise OutputError(str(place), "is a file, expected a folder")
    found = [place / f"{n:04}-{slug(label, 60)}{ending}" for n, label in enumerate(drawn.labels, 1)]
    there = [path for path in found if os.path.lexists(path)]
    if there and not force:
        raise OutputError(str(there[0]), "exists", "use --force to replace it")
    return found


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(str(folder), f"cannot be made: {e.strerror or e}") from None


def _settings(asked: Asked, by: str, rank: int | None, dialect: str, dtype: str) -> dict[str, Any]:
    """What decides about the LoRAs, without paths."""
    said: dict[str, Any] = {"by": by, "count": asked.count, "seed": asked.seed, "rank": rank, "dialect": dialect}
    said["dtype"] = dtype
    if asked.between is not None:
        said |= {"between": [stem_of(words) for words in asked.between], "at": list(asked.at or [])}
    if asked.around is not None:
        said |= {"around": stem_of(asked.around), "spread": SPREAD if asked.spread is None else asked.spread}
    if by == "diffusion":
        said |= {"steps": asked.steps or STEPS, "guidance": GUIDANCE if asked.guidance is None else asked.guidance}
    return said


def _condition_said(drawn: Drawn, number: int) -> dict[str, Any]:
    if drawn.conditions is None or drawn.conditions.shape[1] > _SHOWN:
        return {}
    return {"condition": drawn.conditions[number].tolist()}


# ------------------------------------------------------------------------------------------------ warnings


def _far(fitted: Fitted, drawn: Drawn) -> list[str]:
    """Conditions like none that were learnt from, or that hardly tell the LoRAs apart."""
    if drawn.conditions is None or fitted.nearest is None:
        return []
    found = []
    left = 0.0 if fitted.ridge is None else fitted.ridge.left_out
    if left > _TELLS_NOTHING and drawn.by != "nearest":
        what = f"ridge regression on it, each LoRA left out in turn, leaves {left:.0%} of how they differ"
        found.append(f"the condition hardly says which LoRA it is: {what}")
    for label, row in zip(drawn.labels, fitted.nearest.standard(drawn.conditions), strict=True):
        worst = int(abs(row).argmax())
        if abs(row[worst]) > _FAR:
            what = f"{fitted.condition_names[worst]} is {abs(row[worst]):.1f} deviations from the mean of the LoRAs"
            found.append(f"{label}: {what}: nothing like it was learnt from")
    return list(dict.fromkeys(found))


def _wide(fitted: Fitted, rank: int | None) -> list[str]:
    most = max(module.rank for module in fitted.layout.modules)
    if rank is None or rank <= most or fitted.pca is None:
        return []
    return [f"--rank {rank}: LoRAs of this space have rank {most}, and no more is written"]


def _remembered(report: SampleReport, asked: Asked) -> list[str]:
    """LoRAs that are members given back, though none was asked for."""
    if not asked.of_noise or report.by in ("nearest", "mean"):
        return []
    near = [f for f in report.files if f["distance"] < REMEMBERED * report.usual_distance]
    if not near:
        return []
    first = near[0]
    what = (
        f"{len(near):,} of {len(report.files):,} are nearly members that were learnt from: {quote(first['label'])} is "
    )
    what += f"{first['distance']:.3g} from {quote(first['nearest'])}"
    return [f"{what}, where {report.usual_distance:.3g} is usual between members"]
