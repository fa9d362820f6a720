"""A training run from the loaded model to the written LoRA: what is begun, gone on with, saved and said of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion import checkpoints
from weightops.diffusion.dataset import Framing, read_examples
from weightops.diffusion.encoding import check_framing, encode, encoding_of
from weightops.diffusion.lora_modules import Lora, attach, choose_modules, layers
from weightops.diffusion.models import networks
from weightops.diffusion.objectives import objective_of, steps_per_epoch
from weightops.diffusion.optimizers import make_optimizer, make_schedule
from weightops.diffusion.training import Course, Training, put_off
from weightops.diffusion.training_images import class_images
from weightops.diffusion.training_memory import park, unparked
from weightops.diffusion.training_plan import lora_shape
from weightops.diffusion.training_words import ENDLESS, RESOLUTIONS
from weightops.diffusion.written import Told, base_of, write_lora
from weightops.errors import Interrupted, UsageError, ValueRefused

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from weightops.diffusion.dataset import Examples
    from weightops.diffusion.encoding import Encoded, Encoding
    from weightops.diffusion.models import Loaded
    from weightops.diffusion.processes import Processes
    from weightops.diffusion.training_folder import Folder
    from weightops.diffusion.training_words import Words

# What is going on (its name, how much is done, of how much), and of a step its loss.
Progress = Callable[[str, int, int, float | None], None]

# Words that a run may say otherwise when it goes on. A preset's own words are compared.
_FREE = frozenset({"preset"})
# And where the schedule does not look ahead, a run may be made longer.
_LENGTH = frozenset({"steps", "epochs"})


@dataclass(frozen=True, slots=True)
class Done:
    """What a run did. resumed_at: the step that it went on from, 0 of a new one."""

    course: Course
    modules: int
    parameters: int
    settings: Mapping[str, Any]
    examples: Examples
    warnings: tuple[str, ...]
    resumed_at: int
    smoothed: float | None
    bytes_written: int


@dataclass(slots=True)
class Run:
    """What a run has before the model is there. class_folder: where images of the class are, or are to be; None: beside
    the checkpoints, in a folder of those that this model makes of these words. made: how many of them it has made.
    """

    words: Words
    examples: Examples
    target: Path
    place: Folder
    processes: Processes
    class_folder: Path | None
    cache: Path | None
    resume: bool
    force: bool
    gradient_checkpointing: bool
    on_progress: Progress
    made: int = 0
    warnings: list[str] = field(default_factory=list)

    def show(self, what: str) -> Callable[[int, int], None]:
        """Progress of a part of the work."""
        return lambda done, total: self.on_progress(what, done, total, None)

    def train(self, loaded: Loaded) -> Done:
        """Train on this model, whose networks get the LoRA. Raises WeightopsError, Interrupted."""
        words, processes = self.words, self.processes
        encoding = encoding_of(loaded, where=loaded.label)
        objective = objective_of(loaded, words.prediction, words.shift, words.weighting)
        if words.snr_gamma is not None and objective.alphas is None:
            raise UsageError("--snr-gamma", "is of DDPM objectives, but this model is trained by flow matching")
        resolution = words.resolution or (RESOLUTIONS[loaded.architecture],) * 2
        framing = Framing(resolution, words.center_crop, bool(words.flip))
        check_framing(loaded, encoding, framing)
        shape = lora_shape(words, loaded.architecture)
        choose_modules(layers(getattr(loaded.pipe, encoding.denoiser)), shape, network=encoding.denoiser)
        encoders = self._text_encoders(loaded, encoding)
        self._have_class_images(loaded, resolution)
        lora = attach(loaded.pipe, [encoding.denoiser], shape, text_encoders=encoders, seed=words.seed)
        course = course_of(words, self.examples, processes.count)
        settings = self._settings(loaded, resolution, shape.targets, course)
        base = base_of(loaded, objective.kind)
        title = self.target.name.removesuffix(".safetensors")
        told = Told(base, title, _ss(words, course, self.examples, resolution), _recipe(settings), resolution)
        # Whether the dialect can hold it is better found out now than after the last step.
        write_lora(lora, told, self.target, dialect=words.dialect, steps=0, epoch=0, force=self.force, dry_run=True)
        found = self._newest(settings)
        groups = [(lora.parameters(encoding.denoiser), words.lr or 0.0)]
        if encoders:
            groups.append((lora.parameters(*encoders), words.text_encoder_lr or 0.0))
        optimizer = make_optimizer(words, groups)
        if self.gradient_checkpointing:
            getattr(loaded.pipe, encoding.denoiser).enable_gradient_checkpointing()
        encoded = self._encoded(loaded, framing, keep_texts=not encoders)
        if not encoders:
            park(loaded, encoding.denoiser)
        schedule = make_schedule(words, optimizer, course.steps)
        training = Training(
            loaded, encoding, objective, encoded, lora, words, course, processes, optimizer, schedule
        )  # fmt: skip
        self.place.told = told
        resumed_at = self._begin(training, settings, found)
        self._steps(training)
        written = self._finish(training, lora, told) if processes.is_main else 0
        warnings = (*loaded.warnings, *self.examples.warnings, *encoded.warnings, *self.warnings)
        return Done(
            course, lora.modules, lora.count, settings["words"], self.examples, warnings, resumed_at, training.smoothed,
            written,
        )  # fmt: skip

    # ------------------------------------------------------------------ before the first step

    def _text_encoders(self, loaded: Loaded, encoding: Encoding) -> list[str]:
        """Those that train. Raises UsageError where none can."""
        if not self.words.train_text_encoder:
            return []
        there = [name for name in networks(loaded.pipe) if name.startswith("text_encoder")]
        found = [name for name in there if name in encoding.text_encoders]
        if not found:
            raise UsageError("--train-text-encoder", f"{loaded.label} has no text encoder that can carry a LoRA")
        rest = [name for name in there if name not in found]
        if rest:
            said = f"{', '.join(rest)}, a T5, stays as it is"
            self.warnings.append(f"--train-text-encoder trains {', '.join(found)}; {said}")
        return found

    def _have_class_images(self, loaded: Loaded, resolution: tuple[int, int]) -> None:
        """The images of the class beside the others, made by the model itself where they are missing."""
        words = self.words
        if words.class_prompt is None:
            return
        folder = self.class_folder
        if folder is None:
            made_of = sorted(loaded.hashes.values()), words.class_prompt, words.seed, words.dtype, resolution
            said = hashlib.sha256(repr((made_of, self.place.sample_steps)).encode()).hexdigest()
            folder = self.place.path / f"class-images-{said[:8]}"
        if self.processes.is_main:
            self.made = class_images(
                loaded, folder, words.class_prompt, count=words.class_images or 1, resolution=resolution,
                steps=self.place.sample_steps, seed=words.seed, on_progress=self.show("images of the class"),
            )  # fmt: skip
        self.processes.wait()
        self.examples = read_examples(
            self.examples.folder, where=str(self.examples.folder), prompt=words.instance_prompt,
            class_folder=folder, class_prompt=words.class_prompt,
        )  # fmt: skip

    def _encoded(self, loaded: Loaded, framing: Framing, *, keep_texts: bool) -> Encoded:
        """Latents and embeddings. With a cache the first process fills it, and the others find it full.

        One by one: what stands beside an image in a batch can change the last bits of what is made of it, and with a
        cache that is not empty other images would.
        """
        shared = self.cache is not None
        if shared and not self.processes.is_main:
            self.processes.wait()
        found = encode(
            loaded, self.examples.examples, framing, batch=1, cache=self.cache, cache_texts=keep_texts,
            seed=self.words.seed, on_progress=self.show("encoding"),
        )  # fmt: skip
        if shared and self.processes.is_main:
            self.processes.wait()
        return found

    def _settings(
        self, loaded: Loaded, resolution: tuple[int, int], targets: Sequence[str], course: Course
    ) -> dict[str, Any]:
        words = {**self.words.as_dict(), "resolution": list(resolution), "targets": list(targets)}
        versions = {name: version(name) for name in ("torch", "diffusers", "peft", "transformers")}
        return {
            "command": f"train {self.words.kind}", "version": __version__, "versions": versions, "words": words,
            "data": self.examples.data_hash, "model": sorted(loaded.hashes.values()), "images": course.images,
            "class images": course.priors, "slots a step": course.per_step, "steps": course.steps,
        }  # fmt: skip

    # ------------------------------------------------------------------ its steps

    def _newest(self, settings: Mapping[str, Any]) -> Path | None:
        """The checkpoint to go on from, if that was asked for. Raises UsageError where it is of another run."""
        if not self.resume:
            return None
        free = _FREE | _LENGTH if self.words.schedule in ENDLESS else _FREE
        found = self.place.newest_for(settings, free)
        if checkpoints.step_of(found) > settings["steps"]:
            what = f"{found.name} has more steps than the {settings['steps']:,} that are asked for"
            raise UsageError("--resume", what)
        return found

    def _begin(self, training: Training, settings: Mapping[str, Any], found: Path | None) -> int:
        """A new folder, or the state of a checkpoint; how many steps are done."""
        if found is not None:
            training.restore(checkpoints.load(found), where=str(found))
            # Nothing is changed until all have read it.
            self.processes.wait()
        if self.processes.is_main:
            if found is None:
                self.place.begin(settings)
            else:
                self.place.go_on(settings, training.step)
        self.processes.wait()
        return training.step

    def _steps(self, training: Training) -> None:
        """All the steps that are left, with what is due after each."""
        course, place, main = training.course, self.place, self.processes.is_main
        saved = training.step
        try:
            if main and not training.step:
                self._sample(training)
            self.on_progress("training", training.step, course.steps, training.smoothed)
            while training.step < course.steps:
                mean = training.gradients()
                last = training.step + 1 == course.steps
                with put_off():
                    row = training.apply(mean)
                    if main:
                        place.log(row, last=last)
                if main and (last or place.is_due(place.checkpoint_every, row.step)):
                    with put_off():
                        place.checkpoint(training)
                    saved = row.step
                if main and (last or place.is_due(place.sample_every, row.step)):
                    self._sample(training)
                self.on_progress("training", row.step, course.steps, row.smoothed)
        except (Interrupted, KeyboardInterrupt) as e:
            raise self._interrupted(training, saved, e) from None
        except ValueRefused as e:
            raise self._not_finite(e) from None

    def _sample(self, training: Training) -> None:
        if self.place.sample_prompts:
            with unparked(training.loaded, training.encoding.denoiser):
                self.place.sample(training)

    def _finish(self, training: Training, lora: Lora, told: Told) -> int:
        """The curve, and the LoRA under its name."""
        with put_off():
            self.place.draw()
            return write_lora(
                lora, told, self.target, dialect=self.words.dialect, steps=training.step,
                epoch=training.course.epoch(training.step), force=self.force,
            )  # fmt: skip

    def _interrupted(self, training: Training, saved: int, error: BaseException) -> Interrupted:
        """Save the last whole step, and say how to go on."""
        by = error.what.partition(":")[0] if isinstance(error, Interrupted) else "interrupted"
        if not training.step:
            return Interrupted("train", f"{by} before the first step: there is nothing to keep")
        if self.processes.is_main:
            with put_off():
                if saved != training.step:
                    self.place.checkpoint(training)
                self.place.draw()
        done = f"{by} after step {training.step:,} of {training.course.steps:,}"
        what = f"{done}, which is kept in {self.place.path}"
        return Interrupted("train", what, "--resume, beside the same words, goes on from there")

    def _not_finite(self, error: ValueRefused) -> ValueRefused:
        last = checkpoints.newest(self.place.path)
        kept = f"the last good checkpoint is {last.name}" if last is not None else "no checkpoint was written before"
        return ValueRefused("train", f"{error.what}; {kept}", "a lower --lr may help, or --mixed-precision bf16 or no")


def course_of(words: Words, examples: Examples, processes: int) -> Course:
    """How long the run is, given what there is to learn."""
    priors = sum(example.prior for example in examples.examples)
    images = len(examples.examples) - priors
    per_step = (words.batch or 1) * words.accumulate * processes
    each = steps_per_epoch(images, per_step)
    return Course(images, priors, per_step, words.steps or each * (words.epochs or 1), each)


# ------------------------------------------------------------------------------------------------ what the file says


def _recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings, what decides the file's bytes."""
    kept = ("versions", "words", "data", "images", "class images", "slots a step", "steps")
    words = {name: value for name, value in settings["words"].items() if name not in _FREE}
    return {**{name: settings[name] for name in kept}, "kind": words["kind"], "words": words}


def _ss(words: Words, course: Course, examples: Examples, resolution: tuple[int, int]) -> dict[str, str]:
    """The settings in kohya's words. Source: sd-scripts, train_network.py; FORMATS §8."""
    name = examples.folder.resolve().name or "images"
    height, width = resolution
    found: dict[str, Any] = {
        "ss_learning_rate": words.lr,
        "ss_unet_lr": words.lr,
        "ss_text_encoder_lr": words.text_encoder_lr,
        "ss_optimizer": "AdamW" if words.optimizer.lower() == "adamw" else words.optimizer,
        "ss_lr_scheduler": words.schedule,
        "ss_lr_warmup_steps": words.warmup,
        "ss_num_train_images": course.images,
        "ss_num_reg_images": course.priors,
        "ss_num_batches_per_epoch": course.steps_per_epoch * words.accumulate,
        "ss_num_epochs": course.epoch(course.steps),
        "ss_max_train_steps": course.steps,
        "ss_batch_size_per_device": words.batch,
        "ss_gradient_accumulation_steps": words.accumulate,
        "ss_seed": words.seed,
        "ss_resolution": f"({width}, {height})",
        "ss_mixed_precision": words.mixed_precision,
        "ss_max_grad_norm": words.clip,
        "ss_noise_offset": words.noise_offset or None,
        "ss_min_snr_gamma": words.snr_gamma,
        "ss_random_crop": not words.center_crop,
        "ss_prior_loss_weight": words.prior_weight if course.priors else None,
        "ss_dataset_dirs": json.dumps({name: {"n_repeats": 1, "img_count": course.images}}, ensure_ascii=False),
        "ss_tag_frequency": json.dumps({name: dict(examples.tags)}, ensure_ascii=False),
    }
    return {key: str(value) for key, value in found.items()}
