"""The safetensors header: parse, refuse, encode. Every refusal of a bad file is here, with its numbers.

The grammar is read directly rather than through a JSON library: a JSON library accepts what the format
forbids (duplicate names, NaN, floats for integers) and builds whatever a hostile file asks for before
anyone can look at it. Here nothing is built but tensors and metadata.

Source: the format document of huggingface/safetensors 0.8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from json.decoder import scanstring
from math import prod
from typing import NamedTuple

from weightops.errors import FormatError, TruncatedError, quote
from weightops.files.dtypes import DTYPES, ORDER
from weightops.files.source import ByteSource, read
from weightops.files.tensor import TensorInfo, TensorSpec

MAX_HEADER_BYTES = 100_000_000  # the library's own cap
MAX_TENSORS = 250_000  # ours: the library takes a million, in 12 to 18 seconds and 1.4 GB
METADATA_KEY = "__metadata__"
_MAX_INT = 2**63 - 1


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
    plausible = start[8:9] == b"{" and length <= size - 8
    if not plausible and (other := impostor(start)):
        raise FormatError(label, f"{other[0]}, expected safetensors", other[1])
    if length == 0:
        raise FormatError(label, "says that its header holds 0 bytes, expected at least 2")
    if length > MAX_HEADER_BYTES:
        if 0 < int.from_bytes(start[:8], "big") <= min(size - 8, MAX_HEADER_BYTES):
            raise FormatError(label, "its header length is written in big-endian order, expected little-endian")
        raise FormatError(
            label,
            f"says that its header holds {length:,} bytes, expected at most {MAX_HEADER_BYTES:,}",
            "this is not a safetensors file, or its first bytes are damaged",
        )
    if start[8:9] not in (b"{", b""):
        raise FormatError(label, f"its header begins with {quote(chr(start[8]))}, expected '{{'")
    if length > size - 8:
        raise TruncatedError(
            label,
            f"says that its header holds {length:,} bytes, but only {size - 8:,} follow",
            "the download may have been cut off; fetch the file again",
        )
    raw = start[8 : 8 + length] if 8 + length <= len(start) else read(source, 8, length)
    return parse_header(raw, data_start=8 + length, file_size=size, label=label, shard=shard)


def impostor(start: bytes) -> tuple[str, str | None] | None:
    """What a file's first bytes (up to 512) show it to be, if not safetensors, and a hint; None if nothing known."""
    text = start.lstrip().lower()
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
    if start[:1] == b"\x80" and start[1:2] in b"\x00\x01\x02\x03\x04\x05" and not start[5:8] == b"\0\0\0":
        return "a pickle", "name it .ckpt or .pt and it is read as a pickle, safely"
    if start.startswith(b"\x89HDF"):
        return "an HDF5 file", "only safetensors and PyTorch files are read"
    if start.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"\xfd7zXZ", b"BZh")):
        return "a compressed archive", "unpack it first"
    if text.startswith((b"{", b"[")) and start[8:9] != b"{":
        return "a JSON text", "an index of shards is read when its name ends in .safetensors.index.json"
    return None


# ------------------------------------------------------------------------------------------------ parsing

_SPACE = re.compile(r"[ \t\n\r]*")
_INT = re.compile(r"-?[0-9]{1,25}(?![0-9.eE+-])")
_TOKEN = re.compile(r"[^\s,:\[\]{}\"]{1,40}")


class _Scanner:
    """A position in the header's text; each method reads one thing and moves on, or refuses."""

    def __init__(self, text: str, label: str) -> None:
        self.text = text
        self.label = label
        self.at = 0

    def refuse(self, what: str) -> FormatError:
        return FormatError(self.label, what, "the header is damaged or was not written by a safetensors library")

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
        try:
            value, self.at = scanstring(self.text, begin + 1, True)
            if not value.isascii():
                value.encode()  # an escaped lone surrogate is no character
        except UnicodeEncodeError:
            raise self.refuse(f"header character {begin:,}: a text {where} with a lone surrogate") from None
        except ValueError as e:
            raise self.refuse(
                f"header character {begin:,}: a broken text {where}: {str(e).split(':')[0].lower()}"
            ) from None
        return value

    def integer(self, where: str) -> int:
        char = self.peek()
        match = _INT.match(self.text, self.at)
        if match is None:
            if char.isdigit() or char == "-":
                digits = re.compile(r"-?[0-9]*").match(self.text, self.at).end() - self.at  # type: ignore[union-attr]
                if digits > 25:
                    raise self.refuse(f"{where}: found a number of {digits:,} digits, expected one below 2**63")
            kind = "a text" if char == '"' else "a list" if char == "[" else "an object" if char == "{" else self.found()
            raise self.refuse(f"{where}: found {kind}, expected a whole number")
        digits_text = match.group()
        value = int(digits_text)
        if digits_text.lstrip("-") != str(abs(value)):
            raise self.refuse(f"{where}: found {digits_text}, expected a whole number without leading zeros")
        if value < 0:
            raise self.refuse(f"{where}: found {value}, expected a number that is not negative")
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

    def integers(self, where: str) -> tuple[int, ...]:
        if self.peek() != "[":
            raise self.refuse(f"{where}: found {self.found()}, expected a list")
        self.at += 1
        found: list[int] = []
        while self.more("]", not found, f"in {where}"):
            found.append(self.integer(where))
        return tuple(found)


# The form in which the library writes an entry; read at one stroke, and anything else field by field.
_CANONICAL = re.compile(
    r'\{"dtype":"([A-Z0-9_]{2,12})","shape":\[((?:(?:0|[1-9][0-9]{0,17})(?:,(?=[0-9])|(?=\])))*)\],'
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
            fields[field] = s.integers(f"shape of {what}")
        elif field == "data_offsets":
            offsets = s.integers(f"data_offsets of {what}")
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
        if s.peek() != '"':
            raise s.refuse(f"__metadata__ {quote(key)}: found {s.found()}, expected a text")
        found[key] = s.string("(a value of __metadata__)")
    return found


def parse_header(raw: bytes, *, data_start: int, file_size: int, label: str, shard: int = 0) -> Header:
    """The header in `raw`, for a file of `file_size` bytes whose tensor bytes begin at `data_start`."""
    if raw[:1] != b"{":
        raise FormatError(label, f"its header begins with {quote(chr(raw[0]) if raw else '')}, expected '{{'")
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
        s.take(":", f"after {quote(name)}")
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
    position, previous = 0, ""
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda e: e[1][2:]):
        what = f"tensor {quote(name)}"
        known = DTYPES.get(dtype)
        if known is None:
            raise FormatError(label, f"{what}: unknown dtype {quote(dtype)}", f"known are {', '.join(DTYPES)}")
        if end < begin:
            raise FormatError(label, f"{what} ends at byte {end:,}, before it begins at {begin:,}", damaged)
        bits = prod(shape) * known.bits
        if bits % 8:
            raise FormatError(label, f"{what}: {dtype} {list(shape)} takes {bits:,} bits, expected whole bytes", damaged)
        if bits // 8 != end - begin:
            raise FormatError(
                label, f"{what} holds {end - begin} bytes, but {dtype} {_dims(shape)} needs {bits // 8}", damaged
            )
        if begin != position:
            where = f"after {quote(previous)}" if previous else "at the beginning"
            if begin > position:
                raise FormatError(label, f"{begin - position:,} bytes {where} belong to no tensor", damaged)
            raise FormatError(label, f"{what} overlaps {quote(previous)} by {position - begin:,} bytes", damaged)
        if end > available:
            raise TruncatedError(
                label,
                f"{what} ends at byte {data_start + end:,}, but the file holds {file_size:,}",
                "the download may have been cut off; fetch the file again",
            )
        tensors[name] = TensorInfo(TensorSpec(dtype, shape), shard, data_start + begin, data_start + end)
        position, previous = end, name
    if position != available:
        raise FormatError(label, f"{available - position:,} bytes after the last tensor belong to no tensor", damaged)
    return tensors


def _dims(shape: Sequence[int]) -> str:
    return str(list(shape)) if len(shape) <= 8 else f"[{shape[0]}, ... {len(shape)} dimensions]"


# ------------------------------------------------------------------------------------------------ encoding


def layout(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, int]]:
    """Begin and end of each tensor, relative to the data, in the library's order: dtype descending, then name."""
    position = 0
    offsets: dict[str, tuple[int, int]] = {}
    for name in sorted(specs, key=lambda n: (-ORDER[specs[n].dtype], n)):
        offsets[name] = (position, position + specs[name].nbytes)
        position += specs[name].nbytes
    return offsets


def encode_header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Length and header as the library writes them: compact, padded with spaces to 8 bytes; metadata keys sorted."""
    head: dict[str, object] = {METADATA_KEY: dict(sorted(metadata.items()))} if metadata else {}
    for name, (begin, end) in layout(specs).items():
        spec = specs[name]
        head[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
