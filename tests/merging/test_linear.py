"""Weighted sums against their formulas in float64, and where operands cancel out against the literal promise."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from applying import DTYPES, SHAPES, applied, assert_near, random, same_bits, ulp

from weightops.errors import UsageError
from weightops.merging.method import SMALL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

FLOATS = {
    **DTYPES,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
every_dtype = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
three_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["F16", "BF16"])
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
ALPHAS = [0.0, 0.3, 0.5, 0.7, 1.0, -1.0, 2.5]


def blend(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """By --alpha, whose weights may lie beyond the models."""
    return applied("weighted_sum", [a, b], weights=(1 - alpha, alpha))


def exactly(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return (1 - alpha) * a.double() + alpha * b.double()


def combined(models: Sequence[Tensor], weights: Sequence[float]) -> np.ndarray:
    total = np.zeros(models[0].shape)
    for model, weight in zip(models, weights, strict=True):
        total += weight * model.double().numpy()
    return total


# ------------------------------------------------------------------------------------------------ weighted_sum


@halves
@pytest.mark.parametrize("alpha", ALPHAS)
def test_two_halves_are_within_one_last_place_of_float64(dtype: torch.dtype, alpha: float) -> None:
    for scale in (1e-6, 0.03, 1.0, 300.0):
        a, b = random((20_000,), dtype, 1, scale), random((20_000,), dtype, 2, scale)
        assert_near(blend(a, b, alpha), exactly(a, b, alpha), [a, b])


@halves
@pytest.mark.parametrize("alpha", [a for a in ALPHAS if a])
def test_operands_that_cancel_out_leave_no_more_than_float32_does(dtype: torch.dtype, alpha: float) -> None:
    a = random((20_000,), dtype, 3, 100.0)
    b = (a.double() * (alpha - 1) / alpha).to(dtype)
    assert_near(blend(a, b, alpha), exactly(a, b, alpha), [a, b])


@halves
@pytest.mark.parametrize("alpha", [0.7, 0.3, 0.5, -0.4])
@pytest.mark.parametrize("scale", [0.02, 1.0, 300.0])
def test_models_that_cancel_are_within_one_unit_of_the_rounded_float64_result(
    dtype: torch.dtype, alpha: float, scale: float
) -> None:
    """However small the sum of two large values is: the literal promise, not one relative to the operands."""
    generator = torch.Generator().manual_seed(7)
    a = (torch.randn(4 * SMALL, generator=generator) * scale).to(dtype)
    b = (a.double() * (1 - alpha) / -alpha).to(dtype)
    b[::3] = (torch.randn(len(b[::3]), generator=generator) * scale).to(dtype)
    exact = exactly(a, b, alpha).to(dtype)
    assert int((ordered(blend(a, b, alpha)) - ordered(exact)).abs().max()) <= 1
    lerped = torch.lerp(a, b, alpha)
    if scale > 1 and alpha != 0.5:  # the case is real: torch's lerp alone is further off
        assert int((ordered(lerped) - ordered(exact)).abs().max()) > 1


def ordered(values: Tensor) -> Tensor:
    """Integers in the order of the values, one apart where the values are neighbours."""
    bits = values.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_float32_is_within_one_last_place_of_the_larger_operand(alpha: float) -> None:
    a, b = random((70_000,), seed=4), random((70_000,), seed=5)
    b[:1000] = -a[:1000] * 1.0000001
    exact = exactly(a, b, alpha)
    larger = torch.maximum(torch.maximum(a.abs(), b.abs()).double(), exact.abs())
    assert ((blend(a, b, alpha).double() - exact).abs() <= ulp(larger, torch.float32)).all()


@every_dtype
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_weight_of_one_gives_that_model_bit_for_bit(dtype: torch.dtype, alpha: float) -> None:
    if dtype in (torch.float32, torch.float64):
        tiny = torch.finfo(dtype).smallest_normal
        start = random((4096,), dtype, 6)
        every = torch.cat([start, start * tiny, torch.tensor([0.0, -0.0, tiny / 3, -tiny / 3], dtype=dtype)])
    elif dtype.itemsize == 2:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    every = every[every.double().isfinite()]
    backwards = every[torch.arange(len(every) - 1, -1, -1)]
    for times in (1, 2):  # of more than SMALL values the halves take torch's lerp
        own = every.repeat(times)
        for other in (backwards.repeat(times), torch.ones_like(own), torch.full_like(own, -1.0)):
            assert same_bits(blend(own, other, alpha) if alpha == 0 else blend(other, own, alpha), own)


@pytest.mark.parametrize("dtype", [d for d in FLOATS.values() if d.itemsize == 1], ids=str)
@pytest.mark.parametrize("alpha", [0.3, 0.5, -1.0])
def test_every_pair_of_fp8_values_gives_the_nearest_value(dtype: torch.dtype, alpha: float) -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    every = every[every.float().isfinite()]
    a, b = every.repeat_interleave(len(every)), every.repeat(len(every))
    found, exact = blend(a, b, alpha), exactly(a, b, alpha)
    held = exact.abs() <= torch.finfo(dtype).max
    assert_near(found[held], exact[held], [a[held], b[held]])
    over = exact.abs() > torch.finfo(dtype).max * 1.15
    assert not found[over].float().isfinite().any(), "an overflow must not pass for a value"


@pytest.mark.parametrize("weights", [(1.0,), (0.2, 0.3, 0.5), (0.25, 0.25, 0.25, 0.25), (2.0, -1.0, 3.0), (0.0, 1.0)])
@every_dtype
def test_weighted_sum_is_the_sum_of_weights_times_models_by_the_sum_of_weights(
    dtype: torch.dtype, weights: tuple[float, ...]
) -> None:
    models = [random((5000,), dtype, seed) for seed in range(len(weights))]
    exact = combined(models, weights)
    operands = [m.double() * 3 for m in models]
    assert_near(applied("weighted_sum", models, weights=weights), exact / sum(weights), operands)
    assert_near(applied("weighted_sum", models, weights=weights, normalize=False), exact, operands)


def test_weights_that_sum_to_nothing_are_refused_unless_they_are_not_normalised() -> None:
    models = [random((8,), torch.float16, 0), random((8,), torch.float16, 1), random((8,), torch.float16, 2)]
    for weights in [(0.0, 0.0, 0.0), (0.1, 0.2, -0.3)]:
        with pytest.raises(UsageError, match="they sum to 0 and cannot be normalised"):
            applied("weighted_sum", models, weights=weights)
    assert (applied("weighted_sum", models, weights=(0, 0, 0), normalize=False) == 0).all()


def test_a_model_of_weight_0_is_not_looked_at() -> None:
    good, bad = random((64,), torch.float16), torch.full((64,), math.nan, dtype=torch.float16)
    for name in ("weighted_sum", "sum"):
        assert same_bits(applied(name, [good, bad], weights=(1, 0)), good)


# ------------------------------------------------------------------------------------------------ the others


@every_shape
@three_dtypes
def test_the_mean_of_any_number_is_their_sum_by_their_number(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for count in (1, 2, 5) if len(shape) > 1 else (7,):
        models = [random(shape, dtype, seed) for seed in range(count)]
        assert_near(applied("n_average", models), combined(models, [1 / count] * count), models)


@every_shape
@three_dtypes
def test_three_models_are_blended_at_once_or_one_after_another(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    models = [random(shape, dtype, seed) for seed in range(3)]
    a, b, c = (m.double().numpy() for m in models)
    at_once = applied("triple_sum", models, alpha=0.2, beta=0.7)
    assert_near(at_once, (1 - 0.2 - 0.7) * a + 0.2 * b + 0.7 * c, models)
    twice = applied("sum_twice", models, alpha=0.2, beta=0.7)
    assert_near(twice, (1 - 0.7) * ((1 - 0.2) * a + 0.2 * b) + 0.7 * c, models)


@three_dtypes
def test_at_their_ends_three_models_give_one_of_them(dtype: torch.dtype) -> None:
    a, b, c = models = [random((40, 48), dtype, seed) for seed in range(3)]
    for name in ("triple_sum", "sum_twice"):
        assert same_bits(applied(name, models, alpha=0, beta=0), a)
        assert same_bits(applied(name, models, alpha=1, beta=0), b)
        assert same_bits(applied(name, models, alpha=0, beta=1), c)
    mean = applied("n_average", models)
    assert_near(applied("triple_sum", models), mean.double(), models, ulps=2)


@pytest.mark.parametrize("weights", [(1.0,), (0.5,), (1.0, 0.7), (0.3, -0.4, 2.0)])
@every_dtype
def test_differences_are_added_at_their_weights(dtype: torch.dtype, weights: tuple[float, ...]) -> None:
    base, *models = [random((5000,), dtype, seed) for seed in range(len(weights) + 1)]
    exact = base.double().numpy().copy()
    for model, weight in zip(models, weights, strict=True):
        exact += weight * (model.double() - base.double()).numpy()
    operands = [m.double() * 4 for m in (base, *models)]
    assert_near(applied("add_difference", [base, *models], weights=weights), exact, operands)
    added = combined([base, *models], (1.0, *weights))
    assert_near(applied("add", [base, *models], weights=weights), added, operands)
    assert_near(applied("sum", models, weights=weights), combined(models, weights), operands)


@every_shape
@three_dtypes
def test_a_difference_is_what_is_left_of_a_model_without_its_base(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model, base = random(shape, dtype, 0), random(shape, dtype, 1)
    assert_near(applied("difference", [model, base]), combined([model, base], (1, -1)), [model, base])
    assert (applied("difference", [model, model]) == 0).all()


def test_add_difference_with_weights_one_and_alpha_is_a_plus_alpha_times_b_less_c() -> None:
    c, a, b = (torch.tensor([v]) for v in (1.0, 3.0, 5.0))
    assert applied("add_difference", [c, a, b], weights=(1.0, 0.5)).item() == 3.0 + 0.5 * (5.0 - 1.0)
