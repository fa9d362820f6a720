"""The command `unfuse`."""

from __future__ import annotations

from typing import Any

import click

from weightops.cli import options, render
from weightops.ops.unfuse import unfuse


@click.command("unfuse", short_help="Take fused LoRAs out again, bit for bit.")
@click.argument("file", metavar="FILE")
@click.option("--undo", metavar="FILE", required=True, help="What fuse --undo wrote.")
@options.output
@options.force
@options.dry_run
@options.memory_whole
@options.threads
@options.speaking
def command(file: str, as_json: bool, quiet: bool, verbose: bool, **rest: Any) -> None:
    """The checkpoint as it was before LoRAs were fused into it, byte for byte, header and all.

    \b
    weightops unfuse fused.safetensors --undo undo.safetensors
    weightops unfuse fused.safetensors --undo undo.safetensors -o original.safetensors

    The undo file comes from `weightops fuse … --undo undo.safetensors`, and fits that one fused file: its tensors are
    hashed first, and any other file is refused. Without -o the original's name is taken, or with -unfused where
    something bears it.
    """
    with render.progress("unfusing", quiet=quiet or as_json) as on_progress:
        report = unfuse(file, on_progress=on_progress, **rest)
    render.finished(report, as_json=as_json, quiet=quiet, verbose=verbose)
