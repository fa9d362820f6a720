"""FolderWriter: safetensors files and small texts as one folder, visible only when whole; and how tensors are sharded.

The folder is made beside the target under a hidden name, and locked, so that a later run can clear away what one that
was killed left. It gets its name as the last step; with `force` what bore that name is moved aside first and removed
last.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from weightops.errors import OutputError, listing, quote
from weightops.files.writer import (
    NEW_FILE,
    PART_SUFFIX,
    PositionalFile,
    SafetensorsFile,
    appeared,
    check_target,
    hidden_beside,
    lock,
    part_name,
    sync_folder,
    uninterrupted,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from weightops.files.source import ByteSource
    from weightops.files.tensor import Slot, TensorSpec


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A safetensors file of an output folder: `keys` are keys of the output, with the names that the file gives them.

    `path` is relative to the folder, with slashes. `metadata` joins that of the whole output, and goes before it.
    """

    path: str
    keys: Mapping[str, str]
    metadata: Mapping[str, str] = field(default_factory=dict)


def shards(
    outputs: Mapping[str, TensorSpec],
    stem: str,
    max_nbytes: int,
    *,
    folder: str = "",
    names: Mapping[str, str] | None = None,
) -> tuple[tuple[OutputFile, ...], dict[str, bytes]]:
    """Cut tensors, in their order, into files of at most `max_nbytes` of tensor data; the files, and their index.

    A larger tensor gets a file of its own. One file needs no index and is `stem.safetensors`. names: key -> the name
    in the file, where it is another one. Source: the form of transformers' and diffusers' save_pretrained.
    """
    names = names or {}
    cuts: list[dict[str, str]] = [{}]
    room = max_nbytes
    for key, spec in outputs.items():
        if spec.nbytes > room and cuts[-1]:
            cuts.append({})
            room = max_nbytes
        cuts[-1][key] = names.get(key, key)
        room -= spec.nbytes
    start = f"{folder}/" if folder else ""
    if len(cuts) == 1:
        return (OutputFile(f"{start}{stem}.safetensors", cuts[0]),), {}
    paths = [f"{stem}-{number:05d}-of-{len(cuts):05d}.safetensors" for number in range(1, len(cuts) + 1)]
    index = {
        "metadata": {"total_size": sum(spec.nbytes for spec in outputs.values())},
        "weight_map": {name: path for path, keys in zip(paths, cuts, strict=True) for name in keys.values()},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    files = tuple(OutputFile(f"{start}{path}", keys) for path, keys in zip(paths, cuts, strict=True))
    return files, {f"{start}{stem}.safetensors.index.json": text.encode()}


def replace_small(path: Path, data: bytes) -> None:
    """Write a small file anew, beside those of a folder that is there: whole, or as it was. Raises OutputError."""
    part = part_name(path)
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise OutputError(str(path), f"cannot be written: {e.strerror or e}") from None


# ------------------------------------------------------------------------------------------------ what stands in it


def check_files(specs: Mapping[str, TensorSpec], files: Sequence[OutputFile], extras: Mapping[str, bytes]) -> None:
    """Each tensor stands in one file, once, and no two files are in each other's way; anything else is a ValueError.

    A path may come from an input: OutputError for one that leaves the folder.
    """
    held = Counter(key for file in files for key in file.keys)
    wrong = [key for key in {**specs, **held} if held[key] != 1 or key not in specs]
    if wrong:
        raise ValueError(f"expected each tensor in one file of the folder, but not so {listing(wrong)}")
    for file in files:
        if len(set(file.keys.values())) != len(file.keys):
            raise ValueError(f"{file.path}: two tensors have one name")
    paths = [_parts(path) for path in (*(file.path for file in files), *extras)]
    taken = Counter(path[:length] for path in paths for length in range(1, len(path) + 1))
    if any(taken[path] != 1 for path in paths):
        raise ValueError(f"two files of the folder have one path, or one is the other's folder: {sorted(paths)}")


def _parts(path: str) -> tuple[str, ...]:
    parts = tuple(path.split("/"))
    if {"", ".", ".."} & set(parts) or ":" in parts[0] or "\\" in path or "\0" in path:
        raise OutputError(quote(path), "is no plain path within the output folder, and is not written")
    return parts


def safetensors_files(
    path: Path,
    specs: Mapping[str, TensorSpec],
    files: Sequence[OutputFile],
    metadata: Sequence[Mapping[str, str]],
    data_hashes: Mapping[str, str],
) -> list[SafetensorsFile]:
    """The contents of each file of the folder `path`, given the metadata of each; nothing is written."""
    return [
        SafetensorsFile(str(path / file.path), {n: specs[key] for key, n in file.keys.items()}, texts, data_hashes)
        for file, texts in zip(files, metadata, strict=True)
    ]


def folder_nbytes(files: Sequence[SafetensorsFile], extras: Mapping[str, bytes]) -> int:
    return sum(file.size for file in files) + sum(map(len, extras.values()))


# ------------------------------------------------------------------------------------------------ writing it

_OLD_SUFFIX = ".weightops-old"
_FOLDER = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)


class FolderWriter:
    """A folder in the making at `path`: safetensors files, and `extras`, small files whose bytes are given.

    specs: the tensors, by the key that slots name; metadata: of each file, in order; data_hashes: see
    SafetensorsFile. `inputs` are never written: with `force` a folder that holds some may be replaced, for they
    are open already.
    Raises OutputError, before any work, for what can be known before: an existing target, no room, no permission.
    """

    def __init__(
        self,
        path: str | Path,
        specs: Mapping[str, TensorSpec],
        files: Sequence[OutputFile],
        metadata: Sequence[Mapping[str, str]],
        *,
        extras: Mapping[str, bytes],
        data_hashes: Mapping[str, str] | None = None,
        force: bool = False,
        inputs: Sequence[ByteSource] = (),
    ) -> None:
        check_files(specs, files, extras)
        self.path = Path(path)
        self.label = str(path)
        self.force = force
        self.published = False
        self._files = safetensors_files(self.path, specs, files, metadata, data_hashes or {})
        self._places = {
            key: (content, name)
            for file, content in zip(files, self._files, strict=True)
            for key, name in file.keys.items()
        }
        self._paths = [file.path for file in files]
        self.size = folder_nbytes(self._files, extras)
        self._part: Path | None = None
        self._locks: list[int] = []
        self._put_back()
        check_target(self.path, self.size, force=force, inputs=inputs, folder=True)
        try:
            self._clear_leftovers()
            self._part = self._create()
            self._fill(extras)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ before the work

    def _create(self) -> Path:
        """Make the hidden folder, and lock it."""
        while True:
            part = self._part = part_name(self.path)  # before it is made, so that Ctrl-C just after leaves nothing
            try:
                part.mkdir()
            except OSError as e:
                self._part = None
                raise self._failed(e, "cannot be written") from None
            if os.name == "nt":
                return part  # where nothing is renamed or removed as long as a file in it is open
            try:
                self._locks.append(os.open(part, _FOLDER))
                lock(self._locks[-1], wait=True)
                if os.path.samestat(part.stat(), os.fstat(self._locks[-1])):
                    return part
            except FileNotFoundError:
                continue  # another run, clearing leftovers, came between the making and the lock
            except OSError as e:
                raise self._failed(e, "cannot be written") from None

    def _fill(self, extras: Mapping[str, bytes]) -> None:
        for path, content in zip(self._paths, self._files, strict=True):
            self._open(path, content.file)
            content.begin()
        for path, data in extras.items():
            text = PositionalFile(str(self.path / path), len(data))
            try:
                self._open(path, text)
                text.write(0, memoryview(data))
                text.sync()
            finally:
                text.close()
        self._paths += extras

    def _open(self, path: str, file: PositionalFile) -> None:
        assert self._part is not None
        target = self._part / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            file.fd = os.open(target, NEW_FILE, 0o666)
        except OSError as e:
            raise file.failed(e, "cannot be written") from None
        except ValueError:  # a surrogate that stands for no byte
            raise OutputError(file.label, "no file can bear this name") from None

    def _failed(self, e: OSError, what: str) -> OutputError:
        return OutputError(self.label, f"{what}: {e.strerror or e}")

    # ------------------------------------------------------------------ what killed runs left

    def _put_back(self) -> None:
        """Undo half a replacement: a run that was killed between its two renames left the target a hidden name."""
        for old in self._moved_aside():
            with _claimed(old) as mine, contextlib.suppress(OSError):
                if mine and not os.path.lexists(self.path):
                    old.rename(self.path)

    def _clear_leftovers(self) -> None:
        """Remove what runs that were killed left beside the target; a run still at work holds its lock."""
        for path in (*hidden_beside(self.path, PART_SUFFIX), *self._moved_aside()):
            with _claimed(path) as mine:
                if mine:
                    self._remove(path)

    def _moved_aside(self) -> list[Path]:
        # Under the whole of the target's name, for it may come back under it: a hidden name holds 40 characters of it.
        return hidden_beside(self.path, self._old_suffix())

    def _old_suffix(self) -> str:
        return f".{hashlib.sha256(self.path.name.encode(errors='surrogatepass')).hexdigest()[:16]}{_OLD_SUFFIX}"

    def _remove(self, path: Path) -> None:
        """Remove what bears a hidden name, under one that the next run clears, should this one come to no end."""
        with contextlib.suppress(OSError):
            if path.is_symlink():
                path.unlink()
                return
            doomed = part_name(self.path)
            path.rename(doomed)  # Windows refuses, as long as a run at work has a file in it open
            shutil.rmtree(doomed, ignore_errors=True)

    # ------------------------------------------------------------------ the work, from any thread

    def write_bytes(self, slot: Slot, start: int, stop: int, data: memoryview) -> None:
        """Bytes `start` to `stop` of `slot`, which are all of `data`."""
        content, name = self._places[slot.key]
        content.write_bytes(name, slot, start, stop, data)

    # ------------------------------------------------------------------ after the work

    def commit(self, *metadata: Mapping[str, str], beforehand: Callable[[], None] | None = None) -> int:
        """Write the final headers, one for each file, let the folder appear, and return the bytes of all its files.

        Raises OutputError. A header with this metadata must be as long as the first one. beforehand: what is to be
        done when all is on the disk, just before the folder appears.
        """
        assert self._part is not None
        for content, texts in zip(self._files, metadata, strict=True):
            content.finish(texts)
            content.file.close()  # Windows renames no folder in which a file is open
        for folder in {parent for path in self._paths for parent in PurePosixPath(path).parents}:
            sync_folder(self._part / folder)
        if beforehand is not None:
            beforehand()
        replaced: list[Path] = []
        with uninterrupted():
            try:
                self._publish(self._part, replaced)
            except OSError as e:
                if not self.force and os.path.lexists(self.path):
                    raise appeared(self.label) from None
                raise self._failed(e, "cannot be put in place") from None
            self._part, self.published = None, True
            sync_folder(self.path.parent)
            for old in replaced:
                self._remove(old)
        return self.size

    def _publish(self, part: Path, replaced: list[Path]) -> None:
        """Give the folder its name; what bore it has then a hidden one, and is named in `replaced`."""
        if not self.force:
            if os.path.lexists(self.path):  # a rename would replace a folder that is empty
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            part.rename(self.path)
            return
        while True:
            try:
                self._move_aside(replaced)
                part.rename(self.path)
                return
            except OSError as e:
                if e.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    continue  # another run put its folder there just now
                if replaced:
                    with contextlib.suppress(OSError):
                        replaced[-1].rename(self.path)
                raise

    def _move_aside(self, replaced: list[Path]) -> None:
        if not os.path.lexists(self.path):
            return
        if not self.path.is_symlink() and not self.path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with contextlib.suppress(OSError):  # a link, or Windows
            # Locked first, so that no other run takes it for what a killed one left, and puts it back.
            self._locks.append(os.open(self.path, _FOLDER))
            lock(self._locks[-1], wait=False)
        old = part_name(self.path, self._old_suffix())
        with contextlib.suppress(FileNotFoundError):  # another run moved it aside just now
            self.path.rename(old)
            replaced.append(old)

    def close(self) -> None:
        """Let go; whatever was not committed is gone."""
        for content in self._files:
            content.file.close()
        if self._part is not None:
            shutil.rmtree(self._part, ignore_errors=True)
            self._part = None
        while self._locks:
            os.close(self._locks.pop())


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Is this folder nobody's? Then nobody else takes it within the block: a run at work holds its folder's lock."""
    if os.name == "nt":
        yield folder.is_dir()  # one in which a run at work has a file open cannot be renamed there
        return
    fd = -1
    with contextlib.suppress(OSError):
        fd = os.open(folder, _FOLDER)
    try:
        yield fd >= 0 and lock(fd, wait=False)
    finally:
        if fd >= 0:
            os.close(fd)
