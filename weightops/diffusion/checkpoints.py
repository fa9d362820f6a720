"""Where a training run stands, on disk: checkpoints that appear whole or not at all, and the newest of them again.

A checkpoint holds the LoRA twice, as a file that others load and bit for bit as it trains, beside the states of the
optimizer, the schedule and the loss scaler. Knows nothing of how a step is made.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.errors import FormatError, OutputError, UsageError, quote
from weightops.files.writer import sync_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

FOLDER = "checkpoints"
STATE = "state.pt"
_NAME = re.compile(r"step-([0-9]{6,})")
_PART = ".part-"


@dataclass(frozen=True, slots=True)
class State:
    """Everything that the next step depends on, beside the settings. step: the steps that are done.

    smoothed: the running mean of the loss. scaler: of fp16's loss scaling, empty without.
    """

    step: int
    smoothed: float | None
    parameters: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    scaler: Mapping[str, Any]


def name_of(step: int) -> str:
    """step-000100: in order of names is in order of steps."""
    return f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """How many steps are done in it."""
    return int(checkpoint.name.rpartition("-")[2])


def lora_in(checkpoint: Path, dialect: str) -> Path:
    """Where a checkpoint's LoRA is: a file, or PEFT's folder."""
    return checkpoint / ("lora" if dialect == "peft" else "lora.safetensors")


def steps_in(work: Path) -> dict[int, Path]:
    """The checkpoints of a run, in order. What is not whole has another name, and is none."""
    folder = work / FOLDER
    found = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is not None and (path / STATE).is_file():
                found[int(match.group(1))] = path
    return dict(sorted(found.items()))


def newest(work: Path) -> Path | None:
    """The checkpoint of the most steps."""
    found = steps_in(work)
    return found[max(found)] if found else None


def save(work: Path, state: State, write_lora: Callable[[Path], Any]) -> Path:
    """A new checkpoint. write_lora: puts the LoRA's file at the path that it is given. Raises OutputError.

    One of the same step is replaced.
    """
    import torch

    folder = work / FOLDER
    target = folder / name_of(state.step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=_PART, dir=folder))
    except OSError as e:
        raise OutputError(str(folder), f"cannot be written: {e.strerror or e}") from None
    try:
        part.chmod(0o755)
        write_lora(part)
        held = {
            "step": state.step, "smoothed": state.smoothed, "parameters": dict(state.parameters),
            "optimizer": state.optimizer, "schedule": state.schedule, "scaler": state.scaler,
        }  # fmt: skip
        with (part / STATE).open("wb") as file:
            torch.save(held, file)
            file.flush()
            os.fsync(file.fileno())
        _put_in_place(part, target)
    except OSError as e:
        raise OutputError(str(target), f"cannot be written: {e.strerror or e}") from None
    except RuntimeError as e:  # torch's writer says so of a full disk
        raise OutputError(str(target), f"cannot be written: {' '.join(str(e).split())[:200]}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _put_in_place(part: Path, target: Path) -> None:
    if target.is_dir():
        remove(target)
    part.replace(target)
    sync_folder(target.parent)


def remove(checkpoint: Path) -> None:
    """Out of sight in one step, then gone: half of one is never seen as one."""
    away = Path(tempfile.mkdtemp(prefix=_PART, dir=checkpoint.parent))
    checkpoint.replace(away / checkpoint.name)
    shutil.rmtree(away, ignore_errors=True)


def keep_newest(work: Path, count: int) -> None:
    """Remove all checkpoints but the newest `count`."""
    for path in list(steps_in(work).values())[:-count]:
        remove(path)


def clear_leftovers(work: Path) -> None:
    """Remove what a run that was killed has left unfinished."""
    with contextlib.suppress(OSError):
        for path in (work / FOLDER).iterdir():
            if path.name.startswith(_PART):
                shutil.rmtree(path, ignore_errors=True)


def load(checkpoint: Path) -> State:
    """A checkpoint's state, on the CPU. Raises FormatError; nothing in the file is run."""
    import torch

    path = checkpoint / STATE
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        return State(
            held["step"], held["smoothed"], held["parameters"], held["optimizer"], held["schedule"], held["scaler"]
        )
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise _damaged(path, e) from None
    except Exception as e:  # pickle's own errors have no kind in common
        if type(e).__module__ in ("pickle", "_pickle"):
            raise _damaged(path, e) from None
        raise


def _damaged(path: Path, error: Exception) -> FormatError:
    reason = " ".join(str(error).split())[:120]
    hint = "remove this checkpoint: --resume then takes the one before it"
    return FormatError(str(path), f"cannot be read back: {reason}", hint)


def check_settings(work: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with another run's checkpoints: names every word that differs. Raises UsageError."""
    names = [name for name in dict.fromkeys([*now, *before]) if before.get(name) != now.get(name)]
    if names:
        said = [f"{name} was {quote(before.get(name), 60)}, and is {quote(now.get(name), 60)}" for name in names[:5]]
        more = "" if len(names) <= 5 else f" (and {len(names) - 5:,} more)"
        hint = f"say the same words again, or begin anew in another place; {work} stays as it is"
        raise UsageError("--resume", f"{'; '.join(said)}{more}", hint)
