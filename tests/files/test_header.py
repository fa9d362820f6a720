"""The header: one bad file per refusal, odd files that are good, and the library as the judge of both."""

# ruff: noqa: E501 - a table is read by its lines: one case, one line

from __future__ import annotations

import ast
import json
import random
import re
import sys
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightops.errors import FormatError, OutputError, TruncatedError, WeightopsError
from weightops.files import header
from weightops.files.dtypes import DTYPES
from weightops.files.header import Header, encode_header, impostor, layout, parse_header, read_header
from weightops.files.tensor import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType

LABEL = "bad.safetensors"


class Memory:
    """A file that exists only here."""

    def __init__(self, data: bytes, label: str = LABEL) -> None:
        self.data = data
        self.label = label
        self.size = len(data)

    def read_into(self, start: int, out: memoryview) -> None:
        out[:] = self.data[start : start + len(out)]


def read(raw: bytes) -> Header:
    return read_header(Memory(raw))


def file(text: str | bytes, data: int | bytes = 8, length: int | None = None) -> bytes:
    """A file: length word, header text, and data (or so many zeros)."""
    head = text if isinstance(text, bytes) else text.encode()
    body = data if isinstance(data, bytes) else bytes(data)
    return (len(head) if length is None else length).to_bytes(8, "little") + head + body


def tensor(dtype: str = '"F32"', shape: str = "[2]", offsets: str = "[0,8]") -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


def one(dtype: str = '"F32"', shape: str = "[2]", offsets: str = "[0,8]", data: int | bytes = 8) -> bytes:
    """A file of one tensor, 'a'."""
    return file(f'{{"a":{tensor(dtype, shape, offsets)}}}', data)


def word(value: int) -> bytes:
    """A file whose length word is wrong, and all else right."""
    return file(GOOD, length=value)


def two(first: str, second: str, data: int = 16) -> bytes:
    return file(f'{{"a":{first},"b":{second}}}', data)


def meta(text: str) -> bytes:
    return file(f'{{"__metadata__":{text},"a":{tensor()}}}')


def assert_fit_to_print(error: WeightopsError) -> None:
    """One line, begun by what the user typed, short, with nothing that a terminal would act on."""
    assert str(error).startswith(f"{LABEL}: ")
    for line in (str(error), error.hint or ""):
        assert line.isprintable()
        assert len(line) <= 400


# ------------------------------------------------------------------------------------------------ refusals

NOTHING = tensor(shape="[0]", offsets="[0,0]")
GOOD = f'{{"a":{tensor()}}}'  # 54 characters
LONG = "x" * 10_000
HOSTILE = "\\u001b[31m\\u202e\\u0000/../"

ODD = "the header is damaged or was not written by a safetensors library"
SELF = "the header contradicts itself; fetch the file again or ask its author"
CUT = "the download may have been cut off; fetch the file again"
FIRST = "this is not a safetensors file, or its first bytes are damaged"
PICKLE = "name it .ckpt or .pt and it is read as a pickle, safely"
CODES = (
    "known are BOOL, F4, F6_E2M3, F6_E3M2, U8, I8, F8_E5M2, F8_E4M3, F8_E8M0, F8_E4M3FNUZ, F8_E5M2FNUZ, "
    "I16, U16, F16, BF16, I32, U32, F32, C64, F64, I64, U64"
)

# What it is, the file, the message after the label, the hint. The caps on tensors and metadata are lowered to 3.
# fmt: off
REFUSALS: list[tuple[str, bytes, str, str | None]] = [
    # ---- the length word
    ("an empty file", b"", "an empty file, expected safetensors", None),
    ("a cut length word", b"\x3a\0\0", "holds 3 bytes, but the length of a safetensors header alone takes 8", None),
    ("only a length word", bytes([54, 0, 0, 0, 0, 0, 0, 0]), "says that its header holds 54 bytes, but only 0 follow", CUT),
    ("length 0", word(0), "says that its header holds 0 bytes, expected at least 2", None),
    ("length 1", word(1), "header character 1: found the end of the header, expected a text (a tensor's name)", ODD),
    ("one too short", word(53), "header character 53: found the end of the header, expected ',' between tensors", ODD),
    ("one too long", word(55), "header character 54: found '\\x00' after the end of the header", ODD),
    ("to the last byte", file("{}", 3, 5), "header character 2: found '\\x00\\x00\\x00' after the end of the header", ODD),
    ("beyond the file", word(63), "says that its header holds 63 bytes, but only 62 follow", CUT),
    ("the cap", word(10**8), "says that its header holds 100,000,000 bytes, but only 62 follow", CUT),
    ("the cap and one", word(10**8 + 1), "says that its header holds 100,000,001 bytes, expected at most 100,000,000", FIRST),
    ("2**32 - 1", word(2**32 - 1), "says that its header holds 4,294,967,295 bytes, expected at most 100,000,000", FIRST),
    ("2**32", word(2**32), "says that its header holds 4,294,967,296 bytes, expected at most 100,000,000", FIRST),
    ("2**63 - 1", word(2**63 - 1), "says that its header holds 9,223,372,036,854,775,807 bytes, expected at most 100,000,000", FIRST),
    ("2**63", word(2**63), "says that its header holds 9,223,372,036,854,775,808 bytes, expected at most 100,000,000", FIRST),
    ("2**64 - 1", word(2**64 - 1), "says that its header holds 18,446,744,073,709,551,615 bytes, expected at most 100,000,000", FIRST),
    ("big-endian", word(54 << 56), "its header length is written in big-endian order, expected little-endian", None),
    ("a cut download", file("{" + " " * 631, 0)[:600], "says that its header holds 632 bytes, but only 592 follow", CUT),
    # A cut file is no archive, though its length word be the bytes that mark one.
    ("a length like gzip", file("{", 0, 0x088B1F), "says that its header holds 559,903 bytes, but only 1 follow", CUT),
    ("a length like a zip", file("{", 0, 0x04034B50), "says that its header holds 67,324,752 bytes, but only 1 follow", CUT),
    ("a length like a pickle", file("{", 0, 0x0280), "says that its header holds 640 bytes, but only 1 follow", CUT),
    # ---- impostors
    ("all zero", bytes(100), "holds only zero bytes at its beginning, expected safetensors", "the download or the disk failed; fetch the file again"),
    ("a web page", b"\n <!DOCTYPE html>\n<html>", "a web page, expected safetensors", "a download page or an error message was saved under this name; fetch the file itself"),
    ("a web page with a mark", b"\xef\xbb\xbf<html><body>", "a web page, expected safetensors", "a download page or an error message was saved under this name; fetch the file itself"),
    ("an XML error", b'<?xml version="1.0"?><Error>', "a web page, expected safetensors", "a download page or an error message was saved under this name; fetch the file itself"),
    ("git-LFS", b"version https://git-lfs.github.com/spec/v1\n", "a git-LFS pointer, not the file itself, expected safetensors", "fetch the file with `git lfs pull`"),
    ("GGUF", b"GGUF\x03\0\0\0\0\0\0\0", "a GGUF file, expected safetensors", "quantised GGUF weights are not plain tensors; use the safetensors release"),
    ("a zip", b"PK\x03\x04\0\0\x08\x08\0\0", "a zip archive, as torch.save writes, expected safetensors", PICKLE),
    ("a legacy torch file", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", "a pickle, expected safetensors", PICKLE),
    ("a small pickle", b"\x80\x04\x95\x06\0\0\0\0\0\0\0}\x94.", "a pickle, expected safetensors", PICKLE),
    ("HDF5", b"\x89HDF\r\n\x1a\n\0\0", "an HDF5 file, expected safetensors", "only safetensors and PyTorch files are read"),
    ("gzip", b"\x1f\x8b\x08\0\0\0\0\0\0\x03", "a compressed archive, expected safetensors", "unpack it first"),
    ("a JSON object", b'{"metadata": {"total_size": 8}}', "a JSON text, expected safetensors", "an index of shards is read when its name ends in .safetensors.index.json"),
    ("a JSON object, twice open", b'{"abcd":{"total_size": 8}}', "a JSON text, expected safetensors", "an index of shards is read when its name ends in .safetensors.index.json"),
    ("noise", b"\x93NUMPY\x01\0v\0{'descr'", "says that its header holds 379,676,406,402,707 bytes, expected at most 100,000,000", FIRST),
    # ---- the header's text
    ("white space first", file(" " + GOOD), "its header begins with ' ', expected '{'", ODD),
    ("a byte order mark", file("\ufeff" + GOOD), "its header begins with '\\xef', expected '{'", ODD),
    ("UTF-16 with a mark", file(GOOD.encode("utf-16")), "its header begins with '\\xff', expected '{'", ODD),
    ("UTF-16", file(GOOD.encode("utf-16-le")), "header character 1: found '\\x00', expected a text (a tensor's name)", ODD),
    ("a list", file("[]", 0), "its header begins with '[', expected '{'", ODD),
    ("a text", file('"{}"', 0), "its header begins with '\"', expected '{'", ODD),
    ("null", file("null", 0), "its header begins with 'n', expected '{'", ODD),
    ("invalid UTF-8", file(b'{"\xff":' + tensor().encode() + b"}"), "header byte 2: found 0xff, which is not UTF-8", "the header is damaged"),
    ("overlong UTF-8", file(b'{"\xc0\xaf":' + tensor().encode() + b"}"), "header byte 2: found 0xc0, which is not UTF-8", "the header is damaged"),
    ("a surrogate in UTF-8", file(b'{"\xed\xa0\x80":' + tensor().encode() + b"}"), "header byte 2: found 0xed, which is not UTF-8", "the header is damaged"),
    ("a lone surrogate", file(GOOD.replace("a", "\\ud83d", 1)), "header character 1: a lone surrogate in a text (a tensor's name)", ODD),
    ("surrogates in the wrong order", meta('{"k":"\\ude00\\ud83d"}'), "header character 21: a lone surrogate in a text (a value of __metadata__)", ODD),
    ("a raw control character", file(GOOD.replace("a", "a\n", 1)), "header character 1: a raw control character in a text (a tensor's name)", ODD),
    ("an unknown escape", file(GOOD.replace("a", "\\x61", 1)), "header character 1: an unknown escape in a text (a tensor's name)", ODD),
    ("a cut escape", file(GOOD.replace("a", "\\u00", 1)), "header character 1: an unknown escape in a text (a tensor's name)", ODD),
    ("no closing quote", file('{"a'), "header character 1: no closing quote in a text (a tensor's name)", ODD),
    ("trailing bytes", file(GOOD + "x"), "header character 54: found 'x' after the end of the header", ODD),
    ("a second header", file(GOOD + GOOD), "header character 54: found '{' after the end of the header", ODD),
    ("padded with zeros", file(GOOD + "\0\0"), "header character 54: found '\\x00\\x00' after the end of the header", ODD),
    ("a comment", file("{/* all */" + GOOD[1:]), "header character 1: found '/*', expected a text (a tensor's name)", ODD),
    ("single quotes", file(GOOD.replace('"', "'")), 'header character 1: found "\'a\'", expected a text (a tensor\'s name)', ODD),
    ("a number for a name", file(f"{{1:{tensor()}}}"), "header character 1: found '1', expected a text (a tensor's name)", ODD),
    ("no colon", file(f'{{"a" {tensor()}}}'), "header character 5: found '{', expected ':' after a tensor's name", ODD),
    ("no comma", file(f'{{"a":{tensor()}"b":{tensor()}}}'), "header character 53: found '\"', expected ',' between tensors", ODD),
    ("a comma too many", file(GOOD[:-1] + ",}"), "header character 54: found '}' after a comma between tensors", ODD),
    ("a comma first", file("{," + GOOD[1:]), "header character 1: found ',', expected a text (a tensor's name)", ODD),
    ("a comma too many in a shape", one(shape="[2,]"), "header character 31: found ']' after a comma in shape of tensor 'a'", ODD),
    ("an exotic space", file(GOOD.replace(":", ":\u00a0", 1)), "tensor 'a': found '\\xa0', expected an object with dtype, shape and data_offsets", ODD),
    ("deep lists", file('{"a":' + "[" * 100_000), "tensor 'a': found '[', expected an object with dtype, shape and data_offsets", ODD),
    ("deep objects", file('{"a":' * 100_000), "tensor 'a': unknown field 'a', expected dtype, shape and data_offsets", ODD),
    # ---- a tensor's record
    ("null for a tensor", file('{"a":null}'), "tensor 'a': found 'null', expected an object with dtype, shape and data_offsets", ODD),
    ("a list for a tensor", file('{"a":["F32",[2],[0,8]]}'), "tensor 'a': found '[', expected an object with dtype, shape and data_offsets", ODD),
    ("an empty record", file('{"a":{}}'), "tensor 'a': dtype and shape and data_offsets missing", ODD),
    ("no dtype", file('{"a":{"shape":[2],"data_offsets":[0,8]}}'), "tensor 'a': dtype missing", ODD),
    ("no shape", file('{"a":{"dtype":"F32","data_offsets":[0,8]}}'), "tensor 'a': shape missing", ODD),
    ("no offsets", file('{"a":{"dtype":"F32","shape":[2]}}'), "tensor 'a': data_offsets missing", ODD),
    ("a field twice", file(GOOD[:-2] + ',"dtype":"F32"}}'), "tensor 'a': the field 'dtype' stands twice", ODD),
    ("a field twice, in escapes", file('{"a":{"shape":[2],"sh\\u0061pe":[2]}}'), "tensor 'a': the field 'shape' stands twice", ODD),
    ("an unknown field", file(GOOD[:-2] + ',"strides":[1]}}'), "tensor 'a': unknown field 'strides', expected dtype, shape and data_offsets", ODD),
    ("a field with its name only", file('{"a":{"dtype"}}'), "header character 13: found '}', expected ':' in tensor 'a'", ODD),
    ("fields without a comma", file('{"a":{"dtype":"F32" "shape":[2]}}'), "header character 20: found '\"', expected ',' in tensor 'a'", ODD),
    ("an object for a dtype", one(dtype='{"F32":null}'), "header character 14: found '{', expected a text (the dtype of tensor 'a')", ODD),
    ("a number for a dtype", one(dtype="32"), "header character 14: found '32', expected a text (the dtype of tensor 'a')", ODD),
    ("an unknown dtype", one(dtype='"F12"'), "tensor 'a': unknown dtype 'F12'", CODES),
    ("a dtype in small letters", one(dtype='"f32"'), "tensor 'a': unknown dtype 'f32'", CODES),
    ("a hostile dtype", one(dtype=f'"{HOSTILE}"'), "tensor 'a': unknown dtype '\\x1b[31m\\u202e\\x00/../'", CODES),
    ("a number for a shape", one(shape="2"), "shape of tensor 'a': found '2', expected a list", ODD),
    ("NaN for a shape", one(shape="NaN"), "shape of tensor 'a': found 'NaN', expected a list", ODD),
    ("NaN in a shape", one(shape="[NaN]"), "shape of tensor 'a': found 'NaN', expected a whole number", ODD),
    ("Infinity in a shape", one(shape="[-Infinity]"), "shape of tensor 'a': found '-Infinity', expected a whole number", ODD),
    ("true in a shape", one(shape="[true]"), "shape of tensor 'a': found 'true', expected a whole number", ODD),
    ("a float in a shape", one(shape="[2.0]"), "shape of tensor 'a': found '2.0', expected a whole number", ODD),
    ("an exponent in a shape", one(shape="[2e0]"), "shape of tensor 'a': found '2e0', expected a whole number", ODD),
    ("a plus in a shape", one(shape="[+2]"), "shape of tensor 'a': found '+2', expected a whole number", ODD),
    ("a text in a shape", one(shape='["2"]'), "shape of tensor 'a': found a text, expected a whole number", ODD),
    ("a list in a shape", one(shape="[[2]]"), "shape of tensor 'a': found a list, expected a whole number", ODD),
    ("an object in a shape", one(shape="[{}]"), "shape of tensor 'a': found an object, expected a whole number", ODD),
    ("null in a shape", one(shape="[null]"), "shape of tensor 'a': found 'null', expected a whole number", ODD),
    ("Arabic digits", one(shape="[\u0662]"), "shape of tensor 'a': found '\u0662', expected a whole number", ODD),
    ("a cut shape", file('{"a":{"shape":[2,'), "shape of tensor 'a': found the end of the header, expected a whole number", ODD),
    ("a dimension below zero", one(shape="[-2]"), "shape of tensor 'a': found -2, expected a number without a sign", ODD),
    ("minus zero", one(shape="[-0]", offsets="[0,0]", data=0), "shape of tensor 'a': found -0, expected a number without a sign", ODD),
    ("a leading zero", one(shape="[02]"), "shape of tensor 'a': found 02, expected a whole number without leading zeros", ODD),
    ("a dimension of 2**63", one(shape="[0,9223372036854775808]", offsets="[0,0]", data=0), "shape of tensor 'a': found 9223372036854775808, expected a number below 2**63", ODD),
    ("a number of 26 digits", one(shape=f"[{'1' * 26}]"), "shape of tensor 'a': found a number of 26 digits, expected one below 2**63", ODD),
    ("a number of 5,000 digits", one(shape=f"[{'9' * 5000}]"), "shape of tensor 'a': found a number of 5,000 digits, expected one below 2**63", ODD),
    ("1,001 dimensions", one(shape=f"[2{',1' * 1000}]"), "shape of tensor 'a': found more than 1,000 numbers, the most that it may hold", ODD),
    ("a product of 2**64", one(shape="[4294967296,4294967296]"), "tensor 'a': F32 [4294967296, 4294967296] has 2**64 values or more", SELF),
    ("a product of 2**64 on the way to 0", one(shape="[4294967296,4294967296,0]", offsets="[0,0]", data=0), "tensor 'a': F32 [4294967296, 4294967296, 0] has 2**64 values or more", SELF),
    ("a product of 18,000 digits", one(shape=f"[{','.join(['9' * 18] * 1000)}]"), "tensor 'a': F32 [999999999999999999, ... 1,000 dimensions] has 2**64 values or more", SELF),
    ("bytes beyond 64 bits", one(shape="[18446744073709551,1000]"), "tensor 'a' holds 8 bytes, but F32 [18446744073709551, 1000] needs 73786976294838204000", SELF),
    ("half a byte", one('"F4"', "[3]", "[0,1]", 1), "tensor 'a': F4 [3] takes 12 bits, expected whole bytes", SELF),
    ("three quarters of a byte", one('"F6_E2M3"', "[1]", "[0,1]", 1), "tensor 'a': F6_E2M3 [1] takes 6 bits, expected whole bytes", SELF),
    ("too few bytes", one(shape="[3]"), "tensor 'a' holds 8 bytes, but F32 [3] needs 12", SELF),
    ("too many bytes", one(shape="[]"), "tensor 'a' holds 8 bytes, but F32 [] needs 4", SELF),
    ("too few bytes, nine dimensions", one(shape="[3,1,1,1,1,1,1,1,1]"), "tensor 'a' holds 8 bytes, but F32 [3, ... 9 dimensions] needs 12", SELF),
    # ---- offsets
    ("a number for offsets", one(offsets="8"), "data_offsets of tensor 'a': found '8', expected a list", ODD),
    ("one offset", one(offsets="[8]"), "tensor 'a': found 1 data_offsets, expected 2", ODD),
    ("three offsets", one(offsets="[0,8,8]"), "data_offsets of tensor 'a': found more than 2 numbers, the most that it may hold", ODD),
    ("an offset below zero", one(offsets="[-8,0]"), "data_offsets of tensor 'a': found -8, expected a number without a sign", ODD),
    ("an offset as a float", one(offsets="[0,8.0]"), "data_offsets of tensor 'a': found '8.0', expected a whole number", ODD),
    ("reversed", one(offsets="[8,0]"), "tensor 'a' ends at byte 0, before it begins at 8", SELF),
    ("a hole at the beginning", one(offsets="[8,16]", data=16), "8 bytes at the beginning belong to no tensor", SELF),
    ("a hole", two(tensor(), tensor(offsets="[9,17]"), 17), "1 bytes after 'a' belong to no tensor", SELF),
    ("a hole after a nameless tensor", file(f'{{"":{tensor()},"b":{tensor(offsets="[9,17]")}}}', 17), "1 bytes after '' belong to no tensor", SELF),
    ("an overlap", two(tensor(), tensor(offsets="[4,12]"), 12), "tensor 'b' overlaps 'a' by 4 bytes", SELF),
    ("the same bytes twice", two(tensor(), tensor(), 8), "tensor 'b' overlaps 'a' by 8 bytes", SELF),
    ("out of range", one(shape="[4]", offsets="[0,16]"), "tensor 'a' ends at byte 79, but the file holds 71", CUT),
    ("far out of range", one('"U8"', "[9223372036854775807]", "[0,9223372036854775807]"), "tensor 'a' ends at byte 9,223,372,036,854,775,904, but the file holds 105", CUT),
    ("cut data", one(data=7), "tensor 'a' ends at byte 70, but the file holds 69", CUT),
    ("trailing data", one(data=9), "1 bytes after the last tensor belong to no tensor", SELF),
    ("data without a tensor", file("{}", 8), "8 bytes after the last tensor belong to no tensor", SELF),
    # ---- names
    ("a name twice", file(f'{{"a":{tensor()},"a":{tensor()}}}'), "tensor 'a' stands twice in the header", "which of the two is meant cannot be known"),
    ("a name twice, in escapes", file(f'{{"a":{tensor()},"\\u0061":{tensor()}}}'), "tensor 'a' stands twice in the header", "which of the two is meant cannot be known"),
    ("a hostile name", file(f'{{"{HOSTILE}":null}}'), "tensor '\\x1b[31m\\u202e\\x00/../': found 'null', expected an object with dtype, shape and data_offsets", ODD),
    ("a long name", file(f'{{"{LONG}":null}}'), f"tensor '{'x' * 46} ... {'x' * 46}': found 'null', expected an object with dtype, shape and data_offsets", ODD),
    ("two long names", file(f'{{"{LONG}":{tensor()},"{LONG}y":{tensor()}}}'), f"tensor '{'x' * 46} ... {'x' * 45}y' overlaps '{'x' * 46} ... {'x' * 46}' by 8 bytes", SELF),
    ("too many tensors", file(",".join(f'"{i}":{NOTHING}' for i in range(4)).join("{}"), 0), "holds more than 3 tensors, the most that weightops reads", None),
    # ---- metadata
    ("a list for metadata", meta("[]"), "header character 16: found '[', expected '{' for __metadata__, a map from text to text", ODD),
    ("a text for metadata", meta('"a"'), "header character 16: found '\"', expected '{' for __metadata__, a map from text to text", ODD),
    ("a number in metadata", meta('{"k":1}'), "__metadata__ 'k': found '1', expected a text", ODD),
    ("null in metadata", meta('{"k":null}'), "__metadata__ 'k': found 'null', expected a text", ODD),
    ("an object in metadata", meta('{"k":{"l":"m"}}'), "__metadata__ 'k': found '{', expected a text", ODD),
    ("a number for a metadata key", meta('{1:""}'), "header character 17: found '1', expected a text (a key of __metadata__)", ODD),
    ("metadata without a colon", meta('{"k"}'), "header character 20: found '}', expected ':' in __metadata__", ODD),
    ("metadata without a comma", meta('{"k":"" "l":""}'), "header character 24: found '\"', expected ',' in __metadata__", ODD),
    ("cut metadata", file('{"__metadata__":{"k":"v'), "header character 21: no closing quote in a text (a value of __metadata__)", ODD),
    ("a metadata key twice", meta('{"k":"1","\\u006b":"2"}'), "__metadata__ holds 'k' twice", ODD),
    ("metadata twice", file(f'{{"__metadata__":{{}},"__metadata__":null,"a":{tensor()}}}'), "__metadata__ stands twice", ODD),
    ("too many texts of metadata", meta(json.dumps({str(i): "" for i in range(4)})), "__metadata__ holds more than 3 texts, the most that weightops reads", ODD),
    ("hostile markup", meta('{"<script>\\u001b":1}'), "__metadata__ '<script>\\x1b': found '1', expected a text", ODD),
]
# fmt: on

# Files that the library takes and we do not, by their line in the table, and how our message says so.
STRICTER = {
    "white space first": r"its header begins with '( |\\t|\\n|\\r)'",  # the format document forbids it
    "a list for a tensor": r"found '\[', expected an object with dtype",  # a habit of serde, not of the format
    "an object for a dtype": r"found '{', expected a text \(the dtype",  # the same
    "an unknown field": r": unknown field ",  # what it means, and so what a copy must keep, cannot be known
    "a name twice": r"^tensor .* stands twice in the header",  # the document forbids it; the library keeps the last
    "a name twice, in escapes": r"^tensor .* stands twice in the header",
    "a metadata key twice": r"^__metadata__ holds .* twice",
    "a dimension of 2**63": r"^shape of .* expected (a number|one) below 2\*\*63",  # no tensor library can hold it
    "1,001 dimensions": r"^shape of .* found more than 1,000 numbers",  # our caps
    "too many tensors": r"^holds more than [0-9,]+ tensors",
    "too many texts of metadata": r"^__metadata__ holds more than [0-9,]+ texts",
}

# What a header cannot hold: names, metadata, the message. The cap on a header's bytes is lowered to 1,000.
UNWRITABLE: list[tuple[str, list[str], dict[str, str], str]] = [
    ("the reserved name", ["a", "__metadata__"], {}, "a tensor is named '__metadata__', a name that a safetensors file keeps for itself"),
    ("a surrogate in a name", ["\ud800"], {}, "a name or text holds '\\ud800', which is not Unicode"),
    ("a surrogate in metadata", ["a"], {"k": "\udfff"}, "a name or text holds '\\udfff', which is not Unicode"),
    ("too long", ["x" * 1000], {}, "the header takes 1,056 bytes, but safetensors allows 1,000"),
]  # fmt: skip


@pytest.fixture
def low_caps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MAX_TENSORS", 3)
    monkeypatch.setattr(header, "MAX_METADATA", 3)


def refusal(raw: bytes) -> FormatError:
    with pytest.raises(FormatError) as caught:
        read(raw)
    return caught.value


def refusal_to_write(names: list[str], metadata: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> OutputError:
    with monkeypatch.context() as patch:
        patch.setattr(header, "MAX_HEADER_BYTES", 1000)
        with pytest.raises(OutputError) as caught:
            encode_header({name: TensorSpec("F32", (2,)) for name in names}, metadata)
    return caught.value


@pytest.mark.usefixtures("low_caps")
@pytest.mark.parametrize(("raw", "message", "hint"), [pytest.param(*case[1:], id=case[0]) for case in REFUSALS])
def test_a_bad_file_is_refused_with_its_numbers(raw: bytes, message: str, hint: str | None) -> None:
    error = refusal(raw)
    assert str(error) == f"{LABEL}: {message}"
    assert error.hint == hint
    assert error.exit_code == 1
    assert isinstance(error, TruncatedError) == (hint == CUT or 0 < len(raw) < 8)
    assert_fit_to_print(error)


@pytest.mark.parametrize(("names", "metadata", "message"), [pytest.param(*c[1:], id=c[0]) for c in UNWRITABLE])
def test_what_a_header_cannot_hold_is_not_written(
    names: list[str], metadata: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert str(refusal_to_write(names, metadata, monkeypatch)) == message


@pytest.mark.usefixtures("low_caps")
def test_every_refusal_of_the_module_is_in_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: set[int] = set()

    def trace(frame: FrameType, event: str, arg: object) -> Callable[..., object] | None:
        if frame.f_code.co_filename != header.__file__:
            return None
        raised.add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for _, raw, _, _ in REFUSALS:
            if len(raw) < 100_000:
                refusal(raw)
        for _, names, metadata, _ in UNWRITABLE:
            refusal_to_write(names, metadata, monkeypatch)
    finally:
        sys.settrace(before)
    module = ast.parse(Path(header.__file__).read_text(encoding="utf-8"))
    raises = {node.lineno: ast.unparse(node) for node in ast.walk(module) if isinstance(node, ast.Raise)}
    assert len(raises) > 30
    assert [text for line, text in raises.items() if line not in raised] == []


@pytest.mark.usefixtures("low_caps")
def test_the_library_takes_none_of_the_bad_files_but_those_where_we_are_stricter() -> None:
    taken = {name: message for name, raw, message, _ in REFUSALS if library(raw) is not None}
    assert taken.keys() == STRICTER.keys()
    for name, message in taken.items():
        assert re.search(STRICTER[name], message), name


@pytest.mark.parametrize("start", [b"\x3a\0\0\0\0\0\0\0{", b"{\0\0\0\0\0\0\0", b"\x80\x02\0\0\0\0\0\0", b"text"])
def test_a_beginning_that_proves_nothing_is_no_impostor(start: bytes) -> None:
    assert impostor(start) is None


# ------------------------------------------------------------------------------------------------ odd, but good

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def library(raw: bytes) -> Tensors | None:
    """What the library finds in a file; None when it refuses."""
    try:
        found = safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return None
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in found}


def ours(raw: bytes) -> Tensors:
    """What we find, in the same form; in the order of the bytes."""
    found = read(raw).tensors
    return {name: (t.spec.dtype, t.spec.shape, raw[t.start : t.stop]) for name, t in found.items()}


BYTES = bytes(range(1, 9))
A = ("F32", (2,), BYTES)
E_ACUTE, E_AND_ACUTE = "\u00e9", "e\u0301"


def named(name: str) -> bytes:
    """A file whose only tensor bears this name, as JSON spells it."""
    return file(f'{{"{name}":{tensor()}}}', BYTES)


# What it is, the file, its tensors in the order of their bytes, its metadata.
# fmt: off
GOOD_FILES: list[tuple[str, bytes, Tensors, dict[str, str]]] = [
    ("no tensors", file("{}", 0), {}, {}),
    ("metadata only", file('{"__metadata__":{"k":"v"}}', 0), {}, {"k": "v"}),
    ("metadata null", file(f'{{"__metadata__":null,"a":{tensor()}}}', BYTES), {"a": A}, {}),
    ("metadata empty", file(f'{{"__metadata__":{{}},"a":{tensor()}}}', BYTES), {"a": A}, {}),
    ("metadata last", file(f'{{"a":{tensor()},"__metadata__":{{"":"<b>\\u001b"}}}}', BYTES), {"a": A}, {"": "<b>\x1b"}),
    ("metadata under an escaped name", file(f'{{"\\u005f_metadata__":{{"k":"v"}},"a":{tensor()}}}', BYTES), {"a": A}, {"k": "v"}),
    ("padding", file(GOOD + "  ", BYTES), {"a": A}, {}),
    ("padding of every kind", file(GOOD + " \t\r\n", BYTES), {"a": A}, {}),
    ("space everywhere", file(re.sub(r"([][{}:,])", " \\1\t\r\n", GOOD).lstrip(), BYTES), {"a": A}, {}),
    ("fields in another order", file('{"a":{"data_offsets":[0,8],"shape":[2],"dtype":"F32"}}', BYTES), {"a": A}, {}),
    ("fields in escapes", file(GOOD.replace("dtype", "d\\u0074ype").replace("F32", "\\u004632"), BYTES), {"a": A}, {}),
    ("an empty name", named(""), {"": A}, {}),
    ("a long name", named(LONG), {LONG: A}, {}),
    ("escapes", named('\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9'), {'"\\/\b\f\n\r\t\u00e9': A}, {}),
    ("a pair of surrogates", named("\\ud83d\\ude00"), {"\U0001f600": A}, {}),
    ("control characters", named("\\u0000\\u001b[31m\x7f\x85"), {"\0\x1b[31m\x7f\x85": A}, {}),
    ("bidi", named("\u202eabc\u2066"), {"\u202eabc\u2066": A}, {}),
    ("a path", named("../../etc/passwd"), {"../../etc/passwd": A}, {}),
    ("almost the reserved name", named("__Metadata__"), {"__Metadata__": A}, {}),
    ("two forms of one letter", file(f'{{"{E_AND_ACUTE}":{NOTHING},"{E_ACUTE}":{tensor()}}}', BYTES), {E_AND_ACUTE: ("F32", (0,), b""), E_ACUTE: A}, {}),
    ("not in the order of the bytes", two(tensor(offsets="[8,16]"), tensor(), 0) + BYTES[::-1] + BYTES, {"b": ("F32", (2,), BYTES[::-1]), "a": A}, {}),
    ("no dimensions", one(shape="[]", offsets="[0,4]", data=BYTES[:4]), {"a": ("F32", (), BYTES[:4])}, {}),
    ("1,000 dimensions", one(shape="[2" + ",1" * 999 + "]", data=BYTES), {"a": ("F32", (2, *[1] * 999), BYTES)}, {}),
    ("no values", file(f'{{"a":{NOTHING}}}', 0), {"a": ("F32", (0,), b"")}, {}),
    ("no values, two of them", file(f'{{"a":{NOTHING},"b":{NOTHING}}}', 0), {"a": ("F32", (0,), b""), "b": ("F32", (0,), b"")}, {}),
    ("no values, in between and behind", file(f'{{"z":{tensor(shape="[3,0]", offsets="[8,8]")},"a":{tensor()},"y":{NOTHING}}}', BYTES), {"y": ("F32", (0,), b""), "a": A, "z": ("F32", (3, 0), b"")}, {}),
    ("no values, then huge dimensions", one(shape="[0,9223372036854775807,9223372036854775807]", offsets="[0,0]", data=0), {"a": ("F32", (0, 2**63 - 1, 2**63 - 1), b"")}, {}),
    ("unaligned", two(tensor('"U8"', "[1]", "[0,1]"), tensor(offsets="[1,9]"), 0) + b"\7" + BYTES, {"a": ("U8", (1,), b"\7"), "b": A}, {}),
    ("half bytes that fill whole ones", one('"F4"', "[3,2]", "[0,3]", BYTES[:3]), {"a": ("F4", (3, 2), BYTES[:3])}, {}),
]
# fmt: on


@pytest.mark.parametrize(("raw", "tensors", "metadata"), [pytest.param(*case[1:], id=case[0]) for case in GOOD_FILES])
def test_an_odd_file_is_read_as_the_library_reads_it(raw: bytes, tensors: Tensors, metadata: dict[str, str]) -> None:
    assert list(ours(raw).items()) == list(tensors.items())
    assert read(raw).metadata == metadata
    assert library(raw) == tensors


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_read(dtype: str) -> None:
    nbytes = DTYPES[dtype].bits
    data = bytes(range(nbytes))
    raw = file(f'{{"a":{{"dtype":"{dtype}","shape":[2,4],"data_offsets":[0,{nbytes}]}}}}', data)
    assert ours(raw) == library(raw) == {"a": (dtype, (2, 4), data)}


def test_the_dtypes_stand_in_the_order_of_the_library() -> None:
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(one(dtype='"F12"'))
    assert re.findall(r"`(\w+)`", str(caught.value)) == ["F12", *DTYPES]


def test_a_header_is_read_from_anywhere_in_a_file() -> None:
    text = f'{{"a":{tensor()}}}'.encode()
    found = parse_header(text, data_start=1000, file_size=1008, label=LABEL, shard=7)
    assert found.tensors["a"] == (TensorSpec("F32", (2,)), 7, 1000, 1008, None)
    assert found.data_start == 1000
    with pytest.raises(FormatError, match=f"^{LABEL}: its header begins with '', expected '{{'$"):
        parse_header(b"", data_start=8, file_size=8, label=LABEL)


# ------------------------------------------------------------------------------------------------ bounded cost


def test_more_tensors_than_the_cap_are_refused_in_time() -> None:
    raw = file(",".join(f'"{i}":{NOTHING}' for i in range(header.MAX_TENSORS + 1)).join("{}"), 0)
    before = time.perf_counter()
    error = refusal(raw)
    assert str(error) == f"{LABEL}: holds more than 250,000 tensors, the most that weightops reads"
    assert time.perf_counter() - before < 10


FIVE = 5_000_000
JUNK: dict[str, Callable[[], bytes]] = {
    "lists": lambda: b'{"a":' + b"[" * FIVE,
    "objects": lambda: b'{"a":' * (FIVE // 5),
    "brackets": lambda: b"{" * FIVE,
    "dimensions": lambda: b'{"a":{"dtype":"F32","shape":[0' + b",0" * (FIVE // 2) + b'],"data_offsets":[0,0]}}',
    "offsets": lambda: b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0' + b",0" * (FIVE // 2) + b"]}}",
    "digits": lambda: b'{"a":{"dtype":"F32","shape":[' + b"9" * FIVE + b"]}}",
    "a name": lambda: b'{"' + b"\xf3\xa0\x80\x81" * (FIVE // 4) + b'":null}',
    "a dtype": lambda: b'{"a":{"dtype":"' + b"F" * FIVE + b'","shape":[0],"data_offsets":[0,0]}}',
    "metadata": lambda: b'{"__metadata__":{' + b",".join(b'"%0494d":""' % i for i in range(FIVE // 500)) + b',"":""}}',
}


@pytest.mark.parametrize("junk", JUNK)
def test_junk_costs_no_more_memory_than_a_few_times_its_size(junk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MAX_METADATA", 10_000)
    text = JUNK[junk]()
    tracemalloc.start()
    try:
        error = refusal(file(text, 0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * len(text)
    assert_fit_to_print(error)


# ------------------------------------------------------------------------------------------------ properties


def specs(most: int = 6, dtypes: Iterable[str] = DTYPES) -> st.SearchStrategy[dict[str, TensorSpec]]:
    def whole_bytes(dtype: str, shape: list[int]) -> TensorSpec:
        return TensorSpec(dtype, (*shape, 4) if DTYPES[dtype].bits < 8 else tuple(shape))

    spec = st.builds(whole_bytes, st.sampled_from(sorted(dtypes)), st.lists(st.integers(0, 4), max_size=3))
    return st.dictionaries(st.text(max_size=8).filter(lambda name: name != "__metadata__"), spec, max_size=most)


def texts(most: int) -> st.SearchStrategy[dict[str, str]]:
    return st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=most)


def whole(specs: dict[str, TensorSpec], metadata: dict[str, str], seed: int = 0) -> bytes:
    """A whole file, as we lay it out, of random bytes."""
    return encode_header(specs, metadata) + random.Random(seed).randbytes(sum(s.nbytes for s in specs.values()))


@settings(deadline=None, max_examples=60)
@given(specs=specs(), metadata=texts(3))
def test_what_is_encoded_is_parsed_again(specs: dict[str, TensorSpec], metadata: dict[str, str]) -> None:
    raw = whole(specs, metadata)
    found = read(raw)
    assert {name: info.spec for name, info in found.tensors.items()} == specs
    assert found.metadata == metadata
    assert found.data_start % 8 == 0
    places = {
        name: (info.start - found.data_start, info.stop - found.data_start) for name, info in found.tensors.items()
    }
    assert places == layout(specs)
    assert library(raw) == ours(raw)


# The library's words for the dtypes that its writer knows; F6 it only reads.
WORDS = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}


def rewritten(raw: bytes, metadata: dict[str, str]) -> bytes:
    """The tensors of a file, written again by the library."""
    buffers, theirs = [], {}
    for name, (dtype, shape, data) in ours(raw).items():
        buffers.append(np.frombuffer(data + b"\0", np.uint8))  # a pointer even to no bytes
        stored = (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape
        theirs[name] = safetensors.TensorSpec(
            dtype=WORDS[dtype], shape=stored, data_ptr=buffers[-1].ctypes.data, data_len=len(data)
        )
    return safetensors.serialize(theirs, metadata or None)


@settings(deadline=None, max_examples=60)
@given(specs=specs(dtypes=WORDS), metadata=texts(1), seed=st.integers(0, 9))
def test_our_bytes_are_those_of_the_library(specs: dict[str, TensorSpec], metadata: dict[str, str], seed: int) -> None:
    raw = whole(specs, metadata, seed)
    assert rewritten(raw, metadata) == raw


def test_our_order_of_dtypes_is_that_of_the_library() -> None:
    raw = whole({f"{dtype} {i}": TensorSpec(dtype, (2, 4)) for i in (2, 1) for dtype in WORDS}, {})
    assert rewritten(raw, {}) == raw
    every = layout({dtype: TensorSpec(dtype, (2, 4)) for dtype in DTYPES})
    assert list(every) == list(DTYPES)[::-1]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(specs=specs(dtypes=set(WORDS) - {"F4"}), metadata=texts(1), seed=st.integers(0, 9))
def test_our_bytes_are_those_of_save_file(
    specs: dict[str, TensorSpec], metadata: dict[str, str], seed: int, tmp_path: Path
) -> None:
    raw = whole(specs, metadata, seed)
    tensors = {}
    for name, (dtype, shape, data) in ours(raw).items():
        values = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        tensors[name] = values.view(getattr(torch, WORDS[dtype])).reshape(shape)
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", metadata or None)
    assert (tmp_path / "theirs.safetensors").read_bytes() == raw


TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|-?[0-9]+|[^"]', re.DOTALL)
STRAY = [
    *'{}[]:, \t\n"\\0-\0', "null", "true", "NaN", "1", "2", "8", "-0", "-1", "00", "1.0", "1e0", "4294967296",
    "9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616",
    '""', '"a"', '"\\u0061"', '"\\ud800"', '"__metadata__"', '"dtype"', '"shape"', '"data_offsets"', '"F32"', '"F4"',
    '"U8"', '"F12"', '"\x1b"', '"a":', '"x":1', '"shape":[0]', '"dtype":"F32"', f'"a":{tensor()}', f'"z":{NOTHING}',
    '"__metadata__":{"a":"b"}', "{}", "[]", "[0]", "[0,0]",
]  # fmt: skip


def damaged(raw: bytes, pick: Callable[[int], int]) -> bytes:
    """The file with a few edits of its header, and sometimes of its length word or data; `pick(n)` is below n."""
    length = int.from_bytes(raw[:8], "little")
    head, data = raw[8 : 8 + length], raw[8 + length :]
    for _ in range(1 + pick(3)):
        if pick(3):
            tokens = TOKENS.findall(head.decode("utf-8", "ignore"))
            at, other = pick(len(tokens) + 1), pick(len(tokens) + 1)
            new = STRAY[pick(len(STRAY))] if pick(4) else "".join(tokens[min(at, other) : max(at, other)])
            numbers = [i for i, token in enumerate(tokens) if token.isdigit()]
            if numbers and not pick(3):
                at = numbers[pick(len(numbers))]
                new = str(max(0, int(tokens[at]) + pick(5) - 2))
            tokens[at : at + pick(3)] = [new]
            head = "".join(tokens).encode()
        else:
            at = pick(len(head) + 1)
            head = head[:at] + bytes([pick(256)] * pick(2)) + head[at + pick(3) :]
    if not pick(8):
        data = (data + bytes(8))[: pick(len(data) + 9)]
    stated = len(head) if pick(8) else max(0, len(head) + pick(5) - 2)
    return stated.to_bytes(8, "little") + head + data


def assert_agreement(raw: bytes) -> bool:
    """We take what the library takes, and read the same in it; return whether both do."""
    theirs = library(raw)
    try:
        found = ours(raw)
    except FormatError as e:
        error = e
    else:
        assert found == theirs
        return True
    assert_fit_to_print(error)
    assert theirs is None or any(re.search(reason, error.what) for reason in STRICTER.values()), error
    return False


@settings(deadline=None, max_examples=300)
@given(specs=specs(3), metadata=texts(2), picks=st.randoms(use_true_random=False))
def test_we_and_the_library_take_the_same_files(
    specs: dict[str, TensorSpec], metadata: dict[str, str], picks: random.Random
) -> None:
    assert_agreement(damaged(whole(specs, metadata), picks.randrange))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(specs=specs(2), metadata=texts(3), picks=st.randoms(use_true_random=False))
def test_an_opened_file_says_the_same(
    specs: dict[str, TensorSpec], metadata: dict[str, str], picks: random.Random, tmp_path: Path
) -> None:
    raw = whole(specs, metadata)
    if picks.randrange(2):
        raw = damaged(raw, picks.randrange)
    if assert_agreement(raw):
        (tmp_path / "a.safetensors").write_bytes(raw)
        with safetensors.safe_open(tmp_path / "a.safetensors", "np") as opened:
            assert (opened.metadata() or {}) == read(raw).metadata
            assert set(opened.keys()) == set(read(raw).tensors)
