"""Family: what the tensors of one adapter module are called, and what their shapes say. Knows no file, no spelling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from weightops.registry import Registry

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Family:
    """A way to write a change of one weight as a few tensors, its parts.

    forms: each a set of parts that makes the module whole; the largest that is there counts. optional: parts that
    may stand beside any of them. rank: of the parts' shapes, None where the family has none. shape: of the weight
    that is changed, None where the parts do not tell. rows: parts whose axis 0 are the weight's rows, so that a
    packed weight's bands are theirs; empty: cannot be cut. uniform_rows: these parts stand for several rows each
    (LoKr's first factor: all rows are its rows times a number). flat: a matrix may be a convolution's kernel,
    flattened to [out, in·k·k].
    """

    name: str
    forms: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()
    rank: Callable[[Shapes], int | None] = lambda shapes: None
    shape: Callable[[Shapes], Shape | None] = lambda shapes: None
    rows: tuple[str, ...] = ()
    uniform_rows: bool = False
    flat: bool = False

    def form(self, parts: Mapping[str, object]) -> tuple[str, ...] | None:
        """The largest form of which all parts are there."""
        whole = [form for form in self.forms if all(part in parts for part in form)]
        return max(whole, key=len, default=None)

    @property
    def parts(self) -> frozenset[str]:
        return frozenset(part for form in self.forms for part in form) | frozenset(self.optional)


FAMILIES: Registry[Family] = Registry("adapter family", "weightops.lora.families")

# Parts that say how strong a module is, or how its result is scaled, whatever its family.
MODIFIERS = ("alpha", "dora_scale")
