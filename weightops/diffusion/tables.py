"""Tables of numbers as values, their means, and their forms: CSV with every digit, Markdown, JSON. Knows no images."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.errors import MismatchError, OutputError, UsageError, printable
from weightops.files.writer import check_target, part_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

Cell = str | int | float | None

# What would be markup in Markdown; an underscore is, at the edge of a word.
_MARKUP = re.compile(r"[\\`*\[\]<|~&]|(?<![^\W_])_|_(?![^\W_])")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under their columns, and a note: what the numbers can and cannot say.

    decimals: of the numbers with a fraction where the table is drawn; the cells keep every digit.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    decimals: int = 3

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {number} has {len(row)} cells under {len(self.columns)} columns")

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Of each column: does it hold numbers, and nothing else where it holds anything?"""
        columns = [[row[n] for row in self.rows if row[n] is not None] for n in range(len(self.columns))]
        return tuple(bool(column) and not any(isinstance(c, str) for c in column) for column in columns)

    def drawn(self) -> list[list[str]]:
        """The cells as they are shown: rounded, harmless, nothing for None."""
        return [[self._drawn(cell) for cell in row] for row in self.rows]

    def _drawn(self, cell: Cell) -> str:
        if cell is None:
            return ""
        if isinstance(cell, str):
            return printable(cell)
        if isinstance(cell, int) or not math.isfinite(cell):
            return str(cell)
        rounded = f"{cell:.{self.decimals}f}"
        # A small number is drawn in another way, rather than as a zero that it is not.
        return rounded if float(rounded) or not cell else f"{cell:.{max(self.decimals, 1)}g}"

    def to_markdown(self) -> str:
        """As GitHub draws it: the title in bold, the table, the note; numbers to the right."""
        columns = [_escaped(printable(name)) for name in self.columns]
        lines = [columns, ["---:" if right else "---" for right in self.numeric]]
        lines += [[_escaped(cell) for cell in row] for row in self.drawn()]
        drawn = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        note = f"\n{_escaped(printable(self.note))}\n" if self.note else ""
        return f"**{_escaped(printable(self.title))}**\n\n{drawn}{note}"

    def to_csv(self, path: Path) -> None:
        """The columns' names and the rows, with every digit, in place of what `path` was. Raises OutputError."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([repr(float(cell)) if isinstance(cell, float) else cell for cell in row] for row in self.rows)
        # A file's name may hold bytes that are no text, as lone surrogates.
        write_whole(path, text.getvalue().encode("utf-8", "backslashreplace"))

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no number for infinity: that is the text "inf" there."""
        rows = [[str(c) if isinstance(c, float) and not math.isfinite(c) else c for c in row] for row in self.rows]
        return {"title": self.title, "columns": list(self.columns), "rows": rows, "note": self.note}


def measured(
    real: Sequence[Any],
    generated: Mapping[str, Sequence[Any]],
    metric: Callable[[Any, Any], float],
    *,
    title: str,
    names: Sequence[str],
    of: str,
    note: str = "",
) -> Table:
    """Each generated image against the real one of the same number, by `metric(real, generated)`, and the means.

    generated: rows of images by label (a step, a model); names: of the real images, one column each; of: what the
    labels are, the first column's name. Raises MismatchError for a row with more or fewer images than there are real.
    """
    if len(names) != len(real):
        raise ValueError(f"{len(names)} names for {len(real)} images")
    for label, images in generated.items():
        if len(images) != len(real):
            what = f"found {len(images):,} images, expected {len(real):,}: one for each real image"
            raise MismatchError(label, what)
    rows = {
        label: [metric(a, b) for a, b in zip(real, images, strict=True)] for label, images in generated.items()
    }  # fmt: skip
    return with_means(rows, title=title, names=names, of=of, note=note)


def with_means(
    rows: Mapping[str, Sequence[float]], *, title: str, names: Sequence[str], of: str, note: str = ""
) -> Table:
    """The numbers under `names`, labelled by the first column, `of`, with the mean of each row in the last."""
    if not rows or not names:
        raise UsageError(title, "found nothing to measure, expected at least one image in at least one row")
    cells: list[tuple[Cell, ...]] = []
    for label, values in rows.items():
        cells.append((label, *map(float, values), math.fsum(values) / len(values)))
    return Table(title, (of, *names, "mean"), tuple(cells), note)


def write_whole(path: Path, data: bytes) -> None:
    """Put `data` in the place of what `path` was, in one step: it is there whole, or not at all. Raises OutputError."""
    check_target(path, len(data), force=True, inputs=())
    part = part_name(path)
    try:
        part.write_bytes(data)
        os.replace(part, path)  # noqa: PTH105 - atomic, and says so
    except OSError as e:
        raise OutputError(str(path), f"cannot be written: {e.strerror or e}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _escaped(text: str) -> str:
    return _MARKUP.sub(lambda found: "\\" + found.group(), text)
