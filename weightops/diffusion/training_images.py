"""Images that a training run makes: of the class, where some are missing, and samples of what was learnt so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion.extras import hushed
from weightops.diffusion.pictures import find_pictures
from weightops.diffusion.png_text import encode_png
from weightops.diffusion.tables import write_whole
from weightops.diffusion.written import recipe_inputs
from weightops.errors import OutputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from weightops.diffusion.models import Loaded
    from weightops.engine.run import Progress


def class_images(
    loaded: Loaded, folder: Path, prompt: str, *, count: int, resolution: tuple[int, int], steps: int, seed: int,
    on_progress: Progress,
) -> int:  # fmt: skip
    """Have the model itself make the images of the class that are missing from `folder`, and return how many it made.

    Which image follows from `seed` and its number in its name, so that a run that was broken off, or a folder that
    lost a few, ends up with the same ones. Raises OutputError.
    """
    there = _count(folder)
    missing = count - there
    if missing <= 0:
        return 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(str(folder), f"cannot be made: {e.strerror or e}") from None
    free = [number for number in range(count) if not (folder / _name(number)).exists()][:missing]
    for done, number in enumerate(free):
        on_progress(done, len(free))
        made = paint(loaded, prompt, (seed, number), resolution, steps, {"seed": seed, "number": number})
        write_whole(folder / _name(number), made)
    on_progress(len(free), len(free))
    return len(free)


def _name(number: int) -> str:
    return f"class-{number:05d}.png"


def _count(folder: Path) -> int:
    """How many images of the class are there, none where the folder is not."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return 0
    try:
        return len(find_pictures(folder, where=str(folder)).pictures)
    except UsageError as e:
        raise UsageError("--class-folder", e.what, e.hint) from None


def paint(
    loaded: Loaded, prompt: str, seed: Sequence[int], resolution: tuple[int, int], steps: int, told: Mapping[str, Any]
) -> bytes:
    """A PNG of what the model makes of a prompt, with all else as its pipeline has it; `told` stands in the file.

    seed: numbers, on all of which the noise depends.
    """
    import numpy as np
    import torch

    # torch's generator on the CPU keeps 32 bits of a seed: these numbers are mixed down to as many.
    word = int(np.random.SeedSequence(list(seed)).generate_state(1, np.uint32)[0])
    height, width = resolution
    with hushed(), torch.no_grad():
        image = loaded.pipe(
            prompt=prompt, height=height, width=width, num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(word),
        ).images[0]  # fmt: skip
    recipe = {"command": "train", "version": __version__, "inputs": recipe_inputs(loaded.hashes)}
    return encode_png(image, {**recipe, "prompt": prompt, **told})
