"""Errors: drawn as they are, and harmless whatever a file put into them."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightops import errors
from weightops.errors import FormatError, TruncatedError, UsageError, WeightopsError, listing, printable, quote

KINDS = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, WeightopsError)
}


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    drawn: dict[str, str] = {}
    parents: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"([│├└─ ]*)([A-Z]\w+)  ", line)
        if match:
            depth = len(match.group(1)) // 4
            parents[depth:] = [match.group(2)]
            drawn[match.group(2)] = parents[depth - 1] if depth else "Exception"
    assert drawn.pop("Interrupted") == "Exception", "drawn beside the tree"
    assert not issubclass(errors.Interrupted, Exception)
    bases = {
        name: [b.__name__ for b in kind.__mro__[1:] if b in (*KINDS.values(), Exception)]
        for name, kind in KINDS.items()
    }
    assert drawn == {name: found[0] for name, found in bases.items()}


def test_wrong_use_exits_with_two_and_refused_data_with_one() -> None:
    assert {name for name, kind in KINDS.items() if kind.exit_code == 2} == {"UsageError", "MemoryRefused"}
    assert {kind.exit_code for kind in KINDS.values()} == {1, 2}


def test_an_error_begins_with_where() -> None:
    found = FormatError("a.safetensors", "is damaged", "fetch it again")
    assert (str(found), found.where, found.what, found.hint) == (
        "a.safetensors: is damaged", "a.safetensors", "is damaged", "fetch it again",
    )  # fmt: skip
    assert str(UsageError("", "no place")) == "no place"
    assert issubclass(TruncatedError, FormatError)


def test_a_file_name_is_harmless_in_a_message() -> None:
    assert str(FormatError("a\x1b[2J\n\u202e.pt", "is damaged")) == "a\\x1b[2J\\n\\u202e.pt: is damaged"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("Grüße, 世界 🙂", "Grüße, 世界 🙂"),
        ("\x00\x07\x1b[31m\x7f\x9b", "\\x00\\x07\\x1b[31m\\x7f\\x9b"),
        ("a\r\nb\tc", "a\\r\\nb\\tc"),
        ("\u202egpj.exe\u2066\u200f", "\\u202egpj.exe\\u2066\\u200f"),
        ("\u2028\u2029\x85", "\\u2028\\u2029\\x85"),
        ("\udc80", "\\udc80"),
        ("\U000e0041", "\\U000e0041"),
        ("back\\slash", "back\\slash"),
    ],
)
def test_what_a_terminal_could_act_on_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters(exclude_categories=()), max_size=300))
def test_no_text_leaves_with_a_control_character(text: str) -> None:
    for shown in (printable(text), quote(text), listing([text] * 7)):
        shown.encode()
        assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert len(quote(text)) <= 100


def test_a_quote_keeps_both_ends_of_a_long_name() -> None:
    shown = quote("a" * 500 + "b" * 500)
    assert len(shown) <= 100
    assert shown.startswith("'aaa")
    assert shown.endswith("bbb'")
    assert " ... " in shown
    assert quote("x" * 98) == repr("x" * 98)


def test_a_listing_names_five_and_counts_the_rest() -> None:
    assert listing([]) == ""
    assert listing("abcde") == "'a', 'b', 'c', 'd', 'e'"
    assert listing(range(1234)) == "0, 1, 2, 3, 4 (and 1,229 more)"
