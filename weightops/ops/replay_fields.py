"""The fields of a recipe, each with the type that it must have; what nobody asks for is refused. Trusts nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.errors import FormatError, quote

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Fields:
    """The fields of a JSON object, each taken with the type that it must have."""

    def __init__(self, label: str, said: Mapping[str, Any], taken: set[str]) -> None:
        self.label = label
        self.said = said
        self.taken = taken

    def refused(self, what: str) -> FormatError:
        version = self.said.get("version", __version__)
        hint = f"it was made by weightops {version}, and this is {__version__}" if version != __version__ else None
        return FormatError(self.label, what, hint)

    def take(self, name: str, expected: str, is_right: Callable[[Any], bool], default: Any) -> Any:
        self.taken.add(name)
        if name not in self.said and default is not Ellipsis:
            return default
        value = self.said.get(name)
        if name not in self.said or not is_right(value):
            found = quote(value, 60) if name in self.said else "none"
            raise self.refused(f"its recipe has the {name} {found}, expected {expected}")
        return value

    def text(self, name: str, default: Any = ...) -> Any:
        return self.take(name, "a text", lambda v: isinstance(v, str), default)

    def flag(self, name: str, default: Any = ...) -> Any:
        return self.take(name, "true or false", lambda v: isinstance(v, bool), default)

    def whole(self, name: str, default: Any = ..., *, least: int | None = None) -> Any:
        expected = "a whole number" + ("" if least is None else f" from {least} on")
        return self.take(name, expected, lambda v: is_whole(v) and (least is None or v >= least), default)

    def number(self, name: str, default: Any = ...) -> Any:
        return self.take(name, "a number", is_number, default)

    def number_or_none(self, name: str) -> Any:
        return self.take(name, "a number or null", lambda v: v is None or is_number(v), ...)

    def rank(self, name: str, default: Any = ...) -> Any:
        return self.take(name, "a rank", lambda v: isinstance(v, str) or is_whole(v), default)

    def numbers(self, name: str) -> Any:
        return self.take(name, "a list of numbers", lambda v: isinstance(v, list) and all(map(is_number, v)), ...)

    def wholes(self, name: str) -> Any:
        return self.take(name, "whole numbers", lambda v: isinstance(v, list) and all(map(is_whole, v)), ...)

    def texts(self, name: str, default: Any = ...) -> Any:
        return self.take(name, "texts", lambda v: isinstance(v, list) and all(isinstance(t, str) for t in v), default)

    def table(self, name: str, default: Any = ...) -> Any:
        return self.take(name, "an object", lambda v: isinstance(v, dict), default)

    def given(self, **values: Any) -> dict[str, Any]:
        """Those that are said."""
        return {name: value for name, value in values.items() if value is not None}

    def check_all(self) -> None:
        """Refuse what nobody has asked for."""
        unknown = sorted(self.said.keys() - self.taken)
        if unknown:
            raise self.refused(f"its recipe says {quote(unknown[0])}, which this version does not know")


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    # A whole number stays one, for 1 is written otherwise than 1.0. What float32 does not hold was never meant.
    return (isinstance(value, float) and abs(value) < 3e38) or (is_whole(value) and abs(value) <= 1 << 53)


def check_count(fields: Fields, count: int, *expected: int) -> None:
    if count not in expected:
        words = " or ".join(map(str, expected))
        raise fields.refused(f"its recipe has {count} inputs, expected {words}")
