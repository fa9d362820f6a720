"""Take a written layout back to the names it came from, by the same tables, and compare every byte; without torch."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from weightops.errors import ValueRefused, quote
from weightops.files.checkpoint import Checkpoint, open_checkpoint
from weightops.files.dtypes import DTYPES
from weightops.files.tensor import Slot
from weightops.naming.slots import Place, place, write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from weightops.ops.layout import Way
    from weightops.ops.respell import Respelled, Respelling
    from weightops.plan import Plan

_STEP = 2 << 20
_HINT = "the disk or the memory of this machine may be failing; run again, and report it if it stays"


def check(
    opened: Checkpoint, plan: Plan, way: Way, written: Path, *, on_progress: Callable[[int, int], None]
) -> dict[str, int]:
    """Compare every input tensor that the layout keeps with what the output holds of it, byte for byte.

    The output is opened anew, and its names are looked up as if it were any file: what was planned is not asked.
    Returns {"tensors", "bytes"}. Raises ValueRefused, which names the first tensor that differs.
    """
    with contextlib.ExitStack() as stack:
        files = _files(plan, written, stack)
        pairs = [pair for r, done in way.components for pair in _way_back(opened, r, done, files, str(written))]
        pairs += _carried(opened, way.carried, files, str(written))
        total = sum(at.slot.spec.nbytes for at, _, _ in pairs)
        seen = 0
        for at, output, to in pairs:
            _compare(opened, at, output, to, str(written))
            seen += at.slot.spec.nbytes
            on_progress(seen, total)
    return {"tensors": len({at.slot.key for at, _, _ in pairs}), "bytes": total}


_Files = dict[str, tuple[Checkpoint, str]]


def _files(plan: Plan, written: Path, stack: contextlib.ExitStack) -> _Files:
    """Where each output stands: the folder or file, opened as any other, and its name there."""
    if not plan.files:
        output = stack.enter_context(open_checkpoint(written))
        return {key: (output, key) for key in plan.outputs}
    opened: dict[str, Checkpoint] = {}
    found = {}
    for file in plan.files:
        folder = file.path.rpartition("/")[0]
        if folder not in opened:
            opened[folder] = stack.enter_context(open_checkpoint(written / folder))
        found.update({key: (opened[folder], name) for key, name in file.keys.items()})
    return found


def _carried(
    opened: Checkpoint, carried: Mapping[str, str], files: _Files, label: str
) -> Iterator[tuple[Place, Checkpoint, Place]]:
    for key, to in carried.items():
        output, name = _held(files, to, label)
        yield Place(opened.slot(key)), output, Place(replace(opened.slot(key), key=name))


def _held(files: _Files, key: str, label: str) -> tuple[Checkpoint, str]:
    output, name = files[key]
    if name not in output.tensors:
        raise ValueRefused(label, f"tensor {quote(name)} is missing in it", _HINT)
    return output, name


def _way_back(
    opened: Checkpoint, r: Respelling, done: Respelled, files: _Files, label: str
) -> Iterator[tuple[Place, Checkpoint, Place]]:
    """Pieces of the component's input tensors, with where the output holds them; all of each tensor is covered."""
    yield from _carried(opened, done.carried, files, label)
    bodies, infos = {}, {}
    for key in done.outputs.keys() - done.carried.values():
        output, name = _held(files, key, label)
        bodies[name] = done.names[key]
        infos[name] = output.tensors[name]
    there = place(r.target, bodies, infos).places
    back = write(r.source, {name: found.spec for name, found in there.items()})
    wanted: dict[str, str] = {}
    for key, body in r.bodies.items():
        claim = r.source.claim(body)
        for name in claim.names if claim is not None else ():
            wanted.setdefault(name, key)
    covered: dict[str, int] = {}
    for name, found in there.items():
        key = wanted[name]
        # A scale that several parts have in common is written once, and compared with each.
        at = back.places.get(name) or Place(opened.slot(key))
        at = Place(Slot(key, at.slot.spec, at.slot.bands), at.transposed)
        whole = opened.tensors[key].spec
        if whole.dtype != at.spec.dtype:
            raise ValueRefused(label, f"tensor {quote(key)} is {whole.dtype}, but comes back as {at.spec.dtype}", _HINT)
        covered[key] = at.slot.spec.nbytes + (0 if at.slot.bands is None else covered.get(key, 0))
        yield at, output, found
    for name in done.parts:
        key = wanted[name]
        if key not in done.lost and covered.get(key) != opened.tensors[key].spec.nbytes:
            raise ValueRefused(label, f"tensor {quote(key)} does not come back whole", _HINT)


def _compare(opened: Checkpoint, at: Place, output: Checkpoint, to: Place, label: str) -> None:
    """Raises ValueRefused where the bytes differ, or the dtype or shape."""
    given, found = at.slot, to.slot
    what = f"tensor {quote(given.key)} comes back from {quote(found.key)}"
    if given.spec.nbytes != found.spec.nbytes:
        raise ValueRefused(label, f"{what} as {to.spec}, expected {at.spec}", _HINT)
    if at.transposed != to.transposed:
        same = _matrix(opened, at) == _matrix(output, to)
        if not same:
            raise ValueRefused(label, f"{what} with other bytes", _HINT)
        return
    nbytes = given.spec.nbytes
    ours, theirs = bytearray(min(_STEP, nbytes)), bytearray(min(_STEP, nbytes))
    for start in range(0, nbytes, _STEP):
        stop = min(start + _STEP, nbytes)
        opened.read_bytes(given, start, stop, memoryview(ours)[: stop - start])
        output.read_bytes(found, start, stop, memoryview(theirs)[: stop - start])
        if ours != theirs:  # what is behind the end of the last piece is older, and was equal
            first = start + next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            raise ValueRefused(label, f"{what} with another byte at {first:,}", _HINT)


def _matrix(source: Checkpoint, at: Place) -> bytes:
    """All bytes of a matrix, as it is and not as it is stored."""
    import numpy as np

    out = bytearray(at.slot.spec.nbytes)
    source.read_bytes(at.slot, 0, len(out), memoryview(out))
    if not at.transposed:
        return bytes(out)
    kind = f"u{DTYPES[at.slot.spec.dtype].bits // 8}"
    return np.frombuffer(out, kind).reshape(at.slot.spec.shape).T.tobytes()
