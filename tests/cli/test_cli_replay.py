"""replay and the tree of inspect on the command line: exit codes, what is said, and what a hostile recipe cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commandline import weightops_here
from conftest import save
from safetensors.torch import load_file

import weightops
from weightops import __version__


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for n, name in enumerate("abc"):
        save(Path(f"{name}.safetensors"), {"x": torch.full((3,), float(n)), "y": torch.ones(2)}, {"format": "pt"})
    weightops.merge("a.safetensors", "b.safetensors", alpha=0.25, output="ab.safetensors")
    weightops.merge("ab.safetensors", "c.safetensors", base="a.safetensors", output="out.safetensors")


def hashes(file: str) -> list[str]:
    """The first digits of each input's hash, as they are shown."""
    text = weightops.inspect(file).metadata["weightops"]
    return [entry["hash"].removeprefix("xxh3_128:")[:8] for entry in json.loads(text)["inputs"]]


def test_a_file_that_is_made_again_is_said_to_be_identical() -> None:
    done = weightops_here("replay", "out.safetensors")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        f"out.safetensors: merge (weightops {__version__})",
        "ab + 1 × (c − a)",
        "read   a.safetensors  172 B  as it was",
        f"read   ab.safetensors  {Path('ab.safetensors').stat().st_size} B  as it was",
        "read   c.safetensors  172 B  as it was",
        "identical: 2 tensors and the header, byte for byte",
    ]
    assert weightops_here("replay", "out.safetensors", "-q") == (0, "", "")


def test_an_input_that_changed_is_named_and_the_exit_code_is_1() -> None:
    save(Path("c.safetensors"), {"x": torch.full((3,), 2.5), "y": torch.ones(2)}, {"format": "pt"})
    done = weightops_here("replay", "out.safetensors")
    assert done.code == 1
    assert "read   c.safetensors  172 B  changed" in done.out.splitlines()
    assert "  x  3 of 3 values differ, by up to 0.5" in done.out.splitlines()
    assert done.err.startswith("error: out.safetensors: 'c.safetensors' has changed: found xxh3_128:")
    assert done.err.endswith("; 1 of 2 tensors differ, by up to 0.5: 'x'\n")
    assert weightops_here("replay", "out.safetensors", "-q").err == done.err


def test_json_holds_all_of_it() -> None:
    done = weightops_here("replay", "out.safetensors", "--json", "--in", ".")
    said = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert (said["command"], said["identical"], said["same"], said["changed"]) == ("replay", True, True, [])
    assert said["made"] == {"command": "merge", "version": __version__}
    assert [entry["name"] for entry in said["inputs"]] == ["a.safetensors", "ab.safetensors", "c.safetensors"]
    Path("c.safetensors").write_bytes(Path("b.safetensors").read_bytes())
    done = weightops_here("replay", "out.safetensors", "--json")
    said = json.loads(done.out)
    assert (done.code, done.err) == (1, "")
    assert said["changed"] == ["c.safetensors"]
    assert said["differ"]["tensors"] == [
        {"key": "x", "reason": "3 of 3 values differ, by up to 1", "values": 3, "largest": 1.0}
    ]


def test_what_is_made_is_kept_where_it_is_asked_for() -> None:
    done = weightops_here("replay", "out.safetensors", "-o", "again.safetensors")
    assert done.code == 0
    assert "wrote  again.safetensors  1.4 kB" in done.out.splitlines()
    assert Path("again.safetensors").read_bytes() == Path("out.safetensors").read_bytes()


def test_without_a_recipe_or_an_input_there_is_one_line() -> None:
    done = weightops_here("replay", "a.safetensors")
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines()[0] == (
        "error: a.safetensors: has no recipe of weightops in its metadata: it cannot be made again"
    )
    Path("c.safetensors").unlink()
    done = weightops_here("replay", "out.safetensors")
    assert (done.code, done.out) == (2, "")
    assert "was made of 'c.safetensors' (xxh3_128:" in done.err
    assert done.err.splitlines()[1] == "hint: --in FOLDER looks there, too, under whatever name it has now"


# ------------------------------------------------------------------------------------------------ inspect


def test_inspect_draws_how_a_file_was_made_and_its_inputs_before_it() -> None:
    done = weightops_here("inspect", "out.safetensors")
    a, ab, c = hashes("out.safetensors")
    first, b = hashes("ab.safetensors")
    assert first == a
    drawn = done.out[done.out.index("made by") :].splitlines()
    assert drawn == [
        "made by",
        f"merge (weightops {__version__})",
        "└── add_difference, weights [1, 1]",
        f"    ├── a.safetensors  {a}",
        f"    ├── ab.safetensors  {ab}",
        f"    │   └── merge (weightops {__version__})",
        "    │       └── weighted_sum, normalize true, weights [0.75, 0.25]",
        f"    │           ├── a.safetensors  {a}",
        f"    │           └── b.safetensors  {b}",
        f"    └── c.safetensors  {c}",
    ]
    lineage = json.loads(weightops_here("inspect", "out.safetensors", "--json").out)["lineage"]
    assert lineage["inputs"][1]["made"]["merge"]["method"] == "weighted_sum"
    assert "made by" not in weightops_here("inspect", "a.safetensors").out


HASH = "xxh3_128:" + "ab" * 16


def drawn(recipe: object) -> list[str]:
    save(Path("x.safetensors"), load_file("a.safetensors"), {"weightops": json.dumps(recipe)})
    done = weightops_here("inspect", "x.safetensors")
    assert (done.code, done.err) == (0, "")
    return done.out[done.out.index("made by") :].splitlines()[1:] if "made by" in done.out else []


def test_recipes_of_earlier_versions_and_of_other_verbs_are_drawn_too() -> None:
    inputs = [{"name": name, "hash": HASH} for name in ("m", "l", "k")]
    old = {"command": "merge", "version": "0.0.9", "inputs": inputs[:2], "method": "weighted_sum",
           "parameters": {"weights": [0.5, 0.5]}, "dtype": "keep"}  # fmt: skip
    assert drawn(old) == [
        "merge, method weighted_sum, weights [0.5, 0.5] (weightops 0.0.9)", "├── m  abababab", "└── l  abababab",
    ]  # fmt: skip
    fuse = {"command": "fuse", "version": "0.1.0", "inputs": inputs, "strengths": [0.8, -1], "rounding": "nearest"}
    assert drawn(fuse) == [
        "fuse, rounding nearest (weightops 0.1.0)", "├── m  abababab", "├── 0.8 × l  abababab", "└── -1 × k  abababab",
    ]  # fmt: skip
    vae = {"command": "merge", "version": "0.1.0", "inputs": [{**inputs[0], "cut": True}, inputs[1]],
           "merge": {"model": 0, "ema": True}, "vae": {"file": 1}}  # fmt: skip
    assert drawn(vae) == [
        "merge (weightops 0.1.0)", "├── m, ema true  abababab (how it was made is left out)", "└── VAE of l  abababab",
    ]  # fmt: skip


@pytest.mark.parametrize("merge", [
    {}, {"model": 99}, {"model": True}, {"method": ["x"], "inputs": "y", "parameters": 3}, {"inputs": [None, 3, {}]},
    {"method": "m\x1b[31m", "inputs": [], "parameters": {"\x1b]0;x\a": "\x1b[2J", "deep": [[["\r\n"]]]}},
    {"method": "m", "inputs": [{"model": 0}] * 500, "parameters": {"x": "y" * 10_000}},
], ids=str)  # fmt: skip
def test_a_recipe_that_a_stranger_wrote_is_drawn_harmlessly_and_in_bounds(merge: object) -> None:
    entry = {"name": "a\x1b[31m\n", "hash": HASH}
    lines = drawn({"command": "merge", "version": "1", "inputs": [entry], "merge": merge, "strengths": {"x": 1}})
    assert lines
    assert all(line.isprintable() and len(line) < 400 for line in lines)
    assert len(lines) <= 62
