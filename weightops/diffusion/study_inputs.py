"""What stands in the place of a study's inputs with --tiny: words of its file, read and made. Knows no steps.

tiny: sd15 seed 1                   a diffusers folder of this architecture: any of tiny.TINY
tiny: sd15 checkpoint seed 1        the same in one file, as checkpoints are shared: sd15, sd2, sdxl
tiny: vae seed 2                    a VAE alone; `vae sdxl seed 2` of another architecture
tiny: blip                          a model that captions
tiny: sprites 12 outlined           twelve pictures with captions, in one of sprites.STYLES
tiny: sprites 12 uncaptioned        the same without
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from weightops.diffusion.sprites import STYLES, sprites
from weightops.diffusion.tiny import TINY, VAES, tiny_blip, tiny_model, tiny_vae
from weightops.errors import UsageError, quote
from weightops.ops.convert import convert
from weightops.ops.yaml_lines import nearest, refused

if TYPE_CHECKING:
    from pathlib import Path

_IN_ONE_FILE = ("sd15", "sd2", "sdxl")
_MOST = 1000  # sprites


@dataclass(frozen=True, slots=True)
class Tiny:
    """kind: model, checkpoint, vae, blip or sprites."""

    kind: str
    architecture: str = "sd15"
    seed: int = 0
    count: int = 0
    style: str = "plain"
    captions: bool = True


def read_tiny(text: str, label: str, line: int) -> Tiny:
    """What these words ask for. Raises UsageError, which names the line."""
    words = text.split()
    kinds = (*TINY, "vae", "blip", "sprites")
    if not words or words[0] not in kinds:
        first = words[0][:40] if words else ""
        found = quote(first) if first else "nothing"
        raise refused(label, line, f"tiny: found {found}, expected a model or pictures", nearest(first, kinds))
    first, rest = words[0], words[1:]
    made = Tiny(first) if first in ("vae", "blip", "sprites") else Tiny("model", architecture=first)
    if made.kind == "sprites":
        count = rest.pop(0) if rest else ""
        if not (count.isdecimal() and count.isascii() and 1 <= int(count[:5]) <= _MOST):
            found = quote(count) if count else "nothing"
            raise refused(label, line, f"tiny: sprites: found {found}, expected how many, 1 to {_MOST:,}")
        made = replace(made, count=int(count))
    while rest:
        word = rest.pop(0)
        if word == "seed":
            made = replace(made, seed=_seed(rest.pop(0) if rest else "", label, line))
        elif made.kind == "model" and word == "checkpoint":
            if first not in _IN_ONE_FILE:
                what = f"tiny: there is no {first} in one file; known are {', '.join(_IN_ONE_FILE)}"
                raise refused(label, line, what)
            made = replace(made, kind="checkpoint")
        elif made.kind == "vae" and word in VAES:
            made = replace(made, architecture=word)
        elif made.kind == "sprites" and word in STYLES:
            made = replace(made, style=word)
        elif made.kind == "sprites" and word == "uncaptioned":
            made = replace(made, captions=False)
        else:
            raise refused(label, line, f"tiny: {first}: unknown word {quote(word)}", nearest(word, _known(made)))
    return made


def _seed(word: str, label: str, line: int) -> int:
    if not (word.isdecimal() and word.isascii() and len(word) < 10):
        raise refused(label, line, f"tiny: seed: found {quote(word) if word else 'nothing'}, expected a whole number")
    return int(word)


def _known(made: Tiny) -> tuple[str, ...]:
    of_kind = {
        "model": ("checkpoint",) if made.architecture in _IN_ONE_FILE else (),
        "checkpoint": ("checkpoint",),
        "vae": tuple(VAES),
        "sprites": (*STYLES, "uncaptioned"),
    }
    return ("seed", *of_kind.get(made.kind, ()))


def name_of(tiny: Tiny, name: str) -> str:
    """What the input is called on disk."""
    return f"{name}.safetensors" if tiny.kind == "checkpoint" else name


def make(tiny: Tiny, name: str, folder: Path) -> Path:
    """The input, in `folder`, which is there. Raises WeightopsError."""
    target = folder / name_of(tiny, name)
    if tiny.kind == "sprites":
        return sprites(target, count=tiny.count, seed=tiny.seed, style=tiny.style, captions=tiny.captions)
    if tiny.kind == "blip":
        return tiny_blip(target, seed=tiny.seed)
    if tiny.kind == "vae":
        return tiny_vae(target, architecture=tiny.architecture, seed=tiny.seed)
    if tiny.kind == "model":
        return tiny_model(tiny.architecture, target, seed=tiny.seed)
    parts = tiny_model(tiny.architecture, folder / f".{name}.parts", seed=tiny.seed)
    try:
        convert(parts, to="original", output=target, force=True)
    finally:
        shutil.rmtree(parts, ignore_errors=True)
    return target


def found(path: str, folder: Path, *, typed: bool) -> str:
    """An input of the user's, as the verbs are given it. typed: by hand, so that it begins where the user stands.

    Raises UsageError where it is not there.
    """
    if path.startswith("hf://"):
        return path
    whole = os.path.expanduser(path)  # noqa: PTH111 - what the user typed is kept as it is
    if not typed:
        whole = str(folder / whole)
    if not os.path.exists(whole):  # noqa: PTH110
        raise UsageError(path, "is not there")
    return whole
