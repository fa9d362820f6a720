"""The command `merge`."""

from __future__ import annotations

from typing import Any

import click

from weightops.cli import options, render
from weightops.errors import UsageError
from weightops.merging.method import METHODS
from weightops.ops.merge import merge, recipe_of
from weightops.ops.merge_grid import read_grid


def _list_methods(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        render.methods((name, ", ".join(m.models), m.parameters, m.summary) for name, m in METHODS)
        ctx.exit()


# What a recipe file says itself.
_OF_THE_RECIPE = (
    "models", "alpha", "weights", "base", "method", "settings", "blocks", "statistics", "ema", "rebasin", "seed", "vae",
    "text_encoder", "dtype", "drop", "on_mismatch", "no_normalize",
)  # fmt: skip


def _check_alone(ctx: click.Context) -> None:
    """Refuse words beside --recipe that it says itself: neither would be sure to count."""
    source = click.core.ParameterSource.COMMANDLINE
    for param in ctx.command.params:
        if param.name in _OF_THE_RECIPE and ctx.get_parameter_source(param.name) is source:
            said = param.opts[-1] if isinstance(param, click.Option) else "MODEL"
            raise UsageError("--recipe", f"found {said} beside it", "say it in the recipe")


@click.command("merge", short_help="Two or more models into one.")
@click.argument("models", metavar="[MODEL…]", nargs=-1)
@click.option("--alpha", type=float, metavar="X",
              help="Two models: (1-X)·A + X·B; with --base C, A + X·(B - C).  [default: 0.5; 1]")  # fmt: skip
@click.option("--weights", type=options.Numbers(), help="One weight per model, normalised to a sum of 1.")
@click.option("--no-normalize", is_flag=True, help="Take --weights as they are, also in other methods that normalise.")
@click.option("--base", metavar="FILE", help="What the models were made of: differences from it are merged.")
@click.option("--method", metavar="NAME", help="Another way to merge; --list-methods shows them.")
@click.option("--set", "settings", metavar="NAME=VALUE", multiple=True, help="A parameter of the method.")
@click.option("--list-methods", is_flag=True, is_eager=True, expose_value=False, callback=_list_methods,
              help="Show the methods and leave.")  # fmt: skip
@click.option("--blocks", metavar="SPEC",
              help="Other numbers for --alpha in blocks or layers: IN04-IN08=0.2,attn.q=0, a preset …")  # fmt: skip
@click.option("--statistics", metavar="FILE", multiple=True,
              help="For fisher and regmean: of each model in turn, a file with its statistics.")  # fmt: skip
@click.option("--ema", is_flag=True, help="Take the averages that training kept (model_ema.*) as the weights.")
@click.option("--rebasin", is_flag=True,
              help="First bring the other models' channels into the order of the first's (git re-basin).")  # fmt: skip
@click.option("--recipe", metavar="FILE", help="A tree of models, LoRAs and methods, in YAML, in place of all that.")
@click.option("--print-recipe", is_flag=True, help="Show these words as such a recipe, and leave.")
@click.option(
    "--grid",
    "grids",
    metavar="NAME=LO..HI:N",
    multiple=True,
    help="A folder of variants, from one reading: N values of alpha or a setting, or NAME=X,Y,…",
)
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Of methods that draw.")
@click.option("--vae", metavar="N|merge|FILE", default="1", show_default=True,
              help="Whose VAE is kept. A merged VAE spoils colours; a file that is only a VAE is merged.")  # fmt: skip
@click.option("--text-encoder", metavar="N|merge", default="merge", show_default=True, help="Whose text encoders.")
@options.drop
@click.option("--on-mismatch", type=click.Choice(["error", "keep-first"]), default="error", show_default=True,
              help="Tensors of one name and different shapes.")  # fmt: skip
@options.allow_nonfinite
@options.writing
@options.running_whole
@options.speaking
@click.pass_context
def command(
    ctx: click.Context, /, models: tuple[str, ...], settings: tuple[str, ...], grids: tuple[str, ...],
    no_normalize: bool, print_recipe: bool, recipe: str | None, verify: bool, as_json: bool, quiet: bool,
    verbose: bool, **rest: Any,
) -> None:  # fmt: skip
    """Two or more models into one, in one streaming pass, every tensor accounted for.

    \b
    weightops merge a.safetensors b.safetensors --alpha 0.7                0.3·a + 0.7·b
    weightops merge a.safetensors b.safetensors --base sd15.safetensors    a + (b - sd15)

    The VAE is the first model's, text encoders are merged, and the first model's metadata and dtypes are kept,
    unless you say otherwise.
    """
    if recipe is not None:
        _check_alone(ctx)
    said: dict[str, Any] = {"parameters": options.settings_of(settings), "normalize": not no_normalize}
    if print_recipe:
        if grids:
            raise UsageError("--print-recipe", "found --grid beside it, expected one merge")
        from weightops.ops.recipe_file import recipe_text

        asked = {key: rest[key] for key in _OF_THE_RECIPE if key in rest}
        click.echo(recipe_text(recipe_of(models, **said, **asked)), nl=False)
        return
    grid = read_grid(grids) if grids else None
    with render.progress("merging", quiet=quiet or as_json) as on_progress:
        report = merge(*models, recipe=recipe, grid=grid, verify=verify, on_progress=on_progress, **said, **rest)
    render.finished(report, as_json=as_json, quiet=quiet, verbose=verbose)
