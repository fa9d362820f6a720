"""Ridge regression and the nearest neighbour: against scikit-free references, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weightops.errors import FormatError, MismatchError
from weightops.synthesis.baselines import MOST_FOR_SQUARES, Nearest, Ridge, expanded, fit_nearest, fit_ridge


def drawn(n: int, c: int, m: int = 3, noise: float = 0.1, seed: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """Conditions, and latents that are quadratic in the first of them, with noise."""
    draw = np.random.default_rng((seed, n, c))
    conditions = 5 + 3 * draw.standard_normal((n, c))
    first = expanded((conditions[:, :3] - 5) / 3, quadratic=True)
    latents = first @ draw.standard_normal((first.shape[1], m)) + 2
    return conditions, torch.from_numpy(latents + noise * draw.standard_normal((n, m)))


def left_out_by_hand(ridge: Ridge, conditions: np.ndarray, latents: torch.Tensor, penalty: float) -> float:
    """Each member predicted by a regression on all others, in the features' units of the whole; over the variance."""
    features = ridge.features(expanded(ridge.standard(conditions), quadratic=ridge.is_quadratic))
    target = latents.double().numpy()
    error = 0.0
    for i in range(len(features)):
        rest = np.arange(len(features)) != i
        x, y = features[rest], target[rest]
        mean, level = x.mean(0), y.mean(0)
        weights = np.linalg.solve((x - mean).T @ (x - mean) + penalty * np.eye(x.shape[1]), (x - mean).T @ (y - level))
        error += float(((target[i] - level - (features[i] - mean) @ weights) ** 2).sum())
    return error / float(((target - target.mean(0)) ** 2).sum())


@pytest.mark.parametrize(("n", "c"), [(60, 4), (30, 7)], ids=["more members", "more features"])
def test_what_is_left_out_is_what_leaving_each_member_out_gives(n: int, c: int) -> None:
    conditions, latents = drawn(n, c, noise=3.0)
    ridge = fit_ridge(conditions, latents)
    assert ridge.is_quadratic
    assert ridge.left_out == pytest.approx(left_out_by_hand(ridge, conditions, latents, ridge.penalty), rel=1e-8)
    for penalty in (ridge.penalty / 10, ridge.penalty * 10):
        assert left_out_by_hand(ridge, conditions, latents, penalty) > ridge.left_out


@pytest.mark.parametrize(("n", "c"), [(60, 4), (20, 5)], ids=["by features", "by members"])
def test_weights_solve_the_penalised_equations(n: int, c: int) -> None:
    conditions, latents = drawn(n, c)
    ridge = fit_ridge(conditions, latents)
    features = ridge.features(expanded(ridge.standard(conditions), quadratic=True))
    rest = latents.numpy() - ridge.predict(conditions).double().numpy()
    assert np.allclose(features.T @ rest, ridge.penalty * ridge.weights, atol=1e-4)
    assert np.allclose(rest.sum(0), 0, atol=1e-4)


def test_squares_are_learnt_where_they_are_and_noise_is_not() -> None:
    conditions, latents = drawn(200, 4)
    others = drawn(100, 4, seed=0)[0]
    truth = drawn(200, 4, noise=0.0)[1]
    ridge = fit_ridge(conditions, latents)
    assert ridge.left_out < 0.02
    assert float((ridge.predict(conditions) - truth).square().mean().sqrt()) < 0.1
    assert ridge.predict(others).shape == (100, 3)
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal((60, 2)))
    nothing = fit_ridge(conditions[:60], noise)
    assert 0.95 < nothing.left_out < 1.1
    assert nothing.predict(conditions).std(0).max() < 0.3


def test_many_numbers_are_taken_as_they_are() -> None:
    conditions, latents = drawn(30, MOST_FOR_SQUARES + 1)
    ridge = fit_ridge(conditions, latents)
    assert not ridge.is_quadratic
    assert ridge.weights.shape == (MOST_FOR_SQUARES + 1, 3)


def test_a_number_that_never_changes_says_nothing() -> None:
    conditions, latents = drawn(40, 3)
    with_same = np.concatenate([conditions, np.full((40, 1), 7.0)], 1)
    ridge = fit_ridge(with_same, latents)
    moved = with_same.copy()
    assert torch.isfinite(ridge.predict(moved)).all()
    assert ridge.left_out < 0.1


def test_the_nearest_is_the_nearest_in_units_of_deviations() -> None:
    conditions, _ = drawn(50, 3)
    conditions[:, 2] *= 1000
    nearest = fit_nearest(conditions)
    assert nearest.nearest(conditions).tolist() == list(range(50))
    asked = conditions[:20] + 0.3
    apart = (asked[:, None] - conditions[None]) / conditions.std(0)
    assert nearest.nearest(asked).tolist() == (apart**2).sum(-1).argmin(1).tolist()


def test_a_condition_of_another_size_is_refused() -> None:
    conditions, latents = drawn(20, 3)
    for asked in (fit_ridge(conditions, latents).predict, fit_nearest(conditions).nearest):
        with pytest.raises(MismatchError, match="condition: found 5 numbers, expected 3"):
            asked(np.zeros((2, 5)))


def test_both_come_back_from_their_tensors() -> None:
    conditions, latents = drawn(20, 3)
    ridge, nearest = fit_ridge(conditions, latents), fit_nearest(conditions)
    again = Ridge.of(ridge.tensors(), ridge.settings())
    assert torch.equal(again.predict(conditions), ridge.predict(conditions))
    assert (again.penalty, again.left_out) == (ridge.penalty, ridge.left_out)
    same = Nearest.of(nearest.tensors(), nearest.settings())
    assert same.nearest(conditions).tolist() == list(range(20))
    lacking = {name: tensor for name, tensor in ridge.tensors().items() if name != "weights"}
    with pytest.raises(FormatError, match=r"a\.safetensors: is no whole ridge regression"):
        Ridge.of(lacking, ridge.settings(), where="a.safetensors")
    with pytest.raises(FormatError, match="holds no conditions"):
        Nearest.of({}, {})
