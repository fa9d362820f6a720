"""What becomes of one tensor: a tree of merge methods over tensors, compiled from a recipe, and computed part by part.

Knows tensors and their parts; no files, no names but the one that seeds randomness, no devices.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops.merging.method import SMALL, WORKING_VALUES, MergeMethod, store
from weightops.merging.rounding import generator_for
from weightops.plan import Block, Grain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from torch import Generator, Tensor

_ORDER = (Grain.VALUES, Grain.ROWS, Grain.TENSOR)


@dataclass(frozen=True, slots=True)
class Given:
    """A tensor that is read: input number `number`. turned: it is stored transposed. orders: its rows or columns stand
    in another order, (axis, order) of each; then it is needed whole.
    """

    number: int
    turned: bool = False
    orders: tuple[tuple[int, Any], ...] = ()

    @property
    def grain(self) -> Grain:
        return Grain.TENSOR if self.turned or self.orders else Grain.VALUES


@dataclass(frozen=True, slots=True)
class Added:
    """What a LoRA adds to a weight: `change(parts, weight, rows, dtype)`, of these inputs, in these rows.

    numbers: of its inputs. needs_weight: it depends on the weight that it changes, the first model's of the method in
    which it stands. whole: all rows are needed at once. copies: working copies that it makes, in tensors of the
    weight's shape.
    """

    numbers: tuple[int, ...]
    change: Callable[[Sequence[Tensor], Tensor | None, slice, torch.dtype], Tensor]
    needs_weight: bool
    whole: bool
    copies: int = 3

    @property
    def grain(self) -> Grain:
        return Grain.TENSOR if self.whole else Grain.ROWS


@dataclass(frozen=True, slots=True)
class Applied:
    """A method, with its parameters for this tensor. salt: what tells its randomness from that of the others.

    models: None for a difference that is nothing here, as of a LoRA that does not change this tensor. known: what its
    looks found, where they were made in an earlier pass. statistics: None where a file has none for this tensor.
    """

    method: MergeMethod
    models: tuple[Expression | None, ...]
    parameters: Mapping[str, Any]
    salt: str
    statistics: tuple[Given | None, ...] = ()
    known: Any = None

    @property
    def grain(self) -> Grain:
        return max((self.method.grain, *(m.grain for m in self.models if m is not None)), key=_ORDER.index)


Expression = Given | Added | Applied


def applications(
    expression: Expression | None, context: Expression | None = None
) -> Iterator[tuple[Applied, Expression | None]]:
    """Every method of a tree, those first whose results others need; and of each the weight that LoRAs in it change."""
    if isinstance(expression, Applied):
        own = context
        for number, model in enumerate(expression.models):
            yield from applications(model, own)
            if number == 0 and expression.method.role(0) == "Tensor":
                own = model
        yield expression, context


@dataclass(frozen=True, slots=True)
class Stage:
    """One look of one method, in whose place LoRAs change this weight."""

    applied: Applied
    look: int
    context: Expression | None


def stages(expression: Expression) -> tuple[Stage, ...]:
    """The looks that must be made first, in order."""
    return tuple(
        Stage(applied, n, context)
        for applied, context in applications(expression)
        if applied.known is None
        for n in range(len(applied.method.looks))
    )


def numbers(expression: Expression | None) -> Iterator[int]:
    """Of all inputs that a tree needs."""
    if isinstance(expression, Given):
        yield expression.number
    elif isinstance(expression, Added):
        yield from expression.numbers
    elif isinstance(expression, Applied):
        for model in expression.models:
            yield from numbers(model)
        yield from (given.number for given in expression.statistics if given is not None)


def repeated(expression: Expression) -> frozenset[int]:
    """The inputs that stand in more than one place as they are read: converted once for all."""
    count = Counter(
        model.number
        for applied, _ in applications(expression)
        for model in applied.models
        if isinstance(model, Given) and model.grain is Grain.VALUES
    )
    return frozenset(number for number, places in count.items() if places > 1)


def _needs_weight(expression: Expression | None) -> bool:
    if isinstance(expression, Added):
        return expression.needs_weight
    if not isinstance(expression, Applied) or expression.method.role(0) == "Tensor":
        return False
    return any(_needs_weight(model) for model in expression.models)


def decides(expression: Expression) -> bool:
    """May the last bit of an input change the result much?"""
    return any(applied.method.decides for applied, _ in applications(expression))


def copies(expression: Expression | None) -> int:
    """The working copies of a part that computing the tree takes at most, its result among them."""
    if expression is None or isinstance(expression, Given):
        return 1
    if isinstance(expression, Added):
        return expression.copies + 1
    held, most = 0, 0
    for model in expression.models:
        most = max(most, held + copies(model))
        held += 1
    held += sum(1 for number in expression.statistics if number is not None)
    return max(most, held + expression.method.copies + expression.method.each * len(expression.models))


# ------------------------------------------------------------------------------------------------ computing


@dataclass(slots=True)
class _Part:
    """Some rows, or some values, of a tensor: `part` of the block that `inputs` hold, rows `rows` of the whole."""

    inputs: Sequence[Tensor | None]
    shared: frozenset[int]
    part: slice
    rows: slice
    shape: tuple[int, ...]
    working: torch.dtype
    device: torch.device
    draw: Callable[[str], Generator]
    found: Mapping[int, Any]
    converted: dict[int, Tensor]
    repeated: frozenset[int]
    given: dict[int, Tensor] = field(default_factory=dict)

    def raw(self, number: int) -> Tensor:
        """As it is stored: this part; or all of what is shared, in the working dtype, which all parts share."""
        tensor = self.inputs[number]
        assert tensor is not None
        if number not in self.shared:
            return tensor[self.part]
        if number not in self.converted:
            self.converted[number] = tensor.to(self.working)
        return self.converted[number]

    def zeros(self) -> Tensor:
        import torch

        return torch.zeros(self.shape, dtype=self.working, device=self.device)


def _value(expression: Expression | None, part: _Part, weight: Tensor | None) -> Tensor:
    """The tree's value in this part. weight: what a LoRA changes that stands here."""
    if expression is None:
        return part.zeros()
    if isinstance(expression, Given):
        return _given(expression, part)
    if isinstance(expression, Added):
        return expression.change([part.raw(n) for n in expression.numbers], weight, part.rows, part.working)
    models = _models(expression, part, weight)
    handed = _handed(expression, part)
    return expression.method.function(*models, **expression.parameters, **handed)


def _given(given: Given, part: _Part) -> Tensor:
    import torch

    if given.number in part.repeated and given.grain is Grain.VALUES:  # no method changes what it is given
        if given.number not in part.given:
            part.given[given.number] = part.raw(given.number).to(part.working)
        return part.given[given.number]
    tensor = part.raw(given.number)
    if given.turned:
        tensor = tensor.T
    for axis, order in given.orders:
        tensor = tensor.index_select(axis, torch.as_tensor(order, device=tensor.device))
    return tensor.to(part.working)


def _models(applied: Applied, part: _Part, weight: Tensor | None) -> list[Tensor]:
    found: list[Tensor] = []
    for number, model in enumerate(applied.models):
        found.append(_value(model, part, weight))
        if applied.method.role(number) == "Tensor" and number == 0:
            weight = found[0]
    return found


def _handed(applied: Applied, part: _Part) -> dict[str, Any]:
    handed: dict[str, Any] = {}
    if applied.method.looks:
        handed["found"] = applied.known if applied.known is not None else part.found[id(applied)]
    if applied.method.draws:
        handed["random"] = part.draw(applied.salt)
    if applied.method.needs_statistics:
        handed["statistics"] = [None if given is None else _given(given, part) for given in applied.statistics]
    return handed


@dataclass(frozen=True, slots=True)
class Program:
    """A tree, ready to be computed in blocks of one tensor of this shape, which is flat where its grain is VALUES.

    name: seeds randomness, with `seed`. wide: it is computed in float64. shared: inputs of which each block has all.
    turned: what is filled is stored the other way round, [b, a]; then it is computed as a whole.
    """

    expression: Expression
    name: str
    seed: int
    shape: tuple[int, ...]
    grain: Grain
    wide: bool
    shared: frozenset[int] = frozenset()
    stages: tuple[Stage, ...] = ()
    turned: bool = False

    def look(self, number: int, inputs: Sequence[Tensor | None], block: Block, *before: Any) -> list[Any]:
        """What look number `number` sees in a block: a value for each part. before: what all looks before it found."""
        stage = self.stages[number]
        method, found = stage.applied.method, before[-1] if stage.look else None
        needed = any(_needs_weight(model) for model in stage.applied.models)
        values = []
        for part in self._parts(inputs, block, before):
            weight = _value(stage.context, part, None) if needed else None
            models = _models(stage.applied, part, weight)
            values.append(method.looks[stage.look].block(*models, found=found, **stage.applied.parameters))
        fold = method.looks[stage.look].fold
        return values if fold is None else [fold(values)]

    def gather(self, number: int, values: Sequence[Sequence[Any]], *before: Any) -> Any:
        """What look number `number` found, of the values of all blocks."""
        stage = self.stages[number]
        found = before[-1] if stage.look else None
        together = stage.applied.method.looks[stage.look].together
        return together([v for block in values for v in block], found=found, **stage.applied.parameters)

    def fill(self, inputs: Sequence[Tensor | None], out: Tensor, block: Block, *found: Any) -> None:
        """Fill the block `out`: computed in float32, or float64 where it matters, and rounded once."""
        expression = self.expression
        if not self.turned and isinstance(expression, Applied) and _by_shortcut(expression, inputs, out):
            return
        out = out.T if self.turned else out
        for part in self._parts(inputs, block, found):
            store(_value(expression, part, None), out[part.part])

    def run(self, inputs: Sequence[Tensor | None], out: Tensor) -> None:
        """Fill a whole tensor that is one block, looks and all."""
        block, found = Block(0, 0, self.shape[0]), list[Any]()
        for number in range(len(self.stages)):
            found.append(self.gather(number, [self.look(number, inputs, block, *found)], *found))
        self.fill(inputs, out, block, *found)

    def _parts(self, inputs: Sequence[Tensor | None], block: Block, found: Sequence[Any]) -> Iterator[_Part]:
        """The parts of a block, which follow from the shape alone."""
        import torch

        seen = [t for t in inputs if t is not None]
        wide = self.wide or any(t.dtype is torch.float64 for t in seen)
        last = {id(stage.applied): found[n] for n, stage in enumerate(self.stages[: len(found)])}
        generators: dict[str, Generator] = {}
        converted: dict[int, Tensor] = {}

        def draw(salt: str) -> Generator:
            if salt not in generators:
                generators[salt] = generator_for(self.seed, f"{self.name}\0{salt}", block.number)
            return generators[salt]

        again = repeated(self.expression)
        rows, step = block.stop - block.start, self.shape[0]
        if self.grain is not Grain.TENSOR:
            step = max(1, WORKING_VALUES // max(math.prod(self.shape[1:]), 1))
        for start in range(0, max(rows, 1), max(step, 1)):
            stop = min(start + step, rows)
            yield _Part(
                inputs, self.shared, slice(start, stop), slice(block.start + start, block.start + stop),
                (stop - start, *self.shape[1:]), torch.float64 if wide else torch.float32, seen[0].device, draw, last,
                converted, again,
            )  # fmt: skip


def _by_shortcut(applied: Applied, inputs: Sequence[Tensor | None], out: Tensor) -> bool:
    """Fill `out` in one operation, where all models are tensors as they are read and the method has such a one."""
    shortcut = applied.method.shortcut
    if shortcut is None or out.numel() <= SMALL:
        return False
    read = [inputs[m.number] for m in applied.models if isinstance(m, Given) and m.grain is Grain.VALUES]
    return len(read) == len(applied.models) and shortcut(read, out, **applied.parameters)


def apply(
    method: MergeMethod, models: Sequence[Tensor], out: Tensor, parameters: Mapping[str, Any], *,
    statistics: Sequence[Tensor | None] = (), seed: int = 0, name: str = "",
) -> None:  # fmt: skip
    """Fill `out` with what a method makes of whole tensors of one shape, at least one axis each."""
    import torch

    given = [*models, *(t for t in statistics if t is not None)]
    shared = frozenset(n for n, t in enumerate(given) if n >= len(models) and t.shape != out.shape)
    at = iter(range(len(models), len(given)))
    applied = Applied(
        method, tuple(Given(n) for n in range(len(models))), parameters, "0",
        tuple(None if t is None else Given(next(at)) for t in statistics),
    )  # fmt: skip
    grain, shape = applied.grain, tuple(out.shape)
    if grain is Grain.VALUES:
        given = [t if n in shared else t.reshape(-1) for n, t in enumerate(given)]
        shape = (out.numel(),)
        out = out.view(-1)
    wide = out.numel() <= SMALL or method.double
    wide = wide or any(t.dtype in (torch.float32, torch.float64) for t in (*models, out))
    Program(applied, name, seed, shape, grain, wide, shared, stages(applied)).run(given, out)
