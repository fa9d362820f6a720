"""Read extracted factors back, and see that their error is what the report says: in float64, of some modules."""

from __future__ import annotations

import contextlib
import math
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weightops.errors import ValueRefused, quote
from weightops.ops.verify import output_places

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from weightops.files.checkpoint import Checkpoint
    from weightops.files.tensor import Slot
    from weightops.naming.slots import Place
    from weightops.ops.extract_pair import Matrix, Pair
    from weightops.plan import Plan

SAMPLES = 16
# How far the error that is found may be from the one that was said; of the norm, and of what float32 products leave.
RELATIVE, ABSOLUTE = 1e-3, 1e-6
_BAND = 1 << 19  # values that are read at a stroke


def check_factors(
    found: Pair, plan: Plan, groups: Sequence[Sequence[int]], written: Path, said: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Compare the error of up to 16 modules, computed in float64 from the written file, with what the report says.

    said: rows of the report. Returns {"modules", "largest_difference"}, the latter relative to ‖ΔW‖. Raises
    ValueRefused.
    """
    errors = {row["name"]: row["error"] for row in said}
    spots = [(task, i, n) for task, group in enumerate(groups) for i, n in enumerate(group)]
    worst = 0.0
    with contextlib.ExitStack() as stack:
        homes = output_places(plan, written, stack)
        chosen = random.Random(0).sample(spots, min(SAMPLES, len(spots)))
        for task, position, number in chosen:
            matrix, outputs = found.matrices[number], plan.tasks[task].outputs
            each = len(outputs) // len(groups[task])
            parts = [
                (homes[slot.key][0], replace(slot, key=homes[slot.key][1]))
                for slot in outputs[each * position : each * (position + 1)]
            ]
            off, told = _off(found, matrix, parts), errors[matrix.name]
            if told is None:
                continue
            gap = abs(off - told)
            if not gap <= RELATIVE * told + ABSOLUTE:
                raise ValueRefused(
                    str(written),
                    f"{quote(matrix.name)} is off by {off:.6g} of its norm, and {told:.6g} was computed",
                    "the disk or the memory of this machine may be failing; run again, and report it if it stays",
                )
            worst = max(worst, gap)
    return {"modules": len(chosen), "largest_difference": worst}


def _off(found: Pair, matrix: Matrix, parts: Sequence[tuple[Checkpoint, Slot]]) -> float:
    """‖ΔW − what was written‖ / ‖ΔW‖, a band of rows of the files at a time."""
    down = _rows(*parts[0], 0, parts[0][1].spec.rows) if len(parts) == 2 else None
    lost, total, start = 0.0, 0.0, 0
    for mine, theirs in zip(matrix.tuned, matrix.base, strict=True):
        height = max(1, _BAND // max(matrix.n, 1)) if not (mine.transposed or theirs.transposed) else mine.spec.rows
        for row in range(0, mine.spec.rows, height):
            stop = min(row + height, mine.spec.rows)
            delta = _band(found.opened, mine, row, stop) - _band(found.base, theirs, row, stop)
            given = _rows(*parts[-1], start + row, start + stop)
            lost += float((delta - (given if down is None else given @ down)).square().sum())
            total += float(delta.square().sum())
        start += mine.spec.rows
    return math.sqrt(lost / total) if total else math.sqrt(lost)


def _band(source: Checkpoint, at: Place, start: int, stop: int) -> Tensor:
    """Rows of a weight as a matrix; one that is stored transposed is asked for whole."""
    return _rows(source, at.slot, 0, at.slot.spec.rows).T if at.transposed else _rows(source, at.slot, start, stop)


def _rows(source: Checkpoint, slot: Slot, start: int, stop: int) -> Tensor:
    """Rows of a tensor as a matrix in float64."""
    from weightops.engine.tensors import as_tensor

    width = slot.spec.row_nbytes
    data = memoryview(bytearray((stop - start) * width))
    source.read_bytes(slot, start * width, stop * width, data)
    return as_tensor(data, slot.spec.with_rows(stop - start)).flatten(1).double()
