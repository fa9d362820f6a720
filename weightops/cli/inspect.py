"""The command `inspect`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from weightops.cli import options, render
from weightops.cli.inspection import inspection, inspections
from weightops.cli.main import print_error
from weightops.errors import UsageError, WeightopsError
from weightops.ops.inspect import inspect


@click.command("inspect", short_help="What is this file?")
@click.argument("files", metavar="FILE…", nargs=-1)
@click.option(
    "--tensors", metavar="GLOB", is_flag=False, flag_value="*", help="List the tensors, or those named like GLOB."
)
@click.option("--stats", is_flag=True, help="Norms, extremes, NaN and Inf, in one pass over the file.")
@click.option("--hash", "hashes", is_flag=True, help="SHA-256, AutoV2, and the hash of the tensor data (AutoV3).")
@click.option("--spectrum", is_flag=True, help="Of an adapter: singular values, the energy of ranks, norms.")
@click.option("--base", metavar="CHECKPOINT", help="With --spectrum: the model it is for; sets norms beside its own.")
@click.option("--plot", metavar="FILE.png", help="With --spectrum: the same as a picture; .svg and .pdf, too.")
@click.option("--force", is_flag=True, help="Replace an existing picture.")
@options.together(options.memory_whole, options.threads)
@options.together(options.as_json, options.verbose)
def command(
    files: tuple[str, ...], tensors: str | None, plot: str | None, force: bool, as_json: bool, verbose: bool,
    **rest: Any,
) -> None:  # fmt: skip
    """What is this file? Kind, architecture, components, parameters, dtypes, metadata, from its header alone.

    \b
    weightops inspect model.safetensors
    weightops inspect model.safetensors --tensors '*attn2*' --stats

    FILE is a .safetensors file, an index or a folder of shards, a diffusers folder, or a .ckpt/.pt/.pth/.bin,
    which is read without running anything in it.
    """
    if tensors is not None and Path(tensors).exists():
        raise UsageError(
            "--tensors", f"took {tensors!r} for its glob", "put --tensors after the files, or write --tensors='*'"
        )
    if not files:
        raise click.MissingParameter(param=next(p for p in command.params if p.name == "files"))
    if plot is not None:
        _check_plot(plot, files, spectrum=rest["spectrum"], force=force)
    found, documents, code = [], [], 0
    for file in files:
        try:
            with render.progress("reading", quiet=as_json or not (rest["stats"] or rest["spectrum"])) as on_progress:
                one = inspect(file, tensors=tensors, on_progress=on_progress, **rest)
        except WeightopsError as e:
            if len(files) == 1:
                raise
            # With several files one bad one does not hide the others.
            print_error(str(e), e.hint)
            documents.append({"path": file, "error": str(e)})
            code = max(code, e.exit_code)
            continue
        found.append(one)
        documents.append(one.to_dict())
    if plot is not None:
        from weightops.cli.plots import spectrum

        spectrum(documents[0], Path(plot), title=Path(found[0].path).name, force=force)
    if as_json:
        render.emit_json(documents[0] if len(files) == 1 else documents)
    elif len(found) == 1:
        inspection(found[0], verbose=verbose)
        if plot is not None:
            render.wrote(plot, Path(plot).stat().st_size)
    elif found and (tensors is not None or verbose or any(rest[name] for name in ("stats", "hashes", "spectrum"))):
        for one in found:
            inspection(one, verbose=verbose)
            click.echo()
    elif found:
        inspections(found)
    if code:
        sys.exit(code)


def _check_plot(plot: str, files: tuple[str, ...], *, spectrum: bool, force: bool) -> None:
    if not spectrum:
        raise UsageError("--plot", "draws what --spectrum finds", "inspect LORA --spectrum --plot spectrum.png")
    if len(files) > 1:
        raise UsageError("--plot", f"draws one file, found {len(files)}")
    from weightops.cli.plots import check_plot

    check_plot(Path(plot), force=force)
