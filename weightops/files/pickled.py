"""Files of torch.save (.ckpt, .pt, .pth, .bin): their two containers, and names for the tensors in them.

Runs nothing, and reads no tensor: it finds where each lies. What a pickle says is the affair of unpickle.py.

Source: torch 2.13, serialization.py.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from weightops.errors import FormatError, TruncatedError, WeightopsError, listing, quote
from weightops.files.dtypes import DTYPES
from weightops.files.header import MAX_HEADER_BYTES, MAX_TENSORS, impostor
from weightops.files.source import ByteSource, read
from weightops.files.tensor import TensorInfo
from weightops.files.unpickle import CUT_OFF, Absent, Inert, Machine, View, members, words

if TYPE_CHECKING:
    from zipfile import ZipInfo

MAX_PICKLE_BYTES = 128 << 20  # of the pickle alone, which holds names and sizes; 2,500 tensors take 400 kB
MAX_DIRECTORY_BYTES = 32 << 20  # of a zip archive's directory; 250,000 tensors take 20 MB
MAX_REPEATED_BYTES = 16 << 20  # of a tensor that shows few stored bytes many times

# Where the storage of a key begins in the file.
_Locate = Callable[[str], int]


class Pickled(NamedTuple):
    """A file's `tensors` under dotted names, and in `left_out` the (dotted path, reason) of everything else in it."""

    tensors: dict[str, TensorInfo]
    left_out: list[tuple[str, str]]
    metadata: dict[str, str]


def read_pickled(source: ByteSource, shard: int = 0) -> Pickled:
    """Find the tensors of a file of torch.save. Raises FormatError; UnsafeError when it asks for more than tensors."""
    start = read(source, 0, min(source.size, 512))
    if start.startswith(b"PK\x03\x04"):
        root, locate = _read_zip(source)
    else:
        _refuse_impostor(source.label, start)
        root, locate = _read_legacy(source)
    return _Flattening(source.label, shard, locate).run(root)


# ------------------------------------------------------------------------------------------------ the zip container


class _File(io.RawIOBase):
    """A source as a file of Python's."""

    def __init__(self, source: ByteSource) -> None:
        self._source, self._at = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._source.size)[whence]
        if self._at < 0:
            raise OSError("before the beginning")
        return self._at

    def readinto(self, out: Any) -> int:
        view = memoryview(out)[: max(self._source.size - self._at, 0)]
        self._source.read_into(self._at, view)
        self._at += len(view)
        return len(view)

    def read(self, n: int = -1, /) -> bytes:
        if n > MAX_DIRECTORY_BYTES:
            what = f"a zip archive with a directory of {n:,} bytes, expected at most {MAX_DIRECTORY_BYTES:,}"
            raise FormatError(self._source.label, what)
        return super().read(n) or b""


def _machine(source: ByteSource, start: int, stop: int) -> Machine:
    return Machine(source.label, io.BufferedReader(_File(source), 64 << 10), start, stop)


def _entries(source: ByteSource) -> dict[str, ZipInfo]:
    """The archive's entries by name; all of them stored, none of them twice."""
    import zipfile  # draws in every compressor of the standard library

    try:
        with zipfile.ZipFile(_File(source)) as archive:
            infos = archive.infolist()
    except WeightopsError:
        raise
    except Exception:
        raise TruncatedError(source.label, "a zip archive without a readable directory at its end", CUT_OFF) from None
    entries: dict[str, ZipInfo] = {}
    for info in infos:
        what = f"zip entry {quote(info.filename)}"
        if info.filename in entries:
            raise FormatError(source.label, f"{what} stands twice", "which of the two is meant cannot be known")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise FormatError(source.label, f"{what} is compressed or encrypted, which torch.save never does")
        entries[info.filename] = info
    return entries


def _data_start(source: ByteSource, info: ZipInfo) -> int:
    """Where an entry's bytes begin. Only its own header knows: torch pads there, and not in the directory."""
    what = f"zip entry {quote(info.filename)}"
    if not 0 <= info.header_offset <= source.size - 30:
        raise TruncatedError(source.label, f"{what} begins outside the file, at byte {info.header_offset:,}", CUT_OFF)
    header = read(source, info.header_offset, 30)
    if not header.startswith(b"PK\x03\x04"):
        raise FormatError(source.label, f"{what} does not begin at byte {info.header_offset:,}, as the directory says")
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + info.file_size > source.size:
        what += f" ends at byte {start + info.file_size:,}, but the file holds {source.size:,}"
        raise TruncatedError(source.label, what, CUT_OFF)
    return start


def _read_zip(source: ByteSource) -> tuple[object, _Locate]:
    label, entries = source.label, _entries(source)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if not pickles:
        raise FormatError(label, "a zip archive without data.pkl, expected one written by torch.save")
    if len(pickles) > 1:
        raise FormatError(label, f"a zip archive with {len(pickles)} pickles, expected one: {listing(pickles)}")
    top = pickles[0].removesuffix("data.pkl")
    if f"{top}constants.pkl" in entries or any(name.startswith(f"{top}code/") for name in entries):
        hint = "load it with torch.jit and save its state_dict()"
        raise FormatError(label, "a TorchScript archive, a program rather than weights", hint)
    if order := entries.get(f"{top}byteorder"):
        found = read(source, _data_start(source, order), min(order.file_size, 16))
        if found != b"little":
            raise FormatError(label, f"its byte order is {quote(found.decode('latin-1'))}, expected 'little'")
    info = entries[pickles[0]]
    if info.file_size > MAX_PICKLE_BYTES:
        raise FormatError(label, f"its pickle holds {info.file_size:,} bytes, expected at most {MAX_PICKLE_BYTES:,}")
    start = _data_start(source, info)
    machine = _machine(source, start, start + info.file_size)

    @functools.cache
    def locate(key: str) -> int:
        dtype, values = machine.storages[key]
        info, nbytes = entries.get(f"{top}data/{key}"), values * dtype.nbytes
        if info is None:
            raise FormatError(label, f"storage {quote(key)} is missing: no zip entry {quote(f'{top}data/{key}')}")
        if info.file_size < nbytes:
            raise FormatError(label, f"storage {quote(key)} holds {info.file_size:,} bytes, expected {nbytes:,}")
        return _data_start(source, info)

    return machine.load(), locate


# ------------------------------------------------------------------------------------------------ the older container

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def _refuse_impostor(label: str, start: bytes) -> None:
    if not start:
        raise FormatError(label, "an empty file, expected one of torch.save")
    if start[257:262] == b"ustar":
        what = "a tar archive, as the earliest versions of torch.save wrote"
        raise FormatError(label, what, "load it with torch and save it again")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES:
        raise FormatError(label, "a safetensors file, expected one of torch.save", "name it .safetensors")
    if start[:1] != b"\x80":
        if other := impostor(start):
            raise FormatError(label, f"{other[0]}, expected one of torch.save", other[1])
        raise FormatError(label, f"begins with {quote(start[:8].decode('latin-1'))}, expected a file of torch.save")


def _read_legacy(source: ByteSource) -> tuple[object, _Locate]:
    """Before torch 1.6: magic number, protocol, system, object, list of keys, each a pickle; then the storages."""
    label, machine = source.label, _machine(source, 0, min(source.size, MAX_PICKLE_BYTES))
    magic = machine.load()
    if magic != _MAGIC:
        what = f"a pickle that holds {words(magic)}, expected one of torch.save, with its magic number"
        raise FormatError(label, what, "save its tensors with torch.save")
    if machine.load() != _PROTOCOL:
        raise FormatError(label, f"a file of torch.save with an unknown protocol, expected {_PROTOCOL}")
    system = machine.load()
    if type(system) is not dict or system.get("little_endian") is not True:
        raise FormatError(label, "was written on a big-endian machine, expected little-endian")
    root, keys = machine.load(), machine.load()
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise FormatError(label, f"its storages are listed in {words(keys)}, expected a list of texts")
    starts = _storage_starts(source, keys, machine)

    def locate(key: str) -> int:
        if key not in starts:
            raise FormatError(label, f"storage {quote(key)} is missing: the file lists {len(starts)} others")
        return starts[key]

    return root, locate


def _storage_starts(source: ByteSource, keys: list[str], machine: Machine) -> dict[str, int]:
    """Where each storage begins: they follow each other after the last pickle, each behind its number of values."""
    starts: dict[str, int] = {}
    at = machine.at
    for key in keys:
        what = f"storage {quote(key)}"
        if key in starts or key not in machine.storages:
            wrong = "is listed twice" if key in starts else "is listed, but nothing refers to it"
            raise FormatError(source.label, f"{what} {wrong}")
        dtype, values = machine.storages[key]
        starts[key] = at + 8
        stop = at + 8 + values * dtype.nbytes
        if stop > source.size:
            what = f"{what} ends at byte {stop:,}, but the file holds {source.size:,}"
            raise TruncatedError(source.label, what, CUT_OFF)
        found = int.from_bytes(read(source, at, 8), "little", signed=True)
        if found != values:
            raise FormatError(source.label, f"{what} holds {found:,} values, expected {values:,}")
        at = stop
    return starts


# ------------------------------------------------------------------------------------------------ names

# Where weights stand among other things, in the order of preference.
_WRAPPERS = ("state_dict", "model", "params_ema", "params")


def _is_tensor(value: object) -> bool:
    return isinstance(value, View | Absent)


def _edges(value: object, seen: set[int]) -> Iterator[tuple[object, object]]:
    """Each container under `value` with each of its members; a container in `seen` is not entered again."""
    todo = [value]
    while todo:
        parent = todo.pop()
        if id(parent) not in seen:
            seen.add(id(parent))
            for _, child in members(parent):
                yield parent, child
                if isinstance(child, dict | list | tuple | Inert):
                    todo.append(child)


def _holders(root: object) -> set[int]:
    """The containers, by identity, from which a tensor can be reached."""
    parents: dict[int, list[int]] = {}
    todo: list[int] = []
    for parent, child in _edges(root, set()):
        if _is_tensor(child):
            todo.append(id(parent))
        elif isinstance(child, dict | list | tuple | Inert):
            parents.setdefault(id(child), []).append(id(parent))
    holders: set[int] = set()
    while todo:
        holder = todo.pop()
        if holder not in holders:
            holders.add(holder)
            todo.extend(parents.pop(holder, []))
    return holders


class _Flattening:
    """From nested containers to dotted names. No recursion, and no container twice: a pickle may hold itself."""

    def __init__(self, label: str, shard: int, locate: _Locate) -> None:
        self.label, self.shard, self.locate = label, shard, locate
        self.found = Pickled({}, [], {})
        self.characters = 0

    def run(self, root: object) -> Pickled:
        if _is_tensor(root):
            root = {"tensor": root}
        holders = _holders(root)
        if id(root) not in holders and type(root) not in (dict, list, tuple):
            raise FormatError(self.label, f"holds {words(root)}, expected tensors")
        self._walk(self._unwrap(root, holders), holders)
        return self.found

    def _unwrap(self, root: object, holders: set[int]) -> object:
        """The weights of a checkpoint that names them so; what stands beside them is left out, in words."""
        named = {} if isinstance(root, list | tuple) else dict(members(root))
        beside = any(_is_tensor(value) for value in named.values())
        wrappers = _WRAPPERS[:1] if beside else _WRAPPERS
        wrapper = next((name for name in wrappers if id(named.get(name)) in holders), None)
        if wrapper is None:
            return root
        weights = named.pop(wrapper)
        seen = {id(root), id(weights)}
        for key, value in named.items():
            why = f" outside {wrapper!r}" if _is_tensor(value) else ""
            if id(value) in holders:
                count = sum(_is_tensor(child) for _, child in _edges(value, seen))
                why = f" with {count:,} tensor{'s' * (count != 1)} of its own, outside {wrapper!r}"
            self._leave(self._path(None, key), value, why)
        return weights

    def _walk(self, root: object, holders: set[int]) -> None:
        entered: dict[int, str] = {id(root): ""}
        todo: list[tuple[str | None, Iterator[tuple[object, object]]]] = [(None, iter(members(root)))]
        while todo:
            prefix, rest = todo[-1]
            for key, value in rest:
                path = self._path(prefix, key)
                if type(key) not in (str, int):
                    self._leave(path, value, f" under a key that is {words(key)}, expected a text")
                elif isinstance(value, View):
                    self._add(path, value)
                elif id(value) not in holders:
                    self._leave(path, value)
                elif id(value) in entered:
                    self._leave(path, value, f" that stands at {quote(entered[id(value)])} too")
                else:
                    entered[id(value)] = path
                    todo.append((path, iter(members(value))))
                    break
            else:
                todo.pop()

    def _path(self, prefix: str | None, key: object) -> str:
        part = key if type(key) is str else str(key) if type(key) is int else quote(key)
        # One long key may stand above many short ones: bound what all paths hold together, not each.
        self.characters += len(part) + len(prefix or "") + 1
        if self.characters > MAX_HEADER_BYTES:
            what = f"its names take more than {MAX_HEADER_BYTES:,} characters, the most that a safetensors header holds"
            raise FormatError(self.label, what)
        if len(self.found.tensors) + len(self.found.left_out) == MAX_TENSORS:
            what = f"holds more than {MAX_TENSORS:,} tensors and other things, the most that weightops reads"
            raise FormatError(self.label, what)
        return part if prefix is None else f"{prefix}.{part}"

    def _leave(self, path: str, value: object, why: str = "") -> None:
        plain = " without tensors" if type(value) in (dict, list, tuple) else ", no tensor"
        reason = value.reason if isinstance(value, Absent) else words(value) + (why or plain)
        self.found.left_out.append((path, reason))

    def _add(self, name: str, view: View) -> None:
        what = f"tensor {quote(name)}"
        if name in self.found.tensors:
            raise FormatError(self.label, f"{what} stands twice", "which of the two is meant cannot be known")
        if name.encode(errors="ignore").decode() != name:
            raise FormatError(self.label, f"{what} has a lone surrogate in its name, which is no character")
        self.found.tensors[name] = self._info(what, view)

    def _info(self, what: str, view: View) -> TensorInfo:
        spec, storage = view.spec, view.storage
        steps = tuple(step if n > 1 else 0 for n, step in zip(spec.shape, view.strides, strict=True))
        size, have = DTYPES[spec.dtype].bits // 8, storage.stop - storage.start
        # From the first value to the last, both included; a tensor of no values may claim any offset.
        span = (1 + sum((n - 1) * step for n, step in zip(spec.shape, steps, strict=True))) * size if spec.values else 0
        offset = view.offset * size if spec.values else 0
        if offset + span > have:
            raise FormatError(self.label, f"{what} reaches byte {offset + span:,} of a storage that holds {have:,}")
        if spec.nbytes > max(have, MAX_REPEATED_BYTES):
            raise FormatError(self.label, f"{what} is a view that repeats {span:,} bytes into {spec.nbytes:,}")
        start = self.locate(storage.key) + storage.start + offset
        row_major = tuple(prod(spec.shape[i + 1 :]) if n > 1 else 0 for i, n in enumerate(spec.shape))
        plain = steps == row_major or not spec.values
        return TensorInfo(spec, self.shard, start, start + span, None if plain else steps)
