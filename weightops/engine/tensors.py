"""Bytes <-> torch tensors: the dtype table, buffers, and the lanes on which blocks are computed.

The only module of the core that imports torch at its top; the engine imports it while the first bytes are read.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from weightops.errors import UsageError
from weightops.plan import Grain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from weightops.engine.chunks import Chunk
    from weightops.files.tensor import TensorSpec

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


def as_tensor(buffer: memoryview, spec: TensorSpec, rows: int | None = None) -> Tensor:
    """A tensor over the buffer's own bytes: `rows` rows (None: all) of `spec`."""
    shape = spec.shape if rows is None or not spec.shape else (rows, *spec.shape[1:])
    dtype = TORCH_DTYPES[spec.dtype]
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=math.prod(shape)).reshape(shape)


def set_cpu_threads() -> None:
    # Work is spread over blocks, one thread each: torch's own threads would spin against each other.
    torch.set_num_threads(1)


def resolve_device(device: str) -> str:
    """`auto` is CUDA where there is one. Raises UsageError for a device that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return device
    if not torch.cuda.is_available():
        raise UsageError(
            "--device", f"{device!r} was asked for, but this torch sees no CUDA device", "use --device cpu"
        )
    if ":" in device and int(device.split(":")[1]) >= torch.cuda.device_count():
        raise UsageError("--device", f"there is no {device!r}: torch sees {torch.cuda.device_count()} CUDA device(s)")
    return device


class Lane(Protocol):
    """Where one worker computes: chunks come as host buffers and leave as host buffers."""

    def compute(
        self, chunk: Chunk, inputs: Sequence[memoryview], outputs: Sequence[memoryview], found: Sequence[Any]
    ) -> list[Any]:
        """Run the task's compute on each block of the chunk; the blocks' values, in order. found: see Task.follows."""

    def pin(self, buffer: memoryview) -> None:
        """Called once for each new buffer, before it is filled."""

    def unpin(self, buffer: memoryview) -> None:
        """Called once before a buffer is let go."""


def _blocks(chunk: Chunk, inputs: Sequence[Tensor], outputs: Sequence[Tensor], found: Sequence[Any]) -> list[Any]:
    task = chunk.task
    compute = cast("Callable[..., Any]", task.compute)
    values = []
    with torch.no_grad():
        if task.grain is Grain.TENSOR:  # slots may differ in height here
            return [compute(inputs, outputs, block, *found) for block in chunk.blocks()]
        for block in chunk.blocks():
            low, high = block.start - chunk.start, block.stop - chunk.start
            given = [t if i.shared or t.ndim == 0 else t[low:high] for i, t in zip(task.inputs, inputs, strict=True)]
            filled = [t if t.ndim == 0 else t[low:high] for t in outputs]
            values.append(compute(given, filled, block, *found))
    return values


def _views(
    chunk: Chunk, inputs: Sequence[memoryview], outputs: Sequence[memoryview]
) -> tuple[list[Tensor], list[Tensor]]:
    task = chunk.task
    rows = None if task.grain is Grain.TENSOR else chunk.stop - chunk.start
    given = [as_tensor(b, i.slot.spec, None if i.shared else rows) for i, b in zip(task.inputs, inputs, strict=True)]
    return given, [as_tensor(b, s.spec, rows) for s, b in zip(task.outputs, outputs, strict=True)]


class CpuLane:
    """Computes in place on the host buffers."""

    def compute(
        self, chunk: Chunk, inputs: Sequence[memoryview], outputs: Sequence[memoryview], found: Sequence[Any]
    ) -> list[Any]:
        return _blocks(chunk, *_views(chunk, inputs, outputs), found)

    def pin(self, buffer: memoryview) -> None:
        pass

    def unpin(self, buffer: memoryview) -> None:
        pass


class CudaLane:
    """One stream per worker: while one worker's chunk computes, another's is copied in and a third's out.

    The host buffers are page-locked in place (cudaHostRegister), so that they are exactly as large as the
    budget counted; torch's own pinned allocator would round them up to powers of two.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        cuda: Any = torch.cuda  # its functions carry no types
        self.stream = cuda.Stream(self.device)
        self.runtime = cuda.cudart()
        self.pinned: set[int] = set()

    def compute(
        self, chunk: Chunk, inputs: Sequence[memoryview], outputs: Sequence[memoryview], found: Sequence[Any]
    ) -> list[Any]:
        host_in, host_out = _views(chunk, inputs, outputs)
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
                given = [t.to(self.device, non_blocking=True) for t in host_in]
                filled = [torch.empty_like(t, device=self.device) for t in host_out]
                values = _blocks(chunk, given, filled, found)
                for host, result in zip(host_out, filled, strict=True):
                    host.copy_(result, non_blocking=True)
        finally:
            # After an error, too: the device may still be reading the buffers, which are about to go.
            # Releases the interpreter's lock while it waits, so the other workers read and write meanwhile.
            self.stream.synchronize()
        return values

    def pin(self, buffer: memoryview) -> None:
        tensor = torch.frombuffer(buffer, dtype=torch.uint8)
        with torch.cuda.device(self.device):
            code = self.runtime.cudaHostRegister(tensor.data_ptr(), tensor.numel(), 0)
        if int(code) != 0:
            raise MemoryError(f"cudaHostRegister of {tensor.numel():,} bytes failed with CUDA error {int(code)}")
        self.pinned.add(tensor.data_ptr())

    def unpin(self, buffer: memoryview) -> None:
        address = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
        if address in self.pinned:  # otherwise it is the one whose pinning failed
            self.pinned.remove(address)
            with torch.cuda.device(self.device):
                self.runtime.cudaHostUnregister(address)


def make_lane(device: str) -> Lane:
    return CpuLane() if device == "cpu" else CudaLane(device)
