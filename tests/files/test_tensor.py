"""Shapes, sizes, and where a slot's rows lie."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightops.files.dtypes import ARITHMETIC, DTYPE_WORDS, DTYPES, ORDER
from weightops.files.tensor import Piece, Slot, TensorInfo, TensorSpec


@pytest.mark.parametrize(
    ("spec", "values", "nbytes", "rows", "row_nbytes"),
    [
        (TensorSpec("F32", (320, 4, 3, 3)), 11520, 46080, 320, 144),
        (TensorSpec("BF16", (3, 5)), 15, 30, 3, 10),
        (TensorSpec("F32", (7,)), 7, 28, 7, 4),
        (TensorSpec("F64", ()), 1, 8, 1, 8),
        (TensorSpec("F16", (0,)), 0, 0, 0, 0),
        (TensorSpec("F16", (0, 5)), 0, 0, 0, 0),
        (TensorSpec("F16", (5, 0)), 0, 0, 5, 0),
        (TensorSpec("F4", (3, 4)), 12, 6, 3, 2),
        (TensorSpec("F6_E2M3", (2, 4)), 8, 6, 2, 3),
        (TensorSpec("F6_E3M2", (4,)), 4, 3, 4, 0),  # a row of six bits fills no byte
        (TensorSpec("BOOL", (2, 3)), 6, 6, 2, 3),
        (TensorSpec("C64", (2, 2)), 4, 32, 2, 16),
        (TensorSpec("U64", (2**40, 2**20)), 2**60, 2**63, 2**40, 2**23),
    ],
)
def test_sizes_follow_from_dtype_and_shape(
    spec: TensorSpec, values: int, nbytes: int, rows: int, row_nbytes: int
) -> None:
    assert (spec.values, spec.nbytes, spec.rows, spec.row_nbytes) == (values, nbytes, rows, row_nbytes)


def test_a_spec_is_cut_and_flattened() -> None:
    spec = TensorSpec("BF16", (6, 2, 3))
    assert spec.flat() == TensorSpec("BF16", (36,))
    assert spec.as_bytes() == TensorSpec("U8", (72,))
    assert spec.with_rows(2) == TensorSpec("BF16", (2, 2, 3))
    assert str(spec) == "BF16 [6, 2, 3]"
    assert TensorSpec("F4", (3, 2)).as_bytes() == TensorSpec("U8", (3,))
    assert TensorSpec("F32", ()).flat() == TensorSpec("F32", (1,))


def test_values_are_equal_by_their_parts() -> None:
    assert len({TensorSpec("F32", (2,)), TensorSpec("F32", (2,)), TensorSpec("F16", (2,))}) == 2
    assert len({Slot("a", TensorSpec("F32", (2,))), Slot("a", TensorSpec("F32", (2,)))}) == 1
    assert TensorInfo(TensorSpec("F32", (2,)), 0, 8, 16).strides is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_has_its_code_its_place_and_a_size(dtype: str) -> None:
    assert DTYPES[dtype].code == dtype
    assert list(DTYPES)[ORDER[dtype]] == dtype
    digits = int("".join(c for c in dtype.split("_")[0] if c.isdigit()) or 8)
    assert DTYPES[dtype].bits == digits


def test_the_words_for_dtypes_name_dtypes_of_arithmetic() -> None:
    assert set(DTYPE_WORDS.values()) <= ARITHMETIC <= DTYPES.keys()


# ------------------------------------------------------------------------------------------------ slots


def test_a_whole_tensor_is_one_piece() -> None:
    slot = Slot("a", TensorSpec("F16", (10, 3)))
    assert slot.pieces(0, 60) == [Piece(0, 60)]
    assert slot.pieces(7, 11) == [Piece(7, 4)]


def test_bands_are_read_in_their_own_order() -> None:
    slot = Slot("qkv", TensorSpec("F32", (5, 2)), bands=((8, 10), (0, 3)))
    assert slot.pieces(0, 40) == [Piece(64, 16), Piece(0, 24)]
    assert slot.pieces(8, 24) == [Piece(72, 8), Piece(0, 8)]
    assert slot.pieces(16, 40) == [Piece(0, 24)]
    assert slot.pieces(15, 18) == [Piece(79, 1), Piece(0, 2)]
    assert slot.pieces(24, 24) == []


@st.composite
def slots(draw: st.DrawFn) -> tuple[np.ndarray, Slot]:
    """A stored tensor of values that all differ, and a slot of any bands of it, overlapping and empty ones too."""
    height, width = draw(st.integers(1, 12)), draw(st.lists(st.integers(0, 3), max_size=2))
    stored = np.arange(height * int(np.prod(width)), dtype=np.int32).reshape(height, *width)
    edge = st.integers(0, height)
    bands = draw(st.lists(st.tuples(edge, edge).map(lambda pair: (min(pair), max(pair))), max_size=4))
    rows = sum(last - first for first, last in bands)
    return stored, Slot("a", TensorSpec("I32", (rows, *width)), tuple(bands))


@settings(deadline=None, max_examples=150)
@given(stored_and_slot=slots(), data=st.data())
def test_pieces_are_the_bytes_that_numpy_takes(stored_and_slot: tuple[np.ndarray, Slot], data: st.DataObject) -> None:
    stored, slot = stored_and_slot
    assert slot.bands is not None
    raw = stored.tobytes()
    whole = np.concatenate([stored[:0], *(stored[first:last] for first, last in slot.bands)]).tobytes()
    assert len(whole) == slot.spec.nbytes == slot.spec.rows * slot.spec.row_nbytes

    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    pieces = slot.pieces(start, stop)
    assert b"".join(raw[offset : offset + nbytes] for offset, nbytes in pieces) == whole[start:stop]
    assert all(nbytes > 0 and 0 <= offset <= len(raw) - nbytes for offset, nbytes in pieces)
