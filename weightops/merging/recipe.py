"""What the user asked for: a small tree of models, LoRAs and merge methods, with their settings. Opens no file."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from weightops.errors import UsageError
from weightops.merging.method import METHODS, MergeMethod

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint. ema: its averaged weights (model_ema.*) stand for the others. to: the model, as it lies, to which
    its channels are matched first (git re-basin)."""

    file: str
    ema: bool = False
    to: Model | None = None


@dataclass(frozen=True, slots=True)
class Lora:
    """What a LoRA of any family adds to a model."""

    file: str


@dataclass(frozen=True, slots=True)
class Varied:
    """A setting that differs from tensor to tensor: `spec` in the words of --blocks, and `default` for the others.

    complement: it is 1 less that number, of `spec` and of `default`. where: it was said, in messages.
    """

    default: float
    spec: str
    complement: bool = False
    where: str = field(default="--blocks", compare=False)

    @property
    def otherwise(self) -> float:
        """The number of tensors of which `spec` does not speak."""
        return 1.0 - self.default if self.complement else self.default


@dataclass(frozen=True, slots=True)
class Merge:
    """A method, its inputs in the order of its signature, and all its settings, of which numbers may be Varied.

    statistics: a file for each of the inputs under the method's star, where it needs such.
    """

    method: MergeMethod
    inputs: tuple[Node, ...]
    parameters: Mapping[str, Any]
    statistics: tuple[str, ...] = ()


Node = Model | Lora | Merge


@dataclass(frozen=True, slots=True)
class Recipe:
    """A tree, and what is said of its output as a whole. like: the model whose keys, dtypes and metadata it takes.

    vae, text_encoder: the number of one of `models`, "merge", or for the VAE a file. numbered: the models that these
    numbers mean, in order.
    """

    root: Node
    like: Model
    numbered: tuple[Model, ...]
    vae: str = "1"
    text_encoder: str = "merge"
    dtype: str = "keep"
    drop: tuple[str, ...] = ()
    on_mismatch: str = "error"
    seed: int = 0


def merged(
    name: str, inputs: Sequence[Node], settings: Mapping[str, Any] | None = None, *, statistics: Sequence[str] = ()
) -> Merge:
    """A method applied to these. Raises UsageError for what it does not take."""
    method = METHODS.get(name)
    given = dict(settings or {})
    # A setting that differs from tensor to tensor is checked by its values, once these are known.
    plain = {key: _plain(value) for key, value in given.items()}
    values = method.check(plain, len(inputs))
    values |= {key: value for key, value in given.items() if plain[key] is not value}
    if method.needs_statistics and len(statistics) != len(inputs) - method.fixed:
        what = f"found {len(statistics)} files of statistics for {len(inputs) - method.fixed} models"
        raise UsageError(method.name, f"{what}, expected one for each")
    if statistics and not method.needs_statistics:
        raise UsageError(method.name, "takes no statistics")
    found = Merge(method, tuple(inputs), values, tuple(statistics))
    kind_of(found)
    return found


def _plain(value: Any) -> Any:
    """The setting with numbers in place of what differs from tensor to tensor."""
    if isinstance(value, Varied):
        return value.otherwise
    if isinstance(value, (tuple, list)) and any(isinstance(v, Varied) for v in value):
        return tuple(_plain(v) for v in value)
    return value


def kind_of(node: Node) -> str:
    """`model`, or `delta`: a difference of models, or what a LoRA adds. Raises UsageError where they are mixed up."""
    if isinstance(node, Model):
        return "model"
    if isinstance(node, Lora):
        return "delta"
    kinds = [kind_of(child) for child in node.inputs]
    for number, (child, kind) in enumerate(zip(node.inputs, kinds, strict=True)):
        role = node.method.role(number)
        wanted = {"Tensor": "model", "Delta": "delta"}.get(role, kinds[0])
        if kind != wanted:
            raise UsageError(node.method.name, _mixed_up(child, kind, wanted, role), _HINTS[wanted])
    return {"Tensor": "model", "Delta": "delta"}.get(node.method.result, kinds[0])


_WORDS = {"model": "a model", "delta": "a difference"}
_HINTS = {
    "delta": "difference: [model, base] makes one of two models; or say which base",
    "model": "add: [model, difference] makes a model of it",
}


def _mixed_up(child: Node, kind: str, wanted: str, role: str) -> str:
    what = child.method.name if isinstance(child, Merge) else repr(child.file)
    if role == "Either":
        return f"takes models or differences, all alike, found both: {what} is {_WORDS[kind]}"
    return f"takes {_WORDS[wanted]} there, found {_WORDS[kind]}: {what}"


def over(base: Node, name: str, inputs: Sequence[Node], settings: Mapping[str, Any], strength: Any = 1.0, *,
         statistics: Sequence[str] = ()) -> Merge:  # fmt: skip
    """base + strength · method(inputs − base): a method of differences, applied to models and LoRAs over a base."""
    deltas = [merged("difference", (child, base)) if kind_of(child) == "model" else child for child in inputs]
    return merged("add", (base, merged(name, deltas, settings, statistics=statistics)), {"weights": (strength,)})


def leaves(node: Node) -> Iterator[Model | Lora]:
    """Models and LoRAs, from left to right, as often as they stand there."""
    if isinstance(node, Merge):
        for child in node.inputs:
            yield from leaves(child)
    else:
        yield node


def merges(node: Node) -> Iterator[Merge]:
    """All methods of a tree, those first whose results others need."""
    if isinstance(node, Merge):
        for child in node.inputs:
            yield from merges(child)
        yield node


def models_of(root: Node) -> tuple[Model, ...]:
    """The models of a tree in their order, each once; those that others are compared with, the bases, come last."""
    found = dict.fromkeys(leaf for leaf in leaves(root) if isinstance(leaf, Model))
    bases = bases_of(root)
    return (*(m for m in found if m not in bases), *(m for m in found if m in bases))


def bases_of(root: Node) -> set[Model]:
    """The models of a tree that others are compared with."""
    return {
        leaf
        for node in merges(root)
        for place, child in zip(node.method.models, node.inputs, strict=False)
        if place == "base"
        for leaf in leaves(child)
        if isinstance(leaf, Model)
    }


def references_of(recipe: Recipe) -> tuple[Model, ...]:
    """The models to which others are matched, and which are nothing else in the recipe."""
    models = [leaf for leaf in leaves(recipe.root) if isinstance(leaf, Model)]
    found = dict.fromkeys(model.to for model in models if model.to is not None)
    return tuple(model for model in found if model not in models and model != recipe.like)


def renumbered(recipe: Recipe) -> Recipe:
    """The same with its models numbered as `models_of` has them; one that is not in the tree follows, if it is meant.

    So recipes that mean the same are the same, whoever numbered their models.
    """
    words = (recipe.vae, recipe.text_encoder)
    meant = [recipe.numbered[int(word) - 1] for word in words if word.isdecimal()]
    numbered = tuple(dict.fromkeys([*models_of(recipe.root), *meant]))
    numbers = [str(numbered.index(recipe.numbered[int(word) - 1]) + 1) if word.isdecimal() else word for word in words]
    return replace(recipe, numbered=numbered, vae=numbers[0], text_encoder=numbers[1])
