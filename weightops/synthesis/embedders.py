"""Images as numbers: an embedder by its file or folder, and what it makes of pictures. Knows no LoRA and no space.

An image is cut to a square about its middle and brought to the embedder's size, in RGB from −1 to 1. Whether a face is
aligned in it is its owner's business.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.diffusion.extras import hushed, need
from weightops.errors import (
    FormatError,
    MismatchError,
    NetworkError,
    UsageError,
    ValueRefused,
    listing,
    printable,
    quote,
)
from weightops.files.hub import PREFIX, parse_address

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from PIL.Image import Image

    Run = Callable[[Sequence[Image]], np.ndarray]

LINEAR = "weightops_embedder"  # in the metadata of a linear map's file
_KINDS = "an .onnx file, a CLIP folder, or a linear map in a .safetensors file"
_BATCH = 16
_FACE = 112  # pixels, where an ONNX file does not say them: ArcFace and its kin
_CLIPS = ("clip", "clip_vision_model")


@dataclass(frozen=True, slots=True, eq=False)
class Embedder:
    """kind: onnx, clip or linear. size: the numbers it makes; names: of each. digest: XXH3-128 of its files.

    unit: its numbers say a direction, and are brought to length 1; those of a linear map mean what they say.
    """

    label: str
    kind: str
    size: int
    names: tuple[str, ...]
    digest: str
    unit: bool
    run: Run

    def embed(self, images: Sequence[Image]) -> np.ndarray:
        """The numbers of each image [n, size], float32. Raises ValueRefused."""
        import numpy as np

        parts = [self.run(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)]
        found = np.concatenate(parts) if parts else np.zeros((0, self.size))
        if not np.isfinite(found).all():
            raise ValueRefused(self.label, "makes NaN or Inf of an image")
        return np.asarray(_of_length_one(found) if self.unit else found, dtype=np.float32)

    def mean(self, images: Sequence[Image]) -> np.ndarray:
        """One condition of several images of the same [size], float64: their mean."""
        import numpy as np

        found = self.embed(images).astype(np.float64).mean(0)
        return np.asarray(_of_length_one(found[None])[0] if self.unit else found)


def embedder_of(path: str) -> Embedder:
    """The embedder of a file or folder, also hf://owner/name for CLIP. Raises WeightopsError.

    .onnx: one input of floats [n, 3, s, s] (s as it says, else 112), of which the first output counts. A folder:
    transformers' CLIPVisionModelWithProjection and its image processor. .safetensors: `weight` [c, 3·s·s] and `bias`
    [c] of a linear map of the pixels, row by row in each of red, green and blue; the metadata has its size and names.
    """
    need("--embedder", "numpy", "PIL", extra="synthesis")
    if path.startswith(PREFIX):
        return _clip(_fetched(path), path)
    place = Path(path)
    if place.is_dir():
        return _clip(place, path)
    if not place.is_file():
        raise UsageError(path, "no such file or folder", f"an embedder is {_KINDS}")
    if place.suffix.lower() == ".onnx":
        return _onnx(place, path)
    if place.suffix.lower() == ".safetensors":
        return _linear(place, path)
    raise UsageError(path, "is no embedder that is known by its name", f"expected {_KINDS}")


def condition_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosine of the angle between rows [n, c] and rows [n, c], or one row [c], in float64 [n]."""
    import numpy as np

    first, second = (_of_length_one(np.atleast_2d(np.asarray(x, dtype=np.float64))) for x in (a, b))
    return np.asarray((first * second).sum(-1))


def _of_length_one(rows: np.ndarray) -> np.ndarray:
    import numpy as np

    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1))


def squared(image: Image, size: int) -> Image:
    """The square about the middle of an image, in RGB, of so many pixels."""
    from PIL.Image import Resampling

    image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size == (size, size):
        return image
    return image.resize((size, size), Resampling.BICUBIC, (left, top, left + side, top + side))


def pixels(images: Sequence[Image], size: int) -> np.ndarray:
    """Images as squares [n, 3, size, size], float32 from −1 to 1."""
    import numpy as np

    found = [np.asarray(squared(image, size), dtype=np.float32).transpose(2, 0, 1) for image in images]
    return np.stack(found) / np.float32(127.5) - np.float32(1)


def digest_of(paths: Sequence[Path]) -> str:
    """XXH3-128 of all bytes of these files, in this order."""
    import xxhash

    made = xxhash.xxh3_128()
    for path in paths:
        with path.open("rb") as file:
            while data := file.read(4 << 20):
                made.update(data)
    return f"xxh3_128:{made.hexdigest()}"


def _numbered(kind: str, count: int) -> tuple[str, ...]:
    return tuple(f"{kind}{n}" for n in range(1, count + 1))


# ------------------------------------------------------------------------------------------------ a linear map


def _linear(place: Path, label: str) -> Embedder:
    import numpy as np

    from weightops.engine.tensors import as_tensor
    from weightops.files.checkpoint import open_checkpoint

    with open_checkpoint(label) as opened:
        said = opened.metadata
        if said.get(LINEAR) != "linear":
            raise FormatError(label, f"is no linear map of images: its metadata has no {LINEAR}", f"expected {_KINDS}")
        held = {}
        for key in ("weight", "bias"):
            info = opened.tensors.get(key)
            if info is None or info.spec.dtype not in ("F32", "F64"):
                raise FormatError(label, f"has no tensor {key} in float32")
            data = memoryview(bytearray(info.spec.nbytes))
            opened.read_bytes(opened.slot(key), 0, len(data), data)
            held[key] = as_tensor(data, info.spec).double().numpy()
    size, names = _said_of_map(said, label)
    weight, bias = held["weight"], held["bias"]
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or weight.shape[1] != 3 * size * size:
        what = f"its weight is {list(weight.shape)} and its bias {list(bias.shape)}"
        raise FormatError(label, f"{what}, expected [c, {3 * size * size}] and [c] for {size} × {size} pixels")
    if not np.isfinite(weight).all() or not np.isfinite(bias).all():
        raise ValueRefused(label, "holds NaN or Inf")
    names = names or _numbered("c", len(bias))
    if len(names) != len(bias) or len(set(names)) != len(names):
        raise FormatError(label, f"names {len(set(names)):,} numbers, and makes {len(bias):,}")

    def run(images: Sequence[Image]) -> np.ndarray:
        flat = pixels(images, size).reshape(len(images), -1).astype(np.float64)
        # Not all images in one product: how it is cut for the processor would show in the last digits.
        return np.stack([weight @ one + bias for one in flat])

    return Embedder(label, "linear", len(bias), names, digest_of([place]), False, run)


def _said_of_map(said: Any, label: str) -> tuple[int, tuple[str, ...]]:
    try:
        size = int(said["size"])
        names = json.loads(said.get("names", "[]"))
        if not 1 <= size <= 4096 or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError
    except (KeyError, ValueError, RecursionError):
        what = f"says size {quote(said.get('size'))} and names {quote(said.get('names'))}"
        raise FormatError(label, f"{what}, expected pixels of a side and a JSON list of names") from None
    return size, tuple(names)


# ------------------------------------------------------------------------------------------------ ONNX


def _onnx(place: Path, label: str) -> Embedder:
    import numpy as np

    need(label, "onnxruntime", extra="synthesis")
    import onnxruntime  # type: ignore[import-untyped, import-not-found, unused-ignore]

    runtime: Any = onnxruntime
    settings = runtime.SessionOptions()
    settings.log_severity_level = 4  # what is wrong is raised, too
    try:
        session = runtime.InferenceSession(str(place), settings, providers=["CPUExecutionProvider"])
    except Exception as e:  # the library raises of everything
        raise FormatError(label, f"cannot be loaded as an ONNX model: {_one_line(e)}") from None
    name, size, batch = _input_of(session, label)

    def run(images: Sequence[Image]) -> np.ndarray:
        given = pixels(images, size)
        step = batch or len(given)
        found = []
        for start in range(0, len(given), step):
            part = given[start : start + step]
            # A model of a fixed number of images gets as many; the last one stands for those that are not there.
            filled = np.concatenate([part, part[-1:].repeat(step - len(part), 0)])
            try:
                made = np.asarray(session.run(None, {name: filled})[0], dtype=np.float64)
            except Exception as e:
                raise FormatError(label, f"fails on an image: {_one_line(e)}") from None
            if made.shape[:1] != (step,) or made.ndim < 2:
                raise MismatchError(label, f"makes {list(made.shape)} of {step} images, expected numbers for each")
            found.append(made.reshape(step, -1)[: len(part)])
        return np.concatenate(found)

    from PIL import Image as images_of

    count = run([images_of.new("RGB", (size, size))]).shape[1]
    return Embedder(label, "onnx", count, _numbered("e", count), digest_of([place]), True, run)


def _input_of(session: Any, label: str) -> tuple[str, int, int | None]:
    """Its input's name, the pixels of a side, and the number of images that it takes at a time (None: any)."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise MismatchError(label, f"has {len(inputs)} inputs: {listing(i.name for i in inputs)}, expected one image")
    asked = inputs[0]
    shape = [side if isinstance(side, int) and side > 0 else None for side in asked.shape]
    fits = asked.type == "tensor(float)" and len(shape) == 4 and shape[1] in (3, None)
    if not fits or (None not in shape[2:] and shape[2] != shape[3]):
        what = f"takes {asked.type} {list(asked.shape)}"
        raise MismatchError(label, f"{what}, expected tensor(float) [n, 3, s, s]: RGB images, channels first")
    return asked.name, shape[2] or shape[3] or _FACE, shape[0]


# ------------------------------------------------------------------------------------------------ CLIP


def _clip(folder: Path, label: str) -> Embedder:
    need(label, "torch", "transformers", extra="synthesis")
    import torch
    import transformers

    _check_config(folder, label)
    # Before some version CLIPImageProcessor was the one of Pillow, and the only name.
    processors: Any = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    load: Any = transformers.CLIPVisionModelWithProjection.from_pretrained
    with hushed():
        try:
            processor = processors.from_pretrained(folder, local_files_only=True)
            network, told = load(folder, dtype=torch.float32, output_loading_info=True, local_files_only=True)
        except Exception as e:  # of a damaged model the library raises everything
            raise FormatError(label, f"cannot be loaded as CLIP's image encoder: {_one_line(e)}") from None
    missing = sorted(told["missing_keys"])
    if missing:  # which the library makes up
        what = f"lacks {len(missing):,} tensors of CLIP's image encoder: {listing(missing)}"
        raise MismatchError(label, what, "it takes the projection as well: CLIPVisionModelWithProjection or CLIPModel")
    network = network.eval()

    def run(images: Sequence[Image]) -> np.ndarray:
        given = processor(images=[image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        with torch.inference_mode():
            found: np.ndarray = network(pixel_values=given.float()).image_embeds.double().numpy()
        return found

    size = int(network.config.projection_dim)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"])
    return Embedder(label, "clip", size, _numbered("e", size), digest_of(files), True, run)


def _check_config(folder: Path, label: str) -> None:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise FormatError(label, "holds no config.json of a model", f"an embedder is {_KINDS}") from None
    if kind not in _CLIPS:
        raise MismatchError(
            label, f"holds a model of the type {quote(kind)}, expected CLIP", f"an embedder is {_KINDS}"
        )


def _fetched(label: str) -> Path:
    """The folder of a repository on the hub, as far as an image encoder takes it."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    address = parse_address(label)
    start = f"{address.path}/" if address.path else ""
    wanted = [f"{start}{name}" for name in ("config.json", "preprocessor_config.json", "model*.safetensors*")]
    try:
        root = huggingface_hub.snapshot_download(address.repo, revision=address.revision, allow_patterns=wanted)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as e:
        hint = "name a folder on this machine"
        raise NetworkError(label, f"cannot be fetched: {_one_line(e)}", hint) from None
    return Path(root, address.path)


def _one_line(e: Exception) -> str:
    return printable(" ".join(str(e).split())[:200]) or type(e).__name__
