"""Factorisations against the optimum, over spectra of every kind; the noise that rounding makes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from test_lowrank import DOUBLE, distance, random, seeded, tail, whole, with_values

from weightops.errors import ValueRefused
from weightops.lora import factorise as module
from weightops.lora.factorise import TOLERANCE, factorise, factorise_many, noise_floor
from weightops.lora.lowrank import LowRank, truncate
from weightops.lora.rank import RankRule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

torch.set_num_threads(1)

K = 8
N = 160
INDEX = torch.arange(1, N + 1, dtype=DOUBLE)
SPECTRA = {
    "power 0.1": INDEX**-0.1,
    "power 0.25": INDEX**-0.25,
    "power 0.5": INDEX**-0.5,
    "power 1": INDEX**-1,
    "power 2": INDEX**-2,
    "power 3": INDEX**-3,
    "noise": torch.linalg.svdvals(random(N, 200)),
    "orthogonal": torch.ones(N, dtype=DOUBLE),
    "step, 1e-3": torch.where(INDEX <= K, 1.0, 1e-3),
    "step, 1e-6": torch.where(INDEX <= K, 1.0, 1e-6),
    "step past k, 0.5": torch.where(INDEX <= K + 3, 1.0, 0.5),
    "plateau": torch.where(INDEX <= 4 * K, 1.0, 0.1),
    "exponential": torch.exp(-0.5 * INDEX) + 1e-6,
    "outlier": torch.where(INDEX == 1, 1e5, torch.linalg.svdvals(random(N, 200))),
    "exact rank": torch.where(INDEX <= K, INDEX**-1, 0.0),
}
every_spectrum = pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA.keys())


@every_spectrum
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["F32", "BF16"])
def test_a_randomised_factorisation_is_within_its_tolerance(values: Tensor, dtype: torch.dtype) -> None:
    for out, n in [(N, 200), (200, N)]:
        matrix = with_values(values, out, n).to(dtype)
        found = factorise(matrix, K, generator=seeded(), method="randomised")
        size = float(matrix.double().norm())
        best = tail(matrix, K)
        # What factors in float32 cannot hold comes on top: 2e-7 of the norm.
        assert distance(matrix, found.lowrank) <= (1 + TOLERANCE) * best + 2e-7 * size
        assert math.isclose(
            found.error * found.norm, distance(matrix, found.lowrank), rel_tol=0.01, abs_tol=5e-7 * size
        )
        assert math.isclose(found.norm, size, rel_tol=1e-9)
        assert math.isclose(found.energy, 1 - found.error**2, abs_tol=1e-9)


@every_spectrum
@pytest.mark.parametrize("shape", [(N, 200), (200, N), (N, N)], ids=str)
def test_an_exact_factorisation_is_the_optimum(values: Tensor, shape: tuple[int, int]) -> None:
    matrix = with_values(values, *shape).float()
    found = factorise(matrix, K, generator=seeded(), method="exact")
    assert (found.method, found.iterations) == ("exact", 0)
    best = tail(matrix, K)
    assert distance(matrix, found.lowrank) <= (1 + 1e-6) * best + 2e-7 * float(matrix.double().norm())
    kept = torch.linalg.svdvals(matrix.double())[: found.lowrank.rank]
    torch.testing.assert_close(
        torch.tensor(found.singular_values, dtype=DOUBLE), kept, rtol=1e-6, atol=1e-7 * float(kept[0])
    )


def test_both_methods_find_the_same_factors() -> None:
    matrix = with_values(0.5**INDEX + 1e-4, N, 200).float()
    exact, quick = (factorise(matrix, 6, generator=seeded(), method=m) for m in ("exact", "randomised"))
    assert (exact.method, quick.method) == ("exact", "randomised")
    torch.testing.assert_close(exact.lowrank.up, quick.lowrank.up, rtol=0, atol=1e-4)
    torch.testing.assert_close(exact.lowrank.down, quick.lowrank.down, rtol=0, atol=1e-4)
    for found in (exact, quick):
        up, down = found.lowrank.up.double(), found.lowrank.down.double()
        torch.testing.assert_close(up.mT @ up, down @ down.mT, rtol=1e-4, atol=1e-5)
        assert all(row[row.abs().argmax()] > 0 for row in down)


def test_a_matrix_of_float64_is_kept_in_float64() -> None:
    matrix = with_values(10.0 ** (1 - INDEX[:10]), 30, 40)
    found = factorise(matrix, 10, generator=seeded())
    assert found.lowrank.up.dtype is DOUBLE
    expected = 10.0 ** (1 - INDEX[:10])
    torch.testing.assert_close(torch.tensor(found.singular_values, dtype=DOUBLE), expected, rtol=1e-5, atol=0)
    matrix = with_values(10.0 ** (1 - INDEX[:10]), N, 200)
    assert distance(matrix, factorise(matrix, 8, generator=seeded(), method="randomised").lowrank) <= 2e-7


def test_auto_takes_the_quick_way_where_it_is_quick() -> None:
    large, small = with_values(INDEX**-1, N, 200).float(), with_values(INDEX[:60] ** -1, 60, 200).float()
    methods = {
        (name, text): factorise(matrix, RankRule.parse(text, cap=cap), generator=seeded()).method
        for name, matrix in (("large", large), ("small", small))
        for text, cap in (("8", None), ("energy:0.9", 8), ("energy:0.9", None), ("knee", 8))
        if (name, text, cap) != ("large", "energy:0.9", None)
    }
    assert methods == {
        ("large", "8"): "randomised",
        ("large", "energy:0.9"): "randomised",
        ("large", "knee"): "exact",
        ("small", "8"): "exact",
        ("small", "energy:0.9"): "exact",
        ("small", "knee"): "exact",
    }
    assert factorise(large, RankRule.parse("energy:0.9"), generator=seeded()).method == "exact"


def test_what_does_not_converge_is_factorised_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ITERATIONS", 1)
    matrix = with_values(INDEX**-0.3, N, 200).float()
    found = factorise(matrix, K, generator=seeded())
    assert found.method == "exact"
    assert distance(matrix, found.lowrank) <= tail(matrix, K) * (1 + 1e-6)


def test_the_rules_see_the_energy_of_the_whole() -> None:
    matrix = with_values(INDEX**-1, N, 200).float()
    for text in ("energy:0.8", "error:0.45", "fro:0.9", "ratio:3.5", "5"):
        rule = RankRule.parse(text, cap=16)
        found = factorise(matrix, rule, generator=seeded(), method="randomised")
        exact = torch.linalg.svdvals(matrix.double()).tolist()
        assert found.lowrank.rank == rule.choose(exact, N, 200, float(matrix.double().square().sum()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    matrix = torch.zeros(80, 90)
    matrix[3, 4] = bad
    with pytest.raises(ValueRefused, match="the matrix holds NaN or Inf"):
        factorise(matrix, 2, generator=seeded())


@pytest.mark.parametrize("method", ["auto", "exact", "randomised"])
def test_a_matrix_of_zeros_has_no_ranks(method: str) -> None:
    found = factorise(torch.zeros(N, 200), K, generator=seeded(), method=method)
    assert (found.lowrank.rank, found.lowrank.shape, found.energy, found.error) == (0, (N, 200), 1.0, 0.0)
    assert factorise(torch.ones(N, 200), 0, generator=seeded(), method=method).lowrank.rank == 0


def test_values_below_the_rounding_of_float32_count_as_zero() -> None:
    matrix = torch.zeros(N, 200)
    matrix[0, 0], matrix[1, 1], matrix[2, 2] = 1.0, 1e-3, 1e-9
    for method in ("exact", "randomised"):
        found = factorise(matrix, K, generator=seeded(), method=method)
        assert found.lowrank.rank == 2
        torch.testing.assert_close(torch.tensor(found.singular_values), torch.tensor([1.0, 1e-3]), rtol=1e-5, atol=0)


def test_the_same_seed_gives_the_same_bytes() -> None:
    matrix = with_values(INDEX**-0.5, N, 200).float()
    one, other = (factorise(matrix, K, generator=seeded(3)).lowrank for _ in range(2))
    assert torch.equal(one.up, other.up)
    assert torch.equal(one.down, other.down)


def test_the_layout_of_a_matrix_does_not_matter() -> None:
    matrix = with_values(INDEX**-0.5, 200, N).float()
    one = factorise(matrix, K, generator=seeded()).lowrank
    other = factorise(matrix.mT.contiguous().mT, K, generator=seeded()).lowrank
    torch.testing.assert_close(whole(one), whole(other), rtol=0, atol=1e-4)


def test_many_are_factorised_as_each() -> None:
    matrices = [with_values(INDEX**-power, N, 200, seed=7).float() for power in (0.3, 1.0, 2.0)]
    generators = [seeded(i) for i in range(3)]
    found = factorise_many(matrices, K, generators=generators)
    for i, (one, matrix) in enumerate(zip(found, matrices, strict=True)):
        assert torch.equal(one.lowrank.up, factorise(matrix, K, generator=seeded(i)).lowrank.up)


@pytest.mark.parametrize("method", ["exact", "randomised"])
@pytest.mark.parametrize("shape", [(N, 200), (200, N)], ids=str)
def test_a_stack_is_factorised_to_the_tolerance_of_each(method: str, shape: tuple[int, int]) -> None:
    """As on a CUDA device, where equal shapes are done together; one of them needs float64, one has nothing."""
    matrices = [with_values(INDEX**-power, *shape, seed=7).float() for power in (0.3, 1.0, 4.0)] + [torch.zeros(shape)]
    generators = [seeded(i) for i in range(4)]
    found = module._factorise(torch.stack(matrices), RankRule("rank", K), generators, method)
    assert [f.lowrank.rank for f in found] == [K, K, K, 0]
    for one, matrix in zip(found[:3], matrices, strict=False):
        assert distance(matrix, one.lowrank) <= (1 + TOLERANCE) * tail(matrix, K) + 2e-7 * one.norm
        assert math.isclose(one.norm, float(matrix.double().norm()), rel_tol=1e-9)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_finds_what_the_cpu_does() -> None:
    matrices = [with_values(INDEX**-power, N, 200, seed=7).float() for power in (0.5, 1.0)]
    found = factorise_many([m.cuda() for m in matrices], K, generators=[seeded(i) for i in range(2)])
    for one, matrix in zip(found, matrices, strict=True):
        assert one.lowrank.up.is_cuda
        cpu = LowRank(one.lowrank.up.cpu(), one.lowrank.down.cpu())
        assert distance(matrix, cpu) <= (1 + TOLERANCE) * tail(matrix, K)
        again = truncate(one.lowrank, 4).lowrank
        expected = truncate(cpu, 4).lowrank
        torch.testing.assert_close(again.up.cpu(), expected.up, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ rounding


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16), (torch.float16,) * 2], ids=str
)
@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_the_noise_floor_is_that_of_two_roundings(dtypes: Sequence[torch.dtype], scale: float) -> None:
    base = random(300, 200) * scale
    other = base + random(300, 200, seed=1) * scale
    noise = sum((t.to(d).double() - t) * sign for t, d, sign in zip((base, other), dtypes, (-1, 1), strict=True))
    floor = noise_floor(base.to(dtypes[0]), other.to(dtypes[1]))
    assert math.isclose(floor.norm, float(noise.norm()), rel_tol=0.03)
    assert 0.98 <= floor.largest / float(torch.linalg.matrix_norm(noise, 2)) <= 1.2


def test_rows_of_larger_values_raise_the_noise_floor() -> None:
    base = random(300, 200)
    base[7] *= 64
    stored = base.bfloat16()
    noise = float(torch.linalg.matrix_norm(stored.double() - base, 2))
    even = noise_floor(stored, torch.zeros_like(stored))
    assert even.largest >= noise
    assert even.largest <= 1.5 * noise


def test_what_stands_above_the_noise_is_what_was_put_in() -> None:
    base = random(300, 200) * 0.02
    change = with_values(torch.tensor([1.0, 0.5, 0.2]), 300, 200)
    a, b = base.bfloat16(), (base + change).bfloat16()
    values = torch.linalg.svdvals(b.double() - a.double()).tolist()
    floor = noise_floor(a, b)
    assert floor.above(values) == 3
    assert values[3] <= floor.largest


def test_zeros_and_the_smallest_numbers_have_next_to_no_noise() -> None:
    zero = torch.zeros(4, 5, dtype=torch.float16)
    assert noise_floor(zero, zero).largest <= 2 * 2.0**-24
    smallest = torch.full((4, 5), 2.0**-24, dtype=torch.float16)
    # All subnormal numbers are 2⁻²⁴ apart.
    assert math.isclose(noise_floor(smallest, zero).norm, math.sqrt(2 * 20 / 12) * 2.0**-24, rel_tol=1e-6)
    assert noise_floor(torch.ones(4, 5), torch.ones(4, 5)).norm <= 1e-6
