"""LoRAs from a condition alone, for conditions held out: regression and diffusion, and what they must beat."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.diffusion.findings import Finding
from weightops.synthesis.evaluation_cells import Measured, seeds_said, spread_table
from weightops.synthesis.evaluation_inputs import CONDITIONED as PART
from weightops.synthesis.evaluation_inputs import COPIES
from weightops.synthesis.evaluation_measures import among, delta_error, nearest_distances
from weightops.synthesis.gap import SAYS as GAP

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from weightops.synthesis.evaluation_bench import Bench
    from weightops.synthesis.evaluation_cells import Cell, Cells
    from weightops.synthesis.evaluation_fits import Fits

_SAYS = (
    "A LoRA is made for the condition of each held-out one. The mean LoRA does not look at the condition; the nearest "
    "neighbour is the training LoRA with the nearest condition; ridge regression has the condition's numbers, their "
    "squares and products where they are few, and a penalty chosen by leaving one out. Diffusion draws one sample, "
    "which regression does not: where a condition nearly determines the LoRA, as in a family made of few numbers, that "
    "favours regression, and where many LoRAs fit a condition their mean may be none of them. " + GAP
)
_COPIES = (
    "The distance in ΔW of each LoRA to the nearest one that was trained on, as a share of their mean norm: the median "
    "and the least over the LoRAs. Really trained LoRAs of others stand in the first row, training LoRAs among "
    "themselves in the second. What lies much nearer than these is a copy; what lies farther is no proof of anything "
    "new, for noise is far from everything, too. Means and regressions shrink towards the middle, which is near to all."
)
_COLUMNS = (
    Measured("gap", "gap"), Measured("error", "ΔW error"),
    Measured("worse than none", "worse than none, %", percent=True),
)  # fmt: skip
_NEAR = (Measured("nearest", "nearest, median"), Measured("least", "nearest of all"))
_DRAWN = 0xC0


@dataclass(frozen=True, slots=True)
class Method:
    """A way to a LoRA from a condition. components: of the PCA whose coefficients it makes; 0: it makes none."""

    label: str
    kind: str
    components: int = 0
    prediction: str = ""
    conditioning: str = ""

    @property
    def row(self) -> tuple[str, str]:
        return self.label, f"PCA-{self.components}" if self.components else ""


MEAN = Method("the mean LoRA", "mean")
NEAREST = Method("nearest neighbour", "nearest")


def methods(bench: Bench) -> list[Method]:
    """The baselines, and what was asked for."""
    found = [MEAN, NEAREST]
    counts = bench.limited(bench.words.conditioned)
    if "ridge" in bench.words.methods:
        found += [Method("ridge regression", "ridge", count) for count in counts]
    if "diffusion" in bench.words.methods:
        found += [
            Method(f"diffusion, {prediction}, {'AdaNorm' if way == 'adanorm' else 'AdaLoRA'}", "diffusion", count,
                   prediction, way)
            for count in counts for prediction in ("x0", "v") for way in ("adanorm", "adalora")
        ]  # fmt: skip
    return found


def rows_by(bench: Bench, fits: Fits, method: Method, seed: int) -> Tensor:
    """The rows [held, d] that a method makes for the held-out conditions."""
    if method.kind == "mean":
        return fits.pca().mean.expand(len(fits.held), -1)
    conditions = fits.conditions(fits.held)
    if method.kind == "nearest":
        places = fits.nearest().nearest(conditions)
        return fits.space.rows([fits.trained[place] for place in places])
    if method.kind == "ridge":
        return fits.rows_of(fits.ridge(method.components).predict(conditions))
    steps = bench.words.diffusion_steps
    denoiser = fits.denoiser(method.components, method.prediction, method.conditioning, steps)
    return fits.rows_of(denoiser.sample(len(fits.held), conditions, seed=seed))


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """Of each method; and of how near to the training LoRAs they come."""
    if PART in bench.asked.parts:
        for method in methods(bench):
            made_of = {"steps": bench.words.diffusion_steps} if method.kind == "diffusion" else {}
            yield bench.cell(PART, method.row, seed, functools.partial(_measured, bench, seed, method), **made_of)
    yield bench.cell(COPIES, ("held-out LoRAs, really trained", ""), seed, functools.partial(_true, bench, seed))
    yield bench.cell(COPIES, ("training LoRAs, among themselves", ""), seed, functools.partial(_among, bench, seed))
    for count in bench.limited(bench.words.conditioned):
        yield bench.cell(
            COPIES, ("drawn from a Gaussian", f"PCA-{count}"), seed, functools.partial(_gaussian, bench, seed, count)
        )
        if "diffusion" in bench.words.methods:
            yield bench.cell(
                COPIES, ("drawn by diffusion, of no condition", f"PCA-{count}"), seed,
                functools.partial(_diffused, bench, seed, count), steps=bench.words.diffusion_steps,
            )  # fmt: skip


def _measured(bench: Bench, seed: int, method: Method) -> dict[str, Any]:
    fits = bench.fits(seed)
    factors = fits.factors(rows_by(bench, fits, method, seed))
    return {
        "error": delta_error(factors, fits.true), **bench.gap(fits, factors),
        **nearest_distances(factors, fits.space, fits.trained),
    }  # fmt: skip


def _true(bench: Bench, seed: int) -> dict[str, Any]:
    fits = bench.fits(seed)
    return nearest_distances(fits.true, fits.space, fits.trained)


def _among(bench: Bench, seed: int) -> dict[str, Any]:
    fits = bench.fits(seed)
    return among(fits.space, fits.trained)


def _gaussian(bench: Bench, seed: int, count: int) -> dict[str, Any]:
    """Coefficients with the deviations that the training members have."""
    import numpy as np
    import torch

    fits = bench.fits(seed)
    drawn = np.random.default_rng((_DRAWN, seed)).standard_normal((len(fits.held), count))
    coefficients = torch.from_numpy(drawn).float() * fits.pca().deviations[:count].float()
    return nearest_distances(fits.factors(fits.rows_of(coefficients)), fits.space, fits.trained)


def _diffused(bench: Bench, seed: int, count: int) -> dict[str, Any]:
    fits = bench.fits(seed)
    drawn = fits.denoiser(count, "x0", "adanorm", bench.words.diffusion_steps).sample(len(fits.held), seed=seed)
    return nearest_distances(fits.factors(fits.rows_of(drawn)), fits.space, fits.trained)


def finding(bench: Bench, found: Cells) -> Finding:
    names = ", ".join(bench.asked.spaces[0].condition_names[:8])
    note = f"The condition: {names}{', …' * (len(bench.asked.spaces[0].condition_names) > 8)}. "
    table = spread_table(
        found, PART, title="LoRAs for held-out conditions", heads=("method", "latents"), columns=_COLUMNS,
        note=note + seeds_said(bench.words.seeds),
    )  # fmt: skip
    return Finding(PART, _SAYS, {"conditioned": table}, facts={"diffusion_steps": bench.words.diffusion_steps})


def copies(bench: Bench, found: Cells) -> Finding:
    """The distances to what was trained on."""
    kept = spread_table(
        found, COPIES, title="Distance to the nearest training LoRA", heads=("LoRAs", "latents"), columns=_NEAR,
        note=seeds_said(bench.words.seeds),
    )  # fmt: skip
    tables = {"copies": kept}
    if PART in bench.asked.parts:
        tables["copies-conditioned"] = spread_table(
            found, PART, title="The same, of LoRAs for held-out conditions", heads=("method", "latents"), columns=_NEAR
        )
    return Finding(COPIES, _COPIES, tables)
