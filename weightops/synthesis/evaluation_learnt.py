"""Coefficients learnt from a few images, against LoRAs trained on the same images for as many steps."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

from weightops.diffusion.figures import bars
from weightops.diffusion.findings import Finding
from weightops.diffusion.page import Drawing
from weightops.synthesis.coordinates import coordinates, learn_coefficients, learn_plain
from weightops.synthesis.evaluation_cells import Measured, mean_and_spread, seeds_said, spread_table
from weightops.synthesis.evaluation_inputs import LEARNT as PART
from weightops.synthesis.gap import SAYS as GAP
from weightops.synthesis.image_descent import Course

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from weightops.synthesis.coordinates import Coordinates
    from weightops.synthesis.evaluation_bench import Bench
    from weightops.synthesis.evaluation_cells import Cell, Cells, Row
    from weightops.synthesis.layout import Factors

_SAYS = (
    "For held-out LoRAs, each from its few images and by gradient descent through the frozen model: the coefficients "
    "of the space, or a LoRA from nothing. Both take the same images, steps, batches and noises; plain training is "
    "shown at each learning rate that was tried, and its best row is the best on these very held-out images, which "
    "favours it; the rate and the prior of the coefficients are those that were asked for, and were not chosen on "
    "these. Plain training starts with the model alone and the coefficients with the mean LoRA, which is shown, too: "
    "what it gives is not learnt from these images. More steps may help plain training more. " + GAP
)
_COLUMNS = (
    Measured("gap", "gap"), Measured("worse than none", "worse than none, %", percent=True),
    Measured("length", "deviations"),
)  # fmt: skip
_PLAIN = "plain training"


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    words = bench.words
    assert bench.asked.few is not None
    held = [bench.asked.spaces[0].names[index] for index in bench.asked.splits[seed][1][: words.learners]]
    course: dict[str, Any] = {
        "steps": words.steps, "learners": words.learners, "few": bench.asked.few.digest(held),
    }  # fmt: skip
    yield bench.cell(
        PART,
        ("the mean LoRA, nothing learnt", ""),
        seed,
        functools.partial(_mean, bench, seed),
        learners=words.learners,
    )
    if "learned" in words.methods:
        for count in bench.limited(words.conditioned):
            row = f"coefficients, PCA-{count}", f"{words.lr:g}"
            measure = functools.partial(_coefficients, bench, seed, count)
            yield bench.cell(PART, row, seed, measure, lr=words.lr, l2=words.l2, **course)
        if "vae-mlp" in words.methods:
            count, beta = max(bench.limited(words.latents)), min(words.betas)
            row = f"{count} latents of a VAE, MLP, β {beta:g}", f"{words.lr:g}"
            measure = functools.partial(_latents, bench, seed, beta, count)
            yield bench.cell(PART, row, seed, measure, lr=words.lr, l2=words.l2, vae=words.vae_steps, **course)
    if "plain" in words.methods:
        for lr in words.plain_lrs:
            yield bench.cell(PART, (_PLAIN, f"{lr:g}"), seed, functools.partial(_plain, bench, seed, lr), **course)


def _names(bench: Bench, seed: int) -> list[str]:
    return bench.fits(seed).names[: bench.words.learners]


def _course(bench: Bench, lr: float, seed: int, l2: float = 0.0) -> Course:
    words = bench.words
    return Course(words.steps, lr, words.few_images, seed, l2).check()


def _mean(bench: Bench, seed: int) -> dict[str, Any]:
    names, fits = _names(bench, seed), bench.fits(seed)
    assert bench.gaps is not None
    return bench.gaps.said(names, fits.factors(fits.pca().mean.expand(len(names), -1)))


def from_images(bench: Bench, seed: int, count: int, names: Sequence[str]) -> Factors:
    """Factors [L, …] of so many coefficients, learnt from the few images of each of these held-out LoRAs."""
    return _joined(bench, names, _descent(bench, seed, _components(bench, seed, count), []))


def _components(bench: Bench, seed: int, count: int) -> Coordinates:
    fits = bench.fits(seed)
    return coordinates(fits.space.layout, fits.pca(), fits.coefficients(), components=count)


def _coefficients(bench: Bench, seed: int, count: int) -> dict[str, Any]:
    return _learnt(bench, seed, _components(bench, seed, count))


def _latents(bench: Bench, seed: int, beta: float, count: int) -> dict[str, Any]:
    fits = bench.fits(seed)
    vae = fits.vae("mlp", beta, count, bench.words.vae_steps)
    space = coordinates(fits.space.layout, fits.pca(), vae.encode(fits.coefficients()), vae=vae)
    return _learnt(bench, seed, space)


def _learnt(bench: Bench, seed: int, space: Coordinates) -> dict[str, Any]:
    import torch

    lengths: list[Tensor] = []
    found = _by_parts(bench, _names(bench, seed), _descent(bench, seed, space, lengths))
    return {**found, "length": float(torch.cat(lengths).mean())}


def _descent(
    bench: Bench, seed: int, space: Coordinates, lengths: list[Tensor]
) -> Callable[[Sequence[str]], Factors]:  # fmt: skip
    """What learns the coefficients of these names; lengths: how long they are, in deviations, is added."""
    import torch

    course = _course(bench, bench.words.lr, seed, bench.words.l2)

    def learn(names: Sequence[str]) -> Factors:
        assert bench.few is not None
        c, _ = learn_coefficients(bench.few, space, names, course)
        lengths.append(c.square().mean(1).sqrt())
        with torch.no_grad():
            return space.factors(c)

    return learn


def _plain(bench: Bench, seed: int, lr: float) -> dict[str, Any]:
    layout, course = bench.asked.spaces[0].layout, _course(bench, lr, seed)

    def learn(names: Sequence[str]) -> Factors:
        assert bench.few is not None
        return learn_plain(bench.few, layout, names, course)[0]

    return _by_parts(bench, _names(bench, seed), learn)


def _by_parts(bench: Bench, names: Sequence[str], learn: Callable[[Sequence[str]], Factors]) -> dict[str, Any]:
    """The gap of all together."""
    assert bench.gaps is not None
    return bench.gaps.said(names, _joined(bench, names, learn))


def _joined(bench: Bench, names: Sequence[str], learn: Callable[[Sequence[str]], Factors]) -> Factors:
    """As many LoRAs at once as a batch holds: each learns as it would alone."""
    import torch

    together = max(1, bench.words.batch // bench.words.few_images)
    parts = [learn(names[start : start + together]) for start in range(0, len(names), together)]
    return [
        (torch.cat([up for up, _ in pairs]), torch.cat([down for _, down in pairs]))
        for pairs in zip(*parts, strict=True)
    ]


def finding(bench: Bench, found: Cells) -> Finding:
    words = bench.words
    count = min(words.learners, len(bench.asked.splits[0][1]))
    note = (
        f"{count:,} held-out LoRAs a seed, each from {words.few_images} images in {words.steps} steps of as many "
        f"images. Plain training has the rank of the space's LoRAs. {seeds_said(words.seeds)}"
    )
    rows = found.rows(PART)
    tables = {
        "learnt": spread_table(
            found, PART, title="Learnt from a few images", heads=("what is learnt", "rate"), columns=_COLUMNS,
            note=note, rows=_best(found, rows),
        ),
        "learnt-rates": spread_table(
            found, PART, title="Plain training, by learning rate", heads=("what is learnt", "rate"), columns=_COLUMNS,
            rows=[row for row in rows if row[0] == _PLAIN],
        ),
    }  # fmt: skip
    tables = {name: table for name, table in tables.items() if table.rows}
    means = {f"{row[0]}": mean_and_spread(found.values(PART, row, "gap"))[0] for row in _best(found, rows)}
    title = f"Gap of LoRAs learnt from {words.few_images} images in {words.steps} steps"
    shown = {name: mean for name, mean in means.items() if mean is not None and math.isfinite(mean)}
    drawings = {"learnt": Drawing(bars(shown, title=title, x="gap"), title)} if shown else {}
    return Finding(PART, _SAYS, tables, drawings, {"steps": words.steps, "plain_lrs": list(words.plain_lrs)})


def _best(found: Cells, rows: Sequence[Row]) -> list[Row]:
    """All rows but those of plain training that are not its best."""
    plain = [row for row in rows if row[0] == _PLAIN]

    def gap(row: Row) -> float:
        mean = mean_and_spread(found.values(PART, row, "gap"))[0]
        return -math.inf if mean is None or not math.isfinite(mean) else mean

    best = max(plain, key=gap, default=None)
    return [row for row in rows if row[0] != _PLAIN or row == best]
