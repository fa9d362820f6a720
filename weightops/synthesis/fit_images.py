"""synth fit-images: a LoRA from a few images, by learning the coefficients of a space through the frozen model."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion.axes import stem_of
from weightops.diffusion.extras import need
from weightops.diffusion.image_records import digest_of, inputs_of
from weightops.diffusion.models import load
from weightops.diffusion.threads import one_thread, weights_of
from weightops.diffusion.training_memory import peak
from weightops.diffusion.training_words import resolution_of
from weightops.engine.run import ignore
from weightops.errors import MemoryRefused, OutputError, UsageError, quote
from weightops.synthesis.conditions import condition_of
from weightops.synthesis.coordinates import coordinates_of, learn_coefficients
from weightops.synthesis.fitted import load_fitted
from weightops.synthesis.gap import Losses, changes_texts, check_base
from weightops.synthesis.image_descent import Course
from weightops.synthesis.lora_file import write_lora
from weightops.synthesis.memorised import Members
from weightops.synthesis.own_images import Listed, OwnImages, examples_of
from weightops.synthesis.places import with_own_space

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from weightops.diffusion.dataset import Examples
    from weightops.engine.run import Progress
    from weightops.synthesis.coordinates import Coordinates
    from weightops.synthesis.fitted import Fitted
    from weightops.synthesis.layout import Factors, Layout
    from weightops.synthesis.lora_file import Written

    Place = str | os.PathLike[str]

# What was best on a small family of `weightops synth family`; a real base may want others.
STEPS, LR, L2, BATCH = 40, 0.2, 1e-3, 4
MODEL_DTYPES = ("fp32", "bf16")
_PAIRS = 8  # of a timestep and a noise for each image, to say how well it is learnt


@dataclass(slots=True)
class FitImagesReport:
    """A LoRA learnt from images. loss: on these images, at fixed timesteps and noises, of the model alone (base), with
    the LoRA that was begun with (first), and with what was learnt (last): not on held-out images.

    distance: of the coefficients from the mean LoRA, in deviations of the training members (a root mean square: theirs
    is about 1). nearest: the training member with the nearest ΔW, its distance relative to that member (to_file: as its
    file has it, where the space is at hand), and what is usual: the median from a member to the nearest other one.
    """

    output: str
    inputs: list[dict[str, Any]]
    images: int
    steps: int
    learnt: int
    parameters: int
    settings: dict[str, Any]
    start: str = "the mean LoRA"
    loss: dict[str, float] = field(default_factory=dict)
    distance: float = 0.0
    nearest: dict[str, Any] = field(default_factory=dict)
    basis_bytes: int = 0
    ranks: dict[int, int] = field(default_factory=dict)
    error: float = 0.0
    device: str = ""
    bytes_written: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    warnings: list[str] = field(default_factory=list)
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The JSON document that scripts may rely on."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"command": "synth fit-images", "version": __version__, **found}


def fit_images(
    images: Place,
    fitted: Place,
    *,
    model: Place,
    output: Place | None = None,
    prompt: str | None = None,
    condition: str | None = None,
    embedder: Place | None = None,
    components: int | None = None,
    steps: int = STEPS,
    lr: float = LR,
    l2: float = L2,
    batch: int | None = None,
    seed: int = 0,
    resolution: str | int | tuple[int, int] | None = None,
    prediction: str | None = None,
    space: Place | None = None,
    vae: Place | None = None,
    like: Place | None = None,
    gradient_checkpointing: bool = False,
    dialect: str = "kohya",
    rank: int | None = None,
    dtype: str = "fp32",
    model_dtype: str = "fp32",
    device: str = "auto",
    force: bool = False,
    dry_run: bool = False,
    on_progress: Progress = ignore,
) -> FitImagesReport:
    """Learn the LoRA of a space that fits the images of a folder best, and write it as an ordinary LoRA file.

    images: a folder with one to some twenty images, their captions beside them, or all with the one `prompt`. fitted:
    of `synth fit`, in the geometry of rows. model, vae, like, prediction, device: as `weightops.diffusion.models.load`
    takes them; model_dtype: of the frozen weights, fp32 or bf16 (fp16 has no room for small gradients).

    Coefficients begin at the mean LoRA, or at what ridge regression (else the nearest member) says of a `condition`
    (`embedder`: of an image). Adam makes the diffusers layer's loss less, drawn from (seed, step), in units of each
    coefficient's deviation: lr is in deviations, and l2 is the weight of ½‖c‖², a Gaussian prior. components: the first
    ones alone. batch: images in a step (None: 4, or as many as there are). dialect, rank, dtype: of the LoRA. space:
    its folder, where `fitted` does not lie in it. Raises WeightopsError.
    """
    started = time.perf_counter()
    need("synth fit-images", "torch", "diffusers", "transformers", "PIL", extra="synthesis")
    folder, label = os.fspath(images), os.fspath(fitted)
    target = _target(output, folder, dialect)
    _check_inputs(target, [label, os.fspath(model)])
    check_dtype(model_dtype)
    size = resolution_of(resolution)
    _check_memory(label)
    found = with_own_space(load_fitted(fitted), space)
    examples = examples_of(folder, where=folder, prompt=prompt)
    together = min(BATCH, len(examples.examples)) if batch is None else batch
    course = Course(steps, lr, together, seed, l2).check()
    out = _Out(target, found.layout, {"dialect": dialect, "rank": rank, "dtype": dtype, "force": force})
    settings: dict[str, Any] = {
        "prompt": prompt, "condition": condition, "components": components, "steps": steps, "lr": lr, "l2": l2,
        "batch": course.batch, "seed": seed, "rank": rank, "dialect": dialect, "dtype": dtype,
    }  # fmt: skip
    work = _planned(found, examples, course, out, settings, os.fspath(model), embedder)
    work.report.dry_run = dry_run
    if not dry_run:
        loaded = load(
            model, where="synth fit-images", vae=vae, like=like, device=device, dtype=model_dtype,
            prediction=prediction if prediction in ("epsilon", "v_prediction") else None,
        )  # fmt: skip
        check_base(label, found.layout, loaded)
        with one_thread(weights_of(loaded.pipe)):
            own = OwnImages(
                loaded, Listed({_name(folder): examples.examples}), resolution=size, prediction=prediction,
                keep_texts=not changes_texts(found.layout),
            )  # fmt: skip
            if gradient_checkpointing:
                getattr(loaded.pipe, own.encoding.denoiser).enable_gradient_checkpointing()
            work.learn(own, on_progress)
    work.report.seconds = time.perf_counter() - started
    return work.report


@dataclass(frozen=True, slots=True)
class _Work:
    """What is to be learnt, where it begins, and what is said of it."""

    fitted: Fitted
    course: Course
    start: Tensor
    out: _Out
    recipe: Mapping[str, Any]
    report: FitImagesReport

    def learn(self, own: OwnImages, on_progress: Progress) -> None:
        """Learn it, write it, and fill in the report. Raises WeightopsError."""
        report, loaded, name = self.report, own.loaded, own.names[0]
        space = coordinates_of(self.fitted, components=self.start.shape[1], device=loaded.device)
        c, _ = learn_coefficients(own, space, [name], self.course, start=self.start, on_progress=on_progress)
        report.warnings += [*loaded.warnings, *own.warnings]
        report.loss = _losses(own, name, space, self.start, c)
        report.distance = float(c.square().mean().sqrt())
        report.nearest = _nearest(self.fitted, space, c)
        inputs: list[tuple[str, str | None]] = list(loaded.hashes.items())
        digest = digest_of(self.fitted.label)
        inputs.append((self.fitted.label, None if digest is None else digest.hash))
        written = self.out.write(space.factors(c), {**self.recipe, "inputs": inputs_of(inputs)}, dry_run=False)
        report.inputs = [{"path": place, "hash": hashed} for place, hashed in inputs]
        report.bytes_written, report.ranks, report.error = written.bytes_written, dict(written.ranks), written.error
        report.device, report.peak_memory_bytes = str(loaded.device), peak(loaded)


def _planned(
    fitted: Fitted, examples: Examples, course: Course, out: _Out, settings: Mapping[str, Any], model: str,
    embedder: Place | None,
) -> _Work:  # fmt: skip
    """Everything that can be refused without the model, refused. Raises WeightopsError."""
    space = coordinates_of(fitted, components=settings["components"])
    start, said = _start(fitted, space, settings["condition"], embedder)
    recipe = {
        "command": "synth fit-images", "version": __version__, "data": examples.data_hash,
        "settings": {**settings, "condition": _named(settings["condition"])},
    }  # fmt: skip
    # Whether the dialect can hold it, and the place, is better found out now than after the last step.
    planned = out.write(space.factors(start), recipe, dry_run=True)
    report = FitImagesReport(
        str(out.target), [{"path": model, "hash": None}, {"path": fitted.label, "hash": None}],
        len(examples.examples), course.steps, space.size, fitted.layout.width, dict(settings), said,
        basis_bytes=space.nbytes, ranks=dict(planned.ranks), error=planned.error, bytes_written=planned.bytes_written,
        warnings=list(examples.warnings),
    )  # fmt: skip
    return _Work(fitted, course, start, out, recipe, report)


@dataclass(frozen=True, slots=True)
class _Out:
    """Where the LoRA goes, and in which form."""

    target: Path
    layout: Layout
    words: Mapping[str, Any]

    def write(self, factors: Factors, recipe: Mapping[str, Any], *, dry_run: bool) -> Written:
        """The first of factors [1, out, r]. Raises WeightopsError."""
        own = [(up[0].detach().cpu(), down[0].detach().cpu()) for up, down in factors]
        return write_lora(self.target, self.layout, own, recipe=recipe, dry_run=dry_run, **self.words)


# ------------------------------------------------------------------------------------------------ before the work


def check_dtype(dtype: str) -> None:
    """Of a model through which something is learnt, and nothing scales the loss. Raises UsageError."""
    if dtype not in MODEL_DTYPES:
        what = f"found {quote(dtype)}, expected {' or '.join(MODEL_DTYPES)}"
        raise UsageError("--model-dtype", what, "small gradients are zero in fp16" if dtype == "fp16" else None)


def _named(condition: str | None) -> str | None:
    """Numbers as they are asked for; of a file or folder the name, and not where it lies."""
    if condition is None or not os.path.exists(condition):  # noqa: PTH110 - numbers may be too many for a name
        return condition
    return stem_of(condition)


def _name(folder: str) -> str:
    return Path(folder).resolve().name or "images"


def _target(output: Place | None, folder: str, dialect: str) -> Path:
    is_folder = dialect == "peft"
    name = f"{_name(folder)}-fitted"
    target = Path(output) if output is not None else Path(name if is_folder else f"{name}.safetensors")
    if is_folder == (target.suffix.lower() == ".safetensors"):
        expected = "a folder is written here; its name must not end" if is_folder else "the output's name must end"
        raise UsageError(str(target), f"{expected} in .safetensors")
    return target


def _check_inputs(target: Path, inputs: Sequence[str]) -> None:
    """Refuse to write over what is read, even with --force. Raises OutputError."""
    for place in inputs:
        with contextlib.suppress(OSError):
            if os.path.samefile(target, place):  # noqa: PTH121 - a label may be hf://…
                raise OutputError(str(target), "is also an input, and an input is never written", "choose another name")


def _check_memory(label: str) -> None:
    """Refuse a basis that cannot be held, before it is read. Raises MemoryRefused."""
    try:
        needed = Path(label).stat().st_size
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):  # what is not there, `load_fitted` says
        return
    if needed > whole or needed > 4 * free:  # what caches hold is given back, and is most of what is not free
        what = f"takes {needed / 2**30:.1f} GiB in memory, and {min(free, whole) / 2**30:.1f} GiB are free"
        raise MemoryRefused(label, what, "a space fitted with fewer --components takes less")


def _start(fitted: Fitted, space: Coordinates, condition: str | None, embedder: Place | None) -> tuple[Tensor, str]:
    """c [1, m] to begin at, and what that is. Raises UsageError."""
    import torch

    if condition is None:
        return torch.zeros(1, space.size), "the mean LoRA"
    asked = condition_of(condition, fitted, embedder=embedder)
    if len(asked) != 1:
        raise UsageError("--condition", f"found {len(asked):,} conditions, expected one")
    values = asked[0][1][None]
    if fitted.ridge is not None:
        latents, words = fitted.ridge.predict(values), "ridge regression on the condition"
    elif fitted.nearest is not None:
        place = int(fitted.nearest.nearest(values)[0])
        latents, words = fitted.latents[place][None], f"{fitted.trained_names[place]}, whose condition is nearest"
    else:
        raise UsageError("--condition", f"{fitted.label} was fitted without conditions")
    return space.of_latents(latents[:, : space.size]), words


# ------------------------------------------------------------------------------------------------ what came of it


def _losses(own: OwnImages, name: str, space: Coordinates, start: Tensor, c: Tensor) -> dict[str, float]:
    """On the images that were learnt from: of the model alone, at the start, and at the end."""
    import torch

    with torch.no_grad(), Losses(own, space.layout, pairs=_PAIRS) as losses:
        return {
            "base": float(losses.of([name], None)[0]),
            "first": float(losses.of([name], space.factors(start))[0]),
            "last": float(losses.of([name], space.factors(c))[0]),
        }


def _nearest(fitted: Fitted, space: Coordinates, c: Tensor) -> dict[str, Any]:
    """The training member with the nearest ΔW, how far it is, and how far members usually are from their nearest."""
    import torch

    members = Members(fitted)
    # Components that were not learnt are as in the mean LoRA.
    latents = torch.cat([space.latents(c)[0], fitted.latent_mean[space.size :]])
    factors = [(up[0].detach().cpu(), down[0].detach().cpu()) for up, down in space.factors(c)]
    near = members.nearest(latents, factors)
    return {"name": near.name, "distance": near.distance, "to_file": near.to_file, "usual": members.usual}
