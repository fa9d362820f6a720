"""Generated images as rows to be measured: what `generate` wrote, with its grids and prompts, or any folder of images.

Knows no models and measures nothing.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.diffusion.axes import stem_of
from weightops.diffusion.image_folder import LIST
from weightops.diffusion.pictures import find_pictures
from weightops.errors import FormatError, UsageError, listing, printable, quote

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightops.diffusion.pictures import Picture

_STEPS = re.compile(r"(?:step )?(?P<step>[0-9]{1,9})(?: \(base\))?")
_ENDS_IN_A_NUMBER = re.compile(r"(?P<name>.*?)(?P<step>[0-9]{1,9})")
_NO_STEPS = re.compile(r"(?:^|[^a-z])(?:v|version|seed|run)[ _.-]*$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Generated:
    """Images of one row of a table. prompts: of each image, where its folder says them. step: of a training."""

    label: str
    folder: str
    pictures: tuple[Picture, ...]
    prompts: tuple[str, ...] = ()
    step: int | None = None


def generated_of(folders: Sequence[str], warnings: list[str]) -> list[Generated]:
    """The rows of all folders, in their order; a grid's columns are rows each. Raises UsageError, FormatError."""
    found: list[Generated] = []
    for folder in folders:
        looked = find_pictures(folder)
        if looked.broken:
            names = listing(name for name, _ in looked.broken)
            warnings.append(f"{printable(folder)}: images that are broken are left out: {names}")
        document = _listed(folder, warnings)
        if document is None:
            name = stem_of(str(Path(folder).resolve()))
            found.append(Generated(name, folder, tuple(looked.pictures)))
        else:
            found += _rows(folder, document, {p.name: p for p in looked.pictures})
    labels = Counter(one.label for one in found)
    found = [
        replace(one, label=f"{stem_of(str(Path(one.folder).resolve()))} {one.label}") if labels[one.label] > 1 else one
        for one in found
    ]
    for label, count in Counter(one.label for one in found).items():
        if count > 1:
            raise UsageError("--generated", f"found {quote(label)} twice", "give the folders other names")
    return _with_steps(found)


def _listed(folder: str, warnings: list[str]) -> dict[str, Any] | None:
    """The list that `generate` writes beside its images, if it is there."""
    path = Path(folder) / LIST
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("command") != "generate":
            return None
        if not isinstance(document["images"], list) or not document["images"]:
            raise TypeError
        for row in document["images"]:
            if not all(isinstance(row[name], str) for name in ("file", "prompt")):
                raise TypeError
        grid = document.get("grid")
        if grid is not None:
            for name in ("columns", "rows"):
                if not all(isinstance(label, str) for label in grid[name]):
                    raise TypeError
            if not all({row["row"], row["column"]} <= {*grid["rows"], *grid["columns"]} for row in document["images"]):
                raise KeyError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        hint = "remove it, and the folder's images are taken as they are"
        raise FormatError(str(path), "is not the list that weightops generate writes", hint) from None
    if not document.get("finished", True):
        warnings.append(f"{printable(folder)}: the run that made these images was stopped before its end")
    return dict(document)


def _rows(folder: str, document: Mapping[str, Any], pictures: Mapping[str, Picture]) -> list[Generated]:
    """A row of all images; of a grid one for each column, or of one over prompts for each row."""
    images = document["images"]
    missing = [row["file"] for row in images if row["file"] not in pictures]
    if missing:
        raise FormatError(f"{folder}/{LIST}", f"names images that are not there, or are broken: {listing(missing)}")
    grid = document.get("grid")
    if grid is None:
        groups = {stem_of(str(Path(folder).resolve())): images}
    else:
        # Of the two labels of an image one says what it is made of, and the other which real image it is like.
        which = "row" if grid["over"] == "prompt" else "column"
        groups = {label: [row for row in images if row[which] == label] for label in grid[f"{which}s"]}
    of_steps = grid is not None and grid["over"] == "step"
    return [
        Generated(
            " ".join(label.split()), folder, tuple(pictures[row["file"]] for row in rows),
            tuple(row["prompt"] for row in rows), _said_step(label) if of_steps else None,
        )
        for label, rows in groups.items() if rows
    ]  # fmt: skip


def _said_step(label: str) -> int | None:
    match = _STEPS.fullmatch(label)
    return None if match is None else int(match["step"])


def _with_steps(rows: list[Generated]) -> list[Generated]:
    """Folders that are called alike but for a number at the end are steps, and stand in their order."""
    found = [_ENDS_IN_A_NUMBER.fullmatch(row.label) for row in rows]
    names = {match["name"] for match in found if match is not None}
    if len(rows) < 2 or None in found or len(names) != 1 or len({row.folder for row in rows}) < len(rows):
        return rows  # several rows of one folder are a grid's, which says what they are
    if _NO_STEPS.search(names.pop()):
        return rows
    numbered = [replace(row, step=int(match["step"])) for row, match in zip(rows, found, strict=True) if match]
    return sorted(numbered, key=lambda row: row.step or 0)


def hash_of(pictures: Sequence[Picture]) -> str:
    """Of the names and bytes of images, wherever they lie."""
    import xxhash

    hashed = xxhash.xxh3_128()
    for name, digest in sorted((p.name, p.digest) for p in pictures):
        data = name.encode()
        hashed.update(len(data).to_bytes(8, "little") + data + bytes.fromhex(digest))
    return f"xxh3_128:{hashed.hexdigest()}"
