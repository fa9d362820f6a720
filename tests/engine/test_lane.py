"""The lane of a CUDA device, played on the CPU: what is page-locked and when it is waited for."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import no_workers_left, save, within
from safetensors.torch import load_file

from weightops.engine import chunks, tensors
from weightops.engine.run import Outcome, run
from weightops.files.checkpoint import open_checkpoint
from weightops.files.tensor import Slot
from weightops.plan import Block, Input, Plan, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

MIB = 1 << 20
VALUES = 12 * 256 * 1024 + 5


class Played:
    """Stands for torch.cuda: one device, which is the CPU, and what was asked of it."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.log: list[str] = []
        self.by: list[int] = []  # in which thread
        self.refuse_at = -1

    def note(self, what: str) -> None:
        self.log.append(what)
        self.by.append(threading.get_ident())

    # The names are those of torch.cuda and of the CUDA runtime.
    def cudart(self) -> Played:
        return self

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 0
        assert address not in self.registered
        assert address % os.sysconf("SC_PAGE_SIZE") == 0
        if self.log.count("register") == self.refuse_at:
            return 2
        self.note("register")
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.note("unregister")
        del self.registered[address]
        return 0

    def Stream(self, _device: torch.device) -> Any:
        played = self

        class Stream:
            def synchronize(self) -> None:
                played.note("synchronize")

        return Stream()


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    made = Played()
    monkeypatch.setattr(chunks, "BLOCK_VALUES", 256 * 1024)
    monkeypatch.setattr(tensors, "resolve_device", lambda _: "cpu:0")  # not "cpu", whose lane is another
    for name in ("cudart", "Stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    return made


def lerp(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block) -> None:
    torch.lerp(inputs[0], inputs[1], 0.25, out=outputs[0])


def play(folder: Path, compute: Callable[..., Any], threads: int = 3) -> Outcome:
    given = {"a": torch.ones(VALUES), "b": torch.full((VALUES,), 5.0)}
    with open_checkpoint(save(folder / "in.safetensors", given)) as source:
        slots = {key: source.slot(key) for key in given}
        tasks = (
            Task("copy", (Input(0, slots["a"]),), (slots["a"],)),
            Task("lerp", (Input(0, slots["a"]), Input(0, slots["b"])), (Slot("out", slots["a"].spec),), compute),
        )
        plan = Plan((source,), {"a": slots["a"].spec, "out": slots["a"].spec}, tasks)
        path = folder / "out.safetensors"
        return within(20, lambda: run(plan, path, memory=64 * MIB, threads=threads, device="cuda"))


def test_a_device_runs_the_plan_and_its_buffers_are_given_back(played: Played, tmp_path: Path) -> None:
    outcome = play(tmp_path, lerp)
    found = load_file(tmp_path / "out.safetensors")
    assert found["a"].equal(torch.ones(VALUES))
    assert found["out"].equal(torch.full((VALUES,), 2.0))
    assert outcome.chunks > 13
    assert played.log.count("synchronize") == 13
    assert played.log.count("register") == played.log.count("unregister") > 0
    assert played.registered == {}


def test_an_error_waits_for_the_device_before_the_buffers_go(played: Played, tmp_path: Path) -> None:
    def fail(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block) -> None:
        failed.append(threading.get_ident())
        raise ZeroDivisionError

    failed: list[int] = []
    with pytest.raises(ZeroDivisionError):
        play(tmp_path, fail, threads=1)
    for worker in failed:
        log = [what for what, by in zip(played.log, played.by, strict=True) if by == worker]
        assert log.index("synchronize") < log.index("unregister")
    assert played.registered == {}
    assert no_workers_left()


@pytest.mark.parametrize("refuse_at", [0, 1, 2])
def test_memory_that_cannot_be_page_locked_is_an_error_and_no_hang(
    played: Played, tmp_path: Path, refuse_at: int
) -> None:
    played.refuse_at = refuse_at
    with pytest.raises(MemoryError, match=r"^cudaHostRegister of [\d,]+ bytes failed with CUDA error 2$"):
        play(tmp_path, lerp, threads=1)
    assert played.registered == {}
    assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]


def test_auto_takes_a_device_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, found in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert tensors.resolve_device("auto") == found
        assert tensors.resolve_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert tensors.resolve_device("cuda") == "cuda"
    assert tensors.resolve_device("cuda:1") == "cuda:1"
    assert isinstance(tensors.make_lane("cpu"), tensors.CpuLane)
