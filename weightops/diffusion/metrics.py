"""How alike two images are, and an image and a text: numbers alone. Reads no image files and resizes nothing.

None of them says whether an image is good. PSNR and SSIM compare pixel with pixel: of a generated image and a real one
of the same subject they say little more than how alike their brightness is.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
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
    from collections.abc import Sequence

    from numpy.typing import NDArray

# Wang et al. 2004: a Gaussian of 1.5 pixels over 11, and the constants that keep a quotient of two zeros harmless.
_SIGMA = 1.5
_RADIUS = 5
_C1, _C2 = 0.01**2, 0.03**2
_BATCH = 16
CLIP = "openai/clip-vit-large-patch14"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# The networks of LPIPS, and the side of the smallest image that each of them can see.
_PERCEPTUAL = {"alex": 31, "vgg": 16, "squeeze": 17}


def psnr(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The peak signal-to-noise ratio in dB, 10 log₁₀(1 / mean squared difference); of equal images, infinity.

    a, b: images [H, W, C] of one size, each uint8 or floats from 0 to 1; uint8 is taken as 255ths.
    Raises MismatchError for different sizes, UsageError for what is no image, ValueRefused for values outside.
    """
    a, b = _pair("psnr", a, b)
    error = float(((a - b) ** 2).mean())
    return -10 * math.log10(error) if error else math.inf


def ssim(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The structural similarity: 1 for equal images, about 0 for unrelated ones; the mean of pixels and channels.

    The convention is that of Wang et al. 2004, arithmetic in float64: a Gaussian window of sigma 1.5, cut at 11×11
    pixels, variances divided by N, and only pixels whose window lies within the image. It is scikit-image's with
    gaussian_weights=True, sigma=1.5, use_sample_covariance=False. torchmetrics treats the border in another way, and
    gave 0.674 where this gives 0.703: numbers of different conventions are not to be compared.

    a, b, and what is raised: as for `psnr`; UsageError as well for images smaller than the window.
    Source: Wang, Bovik, Sheikh & Simoncelli 2004, doi:10.1109/TIP.2003.819861.
    """
    a, b = _pair("ssim", a, b)
    window = 2 * _RADIUS + 1
    if min(a.shape[:2]) < window:
        what = f"found images of {_size(a.shape)}, expected at least {window}x{window} pixels, the size of its window"
        raise UsageError("ssim", what)
    mean_a, mean_b = _blurred(a), _blurred(b)
    variances = _blurred(a * a) - mean_a**2 + _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    alike = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    return float((alike / ((mean_a**2 + mean_b**2 + _C1) * (variances + _C2))).mean())


def clip_similarity(images: Sequence[Any], texts: Sequence[str], *, model: str, device: str) -> tuple[float, ...]:
    """The cosine between CLIP's embeddings of each image and of its text, from −1 to 1.

    model: a folder with a CLIP model, or one's name on the hub; cosines of different models are not to be compared.
    They lie between 0 and 0.4 or so, not near 1; CLIPScore is 2.5 times the cosine, and at least 0. Of a long text only
    what CLIP reads counts, its first 77 tokens.

    images: PIL images in RGB, or arrays [H, W, 3] as for `psnr`, of any sizes; texts: one for each.
    Raises UsageError, MismatchError, FormatError, NetworkError.  Source: Radford et al. 2021, arXiv:2103.00020 (CLIP);
    Hessel et al. 2021, arXiv:2104.08718 (CLIPScore).
    """
    if len(images) != len(texts):
        raise MismatchError("clip", f"the numbers of images and of texts differ: {len(images):,} and {len(texts):,}")
    need("clip", "torch", "transformers", "PIL")
    import torch

    from weightops.engine.tensors import resolve_device

    place = resolve_device(device)
    pictures = [_picture("clip", image) for image in images]
    found: list[float] = []
    with hushed(), torch.inference_mode():
        network, tokenizer, processor = _clip(model)
        network.to(place)
        for start in range(0, len(pictures), _BATCH):
            pixels = processor(images=pictures[start : start + _BATCH], return_tensors="pt").to(place)
            words = tokenizer(
                list(texts[start : start + _BATCH]), padding=True, truncation=True, return_tensors="pt",
                max_length=network.config.text_config.max_position_embeddings,
            ).to(place)  # fmt: skip
            said = network(**words, **pixels)
            found += torch.nn.functional.cosine_similarity(said.image_embeds, said.text_embeds).tolist()
    return tuple(found)


def lpips(a: NDArray[Any], b: NDArray[Any], *, network: str = "alex", device: str = "cpu") -> float:
    """The learned perceptual distance of two images: 0 for equal ones, larger for what people see as more different.

    It is the package `lpips` that computes it, on torchvision's network, whose weights that fetches when it is first
    used. network: alex, as papers report it, vgg or squeeze.
    a, b, and what is raised: as for `psnr`; UsageError as well for other than 3 channels, for images smaller than the
    network can see, and where the package is not installed; NetworkError where the weights cannot be fetched.
    Source: Zhang et al. 2018, arXiv:1801.03924.
    """
    import torch

    from weightops.engine.tensors import resolve_device

    if network not in _PERCEPTUAL:
        raise UsageError("lpips", f"found the network {quote(network)}, expected {', '.join(_PERCEPTUAL)}")
    pair = _pair("lpips", a, b)
    shape, least = pair[0].shape, _PERCEPTUAL[network]
    if shape[2] != 3 or min(shape[:2]) < least:
        what = f"found images of {_size(shape)}, expected 3 channels and at least {least}x{least} pixels for {network}"
        raise UsageError("lpips", what)
    place = resolve_device(device)
    measure = _perceptual(network, place)
    tensors = [torch.from_numpy(2 * image - 1).float().permute(2, 0, 1)[None].to(place) for image in pair]
    with torch.inference_mode():
        return float(measure(*tensors))


# ------------------------------------------------------------------------------------------------ images


def _pair(where: str, a: NDArray[Any], b: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both as float64 from 0 to 1, of one size."""
    first, second = _unit(where, a), _unit(where, b)
    if first.shape != second.shape:
        what = f"the images differ in size: {_size(first.shape)} and {_size(second.shape)}"
        raise MismatchError(where, what, "resize one of them before, and say so beside the number")
    return first, second


def _unit(where: str, image: Any) -> NDArray[Any]:
    import numpy as np

    array = np.asarray(image)
    if array.ndim != 3 or not array.size:
        raise UsageError(where, f"found an array of shape {list(array.shape)}, expected an image [H, W, C]")
    if array.dtype == np.uint8:
        return array / np.float64(255)
    if array.dtype.kind != "f":
        raise UsageError(where, f"found an image of {array.dtype}, expected uint8, or floats from 0 to 1")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise ValueRefused(where, f"found values from {low:g} to {high:g}, expected floats from 0 to 1, or uint8")
    return array.astype(np.float64)


def _picture(where: str, image: Any) -> Any:
    """A PIL image. Arrays do not go to a processor as they are: it would take floats for 255ths once more."""
    import numpy as np
    from PIL import Image

    array = _unit(where, image)
    if array.shape[2] != 3:
        raise UsageError(where, f"found an image of {_size(array.shape)}, expected 3 channels: red, green, blue")
    return Image.fromarray(np.rint(array * 255).astype(np.uint8))


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]} pixels with {shape[2]} channel{'s' * (shape[2] != 1)}"


def _blurred(image: NDArray[Any]) -> NDArray[Any]:
    """The Gaussian mean about each pixel that has a whole window: [H, W, C] to [H − 10, W − 10, C]."""
    import numpy as np

    weights = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
    weights /= weights.sum()
    rows, columns = image.shape[0] - 2 * _RADIUS, image.shape[1] - 2 * _RADIUS
    down: NDArray[Any] = sum(w * image[n : n + rows] for n, w in enumerate(weights))
    across: NDArray[Any] = sum(w * down[:, n : n + columns] for n, w in enumerate(weights))
    return across


# ------------------------------------------------------------------------------------------------ networks


def _clip(model: str) -> tuple[Any, Any, Any]:
    """The model, its tokenizer, and the image processor that Pillow computes, with torchvision installed or not."""
    import torch
    import transformers

    source, given = _located(model)
    # Before some version CLIPImageProcessor was the one of Pillow, and the only name.
    processors: Any = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    load: Any = transformers.CLIPModel.from_pretrained  # whose types know no loading information
    hint = f"give a folder with a CLIP model, or a name on the hub, as {CLIP}"
    try:
        kind = transformers.AutoConfig.from_pretrained(source, **given).model_type
    except Exception as e:  # of a damaged or absent model the library raises everything
        made = FormatError if "local_files_only" in given else NetworkError
        raise made(model, f"cannot be loaded as a CLIP model: {_one_line(e)}", hint) from None
    if kind != "clip":
        raise MismatchError(model, f"found a model of the type {quote(kind)}, expected a CLIP model", hint)
    try:
        network, told = load(source, dtype=torch.float32, output_loading_info=True, **given)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(source, **given)
        processor = processors.from_pretrained(source, **given)
    except Exception as e:  # as above
        raise FormatError(model, f"cannot be loaded as a CLIP model: {_one_line(e)}", hint) from None
    if told["missing_keys"]:  # the library makes up what is missing, and only warns
        missing = sorted(told["missing_keys"])
        what = f"lacks {len(missing):,} of the tensors of a CLIP model: {listing(missing)}"
        raise MismatchError(model, what, hint)
    return network.eval(), tokenizer, processor


def _located(model: str) -> tuple[str, dict[str, Any]]:
    """What the library is to be asked for, and how: a folder is read without a look at the network."""
    if Path(model).is_dir():
        return model, {"local_files_only": True}
    if model.startswith(PREFIX):
        address = parse_address(model)
        if address.path:
            raise UsageError(model, f"expected {PREFIX}owner/name[@revision], without a path")
        return address.repo, {"revision": address.revision}
    if Path(model).exists() or not _HUB_NAME.fullmatch(model):
        raise UsageError(model, "is no folder, and no name on the hub", f"a CLIP model's name is as {CLIP}")
    return model, {}


@functools.lru_cache(maxsize=1)
def _perceptual(network: str, device: str) -> Any:
    try:
        package = importlib.import_module("lpips")
    except ImportError as e:
        missing = e.name or "lpips"
        raise UsageError("lpips", f"needs {missing}, which is not installed", f"pip install {missing}") from None
    try:
        with hushed():
            return package.LPIPS(net=network, verbose=False).to(device).eval()
    except OSError as e:
        what = f"the weights of its network {network} cannot be fetched: {_one_line(e)}"
        raise NetworkError("lpips", what, "run once where there is a network; they stay in torch's cache") from None


def _one_line(e: Exception) -> str:
    return printable(" ".join(str(e).split())[:200]) or type(e).__name__
