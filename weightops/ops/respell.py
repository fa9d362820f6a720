"""One component's tensors in another spelling, as tasks: copies between bands, the transposition, changes of dtype."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from weightops.errors import FormatError, MismatchError, quote
from weightops.files.dtypes import ARITHMETIC, DTYPE_WORDS, DTYPES
from weightops.files.tensor import Slot, TensorSpec
from weightops.merging.method import store
from weightops.naming.slots import Place, Placing, Written, place, write
from weightops.ops.produce import cast
from weightops.plan import Grain, Input, Task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from weightops.files.checkpoint import Checkpoint
    from weightops.naming.keymap import Table
    from weightops.plan import Block, RawCompute

# The mark of scaled weights, which belongs to a component as a whole and is called so in every spelling.
SCALED = "scaled_fp8"
# A CLIP's buffer: the numbers from 0 on, which readers count themselves.
_COUNTED = "position_ids"
# What a quantiser says in words, the same of each part of a packed tensor.
_WORDS = ".comfy_quant"
_QUANTISED = "dequantise it first, or keep its layout"


@dataclass(frozen=True, slots=True)
class Respelling:
    """A component on its way from one spelling to another.

    bodies: input key -> its name within the component. before: what begins the keys of its outputs. omits:
    beginnings of canonical names that the target has no place for. keeps: strangers are carried along.
    """

    name: str
    source: Table
    target: Table
    bodies: Mapping[str, str]
    before: str = ""
    omits: tuple[str, ...] = ()
    keeps: bool = False


@dataclass(slots=True)
class Respelled:
    """The component's outputs, and what became of its input keys.

    names: output key -> its name within the component. parts: canonical name -> where the input has it, of all
    that is written. carried: input key -> output key, of what no table names. lost, needless and strange: input key
    -> reason; of `needless` nothing is lost, and `strange` are among the carried.
    """

    outputs: dict[str, TensorSpec] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)
    parts: dict[str, Place] = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    needless: dict[str, str] = field(default_factory=dict)
    strange: dict[str, str] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape, of all that is written."""
        return {name: found.spec.shape for name, found in self.parts.items()}


def respell(opened: Checkpoint, r: Respelling, dtype: str) -> Respelled:
    """Plan it, from headers and the few bytes of scales that are to be one. Raises FormatError, MismatchError."""
    found = Respelled()
    placing = place(r.source, r.bodies, opened.tensors)
    _left(opened, r, placing, found, dtype)
    for name, at in placing.places.items():
        if name.startswith(r.omits):
            _no_place(name, at.slot.key, "the class that loads it in diffusers has no place for it", found)
        else:
            found.parts[name] = at
    specs = {name: becomes(at.spec, dtype) for name, at in found.parts.items()}
    written = write(r.target, specs)
    _refuse_scales_of_rows(opened, r, found.parts, written)
    for name, reason in written.left.items():
        if not _is_one_with_another(opened, r, name, found.parts, written, reason):
            _no_place(name, found.parts[name].slot.key, f"{r.target.spelling} names have no place for it", found)
            del found.parts[name]
    for body, spec in written.outputs.items():
        if r.before + body in found.outputs:
            raise MismatchError(opened.label, f"{r.name}: two tensors would be called {quote(r.before + body)}")
        found.outputs[r.before + body] = spec
        found.names[r.before + body] = body
    for name, to in written.places.items():
        key = r.before + to.slot.key
        found.tasks.append(_task(opened, found.parts[name], Place(replace(to.slot, key=key), to.transposed)))
    return found


def becomes(spec: TensorSpec, dtype: str) -> TensorSpec:
    """What --dtype makes of a tensor: floating ones change, others stay."""
    code = DTYPE_WORDS[dtype] if dtype != "keep" and spec.dtype in ARITHMETIC else spec.dtype
    return TensorSpec(code, spec.shape)


# ------------------------------------------------------------------------------------------------ what has no place


def _left(opened: Checkpoint, r: Respelling, placing: Placing, found: Respelled, dtype: str) -> None:
    """The keys that the source's table does not place."""
    for key, reason in placing.left.items():
        body = r.bodies[key]
        claim = r.source.claim(body)
        if claim is not None:
            if not all(name in placing.places for name in claim.names):
                raise FormatError(opened.label, f"tensor {quote(key)}: {reason}")
            found.lost[key] = reason
        elif body == SCALED or (r.source is r.target and r.source.is_extra(body)):
            _carry(opened, r, key, found, dtype)
        elif r.source.is_extra(body):
            found.needless[key] = f"means nothing beside {r.target.spelling} names"
        elif r.keeps:
            _carry(opened, r, key, found, dtype)
            found.strange[key] = f"{reason}; kept"
        else:
            found.lost[key] = reason


def _carry(opened: Checkpoint, r: Respelling, key: str, found: Respelled, dtype: str) -> None:
    to = r.before + r.bodies[key]
    spec = opened.tensors[key].spec
    found.outputs[to] = becomes(spec, dtype)
    found.names[to] = r.bodies[key]
    found.carried[key] = to
    found.tasks.append(carry(key, spec, to, dtype))


def _no_place(name: str, key: str, reason: str, found: Respelled) -> None:
    if name.endswith(_COUNTED):
        found.needless[key] = "numbers counted from 0, which whoever loads it counts itself"
    else:
        found.lost[key] = reason


def _is_one_with_another(
    opened: Checkpoint, r: Respelling, name: str, parts: Mapping[str, Place], written: Written, reason: str
) -> bool:
    """Is this the scale of a part, written once for all parts of a packed tensor? False: it has no place.

    Raises MismatchError where the scales differ, or where the target packs it with what is not there.
    """
    spelled = r.target.spelled(name)
    if spelled is None:
        return False
    _, key, names = spelled
    first = written.places.get(names[0])
    if first is None or first.slot.key != key or first.slot.bands is not None:
        raise MismatchError(opened.label, f"{r.name}: {name}: {reason}")
    if _bytes_of(opened, parts[name]) != _bytes_of(opened, parts[names[0]]):
        what = f"{r.name}: {key} is one for {', '.join(names)}, but their scales differ"
        raise MismatchError(opened.label, what, _QUANTISED)
    return True


def _bytes_of(opened: Checkpoint, at: Place) -> bytes:
    out = bytearray(at.slot.spec.nbytes)
    opened.read_bytes(at.slot, 0, len(out), memoryview(out))
    return bytes(out)


def _refuse_scales_of_rows(opened: Checkpoint, r: Respelling, parts: Mapping[str, Place], written: Written) -> None:
    """A scale of many values belongs to rows or blocks of its matrix, and cannot follow these into other bands."""
    for key, body in r.bodies.items():
        claim = r.source.claim(body)
        spec = opened.tensors[key].spec
        if claim is None or claim.suffix in ("", _WORDS) or spec.values == 1:
            continue
        for name in claim.names:
            weight = name.removesuffix(claim.suffix) + ".weight"
            if any(weight in at and at[weight].slot.bands is not None for at in (parts, written.places)):
                what = f"tensor {quote(key)} holds {spec.values:,} scales for {weight}, whose rows move; expected one"
                raise MismatchError(opened.label, what, _QUANTISED)


# ------------------------------------------------------------------------------------------------ tasks


def carry(key: str, spec: TensorSpec, to: str, dtype: str) -> Task:
    """A whole tensor under another name, cast where that is asked for."""
    made = becomes(spec, dtype)
    if made.dtype == spec.dtype:
        return Task(to, (Input(0, Slot(key, spec)),), (Slot(to, spec),))
    return Task(to, (Input(0, Slot(key, spec.flat())),), (Slot(to, made.flat()),), cast)


def _task(opened: Checkpoint, at: Place, to: Place) -> Task:
    given, slot = at.slot, to.slot
    if at.transposed != to.transposed:
        return _transposition(opened, given, slot)
    if given.spec.dtype == slot.spec.dtype:
        return Task(slot.key, (Input(0, given),), (slot,))
    if given.bands is None and slot.bands is None:  # as one axis, so that work may be cut between any two values
        given, slot = replace(given, spec=given.spec.flat()), replace(slot, spec=slot.spec.flat())
    return Task(slot.key, (Input(0, given),), (slot,), cast)


def _transposition(opened: Checkpoint, given: Slot, slot: Slot) -> Task:
    if given.spec.dtype != slot.spec.dtype:
        return Task(slot.key, (Input(0, given),), (slot,), _cast_transposed, Grain.TENSOR)
    bits = DTYPES[given.spec.dtype].bits
    if bits % 8 or len(given.spec.shape) != 2:
        raise FormatError(opened.label, f"tensor {quote(given.key)} is {given.spec}, and cannot be transposed")
    compute = _transpose(given.spec.shape, bits // 8)
    return Task(slot.key, (Input(0, given),), (slot,), compute, Grain.TENSOR, raw=True)


def _transpose(shape: tuple[int, ...], itemsize: int) -> RawCompute:
    """The transposition of a matrix as bytes: elements move, and nobody asks what they mean."""

    def compute(inputs: Sequence[memoryview], outputs: Sequence[memoryview], block: Block) -> Any:
        import numpy as np

        kind = f"u{itemsize}"
        given = np.frombuffer(inputs[0], kind).reshape(shape)
        np.frombuffer(outputs[0], kind).reshape(shape[::-1])[...] = given.T

    return compute


def _cast_transposed(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block) -> None:
    store(inputs[0].T, outputs[0])
