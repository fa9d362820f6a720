"""The buffers of a worker: page-aligned, and used again from chunk to chunk."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightops.engine.tensors import Lane


class Buffers:
    """The page-aligned buffers of one worker, by role, used again for the next chunk."""

    def __init__(self) -> None:
        self.lane: Lane | None = None
        self._held: dict[tuple[str, int], memoryview] = {}
        self._filled: dict[tuple[str, int], object] = {}

    def attach(self, device: str) -> Lane:
        """This worker's lane; made when torch is there, which can be after the first buffers were filled."""
        if self.lane is None:
            from weightops.engine.tensors import make_lane

            self.lane = make_lane(device)
            for buffer in self._held.values():
                self.lane.pin(buffer)
        return self.lane

    def get(self, role: tuple[str, int], nbytes: int) -> memoryview:
        held = self._held.get(role)
        if held is None or len(held) < nbytes:
            held = None  # or the old buffer would live until the new one is there
            self._drop(role)
            size = max(-(-nbytes // mmap.PAGESIZE), 1) * mmap.PAGESIZE
            held = self._held[role] = memoryview(mmap.mmap(-1, size))
            if self.lane is not None:
                self.lane.pin(held)
        return held[:nbytes]

    def fill(self, role: tuple[str, int], what: object | None, fill: Callable[[], None]) -> bool:
        """Fill the role's buffer, unless it holds just that already (None: never); whether it was filled."""
        if what is not None and self._filled.get(role) == what:
            return False
        self._filled.pop(role, None)
        fill()
        self._filled[role] = what
        return True

    def _drop(self, role: tuple[str, int]) -> None:
        self._filled.pop(role, None)
        held = self._held.pop(role, None)
        if held is not None and self.lane is not None:
            self.lane.unpin(held)

    def make_room(self, needed: dict[tuple[str, int], int], nbytes: int) -> None:
        """Let go of what these buffers do not need, the most first, until they and what is held take `nbytes`."""

        def excess(role: tuple[str, int]) -> int:
            return max(len(self._held[role]) - needed.get(role, 0), 0)

        while sum(needed.values()) + sum(map(excess, self._held)) > nbytes:
            role = max(self._held, key=excess, default=None)
            if role is None or not excess(role):
                return
            self._drop(role)

    def trim(self, nbytes: int) -> None:
        """Let go of the largest until no more than `nbytes` are held, so that it stays within what was counted."""
        while self._held and sum(map(len, self._held.values())) > nbytes:
            self._drop(max(self._held, key=lambda role: len(self._held[role])))
