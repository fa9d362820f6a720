"""Draws follow from seed, step and slot alone; noise, targets and weights are those of diffusers and of the papers."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import xxhash

from weightops.diffusion.dataset import Framing, read_examples
from weightops.diffusion.encoding import encode, encoding_of
from weightops.diffusion.models import load
from weightops.diffusion.objectives import (
    Draw,
    Objective,
    choose,
    crop_place,
    draw,
    held_out_loss,
    loss,
    noised,
    objective_of,
    snr_weights,
    steps_per_epoch,
    target,
)
from weightops.diffusion.sprites import sprites
from weightops.diffusion.tiny import tiny_model
from weightops.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    from diffusers.training_utils import compute_snr
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
FLUX = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
SHAPE = (4, 8, 6)


def model(scheduler: Any, architecture: str = "sd15", **config: Any) -> Any:
    """All of a loaded model that an objective follows from."""
    network = SimpleNamespace(config=SimpleNamespace(**config))
    pipe = SimpleNamespace(scheduler=scheduler, transformer=network)
    return SimpleNamespace(pipe=pipe, architecture=architecture, label="model")


def ddpm(kind: str = "epsilon", **more: Any) -> tuple[Any, Objective]:
    scheduler = diffusers.DDPMScheduler(**BETAS, prediction_type=kind, **more)
    return scheduler, objective_of(model(scheduler))


def flow(architecture: str = "sd3", **config: Any) -> tuple[Any, Objective]:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    return scheduler, objective_of(model(scheduler, architecture, patch_size=2))


OBJECTIVES = {
    "epsilon": lambda: ddpm("epsilon")[1],
    "v_prediction": lambda: ddpm("v_prediction")[1],
    "sample": lambda: ddpm("sample")[1],
    "flow": lambda: flow(shift=3.0)[1],
}
every_kind = pytest.mark.parametrize("kind", OBJECTIVES)


def tensors(drawn: Draw) -> dict[str, torch.Tensor]:
    return {name: getattr(drawn, name) for name in ("noise", "posterior", "timesteps", "flips")}


def joined(draws: list[Draw]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([tensors(d)[name] for d in draws]) for name in tensors(draws[0])}


def latents(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ draws


@every_kind
def test_draws_are_the_same_bits_however_the_slots_are_split(kind: str) -> None:
    objective = OBJECTIVES[kind]()

    def drawn(slots: Any) -> Draw:
        return draw(objective, seed=7, step=3, slots=slots, shape=SHAPE, noise_offset=0.1)

    whole = tensors(drawn(range(8)))
    for parts in ([[n] for n in range(8)], [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 2], [3, 4, 5, 6, 7]]):
        assert all(torch.equal(whole[name], part) for name, part in joined([drawn(p) for p in parts]).items())
    for start in (0, 1):  # two processes, every other slot
        odd = tensors(drawn(range(start, 8, 2)))
        assert all(torch.equal(whole[name][start::2], part) for name, part in odd.items())
    torch.manual_seed(99)
    torch.randn(5)
    assert all(torch.equal(whole[name], again) for name, again in tensors(drawn(range(8))).items())


@every_kind
def test_draws_differ_between_slots_steps_seeds_and_streams(kind: str) -> None:
    objective = OBJECTIVES[kind]()
    seen = [
        tensors(draw(objective, seed=seed, step=step, slots=[slot], shape=SHAPE, stream=stream))
        for seed, step, slot, stream in [
            (0, 0, 0, 0), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 0, 1), (0, 1, 1, 0), (2**32, 0, 0, 0),
            (2**32 + 1, 0, 0, 0), (-1, 0, 0, 0), (0, 2**31, 0, 0), (0, 2**31 + 1, 0, 0),
        ]
    ]  # fmt: skip
    for name in ("noise", "posterior"):
        assert len({tuple(found[name].flatten().tolist()) for found in seen}) == len(seen)
    assert len({float(found["timesteps"]) for found in seen}) > len(seen) - 2  # of 1000 two may be alike
    assert not torch.equal(seen[0]["noise"], seen[0]["posterior"])


def test_draws_are_normal_even_and_fair() -> None:
    count = 4000
    drawn = draw(ddpm()[1], seed=1, step=0, slots=range(count), shape=(2, 2, 2))
    for values in (drawn.noise, drawn.posterior):
        assert values.dtype == torch.float32
        assert abs(float(values.mean())) < 5 / math.sqrt(values.numel())
        assert abs(float(values.var()) - 1) < 5 * math.sqrt(2 / values.numel())
    assert drawn.timesteps.dtype == torch.int64
    assert int(drawn.timesteps.min()) >= 0
    assert int(drawn.timesteps.max()) <= 999
    tenths = torch.bincount(drawn.timesteps // 100, minlength=10)
    assert int((tenths - count / 10).abs().max()) < 5 * math.sqrt(count / 10)
    assert drawn.flips.dtype == torch.bool
    assert abs(int(drawn.flips.sum()) - count / 2) < 5 * math.sqrt(count) / 2


def test_an_offset_moves_whole_channels_and_nothing_else() -> None:
    plain, moved = (
        draw(ddpm()[1], seed=1, step=0, slots=range(500), shape=SHAPE, noise_offset=offset) for offset in (0.0, 0.1)
    )
    for name in ("posterior", "timesteps", "flips"):
        assert torch.equal(getattr(plain, name), getattr(moved, name))
    offset = moved.noise - plain.noise
    channels = offset.mean((2, 3))
    torch.testing.assert_close(offset, channels[:, :, None, None].expand_as(offset), atol=1e-6, rtol=0)
    assert abs(float(channels.std()) - 0.1) < 0.01
    assert abs(float(channels.mean())) < 0.01


def test_what_is_drawn_for_one_objective_is_drawn_for_another() -> None:
    found = [draw(made(), seed=5, step=2, slots=range(3), shape=SHAPE) for made in OBJECTIVES.values()]
    assert all(torch.equal(found[0].noise, other.noise) for other in found)
    assert all(torch.equal(found[0].flips, other.flips) for other in found)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_draws_are_the_same_bits_on_a_gpu() -> None:
    words: dict[str, Any] = {"seed": 5, "step": 2, "slots": range(3), "shape": SHAPE}
    for made in OBJECTIVES.values():
        there, here = draw(made(), device="cuda", **words), draw(made(), **words)
        assert there.noise.device.type == there.timesteps.device.type == "cuda"
        assert all(torch.equal(tensors(there)[name].cpu(), value) for name, value in tensors(here).items())


def test_flow_draws_more_in_the_middle_and_shifts_as_the_scheduler_does() -> None:
    slots = range(4000)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    loaded = model(scheduler, "sd3", patch_size=2)
    plain = draw(objective_of(loaded, shift=1.0), seed=1, step=0, slots=slots, shape=(1, 1, 1)).timesteps / 1000
    assert plain.dtype == torch.float32
    logits = torch.logit(plain.double())
    assert abs(float(logits.mean())) < 5 / math.sqrt(4000)
    assert abs(float(logits.std()) - 1) < 0.06
    shifted = draw(objective_of(loaded), seed=1, step=0, slots=slots, shape=(1, 1, 1)).timesteps / 1000
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    even = draw(objective_of(loaded, shift=1.0, weighting="none"), seed=1, step=0, slots=slots, shape=(1, 1, 1))
    sigmas = even.timesteps / 1000
    assert float(sigmas.min()) > 0
    assert float(sigmas.max()) <= 1
    tenths = torch.histc(sigmas, 10, 0, 1)
    assert float((tenths - 400).abs().max()) < 5 * math.sqrt(400)


# ------------------------------------------------------------------------------------------------ which examples


@pytest.mark.parametrize(("count", "per_step"), [(10, 4), (7, 7), (3, 8), (12, 1), (1, 3)])
def test_each_example_comes_once_an_epoch_in_another_order(count: int, per_step: int) -> None:
    steps = -(-5 * count // per_step)
    places = [n for s in range(steps) for n in choose(count, seed=4, step=s, slots=range(per_step), per_step=per_step)]
    epochs = [tuple(places[start : start + count]) for start in range(0, 5 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 4:
        assert len(set(epochs)) == 5
        assert epochs[0] != tuple(range(count))


def test_choices_do_not_depend_on_the_split_but_on_seed_and_stream() -> None:
    whole = choose(9, seed=4, step=3, slots=range(6), per_step=6)
    assert [n for slot in range(6) for n in choose(9, seed=4, step=3, slots=[slot], per_step=6)] == whole
    assert choose(9, seed=4, step=3, slots=range(1, 6, 2), per_step=6) == whole[1::2]
    others = [choose(50, seed=s, step=0, slots=range(50), per_step=50, stream=t) for s, t in ((0, 0), (1, 0), (0, 1))]
    assert len(set(map(tuple, others))) == 3


def test_an_epoch_has_as_many_steps_as_it_takes() -> None:
    assert [steps_per_epoch(n, per_step) for n, per_step in ((112, 4), (113, 4), (3, 8), (8, 8), (9, 2 * 2 * 2))] == [
        28, 29, 1, 1, 2,
    ]  # fmt: skip


def test_crops_follow_from_the_seed_and_the_picture() -> None:
    digests = [xxhash.xxh3_128_hexdigest(bytes([n])) for n in range(200)]
    places = [crop_place(1, digest) for digest in digests]
    assert places == [crop_place(1, digest) for digest in digests]
    assert len(set(places)) == 200
    assert places[0] != crop_place(2, digests[0])
    assert all(0 <= value < 1 for place in places for value in place)
    assert abs(float(np.mean(places)) - 0.5) < 0.08


# ------------------------------------------------------------------------------------------------ noise and targets


@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_and_velocity_are_those_of_diffusers(zero_snr: bool) -> None:
    scheduler, objective = ddpm("v_prediction", rescale_betas_zero_snr=zero_snr)
    drawn = draw(objective, seed=0, step=0, slots=range(6), shape=SHAPE)
    drawn.timesteps[:2] = torch.tensor([0, 999])
    clean = latents(6)
    assert torch.equal(noised(objective, clean, drawn), scheduler.add_noise(clean, drawn.noise, drawn.timesteps))
    assert torch.equal(target(objective, clean, drawn), scheduler.get_velocity(clean, drawn.noise, drawn.timesteps))
    if zero_snr:
        torch.testing.assert_close(noised(objective, clean, drawn)[1], drawn.noise[1], atol=1e-3, rtol=0)


def test_the_schedule_is_the_same_whichever_sampler_stands_beside_the_model() -> None:
    _, expected = ddpm("v_prediction")
    for sampler in ("PNDMScheduler", "EulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"):
        made = objective_of(model(getattr(diffusers, sampler)(**BETAS, prediction_type="v_prediction")))
        assert (made.kind, made.steps) == ("v_prediction", 1000)
        assert torch.equal(made.alphas, expected.alphas)


def test_flow_noise_is_that_of_diffusers() -> None:
    scheduler, objective = flow(shift=3.0)
    times = scheduler.timesteps[[0, 10, 500, 999]]
    clean, noise = latents(4), latents(4, 1)
    drawn = Draw(noise, torch.zeros_like(noise), times, torch.zeros(4, dtype=torch.bool))
    torch.testing.assert_close(noised(objective, clean, drawn), scheduler.scale_noise(clean, times, noise))
    assert torch.equal(target(objective, clean, drawn), noise - clean)
    # A step of the sampler from there with what is right ends at the picture.
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [1000.0]
    end = scheduler.step(target(objective, clean, drawn), scheduler.timesteps[0], noise).prev_sample
    torch.testing.assert_close(end, clean)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "sample"])
def test_with_what_is_right_the_sampler_finds_the_picture(name: str) -> None:
    scheduler, objective = ddpm(name, clip_sample=False)
    clean = latents(1)
    drawn = draw(objective, seed=0, step=0, slots=[0], shape=SHAPE)
    answer = target(objective, clean, drawn)
    found = scheduler.step(answer, int(drawn.timesteps[0]), noised(objective, clean, drawn)).pred_original_sample
    torch.testing.assert_close(found, clean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(16, 32, 32), (16, 64, 64), (16, 128, 128), (16, 64, 96)])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("architecture", ["flux", "sd3"])
def test_the_shift_that_grows_with_the_picture_is_the_samplers(
    architecture: str, kind: str, shape: tuple[int, int, int]
) -> None:
    scheduler, objective = flow(architecture, **FLUX, time_shift_type=kind)
    length = (shape[1] // 2) * (shape[2] // 2)
    mu = calculate_shift(length, 256, 4096, 0.5, 1.15)
    sigmas = np.linspace(1.0, 1 / 20, 20)
    scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=mu)
    factor = objective.factor(shape)
    ours = factor * sigmas / (1 + (factor - 1) * sigmas)
    np.testing.assert_allclose(ours, scheduler.sigmas[:-1].numpy(), rtol=1e-5)
    drawn = draw(objective, seed=1, step=0, slots=range(5), shape=shape).timesteps.double() / 1000
    plain = flow(architecture, shift=1.0)[1]
    even = draw(plain, seed=1, step=0, slots=range(5), shape=shape).timesteps.double() / 1000
    torch.testing.assert_close(drawn, factor * even / (1 + (factor - 1) * even), atol=1e-6, rtol=0)
    assert objective_of(model(scheduler, architecture, patch_size=2), shift=2.5).factor(shape) == 2.5


# ------------------------------------------------------------------------------------------------ loss


@every_kind
def test_a_perfect_prediction_has_no_loss_and_another_has_its_own(kind: str) -> None:
    objective = OBJECTIVES[kind]()
    clean = latents(5)
    drawn = draw(objective, seed=2, step=0, slots=range(5), shape=SHAPE, noise_offset=0.1)
    right = target(objective, clean, drawn)
    assert torch.equal(loss(objective, right, clean, drawn), torch.zeros(5))
    wrong = right.clone()
    wrong[1] += 2
    wrong[3, :2] -= 1
    torch.testing.assert_close(loss(objective, wrong, clean, drawn), torch.tensor([0, 4, 0, 0.5, 0]))
    half = loss(objective, wrong.bfloat16(), clean, drawn)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_are_the_formula(kind: str, zero_snr: bool, gamma: float) -> None:
    scheduler, objective = ddpm(kind, rescale_betas_zero_snr=zero_snr)
    times = torch.arange(0, 999)
    snr = compute_snr(scheduler, times)
    least = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    expected = {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}[kind]
    torch.testing.assert_close(snr_weights(objective, times, gamma), expected, atol=1e-6, rtol=1e-4)
    last = snr_weights(objective, torch.tensor([999]), gamma)
    assert bool(last.isfinite().all())
    if zero_snr:  # pure noise: a weight of 1 for the noise, and of 0 for whatever tells of the picture
        torch.testing.assert_close(last, torch.tensor([1.0 if kind == "epsilon" else 0.0]), atol=1e-6, rtol=0)
    clean = latents(3)
    drawn = draw(objective, seed=2, step=0, slots=range(3), shape=SHAPE)
    wrong = target(objective, clean, drawn) + 1
    torch.testing.assert_close(
        loss(objective, wrong, clean, drawn, snr_gamma=gamma), snr_weights(objective, drawn.timesteps, gamma)
    )


# ------------------------------------------------------------------------------------------------ which objective


def test_the_objective_follows_from_the_scheduler_and_can_be_said() -> None:
    scheduler, objective = ddpm("v_prediction")
    assert objective.kind == "v_prediction"
    assert objective_of(model(scheduler), prediction="epsilon").kind == "epsilon"
    assert flow(shift=3.0)[1].kind == "flow"
    assert flow(shift=3.0)[1].factor(SHAPE) == 3.0
    # A sampler of another family beside a model of flow matching changes nothing.
    other = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    assert objective_of(model(other, "sd3", patch_size=2)).factor(SHAPE) == 3.0
    assert objective_of(model(diffusers.FlowMatchEulerDiscreteScheduler(), "sdxl")).kind == "flow"


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as told:
        call()
    return f"{told.value} | {told.value.hint}"


def test_words_of_the_other_kind_of_model_are_refused() -> None:
    noise, flowing = model(ddpm()[0]), model(flow()[0], "sd3", patch_size=2)
    assert refused(lambda: objective_of(noise, prediction="flow")) == (
        "--prediction: found 'flow', expected epsilon or v_prediction or sample for model | None"
    )
    assert refused(lambda: objective_of(flowing, prediction="epsilon")) == (
        "--prediction: found 'epsilon', expected flow for model | None"
    )
    assert refused(lambda: objective_of(noise, shift=3.0)).startswith("--shift: is of flow matching, but model is")
    assert refused(lambda: objective_of(noise, weighting="none")).startswith("--weighting: is of flow matching")
    assert refused(lambda: objective_of(flowing, weighting="cosmap")) == (
        "--weighting: found 'cosmap', expected logit_normal or none | None"
    )
    for shift in (0.0, -1.0, math.inf, math.nan):
        assert "expected a number above 0" in refused(lambda shift=shift: objective_of(flowing, shift=shift))
    odd = diffusers.EDMEulerScheduler()
    assert refused(lambda: objective_of(model(odd))) == (
        "model: its scheduler EDMEulerScheduler has no DDPM schedule, expected one with beta_schedule | None"
    )
    odd = diffusers.DDPMScheduler(**BETAS, prediction_type="flow_prediction")
    assert refused(lambda: objective_of(model(odd))).endswith(
        "expected epsilon, v_prediction, sample | name what it predicts with --prediction"
    )


def test_min_snr_is_refused_where_there_is_none() -> None:
    times = torch.tensor([1.0])
    assert refused(lambda: snr_weights(flow()[1], times, 5.0)).startswith("--snr-gamma: is of DDPM objectives")
    assert refused(lambda: snr_weights(ddpm()[1], times.long(), 0.0)) == (
        "--snr-gamma: found 0, expected a number above 0 | None"
    )


# ------------------------------------------------------------------------------------------------ held-out pictures


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any, Any, Any]]:
    root = tmp_path_factory.mktemp("held-out")
    data = sprites(root / "data", count=3, size=64)
    made: dict[str, tuple[Any, Any, Any, Any]] = {}

    def prepare(name: str, only: slice = slice(None)) -> tuple[Any, Any, Any, Any]:
        if name not in made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = load(tiny_model(name, root / name), where="test", device="cpu")
            made[name] = loaded, encoding_of(loaded, where="test"), None, objective_of(loaded)
        loaded, encoding, _, objective = made[name]
        examples = read_examples(data, where="test").examples[only]
        return loaded, encoding, encode(loaded, examples, Framing((64, 64), True)), objective

    return prepare


def test_the_tiny_models_are_trained_for_what_their_folders_say(prepared: Any) -> None:
    found = {name: prepared(name)[3] for name in ("sd15", "sd2", "flux")}
    assert {name: objective.kind for name, objective in found.items()} == {
        "sd15": "epsilon", "sd2": "v_prediction", "flux": "flow",
    }  # fmt: skip
    assert found["flux"].factor((16, 32, 32)) == pytest.approx(math.exp(0.5))


@pytest.mark.parametrize("name", ["sd2", "flux"])
def test_the_held_out_loss_is_that_of_a_plain_loop(prepared: Any, name: str) -> None:
    loaded, encoding, encoded, objective = prepared(name)
    pipe = loaded.pipe
    noises: dict[tuple[int, int], torch.Tensor] = {}
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []
    predict = encoding.predict

    # Which noise there was is read from what the network was shown, at a timestep where nothing else is shown.
    class Watched:
        denoiser = encoding.denoiser

        @staticmethod
        def predict(given: Any, noisy: torch.Tensor, times: torch.Tensor, *rest: Any) -> torch.Tensor:
            asked.append((noisy, times))
            return predict(given, noisy, times, *rest)

    pairs = 4
    found = held_out_loss(loaded, Watched, encoded, objective, pairs=pairs, seed=3, batch=3)
    middles = [125.0, 375.0, 625.0, 875.0]
    assert list(found.timesteps) == middles
    table = torch.zeros(pairs, 3, dtype=torch.float64)
    scheduler = None if name == "flux" else diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    for pair, (noisy, times) in enumerate(asked):
        assert times.tolist() == [middles[pair]] * 3
        for index in range(3):
            given = encoded.batch([index], [False])
            clean, time = given["mean"], times[index : index + 1]
            if scheduler is None:
                sigma = time / 1000
                noise = (noisy[index] - (1 - sigma) * clean) / sigma
                right = noise - clean
            else:
                alpha = scheduler.alphas_cumprod[time]
                noise = (noisy[index] - alpha.sqrt() * clean) / (1 - alpha).sqrt()
                right = scheduler.get_velocity(clean, noise, time)
            noises[pair, index] = noise
            with torch.no_grad():
                answer = predict(pipe, noisy[index : index + 1], time, given, given["sizes"])
            table[pair, index] = torch.nn.functional.mse_loss(answer, right).double()
    torch.testing.assert_close(torch.tensor(found.losses).double(), table.mean(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.tensor(found.examples).double(), table.mean(0), rtol=1e-4, atol=0)
    assert found.mean == pytest.approx(float(table.mean()), rel=1e-4)
    flat = torch.stack([noise.flatten() for noise in noises.values()])
    assert float((torch.corrcoef(flat) - torch.eye(12)).abs().max()) < 0.5  # no two of them are alike
    assert abs(float(flat.std()) - 1) < 0.1


def test_the_held_out_loss_is_fixed_by_seed_and_picture(prepared: Any) -> None:
    loaded, encoding, encoded, objective = prepared("sd15")

    def measured(encoded: Any = encoded, seed: int = 3, batch: int = 3) -> Any:
        return held_out_loss(loaded, encoding, encoded, objective, pairs=2, seed=seed, batch=batch)

    first = measured()
    torch.manual_seed(5)
    assert measured() == first
    assert measured(batch=1).examples == pytest.approx(first.examples, rel=1e-5)
    assert measured(seed=4).mean != first.mean
    # The pictures before it change nothing.
    assert measured(prepared("sd15", slice(1, None))[2]).examples == pytest.approx(first.examples[1:], rel=1e-5)
    assert Counter(map(len, (first.timesteps, first.losses, first.examples))) == {2: 2, 3: 1}


def test_the_held_out_loss_leaves_the_network_as_it_was(prepared: Any) -> None:
    loaded, encoding, encoded, objective = prepared("sd15")
    unet = loaded.pipe.unet
    modes = []
    hook = unet.register_forward_pre_hook(lambda module, _: modes.append((module.training, torch.is_grad_enabled())))
    unet.train()
    try:
        held_out_loss(loaded, encoding, encoded, objective, pairs=1, seed=0)
        assert unet.training
    finally:
        hook.remove()
        unet.eval()
    assert modes == [(False, False)]
    assert torch.is_grad_enabled()
