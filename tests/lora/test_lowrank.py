"""Low-rank algebra and truncations against the full matrices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from weightops.errors import ValueRefused
from weightops.lora import lowrank as module
from weightops.lora.lowrank import (
    Factorised,
    LowRank,
    add,
    norm,
    singular_values,
    truncate,
    truncate_kronecker,
    truncate_many,
    truncate_nbytes,
)
from weightops.lora.rank import RankRule

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

torch.set_num_threads(1)

DOUBLE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=DOUBLE)


def adapter(out: int, rank: int, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> LowRank:
    down = random(rank, n, seed=seed + 1) * torch.arange(1, rank + 1, dtype=DOUBLE)[:, None] ** -0.8
    return LowRank(random(out, rank, seed=seed).to(dtype), down.to(dtype))


def whole(a: LowRank) -> Tensor:
    return a.up.double() @ a.down.double()


def with_values(values: Tensor, out: int, n: int, *, seed: int = 0) -> Tensor:
    """A matrix [out, n] of these singular values and random vectors, in float64."""
    left = torch.linalg.qr(random(out, len(values), seed=seed))[0]
    right = torch.linalg.qr(random(n, len(values), seed=seed + 1))[0]
    return (left * values.double()) @ right.mT


def tail(matrix: Tensor, rank: int) -> float:
    """The smallest error that a matrix of that rank can have (Eckart & Young)."""
    return float(torch.linalg.svdvals(matrix.double())[rank:].square().sum().sqrt())


def distance(matrix: Tensor, a: LowRank) -> float:
    return float((matrix.double() - whole(a)).norm())


# ------------------------------------------------------------------------------------------------ algebra of factors


def test_algebra_of_factors_is_that_of_the_matrices() -> None:
    a, b = adapter(24, 4, 40), adapter(24, 7, 40, seed=5)
    torch.testing.assert_close(whole(add(a, b, a)), 2 * whole(a) + whole(b))
    torch.testing.assert_close(whole(a.scale(-0.3)), -0.3 * whole(a), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole(a.transpose()), whole(a).mT)
    torch.testing.assert_close(whole(a.rows(slice(3, 9))), whole(a)[3:9])
    torch.testing.assert_close(a.dense(), whole(a).float())
    assert math.isclose(norm(a), float(whole(a).norm()), rel_tol=1e-9)
    assert (add(a, b).rank, add(a, b).shape) == (11, (24, 40))


def test_halves_are_added_and_scaled_in_float32() -> None:
    a = adapter(24, 4, 40, dtype=torch.bfloat16)
    assert add(a, a).up.dtype is a.scale(2).up.dtype is torch.float32
    torch.testing.assert_close(whole(a.scale(1 / 3)), whole(a) / 3, rtol=1e-6, atol=1e-6)


def test_a_change_less_itself_is_nothing() -> None:
    a = adapter(24, 4, 40)
    assert norm(add(a, a.scale(-1))) <= 1e-7 * norm(a)
    difference = add(a, a.scale(-1))
    assert truncate(difference, 8).lowrank.rank == 0
    assert max(singular_values(difference)) <= 1e-12 * norm(a)
    low = adapter(6, 4, 40)  # of more ranks than rows
    assert singular_values(add(low, low.scale(-1))) == (0.0,) * 6
    assert truncate(add(low, low.scale(-1)), 6).lowrank.rank == 0


def test_factors_that_do_not_meet_are_our_own_mistake() -> None:
    with pytest.raises(ValueError, match=r"factors that do not meet: \[4, 2\], \[3, 4\]"):
        LowRank(torch.ones(4, 2), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"changes of 2 shapes: \[\(4, 5\), \(4, 6\)\]"):
        add(adapter(4, 2, 5), adapter(4, 2, 6))


# ------------------------------------------------------------------------------------------------ truncation

SHAPES = [(24, 6, 40), (40, 6, 24), (30, 30, 30), (20, 50, 60), (60, 50, 20), (1, 3, 9), (9, 1, 9)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@every_shape
def test_singular_values_are_those_of_the_matrix(shape: tuple[int, int, int]) -> None:
    a = adapter(*shape)
    found = singular_values(a)
    assert len(found) == min(shape)
    expected = torch.linalg.svdvals(whole(a))[: min(shape)]
    torch.testing.assert_close(torch.tensor(found, dtype=DOUBLE), expected, rtol=1e-9, atol=1e-12)


@every_shape
@pytest.mark.parametrize("rank", [1, 3, 100])
def test_a_truncation_is_the_optimum(shape: tuple[int, int, int], rank: int) -> None:
    a = adapter(*shape)
    found = truncate(a, rank)
    assert found.lowrank.rank == len(found.singular_values) == min(rank, *shape)
    best = tail(whole(a), rank)
    assert distance(whole(a), found.lowrank) <= best + 1e-6 * norm(a)
    assert math.isclose(found.error * found.norm, best, rel_tol=1e-6, abs_tol=1e-7 * norm(a))
    assert math.isclose(found.energy, 1 - found.error**2, abs_tol=1e-9)
    assert math.isclose(found.norm, norm(a), rel_tol=1e-9)


@pytest.mark.parametrize("method", ["gram", "qr"])
def test_values_are_split_evenly_and_signs_are_certain(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRAM_LIMIT", 0.0 if method == "gram" else 1e9)
    found = truncate(adapter(24, 6, 40), 4)
    assert found.method == method
    up, down = found.lowrank.up.double(), found.lowrank.down.double()
    values = torch.tensor(found.singular_values, dtype=DOUBLE)
    torch.testing.assert_close(up.mT @ up, values.diag(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(down @ down.mT, values.diag(), rtol=1e-6, atol=1e-5)
    assert all(row[row.abs().argmax()] > 0 for row in down)


def test_both_ways_to_truncate_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    one = truncate(adapter(24, 6, 40), 4).lowrank
    monkeypatch.setattr(module, "_GRAM_LIMIT", 1e9)
    other = truncate(adapter(24, 6, 40), 4).lowrank
    torch.testing.assert_close(one.up, other.up, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.down, other.down, rtol=0, atol=1e-6)


def test_small_singular_values_are_right_where_gram_matrices_lose_them() -> None:
    """Down to 1e-11 of the largest; the square root of float64's rounding is 1.5e-8."""
    values = torch.tensor([1.0, 1e-3, 1e-6, 1e-9, 1e-11], dtype=DOUBLE)
    left = torch.linalg.qr(random(30, 5))[0] * values
    right = torch.linalg.qr(random(40, 5, seed=1))[0].mT
    a = LowRank(left, right)
    torch.testing.assert_close(torch.tensor(singular_values(a), dtype=DOUBLE), values, rtol=1e-3, atol=0)
    assert truncate(a, 2).method == "gram"
    assert truncate(a, 4).method == "qr"


def test_ranks_that_are_not_there_are_not_kept() -> None:
    a = adapter(24, 3, 40)
    twice = LowRank(torch.cat([a.up, a.up, a.up[:, :1] * 0], 1), torch.cat([a.down, a.down, a.down[:1]], 0))
    found = truncate(twice, 7)
    assert (found.lowrank.rank, found.method) == (3, "qr")
    assert distance(2 * whole(a), found.lowrank) <= 1e-6 * norm(twice)
    assert sum(v > 0 for v in singular_values(twice)) == 3


@pytest.mark.parametrize("rank", [0, 2])
def test_nothing_stays_nothing(rank: int) -> None:
    nothing = LowRank(torch.zeros(5, rank), torch.zeros(rank, 7))
    found = truncate(nothing, 4)
    assert (found.lowrank.rank, found.lowrank.shape, found.energy, found.error, found.norm) == (
        0,
        (5, 7),
        1.0,
        0.0,
        0.0,
    )
    assert norm(nothing) == 0
    assert set(singular_values(nothing)) <= {0.0}


def test_a_rule_chooses_the_rank_of_a_truncation() -> None:
    a = adapter(40, 12, 50)
    for text in ("energy:0.9", "error:0.1", "ratio:4", "cumulative:0.7", "fro:0.9", "knee"):
        found = truncate(a, RankRule.parse(text))
        values = singular_values(a)
        assert found.lowrank.rank == RankRule.parse(text).choose(values, 40, 50, norm(a) ** 2)
    assert truncate(a, RankRule.parse("energy:0.9")).energy >= 0.9
    assert truncate(a, RankRule.parse("error:0.1")).error <= 0.1
    assert truncate(a, RankRule.parse("energy:0.99", cap=2)).lowrank.rank == 2


def test_the_first_ranks_of_a_truncation_are_the_truncation_to_them() -> None:
    a = adapter(24, 6, 40)
    more = truncate(a, 5).lowrank
    first = LowRank(more.up[:, :2], more.down[:2])
    torch.testing.assert_close(whole(first), whole(truncate(a, 2).lowrank), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    a = adapter(24, 6, 40)
    a.up[3, 2] = bad
    for refused in (truncate, lambda a, _: singular_values(a)):
        with pytest.raises(ValueRefused, match="its factors hold NaN or Inf"):
            refused(a, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["F16", "BF16"])
def test_halves_are_truncated_as_the_values_they_are(dtype: torch.dtype) -> None:
    a = adapter(60, 12, 90, dtype=dtype)
    found = truncate(a, 5)
    same = truncate(LowRank(a.up.double(), a.down.double()), 5)
    assert found.lowrank.up.dtype is found.lowrank.down.dtype is torch.float32
    assert same.lowrank.up.dtype is DOUBLE
    torch.testing.assert_close(found.lowrank.up, same.lowrank.up.float(), rtol=0, atol=0)
    torch.testing.assert_close(found.lowrank.down, same.lowrank.down.float(), rtol=0, atol=0)
    exact = torch.linalg.svdvals(whole(a))[:12]
    for values in (found.singular_values, singular_values(a)):
        kept = torch.tensor(values, dtype=DOUBLE)
        torch.testing.assert_close(kept, exact[: len(kept)], rtol=0, atol=1e-12 * float(exact[0]))


@pytest.mark.parametrize("limit", [1e-5, 1e9], ids=["gram", "qr"])
@every_shape
def test_the_height_of_a_band_does_not_matter(
    shape: tuple[int, int, int], limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GRAM_LIMIT", limit)
    a = adapter(*shape, dtype=torch.float16)
    expected, values = truncate(a, 3), singular_values(a)
    size = norm(a)
    for block, panel in ((1, 2), (64, 1), (150, 5)):
        monkeypatch.setattr(module, "_BLOCK", block)
        monkeypatch.setattr(module, "_PANEL", panel)
        found = truncate(a, 3)
        torch.testing.assert_close(found.lowrank.up, expected.lowrank.up, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.lowrank.down, expected.lowrank.down, rtol=0, atol=1e-6)
        assert found.singular_values == pytest.approx(expected.singular_values, rel=1e-9)
        assert singular_values(a) == pytest.approx(values, rel=1e-9)
        assert norm(a) == pytest.approx(size, rel=1e-9)


def test_factors_may_lie_across() -> None:
    a = adapter(24, 6, 40)
    one, other = truncate(a.transpose(), 4), truncate(a, 4)
    torch.testing.assert_close(whole(one.lowrank), whole(other.lowrank).mT, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ its memory


def taken(call: Callable[[], object]) -> int:
    """The most bytes of torch's that are alive at once while this is computed."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = call()
    now = most = 0
    for event in found.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    del kept
    return most


def repeated(a: LowRank) -> LowRank:
    """As many ranks, of which half are there twice: QR's."""
    half = a.rank // 2
    a.up[:, half : 2 * half], a.down[half : 2 * half] = a.up[:, :half].clone(), a.down[:half].clone()
    return a


# Wide, tall, square, of more ranks than rows or columns, and tiny: out, n, rank, kept.
SIZES = [(640, 5760, 64, 64), (5120, 640, 32, 8), (200, 200, 200, 200), (20, 2880, 128, 20), (320, 36, 128, 8),
         (99, 101, 100, 50), (640, 640, 4, 4), (7, 5, 3, 3), (4, 8, 16, 4), (1, 1, 9, 1)]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, DOUBLE], ids=["F16", "F32", "F64"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_truncation_takes_no_more_than_it_says(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    out, n, rank, kept = size
    most = truncate_nbytes(*size)
    for a in (adapter(out, rank, n, dtype=dtype), repeated(adapter(out, rank, n, dtype=dtype))):
        assert 0 < taken(lambda a=a: truncate(a, kept)) <= most  # type: ignore[misc]
        assert 0 < taken(lambda a=a: singular_values(a)) <= most  # type: ignore[misc]
    assert most <= 10 * (8 * (rank + kept) * (out + n) + 2048)  # and it says no more than is of its size


def test_gram_matrices_take_no_copies_of_the_factors() -> None:
    a = adapter(1280, 64, 11520, dtype=torch.float16)
    found = truncate(a, 16)
    result = found.lowrank.up.nbytes + found.lowrank.down.nbytes
    assert found.method == "gram"
    # A band in float64, and what the next is made from; a dozen matrices [64, 64].
    assert taken(lambda: truncate(a, 16)) <= result + 20 * module._BLOCK + 12 * 8 * 64 * 64


# ------------------------------------------------------------------------------------------------ many


def alike(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> list[LowRank]:
    """Of one shape: two ordinary ones, one of fewer ranks than it seems, one of zeros."""
    made = [adapter(*shape, seed=10 * i, dtype=dtype) for i in range(4)]
    repeated(made[2])
    made[3].up.zero_()
    return made


def same(found: list[Factorised], expected: list[Factorised]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.method, one.lowrank.rank) == (other.method, other.lowrank.rank)
        assert one.singular_values == pytest.approx(other.singular_values, rel=1e-9)
        figures = [(f.energy, f.error, f.norm) for f in (one, other)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-9, abs=1e-9)
        size = 1e-6 * max(one.singular_values, default=1.0)
        torch.testing.assert_close(whole(one.lowrank).cpu(), whole(other.lowrank), rtol=0, atol=size)
        if one.lowrank.rank < 3:  # the signs and the order of vectors of distinct values
            torch.testing.assert_close(one.lowrank.up.cpu(), other.lowrank.up, rtol=0, atol=size)


RULES: list[RankRule | int] = [2, RankRule.parse("energy:0.99"), 100, 3]


@every_shape
@pytest.mark.parametrize("rules", [RULES, [2] * 4, [100] * 4], ids=str)
def test_a_stack_is_truncated_as_each(shape: tuple[int, int, int], rules: list[RankRule | int]) -> None:
    """As on a CUDA device, where equal shapes are done together."""
    made = alike(shape)
    up, down = torch.stack([a.up for a in made]), torch.stack([a.down for a in made])
    expected = [truncate(a, rule) for a, rule in zip(made, rules, strict=True)]
    same(module._truncate(up, down, rules), expected)


def test_many_are_truncated_as_each() -> None:
    made = [*alike((24, 6, 40)), adapter(9, 3, 12, dtype=torch.float16)]
    found = truncate_many(made, [*RULES, 2])
    for one, a, rule in zip(found, made, [*RULES, 2], strict=True):
        assert torch.equal(one.lowrank.up, truncate(a, rule).lowrank.up)
    assert truncate_many([], []) == []
    with pytest.raises(ValueError, match="shorter"):
        truncate_many(made, RULES)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_truncates_as_the_cpu() -> None:
    made = [*alike((24, 6, 40)), adapter(9, 3, 12), *alike((24, 6, 40), torch.float16), *alike((20, 50, 60))]
    rules = [*RULES, 2, *RULES, *RULES]
    found = truncate_many([LowRank(a.up.cuda(), a.down.cuda()) for a in made], rules)
    assert all(f.lowrank.up.is_cuda for f in found)
    same(found, truncate_many(made, rules))


# ------------------------------------------------------------------------------------------------ Kronecker products


@pytest.mark.parametrize("rank", [1, 5, 24, 100])
@pytest.mark.parametrize(
    ("a", "b"), [(adapter(6, 4, 8), adapter(7, 6, 5, seed=2)), (adapter(4, 3, 3), adapter(9, 2, 8))]
)
def test_a_kronecker_product_is_cut_as_its_matrix_is(a: LowRank, b: LowRank, rank: int) -> None:
    dense = torch.kron(whole(a), whole(b))
    values = torch.linalg.svdvals(dense)
    found = truncate_kronecker(a, b, rank)
    count = len(found.singular_values)
    assert count == min(rank, min(a.rank, *a.shape) * min(b.rank, *b.shape))
    assert found.singular_values == pytest.approx(values[:count].tolist(), abs=1e-9 * float(values[0]))
    lost = float(values[count:].norm())
    assert found.error * found.norm == pytest.approx(lost, abs=1e-6 * float(values[0]))
    assert float((whole(found.lowrank) - dense).norm()) == pytest.approx(lost, abs=1e-5 * float(values[0]))
    assert found.norm == pytest.approx(float(dense.norm()), rel=1e-9)


def test_a_kronecker_product_with_nothing_has_no_rank() -> None:
    nothing = LowRank(torch.zeros(4, 2), torch.zeros(2, 3))
    assert truncate_kronecker(nothing, adapter(5, 2, 6), 3).singular_values == ()
