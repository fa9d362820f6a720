"""Where a study stands on disk: what each step was made of and what it made, hashes of files, work that is unfinished.

All of it lies in DIR/.study; the steps' outputs lie in DIR/<step>, whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.diffusion.tables import write_whole
from weightops.errors import OutputError, UsageError, listing
from weightops.files.writer import lock, uninterrupted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FOLDER = ".study"
_CHUNK = 1 << 22
_LEFT_BEHIND = frozenset({"Thumbs.db", "desktop.ini"})  # beside what is hidden


@dataclass(slots=True)
class Record:
    """Of a step, or of an input that was made. A record without outputs says only which files are the study's.

    made_of: everything that decides about the outputs. outputs: file names within the step's folder, by what they
    are called in references, "" for the step itself; or names by key, of which there are several. files: the hash of
    every file that was made. shown: what a page shows of it.
    """

    made_of: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    shown: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def content(self) -> str:
        """The hash of all that was made."""
        return _together(self.files)


class Hashes:
    """The hashes of files and folders; of a file that was not touched since, without reading it again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_bytes())
            self._known = found if isinstance(found, dict) else {}

    def of(self, path: Path) -> str:
        """XXH3-128 of a file's bytes, or of the names and hashes of all files in a folder. Raises UsageError."""
        try:
            return self._folder(path) if path.is_dir() else self._file(path)
        except OSError as e:
            raise UsageError(str(path), f"cannot be read: {e.strerror or e}") from None

    def save(self) -> None:
        if self._changed:
            write_whole(self._path, json.dumps(self._known, sort_keys=True).encode())
            self._changed = False

    def _file(self, path: Path) -> str:
        import xxhash

        name, stat = str(path.absolute()), path.stat()
        # A write changes ctime, also one that puts mtime back.
        mark = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = self._known.get(name)
        if isinstance(known, list) and known[:-1] == mark:
            return str(known[-1])
        made = xxhash.xxh3_128()
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                made.update(chunk)
        self._known[name] = [*mark, made.hexdigest()]
        self._changed = True
        return str(made.hexdigest())

    def within(self, folder: Path) -> dict[str, str]:
        """The hash of each file below, by its name there."""
        return {file.relative_to(folder).as_posix(): self._file(file) for file in _files(folder)}

    def moved(self, old: Path, new: Path) -> None:
        """A folder has another name, and its files are the same."""
        start = f"{old.absolute()}{os.sep}"
        for name in [name for name in self._known if name.startswith(start)]:
            self._known[str(new.absolute() / name[len(start) :])] = self._known.pop(name)
            self._changed = True

    def _folder(self, path: Path) -> str:
        return _together(self.within(path))


def _together(files: Mapping[str, str]) -> str:
    import xxhash

    made = xxhash.xxh3_128()
    for name, digest in sorted(files.items()):
        made.update(f"{name}\0{digest}\n".encode("utf-8", "surrogateescape"))
    return str(made.hexdigest())


def _files(folder: Path) -> Iterator[Path]:
    """Every file below but those that desktops leave behind; links are followed, once each."""
    seen: set[str] = set()
    for at, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        names = [name for name in names if not (name.startswith(".") or name in _LEFT_BEHIND)]
        yield from (Path(at) / name for name in names if (Path(at) / name).is_file())


class State:
    """The folder of a study, held by one run at a time while `held` lasts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.own = folder / FOLDER
        self.hashes = Hashes(self.own / "hashes.json")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, and keep other runs out of it. Raises OutputError."""
        try:
            self.own.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.own / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise OutputError(str(self.folder), f"cannot be written: {e.strerror or e}") from None
        try:
            if not lock(handle, wait=False):
                raise OutputError(str(self.folder), "another run of a study is at work in it", "wait for its end")
            yield
        finally:
            os.close(handle)
            with contextlib.suppress(OutputError):
                self.hashes.save()

    def place(self, name: str) -> Path:
        """The folder of a step's outputs, or of a made input's ("inputs/first")."""
        return self.folder / name

    def record(self, name: str) -> Record | None:
        """What is known of a step; None: nothing of it was ever begun, or its record cannot be read."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            found = Record(**json.loads(self._record(name).read_bytes()))
            kinds = (found.made_of, dict), (found.outputs, dict), (found.files, dict), (found.shown, list)
            return found if all(isinstance(value, kind) for value, kind in kinds) else None
        return None

    def _record(self, name: str) -> Path:
        return self.own / "records" / f"{name}.json"

    def begin(self, name: str, made_of: Mapping[str, Any], *, resumes: bool) -> tuple[Path, bool]:
        """An empty folder to work in; or the one that an interrupted run of the same left, and True.

        Raises OutputError where the step's own folder holds something that no study made.
        """
        self._check_own(name)
        work, mark = self.own / "unfinished" / name, self.own / "unfinished" / f"{name}.json"
        said = json.dumps(made_of, sort_keys=True).encode()
        with contextlib.suppress(OSError):
            if resumes and work.is_dir() and mark.read_bytes() == said:
                return work, True
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_whole(mark, said)
        return work, False

    def _check_own(self, name: str) -> None:
        """What a step made is replaced, and nothing else."""
        place, record = self.place(name), self.record(name) or Record()
        if not os.path.lexists(place):
            return
        hint = "move it away, or name another folder with -o"
        if not place.is_dir():
            raise OutputError(str(place), "is no folder", hint)
        strange = sorted({file.relative_to(place).as_posix() for file in _files(place)} - record.files.keys())
        if strange:
            raise OutputError(str(place), f"holds what this study did not make: {listing(strange)}", hint)

    def drop(self, name: str) -> None:
        """Forget unfinished work."""
        shutil.rmtree(self.own / "unfinished" / name, ignore_errors=True)
        (self.own / "unfinished" / f"{name}.json").unlink(missing_ok=True)

    def finish(self, name: str, record: Record) -> None:
        """Put what was worked out into the step's place, and remember what it is."""
        place, work = self.place(name), self.own / "unfinished" / name
        record.files = self.hashes.within(work)
        old = self.own / "old"
        shutil.rmtree(old, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        with uninterrupted():
            before = self.record(name) or Record()
            # Until the last line it is not known which of them lie there.
            self._write(name, Record(files=before.files | record.files))
            if os.path.lexists(place):
                place.rename(old)
            work.rename(place)
            self.hashes.moved(work, place)
            self._write(name, record)
        self.drop(name)
        shutil.rmtree(old, ignore_errors=True)

    def _write(self, name: str, record: Record) -> None:
        path = self._record(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(record), indent=1, sort_keys=True).encode())

    def is_whole(self, name: str, record: Record) -> bool:
        """Is everything that the step made still there, as it was? What else lies there is not its own."""
        place = self.place(name)
        files = {place / file: hashed for file, hashed in record.files.items()}
        return all(file.is_file() and self.hashes.of(file) == hashed for file, hashed in files.items())
