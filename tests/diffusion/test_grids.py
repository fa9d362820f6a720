"""Grids: every label has its place and lies on no picture; what an image says of itself is read back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from weightops import __version__
from weightops.diffusion.grids import MAX_SIDE, Grid, draw_grid, face_for, lay_out, unknown_letters
from weightops.diffusion.png_text import encode_png, parameters_of, read_recipe_of_png, read_texts
from weightops.errors import FormatError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image as Picture

Image = pytest.importorskip("PIL.Image")

LONG = "a very-long-name_without-any-space/that.goes-on-and-on-and-on, and then some words more"


def pictures(count: int, width: int = 200, height: int = 200) -> list[Picture]:
    """Of one colour each, none of them near the paper's."""
    return [Image.new("RGB", (width, height), (200, 10 * n % 256, 40)) for n in range(count)]


def grid(down: int, across: int, width: int = 200, height: int = 200, **words: Any) -> Grid:
    cells = [pictures(across, width, height) for _ in range(down)]
    said: dict[str, Any] = {
        "columns": [f"column {n}" for n in range(across)],
        "rows": [f"row {n}" for n in range(down)],
    }
    return Grid(cells, **{**said, **words})


def overlap(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


GRIDS = {
    "plain": grid(2, 3),
    "title": grid(2, 3, title="a cat", note="sd15 · 30 steps"),
    "long": grid(2, 2, title=LONG * 5, note=LONG, columns=[LONG, "b"], rows=[f"{LONG}\nseed 1", "b"]),
    "one row, many columns": grid(1, 19, rows=[""]),
    "one row that has a label": grid(1, 9, rows=["the row"]),
    "one image": grid(1, 1, rows=[""], columns=["a"]),
    "wide": grid(3, 2, 400, 100, columns=[LONG, LONG]),
    "tall": grid(2, 3, 60, 400, columns=[LONG] * 3, rows=[LONG] * 2),
    "tiny": grid(2, 2, 8, 8, title=LONG),
    "no labels": grid(2, 2, columns=["", ""], rows=["", ""]),
    "more rows than a screen": grid(40, 2),
}


@pytest.mark.parametrize("name", GRIDS)
def test_no_label_lies_on_a_picture_or_on_another(name: str) -> None:
    layout = lay_out(GRIDS[name])
    boxes = [box for _, _, box in layout.cells] + [text.box for text in layout.texts]
    assert not [(a, b) for n, a in enumerate(boxes) for b in boxes[:n] if overlap(a, b)]
    width, height = layout.size
    assert all(0 < box[0] < box[2] < width and 0 < box[1] < box[3] < height for box in boxes)
    assert len(layout.cells) == sum(map(len, GRIDS[name].cells))


@pytest.mark.parametrize("name", GRIDS)
def test_what_is_drawn_stays_in_its_box(name: str) -> None:
    layout = lay_out(GRIDS[name])
    drawn = np.asarray(draw_grid(GRIDS[name])).astype(int)
    assert drawn.shape[:2] == layout.size[::-1]
    for row, column, (left, top, right, bottom) in layout.cells:
        cell = GRIDS[name].cells[row][column]
        assert cell is not None
        assert (drawn[top:bottom, left:right] == np.asarray(cell)[0, 0]).all()
        drawn[top:bottom, left:right] = drawn[0, 0]
    inked = [int((drawn[t.box[1] : t.box[3], t.box[0] : t.box[2]] != drawn[0, 0]).any()) for t in layout.texts]
    assert inked == [1] * len(layout.texts)
    for text in layout.texts:
        left, top, right, bottom = text.box
        drawn[top:bottom, left - 2 : right + 2] = drawn[0, 0]  # a letter may lean out by a pixel
    assert (drawn == drawn[0, 0]).all()


def test_each_line_is_no_wider_than_its_picture() -> None:
    layout = lay_out(GRIDS["long"])
    heads = [text for text in layout.texts if text.lines[0].startswith("a very-") and text.box[0] > 100]
    assert len(heads) == 1
    assert heads[0].box[2] - heads[0].box[0] <= 200
    assert "".join(heads[0].lines).replace(" ", "") == LONG.replace(" ", "")
    assert all(line[-1] in "-_./," or f"{line.split()[-1]} " in LONG for line in heads[0].lines[:-1])


def test_a_text_that_is_too_long_ends_in_an_ellipsis() -> None:
    title = lay_out(GRIDS["long"]).texts[0]
    assert len(title.lines) == 4
    assert title.lines[-1].endswith("…")


def test_small_pictures_are_enlarged_pixel_by_pixel_and_large_ones_stay() -> None:
    def cell(width: int, height: int) -> tuple[int, int]:
        _, _, box = lay_out(grid(1, 2, width, height)).cells[0]
        return box[2] - box[0], box[3] - box[1]

    assert cell(64, 64) == (192, 192)
    assert cell(64, 32) == (192, 96)
    assert cell(512, 768) == (512, 768)
    dots = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    drawn = np.asarray(draw_grid(Grid([[dots]], ["a"], [""])))
    _, _, (left, top, right, bottom) = lay_out(Grid([[dots]], ["a"], [""])).cells[0]
    assert (drawn[top:bottom:3, left:right:3] == np.asarray(dots)).all()


def test_a_grid_is_never_larger_than_programs_can_open() -> None:
    layout = lay_out(grid(2, 12, 1024, 1024))
    assert max(layout.size) <= MAX_SIDE
    assert layout.size[0] > 0.95 * MAX_SIDE
    _, _, box = layout.cells[0]
    assert box[2] - box[0] == box[3] - box[1]
    assert max(lay_out(grid(100, 3, 512, 512)).size) <= MAX_SIDE


def test_a_single_row_goes_on_in_further_lines() -> None:
    layout = lay_out(GRIDS["one row, many columns"])
    tops = [box[1] for _, _, box in layout.cells]
    assert [tops.count(top) for top in dict.fromkeys(tops)] == [7, 7, 5]
    assert len(layout.texts) == 19


def test_images_of_several_sizes_and_paths_are_shown(tmp_path: Path) -> None:
    small, large = Image.new("RGB", (200, 100), "red"), Image.new("RGB", (200, 200), "blue")
    small.save(tmp_path / "a.png")
    shown = Grid([[tmp_path / "a.png", large, None]], ["a", "b", "c"], [""])
    drawn = np.asarray(draw_grid(shown))
    (_, _, first), (_, _, second), (_, _, third) = lay_out(shown).cells
    assert tuple(drawn[first[1] + 100, first[0] + 100]) == (255, 0, 0)
    assert tuple(drawn[first[1] + 20, first[0] + 100]) == tuple(drawn[0, 0])  # in the middle, not stretched
    assert tuple(drawn[second[1], second[0]]) == (0, 0, 255)
    assert (drawn[third[1] : third[3], third[0] : third[2]] == drawn[0, 0]).all()


def test_letters_that_pillows_font_lacks_are_drawn_in_one_that_has_them() -> None:
    assert face_for("plain words, 0.5") == ""
    assert "ä" in unknown_letters("Häuschen", "")
    other = face_for("Häuschen Дом")
    assert unknown_letters("Häuschen Дом", other) == ""
    assert unknown_letters("a 猫", other) == "猫"


def test_a_grid_is_the_same_pixels_each_time() -> None:
    assert draw_grid(GRIDS["long"]).tobytes() == draw_grid(GRIDS["long"]).tobytes()


# ------------------------------------------------------------------------------------------------ text in a PNG

RECIPE = {
    "command": "generate", "version": __version__, "prompt": "a cät\nasleep", "seed": 3,
    "inputs": [{"name": "m.safetensors", "hash": "xxh3_128:" + "0" * 32}],
}  # fmt: skip


def test_an_image_carries_its_recipe_and_what_others_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode_png(pictures(1)[0], RECIPE, "a cät\nSteps: 3"))
    assert read_recipe_of_png(path) == RECIPE
    assert read_texts(path)["parameters"] == "a cät\nSteps: 3"
    with Image.open(path) as opened:
        assert opened.tobytes() == pictures(1)[0].tobytes()
    assert encode_png(pictures(1)[0], RECIPE, "a") == encode_png(pictures(1)[0], RECIPE, "a")


def test_what_carries_no_recipe_is_refused(tmp_path: Path) -> None:
    def refusal(name: str) -> str:
        with pytest.raises((FormatError, UsageError)) as e:
            read_recipe_of_png(tmp_path / name)
        return str(e.value).replace(f"{tmp_path}/", "")

    pictures(1)[0].save(tmp_path / "plain.png")
    assert refusal("plain.png") == "plain.png: carries no recipe of weightops"
    (tmp_path / "text.png").write_text("x")
    assert refusal("text.png") == "text.png: is no PNG image"
    pictures(1)[0].save(tmp_path / "photo.png", "JPEG")
    assert refusal("photo.png") == "photo.png: is no PNG image"
    (tmp_path / "cut.png").write_bytes(encode_png(pictures(1)[0], RECIPE)[:100])
    assert refusal("cut.png").startswith("cut.png: is a damaged PNG image: ")
    assert refusal("none.png") == "none.png: cannot be read: No such file or directory"
    assert refusal("") == f"{tmp_path}: cannot be read: Is a directory"


@pytest.mark.parametrize(
    "recipe",
    [{}, {**RECIPE, "inputs": []}, {**RECIPE, "inputs": [{"name": "../m", "hash": "x"}]}, {**RECIPE, "command": 3}],
)
def test_recipes_of_strangers_are_checked(tmp_path: Path, recipe: dict[str, Any]) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(pictures(1)[0], recipe))
    with pytest.raises(FormatError, match="its recipe has"):
        read_recipe_of_png(tmp_path / "a.png")


def test_a_bomb_in_a_text_chunk_is_refused(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_text("weightops", json.dumps({**RECIPE, "prompt": "0" * (8 << 20)}), zip=True)
    pictures(1)[0].save(tmp_path / "a.png", pnginfo=texts)
    with pytest.raises(FormatError):
        read_recipe_of_png(tmp_path / "a.png")


def test_parameters_are_in_the_form_that_other_programs_read() -> None:
    row = {
        "prompt": "a cat", "negative": "blurred", "seed": 4, "steps": 20, "guidance": 7.5, "size": [512, 768],
        "model": "sd15",
    }  # fmt: skip
    loras = [("style", 0.8, "0123456789ab"), ("odd, name", 1.0, "")]
    assert parameters_of(row, sampler="DPM++ 2M", schedule="Karras", loras=loras) == (
        "a cat <lora:style:0.8> <lora:odd, name:1>\n"
        "Negative prompt: blurred\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 4, Size: 512x768, Model: sd15, "
        f'RNG: CPU, Lora hashes: "style: 0123456789ab", Version: weightops {__version__}'
    )
    flux = {**row, "negative": None, "guidance": 3.5, "true_guidance": 1.0, "model": "flux, dev"}
    assert parameters_of(flux, sampler="Euler", schedule="", loras=[]) == (
        "a cat\nSteps: 20, Sampler: Euler, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 4, Size: 512x768, "
        f'Model: "flux, dev", RNG: CPU, Version: weightops {__version__}'
    )
