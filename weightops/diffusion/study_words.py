"""What a function takes, as its signature says it, and whether a plain value of a file can be that."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# What a plain value is called, by the kind of it that an annotation names.
_CALLED: Mapping[str, str] = {
    "str": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "path": "a file: $name",
    "list": "a list",
    "map": "keys with values",
}
# The alternatives of an annotation, and the kinds of plain values that they take. What is not here takes anything.
_KINDS: Mapping[str, str] = {
    "str": "str",
    "int": "int",
    "float": "float",
    "bool": "bool",
    "os.PathLike[str]": "path",
    "Path": "path",
    "Named": "path",
}
_LISTS = ("Sequence[", "Iterable[", "Collection[", "tuple[", "list[")
_MAPS = ("Mapping[", "dict[")


@dataclass(frozen=True, slots=True)
class Parameter:
    """many: any number of them may stand one after the other; `annotation` is that of one."""

    name: str
    annotation: str
    default: Any
    required: bool
    many: bool


@functools.cache
def parameters(module: str, function: str) -> Mapping[str, Parameter]:
    """The parameters of a function, by name."""
    found = inspect.signature(getattr(importlib.import_module(module), function)).parameters.values()
    return {
        p.name: Parameter(
            p.name, str(p.annotation), None if p.default is p.empty else p.default, p.default is p.empty,
            p.kind is p.VAR_POSITIONAL,
        )
        for p in found
    }  # fmt: skip


def wrapped(value: Any, parameter: Parameter) -> Any:
    """One thing as a list of it, where a list alone can be taken; a whole number as a text, where one is."""
    if isinstance(value, (list, dict)):
        return value
    kinds = {_kind(alternative) for alternative in _alternatives(parameter.annotation)}
    if _kind_of(value) == "int" and "str" in kinds and not kinds & {"int", "float", None}:
        value = str(value)
    return [value] if parameter.many or kinds <= {"list", "None"} else value


def misfit(value: Any, parameter: Parameter) -> str | None:
    """What is expected in the value's place, or None where it fits. Anything that is no plain value is a file."""
    if not parameter.many:
        return _misfit(value, parameter.annotation)
    if not isinstance(value, list):
        return _CALLED["list"]
    return next((wrong for part in value if (wrong := _misfit(part, parameter.annotation)) is not None), None)


def is_path(parameter: Parameter) -> bool:
    """Can it be the name of a file or folder?"""
    return "PathLike" in parameter.annotation or "Named" in parameter.annotation


def said(verb: str, words: Mapping[str, Any]) -> str:
    """A verb and its words as a study's file has them, each in a line of its own."""

    def plain(value: Any) -> str:
        if value is None or isinstance(value, bool):
            return {None: "null", True: "true", False: "false"}[value]
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(plain, value))}]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key}: {plain(part)}" for key, part in value.items()) + "}"
        if isinstance(value, str) and set(value) & set(",:[]{}#\n"):
            return json.dumps(value, ensure_ascii=False)
        return f"{value:g}" if isinstance(value, float) else str(value)

    return "\n".join([f"{verb}:", *(f"  {name}: {plain(value)}" for name, value in words.items())])


def _misfit(value: Any, annotation: str) -> str | None:
    alternatives = _alternatives(annotation)
    kinds = [_kind(alternative) for alternative in alternatives]
    if None in kinds:
        return None
    found = _kind_of(value)
    takes = {"float": {"float"}, "int": {"int", "float"}, "str": {"str", "path"}, "path": {"str", "path"}}
    if takes.get(found, {found}) & set(kinds):
        if found == "list":
            inner = [a[a.index("[") + 1 : -1] for a in alternatives if _kind(a) == "list"]
            wrong = [_misfit(part, of.removesuffix(", ...")) for part in value for of in inner if _is_one(of)]
            return next((f"{_CALLED['list']}, each {w}" for w in wrong if w is not None), None)
        return None
    return " or ".join(dict.fromkeys(_CALLED[kind] for kind in kinds if kind and kind != "None"))


def _is_one(inner: str) -> bool:
    """Of a list: are all parts of one annotation?"""
    return len(_split(inner, ",")) == 1 or inner.endswith(", ...")


def _kind(alternative: str) -> str | None:
    if alternative == "None":
        return "None"
    if alternative.startswith(_LISTS):
        return "list"
    return "map" if alternative.startswith(_MAPS) else _KINDS.get(alternative)


def _kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    for kind, types in (("int", int), ("float", float), ("str", str), ("list", list), ("map", dict)):
        if isinstance(value, types):
            return kind
    return "path"


def _alternatives(annotation: str) -> list[str]:
    return [part.strip() for part in _split(annotation, "|")]


def _split(text: str, mark: str) -> list[str]:
    """At the marks that stand within no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == mark and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
