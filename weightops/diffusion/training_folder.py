"""The folder beside a LoRA that is being trained: settings, the log of the loss and its curve, samples, checkpoints.

One process has it. Whatever appears in it is whole, but for the log, to which a line is added at each step.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops.diffusion.checkpoints import (
    FOLDER,
    State,
    check_settings,
    clear_leftovers,
    keep_newest,
    lora_in,
    name_of,
    newest,
    save,
    steps_in,
)
from weightops.diffusion.figures import curve
from weightops.diffusion.tables import write_whole
from weightops.diffusion.training import Row
from weightops.diffusion.training_images import paint
from weightops.diffusion.written import write_lora
from weightops.errors import FormatError, OutputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from weightops.diffusion.training import Training
    from weightops.diffusion.written import Told

SETTINGS, LOG, CURVE, SAMPLES = "settings.json", "loss.csv", "loss.png", "samples"
COLUMNS = ("step", "loss", "lr", "smoothed")


@dataclass(slots=True)
class Folder:
    """Where a run keeps what it needs to go on. told: what its LoRA files say of it."""

    path: Path
    dialect: str
    told: Told | None = None
    sample_prompts: tuple[str, ...] = ()
    sample_every: int | None = None
    sample_steps: int = 25
    checkpoint_every: int | None = None
    keep: int | None = None
    log_every: int = 1
    samples: list[str] = field(default_factory=list)
    _rows: list[Row] = field(default_factory=list)

    @property
    def first_loss(self) -> float | None:
        """Of the first step that is logged, whichever run made it."""
        return self._rows[0].loss if self._rows else None

    # ------------------------------------------------------------------ begun

    def check(self, *, resume: bool, force: bool) -> None:
        """Refuse to mix two runs, and to go on where there is nothing. Raises UsageError, OutputError."""
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(str(self.path), "is a file, expected a folder to keep checkpoints in")
        found = steps_in(self.path)
        if resume and not found:
            what = f"found no checkpoint in {str(self.path / FOLDER)!r}"
            raise UsageError("--resume", what, "begin without --resume, or name the same --output")
        if found and not resume and not force:
            what = f"holds checkpoints of another run, to {name_of(max(found))}"
            raise OutputError(str(self.path), what, "--resume goes on from there, and --force begins anew without them")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """A new run: what an earlier one left is gone."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in (FOLDER, SAMPLES):
                if (self.path / name).is_dir():
                    shutil.rmtree(self.path / name)
        except OSError as e:
            raise OutputError(str(self.path), f"cannot be written: {e.strerror or e}") from None
        (self.path / CURVE).unlink(missing_ok=True)
        self._write_settings(settings)
        write_whole(self.path / LOG, _lines([COLUMNS]))

    def newest_for(self, settings: Mapping[str, Any], free: frozenset[str]) -> Path:
        """The checkpoint to go on from. Raises UsageError where it is of another run; free: words that may differ."""
        found = newest(self.path)
        assert found is not None
        told = self._read_settings()
        before, now = ({k: v for k, v in s["words"].items() if k not in free} for s in (told, settings))
        for name in ("data", "model", "slots a step"):
            before[name], now[name] = told.get(name), settings.get(name)
        check_settings(self.path, before, now)
        return found

    def go_on(self, settings: Mapping[str, Any], step: int) -> None:
        """Cut the log off after this step, and clear away what is not whole. Raises FormatError, OutputError."""
        path = self.path / LOG
        try:
            rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
            found = [Row(int(r[0]), float(r[1]), float(r[2]), float(r[3])) for r in rows[1:] if len(r) == 4]
        except FileNotFoundError:
            found = []
        except (OSError, ValueError) as e:
            raise FormatError(str(path), f"is not the log that weightops writes: {e}", "remove it, to go on") from None
        clear_leftovers(self.path)
        self._rows = [row for row in found if row.step <= step]
        write_whole(path, _lines([COLUMNS, *map(_cells, self._rows)]))
        self._write_settings(settings)

    def _write_settings(self, settings: Mapping[str, Any]) -> None:
        text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_whole(self.path / SETTINGS, text.encode())

    def _read_settings(self) -> dict[str, Any]:
        path = self.path / SETTINGS
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found["words"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            reason = e.strerror if isinstance(e, OSError) else "it is not what weightops writes"
            raise FormatError(str(path), f"cannot be read: {reason}", "--force begins anew") from None
        return found

    # ------------------------------------------------------------------ as it goes on

    def log(self, row: Row, *, last: bool) -> None:
        """A line of the log, where one is due."""
        if row.step % self.log_every and not last:
            return
        self._rows.append(row)
        try:
            with (self.path / LOG).open("ab") as file:
                file.write(_lines([_cells(row)]))
        except OSError as e:
            raise OutputError(str(self.path / LOG), f"cannot be written: {e.strerror or e}") from None

    def is_due(self, every: int | None, step: int) -> bool:
        """Is a step one of those at which something is done?"""
        return every is not None and step % every == 0

    def checkpoint(self, training: Training) -> Path:
        """All that a run needs to go on from here."""
        state: State = training.state()
        epoch = training.course.epoch(training.step)

        def put(part: Path) -> None:
            assert self.told is not None
            write_lora(
                training.lora, self.told, lora_in(part, self.dialect), dialect=self.dialect, steps=state.step,
                epoch=epoch, force=False,
            )  # fmt: skip

        found = save(self.path, state, put)
        if self.keep is not None:
            keep_newest(self.path, self.keep)
        return found

    def sample(self, training: Training) -> None:
        """An image of each prompt, as the LoRA is now, always from the same noise."""
        folder, seed = self.path / SAMPLES, training.words.seed
        folder.mkdir(exist_ok=True)
        for number, prompt in enumerate(self.sample_prompts, 1):
            told = {"seed": seed, "number": number, "step": training.step}
            path = folder / f"{name_of(training.step)}-{number}.png"
            resolution = training.encoded.framing.resolution
            write_whole(path, paint(training.loaded, prompt, (seed, number), resolution, self.sample_steps, told))
            self.samples.append(str(path))

    def draw(self) -> None:
        """The curve of the loss."""
        steps, losses = [row.step for row in self._rows], [row.loss for row in self._rows]
        smooth = max(2, len(steps) // 20) if len(steps) > 20 else 0
        series: dict[str, tuple[Sequence[float], Sequence[float]]] = {"loss": (steps, losses)}
        curve(series, title=self.path.name, x="step", y="loss", smooth=smooth, path=self.path / CURVE)


def _cells(row: Row) -> tuple[str, ...]:
    return str(row.step), repr(row.loss), repr(row.lr), repr(row.smoothed)


def _lines(rows: Sequence[Sequence[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
