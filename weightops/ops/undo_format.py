"""What an undo file holds: which bytes of which tensors are kept in which of its own, and what it says of itself.

Metadata, under `weightops-undo`: JSON, with the name, size and hash of the original file; the name of the fused file,
and the hash of all of its bytes that are needed again; and for each tensor of the original that is not whole in the
fused file its parts. Tensors: `header`, the original's first bytes; and `key.part.piece`, pieces of the parts.
A tensor that the metadata do not name is in the fused file as it was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from weightops.errors import FormatError, quote
from weightops.files.dtypes import ARITHMETIC
from weightops.files.header import MAX_HEADER_BYTES, parse_header
from weightops.files.tensor import Slot, TensorSpec
from weightops.ops.undo_codes import Damaged, decode, itemsize, largest, smallest

if TYPE_CHECKING:
    from weightops.files.checkpoint import Checkpoint

METADATA = "weightops-undo"
HEADER = "header"
VERSION = 1
PIECE_VALUES = 1 << 20  # of a part that was changed at a stroke; of others, the blocks in which they were
_MOST_BANDS = 64  # of a part; each piece looks at all of them

# What a part is: as it was in the fused file; what is kept and the fused file together; what is kept alone.
COPY, DIFFERENCE, WHOLE = "copy", "difference", "whole"


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of the original tensor `key` (bands None: all of it), in pieces of `step` values; `how`: see above."""

    key: str
    bands: tuple[tuple[int, int], ...] | None
    how: str
    step: int

    def count(self, spec: TensorSpec) -> int:
        """Its pieces."""
        return 0 if self.how == COPY else -(-self.slot(spec).spec.nbytes // (self.step * itemsize(spec.dtype)))

    def slot(self, spec: TensorSpec) -> Slot:
        """Its bytes, in a tensor of this dtype and of the original's shape."""
        if self.bands is None:
            return Slot(self.key, spec.as_bytes(), ((0, spec.nbytes),))
        bands = tuple((start * spec.row_nbytes, stop * spec.row_nbytes) for start, stop in self.bands)
        return Slot(self.key, TensorSpec("U8", (sum(stop - start for start, stop in bands),)), bands)

    def piece(self, spec: TensorSpec, number: int) -> Slot:
        """The bytes of one of its pieces, in a tensor of this dtype and of the original's shape."""
        whole, size = self.slot(spec), itemsize(spec.dtype)
        found = whole.pieces(number * self.step * size, min((number + 1) * self.step * size, whole.spec.nbytes))
        bands = tuple((offset, offset + nbytes) for offset, nbytes in found)
        return Slot(self.key, TensorSpec("U8", (sum(nbytes for _, nbytes in found),)), bands)


def piece_name(key: str, part: int, piece: int) -> str:
    # Counted with zeros in front, so that the pieces lie in the file in the order in which they are read.
    return f"{key}.{part}.{piece:05d}"


class About(NamedTuple):
    """What an undo file says of itself. parts: of each tensor that is not whole in the fused file."""

    name: str
    nbytes: int
    hash: str
    fused_name: str
    fused_hash: str
    header_nbytes: int
    parts: dict[str, list[Part]]


def metadata(about: About) -> dict[str, str]:
    parts = {key: [[part.how, part.bands, part.step] for part in parts] for key, parts in about.parts.items()}
    said = {
        "version": VERSION,
        "original": {
            "name": about.name, "bytes": about.nbytes, "header_bytes": about.header_nbytes, "hash": about.hash,
        },
        "fused": {"name": about.fused_name, "hash": about.fused_hash},
        "parts": parts,
    }  # fmt: skip
    return {METADATA: json.dumps(said, sort_keys=True, ensure_ascii=False, separators=(",", ":"))}


# ------------------------------------------------------------------------------------------------ reading


class Read(NamedTuple):
    """An undo file, checked: the original's header as bytes, its tensors in the order of their bytes, and the rest."""

    about: About
    header: bytes
    original: dict[str, TensorSpec]


def read_undo(opened: Checkpoint) -> Read:
    """Read and check all but the pieces. Raises FormatError: nothing in the file is believed."""
    about = _about(opened)
    raw = _header(opened, about.header_nbytes)
    label = f"{opened.label} ({HEADER})"
    if int.from_bytes(raw[:8], "little") != len(raw) - 8:
        raise FormatError(label, f"says that it holds other than {len(raw) - 8:,} bytes", _AGAIN)
    found = parse_header(raw[8:], data_start=len(raw), file_size=about.nbytes, label=label)
    original = {key: info.spec for key, info in found.tensors.items()}
    for key, parts in about.parts.items():
        if key not in original:
            raise _odd(opened, f"keeps parts of {quote(key)}, which the original does not have")
        _check_parts(opened, original[key], parts)
    count = 1 + sum(part.count(original[part.key]) for parts in about.parts.values() for part in parts)
    if count != len(opened.tensors):
        raise _odd(opened, f"says that it holds {count:,} tensors, and holds {len(opened.tensors):,}")
    for key, parts in about.parts.items():
        for number, part in enumerate(parts):
            for piece in range(part.count(original[key])):
                _check_piece(opened, original[key], part, number, piece)
    return Read(about, raw, original)


_AGAIN = "the file is damaged, or no such file; take another copy of it"


def _odd(opened: Checkpoint, what: str) -> FormatError:
    return FormatError(opened.label, what, _AGAIN)


def _about(opened: Checkpoint) -> About:
    text = opened.metadata.get(METADATA)
    if opened.container != "safetensors" or text is None:
        what = f"is no undo file: its metadata hold no {METADATA!r}"
        raise FormatError(opened.label, what, "fuse --undo FILE writes one")
    try:
        said = json.loads(text)
        version = said["version"]
        if version != VERSION:
            what = f"is an undo file of version {quote(version)}, expected {VERSION}"
            raise FormatError(opened.label, what, "a newer weightops may read it")
        original, fused = said["original"], said["fused"]
        return About(
            _text(original["name"]), _number(original["bytes"]), _text(original["hash"]),
            _text(fused["name"]), _text(fused["hash"]), _number(original["header_bytes"], 10, MAX_HEADER_BYTES + 8),
            {key: [_part(key, entry) for entry in entries] for key, entries in said["parts"].items()},
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise _odd(opened, f"what it says under {METADATA!r} makes no sense: {type(e).__name__}, {e}") from None


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise TypeError(f"found {found!r:.40}, expected a text")
    return found


def _number(found: Any, least: int = 0, most: int = 1 << 62) -> int:
    if type(found) is not int or not least <= found <= most:
        raise ValueError(f"found {found!r:.40}, expected a whole number from {least} to {most}")
    return found


def _part(key: str, entry: Any) -> Part:
    how, bands, step = entry
    if how not in (COPY, DIFFERENCE, WHOLE):
        raise ValueError(f"found {how!r:.40}, expected {COPY}, {DIFFERENCE} or {WHOLE}")
    if bands is not None:
        _number(len(bands), 1, _MOST_BANDS)
        bands = tuple((_number(start), _number(stop)) for start, stop in bands)
    return Part(key, bands, how, _number(step, 1))


def _check_parts(opened: Checkpoint, spec: TensorSpec, parts: list[Part]) -> None:
    """Together they are the tensor, each of its rows once."""
    what = f"the parts of {quote(parts[0].key)}" if parts else "a tensor of no parts"
    if any(part.how == DIFFERENCE for part in parts) and spec.dtype not in ARITHMETIC:
        raise _odd(opened, f"{what}: of {spec.dtype}, nothing can be a difference")
    if len(parts) == 1 and parts[0].bands is None:
        return
    bands = sorted(band for part in parts for band in part.bands or ((-1, -1),))
    position = 0
    for start, stop in bands:
        if start != position or stop <= start:
            raise _odd(opened, f"{what} are rows {bands[:5]}, and not each of {spec.rows:,} rows once")
        position = stop
    if position != spec.rows or not spec.row_values:
        raise _odd(opened, f"{what} are rows {bands[:5]}, and not each of {spec.rows:,} rows once")


def _check_piece(opened: Checkpoint, spec: TensorSpec, part: Part, number: int, piece: int) -> None:
    name = piece_name(part.key, number, piece)
    if name not in opened.tensors:
        raise _odd(opened, f"lacks the tensor {quote(name)}")
    found = opened.tensors[name].spec
    size = itemsize(spec.dtype)
    values = part.piece(spec, piece).spec.values // size
    if found.dtype != "U8" or len(found.shape) != 1 or not smallest(size) <= found.values <= largest(values, size):
        what = f"tensor {quote(name)} is {found}, expected U8 of {smallest(size):,} to {largest(values, size):,}"
        raise _odd(opened, what)


def _header(opened: Checkpoint, nbytes: int) -> bytes:
    """The original's first bytes."""
    found = opened.tensors.get(HEADER)
    if found is None or found.spec.dtype != "U8" or found.spec.values > largest(nbytes, 1):
        raise _odd(opened, f"lacks the tensor {HEADER!r}, of U8")
    data = memoryview(bytearray(found.spec.nbytes))
    opened.read_bytes(opened.slot(HEADER), 0, len(data), data)
    try:
        return decode(data, nbytes, 1, None).tobytes()
    except Damaged as e:
        raise _odd(opened, f"tensor {HEADER!r} {e}") from None
