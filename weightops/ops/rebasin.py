"""Re-basin: the order of a model's channels in which it lies as another model does, found before the two are merged.

Reads the architecture's table of groups (`Network.permutations`) against both files, and solves group after group until
nothing moves. Where groups have no tensor in common they are solved at once; no more is read at a time than `memory`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.engine.chunks import DEFAULT_MEMORY, LARGEST_DEFAULT
from weightops.engine.run import Progress, ignore, run
from weightops.errors import MemoryRefused, MismatchError, UsageError, ValueRefused, listing, quote
from weightops.merging.rebasin import check_scipy, expanded, match
from weightops.ops.produce import Bar
from weightops.ops.rebasin_groups import (
    Group,
    Sums,
    Term,
    cost,
    groups_of,
    identity,
    likeness,
    needed_nbytes,
    packed,
    parts_of,
    solving,
    summing,
    sums_nbytes,
    tensors_of,
)
from weightops.plan import Plan, Task

if TYPE_CHECKING:
    from weightops.files.checkpoint import Checkpoint
    from weightops.merging.rebasin import Order, Products
    from weightops.ops.align import Name

# Of each tensor that is to be taken in another order: axes, and the order along each.
Permuted = Mapping["Name", tuple[tuple[int, "Order"], ...]]

# As alike as this, channels lie where they should, more or less, before anything is done.
_TRUSTED = 0.5


@dataclass(frozen=True, slots=True)
class Found:
    """In which order to take a model's channels. By component and group: how many channels there are, how many of them
    move, and how alike both models are there, as a cosine, before and after.

    permutations: component and canonical name -> (axis, order): element i of the axis is the model's element order[i].
    left: groups that were left as they are, or whole components (of no group), with reasons.
    """

    permutations: Permuted
    channels: Mapping[Name, int]
    moved: Mapping[Name, int]
    before: Mapping[Name, float]
    after: Mapping[Name, float]
    left: Mapping[Name, str]
    sweeps: int
    bytes_read: int


def find_permutations(
    model: Checkpoint,
    reference: Checkpoint,
    *,
    iterations: int,
    seed: int,
    memory: int | None,
    threads: int | None,
    device: str,
    on_progress: Progress,
) -> Found:
    """The orders in which the channels of `model` lie as those of `reference` do, as nearly as weight matching finds.

    iterations: sweeps over all groups, at most; none is begun where no group could gain. seed: of the order in which
    groups are solved. memory: bytes in flight (None: 128 MiB, and up to 512 MiB for large groups). Groups that have
    tensors in common are, taken together, never less alike than before. Raises WeightopsError.
    """
    check_scipy()
    if iterations < 1:
        raise UsageError("--rebasin", f"found {iterations} iterations, expected one or more")
    groups, left = groups_of(model, reference)
    if not groups:
        reasons = sorted({f"{' '.join(filter(None, name))}: {reason}" for name, reason in left.items()})
        raise MismatchError(
            model.label, f"has no channels that could be brought into the order of {reference.label}",
            listing(reasons) if reasons else "the networks of Stable Diffusion 1 and XL have such channels",
        )  # fmt: skip
    work = _Descent(model, reference, groups, seed, _enough(groups, memory), threads, device)
    bar = Bar(on_progress)
    bar.total = 4 * sum(term.nbytes for term in work.tensors)
    before = work.measure(work.tensors, bar.part(0.0, 0.15))
    work.trust(before)
    sweeps = work.descend(iterations, bar)
    after = work.keep_gains(before, bar.part(0.95, 1.0))
    bar.part(1.0, 1.0)(1, 1)
    names = [(g.component, g.channels.name) for g in groups]
    return Found(
        work.permutations(),
        dict(zip(names, (sum(g.channels.sizes) for g in groups), strict=True)),
        dict(zip(names, (g.moved() for g in groups), strict=True)),
        dict(zip(names, (g.cosine(before, after=False) for g in groups), strict=True)),
        dict(zip(names, (g.cosine(after, after=True) for g in groups), strict=True)),
        left, sweeps, work.bytes_read,
    )  # fmt: skip


def _enough(groups: Sequence[Group], asked: int | None) -> int:
    """The memory to work in. Raises MemoryRefused where the largest group takes more than was asked for."""
    needed, name = needed_nbytes(groups)
    if asked is not None and asked < needed:
        raise MemoryRefused(
            "--memory",
            f"{asked:,} bytes are too few: to compare {quote(name)} alone takes {needed:,}",
            f"--memory {-(-needed // (1 << 20))}MiB would do",
        )
    return asked or max(DEFAULT_MEMORY, needed, min(LARGEST_DEFAULT, 2 * needed))


# ------------------------------------------------------------------------------------------------ the descent


class _Descent:
    """Coordinate descent: the state of all groups, and the work on them."""

    def __init__(
        self, model: Checkpoint, reference: Checkpoint, groups: Sequence[Group], seed: int, memory: int,
        threads: int | None, device: str,
    ) -> None:  # fmt: skip
        self.sources = (reference, model)
        self.groups = groups
        self.random = random.Random(seed)
        self.memory = memory
        self.running: dict[str, Any] = {"threads": threads, "device": device}
        self.trusted: set[int] = set()
        self.bytes_read = 0
        self.tensors = tensors_of(groups)

    def run(self, tasks: Sequence[Task], on_progress: Progress, *, held: int = 0) -> list[Any]:
        """What each task finds. held: bytes that are in use besides."""
        if not tasks:
            return []
        plan = Plan(self.sources, {}, tuple(tasks))
        outcome = run(plan, None, memory=self.memory - held, on_progress=on_progress, **self.running)
        self.bytes_read += outcome.bytes_read
        return [outcome.values[n][0] for n in range(len(tasks))]

    def measure(self, terms: Sequence[Term], on_progress: Progress) -> dict[Name, Sums]:
        """How alike these tensors are, as they are and with the orders found so far."""
        parts = packed(terms)
        tasks = [likeness(part, [self.orders_of(term) for term in part]) for part in parts]
        sums_of = itertools.chain.from_iterable(self.run(tasks, on_progress))
        found = dict(zip((term.name for part in parts for term in part), sums_of, strict=True))
        for (_, name), sums in found.items():
            if not math.isfinite(math.fsum(sums)):
                label = self.sources[math.isfinite(sums[2])].label
                raise ValueRefused(label, f"tensor {quote(name)} holds NaN or Inf, and is like no other")
        return found

    def trust(self, before: Mapping[Name, Sums]) -> None:
        """Which groups lie right from the start, more or less, and tell the others how to lie."""
        self.trusted = {n for n, g in enumerate(self.groups) if g.cosine(before, after=False) >= _TRUSTED}

    def order(self, group: int, lane: int, copies: int) -> Order | None:
        """The order of an axis, as found so far; None where it stays as it is."""
        found = self.groups[group].orders[lane]
        return None if (found == identity(len(found))).all() else expanded(found, copies)

    def other_of(self, term: Term) -> Order | None:
        return None if term.other is None else self.order(*term.other)

    def orders_of(self, term: Term) -> tuple[Order | None, Order | None]:
        """The orders of a tensor's first two axes."""
        mine, other = self.order(term.group, term.lane, term.copies), self.other_of(term)
        return (other, mine) if term.axis else (mine, other)

    # ------------------------------------------------------------------ sweeps

    def descend(self, iterations: int, bar: Bar) -> int:
        """Solve all groups, again and again, until each is settled. How many sweeps that took."""
        start = 0.15
        for sweep in range(1, iterations + 1):
            stop = start + (0.95 - start) * (0.7 if sweep == 1 else 0.5)
            order = list(range(len(self.groups)))
            self.random.shuffle(order)
            known = {number: set(order) for number in order}
            if sweep == 1:
                order, known = self._outwards(order)
            self._sweep(order, known, bar, start, stop)
            if all(group.settled for group in self.groups):
                return sweep
            start = stop
        return iterations

    def _outwards(self, order: list[int]) -> tuple[list[int], dict[int, set[int]]]:
        """The first sweep goes from what is known to what is not: an order, and what is known to each group in turn.

        A tensor says nothing of one axis where the channels along its other axis lie anyhow. What no group has, as the
        latents and the words, lies alike in all models, and what is trusted lies as it should.
        """
        held = [[(t.nbytes, None if t.other is None else t.other[0]) for t in group.terms] for group in self.groups]
        known: set[int | None] = {None, *self.trusted}
        found: dict[int, set[int]] = {}
        rest = list(order)

        def share(number: int) -> float:
            told = sum(nbytes for nbytes, other in held[number] if other in known)
            return told / sum(nbytes for nbytes, _ in held[number])

        while rest:
            number = max(rest, key=share)  # the first, in this order, of equals
            rest.remove(number)
            found[number] = {n for n in known if n is not None}
            known.add(number)
        return list(found), found

    def _sweep(self, order: Sequence[int], known: Mapping[int, set[int]], bar: Bar, start: float, stop: float) -> None:
        """Solve the groups that are not settled, in this order; those that have no tensor in common, at once."""
        levels: dict[int, int] = {}
        for number in order:
            before = [levels[near] for near in self.groups[number].neighbours if near in levels]
            levels[number] = 1 + max(before, default=0)
        total = sum(t.nbytes for group in self.groups for t in group.terms)
        for level in range(1, max(levels.values()) + 1):
            numbers = [n for n in order if levels[n] == level]
            nbytes = sum(t.nbytes for n in numbers for t in self.groups[n].terms)
            end = start + (stop - start) * nbytes / max(total, 1)
            self._solve([n for n in numbers if not self.groups[n].settled], known, bar.part(start, end))
            start, total = end, total - nbytes

    def _solve(self, numbers: Sequence[int], known: Mapping[int, set[int]], on_progress: Progress) -> None:
        told: dict[int, list[Term]] = {}
        for number in numbers:
            terms = self.groups[number].terms
            told[number] = [t for t in terms if t.other is None or t.other[0] in known[number]] or terms
        parts = {number: parts_of(terms) for number, terms in told.items()}
        whole = [n for n in numbers if len(parts[n]) == 1]
        tasks = [solving(self.groups[n], told[n], [self.other_of(t) for t in told[n]]) for n in whole]
        found = dict(zip(whole, self.run(tasks, on_progress), strict=True))
        for number in numbers:
            if number not in found:
                found[number] = self._solve_in_parts(self.groups[number], parts[number])
        for number, orders in found.items():
            group = self.groups[number]
            moved = any((a != b).any() for a, b in zip(orders, group.orders, strict=True))
            group.orders = orders
            group.settled = len(told[number]) == len(group.terms)
            for near in group.neighbours if moved else ():
                self.groups[near].settled = False

    def _solve_in_parts(self, group: Group, parts: Sequence[Sequence[Term]]) -> tuple[Order, ...]:
        """The best orders of a group whose tensors are more than are read at once."""
        size = sums_nbytes(group)
        tasks = [summing(group, part, [self.other_of(t) for t in part]) for part in parts]
        count = max(1, min(len(tasks), (self.memory - max(map(cost, tasks))) // size - 1))
        total: list[Products] = []
        for start in range(0, len(tasks), count):
            batch = tasks[start : start + count]
            for lanes in self.run(batch, ignore, held=(len(batch) + bool(total)) * size):
                total = [sum_.plus(lane) for sum_, lane in zip(total, lanes, strict=True)] if total else lanes
        return match(total, group.orders, group.channels.blocks)

    # ------------------------------------------------------------------ the end

    def keep_gains(self, before: Mapping[Name, Sums], on_progress: Progress) -> dict[Name, Sums]:
        """How alike both are in the end; groups that hang together, and are no more alike than before, go back."""
        changed = [t for t in self.tensors if any(order is not None for order in self.orders_of(t))]
        after = {**before, **self.measure(changed, on_progress)}
        for together in self._hanging_together():
            names = {t.name for n in together for t in self.groups[n].terms}
            if math.fsum(after[name][1] - before[name][0] for name in names) > 0:
                continue
            for number in together:
                self.groups[number].orders = tuple(map(identity, self.groups[number].channels.sizes))
            after |= {name: before[name] for name in names}
        return after

    def _hanging_together(self) -> list[set[int]]:
        found: list[set[int]] = []
        rest = set(range(len(self.groups)))
        while rest:
            reached: set[int] = set()
            coming = {rest.pop()}
            while coming:
                reached |= coming
                coming = {near for n in coming for near in self.groups[n].neighbours} - reached
            rest -= reached
            found.append(reached)
        return found

    def permutations(self) -> dict[Name, tuple[tuple[int, Order], ...]]:
        found = {}
        for term in self.tensors:
            orders = tuple((n, order) for n, order in enumerate(self.orders_of(term)) if order is not None)
            if orders:
                found[term.name] = orders
        return found
