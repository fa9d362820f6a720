"""The command `study`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from weightops.cli import options, render
from weightops.diffusion.study import RUN, STANDS, WOULD_RUN, StepReport, StudyReport, study
from weightops.errors import UsageError, printable, quote
from weightops.synthesis.study_steps import VERBS

if TYPE_CHECKING:
    from weightops.cli.render import Counting

_MANY = 1_000_000  # more than these are bytes, and shown in hundredths


def _inputs(_ctx: click.Context, _param: click.Parameter, words: tuple[str, ...]) -> dict[str, str]:
    """NAME=FILE, as --input takes them."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (equals and name and path):
            raise UsageError("--input", f"found {quote(word)}, expected NAME=FILE")
        if name in found:
            raise UsageError("--input", f"found {quote(name)} twice")
        found[name] = path
    return found


@click.command("study", short_help="A whole study from one file.")
@click.argument("file", metavar="FILE.yaml")
@click.option("--tiny", is_flag=True, help="With small models and pictures, made on the spot, in place of the inputs.")
@click.option("-o", "--output", metavar="DIR", help="For all that is made.  [default: named after the file]")
@click.option("--input", "inputs", metavar="NAME=FILE", multiple=True, callback=_inputs,
              help="Where an input of the study is; may be said several times.")  # fmt: skip
@click.option("--from", "start", metavar="STEP", help="Run this step and all below it, done or not.")
@click.option("--force", is_flag=True, help="Run all steps, done or not.")
@click.option("--dry-run", is_flag=True, help="Say which steps would be run, and why.")
@options.as_json
@options.quiet
def command(file: str, as_json: bool, quiet: bool, **rest: Any) -> None:
    """A whole study from one file, step by step: merges, captions, trainings, grids, tables, and a page of it all.

    \b
    weightops study examples/merge-study.yaml --tiny
    weightops study examples/style-study.yaml --input images=photos -o style

    A step that is done is not done again: it is known by its words and by the content of everything that it is given.
    A changed word runs its step again, and of the steps below those that are given what it made. A run that was stopped
    goes on where it was, a training at its last checkpoint. `weightops.diffusion.study_file` says how a file is
    written; those in examples/ are whole.
    """
    silent = quiet or as_json
    with render.counting("study", quiet=silent) as counting:
        shown = _Shown(counting, silent=silent)
        report = study(file, verbs=VERBS, on_begin=shown.begin, on_step=shown.step, on_progress=shown.progress, **rest)
    if as_json:
        render.emit_json(report.to_dict())
        return
    if not quiet:
        _draw(report)
    for step in report.steps:
        for text in step.warnings if step.state == RUN else ():
            render.print_warning(f"{step.name}: {text}")


class _Shown:
    """What is said while a study runs: a line for each step, a bar for the one at work."""

    def __init__(self, counting: Counting, *, silent: bool) -> None:
        self.counting, self.silent = counting, silent
        self.name = ""

    def begin(self, name: str, _verb: str) -> None:
        self.name = name

    def step(self, step: StepReport) -> None:
        if self.silent:
            return
        seconds = f"{step.seconds:8.1f} s" if step.state == RUN else " " * 10
        style = {RUN: "green", STANDS: "dim", WOULD_RUN: "yellow"}[step.state]
        line = f"{step.state:<10} {seconds}  {step.name} ({step.verb})" + (f": {step.reason}" if step.reason else "")
        render.console().print(printable(line), style=style, soft_wrap=True)

    def progress(self, what: str, done: int, total: int, value: float | None) -> None:
        title = ": ".join(filter(None, (self.name, what))) + ("" if value is None else f", loss {value:.4f}")
        if total > _MANY:
            done, total = 100 * done // total, 100
        self.counting(done, total, title=title)


def _draw(report: StudyReport) -> None:
    out = render.console()
    states = [step.state for step in report.steps]
    out.print()
    if report.dry_run:
        out.print(f"{_steps(states.count(WOULD_RUN))} would be run, {states.count(STANDS):,} unchanged", style="bold")
        return
    if RUN not in states:
        out.print(f"nothing to do: {_steps(len(states))} unchanged", style="bold")
    else:
        out.print(f"{_steps(states.count(RUN))} run, {states.count(STANDS):,} unchanged", style="bold")
        render.wrote(report.output, report.bytes_written)
    if report.page is not None:
        out.print(f"page   {printable(report.page)}", style="green", soft_wrap=True)
    peak = f", peak memory {report.peak_memory_bytes / 2**20:.0f} MiB" if report.peak_memory_bytes else ""
    out.print(f"       {report.seconds:.1f} s{peak}", style="dim")


def _steps(count: int) -> str:
    return f"{count:,} step{'' if count == 1 else 's'}"
