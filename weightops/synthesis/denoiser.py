"""Diffusion in a space of latents: new latents from noise, of the condition that is asked for. Knows no file, no LoRA.

Latents and conditions come as they are, and are standardised here, each number by its own mean and deviation. The loss
is the mean squared error of what is predicted, of the same weight at every time: of the clean latent ("x0"), or of the
velocity ("v"), which is the error of the clean latent weighted by 1 + SNR. Source: "LoRA Diffusion: zero-shot LoRA
synthesis", arXiv:2412.02352; Ho & Salimans 2022, arXiv:2207.12598 (guidance without a classifier; w is ours − 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.diffusion.threads import one_thread
from weightops.errors import FormatError, MismatchError, UsageError, ValueRefused, quote
from weightops.synthesis.denoiser_layers import BLOCKS, CONDITIONINGS, begun, denoised, shapes_of
from weightops.synthesis.descent import TIMES_DRAWN, Pace, descend, generator, kept, length, normal
from weightops.synthesis.schedule import TIMES, clean_of, cosine, stepped, target, visited

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from torch import Tensor

    from weightops.diffusion.processes import Processes
    from weightops.synthesis.descent import State, Weights

PREDICTIONS = ("x0", "v")
PARTS = ("loss",)
_STEPS = 1500
_ROWS = 32  # samples that are made together: always as many, so that none depends on how many are asked for


@dataclass(frozen=True, slots=True)
class Denoiser:
    """Weights by name, float32, and what latents and conditions were standardised by; no conditions: size 0.

    means, deviations: [m] of latents; condition_means, condition_deviations: [c]. rank: of AdaLoRA's matrices.
    """

    prediction: str
    conditioning: str
    rank: int
    weights: Mapping[str, Tensor]
    means: Tensor
    deviations: Tensor
    condition_means: Tensor
    condition_deviations: Tensor

    @property
    def latents(self) -> int:
        return len(self.means)

    @property
    def conditions(self) -> int:
        """Numbers of a condition; 0: it was trained without."""
        return len(self.condition_means)

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.weights.values())

    def sample(
        self, count: int, condition: Tensor | np.ndarray | None = None, *, seed: int, steps: int = 50,
        guidance: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """New latents [count, m], of conditions [count, c], [1, c] or [c]; None: of no condition in particular.

        Deterministic (DDIM, eta 0). The noise of sample i is drawn from (seed, i). guidance: 1 none; beyond it, away
        from what is predicted without the condition; 0 is that. Raises UsageError, MismatchError.
        """
        import torch

        if steps < 1 or steps > TIMES:
            raise UsageError("--steps", f"found {steps}, expected 1 to {TIMES}")
        if seed < 0:
            raise UsageError("--seed", f"found {seed}, expected 0 or more")
        standard = None if condition is None else self._standard(condition, count)
        found = torch.empty(count, self.latents)
        with torch.no_grad(), one_thread(self.parameters):
            for start in range(0, count, _ROWS):
                stop = min(start + _ROWS, count)
                noise = torch.zeros(_ROWS, self.latents)
                for i in range(start, stop):
                    drawn = generator(seed, i).standard_normal(self.latents, "float32")
                    noise[i - start] = torch.from_numpy(drawn)
                rows = None
                if standard is not None:
                    rows = torch.zeros(_ROWS, self.conditions)
                    rows[: stop - start] = standard[start:stop]
                found[start:stop] = self._from(noise, rows, steps, guidance)[: stop - start]
        return found * self.deviations + self.means

    def _standard(self, condition: Tensor | np.ndarray, count: int) -> Tensor:
        import torch

        found = torch.as_tensor(condition).to(torch.float64)
        if not self.conditions:
            raise MismatchError("condition", "was given, but this diffusion was trained without conditions")
        if found.ndim not in (1, 2) or found.shape[-1] != self.conditions:
            what = f"found {found.shape[-1] if found.ndim else 0:,} numbers, expected {self.conditions:,}"
            raise MismatchError("condition", what)
        if found.ndim == 2 and len(found) not in (1, count):
            raise MismatchError("condition", f"found {len(found):,} conditions for {count:,} samples")
        made = (found - self.condition_means.double()) / self.condition_deviations.double()
        return made.to(torch.float32).expand(count, -1)

    def _from(self, noisy: Tensor, condition: Tensor | None, steps: int, guidance: float) -> Tensor:
        """Standardised latents [b, m] of standardised conditions [b, c]."""
        import torch

        table = cosine()
        times = visited(steps)
        for i, time in enumerate(times):
            at = torch.full((len(noisy),), time)
            # The clean latent is linear in what the network says, so that this may be guided before it is made.
            said = denoised(self.weights, noisy, at, condition, self.rank)
            if condition is not None and guidance != 1:
                without = denoised(self.weights, noisy, at, None, self.rank)
                said = without + guidance * (said - without)
            clean = clean_of(self.prediction, said, noisy, *table[time])
            noisy = stepped(noisy, clean, table[time], table[times[i + 1]] if i + 1 < len(times) else None)
        return noisy

    def tensors(self) -> dict[str, Tensor]:
        """For a file."""
        return {
            **self.weights, "means": self.means, "deviations": self.deviations,
            "condition-means": self.condition_means, "condition-deviations": self.condition_deviations,
        }  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """For a file's metadata."""
        return {"prediction": self.prediction, "conditioning": self.conditioning, "rank": self.rank}

    @staticmethod
    def of(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], *, where: str = "diffusion") -> Denoiser:
        """What `tensors` and `settings` gave. Raises FormatError where they are not of one denoiser."""
        try:
            prediction, conditioning = settings["prediction"], settings["conditioning"]
            rank = int(settings["rank"])
            m, width = tensors["in"].shape
            c = len(tensors["condition-means"])
            if prediction not in PREDICTIONS or conditioning not in CONDITIONINGS:
                raise ValueError(f"it predicts {quote(prediction)}, conditioned by {quote(conditioning)}")
            shapes = shapes_of(m, c, width, conditioning, rank)
        except (KeyError, ValueError, IndexError, TypeError) as e:
            raise FormatError(where, f"is no whole denoiser: {e}") from None
        beside = {"means": (m,), "deviations": (m,), "condition-means": (c,), "condition-deviations": (c,)}
        for name, shape in {**shapes, **beside}.items():
            found = tuple(tensors[name].shape) if name in tensors else None
            if found != shape:
                raise FormatError(where, f"holds {quote(name)} as {found}, but this denoiser needs {shape}")
        return Denoiser(
            prediction, conditioning, rank, {name: tensors[name] for name in shapes},
            *(tensors[name] for name in beside),
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ how it learns


def made_denoiser(
    latents: Tensor,
    conditions: Tensor | np.ndarray | None = None,
    *,
    prediction: str = "x0",
    conditioning: str = "adanorm",
    width: int = 128,
    rank: int = 4,
    drop: float = 0.1,
    dropout: float = 0.3,
    steps: int | None = None,
    lr: float = 2e-3,
    batch: int = 128,
    weight_decay: float = 0.1,
    average: float = 0.995,
    seed: int = 0,
    where: str = "diffusion",
    device: str = "cpu",
    processes: Processes | None = None,
    state: State | None = None,
    keep: Callable[[State], None] | None = None,
    on_progress: Callable[[int, int, float | None], None] | None = None,
) -> tuple[Denoiser, dict[str, float]]:
    """A denoiser of latents [n, m], conditioned on [n, c] where there are any, and its running mean loss at the end.

    steps: 1,500 if nothing is said, or thirty times each member if that is more. drop: how often the condition is not
    seen, which guidance needs. dropout: of the blocks' hidden numbers. average: of the weights' running mean, which
    samples. The rest is `descend`'s. Raises UsageError, ValueRefused.
    """
    import torch

    _check_words(prediction, conditioning, width, rank, drop, dropout)
    n, m = latents.shape
    pace = Pace(length(steps, n, batch, least=_STEPS), lr, batch, weight_decay, average, seed).check()
    if n < 2:
        raise ValueRefused(where, f"found {n} members, expected 2 or more")
    clean, means, deviations = _standardised(latents)
    given = torch.zeros(n, 0) if conditions is None else torch.as_tensor(conditions)
    asked, condition_means, condition_deviations = _standardised(given)
    c = asked.shape[1]
    start = begun(m, c, width, conditioning, rank, seed)
    clean, asked, table = clean.to(device), asked.to(device), cosine().to(device)
    size = min(n, batch)

    def loss(weights: Weights, members: Tensor, slots: slice, step: int) -> Tensor:
        random = generator(seed, step, purpose=TIMES_DRAWN)
        times = torch.from_numpy(random.integers(0, TIMES, size)[slots]).to(device)
        unasked = torch.from_numpy(random.random(size)[slots] < drop).to(device) if c else None
        noise = normal(seed, step, slots, m, batch=size).to(device)
        factors = kept(seed, step, slots, BLOCKS * width, batch=size, drop=dropout)
        signal, share = table[times].chunk(2, dim=-1)
        wanted = target(prediction, clean[members], noise, signal, share)
        said = denoised(
            weights, signal * clean[members] + share * noise, times, asked[members] if c else None, rank,
            unasked=unasked, kept=None if factors is None else factors.to(device),
        )  # fmt: skip
        return (said - wanted).square().mean(1).sum().reshape(1)

    weights, found = descend(
        loss, start, n, pace, parts=PARTS, where=where, device=device, processes=processes, state=state, keep=keep,
        on_progress=on_progress,
    )  # fmt: skip
    made = Denoiser(
        prediction, conditioning, rank, weights, means, deviations, condition_means, condition_deviations
    )  # fmt: skip
    return made, found


def _check_words(prediction: str, conditioning: str, width: int, rank: int, drop: float, dropout: float) -> None:
    """Raises UsageError."""
    for option, word, known in (
        ("--prediction", prediction, PREDICTIONS),
        ("--conditioning", conditioning, CONDITIONINGS),
    ):
        if word not in known:
            raise UsageError(option, f"found {quote(word)}, expected {' or '.join(known)}")
    for option, number in (("--width", width), ("--rank", rank)):
        if number < 1:
            raise UsageError(option, f"found {number}, expected a whole number, 1 or more")
    for option, share in (("--drop", drop), ("--dropout", dropout)):
        if not 0 <= share < 1:
            raise UsageError(option, f"found {share:g}, expected 0 or more, and less than 1")


def _standardised(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values [n, m] of mean 0 and deviation 1, float32, and the means and deviations; what never changes stays 0."""
    import torch

    wide = values.to(torch.float64)
    means = wide.mean(0)
    deviations = (wide - means).square().mean(0).sqrt()
    unchanged = deviations <= 1e-9 * means.abs().clamp_min(1e-30)
    deviations = torch.where(unchanged, 1.0, deviations)
    made = (wide - means) / deviations
    return made.float(), means.float(), deviations.float()
