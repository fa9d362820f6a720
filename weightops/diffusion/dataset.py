"""What is learnt from: pictures with their captions or one prompt, and how a picture is brought to the size asked for.

Knows nothing of models.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weightops.diffusion.captions import clean, read_captions
from weightops.diffusion.pictures import find_pictures, open_picture
from weightops.errors import UsageError, listing, printable, quote

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from weightops.diffusion.pictures import Picture

_NAMED = 5  # broken pictures whose reasons are said


@dataclass(frozen=True, slots=True)
class Example:
    """A picture and the words for it. prior: a picture of the class that prior preservation keeps as it is."""

    picture: Picture
    caption: str
    prior: bool = False


@dataclass(frozen=True, slots=True)
class Examples:
    """The examples in the order of their names, those of the class after the others.

    data_hash: of names, bytes, captions and which ones are prior; not of the place. tags: how many captions, the
    class prompt not counted, have each of the parts between commas, the most frequent first.
    """

    examples: tuple[Example, ...]
    data_hash: str
    tags: Mapping[str, int]
    folder: Path
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Framing:
    """The size that pictures are brought to. resolution: height and width.

    center_crop: the middle is kept, and otherwise a part that is drawn. flip: the mirrored picture stands beside
    each as a second variant of it.
    """

    resolution: tuple[int, int]
    center_crop: bool = False
    flip: bool = False

    @property
    def variants(self) -> int:
        return 2 if self.flip else 1


# ------------------------------------------------------------------------------------------------ reading


def read_examples(
    folder: str | os.PathLike[str],
    *,
    where: str,
    prompt: str | None = None,
    class_folder: str | os.PathLike[str] | None = None,
    class_prompt: str | None = None,
    limit: int | None = None,
) -> Examples:
    """The pictures of a folder with their captions, or all with the one `prompt`; at most `limit`, by name.

    where: what begins an error's message. class_folder, class_prompt: pictures of the class and the words for all of
    them. A picture that cannot be decoded is left out, and a warning names it. Raises UsageError where there is no
    picture, where one has no caption, and for an empty prompt; FormatError where none can be decoded, or the table of
    captions is damaged.
    """
    if (class_folder is None) != (class_prompt is None):
        missing = "--class-prompt" if class_prompt is None else "--class-folder"
        raise UsageError(missing, "is missing: prior preservation takes pictures of the class and words for them")
    if limit is not None and limit < 1:
        raise UsageError(where, f"found a limit of {limit} pictures, expected 1 or more")
    instance = None if prompt is None else _words(prompt, "--instance-prompt")
    of_class = None if class_prompt is None else _words(class_prompt, "--class-prompt")
    warnings: list[str] = []
    pictures = _usable(folder, where, warnings)[:limit]
    if instance is None:
        captions = _captioned(folder, where, pictures, warnings)
    else:
        captions = {picture.name: instance for picture in pictures}
    examples = [Example(picture, captions[picture.name]) for picture in pictures]
    if class_folder is not None and of_class is not None:
        examples += [Example(p, of_class, prior=True) for p in _usable(class_folder, str(class_folder), warnings)]
    tags = Counter(tag for e in examples if not e.prior for tag in dict.fromkeys(_parts(e.caption)))
    ranked = dict(sorted(tags.items(), key=lambda item: (-item[1], item[0])))
    return Examples(tuple(examples), _hash(examples), ranked, Path(folder), tuple(warnings))


def _words(prompt: str, option: str) -> str:
    words = clean(prompt)
    if not words:
        raise UsageError(option, f"found {quote(prompt)}, expected words")
    return words


def _usable(folder: str | os.PathLike[str], where: str, warnings: list[str]) -> list[Picture]:
    """The pictures that can be decoded; refused where there is none."""
    found = find_pictures(folder, where=where)
    if found.broken:
        what = "a picture is broken and left out" if len(found.broken) == 1 else (
            f"{len(found.broken):,} pictures are broken and left out"
        )  # fmt: skip
        warnings.append(f"{printable(str(folder))}: {what}: {_reasons(found.broken)}")
    return found.pictures


def _reasons(broken: Sequence[tuple[str, str]]) -> str:
    said = "; ".join(f"{quote(name)} ({reason})" for name, reason in broken[:_NAMED])
    return said if len(broken) <= _NAMED else f"{said} (and {len(broken) - _NAMED:,} more)"


def _captioned(
    folder: str | os.PathLike[str], where: str, pictures: Sequence[Picture], warnings: list[str]
) -> Mapping[str, str]:
    found = read_captions(folder, pictures)
    if found.missing:
        what = f"{len(found.missing):,} of {len(pictures):,} pictures"
        what = "its one picture has" if len(pictures) == 1 else f"{what} {'has' if len(found.missing) == 1 else 'have'}"
        hint = f"weightops caption {printable(str(folder))} writes what is missing"
        raise UsageError(where, f"{what} no caption: {listing(found.missing)}", hint)
    warnings += found.warnings
    return found.texts


def _parts(caption: str) -> list[str]:
    return [part for piece in caption.split(",") if (part := piece.strip())]


def _hash(examples: Iterable[Example]) -> str:
    import xxhash

    hashed = xxhash.xxh3_128()
    # A length before each: no two sets of examples give the same bytes.
    for fields in sorted((e.picture.name, e.picture.digest, e.caption, str(e.prior)) for e in examples):
        for field in fields:
            data = field.encode()
            hashed.update(len(data).to_bytes(8, "little") + data)
    return "xxh3_128:" + hashed.hexdigest()


# ------------------------------------------------------------------------------------------------ framing


def framed(
    picture: Picture, framing: Framing, *, flipped: bool, crop: tuple[float, float]
) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
    """The picture at the framing's size: float32 [3, height, width] in −1 … 1; its own size; top and left of the crop.

    Scaled until it just covers the size (Lanczos, over all pixels beneath), cut, and mirrored if `flipped`. crop: where
    between the first and the last place that it may begin, each in 0 … 1 (1 left out), which center_crop does not look
    at. Sizes are height and width; the crop is in pixels of the scaled and, if `flipped`, mirrored picture, as SDXL is
    told it. Raises FormatError where the file has been changed to one that cannot be decoded.
    """
    import numpy as np
    import torch
    from PIL.Image import Resampling, Transpose

    image = open_picture(picture.path)
    original = image.height, image.width
    height, width = framing.resolution
    scale = max(height / image.height, width / image.width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if size != image.size:
        image = image.resize(size, Resampling.LANCZOS)
    top = _begin(image.height - height, crop[0], framing)
    left = _begin(image.width - width, crop[1], framing)
    beyond = image.width - width - left
    image = image.crop((left, top, left + width, top + height))
    if flipped:
        image, left = image.transpose(Transpose.FLIP_LEFT_RIGHT), beyond
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.float() / 255 * 2 - 1, original, (top, left)


def _begin(room: int, share: float, framing: Framing) -> int:
    return round(room / 2) if framing.center_crop else min(room, int(share * (room + 1)))


def enlarged(examples: Iterable[Example], framing: Framing) -> list[str]:
    """The names of the pictures that have fewer pixels than are asked for, and are scaled up."""
    height, width = framing.resolution
    return [e.picture.name for e in examples if e.picture.height < height or e.picture.width < width]
