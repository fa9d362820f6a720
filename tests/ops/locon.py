"""LoRA files whose modules have known spectra, under names of SD1.5's; ΔW and its singular values by other hands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from loras import deltas

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

# kohya's names of SD1.5's modules -> out, inputs, kernel: a convolution of every kind, and three sizes of matrices.
BLOCK = "lora_unet_down_blocks_0_attentions_0"
QUERY = f"{BLOCK}_transformer_blocks_0_attn1_to_q"
KEY = f"{BLOCK}_transformer_blocks_0_attn2_to_k"
POINT = f"{BLOCK}_proj_in"
KERNEL = "lora_unet_down_blocks_0_resnets_0_conv1"
WIDE = "lora_unet_up_blocks_3_resnets_0_conv2"
LAST = "lora_unet_conv_out"
ENCODER = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
MODULES: dict[str, tuple[int, ...]] = {
    QUERY: (32, 32),
    KEY: (32, 24),
    f"{BLOCK}_transformer_blocks_0_ff_net_0_proj": (64, 32),
    POINT: (32, 32, 1, 1),
    KERNEL: (32, 16, 3, 3),
    WIDE: (24, 32, 3, 3),
    LAST: (4, 32, 3, 3),  # fewer outputs than ranks
    ENCODER: (24, 24),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (48, 24),
}


def product(
    generator: torch.Generator, shape: Sequence[int], values: Sequence[float], *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """up and down whose product has about these singular values, mixed so that neither tells one by itself."""
    out, n, rank = shape[0], torch.Size(shape[1:]).numel(), len(values)
    u, v = (torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in (out, n))
    mix = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q
    root = torch.tensor(values, dtype=torch.float64).sqrt()
    up, down = (u / out**0.5 * root) @ mix, mix.T @ (v / n**0.5 * root).T
    return up.to(dtype).reshape(out, rank, *[1] * (len(shape) - 2)), down.to(dtype).reshape(rank, *shape[1:])


def locon(
    modules: Mapping[str, Sequence[int]] = MODULES, *, rank: int = 12, alpha: float | None = 6.0, seed: int = 0,
    dtype: torch.dtype = torch.float32, up: str = ".lora_up.weight", down: str = ".lora_down.weight",
) -> dict[str, Tensor]:  # fmt: skip
    """A LoRA of these modules; each has singular values that fall at another pace, and another size."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for number, (name, shape) in enumerate(modules.items()):
        pace, size = 0.55 + 0.07 * (number % 6), 0.5 + 0.4 * (number % 4)
        values = [size * pace**i for i in range(rank)]
        found[name + up], found[name + down] = product(generator, shape, values, dtype=dtype)
        if alpha is not None:
            found[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    return found


def matrices(path: Path) -> dict[str, Tensor]:
    """Module -> ΔW as a matrix in float64, of a file in any written dialect."""
    return {name: delta.flatten(1) for name, delta in deltas(path).items()}


def values_of(delta: Tensor, most: int | None = None) -> list[float]:
    """All singular values of a dense matrix, largest first; no more than the factors have ranks."""
    found: list[float] = torch.linalg.svdvals(delta.double())[:most].tolist()
    return found


def off(was: Tensor, now: Tensor | None) -> float:
    """‖was − now‖ / ‖was‖."""
    rest = was if now is None else was - now
    return float(rest.norm() / was.norm()) if float(was.norm()) else float(rest.norm())
