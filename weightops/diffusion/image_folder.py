"""A folder of images, filled one by one: names, what an earlier run left there, and images.json at the end.

Every file appears whole or not at all. Nothing in the folder that an earlier run did not list there is ever touched.
"""

from __future__ import annotations

import contextlib
import json
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion.axes import stem_of
from weightops.errors import OutputError, UsageError, quote
from weightops.files.folder import replace_small
from weightops.files.writer import check_target

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from weightops.diffusion.axes import Shot, Shots

LIST = "images.json"
GRID = "grid.png"

_OTHERS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_MADE = re.compile(r"[0-9]{4}-[a-z0-9-]{1,120}\.png")


@dataclass(slots=True)
class ImageFolder:
    """Where images go, and what is there so far. names: of all images; rows: of those that are written, by number.

    single: one file is written, and no list beside it. old: what an earlier run has listed there. made: is it new?
    """

    folder: Path
    names: Sequence[str]
    shots: Shots
    single: bool
    versions: dict[str, str] = field(default_factory=dict)
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    old: frozenset[str] = frozenset()
    nbytes: int = 0
    made: bool = False

    def begin(self) -> None:
        """Make the folder, and see what an earlier run has left in it. Raises OutputError."""
        if self.single:
            return
        try:
            self.folder.mkdir()
            self.made = True
        except FileExistsError:
            pass
        except OSError as e:
            raise OutputError(str(self.folder), f"cannot be made: {e.strerror}") from None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            listed = json.loads((self.folder / LIST).read_text(encoding="utf-8"))
            names = {str(row["file"]) for row in listed["images"]}
            self.old = frozenset(name for name in names if _MADE.fullmatch(name)) | {GRID}

    def put(self, name: str, data: bytes) -> None:
        replace_small(self.folder / name, data)
        self.nbytes += len(data)

    def add(self, number: int, row: dict[str, Any], data: bytes) -> None:
        """Write an image, and remember its row."""
        self.put(self.names[number], data)
        self.rows[number] = {"file": self.names[number], **row, **place_of(self.shots, self.shots.shots[number])}

    def finish(self) -> None:
        """List what was made; what an earlier run made and this one did not, goes."""
        if self.single:
            return
        self._list(finished=True)
        made = {*self.names, *([GRID] if self.shots.over is not None else [])}
        for name in sorted(self.old - made):
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()

    def left(self) -> str:
        """List what there is when a run ends before its time, and say it."""
        if self.single or not self.rows:
            if self.made:
                with contextlib.suppress(OSError):
                    self.folder.rmdir()
            return "no image was made, and no input was changed"
        with contextlib.suppress(OutputError):
            self._list(finished=False)
        grid = "" if self.shots.over is None else ", without a grid"
        return f"{len(self.rows):,} of {len(self.shots.shots):,} images are whole in {quote(str(self.folder))}{grid}"

    def _list(self, *, finished: bool) -> None:
        """The same bytes for the same images."""
        document = {
            "command": "generate", "version": __version__, "finished": finished,
            "images": [self.rows[number] for number in sorted(self.rows)], "grid": grid_of(self.shots),
            "versions": self.versions,
        }  # fmt: skip
        self.put(LIST, (json.dumps(document, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode())


def target_of(output: str | os.PathLike[str] | None, shots: Shots) -> tuple[Path, bool]:
    """Where to write, and whether that is one file. Raises UsageError for a name that does not fit."""
    one = len(shots.shots) == 1 and shots.over is None
    if output is None:
        first = shots.shots[0]
        stem = f"{slug(stem_of(first.model), 60)}-{slug(first.prompt.prompt, 60)}"
        return (Path(f"{stem}-{first.seed}.png"), True) if one else (Path(stem), False)
    target = Path(output)
    if target.suffix.lower() in _OTHERS:
        raise UsageError(str(target), "images are written as PNG, which carries how they were made", "name it .png")
    if target.suffix.lower() == ".png" and not one:
        more = " and a grid" if shots.over is not None else ""
        raise UsageError(
            str(target), f"names one image, but {len(shots.shots):,}{more} are to be made", "name a folder"
        )
    return target, target.suffix.lower() == ".png"


def check_place(target: Path, *, single: bool, force: bool) -> None:
    """Refuse a place that cannot be written to, or where something is, but for --force. Raises OutputError."""
    empty = False
    with contextlib.suppress(OSError):
        empty = not single and target.is_dir() and not any(target.iterdir())
    check_target(target, 0, force=force or empty, inputs=(), folder=not single)


def names_in(shots: Shots) -> list[str]:
    """0001-a-cat.png; in a grid what its column says stands first."""
    found = []
    for number, shot in enumerate(shots.shots, 1):
        head = "" if shots.over in (None, "prompt") else f"{slug(shots.columns[shot.column], 40)}-"
        found.append(f"{number:04}-{head}{slug(shot.prompt.prompt, 50)}.png")
    return found


def slug(text: str, most: int) -> str:
    """The letters and digits of ASCII in a text, for a name; "image" where there are none."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:most].strip("-") or "image"


def place_of(shots: Shots, shot: Shot) -> dict[str, Any]:
    """Where in the grid an image is, by its labels."""
    return {} if shots.over is None else {"row": shots.rows[shot.row], "column": shots.columns[shot.column]}


def grid_of(shots: Shots) -> dict[str, Any] | None:
    """What images.json says of the grid."""
    if shots.over is None:
        return None
    return {"file": GRID, "over": shots.over, "columns": list(shots.columns), "rows": list(shots.rows)}
