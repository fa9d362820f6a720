"""Tasks are cut into whole blocks that cover every row once, whatever the budget."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightops.engine.chunks import (
    BLOCK_VALUES,
    CHUNK_MAX,
    CHUNK_MIN,
    SHARE,
    block_rows,
    check_memory,
    chunk_cost,
    cut,
    smallest_memory,
    task_rows,
)
from weightops.errors import MemoryRefused
from weightops.files.dtypes import DTYPES
from weightops.files.tensor import Slot, TensorSpec
from weightops.plan import Grain, Input, Plan, Task

if TYPE_CHECKING:
    from weightops.plan import Block

MIB = 1 << 20


def nothing(*_: object) -> None:
    """A compute function that is never called here."""


def copy(dtype: str, *shape: int) -> Task:
    slot = Slot("a", TensorSpec(dtype, shape))
    return Task("a", (Input(0, slot),), (slot,))


def rows(dtype: str, *shape: int, inputs: int = 2, work: int = 0, grain: Grain = Grain.ROWS) -> Task:
    slot = Slot("a", TensorSpec(dtype, shape))
    return Task("a", (Input(0, slot),) * inputs, (slot,), nothing, grain, work)


def plan(*tasks: Task) -> Plan:
    return Plan((), {}, tasks)


# Three rows of F64 of the widest fit into the smallest memory that is tried: they cannot be cut.
shapes = st.lists(st.integers(0, 3000), min_size=0, max_size=3).filter(
    lambda s: math.prod(s) < 50_000_000 and math.prod(s[1:]) < 2_500_000
)


@settings(max_examples=150, deadline=None)
@given(
    shape=shapes,
    dtype=st.sampled_from(["F32", "F16", "F8_E4M3", "BOOL", "F64"]),
    copied=st.booleans(),
    memory=st.integers(64, 4096),
    work=st.sampled_from([0, 8, 32]),
)
def test_chunks_are_whole_blocks_that_cover_each_row_once(
    shape: list[int], dtype: str, copied: bool, memory: int, work: int
) -> None:
    task = copy(dtype, *shape) if copied else rows(dtype, *shape, work=work)
    budget = memory * MIB
    chunks = list(cut(plan(task), budget))
    if not task.outputs[0].spec.nbytes:
        assert chunks == []
        return
    assert [c.start for c in chunks] == [0, *(c.stop for c in chunks[:-1])]
    assert chunks[-1].stop == task_rows(task)
    assert all(c.start % block_rows(task) == 0 for c in chunks)
    assert all(c.cost <= budget for c in chunks)
    blocks = [b for c in chunks for b in c.blocks()]
    assert [b.number for b in blocks] == list(range(len(blocks)))
    assert all(b.start == b.number * block_rows(task) for b in blocks)
    assert all(0 < b.stop - b.start <= block_rows(task) for b in blocks)


def blocks_of(task: Task, memory: int) -> list[Block]:
    return [b for c in cut(plan(task), memory) for b in c.blocks()]


@pytest.mark.parametrize(
    "task",
    [copy("F16", 12, BLOCK_VALUES), rows("BF16", BLOCK_VALUES // 20, 250), rows("F32", 12 * BLOCK_VALUES + 1)],
)
def test_blocks_do_not_depend_on_memory(task: Task) -> None:
    few, more, most = (blocks_of(task, memory * MIB) for memory in (64, 256, 2048))
    assert len(few) > 10
    assert few == more == most


def test_more_memory_makes_larger_chunks_up_to_a_limit() -> None:
    task = copy("U8", 240 * BLOCK_VALUES)
    budgets = [BLOCK_VALUES * SHARE * n for n in (2, 4, 8)]
    assert CHUNK_MIN <= 2 * BLOCK_VALUES < 8 * BLOCK_VALUES <= CHUNK_MAX
    assert [len(list(cut(plan(task), budget))) for budget in budgets] == [120, 60, 30]
    largest = CHUNK_MAX - CHUNK_MAX % BLOCK_VALUES
    for budget in (2048 * MIB, 8192 * MIB):
        assert max(c.cost for c in cut(plan(task), budget)) == largest


def test_a_copy_and_an_elementwise_task_have_the_same_blocks() -> None:
    for dtype in ("F64", "F32", "F16", "F8_E4M3"):
        size = DTYPES[dtype].bits // 8
        flat = rows(dtype, 3000 * 1000)
        copied = [(b.number, b.start // size, b.stop // size) for b in blocks_of(copy(dtype, 3000, 1000), 64 * MIB)]
        assert copied == [tuple(b) for b in blocks_of(flat, 64 * MIB)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_a_copy_fill_whole_bytes(dtype: str) -> None:
    assert BLOCK_VALUES * DTYPES[dtype].bits % 8 == 0
    assert block_rows(copy(dtype, 8, 8)) == BLOCK_VALUES * DTYPES[dtype].bits // 8


def test_a_row_wider_than_a_block_is_a_block() -> None:
    task = rows("F16", 7, BLOCK_VALUES + 1)
    assert block_rows(task) == 1
    assert len(blocks_of(task, 64 * MIB)) == 7


def test_the_widest_slot_decides_the_height_of_a_block() -> None:
    narrow, wide = Slot("a", TensorSpec("F16", (1000, 8))), Slot("b", TensorSpec("F16", (1000, 1024)))
    task = Task("t", (Input(0, narrow), Input(0, wide)), (narrow,), nothing)
    assert block_rows(task) == BLOCK_VALUES // 1024


def test_a_shared_input_has_no_say_in_the_blocks() -> None:
    up, down, out = (Slot(k, TensorSpec("F32", s)) for k, s in (("u", (4000, 4)), ("d", (4, 9999)), ("o", (4000, 256))))
    task = Task("t", (Input(0, up), Input(0, down, shared=True)), (out,), nothing)
    assert task_rows(task) == 4000
    assert block_rows(task) == BLOCK_VALUES // 256
    assert chunk_cost(task, 10) == 10 * (4 + 256) * 4 + 4 * 9999 * 4


def test_a_task_of_shared_inputs_alone_is_one_block() -> None:
    task = Task("t", (Input(0, Slot("a", TensorSpec("F32", (50, 3))), shared=True),), (), nothing)
    assert [tuple(b) for b in blocks_of(task, 64 * MIB)] == [(0, 0, 1)]


def test_a_whole_tensor_is_one_chunk() -> None:
    task = rows("F32", 3000, 1000, grain=Grain.TENSOR)
    (chunk,) = cut(plan(task), 64 * MIB)
    assert (chunk.start, chunk.stop, chunk.cost) == (0, 3000, 36_000_000)
    assert [tuple(b) for b in chunk.blocks()] == [(0, 0, 3000)]


def test_a_whole_tensor_without_rows_does_not_keep_the_others_from_being_filled() -> None:
    slots = tuple(Slot(k, TensorSpec("F32", s)) for k, s in (("down", (0, 500)), ("alpha", ())))
    task = Task("t", (Input(0, Slot("w", TensorSpec("F32", (4, 500)))),), slots, nothing, Grain.TENSOR)
    (chunk,) = cut(plan(task), 64 * MIB)
    assert [tuple(b) for b in chunk.blocks()] == [(0, 0, 1)]
    assert chunk.cost == (4 * 500 + 1) * 4


def test_with_whole_tensors_each_slot_counts_whole() -> None:
    tall, flat, out = (Slot(k, TensorSpec("F32", s)) for k, s in (("u", (300, 4)), ("d", (4, 500)), ("o", (2, 500))))
    task = Task("t", (Input(0, tall), Input(0, flat)), (out,), nothing, Grain.TENSOR)
    (chunk,) = cut(plan(task), 64 * MIB)
    assert chunk.cost == (300 * 4 + 4 * 500 + 2 * 500) * 4


def test_working_copies_are_counted_for_one_block() -> None:
    task = rows("F16", 4 * BLOCK_VALUES, work=3200)
    buffers = 3 * 2 * BLOCK_VALUES
    assert chunk_cost(task, 100) == 3 * 2 * 100 + 3200
    assert chunk_cost(task, BLOCK_VALUES) == buffers + 3200
    assert chunk_cost(task, 4 * BLOCK_VALUES) == 4 * buffers + 3200


def test_empty_tensors_need_no_chunks() -> None:
    assert list(cut(plan(copy("F16", 0), copy("F16", 3, 0), rows("F16", 0, 5), rows("F16", 5, 0)), MIB)) == []


def test_a_scalar_is_one_row() -> None:
    for task in (copy("F32"), rows("F32")):
        (chunk,) = cut(plan(task), MIB)
        assert len(list(chunk.blocks())) == 1


@pytest.mark.parametrize(
    ("task", "needed"),
    [
        (copy("F64", 5000, 5000), 8 * BLOCK_VALUES),
        (copy("F64", 10), 80),
        (rows("F16", 5000, 5000), 3 * (BLOCK_VALUES // 5000) * 5000 * 2),
        (rows("F16", 5_000_000, work=32 * BLOCK_VALUES), (3 * 2 + 32) * BLOCK_VALUES),
        (rows("F32", 2000, 2000, grain=Grain.TENSOR), 48_000_000),
    ],
)
def test_too_small_a_budget_is_refused_with_one_that_would_do(task: Task, needed: int) -> None:
    assert smallest_memory(plan(task))[0] == needed
    check_memory(plan(task), needed)
    with pytest.raises(MemoryRefused) as caught:
        list(cut(plan(copy("U8", 1), task), needed - 1))
    assert str(caught.value) == f"--memory: {needed - 1:,} bytes are too few: 'a' alone takes {needed:,}"
    assert caught.value.exit_code == 2
    assert caught.value.hint is not None
    would_do = re.fullmatch(r"--memory (\d+)MiB would do", caught.value.hint)
    assert would_do is not None
    enough = int(would_do.group(1)) * MIB
    assert enough - MIB < needed <= enough
    chunks = list(cut(plan(copy("U8", 1), task), enough))
    assert max(c.cost for c in chunks) <= enough
