"""How changes meet, against the full matrices in float64."""

from __future__ import annotations

import math

import pytest
import torch
from test_lowrank import DOUBLE, adapter, random, repeated, whole

from weightops.lora.lowrank import LowRank, add
from weightops.lora.overlap import gram, meeting, sign_conflicts

torch.set_num_threads(1)

PAIRS = [((24, 6, 40), 3), ((40, 3, 24), 6), ((20, 30, 60), 5), ((9, 12, 4), 2)]
every_pair = pytest.mark.parametrize(
    ("a", "b"), [(adapter(*shape), adapter(shape[0], rank, shape[2], seed=5)) for shape, rank in PAIRS],
    ids=[f"{shape} {rank}" for shape, rank in PAIRS],
)  # fmt: skip


def zero(like: LowRank) -> LowRank:
    return LowRank(like.up, like.down * 0)


# ------------------------------------------------------------------------------------------------ inner products


@every_pair
def test_inner_products_are_those_of_the_matrices(a: LowRank, b: LowRank) -> None:
    parts = [a, b, a.scale(-0.5), zero(a)]
    flat = torch.stack([whole(p).flatten() for p in parts])
    found = torch.tensor(gram(parts), dtype=DOUBLE)
    torch.testing.assert_close(found, flat @ flat.mT, rtol=1e-9, atol=1e-9)
    assert torch.equal(found, found.mT)


# ------------------------------------------------------------------------------------------------ angles


def principal_angles(a: LowRank, b: LowRank) -> tuple[float, ...]:
    return meeting([a, b]).angles[0, 1]


def between(angles: list[float], *, out: int = 60, n: int = 50, more: int = 2) -> tuple[LowRank, LowRank]:
    """Two changes, in float64, whose columns meet at these angles; the second has more ranks, at right angles."""
    count = len(angles)
    basis = torch.linalg.qr(random(out, 2 * count + more))[0]
    at = torch.tensor(angles, dtype=DOUBLE)
    turned = basis[:, :count] * at.cos() + basis[:, count : 2 * count] * at.sin()
    one, other = basis[:, :count], torch.cat([turned, basis[:, 2 * count :]], 1)
    # Any factors of these columns: mixed, and of ranks that are there twice.
    mixed = [c @ random(c.shape[1], c.shape[1] + 3, seed=4) for c in (one, other)]
    return LowRank(mixed[0], random(count + 3, n, seed=7)), LowRank(mixed[1], random(count + more + 3, n, seed=8))


def test_angles_are_those_that_were_made() -> None:
    made = [0.0, 1e-3, 0.3, math.pi / 4, 1.0, 1.5, math.pi / 2 - 1e-7, math.pi / 2]
    a, b = between(made)
    for found in (principal_angles(a, b), principal_angles(b, a)):
        assert len(found) == len(made)
        assert max(abs(x - y) for x, y in zip(found, made, strict=True)) <= 1e-6


@every_pair
def test_angles_are_those_of_the_matrices(a: LowRank, b: LowRank) -> None:
    bases = []
    for matrix in (whole(a), whole(b)):
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        bases.append(left[:, values > 1e-4 * values[0]])
    expected = torch.linalg.svdvals(bases[0].mT @ bases[1]).clamp(0, 1).acos().tolist()
    assert principal_angles(a, b) == pytest.approx(expected, abs=1e-6)


def test_ranks_that_down_lacks_have_no_angle() -> None:
    a, b = adapter(24, 6, 40), adapter(24, 4, 40, seed=5)
    lacking = LowRank(a.up, a.down.clone())
    lacking.down[2:] = 1e-8 * a.down[:1]
    same = LowRank(a.up[:, :2], a.down[:2])
    assert principal_angles(lacking, b) == pytest.approx(principal_angles(same, b), abs=1e-6)
    assert len(principal_angles(repeated(adapter(24, 6, 40)), b)) == 3
    nothing = [zero(a), LowRank(torch.zeros(24, 0), torch.zeros(0, 40)), add(a, a.scale(-1))]
    assert [principal_angles(a, c) for c in nothing] == [principal_angles(c, a) for c in nothing] == [()] * 3


def test_a_change_meets_itself_at_no_angle() -> None:
    a = adapter(300, 16, 400, dtype=torch.float16)
    other = LowRank(a.up * -3, adapter(1, 16, 400, seed=9).down)
    assert max(principal_angles(a, a)) <= 1e-6
    assert max(principal_angles(a, other)) <= 1e-3  # F16 rounds what is tripled


# ------------------------------------------------------------------------------------------------ signs


@every_pair
@pytest.mark.parametrize("rows", [None, [0, 5, 3]], ids=str)
def test_signs_are_those_of_the_matrices(a: LowRank, b: LowRank, rows: list[int] | None) -> None:
    x, y = (whole(c) if rows is None else whole(c)[rows] for c in (a, b))
    smaller = torch.minimum(x.abs(), y.abs())
    found = sign_conflicts(a, b, rows)
    assert found.share == pytest.approx(float((x * y < 0).double().mean()), abs=1e-12)
    assert found.weighted == pytest.approx(float(smaller[x * y < 0].sum() / smaller.sum()), rel=1e-5)


def test_only_where_both_are_there_can_signs_conflict() -> None:
    one = torch.ones(4, 1)
    a, b = LowRank(one, torch.tensor([[1.0, 2, 3, 0, 5]])), LowRank(one, torch.tensor([[-3.0, 1, -1, -1, 0]]))
    found = sign_conflicts(a, b)
    assert found == pytest.approx((2 / 3, 2 / 3))
    assert sign_conflicts(a, a) == (0, 0)
    assert sign_conflicts(a, a.scale(-1)) == (1, 1)
    assert sign_conflicts(a, zero(b)) == sign_conflicts(a, b, []) == (0, 0)


def test_signs_do_not_depend_on_the_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = adapter(24, 6, 40, dtype=torch.float16), adapter(24, 3, 40, seed=5)
    expected = sign_conflicts(a, b)
    monkeypatch.setattr("weightops.lora.overlap.CHUNK", 100)
    assert sign_conflicts(a, b) == pytest.approx(expected, rel=1e-5)


def test_changes_of_two_shapes_do_not_meet() -> None:
    for meet in (principal_angles, sign_conflicts):
        with pytest.raises(ValueError, match=r"changes of 2 shapes: \[\(4, 5\), \(4, 6\)\]"):
            meet(adapter(4, 2, 5), adapter(4, 2, 6))


def test_a_meeting_has_the_inner_products_and_an_angle_for_every_two() -> None:
    parts = [adapter(24, 6, 40), adapter(24, 3, 40, seed=5), adapter(24, 2, 40, seed=6)]
    found = meeting(parts)
    assert found.gram == gram(parts)
    assert {pair: len(angles) for pair, angles in found.angles.items()} == {(0, 1): 3, (0, 2): 2, (1, 2): 2}
    assert found.angles[1, 2] == pytest.approx(principal_angles(parts[1], parts[2]), abs=1e-9)
