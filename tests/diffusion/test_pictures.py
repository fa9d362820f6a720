"""Images are found, wholly decoded and set upright; what cannot be used has its reason, and what is alike is found."""

from __future__ import annotations

import io
import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from weightops.diffusion.pictures import Picture, find_pictures, near_duplicates, open_picture, tiny
from weightops.diffusion.pictures import _count_bits as count_bits
from weightops.errors import FormatError, UsageError, WeightopsError

if TYPE_CHECKING:
    from collections.abc import Callable

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")

LISTED = "BMP, GIF, JPEG, PNG, TIFF or WEBP"


def drawing(width: int = 96, height: int = 64, seed: int = 0) -> Any:
    """A picture without symmetry: a few grey squares of chance on a slope of colours."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    found = np.stack([x * 200 // width, y * 200 // height, (x + y) % 200], axis=-1).astype(np.uint8)
    for left, top, value in zip(*(rng.integers(0, n, 12) for n in (width, height, 256)), strict=True):
        found[top : top + height // 4, left : left + width // 4] = value
    return Image.fromarray(found)


# ------------------------------------------------------------------------------------------------ the folder


def test_images_are_found_below_the_folder_by_name(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    for name in ("z.PNG", "a.jpeg", "b/deep/c.webp", "b/a.Tif", "m.gif", "n.bmp"):
        drawing().save(tmp_path / name)
    found = find_pictures(tmp_path)
    assert [p.name for p in found.pictures] == ["a.jpeg", "b/a.Tif", "b/deep/c.webp", "m.gif", "n.bmp", "z.PNG"]
    assert {(p.width, p.height) for p in found.pictures} == {(96, 64)}
    assert all(p.path == tmp_path / p.name and p.nbytes == p.path.stat().st_size for p in found.pictures)
    assert (found.broken, found.ignored) == ([], [])


def test_other_files_are_named_but_for_those_that_belong_there(tmp_path: Path) -> None:
    drawing().save(tmp_path / "a.png")
    beside = ("a.txt", "a.npz", "a.caption", "metadata.csv", "metadata.jsonl")
    for name in (*beside, "notes.md", "b.heic", ".hidden.png", ".DS_Store"):
        (tmp_path / name).write_text("?")
    for folder in (".cache", "__MACOSX"):
        (tmp_path / folder).mkdir()
        drawing().save(tmp_path / folder / "b.png")
    found = find_pictures(tmp_path)
    assert ([p.name for p in found.pictures], found.broken) == (["a.png"], [])
    assert found.ignored == ["b.heic", "notes.md"]


@pytest.mark.skipif(sys.platform == "win32", reason="links ask for a privilege")
def test_links_to_folders_are_named_and_not_followed(tmp_path: Path) -> None:
    drawing().save(tmp_path / "a.png")
    (tmp_path / "round").symlink_to(tmp_path)
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    found = find_pictures(tmp_path)
    assert ([p.name for p in found.pictures], found.ignored) == (["a.png", "b.png"], ["round/"])


def cut(name: str, **how: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        whole = io.BytesIO()
        drawing().save(whole, name, **how)
        path.write_bytes(whole.getvalue()[: len(whole.getvalue()) * 2 // 3])

    return make


def text(words: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(words) and None


TRUNCATED = "truncated: its data end before the image does"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "avif.jpg": (text(b"\0\0\0\x1cftypavif"), f"an AVIF image, expected {LISTED}"),
    "cut.bmp": (cut("BMP"), TRUNCATED),
    "cut.gif": (cut("GIF"), TRUNCATED),
    "cut.jpg": (cut("JPEG"), TRUNCATED),
    "cut.png": (cut("PNG"), TRUNCATED),
    "cut.tif": (cut("TIFF"), TRUNCATED),
    "cut.webp": (cut("WEBP"), "cannot be decoded: could not create decoder object"),
    "eps.png": (text(b"%!PS-Adobe-3.0 EPSF-3.0\n"), f"a PostScript document, expected {LISTED}"),
    "folder.png": (Path.mkdir, "a folder, expected an image"),
    "head.png": (text(b"\x89PNG\r\n\x1a\n"), "cannot be decoded: "),
    "link.png": (lambda path: path.symlink_to("nothing"), "a link to nothing"),
    "noise.jpg": (text(bytes(range(256))), f"no image, expected {LISTED}"),
    "page.jpg": (text(b"\n <!DOCTYPE HTML><html>404</html>"), f"a web page, expected {LISTED}"),
    "pipe.png": (lambda path: os.mkfifo(path), "a pipe, a socket or a device, expected an image"),
    "svg.png": (text(b"\xef\xbb\xbf<svg xmlns='x'/>"), f"an SVG drawing, expected {LISTED}"),
    "zero.png": (text(b""), "empty, of 0 bytes"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes there")
def test_every_broken_image_has_its_reason(tmp_path: Path) -> None:
    drawing().save(tmp_path / "good.png")
    for name, (make, _) in BROKEN.items():
        make(tmp_path / name)
    found = find_pictures(tmp_path)
    assert [p.name for p in found.pictures] == ["good.png"]
    assert [name for name, _ in found.broken] == list(BROKEN)
    for (name, reason), (_, expected) in zip(found.broken, BROKEN.values(), strict=True):
        assert reason == expected or (expected.endswith(": ") and reason.startswith(expected)), name


@pytest.mark.parametrize("pixels", [96 * 64 - 1, 96 * 64 // 2 - 1], ids=["warned of by Pillow", "refused by Pillow"])
def test_a_decompression_bomb_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: int
) -> None:
    drawing().save(tmp_path / "bomb.png")
    drawing(8, 8).save(tmp_path / "good.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    said = f"96 × 64 = 6,144 pixels, expected at most {pixels:,} (a decompression bomb?)"
    assert find_pictures(tmp_path).broken == [("bomb.png", said)]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # Pillow's own word for: no limit
    assert find_pictures(tmp_path).broken == []


def test_what_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing().save(tmp_path / "a.png")
    drawing().save(tmp_path / "mine.png")
    real = Path.open

    def refused(path: Path, *given: Any, **more: Any) -> Any:
        if path.name == "mine.png":
            raise PermissionError(13, "Permission denied")
        return real(path, *given, **more)

    monkeypatch.setattr(Path, "open", refused)
    assert find_pictures(tmp_path).broken == [("mine.png", "cannot be read: Permission denied")]
    with pytest.raises(FormatError, match=r"mine\.png: cannot be read: Permission denied"):
        open_picture(tmp_path / "mine.png")


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes there")
def test_a_name_that_no_table_can_hold_is_named(tmp_path: Path) -> None:
    drawing().save(tmp_path / "a.png")
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes((tmp_path / "a.png").read_bytes())
    assert find_pictures(tmp_path).broken == [("\udcff.png", "its name is not UTF-8, so that no table can name it")]


@pytest.mark.parametrize(
    ("make", "place", "kind", "message", "hint"),
    [
        (lambda _: None, "no", UsageError, "{}: no such folder", None),
        (lambda f: (f / "a").write_text("x"), "a", UsageError, "{}: no folder, expected one with images", None),
        (lambda _: None, "", UsageError, "{}: holds no image",
         "images are bmp, gif, jpeg, jpg, png, tif, tiff, webp"),
        (lambda f: (f / "b.heic").write_text("x"), "", UsageError, "{}: holds no image: found 'b.heic'",
         "images are bmp, gif, jpeg, jpg, png, tif, tiff, webp"),
        (lambda f: (f / "a.png").write_text("<html>"), "", FormatError,
         f"{{}}: none of its images can be used (1); 'a.png': a web page, expected {LISTED}", None),
    ],
)  # fmt: skip
def test_a_folder_without_images_is_refused(
    tmp_path: Path, make: Callable[[Path], Any], place: str, kind: type[WeightopsError], message: str, hint: str | None
) -> None:
    make(tmp_path)
    with pytest.raises(kind) as caught:
        find_pictures(tmp_path / place)
    assert (str(caught.value), caught.value.hint) == (message.format(tmp_path / place), hint)


def test_an_option_that_names_the_folder_begins_the_message(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--class-images: no such folder 'nowhere'$"):
        find_pictures("nowhere", where="--class-images")


def test_progress_counts_and_can_stop_it(tmp_path: Path) -> None:
    for number in range(5):
        drawing(8, 8, number).save(tmp_path / f"{number}.png")
    told: list[tuple[int, int]] = []
    find_pictures(tmp_path, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(n, 5) for n in range(1, 6)]

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_pictures(tmp_path, on_progress=stop)


# ------------------------------------------------------------------------------------------------ one image


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright_as_pillow_has_it(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    drawing(30, 20).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert expected.size == ((20, 30) if orientation >= 5 else (30, 20))
    found = open_picture(path)
    assert (found.mode, found.size, found.tobytes()) == ("RGB", expected.size, expected.tobytes())
    (picture,) = find_pictures(tmp_path).pictures
    assert (picture.width, picture.height) == expected.size


def test_notes_of_a_camera_that_cannot_be_read_do_not_spoil_the_image(tmp_path: Path) -> None:
    drawing().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff nonsense")
    assert open_picture(tmp_path / "a.jpg").size == (96, 64)


def one(image: Any, path: Path, **how: Any) -> list[tuple[int, int, int]]:
    """The first pixels of the first row, as they are read again."""
    image.save(path, **how)
    found = open_picture(path)
    assert found.mode == "RGB"
    return [tuple(int(v) for v in pixel) for pixel in np.asarray(found)[0, :3]]


def test_what_is_transparent_is_seen_on_white(tmp_path: Path) -> None:
    pixels = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)
    seen = [(255, 0, 0), (255, 255, 255), (127, 127, 127)]
    assert one(Image.fromarray(pixels), tmp_path / "rgba.png") == seen
    grey = Image.fromarray(np.array([[[9, 255], [9, 0], [0, 128]]], np.uint8), mode=None)
    assert one(grey, tmp_path / "la.png") == [(9, 9, 9), (255, 255, 255), (127, 127, 127)]
    palette = Image.new("P", (3, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putdata([0, 1, 1])
    expected = [(255, 255, 255), (10, 20, 30), (10, 20, 30)]
    assert one(palette, tmp_path / "p.png", transparency=0) == expected
    assert one(palette, tmp_path / "p.gif", transparency=0) == expected


def test_greys_of_16_bits_and_of_floats_are_scaled(tmp_path: Path) -> None:
    deep = Image.fromarray(np.array([[0, 128 * 257, 65535]], np.uint16))
    greys = [(0, 0, 0), (128, 128, 128), (255, 255, 255)]
    assert one(deep, tmp_path / "a.png") == greys
    assert one(deep, tmp_path / "a.tif") == greys
    assert one(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), tmp_path / "b.tif") == [
        (0, 0, 0), (127, 127, 127), (255, 255, 255),
    ]  # fmt: skip
    assert one(Image.fromarray(np.array([[0, 7, 300]], np.float32)), tmp_path / "c.tif") == [
        (0, 0, 0), (7, 7, 7), (255, 255, 255),
    ]  # fmt: skip


def test_other_modes_are_what_they_look_like(tmp_path: Path) -> None:
    assert one(Image.new("1", (3, 1), 1), tmp_path / "bits.png") == [(255, 255, 255)] * 3
    assert one(Image.new("L", (3, 1), 77), tmp_path / "grey.png") == [(77, 77, 77)] * 3
    (red, *_) = one(Image.new("RGB", (16, 16), "red").convert("CMYK"), tmp_path / "cmyk.jpg", quality=95)
    assert red[0] > 245
    assert max(red[1:]) < 10


# ------------------------------------------------------------------------------------------------ alike, tiny


def test_the_same_picture_in_other_sizes_and_codings_is_found(tmp_path: Path) -> None:
    whole = drawing(400, 300, seed=1)
    whole.save(tmp_path / "a.png")
    whole.resize((200, 150)).save(tmp_path / "b.jpg", quality=60)
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes())
    drawing(400, 300, seed=2).save(tmp_path / "d.png")
    ImageOps.mirror(whole).save(tmp_path / "e.png")
    found = near_duplicates(find_pictures(tmp_path).pictures)
    assert [(a, b) for a, b, _ in found] == [("a.png", "b.jpg"), ("a.png", "c.png")]
    assert 0 <= found[0][2] <= 4
    assert found[1][2] == 0


def test_plain_pictures_are_alike_only_if_their_files_are(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "red"), ("c", "blue")):
        Image.new("RGB", (50, 50), colour).save(tmp_path / f"{name}.png")
    Image.new("RGB", (60, 60), "red").save(tmp_path / "d.png")
    assert near_duplicates(find_pictures(tmp_path).pictures) == [("a.png", "b.png", 0)]


def test_one_shape_in_two_colours_is_two_pictures(tmp_path: Path) -> None:
    for name, colour in (("a", (200, 60, 60)), ("b", (60, 130, 60)), ("c", (205, 65, 60))):
        shape = Image.new("RGB", (64, 64), "white")
        shape.paste(colour, (8, 10, 50, 40))
        shape.save(tmp_path / f"{name}.png")
    assert [pair[:2] for pair in near_duplicates(find_pictures(tmp_path).pictures)] == [("a.png", "c.png")]


def test_pairs_are_those_of_all_distances_each_with_the_first_that_is_near() -> None:
    rng = np.random.default_rng(0)
    seen = rng.integers(0, 256, (300, 8, 9, 1), np.uint8).repeat(3, axis=3)
    for copy in range(100, 200):  # some with a few values changed
        seen[copy] = seen[copy - 100]
        places = rng.integers(0, 8, copy % 7), rng.integers(0, 9, copy % 7)
        seen[copy][places] = rng.integers(0, 256, (copy % 7, 1))
    pictures = [Picture(Path(f"{n:03}"), f"{n:03}", 9, 8, 1, str(n), s.tobytes()) for n, s in enumerate(seen)]
    greys = [s[:, :, 0].astype(int) for s in seen]
    bits = [[int(b > a) for row in g for a, b in itertools.pairwise(row)] for g in greys]
    expected = []
    for second in range(300):
        for first in range(second):
            distance = sum(a != b for a, b in zip(bits[first], bits[second], strict=True))
            if distance <= 4 and (abs(greys[first] - greys[second]) > 32).sum() <= 4:
                expected.append((f"{first:03}", f"{second:03}", distance))
                break
    assert len(expected) > 50
    assert near_duplicates(pictures) == sorted(expected)


def test_bits_are_counted_in_every_word() -> None:
    words = [0, 1, 2**63, 2**64 - 1, 0x5555555555555555, 0x123456789ABCDEF0]
    assert count_bits(np.array(words, np.uint64)).tolist() == [word.bit_count() for word in words]


def test_tiny_is_told_by_the_shorter_side(tmp_path: Path) -> None:
    drawing(300, 255).save(tmp_path / "a.png")
    drawing(256, 300).save(tmp_path / "b.png")
    found = find_pictures(tmp_path).pictures
    assert [p.name for p in tiny(found)] == ["a.png"]
    assert [p.name for p in tiny(found, 257)] == ["a.png", "b.png"]
    assert tiny(found, 0) == []
