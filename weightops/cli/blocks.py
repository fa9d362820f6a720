"""The command `blocks`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from weightops.cli import options, render
from weightops.errors import printable
from weightops.ops.blocks import blocks

if TYPE_CHECKING:
    from weightops.ops.blocks import BlockTable


@click.command("blocks", short_help="The names of its blocks, for --blocks.")
@click.argument("file", metavar="FILE")
@click.option("--architecture", metavar="NAME", help="What a LoRA is for, where names and sizes fit several models.")
@options.as_json
def command(file: str, architecture: str | None, as_json: bool) -> None:
    """The blocks of a checkpoint, or those that a LoRA changes: the names that --blocks knows, and what they hold.

    \b
    weightops blocks model.safetensors
    weightops blocks lora.safetensors --json

    From the header alone. Of a model that is not known, what has a number is a block.
    """
    found = blocks(file, architecture=architecture)
    if as_json:
        render.emit_json(found.to_dict())
    else:
        _draw(found)


def _draw(found: BlockTable) -> None:
    out = render.console()
    out.print(printable(found.path), style="bold", soft_wrap=True)
    out.print(" · ".join([found.kind, *([found.architecture] if found.architecture else [])]))
    out.print()
    of_lora = found.kind == "lora"
    counts = ["modules"] if of_lora else []
    names = ("component", "block", *counts, "tensors", "parameters", "size")
    drawn = render.table(*names, right=tuple(range(2, len(names))))
    for held in found.components:
        for place, row in enumerate(held.blocks):
            drawn.add_row(
                "" if place else printable(held.component), "-" if row.name is None else printable(row.name),
                *([f"{len(row.modules):,}"] if of_lora else []), f"{row.tensors:,}", render.number(row.parameters),
                render.size(row.nbytes),
            )  # fmt: skip
    out.print(drawn)
    for held in found.components:
        if held.lists:
            own, with_base, *known = held.lists
            said = f"{held.component}: a list has {own} numbers, {with_base} with BASE first"
            out.print(printable(said + "".join(f", or {count}" for count in known)), style="dim", soft_wrap=True)
