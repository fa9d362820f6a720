"""What is said of an extraction: each module's figures, the totals, and all of them in one line."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightops.ops.difference import Found
    from weightops.ops.extract_pair import Matrix, Pair
    from weightops.ops.report import Report


def say(values: dict[int, Found], found: Pair, ranks: Sequence[int], report: Report) -> None:
    """Each module's figures into the report, the totals, and all of them in one line."""
    ordered = [values[n] for n in sorted(values)]
    rows = [_row(found.matrices[n], values[n], ranks[n]) for n in sorted(values)]
    delta = math.fsum(v.norm**2 for v in ordered)
    lost, kept = math.fsum(v.lost**2 for v in ordered), math.fsum(v.kept * v.norm**2 for v in ordered)
    noise = math.fsum(v.noise**2 for v in ordered)
    report.details |= {
        "modules": rows, "delta_norm": math.sqrt(delta), "weight_norm": math.hypot(*(v.weight for v in ordered)),
        "energy": kept / delta if delta else 1.0, "error": _number(math.sqrt(lost / delta)) if delta else 0.0,
        "noise": math.sqrt(noise / delta) if delta else 0.0,
    }  # fmt: skip
    if rows:
        report.details["line"] = _line(report.details, rows)
    if found.left_out:
        how = f"{found.left_out:,} {'bias or norm differs' if found.left_out == 1 else 'biases and norms differ'}"
        if not found.has_vectors:
            report.warnings.append(f"{how}, and {found.dialect.name} has no differences of them")
        elif found.wish.biases:
            report.warnings.append(f"{how} that {found.dialect.name} cannot say; they are named among the unused")
        else:
            report.warnings.append(f"{how} and would come with --biases, as diff_b and w_norm")


def _row(matrix: Matrix, value: Found, rank: int) -> dict[str, Any]:
    norm = value.norm or 1.0
    whole, most = value.method == "whole", min(matrix.out, matrix.n)
    return {
        "name": matrix.name, "rank_before": most, "rank": most if whole else rank,
        "energy": value.kept, "error": _number(value.lost / norm), "delta_norm": value.norm,
        "weight_norm": value.weight, "noise": value.noise / norm,
        "ranks_above_noise": value.above if rank and not whole else None, "method": value.method,
    }  # fmt: skip


def _number(value: float) -> float | None:
    """None for what is no number: factors that overflowed, and were let."""
    return value if math.isfinite(value) else None


def _line(details: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    size = (
        f"{_percent(details['delta_norm'] / details['weight_norm'])} of"
        if details["weight_norm"]
        else "without end beside"
    )
    said = (
        f"The difference is {size} the base's norm; the LoRA holds {_percent(details['energy'])} of its "
        f"energy, relative error {_percent(details['error'])}; rounding of the inputs alone makes about "
        f"{_percent(details['noise'])} of it"
    )
    ranked = [r for r in rows if r["ranks_above_noise"] is not None]
    below = [r for r in ranked if r["ranks_above_noise"] < r["rank"]]
    if below:
        most = max(r["ranks_above_noise"] for r in ranked)
        would = f", and --rank {most} holds all that is not" if 0 < most < max(r["rank"] for r in ranked) else ""
        said += f". In {len(below):,} of {len(rows):,} modules the last ranks are no more than that noise{would}"
    return said


def _percent(share: float | None) -> str:
    return "unbounded" if share is None else f"{100 * share:.2f} %"
