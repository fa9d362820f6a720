"""The writer: the library's bytes, visible only when whole, and nothing lost on the way."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import within
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from safetensors.torch import save_file as library

from weightops.errors import OutputError
from weightops.files import writer as module
from weightops.files.source import LocalFile
from weightops.files.tensor import Slot, TensorSpec
from weightops.files.writer import SafetensorsWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from weightops.files.source import ByteSource

CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
DTYPES = list(CODES)

unnamed_files = pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="this system has no files without a name")
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such thing")


def data_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")


def specs_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {k: TensorSpec(CODES[t.dtype], tuple(t.shape)) for k, t in tensors.items()}


def begin(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    force: bool = False,
    inputs: Sequence[ByteSource] = (),
) -> SafetensorsWriter:
    """A writer that has written everything and not committed."""
    specs = specs_of(tensors)
    writer = SafetensorsWriter(path, specs, metadata or {}, force=force, inputs=inputs)
    try:
        for key, tensor in tensors.items():
            data = data_of(tensor)
            writer.write_bytes(Slot(key, specs[key]), 0, len(data), data)
    except BaseException:
        writer.close()
        raise
    return writer


def write(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, **rest: Any
) -> int:
    writer = begin(path, tensors, metadata, **rest)
    try:
        return writer.commit(metadata or {})
    finally:
        writer.close()


SOME = {"w": torch.arange(5000, dtype=torch.float32), "n": torch.tensor(7), "é": torch.zeros(2, 0, dtype=torch.float16)}
META = {"format": "pt"}


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture(params=["unnamed", "named"])
def naming(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As with O_TMPFILE, and as on a system without it, where the file in the making has a hidden name."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    elif not hasattr(os, "O_TMPFILE"):
        pytest.skip("this system has no files without a name")
    return str(request.param)


# ------------------------------------------------------------------------------------------------ the library's bytes

names = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
shapes = st.lists(st.integers(0, 5), max_size=3)


@settings(max_examples=120, deadline=None)
@given(
    tensors=st.dictionaries(
        names.filter(lambda n: n != "__metadata__"), st.tuples(st.sampled_from(DTYPES), shapes), max_size=6
    ),
    metadata=st.none() | st.dictionaries(names, names, min_size=1, max_size=1),
)
def test_the_bytes_are_those_of_the_library(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[torch.dtype, list[int]]],
    metadata: dict[str, str] | None,
) -> None:
    """With at most one text of metadata: of several, the library writes each time another order."""
    content = {
        name: torch.zeros(shape).to(torch.uint8).to(dtype) if dtype != torch.bool else torch.ones(shape, dtype=dtype)
        for name, (dtype, shape) in tensors.items()
    }
    path = tmp_path_factory.getbasetemp() / "same.safetensors"
    write(path, content, metadata, force=True)
    assert path.read_bytes() == save(content, metadata)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"ключ": 'a "quoted"\n\ttext \x00 \x7f \u2028'}])
def test_a_file_of_every_dtype_is_the_librarys_file(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    made = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for n, dtype in enumerate(DTYPES):
        size = torch.empty(0, dtype=dtype).element_size()
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (3 * (n + 1) * size,), generator=made).byte()
        tensors[f"model.{n % 3}.{dtype}"] = raw.view(dtype).reshape(3, n + 1)
        tensors[f"scalar {dtype}"] = raw[:size].clone().view(dtype).reshape(())
        tensors[f"empty\t{dtype}\u202e"] = torch.empty(0, 3, dtype=dtype)
    library(tensors, tmp_path / "theirs", metadata or None)
    size = write(tmp_path / "ours", tensors, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert size == (tmp_path / "ours").stat().st_size


def test_a_file_of_nothing_is_the_librarys_file(tmp_path: Path) -> None:
    write(tmp_path / "ours", {})
    assert (tmp_path / "ours").read_bytes() == save({})


def test_bytes_may_be_written_in_any_order_by_several_threads(tmp_path: Path) -> None:
    chance = random.Random(0)
    tensors = {f"t{n}": torch.randint(0, 255, (50_000 + n,)).to(torch.uint8) for n in range(5)}
    specs = specs_of(tensors)
    writer = SafetensorsWriter(tmp_path / "ours", specs, META)
    parts = [(k, a, min(a + 777, len(t))) for k, t in tensors.items() for a in range(0, len(t), 777)]
    chance.shuffle(parts)
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda p: writer.write_bytes(Slot(p[0], specs[p[0]]), p[1], p[2], data_of(tensors[p[0]])[p[1] : p[2]]),
                parts,
            )
        )
    writer.commit(META)
    writer.close()
    assert (tmp_path / "ours").read_bytes() == save(tensors, META)


def test_a_slot_of_bands_is_written_into_its_rows(tmp_path: Path) -> None:
    spec = TensorSpec("F32", (6, 2))
    writer = SafetensorsWriter(tmp_path / "ours", {"w": spec}, {})
    rows = torch.arange(12.0).reshape(6, 2)
    band = Slot("w", spec.with_rows(4), ((4, 6), (0, 2)))
    writer.write_bytes(band, 0, 12, data_of(rows)[:12])
    writer.write_bytes(band, 12, 32, data_of(rows)[12:32])
    writer.write_bytes(Slot("w", spec.with_rows(2), ((2, 4),)), 0, 16, data_of(rows)[32:])
    writer.commit({})
    writer.close()
    assert load_file(tmp_path / "ours")["w"].equal(rows[[2, 3, 4, 5, 0, 1]])


# ------------------------------------------------------------------------------------------------ whole or not at all


@unnamed_files
def test_nothing_is_to_be_seen_until_the_file_is_whole(tmp_path: Path) -> None:
    writer = begin(tmp_path / "out.safetensors", SOME)
    assert listing(tmp_path) == []
    writer.commit({})
    assert listing(tmp_path) == ["out.safetensors"]
    writer.close()
    assert (tmp_path / "out.safetensors").read_bytes() == save(SOME)


def test_without_unnamed_files_only_a_hidden_name_is_to_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    writer = begin(tmp_path / "out.safetensors", SOME)
    (name,) = listing(tmp_path)
    assert name.startswith(".out.safetensors.")
    assert name.endswith(".weightops-part")
    writer.commit({})
    assert listing(tmp_path) == ["out.safetensors"]
    writer.close()
    assert listing(tmp_path) == ["out.safetensors"]


def test_what_was_not_committed_is_gone(tmp_path: Path, naming: str) -> None:
    begin(tmp_path / "out.safetensors", SOME).close()
    assert listing(tmp_path) == []


def test_closing_twice_does_no_harm(tmp_path: Path, naming: str) -> None:
    writer = begin(tmp_path / "out.safetensors", SOME)
    writer.close()
    writer.close()


def test_the_room_is_claimed_before_the_work(tmp_path: Path) -> None:
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("this system cannot preallocate")
    specs = {"w": TensorSpec("U8", (3 << 20,))}
    writer = SafetensorsWriter(tmp_path / "out.safetensors", specs, {})
    found = os.fstat(writer._file.fd)
    writer.close()
    assert found.st_size == writer.size
    assert found.st_blocks * 512 >= 3 << 20


def test_the_final_header_must_be_as_long_as_the_first(tmp_path: Path, naming: str) -> None:
    writer = begin(tmp_path / "out.safetensors", SOME, {"hash": "0" * 32})
    with pytest.raises(ValueError, match=r"^the final header takes \d+ bytes, but \d+ were set aside$"):
        writer.commit({"hash": "0" * 64})
    writer.close()
    assert listing(tmp_path) == []


def test_the_final_metadata_replace_the_first(tmp_path: Path) -> None:
    writer = begin(tmp_path / "out.safetensors", SOME, {"hash": "0" * 32})
    writer.commit({"hash": "f" * 32})
    writer.close()
    assert (tmp_path / "out.safetensors").read_bytes() == save(SOME, {"hash": "f" * 32})


@posix
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("force", [False, True])
def test_the_mode_is_that_of_any_new_file(tmp_path: Path, naming: str, umask: int, force: bool) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "out.safetensors", SOME, force=force)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.safetensors").stat().st_mode) == 0o666 & ~umask


def test_a_relative_name_is_written_into_the_current_folder(
    tmp_path: Path, naming: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pathlib import Path

    monkeypatch.chdir(tmp_path)
    for force in (False, True):
        write(Path("out.safetensors"), SOME, force=force)
    assert listing(tmp_path) == ["out.safetensors"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["n" * 243 + ".safetensors", "é" * 121 + ".safetensors", "日" * 81 + ".safetensors"])
def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path, naming: str, force: bool, name: str) -> None:
    write(tmp_path / name, SOME, force=force)
    assert listing(tmp_path) == [name]


# ------------------------------------------------------------------------------------------------ the hash of the data

HASHES = {"sshs_model_hash": "{}", "modelspec.hash_sha256": "0x{}"}


def write_hashed(path: Path, metadata: Mapping[str, str], **rest: Any) -> bytes:
    """What was written, with the hash of its data in its metadata."""
    writer = SafetensorsWriter(path, specs_of(SOME), metadata, data_hashes=HASHES, **rest)
    with contextlib.closing(writer):
        for key, tensor in SOME.items():
            data = data_of(tensor)
            writer.write_bytes(Slot(key, specs_of(SOME)[key]), 0, len(data), data)
        assert writer.commit(metadata) == path.stat().st_size == writer.size
    return path.read_bytes()


def texts_of(data: bytes) -> dict[str, str]:
    text: dict[str, str] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    return text


@pytest.mark.parametrize("piece", [1 << 20, 777])
def test_the_hash_is_of_all_that_follows_the_header(
    tmp_path: Path, naming: str, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(module, "_HASH_NBYTES", piece)
    data = write_hashed(tmp_path / "out.safetensors", {**META, "sshs_model_hash": "of another file"})
    found = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert texts_of(data) == {"format": "pt", "sshs_model_hash": found, "modelspec.hash_sha256": f"0x{found}"}
    assert load_file(tmp_path / "out.safetensors")["w"].equal(SOME["w"])


def test_the_hash_of_no_data_is_that_of_nothing(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "out.safetensors", {}, {}, data_hashes={"hash": "{}"})
    with contextlib.closing(writer):
        writer.commit({})
    assert texts_of((tmp_path / "out.safetensors").read_bytes())["hash"] == hashlib.sha256(b"").hexdigest()


def test_without_positional_reads_the_hash_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write_hashed(tmp_path / "a.safetensors", META)
    monkeypatch.delattr(os, "preadv", raising=False)
    assert write_hashed(tmp_path / "b.safetensors", META) == expected


def test_data_that_cannot_be_read_back_is_an_error_and_nothing_is_left(
    tmp_path: Path, naming: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.safetensors"
    begins = len(save(SOME, {**META, **{k: f.format("0" * 64) for k, f in HASHES.items()}})) - 20_008
    for broken, what in (
        (no(number=errno.EIO), f"cannot be read back at byte {begins:,}: {os.strerror(errno.EIO)}"),
        (lambda *_: 0, f"ends at byte {begins:,}, expected {begins + 20_008:,}: something cut it"),
    ):
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(OutputError) as caught:
            write_hashed(path, META)
        assert str(caught.value) == f"{path}: {what}"
        assert listing(tmp_path) == []


def test_nothing_is_read_back_where_no_hash_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", no())
    write(tmp_path / "out.safetensors", SOME)


# ------------------------------------------------------------------------------------------------ lesser systems


def no(error: type[Exception] = OSError, number: int = errno.EPERM) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise error(number, os.strerror(number))

    return refuse


# In an order in which one after the other may be taken away.
LESSER: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "no O_TMPFILE": lambda m: m.delattr(os, "O_TMPFILE", raising=False),
    "preallocation not supported": lambda m: m.setattr(os, "posix_fallocate", no(number=errno.EOPNOTSUPP)),
    "preallocation senseless": lambda m: m.setattr(os, "posix_fallocate", no(number=errno.EINVAL)),
    "no preallocation": lambda m: m.delattr(os, "posix_fallocate", raising=False),
    "no positional writes": lambda m: m.delattr(os, "pwrite", raising=False),
    "no fdatasync": lambda m: m.delattr(os, "fdatasync", raising=False),
    "no locks": lambda m: m.setattr("fcntl.flock", no(number=errno.ENOLCK)),
    "no fcntl": lambda m: m.setitem(sys.modules, "fcntl", None),
    "no hard links": lambda m: m.setattr(os, "link", no()),
    "hard links unknown": lambda m: m.delattr(os, "link"),
    "free room unknown": lambda m: m.setattr("shutil.disk_usage", no(number=errno.ENOSYS)),
}


@posix
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("lack", [*LESSER, "all"])
def test_a_lesser_system_writes_the_same_bytes_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lack: str, force: bool
) -> None:
    expected = save(SOME, META)
    monkeypatch.setattr(module, "_FLUSH_EVERY", 1000)
    for name in LESSER if lack == "all" else [lack]:
        LESSER[name](monkeypatch)
    path = tmp_path / "out.safetensors"
    if force:
        path.write_bytes(b"an older one")
    write(path, SOME, META, force=force)
    assert path.read_bytes() == expected
    assert listing(tmp_path) == ["out.safetensors"]
    if not force:
        with pytest.raises(OutputError):
            write(path, SOME, META)
        writer = begin(tmp_path / "late.safetensors", SOME, META)
        (tmp_path / "late.safetensors").write_bytes(b"somebody else's")
        with pytest.raises(OutputError, match="appeared while this run was at work"):
            writer.commit(META)
        writer.close()
        assert (tmp_path / "late.safetensors").read_bytes() == b"somebody else's"
        assert listing(tmp_path) == ["late.safetensors", "out.safetensors"]


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        really(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "out.safetensors", SOME)
    assert (tmp_path / "out.safetensors").exists()


# ------------------------------------------------------------------------------------------------ leftovers


@posix
@pytest.mark.parametrize("left", [1, 3])
def test_what_killed_runs_left_is_cleared_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """A process that ended without a word, as after `kill -9`: its lock went with it, its file did not."""
    code = (
        "import os, sys; sys.path.insert(0, {root!r}); del os.O_TMPFILE; from pathlib import Path; "
        "from weightops.files.writer import SafetensorsWriter; from weightops.files.tensor import TensorSpec; "
        "w = SafetensorsWriter(Path({path!r}), {{'w': TensorSpec('U8', (1000,))}}, {{}}); os._exit(9)"
    )
    if not hasattr(os, "O_TMPFILE"):
        code = code.replace("del os.O_TMPFILE; ", "")
    path = tmp_path / "out.safetensors"
    words = code.format(root=str(module.__file__).rsplit("/weightops/", 1)[0], path=str(path))
    for _ in range(left):
        assert subprocess.run([sys.executable, "-c", words], timeout=30, check=False).returncode == 9
        if left == 1:
            assert len(listing(tmp_path)) == 1
    write(path, SOME)
    assert listing(tmp_path) == ["out.safetensors"]


@posix
def test_what_a_run_at_work_has_made_is_not_cleared(
    tmp_path: Path, naming: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.safetensors"
    first, second = begin(path, SOME, {"who": "first"}), begin(path, SOME, {"who": "second"})
    assert len(listing(tmp_path)) == (2 if naming == "named" else 0)
    first.commit({"who": "first"})
    first.close()
    with pytest.raises(OutputError) as caught:
        second.commit({"who": "second"})
    second.close()
    assert str(caught.value) == f"{path}: appeared while this run was at work, and was left as it is"
    assert caught.value.hint == "use --force to replace it"
    assert path.read_bytes() == save(SOME, {"who": "first"})
    assert listing(tmp_path) == ["out.safetensors"]


@posix
def test_only_leftovers_of_this_very_output_are_cleared(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    kept = [".other.safetensors.00ff00ff.weightops-part", "out.safetensors.weightops-part", ".out.safetensors.tmp"]
    for name in kept:
        (tmp_path / name).write_bytes(b"?")
    (tmp_path / ".out.safetensors.1234.weightops-part").symlink_to(precious)
    (tmp_path / ".out.safetensors.5678.weightops-part").mkdir()
    (tmp_path / ".out.safetensors.9abc.weightops-part").write_bytes(b"stale")
    write(tmp_path / "out.safetensors", SOME)
    assert precious.read_bytes() == b"mine"
    assert set(kept) < set(listing(tmp_path))
    assert ".out.safetensors.9abc.weightops-part" not in listing(tmp_path)


@posix
def test_a_run_whose_file_was_cleared_before_it_was_locked_makes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    really = module.lock
    cleared = []

    def lock(fd: int, *, wait: bool) -> bool:
        if wait and not cleared:
            cleared.extend(tmp_path.iterdir())
            cleared[0].unlink()
        return really(fd, wait=wait)

    monkeypatch.setattr(module, "lock", lock)
    write(tmp_path / "out.safetensors", SOME)
    assert len(cleared) == 1
    assert listing(tmp_path) == ["out.safetensors"]


# ------------------------------------------------------------------------------------------------ refusals


def refusal(path: Path, **rest: Any) -> tuple[str, str | None]:
    with pytest.raises(OutputError) as caught:
        SafetensorsWriter(path, specs_of(SOME), META, **rest)
    assert caught.value.exit_code == 1
    return str(caught.value), caught.value.hint


def test_an_existing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"mine")
    assert refusal(path) == (f"{path}: exists", "choose another name, or replace it with --force")
    assert path.read_bytes() == b"mine"
    assert listing(tmp_path) == ["out.safetensors"]


@posix
def test_a_link_that_leads_nowhere_exists_too(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    path.symlink_to(tmp_path / "nothing")
    assert refusal(path) == (f"{path}: exists", "choose another name, or replace it with --force")


@posix
@pytest.mark.parametrize("by", ["its own name", "another spelling", "a symlink", "a hard link"])
def test_an_input_is_refused_by_whatever_name(tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tmp_path / "in.safetensors"
    library(SOME, given)
    path = tmp_path / "out.safetensors"
    if by == "its own name":
        path = given
    elif by == "another spelling":
        (tmp_path / "sub").mkdir()
        path = tmp_path / "sub" / ".." / "in.safetensors"
    elif by == "a symlink":
        path.symlink_to(given)
    else:
        os.link(given, path)
    source = LocalFile(given)
    assert refusal(path, inputs=[source]) == (
        f"{path}: is also an input, and an input is never written",
        "choose another name, or replace it with --force once the result is whole",
    )
    source.close()
    assert given.read_bytes() == save(SOME)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "no" / "out.safetensors"
    assert refusal(path) == (f"{path}: the folder {str(tmp_path / 'no')!r} does not exist", "make it first")


def test_a_file_for_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / "file" / "out.safetensors"
    assert refusal(path) == (f"{path}: {str(tmp_path / 'file')!r} is no folder", None)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_for_a_file_is_refused(tmp_path: Path, force: bool) -> None:
    path = tmp_path / "out.safetensors"
    path.mkdir()
    assert refusal(path, force=force) == (f"{path}: is a folder, expected the name of a file", None)
    path.rmdir()
    if sys.platform != "win32":
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to(tmp_path / "elsewhere")
        assert refusal(path, force=force) == (f"{path}: is a folder, expected the name of a file", None)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    path = tmp_path / "out.safetensors"
    try:
        assert refusal(path) == (f"{path}: no permission to write into {str(tmp_path)!r}", None)
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_that_says_it_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    path = tmp_path / "out.safetensors"
    assert refusal(path) == (f"{path}: no permission to write into {str(tmp_path)!r}", None)


def test_a_name_that_is_too_long_is_refused_before_the_work(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250 + ".safetensors")
    reason = os.strerror(errno.ENAMETOOLONG)
    assert refusal(path) == (f"{path}: cannot be written: {reason}", None)


@pytest.mark.parametrize("name", ["a\0b.safetensors", "a\ud800b.safetensors"])
def test_a_name_that_no_file_can_bear_is_refused(tmp_path: Path, name: str) -> None:
    message, hint = refusal(tmp_path / name)
    assert message.endswith("b.safetensors: no file can bear this name")
    assert message.isprintable()
    assert hint is None


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("force", [False, True])
def test_too_little_room_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**12, 10**12 - 1234, 1234))
    path = tmp_path / "out.safetensors"
    size = len(save(SOME, META))
    assert refusal(path, force=force) == (
        f"{path}: no room: the file takes {size:,} bytes, but 1,234 are free",
        "free some space, or write elsewhere",
    )
    assert listing(tmp_path) == []


@posix
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_room_that_cannot_be_claimed_is_refused(
    tmp_path: Path, naming: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", no(number=number))
    path = tmp_path / "out.safetensors"
    assert refusal(path) == (
        f"{path}: no room: the file takes {len(save(SOME, META)):,} bytes",
        "free some space, or write elsewhere",
    )
    assert listing(tmp_path) == []


@posix
def test_a_file_larger_than_the_file_system_allows_is_refused(
    tmp_path: Path, naming: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 GiB on FAT32, or `ulimit -f`: freeing space would not help."""
    monkeypatch.setattr(os, "posix_fallocate", no(number=errno.EFBIG))
    path = tmp_path / "out.safetensors"
    assert refusal(path) == (
        f"{path}: the file takes {len(save(SOME, META)):,} bytes, more than a file may have here",
        "the file system or a limit of this process is in the way; write elsewhere",
    )
    assert listing(tmp_path) == []


def test_a_file_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    really = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return really(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    path = tmp_path / "out.safetensors"
    assert refusal(path) == (f"{path}: cannot be written: {os.strerror(errno.EROFS)}", None)


# ------------------------------------------------------------------------------------------------ replacing


@posix
def test_with_force_an_inputs_name_is_replaced_and_its_bytes_are_not_written(tmp_path: Path, naming: str) -> None:
    given = tmp_path / "in.safetensors"
    old = {"w": torch.ones(70_000)}
    library(old, given)
    os.link(given, tmp_path / "second name")
    before = given.stat()
    source = LocalFile(given)
    writer = begin(given, SOME, META, force=True, inputs=[source])
    assert given.read_bytes() == save(old)
    writer.commit(META)
    writer.close()
    assert given.read_bytes() == save(SOME, META)
    assert given.stat().st_ino != before.st_ino
    kept = (tmp_path / "second name").stat()
    assert (kept.st_ino, kept.st_mtime_ns, kept.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)
    assert (tmp_path / "second name").read_bytes() == save(old)
    read = bytearray(source.size)
    source.read_into(0, memoryview(read))  # who has it open reads on
    source.check_unchanged()
    source.close()
    assert bytes(read) == save(old)
    assert listing(tmp_path) == ["in.safetensors", "second name"]


@posix
@pytest.mark.parametrize("leads", ["to a file", "nowhere"])
def test_with_force_a_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path, naming: str, leads: str) -> None:
    target = tmp_path / "target"
    if leads == "to a file":
        target.write_bytes(b"mine")
    path = tmp_path / "out.safetensors"
    path.symlink_to(target)
    write(path, SOME, force=True)
    assert not path.is_symlink()
    assert path.read_bytes() == save(SOME)
    if leads == "to a file":
        assert target.read_bytes() == b"mine"
    else:
        assert not target.exists()


def test_with_force_nothing_is_replaced_before_the_new_file_is_whole(tmp_path: Path, naming: str) -> None:
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"old")
    begin(path, SOME, force=True).close()
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == ["out.safetensors"]


def test_with_force_a_new_name_is_fine(tmp_path: Path, naming: str) -> None:
    write(tmp_path / "out.safetensors", SOME, force=True)
    assert listing(tmp_path) == ["out.safetensors"]


@posix
@pytest.mark.parametrize("what", ["file", "link", "folder"])
def test_what_appears_during_the_work_is_left_as_it_is(tmp_path: Path, naming: str, what: str) -> None:
    path = tmp_path / "out.safetensors"
    writer = begin(path, SOME)
    if what == "file":
        path.write_bytes(b"theirs")
    elif what == "link":
        path.symlink_to(tmp_path / "nothing")
    else:
        path.mkdir()
    with pytest.raises(OutputError) as caught:
        writer.commit({})
    writer.close()
    assert str(caught.value) == f"{path}: appeared while this run was at work, and was left as it is"
    assert caught.value.hint == "use --force to replace it"
    if what == "file":
        assert path.read_bytes() == b"theirs"
    assert listing(tmp_path) == ["out.safetensors"]


@posix
def test_a_folder_that_goes_away_during_the_work_is_an_error(tmp_path: Path, naming: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    writer = begin(folder / "out.safetensors", SOME)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    with pytest.raises(OutputError, match=r"out\.safetensors: cannot be put in place: "):
        writer.commit({})
    writer.close()
    assert listing(tmp_path) == []


# ------------------------------------------------------------------------------------------------ signals

CALLS = ("pwrite", "fsync", "link", "replace", "unlink", "open", "close")


@contextlib.contextmanager
def signalled(at: int, after: bool, number: int) -> Iterator[list[str]]:
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
                signal.raise_signal(number)
            result = really(*arguments, **named)
            if mine and after:
                signal.raise_signal(number)
            return result

        patch.setattr(os, name, call)

    try:
        for name in CALLS:
            wrap(name)
        yield seen
    finally:
        patch.undo()


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_signal_at_any_moment_leaves_all_or_nothing(
    tmp_path: Path, naming: str, force: bool, after: bool, number: int
) -> None:
    expected = save(SOME, META)
    path = tmp_path / "out.safetensors"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with signalled(-1, after, number) as seen:
            write(path, SOME, META, force=force)
        path.unlink()
        calls = list(seen)
        outcomes = []
        for at in range(len(calls)):
            try:
                with signalled(at, after, number):
                    write(path, SOME, META, force=force)
                outcomes.append("done")
                assert path.read_bytes() == expected
            except KeyboardInterrupt:
                outcomes.append("stopped")
                if path.exists():
                    assert path.read_bytes() == expected
                    outcomes[-1] = "stopped, whole"
            assert signal.getsignal(signal.SIGINT) is stop
            assert signal.getsignal(signal.SIGTERM) is stop
            # What a signal leaves while the file gets its hidden name is cleared by the next run.
            assert all(name.endswith(".weightops-part") for name in listing(tmp_path) if name != path.name)
            write(path, SOME, META, force=True)
            assert listing(tmp_path) == ["out.safetensors"], calls[: at + 1]
            path.unlink()
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    named = {c: o for c, o in zip(calls, outcomes, strict=True) if c in ("link", "replace")}
    assert "stopped" in outcomes
    # From the moment at which the file gets its name, the run succeeds.
    last = max(i for i, c in enumerate(calls) if c in ("link", "replace"))
    assert set(outcomes[last:]) <= {"done", "stopped, whole"}
    assert outcomes[last] == "done", named


def test_handlers_are_left_alone_in_another_thread(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    within(10, lambda: write(tmp_path / "out.safetensors", SOME))
    assert signal.getsignal(signal.SIGINT) is before


# ------------------------------------------------------------------------------------------------ sending to the disk


def test_written_bytes_are_sent_to_the_disk_along_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FLUSH_EVERY", 10_000)
    sent = []
    running = threading.Lock()

    def sync(_fd: int) -> None:
        assert running.acquire(blocking=False)  # one at a time
        sent.append(threading.current_thread())
        time.sleep(0.001)
        running.release()

    monkeypatch.setattr(module, "_sync_data", sync)
    specs = {"w": TensorSpec("U8", (500_000,))}
    writer = SafetensorsWriter(tmp_path / "out.safetensors", specs, {})
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda n: writer.write_bytes(Slot("w", specs["w"]), n, n + 1000, memoryview(bytes(1000))),
                range(0, 500_000, 1000),
            )
        )
    within(10, lambda: writer.commit({}))
    writer.close()
    assert sent
    assert threading.main_thread() not in sent


def test_what_is_lost_along_the_way_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux reports a failed write to a file descriptor once, so the fsync before the commit would succeed."""
    monkeypatch.setattr(module, "_FLUSH_EVERY", 10_000)
    path = tmp_path / "out.safetensors"
    spec = TensorSpec("U8", (50_000,))
    for early in (True, False):
        writer = SafetensorsWriter(path, {"w": spec}, {})
        with monkeypatch.context() as patch, contextlib.closing(writer):
            patch.setattr(module, "_sync_data", no(number=errno.EIO))
            writer.write_bytes(Slot("w", spec), 0, 50_000, memoryview(bytes(50_000)))
            with writer._file._flushing:  # the flush has ended
                patch.undo()
            if early:
                with pytest.raises(OutputError) as caught:
                    writer.write_bytes(Slot("w", spec), 0, 10, memoryview(bytes(10)))
            else:
                monkeypatch.setattr(writer._file, "_flush_some", lambda _: None)  # as if it ended after the last write
                with pytest.raises(OutputError) as caught:
                    writer.commit({})
        assert str(caught.value).startswith(f"{path}: cannot be written to the disk: ")
        assert list(tmp_path.iterdir()) == []


def test_without_a_thread_to_be_had_the_last_fsync_does_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FLUSH_EVERY", 1000)
    with monkeypatch.context() as patch:
        patch.setattr(
            threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError("can't start new thread"))
        )
        writer = begin(tmp_path / "out.safetensors", SOME)
        size = writer._file._written
        assert size > 1000
    within(10, lambda: writer.commit({}))
    within(10, writer.close)
    assert (tmp_path / "out.safetensors").read_bytes() == save(SOME)
