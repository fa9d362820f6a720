"""Spaces whose LoRAs are what their conditions say, and what was learnt of them, for tests of what they make."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from spaces import family_of, layout_of, write_family

from weightops.synthesis.collect import collect
from weightops.synthesis.denoiser import made_denoiser
from weightops.synthesis.fit import baselines, fit_pca
from weightops.synthesis.fitted import load_fitted
from weightops.synthesis.space import open_space
from weightops.synthesis.vae import made_vae

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("hue", "size", "shape")


def conditions_of(count: int) -> list[list[float]]:
    """What `spaces.family_of` mixes its members by."""
    drawn = torch.Generator().manual_seed(0)
    return [(0.5 * torch.randn(3, generator=drawn)).tolist() for _ in range(count)]


def learnt(folder: Path, count: int = 40, components: int = 6) -> Path:
    """A folder with loras/, conditions.csv, space/, and in it pca, delta, vae and diffusion.safetensors."""
    layout = layout_of(2)
    write_family(folder / "loras", layout, family_of(layout, count))
    lines = [f"lora-{n},{','.join(map(repr, row))}" for n, row in enumerate(conditions_of(count))]
    (folder / "conditions.csv").write_text("\n".join([f"name,{','.join(NAMES)}", *lines]))
    collect(folder / "loras", output=folder / "space", conditions=folder / "conditions.csv")
    fit_pca(folder / "space", components=components)
    fit_pca(folder / "space", components=components, geometry="delta", output=folder / "space/delta.safetensors")
    space = open_space(folder / "space")
    pca = load_fitted(folder / "space/pca.safetensors")
    vae, _ = made_vae(pca.latents, latents=4, layers="linear", steps=150, lr=0.03)
    found = vae.encode(pca.latents)
    told = baselines(space, pca.trained, found)
    replace(pca, kind="vae", vae=vae, latents=found, **told).save(folder / "space/vae.safetensors")
    assert space.conditions is not None
    denoiser, _ = made_denoiser(pca.latents, space.conditions[list(pca.trained)], width=32, steps=300)
    replace(pca, kind="diffusion", denoiser=denoiser).save(folder / "space/diffusion.safetensors")
    return folder
