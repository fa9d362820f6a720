"""Tables of names: what holds for every spelling of every network, and for rules made up here."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightops.naming.keymap import (
    ARCHITECTURES,
    EQUAL,
    IN,
    LEAVES,
    NETWORKS,
    Network,
    Rule,
    Spelling,
    Table,
    heights,
    move,
    pack,
    same,
    swap,
    swaps,
    tensor,
    under,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

TABLES = {
    f"{network.name}, {table.spelling}": table for _, network in NETWORKS for table in network.adapter_tables().values()
}
every_table = pytest.mark.parametrize("table", TABLES.values(), ids=list(TABLES))
DIFFUSION = [NETWORKS.get(architecture.components[0].network) for _, architecture in ARCHITECTURES]


def filled(*templates: str) -> Iterator[tuple[str, ...]]:
    """The templates with the numbers 0 to 2 in their places, the same in each."""
    for numbers in itertools.product("012", repeat=templates[0].count("{}")):
        yield tuple(template.format(*numbers) for template in templates)


def keys_of(table: Table) -> Iterator[tuple[str, tuple[str, ...], Rule]]:
    """Every key of a table, with some numbers, the tensors that it holds, and the rule that says so."""
    for rule in table.rules:
        for key, *names in filled(rule.key, *rule.names):
            if rule.exact:
                yield key, tuple(names), rule
            else:
                yield from ((f"{key}.{leaf}", tuple(f"{n}.{leaf}" for n in names), rule) for leaf in LEAVES)


# ------------------------------------------------------------------------------------------------ every table


@every_table
def test_what_a_table_writes_it_reads_as_the_same(table: Table) -> None:
    for _, names, _ in keys_of(table):
        for name in names:
            spelled = table.spelled(name)
            assert spelled is not None, name
            rule, key, packed = spelled
            assert name in packed
            claim = table.claim(key)
            assert claim is not None, key
            assert (claim.names, claim.rule, claim.suffix) == (packed, rule, "")


@every_table
def test_every_key_of_a_table_is_claimed(table: Table) -> None:
    for key, names, rule in keys_of(table):
        claim = table.claim(key)
        assert claim is not None, key
        # A template with more of its numbers fixed is the more particular one.
        if claim.rule == rule:
            assert claim.names == names
        else:
            assert claim.rule.key.count("{}") < rule.key.count("{}") or (claim.rule.exact and not rule.exact), key


@every_table
def test_canonical_names_are_known_to_the_canonical_table(table: Table) -> None:
    network = NETWORKS.get(table.network)
    canonical = network.tables()[network.canonical]
    for _, names, _ in keys_of(table):
        for name in names:
            claim = canonical.claim(name)
            assert claim is not None, name
            if canonical.spelling not in [s.name for s in network.spellings]:
                assert claim.names == (name,)


@every_table
def test_kohyas_flattened_names_are_looked_up_as_dotted_ones(table: Table) -> None:
    for rule in table.rules:
        if rule.exact and not rule.key.endswith(".weight"):
            continue
        for (key,) in filled(rule.key.removesuffix(".weight") if rule.exact else rule.key):
            assert table.flattened(key.replace(".", "_")) == table.module(key), key


@every_table
def test_a_module_is_written_and_read_as_the_same(table: Table) -> None:
    for rule in table.rules:
        if rule.exact:
            continue
        for names in filled(*rule.names):
            for name in names:
                spelled = table.spelled_module(name)
                assert spelled is not None, name
                _, key, packed = spelled
                assert name in packed
                claim = table.module(key)
                assert claim is not None, key
                assert claim.names == packed


@every_table
def test_what_is_left_of_a_key_is_no_key(table: Table) -> None:
    for key, _, _ in itertools.islice(keys_of(table), 200):
        for other in (f"{key}.x", f"x.{key}", f"{key}x", key.upper() if key != key.upper() else f"{key}."):
            assert table.claim(other) is None, other
    assert table.claim("") is None


@every_table
def test_packed_tensors_are_of_several_names_each_with_a_height(table: Table) -> None:
    for rule in table.rules:
        assert rule.names
        assert len(set(rule.names)) == len(rule.names)
        assert len(rule.heights) == (len(rule.names) if len(rule.names) > 1 else 0)
        assert set(rule.heights) <= {EQUAL, IN}
        # A tensor whose halves trade places, or that is turned, stands alone: bands of those nobody has.
        assert len(rule.names) == 1 or not (rule.swapped or rule.swapped_when or rule.transposed or rule.squared)
        assert {name.count("{}") for name in rule.names} == {rule.key.count("{}")}


@pytest.mark.parametrize("network", [n for n in DIFFUSION if n.role == "unet"], ids=lambda n: n.name)
def test_the_names_of_an_average_are_the_keys_without_their_dots(network: Network) -> None:
    table = network.tables()["original"]
    for key, _, _ in keys_of(table):
        assert table.squashed(key.replace(".", "")) == table.claim(key), key
    assert table.squashed("decay") is None
    assert table.squashed("conv_in.weight") is None


# ------------------------------------------------------------------------------------------------ every network


def blocks_of(network: Network, name: str) -> list[str]:
    """The blocks that a canonical tensor is in."""
    found = []
    for block, prefixes in network.blocks:
        for prefix in prefixes:
            pattern = re.escape(prefix).replace(r"\{\}", "([0-9]+)")
            match = re.match(f"{pattern}(?![^.])", name)
            if match:
                found.append(block.format(*match.groups()))
    return found


@pytest.mark.parametrize("network", DIFFUSION, ids=lambda n: n.name)
def test_every_tensor_of_a_diffusion_model_is_in_one_block(network: Network) -> None:
    assert network.blocks
    for table in network.tables().values():
        for _, names, _ in keys_of(table):
            for name in names:
                assert len(blocks_of(network, name)) == 1, name


@pytest.mark.parametrize("network", DIFFUSION, ids=lambda n: n.name)
def test_blocks_have_names_of_their_own(network: Network) -> None:
    names = [name for name, _ in network.blocks]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("network", [n for _, n in NETWORKS], ids=lambda n: n.name)
def test_variants_speak_of_tensors_that_there_are(network: Network) -> None:
    table = network.tables()[network.canonical]
    names = [n for v in network.variants for n in (*v.shapes, *v.has, *v.lacks)]
    for name in (*names, *network.needs, *network.has):
        assert any(table.claim(one) for (one,) in filled(name)), name
    for variant in network.variants:
        for template in variant.counts:
            assert template.count("{}") == 1
    assert len({v.name for v in network.variants}) == len(network.variants)


@pytest.mark.parametrize("architecture", [a for _, a in ARCHITECTURES], ids=lambda a: a.name)
def test_an_architecture_is_made_of_networks_and_spellings_that_there_are(architecture: object) -> None:
    for component in architecture.components:  # type: ignore[attr-defined]
        network = NETWORKS.get(component.network)
        spellings = {component.spelling, component.comfy_spelling, component.kohya_spelling} - {""}
        assert spellings - {"original"} <= network.tables().keys()
        assert component.variant in (None, *(v.name for v in network.variants))


# ------------------------------------------------------------------------------------------------ rules made up here


def table(*rules: Rule, extras: tuple[str, ...] = ()) -> Table:
    return Table("made up", "original", rules, extras)


@pytest.mark.parametrize(
    ("rules", "where"),
    [
        ((move("a.{}", "b.{}"), move("a.{}", "c.{}")), "made up, original: 'a.{}' stands for two rules"),
        ((tensor("a.weight", "b"), tensor("a.weight", "c")), "made up, original: 'a.weight' stands for two rules"),
        ((move("a.b_c", "x"), move("a_b.c", "y")), "made up, original, flattened: 'a_b_c' stands for two rules"),
        (
            (tensor("a.b_c.weight", "x.weight"), tensor("a_b.c.weight", "y.weight")),
            "made up, original, flattened: 'a_b_c' stands for two rules",
        ),
    ],
)
def test_two_rules_for_one_name_are_refused_when_the_table_is_made(rules: tuple[Rule, ...], where: str) -> None:
    with pytest.raises(ValueError, match=re.escape(where)):
        table(*rules)


def test_of_several_keys_for_one_name_the_first_is_written_and_all_are_read() -> None:
    found = table(move("new", "x"), move("old", "x"))
    assert found.spelled("x.weight") == (found.rules[0], "new.weight", ("x.weight",))
    assert [claim and claim.names for claim in map(found.claim, ("new.bias", "old.bias"))] == [("x.bias",)] * 2


def test_a_fixed_number_is_more_particular_than_any_number() -> None:
    found = table(move("blocks.{}.{}.a", "any.{}.{}"), move("blocks.0.{}.a", "first.{}"), move("blocks.0.1.a", "one"))
    keys = {
        "blocks.2.1.a.weight": "any.2.1.weight",
        "blocks.0.2.a.weight": "first.2.weight",
        "blocks.0.1.a.bias": "one.bias",
    }
    assert {key: claim and claim.names[0] for key in keys for claim in [found.claim(key)]} == keys
    flat = {key.rpartition(".")[0].replace(".", "_"): name.rpartition(".")[0] for key, name in keys.items()}
    assert {key: claim and claim.names[0] for key in flat for claim in [found.flattened(key)]} == flat


@pytest.mark.parametrize(
    "word", ["007", "00", "²", "+1", "-1", "1e3", " 1", "1 ", "٣", "Ⅳ", "1_0", "#", "{}", "{0}", "", "x"]
)
def test_only_numbers_as_files_write_them_are_numbers(word: str) -> None:
    found = table(move("blocks.{}.a", "b.{}"), tensor("scales.{}", "s.{}"), move("blocks.{}.{}.a", "c.{}.{}"))
    for key in (f"blocks.{word}.a.weight", f"scales.{word}", f"blocks.0.{word}.a.bias", f"blocks.{word}.0.a.bias"):
        assert found.claim(key) is None, key
    assert found.spelled(f"b.{word}.weight") is None
    assert found.squashed(f"blocks{word}aweight") is None or word in ("007", "00")
    if word != "1_0":
        assert found.flattened(f"blocks_{word}_a") is None
        assert found.flattened(f"blocks_{word}_0_a") is None


@given(st.integers(0, 10**30))
def test_a_number_of_any_size_is_a_number(number: int) -> None:
    claim = table(move("blocks.{}.a", "b.{}")).claim(f"blocks.{number}.a.weight")
    assert claim is not None
    assert claim.names == (f"b.{number}.weight",)


@pytest.mark.parametrize(
    "suffix",
    [
        ".scale_weight", ".scale_input", ".weight_scale", ".weight_scale_2", ".input_scale", ".comfy_quant", ".SCB",
        ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map",
        ".weight.quant_state.bitsandbytes__nf4",
    ],
)  # fmt: skip
def test_what_a_quantiser_hangs_on_a_module_goes_with_it(suffix: str) -> None:
    found = table(move("blocks.{}.a", "b.{}"), pack("blocks.{}.qkv", "q.{}", "k.{}", "v.{}"), tensor("one", "two"))
    claim = found.claim(f"blocks.3.a{suffix}")
    assert claim is not None
    assert (claim.names, claim.leaf, claim.suffix) == ((f"b.3{suffix}",), "", suffix)
    packed = found.claim(f"blocks.3.qkv{suffix}")
    assert packed is not None
    assert packed.names == (f"q.3{suffix}", f"k.3{suffix}", f"v.3{suffix}")
    assert found.spelled(f"b.3{suffix}") == (found.rules[0], f"blocks.3.a{suffix}", (f"b.3{suffix}",))
    for unknown in (f"blocks.3.x{suffix}", f"one{suffix}", f"blocks.3.a.{suffix}", suffix):
        assert found.claim(unknown) is None


def test_a_norm_known_by_its_tensor_alone_is_a_module_too() -> None:
    found = table(tensor("norm.{}.weight", "n.{}.weight"), tensor("scale.{}", "s.{}.weight"), tensor("x.weight", "y"))
    for claim in (found.module("norm.2"), found.flattened("norm_2")):
        assert claim is not None
        assert claim.names == ("n.2",)
    assert found.spelled_module("n.2") == (found.rules[0], "norm.2", ("n.2",))
    # A name without ".weight", here or there, is no module's.
    assert found.module("scale.2") is found.module("x") is found.flattened("x") is None
    assert found.spelled_module("s.2") is None


def test_extras_are_known_and_stand_for_nothing() -> None:
    found = table(move("a", "b"), extras=("mark", "last.weight"))
    assert found.is_extra("mark")
    assert found.is_extra("last.weight")
    assert not found.is_extra("a.weight")
    assert found.claim("last.weight") is None
    assert found.heads == {"a", "mark", "last"}


def test_a_block_is_its_rules_below_two_prefixes() -> None:
    rules = (
        move("q", "to_q"),
        pack("kv", "to_k", "to_v"),
        swap("mod", "norm", when=2),
        tensor("s", "scale"),
        *same("o"),
    )
    assert under("blocks.{}", "layers.{}", rules) == (
        Rule("blocks.{}.q", ("layers.{}.to_q",)),
        Rule("blocks.{}.kv", ("layers.{}.to_k", "layers.{}.to_v"), (EQUAL, EQUAL)),
        Rule("blocks.{}.mod", ("layers.{}.norm",), swapped_when=2),
        Rule("blocks.{}.s", ("layers.{}.scale",), exact=True),
        Rule("blocks.{}.o", ("layers.{}.o",)),
    )


def test_a_network_whose_files_all_rename_its_tensors_has_a_canonical_table_of_its_own() -> None:
    network = Network("made_up", "vae", (Spelling("a", (move("x.{}", "z.{}"),)), Spelling("b", (tensor("y", "s"),))))
    NETWORKS.register("made_up", network)
    try:
        tables = network.tables()
    finally:
        NETWORKS._members.pop("made_up")
    assert list(tables) == ["a", "b", "diffusers"]
    assert tables["diffusers"].rules == (Rule("z.{}", ("z.{}",)), Rule("s", ("s",), exact=True))


# ------------------------------------------------------------------------------------------------ bands


@pytest.mark.parametrize(
    ("rule", "total", "features", "expected"),
    [
        (pack("qkv", "q", "k", "v"), 9, None, (3, 3, 3)),
        (pack("qkv", "q", "k", "v"), 9, 5, (3, 3, 3)),
        (pack("qkv", "q", "k", "v"), 10, None, None),
        (pack("qkv", "q", "k", "v"), 0, None, (0, 0, 0)),
        (pack("l", "q", "k", "v", "mlp", heights=(IN, IN, IN, EQUAL)), 21, 3, (3, 3, 3, 12)),
        (pack("l", "q", "k", "v", "mlp", heights=(IN, IN, IN, EQUAL)), 9, 3, (3, 3, 3, 0)),
        (pack("l", "q", "k", "v", "mlp", heights=(IN, IN, IN, EQUAL)), 8, 3, None),
        (pack("l", "q", "k", "v", "mlp", heights=(IN, IN, IN, EQUAL)), 21, None, None),
        (pack("qkv", "q", "k", "v", heights=(IN, EQUAL, EQUAL)), 12, 6, (6, 3, 3)),
        (pack("qkv", "q", "k", "v", heights=(IN, EQUAL, EQUAL)), 13, 6, None),
        (pack("a", "b", "c", heights=(IN, IN)), 8, 4, (4, 4)),
        (pack("a", "b", "c", heights=(IN, IN)), 9, 4, None),
        (move("a", "b"), 4, None, None),
    ],
)  # fmt: skip
def test_a_packed_tensor_is_cut_into_bands_or_not_at_all(
    rule: Rule, total: int, features: int | None, expected: tuple[int, ...] | None
) -> None:
    assert heights(rule, total, features) == expected


@given(
    st.lists(st.sampled_from([EQUAL, IN]), min_size=2, max_size=5), st.integers(0, 60), st.none() | st.integers(0, 20)
)
def test_bands_fill_the_tensor_and_equal_ones_are_equal(wanted: list[str], total: int, features: int | None) -> None:
    rule = pack("a", *(f"b.{i}" for i in range(len(wanted))), heights=tuple(wanted))
    found = heights(rule, total, features)
    if found is None:
        return
    assert sum(found) == total
    assert min(found) >= 0
    assert len({h for h, w in zip(found, wanted, strict=True) if w == EQUAL}) <= 1
    assert all(h == features for h, w in zip(found, wanted, strict=True) if w == IN)


def test_halves_trade_places_always_never_or_by_their_height() -> None:
    assert swaps(move("a", "b"), 8, 4) is False
    assert swaps(swap("a", "b"), 8, None) is True
    by_height = swap("a", "b", when=2)
    assert swaps(by_height, 8, 4) is True
    assert swaps(by_height, 24, 4) is False
    assert swaps(by_height, 8, None) is None
    assert swaps(by_height, 0, 0) is True
