"""A study's file: its inputs and its steps, read and understood before anything runs. Runs nothing itself.

    title: Two checkpoints and their merge
    inputs:
      first: {path: models/first.safetensors, how: any SD 1.x checkpoint, tiny: sd15 checkpoint seed 1}
      second: {path: models/second.safetensors, tiny: sd15 checkpoint seed 2}
    steps:
      merged:
        merge: {models: [$first, $second], alpha: 0.5}
      folder:
        convert: {path: $merged, to: diffusers}
        tiny: {like: $words}

A step is a verb of the command line with the words of its function. Under `--tiny` each input is what its `tiny:` says
(see weightops.diffusion.study_inputs), and the words of a step's `tiny:` take the place of its own; null takes one
away. `title:` and `text:` of a step stand on the page.

References: a text that begins with `$` names an input or an earlier step. `$merged` is what the step made, `$style.log`
another thing that it made, `$style.checkpoints.100` one of several; after it may stand the strength of a LoRA,
`$style:0.8`. A text that begins with `$$` begins with `$`.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.diffusion.study_parts import Input, Reference, Step, Study
from weightops.diffusion.study_steps import VERBS
from weightops.diffusion.study_verbs import Verb, words_of
from weightops.diffusion.study_words import Parameter, is_path, misfit, wrapped
from weightops.errors import FormatError, UsageError, WeightopsError, quote
from weightops.ops.yaml_lines import Said, check_keys, nearest, read_yaml, refused

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

_KEYS = ("title", "about", "inputs", "steps")
_INPUT_KEYS = ("path", "how", "tiny")
_ABOUT_A_STEP = ("title", "text", "tiny")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")
_REFERENCE = re.compile(
    r"\$(?P<name>[A-Za-z][A-Za-z0-9_-]*)(\.(?P<field>[a-z_]+)(\.(?P<key>[A-Za-z0-9_-]+))?)?"
    r"(:(?P<strength>[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?))?"
)
_RESERVED = "inputs"  # a folder beside those of the steps


def read_study(file: str | os.PathLike[str], *, tiny: bool, more: Mapping[str, Verb] | None = None) -> Study:
    """The study that a YAML file says, every name in it known. more: verbs beside those of this floor.

    Raises UsageError, with the line, and FormatError.
    """
    label, path = str(file), Path(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise FormatError(label, f"is no text: byte {e.start} is not UTF-8") from None
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or str(e)
        raise UsageError(label, f"cannot be read: {why}", "a study is a .yaml file") from None
    said = read_yaml(text, label)
    if not isinstance(said.value, dict):
        raise refused(label, said.line, f"found {said.shown}, expected a study: the keys {', '.join(_KEYS)}")
    check_keys(label, said, _KEYS, "of a study")
    reader = _Reader(label, tiny, {**VERBS, **(more or {})})
    inputs = reader.inputs(said.value.get("inputs"))
    steps = reader.steps(said.value.get("steps"), said.line, inputs)
    used = frozenset(r.name for step in steps for r in step.references if r.name in inputs)
    title = reader.text(said.value.get("title"), "title") or path.stem
    about = reader.text(said.value.get("about"), "about")
    return Study(label, path.parent, title, about, inputs, steps, tiny, used)


class _Reader:
    """Turns what the file says into a study; `label` begins each message."""

    def __init__(self, label: str, tiny: bool, verbs: Mapping[str, Verb]) -> None:
        self.label = label
        self.tiny = tiny
        self.verbs = verbs

    def text(self, said: Said | None, key: str) -> str:
        if said is None or said.value is None:
            return ""
        if not isinstance(said.value, str):
            raise refused(self.label, said.line, f"{key}: found {said.shown}, expected a text")
        return said.value.strip()

    # -------------------------------------------------------------------------------------------- inputs

    def inputs(self, said: Said | None) -> dict[str, Input]:
        if said is None or said.value is None:
            return {}
        if not isinstance(said.value, dict):
            raise refused(self.label, said.line, f"inputs: found {said.shown}, expected names, each with its path")
        return {name: self._input(name, entry, said.lines[name]) for name, entry in said.value.items()}

    def _input(self, name: str, said: Said, line: int) -> Input:
        self._check_name(name, line, "an input")
        if isinstance(said.value, str):
            return Input(name, line, said.value, None, None)
        if not isinstance(said.value, dict):
            what = f"input {name!r}: found {said.shown}, expected a path, or the keys {', '.join(_INPUT_KEYS)}"
            raise refused(self.label, said.line, what)
        check_keys(self.label, said, _INPUT_KEYS, f"of the input {name!r}")
        path, how, tiny = (self.text(said.value.get(key), key) or None for key in _INPUT_KEYS)
        if path is None and tiny is None:
            raise refused(self.label, line, f"input {name!r} says neither path nor tiny")
        if tiny is not None:
            from weightops.diffusion.study_inputs import read_tiny

            read_tiny(tiny, self.label, said.value["tiny"].line)
        return Input(name, line, path, tiny, how)

    def _check_name(self, name: str, line: int, of: str) -> None:
        if not _NAME.fullmatch(name):
            what = f"found {quote(name)} as the name of {of}, expected a letter, then letters, digits, - and _"
            raise refused(self.label, line, what)
        if name.lower() == _RESERVED:
            raise refused(self.label, line, f"{name!r} cannot be the name of {of}: the inputs' folder has it")

    # -------------------------------------------------------------------------------------------- steps

    def steps(self, said: Said | None, line: int, inputs: Mapping[str, Input]) -> tuple[Step, ...]:
        if said is None or not said.value:
            raise refused(self.label, said.line if said else line, "steps: found none, expected at least one")
        if not isinstance(said.value, dict):
            raise refused(self.label, said.line, f"steps: found {said.shown}, expected names, each with its verb")
        found: dict[str, Step] = {}
        folded = {name.lower(): name for name in inputs}
        for name, entry in said.value.items():
            line = said.lines[name]
            self._check_name(name, line, "a step")
            if name.lower() in folded:
                other = folded[name.lower()]
                kind = "an input" if other in inputs else "a step"
                raise refused(self.label, line, f"step {name!r}: {kind} has the name {other!r}")
            folded[name.lower()] = name
            found[name] = self._step(name, entry, line, inputs, found, set(said.value))
        return tuple(found.values())

    def _step(
        self, name: str, said: Said, line: int, inputs: Mapping[str, Input], before: Mapping[str, Step], all_: set[str]
    ) -> Step:  # fmt: skip
        if not isinstance(said.value, dict):
            raise refused(self.label, said.line, f"step {name!r}: found {said.shown}, expected a verb with its words")
        verbs = [key for key in said.value if key not in _ABOUT_A_STEP]
        if len(verbs) != 1:
            what = "no verb" if not verbs else f"the verbs {', '.join(map(quote, verbs[:5]))}"
            raise refused(self.label, line, f"step {name!r}: found {what}, expected one", nearest("", list(self.verbs)))
        verb = self.verbs.get(verbs[0])
        if verb is None:
            at = said.lines[verbs[0]]
            raise refused(self.label, at, f"unknown verb {quote(verbs[0])}", nearest(verbs[0], list(self.verbs)))
        said_words, lines = self._words(said.value[verbs[0]], verb)
        own, tiny_lines = self._words(said.value.get("tiny"), verb)
        if self.tiny:
            said_words, lines = said_words | own, lines | tiny_lines
        named = _Named(self.label, self.tiny, name, inputs, before, all_)
        words = self._values(said_words, lines, verb, named)
        self._check_together(words, lines, verb, named, line)
        title, text = (self.text(said.value.get(key), key) for key in ("title", "text"))
        return Step(name, line, verb, words, lines, title or name.replace("_", " ").replace("-", " "), text)

    def _values(
        self, said: Mapping[str, Said], lines: Mapping[str, int], verb: Verb, named: _Named
    ) -> dict[str, Any]:  # fmt: skip
        """What each word is, of a kind that its parameter takes; null is a word that is not said."""
        words, parameters = {}, words_of(verb)
        for word, value in said.items():
            if value.value is None:
                continue
            words[word] = wrapped(named.plain(value), parameters[word])
            wrong = misfit(words[word], parameters[word])
            if wrong is not None:
                raise refused(self.label, lines[word], f"{word}: found {value.shown}, expected {wrong}")
            self._check_files(words[word], parameters[word], lines[word])
        return words

    def _check_together(
        self, words: Mapping[str, Any], lines: Mapping[str, int], verb: Verb, named: _Named, line: int
    ) -> None:  # fmt: skip
        """Refuse what is missing, and what the verb itself can say is wrong."""
        for word, parameter in words_of(verb).items():
            if parameter.required and not words.get(word):
                raise refused(self.label, line, f"step {named.step!r} says no {word}, which {verb.name} needs")
        for other in words.get("leave_out", []) if verb.name == "page" else []:
            if other not in named.before:
                what = f"leave_out: there is no step {quote(other)} above"
                raise refused(self.label, lines["leave_out"], what, nearest(other, list(named.before)))
        if verb.check is not None:
            try:
                verb.check(verb, words)
            except WeightopsError as e:
                raise refused(self.label, line, f"step {named.step!r}: {e}", e.hint) from None

    def _check_files(self, value: Any, parameter: Parameter, line: int) -> None:
        """Files stand under inputs: what else is named would not be seen to change."""
        for part in value if isinstance(value, list) else [value]:
            if not (isinstance(part, str) and is_path(parameter)) or part.startswith("hf://"):
                continue
            with contextlib.suppress(OSError, ValueError):
                if any((at / part).exists() for at in (Path(self.label).parent, Path())):
                    what = f"{parameter.name}: found {quote(part)}, which is a file here"
                    hint = "name it under inputs, and say $name: then it counts by its content"
                    raise refused(self.label, line, what, hint)

    def _words(self, said: Said | None, verb: Verb) -> tuple[dict[str, Said], dict[str, int]]:
        """A verb's words under their names in the library, and their lines."""
        if said is None or said.value is None:
            return {}, {}
        if not isinstance(said.value, dict):
            raise refused(self.label, said.line, f"{verb.name}: found {said.shown}, expected words with their values")
        known = words_of(verb)
        found: dict[str, Said] = {}
        for key, value in said.value.items():
            word, line = key.replace("-", "_"), said.lines[key]
            if word in verb.own:
                raise refused(self.label, line, f"{verb.name}: the study itself says {quote(key)}", verb.own[word])
            if word not in known:
                raise refused(self.label, line, f"unknown word {quote(key)} of {verb.name}", nearest(word, list(known)))
            if word in found:
                raise refused(self.label, line, f"{verb.name}: the word {word!r} stands twice")
            found[word] = value
        return found, {key.replace("-", "_"): line for key, line in said.lines.items()}


@dataclass(frozen=True, slots=True)
class _Named:
    """Reads values in which names may stand: of the inputs, and of the steps before this one."""

    label: str
    tiny: bool
    step: str
    inputs: Mapping[str, Input]
    before: Mapping[str, Step]
    all_: set[str]

    def plain(self, said: Said) -> Any:
        value = said.value
        if isinstance(value, dict):
            return {key: self.plain(part) for key, part in value.items()}
        if isinstance(value, tuple):
            return [self.plain(part) for part in value]
        if isinstance(value, str) and value.startswith("$"):
            return value[1:] if value.startswith("$$") else self._reference(value, said.line)
        return value

    def _reference(self, text: str, line: int) -> Reference:
        found = _REFERENCE.fullmatch(text)
        if found is None:
            what = f"found {quote(text)}, expected $name, $name.thing or $name.thing.one"
            raise refused(self.label, line, what, "a text that begins with $ is written with two: $$")
        strength = None if found["strength"] is None else float(found["strength"])
        made = Reference(found["name"], found["field"], found["key"], strength, line)
        if made.name in self.inputs:
            self._check_input(made, self.inputs[made.name])
        elif made.name in self.before:
            self._check_step(made, self.before[made.name].verb)
        else:
            raise refused(self.label, line, *self._unknown(made.name))
        return made

    def _unknown(self, name: str) -> tuple[str, str | None]:
        if name == self.step:
            return f"${name} refers to the step in which it stands", None
        if name in self.all_:
            return f"${name} stands further below", "a step may refer to those above it: move it up"
        known = [*self.inputs, *self.before]
        return f"unknown name ${name}", nearest(name, known) if known else "there is none above"

    def _check_input(self, made: Reference, entry: Input) -> None:
        if made.field is not None or made.key is not None:
            raise refused(self.label, made.line, f"{made}: an input is one thing", f"say ${made.name}")
        if self.tiny and entry.tiny is None:
            what = f"${made.name}: the input, in line {entry.line}, does not say what it is with --tiny"
            raise refused(self.label, made.line, what, "add to it, for example, tiny: sd15 seed 1")
        if not self.tiny and entry.path is None:
            what = f"${made.name}: the input, in line {entry.line}, is there with --tiny only: it has no path"
            raise refused(self.label, made.line, what)

    def _check_step(self, made: Reference, verb: Verb) -> None:
        if made.field is not None and made.field not in verb.fields:
            what = f"{made}: {verb.name} makes no {made.field!r}"
            names = [f"${made.name}", *(f"${made.name}.{name}" for name in verb.fields)]
            raise refused(self.label, made.line, what, nearest(f"${made.name}.{made.field}", names))
        if made.key is not None and made.field not in verb.several:
            raise refused(self.label, made.line, f"{made}: it is one thing", f"say ${made.name}.{made.field}")
