"""The verbs that a study's steps may name: how each is run, what it makes, and what of it a page shows."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.diffusion.checkpoints import steps_in
from weightops.diffusion.evaluation_folder import DOCUMENT, PAGE
from weightops.diffusion.study_verbs import OWN, Job, Made, Verb
from weightops.diffusion.study_words import parameters
from weightops.diffusion.tables import write_whole
from weightops.errors import UsageError, listing, quote

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from weightops.diffusion.findings import Finding

_MOST = 12  # pictures of a step on the page
_ROWS = 20  # of a table there


def facts(*rows: tuple[str, Any]) -> dict[str, Any]:
    """A part of a page: what is said of what; rows of nothing are left out."""
    return {"kind": "facts", "rows": [[name, str(value)] for name, value in rows if value not in (None, "", [])]}


def pictures(rows: list[list[str]]) -> dict[str, Any]:
    """A part of a page: files within the step's folder, each with its caption."""
    return {"kind": "pictures", "pictures": rows[:_MOST]}


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
    unused = [entry.key for entry in report.account.unused if not entry.asked]
    shown = facts(
        ("what was done", report.summary),
        *((f"tensors of {group['component']}", _counted(group)) for group in report.groups),
        ("unused", f"{len(unused):,}: {listing(unused)}" if unused else None),
        ("written", f"{name}, {report.bytes_written:,} bytes"),
        ("in short", report.details.get("line")),
    )
    return Made({"": name}, [shown], list(report.warnings))


def _counted(group: Mapping[str, Any]) -> str:
    """What became of a component's tensors: "12 merged, 3 copied"."""
    return ", ".join(f"{n:,} {what}" for what, n in group.items() if what not in ("component", "tensors") and n)


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


# ------------------------------------------------------------------------------------------------ captions, training


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
    note = f"The first {_ROWS} of {len(rows):,}." if len(rows) > _ROWS else ""
    table = {"kind": "table", "title": "Captions", "columns": ["image", "caption"], "rows": rows[:_ROWS], "note": note}
    shown = facts(
        ("images", f"{len(report.found.pictures):,}"),
        ("captioned", f"{len(report.captions):,}, and {report.kept:,} had a caption"),
        ("broken", listing(name for name, _ in report.broken) if report.broken else None),
        ("near-duplicates", f"{len(report.duplicates):,}" if report.duplicates else None),
    )
    return Made({"": job.step}, [shown, *([table] if rows else [])], list(report.warnings))


def _check_training(verb: Verb, said: Mapping[str, Any]) -> None:
    """Refuse what the training itself would refuse, before the steps above it are run."""
    from weightops.diffusion.training_words import Words, resolution_of

    defaults = {name: p.default for name, p in parameters(verb.module, verb.function).items()}
    asked = {**defaults, **said, **verb.given}
    asked["resolution"] = resolution_of(asked["resolution"])
    asked["optimizer_set"] = asked["optimizer_set"] or {}
    asked |= {name: None if asked[name] is None else tuple(asked[name]) for name in ("targets", "betas")}
    Words(**{f.name: asked[f.name] for f in fields(Words)}).settled()


def _trained(verb: Verb, job: Job) -> Made:
    """A LoRA, and beside it the folder with all that its training left."""
    name = job.step if job.words.get("dialect") == "peft" else f"{job.step}.safetensors"
    folder = job.work / f"{job.step}-train"
    resume = job.again and bool(steps_in(folder))
    report = verb.call(
        job, output=job.work / name, resume=resume, force=True, cache=job.cache, on_progress=job.on_progress
    )  # fmt: skip
    samples = {path.stem: path.relative_to(job.work).as_posix() for path in sorted((folder / "samples").glob("*.png"))}
    checkpoints = {
        str(step): next(p for p in sorted(at.iterdir()) if p.stem == "lora").relative_to(job.work).as_posix()
        for step, at in steps_in(folder).items()
    }
    curve = f"{folder.name}/loss.png"
    outputs = {
        "": name, "lora": name, "run": folder.name, "log": f"{folder.name}/loss.csv", "curve": curve,
        "samples": samples, "checkpoints": checkpoints,
    }  # fmt: skip
    rank, alpha = report.settings["rank"], report.settings["alpha"]
    of_class = f", and {report.class_images:,} of the class" if report.class_images else ""
    shown = facts(
        ("images", f"{report.images:,}{of_class}"),
        ("steps", f"{report.steps:,}: {report.epochs:.4g} epochs of {report.steps_per_epoch:,}"),
        ("LoRA", f"{report.modules:,} modules, rank {rank}, alpha {alpha:g}"),
        ("parameters that learn", f"{report.parameters:,}"),
        ("loss", f"{report.first_loss:.4g} in the first step, {report.loss:.4g} in the mean of the last"),
    )
    drawn = {
        "kind": "drawing", "file": curve, "words": "the loss of each step",
        "caption": "The loss of each step. Noise and timesteps are drawn anew in each, so that one step says little.",
    }  # fmt: skip
    parts = [shown, drawn]
    if samples:
        parts.append(pictures([[file, stem.replace("-", " ")] for stem, file in samples.items()][-_MOST:]))
    return Made(outputs, parts, list(report.warnings))


# ------------------------------------------------------------------------------------------------ images


def _check_images(_verb: Verb, said: Mapping[str, Any]) -> None:
    from weightops.diffusion.axes import AXES
    from weightops.diffusion.prompts import parse_size
    from weightops.diffusion.schedulers import check_name

    if said.get("scheduler") is not None:
        check_name(said["scheduler"])
    if said.get("size") is not None:
        parse_size(said["size"])
    if said.get("grid_over") not in (None, *AXES):
        raise UsageError("--grid-over", f"found {quote(said['grid_over'])}, expected {', '.join(AXES)}")


def _generated(verb: Verb, job: Job) -> Made:
    """A folder of images, and the grid where one is asked for."""
    folder = "images"
    (job.work / folder).mkdir()
    report = verb.call(job, output=job.work / folder)
    files = {Path(row["file"]).stem: f"{folder}/{row['file']}" for row in report.images}
    outputs: dict[str, Any] = {"": folder, "images": files, "list": f"{folder}/images.json"}
    ways = dict.fromkeys(f"{lora['name']}: {lora['way']}" for lora in report.loras if lora["way"] != "adapter")
    shown = [facts(("what was done", report.summary), ("LoRAs that went another way", "; ".join(ways)))]
    if report.grid is not None:
        outputs["grid"] = f"{folder}/{report.grid['file']}"
        shown.append(pictures([[outputs["grid"], f"A grid over {report.grid['over']}."]]))
    else:
        rows = zip(files.values(), report.images, strict=True)
        shown.append(pictures([[file, f"{row['prompt']} (seed {row['seed']})"] for file, row in rows]))
    return Made(outputs, shown, list(report.warnings))


def _filmed(verb: Verb, job: Job) -> Made:
    """A video of a picture, or a folder with one of each."""
    form, many = job.words.get("form", "gif"), len(job.words["pictures"]) > 1
    name = "videos" if many else f"{job.step}.{form}"
    report = verb.call(job, output=job.work / name)
    files = {Path(row["file"]).stem: f"{name}/{row['file']}" if many else name for row in report.videos}
    shown = [facts(("what was done", report.summary), ("in files", listing(files.values())))]
    if form == "gif":
        shown.append(pictures([[file, stem] for stem, file in files.items()]))
    return Made({"": name, "videos": files}, shown, list(report.warnings))


def _evaluated(verb: Verb, job: Job) -> Made:
    """Tables and drawings, with what their numbers can and cannot say."""
    name = "evaluation"
    report = verb.call(job, output=job.work / name)
    shown = [facts(("what was done", report.summary)), *findings_shown(report.findings, name)]
    outputs = {
        "": name, "document": f"{name}/{DOCUMENT}", "page": f"{name}/{PAGE}",
        "tables": {stem: f"{name}/{stem}.csv" for stem in report.tables},
    }  # fmt: skip
    return Made(outputs, shown, list(report.warnings))


def findings_shown(findings: Iterable[Finding], folder: str) -> list[dict[str, Any]]:
    """The parts of a page that an evaluation left in this folder of the step's."""
    shown: list[dict[str, Any]] = []
    for finding in findings:
        shown.append(facts((finding.part, finding.says)))
        shown += [{"kind": "table", **table.to_dict(), "decimals": table.decimals} for table in finding.tables.values()]
        shown += [
            {"kind": "drawing", "file": f"{folder}/{stem}.png", "words": drawing.words, "caption": drawing.caption}
            for stem, drawing in finding.drawings.items()
        ]
    return shown


def _page(verb: Verb, job: Job) -> Made:
    raise AssertionError(f"{verb.name} shows the other steps: the study itself writes it ({job.step})")


_OPS = "weightops.ops."
_TRAIN = "weightops.diffusion.train"
_GRID = {**OWN, "grid": "each point is a step", "score": "it is for programs", "recipe": "its models are words here"}
_FUSE = {**OWN, "undo": "it is a second file", "embeddings": "it is a second folder"}
_NO_FILE = {**OWN, "plan": "it makes no file", "interference_only": "it makes no file", "folder": OWN["output"]}
_OF_TRAINING = {**OWN, "resume": "a training that was stopped goes on by itself", "cache": "the study has one"}
_OF_TRAINED = ("lora", "run", "checkpoints", "log", "curve", "samples")

VERBS: Mapping[str, Verb] = {
    verb.name: verb
    for verb in (
        Verb("merge", _OPS + "merge", "merge", _file, own=_GRID),
        Verb("fuse", _OPS + "fuse", "fuse", _file, own=_FUSE),
        Verb("extract", _OPS + "extract", "extract", _file),
        Verb("resize", _OPS + "resize", "resize", _file, own=_NO_FILE),
        Verb("combine", _OPS + "combine", "combine", _file, own=_NO_FILE),
        Verb("convert", _OPS + "convert", "convert", _converted),
        Verb("inspect", _OPS + "inspect", "inspect", _inspected),
        Verb("caption", "weightops.diffusion.caption", "caption", _captioned, resumes=True, loads=True),
        *(
            Verb(
                f"train {kind}", _TRAIN, "train", _trained, {"kind": kind}, _OF_TRAINING, _OF_TRAINED,
                ("checkpoints", "samples"), _check_training, resumes=True, loads=True,
            )
            for kind in ("text-to-image", "dreambooth")
        ),
        Verb(
            "generate", "weightops.diffusion.generate", "generate", _generated, fields=("images", "grid", "list"),
            several=("images",), check=_check_images, loads=True,
        ),
        Verb(
            "generate video", "weightops.diffusion.video", "generate_video", _filmed, fields=("videos",),
            several=("videos",), loads=True,
        ),
        Verb(
            "evaluate", "weightops.diffusion.evaluate", "evaluate", _evaluated,
            fields=("document", "page", "tables"), several=("tables",), loads=True,
        ),
        Verb("page", "weightops.diffusion.study_page", "page", _page),
    )
}  # fmt: skip
