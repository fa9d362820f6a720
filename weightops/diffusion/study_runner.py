"""Runs the steps of a study one after the other: what each is made of, whether it stands, and where its files are."""

from __future__ import annotations

import contextlib
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion import study_inputs
from weightops.diffusion.study_page import page_of
from weightops.diffusion.study_parts import Reference, Step, Study
from weightops.diffusion.study_state import Record, State
from weightops.diffusion.study_verbs import Job, Made, Progress
from weightops.diffusion.threads import one_thread
from weightops.errors import Interrupted, WeightopsError, listing, quote
from weightops.ops.yaml_lines import refused

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

RUN, STANDS, WOULD_RUN = "run", "unchanged", "would run"


@dataclass(frozen=True, slots=True)
class StepReport:
    """What became of a step. state: run, unchanged, or would run; reason: why it was, or would be, run."""

    name: str
    verb: str
    state: str
    reason: str
    output: str | None
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()


class Runner:
    """Runs steps one after the other, and knows what the earlier ones made."""

    def __init__(
        self, found: Study, state: State, given: Mapping[str, str], on_begin: Callable[[str, str], None] | None,
        on_progress: Progress,
    ) -> None:  # fmt: skip
        self.study, self.state, self.given = found, state, given
        self.on_begin, self.on_progress = on_begin, on_progress
        self.records: dict[str, Record] = {}  # of the steps that stand
        self.made: dict[str, Path] = {}  # of --tiny
        self.nbytes = 0  # that were written

    def step(self, step: Step, *, forced: bool, dry_run: bool) -> StepReport:
        """Run the step if it must be."""
        before = self.state.record(step.name)
        waiting = self._waits_for(step)
        if waiting:
            return self._told(step, WOULD_RUN, f"after {listing(waiting)}")
        made_of = self._made_of(step, dry_run=dry_run)
        reason = "asked for" if forced else self._reason(step.name, before, made_of)
        if reason is None:
            assert before is not None
            self.records[step.name] = before
            return self._told(step, STANDS, "", warnings=before.warnings)
        if dry_run:
            return self._told(step, WOULD_RUN, reason)
        started = time.perf_counter()
        if self.on_begin is not None:
            self.on_begin(step.name, step.verb.name)
        made = self._run(step, made_of)
        return self._told(step, RUN, reason, time.perf_counter() - started, made.warnings)

    def _told(
        self, step: Step, state: str, reason: str, seconds: float = 0.0, warnings: Sequence[str] = ()
    ) -> StepReport:  # fmt: skip
        place = self.state.place(step.name)
        output = None
        if step.name in self.records:
            main = self.records[step.name].outputs[""]
            output = str(place / main) if isinstance(main, str) else str(place)
        return StepReport(step.name, step.verb.name, state, reason, output, seconds, tuple(warnings))

    def _waits_for(self, step: Step) -> list[str]:
        """Of a dry run: the steps that it needs and that would be run first."""
        needed = [r.name for r in step.references]
        if step.verb.name == "page":
            needed = [other.name for other in self._above(step)]
        inputs = self.study.inputs
        return list(dict.fromkeys(name for name in needed if name not in self.records and name not in inputs))

    def _above(self, step: Step) -> tuple[Step, ...]:
        return self.study.steps[: self.study.steps.index(step)]

    # -------------------------------------------------------------------------------------------- what it is made of

    def _made_of(self, step: Step, *, dry_run: bool) -> dict[str, Any]:
        """Everything that decides about what the step makes, as JSON has it."""
        words = {name: self._print(value, dry_run=dry_run) for name, value in sorted(step.words.items())}
        made_of: dict[str, Any] = {"weightops": __version__, "verb": step.verb.name, "words": words}
        if step.verb.name == "page":
            made_of["study"] = [self.study.title, self.study.about, self.study.tiny]
            made_of["inputs"] = [list(told) for told in self._told_of_inputs()]
            made_of["steps"] = [
                [s.name, s.title, s.text, s.verb.name, _shown(s.words), self.records[s.name].content,
                 self.records[s.name].shown, self.records[s.name].warnings]
                for s in self._above(step)
            ]  # fmt: skip
        return made_of

    def _print(self, value: Any, *, dry_run: bool) -> Any:
        """A value in which each reference has become what it is, and the hash of what lies there."""
        if isinstance(value, Reference):
            return {"$": str(value), "is": self._content(value, dry_run=dry_run)}
        if isinstance(value, dict):
            return {str(key): self._print(part, dry_run=dry_run) for key, part in value.items()}
        return [self._print(part, dry_run=dry_run) for part in value] if isinstance(value, list) else value

    def _content(self, reference: Reference, *, dry_run: bool) -> Any:
        name = reference.name
        if name in self.study.inputs:
            if name not in self.given:
                entry = self.study.inputs[name]
                if dry_run:
                    # What it would be made of: it need not be there.
                    before = self.state.record(f"inputs/{name}")
                    same = before is not None and before.made_of == self._of_tiny(name)
                    return before.content if before is not None and same else entry.tiny
                self._tiny(name)
                return self.records[f"inputs/{name}"].content
            path = self.given[name]
            # A hub's model is known by its name: with @revision that is exact.
            return path if path.startswith("hf://") else [Path(path).name, self.state.hashes.of(Path(path))]
        record = self.records[name]
        if reference.field is None:
            return record.content
        files = self._files(reference)
        return [[Path(f).name, self.state.hashes.of(Path(f))] for f in ([files] if isinstance(files, str) else files)]

    def _reason(self, name: str, before: Record | None, made_of: Mapping[str, Any]) -> str | None:
        """Why a step must be run; None: it stands."""
        if before is None:
            return "first run"
        if not before.outputs:
            return "it was not finished"
        told = _difference(before.made_of, made_of)
        if told is not None:
            return told
        return None if self.state.is_whole(name, before) else "what it made is not there as it was"

    # -------------------------------------------------------------------------------------------- running

    def _run(self, step: Step, made_of: Mapping[str, Any]) -> Made:
        words = {name: self._value(value) for name, value in step.words.items()}
        work, again = self.state.begin(step.name, made_of, resumes=step.verb.resumes)
        job = Job(step.name, words, work, again, self.state.own / "cache", self.on_progress)
        try:
            with one_thread() if self.study.tiny and step.verb.loads else contextlib.nullcontext():
                made = self._page(step, work) if step.verb.name == "page" else step.verb.run(step.verb, job)
        except BaseException as e:
            stopped = isinstance(e, (Interrupted, KeyboardInterrupt))
            if not step.verb.resumes:
                self.state.drop(step.name)
            if stopped:
                what = f"interrupted in the step {step.name!r}; what is done above it stands"
                raise Interrupted(self.study.label, what, "the same command goes on from there") from None
            if isinstance(e, WeightopsError):
                where = f"{self.study.label}, line {step.line}: step {step.name!r}"
                raise type(e)(where, f"{e.where}: {e.what}" if e.where else e.what, e.hint) from None
            raise
        finally:
            if step.verb.loads:
                gc.collect()  # its models, before those of the next
        record = Record(dict(made_of), made.outputs, shown=made.shown, warnings=made.warnings)
        self.state.finish(step.name, record)
        self.records[step.name] = record
        self.nbytes += _nbytes(self.state.place(step.name))
        return made

    def _value(self, value: Any) -> Any:
        """A value as the verb's function is given it."""
        if isinstance(value, Reference):
            files = self._files(value)
            if value.strength is None:
                return files
            return [(f, value.strength) for f in files] if isinstance(files, list) else (files, value.strength)
        if isinstance(value, dict):
            return {key: self._value(part) for key, part in value.items()}
        if isinstance(value, list):
            found: list[Any] = []
            for part in value:
                one = self._value(part)
                found += one if isinstance(part, Reference) and isinstance(one, list) else [one]
            return found
        return value

    def _files(self, reference: Reference) -> str | list[str]:
        """The path, or the paths, that a reference stands for. Raises UsageError for a key that there is not."""
        name = reference.name
        if name in self.study.inputs:
            return self.given[name] if name in self.given else str(self._tiny(name))
        place, outputs = self.state.place(name), self.records[name].outputs
        found = outputs.get(reference.field or "")
        if not found:
            raise refused(self.study.label, reference.line, f"{reference}: the step {name!r} made none with its words")
        if isinstance(found, dict):
            if reference.key is not None and reference.key not in found:
                what = f"{reference}: the step {name!r} made no {quote(reference.key)}"
                raise refused(self.study.label, reference.line, what, f"there are {', '.join(found)}")
            found = list(found.values()) if reference.key is None else found[reference.key]
        return str(place / found) if isinstance(found, str) else [str(place / f) for f in found]

    def _page(self, step: Step, work: Path) -> Made:
        steps = [(s, self.records[s.name]) for s in self._above(step)]
        page = page_of(self.study, step, self._told_of_inputs(), steps, self.state.place)
        page.write(work / "index.html")
        return Made({"": "index.html"}, [])

    # -------------------------------------------------------------------------------------------- inputs

    def _of_tiny(self, name: str) -> dict[str, Any]:
        return {"weightops": __version__, "tiny": self.study.inputs[name].tiny}

    def _tiny(self, name: str) -> Path:
        """An input that is made in the place of the real one."""
        if name in self.made:
            return self.made[name]
        entry, key = self.study.inputs[name], f"inputs/{name}"
        assert entry.tiny is not None
        wanted = study_inputs.read_tiny(entry.tiny, self.study.label, entry.line)
        before = self.state.record(key)
        if before is None or before.made_of != self._of_tiny(name) or not self.state.is_whole(key, before):
            work, _ = self.state.begin(key, self._of_tiny(name), resumes=False)
            made = study_inputs.make(wanted, name, work)
            before = Record(self._of_tiny(name), {"": made.name})
            self.state.finish(key, before)
        self.records[key] = before
        self.made[name] = self.state.place(key) / str(before.outputs[""])
        return self.made[name]

    def _told_of_inputs(self) -> list[tuple[str, str]]:
        """The inputs that the steps above were given, for a page: by name and content, wherever they lie."""
        found = []
        for name, entry in self.study.inputs.items():
            path = self.given.get(name)
            if name in self.study.used and path is not None:
                hashed = "" if path.startswith("hf://") else f", xxh3_128 {self.state.hashes.of(Path(path))}"
                found.append((name, (path if path.startswith("hf://") else Path(path).name) + hashed))
            elif name in self.study.used:
                found.append((name, f"made: {entry.tiny}"))
        return found

    def entries(self) -> list[dict[str, Any]]:
        """The inputs that were used, for the report."""
        found: list[dict[str, Any]] = []
        for name in sorted(self.study.used):
            path = self.given.get(name) or (str(self.made[name]) if name in self.made else None)
            if path is None or path.startswith("hf://"):
                found.append({"name": name, "path": path, "hash": None, "bytes": None})
                continue
            hashed = self.state.hashes.of(Path(path))
            size = _nbytes(Path(path))
            found.append({"name": name, "path": path, "hash": f"xxh3_128:{hashed}", "bytes": size})
        return found


def _shown(words: Mapping[str, Any]) -> dict[str, Any]:
    """Words as the file says them: names in the place of what they stand for."""

    def plain(value: Any) -> Any:
        if isinstance(value, Reference):
            return str(value)
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        return [plain(part) for part in value] if isinstance(value, list) else value

    return {name: plain(value) for name, value in words.items()}


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What is different in what a step is made of, in words."""
    if before == now:
        return None
    if before.get("verb") != now["verb"]:
        return f"it was {before.get('verb')}"
    if before.get("weightops") != now["weightops"]:
        return f"it was made by weightops {before.get('weightops')}"
    old, new = before.get("words", {}), now["words"]
    names = [name for name in {**new, **old} if old.get(name) != new.get(name) or (name in old) != (name in new)]
    if names:
        return f"{', '.join(sorted(names))} changed"
    return "what it shows changed"


def _nbytes(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
