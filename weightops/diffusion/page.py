"""Writes one HTML page of text, tables and pictures that needs no network and no script. Draws and measures nothing.

Whatever comes from a file is text there, never markup: escaped, control characters shown as such, and a policy in the
page itself forbids everything but its own style and its images.
"""

from __future__ import annotations

import base64
import html
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote as quoted

from weightops import __version__
from weightops.diffusion.tables import Table, write_whole
from weightops.errors import FormatError, OutputError, UsageError, printable

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Heading:
    """The beginning of a section."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """Paragraphs, an empty line between two."""

    text: str


@dataclass(frozen=True, slots=True)
class Code:
    """Lines as they stand, in type of one width."""

    text: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What is said of what: names and values."""

    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture at hand, PNG or SVG as `figures` draws it: two pixels of a PNG to one of the page.

    words: what it shows, for who cannot see it.
    """

    data: bytes
    words: str
    caption: str = ""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file (PNG, JPEG, GIF, WebP, SVG), and its caption, which also stands for it where it cannot be seen."""

    path: Path
    caption: str


@dataclass(frozen=True, slots=True)
class Images:
    """Image files side by side; one alone takes the whole width."""

    files: tuple[ImageFile, ...]


# Bytes of an image that tell its kind and, of a PNG, its width; and the width up to which its pixels may be seen.
_START = 64
_FEW = 128

Part = Heading | Text | Code | Facts | Drawing | Images | Table


@dataclass(frozen=True, slots=True)
class Page:
    """A title, and what stands below it from above."""

    title: str
    parts: tuple[Part, ...] = ()

    def html(self, *, embed: bool = True, folder: Path | None = None) -> str:
        """The page. embed: images lie within it; otherwise beside it, addressed from `folder`, where the page will be.

        Raises OutputError for an image that cannot be read, FormatError for a file that is none.
        """
        at = None if embed else (folder or Path())
        headings = [part.text for part in self.parts if isinstance(part, Heading)]
        contents = ""
        if len(headings) > 2:
            entries = "".join(f'<li><a href="#s{n}">{_text(t)}</a></li>' for n, t in enumerate(headings, 1))
            contents = f'<nav aria-label="Contents"><ul>{entries}</ul></nav>\n'
        numbers = itertools.count(1)
        body = "\n".join(_drawn(part, numbers, at) for part in self.parts)
        return _FRAME.format(
            title=_text(self.title), style=_STYLE, contents=contents, body=body, version=__version__,
            images="data:" if embed else "data: 'self' file:",
        )  # fmt: skip

    def write(self, path: Path, *, embed: bool = True) -> None:
        """Put the page in the place of what `path` was, whole or not at all. Raises OutputError, FormatError."""
        write_whole(path, self.html(embed=embed, folder=path.parent).encode())


def _drawn(part: Part, numbers: Iterator[int], folder: Path | None) -> str:
    match part:
        case Heading(text):
            return f'<h2 id="s{next(numbers)}">{_text(text)}</h2>'
        case Text(text):
            blocks = "\n".join(line.strip() for line in _lines(text).split("\n")).split("\n\n")
            return "\n".join(f"<p>{_escaped(block.strip())}</p>" for block in blocks if block.strip())
        case Code(text):
            return f'<pre tabindex="0"><code>{_text(text)}</code></pre>'
        case Facts(rows):
            return f"<dl>{''.join(f'<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>' for k, v in rows)}</dl>"
        case Drawing(data, words, caption):
            width = _png_width(data) // 2 if _kind(data[:_START], words) == "image/png" else None  # an SVG says its own
            inner = _image(_embedded(data, words), words, width)
            return f'<figure class="drawing">{inner}{_caption(caption)}</figure>'
        case Images(files):
            inner = "".join(_image_file(file, folder) for file in files)
            return f'<div class="images">{inner}</div>' if len(files) > 1 else inner
        case Table():
            return _table(part)


# ------------------------------------------------------------------------------------------------ text


def _text(text: str) -> str:
    return _escaped(_lines(text))


def _lines(text: str) -> str:
    """Line by line, with everything that a reader cannot see, or that turns the text around, shown as an escape."""
    lines = text.replace("\r\n", "\n").expandtabs(4).split("\n")
    return "\n".join(printable(line) for line in lines)


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)


# ------------------------------------------------------------------------------------------------ tables


def _table(table: Table) -> str:
    numeric = table.numeric
    head = "".join(f'<th scope="col"{_right(r)}>{_text(n)}</th>' for n, r in zip(table.columns, numeric, strict=True))
    rows = []
    for row in table.drawn():
        cells = [f"<td{_right(right)}>{_escaped(cell)}</td>" for cell, right in zip(row, numeric, strict=True)]
        if cells:
            cells[0] = f'<th scope="row"{_right(numeric[0])}>{_escaped(row[0])}</th>'
        rows.append(f"<tr>{''.join(cells)}</tr>\n")
    title = _text(table.title)
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll" role="region" aria-label="{title}" tabindex="0"><table><caption>{title}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(rows)}</tbody></table></div>{note}"
    )


def _right(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


# ------------------------------------------------------------------------------------------------ images


def _image_file(image: ImageFile, folder: Path | None) -> str:
    label = str(image.path)
    try:
        with image.path.open("rb") as file:
            start = file.read(_START)
            kind = _kind(start, label)
            address = _embedded(start + file.read(), label) if folder is None else _relative(image.path, folder)
    except OSError as e:
        raise OutputError(label, f"cannot be read: {e.strerror or e}") from None
    inner = _image(address, image.caption, few=kind == "image/png" and _png_width(start) <= _FEW)
    if folder is not None:
        inner = f'<a href="{_escaped(address)}">{inner}</a>'
    return f"<figure>{inner}{_caption(image.caption)}</figure>"


def _image(address: str, words: str, width: int | None = None, *, few: bool = False) -> str:
    size = f' width="{width}"' if width else ' class="few"' if few else ""
    return f'<img src="{_escaped(address)}" alt="{_text(words)}"{size}>'


def _caption(text: str) -> str:
    return f"<figcaption>{_text(text)}</figcaption>" if text else ""


def _embedded(data: bytes, label: str) -> str:
    return f"data:{_kind(data[:_START], label)};base64,{base64.b64encode(data).decode()}"


def _relative(path: Path, folder: Path) -> str:
    try:
        found = os.path.relpath(path.resolve(), folder.resolve())
    except ValueError:  # Windows: another drive
        raise UsageError(str(path), f"cannot be addressed from {str(folder)!r}", "embed the images instead") from None
    # ./ so that no name is taken for another scheme; bytes that are no text are quoted as they are.
    return "./" + quoted(Path(found).as_posix().encode("utf-8", "surrogateescape"))


def _kind(start: bytes, label: str) -> str:
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if start.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if start.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return "image/webp"
    if start.lstrip().startswith((b"<?xml", b"<svg")):
        return "image/svg+xml"
    found = "an empty file" if not start else f"a file that begins with {start[:8]!r}"
    raise FormatError(label, f"found {found}, expected an image: PNG, JPEG, GIF, WebP or SVG")


def _png_width(data: bytes) -> int:
    return int.from_bytes(data[16:20], "big")


# ------------------------------------------------------------------------------------------------ the frame

_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src {images}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="weightops {version}">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{contents}{body}
</main>
<footer>weightops {version}</footer>
</body>
</html>
"""

# Drawings are made for white paper, and keep it in the dark.
_STYLE = """:root {
  --paper: #fff; --ink: #1c1e21; --soft: #5c636b; --line: #d9dde2; --field: #f4f6f8; --link: #0060a8;
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e4e7ea; --soft: #9aa3ad; --line: #343a41; --field: #1f242a; --link: #7cc0f5; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere; }
main { max-width: 70rem; margin: 0 auto; padding: 1rem clamp(1rem, 4vw, 2.5rem); }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 1.5rem 0 1rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.8rem 0 .8rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
p { max-width: 44rem; margin: .8rem 0; }
a { color: var(--link); }
nav ul { list-style: none; padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
.note { color: var(--soft); font-size: .9rem; margin-top: .4rem; }
pre { background: var(--field); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem;
  overflow-x: auto; overflow-wrap: normal;
  font: .86rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font: inherit; }
dl { margin: 1rem 0; font-size: .95rem; }
dl div { display: grid; grid-template-columns: minmax(8rem, 14rem) 1fr; gap: 1rem; padding: .3rem 0;
  border-bottom: 1px solid var(--line); }
dt { color: var(--soft); }
dd { margin: 0; white-space: pre-wrap; }
.scroll { overflow-x: auto; margin: 1.2rem 0 .4rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; font-weight: 600; padding: 0 0 .5rem; }
th, td { text-align: left; padding: .35rem .8rem; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--soft); border-bottom-width: 2px; vertical-align: bottom; }
tbody th { font-weight: 500; position: sticky; left: 0; background: var(--paper); }
.number { text-align: right; white-space: nowrap; }
figure { margin: 1.2rem 0; }
img { max-width: 100%; height: auto; vertical-align: top; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .4rem; }
.drawing img { background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .6rem; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 13rem), 1fr)); gap: 1rem;
  margin: 1.2rem 0; }
.images figure { margin: 0; }
.images img { width: 100%; }
.few { image-rendering: pixelated; }
footer { max-width: 70rem; margin: 2rem auto 0; padding: 1rem clamp(1rem, 4vw, 2.5rem) 2rem; color: var(--soft);
  font-size: .85rem; }
@media (max-width: 40rem) { dl div { grid-template-columns: 1fr; gap: 0; } }
@media print {
  :root { --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --field: #f4f4f4; --link: #000; }
  body { font-size: 10.5pt; }
  main, footer { max-width: none; padding: 0; }
  nav { display: none; }
  .scroll { overflow: visible; }
  table { font-size: 8pt; }
  th, td { padding: .2rem .35rem; }
  tbody th { position: static; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  h2, caption { break-after: avoid; }
  figure, pre, tr, dl div { break-inside: avoid; }
}
"""
