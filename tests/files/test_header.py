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


def one(dtype: str = '"F32"', shape: str = "[2]", offsets: str = "[0,8]", data: int = 8) -> bytes:
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
