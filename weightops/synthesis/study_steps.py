"""The verbs of synthesis as a study's steps may name them: how each is run, what it makes, and what a page shows."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from weightops.diffusion.evaluation_folder import DOCUMENT, PAGE
from weightops.diffusion.study_steps import facts, findings_shown
from weightops.diffusion.study_verbs import OWN, Job, Made, Verb

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def _called(verb: Verb, job: Job, output: Path) -> Any:
    """The function's report. Its progress may say what is going on."""

    def on_progress(done: int, total: int, title: str | None = None) -> None:
        job.on_progress(title or "", done, total, None)

    return verb.call(job, output=output, on_progress=on_progress)


def _family(verb: Verb, job: Job) -> Made:
    """A base and its LoRAs, and what they were made of."""
    report = _called(verb, job, job.work / "family")
    place = job.work / "family"
    outputs: dict[str, Any] = {
        "": "family", "base": "family/base", "loras": "family/loras", "conditions": "family/conditions.csv",
        "images": "family/images", "held_out": "family/held-out", "embedder": "family/embedder.safetensors",
        "of": {path.name: f"family/images/{path.name}" for path in sorted((place / "images").iterdir())},
        "lora": {path.stem: f"family/loras/{path.name}" for path in sorted((place / "loras").iterdir())},
    }  # fmt: skip
    if (place / "loras-random-gauge").is_dir():
        outputs["random_gauge"] = "family/loras-random-gauge"
    return Made(outputs, [facts(*_told(report))], list(report.warnings))


def _space(verb: Verb, job: Job) -> Made:
    report = _called(verb, job, job.work / "space")
    return Made({"": "space"}, [facts(*_told(report))], list(report.warnings))


def _file(verb: Verb, job: Job) -> Made:
    """One file: a fitted model, or a LoRA."""
    name = f"{job.step}.safetensors"
    report = _called(verb, job, job.work / name)
    return Made({"": name}, [facts(*_told(report))], list(report.warnings))


def _loras(verb: Verb, job: Job) -> Made:
    """One LoRA, or a folder of several."""
    at = job.words.get("at")
    many = job.words.get("count", 1) > 1 or str(job.words.get("condition", "")).endswith((".csv", ".npz"))
    many = many or (isinstance(at, (list, tuple)) and len(at) > 1)
    name = job.step if many else f"{job.step}.safetensors"
    report = _called(verb, job, job.work / name)
    outputs: dict[str, Any] = {"": name}
    if many:
        found = sorted((job.work / name).iterdir())
        outputs["loras"] = {path.stem: f"{name}/{path.name}" for path in found}
    return Made(outputs, [facts(*_told(report))], list(report.warnings))


def _evaluated(verb: Verb, job: Job) -> Made:
    name = "evaluation"
    report = _called(verb, job, job.work / name)
    outputs = {
        "": name, "document": f"{name}/{DOCUMENT}", "page": f"{name}/{PAGE}",
        "tables": {stem: f"{name}/{stem}.csv" for stem in report.tables},
    }  # fmt: skip
    return Made(outputs, findings_shown(report.findings, name), list(report.warnings))


# What a report's document says of time, place and files is not for a page, which is the same for the same study.
_NOT_SHOWN = (
    "command", "version", "inputs", "output", "bytes_written", "seconds", "peak_memory_bytes", "warnings", "dry_run",
    "device", "space", "fitted", "left_out", "files", "processes", "memory_bytes", "resumed_at", "taken_up",
)  # fmt: skip


def _told(report: Any) -> list[tuple[str, str]]:
    """What the report says in single numbers and words."""
    found = []
    for name, value in report.to_dict().items():
        if name in _NOT_SHOWN or isinstance(value, (dict, bool)) or value is None:
            continue
        if isinstance(value, (list, tuple)):
            if not all(isinstance(part, (str, int, float)) for part in value) or len(value) > 12:
                continue
            value = ", ".join(map(_plain, value))
        if isinstance(value, str) and PurePath(value).is_absolute():
            continue
        found.append((name.replace("_", " "), _plain(value)))
    return found


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


_HERE = "weightops.synthesis."
_RESUMES = {**OWN, "resume": "a fit that was stopped goes on by itself"}

VERBS: Mapping[str, Verb] = {
    verb.name: verb
    for verb in (
        Verb(
            "synth family", _HERE + "family", "family", _family, resumes=True, loads=True, several=("of", "lora"),
            fields=("base", "loras", "conditions", "images", "held_out", "embedder", "of", "lora", "random_gauge"),
        ),
        Verb("synth collect", _HERE + "collect", "collect", _space, resumes=True),
        Verb("synth fit pca", _HERE + "fit", "fit_pca", _file, own=_RESUMES, resumes=True),
        Verb("synth fit vae", _HERE + "learning", "fit_vae", _file, own=_RESUMES, resumes=True),
        Verb("synth fit diffusion", _HERE + "learning", "fit_diffusion", _file, own=_RESUMES, resumes=True),
        Verb("synth sample", _HERE + "sample", "sample", _loras, fields=("loras",), several=("loras",)),
        Verb("synth fit-images", _HERE + "fit_images", "fit_images", _file, loads=True),
        Verb("synth edit", _HERE + "edit", "edit", _file),
        Verb(
            "synth evaluate", _HERE + "evaluate", "evaluate", _evaluated, fields=("document", "page", "tables"),
            several=("tables",), resumes=True, loads=True,
        ),
    )
}  # fmt: skip
