"""What is new in each, how far they agree, what is in their middle: each method against its formula on vectors."""

from __future__ import annotations

import math
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from applying import DTYPES, SHAPES, applied, assert_near, looked, random

from weightops.errors import UsageError
from weightops.merging.method import METHODS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.float64]

NAMES = ("orthogonal", "model_stock", "model_stock_rows", "geometric_median")
every_method = pytest.mark.parametrize("name", NAMES)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def wide(models: Sequence[Tensor]) -> list[Array]:
    return [m.double().numpy() for m in models]


def alike(shape: Sequence[int], dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    """Models that share a part, as those of one task do."""
    part = random(shape, seed=99)
    return [(part + random(shape, seed=n, scale=0.5 + 0.5 * n)).to(dtype) for n in range(count)]


def orthogonal(models: Sequence[Array], weights: Sequence[float]) -> Array:
    """By Householder's QR: what is new in a column is its part along the basis vector that it adds."""
    columns = np.stack([m.ravel() for m in models], 1)
    if columns.shape[0] < columns.shape[1]:
        return weights[0] * models[0]  # of one value the first says all
    basis, triangle = np.linalg.qr(columns)
    return np.reshape(basis @ (np.diag(triangle) * weights), models[0].shape)


def model_stock(models: Sequence[Array], _weights: Sequence[float] = ()) -> Array:
    count = len(models)
    cosines = [np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)) for a, b in combinations(models, 2)]
    cosine = max(sum(cosines) / len(cosines), 0.0)
    return count * cosine / (1 + (count - 1) * cosine) * sum(models) / count


def model_stock_rows(models: Sequence[Array], _weights: Sequence[float] = ()) -> Array:
    if models[0].ndim < 2:
        return model_stock(models)
    return np.stack([model_stock(rows) for rows in zip(*models, strict=True)])


def geometric_median(models: Sequence[Array], weights: Sequence[float]) -> Array:
    median = sum(w * m for w, m in zip(weights, models, strict=True)) / sum(weights)
    for _ in range(100):
        pulls = [w / max(math.sqrt(np.sum((m - median) ** 2)), 1e-6) for w, m in zip(weights, models, strict=True)]
        median = sum(p * m for p, m in zip(pulls, models, strict=True)) / sum(pulls)
    return median


REFERENCES = {
    "orthogonal": orthogonal,
    "model_stock": model_stock,
    "model_stock_rows": model_stock_rows,
    "geometric_median": geometric_median,
}


def weighted(name: str, weights: Sequence[float]) -> dict[str, Any]:
    return {} if name.startswith("model_stock") else {"weights": weights}


# ------------------------------------------------------------------------------------------------ the formulas


@pytest.mark.parametrize("name", NAMES[:3])
@every_shape
@every_dtype
def test_it_is_the_formula(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    models, weights = alike(shape, dtype), (1.0, 0.5, -2.0)
    exact = REFERENCES[name](wide(models), weights)
    # Of three models with numbers of up to 3, four last places of float32 are lost where they cancel out.
    assert_near(applied(name, models, **weighted(name, weights)), exact, models, 4.0 if name == "orthogonal" else 1.0)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@every_dtype
def test_it_is_the_geometric_median(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    models, weights = alike(shape, dtype), (1.0, 0.5, 1.2)
    exact = geometric_median(wide(models), weights)
    assert_near(applied("geometric_median", models, weights=weights), exact, models)


def test_the_geometric_median_of_a_large_tensor_is_that_of_all_its_parts() -> None:
    models = alike(SHAPES[-1], torch.bfloat16)
    found = looked(METHODS.get("geometric_median"), models, {"weights": (1, 1, 1), "eps": 1e-6, "max_iter": 100})
    numbers = METHODS.get("geometric_median").function(*torch.eye(3).double(), weights=(1, 1, 1), **found)
    median = sum(n.item() * m.double() for n, m in zip(numbers, models, strict=True))
    distances = torch.stack([(m.double() - median).norm() for m in models])
    pull = sum((m.double() - median) / d for m, d in zip(models, distances, strict=True))
    assert pull.norm() < 1e-9
    assert_near(applied("geometric_median", models), median, models)


# ------------------------------------------------------------------------------------------------ orthogonal


def test_what_is_new_in_each_is_at_right_angles_to_all_before_it() -> None:
    models = [m.double() for m in alike((40, 48), torch.float64, 4)]
    news = [applied("orthogonal", models[: n + 1], weights=[0.0] * n + [1.0]) for n in range(4)]
    for a, b in combinations(news, 2):
        assert abs(float((a * b).sum())) < 1e-12 * float(a.norm() * b.norm())
    assert torch.equal(news[0], models[0])


def test_of_a_sum_of_those_before_it_nothing_is_left() -> None:
    a, b = random((40, 48), torch.float64, 1), random((40, 48), torch.float64, 2)
    two = applied("orthogonal", [a, b])
    assert torch.allclose(applied("orthogonal", [a, b, 0.3 * a - 2 * b]), two, rtol=0, atol=1e-14)
    assert torch.allclose(applied("orthogonal", [a, -2 * a]), a, rtol=0, atol=1e-14)
    assert torch.equal(applied("orthogonal", [a, torch.zeros_like(a)]), a)
    assert torch.equal(applied("orthogonal", [torch.zeros_like(a), a]), a)


def test_what_rounding_leaves_is_no_news() -> None:
    numbers = METHODS.get("orthogonal").function(*torch.eye(2), weights=(1, 1), found=[[1.0, 1.0], [1.0, 1.0 + 1e-14]])
    assert numbers.tolist() == [1.0, 0.0]


# ------------------------------------------------------------------------------------------------ model stock


def test_models_of_one_direction_are_averaged_and_those_at_right_angles_left_out() -> None:
    a = torch.zeros(40, 48, dtype=torch.float64)
    b = a.clone()
    a[0], b[1] = 1, 1
    for name in ("model_stock", "model_stock_rows"):
        assert torch.allclose(applied(name, [a, 3 * a]), 2 * a, rtol=1e-15, atol=0)
        assert not applied(name, [a, b]).any()


@pytest.mark.parametrize("name", ["model_stock", "model_stock_rows"])
def test_models_that_disagree_leave_the_base(name: str) -> None:
    """The formula is no longer bounded there: of two opposite ones it is without end."""
    a, b = random((40, 48), torch.float64, 1), random((40, 48), torch.float64, 2)
    for models in ([a, -a], [a, -a + 0.1 * b], [a, -0.5 * a + b.abs(), -0.5 * a - b.abs()]):
        assert not applied(name, models).any()


@pytest.mark.parametrize("name", ["model_stock", "model_stock_rows"])
def test_differences_may_be_small(name: str) -> None:
    models = alike((40, 48), torch.float64)
    small = [m * 1e-9 for m in models]
    assert torch.allclose(applied(name, small), applied(name, models) * 1e-9, rtol=1e-13, atol=0)


def test_each_row_goes_by_its_own_angle() -> None:
    models = alike((6, 50), torch.float64)
    models[1][2] = -models[0][2]
    models[2][4] = 0
    found, exact = applied("model_stock_rows", models), model_stock_rows(wide(models[:2]), ())
    alone = [applied("model_stock", [m[row] for m in models]) for row in range(6)]
    assert torch.allclose(found, torch.stack(alone), rtol=1e-13, atol=1e-15)
    assert not np.allclose(found.numpy(), exact)


# ------------------------------------------------------------------------------------------------ geometric median


def test_one_far_away_pulls_no_more_than_one_nearby() -> None:
    models = alike((40, 48), torch.float64, 4)
    far = [applied("geometric_median", [*models, 1e3**n * torch.ones(40, 48, dtype=torch.float64)]) for n in (1, 2)]
    assert (far[0] - far[1]).norm() < 0.01 * (models[0] - models[1]).norm()


def test_a_model_of_more_than_half_of_all_weight_is_the_median() -> None:
    models = alike((40, 48), torch.float64)
    found = applied("geometric_median", models, weights=(1.0, 3.0, 1.0))
    assert (found - models[1]).norm() < 1e-5
    assert torch.allclose(applied("geometric_median", models[:2]), (models[0] + models[1]) / 2, rtol=0, atol=1e-14)


def test_differences_far_smaller_than_the_models_count() -> None:
    """As of models of one family, whose inner products agree in the first ten digits."""
    a = random((60, 50), torch.float64, 7)
    models = [a + 1e-5 * m for m in alike((60, 50), torch.float64)]
    exact = geometric_median(wide(models), (1, 1, 1))
    assert np.abs(applied("geometric_median", models).numpy() - exact).max() < 1e-9


def test_max_iter_and_eps_do_what_they_say() -> None:
    models = alike((40, 48), torch.float64)
    mean = sum(models) / 3
    assert torch.allclose(applied("geometric_median", models, max_iter=0), mean, rtol=0, atol=1e-14)
    assert torch.allclose(applied("geometric_median", models, eps=1e6), mean, rtol=0, atol=1e-14)
    assert not torch.allclose(applied("geometric_median", models, max_iter=1), mean, rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------------------ all of them


@every_method
def test_the_numbers_of_models_give_the_result(name: str) -> None:
    """So that LoRAs may be combined as products; not so of rows, of which each has its own."""
    method, models = METHODS.get(name), alike((40, 48), torch.float64)
    parameters = method.check({}, 3)
    found = looked(method, models, parameters)
    if name == "model_stock_rows":
        assert not method.linear
        return
    numbers = method.function(*torch.eye(3, dtype=torch.float64), **parameters, **found)
    result = sum(n * m for n, m in zip(numbers, models, strict=True))
    assert torch.allclose(result, applied(name, models), rtol=0, atol=1e-13)


@every_method
def test_models_of_nothing_give_nothing(name: str) -> None:
    zero = torch.zeros(6, 50)
    assert torch.equal(applied(name, [zero, zero, zero]), zero)


@every_method
def test_nan_is_not_lost(name: str) -> None:
    for spoilt in (math.nan, math.inf):
        models = alike((6, 50), torch.float32)
        models[1][3, 4] = spoilt
        assert not applied(name, models)[3, 4].isfinite()


@pytest.mark.parametrize("name", ["model_stock", "model_stock_rows"])
def test_one_model_has_no_angle(name: str) -> None:
    with pytest.raises(UsageError) as error:
        METHODS.get(name).check({}, 1)
    assert str(error.value) == f"{name}: found 1 model beside the base, expected two or more"


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"max_iter": -1}, "max_iter: found -1, expected a number from 0 on"),
        ({"eps": 0}, "eps: found 0, expected more than 0"),
        ({"weights": (1, -1, 1)}, "weights: found -1, expected none below 0"),
        ({"weights": (0, 0, 0)}, "weights: found 0 for all, expected one above 0"),
    ],
)
def test_settings_of_the_median_that_make_no_sense_are_refused(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError) as error:
        METHODS.get("geometric_median").check(settings, 3)
    assert str(error.value) == f"geometric_median, {what}"
