"""Read samples of a written file back and compare them with the same work done in float64."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weightops.engine.chunks import block_rows, task_rows
from weightops.errors import ValueRefused, quote
from weightops.files.checkpoint import open_checkpoint
from weightops.files.dtypes import ARITHMETIC
from weightops.merging.method import store
from weightops.plan import Block

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from weightops.files.tensor import Slot
    from weightops.plan import Plan, Task

SAMPLES = 64


def verify(plan: Plan, written: Path, *, label: str) -> dict[str, Any]:
    """Compare up to 64 blocks of `written`, spread over its tensors, with a float64 reference.

    Returns {"blocks", "values", "largest_ulp"}. Raises ValueRefused when a value is off by more than one unit
    in the last place, or a copied byte differs.
    """
    chosen = random.Random(0).sample(plan.tasks, min(SAMPLES, len(plan.tasks)))
    values, worst = 0, 0.0
    with open_checkpoint(written) as result:
        for task in chosen:
            rows = task_rows(task)
            height = min(block_rows(task), rows)
            if not task.outputs[0].spec.nbytes:
                continue
            start = random.Random(task.name).randrange(0, rows, height)
            block = Block(start // height, start, min(start + height, rows))
            found = memoryview(bytearray(_nbytes(task.outputs[0], task, block)))
            _read(result, task.outputs[0], task, block, found)
            off = _distance(plan, task, block, found)
            if off > 1.0:
                raise ValueRefused(
                    label,
                    f"tensor {quote(task.name)} is {off:.3g} units in the last place off its float64 reference",
                    "the disk or the memory of this machine may be failing; run again, and report it if it stays",
                )
            worst = max(worst, off)
            values += task.outputs[0].spec.row_values * (block.stop - block.start) if task.compute else len(found)
    return {"blocks": len(chosen), "values": values, "largest_ulp": round(worst, 4)}


def _nbytes(slot: Slot, task: Task, block: Block) -> int:
    return (block.stop - block.start) * (1 if task.compute is None else slot.spec.row_nbytes)


def _read(source: Any, slot: Slot, task: Task, block: Block, out: memoryview) -> None:
    row = 1 if task.compute is None else slot.spec.row_nbytes
    source.read_bytes(slot, block.start * row, block.stop * row, out)


def _distance(plan: Plan, task: Task, block: Block, found: memoryview) -> float:
    """The largest difference from the reference, in units in the last place of the output dtype."""
    given = []
    for entry in task.inputs:
        buffer = memoryview(bytearray(_nbytes(entry.slot, task, block)))
        _read(plan.sources[entry.source], entry.slot, task, block, buffer)
        given.append(buffer)
    if task.compute is None:
        return 0.0 if given[0] == found else float("inf")
    import torch

    from weightops.engine.tensors import as_tensor

    rows = block.stop - block.start
    inputs = [as_tensor(b, i.slot.spec, rows).double() for i, b in zip(task.inputs, given, strict=True)]
    spec = replace(task.outputs[0].spec, dtype="F64").with_rows(rows)
    exact = torch.empty(spec.shape, dtype=torch.float64)
    task.compute(inputs, [exact], block)
    if task.outputs[0].spec.dtype not in ARITHMETIC:
        return 0.0
    largest = torch.zeros_like(exact)
    for given_tensor in inputs:
        if given_tensor.shape == exact.shape:
            largest = torch.maximum(largest, given_tensor.abs())
    return ulps(as_tensor(found, task.outputs[0].spec, rows), exact, largest)


def ulps(found: Tensor, exact: Tensor, operands: Tensor | None = None) -> float:
    """The largest |found − exact| in units in the last place of `found`'s dtype, at `exact`'s magnitude.

    operands: the largest |operand| of each value; where they cancel out, the unit is that of float32 arithmetic
    on them, which is what is promised. NaN and Inf must be found where `exact`, rounded, has them.
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
    distance = ((found.double() - exact).abs() / unit).nan_to_num(torch.inf, posinf=torch.inf)
    return float(torch.where(same & ~wanted.isfinite(), 0.0, distance).max())
