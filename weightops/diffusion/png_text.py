"""What an image says of how it was made: a PNG's text chunks, written and read back. Makes no image itself.

Two chunks stand before the pixels: `parameters`, in the form of A1111's WebUI, which other programs read, and
`weightops`, a recipe as JSON, in the form of `weightops.lineage`. No paths and no dates stand in either.
"""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion.extras import need
from weightops.errors import FormatError, UsageError
from weightops.lineage import KEY, read_recipe

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image

PARAMETERS = "parameters"


def encode_png(image: Image, recipe: Mapping[str, Any], parameters: str = "") -> bytes:
    """The bytes of a PNG that carries its recipe: the same bytes for the same image, recipe and Pillow."""
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    if parameters:
        texts.add_text(PARAMETERS, parameters)
    texts.add_text(KEY, json.dumps(recipe, sort_keys=True, ensure_ascii=False))
    out = BytesIO()
    image.save(out, "PNG", pnginfo=texts, compress_level=6)
    return out.getvalue()


def read_recipe_of_png(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe that an image made by `weightops generate` carries. Raises UsageError and FormatError.

    It comes from a stranger's file: it has the form of a recipe, within bounds, and no more is sure of it.
    """
    label = str(path)
    text = read_texts(path).get(KEY)
    if text is None:
        raise FormatError(label, "carries no recipe of weightops", "other programs may have written the image anew")
    return read_recipe(text, label)


def read_texts(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text chunks before the pixels of a PNG. Raises UsageError and FormatError."""
    label = str(path)
    need(label, "PIL")
    from PIL import Image, UnidentifiedImageError

    try:
        with Path(path).open("rb") as file, Image.open(file, formats=("PNG",)) as image:
            return {str(key): str(value) for key, value in image.info.items() if isinstance(value, str)}
    except (FileNotFoundError, IsADirectoryError, PermissionError) as e:
        raise UsageError(label, f"cannot be read: {e.strerror}") from None
    except UnidentifiedImageError:
        raise FormatError(label, "is no PNG image") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as e:
        raise FormatError(label, f"is a damaged PNG image: {' '.join(str(e).split())[:100]}") from None


def parameters_of(
    row: Mapping[str, Any], *, sampler: str, schedule: str, loras: Sequence[tuple[str, float, str]]
) -> str:
    """The text that A1111's WebUI writes, and it and others read back.

    row: what is recorded of the image. sampler, schedule: as that program calls them. loras: name, strength, and the
    start of the SHA-256 of its tensors' bytes, "" where it is not known.
    Source: AUTOMATIC1111/stable-diffusion-webui, modules/infotext_utils.py and processing.py (create_infotext).
    """
    tags = "".join(f" <lora:{name}:{strength:g}>" for name, strength, _ in loras)
    lines = [f"{row['prompt']}{tags}"]
    if row.get("negative"):
        lines.append(f"Negative prompt: {row['negative']}")
    width, height = row["size"]
    fields: dict[str, object] = {"Steps": row["steps"], "Sampler": sampler}
    if schedule:
        fields["Schedule type"] = schedule
    # Where guidance is distilled into the model, the scale of the true one is 1 unless a negative prompt takes part.
    distilled = "true_guidance" in row
    guidance = row["true_guidance"] if distilled else row.get("guidance")
    if guidance is not None:
        fields["CFG scale"] = f"{guidance:g}"
    if distilled and row.get("guidance") is not None:
        fields["Distilled CFG Scale"] = f"{row['guidance']:g}"
    fields |= {"Seed": row["seed"], "Size": f"{width}x{height}", "Model": row["model"], "RNG": "CPU"}
    hashes = ", ".join(f"{name}: {digest}" for name, _, digest in loras if digest)
    if hashes:
        fields["Lora hashes"] = hashes
    fields["Version"] = f"weightops {__version__}"
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in fields.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """In quotes where the value itself holds what separates values."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(",:\n") else value
