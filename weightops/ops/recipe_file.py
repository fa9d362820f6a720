"""Recipes as YAML: text into a tree of merge methods, every mistake with its line. Opens no file.

    models:                     # names, for files or for any node; all of them stand somewhere
      a: a.safetensors
      base: hf://owner/name/model.safetensors
      sharp: {ties: [a, b.safetensors, c.safetensors], base: base, density: 0.3}
    merge:                      # the tree
      add:
        - sharp
        - {lora: style.safetensors, strength: 0.6}
        - {difference: [d.safetensors, e.safetensors], strength: -0.3}
    vae: f.safetensors          # whose VAE is kept: a model's name or number, a file, or merge
    text_encoder: merge         # merge, or a model's name or number
    dtype: bf16                 # keep, fp32, fp16, bf16, fp8_e4m3, fp8_e5m2
    drop: [ema]                 # components to leave out
    on_mismatch: error          # or keep-first
    seed: 0                     # of methods that draw
    like: a                     # the model whose keys, dtypes and metadata the output has

Only `merge` must be there. Models are numbered from 1 in the order in which the tree has them, bases last: a base is
what another model is compared with. `like` is number 1, and `vae` is the number of `like`, unless they are said.

A node is one of these:

    a.safetensors               a name under models, else a file
    {model: FILE, ema: true, rebasin: NODE}
                                a model: with the averages of its weights (model_ema.*) in their place; with its
                                channels matched to another model's first, which lies as it is
    {lora: FILE, strength: X}   what a LoRA adds
    {METHOD: [NODE, …], SETTING: VALUE, …}
                                a method with its models in their order; one alone needs no brackets

FILE is a file, or the name of one. Relative ones lie beside the recipe; ./x is a file even where x is a name.
Beside the settings of its method, which come first where two have one name, the last kind of node takes

    base: NODE                  of a method that takes a `base`: that model, which is then not in the list (where the
                                list is open, it must be said so); of one that takes differences: base is taken from
                                every model in the list, and the result is added to base
    strength: X                 of a node that is a difference, or is added to a base: how much of it
    alpha: X                    weights 1 − X and X of two models; of a method that takes a base, the last weight; where
                                the result is added to a base, its strength
    weights: [X, …]             one for each model, but for those that the method takes by name
    statistics: [FILE, …]       likewise, for methods that weigh by such

In add and sum, a strength multiplies the weight of what it belongs to; elsewhere it means {sum: [NODE], weights: [X]}.
X, like every setting that is a number, may be numbers for blocks, as `weightops.naming.blocks` reads them, with one for
all other tensors: where none is said, the setting's own default, that of --alpha, or 1.

    IN00-IN05=0.3, OUT=0.6      a text as for --blocks
    [0, 0.1, 0.2, …]            a list
    {IN00-IN05: 0.3, attn: GRAD_V, default: 0.5}
    {blocks: "IN00-IN05=0.3", default: 0.5}
"""

from __future__ import annotations

import contextlib
import difflib
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from weightops.errors import UsageError, quote
from weightops.files.dtypes import DTYPE_WORDS
from weightops.merging.recipe import Lora, Model, Recipe, kind_of, models_of
from weightops.naming.identify import DROPPABLE
from weightops.ops.recipe_node import NODES, Application, Part, number
from weightops.ops.recipe_text import NAME, default_vae, recipe_text
from weightops.ops.recipe_words import drawn, in_words
from weightops.ops.yaml_lines import MAX_DEPTH, Said, check_keys, read_yaml, refused

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightops.merging.recipe import Node

__all__ = ["drawn", "in_words", "parse_recipe", "recipe_text"]

_KEYS = ("models", "merge", "vae", "text_encoder", "dtype", "drop", "on_mismatch", "seed", "like")


def parse_recipe(text: str, *, label: str, folder: Path) -> Recipe:
    """The recipe that a YAML text says. label: what begins a message. folder: where relative files are looked for.

    Raises UsageError, "label, line N: what is wrong", for everything that cannot be meant.
    """
    root = read_yaml(text, label)
    if root.value is None:
        raise refused(label, root.line, "found nothing, expected merge: and a tree of models")
    if not isinstance(root.value, dict):
        raise refused(label, root.line, f"found {root.shown}, expected keys with values: merge, models, …")
    check_keys(label, root, _KEYS, "of a recipe")
    if "merge" not in root.value:
        raise refused(label, root.line, "has no merge", "merge: begins the tree of models")
    reader = _Reader(label, folder, root.value.get("models"))
    top = reader.part(root.value["merge"])
    if kind_of(top.node) != "model":
        hint = "add: [model, difference] makes a model of it"
        raise refused(label, top.line, "the result is a difference, expected a model", hint)
    return reader.recipe(top.node, root.value)


class _Reader:
    """The state of reading one recipe: its names, and what they turned out to be."""

    def __init__(self, label: str, folder: Path, said: Said | None) -> None:
        self.label = label
        self.folder = folder
        self.names: Mapping[str, Said] = {}
        self.lines: Mapping[str, int] = {}
        self._found: dict[str, Part] = {}
        self._open: list[str] = []  # names that are being read: none of them may stand in itself
        self._depth = 0
        if said is not None:
            if not isinstance(said.value, dict):
                raise self._refused(said.line, f"found {said.shown} under models, expected names, each with what it is")
            self.names, self.lines = said.value, said.lines
        for name, line in self.lines.items():
            if not NAME.fullmatch(name) or name.isdecimal() or name == "merge":
                hint = "a name is letters, digits, and _ . + - after the first; no number, and not merge"
                raise self._refused(line, f"{quote(name)} cannot be a name", hint)

    def _refused(self, line: int, what: str, hint: str | None = None) -> UsageError:
        return refused(self.label, line, what, hint)

    # -------------------------------------------------------------- nodes

    def part(self, said: Said) -> Part:
        """The node that is said here."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._refused(said.line, f"the tree is more than {MAX_DEPTH} deep")
        found = self._part(said)
        self._depth -= 1
        return found

    def _part(self, said: Said) -> Part:
        if isinstance(said.value, str):
            if said.value in self.names:
                return replace(self._named(said.value, said.line), line=said.line)
            return Part(Model(self._path(said, said.value)), said.line)
        if not isinstance(said.value, dict):
            hint = "in quotes it is a name, or a file" if isinstance(said.value, (bool, int, float)) else None
            raise self._refused(said.line, f"found {said.shown}, expected {NODES}", hint)
        if "model" in said.value:
            return self._model(said, said.value)
        if "lora" in said.value:
            return self._lora(said, said.value)
        return Application(self, said, said.value).part()

    def _named(self, name: str, line: int) -> Part:
        if name in self._open:
            raise self._refused(line, f"{name!r} is made of itself: {' → '.join((*self._open, name))}")
        if name not in self._found:
            self._open.append(name)
            self._found[name] = self._part(self.names[name])
            self._open.pop()
        return self._found[name]

    def _model(self, said: Said, entries: Mapping[str, Said]) -> Part:
        if "strength" in entries:
            hint = "weights: of a method has one for each model"
            raise self._refused(said.lines["strength"], "a model has no strength, a difference or a LoRA has", hint)
        check_keys(self.label, said, ("model", "ema", "rebasin"), "of a model")
        ema = entries.get("ema", Said(said.line, False))
        if not isinstance(ema.value, bool):
            raise self._refused(ema.line, f"ema: found {ema.shown}, expected true or false")
        to = self._reference(entries["rebasin"]) if "rebasin" in entries else None
        return Part(Model(self.file(entries["model"]), ema.value, to), said.line)

    def _reference(self, said: Said) -> Model:
        """The model to which another's channels are matched."""
        node = self.part(said).node
        if not isinstance(node, Model) or node.to is not None:
            what = "a model that is itself matched to another" if isinstance(node, Model) else "no model"
            raise self._refused(said.line, f"rebasin: found {what}, expected a model whose channels stay")
        return node

    def _lora(self, said: Said, entries: Mapping[str, Said]) -> Part:
        check_keys(self.label, said, ("lora", "strength"), "of a LoRA")
        strength = number(self.label, entries["strength"], "strength", 1.0) if "strength" in entries else 1.0
        return Part(Lora(self.file(entries["lora"])), said.line, strength=strength)

    # -------------------------------------------------------------- files

    def file(self, said: Said) -> str:
        """A file, or what the name of one stands for."""
        if isinstance(said.value, str) and said.value in self.names:
            node = self._named(said.value, said.line).node
            if not isinstance(node, Model) or node != Model(node.file):
                what = f"found {said.shown}, which names more than a file, expected a file or the name of one"
                raise self._refused(said.line, what)
            return node.file
        if not isinstance(said.value, str):
            hint = "in quotes it is a file" if isinstance(said.value, (bool, int, float)) else None
            raise self._refused(said.line, f"found {said.shown}, expected a file", hint)
        return self._path(said, said.value)

    def _path(self, said: Said, text: str) -> str:
        if not text:
            raise self._refused(said.line, "found an empty text, expected a file")
        if text.startswith("hf://") or Path(text).is_absolute():
            return text
        if text.startswith("~/"):
            return str(Path(text).expanduser())
        path = text.removeprefix("./")
        path = path if self.folder == Path() else str(self.folder / path)
        near = difflib.get_close_matches(text, self.names, n=1) if re.fullmatch(r"[\w-]+", text) else []
        if near and not _exists(path):
            what = f"found {said.shown}, no name under models and no file"
            raise self._refused(said.line, what, f"did you mean {near[0]!r}?")
        return path

    # -------------------------------------------------------------- the recipe as a whole

    def recipe(self, root: Node, entries: Mapping[str, Said]) -> Recipe:
        """The tree, and what is said of its output."""
        numbered = models_of(root)
        like = self._like(entries) or numbered[0]
        recipe = Recipe(
            root,
            like,
            numbered,
            vae=self._whose("vae", entries, numbered) or default_vae(like, numbered),
            text_encoder=self._whose("text_encoder", entries, numbered) or "merge",
            dtype=self._word("dtype", entries, ("keep", *DTYPE_WORDS)),
            drop=self._drop(entries),
            on_mismatch=self._word("on_mismatch", entries, ("error", "keep-first")),
            seed=self._seed(entries),
        )
        if "vae" in recipe.drop and recipe.vae != "merge" and not recipe.vae.isdecimal():
            raise self._refused(entries["drop"].line, f"drops the VAE that vae takes from {quote(recipe.vae)}")
        for name, line in self.lines.items():
            if name not in self._found:
                raise self._refused(line, f"{name!r} stands nowhere in the recipe", "take it out, or put # before it")
        return recipe

    def _like(self, entries: Mapping[str, Said]) -> Model | None:
        if "like" not in entries:
            return None
        found = self.part(entries["like"])
        if not isinstance(found.node, Model):
            raise self._refused(found.line, "like: found a tree, expected a model")
        return found.node

    def _whose(self, key: str, entries: Mapping[str, Said], numbered: Sequence[Model]) -> str | None:
        """merge, the number of a model, or for the VAE a file; None where nothing is said."""
        if key not in entries:
            return None
        said = entries[key]
        text = str(said.value) if type(said.value) in (int, str) else ""
        if text == "merge":
            return text
        if re.fullmatch(r"-?\d+", text):
            if not 1 <= int(text[:9]) <= len(numbered):
                known = ", ".join(f"{n} is {model.file}" for n, model in enumerate(numbered[:5], 1))
                what = f"{key}: there is no model {text[:20]}, expected 1 to {len(numbered)}"
                raise self._refused(said.line, what, known)
            return str(int(text))
        if text and (key != "vae" or text in self.names):
            node = self.part(said).node
            if node in numbered:
                return str(numbered.index(node) + 1)
        if text and key == "vae":
            return self.file(said)
        known = "merge, the name or number of a model, or a file" if key == "vae" else "merge, or a model of the tree"
        raise self._refused(said.line, f"{key}: found {said.shown}, expected {known}")

    def _word(self, key: str, entries: Mapping[str, Said], known: Sequence[str]) -> str:
        """One of these; the first, where nothing is said."""
        if key not in entries:
            return known[0]
        said = entries[key]
        if not isinstance(said.value, str) or said.value not in known:
            raise self._refused(said.line, f"{key}: found {said.shown}, expected {', '.join(known)}")
        return said.value

    def _drop(self, entries: Mapping[str, Said]) -> tuple[str, ...]:
        said = entries.get("drop", Said(1, ()))
        found = said.value if isinstance(said.value, tuple) else (said,)
        return tuple(self._word("drop", {"drop": each}, DROPPABLE) for each in found)

    def _seed(self, entries: Mapping[str, Said]) -> int:
        said = entries.get("seed", Said(1, 0))
        if isinstance(said.value, bool) or not isinstance(said.value, int) or said.value < 0:
            raise self._refused(said.line, f"seed: found {said.shown}, expected a whole number from 0 on")
        return said.value


def _exists(path: str) -> bool:
    with contextlib.suppress(OSError, ValueError):  # too long a name, or one with a null: opening it will tell
        return Path(path).exists()
    return False
