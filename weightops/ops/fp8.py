"""fp8 weights with one scale each: which these are, and the tasks that dequantise them and quantise them anew.

Knows nothing of adapters: what is written is what `changes` makes of the dequantised weight.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightops.engine.chunks import BLOCK_VALUES
from weightops.errors import FormatError, MismatchError, UsageError, quote
from weightops.files.dtypes import DTYPE_WORDS
from weightops.merging.method import WORKING_VALUES, store
from weightops.merging.rounding import generator_for, store_stochastic
from weightops.naming.identify import quantised
from weightops.ops.changes import changed_bands, work_nbytes
from weightops.ops.survival import Survival, survival, together
from weightops.plan import Grain, Input, Task

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from weightops.files.checkpoint import Checkpoint
    from weightops.files.tensor import Slot
    from weightops.ops.changes import Change
    from weightops.plan import Block, Compute

# What a module calls the one number that its weight is multiplied by. Source: ComfyUI, up to 0.3 and since.
_SCALES = (".scale_weight", ".weight_scale")
# What says how the codes are to be used, and changes none of their values.
_MARKS = ("scaled_fp8", "scale_input", "input_scale", "comfy_quant")
# The largest finite value of a code.
_LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
_SCALE_DTYPES = ("F64", "F32", "F16", "BF16")
# ComfyUI's words for the codes, in a tensor beside the weight or in the file's metadata.
_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
METADATA = "_quantization_metadata"
_LONGEST = 1 << 16  # bytes of such words
_PLAIN = "fuse into the fp16, bf16 or fp32 release instead"

# What sums in float32 leave of values that may shrink so much at once, relative to what they were. A scale shrinks no
# further: below, it would be made of the errors of these sums.
_SHRINKS = 2.0**-5
_TOLERANCE = 2.0**-16


def scales_of(opened: Checkpoint) -> dict[str, str]:
    """Weight -> the key of its one scale. Raises MismatchError for codes of any other kind."""
    found: dict[str, str] = {}
    for key in opened.tensors:
        ending = next((e for e in _SCALES if key.endswith(e)), None)
        if ending is not None:
            weight = key.removesuffix(ending) + ".weight"
            _check_scale(opened, key, weight)
            if weight in found:
                raise _refused(opened, f"{quote(found[weight])} and {quote(key)} both scale {quote(weight)}")
            found[weight] = key
        elif quantised((key,)) is not None and not is_mark(key):
            raise _refused(opened, f"{quote(key)} scales weights that mean nothing without it")
    for module, words in _words(opened):
        spec = opened.tensors[f"{module}.weight"].spec if f"{module}.weight" in opened.tensors else None
        form = words.get("format") if isinstance(words, dict) else None
        if form not in _FORMATS or words.get("convrot") or (spec is not None and spec.dtype != _FORMATS[form]):
            held = "" if spec is None else f" of {spec.dtype}"
            raise _refused(opened, f"{quote(module)} holds codes{held} in the format {quote(json.dumps(words))}")
    return found


def is_mark(key: str) -> bool:
    """Does the key say how fp8 codes are to be used, and change none of their values?"""
    return key.rpartition(".")[2] in _MARKS


def check_dtype(opened: Checkpoint, dtype: str) -> None:
    """Scaled weights may stay what they are, or become what is wide enough to need no scale."""
    if dtype != "keep" and DTYPE_WORDS[dtype] in _LARGEST:
        what = f"{opened.label} holds fp8 weights with scales, and {dtype} without a scale would lose what is small"
        raise UsageError("--dtype", what, "--dtype keep writes new scales; fp16, bf16 and fp32 need none")


def _refused(opened: Checkpoint, what: str) -> MismatchError:
    return MismatchError(opened.label, f"is quantised: {what}", _PLAIN)


def _check_scale(opened: Checkpoint, key: str, weight: str) -> None:
    if weight not in opened.tensors:
        raise _refused(opened, f"{quote(key)} scales {quote(weight)}, which is not there")
    codes, spec = opened.tensors[weight].spec, opened.tensors[key].spec
    if codes.dtype not in _LARGEST:
        expected = " or ".join(_LARGEST)
        raise _refused(opened, f"{quote(key)} scales {quote(weight)}, which is {codes.dtype}, expected {expected}")
    if spec.values != 1:
        raise _refused(opened, f"{quote(key)} holds {spec.values:,} scales of {quote(weight)}, expected one")
    if spec.dtype not in _SCALE_DTYPES:
        raise _refused(opened, f"{quote(key)} is {spec.dtype}, expected one of {', '.join(_SCALE_DTYPES)}")


def _words(opened: Checkpoint) -> Iterator[tuple[str, Any]]:
    """Module -> what its quantiser says of it, in a tensor beside the weight or in the metadata."""
    for key, info in opened.tensors.items():
        if key.endswith(".comfy_quant"):
            data = bytearray(min(info.spec.nbytes, _LONGEST))
            opened.read_bytes(opened.slot(key), 0, len(data), memoryview(data))
            yield key.removesuffix(".comfy_quant"), _json(opened, key, bytes(data))
    if METADATA in opened.metadata:
        words = _json(opened, METADATA, opened.metadata[METADATA].encode())
        layers = words.get("layers") if isinstance(words, dict) else None
        yield from layers.items() if isinstance(layers, dict) else ()


def _json(opened: Checkpoint, key: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise FormatError(opened.label, f"{quote(key)} is no JSON: {quote(data[:40])}") from None


# ------------------------------------------------------------------------------------------------ tasks


@dataclass(frozen=True, slots=True)
class Band:
    """The rows of one module among those that have a scale in common, and what changes them; nothing, perhaps.

    parts: the inputs of the changes. whole: the rows depend on each other.
    """

    slot: Slot
    to: Slot
    parts: tuple[Input, ...] = ()
    changes: tuple[Change, ...] = ()
    whole: bool = False


def requantising(label: str, bands: Sequence[Band], scale: Slot, *, seed: int | None, other: str | None) -> Task:
    """The task that writes all bands of a key anew, and their scale; each output stands where its input does."""
    given = (*(Input(0, band.slot) for band in bands), Input(0, scale))
    inputs = (*given, *(part for band in bands for part in band.parts))
    outputs = (*(band.to for band in bands), scale)
    compute = _requantise(bands, scale.spec.dtype, name=label, seed=seed, other=other)
    # What it takes to change a stroke, and to round a piece of it.
    work = max(
        work_nbytes(band.changes, band.parts, band.slot.spec, band.to.spec, seed=None, whole=band.whole, scaled=True)
        for band in bands
    ) + (24 if seed is None else 80) * WORKING_VALUES  # fmt: skip
    return Task(label, inputs, outputs, compute, Grain.TENSOR, work_nbytes=work, tolerance=_TOLERANCE)


def dequantising(given: Slot, scale: Slot, to: Slot) -> Task:
    """Codes times their scale, in the dtype of the output."""
    if given.bands is None and to.bands is None:  # as one axis, so that work may be cut between any two values
        given, to = replace(given, spec=given.spec.flat()), replace(to, spec=to.spec.flat())
    work = 16 * min(given.spec.values, max(BLOCK_VALUES, given.spec.row_values))
    return Task(to.key, (Input(0, given), Input(0, scale, shared=True)), (to,), _dequantise, work_nbytes=work)


def _dequantise(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block) -> None:
    # Exact in float64, whatever the dtypes: one rounding.
    store(inputs[0].double() * inputs[1].double().reshape(()), outputs[0])


def _requantise(bands: Sequence[Band], dtype: str, *, name: str, seed: int | None, other: str | None) -> Compute:
    """The compute function: inputs are the codes of each band, their scale, and the parts of each change.

    The new scale is the least of its `dtype` with which no value is larger than the largest code; so the values are
    made twice, to find it and to be written, which costs less than to keep them all. seed and other: as in `fused`.
    Where no value changes, codes and scale stay.
    """
    count, largest_code = len(bands), _LARGEST[bands[0].slot.spec.dtype]

    def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block) -> Survival:
        import torch

        codes, old, parts = inputs[:count], inputs[count], inputs[count + 1 :]
        out, new = outputs[:count], outputs[count]
        wide = torch.float64 if out[0].dtype is torch.float64 else torch.float32
        was = old.to(wide).reshape(())

        def made() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            """W, W' and where its codes go, some rows at a time and flat."""
            position = 0
            for band, given, written in zip(bands, codes, out, strict=True):
                own = parts[position : position + len(band.parts)]
                position += len(own)
                found = changed_bands(band.changes, given, own, wide=wide, start=0, whole=band.whole, scale=was)
                for rows, weight, result in found:
                    yield weight.reshape(-1), result.reshape(-1), written[rows].reshape(-1)

        largest, norm, same = 0.0, 0.0, True
        for weight, result, _ in made():
            largest = max(largest, _largest(result), _largest(weight) * _SHRINKS)
            norm += float(weight @ weight)
            # As float32 has them, also where the reference is computed: what it tells apart, codes do not.
            same = same and torch.equal(weight.float(), result.float())
        if same:
            for written, given in zip(outputs, inputs, strict=False):
                written.copy_(given)
            return Survival(0.0, 0.0, 0.0, norm)
        new.copy_(_scale_for(largest / largest_code, dtype).reshape(new.shape) if largest else old)
        now = new.to(wide).reshape(())
        generator = None if seed is None else generator_for(seed, name, block.number, new.device)
        found = []
        for weight, result, written in made():
            for start in range(0, len(result), WORKING_VALUES):
                piece = slice(start, start + WORKING_VALUES)
                if generator is None:
                    store(result[piece] / now, written[piece])
                else:
                    store_stochastic(result[piece] / now, written[piece], generator)
                found.append(survival(weight[piece], result[piece], written[piece].to(wide) * now, other))
        return together(found)

    return compute


def _largest(values: Tensor) -> float:
    """The largest magnitude of those that are finite."""
    if not values.numel():
        return 0.0
    low, high = (float(v) for v in values.aminmax())
    if math.isfinite(low) and math.isfinite(high):
        return max(-low, high)
    return float(values.abs().nan_to_num(0.0, 0.0, 0.0).max())


def _scale_for(least: float, dtype: str) -> Tensor:
    """The least number of this dtype that is no smaller."""
    import torch

    from weightops.engine.tensors import TORCH_DTYPES

    found = torch.tensor([least], dtype=torch.float64).to(TORCH_DTYPES[dtype])
    if float(found) < least:  # the codes of positive numbers are in their order
        found.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]).add_(1)
    return found
