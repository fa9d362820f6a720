"""Streamed components against numpy's SVD, the plan, what an interruption leaves, and several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from shared_pca import Rows
from spaces import space_of

from weightops.errors import MemoryRefused
from weightops.synthesis.fit import fit_pca
from weightops.synthesis.fitted import load_fitted
from weightops.synthesis.pca import ROUTES, Pca, as_pca, plan_pca, principal
from weightops.synthesis.sweep import share

if TYPE_CHECKING:
    from weightops.synthesis.subspace import Found, Iterating

MIB = 1 << 20
# Of the sine of the largest angle to the SVD's subspace: what is asked for, and what float64 gives exactly.
SINE = {"gram": 1e-12, "covariance": 1e-12, "iteration": 1e-6}


def with_gap(n: int, d: int, k: int, gap: float = 0.6, seed: int = 0) -> torch.Tensor:
    """Rows with k large singular values, the next one `gap` times the least of these, and a mean."""
    draw = np.random.default_rng((seed, n, d))
    r = min(n, d)
    left, right = (np.linalg.qr(draw.standard_normal((size, r)))[0] for size in (n, d))
    sizes = np.concatenate([np.linspace(10, 5, k), np.linspace(5 * gap, 0.1, r - k)])
    return torch.from_numpy((left * sizes) @ right.T + 3 * draw.standard_normal(d)).float()


def by_svd(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, np.ndarray]:
    """The first k components, and all variances."""
    x = rows.double().numpy()
    _, sizes, axes = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return torch.from_numpy(axes[:k]), sizes**2 / (len(x) - 1)


def sine(found: torch.Tensor, known: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(found - (found @ known.mT) @ known, 2))


def components_of(rows: torch.Tensor, k: int, **words: Any) -> Found:
    return principal(Rows(rows), range(len(rows)), rows.shape[1], k, **words)[0]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("n", "d"), [(120, 300), (300, 120)], ids=["wide", "tall"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_subspace_is_that_of_the_svd(route: str, n: int, d: int, dtype: torch.dtype) -> None:
    rows = with_gap(n, d, 6).to(dtype)
    known, variances = by_svd(rows, 6)
    found = components_of(rows, 6, route=route, memory=4 * MIB)
    assert sine(found.basis, known) <= SINE[route]
    assert np.allclose(found.variances.numpy(), variances[:6], rtol=1e-10)
    assert found.total == pytest.approx(variances.sum(), rel=1e-10)
    assert torch.allclose(found.mean, rows.double().mean(0), atol=1e-12)
    assert torch.allclose(found.basis @ found.basis.mT, torch.eye(6, dtype=torch.float64), atol=1e-13)
    for row in found.basis:
        assert row[row.abs().argmax()] > 0


def test_what_is_reached_bounds_the_true_angle_and_passes_are_a_limit() -> None:
    rows = with_gap(400, 300, 8, gap=0.97)
    known, _ = by_svd(rows, 8)
    for passes in (3, 6, 12):
        found = components_of(rows, 8, route="iteration", passes=passes)
        assert found.passes == passes
        assert 1e-6 < sine(found.basis, known) <= found.reached
    loose = components_of(rows, 8, route="iteration", tolerance=1e-2, passes=50)
    assert 12 < loose.passes < 50
    assert sine(loose.basis, known) <= loose.reached <= 1e-2


def test_a_slow_spectrum_takes_fewer_passes_than_powers_alone_would() -> None:
    """λ falls by 10 % from the last component to the first one outside the subspace: ln 1e6 / ln(1/.9) = 131 passes."""
    draw = np.random.default_rng(5)
    n, d, k = 500, 200, 4
    width = k + k // 8 + 16
    left, right = (np.linalg.qr(draw.standard_normal((size, d)))[0] for size in (n, d))
    sizes = np.sqrt(np.concatenate([np.full(k, 1.0), np.full(width - k, 0.95), np.full(d - width, 0.9)]))
    rows = torch.from_numpy((left * sizes) @ right.T).float()
    found = components_of(rows, k, route="iteration", passes=80)
    assert found.reached <= 1e-6
    assert found.passes <= 50


@pytest.mark.parametrize("route", ROUTES)
def test_blocks_do_not_change_the_result(route: str) -> None:
    rows = with_gap(150, 200, 5)
    few, many = (components_of(rows, 5, route=route, memory=memory) for memory in (3 * MIB, 300 * MIB))
    assert float((few.basis - many.basis).abs().max()) < 1e-10
    assert few.passes == many.passes


def test_the_same_seed_gives_the_same_bits_and_another_the_same_subspace() -> None:
    rows = with_gap(150, 200, 5)
    one, same, other = (components_of(rows, 5, route="iteration", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.basis, same.basis)
    assert not torch.equal(one.basis, other.basis)
    assert sine(one.basis, other.basis) < 2e-6


@pytest.mark.parametrize("route", ROUTES)
def test_components_without_variance_are_left_out(route: str) -> None:
    """Thirty rows, of which ten differ: nine components."""
    rows = with_gap(10, 60, 3).repeat(3, 1)
    found = components_of(rows, 12, route=route)
    assert found.basis.shape == (9, 60)
    assert sine(found.basis, by_svd(rows, 9)[0]) < 1e-6


def test_rows_and_coefficients_are_each_others_inverse_on_the_subspace() -> None:
    rows = with_gap(60, 80, 5)
    pca = as_pca(components_of(rows, 5))
    coefficients = pca.coefficients(rows)
    assert coefficients.std(0).double().numpy() == pytest.approx(pca.deviations.numpy(), rel=1e-4)
    assert torch.allclose(pca.coefficients(pca.rows(coefficients)), coefficients, atol=1e-4)
    share_left = (rows - pca.rows(coefficients)).square().sum() / (rows - rows.mean(0)).square().sum()
    assert float(pca.explained[-1]) == pytest.approx(1 - float(share_left), abs=1e-5)
    moved = torch.zeros(2, 5, requires_grad=True)
    pca.rows(moved).sum().backward()
    assert moved.grad is not None
    assert torch.equal(Pca.of(pca.tensors(), pca.settings()).basis, pca.basis)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("route", ROUTES)
def test_a_gpu_finds_the_same(route: str) -> None:
    rows = with_gap(150, 200, 5)
    here, there = (components_of(rows, 5, route=route, device=device) for device in ("cpu", "cuda"))
    assert there.basis.device.type == "cpu"
    assert float((here.basis - there.basis).abs().max()) < 1e-7


# ------------------------------------------------------------------------------------------------ the plan


def test_few_rows_and_few_features_are_exact_and_many_of_both_are_not() -> None:
    assert plan_pca(300, 100_000, 64, 2 << 30).route == "gram"
    assert plan_pca(100_000, 300, 64, 2 << 30).route == "covariance"
    assert plan_pca(20_000, 20_000, 64, 2 << 30).route == "iteration"
    assert plan_pca(64_974, 99_648, 64, 2 << 30).route == "iteration"


@pytest.mark.parametrize(("n", "d", "k"), [(300, 100_000, 64), (20_000, 20_000, 64), (64_974, 99_648, 128)])
def test_a_plan_keeps_to_the_memory(n: int, d: int, k: int) -> None:
    for memory in (1 << 30, 4 << 30):
        plan = plan_pca(n, d, k, memory)
        assert plan.nbytes <= memory
        assert plan.block >= 4 * d


def test_too_little_memory_is_refused_with_what_would_do() -> None:
    with pytest.raises(MemoryRefused) as caught:
        plan_pca(64_974, 99_648, 2_000, 1 << 30)
    assert caught.value.what.startswith("2,000 components of 64,974 rows of 99,648 features take ")
    assert caught.value.hint is not None
    enough = int(caught.value.hint.removeprefix("--memory ").partition("MiB")[0])
    assert plan_pca(64_974, 99_648, 2_000, enough * MIB).route == "iteration"
    with pytest.raises(MemoryRefused):
        plan_pca(64_974, 99_648, 2_000, (enough - 1) * MIB)


def test_shares_are_all_members_each_once() -> None:
    from weightops.diffusion.processes import Processes

    for count in (1, 2, 3, 7, 20):
        parts = [share(range(11), Processes(index, count)) for index in range(count)]
        assert [member for _, part in parts for member in part] == list(range(11))
        assert all(part[0] == first for first, part in parts if part)


# ------------------------------------------------------------------------------------------------ interrupted


class Kept:
    """In memory, as a file keeps it: copies."""

    def __init__(self) -> None:
        self.state: Iterating | None = None

    def load(self) -> Iterating | None:
        return self.state

    def save(self, state: Iterating) -> None:
        before = None if state.before is None else state.before.clone()
        self.state = replace(state, basis=state.basis.clone(), before=before)


@pytest.mark.parametrize("at", [1, 2, 5, 8])
def test_an_interrupted_iteration_goes_on_to_the_same_bits(at: int) -> None:
    rows = with_gap(150, 200, 5)
    whole = components_of(rows, 5, route="iteration")
    assert whole.passes > 8
    kept = Kept()

    def stop(done: int, total: int, title: str | None = None) -> None:
        if title == f"pass {at + 1}" and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        components_of(rows, 5, route="iteration", keep=kept, tick=stop)
    assert kept.state is not None
    assert kept.state.passes == at
    titles: list[str | None] = []
    again = components_of(rows, 5, route="iteration", keep=kept, tick=lambda _d, _t, title=None: titles.append(title))
    assert titles[0] == f"pass {at + 1}"
    assert again.passes == whole.passes
    assert torch.equal(again.basis, whole.basis)


# ------------------------------------------------------------------------------------------------ together


def test_two_and_four_processes_find_what_one_finds(tmp_path: Path) -> None:
    """By torchrun and gloo; of the four, two do it once more by themselves. Then the whole verb, by all four."""
    rows = with_gap(120, 150, 5)
    np.save(tmp_path / "rows.npy", rows.numpy())
    space = space_of(tmp_path, 24)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    environment = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    script = Path(__file__).with_name("shared_pca.py")
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path)], capture_output=True, text=True, check=False, env=environment,
        timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for route in ROUTES:
        alone = components_of(rows, 5, route=route, memory=3 * MIB)
        for count, index in ((2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)):
            with np.load(tmp_path / f"{route}-{count}-{index}.npz") as found:
                assert np.abs(found["basis"] - alone.basis.numpy()).max() < (1e-9 if route == "iteration" else 1e-13)
                assert np.allclose(found["variances"], alone.variances, rtol=1e-12)
                assert np.allclose(found["mean"], alone.mean, rtol=1e-13)
    for geometry in ("rows", "delta"):
        output = tmp_path / f"alone-{geometry}.safetensors"
        alone = fit_pca(space.folder, components=4, geometry=geometry, output=output, device="cpu")
        said = [json.loads((tmp_path / f"{geometry}-{index}.json").read_text()) for index in range(4)]
        assert [each[:2] for each in said] == [[0, 4], [1, 4], [2, 4], [3, 4]]
        assert [each[4] > 0 for each in said] == [True, False, False, False]
        for each in said:
            assert each[2:4] == pytest.approx([alone.explained, alone.explained_held_out], rel=1e-6)
        one, four = (load_fitted(path, space) for path in (output, tmp_path / f"{geometry}.safetensors"))
        assert torch.allclose(one.latents, four.latents, atol=1e-5)
