"""How well components of a space make LoRAs that it was not learnt from: in numbers of weights, and in what they do."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

from weightops.diffusion.figures import curve
from weightops.diffusion.findings import Finding
from weightops.diffusion.page import Drawing
from weightops.synthesis.evaluation_cells import Measured, mean_and_spread, seeds_said, spread_table
from weightops.synthesis.evaluation_inputs import RECONSTRUCTION as PART
from weightops.synthesis.evaluation_measures import delta_error
from weightops.synthesis.gap import SAYS as GAP
from weightops.synthesis.null import noise_null

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightops.synthesis.evaluation_bench import Bench
    from weightops.synthesis.evaluation_cells import Cell, Cells
    from weightops.synthesis.evaluation_fits import Fits

_SAYS = (
    "Held-out LoRAs are projected on the first components of the others and made again from their coefficients. "
    "Explained variance is a statement about numbers in files: factors in a gauge of their own each have directions in "
    "common that mean nothing, and noise has components, too. Beside it stands the share that as many components have "
    "of independent Gaussian noise of the same size, and what is left of it on held-out LoRAs. ΔW error is relative, "
    "‖ΔW made − ΔW true‖ / ‖ΔW true‖, and can be above 1: worse than nothing. Only the gap says what a LoRA does. "
    + GAP
)
_COLUMNS = (
    Measured("explained", "explained"), Measured("null", "of noise", spread=False),
    Measured("explained held out", "held out"), Measured("error", "ΔW error"), Measured("gap", "gap"),
    Measured("worse than none", "worse than none, %", percent=True),
)  # fmt: skip


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """Of each space and number of components."""
    words, asked = bench.words, bench.asked
    for number, label in enumerate(asked.labels):
        if "pca" in words.methods:
            for count in bench.limited(words.components):
                measure = functools.partial(_rows, bench, seed, number, count)
                yield bench.cell(PART, (label, str(count)), seed, measure, number=number, geometry="rows")
    if "delta" in words.methods:
        ranks = [module.rank for module in asked.spaces[0].layout.modules]
        for name, cut in (("ΔW", None), ("ΔW, cut to the LoRAs' rank", ranks)):
            for count in bench.limited(words.components):
                measure = functools.partial(_delta, bench, seed, count, cut)
                yield bench.cell(PART, (name, str(count)), seed, measure, geometry="delta", cut=cut is not None)


def _rows(bench: Bench, seed: int, number: int, count: int) -> dict[str, Any]:
    fits = bench.fits(seed, number)
    pca = fits.pca()
    made = fits.rows_of(pca.coefficients(fits.rows)[:, :count])
    left = (fits.rows - made).double().square().sum() / (fits.rows - pca.mean).double().square().sum()
    factors = fits.factors(made)
    return {
        "explained": float(pca.explained[min(count, pca.components) - 1]),
        "null": noise_null(len(fits.trained), fits.space.width, count), "explained held out": 1 - float(left),
        "error": delta_error(factors, fits.true), **bench.gap(fits, factors),
    }  # fmt: skip


def _delta(bench: Bench, seed: int, count: int, ranks: list[int] | None) -> dict[str, Any]:
    fits = bench.fits(seed)
    pca = fits.delta()
    count = min(count, pca.components)
    coefficients = _delta_coefficients(fits)[:, :count]
    weights = coefficients.new_zeros(len(coefficients), pca.components)
    weights[:, :count] = coefficients
    factors = pca.factors(weights, fits.space, ranks)
    width = sum(module.out * module.n for module in fits.space.layout.modules)
    return {
        "explained": float(pca.explained[count - 1]), "null": noise_null(len(fits.trained), width, count),
        "explained held out": float(coefficients.square().sum() / _apart(fits)),
        "error": delta_error(factors, fits.true), **bench.gap(fits, factors),
    }  # fmt: skip


def _delta_coefficients(fits: Fits) -> Any:
    pca = fits.delta()
    return fits.delta_products() @ pca.weights - pca.offsets


def _apart(fits: Fits) -> Any:
    """Σ ‖ΔW − mean ΔW‖² of the held-out LoRAs."""
    products = fits.delta_products()
    own = fits.space.norms[fits.held]
    return float((own**2).sum()) - float(2 * products.mean(1).sum()) + len(fits.held) * float(fits.products().mean())


def finding(bench: Bench, found: Cells) -> Finding:
    table = spread_table(
        found, PART, title="Held-out LoRAs, made from components", heads=("representation", "components"),
        columns=_COLUMNS, note=_note(bench),
    )  # fmt: skip
    drawings = {}
    for name, words, shown in (
        ("gap", "gap of held-out LoRAs", "gap"), ("explained", "explained variance of trained LoRAs", "explained")
    ):  # fmt: skip
        lines = _lines(found, name)
        if lines:
            title = f"{words[:1].upper()}{words[1:]}, by components"
            drawings[f"reconstruction-{shown}"] = Drawing(curve(lines, title=title, x="components", y=words), title)
    return Finding(PART, _SAYS, {"reconstruction": table}, drawings, {"components": list(bench.words.components)})


def _lines(found: Cells, name: str) -> dict[str, tuple[list[float], list[float]]]:
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for row in found.rows(PART):
        mean, _ = mean_and_spread(found.values(PART, row, name))
        if mean is not None and math.isfinite(mean):
            xs, ys = lines.setdefault(row[0], ([], []))
            xs.append(float(row[1]))
            ys.append(mean)
    return lines


def _note(bench: Bench) -> str:
    trained, held = bench.asked.splits[0]
    return (
        f"{len(trained):,} LoRAs are learnt from, {len(held):,} are held out and measured. "
        f"{seeds_said(bench.words.seeds)}"
    )
