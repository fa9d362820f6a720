"""Packed adapters taken apart and put together: which columns are whose, which alpha is exact, what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from weightops.errors import MismatchError
from weightops.files.tensor import TensorInfo, TensorSpec
from weightops.lora.adapters import Adapter, group
from weightops.lora.joining import join
from weightops.lora.pieces import Piece, Source, cut_rows, scaled, take_apart
from weightops.lora.targets import Target
from weightops.naming.keymap import pack, swap

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightops.naming.keymap import Rule

QKV = pack("qkv", "q", "k", "v")
LABEL = "a.safetensors"


def adapter(rule: Rule, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Adapter, dict[str, TensorSpec]]:
    """The adapter of a module that is resolved to `rule`."""
    specs = {f"m{ending}": TensorSpec("F32", shape) for ending, shape in shapes.items()}
    (found,) = group(LABEL, {k: TensorInfo(s, 0, 0, s.nbytes) for k, s in specs.items()}).adapters
    target = Target(rule.names, rule, "unet", "original")
    return Adapter("m", found.beginning, "m", found.family, found.keys, found.shapes, target, "unet"), specs


def apart(up: Any, alpha: float | None = None, rule: Rule = QKV, **more: tuple[int, ...]) -> list[Piece]:
    """The pieces of a LoRA with this `up`, 6 inputs wide."""
    shapes = {".lora_up.weight": up.shape, ".lora_down.weight": (up.shape[1], 6)}
    found, specs = adapter(rule, shapes | {f".{k}": v for k, v in more.items()})
    return take_apart(found, alpha, specs, lambda key, rows: up[:rows], LABEL)


def blocks(*heights_and_columns: tuple[int, int]) -> Any:
    """A block-diagonal matrix of ones."""
    rows, columns = (sum(n) for n in zip(*heights_and_columns, strict=True))
    found = np.zeros((rows, columns), dtype=np.uint8)
    row = column = 0
    for height, width in heights_and_columns:
        found[row : row + height, column : column + width] = 1
        row, column = row + height, column + width
    return found


def test_parts_that_share_a_down_keep_it_whole() -> None:
    pieces = apart(np.ones((12, 4), dtype=np.uint8), 2.0)
    assert [(p.name, p.alpha, p.rank) for p in pieces] == [("q", 2.0, 4), ("k", 2.0, 4), ("v", 2.0, 4)]
    assert [p.parts["up"].bands for p in pieces] == [((0, 4),), ((4, 8),), ((8, 12),)]
    assert {p.parts["down"].bands for p in pieces} == {None}


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 2, 3), (4, 1, 1)])
def test_blocks_are_each_parts_own_and_alpha_shrinks_with_the_rank(ranks: tuple[int, int, int]) -> None:
    total = sum(ranks)
    pieces = apart(blocks(*((4, rank) for rank in ranks)), float(total))
    assert [(p.rank, p.alpha) for p in pieces] == [(rank, float(rank)) for rank in ranks]
    start = 0
    for piece, rank in zip(pieces, ranks, strict=True):
        assert piece.parts["up"].columns == (start, start + rank)
        assert piece.parts["down"].bands == ((start, start + rank),)
        start += rank


def test_an_equal_share_that_a_part_leaves_empty_stays_its_own() -> None:
    """Untrained, its `up` is zero, and its `down` is not."""
    up = blocks((4, 2), (4, 2), (4, 2))
    up[4:8] = 0
    assert [(p.name, p.rank, p.parts["down"].bands) for p in apart(up)] == [
        ("q", 2, ((0, 2),)), ("k", 2, ((2, 4),)), ("v", 2, ((4, 6),))
    ]  # fmt: skip


def test_rows_of_zeros_beside_blocks_of_other_sizes_are_no_adapter() -> None:
    up = np.concatenate([blocks((4, 3), (4, 2)), np.zeros((4, 5), dtype=np.uint8)])
    assert [(p.name, p.rank) for p in apart(up)] == [("q", 3), ("k", 2)]


def test_but_with_a_bias_or_a_magnitude_they_are_one() -> None:
    up = np.concatenate([blocks((4, 3), (4, 2)), np.zeros((4, 5), dtype=np.uint8)])
    for more in ({"lora_up.bias": (12,)}, {"dora_scale": (12, 1)}):
        assert [(p.name, p.rank) for p in apart(up, **more)] == [("q", 5), ("k", 5), ("v", 5)]


@pytest.mark.parametrize(
    "up",
    [
        np.flipud(blocks((4, 1), (4, 2), (4, 3))),  # blocks in another order
        np.concatenate([blocks((4, 2), (4, 2)), np.ones((4, 4), dtype=np.uint8)]),  # the last part meets every column
        np.zeros((12, 5), dtype=np.uint8),
        np.ones((12, 1), dtype=np.uint8),
    ],
)
def test_what_is_not_block_diagonal_in_order_stays_shared(up: Any) -> None:
    assert [p.rank for p in apart(up, 1.0)] == [up.shape[1]] * 3


def test_an_alpha_that_no_float_holds_leaves_the_parts_shared() -> None:
    """1.0 · 2 / 6 is no float32: it would be another strength."""
    assert [(p.rank, p.alpha) for p in apart(blocks((4, 2), (4, 2), (4, 2)), 1.0)] == [(6, 1.0)] * 3
    assert [(p.rank, p.alpha) for p in apart(blocks((4, 2), (4, 2), (4, 2)), 1.5)] == [(2, 0.5)] * 3


@pytest.mark.parametrize(
    ("alpha", "rank", "of", "expected"),
    [(1.0, 2, 4, 0.5), (1.0, 1, 3, None), (3.0, 1, 3, 1.0), (1e300, 2, 4, None), (-6.0, 2, 3, -4.0), (0.0, 2, 3, 0.0),
     (0.1, 3, 3, None)],
)  # fmt: skip
def test_a_scaled_alpha_is_exact_or_none(alpha: float, rank: int, of: int, expected: float | None) -> None:
    assert scaled(alpha, rank, of) == expected


def test_bands_of_a_piece_count_from_its_own_beginning() -> None:
    """Rows of rows: halves that trade places, of a module that is itself a band."""
    (q, _, _) = apart(np.ones((24, 4), dtype=np.uint8))
    found = cut_rows(q.parts, q.family, "m", ((4, 8), (0, 4)), 8, LABEL)
    assert found["up"].bands == ((4, 8), (0, 4))
    (_, k, _) = apart(np.ones((24, 4), dtype=np.uint8))
    found = cut_rows(k.parts, k.family, "m", ((4, 8), (0, 4)), 8, LABEL)
    assert found["up"].bands == ((12, 16), (8, 12))


def test_rows_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(MismatchError) as caught:
        apart(np.ones((13, 4), dtype=np.uint8))
    assert str(caught.value) == "a.safetensors: 'm' changes 13 rows, which cannot be shared out to q, k, v"


def test_halves_that_are_none_are_refused() -> None:
    with pytest.raises(MismatchError) as caught:
        apart(np.ones((13, 4), dtype=np.uint8), rule=swap("mod", "norm_out"))
    assert str(caught.value) == ("a.safetensors: 'm': its halves may have to trade places, and its shapes do not tell")


def piece(name: str, rank: int, alpha: float | None, key: str = "") -> Piece:
    """A LoRA of 4 outputs and 6 inputs."""
    found = group(LABEL, {f"m{e}": TensorInfo(TensorSpec("F32", s), 0, 0, 0)
                          for e, s in ((".lora_up.weight", (4, rank)), (".lora_down.weight", (rank, 6)))})  # fmt: skip
    up = Source(f"{name}.up", TensorSpec("F32", (4, rank)))
    down = Source(key or f"{name}.down", TensorSpec("F32", (rank, 6)))
    return Piece("unet", name, found.adapters[0].family, {"up": up, "down": down}, alpha, name)


def never(a: Source, b: Source) -> bool:
    return a == b


def test_parts_of_one_down_are_stacked() -> None:
    found = join([piece(n, 2, 1.0, "d") for n in "qkv"], [None] * 3, never, LABEL, "m")
    assert (found.alpha, found.folded) == (1.0, 0)
    assert found.parts["up"][0].shape == (12, 2)
    assert [(f.row, f.columns) for f in found.parts["up"][1]] == [(0, None), (4, None), (8, None)]
    assert found.parts["down"][0].shape == (2, 6)


def test_a_missing_alpha_is_the_rank() -> None:
    """So that equal strengths are not folded for being said in two ways."""
    found = join([piece("q", 2, None), piece("k", 3, 3.0), piece("v", 1, None)], [None] * 3, never, LABEL, "m")
    assert (found.alpha, found.folded) == (6.0, 0)
    found = join([piece(n, 2, None) for n in "qkv"], [None] * 3, never, LABEL, "m")
    assert found.alpha is None


def test_only_what_has_another_strength_than_one_is_folded() -> None:
    found = join([piece("q", 2, None), piece("k", 2, 1.0), piece("v", 2, 2.0)], [None] * 3, never, LABEL, "m")
    assert (found.alpha, found.folded) == (None, 1)
    assert [f.strength for f in found.parts["up"][1]] == [None, 0.5, None]


def test_a_part_that_is_not_there_leaves_its_rows_empty() -> None:
    found = join([piece("q", 2, None), None, piece("v", 3, None)], [None, 7, None], never, LABEL, "m")
    assert found.parts["up"][0].shape == (15, 5)
    assert [(f.row, f.columns) for f in found.parts["up"][1]] == [(0, (0, 2)), (11, (2, 5))]


def test_widths_that_differ_are_not_joined() -> None:
    wide = piece("k", 2, None)
    other = Piece(
        "unet", "k", wide.family, {**wide.parts, "down": Source("k.down", TensorSpec("F32", (2, 9)))}, None, "k"
    )
    with pytest.raises(MismatchError) as caught:
        join([piece("q", 2, None), other, piece("v", 2, None)], [None] * 3, never, LABEL, "m")
    assert str(caught.value) == "a.safetensors: 'm' would join tensors (down) whose dtypes or widths differ"
