"""Sums of adapters' changes of a weight: Σ strength·ΔW as factors where that is exact, and as a matrix where not."""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.errors import ValueRefused, quote
from weightops.lora.family import Parts, change
from weightops.lora.lowrank import LowRank, add
from weightops.merging.rounding import generator_for
from weightops.plan import Input

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

    from weightops.files.checkpoint import Checkpoint
    from weightops.files.tensor import Slot
    from weightops.lora.family import Family, Shape, Told
    from weightops.lora.pieces import Source
    from weightops.merging.deltas import DeltaMethod

# Rows `start` to `stop` of a change, and the row of the sum at which they stand.
Placement = tuple[int, int, int]


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

    def nbytes(self) -> int:
        """The most that its part of `total` takes beside its inputs."""
        size = 8 if self.is_double else 4
        if self.is_plain:  # it is looked at where it lies, unless its values are of 8 bits
            return 4 * sum(s.spec.values for s in self.parts.values() if s.spec.dtype.startswith("F8"))
        parts = size * sum(source.spec.values for source in self.parts.values())
        if self.is_product:
            return parts + 3 * size * self.product_rank * (self.out + self.n)
        return parts + 5 * size * self.out * self.n


@dataclass(frozen=True, slots=True)
class Blend:
    """Another way to combine the changes of several files than to add them: `weights` of these, by their numbers."""

    method: DeltaMethod
    weights: Mapping[int, float]
    settings: Mapping[str, Any]
    seed: int


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
        return all(term.is_product for term in self.terms) and (self.blend is None or self.blend.method.linear)

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
        each = sum(term.nbytes() for term in self.terms)
        rank = sum(term.product_rank for term in self.terms if term.is_product)
        joined = 16 * rank * (self.out + self.n) if len(self.terms) > 1 else 0
        if self.is_product:
            return each + joined
        if self.blend is None or self.blend.method.linear:
            return each + 16 * self.out * self.n
        # Its result, in float32; products are asked for a few rows at a time.
        return each + joined + 4 * self.out * self.n + self.blend.method.nbytes(self.out, self.n, len(self.files))


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


def dense(term: Term, given: Sequence[Tensor], out: int) -> Tensor:
    """The term as a matrix [out, n] in float32, or float64."""
    import torch

    wide = torch.float64 if term.is_double else torch.float32
    if term.frame:
        weight = torch.cat([t.to(wide).reshape(len(t), *term.shape[1:]) for t in given[len(term.parts) :]])
        found = change(term.family, _parts(term, given, wide), weight, term.strength) - weight
    elif term.is_product:
        return factors(term, given, out).dense()
    else:
        assert term.family.delta is not None
        found = term.family.delta(_parts(term, given, wide), slice(None))
        found = found if term.apart or term.strength == 1 else found * term.strength
    found = found.flatten(1)
    return found if term.placed is None else _place(found, term.placed, out)


def _place(values: Tensor, placed: Sequence[Placement], out: int) -> Tensor:
    whole = values.new_zeros(out, values.shape[1])
    for start, stop, to in placed:
        whole[to : to + stop - start] = values[start:stop]
    return whole


def total(of: Sum, inputs: Sequence[Tensor]) -> LowRank | Tensor:
    """The whole sum: factors where every term is a product, else a matrix. Raises ValueRefused for NaN and Inf."""
    if of.blend is not None:
        found = _blended(of, of.blend, inputs)
    else:
        found = _added(of, list(zip(of.terms, of.split(inputs), strict=True)))
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


def by_file(of: Sum, inputs: Sequence[Tensor]) -> dict[int, LowRank | Tensor]:
    """The sum of each file's own terms, at their strengths."""
    pairs = list(zip(of.terms, of.split(inputs), strict=True))
    return {file: _added(of, [pair for pair in pairs if pair[0].source == file]) for file in of.files}


def _added(of: Sum, pairs: Sequence[tuple[Term, Sequence[Tensor]]]) -> LowRank | Tensor:
    if all(term.is_product for term, _ in pairs):
        parts = [factors(term, given, of.out) for term, given in pairs]
        return parts[0] if len(parts) == 1 else add(*parts)
    return functools.reduce(operator.add, (dense(term, given, of.out) for term, given in pairs))


def _blended(of: Sum, blend: Blend, inputs: Sequence[Tensor]) -> LowRank | Tensor:
    import torch

    from weightops.lora.overlap import gram

    parts = by_file(of, inputs)
    weights = [blend.weights[file] for file in parts]
    if not blend.method.linear:
        out = torch.empty(of.out, of.n, device=inputs[0].device)
        blend.method.fill(
            [_Rows(part) for part in parts.values()], out, weights=weights, settings=blend.settings,
            random=lambda block: generator_for(blend.seed, of.name, block),  # the CPU's, on every device
        )  # fmt: skip
        return out
    products = [part for part in parts.values() if isinstance(part, LowRank)]
    if len(products) == len(parts):
        numbers = blend.method.coefficients(gram(products), weights, blend.settings)
        return add(*(part.scale(c) for part, c in zip(products, numbers, strict=True)))
    whole = [part.dense() if isinstance(part, LowRank) else part for part in parts.values()]
    inner = [[float(torch.dot(a.flatten().double(), b.flatten().double())) for b in whole] for a in whole]
    numbers = blend.method.coefficients(inner, weights, blend.settings)
    return functools.reduce(operator.add, (part * c for part, c in zip(whole, numbers, strict=True)))


@dataclass(frozen=True, slots=True)
class _Rows:
    """A change as methods take it: by its rows."""

    change: LowRank | Tensor

    @property
    def shape(self) -> tuple[int, int]:
        out, n = self.change.shape
        return out, n

    def rows(self, rows: slice) -> Tensor:
        return self.change.rows(rows).dense() if isinstance(self.change, LowRank) else self.change[rows]
