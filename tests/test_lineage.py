"""The recipe within a file, and those of its inputs within it: read without trust, kept within bounds."""

from __future__ import annotations

import json
from typing import Any

import pytest

from weightops.errors import FormatError
from weightops.lineage import EMBEDDED, GENERATIONS, KEY, as_recorded, entries, read_recipe, recipe_of

HASH = "xxh3_128:" + "0123456789abcdef" * 2


def recipe(*names: str, **more: Any) -> dict[str, Any]:
    inputs = [{"name": name, "hash": HASH} for name in names or ("a.safetensors",)]
    return {"command": "merge", "version": "0.1.0", "inputs": inputs, **more}


def told(said: Any) -> dict[str, str]:
    return {KEY: json.dumps(said)}


def grown(generations: int, **more: Any) -> dict[str, Any]:
    """A recipe of so many generations, one input each."""
    found = recipe(**more)
    for _ in range(generations - 1):
        found = recipe(**more) | {"inputs": [{"name": "x", "hash": HASH, "made": found}]}
    return found


def depth(said: dict[str, Any]) -> int:
    below = [depth(entry["made"]) for entry in said["inputs"] if "made" in entry]
    return 1 + max(below, default=0)


def test_an_input_that_was_made_brings_its_recipe_along() -> None:
    made = recipe("a", "b", alpha=0.5)
    found = entries([("m", HASH, told(made)), ("c", HASH, {"format": "pt"})])
    assert found == [{"name": "m", "hash": HASH, "made": made}, {"name": "c", "hash": HASH}]


def test_so_many_generations_are_kept_and_what_is_cut_is_said() -> None:
    (found,) = entries([("m", HASH, told(grown(GENERATIONS)))])
    assert depth(found["made"]) == GENERATIONS
    assert '"cut"' not in json.dumps(found)
    (found,) = entries([("m", HASH, told(grown(GENERATIONS + 3)))])
    assert depth(found["made"]) == GENERATIONS
    last = found["made"]
    while "made" in last["inputs"][0]:
        last = last["inputs"][0]["made"]
    assert last["inputs"] == [{"name": "x", "hash": HASH, "cut": True}]
    (again,) = entries([("m", HASH, told(recipe() | {"inputs": [found]}))])
    assert json.dumps(again).count('"cut": true') == 1


def test_the_nearest_generations_are_kept_where_there_is_little_room() -> None:
    (found,) = entries([("m", HASH, told(grown(4, blocks="x" * (EMBEDDED // 3))))])
    assert depth(found["made"]) == 2
    assert len(json.dumps(found)) < EMBEDDED + 200
    (found,) = entries([("m", HASH, told(recipe(blocks="x" * EMBEDDED)))])
    assert found == {"name": "m", "hash": HASH, "cut": True}


def test_names_are_as_a_header_can_hold_them() -> None:
    assert as_recorded("odd\udcff") == "odd\ufffd"


BAD_INPUTS = (
    [], None, "a", {}, [None], [{}], [{"name": "a"}], [{"name": 1, "hash": HASH}], [{"name": "a", "hash": "sha"}],
    [{"name": "a", "hash": HASH + "0"}], [{"name": "a", "hash": [HASH]}], [{"name": "", "hash": HASH}],
    [{"name": "/etc/passwd", "hash": HASH}], [{"name": "..", "hash": HASH}], [{"name": "..\\a", "hash": HASH}],
    [{"name": "a\0", "hash": HASH}], [{"name": "a" * 256, "hash": HASH}], [{"name": "a", "hash": HASH}] * 1001,
    [{"name": "a", "hash": HASH, "made": None}], [{"name": "a", "hash": HASH, "made": recipe("../b")}],
)  # fmt: skip


@pytest.mark.parametrize("said", [
    *(recipe() | {"inputs": inputs} for inputs in BAD_INPUTS), None, [], 3, "merge", recipe(command=1),
    recipe(version=None), recipe(version="0\n1"), recipe(command="m" * 41),
    recipe(deep=json.loads("[" * 101 + "]" * 101)),
])  # fmt: skip
def test_what_is_no_recipe_is_refused_in_a_line_and_brought_along_by_nobody(said: Any) -> None:
    with pytest.raises(FormatError) as e:
        read_recipe(json.dumps(said), "file")
    assert str(e.value).startswith("file: its recipe ")
    assert len(str(e.value).splitlines()) == 1
    assert len(str(e.value)) < 300
    assert recipe_of(told(said)) is None
    assert entries([("m", HASH, told(said))]) == [{"name": "m", "hash": HASH}]


@pytest.mark.parametrize("text", [
    "", "{", "[" * 100_000, '{"a": 1e999}', '{"a": NaN}', '{"a": "\\ud800"}', '{"\\udfff": 1}', "x" * (1 << 21),
    '{"a": ' + "9" * 5000 + "}", json.dumps(recipe())[:-1] + ', "a": Infinity}',
])  # fmt: skip
def test_what_is_no_plain_json_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(FormatError, match=r"^file: its recipe (is|takes) [^\n]{1,120}$"):
        read_recipe(text, "file")
    assert recipe_of({KEY: text}) is None


def test_a_file_without_a_recipe_has_none() -> None:
    assert recipe_of({"format": "pt"}) is None
