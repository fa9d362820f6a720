"""Undo: what it takes to get the original of a fuse back, bit for bit; made while the fuse runs.

Knows no LoRA: the tasks of the plan are watched, and what it takes from the bytes that they write to those that they
read is kept.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from weightops.engine.chunks import block_rows
from weightops.engine.run import PLACEHOLDER, Leaves, hash_of, run
from weightops.errors import UsageError
from weightops.files.checkpoint import Checkpoint
from weightops.files.dtypes import ARITHMETIC
from weightops.files.header import MAX_TENSORS
from weightops.files.source import LocalFile, read
from weightops.files.spill import Spill
from weightops.files.tensor import Slot, TensorInfo, TensorSpec
from weightops.files.writer import SafetensorsFile, check_target
from weightops.ops.produce import stem
from weightops.ops.undo_codes import encode, itemsize, largest, predict, work_nbytes
from weightops.ops.undo_format import (
    COPY,
    DIFFERENCE,
    HEADER,
    PIECE_VALUES,
    WHOLE,
    About,
    Part,
    metadata,
    piece_name,
)
from weightops.plan import Grain, Input, Plan, Task

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from weightops.engine.run import Outcome
    from weightops.plan import Block

_COPYING = 16 << 20  # bytes in flight while the pieces are put in order: the fuse has let go of its own


class _Watched(NamedTuple):
    """An output of a task that stands where one of its inputs did: their numbers, and the part of the original."""

    given: int
    made: int
    part: Part
    number: int
    row_values: int


class Undo:
    """What is collected on the way, and the file at `path` that becomes of it: `Beside` the output of the run.

    `plan` does what the plan that was given does, and is watched. Its first source is what can be got back.
    Raises UsageError and OutputError for what can be known before any work.
    """

    def __init__(self, path: Path, plan: Plan, output: Path, *, force: bool) -> None:
        self.path = path
        self.force = force
        self.written = 0
        self._original = plan.sources[0]
        self._outputs = plan.outputs
        self._fused_name = output.name
        self._check(plan, output)
        self._header = _header_of(self._original)
        self._parts: dict[str, list[Part]] = {}
        self.plan = replace(plan, tasks=tuple(self._watched(plan)))
        self._check_count()
        self._spill: Spill | None = None
        self._spilling = threading.Lock()
        self._pieces: dict[str, tuple[int, int]] = {}
        self._leaves: Leaves = {}
        self._at_work = True
        self._committed = False

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, *_: object) -> None:
        if self._spill is not None:
            self._spill.close()

    @property
    def largest_nbytes(self) -> int:
        """The size of the file if nothing could be made smaller."""
        specs = {HEADER: TensorSpec("U8", (largest(len(self._header), 1),))}
        for part, number in self._all_parts():
            spec = self._original.tensors[part.key].spec
            size = itemsize(spec.dtype)
            for piece in range(part.count(spec)):
                nbytes = largest(part.piece(spec, piece).spec.nbytes // size, size)
                specs[piece_name(part.key, number, piece)] = TensorSpec("U8", (nbytes,))
        return SafetensorsFile(str(self.path), specs, metadata(self._about(PLACEHOLDER, PLACEHOLDER)), {}).size

    # ------------------------------------------------------------------ before the work

    def _check(self, plan: Plan, output: Path) -> None:
        if self._original.container != "safetensors":
            held = {"pickle": "a pickle", "shards": "several files"}.get(self._original.container, "a folder")
            what = f"{self._original.label} is {held}, and only a .safetensors file can be got back byte for byte"
            raise UsageError("--undo", what, "convert makes one file of it")
        if self.path.suffix.lower() != ".safetensors":
            raise UsageError("--undo", f"{str(self.path)!r}: the name must end in .safetensors")
        inputs = [file for source in plan.sources for file in source.files]
        with contextlib.suppress(OSError, ValueError):
            if self.path.resolve() == output.resolve() or self.path.samefile(output):
                raise UsageError("--undo", f"{str(self.path)!r} is also the output", "choose another name")
        with contextlib.suppress(OSError, ValueError):
            if any(isinstance(file, LocalFile) and file.same_file(self.path.stat()) for file in inputs):
                raise UsageError("--undo", f"{str(self.path)!r} is also an input", "choose another name")
        check_target(self.path, 0, force=self.force, inputs=inputs)

    def _check_count(self) -> None:
        count = 1 + sum(part.count(self._original.tensors[part.key].spec) for part, _ in self._all_parts())
        if count > MAX_TENSORS:
            what = f"{self._original.label} would be kept in {count:,} pieces, and a file may hold {MAX_TENSORS:,}"
            raise UsageError("--undo", what)

    def _watched(self, plan: Plan) -> Iterator[Task]:
        """The tasks, of which those are watched that change something of the original; after the last of them,
        `_parts` holds what is not whole in the output."""
        found: dict[str, list[Part]] = defaultdict(list)
        for task in plan.tasks:
            entries = []
            for made, slot in enumerate(task.outputs):
                given = next((n for n, entry in enumerate(task.inputs) if _stands(entry, slot, task)), None)
                if given is None or self._original.tensors[slot.key].spec.shape != self._outputs[slot.key].shape:
                    continue
                spec, parts = task.inputs[given].slot.spec, found[slot.key]
                if task.compute is None:
                    parts.append(Part(slot.key, slot.bands, COPY, 1))
                elif {spec.dtype, slot.spec.dtype} <= ARITHMETIC and task.needs_torch:
                    whole = task.grain is Grain.TENSOR
                    step = PIECE_VALUES if whole else max(block_rows(task) * spec.row_values, 1)
                    part = Part(slot.key, slot.bands, DIFFERENCE, step)
                    entries.append(_Watched(given, made, part, len(parts), 0 if whole else spec.row_values))
                    parts.append(part)
            yield self._watch(task, entries) if entries else task
        for key, info in self._original.tensors.items():
            if found[key] != [Part(key, None, COPY, 1)]:
                self._parts[key] = [*found[key], *_rest(key, info.spec, found[key])]

    def _watch(self, task: Task, entries: list[_Watched]) -> Task:
        inner: Any = task.compute

        def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block) -> Any:
            found = inner(inputs, outputs, block)
            if self._at_work:  # and not when samples are made again, to be compared
                for entry in entries:
                    self._keep(entry, _codes(inputs[entry.given]), _codes(outputs[entry.made]), block)
            return found

        work = 0
        for entry in entries:
            spec, made = task.inputs[entry.given].slot.spec, task.outputs[entry.made].spec
            values = min(entry.part.step, spec.values)
            work = max(work, largest(values, itemsize(spec.dtype)) + work_nbytes(values, spec.dtype, made.dtype))
        return replace(task, compute=compute, work_nbytes=task.work_nbytes + work)

    # ------------------------------------------------------------------ during the work, from any thread

    def _keep(self, entry: _Watched, original: NDArray[Any], written: NDArray[Any], block: Block) -> None:
        import xxhash

        part, spec = entry.part, self._original.tensors[entry.part.key].spec
        made = self._outputs[part.key]
        first = block.start * entry.row_values
        for start in range(0, len(original), part.step):
            piece = (first + start) // part.step
            before, after = original[start : start + part.step], written[start : start + part.step]
            where = part.piece(made, piece)
            self._leaves[part.key, where.bands or (), 0, where.spec.nbytes] = xxhash.xxh3_128_digest(after.data)
            data = encode(before, predict(after, made.dtype, spec.dtype))
            self._append(piece_name(part.key, entry.number, piece), data)

    def _append(self, name: str, data: bytes) -> None:
        with self._spilling:
            if self._spill is None:
                self._spill = Spill(self.path)
        self._pieces[name] = self._spill.append(data), len(data)

    # ------------------------------------------------------------------ after the work

    def commit(self, outcome: Outcome) -> None:
        """Let the file appear, with all pieces in their order."""
        import numpy as np

        self._at_work = False
        self._append(HEADER, encode(np.frombuffer(self._header, np.uint8), None, text=True))
        for part, number in self._all_parts():
            if part.how == WHOLE:
                self._keep_unwatched(part, number)
        self._original.check_unchanged()
        assert self._spill is not None
        tensors = {
            name: TensorInfo(TensorSpec("U8", (nbytes,)), 0, start, start + nbytes)
            for name, (start, nbytes) in self._pieces.items()
        }
        source = Checkpoint(str(self.path), "safetensors", [self._spill], tensors)
        specs = {name: tensors[name].spec for name in sorted(tensors)}
        tasks = tuple(Task(name, (Input(0, Slot(name, spec)),), (Slot(name, spec),)) for name, spec in specs.items())
        about = self._about(outcome.hashes[0], hash_of({**self._copied(outcome), **self._leaves}))
        plan = Plan((source,), specs, tasks, metadata(about))
        self.written = run(plan, self.path, memory=_COPYING, force=self.force).bytes_written
        self._committed = True

    def withdraw(self) -> None:
        if self._committed:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _keep_unwatched(self, part: Part, number: int) -> None:
        """What the output does not hold, and no task had as it was."""
        import numpy as np

        spec = self._original.tensors[part.key].spec
        for piece in range(part.count(spec)):
            where = part.piece(spec, piece)
            data = np.empty(where.spec.nbytes, np.uint8)
            self._original.read_bytes(where, 0, len(data), data.data)
            self._append(piece_name(part.key, number, piece), encode(data.view(f"u{itemsize(spec.dtype)}"), None))

    def _copied(self, outcome: Outcome) -> Leaves:
        """The hashes of what was copied, and is needed again."""
        copied = {(part.key, part.bands or ()) for part, _ in self._all_parts() if part.how == COPY}
        copied |= {(key, ()) for key in self._original.tensors if key not in self._parts}
        return {leaf: digest for leaf, digest in outcome.leaves[0].items() if leaf[:2] in copied}

    def _all_parts(self) -> Iterator[tuple[Part, int]]:
        for parts in self._parts.values():
            yield from ((part, number) for number, part in enumerate(parts))

    def _about(self, found: str, fused: str) -> About:
        original = f"{stem(self._original)}.safetensors"
        # A file's name may be any bytes, but a header is Unicode.
        names = [n.encode(errors="surrogateescape").decode(errors="replace") for n in (original, self._fused_name)]
        return About(names[0], self._original.nbytes, found, names[1], fused, len(self._header), self._parts)


def _stands(entry: Input, slot: Slot, task: Task) -> bool:
    """Is the output in the place of this input, block by block?"""
    alike = entry.source == 0 and entry.slot.key == slot.key and entry.slot.bands == slot.bands
    return alike and entry.slot.spec.shape == slot.spec.shape and (task.grain is Grain.TENSOR or not entry.shared)


def _rest(key: str, spec: TensorSpec, parts: Sequence[Part]) -> list[Part]:
    """The rows of the original that no part holds."""
    if any(part.bands is None for part in parts):
        return []
    if not parts:
        return [Part(key, None, WHOLE, PIECE_VALUES)]
    missing, position = [], 0
    for start, stop in [*sorted(band for part in parts for band in part.bands or ()), (spec.rows, spec.rows)]:
        if start > position:
            missing.append((position, start))
        position = max(position, stop)
    return [Part(key, tuple(missing), WHOLE, PIECE_VALUES)] if missing else []


def _header_of(opened: Checkpoint) -> bytes:
    """The first bytes of the file, up to those of its first tensor."""
    length = int.from_bytes(read(opened.files[0], 0, 8), "little")
    return read(opened.files[0], 0, 8 + length)


def _codes(tensor: Tensor) -> NDArray[Any]:
    """The bits of the values, in their order, as whole numbers."""
    import torch

    flat = tensor.reshape(-1).cpu()
    found: NDArray[Any] = flat.view(torch.uint8).numpy().view(f"u{flat.element_size()}")
    return found
