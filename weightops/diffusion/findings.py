"""What a part of an evaluation found: tables, drawings, and in words what its numbers can and cannot say."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from weightops.diffusion.adapters import wear
from weightops.diffusion.compared import BASE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from weightops.diffusion.compared import Compared
    from weightops.diffusion.models import Loaded
    from weightops.diffusion.page import Drawing
    from weightops.diffusion.tables import Table

    # Told of so many pieces of work that are done.
    Tick = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """part: what it is called. says: what its numbers can and cannot say. facts: on what they depend, for JSON.

    tables, drawings: by the names of their files, without a suffix; drawings are PNG.
    """

    part: str
    says: str
    tables: Mapping[str, Table]
    drawings: Mapping[str, Drawing] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A part that was not measured. needs: what it would take, in words."""

    part: str
    needs: str


class Measure(Protocol):
    """What is measured of the model alone, and again with each LoRA on it."""

    def look(self, label: str) -> None:
        """Measure the model as it is now, under this label: first BASE, without a LoRA."""

    def finding(self) -> Finding: ...


def with_each(loaded: Loaded, compared: Sequence[Compared], measures: Sequence[Measure]) -> list[Finding]:
    """What each measure finds: a LoRA is put on once for all of them. Leaves the model without one."""
    wear(loaded, ())
    for measure in measures:
        measure.look(BASE)
    try:
        for one in compared:
            wear(loaded, [(one.file, one.strength)])
            for measure in measures:
                measure.look(one.label)
    finally:
        wear(loaded, ())
    return [measure.finding() for measure in measures]


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error over the values; None of one alone."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
