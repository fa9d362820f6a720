"""The page of a study: what was done with which words, what came of it, and what its numbers can and cannot say.

Draws what the steps left to be shown. No time and no place stands on it: the same study gives the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightops.diffusion.page import Code, Drawing, Facts, Heading, ImageFile, Images, Page, Part, Text
from weightops.diffusion.study_words import said
from weightops.diffusion.tables import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from weightops.diffusion.study_parts import Step, Study
    from weightops.diffusion.study_state import Record

_TINY = (
    "This is a run with --tiny: models of random weights and made pictures stand in the place of the real ones. It "
    "shows that everything works together; what is drawn and measured says nothing of any real model."
)


def page(*, title: str | None = None, text: str | None = None, leave_out: Sequence[str] = ()) -> Page:
    """The words of the step `page`: its title, words below it, and the names of steps that it does not show."""
    return Page(title or "", (Text(text),) if text else ())


def page_of(
    study: Study, step: Step, inputs: Sequence[tuple[str, str]], steps: Sequence[tuple[Step, Record]],
    place: Callable[[str], Path],
) -> Page:  # fmt: skip
    """The page of these inputs and steps. place: the folder of a step's outputs. Raises WeightopsError."""
    asked = page(**step.words)
    parts: list[Part] = [Text(study.about)] if study.about else []
    parts += asked.parts
    if study.tiny:
        parts.append(Text(_TINY))
    if inputs:
        parts += [Heading("Inputs"), Facts(tuple((f"${name}", what) for name, what in inputs))]
    for other, record in steps:
        if other.name in step.words.get("leave_out", ()):
            continue
        parts += [Heading(other.title[:1].upper() + other.title[1:]), *([Text(other.text)] if other.text else [])]
        parts.append(Code(said(other.verb.name, other.words)))
        for shown in record.shown:
            parts += _parts(shown, place(other.name))
        parts += [Text(f"Warning: {text}") for text in record.warnings]
    return Page(asked.title or study.title, tuple(parts))


def _parts(shown: dict[str, Any], folder: Path) -> Iterator[Part]:
    """A part as a step's record has it, as the page has it."""
    kind = shown["kind"]
    if kind == "facts":
        yield Facts(tuple((name, value) for name, value in shown["rows"]))
    elif kind == "table":
        rows = tuple(map(tuple, shown["rows"]))
        yield Table(shown["title"], tuple(shown["columns"]), rows, shown["note"], shown.get("decimals", 3))
    elif kind == "pictures":
        yield Images(tuple(ImageFile(folder / name, caption) for name, caption in shown["pictures"]))
    elif kind == "drawing":
        yield Drawing((folder / shown["file"]).read_bytes(), shown["words"], shown.get("caption", ""))
    else:
        yield Text(shown["text"])
