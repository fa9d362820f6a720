"""The recipe of a merge, as it stands in a file's metadata, as a Recipe again. Trusts nothing that it reads.

What it names as a file is the number of an input, never a path.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.errors import FormatError, UsageError, quote
from weightops.merging.recipe import Lora, Model, Node, Recipe, Varied, kind_of, leaves, merged, merges, references_of
from weightops.ops.merge import check_recipe
from weightops.ops.replay_fields import Fields, is_number, is_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LARGEST = 10_000  # nodes of a tree


def read_tree(fields: Fields, count: int) -> tuple[tuple[str, ...], Callable[[Sequence[str]], Recipe]]:
    """What each input of a merge is, and the recipe of it, given the files. Raises FormatError."""
    if "merge" not in fields.said and "method" in fields.said:
        what = "its recipe is of an earlier version, which had no trees of methods: there is no replay of it"
        raise FormatError(fields.label, what)
    reader = _Tree(fields, count)
    tree, numbered = fields.table("merge"), fields.wholes("numbered")
    like, averaged = fields.whole("like"), fields.flag("like_ema", False)
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
        first = reader.model(like, files, (averaged, None, False))  # it may stand outside of the tree
        models = [reader.model(number, files) for number in numbered]
        given = reader.file(file, files, "vae") if file is not None else vae
        return Recipe(root, first, tuple(models), given, text_encoder, dtype, tuple(drop), on_mismatch, seed)

    try:
        check_recipe(reader.checked(recipe([f"input {n}" for n in range(count)])))
    except UsageError as e:
        raise fields.refused(f"its recipe asks for what merge refuses: {e}") from None
    return tuple(reader.kinds[n] for n in range(count)), lambda files: recipe(reader.labels(files))


class _Tree:
    """Reads a tree of methods. kinds: what each input is; models: by number, what is said of each."""

    def __init__(self, fields: Fields, count: int) -> None:
        self.fields = fields
        self.count = count
        self.kinds: dict[int, str] = {}
        self.models: dict[int, tuple[bool, int | None, bool]] = {}
        self.nodes = 0

    def file(self, number: Any, files: Sequence[str], kind: str) -> str:
        if not is_whole(number) or not 0 <= number < self.count:
            raise self.fields.refused(f"its recipe names input {quote(number, 30)}, expected 0 to {self.count - 1}")
        if self.kinds.setdefault(number, kind) != kind:
            raise self.fields.refused(f"its recipe takes input {number} for two things")
        found: str = files[number]
        return found

    def model(
        self, number: Any, files: Sequence[str], said: tuple[bool, int | None, bool] = (False, None, False)
    ) -> Model:
        """The model, as it was described first."""
        file = self.file(number, files, "checkpoint")
        ema, to, of_averages = self.models.setdefault(number, said)
        return Model(file, ema, None if to is None else Model(self.file(to, files, "checkpoint"), of_averages))

    def node(self, said: Any, files: Sequence[str]) -> Node:
        self.nodes += 1
        if self.nodes > _LARGEST or not isinstance(said, dict):
            what = "is too large" if isinstance(said, dict) else f"has {quote(said, 60)} in place of a model or method"
            raise self.fields.refused(f"the tree of its recipe {what}")
        fields = Fields(self.fields.label, {**said, "version": self.fields.said["version"]}, {"version"})
        found: Node
        if "model" in said:
            number, to = fields.whole("model"), fields.whole("rebasin", None)
            own = fields.flag("ema", False), to, to is not None and fields.flag("rebasin_ema", False)
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
        if value is None or not (isinstance(value, (bool, str)) or is_number(value)):
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
        seen += [model.file for model in references_of(recipe)]
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
