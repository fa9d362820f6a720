"""The denoising loss on images that were not trained on, at fixed timesteps and noises: of a model and of LoRAs on it.

Also as a score for the variants of a merge. What the loss is, `objectives` knows.
"""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightops.diffusion.compared import BASE, curves
from weightops.diffusion.dataset import Framing, read_examples
from weightops.diffusion.encoding import check_framing, encode, encoding_of
from weightops.diffusion.figures import curve
from weightops.diffusion.findings import Finding, mean_and_error
from weightops.diffusion.models import load
from weightops.diffusion.objectives import held_out_loss, objective_of
from weightops.diffusion.page import Drawing
from weightops.diffusion.tables import Table
from weightops.diffusion.training_words import RESOLUTIONS, resolution_of
from weightops.errors import UsageError, ValueRefused

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from weightops.diffusion.compared import Compared
    from weightops.diffusion.dataset import Examples
    from weightops.diffusion.encoding import Encoded, Encoding
    from weightops.diffusion.findings import Tick
    from weightops.diffusion.models import Loaded, LoraName
    from weightops.diffusion.objectives import HeldOut, Objective

HELD_OUT = "held-out loss"
_BANDS = 4
_MOST_PAIRS = 1_000

_SAYS = (
    "The held-out loss is what training makes small (the squared error of what the network predicts in place of the "
    "noise), measured on images that were not trained on, at timesteps and noises that are the same for every row. A "
    "LoRA that has learnt what these images share has a lower loss than the model alone. ± is the standard error of "
    "the difference: over the images, each with all of its timesteps, for those of one image go together. A difference "
    "of less than two of them may be chance. It compares at the same images, pairs, seed, resolution, model and VAE, "
    "and with no loss of another model. It is a measure of the objective, and not of how images look: the last steps "
    "of a training may lower it and leave less variety. On images that were trained on it says nothing."
)


@dataclass(frozen=True, slots=True)
class Fixed:
    """What must be the same for losses to be compared. pairs: of a timestep and a noise, for each image.

    resolution: height and width, None: the architecture's. batch: images at once, which may change the last bits.
    """

    pairs: int = 8
    seed: int = 0
    resolution: tuple[int, int] | None = None
    batch: int = 4
    prediction: str | None = None


def check_fixed(fixed: Fixed) -> None:
    """Raises UsageError."""
    for option, number, most in (
        ("--pairs", fixed.pairs, _MOST_PAIRS), ("--batch", fixed.batch, 256)
    ):  # fmt: skip
        if not 1 <= number <= most:
            raise UsageError(option, f"found {number:,}, expected 1 to {most:,}")
    if not 0 <= fixed.seed < 2**63:
        raise UsageError("--seed", f"found {fixed.seed}, expected 0 to {2**63 - 1:,}")


# ------------------------------------------------------------------------------------------------ measured


@dataclass(frozen=True, slots=True)
class Prepared:
    """Images as the network takes them, and how it is asked."""

    loaded: Loaded
    encoding: Encoding
    encoded: Encoded
    objective: Objective
    fixed: Fixed

    def measure(self) -> HeldOut:
        """The loss of the model as it is now. Raises ValueRefused where it is no number."""
        found = held_out_loss(
            self.loaded, self.encoding, self.encoded, self.objective, pairs=self.fixed.pairs, seed=self.fixed.seed,
            batch=self.fixed.batch,
        )  # fmt: skip
        if not math.isfinite(found.mean):
            worn = " and ".join(lora.file for lora in self.loaded.loras)
            what = f"its held-out loss {f'with {worn} ' if worn else ''}is {found.mean}, expected a number"
            raise ValueRefused(self.loaded.label, what, "run it with --dtype fp32, or bf16")
        return found


def check_model(loaded: Loaded, fixed: Fixed) -> None:
    """Refuse a model whose loss is not known here, or a size that it does not take. Raises UsageError."""
    encoding = encoding_of(loaded, where=loaded.label)
    check_framing(loaded, encoding, _framing(loaded, fixed))
    objective_of(loaded, fixed.prediction)


def prepare(loaded: Loaded, examples: Examples, fixed: Fixed) -> Prepared:
    """Encode the images. Captions are read anew for each LoRA, which may change the text encoder. Raises UsageError."""
    encoding = encoding_of(loaded, where=loaded.label)
    objective = objective_of(loaded, fixed.prediction)
    encoded = encode(loaded, examples.examples, _framing(loaded, fixed), batch=fixed.batch, cache_texts=False)
    return Prepared(loaded, encoding, encoded, objective, fixed)


def _framing(loaded: Loaded, fixed: Fixed) -> Framing:
    """The middle of each image, unmirrored: nothing is drawn."""
    return Framing(fixed.resolution or (RESOLUTIONS[loaded.architecture],) * 2, center_crop=True)


class HeldOutLoss:
    """The loss of the model alone and with each LoRA, by timesteps. tick: of images encoded, and of pairs measured."""

    def __init__(
        self, loaded: Loaded, examples: Examples, compared: Sequence[Compared], fixed: Fixed, tick: Tick
    ) -> None:  # fmt: skip
        self._examples, self._compared, self._fixed, self._tick = examples, compared, fixed, tick
        self._prepared = prepare(loaded, examples, fixed)
        self._losses: dict[str, HeldOut] = {}
        tick(len(examples.examples))

    def look(self, label: str) -> None:
        """Measure the model as it is now."""
        self._losses[label] = self._prepared.measure()
        self._tick(self._fixed.pairs * len(self._examples.examples))

    def finding(self) -> Finding:
        prepared, losses, fixed = self._prepared, self._losses, self._fixed
        names = [example.picture.name for example in self._examples.examples]
        height, width = prepared.encoded.framing.resolution
        count = f"{len(names):,} image{'' if len(names) == 1 else 's'}"
        note = (
            f"{count} of {width}x{height} pixels, cut about their middles, each at {fixed.pairs:,} timesteps; "
            f"seed {fixed.seed}; objective: {prepared.objective.kind}. Lower is better."
        )
        if len(names) == 1:
            note += " Of one image there is no standard error."
        tables = {
            "held-out": _table(losses, prepared.objective.steps, note),
            "held-out-images": Table(
                "Held-out loss by image", ("image", *losses),
                tuple((name, *(found.examples[n] for found in losses.values())) for n, name in enumerate(names)),
                "The mean over the timesteps.", 4,
            ),
        }  # fmt: skip
        facts = {
            "images": len(names), "data": self._examples.data_hash, "resolution": [height, width],
            "pairs": fixed.pairs, "seed": fixed.seed, "timesteps": list(losses[BASE].timesteps),
            "objective": prepared.objective.kind,
        }  # fmt: skip
        drawings = _drawn(self._compared, losses)
        return Finding(HELD_OUT, _SAYS, tables, drawings, facts, prepared.encoded.warnings)


def _table(losses: Mapping[str, HeldOut], steps: int, note: str) -> Table:
    """A row of each: the mean loss of each band of timesteps, of all, and its distance from the model's alone."""
    base = losses[BASE]
    count = min(_BANDS, len(base.timesteps))
    bands = [int(time * count / steps) for time in base.timesteps]
    names = [f"t {steps * n // count}-{steps * (n + 1) // count - 1}" for n in range(count)]
    rows = []
    for label, found in losses.items():
        parts = [_mean([value for value, of in zip(found.losses, bands, strict=True) if of == n]) for n in range(count)]
        apart = error = None
        if label != BASE:
            differences = [a - b for a, b in zip(found.examples, base.examples, strict=True)]
            difference, error = mean_and_error(differences)
            apart = 100 * difference / base.mean
            error = None if error is None else 100 * error / base.mean
        rows.append((label, *parts, found.mean, apart, error))
    columns = ("model", *names, "mean", "against base, %", "±, %")
    return Table("Held-out denoising loss, by timesteps", columns, tuple(rows), note, 4)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _drawn(compared: Sequence[Compared], losses: Mapping[str, HeldOut]) -> dict[str, Drawing]:
    lines = curves(compared, lambda one: losses[one.label].mean, losses[BASE].mean)
    if not lines:
        return {}
    words = "Held-out loss by steps; step 0 is the model alone"
    data = curve(lines, title=words, x="steps", y="mean loss")
    return {"held-out": Drawing(data, words)}


# ------------------------------------------------------------------------------------------------ a score


def held_out_score(
    folder: str | os.PathLike[str],
    *,
    loras: Sequence[LoraName] = (),
    vae: str | os.PathLike[str] | None = None,
    like: str | os.PathLike[str] | None = None,
    pairs: int = 8,
    seed: int = 0,
    resolution: str | int | tuple[int, int] | None = None,
    batch: int = 4,
    prediction: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Callable[[Path], dict[str, float]]:
    """A score for `weightops.merge(..., grid=..., score=...)`: the held-out loss of each variant on a folder's images.

    The words mean what they mean to `evaluate`; loras: worn on each variant. Losses of variants with different VAEs are
    of different latents, and are not to be compared: `vae` gives all the same. Raises WeightopsError now for what is
    wrong with the words and the images, and later for a variant that is no whole model.
    """
    fixed = Fixed(pairs, seed, resolution_of(resolution), batch, prediction)
    check_fixed(fixed)
    examples = read_examples(folder, where=str(folder))

    def score(path: Path) -> dict[str, float]:
        known = prediction if prediction in ("epsilon", "v_prediction") else None
        loaded = load(
            path, where="score", loras=loras, vae=vae, like=like, device=device, dtype=dtype, prediction=known
        )  # fmt: skip
        found = prepare(loaded, examples, fixed).measure()
        del loaded
        let_go()
        return {"held_out_loss": found.mean}

    return score


def let_go() -> None:
    """Give the memory of a model that is no longer used back."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
