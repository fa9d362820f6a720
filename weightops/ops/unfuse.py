"""unfuse: a fused file and what `fuse --undo` kept become the original file, byte for byte, without torch."""

from __future__ import annotations

import contextlib
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from weightops.engine.chunks import memory_for
from weightops.engine.run import Progress, ignore, run
from weightops.errors import FormatError, MismatchError, quote
from weightops.files.checkpoint import open_checkpoint
from weightops.files.dtypes import ARITHMETIC
from weightops.files.tensor import Slot
from weightops.ops.produce import Planned, named, produce
from weightops.ops.report import Account, tensors
from weightops.ops.undo_codes import Damaged, decode, itemsize, predict, work_nbytes
from weightops.ops.undo_format import COPY, DIFFERENCE, Part, Read, piece_name, read_undo
from weightops.plan import Block, Grain, Input, Plan, Task

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from weightops.files.checkpoint import Checkpoint
    from weightops.files.tensor import TensorSpec
    from weightops.ops.report import Report
    from weightops.plan import RawCompute


def unfuse(
    file: str | os.PathLike[str],
    *,
    undo: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    memory: int | None = None,
    threads: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    on_progress: Progress = ignore,
) -> Report:
    """Write the file into which LoRAs were fused as it was before, header and all, to `output`.

    file: what `fuse` wrote; undo: what it wrote beside it. output: None for the original's name in the current
    folder, or, where that is taken, this name with "-unfused". Every byte that is needed is hashed before anything is
    written; what is not the file that the undo was made for is a MismatchError. Raises WeightopsError.
    """
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(open_checkpoint(file))
        kept = stack.enter_context(open_checkpoint(undo))
        found = read_undo(kept)
        _check(opened, kept, found)
        planned = _plan(opened, kept, found)
        scan = _scan(opened, planned.plan)
        total = sum(
            entry.slot.spec.nbytes for plan in (scan, planned.plan) for task in plan.tasks for entry in task.inputs
        )
        asked = memory_for(planned.plan, memory)
        if not dry_run:
            hashed = run(
                scan, None, memory=asked, threads=threads, on_progress=lambda done, _: on_progress(done, total)
            )
            if hashed.hashes[0] != found.about.fused_hash:
                what = f"is not the file that {kept.label} was made for: found {hashed.hashes[0]}"
                hint = f"that one was written as {quote(found.about.fused_name)}; any of its tensors may have changed"
                raise MismatchError(opened.label, f"{what}, expected {found.about.fused_hash}", hint)
        read = sum(entry.slot.spec.nbytes for task in scan.tasks for entry in task.inputs)
        return produce(
            "unfuse", planned, _target(output, kept, found), memory=asked, device="cpu", threads=threads, force=force,
            dry_run=dry_run, check=False, on_progress=lambda done, _: on_progress(read + done, total),
        )  # fmt: skip


def _target(output: str | os.PathLike[str] | None, kept: Checkpoint, found: Read) -> Path:
    """The original's name, which a stranger may have written."""
    if output is not None:
        return Path(output)
    name = PurePosixPath(found.about.name.replace("\\", "/")).name
    stem = PurePosixPath(name).stem
    if not stem or not name.isprintable():
        raise FormatError(kept.label, f"says that the original's name is {quote(found.about.name)}", "-o gives another")
    free = named(None, stem)
    return free if not free.exists() and not free.is_symlink() else named(None, stem, "-unfused")


def _check(opened: Checkpoint, kept: Checkpoint, found: Read) -> None:
    """Has the file the tensors that are needed? By hash it will be known only when it is read."""
    for key, spec in found.original.items():
        parts = found.about.parts.get(key, [])
        if parts and all(part.how not in (COPY, DIFFERENCE) for part in parts):
            continue
        info = opened.tensors.get(key)
        copied = not parts or any(part.how == COPY for part in parts)
        if info is None:
            held = "it has none"
        elif info.spec.shape != spec.shape or (
            info.spec.dtype != spec.dtype if copied else info.spec.dtype not in ARITHMETIC
        ):
            held = f"it has {info.spec}, in place of {spec}"
        else:
            continue
        raise MismatchError(opened.label, f"is not the file that {kept.label} was made for: of {quote(key)} {held}")


# ------------------------------------------------------------------------------------------------ tasks


def _plan(opened: Checkpoint, kept: Checkpoint, found: Read) -> Planned:
    """Copies of what was copied, and a task for each piece that is kept."""
    account = Account()
    tasks = []
    for key, spec in found.original.items():
        parts = found.about.parts.get(key)
        (account.copied if parts is None else account.used).append(key)
        if parts is None:
            slot = Slot(key, spec)
            tasks.append(Task(key, (Input(0, slot),), (slot,)))
        for number, part in enumerate(parts or ()):
            if part.how == COPY:
                slot = Slot(key, spec if part.bands is None else spec.with_rows(_height(part)), part.bands)
                tasks.append(Task(key, (Input(0, slot),), (slot,)))
            pieces = [(piece, piece_name(key, number, piece)) for piece in range(part.count(spec))]
            tasks.extend(_task(opened, kept, spec, part, name, piece) for piece, name in pieces)
    plan = Plan((opened, kept), found.original, tuple(tasks), header=found.header)
    words = (
        f"{found.about.name} as it was: {tensors(len(account.used))} taken back, {tensors(len(account.copied))} copied"
    )
    return Planned(plan, account, words)


def _height(part: Part) -> int:
    return sum(stop - start for start, stop in part.bands or ())


def _task(opened: Checkpoint, kept: Checkpoint, spec: TensorSpec, part: Part, name: str, piece: int) -> Task:
    to = part.piece(spec, piece)
    data = Input(1, Slot(name, kept.tensors[name].spec))
    values = to.spec.values // itemsize(spec.dtype)
    if part.how != DIFFERENCE:
        work = work_nbytes(values, spec.dtype, None)
        return Task(name, (data,), (to,), _restored(kept.label, name, None, spec.dtype), Grain.TENSOR, work, raw=True)
    written = opened.tensors[part.key].spec
    compute = _restored(kept.label, name, written.dtype, spec.dtype)
    work = work_nbytes(values, spec.dtype, written.dtype)
    return Task(name, (data, Input(0, part.piece(written, piece))), (to,), compute, Grain.TENSOR, work, raw=True)


def _restored(label: str, name: str, written: str | None, original: str) -> RawCompute:
    """The compute function: inputs are what is kept, and where that is a difference, the bytes that were written."""
    size = itemsize(original)

    def compute(inputs: Sequence[memoryview], outputs: Sequence[memoryview], block: Block) -> None:
        import numpy as np

        predicted = None
        if written is not None:
            predicted = predict(np.frombuffer(inputs[1], f"u{itemsize(written)}"), written, original)
        try:
            codes = decode(inputs[0], len(outputs[0]) // size, size, predicted)
        except Damaged as e:
            raise FormatError(
                label, f"tensor {quote(name)} {e}", "the file is damaged; take another copy of it"
            ) from None
        outputs[0][:] = codes.view(np.uint8).data

    return compute


def _scan(opened: Checkpoint, plan: Plan) -> Plan:
    """Reads what the plan reads of the fused file, so that it is hashed."""
    tasks = []
    for task in plan.tasks:
        inputs = tuple(entry for entry in task.inputs if entry.source == 0)
        if inputs:
            compute = None if task.compute is None else _nothing
            tasks.append(Task(task.name, inputs, (), compute, task.grain, raw=task.raw))
    return Plan((opened,), {}, tuple(tasks))


def _nothing(inputs: Sequence[memoryview], outputs: Sequence[memoryview], block: Block) -> None:
    """To have read it is enough."""
