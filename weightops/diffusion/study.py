"""study: one file that runs a whole study, step by step; what was done already is not done again.

A step is known by everything that it is made of: its verb, its words, the version of weightops, and the content of each
file and folder that it is given. As long as nothing of that changes, and what it made lies there as it was, it stands.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion import study_inputs
from weightops.diffusion.extras import need
from weightops.diffusion.study_file import read_study
from weightops.diffusion.study_runner import RUN, STANDS, WOULD_RUN, Runner, StepReport
from weightops.diffusion.study_state import FOLDER as STATE
from weightops.diffusion.study_state import State
from weightops.errors import UsageError, listing, quote
from weightops.ops.report import peak_memory_bytes
from weightops.ops.yaml_lines import nearest, refused

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from weightops.diffusion.study_parts import Study
    from weightops.diffusion.study_verbs import Progress, Verb


@dataclass(slots=True)
class StudyReport:
    """What became of each step of a study. page: the HTML page of its last step that is one."""

    file: str
    output: str
    tiny: bool
    inputs: list[dict[str, Any]] = field(default_factory=list)
    steps: list[StepReport] = field(default_factory=list)
    page: str | None = None
    bytes_written: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    dry_run: bool = False

    @property
    def warnings(self) -> list[str]:
        return [f"{step.name}: {text}" for step in self.steps for text in step.warnings]

    def to_dict(self) -> dict[str, Any]:
        """The JSON document that scripts may rely on."""
        return {
            "command": "study",
            "version": __version__,
            "file": self.file,
            "inputs": self.inputs,
            "output": self.output,
            "page": self.page,
            "tiny": self.tiny,
            "bytes_written": self.bytes_written,
            "steps": [
                {
                    "name": s.name, "verb": s.verb, "state": s.state, "reason": s.reason, "output": s.output,
                    "seconds": round(s.seconds, 3), "warnings": list(s.warnings),
                }
                for s in self.steps
            ],
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": self.peak_memory_bytes,
            "warnings": self.warnings,
            "dry_run": self.dry_run,
        }  # fmt: skip


def _unseen(_what: str, _done: int, _total: int, _value: float | None) -> None:
    """No progress is shown."""


def study(
    file: str | os.PathLike[str],
    *,
    tiny: bool = False,
    output: str | os.PathLike[str] | None = None,
    inputs: Mapping[str, str | os.PathLike[str]] | None = None,
    start: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    verbs: Mapping[str, Verb] | None = None,
    on_begin: Callable[[str, str], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    on_progress: Progress = _unseen,
) -> StudyReport:
    """Run the steps of the study in `file` (see weightops.diffusion.study_file) that are not done yet.

    output: the folder for everything (None: named after the file, in the current folder, with -tiny if so). tiny: the
    small models and pictures that the file names stand in the place of its inputs. inputs: paths by name, in the place
    of the file's own. start: this step and all below it are run, done or not; force: all steps are. dry_run: only say
    what would be run. verbs: more than those of this floor (weightops.synthesis.study_steps.VERBS). on_begin(name,
    verb) is called before a step is run, on_step after each, on_progress within.

    A run that was stopped goes on where it was, a training at its last checkpoint. Raises WeightopsError.
    """
    started = time.perf_counter()
    need("study", "PIL")
    found = read_study(file, tiny=tiny, more=verbs)
    _check_alone()
    _check_start(start, found)
    given = _given(found, inputs or {})
    folder = Path(f"{Path(file).stem}-tiny" if tiny else Path(file).stem) if output is None else Path(output)
    _check_folder(folder, found)
    report = StudyReport(str(file), str(folder), tiny, dry_run=dry_run)
    state = State(folder)
    with contextlib.nullcontext() if dry_run else state.held():
        runner = Runner(found, state, given, on_begin, on_progress)
        forced = force
        for step in found.steps:
            forced = forced or step.name == start
            done = runner.step(step, forced=forced, dry_run=dry_run)
            report.steps.append(done)
            report.page = done.output if done.verb == "page" else report.page
            if on_step is not None:
                on_step(done)
        report.inputs, report.bytes_written = runner.entries(), runner.nbytes
    report.seconds = time.perf_counter() - started
    report.peak_memory_bytes = peak_memory_bytes()
    return report


# ------------------------------------------------------------------------------------------------ checks


def _check_alone() -> None:
    """Each of several processes would run every step, one over the other."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        what = f"found {os.environ['WORLD_SIZE']} processes, expected one"
        raise UsageError("study", what, "torchrun is for train alone")


def _check_start(start: str | None, found: Study) -> None:
    known = [step.name for step in found.steps]
    if start is not None and start not in known:
        raise UsageError("--from", f"there is no step {quote(start)}", nearest(start, known))


def _given(found: Study, inputs: Mapping[str, str | os.PathLike[str]]) -> dict[str, str]:
    """The path of each input that is used and not made. Raises UsageError for one that is not there."""
    for name in inputs:
        if name not in found.inputs:
            raise UsageError("--input", f"there is no input {quote(name)}", nearest(name, list(found.inputs)))
    made = {}
    for name in sorted(found.used):
        entry, typed = found.inputs[name], name in inputs
        if found.tiny and not typed:
            continue
        path = str(inputs[name]) if typed else entry.path
        assert path is not None  # the reader sees to it
        try:
            made[name] = study_inputs.found(path, found.folder, typed=typed)
        except UsageError as e:
            hint = f"--input {name}=FILE says where it is" + (", and --tiny makes one" if entry.tiny else "")
            hint = f"{entry.how}; {hint}" if entry.how else hint
            if typed:
                raise UsageError("--input", f"{name}: {quote(path)} {e.what}", entry.how) from None
            raise refused(found.label, entry.line, f"input {name!r}: {quote(path)} {e.what}", hint) from None
    return made


def _check_folder(folder: Path, found: Study) -> None:
    """Refuse a folder that is none, and the one that holds the study's file and inputs."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(str(folder), "is a file, expected the study's folder", "-o DIR names another")
    if folder.is_dir() and folder.resolve() == found.folder.resolve():
        raise UsageError(str(folder), "is the folder of the study's file", "-o DIR names one for what it makes")
    own = {STATE, "inputs", *(step.name for step in found.steps)}
    if folder.is_dir() and not (folder / STATE).is_dir():
        strange = sorted(p.name for p in folder.iterdir() if p.name not in own and p.name[0] != ".")
        if strange:
            what = f"is no study's folder: it holds {listing(strange)}"
            raise UsageError(str(folder), what, "-o DIR names one that is new, empty, or this study's")


__all__ = ["RUN", "STANDS", "WOULD_RUN", "StepReport", "StudyReport", "study"]
