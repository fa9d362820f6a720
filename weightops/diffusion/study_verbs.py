"""The verbs that a study's steps may name: which function each is, what it makes, and what of it a page shows.

A verb's words are its function's parameters, less those that the study says itself.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.diffusion.checkpoints import steps_in
from weightops.diffusion.study_words import Parameter, parameters
from weightops.diffusion.tables import write_whole
from weightops.errors import UsageError, listing

if TYPE_CHECKING:
    from collections.abc import Mapping

# What is going on (its name, how much is done, of how much), and of a training the loss.
Progress = Callable[[str, int, int, "float | None"], None]

_OWN: Mapping[str, str] = {
    "output": "what a step makes stands in the study's folder, under the step's name",
    "force": "a step whose words are changed is run again",
    "dry_run": "weightops study FILE --dry-run says what would be done",
    "on_progress": "it is for programs",
    "on_look": "it is for programs",
}


@dataclass(frozen=True, slots=True)
class Made:
    """outputs: names within the step's folder, by what they are called in references; "" is the step itself.

    shown: parts of a page, as study_page draws them. Nothing here tells the time.
    """

    outputs: dict[str, Any]
    shown: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Job:
    """A step that is run: in `work`, an empty folder, or with `again` the one that an interrupted run left.

    cache: a folder that all steps share.
    """

    step: str
    words: Mapping[str, Any]
    work: Path
    again: bool
    cache: Path
    on_progress: Progress

    def counted(self, done: int, total: int) -> None:
        """Progress of a verb that counts one thing."""
        self.on_progress("", done, total, None)


@dataclass(frozen=True, slots=True)
class Verb:
    """run: does the work with the function. given: parameters that the verb's own name says.

    fields: what a reference may name beside the step itself; several: those of which there are several, by a key.
    resumes: does it go on where it was interrupted? loads: does it hold whole models in memory?
    """

    name: str
    module: str
    function: str
    run: Callable[[Verb, Job], Made]
    given: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, str] = field(default_factory=lambda: _OWN)
    fields: tuple[str, ...] = ()
    several: tuple[str, ...] = ()
    resumes: bool = False
    loads: bool = False

    def call(self, job: Job, **more: Any) -> Any:
        """The function's report."""
        function = getattr(importlib.import_module(self.module), self.function)
        known = parameters(self.module, self.function)
        said = {**job.words, **self.given, **more}
        said.setdefault("on_progress", job.counted)
        if "on_progress" not in known:
            del said["on_progress"]
        positional: list[Any] = []
        if any(p.many for p in known.values()):
            for name, parameter in known.items():
                if parameter.many:
                    positional += said.pop(name, [])
                    break
                positional.append(said.pop(name))
        return function(*positional, **said)


def words_of(verb: Verb) -> dict[str, Parameter]:
    """The words that a step may say."""
    known = parameters(verb.module, verb.function)
    return {name: p for name, p in known.items() if name not in verb.own and name not in verb.given}


def facts(*rows: tuple[str, Any]) -> dict[str, Any]:
    """A part of a page: what is said of what; rows of nothing are left out."""
    return {"kind": "facts", "rows": [[name, str(value)] for name, value in rows if value not in (None, "", [])]}


# ------------------------------------------------------------------------------------------------ files


def _file(verb: Verb, job: Job) -> Made:
    """A verb that writes one file."""
    return _written(verb, job, f"{job.step}.safetensors")


def _converted(verb: Verb, job: Job) -> Made:
    """A file, or a folder, as its words have it."""
    folder = job.words.get("to") in ("diffusers", "peft") or job.words.get("shard_size") is not None
    return _written(verb, job, job.step if folder else f"{job.step}.safetensors")


def _written(verb: Verb, job: Job, name: str) -> Made:
    report = verb.call(job, output=job.work / name)
    account = report.account
    shown = facts(
        ("what was done", report.summary),
        ("tensors", f"{len(account.used):,} used, {len(account.copied) + len(account.kept):,} copied"),
        ("unused", f"{len(account.unused):,}: {listing(u.key for u in account.unused)}" if account.unused else None),
        ("written", f"{name}, {report.bytes_written:,} bytes"),
        ("in short", report.details.get("line")),
    )
    return Made({"": name}, [shown], list(report.warnings))


def _inspected(verb: Verb, job: Job) -> Made:
    found = verb.call(job).to_dict()
    write_whole(job.work / "report.json", json.dumps(found, indent=2, sort_keys=True).encode())
    lora = found.get("lora") or {}
    shown = facts(
        ("kind", found.get("kind")),
        ("architecture", found.get("architecture")),
        ("parameters", f"{found['parameters']:,}"),
        ("dtypes", ", ".join(found["dtypes"])),
        ("components", ", ".join(found["components"])),
        ("dialect", lora.get("dialect")),
        ("ranks", ", ".join(map(str, lora.get("ranks", {})))),
        ("alphas", ", ".join(map(str, lora.get("alphas", {})))),
    )
    return Made({"": "report.json"}, [shown])


# ------------------------------------------------------------------------------------------------ images


def _captioned(verb: Verb, job: Job) -> Made:
    """The images are copied: an input is never changed."""
    source = Path(job.words["folder"])
    if not source.is_dir():
        raise UsageError(str(source), "is no folder")
    images = job.work / job.step
    if not images.is_dir():
        part = job.work / f".{job.step}.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part)
        part.rename(images)
    report = verb.call(job, folder=images)
    rows = [[name, text] for name, text in sorted(report.captions.items())]
    table = {"kind": "table", "title": "Captions", "columns": ["image", "caption"], "rows": rows[:20], "note": ""}
    if len(rows) > 20:
        table["note"] = f"The first 20 of {len(rows):,}."
    shown = [
        facts(
            ("images", f"{len(report.found.pictures):,}"),
            ("captioned", f"{len(report.captions):,}, and {report.kept:,} had a caption"),
            ("broken", listing(name for name, _ in report.broken) if report.broken else None),
            ("near-duplicates", f"{len(report.duplicates):,}" if report.duplicates else None),
        ),
        *([table] if rows else []),
    ]
    return Made({"": job.step}, shown, list(report.warnings))


def _trained(verb: Verb, job: Job) -> Made:
    """A LoRA, and beside it the folder with all that its training left."""
    name = job.step if job.words.get("dialect") == "peft" else f"{job.step}.safetensors"
    folder = job.work / f"{job.step}-train"
    resume = job.again and bool(steps_in(folder))
    report = verb.call(
        job, output=job.work / name, resume=resume, force=True, cache=job.cache, on_progress=job.on_progress
    )
    within = [path.relative_to(job.work).as_posix() for path in sorted(folder.rglob("*.png"))]
    outputs = {
        "": name,
        "lora": name,
        "log": f"{folder.name}/loss.csv",
        "curve": f"{folder.name}/loss.png",
        "samples": {Path(file).stem: file for file in within if "/samples/" in file},
        "checkpoints": {
            str(step): next(p for p in sorted(at.iterdir()) if p.stem == "lora").relative_to(job.work).as_posix()
            for step, at in steps_in(folder).items()
        },
    }
    settings = report.settings
    shown = [
        facts(
            ("images", f"{report.images:,}" + (f", and {report.class_images:,} of the class" if report.class_images else "")),
            ("steps", f"{report.steps:,}: {report.epochs:.4g} epochs of {report.steps_per_epoch:,}"),
            ("LoRA", f"{report.modules:,} modules, rank {settings['rank']}, alpha {settings['alpha']:g}"),
            ("parameters that learn", f"{report.parameters:,}"),
            ("loss", f"{report.first_loss:.4g} at first, {report.loss:.4g} in the mean of the last steps"),
        ),
        {"kind": "drawing", "file": outputs["curve"], "words": "the loss of each step",
         "caption": "The loss of each step: noise and timesteps are drawn anew in each, so that it says little by itself."},
    ]  # fmt: skip
    if outputs["samples"]:
        pictures = [[file, label.replace("-", " ")] for label, file in outputs["samples"].items()]
        shown.append({"kind": "pictures", "pictures": pictures[-_MOST_PICTURES:]})
    return Made(outputs, shown, list(report.warnings))


def _generated(verb: Verb, job: Job) -> Made:
    """A folder of images, and the grid where one is asked for."""
    folder = "images"
    report = verb.call(job, output=job.work / folder)
    rows = {Path(row["file"]).stem: row for row in report.images}
    outputs: dict[str, Any] = {
        "": folder,
        "images": {stem: f"{folder}/{row['file']}" for stem, row in rows.items()},
        "list": f"{folder}/images.json",
    }
    ways = [f"{lora['name']}: {lora['way']}" for lora in report.loras if lora.get("way") not in (None, "adapter")]
    shown = [facts(("what was done", report.summary), ("LoRAs that went another way", "; ".join(dict.fromkeys(ways))))]
    if report.grid is not None:
        outputs["grid"] = f"{folder}/{report.grid['file']}"
        caption = f"Columns: {report.grid['over']}. Every image of a row begins with the same noise."
        shown.append({"kind": "pictures", "pictures": [[outputs["grid"], caption]]})
    else:
        pictures = [[outputs["images"][stem], _caption(row)] for stem, row in rows.items()]
        shown.append({"kind": "pictures", "pictures": pictures[:_MOST_PICTURES]})
    return Made(outputs, shown, list(report.warnings))


def _caption(row: Mapping[str, Any]) -> str:
    return f"{row['prompt']} (seed {row['seed']})"


def _page(verb: Verb, job: Job) -> Made:
    raise AssertionError(f"{verb.name} is written by the study itself: it shows the other steps ({job.step})")


_MOST_PICTURES = 12  # of a step on the page

_OPS = "weightops.ops."
_TRAIN = "weightops.diffusion.train"
_OF_TRAINING = {
    **_OWN, "resume": "a training that was stopped goes on by itself", "cache": "the study has one",
}  # fmt: skip
_NO_FILE = {**_OWN, "plan": "it writes no file: run it by hand", "interference_only": "it writes no file: run it by hand"}
_GRID = {**_OWN, "grid": "name the points as steps", "score": "it is for programs", "recipe": "name the models as words"}

VERBS: Mapping[str, Verb] = {
    verb.name: verb
    for verb in (
        Verb("merge", _OPS + "merge", "merge", _file, own=_GRID),
        Verb("fuse", _OPS + "fuse", "fuse", _file, own={**_OWN, "undo": "it is a second file: fuse by hand"}),
        Verb("extract", _OPS + "extract", "extract", _file),
        Verb("resize", _OPS + "resize", "resize", _file, own={**_NO_FILE, "folder": _OWN["output"]}),
        Verb("combine", _OPS + "combine", "combine", _file, own=_NO_FILE),
        Verb("convert", _OPS + "convert", "convert", _converted),
        Verb("inspect", _OPS + "inspect", "inspect", _inspected),
        Verb("caption", "weightops.diffusion.caption", "caption", _captioned, resumes=True, loads=True),
        *(
            Verb(
                f"train {kind}", _TRAIN, "train", _trained, {"kind": kind}, _OF_TRAINING,
                ("lora", "checkpoints", "log", "curve", "samples"), ("checkpoints", "samples"), resumes=True, loads=True,
            )
            for kind in ("text-to-image", "dreambooth")
        ),
        Verb(
            "generate", "weightops.diffusion.generate", "generate", _generated, fields=("images", "grid", "list"),
            several=("images",), loads=True,
        ),
        Verb("page", "weightops.diffusion.study_page", "page", _page),
    )
}
