"""Tensors and JSON as one .safetensors file: it appears whole or not at all, and is refused whole if damaged."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from weightops.errors import FormatError, UsageError, ValueRefused, quote

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

KEY = "weightops.synthesis"
FORMAT = 1
_BAND = 16 << 20  # bytes that are written, or looked at, at a time


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], said: Mapping[str, Any], *, force: bool
) -> int:
    """A file of tensors in any order of their own, with JSON beside them; the bytes that it has. Raises OutputError."""
    import torch

    from weightops.engine.tensors import TORCH_DTYPES
    from weightops.files.tensor import Slot, TensorSpec
    from weightops.files.writer import SafetensorsWriter

    codes = {dtype: code for code, dtype in TORCH_DTYPES.items()}
    specs = {key: TensorSpec(codes[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()}
    metadata = {"format": "pt", KEY: json.dumps(said, separators=(",", ":"))}
    writer = SafetensorsWriter(os.fspath(path), specs, metadata, force=force)
    try:
        for key, tensor in tensors.items():
            flat = tensor.detach().reshape(-1)
            slot, width = Slot(key, specs[key]), tensor.element_size()
            for start in range(0, flat.numel(), _BAND // width):
                part = flat[start : start + _BAND // width].cpu().contiguous().view(torch.uint8).numpy()
                writer.write_bytes(slot, start * width, start * width + len(part), part.data)
        return writer.commit(metadata)
    finally:
        writer.close()


def read_tensors(label: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote. Raises UsageError, FormatError, ValueRefused for NaN or Inf."""
    import numpy as np

    from weightops.engine.tensors import TORCH_DTYPES, as_tensor
    from weightops.files.checkpoint import open_checkpoint

    with open_checkpoint(label) as opened:
        said = _said(opened.metadata, label)
        tensors = {}
        for key, info in opened.tensors.items():
            known = TORCH_DTYPES.get(info.spec.dtype)
            if known is None or (not known.is_floating_point and info.spec.dtype != "I64"):
                raise FormatError(label, f"tensor {quote(key)} holds {info.spec.dtype}, expected numbers")
            data = np.empty(info.spec.nbytes, dtype=np.uint8).data
            opened.read_bytes(opened.slot(key), 0, info.spec.nbytes, data)
            tensors[key] = as_tensor(data, info.spec)
            _check_finite(tensors[key], key, label)
    return tensors, said


def _said(metadata: Mapping[str, str], label: str) -> dict[str, Any]:
    if KEY not in metadata:
        hint = "weightops synth fit writes one"
        raise UsageError(label, "is no fitted model of a space of LoRAs", hint)
    try:
        said = json.loads(metadata[KEY])
    except (ValueError, RecursionError) as e:
        raise FormatError(label, f"its metadata {KEY} cannot be read: {quote(str(e))}") from None
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        found = said.get("format") if isinstance(said, dict) else None
        raise FormatError(label, f"is of the format {quote(found)}, expected {FORMAT}", "fit it again")
    return said


def _check_finite(tensor: Tensor, key: str, label: str) -> None:
    if tensor.is_floating_point():
        flat, step = tensor.reshape(-1), _BAND // tensor.element_size()
        if not all(bool(flat[start : start + step].isfinite().all()) for start in range(0, len(flat), step)):
            raise ValueRefused(label, f"tensor {quote(key)} holds NaN or Inf", "fit it again")
