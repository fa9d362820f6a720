"""An evaluation as a folder: tables as CSV and Markdown, drawings, evaluation.json, and a page of all of it.

The folder appears whole. The same findings are the same bytes: no time and no place stands in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion.page import Drawing, Facts, Heading, Page, Part, Text
from weightops.errors import OutputError, listing
from weightops.files.folder import FolderWriter
from weightops.files.writer import check_target

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from weightops.diffusion.findings import Finding, LeftOut

DOCUMENT, PAGE = "evaluation.json", "evaluation.html"


def check_place(target: Path, inputs: Iterable[str], *, force: bool) -> None:
    """Refuse a place that cannot be written to, or where something else is. Raises OutputError.

    Of what is there --force removes all, so that it has to be an evaluation, and hold none of the inputs.
    """
    empty = _is_empty(target)
    check_target(target, 0, force=force or empty, inputs=(), folder=True)
    if empty or not os.path.lexists(target):
        return
    if not (target / DOCUMENT).is_file():
        what = f"is no evaluation: it has no {DOCUMENT}, and --force would remove all that is in it"
        raise OutputError(str(target), what, "choose another name")
    with contextlib.suppress(OSError, ValueError):
        whole = target.resolve()
        held = [name for name in inputs if whole in (Path(name).resolve(), *Path(name).resolve().parents)]
        if held:
            raise OutputError(str(target), f"holds inputs, which --force would remove: {listing(held)}")


def _is_empty(target: Path) -> bool:
    with contextlib.suppress(OSError):
        return target.is_dir() and not any(target.iterdir())
    return False


def write_folder(target: Path, files: Mapping[str, bytes], *, force: bool) -> int:
    """Write all files, and return their bytes; in place of an earlier evaluation with `force`. Raises OutputError."""
    writer = FolderWriter(target, {}, (), (), extras=files, force=force or _is_empty(target))
    try:
        return writer.commit()
    finally:
        writer.close()


def files_of(
    findings: Sequence[Finding], left_out: Sequence[LeftOut], document: Mapping[str, Any],
    facts: Sequence[tuple[str, str]], warnings: Sequence[str],
) -> dict[str, bytes]:  # fmt: skip
    """Name -> bytes. facts: what the page says at its top; document: what evaluation.json says."""
    found: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory(prefix="weightops-") as name:
        for finding in findings:
            for stem, table in finding.tables.items():
                path = Path(name) / f"{stem}.csv"
                table.to_csv(path)
                found[path.name] = path.read_bytes()
                found[f"{stem}.md"] = table.to_markdown().encode("utf-8", "backslashreplace")
            found |= {f"{stem}.png": drawing.data for stem, drawing in finding.drawings.items()}
    text = json.dumps(document, ensure_ascii=False, indent=1, sort_keys=True, allow_nan=False) + "\n"
    found[DOCUMENT] = text.encode("utf-8", "backslashreplace")
    found[PAGE] = Page("Evaluation", tuple(_parts(findings, left_out, facts, warnings))).html().encode()
    return found


def document_of(
    findings: Sequence[Finding], left_out: Sequence[LeftOut], words: Mapping[str, Any],
    inputs: Sequence[Mapping[str, Any]], warnings: Sequence[str], versions: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    """What evaluation.json says: names and hashes of the inputs, and no paths."""
    bare = [{"name": os.path.basename(str(e["path"]).rstrip("/")), "hash": e["hash"]} for e in inputs]  # noqa: PTH119
    return {
        "command": "evaluate", "version": __version__, "versions": dict(versions), "words": dict(words),
        "inputs": bare, **said(findings, left_out), "warnings": list(warnings),
    }  # fmt: skip


def said(findings: Sequence[Finding], left_out: Sequence[LeftOut]) -> dict[str, Any]:
    """Findings for JSON."""
    return {
        "parts": [
            {
                "part": f.part, "says": f.says, "facts": dict(f.facts), "tables": list(f.tables),
                "drawings": list(f.drawings),
            }
            for f in findings
        ],
        "tables": {stem: table.to_dict() for f in findings for stem, table in f.tables.items()},
        "left_out": [{"part": left.part, "needs": left.needs} for left in left_out],
    }  # fmt: skip


def _parts(
    findings: Sequence[Finding], left_out: Sequence[LeftOut], facts: Sequence[tuple[str, str]], warnings: Sequence[str]
) -> Iterator[Part]:
    yield Facts(tuple(facts))
    for text in warnings:
        yield Text(f"Warning: {text}")
    for finding in findings:
        yield Heading(finding.part[:1].upper() + finding.part[1:])
        yield Text(finding.says)
        tables, drawings = dict(finding.tables), dict(finding.drawings)
        for stem, table in tables.items():
            yield table
            if stem in drawings:
                yield _captioned(stem, drawings.pop(stem))
        for stem, drawing in drawings.items():
            yield _captioned(stem, drawing)
    if left_out:
        yield Heading("What was left out")
        yield Facts(tuple((left.part, left.needs) for left in left_out))


def _captioned(stem: str, drawing: Drawing) -> Drawing:
    return Drawing(drawing.data, drawing.words, f"{drawing.caption or drawing.words} ({stem}.png)")
