"""The command `synth evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from weightops.cli import options, render
from weightops.diffusion.objectives import KINDS
from weightops.errors import UsageError, printable, quote
from weightops.synthesis.evaluate import evaluate
from weightops.synthesis.evaluation_inputs import METHODS
from weightops.synthesis.fit_images import L2, LR, MODEL_DTYPES, STEPS

if TYPE_CHECKING:
    from rich.console import Console

    from weightops.diffusion.tables import Table
    from weightops.synthesis.evaluate import EvaluateReport


class Counts(click.ParamType[tuple[int, ...]]):
    """Whole numbers separated by commas: 8,16,64."""

    name = "n,m,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(word) for word in value.split(","))
        except ValueError:
            option = param.opts[-1] if param is not None else ""
            raise UsageError(option, f"found {quote(value)}, expected whole numbers such as 8,16,64") from None


def _words(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in value.split(",") if word.strip())


_inputs = options.together(
    click.option("--model", metavar="MODEL", help="The LoRAs' base: what they do is measured, and not weights alone."),
    click.option("--vae", metavar="FILE", help="Another VAE in place of the model's own."),
    click.option("--like", metavar="FOLDER", help="Take configs and tokenizers of this diffusers folder."),
    click.option("--images", metavar="DIR", help="A folder for each LoRA, of images that it was not trained on."),
    click.option("--few", metavar="DIR", help="A folder for each LoRA, of images to learn it from."),
    click.option("--embedder", metavar="FILE", help="What makes conditions of images: ONNX, a CLIP folder, a map."),
    click.option("--prompt", metavar="TEXT", help="For all images, in place of their captions."),
    click.option("--resolution", metavar="PIXELS", help="512, or WIDTHxHEIGHT.  [default: the model's]"),
    click.option("--prediction", type=click.Choice(KINDS), help="What the model predicts.  [default: what it says]"),
)
_asked = options.together(
    click.option("--methods", metavar="NAME,…", default=",".join(METHODS), callback=_words,
                 help=f"Of {', '.join(METHODS)}.  [default: all]"),
    click.option("--components", type=Counts(), default="8,16,64,128", show_default=True, help="Of PCA and of ΔW."),
    click.option("--latents", type=Counts(), default="8,16", show_default=True, help="Of VAEs; as many components."),
    click.option("--betas", type=options.Numbers(), default="1,0.01", show_default=True, help="Of VAEs."),
    click.option("--conditioned", type=Counts(), default="16,64", show_default=True,
                 help="Components that are predicted from a condition, or learnt from images."),
    click.option("--seeds", type=int, metavar="N", default=3, show_default=True, help="Each with its own split."),
    click.option("--held-out", type=float, metavar="X", default=0.2, show_default=True, help="A share, or so many."),
    click.option("--measured", type=int, metavar="N", default=64, show_default=True,
                 help="Of those that are held out, at most."),
    click.option("--pairs", type=int, metavar="N", default=4, show_default=True,
                 help="Timesteps, each with a noise, of each image."),
    click.option("--batch", type=int, metavar="N", default=128, show_default=True, help="Samples at once."),
    click.option("--vae-steps", type=int, metavar="N", default=1000, show_default=True, help="Of a VAE."),
    click.option("--diffusion-steps", type=int, metavar="N", default=2000, show_default=True, help="Of a diffusion."),
)  # fmt: skip
_learning = options.together(
    click.option("--steps", type=int, metavar="N", default=STEPS, show_default=True, help="Of learning from images."),
    click.option("--lr", type=float, metavar="X", default=LR, show_default=True, help="Of coefficients."),
    click.option("--l2", type=float, metavar="X", default=L2, show_default=True, help="Their prior."),
    click.option("--few-images", type=int, metavar="N", default=4, show_default=True, help="To learn from."),
    click.option("--learners", type=int, metavar="N", default=16, show_default=True, help="LoRAs that are learnt."),
    click.option("--plain-lrs", type=options.Numbers(), default="0.005,0.01,0.02,0.04", show_default=True,
                 help="Of plain training, the best of which stands in the table."),
    click.option("--generate", type=int, metavar="N", default=0, show_default=True,
                 help="Images of each LoRA, compared with the condition by --embedder."),
    click.option("--shown", type=int, metavar="N", default=16, show_default=True, help="LoRAs that make images."),
    click.option("--strengths", type=options.Numbers(), default="1", show_default=True,
                 help="At which they make images; what is predicted is often weaker than what is trained."),
    click.option("--sampling-steps", type=int, metavar="N", default=25, show_default=True, help="Of these images."),
    click.option("--guidance", type=float, metavar="X", default=1.0, show_default=True, help="Of these images."),
)  # fmt: skip


@click.command("evaluate", short_help="What a space can do, on held-out LoRAs.")
@click.argument("spaces", metavar="SPACE...", nargs=-1, required=True)
@_inputs
@_asked
@_learning
@click.option("-o", "--output", metavar="DIR", help="Where to write; an interrupted evaluation goes on there.")
@click.option("--memory", type=options.Size(), default="2GiB", show_default=True, help="Bytes of a fit.")
@click.option("--model-dtype", type=click.Choice(MODEL_DTYPES), default="fp32", show_default=True,
              help="Of the frozen weights.")  # fmt: skip
@options.device
@options.force
@click.option("--dry-run", is_flag=True, help="Say what would be measured, and what not.")
@options.speaking
def command(as_json: bool, quiet: bool, verbose: bool, **rest: Any) -> None:
    """What a space of LoRAs can and cannot do, on LoRAs that it was not fitted on, each number beside its baseline.

    \b
    weightops synth evaluate space --model base.safetensors --images held-out --few images -o evaluation
    weightops synth evaluate aligned raw --methods pca,delta --components 8,64

    Everything is fitted anew for each seed, with a split of its own, in memory; ± is the deviation over the seeds. The
    first SPACE is asked everything; others, of the same LoRAs in other forms, are compared with it.

    \b
    reconstruction   components of rows and of ΔW: explained variance with that of noise beside it, and the gap
    latents          components against VAEs
    a condition      of a space with conditions: ridge, diffusion, nearest neighbour, the mean; copies; --generate
    a few images     --few: coefficients learnt from images against plain training at its best rate

    With --model and --images the gap is measured: 0 is the model alone, 1 the LoRA that was really trained. What
    cannot be measured is named, with what it needs. The folder holds tables, plots, and a page of all of it.
    """
    with render.counting("measuring", quiet=quiet or as_json) as on_progress:
        report = evaluate(on_progress=on_progress, **rest)
    if as_json:
        render.emit_json(report.to_dict())
        return
    if not quiet:
        _draw(report, verbose=verbose)
    for text in report.warnings:
        render.print_warning(text)


def _draw(report: EvaluateReport, *, verbose: bool) -> None:
    out = render.console()
    for finding in report.findings:
        for table in finding.tables.values():
            _table(out, table)
        if verbose:
            out.print(printable(finding.says), style="dim")
    if report.left_out:
        out.print("\nleft out", style="bold")
        drawn = render.table("part", "why")
        for left in report.left_out:
            drawn.add_row(left.part, printable(left.needs))
        out.print(drawn)
    out.print()
    if report.dry_run:
        out.print(f"would measure {report.cells:,} pieces, and write {printable(report.output)}", soft_wrap=True)
        return
    taken = f", {report.taken:,} of them measured before" if report.taken else ""
    out.print(f"{report.cells:,} pieces{taken}", soft_wrap=True)
    render.wrote(report.output, report.bytes_written)
    peak = f", peak memory {report.peak_memory_bytes / 2**20:,.0f} MiB" if report.peak_memory_bytes else ""
    device = f" on {report.device}" if report.device else ""
    out.print(f"       its page is evaluation.html; {report.seconds:.1f} s{device}{peak}", style="dim")


def _table(out: Console, table: Table) -> None:
    out.print()
    out.print(printable(table.title), style="bold", soft_wrap=True)
    right = tuple(place for place, numeric in enumerate(table.numeric) if numeric)
    drawn = render.table(*(printable(column) for column in table.columns), right=right)
    for row in table.drawn():
        drawn.add_row(*row)
    out.print(drawn)
    if table.note:
        out.print(printable(table.note), style="dim")
