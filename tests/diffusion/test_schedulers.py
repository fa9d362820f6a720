"""Every name makes the scheduler that people mean by it; nothing that the model was trained for is lost on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from weightops.diffusion.extras import hushed
from weightops.diffusion.schedulers import SAMPLERS, check_name, is_flow, scheduler_named, shown
from weightops.errors import UsageError

with hushed():
    diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# As the folders of Stable Diffusion 1.5, of 2.1 and of SD3 have them.
SD15 = {
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False,
}  # fmt: skip
SD2 = {**SD15, "prediction_type": "v_prediction"}
FLOWS = [name for name, sampler in SAMPLERS.items() if sampler.flow]


def own(name: str = "PNDMScheduler", **settings: Any) -> Any:
    with hushed():
        return getattr(diffusers, name).from_config({**SD15, **settings})


def refusal(call: Any) -> tuple[str, str | None]:
    with pytest.raises(UsageError) as e:
        call()
    return str(e.value), e.value.hint


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_name_makes_its_class_from_the_models_own_scheduler(name: str) -> None:
    made = scheduler_named(name, own())
    with hushed():
        made.set_timesteps(6)
    assert 0 < made.timesteps.max() < 1000
    assert type(made).__name__ == SAMPLERS[name].made
    assert bool(made.config.get("use_karras_sigmas")) is name.endswith("karras")
    assert (made.config.beta_start, made.config.beta_schedule) == (0.00085, "scaled_linear")
    assert not made.config.get("clip_sample")
    assert shown(made) == (SAMPLERS[name].shown, "Karras" if name.endswith("karras") else "")


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_the_model_predicts_stays(name: str) -> None:
    assert scheduler_named(name, own(prediction_type="v_prediction")).config.prediction_type == "v_prediction"


def test_the_models_own_scheduler_is_made_anew() -> None:
    before = own("DDIMScheduler", timestep_spacing="trailing")
    made = scheduler_named(None, before)
    assert made is not before
    assert made.config == before.config


def test_a_plain_name_takes_off_the_spacing_that_the_model_brings() -> None:
    before = own("EulerDiscreteScheduler", use_karras_sigmas=True)
    assert not scheduler_named("dpmpp-2m", before).config.use_karras_sigmas
    assert scheduler_named("dpmpp-2m-karras", before).config.use_karras_sigmas


def test_latents_are_not_clipped_where_the_models_scheduler_says_nothing_of_it() -> None:
    with hushed():
        before = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear")
    assert "clip_sample" not in before.config
    assert scheduler_named("ddim", before).config.clip_sample is False
    assert scheduler_named("ddpm", own("DDIMScheduler", clip_sample=True)).config.clip_sample is True


def test_a_schedule_that_ends_in_noise_and_trailing_steps_stay_or_are_refused() -> None:
    before = own("DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    for name in ("euler", "euler-a", "dpmpp-2m", "unipc", "lcm"):
        made = scheduler_named(name, before)
        assert made.config.rescale_betas_zero_snr
        assert made.config.timestep_spacing == "trailing"
    assert refusal(lambda: scheduler_named("pndm", before)) == (
        "--scheduler: pndm has no setting for a schedule that ends in pure noise: the model's own scheduler says "
        "rescale_betas_zero_snr True",
        "euler, ddim and dpmpp-2m have one",
    )
    assert refusal(lambda: scheduler_named("dpmpp-2s", own("DDIMScheduler", timestep_spacing="trailing"))) == (
        "--scheduler: dpmpp-2s has one spacing of its steps: the model's own scheduler says timestep_spacing trailing",
        "euler, ddim and dpmpp-2m have others",
    )


@pytest.mark.parametrize("name", FLOWS)
def test_models_of_flow_matching_get_schedulers_of_flow_matching(name: str) -> None:
    with hushed():
        before = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    made = scheduler_named(name, before)
    assert is_flow(made)
    assert type(made).__name__ == SAMPLERS[name].flow
    assert made.config.get("shift", made.config.get("flow_shift")) == 3.0
    made.set_timesteps(8)
    if not SAMPLERS[name].flow.startswith("FlowMatch"):
        even = torch.linspace(1, 0.001, 9)[:-1]
        assert torch.allclose(made.sigmas[:-1], 3 * even / (1 + 2 * even), atol=2e-3)
    assert made.sigmas[0] == pytest.approx(1, abs=1e-3)
    assert made.sigmas[-1] == 0


def test_a_shift_that_depends_upon_the_size_stays_so() -> None:
    with hushed():
        before = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.4)
    made = scheduler_named("dpmpp-2m", before)
    assert made.config.use_dynamic_shifting
    assert made.config.base_shift == 0.4
    assert made.config.flow_shift == 1.0


def test_what_fits_no_flow_is_refused_by_name() -> None:
    with hushed():
        before = diffusers.FlowMatchEulerDiscreteScheduler()
    assert refusal(lambda: scheduler_named("ddim", before)) == (
        "--scheduler: ddim is made for models that predict noise or velocities, and this one matches flows",
        "for it there are euler, dpmpp-2m, unipc",
    )


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    assert refusal(lambda: check_name("dpmpp2m")) == (
        "--scheduler: unknown scheduler 'dpmpp2m'", "did you mean dpmpp-2m?"
    )  # fmt: skip
    assert refusal(lambda: check_name("zzz")) == (
        "--scheduler: unknown scheduler 'zzz'", f"known are {', '.join(SAMPLERS)}"
    )  # fmt: skip


def test_a_scheduler_without_a_name_of_ours_is_called_by_its_class() -> None:
    with hushed():
        assert shown(diffusers.DDIMInverseScheduler()) == ("DDIMInverseScheduler", "")
