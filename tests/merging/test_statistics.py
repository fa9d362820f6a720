"""Means by what a model saw: each method against the problem that it solves, in numpy's float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from applying import DTYPES, SHAPES, applied, assert_near, random

from weightops.errors import MismatchError, UsageError
from weightops.merging.method import METHODS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.float64]

WEIGHTS = (1.0, 0.5, 2.0)
every_method = pytest.mark.parametrize("name", ["fisher", "regmean"])
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def wide(models: Sequence[Tensor]) -> list[Array]:
    return [m.double().numpy() for m in models]


def mean(models: Sequence[Tensor], weights: Sequence[float] = WEIGHTS) -> Array:
    return np.average(np.stack(wide(models)), axis=0, weights=weights)


def informations(shape: Sequence[int]) -> list[Tensor]:
    """Of a few orders of magnitude, some of them below the floor."""
    return [(random(shape, seed=n + 50) * 4 - 4).exp() for n in range(3)]


def inputs(count: int, samples: int = 200) -> list[Tensor]:
    """What a layer sees in each model: correlated, and of channels that differ by orders of magnitude."""
    scales = (random((count,), seed=77) * 2).exp()
    mixed = random((count, count), seed=78) / math.sqrt(count)
    return [random((samples, count), seed=n + 60) @ (torch.eye(count) + mixed) * scales for n in range(3)]


def grams(xs: Sequence[Tensor]) -> list[Tensor]:
    return [x.T @ x for x in xs]


def regmean(models: Sequence[Tensor], statistics: Sequence[Tensor]) -> Array:
    """As in the paper, where a weight is [in, out]: (Σ Gᵢ)⁻¹·Σ Gᵢ·Wᵢ, of Gᵢ with 0.9 of what is off their diagonals."""
    left, right = np.zeros(statistics[0].shape), np.zeros(())
    for model, gram, weight in zip(wide(models), wide(statistics), WEIGHTS, strict=True):
        scaled = weight * (0.9 * gram + 0.1 * np.diag(np.diag(gram)))
        left = left + scaled
        right = right + scaled @ model.reshape(len(model), -1).T
    return np.linalg.solve(left, right).T.reshape(models[0].shape)


# ------------------------------------------------------------------------------------------------ fisher


@every_shape
@every_dtype
def test_fisher_is_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    models, information = [random(shape, dtype, n) for n in range(3)], informations(shape)
    floored = [np.maximum(f, 1e-3) for f in wide(information)]
    above = sum(w * f * m for w, f, m in zip(WEIGHTS, floored, wide(models), strict=True))
    exact = above / sum(w * f for w, f in zip(WEIGHTS, floored, strict=True))
    found = applied("fisher", models, statistics=information, weights=WEIGHTS, floor=1e-3)
    assert_near(found, exact, models, 4.0)


def test_the_model_with_all_information_gives_the_value() -> None:
    a, b = random((40, 48), torch.float64, 1), random((40, 48), torch.float64, 2)
    chosen = random((40, 48), seed=3) > 0
    information = [torch.where(chosen, 1e9, 0.0), torch.where(chosen, 0.0, 1e9)]
    assert torch.allclose(applied("fisher", [a, b], statistics=information), torch.where(chosen, a, b), rtol=1e-12)


def test_information_below_the_floor_is_all_alike() -> None:
    models = [random((40, 48), torch.float64, n) for n in range(3)]
    information = [i * 1e-12 for i in informations((40, 48))]
    found = applied("fisher", models, statistics=information, weights=WEIGHTS)
    assert np.allclose(found.numpy(), mean(models), rtol=1e-13, atol=1e-15)


def test_a_floor_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError) as error:
        METHODS.get("fisher").check({"floor": 0}, 2)
    assert str(error.value) == "fisher, floor: found 0, expected more than 0"


# ------------------------------------------------------------------------------------------------ regmean


@pytest.mark.parametrize("shape", [(40, 48), (16, 8, 3, 3), (48, 1), (1, 40), (300, 256)], ids=str)
@every_dtype
def test_regmean_is_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    models = [random(shape, dtype, n) for n in range(3)]
    statistics = grams(inputs(math.prod(shape[1:])))
    exact = regmean(models, statistics)
    assert_near(
        applied("regmean", models, statistics=statistics, weights=WEIGHTS), exact, [*models, torch.tensor(exact)]
    )


def test_its_outputs_are_nearest_to_those_of_every_model() -> None:
    """With off_diagonal 1 it solves the least squares, over all samples, from which the paper derives it."""
    models, xs = [random((40, 48), torch.float64, n) for n in range(3)], [x.double() for x in inputs(48)]
    wanted = np.concatenate([x.numpy() @ m.T.numpy() for x, m in zip(xs, models, strict=True)])
    exact = np.linalg.lstsq(np.concatenate(wide(xs)), wanted, rcond=None)[0].T
    found = applied("regmean", models, statistics=grams(xs), off_diagonal=1)
    assert np.allclose(found.numpy(), exact, rtol=1e-9, atol=1e-9)


def test_with_the_diagonal_alone_each_input_is_averaged_by_how_much_of_it_was_seen() -> None:
    models, statistics = [random((40, 48), torch.float64, n) for n in range(3)], grams(inputs(48))
    shares = np.stack([np.diag(g) * w for g, w in zip(wide(statistics), WEIGHTS, strict=True)])
    exact = np.einsum("mi,moi->oi", shares / shares.sum(0), np.stack(wide(models)))
    found = applied("regmean", models, statistics=statistics, weights=WEIGHTS, off_diagonal=0)
    assert np.allclose(found.numpy(), exact, rtol=1e-12, atol=1e-14)


def test_inputs_that_no_model_saw_are_averaged() -> None:
    models, xs = [random((40, 48), torch.float64, n) for n in range(3)], inputs(48)
    for x in xs:
        x[:, 7] = 0
    xs[1][:, 9] = 0
    found = applied("regmean", models, statistics=grams(xs), weights=WEIGHTS)
    assert np.allclose(found[:, 7].numpy(), mean(models)[:, 7], rtol=1e-13, atol=1e-15)
    seen = [n for n in range(48) if n != 7]
    exact = regmean([m[:, seen] for m in models], [g[seen][:, seen] for g in grams(xs)])
    assert np.allclose(found[:, seen].numpy(), exact, rtol=1e-9, atol=1e-10)


def test_fewer_samples_than_inputs_are_enough() -> None:
    models, statistics = [random((40, 48), torch.float64, n) for n in range(3)], grams(inputs(48, samples=5))
    found = applied("regmean", models, statistics=statistics, weights=WEIGHTS)
    assert np.allclose(found.numpy(), regmean(models, statistics), rtol=1e-7, atol=1e-7)
    with pytest.raises(MismatchError) as error:
        applied("regmean", models, statistics=statistics, off_diagonal=1)
    assert str(error.value) == "regmean: the inner products of the inputs, added up, have no inverse"
    assert error.value.hint == "take an off_diagonal below 1, and statistics of more inputs"


def test_models_that_are_nearly_alike_keep_their_digits() -> None:
    """Whatever the inputs: their inverse is taken of the differences alone."""
    a = random((40, 48), torch.float32, 1)
    models = [a, a + 1e-4 * random((40, 48), seed=2), a]
    statistics = grams(inputs(48))
    assert_near(applied("regmean", models, statistics=statistics, weights=WEIGHTS), regmean(models, statistics), [a])
    assert torch.equal(applied("regmean", [a, a, a], statistics=statistics), a)


def test_what_is_no_matrix_is_averaged() -> None:
    models = [random((40,), torch.float64, n) for n in range(3)]
    found = applied("regmean", models, statistics=[torch.eye(40)] * 3, weights=WEIGHTS)
    assert np.allclose(found.numpy(), mean(models), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_an_off_diagonal_that_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(UsageError) as error:
        METHODS.get("regmean").check({"off_diagonal": share}, 2)
    assert str(error.value) == f"regmean, off_diagonal: found {share:g}, expected a number from 0 to 1"


# ------------------------------------------------------------------------------------------------ both


def statistics_of(name: str, shape: Sequence[int]) -> list[Tensor]:
    return informations(shape) if name == "fisher" else grams(inputs(math.prod(shape[1:])))


@every_method
@pytest.mark.parametrize("without", [(0,), (1, 2), (0, 1, 2)])
def test_where_a_model_has_no_statistics_it_is_the_mean(name: str, without: tuple[int, ...]) -> None:
    models = [random((40, 48), torch.float64, n) for n in range(3)]
    given = [None if n in without else s for n, s in enumerate(statistics_of(name, (40, 48)))]
    found = applied(name, models, statistics=given, weights=WEIGHTS)
    assert np.allclose(found.numpy(), mean(models), rtol=1e-14, atol=1e-15)


@every_method
@every_dtype
def test_models_that_are_equal_give_themselves(name: str, dtype: torch.dtype) -> None:
    model = random((40, 48), dtype)
    assert torch.equal(applied(name, [model] * 3, statistics=statistics_of(name, (40, 48)), weights=WEIGHTS), model)


@every_method
def test_a_model_of_all_weight_is_the_result(name: str) -> None:
    models = [random((40, 48), torch.float64, n) for n in range(3)]
    found = applied(name, models, statistics=statistics_of(name, (40, 48)), weights=(0, 1, 0))
    assert torch.allclose(found, models[1], rtol=0, atol=1e-9)


@every_method
def test_nan_is_not_lost_and_stays_in_its_row(name: str) -> None:
    models = [random((40, 48), torch.float32, n) for n in range(3)]
    clean = applied(name, models, statistics=statistics_of(name, (40, 48)))
    models[1][3, 4] = math.nan
    found = applied(name, models, statistics=statistics_of(name, (40, 48)))
    assert found[3, 4].isnan()
    assert torch.allclose(found[4:], clean[4:])


@every_method
def test_statistics_of_another_tensor_are_refused(name: str) -> None:
    models = [random((40, 48), seed=n) for n in range(3)]
    given = [torch.ones(48, 40)] * 3
    with pytest.raises(MismatchError, match=rf"^{name}: found statistics of shape \[48, 40\], expected \["):
        applied(name, models, statistics=given)


@every_method
def test_statistics_are_never_changed(name: str) -> None:
    models, given = [random((40, 48), seed=n) for n in range(3)], statistics_of(name, (40, 48))
    before = [g.clone() for g in given]
    applied(name, models, statistics=given)
    assert all(map(torch.equal, given, before))


@every_method
def test_weights_that_are_no_shares_are_refused(name: str) -> None:
    with pytest.raises(UsageError) as error:
        METHODS.get(name).check({"weights": (1, -2)}, 2)
    assert str(error.value) == f"{name}, weights: found -2, expected none below 0"
