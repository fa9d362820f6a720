"""inspect and merge from the command line: words in, report out."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commandline import STYLES, weightops_here
from conftest import CLI, save
from safetensors.torch import load_file

from weightops import __version__
from weightops.cli import render
from weightops.merging.method import METHODS

UNET = "model.diffusion_model.out.2.weight"
VAE = "first_stage_model.decoder.conv_in.weight"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("a", 1.0), ("b", 3.0), ("c", 8.0)):
        save(Path(f"{name}.safetensors"), {UNET: torch.full((4,), value), VAE: torch.full((2,), value)}, {"of": name})


def merged(*words: object) -> dict[str, list[float]]:
    done = weightops_here("merge", *words, "-o", "out.safetensors", "--force")
    assert done.code == 0, done.err
    return {key: tensor.tolist() for key, tensor in load_file("out.safetensors").items()}


# ------------------------------------------------------------------------------------------------ merge


def test_the_command_that_everyone_types_works_just_so() -> None:
    """In a process of its own, in a folder, without any other word."""
    words = [sys.executable, str(CLI), "merge", "a.safetensors", "b.safetensors", "--alpha", "0.75"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert load_file("a+b-0.75.safetensors")[UNET].tolist() == [2.5] * 4
    assert load_file("a+b-0.75.safetensors")[VAE].tolist() == [1.0] * 2
    lines = done.stdout.splitlines()
    assert lines[0] == "0.25 × a + 0.75 × b"
    assert "1 used, 1 copied, 1 unused" in lines
    assert "       1  b.safetensors: the VAE is taken from model 1" in lines
    assert any(re.fullmatch(r"wrote  a\+b-0\.75\.safetensors  [0-9.]+ k?B", line) for line in lines)
    assert re.search(r"[0-9.]+ s, .*/s, peak memory [0-9]+ MiB", done.stdout)


@pytest.mark.parametrize(
    ("words", "unet", "vae"),
    [
        (["--weights", "1,3"], 2.5, 1.0),
        (["--weights", "1,3", "--no-normalize"], 10.0, 1.0),
        (["--base", "c.safetensors"], -4.0, 1.0),
        (["--base", "c.safetensors", "--alpha", "-1"], 6.0, 1.0),
        (["--vae", "2"], 2.0, 3.0),
        (["--vae", "merge"], 2.0, 2.0),
        (["--vae", "c.safetensors"], 2.0, 8.0),
        (["--method", "weighted_sum", "--alpha", "1"], 3.0, 1.0),
        (["--device", "cpu", "--threads", "2", "--memory", "64MiB"], 2.0, 1.0),
        (["--text-encoder", "merge", "--on-mismatch", "keep-first", "--strict", "--verify"], 2.0, 1.0),
        (["--dtype", "fp16"], 2.0, 1.0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_option_reaches_the_work(words: list[str], unet: float, vae: float) -> None:
    assert merged("a.safetensors", "b.safetensors", *words) == {UNET: [unet] * 4, VAE: [vae] * 2}


def test_several_components_are_dropped_at_once() -> None:
    assert merged("a.safetensors", "b.safetensors", "--drop", "vae, ema").keys() == {UNET}


def test_a_dry_run_writes_nothing_and_says_the_size() -> None:
    before = sorted(Path().iterdir())
    done = weightops_here("merge", "a.safetensors", "b.safetensors", "--dry-run", "-o", "out.safetensors")
    assert (done.code, done.err) == (0, "")
    assert sorted(Path().iterdir()) == before
    real = weightops_here("merge", "a.safetensors", "b.safetensors", "-o", "out.safetensors", "--json")
    size = json.loads(real.out)["bytes_written"]
    assert size == Path("out.safetensors").stat().st_size
    assert f"would write out.safetensors  {size} B" in done.out.splitlines()
    dry = weightops_here("merge", "a.safetensors", "b.safetensors", "--dry-run", "-o", "new.safetensors", "--json")
    assert json.loads(dry.out)["dry_run"] is True


def test_an_existing_file_is_replaced_only_when_forced() -> None:
    Path("out.safetensors").write_text("mine")
    words = ["merge", "a.safetensors", "b.safetensors", "-o", "out.safetensors"]
    done = weightops_here(*words)
    assert (done.code, done.err.splitlines()[0]) == (1, "error: out.safetensors: exists")
    assert Path("out.safetensors").read_text() == "mine"
    assert weightops_here(*words, "--force").code == 0
    assert load_file("out.safetensors")[UNET].tolist() == [2.0] * 4


def test_json_is_one_document_and_nothing_else() -> None:
    done = weightops_here("merge", "a.safetensors", "b.safetensors", "--json", "--verify")
    found = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert found.keys() >= {
        "command", "version", "inputs", "output", "bytes_written", "keys", "seconds", "peak_memory_bytes", "warnings",
    }  # fmt: skip
    assert (found["command"], found["version"]) == ("merge", __version__)
    assert all(entry.keys() == {"path", "hash", "bytes"} for entry in found["inputs"])
    assert found["keys"].keys() >= {"used", "copied", "unused"}
    assert all(entry.keys() >= {"key", "reason"} for entry in found["keys"]["unused"])
    assert found["verified"]["largest_ulp"] <= 1.0


def test_a_quiet_merge_says_nothing_but_what_is_wrong() -> None:
    assert weightops_here("merge", "a.safetensors", "b.safetensors", "-q") == (0, "", "")
    save(Path("d.safetensors"), {UNET: torch.ones(4), "new": torch.ones(1)})
    done = weightops_here("merge", "a.safetensors", "d.safetensors", "-q")
    assert (done.code, done.out) == (0, "")
    assert (
        done.err.splitlines()
        == [
            f"warning: 1 tensor kept from a.safetensors unmerged: '{VAE}'",
            "warning: 1 tensor of d.safetensors left out: 'new'",
        ]
        or VAE not in done.err
    )
    assert weightops_here("merge", "a.safetensors", "a.safetensors", "b.safetensors", "--alpha", "1", "-q").code == 2


def test_a_talkative_merge_names_every_key_and_hash() -> None:
    words = ["merge", "a.safetensors", "b.safetensors", "-o", "out.safetensors", "--force"]
    plain, talkative = weightops_here(*words), weightops_here(*words, "-v")
    assert VAE not in plain.out
    assert VAE in talkative.out
    assert len(re.findall("xxh3_128:[0-9a-f]{32}", talkative.out)) == 2
    assert "xxh3_128" not in plain.out


def test_verify_says_how_close_the_result_is() -> None:
    done = weightops_here("merge", "a.safetensors", "b.safetensors", "--verify")
    assert re.search(r"verified: 2 samples, [0-9,]+ values, at most 0\.[0-9]{2} ulp from float64", done.out)


def test_the_methods_are_listed_without_any_model() -> None:
    done = weightops_here("merge", "--list-methods")
    assert (done.code, done.err) == (0, "")
    for name, method in METHODS:
        assert name in done.out
        assert method.summary.split()[0] in done.out
        assert all(parameter.name in done.out for parameter in method.parameters)


def test_settings_reach_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr("weightops.cli.merge.merge", lambda *models, **words: found.append(words["parameters"]))
    monkeypatch.setattr("weightops.cli.render.report", lambda *_, **__: None)
    weightops_here("merge", "a", "b", "--set", "share=0.5", "--set", "name=x=y")
    assert found == [{"share": "0.5", "name": "x=y"}]


# ------------------------------------------------------------------------------------------------ inspect


def test_inspect_says_what_a_file_is() -> None:
    done = weightops_here("inspect", "a.safetensors")
    assert (done.code, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["a.safetensors"]
    assert lines[1][0] == "checkpoint"
    assert ["model", "1", "4", "16", "B", "F32"] in lines
    assert ["vae", "1", "2", "8", "B", "F32"] in lines
    assert next(line for line in lines if line[:1] == ["total"])[:3] == ["total", "2", "6"]
    assert ["of", "a"] in lines


def test_inspect_draws_a_tree_of_the_tensors_asked_for() -> None:
    done = weightops_here("inspect", "a.safetensors", "--tensors", "*conv_in*")
    assert "1 tensor" in done.out.splitlines()
    assert "F32 [2]" in done.out
    assert "F32 [4]" not in done.out
    everything = weightops_here("inspect", "a.safetensors", "--tensors")
    assert "F32 [4]" in everything.out


def test_the_tree_joins_single_children_and_wraps_nothing() -> None:
    tensors = {
        "a.b.c.x": torch.ones(2),
        "a.b.c.y": torch.ones(3).half(),
        "a.d": torch.ones(1),
        "z" * 300: torch.ones(1),
    }
    save(Path("t.safetensors"), tensors)
    done = weightops_here("inspect", "t.safetensors", "--tensors", "*")
    assert done.out.split("\n\n")[-1].splitlines() == [
        "4 tensors",
        "├── a.",
        "│   ├── b.c.",
        "│   │   ├── x  F32 [2]",
        "│   │   └── y  F16 [3]",
        "│   └── d  F32 [1]",
        f"└── {'z' * 300}  F32 [1]",
    ]


def test_inspect_names_what_is_not_finite() -> None:
    save(Path("bad.safetensors"), {"x": torch.tensor([1.0, torch.nan, torch.inf]), "y": torch.ones(2)})
    done = weightops_here("inspect", "bad.safetensors", "--stats")
    assert "x: norm 1, 1 … 1, NaN 1, Inf 1" in done.out
    assert "y:" not in done.out
    assert "no NaN, no Inf" in weightops_here("inspect", "a.safetensors", "--stats").out


def test_inspect_says_whose_names_the_tensors_bear() -> None:
    save(Path("sd.safetensors"), {"model.diffusion_model.input_blocks.1.1.proj_in.weight": torch.ones(2, 2, 1, 1)})
    assert "checkpoint · sd15 · original names · safetensors · " in weightops_here("inspect", "sd.safetensors").out


def test_the_norm_of_very_large_values_is_still_a_number() -> None:
    save(Path("huge.safetensors"), {"x": torch.full((4,), 1e300, dtype=torch.float64)})
    done = weightops_here("inspect", "huge.safetensors", "--stats")
    assert (done.code, done.err) == (0, "")
    assert "1 floating tensors: norm 2e+300" in done.out


def test_in_a_pipe_every_row_is_one_line() -> None:
    name = "long-" * 40 + ".safetensors"
    for path in (Path(name), Path("x.safetensors")):
        save(path, {"x": torch.ones(4)})
    assert sum(name in line for line in weightops_here("inspect", name, "x.safetensors").out.splitlines()) == 1


def test_the_progress_bar_waits_for_something_to_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal := io.StringIO())
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    with render.progress("merging", quiet=False) as on_progress:
        assert "merging" not in terminal.getvalue()
        on_progress(1, 2)
    assert "merging" in terminal.getvalue()


def test_inspect_as_json_is_one_object_or_an_array() -> None:
    one = json.loads(weightops_here("inspect", "a.safetensors", "--json").out)
    assert one.keys() >= {
        "path", "kind", "architecture", "spelling", "tensors", "parameters", "bytes", "dtypes", "components",
        "metadata",
    }  # fmt: skip
    assert all(entry.keys() >= {"tensors", "parameters", "dtypes"} for entry in one["components"].values())
    several = json.loads(weightops_here("inspect", "a.safetensors", "b.safetensors", "--json").out)
    assert several == [one, {**one, "path": "b.safetensors", "metadata": {"of": "b"}}]
    all_of_it = json.loads(weightops_here("inspect", "a.safetensors", "--json", "--stats", "--hash", "--tensors").out)
    assert all_of_it.keys() - one.keys() == {"tensor_list", "stats", "hashes"}


def test_several_files_are_one_table_or_each_in_full() -> None:
    table = weightops_here("inspect", "a.safetensors", "b.safetensors").out.splitlines()
    assert len(table) == 3
    assert table[0].split() == ["file", "kind", "architecture", "tensors", "parameters", "size", "dtypes"]
    full = weightops_here("inspect", "a.safetensors", "b.safetensors", "--hash").out
    assert full.count("sha256") == 2


# ------------------------------------------------------------------------------------------------ colours


def test_there_are_no_colours_in_a_pipe_and_none_where_NO_COLOR_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["merge", "a.safetensors", "b.safetensors", "-o", "out.safetensors", "--force"]
    assert "\x1b" not in weightops_here(*words).out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = weightops_here(*words).out
    assert "\x1b[32m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    plain = weightops_here(*words).out
    found = {code for style in STYLES.findall(plain) for code in style[2:-1].split(";")}
    assert not {code for code in found if code not in ("", "0", "1", "2")}
