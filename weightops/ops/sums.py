"""Sums of adapters' changes of a weight: Σ strength·ΔW as factors where that is exact, and as a matrix where not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightops.errors import ValueRefused, quote
from weightops.lora.family import Parts, change, grain_of
from weightops.lora.lowrank import LowRank, add, wide
from weightops.plan import Input

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from torch import Tensor

    from weightops.files.checkpoint import Checkpoint
    from weightops.files.tensor import Slot
    from weightops.lora.family import Family, Shape, Told
    from weightops.lora.pieces import Source
    from weightops.ops.blend import Blend

# Rows `start` to `stop` of a change, and the row of the sum at which they stand.
Placement = tuple[int, int, int]

_BAND = 1 << 19  # values of a matrix that are computed at a time, or one row


@dataclass(frozen=True, slots=True)
class Term:
    """strength · ΔW of one adapter's module, or of some of its rows, in a sum.

    source: the number of its file. apart: the strength, and the family's own scale, stand in an alpha and not in the
    factors. shape: of the weight that the parts describe. placed: which rows of it stand where in the sum; None: all,
    as they are. frame: where that weight is in the base (file number `base`), stacked, for what depends on it.
    """

    source: int
    name: str
    family: Family
    parts: Mapping[str, Source]
    alpha: float | None
    told: Told
    strength: float
    shape: Shape
    apart: bool = False
    placed: tuple[Placement, ...] | None = None
    frame: tuple[Slot, ...] = ()
    base: int = 0

    @property
    def is_product(self) -> bool:
        """Is it exactly a product of factors?"""
        return self.family.lowrank is not None and not self.frame

    @property
    def product_rank(self) -> int:
        """The ranks of that product, of which some may be zero."""
        assert self.family.product_rank is not None
        return self.family.product_rank({part: source.spec.shape for part, source in self.parts.items()})

    @property
    def out(self) -> int:
        return self.shape[0]

    @property
    def n(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def is_plain(self) -> bool:
        """Are the factors those of the file, as they stand there?"""
        return self.apart and self.family.name == "lora" and "mid" not in self.parts

    @property
    def is_double(self) -> bool:
        """Is it to be computed in float64?"""
        return any(s.spec.dtype in ("F32", "F64") for s in self.parts.values()) or any(
            slot.spec.dtype in ("F32", "F64") for slot in self.frame
        )

    def inputs(self, sources: Sequence[Checkpoint]) -> list[Input]:
        tensors = sources[self.source].tensors
        own = [Input(self.source, source.rows(tensors[source.key].spec)) for source in self.parts.values()]
        return [*own, *(Input(self.base, slot) for slot in self.frame)]

    @property
    def count(self) -> int:
        return len(self.parts) + len(self.frame)

    @property
    def is_banded(self) -> bool:
        """May its rows be computed apart?"""
        shapes = {part: source.spec.shape for part, source in self.parts.items()}
        return grain_of(self.family, shapes, self.shape) == "rows"

    @property
    def as_large(self) -> tuple[str, ...]:
        """The parts that are themselves rows of a matrix, which are looked at where they lie."""
        return () if self.family.lowrank is not None else self.family.rows

    def product_nbytes(self) -> int:
        """The most that its `factors` take beside its inputs."""
        size = 8 if self.is_double else 4
        if self.is_plain:  # it is looked at where it lies, unless its values are of 8 bits
            return 4 * sum(s.spec.values for s in self.parts.values() if s.spec.dtype.startswith("F8"))
        parts = size * sum(source.spec.values for source in self.parts.values())
        return parts + 3 * size * self.product_rank * (self.out + self.n)

    def held_nbytes(self) -> int:
        """What stays of it while its rows are asked for, but for a matrix that is not banded."""
        if not self.is_banded:
            return 0
        looked = (s.spec for part, s in self.parts.items() if part in self.as_large)
        others = (s.spec for part, s in self.parts.items() if part not in self.as_large)
        return sum(2 * s.values for s in looked if s.dtype.startswith("F8")) + 8 * sum(s.values for s in others)

    def work_nbytes(self) -> int:
        """The most that it takes beside that, for a band of its rows; or for all, where they cannot be apart."""
        values = self.out * self.n
        if not self.is_banded:
            size = 8 if self.is_double else 4
            return size * (sum(source.spec.values for source in self.parts.values()) + 5 * values)
        height = min(self.out, max(1, _BAND // max(self.n, 1)))
        shapes = {part: source.spec.shape for part, source in self.parts.items()}
        rank = self.family.rank(shapes) or 0
        made = 16 * height * rank + 4 * max((source.spec.values for source in self.parts.values()), default=0)
        if len(self.shape) > 2:  # with a core, what it makes of a factor
            made += 48 * rank * self.n
        if self.family.kronecker_sides is not None:
            made += 24 * math.prod(self.family.kronecker_sides(shapes)[1])
        return made + 64 * height * self.n


@dataclass(frozen=True, slots=True)
class Sum:
    """Terms of one module, whose weight has this shape. blend: they are not added (and have no strengths then)."""

    name: str
    terms: tuple[Term, ...]
    shape: Shape
    blend: Blend | None = None

    @property
    def out(self) -> int:
        return self.shape[0]

    @property
    def n(self) -> int:
        """Inputs, times the kernel."""
        return math.prod(self.shape[1:])

    @property
    def is_convolution(self) -> bool:
        return any(size > 1 for size in self.shape[2:])

    @property
    def is_product(self) -> bool:
        return all(term.is_product for term in self.terms) and (self.blend is None or self.blend.is_linear)

    @property
    def is_kronecker(self) -> bool:
        """Is it one Kronecker product, whose singular values are those of two small matrices?"""
        only = self.terms[0]
        return len(self.terms) == 1 and only.family.kronecker is not None and only.is_product and only.placed is None

    @property
    def kronecker_sides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The sizes of these two."""
        only = self.terms[0]
        assert only.family.kronecker_sides is not None
        return only.family.kronecker_sides({part: source.spec.shape for part, source in only.parts.items()})

    @property
    def files(self) -> tuple[int, ...]:
        """The numbers of the files that have a part in it."""
        return tuple(dict.fromkeys(term.source for term in self.terms))

    @property
    def most(self) -> int:
        """The largest rank that it can have."""
        side = min(self.out, self.n)
        return min(side, sum(term.product_rank for term in self.terms)) if self.is_product else side

    def inputs(self, sources: Sequence[Checkpoint]) -> list[Input]:
        return [entry for term in self.terms for entry in term.inputs(sources)]

    def split(self, inputs: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """The inputs of each term."""
        found, position = [], 0
        for term in self.terms:
            found.append(inputs[position : position + term.count])
            position += term.count
        return found

    def nbytes(self) -> int:
        """The most that `total` takes beside the inputs, its result among it."""
        if self.is_product:
            return _products_nbytes(self.terms, self.out, self.n)
        result = self.matrix_nbytes()
        if self.blend is None:
            return self._rows_nbytes([self.terms]) + result
        own = [tuple(term for term in self.terms if term.source == file) for file in self.files]
        products = [terms for terms in own if all(term.is_product for term in terms)]
        found = self._rows_nbytes([terms for terms in own if terms not in products]) + result
        found += sum(_products_nbytes(terms, self.out, self.n) for terms in products)
        if self.blend.is_linear:
            return found + self.bands_nbytes(len(own))
        return found + self.blend.nbytes(self.out, self.n, len(own))

    def matrix_nbytes(self) -> int:
        """What `total` leaves where it is a matrix."""
        return (8 if any(term.is_double for term in self.terms) else 4) * self.out * self.n

    def by_rows_nbytes(self) -> int:
        """What the changes of `by_rows` hold, and take while they are asked for some."""
        return self._rows_nbytes([[t for t in self.terms if t.source == file] for file in self.files])

    def bands_nbytes(self, count: int) -> int:
        """What the `bands` of so many changes take."""
        return 8 * (count + 2) * min(self.out * self.n, max(_BAND, self.n))

    def _rows_nbytes(self, groups: Sequence[Sequence[Term]]) -> int:
        terms = [term for group in groups for term in group]
        size = 8 if any(term.is_double for term in terms) else 4
        whole = sum(1 for group in groups if not all(term.is_banded for term in group))
        held = sum(term.held_nbytes() for term in terms) + size * whole * self.out * self.n
        return held + max((term.work_nbytes() for term in terms), default=0)


def _products_nbytes(terms: Sequence[Term], out: int, n: int) -> int:
    """What the factors of terms take, and all of these side by side."""
    joined = 16 * sum(term.product_rank for term in terms) * (out + n) if len(terms) > 1 else 0
    return sum(term.product_nbytes() for term in terms) + joined


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A change [out, n] whose rows are computed when they are asked for, in float64.

    pieces: what is added up: where its rows stand, and a function of these. is_double: is the whole to be in float64?
    """

    shape: tuple[int, int]
    pieces: tuple[tuple[tuple[Placement, ...], Callable[[slice], Tensor]], ...]
    device: torch.device
    is_double: bool

    def rows(self, rows: slice) -> Tensor:
        import torch

        start, stop, _ = rows.indices(self.shape[0])
        found = torch.zeros(stop - start, self.shape[1], dtype=torch.float64, device=self.device)
        for placed, piece in self.pieces:
            for low, high, to in placed:
                a, b = max(start, to), min(stop, to + high - low)
                if a < b:
                    found[a - start : b - start] += piece(slice(low + a - to, low + b - to))
        return found


# What a file changes: factors, where it is a product of such.
Change = LowRank | Rows


def factors(term: Term, given: Sequence[Tensor], out: int) -> LowRank:
    """The term as up [out, rank] and down [rank, n], its rows at their places in a sum of `out` rows."""
    import torch

    wide = torch.float64 if term.is_double else torch.float32
    if term.is_plain:  # its own factors: nothing is copied, unless torch has no arithmetic of them
        at = dict(zip(term.parts, given, strict=True))
        up, down = (t.float() if t.element_size() == 1 else t for t in (at["up"], at["down"]))
        return LowRank(up.flatten(1), down.flatten(1))
    lowrank = LowRank(*_product(term, given, wide))
    if not term.apart and term.strength != 1:
        lowrank = lowrank.scale(term.strength)
    if term.placed is None:
        return lowrank
    up = _place(lowrank.up, term.placed, out)
    # Of a block-diagonal `up`, these rows may meet few of the columns.
    met = up.ne(0).any(0)
    return LowRank(up[:, met], lowrank.down[met])


def _product(term: Term, given: Sequence[Tensor], wide: torch.dtype) -> tuple[Tensor, Tensor]:
    assert term.family.lowrank is not None
    up, down = term.family.lowrank(_parts(term, given, wide))
    return up, down


def _parts(term: Term, given: Sequence[Tensor], wide: torch.dtype) -> Parts:
    tensors = {part: tensor.to(wide) for part, tensor in zip(term.parts, given, strict=False)}
    return Parts(tensors, _alpha(term), term.shape, term.told)


def _alpha(term: Term) -> float | None:
    """None where the scale stands apart: that is a scale of 1."""
    return None if term.apart else term.alpha


def _rows_of(term: Term, given: Sequence[Tensor]) -> Callable[[slice], Tensor]:
    """A banded term's rows, flat, in float64."""
    tensors = {}
    for part, tensor in zip(term.parts, given, strict=False):
        tensors[part] = _looked(tensor) if part in term.as_large else wide(tensor).double()
    parts, frame = Parts(tensors, _alpha(term), term.shape, term.told), given[len(term.parts) :]

    def rows_of(rows: slice) -> Tensor:
        if not frame:
            assert term.family.delta is not None
            found = wide(term.family.delta(parts, rows)).double().flatten(1)
            return found if term.apart or term.strength == 1 else found * term.strength
        weight = _weight(frame, rows).reshape(-1, *term.shape[1:])
        return (change(term.family, parts, weight, term.strength, rows) - weight).flatten(1)

    return rows_of


def _looked(tensor: Tensor) -> Tensor:
    """As it is, unless its values are of 8 bits, of which torch has no arithmetic: half precision holds them."""
    return tensor.half() if tensor.element_size() == 1 else tensor


def _weight(frame: Sequence[Tensor], rows: slice) -> Tensor:
    """These rows of stacked tensors, flat, in float64."""
    import torch

    found, at = [], 0
    for tensor in frame:
        low, high = max(rows.start - at, 0), min(rows.stop - at, len(tensor))
        found += [wide(tensor[low:high]).double().flatten(1)] if low < high else []
        at += len(tensor)
    return found[0] if len(found) == 1 else torch.cat(found)


def _whole(term: Term, given: Sequence[Tensor]) -> Tensor:
    """A term whose rows cannot be computed apart, in float32, or float64."""
    import torch

    working = torch.float64 if term.is_double else torch.float32
    frame = [t.to(working).reshape(len(t), *term.shape[1:]) for t in given[len(term.parts) :]]
    weight = frame[0] if len(frame) == 1 else torch.cat(frame)
    del frame
    return (change(term.family, _parts(term, given, working), weight, term.strength) - weight).flatten(1)


def _place(values: Tensor, placed: Sequence[Placement], out: int) -> Tensor:
    whole = values.new_zeros(out, values.shape[1])
    for start, stop, to in placed:
        whole[to : to + stop - start] = values[start:stop]
    return whole


def total(of: Sum, inputs: Sequence[Tensor]) -> LowRank | Tensor:
    """The whole sum: factors where every term is a product, else a matrix. Raises ValueRefused for NaN and Inf."""
    if of.blend is not None:
        found = of.blend.combined(of.name, by_file(of, inputs))
    else:
        added = _added(of, list(zip(of.terms, of.split(inputs), strict=True)))
        found = added if isinstance(added, LowRank) else added_up([added], [1.0])
    refuse_nonfinite(of, found)
    return found


def refuse_nonfinite(of: Sum, found: LowRank | Tensor) -> None:
    """Raises ValueRefused for NaN and Inf."""
    for tensor in (found.up, found.down) if isinstance(found, LowRank) else (found,):
        if tensor.numel() and not all(math.isfinite(float(extreme)) for extreme in tensor.aminmax()):
            raise ValueRefused("", f"{quote(of.name)} holds NaN or Inf, and has no factors")


def kronecker(of: Sum, inputs: Sequence[Tensor]) -> tuple[LowRank, LowRank]:
    """The two matrices of a sum that is their Kronecker product. Raises ValueRefused for NaN and Inf."""
    import torch

    term = of.terms[0]
    assert term.family.kronecker is not None
    a, b = (LowRank(*pair) for pair in term.family.kronecker(_parts(term, inputs, torch.float64)))
    if not all(bool(f.isfinite().all()) for f in (a.up, a.down, b.up, b.down)):
        raise ValueRefused("", f"{quote(of.name)} holds NaN or Inf, and has no factors")
    return (a if term.apart or term.strength == 1 else a.scale(term.strength)), b


def by_file(of: Sum, inputs: Sequence[Tensor]) -> dict[int, Change]:
    """The sum of each file's own terms, at their strengths."""
    pairs = list(zip(of.terms, of.split(inputs), strict=True))
    return {file: _added(of, [pair for pair in pairs if pair[0].source == file]) for file in of.files}


def by_rows(of: Sum, inputs: Sequence[Tensor]) -> dict[int, Rows]:
    """The same, none of them as factors."""
    pairs = list(zip(of.terms, of.split(inputs), strict=True))
    return {file: _rows(of, [pair for pair in pairs if pair[0].source == file]) for file in of.files}


def _added(of: Sum, pairs: Sequence[tuple[Term, Sequence[Tensor]]]) -> Change:
    if all(term.is_product for term, _ in pairs):
        parts = [factors(term, given, of.out) for term, given in pairs]
        return parts[0] if len(parts) == 1 else add(*parts)
    return _rows(of, pairs)


def _rows(of: Sum, pairs: Sequence[tuple[Term, Sequence[Tensor]]]) -> Rows:
    """Terms that are banded as such; the others, added up."""
    import torch

    everywhere = ((0, of.out, 0),)
    is_double = any(term.is_double for term, _ in pairs)
    device = pairs[0][1][0].device
    pieces, held = [], None
    for term, given in pairs:
        if term.is_banded:
            pieces.append((term.placed or everywhere, _rows_of(term, given)))
            continue
        if held is None:
            held = torch.zeros(of.out, of.n, dtype=torch.float64 if is_double else torch.float32, device=device)
        whole = _whole(term, given)
        for start, stop, to in term.placed or everywhere:
            held[to : to + stop - start] += whole[start:stop]
        del whole
    if held is not None:
        pieces.append((everywhere, held.__getitem__))
    return Rows((of.out, of.n), tuple(pieces), device, is_double)


def as_rows(given: Change | Tensor) -> Rows:
    """A change that gives its rows."""
    import torch

    if isinstance(given, Rows):
        return given
    out, n = given.shape
    everywhere = ((0, out, 0),)
    if isinstance(given, LowRank):
        double = given.up.dtype is torch.float64
        return Rows((out, n), ((everywhere, lambda rows: given.rows(rows).dense()),), given.up.device, double)
    return Rows((out, n), ((everywhere, given.__getitem__),), given.device, given.dtype is torch.float64)


def bands(changes: Sequence[Rows]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Bands of rows whose height follows from the shape alone, and there each change, in float64."""
    out, n = changes[0].shape
    height = max(1, _BAND // max(n, 1))
    for start in range(0, out, height):
        rows = slice(start, min(start + height, out))
        yield rows, [each.rows(rows) for each in changes]


def add_products(inner: list[list[float]], each: Sequence[Tensor]) -> None:
    """Add a band's inner products to those of the changes."""
    import torch

    for i, a in enumerate(each):
        for j, b in enumerate(each[: i + 1]):
            inner[i][j] += float(torch.dot(a.view(-1), b.view(-1)))
            inner[j][i] = inner[i][j]


def added_up(changes: Sequence[Rows], numbers: Sequence[float]) -> Tensor:
    """Σ number · change."""
    import torch

    double = any(each.is_double for each in changes)
    found = torch.empty(changes[0].shape, dtype=torch.float64 if double else torch.float32, device=changes[0].device)
    for rows, each in bands(changes):
        for band, number in zip(each, numbers, strict=True):
            if number != 1:
                band.mul_(number)
        for band in each[1:]:
            each[0].add_(band)
        found[rows] = each[0]
    return found
