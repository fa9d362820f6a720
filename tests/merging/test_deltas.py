"""Ways to combine changes: contracts over the registry, and each against its formula on whole float64 matrices."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from weightops.errors import MismatchError, UsageError
from weightops.merging import deltas as module
from weightops.merging.deltas import DELTA_METHODS, DeltaMethod
from weightops.merging.method import KINDS
from weightops.merging.rounding import generator_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Generator, Tensor

torch.set_num_threads(1)

ALL = [method for _, method in DELTA_METHODS]
every_method = pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
every_elementwise = pytest.mark.parametrize("method", [m for m in ALL if not m.linear], ids=lambda m: m.name)
every_drawing = pytest.mark.parametrize("method", [m for m in ALL if m.draws], ids=lambda m: m.name)
WEIGHTS = [(1.0, 1.0, 1.0), (0.5, 1.2, 0.8), (1.0, -0.7, 0.4), (0.3, 0.0, -2.0)]
every_weights = pytest.mark.parametrize("weights", WEIGHTS, ids=str)


class Dense:
    """A change that is there whole, and may only be asked for rows."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.shape = (values.shape[0], values.shape[1])

    def rows(self, rows: slice) -> Tensor:
        return self.values[rows]


def random(seed: int, *shape: int) -> Tensor:
    """Values over some magnitudes, so that ranks and limits matter; float64 that float32 holds."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator)).double()


def seeded(seed: int) -> Callable[[int], Generator]:
    return lambda block: generator_for(seed, "a weight", block)


def combined(
    method: DeltaMethod,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    draw: Callable[[int], Generator] | None = None,
    dtype: torch.dtype = torch.float32,
    **given: Any,
) -> Tensor:
    settings = method.check(given, weights)
    if method.linear:
        numbers = method.coefficients(gram(deltas), weights, settings)
        return sum((c * d.double() for c, d in zip(numbers, deltas, strict=True)), torch.zeros_like(deltas[0]).double())
    out = torch.full(deltas[0].shape, math.nan, dtype=dtype)
    wide = [Dense(d.to(dtype)) for d in deltas]
    method.fill(wide, out, weights=weights, settings=settings, random=draw or seeded(0))
    return out


def gram(deltas: Sequence[Tensor]) -> list[list[float]]:
    return [[float((a.double() * b.double()).sum()) for b in deltas] for a in deltas]


def having(method: DeltaMethod, **wanted: Any) -> dict[str, Any]:
    """Those of the settings that the method has."""
    return {name: value for name, value in wanted.items() if name in {p.name for p in method.parameters}}


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_near(found: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


def assert_equal(found: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(found.double(), exact, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ every method


@every_method
def test_a_method_is_what_its_signature_says(method: DeltaMethod) -> None:
    signature = inspect.signature(method.function).parameters
    positional = [name for name, p in signature.items() if p.kind is p.POSITIONAL_ONLY]
    keywords = {name: p for name, p in signature.items() if p.kind is p.KEYWORD_ONLY}
    assert positional == (["gram"] if method.linear else ["deltas", "out"])
    assert method.draws == ("random" in keywords)
    assert "weights" in keywords
    settings = {name: p for name, p in keywords.items() if name not in ("weights", "random")}
    assert {p.name: (p.kind, p.default) for p in method.parameters} == {
        name: (p.annotation, p.default) for name, p in settings.items()
    }
    assert all(p.kind in KINDS and p.default is not None for p in method.parameters)
    assert method.name == method.function.__name__.rstrip("_")


@every_method
def test_a_method_says_in_one_line_what_it_does(method: DeltaMethod) -> None:
    assert method.summary.endswith(".")
    assert "\n" not in method.summary


@every_method
def test_one_change_of_weight_one_is_itself(method: DeltaMethod) -> None:
    delta = random(0, 9, 7)
    deltas, weights = ([delta], [1.0]) if method.count is None else ([delta, random(1, 9, 7)], [1.0, 0.0])
    assert torch.equal(combined(method, deltas, weights, **having(method, density=1)).double(), delta)


@every_elementwise
def test_one_change_of_weight_minus_one_is_taken_away(method: DeltaMethod) -> None:
    delta = random(0, 9, 7)
    assert torch.equal(combined(method, [delta], [-1.0], **having(method, density=1)).double(), -delta)


@every_method
def test_changes_that_are_zero_give_zero(method: DeltaMethod) -> None:
    zeros = [torch.zeros(6, 5)] * 2
    assert (combined(method, zeros, [1.0, 0.5]) == 0).all()


@every_method
def test_weights_are_strengths_or_shares(method: DeltaMethod) -> None:
    deltas = [random(seed, 12, 10) for seed in range(2)]
    for normalize in (True, False):
        settings = having(method, normalize=normalize)
        once, twice = (combined(method, deltas, w, **settings) for w in ([0.75, 0.5], [1.5, 1.0]))
        shares = method.name == "slerp" or settings.get("normalize", False)
        assert torch.equal(twice, once if shares else 2 * once)


@every_elementwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_bits_do_not_depend_on_the_height_of_bands(
    method: DeltaMethod, dtype: torch.dtype, normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random numbers belong to blocks, which are bands: one generator for all of them gives one change the same.
    deltas = [random(seed, 37, 11) for seed in range(1 if method.draws else 3)]
    found = []
    for values in (1, 50, 11 * 8, 1 << 20):
        monkeypatch.setattr(module, "BAND_VALUES", values)
        one = torch.Generator().manual_seed(3)
        settings = having(method, normalize=normalize)
        weights = WEIGHTS[2][: len(deltas)]
        found.append(combined(method, deltas, weights, draw=lambda _, g=one: g, dtype=dtype, **settings))  # type: ignore[misc]
    assert all(same_bits(found[0], other) for other in found[1:])


@every_elementwise
def test_changes_are_never_changed(method: DeltaMethod) -> None:
    deltas = [random(seed, 8, 8).float() for seed in range(2)]
    before = [d.clone() for d in deltas]
    combined(method, deltas, [1.0, -0.5])
    assert all(map(same_bits, deltas, before))


@every_elementwise
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (1, 9), (9, 1)], ids=str)
def test_every_shape_is_filled(method: DeltaMethod, shape: tuple[int, int]) -> None:
    assert not combined(method, [random(1, *shape), random(2, *shape)], [1.0, 1.0]).isnan().any()


@every_elementwise
def test_what_is_not_a_number_is_not_lost(method: DeltaMethod) -> None:
    delta = random(0, 6, 6)
    delta[2, 3] = math.nan
    found = combined(method, [delta, random(1, 6, 6)], [1.0, 1.0], **having(method, density=1))
    assert found.isnan().nonzero().tolist() == [[2, 3]]
    if not method.draws:
        assert combined(method, [delta, random(1, 6, 6)], [1.0, 1.0], density=0.1).isnan()[2, 3]


@every_elementwise
def test_changes_of_two_shapes_are_our_own_mistake(method: DeltaMethod) -> None:
    with pytest.raises(ValueError, match=r"2 changes with 2 weights, of shapes \[\(2, 3\), \(3, 2\)\]"):
        combined(method, [torch.zeros(2, 3), torch.zeros(3, 2)], [1.0, 1.0])


def taken(method: DeltaMethod, out: int, n: int, count: int, dtype: torch.dtype) -> int:
    """The most bytes of torch's that are alive at once while changes are combined that are held in float64."""
    deltas = [Dense(torch.randn(out, n, dtype=torch.float64)) for _ in range(count)]
    result, weights = torch.empty(out, n, dtype=dtype), [1.0] * count
    settings, draw = method.check({}, weights), seeded(0)
    generators = {block: draw(block) for block in range(out)}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        method.fill(deltas, result, weights=weights, settings=settings, random=generators.__getitem__)
    now = most = 0
    for event in found.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@every_elementwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_no_more_memory_is_taken_than_is_said(
    method: DeltaMethod, dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BAND_VALUES", 16 * 1024)
    for out, n in [(100, 512), (3, 40_000), (5, 64)]:
        most, said = taken(method, out, n, count, dtype), method.nbytes(out, n, count, size=dtype.itemsize)
        assert most <= said + 1024
        assert said <= 4 * most or method.name in ("magnitude", "dare")


# ------------------------------------------------------------------------------------------------ chance


@every_drawing
def test_the_same_seed_gives_the_same_bits_and_another_others(method: DeltaMethod) -> None:
    deltas = [random(seed, 20, 20) for seed in range(2)]
    first, again, other = (combined(method, deltas, [1.0, 1.0], draw=seeded(s)) for s in (1, 1, 2))
    assert same_bits(first, again)
    assert not same_bits(first, other)


@every_drawing
def test_each_block_of_rows_has_its_own_numbers(method: DeltaMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BAND_VALUES", 40)
    asked: list[int] = []

    def draw(block: int) -> Generator:
        asked.append(block)
        return generator_for(0, "a weight", block)

    found = combined(method, [torch.ones(10, 10)], [1.0], draw=draw)
    assert asked == [0, 1, 2]
    assert not torch.equal(found[:4] == 0, found[4:8] == 0)


@every_drawing
def test_changes_are_thinned_apart(method: DeltaMethod) -> None:
    ones = torch.ones(30, 30)
    found = combined(method, [ones, ones], [1.0, 100.0], **having(method, density=0.5, epsilon=0.0, normalize=False))
    assert found.unique().tolist() == [0.0, 2.0, 200.0, 202.0]


@every_drawing
def test_on_average_nothing_is_lost(method: DeltaMethod) -> None:
    delta, count = random(5, 8, 16), 400
    settings = having(method, density=0.3, epsilon=0.2, normalize=False)
    found = torch.stack([combined(method, [delta], [1.0], draw=seeded(s), **settings) for s in range(count)]).double()
    chance = (found != 0).double().mean(0).clamp_min(0.05)
    spread = delta.abs() * ((1 - chance) / chance).sqrt() / count**0.5
    assert ((found.mean(0) - delta).abs() <= 5 * spread).all()


def test_the_larger_a_value_is_in_its_row_the_likelier_della_keeps_it() -> None:
    row = torch.tensor([0.1, -5.0, 3.0, -0.2, 0.0001])
    delta = row.repeat(20_000, 1)
    found = combined(DELTA_METHODS.get("della"), [delta], [1.0], density=0.5, epsilon=0.2)
    kept = (found != 0).double().mean(0)
    assert kept.tolist() == pytest.approx([0.4, 0.7, 0.6, 0.5, 0.3], abs=0.02)
    assert found.amax(0).tolist()[2] == pytest.approx(3.0 / 0.6)
    assert found.amin(0).tolist()[1] == pytest.approx(-5.0 / 0.7)
    alone = combined(DELTA_METHODS.get("della"), [torch.ones(100, 1)], [1.0], density=0.5, epsilon=0.2)
    assert alone.unique().tolist() == [0.0, 2.0]


# ------------------------------------------------------------------------------------------------ formulas, elementwise


def largest(delta: Tensor, density: float) -> Tensor:
    limit = delta.abs().flatten().sort(descending=True).values[max(1, round(density * delta.numel())) - 1]
    return torch.where(delta.abs() >= limit, delta, 0.0)


def elected(changes: Sequence[Tensor], weights: Sequence[float], count_votes: bool, normalize: bool) -> Tensor:
    """Value by value, in Python's own float64."""
    found = torch.zeros_like(changes[0])
    for i in range(found.shape[0]):
        for j in range(found.shape[1]):
            add = [w * float(c[i, j]) for c, w in zip(changes, weights, strict=True)]
            vote = sum((a > 0) - (a < 0) for a in add) if count_votes else sum(add)
            agree = [(a, abs(w)) for a, w in zip(add, weights, strict=True) if a * vote > 0]
            if agree:
                total = sum(a for a, _ in agree)
                found[i, j] = total / sum(w for _, w in agree) if normalize else total
    return found


def drawn(shape: tuple[int, int], count: int, height: int) -> list[Tensor]:
    """The random numbers of each change: block by block of rows, one change after the other."""
    found: list[list[Tensor]] = [[] for _ in range(count)]
    for block, start in enumerate(range(0, shape[0], height)):
        generator = generator_for(0, "a weight", block)
        for one in found:
            one.append(torch.rand((min(height, shape[0] - start), shape[1]), generator=generator))
    return [torch.cat(one) for one in found]


@every_weights
@pytest.mark.parametrize("density", [0.001, 0.25, 0.5, 1])
def test_magnitude_is_the_sum_of_the_largest(weights: tuple[float, ...], density: float) -> None:
    deltas = [random(seed, 23, 17) for seed in range(3)]
    exact = sum((w * largest(d, density) for d, w in zip(deltas, weights, strict=True)), torch.zeros(23, 17).double())
    found = combined(DELTA_METHODS.get("magnitude"), deltas, weights, density=density)
    assert_near(found, exact)
    assert torch.equal(found != 0, exact != 0)
    assert_equal(combined(DELTA_METHODS.get("magnitude"), deltas, weights, density=density, dtype=torch.float64), exact)


def test_all_values_that_equal_the_smallest_kept_are_kept() -> None:
    delta = torch.tensor([[1.0, -2.0, 2.0, 0.5], [2.0, 3.0, -0.1, 2.0]])
    found = combined(DELTA_METHODS.get("magnitude"), [delta], [1.0], density=0.25)
    assert found.tolist() == [[0.0, -2.0, 2.0, 0.0], [2.0, 3.0, 0.0, 2.0]]


@every_weights
@pytest.mark.parametrize("count_votes", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("density", [0.2, 0.6, 1])
def test_ties_is_what_the_paper_says(
    weights: tuple[float, ...], count_votes: bool, normalize: bool, density: float
) -> None:
    deltas = [random(seed, 23, 17) for seed in range(3)]
    exact = elected([largest(d, density) for d in deltas], weights, count_votes, normalize)
    settings = {"density": density, "count_votes": count_votes, "normalize": normalize}
    assert_near(combined(DELTA_METHODS.get("ties"), deltas, weights, **settings), exact)
    assert_equal(combined(DELTA_METHODS.get("ties"), deltas, weights, dtype=torch.float64, **settings), exact)


def test_a_change_under_a_negative_weight_votes_as_what_it_would_add() -> None:
    a, b = torch.tensor([[4.0, 1.0, 2.0]]), torch.tensor([[-2.0, 8.0, -4.0]])
    found = combined(DELTA_METHODS.get("ties"), [a, b], [1.0, -0.5], density=1)
    # What they would add: 4 and 1, 1 and -4, 2 and 2; in the mean |w| is 1 and 0.5.
    assert found[0].tolist() == pytest.approx([5 / 1.5, -4 / 0.5, 4 / 1.5])
    same = combined(DELTA_METHODS.get("ties"), [a, -b], [1.0, 0.5], density=1)
    assert same_bits(found, same)


def test_a_tie_of_votes_leaves_nothing() -> None:
    a, b = torch.tensor([[4.0, 1.0]]), torch.tensor([[-1.0, 3.0]])
    assert combined(DELTA_METHODS.get("ties"), [a, b], [1.0, 1.0], density=1, count_votes=True).tolist() == [[0.0, 2.0]]
    assert combined(DELTA_METHODS.get("ties"), [a, -a], [1.0, 1.0], density=1).tolist() == [[0.0, 0.0]]


@every_weights
def test_what_chance_keeps_is_combined_as_the_papers_say(
    weights: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BAND_VALUES", 100)
    deltas = [random(seed, 23, 17) for seed in range(3)]
    numbers = drawn((23, 17), 3, 5)
    thin = [torch.where(u < 0.4, d / 0.4, 0.0) for d, u in zip(deltas, numbers, strict=True)]
    exact = sum((w * d for d, w in zip(thin, weights, strict=True)), torch.zeros(23, 17).double())
    assert_near(combined(DELTA_METHODS.get("dare"), deltas, weights, density=0.4), exact)
    ranks = [d.abs().argsort(1).argsort(1).double() for d in deltas]
    chances = [0.4 - 0.1 + 2 * 0.1 * r / 16 for r in ranks]
    ranked = [torch.where(u < p, d / p, 0.0) for d, u, p in zip(deltas, numbers, chances, strict=True)]
    for count_votes in (False, True):
        for normalize in (False, True):
            settings = {"density": 0.4, "count_votes": count_votes, "normalize": normalize}
            found = combined(DELTA_METHODS.get("dare_ties"), deltas, weights, **settings)
            assert_near(found, elected(thin, weights, count_votes, normalize))
            found = combined(DELTA_METHODS.get("della"), deltas, weights, epsilon=0.1, **settings)
            assert_near(found, elected(ranked, weights, count_votes, normalize))


# ------------------------------------------------------------------------------------------------ formulas, linear


def test_the_sum_is_the_sum() -> None:
    assert DELTA_METHODS.get("sum").coefficients([[1.0, 5.0], [5.0, 2.0]], (0.5, -3.0), {}) == [0.5, -3.0]


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("mix", [0.0, 0.7, -0.7, 0.999999, 1e-9 - 1])
def test_slerp_turns_and_grows_evenly(t: float, mix: float) -> None:
    a, noise = random(1, 8, 9), random(2, 8, 9)
    noise -= a * (a * noise).sum() / (a * a).sum()
    b = 3 * (mix * a / a.norm() + math.sqrt(1 - mix * mix) * noise / noise.norm())
    if mix + 1 < 1e-6:
        with pytest.raises(MismatchError):
            combined(DELTA_METHODS.get("slerp"), [a, b], [1 - t, t])
        return
    angle = math.acos(mix)
    direction = math.cos(t * angle) * a / a.norm() + math.sin(t * angle) * noise / noise.norm()
    exact = direction * ((1 - t) * a.norm() + t * 3)
    # Weights are shares: five times as much is the same.
    found = combined(DELTA_METHODS.get("slerp"), [a, b], [5 * (1 - t), 5 * t])
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


def test_slerp_of_one_direction_is_a_length_between() -> None:
    a = random(1, 4, 4)
    assert_equal(combined(DELTA_METHODS.get("slerp"), [a, 3 * a], [1.0, 3.0]), 2.5 * a)


def test_slerp_with_a_change_that_is_zero_keeps_the_others_direction() -> None:
    a, zero = random(1, 4, 4), torch.zeros(4, 4).double()
    assert_equal(combined(DELTA_METHODS.get("slerp"), [a, zero], [1.0, 3.0]), 0.25 * a)
    assert_equal(combined(DELTA_METHODS.get("slerp"), [zero, a], [1.0, 3.0]), 0.75 * a)


def test_slerp_refuses_opposite_directions() -> None:
    with pytest.raises(MismatchError) as caught:
        DELTA_METHODS.get("slerp").coefficients([[4.0, -2.0], [-2.0, 1.0]], (1.0, 1.0), {})
    what = "two changes point in opposite directions, and no arc between them is shorter than the others"
    assert str(caught.value) == f"slerp: {what}"
    assert caught.value.hint == "leave this one out, or combine by sum"


@every_weights
def test_orthogonal_adds_what_is_new(weights: tuple[float, ...]) -> None:
    deltas = [random(seed, 7, 9) for seed in range(3)]
    deltas[2] += 3 * deltas[0] - deltas[1]
    q, r = torch.linalg.qr(torch.stack([d.flatten() for d in deltas], 1))
    new = [(q[:, i] * r[i, i]).reshape(7, 9) for i in range(3)]
    exact = sum((w * d for d, w in zip(new, weights, strict=True)), torch.zeros(7, 9).double())
    torch.testing.assert_close(combined(DELTA_METHODS.get("orthogonal"), deltas, weights), exact, rtol=1e-9, atol=1e-9)
    near = [deltas[0], deltas[0] + 1e-4 * deltas[1], deltas[2]]
    for three in (deltas, near):
        new = [combined(DELTA_METHODS.get("orthogonal"), three, [float(i == j) for j in range(3)]) for i in range(3)]
        assert all(abs(cosine(new[i], new[j])) < 1e-6 for i in range(3) for j in range(i))


def test_of_a_change_that_is_no_news_orthogonal_leaves_nothing() -> None:
    a, b = random(1, 5, 5), random(2, 5, 5)
    method, table = DELTA_METHODS.get("orthogonal"), gram([a, 2 * a, b, (0.3 * a - 0.7 * b).float()])
    first, second, third, fourth = method.coefficients(table, (1.0, 5.0, 1.0, 7.0), {})
    assert (second, fourth) == (0.0, 0.0), "what rounding to float32 makes new is none"
    exact = a + b - a * (a * b).sum() / (a * a).sum()
    assert_equal(first * a + third * b, exact)


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("name", "given", "weights", "message"),
    [
        ("ties", {"density": "0"}, (1, 1), "ties, density: found '0', expected a number above 0 and at most 1"),
        ("dare", {"density": 1.5}, (1, 1), "dare, density: found 1.5, expected a number above 0 and at most 1"),
        ("della", {"density": "x"}, (1, 1), "della, density: found 'x', expected a number above 0 and at most 1"),
        ("ties", {"normalize": "2"}, (1, 1), "ties, normalize: found '2', expected true or false"),
        ("sum", {"density": 1}, (1, 1), "--set: sum has no parameter 'density'"),
        ("della", {"epsilon": -0.1}, (1,), "della, epsilon: found -0.1, expected 0 or more"),
        ("della", {"density": 0.9}, (1,),
         "della, epsilon: found 0.15 with a density of 0.9, expected less than 0.9 and at most 0.1"),
        ("della", {"density": 0.15}, (1,),
         "della, epsilon: found 0.15 with a density of 0.15, expected less than 0.15 and at most 0.85"),
        ("slerp", {}, (1, 1, 1), "slerp: found 3 to combine, expected 2"),
        ("slerp", {}, (1, -0.5), "slerp, weights: found -0.5, expected none below 0"),
        ("slerp", {}, (0, 0), "slerp, weights: found 0 for both, expected one above 0"),
    ],
)  # fmt: skip
def test_senseless_settings_are_refused(
    name: str, given: dict[str, Any], weights: tuple[float, ...], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        DELTA_METHODS.get(name).check(given, weights)
    assert str(caught.value) == message


def test_settings_come_as_words_or_as_values() -> None:
    values = DELTA_METHODS.get("ties").check({"density": "0.4", "normalize": "no"}, (1, 2, 3))
    assert values == {"density": 0.4, "count_votes": False, "normalize": False}
    for density, epsilon in [(0.85, 0.15), (0.66, 0.34), (1, 0.15), (0.3, 0.2)]:
        DELTA_METHODS.get("della").check({"density": density, "epsilon": epsilon}, (1, 2))


def test_an_unknown_way_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError) as caught:
        DELTA_METHODS.get("tise")
    assert str(caught.value) == "unknown way to combine 'tise'"
    assert caught.value.hint == "did you mean 'ties'?"


@pytest.mark.cuda
@every_elementwise
def test_a_gpu_gives_the_same(method: DeltaMethod) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    deltas, weights = [random(seed, 300, 40) for seed in range(3)], [1.0, -0.7, 0.4]
    out = torch.full((300, 40), math.nan, device="cuda")
    there = [Dense(d.float().cuda()) for d in deltas]
    method.fill(there, out, weights=weights, settings=method.check({}, weights), random=seeded(0))
    assert_near(out.cpu(), combined(method, deltas, weights).double())
    on_device = {block: generator_for(0, "a weight", block, "cuda") for block in range(2)}
    method.fill(there, out, weights=weights, settings=method.check({}, weights), random=on_device.__getitem__)
    assert out.isfinite().all()
