"""Weights of a training's snapshots for an average of them after the fact: `--ema`."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from weightops.errors import UsageError, quote

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# The largest width for which a power function exists: that of an exponent of 0, where all weights are equal.
_WIDEST = 1 / math.sqrt(12)


def ema_weights(said: str, metadata: Sequence[Mapping[str, str]]) -> list[float]:
    """The weight of each snapshot, in the order of training; their sum is 1.

    said: a decay such as 0.9, of which each snapshot takes 1 − β and leaves β to those before it; or sigma:0.1, the
    width of a power function's profile, relative to the training's length. The latter asks for the steps at which the
    snapshots were taken: ss_steps of the metadata where all have it, else equally spaced.
    Averages are of ΔW: those of factors, as other tools make them, are of another product.
    Source: Karras et al. 2024, arXiv:2312.02696, sections 3.1 and C.2 (the decay, and the relative width that an
    exponent gives). Raises UsageError.
    """
    name, colon, setting = said.rpartition(":")
    try:
        value = float(setting)
    except ValueError:
        value = math.nan
    times = _steps(metadata)
    if not colon and 0 < value < 1:
        kept = [value] * len(metadata)
    elif name == "sigma" and 0 < value < _WIDEST:
        power = _gamma(value) + 1
        kept = [0.0, *((before / now) ** power for before, now in itertools.pairwise(times))]
    else:
        raise UsageError("--ema", f"found {quote(said)}, expected a decay such as 0.9, or sigma:S with 0 < S < 0.288")
    weights: list[float] = []
    for number, share in enumerate(kept):
        weights = [w * share for w in weights] + [1 - share if number else 1.0]
    return weights


def _steps(metadata: Sequence[Mapping[str, str]]) -> list[float]:
    """When each snapshot was taken: by the trainer's word, or one after the other."""
    try:
        steps = [float(found["ss_steps"]) for found in metadata]
    except (KeyError, ValueError):
        return [float(n + 1) for n in range(len(metadata))]
    if not all(0 < a < b < math.inf for a, b in itertools.pairwise(steps)):
        shown = ", ".join(f"{step:g}" for step in steps)
        raise UsageError("--ema", f"found snapshots of steps {shown} (ss_steps), expected them in order")
    return steps


def _gamma(width: float) -> float:
    """The exponent of a power function of this relative width: the positive root of its cubic."""
    import numpy as np

    t = width**-2
    return float(max(np.roots([1, 7, 16 - t, 12 - t]).real))
