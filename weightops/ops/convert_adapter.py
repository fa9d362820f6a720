"""convert, for adapter files: what was asked, the dialect's plan, and the check of what was written."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightops.engine.run import import_torch_ahead
from weightops.errors import Interrupted, MismatchError, UsageError, ValueRefused, listing, quote
from weightops.files.checkpoint import open_checkpoint
from weightops.lora.dialects import DIALECTS
from weightops.lora.rank import rules_for
from weightops.naming.keymap import ARCHITECTURES
from weightops.ops.adapter_check import check_adapters
from weightops.ops.adapter_modules import Base, modules_of, read_own
from weightops.ops.cutting import Cutting
from weightops.ops.dialect import plan_dialect
from weightops.ops.layout import LAYOUTS
from weightops.ops.produce import Bar, named, produce, stem
from weightops.ops.report import modules, tensors
from weightops.ops.resize import Own, check_own

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from weightops.engine.run import Progress
    from weightops.files.checkpoint import Checkpoint
    from weightops.ops.adapter_modules import OwnModules
    from weightops.ops.report import Report

# The target of every adapter family.
TO_LORA = "lora"


@dataclass(frozen=True, slots=True)
class LoraWish:
    """What was asked of --to lora beside: how near (None: exactly), the model that the file is for."""

    rank: int | str | None
    conv_rank: int | str | None
    base: str | os.PathLike[str] | None
    seed: int


@dataclass(frozen=True, slots=True)
class Words:
    """What was asked of an adapter file."""

    to: str | None
    alpha: str
    architecture: str | None
    dtype: str
    drop: tuple[str, ...]
    check: bool
    strict: bool
    allow_nonfinite: bool


def convert_adapter(opened: Checkpoint, words: Words, output: str | os.PathLike[str] | None, **running: Any) -> Report:
    """A LoRA in another dialect."""
    assert words.to is not None
    planned = plan_dialect(
        opened, to=words.to, alpha=words.alpha, drop=words.drop, architecture=words.architecture, dtype=words.dtype,
    )  # fmt: skip
    if any(task.needs_torch for task in planned.plan.tasks):
        planned.plan = replace(planned.plan, refuse_nonfinite=not words.allow_nonfinite)
        if words.check:
            why = f"--dtype {words.dtype}" if words.dtype != "keep" else "a strength that is folded"
            raise UsageError("--check", f"compares bytes, but {why} changes those of the factors")
    lost = planned.account.surprises() if words.strict else []
    if lost:
        reasons = dict.fromkeys(u.reason for u in planned.account.unused if not u.asked)
        what = (
            f"{tensors(len(lost))} {'has' if len(lost) == 1 else 'have'} no place in {words.to} names: {listing(lost)}"
        )
        raise MismatchError("--strict", what, "; ".join(list(reasons)[:3]))
    written = named(output, stem(opened), f"-{words.to}")
    if output is None and planned.plan.files:
        written = written.with_suffix("")
    report = produce("convert", planned, written, **running)
    if words.check and not running["dry_run"]:
        try:
            report.checked = check_adapters(opened, written, drop=words.drop, architecture=words.architecture)
        except KeyboardInterrupt:
            raise Interrupted(str(written), "interrupted while it was checked; it is written, and whole") from None
    return report


def convert_to_lora(
    opened: Checkpoint, words: Words, wish: LoraWish, output: str | os.PathLike[str] | None, *, check: bool,
    memory: int | None, force: bool, dry_run: bool, on_progress: Progress, **running: Any,
) -> Report:  # fmt: skip
    """An adapter file whose every module is a plain LoRA, under the file's own names.

    LoRAs stay as they are. Of other families the product is exact (LoHa, LoKr, Tucker cores), unless a rank says less;
    what has none (whole differences, and what depends on the model's weights, for which a base is needed) is factorised
    at that rank. Raises UsageError, MismatchError, ValueRefused.
    """
    started = time.perf_counter()
    _check_words_of_loras(words, wish)
    if not dry_run:
        import_torch_ahead()
    with contextlib.ExitStack() as stack:
        base = None if wish.base is None else Base.of(stack.enter_context(open_checkpoint(wish.base)), 1)
        found = read_own(opened, architecture=words.architecture or (base.architecture if base is not None else None))
        own = modules_of(opened, found, base=base, plain=True)
        # Not even where a whole difference were smaller.
        own.modules = [replace(m, keys={part: k for part, k in m.keys.items() if part != "diff"}) for m in own.modules]
        _check_own(own, wish, strict=words.strict)
        rule, conv_rule = (None, None) if wish.rank is None else rules_for(wish.rank, wish.conv_rank)
        sources = (opened,) if base is None else (opened, base.opened)
        said: dict[str, Any] = {"to": TO_LORA, "seed": wish.seed}
        asked = (("rank", wish.rank), ("conv_rank", wish.conv_rank), ("architecture", words.architecture))
        said |= {k: str(v) for k, v in asked if v is not None}
        target = named(output, stem(opened), "-lora")
        target = target.with_suffix("") if output is None and own.is_folder else target
        work = Cutting(
            "convert", Own(own, sources, "convert", words.dtype, said), own.modules, sources, target, rule, conv_rule,
            words.dtype, wish.seed, memory, running, Bar(on_progress), force, spares=True,
        )  # fmt: skip
        try:
            report = work.write(dry_run=dry_run, verify=check)
        except ValueRefused as e:  # a module is named where it is found, and the file here
            raise ValueRefused(e.where or opened.label, e.what, e.hint) from None
    report.seconds = time.perf_counter() - started
    return report


def _check_words_of_loras(words: Words, wish: LoraWish) -> None:
    """Refuse words that mean nothing beside --to lora."""
    if words.drop or words.check:
        given = "--drop" if words.drop else "--check"
        raise UsageError(given, "says nothing with --to lora", None if words.drop else "--verify does what can be done")
    if words.allow_nonfinite:
        raise UsageError("--allow-nonfinite", "says nothing with --to lora: what holds NaN or Inf has no factors")
    if words.alpha != "carry":
        raise UsageError("--alpha", "says nothing with --to lora: the strength stays where it is")
    if words.dtype.startswith("fp8"):
        what = f"{words.dtype} would leave little of the factors"
        raise UsageError("--dtype", what, "fp16 and bf16 are the usual ones")
    if wish.rank is None and wish.conv_rank is not None:
        raise UsageError("--conv-rank", "stands with --rank")


def _check_own(own: OwnModules, wish: LoraWish, *, strict: bool) -> None:
    """Refuse what cannot become a LoRA, or not without a rank; and a file of which nothing need become one."""
    opened = own.opened
    if own.uncut:
        first, count = own.uncut[0], len(own.uncut)
        what = f"{tensors(count)} cannot become a LoRA: {quote(first.key)}, {first.reason}"
        raise MismatchError(opened.label, what, "--base CHECKPOINT, the model that the file is for, makes it one")
    check_own(own, base=wish.base is not None, strict=strict)
    made = [m for m in own.modules if m.stored_rank is None]
    if not made:
        raise UsageError("--to", f"{opened.label} is plain LoRA already: nothing to convert", "resize cuts its ranks")
    inexact = [m for m in made if not m.of.is_product]
    if inexact and wish.rank is None:
        count = len(inexact)
        what = f"found none, and {modules(count)} {'has' if count == 1 else 'have'} no exact factors"
        raise UsageError(
            "--rank", f"{what}: {quote(inexact[0].of.name)}", "--rank 64 or error:0.01 says how near they are to be"
        )


def check_kind(label: str, kind: str, to: str | None, of_checkpoints: Mapping[str, bool], words: Words) -> None:
    """Refuse words that mean nothing for this kind of file."""
    of_adapters = [
        option
        for option, given in (("--alpha", words.alpha != "carry"), ("--architecture", words.architecture is not None))
        if given
    ]
    if kind != "lora":
        if to == TO_LORA:
            raise UsageError("--to", f"{label} is no adapter file", "extract makes a LoRA of a finetune and its base")
        if to is not None and to not in LAYOUTS:
            what = f"{label} is no LoRA, and {to} is a dialect of LoRAs"
            raise UsageError("--to", what, f"known are {', '.join(LAYOUTS)}")
        for option in of_adapters:
            raise UsageError(option, f"says something only of a LoRA, and {label} is none")
        return
    if to is not None and to not in (*DIALECTS, TO_LORA):
        what = f"{label} is a LoRA, and {to} is a layout of checkpoints"
        raise UsageError("--to", what, f"known are {', '.join([*DIALECTS, TO_LORA])}")
    for option, given in of_checkpoints.items() if to is not None else []:
        if given:
            raise UsageError(option, f"says something only of a checkpoint, and {label} is a LoRA")
    for option in of_adapters if to is None else []:
        raise UsageError(option, "says something only with --to")


def check_words_of_adapters(alpha: str, architecture: str | None) -> None:
    """Refuse unknown words."""
    if alpha not in ("carry", "fold"):
        raise UsageError("--alpha", f"found {quote(alpha)}, expected carry or fold")
    if architecture is not None:
        try:
            ARCHITECTURES.get(architecture)
        except UsageError as e:
            raise UsageError("--architecture", e.what, e.hint) from None
