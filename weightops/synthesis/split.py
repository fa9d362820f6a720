"""Which members of a space are trained on, and which are held out to measure on. Knows nothing of what is learnt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightops.errors import UsageError

if TYPE_CHECKING:
    from weightops.synthesis.space import Space

_STREAM = 1  # of the draws from one seed: no other part of a synthesis draws from it


def split(space: Space, held_out: float | int, seed: int) -> tuple[list[int], list[int]]:
    """The trained and the held-out members' indices, each in ascending order; the same for the same space and seed.

    held_out: a share below 1, or so many. Raises UsageError where none is left to train on.
    """
    return split_count(len(space), held_out, seed, label=space.label)


def split_count(count: int, held_out: float | int, seed: int, *, label: str) -> tuple[list[int], list[int]]:
    """The same of `count` members; `label` begins the error."""
    import numpy as np

    if not 0 <= seed < 2**63:
        raise UsageError("--seed", f"found {seed}, expected 0 to {2**63 - 1:,}")
    if not 0 <= held_out < 2**63 or (held_out >= 1 and held_out != int(held_out)):  # NaN, too
        expected = "a share below 1, such as 0.2, or a whole number of LoRAs"
        raise UsageError("--held-out", f"found {held_out}, expected {expected}")
    apart = round(held_out * count) if held_out < 1 else int(held_out)
    if apart >= count:
        what = f"holds {count:,} LoRAs, and {apart:,} held out leave none to train on"
        raise UsageError(label, what, "hold out fewer with --held-out, or collect more LoRAs")
    order = np.random.default_rng((_STREAM, seed)).permutation(count)
    return sorted(order[apart:].tolist()), sorted(order[:apart].tolist())
