"""Family: one way to write a change of a weight as a few tensors: their names, what their shapes say, what they do.

Knows no file, no spelling, no device and no memory: functions of tensors that stay in the dtype and on the device that
they are given, and change none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from weightops.errors import MismatchError
from weightops.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Grain = Literal["rows", "tensor"]

# Parts that say how strong a module is, or how its result is scaled, whatever its family.
MODIFIERS = ("alpha", "dora_scale")


class Told(NamedTuple):
    """What no tensor tells of a module, and a trainer's settings do.

    full_rank: by which alpha is divided where a LoKr has two whole factors (PEFT); None: such a LoKr is as strong as it
    stands (LyCORIS, ComfyUI, diffusers). neumann: the terms of OFTv2's Cayley-Neumann series; None: the exact transform
    (PEFT with use_cayley_neumann=False). coft: the length that PEFT's constrained OFT allows, shared out to the blocks.
    """

    full_rank: int | None = None
    neumann: int | None = 5
    coft: float | None = None


class Described(Protocol):
    """What is known of a module's parts without their values."""

    @property
    def shapes(self) -> Mapping[str, Shape]: ...
    @property
    def alpha(self) -> float | None: ...
    @property
    def told(self) -> Told: ...


class Description(NamedTuple):
    """A module's parts by their shapes; `alpha` and `told` as of `Parts`."""

    shapes: Shapes
    alpha: float | None
    told: Told = Told()


@dataclass(frozen=True, slots=True)
class Parts:
    """The tensors of one adapter's module, all in float32 or all in float64, and what else its arithmetic asks for.

    alpha: as the file says it; None: it says none. shape: of the changed weight.
    """

    tensors: Mapping[str, Tensor]
    alpha: float | None
    shape: Shape
    told: Told = field(default_factory=Told)

    def __getitem__(self, part: str) -> Tensor:
        return self.tensors[part]

    def __contains__(self, part: str) -> bool:
        return part in self.tensors

    @property
    def shapes(self) -> dict[str, Shape]:
        return {part: tuple(tensor.shape) for part, tensor in self.tensors.items()}


@dataclass(frozen=True, slots=True)
class Family:
    """A way to write a change of one weight as a few tensors, its parts.

    What the shapes say. forms: each a set of parts that makes the module whole; the largest that is there counts.
    optional: parts that may stand beside any of them. meet: can the parts of a form be multiplied? rank: None where the
    family has none. shape: of the weight that is changed, None where the parts do not tell. fits: may the parts change
    a weight of this shape? rows: parts whose axis 0 are the weight's rows, so that a packed weight's bands are theirs;
    empty: cannot be cut. uniform_rows: these parts stand for several rows each (LoKr's first factor: all rows are its
    rows times a number). flat: a matrix may be a convolution's kernel, flattened to [out, in·k·k]. of_bias: parts that
    change the bias and not the weight.

    What they do, at strength 1. scale: what ΔW is multiplied by: alpha / rank, by this family's convention. Either
    delta: rows of ΔW, [rows, …], of which no others are computed; or apply: the same rows of W to those of W', where
    the change depends on W. bias: what is added to the bias. sets: the parts are the weight and the bias themselves.
    lowrank: up [out, rank] and down [rank, in·k·k] of which ΔW, flattened, is exactly the product, scale folded in;
    product_rank: that rank, which may exceed the matrix's sides. kronecker: of a Kronecker product, up and down of both
    of its matrices, flattened, whose sizes are `kronecker_sides`.
    grain: rows, or tensor where each row of W' depends on other rows of W, and `apply` is given all of it.
    """

    name: str
    forms: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()
    meet: Callable[[Shapes], bool] = lambda shapes: True
    rank: Callable[[Shapes], int | None] = lambda shapes: None
    shape: Callable[[Shapes], Shape | None] = lambda shapes: None
    fits: Callable[[Shapes, Shape], bool] | None = None
    rows: tuple[str, ...] = ()
    uniform_rows: bool = False
    flat: bool = False
    of_bias: tuple[str, ...] = ()
    scale: Callable[[Described], float] = lambda parts: 1.0
    delta: Callable[[Parts, slice], Tensor] | None = None
    apply: Callable[[Tensor, Parts, slice], Tensor] | None = None
    bias: Callable[[Parts], Tensor] | None = None
    sets: bool = False
    lowrank: Callable[[Parts], tuple[Tensor, Tensor]] | None = None
    product_rank: Callable[[Shapes], int] | None = None
    kronecker: Callable[[Parts], tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] | None = None
    kronecker_sides: Callable[[Shapes], tuple[tuple[int, int], tuple[int, int]]] | None = None
    grain: Grain = "rows"

    def form(self, parts: Mapping[str, object]) -> tuple[str, ...] | None:
        """The largest form of which all parts are there."""
        whole = [form for form in self.forms if all(part in parts for part in form)]
        return max(whole, key=len, default=None)

    @property
    def parts(self) -> frozenset[str]:
        return frozenset(part for form in self.forms for part in form) | frozenset(self.optional)

    def changes_weight(self, parts: Mapping[str, object]) -> bool:
        return any(part not in self.of_bias for part in self.form(parts) or ())

    def changes_bias(self, parts: Mapping[str, object]) -> bool:
        return any(part in parts for part in self.of_bias)


FAMILIES: Registry[Family] = Registry("adapter family", "weightops.lora.families")


# ------------------------------------------------------------------------------------------------ from shapes alone


def can_change(family: Family, shapes: Shapes, shape: Shape) -> bool:
    """May an adapter of these shapes change a weight of this one? A matrix and a 1×1 kernel are the same."""
    return changed_shape(family, shapes, shape) is not None


def changed_shape(family: Family, shapes: Shapes, shape: Shape) -> Shape | None:
    """The shape of a weight when an adapter of these shapes has changed it; None: it cannot.

    It is another one, wider, only where the adapter sets the weight or says that it is for a wider one.
    """
    found = family.shape(shapes)
    rows = found[0] if found and family.sets else shape[0] if shape else 1
    if any(math.prod(shapes[part]) != rows for part in family.of_bias if part in shapes):
        return None
    if not family.changes_weight(shapes):
        return shape
    if "dora_scale" in shapes and _counts_inputs(shapes["dora_scale"], shape) is None:
        return None
    if family.fits is not None:
        return shape if family.fits(shapes, shape) else None
    if found is None:
        return None
    if _alike(found, shape):
        return shape
    says = family.sets or "reshape_weight" in shapes
    wider = len(found) == len(shape) and all(wide >= narrow for wide, narrow in zip(found, shape, strict=True))
    return found if says and wider else None


def _alike(found: Shape, shape: Shape) -> bool:
    """The same axes, but for those of 1; or a kernel flattened."""
    if found[:1] != shape[:1] or math.prod(found) != math.prod(shape):
        return False
    return len(found) == 2 or [n for n in found[1:] if n != 1] == [n for n in shape[1:] if n != 1]


def grain_of(family: Family, shapes: Shapes, shape: Shape) -> Grain:
    """May W' be made band by band, each from the same rows of W? Norms of whole columns need them all."""
    if "dora_scale" in shapes and _counts_inputs(shapes["dora_scale"], shape):
        return "tensor"
    return family.grain


def same(a: int, b: int) -> bool:
    """Of two axes; a list of names may leave one open, −1."""
    return a == b or -1 in (a, b)


def over_rank(alpha: float | None, rank: int | None) -> float:
    """alpha / rank; 1 where the file says no alpha.

    An alpha of 0 is a strength of 0, as ComfyUI, diffusers and A1111 read it. kohya's and LyCORIS' own loaders take it
    for "alpha = rank", which is what 0 means on their command lines; the files that they write never hold it.
    """
    return 1.0 if alpha is None or not rank else alpha / rank


# ------------------------------------------------------------------------------------------------ W'


def change(family: Family, parts: Parts, weight: Tensor, strength: float, rows: slice | None = None) -> Tensor:
    """W' at a strength λ, of these rows or of all, from the same rows of the original W (grain tensor: from all of W).

    Additive families: W + λ·ΔW. With a magnitude (DoRA), and where the change depends on W (OFT, IA3, GLoRA, set):
    W + λ·(W' − W), with W' at strength 1. That is IA3's, GLoRA's and Diag-OFT's own meaning of a strength. It is not
    LyCORIS' of BOFT (each of its stages is moved towards I, so that the result is no orthogonal turn either), of
    rescale (which it applies in full, even at 0), and of DoRA (V·(λ(m/‖V‖ − 1) + 1), which is W + ΔW, and not W, at 0).
    Where the adapter is wider than W (reshape_weight, set), W is padded with zeros first.
    Raises MismatchError where the shapes do not fit.

    Which other rows are asked for does not matter, but for the last bits of a matrix product, which a BLAS library may
    add up in another order for another height: ask for bands whose height follows from the shape alone. What is made
    value by value (full, norm, set, IA3, LoKr of whole factors) agrees to the bit.
    """
    if not family.changes_weight(parts.tensors):
        return weight
    rows = slice(None) if rows is None else rows
    weight = _widened(family, parts, weight, rows)
    if family.delta is not None:
        delta = family.delta(parts, rows)
        if "dora_scale" not in parts:
            return weight + delta * strength
        changed = decompose(weight + delta, parts["dora_scale"], parts.shape, rows)
    elif family.apply is not None and "dora_scale" not in parts:
        changed = family.apply(weight, parts, rows)
    else:
        raise MismatchError("", f"a magnitude (dora_scale) beside {family.name} has no meaning that two tools share")
    return _towards(weight, changed, strength)


def change_bias(family: Family, parts: Parts, bias: Tensor | None, strength: float) -> Tensor | None:
    """The bias at a strength; None stands for a module without, which then has the change alone."""
    if family.bias is None or not family.changes_bias(parts.tensors):
        return bias
    own = family.bias(parts)
    if bias is None:
        return own if family.sets else own * strength
    if bias.shape != own.shape:
        raise MismatchError("", f"the adapter changes a bias of {list(own.shape)}, and this one is {list(bias.shape)}")
    return _towards(bias, own, strength) if family.sets else bias + own * strength


def _towards(start: Tensor, end: Tensor, strength: float) -> Tensor:
    """Exactly `start` at 0, and `end` at 1."""
    # Not torch.lerp, nor add with alpha: vectorised, they fuse what they do not at the end of a buffer, and a value's
    # last bit would depend on its place in the band.
    return end if strength == 1 else start + (end - start) * strength


def decompose(weight: Tensor, magnitude: Tensor, shape: Shape, rows: slice) -> Tensor:
    """V·m/‖V‖: DoRA gives each output, or each input, of V = W + ΔW the length that it learned.

    weight: these rows of V; shape: of all of it. The norms run over in·k·k for each output, or over out·k·k for each
    input, which needs every row. An all-zero direction stays zero.
    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5, with ‖W + ΔW‖ as in LyCORIS and PEFT. ComfyUI divides the
    outputs' by ‖W‖, and diffusers drops magnitudes: their images differ from those of training.
    """
    import torch

    inputs = _counts_inputs(tuple(magnitude.shape), shape)
    if inputs is None:
        raise MismatchError("", f"a magnitude of shape {list(magnitude.shape)} fits no axis of {list(shape)}")
    if inputs and weight.shape[0] != shape[0]:
        raise MismatchError("", f"a magnitude for each input needs all {shape[0]} rows, found {weight.shape[0]}")
    ones = [1] * (weight.ndim - 2)
    axes = [axis for axis in range(weight.ndim) if axis != int(inputs)]
    length: Tensor = torch.linalg.vector_norm(weight, dim=axes, keepdim=True)
    magnitude = magnitude.reshape(1, -1, *ones) if inputs else magnitude.reshape(-1, 1, *ones)[rows]
    return weight * (magnitude / length.clamp_min(torch.finfo(length.dtype).tiny))


def _counts_inputs(magnitude: Shape, weight: Shape) -> bool | None:
    """Has a magnitude one number for each input of the weight (True) or for each output (False)? None: for neither.

    Outputs: [out, 1, …] (LyCORIS), [out] and [1, out, 1, 1] (PEFT). Inputs: [1, in, …] (LyCORIS, OneTrainer). Of
    [1, n, 1, 1] for n outputs and n inputs the shape cannot tell: it is LyCORIS', and a reader who knows from the key
    that it is PEFT's hands in [n, 1, 1, 1].
    """
    if len(weight) < 2 or not magnitude:
        return None
    out, features = weight[:2]
    if magnitude[0] == out and math.prod(magnitude[1:]) == 1:
        return False
    if len(magnitude) < 2 or magnitude[0] != 1 or math.prod(magnitude[2:]) != 1:
        return None
    return True if magnitude[1] == features else False if magnitude[1] == out else None


def _widened(family: Family, parts: Parts, weight: Tensor, rows: slice) -> Tensor:
    """W, padded with zeros to the adapter's shape where the adapter says that it is for a wider one (BFL's control)."""
    import torch

    wanted = (len(range(*rows.indices(parts.shape[0]))), *parts.shape[1:])
    found = tuple(weight.shape)
    if found == wanted:
        return weight
    said = tuple(int(n) for n in parts["reshape_weight"].tolist()) if "reshape_weight" in parts else None
    if (family.sets if said is None else said == parts.shape) and len(found) == len(wanted):
        more = [wide - narrow for narrow, wide in zip(found, wanted, strict=True)]
        if min(more) >= 0:
            return torch.nn.functional.pad(weight, [n for wider in reversed(more) for n in (0, wider)])
    raise MismatchError("", f"the adapter changes a weight of {list(wanted)}, and this one is {list(found)}")
