"""SafetensorsWriter: header first, bytes in any order from any thread, visible only when whole.

On Linux the file has no name until it is whole (O_TMPFILE), so that even `kill -9` leaves nothing behind.
Where that is not to be had, a hidden, locked file stands beside the target, and a later run clears it away.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from weightops.errors import OutputError
from weightops.files.header import encode_header, layout
from weightops.files.source import ByteSource, LocalFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from weightops.files.tensor import Slot, TensorSpec

_SUFFIX = ".weightops-part"
_FLUSH_EVERY = 256 << 20
# The system's cache takes memory in pieces as large as a write. Large ones are often not at hand, least of all under
# a hypervisor that takes free memory back: writes of 2 MiB measured up to ten times slower than of 512 KiB.
_WRITE_NBYTES = 512 << 10


class SafetensorsWriter:
    """A safetensors file in the making at `path`.

    specs: the tensors, by name; metadata: text to text. `inputs` are the files being read, which are never
    written: with `force` an input's name may be replaced, in one step, once everything is written.
    Raises OutputError, before any work, for what can be known before: an existing file, no room, no permission.
    """

    def __init__(
        self,
        path: str | Path,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str],
        *,
        force: bool = False,
        inputs: Sequence[ByteSource] = (),
    ) -> None:
        self.path = Path(path)
        self.label = str(path)
        self.force = force
        self._specs = dict(specs)
        self._offsets = layout(specs)
        self._header = encode_header(specs, metadata)
        self.size = len(self._header) + sum(spec.nbytes for spec in specs.values())
        check_target(self.path, self.size, force=force, inputs=inputs)
        self._fd = -1
        self._named: Path | None = None
        self._written = 0
        self._flushed = 0
        self._lost: OSError | None = None
        self._flushing = threading.Lock()
        self._lock = threading.Lock()
        try:
            self._create()
            self._preallocate()
            self._write(0, memoryview(self._header))
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ before the work

    def _failed(self, e: OSError, what: str) -> OutputError:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            return _no_room(self.path, self.size)
        if e.errno == errno.EFBIG:
            return OutputError(
                self.label,
                f"the file takes {self.size:,} bytes, more than a file may have here",
                "the file system or a limit of this process is in the way; write elsewhere",
            )
        return OutputError(self.label, f"{what}: {e.strerror or e}")

    def _create(self) -> None:
        """Make the file to write to: with no name where that is to be had, else under a hidden one."""
        self._clear_leftovers()
        flags = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        unnamed = getattr(os, "O_TMPFILE", None)
        if unnamed is not None and self._names_unnamed(flags | unnamed):
            with contextlib.suppress(OSError):
                self._fd = os.open(self.path.parent, flags | unnamed, 0o666)
                return
        flags |= os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        while True:
            self._named = self._part_name()  # before it is made, so that Ctrl-C just after leaves nothing
            try:
                self._fd = os.open(self._named, flags, 0o666)
            except OSError as e:
                self._named = None
                raise self._failed(e, "cannot be written") from None
            _lock(self._fd, wait=True)
            if os.name == "nt" or os.fstat(self._fd).st_nlink:
                return
            self._close_fd()  # another run, clearing leftovers, came between the opening and the lock

    def _names_unnamed(self, flags: int) -> bool:
        """Can a file without a name be given one here? Better asked now than found out when all is written."""
        name = self._part_name()
        try:
            fd = os.open(self.path.parent, flags, 0o666)
            try:
                _lock(fd, wait=False)
                _give_name(fd, name)
            finally:
                os.close(fd)
        except (OSError, AttributeError, NotImplementedError):
            return False
        finally:
            with contextlib.suppress(OSError):
                name.unlink()
        return True

    def _part_name(self) -> Path:
        return self.path.with_name(f"{self._part_start()}{secrets.token_hex(4)}{_SUFFIX}")

    def _part_start(self) -> str:
        return f".{self.path.name[:40]}."  # a name may have 255 bytes, four for a character

    def _clear_leftovers(self) -> None:
        """Remove what an earlier run that was killed left beside the target; a run still at work holds its lock."""
        start = self._part_start()
        stale: list[Path] = []
        with contextlib.suppress(OSError), os.scandir(self.path.parent) as entries:
            stale = [Path(e.path) for e in entries if e.name.startswith(start) and e.name.endswith(_SUFFIX)]
        for path in stale:
            with contextlib.suppress(OSError):
                if os.name == "nt":
                    path.unlink()  # refused while it is open anywhere
                    continue
                fd = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
                try:
                    if _lock(fd, wait=False):
                        path.unlink()
                finally:
                    os.close(fd)

    def _preallocate(self) -> None:
        """Claim all the room now, so that a full disk shows before the work and not after an hour of it."""
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, 0, self.size)
            else:
                os.ftruncate(self._fd, self.size)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise self._failed(e, "") from None
            with contextlib.suppress(OSError):  # some network file systems cannot preallocate: each write will tell
                os.ftruncate(self._fd, self.size)

    # ------------------------------------------------------------------ the work, from any thread

    def write_bytes(self, slot: Slot, start: int, stop: int, data: memoryview) -> None:
        """Bytes `start` to `stop` of `slot`, which are all of `data`."""
        base = len(self._header) + self._offsets[slot.key][0]
        done = 0
        for piece in slot.pieces(start, stop):
            self._write(base + piece.offset, data[done : done + piece.nbytes])
            done += piece.nbytes

    def _write(self, offset: int, data: memoryview) -> None:
        done = 0
        try:
            while done < len(data):
                done += self._write_some(offset + done, data[done : done + _WRITE_NBYTES])
        except OSError as e:
            raise self._failed(e, f"cannot be written at byte {offset + done:,}") from None
        self._flush_some(len(data))

    def _write_some(self, offset: int, data: memoryview) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._fd, data, offset)
        with self._lock:
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.write(self._fd, data)

    def _flush_some(self, nbytes: int) -> None:
        """Send what was written to the disk while the rest is computed, rather than all of it at the end."""
        if self._lost is not None:
            raise self._failed(self._lost, "cannot be written to the disk")
        self._written += nbytes
        if self._written - self._flushed < _FLUSH_EVERY or not self._flushing.acquire(blocking=False):
            return
        self._flushed = self._written
        try:
            threading.Thread(target=self._flush, name="weightops-flush", daemon=True).start()
        except RuntimeError:  # no thread to be had: the fsync before the commit does it all
            self._flushing.release()

    def _flush(self) -> None:
        try:
            _sync_data(self._fd)
        except OSError as e:
            # Linux reports a failed write to a file descriptor once: the fsync before the commit would succeed.
            self._lost = e
        finally:
            self._flushing.release()

    # ------------------------------------------------------------------ after the work

    def commit(self, metadata: Mapping[str, str]) -> int:
        """Write the final header, let the file appear under its name, and return its size in bytes.

        Raises OutputError. The header with this metadata must be as long as the first one.
        """
        header = encode_header(self._specs, metadata)
        if len(header) != len(self._header):
            raise ValueError(f"the final header takes {len(header)} bytes, but {len(self._header)} were set aside")
        self._write(0, memoryview(header))
        with self._flushing:
            try:
                if self._lost is not None:
                    raise self._lost
                os.fsync(self._fd)
            except OSError as e:
                raise self._failed(e, "cannot be written to the disk") from None
        with uninterrupted():
            try:
                self._publish()
            except FileExistsError:
                raise OutputError(
                    self.label,
                    "appeared while this run was at work, and was left as it is",
                    "use --force to replace it",
                ) from None
            except OSError as e:
                raise self._failed(e, "cannot be put in place") from None
            _sync_folder(self.path.parent)
        return self.size

    def _publish(self) -> None:
        if self._named is None:
            if not self.force:
                _give_name(self._fd, self.path)
                return
            _lock(self._fd, wait=False)
            self._named = self._part_name()
            _give_name(self._fd, self._named)
        if os.name == "nt":
            self._close_fd()  # Windows renames no open file
        if self.force:
            os.replace(self._named, self.path)  # noqa: PTH105 - atomic, and says so
        else:
            _rename_to_new(self._named, self.path)
        self._named = None

    def close(self) -> None:
        """Let go; whatever was not committed is gone."""
        try:
            with self._flushing:
                self._close_fd()
        finally:
            if self._named is not None:
                with contextlib.suppress(OSError):
                    self._named.unlink()
                self._named = None

    def _close_fd(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _give_name(fd: int, name: Path) -> None:
    """Let the unnamed file appear as `name`, which nothing may bear yet."""
    folder = os.open(name.parent, os.O_RDONLY)
    try:
        os.link(f"/proc/self/fd/{fd}", name.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def check_target(path: Path, nbytes: int, *, force: bool, inputs: Sequence[ByteSource]) -> None:
    """Refuse, before any work, an output that cannot be written: OutputError for all that can be known now."""
    label = str(path)
    folder = path.parent
    if not os.path.isdir(folder):  # noqa: PTH112 - pathlib's raises for what it may not look at
        if os.path.lexists(folder):
            raise OutputError(label, f"{str(folder)!r} is no folder")
        raise OutputError(label, f"the folder {str(folder)!r} does not exist", "make it first")
    if os.path.isdir(path):  # noqa: PTH112
        raise OutputError(label, "is a folder, expected the name of a file")
    if not os.access(folder, os.W_OK):
        raise OutputError(label, f"no permission to write into {str(folder)!r}")
    if _exists(path) and not force:
        with contextlib.suppress(OSError):
            found = path.stat()
            if any(isinstance(f, LocalFile) and f.same_file(found) for f in inputs):
                raise OutputError(
                    label,
                    "is also an input, and an input is never written",
                    "choose another name, or replace it with --force once the result is whole",
                )
        raise OutputError(label, "exists", "choose another name, or replace it with --force")
    with contextlib.suppress(OSError):  # some file systems do not say; preallocation will
        free = shutil.disk_usage(folder).free
        if free < nbytes:
            raise _no_room(path, nbytes, free)


def _exists(path: Path) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError as e:
        raise OutputError(str(path), f"cannot be written: {e.strerror}") from None
    except ValueError:  # a NUL, or a surrogate that stands for no byte
        raise OutputError(str(path), "no file can bear this name") from None
    return True


def _no_room(path: Path, nbytes: int, free: int | None = None) -> OutputError:
    left = "" if free is None else f", but {free:,} are free"
    return OutputError(
        str(path), f"no room: the file takes {nbytes:,} bytes{left}", "free some space, or write elsewhere"
    )


def _rename_to_new(source: Path, target: Path) -> None:
    """Rename, but never onto something that exists."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except (OSError, AttributeError, NotImplementedError):
        # A file system without hard links, or Windows, whose rename refuses an existing target by itself.
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "exists", str(target)) from None
        os.rename(source, target)  # noqa: PTH104
    else:
        with contextlib.suppress(OSError):  # it is in place; a second name for it is no reason to call this a failure
            source.unlink()


def _lock(fd: int, *, wait: bool) -> bool:
    """Lock the open file, if nobody else holds it or will let it go. Windows keeps open files from being removed."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _sync_data(fd: int) -> None:
    (getattr(os, "fdatasync", None) or os.fsync)(fd)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):  # the file is in place; some file systems cannot sync a folder
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Keep Ctrl-C and SIGTERM from the block, so that nothing is left half renamed.

    They are dropped, not put off: the output is in place by then, and a run that succeeded says so. Python runs
    its handlers in the main thread only, so anywhere else there is nothing to keep off.
    """
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                if number is not None and (handler := signal.getsignal(number)) is not None:
                    # Registered first: another of the three may still break in between these two lines.
                    stack.callback(signal.signal, number, handler)
                    signal.signal(number, _drop)
        yield


def _drop(_number: int, _frame: object) -> None:
    pass
