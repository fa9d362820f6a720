"""Geometric and euclidean means, against their formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from applying import DTYPES, SHAPES, applied, assert_near, random, same_bits

from weightops.errors import UsageError

three_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
Array = np.ndarray


def complex_power(values: Array, power: float) -> Array:
    return values.astype(complex) ** power


def geometric_sum(a: Array, b: Array, alpha: float = 0.5) -> Array:
    """With complex numbers, as it is written."""
    return (complex_power(a, 1 - alpha) * complex_power(b, alpha)).real


def multiply_difference(a: Array, b: Array, alpha: float = 0.5, beta: float = 0.5) -> Array:
    return np.copysign(abs(a) ** (1 - alpha) * abs(b) ** alpha, (1 - beta) * a + beta * b)


def euclidean_add(a: Array, b: Array, alpha: float = 0.5) -> Array:
    """meh's, step by step."""
    first, second = (v / (np.linalg.norm(v) or 1.0) for v in (a, b))
    distance = np.sqrt((1 - alpha) * first**2 + alpha * second**2)
    total = (1 - alpha) * a + alpha * b
    distance = np.copysign(distance, total)
    return distance / (np.linalg.norm(distance) or 1.0) * np.linalg.norm(total)


@pytest.mark.parametrize("formula", [geometric_sum, multiply_difference, euclidean_add], ids=lambda f: f.__name__)
@every_shape
@three_dtypes
def test_each_is_its_formula(formula: object, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    models = [random(shape, dtype, seed) for seed in range(2)]
    a, b = (m.double().numpy() for m in models)
    for alpha in (0.0, 0.3, 0.5, 1.0) if max(shape) < 1000 else (0.3,):
        found, exact = applied(formula.__name__, models, alpha=alpha), formula(a, b, alpha=alpha)
        if formula is euclidean_add:  # where the sum is nothing, the last bit decides the sign
            clear = torch.as_tensor(abs((1 - alpha) * a + alpha * b) > 1e-6)
            assert torch.equal(found.sign()[clear].double(), torch.as_tensor(exact).sign()[clear])
            found, exact = found.abs(), abs(exact)
        assert_near(found, exact, [m * 4 for m in models], ulps=2)


@three_dtypes
def test_where_signs_differ_a_geometric_mean_turns_from_one_to_the_other(dtype: torch.dtype) -> None:
    a, b = torch.tensor([4.0, 4.0, -4.0, -4.0], dtype=dtype), torch.tensor([9.0, -9.0, 9.0, -9.0], dtype=dtype)
    assert applied("geometric_sum", [a, b]).tolist() == [6.0, 0.0, 0.0, -6.0]
    assert same_bits(applied("geometric_sum", [a, b], alpha=0), a)
    assert same_bits(applied("geometric_sum", [a, b], alpha=1), b)


@three_dtypes
def test_zeros_in_any_place_are_their_formulas_too(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 1.0, -1.0, 0.5, 3.0], dtype=dtype)
    models = [m.reshape(-1).clone() for m in torch.meshgrid(values, values, indexing="ij")]
    a, b = (m.double().numpy() for m in models)
    for formula in (geometric_sum, multiply_difference, euclidean_add):
        for alpha in (0.0, 0.25, 0.5, 1.0):
            found = applied(formula.__name__, models, alpha=alpha)
            assert_near(found, formula(a, b, alpha), [m * 4 + 1 for m in models], ulps=2)


@three_dtypes
def test_the_signs_of_a_multiplied_difference_are_those_of_the_sum_that_beta_weights(dtype: torch.dtype) -> None:
    models = [random((40, 48), dtype, seed) for seed in range(2)]
    a, b = (m.double().numpy() for m in models)
    for beta in (0.0, 0.2, 1.0):
        found = applied("multiply_difference", models, beta=beta)
        assert_near(found, multiply_difference(a, b, beta=beta), models, ulps=2)


@three_dtypes
def test_a_euclidean_sum_has_the_length_of_the_sum(dtype: torch.dtype) -> None:
    a, b = random((1100, 1024), dtype, 0), random((1100, 1024), dtype, 1, 0.01)
    found = applied("euclidean_add", [a, b], dtype=torch.float64, alpha=0.3).norm()
    assert torch.allclose(found, (0.7 * a.double() + 0.3 * b.double()).norm(), rtol=1e-6)


@three_dtypes
def test_where_a_difference_is_nothing_the_other_is_left_at_its_weight(dtype: torch.dtype) -> None:
    a, nothing = random((40, 48), dtype), torch.zeros((40, 48), dtype=dtype)
    assert_near(applied("euclidean_add", [a, nothing], alpha=0.25), 0.75 * a.double(), [a])
    assert_near(applied("euclidean_add", [nothing, a], alpha=0.25), 0.25 * a.double(), [a])
    assert (applied("euclidean_add", [nothing, a], alpha=0) == 0).all()
    assert (applied("euclidean_add", [a, -a]) == 0).all()


@pytest.mark.parametrize("name", ["geometric_sum", "multiply_difference", "euclidean_add"])
@pytest.mark.parametrize("alpha", [-0.5, 1.5])
def test_an_alpha_that_makes_powers_or_roots_of_less_than_0_is_refused(name: str, alpha: float) -> None:
    with pytest.raises(UsageError) as caught:
        applied(name, [random((4,)), random((4,), seed=1)], alpha=alpha)
    assert str(caught.value) == f"{name}, alpha: found {alpha:g}, expected a number from 0 to 1"
