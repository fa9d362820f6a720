"""The groups of channels that two checkpoints have in common, and the tasks that compare them; for re-basin.

A task's sums depend on the tensors alone: neither on the memory nor on what else is in flight.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops.engine.chunks import chunk_cost, task_rows
from weightops.errors import ValueRefused, listing, quote
from weightops.files.dtypes import ARITHMETIC
from weightops.merging.rebasin import Products, alike, alike_nbytes, match, match_nbytes, products_nbytes, strip_nbytes
from weightops.naming.identify import Identity, identify, quantised
from weightops.naming.permutations import resolve
from weightops.ops.align import places_of
from weightops.plan import Block, Compute, Grain, Input, Task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from weightops.files.checkpoint import Checkpoint
    from weightops.merging.rebasin import Order
    from weightops.naming.permutations import Channels
    from weightops.naming.slots import Place
    from weightops.ops.align import Name

# ⟨A, B⟩, ⟨A, B in another order⟩, ‖A‖², ‖B‖².
Sums = tuple[float, float, float, float]

# Bytes of both models that one task reads at most, where a group has more; a tensor is read whole.
_WHOLE = 192 << 20
_PART = 64 << 20


@dataclass(frozen=True, slots=True)
class Term:
    """A tensor in which a lane of a group (by its number) lies, along `axis`, `copies` times.

    reference, model: where both have it. other: the group, its lane and copies along the other of its first two axes.
    """

    name: Name
    group: int
    lane: int
    axis: int
    copies: int
    reference: Place
    model: Place
    other: tuple[int, int, int] | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.reference.spec.shape

    @property
    def nbytes(self) -> int:
        return self.reference.spec.nbytes + self.model.spec.nbytes

    @property
    def inputs(self) -> tuple[Input, Input]:
        return Input(0, self.reference.slot), Input(1, self.model.slot)

    def tensors(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        places = (self.reference, self.model)
        return [x.T if place.transposed else x for x, place in zip(inputs, places, strict=True)]


@dataclass(slots=True)
class Group:
    """A group of both models. orders: of its lanes, as found so far. neighbours: groups that share a tensor with it.

    settled: it was solved with all of its tensors, and no neighbour has moved since.
    """

    component: str
    channels: Channels
    terms: list[Term]
    orders: tuple[Order, ...]
    neighbours: set[int] = field(default_factory=set)
    settled: bool = False

    def moved(self) -> int:
        return sum(int((order != identity(len(order))).sum()) for order in self.orders)

    def cosine(self, likeness: Mapping[Name, Sums], *, after: bool) -> float:
        found = [likeness[name] for name in {t.name for t in self.terms}]
        norm = math.sqrt(math.fsum(f[2] for f in found) * math.fsum(f[3] for f in found))
        return math.fsum(f[after] for f in found) / norm if norm else 1.0


def identity(size: int) -> Order:
    import numpy as np

    return np.arange(size)


def groups_of(model: Checkpoint, reference: Checkpoint) -> tuple[list[Group], dict[Name, str]]:
    """The groups that both have, alike; and what is left as it is, with reasons."""
    ours, theirs = identify(model.tensors), identify(reference.tensors)
    places, others = places_of(model, ours), places_of(reference, theirs)
    found: list[tuple[str, Channels]] = []
    left: dict[Name, str] = {}
    for component, part in theirs.parts.items():
        if part.match is None or not part.match.network.permutations or component not in ours.parts:
            continue
        reason = _why_not(component, ours, theirs)
        if reason is not None:
            left[component, ""] = reason
            continue
        shapes = {name: where.spec.shape for (c, name), where in others.items() if c == component}
        resolved, unfit = resolve(part.match.network.permutations, shapes)
        left |= {(component, name): why for name, why in unfit.items()}
        for channels in resolved:
            reason = _misfit(component, channels, places, others)
            if reason is None:
                found.append((component, channels))
            else:
                left[component, channels.name] = reason
    return _joined(found, places, others), left


def _why_not(component: str, ours: Identity, theirs: Identity) -> str | None:
    """Why the channels of a component are not to be moved."""
    mine, other = ours.parts[component], theirs.parts[component]
    if mine.match is None or other.match is None or mine.match.network is not other.match.network:
        return "is not the same network in both"
    scale = quantised((*mine.bodies, *other.bodies))
    if scale is not None:
        return f"{quote(scale)} scales weights that mean nothing without it"
    if mine.match.strangers:
        return f"holds what is no part of its network, and may know its channels: {listing(mine.match.strangers)}"
    return None


def _misfit(
    component: str, channels: Channels, places: Mapping[Name, Place], others: Mapping[Name, Place]
) -> str | None:
    """Why a group of the reference is none of the model."""
    for axis in itertools.chain.from_iterable(channels.lanes):
        name = component, axis.name
        if name not in places:
            return f"there is no {axis.name}"
        ours, theirs = places[name].spec, others[name].spec
        if ours.shape != theirs.shape:
            return f"{axis.name} is {ours}, and {theirs} in the reference"
        codes = next((spec.dtype for spec in (ours, theirs) if spec.dtype not in ARITHMETIC), None)
        if codes is not None:
            return f"{axis.name} is of {codes}, which are no numbers to compare"
    return None


def _joined(
    found: Sequence[tuple[str, Channels]], places: Mapping[Name, Place], others: Mapping[Name, Place]
) -> list[Group]:
    """The groups, each tensor of which knows what lies along its other axis."""
    lying: dict[tuple[Name, int], tuple[int, int, int]] = {}
    for number, (component, channels) in enumerate(found):
        for lane, axes in enumerate(channels.lanes):
            for axis in axes:
                lying[(component, axis.name), axis.axis] = number, lane, axis.copies
    groups = []
    for number, (component, channels) in enumerate(found):
        terms = []
        for lane, axes in enumerate(channels.lanes):
            for axis in axes:
                name = component, axis.name
                other = lying.get((name, 1 - axis.axis))
                terms.append(Term(name, number, lane, axis.axis, axis.copies, others[name], places[name], other))
        near = {t.other[0] for t in terms if t.other is not None}
        groups.append(Group(component, channels, terms, tuple(map(identity, channels.sizes)), near))
    return groups


# ------------------------------------------------------------------------------------------------ memory


def needed_nbytes(groups: Sequence[Group]) -> tuple[int, str]:
    """The bytes in flight without which not all can be solved and measured, and the name of what takes the most."""
    measured = [likeness(part, []) for part in packed(tensors_of(groups))]
    return max(*((cost(t), t.name) for t in measured), *((_solved_nbytes(g), g.channels.name) for g in groups))


def _solved_nbytes(group: Group) -> int:
    parts = parts_of(group.terms)
    if len(parts) == 1:
        return cost(solving(group, parts[0], []))
    summed = max(cost(summing(group, part, [])) for part in parts)
    held = sums_nbytes(group)
    return max(summed + 2 * held, held + _match_nbytes(group))


def cost(task: Task) -> int:
    return chunk_cost(task, task_rows(task))


def sums_nbytes(group: Group) -> int:
    return sum(map(products_nbytes, group.channels.sizes))


def _match_nbytes(group: Group) -> int:
    return match_nbytes(group.channels.sizes, group.channels.blocks)


def tensors_of(groups: Sequence[Group]) -> list[Term]:
    """Each tensor of these groups once."""
    return list({term.name: term for group in groups for term in group.terms}.values())


def parts_of(terms: Sequence[Term]) -> list[list[Term]]:
    """All at once where that is not too much; else packed into parts."""
    return [list(terms)] if sum(t.nbytes for t in terms) <= _WHOLE else packed(terms)


def packed(terms: Sequence[Term]) -> list[list[Term]]:
    """In parts that are read at once, and depend on nothing but the tensors."""
    parts: list[list[Term]] = []
    size = _PART
    for term in terms:
        if size + term.nbytes > _PART:
            parts.append([])
            size = 0
        parts[-1].append(term)
        size += term.nbytes
    return parts


# ------------------------------------------------------------------------------------------------ tasks


def likeness(terms: Sequence[Term], orders: Sequence[tuple[Order | None, Order | None]]) -> Task:
    """How alike each of these tensors is in both models, as it is and with the model's in these orders."""

    def compute(inputs: Sequence[Tensor], _outputs: Sequence[Tensor], _block: Block) -> list[Sums]:
        pairs = (term.tensors(inputs[2 * n : 2 * n + 2]) for n, term in enumerate(terms))
        return [alike(a, b, order) for (a, b), order in zip(pairs, orders, strict=True)]

    inputs = tuple(entry for term in terms for entry in term.inputs)
    work = max(alike_nbytes(term.shape) for term in terms)
    return Task(terms[0].name[1], inputs, (), compute, Grain.TENSOR, work)


def summing(group: Group, terms: Sequence[Term], others: Sequence[Order | None]) -> Task:
    """The products of a part of a group, to be added up."""
    compute = _summed(group, terms, others)

    def on_the_host(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block) -> list[Products]:
        return [lane.to("cpu") for lane in compute(inputs, outputs, block)]

    return _task(group, terms, on_the_host, 0)


def solving(group: Group, terms: Sequence[Term], others: Sequence[Order | None]) -> Task:
    """The best orders of a group's lanes, all in one."""
    compute = _summed(group, terms, others)

    def solve(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block) -> tuple[Order, ...]:
        return match(compute(inputs, outputs, block), group.orders, group.channels.blocks)

    return _task(group, terms, solve, _match_nbytes(group))


def _task(group: Group, terms: Sequence[Term], compute: Compute, more: int) -> Task:
    strips = [
        strip_nbytes(group.channels.sizes[t.lane], math.prod(t.shape[2:]), t.shape[1 - t.axis] if t.shape[1:] else 1)
        for t in terms
    ]
    inputs = tuple(entry for term in terms for entry in term.inputs)
    work = sums_nbytes(group) + max(strips) + more
    return Task(group.channels.name, inputs, (), compute, Grain.TENSOR, work)


def _summed(group: Group, terms: Sequence[Term], others: Sequence[Order | None]) -> Any:
    def compute(inputs: Sequence[Tensor], _outputs: Sequence[Tensor], _block: Block) -> list[Products]:
        lanes = [Products.zeros(size, inputs[0].device) for size in group.channels.sizes]
        for number, (term, other) in enumerate(zip(terms, others, strict=True)):
            a, b = term.tensors(inputs[2 * number : 2 * number + 2])
            lanes[term.lane].add(a, b, term.axis, term.copies, other)
        if not all(math.isfinite(float(lane.inner.sum())) for lane in lanes):
            raise ValueRefused(group.channels.name, "its weights are too large: sums of their products overflow")
        return lanes

    return compute
