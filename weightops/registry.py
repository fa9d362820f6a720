"""A named table that loads the modules of one folder, and knows the nearest name to a wrong one."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import TYPE_CHECKING, Generic, TypeVar

from weightops.errors import UsageError, quote

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")


class Registry(Generic[T]):
    """Members register themselves when their module is imported; only `load` imports them, so no circle can form.

    kind: what a member is, in messages ("merge method"); package: the folder of the members' modules.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._members: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str, member: T) -> T:
        if name in self._members:
            raise ValueError(f"the {self.kind} {name!r} is registered twice")
        self._members[name] = member
        return member

    def load(self) -> None:
        """Import every module of the package, in the order of their names."""
        if self._loaded:
            return
        package = importlib.import_module(self.package)
        for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
            importlib.import_module(f"{self.package}.{module}")
        self._loaded = True

    def get(self, name: str) -> T:
        """The member of this name. Raises UsageError, with the nearest known name."""
        self.load()
        if name not in self._members:
            near = difflib.get_close_matches(name, self._members, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(self._members))}"
            raise UsageError("", f"unknown {self.kind} {quote(name)}", hint)
        return self._members[name]

    def __iter__(self) -> Iterator[tuple[str, T]]:
        self.load()
        return iter(sorted(self._members.items()))
