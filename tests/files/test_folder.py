"""The folder writer: the library's files, visible only when all are whole; and how tensors are cut into shards."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from weightops.errors import OutputError
from weightops.files import folder as module
from weightops.files import writer
from weightops.files.checkpoint import open_checkpoint
from weightops.files.folder import FolderWriter, OutputFile, shards
from weightops.files.source import LocalFile
from weightops.files.tensor import Slot, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such thing")

W, N, E = torch.arange(5000, dtype=torch.float32), torch.tensor(7), torch.zeros(2, 0, dtype=torch.float16)
TENSORS = {"unet.w": W, "unet.n": N, "vae.e": E}
SPECS = {
    "unet.w": TensorSpec("F32", (5000,)),
    "unet.n": TensorSpec("I64", ()),
    "vae.e": TensorSpec("F16", (2, 0)),
}
FILES = (
    OutputFile("unet/model.safetensors", {"unet.w": "w", "unet.n": "n"}),
    OutputFile("vae.safetensors", {"vae.e": "e"}, {"format": "np"}),
)
EXTRAS = {"model_index.json": b"{}\n", "unet/config.json": b"", "a/b/c.txt": b"text"}
METADATA = ({"format": "pt"}, {"format": "np"})
WHOLE = {
    "unet/model.safetensors": save({"w": W, "n": N}, {"format": "pt"}),
    "vae.safetensors": save({"e": E}, {"format": "np"}),
    **EXTRAS,
}


def data_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")


def begin(path: Path, **rest: Any) -> FolderWriter:
    """A writer that has written everything and not committed."""
    made = FolderWriter(path, SPECS, FILES, METADATA, **{"extras": EXTRAS, **rest})
    try:
        for key, tensor in TENSORS.items():
            data = data_of(tensor)
            made.write_bytes(Slot(key, SPECS[key]), 0, len(data), data)
    except BaseException:
        made.close()
        raise
    return made


def write(path: Path, **rest: Any) -> int:
    made = begin(path, **rest)
    try:
        return made.commit(*METADATA)
    finally:
        made.close()


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def held(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------------------ what is written


def test_the_files_are_those_of_the_library_and_the_extras_as_given(tmp_path: Path) -> None:
    size = write(tmp_path / "out")
    assert held(tmp_path / "out") == WHOLE
    assert size == sum(map(len, WHOLE.values()))
    assert listing(tmp_path) == ["out"]


def test_bands_are_written_into_their_rows_of_the_renamed_tensor(tmp_path: Path) -> None:
    spec = TensorSpec("F32", (6, 2))
    rows = torch.arange(12.0).reshape(6, 2)
    made = FolderWriter(tmp_path / "out", {"w": spec}, (OutputFile("a", {"w": "other"}),), [{}], extras={})
    made.write_bytes(Slot("w", spec.with_rows(4), ((4, 6), (0, 2))), 0, 32, data_of(rows)[:32])
    made.write_bytes(Slot("w", spec.with_rows(2), ((2, 4),)), 0, 16, data_of(rows)[32:])
    made.commit({})
    made.close()
    assert load_file(tmp_path / "out" / "a")["other"].equal(rows[[2, 3, 4, 5, 0, 1]])


def test_each_file_tells_the_hash_of_its_own_data(tmp_path: Path) -> None:
    made = begin(tmp_path / "out", data_hashes={"sshs_model_hash": "{}", "modelspec.hash_sha256": "0x{}"})
    made.commit(*METADATA)
    made.close()
    for file, texts in zip(FILES, METADATA, strict=True):
        path = tmp_path / "out" / file.path
        data = path.read_bytes()
        found = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
        with open_checkpoint(path) as opened:
            assert opened.metadata == {**texts, "sshs_model_hash": found, "modelspec.hash_sha256": f"0x{found}"}


def test_the_final_headers_must_be_as_long_as_the_first(tmp_path: Path) -> None:
    made = begin(tmp_path / "out")
    with pytest.raises(ValueError, match=r"^the final header takes \d+ bytes, but \d+ were set aside$"):
        made.commit({"format": "pt", "more": "x" * 9}, {"format": "np"})
    made.close()
    assert listing(tmp_path) == []


@posix
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("force", [False, True])
def test_the_modes_are_those_of_anything_new(tmp_path: Path, umask: int, force: bool) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "out", force=force)
    finally:
        os.umask(before)
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "日" * 85])
@pytest.mark.parametrize("force", [False, True])
def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path, name: str, force: bool) -> None:
    if force:
        (tmp_path / name).mkdir()
    write(tmp_path / name, force=force)
    assert listing(tmp_path) == [name]


def test_a_relative_name_is_written_into_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for force in (False, True):
        write(Path("out"), force=force)
    assert listing(tmp_path) == ["out"]


# ------------------------------------------------------------------------------------------------ whole or not at all


def test_only_a_hidden_folder_is_to_be_seen_until_all_is_whole(tmp_path: Path) -> None:
    made = begin(tmp_path / "out")
    (name,) = listing(tmp_path)
    assert name.startswith(".out.")
    assert name.endswith(".weightops-part")
    made.commit(*METADATA)
    assert listing(tmp_path) == ["out"]
    made.close()
    assert held(tmp_path / "out") == WHOLE


@pytest.mark.parametrize("old", [False, True])
def test_what_was_not_committed_is_gone(tmp_path: Path, old: bool) -> None:
    if old:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_bytes(b"mine")
    made = begin(tmp_path / "out", force=old)
    made.close()
    made.close()
    assert listing(tmp_path) == (["out"] if old else [])
    if old:
        assert held(tmp_path / "out") == {"mine": b"mine"}


def no(number: int) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refuse


@contextlib.contextmanager
def failing(at: int) -> Iterator[list[str]]:
    """Let call number `at` of those that make, write, sync or rename fail; the list grows by one for each call."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:

        def wrap(name: str) -> None:
            really = getattr(os, name)

            def call(*arguments: Any, **named: Any) -> Any:
                seen.append(name)
                if len(seen) == at + 1:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return really(*arguments, **named)

            patch.setattr(os, name, call)

        for name in ("open", "mkdir", "posix_fallocate", "pwrite", "fsync", "rename"):
            wrap(name)
        yield seen


@posix
@pytest.mark.parametrize("force", [False, True])
def test_a_call_may_fail_at_any_moment(tmp_path: Path, force: bool) -> None:
    path = tmp_path / "out"
    with failing(-1) as seen:
        write(path)
    failed = 0
    for at in range(len(seen) + 8 * force):
        shutil.rmtree(path, ignore_errors=True)
        if force:
            path.mkdir()
            (path / "mine").write_bytes(b"mine")
        with contextlib.suppress(OutputError), failing(at):
            write(path, force=force)
        if path.exists() and held(path) == WHOLE:  # what failed was a hint, or came after the rename
            assert all(
                name.endswith((".weightops-part", ".weightops-old")) for name in set(listing(tmp_path)) - {"out"}
            )
            write(path, force=True)
            assert listing(tmp_path) == ["out"]
            continue
        failed += 1
        assert held(tmp_path) == ({"out/mine": b"mine"} if force else {}), seen[: at + 1]
        assert listing(tmp_path) == (["out"] if force else [])
    assert failed >= 20


@posix
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_told_by_name_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "out"
    size = len(WHOLE["unet/model.safetensors"])
    for name in ("posix_fallocate", "pwrite"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, no(number))
            with pytest.raises(OutputError) as caught:
                write(path)
        assert str(caught.value) == f"{path}/unet/model.safetensors: no room: the file takes {size:,} bytes"
        assert caught.value.hint == "free some space, or write elsewhere"
        assert listing(tmp_path) == []


# ------------------------------------------------------------------------------------------------ replacing


@pytest.mark.parametrize("old", ["a folder", "an empty folder", "nothing"])
def test_with_force_the_old_folder_is_replaced(tmp_path: Path, old: str) -> None:
    path = tmp_path / "out"
    if old != "nothing":
        path.mkdir()
    if old == "a folder":
        (path / "unet").mkdir()
        (path / "unet" / "model.safetensors").write_bytes(b"old")
        (path / "other").write_bytes(b"old")
    made = begin(path, force=True)
    assert held(path) == ({} if old != "a folder" else {"unet/model.safetensors": b"old", "other": b"old"})
    made.commit(*METADATA)
    made.close()
    assert held(path) == WHOLE
    assert listing(tmp_path) == ["out"]


@posix
@pytest.mark.parametrize("leads", ["to a folder", "nowhere"])
def test_with_force_a_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path, leads: str) -> None:
    target = tmp_path / "target"
    if leads == "to a folder":
        target.mkdir()
        (target / "mine").write_bytes(b"mine")
    path = tmp_path / "out"
    path.symlink_to(target)
    write(path, force=True)
    assert not path.is_symlink()
    assert held(path) == WHOLE
    assert listing(tmp_path) == (["out", "target"] if leads == "to a folder" else ["out"])
    if leads == "to a folder":
        assert held(target) == {"mine": b"mine"}


@posix
def test_with_force_a_folder_that_holds_an_input_is_replaced_and_the_input_read_on(tmp_path: Path) -> None:
    write(tmp_path / "out")
    source = LocalFile(tmp_path / "out" / "unet" / "model.safetensors")
    write(tmp_path / "out", force=True, extras={}, inputs=[source])
    read = bytearray(source.size)
    source.read_into(0, memoryview(read))
    source.check_unchanged()
    source.close()
    assert bytes(read) == WHOLE["unet/model.safetensors"]
    assert held(tmp_path / "out").keys() == {file.path for file in FILES}


@posix
def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "mine").write_bytes(b"mine")
    made = begin(path, force=True)
    really = os.rename

    def rename(source: Path, target: Path) -> None:
        if str(source).endswith(".weightops-part"):
            assert not path.exists()
            raise OSError(errno.EIO, "Input/output error")
        really(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(OutputError) as caught:
            made.commit(*METADATA)
    made.close()
    assert str(caught.value) == f"{path}: cannot be put in place: Input/output error"
    assert held(path) == {"mine": b"mine"}
    assert listing(tmp_path) == ["out"]


@posix
@pytest.mark.parametrize("what", ["file", "link", "folder", "empty folder"])
def test_what_appears_during_the_work_is_left_as_it_is(tmp_path: Path, what: str) -> None:
    path = tmp_path / "out"
    made = begin(path)
    if what == "file":
        path.write_bytes(b"theirs")
    elif what == "link":
        path.symlink_to(tmp_path / "nothing")
    else:
        path.mkdir()
    if what == "folder":
        (path / "theirs").write_bytes(b"theirs")
    before = path.lstat()
    with pytest.raises(OutputError) as caught:
        made.commit(*METADATA)
    made.close()
    assert str(caught.value) == f"{path}: appeared while this run was at work, and was left as it is"
    assert caught.value.hint == "use --force to replace it"
    assert os.path.samestat(path.lstat(), before)
    assert listing(tmp_path) == ["out"]


@posix
def test_with_force_a_file_that_appears_during_the_work_is_left_as_it_is(tmp_path: Path) -> None:
    made = begin(tmp_path / "out", force=True)
    (tmp_path / "out").write_bytes(b"theirs")
    with pytest.raises(OutputError, match=r"out: cannot be put in place: Not a directory$"):
        made.commit(*METADATA)
    made.close()
    assert held(tmp_path) == {"out": b"theirs"}


@posix
def test_two_runs_that_replace_one_folder_leave_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the other run's folder comes in between this one's two renames."""
    path = tmp_path / "out"
    write(path)
    first, second = begin(path, force=True), begin(path, force=True, extras={})
    assert len(listing(tmp_path)) == 3
    really = os.rename
    between = []

    def rename(source: Path, target: Path) -> None:
        if Path(target) == path and not between:
            between.append(1)
            first.commit(*METADATA)
        really(source, target)

    monkeypatch.setattr(os, "rename", rename)
    second.commit(*METADATA)
    first.close()
    second.close()
    assert held(path).keys() == {file.path for file in FILES}
    assert listing(tmp_path) == ["out"]


# ------------------------------------------------------------------------------------------------ leftovers

KILLED = """
import os, sys; sys.path.insert(0, {root!r})
from weightops.files.folder import FolderWriter, OutputFile
from weightops.files.tensor import TensorSpec
w = FolderWriter({path!r}, {{'w': TensorSpec('U8', (1000,))}}, (OutputFile('a/w', {{'w': 'w'}}),), [{{}}],
                 extras={{'b/c': b'd'}}, force={force})
{then}
os._exit(9)
"""
IN_BETWEEN = """
really = os.rename
def rename(source, target):
    if str(target) == {path!r}:
        os._exit(9)
    really(source, target)
os.rename = rename
w.commit({{}})
"""


def kill(path: Path, then: str = "", force: bool = False) -> None:
    """A process that ends without a word, as after `kill -9`."""
    root = str(Path(module.__file__).parents[2])
    words = KILLED.format(root=root, path=str(path), force=force, then=then.format(path=str(path)))
    assert subprocess.run([sys.executable, "-c", words], timeout=30, check=False).returncode == 9


@posix
def test_what_a_killed_run_left_is_one_hidden_folder_and_cleared_by_the_next(tmp_path: Path) -> None:
    for _ in range(2):
        kill(tmp_path / "out")
        (name,) = listing(tmp_path)  # of the second run: the first one's is gone
        assert name.endswith(".weightops-part")
    write(tmp_path / "out")
    assert listing(tmp_path) == ["out"]


@posix
@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_a_killed_run_moved_aside_comes_back(tmp_path: Path, force: bool) -> None:
    """Killed between its two renames, a run leaves the old folder, whole, under a hidden name."""
    path = tmp_path / "out"
    path.mkdir()
    (path / "mine").write_bytes(b"mine")
    kill(path, IN_BETWEEN, force=True)
    assert not path.exists()
    assert len(listing(tmp_path)) == 2
    if force:
        made = begin(path, force=True)
        assert held(path) == {"mine": b"mine"}
        made.commit(*METADATA)
        made.close()
        assert held(path) == WHOLE
    else:
        with pytest.raises(OutputError, match=r"out: exists$"):
            write(path)
        assert held(path) == {"mine": b"mine"}
        (path / "mine").unlink()
        path.rmdir()
        write(path)
    assert listing(tmp_path) == ["out"]


@posix
def test_what_was_moved_aside_is_removed_when_the_new_folder_is_there(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    kill(path, IN_BETWEEN, force=True)
    path.mkdir()
    write(path, force=True)
    assert listing(tmp_path) == ["out"]


@posix
def test_what_a_run_at_work_has_made_is_not_cleared(tmp_path: Path) -> None:
    path = tmp_path / "out"
    first, second = begin(path), begin(path)
    assert len(listing(tmp_path)) == 2
    first.commit(*METADATA)
    first.close()
    with pytest.raises(OutputError, match="appeared while this run was at work"):
        second.commit(*METADATA)
    second.close()
    assert held(path) == WHOLE
    assert listing(tmp_path) == ["out"]


@posix
def test_what_a_run_at_work_moved_aside_is_not_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    path.mkdir()
    made = begin(path, force=True)
    really = os.rename
    others = []

    def rename(source: Path, target: Path) -> None:
        if Path(target) == path and not others:
            others.append(begin(path, force=True))
            assert not path.exists()
        really(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        made.commit(*METADATA)
    made.close()
    assert held(path) == WHOLE
    others[0].close()
    assert listing(tmp_path) == ["out"]


@posix
def test_only_leftovers_of_this_very_output_are_cleared(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "mine").write_bytes(b"mine")
    kept = [".other.00ff00ff.weightops-part", "out.weightops-part", ".out.tmp", ".out.b.11223344.weightops-old"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.1234.weightops-part").symlink_to(precious)
    (tmp_path / ".out.5678.weightops-part").write_bytes(b"the file of a run that writes a file")
    (tmp_path / ".out.9abc.weightops-part").mkdir()
    write(tmp_path / "out")
    assert held(precious) == {"mine": b"mine"}
    assert {*kept, ".out.5678.weightops-part"} < set(listing(tmp_path))
    assert ".out.9abc.weightops-part" not in listing(tmp_path)


@posix
def test_a_run_whose_folder_was_cleared_before_it_was_locked_makes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = module.lock
    cleared = []

    def lock(fd: int, *, wait: bool) -> bool:
        if wait and not cleared:
            cleared.extend(tmp_path.iterdir())
            cleared[0].rmdir()
        return really(fd, wait=wait)

    monkeypatch.setattr(module, "lock", lock)
    write(tmp_path / "out")
    assert len(cleared) == 1
    assert listing(tmp_path) == ["out"]


# ------------------------------------------------------------------------------------------------ refusals


def refusal(path: Path, **rest: Any) -> tuple[str, str | None]:
    with pytest.raises(OutputError) as caught:
        FolderWriter(path, SPECS, FILES, METADATA, **{"extras": EXTRAS, **rest})
    return str(caught.value), caught.value.hint


@pytest.mark.parametrize("what", ["a folder", "an empty folder", "a dangling link"])
def test_an_existing_target_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "out"
    if what == "a dangling link":
        path.symlink_to(tmp_path / "nothing")
    else:
        path.mkdir()
    if what == "a folder":
        (path / "mine").write_bytes(b"")
    assert refusal(path) == (f"{path}: exists", "choose another name, or replace it with --force")
    assert listing(tmp_path) == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_a_file_for_a_folder_is_refused(tmp_path: Path, force: bool) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"mine")
    assert refusal(path, force=force) == (f"{path}: is a file, expected the name of a folder", None)
    assert path.read_bytes() == b"mine"


@posix
@pytest.mark.parametrize("by", ["its own name", "a link"])
def test_a_folder_that_holds_an_input_is_refused(tmp_path: Path, by: str) -> None:
    write(tmp_path / "out")
    path = tmp_path / "out"
    if by == "a link":
        path = tmp_path / "link"
        path.symlink_to(tmp_path / "out")
    source = LocalFile(tmp_path / "out" / "unet" / "model.safetensors")
    assert refusal(path, inputs=[source]) == (
        f"{path}: holds an input, and an input is never written",
        "choose another name, or replace it with --force once the result is whole",
    )
    source.close()
    assert held(tmp_path / "out") == WHOLE


@posix
@pytest.mark.parametrize("force", [False, True])
def test_what_can_be_no_new_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool) -> None:
    (tmp_path / "here" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deep")
    for name in (".", "..", "../..", "/"):
        message, hint = refusal(Path(name), force=force)
        assert message == f"{name}: names no new folder"
        assert hint == "give the folder a name of its own"
    for path in (tmp_path / "here", tmp_path / "here" / "deep"):
        assert refusal(path, force=force) == (
            f"{path}: holds the folder in which this command runs", "choose another name",
        )  # fmt: skip
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    assert refusal(tmp_path / "disk", force=force) == (
        f"{tmp_path / 'disk'}: is a mounted file system, which cannot be replaced", "name a new folder in it",
    )  # fmt: skip


def test_a_parent_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "no" / "out"
    assert refusal(path) == (f"{path}: the folder {str(tmp_path / 'no')!r} does not exist", "make it first")


def test_a_file_for_a_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / "file" / "out"
    assert refusal(path) == (f"{path}: {str(tmp_path / 'file')!r} is no folder", None)


def test_a_parent_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    path = tmp_path / "out"
    assert refusal(path) == (f"{path}: no permission to write into {str(tmp_path)!r}", None)


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 256)
    assert refusal(path) == (f"{path}: cannot be written: {os.strerror(errno.ENAMETOOLONG)}", None)


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_name_that_no_folder_can_bear_is_refused(tmp_path: Path, name: str) -> None:
    message, _ = refusal(tmp_path / name)
    assert message.endswith("b: no file can bear this name")
    assert listing(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "mkdir", no(errno.EROFS))
    path = tmp_path / "out"
    assert refusal(path) == (f"{path}: cannot be written: {os.strerror(errno.EROFS)}", None)


Usage = namedtuple("Usage", "total used free")


def test_too_little_room_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**12, 10**12 - 1234, 1234))
    path = tmp_path / "out"
    assert refusal(path) == (
        f"{path}: no room: the folder takes {sum(map(len, WHOLE.values())):,} bytes, but 1,234 are free",
        "free some space, or write elsewhere",
    )
    assert listing(tmp_path) == []


BAD_PATHS = ["/etc/x", "../x", "a/../../x", "a//b", "a/", "", ".", "./a", "a\\..\\b", "C:x", "c:/x", "a\0b"]


@pytest.mark.parametrize("bad", BAD_PATHS)
@pytest.mark.parametrize("where", ["files", "extras"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, bad: str, where: str) -> None:
    files, extras = ("w", {bad: b""}) if where == "extras" else (bad, {})
    with pytest.raises(OutputError) as caught:
        FolderWriter(tmp_path / "out", {"w": SPECS["unet.w"]}, (OutputFile(files, {"w": "w"}),), [{}], extras=extras)
    assert caught.value.what == "is no plain path within the output folder, and is not written"
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("files", "extras"),
    [
        ((OutputFile("a", {"w": "w"}),), {}),
        ((OutputFile("a", {"w": "w", "v": "v"}), OutputFile("b", {"w": "w"})), {}),
        ((OutputFile("a", {"w": "w", "v": "v", "u": "u"}),), {}),
        ((OutputFile("a", {"w": "w", "v": "w"}),), {}),
        ((OutputFile("a", {"w": "w"}), OutputFile("a", {"v": "v"})), {}),
        ((OutputFile("a", {"w": "w", "v": "v"}),), {"a": b""}),
        ((OutputFile("a", {"w": "w", "v": "v"}),), {"a/b": b""}),
        ((OutputFile("a/b/c", {"w": "w", "v": "v"}),), {"a/b": b""}),
    ],
)
def test_a_layout_that_contradicts_itself_is_our_bug(
    tmp_path: Path, files: tuple[OutputFile, ...], extras: Mapping[str, bytes]
) -> None:
    specs = {"w": SPECS["unet.w"], "v": SPECS["unet.w"]}
    with pytest.raises(ValueError, match=r"folder|one name"):
        FolderWriter(tmp_path / "out", specs, files, [{}] * len(files), extras=extras)
    assert listing(tmp_path) == []


# ------------------------------------------------------------------------------------------------ signals

CALLS = ("pwrite", "fsync", "mkdir", "rename", "unlink", "rmdir", "open", "close")


@contextlib.contextmanager
def signalled(at: int, after: bool) -> Iterator[list[str]]:
    """Send this process a signal before or after its call number `at` of those that write or rename."""
    seen: list[str] = []
    patch = pytest.MonkeyPatch()

    def wrap(name: str) -> None:
        really = getattr(os, name)

        def call(*arguments: Any, **named: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return really(*arguments, **named)
            seen.append(name)
            mine = len(seen) == at + 1
            if mine and not after:
                signal.raise_signal(signal.SIGINT)
            result = really(*arguments, **named)
            if mine and after:
                signal.raise_signal(signal.SIGINT)
            return result

        patch.setattr(os, name, call)

    try:
        for name in CALLS:
            wrap(name)
        yield seen
    finally:
        patch.undo()


@posix
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_signal_at_any_moment_leaves_the_new_folder_or_the_old_one(tmp_path: Path, force: bool, after: bool) -> None:
    path = tmp_path / "out"

    def old() -> None:
        shutil.rmtree(path, ignore_errors=True)
        if force:
            path.mkdir()
            (path / "mine").write_bytes(b"mine")

    old()
    with signalled(-1, after) as seen:
        write(path, force=force)
    calls = list(seen)
    outcomes = []
    for at in range(len(calls)):
        old()
        try:
            with signalled(at, after):
                write(path, force=force)
            outcomes.append("done")
            assert held(path) == WHOLE, calls[: at + 1]
        except KeyboardInterrupt:
            outcomes.append("stopped")
            if path.exists() and held(path) == WHOLE:
                outcomes[-1] = "stopped, whole"
            elif force:
                assert held(path) == {"mine": b"mine"}
            else:
                assert not path.exists()
        assert all(name.endswith(".weightops-part") for name in listing(tmp_path) if name != path.name)
        write(path, force=True)
        assert listing(tmp_path) == ["out"], calls[: at + 1]
    first = calls.index("rename")
    assert "stopped" in outcomes[:first]
    # From the moment at which the folders are renamed, the run succeeds; closing comes after.
    assert set(outcomes[first:]) <= {"done", "stopped, whole"}
    assert outcomes[first] == "done"


# ------------------------------------------------------------------------------------------------ sending to the disk


def test_written_bytes_are_sent_to_the_disk_along_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_FLUSH_EVERY", 1000)
    sent: list[threading.Thread] = []
    monkeypatch.setattr(writer, "_sync_data", lambda _: sent.append(threading.current_thread()))
    write(tmp_path / "out")
    assert sent
    assert threading.main_thread() not in sent


@posix
@pytest.mark.parametrize(
    "lack",
    [
        lambda m: m.delattr(os, "posix_fallocate", raising=False),
        lambda m: m.delattr(os, "pwrite", raising=False),
        lambda m: m.delattr(os, "preadv", raising=False),
        lambda m: m.setattr("fcntl.flock", no(errno.ENOLCK)),
        lambda m: m.setitem(sys.modules, "fcntl", None),
        lambda m: m.setattr("shutil.disk_usage", no(errno.ENOSYS)),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_a_lesser_system_writes_the_same_bytes_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lack: Callable[[pytest.MonkeyPatch], None], force: bool
) -> None:
    lack(monkeypatch)
    path = tmp_path / "out"
    if force:
        path.mkdir()
    made = begin(path, force=force, data_hashes={"hash": "{}"})
    made.commit(*METADATA)
    made.close()
    assert held(path).keys() == WHOLE.keys()
    data = held(path)["unet/model.safetensors"]
    with open_checkpoint(path / "unet/model.safetensors") as opened:
        start = 8 + int.from_bytes(data[:8], "little")
        assert opened.metadata["hash"] == hashlib.sha256(data[start:]).hexdigest()
    assert listing(tmp_path) == ["out"]


# ------------------------------------------------------------------------------------------------ shards


def specs_of(sizes: list[int]) -> dict[str, TensorSpec]:
    return {f"t{n}": TensorSpec("U8", (size,)) for n, size in enumerate(sizes)}


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), max_size=30), limit=st.integers(1, 50))
def test_shards_keep_the_order_and_the_limit(sizes: list[int], limit: int) -> None:
    outputs = specs_of(sizes)
    files, extras = shards(outputs, "model", limit)
    assert [key for file in files for key in file.keys] == list(outputs)
    held = [[outputs[key].nbytes for key in file.keys] for file in files]
    for number, shard in enumerate(held):
        assert sum(shard) <= limit or (len(shard) == 1 and shard[0] > limit)
        if number:  # none of them could have been one with the one before
            assert sum(held[number - 1]) + shard[0] > limit
    assert bool(extras) == (len(files) > 1)


def test_one_file_needs_no_index() -> None:
    assert shards(specs_of([5, 5]), "model", 10) == ((OutputFile("model.safetensors", {"t0": "t0", "t1": "t1"}),), {})
    assert shards(specs_of([50]), "model", 10)[0][0].path == "model.safetensors"
    assert shards({}, "model", 10) == ((OutputFile("model.safetensors", {}),), {})


def test_the_index_is_that_of_the_library() -> None:
    """As transformers writes it: sorted keys, two spaces, a line's end."""
    files, extras = shards(
        specs_of([6, 6, 1]), "diffusion_pytorch_model", 10, folder="unet", names={"t0": "z", "t2": "a"}
    )
    assert [(file.path, file.keys) for file in files] == [
        ("unet/diffusion_pytorch_model-00001-of-00002.safetensors", {"t0": "z"}),
        ("unet/diffusion_pytorch_model-00002-of-00002.safetensors", {"t1": "t1", "t2": "a"}),
    ]
    (name,) = extras
    assert name == "unet/diffusion_pytorch_model.safetensors.index.json"
    assert extras[name].decode() == (
        '{\n  "metadata": {\n    "total_size": 13\n  },\n  "weight_map": {\n'
        '    "a": "diffusion_pytorch_model-00002-of-00002.safetensors",\n'
        '    "t1": "diffusion_pytorch_model-00002-of-00002.safetensors",\n'
        '    "z": "diffusion_pytorch_model-00001-of-00002.safetensors"\n  }\n}\n'
    )


def test_shards_are_read_again_as_one_checkpoint(tmp_path: Path) -> None:
    chance = random.Random(0)
    specs = specs_of([chance.randrange(2000) for _ in range(20)])
    data = {key: chance.randbytes(spec.nbytes) for key, spec in specs.items()}
    names = {key: f"модель.{key}" for key in specs}
    files, extras = shards(specs, "model", 4000, names=names)
    assert len(files) > 3
    made = FolderWriter(tmp_path / "out", specs, files, [{}] * len(files), extras=extras)
    for key, content in data.items():
        made.write_bytes(Slot(key, specs[key]), 0, len(content), memoryview(content))
    made.commit(*[{}] * len(files))
    made.close()
    with open_checkpoint(tmp_path / "out") as opened:
        assert opened.container == "shards"
        assert opened.tensors.keys() == set(names.values())
        for key, name in names.items():
            found = memoryview(bytearray(len(data[key])))
            opened.read_bytes(opened.slot(name), 0, len(found), found)
            assert found == data[key]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())
    assert index["metadata"] == {"total_size": sum(map(len, data.values()))}
