"""A tree of merge methods as people read it: a formula in one line, and a drawing. Knows no YAML, prints nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from weightops.errors import printable
from weightops.merging.recipe import Lora, Merge, Model, Node, Varied

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from weightops.merging.recipe import Recipe

# What stands on one line, and what stands below it.
Drawn = tuple[str, "tuple[Drawn, ...]"]

_LONGEST_SPEC = 40  # characters of numbers for blocks, in a formula

# Methods that are sums: their formula is written out.
_SUMS = ("weighted_sum", "add_difference", "add", "sum")


# ------------------------------------------------------------------------------------------------ a formula


def in_words(recipe: Recipe, names: Mapping[str, str]) -> str:
    """The tree as a formula: `0.3·a + 0.7·b`, `base + ties(a − base, b − base; density 0.3) + 0.6·style`.

    names: of files; one that has none is called as it is.
    """
    return _formula(recipe.root, names)


def _formula(node: Node, names: Mapping[str, str]) -> str:
    if not isinstance(node, Merge):
        return _leaf(node, names)
    if node.method.name == "difference":
        return f"{_formula(node.inputs[0], names)} − {_factor(node.inputs[1], names)}"
    if node.method.name in _SUMS:
        return _sum(node, names)
    settings = [said for said in _settings(node, names, all_of_them=False) if said]
    inputs = ", ".join(_formula(child, names) for child in node.inputs)
    return f"{node.method.name}({'; '.join((inputs, *settings))})"


def _leaf(node: Model | Lora, names: Mapping[str, str]) -> str:
    name = names.get(node.file, node.file)
    if isinstance(node, Model) and node.to is not None:
        name = f"rebasin({name}; to {_leaf(node.to, names)})"
    return f"ema({name})" if isinstance(node, Model) and node.ema else name


def _factor(node: Node, names: Mapping[str, str]) -> str:
    """The formula, in brackets where it is a sum or a difference."""
    said = _formula(node, names)
    return f"({said})" if isinstance(node, Merge) and node.method.name in (*_SUMS, "difference") else said


def _sum(node: Merge, names: Mapping[str, str]) -> str:
    weights = node.parameters["weights"]
    if node.method.name == "weighted_sum":
        weights = _shares(weights, node.parameters["normalize"])
    inputs = [_factor(child, names) for child in node.inputs]
    if node.method.name == "add_difference":
        inputs = [inputs[0], *(f"({each} − {inputs[0]})" for each in inputs[1:])]
    if node.method.fixed:  # what the others are added to: no brackets need stand around it
        inputs[0], weights = _formula(node.inputs[0], names), (1.0, *weights)
    said = ""
    for body, weight in zip(inputs, weights, strict=True):
        negative = isinstance(weight, float) and weight < 0
        sign = (" − " if negative else " + ") if said else ("−" if negative else "")
        said += f"{sign}{_coefficient(weight)}{body}"
    return said


def _shares(weights: Sequence[Any], normalize: bool) -> Sequence[Any]:
    """The weights as they are applied; numbers for blocks as they were said."""
    if not normalize or any(isinstance(w, Varied) for w in weights):
        return weights
    total = math.fsum(weights)
    return tuple(w / total for w in weights)


def _coefficient(weight: Any) -> str:
    """A weight before what it belongs to, without its sign; nothing, where it is 1."""
    if isinstance(weight, Varied):
        spec = printable(weight.spec)
        spec = spec if len(spec) <= _LONGEST_SPEC else f"{spec[: _LONGEST_SPEC - 1]}…"
        said = f"[{spec}; else {weight.default:.6g}]"
        return f"(1 − {said})·" if weight.complement else f"{said}·"
    return "" if abs(weight) == 1.0 else f"{abs(weight):.6g}·"


# ------------------------------------------------------------------------------------------------ a drawing


def drawn(recipe: Recipe) -> Drawn:
    """The tree, a line for each node, and one for a difference of two models: its text, and the nodes below it."""
    return _drawn(recipe.root, "")


def _drawn(node: Node, before: str) -> Drawn:
    if not isinstance(node, Merge):
        return f"{before}{'LoRA ' * isinstance(node, Lora)}{_leaf(node, {})}", ()
    if node.method.name == "difference" and not any(isinstance(child, Merge) for child in node.inputs):
        return (f"{before}({_formula(node, {})})" if before else _formula(node, {})), ()
    settings = [said for said in _settings(node, {}, all_of_them=True) if said]
    places = [*node.method.models, *("" for _ in node.inputs)]
    weights = node.parameters.get("weights", ())
    below = []
    for number, child in enumerate(node.inputs):
        of_star = number - node.method.fixed
        said = "base: " if places[number] == "base" else ""
        if weights and of_star >= 0 and weights[of_star] != 1.0:
            said = f"{_said(weights[of_star])} × "
        below.append(_drawn(child, said))
    return before + ", ".join((node.method.name, *settings)), tuple(below)


# ------------------------------------------------------------------------------------------------ settings


def _settings(node: Merge, names: Mapping[str, str], *, all_of_them: bool) -> Iterator[str]:
    """`density 0.3`: all settings but weights, or those that differ from their defaults, weights among them."""
    for parameter in node.method.parameters:
        value = node.parameters[parameter.name]
        if parameter.kind == "Weights":
            if not all_of_them and any(weight != 1.0 for weight in value):
                yield f"{parameter.name} {', '.join(_said(weight) for weight in value)}"
        elif all_of_them or parameter.default is None or value != parameter.default:
            yield f"{parameter.name} {_said(value)}"
    if node.statistics:
        yield f"statistics {', '.join(names.get(file, file) for file in node.statistics)}"


def _said(value: Any) -> str:
    if isinstance(value, Varied):
        said = f"[{printable(value.spec)}; else {value.default:.6g}]"
        return f"(1 − {said})" if value.complement else said
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
