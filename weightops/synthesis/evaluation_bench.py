"""Where the parts of an evaluation meet: the words, what is fitted within a seed, and what gaps are measured with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops.synthesis.evaluation_cells import Cell
from weightops.synthesis.evaluation_fits import Fits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from weightops.synthesis.evaluation_inputs import Asked, Words
    from weightops.synthesis.evaluation_measures import Gaps
    from weightops.synthesis.layout import Factors
    from weightops.synthesis.own_images import OwnImages


@dataclass(slots=True)
class Bench:
    """gaps: None without a model and images. few: images to learn from. memory: of fits, in bytes.

    told: what decides about gaps, beside the words: hashes of the model and of images.
    """

    words: Words
    asked: Asked
    memory: int
    gaps: Gaps | None = None
    few: OwnImages | None = None
    embedder: Any = None
    told: Mapping[str, Any] = field(default_factory=dict)
    _seed: int | None = None
    _fits: dict[int, Fits] = field(default_factory=dict)

    @property
    def most(self) -> int:
        """Components of the largest PCA that is asked for."""
        words = self.words
        return max(*words.components, *words.latents, *words.conditioned)

    def fits(self, seed: int, number: int = 0) -> Fits:
        """What is learnt of a space within a seed; that of another seed is forgotten."""
        if seed != self._seed:
            self._fits, self._seed = {}, seed
        if number not in self._fits:
            trained, held = self.asked.splits[seed]
            places = self.asked.members[number]
            self._fits[number] = Fits(
                self.asked.spaces[number], [places[index] for index in trained], [places[index] for index in held],
                seed, self.most, self.memory,
            )  # fmt: skip
        return self._fits[number]

    def trained(self) -> int:
        """LoRAs that are learnt from."""
        return len(self.asked.splits[0][0])

    def limited(self, counts: tuple[int, ...]) -> list[int]:
        """Those of which there can be as many components."""
        return [count for count in counts if count < self.trained()]

    def gap(self, fits: Fits, factors: Factors) -> dict[str, Any]:
        """Of the held-out LoRAs, for a cell; nothing where it cannot be measured."""
        return {} if self.gaps is None else self.gaps.said(fits.names, factors)

    def cell(
        self, part: str, row: tuple[str, ...], seed: int, measure: Callable[[], Mapping[str, Any]], *,
        number: int = 0, **made_of: Any,
    ) -> Cell:  # fmt: skip
        """A cell of a space's LoRAs. made_of: the words on which it depends, beside those on which all do."""
        trained, held = self.asked.splits[seed]
        space = self.asked.spaces[number]
        told = {
            "space": space.digest, "trained": trained, "held": held, "most": self.most, **self.told, **made_of,
        }  # fmt: skip
        if self.gaps is not None:
            told["images"] = self.gaps.images.listed.digest(self.asked.spaces[0].names[index] for index in held)
        return Cell(part, row, seed, told, measure)
