"""The command `synth edit`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from weightops.cli import options, render
from weightops.errors import UsageError, printable
from weightops.lora.dialects import DIALECTS
from weightops.synthesis.edit import edit
from weightops.synthesis.lora_file import DTYPES

if TYPE_CHECKING:
    from weightops.synthesis.edit import EditReport


@click.command("edit", short_help="A LoRA moved along what a label says.")
@click.argument("files", metavar="[LORA] FITTED", nargs=-1, required=True)
@click.option("--label", metavar="NAME", help="Along which.")
@click.option("--strength", type=float, metavar="X", help="How far, in the label's deviations among the space's LoRAs.")
@click.option("--list", "listed", is_flag=True, help="The labels there are, and what they explain; needs no LORA.")
@click.option("--labels", metavar="FILE", help="Labels for the space's LoRAs: CSV or NPZ.  [default: its conditions]")
@click.option("-o", "--output", metavar="FILE", help="Where to write.  [default: made of the names]")
@click.option("--rank", type=int, metavar="N", help="The best that it can be of this rank.  [default: the LoRA's]")
@click.option("--dialect", type=click.Choice(list(DIALECTS)), default="kohya", show_default=True,
              help="Of the file; peft writes a folder.")  # fmt: skip
@click.option("--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True, help="Of the file.")
@click.option("--space", metavar="DIR", help="The space.  [default: the folder of FITTED]")
@options.force
@click.option("--dry-run", is_flag=True, help="Say what would be written.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else there.")
@click.option("-q", "--quiet", is_flag=True, help="No report; warnings and errors remain.")
def command(files: tuple[str, ...], listed: bool, as_json: bool, quiet: bool, **rest: Any) -> None:
    """A LoRA moved along what a label says: more of it or less, and of the other labels neither.

    \b
    weightops synth edit person.safetensors space/pca.safetensors --label smiling --strength 1.5 -o smiling.safetensors
    weightops synth edit space/pca.safetensors --list --labels people.csv

    A direction is the least squares of the space's LoRAs on all labels together, so that what a label shares with the
    others is not in it; it is not shrunk. What the model leaves out of the LoRA stays as it is. R² is what a label
    alone explains of how the LoRAs differ; beside it stands what it would explain when shuffled, in 95 of 100 cases.
    """
    if len(files) != (1 if listed else 2):
        found = f"found {len(files)} file{'s' * (len(files) != 1)}"
        expected = "expected FITTED alone" if listed else "expected LORA and FITTED"
        raise UsageError("synth edit", f"{found}, {expected}", None if listed else "--list needs FITTED alone")
    if listed and (rest["label"] is not None or rest["strength"] is not None):
        raise UsageError("--list", "says what labels there are, and moves nothing along --label")
    if not listed and rest["label"] is None:
        raise UsageError("--label", "is lacking", f"weightops synth edit {printable(files[-1])} --list says which")
    report = edit(None if listed else files[0], files[-1], **rest)
    if as_json:
        render.emit_json(report.to_dict())
        return
    for text in report.warnings:
        render.print_warning(text)
    if not quiet:
        _draw(report)


def _draw(report: EditReport) -> None:
    out = render.console()
    if report.label is None:
        out.print(f"{len(report.labels):,} labels of {report.loras:,} LoRAs", style="bold", soft_wrap=True)
    else:
        of = f"{printable(report.lora or '')}, {printable(report.label)} {report.amount:+.4g}"
        out.print(f"{of} ({report.strength:+g} deviations)", style="bold", soft_wrap=True)
    out.print()
    drawn = render.table("label", "deviation", "R² alone", "shuffled", right=(1, 2, 3))
    for found in report.labels:
        if report.label in (None, found["label"]):
            cells = (f"{found['deviation']:.4g}", f"{found['share']:.2%}", f"{found['null']:.2%}")
            drawn.add_row(printable(found["label"]), *cells)
    out.print(drawn)
    out.print()
    if report.output is None:
        return
    out.print(f"the change of its ΔW is {report.change:.3f} of its norm", soft_wrap=True)
    if report.dry_run:
        out.print(f"would write {printable(report.output)}  {render.size(report.bytes_written)}", soft_wrap=True)
        return
    render.wrote(report.output, report.bytes_written)
