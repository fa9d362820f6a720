"""What a model predicts, the noise or the velocity: how files say it, and how each layout says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.files.tensor import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightops.files.checkpoint import Checkpoint

KINDS = ("epsilon", "v_prediction")
_VELOCITY = frozenset({"v", "v_prediction", "v-prediction"})
_SCHEDULER = "scheduler/scheduler_config.json"

# Released both ways with the same names and shapes: what diffusers' own loader takes it for, where nothing says.
_EITHER = {"sd2": "v_prediction"}
# The UNet's sample size in either release of these.
_SAMPLE_SIZES = {"sd2": {"epsilon": 64, "v_prediction": 96}}
# These variants were released one way only.
_SETTLED = {"sd2_inpaint": "epsilon", "sd2_depth": "epsilon"}
# Architectures whose readers look for empty tensors of these names. Source: ComfyUI, supported_models.py.
_MARKED = frozenset({"sdxl"})


@dataclass(frozen=True, slots=True)
class Prediction:
    """kind: one of KINDS. zero_snr: the schedule ends in pure noise. by: who says so, "" where it is assumed."""

    kind: str
    zero_snr: bool = False
    by: str = ""

    @property
    def scheduler(self) -> dict[str, Any]:
        """The settings of a scheduler that say so."""
        return {"prediction_type": self.kind} | ({"rescale_betas_zero_snr": True} if self.zero_snr else {})

    def markers(self, architecture: str) -> dict[str, TensorSpec]:
        """The empty tensors by which a single file says so."""
        if self.kind == "epsilon" or architecture not in _MARKED:
            return {}
        names = ("v_pred", "ztsnr") if self.zero_snr else ("v_pred",)
        return {name: TensorSpec("F32", (0,)) for name in names}

    @property
    def metadata(self) -> dict[str, str]:
        """The same as metadata; of ModelSpec."""
        return {"modelspec.prediction_type": "epsilon" if self.kind == "epsilon" else "v"}


def prediction_of(
    opened: Checkpoint, architecture: str, variant: str | None, *, asked: str | None, like: Checkpoint | None
) -> Prediction | None:
    """What the model predicts, as --prediction, the file itself or else --like says; None: the usual.

    Where nobody says it of a model that was released both ways, it is assumed, and `by` is empty.
    """
    said = _said(opened)
    if asked is not None:
        return Prediction(asked, said is not None and said.zero_snr, "--prediction")
    if said is not None or (like is not None and like.bytes_beside(_SCHEDULER) is not None):
        return said
    kind = _SETTLED.get(variant or "", _EITHER.get(architecture))
    return None if kind is None else Prediction(kind, by=variant or "" if variant in _SETTLED else "")


def _said(opened: Checkpoint) -> Prediction | None:
    """What a file says by tensors, metadata, or its scheduler."""
    zero_snr = "ztsnr" in opened.tensors or _is_true(opened.metadata.get("ss_zero_terminal_snr"))
    if "v_pred" in opened.tensors:
        return Prediction("v_prediction", zero_snr, "v_pred")
    kind = opened.metadata.get("modelspec.prediction_type", "").lower()
    if kind in _VELOCITY or kind == "epsilon":
        return Prediction("v_prediction" if kind in _VELOCITY else kind, zero_snr, "modelspec.prediction_type")
    if _is_true(opened.metadata.get("ss_v_parameterization")):
        return Prediction("v_prediction", zero_snr, "ss_v_parameterization")
    said = (opened.json_beside(_SCHEDULER) if opened.container == "diffusers" else None) or {}
    if said.get("prediction_type") in KINDS:
        return Prediction(said["prediction_type"], said.get("rescale_betas_zero_snr") is True, _SCHEDULER)
    return None


def _is_true(text: str | None) -> bool:
    return text is not None and text.lower() in ("true", "1")


def sample_size(architecture: str, prediction: Prediction | None) -> Mapping[str, Any]:
    """What config.json of the diffusion model says otherwise, for what it predicts."""
    sizes = _SAMPLE_SIZES.get(architecture)
    return {} if sizes is None or prediction is None else {"sample_size": sizes[prediction.kind]}
