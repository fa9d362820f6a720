"""Which images that are called held out were trained on after all: by what LoRAs say of their data, and by a folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.diffusion.dataset import read_examples
from weightops.diffusion.pictures import near_duplicates
from weightops.diffusion.training_folder import SETTINGS
from weightops.errors import listing, printable
from weightops.files.checkpoint import open_checkpoint
from weightops.lineage import recipe_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightops.diffusion.compared import Compared
    from weightops.diffusion.dataset import Examples
    from weightops.diffusion.pictures import Picture

_DEPTH = 3  # folders from a checkpoint's LoRA up to that of its run


def trained_on(examples: Examples, compared: Sequence[Compared], folder: str | None) -> list[str]:
    """Warnings, which name images that are not held out. folder: of images that were trained on, to compare with.

    What a LoRA's own recipe, or the settings of its run, say of its data is one hash of all of them: so it is seen
    whether they are the very images at hand, and not whether some of them are among these.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    hashes: dict[str | None, str] = {None: examples.data_hash}
    names = [example.picture.name for example in examples.examples]
    for one in compared:
        told = _settings(one.file)
        words = told.get("words")
        prompt = words.get("instance_prompt") if isinstance(words, dict) else None
        if isinstance(prompt, str) and prompt not in hashes:
            hashes[prompt] = read_examples(examples.folder, where=str(examples.folder), prompt=prompt).data_hash
        if told.get("data") == hashes.get(prompt if isinstance(prompt, str) else None):
            found.setdefault(tuple(names), []).append(one.label)
    warnings = [
        f"{', '.join(map(printable, labels))}: trained on these very images, which are not held out: {listing(which)}"
        for which, labels in found.items()
    ]
    if folder is not None:
        trained = read_examples(folder, where="--trained-on", prompt="any").examples
        warnings += _repeated([e.picture for e in examples.examples], [e.picture for e in trained])
    return warnings


def _settings(file: str) -> Mapping[str, Any]:
    """What a LoRA says of its training: its own recipe, or the settings beside the checkpoint that it is of."""
    with open_checkpoint(file) as opened:
        recipe = recipe_of(opened.metadata)
    if recipe is not None and "data" in recipe:
        return recipe
    for above in list(Path(file).parents)[:_DEPTH]:
        try:
            read = json.loads((above / SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(read, dict) and str(read.get("command")).startswith("train "):
            return read
    return {}


def _repeated(held: Sequence[Picture], trained: Sequence[Picture]) -> list[str]:
    """Which images are among those that were trained on, as they are or nearly."""
    digests = {picture.digest for picture in trained}
    same = [picture.name for picture in held if picture.digest in digests]
    # By their looks the first of several is named: those that were trained on stand first.
    marked = [replace(p, name=f"{n:09}") for n, p in enumerate((*trained, *held))]
    near = [
        held[int(other) - len(trained)].name
        for first, other, _ in near_duplicates(marked) if int(first) < len(trained) <= int(other)
    ]  # fmt: skip
    alike = sorted(set(near) - set(same))
    found = []
    if same:
        were = "was" if len(same) == 1 else "were"
        what = f"{len(same):,} of {len(held):,} images {were} trained on, and not held out"
        found.append(f"--trained-on: {what}: {listing(same)}")
    if alike:
        look = "looks" if len(alike) == 1 else "look"
        what = f"{len(alike):,} of {len(held):,} images {look} like one that was trained on"
        found.append(f"--trained-on: {what}: {listing(alike)}")
    return found
