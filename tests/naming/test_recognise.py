"""Which network has tensors of these names and shapes: made-up networks, and the sizes of the real ones."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from tagged import needs_lists, shapes_of
from test_lists import LISTS

from weightops.files.tensor import TensorInfo, TensorSpec
from weightops.naming import keymap
from weightops.naming.identify import identify
from weightops.naming.keymap import (
    NETWORKS,
    Network,
    Rule,
    Spelling,
    Table,
    Variant,
    move,
    pack,
    same,
    swap,
    tensor,
    under,
)
from weightops.naming.recognise import (
    Match,
    Unsure,
    agrees,
    canonical_shapes,
    fits,
    recognise,
    row_of,
    variant_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

Shape = tuple[int, ...]

# ------------------------------------------------------------------------------------------------ made-up networks

BLOCK = (
    pack("attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    move("attn.proj", "attn.to_out.0"),
    tensor("attn.norm.scale", "attn.norm.weight"),
)
RULES = (move("img_in", "x_embedder"), *under("blocks.{}", "layers.{}", BLOCK), swap("final.mod", "norm_out.linear"))


def network(name: str, width: int, *more: Rule, **rest: object) -> Network:
    shapes = {"x_embedder.weight": (width, 16), "layers.{}.attn.to_q.weight": (width, width)}
    variants = (Variant(f"{name}_big", shapes, {"layers.{}": 30}), Variant(f"{name}_small", shapes, {"layers.{}": 3}))
    return Network(name, "transformer", (Spelling("original", (*RULES, *more)),), **{"variants": variants, **rest})  # type: ignore[arg-type]


def tensors(width: int, blocks: int = 2, **more: Shape) -> dict[str, Shape]:
    """The file of such a model."""
    found: dict[str, Shape] = {"img_in.weight": (width, 16), "final.mod.weight": (2 * width, width)}
    for i in range(blocks):
        found[f"blocks.{i}.attn.qkv.weight"] = (3 * width, width)
        found[f"blocks.{i}.attn.proj.weight"] = (width, width)
        found[f"blocks.{i}.attn.norm.scale"] = (width,)
    return found | more


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes these the only networks there are."""

    def register(*members: Network) -> None:
        NETWORKS.load()
        monkeypatch.setattr(NETWORKS, "_members", {n.name: n for n in members})

    yield register
    # What was compiled for a made-up network must not be found by the next test under its name.
    keymap._tables.cache_clear()


def found(shapes: Mapping[str, Shape | None]) -> tuple[str, str | None] | tuple[str, ...]:
    """Network and variant; or, in the order of their names, those that it may be."""
    answer = recognise(shapes, ("transformer",))
    return (answer.network.name, answer.variant) if isinstance(answer, Match) else answer.possible


def test_names_alone_tell_a_network_whose_names_nobody_else_has(registered: Callable[..., None]) -> None:
    registered(network("a", 64))
    assert found(tensors(64)) == ("a", None)  # of two sizes, which differ in the number of blocks
    assert found(tensors(64, blocks=4)) == ("a", "a_big")
    assert found(tensors(48)) == ("a", None)
    assert found(tensors(64, blocks=31)) == ("a", None)
    assert found(dict.fromkeys(tensors(64))) == ("a", None)


def test_shapes_tell_where_two_networks_have_the_names(registered: Callable[..., None]) -> None:
    registered(network("a", 64), network("b", 96))
    assert found(tensors(64, blocks=9)) == ("a", "a_big")
    assert found(tensors(96, blocks=9)) == ("b", "b_big")
    assert found(tensors(48)) == ("a", "b")
    assert found(dict.fromkeys(tensors(64))) == ("a", "b")
    # The modulation and the norms are of no size that either speaks of.
    assert found({"final.mod.weight": (8, 4), "blocks.0.attn.norm.scale": (4,)}) == ("a", "b")


def test_what_a_network_needs_at_any_size_tells_it_from_others(registered: Callable[..., None]) -> None:
    four = (None, None, 1, 1)
    registered(network("a", 64, needs={"layers.{}.attn.to_out.0.weight": four}),
               network("b", 64, needs={"layers.{}.attn.to_out.0.weight": (None, None)}))  # fmt: skip
    assert found({"blocks.0.attn.proj.weight": (48, 48, 1, 1)}) == ("a", None)
    assert found({"blocks.0.attn.proj.weight": (48, 48)}) == ("b", None)
    assert found({"blocks.0.attn.proj.weight": (48,)}) == ()
    assert found({"blocks.0.attn.proj.weight": None}) == ("a", "b")


def test_a_mark_tells_a_network_from_one_that_has_all_its_other_names(registered: Callable[..., None]) -> None:
    registered(network("a", 64), network("b", 64, *same("extra"), has=("extra.weight",)))
    assert found(tensors(64, blocks=9)) == ("a", "a_big")
    assert found(tensors(64, blocks=9, **{"extra.weight": (1,)})) == ("b", "b_big")


def test_the_network_with_fewer_strangers_wins(registered: Callable[..., None]) -> None:
    registered(network("a", 64), network("b", 64, *same("one", "two")))
    model = tensors(64, blocks=9)
    assert found({**model, "one.weight": (1,), "two.weight": (1,)}) == ("b", "b_big")
    assert found(model) == ("a", "b")


def test_two_strangers_are_allowed_in_a_whole_model_and_none_in_a_few_tensors(registered: Callable[..., None]) -> None:
    registered(network("a", 64))
    two: dict[str, Shape] = {"x": (1,), "img_in.strange": (1,)}
    answer = recognise({**tensors(64, blocks=9), **two}, ("transformer",))
    assert isinstance(answer, Match)
    assert sorted(answer.strangers) == sorted(two)
    assert found({**tensors(64, blocks=9), **two, "third": (1,)}) == ()
    assert found({**tensors(64), "x": (1,)}) == ()


def test_blocks_alone_of_no_known_size_may_be_anybodys(registered: Callable[..., None]) -> None:
    registered(network("a", 64))
    blocks = {name: shape for name, shape in tensors(48).items() if name.startswith("blocks")}
    assert found(blocks) == ("a",)
    assert found({name: shape for name, shape in tensors(64).items() if name in blocks}) == ("a", None)
    assert found({**blocks, "final.mod.weight": (96, 48)}) == ("a", None)


def test_no_names_are_nobodys(registered: Callable[..., None]) -> None:
    registered(network("a", 64))
    assert recognise({}, ("transformer",)) == Unsure()
    assert recognise(tensors(64), ("vae",)) == Unsure()
    assert recognise(tensors(64), ()) == Unsure()


def test_a_network_of_no_released_size_is_known_by_its_names(registered: Callable[..., None]) -> None:
    registered(network("a", 64, variants=()))
    assert found(tensors(64)) == ("a", None)


# ------------------------------------------------------------------------------------------------ shapes


def test_packed_tensors_have_the_shapes_of_their_bands_and_rearranged_ones_none() -> None:
    rules = (
        pack("qkv", "q", "k", "v"),
        pack("l", "q2", "mlp", heights=("in", "=")),
        Rule("turned", ("t",), transposed=True),
        Rule("square", ("s",), squared=True),
        move("plain", "p"),
    )
    table = Table("made up", "original", rules)
    shapes: dict[str, Shape | None] = {
        "qkv.weight": (9, 4), "l.weight": (20, 4), "turned.weight": (2, 3), "square.weight": (2, 2, 1, 1),
        "plain.weight": (5, 6), "qkv.bias": (10,), "l.bias": (20,), "qkv.scale_weight": (), "plain.bias": None,
    }  # fmt: skip
    claims = {key: claim for key in shapes if (claim := table.claim(key)) is not None}
    assert claims.keys() == shapes.keys()
    assert dict(canonical_shapes(claims, shapes)) == {
        "q.weight": (3, 4), "k.weight": (3, 4), "v.weight": (3, 4), "q2.weight": (4, 4), "mlp.weight": (16, 4),
        "t.weight": None, "s.weight": None, "p.weight": (5, 6), "p.bias": None,
        "q.bias": None, "k.bias": None, "v.bias": None, "q2.bias": None, "mlp.bias": None,
        "q.scale_weight": None, "k.scale_weight": None, "v.scale_weight": None,
    }  # fmt: skip


ROWS = {
    "a.{}.weight": (None, 4),
    "a.0.weight": (8, 4),
    "a.{}.b.{}.weight": (1,),
    "a.{}.b.3.weight": (3,),
    "c.weight": (2, None, 1),
    "d": (),
}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("a.0.weight", (8, 4)), ("a.1.weight", (None, 4)), ("a.10.weight", (None, 4)), ("a.5.b.6.weight", (1,)),
        ("a.5.b.3.weight", (3,)), ("c.weight", (2, None, 1)), ("d", ()), ("a.x.weight", None), ("a.01.weight", None),
        ("a.1.bias", None), ("a.1.weight.x", None), ("b.a.1.weight", None), ("a.{}.weight", None), ("", None),
    ],
)  # fmt: skip
def test_a_row_of_shapes_is_found_by_the_most_particular_template(
    name: str, row: tuple[int | None, ...] | None
) -> None:
    assert row_of(name, ROWS) == row
    assert row_of(name, Variant("v", ROWS).shapes) == row
    assert row_of(name, {}) is None


@pytest.mark.parametrize(
    ("name", "shape", "agreed"),
    [
        ("a.1.weight", (7, 4), True), ("a.1.weight", (7, 5), False), ("a.0.weight", (7, 4), False),
        ("a.1.weight", (7, 4, 1), False), ("a.1.weight", (7,), False), ("a.1.weight", (), False),
        ("a.1.weight", None, True), ("a.1.weight", (7, -1), True), ("a.0.weight", (-1, -1), True),
        ("d", (), True), ("d", (1,), False), ("unknown", (1, 2, 3), True),
    ],
)  # fmt: skip
def test_a_shape_agrees_or_contradicts(name: str, shape: Shape | None, agreed: bool) -> None:
    assert agrees(name, shape, ROWS) is agreed


# ------------------------------------------------------------------------------------------------ variants

SIZE = Variant("v", {"w.weight": (8, 4), "blocks.{}.w.weight": (4, 4)}, {"blocks.{}": 3, "deep.{}.tail": 2})


@pytest.mark.parametrize(
    ("tensors", "fitting"),
    [
        ({"w.weight": (8, 4)}, True),
        ({"w.weight": (8, 5)}, False),
        ({"w.weight": (8, 4), "blocks.2.w.weight": (4, 4)}, True),
        ({"w.weight": (8, 4), "blocks.3.other": (1,)}, False),
        ({"w.weight": (8, 4), "blocks.3x.other": (1,)}, True),
        ({"w.weight": (8, 4), "blocks.x.other": (1,)}, True),
        ({"w.weight": (8, 4), "deep.1.tail.x": (1,)}, True),
        ({"w.weight": (8, 4), "deep.2.tail.x": (1,)}, False),
        ({"w.weight": (8, 4), "deep.2.head.x": (1,)}, True),
        ({"w.weight": (8, 4), "unknown": (1,)}, True),
        # Nothing that it speaks of, or nothing whose shape is known, is no proof.
        ({"unknown": (1,)}, False),
        ({"w.weight": None}, False),
        ({}, False),
    ],
)
def test_a_variant_fits_what_it_speaks_of_and_only_that(tensors: dict[str, Shape | None], fitting: bool) -> None:
    assert fits(SIZE, tensors.items()) is fitting


def variant(tensors: dict[str, Shape], *, whole: bool = True, **variants: Variant) -> str | None:
    return variant_of(Network("v", "unet", (), tuple(variants.values())), tensors.items(), whole=whole)


def test_of_two_sizes_alike_the_one_that_says_more_of_the_file_counts() -> None:
    one, two = Variant("one", {"w": (8,)}), Variant("two", {"w": (8,), "x": (2,)})
    assert variant({"w": (8,), "x": (2,)}, one=one, two=two) == "two"
    assert variant({"w": (8,), "x": (3,)}, one=one, two=two) == "one"
    assert variant({"w": (8,)}, one=one, two=two) is None
    assert variant({"x": (9,)}, one=one, two=two) is None
    assert variant({}, one=one, two=two) is None


def test_what_a_whole_checkpoint_lacks_tells_its_variant_but_not_what_a_piece_or_an_adapter_lacks() -> None:
    shapes = {"w": (8,), "end": (2,)}
    plain, guided = Variant("plain", shapes, lacks=("guidance",)), Variant("guided", shapes, has=("guidance",))
    words = {"plain": plain, "guided": guided}
    assert variant({"w": (8,), "end": (2,)}, **words) == "plain"
    assert variant({"w": (8,), "end": (2,), "guidance": (1,)}, **words) == "guided"
    assert variant({"w": (8,)}, **words) is None
    assert variant({"w": (8,), "guidance": (1,)}, **words) == "guided"
    assert variant({"w": (8,), "end": (2,)}, whole=False, **words) is None


# ------------------------------------------------------------------------------------------------ the real sizes


@needs_lists
@pytest.mark.parametrize("name", [name for name, row in LISTS.items() if row.variant and row.spelling != "ema"])
def test_a_variant_says_of_a_list_only_what_is_so(name: str) -> None:
    """Every shape that it speaks of is there, every block that it counts, and no other."""
    header = {key: TensorInfo(TensorSpec("F16", shape), 0, 0, 0) for key, shape in shapes_of(name).items()}
    for part in identify(header).parts.values():
        match = part.match
        if (
            match is None
            or match.variant is None
            or match.table.spelling == "ema"
            or "." not in next(iter(part.bodies.values()))
        ):
            continue
        sizes = next(v for v in match.network.variants if v.name == match.variant)
        bodies = {body: header[key].spec.shape for key, body in part.bodies.items()}
        claims = {body: claim for body in bodies if (claim := match.table.claim(body)) is not None}
        canonical = canonical_shapes(claims, bodies)
        assert fits(sizes, canonical)
        names = {n for n, _ in canonical}
        for template in sizes.shapes:
            pattern = re.compile(re.escape(template).replace(r"\{\}", "[0-9]+"))
            there = any(pattern.fullmatch(n) for n in names)
            # T5's table of tokens has two names, and a file may have either.
            assert there or template in ("shared.weight", "encoder.embed_tokens.weight"), template
        for template, count in sizes.counts.items():
            pattern = re.compile(re.escape(template).replace(r"\{\}", r"([0-9]+)") + r"\.")
            numbers = {int(m.group(1)) for n in names if (m := pattern.match(n))}
            # SD2 has no use for the last layer of CLIP-H, and some files leave it out.
            assert len(numbers) in ((count, count - 1) if match.variant == "clip_h" else (count,)), template
            assert numbers == set(range(len(numbers))), template
