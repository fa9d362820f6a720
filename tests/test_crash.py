"""The whole program, killed, interrupted, out of room, or raced: never half a file, never a changed input."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import xxhash
from conftest import CLI, weightops

from weightops.errors import Interrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and links as on POSIX")

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")

# The command line on a lesser system: this code runs before it.
PRELUDE = "import os, sys; {code}; from weightops.cli.main import console; console()"
NAMED = "vars(os).pop('O_TMPFILE', None)"  # the file in the making has a hidden name
NO_CLAIM = (  # and room can neither be asked for nor claimed
    "import shutil; vars(os).pop('posix_fallocate', None); "
    "shutil.disk_usage = lambda _: type('Usage', (), {'free': 1 << 60})"
)


class Files(NamedTuple):
    """Two models of `nbytes` bytes each, mostly holes, of which the second gives its text encoder to the first."""

    a: Path
    b: Path
    whole: str

    def unchanged(self) -> bool:
        return f"{hash_of(self.a)} {hash_of(self.b)}" == (self.a.parent / "hashes").read_text()


def hash_of(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def sparse(path: Path, dtype: str, count: int, values: int, size: int) -> Path:
    """`count` tensors of zeros that take no room, and a small text encoder."""
    head, position = {}, 0
    for n in range(count):
        head[f"model.diffusion_model.{n}"] = {
            "dtype": dtype, "shape": [values], "data_offsets": [position, position + values * size],
        }  # fmt: skip
        position += values * size
    head["cond_stage_model.x"] = {"dtype": "U8", "shape": [4], "data_offsets": [position, position + 4]}
    text = json.dumps(head).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(position, os.SEEK_CUR)
        file.write(path.name[:4].ljust(4).encode())
    return path


def words(files: Files, output: Path, *more: str) -> list[str]:
    """A merge that only copies, so that it does not wait for torch, and slowly: little memory, one thread."""
    given = [str(files.a), str(files.b), "--text-encoder", "2", "-o", str(output), "-q"]
    return ["merge", *given, "--memory", "2MiB", "--threads", "1", *more]


def start(arguments: list[str], code: str = "pass", **rest: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PRELUDE.format(code=code), *arguments]
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": CLI.parent, "text": True, **rest}
    return subprocess.Popen(command, **given)


def make(folder: Path, count: int, values: int) -> Files:
    a, b = (sparse(folder / f"{n}.safetensors", "U8", count, values, 1) for n in ("a", "b"))
    (folder / "hashes").write_text(f"{hash_of(a)} {hash_of(b)}")
    output = folder / "expected"
    done = weightops(*words(Files(a, b, ""), output.with_suffix(".safetensors")), cwd=folder)
    assert done.returncode == 0, done.stderr
    expected = output.with_suffix(".safetensors")
    whole = hash_of(expected)
    expected.unlink()
    return Files(a, b, whole)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Of 48 MB in 1,500 tensors: a run of a few tenths of a second."""
    return make(tmp_path_factory.mktemp("models"), 1500, 32_000)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Of 75 MB in 5,000 tensors: a run that takes long enough to be met at work."""
    return make(tmp_path_factory.mktemp("many"), 5000, 15_000)


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Of which a mean is to be taken, so that torch is needed."""
    folder = tmp_path_factory.mktemp("floats")
    a, b = (sparse(folder / f"{n}.safetensors", "F16", 3, 100_000, 2) for n in ("a", "b"))
    (folder / "hashes").write_text(f"{hash_of(a)} {hash_of(b)}")
    return Files(a, b, "")


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """However the test goes, the process does not outlive it."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


# ------------------------------------------------------------------------------------------------ kill -9


@pytest.mark.parametrize("naming", ["unnamed", "named"])
@pytest.mark.parametrize("before", ["nothing", "an older file"])
def test_a_run_that_is_killed_leaves_a_whole_file_or_none(
    files: Files, tmp_path: Path, naming: str, before: str
) -> None:
    code = NAMED if naming == "named" else "pass"
    output = tmp_path / "out.safetensors"
    force = [] if before == "nothing" else ["--force"]
    chance = random.Random(f"{naming} {before}")
    began = time.monotonic()
    with ended(start(words(files, tmp_path / "timed.safetensors"), code)) as timed:
        assert timed.wait(30) == 0
    (tmp_path / "timed.safetensors").unlink()
    takes = time.monotonic() - began
    seen = set()
    for _ in range(5):
        if before == "nothing":
            output.unlink(missing_ok=True)
        else:
            output.write_bytes(b"older")
        with ended(start(words(files, output, *force), code)) as run:
            time.sleep(chance.uniform(0.3, 1.0) * takes)
            run.kill()
            seen.add(run.wait(10))
        if run.returncode == 0:
            takes /= 2  # the machine had more to do while it was timed
        visible = [name for name in listing(tmp_path) if not name.startswith(".")]
        if before == "nothing":
            assert visible in ([], ["out.safetensors"])
            assert not output.exists() or hash_of(output) == files.whole
        else:
            assert visible == ["out.safetensors"]
            assert output.read_bytes() == b"older" or hash_of(output) == files.whole
        if naming == "unnamed":
            # At its beginning, for a moment, a run gives an empty file a name, to see whether the system can.
            assert [path for path in tmp_path.glob(".*") if path.stat().st_size] == []
    assert -signal.SIGKILL in seen
    assert files.unchanged()
    with ended(start(words(files, output, "--force"), code)) as last:
        assert last.wait(30) == 0
    assert listing(tmp_path) == ["out.safetensors"]
    assert hash_of(output) == files.whole


# ------------------------------------------------------------------------------------------------ signals


def handles_signals(pid: int) -> bool:
    """Has the process put its own handler for SIGTERM in place?"""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return found is not None and bool(int(found.group(1), 16) >> (signal.SIGTERM - 1) & 1)


def is_at_work(pid: int) -> bool:
    """Has the process a file in the making, and written to it?"""
    written = re.search(r"^wchar: (\d+)$", Path(f"/proc/{pid}/io").read_text(), re.MULTILINE)
    return written is not None and int(written.group(1)) > 5_000_000


def loads_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def reaches(run: subprocess.Popen[str], state: Callable[[int], bool], seconds: float = 30) -> None:
    stop = time.monotonic() + seconds
    while time.monotonic() < stop and run.poll() is None:
        with contextlib.suppress(OSError):
            if state(run.pid):
                return
    pytest.fail(f"the run ended or did not get so far: {run.poll()}")


SAID = {
    signal.SIGINT: "error: interrupted: nothing was written, and no input was changed\n",
    signal.SIGTERM: "error: stopped by SIGTERM: nothing was written, and no input was changed\n",
    signal.SIGHUP: "error: stopped by SIGHUP: nothing was written, and no input was changed\n",
}


def is_stopped(run: subprocess.Popen[str], number: signal.Signals) -> None:
    """Stop the run, which says so in one line."""
    run.send_signal(number)
    stdout, stderr = run.communicate(timeout=30)
    assert stderr == SAID[number]
    assert stdout == ""
    assert run.returncode == 1


@linux
@pytest.mark.parametrize("naming", ["unnamed", "named"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_stopped_at_work_says_so_and_leaves_nothing(
    many: Files, tmp_path: Path, naming: str, number: signal.Signals
) -> None:
    arguments = words(many, tmp_path / "out.safetensors")
    with ended(start(arguments, NAMED if naming == "named" else "pass")) as run:
        reaches(run, is_at_work)
        is_stopped(run, number)
    assert listing(tmp_path) == []
    assert many.unchanged()


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["at the beginning", "while torch is imported"])
def test_a_run_that_is_stopped_before_its_work_says_so_and_leaves_nothing(
    floats: Files, tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    given = ["merge", str(floats.a), str(floats.b), "-o", str(tmp_path / "out.safetensors"), "--device", "cpu"]
    with ended(start(given)) as run:
        reaches(run, handles_signals if moment == "at the beginning" else loads_torch)
        is_stopped(run, number)
    assert listing(tmp_path) == []
    assert floats.unchanged()


@linux
def test_a_run_that_is_stopped_at_any_moment_has_written_all_or_nothing(files: Files, tmp_path: Path) -> None:
    """Also in between its work and its end: from the commit on, it is a success."""
    chance = random.Random(0)
    output = tmp_path / "out.safetensors"
    for _ in range(10):
        output.unlink(missing_ok=True)
        number = chance.choice([signal.SIGINT, signal.SIGTERM])
        with ended(start(words(files, output))) as run:
            reaches(run, handles_signals)
            time.sleep(chance.uniform(0, 0.4))
            run.send_signal(number)
            _, stderr = run.communicate(timeout=30)
        if run.returncode == 0:
            assert stderr == ""
            assert hash_of(output) == files.whole
        else:
            assert (run.returncode, stderr) == (1, SAID[number])
            assert not output.exists() or hash_of(output) == files.whole
        assert listing(tmp_path) in ([], ["out.safetensors"])


def test_a_signal_within_the_start_of_a_thread_leaves_the_thread_in_peace(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Thread.start` disowns its thread at an `Exception`; the thread, which runs, then prints a traceback."""
    name = "_start_joinable_thread" if hasattr(threading, "_start_joinable_thread") else "_start_new_thread"
    begin = getattr(threading, name)
    ran, said = threading.Event(), []

    def met_by_a_signal(*words: Any, **named: Any) -> None:
        begin(*words, **named)
        raise Interrupted("", "stopped by SIGTERM")

    monkeypatch.setattr(threading, name, met_by_a_signal)
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    for _ in range(20):
        ran.clear()
        thread = threading.Thread(target=ran.set)
        with pytest.raises(Interrupted):
            thread.start()
        assert ran.wait(10) or said
    assert said == []


# ------------------------------------------------------------------------------------------------ no room


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    try:
        made = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except OSError as e:
        pytest.skip(f"no file system can be mounted: {e}")
    if made.returncode:
        pytest.skip(f"no file system can be mounted: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], capture_output=True, timeout=20, check=False)


@pytest.mark.parametrize("when", ["at the start", "midway"])
@pytest.mark.parametrize("naming", ["unnamed", "named"])
def test_a_full_disk_is_told_in_two_lines_and_nothing_is_left(
    files: Files, small_disk: Path, when: str, naming: str
) -> None:
    code = f"{NAMED if naming == 'named' else 'pass'}; {NO_CLAIM if when == 'midway' else 'pass'}"
    output = small_disk / "out.safetensors"
    with ended(start(words(files, output), code)) as run:
        stdout, stderr = run.communicate(timeout=30)
    free = r", but [\d,]+ are free" if when == "at the start" else ""
    expected = rf"error: {re.escape(str(output))}: no room: the file takes [\d,]+ bytes{free}\n"
    assert re.fullmatch(expected + "hint: free some space, or write elsewhere\n", stderr)
    assert (run.returncode, stdout) == (1, "")
    assert listing(small_disk) == []
    assert files.unchanged()


@pytest.mark.parametrize("when", ["at the start", "midway"])
def test_a_limit_of_the_size_of_files_is_told_in_two_lines_and_nothing_is_left(
    files: Files, tmp_path: Path, when: str
) -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))"
    output = tmp_path / "out.safetensors"
    with ended(start(words(files, output), f"{code}; {NO_CLAIM if when == 'midway' else 'pass'}")) as run:
        stdout, stderr = run.communicate(timeout=30)
    expected = rf"error: {re.escape(str(output))}: the file takes [\d,]+ bytes, more than a file may have here\n"
    hint = "hint: the file system or a limit of this process is in the way; write elsewhere\n"
    assert re.fullmatch(expected + hint, stderr)
    assert (run.returncode, stdout) == (1, "")
    assert listing(tmp_path) == []


# ------------------------------------------------------------------------------------------------ others at work


@pytest.mark.parametrize("naming", ["unnamed", "named"])
def test_of_several_runs_with_one_output_one_succeeds(files: Files, tmp_path: Path, naming: str) -> None:
    code = NAMED if naming == "named" else "pass"
    output = tmp_path / "out.safetensors"
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(ended(start(words(files, output), code))) for _ in range(3)]
        told = [run.communicate(timeout=60)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 1, 1]
    for run, stderr in zip(runs, told, strict=True):
        if run.returncode:
            late = f"error: {output}: appeared while this run was at work, and was left as it is\n"
            early = f"error: {output}: exists\n"
            assert stderr.startswith((late, early))
            assert stderr.count("\n") == 2
    assert listing(tmp_path) == ["out.safetensors"]
    assert hash_of(output) == files.whole
    assert files.unchanged()


@pytest.mark.parametrize("naming", ["unnamed", "named"])
def test_several_runs_that_replace_one_output_leave_a_whole_one(files: Files, tmp_path: Path, naming: str) -> None:
    code = NAMED if naming == "named" else "pass"
    output = tmp_path / "out.safetensors"
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(ended(start(words(files, output, "--force"), code))) for _ in range(3)]
        told = [run.communicate(timeout=60)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert told == ["", "", ""]
    assert listing(tmp_path) == ["out.safetensors"]
    assert hash_of(output) == files.whole


def test_an_output_that_is_an_input_is_replaced_whole(files: Files, tmp_path: Path) -> None:
    for path in (files.a, files.b):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    mine = Files(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "")
    refused = weightops(*words(mine, mine.a), cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"error: {mine.a}: is also an input, and an input is never written\nhint: ")
    os.link(mine.a, tmp_path / "kept")
    assert weightops(*words(mine, mine.a, "--force"), cwd=tmp_path).returncode == 0
    assert hash_of(mine.a) == files.whole
    assert hash_of(tmp_path / "kept") == hash_of(files.a)
    assert listing(tmp_path) == ["a.safetensors", "b.safetensors", "kept"]


# ------------------------------------------------------------------------------------------------ stdout


@pytest.mark.parametrize("more", [["--tensors"], ["--json", "--tensors"]])
def test_a_reader_that_leaves_early_is_no_error_to_talk_about(many: Files, more: list[str]) -> None:
    with ended(start(["inspect", str(many.a), *more])) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert run.stdout.readline()
        run.stdout.close()
        stderr = run.stderr.read()
        assert run.wait(30) in (0, 1)
    assert stderr == ""


# ------------------------------------------------------------------------------------------------ memory


@linux
def test_peak_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for count in (60, 240):  # 125 and 500 MB
        path = sparse(tmp_path / f"{count}.safetensors", "F16", count, 1 << 20, 2)
        command = [sys.executable, str(CLI), "inspect", str(path), "--stats", "--memory", "48MiB", "--threads", "2"]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
        assert run.returncode == 0
        peaks.append(usage.ru_maxrss / 1024)
    small, large = peaks
    assert large < small + 32
