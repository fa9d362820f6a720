"""The command `merge`."""

from __future__ import annotations

from typing import Any

import click

from weightops.cli import options, render
from weightops.merging.method import METHODS
from weightops.ops.merge import merge


def _list_methods(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        render.methods((name, ", ".join(m.models), m.parameters, m.summary) for name, m in METHODS)
        ctx.exit()


@click.command("merge", short_help="Two or more models into one.")
@click.argument("models", metavar="MODEL…", nargs=-1, required=True)
@click.option("--alpha", type=float, metavar="X",
              help="Two models: (1-X)·A + X·B; with --base C, A + X·(B - C).  [default: 0.5; 1]")  # fmt: skip
@click.option("--weights", type=options.Numbers(), help="One weight per model, normalised to a sum of 1.")
@click.option("--no-normalize", is_flag=True, help="Take --weights as they are.")
@click.option("--base", metavar="FILE", help="Add differences from this model: base + Σ wᵢ·(modelᵢ - base).")
@click.option("--method", metavar="NAME", help="Another way to merge; --list-methods shows them.")
@click.option("--set", "settings", metavar="NAME=VALUE", multiple=True, help="A parameter of the method.")
@click.option("--list-methods", is_flag=True, is_eager=True, expose_value=False, callback=_list_methods,
              help="Show the methods and leave.")  # fmt: skip
@click.option("--vae", metavar="N|merge|FILE", default="1", show_default=True,
              help="Whose VAE is kept. A merged VAE spoils colours; a file that is only a VAE is merged.")  # fmt: skip
@click.option("--text-encoder", metavar="N|merge", default="merge", show_default=True, help="Whose text encoders.")
@options.drop
@click.option("--on-mismatch", type=click.Choice(["error", "keep-first"]), default="error", show_default=True,
              help="Tensors of one name and different shapes.")  # fmt: skip
@options.allow_nonfinite
@options.writing
@options.running
@options.speaking
def command(
    models: tuple[str, ...], settings: tuple[str, ...], no_normalize: bool, verify: bool,
    as_json: bool, quiet: bool, verbose: bool, **rest: Any,
) -> None:  # fmt: skip
    """Two or more models into one, in one streaming pass, every tensor accounted for.

    \b
    weightops merge a.safetensors b.safetensors --alpha 0.7                0.3·a + 0.7·b
    weightops merge a.safetensors b.safetensors --base sd15.safetensors    a + (b - sd15)

    The VAE is the first model's, text encoders are merged, and the first model's metadata and dtypes are kept,
    unless you say otherwise.
    """
    with render.progress("merging", quiet=quiet or as_json) as on_progress:
        report = merge(
            *models, normalize=not no_normalize, parameters=options.settings_of(settings), verify=verify,
            on_progress=on_progress, **rest,
        )  # fmt: skip
    render.finished(report, as_json=as_json, quiet=quiet, verbose=verbose)
