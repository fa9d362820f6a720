"""Tensors by key, in memory or in the files of a cache, and the hashes that such keys are made of."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from weightops.errors import FormatError, OutputError, WeightopsError
from weightops.files.folder import replace_small
from weightops.files.header import encode_header, layout, read_header
from weightops.files.source import LocalFile, read
from weightops.files.tensor import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    Tensors = dict[str, Tensor]

_DIGEST = "xxh3_128"  # in the metadata of a file: of its tensors' bytes
# What a configuration says beside what its network does.
_OF_NO_EFFECT = frozenset({"architectures", "dtype", "torch_dtype", "transformers_version"})


class Store:
    """Tensors by key: in memory, or in a safetensors file each, with the hash of its bytes."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._held: dict[str, Tensors] = {}
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise OutputError(str(folder), f"the cache cannot be made: {e.strerror or e}") from None

    def has(self, key: str) -> bool:
        """Is it there, and whole?"""
        if self.folder is None:
            return key in self._held
        try:
            self.get(key)
        except WeightopsError:
            return False
        return True

    def get(self, key: str) -> Tensors:
        """Raises FormatError for a damaged file, UsageError for one that is not there."""
        return self._held[key] if self.folder is None else _read(self.folder / f"{key}.safetensors")

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Raises OutputError."""
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if self.folder is None:
            self._held[key] = kept
        else:
            replace_small(self.folder / f"{key}.safetensors", _file_of(kept))


def _file_of(tensors: Tensors) -> bytes:
    import xxhash

    from weightops.engine.tensors import TORCH_DTYPES

    codes = {dtype: code for code, dtype in TORCH_DTYPES.items()}
    specs = {name: TensorSpec(codes[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    data = b"".join(bytes(_bytes_of(tensors[name])) for name in layout(specs))
    return encode_header(specs, {_DIGEST: xxhash.xxh3_128_hexdigest(data)}) + data


def _read(path: Path) -> Tensors:
    import xxhash

    from weightops.engine.tensors import as_tensor

    source = LocalFile(path)
    try:
        header = read_header(source)
        data = bytearray(read(source, header.data_start, source.size - header.data_start))
    finally:
        source.close()
    if header.metadata.get(_DIGEST) != xxhash.xxh3_128_hexdigest(data):
        raise FormatError(str(path), "holds other bytes than were written", "remove it, and it is made anew")
    view, begin = memoryview(data), header.data_start
    return {name: as_tensor(view[i.start - begin : i.stop - begin], i.spec) for name, i in header.tensors.items()}


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def hash_of_text(text: str) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(text.encode())


def hash_of_network(network: Any) -> str:
    """Of a network's weights, dtypes and configuration, and of the strengths of what is worn beside them."""
    import xxhash

    said = network.config if isinstance(network.config, dict) else network.config.to_dict()
    kept = {key: said[key] for key in sorted(said) if not key.startswith("_") and key not in _OF_NO_EFFECT}
    hashed = xxhash.xxh3_128(json.dumps(kept, default=str).encode())
    for name, tensor in sorted(network.state_dict().items()):
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hashed.update(_bytes_of(tensor))
    for name, module in network.named_modules():
        if isinstance(scaling := getattr(module, "scaling", None), dict):
            hashed.update(f"{name} {sorted(scaling.items())} {module.active_adapters}".encode())
    return hashed.hexdigest()
