"""The safetensors header: parse, refuse, encode. Every refusal of a bad file is here, with its numbers.

The grammar is read directly rather than through a JSON library: a JSON library accepts what the format
forbids (duplicate names, NaN, floats for integers) and builds whatever a hostile file asks for before
anyone can look at it. Here nothing is built but tensors and metadata, and of each a bounded number.

Source: the format document of huggingface/safetensors 0.8.
"""

from __future__ import annotations

import json
import re
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import TYPE_CHECKING, NamedTuple

from weightops.errors import FormatError, OutputError, TruncatedError, quote
from weightops.files.dtypes import DTYPES, ORDER
from weightops.files.source import read
from weightops.files.tensor import TensorInfo, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightops.files.source import ByteSource

MAX_HEADER_BYTES = 100_000_000  # the library's own cap
MAX_TENSORS = 250_000  # ours: the library takes a million, in 12 to 18 seconds and 1.4 GB
MAX_METADATA = 100_000  # texts of __metadata__; trainers write some fifty
MAX_DIMENSIONS = 1_000  # of one tensor; numpy stops at 64
METADATA_KEY = "__metadata__"
_MAX_INT = 2**63 - 1

_ODD = "the header is damaged or was not written by a safetensors library"
_CUT = "the download may have been cut off; fetch the file again"


class Header(NamedTuple):
    """What a file says of itself: `tensors` in the order of their bytes, `metadata`, and where the data begin."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(source: ByteSource, shard: int = 0) -> Header:
    """Read and check the header of a safetensors file. Raises FormatError, which names what is wrong."""
    label, size = source.label, source.size
    if size == 0:
        raise FormatError(label, "an empty file, expected safetensors")
    if size < 8:
        raise TruncatedError(label, f"holds {size} bytes, but the length of a safetensors header alone takes 8")
    start = read(source, 0, min(size, 512))
    length = int.from_bytes(start[:8], "little")
    # A cut file still begins as it should, and its length word may be the very bytes that mark an archive.
    plausible = start[8:9] == b"{" and length <= MAX_HEADER_BYTES
    if not plausible and (other := impostor(start)):
        raise FormatError(label, f"{other[0]}, expected safetensors", other[1])
    if length == 0:
        raise FormatError(label, "says that its header holds 0 bytes, expected at least 2")
    if length > MAX_HEADER_BYTES:
        if start[8:9] == b"{" and int.from_bytes(start[:8], "big") <= min(size - 8, MAX_HEADER_BYTES):
            raise FormatError(label, "its header length is written in big-endian order, expected little-endian")
        raise FormatError(
            label,
            f"says that its header holds {length:,} bytes, expected at most {MAX_HEADER_BYTES:,}",
            "this is not a safetensors file, or its first bytes are damaged",
        )
    if size > 8:
        _check_first(start[8:9], label)
    if length > size - 8:
        raise TruncatedError(label, f"says that its header holds {length:,} bytes, but only {size - 8:,} follow", _CUT)
    raw = start[8 : 8 + length] if 8 + length <= len(start) else read(source, 8, length)
    return parse_header(raw, data_start=8 + length, file_size=size, label=label, shard=shard)


def impostor(start: bytes) -> tuple[str, str | None] | None:
    """What a file's first bytes (up to 512) show it to be, if not safetensors, and a hint; None if nothing known."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not start.strip(b"\0"):
        return "holds only zero bytes at its beginning", "the download or the disk failed; fetch the file again"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page", "a download page or an error message was saved under this name; fetch the file itself"
    if start.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer, not the file itself", "fetch the file with `git lfs pull`"
    if start.startswith(b"GGUF"):
        return "a GGUF file", "quantised GGUF weights are not plain tensors; use the safetensors release"
    if start.startswith(b"PK\x03\x04"):
        return "a zip archive, as torch.save writes", "name it .ckpt or .pt and it is read as a pickle, safely"
    if start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04\x95", b"\x80\x05\x95")) and start[2:3] != b"\0":
        return "a pickle", "name it .ckpt or .pt and it is read as a pickle, safely"
    if start.startswith(b"\x89HDF"):
        return "an HDF5 file", "only safetensors and PyTorch files are read"
    if start.startswith((b"\x1f\x8b\x08", b"7z\xbc\xaf", b"Rar!", b"\xfd7zXZ", b"BZh")):
        return "a compressed archive", "unpack it first"
    if text.startswith((b"{", b"[")) and b"\0" not in start[:8]:  # a length word is never without zeros
        return "a JSON text", "an index of shards is read when its name ends in .safetensors.index.json"
    return None


def _check_first(first: bytes, label: str) -> None:
    if first != b"{":
        raise FormatError(label, f"its header begins with {repr(first)[1:]}, expected '{{'", _ODD)


# ------------------------------------------------------------------------------------------------ parsing

_SPACE = re.compile(r"[ \t\n\r]*")
_INT = re.compile(r"-?[0-9]++(?![.eE+-])")
_TOKEN = re.compile(r"[^\s,:\[\]{}\"]{1,40}")

# What Python's reader of JSON texts says, by its first words, and what we say.
_BROKEN = {
    "Unterminated": "no closing quote",
    "Invalid control": "a raw control character",
    "Invalid \\": "an unknown escape",
}


class _Scanner:
    """A position in the header's text; each method reads one thing and moves on, or refuses."""

    def __init__(self, text: str, label: str) -> None:
        self.text = text
        self.label = label
        self.at = 0

    def refuse(self, what: str) -> FormatError:
        return FormatError(self.label, what, _ODD)

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
        return self.text[self.at : self.at + 1]

    def found(self) -> str:
        """What stands here, for a message."""
        char = self.peek()
        token = _TOKEN.match(self.text, self.at)
        return quote(token.group() if token else char) if char else "the end of the header"

    def take(self, char: str, where: str) -> None:
        if self.peek() != char:
            raise self.refuse(f"header character {self.at:,}: found {self.found()}, expected {char!r} {where}")
        self.at += 1

    def string(self, where: str) -> str:
        if self.peek() != '"':
            raise self.refuse(f"header character {self.at:,}: found {self.found()}, expected a text {where}")
        begin = self.at
        value: str
        try:
            value, self.at = scanstring(self.text, begin + 1, True)
            if not value.isascii():
                value.encode()  # an escaped lone surrogate is no character
        except UnicodeEncodeError:
            raise self.refuse(f"header character {begin:,}: a lone surrogate in a text {where}") from None
        except json.JSONDecodeError as e:
            wrong = next((ours for theirs, ours in _BROKEN.items() if e.msg.startswith(theirs)), "a mistake")
            raise self.refuse(f"header character {begin:,}: {wrong} in a text {where}") from None
        return value

    def integer(self, where: str) -> int:
        char = self.peek()
        match = _INT.match(self.text, self.at)
        if match is None:
            kind = {'"': "a text", "[": "a list", "{": "an object"}.get(char) or self.found()
            raise self.refuse(f"{where}: found {kind}, expected a whole number")
        number = match.group()
        digits = number.removeprefix("-")
        if len(digits) > 25:
            raise self.refuse(f"{where}: found a number of {len(digits):,} digits, expected one below 2**63")
        if number != digits:
            raise self.refuse(f"{where}: found {number}, expected a number without a sign")
        if digits[0] == "0" and digits != "0":
            raise self.refuse(f"{where}: found {digits}, expected a whole number without leading zeros")
        value = int(digits)
        if value > _MAX_INT:
            raise self.refuse(f"{where}: found {value}, expected a number below 2**63")
        self.at = match.end()
        return value

    def more(self, close: str, first: bool, where: str) -> bool:
        """Is there another member before `close`? Reads the comma between members."""
        char = self.peek()
        if char == close:
            self.at += 1
            return False
        if not first:
            self.take(",", where)
            if self.peek() == close:
                raise self.refuse(f"header character {self.at:,}: found {close!r} after a comma {where}")
        return True

    def integers(self, where: str, most: int) -> tuple[int, ...]:
        if self.peek() != "[":
            raise self.refuse(f"{where}: found {self.found()}, expected a list")
        self.at += 1
        found: list[int] = []
        while self.more("]", not found, f"in {where}"):
            if len(found) == most:
                raise self.refuse(f"{where}: found more than {most:,} numbers, the most that it may hold")
            found.append(self.integer(where))
        return tuple(found)


# The form in which the library writes an entry; read at one stroke, and anything else field by field.
_CANONICAL = re.compile(
    r'\{"dtype":"([A-Z0-9_]{2,12})","shape":\[((?:(?:0|[1-9][0-9]{0,17})(?:,(?=[0-9])|(?=\]))){0,64})\],'
    r'"data_offsets":\[(0|[1-9][0-9]{0,17}),(0|[1-9][0-9]{0,17})\]\}'
)


def _entry(s: _Scanner, name: str) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of the tensor `name`, whose object begins here."""
    if s.peek() == "{" and (match := _CANONICAL.match(s.text, s.at)):
        s.at = match.end()
        dtype, dims, begin, end = match.groups()
        return dtype, tuple(map(int, dims.split(","))) if dims else (), int(begin), int(end)
    what = f"tensor {quote(name)}"
    if s.peek() != "{":
        raise s.refuse(f"{what}: found {s.found()}, expected an object with dtype, shape and data_offsets")
    s.at += 1
    fields: dict[str, object] = {}
    while s.more("}", not fields, f"in {what}"):
        field = s.string(f"(a field of {what})")
        s.take(":", f"in {what}")
        if field in fields:
            raise s.refuse(f"{what}: the field {field!r} stands twice")
        if field == "dtype":
            fields[field] = s.string(f"(the dtype of {what})")
        elif field == "shape":
            fields[field] = s.integers(f"shape of {what}", MAX_DIMENSIONS)
        elif field == "data_offsets":
            offsets = s.integers(f"data_offsets of {what}", 2)
            if len(offsets) != 2:
                raise s.refuse(f"{what}: found {len(offsets)} data_offsets, expected 2")
            fields[field] = offsets
        else:
            raise s.refuse(f"{what}: unknown field {quote(field)}, expected dtype, shape and data_offsets")
    missing = [f for f in ("dtype", "shape", "data_offsets") if f not in fields]
    if missing:
        raise s.refuse(f"{what}: {' and '.join(missing)} missing")
    begin, end = fields["data_offsets"]  # type: ignore[misc]
    return fields["dtype"], fields["shape"], begin, end  # type: ignore[return-value]


def _metadata(s: _Scanner) -> dict[str, str]:
    if s.text.startswith("null", s.at):
        s.at += 4
        return {}
    s.take("{", "for __metadata__, a map from text to text")
    found: dict[str, str] = {}
    first = True
    while s.more("}", first, "in __metadata__"):
        first = False
        key = s.string("(a key of __metadata__)")
        s.take(":", "in __metadata__")
        if key in found:
            raise s.refuse(f"__metadata__ holds {quote(key)} twice")
        if len(found) == MAX_METADATA:
            raise s.refuse(f"__metadata__ holds more than {MAX_METADATA:,} texts, the most that weightops reads")
        if s.peek() != '"':
            raise s.refuse(f"__metadata__ {quote(key)}: found {s.found()}, expected a text")
        found[key] = s.string("(a value of __metadata__)")
    return found


def parse_header(raw: bytes, *, data_start: int, file_size: int, label: str, shard: int = 0) -> Header:
    """The header in `raw`, for a file of `file_size` bytes whose tensor bytes begin at `data_start`."""
    _check_first(raw[:1], label)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise FormatError(
            label, f"header byte {e.start:,}: found 0x{raw[e.start]:02x}, which is not UTF-8", "the header is damaged"
        ) from None
    s = _Scanner(text, label)
    s.at = 1
    entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    metadata: dict[str, str] | None = None
    first = True
    while s.more("}", first, "between tensors"):
        first = False
        name = s.string("(a tensor's name)")
        s.take(":", "after a tensor's name")
        if name == METADATA_KEY:
            if metadata is not None:
                raise s.refuse("__metadata__ stands twice")
            s.peek()
            metadata = _metadata(s)
            continue
        if name in entries:
            raise FormatError(
                label, f"tensor {quote(name)} stands twice in the header", "which of the two is meant cannot be known"
            )
        if len(entries) == MAX_TENSORS:
            raise FormatError(label, f"holds more than {MAX_TENSORS:,} tensors, the most that weightops reads")
        entries[name] = _entry(s, name)
    if s.peek():
        raise s.refuse(f"header character {s.at:,}: found {s.found()} after the end of the header")
    return Header(_checked(entries, data_start, file_size, label, shard), metadata or {}, data_start)


def _checked(
    entries: dict[str, tuple[str, tuple[int, ...], int, int]], data_start: int, file_size: int, label: str, shard: int
) -> dict[str, TensorInfo]:
    """The tensors in the order of their bytes, once sizes and offsets agree with each other and with the file."""
    damaged = "the header contradicts itself; fetch the file again or ask its author"
    available = file_size - data_start
    tensors: dict[str, TensorInfo] = {}
    position, previous = 0, None
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda e: e[1][2:]):
        what = f"tensor {quote(name)}"
        known = DTYPES.get(dtype)
        if known is None:
            raise FormatError(label, f"{what}: unknown dtype {quote(dtype)}", f"known are {', '.join(DTYPES)}")
        if end < begin:
            raise FormatError(label, f"{what} ends at byte {end:,}, before it begins at {begin:,}", damaged)
        values, spec = _product(shape), f"{dtype} {_dims(shape)}"
        if values is None:
            raise FormatError(label, f"{what}: {spec} has 2**64 values or more", damaged)
        bits = values * known.bits
        if bits % 8:
            raise FormatError(label, f"{what}: {spec} takes {bits:,} bits, expected whole bytes", damaged)
        if bits // 8 != end - begin:
            raise FormatError(label, f"{what} holds {end - begin} bytes, but {spec} needs {bits // 8}", damaged)
        if begin > position:
            where = "at the beginning" if previous is None else f"after {quote(previous)}"
            raise FormatError(label, f"{begin - position:,} bytes {where} belong to no tensor", damaged)
        if begin < position:
            raise FormatError(label, f"{what} overlaps {quote(previous)} by {position - begin:,} bytes", damaged)
        if end > available:
            raise TruncatedError(
                label, f"{what} ends at byte {data_start + end:,}, but the file holds {file_size:,}", _CUT
            )
        tensors[name] = TensorInfo(TensorSpec(dtype, shape), shard, data_start + begin, data_start + end)
        position, previous = end, name
    if position != available:
        raise FormatError(label, f"{available - position:,} bytes after the last tensor belong to no tensor", damaged)
    return tensors


def _product(shape: Sequence[int]) -> int | None:
    """How many values; None beyond 64 bits at any step, as the library counts: [2**40, 2**40, 0] is too many."""
    total = 1
    for dim in shape:
        total *= dim
        if total >> 64:
            return None
    return total


def _dims(shape: Sequence[int]) -> str:
    return str(list(shape)) if len(shape) <= 8 else f"[{shape[0]}, ... {len(shape):,} dimensions]"


# ------------------------------------------------------------------------------------------------ encoding


def layout(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, int]]:
    """Begin and end of each tensor, relative to the data, in the library's order: dtype descending, then name."""
    return in_order({name: specs[name] for name in sorted(specs, key=lambda n: (-ORDER[specs[n].dtype], n))})


def in_order(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, int]]:
    """Begin and end of each tensor, relative to the data, one after the other as they stand here."""
    position = 0
    offsets: dict[str, tuple[int, int]] = {}
    for name, spec in specs.items():
        offsets[name] = (position, position + spec.nbytes)
        position += spec.nbytes
    return offsets


def encode_header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Length and header as the library writes them: compact, padded with spaces to 8 bytes; metadata keys sorted.

    Raises OutputError for what a header cannot hold; a name from a pickle may be any text.
    """
    if METADATA_KEY in specs:
        raise OutputError("", f"a tensor is named {METADATA_KEY!r}, a name that a safetensors file keeps for itself")
    head: dict[str, object] = {METADATA_KEY: dict(sorted(metadata.items()))} if metadata else {}
    for name, (begin, end) in layout(specs).items():
        spec = specs[name]
        head[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
    try:
        text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as e:
        raise OutputError("", f"a name or text holds {quote(e.object[e.start])}, which is not Unicode") from None
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise OutputError("", f"the header takes {len(text):,} bytes, but safetensors allows {MAX_HEADER_BYTES:,}")
    return len(text).to_bytes(8, "little") + text
