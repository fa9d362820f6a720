"""Small networks as named tensors, and their descent by AdamW: steps drawn from (seed, step), shared, gone on with.

All weights of a network lie in one vector: processes sum one gradient, and a checkpoint holds four such vectors. Knows
no network and no file: what is kept of a state, and where, is said by who calls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from weightops.diffusion.processes import Processes
from weightops.diffusion.threads import one_thread
from weightops.errors import UsageError, ValueRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from torch import Tensor

Weights = dict[str, "Tensor"]

_BETAS = (0.9, 0.99)
_EPSILON = 1e-8
# What the numbers of a seed are for: the same seed never draws the same numbers for two things.
_BATCHES, _NOISE, _START, _KEPT, TIMES_DRAWN = 1, 2, 3, 4, 5


@dataclass(frozen=True, slots=True)
class Pace:
    """How to descend. lr: at first, after a short warmup; a half cosine takes it to zero. batch: members a step.

    average: of the weights' running mean, which is what is kept in the end; 0: the last weights themselves.
    """

    steps: int
    lr: float
    batch: int
    weight_decay: float
    average: float
    seed: int

    def check(self) -> Pace:
        """These words, if they are possible. Raises UsageError."""
        for option, number in (("--steps", self.steps), ("--batch", self.batch)):
            if number < 1:
                raise UsageError(option, f"found {number}, expected a whole number, 1 or more")
        if not 0 < self.lr < math.inf:
            raise UsageError("--lr", f"found {self.lr:g}, expected a number above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError("--weight-decay", f"found {self.weight_decay:g}, expected 0 or more")
        if self.seed < 0:
            raise UsageError("--seed", f"found {self.seed}, expected 0 or more")
        return self

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warmup = min(20, max(1, self.steps // 10))
        return self.lr * min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * step / self.steps))


@dataclass(slots=True)
class State:
    """Where a descent stands. weights, first, second, averaged: [p]; losses: [parts], means of the last steps."""

    step: int
    weights: Tensor
    first: Tensor
    second: Tensor
    averaged: Tensor
    losses: Tensor


class Loss(Protocol):
    """What a step lessens: the first of the sums over its members, [parts]; the others are only told.

    members: [b] of a step that this process has; slots: which of the step's they are; step: for its noise.
    """

    def __call__(self, weights: Weights, members: Tensor, slots: slice, step: int) -> Tensor: ...


def length(steps: int | None, count: int, batch: int, *, least: int) -> int:
    """How many steps are made of `count` members where none are asked for: the least, or thirty times each member."""
    return max(least, 30 * count // batch) if steps is None else steps


def generator(seed: int, step: int, *, purpose: int = _NOISE) -> np.random.Generator:
    """Random numbers of one step; torch's own would keep 32 bits of a seed."""
    import numpy as np

    return np.random.default_rng((seed, purpose, step))


def starting(shapes: Mapping[str, tuple[int, ...]], seed: int, *, zero: frozenset[str] = frozenset()) -> Weights:
    """New weights: matrices [in, out] of variance 1/in, vectors and what is in `zero` zeros."""
    import torch

    random = generator(seed, 0, purpose=_START)
    made = {}
    for name, shape in shapes.items():
        if len(shape) < 2 or name in zero:
            made[name] = torch.zeros(shape)
        else:
            drawn = torch.from_numpy(random.standard_normal(shape, "float32"))
            made[name] = drawn / math.sqrt(shape[0])
    return made


def normal(seed: int, step: int, slots: slice, width: int, *, batch: int) -> Tensor:
    """Gaussian noise [slots, width] of a step. A slot's is its own, however many processes share the step."""
    import torch

    drawn = generator(seed, step).standard_normal((batch, width), "float32")
    return torch.from_numpy(drawn[slots])


def kept(seed: int, step: int, slots: slice, width: int, *, batch: int, drop: float) -> Tensor | None:
    """Factors [slots, width] of a step: 0 for the share `drop` of the hidden numbers, and 1/(1 − drop) for the rest.

    None where nothing is dropped. Source: Srivastava et al. 2014 (dropout).
    """
    import torch

    if not drop:
        return None
    drawn = generator(seed, step, purpose=_KEPT).random((batch, width), "float32")
    return (torch.from_numpy(drawn[slots]) >= drop) / (1 - drop)


def descend(
    loss: Loss,
    weights: Weights,
    count: int,
    pace: Pace,
    *,
    parts: tuple[str, ...],
    where: str,
    device: str = "cpu",
    processes: Processes | None = None,
    state: State | None = None,
    keep: Callable[[State], None] | None = None,
    on_progress: Callable[[int, int, float | None], None] | None = None,
) -> tuple[Weights, dict[str, float]]:
    """The weights after all the steps, on the CPU, and the running means of the loss's parts.

    count: of members; a step takes `batch` of them, or all where there are fewer. Matrices decay, vectors do not.
    state: to go on from; keep: is called after each step with where it stands. where: begins an error.
    Raises ValueRefused when a loss is no number. Source: Loshchilov & Hutter, arXiv:1711.05101 (AdamW).
    """
    import torch

    processes = processes or Processes()
    sizes = {name: weight.shape for name, weight in weights.items()}
    counts = [weight.numel() for weight in weights.values()]
    if state is None:
        flat = torch.cat([weight.reshape(-1) for weight in weights.values()])
        state = State(0, flat, torch.zeros_like(flat), torch.zeros_like(flat), flat.clone(), torch.zeros(len(parts)))
    for name in ("weights", "first", "second", "averaged", "losses"):
        setattr(state, name, getattr(state, name).to(device, copy=True))
    decays = torch.cat([torch.full((n,), float(len(s) > 1)) for n, s in zip(counts, sizes.values(), strict=True)])
    decays = decays.to(device) * pace.weight_decay

    def named(flat: Tensor) -> Weights:
        pieces = torch.split(flat, counts)
        return {name: piece.view(size) for piece, (name, size) in zip(pieces, sizes.items(), strict=True)}

    with one_thread(sum(counts)):
        while state.step < pace.steps:
            members, slots = _batch(count, pace, state.step, processes)
            leaf = state.weights.requires_grad_(True)
            found = loss(named(leaf), members.to(device), slots, state.step)
            (gradient,) = torch.autograd.grad(found[0], leaf)
            state.weights = leaf.detach()
            # One tensor for the processes to sum: the loss's parts travel with the gradient.
            summed = processes.sum(torch.cat([gradient, found.detach()])) / min(count, pace.batch)
            _apply(state, summed[: len(gradient)], summed[len(gradient) :], decays, pace, where)
            if keep is not None:
                keep(state)
            if on_progress is not None:
                on_progress(state.step, pace.steps, float(state.losses[0]))
    losses = dict(zip(parts, state.losses.tolist(), strict=True))
    return {name: weight.cpu().clone() for name, weight in named(state.averaged).items()}, losses


def _batch(count: int, pace: Pace, step: int, processes: Processes) -> tuple[Tensor, slice]:
    """The members of this process's slots of a step. All take part in a step that has them all."""
    import torch

    size = min(count, pace.batch)
    slots = slice(size * processes.index // processes.count, size * (processes.index + 1) // processes.count)
    if size == count:
        return torch.arange(slots.start, slots.stop), slots
    drawn = generator(pace.seed, step, purpose=_BATCHES).choice(count, size, replace=False)
    return torch.from_numpy(drawn[slots]), slots


def _apply(state: State, gradient: Tensor, losses: Tensor, decays: Tensor, pace: Pace, where: str) -> None:
    """One step of AdamW, in place."""
    import torch

    if not bool(torch.isfinite(losses).all()):
        what = f"the loss is no number at step {state.step + 1:,} of {pace.steps:,}"
        raise ValueRefused(where, what, "a lower learning rate may help; so may a look at the space for a LoRA far off")
    rate = pace.rate(state.step)
    state.step += 1
    state.first.lerp_(gradient, 1 - _BETAS[0])
    state.second.lerp_(gradient.square(), 1 - _BETAS[1])
    scale = math.sqrt(1 - _BETAS[1] ** state.step)
    step = state.first / (1 - _BETAS[0] ** state.step) / (state.second.sqrt() / scale + _EPSILON)
    state.weights -= rate * (step + decays * state.weights)
    # At first the mean is of few steps, so that the random start is soon out of it.
    state.averaged.lerp_(state.weights, 1 - min(pace.average, state.step / (state.step + 10)))
    state.losses.lerp_(losses, 1 / min(state.step, 50))
