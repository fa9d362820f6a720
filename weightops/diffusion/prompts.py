"""Prompts, as the command line says them or a file lists them: one value for each, what is not said filled in later.

    prompts.txt     a prompt in each line; empty lines, and lines that begin with #, are none
    prompts.csv     columns with names in the first line
    prompts.jsonl   an object in each line
    prompts.yaml    a list of prompts, or of keys with values

The columns are those of FIELDS; only `prompt` must be there. Every mistake is named with its line.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.errors import UsageError, quote
from weightops.ops.yaml_lines import nearest, read_yaml, refused

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

Size = tuple[int, int]  # width, height

SUFFIXES = (".txt", ".csv", ".jsonl", ".yaml", ".yml")
FIELDS = ("prompt", "prompt_2", "negative", "negative_2", "seed", "steps", "guidance", "size", "images")

MAX_SEED = 2**63 - 1
MAX_STEPS = 1_000
MAX_IMAGES = 1_000  # of one prompt
MAX_SIDE = 8_192

_MAX_BYTES = 16 << 20
_SIZE = re.compile(r"([0-9]{1,5})[x×X]([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, and how its images are made. None: as the pipeline has it.

    prompt_2, negative_2: for the second text encoder, where there are several. seed: of the first image, and one more
    for each that follows. images: how many there are of it. said: the fields that its own line in a file says.
    """

    prompt: str
    prompt_2: str | None = None
    negative: str | None = None
    negative_2: str | None = None
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    size: Size | None = None
    images: int = 1
    said: frozenset[str] = frozenset()


def parse_size(word: str | Size, where: str = "--size") -> Size:
    """WIDTHxHEIGHT, or WIDTH for a square. Raises UsageError."""
    if isinstance(word, tuple):
        width, height = word
    else:
        match = _SIZE.fullmatch(word.strip()) or _SIZE.fullmatch(f"{word.strip()}x{word.strip()}")
        width, height = (int(match[1]), int(match[2])) if match is not None else (0, 0)
    if not (8 <= width <= MAX_SIDE and 8 <= height <= MAX_SIDE):
        raise UsageError(where, f"found {quote(word)}, expected pixels as 512x768, each side 8 to {MAX_SIDE:,}")
    return width, height


def checked(prompt: Prompt, where: dict[str, str]) -> Prompt:
    """The prompt again, its numbers within their bounds. where: what begins an error, by field. Raises UsageError."""
    bounds: tuple[tuple[str, float | None, float, float], ...] = (
        ("seed", prompt.seed, 0, MAX_SEED - prompt.images),
        ("steps", prompt.steps, 1, MAX_STEPS),
        ("guidance", prompt.guidance, 0, 100),
        ("images", prompt.images, 1, MAX_IMAGES),
    )
    for name, value, least, most in bounds:
        if value is not None and not least <= value <= most:
            found = f"{value:,}" if isinstance(value, int) else f"{value:g}"
            raise UsageError(where[name], f"found {found}, expected {least:,} to {most:,}")
    return prompt


def read_prompts(path: str | os.PathLike[str], like: Prompt) -> list[Prompt]:
    """The prompts that a file lists; `like` says what they do not. Raises UsageError, with the line."""
    label = str(path)
    kind = Path(path).suffix.lower()
    if kind not in SUFFIXES:
        raise UsageError(label, f"expected prompts in a file that ends in {', '.join(SUFFIXES)}")
    text = _text(Path(path), label)
    if kind == ".txt":
        rows: Iterator[tuple[int, dict[str, Any]]] = _lines(text)
    elif kind == ".csv":
        rows = _csv(text, label)
    elif kind == ".jsonl":
        rows = _jsonl(text, label)
    else:
        rows = _yaml(text, label)
    found = [_prompt(label, line, row, like) for line, row in rows]
    if not found:
        raise UsageError(label, "holds no prompt")
    return found


def _text(path: Path, label: str) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(label, f"takes {path.stat().st_size:,} bytes, expected at most {_MAX_BYTES:,}")
        return path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UsageError(label, f"cannot be read: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UsageError(label, f"is no UTF-8 text: byte {e.start:,} is {e.object[e.start]:#04x}") from None


def _lines(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            yield number, {"prompt": line.strip()}


def _csv(text: str, label: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not names:
                names = [cell.strip() for cell in cells]
                _check_names(names, label, reader.line_num)
                continue
            if len(cells) != len(names):
                what = f"found {len(cells)} cells, expected {len(names)}: {', '.join(names)}"
                raise refused(label, reader.line_num, what, "a prompt with commas stands in quotes")
            yield reader.line_num, {name: cell for name, cell in zip(names, cells, strict=True) if cell.strip()}
    except csv.Error as e:
        raise refused(label, reader.line_num, f"cannot be read as CSV: {e}") from None


def _jsonl(text: str, label: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            reason = e.msg if isinstance(e, json.JSONDecodeError) else "nested too deep"
            raise refused(label, number, f"cannot be read as JSON: {reason}") from None
        if not isinstance(row, dict):
            raise refused(label, number, f"found {quote(row, 60)}, expected an object with a prompt")
        _check_names(list(row), label, number)
        yield number, {name: value for name, value in row.items() if value is not None}


def _yaml(text: str, label: str) -> Iterator[tuple[int, dict[str, Any]]]:
    root = read_yaml(text, label)
    if not isinstance(root.value, tuple):
        raise refused(label, root.line, f"found {root.shown}, expected a list of prompts")
    for entry in root.value:
        if isinstance(entry.value, dict):
            _check_names(list(entry.value), label, entry.line)
            values = {name: said.value for name, said in entry.value.items() if said.value is not None}
            yield entry.line, values
        elif isinstance(entry.value, str):
            yield entry.line, {"prompt": entry.value}
        else:
            raise refused(label, entry.line, f"found {entry.shown}, expected a prompt")


def _check_names(names: list[str], label: str, line: int) -> None:
    for name in names:
        if name not in FIELDS:
            raise refused(label, line, f"unknown column {quote(name, 60)}", nearest(name, FIELDS))
        if names.count(name) > 1:
            raise refused(label, line, f"the column {name} stands twice")


def _prompt(label: str, line: int, row: dict[str, Any], like: Prompt) -> Prompt:
    if "prompt" not in row:
        raise refused(label, line, "has no prompt")
    where = f"{label}, line {line}"
    values: dict[str, Any] = {}
    for name, value in row.items():
        if name in ("seed", "steps", "images"):
            values[name] = _whole(value, where, name)
        elif name == "guidance":
            values[name] = _number(value, where, name)
        elif name == "size":
            values[name] = parse_size(str(value), f"{where}, size")
        elif isinstance(value, str):
            values[name] = value.strip()
        else:
            raise UsageError(where, f"found {quote(value, 60)} for {name}, expected a text")
    made = replace(like, **values, said=frozenset(row))
    return checked(made, {name: f"{where}, {name}" for name in FIELDS})


def _whole(value: Any, where: str, name: str) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,19}\s*", value, re.ASCII):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise UsageError(where, f"found {quote(value, 60)} for {name}, expected a whole number")


def _number(value: Any, where: str, name: str) -> float:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            found = float(value)
        except (ValueError, OverflowError):
            found = math.nan
        if math.isfinite(found):
            return found
    raise UsageError(where, f"found {quote(value, 60)} for {name}, expected a number")
