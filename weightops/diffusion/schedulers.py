"""Samplers by the names that people know: which scheduler of diffusers each is, with which settings.

A scheduler is built from the one that the model brings, so that what the model predicts, its noise schedule and its
spacing stay; what cannot be kept is refused. Knows no pipeline and draws nothing.
"""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.diffusion.extras import hushed, need
from weightops.errors import UsageError, quote

if TYPE_CHECKING:
    from collections.abc import Mapping

_KARRAS: Mapping[str, Any] = {"use_karras_sigmas": True}
_SDE: Mapping[str, Any] = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
_ODE: Mapping[str, Any] = {"algorithm_type": "dpmsolver++", "solver_order": 2}
# Any number of steps, not the even ones alone.
_SINGLE: Mapping[str, Any] = {**_ODE, "lower_order_final": True}
_FLOW: Mapping[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

# What a spacing of noise levels may be called in a scheduler's settings: one of them, or none, is chosen by the name.
_SPACINGS: Mapping[str, Any] = {
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
}  # fmt: skip
# Latents are no pixels: they do not end at -1 and 1. A scheduler that says nothing of it would clip them there.
_UNSAID: Mapping[str, Any] = {"clip_sample": False}


@dataclass(frozen=True, slots=True)
class Sampler:
    """A class of diffusers and its settings. flow: the class for models of flow matching, "" where there is none.

    shown: what A1111's WebUI calls it, and other programs read in an image. package: what it needs beside diffusers.
    """

    made: str
    shown: str
    settings: Mapping[str, Any]
    flow: str = ""
    package: str = ""


SAMPLERS: Mapping[str, Sampler] = {
    "euler": Sampler("EulerDiscreteScheduler", "Euler", {}, "FlowMatchEulerDiscreteScheduler"),
    "euler-karras": Sampler("EulerDiscreteScheduler", "Euler", _KARRAS),
    "euler-a": Sampler("EulerAncestralDiscreteScheduler", "Euler a", {}),
    "heun": Sampler("HeunDiscreteScheduler", "Heun", {}),
    "heun-karras": Sampler("HeunDiscreteScheduler", "Heun", _KARRAS),
    "dpm2": Sampler("KDPM2DiscreteScheduler", "DPM2", {}),
    "dpm2-karras": Sampler("KDPM2DiscreteScheduler", "DPM2", _KARRAS),
    "dpm2-a": Sampler("KDPM2AncestralDiscreteScheduler", "DPM2 a", {}),
    "dpm2-a-karras": Sampler("KDPM2AncestralDiscreteScheduler", "DPM2 a", _KARRAS),
    "dpmpp-2m": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M", _ODE, "DPMSolverMultistepScheduler"),
    "dpmpp-2m-karras": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M", {**_ODE, **_KARRAS}),
    "dpmpp-2m-sde": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M SDE", _SDE),
    "dpmpp-2m-sde-karras": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M SDE", {**_SDE, **_KARRAS}),
    "dpmpp-2s": Sampler("DPMSolverSinglestepScheduler", "DPM++ 2S", _SINGLE),
    "dpmpp-2s-karras": Sampler("DPMSolverSinglestepScheduler", "DPM++ 2S", {**_SINGLE, **_KARRAS}),
    "ddim": Sampler("DDIMScheduler", "DDIM", {}),
    "ddpm": Sampler("DDPMScheduler", "DDPM", {}),
    "deis": Sampler("DEISMultistepScheduler", "DEIS", {}),
    "lcm": Sampler("LCMScheduler", "LCM", {}),
    "lms": Sampler("LMSDiscreteScheduler", "LMS", {}, package="scipy"),
    "lms-karras": Sampler("LMSDiscreteScheduler", "LMS", _KARRAS, package="scipy"),
    "pndm": Sampler("PNDMScheduler", "PLMS", {"skip_prk_steps": True}),
    "tcd": Sampler("TCDScheduler", "TCD", {}),
    "unipc": Sampler("UniPCMultistepScheduler", "UniPC", {}, "UniPCMultistepScheduler"),
}


def check_name(name: str) -> None:
    """Refuse a word that names no sampler, or one whose package is missing. Raises UsageError."""
    if name not in SAMPLERS:
        near = difflib.get_close_matches(name, SAMPLERS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(SAMPLERS)}"
        raise UsageError("--scheduler", f"unknown scheduler {quote(name, 60)}", hint)
    if SAMPLERS[name].package:
        need(f"--scheduler {name}", SAMPLERS[name].package, extra="rebasin")


def is_flow(scheduler: Any) -> bool:
    """Is it a scheduler of flow matching, as SD3 and Flux have?"""
    found = scheduler.config
    return (
        type(scheduler).__name__.startswith("FlowMatch")
        or bool(found.get("use_flow_sigmas"))
        or found.get("prediction_type") == "flow_prediction"
    )


def scheduler_named(name: str | None, own: Any) -> Any:
    """The scheduler of this name, built from the model's own one; None: the own one, made anew.

    Raises UsageError where it does not fit what the model predicts, or cannot keep how the model's noise is spaced.
    """
    if name is not None:
        check_name(name)
    with hushed():
        return _made(name, own)


def _made(name: str | None, own: Any) -> Any:
    import diffusers

    if name is None:
        return type(own).from_config(own.config)
    asked = SAMPLERS[name]
    if is_flow(own):
        if not asked.flow:
            known = ", ".join(word for word, sampler in SAMPLERS.items() if sampler.flow)
            what = f"{name} is made for models that predict noise or velocities, and this one matches flows"
            raise UsageError("--scheduler", what, f"for it there are {known}")
        made = getattr(diffusers, asked.flow)
        if asked.flow.startswith("FlowMatch"):
            return made.from_config(own.config)
        # The shift of a schedule has two names.
        shift = {} if own.config.get("use_dynamic_shifting") else {"flow_shift": _shift(own.config)}
        return made.from_config(own.config, **{**_SPACINGS, **asked.settings, **_FLOW, **shift})
    made = getattr(diffusers, asked.made)
    known_words = inspect.signature(made.__init__).parameters
    _check_kept(name, own.config, known_words)
    settings = {word: own.config.get(word, unsaid) for word, unsaid in _UNSAID.items()}
    settings |= {**_SPACINGS, **asked.settings}
    return made.from_config(own.config, **{word: value for word, value in settings.items() if word in known_words})


def _shift(config: Mapping[str, Any]) -> float:
    return float(config.get("flow_shift", config.get("shift", 1.0)))


# What a model was trained for and a scheduler may not know: the setting, the value that means nothing, in words.
_KEPT = (
    ("prediction_type", "epsilon", "what the model predicts"),
    ("rescale_betas_zero_snr", False, "a schedule that ends in pure noise"),
)


def _check_kept(name: str, config: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for word, usual, meaning in _KEPT:
        said = config.get(word, usual)
        if said != usual and word not in known:
            what = f"{name} has no setting for {meaning}: the model's own scheduler says {word} {said}"
            raise UsageError("--scheduler", what, "euler, ddim and dpmpp-2m have one")
    if config.get("timestep_spacing") == "trailing" and "timestep_spacing" not in known:
        what = f"{name} has one spacing of its steps: the model's own scheduler says timestep_spacing trailing"
        raise UsageError("--scheduler", what, "euler, ddim and dpmpp-2m have others")


def shown(scheduler: Any) -> tuple[str, str]:
    """What A1111's WebUI calls this scheduler, and its spacing ("Karras", or ""); its class, where it has no name."""
    name, found = type(scheduler).__name__, scheduler.config
    karras = "Karras" if found.get("use_karras_sigmas") else ""
    for sampler in SAMPLERS.values():
        algorithm = sampler.settings.get("algorithm_type", found.get("algorithm_type"))
        if name in (sampler.made, sampler.flow) and algorithm == found.get("algorithm_type"):
            return sampler.shown, karras
    return name, karras
