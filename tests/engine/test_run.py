"""The engine runs any plan: the right bytes, the same for any memory and threads, within the budget."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import random
import re
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import no_workers_left, save, save_raw
from safetensors.torch import load_file

from weightops.engine import chunks
from weightops.engine.run import Outcome, run
from weightops.errors import MemoryRefused, OutputError, UsageError, ValueRefused
from weightops.files.checkpoint import Checkpoint, open_checkpoint
from weightops.files.dtypes import DTYPES
from weightops.files.tensor import Slot, TensorSpec
from weightops.ops.merge import merge
from weightops.plan import Block, Grain, Input, Plan, Task

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    Tensors = Sequence[Tensor]

MIB = 1 << 20
BLOCK = 256 * 1024
WIDE = (22, BLOCK - 19)  # its values fill 22 blocks, the last one not quite
MEMORIES = (64 * MIB, 256 * MIB, 2048 * MIB)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested holds for any of these numbers, which are a matter of speed; with small ones, files are small."""
    monkeypatch.setattr(chunks, "BLOCK_VALUES", BLOCK)
    monkeypatch.setattr(chunks, "CHUNK_MIN", 1 << 20)
    monkeypatch.setattr(chunks, "CHUNK_MAX", 8 << 20)
    monkeypatch.setattr(chunks, "SHARE", 64)


def half(inputs: Tensors, outputs: Tensors, _block: Block) -> None:
    torch.lerp(inputs[0], inputs[1], 0.5, out=outputs[0])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def flat(source: int, key: str, opened: Sequence[Checkpoint]) -> Input:
    return Input(source, Slot(key, opened[source].tensors[key].spec.flat()))


def copies(opened: Checkpoint) -> Plan:
    """A plan that copies everything."""
    tasks = tuple(Task(k, (Input(0, opened.slot(k)),), (opened.slot(k),)) for k in opened.tensors)
    return Plan((opened,), {k: i.spec for k, i in opened.tensors.items()}, tasks)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of some 30 MiB: half precision to be averaged, codes to be copied, and odd ends."""
    folder = tmp_path_factory.mktemp("pair")
    files = []
    for seed, name in enumerate(("a", "b")):
        tensors = {
            "wide": randn(seed, *WIDE, dtype=torch.float16),
            "bias": randn(seed, 7, dtype=torch.float16),
            "scale": torch.tensor(seed + 1.5, dtype=torch.float16),
            "codes": torch.randint(
                0, 255, (6 * MIB,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
            ),
        }
        files.append(save(folder / f"{name}.safetensors", tensors, {"format": "pt"}))
    return files[0], files[1]


@pytest.fixture
def opened(pair: tuple[Path, Path]) -> Iterator[list[Checkpoint]]:
    both = [open_checkpoint(path) for path in pair]
    yield both
    for checkpoint in both:
        checkpoint.close()


def averaged(opened: list[Checkpoint]) -> Plan:
    """The halves averaged, with no working copies: so the chunks are as large as the memory allows."""
    tasks = []
    for key, info in opened[0].tensors.items():
        if info.spec.dtype == "U8":
            tasks.append(Task(key, (Input(0, opened[0].slot(key)),), (opened[0].slot(key),)))
        else:
            tasks.append(Task(key, (flat(0, key, opened), flat(1, key, opened)), (Slot(key, info.spec.flat()),), half))
    outputs = {k: i.spec for k, i in opened[0].tensors.items()}
    return Plan(tuple(opened), outputs, tuple(tasks), {"format": "pt"}, {"command": "test"})


# ------------------------------------------------------------------------------------------------ the laws


def test_bytes_do_not_depend_on_memory_or_threads(opened: list[Checkpoint], tmp_path: Path) -> None:
    plan = averaged(opened)
    chunks: dict[int, set[int]] = {}
    written: set[str] = set()
    hashes: set[tuple[str, ...]] = set()
    for memory in MEMORIES:
        for threads in (1, 2):
            output = tmp_path / f"{memory}-{threads}.safetensors"
            outcome = run(plan, output, memory=memory, threads=threads)
            assert outcome.peak_in_flight <= memory
            chunks.setdefault(memory, set()).add(outcome.chunks)
            written.add(digest(output))
            hashes.add(tuple(outcome.hashes))
    few, more, most = (chunks[memory].pop() for memory in reversed(MEMORIES))
    assert not any(chunks.values())
    assert few < more < most
    assert most >= 20
    assert len(written) == len(hashes) == 1


def test_bytes_of_a_merge_do_not_depend_on_memory_or_threads(pair: tuple[Path, Path], tmp_path: Path) -> None:
    written = set()
    for memory in MEMORIES:
        for threads in (1, 2):
            output = tmp_path / f"{memory}-{threads}.safetensors"
            merge(*pair, output=output, alpha=0.3, memory=memory, threads=threads)
            written.add(digest(output))
    assert len(written) == 1
    merged, a, b = load_file(output), *map(load_file, pair)
    for key in ("wide", "bias", "scale"):
        exact = 0.7 * a[key].double() + 0.3 * b[key].double()
        # Half a unit in the last place of the result, and what float32 adds to it when the two nearly cancel.
        allowed = 2**-11 * exact.abs().clamp_min(2**-14) + 2**-22 * torch.maximum(a[key].abs(), b[key].abs()).double()
        assert ((merged[key].double() - exact).abs() <= allowed).all()
    assert merged["codes"].equal(a["codes"])


def test_a_matrix_product_does_not_depend_on_memory_or_threads(tmp_path: Path) -> None:
    """The height of a product's bands decides its rounding, so it must come from the shape alone."""
    out, rank, width = 2500, 24, 2 * BLOCK // 999  # six blocks
    tensors = {"w": randn(0, out, width), "up": randn(1, out, rank), "down": randn(2, rank, width)}
    path = save(tmp_path / "a.safetensors", tensors)

    def fuse(inputs: Tensors, outputs: Tensors, _block: Block) -> None:
        w, up, down = inputs
        torch.addmm(w, up, down, alpha=0.5, out=outputs[0])

    with open_checkpoint(path) as source:
        slots = {key: source.slot(key) for key in tensors}
        inputs = (Input(0, slots["w"]), Input(0, slots["up"]), Input(0, slots["down"], shared=True))
        plan = Plan((source,), {"w": slots["w"].spec}, (Task("w", inputs, (slots["w"],), fuse),))
        chunks, written, progress = set(), set(), []
        for memory in MEMORIES:
            for threads in (1, 2):
                output = tmp_path / f"{memory}-{threads}.out"
                outcome = run(
                    plan, output, memory=memory, threads=threads, on_progress=lambda d, t: progress.append((d, t))
                )
                chunks.add(outcome.chunks)
                written.add(digest(output))
                assert outcome.bytes_read >= sum(s.spec.nbytes for s in slots.values())
                if threads == 1:  # what all chunks share is still where the last one read it
                    assert outcome.bytes_read == sum(s.spec.nbytes for s in slots.values())
                # What each chunk reads again is no progress.
                assert progress[-1][0] == progress[-1][1] == sum(s.spec.nbytes for s in slots.values())
    assert max(chunks) >= 5 > min(chunks)
    assert len(written) == 1
    found = load_file(output)["w"].double()
    exact = torch.addmm(tensors["w"].double(), tensors["up"].double(), tensors["down"].double(), alpha=0.5)
    assert torch.allclose(found, exact, rtol=0, atol=1e-5)


def test_randomness_per_block_does_not_depend_on_memory_or_threads(opened: list[Checkpoint], tmp_path: Path) -> None:
    spec = opened[0].tensors["wide"].spec.flat()

    def noisy(inputs: Tensors, outputs: Tensors, block: Block) -> None:
        generator = torch.Generator().manual_seed(1000 + block.number)
        outputs[0].copy_(inputs[0] + torch.rand(inputs[0].shape, generator=generator))

    plan = Plan((opened[0],), {"wide": spec}, (Task("wide", (flat(0, "wide", opened),), (Slot("wide", spec),), noisy),))
    written = set()
    for memory, threads in ((64 * MIB, 1), (64 * MIB, 3), (1024 * MIB, 2)):
        run(plan, tmp_path / "out", memory=memory, threads=threads, force=True)
        written.add(digest(tmp_path / "out"))
    assert len(written) == 1


class _Counted(mmap.mmap):
    """Page-aligned memory that knows how much of its kind lives."""

    live = 0
    peak = 0
    counting = threading.Lock()

    def __new__(cls, *arguments: Any, **named: Any) -> _Counted:
        made = super().__new__(cls, *arguments, **named)
        with cls.counting:
            cls.live += len(made)
            cls.peak = max(cls.peak, cls.live)
        return made

    def __del__(self) -> None:
        with type(self).counting:
            type(self).live -= len(self)


@pytest.mark.parametrize("threads", [1, 4, 40])
@pytest.mark.parametrize("memory", [12, 30, 80])
def test_buffers_never_take_more_than_the_budget(
    opened: list[Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, threads: int
) -> None:
    """Also those that workers keep between chunks: what is kept is as little free as what is in use."""
    monkeypatch.setattr(mmap, "mmap", _Counted)
    _Counted.live = _Counted.peak = 0
    plan = averaged(opened)
    plan = replace(plan, tasks=tuple(replace(t, work_nbytes=16 * BLOCK if t.compute else 0) for t in plan.tasks))
    outcome = run(plan, tmp_path / "out", memory=memory * MIB, threads=threads)
    assert 0 < outcome.peak_in_flight <= memory * MIB
    pages = 3 * (threads + 2) * mmap.PAGESIZE  # a scalar, too, takes a page
    assert 0 < _Counted.peak <= memory * MIB + pages
    assert _Counted.live == 0


def test_workers_fill_the_same_buffers_again(
    opened: list[Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: a new buffer costs ten times what reading into an old one does."""
    made: list[int] = []

    class Seen(mmap.mmap):
        def __new__(cls, *arguments: Any, **named: Any) -> Seen:
            made.append(arguments[1])
            return super().__new__(cls, *arguments, **named)

    monkeypatch.setattr(mmap, "mmap", Seen)
    plan = averaged(opened)
    wide = replace(plan, tasks=tuple(t for t in plan.tasks if t.name == "wide") * 10)
    outcome = run(wide, tmp_path / "out", memory=30 * MIB, threads=4)
    assert outcome.chunks >= 40
    assert len(made) <= 3 * 2 * 4  # for each worker and role, one; and one again where the first was too small


def test_a_budget_that_is_too_small_is_refused_before_anything_is_made(
    opened: list[Checkpoint], tmp_path: Path
) -> None:
    plan = averaged(opened)
    plan = replace(plan, tasks=tuple(replace(t, work_nbytes=32 * BLOCK if t.compute else 0) for t in plan.tasks))
    needed = (3 * 2 + 32) * BLOCK
    with pytest.raises(MemoryRefused) as caught:
        run(plan, tmp_path / "out", memory=2 * MIB)
    assert str(caught.value) == f"--memory: 2,097,152 bytes are too few: 'wide' alone takes {needed:,}"
    assert caught.value.hint == f"--memory {-(-needed // MIB)}MiB would do"
    assert list(tmp_path.iterdir()) == []
    found = re.search(r"(\d+)MiB", caught.value.hint)
    assert found is not None
    outcome = run(plan, tmp_path / "out", memory=int(found.group(1)) * MIB)
    exact = run(plan, tmp_path / "exact", memory=needed)
    assert needed <= outcome.peak_in_flight <= int(found.group(1)) * MIB
    assert exact.peak_in_flight == needed
    assert digest(tmp_path / "out") == digest(tmp_path / "exact")


# ------------------------------------------------------------------------------------------------ what plans may say


def test_copies_of_every_dtype_are_the_same_bytes(tmp_path: Path) -> None:
    chance = random.Random(0)
    tensors = {}
    for number, dtype in enumerate(DTYPES):
        bits = DTYPES[dtype].bits
        values = (2 * MIB * 8 // bits) // 8 * 8 if number % 5 == 0 else 8 * chance.randrange(1, 400)
        tensors[f"{dtype} many"] = (dtype, [values // 8, 8], chance.randbytes(values * bits // 8))
        tensors[f"{dtype} none"] = (dtype, [3, 0], b"")
        if bits >= 8:
            tensors[f"{dtype} one"] = (dtype, [], chance.randbytes(bits // 8))
    path = save_raw(tmp_path / "in", tensors)
    with open_checkpoint(path) as source:
        for memory, threads in ((2 * MIB, 1), (64 * MIB, 3)):
            outcome = run(copies(source), tmp_path / "out", memory=memory, threads=threads, force=True)
            assert outcome.bytes_read == sum(len(data) for *_, data in tensors.values())
            assert outcome.bytes_written == (tmp_path / "out").stat().st_size
            with open_checkpoint(tmp_path / "out") as result:
                assert result.tensors.keys() == tensors.keys()
                for name, (dtype, shape, data) in tensors.items():
                    found = memoryview(bytearray(len(data)))
                    result.read_bytes(result.slot(name), 0, len(data), found)
                    assert found == data
                    assert result.tensors[name].spec == TensorSpec(dtype, tuple(shape))


def test_scalars_and_empty_tensors_are_computed_like_any_other(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.0),
        "one": torch.tensor([5.0]),
        "none": torch.zeros(0, 4),
        "flat": torch.zeros(4, 0),
    }
    path = save(tmp_path / "a.safetensors", tensors)

    def twice(inputs: Tensors, outputs: Tensors, _block: Block) -> None:
        assert inputs[0].shape == outputs[0].shape
        outputs[0].copy_(inputs[0] * 2)

    for grain in (Grain.ROWS, Grain.TENSOR):
        with open_checkpoint(path) as source:
            tasks = tuple(Task(k, (Input(0, source.slot(k)),), (source.slot(k),), twice, grain) for k in tensors)
            plan = Plan((source,), {k: i.spec for k, i in source.tensors.items()}, tasks)
            run(plan, tmp_path / "out", memory=MIB, force=True)
        found = load_file(tmp_path / "out")
        assert {k: (t.shape, t.tolist()) for k, t in found.items()} == {
            k: (t.shape, (t * 2).tolist()) for k, t in tensors.items()
        }


def test_a_plan_of_no_tensors_gives_a_file_of_none(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", {"none": torch.zeros(0)})
    with open_checkpoint(tmp_path / "a.safetensors") as source:
        outcome = run(copies(source), tmp_path / "out", memory=MIB)
    assert (outcome.chunks, outcome.bytes_read, outcome.peak_in_flight) == (0, 0, 0)
    assert load_file(tmp_path / "out")["none"].shape == (0,)


def test_several_tasks_fill_bands_of_one_tensor(tmp_path: Path) -> None:
    width = 2 * BLOCK // 999
    parts = {name: randn(n, 1000, width) for n, name in enumerate(("q", "k", "v"))}
    path = save(tmp_path / "a.safetensors", parts)
    spec = TensorSpec("F32", (3000, width))

    def negate(inputs: Tensors, outputs: Tensors, _block: Block) -> None:
        torch.neg(inputs[0], out=outputs[0])

    with open_checkpoint(path) as source:
        tasks = []
        for n, name in enumerate(parts):
            band = Slot("qkv", spec.with_rows(1000), ((1000 * n, 1000 * n + 1000),))
            tasks.append(Task(name, (Input(0, source.slot(name)),), (band,), None if name == "k" else negate))
        for memory in (9 * BLOCK, 64 * MIB):
            run(Plan((source,), {"qkv": spec}, tuple(tasks)), tmp_path / "out", memory=memory, force=True)
            found = load_file(tmp_path / "out")["qkv"]
            assert found.equal(torch.cat([-parts["q"], parts["k"], -parts["v"]]))


@pytest.mark.parametrize("copied", [True, False])
def test_bands_of_a_slot_are_read_and_written_in_their_order(tmp_path: Path, copied: bool) -> None:
    whole = randn(0, 3001, BLOCK // 900)
    path = save(tmp_path / "a.safetensors", {"w": whole})

    def same(inputs: Tensors, outputs: Tensors, _block: Block) -> None:
        outputs[0].copy_(inputs[0])

    with open_checkpoint(path) as source:
        spec = source.tensors["w"].spec
        swapped = Slot("w", spec, ((1500, 3001), (0, 1500)))
        picked = Slot("w", spec.with_rows(1100), ((2000, 3000), (5, 105)))
        compute = None if copied else same
        tasks = (
            Task("swapped", (Input(0, swapped),), (Slot("swapped", spec),), compute),
            Task("picked", (Input(0, picked),), (Slot("picked", picked.spec),), compute),
            Task("back", (Input(0, swapped),), (Slot("back", spec, ((1500, 3001), (0, 1500))),), compute),
        )
        outputs = {"swapped": spec, "picked": picked.spec, "back": spec}
        outcome = run(Plan((source,), outputs, tasks), tmp_path / "out", memory=9 * BLOCK)
    assert outcome.chunks > 9
    found = load_file(tmp_path / "out")
    assert found["swapped"].equal(torch.cat([whole[1500:], whole[:1500]]))
    assert found["picked"].equal(torch.cat([whole[2000:3000], whole[5:105]]))
    assert found["back"].equal(whole)


def test_a_task_may_fill_several_tensors_of_different_dtypes(tmp_path: Path) -> None:
    values = randn(0, 2000, 300)
    path = save(tmp_path / "a.safetensors", {"w": values})

    def split(inputs: Tensors, outputs: Tensors, _block: Block) -> None:
        high, low, signs = outputs
        high.copy_(inputs[0])
        low.copy_(inputs[0] - high.float())
        signs.copy_((inputs[0] < 0).any(dim=1))

    outputs = {
        "high": TensorSpec("BF16", (2000, 300)),
        "low": TensorSpec("F16", (2000, 300)),
        "signs": TensorSpec("BOOL", (2000,)),
    }
    with open_checkpoint(path) as source:
        task = Task("w", (Input(0, source.slot("w")),), tuple(Slot(k, s) for k, s in outputs.items()), split)
        outcome = run(Plan((source,), outputs, (task,)), tmp_path / "out", memory=9 * BLOCK)
    assert outcome.chunks >= 2
    found = load_file(tmp_path / "out")
    assert found["high"].equal(values.bfloat16())
    assert found["low"].equal((values - values.bfloat16().float()).half())
    assert found["signs"].equal((values < 0).any(dim=1))


def test_whole_tensors_are_seen_whole(tmp_path: Path) -> None:
    """Of different heights, too: up [out, rank] and down [rank, in] have no row in common."""
    up, down = randn(0, 3000, 4), randn(1, 4, 700)
    path = save(tmp_path / "a.safetensors", {"up": up, "down": down})
    seen = []

    def thin(inputs: Tensors, outputs: Tensors, block: Block) -> None:
        seen.append((block, [tuple(t.shape) for t in (*inputs, *outputs)]))
        outputs[0].copy_(inputs[1][:2])
        outputs[1].copy_(inputs[0][:, :2] / inputs[0].norm())

    outputs = {"down": TensorSpec("F32", (2, 700)), "up": TensorSpec("F32", (3000, 2))}
    with open_checkpoint(path) as source:
        task = Task(
            "module", (Input(0, source.slot("up")), Input(0, source.slot("down"))),
            tuple(Slot(k, s) for k, s in outputs.items()), thin, Grain.TENSOR,
        )  # fmt: skip
        outcome = run(Plan((source,), outputs, (task,)), tmp_path / "out", memory=MIB)
        copied = run(copies(source), tmp_path / "copy", memory=4 * MIB)
    assert [shapes for _, shapes in seen] == [[(3000, 4), (4, 700), (2, 700), (3000, 2)]]
    assert outcome.chunks == 1
    assert outcome.bytes_read == (up.numel() + down.numel()) * 4
    found = load_file(tmp_path / "out")
    assert found["down"].equal(down[:2])
    assert found["up"].equal(up[:, :2] / up.norm())
    assert outcome.hashes == copied.hashes  # neither is longer than a block


# ------------------------------------------------------------------------------------------------ scans


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_scan_returns_the_values_of_all_blocks_in_order(opened: list[Checkpoint], memory: int, threads: int) -> None:
    def look(inputs: Tensors, outputs: Tensors, block: Block) -> tuple[Block, float] | None:
        assert not outputs
        return (block, float(inputs[0].double().sum()))

    def silent(_inputs: Tensors, _outputs: Tensors, _block: Block) -> None:
        return None

    tasks = (
        Task("wide", (flat(0, "wide", opened),), (), look),
        Task("bias", (flat(0, "bias", opened),), (), silent),
        Task("scale", (Input(1, opened[1].slot("scale")),), (), look),
    )
    outcome = run(Plan(tuple(opened), {}, tasks), None, memory=memory, threads=threads)
    values = math.prod(WIDE)
    blocks = [Block(n, n * BLOCK, min((n + 1) * BLOCK, values)) for n in range(22)]
    wide = load_file(opened[0].label)["wide"].flatten()
    assert outcome.values == {
        0: [(b, float(wide[b.start : b.stop].double().sum())) for b in blocks],
        2: [(Block(0, 0, 1), 2.5)],
    }
    assert outcome.bytes_written == 0
    assert outcome.peak_in_flight <= memory


def test_a_scan_of_shared_inputs_alone_is_called_once(opened: list[Checkpoint]) -> None:
    def look(inputs: Tensors, _outputs: Tensors, block: Block) -> tuple[Block, int]:
        return block, inputs[0].numel()

    task = Task("wide", (Input(0, opened[0].slot("wide"), shared=True),), (), look)
    outcome = run(Plan((opened[0],), {}, (task,)), None, memory=64 * MIB)
    assert outcome.values == {0: [(Block(0, 0, 1), math.prod(WIDE))]}


# ------------------------------------------------------------------------------------------------ tasks that follow


def ranged(opened: list[Checkpoint], gathered: list[int]) -> Plan:
    """Both halves scaled by the largest of their sums, which a first task finds, and less the mean, which a second does
    with the first's."""

    def largest(inputs: Tensors, _outputs: Tensors, block: Block) -> float:
        return float((inputs[0].float() + inputs[1].float()).abs().max())

    def sums(inputs: Tensors, _outputs: Tensors, _block: Block, top: float) -> float:
        return float(inputs[0].double().sum()) / top

    def scaled(inputs: Tensors, outputs: Tensors, _block: Block, top: float, total: float) -> None:
        torch.div(inputs[0] - total / 1e6, top, out=outputs[0])

    def first(values: list[float]) -> float:
        gathered.append(len(values))
        return max(values)

    def second(values: list[float], top: float) -> float:
        gathered.append(len(values))
        return math.fsum(values) + top

    inputs = (flat(0, "wide", opened), flat(1, "wide", opened))
    spec = opened[0].tensors["wide"].spec
    tasks = (
        Task("wide", inputs, (), largest, gather=first),
        Task("wide", inputs[:1], (), sums, gather=second, follows=1),
        Task("wide", inputs, (Slot("wide", spec.flat()),), scaled, follows=2),
    )
    return Plan(tuple(opened), {"wide": spec}, tasks)


def test_a_task_that_follows_others_is_given_what_they_found(opened: list[Checkpoint], tmp_path: Path) -> None:
    written = set()
    for memory in MEMORIES:
        for threads in (1, 2, 5):
            gathered: list[int] = []
            outcome = run(ranged(opened, gathered), tmp_path / "out.safetensors", memory=memory, threads=threads,
                          force=True)  # fmt: skip
            assert gathered == [22, 22]  # once, of all blocks
            assert outcome.peak_in_flight <= memory
            written.add(digest(tmp_path / "out.safetensors"))
    assert len(written) == 1
    a, b = (load_file(c.label)["wide"] for c in opened)
    top = float((a.float() + b.float()).abs().max())
    total = float(a.double().sum()) / top + top
    assert outcome.found == {0: top, 1: pytest.approx(total, rel=1e-9)}
    assert outcome.values == {}
    found = load_file(tmp_path / "out.safetensors")["wide"]
    assert torch.allclose(found.double(), (a.double() - total / 1e6) / top, rtol=1e-2, atol=1e-3)


def test_who_follows_a_task_that_fails_does_not_wait_for_ever(opened: list[Checkpoint], tmp_path: Path) -> None:
    def failing(_inputs: Tensors, _outputs: Tensors, block: Block) -> float:
        if block.number == 20:
            raise ValueError("as it is meant to")
        return 0.0

    plan = ranged(opened, [])
    plan = replace(plan, tasks=(replace(plan.tasks[0], compute=failing), *plan.tasks[1:]))
    for threads in (1, 3):
        with pytest.raises(ValueError, match="as it is meant to"):
            run(plan, tmp_path / "out.safetensors", memory=64 * MIB, threads=threads)
        assert list(tmp_path.glob("out*")) == []
        assert no_workers_left()


def test_the_hash_does_not_depend_on_how_often_a_tensor_is_looked_at(opened: list[Checkpoint], tmp_path: Path) -> None:
    once = replace(ranged(opened, []), tasks=tuple(t for t in averaged(opened).tasks if t.name == "wide"))
    looked = run(ranged(opened, []), tmp_path / "a.safetensors", memory=64 * MIB)
    assert looked.hashes == run(once, tmp_path / "b.safetensors", memory=64 * MIB).hashes


# ------------------------------------------------------------------------------------------------ hashes


def test_the_hash_is_of_what_was_read_and_made_as_it_is_written_down(tmp_path: Path) -> None:
    """XXH3-128 over (key, position, XXH3-128 of each block): another program must be able to check it."""
    import xxhash

    data = {"b": random.Random(0).randbytes(5 * BLOCK + 3), "a": b"xyz", "ä": b""}
    path = save_raw(tmp_path / "in", {k: ("U8", [len(d)], d) for k, d in data.items()})
    with open_checkpoint(path) as source:
        outcome = run(copies(source), tmp_path / "out", memory=MIB)
    total = xxhash.xxh3_128()
    for key in ("a", "b"):
        for position in range(0, len(data[key]), BLOCK):
            total.update(f"{key}\0{position}\0".encode())
            total.update(xxhash.xxh3_128_digest(data[key][position : position + BLOCK]))
    assert outcome.hashes == [f"xxh3_128:{total.hexdigest()}"]


def test_the_hash_is_the_same_whether_a_tensor_is_copied_scanned_or_computed_with(
    opened: list[Checkpoint], tmp_path: Path
) -> None:
    both = [replace(averaged(opened), sources=(opened[0], opened[n])) for n in (0, 1)]
    first = replace(
        both[0], tasks=tuple(replace(t, inputs=tuple(replace(i, source=0) for i in t.inputs)) for t in both[0].tasks)
    )
    computed = run(first, tmp_path / "out", memory=64 * MIB)
    copied = run(copies(opened[0]), tmp_path / "copy", memory=256 * MIB)
    scan = tuple(Task(k, (flat(0, k, opened),), (), lambda *_: 1) for k in opened[0].tensors)
    scanned = run(Plan((opened[0],), {}, scan), None, memory=64 * MIB, threads=3)
    assert computed.hashes[0] == copied.hashes[0] == scanned.hashes[0]
    assert computed.hashes[1] == run(Plan((opened[0],), {}, ()), None, memory=MIB).hashes[0]  # nothing was read of it


@pytest.mark.parametrize("index", [0, 1, 2 * MIB, 5 * MIB - 1])
def test_the_hash_differs_when_one_byte_differs(tmp_path: Path, index: int) -> None:
    data = bytearray(random.Random(0).randbytes(5 * MIB))
    hashes = []
    for name in ("before", "after"):
        path = save_raw(tmp_path / name, {"t": ("U8", [len(data)], bytes(data))})
        with open_checkpoint(path) as source:
            hashes += run(copies(source), tmp_path / f"{name}.out", memory=64 * MIB).hashes
        data[index] ^= 1
    assert hashes[0] != hashes[1]


def test_the_hash_tells_which_tensor_holds_which_bytes(tmp_path: Path) -> None:
    hashes = []
    for name, tensors in enumerate(
        ({"a": b"1234", "b": b"5678"}, {"a": b"5678", "b": b"1234"}, {"a": b"1234", "c": b"5678"}, {"a": b"12345678"})
    ):
        path = save_raw(tmp_path / str(name), {k: ("U8", [len(d)], d) for k, d in tensors.items()})
        with open_checkpoint(path) as source:
            hashes += run(copies(source), tmp_path / "out", memory=MIB, force=True).hashes
    assert len(set(hashes)) == 4


def test_the_hash_of_a_tensor_that_is_read_twice_does_not_depend_on_who_reads_last(tmp_path: Path) -> None:
    """As a copy and by rows of the matrix, its blocks begin at the same place and end at different ones."""
    path = save(tmp_path / "a.safetensors", {"w": randn(0, 1000, 2 * BLOCK // 999)})

    def same(inputs: Tensors, outputs: Tensors, _block: Block) -> None:
        outputs[0].copy_(inputs[0])

    with open_checkpoint(path) as source:
        slot = source.slot("w")
        tasks = (
            Task("copy", (Input(0, slot),), (Slot("copy", slot.spec),)),
            Task("rows", (Input(0, slot),), (Slot("rows", slot.spec),), same),
        )
        outputs = {"copy": slot.spec, "rows": slot.spec}
        hashes = {
            run(Plan((source,), outputs, order), tmp_path / "out", memory=4 * MIB, force=True, threads=1).hashes[0]
            for order in (tasks, tasks[::-1])
        }
    assert len(hashes) == 1


def test_the_recipe_tells_the_names_and_hashes_of_the_sources(opened: list[Checkpoint], tmp_path: Path) -> None:
    outcome = run(averaged(opened), tmp_path / "out", memory=64 * MIB)
    with open_checkpoint(tmp_path / "out") as result:
        recipe = json.loads(result.metadata["weightops"])
    assert recipe == {
        "command": "test",
        "inputs": [
            {"name": "a.safetensors", "hash": outcome.hashes[0]},
            {"name": "b.safetensors", "hash": outcome.hashes[1]},
        ],
    }
    assert all(re.fullmatch(r"xxh3_128:[0-9a-f]{32}", h) for h in outcome.hashes)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(tmp_path: Path, bad: float) -> None:
    values = randn(0, 1_000_000, dtype=torch.float16)
    values[999_999] = bad
    path = save(tmp_path / "a.safetensors", {"odd\n": values})
    with open_checkpoint(path) as source:
        plan = copies(source)
        run(plan, tmp_path / "allowed", memory=64 * MIB)
        for refused in (
            replace(plan, refuse_nonfinite=True),
            replace(
                plan,
                tasks=(
                    Task(
                        "odd\n",
                        (flat(0, "odd\n", [source]),) * 2,
                        (Slot("odd\n", source.tensors["odd\n"].spec.flat()),),
                        half,
                    ),
                ),
                refuse_nonfinite=True,
            ),
        ):
            with pytest.raises(ValueRefused) as caught:
                run(refused, tmp_path / "out", memory=64 * MIB)
            assert str(caught.value) == f"{path}: tensor 'odd\\n' holds NaN or Inf"
            assert caught.value.hint == "--allow-nonfinite writes it all the same"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "allowed"]


@pytest.mark.parametrize(
    ("dtype", "hint"), [("F16", "--dtype bf16 or --dtype fp32 can hold it"), ("BF16", "--dtype fp32 may hold it")]
)
def test_a_result_that_the_dtype_cannot_hold_is_refused_by_name(tmp_path: Path, dtype: str, hint: str) -> None:
    path = save(tmp_path / "a.safetensors", {"w": torch.full((100,), 3e38)})

    def twice(inputs: Tensors, outputs: Tensors, _block: Block) -> None:
        outputs[0].copy_(inputs[0].double() * 2)

    with open_checkpoint(path) as source:
        out = Slot("w", TensorSpec(dtype, (100,)))
        task = Task("w", (Input(0, source.slot("w")),), (out,), twice)
        plan = Plan((source,), {"w": out.spec}, (task,), refuse_nonfinite=True)
        with pytest.raises(ValueRefused) as caught:
            run(plan, tmp_path / "out", memory=64 * MIB)
    assert str(caught.value) == f"w: the result is too large for {dtype}, though every input is finite"
    assert caught.value.hint == hint
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there_is_refused_and_nothing_is_left(opened: list[Checkpoint], tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    with pytest.raises(UsageError) as caught:
        run(averaged(opened), tmp_path / "out", memory=64 * MIB, device="cuda:64")
    if count:
        assert str(caught.value) == f"--device: there is no 'cuda:64': torch sees {count} CUDA device(s)"
    else:
        assert str(caught.value) == "--device: 'cuda:64' was asked for, but this torch sees no CUDA device"
    assert list(tmp_path.iterdir()) == []
    assert no_workers_left()


def test_an_output_that_cannot_be_is_refused_before_anything_is_read(opened: list[Checkpoint], tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"mine")
    called = []
    plan = averaged(opened)
    plan = replace(plan, tasks=tuple(replace(t, compute=lambda *_: called.append(1)) for t in plan.tasks))
    with pytest.raises(OutputError, match="exists"):
        run(plan, tmp_path / "out", memory=64 * MIB)
    assert not called
    assert (tmp_path / "out").read_bytes() == b"mine"


# ------------------------------------------------------------------------------------------------ what is reported


def test_progress_grows_to_the_whole_and_comes_from_the_callers_thread(
    opened: list[Checkpoint], tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    threads = set()

    def show(done: int, total: int) -> None:
        seen.append((done, total))
        threads.add(threading.current_thread())

    for _ in range(5):
        seen.clear()
        outcome: Outcome = run(averaged(opened), tmp_path / "out", memory=64 * MIB, on_progress=show, force=True)
        total = 2 * 2 * (math.prod(WIDE) + 8) + 6 * MIB
        assert seen == sorted(set(seen))
        assert seen[-1] == (total, total)
        assert outcome.bytes_read == total
    assert threads == {threading.current_thread()}
    assert outcome.seconds > 0
    assert outcome.bytes_written == (tmp_path / "out").stat().st_size
    assert no_workers_left()
