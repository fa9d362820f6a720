"""Diffusion in latents: its schedule, what it learns of a distribution and of a condition, and how it is sampled."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch

from weightops.errors import FormatError, MismatchError, UsageError, ValueRefused
from weightops.synthesis.baselines import fit_ridge
from weightops.synthesis.denoiser import Denoiser, made_denoiser
from weightops.synthesis.denoiser_layers import CONDITIONINGS, adapted, begun, denoised
from weightops.synthesis.schedule import TIMES, clean_of, cosine, stepped, target, visited


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------------- the course of the noise


def test_the_schedule_is_the_cosine() -> None:
    table = cosine().double()
    assert table.shape == (TIMES, 2)
    assert torch.allclose(table.square().sum(1), torch.ones(TIMES, dtype=torch.float64), atol=1e-6)
    for time in (0, 100, 500, 900):
        angles = [(t / TIMES + 0.008) / 1.008 * math.pi / 2 for t in (time + 1, 0)]
        expected = (math.cos(angles[0]) / math.cos(angles[1])) ** 2
        assert float(table[time, 0]) ** 2 == pytest.approx(expected, rel=1e-5)
    assert bool((table[1:, 0] < table[:-1, 0]).all())
    assert 0 < float(table[-1, 0]) < 1e-3


def test_a_sampler_visits_the_last_time_first_and_0_last() -> None:
    assert visited(1) == [TIMES - 1]
    assert visited(4) == [999, 666, 333, 0]
    assert visited(TIMES) == list(range(TIMES - 1, -1, -1))


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_what_is_predicted_means_the_clean_latent(prediction: str) -> None:
    draw = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(4, 3, generator=draw), torch.randn(4, 3, generator=draw)
    signal, share = cosine()[[0, 300, 700, 990]].chunk(2, dim=1)
    noisy = signal * clean + share * noise
    assert torch.allclose(clean_of(prediction, target(prediction, clean, noise, signal, share), noisy, signal, share),
                          clean, atol=1e-5)  # fmt: skip


def test_a_step_with_the_true_latent_keeps_its_noise() -> None:
    draw = torch.Generator().manual_seed(0)
    clean, noise, table = torch.randn(4, 3, generator=draw), torch.randn(4, 3, generator=draw), cosine()
    now, then = table[800], table[300]
    assert torch.allclose(
        stepped(now[0] * clean + now[1] * noise, clean, now, then), then[0] * clean + then[1] * noise, atol=1e-5
    )
    assert torch.equal(stepped(noise, clean, now, None), clean)


# ------------------------------------------------------------------------------------------------ what it learns


@functools.cache
def mixture() -> torch.Tensor:
    """Two clouds of four numbers, of unlike size, not about 0, with numbers that hang together."""
    random = np.random.default_rng(0)
    turn = random.standard_normal((4, 4)) * 0.4
    where = np.where(random.random((400, 1)) < 0.3, 1.0, -0.5) * np.array([2.0, -1.0, 0.0, 30.0])
    return torch.from_numpy(random.standard_normal((400, 4)) @ turn + where + 5.0).float()


@functools.cache
def unconditional(prediction: str) -> Denoiser:
    return made_denoiser(mixture(), prediction=prediction, width=32, steps=900, batch=64)[0]


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_samples_have_the_mean_the_covariance_and_the_clouds(prediction: str) -> None:
    made, data = unconditional(prediction).sample(400, seed=1), mixture()
    unit = data.std(0)
    assert float(((made.mean(0) - data.mean(0)) / unit).abs().max()) < 0.2
    expected, found = (torch.corrcoef(each.T) for each in (data, made))
    assert float((expected - found).abs().max()) < 0.2
    assert torch.allclose(made.std(0) / unit, torch.ones(4), atol=0.2)
    first = (made[:, 3] > 20).double().mean()  # 35 in one cloud, -10 in the other
    between = ((made[:, 3] > 0) & (made[:, 3] < 25)).double().mean()
    assert float(first) == pytest.approx(float((data[:, 3] > 20).double().mean()), abs=0.1)
    assert float(between) < 0.05


@functools.cache
def told() -> tuple[torch.Tensor, np.ndarray]:
    """Latents that the condition determines, linearly and a little bent; the second condition never changes."""
    random = np.random.default_rng(1)
    conditions = np.stack([random.uniform(-1, 1, 260), np.full(260, 7.0), random.uniform(10, 30, 260)], 1)
    x, y = conditions[:, 0], (conditions[:, 2] - 20) / 10
    latents = np.stack([x + y, 3 * x - y, 100 + y, x * y], 1) + 0.02 * random.standard_normal((260, 4))
    return torch.from_numpy(latents).float(), conditions


def conditional(conditioning: str, prediction: str = "x0") -> Denoiser:
    return _conditional(conditioning, prediction)


@functools.cache
def _conditional(conditioning: str, prediction: str) -> Denoiser:
    latents, conditions = told()
    words: dict[str, Any] = {"width": 32, "steps": 400, "rank": 2, "batch": 64}
    return made_denoiser(
        latents[:200], conditions[:200], conditioning=conditioning, prediction=prediction, **words
    )[0]  # fmt: skip


@pytest.mark.parametrize(("conditioning", "prediction"), [("adanorm", "x0"), ("adanorm", "v"), ("adalora", "x0")])
def test_where_the_condition_determines_the_latent_it_nears_ridge(conditioning: str, prediction: str) -> None:
    latents, conditions = told()
    held, asked = latents[200:], conditions[200:]
    unit = latents.std(0)
    denoiser = conditional(conditioning, prediction)
    made = torch.stack([denoiser.sample(60, asked, seed=seed, steps=25) for seed in range(4)]).mean(0)
    ours, ridge = (
        float(((found - held) / unit).square().mean())
        for found in (made, fit_ridge(conditions[:200], latents[:200]).predict(asked))
    )
    assert ridge < 0.01
    assert ours < ridge + 0.06
    assert float(((latents[:200].mean(0) - held) / unit).square().mean()) > 0.9


def test_guidance_pushes_away_from_what_is_made_without_the_condition() -> None:
    denoiser = conditional("adanorm")
    asked = np.array([0.8, 7.0, 27.0])
    none, some, one, three = (
        denoiser.sample(16, asked, seed=3, guidance=guidance) for guidance in (0.0, 0.5, 1.0, 3.0)
    )  # fmt: skip
    assert torch.allclose(none, denoiser.sample(16, seed=3), atol=1e-4)
    way = (one - none).mean(0)
    along = [float(((each - none).mean(0) @ way) / way.square().sum()) for each in (none, some, one, three)]
    assert along[0] == pytest.approx(0, abs=1e-5)
    assert along[2] == pytest.approx(1)
    assert along[0] < along[1] < 0.95
    assert along[3] > 1.05


def test_each_condition_has_its_own_sample() -> None:
    latents, conditions = told()
    made = conditional("adanorm").sample(60, conditions[200:], seed=0)
    found = torch.corrcoef(torch.stack([made[:, 1], latents[200:, 1]]))[0, 1]
    assert float(found) > 0.95


# ------------------------------------------------------------------------------------------------ AdaLoRA


def test_adalora_is_x_plus_x_a_b_and_begins_as_x() -> None:
    weights = begun(4, 3, 16, "adalora", 2, seed=0)
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 16, generator=draw), torch.randn(5, 4, generator=draw)
    assert torch.equal(adapted(weights, "1", x, y, 2), x)
    weights["1.lora-b"] = torch.randn(4, 32, generator=draw)
    weights["1.lora-a-bias"] = torch.randn(32, generator=draw)
    found = adapted(weights, "1", x, y, 2)
    for i in range(5):
        a = (y[i] @ weights["1.lora-a"] + weights["1.lora-a-bias"]).reshape(16, 2)
        b = (y[i] @ weights["1.lora-b"] + weights["1.lora-b-bias"]).reshape(2, 16)
        assert torch.allclose(found[i], x[i] + x[i] @ a @ b, atol=1e-4)
        assert torch.linalg.matrix_rank(a @ b) == 2


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_condition_that_is_not_to_be_seen_changes_nothing(conditioning: str) -> None:
    denoiser = conditional(conditioning)
    draw = torch.Generator().manual_seed(0)
    noisy, asked = torch.randn(6, 4, generator=draw), torch.randn(6, 3, generator=draw)
    times, unasked = torch.full((6,), 500), torch.tensor([True, False] * 3)
    found, seen, unseen = (
        denoised(denoiser.weights, noisy, times, condition, denoiser.rank, unasked=hidden)
        for condition, hidden in ((asked, unasked), (asked, None), (None, None))
    )  # fmt: skip
    assert torch.allclose(found[::2], unseen[::2], atol=1e-6)
    assert torch.allclose(found[1::2], seen[1::2], atol=1e-6)
    assert float((seen - unseen).abs().max()) > 0.05


# ------------------------------------------------------------------------------------------------ sampling


def test_a_sample_does_not_depend_on_how_many_are_asked_for() -> None:
    denoiser = conditional("adanorm")
    _, conditions = told()
    many = denoiser.sample(40, conditions[:40], seed=9, steps=5, guidance=1.5)
    assert torch.equal(denoiser.sample(3, conditions[:3], seed=9, steps=5, guidance=1.5), many[:3])
    assert torch.equal(denoiser.sample(35, conditions[:35], seed=9, steps=5, guidance=1.5), many[:35])
    assert not torch.equal(denoiser.sample(3, conditions[:3], seed=10, steps=5, guidance=1.5), many[:3])
    assert len({tuple(row) for row in unconditional("x0").sample(40, seed=9, steps=5).tolist()}) == 40


def test_one_condition_is_of_all_samples() -> None:
    denoiser = conditional("adanorm")
    _, conditions = told()
    one = denoiser.sample(3, conditions[4], seed=2, steps=4)
    assert torch.equal(one, denoiser.sample(3, conditions[4:5], seed=2, steps=4))
    assert torch.equal(one, denoiser.sample(3, torch.from_numpy(conditions[[4, 4, 4]]), seed=2, steps=4))


def test_it_comes_back_from_its_tensors_bit_for_bit() -> None:
    for denoiser in (conditional("adalora"), conditional("adanorm", "v"), unconditional("x0")):
        again = Denoiser.of(denoiser.tensors(), denoiser.settings())
        assert again.settings() == denoiser.settings()
        assert torch.equal(again.sample(2, seed=1, steps=3), denoiser.sample(2, seed=1, steps=3))
        assert again.parameters == denoiser.parameters
        assert (again.latents, again.conditions) == (4, 0 if denoiser is unconditional("x0") else 3)


def test_what_is_no_whole_denoiser_is_refused() -> None:
    denoiser = conditional("adalora")
    tensors, settings = denoiser.tensors(), denoiser.settings()
    with pytest.raises(FormatError, match=r"^d: holds '1.first' as \(2, 2\), but this denoiser needs \(32, 32\)$"):
        Denoiser.of({**tensors, "1.first": torch.zeros(2, 2)}, settings, where="d")
    with pytest.raises(FormatError, match="it predicts 'noise', conditioned by 'adalora'"):
        Denoiser.of(tensors, {**settings, "prediction": "noise"})
    with pytest.raises(FormatError, match="is no whole denoiser: 'in'"):
        Denoiser.of({}, settings)
    with pytest.raises(FormatError, match="holds 'means' as None"):
        Denoiser.of({name: tensor for name, tensor in tensors.items() if name != "means"}, settings)


def test_a_condition_of_another_size_is_refused() -> None:
    denoiser = conditional("adanorm")
    with pytest.raises(MismatchError, match=r"^condition: found 2 numbers, expected 3$"):
        denoiser.sample(1, np.zeros(2), seed=0)
    with pytest.raises(MismatchError, match=r"^condition: found 2 conditions for 5 samples$"):
        denoiser.sample(5, np.zeros((2, 3)), seed=0)
    with pytest.raises(MismatchError, match="this diffusion was trained without conditions"):
        unconditional("x0").sample(1, np.zeros(3), seed=0)
    with pytest.raises(UsageError, match=r"^--steps: found 0, expected 1 to 1000$"):
        denoiser.sample(1, seed=0, steps=0)
    with pytest.raises(UsageError, match=r"^--seed: found -1, expected 0 or more$"):
        denoiser.sample(1, seed=-1)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "prediction": ({"prediction": "noise"}, "--prediction: found 'noise', expected x0 or v"),
    "conditioning": ({"conditioning": "film"}, "--conditioning: found 'film', expected adanorm or adalora"),
    "width": ({"width": 0}, "--width: found 0, expected a whole number, 1 or more"),
    "rank": ({"rank": 0}, "--rank: found 0, expected a whole number, 1 or more"),
    "drop": ({"drop": 1.0}, "--drop: found 1, expected 0 or more, and less than 1"),
    "dropout": ({"dropout": -0.5}, "--dropout: found -0.5, expected 0 or more, and less than 1"),
    "steps": ({"steps": 0}, "--steps: found 0, expected a whole number, 1 or more"),
}


@pytest.mark.parametrize(("words", "said"), BAD.values(), ids=BAD)
def test_a_word_that_cannot_be_is_refused(words: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        made_denoiser(mixture(), **{"steps": 1, **words})
    assert str(caught.value) == said


def test_a_loss_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueRefused, match=r"^space: the loss is no number at step \d+ of 30$"):
        made_denoiser(mixture(), width=8, steps=30, lr=1e30, where="space")
    with pytest.raises(ValueRefused, match="found 1 members, expected 2 or more"):
        made_denoiser(mixture()[:1])
