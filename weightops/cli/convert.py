"""The command `convert`."""

from __future__ import annotations

from typing import Any

import click

from weightops.cli import options, render
from weightops.lora.dialects import DIALECTS
from weightops.ops.convert import convert
from weightops.ops.convert_adapter import TO_LORA
from weightops.ops.layout import LAYOUTS
from weightops.ops.prediction import KINDS


@click.command("convert", short_help="Another layout or dialect, dtype or container.")
@click.argument("file", metavar="FILE")
@click.option(
    "--to", type=click.Choice(list(dict.fromkeys([*LAYOUTS, *DIALECTS, TO_LORA]))),
    help="Of a checkpoint diffusers (a folder), original, comfy; of a LoRA kohya, diffusers, peft, comfy, onetrainer; "
    "lora: any adapter family to plain LoRA. Without it, names stay.",
)  # fmt: skip
@click.option(
    "--rank", metavar="R", help="With --to lora: how near. A number, energy:0.99, error:0.01 …  [default: exact]"
)
@click.option("--conv-rank", metavar="R", help="The same of convolutions larger than 1x1.  [default: as --rank]")
@click.option("--base", metavar="CHECKPOINT", help="With --to lora: the model it is for; DoRA, OFT … need it.")
@click.option("--seed", type=int, metavar="N", default=0, help="With --to lora: of what has no exact factors.")
@options.drop
@options.shard_size
@click.option(
    "--like", metavar="FOLDER", help="Take configs, scheduler and tokenizers of this folder or hf:// repository."
)
@click.option("--no-tokenizer", is_flag=True, help="Write a diffusers folder without its tokenizers.")
@click.option("--prediction", type=click.Choice(KINDS), help="What the model predicts.  [default: what the file says]")
@click.option(
    "--alpha", type=click.Choice(["carry", "fold"]), default="carry", show_default=True,
    help="Of a LoRA: carry alpha to where the dialect keeps it, or fold it into the factors.",
)  # fmt: skip
@click.option(
    "--architecture", metavar="NAME", help="What a LoRA is for, where its names and sizes fit several models."
)
@click.option(
    "--check", is_flag=True, help="Read the output back, rename it back, and compare every byte with the input."
)
@options.allow_nonfinite
@options.writing
@options.running_whole
@options.speaking
def command(file: str, as_json: bool, quiet: bool, verbose: bool, **rest: Any) -> None:
    """A checkpoint in another layout, dtype or container, or a LoRA in another dialect.

    \b
    weightops convert model.safetensors --to diffusers
    weightops convert lora.safetensors --to kohya --check

    Without --to the names stay, and any file that can be read becomes a safetensors file, or shards of one. Without
    --dtype the bytes of each tensor are copied; nothing in a pickle is ever run. What the new layout has no place
    for is named. A diffusers folder gets its tokenizers from --like, or from the hub's local cache.
    """
    with render.progress("converting", quiet=quiet or as_json) as on_progress:
        report = convert(file, on_progress=on_progress, **rest)
    render.finished(report, as_json=as_json, quiet=quiet, verbose=verbose)
