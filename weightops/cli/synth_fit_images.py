"""The command `synth fit-images`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from weightops.cli import options, render
from weightops.diffusion.objectives import KINDS
from weightops.errors import printable
from weightops.lora.dialects import DIALECTS
from weightops.synthesis.fit_images import L2, LR, MODEL_DTYPES, STEPS, fit_images
from weightops.synthesis.lora_file import DTYPES

if TYPE_CHECKING:
    from weightops.synthesis.fit_images import FitImagesReport


@click.command("fit-images", short_help="A LoRA from a few images, in a space.")
@click.argument("images", metavar="IMAGES")
@click.argument("fitted", metavar="FITTED")
@click.option("--model", metavar="MODEL", required=True,
              help="The space's base: a file, a diffusers folder, hf://owner/name, or a recipe (.yaml).")  # fmt: skip
@click.option("--space", metavar="DIR", help="Of FITTED, where it does not lie in it.")
@click.option("--vae", metavar="FILE", help="Another VAE in place of the model's own.")
@click.option("--like", metavar="FOLDER", help="Take configs and tokenizers of this diffusers folder.")
@click.option("-o", "--output", metavar="FILE", help="Where to write. Without it, a name made of the folder's.")
@click.option("--prompt", metavar="TEXT", help="For all images, in place of their captions.")
@click.option("--condition", metavar="TEXT", help="Begin at what the space says of this: numbers, or an image.")
@click.option("--embedder", metavar="FILE", help="What makes a condition of an image.  [default: the space's own]")
@click.option("--components", type=int, metavar="N", help="The first ones alone.  [default: all of FITTED]")
@click.option("--steps", type=int, metavar="N", default=STEPS, show_default=True, help="Of gradient descent.")
@click.option("--lr", type=float, metavar="X", default=LR, show_default=True, help="In deviations of a coefficient.")
@click.option("--l2", type=float, metavar="X", default=L2, show_default=True,
              help="How much is held against numbers that are unlike the space's LoRAs.")  # fmt: skip
@click.option("--batch", type=int, metavar="N", help="Images in a step.  [default: 4, or as many as there are]")
@click.option("--resolution", metavar="PIXELS", help="512, or WIDTHxHEIGHT.  [default: the model's]")
@click.option("--prediction", type=click.Choice(KINDS), help="What the model predicts.  [default: what it says]")
@click.option("--gradient-checkpointing", is_flag=True, help="Compute twice what would take much memory.")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Of everything that is drawn.")
@click.option("--dialect", type=click.Choice(list(DIALECTS)), default="kohya", show_default=True,
              help="Whose names the LoRA has.")  # fmt: skip
@click.option("--rank", type=int, metavar="R", help="Of the LoRA, at its best.  [default: the space's]")
@click.option("--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True, help="Of the LoRA.")
@click.option("--model-dtype", type=click.Choice(MODEL_DTYPES), default="fp32", show_default=True,
              help="Of the frozen weights.")  # fmt: skip
@options.device
@options.force
@click.option("--dry-run", is_flag=True, help="Say what would be learnt and written; no model is read.")
@options.speaking
def command(as_json: bool, quiet: bool, verbose: bool, **rest: Any) -> None:
    """A LoRA from one to some twenty images, by learning where it lies in a space of LoRAs.

    \b
    weightops synth fit-images photos space/pca.safetensors --model base.safetensors -o new.safetensors
    weightops synth fit-images photos space/vae.safetensors --model base.safetensors --prompt "a creature" --steps 80

    What is learnt are the space's coefficients, some tens of numbers, by gradient descent through the frozen model: so
    few images and steps do, and the LoRA stays like those that the space was learnt from. It begins at their mean.
    """
    with render.counting("learning", quiet=quiet or as_json) as on_progress:
        report = fit_images(on_progress=on_progress, **rest)
    if as_json:
        render.emit_json(report.to_dict())
        return
    for text in report.warnings:
        render.print_warning(text)
    if not quiet:
        _draw(report, verbose=verbose)


def _draw(report: FitImagesReport, *, verbose: bool) -> None:
    out = render.console()

    def line(text: str) -> None:
        out.print(printable(text), soft_wrap=True)

    images = f"{report.images:,} image{'s' * (report.images != 1)}"
    what = f"{report.learnt:,} numbers learnt from {images} in {report.steps:,} steps"
    out.print(what, style="bold", soft_wrap=True)
    line(f"for a LoRA of {report.parameters:,}; begun at {report.start}")
    if verbose:
        for name, value in report.settings.items():
            if value is not None:
                line(f"  {name.replace('_', ' '):<12}{value}")
        line(f"  basis       {render.size(report.basis_bytes)}")
    if report.dry_run:
        line(f"would write {report.output}  {render.size(report.bytes_written)}")
        return
    loss, near = report.loss, report.nearest
    first = f"{loss['base']:.4f} of the model alone, {loss['first']:.4f} at first"
    line(f"loss on these images: {first}, {loss['last']:.4f} at last")
    line(f"it lies {report.distance:.2f} deviations from the mean LoRA, where the space's own lie about 1")
    usual = f"they are {near['usual']:.2f} from their nearest, at the median"
    line(f"nearest of them: {near['name']}, {near['distance']:.2f} of its ΔW away; {usual}")
    if report.error:
        line(f"cut to rank {max(report.ranks)}: {100 * report.error:.2g} % of ΔW are lost")
    out.print()
    for entry in report.inputs:
        line(f"read   {entry['path']}" + (f"  {entry['hash']}" if verbose and entry["hash"] else ""))
    render.wrote(report.output, report.bytes_written)
    peak = f", peak memory {report.peak_memory_bytes / 2**20:,.0f} MiB" if report.peak_memory_bytes else ""
    out.print(f"       {report.seconds:.1f} s on {report.device}{peak}", style="dim")
