"""fuse --undo and unfuse, said on the command line."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commandline import weightops_here
from conftest import CLI, save

BASE, OUT, UNDO = (Path(f"{name}.safetensors") for name in ("base", "out", "undo"))


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    weight = (0.03 * torch.randn(60, 50, generator=generator)).half()
    save(BASE, {"a.weight": weight, "b": torch.arange(9)}, {"title": "mine"})
    up, down = torch.randn(60, 2, generator=generator), 1e-3 * torch.randn(2, 50, generator=generator)
    save(Path("style.safetensors"), {"lora_unet_a.lora_up.weight": up, "lora_unet_a.lora_down.weight": down})


def fuse(*more: object) -> None:
    done = weightops_here("fuse", BASE, "style.safetensors:0.8", "-o", OUT, "--undo", UNDO, *more)
    assert (done.code, done.err) == (0, "")


def test_a_fuse_is_said_with_its_undo_and_taken_back() -> None:
    done = weightops_here("fuse", BASE, "style.safetensors:0.8", "-o", OUT, "--undo", UNDO)
    assert (done.code, done.err) == (0, "")
    wrote = [line.split()[1] for line in done.out.splitlines() if line.startswith("wrote")]
    assert wrote == [str(OUT), str(UNDO)]
    back = weightops_here("unfuse", OUT, "--undo", UNDO, "-o", "back.safetensors")
    assert (back.code, back.err) == (0, "")
    assert back.out.splitlines()[0] == "base.safetensors as it was: 1 tensor taken back, 1 tensor copied"
    assert Path("back.safetensors").read_bytes() == BASE.read_bytes()


def test_without_a_name_it_is_the_original_s_if_nothing_bears_it() -> None:
    fuse()
    whole = BASE.read_bytes()
    assert "base-unfused.safetensors" in weightops_here("unfuse", OUT, "--undo", UNDO).out
    BASE.unlink()
    assert weightops_here("unfuse", OUT, "--undo", UNDO).code == 0
    assert BASE.read_bytes() == Path("base-unfused.safetensors").read_bytes() == whole


def test_json_says_what_was_written() -> None:
    done = weightops_here("fuse", BASE, "style.safetensors", "-o", OUT, "--undo", UNDO, "--json")
    assert json.loads(done.out)["undo"] == {"output": str(UNDO), "bytes_written": UNDO.stat().st_size}
    found = json.loads(weightops_here("unfuse", OUT, "--undo", UNDO, "-o", "back.safetensors", "--json").out)
    assert found["command"] == "unfuse"
    assert (found["output"], found["bytes_written"]) == ("back.safetensors", BASE.stat().st_size)
    assert found["keys"] == {"used": 1, "copied": 1, "kept": [], "unused": []}
    assert [entry["path"] for entry in found["inputs"]] == [str(OUT), str(UNDO)]


def test_a_dry_run_writes_nothing_and_says_the_most() -> None:
    done = weightops_here("fuse", BASE, "style.safetensors", "-o", OUT, "--undo", UNDO, "--dry-run")
    line = next(line for line in done.out.splitlines() if "undo" in line)
    assert line.startswith("would write undo.safetensors  at most ")
    assert not OUT.exists()
    assert not UNDO.exists()
    fuse()
    done = weightops_here("unfuse", OUT, "--undo", UNDO, "-o", "back.safetensors", "--dry-run")
    assert "would write back.safetensors" in done.out
    assert not Path("back.safetensors").exists()


def test_the_wrong_file_is_an_error_in_two_lines() -> None:
    fuse()
    weightops_here("fuse", BASE, "style.safetensors:0.9", "-o", "other.safetensors")
    done = weightops_here("unfuse", "other.safetensors", "--undo", UNDO, "-o", "back.safetensors")
    assert (done.code, done.out) == (1, "")
    error, hint = done.err.splitlines()
    assert error.startswith(
        "error: other.safetensors: is not the file that undo.safetensors was made for: found xxh3_128:"
    )
    assert hint == "hint: that one was written as 'out.safetensors'; any of its tensors may have changed"
    swapped = weightops_here("unfuse", UNDO, "--undo", OUT)
    assert swapped.err == (
        "error: out.safetensors: is no undo file: its metadata hold no 'weightops-undo'\n"
        "hint: fuse --undo FILE writes one\n"
    )
    assert weightops_here("unfuse", OUT).err.startswith("error: missing option '--undo'")
    assert weightops_here("unfuse", OUT).code == 2
    assert not Path("back.safetensors").exists()


def test_inspect_says_what_an_undo_is_for() -> None:
    fuse()
    done = weightops_here("inspect", UNDO)
    assert "of out.safetensors: unfuse makes it base.safetensors again" in done.out
    save(Path("odd.safetensors"), {"x": torch.ones(1)}, {"weightops-undo": '{"fused": []}'})
    assert weightops_here("inspect", "odd.safetensors").code == 0


def test_unfuse_needs_no_torch() -> None:
    fuse("--dtype", "bf16")
    program = (
        "import sys; from weightops.cli.main import run\n"
        "try: run(['unfuse', 'out.safetensors', '--undo', 'undo.safetensors', '-q'])\n"
        "except SystemExit as e: print((e.code, 'torch' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(CLI.parent)!r})\n{program}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ast.literal_eval(done.stdout) == (0, False), done.stderr
    assert Path("base-unfused.safetensors").read_bytes() == BASE.read_bytes()
