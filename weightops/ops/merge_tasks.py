"""The tasks of one tensor of a merge: its tree of methods, compiled for where the models have it."""

from __future__ import annotations

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
    applications,
    copies,
    decides,
    numbers,
    stages,
)
from weightops.merging.looks import LOOK_NBYTES
from weightops.merging.method import SMALL, WORKING_VALUES
from weightops.merging.recipe import Lora, Merge, Model, Node, Varied
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
    model has it, if it has it by such a name. statistics: of each file of statistics, the slot, or None.
    """

    label: str
    name: Name
    slot: Slot
    spots: Mapping[Model, tuple[int, Spot]]
    place: Place | None
    statistics: Mapping[str, tuple[int, Slot] | None]


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
        if looks_of is not None:
            root = compiled.made.get(id(looks_of))
            if root is None:
                return []
        return _tasks(root, compiled, looks_only=looks_of is not None)


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
        if self.piece.place is not None and self.piece.place.transposed:  # the orders are of the canonical tensor
            orders = tuple((1 - axis, order) for axis, order in orders)
        number = self._number(Input(source, spot.slot))
        self.models[number] = model
        return Given(number, spot.transposed, orders)

    def _lora(self, lora: Lora) -> Added | None:
        assert self.compiler.changes is not None
        number, source = self.compiler.loras[lora]
        found = self.compiler.changes.of(number, self.piece.name)
        if found is None:
            return None
        entries, changes, whole = found
        own = tuple(self._number(Input(source, entry.slot, entry.shared), shared=entry.shared) for entry in entries)
        assert self.piece.place is not None
        transposed = self.piece.place.transposed
        rows = max(1, WORKING_VALUES // max(self.piece.slot.spec.row_values, 1))
        self.lora_nbytes += 8 * copies_of(changes, entries, self.piece.slot.spec, rows)
        return Added(own, added(changes, transposed=transposed), depends(changes), whole or transposed)

    def _merge(self, node: Merge, salt: str) -> Expression | None:
        models = tuple(self.of(child, f"{salt}.{n}") for n, child in enumerate(node.inputs))
        settings = {key: self._setting(value) for key, value in node.parameters.items()}
        if node.method.name == "add":
            kept = [(m, w) for m, w in zip(models[1:], settings["weights"], strict=True) if m is not None and w]
            if not kept:
                return models[0]
            models = (models[0], *(m for m, _ in kept))
            settings["weights"] = tuple(w for _, w in kept)
        elif all(model is None for model in models):
            return None
        known = self.compiler.known.get(id(node))
        settings = node.method.check(settings, len(models))
        statistics = tuple(self._statistics(file) for file in node.statistics)
        found = Applied(
            node.method, models, settings, salt, statistics, None if known is None else known[self.piece.label]
        )
        self.made[id(node)] = found
        return found

    def _statistics(self, file: str) -> int | None:
        found = self.piece.statistics[file]
        if found is None:
            return None
        source, slot = found
        return self._number(Input(source, slot), shared=slot.spec.shape != self.piece.slot.spec.shape)

    def _setting(self, value: Any) -> Any:
        if isinstance(value, Varied):
            return self.compiler.settings(value, self.piece.name)
        if isinstance(value, tuple) and any(isinstance(v, Varied) for v in value):
            return tuple(self._setting(v) for v in value)
        return value


# ------------------------------------------------------------------------------------------------ tasks


def _tasks(root: Expression, compiled: _Compiled, *, looks_only: bool) -> list[Task]:
    piece, grain = compiled.piece, root.grain
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
    program = Program(
        root, piece.label, compiled.compiler.seed, slot.spec.shape, grain, wide, frozenset(compiled.shared),
        stages(root),
    )  # fmt: skip
    work = _work_nbytes(root, slot, grain) + compiled.lora_nbytes
    task_grain = Grain.TENSOR if grain is Grain.TENSOR else Grain.ROWS
    fill = Task(piece.label, tuple(inputs), (slot,), _filling(program), task_grain, work, repeated=decides(root))
    if not program.stages and not looks_only:
        return [fill]
    if not looks_only and block_rows(fill) >= task_rows(fill):
        return [Task(piece.label, fill.inputs, (slot,), _whole(program), Grain.TENSOR, work, repeated=fill.repeated)]
    found = [_look(program, number, fill, work) for number in range(len(program.stages))]
    if looks_only:
        return found
    follows = len(program.stages)
    last = Task(
        piece.label, fill.inputs, (slot,), fill.compute, task_grain, work, repeated=fill.repeated, follows=follows
    )
    return [*found, last]


def _work_nbytes(root: Expression, slot: Slot, grain: Grain) -> int:
    values = slot.spec.values
    if grain is not Grain.TENSOR:
        values = min(values, max(WORKING_VALUES, slot.spec.row_values))
    looks = max((LOOK_NBYTES * len(s.applied.models) for s in stages(root)), default=0)
    return 8 * (copies(root) + 1) * values + looks


def _look(program: Program, number: int, fill: Task, work: int) -> Task:
    """A scan, whose rows are cut as those of the task that fills the tensor."""
    stage = program.stages[number]
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
