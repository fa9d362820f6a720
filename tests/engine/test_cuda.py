"""On a CUDA device: the same values within one unit in the last place, and memory given back."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import save
from safetensors.torch import load_file

from weightops.engine import chunks, tensors
from weightops.engine.run import run
from weightops.files.checkpoint import Checkpoint, open_checkpoint
from weightops.files.tensor import Slot, TensorSpec
from weightops.plan import Grain, Input, Plan, Task

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from weightops.plan import Block

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch sees no CUDA device"),
]

MIB = 1 << 20
VALUES = 23 * 256 * 1024 + 5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "BLOCK_VALUES", 256 * 1024)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Checkpoint]:
    made = torch.Generator().manual_seed(0)
    content = {
        "a": torch.randn(VALUES, generator=made).half(),
        "b": torch.randn(VALUES, generator=made).half(),
        "a32": torch.randn(300, 3000, generator=made),
        "b32": torch.randn(300, 3000, generator=made),
        "scalar": torch.tensor(2.5),
        "codes": torch.randint(0, 255, (5 * MIB,), dtype=torch.uint8, generator=made),
    }
    with open_checkpoint(save(tmp_path / "in.safetensors", content)) as source:
        yield source


def blend(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block) -> None:
    outputs[0].copy_(torch.lerp(inputs[0].double(), inputs[1].double(), 0.3))


def lerp(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block) -> None:
    torch.lerp(inputs[0], inputs[1], 0.3, out=outputs[0])


def center(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block) -> None:
    outputs[0].copy_(inputs[0] - inputs[0].mean() + inputs[1])


def merged(source: Checkpoint) -> Plan:
    """Like a merge: two dtypes, a whole tensor, a shared scalar, and a copy, which never sees the device."""
    half = Slot("half", TensorSpec("F16", (VALUES,)))
    wide, tensor, codes = (
        Slot(k, source.tensors[s].spec) for k, s in (("wide", "a32"), ("tensor", "a32"), ("codes", "codes"))
    )
    scalar = Input(0, source.slot("scalar"), shared=True)
    tasks = (
        Task("codes", (Input(0, source.slot("codes")),), (codes,)),
        Task("half", (Input(0, source.slot("a")), Input(0, source.slot("b"))), (half,), lerp),
        Task("wide", (Input(0, source.slot("a32")), Input(0, source.slot("b32")), scalar), (wide,), blend),
        Task("tensor", (Input(0, source.slot("a32")), scalar), (tensor,), center, Grain.TENSOR),
    )
    return Plan((source,), {s.key: s.spec for s in (half, wide, tensor, codes)}, tasks)


def test_a_device_gives_what_the_cpu_gives_within_one_ulp(opened: Checkpoint, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        run(merged(opened), tmp_path / device, memory=64 * MIB, device=device)
    cpu, cuda = load_file(tmp_path / "cpu"), load_file(tmp_path / "cuda")
    assert cpu["codes"].equal(cuda["codes"])
    for key in ("half", "wide", "tensor"):
        integer = {torch.float16: torch.int16, torch.float32: torch.int32}[cpu[key].dtype]
        apart = (cpu[key].view(integer).long() - cuda[key].view(integer).long()).abs()
        close = (cpu[key].double() - cuda[key].double()).abs() <= (2e-7 if key != "half" else 0)
        assert ((apart <= 1) | close).all(), key


def test_bytes_on_a_device_do_not_depend_on_memory_or_threads(opened: Checkpoint, tmp_path: Path) -> None:
    found = {}
    for memory, threads in ((64, 1), (256, 1), (64, 4), (2048, 2)):
        outcome = run(merged(opened), tmp_path / "out", memory=memory * MIB, threads=threads, device="cuda", force=True)
        found[memory, threads] = (hashlib.sha256((tmp_path / "out").read_bytes()).hexdigest(), *outcome.hashes)
        assert outcome.peak_in_flight <= memory * MIB
    assert len(set(found.values())) == 1


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, bool]]:
    """What becomes of page-locked buffers: ("pin" or "unpin", address, is it pinned afterwards)."""
    seen: list[tuple[str, int, bool]] = []
    for name in ("pin", "unpin"):
        really = getattr(tensors.CudaLane, name)

        def call(self: Any, buffer: memoryview, really: Any = really, name: str = name) -> None:
            really(self, buffer)
            tensor = torch.frombuffer(buffer, dtype=torch.uint8)
            seen.append((name, tensor.data_ptr(), tensor.is_pinned()))

        monkeypatch.setattr(tensors.CudaLane, name, call)
    return seen


def is_balanced(seen: list[tuple[str, int, bool]]) -> bool:
    """Every buffer was pinned before it was unpinned, and none is pinned in the end."""
    held: set[int] = set()
    for name, address, pinned in seen:
        if pinned != (name == "pin") or (address in held) == (name == "pin"):
            return False
        held ^= {address}
    return not held


def test_page_locked_buffers_are_given_back(
    opened: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(monkeypatch)
    run(merged(opened), tmp_path / "out", memory=64 * MIB, threads=3, device="cuda")
    assert seen
    assert is_balanced(seen)


def test_page_locked_buffers_are_given_back_after_an_error(
    opened: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block) -> None:
        lerp(inputs, outputs, block)
        if block.number == 11:
            raise ZeroDivisionError

    plan = merged(opened)
    failing = tuple(
        Task(t.name, t.inputs, t.outputs, fail if t.name == "half" else t.compute, t.grain) for t in plan.tasks
    )
    seen = watch(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        run(Plan(plan.sources, plan.outputs, failing), tmp_path / "out", memory=64 * MIB, threads=3, device="cuda")
    assert is_balanced(seen)
    assert not (tmp_path / "out").exists()


def test_a_scan_on_a_device_returns_its_values_in_order(opened: Checkpoint) -> None:
    def look(inputs: Sequence[Tensor], _outputs: Sequence[Tensor], block: Block) -> tuple[int, str, float]:
        return block.number, inputs[0].device.type, float(inputs[0].double().sum())

    task = Task("a", (Input(0, opened.slot("a")),), (), look)
    plan = Plan((opened,), {}, (task,))
    cpu = run(plan, None, memory=64 * MIB).values[0]
    cuda = run(plan, None, memory=64 * MIB, threads=4, device="cuda").values[0]
    assert [number for number, _, _ in cuda] == list(range(24))
    assert {device for _, device, _ in cuda} == {"cuda"}
    assert [value for *_, value in cuda] == pytest.approx([value for *_, value in cpu], abs=1e-6)


def test_the_number_of_a_device_that_is_not_there_is_refused(opened: Checkpoint, tmp_path: Path) -> None:
    from weightops.errors import UsageError

    count = torch.cuda.device_count()
    with pytest.raises(UsageError) as caught:
        run(merged(opened), tmp_path / "out", memory=64 * MIB, device=f"cuda:{count}")
    assert str(caught.value) == f"--device: there is no 'cuda:{count}': torch sees {count} CUDA device(s)"
