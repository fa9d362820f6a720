"""Where a LoRA is in what was learnt of a space: a member by its name, or any LoRA file of the same modules."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weightops.diffusion.axes import stem_of
from weightops.errors import MismatchError, OutputError, UsageError, WeightopsError, quote
from weightops.synthesis.members import read_factors
from weightops.synthesis.space import INDEX, canonical, open_space

if TYPE_CHECKING:
    from torch import Tensor

    from weightops.synthesis.fitted import Fitted


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A LoRA, its latents [m], and its own row [d] where that is at hand: of a file, or of a space that is open.

    position: among the trained members, None: it is none of them. hash: of its file's tensors.
    """

    name: str
    latents: Tensor
    row: Tensor | None
    position: int | None = None
    hash: str | None = None


def with_own_space(fitted: Fitted, space: str | os.PathLike[str] | None) -> Fitted:
    """A fitted model with its space open: the one that is named, or the folder in which its file lies, if it is that.

    Raises MismatchError where another is named.
    """
    if space is not None:
        return fitted.with_space(open_space(space))
    folder = Path(fitted.label).parent
    if fitted.space is not None or not (folder / INDEX).is_file():
        return fitted
    try:
        return fitted.with_space(open_space(folder))
    except WeightopsError:  # it happens to lie there
        return fitted


def keep_inputs(target: Path, *inputs: str | os.PathLike[str] | None) -> None:
    """Refuse to write to where one of the inputs lies. Raises OutputError."""
    for given in inputs:
        if given is not None and os.path.exists(given) and target.exists() and target.samefile(given):  # noqa: PTH110
            raise OutputError(str(target), "is an input, and inputs are never replaced", "-o names another file")


def place_of(words: str, fitted: Fitted) -> Placed:
    """A member that it was learnt from, another of its space that is open, or a LoRA file. Raises WeightopsError."""
    if words in fitted.trained_names:
        position = fitted.trained_names.index(words)
        row = None if fitted.space is None else fitted.space.rows([fitted.trained[position]])[0].double()
        return Placed(words, fitted.latents[position], row, position)
    if fitted.space is not None and words in fitted.space.names:
        row = fitted.space.rows([fitted.space.position(words)])
        return Placed(words, fitted.latents_of(row)[0], row[0].double())
    if not words.startswith("hf://") and not os.path.lexists(words):
        import difflib

        known = (*fitted.trained_names, *fitted.held_out_names)
        if words in fitted.held_out_names:
            hint = "it was held out: name its file, or its space with --space DIR"
            raise UsageError(words, f"is no LoRA that {fitted.label} was learnt from, and no file", hint)
        near = difflib.get_close_matches(words, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "name a member by its file's name without the suffix, or a file"
        raise UsageError(words, f"is no LoRA that {fitted.label} was learnt from, and no file", hint)
    try:
        factors, hashed = read_factors(words, fitted.layout)
    except MismatchError as e:  # whose hint is about collecting
        raise MismatchError(e.where, e.what, f"it must change what the LoRAs of {quote(fitted.label)} change") from None
    made = canonical(fitted.layout, fitted.form, fitted.reference, [(up[None], down[None]) for up, down in factors])
    return Placed(stem_of(words), fitted.latents_of(made.float())[0], made[0], None, hashed)
