"""The command `synth family`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from weightops.cli import options, render
from weightops.errors import printable
from weightops.synthesis.family import family

if TYPE_CHECKING:
    from weightops.synthesis.family import FamilyReport


@click.command("family", short_help="A small base and a family of LoRAs of it.")
@click.argument("output", metavar="DIR")
@click.option("--count", type=int, metavar="N", default=320, show_default=True, help="LoRAs, each of one creature.")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Of everything that is drawn.")
@click.option("--rank", type=int, metavar="R", default=2, show_default=True, help="Of the LoRAs.")
@click.option("--images", type=int, metavar="N", default=16, show_default=True,
              help="Of each creature, to train on.")  # fmt: skip
@click.option("--held-out", type=int, metavar="N", default=8, show_default=True,
              help="Of each creature, not trained on.")  # fmt: skip
@click.option("--steps", type=int, metavar="N", default=60, show_default=True, help="Of training, of each LoRA.")
@click.option("--base-steps", type=int, metavar="N", default=1200, show_default=True, help="Of training, of the base.")
@click.option("--random-gauge", is_flag=True, help="The same LoRAs by other factors, too, in loras-random-gauge.")
@click.option("--force", is_flag=True, help="Begin anew where a family stands.")
@options.as_json
@options.quiet
def command(output: str, as_json: bool, quiet: bool, **rest: Any) -> None:
    """A small base and a family of LoRAs of it, made on the spot: all that trying the other commands takes.

    \b
    weightops synth family toy
    weightops synth family toy --count 64 --rank 4 --random-gauge

    The base is a Stable Diffusion of half a million numbers that draws creatures of 32 × 32 pixels for "a creature".
    Each LoRA is of one creature, whom seven numbers describe: toy/conditions.csv has them, toy/images what a LoRA was
    trained on, toy/held-out other pictures of the same creature, toy/embedder.safetensors a linear map from pixels to
    the numbers. A run that was stopped goes on where it was.
    """
    with render.counting("drawing", quiet=quiet or as_json) as on_progress:
        report = family(output, on_progress=on_progress, **rest)
    if as_json:
        render.emit_json(report.to_dict())
        return
    if not quiet:
        _draw(report)
    for text in report.warnings:
        render.print_warning(text)


def _draw(report: FamilyReport) -> None:
    out = render.console()
    out.print(f"{report.count:,} LoRAs of rank {report.rank} on a base of their own", style="bold", soft_wrap=True)
    out.print()
    read = ", ".join(f"{name} {value:.2f}" for name, value in report.embedder.items())
    rows = [
        ("each changes", f"{report.modules:,} modules, by {report.features:,} numbers"),
        ("pictures of each", f"{report.images:,} to train on, {report.held_out:,} held out"),
        ("held-out loss", f"{report.base_loss:.4f} of the base, {report.trained_loss:.4f} with the LoRA"),
        ("a LoRA gains", f"{report.gain:.1%}"),
        ("the VAE errs by", f"{report.vae_error:.4f} of pixels from 0 to 1"),
        ("the embedder's R²", f"{report.embedder_mean:.2f} ({read})"),
        ("were there already", f"{report.trained_before:,} LoRAs" if report.trained_before else ""),
    ]
    drawn = render.table("", "")
    for name, text in rows:
        if text:
            drawn.add_row(name, printable(text))
    out.print(drawn)
    out.print()
    render.wrote(report.output, report.bytes_written)
    peak = f", peak memory {report.peak_memory_bytes / 2**20:,.0f} MiB" if report.peak_memory_bytes else ""
    out.print(f"       {report.seconds:.1f} s{peak}", style="dim")
