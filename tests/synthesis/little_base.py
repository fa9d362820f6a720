"""A tiny model with random weights, LoRAs of three numbers on it, and images for each: for tests of what LoRAs do."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from weightops.diffusion.models import load
from weightops.diffusion.sprites import sprites
from weightops.diffusion.tiny import tiny_model
from weightops.synthesis.collect import collect
from weightops.synthesis.coordinates import learn_plain
from weightops.synthesis.image_descent import Course
from weightops.synthesis.layout import Layout, Module
from weightops.synthesis.lora_file import write_lora
from weightops.synthesis.own_images import OwnImages, list_images
from weightops.synthesis.space import Space, open_space

if TYPE_CHECKING:
    from pathlib import Path

    from weightops.diffusion.models import Loaded

# The last one decides much about the loss of a network with random weights.
NAMES = ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1", "conv_out")
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Base:
    folder: Path
    loaded: Loaded

    @property
    def model(self) -> Path:
        return self.folder / "sd15"

    def layout(self, rank: int = 2, *, text: bool = False) -> Layout:
        unet = self.loaded.pipe.unet
        modules = [Module("unet", name, tuple(unet.get_submodule(name).weight.shape), rank) for name in NAMES]
        if text:
            weight = self.loaded.pipe.text_encoder.get_submodule(TEXT.removeprefix("text_model.")).weight
            modules.insert(0, Module("text_encoder", TEXT, tuple(weight.shape), rank))
        return Layout("sd15", tuple(modules))

    def images(self, kind: str, counts: dict[str, int]) -> Path:
        """A folder of images for each name, so many of each."""
        place = self.folder / kind
        for number, (name, count) in enumerate(counts.items()):
            if not (place / name).exists():
                sprites(place / name, count=count, seed=1000 * len(kind) + number)
        return place


@functools.cache
def little_base(folder: Path) -> Base:
    """In a folder of this run's, once for all files of tests."""
    folder.mkdir()
    return Base(folder, load(tiny_model("sd15", folder / "sd15", seed=1), where="test", device="cpu"))


def factors_of(layout: Layout, count: int, seed: int, size: float = 0.2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random factors [count, out, r]."""
    drawn = torch.Generator().manual_seed(seed)
    return [
        tuple(size * torch.randn(count, *shape, generator=drawn) for shape in ((m.out, m.rank), (m.rank, m.n)))
        for m in layout.modules
    ]  # type: ignore[misc]


def trained_row(base: Base) -> np.ndarray:
    """Of a LoRA that has learnt a little of what images have in common."""
    place = base.images("common", {"all": 4})
    images = OwnImages(base.loaded, list_images(place, ["all"], option="--images"))
    factors, _ = learn_plain(images, base.layout(), ["all"], Course(steps=12, lr=0.02, batch=4, seed=0))
    found: np.ndarray = base.layout().flatten(factors)[0].double().numpy()
    return found


def little_space(base: Base, name: str = "space", count: int = 12, **words: object) -> Space:
    """LoRAs by three numbers: how far one is along what training gave, and two directions that mean nothing."""
    layout = base.layout()
    numbers = np.random.default_rng(5)
    middle = trained_row(base) if not (base.folder / "loras").exists() else np.zeros(layout.width)
    directions = np.stack([0.3 * middle, *(0.01 * numbers.standard_normal((2, layout.width))), 0.7 * middle])
    loras = base.folder / "loras"
    if not loras.exists():
        loras.mkdir()
        with (base.folder / "conditions.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["name", "a", "b", "c"])
            for number in range(count):
                condition = numbers.standard_normal(3)
                row = directions[3] + condition @ directions[:3] + 0.002 * numbers.standard_normal(layout.width)
                factors = layout.unflatten(torch.from_numpy(row).float())
                write_lora(loras / f"m{number:02}.safetensors", layout, factors, recipe={"command": "test"})
                writer.writerow([f"m{number:02}", *condition])
    place = base.folder / name
    if place.exists():
        return open_space(place)
    collect(loras, output=place, conditions=base.folder / "conditions.csv", **words)  # type: ignore[arg-type]
    return open_space(place)
