"""Spill: bytes whose size is not known ahead, in a file without a name until they are laid out. Knows no format."""

from __future__ import annotations

import os
import tempfile
import threading
from typing import TYPE_CHECKING

from weightops.files.writer import PART_SUFFIX, PositionalFile, hidden_start

if TYPE_CHECKING:
    from pathlib import Path


class Spill:
    """A ByteSource that grows: appended to and read from any thread. `label` begins every error.

    It lies beside `target`, where there must be room for what becomes of it, and is gone when it is closed.
    """

    def __init__(self, target: Path) -> None:
        self.label = str(target)
        self.size = 0
        self._file = PositionalFile(self.label, 0)
        self._lock = threading.Lock()
        try:
            # Named as what a later run clears away, should this one be killed before the name is gone.
            with tempfile.TemporaryFile(dir=target.parent, prefix=hidden_start(target), suffix=PART_SUFFIX) as file:
                self._file.fd = os.dup(file.fileno())
        except OSError as e:
            raise self._file.failed(e, "cannot be written") from None

    def append(self, data: bytes) -> int:
        """Where the bytes begin that were appended. Raises OutputError."""
        with self._lock:
            start = self.size
            self.size = self._file.size = start + len(data)
        self._file.write(start, memoryview(data))
        return start

    def read_into(self, start: int, out: memoryview) -> None:
        self._file.read_into(start, out)

    def will_need(self, start: int, nbytes: int) -> None:
        pass

    def check_unchanged(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()
