"""What an evaluation asks of LoRAs that a space made: their gap, and how far they are from others.

Knows no part and no table: factors of named LoRAs go in, numbers come out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops.synthesis.gap import Gap, Losses
from weightops.synthesis.gauge import delta_gram, delta_norms

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from weightops.synthesis.layout import Factors, Layout
    from weightops.synthesis.own_images import OwnImages
    from weightops.synthesis.space import Space


def difference(a: Factors, b: Factors) -> Factors:
    """Factors of ΔW_a − ΔW_b, as wide as both together."""
    import torch

    return [
        (torch.cat([up.double(), other_up.double()], -1), torch.cat([down.double(), -other_down.double()], -2))
        for (up, down), (other_up, other_down) in zip(a, b, strict=True)
    ]


def delta_error(found: Factors, true: Factors) -> float:
    """‖ΔW found − ΔW true‖ / ‖ΔW true‖, over all LoRAs and modules together."""
    wrong = delta_norms(difference(found, true)).square().sum()
    return float((wrong / delta_norms(true).square().sum()).sqrt())


def distances(factors: Factors, space: Space, members: Sequence[int]) -> np.ndarray:
    """‖ΔW − ΔWᵢ‖ of each LoRA [L, out, r] from each of these members [L, members], float64."""
    import numpy as np

    own = delta_norms(factors).square().numpy()[:, None]
    others = np.square(space.norms[list(members)])[None, :]
    products = np.empty((len(own), len(members)))
    for where, rows in space.blocks(list(members)):
        products[:, where] = delta_gram(factors, space.layout.unflatten(rows)).numpy()
    # Rounding leaves less than nothing of a member's distance from itself.
    found: np.ndarray = np.sqrt(np.maximum(own - 2 * products + others, 0))
    return found


def nearest_distances(factors: Factors, space: Space, members: Sequence[int]) -> dict[str, Any]:
    """Of each LoRA the distance to the nearest of these members, as a share of the members' mean norm."""
    import numpy as np

    unit = float(space.norms[list(members)].mean())
    least = distances(factors, space, members).min(1) / unit
    return {"nearest": float(np.median(least)), "least": float(least.min())}


def among(space: Space, members: Sequence[int]) -> dict[str, Any]:
    """The same of the members themselves, each from the others."""
    import numpy as np

    members = list(members)
    unit = float(space.norms[members].mean())
    least = np.empty(len(members))
    for where, rows in space.blocks(members):
        found = distances(space.layout.unflatten(rows), space, members)
        found[np.arange(len(found)), np.arange(where.start, where.stop)] = np.inf
        least[where] = found.min(1)
    least /= unit
    return {"nearest": float(np.median(least)), "least": float(least.min())}


@dataclass(slots=True)
class Gaps:
    """Gaps of LoRAs by name; what the model alone and the trained LoRAs lose is measured once for each name.

    space: has the LoRAs that were really trained.
    """

    images: OwnImages
    layout: Layout
    space: Space
    pairs: int
    seed: int
    batch: int
    _base: dict[str, float] = field(default_factory=dict)
    _trained: dict[str, float] = field(default_factory=dict)

    def losses(self) -> Losses:
        return Losses(self.images, self.layout, pairs=self.pairs, seed=self.seed, batch=self.batch)

    def of(self, names: Sequence[str], factors: Factors) -> Gap:
        """The gap of factors [L, out, r] for these names. Raises ValueRefused."""
        with self.losses() as losses:
            base, trained = self._own(names, losses)
            return losses.gap(names, base, trained, factors)

    def said(self, names: Sequence[str], factors: Factors) -> dict[str, Any]:
        """For a cell: the gap, its error over the LoRAs, and the losses of each."""
        found = self.of(names, factors)
        return {
            "gap": found.value, "gap error": found.error, "losses": found.found.tolist(), "base": found.base.tolist(),
            "trained": found.trained.tolist(), "worse than none": float((found.found > found.base).mean()),
        }  # fmt: skip

    def _own(self, names: Sequence[str], losses: Losses) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        new = [name for name in names if name not in self._base]
        if new:
            true = self.space.rows([self.space.position(name) for name in new])
            self._base |= dict(zip(new, losses.of(new, None).tolist(), strict=True))
            self._trained |= dict(zip(new, losses.of(new, self.layout.unflatten(true)).tolist(), strict=True))
        return np.array([self._base[name] for name in names]), np.array([self._trained[name] for name in names])
