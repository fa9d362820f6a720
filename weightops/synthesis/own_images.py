"""The images of many LoRAs, each its own, as a frozen model takes them: read and encoded. Knows no factors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.diffusion.dataset import Framing, read_examples
from weightops.diffusion.encoding import check_framing, encode, encoding_of
from weightops.diffusion.objectives import objective_of
from weightops.diffusion.training_words import RESOLUTIONS
from weightops.engine.run import ignore
from weightops.errors import UsageError, listing, printable, quote

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    from weightops.diffusion.dataset import Example, Examples
    from weightops.diffusion.encoding import Encoded, Encoding
    from weightops.diffusion.models import Loaded
    from weightops.diffusion.objectives import Objective
    from weightops.engine.run import Progress


@dataclass(frozen=True, slots=True)
class Listed:
    """Examples by the name of the LoRA that they are of, in its order."""

    examples: Mapping[str, tuple[Example, ...]]
    warnings: tuple[str, ...] = ()

    def digest(self, names: Iterable[str]) -> str:
        """Of the bytes and captions of these LoRAs' images; not of where they are."""
        made = hashlib.sha256()
        for name in names:
            said = [(example.picture.digest, example.caption) for example in self.examples[name]]
            made.update(repr((name, said)).encode())
        return made.hexdigest()[:32]


def list_images(
    folder: str | os.PathLike[str], names: Sequence[str], *, option: str, prompt: str | None = None,
    limit: int | None = None,
) -> Listed:  # fmt: skip
    """The images in `folder`/NAME of each name, with their captions or the one prompt; the first `limit` of each.

    option: what begins an error's message. Raises UsageError where a name has no folder of images, or an image no
    caption; FormatError where none can be decoded.
    """
    root = Path(folder)
    absent = [name for name in names if not (root / name).is_dir()]
    if absent:
        what = f"{printable(str(root))} has no folder of images for {len(absent):,} of {len(names):,} LoRAs"
        raise UsageError(option, f"{what}: {listing(absent)}", "each LoRA's images lie in a folder of its name")
    examples: dict[str, tuple[Example, ...]] = {}
    warnings: list[str] = []
    for name in names:
        found = examples_of(root / name, where=str(root / name), prompt=prompt, limit=limit)
        examples[name] = found.examples
        warnings += found.warnings
    return Listed(examples, tuple(warnings))


def examples_of(
    folder: str | os.PathLike[str], *, where: str, prompt: str | None, limit: int | None = None
) -> Examples:
    """As read_examples: what it raises names --prompt, the one way here to give all of them the same words."""
    if prompt is not None and not prompt.strip():
        raise UsageError("--prompt", f"found {quote(prompt)}, expected words")
    try:
        return read_examples(folder, where=where, prompt=prompt, limit=limit)
    except UsageError as e:
        if prompt is None and (e.hint or "").startswith("weightops caption "):
            raise UsageError(e.where, e.what, f"--prompt TEXT says one for all; {e.hint}") from None
        raise


def own_resolution(loaded: Loaded, encoding: Encoding) -> tuple[int, int]:
    """Height and width that the network itself says that it is for; where it says none, the architecture's."""
    config: Any = getattr(loaded.pipe, encoding.denoiser).config
    size = config.get("sample_size")
    if encoding.denoiser != "unet" or not isinstance(size, int) or isinstance(size, bool):
        return (RESOLUTIONS[loaded.architecture],) * 2
    side = size * 2 ** (len(loaded.pipe.vae.config.block_out_channels) - 1)
    return side, side


class OwnImages:
    """Encoded images of LoRAs by name, and how the model is asked. warnings: of captions cut, of images enlarged."""

    def __init__(
        self, loaded: Loaded, listed: Listed, *, resolution: tuple[int, int] | None = None,
        prediction: str | None = None, keep_texts: bool = True, batch: int = 8, on_progress: Progress = ignore,
    ) -> None:  # fmt: skip
        """keep_texts: False where LoRAs change a text encoder. batch: images at once. Raises WeightopsError."""
        self.loaded = loaded
        self.encoding: Encoding = encoding_of(loaded, where=loaded.label)
        self.objective: Objective = objective_of(loaded, prediction)
        framing = Framing(resolution or own_resolution(loaded, self.encoding), center_crop=True)
        check_framing(loaded, self.encoding, framing)
        self.resolution = framing.resolution
        self.listed = listed
        self._places: dict[str, range] = {}
        examples: list[Example] = []
        for name, own in listed.examples.items():
            self._places[name] = range(len(examples), len(examples) + len(own))
            examples += own
        self.encoded: Encoded = encode(
            loaded, examples, framing, batch=batch, cache_texts=keep_texts, on_progress=on_progress
        )
        self.warnings = (*listed.warnings, *self.encoded.warnings)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._places)

    def places(self, name: str) -> range:
        """Where this LoRA's images stand among the encoded."""
        return self._places[name]

    def stream(self, name: str) -> int:
        """A number from this LoRA's images alone, so that what is drawn for it does not depend on its company."""
        return int(self.listed.digest([name])[:12], 16)

    def by_count(self, names: Sequence[str]) -> list[list[int]]:
        """The positions in `names` in groups of as many images each: a batch gives each LoRA as many samples."""
        groups: dict[int, list[int]] = {}
        for position, name in enumerate(names):
            groups.setdefault(len(self._places[name]), []).append(position)
        return list(groups.values())
