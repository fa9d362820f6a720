"""The command `train`, and its two kinds of training."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from weightops.cli import options, render
from weightops.diffusion.lora_modules import INITS
from weightops.diffusion.objectives import KINDS, WEIGHTINGS
from weightops.diffusion.processes import is_first
from weightops.diffusion.train import train
from weightops.diffusion.training_words import DREAMBOOTH, DTYPES, MIXED, PRESETS, SCHEDULES, TEXT_TO_IMAGE
from weightops.errors import UsageError, printable
from weightops.lora.dialects import DIALECTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightops.diffusion.train import TrainReport
    from weightops.diffusion.training_run import Progress


@click.group("train", short_help="A LoRA learnt from images.")
def command() -> None:
    """A LoRA learnt from images, on any model that weightops reads.

    \b
    weightops train text-to-image photos --model sd15.safetensors --preset style -o style.safetensors
    weightops train dreambooth cat --instance-prompt "a photo of sks cat" --model merged.yaml -o cat.safetensors

    Beside FILE.safetensors stands the folder FILE-train, with checkpoints, samples, loss.csv and loss.png. --resume
    goes on from its newest checkpoint, and ends with the same bytes as a run that was never stopped; Ctrl-C leaves
    one. On several GPUs: torchrun --nproc_per_node 2 -m weightops.cli train …
    """


def _ends(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(word.strip() for word in value.split(",") if word.strip())


def _settings(_ctx: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for word in value:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise UsageError("--optimizer-set", f"found {word!r}, expected NAME=VALUE")
        found[name.replace("-", "_")] = text
    return found


_base = options.together(
    click.option("--model", metavar="MODEL", required=True,
                 help="A file, a diffusers folder, hf://owner/name, or a recipe (.yaml), merged in memory."),
    click.option("--vae", metavar="FILE", help="Another VAE in place of the model's own."),
    click.option("--like", metavar="FOLDER", help="Take configs and tokenizers of this diffusers folder."),
    click.option("-o", "--output", metavar="FILE",
                 help="Where to write. Without it, a name made of the folder's, in this folder."),
    click.option("--dialect", type=click.Choice(list(DIALECTS)), default="kohya", show_default=True,
                 help="Whose names the LoRA has."),
    click.option("--preset", type=click.Choice(list(PRESETS)),
                 help="Rank, alpha, steps, batch, rate, 1024 pixels and flips of a study; words beside it win."),
)  # fmt: skip
_lora = options.together(
    click.option("--rank", type=int, metavar="R", help="Of the LoRA.  [default: 4]"),
    click.option("--alpha", type=float, metavar="A",
                 help="The LoRA acts at A/R of its strength.  [default: the rank]"),
    click.option("--conv-rank", type=int, metavar="R", help="Convolutions larger than 1x1, too, at this rank."),
    click.option("--conv-alpha", type=float, metavar="A", help="Of convolutions.  [default: their rank]"),
    click.option("--targets", metavar="NAME,…", callback=_ends,
                 help="Ends of the modules' names.  [default: attention, to_q,to_k,to_v,to_out.0]"),
    click.option("--train-text-encoder", is_flag=True, help="A LoRA on the CLIP text encoders, too."),
    click.option("--text-encoder-lr", type=float, metavar="X", help="The rate of theirs.  [default: as --lr]"),
    click.option("--dora", is_flag=True, help="Magnitudes and directions apart (DoRA)."),
    click.option("--init", type=click.Choice(INITS), default="gaussian", show_default=True,
                 help="Of the down factors; up factors begin at zero."),
)  # fmt: skip
_course = options.together(
    click.option("--steps", type=int, metavar="N", help="How many times the LoRA is changed.  [default: 600]"),
    click.option("--epochs", type=int, metavar="N", help="The same, in turns of all images."),
    click.option("--batch", type=int, metavar="N", help="Images at once, in each process.  [default: 1]"),
    click.option("--accumulate", type=int, metavar="N", default=1, show_default=True, help="Batches for one step."),
    click.option("--lr", type=float, metavar="X", help="Learning rate.  [default: 0.0001]"),
    click.option("--schedule", type=click.Choice(SCHEDULES), default="constant", show_default=True,
                 help="Of the learning rate, as diffusers has it."),
    click.option("--warmup", type=int, metavar="N", default=0, show_default=True,
                 help="Steps in which the learning rate grows."),
    click.option("--optimizer", metavar="NAME", default="adamw", show_default=True,
                 help="adamw, or a class by its import path: bitsandbytes.optim.AdamW8bit."),
    click.option("--optimizer-set", metavar="NAME=VALUE", multiple=True, callback=_settings,
                 help="A setting of that class."),
    click.option("--betas", type=options.Numbers(), metavar="X,Y", help="Of AdamW and its kind.  [default: 0.9,0.999]"),
    click.option("--eps", type=float, metavar="X", help="Of AdamW and its kind.  [default: 1e-08]"),
    click.option("--weight-decay", type=float, metavar="X", help="Of AdamW and its kind.  [default: 0.01]"),
    click.option("--clip", type=float, metavar="X", default=1.0, show_default=True,
                 help="The longest that a gradient may be; 0: any."),
    click.option("--snr-gamma", type=float, metavar="X", help="Min-SNR weights of the loss: 5 is usual."),
    click.option("--noise-offset", type=float, metavar="X", default=0.0, show_default=True,
                 help="Noise of a whole channel, for darker and brighter images: 0.05."),
    click.option("--prediction", type=click.Choice(KINDS), help="What the model predicts.  [default: what it says]"),
    click.option("--shift", type=float, metavar="X", help="Of flow matching.  [default: the scheduler's]"),
    click.option("--weighting", type=click.Choice(WEIGHTINGS),
                 help="How timesteps of flow matching are drawn.  [default: logit_normal]"),
    click.option("--seed", type=int, metavar="N", default=42, show_default=True, help="Of everything that is drawn."),
)  # fmt: skip
_images = options.together(
    click.option("--resolution", metavar="PIXELS",
                 help="512, or WIDTHxHEIGHT.  [default: the architecture's, 512, 768 or 1024]"),
    click.option("--center-crop", is_flag=True, help="The middle of each image, and not a part that is drawn."),
    click.option("--flip/--no-flip", default=None, help="Half of the images mirrored.  [default: no]"),
    click.option("--cache", metavar="DIR", help="Keep latents and embeddings here, for other runs on the same images."),
)  # fmt: skip
_running = options.together(
    click.option("--mixed-precision", type=click.Choice(MIXED), default="no", show_default=True,
                 help="Compute in 16 bits; the LoRA itself stays in 32."),
    click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True,
                 help="Of the frozen weights; auto: as --mixed-precision, else fp32."),
    click.option("--gradient-checkpointing", is_flag=True, help="Compute twice what would take much memory."),
    options.device,
    click.option("--sample-prompt", metavar="TEXT", multiple=True, help="Make an image of this, at first and last."),
    click.option("--sample-every", type=int, metavar="N", help="And every so many steps."),
    click.option("--sample-steps", type=int, metavar="N", default=25, show_default=True,
                 help="Steps of sampling, of these images and those of a class."),
    click.option("--checkpoint-every", type=int, metavar="N", help="Steps.  [default: at the end, and on Ctrl-C]"),
    click.option("--keep-checkpoints", type=int, metavar="N", help="The newest ones.  [default: all]"),
    click.option("--resume", is_flag=True, help="Go on from the newest checkpoint beside the output."),
    click.option("--log-every", type=int, metavar="N", default=1, show_default=True, help="Steps, in loss.csv."),
    click.option("--dry-run", is_flag=True, help="Say what would be trained, from headers alone."),
    options.force,
)  # fmt: skip
_all = options.together(_lora, _course, _images, _running, options.speaking)


@command.command("text-to-image", short_help="Images and their captions.")
@click.argument("folder", metavar="DIR")
@_base
@_all
def text_to_image(folder: str, as_json: bool, quiet: bool, verbose: bool, **rest: Any) -> None:
    """A LoRA learnt from images and their captions: a style, or whatever the captions do not say.

    \b
    weightops train text-to-image photos --model sd15.safetensors --preset style -o style.safetensors
    weightops train text-to-image photos --model sdxl.safetensors --rank 16 --epochs 20 --mixed-precision bf16

    DIR holds images, and their captions in metadata.csv, metadata.jsonl or .txt files: `weightops caption` writes them.
    """
    _run(TEXT_TO_IMAGE, folder, as_json=as_json, quiet=quiet, verbose=verbose, **rest)


@command.command("dreambooth", short_help="A subject, by one prompt.")
@click.argument("folder", metavar="DIR")
@click.option("--instance-prompt", metavar="TEXT", required=True, help="For all images: a photo of sks cat.")
@click.option("--class-prompt", metavar="TEXT", help="Keep what the model makes of this: a photo of a cat.")
@click.option("--class-folder", metavar="DIR", help="Images of that.  [default: one beside the checkpoints]")
@click.option("--class-images", type=int, metavar="N", help="So many; the model makes what is missing.  [default: 100]")
@click.option("--prior-weight", type=float, metavar="X", default=1.0, show_default=True, help="Of their loss.")
@_base
@_all
def dreambooth(folder: str, as_json: bool, quiet: bool, verbose: bool, **rest: Any) -> None:
    """A LoRA learnt from a few images of one subject, under one prompt for all of them.

    \b
    weightops train dreambooth cat --instance-prompt "a photo of sks cat" --model sd15.safetensors -o cat.safetensors
    weightops train dreambooth cat --instance-prompt "sks cat" --class-prompt "a cat" --model merged.yaml --steps 800
    """
    _run(DREAMBOOTH, folder, as_json=as_json, quiet=quiet, verbose=verbose, **rest)


def _run(kind: str, folder: str, *, as_json: bool, quiet: bool, verbose: bool, **rest: Any) -> None:
    with _bar(quiet=quiet or as_json or not is_first()) as on_progress:
        report = train(kind, folder, on_progress=on_progress, **rest)
    if report.process:
        return  # the first of several speaks for all
    if as_json:
        render.emit_json(report.to_dict())
        return
    for text in report.warnings:
        render.print_warning(text)
    if not quiet:
        _said(report, verbose=verbose)


@contextlib.contextmanager
def _bar(*, quiet: bool) -> Iterator[Progress]:
    """What is going on, how long it will take yet, and the loss: on stderr, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield lambda what, done, total, loss: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}", markup=False), console=render.console(error=True), transient=True,
    )  # fmt: skip
    tasks: dict[str, Any] = {}
    with bar:

        def show(what: str, done: int, total: int, loss: float | None) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[what] = bar.add_task(what, total=total, loss="")
            said = "" if loss is None else f"loss {loss:.4f}"
            bar.update(tasks[what], completed=done, total=total, loss=said)

        yield show


def _said(report: TrainReport, *, verbose: bool) -> None:
    """The report for people."""
    out = render.console()

    def line(text: str) -> None:
        out.print(printable(text), soft_wrap=True)

    settings = report.settings
    images = _counted(report.images, "image")
    images += f" and {report.class_images:,} of the class" if report.class_images else ""
    what = f"{_counted(report.modules, 'module')}, {report.parameters:,} parameters, rank {settings['rank']}, "
    out.print(printable(f"{report.kind}, {images}: {what}alpha {settings['alpha']:g}"), style="bold", soft_wrap=True)
    epochs = f"{report.epochs:.4g} epoch{'s' * (report.epochs != 1)} of {report.steps_per_epoch:,}"
    together = f", by {report.processes} processes" if report.processes > 1 else ""
    width, height = settings["resolution"][1], settings["resolution"][0]
    line(f"{_counted(report.steps, 'step')}, {epochs}{together}; {width} × {height} pixels")
    if verbose:
        for name, value in settings.items():
            if value not in (None, {}, []):
                line(f"  {name.replace('_', ' '):<22}{value}")
    if report.dry_run:
        frozen, trained = report.memory["frozen"], report.memory["trained"]
        known = f"{render.size(frozen)} for the model's weights, {render.size(trained)} for the LoRA and its optimizer"
        line(f"memory: {known}; what a step computes comes on top")
        line(f"would write {report.output}, and {report.folder} beside it")
        return
    if report.loss is not None and report.first_loss is not None:
        on = f", going on from step {report.resumed_at:,}" if report.resumed_at else ""
        line(f"loss {report.first_loss:.4f} at first, {report.loss:.4f} in the mean of the last steps{on}")
    if report.class_images_made:
        line(f"the model made {report.class_images_made:,} of the images of the class")
    out.print()
    for entry in report.inputs:
        line(f"read   {entry['path']}" + (f"  {entry['hash']}" if verbose else ""))
    render.wrote(report.output, report.bytes_written)
    beside = f"{_counted(len(report.checkpoints), 'checkpoint')}, {_counted(len(report.samples), 'sample')}"
    line(f"       beside it {report.folder}: {beside}")
    peak = f", peak memory {report.peak_memory_bytes / 2**20:,.0f} MiB" if report.peak_memory_bytes else ""
    out.print(f"       {report.seconds:.1f} s on {report.device}{peak}", style="dim")


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
