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
from weightops.diffusion.adapter_norms import adapter_norms
from weightops.diffusion.axes import stem_of
from weightops.diffusion.evaluation_folder import check_place, document_of, files_of, said, write_folder
from weightops.diffusion.evaluation_inputs import Words, check_words, inputs_of, look, name_of
from weightops.diffusion.extras import need
from weightops.diffusion.findings import with_each
from weightops.diffusion.held_out import held_out_score
from weightops.diffusion.image_records import digest_of, versions_of
from weightops.diffusion.models import load
from weightops.diffusion.trained_images import trained_on
from weightops.diffusion.training_words import resolution_of
from weightops.engine.run import Progress, ignore
from weightops.files.checkpoint import open_checkpoint
from weightops.naming.identify import identify
from weightops.ops.report import peak_memory_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightops.diffusion.evaluation_inputs import Asked
    from weightops.diffusion.findings import Finding, LeftOut, Measure
    from weightops.diffusion.models import Loaded, LoraName
    from weightops.diffusion.tables import Table

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
    folder: str | os.PathLike[str] | None = None,
    *,
    generated: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    model: str | os.PathLike[str] | None = None,
    loras: Sequence[LoraName] = (),
    vae: str | os.PathLike[str] | None = None,
    like: str | os.PathLike[str] | None = None,
    pairs: int = 8,
    resolution: str | int | tuple[int, int] | None = None,
    batch: int = 4,
    seed: int = 0,
    trained_on: str | os.PathLike[str] | None = None,
    drift: int | None = None,
    drift_prompts: str | os.PathLike[str] | None = None,
    prompt: str | Sequence[str] = (),
    steps: int | None = None,
    guidance: float | None = None,
    clip: str | None = None,
    lpips: bool = False,
    prediction: str | None = None,
    output: str | os.PathLike[str] | None = None,
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
    words = Words(
        _path(folder), [os.fspath(place) for place in places], _path(model), vae, like,
        holding.Fixed(pairs, seed, resolution_of(resolution), batch, prediction), _path(trained_on), drift,
        _path(drift_prompts), [prompt] if isinstance(prompt, str) else list(prompt), steps, guidance, clip, lpips,
        device, dtype,
    )  # fmt: skip
    need("evaluate", "PIL", "matplotlib")
    check_words(words, loras)
    report = EvaluateReport("", dry_run=dry_run)
    asked = look(words, loras, report.warnings)
    report.left_out = asked.left_out
    target = Path(name_of(words, asked) if output is None else output)
    report.output = str(target)
    given = [place for place in (words.folder, *words.generated, words.model, words.trained_on) if place is not None]
    check_place(target, [*given, *(one.file for one in asked.compared)], force=force)
    report.inputs = inputs_of(words, asked)
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


# ------------------------------------------------------------------------------------------------ measuring


def _path(place: str | os.PathLike[str] | None) -> str | None:
    return None if place is None else os.fspath(place)


def _summary(parts: Sequence[str], left_out: Sequence[LeftOut], verb: str) -> str:
    text = f"{verb} {', '.join(parts)}"
    return text + (f"; left out {', '.join(left.part for left in left_out)}" if left_out else "")


class _Run:
    """All parts, one after the other; what can be refused quickly comes before what takes long."""

    def __init__(self, words: Words, asked: Asked, report: EvaluateReport, on_progress: Progress) -> None:
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
        loaded = self._load() if asked.pipeline or (_is_recipe(words.model) and asked.compared) else None
        norms = self._norms(loaded) if asked.compared else None
        if words.lpips:
            pairing.check_lpips()
        if asked.pairs is not None:
            self._add(pairing.pixel_likeness(asked.pairs, asked.generated, self.tick))
            if words.lpips:
                self._add(pairing.perceptual_distance(asked.pairs, asked.generated, self.tick, device=words.device))
        if words.clip is not None:
            self._add(pairing.prompt_similarity(asked.generated, words.clip, self.tick, device=words.device))
        measures: list[Measure] = []
        if asked.examples is not None and loaded is not None:
            self.report.warnings += trained_on(asked.examples, asked.compared, words.trained_on)
            measures.append(
                holding.HeldOutLoss(loaded, asked.examples, asked.compared, words.fixed, self.tick)
            )  # fmt: skip
        if asked.shown and loaded is not None:
            measures.append(drifting.Drift(loaded, asked.compared, asked.shown, self.tick))
        found = with_each(loaded, asked.compared, measures) if loaded is not None and measures else []
        for finding in (*found[:1], *([] if norms is None else [norms]), *found[1:]):
            self._add(finding)
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


def _facts(words: Words, asked: Asked) -> list[tuple[str, str]]:
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
