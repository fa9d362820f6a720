"""convert, for adapter files: what was asked, the dialect's plan, and the check of what was written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightops.errors import UsageError, quote
from weightops.lora.dialects import DIALECTS
from weightops.naming.keymap import ARCHITECTURES
from weightops.ops.adapter_check import check_adapters
from weightops.ops.dialect import plan_dialect
from weightops.ops.layout import LAYOUTS
from weightops.ops.produce import named, produce, stem

if TYPE_CHECKING:
    import os

    from weightops.files.checkpoint import Checkpoint
    from weightops.ops.report import Report


@dataclass(frozen=True, slots=True)
class Words:
    """What was asked of an adapter file."""

    to: str
    alpha: str
    architecture: str | None
    dtype: str
    drop: tuple[str, ...]
    check: bool
    strict: bool
    allow_nonfinite: bool


def convert_adapter(opened: Checkpoint, words: Words, output: str | os.PathLike[str] | None, **running: Any) -> Report:
    """A LoRA in another dialect."""
    planned = plan_dialect(
        opened, to=words.to, alpha=words.alpha, drop=words.drop, architecture=words.architecture, dtype=words.dtype,
    )  # fmt: skip
    if any(task.needs_torch for task in planned.plan.tasks):
        planned.plan = replace(planned.plan, refuse_nonfinite=not words.allow_nonfinite)
        if words.check:
            why = f"--dtype {words.dtype}" if words.dtype != "keep" else "a strength that is folded"
            raise UsageError("--check", f"compares bytes, but {why} changes those of the factors")
    if words.strict:
        planned.account.refuse_surprises("--strict")
    written = named(output, stem(opened), f"-{words.to}")
    if output is None and planned.plan.files:
        written = written.with_suffix("")
    report = produce("convert", planned, written, **running)
    if words.check and not running["dry_run"]:
        report.checked = check_adapters(opened, written, drop=words.drop, architecture=words.architecture)
    return report


def check_kind(
    label: str, kind: str, to: str | None, *, like: bool, adapter: str, of: str | None
) -> None:  # fmt: skip
    """Refuse words that mean nothing for this kind of file."""
    of_adapters = [o for o, given in (("--alpha", adapter != "carry"), ("--architecture", of is not None)) if given]
    if kind != "lora":
        if to is not None and to not in LAYOUTS:
            what = f"{label} is no LoRA, and {to} is a dialect of LoRAs"
            raise UsageError("--to", what, f"known are {', '.join(LAYOUTS)}")
        for option in of_adapters:
            raise UsageError(option, f"says something only of a LoRA, and {label} is none")
        return
    if to is not None and to not in DIALECTS:
        what = f"{label} is a LoRA, and {to} is a layout of checkpoints"
        raise UsageError("--to", what, f"known are {', '.join(DIALECTS)}")
    if like:
        raise UsageError("--like", f"says something only of a checkpoint, and {label} is a LoRA")
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
