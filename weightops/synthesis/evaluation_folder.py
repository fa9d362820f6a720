"""The folder of an evaluation of spaces: pieces kept while it is at work, and at its end tables, plots and a page.

evaluation.json is written last: a folder without it is of an evaluation that was broken off, and is gone on with.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion.evaluation_folder import DOCUMENT, files_of, said
from weightops.diffusion.image_records import versions_of
from weightops.diffusion.tables import write_whole
from weightops.errors import OutputError, UsageError
from weightops.files.writer import check_target
from weightops.synthesis.evaluation_cells import FOLDER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from weightops.diffusion.findings import Finding, LeftOut


def begin(target: Path, inputs: Sequence[str], *, force: bool, dry_run: bool) -> None:
    """Make the folder, or go on in the one of an evaluation that was broken off. Raises OutputError.

    force: the results of a finished one are taken away, and what was measured for it is kept.
    """
    there = os.path.lexists(target)
    own = (target / FOLDER).is_dir()
    if there and not target.is_dir():
        raise OutputError(str(target), "is no folder", "choose another name")
    if there and any(target.iterdir()) and not own:
        raise OutputError(str(target), "holds something else than an evaluation of spaces", "choose another name")
    held = [name for name in inputs if _holds(target, name)]
    if held:
        raise OutputError(str(target), f"holds {held[0]}, which is an input", "choose another name")
    finished = (target / DOCUMENT).exists()
    if finished and not force:
        raise OutputError(str(target), "an evaluation is there already", "--force replaces it")
    check_target(target, 0, force=True, inputs=(), folder=True)
    if dry_run:
        return
    if finished:
        for name in _written(target / DOCUMENT):
            with contextlib.suppress(OSError):
                (target / name).unlink()
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(str(target), f"cannot be made: {e.strerror or e}") from None


def _holds(target: Path, name: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        inner = type(target)(name).resolve()
        return target.resolve() in (inner, *inner.parents)
    return False


def _written(document: Path) -> list[str]:
    """What the last evaluation wrote, itself first: without it the folder is unfinished, whatever happens next."""
    names: list[Any] = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        names = list(json.loads(document.read_bytes()).get("files", []))
    bare = [name for name in names if isinstance(name, str) and os.path.basename(name) == name]  # noqa: PTH119
    return [DOCUMENT, *(name for name in bare if name != DOCUMENT)]


def write(
    target: Path, findings: Sequence[Finding], left_out: Sequence[LeftOut], *, words: Mapping[str, Any],
    inputs: Sequence[Mapping[str, Any]], facts: Sequence[tuple[str, str]], warnings: Sequence[str],
    packages: Sequence[str],
) -> dict[str, int]:  # fmt: skip
    """Write everything, the document last; the bytes of each file. Raises OutputError."""
    document: dict[str, Any] = {
        "command": "synth evaluate", "version": __version__, "versions": versions_of(*packages), "words": dict(words),
        "inputs": [
            {"name": os.path.basename(str(e["path"]).rstrip("/")), "hash": e["hash"]}  # noqa: PTH119
            for e in inputs
        ],
        **said(findings, left_out), "warnings": list(warnings),
    }  # fmt: skip
    files = files_of(findings, left_out, document, facts, warnings)
    document["files"] = sorted(files)
    try:
        text = json.dumps(document, ensure_ascii=False, indent=1, sort_keys=True, allow_nan=False) + "\n"
    except ValueError:
        raise UsageError(str(target), "a fact of a finding is no number") from None
    files[DOCUMENT] = text.encode("utf-8", "backslashreplace")
    for name in [name for name in files if name != DOCUMENT] + [DOCUMENT]:
        write_whole(target / name, files[name])
    return {name: len(data) for name, data in files.items()}
