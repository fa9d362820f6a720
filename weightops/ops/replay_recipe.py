"""What the recipe in a file's metadata asks for: its verb, to be called again with the same words.

A recipe comes from a stranger. Each field is checked for its type here, and for its sense by the verb; what it names as
a file is the number of an input, never a path; and a field that is not known is refused, for it may change the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.errors import FormatError, quote
from weightops.ops.combine import combine
from weightops.ops.convert import convert
from weightops.ops.extract import extract
from weightops.ops.fuse import fuse
from weightops.ops.merge import merge
from weightops.ops.replay_fields import Fields, check_count, is_number
from weightops.ops.replay_tree import read_tree
from weightops.ops.resize import resize

if TYPE_CHECKING:
    from weightops.merging.recipe import Recipe
    from weightops.ops.report import Report

# Makes the file again of these files, in the order of the recipe's inputs: (files, output, running) -> report.
Again = Callable[[Sequence[str], Path, Mapping[str, Any]], "Report"]


@dataclass(frozen=True, slots=True)
class Made:
    """How a file was made: `inputs` are names and hashes, `kinds` of each checkpoint or lora, where that is known.

    recipe: of a merge, given the files.
    """

    label: str
    command: str
    version: str
    said: Mapping[str, Any]
    inputs: tuple[tuple[str, str], ...]
    kinds: tuple[str, ...]
    again: Again
    recipe: Callable[[Sequence[str]], Recipe] | None = None


def read_made(said: Mapping[str, Any], label: str, like: str | None) -> Made:
    """What to call. said: a recipe whose inputs are known to be sound. like: the folder that was made, if it was one.

    Raises FormatError for what no recipe of ours says.
    """
    command = said["command"]
    if command not in _READERS:
        hint = f"replay knows {', '.join(_READERS)}"
        raise FormatError(label, f"was made by {quote(command)}, of which there is no replay", hint)
    fields = Fields(label, said, {"command", "version", "inputs"})
    inputs = tuple((entry["name"], entry["hash"]) for entry in said["inputs"])
    kinds, again, recipe = _READERS[command](fields, len(inputs), like)
    fields.check_all()
    return Made(label, command, said["version"], said, inputs, kinds, again, recipe)


# ------------------------------------------------------------------------------------------------ verbs

_Read = tuple[tuple[str, ...], Again, "Callable[[Sequence[str]], Recipe] | None"]


def _merge(fields: Fields, count: int, _like: str | None) -> _Read:
    kinds, recipe = read_tree(fields, count)

    def again(files: Sequence[str], output: Path, running: Mapping[str, Any]) -> Report:
        return merge(recipe=recipe(files), output=output, allow_nonfinite=True, **running)

    return kinds, again, recipe


def _fuse(fields: Fields, count: int, _like: str | None) -> _Read:
    strengths = fields.numbers("strengths")
    check_count(fields, count, 1 + len(strengths))
    words = {
        "text_encoder": fields.number_or_none("text_encoder"), "rounding": fields.text("rounding"),
        "dtype": fields.text("dtype"), "seed": fields.whole("seed", 0), "blocks": fields.text("blocks", None),
        "lokr_rank": fields.whole("lokr_rank", None, least=1), "allow_nonfinite": True,
    }  # fmt: skip

    def again(files: Sequence[str], output: Path, running: Mapping[str, Any]) -> Report:
        loras = zip(files[1:], strengths, strict=True)
        return fuse(files[0], *loras, output=output, **words, **running)

    return ("checkpoint", *["lora"] * len(strengths)), again, None


def _extract(fields: Fields, count: int, _like: str | None) -> _Read:
    check_count(fields, count, 2)
    words = {
        "rank": fields.rank("rank"), "conv_rank": fields.rank("conv_rank", None), "dialect": fields.text("dialect"),
        "dtype": fields.text("dtype"), "seed": fields.whole("seed"), "include": fields.texts("include", ()),
        "exclude": fields.texts("exclude", ()), "biases": fields.flag("biases", False),
        "clamp_quantile": fields.number("clamp_quantile", None), "allow_unrelated": True, "allow_nonfinite": True,
    }  # fmt: skip

    def again(files: Sequence[str], output: Path, running: Mapping[str, Any]) -> Report:
        return extract(files[0], files[1], output=output, **words, **running)

    return ("checkpoint", "checkpoint"), again, None


def _resize(fields: Fields, count: int, _like: str | None) -> _Read:
    check_count(fields, count, 1, 2)
    words = {
        "rank": fields.rank("rank"), "conv_rank": fields.rank("conv_rank", None), "dtype": fields.text("dtype"),
        "max_rank": fields.whole("max_rank", None, least=1), "seed": fields.whole("seed", 0),
        "max_conv_rank": fields.whole("max_conv_rank", None, least=1), "all_kernels": fields.flag("all_kernels", False),
    }  # fmt: skip

    def again(files: Sequence[str], output: Path, running: Mapping[str, Any]) -> Report:
        base = files[1] if count == 2 else None
        return resize(files[0], base=base, output=output, **words, **running)

    return ("lora", "checkpoint")[:count], again, None


def _combine(fields: Fields, count: int, _like: str | None) -> _Read:
    strengths = fields.numbers("strengths")
    check_count(fields, count, len(strengths), len(strengths) + 1)
    words = {
        "rank": fields.rank("rank", None), "conv_rank": fields.rank("conv_rank", None), "exact": fields.flag("exact"),
        "max_rank": fields.whole("max_rank", None, least=1), "dtype": fields.text("dtype"),
        "max_conv_rank": fields.whole("max_conv_rank", None, least=1), "method": fields.text("method"),
        "settings": _settings(fields, fields.table("settings", None)), "compat": fields.text("compat", None),
        "ema": fields.rank("ema", None), "dialect": fields.text("dialect", None), "seed": fields.whole("seed", 0),
        "architecture": fields.text("architecture", None),
    }  # fmt: skip

    def again(files: Sequence[str], output: Path, running: Mapping[str, Any]) -> Report:
        # Of an average the strengths follow from the files.
        factors = strengths if words["ema"] is None else [1.0] * len(strengths)
        loras = zip(files[: len(strengths)], factors, strict=True)
        base = files[-1] if count > len(strengths) else None
        return combine(*loras, base=base, output=output, **words, **running)

    return (*["lora"] * len(strengths), "checkpoint")[:count], again, None


def _settings(fields: Fields, said: Mapping[str, Any] | None) -> dict[str, Any] | None:
    for name, value in ({} if said is None else said).items():
        many = value if isinstance(value, list) else [value]
        if not all(isinstance(v, (bool, str)) or is_number(v) for v in many):
            raise fields.refused(f"its recipe has the {name[:40]} {quote(value, 60)}, expected a setting")
    return None if said is None else dict(said)


def _convert(fields: Fields, count: int, like: str | None) -> _Read:
    to = fields.text("to", None)
    words: dict[str, Any] = {"to": to, "dtype": fields.text("dtype"), "drop": fields.texts("drop", ())}
    words |= {"architecture": fields.text("architecture", None)}
    kinds: tuple[str, ...] = ("",)
    if to == "lora":
        check_count(fields, count, 1, 2)
        words |= {"rank": fields.rank("rank", None), "conv_rank": fields.rank("conv_rank", None)}
        words |= {"seed": fields.whole("seed")}
        kinds = ("lora", "checkpoint")[:count]
    elif "alpha" in fields.said:
        words |= {"alpha": fields.text("alpha")}
        kinds = ("lora",)
    else:
        words |= {"shard_size": fields.whole("shard_size", None, least=1)}
        words |= {"prediction": fields.text("prediction", None), "allow_nonfinite": True}
        # What stands beside the weights is not compared; of the file's own, nothing is missing.
        words |= {"like": like, "no_tokenizer": True} if to == "diffusers" else {}
    if len(kinds) == 1:
        check_count(fields, count, 1)

    def again(files: Sequence[str], output: Path, running: Mapping[str, Any]) -> Report:
        base = files[1] if count == 2 else None
        return convert(files[0], base=base, output=output, **words, **running)

    return kinds, again, None


_READERS: dict[str, Callable[[Fields, int, str | None], _Read]] = {
    "merge": _merge,
    "fuse": _fuse,
    "extract": _extract,
    "resize": _resize,
    "combine": _combine,
    "convert": _convert,
}
