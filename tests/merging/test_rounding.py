"""Stochastic rounding: one of both neighbours, unbiased, drawn per block."""

from __future__ import annotations

import pytest
import torch

from weightops.merging.rounding import generator_for, store_stochastic

DTYPES = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def rounded(values: torch.Tensor, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    out = torch.empty(values.shape, dtype=dtype)
    store_stochastic(values, out, generator_for(seed, "t", 0))
    return out


def neighbours(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest value of the dtype that is not above, and the smallest not below, from a list of all of them."""
    bits = torch.finfo(dtype).bits
    codes = torch.arange(2**bits).to(torch.uint8 if bits == 8 else torch.int16)
    every = codes.view(dtype).double()
    every = every[every.isfinite()].unique()
    index = torch.searchsorted(every, values.double())
    high = every[index.clamp_max(len(every) - 1)]
    low = torch.where(high == values.double(), high, every[(index - 1).clamp_min(0)])
    return low, high


@every_dtype
def test_a_value_becomes_one_of_its_two_neighbours(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp2(torch.randint(-18, 6, (5000,), generator=generator))
    values = torch.randn(5000, generator=generator, dtype=torch.float64) * scale
    low, high = neighbours(values, dtype)
    found = rounded(values, dtype).double()
    assert ((found == low) | (found == high)).all()
    assert (found == low).any()
    assert (found == high).any()


@every_dtype
def test_what_the_dtype_holds_stays(dtype: torch.dtype) -> None:
    held = torch.randn(1000).to(dtype)
    held[0] = -0.0
    assert torch.equal(rounded(held.float(), dtype).view(torch.uint8), held.view(torch.uint8))


@every_dtype
@pytest.mark.parametrize("value", [1.03, -1.03, 3e-6, -3e-6, 0.2501])
def test_the_mean_is_the_value(dtype: torch.dtype, value: float) -> None:
    values = torch.full((200_000,), value, dtype=torch.float64)
    found = rounded(values, dtype).double()
    low, high = neighbours(values[:1], dtype)
    spread = float(high - low) or 1e-30
    assert abs(float(found.mean()) - value) < 5 * spread / 200_000**0.5


def test_too_large_a_value_is_no_finite_one() -> None:
    found = rounded(torch.tensor([70000.0, -70000.0, 65504.0, 65510.0]), torch.float16)
    assert found.tolist() == [float("inf"), float("-inf"), 65504.0, 65504.0]
    assert rounded(torch.tensor([500.0]), torch.float8_e4m3fn).isnan().all()


def test_the_draw_depends_on_seed_name_and_block_alone() -> None:
    def draw(*what: object) -> list[float]:
        return torch.rand(4, generator=generator_for(*what)).tolist()  # type: ignore[arg-type]

    assert draw(1, "a", 2) == draw(1, "a", 2)
    assert (
        len({tuple(draw(*what)) for what in ((1, "a", 2), (2, "a", 2), (1, "b", 2), (1, "a", 3), (1, "a\0", 2))}) == 5
    )
