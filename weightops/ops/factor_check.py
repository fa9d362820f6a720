"""Read a written LoRA back, and see that each module's error is what the report says: in float64, of some modules."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from weightops.errors import ValueRefused, quote
from weightops.files.checkpoint import open_checkpoint
from weightops.lora.lowrank import LowRank
from weightops.ops.adapter_modules import modules_of, read_own
from weightops.ops.extract_check import ABSOLUTE, RELATIVE, SAMPLES
from weightops.ops.sums import total

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from weightops.files.checkpoint import Checkpoint
    from weightops.ops.factor_plan import Module


# What a norm may be off by, beside the product of the factors' own; a million times as much.
_ROUNDING = 1e-9
# What rounding to half precision may change of the share of the energy that is kept.
_SHARE = 1e-2


def check_factors(
    modules: Sequence[Module], sources: Sequence[Checkpoint], written: Path, said: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Compare the error of up to 16 modules, computed in float64 from the files, with what the report says.

    said: the report's row of each module. Returns {"modules", "largest_difference"}, the latter relative to ‖ΔW‖.
    Raises ValueRefused.
    """
    there = [n for n, row in enumerate(said) if row["rank"]]
    chosen = random.Random(0).sample(there, min(SAMPLES, len(there)))
    worst = 0.0
    with open_checkpoint(written) as output:
        made = {m.of.name: m for m in modules_of(output, read_own(output)).modules}
        for n in chosen:
            name, told = said[n]["name"], said[n]["error"]
            if name not in made:  # of the one component in a folder
                name = name.removeprefix(f"{modules[n].component}.")
            if name not in made:
                raise ValueRefused(str(written), f"{quote(name)} is not there, or not as it was written")
            off, share = _off(_read(modules[n], sources), _read(made[name], (output,)))
            gap = abs(off - told)
            wrong = None
            if not gap <= RELATIVE * told + ABSOLUTE:
                wrong = f"is off by {off:.6g} of its norm, and {told:.6g} was computed"
            # Where much is cut away, a factor of another size would hardly change the error.
            elif modules[n].peer is None and not abs(share - said[n]["energy"]) <= _share_off(said[n]):
                wrong = f"holds {share:.6g} of the energy, and {said[n]['energy']:.6g} was computed"
            if wrong is not None:
                hint = "the disk or the memory of this machine may be failing; run again, and report it if it stays"
                raise ValueRefused(str(written), f"{quote(name)} {wrong}", hint)
            worst = max(worst, gap)
    return {"modules": len(chosen), "largest_difference": worst}


def _share_off(row: dict[str, Any]) -> float:
    """What the share of the energy may be off by: of terms that cancel, roundings are large beside their sum."""
    rounding = max(row["error"] ** 2 - (1 - row["energy"]), 0.0) ** 0.5
    return float(_SHARE + 2 * rounding + rounding**2)


def _read(module: Module, sources: Sequence[Checkpoint]) -> LowRank | Tensor:
    """ΔW of a module, as it stands in the files, in float64."""
    from weightops.engine.tensors import as_tensor

    given = []
    for entry in module.of.inputs(sources):
        data = memoryview(bytearray(entry.slot.spec.nbytes))
        sources[entry.source].read_bytes(entry.slot, 0, len(data), data)
        given.append(as_tensor(data, entry.slot.spec).double())
    found = total(module.of, given)
    # A peer's numbers are compared with the sum, whose terms have their strengths.
    scale = module.scale if module.peer is None else 1.0
    if isinstance(found, LowRank):
        return LowRank(found.up.double() * scale, found.down.double())
    return found.double() * scale


def _off(was: LowRank | Tensor, now: LowRank | Tensor) -> tuple[float, float]:
    """‖was − now‖ / ‖was‖ and ‖now‖² / ‖was‖²; of factors that cancel, beside what rounding leaves of them."""
    import torch

    if isinstance(was, LowRank) and isinstance(now, LowRank):
        norm, least = _norm(was), _ROUNDING * float(was.up.norm() * was.down.norm())
        size = max(norm, least)
        rest = _norm(LowRank(torch.cat([was.up, -now.up], 1), torch.cat([was.down, now.down], 0)))
        return (rest / size if size else rest), (_norm(now) / norm) ** 2 if norm > least else 1.0
    a, b = (found.dense() if isinstance(found, LowRank) else found for found in (was, now))
    size = float(a.norm())
    return float((a - b).norm()) / (size or 1.0), (float(b.norm()) / size) ** 2 if size else 1.0


def _norm(a: LowRank) -> float:
    """‖up·down‖. Not by squares, as in `norm`: of factors that nearly cancel they tell but eight digits."""
    import torch

    left, right = (torch.linalg.qr(basis, mode="r").R for basis in (a.up, a.down.mT))
    return float((left @ right.mT).norm())
