"""A space of LoRAs on disk: one row of numbers for each, all in one gauge, and what each row is of.

A folder with space.json (layout, dtype, form, how many members), rows.fp32 (or .fp16, .bf16: raw, little-endian, row by
row, so that numpy can map it), members.jsonl (a line each: name, hash, norm), reference.safetensors (the row that all
are aligned to) and conditions.npy. What stands behind the members that space.json counts belongs to a collection that
was not finished, and is not read.
"""

from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.errors import FormatError, UsageError, ValueRefused, quote
from weightops.files.checkpoint import open_checkpoint
from weightops.files.source import LocalFile
from weightops.synthesis.gauge import aligned, balanced
from weightops.synthesis.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    import torch
    from torch import Tensor

    from weightops.synthesis.layout import Factors

FORMAT = 1
INDEX, MEMBERS, REFERENCE, CONDITIONS = "space.json", "members.jsonl", "reference.safetensors", "conditions.npy"
UNFINISHED = "collecting.json"  # beside them while a collection is at work
WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2}
# aligned: balanced, and turned to the reference; svd: balanced alone; raw: as the files have their factors.
FORMS = ("aligned", "svd", "raw")
_BLOCK = 64 << 20


@dataclass(frozen=True)
class Space:
    """Members in the order in which they were collected. folder: where it is; label: as the user typed it.

    names: of the members, each once; hashes: of their files' tensors; norms: ‖ΔW‖ [N] float64. conditions [N, c]
    float64 with a name for each column, or None; condition_source: what they were read from.
    """

    folder: Path
    label: str
    layout: Layout
    dtype: str
    form: str
    names: tuple[str, ...]
    hashes: tuple[str, ...]
    norms: np.ndarray
    reference: Tensor | None
    conditions: np.ndarray | None = None
    condition_names: tuple[str, ...] = ()
    condition_source: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def width(self) -> int:
        """Features of a row."""
        return self.layout.width

    @property
    def path(self) -> Path:
        return rows_path(self.folder, self.dtype)

    @functools.cached_property
    def digest(self) -> str:
        """XXH3-128 of what the rows are of and of which files, in their order: a fitted model names its space by it."""
        return self.digest_of(len(self))

    def digest_of(self, count: int) -> str:
        """The digest that the space had when it held its first `count` members alone."""
        import xxhash

        said = [self.layout.to_json(), self.dtype, self.form, list(zip(self.names, self.hashes, strict=True))[:count]]
        made = xxhash.xxh3_128(json.dumps(said).encode())
        if self.reference is not None:
            made.update(self.reference.numpy().tobytes())
        return str(made.hexdigest())

    def position(self, name: str) -> int:
        """The place of a member. Raises UsageError for a name that is none."""
        if name not in self.names:
            import difflib

            near = difflib.get_close_matches(name, self.names, n=1)
            raise UsageError(self.label, f"has no LoRA {quote(name)}", f"did you mean {near[0]}?" if near else None)
        return self.names.index(name)

    def canonical(self, factors: Factors) -> Tensor:
        """The rows [..., width] that factors [..., out, r] have in this space, in float64."""
        return canonical(self.layout, self.form, self.reference, factors)

    def rows(self, indices: Sequence[int]) -> Tensor:
        """The rows of these members [n, width], in float32. Raises ValueRefused for NaN or Inf, FormatError."""
        import torch

        found = torch.empty(len(indices), self.width)
        for where, rows in self.blocks(indices):
            found[where] = rows
        return found

    def blocks(self, indices: Sequence[int], nbytes: int = _BLOCK) -> Iterator[tuple[slice, Tensor]]:
        """The same, as many rows at a time as take `nbytes` in float32: which of `indices`, and their rows."""
        height = max(1, nbytes // (4 * self.width))
        with RowsFile(self) as file:
            for start in range(0, len(indices), height):
                part = indices[start : start + height]
                rows = file.read(part)
                bad = (~rows.isfinite().all(1)).nonzero().flatten().tolist()
                if bad:
                    raise ValueRefused(self.label, f"the row of {quote(self.names[part[bad[0]]])} holds NaN or Inf")
                yield slice(start, start + len(part)), rows


def canonical(layout: Layout, form: str, reference: Tensor | None, factors: Factors) -> Tensor:
    """The rows [..., width] that factors [..., out, r] have in a space of this form, in float64."""
    if form == "raw":
        return layout.flatten([(up.double(), down.double()) for up, down in factors])
    found = balanced(factors)
    if form == "aligned":
        assert reference is not None
        found = aligned(found, layout.unflatten(reference))
    return layout.flatten(found)


class RowsFile:
    """The file of rows, read by positions: what is read takes memory, and not the file."""

    def __init__(self, space: Space) -> None:
        self._space = space

    def __enter__(self) -> RowsFile:
        self._file = LocalFile(self._space.path)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, indices: Sequence[int]) -> Tensor:
        """Rows in float32; those that follow each other in one request."""
        import torch

        space = self._space
        nbytes = space.width * WIDTHS[space.dtype]
        data = memoryview(bytearray(len(indices) * nbytes))
        begin = 0
        while begin < len(indices):
            end = begin + 1
            while end < len(indices) and indices[end] == indices[end - 1] + 1:
                end += 1
            self._file.read_into(indices[begin] * nbytes, data[begin * nbytes : end * nbytes])
            begin = end
        if not indices:
            return torch.empty(0, space.width)
        return torch.frombuffer(data, dtype=torch_dtype(space.dtype)).reshape(len(indices), space.width).float()


def torch_dtype(dtype: str) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]


def unfinished(folder: Path) -> Path:
    """Where a new space is made before it has its name."""
    return folder.with_name(f".{folder.name}.weightops-collect")


def rows_path(folder: Path, dtype: str) -> Path:
    return folder / f"rows.{dtype}"


def open_space(folder: str | os.PathLike[str]) -> Space:
    """The space of a folder. Raises UsageError where there is none, FormatError where it is damaged."""
    import numpy as np

    label = os.fspath(folder)
    place = Path(folder)
    index = _index(place, label)
    try:
        count, dtype, form = int(index["members"]), str(index["dtype"]), str(index["form"])
        conditions_of = index["conditions"]
        if conditions_of is not None:
            conditions_of = {"names": list(conditions_of["names"]), "source": dict(conditions_of["source"])}
    except (KeyError, TypeError, ValueError, OverflowError):
        raise FormatError(label, f"its {INDEX} lacks what every space has") from None
    layout = Layout.of_json(index.get("layout"), label)
    if dtype not in WIDTHS or form not in FORMS or count < 1:
        raise FormatError(label, f"its {INDEX} says {count} members, form {quote(form)}, dtype {quote(dtype)}")
    lines = _lines(place / MEMBERS, count, label)
    _check_rows(rows_path(place, dtype), count * layout.width * WIDTHS[dtype], label)
    return Space(
        place, label, layout, dtype, form, tuple(str(m["name"]) for m in lines), tuple(str(m["hash"]) for m in lines),
        np.array([float(m["norm"]) for m in lines]), _reference(place / REFERENCE, layout, label, form),
        None if conditions_of is None else _conditions(place / CONDITIONS, count, conditions_of, label),
        () if conditions_of is None else tuple(map(str, conditions_of["names"])),
        None if conditions_of is None else conditions_of["source"],
    )  # fmt: skip


def _index(place: Path, label: str) -> dict[str, Any]:
    if not place.exists():
        hint = "weightops synth collect makes a space"
        if unfinished(place).exists():
            hint = "a collection of it was not finished: the same weightops synth collect goes on with it"
        raise UsageError(label, "no such folder", hint)
    try:
        found = json.loads((place / INDEX).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        what = "is no space of LoRAs" if place.is_dir() else "is a file, expected the folder of a space"
        raise UsageError(label, what, "weightops synth collect makes one") from None
    except (OSError, ValueError, RecursionError) as e:
        raise FormatError(label, f"its {INDEX} cannot be read: {quote(str(e))}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        said = found.get("format") if isinstance(found, dict) else None
        raise FormatError(label, f"its {INDEX} is of format {quote(said)}, expected {FORMAT}")
    return found


def _lines(path: Path, count: int, label: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                if len(found) == count:
                    break
                found.append(json.loads(line))
        whole = all(math.isfinite(float(m["norm"])) and {"name", "hash"} <= m.keys() for m in found)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as e:
        raise FormatError(label, f"its {MEMBERS} cannot be read: {quote(str(e))}") from None
    if len(found) != count or not whole:
        raise FormatError(label, f"its {MEMBERS} names {len(found):,} LoRAs, expected {count:,}")
    return found


def _check_rows(path: Path, nbytes: int, label: str) -> None:
    try:
        size = path.stat().st_size
    except OSError as e:
        raise FormatError(label, f"its {path.name} cannot be read: {e.strerror or e}") from None
    if size < nbytes:
        raise FormatError(label, f"its {path.name} holds {size:,} bytes, expected {nbytes:,}", "it was cut short")


def _reference(path: Path, layout: Layout, label: str, form: str) -> Tensor | None:
    from weightops.engine.tensors import as_tensor

    if form != "aligned":
        return None
    if not path.exists():
        raise FormatError(label, f"its {REFERENCE} is not there")
    with open_checkpoint(path) as opened:
        info = opened.tensors.get("reference")
        if info is None or info.spec.dtype != "F64" or info.spec.shape != (layout.width,):
            raise FormatError(label, f"its {REFERENCE} holds no reference of {layout.width:,} features")
        data = memoryview(bytearray(info.spec.nbytes))
        opened.read_bytes(opened.slot("reference"), 0, len(data), data)
    found = as_tensor(data, info.spec)
    if not bool(found.isfinite().all()):
        raise ValueRefused(label, f"its {REFERENCE} holds NaN or Inf")
    return found


def _conditions(path: Path, count: int, said: Any, label: str) -> np.ndarray:
    import numpy as np

    try:
        found = np.load(path, allow_pickle=False)
        wanted = len(said["names"])
    except (OSError, ValueError, KeyError, TypeError, EOFError) as e:
        raise FormatError(label, f"its {CONDITIONS} cannot be read: {quote(str(e))}") from None
    if found.dtype != np.float64 or found.ndim != 2 or found.shape[0] < count or found.shape[1] != wanted:
        raise FormatError(label, f"its {CONDITIONS} is {list(found.shape)}, expected [{count}, {wanted}]")
    if not np.isfinite(found[:count]).all():
        raise ValueRefused(label, f"its {CONDITIONS} holds NaN or Inf")
    return np.ascontiguousarray(found[:count])
