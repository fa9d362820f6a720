"""A registry knows the modules of its folder, and imports them only when it is asked."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from weightops.errors import UsageError
from weightops.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REGISTRY: Registry[int] = Registry("fruit", "fruits")


def member(path: Path, value: int) -> None:
    path.write_text(f"from test_registry import REGISTRY\nREGISTRY.register({path.stem!r}, {value})\n")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `fruits` whose modules register themselves with REGISTRY."""
    found = tmp_path / "fruits"
    found.mkdir()
    (found / "__init__.py").touch()
    for number, name in enumerate(["pear", "apple"]):
        (found / f"{name}.py").write_text(
            f"from test_registry import REGISTRY\nREGISTRY.register({name!r}, {number})\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "REGISTRY", Registry("fruit", "fruits"))
    monkeypatch.setitem(sys.modules, "test_registry", sys.modules[__name__])
    yield found
    for name in [n for n in sys.modules if n.split(".")[0] == "fruits"]:
        del sys.modules[name]


@pytest.mark.usefixtures("folder")
def test_nothing_is_imported_before_it_is_asked_for() -> None:
    assert not [name for name in sys.modules if name.startswith("fruits")]
    assert REGISTRY.get("apple") == 1
    assert "fruits.pear" in sys.modules


@pytest.mark.usefixtures("folder")
def test_members_are_listed_by_name() -> None:
    assert list(REGISTRY) == [("apple", 1), ("pear", 0)]


@pytest.mark.usefixtures("folder")
def test_loading_twice_registers_once() -> None:
    REGISTRY.load()
    REGISTRY.load()
    assert len(list(REGISTRY)) == 2


def test_a_new_file_is_a_new_member(folder: Path) -> None:
    member(folder / "fig.py", 7)
    assert REGISTRY.get("fig") == 7


def test_a_module_that_breaks_is_not_passed_over(folder: Path) -> None:
    (folder / "bad.py").write_text("raise RuntimeError('bad')\n")
    with pytest.raises(RuntimeError, match="bad"):
        REGISTRY.get("apple")


@pytest.mark.usefixtures("folder")
def test_two_members_of_one_name_are_refused() -> None:
    REGISTRY.register("kiwi", 1)
    with pytest.raises(ValueError, match="the fruit 'kiwi' is registered twice"):
        REGISTRY.register("kiwi", 2)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("aple", "unknown fruit 'aple'", "did you mean 'apple'?"),
        ("stone", "unknown fruit 'stone'", "known are apple, pear"),
        ("a\x1b[31m", "unknown fruit 'a\\x1b[31m'", "known are apple, pear"),
    ],
)
def test_an_unknown_name_is_refused_with_what_is_known(name: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        REGISTRY.get(name)
    assert (str(caught.value), caught.value.hint) == (message, hint)
