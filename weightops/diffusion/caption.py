"""caption: the images of a folder described by BLIP, in the form that trainers read; what is done is not done again."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion.blip import DTYPES, MODEL, Asked, Place, load, locate
from weightops.diffusion.captions import (
    Captions,
    check_beside,
    check_template,
    clean,
    clear_leftovers,
    fold,
    read_captions,
    write_beside,
    write_table,
)
from weightops.diffusion.extras import hushed, need
from weightops.diffusion.pictures import Found, Picture, find_pictures, near_duplicates, open_picture, tiny
from weightops.engine.run import Progress, ignore
from weightops.errors import FormatError, Interrupted, UsageError, listing, quote
from weightops.ops.report import peak_memory_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from PIL.Image import Image

FORMS = ("csv", "txt", "both")

# A word of a file's or folder's name by which datasets puts it into a split of its own.
_SPLIT = re.compile(
    r"(?:^|[-._ 0-9/])(?:train(?:ing)?|valid(?:ation)?|val|dev|test(?:ing)?|eval(?:uation)?)(?:[-._ 0-9/])", re.ASCII
)


@dataclass(slots=True)
class CaptionReport:
    """What was captioned, and what there is to know about the folder. captions: the new ones, by the image's name.

    todo: what would be captioned, of a dry run. written: the files, by their path.
    """

    inputs: list[dict[str, Any]]
    output: str | None
    found: Found
    min_side: int
    kept: int = 0
    todo: list[str] = field(default_factory=list)
    captions: dict[str, str] = field(default_factory=dict)
    broken: list[tuple[str, str]] = field(default_factory=list)
    duplicates: list[tuple[str, str, int]] = field(default_factory=list)
    tiny: list[Picture] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The JSON document that scripts may rely on."""
        return {
            "command": "caption",
            "version": __version__,
            "inputs": self.inputs,
            "output": self.output,
            "pictures": len(self.found.pictures),
            "captioned": len(self.captions),
            "kept": self.kept,
            "to_caption": self.todo,
            "captions": [{"file": name, "caption": text} for name, text in self.captions.items()],
            "written": self.written,
            "bytes_written": sum(Path(path).stat().st_size for path in self.written),
            "broken": [{"file": name, "reason": reason} for name, reason in self.broken],
            "ignored": self.found.ignored,
            "duplicates": [{"file": a, "again": b, "distance": distance} for a, b, distance in self.duplicates],
            "tiny": [{"file": p.name, "width": p.width, "height": p.height} for p in self.tiny],
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": self.peak_memory_bytes,
            "warnings": self.warnings,
            "dry_run": self.dry_run,
        }


@dataclass(frozen=True, slots=True)
class _Wish:
    """What is made of the model's words, and where it is written."""

    query: str | None
    template: str
    trigger: str | None
    csv: bool
    txt: bool


def caption(
    folder: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] = MODEL,
    query: str | None = None,
    template: str | None = None,
    trigger: str | None = None,
    prompt: str | None = None,
    write: str = "csv",
    batch: int = 8,
    max_tokens: int = 50,
    beams: int = 1,
    min_side: int = 256,
    force: bool = False,
    dry_run: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    on_look: Progress = ignore,
    on_progress: Progress = ignore,
) -> CaptionReport:
    """Caption every image below `folder` that has no caption yet; with `force` all of them anew.

    model: a name on the hub, or a folder. query: what the images were searched by, which the template puts into each
    caption (None: "{query}, {caption}", or "{caption}" without one) unless the caption says it already. trigger: stands
    first. prompt: how each caption begins, in the model's own words. write: csv is the table metadata.csv (or
    metadata.jsonl, where there is one), txt a file beside each image, or both; captions that are there already in
    another form are written in this one too. Files are written after each batch of `batch` images, whole or not at all,
    so that a run that was stopped goes on where it was. max_tokens, beams: the longest caption, and how wide the search
    for a likely one is. min_side: a shorter side of fewer pixels is called tiny. dtype: auto is fp16 on CUDA.

    Broken images are skipped and named. on_look counts images looked at, on_progress those captioned. Raises
    WeightopsError.
    """
    started = time.perf_counter()
    chosen = ("{caption}" if query is None else "{query}, {caption}") if template is None else template
    wish = _Wish(query, chosen, trigger, csv=write != "txt", txt=write != "csv")
    asked = Asked(prompt, batch, max_tokens, beams, device, dtype)
    _check(wish, asked, write, min_side)
    need("caption", "PIL", *(() if dry_run else ("diffusers", "transformers")))
    place = locate(str(model))
    if not dry_run and device not in ("auto", "cpu"):
        from weightops.engine.tensors import resolve_device

        resolve_device(device)
    found = find_pictures(folder, on_progress=on_look)
    captions = read_captions(folder, found.pictures)
    if wish.txt:
        check_beside(found.pictures)
    todo = [p for p in found.pictures if force or p.name not in captions.texts]
    report = _look_over(folder, found, captions, min_side)
    report.kept = len(found.pictures) - len(todo)
    report.output = str(captions.table.path) if wish.csv else str(folder)
    report.dry_run = dry_run
    if todo:
        report.inputs.append({"path": str(model), "hash": None, "bytes": None})
    if dry_run:
        report.todo = [p.name for p in todo]
    else:
        clear_leftovers(captions.table)
        fresh = {p.name for p in todo}
        kept = {name: text for name, text in captions.texts.items() if name not in fresh}
        in_table = {name: text for name, text in kept.items() if name not in captions.in_table}
        beside = {name: text for name, text in kept.items() if name not in captions.beside}
        _write(in_table, beside, found.pictures, captions, wish, report)
        if todo:
            _caption_all(todo, place, asked, captions, wish, report, force, on_progress)
    report.seconds = time.perf_counter() - started
    report.peak_memory_bytes = peak_memory_bytes()
    return report


def _check(wish: _Wish, asked: Asked, write: str, min_side: int) -> None:
    """Raise UsageError for words that mean nothing."""
    if write not in FORMS:
        raise UsageError("--write", f"found {quote(write)}, expected csv, txt or both")
    if asked.dtype not in DTYPES:
        raise UsageError("--dtype", f"found {quote(asked.dtype)}, expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    for option, number, least in (
        ("--batch", asked.batch, 1), ("--max-tokens", asked.max_tokens, 1), ("--beams", asked.beams, 1),
        ("--min-side", min_side, 0),
    ):  # fmt: skip
        if number < least:
            raise UsageError(option, f"found {number}, expected a whole number, {least} or more")
    for option, text in (("--query", wish.query), ("--trigger", wish.trigger), ("--prompt", asked.prompt)):
        if text is not None and not clean(text):
            raise UsageError(option, f"found {quote(text)}, expected words")
    check_template(wish.template, wish.query)


def _look_over(folder: str | os.PathLike[str], found: Found, captions: Captions, min_side: int) -> CaptionReport:
    """What there is to say of the folder before anything is done."""
    import xxhash

    hashed = xxhash.xxh3_128()
    for picture in found.pictures:
        hashed.update(f"{picture.name}\0{picture.digest}\0".encode())
    nbytes = sum(p.nbytes for p in found.pictures)
    inputs = [{"path": str(folder), "hash": f"xxh3_128:{hashed.hexdigest()}", "bytes": nbytes}]
    report = CaptionReport(inputs, None, found, min_side, broken=list(found.broken))
    report.duplicates = near_duplicates(found.pictures)
    report.tiny = tiny(found.pictures, min_side)
    report.warnings += captions.warnings
    tabled = [name for name, _ in found.broken if name in captions.table.rows]
    if tabled:
        source = captions.table.path.name
        report.warnings.append(f"{source} names broken images, where imagefolder stops: {listing(tabled)}")
    split = [p.name for p in found.pictures if _SPLIT.search(p.name)]
    if split:
        report.warnings.append(
            f"imagefolder makes a split of its own, without captions, of what is named {listing(split)}: rename it, or "
            "load the folder with data_files={'train': '**'}"
        )
    return report


# ------------------------------------------------------------------------------------------------ the work


def _caption_all(
    todo: Sequence[Picture], place: Place, asked: Asked, captions: Captions, wish: _Wish, report: CaptionReport,
    force: bool, on_progress: Progress,
) -> None:  # fmt: skip
    """Caption batch after batch, and write after each."""
    silent: list[str] = []
    try:
        on_progress(0, len(todo))
        with hushed():
            captioner = load(place, asked)
            for start in range(0, len(todo), asked.batch):
                opened = _opened(todo[start : start + asked.batch], report)
                said = captioner.captions([image for _, image in opened]) if opened else []
                texts = {}
                for (picture, _), words in zip(opened, said, strict=True):
                    if not words:
                        silent.append(picture.name)
                    if text := fold(wish.template, wish.query, words, wish.trigger):
                        texts[picture.name] = text
                _write(texts, texts, [picture for picture, _ in opened], captions, wish, report)
                report.captions |= texts
                on_progress(min(start + asked.batch, len(todo)), len(todo))
    except (Interrupted, KeyboardInterrupt):
        what = f"interrupted: {len(report.captions):,} of {len(todo):,} captions are written"
        hint = "the same command goes on with the others"
        if force:
            hint = "with --force it begins anew; without, those that have a caption keep it"
        raise Interrupted(report.inputs[0]["path"], what, hint) from None
    if silent:
        report.warnings.append(f"the model said nothing of {listing(silent)}")


def _opened(pictures: Sequence[Picture], report: CaptionReport) -> list[tuple[Picture, Image]]:
    """Those that can still be read; they were once."""
    opened = []
    for picture in pictures:
        try:
            opened.append((picture, open_picture(picture.path)))
        except FormatError as e:
            report.broken.append((picture.name, e.what))
    return opened


def _write(
    in_table: dict[str, str], beside: dict[str, str], pictures: Sequence[Picture], captions: Captions, wish: _Wish,
    report: CaptionReport,
) -> None:  # fmt: skip
    """Put captions where they are asked for."""
    if wish.csv:
        path = str(captions.table.path)
        if write_table(captions.table, in_table) and path not in report.written:
            report.written.append(path)
    if wish.txt:
        report.written += [str(write_beside(p, beside[p.name])) for p in pictures if p.name in beside]
