"""Images that synthesised LoRAs make, embedded and compared with the condition asked for; and a grid of them."""

from __future__ import annotations

import base64
import functools
import io
from typing import TYPE_CHECKING, Any

from weightops.diffusion.axes import stem_of
from weightops.diffusion.extras import hushed
from weightops.diffusion.findings import Finding
from weightops.diffusion.grids import Grid, draw_grid
from weightops.diffusion.models import networks
from weightops.diffusion.page import Drawing
from weightops.diffusion.pictures import open_picture
from weightops.errors import MismatchError
from weightops.synthesis.embedders import condition_similarity
from weightops.synthesis.evaluation_cells import Measured, seeds_said, spread_table
from weightops.synthesis.evaluation_conditioned import MEAN, NEAREST, Method, methods, rows_by
from weightops.synthesis.evaluation_inputs import SHOWN as PART
from weightops.synthesis.evaluation_learnt import from_images
from weightops.synthesis.gap import changes_texts
from weightops.synthesis.stacked import Stacked

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL.Image import Image

    from weightops.diffusion.models import Loaded
    from weightops.synthesis.embedders import Embedder
    from weightops.synthesis.evaluation_bench import Bench
    from weightops.synthesis.evaluation_cells import Cell, Cells
    from weightops.synthesis.layout import Factors

_SAYS = (
    "Images are made with each LoRA, from the same noise whichever the method, and an embedder says what they show. "
    "Distance: between its answer and the condition that was asked for, in deviations of the training conditions, a "
    "root mean square over the numbers; cosine: of the two about the mean condition. Least is not 0: the last rows "
    "say how far real pictures of the same are, and images of the LoRA that was really trained. An embedder sees "
    "what it was made to see, and a condition that it made itself favours what pleases it. Coefficients that are "
    "learnt from images have seen some of the very same subject, which the others have not. The grid shows what "
    "numbers do not."
)
_COLUMNS = (Measured("distance", "distance"), Measured("cosine", "cosine"))
_GRID = 6  # LoRAs of the grid
_REAL = Method("held-out pictures", "real")
_BASE = Method("the model alone", "base")
_TRAINED = Method("the LoRA that was trained", "trained")


def check_embedder(embedder: Embedder, names: Sequence[str]) -> None:
    """Raises MismatchError for one that makes other numbers than the conditions are."""
    if embedder.size != len(names):
        what = f"makes {embedder.size:,} numbers of an image, and the conditions have {len(names):,}"
        raise MismatchError(embedder.label, what, "the embedder that made the conditions is the one to compare by")


def shown_methods(bench: Bench) -> list[tuple[Method, float]]:
    """The model alone, the baselines, the largest of each that was asked for, and what they are to be measured by.

    Each at each strength, but for what has none.
    """
    asked = methods(bench)
    most = max((method.components for method in asked), default=0)
    ridge = [m for m in asked if m.kind == "ridge" and m.components == most]
    drawn = [m for m in asked if m.kind == "diffusion" and m.components == most and m.prediction == "x0"][:1]
    learned = []
    if "learned" in bench.words.methods and bench.asked.few is not None:
        count = max(bench.limited(bench.words.conditioned))
        few = bench.words.few_images
        learned = [Method(f"coefficients from {few} image{'s' * (few != 1)}", "learned", count)]
    at_each = [
        (method, strength)
        for method in (MEAN, NEAREST, *ridge, *drawn, *learned, _TRAINED) for strength in bench.words.strengths
    ]  # fmt: skip
    return [(_BASE, 1.0), *at_each, (_REAL, 1.0)]


def _row(method: Method, strength: float) -> tuple[str, str]:
    label, latents = method.row
    return label if strength == 1 else f"{label}, at {strength:g}", latents


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    words = bench.words
    made_of = {
        "generate": words.generate, "shown": words.shown, "steps": words.sampling_steps, "guidance": words.guidance,
        "embedder": bench.embedder.digest,
    }  # fmt: skip
    for method, strength in shown_methods(bench):
        more: dict[str, Any] = {"diffusion": words.diffusion_steps} if method.kind == "diffusion" else {}
        if method.kind == "learned" and bench.asked.few is not None:
            held = [bench.asked.spaces[0].names[index] for index in bench.asked.splits[seed][1][: words.shown]]
            more = {"lr": words.lr, "l2": words.l2, "course": words.steps, "few": bench.asked.few.digest(held)}
        measure = functools.partial(_measured, bench, seed, method, strength)
        yield bench.cell(PART, _row(method, strength), seed, measure, strength=strength, **made_of, **more)


def _measured(bench: Bench, seed: int, method: Method, strength: float) -> dict[str, Any]:
    import numpy as np

    fits = bench.fits(seed)
    names = fits.names[: bench.words.shown]
    images = _real(bench, names) if method is _REAL else _made(bench, seed, method, names, strength)
    standard = fits.nearest().standard
    asked = standard(fits.conditions(fits.held[: len(names)]))
    apart, cosines = [], []
    for wanted, own in zip(asked, images, strict=True):
        found = standard(bench.embedder.embed(own))
        apart += np.sqrt(np.square(found - wanted).mean(1)).tolist()
        cosines += condition_similarity(found, wanted).tolist()
    pictures = [_png(own[0]) for own in images[:_GRID]] if seed == 0 else []
    return {"distance": float(np.mean(apart)), "cosine": float(np.mean(cosines)), "pictures": pictures}


def _real(bench: Bench, names: Sequence[str]) -> list[list[Image]]:
    assert bench.gaps is not None
    examples = bench.gaps.images.listed.examples
    return [[open_picture(example.picture.path) for example in examples[name]] for name in names]


def _made(bench: Bench, seed: int, method: Method, names: Sequence[str], strength: float) -> list[list[Image]]:
    fits = bench.fits(seed)
    factors: Factors | None = None
    if method is _TRAINED:
        factors = fits.true
    elif method.kind == "learned":
        factors = from_images(bench, seed, method.components, names)
    elif method is not _BASE:
        factors = fits.factors(rows_by(bench, fits, method, seed))
    return paint(bench, names, None if factors is None else [(up * strength, down) for up, down in factors])


def paint(bench: Bench, names: Sequence[str], factors: Factors | None) -> list[list[Image]]:
    """Images of the first LoRAs of `factors` [L, ...], of each as many as asked for, under its own captions."""
    assert bench.gaps is not None
    words, own = bench.words, bench.gaps.images
    layout = bench.asked.spaces[0].layout
    # With guidance a pipeline puts a second half before each batch, which would get others' LoRAs.
    together = 1 if words.guidance > 1 or changes_texts(layout) else max(1, words.batch // words.generate)
    found: list[list[Image]] = []
    with Stacked(networks(own.loaded.pipe), layout) as stacked:
        for start in range(0, len(names), together):
            chosen = names[start : start + together]
            stop = start + len(chosen)
            stacked.put(None if factors is None else [(up[start:stop], down[start:stop]) for up, down in factors])
            captions = [_caption(own, name, n) for name in chosen for n in range(words.generate)]
            seeds = [_word(own.stream(name), n) for name in chosen for n in range(words.generate)]
            made = _sampled(own.loaded, captions, seeds, own.resolution, words.sampling_steps, words.guidance)
            found += [made[n : n + words.generate] for n in range(0, len(made), words.generate)]
    return found


def _caption(own: Any, name: str, number: int) -> str:
    examples = own.listed.examples[name]
    return str(examples[number % len(examples)].caption)


def _word(stream: int, number: int) -> int:
    """32 bits, which are all that torch's generator on the CPU keeps."""
    import numpy as np

    return int(np.random.SeedSequence([stream, number]).generate_state(1, np.uint32)[0])


def _sampled(
    loaded: Loaded, captions: list[str], seeds: Sequence[int], resolution: tuple[int, int], steps: int, guidance: float
) -> list[Image]:
    import torch

    height, width = resolution
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with hushed(), torch.no_grad():
        made = loaded.pipe(
            prompt=captions, height=height, width=width, num_inference_steps=steps, guidance_scale=guidance,
            generator=generators,
        )  # fmt: skip
    return list(made.images)


def _png(image: Image) -> str:
    made = io.BytesIO()
    image.convert("RGB").save(made, "PNG")
    return base64.b64encode(made.getvalue()).decode()


def finding(bench: Bench, found: Cells) -> Finding:
    words = bench.words
    count = min(words.shown, len(bench.asked.splits[0][1]))
    note = (
        f"{count:,} held-out LoRAs a seed, {words.generate} images of each, {words.sampling_steps} steps, guidance "
        f"{words.guidance:g}; embedded by {stem_of(bench.embedder.label)}. {seeds_said(words.seeds)}"
    )
    table = spread_table(
        found, PART, title="Images against the condition that was asked for", heads=("LoRA", "latents"),
        columns=_COLUMNS, note=note,
    )  # fmt: skip
    drawings = {}
    grid = _grid(bench, found)
    if grid is not None:
        words_of = "A held-out condition in each row, a method in each column, from the same noise"
        drawings["shown"] = Drawing(grid, words_of)
    return Finding(PART, _SAYS, {"shown": table}, drawings)


def _grid(bench: Bench, found: Cells) -> bytes | None:
    from PIL import Image as images_of

    columns: dict[str, list[Image]] = {}
    for row in found.rows(PART):
        kept = [own for own in found.lists(PART, row, "pictures") if own]
        if kept:
            columns[", ".join(filter(None, row))] = [
                images_of.open(io.BytesIO(base64.b64decode(data)), formats=("PNG",)) for data in kept[0]
            ]
    if not columns:
        return None
    names = [bench.asked.spaces[0].names[index] for index in bench.asked.splits[0][1][:_GRID]]
    height = min(len(column) for column in columns.values())
    lines = [[column[n] for column in columns.values()] for n in range(height)]
    made = io.BytesIO()
    draw_grid(Grid(lines, list(columns), names[:height])).save(made, "PNG")
    return made.getvalue()
