"""Cut Tasks into chunks of whole blocks that fit the budget. Pure.

A block is what compute sees, and its height follows from the shape alone, so that the bytes written do not
depend on memory; a chunk is what is read and written at one stroke, and its height is the budget's affair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from weightops.errors import MemoryRefused
from weightops.files.dtypes import DTYPES
from weightops.plan import Block, Grain, Plan, Task

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightops.files.tensor import Slot

# Two inputs and an output of a block in half precision fill 6 MiB: they stay in the cache from the read to the
# write. Larger blocks measured slower, smaller ones too: threads then spend their time passing Python's lock.
BLOCK_VALUES = 1024 * 1024
CHUNK_MIN = 1 << 20
CHUNK_MAX = 12 << 20
SHARE = 24  # of the budget, for one chunk: enough chunks in flight to keep disks and cores busy
SHARE_OF_SHARED = 6  # the same, for a chunk with much that is read again for each

DEFAULT_MEMORY = 128 << 20
LARGEST_DEFAULT = 512 << 20  # where a matrix is needed whole

# Matrices that are done together on a CUDA device, and the values that they may have.
_AT_ONCE = 16
_AT_ONCE_VALUES = 32 << 20


class Chunk(NamedTuple):
    """Rows `start` to `stop` of a task (bytes, for a copy), its first block's number, and the bytes it takes."""

    task: Task
    number: int
    start: int
    stop: int
    cost: int

    def blocks(self) -> Iterator[Block]:
        height = block_rows(self.task)
        for start in range(self.start, self.stop, height):
            yield Block(start // height, start, min(start + height, self.stop))


def task_rows(task: Task) -> int:
    """The rows that can be cut: those of the slots that are not shared; bytes, for a copy."""
    if task.compute is None:
        return task.inputs[0].slot.spec.nbytes
    for slot in (*task.outputs, *(i.slot for i in task.inputs if not i.shared)):
        # A whole tensor without rows is still one piece of work: the task's other outputs may have some.
        return max(slot.spec.rows, 1) if task.grain is Grain.TENSOR else slot.spec.rows
    return 1


def is_work(task: Task) -> bool:
    """Is there anything that it reads or fills?"""
    return any(slot.spec.nbytes for slot in (*task.outputs, *(i.slot for i in task.inputs)))


def block_rows(task: Task) -> int:
    if task.compute is None:
        # As many values as an elementwise block, so that a tensor hashes alike whether it is copied or computed with.
        return BLOCK_VALUES * DTYPES[task.inputs[0].slot.spec.dtype].bits // 8
    if task.grain is Grain.TENSOR:
        return task_rows(task)
    slots = [*task.outputs, *(i.slot for i in task.inputs if not i.shared)]
    widest = max((slot.spec.row_values for slot in slots), default=1)
    return max(1, BLOCK_VALUES // max(widest, 1))


def chunk_cost(task: Task, rows: int) -> int:
    """Bytes in flight for a chunk of so many rows: inputs, outputs, and the working copies of one block."""
    if task.compute is None:
        return rows  # a copy is written from the buffer into which it was read
    slots = [*((i.slot, i.shared) for i in task.inputs), *((slot, False) for slot in task.outputs)]
    spans = (slot_span(task, slot, 0, rows, shared=shared) for slot, shared in slots)
    return task.work_nbytes + sum(stop - start for start, stop in spans)


def slot_span(task: Task, slot: Slot, start: int, stop: int, *, shared: bool) -> tuple[int, int]:
    """The bytes of `slot` that belong to rows `start` to `stop` of the task; all of them where it cannot be cut."""
    if task.compute is None:
        return start, stop
    if shared or task.grain is Grain.TENSOR:
        return 0, slot.spec.nbytes
    return start * slot.spec.row_nbytes, stop * slot.spec.row_nbytes


def smallest_memory(plan: Plan) -> tuple[int, str]:
    """The bytes of the largest indivisible piece of work, and the name of its task."""
    pieces = ((chunk_cost(t, min(block_rows(t), task_rows(t))), t.name) for t in plan.tasks)
    return max(pieces, default=(0, ""))


def check_memory(plan: Plan, memory: int) -> None:
    needed, name = smallest_memory(plan)
    if needed > memory:
        raise MemoryRefused(
            "--memory",
            f"{memory:,} bytes are too few: {name!r} alone takes {needed:,}",
            f"--memory {-(-needed // (1 << 20))}MiB would do",
        )


def memory_for(plan: Plan, asked: int | None) -> int:
    """The bytes in flight that were asked for; else as many as hold two of the largest pieces, within bounds."""
    return asked or max(DEFAULT_MEMORY, min(LARGEST_DEFAULT, 2 * smallest_memory(plan)[0]))


def at_once(values: int, nbytes: int) -> int:
    """How many matrices that are alike a device does at once, each of so many values, for which it takes so many bytes.

    Whatever the memory, for what is written depends on it; but of so few, two such lots fit where no memory is said.
    """
    return max(1, min(_AT_ONCE, _AT_ONCE_VALUES // max(values, 1), LARGEST_DEFAULT // 2 // max(nbytes, 1)))


def chunk_target(memory: int) -> int:
    """The bytes that a chunk should take, if a block does not take more."""
    return min(max(memory // SHARE, CHUNK_MIN), CHUNK_MAX)


def cut(plan: Plan, memory: int) -> Iterator[Chunk]:
    """The chunks of all tasks, in plan order. Raises MemoryRefused if a block alone is over the budget."""
    check_memory(plan, memory)
    target = chunk_target(memory)
    for number, task in enumerate(plan.tasks):
        rows, height = task_rows(task), block_rows(task)
        if not is_work(task):
            continue
        one = chunk_cost(task, height)
        two = chunk_cost(task, 2 * height)
        # What is shared is read again with each chunk: it should be little of what the chunk reads.
        shared = sum(i.slot.spec.nbytes for i in task.inputs if i.shared)
        room = max(target, min(one + 4 * shared, memory // SHARE_OF_SHARED))
        blocks = max(1, 1 + (room - one) // max(two - one, 1)) if task.grain is Grain.ROWS else 1
        while blocks > 1 and chunk_cost(task, blocks * height) > memory:
            blocks -= 1
        for start in range(0, rows, blocks * height):
            stop = min(start + blocks * height, rows)
            yield Chunk(task, number, start, stop, chunk_cost(task, stop - start))
