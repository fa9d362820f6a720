"""What a merge says of itself: its formula in words, and the recipe that stands in the file's metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.merging.recipe import Lora, Merge, Model, Varied, leaves, merges, references_of, renumbered
from weightops.ops import recipe_words
from weightops.ops.produce import stem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightops.files.checkpoint import Checkpoint
    from weightops.merging.recipe import Node, Recipe


def in_words(recipe: Recipe, opened: Mapping[str, Checkpoint]) -> str:
    """The formula with the files' own names: people read alpha both ways."""
    files = list(dict.fromkeys(leaf.file for leaf in (*leaves(recipe.root), *references_of(recipe))))
    names = {file: stem(opened[file]) for file in files}
    if len(set(names.values())) < len(names):  # x/model and y/model
        names = {file: opened[file].label for file in files}
    root = recipe.root
    if isinstance(root, Merge) and all(isinstance(child, Model) for child in root.inputs):
        own = [names[child.file] for child in root.inputs if isinstance(child, Model)]
        weights = root.parameters.get("weights", ())
        if not any(isinstance(w, Varied) for w in weights):
            if root.method.name == "weighted_sum":
                return _sum_in_words(own, weighted(weights, root.parameters["normalize"]))
            if root.method.name == "add_difference":
                return _difference_in_words(own, weights)
    return recipe_words.in_words(recipe, names)


def weighted(weights: Sequence[float], normalize: bool) -> tuple[float, ...]:
    """The weights that a weighted sum has."""
    total = sum(weights) if normalize else 1.0
    return tuple(w / total for w in weights)


def _difference_in_words(names: Sequence[str], weights: Sequence[float]) -> str:
    base, others = names[0], names[1:]
    start = base
    if len(others) > 1 and weights[0] == 1:  # a + α(b − c), as everyone writes it
        start, others, weights = others[0], others[1:], weights[1:]
    return start + "".join(
        f" {'+' if w >= 0 else '−'} {abs(w):.6g} × ({n} − {base})" for n, w in zip(others, weights, strict=True)
    )


def _sum_in_words(names: Sequence[str], weights: Sequence[float]) -> str:
    signs = [("" if w >= 0 else "−") if i == 0 else ("+ " if w >= 0 else "− ") for i, w in enumerate(weights)]
    return " ".join(f"{s}{abs(w):.6g} × {n}" for s, w, n in zip(signs, weights, names, strict=True))


def said(
    recipe: Recipe, numbers: Mapping[str, int], models: Sequence[Model], references: Mapping[Model, int]
) -> dict[str, Any]:
    """The recipe as it is written down: models as their places among `models`, which the inputs begin with.

    numbers: of other files among the inputs; references: of models to which others are matched, and no more.
    """
    recipe = renumbered(recipe)

    def of(node: Node) -> Any:
        if isinstance(node, Model):
            extra: dict[str, Any] = {"ema": True} if node.ema else {}
            if node.to is not None:
                extra["rebasin"] = references[node.to] if node.to in references else models.index(node.to)
                extra |= {"rebasin_ema": True} if node.to.ema else {}
            return {"model": models.index(node), **extra}
        if isinstance(node, Lora):
            return {"lora": numbers[node.file]}
        found: dict[str, Any] = {"method": node.method.name, "inputs": [of(child) for child in node.inputs]}
        found["parameters"] = {key: _setting(value) for key, value in node.parameters.items()}
        if node.statistics:
            found["statistics"] = [numbers[file] for file in node.statistics]
        return found

    # Of one that stands in the tree, the tree says it.
    averaged = {"like_ema": True} if recipe.like.ema and recipe.like not in leaves(recipe.root) else {}
    return {
        "command": "merge",
        "version": __version__,
        "merge": of(recipe.root),
        "like": models.index(recipe.like),
        **averaged,
        "numbered": [models.index(m) for m in recipe.numbered],
        "vae": recipe.vae if recipe.vae == "merge" or recipe.vae.isdecimal() else {"file": numbers[recipe.vae]},
        "text_encoder": recipe.text_encoder,
        "dtype": recipe.dtype,
        "drop": list(recipe.drop),
        "on_mismatch": recipe.on_mismatch,
        **({"seed": recipe.seed} if any(node.method.draws for node in merges(recipe.root)) else {}),
    }


def _setting(value: Any) -> Any:
    if isinstance(value, Varied):
        found = {"default": value.default, "blocks": value.spec}
        return {**found, "complement": True} if value.complement else found
    return [_setting(v) for v in value] if isinstance(value, tuple) else value
