"""The command `generate`, and `generate video`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from weightops.cli import options, render
from weightops.diffusion.axes import AXES
from weightops.diffusion.generate import generate
from weightops.diffusion.schedulers import SAMPLERS
from weightops.diffusion.video import FORMATS, generate_video
from weightops.errors import UsageError, printable, quote
from weightops.ops.prediction import KINDS

if TYPE_CHECKING:
    from rich.console import Console

    from weightops.diffusion.generate import GenerateReport
    from weightops.diffusion.video import VideoReport

FEW = 12  # images that are named without -v
_WORDS = 60  # characters of a prompt in a table


class WithVideo(click.Group):
    """Options of its own, or the subcommand `video`; any other word is refused as what it is."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            hint = "a prompt stands after --prompt, a model after --model; videos are made by generate video"
            raise UsageError("generate", f"found {quote(args[0], 60)}, expected options", hint)
        return super().resolve_command(ctx, args)


_dtype = click.option(
    "--dtype", type=click.Choice(["auto", "fp32", "fp16", "bf16"]), default="auto", show_default=True,
    help="Of the model at work; auto: fp32 on the CPU, 16 bits on CUDA.",
)  # fmt: skip
_offload = click.option("--offload", is_flag=True, help="Keep only the network at work on the CUDA device.")
_dry_run = click.option("--dry-run", is_flag=True, help="Say what would be made, from headers alone.")
_replace = click.option("--force", is_flag=True, help="Replace what an earlier run wrote there; other files stay.")


@click.group("generate", cls=WithVideo, invoke_without_command=True, subcommand_metavar="[video IMAGE…]",
             short_help="Images of prompts, alone or in labelled grids.")  # fmt: skip
@click.option("--model", "models", metavar="MODEL", multiple=True,
              help="A file, a diffusers folder, hf://owner/name, or a recipe (.yaml), merged in memory.")  # fmt: skip
@click.option("--prompt", metavar="TEXT", multiple=True, help="What to make; may be said several times.")
@click.option("--prompt-2", metavar="TEXT", help="For the second text encoder.  [default: the same]")
@click.option("--negative", metavar="TEXT", help="What not to make.")
@click.option("--negative-2", metavar="TEXT", help="The same for the second text encoder.")
@click.option(
    "--prompts", metavar="FILE",
    help="Many: .txt, one in a line; .csv, .jsonl or .yaml, with the negative, seed, steps, guidance, size … of each.",
)  # fmt: skip
@click.option("--lora", "loras", metavar="FILE[:STRENGTH]", multiple=True,
              help="Of any family and dialect; may be said several times.")  # fmt: skip
@click.option("--vae", metavar="FILE", help="Another VAE in place of the model's own.")
@click.option("--like", metavar="FOLDER", help="Take configs and tokenizers of this diffusers folder.")
@click.option("--prediction", type=click.Choice(KINDS), help="What the model predicts, where its file does not say.")
@click.option(
    "--guidance", type=float, metavar="X", help="How closely to follow the prompt.  [default: the pipeline's]"
)
@click.option("--true-guidance", type=float, metavar="X",
              help="Of Flux and its like: guidance by --negative, in twice the time.")  # fmt: skip
@click.option("--steps", type=int, metavar="N", help="Of sampling.  [default: the pipeline's]")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True,
              help="Of each prompt's first image; the next ones have one more each.")  # fmt: skip
@click.option("-n", "--images", type=int, metavar="N", default=1, show_default=True, help="Of each prompt.")
@click.option("--size", metavar="WxH", help="In pixels, as 768x512.  [default: the pipeline's]")
@click.option("--scheduler", metavar="NAME", help=f"In place of the model's own: {', '.join(SAMPLERS)}.")
@click.option("--batch", type=int, metavar="N", default=1, show_default=True,
              help="Images at once: quicker on a GPU; the last bits may differ from one at a time.")  # fmt: skip
@click.option("--grid-over", type=click.Choice(AXES),
              help="A labelled grid, too: these are its columns, prompts and seeds its rows.")  # fmt: skip
@click.option("--values", metavar="X,Y,…",
              help="Of --grid-over strength, seed or step: 0,0.5,1 or 0..1:5, which are five.")  # fmt: skip
@click.option("-o", "--output", metavar="FOLDER|FILE.png",
              help="Where to write. Without it, a name made of model and prompt, in this folder.")  # fmt: skip
@_replace
@_dry_run
@options.device
@_dtype
@_offload
@click.option("--tiling", is_flag=True, help="Decode large images in tiles, in less memory.")
@options.speaking
@click.pass_context
def command(
    ctx: click.Context, /, models: tuple[str, ...], as_json: bool, quiet: bool, verbose: bool, **rest: Any
) -> None:
    """Images of prompts, by any model, with LoRAs of any family, alone or side by side in labelled grids.

    \b
    weightops generate --model sd15.safetensors --prompt "a red panda, watercolour" -n 4 -o pandas
    weightops generate --model sd15.safetensors --lora a.safetensors:0.8 --prompt "a cat" --grid-over lora

    An image depends upon its own seed, and not upon which others are made beside it: the same words make the same
    file, byte for byte. Each PNG carries its prompt, seed and recipe, also as A1111's WebUI writes them. LoRAs that
    diffusers would apply wrongly are fused by our engine, and the report says which.

    \b
    --grid-over lora      no LoRA, then each --lora alone
    --grid-over model     each --model
    --grid-over step      the checkpoints of the training that made --lora, which may be a folder of them, too
    --grid-over strength  the LoRAs at --values times their strengths
    --grid-over seed      -n seeds, or those of --values
    --grid-over prompt    each prompt

    Ctrl-C leaves the images that are finished, each whole. `weightops generate video IMAGE` moves an image.
    """
    if ctx.invoked_subcommand is not None:
        said = click.core.ParameterSource.COMMANDLINE
        for param in ctx.command.params:
            if param.name is not None and ctx.get_parameter_source(param.name) is said:
                raise UsageError("generate video", f"found {param.opts[-1]} before it", "say its options after video")
        return
    with render.counting("generating", quiet=quiet or as_json) as on_progress:
        report = generate(models, on_progress=on_progress, **rest)
    if as_json:
        render.emit_json(report.to_dict())
        return
    if not quiet:
        _draw(report, verbose)
    for text in report.warnings:
        render.print_warning(text)


@command.command("video", short_help="A video of each image, by Stable Video Diffusion.")
@click.argument("pictures", metavar="IMAGE…", nargs=-1, required=True)
@click.option("--model", metavar="MODEL", required=True, help="A Stable Video Diffusion: a folder, or hf://owner/name.")
@click.option("--frames", type=int, metavar="N", help="Of each video.  [default: the model's]")
@click.option("--fps", type=int, metavar="N", default=7, show_default=True,
              help="Frames in a second; the model is told them, too.")  # fmt: skip
@click.option("--motion", type=int, metavar="N", default=127, show_default=True, help="How much moves, 1 to 255.")
@click.option("--noise", type=float, metavar="X", default=0.02, show_default=True,
              help="Added to the image; more of it frees the video from it.")  # fmt: skip
@click.option("--decode-chunk", type=int, metavar="N",
              help="Frames decoded at once; fewer need less memory.  [default: all]")  # fmt: skip
@click.option("--steps", type=int, metavar="N", help="Of sampling.  [default: the pipeline's]")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Of every video.")
@click.option("--size", metavar="WxH", help="To which the image is scaled and cut.  [default: the pipeline's]")
@click.option("--form", type=click.Choice(FORMATS), default="gif", show_default=True,
              help="Where -o does not say it by its name.")  # fmt: skip
@click.option(
    "-o", "--output", metavar="FILE.gif|FILE.mp4|FOLDER",
    help="Where to write; a folder for several images. Without it, the image's name, in this folder.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an existing file, once the new one is whole.")
@_dry_run
@options.device
@_dtype
@_offload
@options.as_json
@options.quiet
def video(pictures: tuple[str, ...], as_json: bool, quiet: bool, **rest: Any) -> None:
    """A short video of each image, by Stable Video Diffusion, as GIF or MP4.

    \b
    weightops generate video cat.png --model svd-xt -o cat.gif
    weightops generate video cat.png --model svd-xt --frames 25 --decode-chunk 4 -o cat.mp4

    The image is scaled and cut about its middle to the size of the video. MP4 needs the extra weightops[video].
    """
    with render.counting("generating", quiet=quiet or as_json) as on_progress:
        report = generate_video(*pictures, on_progress=on_progress, **rest)
    if as_json:
        render.emit_json(report.to_dict())
        return
    if not quiet:
        _draw_videos(report)
    for text in report.warnings:
        render.print_warning(text)


# ------------------------------------------------------------------------------------------------ drawing


def _draw(report: GenerateReport, verbose: bool) -> None:
    out = render.console()
    out.print(printable(report.summary), style="bold", soft_wrap=True)
    _ways(out, report, verbose)
    out.print()
    rows = report.images if verbose else report.images[:FEW]
    columns = ["column"] if report.grid is not None and report.grid["over"] not in ("seed", "prompt") else []
    drawn = render.table("image", "seed", *columns, "prompt", right=(1,))
    for row in rows:
        drawn.add_row(row["file"], str(row["seed"]), *(_short(row[name]) for name in (*columns, "prompt")))
    out.print(drawn)
    if len(rows) < len(report.images):
        out.print(f"and {len(report.images) - len(rows):,} more (-v names them)", style="dim")
    _inputs(out, report, verbose)
    if report.dry_run:
        out.print(f"would write {printable(report.output)}", soft_wrap=True)
        return
    render.wrote(report.output, report.bytes_written)
    said = f"{report.seconds_per_image:.2f} s an image, {report.seconds:.2f} s in all, {report.device}, {report.dtype}"
    if report.peak_device_bytes:
        said += f", {report.peak_device_bytes / 2**30:.1f} GiB of the device"
    peak = f", peak memory {report.peak_memory_bytes / 2**20:.0f} MiB" if report.peak_memory_bytes else ""
    out.print(f"       {said}{peak}", style="dim")


def _ways(out: Console, report: GenerateReport, verbose: bool) -> None:
    """Which way each LoRA went: all alike, in one line."""
    if not report.loras:
        return
    out.print()
    by_way: dict[tuple[str, str], list[str]] = {}
    for row in report.loras:
        by_way.setdefault((row["way"], row["reason"]), []).append(row["name"])
    for (way, reason), names in by_way.items():
        different = list(dict.fromkeys(names))
        shown = ", ".join(different if verbose else different[:5])
        more = "" if verbose or len(different) <= 5 else f" (and {len(different) - 5:,} more)"
        how = "beside the weights, by diffusers" if way == "adapter" else f"fused into the weights: {reason}"
        out.print(printable(f"{shown}{more}: {how}"), soft_wrap=True)


def _inputs(out: Console, report: GenerateReport | VideoReport, verbose: bool) -> None:
    out.print()
    verb = "would read " if report.dry_run else "read   "
    for entry in report.inputs:
        hashed = f"  {entry['hash']}" if entry["hash"] and verbose else ""
        nbytes = "" if entry["bytes"] is None else f"  {render.size(entry['bytes'])}"
        out.print(f"{verb}{printable(entry['path'])}{nbytes}{hashed}", soft_wrap=True)


def _draw_videos(report: VideoReport) -> None:
    out = render.console()
    out.print(report.summary, style="bold")
    out.print()
    drawn = render.table("video", "image", "frames", "a second", "size", right=(2, 3))
    for row in report.videos:
        width, height = row.get("size", (0, 0))
        told = (str(row["frames"]), str(row["fps"]), f"{width}x{height}") if "frames" in row else ("-", "-", "-")
        drawn.add_row(row["file"], printable(row["image"]), *told)
    out.print(drawn)
    _inputs(out, report, verbose=False)
    if report.dry_run:
        out.print(f"would write {printable(report.output)}", soft_wrap=True)
        return
    render.wrote(report.output, report.bytes_written)
    peak = f", peak memory {report.peak_memory_bytes / 2**20:.0f} MiB" if report.peak_memory_bytes else ""
    said = f"{report.seconds_per_video:.2f} s a video, {report.seconds:.2f} s in all, {report.device}, {report.dtype}"
    out.print(f"       {said}{peak}", style="dim")


def _short(text: str) -> str:
    return printable(text if len(text) <= _WORDS else text[: _WORDS - 1] + "…")
