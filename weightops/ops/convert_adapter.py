"""convert, for adapter files: what was asked, the dialect's plan, and the check of what was written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightops.errors import Interrupted, MismatchError, UsageError, listing, quote
from weightops.lora.dialects import DIALECTS
from weightops.naming.keymap import ARCHITECTURES
from weightops.ops.adapter_check import check_adapters
from weightops.ops.dialect import plan_dialect
from weightops.ops.layout import LAYOUTS
from weightops.ops.produce import named, produce, stem
from weightops.ops.report import tensors

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from weightops.files.checkpoint import Checkpoint
    from weightops.ops.report import Report


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


def check_kind(label: str, kind: str, to: str | None, of_checkpoints: Mapping[str, bool], words: Words) -> None:
    """Refuse words that mean nothing for this kind of file."""
    of_adapters = [
        option
        for option, given in (("--alpha", words.alpha != "carry"), ("--architecture", words.architecture is not None))
        if given
    ]
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
