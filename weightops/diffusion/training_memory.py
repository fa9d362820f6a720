"""Memory of a training run: what a step does not need leaves the GPU, and want of it is one sentence with a remedy."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from weightops.diffusion.checkpoints import newest
from weightops.diffusion.models import networks
from weightops.errors import MemoryRefused, WeightopsError
from weightops.ops.report import peak_memory_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from weightops.diffusion.models import Loaded
    from weightops.diffusion.training_words import Words

# How torch's allocator on the CPU says it, in an error of no kind of its own.
_SAID = ("not enough memory", "can't allocate memory", "cannot allocate memory")


@contextlib.contextmanager
def enough_memory(words: Words, folder: Path, *, gradient_checkpointing: bool) -> Iterator[None]:
    """Raises MemoryRefused where there is too little, and names what would help."""
    import torch

    try:
        yield
    except WeightopsError:
        raise
    except (torch.OutOfMemoryError, MemoryError):
        raise _too_little(words, folder, gradient_checkpointing) from None
    except RuntimeError as e:
        if not any(said in str(e) for said in _SAID):
            raise
        raise _too_little(words, folder, gradient_checkpointing) from None


def _too_little(words: Words, folder: Path, gradient_checkpointing: bool) -> MemoryRefused:
    remedies = {
        "--batch 1": (words.batch or 1) > 1,
        "--gradient-checkpointing": not gradient_checkpointing,
        "--mixed-precision bf16": words.mixed_precision == "no",
        "a lower --resolution": True,
        "a lower --rank": (words.rank or 1) > 4,
    }
    last = newest(folder)
    kept = f"; {last.name} is kept, and --resume goes on from it" if last is not None else ""
    hint = ", ".join(remedy for remedy, helps in remedies.items() if helps)
    return MemoryRefused("train", f"the device has too little memory for this{kept}", f"what helps: {hint}")


def park(loaded: Loaded, denoiser: str) -> None:
    """Leave the denoiser alone on the GPU: latents and embeddings are made."""
    if loaded.device.type == "cpu":
        return
    import torch

    for name, network in networks(loaded.pipe).items():
        if name != denoiser:
            network.to("cpu")
    torch.cuda.empty_cache()


@contextlib.contextmanager
def unparked(loaded: Loaded, denoiser: str) -> Iterator[None]:
    """All of the pipeline on its device, for an image; after it, each network where it was."""
    before = {
        name: next(network.parameters()).device for name, network in networks(loaded.pipe).items() if name != denoiser
    }
    try:
        for name in before:
            getattr(loaded.pipe, name).to(loaded.device)
        yield
    finally:
        for name, device in before.items():
            getattr(loaded.pipe, name).to(device)


def peak(loaded: Loaded) -> int | None:
    """The most memory that was taken: of the GPU where there is one, else of the process."""
    if loaded.device.type == "cpu":
        return peak_memory_bytes()
    import torch

    return int(torch.cuda.max_memory_allocated(loaded.device))
