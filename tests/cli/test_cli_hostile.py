"""Nothing that a file holds, and no name of a file, acts on the terminal or is taken for markup."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from commandline import STYLES, harmful, weightops_here
from conftest import CLI, save

if TYPE_CHECKING:
    from collections.abc import Sequence

CONTROLS = "".join(map(chr, [*range(1, 32), 127, *range(128, 160)]))
BIDI = "\u061c\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff\u2028\u2029\U000e0041"
ESCAPES = "\x1b[31m\x1b[2J\x1b]0;title\x07\x1b]8;;http://evil\x1b\\\x9b1m"
MARKUP = "[red]x[/red][bold][/][link=http://evil]y[/link]:smile:[/nothing]\\[red]"
HOSTILE = [CONTROLS, BIDI, ESCAPES, MARKUP, "\r" + " " * 80 + "\ra", "a\nerror: all is lost\nb"]
# On a file system: neither NUL nor a slash, and short.
FILE_NAMES = ["\x1b[31mred\x1b[0m\r\n\u202egpj.safetensors", "[red]x[bold]:smile:.safetensors"]

GLOB = ["--tensors", "*"]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows allows no such file names")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(name: str, *, value: float = 1.0, more: Sequence[str] = ()) -> str:
    names = [f"{place}{text}{i}" for i, text in enumerate(HOSTILE) for place in ("", "model.diffusion_model.", "a.b.")]
    tensors = {n: torch.full((2,), value) for n in [*names, *more]}
    recipe = {"inputs": [{"name": ESCAPES}], "parameters": {MARKUP: [1.0], ESCAPES: BIDI}, "command": "\x1b[1m",
              "method": MARKUP, "version": "\u202e"}  # fmt: skip
    metadata = {text: text * 50 for text in HOSTILE} | {"weightops": json.dumps(recipe)}
    save(Path(name), tensors, metadata)
    return name


def check(out: str, err: str = "") -> None:
    """Nothing harmful, and markup stands as it was written, without a colour of its own."""
    assert harmful(out + err) == set()
    assert "\U0001f604" not in out + err, ":smile: is not to be drawn"


@pytest.fixture(params=["a file", "a terminal"])
def _both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "a terminal":
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")


@pytest.mark.usefixtures("_both")
@pytest.mark.parametrize("name", FILE_NAMES)
@pytest.mark.parametrize("words", [[], ["-v"], GLOB, [*GLOB, "--stats", "-v"], ["--stats"], ["--hash"]], ids=" ".join)
def test_inspect_shows_hostile_names_and_values_harmlessly(name: str, words: list[str]) -> None:
    done = weightops_here("inspect", make(name), *words)
    assert done.code == 0
    check(done.out, done.err)
    shown = re.sub(r"[^ -~]|\s", "", STYLES.sub("", done.out))
    if "-v" in words or words == GLOB:
        assert "[red]x[/red][bold][/][link=http://evil]" in shown
        assert "\\x1b[31m\\x1b[2J\\x1b]0;title\\x07" in shown


@pytest.mark.usefixtures("_both")
@pytest.mark.parametrize("words", [[], ["-v"]], ids=" ".join)
def test_hostile_names_within_an_adapter_are_harmless(words: list[str]) -> None:
    """Of modules that no model has, of keys of no scheme, of embeddings, and in what is wrong with them."""
    tensors: dict[str, torch.Tensor] = {}
    for text in HOSTILE:
        tensors |= {f"lora_unet_{text}.lora_down.weight": torch.ones(2, 2), f"lora_unet_{text}.alpha": torch.ones(3)}
        tensors |= {f"{text}.lora_A.weight": torch.ones(2, 2), f"{text}.lora_B.weight": torch.ones(2, 3)}
        tensors |= {f"<{text}>": torch.ones(2), f"lora_unet_{text}": torch.ones(2)}
    save(Path("a.safetensors"), tensors)
    done = weightops_here("inspect", "a.safetensors", *words)
    assert done.code == 0
    check(done.out, done.err)
    plain = STYLES.sub("", done.out)
    assert "problem: " in plain
    if words:
        assert "[red]x[/red][bold][/][link=http://evil]" in plain
        assert "\\x1b[31m\\x1b[2J" in plain


@pytest.mark.usefixtures("_both")
def test_hostile_names_within_a_known_model_are_harmless() -> None:
    model = {f"double_blocks.{i}.img_mod.lin.weight": torch.zeros(8, 4) for i in range(30)}
    model |= {"img_in.weight": torch.zeros(4, 4), "vector_in.in_layer.bias": torch.zeros(4), ESCAPES: torch.zeros(1)}
    save(Path("a.safetensors"), model)
    done = weightops_here("inspect", "a.safetensors")
    check(done.out, done.err)
    assert "1 strange key: '\\x1b[31m\\x1b[2J" in STYLES.sub("", done.out)


@pytest.mark.usefixtures("_both")
def test_a_table_of_several_files_is_harmless() -> None:
    Path("page\x1b[31m.safetensors").write_text("<html>")
    done = weightops_here("inspect", *[make(name) for name in FILE_NAMES], "page\x1b[31m.safetensors", "missing\x07")
    assert done.code == 2
    check(done.out, done.err)
    assert done.err.splitlines()[0].startswith("error: page\\x1b[31m.safetensors: ")


@pytest.mark.usefixtures("_both")
@pytest.mark.parametrize("words", [[], ["-v"], ["-q"], ["--dry-run", "-v"]], ids=" ".join)
def test_the_report_of_a_merge_is_harmless(words: list[str]) -> None:
    models = make(FILE_NAMES[0], more=["only here\x1b[31m"]), make(FILE_NAMES[1], more=["only there\x1b[31m"])
    done = weightops_here("merge", *models, *words)
    assert done.code == 0
    check(done.out, done.err)
    assert "only there\\x1b[31m" in done.err
    if words != ["-q"]:
        assert STYLES.sub("", done.out).startswith(
            "0.5 × \\x1b[31mred\\x1b[0m\\r\\n\\u202egpj + 0.5 × [red]x[bold]:smile:\n"
        )


@pytest.mark.usefixtures("_both")
def test_errors_are_harmless_and_bounded() -> None:
    names = [make(FILE_NAMES[0]), make(FILE_NAMES[1], value=float("nan"))]
    save(Path("other.safetensors"), {ESCAPES + "x" * 5000: torch.ones(2)})
    save(Path("shape.safetensors"), {ESCAPES + "x" * 5000: torch.ones(3)})
    for words in (
        names,
        [names[0], "other.safetensors"],
        ["other.safetensors", "shape.safetensors"],
        [*names, "--strict", "--vae", f"x{ESCAPES}"],
        [*names, "--drop", ESCAPES],
        [*names, "--set", f"{ESCAPES}=1"],
        [*names, "--set", ESCAPES],
        [*names, "--method", MARKUP],
        [*names, "--dtype", ESCAPES],
        [*names, "--alpha", ESCAPES],
        [*names, f"--{ESCAPES}"],
        [*names, "-o", f"{ESCAPES[:8]}.bin"],
        [*names, "--memory", ESCAPES],
    ):
        done = weightops_here("merge", *words)
        assert done.code in (1, 2)
        check(done.out, done.err)
        assert done.out == ""
        assert len(done.err.splitlines()) <= 2
        assert len(done.err) < 2000


def test_json_is_ascii_and_gives_every_name_as_it_is() -> None:
    name = make(FILE_NAMES[0])
    done = weightops_here("inspect", name, "--json", *GLOB)
    assert done.out.isascii()
    check(done.out)
    found = json.loads(done.out)
    assert found["path"] == name
    assert set(HOSTILE) < found["metadata"].keys()
    assert {f"a.b.{text}{i}" for i, text in enumerate(HOSTILE)} < found["tensor_list"].keys()
    done = weightops_here("merge", name, make(FILE_NAMES[1]), "--json", "--dry-run")
    assert done.out.isascii()
    assert [entry["path"] for entry in json.loads(done.out)["inputs"]] == FILE_NAMES


def test_no_raw_byte_reaches_a_pipe() -> None:
    words = [sys.executable, str(CLI), "inspect", make(FILE_NAMES[0]), "-v", *GLOB]
    done = subprocess.run(words, capture_output=True, check=False, env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 0
    raw = done.stdout + done.stderr
    assert set(range(32)) & set(raw) == {10}
    assert 127 not in raw
    check(done.stdout.decode(), done.stderr.decode())


@pytest.mark.parametrize(
    "recipe",
    ["{}", "[]", "null", '"x"', "{", "[" * 100_000, '{"inputs": 3}', '{"inputs": [{}], "parameters": 3}',
     '{"inputs": [], "parameters": {"w": [[1]]}}', '{"inputs": [], "parameters": {"w": ["x"]}, "command": 1}'],
)  # fmt: skip
def test_a_recipe_that_is_none_of_ours_is_shown_as_any_text(recipe: str) -> None:
    save(Path("a.safetensors"), {"x": torch.ones(1)}, {"weightops": recipe})
    done = weightops_here("inspect", "a.safetensors")
    assert done.code == 0
    assert "weightops" in done.out


def test_metadata_is_folded_unless_all_of_it_is_asked_for() -> None:
    save(Path("a.safetensors"), {"x": torch.ones(1)}, {"long": "word " * 1000})
    short, whole = weightops_here("inspect", "a.safetensors"), weightops_here("inspect", "a.safetensors", "-v")
    assert "(5,000 characters; -v shows them)" in short.out
    assert (short.out.count("word"), whole.out.count("word")) == (32, 1000)


def test_names_of_thousands_of_parts_are_drawn() -> None:
    parts = ["a" + ".a" * i for i in range(0, 1500, 3)]
    save(Path("a.safetensors"), {name: torch.ones(1) for name in parts})
    done = weightops_here("inspect", "a.safetensors", *GLOB)
    assert done.code == 0
    assert done.out.count("F32 [1]") == len(parts)


def test_names_that_are_empty_or_all_dots_are_drawn() -> None:
    names = ["", ".", "..", "a.", ".a", "a..b", "a", "a.b"]
    save(Path("a.safetensors"), {name: torch.ones(1) for name in names})
    done = weightops_here("inspect", "a.safetensors", *GLOB)
    assert done.code == 0
    assert done.out.count("F32 [1]") == len(names)
