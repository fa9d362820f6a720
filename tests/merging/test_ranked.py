"""Values at given ranks, found by two looks: exactly those of a sort, whatever the values and however they are cut."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weightops.merging.looks import kept, kept_between, ranked, reaches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def found(quantities: Sequence[Tensor], ranks: Sequence[float], cuts: Sequence[int] = ()) -> list[list[float]]:
    """What two looks find of tensors that are cut there, and of whose parts every second two are folded."""
    looks = ranked(lambda *models, **_: models, lambda count, **_: ranks)
    edges = [0, *sorted(cuts), len(quantities[0])]
    parts = [[q[a:b] for q in quantities] for a, b in itertools.pairwise(edges)]
    before: Any = None
    for look in looks:
        values = [look.block(*part, found=before) for part in parts]
        assert look.fold is not None
        folded = [look.fold(values[n : n + 2]) for n in range(0, len(values), 2)]
        before = look.together(folded, found=before)
    result: list[list[float]] = before
    return result


def sorted_magnitudes(quantity: Tensor) -> list[float]:
    """As float32, the largest first; what is not a number is above all."""
    size = quantity.abs().float().numpy()
    nan = np.isnan(size)
    return [math.nan] * int(nan.sum()) + np.sort(size[~nan])[::-1].tolist()


floats = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(deadline=None, max_examples=60)
@given(st.lists(floats, min_size=1, max_size=200), st.data())
@example([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 3.4e38], None)
@example([1.0] * 9, None)
def test_ranks_are_those_of_a_sort(values: list[float], data: st.DataObject | None) -> None:
    quantity = torch.tensor(values, dtype=torch.float32)
    cuts = data.draw(st.lists(st.integers(0, len(values)), max_size=5)) if data else [2]
    ranks = list(range(1, len(values) + 1))
    (limits,) = found([quantity], ranks, cuts)
    assert np.array_equal(limits, sorted_magnitudes(quantity), equal_nan=True)


def test_ranks_of_many_values_and_of_several_quantities() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(300_000, generator=generator) * 1e-3
    other = torch.randn(300_000, generator=generator, dtype=torch.float64).half().double()
    ranks = [1, 2, 77, 150_000, 299_999, 300_000]
    limits = found([one, other], ranks, [5, 100_000, 131_072])
    for quantity, own in zip((one, other), limits, strict=True):
        ordered = sorted_magnitudes(quantity)
        assert own == [ordered[rank - 1] for rank in ranks]


def test_ranks_between_two_and_beyond_the_ends() -> None:
    quantity = torch.tensor([4.0, -1.0, 2.0, 8.0])
    assert found([quantity], [1.5, 2.25, 0, 9, 3.0]) == [[6.0, 3.5, 8.0, 1.0, 2.0]]
    ordered = torch.randn(1001)
    quantiles = [0.25, 0.5, 0.9]
    (limits,) = found([ordered], [1001 - 1000 * q for q in quantiles])
    assert limits == pytest.approx(np.quantile(ordered.abs().double().numpy(), quantiles), rel=1e-12)


def test_no_quantity_is_no_limit_and_no_values_are_none() -> None:
    assert found([torch.empty(0)], [1]) == [[0.0]]
    looks = ranked(lambda *models, **_: (), lambda count, **_: [1])
    before: Any = None
    for look in looks:
        assert look.fold is not None
        before = look.together([look.fold([look.block(torch.ones(3), found=before)])], found=before)
    assert before == []


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=40), floats.map(abs))
@example([1e-46, 7.006492321624085e-46, 7.1e-46, -1e-45], 1.401298464324817e-45)
@example([3.4028235677973366e38, 3.4028235677973362e38, 3.5e38, math.inf], math.inf)
@example([1 + 2**-24, 1 + 3 * 2**-24, 1 - 2**-25, 1 - 2**-26], 1.0)
@example([1 + 2**-24, 1 + 3 * 2**-24, 1 + 5 * 2**-24], float(np.float32(1 + 2**-22)))
def test_what_is_kept_is_what_reaches_the_limit_as_float32(values: list[float], limit: float) -> None:
    for dtype in (torch.float64, torch.float32):
        tensor = torch.tensor(values, dtype=dtype)
        size = tensor.abs().float()
        wanted = torch.where(~(size < limit) | tensor.isnan(), tensor, 0.0)
        assert torch.equal(kept(tensor, limit).nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0))
        if not math.isnan(limit):
            assert torch.equal(reaches(tensor, limit), ~(size < limit))
        assert kept(tensor, limit).data_ptr() != tensor.data_ptr()
        finite = tensor[tensor.isfinite()]
        if math.isfinite(limit):
            between = torch.where(finite.abs().float() <= limit, finite, 0.0)
            assert torch.equal(kept_between(finite, 0.0, limit), between)


def test_what_is_not_a_number_is_between_any_limits() -> None:
    tensor = torch.tensor([math.nan, 1.0, 3.0])
    assert kept_between(tensor, 0.5, 2.0).isnan().tolist() == [True, False, False]
    assert kept_between(tensor, 0.5, math.nan)[1:].tolist() == [1.0, 3.0]
