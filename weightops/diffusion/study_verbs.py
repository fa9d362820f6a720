"""What a verb of a study is: a function, what it makes, and what of it can be named. Knows none of them.

A verb's words are its function's parameters, less those that the study says itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops.diffusion.study_words import Parameter, parameters

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# What is going on (its name, how much is done, of how much), and of a training the loss.
Progress = Callable[[str, int, int, "float | None"], None]

# Words that no step may say, and why.
OWN: Mapping[str, str] = {
    "output": "what a step makes stands in the study's folder, under the step's name",
    "force": "a step whose words are changed is run again",
    "dry_run": "weightops study FILE --dry-run says what would be done",
    "on_progress": "it is for programs",
    "on_look": "it is for programs",
}


@dataclass(frozen=True, slots=True)
class Made:
    """outputs: names within the step's folder, by what they are called in references; "" is the step itself.

    shown: parts of a page, as study_page draws them. Nothing here tells the time.
    """

    outputs: dict[str, Any]
    shown: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Job:
    """A step that is run: in `work`, an empty folder, or with `again` the one that an interrupted run left.

    cache: a folder that all steps share.
    """

    step: str
    words: Mapping[str, Any]
    work: Path
    again: bool
    cache: Path
    on_progress: Progress

    def counted(self, done: int, total: int) -> None:
        """Progress of a verb that counts one thing."""
        self.on_progress("", done, total, None)


@dataclass(frozen=True, slots=True)
class Verb:
    """run: does the work with the function. given: parameters that the verb's own name says.

    own: words that it may not be told. fields: what a reference may name beside the step itself; several: those of
    which there are several, by a key. check: refuses words that cannot be, before anything runs. resumes: does it go on
    where it was interrupted? loads: does it hold whole models in memory?
    """

    name: str
    module: str
    function: str
    run: Callable[[Verb, Job], Made]
    given: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, str] = field(default_factory=lambda: OWN)
    fields: tuple[str, ...] = ()
    several: tuple[str, ...] = ()
    check: Callable[[Verb, Mapping[str, Any]], None] | None = None
    resumes: bool = False
    loads: bool = False

    def call(self, job: Job, **more: Any) -> Any:
        """The function's report."""
        function = getattr(importlib.import_module(self.module), self.function)
        known = parameters(self.module, self.function)
        said = {**job.words, **self.given, **more}
        said.setdefault("on_progress", job.counted)
        if "on_progress" not in known:
            del said["on_progress"]
        positional: list[Any] = []
        if any(p.many for p in known.values()):
            for name, parameter in known.items():
                if parameter.many:
                    positional += said.pop(name, [])
                    break
                positional.append(said.pop(name))
        return function(*positional, **said)


def words_of(verb: Verb) -> dict[str, Parameter]:
    """The words that a step may say."""
    known = parameters(verb.module, verb.function)
    return {name: p for name, p in known.items() if name not in verb.own and name not in verb.given}
