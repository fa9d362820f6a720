"""Low ranks and rotations: each against numpy's singular and eigenvalue decompositions in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from applying import DTYPES, applied, assert_near, random

from weightops.errors import MismatchError, UsageError
from weightops.merging.method import METHODS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.float64]

SHAPES = [(40, 48), (48, 40), (16, 8, 3, 3), (10, 90), (300, 256)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def wide(model: Tensor) -> Array:
    found: Array = model.double().flatten(1).numpy()
    return found


# ------------------------------------------------------------------------------------------------ low rank


@every_shape
@every_dtype
@pytest.mark.parametrize("rank", [1, 5])
def test_it_is_the_best_approximation_of_its_rank(shape: tuple[int, ...], dtype: torch.dtype, rank: int) -> None:
    delta = random(shape, dtype, 1)
    u, values, vh = np.linalg.svd(wide(delta), full_matrices=False)
    exact = (u[:, :rank] * values[:rank]) @ vh[:rank]
    assert_near(applied("truncate_rank", [delta], rank=rank), exact.reshape(shape), [delta])


@every_dtype
def test_what_is_of_that_rank_stays_itself(dtype: torch.dtype) -> None:
    """In F16 and BF16 a product of factors, rounded, is no longer of that rank; but the rest is what was rounded."""
    delta = (random((40, 5), seed=1) @ random((5, 48), seed=2)).to(dtype)
    found = applied("truncate_rank", [delta], rank=5)
    step = torch.finfo(dtype).eps
    assert (found.double() - delta.double()).norm() <= step * delta.double().norm()


@pytest.mark.parametrize(("share", "rank"), [(0.25, 10), (0.01, 1), (0.999, 40), (0.5, 20)])
def test_below_1_it_is_a_share_of_the_full_rank(share: float, rank: int) -> None:
    delta = random((40, 48), torch.float64, 1)
    assert torch.equal(applied("truncate_rank", [delta], rank=share), applied("truncate_rank", [delta], rank=rank))
    assert torch.linalg.matrix_rank(applied("truncate_rank", [delta], rank=share)) == rank


@pytest.mark.parametrize("shape", [(40,), (1,), (1, 48), (40, 1), (8, 40)], ids=str)
def test_what_has_no_higher_rank_stays_bit_for_bit(shape: tuple[int, ...]) -> None:
    delta = random(shape, torch.bfloat16, 1)
    assert torch.equal(applied("truncate_rank", [delta]), delta)


def test_small_numbers_are_no_zeros() -> None:
    delta = random((40, 48), torch.float64, 1)
    small = applied("truncate_rank", [delta * 1e-200], rank=5)
    assert torch.allclose(small * 1e200, applied("truncate_rank", [delta], rank=5), rtol=1e-12, atol=1e-12)
    zero = torch.zeros(40, 48)
    assert torch.equal(applied("truncate_rank", [zero]), zero)


def test_nan_is_not_lost_from_the_rank() -> None:
    for spoilt in (math.nan, math.inf):
        delta = random((40, 48), seed=1)
        delta[3, 4] = spoilt
        assert applied("truncate_rank", [delta]).isnan().all()


@pytest.mark.parametrize("rank", [0, -1, 1.5])
def test_what_is_no_rank_is_refused(rank: float) -> None:
    with pytest.raises(UsageError) as error:
        METHODS.get("truncate_rank").check({"rank": rank}, 1)
    expected = "expected a whole number of 1 or more, or a share of the full rank between 0 and 1"
    assert str(error.value) == f"truncate_rank, rank: found {rank:g}, {expected}"


# ------------------------------------------------------------------------------------------------ rotations


def procrustes(a: Array, b: Array) -> Array:
    u, _, vh = np.linalg.svd(a.T @ b)
    return u @ vh


def power(rotation: Array, t: float) -> Array:
    """By complex eigenvectors, which a random rotation has one of for each eigenvalue."""
    values, vectors = np.linalg.eig(rotation)
    return np.real(vectors @ np.diag(np.exp(t * np.log(values.astype(complex)))) @ np.linalg.inv(vectors))


def rotate(a: Array, b: Array, alignment: float = 1.0, alpha: float = 0.0, centralization: float = 1.0) -> Array:
    """Of matrices with no fewer rows than columns, where Q is one alone."""
    means = [centralization * m.mean(0) for m in (a, b)]
    x, y = (m - mean for m, mean in zip((a, b), means, strict=True))
    q = procrustes(x, y)
    if alignment != round(alignment) and np.linalg.det(q) < 0:
        u, _, vh = np.linalg.svd(x.T @ y)
        u[:, -1] *= -1
        q = u @ vh
    moved = (x + alpha * (y @ q.T - x)) @ power(q, alignment)
    return moved + means[0] + alignment * (means[1] - means[0])


def turn(count: int, seed: int, size: float = 1.0) -> Tensor:
    """A rotation by some angles: of a random skew matrix."""
    skew = random((count, count), torch.float64, seed, size / math.sqrt(count))
    return torch.linalg.matrix_exp(skew - skew.T)


def related(shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """B is A, turned, and something of its own."""
    a = random(shape, torch.float64, 1)
    b = (a.flatten(1) @ turn(math.prod(shape[1:]), 2, 0.3)).reshape(shape) + random(shape, torch.float64, 3, 0.3)
    return (a + 0.1).to(dtype), (b - 0.2).to(dtype)


@pytest.mark.parametrize("shape", [(60, 40), (40, 40, 1, 1), (80, 8, 3, 3), (300, 256)], ids=str)
@every_dtype
def test_tall_ones_are_rotated_as_the_formula_says(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b = related(shape, dtype)
    # Centred, a square one has no full rank, and two rotations that are as near.
    settings = {"centralization": 0.0} if math.prod(shape) < 40 * 41 else {}
    exact = rotate(wide(a), wide(b), **settings).reshape(shape)
    assert_near(applied("rotate", [a, b], **settings), exact, [a, b])


@pytest.mark.parametrize("alignment", [0.5, -0.3, 1.7, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_parts_of_a_rotation_are_those_of_complex_eigenvalues(alignment: float, alpha: float) -> None:
    a, b = related((60, 40), torch.float64)
    for centralization in (1.0, 0.5):
        exact = rotate(wide(a), wide(b), alignment, alpha, centralization)
        given = {"alignment": alignment, "alpha": alpha, "centralization": centralization}
        assert np.allclose(applied("rotate", [a, b], **given).numpy(), exact, rtol=1e-10, atol=1e-10)


@every_shape
def test_rows_are_turned_and_nothing_else_and_are_as_near_as_can_be(shape: tuple[int, ...]) -> None:
    """Lengths of rows, and angles between them, stay; the distance is that of Schoenemann's theorem."""
    a, b = related(shape, torch.float64)
    x, y = (m - m.mean(0) for m in (wide(a), wide(b)))
    found = wide(applied("rotate", [a, b])) - wide(b).mean(0)
    assert np.allclose(found @ found.T, x @ x.T, rtol=0, atol=1e-11)
    least = np.sum(x * x) + np.sum(y * y) - 2 * np.linalg.svd(x.T @ y, compute_uv=False).sum()
    assert np.sum((found - y) ** 2) == pytest.approx(least, rel=1e-10)


@every_shape
@pytest.mark.parametrize("alignment", [0.25, 0.5, 0.9])
def test_on_the_way_rows_are_only_turned_too(shape: tuple[int, ...], alignment: float) -> None:
    a, b = related(shape, torch.float64)
    mean = (1 - alignment) * wide(a).mean(0) + alignment * wide(b).mean(0)
    found = wide(applied("rotate", [a, b], alignment=alignment)) - mean
    x = wide(a) - wide(a).mean(0)
    assert np.allclose(found @ found.T, x @ x.T, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(60, 40), (40, 40), (10, 60), (30, 40)], ids=str)
def test_what_is_a_rotation_is_found_and_halved(shape: tuple[int, int]) -> None:
    """Of a few outputs and many inputs, the rotation within what they span."""
    a = random(shape, torch.float64, 1)
    outputs, inputs = shape
    if outputs >= inputs:
        half = turn(inputs, 2, 0.3)
    else:
        # In a plane of the first row and one outside of all rows.
        u = a[0] / a[0].norm()
        v = random((inputs,), torch.float64, 3)
        v = v - torch.linalg.lstsq(a.T, v[:, None]).solution.T[0] @ a
        v, (c, s) = v / v.norm(), (math.cos(0.2), math.sin(0.2))
        ends, skew = torch.outer(u, u) + torch.outer(v, v), torch.outer(u, v) - torch.outer(v, u)
        half = torch.eye(inputs).double() + (c - 1) * ends + s * skew
    b = a @ half @ half
    settings = {"centralization": 0.0}
    assert torch.allclose(applied("rotate", [a, b], **settings), b, rtol=0, atol=1e-12)
    assert torch.allclose(applied("rotate", [a, b], alignment=0.5, **settings), a @ half, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(10, 60), (30, 40)], ids=str)
def test_of_wide_ones_only_what_both_span_is_turned(shape: tuple[int, int]) -> None:
    a, b = related(shape, torch.float64)
    a[:, 7], b[:, 7] = 0, 0
    for alignment in (1.0, 0.5):
        found = applied("rotate", [a, b], alignment=alignment)
        assert found[:, 7].abs().max() < 1e-12


@every_shape
@every_dtype
def test_the_ends_are_the_models(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b = related(shape, dtype)
    assert torch.equal(applied("rotate", [a, b], alignment=0, alpha=0), a)
    assert torch.equal(applied("rotate", [a, b], alignment=1, alpha=1), b)
    assert torch.equal(applied("rotate", [a, a], alignment=0.3, alpha=0.4), a)


def test_alpha_goes_from_the_turned_first_to_the_second() -> None:
    a, b = related((30, 40), torch.float64)
    turned = applied("rotate", [a, b])
    assert torch.allclose(applied("rotate", [a, b], alpha=0.3), torch.lerp(turned, b, 0.3), rtol=0, atol=1e-12)


@every_shape
@pytest.mark.parametrize("alignment", [1.0, 0.5])
def test_to_a_model_of_nothing_nothing_is_turned(shape: tuple[int, ...], alignment: float) -> None:
    a = random(shape, torch.float64, 1)
    zero = torch.zeros_like(a)
    found = applied("rotate", [a, zero], alignment=alignment, centralization=0)
    assert torch.allclose(found, a, rtol=0, atol=1e-12)
    assert torch.equal(applied("rotate", [zero, zero], alignment=alignment), zero)


def test_a_row_of_which_the_second_has_nothing_is_turned_as_little_as_may_be() -> None:
    a, b = related((30, 40), torch.float64)
    b[20:] = 0
    settings = {"centralization": 0.0}
    x, y = wide(a), wide(b)
    found = applied("rotate", [a, b], **settings)
    assert np.allclose(wide(found) @ wide(found).T, x @ x.T, rtol=0, atol=1e-11)
    least = np.sum(x * x) + np.sum(y * y) - 2 * np.linalg.svd(x.T @ y, compute_uv=False).sum()
    assert np.sum((wide(found) - y) ** 2) == pytest.approx(least, rel=1e-10)
    # Among those that are as near as can be, as numpy's for one, it is nearest to where they were.
    any_other = x @ procrustes(x, y)
    assert np.sum((wide(found) - x) ** 2) < np.sum((any_other - x) ** 2)


def test_a_reflection_is_taken_whole_but_not_in_part() -> None:
    a = random((60, 40), torch.float64, 1)
    b = a.clone()
    b[:, 3] = -a[:, 3]
    settings = {"centralization": 0.0}
    assert torch.allclose(applied("rotate", [a, b], **settings), b, rtol=0, atol=1e-12)
    # Of determinant 1, and nearest: nothing is turned but what takes back the reflection.
    q = procrustes(wide(a), wide(b))
    u, _, vh = np.linalg.svd(wide(a).T @ wide(b))
    u[:, -1] *= -1
    assert np.linalg.det(q) == pytest.approx(-1)
    exact = wide(a) @ power(u @ vh, 0.5)
    assert np.allclose(applied("rotate", [a, b], alignment=0.5, **settings).numpy(), exact, rtol=0, atol=1e-9)


def test_a_part_of_half_a_round_is_refused() -> None:
    a = random((60, 40), torch.float64, 1)
    with pytest.raises(MismatchError) as error:
        applied("rotate", [a, -a], alignment=0.5)
    assert (
        str(error.value) == "rotate: a part of the rotation between the two is half a round, whose parts go either way"
    )
    assert error.value.hint == "take an alignment of 0 or 1"
    assert torch.allclose(applied("rotate", [a, -a]), -a, rtol=0, atol=1e-12)


def test_of_half_a_round_whole_powers_are_defined() -> None:
    """Just short of it the sine is small, and the power's sine as small."""
    c, s = math.cos(math.pi - 5e-5), math.sin(math.pi - 5e-5)
    rotation = torch.eye(40, dtype=torch.float64)
    rotation[:2, :2] = torch.tensor([[c, s], [-s, c]], dtype=torch.float64)
    a = random((60, 40), torch.float64, 1)
    found = applied("rotate", [a, a @ rotation], alignment=2, centralization=0)
    assert torch.allclose(found, a @ rotation @ rotation, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(40,), (1,)], ids=str)
def test_tensors_of_one_axis_go_by_alpha_alone(shape: tuple[int, ...]) -> None:
    a, b = random(shape, torch.float32, 1), random(shape, torch.float32, 2)
    assert torch.equal(applied("rotate", [a, b]), a)
    exact = 0.7 * a.double() + 0.3 * b.double()
    assert_near(applied("rotate", [a, b], alpha=0.3), exact, [a, b])


@pytest.mark.parametrize("shape", [(1, 48), (40, 1), (1, 1), (2, 48)], ids=str)
@pytest.mark.parametrize("alignment", [1.0, 0.5])
def test_the_smallest_matrices_are_no_exception(shape: tuple[int, int], alignment: float) -> None:
    a, b = random(shape, torch.float64, 1), random(shape, torch.float64, 2)
    found = wide(applied("rotate", [a, b], alignment=alignment))
    x = wide(a) - wide(a).mean(0)
    moved = found - found.mean(0)
    assert np.allclose(moved @ moved.T, x @ x.T, rtol=0, atol=1e-12)
    assert np.allclose(
        found.mean(0), (1 - alignment) * wide(a).mean(0) + alignment * wide(b).mean(0), rtol=0, atol=1e-12
    )


def test_nan_is_not_lost_from_a_rotation() -> None:
    for place in range(2):
        models = list(related((60, 40), torch.float32))
        models[place][3, 4] = math.nan
        assert applied("rotate", models).isnan().all()
