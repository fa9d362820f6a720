"""Arcs and centres on the sphere: each method against its definition on vectors, in numpy's longest floats."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from applying import DTYPES, SHAPES, applied, assert_near, looked, random

from weightops.errors import MismatchError, UsageError
from weightops.merging.method import METHODS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.floating[Any]]

TWO = ("slerp", "nuslerp", "nuslerp_rows")
ANY = ("multislerp", "karcher")
every_method = pytest.mark.parametrize("name", [*TWO, *ANY])
every_whole = pytest.mark.parametrize("name", ["slerp", "nuslerp", *ANY])
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def long(model: Tensor) -> Array:
    """In 80 bits; large ones, for the time it takes, in float64."""
    wide: Array = model.double().numpy()
    return wide.astype(np.longdouble) if wide.size < 100_000 else wide


def norm(x: Array) -> Any:
    return np.sqrt(np.sum(x * x))


def angle(u: Array, v: Array) -> Any:
    """Between two unit vectors, near 0 and near π to the last digit (Kahan)."""
    return 2 * np.arctan2(norm(u - v), norm(u + v))


def sines(a: Array, b: Array, t: float) -> tuple[Array, Array]:
    """The two terms of Shoemake's formula: of directions, as they stand before the two."""
    if not (norm(a) and norm(b)):
        return (1 - np.longdouble(t)) * np.ones(()), np.longdouble(t) * np.ones(())
    omega = angle(a / norm(a), b / norm(b))
    if not omega:
        return (1 - np.longdouble(t)) * np.ones(()), np.longdouble(t) * np.ones(())
    return np.sin((1 - np.longdouble(t)) * omega) / np.sin(omega), np.sin(t * omega) / np.sin(omega)


def slerp(a: Array, b: Array, t: float) -> Array:
    first, second = sines(a, b, t)
    if not (norm(a) and norm(b)):
        return first * a + second * b
    length = (1 - t) * norm(a) + t * norm(b)
    return length * (first * a / norm(a) + second * b / norm(b))


def nuslerp(a: Array, b: Array, t: float) -> Array:
    first, second = sines(a, b, t)
    return first * a + second * b


def nuslerp_rows(a: Array, b: Array, t: float) -> Array:
    if a.ndim < 2:
        return nuslerp(a, b, t)
    return np.stack([nuslerp(x, y, t) for x, y in zip(a, b, strict=True)])


REFERENCES = {"slerp": slerp, "nuslerp": nuslerp, "nuslerp_rows": nuslerp_rows}


def logarithm(m: Array, u: Array) -> Array:
    """The tangent at m that leads to u."""
    across = u - np.sum(m * u) * m
    return across * (angle(m, u) / norm(across)) if norm(across) else across


def exponential(m: Array, tangent: Array) -> Array:
    if not norm(tangent):
        return m
    return np.cos(norm(tangent)) * m + np.sin(norm(tangent)) * tangent / norm(tangent)


def centre(models: Sequence[Array], weights: Sequence[float], steps: int) -> Array:
    shares = [np.longdouble(w) / np.longdouble(sum(weights)) for w in weights]
    length = sum(s * norm(x) for s, x in zip(shares, models, strict=True))
    kept = [(s, x / norm(x)) for s, x in zip(shares, models, strict=True) if norm(x)]
    if not kept:
        return np.zeros_like(models[0])
    m = sum(s * u for s, u in kept)
    m = m / norm(m)
    for _ in range(steps):
        total = sum(s for s, _ in kept)
        m = exponential(m, sum(s / total * logarithm(m, u) for s, u in kept))
    return length * m


# ------------------------------------------------------------------------------------------------ the formulas


@pytest.mark.parametrize("name", TWO)
@every_shape
@every_dtype
def test_of_two_models_it_is_the_formula(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b = random(shape, dtype, 1), random(shape, dtype, 2, 0.7)
    if a.numel() == 1:
        b = b.copysign(a)
    exact = REFERENCES[name](long(a), long(b), 0.3)
    # The terms of rows are computed in float32, where the values are.
    ulps = 4.0 if name == "nuslerp_rows" and dtype is not torch.float32 else 1.0
    assert_near(applied(name, [a, b], weights=(1.4, 0.6)), exact.astype(np.float64), [a, b], ulps)


@pytest.mark.parametrize(("name", "steps"), [("multislerp", 1), ("karcher", 2)])
@every_shape
@every_dtype
def test_of_many_models_it_is_the_centre(name: str, steps: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    models = [random(shape, dtype, n, 1.0 + n) for n in range(3)]
    if models[0].numel() == 1:
        models = [m.abs() for m in models]
    weights = (1.0, 0.25, 2.0)
    exact = centre([long(m) for m in models], weights, steps)
    settings: dict[str, Any] = {"tol": 0, "max_iter": steps} if name == "karcher" else {}
    assert_near(applied(name, models, weights=weights, **settings), exact.astype(np.float64), models)


def test_karcher_stops_at_max_iter_and_at_tol() -> None:
    models = [random((40, 48), torch.float64, n) + 0.3 for n in range(3)]
    exact = [centre([long(m) for m in models], (1, 1, 1), steps).astype(np.float64) for steps in range(5)]
    found = [applied("karcher", models, tol=0, max_iter=n).numpy() for n in range(1, 5)]
    for n in range(4):
        assert np.allclose(found[n], exact[n + 1], rtol=1e-13, atol=1e-13)
        assert not np.allclose(found[n], exact[n], rtol=1e-13, atol=1e-13)
    # No step is as long as this one.
    assert np.array_equal(applied("karcher", models, tol=10.0).numpy(), found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["F32", "F64"])
def test_at_the_centre_all_pulls_cancel_out(dtype: torch.dtype) -> None:
    models, weights = [random((40, 48), dtype, n) + 0.1 * n for n in range(5)], (1.0, 3.0, 0.5, 2.0, 1.0)
    found = long(applied("karcher", models, weights=weights, tol=0, max_iter=60))
    m = found / norm(found)
    units = [long(x) / norm(long(x)) for x in models]
    pull = sum(w * logarithm(m, u) for w, u in zip(weights, units, strict=True))
    assert norm(pull) < (1e-6 if dtype is torch.float32 else 1e-13)


def test_karcher_of_two_is_slerp() -> None:
    a, b = random((40, 48), torch.float64, 1), random((40, 48), torch.float64, 2, 3.0)
    for weights in [(1.0, 1.0), (0.9, 0.1), (1.0, 2.0)]:
        exact = applied("slerp", [a, b], weights=weights)
        assert torch.allclose(
            applied("karcher", [a, b], weights=weights, tol=0, max_iter=60), exact, rtol=0, atol=1e-13
        )
        assert torch.allclose(applied("karcher", [a, b], weights=weights), exact, rtol=0, atol=1e-4)


def test_of_models_of_equal_length_nuslerp_is_slerp() -> None:
    a, b = random((40, 48), torch.float64, 1), random((40, 48), torch.float64, 2)
    b *= a.norm() / b.norm()
    expected = applied("slerp", [a, b], weights=(0.3, 0.7))
    assert torch.allclose(applied("nuslerp", [a, b], weights=(0.3, 0.7)), expected, rtol=1e-13, atol=1e-15)


# ------------------------------------------------------------------------------------------------ angles


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("apart", [1e-1, 1e-3, 1e-5, 1e-7, 1e-9, 1e-12, 0.0])
def test_models_that_are_nearly_parallel_keep_their_digits(name: str, apart: float) -> None:
    """As raw weights of one family are: an angle from its cosine would be noise below 1e-8."""
    a = random((60, 50), torch.float64, 1)
    b = a + apart * random((60, 50), torch.float64, 2)
    exact = REFERENCES[name](long(a), long(b), 0.3)
    assert np.abs(applied(name, [a, b], weights=(0.7, 0.3)).numpy() - exact).max() < 4e-15


@every_whole
def test_the_numbers_of_models_are_those_of_the_formula_to_float64_s_last_digits(name: str) -> None:
    """Found from inner products alone; so they are what LoRAs, as products, are taken with."""
    method = METHODS.get(name)
    for apart in (1e-6, 1e-3, 1e-1, 1.0, 30.0):
        a = random((60, 50), torch.float64, 1)
        b = 0.8 * a + apart * random((60, 50), torch.float64, 2)
        parameters = method.check({"weights": (0.7, 0.3)}, 2)
        found = looked(method, [a, b], parameters)
        numbers = method.function(*torch.eye(2, dtype=torch.float64), **parameters, **found)
        exact = REFERENCES[name](long(a), long(b), 0.3) if name in TWO else centre([long(a), long(b)], (0.7, 0.3), 1)
        result = numbers[0].item() * long(a) + numbers[1].item() * long(b)
        assert norm(result - exact) < (1e-4 if name == "karcher" else 1e-14) * norm(exact)


@pytest.mark.parametrize("name", TWO)
def test_models_that_are_nearly_opposite_keep_their_digits_too(name: str) -> None:
    a = random((60, 50), torch.float64, 1)
    b = -a + 0.01 * random((60, 50), torch.float64, 2)
    exact = REFERENCES[name](long(a), long(b), 0.3)
    assert np.abs(applied(name, [a, b], weights=(0.7, 0.3)).numpy() - exact).max() < 1e-9


@every_whole
def test_opposite_models_are_refused(name: str) -> None:
    a = random((40, 48), torch.float32, 1)
    with pytest.raises(MismatchError) as error:
        applied(name, [a, -2 * a])
    expected = f"{name}: models point in opposite directions, and no arc between them is shorter than the others"
    assert str(error.value) == expected
    assert error.value.hint == "leave one of them out, or take weighted_sum"


@pytest.mark.parametrize("name", ANY)
def test_a_model_opposite_to_the_mean_of_others_is_refused(name: str) -> None:
    a = random((40, 48), torch.float32, 1)
    with pytest.raises(MismatchError, match="opposite directions"):
        applied(name, [a, a, a, -a])


@pytest.mark.parametrize("name", ANY)
def test_a_model_of_no_weight_has_no_say(name: str) -> None:
    a = random((40, 48), torch.float32, 1)
    assert torch.allclose(applied(name, [a, -a, 3 * a], weights=(1, 0, 1)), 2 * a)


@every_method
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1, 1)])
def test_one_value_has_no_direction_and_is_the_mean(name: str, shape: tuple[int, ...]) -> None:
    models = [torch.full(shape or (1,), 3.0), torch.full(shape or (1,), -1.0)]
    assert applied(name, models, weights=(0.25, 0.75)).item() == 0.0
    assert applied(name, models, weights=(0.75, 0.25)).item() == 2.0


def test_rows_that_are_opposite_are_taken_linearly() -> None:
    a, b = random((6, 50), torch.float64, 1), random((6, 50), torch.float64, 2)
    b[2], b[4] = -a[2], -3 * a[4] + 1e-6
    found = applied("nuslerp_rows", [a, b], weights=(0.6, 0.4))
    exact = nuslerp_rows(long(a), long(b), 0.4).astype(np.float64)
    for row in (2, 4):
        exact[row] = (0.6 * a[row] + 0.4 * b[row]).numpy()
    assert np.allclose(found.numpy(), exact, rtol=1e-13, atol=1e-13)


# ------------------------------------------------------------------------------------------------ nothing, and NaN


@every_method
def test_of_a_zero_model_only_its_length_counts(name: str) -> None:
    a, zero = random((40, 48), torch.float64, 1), torch.zeros(40, 48, dtype=torch.float64)
    for models, share in [((a, zero), 0.3), ((zero, a), 0.7)]:
        assert torch.allclose(applied(name, models, weights=(0.3, 0.7)), share * a, rtol=1e-14, atol=0)
    assert torch.equal(applied(name, [zero, zero]), zero)


def test_a_row_of_zeros_is_taken_linearly() -> None:
    a, b = random((6, 50), torch.float32, 1), random((6, 50), torch.float32, 2)
    a[1], b[3] = 0, 0
    a[5] = b[5] = 0
    found = applied("nuslerp_rows", [a, b], weights=(0.25, 0.75))
    assert torch.equal(found[[1, 3, 5]], 0.25 * a[[1, 3, 5]] + 0.75 * b[[1, 3, 5]])


@pytest.mark.parametrize("name", ANY)
def test_a_zero_model_among_others_pulls_no_direction(name: str) -> None:
    a, b = random((40, 48), torch.float64, 1), random((40, 48), torch.float64, 2)
    zero = torch.zeros_like(a)
    without = applied(name, [a, b], weights=(1, 2))
    assert torch.allclose(applied(name, [a, zero, b], weights=(1, 3, 2)), without / 2, rtol=1e-13, atol=1e-15)


@every_method
def test_a_weight_of_all_is_that_model(name: str) -> None:
    a, b = random((40, 48), torch.float32, 1), random((40, 48), torch.float32, 2, 5.0)
    assert torch.equal(applied(name, [a, b], weights=(1, 0)), a)
    assert torch.equal(applied(name, [a, b], weights=(0, 0.1)), b)


@every_method
def test_weights_are_shares(name: str) -> None:
    models = [random((40, 48), torch.float32, n) for n in range(2)]
    assert torch.equal(applied(name, models, weights=(0.5, 1.5)), applied(name, models, weights=(2, 6)))


@every_method
def test_nan_is_not_lost(name: str) -> None:
    a, b = random((40, 48), torch.float32, 1), random((40, 48), torch.float32, 2)
    b[3, 4] = math.nan
    assert applied(name, [a, b])[3, 4].isnan()
    assert applied(name, [b, a])[3, 4].isnan()


# ------------------------------------------------------------------------------------------------ refusals


@every_method
@pytest.mark.parametrize(
    ("weights", "what"),
    [((0.5, -0.1), "found -0.1, expected none below 0"), ((0.0, 0.0), "found 0 for all, expected one above 0")],
)
def test_weights_that_are_no_shares_are_refused(name: str, weights: tuple[float, ...], what: str) -> None:
    with pytest.raises(UsageError) as error:
        METHODS.get(name).check({"weights": weights}, 2)
    assert str(error.value) == f"{name}, weights: {what}"


@pytest.mark.parametrize("name", TWO)
def test_more_or_fewer_than_two_models_are_refused(name: str) -> None:
    for count in (1, 3):
        with pytest.raises(UsageError) as error:
            METHODS.get(name).check({}, count)
        assert str(error.value) == f"{name}: found {count} models, expected two"


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"max_iter": 0}, "karcher, max_iter: found 0, expected a number from 1 on"),
        ({"tol": -1}, "karcher, tol: found -1, expected a number from 0 on"),
    ],
)
def test_settings_of_karcher_that_make_no_sense_are_refused(settings: dict[str, float], what: str) -> None:
    with pytest.raises(UsageError) as error:
        METHODS.get("karcher").check(settings, 3)
    assert str(error.value) == what
