"""Checkpoint: one name -> tensors mapping over one file, shards, or a diffusers folder. Knows no architecture."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from weightops.errors import FormatError, UsageError, WeightopsError, listing, quote
from weightops.files.coalesce import coalesce
from weightops.files.header import impostor, read_header
from weightops.files.source import ByteSource, LocalFile, read
from weightops.files.tensor import Slot, TensorInfo

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import TypeAlias

    from weightops.files.hub import HubPath

    Place: TypeAlias = Path | HubPath

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
INDEX_SUFFIX = ".index.json"
_MAX_JSON_BYTES = 64 << 20


@dataclass(slots=True)
class Checkpoint:
    """Tensors by name, wherever their bytes are.

    `label` is what the user typed; `name` the file's own name, without folders; `container` one of
    safetensors, pickle, shards, diffusers. `left_out`: what the files hold beside the tensors, with reasons.
    `components`: for a diffusers folder, its components, whose names begin the tensors' names.
    """

    label: str
    container: str
    files: list[ByteSource]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    components: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return PurePosixPath(self.label.replace("\\", "/").rstrip("/")).name or self.label

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
                from weightops.files.pickled import read_strided

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


def open_checkpoint(label: str | os.PathLike[str]) -> Checkpoint:
    """Open what the user named: a file, an index of shards, a folder of shards, a diffusers folder or component.

    Any of them may lie on a hub: `hf://owner/name[@revision][/path]`.
    Raises UsageError when there is no such thing, FormatError and UnsafeError when it is not what it should be,
    NetworkError when the hub cannot be read.
    """
    label = os.fspath(label)
    if not label or "\0" in label:
        raise UsageError(quote(label), "no file has this name")
    if label.startswith("hf://"):
        from weightops.files.hub import locate

        return _open(locate(label), label)
    return _open(Path(label), label)


def _open(path: Place, label: str) -> Checkpoint:
    if path.is_dir():
        return _open_folder(path, label)
    if path.name.endswith(INDEX_SUFFIX):
        return _open_shards(path, label)
    return _open_file(path, label)


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
            return Checkpoint(label, "pickle", [source], pickled.tensors, pickled.metadata, pickled.left_out)
        header = read_header(source)
        return Checkpoint(label, "safetensors", [source], header.tensors, header.metadata)
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
    try:
        headers = {}
        for shard in sorted({_shard_name(name, label) for name in table.values()}):
            path = index.parent / shard
            if not path.is_file():
                raise FormatError(label, f"the shard {quote(shard)} is missing", "fetch all shards beside the index")
            source = _open_source(path, f"{label} ({shard})")
            headers[shard] = read_header(source, shard=len(files))
            files.append(source)
        metadata: dict[str, str] = {}
        for shard, header in headers.items():
            metadata.update(header.metadata)
            for key, info in header.tensors.items():
                if key in tensors:
                    raise FormatError(label, f"tensor {quote(key)} stands in two shards, {shard!r} is one of them")
                if table.get(key) != shard:
                    where = quote(table[key]) if key in table else "nowhere"
                    raise FormatError(label, f"tensor {quote(key)} stands in {shard!r}, but the index says {where}")
                tensors[key] = info
        missing = [key for key in table if key not in tensors]
        if missing:
            raise FormatError(label, f"the index names tensors that no shard holds: {listing(missing)}")
        return Checkpoint(label, "shards", files, tensors, metadata)
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
    return plain


# ------------------------------------------------------------------------------------------------ folders


def _open_folder(folder: Place, label: str) -> Checkpoint:
    if (folder / "model_index.json").is_file():
        return _open_diffusers(folder, label)
    return _open_component(folder, label)


# Most exact first: a folder often holds half-precision and legacy copies of the same weights beside them.
_COMPONENT_FILES = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
    "adapter_model.bin",
    "pytorch_lora_weights.bin",
)


def _component_file(folder: Place) -> Place | None:
    for name in _COMPONENT_FILES:
        if (folder / name).is_file():
            return folder / name
    indexes: list[Place] = [*folder.glob("*.safetensors" + INDEX_SUFFIX)]
    if len(indexes) == 1:
        return indexes[0]
    singles: list[Place] = [*folder.glob("*.safetensors")]
    return singles[0] if len(singles) == 1 and not indexes else None


def _open_component(folder: Place, label: str) -> Checkpoint:
    path = _component_file(folder)
    if path is None:
        found = sorted(p.name for p in folder.glob("*.safetensors"))
        if found:
            raise UsageError(label, f"a folder with several models: {listing(found)}", "name one of them")
        raise UsageError(
            label,
            "a folder without weights, expected a diffusers folder, shards with their index, or one file",
            f"it holds {listing(sorted(p.name for p in folder.glob('*')))}",
        )
    opened = _open(path, str(path))
    opened.label = label
    for file in opened.files:
        file.label = f"{label} ({path.name})" if len(opened.files) == 1 else file.label
    return opened


def _open_diffusers(folder: Place, label: str) -> Checkpoint:
    """Every component with weights, each tensor named `component.name`."""
    index = _read_json(folder / "model_index.json", label)
    files: list[ByteSource] = []
    tensors: dict[str, TensorInfo] = {}
    components: list[str] = []
    try:
        for component in _components(index, label):
            path = _component_file(folder / component) if (folder / component).is_dir() else None
            if path is None:
                continue
            try:
                opened = _open(path, str(path))
            except WeightopsError as e:
                raise type(e)(f"{label} ({component})", e.what, e.hint) from None
            components.append(component)
            for file in opened.files:
                file.label = f"{label} ({component})"
            for key, info in opened.tensors.items():
                tensors[f"{component}.{key}"] = info._replace(shard=info.shard + len(files))
            files.extend(opened.files)
    except BaseException:
        _close_all(files)
        raise
    if not tensors:
        raise FormatError(label, "a diffusers folder without weights", "fetch the folders of its components too")
    return Checkpoint(label, "diffusers", files, tensors, {}, [], tuple(components))


def _components(index: Mapping[str, Any], label: str) -> Iterator[str]:
    for name, value in index.items():
        # {"unet": ["diffusers", "UNet2DConditionModel"], "feature_extractor": [null, null], "_class_name": …}
        if name.startswith("_") or not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            continue
        if not name.isidentifier():
            raise FormatError(label, f"model_index.json names a component {quote(name)}, expected a plain folder name")
        yield name


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
