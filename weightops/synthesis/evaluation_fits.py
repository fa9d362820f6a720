"""What is learnt of a space within one seed of an evaluation: made when first asked for, and shared by all parts.

Nothing is written. Knows no images and no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops.diffusion.processes import Processes
from weightops.synthesis.baselines import fit_nearest, fit_ridge
from weightops.synthesis.denoiser import made_denoiser
from weightops.synthesis.gauge import delta_gram
from weightops.synthesis.gram import delta_pca, inner_products
from weightops.synthesis.pca import as_pca, principal
from weightops.synthesis.vae import made_vae

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from weightops.synthesis.baselines import Nearest, Ridge
    from weightops.synthesis.denoiser import Denoiser
    from weightops.synthesis.gram import DeltaPca
    from weightops.synthesis.pca import Pca
    from weightops.synthesis.space import Space
    from weightops.synthesis.vae import Vae


@dataclass(slots=True)
class Fits:
    """Of one space and seed. trained, held: members' indices; most: components of the largest PCA."""

    space: Space
    trained: list[int]
    held: list[int]
    seed: int
    most: int
    memory: int
    _made: dict[Any, Any] = field(default_factory=dict)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    # -------------------------------------------------------------------------------------------- rows

    @property
    def names(self) -> list[str]:
        """Of the held-out members."""
        return [self.space.names[index] for index in self.held]

    @property
    def rows(self) -> Tensor:
        """Of the held-out members [n, d]."""
        found: Tensor = self._once("rows", lambda: self.space.rows(self.held))
        return found

    @property
    def true(self) -> list[tuple[Tensor, Tensor]]:
        """The held-out members' own factors."""
        return self.space.layout.unflatten(self.rows)

    def factors(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        return self.space.layout.unflatten(rows)

    def conditions(self, members: Sequence[int]) -> Any:
        assert self.space.conditions is not None
        return self.space.conditions[list(members)]

    # -------------------------------------------------------------------------------------------- components

    def pca(self) -> Pca:
        """Of as many components as there are, up to the most."""

        def make() -> Pca:
            found, _, _ = principal(
                self.space, self.trained, self.space.width, min(self.most, len(self.trained) - 1), memory=self.memory,
                seed=self.seed,
            )  # fmt: skip
            return as_pca(found)

        found: Pca = self._once("pca", make)
        return found

    def coefficients(self) -> Tensor:
        """Of the trained members [n, k]."""

        def make() -> Tensor:
            import torch

            pca = self.pca()
            return torch.cat([pca.coefficients(rows) for _, rows in self.space.blocks(self.trained)])

        found: Tensor = self._once("coefficients", make)
        return found

    def products(self) -> Tensor:
        """⟨ΔWᵢ, ΔWⱼ⟩ of the trained members [n, n]."""
        found: Tensor = self._once(
            "products",
            lambda: inner_products(
                self.space, self.trained, memory=self.memory, processes=Processes(), on_block=lambda _: None
            ),
        )
        return found

    def delta(self) -> DeltaPca:
        """The components of ΔW itself."""
        most = min(self.most, len(self.trained) - 1)
        found: DeltaPca = self._once("delta", lambda: delta_pca(self.products(), self.trained, most))
        return found

    def delta_products(self) -> Tensor:
        """⟨ΔW, ΔWᵢ⟩ of held-out and trained members [held, trained]."""

        def make() -> Tensor:
            import torch

            found = torch.empty(len(self.held), len(self.trained), dtype=torch.float64)
            for where, rows in self.space.blocks(self.trained):
                found[:, where] = delta_gram(self.true, self.factors(rows))
            return found

        found: Tensor = self._once("delta products", make)
        return found

    # -------------------------------------------------------------------------------------------- networks, baselines

    def vae(self, layers: str, beta: float, latents: int, steps: int) -> Vae:
        """Of all coefficients."""
        found: Vae = self._once(
            ("vae", layers, beta, latents),
            lambda: made_vae(
                self.coefficients(), latents=latents, layers=layers, beta=beta, steps=steps, seed=self.seed
            )[0],
        )
        return found

    def nearest(self) -> Nearest:
        found: Nearest = self._once("nearest", lambda: fit_nearest(self.conditions(self.trained)))
        return found

    def ridge(self, components: int) -> Ridge:
        found: Ridge = self._once(
            ("ridge", components),
            lambda: fit_ridge(self.conditions(self.trained), self.coefficients()[:, :components]),
        )
        return found

    def rows_of(self, coefficients: Tensor) -> Tensor:
        """Rows [n, d] of the first coefficients [n, k] alone."""
        pca = self.pca()
        return pca.mean + coefficients @ pca.basis[: coefficients.shape[1]]

    def denoiser(self, components: int, prediction: str, conditioning: str, steps: int) -> Denoiser:
        """Of the first coefficients, on the conditions where there are any."""
        found: Denoiser = self._once(
            ("diffusion", components, prediction, conditioning),
            lambda: made_denoiser(
                self.coefficients()[:, :components],
                None if self.space.conditions is None else self.conditions(self.trained), prediction=prediction,
                conditioning=conditioning, steps=steps, seed=self.seed,
            )[0],
        )  # fmt: skip
        return found
