"""Generated images beside the real ones of their names or places: how alike they are; and CLIP beside their prompts."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.diffusion.figures import curve
from weightops.diffusion.findings import Finding, mean_and_error
from weightops.diffusion.image_folder import LIST
from weightops.diffusion.metrics import clip_similarity, lpips, psnr, ssim
from weightops.diffusion.page import Drawing
from weightops.diffusion.pictures import open_picture
from weightops.diffusion.tables import Table, with_means
from weightops.errors import MismatchError, UsageError, listing, printable, quote

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from weightops.diffusion.findings import Tick
    from weightops.diffusion.generated_images import Generated
    from weightops.diffusion.pictures import Picture

    Measure = Callable[[NDArray[Any], NDArray[Any]], float]

PSNR_SSIM, LPIPS, CLIP = "PSNR and SSIM", "LPIPS", "CLIP similarity"
# Pixels of the shorter side that each must have: SSIM's window, what AlexNet can see.
SMALLEST = {PSNR_SSIM: 11, LPIPS: 31}

_SAYS = (
    "PSNR (in dB) and SSIM (1 for equal images) compare pixel with pixel. Of a generated image and a real one they say "
    "little more than how alike the places of light and dark are: they are no measure of quality, and a grey blur may "
    "score above a good image in another pose. What they can show is whether images come nearer to copies of the real "
    "ones. The held-out loss, which is measured on the model itself, is one that says whether it has learnt."
)
_SAYS_LPIPS = (
    "LPIPS is a distance (0 for equal images) between what a network trained on photographs sees in two images, nearer "
    "to what people call alike than PSNR and SSIM. It still compares a generated image with one real image: another "
    "image of the same subject, equally good, is far from it."
)
_SAYS_CLIP = (
    "CLIP similarity is the cosine between CLIP's embeddings of an image and of its prompt. It says whether what is "
    "named can be seen. It likes plain, centred, typical images and words written into them, counts and places things "
    "badly, and knows little of a trained style or of a new subject, whose word it has never read. Cosines lie between "
    "0 and 0.4 or so; those of two CLIP models are not to be compared."
)


# ------------------------------------------------------------------------------------------------ pairs


@dataclass(frozen=True, slots=True)
class Pairs:
    """Real images, and of each row the generated ones of the same places. how: by what they were put together."""

    real: tuple[Picture, ...]
    rows: Mapping[str, tuple[Picture, ...]]
    how: str
    warnings: tuple[str, ...] = ()


def paired(real: Sequence[Picture], generated: Sequence[Generated], where: str) -> Pairs:
    """By name without suffix, where any generated image has a real one's; else in order, where there are as many.

    Raises MismatchError where neither is so.
    """
    stems = [_stem(picture) for picture in real]
    if any(_stem(picture) in stems for row in generated for picture in row.pictures):
        return _by_name(real, generated, where)
    for row in generated:
        if len(row.pictures) != len(real):
            what = f"{_images(len(row.pictures))} in {quote(row.label)}, but {_images(len(real))} in {printable(where)}"
            hint = "one is wanted for each real image, in the order of their names; or name them as the real ones"
            raise MismatchError("--generated", f"found {what}", hint)
    return Pairs(tuple(real), {row.label: row.pictures for row in generated}, "in the order of their names")


def _by_name(real: Sequence[Picture], generated: Sequence[Generated], where: str) -> Pairs:
    """The real images of which every row has one."""
    rows = []
    alone: list[str] = []
    for label, pictures in ((where, real), *((row.label, row.pictures) for row in generated)):
        named: dict[str, Picture] = {}
        for picture in pictures:
            other = named.setdefault(_stem(picture), picture)
            if other is not picture:
                names = f"{quote(other.name)} and {quote(picture.name)}"
                raise MismatchError(printable(label), f"{names} have one name without their suffixes", "rename one")
        rows.append(named)
    both = [stem for stem in rows[0] if all(stem in row for row in rows)]
    if not both:
        hint = "name the generated images as the real ones, or give as many, in their order, under other names"
        raise MismatchError("--generated", f"no image of {printable(where)} has one of its name in every row", hint)
    for label, row in zip((where, *(g.label for g in generated)), rows, strict=True):
        left = [picture.name for stem, picture in row.items() if stem not in both]
        if left:
            alone.append(f"{printable(label)}: without a counterpart everywhere, and left out: {listing(left)}")
    made = {row.label: tuple(named[stem] for stem in both) for row, named in zip(generated, rows[1:], strict=True)}
    return Pairs(tuple(rows[0][stem] for stem in both), made, "by their names", tuple(alone))


def _stem(picture: Picture) -> str:
    return str(Path(picture.name).with_suffix(""))


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"


# ------------------------------------------------------------------------------------------------ measured


def check_sizes(pairs: Pairs, part: str) -> None:
    """Refuse generated images that are smaller than what measures them. Raises UsageError."""
    least = SMALLEST[part]
    for label, pictures in pairs.rows.items():
        for picture in pictures:
            if min(picture.width, picture.height) < least:
                found = f"{quote(picture.name)} has {picture.width}x{picture.height} pixels"
                what = f"{found}, expected at least {least}x{least}, the least that {part.rpartition(' ')[2]} can see"
                raise UsageError(printable(label), what)


def pixel_likeness(pairs: Pairs, generated: Sequence[Generated], tick: Tick) -> Finding:
    """PSNR and SSIM of every pair, with the means of the rows."""
    measures: dict[str, Measure] = {"PSNR in dB": psnr, "SSIM": ssim}
    rows = _measured(pairs, measures, tick)
    note = _note(pairs)
    tables = {
        "psnr": _table(pairs, rows["PSNR in dB"], "PSNR of generated against real images, in dB", note),
        "ssim": _table(pairs, rows["SSIM"], "SSIM of generated against real images", note),
    }
    drawings = _drawn(tables, generated, {"psnr": "mean PSNR in dB", "ssim": "mean SSIM"})
    return Finding(PSNR_SSIM, _SAYS, tables, drawings, _facts(pairs), pairs.warnings)


def check_lpips() -> None:
    """Refuse before the work what would be refused after it: the package and its weights are there. UsageError."""
    import numpy as np

    nothing = np.zeros((32, 32, 3), np.uint8)
    lpips(nothing, nothing)


def perceptual_distance(pairs: Pairs, generated: Sequence[Generated], tick: Tick, *, device: str) -> Finding:
    """LPIPS of every pair."""
    measure = functools.partial(lpips, device=device)
    rows = _measured(pairs, {"LPIPS": measure}, tick)["LPIPS"]
    tables = {"lpips": _table(pairs, rows, "LPIPS of generated against real images, on AlexNet", _note(pairs))}
    return Finding(LPIPS, _SAYS_LPIPS, tables, _drawn(tables, generated, {"lpips": "mean LPIPS"}), _facts(pairs))


def _measured(pairs: Pairs, measures: Mapping[str, Measure], tick: Tick) -> dict[str, dict[str, list[float]]]:
    """By measure and label, a number for each real image."""
    import numpy as np

    found: dict[str, dict[str, list[float]]] = {name: {label: [] for label in pairs.rows} for name in measures}
    for number, real in enumerate(pairs.real):
        image = open_picture(real.path)
        fitted: dict[tuple[int, int], NDArray[Any]] = {}
        for label, pictures in pairs.rows.items():
            made = np.asarray(open_picture(pictures[number].path))
            size = made.shape[1], made.shape[0]
            if size not in fitted:
                fitted[size] = np.asarray(_fitted(image, size))
            for name, measure in measures.items():
                found[name][label].append(measure(fitted[size], made))
            tick(1)
    return found


def _fitted(image: Any, size: tuple[int, int]) -> Any:
    """The middle of the image, of the other's proportions, scaled to its size."""
    from PIL import ImageOps
    from PIL.Image import Resampling

    return image if image.size == size else ImageOps.fit(image, size, Resampling.LANCZOS, centering=(0.5, 0.5))


def _note(pairs: Pairs) -> str:
    how = f"Images were put together {pairs.how}."
    sizes = {(p.width, p.height) for row in pairs.rows.values() for p in row}
    other = [
        real.name for n, real in enumerate(pairs.real)
        if any((row[n].width, row[n].height) != (real.width, real.height) for row in pairs.rows.values())
    ]  # fmt: skip
    if not other:
        return how
    size = "that of the generated ones" if len(sizes) > 1 else "{}x{}".format(*next(iter(sizes)))
    which = "The real images were" if len(other) == len(pairs.real) else f"Of the real images {listing(other)} were"
    return f"{how} {which} of another size: cut about their middles and scaled to {size} (Lanczos)."


def _table(pairs: Pairs, rows: Mapping[str, Sequence[float]], title: str, note: str) -> Table:
    return with_means(rows, title=title, names=[p.name for p in pairs.real], of="generated", note=note)


def _facts(pairs: Pairs) -> dict[str, Any]:
    return {"images": len(pairs.real), "put together": pairs.how}


def _drawn(tables: Mapping[str, Table], generated: Sequence[Generated], names: Mapping[str, str]) -> dict[str, Drawing]:
    """The means against steps, where these are known."""
    steps = {row.label: row.step for row in generated if row.step is not None}
    found = {}
    for name, table in tables.items():
        points = [(float(step), row[-1]) for row in table.rows if (step := steps.get(str(row[0]))) is not None]
        numbers = [(x, y) for x, y in points if isinstance(y, float) and math.isfinite(y)]
        if len(numbers) > 1:
            xs, ys = [x for x, _ in numbers], [y for _, y in numbers]
            words = f"{names[name]} of all images, by steps"
            found[name] = Drawing(curve({"mean": (xs, ys)}, title=words, x="steps", y=names[name]), words)
    return found


# ------------------------------------------------------------------------------------------------ CLIP


def check_prompts(generated: Sequence[Generated]) -> None:
    """Refuse folders that do not say the prompts of their images. Raises UsageError."""
    for row in generated:
        if not row.prompts:
            what = f"needs the prompts of the images in {printable(row.folder)}, expected {LIST} in it"
            raise UsageError("--clip", what, "weightops generate writes it")


def prompt_similarity(generated: Sequence[Generated], model: str, tick: Tick, *, device: str) -> Finding:
    """The cosine of every generated image and its prompt, by CLIP. Raises what `clip_similarity` does."""
    cells: list[tuple[str, int, float, float | None]] = []
    images: list[tuple[str, str, str, float]] = []
    for row in generated:
        pictures = [open_picture(picture.path) for picture in row.pictures]
        found = clip_similarity(pictures, row.prompts, model=model, device=device)
        mean, error = mean_and_error(found)
        cells.append((row.label, len(found), mean, error))
        images += [
            (row.label, picture.name, prompt, value)
            for picture, prompt, value in zip(row.pictures, row.prompts, found, strict=True)
        ]
        tick(len(found))
    note = f"CLIP: {printable(model)}. ± is the standard error of the mean over the images."
    columns = ("generated", "images", "mean cosine", "±")
    tables = {
        "clip": Table("CLIP similarity of generated images and their prompts", columns, tuple(cells), note, 4),
        "clip-images": Table(
            "CLIP similarity by image", ("generated", "image", "prompt", "cosine"), tuple(images), note, 4
        ),
    }  # fmt: skip
    return Finding(CLIP, _SAYS_CLIP, tables, facts={"model": model})
