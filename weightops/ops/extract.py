"""extract: the LoRA that turns one checkpoint into another, as nearly as its rank allows."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightops.engine.chunks import check_memory, memory_for
from weightops.engine.run import Outcome, Progress, ignore, run
from weightops.errors import Interrupted, MismatchError, UsageError, quote
from weightops.files.checkpoint import open_checkpoint
from weightops.files.tensor import TensorSpec
from weightops.lora.dialects import DIALECTS
from weightops.lora.pieces import within
from weightops.lora.rank import RankRule, Spectrum, ranks_for, rules_for
from weightops.ops.difference import (
    Found,
    equal,
    equal_nbytes,
    equal_values,
    looked,
    not_finite,
    spectra,
    spectra_nbytes,
)
from weightops.ops.extract_check import check_factors
from weightops.ops.extract_pair import Matrix, Pair, Vector, Wish, pair
from weightops.ops.extract_plan import plan_extract
from weightops.ops.extract_report import say
from weightops.ops.produce import Bar, Planned, check_words, is_cuda, named, produce, stem
from weightops.plan import Grain, Input, Plan, Task

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from pathlib import Path

    from weightops.files.tensor import Slot
    from weightops.naming.slots import Place
    from weightops.ops.report import Account, Report

# Two models of one architecture that were trained apart differ by √2 of their norm; a finetune by a tenth of it.
UNRELATED = 0.8
_SAMPLE = 32 * 1024  # values of each matrix that are looked at first


def extract(
    tuned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    rank: int | str = 32,
    conv_rank: int | str | None = None,
    dialect: str = "kohya",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    biases: bool = False,
    clamp_quantile: float | None = None,
    allow_unrelated: bool = False,
    dtype: str = "keep",
    seed: int = 0,
    strict: bool = False,
    allow_nonfinite: bool = False,
    memory: int | None = None,
    threads: int | None = None,
    device: str = "auto",
    force: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    on_progress: Progress = ignore,
) -> Report:
    """Write the LoRA of `tuned` − `base` to the file `output` (None: a name built from theirs).

    rank: a number, or a rule such as "energy:0.9" (see weightops.lora.rank.KINDS); "size:" and "error:" are of the
    whole file. conv_rank: of convolutions larger than 1×1 (None: as `rank`; 0: none of them). A difference that takes
    fewer bytes than its factors is written whole. dialect: kohya, diffusers, peft, comfy, onetrainer. include,
    exclude: globs over module names. biases: those of biases and norms, too. clamp_quantile: clamp both factors as
    other extractors do. dtype: of the factors; keep: the first input's. seed: of the random start of the subspace.
    allow_unrelated: go on where the two are not finetune and base. allow_nonfinite: of biases and of what overflows;
    a matrix that holds NaN or Inf has no factors. memory: bytes in flight (None: 128 MiB, and up to 512 MiB for large
    matrices). Raises WeightopsError.

    The report's `details["modules"]` has for each module the rank, the share of ‖ΔW‖² that its best factors keep
    (`energy`), the relative error of those that were written, and the rounding noise of the inputs, alike.
    """
    started = time.perf_counter()
    rule, conv_rule = rules_for(rank, conv_rank)
    _check_words(dialect, dtype, clamp_quantile, biases=biases)
    said: dict[str, Any] = {"rank": str(rank), "seed": seed}
    said |= {"conv_rank": str(conv_rank)} if conv_rank is not None else {}
    said |= {"clamp_quantile": clamp_quantile} if clamp_quantile is not None else {}
    said |= {k: list(v) for k, v in (("include", include), ("exclude", exclude)) if v}
    said |= {"biases": True} if biases else {}
    wish = Wish(
        dialect, tuple(include), tuple(exclude), biases, conv_rule.value > 0 or conv_rule.kind != "rank", dtype, seed,
        clamp_quantile, strict, allow_nonfinite, said,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        opened, other = (stack.enter_context(open_checkpoint(file)) for file in (tuned, base))
        found = pair(opened, other, wish)
        running: dict[str, Any] = {"device": device, "threads": threads}
        work = _Work(found, rule, conv_rule, _target(found, output), memory, force, running, Bar(on_progress))
        _refuse_early(work)
        if dry_run:
            return _foretold(work)
        report = _extract(work, allow_unrelated=allow_unrelated, verify=verify)
    report.seconds = time.perf_counter() - started
    return report


@dataclass(slots=True)
class _Work:
    """What every pass of an extraction needs. bytes_read: by the passes before the last."""

    found: Pair
    rule: RankRule
    conv_rule: RankRule
    target: Path
    memory: int | None
    force: bool
    running: dict[str, Any]
    bar: Bar
    bytes_read: int = 0

    @property
    def scans(self) -> bool:
        """Do the data decide the ranks?"""
        return self.rule.kind != "rank" or self.conv_rule.kind != "rank"

    def rule_of(self, matrix: Matrix) -> RankRule:
        return self.conv_rule if matrix.is_convolution else self.rule

    def most(self) -> list[int]:
        """The largest rank that each matrix can get."""
        return [self.rule_of(m).most(m.out, m.n) for m in self.found.matrices]

    def scan_plan(self, tasks: Sequence[Task]) -> Plan:
        return Plan((self.found.opened, self.found.base), {}, tuple(tasks))

    def scan(self, tasks: Sequence[Task], on_progress: Progress = ignore) -> list[list[Any]]:
        """The values of each task's blocks."""
        plan = self.scan_plan(tasks)
        if not tasks:
            return []
        memory = memory_for(plan, self.memory)
        outcome = run(plan, None, memory=memory, on_progress=on_progress, **self.running)
        self.bytes_read += outcome.bytes_read
        return [outcome.values[n] for n in range(len(tasks))]

    def size_of(self, ranks: Sequence[int]) -> int:
        """The bytes of the file that these ranks make."""
        planned, _ = plan_extract(self.found, ranks)
        return self.produce(planned, dry_run=True, memory=1 << 62).bytes_written

    def produce(self, planned: Planned, *, dry_run: bool, memory: int, on_progress: Progress = ignore) -> Report:
        return produce(
            "extract", planned, self.target, memory=memory, force=self.force, dry_run=dry_run, check=False,
            on_progress=on_progress, **self.running,
        )  # fmt: skip


def _extract(work: _Work, *, allow_unrelated: bool, verify: bool) -> Report:
    found = work.found
    begun = _look(work, allow_unrelated=allow_unrelated)
    _refuse_surprises(found)
    middle = (1 + begun) / 2 if work.scans else begun
    ranks, unranked = _ranks(work, work.bar.part(begun, middle))
    planned, groups = plan_extract(found, ranks, together=is_cuda(work.running["device"]))

    def then(outcome: Outcome, report: Report) -> None:
        values = dict(unranked)
        for task, group in enumerate(groups):
            values |= dict(zip(group, outcome.values[task][0], strict=True))
        say(values, found, ranks, report)

    planned.then = then
    memory = memory_for(planned.plan, work.memory)
    report = work.produce(planned, dry_run=False, memory=memory, on_progress=work.bar.part(middle, 1.0))
    report.bytes_read += work.bytes_read
    if verify:
        try:
            report.verified = check_factors(found, planned.plan, groups, work.target, report.details["modules"])
        except (Interrupted, KeyboardInterrupt):
            what = "interrupted while it was verified; it is written, and whole"
            raise Interrupted(str(work.target), what) from None
    return report


# ------------------------------------------------------------------------------------------------ what was asked


def _check_words(dialect: str, dtype: str, clamp_quantile: float | None, *, biases: bool) -> None:
    if dialect not in DIALECTS:
        raise UsageError("--dialect", f"unknown dialect {quote(dialect)}", f"known are {', '.join(DIALECTS)}")
    check_words(dtype, ())
    if dtype.startswith("fp8"):
        raise UsageError("--dtype", f"{dtype} would leave little of the factors", "fp16 and bf16 are the usual ones")
    if clamp_quantile is not None and not 0.5 < clamp_quantile <= 1:
        raise UsageError("--clamp-quantile", f"found {clamp_quantile}, expected a number over 0.5, up to 1")
    if biases and DIALECTS[dialect].alpha != "tensor":
        hint = f"{', '.join(name for name, d in DIALECTS.items() if d.alpha == 'tensor')} have them"
        raise UsageError("--biases", f"{dialect} has no differences of biases and norms", hint)


def _target(found: Pair, output: str | os.PathLike[str] | None) -> Path:
    is_folder = found.dialect.folder
    ending = f"-{found.dialect.name}" if is_folder else ""
    target = named(output, f"{stem(found.opened)[:80]}-{stem(found.base)[:80]}-lora", ending)
    return target.with_suffix("") if output is None and is_folder else target


def _refuse_early(work: _Work) -> None:
    """What headers tell, before anything takes long: surprises, too little memory, an output that cannot be."""
    found = work.found
    _refuse_surprises(found)
    least = [most if work.rule_of(m).kind == "rank" else 1 for m, most in zip(found.matrices, work.most(), strict=True)]
    planned, _ = plan_extract(found, least)
    work.produce(planned, dry_run=True, memory=memory_for(planned.plan, work.memory))
    if work.scans:
        plan = work.scan_plan(_spectra_tasks(work))
        check_memory(plan, memory_for(plan, work.memory))


def _refuse_surprises(found: Pair) -> None:
    if found.wish.strict:
        account: Account = found.account()
        account.refuse_surprises("would be left out", "left out")


def _foretold(work: _Work) -> Report:
    """The report of a dry run, with the largest ranks that there can be."""
    planned, _ = plan_extract(work.found, work.most())
    planned.warnings.append(
        "the size is the largest that it can be: "
        + (f"what --rank {work.found.wish.said['rank']} keeps depends on the data" if work.scans else
           "what is equal in both is left out")
    )  # fmt: skip
    # What was refused for too little memory, was; larger ranks than there will be need more.
    report = work.produce(planned, dry_run=True, memory=1 << 62)
    if work.rule.kind == "size":
        report.bytes_written = min(report.bytes_written, int(work.rule.value))
    return report


# ------------------------------------------------------------------------------------------------ a first look


def _look(work: _Work, *, allow_unrelated: bool) -> float:
    """Drop what is equal in both, and refuse what are not finetune and base. The share of the work that it was."""
    found = work.found
    tasks = [Task(m.name, _sample(m), (), looked(m), Grain.TENSOR, _sample_nbytes(m)) for m in found.matrices]
    sampled = [values[0] for values in work.scan(tasks)]
    for matrix, s in zip(found.matrices, sampled, strict=True):
        if not math.isfinite(s.delta + s.weight):
            raise not_finite(matrix.name, (found.opened if math.isfinite(s.weight) else found.base).label)
    delta, weight = math.fsum(s.delta for s in sampled), math.fsum(s.weight for s in sampled)
    share = math.sqrt(delta / weight) if weight else 0.0
    if share > UNRELATED and not allow_unrelated:
        raise MismatchError(
            found.opened.label,
            f"and {found.base.label} are not finetune and base: they differ by {100 * share:.0f} % of their norm",
            "a finetune differs by some hundredths; --allow-unrelated extracts all the same",
        )
    likely = [m for m, s in zip(found.matrices, sampled, strict=True) if s.equal]
    compared = sum(map(_nbytes, likely)) + sum(map(_nbytes, found.vectors))
    rest = (2 if work.scans else 1) * (sum(map(_nbytes, found.matrices)) - sum(map(_nbytes, likely)))
    work.bar.total = max(compared + rest, 1)
    begun = compared / work.bar.total
    _drop_equal(work, likely, work.bar.part(0.0, begun))
    if not found.matrices and not (found.wish.biases and found.vectors):
        hint = "--biases takes the biases and norms that differ" if found.left_out and found.has_vectors else None
        what = "weights" if found.left_out else "very weights"
        what = f"has the {what} of {found.base.label}: there is nothing to extract"
        raise MismatchError(found.opened.label, what, hint)
    return begun


def _drop_equal(work: _Work, likely: Sequence[Matrix], on_progress: Progress) -> None:
    """Compare these and all biases and norms whole. Equal ones are left, and biases and norms that nobody asked for."""
    found = work.found
    items: list[Matrix | Vector] = [*likely, *found.vectors]
    owners = [(item, a, b) for item in items for a, b in zip(item.tuned, item.base, strict=True)]
    same = work.scan([_comparison(a, b) for _, a, b in owners], on_progress)
    apart = {id(item) for (item, _, _), blocks in zip(owners, same, strict=True) if not all(blocks)}
    found.equal = [m for m in likely if id(m) not in apart]
    for matrix in found.equal:
        found.leave(matrix.tuned, matrix.base, f"equal in {found.base.label}", f"equal in {found.opened.label}")
    dropped = set(map(id, found.equal))
    found.matrices = [m for m in found.matrices if id(m) not in dropped]
    differ = [v for v in found.vectors if id(v) in apart]
    for vector in (v for v in found.vectors if id(v) not in apart):
        found.leave(vector.tuned, vector.base, "equal in both", over=True)
    found.vectors = [v for v in differ if found.wish.biases and v.unsaid is None]
    kept = set(map(id, found.vectors))
    for vector in (v for v in differ if id(v) not in kept):  # last, for an equal one may be packed with it
        found.leave_vector(vector)
    found.left_out = len(differ) - len(found.vectors)


def _sample(matrix: Matrix) -> tuple[Input, ...]:
    """The same rows from the middle of both; all of them, where one lies across the other."""
    mine, theirs = matrix.tuned[0].slot, matrix.base[0].slot
    if matrix.tuned[0].transposed != matrix.base[0].transposed:
        return Input(0, mine), Input(1, theirs)
    count = min(mine.spec.rows, max(1, _SAMPLE // max(mine.spec.row_values, 1)))
    start = (mine.spec.rows - count) // 2
    return tuple(Input(n, _rows(slot, start, start + count)) for n, slot in enumerate((mine, theirs)))


def _sample_nbytes(matrix: Matrix) -> int:
    """Both in float64, their difference and its square."""
    return 48 * max(entry.slot.spec.values for entry in _sample(matrix))


def _rows(slot: Slot, start: int, stop: int) -> Slot:
    return replace(slot, spec=slot.spec.with_rows(stop - start), bands=within(slot.bands, ((start, stop),)))


def _comparison(a: Place, b: Place) -> Task:
    across = a.transposed != b.transposed
    inputs = (Input(0, a.slot), Input(1, b.slot))
    if a.slot.spec.dtype == b.slot.spec.dtype and not across:
        return Task(a.slot.key, inputs, (), equal, raw=True)
    return Task(a.slot.key, inputs, (), equal_values(across=across), Grain.TENSOR, equal_nbytes(b.slot.spec.shape))


def _nbytes(item: Matrix | Vector) -> int:
    return sum(entry.slot.spec.nbytes for entry in item.inputs())


# ------------------------------------------------------------------------------------------------ ranks


def _spectra_tasks(work: _Work) -> list[Task]:
    return [
        Task(m.name, m.inputs(), (), spectra(m, _rank_nbytes(work.found, m)), Grain.TENSOR, spectra_nbytes(m))
        for m in work.found.matrices
    ]


def _rank_nbytes(found: Pair, matrix: Matrix) -> int:
    """Of one rank, both factors together."""
    return TensorSpec(matrix.written(found.wish.dtype), (matrix.out + matrix.n,)).nbytes


def _ranks(work: _Work, on_progress: Progress) -> tuple[list[int], dict[int, Found]]:
    """A rank for each matrix, after a pass over the data where they decide it; and what is lost of those that get none.

    Raises UsageError where nothing would be left.
    """
    found, rule = work.found, work.rule
    if not work.scans:
        return work.most(), {}
    results = [values[0] for values in work.scan(_spectra_tasks(work), on_progress)]
    given: list[Spectrum] = [spectrum for spectrum, _ in results]
    rules = [work.rule_of(m) for m in found.matrices]
    ranks = ranks_for(rules, given, [(m.out, m.n) for m in found.matrices], work.size_of)
    if not any(ranks) and not (found.wish.biases and found.vectors):
        hint = f"one rank of the smallest module takes {min(s.nbytes for s in given):,} bytes, beside the file's header"
        what = f"{found.wish.said['rank']} leaves no module a rank: there is nothing to write"
        raise UsageError("--rank", what, hint if rule.kind == "size" else None)
    return ranks, {n: nothing for n, (_, nothing) in enumerate(results) if not ranks[n]}
