"""What the recipe in a file's metadata asks for: its verb, to be called again with the same words.

A recipe comes from a stranger. Each field is checked for its type here, and for its sense by the verb; what it names as
a file is the number of an input, never a path; and a field that is not known is refused, for it may change the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.engine.chunks import DEFAULT_MEMORY
from weightops.errors import FormatError, UsageError, quote
from weightops.merging.recipe import Lora, Model, Node, Recipe, Varied, kind_of, leaves, merged, merges
from weightops.ops.combine import combine
from weightops.ops.convert import convert
from weightops.ops.extract import extract
from weightops.ops.fuse import fuse
from weightops.ops.merge import check_recipe, merge
from weightops.ops.resize import resize

if TYPE_CHECKING:
    from weightops.ops.report import Report

_LARGEST = 10_000  # nodes of a tree

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


class Fields:
    """The fields of a JSON object, each taken with the type that it must have."""

    def __init__(self, label: str, said: Mapping[str, Any], taken: set[str]) -> None:
        self.label = label
        self.said = said
        self.taken = taken

    def refused(self, what: str) -> FormatError:
        version = self.said.get("version", __version__)
        hint = f"it was made by weightops {version}, and this is {__version__}" if version != __version__ else None
        return FormatError(self.label, what, hint)

    def take(self, name: str, expected: str, is_right: Callable[[Any], bool], default: Any) -> Any:
        self.taken.add(name)
        if name not in self.said and default is not Ellipsis:
            return default
        value = self.said.get(name)
        if name not in self.said or not is_right(value):
            found = quote(value, 60) if name in self.said else "none"
            raise self.refused(f"its recipe has the {name} {found}, expected {expected}")
        return value

    def text(self, name: str, default: Any = ...) -> Any:
        return self.take(name, "a text", lambda v: isinstance(v, str), default)

    def flag(self, name: str, default: Any = ...) -> Any:
        return self.take(name, "true or false", lambda v: isinstance(v, bool), default)

    def whole(self, name: str, default: Any = ..., *, least: int | None = None) -> Any:
        expected = "a whole number" + ("" if least is None else f" from {least} on")
        return self.take(name, expected, lambda v: _is_whole(v) and (least is None or v >= least), default)

    def number(self, name: str, default: Any = ...) -> Any:
        return self.take(name, "a number", _is_number, default)

    def number_or_none(self, name: str) -> Any:
        return self.take(name, "a number or null", lambda v: v is None or _is_number(v), ...)

    def rank(self, name: str, default: Any = ...) -> Any:
        return self.take(name, "a rank", lambda v: isinstance(v, str) or _is_whole(v), default)

    def numbers(self, name: str) -> Any:
        return self.take(name, "a list of numbers", lambda v: isinstance(v, list) and all(map(_is_number, v)), ...)

    def wholes(self, name: str) -> Any:
        return self.take(name, "whole numbers", lambda v: isinstance(v, list) and all(map(_is_whole, v)), ...)

    def texts(self, name: str, default: Any = ...) -> Any:
        return self.take(name, "texts", lambda v: isinstance(v, list) and all(isinstance(t, str) for t in v), default)

    def table(self, name: str, default: Any = ...) -> Any:
        return self.take(name, "an object", lambda v: isinstance(v, dict), default)

    def given(self, **values: Any) -> dict[str, Any]:
        """Those that are said."""
        return {name: value for name, value in values.items() if value is not None}

    def check_all(self) -> None:
        """Refuse what nobody has asked for."""
        unknown = sorted(self.said.keys() - self.taken)
        if unknown:
            raise self.refused(f"its recipe says {quote(unknown[0])}, which this version does not know")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    # A whole number stays one, for 1 is written otherwise than 1.0. What float32 does not hold was never meant.
    return (isinstance(value, float) and abs(value) < 3e38) or (_is_whole(value) and abs(value) <= 1 << 53)


def _check_count(fields: Fields, count: int, *expected: int) -> None:
    if count not in expected:
        words = " or ".join(map(str, expected))
        raise fields.refused(f"its recipe has {count} inputs, expected {words}")


# ------------------------------------------------------------------------------------------------ verbs of LoRAs

_Read = tuple[tuple[str, ...], Again, Callable[[Sequence[str]], Recipe] | None]


def _fuse(fields: Fields, count: int, _like: str | None) -> _Read:
    strengths = fields.numbers("strengths")
    _check_count(fields, count, 1 + len(strengths))
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
    _check_count(fields, count, 2)
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
    _check_count(fields, count, 1, 2)
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
    _check_count(fields, count, len(strengths), len(strengths) + 1)
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
        if not all(isinstance(v, (bool, str)) or _is_number(v) for v in many):
            raise fields.refused(f"its recipe has the {name[:40]} {quote(value, 60)}, expected a setting")
    return None if said is None else dict(said)


def _convert(fields: Fields, count: int, like: str | None) -> _Read:
    to = fields.text("to", None)
    words: dict[str, Any] = {"to": to, "dtype": fields.text("dtype"), "drop": fields.texts("drop", ())}
    words |= {"architecture": fields.text("architecture", None)}
    kinds: tuple[str, ...] = ("",)
    if to == "lora":
        _check_count(fields, count, 1, 2)
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
        _check_count(fields, count, 1)

    def again(files: Sequence[str], output: Path, running: Mapping[str, Any]) -> Report:
        base = files[1] if count == 2 else None
        return convert(files[0], base=base, output=output, **words, **running)

    return kinds, again, None


# ------------------------------------------------------------------------------------------------ merge


def _merge(fields: Fields, count: int, _like: str | None) -> _Read:
    if "merge" not in fields.said and "method" in fields.said:
        what = "its recipe is of an earlier version, which had no trees of methods: there is no replay of it"
        raise FormatError(fields.label, what)
    reader = _Tree(fields, count)
    tree = fields.table("merge")
    numbered, like = fields.wholes("numbered"), fields.whole("like")
    vae = fields.take("vae", "a number, merge, or a file", lambda v: isinstance(v, (str, dict)), ...)
    text_encoder, dtype = fields.text("text_encoder"), fields.text("dtype")
    drop, on_mismatch = fields.texts("drop"), fields.text("on_mismatch")
    seed = fields.whole("seed", 0)
    file = Fields(fields.label, vae, set()).whole("file") if isinstance(vae, dict) else None
    if isinstance(vae, str) and vae != "merge" and not (vae.isascii() and vae.isdecimal()):
        raise fields.refused(f"its recipe has the vae {quote(vae, 60)}, expected a number, merge, or a file")

    def recipe(files: Sequence[str]) -> Recipe:
        reader.nodes = 0
        root = reader.node(tree, files)
        alone = reader.model(like, files)  # it may stand outside of the tree
        models = [reader.model(number, files) for number in numbered]
        given = reader.file(file, files, "vae") if file is not None else vae
        return Recipe(root, alone, tuple(models), given, text_encoder, dtype, tuple(drop), on_mismatch, seed)

    try:
        check_recipe(reader.checked(recipe([f"input {n}" for n in range(count)])))
    except UsageError as e:
        raise fields.refused(f"its recipe asks for what merge refuses: {e}") from None

    def again(files: Sequence[str], output: Path, running: Mapping[str, Any]) -> Report:
        words = {**running, "memory": running["memory"] or DEFAULT_MEMORY}
        return merge(recipe=recipe(reader.labels(files)), output=output, allow_nonfinite=True, **words)

    return tuple(reader.kinds[n] for n in range(count)), again, lambda files: recipe(reader.labels(files))


class _Tree:
    """Reads a tree of methods. kinds: what each input is; models: by number, what is said of each."""

    def __init__(self, fields: Fields, count: int) -> None:
        self.fields = fields
        self.count = count
        self.kinds: dict[int, str] = {}
        self.models: dict[int, tuple[bool, int | None]] = {}
        self.nodes = 0

    def file(self, number: Any, files: Sequence[str], kind: str) -> str:
        if not _is_whole(number) or not 0 <= number < self.count:
            raise self.fields.refused(f"its recipe names input {quote(number, 30)}, expected 0 to {self.count - 1}")
        if self.kinds.setdefault(number, kind) != kind:
            raise self.fields.refused(f"its recipe takes input {number} for two things")
        found: str = files[number]
        return found

    def model(self, number: Any, files: Sequence[str], said: tuple[bool, int | None] = (False, None)) -> Model:
        """The model, as it was described first."""
        file = self.file(number, files, "checkpoint")
        ema, to = self.models.setdefault(number, said)
        return Model(file, ema, None if to is None else self.file(to, files, "checkpoint"))

    def node(self, said: Any, files: Sequence[str]) -> Node:
        self.nodes += 1
        if self.nodes > _LARGEST or not isinstance(said, dict):
            what = "is too large" if isinstance(said, dict) else f"has {quote(said, 60)} in place of a model or method"
            raise self.fields.refused(f"the tree of its recipe {what}")
        fields = Fields(self.fields.label, {**said, "version": self.fields.said["version"]}, {"version"})
        found: Node
        if "model" in said:
            number, own = fields.whole("model"), (fields.flag("ema", False), fields.whole("rebasin", None))
            found = self.model(number, files, own)
            if self.models[number] != own:
                raise self.fields.refused(f"its recipe says two things of input {number}")
        elif "lora" in said:
            found = Lora(self.file(fields.whole("lora"), files, "lora"))
        else:
            inputs = fields.take("inputs", "a list", lambda v: isinstance(v, list), ...)
            children = [self.node(child, files) for child in inputs]
            settings = {name: self._setting(v) for name, v in fields.table("parameters").items()}
            beside = [self.file(n, files, "statistics") for n in fields.take("statistics", "a list", _is_list, [])]
            found = merged(fields.text("method"), children, settings, statistics=beside)
            wrong = [p.name for p in found.method.parameters if isinstance(settings.get(p.name), Varied)
                     and p.kind in ("int", "bool")]  # fmt: skip
            if wrong:
                raise self.fields.refused(f"its recipe varies {wrong[0]}, which is one thing for all tensors")
        fields.check_all()
        return found

    def _setting(self, value: Any) -> Any:
        if isinstance(value, list):
            if any(isinstance(v, list) for v in value):
                raise self.fields.refused("its recipe has a list within a list, expected numbers")
            return tuple(self._setting(v) for v in value)
        if isinstance(value, dict):
            varied = Fields(self.fields.label, value, set())
            found = Varied(varied.number("default"), varied.text("blocks"), varied.flag("complement", False))
            varied.check_all()
            return found
        if value is None or not (isinstance(value, (bool, str)) or _is_number(value)):
            raise self.fields.refused(f"its recipe has the setting {quote(value, 60)}, expected a number or a word")
        return value

    def checked(self, recipe: Recipe) -> Recipe:
        """Refuse a tree that makes no model, or numbers its inputs in another order than it would be written with."""
        if kind_of(recipe.root) != "model":
            raise self.fields.refused("the tree of its recipe makes a difference, expected a model")
        if not 0 < len(recipe.numbered) <= _LARGEST:  # one may stand twice
            raise self.fields.refused(f"its recipe numbers {len(recipe.numbered):,} models, expected 1 or more")
        seen: list[str] = [leaf.file for leaf in leaves(recipe.root) if isinstance(leaf, Model)]
        seen += [recipe.like.file]
        seen += [] if recipe.vae == "merge" or recipe.vae.isdecimal() else [recipe.vae]
        seen += [leaf.file for leaf in leaves(recipe.root) if isinstance(leaf, Lora)]
        seen += [file for node in merges(recipe.root) for file in node.statistics]
        if list(dict.fromkeys(seen)) != [f"input {n}" for n in range(self.count)]:
            raise self.fields.refused("the tree of its recipe takes its inputs in another order than they are listed")
        return recipe

    def labels(self, files: Sequence[str]) -> list[str]:
        """The files as they are to be called, two that were told apart by how they were spelled again so."""
        labels: list[str] = []
        seen: set[tuple[Any, ...]] = set()
        for number, file in enumerate(files):
            label, dots = file, ""
            while (label, self.kinds[number], self.models.get(number)) in seen:
                dots += "./"
                label = f"{Path(file).parent}/{dots}{Path(file).name}"
            seen.add((label, self.kinds[number], self.models.get(number)))
            labels.append(label)
        return labels


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


_READERS: dict[str, Callable[[Fields, int, str | None], _Read]] = {
    "merge": _merge,
    "fuse": _fuse,
    "extract": _extract,
    "resize": _resize,
    "combine": _combine,
    "convert": _convert,
}
