"""Drift: how far a LoRA moves images that it has nothing to do with, from the same seeds, beside its own subject's."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from weightops.diffusion.compared import curves
from weightops.diffusion.figures import curve
from weightops.diffusion.findings import Finding
from weightops.diffusion.image_pairs import PSNR_SSIM, SMALLEST
from weightops.diffusion.metrics import psnr, ssim
from weightops.diffusion.page import Drawing
from weightops.diffusion.prompts import Prompt, checked, read_prompts
from weightops.diffusion.sampling import Sampling
from weightops.diffusion.tables import Table
from weightops.errors import UsageError, listing, printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from PIL.Image import Image

    from weightops.diffusion.compared import Compared
    from weightops.diffusion.findings import Tick
    from weightops.diffusion.models import Loaded
    from weightops.diffusion.tables import Cell

DRIFT = "drift"
# Plain things of different kinds, of which hardly a LoRA is one.
PROMPTS = (
    "a photo of a dog on a beach",
    "a bowl of fruit on a wooden table",
    "a street in the rain at night",
    "snowy mountains behind a lake",
    "a red car in front of a house",
    "an old man reading a newspaper",
    "a cup of coffee beside a window",
    "a train crossing a bridge",
)
_THUMBNAIL = 256  # pixels of the longer side of an image in the drawing
_MOST_DRAWN = 8  # prompts in it

_SAYS = (
    "Drift compares the model's image of a prompt with the one that it makes with a LoRA, from the same noise: PSNR "
    "and SSIM (high: nearly the same image), and the root of the mean squared difference of the pixels, RMS, in 255ths "
    "(low: the same). Prompts that have nothing to do with what was trained should change little, and those of the "
    "subject should change. It says how far images move, and not whether they get better or worse: where a composition "
    "tips over into another one there is much drift, and both images may be good. A few prompts are a sample of all."
)


@dataclass(frozen=True, slots=True)
class Shown:
    """The images of a group of prompts. unrelated: have they nothing to do with what was trained?"""

    prompt: Prompt
    seed: int
    unrelated: bool


def shown_of(
    subject: Sequence[str], file: str | None, *, images: int, seed: int, steps: int | None, guidance: float | None,
    size: tuple[int, int] | None,
) -> list[Shown]:  # fmt: skip
    """Every image to be made: of the prompts in `file`, or of ours, then of the subject's. Raises UsageError."""
    said = Prompt("", seed=seed, steps=steps, guidance=guidance, size=size, images=images)
    checked(said, {"seed": "--seed", "steps": "--steps", "guidance": "--guidance", "images": "--drift"})
    least = SMALLEST[PSNR_SSIM]
    unrelated = [replace(said, prompt=text) for text in PROMPTS] if file is None else read_prompts(file, said)
    own = [replace(said, prompt=text) for text in subject]
    for prompt in (*unrelated, *own):
        if prompt.size is not None and min(prompt.size) < least:
            found = f"found {prompt.size[0]}x{prompt.size[1]} pixels"
            raise UsageError("--drift", f"{found}, expected at least {least}x{least}, the least that SSIM can see")
    return [
        Shown(prompt, prompt.seed + n, is_other)
        for prompts, is_other in ((unrelated, True), (own, False))
        for prompt in prompts
        for n in range(prompt.images)
    ]


def check_model(loaded: Loaded, shown: Sequence[Shown]) -> None:
    """Refuse a model that makes no images from text, and prompts that it cannot be told. Raises WeightopsError."""
    sampling = _sampling(loaded)
    for prompt in dict.fromkeys(one.prompt for one in shown):
        sampling.check(prompt)


def _sampling(loaded: Loaded) -> Sampling:
    return Sampling(loaded.pipe, loaded.label, loaded.pipe.scheduler)


# ------------------------------------------------------------------------------------------------ measured


@dataclass(frozen=True, slots=True)
class _Apart:
    """Of two images: PSNR, SSIM, and the root mean square of their difference in 255ths."""

    psnr: float
    ssim: float
    rms: float


class Drift:
    """The model's images beside those with each LoRA. tick: of images."""

    def __init__(self, loaded: Loaded, compared: Sequence[Compared], shown: Sequence[Shown], tick: Tick) -> None:
        self._loaded, self._compared, self._shown, self._tick = loaded, compared, shown, tick
        self._without: list[np.ndarray] = []
        self._found: dict[str, list[_Apart]] = {}
        self._small: dict[str, list[Image]] = {}
        self._faults: list[str] = []

    def look(self, label: str) -> None:
        """Make the images with the model as it is now: the first time, without a LoRA."""
        made = _made(self._loaded, self._shown, label, self._faults, self._tick)
        self._small[label] = [_thumbnail(image) for image in made]
        if not self._without:
            self._without = made
        else:
            self._found[label] = [_apart(a, b) for a, b in zip(self._without, made, strict=True)]

    def finding(self) -> Finding:
        shown, found = self._shown, self._found
        counts = [sum(s.unrelated for s in shown), sum(not s.unrelated for s in shown)]
        note = f"Means of {counts[0]:,} pair{'s'[: counts[0] != 1]} of images of unrelated prompts"
        note += f" and {counts[1]:,} of the subject's." if counts[1] else "."
        tables = {"drift": _table(found, shown, note), "drift-images": _by_image(found, shown)}
        drawings = _drawn(self._compared, found, shown) | {"drift-images": _pictures(self._small, shown)}
        facts = {
            "unrelated": [_fact(s) for s in shown if s.unrelated],
            "subject": [_fact(s) for s in shown if not s.unrelated],
            "steps": _sampling(self._loaded).steps(shown[0].prompt),
        }
        return Finding(DRIFT, _SAYS, tables, drawings, facts, tuple(self._faults))


def _made(loaded: Loaded, shown: Sequence[Shown], label: str, faults: list[str], tick: Tick) -> list[np.ndarray]:
    """One image at a time, so that none depends on another."""
    sampling = _sampling(loaded)
    images = []
    wrong = []
    for one in shown:
        (made,) = sampling.sample([one.prompt], [one.seed], lambda _: None)
        if made.black or made.blanked or not made.finite:
            wrong.append(f"{one.prompt.prompt} (seed {one.seed})")
        images.append(made.pixels)
        tick(1)
    if wrong:
        why = "black, blanked by a safety checker, or no numbers; --dtype fp32 may be the remedy"
        faults.append(f"{printable(label)}: images that cannot be compared: {listing(wrong)}: {why}")
    return images


def _apart(a: np.ndarray, b: np.ndarray) -> _Apart:
    import numpy as np

    rms = math.sqrt(float(((a.astype(np.float64) - b) ** 2).mean()))
    return _Apart(psnr(a, b), ssim(a, b), rms)


def _table(found: Mapping[str, Sequence[_Apart]], shown: Sequence[Shown], note: str) -> Table:
    kinds = [(True, "unrelated")] + ([(False, "subject")] if any(not s.unrelated for s in shown) else [])
    columns = [f"{kind}: {name}" for _, kind in kinds for name in ("PSNR in dB", "SSIM", "RMS")]
    rows: list[tuple[Cell, ...]] = []
    for label, pairs in found.items():
        cells: list[Cell] = []
        for unrelated, _ in kinds:
            own = [pair for pair, s in zip(pairs, shown, strict=True) if s.unrelated is unrelated]
            cells += [_mean([p.psnr for p in own]), _mean([p.ssim for p in own]), _mean([p.rms for p in own])]
        rows.append((label, *cells))
    return Table("Drift from the model's own images", ("LoRA", *columns), tuple(rows), note)


def _by_image(found: Mapping[str, Sequence[_Apart]], shown: Sequence[Shown]) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (label, s.prompt.prompt, "unrelated" if s.unrelated else "subject", s.seed, pair.psnr, pair.ssim, pair.rms)
        for label, pairs in found.items()
        for s, pair in zip(shown, pairs, strict=True)
    ]
    columns = ("LoRA", "prompt", "kind", "seed", "PSNR in dB", "SSIM", "RMS")
    return Table("Drift by image", columns, tuple(rows))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _fact(one: Shown) -> dict[str, str | int]:
    return {"prompt": one.prompt.prompt, "seed": one.seed}


# ------------------------------------------------------------------------------------------------ drawn


def _drawn(
    compared: Sequence[Compared], found: Mapping[str, Sequence[_Apart]], shown: Sequence[Shown]
) -> dict[str, Drawing]:
    """The mean difference of pixels by steps: 0 of the model alone."""

    def rms(one: Compared) -> float:
        return _mean([pair.rms for pair, s in zip(found[one.label], shown, strict=True) if s.unrelated])

    lines = curves(compared, rms, 0.0)
    if not lines:
        return {}
    words = "Drift of unrelated prompts by steps"
    return {"drift": Drawing(curve(lines, title=words, x="steps", y="RMS of the difference, in 255ths"), words)}


def _thumbnail(image: np.ndarray) -> Image:
    from PIL import Image as images

    made = images.fromarray(image)
    made.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return made


def _pictures(small: Mapping[str, Sequence[Image]], shown: Sequence[Shown]) -> Drawing:
    """The first image of each prompt, of the model alone and with each LoRA, side by side; the subject's first."""
    import io

    from weightops.diffusion.grids import Grid, draw_grid

    firsts: dict[str, int] = {}
    for number in sorted(range(len(shown)), key=lambda n: shown[n].unrelated):
        firsts.setdefault(shown[number].prompt.prompt, number)
    numbers = list(firsts.values())[:_MOST_DRAWN]
    cells = [[images[number] for images in small.values()] for number in numbers]
    rows = [shown[number].prompt.prompt for number in numbers]
    data = io.BytesIO()
    draw_grid(Grid(cells, list(small), rows)).save(data, "PNG")
    words = "The model's images and those with each LoRA, from the same noise"
    return Drawing(data.getvalue(), words)
