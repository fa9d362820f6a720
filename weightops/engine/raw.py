"""Compute on bytes: the lane of raw tasks, which never sees torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from weightops.engine.chunks import slot_span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightops.engine.chunks import Chunk
    from weightops.files.tensor import Slot
    from weightops.plan import Block


def compute_raw(
    chunk: Chunk, inputs: Sequence[memoryview], outputs: Sequence[memoryview], found: Sequence[Any] = ()
) -> list[Any]:
    """Run the task's compute on the bytes of each block of the chunk; the blocks' values, in order."""
    task = chunk.task
    compute = cast("Callable[..., Any]", task.compute)

    def part(slot: Slot, buffer: memoryview, block: Block, shared: bool = False) -> memoryview:
        begin, _ = slot_span(task, slot, chunk.start, chunk.stop, shared=shared)
        start, stop = slot_span(task, slot, block.start, block.stop, shared=shared)
        return buffer[start - begin : stop - begin]

    values = []
    for block in chunk.blocks():
        given = [part(i.slot, buffer, block, i.shared) for i, buffer in zip(task.inputs, inputs, strict=True)]
        filled = [part(slot, buffer, block) for slot, buffer in zip(task.outputs, outputs, strict=True)]
        values.append(compute(given, filled, block, *found))
    return values
