"""The command `synth fit`, and its kinds of models."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightops.cli import options, render
from weightops.diffusion.processes import is_first
from weightops.errors import Interrupted, UsageError, printable
from weightops.synthesis.denoiser import PREDICTIONS
from weightops.synthesis.denoiser_layers import CONDITIONINGS
from weightops.synthesis.fit import fit_pca
from weightops.synthesis.fitted import GEOMETRIES
from weightops.synthesis.learning import fit_diffusion, fit_vae
from weightops.synthesis.vae import LAYERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from weightops.synthesis.fit_report import FitReport
    from weightops.synthesis.learning import LearnReport


@click.group("fit", short_help="PCA, a VAE or diffusion of a space.")
def command() -> None:
    """Learn a space of LoRAs, as components, an autoencoder or diffusion, with the baselines beside each.

    \b
    weightops synth fit pca space
    weightops synth fit diffusion space --latents-of pca

    On several processes or machines: torchrun --nproc_per_node 2 -m weightops.cli synth fit …; each reads its share.
    """


def _held_out(_ctx: click.Context, _param: click.Parameter, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        expected = "a share below 1, such as 0.2, or a whole number of LoRAs"
        raise UsageError("--held-out", f"found {value!r}, expected {expected}") from None


def _of(function: Callable[..., Any], name: str) -> dict[str, Any]:
    """The default of a verb's word, and that it is shown where it is a value."""
    found = inspect.signature(function).parameters[name].default
    return {"default": found, "show_default": found is not None}


_split = options.together(
    click.option("--held-out", metavar="SHARE", default="0.2", show_default=True, callback=_held_out,
                 help="Of the LoRAs, or so many: nothing is learnt from them."),
    click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Of everything that is drawn."),
    click.option("--geometry", type=click.Choice(GEOMETRIES), default="rows", show_default=True,
                 help="Of the rows, or of ΔW itself by inner products, which need no gauge."),
)  # fmt: skip
_running = options.together(
    click.option("-o", "--output", metavar="FILE", help="Where to write.  [default: in the space's folder]"),
    options.device,
    click.option("--memory", type=options.Size(), metavar="SIZE", default="2GiB", show_default=True,
                 help="Bytes in flight; torch itself comes on top."),
    options.force,
    options.speaking,
)  # fmt: skip


def _descent(function: Callable[..., Any], steps: str) -> Callable[[Any], Any]:
    return options.together(
        click.option("--steps", type=int, metavar="N", help=f"How often the network is changed.  [default: {steps}]"),
        click.option("--lr", type=float, metavar="X", **_of(function, "lr"), help="Learning rate."),
        click.option("--batch", type=int, metavar="N", **_of(function, "batch"), help="LoRAs at once."),
        click.option("--weight-decay", type=float, metavar="X", **_of(function, "weight_decay"), help="In each step."),
        click.option("--dropout", type=float, metavar="X", **_of(function, "dropout"), help="Of the network."),
    )  # fmt: skip


@command.command("pca", short_help="The first components, and what they explain.")
@click.argument("space", metavar="SPACE")
@click.option("--components", type=int, metavar="K", **_of(fit_pca, "components"), help="How many.")
@_split
@click.option("--tolerance", type=float, metavar="X", **_of(fit_pca, "tolerance"),
              help="Of the sine of the angle to the true components.")  # fmt: skip
@click.option("--passes", type=int, metavar="N", **_of(fit_pca, "passes"), help="Over the rows, at most.")
@_running
def pca(space: str, as_json: bool, quiet: bool, verbose: bool, **rest: Any) -> None:
    """The first components of a space, streamed, and how much they explain, beside what noise would.

    \b
    weightops synth fit pca space
    weightops synth fit pca space --components 256 --geometry delta -o delta.safetensors

    Few LoRAs are decomposed exactly. Of many, a subspace is turned, pass by pass over the rows, until it is sure to
    the tolerance; interrupted, the same command goes on from the last pass. Explained variance is no measure of what
    LoRAs do: `weightops synth evaluate` measures that.
    """
    silent = quiet or as_json or not is_first()
    with render.counting("reading", quiet=silent) as on_progress, _kept("pca", space, rest["output"]):
        report = fit_pca(space, on_progress=on_progress, **rest)
    _finished(report, as_json=as_json, quiet=quiet, verbose=verbose)


@command.command("vae", short_help="An autoencoder of the components, linear or an MLP.")
@click.argument("space", metavar="SPACE")
@click.option("--latents", type=int, metavar="M", **_of(fit_vae, "latents"), help="How many.")
@click.option("--layers", type=click.Choice(LAYERS), **_of(fit_vae, "layers"), help="What it is made of.")
@click.option("--hidden", type=int, metavar="N", **_of(fit_vae, "hidden"), help="Width of an MLP.")
@click.option("--beta", type=float, metavar="X", **_of(fit_vae, "beta"), help="Weight of the KL divergence.")
@click.option("--components", type=int, metavar="K",
              help="How many it sees.  [default: all of pca.safetensors, or twice the latents]")  # fmt: skip
@_descent(fit_vae, "800, or 30 times each LoRA")
@_split
@_running
def vae(space: str, as_json: bool, quiet: bool, verbose: bool, **rest: Any) -> None:
    """A variational autoencoder of a space's components: few latents for each LoRA.

    \b
    weightops synth fit vae space --latents 16
    weightops synth fit vae space --layers linear --beta 1 -o linear.safetensors

    It sees the components of the space's pca.safetensors, if that is of the same LoRAs and split, or makes its own.
    Interrupted, the same command goes on. A linear one does no better than as many components.
    """
    silent = quiet or as_json or not is_first()
    with render.counting("reading", quiet=silent) as on_progress, _kept("vae", space, rest["output"]):
        report = fit_vae(space, on_progress=on_progress, **rest)
    _finished(report, as_json=as_json, quiet=quiet, verbose=verbose)


@command.command("diffusion", short_help="Diffusion in the latents, on conditions if there are any.")
@click.argument("space", metavar="SPACE")
@click.option("--latents-of", metavar="pca|vae|FILE", **_of(fit_diffusion, "latents_of"),
              help="Coefficients, or a VAE's latents; a file that was fitted to the space.")  # fmt: skip
@click.option("--components", type=int, metavar="K", help="Of the PCA.  [default: 64, or as many as there are]")
@click.option("--prediction", type=click.Choice(PREDICTIONS), **_of(fit_diffusion, "prediction"),
              help="What the network predicts: the latents, or velocity.")  # fmt: skip
@click.option("--conditioning", type=click.Choice(CONDITIONINGS), **_of(fit_diffusion, "conditioning"),
              help="How it sees a condition: as scale and shift, or as two low-rank matrices.")  # fmt: skip
@click.option("--width", type=int, metavar="N", **_of(fit_diffusion, "width"), help="Of the network.")
@click.option("--rank", type=int, metavar="R", **_of(fit_diffusion, "rank"), help="Of the matrices of adalora.")
@click.option("--drop", type=float, metavar="X", **_of(fit_diffusion, "drop"),
              help="How often it does not see the condition, for guidance.")  # fmt: skip
@_descent(fit_diffusion, "1500, or 30 times each LoRA")
@_split
@_running
def diffusion(space: str, as_json: bool, quiet: bool, verbose: bool, **rest: Any) -> None:
    """Diffusion in the latents of a space, which makes new LoRAs from nothing or from a condition.

    \b
    weightops synth fit diffusion space
    weightops synth fit diffusion space --latents-of vae --conditioning adalora --prediction v

    Ridge regression and the nearest neighbour are fitted beside it: where a condition nearly says what a LoRA is, they
    do as well. Interrupted, the same command goes on.
    """
    silent = quiet or as_json or not is_first()
    with render.counting("reading", quiet=silent) as on_progress, _kept("diffusion", space, rest["output"]):
        report = fit_diffusion(space, on_progress=on_progress, **rest)
    _finished(report, as_json=as_json, quiet=quiet, verbose=verbose)


# ------------------------------------------------------------------------------------------------ reports


@contextlib.contextmanager
def _kept(kind: str, space: str, output: str | None) -> Iterator[None]:
    """Say of a fit that is stopped where it goes on from, if that was written already."""
    try:
        yield
    except Interrupted:
        target = Path(output) if output is not None else Path(space) / f"{kind}.safetensors"
        kept = target.with_name(f"{target.stem}-unfinished.safetensors")
        if not kept.is_file():
            raise
        what = f"interrupted; where it stands is kept in {printable(str(kept))}"
        raise Interrupted(f"synth fit {kind}", what, "the same command goes on from there") from None


def _finished(report: FitReport | LearnReport, *, as_json: bool, quiet: bool, verbose: bool) -> None:
    if report.process:
        return  # the first of several speaks for all
    if as_json:
        render.emit_json(report.to_dict())
        return
    if not quiet:
        out = render.console()
        if report.kind == "pca":
            _components(out, report)  # type: ignore[arg-type]
        else:
            _network(out, report)  # type: ignore[arg-type]
        if report.left_out is not None:
            out.print(f"ridge regression on the condition leaves {report.left_out:.3f} of the latents' variance "
                      f"(leave-one-out)")  # fmt: skip
        if verbose:
            for name, value in report.to_dict().items():
                if value not in (None, {}, []):
                    out.print(printable(f"  {name.replace('_', ' '):<22}{value}"), soft_wrap=True)
        out.print()
        render.wrote(report.output, report.bytes_written)
        several = f" by {report.processes} processes" if report.processes > 1 else ""
        peak = f", peak memory {report.peak_memory_bytes / 2**20:,.0f} MiB" if report.peak_memory_bytes else ""
        out.print(f"       {report.seconds:.1f} s on {report.device}{several}{peak}", style="dim")
    for text in report.warnings:
        render.print_warning(text)


def _headed(out: Console, report: FitReport | LearnReport, what: str) -> None:
    of = "ΔW" if report.geometry == "delta" else f"rows, {report.form}"
    said = f"{what} of {report.trained:,} LoRAs ({of}); {report.held_out:,} held out"
    out.print(printable(said), style="bold", soft_wrap=True)
    out.print()


def _components(out: Console, report: FitReport) -> None:
    _headed(out, report, f"{report.components:,} components")
    drawn = render.table("explained variance", "", right=(1,))
    drawn.add_row("of the trained", f"{report.explained:.3f}")
    drawn.add_row("of pure noise of this size", f"{report.noise_null:.3f}")
    if report.explained_held_out is not None:
        drawn.add_row("of the held out", f"{report.explained_held_out:.3f}")
    out.print(drawn)
    out.print()
    if report.route == "iteration":
        on = f", going on from pass {report.resumed_at:,}" if report.resumed_at else ""
        out.print(f"{report.passes:,} passes{on}: sure to {report.reached:.1e}, the sine of the largest angle")
    else:
        out.print(f"exact, by {'inner products of the LoRAs' if report.route == 'gram' else 'their covariance'}")


def _network(out: Console, report: LearnReport) -> None:
    what = "a VAE" if report.kind == "vae" else "diffusion"
    _headed(out, report, f"{what}, {report.latents:,} latents, {report.components:,} components,")
    if report.left:
        drawn = render.table("what is left of the held out", "", right=(1,))
        for name, share in report.left.items():
            drawn.add_row(printable(name), f"{share:.3f}")
        out.print(drawn)
        out.print("0: exact; 1: no better than the mean", style="dim")
        out.print()
    losses = ", ".join(f"{name} {value:.4g}" for name, value in report.losses.items())
    on = f", going on from step {report.resumed_at:,}" if report.resumed_at else ""
    out.print(printable(f"{report.steps:,} steps{on}; {report.parameters:,} parameters; {losses}"), soft_wrap=True)
    out.print(printable(f"learnt from {report.learnt_from}"), soft_wrap=True)
