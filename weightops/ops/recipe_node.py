"""A node of a recipe file that is a method: its inputs, weights and settings, every mistake with its line."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from weightops.errors import UsageError, quote
from weightops.merging.method import METHODS
from weightops.merging.recipe import Node, Varied, kind_of, merged, over
from weightops.naming.blocks import parse_blocks
from weightops.ops.yaml_lines import MAX_DEPTH, Said, check_keys, nearest, refused

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from weightops.merging.method import MergeMethod, Parameter

MAX_NODES = 2_000  # of a tree, with what has a name counted as often as it stands there

NODES = "a name, a file, {model: FILE}, {lora: FILE} or {METHOD: [inputs]}"

# What a node may say beside the settings of its method.
_BESIDE = ("base", "strength", "alpha", "statistics")


@dataclass(frozen=True, slots=True)
class Part:
    """A node, where it stands, how large and deep it is, and the strength at which it is to be added."""

    node: Node
    line: int
    size: int = 1
    depth: int = 1
    strength: float | Varied = 1.0


class Reader(Protocol):
    """Reads what is not a method."""

    label: str

    def part(self, said: Said) -> Part: ...

    def file(self, said: Said) -> str: ...


class Application:
    """A method with its inputs and settings, as one node says them."""

    def __init__(self, reader: Reader, said: Said, entries: Mapping[str, Said]) -> None:
        self.reader = reader
        self.said = said
        self.entries = entries
        self.key = self._method_key()
        self.line = said.lines[self.key]
        self.method: MergeMethod = METHODS.get(self.key)
        self.settings = {p.name: p for p in self.method.parameters}
        known = (*self.settings, *_BESIDE)
        for key, line in said.lines.items():
            if key != self.key and key not in known:
                hint = "a node has one method" if key in _methods() else nearest(key, known)
                raise self._refused(line, f"{self.key} has no setting {quote(key)}", hint)

    def _refused(self, line: int, what: str, hint: str | None = None) -> UsageError:
        return refused(self.reader.label, line, what, hint)

    def _method_key(self) -> str:
        methods = _methods()
        for key in self.entries:
            if key in methods:
                return key
        others = [key for key in self.entries if key not in (*_BESIDE, "weights")]
        if not others:
            raise self._refused(self.said.line, f"found no method, expected {NODES}")
        near = difflib.get_close_matches(others[0], [*methods, "model", "lora"], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "weightops merge --list-methods shows them"
        raise self._refused(self.said.lines[others[0]], f"unknown merge method {quote(others[0])}", hint)

    def part(self) -> Part:
        """The node. Raises UsageError."""
        given = self.entries[self.key]
        parts = [self.reader.part(s) for s in (given.value if isinstance(given.value, tuple) else (given,))]
        values = {k: self._setting(self.settings[k], s) for k, s in self.entries.items() if k in self.settings}
        base = self._base()
        apart = base if not self.method.needs_base else None
        if base is not None and apart is None:
            parts.insert(self.method.models.index("base"), base)
        size, depth = self._measured(parts, apart)
        strength = self._strength(values, len(parts), apart=apart is not None)
        statistics = self._statistics()
        try:
            nodes = self._weighed(parts, values)
            if apart is not None:
                node = over(apart.node, self.key, nodes, values, strength, statistics=statistics)
                return Part(node, self.said.line, size, depth)
            node = merged(self.key, nodes, values, statistics=statistics)
        except UsageError as e:
            raise self._told(e, parts) from None
        if "strength" in self.entries and "strength" not in self.settings and kind_of(node) != "delta":
            what = f"a model has no strength, and {self.key} makes one here; a difference or a LoRA has"
            raise self._refused(self.said.lines["strength"], what)
        return Part(node, self.said.line, size, depth, strength)

    def _measured(self, parts: Sequence[Part], apart: Part | None) -> tuple[int, int]:
        """How large and deep the tree gets, with what strengths and a base add to it at most."""
        every = [*parts, *([apart] if apart is not None else [])]
        size = 1 + sum(1 + part.size for part in parts)
        size += (1 + apart.size) * (1 + len(parts)) if apart is not None else 0
        depth = max((part.depth for part in every), default=0) + (2 if apart is None else 3)
        if size > MAX_NODES or depth > 2 * MAX_DEPTH:
            large = f"has more than {MAX_NODES:,} models, LoRAs and methods"
            what = large if size > MAX_NODES else f"is more than {2 * MAX_DEPTH} deep"
            raise self._refused(self.line, f"the tree {what}, what has a name counted each time")
        return size, depth

    def _told(self, e: UsageError, parts: Sequence[Part]) -> UsageError:
        """What a method finds wrong, with its line."""
        line = next((at for key, at in self.said.lines.items() if e.where == f"{self.key}, {key}"), self.line)
        if e.where == self.key and e.hint is not None:
            line = next(self._misfits(parts), line)
        what = e.what if e.where in ("", "--set") else f"{e.where}: {e.what}"
        return self._refused(line, what, e.hint and e.hint.replace("--no-normalize", "normalize: false"))

    def _misfits(self, parts: Sequence[Part]) -> Iterator[int]:
        """The lines of models where differences are meant, and of differences where models are."""
        kinds = [kind_of(part.node) for part in parts]
        for place, (part, kind) in enumerate(zip(parts, kinds, strict=True)):
            if kind != {"Tensor": "model", "Delta": "delta"}.get(self.method.role(place), kinds[0]):
                yield part.line

    def _base(self) -> Part | None:
        if "base" not in self.entries:
            if self.method.needs_base and self.method.is_open:
                raise self._refused(self.line, f"{self.key} needs a base", "base: FILE, beside the list")
            return None
        line = self.said.lines["base"]
        if not self.method.needs_base and "Tensor" in self.method.roles:
            raise self._refused(line, f"{self.key} takes no base")
        base = self.reader.part(self.entries["base"])
        if kind_of(base.node) != "model":
            raise self._refused(line, "base: found a difference, expected a model")
        return base

    # -------------------------------------------------------------- settings

    def _setting(self, parameter: Parameter, said: Said) -> Any:
        what = f"{self.key}, {parameter.name}"
        if parameter.kind == "Weights":
            if not isinstance(said.value, tuple):
                raise self._refused(said.line, f"{what}: found {said.shown}, expected a list, a number for each model")
            return tuple(number(self.reader.label, each, what, 1.0) for each in said.value)
        if parameter.kind == "bool":
            if not isinstance(said.value, bool):
                raise self._refused(said.line, f"{what}: found {said.shown}, expected true or false")
            return said.value
        return number(self.reader.label, said, what, parameter.default)

    def _strength(self, values: dict[str, Any], count: int, *, apart: bool) -> float | Varied:
        """How much of the result is meant. An alpha that is no setting of the method becomes this, or weights."""
        said = [key for key in ("strength", "alpha") if key in self.entries and key not in self.settings]
        if "alpha" in said and not apart:
            values["weights"] = self._weights_of_alpha(count - self.method.fixed)
            said.remove("alpha")
        if len(said) > 1:
            raise self._refused(self.said.lines["alpha"], "alpha: stands beside strength, which means the same here")
        return number(self.reader.label, self.entries[said[0]], said[0], 1.0) if said else 1.0

    def _weights_of_alpha(self, models: int) -> tuple[float | Varied, ...]:
        line = self.said.lines["alpha"]
        if "weights" not in self.settings:
            raise self._refused(line, f"{self.key} takes no alpha", nearest("alpha", [*self.settings, "base"]))
        if "weights" in self.entries:
            raise self._refused(line, "alpha: stands beside weights, expected one of the two")
        based = self.method.needs_base
        if models > 2 or (models < 2 and not based):
            raise self._refused(line, f"alpha: is for two models, found {models}", "weights: has one for each")
        last = number(self.reader.label, self.entries["alpha"], "alpha", 1.0 if based else 0.5)
        return (1.0, last)[2 - models :] if based else (rest_of(last), last)

    def _weighed(self, parts: Sequence[Part], values: dict[str, Any]) -> list[Node]:
        """The inputs; their strengths go into the weights of a sum, elsewhere a sum of one stands for them."""
        adds = self.key in ("add", "sum")
        fixed = self.method.fixed
        weights = list(values.get("weights", (1.0,) * (len(parts) - fixed))) if adds else []
        nodes: list[Node] = []
        for place, part in enumerate(parts, -fixed):
            node, product = part.node, None
            if 0 <= place < len(weights):
                product = _times(weights[place], part.strength)
            if product is not None:
                weights[place] = product
            elif part.strength != 1.0:
                node = merged("sum", (node,), {"weights": (part.strength,)})
            nodes.append(node)
        if adds:
            values["weights"] = tuple(weights)
        return nodes

    def _statistics(self) -> list[str]:
        if "statistics" not in self.entries:
            return []
        said = self.entries["statistics"]
        if not isinstance(said.value, tuple):
            raise self._refused(said.line, f"statistics: found {said.shown}, expected a list of files")
        return [self.reader.file(each) for each in said.value]


def _methods() -> list[str]:
    return [name for name, _ in METHODS]


def rest_of(alpha: float | Varied) -> float | Varied:
    """1 less this."""
    return replace(alpha, complement=True) if isinstance(alpha, Varied) else 1.0 - alpha


def _times(weight: float | Varied, strength: float | Varied) -> float | Varied | None:
    """The product; None where numbers for blocks would have to be multiplied."""
    if isinstance(strength, Varied):
        return strength if weight == 1.0 else None
    if isinstance(weight, Varied):
        return weight if strength == 1.0 else None
    return weight * strength


# ------------------------------------------------------------------------------------------------ numbers


def number(label: str, said: Said, what: str, default: float | None) -> float | Varied:
    """A number, or numbers for blocks. what: it is, in messages. default: of other blocks; None: it must be said."""
    if isinstance(said.value, str):
        return _varied(label, said, what, said.value, default)
    if isinstance(said.value, tuple):
        return _varied(label, said, what, ",".join(f"{_plain(label, s, what)!r}" for s in said.value), default)
    if not isinstance(said.value, dict):
        return _plain(label, said, what)
    entries = dict(said.value)
    if "default" in entries:
        default = _plain(label, entries.pop("default"), f"{what}, default")
    if not entries:
        raise refused(label, said.line, f"{what}: found no blocks, expected {{IN00-IN05: 0.3}} or the like")
    if "blocks" not in entries:
        rules = [f"{s}={v.value if isinstance(v.value, str) else _plain(label, v, what)}" for s, v in entries.items()]
        return _varied(label, said, what, ", ".join(rules), default)
    check_keys(label, said, ("blocks", "default"), f"of {what}")
    blocks = entries["blocks"]
    if not isinstance(blocks.value, (str, tuple)):
        raise refused(label, blocks.line, f"{what}, blocks: found {blocks.shown}, expected a text as for --blocks")
    return number(label, blocks, what, default)


def _plain(label: str, said: Said, what: str) -> float:
    if isinstance(said.value, bool) or not isinstance(said.value, (int, float)):
        raise refused(label, said.line, f"{what}: found {said.shown}, expected a number")
    return float(said.value)


def _varied(label: str, said: Said, what: str, spec: str, default: float | None) -> Varied:
    where = f"{label}, line {said.line}, {what}"
    for rule in parse_blocks(spec, where=where).rules:
        everything = all(s.words == ("*",) and not s.without for s in rule.selectors or ())
        if default is None and rule.selectors and everything and isinstance(rule.value, float):
            default = rule.value
    if default is None:
        hint = "*=0.5 among the blocks, or {default: 0.5, blocks: …}"
        raise refused(label, said.line, f"{what}: says no number for the tensors of other blocks", hint)
    return Varied(default, spec, where=where)
