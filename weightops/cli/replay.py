"""The command `replay`."""

from __future__ import annotations

import sys
from typing import Any

import click

from weightops.cli import options, render
from weightops.cli.main import print_error
from weightops.errors import printable
from weightops.ops.replay import replay


@click.command("replay", short_help="Make a file again by its own recipe, and compare.")
@click.argument("file", metavar="FILE")
@click.option(
    "--in", "folders", metavar="FOLDER", multiple=True, help="Look for the inputs here, too, however deep. Repeatable."
)
@options.together(
    click.option("-o", "--output", metavar="FILE", help="Keep what is made. Without it, it is compared and removed."),
    options.force,
)
@options.running_whole
@options.speaking
def command(file: str, as_json: bool, quiet: bool, verbose: bool, **rest: Any) -> None:
    """Make a file again by the recipe in its metadata, and compare the two byte for byte.

    \b
    weightops replay merged.safetensors
    weightops replay merged.safetensors --in models --in loras -o again.safetensors

    Inputs are looked for beside FILE, by name, and under other names by the hash of what was read of them. Exit code 0:
    every tensor is the same; 1: one is not, and it is said whether an input has changed, and which. A GPU may round
    otherwise than a CPU: --device is to be what it was.
    """
    with render.progress("making again", quiet=quiet or as_json) as on_progress:
        report = replay(file, on_progress=on_progress, **rest)
    details = report.details
    if as_json:
        render.emit_json(report.to_dict())
    elif not quiet:
        made, out = details["made"], render.console()
        out.print(f"{printable(file)}: {made['command']} (weightops {printable(made['version'])})", soft_wrap=True)
        out.print(printable(report.summary), style="dim", soft_wrap=True)
        for entry in report.inputs:
            state = "as it was" if entry["hash"] == entry["recorded"] else "changed"
            hashed = f"  {entry['hash']}" if verbose else ""
            out.print(f"read   {printable(entry['path'])}  {render.size(entry['bytes'])}  {state}{hashed}",
                      style=None if state == "as it was" else "red", soft_wrap=True)  # fmt: skip
        different = details["differ"]["tensors"]
        for one in different if verbose else different[:5]:
            out.print(f"  {printable(one['key'])}  {one['reason']}", style="yellow", soft_wrap=True)
        if report.output is not None:
            render.wrote(report.output, report.bytes_written)
    if not as_json:
        for text in report.warnings:
            render.print_warning(text)
    if not details["same"]:
        if not as_json:
            print_error(f"{file}: {details['line']}", None)
        sys.exit(1)
    if not as_json and not quiet:
        render.console().print(details["line"], style="green", soft_wrap=True)
