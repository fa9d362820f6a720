"""The LoRAs of the made-up creatures, trained many at once on one base: each as it would be trained alone.

All begin with the same first factors, and each sees its own pictures, times and noise. Knows no file.
"""

from __future__ import annotations

import copy
import math
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from weightops.diffusion.lora_modules import layers
from weightops.diffusion.objectives import Draw, loss, noised
from weightops.engine.run import usable_cores
from weightops.errors import Interrupted
from weightops.synthesis.family_base import normal
from weightops.synthesis.family_networks import ARCHITECTURE
from weightops.synthesis.family_pictures import generator
from weightops.synthesis.layout import Layout, Module
from weightops.synthesis.stacked import Stacked

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    import numpy as np
    from torch import Tensor, nn

    from weightops.diffusion.objectives import Objective
    from weightops.synthesis.layout import Factors

Learnt = TypeVar("Learnt")

# Attention, and what leads out of the feed-forward layers and of each transformer: enough to learn who it is.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_out")
GROUP = 32  # LoRAs at once: above, a step takes longer in proportion
_BATCH = 8  # pictures of each, in a step
_RATE = 3e-2
_PAIRS = 4  # timesteps of the held-out loss
_THREADS = 8  # each takes some hundred MB

# Streams of chance, as in family_base.
_START, _STEPS, _HELD_OUT, _GAUGE = 16, 17, 18, 19


def layout_of(unet: nn.Module, rank: int) -> Layout:
    """The modules that train, at this rank."""
    sizes = layers(unet)
    chosen = [name for name in sizes if any(name.endswith(f".{target}") for target in TARGETS)]
    return Layout(ARCHITECTURE, tuple(Module("unet", name, sizes[name], rank) for name in chosen))


def first_factors(layout: Layout, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Up of zeros, down N(0, 1/n): what every LoRA begins with."""
    import torch

    numbers = generator(seed, _START)
    found = []
    for m in layout.modules:
        down = numbers.standard_normal((m.rank, m.n), "float32") / math.sqrt(m.n)
        found.append((torch.zeros(m.out, m.rank), torch.from_numpy(down)))
    return found


class Trainer:
    """A base that stays as it is, and what LoRAs of it are asked for. words: the caption's embedding [1, tokens, c]."""

    def __init__(self, unet: nn.Module, layout: Layout, objective: Objective, words: Tensor, seed: int) -> None:
        self.layout = layout
        self._unet = unet.eval().requires_grad_(False)
        self._objective = objective
        self._words = words
        self._seed = seed
        self.stopped = threading.Event()  # no further step is begun

    def copy(self) -> Trainer:
        """Another one, with a network of its own, which stops with this one."""
        made = Trainer(copy.deepcopy(self._unet), self.layout, self._objective, self._words, self._seed)
        made.stopped = self.stopped
        return made

    def train(self, who: Sequence[int], latents: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
        """The factors of LoRAs of these creatures' numbers [L, …], learnt from latents [L, n, c, h, w] of pictures."""
        import torch

        count, pictures = latents.shape[:2]
        factors = [
            (up.expand(count, -1, -1).clone().requires_grad_(), down.expand(count, -1, -1).clone().requires_grad_())
            for up, down in first_factors(self.layout, self._seed)
        ]
        optimizer = torch.optim.Adam([f for pair in factors for f in pair], lr=_RATE, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda n: min(1.0, (n + 1) / 5) * (0.5 + 0.5 * math.cos(math.pi * n / steps))
        )
        numbers = [generator(self._seed, _STEPS, each) for each in who]
        with Stacked({"unet": self._unet}, self.layout) as stacked:
            for _ in range(steps):
                if self.stopped.is_set():
                    raise Interrupted("synth family", "stopped")
                drawn = [self._drawn(one, pictures, latents.shape[2:]) for one in numbers]
                seen = torch.cat([own[chosen] for own, (chosen, _, _) in zip(latents, drawn, strict=True)])
                times = torch.cat([t for _, t, _ in drawn])
                stacked.put(factors)
                losses = self._losses(seen, times, torch.cat([noise for _, _, noise in drawn]))
                # A mean over its own samples for each LoRA, and the sum of these: none feels the others.
                (losses.sum() / _BATCH).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
        return [(up.detach(), down.detach()) for up, down in factors]

    def gained(self, who: Sequence[int], latents: Tensor, factors: Factors) -> np.ndarray:
        """The mean losses [L, 2], float64, on latents [L, n, c, h, w]: of the base alone, and with each LoRA."""
        import numpy as np

        return np.stack([self._held_out(who, latents, given) for given in (None, factors)], 1)

    def _held_out(self, who: Sequence[int], latents: Tensor, factors: Factors | None) -> np.ndarray:
        import torch

        count, pictures = latents.shape[:2]
        numbers = [generator(self._seed, _HELD_OUT, each) for each in who]
        total = torch.zeros(count, dtype=torch.float64)
        with torch.no_grad(), Stacked({"unet": self._unet}, self.layout) as stacked:
            stacked.put(factors)
            for pair in range(_PAIRS):
                time = int((pair + 0.5) * self._objective.steps / _PAIRS)
                times = torch.full((count * pictures,), time)
                noise = torch.cat([normal(one, (pictures, *latents.shape[2:])) for one in numbers])
                losses = self._losses(latents.flatten(0, 1), times, noise)
                total += losses.double().reshape(count, pictures).mean(1) / _PAIRS
        return total.numpy()

    def _drawn(
        self, numbers: np.random.Generator, pictures: int, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which pictures a step sees, at which times (spread evenly, each anywhere in its part), and the noise."""
        import torch

        chosen = torch.from_numpy(numbers.integers(pictures, size=_BATCH))
        times = (numbers.permutation(_BATCH) + numbers.random(_BATCH)) / _BATCH * self._objective.steps
        return chosen, torch.from_numpy(times.astype("int64")), normal(numbers, (_BATCH, *shape))

    def _losses(self, latents: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        import torch

        drawn = Draw(noise, torch.zeros(0), times, torch.zeros(0))
        unet: Any = self._unet
        words = self._words.expand(len(latents), -1, -1)
        said = unet(noised(self._objective, latents, drawn), times, words).sample
        return loss(self._objective, said, latents, drawn)


def at_once(
    trainer: Trainer, learnt: Callable[[Trainer, list[int]], Learnt], groups: Sequence[list[int]]
) -> Generator[Learnt, None, None]:  # fmt: skip
    """What `learnt` makes of each group, in their order, on as many threads as there are cores, one group on each.

    A group is the same numbers wherever it is made: each thread has a network of its own, and computes alone.
    """
    import torch

    free: queue.SimpleQueue[Trainer] = queue.SimpleQueue()
    workers = max(1, min(usable_cores(), len(groups), _THREADS))
    for number in range(workers):
        free.put(trainer.copy() if number else trainer)

    def work(group: list[int]) -> Learnt:
        torch.set_num_threads(1)
        own = free.get()
        try:
            return learnt(own, group)
        finally:
            free.put(own)

    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(work, group) for group in groups]
        try:
            for each in waiting:
                yield each.result()
        finally:
            trainer.stopped.set()
            for each in waiting:
                each.cancel()


def other_gauge(layout: Layout, factors: Factors, who: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The same ΔW of one LoRA [no leading axis] by other factors: up·G and G⁻¹·down, as another trainer might have it.

    G is random in each module: a rotation, strengths from 1 to at most 10 times the least, and a rotation.
    """
    import numpy as np
    import torch

    numbers = generator(seed, _GAUGE, who)
    found = []
    for module, (up, down) in zip(layout.modules, factors, strict=True):
        left, right = (np.linalg.qr(numbers.standard_normal((module.rank, module.rank)))[0] for _ in range(2))
        strengths = 10 ** (numbers.random(module.rank) - 0.5)
        gauge = torch.from_numpy(left * strengths @ right)
        inverse = torch.from_numpy(right.T / strengths @ left.T)
        found.append(((up.double() @ gauge).float(), (inverse @ down.double()).float()))
    return found
