"""The course of the noise in diffusion: the cosine schedule, what a network may predict, and one deterministic step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TIMES = 1000
_OFFSET = 0.008
_LARGEST = 0.999


def cosine() -> Tensor:
    """[TIMES, 2]: how much of the signal and of the noise (their squares make 1) is in a latent at each time.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17; no step destroys more than .999 of what is left.
    """
    import torch

    def left(time: float) -> float:
        return math.cos((time / TIMES + _OFFSET) / (1 + _OFFSET) * math.pi / 2) ** 2

    kept, found = 1.0, []
    for time in range(TIMES):
        kept *= max(1 - _LARGEST, left(time + 1) / left(time))
        found.append((math.sqrt(kept), math.sqrt(1 - kept)))
    return torch.tensor(found, dtype=torch.float32)


def visited(steps: int) -> list[int]:
    """The times that a sampler of so many steps visits, from the last one to 0, evenly."""
    if steps == 1:
        return [TIMES - 1]
    return [round((TIMES - 1) * (steps - 1 - i) / (steps - 1)) for i in range(steps)]


def target(prediction: str, clean: Tensor, noise: Tensor, signal: Tensor, share: Tensor) -> Tensor:
    """What the network is to say of signal·clean + share·noise: the clean latent ("x0"), or its velocity ("v").

    Source: Salimans & Ho 2022, arXiv:2202.00512: v = signal·noise − share·clean.
    """
    return clean if prediction == "x0" else signal * noise - share * clean


def clean_of(prediction: str, said: Tensor, noisy: Tensor, signal: Tensor, share: Tensor) -> Tensor:
    """The clean latent that the network's words mean."""
    return said if prediction == "x0" else signal * noisy - share * said


def stepped(noisy: Tensor, clean: Tensor, now: Tensor, then: Tensor | None) -> Tensor:
    """The latent at the time `then` (None: clean), along the line that the prediction draws; no noise is added.

    now, then: the rows of `cosine` at the two times. Source: Song et al. 2021, arXiv:2010.02502 (DDIM, eta 0).
    """
    if then is None:
        return clean
    return then[0] * clean + then[1] * (noisy - now[0] * clean) / now[1]
