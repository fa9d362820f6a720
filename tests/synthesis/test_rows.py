"""Rows and factors are the same numbers, bit for bit, and each feature says which of them it is."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightops.errors import FormatError
from weightops.synthesis.layout import Feature, Layout, Module

modules = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=4
).map(
    lambda found: tuple(
        Module("unet", f"m{n}", (out, features, kernel, kernel) if kernel > 1 else (out, features), rank)
        for n, (out, features, kernel, rank) in enumerate(found)
    )
)


def some(layout: Layout, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of any bits that the dtype has, but NaN."""
    return torch.randn(count, layout.width, generator=torch.Generator().manual_seed(1)).to(dtype)


@given(modules, st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_rows_and_factors_are_the_same_bits(found: tuple[Module, ...], dtype: torch.dtype) -> None:
    layout = Layout("sd15", found)
    rows = some(layout, 3, dtype)
    factors = layout.unflatten(rows)
    assert [(tuple(u.shape), tuple(d.shape)) for u, d in factors] == [
        ((3, m.out, m.rank), (3, m.rank, m.n)) for m in found
    ]
    again = layout.flatten([(u.clone(), d.clone()) for u, d in factors])
    assert again.dtype == dtype
    assert torch.equal(again, rows)
    assert torch.equal(layout.flatten(layout.unflatten(rows[1])), rows[1])


@given(modules)
@settings(max_examples=40, deadline=None)
def test_each_feature_names_its_number(found: tuple[Module, ...]) -> None:
    layout = Layout("sd15", found)
    row = torch.arange(layout.width, dtype=torch.float64)
    by_key = dict(zip((m.key for m in found), layout.unflatten(row), strict=True))
    for index in range(layout.width):
        feature = layout.feature(index)
        up, down = by_key[feature.module]
        assert float((up if feature.factor == "up" else down)[feature.row, feature.column]) == index


def test_features_outside_are_none() -> None:
    layout = Layout("sd15", (Module("unet", "m", (2, 3), 1),))
    assert layout.feature(0) == Feature("unet.m", "up", 0, 0)
    assert layout.feature(4) == Feature("unet.m", "down", 0, 2)
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"feature {index} of 5"):
            layout.feature(index)


@given(modules)
@settings(max_examples=20, deadline=None)
def test_a_layout_is_read_back_from_json(found: tuple[Module, ...]) -> None:
    layout = Layout("sdxl", found)
    assert Layout.of_json(json.loads(json.dumps(layout.to_json())), "space") == layout


@pytest.mark.parametrize(
    "said",
    [
        None,
        {"architecture": "sd15"},
        {"architecture": "sd15", "modules": []},
        {"architecture": "sd15", "modules": [{"component": "unet", "name": "m", "shape": [2], "rank": 1}]},
        {"architecture": "sd15", "modules": [{"component": "unet", "name": "m", "shape": [2, 3], "rank": 0}]},
        {"architecture": "sd15", "modules": [{"component": "unet", "name": "m", "shape": "no", "rank": 1}]},
    ],
)
def test_a_list_of_modules_that_is_none_is_refused(said: object) -> None:
    with pytest.raises(FormatError, match="space: its list of modules"):
        Layout.of_json(said, "space")


def test_factors_of_other_sizes_are_refused() -> None:
    layout = Layout("sd15", (Module("unet", "m", (2, 3), 1),))
    with pytest.raises(ValueError, match=r"unet\.m of rank 1: found \[2, 2\], \[2, 3\]"):
        layout.flatten([(torch.zeros(2, 2), torch.zeros(2, 3))])
    with pytest.raises(ValueError, match="rows of 4 features, expected 5"):
        layout.unflatten(torch.zeros(4))
