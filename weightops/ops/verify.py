"""Read samples of a written file back and compare them with the same work done in float64."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from weightops.engine.chunks import block_rows, slot_span, task_rows
from weightops.errors import ValueRefused, quote
from weightops.files.checkpoint import open_checkpoint
from weightops.files.dtypes import ARITHMETIC
from weightops.merging.method import store
from weightops.plan import Block, Grain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from weightops.files.checkpoint import Checkpoint
    from weightops.files.tensor import Slot
    from weightops.plan import Plan, RawCompute, Task

SAMPLES = 64


def verify(plan: Plan, written: Path, *, label: str) -> dict[str, Any]:
    """Compare up to 64 blocks of `written`, spread over its tensors, with a float64 reference.

    Returns {"blocks", "values", "largest_ulp"}. Raises ValueRefused when a value is off by more than one unit
    in the last place, or a copied byte, or one that was computed as bytes, differs.
    """
    chosen = random.Random(0).sample(plan.tasks, min(SAMPLES, len(plan.tasks)))
    values, worst = 0, 0.0
    with contextlib.ExitStack() as stack:
        places = output_places(plan, written, stack)
        for task in chosen:
            if not any(slot.spec.nbytes for slot in task.outputs):
                continue
            rows = task_rows(task)
            height = min(block_rows(task), rows)
            start = random.Random(task.name).randrange(0, rows, height)
            block = Block(start // height, start, min(start + height, rows))
            found = []
            for slot in task.outputs:
                source, name = places[slot.key]
                found.append(_read(source, replace(slot, key=name), task, block))
            followed = _followed(plan, task)
            off = _distance(plan, task, block, found, followed)
            if off > 1.0:
                raise ValueRefused(
                    label,
                    f"tensor {quote(task.name)} is {off:.3g} units in the last place off its float64 reference",
                    "the disk or the memory of this machine may be failing; run again, and report it if it stays",
                )
            worst = max(worst, off)
            values += sum(map(len, found)) if task.compute is None else _count(task, block)
    return {"blocks": len(chosen), "values": values, "largest_ulp": round(worst, 4)}


def output_places(plan: Plan, written: Path, stack: contextlib.ExitStack) -> dict[str, tuple[Checkpoint, str]]:
    """Where each output stands: the file, opened, and its name there."""
    if not plan.files:
        result = stack.enter_context(open_checkpoint(written))
        return {key: (result, key) for key in plan.outputs}
    places = {}
    for file in plan.files:
        opened = stack.enter_context(open_checkpoint(written / file.path))
        places.update({key: (opened, name) for key, name in file.keys.items()})
    return places


def _read(source: Checkpoint, slot: Slot, task: Task, block: Block, shared: bool = False) -> memoryview:
    """The bytes of `slot` that the block of the task sees."""
    start, stop = slot_span(task, slot, block.start, block.stop, shared=shared)
    out = memoryview(bytearray(stop - start))
    source.read_bytes(slot, start, stop, out)
    return out


def _count(task: Task, block: Block) -> int:
    rows = None if task.grain is Grain.TENSOR else block.stop - block.start
    return sum(slot.spec.values if rows is None else slot.spec.row_values * rows for slot in task.outputs)


def _followed(plan: Plan, task: Task) -> list[Any]:
    """What the tasks find that this one follows: all of these tensors are looked at again."""
    found: list[Any] = []
    if not task.follows:
        return found
    import torch

    number = next(n for n, t in enumerate(plan.tasks) if t is task)
    for other in plan.tasks[number - task.follows : number]:
        rows, height, values = task_rows(other), block_rows(other), []
        before = found[len(found) - other.follows :]
        for start in range(0, rows, height):
            block = Block(start // height, start, min(start + height, rows))
            given = _given(plan, other, block)
            with torch.no_grad():
                values.append(cast("Callable[..., Any]", other.compute)(given, [], block, *before))
        assert other.gather is not None
        found.append(other.gather(values, *before))
    return found


def _given(plan: Plan, task: Task, block: Block) -> list[Tensor]:
    """The inputs of a block as tensors."""
    from weightops.engine.tensors import as_tensor

    rows = None if task.grain is Grain.TENSOR else block.stop - block.start
    read = [_read(plan.sources[i.source], i.slot, task, block, i.shared) for i in task.inputs]
    return [as_tensor(data, i.slot.spec, None if i.shared else rows) for i, data in zip(task.inputs, read, strict=True)]


def _distance(plan: Plan, task: Task, block: Block, found: list[memoryview], followed: list[Any]) -> float:
    """The largest difference from the reference, in units in the last place of the output dtype."""
    given = [_read(plan.sources[i.source], i.slot, task, block, i.shared) for i in task.inputs]
    if task.compute is None:
        return 0.0 if given * len(found) == found else float("inf")
    if task.raw:
        exact = [memoryview(bytearray(len(data))) for data in found]
        cast("RawCompute", task.compute)(given, exact, block)
        return 0.0 if exact == found else float("inf")
    return _distance_of_tensors(task, block, given, found, followed)


def _distance_of_tensors(
    task: Task, block: Block, given: list[memoryview], found: list[memoryview], followed: list[Any]
) -> float:
    import torch

    from weightops.engine.tensors import as_tensor

    rows = None if task.grain is Grain.TENSOR else block.stop - block.start
    inputs = [
        as_tensor(data, i.slot.spec, None if i.shared else rows) for i, data in zip(task.inputs, given, strict=True)
    ]
    written = [as_tensor(data, slot.spec, rows) for slot, data in zip(task.outputs, found, strict=True)]
    compute = cast("Callable[..., Any]", task.compute)
    if task.repeated:
        again = [torch.empty_like(t) for t in written]
        with torch.no_grad():
            compute(inputs, again, block, *followed)
        same = all(torch.equal(a.view(torch.uint8), w.view(torch.uint8)) for a, w in zip(again, written, strict=True))
        return 0.0 if same else float("inf")
    inputs = [t.double() if i.slot.spec.dtype in ARITHMETIC else t for i, t in zip(task.inputs, inputs, strict=True)]
    exact = [torch.empty(t.shape, dtype=torch.float64) for t in written]
    compute(inputs, exact, block, *followed)
    worst = 0.0
    for slot, result, reference in zip(task.outputs, written, exact, strict=True):
        if slot.spec.dtype not in ARITHMETIC:
            continue
        largest = torch.zeros_like(reference)
        for operand in inputs:
            if operand.dtype == torch.float64 and operand.shape == reference.shape:
                largest = torch.maximum(largest, operand.abs())
        worst = max(worst, ulps(result, reference, largest, task.tolerance))
    return worst


def ulps(found: Tensor, exact: Tensor, operands: Tensor | None = None, tolerance: float = 0.0) -> float:
    """The largest |found − exact| in units in the last place of `found`'s dtype, at `exact`'s magnitude.

    operands: the largest |operand| of each value; where they cancel out, the unit is that of float32 arithmetic
    on them, which is what is promised. tolerance: the least unit, relative to these and to `exact`. NaN and Inf must be
    found where `exact`, rounded, has them.
    """
    import torch

    if not found.numel():
        return 0.0
    info = torch.finfo(found.dtype)
    eps = 0.25 if found.dtype is torch.float8_e5m2fnuz else info.eps  # of which torch says 0.125
    wanted = torch.empty_like(exact, dtype=found.dtype)
    store(exact, wanted)
    wanted = wanted.double()
    same = (found.double() == wanted) | (found.double().isnan() & wanted.isnan())
    _, exponent = torch.frexp(exact)
    unit = torch.where(exact == 0, 0.0, torch.exp2(exponent.double() - 1) * eps)
    unit.clamp_min_(info.smallest_normal * eps)
    if operands is not None:
        # float32 keeps 24 bits of an operand; the shorter dtypes are computed in it, in a few operations.
        unit = torch.maximum(unit, operands * {64: 0.0, 32: 2.0**-23}.get(info.bits, 2.0**-21))
    if tolerance:
        unit = torch.maximum(unit, (exact.abs() if operands is None else exact.abs().maximum(operands)) * tolerance)
    distance = ((found.double() - exact).abs() / unit).nan_to_num(torch.inf, posinf=torch.inf)
    return float(torch.where(same & ~wanted.isfinite(), 0.0, distance).max())
