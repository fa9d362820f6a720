"""Which images are to be made: every prompt and seed, and what --grid-over puts into the columns of a grid.

A grid's columns are what is named after --grid-over; its rows are the prompts and seeds that remain. Finds a training
run's checkpoints on disk, and otherwise knows neither models nor pixels.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from weightops.diffusion.checkpoints import steps_in
from weightops.errors import FormatError, UsageError, listing, quote
from weightops.files.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from weightops.diffusion.prompts import Prompt

AXES = ("lora", "model", "step", "strength", "seed", "prompt")

MAX_COLUMNS = 100
MAX_ROWS = 100
MAX_IMAGES = 9_999  # what four digits number

_SAYS = "numbers as 0,0.5,1 or 0..1:5 (five of them, both ends among them) or 0,0.25..1"
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".yaml", ".yml", ".index.json")
# kohya's name-step00000500 and name-000010, diffusers' checkpoint-500.
_NUMBER = re.compile(r"(?:^|[-_.]|step|checkpoint)([0-9]{1,9})$", re.IGNORECASE)
_OF_STEPS = re.compile(r"step|checkpoint", re.IGNORECASE)
_GENERIC = frozenset({"lora", "pytorch_lora_weights", "adapter_model"})
# How the file of a LoRA is called in a checkpoint's folder.
_LORAS = ("lora.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.safetensors")

Lora = tuple[str, float]


@dataclass(frozen=True, slots=True)
class Shot:
    """One image: the model and the LoRAs on it, the prompt, the seed; its row and column in the grid."""

    model: str
    loras: tuple[Lora, ...]
    prompt: Prompt
    seed: int
    row: int = 0
    column: int = 0


@dataclass(frozen=True, slots=True)
class Shots:
    """All images, in their order: a grid's row by row. over: one of AXES, None without a grid; then no labels."""

    shots: tuple[Shot, ...]
    over: str | None = None
    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Column:
    """What a column changes; None: as it is elsewhere."""

    label: str
    model: str | None = None
    loras: tuple[Lora, ...] | None = None
    prompt: Prompt | None = None
    seed: int | None = None


def plan_shots(
    models: Sequence[str], loras: Sequence[Lora], prompts: Sequence[Prompt], *, over: str | None,
    values: str | Sequence[float] | None,
) -> Shots:  # fmt: skip
    """Every image that these words ask for. Raises UsageError for words that do not go together."""
    if over is None:
        if values is not None:
            raise UsageError("--values", "found no --grid-over beside it", "--grid-over strength takes values")
        if len(models) > 1:
            raise UsageError("--model", f"found {len(models)} models", "--grid-over model compares them")
        base = tuple(loras)
        shots = tuple(Shot(models[0], base, p, p.seed + n) for p in prompts for n in range(p.images))
        return Shots(_within(shots))
    columns = _columns(over, values, models, loras, prompts)
    rows = _rows(over, prompts)
    if len(rows) > MAX_ROWS:
        raise UsageError("--grid-over", f"found {len(rows):,} rows of prompts and seeds, expected at most {MAX_ROWS}")
    shots = tuple(
        Shot(
            column.model or models[0],
            tuple(loras) if column.loras is None else column.loras,
            column.prompt or prompt,
            (column.prompt or prompt).seed + offset if column.seed is None else column.seed,
            row, number,
        )
        for row, (_, prompt, offset) in enumerate(rows)
        for number, column in enumerate(columns)
    )  # fmt: skip
    return Shots(_within(shots), over, tuple(c.label for c in columns), tuple(label for label, _, _ in rows))


def _within(shots: tuple[Shot, ...]) -> tuple[Shot, ...]:
    if len(shots) > MAX_IMAGES:
        raise UsageError("generate", f"found {len(shots):,} images to make, expected at most {MAX_IMAGES:,}")
    return shots


def _rows(over: str, prompts: Sequence[Prompt]) -> list[tuple[str, Prompt, int]]:
    """Label, prompt, and what is added to the prompt's seed."""
    if over == "prompt":
        first = prompts[0]
        return [(f"seed {first.seed + n}", first, n) for n in range(first.images)]
    if over == "seed":
        return [(prompt.prompt, prompt, 0) for prompt in prompts]
    found = []
    for prompt in prompts:
        for n in range(prompt.images):
            seed = f"seed {prompt.seed + n}"
            said = prompt.prompt if prompt.images == 1 else f"{prompt.prompt}\n{seed}"
            found.append((seed if len(prompts) == 1 else said, prompt, n))
    return found


# ------------------------------------------------------------------------------------------------ columns


def _columns(
    over: str, values: str | Sequence[float] | None, models: Sequence[str], loras: Sequence[Lora],
    prompts: Sequence[Prompt],
) -> list[_Column]:  # fmt: skip
    if over not in AXES:
        raise UsageError("--grid-over", f"found {quote(over)}, expected {', '.join(AXES[:-1])} or {AXES[-1]}")
    if over != "model" and len(models) > 1:
        raise UsageError("--model", f"found {len(models)} models beside --grid-over {over}, expected one")
    if values is not None and over not in ("strength", "seed", "step"):
        raise UsageError("--values", f"found it beside --grid-over {over}", "strength, seed and step take values")
    numbers = None if values is None else parse_values(values)
    if over == "lora":
        columns = _of_loras(loras)
    elif over == "model":
        columns = [_Column(label, model=model) for model, label in names_of(models).items()]
    elif over == "step":
        columns = _of_steps(loras, numbers)
    elif over == "strength":
        columns = _of_strengths(loras, numbers)
    elif over == "seed":
        columns = _of_seeds(prompts, numbers)
    else:
        columns = _of_prompts(prompts)
    if not 2 <= len(columns) <= MAX_COLUMNS:
        found = f"{len(columns):,} column{'' if len(columns) == 1 else 's'}"
        what = f"found {found} for a grid over {over}, expected 2 to {MAX_COLUMNS}"
        raise UsageError("--grid-over", what, _MORE.get(over))
    return columns


_MORE = {
    "model": "--model FILE may be said several times",
    "seed": "-n 4 makes four, --values 1,2,3 chooses them",
    "prompt": "--prompt TEXT may be said several times, --prompts FILE lists them",
}


def _of_loras(loras: Sequence[Lora]) -> list[_Column]:
    if not loras:
        raise UsageError("--grid-over", "lora needs one or more --lora FILE")
    labels = _distinct([file for file, _ in loras], lora_name)
    made = [_Column("no LoRA", loras=())]
    for (file, strength), label in zip(loras, labels, strict=True):
        made.append(_Column(label if strength == 1 else f"{label}:{strength:g}", loras=((file, strength),)))
    return made


def _of_steps(loras: Sequence[Lora], numbers: Sequence[float] | None) -> list[_Column]:
    if len(loras) != 1:
        found = "no LoRA" if not loras else f"{len(loras)} LoRAs"
        raise UsageError("--grid-over", f"step needs the one --lora of a training run, found {found}")
    file, strength = loras[0]
    found_steps = training_steps(file)
    columns = {0: _Column("step 0 (base)", loras=())}
    final = None
    for label, step, path in found_steps:
        column = _Column(label, loras=((path, strength),))
        if step is None:
            final = column
        else:
            columns[step] = column
    ordered = [columns[step] for step in sorted(columns)]
    if numbers is not None:
        missing = [f"{number:g}" for number in numbers if number not in columns]
        if missing:
            known = ", ".join(str(step) for step in sorted(columns))
            raise UsageError("--values", f"there is no checkpoint of step {missing[0]}", f"there are {known}")
        return [columns[int(number)] for number in numbers]
    return ordered if final is None else [*ordered, final]


def _of_strengths(loras: Sequence[Lora], numbers: Sequence[float] | None) -> list[_Column]:
    if not loras:
        raise UsageError("--grid-over", "strength needs one or more --lora FILE")
    if numbers is None:
        raise UsageError("--grid-over", "strength needs --values", "as --values 0,0.5,1 or --values 0..1:5")
    plain = all(strength == 1 for _, strength in loras)
    made = []
    for number in numbers:
        scaled = tuple((file, strength * number) for file, strength in loras)
        label = f"strength {number:g}" if plain else f"strengths times {number:g}"
        # At a strength of 0 there is no LoRA, to the last bit.
        made.append(_Column(label, loras=tuple(lora for lora in scaled if lora[1] != 0)))
    return made


def _of_seeds(prompts: Sequence[Prompt], numbers: Sequence[float] | None) -> list[_Column]:
    own = next((p for p in prompts if p.said & {"seed", "images"}), None)
    if own is not None:
        word = "seed" if "seed" in own.said else "images"
        raise UsageError("--grid-over", f"seed, but the file of prompts has its own column {word}")
    if numbers is None:
        first = prompts[0]
        return [_Column(f"seed {first.seed + n}", seed=first.seed + n) for n in range(first.images)]
    if prompts[0].images > 1:
        raise UsageError("--values", f"found --images {prompts[0].images} beside it", "each value is one seed")
    for number in numbers:
        if number != int(number) or not 0 <= number < 2**53:
            raise UsageError("--values", f"found {number:g}, expected seeds: whole numbers from 0")
    return [_Column(f"seed {int(number)}", seed=int(number)) for number in numbers]


def _of_prompts(prompts: Sequence[Prompt]) -> list[_Column]:
    own = {p.images for p in prompts}
    if len(own) > 1:
        raise UsageError("--grid-over", "prompt, but the prompts have different numbers of images")
    seeds = {p.seed for p in prompts}
    if len(seeds) > 1:
        raise UsageError("--grid-over", "prompt, but the prompts have different seeds", "rows are the seeds")
    return [_Column(p.prompt, prompt=p) for p in prompts]


def parse_values(said: str | Sequence[float]) -> list[float]:
    """The numbers of --values. Raises UsageError.

    Reckoned as decimals, so that the third of 0..1:11 is 0.2, and no number next to it.
    """
    found: list[Fraction] = []
    words = said.split(",") if isinstance(said, str) else [str(number) for number in said]
    for word in words:
        low, dots, high = word.partition("..")
        if not dots:
            found.append(_number(word))
            continue
        high, colon, count = high.partition(":")
        first, last = _number(low), _number(high)
        if colon:
            if not (count.isascii() and count.isdecimal() and len(count) < 10 and int(count) >= 2):
                raise UsageError("--values", f"found {quote(word)}, expected {_SAYS}")
            steps = int(count)
            if steps > MAX_COLUMNS:
                raise UsageError("--values", f"found {quote(word)}, expected at most {MAX_COLUMNS} numbers")
            found += [first + (last - first) * n / (steps - 1) for n in range(steps)]
            continue
        step = first - found[-1] if found else Fraction(0)
        if step == 0 or (last - first) / step < 0 or (last - first) / step > MAX_COLUMNS:
            raise UsageError("--values", f"found {quote(word)}, expected {_SAYS}")
        found += [first + step * n for n in range(math.floor((last - first) / step) + 1)]
    numbers = [float(number) for number in found]
    twice = next((number for n, number in enumerate(numbers) if number in numbers[:n]), None)
    if twice is not None:
        raise UsageError("--values", f"found {twice:g} twice")
    return numbers


def _number(word: str) -> Fraction:
    try:
        return Fraction(repr(float(word)))
    except (ValueError, OverflowError):
        raise UsageError("--values", f"found {quote(word)}, expected {_SAYS}") from None


# ------------------------------------------------------------------------------------------------ names


def stem_of(label: str) -> str:
    """The name of a file, folder or repository, without the suffix of its kind."""
    name = label.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or label
    name = name.partition("@")[0] if label.startswith("hf://") else name
    for suffix in _SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


def names_of(labels: Sequence[str]) -> Mapping[str, str]:
    """Each file and its name; of files of one name, with the folder. Raises UsageError for one that stands twice."""
    twice = next((label for n, label in enumerate(labels) if label in labels[:n]), None)
    if twice is not None:
        raise UsageError("--model", f"found {quote(twice)} twice")
    return dict(zip(labels, _distinct(labels, stem_of), strict=True))


def lora_name(label: str) -> str:
    """A LoRA's name; where its file is called what all such files are called, its folder's, and the training run's."""
    stem = stem_of(label)
    if stem not in _GENERIC:
        return stem
    folders = [part for part in label.removeprefix("hf://").replace("\\", "/").split("/")[:-1] if part not in ("", ".")]
    if not folders:
        return stem
    if not (_NUMBER.search(folders[-1]) and _OF_STEPS.search(folders[-1])):
        return folders[-1]
    run = next((part for part in reversed(folders[:-1]) if part != "checkpoints"), "")
    return f"{run.removesuffix('-train')}-{folders[-1]}" if run else folders[-1]


def _distinct(labels: Sequence[str], name_of: Callable[[str], str]) -> list[str]:
    names = [name_of(label) for label in labels]
    return [
        f"{stem_of(str(Path(label).parent))}/{name}" if names.count(name) > 1 and "/" in label else name
        for label, name in zip(labels, names, strict=True)
    ]


# ------------------------------------------------------------------------------------------------ a training run


def training_steps(file: str) -> list[tuple[str, int | None, str]]:
    """The LoRAs of a run, by steps: label, steps (None: not known, the last), file. Raises UsageError.

    file: a LoRA that `weightops train` wrote, whose checkpoints lie beside it; or a folder with checkpoints, as kohya's
    and diffusers' trainers write them too: folders step-*/ or checkpoint-*/, or files with a number at the end.
    """
    path = Path(file)
    beside = path.with_name(f"{stem_of(path.name)}-train")
    if steps_in(beside):
        run, last = beside, path
    else:
        run = path.parent if path.name == "checkpoints" and steps_in(path.parent) else path
        last = run.with_name(f"{run.name.removesuffix('-train')}.safetensors")
    own = steps_in(run)
    if own:
        found: list[tuple[str, int | None, str]] = [(f"step {n}", n, _lora_in(folder)) for n, folder in own.items()]
        return [*found, *_last(last, max(own))] if last.exists() and last != run else found
    if not path.is_dir():
        if not path.exists():
            raise UsageError(file, "no such file or folder")
        what = f"found no checkpoints beside it, expected them in {quote(f'{beside.name}/checkpoints')}"
        raise UsageError(file, what, "train --checkpoint-every N writes them; --lora FOLDER names another place")
    return _numbered(path, file)


def _last(path: Path, newest: int) -> list[tuple[str, int | None, str]]:
    """What the run wrote at its end, unless its newest checkpoint is the same."""
    step = _said_steps(path)
    if step is None:
        return [("final", None, str(path))]
    return [] if step == newest else [(f"step {step}", step, str(path))]


def _numbered(folder: Path, label: str) -> list[tuple[str, int | None, str]]:
    found: dict[int, tuple[str, int | None, str]] = {}
    final: list[tuple[str, int | None, str]] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not (path.is_dir() or path.suffix.lower() == ".safetensors"):
            continue
        name = path.name if path.is_dir() else stem_of(path.name)
        match = _NUMBER.search(name)
        if match is None and path.is_dir():
            continue
        lora = _lora_in(path) if path.is_dir() else str(path)
        step = _said_steps(Path(lora))
        if step is not None:
            found[step] = (f"step {step}", step, lora)
        elif match is not None:
            step = int(match[1])
            found[step] = (f"step {step}" if _OF_STEPS.search(name) else str(step), step, lora)
        else:
            final.append(("final", None, lora))
    if len(final) > 1:
        names = listing(Path(file).name for _, _, file in final)
        raise UsageError(label, f"found {len(final)} files without a number of steps: {names}, expected one at most")
    if not found:
        raise UsageError(
            label, "found no checkpoints: folders step-*/ or checkpoint-*/, or files with a number of steps"
        )
    return [*(found[step] for step in sorted(found)), *final]


def _lora_in(folder: Path) -> str:
    """The LoRA in a checkpoint's folder. Raises UsageError."""
    if (folder / "lora").is_dir():
        return str(folder / "lora")
    for name in _LORAS:
        if (folder / name).is_file():
            return str(folder / name)
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if len(files) != 1:
        raise UsageError(str(folder), f"found {len(files)} safetensors files, expected the one of a LoRA")
    return str(files[0])


def _said_steps(path: Path) -> int | None:
    """The steps that a LoRA's own metadata says it was trained for."""
    try:
        with open_checkpoint(path) as opened:
            said = opened.metadata.get("ss_steps", "")
    except (FormatError, UsageError):
        return None
    return int(said) if re.fullmatch(r"[0-9]{1,9}", said) else None
