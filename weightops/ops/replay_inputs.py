"""Where a file's inputs may be: by name first, and by the hash of what was read of them. Knows folders and headers."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from weightops.engine.chunks import block_rows, slot_span, task_rows
from weightops.engine.run import Leaves, hash_of
from weightops.errors import UsageError, WeightopsError
from weightops.files.checkpoint import open_checkpoint
from weightops.lineage import as_recorded
from weightops.naming.identify import identify

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from weightops.files.tensor import Slot
    from weightops.plan import Plan, Task

MAX_ENTRIES = 100_000  # of all folders together
_READ_NBYTES = 4 << 20


class Shelf:
    """The files among which inputs are looked for: in the folder `beside`, and in others with all that is in them.

    apart: what is none of them: the file that is made again, and the one that is written. Raises UsageError for
    folders that are none, or hold too much to be meant.
    """

    def __init__(self, beside: Path | None, folders: Sequence[str | os.PathLike[str]], apart: Sequence[Path]) -> None:
        self.folders = [*([] if beside is None else [beside]), *map(Path, folders)]
        self._apart = apart
        self._kinds: dict[Path, str] = {}
        found: dict[str, Path] = {}
        for folder in map(Path, folders):
            if not folder.is_dir():
                raise UsageError("--in", f"no such folder: {folder}")
        for path in [*([] if beside is None else _entries(beside)), *self._everything(folders)]:
            found.setdefault(os.path.realpath(path), path)
            if len(found) > MAX_ENTRIES:
                what = f"more than {MAX_ENTRIES:,} files and folders lie there"
                raise UsageError("--in", what, "name the folder in which the inputs are")
        self.paths = [path for path in found.values() if not self._is_apart(path)]

    def _everything(self, folders: Sequence[str | os.PathLike[str]]) -> Iterator[Path]:
        """All that is in the folders, however deep; hidden folders, and folders that are links, are not entered."""
        for folder in folders:
            for where, inner, files in os.walk(folder):
                inner[:] = sorted(name for name in inner if not name.startswith("."))
                yield from (Path(where) / name for name in sorted([*inner, *files]))

    def _is_apart(self, path: Path) -> bool:
        with contextlib.suppress(OSError):
            return any(other.exists() and path.samefile(other) for other in self._apart)
        return False

    def named(self, name: str) -> list[Path]:
        """Those of this name, the nearest first."""
        return [path for path in self.paths if as_recorded(path.name) == name]

    def others(self, name: str, kind: str) -> Iterator[Path]:
        """Safetensors files of other names and of this kind, by their headers: any of them may be the one."""
        for path in self.paths:
            if path.suffix.lower() == ".safetensors" and as_recorded(path.name) != name:
                found = self.kind(path)
                if found and kind in ("", found, "vae", "statistics"):
                    yield path

    def kind(self, path: Path) -> str:
        """checkpoint or lora; nothing, for what cannot be read."""
        if path not in self._kinds:
            self._kinds[path] = ""
            with contextlib.suppress(WeightopsError), open_checkpoint(path) as opened:
                self._kinds[path] = "lora" if identify(opened.tensors).kind == "lora" else "checkpoint"
        return self._kinds[path]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def hash_of_source(plan: Plan, number: int) -> str:
    """The hash that a run would give of what it reads of source `number`, without the other sources and the work."""
    import xxhash

    leaves: Leaves = {}
    source = plan.sources[number]
    buffer = memoryview(bytearray(_READ_NBYTES))
    for task in plan.tasks:
        for slot, start, stop in _blocks(task, number):
            leaf = slot.key, slot.bands or (), start, stop
            if leaf in leaves:
                continue
            digest = xxhash.xxh3_128()
            for begin in range(start, stop, _READ_NBYTES):
                part = buffer[: min(_READ_NBYTES, stop - begin)]
                source.read_bytes(slot, begin, begin + len(part), part)
                digest.update(part)
            leaves[leaf] = digest.digest()
    return hash_of(leaves)


def _blocks(task: Task, number: int) -> Iterator[tuple[Slot, int, int]]:
    """The bytes (start, stop) of each block of each input from a source, as the engine hashes them."""
    if not any(slot.spec.nbytes for slot in (*task.outputs, *(i.slot for i in task.inputs))):
        return
    rows, height = task_rows(task), block_rows(task)
    for entry in (i for i in task.inputs if i.source == number):
        if entry.shared:
            yield entry.slot, 0, entry.slot.spec.nbytes
            continue
        for start in range(0, rows, height):
            yield entry.slot, *slot_span(task, entry.slot, start, min(start + height, rows), shared=False)
