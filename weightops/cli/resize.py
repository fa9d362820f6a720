"""The command `resize`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from weightops.cli import options, render
from weightops.cli.main import print_error
from weightops.errors import OutputError, UsageError, WeightopsError
from weightops.lora.settings import FILE, plain
from weightops.ops.resize import resize, rules_of

# sd-scripts' names of what `--rank` says.
_METHODS = {"sv_ratio": "ratio", "sv_cumulative": "cumulative", "sv_fro": "fro"}


@click.command("resize", short_help="Fewer ranks for a LoRA.")
@click.argument("files", metavar="LORA…", nargs=-1, required=True)
@click.option(
    "--rank", metavar="R",
    help="A number, or energy:0.98, error:0.02, size:32MiB, fro:0.99, ratio:10, cumulative:0.95, knee.",
)  # fmt: skip
@click.option("--conv-rank", metavar="R", help="Of convolutions larger than 1x1.  [default: as --rank]")
@click.option("--max-rank", type=click.IntRange(1), metavar="N", help="The most that a rule gives a module.")
@click.option("--max-conv-rank", type=click.IntRange(1), metavar="N",
              help="The most that it gives a convolution.  [default: as --max-rank]")  # fmt: skip
@click.option("--all-kernels", is_flag=True, help="--conv-rank is for 1x1 convolutions, too, as in sd-scripts.")
@click.option(
    "--base", metavar="CHECKPOINT",
    help="The model it is for: makes DoRA, OFT … plain LoRA, and size: and error: weigh by its weights.",
)  # fmt: skip
@click.option("--plan", is_flag=True, help="Write nothing; say what each size would cost in error.")
@click.option("--plot", metavar="FILE.png", help="With --plan: the same as a picture.")
@click.option("--new_rank", type=click.IntRange(1), metavar="N", help="sd-scripts' word for --rank, or --max-rank.")
@click.option("--new_conv_rank", type=click.IntRange(1), metavar="N", help="The same of convolutions, 1x1 ones too.")
@click.option("--dynamic_method", type=click.Choice(list(_METHODS)), help="sd-scripts' ratio:, cumulative:, fro:.")
@click.option("--dynamic_param", type=float, metavar="X", help="What stands behind that colon.")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Of what has no exact factors.")
@options.writing_factors
@options.running_whole
@options.speaking
def command(
    files: tuple[str, ...], output: str | None, plot: str | None, new_rank: int | None, new_conv_rank: int | None,
    dynamic_method: str | None, dynamic_param: float | None, as_json: bool, quiet: bool, verbose: bool, **rest: Any,
) -> None:  # fmt: skip
    """A LoRA of fewer ranks: each module at the best approximation that its rank allows, at the same strength.

    \b
    weightops resize style.safetensors --rank 32
    weightops resize *.safetensors --rank energy:0.98 -o small/

    Any family goes in: LoHa and LoKr become LoRA from their exact products. size: and error: are of the whole file,
    and give each module the ranks that tell most; the other rules are of each module. What has fewer ranks keeps its
    own. With several files, -o is a folder, and so is a name that ends in a slash.
    """
    _translate(rest, new_rank, new_conv_rank, dynamic_method, dynamic_param)
    if plot is not None and not rest["plan"]:
        raise UsageError("--plot", "draws what --plan finds", "resize LORA --plan --plot curve.png")
    if plot is not None and len(files) > 1:
        raise UsageError("--plot", f"draws one file, found {len(files)}")
    if rest["plan"]:
        words = ("rank", "conv_rank", "max_rank", "max_conv_rank", "dry_run", "verify")
        said = {"output": output} | {word: rest[word] for word in words}
        for word in (word for word, value in said.items() if value not in (None, False)):
            what = "says nothing with --plan, which tries all sizes and writes none"
            raise UsageError(f"--{word.replace('_', '-')}", what)
    if plot is not None:
        from weightops.cli.plots import check_plot

        check_plot(Path(plot), force=rest["force"])
    # Once, and not for each file.
    rules_of(rest["rank"], rest["conv_rank"], rest["max_rank"], rest["max_conv_rank"], plan=rest["plan"])
    stems = [Path(file).stem for file in files]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice is not None:
        raise UsageError("resize", f"found two files called {twice!r}, whose results would have one name", "one by one")
    folder = _folder(output) if output is not None and (len(files) > 1 or _names_a_folder(output)) else None
    documents: list[Any] = []
    code = 0
    for file in files:
        name = output if folder is None else None
        try:
            with render.progress("resizing", quiet=quiet or as_json) as on_progress:
                report = resize(file, output=name, folder=folder, on_progress=on_progress, **rest)
        except WeightopsError as e:
            if len(files) == 1:
                raise
            # With several files one bad one does not keep the others.
            print_error(str(e), e.hint)
            documents.append({"path": file, "error": str(e)})
            code = max(code, e.exit_code)
            continue
        documents.append(report.to_dict())
        if not as_json:
            render.finished(report, as_json=False, quiet=quiet, verbose=verbose)
        if plot is not None:
            from weightops.cli.plots import size_curve

            size_curve(report.details["plan"], Path(plot), title=Path(file).name, force=rest["force"])
            if not as_json and not quiet:
                render.wrote(plot, Path(plot).stat().st_size)
    if as_json:
        render.emit_json(documents[0] if len(files) == 1 else documents)
    if code:
        sys.exit(code)


def _translate(
    rest: dict[str, Any], new_rank: int | None, new_conv_rank: int | None, method: str | None, param: float | None
) -> None:
    """sd-scripts' words into ours: a rank, or with a method the most that it gives."""
    if (method is None) != (param is None):
        raise UsageError("--dynamic_method", "stands with --dynamic_param, and it with that")
    words = [("--new_rank", new_rank), ("--new_conv_rank", new_conv_rank), ("--dynamic_method", method)]
    given = [word for word, value in words if value is not None]
    if not given:
        return
    ours = [
        f"--{w.replace('_', '-')}" for w in ("rank", "conv_rank", "max_rank", "max_conv_rank") if rest[w] is not None
    ]
    if ours:
        raise UsageError(given[0], f"says what {ours[0]} says, and both are there", "use the words of one tool")
    if method is not None:
        rest |= {
            "rank": f"{_METHODS[method]}:{plain(param or 0)}",
            "max_rank": new_rank,
            "max_conv_rank": new_conv_rank,
        }
    elif new_rank is None:
        raise UsageError("--new_conv_rank", "stands with --new_rank")
    else:
        rest |= {"rank": new_rank, "conv_rank": new_conv_rank}
    if new_conv_rank is not None:
        rest["all_kernels"] = True


def _names_a_folder(output: str) -> bool:
    """Does -o of a single file name the folder for it? One with settings in it is a LoRA itself."""
    return output.endswith(("/", os.sep)) or (Path(output).is_dir() and not (Path(output) / FILE).exists())


def _folder(output: str) -> Path:
    folder = Path(output)
    if folder.suffix.lower() == ".safetensors":
        raise UsageError("--output", f"found {output!r} for several files, expected a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(output, f"cannot be made: {e.strerror}") from None
    return folder
