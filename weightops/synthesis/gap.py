"""How much of what training gives a LoRA gives: held-out losses of many LoRAs at once, each on its own images.

gap = (base − LoRA) / (base − trained): 0 is the model alone, 1 is as good as the LoRA that was really trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightops.diffusion.models import networks
from weightops.diffusion.objectives import fixed_losses
from weightops.errors import MismatchError, ValueRefused, quote
from weightops.synthesis.stacked import Stacked

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from weightops.diffusion.models import Loaded
    from weightops.synthesis.layout import Factors, Layout
    from weightops.synthesis.own_images import OwnImages

SAYS = (
    "The gap is (base − LoRA) / (base − trained), of losses on images that no LoRA has seen: 0 is the model alone, 1 "
    "a LoRA that was really trained for these images, below 0 is worse than no LoRA at all. The losses are first "
    "averaged over the LoRAs and then divided (a ratio of means): a LoRA whose training gave nearly nothing would "
    "else decide the mean of the ratios. It measures the objective and not how images look."
)


@dataclass(frozen=True, slots=True, eq=False)
class Gap:
    """Losses [L] of the same LoRAs: of the model alone, with the trained one on it, and with the one asked about."""

    names: tuple[str, ...]
    base: np.ndarray
    trained: np.ndarray
    found: np.ndarray

    @property
    def value(self) -> float:
        """The ratio of the means over the LoRAs; NaN where training gave nothing at all."""
        return _ratio(self.base - self.found, self.base - self.trained)

    @property
    def each(self) -> np.ndarray:
        """Of each LoRA [L], NaN where its training gave nothing."""
        import numpy as np

        gained = self.base - self.trained
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(gained == 0, np.nan, (self.base - self.found) / gained)

    @property
    def error(self) -> float | None:
        """The standard error of `value` over the LoRAs, by leaving out one at a time; None of one alone, and of NaN.

        Source: Efron & Stein 1981 (jackknife).
        """
        import numpy as np

        count = len(self.names)
        if count < 2:
            return None
        above, below = self.base - self.found, self.base - self.trained
        with np.errstate(divide="ignore", invalid="ignore"):
            kept = (above.sum() - above) / (below.sum() - below)
        found = math.sqrt((count - 1) / count * float(np.square(kept - kept.mean()).sum()))
        return found if math.isfinite(found) else None


def check_base(label: str, layout: Layout, loaded: Loaded) -> None:
    """Refuse a model that LoRAs of this layout do not go on. Raises MismatchError."""
    if loaded.architecture and layout.architecture and loaded.architecture != layout.architecture:
        what = f"its LoRAs are of {quote(layout.architecture)}, and {loaded.label} is {quote(loaded.architecture)}"
        raise MismatchError(label, what, "--model names the base that they were trained on")
    Stacked(networks(loaded.pipe), layout).close()


def changes_texts(layout: Layout) -> bool:
    """Do the LoRAs change a text encoder, so that captions are read with each of them?"""
    return any(name.startswith("text_encoder") for name in layout.components)


def _ratio(above: np.ndarray, below: np.ndarray) -> float:
    whole = float(below.sum())
    return float(above.sum()) / whole if whole else math.nan


class Losses:
    """The losses of LoRAs on their own images, at timesteps and noises that are each image's own and do not change.

    As `weightops evaluate` draws them for held-out images, so that a LoRA's loss does not depend on the others in a
    batch but for its last bits. Closed by the end of a `with`: the networks are then what they were.
    """

    def __init__(self, images: OwnImages, layout: Layout, *, pairs: int = 4, seed: int = 0, batch: int = 128) -> None:
        """pairs: of a timestep and a noise, for each image. batch: samples at once. Raises MismatchError."""
        if pairs < 1 or batch < 1:
            raise ValueError(f"{pairs} pairs in batches of {batch}")
        self.images = images
        self.pairs, self.seed, self.batch = pairs, seed, batch
        self.stacked = Stacked(networks(images.loaded.pipe), layout)

    def __enter__(self) -> Losses:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.stacked.close()

    def of(self, names: Sequence[str], factors: Factors | Sequence[Factors] | None) -> np.ndarray:
        """The mean loss of each of these LoRAs [L], float64, on the images of its name.

        factors: with a leading axis of L, or a list of L without one, of any ranks; None: the model alone. Raises
        ValueRefused where a loss is no number.
        """
        import numpy as np

        given = None if factors is None else stacked_factors(factors, len(names))
        found = np.empty(len(names))
        try:
            for group in self.images.by_count(names):
                count = len(self.images.places(names[group[0]]))
                together = max(1, self.batch // count)
                for start in range(0, len(group), together):
                    chosen = group[start : start + together]
                    self._put(given, chosen)
                    found[chosen] = self._measured([self.images.places(names[n]) for n in chosen])
        finally:
            self.stacked.put(None)
        if not np.isfinite(found).all():
            wrong = names[int(np.argmin(np.isfinite(found)))]
            label = self.images.loaded.label
            raise ValueRefused(label, f"the loss with the LoRA for {wrong!r} is no number", "run it with --dtype fp32")
        return found

    def gap(
        self, names: Sequence[str], base: np.ndarray, trained: np.ndarray, factors: Factors | Sequence[Factors]
    ) -> Gap:
        """The gap of these factors, given the losses [L] of the model alone and with the trained LoRAs."""
        return Gap(tuple(names), base, trained, self.of(names, factors))

    def _put(self, factors: Factors | None, chosen: Sequence[int]) -> None:
        self.stacked.put(None if factors is None else [(up[chosen], down[chosen]) for up, down in factors])

    def _measured(self, places: Sequence[range]) -> np.ndarray:
        """The mean over images and pairs, of each LoRA that is on now [L]."""
        import numpy as np

        images = self.images
        width = max(1, self.batch // len(places))
        sums = np.zeros(len(places))
        count = len(places[0])
        for first in range(0, count, width):
            indices = [place for own in places for place in own[first : first + width]]
            losses = fixed_losses(
                images.loaded, images.encoding, images.encoded, images.objective, indices, pairs=self.pairs,
                seed=self.seed,
            )  # fmt: skip
            sums += losses.sum(0).reshape(len(places), -1).sum(1).numpy()
        return sums / (count * self.pairs)


def stacked_factors(factors: Factors | Sequence[Factors], count: int) -> list[tuple[Tensor, Tensor]]:
    """Factors with a leading axis of `count`: as they are, or of a list of so many without one, zeros where the ranks
    differ. Raises ValueError."""
    import torch

    first = factors[0]
    if isinstance(first, tuple) and isinstance(first[0], torch.Tensor):
        pairs: list[tuple[Tensor, Tensor]] = list(factors)  # type: ignore[arg-type]
        if any(up.ndim != 3 or len(up) != count for up, _ in pairs):
            raise ValueError(f"factors of {len(first[0])} LoRAs, expected {count}")
        return pairs
    if len(factors) != count:
        raise ValueError(f"factors of {len(factors)} LoRAs, expected {count}")
    pad = torch.nn.functional.pad
    found = []
    for pairs_of_module in zip(*factors, strict=True):
        rank = max(up.shape[-1] for up, _ in pairs_of_module)
        ups = [pad(up, (0, rank - up.shape[-1])) for up, _ in pairs_of_module]
        downs = [pad(down, (0, 0, 0, rank - down.shape[-2])) for _, down in pairs_of_module]
        found.append((torch.stack(ups), torch.stack(downs)))
    return found
