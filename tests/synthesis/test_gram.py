"""ΔW geometry against dense matrices: inner products, components, new LoRAs' coefficients, and factors of a sum."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from spaces import factors_of, family_of, layout_of, space_of, write_family

from weightops.diffusion.processes import Processes
from weightops.errors import MemoryRefused
from weightops.lora.lowrank import LowRank, truncate
from weightops.synthesis.collect import collect
from weightops.synthesis.gram import DeltaPca, Tiles, cut, delta_pca, inner_products
from weightops.synthesis.space import Space, open_space

if TYPE_CHECKING:
    from pathlib import Path

    from weightops.synthesis.layout import Factors


def dense(factors: Factors) -> torch.Tensor:
    """ΔW of every module, side by side [..., D], float64."""
    return torch.cat([(up.double() @ down.double()).flatten(-2) for up, down in factors], -1)


def products_of(space: Space, members: list[int], memory: int = 64 << 20) -> torch.Tensor:
    return inner_products(space, members, memory=memory, processes=Processes(), on_block=lambda _: None)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Space:
    torch.set_num_threads(1)
    return space_of(tmp_path_factory.mktemp("gram"), 14)


MEMBERS = [0, 1, 2, 4, 5, 6, 7, 9, 10, 11, 12]


@pytest.fixture(scope="module")
def delta(space: Space) -> DeltaPca:
    return delta_pca(products_of(space, MEMBERS), MEMBERS, 4)


def test_inner_products_are_those_of_the_matrices_whatever_the_tiles(space: Space) -> None:
    whole = dense(space.layout.unflatten(space.rows(MEMBERS)))
    assert torch.allclose(products_of(space, MEMBERS), whole @ whole.mT, rtol=1e-10, atol=1e-12)
    small = 40 * len(MEMBERS) ** 2 + 20 * space.width * 5
    tiles = Tiles.plan(space, len(MEMBERS), small)
    assert tiles.held < 4
    assert tiles.nbytes <= small
    assert torch.allclose(products_of(space, MEMBERS, small), whole @ whole.mT, rtol=1e-10, atol=1e-12)


def test_too_little_memory_is_refused_with_what_would_do(space: Space) -> None:
    with pytest.raises(MemoryRefused) as caught:
        Tiles.plan(space, 60_000, 1 << 30)
    assert caught.value.what.startswith("the inner products of 60,000 LoRAs and two of these take 137,3")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("--memory 137")


def test_components_are_those_of_the_matrices(space: Space, delta: DeltaPca) -> None:
    whole = dense(space.layout.unflatten(space.rows(MEMBERS)))
    apart = (whole - whole.mean(0)).numpy()
    _, sizes, axes = np.linalg.svd(apart, full_matrices=False)
    assert delta.deviations.numpy() == pytest.approx(sizes[:4] / np.sqrt(len(MEMBERS) - 1), rel=1e-8)
    assert delta.total == pytest.approx((sizes**2).sum() / (len(MEMBERS) - 1), rel=1e-10)
    assert delta.explained.numpy() == pytest.approx((sizes**2).cumsum()[:4] / (sizes**2).sum(), rel=1e-8)
    components = delta.weights.mT @ torch.from_numpy(apart)
    assert torch.allclose(components @ components.mT, torch.eye(4, dtype=torch.float64), atol=1e-8)
    assert np.allclose(np.abs(np.diag(components.numpy() @ axes[:4].T)), 1, atol=1e-8)
    assert torch.allclose(delta.own, torch.from_numpy(apart) @ components.mT, atol=1e-9)


def test_coefficients_of_others_are_their_projections(space: Space, delta: DeltaPca) -> None:
    whole = dense(space.layout.unflatten(space.rows(MEMBERS)))
    components = delta.weights.mT @ (whole - whole.mean(0))
    held_out = space.layout.unflatten(space.rows([3, 8, 13]))
    wanted = (dense(held_out) - whole.mean(0)) @ components.mT
    assert torch.allclose(delta.coefficients(held_out, space), wanted, atol=1e-9)
    # Any factors of any rank, in any gauge.
    others = [(torch.cat([up, up], -1), torch.cat([down, -2 * down], -2)) for up, down in held_out]
    assert torch.allclose(
        delta.coefficients(others, space), (-dense(held_out) - whole.mean(0)) @ components.mT, atol=1e-9
    )


@pytest.mark.parametrize("count", [2, 11], ids=["as factors", "as matrices"])
def test_factors_are_exact_or_the_best_of_a_rank(space: Space, count: int) -> None:
    """Two members of rank 2 are thinner than a matrix of 16 rows, and eleven are not."""
    members = MEMBERS[:count]
    delta = delta_pca(products_of(space, members), members, min(4, count - 1))
    whole = dense(space.layout.unflatten(space.rows(members)))
    components = delta.weights.mT @ (whole - whole.mean(0))
    asked = torch.randn(3, delta.components, generator=torch.Generator().manual_seed(1)) * delta.deviations.float()
    wanted = whole.mean(0) + asked.double() @ components
    exact = delta.factors(asked, space)
    assert torch.allclose(dense(exact), wanted, atol=1e-6)
    # One at a time, with as little memory as there may be, and without an axis of several.
    assert all(torch.equal(a[0], b[0]) for a, b in zip(exact, delta.factors(asked, space, memory=1), strict=True))
    assert torch.allclose(dense(delta.factors(asked[1], space)), wanted[1], atol=1e-6)
    thin = delta.factors(asked, space, 1)
    start = 0
    for (up, down), module in zip(thin, space.layout.modules, strict=True):
        assert up.shape == (3, module.out, 1)
        for i in range(3):
            matrix = wanted[i, start : start + module.out * module.n].reshape(module.out, module.n)
            best = torch.linalg.svdvals(matrix)
            lost = torch.linalg.matrix_norm(matrix - (up[i] @ down[i]).double())
            assert float(lost) == pytest.approx(float(best[1:].square().sum().sqrt()), abs=1e-6)
        start += module.out * module.n


def test_the_gauge_of_the_files_changes_nothing(tmp_path: Path) -> None:
    """Each LoRA's factors times a matrix of its own: (BG, G⁻¹A)."""
    layout = layout_of()
    members = family_of(layout, 8)
    draw = torch.Generator().manual_seed(3)
    turned = []
    for factors in members:
        turn = torch.eye(2, dtype=torch.float64) + 0.5 * torch.randn(2, 2, generator=draw, dtype=torch.float64)
        turned.append([(up @ turn, torch.linalg.solve(turn, down)) for up, down in factors])
    found = []
    for name, given in (("as-they-are", members), ("turned", turned)):
        write_family(tmp_path / name, layout, given)
        collect(tmp_path / name, output=tmp_path / f"{name}-space", form="raw")
        found.append(delta_pca(products_of(open_space(tmp_path / f"{name}-space"), list(range(8))), range(8), 3))
    assert torch.allclose(found[0].own, found[1].own, atol=1e-5)
    assert found[0].explained.numpy() == pytest.approx(found[1].explained.numpy(), rel=1e-5)


def test_components_without_variance_are_left_out(space: Space) -> None:
    members = [0, 1, 2, 0, 1, 2, 0]
    assert delta_pca(products_of(space, members), members, 5).components == 2


def test_a_cut_is_the_best_of_each_module_and_pads_what_is_not_there() -> None:
    layout = layout_of(rank=3)
    one, other = factors_of(layout, 1), factors_of(layout, 2)
    stacked = [(torch.stack([a[0], 0 * b[0]]), torch.stack([a[1], b[1]])) for a, b in zip(one, other, strict=True)]
    found = cut(stacked, [2] * len(stacked))
    for (up, down), (first, second) in zip(found, one, strict=True):
        assert up.shape[-1] == down.shape[-2] == 2
        best = truncate(LowRank(first, second), 2).lowrank
        assert torch.allclose(up[0] @ down[0], best.up @ best.down)
        assert not up[1].any()


def test_it_comes_back_from_its_tensors(space: Space, delta: DeltaPca) -> None:
    again = DeltaPca.of(delta.tensors(), delta.settings())
    assert again.members == delta.members
    assert torch.equal(again.own, delta.own)
    assert again.total == delta.total
    for name, tensor in itertools.islice(delta.tensors().items(), 1, None):
        with pytest.raises(ValueError, match="of another size"):
            DeltaPca.of({**delta.tensors(), name: tensor[:-1]}, delta.settings())
