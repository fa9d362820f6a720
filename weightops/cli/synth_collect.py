"""The command `synth collect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from weightops.cli import options, render
from weightops.errors import printable
from weightops.synthesis.collect import OTHERS, collect
from weightops.synthesis.space import FORMS, WIDTHS

if TYPE_CHECKING:
    from weightops.synthesis.collect_rows import CollectReport


@click.command("collect", short_help="LoRAs of one base as one space.")
@click.argument("loras", metavar="LORA...", nargs=-1, required=True)
@click.option("-o", "--output", metavar="DIR", required=True, help="The space: a new folder, or one to add to.")
@click.option("--conditions", metavar="FILE", help="Numbers for each LoRA: CSV (name, numbers …) or NPZ.")
@click.option("--images", metavar="DIR", help="An image, or a folder of images, for each LoRA, by its name.")
@click.option("--embedder", metavar="FILE", help="Turns the images into numbers: ONNX, a CLIP folder, a linear map.")
@click.option("--others", type=click.Choice(OTHERS), default="refuse", show_default=True,
              help="Of other modules or ranks: refuse all, skip these (and NaN), or pad what they lack.")  # fmt: skip
@click.option("--form", type=click.Choice(FORMS),
              help="Balanced and turned to a reference, balanced alone, or as it is.  [default: aligned]")  # fmt: skip
@click.option("--dtype", type=click.Choice(list(WIDTHS)), help="Of the rows.  [default: fp32]")
@click.option("--architecture", metavar="NAME", help="Of the LoRAs, where names and shapes fit several.")
@options.force
@click.option("--dry-run", is_flag=True, help="Say what would be collected, from headers alone.")
@options.speaking
def command(loras: tuple[str, ...], as_json: bool, quiet: bool, verbose: bool, **rest: Any) -> None:
    """LoRAs of one base, of any family and dialect, as rows of one space that can be averaged, learnt and sampled.

    \b
    weightops synth collect loras/*.safetensors -o space
    weightops synth collect loras/ --conditions people.csv --dtype fp16 -o space

    A LoRA's change of a weight is the same for many pairs of factors. Each is brought into one form: balanced by its
    singular values, and turned towards a reference that all share and that is kept, so that later ones fall into the
    same place: LoRAs that a space is given again, and new ones, are added behind those it has. A run that was stopped
    goes on where it was. The rows are a plain array that numpy can map; space.json says what each feature is.
    """
    with render.counting("collecting", quiet=quiet or as_json) as on_progress:
        report = collect(*loras, on_progress=on_progress, **rest)
    if as_json:
        render.emit_json(report.to_dict())
        return
    if not quiet:
        _draw(report, verbose=verbose)
    for text in report.warnings:
        render.print_warning(text)


def _draw(report: CollectReport, *, verbose: bool) -> None:
    out = render.console()
    what = "would be collected" if report.dry_run else "collected"
    out.print(f"{report.added:,} LoRAs {what}, {report.members:,} in the space", style="bold", soft_wrap=True)
    out.print()
    ranks = ", ".join(map(str, report.ranks))
    rows = [
        ("architecture", report.architecture),
        ("modules", f"{report.modules:,} of rank {ranks}"),
        ("features", f"{report.features:,} a LoRA, {report.dtype}, {report.form}"),
        ("conditions", ", ".join(report.condition_names) if verbose else f"{len(report.condition_names):,} numbers"),
        ("were there already", f"{report.there:,}"),
        ("from an interrupted run", f"{report.taken_up:,}"),
        ("filled up with zeros", f"{report.padded:,}"),
        ("left out", f"{len(report.left_out):,}"),
        ("rounds of alignment", f"{report.rounds}"),
        ("rounding changes a ΔW by", "" if report.error is None else f"at most {report.error:.1e} of its norm"),
    ]
    drawn = render.table("", "")
    for name, text in rows:
        if text not in ("0", "", "0 numbers"):
            drawn.add_row(name, printable(text))
    out.print(drawn)
    out.print()
    if report.dry_run:
        out.print(f"would write {printable(report.output)}  {render.size(report.nbytes)}", soft_wrap=True)
        return
    render.wrote(report.output, report.nbytes)
    peak = f", peak memory {report.peak_memory_bytes / 2**20:,.0f} MiB" if report.peak_memory_bytes else ""
    out.print(f"       {report.seconds:.1f} s{peak}", style="dim")
