"""Which file is which input of a file that is made again; and the runs that make it."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops.engine.run import ignore
from weightops.errors import MismatchError, UsageError, WeightopsError, listing, quote
from weightops.files.checkpoint import open_checkpoint
from weightops.lineage import as_recorded
from weightops.merging.recipe import Model, leaves
from weightops.ops.merge import files_of
from weightops.ops.merge_looks import looked_everywhere
from weightops.ops.merge_plan import Wish, plan_merge
from weightops.ops.produce import Bar
from weightops.ops.replay_inputs import Shelf, hash_of_source

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from weightops.ops.replay_recipe import Made
    from weightops.ops.report import Report

_TRIED = 64  # ways to fill the places of other inputs that are missing, too
# Words of this command that the verb may refuse: the recipe is not at fault.
_OWN_WORDS = ("--device", "--memory", "--threads")


@dataclass(slots=True)
class Search:
    """Which file is which input. chosen: of each, the file; found: the hash, as of the last run; tried: files read."""

    made: Made
    shelf: Shelf
    work: Path
    is_folder: bool
    target: Path | None
    force: bool
    running: dict[str, Any]
    bar: Bar
    chosen: list[Path | None] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    tried: set[tuple[int, Path]] = field(default_factory=set)
    runs: int = 0
    links: int = 0

    @property
    def output(self) -> Path:
        """The file or folder that is made."""
        return self.target or self.work / ("made" if self.is_folder else "made.safetensors")

    def made_again(self) -> Report:
        """Find the inputs, and make the file of them. Raises UsageError where one is not to be found."""
        wanted = self.made.inputs
        named = [self.shelf.named(name) for name, _ in wanted]
        self.chosen = [paths[0] if len(paths) == 1 else None for paths in named]
        if None in self.chosen:
            unsure = [n for n, path in enumerate(self.chosen) if path is None]
            self._look(unsure, named)
            self._refuse_missing(named)
            self.chosen = [path or paths[0] for path, paths in zip(self.chosen, named, strict=True)]
        report = self._run(self.output)
        wrong = [n for n, (_, hashed) in enumerate(wanted) if self.found[n] != hashed]
        if wrong:
            before = list(self.chosen)
            self.tried |= {(n, path) for n, path in enumerate(before) if path is not None}
            self._look(wrong, named)
            self.chosen = [path or was for path, was in zip(self.chosen, before, strict=True)]
            if self.chosen != before:
                report = self._run(self.output)
        for entry, path, (name, hashed) in zip(report.inputs, self.chosen, wanted, strict=True):
            entry |= {"path": str(path), "name": name, "recorded": hashed}
        return report

    def changed(self) -> list[int]:
        """The inputs of which something else was read than when the file was made."""
        return [n for n, (_, hashed) in enumerate(self.made.inputs) if self.found[n] != hashed]

    def renamed(self) -> list[int]:
        """The inputs that were found under another name."""
        names = [as_recorded(path.name) for path in self.chosen if path is not None]
        return [n for n, (name, _) in enumerate(self.made.inputs) if names[n] != name]

    def _refuse_missing(self, named: Sequence[Sequence[Path]]) -> None:
        missing = [n for n, path in enumerate(self.chosen) if path is None and not named[n]]
        if not missing:
            return
        names = " and ".join(f"{quote(self.made.inputs[n][0])} ({self.made.inputs[n][1]})" for n in missing[:5])
        more = f" (and {len(missing) - 5:,} more)" if len(missing) > 5 else ""
        where = listing(dict.fromkeys(map(str, self.shelf.folders))) or "any folder"
        what = f"was made of {names}{more}: no file in {where} has the name, and none the hash"
        raise UsageError(self.made.label, what, "--in FOLDER looks there, too, under whatever name it has now")

    # -------------------------------------------------------------- by hash

    def _look(self, numbers: Sequence[int], named: Sequence[Sequence[Path]]) -> None:
        """For each of these inputs the file that has its hash, if there is one among those that were not tried yet."""
        for n in numbers:
            self.chosen[n] = None
        for step, n in enumerate(numbers):
            _, hashed = self.made.inputs[n]
            candidates = [p for p in self._candidates(n, named) if (n, p) not in self.tried]
            for number, path in enumerate(candidates):
                self.tried.add((n, path))
                if self._hash(n, path, named) == hashed:
                    self.chosen[n] = path
                    break
                done = (step + (number + 1) / len(candidates)) / len(numbers)
                self.bar.part(0.0, 0.3)(round(1000 * done), 1000)

    def _candidates(self, n: int, named: Sequence[Sequence[Path]]) -> list[Path]:
        return [*named[n], *self.shelf.others(self.made.inputs[n][0], self.made.kinds[n])]

    def _hash(self, n: int, path: Path, named: Sequence[Sequence[Path]]) -> str | None:
        """The hash of what is read of the file as input `n`; None where it does not fit."""
        fills = [
            [path] if m == n else [own] if own is not None else self._fills(m, n, path, named)
            for m, own in enumerate(self.chosen)
        ]
        for files in itertools.islice(itertools.product(*fills), _TRIED):
            with contextlib.suppress(WeightopsError):
                return self._hash_among([self._called(m, p) for m, p in enumerate(files)], n)
        return None

    def _fills(self, m: int, n: int, path: Path, named: Sequence[Sequence[Path]]) -> list[Path]:
        """What may stand for another input that is not found yet: of it, headers alone matter."""
        alike = [path] if self.made.kinds[m] == self.made.kinds[n] else []
        return list(dict.fromkeys([*named[m][:1], *alike, *itertools.islice(self._candidates(m, named), 8)]))

    def _hash_among(self, files: Sequence[str], n: int) -> str:
        recipe = None if self.made.recipe is None else self.made.recipe(files)
        if recipe is None or any(isinstance(leaf, Model) and leaf.to is not None for leaf in leaves(recipe.root)):
            # What is read follows from more than headers here.
            out = self.work / f"tried-{self.runs}{'' if self.is_folder else '.safetensors'}"
            self.runs += 1
            report = self.made.again(files, out, {**self.running, "force": True, "on_progress": ignore})
            shutil.rmtree(out) if out.is_dir() else out.unlink()
            return str(report.inputs[n]["hash"])
        with contextlib.ExitStack() as stack:
            opened = {file: stack.enter_context(open_checkpoint(file)) for file in files_of(recipe)}
            wish = looked_everywhere(recipe, opened, Wish(allow_nonfinite=True), dry_run=True, bar=Bar(ignore))
            return hash_of_source(plan_merge(recipe, opened, wish).planned.plan, n)

    # -------------------------------------------------------------- the run

    def _run(self, out: Path) -> Report:
        files = [self._called(n, path) for n, path in enumerate(self.chosen) if path is not None]
        force = self.force or self.runs > 0
        self.runs += 1
        try:
            on_progress = self.bar.part(0.0 if self.runs == 1 else 0.3, 0.9)
            report = self.made.again(files, out, {**self.running, "force": force, "on_progress": on_progress})
        except UsageError as e:
            if e.where == str(out) and self.target is None:  # what is made is a folder, and this a file, or the reverse
                what = "is a folder, and a file was made" if self.is_folder else "is one file of a folder that was made"
                hint = f"name the {'file' if self.is_folder else 'folder'}"
                raise UsageError(self.made.label, what, hint) from None
            if e.where == str(out) or e.where in _OWN_WORDS:
                raise
            what = f"its recipe asks for what {self.made.command} refuses: {e}"
            raise MismatchError(self.made.label, what, e.hint) from None
        if len(report.inputs) != len(self.made.inputs):
            what = f"its recipe lists {len(self.made.inputs)} inputs, and takes {len(report.inputs)}"
            raise MismatchError(self.made.label, what)
        self.found = [str(entry["hash"]) for entry in report.inputs]
        return report

    def _called(self, n: int, path: Path) -> str:
        """The file under the name that it had, for its name stands in what is made of it."""
        name = self.made.inputs[n][0]
        if as_recorded(path.name) == name:
            return str(path)
        folder = self.work / f"input-{self.links}"
        with contextlib.suppress(OSError, ValueError):  # no links to be had here, or no such name
            folder.mkdir()
            self.links += 1
            (folder / name).symlink_to(path.absolute())
            settings = path.parent / "adapter_config.json"
            if settings.is_file():
                (folder / settings.name).symlink_to(settings.absolute())
            return str(folder / name)
        return str(path)
