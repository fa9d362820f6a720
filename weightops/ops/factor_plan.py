"""The plan of an adapter file that is made of sums of changes: a LoRA of a given rank for each, and what goes along."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops.engine.chunks import at_once
from weightops.files.tensor import Slot, TensorSpec
from weightops.lora.settings import Module as Setting
from weightops.ops.filling import constant
from weightops.ops.respell import becomes
from weightops.ops.truncation import (
    Found,
    as_it_is,
    as_it_is_nbytes,
    as_peer,
    as_peer_nbytes,
    cut,
    cut_nbytes,
    joined,
    joined_nbytes,
    spectra,
    spectra_nbytes,
    whole,
    whole_nbytes,
)
from weightops.plan import Grain, Task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightops.files.checkpoint import Checkpoint
    from weightops.lora.rank import Spectrum
    from weightops.ops.sums import Sum

# Where both are about as large, factors are read by more tools than a whole difference.
_SMALLER = 0.95


@dataclass(frozen=True, slots=True)
class Module:
    """One module of the file that is written.

    keys: of the parts that it may have (up, down, alpha, diff); without one for alpha, that stands elsewhere. dtype: of
    its factors. scale: by which ΔW is larger than their product. stored: part -> key of the tensors of its one term, a
    LoRA of rank `stored_rank`, that are copied where it keeps that rank. body: its name in settings. kept: shapes of
    other parts, which go along. incoming: the largest rank of its terms. exact: whatever its
    rank, nothing is cut. peer: another tool's arithmetic, `ratio` or `concat` (see weightops.lora.compat).
    """

    of: Sum
    component: str
    keys: Mapping[str, str]
    dtype: str
    body: str
    scale: float = 1.0
    stored: Mapping[str, str] = field(default_factory=dict)
    stored_rank: int | None = None
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    exact: bool = False
    incoming: int | None = None
    peer: str | None = None

    @property
    def rank_before(self) -> int:
        """The rank that it has: of a LoRA as it stands, of several the largest, else all that its matrix can have."""
        given = self.incoming if self.stored_rank is None else self.stored_rank
        return self.of.most if given is None else given

    def settled(self, rank: int) -> int:
        """The rank that it gets where so many are wanted: no more than it has; 1, where other parts need it."""
        if self.stored_rank is not None and rank >= self.stored_rank:
            return self.stored_rank
        if self.peer is not None:  # which may be more than the matrix can have
            return self.rank_before
        return min(max(rank, 1 if self.kept else 0), self.of.most)

    def is_stored(self, rank: int) -> bool:
        return rank == self.stored_rank

    def is_whole(self, rank: int) -> bool:
        """Is the difference itself written, for it is smaller than its factors?"""
        if self.of.is_product or "diff" not in self.keys or self.kept or self.scale != 1:
            return False
        return self.exact or rank * (self.of.out + self.of.n) >= _SMALLER * self.of.out * self.of.n

    @property
    def is_particular(self) -> bool:
        """Is it another thing than a sum?"""
        return self.of.blend is not None or self.peer is not None

    def joins(self, rank: int) -> bool:
        """Are its terms' own factors written, side by side? Where nothing is cut, that is exact."""
        return not self.is_particular and rank >= self.of.most

    def alpha(self, rank: int) -> float:
        """The alpha that makes alpha / rank the scale, as a float32 holds it."""
        value: float = struct.unpack("<f", struct.pack("<f", self.scale * rank))[0]
        return value

    def rank_nbytes(self, dtype: str) -> int:
        """Of one rank, both factors together."""
        return self.written(dtype, (self.of.out + self.of.n,)).nbytes

    def written(self, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
        """What --dtype makes of a factor: eight bits would leave little of it."""
        own = "F16" if self.dtype.startswith("F8") else self.dtype
        return becomes(TensorSpec(own, shape), dtype)


@dataclass(slots=True)
class Built:
    """Tasks and outputs of modules; `groups`: of each of the first tasks, the numbers of its modules."""

    outputs: dict[str, TensorSpec] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)
    groups: list[list[int]] = field(default_factory=list)
    settings: list[tuple[str, Setting]] = field(default_factory=list)

    def values(self, found: Mapping[int, Sequence[Any]]) -> dict[int, Found]:
        """Module number -> what a run found, from the values of its tasks."""
        return {
            number: value
            for task, group in enumerate(self.groups)
            for number, value in zip(group, found[task][0], strict=True)
        }


def build(
    modules: Sequence[Module], ranks: Sequence[int], sources: Sequence[Checkpoint], *, dtype: str, seed: int,
    together: bool, bare: bool = False,
) -> Built:  # fmt: skip
    """The tasks that write each module at its rank; 0: not at all. together: for a device that does many at once.

    bare: without the tasks, for the size of what they would write.
    """
    built = Built()
    for group in _groups(modules, ranks, sources, dtype) if together else [[n] for n, rank in enumerate(ranks) if rank]:
        first, rank = modules[group[0]], ranks[group[0]]
        slots: list[Slot] = []
        for n in group:
            slots += _slots(modules[n], rank, sources, built.outputs, dtype)
        built.groups.append(group)
        if bare:
            continue
        inputs = [entry for n in group for entry in modules[n].of.inputs(sources)]
        compute, work = _compute([modules[n] for n in group], rank, seed)
        name = first.of.name
        built.tasks.append(Task(name, tuple(inputs), tuple(slots), compute, Grain.TENSOR, work_nbytes=work))
    alphas = []
    for n in (n for group in built.groups for n in group):
        module, rank = modules[n], ranks[n]
        if module.is_whole(rank):
            continue
        given = module.stored.get("alpha") if module.is_stored(rank) else None
        if given is not None:
            spec = sources[module.of.terms[0].source].tensors[given].spec
            built.outputs[module.keys["alpha"]] = spec
            alphas.append(_copy(sources, module.of.terms[0].source, given, module.keys["alpha"]))
        elif "alpha" in module.keys and not (module.is_stored(rank) and module.scale == 1):
            key = module.keys["alpha"]
            task, built.outputs[key] = constant(key, module.alpha(rank), module.written(dtype, ()).dtype)
            alphas.append(task)
        shapes = {"down": (rank, *module.of.shape[1:]), "up": (module.of.out, rank)} | dict(module.kept)
        alpha = None if module.alpha(rank) == rank else module.alpha(rank)
        built.settings.append((module.component, Setting(module.body, rank, alpha, shapes)))
    built.tasks += [] if bare else alphas
    return built


def _copy(sources: Sequence[Checkpoint], source: int, key: str, to: str) -> Task:
    from weightops.plan import Input

    spec = sources[source].tensors[key].spec
    return Task(to, (Input(source, Slot(key, spec)),), (Slot(to, spec),))


def _groups(
    modules: Sequence[Module], ranks: Sequence[int], sources: Sequence[Checkpoint], dtype: str
) -> list[list[int]]:
    """Modules that are alike: as many at once as their shape allows, whatever the memory."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for n, (module, rank) in enumerate(zip(modules, ranks, strict=True)):
        of = module.of
        if not rank:
            continue
        if module.is_stored(rank) or module.is_whole(rank) or module.joins(rank) or module.is_particular:
            kinds[n,] = [n]
            continue
        stored = tuple(t.product_rank for t in of.terms) if of.is_product else ()
        read = sum(entry.slot.spec.nbytes for entry in of.inputs(sources))
        nbytes = read + module.rank_nbytes(dtype) * rank + cut_nbytes(of, rank)
        kind = (of.out, of.n, module.dtype, rank, stored, of.is_kronecker, nbytes)
        kinds.setdefault(kind, []).append(n)
    found = []
    for kind, numbers in kinds.items():
        of = modules[numbers[0]].of
        count = at_once(of.out * of.n, kind[-1]) if len(numbers) > 1 else 1
        found += [numbers[i : i + count] for i in range(0, len(numbers), count)]
    return found


def _slots(
    module: Module, rank: int, sources: Sequence[Checkpoint], outputs: dict[str, TensorSpec], dtype: str
) -> list[Slot]:
    parts: dict[str, TensorSpec] = {}
    if module.is_stored(rank):
        tensors = sources[module.of.terms[0].source].tensors
        for part in module.of.terms[0].parts:
            spec = tensors[module.stored[part]].spec
            parts[part] = becomes(spec, dtype)
    elif module.is_whole(rank):
        parts["diff"] = module.written(dtype, module.of.shape)
    else:
        ones = (1,) * (len(module.of.shape) - 2)
        parts["down"] = module.written(dtype, (rank, *module.of.shape[1:]))
        parts["up"] = module.written(dtype, (module.of.out, rank, *ones))
    for part, spec in parts.items():
        outputs[module.keys[part]] = spec
    return [Slot(module.keys[part], spec) for part, spec in parts.items()]


def _compute(group: Sequence[Module], rank: int, seed: int) -> tuple[Any, int]:
    """The compute function of modules that are alike, and its work_nbytes."""
    first = group[0]
    if first.is_stored(rank):
        return as_it_is(first.of, scale=first.scale), as_it_is_nbytes(first.of)
    if first.is_whole(rank):
        return whole(first.of), whole_nbytes(first.of)
    if first.peer is not None:
        return as_peer(first.of, concat=first.peer == "concat"), as_peer_nbytes(first.of)
    if first.joins(rank):
        return joined(first.of, scale=first.scale), joined_nbytes(first.of)
    compute = cut([m.of for m in group], rank, scales=[m.scale for m in group], seed=seed)
    return compute, sum(cut_nbytes(m.of, rank) for m in group)


def scans(modules: Sequence[Module], sources: Sequence[Checkpoint], dtype: str) -> list[Task]:
    """A task for each module, whose value is its `Spectrum`."""
    return [
        Task(
            m.of.name, tuple(m.of.inputs(sources)), (), spectra(m.of, m.rank_nbytes(dtype), scale=m.scale),
            Grain.TENSOR, work_nbytes=spectra_nbytes(m.of),
        ) for m in modules
    ]  # fmt: skip


def rows_of(
    modules: Sequence[Module], ranks: Sequence[int], found: Mapping[int, Found], given: Sequence[Spectrum]
) -> list[dict[str, Any]]:
    """The report's row of each module. given: the spectra, where there was a scan; what has rank 0 needs its own."""
    rows = []
    for n, module in enumerate(modules):
        value = found.get(n)
        if value is None:
            norm = given[n].energy ** 0.5
            value = Found(norm, 0.0 if norm else 1.0, norm, "none")
        rank = module.rank_before if module.is_whole(ranks[n]) and ranks[n] else ranks[n]
        rows.append({
            "name": module.of.name, "rank_before": module.rank_before, "rank": rank, "energy": value.kept,
            "error": value.lost / value.norm if value.norm else 0.0, "delta_norm": value.norm, "method": value.method,
        })  # fmt: skip
    return rows
