"""Tiny models and sprites for the tests of training, made once; and a training whose network can be looked at."""

from __future__ import annotations

import atexit
import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from weightops.diffusion import train as verb
from weightops.diffusion import training_run
from weightops.diffusion.extras import hushed
from weightops.diffusion.tiny import sprites, tiny_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _name in ("diffusers", "transformers", "peft", "accelerate", "matplotlib", "PIL"):
        pytest.importorskip(_name)
torch.set_num_threads(1)

# The libraries warn of one another, and of nothing that is ours.
quietly = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning", "ignore:.*:UserWarning")


@functools.cache
def root() -> Path:
    """A folder for what all tests of a run share."""
    made = tempfile.TemporaryDirectory(prefix="weightops-tests-")
    atexit.register(made.cleanup)
    return Path(made.name)


@functools.cache
def model(architecture: str) -> Path:
    """A tiny model's diffusers folder. Not to be changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tiny_model(architecture, root() / architecture)


@functools.cache
def images(count: int = 4) -> Path:
    """Sprites with captions. Not to be changed."""
    return sprites(root() / f"sprites-{count}", count=count, seed=1)


class Trained(NamedTuple):
    report: Any
    loaded: Any
    lora: Any
    told: Any


def train(output: Path, architecture: str = "flux", folder: Path | None = None, **words: Any) -> Any:
    """A short training at 64 pixels on the processor, and its report."""
    given = {"kind": "text-to-image", "model": model(architecture), "steps": 2, "resolution": 64, "device": "cpu"}
    if "epochs" in words:
        del given["steps"]
    given |= words
    return verb.train(given.pop("kind"), images() if folder is None else folder, output=output, **given)


def train_and_look(output: Path, architecture: str = "flux", folder: Path | None = None, **words: Any) -> Trained:
    """The same, and the pipeline that was trained with the LoRA still on it."""
    kept: dict[str, Any] = {}
    load, run = verb.load, training_run.Training

    def loading(*given: Any, **more: Any) -> Any:
        kept["loaded"] = load(*given, **more)
        return kept["loaded"]

    def making(*given: Any, **more: Any) -> Any:
        kept["training"] = run(*given, **more)
        return kept["training"]

    with (
        mock.patch.object(verb, "load", loading),
        mock.patch.object(training_run, "Training", making),
        mock.patch.object(training_run, "write_lora", side_effect=training_run.write_lora) as written,
    ):
        report = train(output, architecture, folder, **words)
    return Trained(report, kept["loaded"], kept["training"].lora, written.call_args.args[1])


def image(pipe: Any) -> torch.Tensor:
    """Two steps, always from the same noise.

    At 64 pixels the tiny UNets' lowest level is one pixel, and its group norms are of two values: which of two nearly
    equal ones is the larger would decide the image.
    """
    pipe.set_progress_bar_config(disable=True)
    words = {"guidance_scale": 3.0, "num_inference_steps": 2, "height": 128, "width": 128, "output_type": "np"}
    with torch.no_grad(), hushed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pipe("a red ball", generator=torch.Generator().manual_seed(1), **words).images
    return torch.from_numpy(found)
