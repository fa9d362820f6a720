"""What is wrong is said in one line, with a hint, on stderr; exit code 1 for data, 2 for use; never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commandline import weightops_here
from conftest import CLI, save

from weightops.cli.options import Numbers, Size
from weightops.errors import UsageError


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("a.safetensors"), {"x": torch.ones(3)})
    save(Path("b.safetensors"), {"x": torch.zeros(3)})
    save(Path("c.safetensors"), {"y": torch.zeros(3)})
    Path("page.safetensors").write_text("<html>404</html>")


SHOWS = "lists the options"


@pytest.mark.parametrize(
    ("words", "code", "error", "hint"),
    [
        (["merg"], 2, "no such command 'merg'", "did you mean merge?"),
        (["inspekt", "a.safetensors"], 2, "no such command 'inspekt'", "did you mean inspect?"),
        (
            ["x\x1b[31m"],
            2,
            "no such command 'x\\x1b[31m'",
            "known are inspect, blocks, merge, fuse, extract, resize, combine, unfuse, convert, "
            "replay, caption, train, generate, evaluate, study, synth, demo",
        ),
        (["--versio"], 2, "no such option '--versio'", "did you mean --version?"),
        (["merge", "a", "b", "--alpa", "1"], 2, "no such option '--alpa'", "did you mean --alpha?"),
        (["merge", "a", "b", "--xyz"], 2, "no such option '--xyz'", f"weightops merge --help {SHOWS}"),
        (["merge"], 2, "merge: found 0 models, expected two or more, or a recipe", None),
        (["inspect"], 2, "missing argument 'FILE…'", f"weightops inspect --help {SHOWS}"),
        (["merge", "a.safetensors"], 2, "merge: found 1 model, expected two or more, or a recipe", None),
        (["merge", "a.safetensors", "no.safetensors"], 2, "no.safetensors: no such file", None),
        (["merge", "a", "b", "--alpha"], 2, "option '--alpha' requires an argument", f"weightops --help {SHOWS}"),
        (["merge", "a", "b", "--alpha", "much"], 2, "--alpha: 'much' is not a valid float",
         f"weightops merge --help {SHOWS}"),
        (["merge", "a", "b", "--weights", "1;2"], 2,
         "--weights: found '1;2', expected numbers such as 0.5,0.3,0.2", None),
        (["merge", "a", "b", "--dtype", "fp17"], 2,
         "--dtype: 'fp17' is not one of 'keep', 'fp32', 'fp16', 'bf16', 'fp8_e4m3', 'fp8_e5m2'",
         f"weightops merge --help {SHOWS}"),
        (["merge", "a", "b", "--device", "gpu"], 2, "--device: found 'gpu', expected auto, cpu, cuda or cuda:1", None),
        (["merge", "a", "b", "--memory", "lots"], 2,
         "--memory: found 'lots', expected a size such as 512MiB or 2GiB", None),
        (["merge", "a", "b", "--threads", "0"], 2, "--threads: 0 is not in the range 1<=x<=256",
         f"weightops merge --help {SHOWS}"),
        (["merge", "a", "b", "--set", "share"], 2, "--set: found 'share', expected NAME=VALUE", None),
        (["merge", "a", "b", "--set", "=1"], 2, "--set: found '=1', expected NAME=VALUE", None),
        (["merge", "a", "b", "--set", "share=1"], 2, "--set: weighted_sum has no parameter 'share'",
         "it has weights, normalize"),
        (["merge", "a", "b", "--set", "weights=1,2"], 2, "--set: found weights, which are given with --weights", None),
        (["merge", "a", "b", "--method", "slurp"], 2, "unknown merge method 'slurp'", "did you mean 'slerp'?"),
        (["merge", "a", "b", "--recipe", "r.yaml"], 2, "--recipe: found MODEL beside it", "say it in the recipe"),
        (["merge", "--recipe", "r.yaml", "--alpha", "0.5"], 2, "--recipe: found --alpha beside it",
         "say it in the recipe"),
        (["merge", "--recipe", "none.yaml"], 2, "none.yaml: cannot be read: No such file or directory", None),
        (["merge", "a.safetensors", "b.safetensors", "-o", "out.bin"], 2,
         "out.bin: the output's name must end in .safetensors", None),
        (["merge", "a.safetensors", "b.safetensors", "-o", "a.safetensors"], 1,
         "a.safetensors: is also an input, and an input is never written",
         "choose another name, or replace it with --force once the result is whole"),
        (["merge", "a.safetensors", "c.safetensors"], 1,
         "c.safetensors: has no tensor name in common with a.safetensors: nothing to merge",
         "these seem to be different architectures, or different spellings of one"),
        (["merge", "a.safetensors", "page.safetensors"], 1, "page.safetensors: a web page, expected safetensors",
         "a download page or an error message was saved under this name; fetch the file itself"),
        (["inspect", "page.safetensors"], 1, "page.safetensors: a web page, expected safetensors",
         "a download page or an error message was saved under this name; fetch the file itself"),
        (["inspect", "a.safetensors", "--tensors", "q*"], 2,
         "--tensors: no tensor of a.safetensors is named like 'q*'", None),
        (["inspect", "--tensors", "a.safetensors"], 2, "--tensors: took 'a.safetensors' for its glob",
         "put --tensors after the files, or write --tensors='*'"),
        (["inspect", "--tensors", "a.safetensors", "b.safetensors"], 2,
         "--tensors: took 'a.safetensors' for its glob", "put --tensors after the files, or write --tensors='*'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line_with_a_hint(
    words: list[str], code: int, error: str, hint: str | None
) -> None:
    before = sorted(Path().iterdir())
    done = weightops_here(*words)
    assert done.err.splitlines() == [f"error: {error}", *([f"hint: {hint}"] if hint else [])]
    assert (done.code, done.out) == (code, "")
    assert sorted(Path().iterdir()) == before


def test_json_puts_nothing_on_stdout_when_it_fails() -> None:
    done = weightops_here("merge", "a.safetensors", "c.safetensors", "--json")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: c.safetensors: ")


def test_a_process_ends_with_the_same_words_and_code() -> None:
    for words, code in ((["inspect", "page.safetensors"], 1), (["inspect", "no"], 2), (["nothing"], 2)):
        done = subprocess.run([sys.executable, str(CLI), *words], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == weightops_here(*words)
        assert done.returncode == code
        assert "Traceback" not in done.stderr


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("weightops.cli.inspect.inspect", broken)
    with pytest.raises(KeyError, match="ours"):
        weightops_here("inspect", "a.safetensors")


def test_interruption_and_want_of_memory_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, line in (
        (KeyboardInterrupt(), "error: interrupted: nothing was written, and no input was changed"),
        (MemoryError("no room for 9 bytes"), "error: not enough memory: no room for 9 bytes"),
        (MemoryError(), "error: not enough memory: the system refused an allocation"),
    ):
        monkeypatch.setattr("weightops.cli.inspect.inspect", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        done = weightops_here("inspect", "a.safetensors")
        # After ^C the line that it stands on is ended first.
        assert (done.code, done.out, done.err.strip().splitlines()[0]) == (1, "", line)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    save(Path("many.safetensors"), {f"t{i}": torch.ones(1) for i in range(5000)})
    words = [sys.executable, str(CLI), "inspect", "many.safetensors", "--json", "--tensors", "*"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""


def test_a_stream_that_cannot_say_a_character_shows_it_escaped() -> None:
    words = [sys.executable, str(CLI), "merge", "a.safetensors", "b.safetensors", "--alpha", "-1", "--dry-run"]
    done = subprocess.run(words, capture_output=True, env={"PYTHONIOENCODING": "ascii"}, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.splitlines()[0] == rb"2 \xd7 a \u2212 1 \xd7 b"


# ------------------------------------------------------------------------------------------------ several files


def test_one_bad_file_among_several_hides_none_of_the_others() -> None:
    done = weightops_here("inspect", "a.safetensors", "page.safetensors", "b.safetensors", "no.safetensors")
    assert done.code == 2
    assert [line.split()[0] for line in done.out.splitlines()] == ["file", "a.safetensors", "b.safetensors"]
    assert [line for line in done.err.splitlines() if line.startswith("error")] == [
        "error: page.safetensors: a web page, expected safetensors",
        "error: no.safetensors: no such file",
    ]
    assert weightops_here("inspect", "a.safetensors", "page.safetensors").code == 1


def test_one_bad_file_among_several_has_its_place_in_the_json() -> None:
    done = weightops_here("inspect", "a.safetensors", "page.safetensors", "b.safetensors", "--json")
    found = json.loads(done.out)
    assert done.code == 1
    assert [entry["path"] for entry in found] == ["a.safetensors", "page.safetensors", "b.safetensors"]
    assert found[1] == {"path": "page.safetensors", "error": "page.safetensors: a web page, expected safetensors"}


# ------------------------------------------------------------------------------------------------ words of options


@pytest.mark.parametrize(
    ("word", "nbytes"),
    [
        ("512MiB", 512 << 20),
        ("2GiB", 2 << 30),
        ("1.5GiB", 3 << 29),
        ("64mib", 64 << 20),
        ("500MB", 500_000_000),
        ("2 GB", 2_000_000_000),
        ("100K", 100 << 10),
        ("3M", 3 << 20),
        ("1g", 1 << 30),
        ("12345", 12345),
        ("12345B", 12345),
        (" 1 KiB ", 1024),
        ("0.1GB", 100_000_000),
    ],
)
def test_sizes_are_read_as_people_write_them(word: str, nbytes: int) -> None:
    assert Size().convert(word, None, None) == nbytes


@pytest.mark.parametrize(
    "word",
    [
        "",
        "0",
        "0GiB",
        "0.1",
        "-1MiB",
        "1e9",
        "MiB",
        "1TiB",
        "1 2MiB",
        "512MiBs",
        "½GiB",
        "inf",
        "nan",
        "9" * 400,
        "9" * 20,
    ],
)
def test_a_size_that_is_none_is_refused(word: str) -> None:
    with pytest.raises(UsageError) as caught:
        Size().convert(word, None, None)
    assert caught.value.what.endswith("expected a size such as 512MiB or 2GiB")
    assert len(str(caught.value)) < 200


def test_numbers_are_separated_by_commas() -> None:
    assert Numbers().convert("0.5, -1,2e-3", None, None) == (0.5, -1.0, 2e-3)
    for word in ("", "1,", "1 2", "a"):
        with pytest.raises(UsageError):
            Numbers().convert(word, None, None)
