"""Tasks that fill a tensor: with rows and columns of others, with zeros, with one number. Knows no module's name."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from weightops.engine.chunks import BLOCK_VALUES
from weightops.errors import MismatchError, ValueRefused, quote
from weightops.files.dtypes import ARITHMETIC
from weightops.files.tensor import Slot, TensorSpec
from weightops.plan import Block, Grain, Input, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from weightops.files.tensor import TensorInfo
    from weightops.lora.pieces import Fill


def copies(fills: Sequence[Fill]) -> bool:
    """Are these whole rows, unchanged?"""
    return all(f.columns is None and f.strength is None and f.source.columns is None for f in fills)


def fill(
    key: str, spec: TensorSpec, fills: Sequence[Fill], tensors: Mapping[str, TensorInfo], label: str
) -> list[Task]:
    """The tasks that make the tensor `key`; what nothing fills is zero. Raises MismatchError."""
    stored = [f.source.rows(tensors[f.source.key].spec) for f in fills]
    if copies(fills):
        if len(fills) == 1 and fills[0].source.spec.values == spec.values:
            return [Task(key, (Input(0, stored[0]),), (Slot(key, spec),))]
        return _rows(key, spec, fills, stored)
    inputs, outputs = tuple(Input(0, slot) for slot in stored), (Slot(key, spec),)
    if all(f.strength is None for f in fills):
        return [Task(key, inputs, outputs, _placing(spec, fills), Grain.TENSOR, raw=True)]
    if spec.dtype not in ARITHMETIC:
        raise MismatchError(label, f"{quote(key)} is {spec.dtype}, and cannot be multiplied by a strength")
    first = fills[0]
    if len(fills) == 1 and first.columns is None and first.source.columns is None and first.source.spec == spec:
        return [Task(key, inputs, outputs, _scaled(first.strength or 0.0), work_nbytes=16 * BLOCK_VALUES)]
    work = 16 * max(slot.spec.values for slot in stored)
    return [Task(key, inputs, outputs, _placing_scaled(fills), Grain.TENSOR, work_nbytes=work)]


def _rows(key: str, spec: TensorSpec, fills: Sequence[Fill], stored: Sequence[Slot]) -> list[Task]:
    """Copies of whole rows, and zeros between them."""
    tasks = []
    position = 0
    for f, slot in zip(fills, stored, strict=True):
        if f.row > position:
            tasks.append(_zeros(key, spec, position, f.row))
        position = f.row + f.source.spec.rows
        tasks.append(Task(key, (Input(0, slot),), (Slot(key, f.source.spec, ((f.row, position),)),)))
    if position < spec.rows:
        tasks.append(_zeros(key, spec, position, spec.rows))
    return tasks


def _zeros(key: str, spec: TensorSpec, start: int, stop: int) -> Task:
    def compute(_inputs: Sequence[memoryview], outputs: Sequence[memoryview], _block: Block) -> None:
        outputs[0][:] = bytes(len(outputs[0]))

    slot = Slot(key, spec.with_rows(stop - start), ((start, stop),))
    return Task(key, (), (slot,), compute, Grain.TENSOR, raw=True)


def _placing(spec: TensorSpec, fills: Sequence[Fill]) -> Callable[[Any, Any, Block], None]:
    """Copy each source to its rows and columns of a matrix of zeros, as bytes."""

    def compute(inputs: Sequence[memoryview], outputs: Sequence[memoryview], _block: Block) -> None:
        import numpy as np

        size = spec.nbytes // spec.values
        whole = np.frombuffer(outputs[0], dtype=np.uint8).reshape(spec.rows, -1)
        whole[:] = 0
        for f, given in zip(fills, inputs, strict=True):
            values = np.frombuffer(given, dtype=np.uint8).reshape(f.source.spec.rows, -1)
            if f.source.columns is not None:
                values = values[:, f.source.columns[0] * size : f.source.columns[1] * size]
            start = f.columns[0] * size if f.columns is not None else 0
            whole[f.row : f.row + len(values), start : start + values.shape[1]] = values

    return compute


def _scaled(strength: float) -> Callable[[Any, Any, Block], None]:
    """All of a tensor times its strength, in float64 and rounded once."""

    def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block) -> None:
        from weightops.merging.method import store

        store(inputs[0].double() * strength, outputs[0])

    return compute


def _placing_scaled(fills: Sequence[Fill]) -> Callable[[Any, Any, Block], None]:
    """Each source, multiplied by its strength, to its rows and columns of a matrix of zeros."""

    def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block) -> None:
        from weightops.merging.method import store

        whole = outputs[0].zero_()
        for f, given in zip(fills, inputs, strict=True):
            columns = f.source.columns
            values = given if columns is None else given[:, columns[0] : columns[1]]
            rows = whole[f.row : f.row + len(values)]
            target = rows if f.columns is None else rows[:, f.columns[0] : f.columns[1]]
            wide = values.double() * (1.0 if f.strength is None else f.strength)
            store(wide.reshape(target.shape), target)

    return compute


def constant(key: str, value: float, dtype: str) -> tuple[Task, TensorSpec]:
    """A scalar tensor of this value, in `dtype` where that holds it exactly (see `encode_number`)."""
    data, written = encode_number(value, dtype)

    def compute(_inputs: Sequence[memoryview], outputs: Sequence[memoryview], _block: Block) -> None:
        outputs[0][:] = data

    spec = TensorSpec(written, ())
    return Task(key, (), (Slot(key, spec),), compute, Grain.TENSOR, raw=True), spec


# Exact in the first of these that the value fits; the narrow ones only beside factors of that dtype.
_NUMBERS = (("BF16", "<f"), ("F16", "<e"), ("F32", "<f"), ("F64", "<d"))


def encode_number(value: float, dtype: str) -> tuple[bytes, str]:
    """The bytes of a number in `dtype` where that holds it exactly, else in F32 or F64; and the dtype."""
    for name, code in _NUMBERS:
        if name in ("BF16", "F16") and name != dtype:
            continue
        try:
            data = struct.pack(code, value)
        except OverflowError:
            continue
        if struct.unpack(code, data)[0] != value or (name == "BF16" and data[:2] != b"\0\0"):
            continue
        return (data[2:] if name == "BF16" else data), name
    raise ValueRefused("alpha", f"found {value}, expected a finite number")
