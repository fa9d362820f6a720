"""YAML as plain values that know their lines. Knows no recipe; builds no objects, and expands nothing without end.

Only lists, mappings and plain scalars are read. Numbers are what they are in YAML 1.2 and everywhere else: 1e-3 is
one, and 1:30, 0x10 and 1_000 are texts. A key stands once in its mapping. Aliases are read as what they repeat.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops.errors import UsageError, printable, quote

if TYPE_CHECKING:
    from collections.abc import Collection

    import yaml

MAX_CHARACTERS = 256 << 10
MAX_NODES = 20_000  # with all aliases expanded
MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Said:
    """A value, and the line it begins in, from 1. lines: of a mapping, the line of each key."""

    line: int
    value: bool | int | float | str | tuple[Said, ...] | dict[str, Said] | None
    lines: dict[str, int] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """As it may stand in a message, after "found"."""
        if self.value is None:
            return "nothing"
        if isinstance(self.value, bool):
            return "true" if self.value else "false"
        if isinstance(self.value, tuple):
            return "a list"
        if isinstance(self.value, str):
            return quote(self.value)
        return f"{self.value!r:.40}" if isinstance(self.value, (int, float)) else "keys with values"


def refused(label: str, line: int, what: str, hint: str | None = None) -> UsageError:
    """What is wrong in this line."""
    return UsageError(f"{label}, line {line}", what, hint)


def check_keys(label: str, said: Said, known: Collection[str], of: str) -> None:
    """Refuse the first key that is none of these."""
    for key, line in said.lines.items():
        if key not in known:
            raise refused(label, line, f"unknown key {quote(key)} {of}", nearest(key, known))


def nearest(word: str, known: Collection[str]) -> str:
    """A hint: the known word that this one is most like, or all of them."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"


def read_yaml(text: str, label: str) -> Said:
    """The one document that the text holds. Raises UsageError, with the line, for what is none of the above."""
    import yaml

    if len(text) > MAX_CHARACTERS:
        raise UsageError(label, f"holds {len(text):,} characters, expected at most {MAX_CHARACTERS:,}")
    try:
        _check_depth(text, label)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as e:
        line = text.count("\n", 0, e.position) + 1
        raise refused(label, line, f"found {quote(text[e.position])}, which no YAML may hold") from None
    except yaml.MarkedYAMLError as e:
        raise _no_yaml(e, label) from None
    return Said(1, None) if root is None else _Reader(label).read(root, ())


def _check_depth(text: str, label: str) -> None:
    """Before it is composed: composing goes as deep as the text does."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            line = event.start_mark.line + 1  # type: ignore[union-attr]
            raise refused(label, line, f"lists and keys lie more than {MAX_DEPTH} deep")


def _no_yaml(e: yaml.MarkedYAMLError, label: str) -> UsageError:
    mark = e.problem_mark or e.context_mark
    said = ", ".join(printable(part) for part in (e.context, e.problem) if part)
    hint = None
    if e.context == "while scanning an alias":
        hint = 'a text that begins with * stands in quotes: "*": 0.5'
    elif "'\\t'" in said:
        hint = "indent with spaces"
    return refused(label, 1 if mark is None else mark.line + 1, f"cannot be read as YAML: {said}", hint)


# What is read as a number, where it stands without quotes.
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_TAG = "tag:yaml.org,2002:"
_TRUE = frozenset({"true", "yes", "on"})
# What YAML 1.1 takes for numbers, dates and marks of its own is text here.
_SCALARS = frozenset(_TAG + kind for kind in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge"))


class _Reader:
    """Turns YAML's nodes into plain values."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.nodes = 0

    def read(self, node: yaml.Node, above: tuple[yaml.Node, ...]) -> Said:
        import yaml

        line = node.start_mark.line + 1
        if any(node is other for other in above):
            raise refused(self.label, line, "an alias stands in what it repeats")
        self.nodes += 1
        if self.nodes > MAX_NODES:
            what = f"holds more than {MAX_NODES:,} values, its aliases expanded"
            raise refused(self.label, line, what, "name what is needed often under models")
        if len(above) > MAX_DEPTH:
            raise refused(self.label, line, f"lists and keys lie more than {MAX_DEPTH} deep, aliases expanded")
        above = (*above, node)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, above)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return Said(line, tuple(self.read(child, above) for child in node.value))
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return Said(line, _scalar(node))
        raise refused(self.label, line, f"found the tag {quote(node.tag.replace(_TAG, '!!'))}, expected none")

    def _mapping(self, node: yaml.MappingNode, above: tuple[yaml.Node, ...]) -> Said:
        found: dict[str, Said] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(self.read(key, above).value, (str, int, float, bool, type(None))):
                raise refused(self.label, line, "found a list or keys as a key, expected a word")
            if key.value in found:
                what = f"the key {quote(key.value)} stands twice, first in line {lines[key.value]}"
                raise refused(self.label, line, what)
            found[key.value] = self.read(value, above)
            lines[key.value] = line
        return Said(node.start_mark.line + 1, found, lines)


def _scalar(node: yaml.ScalarNode) -> Any:
    text: str = node.value
    if node.style is not None or (node.tag == _TAG + "str" and not NUMBER.fullmatch(text)):
        return text
    if node.tag == _TAG + "null":
        return None
    if node.tag == _TAG + "bool":
        return text.lower() in _TRUE
    if not NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        return text
    return int(text) if len(text) < 40 and re.fullmatch(r"[+-]?\d+", text) else float(text)
