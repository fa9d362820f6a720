"""Labelled grids of images: where each image and each line of text stands, as values, and then the drawing.

Labels are wrapped to the room that they have and never lie on a picture. Knows nothing of how images were made.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

MAX_SIDE = 8_000  # pixels of a grid; images are scaled down above it
SMALLEST = 160  # pixels of a cell's longer side; smaller images are enlarged by a whole number, pixel by pixel

_PER_LINE = 8  # images of a single row, before it goes on in a second line
_PAPER = (250, 250, 247)
_INK = (31, 35, 40)
_FAINT = (107, 112, 118)

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True, slots=True)
class Grid:
    """What a grid shows. cells: row by row, each as many as there are columns; None stays empty.

    A path is opened when it is drawn, so that no more than one image is in memory. rows: a label for each, "" for none.
    title, note: lines above it, "" for none.
    """

    cells: Sequence[Sequence[Image | Path | None]]
    columns: Sequence[str]
    rows: Sequence[str]
    title: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Text:
    """Lines of text in a box. size: of the font in pixels."""

    box: Box
    lines: tuple[str, ...]
    size: int
    faint: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything stands. cells: each with its row and column; images lie centred in them. face: of the font."""

    size: tuple[int, int]
    cells: tuple[tuple[int, int, Box], ...]
    texts: tuple[Text, ...]
    face: str = ""


def draw_grid(grid: Grid) -> Image:
    """The grid as an image in RGB, at most MAX_SIDE pixels wide and high."""
    from PIL import Image, ImageDraw

    layout = lay_out(grid)
    paper = Image.new("RGB", layout.size, _PAPER)
    for row, column, box in layout.cells:
        cell = grid.cells[row][column]
        if cell is not None:
            with _opened(cell) as image:
                fitted = _fitted(image, (box[2] - box[0], box[3] - box[1]))
            left = box[0] + (box[2] - box[0] - fitted.width) // 2
            paper.paste(fitted, (left, box[1] + (box[3] - box[1] - fitted.height) // 2))
    draw = ImageDraw.Draw(paper)
    for text in layout.texts:
        font = _font(layout.face, text.size)
        for number, line in enumerate(text.lines):
            place = (text.box[0], text.box[1] + number * _line_height(text.size))
            draw.text(place, line, font=font, fill=_FAINT if text.faint else _INK)
    return paper


def lay_out(grid: Grid) -> Layout:
    """Where everything of the grid stands, scaled down until it is no larger than MAX_SIDE."""
    sizes = [_size(cell) for row in grid.cells for cell in row if cell is not None]
    width, height = max(size[0] for size in sizes), max(size[1] for size in sizes)
    scale = float(max(1, math.ceil(SMALLEST / max(width, height))))
    face = face_for("".join([grid.title, grid.note, *grid.columns, *grid.rows]))
    while True:
        layout = _placed(grid, face, max(1, round(width * scale)), max(1, round(height * scale)))
        excess = max(layout.size) / MAX_SIDE
        if excess <= 1 or round(width * scale) <= 8:
            return layout
        scale /= max(excess, 1.01)


def face_for(text: str) -> str:
    """The font in which this text is drawn: "" is Pillow's own, which has the letters of ASCII and few more.

    Where it lacks some of them, DejaVu Sans, which comes with matplotlib.
    """
    faces = ["", *_dejavu()]
    return min(faces, key=lambda face: len(unknown_letters(text, face)))


def unknown_letters(text: str, face: str) -> str:
    """The letters of the text for which the font has no form, each once: empty boxes are drawn for them."""
    font = _font(face, 16)
    missing = _form(font, "\U0010ffff")
    return "".join(dict.fromkeys(c for c in text if c.isprintable() and not c.isspace() and _form(font, c) == missing))


# ------------------------------------------------------------------------------------------------ places


def _placed(grid: Grid, face: str, width: int, height: int) -> Layout:
    """The layout for cells of this size."""
    size = min(34, max(13, round(width * 0.045)))
    margin, gap = round(1.4 * size), max(4, round(0.5 * size))
    label_size, note_size, title_size = size, max(12, round(size * 0.85)), round(size * 1.3)
    count = len(grid.columns)
    lines = math.ceil(count / _PER_LINE) if len(grid.cells) == 1 else 1
    per_line = math.ceil(count / lines)
    # Labels of rows stand at their left, in a column as wide as they need.
    room = min(max(width // 2, 110), 380)
    sides = [_wrapped(label, room, face, label_size, 12) for label in grid.rows]
    side = max((math.ceil(_width(line, face, label_size)) for lines_ in sides for line in lines_), default=0)
    left = margin + (side + 2 * gap if side else 0)
    right = left + per_line * width + (per_line - 1) * gap
    texts: list[Text] = []
    top = margin
    for words, font_size, faint in ((grid.title, title_size, False), (grid.note, note_size, True)):
        if words:
            # A title may be wider than few small images.
            wrapped = _wrapped(words, max(right, 420) - margin, face, font_size, 4)
            box = _box(margin, top, wrapped, face, font_size)
            texts.append(Text(box, wrapped, font_size, faint))
            top = box[3] + (gap // 2 if not faint else gap)
    top += gap if texts else 0
    heads = [_wrapped(label, width, face, label_size, 6) for label in grid.columns]
    cells: list[tuple[int, int, Box]] = []
    for line in range(lines):
        chosen = range(line * per_line, min((line + 1) * per_line, count))
        head = max((len(heads[column]) for column in chosen), default=0) * _line_height(label_size)
        for place, column in enumerate(chosen):
            x = left + place * (width + gap)
            tall = len(heads[column]) * _line_height(label_size)
            # A label stands right above its images, however many lines the others have.
            box = _box(x, top + head - tall, heads[column], face, label_size)
            texts.append(Text(box, heads[column], label_size))
        y = top + head + (gap // 2 if head else 0)
        for row in range(len(grid.cells)):
            for place, column in enumerate(chosen):
                x = left + place * (width + gap)
                cells.append((row, column, (x, y, x + width, y + height)))
            if sides and sides[row]:
                tall = len(sides[row]) * _line_height(label_size)
                at = y + max(0, (height - tall) // 2)
                texts.append(Text(_box(margin, at, sides[row], face, label_size), sides[row], label_size))
            y += max(height, len(sides[row]) * _line_height(label_size) if sides else 0) + gap
        top = y + (gap if line < lines - 1 else 0)
    widest = max([right, *(text.box[2] for text in texts)])
    shown = tuple(text for text in texts if text.lines)
    return Layout((widest + margin, top - gap + margin), tuple(cells), shown, face)


def _box(left: int, top: int, lines: Sequence[str], face: str, size: int) -> Box:
    width = max((math.ceil(_width(line, face, size)) for line in lines), default=0)
    return left, top, left + width, top + len(lines) * _line_height(size)


def _line_height(size: int) -> int:
    return round(size * 1.32)


# Where a word that is too long for a line is best broken: after these.
_JOINTS = re.compile(r"(?<=[-_./:,;|)])(?=.)")


def _wrapped(text: str, room: int, face: str, size: int, most: int) -> tuple[str, ...]:
    """The text in lines no wider than `room`, at most `most` of them; what is cut off leaves an ellipsis."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for piece, spaced in _pieces(paragraph, room, face, size):
            joined = f"{line} {piece}" if spaced and line else line + piece
            if _width(joined, face, size) > room and line:
                lines.append(line)
                joined = piece
            line = joined
        if line:
            lines.append(line)
    if len(lines) > most:
        last = lines[most - 1]
        while last and _width(last + "…", face, size) > room:
            last = last[:-1]
        lines = [*lines[: most - 1], last.rstrip(" ,.") + "…"]
    return tuple(lines)


def _pieces(text: str, room: int, face: str, size: int) -> Iterator[tuple[str, bool]]:
    """What may not be broken, and whether a space stands before it: words, and parts of those that are too long."""
    for word in text.split():
        if _width(word, face, size) <= room:
            yield word, True
            continue
        for number, part in enumerate(_JOINTS.split(word)):
            rest, spaced = part, number == 0
            while _width(rest, face, size) > room and len(rest) > 1:
                fits = next((n for n in range(len(rest) - 1, 1, -1) if _width(rest[:n], face, size) <= room), 1)
                yield rest[:fits], spaced
                rest, spaced = rest[fits:], False
            yield rest, spaced


# ------------------------------------------------------------------------------------------------ drawing


@contextlib.contextmanager
def _opened(cell: Image | Path) -> Iterator[Image]:
    from PIL import Image as pillow

    if isinstance(cell, Path):
        with pillow.open(cell, formats=("PNG",)) as image:
            yield image
    else:
        yield cell


def _size(cell: Image | Path) -> tuple[int, int]:
    with _opened(cell) as image:
        return image.size


def _fitted(image: Image, room: tuple[int, int]) -> Image:
    """As large as the room allows: a whole number of times where it is enlarged, smooth where it is made smaller."""
    from PIL import Image as pillow

    image = image.convert("RGB")
    times = min(room[0] / image.width, room[1] / image.height)
    if times == 1:
        return image
    if times > 1:
        whole = int(times)
        return image.resize((image.width * whole, image.height * whole), pillow.Resampling.NEAREST)
    size = (max(1, round(image.width * times)), max(1, round(image.height * times)))
    return image.resize(size, pillow.Resampling.LANCZOS)


@functools.lru_cache(maxsize=64)
def _font(face: str, size: int) -> FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.truetype(face, size) if face else ImageFont.load_default(size)  # type: ignore[return-value]


def _dejavu() -> list[str]:
    """The file of DejaVu Sans, where matplotlib is installed."""
    found = importlib.util.find_spec("matplotlib")
    if found is None or found.origin is None:
        return []
    path = Path(found.origin).with_name("mpl-data") / "fonts" / "ttf" / "DejaVuSans.ttf"
    return [str(path)] if path.is_file() else []


def _width(text: str, face: str, size: int) -> float:
    return _font(face, size).getlength(text)


def _form(font: FreeTypeFont, letter: str) -> bytes:
    return bytes(font.getmask(letter))
