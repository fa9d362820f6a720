"""Few numbers for a LoRA: principal components against autoencoders of as many latents, on LoRAs that were held out."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from weightops.diffusion.findings import Finding
from weightops.synthesis.evaluation_cells import Measured, seeds_said, spread_table
from weightops.synthesis.evaluation_inputs import LATENTS as PART
from weightops.synthesis.evaluation_measures import delta_error
from weightops.synthesis.gap import SAYS as GAP

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from weightops.synthesis.evaluation_bench import Bench
    from weightops.synthesis.evaluation_cells import Cell, Cells

_SAYS = (
    "Held-out LoRAs are encoded as so many numbers and decoded again. Principal components are the best that a linear "
    "map can do for the squared error of the coefficients, so that a linear VAE at best equals them there; a VAE of "
    "more layers is compared with components of the same number, and with nothing weaker. All see the same "
    "coefficients of the same training LoRAs, at the settings that stand below: others may do better. " + GAP
)
_COLUMNS = (
    Measured("held out", "explained, held out"), Measured("error", "ΔW error"), Measured("gap", "gap"),
)  # fmt: skip


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    words = bench.words
    for count in bench.limited(words.latents):
        yield bench.cell(PART, ("PCA", str(count)), seed, functools.partial(_pca, bench, seed, count))
    kinds = [(name, layers) for name, layers in (("vae-linear", "linear"), ("vae-mlp", "mlp")) if name in words.methods]
    for _, layers in kinds:
        for beta in words.betas:
            for count in bench.limited(words.latents):
                label = f"VAE, {'linear' if layers == 'linear' else 'MLP'}, β {beta:g}"
                yield bench.cell(
                    PART, (label, str(count)), seed,
                    functools.partial(_vae, bench, seed, layers, beta, count), steps=words.vae_steps,
                    layers=layers, beta=beta,
                )  # fmt: skip


def _pca(bench: Bench, seed: int, count: int) -> dict[str, Any]:
    return _measured(bench, seed, bench.fits(seed).pca().coefficients(bench.fits(seed).rows)[:, :count])


def _vae(bench: Bench, seed: int, layers: str, beta: float, count: int) -> dict[str, Any]:
    fits = bench.fits(seed)
    vae = fits.vae(layers, beta, count, bench.words.vae_steps)
    return _measured(bench, seed, vae.decode(vae.encode(fits.pca().coefficients(fits.rows))))


def _measured(bench: Bench, seed: int, coefficients: Tensor) -> dict[str, Any]:
    fits = bench.fits(seed)
    made = fits.rows_of(coefficients)
    left = (fits.rows - made).double().square().sum() / (fits.rows - fits.pca().mean).double().square().sum()
    factors = fits.factors(made)
    return {"held out": 1 - float(left), "error": delta_error(factors, fits.true), **bench.gap(fits, factors)}


def finding(bench: Bench, found: Cells) -> Finding:
    words = bench.words
    note = (
        f"VAEs of the first {min(bench.most, bench.trained() - 1):,} coefficients, {words.vae_steps:,} steps each. "
        f"{seeds_said(words.seeds)}"
    )
    table = spread_table(
        found, PART, title="Held-out LoRAs, from few latents", heads=("latents", "number"), columns=_COLUMNS, note=note
    )  # fmt: skip
    return Finding(PART, _SAYS, {"latents": table}, facts={"vae_steps": words.vae_steps})
