"""What the shapes of each family's parts say, before any value is read. (What they do: test_arithmetic.)"""

from __future__ import annotations

import pytest

from weightops.lora.family import FAMILIES, Shape, changed_shape

# Family, form -> shapes of its parts, rank, shape of the weight that they change.
EXAMPLES: list[tuple[str, dict[str, Shape], int | None, Shape | None]] = [
    ("lora", {"up": (6, 2), "down": (2, 5)}, 2, (6, 5)),
    ("lora", {"up": (6, 2, 1, 1), "down": (2, 5, 3, 3)}, 2, (6, 5, 3, 3)),
    ("lora", {"up": (6, 2, 1, 1), "mid": (2, 2, 3, 3), "down": (2, 5, 1, 1)}, 2, (6, 5, 3, 3)),
    ("loha", {"hada_w1_a": (6, 2), "hada_w1_b": (2, 5), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)}, 2, (6, 5)),
    (
        "loha",
        {
            "hada_t1": (2, 2, 3, 3), "hada_w1_a": (2, 6), "hada_w1_b": (2, 5),
            "hada_t2": (2, 2, 3, 3), "hada_w2_a": (2, 6), "hada_w2_b": (2, 5),
        },
        2, (6, 5, 3, 3),
    ),
    ("lokr", {"lokr_w1": (2, 3), "lokr_w2": (4, 5)}, None, (8, 15)),
    ("lokr", {"lokr_w1": (2, 3), "lokr_w2": (4, 5, 3, 3)}, None, (8, 15, 3, 3)),
    ("lokr", {"lokr_w1": (2, 3), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 5)}, 1, (8, 15)),
    ("lokr", {"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 3), "lokr_w2": (4, 5)}, 2, (8, 15)),
    ("lokr", {"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5)}, 2, (8, 15)),
    (
        "lokr", {"lokr_w1": (2, 3), "lokr_w2_a": (1, 4), "lokr_w2_b": (1, 5), "lokr_t2": (1, 1, 3, 3)}, 1,
        (8, 15, 3, 3),
    ),
    (
        "lokr",
        {"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 3), "lokr_w2_a": (1, 4), "lokr_w2_b": (1, 5), "lokr_t2": (1, 1, 3, 3)},
        1, (8, 15, 3, 3),
    ),
    ("glora", {"a1": (5, 2), "a2": (2, 5), "b1": (6, 2), "b2": (2, 5)}, 2, (6, 5)),
    ("full", {"diff": (6, 5)}, None, (6, 5)),
    ("full", {"diff_b": (6,)}, None, None),
    ("full", {"diff": (6, 5), "diff_b": (6,)}, None, (6, 5)),
    ("norm", {"w_norm": (6,)}, None, (6,)),
    ("norm", {"b_norm": (6,)}, None, None),
    ("norm", {"w_norm": (6,), "b_norm": (6,)}, None, (6,)),
    ("set", {"set_weight": (6,)}, None, (6,)),
    ("set", {"set_bias": (6,)}, None, None),
    ("set", {"set_weight": (6, 5), "set_bias": (6,)}, None, (6, 5)),
    ("ia3", {"ia3": (6, 1), "on_input": ()}, None, None),
    ("oft", {"oft_blocks": (3, 2, 2)}, None, None),
    ("oft", {"oft_blocks": (3, 2, 2), "rescale": (6, 1)}, None, None),
    ("oft_bands", {"oft_blocks.0": (3, 2, 2)}, None, None),
    ("oft_bands", {f"oft_blocks.{n}": (3, 2, 2) for n in range(3)}, None, None),
    ("oft_bands", {f"oft_blocks.{n}": (3, 2 * n + 2, 2 * n + 2) for n in range(4)}, None, None),
    ("oftv2", {"oft_R": (3, 1)}, None, None),
]  # fmt: skip


def test_every_form_of_every_family_has_an_example() -> None:
    shown = {(name, frozenset(shapes)) for name, shapes, *_ in EXAMPLES}
    assert {(family.name, frozenset(form)) for _, family in FAMILIES for form in family.forms} == shown


@pytest.mark.parametrize(("name", "shapes", "rank", "shape"), EXAMPLES)
def test_rank_and_shape_follow_from_shapes(
    name: str, shapes: dict[str, Shape], rank: int | None, shape: Shape | None
) -> None:
    family = FAMILIES.get(name)
    assert set(family.form(shapes) or ()) == set(shapes)
    assert family.rank(shapes) == rank
    assert family.shape(shapes) == shape


@pytest.mark.parametrize(("name", "shapes", "rank", "shape"), EXAMPLES)
def test_the_parts_of_an_example_meet_and_change_a_weight_of_their_shape(
    name: str, shapes: dict[str, Shape], rank: int | None, shape: Shape | None
) -> None:
    family = FAMILIES.get(name)
    assert family.meet(shapes)
    assert shape is None or changed_shape(family, shapes, shape) == shape


# Shapes that a damaged file may have: of the examples above, these parts are others.
APART: list[tuple[int, dict[str, Shape]]] = [
    (0, {"up": (6, 3)}), (0, {"up": (6,)}), (0, {"up": (6, 2, 2)}), (0, {"down": ()}),
    (2, {"mid": (3, 2, 3, 3)}), (2, {"mid": (2, 3, 3, 3)}), (2, {"mid": (2,)}), (2, {"down": (2, 5, 3, 3)}),
    (3, {"hada_w2_a": (6, 3)}), (3, {"hada_w2_a": (5, 2)}), (3, {"hada_w2_b": (2, 6)}), (3, {"hada_w1_b": (2,)}),
    (4, {"hada_t2": (2, 2, 3, 1)}), (4, {"hada_t1": (3, 2, 3, 3)}), (4, {"hada_t1": (2, 2)}),
    (4, {"hada_w2_a": (2, 5)}), (4, {"hada_w2_b": (2, 6)}),
    (5, {"lokr_w1": (2,)}), (5, {"lokr_w2": (4,)}), (6, {"lokr_w1": (2, 3, 1)}),
    (7, {"lokr_w2_a": (4, 2)}), (7, {"lokr_w2_b": (1,)}), (8, {"lokr_w1_b": (3, 3)}), (8, {"lokr_w1_a": (2,)}),
    (10, {"lokr_t2": (2, 1, 3, 3)}), (10, {"lokr_t2": (1, 2, 3, 3)}), (10, {"lokr_t2": (1, 1)}),
    (10, {"lokr_w2_b": (1, 5, 1)}),
    (12, {"a1": (5, 2, 2)}), (12, {"a2": (2, 4)}), (12, {"b1": (6, 3)}), (12, {"b2": (3, 5)}), (12, {"b2": (2,)}),
]  # fmt: skip


@pytest.mark.parametrize(("example", "other"), APART, ids=str)
def test_parts_that_cannot_be_multiplied_do_not_meet(example: int, other: dict[str, Shape]) -> None:
    name, shapes, *_ = EXAMPLES[example]
    assert not FAMILIES.get(name).meet(shapes | other)


@pytest.mark.parametrize(
    ("name", "shapes", "shape"),
    [
        ("oft", {"oft_blocks": (3, 2, 3)}, (6, 5)),
        ("oft", {"oft_blocks": (3, 2, 2)}, (8, 5)),
        ("oft", {"oft_blocks": (3, 2, 2), "rescale": (5, 1)}, (6, 5)),
        ("oft", {"oft_blocks": (2, 2, 3, 3)}, (6, 5)),  # butterflies halve their blocks
        ("oft", {"oft_blocks": (3, 2, 2, 2)}, (4, 5)),  # and have no more stages than halves
        ("oft_bands", {"oft_blocks.0": (3, 2, 2)}, (8, 5)),
        ("oftv2", {"oft_R": (3, 2)}, (6, 6)),
        ("oftv2", {"oft_R": (2, 1)}, (6, 6)),
        ("ia3", {"ia3": (7,), "on_input": ()}, (6, 5)),
        ("ia3", {"ia3": (6,), "on_input": (2,)}, (6, 5)),
        ("lora", {"up": (6, 2), "down": (2, 3, 3, 5)}, (6, 5, 3, 3)),  # the axes of the kernel in another order
        ("set", {"set_weight": (6, 4)}, (6, 5)),
        ("set", {"set_weight": (5,)}, (6,)),
    ],
    ids=str,
)
def test_what_does_not_fit_a_weight_is_known_from_its_shape(name: str, shapes: dict[str, Shape], shape: Shape) -> None:
    assert changed_shape(FAMILIES.get(name), shapes, shape) is None


def test_no_two_families_need_a_part_in_common() -> None:
    """So that a key's ending tells the family."""
    parts = [part for _, family in FAMILIES for part in {part for form in family.forms for part in form}]
    assert len(parts) == len(set(parts))


def test_row_parts_are_parts() -> None:
    for _, family in FAMILIES:
        assert set(family.rows) <= family.parts
        assert set(family.of_bias) <= family.parts
