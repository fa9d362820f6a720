"""--help is quick, whole, and the same as what the commands do."""

from __future__ import annotations

import ast
import inspect
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING

import click
import pytest
import torch
from commandline import weightops_here
from conftest import CLI, save

from weightops import __version__
from weightops.cli.main import ENTRIES, main
from weightops.files.dtypes import DTYPE_WORDS
from weightops.naming.identify import DROPPABLE

if TYPE_CHECKING:
    from pathlib import Path

TOP = click.Context(main, help_option_names=["-h", "--help"])
NAMES = [entry.name for entry in ENTRIES]
every_command = pytest.mark.parametrize("name", NAMES)

# What may be imported, beside Python's own modules, by whom.
LIGHT = {"weightops", "click"}
DRAWN = LIGHT | {"rich", "markdown_it", "mdurl", "pygments", "typing_extensions", "attr"}

PROGRAM = """
import sys
before = set(sys.modules)
sys.path.insert(0, {root!r})
from weightops.cli.main import run
try:
    run({words!r})
except SystemExit as e:
    code = e.code
found = {{name.split(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)
print("\\n" + repr((code, sorted(found))), file=sys.stderr)
"""


def imported(folder: Path, *words: str) -> set[str]:
    """The packages, beside Python's own, that a command line loads on its way to exit code 0."""
    program = PROGRAM.format(root=str(CLI.parent), words=list(words))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    code, found = ast.literal_eval(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr
    return set(found)


def command(name: str) -> click.Command:
    found = main.get_command(TOP, name)
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------------ what is loaded


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in NAMES)], ids=" ".join)
def test_help_imports_neither_torch_nor_numpy_nor_rich(tmp_path: Path, words: list[str]) -> None:
    assert imported(tmp_path, *words) <= LIGHT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {"model.diffusion_model.x": torch.ones(3), "b": torch.zeros(2).half()}
    save(tmp_path / "a.safetensors", tensors)
    torch.save(tensors, tmp_path / "a.pt")
    torch.save({"state_dict": tensors}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    return tmp_path


@pytest.mark.parametrize("file", ["a.safetensors", "a.pt", "old.ckpt"])
def test_inspect_never_imports_torch_or_numpy(folder: Path, file: str) -> None:
    assert imported(folder, "inspect", file, "--hash", "--tensors", "*") <= DRAWN


def test_json_needs_no_drawing(folder: Path) -> None:
    assert imported(folder, "inspect", "a.safetensors", "--json") <= LIGHT
    assert imported(folder, "merge", "a.safetensors", "a.pt", "--dry-run", "--json") <= LIGHT


def test_a_dry_run_needs_headers_alone(folder: Path) -> None:
    assert imported(folder, "merge", "a.safetensors", "old.ckpt", "--dry-run") <= DRAWN


# ------------------------------------------------------------------------------------------------ what is said


def test_the_help_of_all_lists_every_command_by_section() -> None:
    done = weightops_here("--help")
    assert (done.code, done.err) == (0, "")
    for entry in ENTRIES:
        assert f"{entry.section}:" in done.out
        assert entry.name in done.out
        assert entry.help.split()[0] in done.out
    assert done.out.count("weightops merge a.safetensors b.safetensors") == 1


def test_without_a_command_the_help_is_shown_on_stderr_as_wrong_use() -> None:
    assert weightops_here() == (2, "", weightops_here("--help").out)


def test_the_short_option_for_help_is_the_same() -> None:
    for words in ([], ["merge"], ["inspect"]):
        assert weightops_here(*words, "-h") == weightops_here(*words, "--help")


def test_the_version_is_said() -> None:
    assert weightops_here("--version") == (0, f"weightops {__version__}\n", "")


@every_command
def test_every_command_and_every_option_has_help(name: str) -> None:
    found = command(name)
    assert found.help
    assert found.short_help
    assert next(entry for entry in ENTRIES if entry.name == name).help.endswith(".")
    for parameter in found.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert parameter.help, parameter.name
            assert parameter.help.split("  [default")[0].endswith((".", "…")), parameter.name


@every_command
def test_every_command_opens_with_one_sentence_and_two_examples(name: str) -> None:
    text = command(name).help or ""
    first, examples, *_ = inspect.cleandoc(text).split("\n\n")
    assert first.rstrip().endswith(".")
    lines = examples.strip("\b\n").splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"weightops {name}") for line in lines)


@every_command
def test_the_examples_of_the_help_are_command_lines_that_parse(name: str) -> None:
    found = command(name)
    for line in inspect.cleandoc(found.help or "").split("\n\n")[1].strip("\b\n").splitlines():
        words = shlex.split(line.split("    ")[0])[2:]
        found.make_parser(click.Context(found, parent=TOP)).parse_args(words)


def test_the_words_of_the_options_are_the_words_of_the_library() -> None:
    choices = {p.name: p.type.choices for p in command("merge").params if isinstance(p.type, click.Choice)}
    assert tuple(choices["dtype"]) == ("keep", *DTYPE_WORDS)
    drop = next(p for p in command("merge").params if p.name == "drop")
    assert isinstance(drop, click.Option)
    assert all(word in (drop.help or "") for word in DROPPABLE)
