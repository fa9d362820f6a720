"""Differences added by agreement, against their formulas in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from applying import DTYPES, SHAPES, applied, assert_near, random, same_bits

if TYPE_CHECKING:
    from collections.abc import Callable

    Array = np.ndarray

three_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def over(numerator: Array, denominator: Array) -> Array:
    """A quotient, and 0 for 0 / 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


def train_difference(a: Array, b: Array, c: Array, alpha: float = 1.0) -> Array:
    """supermerger's: A + sign(B−C)·|B−C|·|scale|·1.8·α, scale the part of |B−A| in both distances."""
    scale = over(abs(b - a), abs(b - c) + abs(b - a))
    return a + np.sign(b - c) * abs(scale) * abs(b - c) * (alpha * 1.8)


def add_opposite(a: Array, b: Array, c: Array, alpha: float = 1.0) -> Array:
    return a + (b - c) * alpha * 2 * over(abs(a - b), abs(a - b) + abs(a + b - 2 * c))


def add_strict_opposite(a: Array, b: Array, c: Array, alpha: float = 1.0) -> Array:
    largest = np.maximum(abs(a - c), abs(b - c))
    return a + (b - c) * alpha * 2 * np.maximum(over((c - a) * (b - c), largest**2), 0)


def multiply_quotient(a: Array, b: Array, c: Array, alpha: float = 1.0) -> Array:
    """With complex numbers, as it is written."""
    whole = (a != 0) & (b != 0) & (c != 0)
    x, y, z = (np.where(whole, v, 1.0) for v in (a, b, c))
    of_a, of_b = np.log(abs(x)) - np.log(abs(z)), np.log(abs(y)) - np.log(abs(z))
    power = alpha * np.maximum(-over(of_a * of_b, np.maximum(abs(of_a), abs(of_b)) ** 2), 0)
    return np.where(whole, (x * (y / z).astype(complex) ** power).real, a)


def similarity_add_difference(a: Array, b: Array, c: Array, alpha: float = 1.0, beta: float = 1.0) -> Array:
    largest = np.maximum(abs(a), abs(b))
    similarity = np.where(largest == 0, beta, (over(a * b, largest**2) + 1) / 2 * beta)
    added, summed = a + alpha * (b - c), (1 - alpha / 2) * a + alpha / 2 * b
    return (1 - similarity) * added + similarity * summed


FORMULAS = [train_difference, add_opposite, add_strict_opposite, multiply_quotient, similarity_add_difference]
every_formula = pytest.mark.parametrize("formula", FORMULAS, ids=lambda f: f.__name__)
SETTINGS = [{}, {"alpha": 0.4}, {"alpha": -1.0}]


@every_formula
@every_shape
@three_dtypes
def test_each_is_its_formula(formula: Callable[..., Array], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    models = [random(shape, dtype, seed) for seed in range(3)]
    a, b, c = (m.double().numpy() for m in models)
    for settings in SETTINGS if len(shape) > 1 and max(shape) < 1000 else SETTINGS[1:2]:
        found = applied(formula.__name__, models, **settings)
        assert_near(found, formula(a, b, c, **settings), [m * 4 for m in models], ulps=2)


@three_dtypes
def test_similarity_beta_weights_the_average(dtype: torch.dtype) -> None:
    models = [random((40, 48), dtype, seed) for seed in range(3)]
    a, b, c = (m.double().numpy() for m in models)
    found = applied("similarity_add_difference", models, alpha=0.5, beta=0.3)
    assert_near(found, similarity_add_difference(a, b, c, 0.5, 0.3), models, ulps=4)
    without = applied("similarity_add_difference", models, beta=0)
    assert_near(without, a + b - c, models, ulps=2)


@every_formula
@three_dtypes
def test_zeros_and_equals_in_any_place_are_its_formula_too(formula: Callable[..., Array], dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 1.0, -1.0, 0.5, 3.0], dtype=dtype)
    models = [m.reshape(-1).clone() for m in torch.meshgrid(values, values, values, indexing="ij")]
    a, b, c = (m.double().numpy() for m in models)
    assert_near(applied(formula.__name__, models), formula(a, b, c), models, ulps=2)


@pytest.mark.parametrize("name", ["train_difference", "add_opposite", "add_strict_opposite"])
@three_dtypes
def test_alpha_is_a_strength(name: str, dtype: torch.dtype) -> None:
    """Twice alpha adds twice as much."""
    models = [random((40, 48), dtype, seed) for seed in range(3)]
    once, twice = (applied(name, models, dtype=torch.float64, alpha=alpha) for alpha in (0.6, 1.2))
    assert torch.allclose(twice - models[0].double(), 2 * (once - models[0].double()), atol=1e-12)


@three_dtypes
def test_training_on_what_is_known_adds_nothing(dtype: torch.dtype) -> None:
    a, base = random((40, 48), dtype, 0), random((40, 48), dtype, 1)
    assert same_bits(applied("train_difference", [a, a, base]), a)  # it knows all that B does
    assert same_bits(applied("train_difference", [a, base, base]), a)  # B learned nothing
    fresh = applied("train_difference", [base, a, base])
    exact = base.double() + 0.9 * (a.double() - base.double())
    assert_near(fresh, exact, [a, base], ulps=2)  # from the base itself, 0.9 of all that B learned


@three_dtypes
def test_only_opposites_are_added(dtype: torch.dtype) -> None:
    base = torch.zeros(4, dtype=dtype)
    a, b = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=dtype), torch.tensor([-1.0, 1.0, -0.5, 0.0], dtype=dtype)
    assert applied("add_strict_opposite", [a, b, base]).tolist() == [-1.0, 1.0, 0.5, 1.0]
    assert applied("add_opposite", [a, b, base]).tolist() == [-1.0, 1.0, 0.25, 1.0]


def test_opposites_so_small_that_their_product_is_none_are_opposites() -> None:
    models = [torch.tensor([v] * 70_000, dtype=torch.bfloat16) for v in (1e-30, -1e-30, 0.0)]
    assert same_bits(applied("add_strict_opposite", models), -models[0])


def test_a_quotient_counts_only_where_the_models_grew_oppositely() -> None:
    models = [torch.tensor(v) for v in ([4.0, 4.0, 4.0, 4.0], [0.25, 2.0, 0.5, -0.25], [1.0, 1.0, 1.0, 1.0])]
    found = applied("multiply_quotient", models)
    assert torch.allclose(found, torch.tensor([1.0, 4.0, 4 * 0.5**0.5, -1.0]), rtol=1e-6)
