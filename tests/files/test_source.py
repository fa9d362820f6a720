"""Local files: bytes by position, and every kind of thing that is no file."""

from __future__ import annotations

import os
import random
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from weightops.errors import FormatError, TruncatedError, UsageError
from weightops.files import source
from weightops.files.source import ByteSource, LocalFile, read

if TYPE_CHECKING:
    from collections.abc import Callable

DATA = random.Random(0).randbytes(300_000)

posix = pytest.mark.skipif(sys.platform == "win32", reason="no such thing on Windows")


@pytest.fixture(params=["with preadv and fadvise", "without"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system is, and as on a system that reads at one position only."""
    if request.param == "without":
        monkeypatch.delattr(os, "preadv", raising=False)
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
        monkeypatch.setattr(source, "_FALLBACK_NBYTES", 1000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    path.write_bytes(DATA)
    return path


def refusal(path: str | Path, label: str | None = "in.safetensors") -> str:
    with pytest.raises(UsageError) as caught:
        LocalFile(path, label)
    assert caught.value.exit_code == 2
    assert str(caught.value).isprintable()
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.usefixtures("either")
def test_bytes_are_read_by_position(path: Path) -> None:
    file: ByteSource = LocalFile(path)
    assert file.size == len(DATA)
    assert file.label == str(path)
    file.will_need(0, file.size)
    assert read(file, 0, len(DATA)) == DATA
    assert read(file, 299_999, 1) == DATA[-1:]
    assert read(file, 1234, 0) == b""
    assert read(file, len(DATA), 0) == b""
    out = bytearray(30)
    file.read_into(100, memoryview(out)[10:20])
    assert out == bytes(10) + DATA[100:110] + bytes(10)
    file.close()


@pytest.mark.usefixtures("either")
def test_several_threads_read_at_once(path: Path) -> None:
    file = LocalFile(path)
    places = [(i * 1009 % 250_000, 1 + i * 7919 % 50_000) for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda place: read(file, *place), places))
    assert found == [DATA[start : start + nbytes] for start, nbytes in places]
    file.close()


def test_what_arrives_in_parts_is_put_together(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = LocalFile(path)
    monkeypatch.setattr(file, "_read_some", lambda start, out: LocalFile._read_some(file, start, out[:777]))
    assert read(file, 5, 10_000) == DATA[5:10_005]
    file.close()


@pytest.mark.usefixtures("either")
def test_a_read_beyond_the_end_is_refused(path: Path) -> None:
    file = LocalFile(path, "in.safetensors")
    with pytest.raises(TruncatedError) as caught:
        read(file, 299_000, 2000)
    assert str(caught.value) == "in.safetensors: ends at byte 300,000, expected at least 301,000"
    file.close()


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("start", [0, 50_000, 200_000])
def test_a_file_that_is_cut_while_it_is_read_is_refused(path: Path, start: int) -> None:
    file = LocalFile(path, "in.safetensors")
    os.truncate(path, 100_000)
    with pytest.raises(TruncatedError) as caught:
        read(file, start, 100_001)
    message = "ends at byte 100,000, expected 300,000 bytes: it was cut while it was read"
    assert str(caught.value) == f"in.safetensors: {message}"
    assert caught.value.exit_code == 1
    file.close()


@pytest.mark.usefixtures("either")
def test_a_disk_that_fails_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(5, "Input/output error")

    file = LocalFile(path, "in.safetensors")
    monkeypatch.setattr(os, "preadv" if hasattr(os, "preadv") else "read", fail)
    with pytest.raises(FormatError) as caught:
        read(file, 1500, 10)
    assert str(caught.value) == "in.safetensors: cannot be read at byte 1,500: Input/output error"
    file.close()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no such hints")
def test_a_hint_that_cannot_be_followed_is_no_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(22, "Invalid argument")

    file = LocalFile(path)
    monkeypatch.setattr(os, "posix_fadvise", fail)
    file.will_need(0, 10)
    file.close()


# ------------------------------------------------------------------------------------------------ the same file


def test_a_file_that_is_left_alone_is_unchanged(path: Path) -> None:
    file = LocalFile(path)
    read(file, 0, 10)
    file.check_unchanged()
    file.close()


def appended(path: Path) -> None:
    with path.open("ab") as f:
        f.write(b"more")


def overwritten(path: Path) -> None:
    with path.open("r+b") as f:
        f.write(b"other")
    os.utime(path, ns=(1, 1))  # the clock of a file system may be too coarse for so quick a change


def cut(path: Path) -> None:
    os.truncate(path, 10)


@pytest.mark.parametrize("change", [appended, overwritten, cut])
def test_a_file_that_changes_is_noticed(path: Path, change: Callable[[Path], None]) -> None:
    file = LocalFile(path, "in.safetensors")
    change(path)
    with pytest.raises(FormatError) as caught:
        file.check_unchanged()
    assert str(caught.value) == "in.safetensors: was changed while it was read"
    assert caught.value.hint == "run again when nothing writes to it"
    assert caught.value.exit_code == 1
    file.close()


@posix
def test_a_file_that_is_replaced_is_read_to_its_end_as_it_was(path: Path, tmp_path: Path) -> None:
    file = LocalFile(path)
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").replace(path)
    assert read(file, 0, len(DATA)) == DATA
    file.check_unchanged()
    file.close()


def test_a_file_is_known_by_any_of_its_names(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "hard").hardlink_to(path)
    (tmp_path / "copy").write_bytes(DATA)
    file = LocalFile(path)
    found = {name: file.same_file((tmp_path / name).stat()) for name in ("link", "hard", "copy")}
    assert found == {"link": True, "hard": True, "copy": False}
    file.close()


def test_a_closed_file_may_be_closed_again_and_is_not_read(path: Path) -> None:
    file = LocalFile(path, "in.safetensors")
    file.close()
    file.close()
    with pytest.raises(FormatError, match=r"^in\.safetensors: cannot be read at byte 0: Bad file descriptor$"):
        read(file, 0, 1)


# ------------------------------------------------------------------------------------------------ not a file


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no") == "in.safetensors: no such file"
    assert refusal(tmp_path / "no" / "no") == "in.safetensors: no such file"


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "in.safetensors: a folder, expected a file"


def test_a_broken_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    assert refusal(tmp_path / "link") == "in.safetensors: a link that leads nowhere, expected a file"


@posix
def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("link")
    message = "in.safetensors: cannot be opened: Too many levels of symbolic links"
    assert refusal(tmp_path / "link") == message


@posix
def test_a_path_through_a_file_is_refused(path: Path) -> None:
    assert refusal(path / "a") == "in.safetensors: cannot be opened: Not a directory"


@posix
def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / ("x" * 300)) == "in.safetensors: cannot be opened: File name too long"


@pytest.mark.parametrize(("name", "shown"), [("a\0b", r"a\x00b"), ("a\ud800", r"a\ud800")])
def test_a_name_that_no_file_can_bear_is_refused(name: str, shown: str) -> None:
    assert refusal(name, None) == f"{shown}: no file can bear this name"


@posix
def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == "in.safetensors: a named pipe, expected a file"


@posix
def test_a_named_pipe_that_takes_the_files_place_is_refused_without_waiting(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def switched(name: Path, flags: int) -> int:
        return opened(tmp_path / "pipe", flags)

    os.mkfifo(tmp_path / "pipe")
    opened = os.open
    before = opened(path, os.O_RDONLY)
    os.close(before)
    monkeypatch.setattr(os, "open", switched)
    assert refusal(path) == "in.safetensors: a named pipe, expected a file"
    monkeypatch.undo()
    after = opened(path, os.O_RDONLY)
    os.close(after)
    assert after == before  # nothing was left open


@posix
def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("s")
        assert refusal("s") == "in.safetensors: a socket, expected a file"


@posix
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_a_device_is_refused(device: str) -> None:
    assert refusal(device, None) == f"{device}: a device, expected a file"


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_file_without_permission_is_refused(path: Path) -> None:
    path.chmod(0)
    assert refusal(path) == "in.safetensors: cannot be opened: Permission denied"


def test_a_file_that_the_system_does_not_give_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(name: Path, flags: int) -> int:
        raise PermissionError(13, "Permission denied", str(name))

    monkeypatch.setattr(os, "open", deny)
    assert refusal(path) == "in.safetensors: cannot be opened: Permission denied"


@posix
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\x1b[31m\nb", r"a\x1b[31m\nb"),
        ("a\u202eb\u2066", r"a\u202eb\u2066"),
        (os.fsdecode(b"a\xff"), r"a\udcff"),
        ("no \u00e9t\u00e9", "no \u00e9t\u00e9"),
    ],
)
def test_a_name_with_characters_that_a_terminal_acts_on_is_shown_harmless(
    name: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(name, None) == f"{shown}: no such file"
    Path(name).write_bytes(DATA)
    file = LocalFile(name)
    with pytest.raises(TruncatedError) as caught:
        read(file, 300_000, 1)
    assert str(caught.value) == f"{shown}: ends at byte 300,000, expected at least 300,001"
    file.close()
