"""A linear map from the pixels of a creature's picture to the numbers that describe it, and how well it reads them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from weightops.diffusion.tables import write_whole
from weightops.files.header import encode_header, layout
from weightops.files.tensor import TensorSpec
from weightops.synthesis.embedders import LINEAR, pixels
from weightops.synthesis.family_pictures import NAMES, draw, generator, identities

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

SIZE = 16  # pixels of a side, to which a picture is brought: finer ones say more of the pose than of who it is
_FITTED, _TESTED = 3072, 768  # pictures, each of another creature
_RIDGE = 10.0
_FIT, _TEST = 48, 49  # streams of chance, as in family_base


def make_embedder(file: Path, *, seed: int) -> dict[str, float]:
    """Fit it on creatures of its own and write it; R² of each number, on pictures of yet others. Raises OutputError."""
    import torch

    seen, numbers = _read(_FITTED, seed, _FIT)
    mean, middle = seen.mean(0), numbers.mean(0)
    centred = seen - mean
    gram = centred.mT @ centred + _RIDGE * torch.eye(centred.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, centred.mT @ (numbers - middle)).mT
    bias = middle - weight @ mean
    _write(file, {"weight": weight.float(), "bias": bias.float()})
    others, true = _read(_TESTED, seed, _TEST)
    wrong = (others @ weight.mT + bias - true).square().mean(0) / true.var(0, correction=0)
    return dict(zip(NAMES, (1 - wrong).tolist(), strict=True))


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """With the metadata in one order, which the format's own library does not keep."""
    specs = {name: TensorSpec("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    said = {LINEAR: "linear", "size": str(SIZE), "names": json.dumps(NAMES)}
    data = [tensors[name].contiguous().numpy().tobytes() for name in layout(specs)]
    write_whole(file, encode_header(specs, said) + b"".join(data))


def _read(count: int, seed: int, stream: int) -> tuple[Tensor, Tensor]:
    """Pixels [count, 3·s·s] of pictures as embedders see them, and the numbers [count, 7] they are of, in float64."""
    import torch
    from PIL import Image

    numbers = generator(seed, stream)
    who = identities(count, numbers)
    drawn = [Image.fromarray(picture) for picture in draw(who, numbers)]
    return torch.from_numpy(pixels(drawn, SIZE)).reshape(count, -1).double(), torch.from_numpy(who)
