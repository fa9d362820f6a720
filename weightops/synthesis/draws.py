"""Latents of new LoRAs: drawn, from a condition, between two, or around one. Writes nothing.

Randomness of LoRA number i is drawn from (seed, i) alone, so that it is the same however many are asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightops.errors import UsageError, quote
from weightops.synthesis.conditions import condition_of
from weightops.synthesis.places import place_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from weightops.synthesis.fitted import Fitted
    from weightops.synthesis.places import Placed

# How latents are made: of noise, or of a condition, or neither.
BYS = ("gaussian", "prior", "diffusion", "ridge", "nearest", "mean")
_OF_CONDITIONS = ("diffusion", "ridge", "nearest")
STEPS, GUIDANCE, SPREAD, AT = 50, 1.0, 0.5, 0.5
MOST = 10_000  # LoRAs of one call
_STREAM = 11  # of the draws from one seed


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked for, checked: one of a draw, a condition, a line between two, a place around one."""

    by: str | None
    count: int
    seed: int
    condition: str | None
    embedder: str | None
    between: tuple[str, str] | None
    at: tuple[float, ...] | None
    around: str | None
    spread: float | None
    guidance: float | None
    steps: int | None

    @property
    def of_noise(self) -> bool:
        return self.between is None and self.around is None


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """Latents [n, m] of new LoRAs, a label for each, the word for how, and conditions [n, c] where there are any.

    files: names and hashes of LoRA files that were begun with.
    """

    by: str
    labels: tuple[str, ...]
    latents: Tensor
    conditions: np.ndarray | None = None
    files: tuple[tuple[str, str | None], ...] = ()


# ------------------------------------------------------------------------------------------------ what is asked for


def asked_of(
    by: str | None, count: int, seed: int, condition: str | None, embedder: str | None,
    between: tuple[str, str] | None, at: float | Sequence[float] | None, around: str | None, spread: float | None,
    guidance: float | None, steps: int | None,
) -> Asked:  # fmt: skip
    """Raises UsageError for words that do not go together, and for those that would do nothing."""
    ways = {"--condition": condition, "--between": between, "--around": around}
    given = [option for option, value in ways.items() if value is not None]
    if len(given) > 1:
        raise UsageError(given[1], f"and {given[0]} ask for different things", "take one of them")
    if by is not None and by not in BYS:
        raise UsageError("--by", f"found {quote(by)}, expected {', '.join(BYS)}")
    for option, value, needed in (
        ("--at", at, "--between"), ("--spread", spread, "--around"), ("--embedder", embedder, "--condition"),
    ):  # fmt: skip
        if value is not None and ways[needed] is None:
            raise UsageError(option, f"says something only with {needed}")
    if by is not None and (between is not None or around is not None):
        raise UsageError("--by", f"says nothing with {given[0]}, which begins at LoRAs")
    if not 1 <= count <= MOST:
        raise UsageError("--count", f"found {count:,}, expected 1 to {MOST:,}")
    if count > 1 and (between is not None or by in ("nearest", "mean", "ridge")):
        what = "LoRAs between two are told apart by --at" if between is not None else f"--by {by} makes one alone"
        raise UsageError("--count", f"found {count:,}, but {what}", "--at 0.25,0.5,0.75" if between else None)
    if not 0 <= seed < 2**63:
        raise UsageError("--seed", f"found {seed}, expected 0 to {2**63 - 1:,}")
    if steps is not None and steps < 1:
        raise UsageError("--steps", f"found {steps}, expected 1 or more")
    numbers = [at] if isinstance(at, (int, float)) else list(at or [])
    for option, values in (("--at", numbers), ("--spread", [spread]), ("--guidance", [guidance])):
        for value in values:
            if value is not None and (not math.isfinite(value) or (option == "--spread" and value < 0)):
                raise UsageError(option, f"found {value}, expected a finite number, 0 or more")
    spots = tuple(map(float, numbers)) or ((AT,) if between is not None else None)
    return Asked(by, count, seed, condition, embedder, between, spots, around, spread, guidance, steps)


def _way(fitted: Fitted, asked: Asked) -> str:
    """How latents are made, and whether this model can. Raises UsageError."""
    has = {
        "gaussian": True, "mean": True, "prior": fitted.vae is not None, "diffusion": fitted.denoiser is not None,
        "ridge": fitted.ridge is not None, "nearest": fitted.nearest is not None,
    }  # fmt: skip
    by = asked.by
    if asked.condition is not None:
        able = fitted.denoiser is not None and fitted.denoiser.conditions > 0
        by = by or ("diffusion" if able else "ridge")
        if by not in _OF_CONDITIONS:
            raise UsageError("--by", f"{by} makes nothing of a condition", f"expected {', '.join(_OF_CONDITIONS)}")
        if by == "diffusion" and has[by] and not able:
            raise UsageError("--by", f"the diffusion of {fitted.label} was fitted without conditions", "--by ridge")
    elif by in ("ridge", "nearest"):
        raise UsageError("--by", f"{by} makes a LoRA of a condition", "--condition NUMBERS, FILE or DIR says one")
    by = by or ("diffusion" if has["diffusion"] else "prior" if has["prior"] else "gaussian")
    if not has[by]:
        kind = {"prior": "vae", "diffusion": "diffusion"}.get(by)
        again = "collect the space with --conditions, and fit it again"
        hint = again if kind is None else f"weightops synth fit {kind} makes one that has"
        where = "--by" if asked.by is not None else "--condition"
        lacks = "its LoRAs had no conditions" if kind is None else f"it is a {fitted.kind} without {by}"
        raise UsageError(where, f"{fitted.label} makes none by {by}: {lacks}", hint)
    for option, value in (("--guidance", asked.guidance), ("--steps", asked.steps)):
        if value is not None and by != "diffusion":
            raise UsageError(option, f"is of diffusion, and these are made by {by}")
    if asked.guidance is not None and asked.condition is None:
        raise UsageError("--guidance", "is towards a condition, and none is asked for", "--condition says one")
    return by


# ------------------------------------------------------------------------------------------------ latents


def drawn_of(fitted: Fitted, asked: Asked) -> Drawn:
    """The latents that are asked for. Raises WeightopsError."""
    if asked.between is not None:
        return _between(fitted, asked.between, asked.at or (AT,))
    if asked.around is not None:
        return _around(fitted, asked)
    by = _way(fitted, asked)
    if asked.condition is None:
        label = "mean" if by == "mean" else fitted.kind
        return Drawn(by, (label,) * asked.count, _unconditional(fitted, asked, by))
    return _conditional(fitted, asked, by)


def noise(seed: int, numbers: range, size: int) -> Tensor:
    """Standard normal numbers [n, size]; those of one number are the same whatever the others are."""
    import numpy as np
    import torch

    rows = [np.random.default_rng((_STREAM, seed, n)).standard_normal(size) for n in numbers]
    return torch.from_numpy(np.stack(rows))


def _unconditional(fitted: Fitted, asked: Asked, by: str) -> Tensor:
    if by == "mean":
        return fitted.latent_mean[None]
    if by == "diffusion":
        assert fitted.denoiser is not None
        return fitted.denoiser.sample(asked.count, None, seed=asked.seed, steps=asked.steps or STEPS)
    drawn = noise(asked.seed, range(asked.count), fitted.size)
    if by == "prior":
        return drawn.float()
    return (fitted.latent_mean.double() + drawn * fitted.latent_deviation.double()).float()


def _conditional(fitted: Fitted, asked: Asked, by: str) -> Drawn:
    import numpy as np

    assert asked.condition is not None
    found = condition_of(asked.condition, fitted, embedder=asked.embedder)
    if len(found) * asked.count > MOST:
        raise UsageError("--count", f"{asked.count:,} of each of {len(found):,} conditions, expected at most {MOST:,}")
    if asked.count > 1 and by != "diffusion":
        what = f"found {asked.count:,}, but {by} makes one LoRA of a condition"
        raise UsageError("--count", what, "--by diffusion draws several, where it is fitted")
    labels = tuple(label for label, _ in found for _ in range(asked.count))
    conditions = np.stack([numbers for _, numbers in found for _ in range(asked.count)])
    if by == "ridge":
        assert fitted.ridge is not None
        latents = fitted.ridge.predict(conditions)
    elif by == "nearest":
        assert fitted.nearest is not None
        latents = fitted.latents[fitted.nearest.nearest(conditions).tolist()]
    else:
        assert fitted.denoiser is not None
        guidance = GUIDANCE if asked.guidance is None else asked.guidance
        latents = fitted.denoiser.sample(
            len(labels), conditions, seed=asked.seed, steps=asked.steps or STEPS, guidance=guidance
        )
    return Drawn(by, labels, latents, conditions)


def _between(fitted: Fitted, between: tuple[str, str], at: Sequence[float]) -> Drawn:
    import torch

    first, second = (place_of(words, fitted) for words in between)
    # Each end itself, bit for bit.
    rows = [torch.lerp(first.latents.double(), second.latents.double(), x).float() for x in at]
    labels = tuple(f"{first.name} to {second.name} {x:g}" for x in at)
    return Drawn("between", labels, torch.stack(rows), None, _files(first, second))


def _around(fitted: Fitted, asked: Asked) -> Drawn:
    assert asked.around is not None
    middle = place_of(asked.around, fitted)
    spread = SPREAD if asked.spread is None else asked.spread
    drawn = noise(asked.seed, range(asked.count), fitted.size)
    latents = middle.latents.double() + spread * drawn * fitted.latent_deviation.double()
    return Drawn("around", (f"around {middle.name}",) * asked.count, latents.float(), None, _files(middle))


def _files(*placed: Placed) -> tuple[tuple[str, str | None], ...]:
    return tuple((each.name, each.hash) for each in placed if each.hash is not None)
