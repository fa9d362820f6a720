"""Stochastic rounding: up or down by chance, so that on average nothing is lost.

Source: Croci et al. 2022, Stochastic rounding: implementation, error analysis and applications.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightops.merging.method import store

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor

ROUNDINGS = ("nearest", "stochastic")


def generator_for(seed: int, name: str, block: int, device: torch.device | str = "cpu") -> Generator:
    """The random numbers of one block of one tensor: they depend on nothing but these three."""
    import torch
    import xxhash

    digest = xxhash.xxh3_64_intdigest(f"{seed}\0{name}\0{block}".encode(errors="surrogatepass"))
    return torch.Generator(device).manual_seed(digest >> 1)


def store_stochastic(result: Tensor, out: Tensor, generator: Generator) -> None:
    """Fill `out` with one of the two neighbours of each value, the nearer the likelier; what `out` holds stays.

    result: float32 or float64. A value beyond the largest finite one becomes what `store` makes of it.
    """
    import torch

    store(result, out)
    wide = out.to(result.dtype)
    off = result - wide
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(out.element_size())
    if kind is None or not bool((off != 0).any()):
        return
    codes = out.view(kind)
    # A float's codes are in the order of its magnitudes: the next one away from zero is one more, towards it one less.
    # From zero the step leads to the smallest value of either sign, whose code below zero has the sign's bit.
    smallest_below = 129 if kind is torch.uint8 else torch.iinfo(kind).min + 1
    step = torch.where((off > 0) == (wide > 0), 1, -1)
    from_zero = torch.where(off > 0, 1, smallest_below)
    neighbour = torch.where(wide == 0, from_zero, codes.long() + step).to(kind)
    other = neighbour.view(out.dtype).to(result.dtype)
    chance = (off / (other - wide)).nan_to_num(0.0)
    # In float64: with 24 bits of chance, a share smaller than 2^-24 would never be taken.
    drawn = torch.rand(result.shape, generator=generator, device=result.device, dtype=torch.float64)
    taken = (drawn < chance) & (off != 0) & other.isfinite() & result.isfinite()
    codes.copy_(torch.where(taken, neighbour, codes))
