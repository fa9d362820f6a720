"""What an evaluation compares with the model alone: LoRAs, and the checkpoints of training runs, each by itself.

Reads headers, and finds checkpoints on disk. Measures nothing.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from weightops.diffusion.axes import stem_of, training_steps
from weightops.errors import MismatchError, UsageError, WeightopsError, quote
from weightops.files.checkpoint import open_checkpoint
from weightops.ops.adapter_modules import read_own
from weightops.ops.fuse import parse

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from weightops.diffusion.models import LoraName

BASE = "base"
_ADAPTER = "adapter_config.json"  # PEFT's folder of one LoRA has it


@dataclass(frozen=True, slots=True)
class Compared:
    """A LoRA at a strength. run: what it is a point of, a training or itself. step: of the training, where known."""

    label: str
    file: str
    strength: float
    run: str
    step: int | None


def compared_of(loras: Sequence[LoraName]) -> list[Compared]:
    """Each LoRA, and of the folder of a training run each of its checkpoints, by steps; labels are each other's equals.

    Raises UsageError for what is not there and for one LoRA twice, and FormatError or MismatchError for what is none.
    """
    found: list[Compared] = []
    several = len(loras) > 1
    for lora in loras:
        file, strength = parse(lora)
        found += _points(os.fspath(file), strength, several=several)
    labels = Counter(one.label for one in found)
    found = [replace(one, label=_longer(one)) if labels[one.label] > 1 else one for one in found]
    for label, count in Counter(one.label for one in found).items():
        if count > 1 or label == BASE:
            why = "twice" if count > 1 else "as a LoRA's name, which stands for the model alone"
            raise UsageError("--lora", f"found {quote(label)} {why}")
    return found


def _points(file: str, strength: float, *, several: bool) -> list[Compared]:
    ending = "" if strength == 1 else f":{strength:g}"
    run = _run(file)
    if run is None:
        name = stem_of(file) + ending
        return [Compared(name, file, strength, name, _steps(file))]
    name = stem_of(file).removesuffix("-train") + ending
    found = []
    for label, step, path in run:
        _steps(path)
        found.append(Compared(f"{name} {label}" if several or ending else label, path, strength, name, step))
    return found


def _run(file: str) -> list[tuple[str, int | None, str]] | None:
    """The checkpoints of a training run's folder; None of a LoRA, which may be a folder, too."""
    path = Path(file)
    if not path.is_dir() or (path / _ADAPTER).is_file():
        return None
    try:
        return training_steps(file)
    except UsageError as absent:
        try:
            _steps(file)
        except MismatchError:
            raise  # it holds tensors, of something else
        except WeightopsError:
            raise absent from None
        return None


def _steps(file: str) -> int | None:
    """The steps that a LoRA says it was trained for. Raises for what is no LoRA."""
    with open_checkpoint(file) as opened:
        read_own(opened)
        said = opened.metadata.get("ss_steps", "")
    return int(said) if said.isascii() and said.isdecimal() and len(said) < 10 else None


def _longer(one: Compared) -> str:
    """With the folder, for a LoRA whose name another one has."""
    above = Path(one.file).parent.name
    return f"{above}/{one.label}" if above else one.label


def curves(
    compared: Sequence[Compared], value: Callable[[Compared], float | None], base: float | None
) -> Mapping[str, tuple[list[float], list[float]]]:
    """Lines by steps, one for each run, as `figures.curve` takes them; from the model alone, at step 0, if `base`.

    What has no known steps, or no value, is in none. Nothing where no line has two points.
    """
    found: dict[str, tuple[list[float], list[float]]] = {}
    for one in sorted((c for c in compared if c.step is not None), key=lambda c: c.step or 0):
        number = value(one)
        if number is None:
            continue
        xs, ys = found.setdefault(one.run, ([], []) if base is None else ([0.0], [base]))
        xs.append(float(one.step or 0))
        ys.append(number)
    return found if any(len(xs) > 1 for xs, _ in found.values()) else {}
