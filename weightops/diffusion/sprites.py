"""Made pictures: pixel sprites with captions, in styles that a LoRA can learn. Needs no model, and nobody's licence.

A style is what all of its pictures share and no caption says.
"""

from __future__ import annotations

import csv
import io
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weightops.diffusion.extras import need
from weightops.errors import OutputError, UsageError, quote

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

Colour = tuple[int, int, int]

GRID = 16  # pixels of a sprite's side, before it is enlarged

SHAPES: Mapping[str, tuple[str, ...]] = {
    "ball": (
        "..####..",
        ".######.",
        "########",
        "########",
        "########",
        "########",
        ".######.",
        "..####..",
    ),
    "box": (
        "########",
        "########",
        "########",
        "########",
        "########",
        "########",
        "########",
        "########",
    ),
    "heart": (
        ".##..##.",
        "########",
        "########",
        "########",
        ".######.",
        "..####..",
        "...##...",
        "........",
    ),
    "tree": (
        "...##...",
        "..####..",
        "..####..",
        ".######.",
        ".######.",
        "########",
        "...##...",
        "...##...",
    ),
    "cross": (
        "..####..",
        "..####..",
        "########",
        "########",
        "########",
        "########",
        "..####..",
        "..####..",
    ),
    "ring": (
        "..####..",
        ".######.",
        "###..###",
        "##....##",
        "##....##",
        "###..###",
        ".######.",
        "..####..",
    ),
    "fish": (
        "........",
        "#..####.",
        "##.#####",
        "########",
        "########",
        "##.#####",
        "#..####.",
        "........",
    ),
    "cup": (
        "........",
        "######..",
        "########",
        "######.#",
        "######.#",
        "########",
        ".####...",
        ".####...",
    ),
}
COLOURS: Mapping[str, Colour] = {
    "red": (208, 48, 48),
    "orange": (232, 136, 40),
    "yellow": (232, 208, 56),
    "green": (56, 152, 72),
    "blue": (48, 88, 200),
    "violet": (136, 64, 176),
    "white": (236, 236, 232),
    "brown": (128, 80, 48),
}
GROUNDS: Mapping[str, Colour] = {
    "sky": (136, 192, 232),
    "grass": (120, 176, 88),
    "sand": (224, 200, 144),
    "night": (32, 36, 72),
    "snow": (224, 232, 240),
    "stone": (144, 144, 148),
}
# Every word that a caption can hold.
WORDS = ("a", "small", "big", *COLOURS, *SHAPES, "on", *GROUNDS)


@dataclass(frozen=True, slots=True)
class Style:
    """outline: the colour around a shape. texture: of the ground. tones: all there is, from dark to bright."""

    outline: Colour | None = None
    texture: str = "flat"
    tones: tuple[Colour, ...] = ()


STYLES: Mapping[str, Style] = {
    "plain": Style(),
    "outlined": Style(outline=(16, 12, 20)),
    "dithered": Style((16, 40, 24), "checks", ((24, 56, 32), (56, 104, 48), (136, 168, 32), (200, 220, 120))),
    "striped": Style(outline=(250, 250, 250), texture="stripes"),
    "dusk": Style((28, 8, 40), "bricks", ((44, 16, 60), (120, 32, 96), (216, 84, 96), (252, 176, 120))),
}


def sprites(
    folder: str | os.PathLike[str],
    *,
    count: int,
    seed: int = 0,
    style: str = "plain",
    size: int = 64,
    captions: bool = True,
) -> Path:
    """A folder of `count` pictures of `size` pixels a side, and their captions in metadata.csv.

    The same shapes, colours and grounds come from the same seed in each of the STYLES. Raises UsageError, OutputError.
    """
    if style not in STYLES:
        raise UsageError("sprites", f"unknown style {quote(style)}", f"known are {', '.join(STYLES)}")
    if count < 1:
        raise UsageError("sprites", f"found a count of {count}, expected 1 or more")
    if size < GRID or size % GRID:
        raise UsageError("sprites", f"found a size of {size}, expected a multiple of {GRID}")
    need("sprites", "PIL")
    target = Path(folder)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise OutputError(str(target), "exists", "name a folder that is not there yet")
    target.mkdir(parents=True, exist_ok=True)
    rows = [("file_name", "caption")]
    for number in range(count):
        caption, drawn = sprite(random.Random(f"{seed} {number}"), STYLES[style])
        name = f"sprite-{number:03d}.png"
        _write(target / name, drawn, size)
        rows.append((name, caption))
    if captions:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        (target / "metadata.csv").write_text(text.getvalue(), encoding="utf-8")
    return target


def sprite(draw: random.Random, style: Style) -> tuple[str, list[list[Colour]]]:
    """A caption, and what it says: GRID rows of GRID pixels."""
    shape, colour, ground = draw.choice(list(SHAPES)), draw.choice(list(COLOURS)), draw.choice(list(GROUNDS))
    side = draw.choice((8, 12))
    left, top = draw.randint(1, GRID - side - 1), draw.randint(1, GRID - side - 1)
    mirrored = draw.random() < 0.5

    def inside(x: int, y: int) -> bool:
        column, row = (x - left) * 8 // side, (y - top) * 8 // side
        if not (0 <= column < 8 and 0 <= row < 8):
            return False
        return SHAPES[shape][row][7 - column if mirrored else column] == "#"

    def pixel(x: int, y: int) -> Colour:
        if inside(x, y):
            # Light comes from above.
            return _toned(_shaded(COLOURS[colour], 1.15 if y - top < side // 3 else 0.95), style)
        if style.outline is not None and any(inside(x + i, y + j) for i, j in ((1, 0), (-1, 0), (0, 1), (0, -1))):
            return style.outline
        return _toned(_shaded(GROUNDS[ground], _light(style.texture, x, y)), style)

    caption = f"a {'small' if side == 8 else 'big'} {colour} {shape} on {ground}"
    return caption, [[pixel(x, y) for x in range(GRID)] for y in range(GRID)]


def _light(texture: str, x: int, y: int) -> float:
    """How bright the ground is here."""
    if texture == "checks":
        return 0.75 if (x + y) % 2 else 1.25
    if texture == "stripes":
        return 0.65 if (x + y) % 6 < 3 else 1.1
    if texture == "bricks":
        return 0.6 if y % 4 == 3 or (x + 4 * (y // 4 % 2)) % 8 == 7 else 1.05
    return 1.0


def _shaded(colour: Colour, light: float) -> Colour:
    red, green, blue = (max(0, min(255, round(value * light))) for value in colour)
    return red, green, blue


def _toned(colour: Colour, style: Style) -> Colour:
    """The style's tone that is as bright as this colour."""
    if not style.tones:
        return colour
    bright = (299 * colour[0] + 587 * colour[1] + 114 * colour[2]) // 1000
    return style.tones[min(len(style.tones) - 1, bright * len(style.tones) // 256)]


def _write(path: Path, drawn: list[list[Colour]], size: int) -> None:
    from PIL import Image

    image = Image.frombytes("RGB", (GRID, GRID), bytes(value for row in drawn for colour in row for value in colour))
    image.resize((size, size), Image.Resampling.NEAREST).save(path)
