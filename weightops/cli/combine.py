"""The command `combine`."""

from __future__ import annotations

from typing import Any

import click

from weightops.cli import options, render
from weightops.errors import UsageError
from weightops.lora.dialects import DIALECTS
from weightops.ops.blend import ways
from weightops.ops.combine import PEERS, combine


def _list_methods(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        own = ((name, m, [p for p in m.parameters if p.kind != "Weights"]) for name, m in ways())
        render.methods((name, ", ".join(m.models), parameters, m.summary) for name, m, parameters in own)
        ctx.exit()


@click.command("combine", short_help="Several LoRAs into one.")
@click.argument("loras", metavar="LORA[:STRENGTH]…", nargs=-1, required=True)
@click.option(
    "--rank", metavar="R", help="A number, or energy:0.98, error:0.02, size:32MiB …  [default: a module's largest]"
)
@click.option("--conv-rank", metavar="R", help="Of convolutions larger than 1x1.  [default: as --rank]")
@click.option("--max-rank", type=click.IntRange(1), metavar="N", help="The most that a rule gives a module.")
@click.option("--max-conv-rank", type=click.IntRange(1), metavar="N",
              help="The most that it gives a convolution.  [default: as --max-rank]")  # fmt: skip
@click.option("--exact", is_flag=True, help="Cut nothing: the ranks add up.")
@click.option("--method", metavar="NAME", default="sum", show_default=True,
              help="How they are combined; --list-methods shows the ways.")  # fmt: skip
@click.option("--set", "given", metavar="NAME=VALUE", multiple=True, help="A setting of the method.")
@click.option("--list-methods", is_flag=True, is_eager=True, expose_value=False, callback=_list_methods,
              help="Show the methods and leave.")  # fmt: skip
@click.option("--ema", metavar="B", help="Average a training's snapshots, in order: a decay such as 0.9, or sigma:0.1.")
@click.option("--compat", type=click.Choice(PEERS), help="Repeat another tool's numbers; --exact: of its --concat.")
@click.option("--base", metavar="CHECKPOINT", help="The model that they are for: DoRA, OFT … take part with it.")
@click.option("--dialect", type=click.Choice(list(DIALECTS)), help="Whose names the LoRA has.  [default: the first's]")
@click.option("--architecture", metavar="NAME", help="What they are for, where names and sizes fit several models.")
@click.option("--interference", "interference_only", is_flag=True,
              help="Write nothing; say how they get in each other's way (-v: in each module).")  # fmt: skip
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Of methods that draw.")
@options.writing_factors
@options.running_whole
@options.speaking
def command(
    loras: tuple[str, ...], given: tuple[str, ...], as_json: bool, quiet: bool, verbose: bool, **rest: Any
) -> None:
    """Several LoRAs as one: exactly the sum of their changes, each at its strength, cut to the best of a rank.

    \b
    weightops combine style.safetensors:0.7 person.safetensors:0.5 -o both.safetensors
    weightops combine a.safetensors b.safetensors --method ties --set density=0.3 --rank 32

    Ranks, families, dialects and spellings may differ; a module that only one of them has is kept. The report begins
    with their interference: the cosine of their changes, and how strongly each acts in the sum.
    """
    if rest["interference_only"]:
        words = ("output", "rank", "conv_rank", "max_rank", "max_conv_rank", "exact", "verify", "dry_run", "compat")
        if rest["method"] != "sum" or given:
            raise UsageError("--method", "says nothing with --interference, which looks at the changes themselves")
        for word in (word for word in words if rest[word]):
            raise UsageError(f"--{word.replace('_', '-')}", "says nothing with --interference, which writes nothing")
    with render.progress("combining", quiet=quiet or as_json) as on_progress:
        report = combine(*loras, settings=options.settings_of(given), on_progress=on_progress, **rest)
    render.finished(report, as_json=as_json, quiet=quiet, verbose=verbose)
