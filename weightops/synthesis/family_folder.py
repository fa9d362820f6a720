"""The folder of a family: what decides it, what is done, and its pictures and tables. Knows no model."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion.pictures import open_picture
from weightops.diffusion.tables import write_whole
from weightops.errors import FormatError, OutputError, UsageError, listing, printable
from weightops.synthesis.family_base import Learnt, Progress
from weightops.synthesis.family_pictures import CAPTION, NAMES, draw, generator, identities

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

STATE = "family.json"  # the words that it was made with, and what is done
BASE, LORAS, OTHER_GAUGE, EMBEDDER = "base", "loras", "loras-random-gauge", "embedder.safetensors"
IMAGES, HELD_OUT, CONDITIONS = "images", "held-out", "conditions.csv"
_OWN = (BASE, LORAS, OTHER_GAUGE, EMBEDDER, IMAGES, HELD_OUT, CONDITIONS, STATE)

# Streams of chance, as in family_base: who they are, and the pictures of each.
_WHO, _STREAMS = 32, {IMAGES: 33, HELD_OUT: 34}


@dataclass(frozen=True, slots=True)
class Words:
    """What decides the bytes of a family; whether it is in another gauge, too, decides nothing of the rest."""

    count: int
    seed: int
    rank: int
    images: int
    held_out: int
    steps: int
    base_steps: int


@dataclass(slots=True)
class Family:
    """A family in its folder: what the base has learnt, how well the embedder reads, and of each LoRA that is there
    the held-out loss without and with it."""

    folder: Path
    words: Words
    learnt: Learnt | None = None
    embedder: dict[str, float] = field(default_factory=dict)
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        digits = max(3, len(str(self.words.count - 1)))
        return [f"creature-{number:0{digits}d}" for number in range(self.words.count)]

    def file(self, name: str, folder: str = LORAS) -> Path:
        """Of the LoRA of this name."""
        return self.folder / folder / f"{name}.safetensors"

    def is_whole(self, *, random_gauge: bool) -> bool:
        folders = (LORAS, OTHER_GAUGE) if random_gauge else (LORAS,)
        return len(self.losses) == self.words.count and all(
            self.file(name, folder).is_file() for name in self.names for folder in folders
        )

    def save(self) -> None:
        said = {
            "version": __version__, "words": asdict(self.words), "caption": CAPTION, "numbers": list(NAMES),
            "learnt": asdict(self.learnt) if self.learnt else None, "embedder": self.embedder, "losses": self.losses,
        }  # fmt: skip
        write_whole(self.folder / STATE, (json.dumps(said, indent=1) + "\n").encode())


# ------------------------------------------------------------------------------------------------ begun, gone on with


def begin(folder: Path, words: Words, *, random_gauge: bool, force: bool) -> Family:
    """A new folder, or what an interrupted run with the same words left; force: anew where a family stands.

    Raises UsageError for one of other words, OutputError for a whole one and for a folder of something else.
    """
    label = str(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(label, "exists, and is no folder", "name a folder that is not there yet")
    if (folder / STATE).is_file() and not force:
        found = _read(folder, words)
        if found.is_whole(random_gauge=random_gauge):
            raise OutputError(label, "holds this family already, whole", "--force makes it anew")
        return found
    if (folder / STATE).is_file():
        _remove(folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise OutputError(label, "is a folder of something else", "name a folder that is not there yet")
    make_folder(folder)
    made = Family(folder, words)
    made.save()
    return made


def make_folder(folder: Path) -> None:
    """Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(str(folder), f"cannot be made: {e.strerror or e}") from None


def _remove(folder: Path) -> None:
    """What a family is made of, and nothing that stands beside it."""
    for name in _OWN:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _read(folder: Path, words: Words) -> Family:
    label = str(folder / STATE)
    try:
        said = json.loads((folder / STATE).read_text(encoding="utf-8"))
        made_with, of = dict(said["words"]), str(said["version"])
        learnt = Learnt(**said["learnt"]) if said["learnt"] else None
        losses = {str(name): (float(base), float(own)) for name, (base, own) in said["losses"].items()}
        embedder = {str(name): float(value) for name, value in said["embedder"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FormatError(label, "cannot be read as the state of a family", "--force makes it anew") from None
    hint = "the same words go on with it; --force makes it anew"
    differ = [name.replace("_", "-") for name, value in asdict(words).items() if made_with.get(name) != value]
    if differ:
        raise UsageError(str(folder), f"holds a family that was made with other words: {listing(differ)}", hint)
    if of != __version__:
        what = f"holds a part of a family that version {printable(of)} made, and this is {__version__}"
        raise UsageError(str(folder), what, "--force makes it anew")
    return Family(folder, words, learnt, embedder, losses)


# ------------------------------------------------------------------------------------------------ pictures, tables


def who_they_are(words: Words) -> np.ndarray:
    """The numbers of each creature [count, 7]."""
    return identities(words.count, generator(words.seed, _WHO))


def write_conditions(family: Family) -> None:
    rows = zip(family.names, who_they_are(family.words).tolist(), strict=True)
    _write_table(family.folder / CONDITIONS, [("name", *NAMES), *((name, *map(repr, who)) for name, who in rows)])


def pictures(family: Family, kind: str, who: Sequence[int]) -> np.ndarray:
    """The pictures of these creatures as they are in the folder, uint8 [L, n, side, side, 3]. Raises FormatError."""
    import numpy as np

    each = family.words.images if kind == IMAGES else family.words.held_out
    folders = [family.folder / kind / family.names[number] for number in who]
    return np.stack([[np.asarray(open_picture(folder / _picture(n))) for n in range(each)] for folder in folders])


def write_pictures(family: Family, kind: str, on_progress: Progress) -> None:
    """A folder for each creature, which is there whole or not at all, with captions beside the pictures."""
    import numpy as np
    from PIL import Image

    root, words = family.folder / kind, family.words
    each = words.images if kind == IMAGES else words.held_out
    make_folder(root)
    for number, (name, who) in enumerate(zip(family.names, who_they_are(words), strict=True)):
        if not (root / name).is_dir():
            part = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
            try:
                rows = [("file_name", "caption")]
                drawn = draw(np.repeat(who[None], each, 0), generator(words.seed, _STREAMS[kind], number))
                for index, picture in enumerate(drawn):
                    rows.append((_picture(index), CAPTION))
                    Image.fromarray(picture).save(part / _picture(index))
                _write_table(part / "metadata.csv", rows)
                part.chmod(0o755)
                part.replace(root / name)
            except OSError as e:
                raise OutputError(str(root / name), f"cannot be written: {e.strerror or e}") from None
            finally:
                shutil.rmtree(part, ignore_errors=True)
        on_progress(number + 1, words.count, f"drawing {kind}")


def _picture(index: int) -> str:
    return f"{index:03d}.png"


def _write_table(path: Path, rows: Sequence[tuple[Any, ...]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_whole(path, text.getvalue().encode())
