"""From a plan to a written file and its report: the path that every verb that writes takes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from weightops.engine.chunks import check_memory
from weightops.engine.run import PLACEHOLDER, Beside, Progress, run
from weightops.errors import Interrupted, OutputError, UsageError, listing, quote
from weightops.files.checkpoint import INDEX_SUFFIX, PICKLE_SUFFIXES, Checkpoint
from weightops.files.dtypes import DTYPE_WORDS
from weightops.files.folder import check_files, folder_nbytes, safetensors_files
from weightops.files.held import Held
from weightops.files.writer import SafetensorsFile, check_target
from weightops.merging.method import store
from weightops.naming.identify import DROPPABLE
from weightops.ops.report import Account, Report, input_entries, peak_memory_bytes
from weightops.ops.verify import verify

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from weightops.engine.run import Outcome
    from weightops.files.checkpoint import Named
    from weightops.plan import Block, Plan

# Metadata that speaks of the exact bytes of the file it came from; in any other file it would be a lie.
STALE_METADATA = frozenset({"modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash", "weightops"})


@dataclass(slots=True)
class Planned:
    """A plan, and what is to be said about it. then: puts what the run found into the report."""

    plan: Plan
    account: Account
    summary: str
    groups: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    then: Callable[[Outcome, Report], None] | None = None


def produce(
    command: str,
    planned: Planned,
    output: Path | Held,
    *,
    memory: int,
    device: str,
    threads: int | None,
    force: bool,
    dry_run: bool,
    check: bool,
    on_progress: Progress,
    beside: Beside | None = None,
) -> Report:
    """Carry out the plan into `output`; with `dry_run`, only say what that would be. Raises WeightopsError."""
    plan = planned.plan
    report = Report(
        command, input_entries(plan.sources, [None] * len(plan.sources)), None,
        planned.account, planned.summary, planned.groups, planned.warnings, dry_run=dry_run,
    )  # fmt: skip
    if check:
        on_disk(output, "--verify")
    if not isinstance(output, Held):
        report.output = str(output)
        _check_name(plan, output)
        if force and plan.files:
            _check_replaced(plan, output)
    if dry_run:
        check_memory(plan, memory)
        if isinstance(output, Held):
            report.bytes_written = sum(spec.nbytes for spec in plan.outputs.values())
            return report
        report.bytes_written = output_nbytes(plan, output)
        files = [file for source in plan.sources for file in source.files]
        check_target(output, report.bytes_written, force=force, inputs=files, folder=bool(plan.files))
        return report
    outcome = run(
        plan, output, memory=memory, device=device, threads=threads, force=force, on_progress=on_progress, beside=beside
    )
    if check and not isinstance(output, Held):
        try:
            report.verified = verify(plan, output, label=str(output))
        except (Interrupted, KeyboardInterrupt):
            raise Interrupted(str(output), "interrupted while it was verified; it is written, and whole") from None
    report.inputs = input_entries(plan.sources, outcome.hashes)
    report.bytes_read, report.bytes_written = outcome.bytes_read, outcome.bytes_written
    report.seconds, report.peak_memory_bytes = outcome.seconds, peak_memory_bytes()
    if planned.then is not None:
        planned.then(outcome, report)
    return report


def _check_name(plan: Plan, output: Path) -> None:
    named_as_file = output.suffix.lower() == ".safetensors"
    if plan.files and named_as_file:
        raise UsageError(str(output), "a folder is written here; its name must not end in .safetensors")
    if not plan.files and not named_as_file:
        raise UsageError(str(output), "the output's name must end in .safetensors")


# What folders of weights hold, however they are sharded and whatever their settings are.
_OF_A_MODEL = re.compile(r"(diffusion_pytorch_model|model|adapter_model)(-\d{5}-of-\d{5})?\.safetensors|.*\.json")


def _check_replaced(plan: Plan, output: Path) -> None:
    """Refuse to replace a folder in which something else lies: all of it would be removed."""
    if output.is_symlink() or not output.is_dir():
        return
    made = {*(file.path for file in plan.files), *plan.extras}
    held = sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if not path.is_dir())
    strange = [name for name in held if name not in made and not _OF_A_MODEL.fullmatch(name.rpartition("/")[2])]
    if strange:
        what = f"holds what --force would remove with it, and does not write anew: {listing(strange)}"
        raise OutputError(str(output), what, "move it away first, or write elsewhere")


def output_nbytes(plan: Plan, output: Path) -> int:
    """The bytes of all files that the plan would write, headers and all."""
    metadata = plan.file_metadata([PLACEHOLDER] * len(plan.sources))
    if not plan.files:
        return SafetensorsFile(str(output), plan.outputs, metadata[0], plan.data_hashes, plan.header).size
    check_files(plan.outputs, plan.files, plan.extras)
    files = safetensors_files(output, plan.outputs, plan.files, metadata, plan.data_hashes)
    return folder_nbytes(files, plan.extras)


def check_words(dtype: str, drop: Sequence[str]) -> None:
    """Refuse unknown words for --dtype and --drop."""
    unknown = [d for d in drop if d not in DROPPABLE]
    if unknown:
        raise UsageError("--drop", f"unknown component {quote(unknown[0])}", f"known are {', '.join(DROPPABLE)}")
    if dtype != "keep" and dtype not in DTYPE_WORDS:
        raise UsageError("--dtype", f"unknown dtype {quote(dtype)}", f"known: keep, {', '.join(DTYPE_WORDS)}")


def stem(opened: Checkpoint) -> str:
    """The name without the suffix of its kind; "sd-1.5", a folder, has none."""
    for suffix in (".safetensors" + INDEX_SUFFIX, ".safetensors", *PICKLE_SUFFIXES):
        if opened.name.lower().endswith(suffix) and len(opened.name) > len(suffix):
            return opened.name[: -len(suffix)]
    return opened.name


@overload
def named(output: str | os.PathLike[str] | None, stems: str, ending: str = "") -> Path: ...
@overload
def named(output: Named | None, stems: str, ending: str = "") -> Path | Held: ...
def named(output: Named | None, stems: str, ending: str = "") -> Path | Held:
    """The output that was asked for, or a name of these stems in the current folder."""
    if isinstance(output, Held):
        return output
    if output is not None:
        return Path(output)
    # File systems count bytes, and allow 255 of them.
    short = stems.encode(errors="surrogateescape")[:200].decode(errors="ignore")
    return Path(f"{short}{ending}.safetensors")


def on_disk(output: Named | None, option: str) -> str | os.PathLike[str] | None:
    """The output, where it is a file; `option` is what needs one. Raises UsageError."""
    if isinstance(output, Held):
        raise UsageError(output.label, f"{option} needs a file for the output, found one in memory")
    return output


def kept_metadata(opened: Checkpoint, *, less: frozenset[str] = frozenset()) -> dict[str, str]:
    """The metadata of a file, less what speaks of its exact bytes, and less these keys."""
    kept = {k: v for k, v in opened.metadata.items() if k not in STALE_METADATA | less}
    return kept if "format" in kept else {"format": "pt", **kept}


def cast(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block) -> None:
    """The compute function of a change of dtype."""
    store(inputs[0], outputs[0])


def is_cuda(device: str) -> bool:
    """Is this, or what `auto` finds, a CUDA device?"""
    from weightops.engine.tensors import resolve_device

    return resolve_device(device) != "cpu"


class Bar:
    """One bar for several passes: it never goes back."""

    def __init__(self, on_progress: Progress) -> None:
        self.on_progress = on_progress
        self.total = 1
        self.shown = 0

    def part(self, start: float, stop: float) -> Progress:
        """The progress of a pass that takes the bar from one share of the whole to another."""

        def show(done: int, total: int) -> None:
            share = start + (stop - start) * (done / total if total else 1.0)
            self.shown = max(self.shown, min(self.total, round(self.total * share)))
            self.on_progress(self.shown, self.total)

        return show
