"""generate: images of prompts, by any model that we read, with any LoRAs on it, alone or side by side in a grid.

Each image is drawn from a seed of its own and written whole as soon as it is made, with what it was made of in it.
"""

from __future__ import annotations

import gc
import itertools
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion.axes import Shots, lora_name, names_of, plan_shots, stem_of
from weightops.diffusion.extras import need
from weightops.diffusion.grids import Grid, draw_grid, face_for, unknown_letters
from weightops.diffusion.image_folder import (
    GRID,
    ImageFolder,
    check_place,
    grid_of,
    names_in,
    place_of,
    target_of,
)
from weightops.diffusion.image_records import (
    Digest,
    digest_of,
    inputs_of,
    loras_said,
    note_of,
    recipe_of,
    row_of,
    versions_of,
)
from weightops.diffusion.models import FLOW, load
from weightops.diffusion.png_text import encode_png, parameters_of
from weightops.diffusion.prompts import Prompt, checked, parse_size, read_prompts
from weightops.diffusion.sampling import Sampling, refused
from weightops.diffusion.schedulers import check_name, shown
from weightops.engine.run import Progress, ignore
from weightops.errors import Interrupted, UsageError, WeightopsError, listing, quote
from weightops.files.checkpoint import open_checkpoint
from weightops.naming.identify import identify
from weightops.ops.fuse import parse
from weightops.ops.report import peak_memory_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from weightops.diffusion.axes import Lora
    from weightops.diffusion.models import Loaded, LoraName
    from weightops.diffusion.sampling import Sampled

MAX_BATCH = 256


@dataclass(slots=True)
class GenerateReport:
    """What was made. output: the folder, or the file of a single image.

    images: a row for each, as images.json has them. grid: its file, over, columns, rows. loras: each LoRA on each
    model, which way it went, and why. seconds_per_image: of sampling alone. peak_device_bytes: of a CUDA device.
    """

    output: str
    inputs: list[dict[str, Any]] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)
    grid: dict[str, Any] | None = None
    loras: list[dict[str, Any]] = field(default_factory=list)
    summary: str = ""
    device: str = ""
    dtype: str = ""
    bytes_written: int = 0
    seconds: float = 0.0
    seconds_per_image: float = 0.0
    peak_memory_bytes: int | None = None
    peak_device_bytes: int | None = None
    warnings: list[str] = field(default_factory=list)
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The JSON document that scripts may rely on."""
        return {
            "command": "generate",
            "version": __version__,
            "inputs": self.inputs,
            "output": self.output,
            "bytes_written": self.bytes_written,
            "summary": self.summary,
            "images": self.images,
            "grid": self.grid,
            "loras": self.loras,
            "device": self.device,
            "dtype": self.dtype,
            "seconds": round(self.seconds, 3),
            "seconds_per_image": round(self.seconds_per_image, 3),
            "peak_memory_bytes": self.peak_memory_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "warnings": self.warnings,
            "dry_run": self.dry_run,
        }


@dataclass(frozen=True, slots=True)
class Wish:
    """What is the same for all images."""

    vae: str | None
    like: str | None
    scheduler: str | None
    true_guidance: float | None
    batch: int
    device: str
    dtype: str
    prediction: str | None
    offload: bool
    tiling: bool


def generate(
    model: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    prompt: str | Sequence[str] = (),
    prompt_2: str | None = None,
    negative: str | None = None,
    negative_2: str | None = None,
    prompts: str | os.PathLike[str] | None = None,
    loras: Sequence[LoraName] = (),
    vae: str | os.PathLike[str] | None = None,
    like: str | os.PathLike[str] | None = None,
    guidance: float | None = None,
    true_guidance: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    images: int = 1,
    size: str | tuple[int, int] | None = None,
    scheduler: str | None = None,
    batch: int = 1,
    grid_over: str | None = None,
    values: str | Sequence[float] | None = None,
    output: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    prediction: str | None = None,
    offload: bool = False,
    tiling: bool = False,
    force: bool = False,
    dry_run: bool = False,
    on_progress: Progress = ignore,
) -> GenerateReport:
    """Make images with `model`, or side by side with several (`grid_over="model"`), into a folder or a file.

    prompt: one or more texts; prompts: a file with more of them, one a row, whose columns say what is different there
    (see weightops.diffusion.prompts). prompt_2, negative, negative_2: for all prompts; what ends in 2 is for the second
    text encoder. loras: files, or "file:0.5", or (file, 0.5). vae, like, device, dtype, prediction: as for
    `weightops.diffusion.models.load`. guidance, steps, size (width, height): the pipeline's own where they are None.
    true_guidance: the scale of guidance by a negative prompt, of pipelines that have one beside `guidance`, as Flux.
    seed: of the first image of each prompt, and one more for each of `images` images that follow: an image depends upon
    its own seed, and not upon which others are made. scheduler: one of weightops.diffusion.schedulers.SAMPLERS.
    batch: images at once, which takes memory and may change their last bits; one at a time, none depends on another.
    grid_over: what the columns of a grid are, one of weightops.diffusion.axes.AXES; its rows are the prompts and seeds.
    values: of the strengths (each multiplies those of the LoRAs), of the seeds, or which steps. offload: keep on the
    CUDA device only the network at work. tiling: decode large images in tiles.

    output: a folder, or FILE.png for a single image; None: a name made of the model's and the prompt. Each image is
    written as it is made, whole, then the grid and images.json. force: replace what an earlier run wrote there; other
    files stay. on_progress counts steps of sampling. Raises WeightopsError, and Interrupted, which says what is there.
    """
    started = time.perf_counter()
    models = [str(name) for name in model] if isinstance(model, list | tuple) else [str(model)]
    if not models:
        raise UsageError("generate", "found no model, expected --model MODEL")
    asked = [(str(file), strength) for file, strength in (parse(lora) for lora in loras)]
    pixels = None if size is None else parse_size(size)
    said = Prompt("", prompt_2, negative, negative_2, seed, steps, guidance, pixels, images)
    texts = _prompts([prompt] if isinstance(prompt, str) else list(prompt), prompts, said)
    wish = Wish(
        None if vae is None else str(vae), None if like is None else str(like), scheduler, true_guidance, batch,
        device, dtype, prediction, offload, tiling,
    )  # fmt: skip
    _check_words(wish)
    shots = plan_shots(models, asked, texts, over=grid_over, values=values)
    target, single = target_of(output, shots)
    check_place(target, single=single, force=force)
    names = [target.name] if single else names_in(shots)
    report = GenerateReport(str(target), _inputs(models, shots, wish), grid=grid_of(shots), dry_run=dry_run)
    if dry_run:
        report.images = _planned(shots, names)
        report.summary = f"would make {_count(len(names), 'image')}{_shape(shots)}"
        return report
    need("generate", "torch", "diffusers", "transformers", "accelerate", "PIL")
    if offload:
        wish = replace(wish, device=cuda_of(device))
    folder = ImageFolder(target.parent if single else target, names, shots, single)
    folder.versions = versions_of("torch", "diffusers", "transformers", *(["peft"] if asked else []))
    try:
        folder.begin()
        _make(shots, wish, folder, report, on_progress)
        if shots.over is not None:
            folder.put(GRID, _grid(folder, asked, report))
        folder.finish()
    except (Interrupted, KeyboardInterrupt) as e:
        how = str(e).partition(":")[0] if isinstance(e, Interrupted) else "interrupted"
        raise Interrupted("", f"{how}: {folder.left()}") from None
    except WeightopsError as e:
        left = folder.left()
        if folder.single or not folder.rows:
            raise
        raise type(e)(e.where, e.what, f"{e.hint}; {left}" if e.hint else left) from None
    except Exception:
        folder.left()
        raise
    report.bytes_written = folder.nbytes
    report.seconds = time.perf_counter() - started
    report.peak_memory_bytes = peak_memory_bytes()
    return report


# ------------------------------------------------------------------------------------------------ words


def _prompts(texts: Sequence[str], file: str | os.PathLike[str] | None, said: Prompt) -> list[Prompt]:
    checked(said, {"seed": "--seed", "steps": "--steps", "guidance": "--guidance", "images": "--images"})
    found = [replace(said, prompt=text) for text in texts]
    if file is not None:
        found += read_prompts(file, said)
    if not found:
        raise UsageError("generate", "found no prompt, expected --prompt TEXT or --prompts FILE")
    return found


def _check_words(wish: Wish) -> None:
    """Refuse what can be known to be wrong before anything is read."""
    if wish.scheduler is not None:
        check_name(wish.scheduler)
    if not 1 <= wish.batch <= MAX_BATCH:
        raise UsageError("--batch", f"found {wish.batch:,}, expected 1 to {MAX_BATCH}")
    if wish.true_guidance is not None and not 0 <= wish.true_guidance <= 100:
        raise UsageError("--true-guidance", f"found {wish.true_guidance:g}, expected 0 to 100")


def _inputs(models: Sequence[str], shots: Shots, wish: Wish) -> list[dict[str, Any]]:
    """Every file that is read, from its header: what is missing or damaged is said before anything is loaded."""
    used = [*models, *(file for shot in shots.shots for file, _ in shot.loras)]
    used += [name for name in (wish.vae,) if name is not None]
    found: list[dict[str, Any]] = []
    for label in dict.fromkeys(used):
        nbytes = None
        if not label.startswith("hf://") and not label.lower().endswith((".yaml", ".yml")):
            with open_checkpoint(label) as opened:
                nbytes = opened.nbytes
        found.append({"path": label, "hash": None, "bytes": nbytes})
    return found


def _planned(shots: Shots, names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of images that a run would make. None: the pipeline's own."""
    return [
        {
            "file": name, "prompt": shot.prompt.prompt, "negative": shot.prompt.negative, "seed": shot.seed,
            "steps": shot.prompt.steps, "guidance": shot.prompt.guidance, "size": shot.prompt.size,
            "model": stem_of(shot.model),
            "loras": [{"name": lora_name(file), "strength": strength} for file, strength in shot.loras],
            **place_of(shots, shot),
        }
        for name, shot in zip(names, shots.shots, strict=True)
    ]  # fmt: skip


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _shape(shots: Shots) -> str:
    if shots.over is None:
        return ""
    return f", a grid over {shots.over}: {_count(len(shots.columns), 'column')}, {_count(len(shots.rows), 'row')}"


# ------------------------------------------------------------------------------------------------ making


class _Counted:
    """Steps of sampling, of all images. steps: of each image, by number; of the others as of those known last."""

    def __init__(self, on_progress: Progress, images: int) -> None:
        self._on_progress, self._images = on_progress, images
        self.steps: dict[int, int] = {}
        self._done = 0

    def during(self, numbers: Sequence[int]) -> Callable[[float], None]:
        own = sum(self.steps[number] for number in numbers)
        usual = next(reversed(self.steps.values()))
        total = sum(self.steps.values()) + (self._images - len(self.steps)) * usual

        def on_share(share: float) -> None:
            self._on_progress(self._done + round(own * share), total)

        return on_share

    def after(self, numbers: Sequence[int]) -> None:
        self.during(numbers)(1.0)
        self._done += sum(self.steps[number] for number in numbers)


@dataclass(slots=True)
class _Run:
    """What goes on through all models: seconds of sampling, digests of LoRAs, and which images are not as they should.

    faults: what is the matter, and the images with it.
    """

    folder: ImageFolder
    wish: Wish
    report: GenerateReport
    counted: _Counted
    seconds: float = 0.0
    digests: dict[str, Digest | None] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)


def _make(shots: Shots, wish: Wish, folder: ImageFolder, report: GenerateReport, on_progress: Progress) -> None:
    """Make and write every image: one model after the other, and on each one set of LoRAs after the other."""
    run = _Run(folder, wish, report, _Counted(on_progress, len(shots.shots)))
    labels = names_of(list(dict.fromkeys(shot.model for shot in shots.shots)))
    of_model: dict[str, list[int]] = {}
    for number, shot in enumerate(shots.shots):
        of_model.setdefault(shot.model, []).append(number)
    for count, (model, numbers) in enumerate(of_model.items()):
        if count:
            gc.collect()  # a pipeline's parts know each other: without this the last model is still there
        _make_with(model, labels[model], numbers, run)
        _note_device(report)
    for what, names in run.faults.items():
        report.warnings.append(f"{listing(names)}: {what}")
    report.images = [folder.rows[number] for number in sorted(folder.rows)]
    report.seconds_per_image = run.seconds / len(shots.shots)
    sizes = sorted({tuple(row["size"]) for row in report.images})
    size = f" of {' and '.join(f'{w}x{h}' for w, h in sizes)}" if len(sizes) < 3 else ""
    report.summary = f"{_count(len(report.images), 'image')}{size}{_shape(shots)}"


def _make_with(model: str, name: str, numbers: Sequence[int], run: _Run) -> None:
    """The images of one model."""
    from weightops.diffusion.adapters import wear

    shots, wish, report = run.folder.shots.shots, run.wish, run.report
    loaded = _load(model, wish)
    pipe = loaded.pipe
    sampling = Sampling(pipe, model, pipe.scheduler, wish.scheduler, wish.true_guidance)
    for prompt in dict.fromkeys(shots[n].prompt for n in numbers):
        sampling.check(prompt)
        _warn(report, sampling.notes(prompt))
    run.counted.steps |= {n: sampling.steps(shots[n].prompt) for n in numbers}
    for steps in dict.fromkeys(run.counted.steps[n] for n in numbers):
        _warn(report, sampling.check_steps(steps))
    _note_hashes(report, model, loaded)
    of_loras: dict[tuple[Lora, ...], list[int]] = {}
    for n in numbers:
        of_loras.setdefault(shots[n].loras, []).append(n)
    for loras, group in of_loras.items():
        if wish.offload:
            pipe.remove_all_hooks()
        wear(loaded, loras)
        if wish.offload:
            pipe.enable_model_cpu_offload(device=wish.device)
        _note_loras(report, name, loaded, loras, run.digests)
        for batch in _batches(group, run):
            began = time.perf_counter()
            chosen = [shots[n] for n in batch]
            made = sampling.sample([s.prompt for s in chosen], [s.seed for s in chosen], run.counted.during(batch))
            run.seconds += time.perf_counter() - began
            run.counted.after(batch)
            for n, one in zip(batch, made, strict=True):
                _write(n, one, name, len(batch), sampling, loaded, run)
    report.device = str(loaded.device) if not wish.offload else wish.device
    report.dtype = str(loaded.dtype).removeprefix("torch.")
    _warn(report, loaded.warnings)


def cuda_of(device: str) -> str:
    """The CUDA device for --offload: it takes one network at a time from the memory of the CPU. Raises UsageError."""
    from weightops.engine.tensors import resolve_device

    place = resolve_device(device)
    if place == "cpu":
        raise UsageError("--offload", "needs a CUDA device, found the CPU alone")
    return place


def loaded_for(model: str, *, where: str, device: str, dtype: str, offload: bool, **words: Any) -> Loaded:
    """The model, on its device, or with `offload` where a CUDA device takes it from. Raises WeightopsError."""
    if offload:
        device, dtype = "cpu", _half(model) if dtype == "auto" else dtype
    try:
        return load(model, where=where, device=device, dtype=dtype, **words)
    except (RuntimeError, MemoryError) as e:
        raise refused(e, model, "") from None


def _load(model: str, wish: Wish) -> Loaded:
    loaded = loaded_for(
        model, where="generate", vae=wish.vae, like=wish.like, device=wish.device, dtype=wish.dtype,
        prediction=wish.prediction, offload=wish.offload,
    )  # fmt: skip
    if wish.tiling:
        vae: Any = getattr(loaded.pipe, "vae", None)
        if not hasattr(vae, "enable_tiling"):
            raise UsageError("--tiling", f"the VAE of {model} cannot decode in tiles")
        vae.enable_tiling()
    return loaded


def _half(model: str) -> str:
    """The 16 bits in which a model runs on a CUDA device, where it is loaded elsewhere: as `load` has it."""
    if model.startswith("hf://") or model.lower().endswith((".yaml", ".yml")):
        return "bf16"
    with open_checkpoint(model) as opened:
        return "bf16" if identify(opened.tensors).architecture in (*FLOW, None) else "fp16"


def _batches(numbers: Sequence[int], run: _Run) -> Iterator[list[int]]:
    """Images that are made at once: alike in all that a pipeline is told once."""

    def alike(number: int) -> tuple[object, ...]:
        p = run.folder.shots.shots[number].prompt
        told = (p.prompt_2 is None, p.negative is None, p.negative_2 is None)
        return p.steps, p.guidance, p.size, told

    for _, group in itertools.groupby(numbers, key=alike):
        same = list(group)
        for start in range(0, len(same), run.wish.batch):
            yield same[start : start + run.wish.batch]


def _write(number: int, made: Sampled, model: str, batch: int, sampling: Sampling, loaded: Loaded, run: _Run) -> None:
    """Write an image, with what it was made of; remember what is the matter with it."""
    from PIL import Image

    folder, wish, shot = run.folder, run.wish, run.folder.shots.shots[number]
    image = Image.fromarray(made.pixels)
    row = row_of(shot, sampling, loaded, model=model, size=image.size)
    digests = [(file, run.digests[file]) for file, _ in shot.loras]
    hashes: list[tuple[str, str | None]] = [*loaded.hashes.items()]
    hashes += [(file, None if digest is None else digest.hash) for file, digest in digests]
    more: dict[str, Any] = {"architecture": loaded.architecture}
    for word, said in (("batch", batch > 1 and batch), ("offload", wish.offload), ("tiling", wish.tiling)):
        more |= {word: said} if said else {}
    more |= {} if wish.vae is None else {"vae": stem_of(wish.vae)}
    sampler, schedule = shown(sampling.pipe.scheduler)
    told = loras_said(shot.loras, run.digests)
    text = parameters_of(row, sampler=sampler, schedule=schedule, loras=told)
    data = encode_png(image, recipe_of(row, hashes, folder.versions, **more), text)
    folder.add(number, row, data)
    fault = _fault(made, row["dtype"])
    if fault:
        run.faults.setdefault(fault, []).append(folder.names[number])


def _fault(made: Sampled, dtype: str) -> str:
    half = dtype != "float32"
    if made.blanked:
        return "blanked by the safety checker that the model brings"
    if not made.finite:
        said = "values that are no numbers (NaN) were drawn black"
        return f"{said}; --dtype fp32 is the remedy" if half else f"{said}; the model or a LoRA is broken"
    if made.black:
        return f"is black all over{'; --dtype fp32 may be the remedy' if half else ''}"
    return ""


def _note_hashes(report: GenerateReport, model: str, loaded: Loaded) -> None:
    """The hashes of what was read, beside the files' names; files that a recipe named come with their own rows."""
    hashes = dict(loaded.hashes)
    for entry in report.inputs:
        if entry["hash"] is None:
            entry["hash"] = hashes.pop(entry["path"].rstrip("/").rpartition("/")[2], None)
    known = {entry["hash"] for entry in report.inputs}
    report.inputs += [
        {"path": name, "hash": hashed, "bytes": None} for name, hashed in hashes.items() if hashed not in known
    ]


def _note_loras(
    report: GenerateReport, model: str, loaded: Loaded, loras: Sequence[Lora], digests: dict[str, Digest | None]
) -> None:
    """Which way each LoRA went, and what its bytes are."""
    for (file, strength), worn in zip(loras, loaded.loras, strict=True):
        if file not in digests:
            digests[file] = digest_of(file) if not file.startswith("hf://") else None
            for entry in report.inputs:
                if entry["path"] == file and digests[file] is not None:
                    entry["hash"] = digests[file].hash  # type: ignore[union-attr]
        row = {
            "model": model, "file": file, "name": lora_name(file), "strength": strength, "way": worn.way,
            "modules": worn.modules, "reason": worn.reason,
        }  # fmt: skip
        if row not in report.loras:
            report.loras.append(row)


def _warn(report: GenerateReport, said: Sequence[str]) -> None:
    report.warnings += [text for text in dict.fromkeys(said) if text not in report.warnings]


def _note_device(report: GenerateReport) -> None:
    """The most memory of a CUDA device that was in use; what is not goes back to it."""
    import torch

    if report.device.startswith("cuda") and torch.cuda.is_available():
        found = torch.cuda.max_memory_allocated(report.device)
        report.peak_device_bytes = max(report.peak_device_bytes or 0, found)
        torch.cuda.empty_cache()


def _grid(folder: ImageFolder, loras: Sequence[Lora], report: GenerateReport) -> bytes:
    """The grid of the images that were written, as a PNG that says so."""
    shots = folder.shots
    cells: list[list[Path | None]] = [[None] * len(shots.columns) for _ in shots.rows]
    for number, shot in enumerate(shots.shots):
        cells[shot.row][shot.column] = folder.folder / folder.names[number]
    prompts = {row["prompt"] for row in report.images}
    title = prompts.pop() if len(prompts) == 1 else ""
    labels = shots.rows if len(shots.rows) > 1 else [""]
    grid = Grid(cells, shots.columns, labels, title, note_of(shots.over, report.images, loras))
    text = "".join([grid.title, grid.note, *grid.columns, *grid.rows])
    missing = unknown_letters(text, face_for(text))
    if missing:
        report.warnings.append(f"{GRID}: no font at hand has the letters {quote(missing, 60)}: boxes stand for them")
    hashes = [(entry["path"], entry["hash"]) for entry in report.inputs]
    made = {**(grid_of(shots) or {}), "images": [row["file"] for row in report.images]}
    recipe = {"command": "generate", "version": __version__, "inputs": inputs_of(hashes), "grid": made}
    return encode_png(draw_grid(grid), recipe | {"versions": folder.versions})
