"""Held: a file or folder of tensors that is only in memory: a run writes into it, and verbs read it as a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from weightops.errors import TruncatedError, UsageError
from weightops.files.checkpoint import Checkpoint
from weightops.files.tensor import TensorInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from weightops.files.folder import OutputFile
    from weightops.files.source import ByteSource
    from weightops.files.tensor import Slot, TensorSpec


class Bytes:
    """A ByteSource over bytes in memory."""

    def __init__(self, label: str, data: memoryview) -> None:
        self.label = label
        self.data = data
        self.size = len(data)

    def read_into(self, start: int, out: memoryview) -> None:
        if start + len(out) > self.size:
            raise TruncatedError(self.label, f"ends at byte {self.size:,}, expected {start + len(out):,}")
        out[:] = self.data[start : start + len(out)]

    def will_need(self, start: int, nbytes: int) -> None:
        """They are here."""

    def check_unchanged(self) -> None:
        """Nobody else has them."""

    def close(self) -> None:
        """They go with the last one who has them."""


@dataclass(frozen=True, slots=True)
class HeldPath:
    """A place among the small files of a folder in memory, asked as a pathlib.Path is asked."""

    files: Mapping[str, bytes]
    path: PurePosixPath

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def suffix(self) -> str:
        return self.path.suffix

    @property
    def parent(self) -> HeldPath:
        return HeldPath(self.files, self.path.parent)

    def __truediv__(self, name: str) -> HeldPath:
        return HeldPath(self.files, self.path / name)

    def is_file(self) -> bool:
        return str(self.path) in self.files

    def is_dir(self) -> bool:
        return any(self.path in PurePosixPath(name).parents for name in self.files)

    def glob(self, pattern: str) -> Iterator[HeldPath]:
        """The files right in this folder whose names fit `pattern`."""
        for file in map(PurePosixPath, self.files):
            if file.parent == self.path and fnmatchcase(file.name, pattern):
                yield HeldPath(self.files, file)

    def open(self, label: str) -> ByteSource:
        if not self.is_file():
            raise UsageError(label, "no such file")
        return Bytes(label, memoryview(self.files[str(self.path)]))


@dataclass(slots=True)
class Held:
    """What a verb may be given for `output`, and then any verb for a file; `label` begins errors about it.

    specs: of the tensors by key; files, extras: of a folder, as in a Plan; metadata: of the (first) file. Whole only
    after a run that succeeded (`published`).
    """

    label: str
    specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    files: tuple[OutputFile, ...] = ()
    extras: Mapping[str, bytes] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    published: bool = False
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    data: memoryview = field(default_factory=lambda: memoryview(b""))

    def begin(self, specs: Mapping[str, TensorSpec], files: Sequence[OutputFile], extras: Mapping[str, bytes]) -> None:
        """Make room for these tensors. Raises MemoryError."""
        import numpy as np

        self.specs, self.files, self.extras, self.published, position = specs, tuple(files), extras, False, 0
        self.places = {}
        for key, spec in specs.items():
            self.places[key] = position, position + spec.nbytes
            position += -(-spec.nbytes // 64) * 64  # as a tensor of its own would be aligned
        # Pages that were never written cost nothing yet, and go back to the system when the last tensor goes.
        self.data = np.empty(position, dtype=np.uint8).data

    def write_bytes(self, slot: Slot, start: int, stop: int, data: memoryview) -> None:
        begin, done = self.places[slot.key][0], 0
        for offset, nbytes in slot.pieces(start, stop):
            self.data[begin + offset : begin + offset + nbytes] = data[done : done + nbytes]
            done += nbytes

    def commit(self, *metadata: Mapping[str, str], beforehand: Callable[[], None] | None = None) -> int:
        """It is whole now; the bytes that it holds."""
        if beforehand is not None:
            beforehand()
        self.metadata, self.published = metadata[0], True
        return len(self.data)

    def close(self) -> None:
        """What a run that failed has left is let go."""
        if not self.published:
            self.data, self.places, self.specs = memoryview(b""), {}, {}

    def open(self) -> Checkpoint:
        """Its tensors as a checkpoint's: a folder's by `component.name`. Raises UsageError before it is whole."""
        if not self.published:
            raise UsageError(self.label, "holds nothing yet")
        names = self.names()
        tensors = {names[key]: TensorInfo(spec, 0, *self.places[key]) for key, spec in self.specs.items()}
        components = tuple(dict.fromkeys(f.path.rpartition("/")[0] for f in self.files if "/" in f.path))
        kind = ("diffusers" if "model_index.json" in self.extras else "shards") if self.files else "safetensors"
        return Checkpoint(
            self.label, kind, [Bytes(self.label, self.data)], tensors, self.metadata,
            components=components if kind == "diffusers" else (), place=HeldPath(self.extras, PurePosixPath()),
        )  # fmt: skip

    def names(self) -> dict[str, str]:
        """Key -> what `open` calls it."""
        if not self.files:
            return {key: key for key in self.specs}
        folders = {f.path: f.path.rpartition("/")[0].replace("/", ".") for f in self.files}
        return {
            key: f"{folders[f.path]}.{name}" if folders[f.path] else name
            for f in self.files for key, name in f.keys.items()
        }  # fmt: skip
