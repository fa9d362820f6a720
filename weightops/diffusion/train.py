"""train: a LoRA learnt from images, on any model that we read, through diffusers and PEFT; written in any dialect."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion.checkpoints import steps_in
from weightops.diffusion.dataset import read_examples
from weightops.diffusion.extras import need
from weightops.diffusion.models import load
from weightops.diffusion.optimizers import optimizer_class, settings_of
from weightops.diffusion.processes import Processes, join, started
from weightops.diffusion.training_folder import Folder
from weightops.diffusion.training_memory import enough_memory, peak
from weightops.diffusion.training_plan import plan_training
from weightops.diffusion.training_run import Run, course_of
from weightops.diffusion.training_words import RESOLUTIONS, Words, resolution_of
from weightops.errors import OutputError, UsageError, quote
from weightops.files.writer import check_target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightops.diffusion.dataset import Examples
    from weightops.diffusion.training_run import Done, Progress


@dataclass(slots=True)
class TrainReport:
    """What was trained, or with `dry_run` would be. loss: of the last steps, their running mean. memory: in bytes.

    output: the LoRA; folder: what lies beside it. process: 0, or which of several this was: the first one alone wrote.
    """

    kind: str
    output: str
    folder: str
    steps: int
    steps_per_epoch: int
    images: int
    class_images: int
    modules: int
    parameters: int
    settings: dict[str, Any]
    inputs: list[dict[str, Any]]
    data_hash: str
    class_images_made: int = 0
    resumed_at: int = 0
    first_loss: float | None = None
    loss: float | None = None
    checkpoints: list[str] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    processes: int = 1
    process: int = 0
    device: str = ""
    memory: dict[str, int] = field(default_factory=dict)
    bytes_written: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    dry_run: bool = False

    @property
    def epochs(self) -> float:
        return self.steps / self.steps_per_epoch

    def to_dict(self) -> dict[str, Any]:
        """The JSON document that scripts may rely on."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "process"}
        return {"command": "train", "version": __version__, **found, "epochs": round(self.epochs, 6)}


def unseen(_what: str, _done: int, _total: int, _loss: float | None) -> None:
    """No progress is shown."""


def train(
    kind: str,
    folder: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | None = None,
    like: str | os.PathLike[str] | None = None,
    dialect: str = "kohya",
    preset: str | None = None,
    instance_prompt: str | None = None,
    class_prompt: str | None = None,
    class_folder: str | os.PathLike[str] | None = None,
    class_images: int | None = None,
    prior_weight: float = 1.0,
    rank: int | None = None,
    alpha: float | None = None,
    conv_rank: int | None = None,
    conv_alpha: float | None = None,
    targets: Sequence[str] | None = None,
    train_text_encoder: bool = False,
    text_encoder_lr: float | None = None,
    dora: bool = False,
    init: str = "gaussian",
    steps: int | None = None,
    epochs: int | None = None,
    batch: int | None = None,
    accumulate: int = 1,
    lr: float | None = None,
    schedule: str = "constant",
    warmup: int = 0,
    optimizer: str = "adamw",
    optimizer_set: Mapping[str, str] | None = None,
    betas: Sequence[float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    clip: float = 1.0,
    snr_gamma: float | None = None,
    noise_offset: float = 0.0,
    prediction: str | None = None,
    shift: float | None = None,
    weighting: str | None = None,
    resolution: str | int | tuple[int, int] | None = None,
    center_crop: bool = False,
    flip: bool | None = None,
    seed: int = 42,
    mixed_precision: str = "no",
    gradient_checkpointing: bool = False,
    cache: str | os.PathLike[str] | None = None,
    sample_prompt: Sequence[str] = (),
    sample_every: int | None = None,
    sample_steps: int = 25,
    checkpoint_every: int | None = None,
    keep_checkpoints: int | None = None,
    resume: bool = False,
    log_every: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    dry_run: bool = False,
    on_progress: Progress = unseen,
) -> TrainReport:
    """Train a LoRA on the images of `folder` and write it to `output` (None: named after the folder), in a dialect.

    kind: text-to-image (each image has its caption) or dreambooth (`instance_prompt` for all; with `class_prompt` the
    model's idea of the class is kept, by `class_images` images that it makes itself where `class_folder` lacks them).
    model, vae, like: as `weightops.diffusion.models.load` takes them. preset: "style" or "character", the words of a
    study; words given beside it win. rank, alpha (None: the rank), conv_rank, targets (ends of module names), dora,
    init: of the LoRA. steps or epochs, batch (of each process), accumulate, lr, schedule (diffusers'), warmup,
    optimizer ("adamw", or a class by import path) and its settings: of the course. A step is drawn from (seed, step)
    alone. resolution: 512, or "768x512". dtype: of the frozen weights (auto: as mixed_precision). cache: a folder for
    latents and embeddings, which another run on the same images takes from there.

    Beside the output stands a folder of its name and `-train`: checkpoints, samples, loss.csv and loss.png; `resume`
    goes on from its newest checkpoint, and ends with the bytes that the uninterrupted run would have written. Ctrl-C
    leaves a checkpoint. Started by torchrun, the processes share each step. Raises WeightopsError, Interrupted.
    """
    asked = dict(locals())
    started_at = time.perf_counter()
    need("train", "torch", "accelerate", "diffusers", "peft", "transformers", "PIL", "matplotlib")
    asked |= {
        "resolution": resolution_of(resolution), "targets": None if targets is None else tuple(targets),
        "betas": None if betas is None else tuple(betas), "optimizer_set": dict(optimizer_set or {}),
    }  # fmt: skip
    words = Words(**{f.name: asked[f.name] for f in fields(Words)}).settled()
    settings_of(words, optimizer_class(words.optimizer))
    # What the run wrote when it ended before is its own, to be replaced by what more steps make.
    target = _target(output, folder, words, force=force or resume)
    _check_inputs(target, [model, *(place for place in (vae, like) if place is not None)])
    place = Folder(
        target.with_name(target.name.removesuffix(".safetensors") + "-train"), dialect, None, tuple(sample_prompt),
        sample_every, sample_steps, checkpoint_every, keep_checkpoints, log_every,
    )  # fmt: skip
    _check_counts(place, class_folder, words)
    where = os.fspath(folder)
    examples = read_examples(folder, where=where, prompt=words.instance_prompt)
    if dry_run:
        report = _planned(os.fspath(model), words, examples, target, place)
        report.seconds = time.perf_counter() - started_at
        return report
    place.check(resume=resume, force=force)
    processes, device = _meet(device, words)
    run = Run(
        words, examples, target, place, processes, None if class_folder is None else Path(class_folder),
        None if cache is None else Path(cache), resume, force or resume, gradient_checkpointing, on_progress,
    )  # fmt: skip
    with enough_memory(words, place.path, gradient_checkpointing=gradient_checkpointing):
        loaded = load(
            model, where="train", vae=vae, like=like, device=device, dtype=words.dtype,
            prediction=words.prediction if words.prediction in ("epsilon", "v_prediction") else None,
            on_progress=run.show("reading the model"),
        )  # fmt: skip
        done = run.train(loaded)
    report = _done(done, run)
    report.inputs = [{"path": name, "hash": hashed} for name, hashed in loaded.hashes.items()]
    report.device, report.peak_memory_bytes = str(loaded.device), peak(loaded)
    report.seconds = time.perf_counter() - started_at
    return report


# ------------------------------------------------------------------------------------------------ before the work


def _target(
    output: str | os.PathLike[str] | None, folder: str | os.PathLike[str], words: Words, *, force: bool
) -> Path:
    """Where the LoRA goes: refused now if it cannot be written at the end."""
    is_folder = words.dialect == "peft"
    name = f"{Path(folder).resolve().name or 'images'}-lora"
    target = Path(output) if output is not None else Path(name if is_folder else f"{name}.safetensors")
    if is_folder and target.suffix.lower() == ".safetensors":
        raise UsageError(str(target), "a folder is written here; its name must not end in .safetensors")
    if not is_folder and target.suffix.lower() != ".safetensors":
        raise UsageError(str(target), "the output's name must end in .safetensors")
    check_target(target, 0, force=force, inputs=(), folder=is_folder)
    return target


def _check_inputs(target: Path, inputs: Sequence[str | os.PathLike[str]]) -> None:
    """Refuse to write the LoRA over what it is trained on, or over a folder of something else, even with --force."""
    if not target.exists():
        return
    for place in inputs:
        with contextlib.suppress(OSError):
            if os.path.samefile(target, place):  # noqa: PTH121 - a label may be hf://…
                what = "is also an input, and an input is never written"
                raise OutputError(str(target), what, "choose another name")
    if target.is_dir() and any(target.iterdir()) and not list(target.rglob("adapter_config.json")):
        raise OutputError(str(target), "holds something else than a PEFT adapter", "choose another name")


def _check_counts(place: Folder, class_folder: Any, words: Words) -> None:
    counts = (
        ("--sample-every", place.sample_every), ("--sample-steps", place.sample_steps),
        ("--checkpoint-every", place.checkpoint_every), ("--keep-checkpoints", place.keep),
        ("--log-every", place.log_every),
    )  # fmt: skip
    for option, number in counts:
        if number is not None and number < 1:
            raise UsageError(option, f"found {number}, expected a whole number, 1 or more")
    if place.sample_every is not None and not place.sample_prompts:
        raise UsageError("--sample-every", "stands with --sample-prompt, the words for the samples")
    if class_folder is not None and words.class_prompt is None:
        raise UsageError("--class-folder", "stands with --class-prompt, the words for its images")


def _meet(device: str, words: Words) -> tuple[Processes, str]:
    """The other processes, and the device of this one. Raises UsageError."""
    from weightops.engine.tensors import resolve_device

    found = resolve_device(device)
    if words.mixed_precision == "fp16" and found == "cpu":
        what = "fp16 needs a CUDA device, and this runs on the processor"
        raise UsageError("--mixed-precision", what, "use bf16 or no")
    if started() > 1 and ":" in found:
        what = f"found {quote(device)}, but each of {started()} processes has its own"
        raise UsageError("--device", what, "use --device cuda")
    processes = join(cpu=found == "cpu")
    return processes, f"cuda:{processes.local}" if processes.count > 1 and found == "cuda" else found


def _planned(model: str, words: Words, examples: Examples, target: Path, place: Folder) -> TrainReport:
    """The report of a dry run: what headers, captions and the words tell."""
    planned = plan_training(model, words)
    course = course_of(words, examples, started())
    resolution = words.resolution or (RESOLUTIONS[planned.architecture],) * 2
    settings = {**words.as_dict(), "resolution": list(resolution), "targets": list(planned.targets)}
    return TrainReport(
        words.kind, str(target), str(place.path), course.steps, course.steps_per_epoch, course.images,
        words.class_images or 0, planned.count, planned.parameters, settings, [{"path": model, "hash": None}],
        examples.data_hash, warnings=list(examples.warnings), processes=started(), dry_run=True,
        memory={"frozen": planned.nbytes_frozen, "trained": planned.nbytes_trained},
    )  # fmt: skip


def _done(done: Done, run: Run) -> TrainReport:
    course, place = done.course, run.place
    return TrainReport(
        run.words.kind, str(run.target), str(place.path), course.steps, course.steps_per_epoch, course.images,
        course.priors, done.modules, done.parameters, dict(done.settings), [], done.examples.data_hash,
        class_images_made=run.made, resumed_at=done.resumed_at, first_loss=place.first_loss, loss=done.smoothed,
        checkpoints=[str(path) for path in steps_in(place.path).values()], samples=list(place.samples),
        warnings=list(done.warnings), processes=run.processes.count, process=run.processes.index,
        bytes_written=done.bytes_written,
    )  # fmt: skip
