"""Draws how a file was made, and of what, and how these were made: the recipes within its recipe, as a tree."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import Console

_SHOWN = 60  # lines, unless all are asked for
_LONGEST = 80  # characters of a setting, likewise

# Fields of which a line says something in words of its own, or nothing.
_TOLD = frozenset({"command", "version", "inputs", "merge", "like", "numbered", "strengths", "method", "parameters"})

# What is done where nothing is said.
_USUAL = {"dtype": "keep", "drop": [], "on_mismatch": "error", "vae": "1", "text_encoder": "merge", "exact": False}


@dataclass(slots=True)
class _Branch:
    text: str
    children: list[_Branch] = field(default_factory=list)


def lineage(out: Console, recipe: Mapping[str, Any], *, verbose: bool) -> None:
    """The tree of a recipe that `weightops.lineage` has read; what it says of settings may be anything."""
    from rich.text import Text

    out.print("made by", style="dim")
    lines = [Text(line) for line in _drawn(_made(recipe, verbose))]
    shown = lines if verbose else lines[:_SHOWN]
    # As with tensors: rich's own tree folds what is wider than the terminal.
    out.print(Text("\n").join(shown), soft_wrap=True)
    if len(shown) < len(lines):
        out.print(f"(and {len(lines) - len(shown):,} more lines; -v shows them)", style="dim")


def _drawn(branch: _Branch, start: str = "", rest: str = "") -> Iterator[str]:
    yield start + branch.text
    for place, child in enumerate(branch.children, 1):
        last = place == len(branch.children)
        yield from _drawn(child, rest + ("└── " if last else "├── "), rest + ("    " if last else "│   "))


def _made(recipe: Mapping[str, Any], verbose: bool) -> _Branch:
    """The command with its settings, and below it what it was given."""
    settings = {k: v for k, v in recipe.items() if k not in _TOLD and _USUAL.get(k) != v}
    if isinstance(settings.get("vae"), dict):
        del settings["vae"]  # the file stands among the inputs
    if isinstance(recipe.get("method"), str):  # a way to combine LoRAs, or to merge in the recipes of earlier versions
        settings = {"method": recipe["method"], **settings}
    if isinstance(recipe.get("parameters"), dict):
        settings |= recipe["parameters"]
    made = _Branch(f"{recipe['command']}{_settings(settings, verbose)} (weightops {recipe['version']})")
    inputs: Sequence[Mapping[str, Any]] = recipe["inputs"]
    told: set[int] = set()
    if isinstance(recipe.get("merge"), dict):
        made.children.append(_node(recipe["merge"], inputs, told, verbose))
    strengths = recipe["strengths"] if isinstance(recipe.get("strengths"), list) else []
    first = 1 if recipe["command"] == "fuse" else 0  # the checkpoint has none
    for number in (n for n in range(len(inputs)) if n not in told):
        is_lora = 0 <= number - first < len(strengths)
        before = f"{_value(strengths[number - first], verbose)} × " if is_lora else ""
        before = "VAE of " if recipe.get("vae") == {"file": number} else before
        made.children.append(_input(inputs[number], before, verbose))
    return made


def _node(said: Any, inputs: Sequence[Mapping[str, Any]], told: set[int], verbose: bool) -> _Branch:
    """A method, a model or a LoRA of a merge's tree; of an input that stands there twice, once how it was made."""
    said = said if isinstance(said, dict) else {}
    for kind in ("model", "lora"):
        number = said.get(kind)
        if isinstance(number, int) and 0 <= number < len(inputs):
            more = {k: v for k, v in said.items() if k != kind}
            known = number in told
            told.add(number)
            return _input(inputs[number], "", verbose, after=_settings(more, verbose), known=known)
    parameters, children = said.get("parameters"), said.get("inputs")
    text = f"{_value(said.get('method', '?'), verbose)}"
    text += _settings(parameters, verbose) if isinstance(parameters, dict) else ""
    listed = children if isinstance(children, list) else []
    return _Branch(text, [_node(child, inputs, told, verbose) for child in listed])


def _input(entry: Mapping[str, Any], before: str, verbose: bool, *, after: str = "", known: bool = False) -> _Branch:
    hashed = entry["hash"] if verbose else entry["hash"].removeprefix("xxh3_128:")[:8]
    cut = " (how it was made is left out)" if entry.get("cut") is True and not known else ""
    found = _Branch(f"{before}{printable(entry['name'])}{after}  {hashed}{cut}")
    if "made" in entry and not known:
        found.children.append(_made(entry["made"], verbose))
    return found


def _settings(settings: Mapping[str, Any], verbose: bool) -> str:
    return "".join(f", {printable(str(k))} {_value(v, verbose)}" for k, v in settings.items())


def _value(value: Any, verbose: bool) -> str:
    """A setting, as short as it can be said."""
    if isinstance(value, bool) or value is None:
        text = json.dumps(value)
    elif isinstance(value, float):
        text = f"{value:g}"
    elif isinstance(value, list):
        text = "[" + ", ".join(_value(v, verbose) for v in value) + "]"
    elif isinstance(value, dict) and {"default", "blocks"} <= value.keys():
        one_less = "1 − " if value.get("complement") is True else ""
        text = f"{one_less}{_value(value['default'], verbose)} ({value['blocks']})"
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    text = printable(text)
    return text if verbose or len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
