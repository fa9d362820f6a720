"""evaluate: what a LoRA or a training run has learnt, as far as numbers can say it, each with what it cannot say."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion import drift as drifting
from weightops.diffusion import held_out as holding
from weightops.diffusion import image_pairs as pairing
from weightops.diffusion.adapter_norms import NORMS, adapter_norms
from weightops.diffusion.axes import stem_of
from weightops.diffusion.compared import compared_of
from weightops.diffusion.dataset import read_examples
from weightops.diffusion.evaluation_folder import check_place, document_of, files_of, said, write_folder
from weightops.diffusion.extras import need
from weightops.diffusion.findings import LeftOut
from weightops.diffusion.generated_images import generated_of, hash_of
from weightops.diffusion.held_out import held_out_score
from weightops.diffusion.image_records import digest_of, versions_of
from weightops.diffusion.models import load
from weightops.diffusion.pictures import find_pictures
from weightops.diffusion.training_words import resolution_of
from weightops.engine.run import Progress, ignore
from weightops.errors import UsageError, printable
from weightops.files.checkpoint import open_checkpoint
from weightops.naming.identify import identify
from weightops.ops.report import peak_memory_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightops.diffusion.compared import Compared
    from weightops.diffusion.dataset import Examples
    from weightops.diffusion.drift import Shown
    from weightops.diffusion.findings import Finding
    from weightops.diffusion.generated_images import Generated
    from weightops.diffusion.image_pairs import Pairs
    from weightops.diffusion.models import Loaded, LoraName
    from weightops.diffusion.pictures import Picture
    from weightops.diffusion.tables import Table

    Place = str | os.PathLike[str]

__all__ = ["EvaluateReport", "evaluate", "held_out_score"]


@dataclass(slots=True)
class EvaluateReport:
    """What was measured, and what was not. output: the folder; files: in it, by name.

    findings: the parts in their order, with tables, drawings, and what their numbers can and cannot say.
    """

    output: str
    inputs: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    summary: str = ""
    files: list[str] = field(default_factory=list)
    device: str = ""
    dtype: str = ""
    bytes_written: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    warnings: list[str] = field(default_factory=list)
    dry_run: bool = False

    @property
    def tables(self) -> dict[str, Table]:
        """All tables, by the names of their files."""
        return {name: table for finding in self.findings for name, table in finding.tables.items()}

    def to_dict(self) -> dict[str, Any]:
        """The JSON document that scripts may rely on."""
        return {
            "command": "evaluate",
            "version": __version__,
            "inputs": self.inputs,
            "output": self.output,
            "bytes_written": self.bytes_written,
            "summary": self.summary,
            **said(self.findings, self.left_out),
            "files": self.files,
            "device": self.device,
            "dtype": self.dtype,
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": self.peak_memory_bytes,
            "warnings": self.warnings,
            "dry_run": self.dry_run,
        }


def evaluate(
    folder: Place | None = None,
    *,
    generated: Place | Sequence[Place] = (),
    model: Place | None = None,
    loras: Sequence[LoraName] = (),
    vae: Place | None = None,
    like: Place | None = None,
    pairs: int = 8,
    resolution: str | int | tuple[int, int] | None = None,
    batch: int = 4,
    seed: int = 0,
    trained_on: Place | None = None,
    drift: int | None = None,
    drift_prompts: Place | None = None,
    prompt: str | Sequence[str] = (),
    steps: int | None = None,
    guidance: float | None = None,
    clip: str | None = None,
    lpips: bool = False,
    prediction: str | None = None,
    output: Place | None = None,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    dry_run: bool = False,
    on_progress: Progress = ignore,
) -> EvaluateReport:
    """Measure what the words give the inputs for, and write tables, plots and a page to a folder.

    folder: real images; with captions, for the held-out loss, images that were not trained on. generated: folders of
    images to compare with them, one or more, a grid of `generate` among them. model, vae, like, prediction, device,
    dtype: as for `weightops.diffusion.models.load`. loras: files with or without strengths, each measured alone; or the
    folder of a training run, for all of its checkpoints.

    Held-out loss: pairs of a timestep and a noise for each image, drawn from `seed`; resolution: "512" or "768x512"
    (None: the architecture's); batch: images at once; trained_on: a folder of images that were trained on, so that
    those that are among `folder`'s are named. Drift, which is measured where `drift` (images of each prompt) or
    `drift_prompts` (a file, as for `generate`) is given: prompt: of the subject, to compare with; steps, guidance: of
    sampling. clip: a CLIP model, for the similarity of generated images and their prompts. lpips: with that distance.

    output: a folder, which appears whole (None: a name made of the inputs'); force: in place of an earlier evaluation.
    The same words on the same files give the same bytes. Raises WeightopsError.
    """
    started = time.perf_counter()
    places = [generated] if isinstance(generated, str | os.PathLike) else list(generated)
    words = _Words(
        None if folder is None else os.fspath(folder), [os.fspath(place) for place in places],
        None if model is None else os.fspath(model), vae, like,
        holding.Fixed(pairs, seed, resolution_of(resolution), batch, prediction),
        None if trained_on is None else os.fspath(trained_on), drift,
        None if drift_prompts is None else os.fspath(drift_prompts), [prompt] if isinstance(prompt, str) else list(prompt),
        steps, guidance, clip, lpips, device, dtype,
    )  # fmt: skip
    need("evaluate", "PIL", "matplotlib")
    _check(words, loras)
    report = EvaluateReport("", dry_run=dry_run)
    asked = _asked(words, loras, report)
    target = Path(output) if output is not None else Path(_name(words, loras))
    report.output = str(target)
    given = [place for place in (words.folder, *words.generated, words.model, words.trained_on) if place is not None]
    check_place(target, [*given, *(one.file for one in asked.compared)], force=force)
    report.inputs = _inputs(words, asked)
    if dry_run:
        report.summary = _summary(asked.parts, report.left_out, "would measure")
        return report
    _Run(words, asked, report, on_progress).measure()
    report.summary = _summary([f.part for f in report.findings], report.left_out, "measured")
    packages = ["torch", "pillow", *(["diffusers", "transformers"] if asked.pipeline else [])]
    packages += ["peft"] if asked.pipeline and asked.compared else []
    document = document_of(
        report.findings, report.left_out, words.to_dict(), report.inputs, report.warnings, versions_of(*packages)
    )  # fmt: skip
    files = files_of(report.findings, report.left_out, document, _facts(words, asked), report.warnings)
    report.bytes_written = write_folder(target, files, force=force)
    report.files = sorted(files)
    report.seconds = time.perf_counter() - started
    report.peak_memory_bytes = peak_memory_bytes()
    return report


# ------------------------------------------------------------------------------------------------ words


@dataclass(frozen=True, slots=True)
class _Words:
    """What was asked for, beside the LoRAs."""

    folder: str | None
    generated: Sequence[str]
    model: str | None
    vae: Place | None
    like: Place | None
    fixed: holding.Fixed
    trained_on: str | None
    drift: int | None
    drift_prompts: str | None
    prompts: Sequence[str]
    steps: int | None
    guidance: float | None
    clip: str | None
    lpips: bool
    device: str
    dtype: str

    @property
    def drifts(self) -> bool:
        return self.drift is not None or self.drift_prompts is not None

    def to_dict(self) -> dict[str, Any]:
        """What decides the numbers, and is no input."""
        size = None if self.fixed.resolution is None else list(self.fixed.resolution)
        return {
            "pairs": self.fixed.pairs, "seed": self.fixed.seed, "resolution": size, "batch": self.fixed.batch,
            "prediction": self.fixed.prediction, "drift": self.drift, "steps": self.steps, "guidance": self.guidance,
            "lpips": self.lpips, "dtype": self.dtype,
        }  # fmt: skip


def _check(words: _Words, loras: Sequence[LoraName]) -> None:
    """Refuse words that ask for a part whose inputs are not there, or that would do nothing. Raises UsageError."""
    holding.check_fixed(words.fixed)
    if words.drift is not None and words.drift < 1:
        raise UsageError("--drift", f"found {words.drift}, expected 1 or more images of each prompt")
    if words.drifts and (words.model is None or not loras):
        raise UsageError("--drift", "needs a --model and a --lora to compare it with")
    for option, given in (
        ("--prompt", bool(words.prompts)), ("--steps", words.steps is not None),
        ("--guidance", words.guidance is not None),
    ):  # fmt: skip
        if given and not words.drifts:
            raise UsageError(option, "is of the images of --drift, which is not asked for", "--drift 1 does")
    if words.clip is not None and not words.generated:
        raise UsageError("--clip", "needs --generated FOLDER, of weightops generate")
    if words.lpips and (words.folder is None or not words.generated):
        raise UsageError("--lpips", "needs DIR with real images, and --generated FOLDER")
    if words.trained_on is not None and (words.folder is None or words.model is None):
        raise UsageError("--trained-on", "needs DIR and --model: it is for the held-out loss")


@dataclass(frozen=True, slots=True)
class _Asked:
    """The inputs as they were found. pipeline: do parts need the model as one? parts: that are to be measured."""

    real: Sequence[Picture]
    examples: Examples | None
    generated: Sequence[Generated]
    pairs: Pairs | None
    compared: Sequence[Compared]
    shown: Sequence[Shown]
    parts: Sequence[str]

    @property
    def pipeline(self) -> bool:
        return holding.HELD_OUT in self.parts or drifting.DRIFT in self.parts


def _asked(words: _Words, loras: Sequence[LoraName], report: EvaluateReport) -> _Asked:
    """Look at all that is given, and decide what is measured. Raises WeightopsError."""
    compared = compared_of(loras)
    examples, uncaptioned = _examples(words, report)
    real: Sequence[Picture] = [] if examples is None else [e.picture for e in examples.examples]
    if words.folder is not None and examples is None:
        real = _real(words.folder, report)
    generated = generated_of(words.generated, report.warnings)
    if words.clip is not None:
        pairing.check_prompts(generated)
    pairs = None
    if words.folder is not None and generated:
        pairs = pairing.paired(real, generated, words.folder)
        for part in (pairing.PSNR_SSIM, *([pairing.LPIPS] if words.lpips else [])):
            pairing.check_sizes(pairs, part)
    shown: list[Shown] = []
    if words.drifts:
        size = None if words.fixed.resolution is None else (words.fixed.resolution[1], words.fixed.resolution[0])
        shown = drifting.shown_of(
            words.prompts, words.drift_prompts, images=words.drift or 1, seed=words.fixed.seed, steps=words.steps,
            guidance=words.guidance, size=size,
        )  # fmt: skip
    missing = {
        pairing.PSNR_SSIM: _needs(("DIR with real images", real), ("--generated FOLDER", generated)),
        pairing.LPIPS: "" if words.lpips else "asks for it: --lpips, with DIR and --generated",
        pairing.CLIP: "" if words.clip else "asks for it: --clip MODEL, with --generated of weightops generate",
        holding.HELD_OUT: uncaptioned or _needs(("DIR with captioned images", examples), ("--model", words.model)),
        NORMS: _needs(("--lora", compared)),
        drifting.DRIFT: "" if shown else "asks for it: --drift N, with --model and --lora",
    }
    parts = [part for part, needs in missing.items() if not needs]
    if not parts:
        hint = "; ".join(f"{part}: {needs}" for part, needs in missing.items())
        raise UsageError("evaluate", "found nothing that can be measured with what is given", hint)
    report.left_out = [LeftOut(part, needs) for part, needs in missing.items() if needs]
    return _Asked(real, examples, generated, pairs, compared, shown, parts)


def _needs(*inputs: tuple[str, Any]) -> str:
    absent = [name for name, given in inputs if not given]
    return f"needs {' and '.join(absent)}" if absent else ""


def _examples(words: _Words, report: EvaluateReport) -> tuple[Examples | None, str]:
    """The captioned images, or why there are none though they could be of use. Raises UsageError where only they are."""
    if words.folder is None or words.model is None:
        return None, ""
    try:
        found = read_examples(words.folder, where=words.folder)
    except UsageError as e:
        if not words.generated:
            raise
        return None, f"needs captions of DIR: {e.what}"
    report.warnings += found.warnings
    return found, ""


def _real(folder: str, report: EvaluateReport) -> Sequence[Picture]:
    found = find_pictures(folder)
    if found.broken:
        names = ", ".join(f"{name!r} ({reason})" for name, reason in found.broken[:5])
        report.warnings.append(f"{printable(folder)}: broken images are left out: {printable(names)}")
    return found.pictures


def _name(words: _Words, loras: Sequence[LoraName]) -> str:
    """What the folder is called where nobody says it."""
    first = loras[0] if loras else words.generated[0] if words.generated else words.folder or words.model or ""
    label = os.fspath(first[0] if isinstance(first, tuple) else first)
    return f"{stem_of(label.rpartition(':')[0] if loras and ':' in stem_of(label) else label)[:80]}-evaluation"


def _summary(parts: Sequence[str], left_out: Sequence[LeftOut], verb: str) -> str:
    text = f"{verb} {', '.join(parts)}"
    return text + (f"; left out {', '.join(left.part for left in left_out)}" if left_out else "")


def _inputs(words: _Words, asked: _Asked) -> list[dict[str, Any]]:
    """Images by the hash of names and bytes; files without one yet. A model that is not there is refused."""
    found: list[dict[str, Any]] = []
    if words.folder is not None:
        found.append(_of_images(words.folder, asked.real))
    for place in words.generated:
        found.append(_of_images(place, [p for row in asked.generated if row.folder == place for p in row.pictures]))
    for label in [words.model, words.vae, *dict.fromkeys(one.file for one in asked.compared)]:
        if label is not None:
            found.append({"path": os.fspath(label), "hash": None, "bytes": _nbytes(os.fspath(label))})
    return found


def _of_images(place: str, pictures: Sequence[Picture]) -> dict[str, Any]:
    return {"path": place, "hash": hash_of(pictures), "bytes": sum(picture.nbytes for picture in pictures)}


def _nbytes(label: str) -> int | None:
    if label.startswith("hf://") or label.lower().endswith((".yaml", ".yml")):
        return None
    with open_checkpoint(label) as opened:
        return opened.nbytes


# ------------------------------------------------------------------------------------------------ measuring


class _Run:
    """All parts, one after the other; what can be refused quickly comes before what takes long."""

    def __init__(self, words: _Words, asked: _Asked, report: EvaluateReport, on_progress: Progress) -> None:
        self.words, self.asked, self.report = words, asked, report
        self._on_progress = on_progress
        self._done, self._total = 0, self._work()

    def _work(self) -> int:
        """Images compared, images through the network, images sampled: not alike in time, but a measure of it."""
        words, asked = self.words, self.asked
        several = 1 + len(asked.compared)
        pairs = 0 if asked.pairs is None else len(asked.pairs.real) * (1 + words.lpips)
        clip = sum(len(row.pictures) for row in asked.generated) if words.clip else 0
        examples = 0 if asked.examples is None else len(asked.examples.examples)
        held = examples * (1 + words.fixed.pairs * several)
        return pairs + clip + held + len(asked.compared) + len(asked.shown) * several

    def tick(self, count: int) -> None:
        self._done += count
        self._on_progress(self._done, self._total)

    def measure(self) -> None:
        """Raises WeightopsError."""
        words, asked = self.words, self.asked
        loaded = self._load() if asked.pipeline or _is_recipe(words.model) and asked.compared else None
        norms = self._norms(loaded) if asked.compared else None
        if words.lpips:
            pairing.check_lpips()
        if asked.pairs is not None:
            self._add(pairing.pixel_likeness(asked.pairs, asked.generated, self.tick))
            if words.lpips:
                self._add(pairing.perceptual_distance(asked.pairs, asked.generated, self.tick, device=words.device))
        if words.clip is not None:
            self._add(pairing.prompt_similarity(asked.generated, words.clip, self.tick, device=words.device))
        if asked.examples is not None and loaded is not None:
            self.report.warnings += holding.trained_on(asked.examples, asked.compared, words.trained_on)
            self._add(holding.held_out(loaded, asked.examples, asked.compared, words.fixed, self.tick))
        if norms is not None:
            self._add(norms)
        if asked.shown and loaded is not None:
            self._add(drifting.drift(loaded, asked.compared, asked.shown, self.tick))
        if loaded is not None:
            self.report.warnings += [text for text in loaded.warnings if text not in self.report.warnings]
        self._hash(loaded)

    def _add(self, finding: Finding) -> None:
        self.report.findings.append(finding)
        self.report.warnings += [text for text in finding.warnings if text not in self.report.warnings]

    def _load(self) -> Loaded:
        words, asked = self.words, self.asked
        assert words.model is not None
        known = words.fixed.prediction if words.fixed.prediction in ("epsilon", "v_prediction") else None
        loaded = load(
            words.model, where="evaluate", vae=words.vae, like=words.like, device=words.device, dtype=words.dtype,
            prediction=known,
        )  # fmt: skip
        if asked.examples is not None:
            holding.check_model(loaded, words.fixed)
        if asked.shown:
            drifting.check_model(loaded, asked.shown)
        self.report.device, self.report.dtype = str(loaded.device), str(loaded.dtype).removeprefix("torch.")
        return loaded

    def _norms(self, loaded: Loaded | None) -> Finding:
        """For norms alone no pipeline is made: the weights suffice."""
        if loaded is not None:
            return adapter_norms(self.asked.compared, loaded.source, loaded.architecture, self.tick)
        model = self.words.model
        architecture = None
        if model is not None:
            with open_checkpoint(model) as opened:
                architecture = identify(opened.tensors).architecture
        return adapter_norms(self.asked.compared, model, architecture, self.tick)

    def _hash(self, loaded: Loaded | None) -> None:
        """The hashes of the files that were read, into the report."""
        hashes = {} if loaded is None else dict(loaded.hashes)
        for entry in self.report.inputs:
            if entry["hash"] is not None:
                continue
            path = str(entry["path"])
            entry["hash"] = hashes.pop(path.rstrip("/").rpartition("/")[2], None)
            if entry["hash"] is None and entry["bytes"] is not None:
                digest = digest_of(path)
                entry["hash"] = None if digest is None else digest.hash
        known = {entry["hash"] for entry in self.report.inputs}
        self.report.inputs += [
            {"path": name, "hash": hashed, "bytes": None} for name, hashed in hashes.items() if hashed not in known
        ]


def _is_recipe(model: str | None) -> bool:
    return model is not None and model.lower().endswith((".yaml", ".yml"))


def _facts(words: _Words, asked: _Asked) -> list[tuple[str, str]]:
    """What the page says at its top: names, and no places."""
    rows = []
    if words.model is not None:
        rows.append(("model", stem_of(words.model)))
    if asked.compared:
        rows.append(("LoRAs", ", ".join(one.label for one in asked.compared)))
    if asked.real:
        rows.append(("real images", f"{len(asked.real):,}"))
    if asked.generated:
        rows.append(("generated images", ", ".join(f"{row.label}: {len(row.pictures):,}" for row in asked.generated)))
    return rows
