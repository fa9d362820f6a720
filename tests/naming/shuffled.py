"""Models whose channels were brought into another order, which changes nothing of what they compute."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from weightops.naming.keymap import NETWORKS
from weightops.naming.permutations import resolve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from weightops.naming.permutations import Channels


def groups_of(network: str, tensors: Mapping[str, Tensor]) -> tuple[Channels, ...]:
    """All groups of the network's table, by canonical names."""
    groups, left = resolve(NETWORKS.get(network).permutations, {key: tuple(t.shape) for key, t in tensors.items()})
    assert groups
    assert not left
    return groups


def drawn(group: Channels, chance: random.Random) -> list[list[int]]:
    """A member of the group by chance: the order of each lane."""
    blocks = chance.sample(range(group.blocks), group.blocks)
    found = []
    for size in group.sizes:
        width = size // group.blocks
        found.append([b * width + c for b in blocks for c in chance.sample(range(width), width)])
    return found


def take(tensors: dict[str, Tensor], group: Channels, orders: Sequence[Sequence[int]]) -> None:
    """Bring one group's channels into these orders, wherever they lie."""
    for lane, order in zip(group.lanes, orders, strict=True):
        for axis in lane:
            taken = [copy * len(order) + n for copy in range(axis.copies) for n in order]
            tensors[axis.name] = tensors[axis.name].index_select(axis.axis, torch.tensor(taken))


def shuffled(network: str, tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The model with every group in an order by chance."""
    chance = random.Random(seed)
    found = dict(tensors)
    for group in groups_of(network, tensors):
        take(found, group, drawn(group, chance))
    return found
