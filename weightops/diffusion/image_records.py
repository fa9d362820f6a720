"""What is recorded of an image: its row in images.json, and the recipe that it carries. No paths, no dates, no seconds.

The same words on the same files make the same record, byte for byte.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion.axes import lora_name
from weightops.files.checkpoint import open_checkpoint
from weightops.files.source import LocalFile
from weightops.lineage import as_recorded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from weightops.diffusion.axes import Lora, Shot
    from weightops.diffusion.models import Loaded
    from weightops.diffusion.sampling import Sampling

_HASH = re.compile(r"xxh3_128:[0-9a-f]{32}")
_CHUNK = 4 << 20


@dataclass(frozen=True, slots=True)
class Digest:
    """Of a file. short: how other programs name a LoRA: twelve digits of the SHA-256 of its tensors' bytes, or ""."""

    hash: str
    short: str = ""


def digest_of(label: str) -> Digest | None:
    """The digest of the weights in a file or a folder on this machine; None of what is not."""
    import xxhash

    total, tensors = xxhash.xxh3_128(), hashlib.sha256()
    with open_checkpoint(label) as opened:
        files = [file for file in opened.files if isinstance(file, LocalFile)]
        if len(files) != len(opened.files):
            return None
        paths = sorted(file.path for file in files)
        single = len(paths) == 1 and opened.container == "safetensors"
    for path in paths:
        with path.open("rb") as file:
            if single:
                head = file.read(8)
                head += file.read(int.from_bytes(head, "little"))
                total.update(head)
            while data := file.read(_CHUNK):
                total.update(data)
                if single:
                    tensors.update(data)
    return Digest(f"xxh3_128:{total.hexdigest()}", tensors.hexdigest()[:12] if single else "")


def versions_of(*names: str) -> dict[str, str]:
    """Of the packages upon which the values of an image depend."""
    from importlib import metadata

    return {"weightops": __version__, **{name: metadata.version(name) for name in names}}


def row_of(shot: Shot, sampling: Sampling, loaded: Loaded, *, model: str, size: Sequence[int]) -> dict[str, Any]:
    """What an image was made of."""
    prompt = shot.prompt
    row: dict[str, Any] = {"prompt": prompt.prompt}
    for name, text in (
        ("prompt_2", prompt.prompt_2), ("negative", prompt.negative), ("negative_2", prompt.negative_2)
    ):  # fmt: skip
        row |= {} if text is None else {name: text}
    row |= {"seed": shot.seed, "steps": sampling.steps(prompt), "guidance": sampling.guidance(prompt)}
    if sampling.true_scale() is not None:
        row["true_guidance"] = sampling.true_scale()
    row |= {
        "size": list(size),
        "scheduler": {"name": sampling.scheduler, "class": type(loaded.pipe.scheduler).__name__},
        "model": model,
        "loras": [
            {"name": lora_name(file), "strength": strength, "way": worn.way}
            for (file, strength), worn in zip(shot.loras, loaded.loras, strict=True)
        ],
        "device": loaded.device.type,
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }  # fmt: skip
    return row


def recipe_of(
    row: Mapping[str, Any], hashes: Iterable[tuple[str, str | None]], versions: Mapping[str, str], **more: Any
) -> dict[str, Any]:
    """What the image itself says, as `weightops.lineage` reads it. hashes: of each file that was read."""
    return {"command": "generate", "version": __version__, "inputs": inputs_of(hashes), **row, **more} | {
        "versions": dict(versions)
    }


def inputs_of(hashes: Iterable[tuple[str, str | None]]) -> list[dict[str, str]]:
    """Bare names, each once, and hashes, of files whose hashes are known; (path, hash) of each is given."""
    found: dict[str, str] = {}
    for path, hashed in hashes:
        name = path.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
        bare = as_recorded(name if found.get(name, hashed) == hashed else lora_name(path)).replace("\0", "")[:255]
        if bare not in ("", ".", "..") and hashed is not None and _HASH.fullmatch(hashed):
            found[bare] = hashed
    return [{"name": name, "hash": hashed} for name, hashed in found.items()]


def loras_said(loras: Iterable[Lora], digests: Mapping[str, Digest | None]) -> list[tuple[str, float, str]]:
    """Name, strength and short hash of each, as other programs are told."""
    found = []
    for file, strength in loras:
        digest = digests.get(file)
        found.append((lora_name(file), strength, "" if digest is None else digest.short))
    return found


def note_of(over: str | None, rows: Sequence[Mapping[str, Any]], loras: Sequence[Lora]) -> str:
    """What all images of a grid have in common, in one line. loras: that were asked for."""

    def same(name: str) -> Any:
        found = [row.get(name) for row in rows]
        return found[0] if all(value == found[0] for value in found) else None

    count = "{} step" if same("steps") == 1 else "{} steps"
    steps = count.replace("step", "sampling step") if over == "step" else count
    said = [] if same("model") is None else [str(same("model"))]
    if over in ("strength", "step"):
        said += [" + ".join(lora_name(file) for file, _ in loras)]
    elif same("loras"):
        worn = [(lora["name"], lora["strength"]) for lora in same("loras")]
        said += [" + ".join(name if strength == 1 else f"{name}:{strength:g}" for name, strength in worn)]
    for name, form in (("seed", "seed {}"), ("steps", steps), ("guidance", "guidance {:g}")):
        said += [] if same(name) is None else [form.format(same(name))]
    found = same("scheduler")
    if found is not None and found["name"] is not None:
        said.append(str(found["name"]))
    if same("negative"):
        said.append(f"negative: {same('negative')}")
    return " · ".join(said)
