"""What a denoiser is asked to predict, what is drawn for it, and how far off it is: DDPM objectives and flow matching.

Every number that is drawn follows from (seed, step, slot) and nothing else, on the CPU: a resumed run draws what the
uninterrupted one would have, and so do two processes that share the slots of a step.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.diffusion.extras import hushed
from weightops.diffusion.models import FLOW
from weightops.errors import UsageError, quote

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import torch
    from torch import Tensor

    from weightops.diffusion.encoding import Encoded, Encoding
    from weightops.diffusion.models import Loaded

KINDS = ("epsilon", "v_prediction", "sample", "flow")
WEIGHTINGS = ("logit_normal", "none")

# The first word of each kind of stream of random numbers.
_CHOICE, _DRAW, _HELD_OUT, _CROP = 1, 2, 3, 4


@dataclass(frozen=True, slots=True)
class Dynamic:
    """A shift that grows with the number of patches, as the scheduler of Flux has it.

    lengths: two numbers of patches; shifts: the exponent (the factor, if not `exponential`) at each; between and
    beyond them it is linear. patch: its side in latent pixels.
    """

    lengths: tuple[int, int]
    shifts: tuple[float, float]
    exponential: bool
    patch: int

    def factor(self, shape: Sequence[int]) -> float:
        """For latents of this shape [..., height, width]."""
        (short, long), (least, most) = self.lengths, self.shifts
        patches = (shape[-2] // self.patch) * (shape[-1] // self.patch)
        shift = least + (most - least) * (patches - short) / (long - short)
        return math.exp(shift) if self.exponential else shift


@dataclass(frozen=True, slots=True, eq=False)
class Objective:
    """kind: one of KINDS. steps: of the noise schedule; timesteps lie in 0 … steps.

    alphas: the cumulative product ᾱ_t of a DDPM schedule [steps] float32; None for flow matching, of which `shift`
    is the scheduler's own, and `weighting` says how timesteps are drawn: evenly (none), or more in the middle.
    """

    kind: str
    steps: int
    alphas: Tensor | None = None
    shift: float | Dynamic = 1.0
    weighting: str = "none"

    def factor(self, shape: Sequence[int]) -> float:
        """The shift for latents of this shape."""
        return self.shift.factor(shape) if isinstance(self.shift, Dynamic) else self.shift


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """What chance decides for n samples.

    noise, posterior: standard normal float32 [n, channels, height, width], the noise with its offset; posterior is for
    the latents themselves, of which the VAE gives mean and deviation. timesteps [n]: as the network is told them,
    int64 of a DDPM schedule, float32 (σ · steps) of flow matching. flips [n]: bool, each with a chance of a half.
    """

    noise: Tensor
    posterior: Tensor
    timesteps: Tensor
    flips: Tensor


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Mean squared errors of pictures that were not trained on. losses: by timestep; examples: by picture."""

    timesteps: tuple[float, ...]
    losses: tuple[float, ...]
    examples: tuple[float, ...]
    mean: float


# ------------------------------------------------------------------------------------------------ the objective


def objective_of(
    loaded: Loaded, prediction: str | None = None, shift: float | None = None, weighting: str | None = None
) -> Objective:
    """What this model is trained for, by its architecture and its scheduler's configuration.

    prediction: one of KINDS, in place of what the configuration says. shift: of flow matching, in place of the
    scheduler's. weighting: of flow matching, one of WEIGHTINGS (None: logit_normal). Raises UsageError for a word that
    is none, or is of the other kind of model.
    """
    scheduler = loaded.pipe.scheduler
    # Of some architectures every model is trained by flow matching, whatever sampler stands beside it.
    flow = loaded.architecture in FLOW or "FlowMatch" in type(scheduler).__name__
    known = KINDS[3:] if flow else KINDS[:3]
    kind = "flow" if flow else scheduler.config.get("prediction_type", "epsilon")
    if prediction is not None and prediction not in known:
        raise UsageError("--prediction", f"found {quote(prediction)}, expected {' or '.join(known)} for {loaded.label}")
    if prediction is None and kind not in known:
        what = f"its scheduler says prediction_type {quote(kind)}, expected {', '.join(known)}"
        raise UsageError(loaded.label, what, "name what it predicts with --prediction")
    if weighting is not None and weighting not in WEIGHTINGS:
        raise UsageError("--weighting", f"found {quote(weighting)}, expected {' or '.join(WEIGHTINGS)}")
    if flow:
        return _flow(loaded, shift, weighting or WEIGHTINGS[0])
    for option, value in (("--shift", shift), ("--weighting", weighting)):
        if value is not None:
            raise UsageError(option, f"is of flow matching, but {loaded.label} is trained otherwise ({kind})")
    return _ddpm(loaded, prediction or kind)


def _ddpm(loaded: Loaded, kind: str) -> Objective:
    """The schedule that the scheduler samples by, zero terminal SNR included: DDPM's, whichever sampler it is."""
    config = loaded.pipe.scheduler.config
    name = type(loaded.pipe.scheduler).__name__
    if "beta_schedule" not in config:
        raise UsageError(loaded.label, f"its scheduler {name} has no DDPM schedule, expected one with beta_schedule")
    with hushed():
        from diffusers import DDPMScheduler

        schedule: Any = DDPMScheduler
        made = schedule.from_config(config)
    return Objective(kind, made.config.num_train_timesteps, made.alphas_cumprod.float())


def _flow(loaded: Loaded, shift: float | None, weighting: str) -> Objective:
    config: Mapping[str, Any] = loaded.pipe.scheduler.config
    steps = config.get("num_train_timesteps", 1000)
    if shift is not None:
        if not (math.isfinite(shift) and shift > 0):
            raise UsageError("--shift", f"found {shift:g}, expected a number above 0")
        return Objective("flow", steps, shift=shift, weighting=weighting)
    if not config.get("use_dynamic_shifting"):
        return Objective(
            "flow", steps, shift=float(config.get("shift", config.get("flow_shift", 1.0))), weighting=weighting
        )
    # Flux takes 2 × 2 latent pixels before its network sees them, which there then counts a patch of 1.
    patch = 2 if loaded.architecture == "flux" else int(loaded.pipe.transformer.config.patch_size)
    lengths = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    shifts = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    dynamic = Dynamic(lengths, shifts, config.get("time_shift_type", "exponential") == "exponential", patch)
    return Objective("flow", steps, shift=dynamic, weighting=weighting)


# ------------------------------------------------------------------------------------------------ chance


def steps_per_epoch(examples_count: int, per_step: int) -> int:
    """How many steps it takes to see every example. per_step: batch × accumulation × processes."""
    return -(-examples_count // per_step)


def choose(
    examples_count: int, *, seed: int, step: int, slots: Sequence[int], per_step: int, stream: int = 0
) -> list[int]:
    """The examples in these slots of a step.

    They are shuffled anew each epoch, and the epochs follow one another without a gap: slot n of step s is place
    s·per_step + n of that sequence, so that each example stands in it once an epoch. per_step: the slots of all
    batches and processes together. stream: another sequence from the same seed, as pictures of the class need.
    """
    places = [divmod(step * per_step + slot, examples_count) for slot in slots]
    return [_shuffled(examples_count, seed, stream, epoch)[place] for epoch, place in places]


@functools.lru_cache(maxsize=4)
def _shuffled(examples_count: int, seed: int, stream: int, epoch: int) -> tuple[int, ...]:
    return tuple(_generator(_CHOICE, stream, seed, epoch, 0).permutation(examples_count).tolist())


def draw(
    objective: Objective,
    *,
    seed: int,
    step: int,
    slots: Sequence[int],
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    noise_offset: float = 0.0,
    stream: int = 0,
) -> Draw:
    """What chance decides for these slots of a step; shape: [channels, height, width] of the latents.

    The same bits, whichever other slots are asked for at the same time, on whatever device. noise_offset: of a shift
    drawn for each channel as a whole, from which pictures learn to be all dark or bright; it moves nothing else.
    stream: other numbers from the same seed.
    Source: the offset is N. Guttenberg's "Diffusion with offset noise" (2023); logit-normal timesteps are from Esser
    et al. 2024, arXiv:2403.03206.
    """
    import numpy as np
    import torch

    noise = np.empty((len(slots), *shape), np.float32)
    posterior = np.empty_like(noise)
    uniform, normal, flips = (np.empty(len(slots)) for _ in range(3))
    for row, slot in enumerate(slots):
        numbers = _generator(_DRAW, stream, seed, step, slot)
        # All of them, always, and in this order: what one setting draws, another does not shift.
        uniform[row], flips[row], normal[row] = numbers.random(), numbers.random(), numbers.standard_normal()
        offset = numbers.standard_normal((shape[0], *[1] * (len(shape) - 1)), np.float32)
        numbers.standard_normal(dtype=np.float32, out=posterior[row])
        numbers.standard_normal(dtype=np.float32, out=noise[row])
        noise[row] += np.float32(noise_offset) * offset
    if objective.kind == "flow":
        sigmas = 1 / (1 + np.exp(-normal)) if objective.weighting == "logit_normal" else 1 - uniform
        timesteps = torch.from_numpy(shifted(sigmas, objective.factor(shape)) * objective.steps).float()
    else:
        timesteps = torch.from_numpy((uniform * objective.steps).astype(np.int64))
    return Draw(
        torch.from_numpy(noise).to(device), torch.from_numpy(posterior).to(device), timesteps.to(device),
        torch.from_numpy(flips < 0.5),
    )  # fmt: skip


def shifted(sigmas: np.ndarray, factor: float) -> np.ndarray:
    """σ' = f·σ / (1 + (f − 1)·σ): more of the noise for larger pictures. Source: Esser et al. 2024, equation 23."""
    return factor * sigmas / (1 + (factor - 1) * sigmas)


def crop_place(seed: int, digest: str) -> tuple[float, float]:
    """Where a picture is cropped: drawn once for its bytes and the seed, each in 0 … 1."""
    first, second, third, _ = _digest_words(digest)
    numbers = _generator(_CROP, first, seed, second, third)
    return float(numbers.random()), float(numbers.random())


def _digest_words(digest: str) -> list[int]:
    return [int(digest[place : place + 8], 16) for place in range(0, 32, 8)]


def _generator(kind: int, stream: int, seed: int, step: int, slot: int) -> np.random.Generator:
    """Not torch's: that of its CPU keeps 32 bits of a seed alone, so that far slots would draw alike."""
    import numpy as np

    # Two words for the seed, always: words of a varying number could be read in two ways.
    return np.random.default_rng([kind, stream, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, step, slot])


# ------------------------------------------------------------------------------------------------ noise and loss


def noised(objective: Objective, latents: Tensor, drawn: Draw) -> Tensor:
    """Latents [n, ...] with as much of the noise as their timesteps say, in float32."""
    signal, noise = _levels(objective, drawn.timesteps, latents)
    return signal * latents.float() + noise * drawn.noise


def target(objective: Objective, latents: Tensor, drawn: Draw) -> Tensor:
    """What a perfect network would answer, in float32.

    Source: Ho et al. 2020 (ε); Salimans & Ho 2022 (v); Lipman et al. 2022 and Liu et al. 2022 (flow matching).
    """
    if objective.kind == "epsilon":
        return drawn.noise
    if objective.kind == "sample":
        return latents.float()
    if objective.kind == "flow":
        return drawn.noise - latents.float()
    signal, noise = _levels(objective, drawn.timesteps, latents)
    return signal * drawn.noise - noise * latents.float()


def loss(
    objective: Objective, predicted: Tensor, latents: Tensor, drawn: Draw, *, snr_gamma: float | None = None
) -> Tensor:
    """The mean squared error of each sample, [n] float32, weighted by min-SNR if `snr_gamma` is given."""
    wrong = (predicted.float() - target(objective, latents, drawn)).square().flatten(1).mean(1)
    return wrong if snr_gamma is None else wrong * snr_weights(objective, drawn.timesteps, snr_gamma)


def snr_weights(objective: Objective, timesteps: Tensor, gamma: float) -> Tensor:
    """The weight min(SNR, gamma) of the error in the picture itself, as a weight of the prediction's: [n] float32.

    Raises UsageError for flow matching, which has its own, and for a gamma that is not positive.
    Source: Hang et al. 2023, arXiv:2303.09556, sections 3.4 and 4.2.
    """
    if objective.alphas is None:
        raise UsageError("--snr-gamma", "is of DDPM objectives, but this model is trained by flow matching")
    if not gamma > 0:
        raise UsageError("--snr-gamma", f"found {gamma:g}, expected a number above 0")
    alphas = objective.alphas.to(timesteps.device)[timesteps]
    snr = alphas / (1 - alphas)
    if objective.kind == "epsilon":
        return (gamma / snr).clamp(max=1)  # min(SNR, gamma) / SNR, which is 1 where the SNR is 0
    least = snr.clamp(max=gamma)
    return least / (snr + 1) if objective.kind == "v_prediction" else least


def _levels(objective: Objective, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the latents and of the noise there is at each timestep, to be multiplied with [n, ...]."""
    shape = (-1, *[1] * (like.ndim - 1))
    if objective.alphas is None:
        sigmas = timesteps.float() / objective.steps
        return (1 - sigmas).reshape(shape), sigmas.reshape(shape)
    alphas = objective.alphas.to(timesteps.device)[timesteps]
    return alphas.sqrt().reshape(shape), (1 - alphas).sqrt().reshape(shape)


# ------------------------------------------------------------------------------------------------ held-out pictures


def held_out_loss(
    loaded: Loaded,
    encoding: Encoding,
    encoded: Encoded,
    objective: Objective,
    *,
    pairs: int,
    seed: int,
    batch: int = 8,
) -> HeldOut:
    """How far off the network is on pictures it was not trained on: a measure of learning, with no weights in it.

    Each picture, unmirrored, at `pairs` timesteps that are spread evenly, each with noise that follows from `seed`, the
    timestep's number and the picture's bytes: two models are compared on the same noise, whatever other pictures there
    are. The mean latents are taken, not a sample of them. The network is in eval mode meanwhile.
    """
    import torch

    network = getattr(loaded.pipe, encoding.denoiser)
    count = len(encoded.examples)
    if pairs < 1 or batch < 1:
        raise ValueError(f"{pairs} pairs in batches of {batch}")
    training = network.training
    network.eval()
    found = torch.zeros(pairs, count, dtype=torch.float64)
    try:
        for start in range(0, count, batch):
            indices = range(start, min(start + batch, count))
            found[:, start : indices.stop] = fixed_losses(
                loaded, encoding, encoded, objective, indices, pairs=pairs, seed=seed
            )
    finally:
        network.train(training)
    times = [float(_time(objective, pair, pairs)) for pair in range(pairs)]
    return HeldOut(tuple(times), tuple(found.mean(1).tolist()), tuple(found.mean(0).tolist()), float(found.mean()))


def fixed_losses(
    loaded: Loaded, encoding: Encoding, encoded: Encoded, objective: Objective, indices: Sequence[int], *,
    pairs: int, seed: int,
) -> Tensor:  # fmt: skip
    """The losses of these examples [pairs, n], float64, as `held_out_loss` draws for them, all n in one batch."""
    import torch

    digests = [encoded.examples[index].picture.digest for index in indices]
    found = torch.zeros(pairs, len(indices), dtype=torch.float64)
    with torch.no_grad():
        given = encoded.batch(indices, [False] * len(indices))
        for pair in range(pairs):
            fixed = _fixed(objective, pair, pairs, seed, digests, given["mean"])
            noisy = noised(objective, given["mean"], fixed)
            answer = encoding.predict(loaded.pipe, noisy, fixed.timesteps, given, given["sizes"])
            found[pair] = loss(objective, answer, given["mean"], fixed).cpu().double()
    return found


def _time(objective: Objective, pair: int, pairs: int) -> float:
    """The middle of one of `pairs` equal parts of the schedule."""
    time = (pair + 0.5) * objective.steps / pairs
    return time if objective.kind == "flow" else int(time)


def _fixed(objective: Objective, pair: int, pairs: int, seed: int, digests: Sequence[str], latents: Tensor) -> Draw:
    """The draw of a pair, which is the same for a picture whatever other pictures there are."""
    import numpy as np
    import torch

    noise = torch.empty(latents.shape)
    for row, digest in enumerate(digests):
        first, second = _digest_words(digest)[:2]
        numbers = _generator(_HELD_OUT, first, seed, pair, second)
        noise[row] = torch.from_numpy(numbers.standard_normal(latents.shape[1:], np.float32))
    time = _time(objective, pair, pairs)
    timesteps = torch.full((len(digests),), time, dtype=torch.float32 if objective.kind == "flow" else torch.int64)
    flips = torch.zeros(len(digests), dtype=torch.bool)
    return Draw(noise.to(latents.device), torch.zeros_like(latents), timesteps.to(latents.device), flips)
