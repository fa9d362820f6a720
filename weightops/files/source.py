"""ByteSource: bytes by position, from any thread; LocalFile. Knows nothing of what the bytes mean."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from pathlib import Path
from typing import Protocol

from weightops.errors import FormatError, TruncatedError, UsageError


class ByteSource(Protocol):
    """Something with bytes that can be read by position, by several threads at once.

    `label` is what the user typed, and begins every error; `size` is in bytes.
    """

    label: str
    size: int

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill all of `out` (a writable view of bytes) from `start` on. Raises TruncatedError."""

    def will_need(self, start: int, nbytes: int) -> None:
        """A hint that these bytes will be read soon."""

    def check_unchanged(self) -> None:
        """Raise FormatError when the bytes are no longer those that were opened."""

    def close(self) -> None: ...


def read(source: ByteSource, start: int, nbytes: int) -> bytes:
    """`nbytes` bytes from `start`, as a value."""
    out = bytearray(nbytes)
    source.read_into(start, memoryview(out))
    return bytes(out)


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

# Non-blocking: should a named pipe take the file's place between the question and the opening, nothing waits.
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
_FALLBACK_NBYTES = 16 * 2**20


class LocalFile:
    """A regular file, read by position and never mapped: a file that shrinks under a mapping kills the process."""

    def __init__(self, path: str | Path, label: str | None = None) -> None:
        self.path = Path(path)
        self.label = label if label is not None else str(path)
        self._fd = -1
        try:
            # Asked before opening, which may already set a device going; then again of what was opened.
            self._expect_file(self.path.stat())
            self._fd = os.open(self.path, _FLAGS)
            self._opened = os.fstat(self._fd)
            self._expect_file(self._opened)
        except UsageError:
            self.close()
            raise
        except FileNotFoundError:
            if self.path.is_symlink():
                raise UsageError(self.label, "a link that leads nowhere, expected a file") from None
            raise UsageError(self.label, "no such file") from None
        except OSError as e:
            raise UsageError(self.label, f"cannot be opened: {_reason(e)}") from None
        except ValueError:  # a NUL, or a surrogate that stands for no byte
            raise UsageError(self.label, "no file can bear this name") from None
        self.size = self._opened.st_size
        self._lock = threading.Lock()

    def _expect_file(self, found: os.stat_result) -> None:
        for is_kind, name in _KINDS:
            if is_kind(found.st_mode):
                raise UsageError(self.label, f"{name}, expected a file")

    def read_into(self, start: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            try:
                got = self._read_some(start + done, out[done:])
            except OSError as e:
                raise FormatError(self.label, f"cannot be read at byte {start + done:,}: {_reason(e)}") from None
            if got == 0:
                now = os.fstat(self._fd).st_size
                if now < self.size:
                    what = f"ends at byte {now:,}, expected {self.size:,} bytes: it was cut while it was read"
                else:
                    what = f"ends at byte {now:,}, expected at least {start + len(out):,}"
                raise TruncatedError(self.label, what)
            done += got

    def _read_some(self, start: int, out: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [out], start)
        # Windows has no positional read: one reader at a time moves the position.
        with self._lock:
            os.lseek(self._fd, start, os.SEEK_SET)
            data = os.read(self._fd, min(len(out), _FALLBACK_NBYTES))
        out[: len(data)] = data
        return len(data)

    def will_need(self, start: int, nbytes: int) -> None:
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # only a hint
                os.posix_fadvise(self._fd, start, nbytes, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self._opened.st_size, self._opened.st_mtime_ns):
            raise FormatError(self.label, "was changed while it was read", "run again when nothing writes to it")

    def same_file(self, other: os.stat_result) -> bool:
        return os.path.samestat(self._opened, other)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _reason(e: OSError) -> str:
    return e.strerror or str(e)
