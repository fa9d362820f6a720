"""The plan of an extraction: the adapter that is written of what two checkpoints have in common.

From headers alone, and from ranks where the data decide these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.engine.chunks import at_once
from weightops.errors import MismatchError, quote
from weightops.files.tensor import Slot, TensorSpec
from weightops.lora.units import Unit
from weightops.ops.dialect_settings import APART, folder_of, metadata_of, told_of_base
from weightops.ops.difference import extracted, extracted_nbytes, subtracted, whole_nbytes
from weightops.ops.filling import constant
from weightops.ops.produce import Planned, stem
from weightops.ops.report import modules
from weightops.plan import Grain, Plan, Task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightops.ops.extract_pair import Matrix, Pair, Vector
    from weightops.plan import Input


def plan_extract(found: Pair, ranks: Sequence[int], *, together: bool = False) -> tuple[Planned, list[list[int]]]:
    """The plan, given a rank for each matrix; and for each of its first tasks the numbers of its matrices.

    together: matrices of one shape in one task, for a device that does them at once.
    """
    wish = found.wish
    found.homes.clear()  # it may have been planned before, with other ranks
    outputs: dict[str, TensorSpec] = {}
    units: list[Unit] = []
    groups = _groups(found, ranks) if together else [[n] for n, rank in enumerate(ranks) if rank]
    tasks = [_task(found, group, ranks, outputs, units) for group in groups]
    for number in (n for group in groups for n in group):
        matrix = found.matrices[number]
        if found.has_vectors and not found.is_whole(matrix, ranks[number]):
            key = _key(found, outputs, matrix, "alpha")
            task, outputs[key] = constant(key, float(ranks[number]), matrix.written(wish.dtype))
            tasks.append(task)
    tasks += [_subtraction(found, vector, outputs) for vector in found.said_vectors]
    metadata, headers = metadata_of(found, units) if found.known is not None else ({}, {})
    files, extras = folder_of(found, units) if found.known is not None else ((), {})
    recipe = {"command": "extract", "version": __version__, "dtype": wish.dtype, "dialect": wish.dialect, **wish.said}
    told = told_of_base(wish.dialect, found.known.name if found.known is not None else None)
    plan = Plan(
        (found.opened, found.base), outputs, tuple(tasks), {"format": "pt", **metadata, **headers, **told},
        recipe, refuse_nonfinite=not wish.allow_nonfinite, files=files, extras=extras,
        data_hashes={"sshs_model_hash": "{}"} if wish.dialect == "kohya" else {},
    )  # fmt: skip
    words = f"{stem(found.opened)} − {stem(found.base)}: {modules(len(units))}, {wish.dialect} names"
    return Planned(plan, found.account(ranks), words, _counts(found, ranks)), groups


def _groups(found: Pair, ranks: Sequence[int]) -> list[list[int]]:
    """Matrices that are alike: as many at once as their shape allows, whatever the memory."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for number, (matrix, rank) in enumerate(zip(found.matrices, ranks, strict=True)):
        if rank:
            slots = sum(i.slot.spec.nbytes for i in matrix.inputs())
            nbytes = slots + sum(s.nbytes for s in _parts(found, matrix, rank).values()) + _work(found, matrix, rank)
            kind = (matrix.out, matrix.n, matrix.dtype, matrix.base[0].slot.spec.dtype, rank, nbytes)
            kinds.setdefault(kind, []).append(number)
    groups = []
    for kind, numbers in kinds.items():
        count = at_once(kind[0] * kind[1], kind[-1])
        groups += [numbers[i : i + count] for i in range(0, len(numbers), count)]
    return groups


def _work(found: Pair, matrix: Matrix, rank: int) -> int:
    """The bytes that its factors take, beside inputs and outputs."""
    return whole_nbytes(matrix) if found.is_whole(matrix, rank) else extracted_nbytes(matrix, rank)


def _task(
    found: Pair, group: Sequence[int], ranks: Sequence[int], outputs: dict[str, TensorSpec], units: list[Unit]
) -> Task:
    inputs: list[Input] = []
    slots: list[Slot] = []
    pieces = []
    for number in group:
        matrix, rank = found.matrices[number], ranks[number]
        parts = _parts(found, matrix, rank)
        for part, spec in parts.items():
            key = _key(found, outputs, matrix, part)
            outputs[key] = spec
            slots.append(Slot(key, spec))
        filled = {part: (spec, ()) for part, spec in parts.items()}
        whole = "diff" in parts
        units.append(
            Unit(matrix.component, matrix.prefix, matrix.module, "full" if whole else "lora", filled,
                 None if whole else float(rank), None if whole else rank, ())
        )  # fmt: skip
        inputs += matrix.inputs()
        pieces.append(matrix)
    rank = ranks[group[0]]
    compute = extracted(pieces, rank, seed=found.wish.seed, clamp_quantile=found.wish.clamp_quantile)
    work = sum(_work(found, matrix, rank) for matrix in pieces)
    return Task(pieces[0].name, tuple(inputs), tuple(slots), compute, Grain.TENSOR, work_nbytes=work)


def _subtraction(found: Pair, vector: Vector, outputs: dict[str, TensorSpec]) -> Task:
    key = _key(found, outputs, vector, vector.part)
    outputs[key] = TensorSpec(vector.written(found.wish.dtype), vector.shape)
    slots = (Slot(key, outputs[key]),)
    return Task(key, vector.inputs(), slots, subtracted, Grain.TENSOR, work_nbytes=32 * outputs[key].values)


def _parts(found: Pair, matrix: Matrix, rank: int) -> dict[str, TensorSpec]:
    """The tensors of one module: factors, or the difference itself where that is smaller."""
    dtype = matrix.written(found.wish.dtype)
    if found.is_whole(matrix, rank):
        return {"diff": TensorSpec(dtype, matrix.shape)}
    ones = (1,) * (len(matrix.shape) - 2)
    return {
        "down": TensorSpec(dtype, (rank, *matrix.shape[1:])),
        "up": TensorSpec(dtype, (matrix.out, rank, *ones)),
    }


def _key(found: Pair, outputs: Mapping[str, TensorSpec], of: Matrix | Vector, part: str) -> str:
    key = of.name + found.dialect.endings[part]
    key = f"{of.component}{APART}{key}" if found.dialect.folder else key
    if key in outputs:
        raise MismatchError(found.opened.label, f"two of its tensors would be called {quote(key)}")
    found.homes[key] = of.component
    return key


def _counts(found: Pair, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """Of each component: modules of factors, whole ones, those that are equal in both, and those of rank 0."""
    counted: dict[str, dict[str, Any]] = {}
    kinds = [
        "dropped" if not rank else "whole" if found.is_whole(m, rank) else "convolutions" if m.is_convolution
        else "modules" for m, rank in zip(found.matrices, ranks, strict=True)
    ]  # fmt: skip
    for matrix, kind in (*zip(found.matrices, kinds, strict=True), *((m, "equal") for m in found.equal)):
        name = matrix.component or "model"
        entry = counted.setdefault(name, {"component": name, "modules": 0, "convolutions": 0, "whole": 0, "equal": 0})
        entry[kind] = entry.get(kind, 0) + 1
    return list(counted.values())
