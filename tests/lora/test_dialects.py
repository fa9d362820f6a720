"""The tables of beginnings and endings: each is reachable, what is written is read back, identify() knows all."""

from __future__ import annotations

import pytest

from weightops.files.tensor import TensorInfo, TensorSpec
from weightops.lora.dialects import BEGINNINGS, DIALECTS, ENDINGS, Dialect, Ending, beginning_of, ending_of
from weightops.lora.family import FAMILIES, MODIFIERS
from weightops.naming.identify import identify

MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
PARTS = {part for _, family in FAMILIES for part in family.parts} | set(MODIFIERS)

# Beside other parts only, so they need not tell an adapter from other files.
NEVER_ALONE = {".alpha", ".rescale", ".magnitude"}


def test_each_ending_stands_once() -> None:
    texts = [ending.text for ending in ENDINGS]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.text)
def test_each_ending_is_found_and_the_longest_counts(ending: Ending) -> None:
    found = ending_of(MODULE + ending.text)
    assert found is ending
    assert ending.part in PARTS


@pytest.mark.parametrize("ending", [e for e in ENDINGS if e.text not in NEVER_ALONE], ids=lambda ending: ending.text)
def test_identify_knows_an_adapter_by_each_ending(ending: Ending) -> None:
    info = TensorInfo(TensorSpec("F32", (4, 4)), 0, 0, 64)
    assert identify({MODULE + ending.text: info}).kind == "lora"


@pytest.mark.parametrize("beginning", BEGINNINGS, ids=lambda beginning: beginning.text or "none")
def test_no_beginning_hides_behind_a_shorter_one(beginning: object) -> None:
    assert beginning_of(f"{beginning.text}xyz") is beginning  # type: ignore[attr-defined]


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_what_a_dialect_writes_is_read_as_the_same_part(dialect: Dialect) -> None:
    # Whole tensors stand under their own names, and IA3's factor is a weight beside its switch.
    plain = {part: text for part, text in dialect.endings.items() if text not in (".weight", ".bias")}
    for part, text in plain.items():
        found = ending_of(f"{MODULE}{text}")
        assert found is not None, text
        assert (found.part, found.body) == (part, ""), text
    assert set(dialect.endings) - set(plain) <= {"ia3", "set_weight", "set_bias"}


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_every_dialect_has_an_ending_for_every_part_of_every_family(dialect: Dialect) -> None:
    assert set(dialect.endings) == PARTS
    assert len(set(dialect.endings.values())) >= len(PARTS) - 1  # IA3's is a weight, and so is one that is set


def test_keys_without_a_name_are_no_parts() -> None:
    for key in ("", "alpha", "lora_A", ".", "lora_up.weight", "x"):
        found = ending_of(key)
        assert found is None or key.startswith(".")
