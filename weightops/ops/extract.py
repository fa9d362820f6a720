"""extract: the LoRA that turns one checkpoint into another, as nearly as its rank allows."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weightops.engine.chunks import memory_for
from weightops.engine.run import Outcome, Progress, ignore, run
from weightops.errors import MismatchError, UsageError, ValueRefused, quote
from weightops.files.checkpoint import open_checkpoint
from weightops.lora.dialects import DIALECTS
from weightops.lora.pieces import within
from weightops.lora.rank import RankRule, Spectrum, allocate
from weightops.ops.difference import Found, equal, looked, spectra
from weightops.ops.extract_check import check_factors
from weightops.ops.extract_plan import Matrix, Pair, Wish, pair, plan_extract
from weightops.ops.produce import check_words, named, produce, stem
from weightops.ops.report import Unused
from weightops.plan import Grain, Input, Plan, Task

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from weightops.files.tensor import Slot
    from weightops.ops.report import Report

# Two models of one architecture that were trained apart differ by √2 of their norm; a finetune by a tenth of it.
UNRELATED = 0.8
_SAMPLE = 32 * 1024  # values of each matrix that are looked at first

# Rules that share out ranks over the whole file.
_OF_THE_FILE = ("size", "error")


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
    allow_unrelated: go on where the two are not finetune and base. memory: bytes in flight (None: 128 MiB, and up to
    512 MiB for large matrices). Raises WeightopsError.

    The report's `details["modules"]` has for each module the rank, the share of ‖ΔW‖² that its best factors keep
    (`energy`), the relative error of those that were written, and the rounding noise of the inputs, alike.
    """
    rule, conv_rule = _rules(rank, conv_rank)
    _check_words(dialect, dtype, clamp_quantile)
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
        if strict:
            found.account.refuse_surprises("--strict")
        ending = f"-{dialect}" if DIALECTS[dialect].folder else ""
        target = named(output, f"{stem(opened)[:80]}-{stem(other)[:80]}-lora", ending)
        target = target.with_suffix("") if output is None and DIALECTS[dialect].folder else target
        running: dict[str, Any] = {"device": device, "threads": threads}
        if dry_run:
            ranks = [_most(m, rule, conv_rule) for m in found.matrices]
            planned, _ = plan_extract(found, ranks)
            if rule.kind != "rank":
                planned.warnings.append(f"--rank {rank} depends on the data: the size is the largest that it can be")
            return produce("extract", planned, target, memory=memory_for(planned.plan, memory), force=force,
                           dry_run=True, check=False, on_progress=on_progress, **running)  # fmt: skip
        _look(found, memory, running, allow_unrelated=allow_unrelated)
        scans = rule.kind != "rank" or conv_rule.kind != "rank"
        bars = _bars(on_progress, 2 if scans else 1)
        ranks = _ranks(found, rule, conv_rule, memory, running, next(bars) if scans else ignore)
        planned, groups = plan_extract(found, ranks, together=_is_cuda(device))

        def then(outcome: Outcome, report: Report) -> None:
            _say(outcome, found, groups, ranks, report)

        planned.then = then
        report = produce(
            "extract", planned, target, memory=memory_for(planned.plan, memory), force=force, dry_run=False,
            check=False, on_progress=next(bars), **running,
        )  # fmt: skip
        if verify:
            report.verified = check_factors(found, planned.plan, groups, target, report.details["modules"])
        return report


# ------------------------------------------------------------------------------------------------ what was asked


def _rules(rank: int | str, conv_rank: int | str | None) -> tuple[RankRule, RankRule]:
    rule = RankRule.parse(str(rank))
    if rule.kind == "rank" and not rule.value:
        raise UsageError("--rank", "found 0, expected a rank of 1 or more, or a rule such as energy:0.9")
    conv_rule = rule if conv_rank is None else RankRule.parse(str(conv_rank), where="--conv-rank")
    if conv_rank is not None and conv_rule.kind in _OF_THE_FILE:
        raise UsageError("--conv-rank", f"{conv_rule.kind}: is of the whole file, and stands with --rank")
    if rule.kind in _OF_THE_FILE and conv_rule is not rule and conv_rule.kind != "rank":
        raise UsageError("--conv-rank", f"beside --rank {rank} it is a number, the most that a convolution gets")
    return rule, conv_rule


def _check_words(dialect: str, dtype: str, clamp_quantile: float | None) -> None:
    if dialect not in DIALECTS:
        raise UsageError("--dialect", f"unknown dialect {quote(dialect)}", f"known are {', '.join(DIALECTS)}")
    check_words(dtype, ())
    if dtype.startswith("fp8"):
        raise UsageError("--dtype", f"{dtype} would leave little of the factors", "fp16 and bf16 are the usual ones")
    if clamp_quantile is not None and not 0.5 < clamp_quantile <= 1:
        raise UsageError("--clamp-quantile", f"found {clamp_quantile}, expected a number over 0.5, up to 1")


def _is_cuda(device: str) -> bool:
    from weightops.engine.tensors import resolve_device

    return resolve_device(device) != "cpu"


def _most(matrix: Matrix, rule: RankRule, conv_rule: RankRule) -> int:
    return (conv_rule if matrix.is_convolution else rule).most(matrix.out, matrix.n)


def _bars(on_progress: Progress, count: int) -> Iterator[Progress]:
    """One bar for several passes over the same bytes."""

    def bar(number: int) -> Progress:
        return lambda done, total: on_progress(number * total + done, count * total)

    return map(bar, range(count))


# ------------------------------------------------------------------------------------------------ a first look


def _look(found: Pair, memory: int | None, running: dict[str, Any], *, allow_unrelated: bool) -> None:
    """Drop what is equal in both, and refuse what are not finetune and base; before anything takes long."""
    sampled = _scan(found, [Task(m.name, _sample(m), (), looked, Grain.TENSOR, 64 * _SAMPLE) for m in found.matrices],
                    memory, running)  # fmt: skip
    delta, weight = math.fsum(s.delta for s in sampled), math.fsum(s.weight for s in sampled)
    if not math.isfinite(delta + weight):
        broken = next(m for m, s in zip(found.matrices, sampled, strict=True) if not math.isfinite(s.delta + s.weight))
        raise ValueRefused(found.opened.label, f"{quote(broken.name)} holds NaN or Inf in one of the two")
    share = math.sqrt(delta / weight) if weight else 0.0
    if share > UNRELATED and not allow_unrelated:
        raise MismatchError(
            found.opened.label,
            f"and {found.base.label} are not finetune and base: they differ by {share:.0%} of their norm".replace(
                "%", " %"
            ),
            "a finetune differs by some hundredths; --allow-unrelated extracts all the same",
        )
    likely = [m for m, s in zip(found.matrices, sampled, strict=True) if s.equal]
    pairs = [(m, a.slot, b.slot) for m in likely for a, b in zip(m.tuned, m.base, strict=True)]
    pairs = [p for p in pairs if p[1].spec.dtype == p[2].spec.dtype]
    same = _equal(found, [(a, b) for _, a, b in pairs], memory, running)
    apart = {id(m) for (m, _, _), is_same in zip(pairs, same, strict=True) if not is_same}
    compared = {id(m) for m, _, _ in pairs}
    dropped = [m for m in likely if id(m) in compared and id(m) not in apart]
    for matrix in dropped:
        for number, (opened, places) in enumerate(((found.opened, matrix.tuned), (found.base, matrix.base))):
            reason = f"equal in {found.base.label}" if number == 0 else f"equal in {found.opened.label}"
            found.account.unused.extend(Unused(at.slot.key, opened.label, reason, asked=True) for at in places)
    found.matrices = [m for m in found.matrices if m not in dropped]
    _vectors(found, memory, running)
    if not found.matrices and not (found.wish.biases and found.vectors):
        raise MismatchError(
            found.opened.label, f"has the very weights of {found.base.label}: there is nothing to extract"
        )


def _vectors(found: Pair, memory: int | None, running: dict[str, Any]) -> None:
    """Keep the biases and norms that differ; where they are not asked for, only say that they do."""
    pairs = [(v.tuned.slot, v.base.slot) for v in found.vectors]
    alike = [a.spec.dtype == b.spec.dtype for a, b in pairs]
    same = iter(_equal(found, [p for p, is_alike in zip(pairs, alike, strict=True) if is_alike], memory, running))
    differ = [v for v, is_alike in zip(found.vectors, alike, strict=True) if not (is_alike and next(same))]
    kept = differ if found.wish.biases else []
    for vector in found.vectors:
        if vector not in kept:
            reason = "--biases would take it" if vector in differ else "equal in both"
            found.account.unused.append(Unused(vector.tuned.slot.key, found.opened.label, reason, asked=True))
            found.account.unused.append(Unused(vector.base.slot.key, found.base.label, reason, asked=True))
    found.left_out = len(differ) - len(kept)
    found.vectors = kept


def _sample(matrix: Matrix) -> tuple[Input, ...]:
    """The same rows from the middle of both."""
    mine, theirs = matrix.tuned[0].slot, matrix.base[0].slot
    if matrix.tuned[0].transposed != matrix.base[0].transposed:
        return Input(0, mine), Input(1, theirs)
    count = min(mine.spec.rows, max(1, _SAMPLE // max(mine.spec.row_values, 1)))
    start = (mine.spec.rows - count) // 2
    return tuple(Input(n, _rows(slot, start, start + count)) for n, slot in enumerate((mine, theirs)))


def _rows(slot: Slot, start: int, stop: int) -> Slot:
    return replace(slot, spec=slot.spec.with_rows(stop - start), bands=within(slot.bands, ((start, stop),)))


def _equal(found: Pair, pairs: Sequence[tuple[Slot, Slot]], memory: int | None, running: dict[str, Any]) -> list[bool]:
    tasks = [Task(a.key, (Input(0, a), Input(1, b)), (), equal, Grain.TENSOR, raw=True) for a, b in pairs]
    return _scan(found, tasks, memory, running)


def _scan(
    found: Pair, tasks: Sequence[Task], memory: int | None, running: dict[str, Any], on_progress: Progress = ignore
) -> list[Any]:
    """The value of each task."""
    if not tasks:
        return []
    plan = Plan((found.opened, found.base), {}, tuple(tasks))
    outcome = run(plan, None, memory=memory_for(plan, memory), on_progress=on_progress, **running)
    return [outcome.values[n][0] for n in range(len(tasks))]


# ------------------------------------------------------------------------------------------------ ranks


def _ranks(
    found: Pair, rule: RankRule, conv_rule: RankRule, memory: int | None, running: dict[str, Any], on_progress: Progress
) -> list[int]:
    """A rank for each matrix, after a pass over the data where they decide it."""
    rules = [conv_rule if m.is_convolution else rule for m in found.matrices]
    if all(r.kind == "rank" for r in rules):
        return [r.most(m.out, m.n) for r, m in zip(rules, found.matrices, strict=True)]
    dtype = found.wish.dtype
    tasks = []
    for m in found.matrices:
        side = min(m.out, m.n)
        work = (8 if _is_wide(m) else 4) * m.out * m.n + 24 * side * side + (16 << 20)
        tasks.append(Task(m.name, m.inputs(), (), spectra(m, m.nbytes(dtype)), Grain.TENSOR, work_nbytes=work))
    found_spectra: list[Spectrum] = _scan(found, tasks, memory, running, on_progress)
    if rule.kind in _OF_THE_FILE:
        capped = [
            replace(s, values=s.values[: r.most(m.out, m.n)]) if r is not rule else s
            for s, r, m in zip(found_spectra, rules, found.matrices, strict=True)
        ]
        return allocate(rule, capped)
    return [
        r.most(m.out, m.n) if r.kind == "rank" else r.choose(s.values, m.out, m.n, s.energy)
        for s, r, m in zip(found_spectra, rules, found.matrices, strict=True)
    ]


def _is_wide(matrix: Matrix) -> bool:
    return any(at.slot.spec.dtype == "F64" for at in (*matrix.tuned, *matrix.base))


# ------------------------------------------------------------------------------------------------ what is said


def _say(outcome: Outcome, found: Pair, groups: Sequence[Sequence[int]], ranks: Sequence[int], report: Report) -> None:
    """Each module's figures into the report, the totals, and all of them in one line."""
    values: dict[int, Found] = {}
    for task, group in enumerate(groups):
        values |= dict(zip(group, outcome.values[task][0], strict=True))
    rows, delta, weight, lost, kept, noise = [], [], [], [], [], []
    for number, value in sorted(values.items()):
        matrix = found.matrices[number]
        rows.append(_row(matrix, value, ranks[number]))
        delta.append(value.norm**2)
        weight.append(value.weight**2)
        lost.append(value.lost**2)
        kept.append(value.kept * value.norm**2)
        noise.append(value.noise**2)
    report.details["modules"] = rows
    total = math.fsum(delta)
    if not total:
        return
    error, floor = math.sqrt(math.fsum(lost) / total), math.sqrt(math.fsum(noise) / total)
    report.details |= {
        "delta_norm": math.sqrt(total), "weight_norm": math.sqrt(math.fsum(weight)),
        "energy": math.fsum(kept) / total, "error": error, "noise": floor,
    }  # fmt: skip
    report.details["line"] = _line(report.details, rows)
    if found.left_out:
        report.warnings.append(
            f"{found.left_out:,} biases and norms differ and are left out; --biases takes them as diff_b and w_norm"
            if found.dialect.alpha == "tensor"
            else f"{found.left_out:,} biases and norms differ, and {found.dialect.name} has no differences of them"
        )


def _row(matrix: Matrix, value: Found, rank: int) -> dict[str, Any]:
    norm = value.norm or 1.0
    whole, most = value.method == "whole", min(matrix.out, matrix.n)
    return {
        "name": matrix.name, "rank_before": most, "rank": most if whole else rank,
        "energy": value.kept, "error": value.lost / norm, "delta_norm": value.norm, "weight_norm": value.weight,
        "noise": value.noise / norm, "ranks_above_noise": None if whole else value.above, "method": value.method,
    }  # fmt: skip


def _line(details: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    size = details["delta_norm"] / details["weight_norm"] if details["weight_norm"] else math.inf
    said = (
        f"The difference is {_percent(size)} of the base's norm; the LoRA holds {_percent(details['energy'])} of its "
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


def _percent(share: float) -> str:
    return f"{share:.2%}".replace("%", " %")
