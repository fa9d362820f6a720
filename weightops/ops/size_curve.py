"""What a file of each size costs in error: one rank for all modules, and ranks shared out to where they tell most."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from weightops.lora.rank import RankRule, ranks_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightops.lora.rank import Spectrum

# Ranks that are tried, up to the largest that there is.
RANKS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def curve(
    given: Sequence[Spectrum], ranks: Sequence[int], size_of: Callable[[Sequence[int]], int]
) -> list[dict[str, Any]]:
    """A point for each rank: the file's bytes and error with that rank for all, and its error with ranks shared out.

    given: the modules' spectra; ranks: those that they have; size_of: the bytes of a file of given ranks. The errors
    are relative to the Frobenius norm of all modules together, weighed as the spectra say.
    """
    largest = max(ranks)
    points = []
    for rank in [*(r for r in RANKS if r < largest), largest]:
        same = [min(rank, len(s.values)) for s in given]
        nbytes = size_of(same)
        sizes = [(1 << 62, 1 << 62)] * len(given)
        shared = ranks_for([RankRule("size", nbytes)] * len(given), given, sizes, size_of)
        points.append({
            "rank": rank, "bytes": nbytes, "error": error_of(given, same), "shared_error": error_of(given, shared),
            "shared_bytes": size_of(shared), "shared_ranks": [min(shared), max(shared)],
        })  # fmt: skip
    return points


def error_of(given: Sequence[Spectrum], ranks: Sequence[int]) -> float:
    """√(Σ w·lost / Σ w·energy) of these ranks."""
    whole = math.fsum(s.weight * s.energy for s in given)
    lost = math.fsum(s.weight * math.fsum(v * v for v in s.values[r:]) for s, r in zip(given, ranks, strict=True))
    return math.sqrt(lost / whole) if whole else 0.0
