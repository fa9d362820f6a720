"""What each LoRA is of, in numbers: read from a table or made of images, matched to LoRAs by name, asked for."""

from __future__ import annotations

import csv
import io
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from weightops.diffusion.axes import stem_of
from weightops.diffusion.extras import need
from weightops.diffusion.pictures import SUFFIXES, find_pictures, open_picture
from weightops.errors import FormatError, MismatchError, UsageError, ValueRefused, listing, quote
from weightops.synthesis.embedders import Embedder, digest_of, embedder_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

TABLES = (".csv", ".npz")
_EXPECTED = "expected a line of names, and below it a LoRA's name and its numbers on each line: name,hue,size"


class Conditioned(Protocol):
    """A space, or what was learnt of one: the names of its conditions' numbers, and what made them."""

    @property
    def label(self) -> str: ...
    @property
    def condition_names(self) -> tuple[str, ...]: ...
    @property
    def condition_source(self) -> Mapping[str, Any] | None: ...


@dataclass(frozen=True, slots=True)
class Conditions:
    """rows: a LoRA's name -> its numbers [c], float64; names: of the numbers; source: what they were made of.

    strangers: names that were met and are of no LoRA.
    """

    label: str
    names: tuple[str, ...]
    rows: Mapping[str, np.ndarray]
    source: Mapping[str, Any] = field(default_factory=dict)
    strangers: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------ tables


def read_conditions(path: str | os.PathLike[str]) -> Conditions:
    """A CSV file (a header, then a LoRA's name or file and its numbers), or an NPZ file (`names`, `conditions`).

    An NPZ file may name its columns in `columns`. Raises UsageError, FormatError with the line, ValueRefused.
    """
    label, place = os.fspath(path), Path(path)
    if not place.is_file():
        raise UsageError(label, "no such file")
    if place.suffix.lower() not in TABLES:
        raise UsageError(label, "expected a .csv or .npz file of conditions")
    try:
        data = place.read_bytes()
    except OSError as e:
        raise UsageError(label, f"cannot be read: {e.strerror or e}") from None
    names, rows = _of_csv(data, label) if place.suffix.lower() == ".csv" else _of_npz(data, label)
    source = {"kind": place.suffix.lower()[1:], "name": place.name, "digest": digest_of([place])}
    return Conditions(label, names, rows, source)


def _of_csv(data: bytes, label: str) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    import numpy as np

    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FormatError(label, "is no text in UTF-8", _EXPECTED) from None
    first = text.partition("\n")[0]
    delimiter = next((mark for mark in (",", ";", "\t") if mark in first), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    rows: dict[str, np.ndarray] = {}
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = _header([cell.strip() for cell in cells], label)
                continue
            if len(cells) != len(header):
                what = f"line {reader.line_num} has {len(cells)} cells, expected {len(header)}, as the first line has"
                raise FormatError(label, what)
            name = stem_of(cells[0].strip())
            where = f"line {reader.line_num}"
            if name in rows:
                raise FormatError(label, f"{where} is a second row for {quote(name)}")
            pairs = zip(header[1:], cells[1:], strict=True)
            rows[name] = np.array([_number(cell, label, f"{where}, {column}") for column, cell in pairs])
    except csv.Error as e:
        raise FormatError(label, f"line {reader.line_num} is no CSV: {e}") from None
    if not rows:
        raise FormatError(label, "holds no rows", _EXPECTED)
    return tuple(header[1:]), rows


def _header(cells: list[str], label: str) -> list[str]:
    if len(cells) < 2:
        raise FormatError(label, f"its first line is {quote(','.join(cells))}, with no numbers to name", _EXPECTED)
    if any(_is_number(cell) for cell in cells[1:]):
        raise FormatError(label, f"its first line holds numbers: {quote(','.join(cells))}", _EXPECTED)
    twice = [name for n, name in enumerate(cells[1:]) if name in cells[1:][:n] or not name]
    if twice:
        raise FormatError(label, f"its first line names a column {quote(twice[0])}, expected a name for each")
    return cells


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(cell: str, label: str, where: str) -> float:
    try:
        found = float(cell)
    except ValueError:
        raise FormatError(label, f"{where}: found {quote(cell)}, expected a number") from None
    if not math.isfinite(found):
        raise ValueRefused(label, f"{where}: found {quote(cell.strip())}, expected a finite number")
    return found


def _of_npz(data: bytes, label: str) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    import numpy as np

    expected = "expected the arrays `names` [n] of text and `conditions` [n, c] of numbers"
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            found = {key: np.asarray(file[key]) for key in ("names", "conditions", "columns") if key in file.files}
    except Exception as e:  # of what is no archive numpy raises everything
        raise FormatError(label, f"cannot be read: {quote(' '.join(str(e).split()))}", expected) from None
    names, values = found.get("names"), found.get("conditions")
    if names is None or values is None:
        raise FormatError(label, f"holds {listing(found) or 'no arrays of these names'}", expected)
    if names.ndim != 1 or names.dtype.kind != "U" or values.ndim != 2 or values.dtype.kind not in "fiu":
        raise FormatError(label, f"names {names.dtype} {list(names.shape)}, conditions {values.dtype} "
                          f"{list(values.shape)}", expected)  # fmt: skip
    if len(names) != len(values) or not values.size:
        raise FormatError(label, f"has {len(names):,} names and conditions of {list(values.shape)}", expected)
    wide = values.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(wide).all(1))
    if len(bad):
        raise ValueRefused(label, f"the row of {quote(str(names[bad[0]]))} holds NaN or Inf")
    columns = found.get("columns")
    named = tuple(f"c{n}" for n in range(1, wide.shape[1] + 1)) if columns is None else tuple(map(str, columns.ravel()))
    if len(named) != wide.shape[1] or len(set(named)) != len(named):
        raise FormatError(label, f"names {len(set(named)):,} columns, and has {wide.shape[1]:,}")
    rows: dict[str, np.ndarray] = {}
    for name, row in zip(map(stem_of, map(str, names)), wide, strict=True):
        if name in rows:
            raise FormatError(label, f"has a second row for {quote(name)}")
        rows[name] = row
    return named, rows


# ------------------------------------------------------------------------------------------------ images


def of_images(
    folder: str | os.PathLike[str], embedder: str | os.PathLike[str] | Embedder, names: Sequence[str]
) -> Conditions:
    """What an embedder makes of the images of each LoRA: `folder` has an image, or a folder of them, of its name.

    Of several images of one LoRA the mean counts. Raises UsageError, FormatError; what is lacking, `for_members` says.
    """
    made = embedder if isinstance(embedder, Embedder) else embedder_of(os.fspath(embedder))
    label, root = os.fspath(folder), Path(folder)
    if not root.is_dir():
        raise UsageError(label, "no such folder", "it holds an image, or a folder of images, with each LoRA's name")
    there: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or not (path.is_dir() or path.suffix.lower() in SUFFIXES):
            continue
        name = path.name if path.is_dir() else path.stem
        if name in there:
            raise FormatError(label, f"{quote(there[name].name)} and {quote(path.name)} are both of {quote(name)}")
        there[name] = path
    rows = {name: _of_pictures(there[name], made) for name in names if name in there}
    known = set(names)
    return Conditions(label, made.names, rows, _source_of(made), tuple(n for n in there if n not in known))


def _source_of(embedder: Embedder) -> dict[str, Any]:
    """Where the embedder is, so that images can be asked for later, and by what it is known there."""
    label = embedder.label
    path = label if label.startswith("hf://") else str(Path(label).absolute())
    return {"kind": "images", "embedder": path, "name": stem_of(label), "digest": embedder.digest, "of": embedder.kind}


def _of_pictures(path: Path, embedder: Embedder) -> np.ndarray:
    if not path.is_dir():
        return embedder.mean([open_picture(path)])
    return embedder.mean([open_picture(picture.path) for picture in find_pictures(path).pictures])


# ------------------------------------------------------------------------------------------------ LoRAs by name


def for_members(conditions: Conditions, names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """The numbers [n, c] of these LoRAs, in their order, and warnings. Raises MismatchError for one that has none."""
    import numpy as np

    lacking = [name for name in names if name not in conditions.rows]
    if lacking:
        what = f"says nothing of {len(lacking):,} of {len(names):,} LoRAs: {listing(lacking)}"
        raise MismatchError(conditions.label, what, "each LoRA needs its numbers, under its file's name")
    known = set(names)
    strange = [*(name for name in conditions.rows if name not in known), *conditions.strangers]
    warnings = []
    if strange:
        warnings.append(f"{conditions.label}: {len(strange):,} are of no LoRA that is collected: {listing(strange)}")
    return np.stack([conditions.rows[name] for name in names]), warnings


# ------------------------------------------------------------------------------------------------ asked for


def condition_of(
    words: str, of: Conditioned, *, embedder: str | os.PathLike[str] | None = None
) -> list[tuple[str, np.ndarray]]:
    """The conditions [c] that are asked for, each with a label: numbers, a CSV or NPZ file, an image or several.

    embedder: what makes numbers of images; None: what made the space's conditions. Of a folder the mean counts.
    Raises UsageError, also for another number of numbers than the space's conditions have.
    """
    if not of.condition_names:
        hint = "collect it with --conditions FILE, or --images DIR --embedder FILE, and fit it again"
        raise UsageError("--condition", f"{of.label} has no conditions to ask for", hint)
    path = Path(words)
    if path.suffix.lower() in TABLES:
        return _asked_in_table(read_conditions(words), of)
    # pathlib's own raises for numbers that are too many for a name.
    if words.strip() and (os.path.isdir(words) or path.suffix.lower() in SUFFIXES):  # noqa: PTH112
        if not path.exists():
            raise UsageError(words, "no such file")
        made = embedder_of(os.fspath(embedder)) if embedder is not None else _own_embedder(of)
        renamed = made.kind == "linear" and made.names != tuple(of.condition_names)
        if made.size != len(of.condition_names) or renamed:
            raise MismatchError(made.label, f"makes {_named(made.names)}, expected {_named(of.condition_names)}")
        return [(path.stem if path.is_file() else path.name, _of_pictures(path, made))]
    return [("condition", _typed(words, of))]


def _typed(words: str, of: Conditioned) -> np.ndarray:
    import numpy as np

    cells = [cell for cell in words.replace(",", " ").split() if cell]
    try:
        found = np.array([float(cell) for cell in cells])
    except ValueError:
        hint = "numbers are separated by commas; a table ends in .csv or .npz"
        raise UsageError("--condition", f"found {quote(words)}, expected numbers, a file or a folder", hint) from None
    if len(found) != len(of.condition_names):
        expected = f"expected {_named(of.condition_names)}"
        raise UsageError("--condition", f"found {len(found):,} numbers, {expected}")
    if not np.isfinite(found).all():
        raise UsageError("--condition", f"found {quote(words)}, expected finite numbers")
    return found


def _asked_in_table(found: Conditions, of: Conditioned) -> list[tuple[str, np.ndarray]]:
    if set(found.names) != set(of.condition_names):
        raise MismatchError(found.label, f"has {_named(found.names)}, expected {_named(of.condition_names)}")
    order = [found.names.index(name) for name in of.condition_names]
    return [(name, row[order]) for name, row in found.rows.items()]


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:7])
    return f"{len(names):,} number{'s' * (len(names) != 1)} ({shown}{', …' * (len(names) > 7)})"


def _own_embedder(of: Conditioned) -> Embedder:
    """The one that made the space's conditions. Raises UsageError where there was none, MismatchError for another."""
    need("--condition", "PIL", extra="synthesis")
    source = of.condition_source or {}
    path = source.get("embedder")
    if source.get("kind") != "images":
        what = f"the conditions of {of.label} are from {quote(source.get('name', 'a table'))}, and not made of images"
        raise UsageError("--condition", what, "--embedder FILE names what makes these numbers of an image")
    if not isinstance(path, str):
        what = f"{of.label} says that the embedder {quote(source.get('name'))} made its conditions, and not where it is"
        raise UsageError("--condition", what, "--embedder FILE says where it is, or --space DIR, whose space knows it")
    if not path.startswith("hf://") and not Path(path).exists():
        what = f"the embedder {quote(source.get('name'))} is no longer where it was"
        raise UsageError("--condition", what, "--embedder FILE says where it is")
    made = embedder_of(path)
    if made.digest != source.get("digest"):
        what = f"has changed since it made the conditions of {of.label}: found {made.digest}"
        raise MismatchError(path, f"{what}, expected {source.get('digest')}")
    return made
