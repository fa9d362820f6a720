"""Raw tasks compute on bytes: without torch, without inputs even, and the same for any memory and threads."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import CLI, no_workers_left, save_raw, within
from safetensors.torch import load_file

from weightops.engine import chunks
from weightops.engine.chunks import block_rows, chunk_cost, cut, smallest_memory, task_rows
from weightops.engine.run import run
from weightops.errors import MemoryRefused, ValueRefused
from weightops.files.checkpoint import open_checkpoint
from weightops.files.dtypes import DTYPES
from weightops.files.tensor import Slot, TensorSpec
from weightops.plan import Block, Grain, Input, Plan, RawCompute, Task

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from weightops.files.checkpoint import Checkpoint

    Bytes = Sequence[memoryview]

MIB = 1 << 20
BLOCK = 64 * 1024


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested holds for any of these numbers, which are a matter of speed; with small ones, files are small."""
    monkeypatch.setattr(chunks, "BLOCK_VALUES", BLOCK)
    monkeypatch.setattr(chunks, "CHUNK_MIN", 1 << 18)
    monkeypatch.setattr(chunks, "CHUNK_MAX", 2 << 20)


def transposed(spec: TensorSpec) -> RawCompute:
    """A matrix of elements of 1, 2 or 4 bytes, turned."""
    kind = f"u{DTYPES[spec.dtype].bits // 8}"

    def compute(inputs: Bytes, outputs: Bytes, _block: Block) -> None:
        given = np.frombuffer(inputs[0], kind).reshape(spec.shape)
        np.frombuffer(outputs[0], kind).reshape(spec.shape[::-1])[...] = given.T

    return compute


def numbered(_inputs: Bytes, outputs: Bytes, block: Block) -> None:
    """A constant in which each row holds its own number."""
    rows = np.frombuffer(outputs[0], "<i4").reshape(block.stop - block.start, -1)
    rows[...] = np.arange(block.start, block.stop, dtype="<i4")[:, None]


def diagonal(inputs: Bytes, outputs: Bytes, block: Block) -> None:
    """The rows of a matrix of zeros with the input, a square, twice on its diagonal."""
    square = np.frombuffer(inputs[0], "<u2")
    side = int(len(square) ** 0.5)
    square = square.reshape(side, side)
    out = np.frombuffer(outputs[0], "<u2").reshape(-1, 2 * side)
    out[...] = 0
    for row in range(block.start, block.stop):
        start = row // side * side
        out[row - block.start, start : start + side] = square[row % side]


def alpha(_inputs: Bytes, outputs: Bytes, _block: Block) -> None:
    outputs[0][:] = np.float32(4.0).tobytes()


SHAPES = {"wide": ("F8_E4M3", (70, 4001)), "tall": ("BF16", (3000, 130)), "even": ("F32", (400, 400))}


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Checkpoint]:
    chance = random.Random(0)
    given: dict[str, Any] = {}
    for key, (dtype, shape) in SHAPES.items():
        given[key] = (dtype, shape, chance.randbytes(TensorSpec(dtype, shape).nbytes))
    given["square"] = ("F16", (300, 300), chance.randbytes(300 * 300 * 2))
    with open_checkpoint(save_raw(tmp_path / "in.safetensors", given)) as opened:
        yield opened


def data_of(source: Checkpoint, key: str) -> bytes:
    out = bytearray(source.tensors[key].spec.nbytes)
    source.read_bytes(source.slot(key), 0, len(out), memoryview(out))
    return bytes(out)


def doubled(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block) -> None:
    torch.mul(inputs[0], 2, out=outputs[0])


def plan_of(source: Checkpoint, *, mixed: bool) -> Plan:
    outputs = {
        **{key: TensorSpec(dtype, shape[::-1]) for key, (dtype, shape) in SHAPES.items()},
        "numbers": TensorSpec("I32", (5000, 99)),
        "diagonal": TensorSpec("F16", (600, 600)),
        "alpha": TensorSpec("F32", ()),
        "square": source.tensors["square"].spec,
    }
    slots = {key: Slot(key, spec) for key, spec in outputs.items()}
    tasks = [
        Task(
            key, (Input(0, source.slot(key)),), (slots[key],), transposed(source.tensors[key].spec), Grain.TENSOR,
            raw=True,
        )
        for key in SHAPES
    ]  # fmt: skip
    whole = Input(0, source.slot("square"), shared=True)
    tasks += [
        Task("numbers", (), (slots["numbers"],), numbered, raw=True),
        Task("diagonal", (whole,), (slots["diagonal"],), diagonal, raw=True),
        Task("alpha", (), (slots["alpha"],), alpha, raw=True),
        Task("square", (Input(0, source.slot("square")),), (slots["square"],)),
    ]
    if mixed:
        flat = Slot("even", source.tensors["even"].spec.flat())
        outputs["doubled"] = source.tensors["even"].spec
        tasks.insert(3, Task("doubled", (Input(0, flat),), (Slot("doubled", flat.spec),), doubled))
    return Plan((source,), outputs, tuple(tasks))


@pytest.mark.parametrize("mixed", [False, True])
def test_bytes_do_not_depend_on_memory_or_threads(source: Checkpoint, tmp_path: Path, mixed: bool) -> None:
    plan = plan_of(source, mixed=mixed)
    written, hashes, counts = set(), set(), set()
    for memory in (smallest_memory(plan)[0], 8 * MIB, 256 * MIB):
        for threads in (1, 2, 5):
            outcome = run(plan, tmp_path / "out", memory=memory, threads=threads, force=True)
            assert outcome.peak_in_flight <= memory
            counts.add(outcome.chunks)
            hashes.add(outcome.hashes[0])
            written.add(hashlib.sha256((tmp_path / "out").read_bytes()).hexdigest())
    assert len(written) == len(hashes) == 1
    assert len(counts) > 1
    with open_checkpoint(tmp_path / "out") as result:
        for key, (dtype, shape) in SHAPES.items():
            kind = f"u{DTYPES[dtype].bits // 8}"
            given = np.frombuffer(data_of(source, key), kind).reshape(shape)
            assert data_of(result, key) == given.T.tobytes()
        square = np.frombuffer(data_of(source, "square"), "u2").reshape(300, 300)
        assert data_of(result, "diagonal") == np.kron(np.eye(2, dtype="u2"), square).tobytes()
        assert data_of(result, "numbers") == np.repeat(np.arange(5000, dtype="<i4"), 99).tobytes()
        assert data_of(result, "alpha") == np.float32(4).tobytes()
        assert data_of(result, "square") == square.tobytes()
    if mixed:
        with np.errstate(all="ignore"):
            wanted = np.frombuffer(data_of(source, "even"), "<f4") * np.float32(2)
        assert load_file(tmp_path / "out")["doubled"].numpy().tobytes() == wanted.tobytes()


def test_each_block_sees_its_own_bytes_and_shared_inputs_whole(source: Checkpoint, tmp_path: Path) -> None:
    seen: list[tuple[Block, list[int]]] = []
    lock = threading.Lock()

    def look(inputs: Bytes, outputs: Bytes, block: Block) -> str:
        assert all(part.format == "B" and part.ndim == 1 for part in (*inputs, *outputs))
        assert not any(part.readonly for part in outputs)
        assert inputs[0] == data[block.start * 260 : block.stop * 260]
        outputs[0][:] = inputs[0]
        with lock:
            seen.append((block, [len(part) for part in (*inputs, *outputs)]))
        return f"block {block.number}"

    data = data_of(source, "tall")
    slot = source.slot("tall")
    task = Task("t", (Input(0, slot), Input(0, source.slot("square"), shared=True)), (slot,), look, raw=True)
    outcome = run(Plan((source,), {"tall": slot.spec}, (task,)), tmp_path / "out", memory=4 * MIB, threads=3)
    height = BLOCK // 130
    blocks = [Block(n, start, min(start + height, 3000)) for n, start in enumerate(range(0, 3000, height))]
    assert sorted(block for block, _ in seen) == blocks
    assert all(found == [260 * (b.stop - b.start), 180_000, 260 * (b.stop - b.start)] for b, found in seen)
    assert outcome.values == {0: [f"block {n}" for n in range(len(blocks))]}


@pytest.mark.parametrize("grain", [Grain.ROWS, Grain.TENSOR])
def test_scalars_and_empty_tensors_are_computed_like_any_other(tmp_path: Path, grain: Grain) -> None:
    shapes: dict[str, list[int]] = {"scalar": [], "one": [1], "none": [0, 4], "flat": [4, 0], "two": [2, 1]}
    given = {key: ("U8", shape, bytes(range(7, 7 + int(np.prod(shape))))) for key, shape in shapes.items()}
    seen = set()

    def flip(inputs: Bytes, outputs: Bytes, block: Block) -> None:
        seen.add((len(inputs[0]), block))
        outputs[0][:] = bytes(255 - b for b in inputs[0])

    with open_checkpoint(save_raw(tmp_path / "in", given)) as source:
        tasks = tuple(Task(k, (Input(0, source.slot(k)),), (source.slot(k),), flip, grain, raw=True) for k in given)
        run(Plan((source,), {k: i.spec for k, i in source.tensors.items()}, tasks), tmp_path / "out", memory=MIB)
    with open_checkpoint(tmp_path / "out") as result:
        for key, (_, _, data) in given.items():
            assert data_of(result, key) == bytes(255 - b for b in data)
    assert seen == {(1, Block(0, 0, 1)), (2, Block(0, 0, 2))}


def test_rows_that_do_not_fill_whole_bytes_are_not_cut() -> None:
    odd, even = (Slot("w", TensorSpec("F4", shape)) for shape in ((2, 3), (3, 2)))
    Task("w", (), (even,), alpha, raw=True)
    Task("w", (), (odd,), alpha, Grain.TENSOR, raw=True)
    with pytest.raises(ValueError, match=r"^w: the rows of F4 \[2, 3\] do not fill whole bytes$"):
        Task("w", (), (odd,), alpha, raw=True)


# ------------------------------------------------------------------------------------------------ no inputs


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_plan_may_be_of_constants_alone(tmp_path: Path, threads: int, raw: bool) -> None:
    """Without a source, even."""

    def ones(_inputs: Any, outputs: Any, block: Block) -> None:
        if raw:
            np.frombuffer(outputs[0], "<f4")[...] = block.number
        else:
            outputs[0].fill_(float(block.number))

    spec = TensorSpec("F32", (10 * BLOCK + 3,))
    task = Task("w", (), (Slot("w", spec),), ones, raw=raw)
    progress: list[tuple[int, int]] = []
    outcome = run(
        Plan((), {"w": spec}, (task,), {"format": "pt"}, {"command": "make"}), tmp_path / "out", memory=2 * MIB,
        threads=threads, on_progress=lambda done, total: progress.append((done, total)),
    )  # fmt: skip
    found = load_file(tmp_path / "out")["w"]
    assert found.tolist() == [float(n // BLOCK) for n in range(10 * BLOCK + 3)]
    assert (outcome.bytes_read, outcome.hashes) == (0, [])
    assert outcome.chunks > 1
    assert progress[-1] == (spec.nbytes, spec.nbytes)
    with open_checkpoint(tmp_path / "out") as result:
        assert result.metadata["weightops"] == '{"command": "make", "inputs": []}'


def test_constants_are_cut_counted_and_refused_like_anything_else(tmp_path: Path) -> None:
    spec = TensorSpec("F32", (4000, 300))
    task = Task("zeros", (), (Slot("w", spec),), alpha, raw=True)
    whole = Task("zeros", (), (Slot("w", spec),), alpha, Grain.TENSOR, raw=True)
    height = BLOCK // 300
    assert (task_rows(task), block_rows(task)) == (4000, height)
    assert chunk_cost(task, 10) == 10 * 300 * 4
    plan = Plan((), {"w": spec}, (task,))
    assert smallest_memory(plan) == (height * 1200, "zeros")
    assert [c.start for c in cut(plan, 8 * MIB)][:2] == [0, height]
    assert [(c.start, c.stop, c.cost) for c in cut(Plan((), {"w": spec}, (whole,)), 8 * MIB)] == [(0, 4000, 4_800_000)]
    with pytest.raises(MemoryRefused) as caught:
        run(Plan((), {"w": spec}, (whole,)), tmp_path / "out", memory=MIB)
    assert str(caught.value) == "--memory: 1,048,576 bytes are too few: 'zeros' alone takes 4,800,000"


# ------------------------------------------------------------------------------------------------ without torch

PLAN = """
import sys; sys.path.insert(0, {root!r})
import threading
from pathlib import Path
from weightops.engine.run import run
from weightops.files.checkpoint import open_checkpoint
from weightops.files.tensor import Slot, TensorSpec
from weightops.plan import Grain, Input, Plan, Task
def turn(inputs, outputs, block):
    import numpy as np
    np.frombuffer(outputs[0], 'u2').reshape(3, 2)[...] = np.frombuffer(inputs[0], 'u2').reshape(2, 3).T
def alpha(inputs, outputs, block):
    outputs[0][:] = bytes(4)
    started.append([t.name for t in threading.enumerate()].count('weightops'))
started = []
spec, one = TensorSpec('F16', (3, 2)), TensorSpec('F32', ())
with open_checkpoint('in.safetensors') as source:
    tasks = (
        Task('w', (Input(0, source.slot('w')),), (Slot('w', spec),), turn, Grain.TENSOR, raw=True),
        Task('a', (), (Slot('a', one),), alpha, raw=True),
    )
    run(Plan((source,), {{'w': spec, 'a': one}}, tasks), Path('out.safetensors'), memory=1 << 20, device='cuda')
print([m for m in ('torch', 'weightops.engine.tensors') if m in sys.modules], started)
"""


def test_a_plan_whose_tasks_are_raw_never_loads_torch(tmp_path: Path) -> None:
    data = bytes(range(12))
    save_raw(tmp_path / "in.safetensors", {"w": ("F16", [2, 3], data)})
    words = [sys.executable, "-c", PLAN.format(root=str(CLI.parent))]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[] ")
    found = load_file(tmp_path / "out.safetensors")
    assert found["w"].view(torch.int16).equal(torch.frombuffer(bytearray(data), dtype=torch.int16).reshape(2, 3).T)
    assert found["a"] == 0


def test_raw_tasks_do_not_wait_for_torch(source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a plan of both kinds: here torch comes only when every raw task is done."""
    from weightops.engine import run as engine

    plan = plan_of(source, mixed=True)
    done = threading.Event()
    left = {"numbers", "alpha", "diagonal"}
    really = engine.compute_raw

    def compute_raw(chunk: Any, *rest: Any) -> list[Any]:
        found = really(chunk, *rest)
        left.discard(chunk.task.name)
        if not left:
            done.set()
        return found

    really_import = engine._Run._import_torch

    def import_torch(self: Any) -> None:
        assert done.wait(10)
        really_import(self)

    monkeypatch.setattr(engine, "compute_raw", compute_raw)
    monkeypatch.setattr(engine._Run, "_import_torch", import_torch)
    within(20, lambda: run(plan, tmp_path / "out", memory=256 * MIB, threads=4))


# ------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("inputs", [True, False])
def test_an_error_in_a_raw_task_comes_out_as_it_is(source: Checkpoint, tmp_path: Path, inputs: bool) -> None:
    def fail(_inputs: Bytes, _outputs: Bytes, _block: Block) -> None:
        raise ZeroDivisionError("mine")

    slot = source.slot("tall")
    task = Task("w", (Input(0, slot),) if inputs else (), (slot,), fail, raw=True)
    with pytest.raises(ZeroDivisionError, match="mine"):
        within(20, lambda: run(Plan((source,), {"tall": slot.spec}, (task,)), tmp_path / "out", memory=4 * MIB))
    assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]
    assert no_workers_left()


def test_a_raw_constant_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    def infinite(_inputs: Bytes, outputs: Bytes, _block: Block) -> None:
        outputs[0][:] = np.float32("inf").tobytes()

    spec = TensorSpec("F32", ())
    plan = Plan((), {"w": spec}, (Task("w", (), (Slot("w", spec),), infinite, raw=True),), refuse_nonfinite=True)
    with pytest.raises(ValueRefused, match=r"^w: the result is too large for F32"):
        run(plan, tmp_path / "out", memory=MIB)
    assert list(tmp_path.iterdir()) == []
