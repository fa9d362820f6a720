"""The command `convert`."""

from __future__ import annotations

from typing import Any

import click

from weightops.cli import options, render
from weightops.ops.convert import convert


@click.command("convert", short_help="Any file that can be read, as one safetensors file.")
@click.argument("file", metavar="FILE")
@options.drop
@options.allow_nonfinite
@options.writing
@options.running
@options.speaking
def command(file: str, verify: bool, as_json: bool, quiet: bool, verbose: bool, **rest: Any) -> None:
    """Any file that can be read, as one safetensors file: legacy pickles, shards, a diffusers folder.

    \b
    weightops convert model.ckpt
    weightops convert model.safetensors --dtype fp16 --drop ema -o small.safetensors

    Names stay as they are. Without --dtype the bytes of each tensor are copied; nothing in a pickle is ever run.
    """
    with render.progress("converting", quiet=quiet or as_json) as on_progress:
        report = convert(file, check=verify, on_progress=on_progress, **rest)
    render.finished(report, as_json=as_json, quiet=quiet, verbose=verbose)
