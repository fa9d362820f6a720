"""A small base and a family of LoRAs of it, made on the spot, so that anyone can try what synthesis does.

A LoRA is of one made-up creature, whom seven numbers describe. What stands is kept: a run that was stopped goes on.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion.extras import need
from weightops.diffusion.threads import one_thread
from weightops.errors import Interrupted, UsageError, printable
from weightops.ops.report import peak_memory_bytes
from weightops.synthesis.family_base import encoded, make_base
from weightops.synthesis.family_embedder import make_embedder
from weightops.synthesis.family_folder import (
    BASE,
    EMBEDDER,
    HELD_OUT,
    IMAGES,
    LORAS,
    OTHER_GAUGE,
    Family,
    Words,
    begin,
    make_folder,
    pictures,
    write_conditions,
    write_pictures,
)
from weightops.synthesis.family_loras import GROUP, Trainer, at_once, layout_of, other_gauge
from weightops.synthesis.family_pictures import CAPTION
from weightops.synthesis.lora_file import write_lora
from weightops.synthesis.members import Reader

if TYPE_CHECKING:
    import os

    import numpy as np
    from torch import Tensor

    from weightops.diffusion.models import Loaded
    from weightops.synthesis.family_base import Progress
    from weightops.synthesis.layout import Layout


@dataclass(slots=True)
class FamilyReport:
    """What was made. modules, features: that a LoRA has. trained_before: LoRAs that an interrupted run had left.

    base_loss, trained_loss: on held-out pictures, without a LoRA and with the creature's own, in the mean. vae_error:
    root mean square, of pixels from 0 to 1. embedder: R² of each number, read off pictures of creatures that the
    embedder was not fitted on.
    """

    output: str
    count: int
    rank: int
    modules: int
    features: int
    images: int
    held_out: int
    trained_before: int
    vae_error: float
    base_loss: float
    trained_loss: float
    embedder: dict[str, float]
    random_gauge: bool
    bytes_written: int
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def gain(self) -> float:
        """By how much of itself the base's loss is higher than the trained one."""
        return 1 - self.trained_loss / self.base_loss if self.base_loss else 0.0

    @property
    def embedder_mean(self) -> float:
        return math.fsum(self.embedder.values()) / len(self.embedder)

    def to_dict(self) -> dict[str, Any]:
        return {
            "command": "synth family", "version": __version__, "inputs": [], "output": self.output,
            "bytes_written": self.bytes_written, "count": self.count, "rank": self.rank, "modules": self.modules,
            "features": self.features, "images": self.images, "held_out": self.held_out,
            "trained_before": self.trained_before, "base_loss": self.base_loss, "trained_loss": self.trained_loss,
            "gain": self.gain, "vae_error": self.vae_error, "embedder_r2": self.embedder_mean,
            "embedder_r2_by_number": self.embedder, "random_gauge": self.random_gauge,
            "seconds": round(self.seconds, 3), "peak_memory_bytes": self.peak_memory_bytes, "warnings": self.warnings,
        }  # fmt: skip


def family(
    output: str | os.PathLike[str],
    *,
    count: int = 320,
    seed: int = 0,
    rank: int = 2,
    images: int = 16,
    held_out: int = 8,
    steps: int = 60,
    base_steps: int = 1200,
    random_gauge: bool = False,
    force: bool = False,
    on_progress: Progress = lambda done, total, title: None,
) -> FamilyReport:
    """Make a base, and `count` LoRAs of it, in the folder `output`, which is new or holds a part of the same family.

    base/: a diffusers folder of the architecture of SD1.5. loras/NAME.safetensors, of this rank. conditions.csv: the
    seven numbers of each. images/NAME/, held-out/NAME/: pictures of each, those that it was trained on and others,
    with captions. embedder.safetensors: a linear map from the pixels of a picture to the numbers. random_gauge: the
    same LoRAs by other factors of the same products, in loras-random-gauge/. steps: of each LoRA; base_steps: of the
    base. force: begin anew where another family, or this one whole, stands. Raises WeightopsError, Interrupted.
    """
    started = time.perf_counter()
    need("synth family", "torch", "diffusers", "transformers", "PIL", "safetensors", extra="synthesis")
    words = Words(count, seed, rank, images, held_out, steps, base_steps)
    _check(words)
    made = begin(Path(output), words, random_gauge=random_gauge, force=force)
    try:
        # The same bytes on a machine of any number of cores; and tensors as small as these gain little by a second one.
        with one_thread():
            report = _make(made, random_gauge=random_gauge, on_progress=on_progress)
    except (Interrupted, KeyboardInterrupt):
        what = f"interrupted; what is done is kept in {printable(str(made.folder))}"
        raise Interrupted("synth family", what, "the same command goes on from there") from None
    report.seconds = time.perf_counter() - started
    report.peak_memory_bytes = peak_memory_bytes()
    return report


def _check(words: Words) -> None:
    least = {"count": 2, "seed": 0}
    for name, value in asdict(words).items():
        if value < least.get(name, 1):
            option = "--" + name.replace("_", "-")
            raise UsageError(option, f"found {value}, expected {least.get(name, 1)} or more")
    if words.seed >= 2**63:
        raise UsageError("--seed", f"found {words.seed}, expected less than 2^63")
    if words.rank > 16:
        raise UsageError("--rank", f"found {words.rank}, but the base's narrowest modules have 16 channels")


def _make(made: Family, *, random_gauge: bool, on_progress: Progress) -> FamilyReport:
    words, folder = made.words, made.folder
    write_conditions(made)
    for kind in (IMAGES, HELD_OUT):
        write_pictures(made, kind, on_progress)
    if made.learnt is None or not (folder / BASE).is_dir():
        shutil.rmtree(folder / BASE, ignore_errors=True)
        made.learnt = make_base(folder / BASE, steps=words.base_steps, seed=words.seed, on_progress=on_progress)
        made.save()
    if not made.embedder or not (folder / EMBEDDER).is_file():
        made.embedder = make_embedder(folder / EMBEDDER, seed=words.seed)
        made.save()
    before = len(made.losses)
    layout = _train(made, on_progress)
    if random_gauge:
        _change_gauges(made, layout, on_progress)
    base, own = (math.fsum(pair[i] for pair in made.losses.values()) / words.count for i in (0, 1))
    nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return FamilyReport(
        str(folder), words.count, words.rank, len(layout.modules), layout.width, words.images, words.held_out, before,
        made.learnt.vae_error, base, own, made.embedder, random_gauge, nbytes,
    )  # fmt: skip


def _train(made: Family, on_progress: Progress) -> Layout:
    """The LoRAs that are not there yet, group by group: a group is written when it is learnt."""
    from weightops.diffusion.models import load
    from weightops.diffusion.objectives import objective_of

    words, names = made.words, made.names
    loaded = load(made.folder / BASE, where="synth family", device="cpu", dtype="fp32")
    layout = layout_of(loaded.pipe.unet, words.rank)
    trainer = Trainer(loaded.pipe.unet, layout, objective_of(loaded), _caption(loaded), words.seed)
    left = [n for n, name in enumerate(names) if name not in made.losses or not made.file(name).is_file()]
    groups = [left[start : start + GROUP] for start in range(0, len(left), GROUP)]
    recipe = _recipe(made, loaded)
    make_folder(made.folder / LORAS)

    def learnt(trainer: Trainer, who: list[int]) -> tuple[list[tuple[Tensor, Tensor]], np.ndarray]:
        seen, unseen = (_latents(loaded, pictures(made, kind, who)) for kind in (IMAGES, HELD_OUT))
        factors = trainer.train(who, seen, words.steps)
        return factors, trainer.gained(who, unseen, factors)

    done = words.count - len(left)
    on_progress(done, words.count, "training LoRAs")
    # Closed whatever happens: the threads of an iterator that is only forgotten would go on to the last group.
    with contextlib.closing(at_once(trainer, learnt, groups)) as found:
        for group, (factors, losses) in zip(groups, found, strict=True):
            for place, number in enumerate(group):
                own = [(up[place], down[place]) for up, down in factors]
                write_lora(made.file(names[number]), layout, own, recipe=recipe, force=True)
                base, with_it = losses[place].tolist()
                made.losses[names[number]] = base, with_it
            made.save()
            done += len(group)
            on_progress(done, words.count, "training LoRAs")
    return layout


def _latents(loaded: Loaded, drawn: np.ndarray) -> Tensor:
    """Of pictures [L, n, side, side, 3]: [L, n, c, h, w], scaled."""
    import torch

    return torch.stack([encoded(loaded.pipe.vae, own) for own in drawn])


def _caption(loaded: Loaded) -> Tensor:
    """As the base reads it [1, tokens, c]."""
    import torch

    with torch.no_grad():
        found: Tensor = loaded.pipe.encode_prompt(CAPTION, "cpu", 1, do_classifier_free_guidance=False)[0]
    return found


def _recipe(made: Family, loaded: Loaded) -> dict[str, Any]:
    """What the LoRAs' files say of how they were made: the same of one, however many there are."""
    from weightops.diffusion.written import recipe_inputs

    words = {name: value for name, value in asdict(made.words).items() if name != "count"}
    return {"command": "synth family", "words": words, "inputs": recipe_inputs(loaded.hashes)}


def _change_gauges(made: Family, layout: Layout, on_progress: Progress) -> None:
    make_folder(made.folder / OTHER_GAUGE)
    reader = Reader(layout.architecture)
    words = {name: value for name, value in asdict(made.words).items() if name != "count"}
    recipe = {"command": "synth family", "words": {**words, "random_gauge": True}}
    for number, name in enumerate(made.names):
        file = made.file(name, OTHER_GAUGE)
        if not file.is_file():
            factors, _ = reader.factors(made.file(name), layout)
            write_lora(file, layout, other_gauge(layout, factors, number, made.words.seed), recipe=recipe)
        on_progress(number + 1, made.words.count, "changing gauges")
