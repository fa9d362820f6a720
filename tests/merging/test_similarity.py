"""Blends by likeness of direction, against supermerger's definitions in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from applying import DTYPES, SHAPES, applied, assert_near, looked, random, same_bits

from weightops.errors import UsageError
from weightops.merging.expression import Applied, Given, Program
from weightops.merging.method import METHODS, SMALL
from weightops.plan import Grain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    Array = np.ndarray

three_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
both = pytest.mark.parametrize("name", ["cosine_a", "cosine_b"])


def cosine(a: Array, b: Array, axis: int) -> Array:
    lengths = np.sqrt((a * a).sum(axis)) * np.sqrt((b * b).sum(axis))
    return np.divide((a * b).sum(axis), lengths, out=np.zeros_like(lengths), where=lengths != 0)


def normalised(values: Array) -> Array:
    length = np.sqrt((values * values).sum(0))
    return values / np.where(length == 0, 1.0, length)


def whole(a: Array, b: Array) -> float:
    length = np.linalg.norm(a) * np.linalg.norm(b)
    return float((a * b).sum() / length) if length else 0.0


def blended(name: str, models: Mapping[str, tuple[Array, Array]], alpha: float) -> dict[str, Array]:
    """supermerger's first pass over all tensors, and its second."""
    sims, likeness = [], {}
    for label, (a, b) in models.items():
        if name == "cosine_a":
            a, b = normalised(a), normalised(b)
        likeness[label] = (cosine(a, b, 0) + whole(a, b)) / 2
        sims.append(np.ravel(cosine(a, b, 0) if name == "cosine_a" else likeness[label]))
    sims = np.concatenate(sims)
    sims = sims[sims >= np.percentile(sims, 1, method="midpoint")]
    sims = sims[sims <= np.percentile(sims, 99, method="midpoint")]
    results = {}
    for label, (a, b) in models.items():
        k = (likeness[label] - sims.min()) / (sims.max() - sims.min())
        k = (k - (abs(alpha) if name == "cosine_a" else alpha)).clip(0, 1)
        results[label] = b * (1 - k) + a * k
    return results


def merged(name: str, models: Mapping[str, tuple[Tensor, Tensor]], alpha: float) -> dict[str, Tensor]:
    """Two passes over all tensors, as a merge makes them."""
    method, parameters = METHODS.get(name), {"alpha": alpha}
    found = {label: looked(method, pair, parameters)["found"] for label, pair in models.items()}
    (look,) = method.looks
    everywhere = look.everywhere(found, **parameters)
    results = {}
    for label, pair in models.items():
        shape, out = tuple(pair[0].shape), torch.full(pair[0].shape, 77.0).to(pair[0].dtype)
        node = Applied(method, (Given(0), Given(1)), parameters, "0", known=everywhere[label])
        wide = out.numel() <= SMALL or out.dtype is torch.float32
        Program(node, "", 0, shape, Grain.ROWS, wide).run(pair, out)
        results[label] = out
    return results


def layers(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs that are more and less alike, and of every number of axes."""
    shapes = {"conv": (16, 8, 3, 3), "matrix": (40, 48), "bias": (40,), "one": (1,), "large": (1100, 1024)}
    models = {}
    for n, (label, shape) in enumerate(shapes.items()):
        a = random(shape, torch.float32, n)
        models[label] = (a.to(dtype), (a + random(shape, torch.float32, 50 + n, 0.2 + 0.3 * n)).to(dtype))
    models["matrix"][0][:, 3] = 0  # a column that has no direction
    return models


# ------------------------------------------------------------------------------------------------ by column


@both
@three_dtypes
@pytest.mark.parametrize("alpha", [0.0, 0.5, -0.3, 1.0])
def test_it_is_the_definition_over_all_tensors(name: str, dtype: torch.dtype, alpha: float) -> None:
    models = layers(dtype)
    if alpha != 0.5:
        del models["large"]
    found = merged(name, models, alpha)
    exact = blended(name, {k: (a.double().numpy(), b.double().numpy()) for k, (a, b) in models.items()}, alpha)
    for label, pair in models.items():
        assert_near(found[label], exact[label], pair, ulps=2)


@both
@every_shape
def test_a_tensor_alone_has_its_own_limits(name: str, shape: tuple[int, ...]) -> None:
    a, b = random(shape, seed=1), random(shape, seed=2)
    if len(shape) == 1:  # one column: nothing is less alike than it, so its share is all
        assert_near(applied(name, [a, b], alpha=0.25), 0.75 * a.double() + 0.25 * b.double(), [a, b])
        return
    exact = blended(name, {"only": (a.double().numpy(), b.double().numpy())}, 0.25)["only"]
    assert_near(applied(name, [a, b], alpha=0.25), exact, [a, b], ulps=2)


@both
def test_what_is_alike_is_of_the_first_and_what_is_not_of_the_second(name: str) -> None:
    a = random((64, 200), seed=1)
    b = torch.where(torch.arange(200) < 100, a * 2, random((64, 200), seed=2))
    found = applied(name, [a, b], alpha=0)
    assert ((found - a)[:, :100].abs() <= (found - b)[:, :100].abs()).all()
    assert (found - b)[:, 100:].abs().mean() < (found - a)[:, 100:].abs().mean()
    towards = [float((applied(name, [a, b], alpha=alpha) - b).norm()) for alpha in (0.0, 0.4, 0.8, 1.0)]
    assert towards == sorted(towards, reverse=True)
    assert towards[-1] < 0.02 * towards[0]


@both
def test_limits_are_those_of_the_other_tensors_too(name: str) -> None:
    models = layers(torch.float32)
    del models["large"]
    alone = applied(name, models["matrix"], alpha=0.2)
    assert not same_bits(merged(name, models, 0.2)["matrix"], alone)
    assert same_bits(merged(name, {"matrix": models["matrix"]}, 0.2)["matrix"], alone)


@both
@three_dtypes
def test_equal_models_and_models_of_nothing_have_no_limits(name: str, dtype: torch.dtype) -> None:
    a, nothing = random((40, 48), dtype), torch.zeros((40, 48), dtype=dtype)
    assert same_bits(applied(name, [a, a]), a)
    assert (applied(name, [nothing, nothing]) == 0).all()
    assert_near(applied(name, [a, nothing], alpha=0.5), a.double() / 2, [a])
    models = {"first": (a, a), "empty": (a[:0], a[:0]), "second": (nothing, nothing)}
    assert same_bits(merged(name, models, 0.5)["first"], a)


# ------------------------------------------------------------------------------------------------ by row


def extract_features(a: Array, b: Array, alpha: float, beta: float, gamma: float) -> Array:
    d = ((cosine(a, b, -1).clip(-1, 1)[..., None] + 1) / 2) ** gamma
    return ((1 - alpha) * a + alpha * b) * ((1 - beta) * d + beta * (1 - d))


@every_shape
@three_dtypes
def test_features_are_the_definition_along_the_last_axis(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    models = [random(shape, dtype, seed) for seed in range(2)]
    a, b = (m.double().numpy() for m in models)
    for settings in [(0.5, 0.0, 1.0), (0.0, 1.0, 10.0), (0.3, 0.4, 0.1)] if max(shape) < 1000 else [(0.3, 0.4, 0.1)]:
        found = applied("extract_features", models, **dict(zip(("alpha", "beta", "gamma"), settings, strict=True)))
        assert_near(found, extract_features(a, b, *settings), models, ulps=2)


def test_a_line_of_several_parts_has_one_direction() -> None:
    a, b = random((300_000,), seed=1), random((300_000,), seed=2)
    exact = extract_features(a.double().numpy(), b.double().numpy(), 0.5, 0.0, 1.0)
    assert_near(applied("extract_features", [a, b]), exact, [a, b])


@three_dtypes
def test_what_two_differences_share_is_kept_and_what_they_do_not_is_its_rest(dtype: torch.dtype) -> None:
    a, b = random((40, 48), dtype, 1), random((40, 48), dtype, 2)
    assert_near(applied("extract_features", [a, a]), a.double(), [a])
    assert_near(applied("extract_features", [a, a], beta=1), torch.zeros(40, 48), [a])
    assert_near(applied("extract_features", [a, -a], alpha=0, beta=1), a.double(), [a])
    parts = [applied("extract_features", [a, b], dtype=torch.float64, beta=beta, gamma=0.3) for beta in (0, 1)]
    assert torch.allclose(parts[0] + parts[1], (a.double() + b.double()) / 2)
    nothing = torch.zeros_like(a)
    assert_near(applied("extract_features", [a, nothing]), a.double() / 4, [a])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": -0.1}, "extract_features, alpha: found -0.1, expected a number from 0 to 1"),
        ({"beta": 2}, "extract_features, beta: found 2, expected a number from 0 to 1"),
        ({"gamma": -1}, "extract_features, gamma: found -1, expected a number from 0 on"),
    ],
)
def test_settings_without_a_meaning_are_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        applied("extract_features", [random((4, 4)), random((4, 4))], **given)
    assert str(caught.value) == message
