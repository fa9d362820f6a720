"""Pictures and their words are found, counted, hashed and framed as is said of them; what is not there is named."""

from __future__ import annotations

import shutil
import warnings
from typing import TYPE_CHECKING

import numpy as np
import pytest

from weightops.diffusion.dataset import Framing, enlarged, framed, read_examples
from weightops.diffusion.pictures import find_pictures
from weightops.diffusion.sprites import sprites
from weightops.errors import WeightopsError

if TYPE_CHECKING:
    from pathlib import Path

torch = pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")
torch.set_num_threads(1)


def drawn(path: Path, width: int, height: int) -> Path:
    """A picture in which no two rows, columns or halves are alike."""
    y, x = np.mgrid[0:height, 0:width]
    values = np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x * 7 + y * 13) % 256], axis=-1)
    Image.fromarray(values.astype(np.uint8)).save(path)
    return path


def table(folder: Path, captions: dict[str, str]) -> None:
    lines = ["file_name,caption", *(f'{name},"{words}"' for name, words in captions.items())]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "data"
    made.mkdir()
    for name, width, height in (("b.png", 40, 30), ("a.png", 64, 64), ("c.png", 30, 80)):
        drawn(made / name, width, height)
    table(made, {"a.png": "a cat, red, sitting", "b.png": "a dog, red", "c.png": "red, a cat, red"})
    return made


# ------------------------------------------------------------------------------------------------ reading


def test_examples_are_the_pictures_by_name_with_their_captions(folder: Path) -> None:
    found = read_examples(folder, where="DIR")
    assert [(e.picture.name, e.caption, e.prior) for e in found.examples] == [
        ("a.png", "a cat, red, sitting", False),
        ("b.png", "a dog, red", False),
        ("c.png", "red, a cat, red", False),
    ]
    assert found.folder == folder
    assert found.warnings == ()
    assert [e.picture.name for e in read_examples(folder, where="DIR", limit=2).examples] == ["a.png", "b.png"]


def test_tags_count_captions_and_the_most_frequent_come_first(folder: Path) -> None:
    tags = read_examples(folder, where="DIR").tags
    assert list(tags.items()) == [("red", 3), ("a cat", 2), ("a dog", 1), ("sitting", 1)]


def test_one_prompt_stands_for_all_and_needs_no_caption(folder: Path) -> None:
    (folder / "metadata.csv").unlink()
    found = read_examples(folder, where="DIR", prompt=" a photo of  sks dog ")
    assert {e.caption for e in found.examples} == {"a photo of sks dog"}
    assert found.tags == {"a photo of sks dog": 3}


def test_pictures_of_the_class_come_after_the_others_and_count_as_no_tags(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    drawn(tmp_path / "class" / "0.png", 20, 20)
    found = read_examples(folder, where="DIR", prompt="sks", class_folder=tmp_path / "class", class_prompt="a dog")
    assert [(e.picture.name, e.caption, e.prior) for e in found.examples][-2:] == [
        ("c.png", "sks", False),
        ("0.png", "a dog", True),
    ]
    assert found.tags == {"sks": 3}
    assert found.data_hash != read_examples(folder, where="DIR", prompt="sks").data_hash


def test_the_hash_is_of_what_is_learnt_and_not_of_where_it_lies(folder: Path, tmp_path: Path) -> None:
    first = read_examples(folder, where="DIR").data_hash
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    assert read_examples(moved, where="other").data_hash == first
    assert first.startswith("xxh3_128:")
    table(moved, {"a.png": "a cat, red, sitting", "b.png": "a dog, blue", "c.png": "red, a cat, red"})
    assert read_examples(moved, where="DIR").data_hash != first
    table(moved, {"a.png": "a cat, red, sitting", "b.png": "a dog, red", "c.png": "red, a cat, red"})
    assert read_examples(moved, where="DIR").data_hash == first
    drawn(moved / "b.png", 40, 31)
    assert read_examples(moved, where="DIR").data_hash != first
    shutil.copy(folder / "b.png", moved / "b.png")
    (moved / "c.png").rename(moved / "d.png")
    table(moved, {"a.png": "a cat, red, sitting", "b.png": "a dog, red", "d.png": "red, a cat, red"})
    assert read_examples(moved, where="DIR").data_hash != first


def test_the_hash_tells_pictures_of_the_class_from_the_others(tmp_path: Path) -> None:
    for name, width in (("a", 20), ("b", 21)):
        (tmp_path / name).mkdir()
        drawn(tmp_path / name / f"{name}.png", width, 20)
    one, other = (
        read_examples(tmp_path / name, where="DIR", prompt="x", class_folder=tmp_path / kept, class_prompt="x")
        for name, kept in ("ab", "ba")
    )
    assert {e.picture.name for e in one.examples} == {e.picture.name for e in other.examples}
    assert one.data_hash != other.data_hash


def test_a_broken_picture_is_left_out_and_named(folder: Path) -> None:
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:-40])
    found = read_examples(folder, where="DIR")
    assert [e.picture.name for e in found.examples] == ["a.png", "c.png"]
    assert len(found.warnings) == 1
    assert "a picture is broken and left out: 'b.png' (truncated" in found.warnings[0]


def refused(*words: object, **more: object) -> WeightopsError:
    with pytest.raises(WeightopsError) as told:
        read_examples(*words, **more)  # type: ignore[arg-type]
    assert "\n" not in str(told.value)
    return told.value


def test_what_is_not_there_is_refused_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no image" in str(refused(empty, where="DIR"))
    assert "no such folder" in str(refused(tmp_path / "nowhere", where="DIR"))
    (empty / "x.png").write_bytes(b"no picture at all")
    assert "'x.png': no image" in str(refused(empty, where="DIR"))


def test_pictures_without_captions_are_counted_and_five_are_named(tmp_path: Path) -> None:
    made = sprites(tmp_path / "sprites", count=8, size=16, captions=False)
    (made / "sprite-003.txt").write_text("a ball")
    told = refused(made, where="DIR")
    names = ", ".join(f"'sprite-{n:03d}.png'" for n in (0, 1, 2, 4, 5))
    assert str(told) == f"DIR: 7 of 8 pictures have no caption: {names} (and 2 more)"
    assert told.hint == f"weightops caption {made} writes what is missing"
    assert told.exit_code == 2
    assert len(read_examples(made, where="DIR", prompt="a sprite").examples) == 8
    for path in made.glob("sprite-00[1-7].png"):
        path.unlink()
    assert str(refused(made, where="DIR")) == "DIR: its one picture has no caption: 'sprite-000.png'"


def test_prompts_without_words_and_half_of_a_prior_are_refused(folder: Path) -> None:
    assert str(refused(folder, where="DIR", prompt=" \n")) == "--instance-prompt: found ' \\n', expected words"
    told = refused(folder, where="DIR", prompt="sks", class_folder=folder, class_prompt="")
    assert str(told) == "--class-prompt: found '', expected words"
    assert str(refused(folder, where="DIR", prompt="sks", class_folder=folder)).startswith("--class-prompt: is missing")
    assert str(refused(folder, where="DIR", prompt="sks", class_prompt="a")).startswith("--class-folder: is missing")
    assert str(refused(folder, where="DIR", limit=0)) == "DIR: found a limit of 0 pictures, expected 1 or more"


# ------------------------------------------------------------------------------------------------ framing

MIDDLE = (0.5, 0.5)


def picture(path: Path) -> object:
    return next(p for p in find_pictures(path.parent).pictures if p.name == path.name)


def test_a_picture_of_the_size_is_its_pixels(tmp_path: Path) -> None:
    path = drawn(tmp_path / "a.png", 32, 16)
    pixels, original, crop = framed(picture(path), Framing((16, 32), True), flipped=False, crop=MIDDLE)
    expected = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)
    assert pixels.dtype == torch.float32
    assert pixels.min() == -1
    assert pixels.max() == 1
    assert (original, crop) == ((16, 32), (0, 0))


@pytest.mark.parametrize("center", [True, False])
def test_the_mirrored_variant_is_the_mirror_image_and_its_crop_is_counted_from_the_other_side(
    tmp_path: Path, center: bool
) -> None:
    path = drawn(tmp_path / "a.png", 41, 29)
    framing = Framing((16, 16), center)
    plain, _, (top, left) = framed(picture(path), framing, flipped=False, crop=(0.2, 0.2))
    mirrored, _, (again, beyond) = framed(picture(path), framing, flipped=True, crop=(0.2, 0.2))
    assert not torch.equal(plain, mirrored)
    assert torch.equal(mirrored.flip(2), plain)
    assert top == again
    assert left + 16 + beyond == 23  # 41 × 29 is scaled to 23 × 16
    assert left != beyond


@pytest.mark.parametrize(
    ("width", "height", "resolution", "scaled", "middle"),
    [
        (100, 60, (32, 32), (53, 32), (0, 10)),
        (60, 100, (32, 32), (32, 53), (10, 0)),
        (20, 10, (32, 32), (64, 32), (0, 16)),
        (64, 64, (16, 48), (48, 48), (16, 0)),
        (100, 33, (32, 96), (97, 32), (0, 0)),
    ],
)
def test_the_shorter_side_is_scaled_and_the_middle_is_kept(
    tmp_path: Path,
    width: int,
    height: int,
    resolution: tuple[int, int],
    scaled: tuple[int, int],
    middle: tuple[int, int],
) -> None:
    path = drawn(tmp_path / "a.png", width, height)
    pixels, original, crop = framed(picture(path), Framing(resolution, True), flipped=False, crop=(0.0, 0.9))
    whole = Image.open(path).resize(scaled, Image.Resampling.LANCZOS)
    (high, wide), (top, left) = resolution, middle
    part = whole.crop((left, top, left + wide, top + high))
    expected = torch.from_numpy(np.array(part)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)
    assert (original, crop) == ((height, width), middle)


def test_a_drawn_crop_lies_where_it_says_and_reaches_both_ends(tmp_path: Path) -> None:
    path = drawn(tmp_path / "a.png", 20, 16)
    framing = Framing((16, 16))
    whole = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 127.5 - 1
    seen = set()
    for share in np.linspace(0, 1, 50, endpoint=False):
        pixels, _, (top, left) = framed(picture(path), framing, flipped=False, crop=(0.99, float(share)))
        torch.testing.assert_close(pixels, whole[:, top : top + 16, left : left + 16], atol=1e-6, rtol=0)
        seen.add((top, left))
    assert seen == {(0, left) for left in range(5)}


def test_fine_patterns_do_not_alias_when_they_are_scaled_down(tmp_path: Path) -> None:
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    pixels, *_ = framed(picture(tmp_path / "a.png"), Framing((16, 16), True), flipped=False, crop=MIDDLE)
    assert pixels.abs().max() < 0.1  # grey, all over


def test_pictures_that_have_too_few_pixels_are_named(folder: Path) -> None:
    examples = read_examples(folder, where="DIR").examples
    assert enlarged(examples, Framing((31, 31))) == ["b.png", "c.png"]
    assert enlarged(examples, Framing((30, 30))) == []


def test_reading_warns_of_nothing_on_the_way(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for example in read_examples(folder, where="DIR").examples:
            framed(example.picture, Framing((16, 16)), flipped=True, crop=(0.3, 0.6))


def test_a_picture_that_was_broken_since_is_refused_by_name(folder: Path) -> None:
    example = read_examples(folder, where="DIR").examples[0]
    example.picture.path.write_bytes(b"")
    with pytest.raises(WeightopsError, match=r"a\.png: empty, of 0 bytes"):
        framed(example.picture, Framing((16, 16)), flipped=False, crop=MIDDLE)
