"""Other ways to combine what several files change of a weight than to add it: merge methods, on factors if linear."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.engine.chunks import BLOCK_VALUES
from weightops.errors import UsageError
from weightops.lora.lowrank import LowRank, add
from weightops.merging.expression import Added, Applied, Program, stages
from weightops.merging.looks import GRAM, LOOK_NBYTES
from weightops.merging.method import METHODS, SMALL, WORKING_VALUES, MergeMethod, checked
from weightops.ops.sums import Rows, add_products, added_up, as_rows, bands
from weightops.plan import Block, Grain

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch
    from torch import Tensor

    from weightops.merging.looks import Gram
    from weightops.ops.sums import Change


def combines(method: MergeMethod) -> bool:
    """Can it combine changes? It takes nothing else, several of them, and needs neither a weight whole nor others."""
    return (
        {*method.roles} <= {"Delta", "Either"}
        and (method.is_open or method.fixed > 1)
        and method.grain in (Grain.VALUES, Grain.ROWS)
        and not method.needs_statistics
        and not any(look.everywhere for look in method.looks)
    )


def ways() -> list[tuple[str, MergeMethod]]:
    """The methods that can, by name."""
    return [(name, method) for name, method in METHODS if combines(method)]


def way(name: str) -> MergeMethod:
    """Raises UsageError for an unknown method, and for one that cannot."""
    method = METHODS.get(name)
    if not combines(method):
        raise UsageError("--method", f"{name} merges models, and cannot combine LoRAs", "--list-methods shows what can")
    return method


@dataclass(frozen=True, slots=True)
class Blend:
    """A method and its settings, and the strengths of files, by their numbers.

    Strengths are the method's weights. What it has no weights for is taken at its strength: a method that has none
    combines wᵢ·ΔWᵢ.
    """

    method: MergeMethod
    weights: Mapping[int, float]
    settings: Mapping[str, Any]
    seed: int

    @classmethod
    def of(cls, name: str, weights: Sequence[float], given: Mapping[str, Any], seed: int) -> Blend:
        """Raises UsageError for settings, strengths, or a number of files, that make no sense."""
        method = way(name)
        if any(p.kind == "Weights" and p.name in given for p in method.parameters):
            raise UsageError("--set", "the weights are the strengths of the files", "LORA:0.8 says one")
        own = [p for p in method.parameters if p.kind != "Weights"]
        blend = cls(method, dict(enumerate(weights)), checked(method.name, own, given), seed)
        blend.parameters(tuple(blend.weights))
        return blend

    @property
    def is_linear(self) -> bool:
        """Are inner products of the changes enough to tell how much of each is in the result?"""
        return self.method.linear and self.method.looks in ((), GRAM)

    @property
    def shares(self) -> bool:
        """Are the strengths shares of one whole, so that twice as much of all of them is the same?"""
        return self.method.shares or bool(self.settings.get("normalize"))

    def alone(self, file: int) -> float:
        """The strength of what only this file has: nothing is there to share with."""
        weight = self.weights[file]
        return math.copysign(1.0, weight) if self.shares and weight else weight

    def members(self, files: Sequence[int]) -> tuple[int, ...]:
        """The files that a module's method takes of those that change it: all, where it takes a number of its own."""
        return tuple(files) if self.method.is_open else tuple(self.weights)

    def parameters(self, members: Sequence[int]) -> dict[str, Any]:
        """The method's settings, and weights, for these. Raises UsageError where they make no sense together."""
        weights = tuple(self.weights[file] for file in members[self.method.fixed :])
        own = {p.name: weights for p in self.method.parameters if p.kind == "Weights"}
        return self.method.check({**self.settings, **own}, len(members))

    def check(self, files: Iterable[int]) -> None:
        """Raises UsageError where the strengths of these, which change one module, make no sense together."""
        given = tuple(dict.fromkeys(files))
        if len(given) > 1:
            self.parameters(self.members(given))

    def scales(self, members: Sequence[int]) -> list[float]:
        """What each change is multiplied by, because the method has no weight for it."""
        weighted = any(p.kind == "Weights" for p in self.method.parameters)
        return [
            1.0 if weighted and number >= self.method.fixed else self.weights[file]
            for number, file in enumerate(members)
        ]

    def combined(self, name: str, parts: Mapping[int, Change | Tensor]) -> LowRank | Tensor:
        """The changes of several files, by their numbers, combined: factors where that takes no matrix.

        Raises MismatchError where the method knows no combination of these.
        """
        members = self.members(tuple(parts))
        if not self.is_linear:
            return self._by_rows(name, members, {file: as_rows(part) for file, part in parts.items()})
        changes = list(parts.values())
        products = [part for part in changes if isinstance(part, LowRank)]
        if len(products) == len(changes):
            from weightops.lora.overlap import gram

            numbers = self._numbers(members, tuple(parts), gram(products))
            return add(*(part.scale(number) for part, number in zip(products, numbers, strict=True)))
        whole = [as_rows(part) for part in changes]
        inner = [[0.0] * len(whole) for _ in whole]
        for _, each in bands(whole):
            add_products(inner, each)
        return added_up(whole, self._numbers(members, tuple(parts), inner))

    def _numbers(self, members: Sequence[int], files: Sequence[int], inner: Gram) -> list[float]:
        """How much of each of these files' changes is in the result of a linear method: what it makes of units.

        inner: the inner products of these changes. What a file does not change has none.
        """
        import torch

        scales = self.scales(members)
        found = [[0.0] * len(members) for _ in members]
        places = [members.index(file) for file in files]
        for i, row in zip(places, inner, strict=True):
            for j, product in zip(places, row, strict=True):
                found[i][j] = scales[i] * product * scales[j]
        handed = {"found": found} if self.method.looks else {}
        units = torch.eye(len(members), dtype=torch.float64)
        numbers = self.method.function(*units, **self.parameters(members), **handed).tolist()
        return [numbers[place] * scales[place] for place in places]

    def _by_rows(self, name: str, members: Sequence[int], parts: Mapping[int, Rows]) -> Tensor:
        """By another: looks and all, over blocks of rows, which follow from the shape alone."""
        import torch

        given = list(parts.values())
        if len({part.shape for part in given}) != 1:
            raise ValueError(f"changes of shapes {sorted({part.shape for part in given})} are no changes of one weight")
        (out, n), device = given[0].shape, given[0].device
        added = tuple(
            _added(parts[file], scale) if file in parts else None
            for file, scale in zip(members, self.scales(members), strict=True)
        )
        tree = Applied(self.method, added, self.parameters(members), "0")
        wide = self._is_wide(out, n, double=any(part.is_double for part in given))
        program = Program(tree, name, self.seed, (out, n), Grain.ROWS, wide, stages=stages(tree))
        height = max(1, BLOCK_VALUES // max(n, 1))
        blocks = [Block(i, start, min(start + height, out)) for i, start in enumerate(range(0, max(out, 1), height))]
        nothing = [torch.empty(0, device=device)]  # it says the device: changes make their rows themselves
        found: list[Any] = []
        for look in range(len(program.stages)):
            values = [program.look(look, nothing, block, *found) for block in blocks]
            found.append(program.gather(look, values, *found))
        result = torch.empty(out, n, device=device)
        for block in blocks:
            program.fill(nothing, result[block.start : block.stop], block, *found)
        return result

    def _is_wide(self, out: int, n: int, *, double: bool) -> bool:
        return double or self.method.double or out * n <= SMALL

    def nbytes(self, out: int, n: int, count: int) -> int:
        """The most that it takes beside its result, and beside what the changes of so many files hold."""
        if self.is_linear:
            return 0
        values = n * min(out, max(1, WORKING_VALUES // max(n, 1)))
        copies = self.method.copies + (self.method.each + 1) * len(self.members(range(count)))
        # Beside them a change's own rows, and what they are added up of.
        return 8 * values * (copies + 3) + (LOOK_NBYTES * count if self.method.looks else 0)


def _added(change: Rows, scale: float) -> Added:
    def made(_parts: Sequence[Tensor], _weight: Tensor | None, rows: slice, working: torch.dtype) -> Tensor:
        found = change.rows(rows)
        return (found if scale == 1 else found.mul_(scale)).to(working)

    return Added((), made, needs_weight=False, whole=False)
