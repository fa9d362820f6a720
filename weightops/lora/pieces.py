"""Adapters of packed modules taken apart, one canonical module each, exactly.

Source: FORMATS §7. Rows of a packed weight are rows of `up`; the parts share `down`, or, where `up` is block-diagonal,
each has ranks of its own. Knows names, shapes and bytes; no files, no devices.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from weightops.errors import MismatchError, quote
from weightops.files.tensor import Slot, TensorSpec
from weightops.naming.keymap import Rule, heights, swaps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightops.lora.adapters import Adapter
    from weightops.lora.family import Family

Bands = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Source:
    """A part's values: rows (bands) of a key's tensor, and of these the columns `start` to `stop`.

    `spec` is the part's own dtype and shape.
    """

    key: str
    spec: TensorSpec
    bands: Bands | None = None
    columns: tuple[int, int] | None = None

    def rows(self, stored: TensorSpec) -> Slot:
        """The slot of the whole rows that hold the part."""
        width = stored.shape[1:] if self.columns is not None else self.spec.shape[1:]
        return Slot(self.key, TensorSpec(self.spec.dtype, (*self.spec.shape[:1], *width)), self.bands)


class Fill(NamedTuple):
    """Where a source goes: from this row on, to these columns (None: all), times `strength` (None: as it is)."""

    row: int
    source: Source
    columns: tuple[int, int] | None = None
    strength: float | None = None


class Window(NamedTuple):
    """Rows of a taller weight, of `rows` in all: its parts are not cut, and these bands of what they make are meant."""

    rows: int
    bands: Bands


# What fills a tensor; the rest of it is zero.
Fills = tuple[Fill, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """The adapter of one canonical module. `alpha_key`: of the tensor that says its alpha, or did before it was cut.

    window: the parts are those of a taller weight, and the module is these rows of it; None: the parts are its own.
    """

    component: str
    name: str
    family: Family
    parts: Mapping[str, Source]
    alpha: float | None
    adapter: str
    alpha_key: str | None = None
    window: Window | None = None

    @property
    def rank(self) -> int | None:
        return self.family.rank(self.shapes)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {part: source.spec.shape for part, source in self.parts.items()}

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the weight that it changes, where its parts tell."""
        return self.family.shape(self.shapes)

    @property
    def height(self) -> int | None:
        """The rows of the weight, or of the bias where it changes that alone."""
        if self.shape is not None:
            return self.shape[0]
        return next((self.parts[part].spec.rows for part in self.family.rows if part in self.parts), None)


# Where an adapter cannot be taken apart, what it makes of the weights still can.
_WHOLE = "fuse can still add it to a checkpoint that holds all of these weights"

# Of a key's matrix, the first rows: a numpy array, true where a value is not zero.
Filled = Callable[[str, int], Any]


def take_apart(
    adapter: Adapter, alpha: float | None, specs: Mapping[str, TensorSpec], read: Filled | None, label: str
) -> list[Piece]:
    """The pieces of an adapter, one for each canonical module that it changes.

    read: tells an `up` that is block-diagonal, whose blocks are each a module's own; None: all are shared, which is
    exact as well. Raises MismatchError for an adapter that cannot be taken apart exactly.
    """
    assert adapter.target is not None
    target, family = adapter.target, adapter.family
    component = target.component or ""
    parts = sources(adapter, specs)
    rows, features = _rows(adapter), _features(adapter)
    swapped = _swaps(target.rule, rows, features, adapter, label)
    if len(target.names) == 1:
        if swapped:
            assert rows is not None
            parts = swapped_halves(parts, family, adapter.name, rows, label)
        return [Piece(component, target.names[0], family, parts, alpha, adapter.name, adapter.keys.get("alpha"))]
    if rows is None or "reshape_weight" in parts:
        raise MismatchError(
            label, f"{quote(adapter.name)} is a {adapter.label}, which cannot be taken apart by rows", _WHOLE
        )
    bands = heights(target.rule, rows, features)
    if bands is None:
        raise MismatchError(
            label,
            f"{quote(adapter.name)} changes {rows} rows, which cannot be shared out to {', '.join(target.names)}",
        )
    blocks = _block_columns(parts, bands, alpha, read) if family.name == "lora" and read is not None else None
    pieces = []
    start = 0
    for number, (name, height) in enumerate(zip(target.names, bands, strict=True)):
        mine = cut_rows(parts, family, adapter.name, ((start, start + height),), rows, label)
        start += height
        if blocks is None:
            pieces.append(Piece(component, name, family, mine, alpha, adapter.name, adapter.keys.get("alpha")))
            continue
        low, high = blocks[number]
        if low < high:  # else rows of zeros, which change nothing
            strength = None if alpha is None else scaled(alpha, high - low, parts["up"].spec.shape[1])
            mine = _own_columns(mine, low, high)
            pieces.append(Piece(component, name, family, mine, strength, adapter.name, adapter.keys.get("alpha")))
    return pieces


def _own_columns(parts: Mapping[str, Source], low: int, high: int) -> dict[str, Source]:
    """A LoRA of these columns of `up`, and rows of `down`, alone."""
    up, down = parts["up"], parts["down"]
    narrow = replace(up, spec=TensorSpec(up.spec.dtype, (up.spec.rows, high - low)), columns=(low, high))
    return {**parts, "up": narrow, "down": replace(down, spec=down.spec.with_rows(high - low), bands=((low, high),))}


def sources(adapter: Adapter, specs: Mapping[str, TensorSpec]) -> dict[str, Source]:
    """The adapter's parts as they stand in its file, but for alpha."""
    return {part: Source(key, _normal(part, key, specs[key])) for part, key in adapter.keys.items() if part != "alpha"}


def _normal(part: str, key: str, spec: TensorSpec) -> TensorSpec:
    """PEFT's magnitudes, one for each output, in LyCORIS' shape [out, 1, …]; the bytes are the same."""
    if part != "dora_scale" or "magnitude" not in key:
        return spec
    axes = len(spec.shape) if len(spec.shape) > 1 else 2
    return TensorSpec(spec.dtype, (spec.values, *[1] * (axes - 1)))


def _rows(adapter: Adapter) -> int | None:
    shape = adapter.family.shape(adapter.shapes)
    if shape is None:  # of a bias alone
        shape = next((adapter.shapes[p] for p in adapter.family.rows if p in adapter.shapes), None)
    return shape[0] if shape else None


def _features(adapter: Adapter) -> int | None:
    shape = adapter.family.shape(adapter.shapes)
    return shape[1] if shape is not None and len(shape) > 1 else None


def _swaps(rule: Rule, rows: int | None, features: int | None, adapter: Adapter, label: str) -> bool:
    if not rule.swapped and rule.swapped_when is None:
        return False
    found = swaps(rule, rows, features) if rows is not None else None
    if found is None or rows is None or rows % 2:
        raise MismatchError(
            label, f"{quote(adapter.name)}: its halves may have to trade places, and its shapes do not tell"
        )
    return found


def swapped_halves(parts: Mapping[str, Source], family: Family, name: str, rows: int, label: str) -> dict[str, Source]:
    """The parts of a weight whose halves trade places. A magnitude for each input stays as it is."""
    bands = ((rows // 2, rows), (0, rows // 2))
    inward = {part: s for part, s in parts.items() if part == "dora_scale" and s.spec.rows == 1 and rows > 1}
    return cut_rows({p: s for p, s in parts.items() if p not in inward}, family, name, bands, rows, label) | inward


def cut_rows(
    parts: Mapping[str, Source], family: Family, name: str, bands: Bands, rows: int, label: str
) -> dict[str, Source]:
    """The parts of these rows of the weight: row parts are cut, the others shared. Raises MismatchError."""
    found = dict(parts)
    if not any(part in parts for part in family.rows) or "hada_t1" in parts:
        raise MismatchError(label, f"{quote(name)} is a {family.name}, which cannot be cut into rows exactly", _WHOLE)
    for part in (*family.rows, "dora_scale"):
        if part not in parts:
            continue
        source = parts[part]
        own = source.spec.rows
        if part == "dora_scale" and own != rows:
            raise MismatchError(
                label,
                f"{quote(name)} has a magnitude for each input, {list(source.spec.shape)}: its norms run "
                "over all the rows of the packed weight, and cannot be taken apart",
                _WHOLE,
            )
        step, odd = divmod(rows, own)
        if odd or (step > 1 and not family.uniform_rows) or any(a % step or b % step for a, b in bands):
            raise MismatchError(
                label, f"{quote(name)}: {part} has {own} rows for {rows}, which cannot be cut at {bands}", _WHOLE
            )
        cut = tuple((a // step, b // step) for a, b in bands)
        height = sum(b - a for a, b in cut)
        found[part] = replace(source, spec=source.spec.with_rows(height), bands=within(source.bands, cut))
    return found


def within(outer: Bands | None, inner: Bands) -> Bands:
    """Rows of rows: the inner bands count from the beginning of the outer ones."""
    if outer is None:
        return inner
    found = []
    for start, stop in inner:
        position = 0
        for low, high in outer:
            a, b = max(start, position), min(stop, position + high - low)
            if a < b:
                found.append((low + a - position, low + b - position))
            position += high - low
    return tuple(found)


def _block_columns(
    parts: Mapping[str, Source], bands: Sequence[int], alpha: float | None, read: Filled
) -> list[tuple[int, int]] | None:
    """The columns of each band's own block in a block-diagonal `up`, none for rows of zeros; None: it is not such."""
    up = parts["up"].spec
    rank = up.shape[1]
    if len(up.shape) != 2 or rank < 2 or not up.rows or "mid" in parts:
        return None
    if read(parts["up"].key, 1).all():
        return None  # the first row meets every column: the parts share them
    values = read(parts["up"].key, up.rows)
    used: list[tuple[int, int] | None] = []
    start = 0
    for height in bands:
        columns = values[start : start + height].any(axis=0).nonzero()[0]
        used.append((int(columns[0]), int(columns[-1]) + 1) if len(columns) else None)
        start += height
    blocks = _equal_blocks(used, rank) or _own_blocks(used, rank, may_drop=not parts.keys() & {"bias", "dora_scale"})
    if blocks is None or (alpha is not None and any(scaled(alpha, b - a, rank) is None for a, b in blocks if a < b)):
        return None  # shared, it stays exact
    return blocks


def _equal_blocks(used: Sequence[tuple[int, int] | None], rank: int) -> list[tuple[int, int]] | None:
    """Equal shares of the columns, where the bands keep to them."""
    share, odd = divmod(rank, len(used))
    blocks = [(n * share, (n + 1) * share) for n in range(len(used))]
    kept = all(u is None or (a <= u[0] and u[1] <= b) for u, (a, b) in zip(used, blocks, strict=True))
    return blocks if kept and not odd else None


def _own_blocks(used: Sequence[tuple[int, int] | None], rank: int, *, may_drop: bool) -> list[tuple[int, int]] | None:
    """Blocks that follow each other; from the first column to the last, each as far as the next one begins."""
    there = [u for u in used if u is not None]
    if len(there) < 2 or (len(there) < len(used) and not may_drop):
        return None
    if any(b[0] < a[1] for a, b in pairwise(there)):
        return None
    edges = [0, *(u[0] for u in there[1:]), rank]
    spans = iter(pairwise(edges))
    return [(0, 0) if u is None else next(spans) for u in used]


def scaled(alpha: float, rank: int, of: int) -> float | None:
    """alpha · rank / of, where float32 holds it exactly."""
    found = alpha * rank / of
    try:
        short = struct.unpack("<f", struct.pack("<f", found))[0]
    except OverflowError:
        return None
    return found if short == found and found * of == alpha * rank else None
