"""The words of a training run: presets, defaults and checks, before anything is read. Knows no model."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from weightops.diffusion.lora_modules import INITS
from weightops.diffusion.objectives import KINDS, WEIGHTINGS
from weightops.errors import UsageError, quote
from weightops.lora.dialects import DIALECTS

if TYPE_CHECKING:
    from collections.abc import Mapping

TEXT_TO_IMAGE = "text-to-image"
DREAMBOOTH = "dreambooth"

# The studies' parameters. A word that is given by hand wins.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "style": {"rank": 4, "alpha": 4.0, "steps": 600, "batch": 2, "lr": 1e-4, "resolution": (1024, 1024), "flip": True},
    "character": {
        "rank": 8, "alpha": 4.0, "steps": 250, "batch": 2, "lr": 1e-4, "resolution": (1024, 1024), "flip": True,
    },
}  # fmt: skip
# What holds without a preset. The alpha is the rank, and the resolution the architecture's.
DEFAULTS: Mapping[str, Any] = {"rank": 4, "steps": 600, "batch": 1, "lr": 1e-4, "flip": False, "class_images": 100}
RESOLUTIONS: Mapping[str, int] = {"sd15": 512, "sd2": 768, "sdxl": 1024, "sd3": 1024, "flux": 1024}

MIXED = ("no", "fp16", "bf16")
DTYPES = ("auto", "fp32", "fp16", "bf16")
# diffusers' schedules, but for the one whose rules have a language of their own.
SCHEDULES = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
)  # fmt: skip
# Of these the length of the run says nothing about the first steps.
ENDLESS = ("constant", "constant_with_warmup")


@dataclass(frozen=True, slots=True)
class Words:
    """What was asked for. None: a preset's, a default's or the architecture's; `settled` fills in the first two.

    Everything here decides what is learnt, and stands in settings.json and in the file's recipe.
    """

    kind: str
    dialect: str
    preset: str | None
    instance_prompt: str | None
    class_prompt: str | None
    class_images: int | None
    prior_weight: float
    rank: int | None
    alpha: float | None
    conv_rank: int | None
    conv_alpha: float | None
    targets: tuple[str, ...] | None
    train_text_encoder: bool
    text_encoder_lr: float | None
    dora: bool
    init: str
    steps: int | None
    epochs: int | None
    batch: int | None
    accumulate: int
    lr: float | None
    schedule: str
    warmup: int
    optimizer: str
    optimizer_set: Mapping[str, str]
    betas: tuple[float, ...] | None
    eps: float | None
    weight_decay: float | None
    clip: float
    snr_gamma: float | None
    noise_offset: float
    prediction: str | None
    shift: float | None
    weighting: str | None
    resolution: tuple[int, int] | None
    center_crop: bool
    flip: bool | None
    seed: int
    mixed_precision: str
    dtype: str

    def settled(self) -> Words:
        """With the preset's words and the defaults where nothing was said. Raises UsageError for what cannot be."""
        _check_choices(self)
        of_preset = dict(PRESETS[self.preset]) if self.preset is not None else {}
        if self.epochs is not None:
            of_preset.pop("steps", None)
        if self.rank is not None and self.alpha is None:
            of_preset.pop("alpha", None)  # it would be another strength at another rank
        filled = {**DEFAULTS, **of_preset}
        if self.epochs is not None:
            filled.pop("steps", None)
        if self.class_prompt is None:
            filled.pop("class_images")
        given: Words = replace(self, **{k: v for k, v in filled.items() if getattr(self, k) is None})
        alpha, conv_alpha = (
            number if number is None else float(number)
            for number in (
                given.rank if given.alpha is None else given.alpha,
                given.conv_rank if given.conv_alpha is None else given.conv_alpha,
            )
        )
        given = replace(
            given,
            alpha=alpha,
            conv_alpha=conv_alpha,
            text_encoder_lr=given.lr
            if given.text_encoder_lr is None and given.train_text_encoder
            else given.text_encoder_lr,
            schedule="constant_with_warmup" if given.schedule == "constant" and given.warmup else given.schedule,
            dtype=_dtype(given),
        )
        _check_numbers(given)
        _check_together(given)
        return given

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it, and gives it back."""
        found = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else dict(v) if isinstance(v, dict) else v for k, v in found.items()}


def resolution_of(word: str | int | tuple[int, int] | None) -> tuple[int, int] | None:
    """512, "512" or "768x512" (width × height), as height and width. Raises UsageError."""
    if word is None or isinstance(word, tuple):
        return word
    found = re.fullmatch(r"([0-9]{1,6})(?:[x×]([0-9]{1,6}))?", str(word).strip())
    if found is None:
        raise UsageError("--resolution", f"found {quote(word)}, expected a number of pixels, or WIDTHxHEIGHT")
    width = int(found[1])
    return int(found[2] or width), width


def _dtype(words: Words) -> str:
    """Of the frozen weights: that in which it is computed, where nothing else was said."""
    return words.dtype if words.dtype != "auto" else {"no": "fp32"}.get(words.mixed_precision, words.mixed_precision)


# ------------------------------------------------------------------------------------------------ checks


def _check_choices(words: Words) -> None:
    known = (
        ("train", words.kind, (TEXT_TO_IMAGE, DREAMBOOTH)),
        ("--preset", words.preset, tuple(PRESETS)),
        ("--dialect", words.dialect, tuple(DIALECTS)),
        ("--init", words.init, INITS),
        ("--schedule", words.schedule, SCHEDULES),
        ("--prediction", words.prediction, KINDS),
        ("--weighting", words.weighting, WEIGHTINGS),
        ("--mixed-precision", words.mixed_precision, MIXED),
        ("--dtype", words.dtype, DTYPES),
    )
    for option, found, expected in known:
        if found is not None and found not in expected:
            raise UsageError(option, f"found {quote(found)}, expected {' or '.join(expected)}")


def _check_numbers(words: Words) -> None:
    whole = (
        ("--rank", words.rank), ("--conv-rank", words.conv_rank), ("--steps", words.steps), ("--epochs", words.epochs),
        ("--batch", words.batch), ("--accumulate", words.accumulate), ("--class-images", words.class_images),
    )  # fmt: skip
    for option, number in whole:
        if number is not None and number < 1:
            raise UsageError(option, f"found {number}, expected a whole number, 1 or more")
    positive = (
        ("--lr", words.lr), ("--alpha", words.alpha), ("--conv-alpha", words.conv_alpha), ("--eps", words.eps),
        ("--text-encoder-lr", words.text_encoder_lr), ("--snr-gamma", words.snr_gamma), ("--shift", words.shift),
    )  # fmt: skip
    for option, value in positive:
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(option, f"found {value:g}, expected a number above 0")
    least = (
        ("--weight-decay", words.weight_decay), ("--clip", words.clip), ("--warmup", words.warmup),
        ("--prior-weight", words.prior_weight), ("--noise-offset", words.noise_offset), ("--seed", words.seed),
    )  # fmt: skip
    for option, value in least:
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UsageError(option, f"found {value:g}, expected 0 or more")
    if words.betas is not None and not (len(words.betas) > 1 and all(0 <= beta < 1 for beta in words.betas)):
        raise UsageError("--betas", f"found {quote(words.betas)}, expected two numbers from 0 to below 1, as 0.9,0.999")
    if words.targets is not None and not words.targets:
        raise UsageError("--targets", "found none, expected ends of module names, as to_q,to_k,to_v,to_out.0")


def _check_together(words: Words) -> None:
    """Refuse words that mean nothing beside the others."""
    dreambooth = words.kind == DREAMBOOTH
    if dreambooth and words.instance_prompt is None:
        raise UsageError(
            "--instance-prompt", "is missing: dreambooth takes one prompt for all images", "'a photo of sks cat'"
        )
    for option, given in (("--instance-prompt", words.instance_prompt), ("--class-prompt", words.class_prompt)):
        if given is not None and not dreambooth:
            raise UsageError(option, "says something only in train dreambooth")
    if words.class_images is not None and words.class_prompt is None:
        raise UsageError("--class-images", "stands with --class-prompt, the words for them")
    if words.epochs is not None and words.steps is not None:
        raise UsageError("--epochs", "stands in place of --steps: found both")
    if words.text_encoder_lr is not None and not words.train_text_encoder:
        raise UsageError("--text-encoder-lr", "says something only with --train-text-encoder")
    if words.conv_alpha is not None and words.conv_rank is None:
        raise UsageError("--conv-alpha", "stands with --conv-rank")
    if words.steps is not None and words.warmup > words.steps:
        raise UsageError("--warmup", f"found {words.warmup:,} steps, of {words.steps:,} in all")
    if words.dtype == "fp16" and words.mixed_precision != "fp16":
        what = "fp16 needs losses that are scaled, or small gradients vanish"
        raise UsageError("--dtype", what, "--mixed-precision fp16 scales them")
