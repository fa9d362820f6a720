"""The autoencoder of coefficients: what its loss is, what a linear one must come to, and what only an MLP can."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from weightops.errors import FormatError, UsageError, ValueRefused
from weightops.synthesis.vae import LAYERS, Vae, losses, made_vae


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def gaussian(n: int = 200, variances: tuple[float, ...] = (9.0, 4.0, 1.0, 0.25, 0.05), seed: int = 0) -> torch.Tensor:
    """Coefficients as a PCA gives them: uncorrelated, in order, with exactly these variances."""
    drawn = np.random.default_rng(seed).standard_normal((n, len(variances)))
    drawn = np.linalg.svd(drawn - drawn.mean(0), full_matrices=False)[0] * math.sqrt(n)
    return torch.from_numpy(drawn * np.sqrt(variances)).float()


def curved(n: int, seed: int) -> torch.Tensor:
    """A surface of two numbers, bent through 20 dimensions; without noise."""
    a, b = np.random.default_rng(seed).uniform(-1, 1, (2, n))
    bent = np.stack([a, b, a * a, a * b, b * b, np.sin(2 * a), np.cos(2 * b), a * b * b], 1)
    turn = np.linalg.qr(np.random.default_rng(7).standard_normal((20, 20)))[0][:8]
    return torch.from_numpy(bent @ turn).float()


def missed(vae: Vae, coefficients: torch.Tensor) -> float:
    """The squared error of what comes back, a member."""
    return float((vae.decode(vae.encode(coefficients)) - coefficients).square().sum(1).mean())


def test_the_loss_is_half_the_squared_error_and_beta_times_the_divergence() -> None:
    vae, _ = made_vae(gaussian(), latents=2, layers="linear", steps=1, lr=1e-9)
    scaled, noise = gaussian()[:3] / vae.scale, torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    means = scaled @ vae.weights["encoder.straight"] + vae.weights["encoder.bias"]
    sigma = (0.5 * vae.weights["encoder.logarithms"]).exp()
    made = (means + sigma * noise) @ vae.weights["decoder.straight"] + vae.weights["decoder.bias"]
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(means, sigma.expand_as(means)), normal(0.0, 1.0)).sum()
    error = 0.5 * (made - scaled).square().sum()
    assert losses(vae.weights, scaled, noise, 0.3).tolist() == pytest.approx(
        [float(error + 0.3 * divergence), float(error), float(divergence)], rel=1e-5
    )
    assert vae.scale == pytest.approx(math.sqrt(sum((9.0, 4.0, 1.0, 0.25, 0.05)) / 5), rel=1e-4)


def test_a_linear_one_with_little_beta_comes_to_pca_and_never_beats_it() -> None:
    data = gaussian()
    best = 1.0 + 0.25 + 0.05  # what the first two axes leave
    vae, found = made_vae(data, latents=2, layers="linear", beta=1e-4, steps=300, lr=0.01)
    assert best * (1 - 1e-6) <= missed(vae, data) < best * 1.01
    assert found["kl"] > 0
    assert found["loss"] == pytest.approx(found["reconstruction"] + 1e-4 * found["kl"], rel=1e-4)


def test_a_linear_one_shrinks_each_axis_as_theory_says() -> None:
    """By 1 − β·s²/λ; an axis of less variance than β·s² is not used at all."""
    data = gaussian()
    vae, _ = made_vae(data, latents=4, layers="linear", beta=1.0, steps=700, lr=0.04, batch=200)
    whole = vae.weights["encoder.straight"] @ vae.weights["decoder.straight"]
    noise = vae.scale**2
    expected = [max(0.0, 1 - noise / variance) for variance in (9.0, 4.0, 1.0, 0.25, 0.05)]
    assert torch.diag(whole).tolist() == pytest.approx(expected, abs=0.05)
    assert expected[2:] == [0, 0, 0]
    assert float((whole - torch.diag(torch.diag(whole))).abs().max()) < 0.1


def test_an_mlp_beats_pca_on_what_is_curved() -> None:
    train, held = curved(400, 0), curved(100, 1)
    mean = train.mean(0)
    axes = torch.linalg.svd(train - mean)[2][:2]
    flat = float((held - mean - (held - mean) @ axes.T @ axes).square().sum(1).mean())
    vae, _ = made_vae(train - mean, latents=2, hidden=48, steps=600, lr=4e-3, dropout=0.0)
    assert missed(vae, held - mean) < 0.35 * flat
    linear, _ = made_vae(train - mean, latents=2, layers="linear", steps=200)
    assert missed(linear, held - mean) > 0.95 * flat


def test_more_beta_leaves_more_error_and_less_divergence() -> None:
    found = [made_vae(gaussian(), latents=3, hidden=32, steps=200, beta=beta)[1] for beta in (0.01, 1.0)]
    assert found[0]["reconstruction"] < found[1]["reconstruction"]
    assert found[0]["kl"] > found[1]["kl"]


@pytest.mark.parametrize("layers", LAYERS)
def test_the_unit_of_the_coefficients_does_not_matter(layers: str) -> None:
    data = gaussian()
    one, _ = made_vae(data, latents=2, hidden=16, layers=layers, steps=20)
    other, _ = made_vae(4096 * data, latents=2, hidden=16, layers=layers, steps=20)
    assert torch.allclose(one.encode(data), other.encode(4096 * data), atol=1e-4)
    assert torch.allclose(4096 * one.decode(one.means), other.decode(one.means), rtol=1e-3, atol=0.1)


def test_latents_of_the_trained_have_the_mean_and_deviation_that_are_kept() -> None:
    vae, _ = made_vae(gaussian(), latents=3, hidden=16, steps=30)
    latents = vae.encode(gaussian())
    assert torch.allclose(vae.means, latents.mean(0), atol=1e-6)
    assert torch.allclose(vae.deviations, latents.std(0, correction=0), atol=1e-6)
    assert (vae.latents, vae.components, latents.dtype) == (3, 5, torch.float32)


@pytest.mark.parametrize("layers", LAYERS)
def test_it_comes_back_from_its_tensors_bit_for_bit(layers: str) -> None:
    vae, _ = made_vae(gaussian(), latents=2, hidden=16, layers=layers, steps=5)
    again = Vae.of(vae.tensors(), vae.settings())
    assert torch.equal(again.encode(gaussian()), vae.encode(gaussian()))
    assert torch.equal(again.decode(again.means), vae.decode(vae.means))
    assert again.parameters == vae.parameters == sum(w.numel() for w in vae.weights.values())


def test_what_is_no_whole_vae_is_refused() -> None:
    vae, _ = made_vae(gaussian(), latents=2, hidden=16, steps=1)
    tensors = vae.tensors()
    with pytest.raises(FormatError, match=r"^v: holds 'decoder.out' as \(3, 5\), but this VAE needs \(16, 5\)$"):
        Vae.of({**tensors, "decoder.out": torch.zeros(3, 5)}, vae.settings(), where="v")
    with pytest.raises(FormatError, match="is no whole VAE"):
        Vae.of({k: t for k, t in tensors.items() if k != "means"}, vae.settings())
    with pytest.raises(FormatError, match=r"holds 'encoder.middle' as None"):
        Vae.of({k: t for k, t in tensors.items() if k != "encoder.middle"}, vae.settings())
    with pytest.raises(FormatError, match="is no whole VAE: its layers are 'quadratic', its scale"):
        Vae.of(tensors, {**vae.settings(), "layers": "quadratic"})


def test_the_seed_decides_every_bit() -> None:
    one, same, other = (made_vae(gaussian(), latents=2, hidden=16, steps=10, seed=seed)[0] for seed in (5, 5, 2**40))
    assert all(torch.equal(one.weights[name], same.weights[name]) for name in one.weights)
    assert not torch.equal(one.weights["encoder.in"], other.weights["encoder.in"])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "latents": ({"latents": 6}, "--latents: found 6, expected 1 to 5: the coefficients that there are"),
    "no latents": ({"latents": 0}, "--latents: found 0, expected 1 to 5: the coefficients that there are"),
    "layers": ({"layers": "conv"}, "--layers: found 'conv', expected linear or mlp"),
    "hidden": ({"hidden": 0}, "--hidden: found 0, expected a whole number, 1 or more"),
    "beta": ({"beta": -1.0}, "--beta: found -1, expected 0 or more"),
    "beta nan": ({"beta": math.nan}, "--beta: found nan, expected 0 or more"),
    "dropout": ({"dropout": 1.0}, "--dropout: found 1, expected 0 or more, and less than 1"),
    "steps": ({"steps": 0}, "--steps: found 0, expected a whole number, 1 or more"),
    "batch": ({"batch": 0}, "--batch: found 0, expected a whole number, 1 or more"),
    "lr": ({"lr": 0.0}, "--lr: found 0, expected a number above 0"),
    "weight decay": ({"weight_decay": -0.1}, "--weight-decay: found -0.1, expected 0 or more"),
    "seed": ({"seed": -1}, "--seed: found -1, expected 0 or more"),
}


@pytest.mark.parametrize(("words", "said"), BAD.values(), ids=BAD)
def test_a_word_that_cannot_be_is_refused(words: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        made_vae(gaussian(), **{"latents": 2, "steps": 1, **words})
    assert str(caught.value) == said


def test_members_that_are_all_the_same_are_refused() -> None:
    with pytest.raises(ValueRefused, match=r"the coefficients' deviation is 0\.0, expected a number above 0"):
        made_vae(torch.ones(10, 4), latents=2)
    with pytest.raises(ValueRefused, match="the coefficients' deviation is nan"):
        made_vae(torch.full((10, 4), math.nan), latents=2)
    with pytest.raises(ValueRefused, match="found 1 members, expected 2 or more"):
        made_vae(torch.ones(1, 4), latents=2)


def test_a_loss_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueRefused, match=r"^space: the loss is no number at step \d+ of 50$") as caught:
        made_vae(gaussian(), latents=2, hidden=16, steps=50, lr=1e30, where="space")
    assert caught.value.hint is not None
    assert "learning rate" in caught.value.hint
