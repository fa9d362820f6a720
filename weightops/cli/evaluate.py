"""The command `evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from weightops.cli import options, render
from weightops.diffusion.evaluate import evaluate
from weightops.diffusion.metrics import CLIP as CLIP_MODEL
from weightops.diffusion.objectives import KINDS
from weightops.errors import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from weightops.diffusion.evaluate import EvaluateReport
    from weightops.diffusion.tables import Table

_COLUMNS = 8  # of a table on a terminal, without -v
_BY_IMAGE = "-images"  # tables of every image have such names, and are long


@click.command("evaluate", short_help="What a LoRA has learnt, in numbers.")
@click.argument("folder", metavar="[DIR]", required=False)
@click.option("--generated", metavar="FOLDER", multiple=True,
              help="Images to compare with those of DIR; of a grid each column. May be repeated.")  # fmt: skip
@click.option("--model", metavar="MODEL",
              help="A file, a diffusers folder, hf://owner/name, or a recipe (.yaml), merged in memory.")  # fmt: skip
@click.option("--lora", "loras", metavar="FILE[:STRENGTH]", multiple=True,
              help="Measured alone; of a training's folder each checkpoint. May be repeated.")  # fmt: skip
@click.option("--vae", metavar="FILE", help="Another VAE in place of the model's own.")
@click.option("--like", metavar="FOLDER", help="Take configs and tokenizers of this diffusers folder.")
@click.option("--pairs", type=int, metavar="N", default=8, show_default=True,
              help="Timesteps, each with a noise, of each image for the held-out loss.")  # fmt: skip
@click.option("--resolution", metavar="PIXELS",
              help="Of held-out images and of drift: 512, or WIDTHxHEIGHT.  [default: the architecture's]")  # fmt: skip
@click.option("--batch", type=int, metavar="N", default=4, show_default=True, help="Images at once, for that loss.")
@click.option("--trained-on", metavar="DIR", help="Images that were trained on: names those that are in both.")
@click.option("--prediction", type=click.Choice(KINDS), help="What the model predicts.  [default: what it says]")
@click.option("--drift", type=int, metavar="N", help="Make N images of each prompt, with and without each LoRA.")
@click.option("--drift-prompts", metavar="FILE",
              help="Prompts unrelated to the LoRA, as generate reads them.  [default: eight of ours]")  # fmt: skip
@click.option("--prompt", metavar="TEXT", multiple=True, help="Of the LoRA's subject, to set drift beside.")
@click.option("--steps", type=int, metavar="N", help="Of sampling, for drift.  [default: the pipeline's]")
@click.option("--guidance", type=float, metavar="X", help="Of sampling, for drift.  [default: the pipeline's]")
@click.option("--clip", metavar="MODEL", help=f"Similarity of --generated and their prompts by this: {CLIP_MODEL}.")
@click.option("--lpips", is_flag=True, help="The learned perceptual distance, too, by the package lpips.")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Of noises, and of images for drift.")
@click.option("-o", "--output", metavar="FOLDER", help="Where to write. Without it, a name made of the inputs'.")
@click.option("--force", is_flag=True, help="Replace an earlier evaluation, once the new one is whole.")
@click.option("--dry-run", is_flag=True, help="Say what would be measured, and what not.")
@options.device
@click.option("--dtype", type=click.Choice(["auto", "fp32", "fp16", "bf16"]), default="auto", show_default=True,
              help="Of the model at work; auto: fp32 on the CPU, 16 bits on CUDA.")  # fmt: skip
@options.speaking
def command(as_json: bool, quiet: bool, verbose: bool, **rest: Any) -> None:
    """What a LoRA or a training has learnt, as far as numbers can say it, each with what it cannot say.

    \b
    weightops evaluate unseen --model sd15.safetensors --lora style-train -o style-evaluation
    weightops evaluate photos --generated grid --generated plain

    Each part is measured where its inputs are given, and the others are named with what they would need:

    \b
    PSNR, SSIM       DIR and --generated: real against generated images, rows are steps or folders
    held-out loss    DIR with captions, --model: the loss on images that were not trained on
    adapter norms    --lora; with --model beside the weights: how much is changed, block by block
    drift            --model, --lora, --drift N: how far images of unrelated prompts move
    CLIP, LPIPS      --clip MODEL, --lpips

    The folder holds every table as CSV and Markdown, plots, evaluation.json, and evaluation.html with all of it.
    The same command on the same files gives the same bytes.
    """
    with render.counting("measuring", quiet=quiet or as_json) as on_progress:
        report = evaluate(on_progress=on_progress, **rest)
    if as_json:
        render.emit_json(report.to_dict())
        return
    if not quiet:
        _draw(report, verbose)
    for text in report.warnings:
        render.print_warning(text)


def _draw(report: EvaluateReport, verbose: bool) -> None:
    out = render.console()
    out.print(printable(report.summary), style="bold", soft_wrap=True)
    for finding in report.findings:
        for name, table in finding.tables.items():
            if verbose or not name.endswith(_BY_IMAGE):
                _table(out, table, verbose)
        out.print(printable(finding.says), style="dim")
    _left_out(out, report)
    out.print()
    verb = "would read " if report.dry_run else "read "
    for entry in report.inputs:
        nbytes = "" if entry["bytes"] is None else f"  {render.size(entry['bytes'])}"
        hashed = f"  {entry['hash']}" if verbose and entry["hash"] else ""
        out.print(f"{verb:<7}{printable(entry['path'])}{nbytes}{hashed}", soft_wrap=True)
    if report.dry_run:
        out.print(f"would write {printable(report.output)}", soft_wrap=True)
        return
    render.wrote(report.output, report.bytes_written)
    peak = f", peak memory {report.peak_memory_bytes / 2**20:,.0f} MiB" if report.peak_memory_bytes else ""
    device = f" on {report.device}" if report.device else ""
    out.print(f"       its page is evaluation.html; {report.seconds:.1f} s{device}{peak}", style="dim")


def _table(out: Console, table: Table, verbose: bool) -> None:
    """The table; of many columns the first, and the last, which is the mean or nothing that could be missed."""
    wide = len(table.columns) > _COLUMNS + 1 and not verbose
    kept = [*range(_COLUMNS), len(table.columns) - 1] if wide else list(range(len(table.columns)))
    numeric = table.numeric
    right = tuple(place for place, column in enumerate(kept) if numeric[column])
    out.print()
    out.print(printable(table.title), style="bold", soft_wrap=True)
    drawn = render.table(*(printable(table.columns[column]) for column in kept), right=right)
    for row in table.drawn():
        drawn.add_row(*(row[column] for column in kept))
    out.print(drawn)
    if wide:
        out.print(f"{len(table.columns) - len(kept):,} columns more (-v shows them)", style="dim")
    if table.note:
        out.print(printable(table.note), style="dim")


def _left_out(out: Console, report: EvaluateReport) -> None:
    if not report.left_out:
        return
    out.print("\nleft out", style="bold")
    rows: Sequence[tuple[str, str]] = [(left.part, left.needs) for left in report.left_out]
    drawn = render.table("part", "why")
    for part, needs in rows:
        drawn.add_row(part, printable(needs))
    out.print(drawn)
