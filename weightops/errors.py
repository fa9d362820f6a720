"""Every mistake a user can mend; anything else that is raised is our own bug and keeps its traceback.

WeightopsError              where, what, hint
├── UsageError              wrong use: an option, a name, a number                       exit code 2
├── FormatError             a file is damaged, or is not what its name says              exit code 1
│   └── TruncatedError      bytes that should be there are not: cut, or cut while read
├── UnsafeError             a pickle asks for more than rebuilding tensors
├── MismatchError           two inputs do not fit together
├── ValueRefused            NaN, Inf, or a result that the output dtype cannot hold
├── OutputError             the output cannot be written: exists, no room, no permission
├── MemoryRefused           the budget is smaller than the largest indivisible piece of work
└── NetworkError            a hub cannot be reached, or answers with something else

Interrupted                 Ctrl-C, SIGTERM, SIGHUP: no `Exception`, as KeyboardInterrupt is none
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class _Told(BaseException):
    """`where: what` and a `hint`; `where` is what the user typed, and begins the message."""

    exit_code = 1

    def __init__(self, where: str, what: str, hint: str | None = None) -> None:
        super().__init__(f"{printable(where)}: {what}" if where else what)
        self.where = where
        self.what = what
        self.hint = hint


class WeightopsError(_Told, Exception):
    """`where: what` and a `hint`; `where` is what the user typed, and begins the message."""


class UsageError(WeightopsError):
    exit_code = 2


class FormatError(WeightopsError):
    pass


class TruncatedError(FormatError):
    pass


class UnsafeError(WeightopsError):
    pass


class MismatchError(WeightopsError):
    pass


class ValueRefused(WeightopsError):
    pass


class OutputError(WeightopsError):
    pass


class MemoryRefused(WeightopsError):
    exit_code = 2


class NetworkError(WeightopsError):
    pass


class Interrupted(_Told):
    """Raised where the main thread happens to be: code that mends an `Exception` must not take it for one.

    `threading.Thread.start` does so: it would disown the thread that it has just started.
    """


def printable(text: str) -> str:
    """The text with every character that a terminal could act on (control, escape, bidi, surrogate) escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quote(text: object, limit: int = 100) -> str:
    """A name from a file as it may stand in a message: quoted, harmless, and of bounded length."""
    shown = repr(text)
    if len(shown) <= limit:
        return shown
    half = (limit - 5) // 2
    return f"{shown[:half]} ... {shown[-half:]}"


def listing(names: Iterable[object]) -> str:
    """At most five names, then "(and 12 more)"."""
    names = list(names)
    shown = ", ".join(quote(n) for n in names[:5])
    return shown if len(names) <= 5 else f"{shown} (and {len(names) - 5:,} more)"
