"""Filters against numpy's medians, convolutions and complex Fourier transforms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from applying import DTYPES, SHAPES, applied, assert_near, random, same_bits

from weightops.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    Array = np.ndarray

three_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_shape = pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 2, 3, 2), (6, 5, 1, 1), (1, 1)], ids=str)

# ------------------------------------------------------------------------------------------------ smooth_add


def smoothed(values: Array) -> Array:
    """Of mirrored values, the median of each box of three along every axis; then a Gaussian along each axis."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, 1, mode="symmetric"), (3,) * values.ndim)
    result = np.median(windows.reshape(*values.shape, -1), axis=-1)
    weights = np.exp(-(np.arange(-4.0, 5.0) ** 2) / 2)
    for axis in range(values.ndim):
        widths = [(4, 4) if axis == a else (0, 0) for a in range(values.ndim)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(result, widths, mode="symmetric"), 9, axis=axis)
        result = windows @ (weights / weights.sum())
    return result


@every_shape
@three_dtypes
def test_a_difference_is_smoothed_along_every_axis(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if max(shape) > 1000 and dtype is not torch.float16:
        shape = (600, 300)
    delta = random(shape, dtype, 5)
    exact = torch.as_tensor(smoothed(delta.double().numpy()))
    assert_near(applied("smooth_add", [delta]), exact, [delta, exact])


def test_differences_are_smoothed_one_by_one_and_added_at_their_weights() -> None:
    deltas = [random((40, 48), seed=seed) for seed in range(3)]
    exact = sum(w * smoothed(d.double().numpy()) for w, d in zip((2.0, -0.5, 0.0), deltas, strict=True))
    assert_near(applied("smooth_add", deltas, weights=(2.0, -0.5, 0.0)), exact, deltas)


def test_what_is_alike_everywhere_is_left_and_what_stands_alone_is_gone() -> None:
    alike = torch.full((20, 30), 0.25)
    assert_near(applied("smooth_add", [alike]), alike.double(), [alike])
    alone = torch.zeros(20, 30)
    alone[7, 8] = 1000.0
    assert (applied("smooth_add", [alone]) == 0).all()


def test_nan_stays_where_it_is_and_spreads_no_further_than_the_filters_reach() -> None:
    delta = random((40, 48), seed=1)
    delta[20, 20] = torch.nan
    spoilt = applied("smooth_add", [delta]).isnan()
    assert spoilt[20, 20]
    assert not spoilt[:15].any()
    assert not spoilt[:, 26:].any()


# ------------------------------------------------------------------------------------------------ crossover


def radius(shape: tuple[int, ...]) -> Array:
    """Of each frequency of a complex transform; an axis of one value has none."""
    total, axes = np.zeros(shape), sum(n > 1 for n in shape)
    for axis, n in enumerate(shape):
        places = np.arange(n)
        along = np.minimum(places, n - places) / max(n // 2, 1)
        total += (along**2).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return np.sqrt(total / max(axes, 1))


def crossover(a: Array, b: Array, passed: Callable[[Array], Array]) -> Array:
    share = passed(radius(a.shape))
    mixed = (1 - share) * np.fft.fftn(a) + share * np.fft.fftn(b)
    result = np.fft.ifftn(mixed)
    assert abs(result.imag).max() < 1e-12
    return result.real


@every_shape
@three_dtypes
def test_high_frequencies_are_of_the_second_model(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    models = [random(shape, dtype, seed) for seed in range(2)]
    a, b = (m.double().numpy() for m in models)
    for alpha in (0.37, 0.8) if max(shape) < 1000 else (0.37,):
        exact = crossover(a, b, lambda r, alpha=alpha: (r > 1 - alpha).astype(float))
        assert_near(applied("crossover", models, alpha=alpha), exact, models, ulps=2)


@three_dtypes
def test_a_tilt_makes_the_cut_a_slope_and_then_turns_it_round(dtype: torch.dtype) -> None:
    models = [random((40, 48), dtype, seed) for seed in range(2)]
    a, b = (m.double().numpy() for m in models)

    def slope(tilt: float, at: float) -> Callable[[Array], Array]:
        return lambda r: (0.3 + (r - at) / np.tan(np.pi * tilt / 2)).clip(0, 1)

    for tilt, passed in {
        0.4: slope(0.4, 0.7),
        1.0: lambda r: np.full_like(r, 0.3),
        1.5: slope(1.5, 0.3),
        2.0: lambda r: (r < 0.3).astype(float),
    }.items():
        found = applied("crossover", models, alpha=0.3, tilt=tilt)
        assert_near(found, crossover(a, b, passed), models, ulps=2)
    beside = applied("crossover", models, alpha=0.3, tilt=1.0001)
    assert torch.allclose(beside.double(), torch.as_tensor(0.7 * a + 0.3 * b), atol=0.01)


@three_dtypes
def test_at_its_ends_a_crossover_is_one_of_the_models(dtype: torch.dtype) -> None:
    a, b = random((16, 8, 3, 3), dtype, 1), random((16, 8, 3, 3), dtype, 2)
    for tilt in (0.0, 0.5, 1.0, 2.0):
        assert same_bits(applied("crossover", [a, b], alpha=0, tilt=tilt), a)
        assert same_bits(applied("crossover", [a, b], alpha=1, tilt=tilt), b)
        assert same_bits(applied("crossover", [a, a], tilt=tilt), a)


# ------------------------------------------------------------------------------------------------ by the base's order


def distribution_crossover(a: Array, b: Array, c: Array, alpha: float, ramp: float) -> Array:
    order = np.argsort(c, axis=None, kind="stable")
    places = np.arange(a.size)
    along = np.minimum(places, a.size - places) / (a.size // 2 + 1)
    share = (along >= 1 - alpha).astype(float) if ramp == 0 else ((along - 1 + alpha) / ramp + 0.5).clip(0, 1)
    mixed = (1 - share) * np.fft.fft(a.ravel()[order]) + share * np.fft.fft(b.ravel()[order])
    result = np.empty(a.size)
    result[order] = np.fft.ifft(mixed).real
    return result.reshape(a.shape)


@every_shape
@three_dtypes
def test_a_crossover_along_the_sorted_base(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    models = [random(shape, dtype, seed) for seed in range(3)]
    a, b, c = (m.double().numpy() for m in models)
    for alpha, ramp in [(0.37, 0.0), (0.8, 0.5)] if max(shape) < 1000 else [(0.37, 0.2)]:
        exact = distribution_crossover(a, b, c, alpha, ramp)
        found = applied("distribution_crossover", models, alpha=alpha, ramp=ramp)
        assert_near(found, exact, models, ulps=2)


@three_dtypes
def test_at_its_ends_it_is_one_of_the_models(dtype: torch.dtype) -> None:
    a, b, base = models = [random((40, 47), dtype, seed) for seed in range(3)]
    assert same_bits(applied("distribution_crossover", models, alpha=0), a)
    assert_near(applied("distribution_crossover", models, alpha=1), b.double(), models)
    assert same_bits(applied("distribution_crossover", [a, a, base]), a)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("crossover", {"alpha": 1.1}, "alpha: found 1.1, expected a number from 0 to 1"),
        ("crossover", {"tilt": 3}, "tilt: found 3, expected a number from 0 to 2"),
        ("distribution_crossover", {"alpha": -1}, "alpha: found -1, expected a number from 0 to 1"),
        ("distribution_crossover", {"ramp": -1}, "ramp: found -1, expected a number from 0 on"),
    ],
)
def test_settings_without_a_meaning_are_refused(name: str, given: dict[str, float], message: str) -> None:
    count = {"crossover": 2, "distribution_crossover": 3}[name]
    with pytest.raises(UsageError) as caught:
        applied(name, [random((4, 4))] * count, **given)
    assert str(caught.value) == f"{name}, {message}"
