"""combine, run on files that a test makes; the sum that it should give, and where every key went, by other hands."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from loras import deltas, raw

from weightops.errors import UsageError
from weightops.ops.combine import combine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from weightops.merging.method import MergeMethod
    from weightops.ops.report import Report

OUT = Path("out.safetensors")

# Of a factor that is rounded once: half a unit in the last place, of both, and of what alpha folds into one.
ROUNDING = {torch.float32: 3e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def combined(*loras: Any, **words: Any) -> Report:
    """The report of what is written to OUT, or where `output` says, and read back where nothing else is asked."""
    # Some of these files are of so few modules that they fit SD2 as well.
    return combine(*loras, **{"output": OUT, "force": True, "verify": True, "architecture": "sd15"} | words)


def weighted(*loras: tuple[Path, float], names: Sequence[Mapping[str, str]] = ()) -> dict[str, Tensor]:
    """Module -> Σ w·ΔW, dense and in float64, of files whose names are one; else `names` of each translates them."""
    found: dict[str, Tensor] = {}
    for number, (path, strength) in enumerate(loras):
        for name, delta in deltas(path).items():
            key = names[number][name] if names else name
            found[key] = found.get(key, 0.0) + strength * delta.reshape(delta.shape[0], -1)
    return found


def sizes(*loras: tuple[Path, float], names: Sequence[Mapping[str, str]] = ()) -> dict[str, float]:
    """Module -> Σ |w|·‖ΔW‖: what roundings of terms that cancel are small beside."""
    found: Counter[str] = Counter()
    for number, (path, strength) in enumerate(loras):
        for name, delta in deltas(path).items():
            found[names[number][name] if names else name] += abs(strength) * float(delta.norm())
    return dict(found)


# What methods cannot do without.
NEEDED: dict[str, dict[str, Any]] = {"nearswap": {"threshold": 0.01}}


def settings_for(method: MergeMethod, weights: Sequence[float]) -> dict[str, Any]:
    """Its settings, with these weights where it has any, checked. Raises UsageError where they make no sense."""
    own = tuple(weights)[method.fixed :]
    given = {p.name: own for p in method.parameters if p.kind == "Weights"}
    return method.check({**NEEDED.get(method.name, {}), **given}, len(weights))


def takes(method: MergeMethod, weights: Sequence[float]) -> bool:
    """As many files, of these strengths?"""
    try:
        settings_for(method, weights)
    except UsageError:
        return False
    return True


def matrices(path: Path = OUT) -> dict[str, Tensor]:
    return {name: delta.flatten(1) for name, delta in deltas(path).items()}


def rows(report: Report) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report.details["modules"]}


def accounted(report: Report, *files: Path) -> None:
    """Every key of every file is used, copied or unused, and that once."""
    account = report.account
    found = Counter([*account.used, *account.copied, *(u.key for u in account.unused)])
    assert account.kept == []
    assert found == Counter(key.replace("/", ".") for file in files for key in raw(file))


def optimum(values: Sequence[float], rank: int) -> float:
    """The relative error of the best approximation of a matrix of these singular values."""
    squares = [v * v for v in values]
    return float((sum(squares[rank:]) / sum(squares)) ** 0.5) if sum(squares) else 0.0
