"""How near to the members that were learnt from a LoRA is: has it been made, or only remembered?

A LoRA that a model makes is compared with what the model makes of each member, so that a member given back is at
distance 0, whatever the model leaves out of it. Distances are of ΔW, relative to the member's.
Source: Zeng et al. 2025, arXiv:2506.07998 (generators of weights that memorise).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightops.synthesis.gauge import delta_gram, delta_norms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from weightops.synthesis.fitted import Fitted
    from weightops.synthesis.layout import Factors

REMEMBERED = 1 / 3  # of the distance that is usual among members: nearer is a member given back, or nearly
_CANDIDATES = 8  # by coefficients, of which the nearest by ΔW is taken
_ASKED = 64  # members of which the usual distance is the median
_STREAM = 7  # of the draws from a seed: which members those are
_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Neighbour:
    """The nearest training member. distance: ‖ΔW − ΔWᵢ‖ / ‖ΔWᵢ‖, ΔWᵢ as the model has the member.

    to_file: the same with ΔWᵢ as the member's own file has it; None where the space is not at hand.
    """

    name: str
    distance: float
    to_file: float | None


class Members:
    """The training members of a fitted model, as it has them."""

    def __init__(self, fitted: Fitted) -> None:
        self.fitted = fitted
        self.coefficients = fitted.decoded(fitted.latents).detach()

    def nearest(self, latents: Tensor, factors: Factors) -> Neighbour:
        """To a LoRA of latents [m] and factors [out, r] the nearest member."""
        coefficients = self.fitted.decoded(latents[None])[0].detach()
        near = self._near(coefficients, min(_CANDIDATES, len(self.coefficients)))
        distances = self._distances(coefficients, near)
        distance, best = min(zip(distances, near, strict=True))
        return Neighbour(self.fitted.trained_names[best], distance, self._to_file(best, factors))

    @functools.cached_property
    def usual(self) -> float:
        """The median, over training members, of the distance to the nearest other one."""
        import numpy as np

        count = len(self.coefficients)
        asked = np.random.default_rng((_STREAM, 0)).permutation(count)[:_ASKED]
        found = []
        for i in sorted(asked.tolist()):
            near = [j for j in self._near(self.coefficients[i], min(3, count)) if j != i][:2]
            found.append(min(self._distances(self.coefficients[i], near), default=0.0))
        return float(np.median(found))

    def _near(self, coefficients: Tensor, count: int) -> list[int]:
        """Positions of the members whose coefficients [k] are nearest."""
        import torch

        parts = [
            (self.coefficients[start : start + _CHUNK].double() - coefficients.double()).square().sum(1)
            for start in range(0, len(self.coefficients), _CHUNK)
        ]
        found: list[int] = torch.cat(parts).topk(count, largest=False).indices.tolist()
        return found

    def _distances(self, coefficients: Tensor, members: Sequence[int]) -> list[float]:
        """From coefficients [k] to each of these members."""
        import torch

        fitted, others = self.fitted, self.coefficients[list(members)]
        if fitted.pca is None:  # the components are orthonormal in ΔW
            assert fitted.space is not None
            norms = fitted.space.norms[[fitted.trained[i] for i in members]]
            apart = (coefficients.double() - others.double()).norm(dim=1).tolist()
            return [a / norm if norm else 0.0 for a, norm in zip(apart, norms.tolist(), strict=True)]
        rows = fitted.pca.rows(torch.cat([coefficients[None], others]))
        return relative(fitted.layout.unflatten(rows[:1]), fitted.layout.unflatten(rows[1:]))

    def _to_file(self, member: int, factors: Factors) -> float | None:
        fitted = self.fitted
        if fitted.space is None:
            return None
        row = fitted.space.rows([fitted.trained[member]])
        return relative([(up[None], down[None]) for up, down in factors], fitted.layout.unflatten(row))[0]


def relative(made: Factors, others: Factors) -> list[float]:
    """‖ΔW − ΔWᵢ‖ / ‖ΔWᵢ‖ of a LoRA's factors [1, out, r] to each of others' [n, out, r]."""
    a, b = float(delta_norms(made)[0]), delta_norms(others)
    squared = (a * a + b * b - 2 * delta_gram(made, others)[0]).clamp_min(0)
    return [d / norm if norm else 0.0 for d, norm in zip(squared.sqrt().tolist(), b.tolist(), strict=True)]
