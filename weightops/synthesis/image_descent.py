"""Learning from a few images by gradient descent through the frozen model, for many LoRAs at once, each for itself.

What is learnt is the caller's: coefficients of a space, or the factors themselves. Knows no space and no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightops.diffusion.models import networks
from weightops.diffusion.objectives import choose, draw, loss, noised
from weightops.engine.run import ignore
from weightops.errors import UsageError, ValueRefused
from weightops.synthesis.stacked import Stacked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from torch import Tensor

    from weightops.diffusion.objectives import Draw
    from weightops.engine.run import Progress
    from weightops.synthesis.layout import Factors, Layout
    from weightops.synthesis.own_images import OwnImages


@dataclass(frozen=True, slots=True)
class Course:
    """steps of Adam at the rate `lr`, which a half cosine takes to zero; batch: images of each LoRA in a step.

    l2: the weight of the penalty, where there is one. seed: of the images chosen, timesteps and noises.
    """

    steps: int
    lr: float
    batch: int
    seed: int
    l2: float = 0.0

    def check(self) -> Course:
        """These words, if they are possible. Raises UsageError."""
        for option, number, most in (("--steps", self.steps, 1_000_000), ("--batch", self.batch, 256)):
            if not 1 <= number <= most:
                raise UsageError(option, f"found {number:,}, expected 1 to {most:,}")
        if not 0 < self.lr < math.inf:
            raise UsageError("--lr", f"found {self.lr:g}, expected a number above 0")
        if not 0 <= self.l2 < math.inf:
            raise UsageError("--l2", f"found {self.l2:g}, expected 0 or more")
        if not 0 <= self.seed < 2**63:
            raise UsageError("--seed", f"found {self.seed}, expected 0 to {2**63 - 1:,}")
        return self

    def rate(self, step: int) -> float:
        return self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def learn_from_images(
    images: OwnImages,
    layout: Layout,
    names: Sequence[str],
    parameters: Sequence[Tensor],
    factors: Callable[[], Factors],
    course: Course,
    *,
    penalty: Callable[[], Tensor] | None = None,
    on_progress: Progress = ignore,
) -> np.ndarray:
    """Descend on `parameters`, in place, and return the loss of each step and LoRA [steps, L].

    parameters: leaf tensors whose first axis is the L names; factors: what they make now, with that axis. penalty: of
    each LoRA [L], which is added at the weight l2. The loss of a LoRA is that of its own images alone, drawn from
    (seed, step) and its images, and Adam goes number by number: each LoRA learns as it would alone. Raises
    ValueRefused where a loss is no number. Source: Kingma & Ba 2015, arXiv:1412.6980 (Adam).
    """
    import numpy as np
    import torch

    batches = [_Batches(images, name, course) for name in names]
    optimizer = torch.optim.Adam(list(parameters), lr=course.lr)
    curve = np.empty((course.steps, len(names)))
    on_progress(0, course.steps)
    with Stacked(networks(images.loaded.pipe), layout) as stacked:
        for step in range(course.steps):
            optimizer.zero_grad(set_to_none=True)
            stacked.put(factors())
            losses = _losses(images, [one.of(step) for one in batches]).reshape(len(names), -1).mean(1)
            curve[step] = losses.detach().cpu().double().numpy()
            if not np.isfinite(curve[step]).all():
                what = f"the loss of step {step + 1:,} of {course.steps:,} is no number"
                raise ValueRefused("--lr", what, f"a rate below {course.lr:g} may help, or --dtype fp32")
            total = losses.sum()
            if penalty is not None and course.l2:
                total = total + course.l2 * penalty().to(total.device).sum()
            total.backward()  # type: ignore[no-untyped-call]
            for group in optimizer.param_groups:
                group["lr"] = course.rate(step)
            optimizer.step()
            on_progress(step + 1, course.steps)
    return curve


class _Batches:
    """What chance decides for the steps of one LoRA, whatever others learn beside it."""

    def __init__(self, images: OwnImages, name: str, course: Course) -> None:
        self._images, self._course = images, course
        self._places = images.places(name)
        self._stream = images.stream(name)

    def of(self, step: int) -> tuple[list[int], Draw]:
        course, slots = self._course, range(self._course.batch)
        found = choose(
            len(self._places), seed=course.seed, step=step, slots=slots, per_step=course.batch, stream=self._stream
        )
        drawn = draw(
            self._images.objective, seed=course.seed, step=step, slots=slots, shape=self._images.encoded.shape,
            device=self._images.loaded.device, stream=self._stream,
        )  # fmt: skip
        return [self._places[n] for n in found], drawn


def _losses(images: OwnImages, batches: Sequence[tuple[list[int], Draw]]) -> Tensor:
    """The loss of each sample, LoRA by LoRA, with gradients for the factors that are on."""
    import torch

    from weightops.diffusion.objectives import Draw

    indices = [place for places, _ in batches for place in places]
    drawn = Draw(*(torch.cat([getattr(own, name) for _, own in batches]) for name in Draw.__slots__))
    given = images.encoded.batch(indices, [False] * len(indices))
    latents = given["mean"] + given["std"] * drawn.posterior
    noisy = noised(images.objective, latents, drawn)
    answer = images.encoding.predict(images.loaded.pipe, noisy, drawn.timesteps, given, given["sizes"])
    return loss(images.objective, answer, latents, drawn)


def plain_start(layout: Layout, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """New factors of `count` LoRAs as training begins them: up zero, down Gaussian with deviation 1/rank; leaves.

    Source: the initialisation that `weightops train` calls gaussian, as PEFT has it.
    """
    import numpy as np
    import torch

    random = np.random.default_rng((seed, 0x10A))
    found = []
    for module in layout.modules:
        drawn = random.standard_normal((module.rank, module.n), np.float32) / module.rank
        down = torch.from_numpy(drawn).repeat(count, 1, 1).requires_grad_()
        found.append((torch.zeros(count, module.out, module.rank, requires_grad=True), down))
    return found
