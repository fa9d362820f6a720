"""The command group, and the one place where an error becomes `error: …` and `hint: …`."""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import io
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import click

from weightops import __version__
from weightops.errors import Interrupted, UsageError, WeightopsError, printable, quote

if TYPE_CHECKING:
    from types import FrameType


class Entry(NamedTuple):
    """A command: its module in this folder, which is imported only when the command is used, and its help line."""

    name: str
    section: str
    help: str


# Most used first. The help lines stand here so that `--help` imports no command.
ENTRIES: tuple[Entry, ...] = (
    Entry("inspect", "Look", "What is this file? Kind, architecture, components, dtypes, metadata."),
    Entry("blocks", "Look", "The names of a file's blocks, for --blocks, and what they hold."),
    Entry("merge", "Checkpoints", "Two or more models into one, every tensor accounted for."),
    Entry("fuse", "LoRAs", "LoRAs of any family and dialect into a checkpoint."),
    Entry("extract", "LoRAs", "A LoRA out of a finetune and its base."),
    Entry("resize", "LoRAs", "Fewer ranks for a LoRA of any family, each at its best."),
    Entry("combine", "LoRAs", "Several LoRAs into one, exactly or at the best of a rank."),
    Entry("unfuse", "LoRAs", "Take fused LoRAs out again, bit for bit."),
    Entry("convert", "Files", "A checkpoint in another layout, dtype or container."),
    Entry("replay", "Files", "A file made again by its own recipe, and compared with itself."),
    Entry("caption", "Diffusion", "Captions for a folder of images, by BLIP."),
    Entry("train", "Diffusion", "A LoRA learnt from images and captions, or from one subject's."),
    Entry("generate", "Diffusion", "Images of prompts, with LoRAs, in labelled grids; videos of images."),
    Entry("evaluate", "Diffusion", "What a LoRA or a training has learnt, in numbers and what they say."),
    Entry("study", "Diffusion", "A whole study from one file: steps, grids, tables, one page."),
    Entry("synth", "Synthesis", "New LoRAs from a space of LoRAs: collect, fit, sample, edit."),
    Entry("demo", "Start here", "A small real merge, made and checked on the spot."),
)


class Commands(click.Group):
    """Loads a command's module when it is asked for; lists all of them, by section, without loading any.

    entries: the commands; those of a group within are in modules that begin with its name, as synth_fit_images.
    """

    def __init__(self, name: str | None = None, *, entries: tuple[Entry, ...] = ENTRIES, **rest: Any) -> None:
        super().__init__(name, **rest)
        self.entries = entries
        self.within = "" if entries is ENTRIES else f"{name}_"

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [entry.name for entry in self.entries]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.list_commands(ctx) and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(self.list_commands(ctx))}"
            raise UsageError(self.within.rstrip("_"), f"no such command {quote(args[0])}", hint)
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"weightops.cli.{self.within}{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section in dict.fromkeys(entry.section for entry in self.entries):
            with formatter.section(section):
                formatter.write_dl([(e.name, e.help) for e in self.entries if e.section == section])


@click.group(
    cls=Commands,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, message="weightops %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Surgery on diffusion weights: exact, every key accounted for, in one streaming pass.

    \b
    weightops merge a.safetensors b.safetensors --alpha 0.7
    weightops inspect anything.safetensors
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


def console() -> NoReturn:
    """The console script. Leaves at once: torch takes half a second to take itself apart, for nothing."""
    _open_missing_streams()
    code: Any = 0
    try:
        run()
    except SystemExit as e:
        code = e.code
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _open_missing_streams() -> None:
    """Started without stdin, stdout or stderr, the next file to be opened, an output, would take its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def run(arguments: list[str] | None = None) -> NoReturn:
    """One command: exit code 0 done, 1 refused data or a failed operation, 2 wrong use."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _stop)
    for stream in (sys.stdout, sys.stderr):
        # A stream of another encoding (redirected on Windows) shows what it cannot say as \u2212, and does not fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main.main(arguments, prog_name="weightops", standalone_mode=False)
        _flush()
        sys.exit(code if isinstance(code, int) else 0)
    except (WeightopsError, Interrupted) as e:
        fail(str(e), e.hint, e.exit_code)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.exceptions.NoArgsIsHelpError as e:  # a group without a command
        click.echo(e.ctx.get_help() if e.ctx else e.format_message(), err=True)
        sys.exit(2)
    except click.UsageError as e:
        fail(*_usage(e), 2)
    except click.ClickException as e:
        fail(e.format_message(), None, e.exit_code)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted: nothing was written, and no input was changed", None, 1)
    except BrokenPipeError:
        # Whoever read our output has left; what is still buffered would fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        if e.errno != errno.ENOSPC:  # anything else that comes here is our own fault
            raise
        fail(f"the answer cannot be printed: {e.strerror}", None, 1)
    except MemoryError as e:
        fail(f"not enough memory: {str(e) or 'the system refused an allocation'}", "a smaller --memory may do", 1)


def _flush() -> None:
    sys.stdout.flush()


def _stop(number: int, _frame: FrameType | None) -> None:
    by = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    raise Interrupted("", f"{by}: nothing was written, and no input was changed")


def _usage(error: click.UsageError) -> tuple[str, str | None]:
    hint: str | None = None
    possible = getattr(error, "possibilities", None)
    text = (error.message if possible else error.format_message()).rstrip(".")
    # The message of what is missing is empty.
    if isinstance(error, click.BadParameter) and not isinstance(error, click.MissingParameter) and error.param:
        option = error.param.opts[-1]
        text = f"{option}: {error.message.rstrip('.')}" if option.startswith("-") else text
    if possible:
        hint = f"did you mean {possible[0]}?"
    else:
        hint = f"{error.ctx.command_path if error.ctx else 'weightops'} --help lists the options"
    return text[:1].lower() + text[1:], hint


def fail(text: str, hint: str | None, code: int) -> NoReturn:
    """Print one error for people, and exit."""
    print_error(text, hint)
    sys.exit(code)


def print_error(text: str, hint: str | None) -> None:
    click.echo(f"error: {one_line(text)}", err=True)
    if hint:
        click.echo(f"hint: {one_line(hint)}", err=True)


def one_line(text: str) -> str:
    """Whatever a file put into a message, it stays one line that no terminal acts on."""
    return printable(" ".join(text.splitlines()))
