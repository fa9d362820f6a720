"""What a file says of how it was made: the recipe in its metadata, and within it those of its inputs. Opens no file.

A recipe is JSON: command, version, what was asked for, and inputs, each with its name, its hash, and, where it had a
recipe of its own, that one as `made`, so that the whole ancestry stands in a file. Of it the nearest generations are
kept, as many as there is room for; where one had to go, its file is marked `cut`.

Recipes come from files of strangers: what is read here has bounds, and every name in it is a name and no path.
"""

from __future__ import annotations

import functools
import json
import math
import re
from typing import TYPE_CHECKING, Any

from weightops.errors import FormatError, quote

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

KEY = "weightops"  # of the metadata
GENERATIONS = 8  # of recipes within a recipe
EMBEDDED = 128 << 10  # characters that recipes within a recipe take together, at most
MAX_INPUTS = 1_000

_MAX_CHARACTERS = 1 << 20
_MAX_DEPTH = 100
_HASH = re.compile(r"xxh3_128:[0-9a-f]{32}")


def read_recipe(text: str, label: str) -> dict[str, Any]:
    """The recipe that a file says it was made by. label: what begins a message. Raises FormatError."""
    if len(text) > _MAX_CHARACTERS:
        raise FormatError(label, f"its recipe takes {len(text):,} characters, expected at most {_MAX_CHARACTERS:,}")
    try:
        found = json.loads(text)
        _check_values(found, 1)
    except RecursionError:
        raise FormatError(label, f"its recipe is nested more than {_MAX_DEPTH} deep") from None
    except ValueError as e:  # of which a lone surrogate is one, too
        reason = str(e).split(":")[0] if isinstance(e, json.JSONDecodeError) else _reason(e)
        raise FormatError(label, f"its recipe is no JSON that weightops writes: {reason}") from None
    _check_recipe(found, label)
    made: dict[str, Any] = found
    return made


def recipe_of(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The recipe among a file's metadata; None where there is none, or none that can be believed."""
    text = metadata.get(KEY)
    return None if text is None else _believed(text)


def as_recorded(name: str) -> str:
    """A file's name as a recipe has it: a name may be any bytes, but a header is Unicode."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def entries(sources: Iterable[tuple[str, str, Mapping[str, str]]]) -> list[dict[str, Any]]:
    """What a recipe says of its inputs, given of each its name, hash and metadata."""
    listed = list(sources)
    made = _embedded(tuple(metadata.get(KEY) for _, _, metadata in listed))
    return [
        {"name": as_recorded(name), "hash": hashed, **more}
        for (name, hashed, _), more in zip(listed, made, strict=True)
    ]


# ------------------------------------------------------------------------------------------------ reading


@functools.lru_cache(maxsize=64)
def _believed(text: str) -> dict[str, Any] | None:
    try:
        return read_recipe(text, "")
    except FormatError:
        return None


def _reason(error: ValueError) -> str:
    return "a text of half a character" if isinstance(error, UnicodeError) else str(error)[:60]


def _check_values(value: Any, depth: int) -> None:
    """Raise ValueError for what JSON does not have, or a header cannot, and RecursionError for what is too deep."""
    if depth > _MAX_DEPTH:
        raise RecursionError
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number that is not finite")
    elif isinstance(value, dict):
        for key, entry in value.items():
            key.encode()
            _check_values(entry, depth + 1)
    elif isinstance(value, list):
        for entry in value:
            _check_values(entry, depth + 1)


def _check_recipe(recipe: Any, label: str) -> None:
    """Refuse what is no recipe: command, version, and inputs with bare names and hashes; and theirs, alike."""
    if not isinstance(recipe, dict):
        raise FormatError(label, f"its recipe is a JSON {type(recipe).__name__}, expected an object")
    for field in ("command", "version"):
        found = recipe.get(field)
        if not isinstance(found, str) or not 0 < len(found) <= 40 or not found.isprintable():
            raise FormatError(label, f"its recipe has the {field} {quote(found, 60)}, expected a word")
    inputs = recipe.get("inputs")
    if not isinstance(inputs, list) or not 0 < len(inputs) <= MAX_INPUTS:
        count = f"{len(inputs):,} inputs" if isinstance(inputs, list) else "no list of inputs"
        raise FormatError(label, f"its recipe has {count}, expected 1 to {MAX_INPUTS:,}")
    for entry in inputs:
        name, hashed = (entry.get("name"), entry.get("hash")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0") or len(name) > 255:
            raise FormatError(label, f"its recipe has an input {quote(name)}, expected the bare name of a file")
        if not isinstance(hashed, str) or not _HASH.fullmatch(hashed):
            raise FormatError(label, f"its recipe has the hash {quote(hashed, 60)} of {quote(name)}, expected xxh3_128")
        if "made" in entry:
            _check_recipe(entry["made"], label)


# ------------------------------------------------------------------------------------------------ embedding


@functools.lru_cache(maxsize=16)
def _embedded(texts: tuple[str | None, ...]) -> Sequence[Mapping[str, Any]]:
    """What is said of each input beside name and hash. Of files of many ranks this is asked again and again."""
    found = [None if text is None else _believed(text) for text in texts]
    for generations in range(GENERATIONS, 0, -1):
        made = [{} if recipe is None else {"made": _pruned(recipe, generations)} for recipe in found]
        if len(json.dumps(made, ensure_ascii=False)) <= EMBEDDED:
            return made
    return [{} if recipe is None else {"cut": True} for recipe in found]


def _pruned(recipe: Mapping[str, Any], generations: int) -> dict[str, Any]:
    """The recipe with so many generations, its own among them."""
    return {**recipe, "inputs": list(_pruned_inputs(recipe["inputs"], generations - 1))}


def _pruned_inputs(inputs: Sequence[Mapping[str, Any]], generations: int) -> Iterator[dict[str, Any]]:
    for entry in inputs:
        own = {key: value for key, value in entry.items() if key not in ("made", "cut")}
        if "made" in entry and generations:
            yield own | {"made": _pruned(entry["made"], generations)}
        else:
            yield own | ({"cut": True} if "made" in entry or entry.get("cut") is True else {})
