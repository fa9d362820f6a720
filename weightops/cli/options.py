"""Options that mean the same in every command, and how their words are read."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, TypeVar

import click

from weightops.errors import UsageError, quote
from weightops.files.dtypes import DTYPE_WORDS
from weightops.naming.identify import DROPPABLE

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30,
          "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}  # fmt: skip


class Size(click.ParamType[int]):
    """A number of bytes: 512MiB, 2GiB, 500MB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)", value.strip())
        if match is not None and match.group(2).upper() in _UNITS:
            nbytes = Fraction(match.group(1)) * _UNITS[match.group(2).upper()]
            if 1 <= nbytes < 1 << 60:
                return int(nbytes)
        raise UsageError(_option(param), f"found {quote(value)}, expected a size such as 512MiB or 2GiB")


class Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers separated by commas: 0.5,0.3,0.2."""

    name = "x,y,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(v) for v in value.split(","))
        except ValueError:
            raise UsageError(_option(param), f"found {quote(value)}, expected numbers such as 0.5,0.3,0.2") from None


def _option(param: click.Parameter | None) -> str:
    return param.opts[-1] if param is not None else ""


def _device(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", value):
        raise UsageError("--device", f"found {quote(value)}, expected auto, cpu, cuda or cuda:1")
    return value


output = click.option(
    "-o", "--output", metavar="FILE", help="Where to write. Without it, a name made of the inputs', in this folder."
)
force = click.option("--force", is_flag=True, help="Replace an existing file, once the new one is whole.")
dry_run = click.option("--dry-run", is_flag=True, help="Say what would be done, from headers alone.")
strict = click.option("--strict", is_flag=True, help="Anything unused, missing or mismatched is an error.")
verify = click.option("--verify", is_flag=True, help="Read samples back and compare with a float64 reference.")
dtype = click.option(
    "--dtype",
    type=click.Choice(["keep", *DTYPE_WORDS]),
    default="keep",
    show_default=True,
    help="Of the output; keep: the first input's, tensor by tensor.",
)

factors_dtype = click.option(
    "--dtype",
    type=click.Choice(["keep", *(word for word in DTYPE_WORDS if not word.startswith("fp8"))]),
    default="keep",
    show_default=True,
    help="Of the factors; keep: the first input's, of fp8 ones fp16.",
)


def _words(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in value.split(",") if word.strip())


drop = click.option("--drop", metavar="NAME,…", default="", callback=_words, help=f"Leave out: {', '.join(DROPPABLE)}.")
shard_size = click.option(
    "--shard-size", type=Size(), metavar="SIZE", help="Cut each component into files of at most this: 5GB, 2GiB."
)
allow_nonfinite = click.option("--allow-nonfinite", is_flag=True, help="Write NaN and Inf instead of refusing them.")
device = click.option(
    "--device", metavar="NAME", default="auto", show_default=True, callback=_device, help="auto, cpu, cuda, cuda:1 …"
)
memory = click.option(
    "--memory", type=Size(), default="128MiB", show_default=True, help="Bytes in flight; torch itself comes on top."
)
memory_whole = click.option(
    "--memory", type=Size(),
    help="Bytes in flight; torch itself comes on top.  [default: 128MiB, to 512MiB for a matrix needed whole]",
)  # fmt: skip
threads = click.option(
    "--threads", type=click.IntRange(1, 256), metavar="N", help="Computing threads.  [default: the usable cores]"
)
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else there.")
quiet = click.option("-q", "--quiet", is_flag=True, help="No report and no progress; warnings and errors remain.")
verbose = click.option("-v", "--verbose", is_flag=True, help="Name every key, and show values whole.")


def together(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """Several options as one decorator, shown in this order."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


writing = together(output, force, dry_run, strict, verify, dtype)
writing_factors = together(output, force, dry_run, strict, verify, factors_dtype)
running = together(device, memory, threads)
running_whole = together(device, memory_whole, threads)
speaking = together(as_json, quiet, verbose)


def settings_of(words: tuple[str, ...]) -> dict[str, str]:
    """NAME=VALUE, as --set takes them."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UsageError("--set", f"found {word!r}, expected NAME=VALUE")
        found[name] = value
    return found
