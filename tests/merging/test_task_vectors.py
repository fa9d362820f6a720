"""Differences made sparse: each method against its formula in numpy's float64, and what all of them keep."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from applying import DTYPES, SHAPES, applied, assert_near, looked, random, same_bits
from torch.profiler import ProfilerActivity, profile

from weightops.errors import UsageError
from weightops.merging.expression import Applied, Given, Program
from weightops.merging.method import METHODS
from weightops.merging.rounding import generator_for
from weightops.plan import Block, Grain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.float64]

TRIMMED = ("magnitude", "ties")
MIDDLE = ("breadcrumbs", "breadcrumbs_ties")
DRAWN = ("dare", "dare_ties", "della")
NAMES = (*TRIMMED, *MIDDLE, *DRAWN)
ELECTED = ("ties", "breadcrumbs_ties", "dare_ties", "della")
# With these all values are kept.
WHOLE: dict[str, dict[str, Any]] = {name: {"density": 1} | ({"gamma": 0} if name in MIDDLE else {}) for name in NAMES}

WEIGHTS = [(1.0, 1.0, 1.0), (0.5, 1.2, 0.8), (1.0, -0.7, 0.4), (0.3, 0.0, -2.0)]
every_method = pytest.mark.parametrize("name", NAMES)
every_election = pytest.mark.parametrize("name", ELECTED)
every_drawing = pytest.mark.parametrize("name", DRAWN)
every_weights = pytest.mark.parametrize("weights", WEIGHTS, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())

PART = 128 * 1024


def changes(shape: Sequence[int], dtype: torch.dtype = torch.float32, count: int = 3) -> list[Tensor]:
    """Values over some magnitudes, so that ranks and limits matter."""
    return [(random(shape, seed=2 * n) * random(shape, seed=2 * n + 1).abs() * 0.01).to(dtype) for n in range(count)]


# ------------------------------------------------------------------------------------------------ the formulas


def wide(models: Sequence[Tensor]) -> list[Array]:
    return [m.double().numpy() for m in models]


def largest(delta: Array, density: float) -> Array:
    ordered = np.sort(np.abs(delta), axis=None)[::-1]
    return np.where(np.abs(delta) >= ordered[max(1, round(density * delta.size)) - 1], delta, 0.0)


def middle(delta: Array, density: float, gamma: float) -> Array:
    ordered = np.sort(np.abs(delta), axis=None)[::-1]
    first = min(round(gamma * delta.size), delta.size - 1)
    last = min(first + max(1, round(density * delta.size)), delta.size) - 1
    size = np.abs(delta)
    return np.where((size <= ordered[first]) & (size >= ordered[last]), delta, 0.0)


def elected(deltas: Sequence[Array], weights: Sequence[float], *, count_votes: bool, normalize: bool) -> Array:
    added = np.stack([w * d for d, w in zip(deltas, weights, strict=True)])
    sign = np.sign((np.sign(added) if count_votes else added).sum(0))
    agree = (np.sign(added) == sign) & (sign != 0)
    total = np.where(agree, added, 0.0).sum(0)
    if not normalize:
        return total
    share = sum(abs(w) * a for w, a in zip(weights, agree, strict=True))
    return np.divide(total, share, out=np.zeros_like(total), where=total != 0)


def summed(deltas: Sequence[Array], weights: Sequence[float], **_: Any) -> Array:
    return sum((w * d for d, w in zip(deltas, weights, strict=True)), np.zeros_like(deltas[0]))


def numbers(shape: Sequence[int], count: int, seed: int, *, rows: bool) -> list[Array]:
    """The random numbers of each difference: part by part, in each one difference after the other."""
    generator = generator_for(seed, "\0000", 0)
    size = math.prod(shape)
    width = math.prod(shape[1:]) if rows else 1
    step = max(1, PART // width) * width
    parts = [
        [torch.rand(min(step, size - start), generator=generator).numpy() for _ in range(count)]
        for start in range(0, size, step)
    ]
    return [np.concatenate(own).reshape(shape) for own in zip(*parts, strict=True)]


def thinned(deltas: Sequence[Array], density: float, seed: int = 0) -> list[Array]:
    drawn = numbers(deltas[0].shape, len(deltas), seed, rows=False)
    return [np.where(u < np.float32(density), d / density, 0.0) for d, u in zip(deltas, drawn, strict=True)]


def thinned_by_rank(deltas: Sequence[Array], density: float, epsilon: float, seed: int = 0) -> list[Array]:
    shape = deltas[0].shape
    drawn = numbers(shape, len(deltas), seed, rows=True)
    found = []
    for delta, u in zip(deltas, drawn, strict=True):
        table = np.abs(delta.reshape(1, -1) if delta.ndim == 1 else delta.reshape(len(delta), -1))
        rank = table.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
        n = table.shape[1]
        chance = np.full(table.shape, density) if n == 1 else density - epsilon + 2 * epsilon * rank / (n - 1)
        chance = chance.reshape(shape)
        found.append(np.where(u < chance, delta / chance, 0.0))
    return found


def same_draws(name: str, found: Tensor, exact: Array, operands: Sequence[Tensor]) -> None:
    """As the reference, but for chances that round to a number that was drawn."""
    off = np.abs(found.double().numpy() - exact) > 0.01 * np.abs(exact).max()
    assert off.sum() <= (2 if name == "della" and exact.size > 1000 else 0)
    assert_near(torch.where(torch.from_numpy(off), torch.from_numpy(exact).to(found.dtype), found), exact, operands)


# ------------------------------------------------------------------------------------------------ against the formulas


@every_shape
@every_dtype
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_magnitude_is_the_sum_of_the_largest(shape: tuple[int, ...], dtype: torch.dtype, density: float) -> None:
    deltas, weights = changes(shape, dtype), (0.5, 1.2, -0.8)
    exact = summed([largest(d, density) for d in wide(deltas)], weights)
    assert_near(applied("magnitude", deltas, weights=weights, density=density), exact, [d * 3 for d in deltas])
    (one,) = wide(deltas[:1])
    assert torch.equal(
        applied("magnitude", deltas[:1], density=density).double(), torch.from_numpy(largest(one, density))
    )


@every_shape
@every_dtype
@pytest.mark.parametrize("normalize", [True, False])
def test_ties_is_what_the_paper_says(shape: tuple[int, ...], dtype: torch.dtype, normalize: bool) -> None:
    deltas, weights = changes(shape, dtype), (0.5, 1.25, -0.75)
    for count_votes in (False, True) if shape[0] < 1000 else (False,):
        how = {"count_votes": count_votes, "normalize": normalize}
        exact = elected([largest(d, 0.2) for d in wide(deltas)], weights, **how)
        assert_near(applied("ties", deltas, weights=weights, **how), exact, [d * 3 for d in deltas])


@every_weights
@pytest.mark.parametrize("density", [0.001, 0.6, 1])
@pytest.mark.parametrize("name", TRIMMED)
def test_any_weights_and_densities(name: str, weights: tuple[float, ...], density: float) -> None:
    deltas = changes((23, 17))
    large = [largest(d, density) for d in wide(deltas)]
    for count_votes in (False, True):
        for normalize in (False, True):
            how = {"count_votes": count_votes, "normalize": normalize} if name == "ties" else {}
            exact = elected(large, weights, **how) if name == "ties" else summed(large, weights)
            assert_near(applied(name, deltas, weights=weights, density=density, **how), exact, [d * 4 for d in deltas])


@every_shape
@every_dtype
def test_breadcrumbs_leaves_out_the_largest_and_the_smallest(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    deltas, weights = changes(shape, dtype), (0.5, 1.25, -0.75)
    for density, gamma in [(0.9, 0.01), (0.2, 0.3)]:
        crumbs = [middle(d, density, gamma) for d in wide(deltas)]
        how = {"weights": weights, "density": density, "gamma": gamma}
        assert_near(applied("breadcrumbs", deltas, **how), summed(crumbs, weights), [d * 3 for d in deltas])
        exact = elected(crumbs, weights, count_votes=False, normalize=True)
        assert_near(applied("breadcrumbs_ties", deltas, **how), exact, [d * 3 for d in deltas])


@every_shape
@every_dtype
@every_drawing
def test_what_chance_keeps_is_combined_as_the_papers_say(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    deltas, weights = changes(shape, dtype), (0.5, 1.25, -0.75)
    given = wide(deltas)
    thin = thinned_by_rank(given, 0.4, 0.1, seed=3) if name == "della" else thinned(given, 0.4, seed=3)
    for count_votes in (False, True) if len(shape) < 4 and shape[0] < 100 else (False,):
        for normalize in (False, True):
            how = {"count_votes": count_votes, "normalize": normalize} if name != "dare" else {}
            exact = elected(thin, weights, **how) if how else summed(thin, weights)
            settings = {**how, "density": 0.4, **({"epsilon": 0.1} if name == "della" else {})}
            found = applied(name, deltas, weights=weights, seed=3, **settings)
            same_draws(name, found, exact, [d * 16 for d in deltas])


def test_all_values_that_equal_the_smallest_kept_are_kept() -> None:
    delta = torch.tensor([[1.0, -2.0, 2.0, 0.5], [2.0, 3.0, -0.1, 2.0]])
    assert applied("magnitude", [delta], density=0.25).tolist() == [[0.0, -2.0, 2.0, 0.0], [2.0, 3.0, 0.0, 2.0]]
    found = applied("breadcrumbs", [delta], density=0.25, gamma=0.125)
    assert found.tolist() == [[0.0, -2.0, 2.0, 0.0], [2.0, 0.0, 0.0, 2.0]]
    found = applied("breadcrumbs", [delta], density=0.25, gamma=0.25)
    assert found.tolist() == [[0.0, -2.0, 2.0, 0.0], [2.0, 0.0, 0.0, 2.0]], "the second largest is one of them"


def test_breadcrumbs_of_a_few_values_keeps_them() -> None:
    """A share of them that is less than one value leaves none out; mergekit leaves out all."""
    for size in (1, 2, 7, 40):
        delta = random((size,), seed=size)
        assert same_bits(applied("breadcrumbs", [delta], density=0.99, gamma=0.01), delta)
    assert (applied("breadcrumbs", [torch.full((64,), 0.25)], density=0.1, gamma=0.5) == 0.25).all()


def test_a_change_under_a_negative_weight_votes_as_what_it_would_add() -> None:
    a, b = torch.tensor([[4.0, 1.0, 2.0]]), torch.tensor([[-2.0, 8.0, -4.0]])
    found = applied("ties", [a, b], weights=[1.0, -0.5], density=1)
    # What they would add: 4 and 1, 1 and -4, 2 and 2; in the mean |w| is 1 and 0.5.
    assert found[0].tolist() == pytest.approx([5 / 1.5, -4 / 0.5, 4 / 1.5])
    assert same_bits(found, applied("ties", [a, -b], weights=[1.0, 0.5], density=1))


@every_election
def test_a_tie_of_votes_leaves_nothing(name: str) -> None:
    a, b = torch.tensor([[4.0, 1.0]]), torch.tensor([[-1.0, 3.0]])
    assert applied(name, [a, b], count_votes=True, **WHOLE[name]).tolist() == [[0.0, 2.0]]
    assert applied(name, [a, -a], **WHOLE[name]).tolist() == [[0.0, 0.0]]


# ------------------------------------------------------------------------------------------------ what all of them keep


@every_method
@every_dtype
def test_one_change_of_weight_one_is_itself_and_of_minus_one_is_taken_away(name: str, dtype: torch.dtype) -> None:
    for shape in [(9, 7), (5,), (300, 500)]:
        (delta,) = changes(shape, dtype, 1)
        assert torch.equal(applied(name, [delta], **WHOLE[name]), delta)
        assert torch.equal(applied(name, [delta], weights=[-1.0], **WHOLE[name]), -delta)


@every_method
def test_the_same_change_twice_is_that_change(name: str) -> None:
    (delta,) = changes((9, 7), count=1)
    weights = [3.0, 5.0] if name in ELECTED else [0.25, 0.75]
    assert torch.equal(applied(name, [delta, delta], weights=weights, **WHOLE[name]), delta)


@every_method
def test_changes_that_are_zero_give_zero(name: str) -> None:
    zeros = [torch.zeros(6, 5)] * 2
    assert (applied(name, zeros, weights=[1.0, 0.5]) == 0).all()
    (delta,) = changes((6, 5), count=1)
    found = applied(name, [delta, zeros[0]], **WHOLE[name])
    assert torch.equal(found, delta), "a change of nothing has no vote, and no part in a mean"


@every_method
def test_opposite_changes_and_large_ones_stay_finite(name: str) -> None:
    for scale in (1.0, 1e-30, 1e30):
        delta = (random((40, 40)) * scale).float()
        assert applied(name, [delta, -delta], weights=[1.0, 1.0]).isfinite().all()
        assert applied(name, [delta, delta], weights=[1.0, 1.0]).isfinite().all()


@every_method
def test_weights_are_strengths_or_shares(name: str) -> None:
    deltas = changes((12, 10), count=2)
    for normalize in (True, False) if name in ELECTED else (False,):
        how = {"normalize": normalize} if name in ELECTED else {}
        once, twice = (applied(name, deltas, weights=w, **how) for w in ([0.75, 0.5], [1.5, 1.0]))
        assert torch.equal(twice, once if normalize else 2 * once)


@every_method
def test_what_is_not_a_number_is_not_lost(name: str) -> None:
    for shape, at in [((6, 6), (2, 3)), ((600, 500), (411, 7))]:
        deltas = changes(shape, torch.float16, 2)
        deltas[0][at] = math.nan
        found = applied(name, deltas, **WHOLE[name])
        assert found.isnan().nonzero().tolist() == [list(at)]
        assert applied(name, deltas).isnan()[at]


@every_method
def test_changes_are_never_changed(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        deltas = [d.to(dtype) for d in changes((8, 8), count=2)]
        before = [d.clone() for d in deltas]
        method = METHODS.get(name)
        settings = method.check({"weights": (1.0, -0.5)}, 2)
        handed = looked(method, deltas, settings) | ({"random": torch.Generator()} if method.draws else {})
        method.function(*deltas, **settings, **handed)
        assert all(map(same_bits, deltas, before))


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bits_do_not_depend_on_the_height_of_parts(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random numbers are drawn part by part, one change after the other: of one change they are the same.
    deltas = changes((370, 211), dtype, 1 if name in DRAWN else 3)
    weights, found = (1.0, -0.7, 0.4)[: len(deltas)], []
    for values in (500, 211 * 64, 1 << 20):
        monkeypatch.setattr("weightops.merging.expression.WORKING_VALUES", values)
        found.append(applied(name, deltas, weights=weights))
    assert all(same_bits(found[0], other) for other in found[1:])


@pytest.mark.parametrize("name", [*TRIMMED, *MIDDLE])
def test_looks_at_blocks_find_what_a_look_at_all_finds(name: str) -> None:
    method, deltas = METHODS.get(name), changes((500, 700), torch.float16)
    settings = method.check({"density": 0.37}, 3)
    whole = looked(method, deltas, settings)
    assert whole == looked(method, deltas, settings, rows=40_000) == looked(method, deltas, settings, rows=137_777)


@every_method
def test_no_more_memory_is_taken_than_is_said(name: str) -> None:
    method = METHODS.get(name)
    for count in (1, 4):
        deltas = [d.double() for d in changes((64, 512), count=count)]
        settings = method.check({}, count)
        handed = looked(method, deltas, settings) | ({"random": torch.Generator()} if method.draws else {})
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            method.function(*deltas, **settings, **handed)
        now = most = 0
        for event in found.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        said = (method.copies + method.each * count) * deltas[0].nbytes
        assert most <= said + 4096
        assert count == 1 or said <= 1.5 * most


# ------------------------------------------------------------------------------------------------ chance


@every_drawing
def test_the_same_seed_gives_the_same_bits_and_another_others(name: str) -> None:
    deltas = changes((20, 20), count=2)
    first, again, other = (applied(name, deltas, seed=seed) for seed in (1, 1, 2))
    assert same_bits(first, again)
    assert not same_bits(first, other)


@every_drawing
def test_each_block_of_rows_has_its_own_numbers(name: str) -> None:
    method, ones = METHODS.get(name), torch.ones(20, 10)
    node = Applied(method, (Given(0),), method.check({}, 1), "0")
    shape = (200,) if node.grain is Grain.VALUES else (20, 10)
    found, half = [torch.empty(shape) for _ in range(2)], shape[0] // 2
    for out, order in zip(found, ((0, 1), (1, 0)), strict=True):
        for n in order:
            rows = slice(n * half, (n + 1) * half)
            block = Block(n, n * half, (n + 1) * half)
            Program(node, "a weight", 0, shape, node.grain, True).fill([ones.view(shape)[rows]], out[rows], block)
    assert same_bits(*found), "they depend on nothing that came before"
    assert not torch.equal(found[0][:half] == 0, found[0][half:] == 0)


@every_drawing
def test_changes_are_thinned_apart(name: str) -> None:
    ones = torch.ones(30, 30)
    more = {"della": {"epsilon": 0.0, "normalize": False}, "dare_ties": {"normalize": False}}
    found = applied(name, [ones, ones], weights=[1.0, 100.0], density=0.5, **more.get(name, {}))
    assert found.unique().tolist() == [0.0, 2.0, 200.0, 202.0]


@every_drawing
def test_on_average_nothing_is_lost(name: str) -> None:
    (delta,), count = changes((8, 16), count=1), 400
    more = {"della": {"epsilon": 0.2, "normalize": False}, "dare_ties": {"normalize": False}}
    runs = [applied(name, [delta], seed=s, density=0.3, **more.get(name, {})) for s in range(count)]
    found = torch.stack(runs).double()
    chance = (found != 0).double().mean(0).clamp_min(0.05)
    spread = delta.abs() * ((1 - chance) / chance).sqrt() / count**0.5
    assert ((found.mean(0) - delta).abs() <= 5 * spread).all()


def test_the_larger_a_value_is_in_its_row_the_likelier_della_keeps_it() -> None:
    row = torch.tensor([0.1, -5.0, 3.0, -0.2, 0.0001])
    for delta in (row.repeat(20_000, 1), row.repeat(20_000, 1)[:, :, None, None]):
        found = applied("della", [delta], density=0.5, epsilon=0.2).flatten(1)
        kept = (found != 0).double().mean(0)
        assert kept.tolist() == pytest.approx([0.4, 0.7, 0.6, 0.5, 0.3], abs=0.02)
        assert found.amax(0).tolist()[2] == pytest.approx(3.0 / 0.6)
        assert found.amin(0).tolist()[1] == pytest.approx(-5.0 / 0.7)
    alone = applied("della", [torch.ones(100, 1)], density=0.5, epsilon=0.2)
    assert alone.unique().tolist() == [0.0, 2.0]


def test_a_tensor_of_one_axis_is_one_row_to_della() -> None:
    delta = torch.arange(1.0, 1001.0)
    found = applied("della", [delta], density=0.5, epsilon=0.4)
    rows = applied("della", [delta[None]], density=0.5, epsilon=0.4)
    assert same_bits(found, rows[0])
    assert (found[-100:] != 0).sum() > 75
    assert (found[:100] != 0).sum() < 25


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("ties", {"density": "0"}, "ties, density: found '0', expected a number above 0 and at most 1"),
        ("dare", {"density": 1.5}, "dare, density: found 1.5, expected a number above 0 and at most 1"),
        ("della", {"density": "x"}, "della, density: found 'x', expected a number above 0 and at most 1"),
        ("ties", {"normalize": "2"}, "ties, normalize: found '2', expected true or false"),
        ("ties", {"gamma": 1}, "--set: ties has no parameter 'gamma'"),
        ("della", {"epsilon": -0.1}, "della, epsilon: found -0.1, expected 0 or more"),
        ("della", {"density": 0.9},
         "della, epsilon: found 0.15 with a density of 0.9, expected less than 0.9 and at most 0.1"),
        ("della", {"density": 0.15},
         "della, epsilon: found 0.15 with a density of 0.15, expected less than 0.15 and at most 0.85"),
        ("breadcrumbs", {"gamma": -0.1},
         "breadcrumbs, gamma: found -0.1 with a density of 0.9, expected 0 or more and at most 0.1"),
        ("breadcrumbs_ties", {"density": 1},
         "breadcrumbs_ties, gamma: found 0.01 with a density of 1, expected 0 or more and at most 0"),
    ],
)  # fmt: skip
def test_senseless_settings_are_refused(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        METHODS.get(name).check(given, 2)
    assert str(caught.value) == message


def test_settings_come_as_words_or_as_values() -> None:
    values = METHODS.get("ties").check({"density": "0.4", "normalize": "no", "weights": "1,2,3"}, 3)
    assert values == {"density": 0.4, "count_votes": False, "normalize": False, "weights": (1.0, 2.0, 3.0)}
    for density, epsilon in [(0.85, 0.15), (0.66, 0.34), (1, 0.15), (0.3, 0.2)]:
        METHODS.get("della").check({"density": density, "epsilon": epsilon}, 2)
    METHODS.get("breadcrumbs").check({"density": 0.7, "gamma": 0.3}, 2)


# ------------------------------------------------------------------------------------------------ elsewhere


@pytest.mark.cuda
@every_method
def test_a_gpu_gives_the_same(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for shape in [(300, 40), (900, 500)]:
        deltas = changes(shape, torch.float16)
        there = applied(name, [d.cuda() for d in deltas], weights=[1.0, -0.7, 0.4]).cpu()
        here = applied(name, deltas, weights=[1.0, -0.7, 0.4])
        assert ((there - here).abs() > 1e-5).sum() <= 2
