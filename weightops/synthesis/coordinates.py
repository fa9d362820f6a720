"""The numbers of a space that are learnt from images: how they make factors, and their descent. Knows no file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightops.engine.run import ignore
from weightops.errors import UsageError
from weightops.synthesis.image_descent import learn_from_images, plain_start

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch
    from torch import Tensor

    from weightops.engine.run import Progress
    from weightops.synthesis.fitted import Fitted
    from weightops.synthesis.image_descent import Course
    from weightops.synthesis.layout import Layout
    from weightops.synthesis.own_images import OwnImages
    from weightops.synthesis.pca import Pca
    from weightops.synthesis.vae import Vae


@dataclass(frozen=True, slots=True, eq=False)
class Coordinates:
    """Latents (mean + c · deviation) of the rows mean + latents · basis, or of what a VAE decodes to coefficients.

    c [L, m] is in units of the deviation that the training members have, number by number: 0 is their mean LoRA, and
    a LoRA like theirs is about as long as √m. The basis is in one tensor, on the device where it is used.
    """

    layout: Layout
    middle: Tensor  # [m], of the latents of training members
    deviation: Tensor  # [m]
    offset: Tensor  # [d]
    basis: Tensor  # [k, d]
    vae: Vae | None = None

    @property
    def size(self) -> int:
        return len(self.middle)

    @property
    def nbytes(self) -> int:
        """Of the basis and the mean."""
        return self.basis.nbytes + self.offset.nbytes

    def latents(self, c: Tensor) -> Tensor:
        """Latents [L, m] of c [L, m]."""
        return self.middle + c * self.deviation

    def of_latents(self, latents: Tensor) -> Tensor:
        """c [L, m] of latents [L, m]; 0 for a number that never changes."""
        import torch

        return torch.where(self.deviation > 0, (latents - self.middle) / self.deviation, 0.0)

    def factors(self, c: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Factors [L, out, r] of c [L, m], on the basis's device; differentiable."""
        latents = self.latents(c)
        found = latents if self.vae is None else self.vae.decode(latents)
        return self.layout.unflatten(self.offset + found.to(self.basis.device) @ self.basis)


def coordinates(
    layout: Layout, pca: Pca, latents: Tensor, *, vae: Vae | None = None, components: int | None = None,
    device: torch.device | str = "cpu",
) -> Coordinates:  # fmt: skip
    """latents [n, m]: of the training members. components: the first ones alone, where there is no VAE."""
    kept = latents if components is None else latents[:, :components]
    basis = pca.basis if components is None else pca.basis[:components]
    middle, deviation = kept.mean(0), kept.std(0, correction=0)
    return Coordinates(
        layout, middle, deviation, pca.mean.float().to(device), basis.float().to(device).contiguous(), vae
    )  # fmt: skip


def coordinates_of(
    fitted: Fitted, *, components: int | None = None, device: torch.device | str = "cpu"
) -> Coordinates:  # fmt: skip
    """Of a fitted model. Raises UsageError where it has none that could be learnt, or fewer components."""
    if fitted.pca is None:
        what = "is learnt from ΔW: its components have no factors that gradients could go through"
        raise UsageError(fitted.label, what, "weightops synth fit pca --geometry rows makes one that has")
    if components == fitted.size:
        components = None
    if components is not None and fitted.vae is not None:
        raise UsageError("--components", f"is of components, but {fitted.label} has latents of a VAE")
    if components is not None and not 1 <= components <= fitted.components:
        what = f"found {components:,}, expected 1 to {fitted.components:,}, of which {fitted.label} is"
        raise UsageError("--components", what)
    return coordinates(
        fitted.layout, fitted.pca, fitted.latents, vae=fitted.vae, components=components, device=device
    )  # fmt: skip


def learn_coefficients(
    images: OwnImages, space: Coordinates, names: Sequence[str], course: Course, *, start: Tensor | None = None,
    on_progress: Progress = ignore,
) -> tuple[Tensor, np.ndarray]:  # fmt: skip
    """c [L, m] of LoRAs learnt from the images of each name, and the loss of each step [steps, L].

    start: c to begin at; None: 0, the mean LoRA. What is made less is the loss + l2 · ½‖c‖², which is what a Gaussian
    prior of the training members' deviations adds to it. Raises ValueRefused.
    """
    import torch

    c = torch.zeros(len(names), space.size) if start is None else start.detach().clone().float()
    c.requires_grad_()
    curve = learn_from_images(
        images, space.layout, names, [c], lambda: space.factors(c), course,
        penalty=lambda: 0.5 * c.square().sum(1), on_progress=on_progress,
    )  # fmt: skip
    return c.detach(), curve


def learn_plain(
    images: OwnImages, layout: Layout, names: Sequence[str], course: Course, *, on_progress: Progress = ignore
) -> tuple[list[tuple[Tensor, Tensor]], np.ndarray]:
    """The factors [L, out, r] of LoRAs that are trained from nothing on the images of each name, by the same descent.

    Of the layout's ranks; what coefficients of a space are to be compared with. Raises ValueRefused.
    """
    factors = plain_start(layout, len(names), course.seed)
    parameters = [factor for pair in factors for factor in pair]
    curve = learn_from_images(
        images, layout, names, parameters, lambda: factors, course, on_progress=on_progress
    )  # fmt: skip
    return [(up.detach(), down.detach()) for up, down in factors], curve
