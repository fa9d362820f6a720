"""The command `fuse`."""

from __future__ import annotations

from typing import Any

import click

from weightops.cli import options, render
from weightops.merging.rounding import ROUNDINGS
from weightops.ops.fuse import fuse


@click.command("fuse", short_help="LoRAs into a checkpoint.")
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.argument("loras", metavar="LORA[:STRENGTH]…", nargs=-1, required=True)
@click.option(
    "--text-encoder", type=float, metavar="X",
    help="The strength of all LoRAs in text encoders, in place of their own; 0 leaves these as they are.",
)  # fmt: skip
@click.option(
    "--blocks", metavar="SPEC",
    help="Factors of the strengths: OUT=0.5, attn.q=0, a preset, or a list of numbers. `weightops blocks` names them.",
)  # fmt: skip
@click.option(
    "--undo", metavar="FILE", help="Write this too: with it, unfuse makes the checkpoint again, byte for byte."
)
@click.option("--embeddings", metavar="FOLDER", help="Copy embeddings that the LoRAs carry along into a new folder.")
@click.option(
    "--lokr-rank", type=int, metavar="N",
    help="Divide the alpha of LoKr modules of two whole factors by this, as some trainers mean it.",
)  # fmt: skip
@click.option("--rounding", type=click.Choice(ROUNDINGS), default="nearest", show_default=True,
              help="stochastic: up or down by chance, so that on average nothing of a weak LoRA is lost.")  # fmt: skip
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Of --rounding stochastic.")
@options.allow_nonfinite
@options.writing
@options.running_whole
@options.speaking
def command(
    checkpoint: str, loras: tuple[str, ...], as_json: bool, quiet: bool, verbose: bool, **rest: Any
) -> None:  # fmt: skip
    """LoRAs of any family and dialect into a checkpoint, in one streaming pass, every key accounted for.

    \b
    weightops fuse model.safetensors style.safetensors:0.8 -o out.safetensors
    weightops fuse model.safetensors style.safetensors:0.8 person.safetensors:-0.3 --rounding stochastic

    A strength of 0.8 adds exactly 0.8 times what the LoRA was trained to change; the default is 1. Tensors that no
    LoRA touches are copied as bytes. The report says how much of each change survived the rounding to the
    checkpoint's dtype; -v says it for each module. A diffusers folder makes one, unless the output is a .safetensors.
    """
    with render.progress("fusing", quiet=quiet or as_json) as on_progress:
        report = fuse(checkpoint, *loras, on_progress=on_progress, **rest)
    render.finished(report, as_json=as_json, quiet=quiet, verbose=verbose)
