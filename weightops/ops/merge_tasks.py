"""The tasks of one tensor of a merge: its tree of methods, compiled for where the models have it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops.engine.chunks import block_rows, task_rows
from weightops.files.tensor import Slot
from weightops.merging.expression import (
    Added,
    Applied,
    Expression,
    Given,
    Program,
    Stage,
    applications,
    copies,
    decides,
    numbers,
    repeated,
    stages,
)
from weightops.merging.looks import LOOK_NBYTES
from weightops.merging.method import SMALL, WORKING_VALUES
from weightops.merging.recipe import Lora, Merge, Model, Node, Varied, leaves
from weightops.ops.changes import added, copies_of, depends
from weightops.plan import Block, Grain, Input, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from weightops.naming.slots import Place
    from weightops.ops.align import Name, Spot
    from weightops.ops.fuse_plan import Changes

_WIDE = frozenset({"F32", "F64"})


@dataclass(slots=True)
class Piece:
    """A tensor of the output, or the band of one that is one canonical tensor, and where each model has it.

    label: what it is called in tasks, and what seeds its randomness. name: its canonical one. place: where the first
    model has it, if it has it by such a name. statistics: `statistics(file, slot, model, by_value)` tells where a file
    of such has those of what model number `model` has in this slot. turned: it is stored transposed, and computed as
    the canonical tensor that it is.
    """

    label: str
    name: Name
    slot: Slot
    spots: Mapping[Model, tuple[int, Spot]]
    place: Place | None
    statistics: Callable[[str, Slot, int, bool], tuple[int, Slot] | None]
    turned: bool = False


@dataclass(slots=True)
class Compiler:
    """Makes tasks of a tree of methods.

    settings: of a setting that varies, its number for a canonical tensor. changes: what LoRAs change, and of each its
    number there and that of its file among the plan's sources. orders: in which order a model's rows and columns are
    to be taken. known: what a method's looks found of each tensor, where that took a pass of its own.
    """

    root: Node
    seed: int
    settings: Callable[[Varied, Name], Any]
    changes: Changes | None
    loras: Mapping[Lora, tuple[int, int]]
    orders: Mapping[Model, Mapping[Name, tuple[tuple[int, Any], ...]]]
    known: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def alone(self, piece: Piece) -> Model | None:
        """The model that the tree comes down to for this piece, where it is one as it stands: its bytes are copied."""
        compiled = _Compiled(self, piece)
        root = compiled.of(self.root, "0")
        return compiled.models[root.number] if isinstance(root, Given) and not root.orders else None

    def tasks(self, piece: Piece, *, looks_of: Merge | None = None) -> list[Task]:
        """The tasks that fill the piece, its looks before it; with `looks_of`, that method's looks alone."""
        compiled = _Compiled(self, piece)
        root = compiled.of(self.root, "0")
        assert root is not None
        if looks_of is None:
            return _tasks(root, compiled)
        own = compiled.made.get(id(looks_of))
        return [] if own is None else _tasks(root, compiled, looks_of=own)


class _Compiled:
    """The state of compiling one piece."""

    def __init__(self, compiler: Compiler, piece: Piece) -> None:
        self.compiler = compiler
        self.piece = piece
        self.inputs: list[Input] = []
        self.shared: set[int] = set()
        self.made: dict[int, Applied] = {}
        self.models: dict[int, Model] = {}
        self.lora_nbytes = 0
        self._numbers: dict[tuple[int, Slot], int] = {}

    def of(self, node: Node, salt: str) -> Expression | None:
        if isinstance(node, Model):
            return self._model(node)
        if isinstance(node, Lora):
            return self._lora(node)
        return self._merge(node, salt)

    def _number(self, entry: Input, *, shared: bool = False) -> int:
        at = entry.source, entry.slot
        if at not in self._numbers:
            self._numbers[at] = len(self.inputs)
            self.inputs.append(entry)
        if shared:
            self.shared.add(self._numbers[at])
        return self._numbers[at]

    def _model(self, model: Model) -> Given:
        source, spot = self.piece.spots[model]
        orders = self.compiler.orders.get(model, {}).get(self.piece.name, ())
        number = self._number(Input(source, spot.slot))
        self.models[number] = model
        return Given(number, spot.transposed != self.piece.turned, orders)

    def _lora(self, lora: Lora) -> Added | None:
        assert self.compiler.changes is not None
        number, source = self.compiler.loras[lora]
        name = ("", self.piece.slot.key) if self.compiler.changes.by_key else self.piece.name
        found = self.compiler.changes.of(number, name)
        if found is None:
            return None
        entries, changes, whole = found
        own = tuple(self._number(Input(source, entry.slot, entry.shared), shared=entry.shared) for entry in entries)
        rows = max(1, WORKING_VALUES // max(self.piece.slot.spec.row_values, 1))
        self.lora_nbytes += 8 * copies_of(changes, entries, self.piece.slot.spec, rows)
        return Added(own, added(changes), depends(changes), whole)

    def _merge(self, node: Merge, salt: str) -> Expression | None:
        settings = {key: self._setting(value) for key, value in node.parameters.items()}
        if node.method.name == "add":
            # What has no weight is not even read.
            weights = (1.0, *settings["weights"])
            given = [(self.of(child, f"{salt}.{n}"), weights[n]) for n, child in enumerate(node.inputs) if weights[n]]
            kept = [(m, w) for m, w in given if m is not None]
            if len(kept) == 1:
                return kept[0][0]
            models: tuple[Expression | None, ...] = tuple(m for m, _ in kept)
            settings["weights"] = tuple(w for _, w in kept[1:])
        else:
            models = tuple(self.of(child, f"{salt}.{n}") for n, child in enumerate(node.inputs))
            if all(model is None for model in models):
                return None
        known = self.compiler.known.get(id(node))
        settings = node.method.check(settings, len(models))
        under_star = node.inputs[node.method.fixed :]
        by_value = node.method.grain is Grain.VALUES
        statistics = tuple(
            self._statistics(file, child, by_value) for file, child in zip(node.statistics, under_star, strict=False)
        )
        if known is None:
            seen = None
        elif self.piece.slot.spec.values:
            seen = known[self.piece.label]
        else:  # nobody looks at nothing, nor computes it
            seen = ()
        found = Applied(node.method, models, settings, salt, statistics, seen)
        self.made[id(node)] = found
        return found

    def _statistics(self, file: str, node: Node, by_value: bool) -> Given | None:
        """Those of the model in this place, or of the one that a difference there is of."""
        model = next((leaf for leaf in leaves(node) if isinstance(leaf, Model)), None)
        if model is None:
            return None
        number, spot = self.piece.spots[model]
        found = self.piece.statistics(file, spot.slot, number, by_value)
        if found is None:
            return None
        source, slot = found
        turned = by_value and spot.transposed != self.piece.turned
        return Given(self._number(Input(source, slot), shared=not by_value), turned)

    def _setting(self, value: Any) -> Any:
        if isinstance(value, Varied):
            return self.compiler.settings(value, self.piece.name)
        if isinstance(value, tuple) and any(isinstance(v, Varied) for v in value):
            return tuple(self._setting(v) for v in value)
        return value


# ------------------------------------------------------------------------------------------------ tasks


def _tasks(root: Expression, compiled: _Compiled, *, looks_of: Applied | None = None) -> list[Task]:
    piece = compiled.piece
    grain = Grain.TENSOR if piece.turned else root.grain
    inputs = [Input(i.source, i.slot, n in compiled.shared) for n, i in enumerate(compiled.inputs)]
    own = [i.slot for n, i in enumerate(inputs) if n not in compiled.shared]
    flat = not piece.slot.spec.shape or (grain is Grain.VALUES and all(s.bands is None for s in (*own, piece.slot)))
    slot = piece.slot
    if flat:
        grain, slot = Grain.VALUES, Slot(slot.key, slot.spec.flat())
        inputs = [i if i.shared else Input(i.source, Slot(i.slot.key, i.slot.spec.flat())) for i in inputs]
    elif grain is Grain.VALUES:
        grain = Grain.ROWS
    wide = piece.slot.spec.values <= SMALL or bool(_WIDE & {piece.slot.spec.dtype, *(s.spec.dtype for s in own)})
    wide = wide or any(applied.method.double for applied, _ in applications(root))
    shape = slot.spec.shape[::-1] if piece.turned else slot.spec.shape
    program = Program(
        root, piece.label, compiled.compiler.seed, shape, grain, wide, frozenset(compiled.shared),
        _stages(root, looks_of), piece.turned,
    )  # fmt: skip
    work = _work_nbytes(program, inputs) + compiled.lora_nbytes
    task_grain = Grain.TENSOR if grain is Grain.TENSOR else Grain.ROWS
    fill = Task(piece.label, tuple(inputs), (slot,), _filling(program), task_grain, work, repeated=decides(root))
    found = [_look(program, number, fill, work) for number in range(len(program.stages))]
    if looks_of is not None:
        return found
    if not found:
        return [fill]
    if block_rows(fill) >= task_rows(fill):
        return [Task(piece.label, fill.inputs, (slot,), _whole(program), Grain.TENSOR, work, repeated=fill.repeated)]
    follows = len(program.stages)
    last = Task(
        piece.label, fill.inputs, (slot,), fill.compute, task_grain, work, repeated=fill.repeated, follows=follows
    )
    return [*found, last]


def _stages(root: Expression, looks_of: Applied | None) -> tuple[Stage, ...]:
    """The looks of a tree; or those of one method in it, after those whose results it, or its place, needs."""
    every = stages(root)
    if looks_of is None:
        return every
    context = next(context for applied, context in applications(root) if applied is looks_of)
    needed = {id(applied) for tree in (context, looks_of) for applied, _ in applications(tree)}
    return tuple(stage for stage in every if id(stage.applied) in needed)


def _work_nbytes(program: Program, inputs: Sequence[Input]) -> int:
    """Of a block: working copies of the part that is computed, what is shared, what methods and looks take beside."""
    root, values = program.expression, math.prod(program.shape)
    if program.grain is not Grain.TENSOR:
        values = min(values, max(WORKING_VALUES, math.prod(program.shape[1:])))
    found = [applied for applied, _ in applications(root)]
    shared = {s.number for a in found for s in a.statistics if s is not None and s.number in program.shared}
    nbytes = 8 * sum(inputs[n].slot.spec.values for n in shared)
    # A method that lacks one of its statistics does without them all.
    nbytes += max(
        (a.method.beside(program.shape) for a in found if a.method.beside and None not in a.statistics), default=0
    )
    nbytes += max((LOOK_NBYTES * len(s.applied.models) for s in program.stages), default=0)
    return 8 * (copies(root) + len(repeated(root)) + 1) * values + nbytes


def _look(program: Program, number: int, fill: Task, work: int) -> Task:
    """A scan, whose rows are cut as those of the task that fills the tensor."""
    stage = program.stages[number]
    # All of a LoKr is shared; but it stands in the place of a model, which tells how many rows there are.
    wanted = sorted({*numbers(stage.applied), *numbers(stage.context)})
    whole = fill.grain is Grain.TENSOR
    count = len(fill.inputs)

    def compute(inputs: Sequence[Tensor], _outputs: Sequence[Tensor], block: Block, *before: Any) -> list[Any]:
        given: list[Tensor | None] = [None] * count
        for n, tensor in zip(wanted, inputs, strict=True):
            given[n] = tensor
        return program.look(number, given, _rows(program, block, whole), *before)

    def gather(values: Sequence[list[Any]], *before: Any) -> Any:
        return program.gather(number, values, *before)

    inputs = tuple(fill.inputs[n] for n in wanted)
    return Task(fill.name, inputs, (), compute, fill.grain, work, gather=gather, follows=number)


def _filling(program: Program) -> Callable[..., None]:
    whole = program.grain is Grain.TENSOR

    def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block, *found: Any) -> None:
        program.fill(inputs, outputs[0], _rows(program, block, whole), *found)

    return compute


def _whole(program: Program) -> Callable[..., None]:
    def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block) -> None:
        program.run(inputs, outputs[0])

    return compute


def _rows(program: Program, block: Block, whole: bool) -> Block:
    """The rows of a block: all, where the task may count those of another tensor."""
    return Block(0, 0, program.shape[0]) if whole else block
