"""Captions of the images of a folder: read and written as metadata.csv, metadata.jsonl or .txt, and put together.

The table is the one that datasets' imagefolder reads: a column file_name, and one for the words.
"""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import re
import stat
import string
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.diffusion.pictures import METADATA
from weightops.errors import FormatError, OutputError, UsageError, listing, printable, quote
from weightops.files.writer import PART_SUFFIX, hidden_beside, part_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightops.diffusion.pictures import Picture

FILE_NAME = "file_name"
WORDS = ("caption", "text")  # the names of the column that holds them; the first that there is
SIDECARS = (".txt", ".caption")
PLACEHOLDERS = ("query", "caption")

_MAX_SIDECAR = 1 << 20  # bytes

_GAP = "\0"  # stands for what is left out; no clean text holds it
_ENCLOSED = re.compile(r"[(\[\"“]\s*\0\s*[)\]\"”]")
_JOINTS = re.compile(r"(?P<before>[\s,;:|-]*)\0[\s,;:|\0-]*")


@dataclass(slots=True)
class Table:
    """metadata.csv or metadata.jsonl, as it stands. rows: by the picture's name; column: which one holds the words."""

    path: Path
    columns: list[str] = field(default_factory=list)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    column: str = WORDS[0]


@dataclass(slots=True)
class Captions:
    """The captions that a folder has, by the picture's name. missing: pictures without one.

    beside, in_table: the same by where they stand; strangers: rows of the table whose file is not there.
    """

    table: Table
    texts: dict[str, str] = field(default_factory=dict)
    in_table: dict[str, str] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------ reading


def read_captions(folder: str | os.PathLike[str], pictures: Sequence[Picture]) -> Captions:
    """The captions of these pictures of `folder`: from its table, and where that says nothing from files beside them.

    Control characters and line breaks become spaces. Raises FormatError, which names the line.
    """
    root = Path(folder)
    found = Captions(_read_table(root))
    names = {p.name for p in pictures}
    for name, row in found.table.rows.items():
        if name in names:
            if text := clean(row.get(found.table.column) or ""):
                found.in_table[name] = text
        elif posixpath.isabs(name) or name.startswith("../") or not os.path.lexists(root / name):
            found.strangers.append(name)
    disagree = []
    for picture in pictures:
        words = {suffix: text for suffix in SIDECARS if (text := _read_beside(picture, suffix))}
        if SIDECARS[0] in words:
            found.beside[picture.name] = words[SIDECARS[0]]
        if picture.name in found.in_table:
            words = {"": found.in_table[picture.name], **words}
        if not words:
            found.missing.append(picture.name)
            continue
        found.texts[picture.name] = next(iter(words.values()))
        if len(set(words.values())) > 1:
            disagree.append(picture.name)
    source = found.table.path.name
    if disagree:
        other = _pictures(len(disagree), "has", "have")
        order = ", ".join((source, *SIDECARS))
        found.warnings.append(f"{other} different captions, of which the first of {order} counts: {listing(disagree)}")
    if found.strangers:
        other = "a file that is" if len(found.strangers) == 1 else f"{len(found.strangers):,} files that are"
        found.warnings.append(f"{source} names {other} not there, where imagefolder stops: {listing(found.strangers)}")
    deeper = sorted(p.relative_to(root).as_posix() for name in METADATA for p in root.glob(f"*/**/{name}"))
    if deeper:
        found.warnings.append(f"not read, for a table stands in the folder itself: {listing(deeper)}")
    return found


def clean(text: str) -> str:
    """One line of text: control characters, line breaks and runs of spaces become one space each."""
    kept = (" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)
    return " ".join("".join(c for c in kept if unicodedata.category(c) != "Cs" and c != "\ufeff").split())


def _pictures(count: int, one: str, more: str) -> str:
    return f"1 picture {one}" if count == 1 else f"{count:,} pictures {more}"


def _read_table(root: Path) -> Table:
    """The folder's table, or an empty metadata.csv. Raises FormatError where there are two."""
    there = [root / name for name in ("metadata.csv", "metadata.jsonl", "metadata.parquet") if (root / name).exists()]
    if len(there) > 1:
        names = " and ".join(path.name for path in there)
        raise FormatError(str(root), f"holds {names}, of which datasets reads one alone", "remove the other")
    path = there[0] if there else root / "metadata.csv"
    if path.suffix == ".parquet":
        hint = "save it as metadata.csv or metadata.jsonl, and move it away"
        raise FormatError(str(path), "captions in Parquet are not read here", hint)
    if not there:
        return Table(path, [FILE_NAME, WORDS[0]])
    text = _read_text(path)
    read = _csv_rows if path.suffix == ".csv" else _jsonl_rows
    table = Table(path)
    lines: dict[str, int] = {}
    for line, row in read(path, text, table.columns):
        given = row.get(FILE_NAME)
        if not isinstance(given, str) or not given:
            raise FormatError(str(path), f"line {line:,} has no {FILE_NAME}")
        name = posixpath.normpath(given)
        if "\0" in name:
            raise FormatError(str(path), f"line {line:,} names {quote(given)}, which no file can be called")
        if name in lines:
            raise FormatError(str(path), f"line {line:,} is about {quote(given)}, as line {lines[name]:,} is already")
        lines[name] = line
        table.rows[name] = row
    table.columns = table.columns or [FILE_NAME, WORDS[0]]
    table.column = next((word for word in WORDS if word in table.columns), WORDS[0])
    if table.column not in table.columns:
        table.columns.append(table.column)
    for name, row in table.rows.items():
        if not isinstance(row.get(table.column), str | None):
            kind = type(row[table.column]).__name__
            raise FormatError(str(path), f"line {lines[name]:,} has a JSON {kind} for {table.column}, expected text")
    return table


def _csv_rows(path: Path, text: str, columns: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """(line, row) of each; fills `columns`."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    found = []
    begin = 1
    try:
        for cells in reader:
            line, begin = begin, reader.line_num + 1
            if not cells:
                continue
            if not columns:
                columns += cells
                _check_columns(path, columns)
            elif len(cells) > len(columns):
                what = f"line {line:,} has {len(cells)} cells, expected {len(columns)} ({', '.join(columns)})"
                raise FormatError(str(path), printable(what[:200]), 'put a caption with commas in it between "quotes"')
            else:
                found.append((line, dict(zip(columns, cells, strict=False))))
    except csv.Error as e:
        raise FormatError(str(path), f"line {begin:,} is no line of a CSV file: {e}") from None
    return found


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    twice = [name for name, times in Counter(columns).items() if times > 1]
    if twice:
        raise FormatError(str(path), f"has two columns {quote(twice[0])}")
    if FILE_NAME not in columns:
        raise FormatError(
            str(path), f"has the columns {listing(columns)}, expected {FILE_NAME} and {WORDS[0]}",
            f"its first line is to read {FILE_NAME},{WORDS[0]}",
        )  # fmt: skip


def _jsonl_rows(path: Path, text: str, columns: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """(line, row) of each; fills `columns`."""
    found = []
    known: dict[str, None] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            said = e.msg if isinstance(e, json.JSONDecodeError) else "it cannot be read"
            raise FormatError(str(path), f"line {number:,} is no JSON: {said}") from None
        if not isinstance(row, dict):
            raise FormatError(str(path), f"line {number:,} is a JSON {type(row).__name__}, expected an object")
        known |= dict.fromkeys(row)
        found.append((number, row))
    columns += known
    return found


def _read_beside(picture: Picture, suffix: str) -> str:
    path = picture.path.with_suffix(suffix)
    try:
        info = path.stat()
    except OSError:
        return ""
    if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for ever
        return ""
    if info.st_size > _MAX_SIDECAR:
        raise FormatError(str(path), f"holds {info.st_size:,} bytes, expected a caption")
    return clean(_read_text(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise FormatError(str(path), f"is not UTF-8, at byte {e.start:,}", "save it as UTF-8") from None
    except OSError as e:
        raise FormatError(str(path), f"cannot be read: {e.strerror}") from None


# ------------------------------------------------------------------------------------------------ writing


def write_table(table: Table, texts: Mapping[str, str]) -> bool:
    """Put captions into the table and write it, whole or as it was, its rows by file name; what else it has is kept.

    False: it says all of it already, and nothing is written. Raises OutputError.
    """
    changed = False
    for name, text in texts.items():
        row = table.rows.setdefault(name, {FILE_NAME: name})
        if row.get(table.column) != text:
            row[table.column] = text
            changed = True
    if not changed:
        return False
    rows = [row for _, row in sorted(table.rows.items())]
    if table.path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, table.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = out.getvalue()
    _replace(table.path, text)
    return True


def write_beside(picture: Picture, text: str) -> Path:
    """Write the caption to the .txt file of its name, whole or not at all. Raises OutputError."""
    path = picture.path.with_suffix(SIDECARS[0])
    _replace(path, text + "\n")
    return path


def check_beside(pictures: Sequence[Picture]) -> None:
    """Refuse a.png and a.jpg, which would share a.txt. Raises UsageError."""
    bearers: dict[Path, str] = {}
    for picture in pictures:
        path = picture.path.with_suffix(SIDECARS[0])
        if path in bearers:
            what = f"{quote(bearers[path])} and {quote(picture.name)} would share {quote(path.name)}"
            raise UsageError("--write", what, "rename one of them, or write csv")
        bearers[path] = picture.name


def clear_leftovers(table: Table) -> None:
    """Remove what a killed run left half written beside the table."""
    for path in hidden_beside(table.path, PART_SUFFIX):
        path.unlink(missing_ok=True)


def _replace(path: Path, text: str) -> None:
    part = part_name(path)
    try:
        part.write_bytes(text.encode())
        part.replace(path)
    except UnicodeEncodeError as e:
        raise OutputError(str(path), f"cannot say {quote(text[e.start])} in UTF-8") from None
    except OSError as e:
        raise OutputError(str(path), f"cannot be written: {e.strerror or e}") from None
    finally:
        part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ words


def check_template(template: str, query: str | None) -> None:
    """Refuse, before any work, a template that cannot be filled or that would say nothing of an image: UsageError."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as e:
        raise UsageError("--template", f"cannot be read: {e}", "a brace of its own is written twice, {{") from None
    names = [name for _, name, _, _ in parts if name is not None]
    for _, name, spec, how in parts:
        if name is not None and (name not in PLACEHOLDERS or spec or how):
            shown = quote(name + (f"!{how}" if how else "") + (f":{spec}" if spec else ""))[1:-1]
            raise UsageError("--template", f"has the placeholder {{{shown}}}, expected {{query}} or {{caption}}")
    if "caption" not in names:
        raise UsageError("--template", "has no {caption}, so that all images would be captioned alike")
    if query is None and "query" in names:
        raise UsageError("--template", "asks for {query}, but no query is given", "give it with --query")
    if query is not None and "query" not in names:
        raise UsageError("--template", "has no {query}, which is given with --query")


def fold(template: str, query: str | None, caption: str, trigger: str | None = None) -> str:
    """The template with its placeholders filled, on one line; the trigger before it, unless it begins with that.

    A query that the caption says already, as whole words in any case, is left out with the joint beside it. A trigger
    that is said further on is moved to the front.
    """
    said, asked, word = clean(caption), clean(query or ""), clean(trigger or "")
    filled = {"caption": said, "query": "" if _find(asked, said) else asked}
    parts = string.Formatter().parse(template)
    text = _closed("".join(literal + ("" if name is None else filled[name] or _GAP) for literal, name, _, _ in parts))
    there = _find(word, text)
    if not word or (there and there.start() == 0):
        return text
    while there := _find(word, text):
        text = _closed(text[: there.start()] + _GAP + text[there.end() :])
    return f"{word}, {text}" if text else word


def _find(phrase: str, text: str) -> re.Match[str] | None:
    """Where the text says these words, one after the other, whatever stands between them; nothing is nowhere."""
    words = re.findall(r"\w+", phrase)
    if not words:
        return re.search(re.escape(phrase), text) if phrase else None
    said = r"\W+".join(map(re.escape, words))
    return re.search(rf"(?<!\w){said}(?!\w)", text, re.IGNORECASE)


def _closed(text: str) -> str:
    """The text without its gaps, and without what joined them to the rest; the joint before a gap stays for both."""
    text = _ENCLOSED.sub(_GAP, text)
    return clean(_JOINTS.sub(_joint, text))


def _joint(found: re.Match[str]) -> str:
    at_end = found.end() == len(found.string) or found.string[found.end()] in ".!?"
    if found.start() == 0 or at_end:
        return ""
    return found["before"].rstrip() + " "
