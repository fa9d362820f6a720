"""Directions of labels in what was learnt of a space: least squares of latents on all labels at once. Knows no file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightops.errors import UsageError, listing, quote

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

PERMUTATIONS = 200
_FEWEST = 20  # where there is much to permute
_WORK = 2e11  # multiplications that the null may take
_QUANTILE = 0.95
_STREAM = 13  # of the draws from a seed
_COLLINEAR = 1e-6  # of a label's variance, below which the others say all that it says


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """What a label does to latents, beyond what the other labels do. deviation: of the label.

    latents [m]: the change for one deviation more of it. share: of the latents' whole variance that the label alone
    explains (R², beyond the others); null: what 95 % of such shares are below where the label is shuffled.
    """

    label: str
    deviation: float
    latents: NDArray[np.float64]
    share: float
    null: float

    @property
    def is_chance(self) -> bool:
        return self.share <= self.null


def directions_of(latents: Tensor, labels: NDArray[np.float64], names: Sequence[str], *, where: str) -> list[Direction]:
    """Of latents [n, m] and labels [n, c], each label's direction, in the labels' order.

    Least squares of the centred latents on all centred labels together, unshrunk: a direction holds nothing of what its
    label shares with the others. The null shuffles what the others do not say of a label, over the residuals of the
    latents. Labels that never change are left out. Raises UsageError where there are too few LoRAs, or where a label is
    a sum of others.
    Source: Frisch & Waugh 1933 (partial regression); Freedman & Lane 1983 (its permutations).
    """
    import numpy as np

    deviations = labels.std(0)
    kept = [i for i, d in enumerate(deviations) if d > 1e-12 * max(float(np.abs(labels[:, i]).max()), 1e-300)]
    n, c = len(labels), len(kept)
    if n < c + 3:
        what = f"found {n:,} LoRAs with {c:,} labels, expected at least {c + 3:,}: least squares takes more LoRAs"
        raise UsageError(where, what, "--labels FILE.csv with fewer labels")
    if not c:
        return []
    standard = (labels[:, kept] - labels[:, kept].mean(0)) / deviations[kept]
    centred = latents.double().numpy() - latents.double().numpy().mean(0)
    own = _beyond_others(standard, [names[i] for i in kept], where)
    weights = np.linalg.lstsq(standard, centred, rcond=None)[0]
    whole = float((centred**2).sum())
    # What a label explains beyond the others lies along what they do not say of it.
    units = own / np.linalg.norm(own, axis=0)
    caught = units.T @ centred
    residuals = centred - standard @ weights
    nulls = _nulls(units, residuals, caught)
    return [
        Direction(names[i], float(deviations[i]), weights[j], float((caught[j] ** 2).sum()) / whole, nulls[j] / whole)
        for j, i in enumerate(kept)
    ]


def _beyond_others(standard: NDArray[np.float64], names: Sequence[str], where: str) -> NDArray[np.float64]:
    """Of each label what the others do not say of it. Raises UsageError where that is nothing."""
    import numpy as np

    found = np.empty_like(standard)
    for j in range(standard.shape[1]):
        others = np.delete(standard, j, 1)
        found[:, j] = standard[:, j] - others @ np.linalg.lstsq(others, standard[:, j], rcond=None)[0]
    alone = (found**2).mean(0)
    lost = [name for name, share in zip(names, alone, strict=True) if share < _COLLINEAR]
    if lost:
        what = f"the other labels say all that {listing(lost)} {'says' if len(lost) == 1 else 'say'}"
        raise UsageError(where, what, "--labels FILE.csv with one of them less")
    return found


def _nulls(
    units: NDArray[np.float64], residuals: NDArray[np.float64], caught: NDArray[np.float64]
) -> list[float]:  # fmt: skip
    """Of each label the 95 % quantile of the squares that it catches when it is shuffled."""
    import numpy as np

    n, c = units.shape
    times = int(np.clip(_WORK / max(n * c * residuals.shape[1], 1), _FEWEST, PERMUTATIONS))
    drawn = np.random.default_rng((_STREAM, n, c))
    found = np.empty((times, c))
    for turn in range(times):
        shuffled = units[drawn.permutation(n)]
        # Residuals without the label are those with it, and along what the label says what it catches.
        along = (shuffled * units).sum(0)
        found[turn] = ((shuffled.T @ residuals + along[:, None] * caught) ** 2).sum(1)
    return [float(x) for x in np.quantile(found, _QUANTILE, axis=0)]


def direction_of(found: Sequence[Direction], label: str, names: Sequence[str], *, where: str) -> Direction:
    """The direction of a label. Raises UsageError for one that is not there, or never changes."""
    import difflib

    for direction in found:
        if direction.label == label:
            return direction
    if label in names:
        raise UsageError(where, f"{quote(label)} is the same for all LoRAs, and tells none from another")
    near = difflib.get_close_matches(label, names, n=1)
    hint = f"did you mean {near[0]}?" if near else None
    raise UsageError(where, f"found {quote(label)}, expected one of {listing(names)}", hint)
