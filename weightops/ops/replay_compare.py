"""Are two files the same, bit for bit, and if not, where do they differ? Of what is written, headers and tensors."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.engine.chunks import BLOCK_VALUES, memory_for
from weightops.engine.run import Progress, ignore, run
from weightops.errors import quote
from weightops.files.checkpoint import Checkpoint, open_checkpoint
from weightops.files.dtypes import ARITHMETIC
from weightops.files.source import read
from weightops.files.tensor import Slot
from weightops.lineage import KEY, recipe_of
from weightops.plan import Input, Plan, Task

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor

    from weightops.plan import Block


@dataclass(frozen=True, slots=True)
class Different:
    """A tensor that differs. reason: how, in words; values, largest: how many do, and by how much at most, if known."""

    key: str
    reason: str
    values: int | None = None
    largest: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"key": self.key, "reason": self.reason, "values": self.values, "largest": self.largest}


@dataclass(slots=True)
class Comparison:
    """identical: every byte is the same; metadata: what of it differs, in words, beside what was to be expected."""

    identical: bool = True
    tensors: int = 0
    nbytes: int = 0
    different: list[Different] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Do both hold the same tensors, and say the same?"""
        return not self.different and not self.metadata


def compare(
    mine: str, again: Path, *, expected: Collection[str], memory: int | None, threads: int | None,
    on_progress: Progress = ignore,
) -> Comparison:  # fmt: skip
    """Compare the file or folder `mine` with `again`; of folders all safetensors files.

    expected: fields of the recipe that may differ (version, names, hashes), which is then no difference.
    """
    total = Comparison()
    pairs = [("", mine, str(again))]
    if again.is_dir():
        names = {p.relative_to(again).as_posix() for p in again.rglob("*.safetensors")}
        held = {p.relative_to(mine).as_posix() for p in Path(mine).rglob("*.safetensors")}
        total.different += [Different(name, "is not in the file") for name in sorted(names - held)]
        total.different += [Different(name, "is not made again") for name in sorted(held - names)]
        total.identical = names == held
        pairs = [(f"{name}: ", f"{mine}/{name}", f"{again}/{name}") for name in sorted(names & held)]
    for number, (start, a, b) in enumerate(pairs):
        with contextlib.ExitStack() as stack:
            files = stack.enter_context(open_checkpoint(a)), stack.enter_context(open_checkpoint(b))
            part = _part(on_progress, number, len(pairs))
            _compare(total, start, files, expected, memory=memory, threads=threads, on_progress=part)
    return total


def _part(on_progress: Progress, number: int, count: int) -> Progress:
    return lambda done, total: on_progress(number * total + done, count * total)


def _compare(
    total: Comparison, start: str, files: tuple[Checkpoint, Checkpoint], expected: Collection[str], *,
    memory: int | None, threads: int | None, on_progress: Progress,
) -> None:  # fmt: skip
    mine, again = files
    total.identical = total.identical and _header(mine) == _header(again)
    keys = [key for key in mine.tensors if key in again.tensors]
    found: dict[str, Different] = {}
    for here, there, reason in ((mine, again, "is not made again"), (again, mine, "is not in the file")):
        found |= {key: Different(start + key, reason) for key in here.tensors if key not in there.tensors}
    for key in keys:
        a, b = mine.tensors[key].spec, again.tensors[key].spec
        if a != b:
            found[key] = Different(start + key, f"is {a}, and {b} when it is made again")
    total.tensors += len(keys)
    total.nbytes += sum(mine.tensors[key].spec.nbytes for key in keys)
    alike = [key for key in keys if key not in found and mine.tensors[key].spec.nbytes]
    running: dict[str, Any] = {"memory": memory, "threads": threads}
    counts = _scan(files, alike, _bytes_apart, on_progress=on_progress, **running)
    apart = {key: sum(values) for key, values in counts.items() if any(values)}
    found |= {key: Different(start + key, f"{n:,} bytes differ") for key, n in apart.items()}
    floats = [key for key in apart if mine.tensors[key].spec.dtype in ARITHMETIC]
    for key, values in _scan(files, floats, _values_apart, **running).items():
        count = sum(n for n, _ in values)
        largest = max((distance for _, distance in values if distance is not None), default=None)
        said = f"{count:,} of {mine.tensors[key].spec.values:,} values differ"
        said += "" if largest is None else f", by up to {largest:.3g}"
        said = said if count else "signs of zeros, or bits of NaN, differ"
        found[key] = Different(start + key, said, count, largest)
    total.different += [found[key] for key in sorted(found)]
    total.identical = total.identical and not found
    for line in _metadata(mine, again, expected, ignored=_OF_TENSORS if found else frozenset()):
        if line not in total.metadata:  # once for all files of a folder
            total.metadata.append(line)


# Metadata that follow from the tensors: where these differ, there is no more to say.
_OF_TENSORS = frozenset({"sshs_model_hash", "modelspec.hash_sha256"})


def _header(opened: Checkpoint) -> bytes:
    """The length word and the header, as they stand."""
    (source,) = opened.files
    return read(source, 0, 8 + int.from_bytes(read(source, 0, 8), "little"))


# ------------------------------------------------------------------------------------------------ metadata


def _metadata(mine: Checkpoint, again: Checkpoint, expected: Collection[str], *, ignored: Collection[str]) -> list[str]:
    """What differs in the metadata, by key; of the recipe by field."""
    found = []
    recipes = recipe_of(mine.metadata), recipe_of(again.metadata)
    for key in sorted({*mine.metadata, *again.metadata} - set(ignored)):
        a, b = mine.metadata.get(key), again.metadata.get(key)
        if a == b:
            continue
        if key == KEY and recipes[0] is not None and recipes[1] is not None:
            found += _recipe(recipes[0], recipes[1], expected)
        elif a is None or b is None:
            found.append(f"{quote(key, 60)} is {'only in the file' if b is None else 'not in the file'}")
        else:
            found.append(f"{quote(key, 60)} is {quote(a, 60)}, and {quote(b, 60)} when it is made again")
    return found


def _recipe(mine: dict[str, Any], again: dict[str, Any], expected: Collection[str]) -> list[str]:
    found = [
        f"its recipe: {quote(name)} is {quote(mine.get(name), 60)}, not {quote(again.get(name), 60)}"
        for name in sorted({*mine, *again} - {"inputs", *expected})
        if mine.get(name) != again.get(name)
    ]
    if len(mine["inputs"]) != len(again["inputs"]):
        found.append(f"its recipe: {len(mine['inputs'])} inputs, not {len(again['inputs'])}")
    for a, b in zip(mine["inputs"], again["inputs"], strict=False):
        wrong = [k for k in sorted({*a, *b} - set(expected)) if a.get(k) != b.get(k)]
        what = "says otherwise how it was made" if wrong == ["made"] else f"has another {' and '.join(wrong)}"
        found += [f"its recipe: input {quote(a['name'])} {what}"] if wrong else []
    return found


# ------------------------------------------------------------------------------------------------ tensors


def _scan(
    files: tuple[Checkpoint, Checkpoint], keys: Sequence[str], compute: Any, *, memory: int | None,
    threads: int | None, on_progress: Progress = ignore,
) -> dict[str, list[Any]]:  # fmt: skip
    """The values of each block of these tensors of both files, taken as rows of single values."""
    raw = compute is _bytes_apart
    tasks = []
    for key in keys:
        spec = files[0].tensors[key].spec
        flat = spec.as_bytes() if raw else spec.flat()
        inputs = tuple(Input(n, Slot(key, flat)) for n in range(2))
        work = 0 if raw else 32 * min(spec.values, BLOCK_VALUES)
        tasks.append(Task(key, inputs, (), compute, work_nbytes=work, raw=raw))
    if not tasks:
        return {}
    plan = Plan(files, {}, tuple(tasks))
    outcome = run(plan, None, memory=memory_for(plan, memory), threads=threads, on_progress=on_progress)
    return {key: outcome.values[n] for n, key in enumerate(keys)}


def _bytes_apart(inputs: Sequence[memoryview], _outputs: Sequence[memoryview], _block: Block) -> int:
    import numpy as np

    mine, again = (np.frombuffer(data, dtype=np.uint8) for data in inputs)
    return 0 if np.array_equal(mine, again) else int(np.count_nonzero(mine != again))


def _values_apart(inputs: Sequence[Tensor], _outputs: Sequence[Tensor], _block: Block) -> tuple[int, float | None]:
    """How many values differ, and the largest difference; None where none of them is finite on both sides."""
    mine, again = (data.double() for data in inputs)
    apart = ~((mine == again) | (mine.isnan() & again.isnan()))
    distance = (mine - again).abs()[apart]
    distance = distance[distance.isfinite()]
    return int(apart.sum()), float(distance.max()) if len(distance) else None
