"""What a study consists of, as values: inputs, steps with their words, and references from one to another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from weightops.diffusion.study_verbs import Verb


@dataclass(frozen=True, slots=True)
class Reference:
    """An input, or what an earlier step made. strength: of a LoRA, where one is said."""

    name: str
    field: str | None
    key: str | None
    strength: float | None
    line: int

    def __str__(self) -> str:
        said = f"${self.name}" + (f".{self.field}" if self.field else "") + (f".{self.key}" if self.key else "")
        return said if self.strength is None else f"{said}:{self.strength:g}"


@dataclass(frozen=True, slots=True)
class Input:
    """A file or folder of the user's, a model of the hub, or what `--tiny` makes in its place."""

    name: str
    line: int
    path: str | None
    tiny: str | None
    how: str | None


@dataclass(frozen=True, slots=True)
class Step:
    """words: plain values, with References among them. lines: where each stands."""

    name: str
    line: int
    verb: Verb
    words: Mapping[str, Any]
    lines: Mapping[str, int]
    title: str
    text: str

    @property
    def references(self) -> Iterator[Reference]:
        return references_in(self.words)


@dataclass(frozen=True, slots=True)
class Study:
    """label: what the user typed. folder: where its relative paths begin."""

    label: str
    folder: Path
    title: str
    about: str
    inputs: Mapping[str, Input]
    steps: tuple[Step, ...]
    tiny: bool
    used: frozenset[str] = field(default_factory=frozenset)  # names of the inputs that a step refers to


def references_in(value: Any) -> Iterator[Reference]:
    """All that stand in a value, however deep."""
    if isinstance(value, Reference):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from references_in(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from references_in(part)
