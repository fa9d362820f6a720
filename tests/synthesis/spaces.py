"""Small LoRAs of Stable Diffusion 1.5's names, and spaces of them, for the tests of what is done with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from weightops.synthesis.collect import collect
from weightops.synthesis.layout import Layout, Module
from weightops.synthesis.lora_file import write_lora
from weightops.synthesis.space import Space, open_space

if TYPE_CHECKING:
    from pathlib import Path

    from weightops.synthesis.layout import Factors

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
SHAPES = {
    f"{BLOCK}.attn1.to_q": (16, 16),
    f"{BLOCK}.attn1.to_out.0": (16, 16),
    f"{BLOCK}.attn2.to_k": (16, 24),
    "down_blocks.0.resnets.0.conv1": (16, 16, 3, 3),
}
TEXT = {"text_model.encoder.layers.0.self_attn.q_proj": (12, 12)}


def layout_of(rank: int = 2, *, text: bool = False) -> Layout:
    modules = [Module("unet", name, shape, rank) for name, shape in SHAPES.items()]
    encoder = [Module("text_encoder", name, shape, rank) for name, shape in TEXT.items()] if text else []
    return Layout("sd15", tuple(sorted([*modules, *encoder], key=lambda m: (m.component != "text_encoder", m.name))))


def factors_of(layout: Layout, seed: int, size: float = 0.1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    drawn = torch.Generator().manual_seed(seed)
    return [
        (
            size * torch.randn(m.out, m.rank, generator=drawn, dtype=torch.float64),
            size * torch.randn(m.rank, m.n, generator=drawn, dtype=torch.float64),
        )
        for m in layout.modules
    ]


def family_of(layout: Layout, count: int, seed: int = 0) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Members that share most of what they are: one change, three directions in which they differ, little noise."""
    parts = [factors_of(layout, 100 * seed + n) for n in range(4)]
    drawn = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        weights = [1.0, *(0.5 * torch.randn(3, generator=drawn)).tolist()]
        noise = factors_of(layout, 10_000 * (seed + 1) + number, 0.005)
        made.append(
            [
                tuple(
                    sum(w * part[m][side] for w, part in zip(weights, parts, strict=True)) + noise[m][side]
                    for side in (0, 1)
                )
                for m in range(len(layout.modules))
            ]
        )
    return made  # type: ignore[return-value]


def write_family(
    folder: Path, layout: Layout, members: list[Factors], *, dialect: str = "kohya", start: int = 0
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number, factors in enumerate(members, start):
        path = folder / (f"lora-{number}" if dialect == "peft" else f"lora-{number}.safetensors")
        write_lora(path, layout, factors, dialect=dialect, recipe={"command": "test", "inputs": []})
        found.append(path)
    return found


def space_of(folder: Path, count: int = 12, rank: int = 2, **words: object) -> Space:
    """A space of so many LoRAs of one family."""
    layout = layout_of(rank)
    write_family(folder / "loras", layout, family_of(layout, count))
    collect(folder / "loras", output=folder / "space", **words)  # type: ignore[arg-type]
    return open_space(folder / "space")
