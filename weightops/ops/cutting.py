"""The work that resize, combine and others share: ranks for modules, by rule, and a file of LoRAs of these ranks.

Where the data decide the ranks, a pass over the factors comes first; then one that writes.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from weightops.engine.chunks import check_memory, memory_for, smallest_memory
from weightops.engine.run import Outcome, Progress, ignore, run
from weightops.errors import Interrupted, UsageError
from weightops.lora.rank import RankRule, ranks_for, weighted
from weightops.ops.factor_check import check_factors
from weightops.ops.factor_plan import Built, Module, build, rows_of, scans
from weightops.ops.produce import Bar, Planned, is_cuda, output_nbytes, produce
from weightops.ops.report import Report, input_entries
from weightops.ops.size_curve import error_of
from weightops.ops.truncation import squared
from weightops.plan import Input, Plan, Task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from weightops.files.checkpoint import Checkpoint
    from weightops.files.tensor import Slot
    from weightops.lora.rank import Spectrum


class File(Protocol):
    """What is particular about the file that is written."""

    def planned(self, built: Built, ranks: Sequence[int]) -> Planned:
        """The plan of the whole file, of which `built` are the first tasks."""

    def line(self, report: Report) -> str:
        """What was done, in one line."""


@dataclass(slots=True)
class Cutting:
    """Modules on their way to a file of LoRAs.

    rule, conv_rule: None: each module keeps the largest rank that comes in. spares: those that are LoRAs already keep
    their ranks, whatever the rule. all_kernels: conv_rule is for 1×1 convolutions, too. frames: where each module's
    weight is in a base, by which `size:` and `error:` weigh; empty: they do not. ahead: tasks of a pass that is made
    before all others.
    """

    command: str
    file: File
    modules: Sequence[Module]
    sources: tuple[Checkpoint, ...]
    target: Path
    rule: RankRule | None
    conv_rule: RankRule | None
    dtype: str
    seed: int
    memory: int | None
    running: Mapping[str, Any]
    bar: Bar
    force: bool = False
    spares: bool = False
    all_kernels: bool = False
    frames: Mapping[str, Sequence[Slot]] = field(default_factory=dict)
    ahead: Sequence[Task] = ()
    bytes_read: int = 0
    given: list[Spectrum] = field(default_factory=list)

    @property
    def scanned(self) -> bool:
        """Do the data decide the ranks?"""
        return any(self.rule_of(m).kind != "rank" for m in self.modules if not self._is_spared(m))

    def _is_spared(self, module: Module) -> bool:
        return self.spares and module.stored_rank is not None

    def rule_of(self, module: Module) -> RankRule:
        is_kernel = len(module.of.shape) > 2 if self.all_kernels else module.of.is_convolution
        given = self.conv_rule if is_kernel else self.rule
        return RankRule("rank", module.rank_before) if given is None else given

    def scan(self, start: float, stop: float) -> list[Spectrum]:
        """The spectrum of each module, weighed by the base where that is asked for; of all modules, once."""
        if self.given:
            return self.given
        tasks = scans(self.modules, self.sources, self.dtype)
        weights = [(n, slot) for n, m in enumerate(self.modules) for slot in self.frames.get(m.of.name, ())]
        tasks += [Task(self.modules[n].of.name, (Input(1, slot),), (), squared) for n, slot in weights]
        values = self.scan_values(tasks, self.bar.part(start, stop))
        count = len(self.modules)
        self.given = [values[n][0] for n in range(count)]
        if self.frames:
            norms = [0.0] * count
            for task, (n, _) in enumerate(weights, count):
                norms[n] += math.fsum(values[task])
            # A change of what is nothing weighs as one of the smallest weight does.
            least = min((w for w in norms if w > 0), default=1.0)
            self.given = [weighted(s, 1 / max(w, least)) for s, w in zip(self.given, norms, strict=True)]
        return self.given

    def scan_values(self, tasks: Sequence[Task], on_progress: Progress) -> list[list[Any]]:
        """The values of each task of a pass that writes nothing."""
        plan = Plan(self.sources, {}, tuple(tasks))
        outcome = run(plan, None, memory=memory_for(plan, self.memory), on_progress=on_progress, **self.running)
        self.bytes_read += outcome.bytes_read
        return [outcome.values[n] for n in range(len(tasks))]

    def ranks(self, given: Sequence[Spectrum]) -> list[int]:
        """A rank for each module. given: none, where numbers alone decide."""
        found = [m.rank_before for m in self.modules]
        asked = [n for n, m in enumerate(self.modules) if not self._is_spared(m)]

        def whole(ranks: Sequence[int]) -> list[int]:
            for n, rank in zip(asked, ranks, strict=True):
                found[n] = rank
            return found

        sizes = [(self.modules[n].of.out, self.modules[n].of.n) for n in asked]
        rules = [self.rule_of(self.modules[n]) for n in asked]
        if not given:
            ranks = [rule.most(*size) for rule, size in zip(rules, sizes, strict=True)]
        else:
            ranks = ranks_for(rules, [given[n] for n in asked], sizes, lambda ranks: self.size_of(whole(ranks)))
        return [m.settled(rank) for m, rank in zip(self.modules, whole(ranks), strict=True)]

    def size_of(self, ranks: Sequence[int]) -> int:
        """The bytes of the file that these ranks make."""
        planned, _ = self.planned([m.settled(r) for m, r in zip(self.modules, ranks, strict=True)], bare=True)
        return output_nbytes(planned.plan, self.target)

    def planned(self, ranks: Sequence[int], *, bare: bool = False) -> tuple[Planned, Built]:
        """The plan that writes these ranks; or, `bare`, one that only tells its size."""
        device = self.running["device"]
        built = build(
            self.modules, ranks, self.sources, dtype=self.dtype, seed=self.seed,
            together=device != "cpu" and not bare and is_cuda(device), bare=bare,
        )  # fmt: skip
        return self.file.planned(built, ranks), built

    def produce(
        self, planned: Planned, *, dry_run: bool, memory: int, force: bool, on_progress: Progress = ignore
    ) -> Report:
        return produce(
            self.command, planned, self.target, memory=memory, force=force, dry_run=dry_run, check=False,
            on_progress=on_progress, **self.running,
        )  # fmt: skip

    def foreseen(self, planned: Planned) -> Report:
        """What a plan would write, in whatever memory; no file is looked at."""
        plan = planned.plan
        return Report(
            self.command, input_entries(plan.sources, [None] * len(plan.sources)), None, planned.account,
            planned.summary, planned.groups, planned.warnings, bytes_written=output_nbytes(plan, self.target),
            dry_run=True,
        )  # fmt: skip

    def write(self, *, dry_run: bool, verify: bool) -> Report:
        """The whole work, or with `dry_run` what it would be."""
        least = self.ranks([]) if not self.scanned else [m.settled(1) for m in self.modules]
        planned, _ = self.planned(least)
        told = self.produce(planned, dry_run=True, memory=1 << 62, force=self.force)  # refuses what headers tell
        scanned = self.scanned or not all(least)  # of what is dropped, too, the norm is told
        self.refuse_memory(planned.plan, *self._passes(scanned=scanned))
        if dry_run:
            return self._foretold() if self.scanned else told
        middle = 0.5 if scanned else 0.0
        self.bar.total = max(sum(source.nbytes for source in self.sources), 1)
        given = self.scan(0.0, middle) if scanned else []
        ranks = self.ranks(given)
        if not any(ranks):
            what = f"{self._said} leaves no module a rank: there is nothing to write"
            hint = f"one rank of the smallest module takes {min(s.nbytes for s in given):,} bytes, beside the header"
            raise UsageError("--rank", what, hint if self._limit is not None else None)
        planned, built = self.planned(ranks)

        def then(outcome: Outcome, report: Report) -> None:
            report.details |= summed(rows_of(self.modules, ranks, built.values(outcome.values), given))
            if self.frames:
                report.details["weighted_error"] = error_of(given, ranks)
            report.details["line"] = self.file.line(report)

        planned.then = then
        report = self.produce(
            planned, dry_run=False, memory=memory_for(planned.plan, self.memory), force=self.force,
            on_progress=self.bar.part(middle, 1.0),
        )  # fmt: skip
        report.bytes_read += self.bytes_read
        if verify:
            try:
                report.verified = check_factors(self.modules, self.sources, self.target, report.details["modules"])
            except (Interrupted, KeyboardInterrupt):
                what = "interrupted while it was verified; it is written, and whole"
                raise Interrupted(str(self.target), what) from None
        return report

    def refuse_memory(self, *plans: Plan) -> None:
        """Refuse too little memory for these and for what is done ahead: what is told suffices for all."""
        largest = max((Plan(self.sources, {}, tuple(self.ahead)), *plans), key=lambda plan: smallest_memory(plan)[0])
        check_memory(largest, memory_for(largest, self.memory))

    def _passes(self, *, scanned: bool) -> list[Plan]:
        """The plans of a scan and, where memory is said, of the largest ranks that the data may ask for then."""
        if not scanned:
            return []
        plans = [Plan(self.sources, {}, tuple(scans(self.modules, self.sources, self.dtype)))]
        # By default, ranks that are hardly ever asked for are no reason to refuse.
        if not self.scanned or self.memory is None:
            return plans
        most = self.ranks([])
        if self._limit is not None:
            most = [min(r, self._limit // m.rank_nbytes(self.dtype)) for r, m in zip(most, self.modules, strict=True)]
        most = [m.settled(r) for r, m in zip(most, self.modules, strict=True)]
        # What is copied, joined or written whole may take less than what is cut to nearly as many ranks.
        cut = [_most_cut(m, r) for r, m in zip(most, self.modules, strict=True)]
        return plans + [self.planned(ranks)[0].plan for ranks in (most, cut)]

    def _foretold(self) -> Report:
        """The report of a dry run, with the largest ranks that there can be."""
        planned, _ = self.planned(self.ranks([]))
        planned.warnings.append(
            f"the size is the largest that it can be: what --rank {self._said} keeps depends on the data"
        )
        report = self.produce(planned, dry_run=True, memory=1 << 62, force=self.force)
        if self._limit is not None:
            report.bytes_written = min(report.bytes_written, self._limit)
        return report

    @property
    def _said(self) -> str:
        """The rule that depends on the data, as it is typed."""
        rules = [rule for rule in (self.rule, self.conv_rule) if rule is not None]
        return next((rule.said for rule in rules if rule.kind != "rank"), rules[0].said if rules else "")

    @property
    def _limit(self) -> int | None:
        """The bytes that the file may have, where the rule says them."""
        return int(self.rule.value) if self.rule is not None and self.rule.kind == "size" else None


def _most_cut(module: Module, rank: int) -> int:
    """The largest rank up to this one to which it is cut; none, where it never is."""

    def is_other(rank: int) -> bool:
        return module.is_stored(rank) or module.is_whole(rank) or module.joins(rank)

    return module.settled(bisect.bisect_left(range(1, rank + 1), True, key=is_other))


def summed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows, and what they say of the whole file: energy and error of all modules together."""
    norm = math.fsum(r["delta_norm"] ** 2 for r in rows)
    kept = math.fsum(r["energy"] * r["delta_norm"] ** 2 for r in rows)
    lost = math.fsum((r["error"] * r["delta_norm"]) ** 2 for r in rows)
    return {
        "modules": rows, "delta_norm": math.sqrt(norm), "energy": kept / norm if norm else 1.0,
        "error": math.sqrt(lost / norm) if norm else 0.0,
    }  # fmt: skip
