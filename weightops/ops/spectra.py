"""The spectra of an adapter file: each module's singular values and what they say, and its norm beside the weight's."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import TYPE_CHECKING, Any

from weightops.engine.chunks import memory_for
from weightops.engine.run import Progress, import_torch_ahead, run
from weightops.errors import MismatchError, UsageError
from weightops.files.checkpoint import open_checkpoint
from weightops.ops.adapter_modules import Base, modules_of, read_own
from weightops.ops.factor_plan import scans
from weightops.ops.truncation import squared
from weightops.plan import Input, Plan, Task

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from weightops.files.checkpoint import Checkpoint
    from weightops.files.tensor import Slot
    from weightops.lora.rank import Spectrum
    from weightops.ops.adapter_modules import OwnModules
    from weightops.ops.factor_plan import Module

# Ranks at which the energy is said, and shares of the energy of which the rank is.
RANKS = (4, 8, 16, 32)
SHARES = (0.9, 0.99)


def spectra_of(
    opened: Checkpoint, base: str | os.PathLike[str] | None, *, memory: int | None, threads: int | None,
    on_progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """What `inspect` says of the ΔW of an adapter file, at strength 1, its alphas folded in; plain values.

    base: the model that it is for. With it each ‖ΔW‖ stands beside its weight's, and what depends on its weights
    (DoRA, OFT, IA3, GLoRA, set weights) has a ΔW at all: without it that is named among `left_out`. A module whose
    weight the base lacks has no relative norm. Raises UsageError, FormatError, MismatchError, ValueRefused.
    """
    import_torch_ahead()
    if base is None:
        own = modules_of(opened, read_own(opened), plain=True)
        return _spectra(own, None, memory, threads, on_progress)
    with open_checkpoint(base) as other:
        model = Base.of(other, 1)
        found = read_own(opened, architecture=model.architecture)
        return _spectra(modules_of(opened, found, base=model), model, memory, threads, on_progress)


def _spectra(
    own: OwnModules, base: Base | None, memory: int | None, threads: int | None, on_progress: Progress
) -> dict[str, Any]:
    left_out = _left_out(own)
    if not own.modules:
        hint = "--base CHECKPOINT, the model that it is for" if base is None and own.uncut else None
        raise UsageError("--spectrum", f"{own.opened.label} has no module with ranks: {left_out[0]['reason']}", hint)
    frames = {} if base is None else _frames(own, base)
    sources = (own.opened,) if base is None else (own.opened, base.opened)
    weights = [(name, slot) for name, slots in frames.items() for slot in slots]
    tasks = scans(own.modules, sources, "keep")
    tasks += [Task(name, (Input(1, slot),), (), squared) for name, slot in weights]
    plan = Plan(sources, {}, tuple(tasks))
    outcome = run(plan, None, memory=memory_for(plan, memory), threads=threads, on_progress=on_progress)
    squares: dict[str, float] = {}
    for number, (name, _) in enumerate(weights, len(own.modules)):
        squares[name] = squares.get(name, 0.0) + math.fsum(outcome.values[number])
    given = [outcome.values[number][0] for number in range(len(own.modules))]
    rows = [_row(module, s, squares.get(module.of.name)) for module, s in zip(own.modules, given, strict=True)]
    return {"modules": rows, **_totals(rows, given), "left_out": left_out}


def _left_out(own: OwnModules) -> list[dict[str, str]]:
    """The modules without a spectrum, and why."""
    reasons = {entry.key: entry.reason for entry in own.uncut}
    taken = {key for keys in own.keys for key in keys}
    found = []
    for adapter in own.found.adapters:
        if not taken & set(adapter.keys.values()):
            why = next((reasons[key] for key in adapter.keys.values() if key in reasons), None)
            found.append({"name": adapter.name, "reason": why or "it changes no matrix, and has no ranks"})
    return found


def _frames(own: OwnModules, base: Base) -> dict[str, tuple[Slot, ...]]:
    """Where each module's weight is in the base, for those that are there. Raises MismatchError where none is."""
    adapters = {(a.name, a.family.name): a for a in own.found.adapters}
    found, missing = {}, None
    for module in own.modules:
        term = module.of.terms[0]
        try:
            found[module.of.name] = term.frame or base.frame(adapters[term.name, term.family.name])
        except MismatchError as e:
            missing = missing or e
    if missing is not None and not found:
        raise missing
    return found


# ------------------------------------------------------------------------------------------------ what they say


def _row(module: Module, spectrum: Spectrum, weight: float | None) -> dict[str, Any]:
    """weight: the squared norm of the module's weight, where there is one."""
    norm = math.sqrt(spectrum.energy)
    return {
        "name": module.of.terms[0].name,
        "family": module.of.terms[0].family.name,
        "shape": list(module.of.shape),
        "rank": module.rank_before,
        "effective_rank": effective_rank(spectrum.values),
        "stable_rank": spectrum.energy / spectrum.values[0] ** 2 if norm else 0.0,
        "energy": {str(rank): _share(spectrum.gain(rank), spectrum.energy) for rank in RANKS},
        "rank_for": {str(share): rank_for(spectrum.values, share) for share in SHARES},
        "delta_norm": norm,
        "weight_norm": None if weight is None else math.sqrt(weight),
        "relative": None if not weight else norm / math.sqrt(weight),
        "singular_values": list(spectrum.values),
    }


def _totals(rows: Sequence[Mapping[str, Any]], given: Sequence[Spectrum]) -> dict[str, Any]:
    """Of all modules: their changes as one, with every module cut to the same rank; and what is usual among them."""
    energy = math.fsum(s.energy for s in given)
    there = [row for row in rows if row["delta_norm"]]
    placed = [row for row in rows if row["weight_norm"]]
    weight = math.hypot(*(row["weight_norm"] for row in placed))
    # The upper of two medians: half of the modules need no more.
    medians = {str(s): statistics.median_high(row["rank_for"][str(s)] for row in there) if there else 0 for s in SHARES}
    return {
        "effective_rank": statistics.median(row["effective_rank"] for row in there) if there else 0.0,
        "energy": {str(rank): _share(math.fsum(s.gain(rank) for s in given), energy) for rank in RANKS},
        "rank_for": medians,
        "delta_norm": math.sqrt(energy),
        "weight_norm": weight if placed else None,
        "relative": math.hypot(*(row["delta_norm"] for row in placed)) / weight if placed else None,
    }


def effective_rank(values: Sequence[float]) -> float:
    """exp H(σ / Σσ), with the Shannon entropy H: so many equal singular values would be spread out as these are.

    Source: Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO.
    """
    total = math.fsum(values)
    shares = [v / total for v in values if v > 0]
    return math.exp(-math.fsum(p * math.log(p) for p in shares)) if shares else 0.0


def rank_for(values: Sequence[float], share: float) -> int:
    """The smallest rank that keeps this share of Σσ²; 0 of what is zero."""
    sums = list(itertools.accumulate(v * v for v in values))
    if not sums or not sums[-1]:
        return 0
    return 1 + next(n for n, kept in enumerate(sums) if kept >= share * sums[-1])


def _share(kept: float, whole: float) -> float:
    return min(1.0, kept / whole) if whole else 1.0
