"""Which channels of a network may trade places without a change of what it computes: tables, read against shapes.

Pure names and shapes. A group's order must be taken everywhere at once: where its channels are made, where they are
normalised, and where they are read. Source: Ainsworth et al. 2022, Git Re-Basin, arXiv:2209.04836, §2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Axis:
    """Where channels lie: axis `axis` of the canonical tensor `name`, `copies` times, one copy after the other."""

    name: str
    axis: int = 0
    copies: int = 1


@dataclass(frozen=True, slots=True)
class Group:
    """Channels that may trade places.

    name: a template, as of a rule; each of its instances is a group of its own. Names of tensors have at least its
    placeholders, filled alike; those that come after stand for any number. lanes: each has an order of its own, which
    all of its axes take. The channels of every lane lie in equal blocks, as many as `blocks`, or of `width` channels:
    a block may trade places with a block, in all lanes alike, and within a block any channel with any other.
    """

    name: str
    lanes: tuple[tuple[Axis, ...], ...]
    blocks: int = 1
    width: int | None = None


@dataclass(frozen=True, slots=True)
class Channels:
    """One group of a model: lanes of whole names, how many channels each lane has, and in how many blocks."""

    name: str
    lanes: tuple[tuple[Axis, ...], ...]
    sizes: tuple[int, ...]
    blocks: int


def outputs(*modules: str, copies: int = 1) -> tuple[Axis, ...]:
    """What these modules put out, or a norm scales: axis 0 of their weights and biases."""
    return tuple(Axis(f"{module}.{leaf}", 0, copies) for module in modules for leaf in ("weight", "bias"))


def rows(*modules: str) -> tuple[Axis, ...]:
    """The same, of modules without a bias."""
    return tuple(Axis(f"{module}.weight") for module in modules)


def inputs(*modules: str) -> tuple[Axis, ...]:
    """What these modules take in: axis 1 of their weights."""
    return tuple(Axis(f"{module}.weight", 1) for module in modules)


def within(place: str, groups: Iterable[Group]) -> tuple[Group, ...]:
    """The groups of a block, below this prefix."""
    return tuple(
        replace(
            group, name=f"{place}.{group.name}" if group.name else place,
            lanes=tuple(tuple(replace(a, name=f"{place}.{a.name}") for a in lane) for lane in group.lanes),
        )
        for group in groups
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ against shapes


def resolve(
    groups: Iterable[Group], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[Channels, ...], dict[str, str]]:
    """The groups that a model of these canonical shapes has; and those that do not work out, with reasons."""
    tensors = _Names(shapes)
    found: list[Channels] = []
    left: dict[str, str] = {}
    for group in groups:
        count = group.name.count("{}")
        axes = [axis for lane in group.lanes for axis in lane]
        instances = {numbers[:count] for axis in axes for numbers, _ in tensors.match(axis.name)}
        for numbers in sorted(instances, key=lambda instance: [int(n) for n in instance]):
            name = group.name.format(*numbers)
            try:
                found.append(_instance(group, name, numbers, tensors, shapes))
            except _Unfit as e:
                left[name] = str(e)
    return tuple(found), left


class _Unfit(Exception):
    """Why a model has no such group."""


def _instance(
    group: Group, name: str, numbers: tuple[str, ...], tensors: _Names, shapes: Mapping[str, tuple[int, ...]]
) -> Channels:
    """The group where its placeholders are these numbers. Raises _Unfit."""
    lanes: list[tuple[Axis, ...]] = []
    sizes: list[int] = []
    held: dict[str, tuple[str, set[tuple[str, ...]]]] = {}  # of repeated blocks, by their place: one axis, and which
    for lane in group.lanes:
        axes: list[Axis] = []
        for axis in lane:
            matches = [(n, found) for n, found in tensors.match(axis.name) if n[: len(numbers)] == numbers]
            if not matches:
                raise _Unfit(f"there is no {_shown(axis.name, numbers)}")
            which = {n for n, _ in matches}
            one, others = held.setdefault(axis.name.rpartition("{}")[0], (axis.name, which))
            if which != others:
                raise _Unfit(f"not every block has {_shown(one, numbers)} and {_shown(axis.name, numbers)}")
            axes += [replace(axis, name=found) for _, found in matches]
        lanes.append(tuple(axes))
        sizes.append(_size(axes, shapes))
    blocks = group.blocks if group.width is None else sizes[0] // group.width
    for size in sizes:
        if not blocks or size % blocks or (group.width is not None and size != blocks * group.width):
            expected = f"{blocks} blocks" if group.width is None else f"blocks of {group.width}"
            raise _Unfit(f"{size} channels do not lie in {expected}")
    return Channels(name, tuple(lanes), tuple(sizes), blocks)


def _size(axes: Sequence[Axis], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many channels a lane has, on which all of its axes agree. Raises _Unfit."""
    counted: dict[int, str] = {}
    for axis in axes:
        shape = shapes[axis.name]
        if len(shape) <= axis.axis or not all(shape) or shape[axis.axis] % axis.copies:
            raise _Unfit(f"{axis.name} {list(shape)} has no such channels")
        counted.setdefault(shape[axis.axis] // axis.copies, axis.name)
    if len(counted) > 1:
        (one, first), (other, second) = list(counted.items())[:2]
        raise _Unfit(f"{first} has {one} channels, and {second} {other}")
    return next(iter(counted))


def _shown(template: str, numbers: tuple[str, ...]) -> str:
    return template.format(*numbers, *"*" * (template.count("{}") - len(numbers)))


_NUMBER = re.compile(r"(?<![^.])([0-9]+|\{\})(?![^.])")


class _Names:
    """Names by what stands between their numbers, to be found by a template."""

    def __init__(self, names: Iterable[str]) -> None:
        self._forms: dict[tuple[str, ...], list[tuple[tuple[str, ...], str]]] = {}
        for name in names:
            parts = _NUMBER.split(name)
            self._forms.setdefault(tuple(parts[::2]), []).append((tuple(parts[1::2]), name))

    def match(self, template: str) -> list[tuple[tuple[str, ...], str]]:
        """The names that fit, each with the numbers that fill the placeholders."""
        parts = _NUMBER.split(template)
        wanted = parts[1::2]
        return [
            (tuple(n for n, w in zip(numbers, wanted, strict=True) if w == "{}"), name)
            for numbers, name in self._forms.get(tuple(parts[::2]), [])
            if all(w in ("{}", n) for n, w in zip(numbers, wanted, strict=True))
        ]
