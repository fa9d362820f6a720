"""Checkpoint: one name -> tensors mapping over one file, shards, or a diffusers folder. Knows no architecture."""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from weightops.errors import FormatError, UsageError, WeightopsError, listing, quote
from weightops.files.coalesce import coalesce
from weightops.files.header import impostor, read_header
from weightops.files.source import ByteSource, LocalFile, read
from weightops.files.tensor import Slot, TensorInfo
from weightops.lineage import KEY as RECIPE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import TypeAlias

    from weightops.files.held import Held, HeldPath
    from weightops.files.hub import HubPath

    Place: TypeAlias = Path | HubPath | HeldPath
    Named: TypeAlias = str | os.PathLike[str] | Held  # what a verb may be given for a file

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
INDEX_SUFFIX = ".index.json"
_INDEX = re.compile(r"\.index(\.\w+)?\.json$")  # diffusers sets a variant's name in between: .index.fp16.json
_MAX_JSON_BYTES = 64 << 20


@dataclass(slots=True)
class Checkpoint:
    """Tensors by name, wherever their bytes are.

    `label` is what the user typed; `name` the file's own name, without folders; `container` one of
    safetensors, pickle, shards, diffusers, peft. `left_out`: what the files hold beside the tensors, with reasons.
    `components`: for a diffusers folder, its components, whose names begin the tensors' names. `place`: the folder
    that the file stands in, or that was opened.
    """

    label: str
    container: str
    files: list[ByteSource]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    components: tuple[str, ...] = ()
    place: Place | None = None

    @property
    def name(self) -> str:
        name = PurePosixPath(self.label.replace("\\", "/").rstrip("/")).name
        if name in ("", "..") and isinstance(self.place, Path):  # a folder that was called by where it is
            name = self.place.resolve().name
        return name or self.label

    @property
    def nbytes(self) -> int:
        """Size of the files, in bytes."""
        return sum(f.size for f in self.files)

    def slot(self, key: str) -> Slot:
        """All of the tensor `key`."""
        return Slot(key, self.tensors[key].spec)

    def read_bytes(self, slot: Slot, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with bytes `start` to `stop` of `slot`. Raises TruncatedError, FormatError."""
        info = self.tensors[slot.key]
        source = self.files[info.shard]
        done = 0
        for offset, nbytes in slot.pieces(start, stop):
            part = out[done : done + nbytes]
            if info.strides is None:
                source.read_into(info.start + offset, part)
            else:
                from weightops.files.strided import read_strided

                read_strided(source, info, offset, offset + nbytes, part)
            done += nbytes

    def will_need(self, spans: Iterable[tuple[Slot, int, int]]) -> None:
        """A hint that these bytes (start, stop) of these slots will be read soon."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        for slot, start, stop in spans:
            info = self.tensors[slot.key]
            for offset, nbytes in slot.pieces(start, stop):
                begin = info.start + offset
                wanted.setdefault(info.shard, []).append((begin, begin + nbytes))
        for shard, ranges in wanted.items():
            for begin, end in coalesce(ranges, gap=1 << 20):
                self.files[shard].will_need(begin, end - begin)

    @property
    def fetches_ahead(self) -> bool:
        """Are bytes that `will_need` announced on their way, so that reading them hardly waits?"""
        return all(isinstance(f, LocalFile) and hasattr(os, "posix_fadvise") for f in self.files)

    def json_beside(self, name: str) -> dict[str, Any] | None:
        """The JSON object in the file `name` beside the weights; None if there is none. Raises FormatError."""
        if self.place is None or not _is_file(self.place / name):
            return None
        return _read_json(self.place / name, f"{self.label} ({name})")

    def bytes_beside(self, name: str) -> bytes | None:
        """The bytes of a small file beside the weights; None if there is none. Raises FormatError."""
        if self.place is None or not _is_file(self.place / name):
            return None
        source = _open_source(self.place / name, f"{self.label} ({name})")
        try:
            if source.size > _MAX_JSON_BYTES:
                raise FormatError(source.label, f"holds {source.size:,} bytes, expected at most {_MAX_JSON_BYTES:,}")
            return read(source, 0, source.size)
        finally:
            source.close()

    def check_unchanged(self) -> None:
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(label: Named) -> Checkpoint:
    """Open what the user named: a file, an index of shards, a folder of shards, a diffusers folder or component.

    Any of them may lie on a hub: `hf://owner/name[@revision][/path]`, or be held in memory (`weightops.files.held`).
    Raises UsageError when there is no such thing, FormatError and UnsafeError when it is not what it should be,
    NetworkError when the hub cannot be read.
    """
    if not isinstance(label, str | os.PathLike):
        return label.open()
    label = os.fspath(label)
    if not label or "\0" in label:
        raise UsageError(quote(label), "no file has this name")
    if label.startswith("hf://"):
        from weightops.files.hub import locate

        return _open(locate(label), label)
    return _open(Path(label), label)


def _open(path: Place, label: str) -> Checkpoint:
    if _is_dir(path):
        return _open_folder(path, label)
    if _INDEX.search(path.name):
        return _open_shards(path, label)
    return _open_file(path, label)


def _is_dir(path: Place) -> bool:
    with contextlib.suppress(OSError):  # too long a name, a folder that may not be searched: opening it will tell
        return path.is_dir()
    return False


def _is_file(path: Place) -> bool:
    with contextlib.suppress(OSError):
        return path.is_file()
    return False


# ------------------------------------------------------------------------------------------------ one file


def _open_source(path: Place, label: str) -> ByteSource:
    return LocalFile(path, label) if isinstance(path, Path) else path.open(label)


def _open_file(path: Place, label: str) -> Checkpoint:
    source = _open_source(path, label)
    try:
        if path.suffix.lower() in PICKLE_SUFFIXES and not _looks_like_safetensors(source):
            start = read(source, 0, min(source.size, 512))
            other = impostor(start)
            if other and not other[0].startswith(("a zip archive", "a pickle")):
                raise FormatError(label, f"{other[0]}, expected a PyTorch file", other[1])
            from weightops.files.pickled import read_pickled

            pickled = read_pickled(source)
            return Checkpoint(
                label, "pickle", [source], pickled.tensors, pickled.metadata, pickled.left_out, place=path.parent
            )
        header = read_header(source)
        return Checkpoint(label, "safetensors", [source], header.tensors, header.metadata, place=path.parent)
    except BaseException:
        source.close()
        raise


def _looks_like_safetensors(source: ByteSource) -> bool:
    """Many a .bin or .ckpt on the hub was converted and kept its name."""
    if source.size < 10:
        return False
    start = read(source, 0, 9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= source.size - 8


# ------------------------------------------------------------------------------------------------ shards


def _open_shards(index: Place, label: str) -> Checkpoint:
    weights = _read_json(index, label)
    table = weights.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise FormatError(label, "has no 'weight_map', expected an index of shards: {tensor name: file name}")
    files: list[ByteSource] = []
    tensors: dict[str, TensorInfo] = {}
    left_out: list[tuple[str, str]] = []
    try:
        opened: dict[str, Checkpoint] = {}
        shard_of = {key: _shard_name(name, label) for key, name in table.items()}
        for shard in sorted(set(shard_of.values())):
            path = index.parent / shard
            if not _is_file(path):
                raise FormatError(label, f"the shard {quote(shard)} is missing", "fetch all shards beside the index")
            opened[shard] = _open_file(path, f"{label} ({shard})")
            files.extend(opened[shard].files)
        metadata: dict[str, str] = {}
        for number, (shard, checkpoint) in enumerate(opened.items()):
            metadata.update(checkpoint.metadata)
            left_out.extend(checkpoint.left_out)
            for key, info in checkpoint.tensors.items():
                what = f"tensor {quote(key)} stands in"
                if key in tensors:
                    first = list(opened)[tensors[key].shard]
                    raise FormatError(label, f"{what} two shards, {quote(first)} and {quote(shard)}")
                if shard_of.get(key) != shard:
                    said = quote(shard_of[key]) if key in shard_of else "nowhere"
                    raise FormatError(label, f"{what} {quote(shard)}, but the index says {said}")
                tensors[key] = info._replace(shard=number)
        missing = [key for key in table if key not in tensors]
        if missing:
            raise FormatError(label, f"the index names tensors that no shard holds: {listing(missing)}")
        return Checkpoint(label, "shards", files, tensors, metadata, left_out, place=index.parent)
    except BaseException:
        _close_all(files)
        raise


def _shard_name(name: object, label: str) -> str:
    """A shard's name as the index gives it. One that leaves the folder could make us read any file."""
    if not isinstance(name, str):
        raise FormatError(label, f"the index names {quote(name)} as a shard, expected a file name")
    plain = name.replace("\\", "/")
    parts = plain.split("/")
    if not plain or plain.startswith("/") or ".." in parts or ":" in parts[0] or "\0" in plain:
        raise FormatError(label, f"the shard {quote(name)} lies outside the index's folder, and is not read")
    return str(PurePosixPath(plain))  # ./a and a are one file


# ------------------------------------------------------------------------------------------------ folders


def _open_folder(folder: Place, label: str) -> Checkpoint:
    if _is_file(folder / "model_index.json"):
        return _open_diffusers(folder, label)
    return _open_component(folder, label)


_SHARD = re.compile(r"-\d{5}-of-\d{5}\b")

# Most exact first: a folder often holds half-precision and legacy copies of the same weights beside them.
_COMPONENT_FILES = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
    "model.fp16.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "adapter_model.bin",
    "pytorch_lora_weights.bin",
)


def _component_file(folder: Place, label: str) -> Place | None:
    """The weights in a component's folder; None if there are none. Raises UsageError if there are several."""
    for name in _COMPONENT_FILES:
        if _is_file(folder / name):
            return folder / name
    indexes: list[Place] = [p for p in folder.glob("*.safetensors.index*.json") if _INDEX.search(p.name)]
    singles: list[Place] = [*folder.glob("*.safetensors")]
    if len(indexes) == 1 or (not indexes and len(singles) == 1):
        return (indexes or singles)[0]
    if singles:
        found = listing(sorted(p.name for p in singles))
        if not indexes and all(_SHARD.search(p.name) for p in singles):
            raise UsageError(label, f"a folder of shards without their index: {found}", "fetch the index beside them")
        raise UsageError(label, f"a folder with several models: {found}", "name one of them")
    return None


def _open_component(folder: Place, label: str) -> Checkpoint:
    path = _component_file(folder, label)
    if path is None:
        adapted = [c for c in _ADAPTED if _is_file(folder / c / "adapter_model.safetensors")]
        if adapted:
            return _open_parts(folder, label, [(c, folder / c / "adapter_model.safetensors") for c in adapted], "peft")
        held = sorted(p.name for p in folder.glob("*"))
        raise UsageError(
            label,
            "a folder without weights, expected a diffusers folder, shards with their index, or one file",
            f"it holds {listing(held)}" if held else "it is empty",
        )
    opened = _open(path, str(path))
    opened.label = label
    for file in opened.files:
        file.label = f"{label} ({path.name})" if len(opened.files) == 1 else file.label
    return opened


def _open_diffusers(folder: Place, label: str) -> Checkpoint:
    """Every component with weights, each tensor named `component.name`."""
    index = _read_json(folder / "model_index.json", label)
    parts: list[tuple[str, Place]] = []
    left_out: list[tuple[str, str]] = []
    for component, kind in _components(index, label):
        where = f"{label} ({component})"
        path = _component_file(folder / component, where) if _is_dir(folder / component) else None
        if path is not None:
            parts.append((component, path))
        elif not kind.endswith(WEIGHTLESS):
            left_out.append((component, f"a {quote(kind)} without weights in its folder"))
    opened = _open_parts(folder, label, parts, "diffusers")
    opened.left_out[:0] = left_out
    if not opened.tensors:
        raise FormatError(label, "a diffusers folder without weights", "fetch the folders of its components too")
    return opened


def _open_parts(folder: Place, label: str, parts: list[tuple[str, Place]], container: str) -> Checkpoint:
    """Several components' weights as one, each tensor named `component.name`."""
    files: list[ByteSource] = []
    tensors: dict[str, TensorInfo] = {}
    left_out: list[tuple[str, str]] = []
    recipes: set[str | None] = set()
    try:
        for component, path in parts:
            where = f"{label} ({component})"
            try:
                opened = _open(path, str(path))
            except WeightopsError as e:
                raise type(e)(where, e.what, e.hint) from None
            left_out.extend((f"{component}.{key}", reason) for key, reason in opened.left_out)
            recipes.add(opened.metadata.get(RECIPE))
            for file in opened.files:
                file.label = where
            for key, info in opened.tensors.items():
                tensors[f"{component}.{key}"] = info._replace(shard=info.shard + len(files))
            files.extend(opened.files)
    except BaseException:
        _close_all(files)
        raise
    # Of several files, what they say of themselves is not true of the whole, unless they were written together.
    recipe = recipes.pop() if len(recipes) == 1 else None
    metadata = {} if recipe is None else {RECIPE: recipe}
    return Checkpoint(label, container, files, tensors, metadata, left_out, tuple(c for c, _ in parts), folder)


# Folders of components that may each hold a PEFT adapter.
_ADAPTED = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")

# How the names of classes end that have settings, but no weights.
WEIGHTLESS = ("Scheduler", "Tokenizer", "TokenizerFast", "FeatureExtractor", "Processor", "ProcessorFast")


def _components(index: Mapping[str, Any], label: str) -> Iterator[tuple[str, str]]:
    """Name and class of each component that the pipeline has."""
    for name, value in index.items():
        # {"unet": ["diffusers", "UNet2DConditionModel"], "feature_extractor": [null, null], "_class_name": …}
        if name.startswith("_") or not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            continue
        if not name.isidentifier():
            raise FormatError(label, f"model_index.json names a component {quote(name)}, expected a plain folder name")
        yield name, value[-1] if value else "component"


def _read_json(path: Place, label: str) -> dict[str, Any]:
    source = _open_source(path, label)
    try:
        if source.size > _MAX_JSON_BYTES:
            raise FormatError(label, f"{path.name} holds {source.size:,} bytes, expected at most {_MAX_JSON_BYTES:,}")
        found = json.loads(read(source, 0, source.size))
    except (ValueError, RecursionError) as e:
        reason = "too deeply nested" if isinstance(e, RecursionError) else str(e).split(":")[0].lower()
        raise FormatError(label, f"{path.name} is no JSON: {reason}") from None
    finally:
        source.close()
    if not isinstance(found, dict):
        raise FormatError(label, f"{path.name} holds a JSON {type(found).__name__}, expected an object")
    return found


def _close_all(files: list[ByteSource]) -> None:
    for file in files:
        file.close()
