"""Run a Plan: read, compute, write, overlapped, in bounded memory.

Each worker takes a chunk through its whole life: read, compute, write. Reads and writes release the
interpreter's lock, so while one worker waits for a disk another computes; and the bytes are still in the cache
of the core that read them when they are written, which measured faster than handing them from a reader
thread to a compute thread to a writer thread. One feeder (whoever holds its lock) hands chunks out in plan order.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from weightops.engine.budget import Budget, Cancelled
from weightops.engine.buffers import Buffers
from weightops.engine.chunks import (
    Chunk,
    check_memory,
    chunk_target,
    cut,
    is_work,
    slot_span,
    smallest_memory,
    task_rows,
)
from weightops.engine.finite import first_nonfinite
from weightops.engine.raw import compute_raw
from weightops.errors import ValueRefused, quote
from weightops.files.folder import FolderWriter
from weightops.files.held import Held
from weightops.files.writer import SafetensorsWriter
from weightops.plan import Block, Grain

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from weightops.files.tensor import Slot
    from weightops.plan import Input, Plan, Task

EXTRA_WORKERS = 2  # where workers wait for something other than the processor
LOOK_AHEAD = 16  # chunks whose bytes the operating system is asked to fetch before they are read

Progress = Callable[[int, int], None]

# (key, bands, start, stop) of what was read of a tensor -> the hash of these bytes. Both ends, for two tasks may
# read one tensor in blocks of different heights.
Leaf = tuple[str, tuple[tuple[int, int], ...], int, int]
Leaves = dict[Leaf, bytes]


def ignore(done: int, total: int) -> None:
    """No progress is shown."""


@dataclass(slots=True)
class Outcome:
    """What a run did: bytes, seconds, chunks, the hash of what was read of each source, a scan's values by task.

    found: what the tasks that gather have gathered, by their numbers.

    leaves: of each source, what its hash is made of.
    """

    seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    chunks: int = 0
    peak_in_flight: int = 0
    hashes: list[str] = field(default_factory=list)
    leaves: list[Leaves] = field(default_factory=list)
    values: dict[int, list[Any]] = field(default_factory=dict)
    found: dict[int, Any] = field(default_factory=dict)


class Beside(Protocol):
    """Another file that belongs to the output, and appears just before it: of a run that fails, neither is there."""

    def commit(self, outcome: Outcome) -> None:
        """Let it appear, whole. The output is on the disk by then, and has no name yet."""

    def withdraw(self) -> None:
        """Take it away again, if it has appeared: the output has not."""


def import_torch_ahead() -> None:
    """Begin to import torch, which takes a second, while a plan that will need it is made."""

    def load() -> None:
        with contextlib.suppress(Exception):  # the run imports it again, and says what is wrong
            _import_tensors()

    if "torch" not in sys.modules:
        with contextlib.suppress(RuntimeError):  # no thread to be had
            threading.Thread(target=load, name="weightops-torch", daemon=True).start()


def _import_tensors() -> ModuleType:
    collecting = gc.isenabled()
    gc.disable()  # an import makes many objects and hardly any garbage; looking for it takes a tenth of the time
    try:
        return importlib.import_module("weightops.engine.tensors")
    finally:
        if collecting:
            gc.enable()


def usable_cores() -> int:
    """The cores that this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(
    plan: Plan,
    output: Path | Held | None,
    *,
    memory: int,
    device: str = "cpu",
    threads: int | None = None,
    force: bool = False,
    on_progress: Progress = ignore,
    beside: Beside | None = None,
) -> Outcome:
    """Carry out `plan`; with outputs, the file or folder `output` appears whole or not at all, or is held in memory.

    memory: bytes in flight. device: auto, cpu, cuda, cuda:N. threads: blocks computed at once on the CPU
    (None: the usable cores). on_progress(done, total) is called from this thread, in bytes.
    Raises MemoryRefused, ValueRefused, OutputError, FormatError, TruncatedError.
    """
    started = time.perf_counter()
    check_memory(plan, memory)
    writer = _open_writer(plan, output, force=force) if plan.outputs or plan.files else None
    try:
        outcome = _Run(plan, writer, memory, device, threads or usable_cores()).go(on_progress)
        for source in plan.sources:
            source.check_unchanged()
        if writer is not None:
            beforehand = None if beside is None else lambda: beside.commit(outcome)
            of_variants = [_hashes_of(variant, outcome.leaves) for variant in plan.variants]
            metadata = plan.file_metadata(outcome.hashes, of_variants)
            outcome.bytes_written = writer.commit(*metadata, beforehand=beforehand)
    except BaseException:
        if beside is not None and (writer is None or not writer.published):
            beside.withdraw()
        raise
    finally:
        if writer is not None:
            writer.close()
    outcome.seconds = time.perf_counter() - started
    return outcome


def _open_writer(plan: Plan, output: Path | Held | None, *, force: bool) -> SafetensorsWriter | FolderWriter | Held:
    assert output is not None
    if isinstance(output, Held):
        output.begin(plan.outputs, plan.files, plan.extras)
        return output
    metadata = plan.file_metadata([PLACEHOLDER] * len(plan.sources))
    inputs = [file for source in plan.sources for file in source.files]
    if not plan.files:
        return SafetensorsWriter(
            output, plan.outputs, metadata[0], data_hashes=plan.data_hashes, header=plan.header,
            force=force, inputs=inputs,
        )  # fmt: skip
    return FolderWriter(
        output, plan.outputs, plan.files, metadata, extras=plan.extras, data_hashes=plan.data_hashes,
        force=force, inputs=inputs,
    )  # fmt: skip


PLACEHOLDER = "xxh3_128:" + "0" * 32

# What to do about a value that is too large for a dtype, where BF16 would not do.
_WIDER: dict[str, str | None] = {"BF16": "--dtype fp32 may hold it", "F32": None, "F64": None}


class _Run:
    """The state that the workers of one run share."""

    def __init__(
        self, plan: Plan, writer: SafetensorsWriter | FolderWriter | Held | None, memory: int, device: str, threads: int
    ) -> None:
        self.plan = plan
        self.writer = writer
        self.device = device
        self.threads = threads
        # More workers than chunks that fit into the memory would only hold buffers.
        most = max(1, memory // (2 * chunk_target(memory)))
        self.workers = min(threads, most)
        self.extra = min(threads + EXTRA_WORKERS, most) - self.workers
        # Three quarters are the workers' own, to keep from one chunk to the next: a new buffer costs ten times what
        # reading into an old one does. The budget gives what a chunk takes beyond that, the largest piece of work too.
        workers = self.workers + self.extra
        self.keep = min(3 * memory // (4 * workers), (memory - smallest_memory(plan)[0]) // max(workers - 1, 1))
        self.kept = self.keep * workers
        self.budget = Budget(memory - self.kept)
        self.total = sum(slot.spec.nbytes for task in plan.tasks for slot in _measure(task))
        self.done = 0
        self.bytes_read = 0
        self.chunks = 0
        self.error: BaseException | None = None
        self.leaves: list[Leaves] = [{} for _ in plan.sources]
        self.values: dict[int, dict[int, Any]] = {}
        self.found: dict[int, Any] = {}  # by the numbers of tasks that are whole, of those that gather
        self._rows_done: dict[int, int] = {}
        self._live: set[threading.Lock] = set()  # one for each thread, to be taken by who answers for its end
        self._ended = threading.Condition()
        self._feed = threading.Lock()
        # A chunk takes no more than chunk_target, a sixth where much is shared, or one block: each fits beside what the
        # other workers keep.
        self._chunks = self._looking_ahead(cut(plan, memory))
        self._state = threading.Lock()
        self._whole = threading.Condition(self._state)
        self._computing = threading.Semaphore(threads)
        self._torch_ready = threading.Event()

    # ------------------------------------------------------------------ the caller's thread

    def go(self, on_progress: Progress) -> Outcome:
        shown = -1
        try:
            if any(task.needs_torch for task in self.plan.tasks):
                self._start(1, self._import_torch)
            self._start(self.workers, self._work)
            # Where the system fetches ahead, a worker hardly waits, and more of them would only take turns.
            if not all(source.fetches_ahead for source in self.plan.sources):
                self._start_extra()
            while not self._all_ended(0.05):
                if self.done != shown:
                    shown = self.done
                    on_progress(shown, self.total)
        except BaseException as e:
            self._fail(e)
            self._all_ended(None)
        if self.error is not None:
            raise self.error
        if self.done != shown:
            on_progress(self.done, self.total)
        return Outcome(
            bytes_read=self.bytes_read,
            chunks=self.chunks,
            peak_in_flight=self.kept + self.budget.peak if self.chunks else 0,
            hashes=[hash_of(leaves) for leaves in self.leaves],
            leaves=self.leaves,
            values={n: [found[i] for i in sorted(found)] for n, found in self.values.items()},
            found=self.found,
        )

    def _start(self, count: int, target: Callable[[], None]) -> None:
        for _ in range(count):
            claim = threading.Lock()
            try:
                with self._ended:
                    self._live.add(claim)
                threading.Thread(target=self._run, args=(target, claim), name="weightops", daemon=True).start()
            except BaseException:  # the system has no thread to give, or Ctrl-C: then the thread may run all the same
                if claim.acquire(blocking=False):
                    self._end(claim)
                raise

    def _start_extra(self) -> None:
        count, self.extra = self.extra, 0
        self._start(count, self._work)

    def _run(self, target: Callable[[], None], claim: threading.Lock) -> None:
        if not claim.acquire(blocking=False):
            return  # given up before it began
        try:
            target()
        except BaseException as e:
            self._fail(e)
        finally:
            self._end(claim)

    def _end(self, claim: threading.Lock) -> None:
        with self._ended:
            self._live.discard(claim)
            self._ended.notify_all()

    def _all_ended(self, seconds: float | None) -> bool:
        # Counted rather than joined: a join that Ctrl-C breaks into takes the thread for ended (CPython issue 90882).
        with self._ended:
            return self._ended.wait_for(lambda: not self._live, seconds)

    def _fail(self, error: BaseException) -> None:
        with self._state:
            if self.error is None:
                self.error = error
        self.budget.cancel()
        self._torch_ready.set()
        with self._whole:
            self._whole.notify_all()

    def _import_torch(self) -> None:
        tensors = _import_tensors()
        self.device = tensors.resolve_device(self.device)
        tensors.set_cpu_threads()
        if self.device != "cpu":
            self._start_extra()  # some copy to and from the device while others read and write
        self._torch_ready.set()

    # ------------------------------------------------------------------ the workers' threads

    def _looking_ahead(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The chunks as they come, the bytes of those that follow announced a batch at a time."""
        ready: list[Chunk] = []
        while True:
            ahead = list(itertools.islice(chunks, LOOK_AHEAD))
            wanted: dict[int, list[tuple[Slot, int, int]]] = {}
            for chunk in ahead:
                for entry in chunk.task.inputs:
                    wanted.setdefault(entry.source, []).append((entry.slot, *_span(chunk, entry.slot, entry.shared)))
            for number, spans in wanted.items():
                self.plan.sources[number].will_need(spans)
            yield from ready
            if not ahead:
                return
            ready = ahead

    def _next(self) -> Chunk | None:
        with self._feed:
            chunk = next(self._chunks, None)
            if chunk is not None:
                # Taken whole, and in plan order, while the lock is held: a later chunk cannot starve this one.
                self.budget.take(self._beyond(chunk))
            return chunk

    def _beyond(self, chunk: Chunk) -> int:
        return max(chunk.cost - self.keep, 0)

    def _work(self) -> None:
        buffers = Buffers()
        try:
            while (chunk := self._next()) is not None:
                try:
                    self._chunk(chunk, buffers)
                finally:
                    buffers.trim(self.keep)
                    self.budget.give(self._beyond(chunk))
        except Cancelled:
            pass
        finally:
            buffers.trim(0)

    def _chunk(self, chunk: Chunk, buffers: Buffers) -> None:
        task = chunk.task
        if self.budget.cancelled:
            raise Cancelled
        if task.needs_torch and self._torch_ready.is_set():
            buffers.attach(self.device)
        spans = [_span(chunk, slot) for slot in task.outputs]
        needed = {("in", n): _nbytes(_span(chunk, i.slot, i.shared)) for n, i in enumerate(task.inputs)}
        if task.compute is not None:
            needed |= {("out", n): _nbytes(span) for n, span in enumerate(spans)}
        buffers.make_room(needed, max(chunk.cost, self.keep) - task.work_nbytes)
        inputs, nbytes, again = self._read(chunk, buffers)
        with self._computing:
            self._hash(chunk, inputs)
        if task.needs_torch:
            self._torch_ready.wait()
            if self.budget.cancelled:
                raise Cancelled
        followed = self._wait_for_followed(chunk)
        with self._computing:
            outputs = inputs * len(task.outputs)
            if task.compute is not None:
                compute = buffers.attach(self.device).compute if task.needs_torch else compute_raw
                outputs = [buffers.get(("out", n), _nbytes(span)) for n, span in enumerate(spans)]
                self._collect(chunk, compute(chunk, inputs, outputs, followed), followed)
            if self.plan.refuse_nonfinite:
                self._check_finite(chunk, inputs, outputs)
        if self.writer is not None:
            for slot, (start, stop), buffer in zip(task.outputs, spans, outputs, strict=True):
                self.writer.write_bytes(slot, start, stop, buffer)
        with self._state:
            self.done += nbytes - again if task.inputs else sum(map(_nbytes, spans))
            self.bytes_read += nbytes
            self.chunks += 1

    def _read(self, chunk: Chunk, buffers: Buffers) -> tuple[list[memoryview], int, int]:
        """The chunk's inputs, the bytes that were read, and how many of them an earlier chunk has read before."""
        inputs = []
        nbytes = again = 0
        for number, entry in enumerate(chunk.task.inputs):
            start, stop = _span(chunk, entry.slot, entry.shared)
            role = "in", number
            buffer = buffers.get(role, stop - start)
            read = functools.partial(self.plan.sources[entry.source].read_bytes, entry.slot, start, stop, buffer)
            # What all chunks of a task share may lie here since the last one.
            filled = buffers.fill(role, chunk.number if entry.shared else None, read)
            inputs.append(buffer)
            nbytes += stop - start if filled else 0
            again += stop - start if filled and entry.shared and chunk.start else 0
        return inputs, nbytes, again

    def _wait_for_followed(self, chunk: Chunk) -> list[Any]:
        """What the tasks have gathered that this one follows.

        Their chunks were handed out before this one, with all that they need: other workers have them, and end them.
        """
        wanted = range(chunk.number - chunk.task.follows, chunk.number)
        with self._whole:
            self._whole.wait_for(lambda: self.budget.cancelled or all(n in self.found for n in wanted))
            if self.budget.cancelled:
                raise Cancelled
            return [self.found[n] for n in wanted]

    def _collect(self, chunk: Chunk, values: list[Any], followed: list[Any]) -> None:
        task, number = chunk.task, chunk.number
        if task.gather is None and all(v is None for v in values):
            return
        with self._state:
            of_blocks = self.values.setdefault(number, {})
            of_blocks.update((block.number, v) for block, v in zip(chunk.blocks(), values, strict=True))
            if task.gather is None:
                return
            self._rows_done[number] = self._rows_done.get(number, 0) + chunk.stop - chunk.start
            if self._rows_done[number] < task_rows(task):
                return
            del self.values[number]
        gathered = task.gather([of_blocks[n] for n in sorted(of_blocks)], *followed)
        with self._whole:
            self.found[number] = gathered
            self._whole.notify_all()

    def _hash(self, chunk: Chunk, inputs: list[memoryview]) -> None:
        """Hash each block of each input while it is hot in the cache; blocks do not depend on the chunking."""
        import xxhash

        for entry, buffer in zip(chunk.task.inputs, inputs, strict=True):
            leaves = self.leaves[entry.source]
            if entry.shared and chunk.start:
                continue
            begin, _ = _span(chunk, entry.slot, entry.shared)
            for leaf in _leaves_of(chunk, entry):
                if leaf not in leaves:  # another look at the same bytes
                    leaves[leaf] = xxhash.xxh3_128_digest(buffer[leaf[2] - begin : leaf[3] - begin])

    def _check_finite(self, chunk: Chunk, inputs: list[memoryview], outputs: list[memoryview]) -> None:
        copied = chunk.task.compute is None  # the same bytes to each output
        for slot, buffer in zip(chunk.task.outputs[: 1 if copied else None], outputs, strict=not copied):
            if first_nonfinite(buffer, slot.spec.dtype) is None:
                continue
            for entry, given in zip(chunk.task.inputs, inputs, strict=True):
                if self._holds_nonfinite(chunk, entry, given):
                    raise ValueRefused(
                        self.plan.sources[entry.source].label,
                        f"tensor {quote(entry.slot.key)} holds NaN or Inf",
                        "--allow-nonfinite writes it all the same",
                    )
            raise ValueRefused(
                slot.key if slot.key.isprintable() else quote(slot.key),
                f"the result is too large for {slot.spec.dtype}, though every input is finite",
                _WIDER.get(slot.spec.dtype, "--dtype bf16 or --dtype fp32 can hold it"),
            )

    def _holds_nonfinite(self, chunk: Chunk, entry: Input, given: memoryview) -> bool:
        """Does an input hold NaN or Inf: what the chunk has of it, or, as looks see it all, any of it?

        What the chunk has is read over.
        """
        if first_nonfinite(given, entry.slot.spec.dtype) is not None:
            return True
        if entry.shared or chunk.task.compute is None or chunk.task.grain is Grain.TENSOR:
            return False
        height, rows = chunk.stop - chunk.start, task_rows(chunk.task)
        for first in range(0, rows, height):
            start, stop = slot_span(chunk.task, entry.slot, first, min(first + height, rows), shared=False)
            self.plan.sources[entry.source].read_bytes(entry.slot, start, stop, given[: stop - start])
            if first_nonfinite(given[: stop - start], entry.slot.spec.dtype) is not None:
                return True
        return False


def _measure(task: Task) -> Iterable[Slot]:
    """The slots whose bytes tell how far a task is: what it reads, or what it fills if it reads nothing."""
    return [entry.slot for entry in task.inputs] or task.outputs


def _span(chunk: Chunk, slot: Slot, shared: bool = False) -> tuple[int, int]:
    """The bytes of the slot that the chunk reads or fills."""
    return slot_span(chunk.task, slot, chunk.start, chunk.stop, shared=shared)


def _leaves_of(chunk: Chunk, entry: Input) -> Iterator[Leaf]:
    """What is hashed apart of an input: what each block reads of it."""
    for block in chunk.blocks() if not entry.shared else [Block(0, 0, 0)]:
        start, stop = slot_span(chunk.task, entry.slot, block.start, block.stop, shared=entry.shared)
        yield entry.slot.key, entry.slot.bands or (), start, stop


def _hashes_of(variant: Plan, leaves: Sequence[Leaves]) -> list[str]:
    """The hash of each source that the variant would have had if it had run alone: of what it reads."""
    own: list[Leaves] = [{} for _ in variant.sources]
    for task in variant.tasks:
        chunk = Chunk(task, 0, 0, task_rows(task), 0)
        for entry in task.inputs if chunk.stop and is_work(task) else ():
            own[entry.source].update((leaf, leaves[entry.source][leaf]) for leaf in _leaves_of(chunk, entry))
    return [hash_of(found) for found in own]


def _nbytes(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def hash_of(leaves: Leaves) -> str:
    """One hash of all that was read of a source, in the order of keys and positions.

    XXH3-128 over (key, position, XXH3-128 of the block's bytes); a block's height follows from its tensor's shape.
    """
    import xxhash

    total = xxhash.xxh3_128()
    for (key, _, position, _), digest in sorted(leaves.items()):
        total.update(f"{key}\0{position}\0".encode())
        total.update(digest)
    return "xxh3_128:" + total.hexdigest()
