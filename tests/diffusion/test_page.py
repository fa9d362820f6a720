"""A page is whole in itself, says what it is given as text, and shows figures that are the same bytes each time."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weightops import __version__
from weightops.diffusion.figures import bars, curve
from weightops.diffusion.page import Code, Drawing, Facts, Heading, ImageFile, Images, Page, Text
from weightops.diffusion.tables import Table
from weightops.errors import FormatError, OutputError, UsageError

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

HOSTILE = "</td><script>alert('1')</script> & \"x\" \x1b[31m\u202egnp\x00\udcff"
SAFE = "</td><script>alert('1')</script> & \"x\" \\x1b[31m\\u202egnp\\x00\\udcff"
EMPTY = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source"}
PNG, SVG = b"\x89PNG\r\n\x1a\n", b"<?xml"
PIXELS = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3)


class Read(HTMLParser):
    """The elements of a page, with their attributes and text; every element must end where it should."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))
        self.words.setdefault(tag, []).append("")
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.words[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def picture(path: Path, kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> Path:
    Image.fromarray(PIXELS).resize(size).save(path, kind)
    return path


def whole(folder: Path) -> Page:
    """A page with every kind of part."""
    files = (
        ImageFile(picture(folder / "a b#1?.png"), "first"), ImageFile(picture(folder / "b.jpg", "JPEG"), HOSTILE),
    )  # fmt: skip
    return Page(
        "A study: " + HOSTILE,
        (
            Text("One paragraph,\non two lines.\n \nAnother: " + HOSTILE),
            Facts((("base", "a.safetensors"), (HOSTILE, HOSTILE + "\nsecond line"))),
            Heading("Grids"),
            Images(files[:1]),
            Images(files),
            Heading(HOSTILE),
            Table(HOSTILE, (HOSTILE, "n"), ((HOSTILE, 1 / 3), ("b", None)), note=HOSTILE),
            Heading("Curves"),
            Drawing(curve({"a": ([0, 1], [1, 2])}, title="t", x="x", y="y"), "the loss", "falls"),
            Drawing(bars({"a": 1.0}, title="t", x="x", kind="svg"), HOSTILE),
            Code("merge:\n\ta: " + HOSTILE),
        ),
    )


# ------------------------------------------------------------------------------------------------ the page


@pytest.mark.parametrize("embed", [True, False])
def test_what_a_page_is_given_is_text_and_never_markup(tmp_path: Path, embed: bool) -> None:
    page = Read(whole(tmp_path).html(embed=embed, folder=tmp_path))
    tags = {tag for tag, _ in page.found}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "svg"}
    assert not [name for _, attributes in page.found for name in attributes if name.startswith("on")]
    title = "A study: " + SAFE
    assert page.words["title"] == page.words["h1"] == [title]
    assert page.words["h2"] == ["Grids", SAFE, "Curves"]
    assert page.words["p"] == ["One paragraph,\non two lines.", "Another: " + SAFE, SAFE]
    assert page.words["dt"] == ["base", SAFE]
    assert page.words["dd"] == ["a.safetensors", SAFE + "\nsecond line"]
    assert page.words["code"] == ["merge:\n    a: " + SAFE]
    assert page.words["caption"] == [SAFE]
    assert page.words["th"] == [SAFE, "n", SAFE, "b"]
    assert page.words["td"] == ["0.333", ""]
    assert page.words["figcaption"] == ["first", "first", SAFE, "falls"]
    assert [image["alt"] for image in page.all("img")] == ["first", "first", SAFE, "the loss", SAFE]
    assert page.words["footer"] == [f"weightops {__version__}"]


def test_a_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    text = whole(tmp_path).html()
    page = Read(text)
    assert all(str(image["src"]).startswith("data:image/") for image in page.all("img"))
    assert not re.search(r"https?:|url\(|@import|srcset", text)
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    first = str(page.all("img")[0]["src"]).removeprefix("data:image/png;base64,")
    assert base64.b64decode(first) == (tmp_path / "a b#1?.png").read_bytes()


def test_images_beside_a_page_are_addressed_from_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "pages").mkdir()
    odd = Page("t", (Images((ImageFile(picture(tmp_path / "images" / "a b#1?%41:猫.png"), "odd"),)),))
    odd.write(tmp_path / "pages" / "a.html", embed=False)
    page = Read((tmp_path / "pages" / "a.html").read_text(encoding="utf-8"))
    address = "./../images/a%20b%231%3F%2541%3A%E7%8C%AB.png"
    assert [image["src"] for image in page.all("img")] == [link["href"] for link in page.all("a")] == [address]


def test_a_page_of_several_headings_begins_with_its_contents(tmp_path: Path) -> None:
    page = Read(whole(tmp_path).html())
    assert [link["href"] for link in page.all("a")] == ["#s1", "#s2", "#s3"]
    assert [heading["id"] for heading in page.all("h2")] == ["s1", "s2", "s3"]
    assert page.words["li"] == page.words["h2"]
    assert "nav" not in Read(Page("t", (Heading("a"), Heading("b"))).html()).words


def test_a_table_says_what_its_cells_are() -> None:
    page = Read(Page("t", (Table("PSNR", ("step", "a"), (("0", 6.7271), ("100", 10.0))),)).html())
    assert page.all("th") == [
        {"scope": "col"}, {"scope": "col", "class": "number"}, {"scope": "row"}, {"scope": "row"},
    ]  # fmt: skip
    assert page.all("td") == [{"class": "number"}] * 2
    assert page.words["td"] == ["6.727", "10.000"]
    region = next(div for div in page.all("div") if div.get("class") == "scroll")
    assert (region["role"], region["aria-label"], region["tabindex"]) == ("region", "PSNR", "0")


def test_a_drawing_takes_half_of_its_pixels() -> None:
    data = curve({"a": ([0, 1], [1, 2])}, title="t", x="x", y="y")
    assert int.from_bytes(data[16:20], "big") == 1400
    svg = bars({"a": 1.0}, title="t", x="x", kind="svg")
    page = Read(Page("t", (Drawing(data, "a"), Drawing(svg, "b"))).html())
    assert [image.get("width") for image in page.all("img")] == ["700", None]


@pytest.mark.parametrize(("kind", "mime"), [("PNG", "png"), ("JPEG", "jpeg"), ("GIF", "gif"), ("WEBP", "webp")])
def test_the_kind_of_an_image_is_read_from_its_bytes(tmp_path: Path, kind: str, mime: str) -> None:
    file = ImageFile(picture(tmp_path / "a.dat", kind), "x")
    assert f'src="data:image/{mime};base64,' in Page("t", (Images((file,)),)).html()


def test_small_images_are_shown_with_their_pixels(tmp_path: Path) -> None:
    small, large = picture(tmp_path / "a.png", size=(128, 9)), picture(tmp_path / "b.png", size=(129, 9))
    page = Read(Page("t", (Images((ImageFile(small, "a"), ImageFile(large, "b"))),)).html())
    assert [image.get("class") for image in page.all("img")] == ["few", None]


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    def found(path: Path, data: bytes | None, kind: type[Exception], *, embed: bool) -> str:
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(kind) as told:
            Page("t", (Images((ImageFile(path, "x"),)),)).html(embed=embed, folder=tmp_path)
        return str(told.value)

    for embed in (True, False):
        path = tmp_path / "a.png"
        path.unlink(missing_ok=True)
        assert found(path, None, OutputError, embed=embed) == f"{path}: cannot be read: No such file or directory"
        expected = "expected an image: PNG, JPEG, GIF, WebP or SVG"
        assert found(path, b"", FormatError, embed=embed) == f"{path}: found an empty file, {expected}"
        text = found(path, b"<html>\x1b[31m", FormatError, embed=embed)
        assert text == f"{path}: found a file that begins with b'<html>\\x1b[', {expected}"
    with pytest.raises(FormatError, match="the loss: found a file that begins with b'x'"):
        Page("t", (Drawing(b"x", "the loss"),)).html()


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.html"
    page = Page("t", (Text("one"),))
    page.write(path)
    assert path.read_text(encoding="utf-8") == page.html()
    with pytest.raises(OutputError):
        Page("t", (Images((ImageFile(tmp_path / "none.png", "x"),)),)).write(path)

    def fails(*_: object) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OutputError, match="Permission denied"):
        Page("t", (Text("two"),)).write(path)
    assert path.read_text(encoding="utf-8") == page.html()
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]


# ------------------------------------------------------------------------------------------------ figures

ODD_NAME = "_a $x^2$ \\ 猫 \x1b[31m " + "long " * 30


def lines() -> dict[str, Any]:
    steps = np.arange(1, 101)
    noise = np.random.default_rng(0).random(100)
    return {ODD_NAME: (steps, 1 / steps + noise), "b": ([0, 50, 100], [1, float("nan"), -1])}


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_figure_is_the_same_bytes_each_time_and_in_each_process(kind: Any, tmp_path: Path) -> None:
    program = (
        "import json, sys; from weightops.diffusion.figures import bars, curve; a, b, kind = json.load(sys.stdin)\n"
        "sys.stdout.buffer.write(curve(a, title='t', x='x', y='y', smooth=5, kind=kind))\n"
        "sys.stdout.buffer.write(bars(b, title='t', x='x', kind=kind))"
    )
    values = {"down.0": 1.5, "mid": -0.25, ODD_NAME: 0.0}
    series = {name: [list(map(float, xs)), list(map(float, ys))] for name, (xs, ys) in lines().items()}
    here = curve(series, title="t", x="x", y="y", smooth=5, kind=kind)  # type: ignore[arg-type]
    here += bars(values, title="t", x="x", kind=kind)
    assert here.startswith(PNG if kind == "png" else SVG)
    assert not re.search(rb"<dc:date>|<dc:creator>|Software", here)
    given = json.dumps([series, values, kind])
    done = subprocess.run(
        [sys.executable, "-c", program], input=given.encode(), capture_output=True, check=True,
        cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "1"},
    )  # fmt: skip
    assert done.stdout == here


@pytest.mark.parametrize("name", ["a.png", "a.svg", "A.SVG"])
def test_a_figure_is_of_the_kind_that_its_file_is_named_for(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    assert curve(lines(), title="t", x="x", y="y", path=path) == path.read_bytes()
    assert path.read_bytes().startswith(PNG if name.endswith("png") else SVG)
    assert bars({"a": 1}, title="t", x="x", path=path) == path.read_bytes()
    with pytest.raises(UsageError, match=r"found the name 'a.jpg', expected one that ends in .png or .svg"):
        bars({"a": 1}, title="t", x="x", path=tmp_path / "a.jpg")
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("smooth", [0, 7])
def test_odd_curves_are_drawn(log: bool, smooth: int) -> None:
    for series in (
        {},
        {"a": ([], [])},
        {"a": ([1], [2])},
        {"a": ([1, 2], [0, -1])},
        lines(),
        {"a": ([0, 1], [np.inf, np.nan])},
    ):
        assert curve(series, title=ODD_NAME, x=ODD_NAME, y="$", log=log, smooth=smooth).startswith(PNG)
    with pytest.raises(ValueError, match="a: 2 values of x, 1 of y"):
        curve({"a": ([1, 2], [1])}, title="", x="", y="", log=log, smooth=smooth)


def test_odd_bars_are_drawn_and_taller_the_more_there_are() -> None:
    def height(values: dict[str, float]) -> int:
        return int.from_bytes(bars(values, title=ODD_NAME, x="$")[20:24], "big")

    assert height({}) < height({str(n): n for n in range(10)}) < height({str(n): -n for n in range(20)})
    assert height({"a": float("inf"), "b": float("nan"), ODD_NAME: -1e9})


def svg_text(data: bytes) -> list[str]:
    """What an SVG of matplotlib says is drawn as shapes, beside a comment of the words."""
    return re.findall(r"<!-- (.*?) -->", data.decode())


def test_names_are_shown_as_they_are_and_the_legend_leaves_out_none() -> None:
    series = {"_first": ([0, 10], [1, 2]), "$a$ \\ 猫": ([0, 10], [2, 1])}
    said = svg_text(curve(series, title="of $x^2$", x="step", y="loss", kind="svg"))
    assert {"_first", "$a$ \\ □", "of $x^2$", "step", "loss"} <= {text.strip() for text in said}
    said = svg_text(curve({"alone": ([0, 10], [1, 2])}, title="t", x="step", y="loss", kind="svg"))
    assert "alone" not in said
    said = svg_text(curve({"alone": ([0, 10], [1, 2])}, title="t", x="step", y="loss", kind="svg", smooth=2))
    assert "alone, mean of 2" in said
    said = svg_text(bars({"b": 0.25, "a": 3000}, title="t", x="x", kind="svg"))
    assert [text for text in said if text in ("a", "b", "3,000")] == ["b", "a", "3,000"]


def test_a_smoothed_line_is_the_mean_of_its_neighbours() -> None:
    from weightops.diffusion.figures import _smoothed

    values = np.array([1.0, 2, 4, np.nan, 16, 32])
    found = _smoothed(values, 3)
    expected = [1.5, 7 / 3, 3, np.nan, 24, 24]
    assert np.allclose(found, expected, equal_nan=True)
    assert np.allclose(_smoothed(np.full(50, 0.1), 9), 0.1)
    assert _smoothed(np.arange(6.0), 4).tolist() == [1, 1.5, 2.5, 3.5, 4, 4.5]


def test_an_svg_is_well_formed_and_a_log_axis_says_plain_numbers() -> None:
    data = curve({"a": ([0, 1], [0.01, 3])}, title="t", x="x", y="y", log=True, kind="svg")
    assert ET.fromstring(data).tag == "{http://www.w3.org/2000/svg}svg"
    assert {"0.01", "0.1", "1", "2"} <= set(svg_text(data))


def test_figures_without_matplotlib_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    for draw in (lambda: bars({"a": 1}, title="t", x="x"), lambda: curve({}, title="t", x="x", y="y")):
        with pytest.raises(UsageError) as told:
            draw()
        assert str(told.value) == "plot: needs matplotlib, which is not installed"
        assert told.value.hint == "pip install 'weightops[diffusion]'"
