"""What a run writes: one file or a folder of them, each with the recipe and, where asked for, the hash of its data."""

from __future__ import annotations

import hashlib
import json
import os
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from conftest import no_workers_left, save_raw, within

from weightops.engine import chunks
from weightops.engine.run import run
from weightops.errors import OutputError
from weightops.files.checkpoint import open_checkpoint
from weightops.files.folder import OutputFile, shards
from weightops.files.tensor import Slot, TensorSpec
from weightops.plan import Block, Input, Plan, Task

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from weightops.files.checkpoint import Checkpoint

MIB = 1 << 20
BLOCK = 64 * 1024
SIZES = {"unet.a": 3 * BLOCK + 5, "unet.b": 7, "unet.c": 0, "vae.d": 2 * BLOCK, "vae.e": 12}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested holds for any of these numbers, which are a matter of speed; with small ones, files are small."""
    monkeypatch.setattr(chunks, "BLOCK_VALUES", BLOCK)
    monkeypatch.setattr(chunks, "CHUNK_MIN", 1 << 16)
    monkeypatch.setattr(chunks, "CHUNK_MAX", 2 << 20)


def inverted(inputs: Sequence[memoryview], outputs: Sequence[memoryview], _block: Block) -> None:
    outputs[0][:] = inputs[0].tobytes().translate(bytes(range(255, -1, -1)))


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Checkpoint]:
    chance = random.Random(0)
    given = {key: ("U8", [size], chance.randbytes(size)) for key, size in SIZES.items()}
    with open_checkpoint(save_raw(tmp_path / "in.safetensors", given)) as opened:
        yield opened


def folder_plan(source: Checkpoint, **rest: Any) -> Plan:
    """Copies of the one half, the other inverted, as two components, the first in shards."""
    outputs = {key: info.spec for key, info in source.tensors.items()}
    unet = {key: spec for key, spec in outputs.items() if key.startswith("unet.")}
    files, index = shards(unet, "model", 3 * BLOCK, folder="unet", names={k: k[5:] for k in unet})
    vae = OutputFile("vae/model.safetensors", {"vae.d": "d", "vae.e": "e"}, {"format": "np", "of": "vae"})
    extras = {**index, "model_index.json": json.dumps({n: ["diffusers", "Model"] for n in ("unet", "vae")}).encode()}
    tasks = tuple(
        Task(
            key, (Input(0, source.slot(key)),), (source.slot(key),), inverted if key < "unet.b" else None,
            raw=key < "unet.b",
        )
        for key in outputs
    )  # fmt: skip
    given = {"metadata": {"format": "pt"}, "recipe": {"command": "test"}, "files": (*files, vae), "extras": extras}
    return Plan((source,), outputs, tasks, **{**given, **rest})


def data_of(source: Checkpoint, key: str) -> bytes:
    out = bytearray(source.tensors[key].spec.nbytes)
    source.read_bytes(source.slot(key), 0, len(out), memoryview(out))
    return bytes(out)


def held(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_is_read_again_as_what_it_was_made_of(source: Checkpoint, tmp_path: Path) -> None:
    plan = folder_plan(source)
    outcome = run(plan, tmp_path / "out", memory=MIB)
    with open_checkpoint(tmp_path / "out") as result:
        assert (result.container, result.components) == ("diffusers", ("unet", "vae"))
        assert {key: info.spec for key, info in result.tensors.items()} == plan.outputs
        for key in SIZES:
            wanted = data_of(source, key)
            if key == "unet.a":
                wanted = bytes(255 - b for b in wanted)
            assert data_of(result, key) == wanted
    found = held(tmp_path / "out")
    assert found.keys() == {file.path for file in plan.files} | plan.extras.keys()
    assert outcome.bytes_written == sum(map(len, found.values()))


def test_the_recipe_stands_in_each_file(source: Checkpoint, tmp_path: Path) -> None:
    plan = folder_plan(source)
    outcome = run(plan, tmp_path / "out", memory=MIB)
    recipe = {"command": "test", "inputs": [{"name": "in.safetensors", "hash": outcome.hashes[0]}]}
    for file in plan.files:
        with open_checkpoint(tmp_path / "out" / file.path) as result:
            texts = dict(result.metadata)
        assert json.loads(texts.pop("weightops")) == recipe
        assert texts == ({"format": "np", "of": "vae"} if file.path.startswith("vae") else {"format": "pt"})


def test_files_do_not_depend_on_memory_or_threads(source: Checkpoint, tmp_path: Path) -> None:
    plan = folder_plan(source, data_hashes={"hash": "{}"})
    written = []
    for memory in (MIB // 4, MIB, 64 * MIB):
        for threads in (1, 3):
            run(plan, tmp_path / "out", memory=memory, threads=threads, force=True)
            written.append(held(tmp_path / "out"))
    assert all(found == written[0] for found in written)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors", "out"]


def test_a_file_of_a_folder_is_the_file_that_is_written_alone(source: Checkpoint, tmp_path: Path) -> None:
    plan = folder_plan(source, files=(), extras={})
    run(plan, tmp_path / "alone", memory=MIB)
    keys = {key: key for key in plan.outputs}
    run(replace(plan, files=(OutputFile("a/b", keys),)), tmp_path / "out", memory=MIB)
    assert held(tmp_path / "out") == {"a/b": (tmp_path / "alone").read_bytes()}


@pytest.mark.parametrize("folder", [False, True])
def test_the_metadata_tell_the_hash_of_the_data(source: Checkpoint, tmp_path: Path, folder: bool) -> None:
    forms = {"sshs_model_hash": "{}", "modelspec.hash_sha256": "0x{}"}
    plan = folder_plan(source, data_hashes=forms)
    if not folder:
        plan = replace(plan, files=(), extras={})
    run(plan, tmp_path / "out", memory=MIB, threads=2)
    paths = [tmp_path / "out" / file.path for file in plan.files] or [tmp_path / "out"]
    hashes = set()
    for path in paths:
        data = path.read_bytes()
        found = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
        with open_checkpoint(path) as result:
            assert {key: result.metadata[key] for key in forms} == {k: f.format(found) for k, f in forms.items()}
            assert "xxh3_128:" + "0" * 32 not in result.metadata["weightops"]
        hashes.add(found)
    assert len(hashes) == len(paths)


@pytest.mark.parametrize("old", [False, True])
def test_a_run_that_fails_midway_leaves_nothing_and_the_old_folder(
    source: Checkpoint, tmp_path: Path, old: bool
) -> None:
    path = tmp_path / "out"
    if old:
        path.mkdir()
        (path / "mine").write_bytes(b"mine")

    def fail(_inputs: Sequence[memoryview], _outputs: Sequence[memoryview], block: Block) -> None:
        if block.number == 2:
            raise ZeroDivisionError

    plan = folder_plan(source)
    plan = replace(plan, tasks=tuple(replace(t, compute=fail) if t.raw else t for t in plan.tasks))
    with pytest.raises(ZeroDivisionError):
        within(20, lambda: run(plan, path, memory=MIB, force=old))
    assert sorted(p.name for p in tmp_path.iterdir()) == (["in.safetensors", "out"] if old else ["in.safetensors"])
    assert not old or held(path) == {"mine": b"mine"}
    assert no_workers_left()


def test_ctrl_c_leaves_nothing(source: Checkpoint, tmp_path: Path) -> None:
    def show(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder_plan(source), tmp_path / "out", memory=MIB, on_progress=show)
    assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="Windows renames no folder with an open file in it")
def test_a_folder_may_replace_the_one_that_it_is_made_of(source: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "out"
    run(folder_plan(source), path, memory=MIB)
    before = held(path)
    with open_checkpoint(path) as opened:
        plan = replace(folder_plan(source), sources=(opened,))
        with pytest.raises(OutputError) as caught:
            run(plan, path, memory=MIB)
        assert str(caught.value) == f"{path}: holds an input, and an input is never written"
        assert held(path) == before
        run(plan, path, memory=MIB, force=True)
    with open_checkpoint(path) as result:
        assert data_of(result, "unet.a") == data_of(source, "unet.a")  # inverted twice
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors", "out"]


def test_extras_without_files_are_our_bug() -> None:
    with pytest.raises(ValueError, match="extras stand in a folder"):
        Plan((), {"w": TensorSpec("U8", (1,))}, (), extras={"config.json": b""})


def test_a_folder_may_hold_no_tensors(tmp_path: Path) -> None:
    """Slots of no tensor have no place."""
    run(Plan((), {}, (), files=(OutputFile("a", {}),), extras={"b": b"c"}), tmp_path / "out", memory=MIB)
    assert held(tmp_path / "out").keys() == {"a", "b"}
    task = Task("w", (), (Slot("w", TensorSpec("U8", (1,))),), lambda *_: None, raw=True)
    with pytest.raises(KeyError):
        run(Plan((), {}, (task,), files=(OutputFile("a", {}),)), tmp_path / "other", memory=MIB)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
