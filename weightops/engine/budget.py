"""Bytes in flight: take, give, cancel."""

from __future__ import annotations

import threading


class Cancelled(Exception):
    """The work was given up while something waited for memory; never shown to a user."""


class Budget:
    """At most `total` bytes are out at any time; who asks for more waits. `peak` is the most that ever was."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.peak = 0
        self._out = 0
        self._cancelled = False
        self._changed = threading.Condition()

    def take(self, nbytes: int) -> None:
        """Wait until `nbytes` fit. Take the whole cost at once: two halves that wait for each other wait for ever."""
        if nbytes > self.total:
            raise ValueError(f"{nbytes} bytes never fit into a budget of {self.total}")
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or self._out + nbytes <= self.total)
            if self._cancelled:
                raise Cancelled
            self._out += nbytes
            self.peak = max(self.peak, self._out)

    def give(self, nbytes: int) -> None:
        with self._changed:
            self._out -= nbytes
            self._changed.notify_all()

    def cancel(self) -> None:
        """Wake everyone who waits, with Cancelled; without it, a failed write would leave the feeder waiting."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    @property
    def cancelled(self) -> bool:
        return self._cancelled
