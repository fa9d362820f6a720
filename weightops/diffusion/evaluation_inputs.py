"""What an evaluation is given: its words checked, its images and LoRAs found, and which parts follow from them.

Nothing is measured here, and no model is loaded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.diffusion import drift as drifting
from weightops.diffusion import held_out as holding
from weightops.diffusion import image_pairs as pairing
from weightops.diffusion.adapter_norms import NORMS
from weightops.diffusion.axes import stem_of
from weightops.diffusion.compared import compared_of
from weightops.diffusion.dataset import read_examples
from weightops.diffusion.findings import LeftOut
from weightops.diffusion.generated_images import generated_of, hash_of
from weightops.diffusion.image_folder import slug
from weightops.diffusion.pictures import find_pictures
from weightops.errors import UsageError, listing, printable
from weightops.files.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightops.diffusion.compared import Compared
    from weightops.diffusion.dataset import Examples
    from weightops.diffusion.drift import Shown
    from weightops.diffusion.generated_images import Generated
    from weightops.diffusion.image_pairs import Pairs
    from weightops.diffusion.models import LoraName
    from weightops.diffusion.pictures import Picture

    Place = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Words:
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


def check_words(words: Words, loras: Sequence[LoraName]) -> None:
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
class Asked:
    """The inputs as they were found. parts: that are to be measured; left_out: the others."""

    real: Sequence[Picture]
    examples: Examples | None
    generated: Sequence[Generated]
    pairs: Pairs | None
    compared: Sequence[Compared]
    shown: Sequence[Shown]
    parts: Sequence[str]
    left_out: list[LeftOut]

    @property
    def pipeline(self) -> bool:
        """Do parts need the model to be loaded?"""
        return holding.HELD_OUT in self.parts or drifting.DRIFT in self.parts


def look(words: Words, loras: Sequence[LoraName], warnings: list[str]) -> Asked:
    """Look at all that is given, and decide what is measured. Raises WeightopsError."""
    compared = compared_of(loras)
    examples, uncaptioned = _examples(words, warnings)
    real: Sequence[Picture] = [] if examples is None else [e.picture for e in examples.examples]
    if words.folder is not None and examples is None:
        real = _real(words.folder, warnings)
    generated = generated_of(words.generated, warnings)
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
        pairing.LPIPS: "" if words.lpips else "not asked for: --lpips, beside DIR and --generated",
        pairing.CLIP: "" if words.clip else "not asked for: --clip MODEL, beside --generated of weightops generate",
        holding.HELD_OUT: uncaptioned or _needs(("DIR with captioned images", words.folder), ("--model", words.model)),
        NORMS: _needs(("--lora", compared)),
        drifting.DRIFT: "" if shown else "not asked for: --drift N, beside --model and --lora",
    }
    parts = [part for part, needs in missing.items() if not needs]
    if not parts:
        hint = "; ".join(f"{part}: {needs}" for part, needs in missing.items() if needs.startswith("needs"))
        raise UsageError("evaluate", "found nothing that can be measured with what is given", hint)
    left_out = [LeftOut(part, needs) for part, needs in missing.items() if needs]
    return Asked(real, examples, generated, pairs, compared, shown, parts, left_out)


def _needs(*inputs: tuple[str, Any]) -> str:
    absent = [name for name, given in inputs if not given]
    return f"needs {' and '.join(absent)}" if absent else ""


def _examples(words: Words, warnings: list[str]) -> tuple[Examples | None, str]:
    """The captioned images, or why there are none. Raises UsageError where the images are of no other use."""
    if words.folder is None or words.model is None:
        return None, ""
    try:
        found = read_examples(words.folder, where=words.folder)
    except UsageError as e:
        if not words.generated:
            raise
        return None, f"needs captions of DIR: {e.what}"
    warnings += found.warnings
    return found, ""


def _real(folder: str, warnings: list[str]) -> Sequence[Picture]:
    found = find_pictures(folder)
    if found.broken:
        names = listing(name for name, _ in found.broken)
        warnings.append(f"{printable(folder)}: broken images are left out: {names}")
    return found.pictures


def name_of(words: Words, asked: Asked) -> str:
    """What the folder is called where nobody says it."""
    given = [*words.generated, words.folder or words.model or ""]
    return f"{slug(asked.compared[0].run if asked.compared else stem_of(given[0]), 80)}-evaluation"


def inputs_of(words: Words, asked: Asked) -> list[dict[str, Any]]:
    """Images by the hash of names and bytes; files without one yet. A model that is not there is refused."""
    found: list[dict[str, Any]] = []
    if words.folder is not None:
        found.append(_of_images(words.folder, asked.real))
    found += [
        _of_images(place, [p for row in asked.generated if row.folder == place for p in row.pictures])
        for place in words.generated
    ]
    used = [words.model, words.vae, *dict.fromkeys(one.file for one in asked.compared)]
    files = [os.fspath(label) for label in used if label is not None]
    return found + [{"path": file, "hash": None, "bytes": _nbytes(file)} for file in files]


def _of_images(place: str, pictures: Sequence[Picture]) -> dict[str, Any]:
    return {"path": place, "hash": hash_of(pictures), "bytes": sum(picture.nbytes for picture in pictures)}


def _nbytes(label: str) -> int | None:
    if label.startswith("hf://") or label.lower().endswith((".yaml", ".yml")):
        return None
    with open_checkpoint(label) as opened:
        return opened.nbytes
