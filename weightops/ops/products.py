"""LoRAs into rows of a weight, the usual case: one matrix product for all of them, a tile that stays in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightops.merging.method import WORKING_VALUES, store
from weightops.merging.rounding import store_stochastic
from weightops.ops.survival import WORTH_A_LOOK, Survival, together

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from weightops.ops.changes import Change

# Values of a tile. A product of fewer rows, or of more columns, takes longer for each value; larger tiles, of which
# there are three, leave the cache.
TILE_VALUES = 4 * WORKING_VALUES
_TILE_COLUMNS = 4096


def are_products(changes: Sequence[Change]) -> bool:
    """Is each of them up · down of the same rows, in the shape that the weight has?"""
    return all(
        change.family.name == "lora"
        and not change.of_bias
        and change.cut
        and change.window is None
        and not {"dora_scale", "reshape_weight"} & set(change.parts)
        for change in changes
    )


def factors(changes: Sequence[Change], parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """up [rows, rank] and down [rank, n] of which the product is Σ λ·ΔW, in float32."""
    import torch

    from weightops.lora.family import Parts

    ups, downs = [], []
    position = 0
    for change in changes:
        tensors = {}
        for part, given in zip(change.parts, parts[position : position + len(change.parts)], strict=True):
            columns = change.columns.get(part)
            tensors[part] = (given if columns is None else given[:, columns[0] : columns[1]]).float()
        position += len(change.parts)
        assert change.family.lowrank is not None
        up, down = change.family.lowrank(Parts(tensors, change.alpha, change.shape, change.told))
        ups.append(up * change.strength)
        downs.append(down)
    if len(ups) == 1:
        return ups[0], downs[0]
    return torch.cat(ups, 1), torch.cat(downs, 0)


def add_products(
    given: Tensor, out: Tensor, up: Tensor, down: Tensor, *, generator: torch.Generator | None, other: str | None
) -> Survival:
    """Fill `out` with W + up · down, rounded once from float32, or by chance where there is a generator.

    given: rows of W. other: a dtype to try where little survives.
    """
    import torch

    weight, written = given.reshape(len(given), -1), out.reshape(len(out), -1)
    rows, n = weight.shape
    columns = min(n, _TILE_COLUMNS)
    height = max(1, TILE_VALUES // max(columns, 1))
    size = min(rows, height) * columns
    buffers = [torch.empty(size, dtype=torch.float32, device=given.device) for _ in range(3)]
    found = []
    for top in range(0, rows, height):
        for left in range(0, n, columns):
            tile = slice(top, top + height), slice(left, left + columns)
            source = weight[tile]
            delta, total, rest = (b[: source.numel()].view(source.shape) for b in buffers)
            torch.mm(up[tile[0]], down[:, tile[1]], out=delta)
            total.copy_(source)
            norm = _dot(total, total)
            total.add_(delta)
            store_rounded(total, written[tile], generator)
            found.append(_survival(delta, total, rest, written[tile], norm, other))
    return together(found)


def store_rounded(result: Tensor, out: Tensor, generator: torch.Generator | None) -> None:
    """Fill `out`, rounded to the nearest or, with a generator, by chance: this a few rows at a time, for it takes many
    working copies. How many rows follows from the shape."""
    if generator is None:
        store(result, out)
        return
    if out.is_contiguous():  # cut between any two values
        result, out = result.reshape(-1), out.view(-1)
    rows = max(1, WORKING_VALUES * len(out) // max(out.numel(), 1))
    for start in range(0, len(out), rows):
        store_stochastic(result[start : start + rows], out[start : start + rows], generator)


def _survival(delta: Tensor, total: Tensor, rest: Tensor, written: Tensor, norm: Tensor, other: str | None) -> Survival:
    """What is left of Δ in a tile; W + Δ in float32 is its sum, and `rest` a buffer to work in."""
    import torch

    sums = [_dot(delta, delta), *_off(delta, total, rest, written), norm]
    meant, along, off, weight = torch.stack(sums).tolist()
    beside = None
    if other is not None and meant and meant + along < WORTH_A_LOOK * meant:
        tried = torch.empty_like(total, dtype=getattr(torch, other))
        store(total, tried)
        then_along, then_off = torch.stack(_off(delta, total, rest, tried)).tolist()
        beside = meant + then_along, then_off
    return Survival(meant, meant + along, off, weight, beside)


def _off(delta: Tensor, total: Tensor, rest: Tensor, written: Tensor) -> list[Tensor]:
    """⟨written − (W + Δ), Δ⟩ and ‖written − (W + Δ)‖²."""
    rest.copy_(written)
    rest.sub_(total)
    return [_dot(rest, delta), _dot(rest, rest)]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    import torch

    return torch.dot(a.view(-1), b.view(-1))
