"""The command `extract`."""

from __future__ import annotations

from typing import Any

import click

from weightops.cli import options, render
from weightops.lora.dialects import DIALECTS
from weightops.ops.extract import extract


@click.command("extract", short_help="A LoRA out of a finetune.")
@click.argument("tuned", metavar="TUNED")
@click.argument("base", metavar="BASE")
@click.option("--rank", metavar="R", default="32", show_default=True,
              help="A number, or energy:0.9, error:0.1, size:100MB, ratio:10, fro:0.9, knee.")  # fmt: skip
@click.option(
    "--conv-rank", metavar="R", help="Of convolutions larger than 1x1; 0: none of them.  [default: as --rank]"
)
@click.option("--dialect", type=click.Choice(list(DIALECTS)), default="kohya", show_default=True,
              help="Whose names the LoRA has.")  # fmt: skip
@click.option("--include", metavar="GLOB", multiple=True, help="Modules of these names alone: 'text_encoder*'.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="No modules of these names.")
@click.option("--biases", is_flag=True, help="Differences of biases and norms, too (diff_b, w_norm, b_norm).")
@click.option("--clamp-quantile", type=float, metavar="Q",
              help="Clamp factors as other extractors do (0.99), at the cost of the error.")  # fmt: skip
@click.option("--allow-unrelated", is_flag=True, help="Go on where the two do not look like finetune and base.")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Of the subspaces' random start.")
@options.allow_nonfinite
@options.writing_factors
@options.running_whole
@options.speaking
def command(
    tuned: str, base: str, as_json: bool, quiet: bool, verbose: bool, **rest: Any
) -> None:  # fmt: skip
    """The LoRA that turns BASE into TUNED, as nearly as its rank allows.

    \b
    weightops extract tuned.safetensors base.safetensors --rank 32 -o lora.safetensors
    weightops extract tuned.safetensors base.safetensors --rank energy:0.9 --conv-rank 16 --dialect diffusers

    Each module's error is within half a percent of the smallest that its rank allows, and the report says it (-v for
    each module), beside what the rounding of the two files alone would make. Rules other than a number take a pass
    more; error: and size: are of the whole file. What is equal in both models is left out.
    """
    with render.progress("extracting", quiet=quiet or as_json) as on_progress:
        report = extract(tuned, base, on_progress=on_progress, **rest)
    render.finished(report, as_json=as_json, quiet=quiet, verbose=verbose)
