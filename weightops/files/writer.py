"""SafetensorsWriter: header first, bytes in any order from any thread, visible only when whole.

On Linux the file has no name until it is whole (O_TMPFILE), so that even `kill -9` leaves nothing behind.
Where that is not to be had, a hidden, locked file stands beside the target, and a later run clears it away.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from weightops.errors import OutputError
from weightops.files.header import encode_header, in_order, layout
from weightops.files.source import ByteSource, LocalFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from weightops.files.tensor import Slot, TensorSpec

PART_SUFFIX = ".weightops-part"
_FLAGS = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
NEW_FILE = _FLAGS | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
_FLUSH_EVERY = 256 << 20
# The system's cache takes memory in pieces as large as a write. Large ones are often not at hand, least of all under
# a hypervisor that takes free memory back: writes of 2 MiB measured up to ten times slower than of 512 KiB.
_WRITE_NBYTES = 512 << 10
_HASH_NBYTES = 1 << 20
_NO_SHA256 = "0" * 64


class PositionalFile:
    """An open file of known size: all its room claimed at once, written anywhere from any thread.

    `fd` is -1 until it is opened, by who knows under which name; `label` begins every error.
    """

    def __init__(self, label: str, size: int) -> None:
        self.label = label
        self.size = size
        self.fd = -1
        self._written = 0
        self._flushed = 0
        self._lost: OSError | None = None
        self._flushing = threading.Lock()
        self._lock = threading.Lock()

    def failed(self, e: OSError, what: str) -> OutputError:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            return _no_room(self.label, self.size)
        if e.errno == errno.EFBIG:
            return OutputError(
                self.label,
                f"the file takes {self.size:,} bytes, more than a file may have here",
                "the file system or a limit of this process is in the way; write elsewhere",
            )
        return OutputError(self.label, f"{what}: {e.strerror or e}")

    def claim(self) -> None:
        """Claim all the room now, so that a full disk shows before the work and not after an hour of it."""
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.fd, 0, self.size)
            else:
                os.ftruncate(self.fd, self.size)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise self.failed(e, "") from None
            with contextlib.suppress(OSError):  # some network file systems cannot preallocate: each write will tell
                os.ftruncate(self.fd, self.size)

    def write(self, offset: int, data: memoryview) -> None:
        done = 0
        try:
            while done < len(data):
                done += self._write_some(offset + done, data[done : done + _WRITE_NBYTES])
        except OSError as e:
            raise self.failed(e, f"cannot be written at byte {offset + done:,}") from None
        self._flush_some(len(data))

    def _write_some(self, offset: int, data: memoryview) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self.fd, data, offset)
        with self._lock:
            os.lseek(self.fd, offset, os.SEEK_SET)
            return os.write(self.fd, data)

    def _flush_some(self, nbytes: int) -> None:
        """Send what was written to the disk while the rest is computed, rather than all of it at the end."""
        if self._lost is not None:
            raise self.failed(self._lost, "cannot be written to the disk")
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
            _sync_data(self.fd)
        except OSError as e:
            # Linux reports a failed write to a file descriptor once: the fsync before the commit would succeed.
            self._lost = e
        finally:
            self._flushing.release()

    def sha256(self, start: int) -> str:
        """The SHA-256 of all bytes from `start` on, as they are read back."""
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(min(_HASH_NBYTES, max(self.size - start, 1))))
        while start < self.size:
            part = buffer[: self.size - start]
            self.read_into(start, part)
            digest.update(part)
            start += len(part)
        return digest.hexdigest()

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill all of `out` from `start` on with what was written there. Raises OutputError."""
        done = 0
        while done < len(out):
            try:
                got = self._read_some(start + done, out[done:])
            except OSError as e:
                raise self.failed(e, f"cannot be read back at byte {start + done:,}") from None
            if got == 0:
                what = f"ends at byte {start + done:,}, expected {self.size:,}: something cut it"
                raise OutputError(self.label, what)
            done += got

    def _read_some(self, start: int, out: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.fd, [out], start)
        with self._lock:
            os.lseek(self.fd, start, os.SEEK_SET)
            data = os.read(self.fd, len(out))
        out[: len(data)] = data
        return len(data)

    def sync(self) -> None:
        """Return when every byte is on the disk. Raises OutputError if any was lost."""
        with self._flushing:
            try:
                if self._lost is not None:
                    raise self._lost
                os.fsync(self.fd)
            except OSError as e:
                raise self.failed(e, "cannot be written to the disk") from None

    def close(self) -> None:
        with self._flushing:
            fd, self.fd = self.fd, -1
            if fd >= 0:
                os.close(fd)


class SafetensorsFile:
    """What stands in a safetensors file, whatever its name will be: the header, and each tensor at its place.

    data_hashes: keys of the metadata, and the format of each, for the SHA-256 of all that follows the header.
    header: the first bytes as they stand, for tensors that follow in the order of `specs`; empty: the library's.
    """

    def __init__(
        self,
        label: str,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str],
        data_hashes: Mapping[str, str],
        header: bytes = b"",
    ) -> None:
        self._specs = dict(specs)
        self._data_hashes = data_hashes
        self._verbatim = header
        self._offsets = in_order(specs) if header else layout(specs)
        self._header = self._encode(metadata, _NO_SHA256)
        self.size = len(self._header) + sum(spec.nbytes for spec in specs.values())
        self.file = PositionalFile(label, self.size)

    def _encode(self, metadata: Mapping[str, str], sha256: str) -> bytes:
        if self._verbatim:
            return self._verbatim
        hashes = {key: form.format(sha256) for key, form in self._data_hashes.items()}
        return encode_header(self._specs, {**metadata, **hashes})

    def begin(self) -> None:
        self.file.claim()
        self.file.write(0, memoryview(self._header))

    def write_bytes(self, name: str, slot: Slot, start: int, stop: int, data: memoryview) -> None:
        """Bytes `start` to `stop` of `slot`, which are all of `data`, into the tensor `name`."""
        base = len(self._header) + self._offsets[name][0]
        done = 0
        for piece in slot.pieces(start, stop):
            self.file.write(base + piece.offset, data[done : done + piece.nbytes])
            done += piece.nbytes

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the final header, which must be as long as the first one, and send all to the disk."""
        header = self._encode(metadata, self.file.sha256(len(self._header)) if self._data_hashes else "")
        if len(header) != len(self._header):
            raise ValueError(f"the final header takes {len(header)} bytes, but {len(self._header)} were set aside")
        self.file.write(0, memoryview(header))
        self.file.sync()


class SafetensorsWriter:
    """A safetensors file in the making at `path`.

    specs: the tensors, by name; metadata: text to text. `inputs` are the files being read, which are never
    written: with `force` an input's name may be replaced, in one step, once everything is written.
    data_hashes, header: see SafetensorsFile. `published`: the file has its name.
    Raises OutputError, before any work, for what can be known before: an existing file, no room, no permission.
    """

    def __init__(
        self,
        path: str | Path,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str],
        *,
        data_hashes: Mapping[str, str] | None = None,
        header: bytes = b"",
        force: bool = False,
        inputs: Sequence[ByteSource] = (),
    ) -> None:
        self.path = Path(path)
        self.label = str(path)
        self.force = force
        self.published = False
        self._tensors = SafetensorsFile(self.label, specs, metadata, data_hashes or {}, header)
        self._file = self._tensors.file
        self.size = self._tensors.size
        check_target(self.path, self.size, force=force, inputs=inputs)
        self._named: Path | None = None
        try:
            self._create()
            self._tensors.begin()
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ before the work

    def _create(self) -> None:
        """Make the file to write to: with no name where that is to be had, else under a hidden one."""
        self._clear_leftovers()
        unnamed = getattr(os, "O_TMPFILE", None)
        if unnamed is not None and self._names_unnamed(_FLAGS | unnamed):
            with contextlib.suppress(OSError):
                self._file.fd = os.open(self.path.parent, _FLAGS | unnamed, 0o666)
                return
        while True:
            self._named = part_name(self.path)  # before it is made, so that Ctrl-C just after leaves nothing
            try:
                self._file.fd = os.open(self._named, NEW_FILE, 0o666)
            except OSError as e:
                self._named = None
                raise self._file.failed(e, "cannot be written") from None
            lock(self._file.fd, wait=True)
            if os.name == "nt" or os.fstat(self._file.fd).st_nlink:
                return
            self._file.close()  # another run, clearing leftovers, came between the opening and the lock

    def _names_unnamed(self, flags: int) -> bool:
        """Can a file without a name be given one here? Better asked now than found out when all is written."""
        name = part_name(self.path)
        try:
            fd = os.open(self.path.parent, flags, 0o666)
            try:
                lock(fd, wait=False)
                _give_name(fd, name)
            finally:
                os.close(fd)
        except (OSError, AttributeError, NotImplementedError):
            return False
        finally:
            with contextlib.suppress(OSError):
                name.unlink()
        return True

    def _clear_leftovers(self) -> None:
        """Remove what an earlier run that was killed left beside the target; a run still at work holds its lock."""
        for path in hidden_beside(self.path, PART_SUFFIX):
            with contextlib.suppress(OSError):
                if os.name == "nt":
                    path.unlink()  # refused while it is open anywhere
                    continue
                fd = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
                try:
                    if lock(fd, wait=False):
                        path.unlink()
                finally:
                    os.close(fd)

    # ------------------------------------------------------------------ the work, from any thread

    def write_bytes(self, slot: Slot, start: int, stop: int, data: memoryview) -> None:
        """Bytes `start` to `stop` of `slot`, which are all of `data`."""
        self._tensors.write_bytes(slot.key, slot, start, stop, data)

    # ------------------------------------------------------------------ after the work

    def commit(self, metadata: Mapping[str, str], *, beforehand: Callable[[], None] | None = None) -> int:
        """Write the final header, let the file appear under its name, and return its size in bytes.

        Raises OutputError. The header with this metadata must be as long as the first one. beforehand: what is to be
        done when all is on the disk, just before the file appears.
        """
        self._tensors.finish(metadata)
        if beforehand is not None:
            beforehand()
        with uninterrupted():
            try:
                self._publish()
                self.published = True
            except FileExistsError:
                raise appeared(self.label) from None
            except OSError as e:
                raise self._file.failed(e, "cannot be put in place") from None
            sync_folder(self.path.parent)
        return self.size

    def _publish(self) -> None:
        if self._named is None:
            if not self.force:
                _give_name(self._file.fd, self.path)
                return
            lock(self._file.fd, wait=False)
            self._named = part_name(self.path)
            _give_name(self._file.fd, self._named)
        if os.name == "nt":
            self._file.close()  # Windows renames no open file
        if self.force:
            os.replace(self._named, self.path)  # noqa: PTH105 - atomic, and says so
        else:
            _rename_to_new(self._named, self.path)
        self._named = None

    def close(self) -> None:
        """Let go; whatever was not committed is gone."""
        try:
            self._file.close()
        finally:
            if self._named is not None:
                with contextlib.suppress(OSError):
                    self._named.unlink()
                self._named = None


def part_name(path: Path, suffix: str = PART_SUFFIX) -> Path:
    """A hidden name beside the target, which nothing bears yet."""
    return path.with_name(f"{hidden_start(path)}{secrets.token_hex(4)}{suffix}")


def hidden_beside(path: Path, suffix: str) -> list[Path]:
    """What bears a name of this kind beside the target; none where that cannot be seen."""
    start = hidden_start(path)
    with contextlib.suppress(OSError, ValueError), os.scandir(path.parent) as entries:
        return [Path(e.path) for e in entries if e.name.startswith(start) and e.name.endswith(suffix)]
    return []


def hidden_start(path: Path) -> str:
    """How the names of what is hidden beside the target begin."""
    return f".{path.name[:40]}."  # a name may have 255 bytes, four for a character


def _give_name(fd: int, name: Path) -> None:
    """Let the unnamed file appear as `name`, which nothing may bear yet."""
    folder = os.open(name.parent, os.O_RDONLY)
    try:
        os.link(f"/proc/self/fd/{fd}", name.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def check_target(path: Path, nbytes: int, *, force: bool, inputs: Sequence[ByteSource], folder: bool = False) -> None:
    """Refuse, before any work, an output that cannot be written: OutputError for all that can be known now.

    folder: a folder is to be written and not a file.
    """
    label = str(path)
    parent = path.parent
    if not os.path.isdir(parent):  # noqa: PTH112 - pathlib's raises for what it may not look at
        if os.path.lexists(parent):
            raise OutputError(label, f"{str(parent)!r} is no folder")
        raise OutputError(label, f"the folder {str(parent)!r} does not exist", "make it first")
    if folder:
        _check_folder(path)
    elif os.path.isdir(path):  # noqa: PTH112
        raise OutputError(label, "is a folder, expected the name of a file")
    if not os.access(parent, os.W_OK):
        raise OutputError(label, f"no permission to write into {str(parent)!r}")
    if _exists(path) and not force:
        if any(isinstance(f, LocalFile) and _is_input(f, path, folder=folder) for f in inputs):
            raise OutputError(
                label,
                f"{'holds' if folder else 'is also'} an input, and an input is never written",
                "choose another name, or replace it with --force once the result is whole",
            )
        raise OutputError(label, "exists", "choose another name, or replace it with --force")
    with contextlib.suppress(OSError):  # some file systems do not say; preallocation will
        free = shutil.disk_usage(parent).free
        if free < nbytes:
            raise _no_room(label, nbytes, free, "folder" if folder else "file")


def _check_folder(path: Path) -> None:
    """Refuse what no folder can replace, or what it must not: the whole of it would be removed."""
    label = str(path)
    if path.name in ("", ".."):
        raise OutputError(label, "names no new folder", "give the folder a name of its own")
    if os.path.isfile(path):  # noqa: PTH113
        raise OutputError(label, "is a file, expected the name of a folder")
    if os.path.ismount(path):
        raise OutputError(label, "is a mounted file system, which cannot be replaced", "name a new folder in it")
    with contextlib.suppress(OSError, ValueError):
        if _lies_in(Path.cwd(), path):
            raise OutputError(label, "holds the folder in which this command runs", "choose another name")


def _lies_in(path: Path, folder: Path) -> bool:
    """Does it lie in the folder, at any depth, or is it the folder itself? Raises OSError."""
    path = path.resolve()
    return folder.resolve() in (path, *path.parents)


def _is_input(file: LocalFile, path: Path, *, folder: bool) -> bool:
    with contextlib.suppress(OSError):
        return _lies_in(file.path, path) if folder else file.same_file(path.stat())
    return False


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


def _no_room(label: str, nbytes: int, free: int | None = None, what: str = "file") -> OutputError:
    left = "" if free is None else f", but {free:,} are free"
    return OutputError(
        label, f"no room: the {what} takes {nbytes:,} bytes{left}", "free some space, or write elsewhere"
    )


def appeared(label: str) -> OutputError:
    return OutputError(label, "appeared while this run was at work, and was left as it is", "use --force to replace it")


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


def lock(fd: int, *, wait: bool) -> bool:
    """Lock what is open, if nobody else holds it or will let it go. Windows keeps open files from being removed."""
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


def sync_folder(folder: Path) -> None:
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
