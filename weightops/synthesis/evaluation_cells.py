"""The small pieces of an evaluation: each measured once, kept by what it was made of, gathered into tables over seeds.

Knows no LoRA: a piece is a row of a table, a seed, and something to call.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion.tables import Table, write_whole
from weightops.errors import Interrupted, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from weightops.diffusion.tables import Cell as Value

    # How many of how many are done, and what is at work.
    Told = Callable[[int, int, str], None]

FOLDER = "cells"
_FORMAT = 1  # of what is measured: another number, and nothing that was kept before is taken

Row = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """part, row: of which table, and which row there; made_of: whatever else decides about what `measure` finds."""

    part: str
    row: Row
    seed: int
    made_of: Mapping[str, Any]
    measure: Callable[[], Mapping[str, Any]] = field(compare=False)

    def key(self, common: Mapping[str, Any]) -> str:
        said = [_FORMAT, __version__, dict(common), self.part, self.row, self.seed, dict(self.made_of)]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


class Cells:
    """Results, and those of an evaluation that was broken off. common: what decides about all of them."""

    def __init__(self, folder: Path, common: Mapping[str, Any]) -> None:
        """Raises OutputError."""
        self._folder = folder / FOLDER
        self._common = common
        self._found: dict[tuple[str, Row, int], Mapping[str, Any]] = {}
        self.taken = 0  # that were measured before
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise OutputError(str(self._folder), f"cannot be made: {e.strerror or e}") from None

    def measure(self, cells: Iterable[Cell], told: Told) -> None:
        """Measure what was not measured yet; what is found is kept at once. Raises WeightopsError, Interrupted."""
        cells = list(cells)
        for done, cell in enumerate(cells):
            told(done, len(cells), f"{cell.part}: {', '.join(filter(None, cell.row))}, seed {cell.seed}")
            try:
                self._found[cell.part, cell.row, cell.seed] = self._measured(cell)
            except (Interrupted, KeyboardInterrupt):
                what = f"interrupted after {done:,} of {len(cells):,} pieces, which are kept in {self._folder.parent}"
                raise Interrupted("synth evaluate", what, "the same command goes on from there") from None
        told(len(cells), len(cells), "done")

    def _measured(self, cell: Cell) -> Mapping[str, Any]:
        path = self._folder / f"{cell.key(self._common)}.json"
        found = _read(path)
        if found is None:
            found = dict(cell.measure())
            write_whole(path, json.dumps(found, sort_keys=True).encode())
        else:
            self.taken += 1
        return found

    def rows(self, part: str) -> list[Row]:
        """The rows of a part, in the order in which they were first met."""
        return list(dict.fromkeys(row for of, row, _ in self._found if of == part))

    def values(self, part: str, row: Row, name: str) -> list[float]:
        """What each seed found of a row under this name, where it found anything."""
        found = [result.get(name) for of, at, result in self._of(part) if at == row]
        return [float(value) for value in found if value is not None]

    def lists(self, part: str, row: Row, name: str) -> list[list[Any]]:
        """The same of what is a list."""
        return [list(result[name]) for _, at, result in self._of(part) if at == row and name in result]

    def _of(self, part: str) -> Iterator[tuple[str, Row, Mapping[str, Any]]]:
        for (of, row, _), result in self._found.items():
            if of == part:
                yield of, row, result


def _read(path: Path) -> dict[str, Any] | None:
    """What was kept; None of what cannot be read, which is then measured anew."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else None
    return None


# ------------------------------------------------------------------------------------------------ over the seeds


@dataclass(frozen=True, slots=True)
class Measured:
    """A column: the name under which cells have it, how it is headed, and whether its spread stands beside it."""

    name: str
    head: str
    spread: bool = True
    percent: bool = False


def mean_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean over the seeds and the standard deviation; None of nothing, and None for the spread of one."""
    if not values:
        return None, None
    if not all(math.isfinite(value) for value in values):
        return math.nan, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def spread_table(
    cells: Cells, part: str, *, title: str, heads: Sequence[str], columns: Sequence[Measured], note: str = "",
    rows: Sequence[Row] | None = None, decimals: int = 3,
) -> Table:  # fmt: skip
    """A row for each of the part's (or of `rows`): its words under `heads`, and of each column mean and spread.

    A column in which no row has anything is left out.
    """
    kept = [row for row in cells.rows(part) if rows is None or row in rows]
    names: list[str] = list(heads)
    lines: list[list[Value]] = [[*row] for row in kept]
    for column in columns:
        found = [mean_and_spread(cells.values(part, row, column.name)) for row in kept]
        factor = 100.0 if column.percent else 1.0
        for name, place in ((column.head, 0), (f"± {column.head}", 1))[: 1 + column.spread]:
            values = [pair[place] for pair in found]
            if any(value is not None for value in values):
                names.append(name)
                for line, value in zip(lines, values, strict=True):
                    line.append(None if value is None else value * factor)
    return Table(title, tuple(names), tuple(map(tuple, lines)), note, decimals)


def seeds_said(count: int) -> str:
    """What ± is."""
    if count < 2:
        return "One seed: no spread is known, and a small difference may be chance."
    return (
        f"± is the standard deviation over {count} seeds, each with its own split, fits and draws; the splits overlap, "
        "so that it understates what other LoRAs would show."
    )
