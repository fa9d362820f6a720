"""How many singular values a rule keeps: sd-scripts' definitions, bounds, and the optimum over many matrices."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightops.errors import UsageError
from weightops.lora.rank import KINDS, RankRule, Spectrum, allocate, ranks_for

torch.set_num_threads(1)

spectra_of_one = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12).map(lambda v: sorted(v, reverse=True))
shares = st.floats(0.01, 1.0)


def energy(values: list[float]) -> float:
    return math.fsum(v * v for v in values)


def choose(text: str, values: list[float], cap: int | None = None) -> int:
    return RankRule.parse(text, cap=cap).choose(values, 64, 64, energy(values))


# ------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("32", "rank", 32),
        (" 0 ", "rank", 0),
        ("energy:0.98", "energy", 0.98),
        ("error:0.02", "error", 0.02),
        ("size:32MiB", "size", 32 << 20),
        ("size:1.5 GB", "size", 1_500_000_000),
        ("size:1000", "size", 1000),
        ("ratio:10", "ratio", 10),
        ("cumulative:0.95", "cumulative", 0.95),
        ("fro:.99", "fro", 0.99),
        ("knee", "knee", 1),
    ],
)
def test_a_rule_is_read_as_it_is_written(text: str, kind: str, value: float) -> None:
    assert RankRule.parse(text) == RankRule(kind, value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("energy:1.5", "energy:E with 0 < E <= 1, the share of the squared norm"),
        ("energy:0", "energy:E with 0 < E <= 1, the share of the squared norm"),
        ("energy", "energy:E with 0 < E <= 1, the share of the squared norm"),
        ("error:nan", "error:E with 0 < E <= 1, relative to the norm"),
        ("fro:x", "fro:T with 0 < T <= 1, the share of the norm"),
        ("ratio:1", "ratio:T with T > 1, of the largest singular value to the smallest"),
        ("ratio:inf", "ratio:T with T > 1, of the largest singular value to the smallest"),
        ("size:0", "size:BYTES such as size:32MiB, for the whole file"),
        ("size:-3MiB", "size:BYTES such as size:32MiB, for the whole file"),
        ("size:3MiBs", "size:BYTES such as size:32MiB, for the whole file"),
        ("knee:2", "knee"),
        ("knee:", "knee"),
    ],
)
def test_a_setting_out_of_its_bounds_is_refused(text: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        RankRule.parse(text)
    assert str(caught.value) == f"--rank: found {text!r}, expected {expected}"
    assert caught.value.hint is None


@pytest.mark.parametrize("text", ["enrgy:0.9", "-1", "3.5", "", "rank:4", "1e3", "9999999"])
def test_an_unknown_rule_is_refused_with_all_there_are(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        RankRule.parse(text, where="--conv-rank")
    known = ", ".join(kind.written for kind in KINDS.values())
    assert str(caught.value) == f"--conv-rank: found {text!r}, expected {known}"
    near = {"enrgy:0.9": "did you mean 'energy'?", "rank:4": "did you mean 'rank'?"}
    assert caught.value.hint == near.get(text)


# ------------------------------------------------------------------------------------------------ one matrix


@given(spectra_of_one, shares)
@settings(deadline=None)
def test_dynamic_methods_are_those_of_sd_scripts(values: list[float], t: float) -> None:
    """index_sv_* of v0.11, plus one."""
    s = torch.tensor(values, dtype=torch.float64)

    def kohya(sums: torch.Tensor, wanted: float) -> int:
        index = int(torch.searchsorted(torch.cumsum(sums, 0) / float(sums.sum()), wanted))
        return max(0, min(index, len(s) - 1)) + 1

    near = 1e-12  # sums in another order
    assert (
        kohya(s, t * (1 - near))
        <= RankRule("cumulative", t).choose(values, 64, 64, energy(values))
        <= kohya(s, t * (1 + near))
    )
    found = RankRule("fro", t).choose(values, 64, 64, energy(values))
    assert kohya(s.square(), t * t * (1 - near)) <= found <= kohya(s.square(), t * t * (1 + near))
    ratio = 1 + 20 * t
    found = RankRule("ratio", ratio).choose(values, 64, 64, energy(values))
    assert found == max(int((s > s[0] / ratio).sum()), 1)


def test_known_spectra_have_known_ranks() -> None:
    values = [10.0, 5.0, 2.0, 1.0, 0.5]
    assert choose("3", values) == 3
    assert choose("ratio:10", values) == 3  # 1 is not above 10/10
    assert choose("cumulative:0.81", values) == 2  # 15/18.5 = 0.8108
    assert choose("cumulative:0.82", values) == 3
    assert choose("energy:0.95", values) == 2  # 125/130.25 = 0.9597
    assert choose("fro:0.97", values) == 2  # √0.9597 = 0.9796
    assert choose("fro:0.98", values) == 3
    assert choose("error:0.1", values) == 3  # √(1.25/130.25) = 0.098


def test_the_knee_is_the_value_farthest_below_the_chord() -> None:
    assert choose("knee", [10.0, 9.0, 1.0, 0.8, 0.6, 0.4]) == 3
    assert choose("knee", [1.0, 1.0, 1.0]) == 1
    assert choose("knee", [2.0, 1.0]) == 1


@given(spectra_of_one, shares, shares)
def test_asking_for_more_keeps_no_less(values: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    total = energy(values)
    for kind in ("energy", "cumulative", "fro"):
        assert RankRule(kind, low).choose(values, 64, 64, total) <= RankRule(kind, high).choose(values, 64, 64, total)
    assert RankRule("error", low).choose(values, 64, 64, total) >= RankRule("error", high).choose(values, 64, 64, total)


@given(spectra_of_one, shares)
def test_the_rank_is_the_smallest_that_does(values: list[float], t: float) -> None:
    total = energy(values)
    rank = RankRule("energy", t).choose(values, 64, 64, total)
    assert energy(values[: rank - 1]) < t * total * (1 + 1e-12)
    assert energy(values[:rank]) >= t * total * (1 - 1e-12)
    rank = RankRule("error", t).choose(values, 64, 64, total)
    assert math.sqrt(max(total - energy(values[:rank]), 0) / total) <= t + 1e-7


@given(spectra_of_one, st.integers(0, 20), st.integers(1, 20), st.integers(1, 20), st.integers(0, 4))
def test_no_rank_is_above_its_bounds(values: list[float], cap: int, out: int, n: int, zeros: int) -> None:
    rules = {"rank": 9, "energy": 0.99, "error": 0.01, "ratio": 50, "cumulative": 1, "fro": 1, "knee": 1}
    for kind, setting in rules.items():
        rule = RankRule(kind, setting, cap)
        rank = rule.choose([*values, *[0.0] * zeros], out, n, energy(values))
        assert 0 <= rank <= min(cap, out, n, len(values), rule.most(out, n))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "size"])
def test_a_matrix_of_zeros_has_rank_zero(kind: str) -> None:
    assert RankRule(kind, 1).choose([0.0, 0.0], 64, 64, 0.0) == 0
    assert RankRule(kind, 1).choose([], 64, 64, 0.0) == 0


def test_the_largest_values_are_enough_where_the_rule_says_so() -> None:
    values = [1.0 / (i + 1) for i in range(40)]
    for text in ("8", "energy:0.9", "error:0.5", "ratio:5", "fro:0.9"):
        rule = RankRule.parse(text, cap=10)
        assert not rule.needs_all
        assert rule.choose(values[: rule.most(64, 64)], 64, 64, energy(values)) == rule.choose(
            values, 64, 64, energy(values)
        )
    assert RankRule.parse("cumulative:0.9", cap=10).needs_all
    assert RankRule.parse("knee", cap=10).needs_all
    assert RankRule.parse("energy:0.9").needs_all
    assert not RankRule.parse("32").needs_all


def test_a_rule_for_many_is_not_one_for_one() -> None:
    with pytest.raises(ValueError, match="size is for many matrices: allocate"):
        choose("size:1KB", [1.0])
    with pytest.raises(ValueError, match=r"energy is for one matrix: RankRule\.choose"):
        allocate(RankRule.parse("energy:0.9"), [])


# ------------------------------------------------------------------------------------------------ many matrices


@st.composite
def several(draw: st.DrawFn) -> list[Spectrum]:
    found = []
    for _ in range(draw(st.integers(1, 3))):
        values = sorted(draw(st.lists(st.floats(0.01, 10), max_size=4)), reverse=True)
        found.append(
            Spectrum(values, energy(values), draw(st.integers(1, 9)), draw(st.sampled_from([1.0, 1.0, 0.3, 4.0])))
        )
    return found


def gain(spectra: list[Spectrum], ranks: tuple[int, ...] | list[int]) -> float:
    return math.fsum(s.gain(r) for s, r in zip(spectra, ranks, strict=True))


def cost(spectra: list[Spectrum], ranks: tuple[int, ...] | list[int]) -> int:
    return sum(s.nbytes * r for s, r in zip(spectra, ranks, strict=True))


def every(spectra: list[Spectrum]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(s.values) + 1) for s in spectra)))


@given(several(), st.integers(1, 80))
def test_a_size_is_filled_to_the_optimum_less_one_rank(spectra: list[Spectrum], nbytes: int) -> None:
    ranks = allocate(RankRule("size", nbytes), spectra)
    assert cost(spectra, ranks) <= nbytes
    best = max(gain(spectra, r) for r in every(spectra) if cost(spectra, r) <= nbytes)
    largest = max((s.gain(1) for s in spectra), default=0)
    assert gain(spectra, ranks) >= best - largest - 1e-9
    uniform = [[min(r, len(s.values)) for s in spectra] for r in range(5)]
    assert gain(spectra, ranks) >= max(gain(spectra, r) for r in uniform if cost(spectra, r) <= nbytes) - 1e-9


@given(several(), st.integers(1, 80), st.integers(1, 80))
def test_more_bytes_keep_no_less_energy(spectra: list[Spectrum], one: int, other: int) -> None:
    low, high = sorted((one, other))
    kept = [gain(spectra, allocate(RankRule("size", nbytes), spectra)) for nbytes in (low, high)]
    assert kept[0] <= kept[1] + 1e-9


@given(several(), shares)
def test_an_error_is_met_with_the_fewest_bytes_and_one_rank(spectra: list[Spectrum], limit: float) -> None:
    ranks = allocate(RankRule("error", limit), spectra)
    total = math.fsum(s.weight * s.energy for s in spectra)
    needed = (1 - limit * limit) * total
    assert gain(spectra, ranks) >= needed - 1e-9 * total
    fewest = min(cost(spectra, r) for r in every(spectra) if gain(spectra, r) >= needed - 1e-9 * total)
    assert cost(spectra, ranks) <= fewest + max(s.nbytes for s in spectra)


def test_bytes_go_where_they_keep_the_most() -> None:
    steep, flat = Spectrum([8.0, 1.0], 65.0, 10), Spectrum([3.0, 3.0, 3.0], 27.0, 10)
    assert allocate(RankRule.parse("size:30B"), [steep, flat]) == [1, 2]
    assert allocate(RankRule.parse("size:30B"), [Spectrum([8.0, 1.0], 65.0, 10, weight=0.1), flat]) == [0, 3]
    assert allocate(RankRule.parse("size:9B"), [steep, flat]) == [0, 0]
    assert allocate(RankRule.parse("size:1MB", cap=1), [steep, flat]) == [1, 1]


def test_a_rank_for_all_is_kept_where_it_keeps_more() -> None:
    """By energy per byte both ranks of the first come first, and leave no room for the second."""
    spectra = [Spectrum([2.0, 1.9], 7.61, 1), Spectrum([5.0], 25.0, 10)]
    assert allocate(RankRule.parse("size:11B"), spectra) == [1, 1]


def test_an_error_out_of_reach_gets_all_there_is() -> None:
    spectra = [Spectrum([2.0, 1.0], 9.0, 4), Spectrum([1.0], 3.0, 2), Spectrum([1.0], 1.0, 2, weight=0.0)]
    assert allocate(RankRule.parse("error:0.01"), spectra) == [2, 1, 0]
    assert allocate(RankRule.parse("error:1"), spectra) == [0, 0, 0]
    assert allocate(RankRule.parse("error:0.5"), []) == []
    assert allocate(RankRule.parse("size:1MB"), []) == []


def test_what_one_rank_for_all_leaves_over_is_filled() -> None:
    """One rank of each keeps more than the ranks that tell most per byte, and seven bytes are left for two more."""
    spectra = [Spectrum([2.0, 1.9, 1.8], 10.85, 3), Spectrum([5.0], 25.0, 30)]
    assert allocate(RankRule.parse("size:40B"), spectra) == [3, 1]


# ------------------------------------------------------------------------------------------------ a file


def file_of(spectra: list[Spectrum], ranks: list[int] | tuple[int, ...]) -> int:
    """Bytes with a header that has an entry for each module, and offsets in decimal."""
    entries = [f"{s.nbytes * r:,}" for s, r in zip(spectra, ranks, strict=True) if r]
    return 8 * math.ceil(sum(40 + len(entry) for entry in entries) / 8) + cost(spectra, ranks)


@given(several(), st.integers(1, 600))
@settings(deadline=None)
def test_a_file_of_a_size_keeps_more_than_with_any_one_rank_and_has_no_room_left(
    spectra: list[Spectrum], limit: int
) -> None:
    spectra = [Spectrum(s.values, s.energy, 7 * s.nbytes, s.weight) for s in spectra]
    rules, sizes = [RankRule("size", limit)] * len(spectra), [(64, 64)] * len(spectra)
    ranks = ranks_for(rules, spectra, sizes, lambda ranks: file_of(spectra, ranks))
    assert not any(ranks) or file_of(spectra, ranks) <= limit
    for rank in range(1, 5):
        same = [min(rank, len(s.values)) for s in spectra]
        if file_of(spectra, same) <= limit:
            assert gain(spectra, ranks) >= gain(spectra, same) - 1e-9
    for number, spectrum in enumerate(spectra):
        if ranks[number] < len(spectrum.values):
            more = [rank + (n == number) for n, rank in enumerate(ranks)]
            assert file_of(spectra, more) > limit - 60  # an entry of the header


@given(several(), st.integers(1, 6000))
@settings(deadline=None)
def test_a_file_of_a_size_is_near_the_best_there_is(spectra: list[Spectrum], limit: int) -> None:
    """Brute force: less than what one more rank holds. A rank takes more bytes than its module in the header."""
    spectra = [Spectrum(s.values, s.energy, 100 * s.nbytes, s.weight) for s in spectra]
    rules, sizes = [RankRule("size", limit)] * len(spectra), [(64, 64)] * len(spectra)
    ranks = ranks_for(rules, spectra, sizes, lambda ranks: file_of(spectra, ranks))
    best = max(gain(spectra, r) for r in every(spectra) if not any(r) or file_of(spectra, r) <= limit)
    assert gain(spectra, ranks) >= best - max((s.gain(1) for s in spectra), default=0) - 1e-9
