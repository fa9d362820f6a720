"""The command `caption`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import click

from weightops.cli import options, render
from weightops.diffusion.blip import DTYPES, MODEL
from weightops.diffusion.caption import FORMS, caption
from weightops.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

    from weightops.diffusion.caption import CaptionReport

FEW = 5  # of each kind are named without -v


@click.command("caption", short_help="Captions for a folder of images, by BLIP.")
@click.argument("folder", metavar="DIR")
@click.option(
    "--model", metavar="NAME", default=MODEL, show_default=True,
    help="A captioning model of BLIP: its name on the hub, or a folder that holds it.",
)  # fmt: skip
@click.option("--query", metavar="TEXT", help="What the images were searched by; folded into each caption, once.")
@click.option(
    "--template", metavar="T",
    help="Of the caption.  [default: '{query}, {caption}' with --query, else '{caption}']",
)  # fmt: skip
@click.option("--trigger", metavar="WORD", help="Stands first in each caption, and not twice.")
@click.option("--prompt", metavar="TEXT", help="How the model begins each caption: 'a pixel drawing of'.")
@click.option(
    "--write", type=click.Choice(FORMS), default="csv", show_default=True,
    help="csv: metadata.csv in the folder (or metadata.jsonl, if it has one); txt: a file beside each image.",
)  # fmt: skip
@click.option("--batch", type=int, metavar="N", default=8, show_default=True, help="Images at once.")
@click.option("--max-tokens", type=int, metavar="N", default=50, show_default=True, help="The longest caption.")
@click.option(
    "--beams", type=int, metavar="N", default=1, show_default=True,
    help="Width of the search for a likely caption; 1 takes the likeliest word each time.",
)  # fmt: skip
@click.option(
    "--min-side", type=int, metavar="PX", default=256, show_default=True,
    help="Name images whose shorter side has fewer pixels.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Caption anew what has a caption.")
@click.option("--dry-run", is_flag=True, help="Say what would be captioned, and what is broken, alike or tiny.")
@options.device
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="Of the model; auto: fp16 on CUDA."
)
@options.speaking
def command(folder: str, as_json: bool, quiet: bool, verbose: bool, **rest: Any) -> None:
    """Captions for every image in a folder, by BLIP, in the form that trainers and datasets' imagefolder read.

    \b
    weightops caption photos --query "red panda"
    weightops caption photos --trigger sks --write both --model blip-folder

    Bring a folder: put the images that you may use into it (png, jpg, webp, bmp, gif, tif; folders in it count), from
    a camera, a download or an archive. Collecting images from the web is left out on purpose: which of them you may
    use is yours to know.

    Each batch is written as soon as it is done. A run that was stopped goes on where it was, and captions that you
    have written or mended yourself stay. Images that are rotated by EXIF are shown upright to the model; broken ones
    are skipped and named; near-duplicates and tiny ones are named, and captioned too. No image is changed.
    """
    with render.counting("captioning", quiet=quiet or as_json) as on_progress:
        on_look = functools.partial(on_progress, title="looking")
        on_caption = functools.partial(on_progress, title="captioning")
        report = caption(folder, on_look=on_look, on_progress=on_caption, **rest)
    if as_json:
        render.emit_json(report.to_dict())
        return
    if not quiet:
        _draw(report, verbose)
    for text in report.warnings:
        render.print_warning(text)


def _draw(report: CaptionReport, verbose: bool) -> None:
    out = render.console()
    pictures, new = len(report.found.pictures), len(report.captions)
    if report.dry_run:
        summary = f"would caption {_images(len(report.todo))}"
    elif new or report.kept < pictures:
        summary = f"captioned {_images(new)}"
    else:
        summary = "nothing to caption: " + ("the only image has a caption" if pictures == 1 else "all images have one")
    out.print(summary, style="bold", soft_wrap=True)
    out.print()
    drawn = render.table("images", "", right=(1,))
    for name, count in (
        ("that can be read", pictures), ("with a caption already", report.kept), ("broken", len(report.broken)),
        ("near-duplicates", len(report.duplicates)), (f"under {report.min_side} px", len(report.tiny)),
        ("other files", len(report.found.ignored)),
    ):  # fmt: skip
        if count or name == "that can be read":
            drawn.add_row(name, f"{count:,}")
    out.print(drawn)
    _named(out, "captions", [f"{n}  {text}" for n, text in report.captions.items()], verbose)
    _named(out, "to caption", report.todo, verbose)
    _named(out, "broken", [f"{name}: {reason}" for name, reason in report.broken], verbose=True)
    pairs = [f"{a} and {b}: {bits} of 64 bits apart" for a, b, bits in report.duplicates]
    _named(out, "near-duplicates", pairs, verbose)
    _named(out, "tiny", [f"{p.name}  {p.width} × {p.height}" for p in report.tiny], verbose)
    _named(out, "other files", report.found.ignored, verbose)
    _wrote(out, report)


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"


def _named(out: Console, title: str, lines: Sequence[str], verbose: bool) -> None:
    if not lines:
        return
    shown: Iterable[str] = lines if verbose else lines[:FEW]
    out.print(f"\n{title}", style="dim")
    for line in shown:
        out.print(f"  {printable(line)}", soft_wrap=True)
    if not verbose and len(lines) > FEW:
        out.print(f"  and {len(lines) - FEW:,} more (-v names them)", style="dim")


def _wrote(out: Console, report: CaptionReport) -> None:
    if report.dry_run:
        return
    out.print()
    beside = [path for path in report.written if path.endswith(".txt")]
    for path in report.written:
        if path not in beside[1:]:
            more = f"  and {len(beside) - 1:,} more beside their images" if path.endswith(".txt") and beside[1:] else ""
            out.print(f"wrote  {printable(path)}{more}", style="green", soft_wrap=True)
    out.print(f"       {report.seconds:.2f} s", style="dim")
