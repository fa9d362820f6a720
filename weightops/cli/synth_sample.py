"""The command `synth sample`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from weightops.cli import options, render
from weightops.errors import printable
from weightops.lora.dialects import DIALECTS
from weightops.synthesis.draws import AT, BYS, GUIDANCE, SPREAD, STEPS
from weightops.synthesis.lora_file import DTYPES
from weightops.synthesis.sample import sample

if TYPE_CHECKING:
    from weightops.synthesis.sample import SampleReport


@click.command("sample", short_help="New LoRAs of a space.")
@click.argument("fitted", metavar="FITTED")
@click.option("-o", "--output", metavar="FILE|DIR",
              help="A file for one LoRA, a folder for several.  [default: a name made of the inputs']")  # fmt: skip
@click.option("--count", type=int, metavar="N", default=1, show_default=True, help="LoRAs, of each condition.")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Of everything that is drawn.")
@click.option(
    "--condition", metavar="WORDS", help="Numbers (0.2,0.7), a CSV or NPZ file, an image, or a folder of them."
)
@click.option("--embedder", metavar="FILE", help="Makes numbers of images.  [default: what made the space's]")
@click.option("--between", nargs=2, metavar="A B", help="Two LoRAs: members by name, or files.")
@click.option("--at", type=options.Numbers(), metavar="X,…",
              help=f"How far from the first to the second, a LoRA for each.  [default: {AT:g}]")  # fmt: skip
@click.option("--around", metavar="LORA", help="A LoRA, and others near it.")
@click.option("--spread", type=float, metavar="X",
              help=f"How far, in deviations of the space's LoRAs.  [default: {SPREAD:g}]")  # fmt: skip
@click.option("--by", type=click.Choice(BYS),
              help="How latents are made.  [default: diffusion, else a VAE's prior, else gaussian; of a condition "
              "diffusion, else ridge]")  # fmt: skip
@click.option(
    "--guidance", type=float, metavar="X", help=f"Of diffusion, towards the condition.  [default: {GUIDANCE:g}]"
)
@click.option("--steps", type=int, metavar="N", help=f"Of diffusion.  [default: {STEPS}]")
@click.option("--rank", type=int, metavar="N", help="The best that each can be of this rank.  [default: the space's]")
@click.option("--dialect", type=click.Choice(list(DIALECTS)), default="kohya", show_default=True,
              help="Of the files; peft writes folders.")  # fmt: skip
@click.option("--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True, help="Of the files.")
@click.option("--space", metavar="DIR", help="The space.  [default: the folder of FITTED]")
@options.force
@click.option("--dry-run", is_flag=True, help="Make them, say how near they are to others, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else there.")
@click.option("-q", "--quiet", is_flag=True, help="No report; warnings and errors remain.")
def command(fitted: str, as_json: bool, quiet: bool, **rest: Any) -> None:
    """New LoRAs from what was learnt of a space: drawn, from a condition, between two of them, or around one.

    \b
    weightops synth sample space/pca.safetensors --count 8 -o new
    weightops synth sample space/diffusion.safetensors --condition 0.3,0.1,0.8 -o person.safetensors

    What is written are ordinary LoRA files. Of each the nearest training member is said, and how far it is in ΔW,
    beside the distance that is usual from one member to the next: a LoRA that is much nearer is one of them, given
    back. An image as a condition is cut to a square about its middle; a face in it should be aligned before.
    """
    report = sample(fitted, **rest)
    if as_json:
        render.emit_json(report.to_dict())
        return
    for text in report.warnings:
        render.print_warning(text)
    if not quiet:
        _draw(report)


def _draw(report: SampleReport) -> None:
    out = render.console()
    count = len(report.files)
    out.print(f"{count:,} LoRA{'s' * (count != 1)}, by {report.by}", style="bold", soft_wrap=True)
    out.print()
    drawn = render.table("file", "of", "nearest member", "distance in ΔW", right=(3,))
    for made in report.files[:20]:
        name = made["path"].rpartition("/")[2]
        drawn.add_row(*map(printable, (name, made["label"], made["nearest"])), f"{made['distance']:.3f}")
    out.print(drawn)
    if count > 20:
        out.print(f"and {count - 20:,} more", style="dim")
    out.print(f"from a member to the nearest other one it is {report.usual_distance:.3f} (median)", style="dim")
    out.print()
    if report.dry_run:
        out.print(f"would write {printable(report.output)}  {render.size(report.bytes_written)}", soft_wrap=True)
        return
    render.wrote(report.output, report.bytes_written)
