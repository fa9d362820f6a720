"""The house keeps its floors: who imports whom, who prints, what is packaged, what is documented."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest

import weightops
from weightops.cli.main import ENTRIES, main

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "weightops"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each floor, and what it may import of the house beside itself. A floor is a file or a folder of weightops/.
FLOORS: dict[str, set[str]] = {
    "errors": set(),
    "registry": {"errors"},
    "lineage": {"errors"},
    "files": {"errors", "registry", "lineage", "version"},
    "naming": {"errors", "registry", "files"},
    "plan": {"errors", "registry", "files", "naming", "lineage"},
    "engine": {"errors", "registry", "files", "plan"},
    "merging": {"errors", "registry", "plan"},
    "lora": {"errors", "registry", "files", "naming"},
    "ops": {"errors", "registry", "files", "naming", "lineage", "plan", "engine", "merging", "lora", "version"},
    "diffusion": {
        "errors",
        "registry",
        "files",
        "naming",
        "lineage",
        "plan",
        "engine",
        "merging",
        "lora",
        "ops",
        "version",
    },
    "synthesis": {
        "errors",
        "registry",
        "files",
        "naming",
        "lineage",
        "plan",
        "engine",
        "merging",
        "lora",
        "ops",
        "diffusion",
        "version",
    },
    "cli": {
        "errors",
        "registry",
        "files",
        "naming",
        "lineage",
        "plan",
        "engine",
        "merging",
        "lora",
        "ops",
        "diffusion",
        "synthesis",
        "version",
    },
    # The package itself holds the version, and loads a verb when it is asked for.
    "__init__": {"ops", "diffusion"},
}

# The only modules that may import torch before it is used.
TORCH_AT_THE_TOP = {"engine/tensors.py"}

FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "misc", "core"}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree_of(path: Path) -> ast.Module:
    return parsed(path.read_text(encoding="utf-8"))


@functools.cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def imports_of(path: Path, *, types: bool = True) -> Iterator[str]:
    """Every module that a file imports, anywhere in it: at the top, in functions, by name, and for types."""
    tree = tree_of(path)
    if not types:
        kept = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
        tree = ast.Module(kept, [])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"weightops(\.\w+)+", str(node.value)):
            yield str(node.value)


def floors_used(path: Path) -> set[str]:
    found = set()
    for module in imports_of(path):
        parts = module.split(".")
        if parts[0] == "weightops":
            found.add("version" if parts[1:] in ([], ["__version__"]) else parts[1])
    return found - {floor_of(path)}


every_file = pytest.mark.parametrize("path", FILES, ids=name_of)


# ------------------------------------------------------------------------------------------------ floors


@every_file
def test_a_floor_imports_only_from_the_floors_below(path: Path) -> None:
    assert floors_used(path) <= FLOORS[floor_of(path)]


def test_no_floor_imports_one_that_imports_it() -> None:
    def below(floor: str) -> set[str]:
        return {f for g in FLOORS.get(floor, set()) for f in {g, *below(g)}}

    assert all(floor not in below(floor) for floor in FLOORS)


def test_every_floor_is_in_the_table_and_the_table_has_no_other() -> None:
    assert {floor_of(path) for path in FILES} == set(FLOORS)


def test_the_check_of_imports_sees_every_kind_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    path = tmp_path / "plan.py"
    path.write_text(
        "import weightops.a\n"
        "from weightops.b import x\n"
        "from weightops import c\n"
        "if TYPE_CHECKING:\n    from weightops.d.e import y\n"
        "def f():\n    import weightops.g\n    importlib.import_module('weightops.h.i')\n"
    )
    assert floors_used(path) == set("abcdgh")


# ------------------------------------------------------------------------------------------------ who does what


@every_file
def test_only_the_command_line_prints(path: Path) -> None:
    if floor_of(path) == "cli":
        return
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "input"), f"line {node.lineno}"
            assert not called.startswith(("click.", "sys.stdout", "sys.stderr", "logging.")), f"line {node.lineno}"
    said = {"click", "rich", "logging"} | ({"warnings"} if name_of(path) != "diffusion/extras.py" else set())
    assert not said & {module.split(".")[0] for module in imports_of(path)}


@every_file
def test_torch_numpy_and_rich_are_imported_where_they_are_used(path: Path) -> None:
    """At the top of a file they would be paid for by --help, and by whoever only looks at a header."""
    heavy = {"torch", "numpy", "rich", "xxhash", "huggingface_hub", "safetensors", "matplotlib", "scipy", "yaml"}
    heavy |= {"accelerate", "diffusers", "peft", "PIL", "transformers", "imageio_ffmpeg", "onnxruntime"}
    if name_of(path) in TORCH_AT_THE_TOP:
        heavy -= {"torch"}
    for node in tree_of(path).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not heavy & {name.split(".")[0] for name in names}, f"line {node.lineno}"


@every_file
def test_only_the_files_and_the_engine_touch_mappings_of_memory(path: Path) -> None:
    if floor_of(path) not in ("files", "engine"):
        assert "mmap" not in set(imports_of(path))


@every_file
def test_a_file_begins_with_what_it_owns(path: Path) -> None:
    assert ast.get_docstring(tree_of(path)), "a module has a docstring of one sentence"


@pytest.mark.parametrize("path", [*FILES, ROOT / "cli.py"], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_is_left_for_later(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)
    assert path.stem not in FORBIDDEN_NAMES
    assert path.parent.name not in FORBIDDEN_NAMES


def test_no_module_changes_anything_when_it_is_imported() -> None:
    """Definitions and registration only: no call at the top of a file but of what makes a value."""
    allowed = re.compile(
        r"frozenset|tuple|dict|re\.compile|TypeVar|Registry|threading\.local|ContextVar|namedtuple"
        r"|click\.option|together|run|console|Dtype|Entry|struct\.Struct|max|same|under|Variant|within|refuse_shares|ranked|Look|Method"
    )
    for path in FILES:
        for node in tree_of(path).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                called = ast.unparse(node.value.func)
                assert path.name == "__main__.py" or called.endswith(("register", ".update")), (
                    f"{name_of(path)}:{node.lineno}"
                )
            elif isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Call):
                assert allowed.search(ast.unparse(node.value.func)), f"{name_of(path)}:{node.lineno}"


# ------------------------------------------------------------------------------------------------ packaging, exports


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_packages_listed_are_the_folders_there_are() -> None:
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in PACKAGE.rglob("__init__.py")}
    assert project()["tool"]["setuptools"]["packages"] == sorted(folders)  # type: ignore[index]
    assert {path.parent for path in FILES} == {path.parent for path in PACKAGE.rglob("__init__.py")}


def test_what_is_imported_is_what_is_declared() -> None:
    said: Any = project()["project"]
    lines = [*said["dependencies"], *(line for name in EXTRAS for line in said["optional-dependencies"][name])]
    declared = {re.split(r"[<>=~!\[; ]", line)[0] for line in lines}
    names = {
        "huggingface-hub": "huggingface_hub", "pyyaml": "yaml", "pillow": "PIL", "imageio-ffmpeg": "imageio_ffmpeg",
    }  # fmt: skip
    used = {module.split(".")[0] for path in FILES for module in imports_of(path, types=False)}
    assert used - set(sys.stdlib_module_names) - {"weightops"} == {names.get(name, name) for name in declared}


# Each extra, and of each package that it brings the only places that may import it: files, or a floor.
EXTRAS = {
    "plot": {"matplotlib": ("cli/plots.py", "diffusion/figures.py")},
    "rebasin": {"scipy": ("merging/rebasin.py",)},
    "diffusion": {
        "accelerate": ("diffusion/",),
        "diffusers": ("diffusion/", "synthesis/"),
        "matplotlib": ("cli/plots.py", "diffusion/figures.py"),
        "peft": ("diffusion/",),
        "PIL": ("diffusion/", "synthesis/"),
        "safetensors": ("diffusion/", "synthesis/"),
        "transformers": ("diffusion/", "synthesis/"),
    },
    "synthesis": {
        "accelerate": ("diffusion/",),
        "matplotlib": ("cli/plots.py", "diffusion/figures.py"),
        "onnxruntime": ("synthesis/embedders.py",),
        "PIL": ("diffusion/", "synthesis/"),
    },
    "video": {"imageio_ffmpeg": ("diffusion/video.py",)},
}


@pytest.mark.parametrize("name", EXTRAS)
def test_an_extra_is_used_where_it_is_needed_alone(name: str) -> None:
    for package, places in EXTRAS[name].items():
        users = {name_of(path) for path in FILES for module in imports_of(path) if module.split(".")[0] == package}
        assert users, package
        assert all(user.startswith(places) for user in users), package
        assert all(any(user.startswith(place) for user in users) for place in places), package


def test_the_version_is_said_in_one_place_for_all() -> None:
    assert project()["project"]["version"] == weightops.__version__  # type: ignore[index]


OPS = ["blocks", "combine", "convert", "extract", "fuse", "inspect", "merge", "replay", "resize", "unfuse"]
DIFFUSION = ["caption", "evaluate", "generate", "study", "train"]
VERBS = sorted([*OPS, *DIFFUSION])


def test_every_verb_is_a_function_of_the_package() -> None:
    assert [name for name in weightops.__all__ if not name.startswith("_")] == VERBS
    for name in VERBS:
        assert name in dir(weightops)
        assert callable(getattr(weightops, name))
        module = f"weightops.{'ops' if name in OPS else 'diffusion'}.{name}"
        assert getattr(weightops, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="module 'weightops' has no attribute 'marge'"):
        weightops.marge  # noqa: B018


def test_no_subpackage_takes_the_place_of_a_verb() -> None:
    """Importing weightops.merge, were there one, would put the module where the function was."""
    for name in weightops.__all__:
        assert importlib.util.find_spec(f"weightops.{name}") is None
    for path in FILES:
        module = ".".join(["weightops", *path.relative_to(PACKAGE).with_suffix("").parts])
        if path.stem not in ("__init__", "__main__"):
            importlib.import_module(module)
    assert all(callable(getattr(weightops, name)) for name in VERBS)


def test_the_package_itself_costs_nothing() -> None:
    program = "import sys; b = set(sys.modules); import weightops; print(sorted(set(sys.modules) - b)); weightops.merge"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {name.split(".")[0] for name in ast.literal_eval(done.stdout)} - set(sys.stdlib_module_names) == {
        "weightops"
    }


# ------------------------------------------------------------------------------------------------ documentation


def test_every_command_has_its_module() -> None:
    for entry in ENTRIES:
        command = importlib.import_module(f"weightops.cli.{entry.name}").command
        assert isinstance(command, click.Command)
        assert command.name == entry.name


def test_every_command_of_a_group_has_its_module() -> None:
    from weightops.cli.synth import command

    for entry in command.entries:  # type: ignore[attr-defined]
        found = importlib.import_module(f"weightops.cli.synth_{entry.name.replace('-', '_')}").command
        assert found.name == entry.name
        assert f"weightops synth {entry.name}" in readme()


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_is_documented() -> None:
    for entry in ENTRIES:
        assert f"weightops {entry.name}" in readme(), entry.name


def command_lines(text: str) -> list[list[str]]:
    """Every `weightops …` line in the code blocks of a text, as words."""
    found = []
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.match(r"\s*(?:\$ )?(?:python )?(?:weightops|cli\.py) (.*)", line)
            if match:
                found.append(shlex.split(match.group(1), comments=True))
    return found


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_every_command_line_that_is_shown_can_be_said(name: str) -> None:
    lines = command_lines((ROOT / name).read_text(encoding="utf-8"))
    assert lines or name != "README.md"
    for words in lines:
        if words[0].startswith("-"):
            continue
        context = click.Context(main, help_option_names=["-h", "--help"])
        command = main.get_command(context, words[0])
        assert command is not None, words
        rest = list(words[1:])
        while isinstance(command, click.Group) and rest and rest[0] in command.list_commands(context):
            command = command.get_command(context, rest.pop(0))
            assert command is not None, words
        parser = command.make_parser(click.Context(command, parent=context))
        options, arguments, _ = parser.parse_args(rest)
        wanted = [p for p in command.params if isinstance(p, click.Argument)]
        assert all(not p.required or options.get(p.name or "") for p in wanted), words
        assert not arguments, words


def method_rows() -> list[str]:
    """The README's table of merge methods, as signatures and docstrings make it."""
    from weightops.merging.method import METHODS

    words = {"Tensor": "", "Delta": " (Δ)", "Either": " (or Δ)"}
    rows = []
    for name, method in METHODS:
        models = ", ".join(f"{m}{words[method.roles[n]]}" for n, m in enumerate(method.models))
        said = ", ".join(p.name if p.default is None else f"{p.name}={p.default}" for p in method.parameters)
        summary = " ".join(method.summary.split()).replace("|", "\\|")
        rows.append(f"| `{name}` | {models.replace('*', '')}{' …' * method.is_open} | {said} | {summary} |")
    return rows


def test_the_table_of_methods_is_that_of_the_registry() -> None:
    table = [line for line in readme().splitlines() if re.match(r"\| `[a-z_]+` \| .* \| .* \|", line)]
    missing = [row for row in method_rows() if row not in table]
    assert missing == []


def test_tests_mirror_the_floors() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert folders <= {floor for floor in FLOORS if (PACKAGE / floor).is_dir()}


def test_tests_have_names_of_their_own() -> None:
    """Without packages, two test files of one name could not be imported in one run."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert sorted(set(names)) == sorted(names)
