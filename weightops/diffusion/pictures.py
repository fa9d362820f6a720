"""The images of a folder: found, each wholly decoded once, upright in RGB; which are broken, alike or tiny.

Knows nothing of captions. An image is what one of a few decoders reads, whatever the file is called.
"""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from weightops.diffusion.extras import need, unwarned
from weightops.engine.run import Progress, ignore, usable_cores
from weightops.errors import FormatError, UsageError, listing, printable, quote

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# No more decoders than these: among Pillow's others is one that starts a program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# What stands beside the images of a training set: captions, cached latents.
BESIDE = (".caption", ".npz", ".txt")
METADATA = ("metadata.csv", "metadata.jsonl")

SMALLEST = 256  # pixels of the shorter side, below which an image is called tiny
NEAR = 4  # bits of 64

_LOOK = (9, 8)  # columns and rows of the little picture by which images are compared
_FLAT = 8  # of 255: with less between its darkest and its lightest, the little picture has no structure to compare
_SAME_COLOUR = 32  # of 255, on average over red, green and blue

# EXIF orientation -> the transposition that sets the image upright.
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_ORIENTATION = 0x0112

# How files begin that are often found under an image's name: the place, the bytes in lower case, what it is.
_STARTS = (
    (0, b"<!doctype html", "a web page"),
    (0, b"<html", "a web page"),
    (0, b"<?xml", "XML text"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"{", "JSON text"),
    (0, b"%pdf", "a PDF document"),
    (0, b"%!ps", "a PostScript document"),
    (0, b"pk\x03\x04", "a ZIP archive"),
    (0, b"version https://git-lfs", "a Git LFS pointer without its file"),
    (4, b"ftypavif", "an AVIF image"),
    (4, b"ftypheic", "an HEIC image"),
    (4, b"ftypmif1", "an HEIC image"),
    (4, b"ftyp", "a video"),
)


@dataclass(frozen=True, slots=True)
class Picture:
    """An image that can be decoded. name: its path within the folder, with slashes; width, height: upright.

    digest: of the file's bytes; look: the image at 9×8 in RGB, row by row.
    """

    path: Path
    name: str
    width: int
    height: int
    nbytes: int
    digest: str = field(repr=False)
    look: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Found:
    """What a folder holds, by name: images, (name, reason) of those that cannot be used, and other files."""

    pictures: list[Picture]
    broken: list[tuple[str, str]]
    ignored: list[str]


def find_pictures(folder: str | os.PathLike[str], *, where: str | None = None, on_progress: Progress = ignore) -> Found:
    """All images below `folder`, by name, each decoded to its end; hidden files and folders are left out.

    where: what begins an error's message (None: the folder). Links to folders are not followed. on_progress counts
    images. Raises UsageError where there is no such folder, or no image in it; FormatError where all are broken.
    """
    root = Path(folder)
    where = str(folder) if where is None else where
    need(where, "PIL")
    names, folders, ignored = _listed(root, where)
    looked: list[Picture | str] = []
    workers = min(4, usable_cores())  # each holds an image, of up to a few hundred MB
    with unwarned(), ThreadPoolExecutor(workers) as pool:
        try:
            for look in pool.map(lambda name: _look(root, name), names):
                looked.append(look)
                on_progress(len(looked), len(names))
        except BaseException:  # Ctrl-C waits for the images at hand, and not for all
            pool.shutdown(cancel_futures=True)
            raise
    pictures = [look for look in looked if isinstance(look, Picture)]
    broken = folders + [(name, look) for name, look in zip(names, looked, strict=True) if isinstance(look, str)]
    if broken and not pictures:
        name, reason = broken[0]
        raise FormatError(where, f"none of its images can be used ({len(broken):,}); {quote(name)}: {reason}")
    if not pictures:
        found = f": found {listing(ignored)}" if ignored else ""
        raise UsageError(where, f"holds no image{found}", f"images are {', '.join(s[1:] for s in SUFFIXES)}")
    return Found(pictures, sorted(broken), sorted(ignored))


def open_picture(path: str | os.PathLike[str]) -> Image:
    """The image in RGB: upright, the first frame, on white where it is transparent. Raises FormatError.

    16-bit greys are scaled, palettes and CMYK converted; colour profiles are not applied.
    """
    try:
        with unwarned(), Path(path).open("rb") as file:
            return _decode(file)
    except _BrokenError as e:
        raise FormatError(str(path), str(e)) from None
    except OSError as e:
        raise FormatError(str(path), f"cannot be read: {e.strerror}") from None


def near_duplicates(pictures: Sequence[Picture], near: int = NEAR) -> list[tuple[str, str, int]]:
    """(name, name of another, distance): each image with the first that it looks like, if there is one.

    The distance is that of two 64-bit difference hashes, at most `near`; and at most as many cells may be of another
    colour. Of images without structure only equal files are duplicates. Mirrored and cropped ones are not found.
    Source: the difference hash is N. Krawetz's "Kind of Like That" (2013): is each cell of a 9×8 grey picture darker
    than the next one of its row?
    """
    import numpy as np

    first: dict[str, Picture] = {}
    found = [(first[p.digest].name, p.name, 0) for p in pictures if first.setdefault(p.digest, p) is not p]
    once = list(first.values())
    if not once:
        return found
    looks = np.frombuffer(b"".join(p.look for p in once), np.uint8).reshape(len(once), -1, 3)
    greys = (looks @ np.array([0.299, 0.587, 0.114])).reshape(len(once), _LOOK[1], _LOOK[0])
    structured = np.ptp(greys, axis=(1, 2)) >= _FLAT
    once = [p for p, has in zip(once, structured, strict=True) if has]
    greys, colours = greys[structured], looks[structured].astype(np.int16)
    bits = np.packbits((greys[:, :, 1:] > greys[:, :, :-1]).reshape(len(once), 64), axis=1)
    hashes = bits.view(np.uint64)[:, 0]
    for place in range(1, len(once)):
        distances = _count_bits(hashes[:place] ^ hashes[place])
        alike = np.flatnonzero(distances <= near)
        for begin in range(0, alike.size, 64):  # mostly the first will do
            some = alike[begin : begin + 64]
            # One shape in two colours is two images.
            apart = np.abs(colours[some] - colours[place]).mean(axis=2) > _SAME_COLOUR
            same = some[apart.sum(axis=1) <= near]
            if same.size:
                found.append((once[same[0]].name, once[place].name, int(distances[same[0]])))
                break
    return sorted(found)


def tiny(pictures: Sequence[Picture], smallest: int = SMALLEST) -> list[Picture]:
    """Those whose shorter side has fewer than `smallest` pixels."""
    return [p for p in pictures if min(p.width, p.height) < smallest]


def _count_bits(words: np.ndarray) -> np.ndarray:
    """How many bits of each 64-bit word are set: sums of neighbours, of pairs, of nibbles, of bytes."""
    import numpy as np

    ones, twos, fours, every = (
        np.uint64(0x0101010101010101 * byte) for byte in (0x55, 0x33, 0x0F, 0x01)
    )  # fmt: skip
    words = words - ((words >> np.uint64(1)) & ones)
    words = (words & twos) + ((words >> np.uint64(2)) & twos)
    words = (words + (words >> np.uint64(4))) & fours
    return (words * every) >> np.uint64(56)


# ------------------------------------------------------------------------------------------------ the folder


def _listed(root: Path, where: str) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """Names of what may be images, folders that cannot be looked into or bear an image's name, and other files."""
    shown = "" if where == str(root) else f" {quote(str(root))}"
    if not os.path.isdir(root):  # noqa: PTH112 - pathlib's raises for what it may not look at
        if os.path.lexists(root):
            raise UsageError(where, f"no folder{shown}, expected one with images")
        raise UsageError(where, f"no such folder{shown}")
    names: list[str] = []
    broken: list[tuple[str, str]] = []
    ignored: list[str] = []

    def unread(e: OSError) -> None:
        if Path(e.filename) == root:
            raise UsageError(where, f"the folder{shown} cannot be read: {e.strerror}")
        broken.append((Path(e.filename).relative_to(root).as_posix(), f"cannot be read: {e.strerror}"))

    for place, folders, files in os.walk(root, onerror=unread):
        above = Path(place).relative_to(root)
        entered = []
        for folder in sorted(folders):
            name = (above / folder).as_posix()
            if _hidden(folder):
                continue
            if Path(folder).suffix.lower() in SUFFIXES:
                broken.append((name, "a folder, expected an image"))
            elif (Path(place) / folder).is_symlink():
                ignored.append(f"{name}/")
            else:
                entered.append(folder)
        folders[:] = entered
        for file in files:
            name, suffix = (above / file).as_posix(), Path(file).suffix.lower()
            if _hidden(file) or suffix in BESIDE or file in METADATA:
                continue
            (names if suffix in SUFFIXES else ignored).append(name)
    return sorted(names), broken, ignored


def _hidden(name: str) -> bool:
    # datasets leaves out both; __MACOSX is what some archives bring.
    return name.startswith((".", "__"))


def _look(root: Path, name: str) -> Picture | str:
    """The image, or in words why it is none."""
    from PIL.Image import Resampling

    path = root / name
    try:
        name.encode()
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for ever
            return "a pipe, a socket or a device, expected an image"
        with path.open("rb") as file:
            image = _decode(file)
            file.seek(0)
            digest = _digest(file)
    except UnicodeEncodeError:
        return "its name is not UTF-8, so that no table can name it"
    except _BrokenError as e:
        return str(e)
    except FileNotFoundError:
        return "a link to nothing"
    except OSError as e:
        return f"cannot be read: {e.strerror}"
    look = image.resize(_LOOK, Resampling.BOX).tobytes()
    return Picture(path, name, *image.size, info.st_size, digest, look)


def _digest(file: BinaryIO) -> str:
    import xxhash

    hashed = xxhash.xxh3_128()
    while piece := file.read(1 << 20):
        hashed.update(piece)
    return hashed.hexdigest()


# ------------------------------------------------------------------------------------------------ one image


class _BrokenError(Exception):
    """In words, why a file is no image."""


def _decode(file: BinaryIO) -> Image:
    """The whole image, as open_picture says. Raises _BrokenError, and OSError where the file cannot be read."""
    try:
        with _recognised(file) as image:
            image.load()
            return _rgb(_upright(image))
    except _BrokenError:
        raise
    except MemoryError:
        raise _BrokenError("too large for the memory there is") from None
    except Exception as e:  # decoders raise of everything; whatever it is, the file is at fault
        if isinstance(e, OSError) and e.errno is not None:
            raise
        said = " ".join(str(e).split())
        if "truncated" in said or isinstance(e, EOFError):
            raise _BrokenError("truncated: its data end before the image does") from None
        raise _BrokenError(f"cannot be decoded: {printable(said[:120]) or type(e).__name__}") from None


def _recognised(file: BinaryIO) -> ImageFile:
    """The image, of which only the header is read. Its size is checked here, for Pillow's own opening only warns."""
    from PIL import (  # noqa: F401 - each registers itself
        BmpImagePlugin,
        GifImagePlugin,
        Image,
        JpegImagePlugin,
        PngImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )

    start = file.read(32)
    if not start:
        raise _BrokenError("empty, of 0 bytes")
    for name in FORMATS:
        factory, accepts = Image.OPEN[name]
        if accepts is not None and accepts(start) is True:
            file.seek(0)
            image = factory(file, "")
            limit, pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
            if limit is not None and pixels > limit:
                size = f"{image.width:,} × {image.height:,} = {pixels:,} pixels"
                raise _BrokenError(f"{size}, expected at most {limit:,} (a decompression bomb?)")
            return image
    lower = start.lower().lstrip(b"\xef\xbb\xbf \t\r\n")
    kind = next((kind for place, text, kind in _STARTS if lower[place:].startswith(text)), "no image")
    raise _BrokenError(f"{kind}, expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


def _upright(image: Image) -> Image:
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(_ORIENTATION)  # after loading: a PNG may have it at its end
    except Exception:  # whatever is wrong with a camera's notes, the image itself is whole
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(Transpose[turn])


def _rgb(image: Image) -> Image:
    """8-bit RGB of any mode. 16-bit greys are scaled to 255, floats from 1 if none is larger."""
    import numpy as np
    from PIL import Image as images

    if image.mode == "I" or image.mode.startswith("I;"):
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) // 257
        image = images.fromarray(grey.astype(np.uint8))
    elif image.mode == "F":
        light = np.nan_to_num(np.asarray(image))
        light = light * 255 if light.max() <= 1 else light
        image = images.fromarray(light.clip(0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        seen = image.convert("RGBA")
        image = images.new("RGB", image.size, "white")
        image.paste(seen, mask=seen.getchannel("A"))
    return image.convert("RGB")
