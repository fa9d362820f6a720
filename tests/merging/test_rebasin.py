"""Weight matching: products of channels, the best orders, and no move without a gain."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from weightops.errors import UsageError
from weightops.merging import rebasin
from weightops.merging.rebasin import Products, alike, check_scipy, expanded, match

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("scipy")
torch.set_num_threads(1)


def products(a: torch.Tensor, b: torch.Tensor, axis: int = 0, copies: int = 1) -> Products:
    found = Products.zeros(a.shape[axis] // copies, "cpu")
    found.add(a, b, axis, copies, None)
    return found


# ------------------------------------------------------------------------------------------------ products

SHAPES = [((6,), 0, 1), ((6, 5), 0, 1), ((6, 5), 0, 2), ((5, 6), 1, 1), ((5, 6), 1, 3), ((4, 6, 3, 3), 1, 1),
          ((6, 4, 3, 3), 0, 1)]  # fmt: skip


@pytest.mark.parametrize("strip", [1, 7, 1 << 20])
@pytest.mark.parametrize(("shape", "axis", "copies"), SHAPES)
def test_products_are_those_of_all_pairs_of_channels(
    shape: tuple[int, ...], axis: int, copies: int, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebasin, "STRIP", strip)
    torch.manual_seed(0)
    a, b = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    size = shape[axis] // copies
    other = None if len(shape) == 1 else np.random.default_rng(1).permutation(shape[1 - axis])
    found = Products.zeros(size, "cpu")
    found.add(a, b, axis, copies, other)
    if other is not None:
        b = b.index_select(1 - axis, torch.from_numpy(other))
    x, y = (t.movedim(axis, 0).reshape(copies, size, -1) for t in (a, b))
    torch.testing.assert_close(found.inner, torch.einsum("cik,cjk->ij", x, y))
    torch.testing.assert_close(found.first, x.square().sum((0, 2)))
    torch.testing.assert_close(found.second, y.square().sum((0, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_products_of_any_dtype_are_those_of_its_values(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(600, 8).to(dtype) for _ in range(2))
    other = np.arange(8)[::-1].copy()
    found = Products.zeros(600, "cpu")
    found.add(a, b, 0, 1, other)
    assert found.inner.dtype == torch.float32
    expected = a.double() @ b.double().flip(1).T
    torch.testing.assert_close(found.inner.double(), expected, rtol=1e-5, atol=1e-5)


def test_sums_of_parts_are_the_sum() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 9, dtype=torch.float64), torch.randn(2, 6, 9, dtype=torch.float64)
    together = products(a[0], b[0]).plus(products(a[1], b[1]))
    whole = products(torch.cat(list(a), 1), torch.cat(list(b), 1))
    for found, expected in ((together.inner, whole.inner), (together.first, whole.first)):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(together.second, whole.second)


@pytest.mark.parametrize("strip", [1, 1 << 20])
@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 4, 3, 3)])
def test_likeness_is_the_inner_product_before_and_after(
    shape: tuple[int, ...], strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebasin, "STRIP", strip)
    torch.manual_seed(0)
    a, b = torch.randn(shape).half(), torch.randn(shape).half()
    chance = np.random.default_rng(0)
    for axes in itertools.product((False, True), repeat=min(len(shape), 2)):
        orders = [chance.permutation(n) if moved else None for n, moved in zip(shape, axes, strict=False)]
        first, second = (*orders, None)[:2]
        other = b.double()
        for axis, order in enumerate(orders):
            other = other if order is None else other.index_select(axis, torch.from_numpy(order))
        x = a.double()
        expected = ((x * b.double()).sum(), (x * other).sum(), x.square().sum(), b.double().square().sum())
        assert alike(a, b, (first, second)) == pytest.approx([float(e) for e in expected], rel=1e-12, abs=1e-12)


# ------------------------------------------------------------------------------------------------ the best order


def members(blocks: int, widths: list[int]) -> Iterator[list[np.ndarray]]:
    """Every member of a group: the orders of its lanes."""
    for places in itertools.permutations(range(blocks)):
        within = [list(itertools.permutations(range(w))) for w in widths]
        choices = itertools.product(*[itertools.product(lane, repeat=blocks) for lane in within])
        for lanes in choices:
            yield [
                np.array([b * w + c for b, inside in zip(places, lane, strict=True) for c in inside])
                for lane, w in zip(lanes, widths, strict=True)
            ]


def worth(lanes: list[Products], orders: list[np.ndarray]) -> float:
    return sum(
        float(lane.inner[torch.arange(len(o)), torch.from_numpy(o)].sum())
        for lane, o in zip(lanes, orders, strict=True)
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("blocks", "widths"), [(1, [5]), (3, [2]), (3, [3]), (3, [2, 2]), (2, [3, 2]), (4, [1])])
def test_an_order_is_the_best_of_all_that_are_allowed(blocks: int, widths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    lanes = [
        products(torch.randn(blocks * w, 2, dtype=torch.float64), torch.randn(blocks * w, 2, dtype=torch.float64))
        for w in widths
    ]
    best = max(members(blocks, widths), key=lambda orders: worth(lanes, orders))
    for start in itertools.islice(members(blocks, widths), 0, None, 97):
        found = match(lanes, start, blocks)
        assert worth(lanes, list(found)) == pytest.approx(worth(lanes, best), rel=1e-9, abs=1e-9)
        assert all(o.dtype == np.int64 for o in found)
        blocked = [o.reshape(blocks, -1) // w for o, w in zip(found, widths, strict=True)]
        assert all((b == blocked[0][:, :1]).all() for b in blocked)


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("size", [64, 640])
def test_channels_in_another_order_are_brought_back_in_spite_of_noise(blocks: int, size: int) -> None:
    """In float32, too, which is what many channels are compared in."""
    torch.manual_seed(0)
    chance = np.random.default_rng(0)
    a = torch.randn(2, size, 40)
    width = size // blocks
    places = chance.permutation(blocks)
    orders = [np.concatenate([b * width + chance.permutation(width) for b in places]) for _ in range(2)]
    b = torch.stack([x[torch.from_numpy(o)] for x, o in zip(a, orders, strict=True)])
    b = b + 0.3 * torch.randn(b.shape)
    found = match([products(x, y) for x, y in zip(a, b, strict=True)], [np.arange(size)] * 2, blocks)
    for back, order in zip(found, orders, strict=True):
        assert (order[back] == np.arange(size)).all()


@pytest.mark.parametrize("blocks", [1, 3])
def test_where_both_are_equal_nothing_moves_though_channels_are_alike_or_dead(blocks: int) -> None:
    torch.manual_seed(0)
    a = torch.randn(12, 30)
    a[3], a[5], a[9] = a[0], a[1], a[8]
    a[6] = a[7] = a[11] = 0
    a[4:8] = a[4:8] if blocks == 1 else a[:4]  # whole blocks that are alike
    now = [np.arange(12)]
    assert (match([products(a, a)], now, blocks)[0] == np.arange(12)).all()


def test_only_the_cycles_that_gain_are_moved() -> None:
    """Twins that would trade places for nothing stay, beside channels that move."""
    torch.manual_seed(0)
    a = torch.randn(8, 30)
    a[1] = a[0]
    b = a.clone()
    b[[2, 3, 4]] = a[[3, 4, 2]]
    b[[0, 1]] += 1e-4 * torch.randn(2, 30)
    assert match([products(a, b)], [np.arange(8)], 1)[0].tolist() == [0, 1, 4, 2, 3, 5, 6, 7]


def test_what_was_found_before_stays_where_nothing_is_gained() -> None:
    torch.manual_seed(0)
    a = torch.randn(6, 10)
    a[1] = a[0]
    now = np.array([1, 0, 2, 3, 5, 4])
    b = a[torch.from_numpy(np.argsort(now))]
    assert match([products(a, b)], [now], 1)[0].tolist() == now.tolist()


def test_an_order_of_an_axis_holds_every_copy() -> None:
    assert expanded(np.array([2, 0, 1]), 2).tolist() == [2, 0, 1, 5, 3, 4]


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    check_scipy()
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UsageError) as caught:
        check_scipy()
    assert (str(caught.value), caught.value.hint) == ("--rebasin: needs scipy", 'pip install "weightops[rebasin]"')
