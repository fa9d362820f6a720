"""synth evaluate: what a space of LoRAs can and cannot do, on LoRAs that were held out, each number by its baseline."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion.evaluation_folder import said
from weightops.diffusion.extras import need
from weightops.diffusion.models import load
from weightops.diffusion.threads import one_thread, weights_of
from weightops.diffusion.training_words import resolution_of
from weightops.errors import UsageError
from weightops.ops.report import peak_memory_bytes
from weightops.synthesis import evaluation_conditioned as conditioned
from weightops.synthesis import evaluation_latents as latent
from weightops.synthesis import evaluation_learnt as learnt
from weightops.synthesis import evaluation_reconstruction as reconstruction
from weightops.synthesis import evaluation_shown as shown_images
from weightops.synthesis.embedders import embedder_of
from weightops.synthesis.evaluation_bench import Bench
from weightops.synthesis.evaluation_cells import Cells
from weightops.synthesis.evaluation_folder import begin, write
from weightops.synthesis.evaluation_inputs import (
    CONDITIONED,
    COPIES,
    LATENTS,
    LEARNT,
    METHODS,
    RECONSTRUCTION,
    SHOWN,
    Words,
    check_words,
    look,
)
from weightops.synthesis.evaluation_measures import Gaps
from weightops.synthesis.fit_images import L2, LR, STEPS, check_dtype
from weightops.synthesis.gap import changes_texts, check_base
from weightops.synthesis.own_images import OwnImages
from weightops.synthesis.pca import DEFAULT_MEMORY

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from weightops.diffusion.findings import Finding, LeftOut
    from weightops.diffusion.models import Loaded
    from weightops.diffusion.tables import Table
    from weightops.synthesis.evaluation_cells import Cell, Told
    from weightops.synthesis.evaluation_inputs import Asked
    from weightops.synthesis.own_images import Listed

    Place = str | os.PathLike[str]


@dataclass(slots=True)
class EvaluateReport:
    """What was measured, and what not. output: the folder; files: in it, by name.

    cells: pieces that were measured, of which so many were `taken` from an evaluation that was broken off.
    """

    output: str
    inputs: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    cells: int = 0
    taken: int = 0
    files: list[str] = field(default_factory=list)
    device: str = ""
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
            "command": "synth evaluate",
            "version": __version__,
            "inputs": self.inputs,
            "output": self.output,
            **said(self.findings, self.left_out),
            "cells": self.cells,
            "taken": self.taken,
            "files": self.files,
            "device": self.device,
            "bytes_written": self.bytes_written,
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": self.peak_memory_bytes,
            "warnings": self.warnings,
            "dry_run": self.dry_run,
        }


def unseen(_done: int, _total: int, _what: str) -> None:
    """No progress is shown."""


def evaluate(
    spaces: Place | Sequence[Place],
    *,
    model: Place | None = None,
    images: Place | None = None,
    few: Place | None = None,
    embedder: Place | None = None,
    methods: Sequence[str] = tuple(METHODS),
    components: Sequence[int] = (8, 16, 64, 128),
    latents: Sequence[int] = (8, 16),
    betas: Sequence[float] = (1.0, 0.01),
    conditioned: Sequence[int] = (16, 64),
    seeds: int = 3,
    held_out: float = 0.2,
    measured: int = 64,
    pairs: int = 4,
    batch: int = 128,
    steps: int = STEPS,
    lr: float = LR,
    l2: float = L2,
    few_images: int = 4,
    learners: int = 16,
    plain_lrs: Sequence[float] = (5e-3, 1e-2, 2e-2, 4e-2),
    vae_steps: int = 1000,
    diffusion_steps: int = 2000,
    generate: int = 0,
    shown: int = 16,
    strengths: Sequence[float] = (1.0,),
    sampling_steps: int = 25,
    guidance: float = 1.0,
    prompt: str | None = None,
    resolution: str | int | tuple[int, int] | None = None,
    prediction: str | None = None,
    vae: Place | None = None,
    like: Place | None = None,
    output: Place | None = None,
    memory: int = DEFAULT_MEMORY,
    device: str = "auto",
    model_dtype: str = "fp32",
    force: bool = False,
    dry_run: bool = False,
    on_progress: Told = unseen,
) -> EvaluateReport:
    """Measure what the inputs are given for, over several seeds, and write tables, plots and a page to a folder.

    spaces: one or more, of the same LoRAs; the first is asked everything, the others are compared with it in how well
    their components make held-out LoRAs. Each seed has a split of its own (`held_out`: a share, or so many; at most
    `measured` of these are measured), and everything is fitted anew, in memory.

    With `model` (as for `weightops.diffusion.models.load`, with vae, like, prediction, device, model_dtype) and
    `images` (a folder for each LoRA, of images that it was not trained on) the gap is measured, at `pairs` of a
    timestep and a noise for each image, `batch` samples at once. few: images to learn from, `few_images` each, by
    `learners` LoRAs a seed, in `steps` steps: coefficients at `lr` with the prior `l2`, plain LoRAs at `plain_lrs`.
    generate: images of each of `shown` LoRAs, at each of `strengths`, which `embedder` compares with the condition.

    methods: of METHODS. components: of PCA and of ΔW; latents, betas: of VAEs; conditioned: components that are
    predicted from a condition, or learnt. memory: of fits, in bytes. output: a folder (None: of the first space's
    name); an evaluation that was broken off goes on there, and a finished one is replaced with `force`; what was
    measured from the same is not measured again. Raises WeightopsError.
    """
    started = time.perf_counter()
    need("synth evaluate", "torch", "PIL", "matplotlib", extra="synthesis")
    words = Words(
        tuple(methods), tuple(components), tuple(latents), tuple(betas), tuple(conditioned), seeds, held_out, measured,
        pairs, batch, steps, lr, l2, few_images, learners, tuple(plain_lrs), vae_steps, diffusion_steps, generate,
        shown, tuple(strengths), sampling_steps, guidance, prompt, resolution_of(resolution), prediction,
    )  # fmt: skip
    check_words(words)
    check_dtype(model_dtype)
    folders = [os.fspath(spaces)] if isinstance(spaces, str | os.PathLike) else [os.fspath(one) for one in spaces]
    if not folders:
        raise UsageError("synth evaluate", "found no space, expected one or more")
    places = {"model": _path(model), "images": _path(images), "few": _path(few), "embedder": _path(embedder)}
    asked = look(folders, words, **places)
    target = Path(f"{asked.labels[0]}-evaluation" if output is None else output)
    report = EvaluateReport(
        str(target), [{"path": place, "hash": None} for place in (*folders, *filter(None, places.values()))],
        left_out=asked.left_out, warnings=list(asked.warnings), dry_run=dry_run,
    )  # fmt: skip
    begin(target, [*folders, *filter(None, places.values())], force=force, dry_run=dry_run)
    if not asked.parts:
        raise UsageError("synth evaluate", "found nothing that can be measured with what is given")
    bench = Bench(words, asked, memory)
    if SHOWN in asked.parts:
        bench.embedder = embedder_of(str(places["embedder"]))
        shown_images.check_embedder(bench.embedder, asked.spaces[0].condition_names)
    if dry_run:
        report.cells = len(list(_cells(bench)))
        return report
    first, weights = asked.spaces[0], 0
    if model is not None and asked.images is not None:
        loaded = load(
            model, where="synth evaluate", vae=vae, like=like, device=device, dtype=model_dtype,
            prediction=prediction if prediction in ("epsilon", "v_prediction") else None,
        )  # fmt: skip
        weights = weights_of(loaded.pipe)
        with one_thread(weights):
            _with_model(bench, loaded, report)
    cells = Cells(target, {"pairs": pairs, "prompt": prompt})
    todo = list(_cells(bench))
    with one_thread(max(weights, len(first) * first.width)):
        cells.measure(todo, on_progress)
    report.cells, report.taken = len(todo), cells.taken
    report.findings = [finding(bench, cells) for part, finding in _FINDINGS.items() if part in asked.parts]
    written = write(
        target, report.findings, report.left_out, words=words.to_dict(), inputs=report.inputs,
        facts=_facts(asked, words, report), warnings=report.warnings,
        packages=["torch", *(["diffusers", "transformers"] if bench.gaps is not None else [])],
    )  # fmt: skip
    report.files, report.bytes_written = sorted(written), sum(written.values())
    report.seconds, report.peak_memory_bytes = time.perf_counter() - started, peak_memory_bytes()
    return report


_FINDINGS = {
    RECONSTRUCTION: reconstruction.finding,
    LATENTS: latent.finding,
    CONDITIONED: conditioned.finding,
    COPIES: conditioned.copies,
    LEARNT: learnt.finding,
    SHOWN: shown_images.finding,
}


def _path(place: Place | None) -> str | None:
    return None if place is None else os.fspath(place)


def _with_model(bench: Bench, loaded: Loaded, report: EvaluateReport) -> None:
    """What the model takes part in: images encoded, and what decides about their losses said."""
    asked, words = bench.asked, bench.words
    first = asked.spaces[0]
    check_base(first.label, first.layout, loaded)
    assert asked.images is not None

    def encoded(listed: Listed) -> OwnImages:
        return OwnImages(
            loaded, listed, resolution=words.resolution, prediction=words.prediction,
            keep_texts=not changes_texts(first.layout),
        )  # fmt: skip

    own = encoded(asked.images)
    bench.gaps = Gaps(own, first.layout, first, words.pairs, 0, words.batch)
    if LEARNT in asked.parts and asked.few is not None:
        bench.few = encoded(asked.few)
    bench.told = {
        "model": sorted(loaded.hashes.values()), "resolution": list(own.resolution), "kind": own.objective.kind,
        "device": loaded.device.type, "dtype": str(loaded.dtype),
    }  # fmt: skip
    report.device = str(loaded.device)
    report.warnings += [*loaded.warnings, *own.warnings]
    report.inputs += [{"path": name, "hash": hashed} for name, hashed in loaded.hashes.items()]


def _cells(bench: Bench) -> Iterator[Cell]:
    """Of all parts, seed by seed: what is fitted within a seed serves all of them."""
    parts = bench.asked.parts
    for seed in range(bench.words.seeds):
        if RECONSTRUCTION in parts:
            yield from reconstruction.cells(bench, seed)
        if LATENTS in parts:
            yield from latent.cells(bench, seed)
        yield from conditioned.cells(bench, seed)
        if SHOWN in parts:
            yield from shown_images.cells(bench, seed)
        if LEARNT in parts:
            yield from learnt.cells(bench, seed)


def _facts(asked: Asked, words: Words, report: EvaluateReport) -> list[tuple[str, str]]:
    """What the page says at its top: names, and no places."""
    first = asked.spaces[0]
    trained, held = asked.splits[0]
    return [
        ("spaces", ", ".join(asked.labels)),
        ("LoRAs", f"{len(first):,}, of {first.width:,} numbers in {len(first.layout.modules):,} modules"),
        ("split", f"{len(trained):,} learnt from, {len(held):,} held out and measured, anew for each seed"),
        ("seeds", f"{words.seeds}"),
        ("conditions", ", ".join(first.condition_names[:12]) or "none"),
        ("measured on", report.device or "no model: weights alone"),
    ]
