"""Read extracted factors back, and see that their error is what the report says: in float64, of some modules."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weightops.errors import ValueRefused, quote
from weightops.lora.lowrank import LowRank
from weightops.ops.difference import difference, residual
from weightops.ops.verify import output_places

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from weightops.files.checkpoint import Checkpoint
    from weightops.files.tensor import Slot
    from weightops.ops.extract_plan import Pair
    from weightops.plan import Plan

SAMPLES = 16
# How far the error that is found may be from the one that was said; of the norm, and of what float32 products leave.
_RELATIVE, _ABSOLUTE = 1e-3, 1e-6


def check_factors(
    found: Pair, plan: Plan, groups: Sequence[Sequence[int]], written: Path, said: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Compare the error of up to 16 modules, computed in float64 from the written file, with what the report says.

    said: rows of the report in the order of the matrices' numbers. Returns {"modules", "largest_difference"}, the
    latter relative to ‖ΔW‖. Raises ValueRefused.
    """
    errors = dict(zip(sorted(n for group in groups for n in group), (row["error"] for row in said), strict=True))
    spots = [(task, i, n) for task, group in enumerate(groups) for i, n in enumerate(group)]
    worst = 0.0
    with contextlib.ExitStack() as stack:
        homes = output_places(plan, written, stack)
        chosen = random.Random(0).sample(spots, min(SAMPLES, len(spots)))
        for task, position, number in chosen:
            matrix = found.matrices[number]
            sources = ((found.opened, matrix.tuned), (found.base, matrix.base))
            tuned, base = ([_read(source, at.slot).double() for at in places] for source, places in sources)
            delta = difference(matrix, tuned, base)
            outputs = plan.tasks[task].outputs
            each = len(outputs) // len(groups[task])
            parts = []
            for slot in outputs[each * position : each * (position + 1)]:
                source, key = homes[slot.key]
                parts.append(_read(source, replace(slot, key=key)).double())
            off = _off(delta, parts) / (float(delta.norm()) or 1.0)
            gap = abs(off - errors[number])
            if gap > _RELATIVE * errors[number] + _ABSOLUTE:
                raise ValueRefused(
                    str(written),
                    f"{quote(matrix.name)} is off by {off:.6g} of its norm, and {errors[number]:.6g} was computed",
                    "the disk or the memory of this machine may be failing; run again, and report it if it stays",
                )
            worst = max(worst, gap)
    return {"modules": len(chosen), "largest_difference": worst}


def _off(delta: Tensor, parts: Sequence[Tensor]) -> float:
    if len(parts) == 1:
        return float((delta - parts[0].reshape(delta.shape)).norm())
    down, up = parts
    return residual(delta, LowRank(up.reshape(len(up), -1), down.reshape(len(down), -1)))


def _read(source: Checkpoint, slot: Slot) -> Tensor:
    from weightops.engine.tensors import as_tensor

    data = bytearray(slot.spec.nbytes)
    source.read_bytes(slot, 0, len(data), memoryview(data))
    return as_tensor(memoryview(data), slot.spec)
