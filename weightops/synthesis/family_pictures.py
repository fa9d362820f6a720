"""Pictures of made-up creatures: seven numbers say who it is, and chance where it stands and how it looks about.

Drawn with numpy alone, many at once. Knows no model and writes no file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    Shape = np.ndarray | float

SIDE = 32  # pixels
CAPTION = "a creature"

# What each number from 0 to 1 changes, little by little and visibly.
NAMES = (
    "body_warmth",  # blue to orange
    "body_lightness",
    "squareness",  # a diamond, round, a square
    "size",
    "stripes",  # how dark they are
    "ears",  # how long they are
    "ground_warmth",  # green to purple
)

_COLD, _WARM = (0.20, 0.50, 0.95), (1.0, 0.55, 0.15)
_GREEN, _PURPLE = (0.08, 0.34, 0.24), (0.38, 0.10, 0.36)
_AT_ONCE = 256  # pictures: some hundred KiB each while they are drawn


def generator(seed: int, *words: int) -> np.random.Generator:
    """Numbers that follow from the seed and these words."""
    import numpy as np

    return np.random.default_rng((seed, *words))


def identities(count: int, numbers: np.random.Generator) -> np.ndarray:
    """Numbers of so many creatures, float64 [count, 7], with no more digits than a table of them shows."""
    return numbers.random((count, len(NAMES))).round(6)


def draw(who: np.ndarray, numbers: np.random.Generator) -> np.ndarray:
    """A picture of each of these creatures [n, 7], uint8 [n, 32, 32, 3], each in a pose of its own.

    The pose is where it stands, how it is tilted, mirrored and stretched, where stripes begin and eyes look, and the
    light.
    """
    import numpy as np

    poses = (numbers.random((len(who), 8)) * 2 - 1).astype(np.float32)
    parts = range(0, len(who), _AT_ONCE)
    whole = [_drawn(who[n : n + _AT_ONCE].astype(np.float32), poses[n : n + _AT_ONCE]) for n in parts]
    return np.concatenate(whole)


def _drawn(who: np.ndarray, poses: np.ndarray) -> np.ndarray:
    import numpy as np

    warmth, lightness, squareness, size, stripes, ears, ground = (who[:, i, None, None] for i in range(len(NAMES)))
    right, down, tilt, side, stretch, phase, look, light = (poses[:, i, None, None] for i in range(poses.shape[1]))
    axis = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    x, y, tilt = x - 0.12 * right, y - 0.12 - 0.08 * down, 0.15 * tilt
    # Along the creature's own axes.
    u, v = np.cos(tilt) * x + np.sin(tilt) * y, np.cos(tilt) * y - np.sin(tilt) * x
    u = u * np.where(side < 0, np.float32(-1), np.float32(1))
    wide, high = (0.34 + 0.3 * size) * (1 + 0.05 * stretch), 0.3 + 0.26 * size
    picture = _between(_GREEN, _PURPLE, ground) * (0.9 + 0.25 * y[..., None])
    coat = _between(_COLD, _WARM, warmth) * (0.5 + 0.5 * lightness[..., None])
    length = 0.06 + 0.4 * ears
    for ear in (-1, 1):
        at = u - ear * 0.55 * wide, v + 0.7 * high + 0.5 * length
        picture = _over(picture, _ellipse(*at, 0.13, 0.12 + length / 2), 0.75 * coat)
    dark = 0.75 * stripes * (0.5 + 0.5 * np.cos(2 * np.pi * (1.6 * u + phase)))
    power = np.exp(np.log(1.1) + squareness * np.log(6 / 1.1))
    picture = _over(picture, _ellipse(u, v, wide, high, power), coat * (1 - dark)[..., None])
    for eye in (-1, 1):
        at = u - 0.06 - eye * 0.16, v + 0.3 * high
        picture = _over(picture, _ellipse(*at, 0.11, 0.12), np.ones(3, np.float32))
        at = at[0] - 0.05, at[1] - 0.04 * look
        picture = _over(picture, _ellipse(*at, 0.06, 0.07), np.full(3, 0.05, np.float32))
    picture = picture * (1 + 0.04 * light[..., None])
    return np.asarray(np.round(np.clip(picture, 0, 1) * 255), np.uint8)


def _between(first: tuple[float, ...], second: tuple[float, ...], share: np.ndarray) -> np.ndarray:
    import numpy as np

    ends = np.asarray(first, np.float32), np.asarray(second, np.float32)
    return np.asarray(ends[0] * (1 - share[..., None]) + ends[1] * share[..., None])


def _ellipse(u: np.ndarray, v: np.ndarray, wide: Shape, high: Shape, power: np.ndarray | None = None) -> np.ndarray:
    """How much of each pixel lies in |u/wide|^p + |v/high|^p ≤ 1 (p: 2, an ellipse), soft at its edge: 0 … 1."""
    import numpy as np

    u, v = np.abs(u / wide), np.abs(v / high)
    reach = np.sqrt(u * u + v * v) if power is None else (u**power + v**power) ** (1 / power)
    mask: np.ndarray = np.clip(0.5 - (reach - 1) * np.minimum(wide, high) * (SIDE / 2), 0, 1)
    return mask


def _over(picture: np.ndarray, mask: np.ndarray, colour: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.asarray(picture + mask[..., None] * (colour - picture))
