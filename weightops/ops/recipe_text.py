"""A tree of merge methods as YAML that reads back as the same tree. Writes no file."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.merging.recipe import Lora, Merge, Model, Node, Recipe, Varied, kind_of, models_of
from weightops.ops.merge import check_recipe
from weightops.ops.recipe_node import rest_of
from weightops.ops.yaml_lines import NUMBER

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

# What may be a name under `models`, but for numbers and the word merge.
NAME = re.compile(r"\w[\w.+-]*")

_ENDINGS = re.compile(r"(\.safetensors|\.ckpt|\.pt|\.bin)?/*$", re.IGNORECASE)


class _File(str):
    """A file, in the place where its name may stand instead."""

    __slots__ = ()


def recipe_text(recipe: Recipe) -> str:
    """YAML that `parse_recipe`, in the current folder, reads as an equal recipe; a file that stands often has a name.

    The models are numbered there as the tree has them. Raises UsageError for what makes no sense, and ValueError for
    what the language cannot say: 1 less numbers for blocks, but as the first of two weights.
    """
    check_recipe(recipe)
    numbered = models_of(recipe.root)
    said: dict[str, Any] = {"merge": _written(recipe.root)}
    if recipe.like != numbered[0]:
        said["like"] = _written(recipe.like)
    usual = Recipe(recipe.root, recipe.like, numbered, default_vae(recipe.like, numbered))
    for key in ("vae", "text_encoder"):
        value = getattr(recipe, key)
        if value.isdecimal():
            value = str(numbered.index(recipe.numbered[int(value) - 1]) + 1)
        if value != getattr(usual, key):
            said[key] = int(value) if value.isdecimal() else value
    for key in ("dtype", "drop", "on_mismatch", "seed"):
        value = getattr(recipe, key)
        if value != getattr(usual, key):
            said[key] = list(value) if isinstance(value, tuple) else value
    names = _names([file for file, count in Counter(_files(said)).items() if count > 1])
    if said.get("vae") == recipe.vae != "merge":  # a file: its name would be a model's, and mean its number
        said["vae"] = _spelled(recipe.vae, names.values())
    models = _dumped("models", {name: _spelled(file, ()) for file, name in names.items()}, flow=False)
    # What holds no other list or keys goes into one line; of names, each has its own.
    return (models if names else "") + "".join(_dumped(key, _renamed(value, names)) for key, value in said.items())


def _dumped(key: str, value: Any, *, flow: bool | None = None) -> str:
    import yaml

    flow = flow if isinstance(value, (dict, list)) else False
    entry = {key: value}
    return yaml.dump(
        entry, Dumper=yaml.SafeDumper, sort_keys=False, allow_unicode=True, width=100, default_flow_style=flow
    )


def default_vae(like: Model, numbered: Sequence[Model]) -> str:
    """Whose VAE is kept where nothing is said of it: that of the model whose keys are kept."""
    return str(numbered.index(like) + 1) if like in numbered else "1"


# ------------------------------------------------------------------------------------------------ nodes


def _written(node: Node) -> Any:
    """A node in the words of a recipe file."""
    if isinstance(node, Lora):
        return {"lora": _File(node.file)}
    if isinstance(node, Merge):
        return _written_over(node) or _written_method(node, node.inputs)
    if node == Model(node.file):
        return _File(node.file)
    said: dict[str, Any] = {"model": _File(node.file)}
    if node.ema:
        said["ema"] = True
    return said if node.to is None else {**said, "rebasin": _written(node.to)}


def _written_over(node: Merge) -> dict[str, Any] | None:
    """A method of differences over a base, where this is one."""
    if node.method.name != "add" or len(node.inputs) != 2:
        return None
    base, inner = node.inputs
    if not isinstance(inner, Merge) or "Tensor" in inner.method.roles:
        return None
    inputs = [_less(child, base) for child in inner.inputs]
    strength = node.parameters["weights"][0]
    if all(child is own for child, own in zip(inputs, inner.inputs, strict=True)):
        return None
    if strength != 1.0 and not _takes_strength(inner):
        return None
    said = {**_written_method(inner, inputs), "base": _written(base)}
    return said if strength == 1.0 else {**said, "strength": _number(strength)}


def _less(node: Node, base: Node) -> Node:
    """The model whose difference from the base this is; else the node itself."""
    if isinstance(node, Merge) and node.method.name == "difference" and node.inputs[1] == base:
        return node.inputs[0]
    return node


def _written_method(node: Merge, inputs: Sequence[Node]) -> dict[str, Any]:
    """A method. inputs: its own, or the models whose differences from a base these are."""
    method = node.method
    given = list(inputs)
    said: dict[str, Any] = {method.name: []}
    if method.needs_base and (method.is_open or len(given) > 2):
        said["base"] = _written(given.pop(method.models.index("base")))
    said[method.name] = children = [_written(child) for child in given]
    for parameter in method.parameters:
        value = node.parameters[parameter.name]
        if parameter.kind != "Weights":
            if parameter.default is None or value != parameter.default:
                said[parameter.name] = _number(value)
        elif any(weight != 1.0 for weight in value) and not _given_strengths(node, inputs, children):
            said |= _written_weights(node, inputs)
    if node.statistics:
        said["statistics"] = [_File(file) for file in node.statistics]
    return said


def _given_strengths(node: Merge, inputs: Sequence[Node], said: Sequence[Any]) -> bool:
    """In a sum, let the weights stand with what they belong to, as strengths. Is each of these a difference?"""
    weights, fixed = node.parameters["weights"], node.method.fixed
    if node.method.name not in ("add", "sum"):
        return False
    if any(w != 1.0 and not _takes_strength(child) for child, w in zip(inputs[fixed:], weights, strict=True)):
        return False
    for entry, weight in zip(said[fixed:], weights, strict=True):
        if weight != 1.0:
            entry["strength"] = _number(weight)
    return True


def _takes_strength(node: Node) -> bool:
    if isinstance(node, Merge):
        return kind_of(node) == "delta" and all(p.name != "strength" for p in node.method.parameters)
    return isinstance(node, Lora)


def _written_weights(node: Merge, inputs: Sequence[Node]) -> dict[str, Any]:
    weights, method = node.parameters["weights"], node.method
    last = weights[-1]
    of_alpha = [(1.0, last), (last,)] if method.needs_base else [(rest_of(last), last)]
    # Over a base, an alpha would be the strength of the whole.
    if inputs == node.inputs and weights in of_alpha and all(p.name != "alpha" for p in method.parameters):
        return {"alpha": _number(last)}
    return {"weights": [_number(weight) for weight in weights]}


def _number(value: Any) -> Any:
    if not isinstance(value, Varied):
        return value
    if value.complement:
        raise ValueError("what is 1 less numbers for blocks stands by itself")
    return {"blocks": value.spec, "default": value.default}


# ------------------------------------------------------------------------------------------------ names of files


def _files(said: Any) -> Iterator[str]:
    if isinstance(said, _File):
        yield str(said)
    elif isinstance(said, (dict, list)):
        for each in said.values() if isinstance(said, dict) else said:
            yield from _files(each)


def _renamed(said: Any, names: Mapping[str, str]) -> Any:
    """The same with names for files that have one."""
    if isinstance(said, _File):
        return names.get(said) or _spelled(str(said), names.values())
    if isinstance(said, dict):
        return {key: _renamed(value, names) for key, value in said.items()}
    return [_renamed(each, names) for each in said] if isinstance(said, list) else said


def _spelled(file: str, names: Collection[str]) -> str:
    """As no name is: what could be one, or a word or a number, begins with ./, and so does what begins so itself."""
    if file.startswith("hf://") or Path(file).is_absolute():
        return file
    doubtful = file in names or file.startswith(("./", "~/")) or not ("/" in file or "." in file)
    doubtful = doubtful or NUMBER.fullmatch(file) is not None
    return f"./{file}" if doubtful else file


def _names(files: Sequence[str]) -> dict[str, str]:
    """For each file a name of its own, after its stem."""
    found: dict[str, str] = {}
    for file in files:
        stem = re.sub(r"[^\w.+-]+", "-", _ENDINGS.sub("", file).rpartition("/")[2])[:60].lstrip("-.+")
        if not re.match(r"[^\W\d]", stem) or stem == "merge":  # numbers, and what YAML takes for such
            stem = f"model-{stem}".rstrip("-")
        name, count = stem, 1
        while name in found.values():
            count += 1
            name = f"{stem}-{count}"
        found[file] = name
    return found
