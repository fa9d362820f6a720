"""Whatever fails, at whatever moment: the run ends, says why, leaves nothing, and changes no input."""

from __future__ import annotations

import _thread
import errno
import hashlib
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import no_workers_left, save, within

from weightops.engine import chunks
from weightops.engine import run as engine
from weightops.engine.run import run
from weightops.errors import FormatError, OutputError, TruncatedError
from weightops.files.checkpoint import Checkpoint, open_checkpoint
from weightops.files.tensor import Slot
from weightops.plan import Block, Input, Plan, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

BLOCK = 256 * 1024
VALUES = 9 * BLOCK + 11  # ten blocks
WORK = 48
MEMORY = 2 * (WORK + 4) * BLOCK  # room for a block or two of the computed tensor: other workers wait

pytestmark = pytest.mark.skipif(not hasattr(os, "pwrite"), reason="this system writes at one position only")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested holds for any of these numbers, which are a matter of speed; with small ones, files are small."""
    monkeypatch.setattr(chunks, "BLOCK_VALUES", BLOCK)
    monkeypatch.setattr(chunks, "CHUNK_MIN", 1 << 20)
    monkeypatch.setattr(chunks, "CHUNK_MAX", 8 << 20)
    monkeypatch.setattr(chunks, "SHARE", 64)


def same(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block) -> None:
    outputs[0].copy_(inputs[0])


@pytest.fixture(params=["unnamed", "named"])
def naming(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As with O_TMPFILE, and as on a system without it, where the file in the making has a hidden name."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return str(request.param)


class Case:
    """A small plan with its input: a copy of a tensor, then the same values computed, in ten chunks."""

    def __init__(self, folder: Path, compute: Callable[..., Any] = same) -> None:
        self.folder = folder
        self.path = save(folder / "in.safetensors", {"w": torch.arange(VALUES).to(torch.float16)})
        os.utime(self.path, (1e9, 1e9))  # so that any change is seen, however coarse the clock of the file system
        self.digest = self.hash()
        self.source = open_checkpoint(self.path)
        spec = self.source.tensors["w"].spec
        self.plan = Plan(
            (self.source,),
            {"copied": spec, "computed": spec.flat()},
            (
                Task("copied", (Input(0, self.source.slot("w")),), (Slot("copied", spec),)),
                Task(
                    "computed",
                    (Input(0, self.source.slot("w")),),
                    (Slot("computed", spec.flat()),),
                    compute,
                    work_nbytes=WORK * BLOCK,
                ),
            ),
        )

    def hash(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def run(self, output: str = "out.safetensors", threads: int = 2, **rest: Any) -> Any:
        path = self.folder / output
        return within(20, lambda: run(self.plan, path, memory=MEMORY, threads=threads, **rest))

    def nothing_is_left(self) -> bool:
        assert [p.name for p in self.folder.iterdir()] == ["in.safetensors"]
        assert no_workers_left()
        return True


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    made = Case(tmp_path)
    yield made
    made.source.close()


def count_writes(case: Case, monkeypatch: pytest.MonkeyPatch, fail_at: int = -1, number: int = 0) -> list[int]:
    """Let the write with this index fail; the list grows by one for each write."""
    writes: list[int] = []
    lock = threading.Lock()
    really = os.pwrite

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        with lock:
            writes.append(offset)
            if len(writes) == fail_at + 1:
                raise OSError(number, os.strerror(number))
        return really(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return writes


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_write_may_fail_at_any_moment(case: Case, naming: str, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    with monkeypatch.context() as patch:
        writes = count_writes(case, patch)
        size = case.run().bytes_written
        total = len(writes)
    assert total >= 14  # the first header, the chunks, and the final header
    (case.folder / "out.safetensors").unlink()
    output = case.folder / "out.safetensors"
    for k in range(total):
        with monkeypatch.context() as patch:
            writes = count_writes(case, patch, k, number)
            with pytest.raises(OutputError) as caught:
                case.run(threads=1 + k % 2)
        assert len(writes) > k
        if number == errno.EIO:
            assert str(caught.value) == f"{output}: cannot be written at byte {writes[k]:,}: Input/output error"
        else:
            assert str(caught.value) == f"{output}: no room: the file takes {size:,} bytes"
            assert caught.value.hint == "free some space, or write elsewhere"
        assert caught.value.exit_code == 1
        assert case.nothing_is_left(), k
        assert case.hash() == case.digest
    case.run()


def test_short_writes_are_continued(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.run("whole")
    really = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: really(fd, data[:100_001], offset))
    case.run("pieces")
    assert (case.folder / "pieces").read_bytes() == (case.folder / "whole").read_bytes()


def test_a_failing_fsync_is_an_error_and_nothing_is_left(
    case: Case, naming: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError) as caught:
        case.run()
    output = case.folder / "out.safetensors"
    assert str(caught.value) == f"{output}: cannot be written to the disk: Input/output error"
    assert case.nothing_is_left()


# ------------------------------------------------------------------------------------------------ reading


def test_an_input_that_is_cut_while_it_is_read_is_an_error(tmp_path: Path, naming: str) -> None:
    def cut(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block) -> None:
        if block.number == 0:
            os.truncate(case.path, 3000)
        same(inputs, outputs, block)

    case = Case(tmp_path, cut)
    with case.source, pytest.raises(TruncatedError) as caught:
        case.run()
    assert str(caught.value) == (
        f"{case.path}: ends at byte 3,000, expected {case.source.nbytes:,} bytes: it was cut while it was read"
    )
    assert case.nothing_is_left()


def test_an_input_that_is_changed_while_it_is_read_is_an_error(tmp_path: Path, naming: str) -> None:
    def change(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block) -> None:
        if block.number == 9:
            with case.path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"!")
        same(inputs, outputs, block)

    case = Case(tmp_path, change)
    with case.source, pytest.raises(FormatError) as caught:
        case.run()
    assert str(caught.value) == f"{case.path}: was changed while it was read"
    assert caught.value.hint == "run again when nothing writes to it"
    assert case.nothing_is_left()


def test_an_input_that_is_replaced_while_it_is_read_is_read_as_it_was(tmp_path: Path) -> None:
    def replace(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block) -> None:
        if block.number == 0:
            (tmp_path / "new").write_bytes(b"something else")
            (tmp_path / "new").rename(case.path)
        same(inputs, outputs, block)

    case = Case(tmp_path, replace)
    with case.source:
        case.run()
    with open_checkpoint(tmp_path / "out.safetensors") as result:
        found = memoryview(bytearray(2 * VALUES))
        result.read_bytes(result.slot("computed"), 0, 2 * VALUES, found)
    assert found == torch.arange(VALUES).to(torch.float16).numpy().tobytes()


@pytest.mark.parametrize("k", [0, 1, 5, 11])
def test_a_read_may_fail_at_any_moment(case: Case, naming: str, monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    reads: list[int] = []
    really = Checkpoint.read_bytes

    def read_bytes(self: Checkpoint, slot: Slot, start: int, stop: int, out: memoryview) -> None:
        reads.append(start)
        if len(reads) == k + 1:
            raise FormatError(self.label, "cannot be read at byte 7: Input/output error")
        really(self, slot, start, stop, out)

    monkeypatch.setattr(Checkpoint, "read_bytes", read_bytes)
    with pytest.raises(FormatError, match=r"cannot be read at byte 7: Input/output error$"):
        case.run()
    assert case.nothing_is_left()


# ------------------------------------------------------------------------------------------------ computing


class Bug(Exception):
    """Not a mistake of the user's."""


@pytest.mark.parametrize("number", [0, 4, 9])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_computation_comes_out_as_it_is(tmp_path: Path, naming: str, number: int, threads: int) -> None:
    def fail(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block) -> None:
        if block.number == number:
            raise Bug(f"in block {block.number}")
        same(inputs, outputs, block)

    case = Case(tmp_path, fail)
    with case.source, pytest.raises(Bug, match=f"in block {number}") as caught:
        case.run(threads=threads)
    assert any(frame.name == "fail" for frame in caught.traceback)  # a bug of ours keeps its traceback
    assert case.nothing_is_left()


def test_the_first_error_is_the_one_that_is_raised(tmp_path: Path) -> None:
    together = threading.Barrier(3)

    def fail(_inputs: Sequence[Tensor], _outputs: Sequence[Tensor], block: Block) -> None:
        together.wait(10)
        time.sleep(0.05 * block.number)
        raise Bug(f"in block {block.number}")

    case = Case(tmp_path, fail)
    with case.source, pytest.raises(Bug, match="in block 0"):
        within(20, lambda: run(case.plan, tmp_path / "out", memory=8 * MEMORY, threads=3))
    assert case.nothing_is_left()


def test_torch_that_cannot_be_imported_is_an_error_and_no_hang(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "weightops.engine.tensors", None)
    with pytest.raises(ImportError):
        case.run()
    assert case.nothing_is_left()


@pytest.mark.parametrize("began", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
def test_a_thread_that_cannot_be_started_is_an_error_and_no_hang(
    case: Case, monkeypatch: pytest.MonkeyPatch, error: BaseException, began: bool
) -> None:
    """Ctrl-C may come just before the thread is there, or just after."""
    started: list[threading.Thread] = []
    really = threading.Thread.start

    def start(self: threading.Thread) -> None:
        if self.name == "weightops":
            started.append(self)
            if len(started) == 3:
                if began:
                    really(self)
                raise error
        really(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(type(error)):
        case.run(threads=4)
    assert len(started) == 3
    assert case.nothing_is_left()


# ------------------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("error", [KeyboardInterrupt, Bug])
def test_what_is_raised_while_progress_is_shown_ends_the_run(case: Case, naming: str, error: type[Exception]) -> None:
    def show(_done: int, _total: int) -> None:
        raise error

    with pytest.raises(error):
        case.run(on_progress=show)
    assert case.nothing_is_left()
    assert case.hash() == case.digest


@pytest.mark.parametrize("number", [0, 5])
def test_ctrl_c_ends_the_run(tmp_path: Path, naming: str, number: int) -> None:
    def interrupt(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block) -> None:
        if block.number == number:
            _thread.interrupt_main()
            time.sleep(0.1)
        same(inputs, outputs, block)

    case = Case(tmp_path, interrupt)
    with case.source, pytest.raises(KeyboardInterrupt):
        run(case.plan, tmp_path / "out.safetensors", memory=MEMORY, threads=2)
    assert case.nothing_is_left()
    assert case.hash() == case.digest


def test_buffers_are_let_go_after_an_error(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Seen(engine.Buffers):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(engine, "Buffers", Seen)
    count_writes(case, monkeypatch, 9, errno.EIO)
    with pytest.raises(OutputError):
        case.run()
    assert made
    assert not any(buffers._held for buffers in made)
