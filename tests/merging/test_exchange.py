"""Values taken from one model or another, against plain loops and formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from applying import DTYPES, SHAPES, applied, assert_near, random, same_bits

from weightops.errors import UsageError

three_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
Array = np.ndarray

# ------------------------------------------------------------------------------------------------ nearswap, clamp


@every_shape
@three_dtypes
def test_near_values_are_swapped(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    models = [random(shape, dtype, seed) for seed in range(2)]
    a, b = (m.double().numpy() for m in models)
    for threshold in (0.0, 0.3, 2.0):
        share = np.clip(threshold / np.maximum(abs(a - b), 1e-6), 0, 1)
        assert_near(applied("nearswap", models, threshold=threshold), share * b + (1 - share) * a, models)


@three_dtypes
def test_at_its_ends_nearswap_is_one_of_the_models(dtype: torch.dtype) -> None:
    a, b = random((40, 48), dtype, 1), random((40, 48), dtype, 2)
    assert same_bits(applied("nearswap", [a, b], threshold=0), a)
    assert same_bits(applied("nearswap", [a, b], threshold=1e4), b)
    moved = applied("nearswap", [a, b], dtype=torch.float64, threshold=0.01).sub_(a)
    assert moved.abs().max() <= 0.01 + 1e-15


def clamp(model: Array, bounds: Array, stiffness: float) -> Array:
    low, high = bounds.min(0), bounds.max(0)
    mean = bounds.mean(0)
    close = np.isclose(bounds, mean, rtol=1e-14, atol=1e-14)
    above = np.where((bounds >= mean) | close, bounds, np.inf).min(0)
    below = np.where((bounds <= mean) | close, bounds, -np.inf).max(0)
    low, high = (1 - stiffness) * low + stiffness * below, (1 - stiffness) * high + stiffness * above
    return np.minimum(np.maximum(model, low), high)


@every_shape
@three_dtypes
def test_a_model_is_kept_between_its_bounds(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for count in (1, 2, 4) if max(shape) < 1000 else (3,):
        model, *bounds = [random(shape, dtype, seed) for seed in range(count + 1)]
        stacked = np.stack([b.double().numpy() for b in bounds])
        for stiffness in (0.0, 0.3, 1.0):
            found = applied("clamp", [model, *bounds], stiffness=stiffness)
            assert_near(found, clamp(model.double().numpy(), stacked, stiffness), [model, *bounds])


@three_dtypes
def test_a_model_within_its_bounds_is_left_as_it_is(dtype: torch.dtype) -> None:
    model = random((40, 48), dtype)
    assert same_bits(applied("clamp", [model, model - 1, model + 1]), model)
    assert same_bits(applied("clamp", [model + 9, model - 1, model]), model)
    one = torch.tensor([5.0, -5.0, 0.5], dtype=dtype)
    bounds = [torch.full((3,), v, dtype=dtype) for v in (-2.0, 0.0, 1.0, 4.0)]
    assert applied("clamp", [one, *bounds]).tolist() == [4.0, -2.0, 0.5]
    assert applied("clamp", [one, *bounds], stiffness=1).tolist() == [1.0, 0.0, 0.5]
    assert applied("clamp", [one, *bounds], stiffness=0.5).tolist() == [2.5, -1.0, 0.5]


# ------------------------------------------------------------------------------------------------ regions


REGIONS = [(0.5, 0.0), (0.25, 0.5), (0.5, 0.75), (0.3, -0.2), (0.3, 1.8), (1.0, 0.4), (0.0, 0.4)]


@every_shape
@three_dtypes
def test_rows_in_the_region_are_of_the_second_model(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b = random(shape, dtype, 1), random(shape, dtype, 2)
    rows = shape[0]
    for width, offset in REGIONS:
        start, stop = round(offset % 1 * rows), round((offset % 1 + width) * rows)
        exact = a.clone()
        for row in range(start, stop):
            exact[row % rows] = b[row % rows]
        assert same_bits(applied("tensor_sum", [a, b], width=width, offset=offset), exact), (width, offset)


@three_dtypes
def test_all_rows_or_none_are_one_of_the_models(dtype: torch.dtype) -> None:
    a, b = random((7, 3), dtype, 1), random((7, 3), dtype, 2)
    for offset in (0.0, 0.3, 0.9):
        assert same_bits(applied("tensor_sum", [a, b], width=0, offset=offset), a)
        assert same_bits(applied("tensor_sum", [a, b], width=1, offset=offset), b)
        assert same_bits(applied("top_k_tensor_sum", [a, b], width=0, offset=offset), a)


def top_k_tensor_sum(a: list[float], b: list[float], width: float, offset: float) -> list[float]:
    """By places: of values that all differ."""
    count, places = len(a), range(len(a))
    sizes = sorted(abs(v) for v in a)
    start, stop = round(offset % 1 * count), round((offset % 1 + width) * count)
    taken = {sizes[rank % count] for rank in range(start, stop)}
    ordered = sorted(a)
    found = list(a)
    for rank, place in enumerate(sorted(places, key=b.__getitem__)):
        if abs(ordered[rank]) in taken:
            found[place] = ordered[rank]
    return found


@pytest.mark.parametrize("shape", [*SHAPES[:4], (300, 300)], ids=str)
@pytest.mark.parametrize(("width", "offset"), REGIONS)
def test_values_are_set_in_the_order_of_the_other_model(shape: tuple[int, ...], width: float, offset: float) -> None:
    a, b = (random(shape, torch.float64, seed) + random(shape, torch.float64, seed + 9, 1e-9) for seed in (1, 2))
    assert len(a.abs().unique()) == a.numel()
    exact = top_k_tensor_sum(a.reshape(-1).tolist(), b.reshape(-1).tolist(), width, offset)
    found = applied("top_k_tensor_sum", [a, b], width=width, offset=offset)
    assert found.reshape(-1).tolist() == exact


@three_dtypes
def test_all_values_in_the_order_of_the_other_model_are_the_same_values(dtype: torch.dtype) -> None:
    shape = (1100, 1024) if dtype is torch.bfloat16 else (300, 300)
    a, b = random(shape, dtype, 1), random(shape, dtype, 2)
    found = applied("top_k_tensor_sum", [a, b])
    ordered = found.reshape(-1)[b.reshape(-1).argsort(stable=True)]
    assert same_bits(ordered, a.reshape(-1).sort().values)
    assert same_bits(applied("top_k_tensor_sum", [a, a]), a)
    assert same_bits(applied("top_k_tensor_sum", [a, a], width=0.3, offset=0.4), a)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("nearswap", {"threshold": -0.1}, "nearswap, threshold: found -0.1, expected a number from 0 on"),
        ("nearswap", {}, "--set: nearswap needs the parameter 'threshold'"),
        ("clamp", {"stiffness": 1.5}, "clamp, stiffness: found 1.5, expected a number from 0 to 1"),
        ("tensor_sum", {"width": 1.5}, "tensor_sum, width: found 1.5, expected a number from 0 to 1"),
        ("top_k_tensor_sum", {"width": -1}, "top_k_tensor_sum, width: found -1, expected a number from 0 to 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(name: str, given: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        applied(name, [random((4, 4)), random((4, 4))], **given)
    assert str(caught.value) == message
