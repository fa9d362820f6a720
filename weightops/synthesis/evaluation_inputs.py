"""What an evaluation of spaces is given: words checked, spaces opened, images found, and which parts follow.

Nothing is measured here, and no model is loaded.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.diffusion.findings import LeftOut
from weightops.errors import MismatchError, UsageError, listing, printable, quote
from weightops.synthesis.own_images import list_images
from weightops.synthesis.space import open_space
from weightops.synthesis.split import split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightops.synthesis.own_images import Listed
    from weightops.synthesis.space import Space

RECONSTRUCTION = "reconstruction"
LATENTS = "latents"
CONDITIONED = "from a condition"
COPIES = "copies of what was trained on"
LEARNT = "learnt from a few images"
SHOWN = "images of the synthesised LoRAs"

# What can be asked for by --methods, and of which parts it is.
METHODS = {
    "pca": "rows of factors",
    "delta": "ΔW itself",
    "vae-linear": "a linear VAE",
    "vae-mlp": "a VAE of two layers",
    "ridge": "ridge regression on the condition",
    "diffusion": "diffusion on the condition",
    "learned": "coefficients learnt from images",
    "plain": "LoRAs trained on the same images",
}


@dataclass(frozen=True, slots=True)
class Words:
    """What was asked for, beside the places of inputs; everything here decides about the numbers."""

    methods: tuple[str, ...]
    components: tuple[int, ...]
    latents: tuple[int, ...]
    betas: tuple[float, ...]
    conditioned: tuple[int, ...]
    seeds: int
    held_out: float
    measured: int
    pairs: int
    batch: int
    steps: int
    lr: float
    l2: float
    few_images: int
    learners: int
    plain_lrs: tuple[float, ...]
    vae_steps: int
    diffusion_steps: int
    generate: int
    shown: int
    strengths: tuple[float, ...]
    sampling_steps: int
    guidance: float
    prompt: str | None
    resolution: tuple[int, int] | None
    prediction: str | None

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def check_words(words: Words) -> None:
    """Raises UsageError."""
    unknown = [name for name in words.methods if name not in METHODS]
    if unknown:
        raise UsageError("--methods", f"found {listing(unknown)}, expected {', '.join(METHODS)}")
    counts = (
        ("--components", min(words.components, default=0)), ("--latents", min(words.latents, default=0)),
        ("--conditioned", min(words.conditioned, default=0)), ("--seeds", words.seeds), ("--measured", words.measured),
        ("--pairs", words.pairs), ("--batch", words.batch), ("--steps", words.steps),
        ("--few-images", words.few_images), ("--learners", words.learners), ("--vae-steps", words.vae_steps),
        ("--diffusion-steps", words.diffusion_steps), ("--shown", words.shown),
        ("--sampling-steps", words.sampling_steps),
    )  # fmt: skip
    for option, number in counts:
        if number < 1:
            raise UsageError(option, f"found {number}, expected 1 or more")
    if not words.plain_lrs or min(words.plain_lrs) <= 0:
        raise UsageError("--plain-lrs", f"found {listing(words.plain_lrs)}, expected numbers above 0")
    if not words.strengths or not all(map(math.isfinite, words.strengths)):
        raise UsageError("--strengths", f"found {listing(words.strengths)}, expected finite numbers")
    if not words.betas or min(words.betas) < 0:
        raise UsageError("--betas", f"found {listing(words.betas)}, expected numbers from 0 on")


@dataclass(frozen=True, slots=True)
class Asked:
    """spaces: the first is the one that everything is asked of; labels: of each its own. members: of the first space's
    names, the positions in each. splits: of each seed the trained and the measured held-out members of the first.

    images, few: of all measured members. parts: that are measured; left_out: the others.
    """

    spaces: Sequence[Space]
    labels: Sequence[str]
    members: Sequence[Sequence[int]]
    splits: Sequence[tuple[list[int], list[int]]]
    images: Listed | None
    few: Listed | None
    parts: Sequence[str]
    left_out: list[LeftOut]
    warnings: list[str]


def look(
    folders: Sequence[str], words: Words, *, model: str | None, images: str | None, few: str | None,
    embedder: str | None,
) -> Asked:  # fmt: skip
    """Open and find all that is given, and decide what is measured. Raises WeightopsError."""
    spaces = [open_space(folder) for folder in folders]
    labels, members = _labels(spaces), [_positions(spaces[0], space) for space in spaces]
    splits = [_split(spaces[0], words, seed) for seed in range(words.seeds)]
    measured = sorted({index for _, held in splits for index in held})
    names = [spaces[0].names[index] for index in measured]
    warnings: list[str] = []
    listed = [
        None if folder is None else list_images(folder, names, option=option, prompt=words.prompt, limit=limit)
        for folder, option, limit in ((images, "--images", None), (few, "--few", words.few_images))
    ]
    for found in listed:
        warnings += [] if found is None else found.warnings
    missing = _missing(spaces[0], words, model=model, images=images, few=few, embedder=embedder)
    parts = [part for part, needs in missing.items() if not needs]
    left_out = [LeftOut(part, needs) for part, needs in missing.items() if needs]
    if model is None or images is None:
        left_out.append(LeftOut("the gap of every LoRA", _needs(("--model", model), ("--images", images))))
    return Asked(spaces, labels, members, splits, listed[0], listed[1], parts, left_out, warnings)


def _missing(
    space: Space, words: Words, *, model: str | None, images: str | None, few: str | None, embedder: str | None
) -> dict[str, str]:
    """Of each part what it lacks, "" where it lacks nothing."""
    conditions = None if space.conditions is None else True
    functional = (("--model", model), ("--images", images))
    held = (f"conditions of {printable(space.label)} (collect it with --conditions)", conditions)
    found = {
        RECONSTRUCTION: "" if {"pca", "delta"} & set(words.methods) else "not asked for by --methods",
        LATENTS: _unless(words, ("vae-linear", "vae-mlp"), ""),
        CONDITIONED: _unless(words, ("ridge", "diffusion"), _needs(held)),
        COPIES: "",
        LEARNT: _unless(words, ("learned", "plain"), _needs(*functional, ("--few", few))),
        SHOWN: "not asked for: --generate N" if not words.generate else (
            _needs(*functional, ("--embedder", embedder), held)
        ),
    }  # fmt: skip
    return found


def _unless(words: Words, methods: Sequence[str], needs: str) -> str:
    return needs if set(methods) & set(words.methods) else "not asked for by --methods"


def _needs(*inputs: tuple[str, Any]) -> str:
    absent = [name for name, given in inputs if given is None]
    return f"needs {' and '.join(absent)}" if absent else ""


def _split(space: Space, words: Words, seed: int) -> tuple[list[int], list[int]]:
    trained, held = split(space, words.held_out, seed)
    if not held:
        raise UsageError("--held-out", f"of {len(space):,} LoRAs none is held out, and there is nothing to measure")
    if len(trained) < 3:
        raise UsageError(space.label, f"{len(trained)} LoRAs are left to learn from, expected 3 or more")
    return trained, held[: words.measured]


def _labels(spaces: Sequence[Space]) -> list[str]:
    """Names of folders; as they were typed where two are alike. Raises UsageError for a space twice."""
    names = [Path(space.label).resolve().name for space in spaces]
    count = Counter(names)
    found = [name if count[name] == 1 else space.label for name, space in zip(names, spaces, strict=True)]
    for label, times in Counter(found).items():
        if times > 1:
            raise UsageError("synth evaluate", f"found the space {quote(label)} twice")
    return found


def _positions(first: Space, space: Space) -> list[int]:
    """Where the first space's members are in this one. Raises MismatchError where it has others."""
    places = {name: index for index, name in enumerate(space.names)}
    lacking = [name for name in first.names if name not in places]
    if lacking or len(places) != len(first):
        what = f"found {len(places):,} LoRAs, of which {len(first) - len(lacking):,} are in {printable(first.label)}"
        hint = "spaces are compared on the same LoRAs: each of them collected from files of the same names"
        raise MismatchError(space.label, f"{what}, which has {len(first):,}", hint)
    return [places[name] for name in first.names]
