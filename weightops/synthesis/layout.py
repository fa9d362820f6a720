"""Which feature of a row is which number of which module's factors. Pure: knows no file, and nothing of gauges."""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from weightops.errors import FormatError, quote

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    # Of each module of a layout: up [..., out, rank] and down [..., rank, in·kernel], whose product is ΔW.
    Factors = Sequence[tuple[Tensor, Tensor]]


class Feature(NamedTuple):
    """A number of a row. module: its key; factor: up or down, in which it stands at this row and column."""

    module: str
    factor: str
    row: int
    column: int


@dataclass(frozen=True, slots=True)
class Module:
    """A module that the LoRAs of a space change. name: diffusers' in its component; shape: of the weight."""

    component: str
    name: str
    shape: tuple[int, ...]
    rank: int

    @property
    def key(self) -> str:
        return f"{self.component}.{self.name}"

    @property
    def out(self) -> int:
        return self.shape[0]

    @property
    def n(self) -> int:
        """Inputs, times the kernel's places."""
        return math.prod(self.shape[1:])

    @property
    def size(self) -> int:
        """Features of a row."""
        return self.rank * (self.out + self.n)


@dataclass(frozen=True)
class Layout:
    """The modules of a space in their order. A row holds of each `up` and then `down`, row by row."""

    architecture: str
    modules: tuple[Module, ...]

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each module begins in a row."""
        found = [0]
        for module in self.modules:
            found.append(found[-1] + module.size)
        return tuple(found[:-1])

    @functools.cached_property
    def width(self) -> int:
        """Features of a row."""
        return sum(module.size for module in self.modules)

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(module.component for module in self.modules))

    def flatten(self, factors: Factors) -> Tensor:
        """Rows [..., width], in the factors' dtype and bit for bit what they hold. Raises ValueError for others."""
        import torch

        parts = []
        for module, (up, down) in zip(self.modules, factors, strict=True):
            if up.shape[-2:] != (module.out, module.rank) or down.shape[-2:] != (module.rank, module.n):
                raise ValueError(f"{module.key} of rank {module.rank}: found {list(up.shape)}, {list(down.shape)}")
            parts += [up.flatten(-2), down.flatten(-2)]
        return torch.cat(parts, -1)

    def unflatten(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The factors of rows [..., width], as views of them."""
        if rows.shape[-1] != self.width:
            raise ValueError(f"rows of {rows.shape[-1]:,} features, expected {self.width:,}")
        found = []
        for module, start in zip(self.modules, self.starts, strict=True):
            middle = start + module.out * module.rank
            up = rows[..., start:middle].reshape(*rows.shape[:-1], module.out, module.rank)
            down = rows[..., middle : start + module.size].reshape(*rows.shape[:-1], module.rank, module.n)
            found.append((up, down))
        return found

    def feature(self, index: int) -> Feature:
        """What the feature of this number is. Raises IndexError."""
        if not 0 <= index < self.width:
            raise IndexError(f"feature {index} of {self.width}")
        number = bisect.bisect_right(self.starts, index) - 1
        module, place = self.modules[number], index - self.starts[number]
        if place < module.out * module.rank:
            return Feature(module.key, "up", *divmod(place, module.rank))
        return Feature(module.key, "down", *divmod(place - module.out * module.rank, module.n))

    def to_json(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "modules": [
                {"component": m.component, "name": m.name, "shape": list(m.shape), "rank": m.rank, "start": start}
                for m, start in zip(self.modules, self.starts, strict=True)
            ],
        }

    @classmethod
    def of_json(cls, found: Any, label: str) -> Layout:
        """Raises FormatError for what `to_json` never says."""
        try:
            modules = tuple(
                Module(str(m["component"]), str(m["name"]), tuple(map(int, m["shape"])), int(m["rank"]))
                for m in found["modules"]
            )
            layout = cls(str(found["architecture"]), modules)
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise FormatError(label, f"its list of modules cannot be read: {quote(str(e))}") from None
        if any(m.rank < 1 or len(m.shape) < 2 or min(m.shape) < 1 for m in modules) or not modules:
            raise FormatError(label, "its list of modules names none, or one of no size")
        return layout
