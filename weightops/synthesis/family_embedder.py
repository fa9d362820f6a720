"""A linear map from the pixels of a creature's picture to the numbers that describe it, and how well it reads them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from weightops.diffusion.tables import write_whole
from weightops.synthesis.embedders import LINEAR, pixels
from weightops.synthesis.family_base import generator
from weightops.synthesis.family_pictures import NAMES, draw, identities

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

SIZE = 16  # pixels of a side, to which a picture is brought: finer ones say more of the pose than of who it is
_FITTED, _TESTED = 4096, 1024  # pictures, each of another creature
_RIDGE = 10.0
_FIT, _TEST = 48, 49  # streams of chance


def make_embedder(file: Path, *, seed: int) -> dict[str, float]:
    """Fit it on creatures of its own and write it; R² of each number, on pictures of yet others. Raises OutputError."""
    import numpy as np
    import torch
    from safetensors.torch import save

    seen, numbers = _read(_FITTED, seed, _FIT)
    mean, middle = seen.mean(0), numbers.mean(0)
    centred = seen - mean
    gram = centred.T @ centred + _RIDGE * np.eye(centred.shape[1])
    weight = np.linalg.solve(gram, centred.T @ (numbers - middle)).T
    bias = middle - weight @ mean
    tensors = {"weight": torch.from_numpy(weight).float(), "bias": torch.from_numpy(bias).float()}
    said = {LINEAR: "linear", "size": str(SIZE), "names": json.dumps(NAMES)}
    write_whole(file, save({name: tensor.contiguous() for name, tensor in tensors.items()}, said))
    others, true = _read(_TESTED, seed, _TEST)
    wrong = np.square(others @ weight.T + bias - true).mean(0) / true.var(0)
    return {name: float(1 - share) for name, share in zip(NAMES, wrong, strict=True)}


def _read(count: int, seed: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [count, 3·s·s] of pictures as an embedder sees them, and the numbers [count, 7] that they are of."""
    import numpy as np
    from PIL import Image

    numbers = generator(seed, stream)
    who = identities(count, numbers)
    drawn = [Image.fromarray(picture) for picture in draw(who, numbers)]
    return pixels(drawn, SIZE).reshape(count, -1).astype(np.float64), who
