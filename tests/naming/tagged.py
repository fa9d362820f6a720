"""Tagged tensors: of the real shapes, each row with values of its own, in hardly any memory; and our tables applied."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from weightops.naming.keymap import NETWORKS, Rule, heights, swaps

KEYS = Path(__file__).parents[3] / "shared" / "data" / "keys"
needs_lists = pytest.mark.skipif(not KEYS.is_dir(), reason="the lists of real models (../shared/data) are not here")


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a list."""
    with gzip.open(KEYS / f"{name}.json.gz") as f:
        return {key: tuple(entry["shape"]) for key, entry in json.load(f).items()}


def tagged(shapes: dict[str, tuple[int, ...]], start: int = 1) -> dict[str, Tensor]:
    """A tensor of each shape, each row with values of its own; in small matrices, each column as well."""
    found, tag = {}, start
    for key, shape in shapes.items():
        count = shape[0] if shape else 1
        if len(shape) == 2 and count * shape[1] <= 1 << 21:
            # Row i is a run of numbers from tag + 2i on: no other row or column is the same, nor is the transpose.
            run = torch.arange(tag, tag + 2 * count + shape[1], dtype=torch.float64)
            found[key] = run.as_strided(shape, (2, 1))
        else:
            rows = torch.arange(tag, tag + count, dtype=torch.float64)
            found[key] = rows.reshape(-1, *[1] * (len(shape) - 1)).expand(shape) if shape else rows.reshape(())
        tag += 1_000_000
    return found


def to_canonical(network: str, spelling: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What our table of this spelling makes of the tensors."""
    table = NETWORKS.get(network).tables()[spelling]
    found = {}
    for key, tensor in tensors.items():
        claim = table.claim(key)
        if claim is None:
            assert table.is_extra(key), f"{key} is unclaimed"
            continue
        rule = claim.rule
        if rule.squared and tensor.dim() == 4:
            tensor = tensor[:, :, 0, 0]
        if rule.transposed:
            tensor = tensor.T
        features = _features(key, tensors)
        tensor = _swapped(rule, tensor, features, key)
        parts = [tensor]
        if len(claim.names) > 1:
            bands = heights(rule, len(tensor), features)
            assert bands is not None, f"{key} cannot be cut into {rule.heights}"
            parts = list(tensor.split(bands))
        for name, part in zip(claim.names, parts, strict=True):
            assert name not in found, f"{name} comes twice"
            found[name] = part
    return found


def from_canonical(network: str, spelling: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in this spelling, as our table writes them."""
    table = NETWORKS.get(network).tables()[spelling]
    found = {}
    for name in tensors:
        spelled = table.spelled(name)
        assert spelled is not None, f"{name} has no name in {spelling}"
        rule, key, names = spelled
        if key in found:
            continue
        tensor = _cat([tensors[n] for n in names]) if len(names) > 1 else tensors[name]
        tensor = _swapped(rule, tensor, _features(name, tensors), name)
        if rule.transposed:
            tensor = tensor.T
        if rule.squared and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]
        found[key] = tensor
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, shapes and values."""
    assert sorted(found) == sorted(expected)
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape, name
        assert torch.equal(_thin(tensor), _thin(expected[name])), name


def _features(key: str, tensors: dict[str, Tensor]) -> int | None:
    """How many inputs the module of this weight or bias has, where its weight is there to tell."""
    weight = tensors.get(key.removesuffix("bias") + "weight", tensors[key])
    return weight.shape[1] if weight.dim() > 1 else None


def _swapped(rule: Rule, tensor: Tensor, features: int | None, name: str) -> Tensor:
    answer = swaps(rule, len(tensor) if tensor.dim() else 1, features)
    assert answer is not None, f"{name}: nothing tells whether its halves trade places"
    return _cat(list(tensor.chunk(2))[::-1]) if answer else tensor


def _cat(parts: list[Tensor]) -> Tensor:
    """Along axis 0, in hardly any memory where every row is constant."""
    if all(p.dim() > 1 and set(p.stride()[1:]) == {0} for p in parts):
        firsts = [p[(slice(None), *[slice(0, 1)] * (p.dim() - 1))] for p in parts]
        return torch.cat(firsts).expand(-1, *parts[0].shape[1:])
    return torch.cat(parts)


def _thin(tensor: Tensor) -> Tensor:
    """One value of each row of what is large; its rows are constant."""
    while tensor.numel() > 1 << 22 and tensor.dim() > 1:
        tensor = tensor[..., 0]
    return tensor
