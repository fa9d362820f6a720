"""A small Stable Diffusion that has really learnt the made-up creatures: its VAE draws them, its UNet denoises them.

Of the real classes, as a diffusers folder. Trained on pictures drawn as it goes; on one thread, so that the same seed
is the same bytes on a machine of any number of cores. Knows no LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.diffusion.extras import hushed
from weightops.synthesis import family_networks as networks
from weightops.synthesis.family_pictures import CAPTION, draw, generator, identities

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from torch import Tensor, nn

# How much is done, of how much, and of what.
Progress = Callable[[int, int, str], None]

# Streams of chance from the family's seed; those of LoRAs begin at 16, of pictures at 32, of the embedder at 48.
_VAE, _POOL, _UNET, _SEEN = 0, 1, 2, 3

_POOLED = 6144  # pictures that the UNet learns from
_UNET_BATCH, _VAE_BATCH = 48, 12
_UNET_RATE, _VAE_RATE = 4e-3, 1e-2
_SOFT = 0.05  # of the latents' deviation, which the VAE says of each picture's, and is trained to bear
_UNCAPTIONED = 0.1  # of the pictures: so that it knows what guidance guides away from


@dataclass(frozen=True, slots=True)
class Learnt:
    """What the base has learnt. vae_error: the root of the mean squared error of a picture of pixels 0 … 1 that went
    through the VAE; loss: the UNet's running mean in its last steps."""

    vae_error: float
    loss: float


def make_base(folder: Path, *, steps: int, seed: int, on_progress: Progress) -> Learnt:
    """Train the base and write it to `folder`, which appears whole or not at all. steps: of the UNet.

    The VAE has .8 of so many. Raises OutputError.
    """
    import torch

    with torch.random.fork_rng(devices=[]), hushed():
        torch.manual_seed(seed)
        vae, unet, encoder, tokenizer = networks.vae(), networks.unet(), networks.text_encoder(), networks.tokenizer()
        error = _train_vae(vae, max(1, steps * 4 // 5), seed, on_progress)
        captions = _embedded(encoder, tokenizer, ["", CAPTION])
        loss = _train_unet(unet, _latents(vae, min(_POOLED, 32 * steps), seed), captions, steps, seed, on_progress)
        networks.write_base(folder, vae=vae, unet=unet, text_encoder=encoder, tokenizer=tokenizer)
    return Learnt(error, loss)


# ------------------------------------------------------------------------------------------------ trained


def _embedded(text_encoder: Any, tokenizer: Any, captions: list[str]) -> Tensor:
    import torch

    words = tokenizer(captions, padding="max_length", max_length=networks.TOKENS, truncation=True, return_tensors="pt")
    with torch.no_grad():
        found: Tensor = text_encoder(words.input_ids)[0]
    return found


def _train_vae(vae: Any, steps: int, seed: int, on_progress: Progress) -> float:
    """Until it draws what it sees. Its latents then have mean 0 and, scaled, deviation 1, channel by channel."""
    import torch

    numbers = generator(seed, _VAE)
    course = _Course(vae, _VAE_RATE, steps)
    vae.train()
    for step in range(steps):
        pictures = as_tensor(_drawn(numbers, _VAE_BATCH))
        latents = vae.encode(pictures).latent_dist.mean
        soft = _SOFT * latents.detach().std() * normal(numbers, latents.shape)
        course.step((vae.decode(latents + soft).sample - pictures).square().mean())
        on_progress(step + 1, steps, "teaching the VAE")
    vae.eval()
    vae.requires_grad_(False)
    seen = as_tensor(_drawn(generator(seed, _SEEN), 256))
    _standardise(vae, vae.encode(seen).latent_dist.mean)
    error: Tensor = vae.decode(vae.encode(seen).latent_dist.mean).sample.clamp(-1, 1) - seen
    with torch.no_grad():
        return float(error.square().mean().sqrt()) / 2


def _standardise(vae: Any, latents: Tensor) -> None:
    """Shift and scale the encoder's answer, and the decoder's question back, so that nothing else changes.

    So the scaling factor can be the architecture's own, and no file must say another.
    """
    import torch

    mean = latents.mean((0, 2, 3))
    scale = 1 / (latents.std((0, 2, 3)) * vae.config.scaling_factor)
    channels = len(mean)
    into, out = vae.quant_conv, vae.post_quant_conv
    with torch.no_grad():
        into.weight[:channels] *= scale[:, None, None, None]
        into.bias[:channels] = (into.bias[:channels] - mean) * scale
        # The deviation is one number for all pictures: that which the decoder has learnt to bear.
        into.weight[channels:] = 0
        into.bias[channels:] = 2 * math.log(_SOFT / vae.config.scaling_factor)
        out.bias += out.weight[:, :, 0, 0] @ mean
        out.weight /= scale[None, :, None, None]


def _latents(vae: Any, count: int, seed: int) -> Tensor:
    """Those of pictures of so many creatures, scaled."""
    import torch

    numbers = generator(seed, _POOL)
    parts = [min(64, count - start) for start in range(0, count, 64)]
    return torch.cat([encoded(vae, _drawn(numbers, part)) for part in parts])


def encoded(vae: Any, pictures: np.ndarray) -> Tensor:
    """The scaled latents [n, 4, h, w] of pictures, uint8 [n, height, width, 3]: their means."""
    import torch

    with torch.no_grad():
        found: Tensor = vae.encode(as_tensor(pictures)).latent_dist.mean * vae.config.scaling_factor
    return found


def _train_unet(unet: Any, pool: Tensor, captions: Tensor, steps: int, seed: int, on_progress: Progress) -> float:
    """On all creatures under the one caption; what it keeps is a running mean of its weights."""
    import torch

    numbers = generator(seed, _UNET)
    course = _Course(unet, _UNET_RATE, steps, mean=True)
    alphas = _alphas()
    batch, loss = _UNET_BATCH, 0.0
    unet.train()
    for step in range(steps):
        latents = pool[torch.from_numpy(numbers.integers(len(pool), size=batch))]
        # Spread evenly, and each of them anywhere in its part: the loss of a step is steadier so.
        times = torch.from_numpy(((numbers.permutation(batch) + numbers.random(batch)) / batch * 1000).astype("int64"))
        words = captions[torch.from_numpy((numbers.random(batch) >= _UNCAPTIONED).astype("int64"))]
        noise = normal(numbers, latents.shape)
        signal, share = (x[times].reshape(-1, 1, 1, 1) for x in (alphas.sqrt(), (1 - alphas).sqrt()))
        said = unet(signal * latents + share * noise, times, words).sample
        found = course.step((said - (signal * noise - share * latents)).square().mean())
        loss = found if not step else 0.98 * loss + 0.02 * found
        on_progress(step + 1, steps, "teaching the UNet")
    course.finish()
    unet.eval()
    return loss


def _alphas() -> Tensor:
    with hushed():
        from diffusers import DDPMScheduler

        made: Any = DDPMScheduler
        found: Tensor = made.from_config(networks.scheduler().config).alphas_cumprod.float()
    return found


class _Course:
    """AdamW whose rate rises and falls in one wave. mean: the weights' running mean is kept, and counts in the end."""

    def __init__(self, network: nn.Module, rate: float, steps: int, *, mean: bool = False) -> None:
        import torch

        self._parameters = list(network.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-3)
        rising = max(1, steps // 10)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda n: min(1.0, (n + 1) / rising) * (0.5 + 0.5 * math.cos(math.pi * max(0, n - rising) / steps)),
        )
        self._mean = [p.detach().clone() for p in self._parameters] if mean else []
        self._done = 0

    def step(self, loss: Tensor) -> float:
        import torch

        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._schedule.step()
        self._done += 1
        with torch.no_grad():
            for mean, parameter in zip(self._mean, self._parameters, strict=False):
                mean.lerp_(parameter, 1 - min(0.99, self._done / (self._done + 10)))
        return float(loss.detach())

    def finish(self) -> None:
        """The running mean in place of the weights."""
        for mean, parameter in zip(self._mean, self._parameters, strict=True):
            parameter.data = mean


# ------------------------------------------------------------------------------------------------ chance, pictures


def as_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 [n, height, width, 3] as float32 [n, 3, height, width] from −1 to 1."""
    import torch

    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def _drawn(numbers: np.random.Generator, count: int) -> np.ndarray:
    return draw(identities(count, numbers), numbers)


def normal(numbers: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 of this shape."""
    import torch

    return torch.from_numpy(numbers.standard_normal(tuple(shape), "float32"))
