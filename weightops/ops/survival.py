"""How much of a change the rounding of its result leaves: sums over values, of one dtype and of another beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from weightops.merging.method import WORKING_VALUES, store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# Below this share of what was meant, another dtype is tried beside the one that is written.
WORTH_A_LOOK = 0.99


class Survival(NamedTuple):
    """Sums over the values of a block: ‖meant‖², ⟨added, meant⟩, ‖added − meant‖², ‖W‖²; and the last two of these
    sums for the dtype that was tried beside it (None: it was not)."""

    meant: float
    along: float
    off: float
    weight: float
    other: tuple[float, float] | None = None


def together(found: Sequence[Survival]) -> Survival:
    """The sums of several bands. Where one was not tried in the other dtype, it keeps there what it keeps here."""
    beside = None
    if any(f.other is not None for f in found):
        pairs = [f.other or (f.along, f.off) for f in found]
        beside = sum(p[0] for p in pairs), sum(p[1] for p in pairs)
    meant, along = sum(f.meant for f in found), sum(f.along for f in found)
    return Survival(meant, along, sum(f.off for f in found), sum(f.weight for f in found), beside)


def survival(before: Tensor, meant: Tensor, stored: Tensor, other: str | None) -> Survival:
    """How much of a change its rounding leaves: before, meant and stored are W, W + Σ and what is written of it."""
    before, meant, stored = before.reshape(-1), meant.reshape(-1), stored.reshape(-1)
    found = [0.0, 0.0, 0.0, 0.0]
    for start in range(0, len(before), WORKING_VALUES):  # pieces that stay in the cache
        part = slice(start, start + WORKING_VALUES)
        weight = before[part]
        wanted = meant[part] - weight
        found = [
            a + b for a, b in zip(found, (*_sums(wanted, meant[part], stored[part]), _dot(weight, weight)), strict=True)
        ]
    total, along, off, norm = found
    beside = None
    if other is not None and total and along < WORTH_A_LOOK * total:
        beside = _beside(before, meant, other)
    return Survival(total, along, off, norm, beside)


def _beside(before: Tensor, meant: Tensor, other: str) -> tuple[float, float]:
    """The same two sums for another dtype."""
    import torch

    tried = torch.empty_like(meant, dtype=getattr(torch, other))
    store(meant, tried)
    return _sums(meant - before, meant, tried)[1:]


def _sums(wanted: Tensor, meant: Tensor, stored: Tensor) -> tuple[float, float, float]:
    """‖wanted‖², ⟨added, wanted⟩ and ‖added − wanted‖²; added − wanted is stored − meant, small and exact."""
    rest = stored.to(meant.dtype) - meant
    total = _dot(wanted, wanted)
    return total, total + _dot(rest, wanted), _dot(rest, rest)


def _dot(a: Tensor, b: Tensor) -> float:
    import torch

    return float(torch.dot(a, b))
