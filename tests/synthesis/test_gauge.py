"""One form for all factors of a change: whatever gauge they come in, and without a change of the change."""

from __future__ import annotations

import pytest
import torch

from weightops.synthesis.gauge import aligned, balanced, delta_gram, delta_norms
from weightops.synthesis.layout import Layout, Module

SHAPES = ((24, 40), (18, 8, 3, 3), (40, 24))


def layout_of(rank: int) -> Layout:
    return Layout("sd15", tuple(Module("unet", f"m{n}", shape, rank) for n, shape in enumerate(SHAPES)))


def members(layout: Layout, count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Factors with singular values over two orders of magnitude, as trained ones have."""
    drawn = torch.Generator().manual_seed(seed)
    found = []
    for module in layout.modules:
        sizes = torch.logspace(0, -2, module.rank, dtype=torch.float64)
        up = torch.randn(count, module.out, module.rank, dtype=torch.float64, generator=drawn) * sizes
        found.append((up, torch.randn(count, module.rank, module.n, dtype=torch.float64, generator=drawn)))
    return found


def regauged(
    factors: list[tuple[torch.Tensor, torch.Tensor]], condition: float, seed: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(BG, G⁻¹A), each G of this condition number."""
    drawn = torch.Generator().manual_seed(seed)
    found = []
    for up, down in factors:
        count, _, rank = up.shape
        left, right = (
            torch.linalg.qr(torch.randn(count, rank, rank, dtype=torch.float64, generator=drawn))[0] for _ in "ab"
        )
        sizes = torch.logspace(0, 1, rank, base=condition, dtype=torch.float64) * 1.7
        gauge = (left * sizes) @ right
        found.append((up @ gauge, torch.linalg.solve(gauge, down)))
    return found


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((torch.linalg.vector_norm(a - b, dim=-1) / torch.linalg.vector_norm(b, dim=-1)).max())


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_row_of_a_lora_does_not_depend_on_its_gauge(rank: int) -> None:
    layout = layout_of(rank)
    reference = [(up[0], down[0]) for up, down in balanced(members(layout, 1, 7))]
    factors = members(layout, 8, rank)
    row = layout.flatten(aligned(balanced(factors), reference))
    for seed in range(5):
        other = regauged(factors, 10.0, seed)
        assert worst(layout.flatten(other), layout.flatten(factors)) > 0.1
        assert worst(layout.flatten(aligned(balanced(other), reference)), row) < 1e-9


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_change_stays_what_it_was(rank: int) -> None:
    layout = layout_of(rank)
    factors = members(layout, 6, rank)
    reference = [(up[0], down[0]) for up, down in members(layout, 1, 9)]
    found = balanced(factors)
    for made in (found, aligned(found, reference)):
        for (up, down), (first, second) in zip(made, factors, strict=True):
            assert worst((up @ down).flatten(1), (first @ second).flatten(1)) < 1e-12


def test_balanced_factors_share_out_each_singular_value() -> None:
    ((up, down),) = balanced([(torch.randn(5, 12, 3), torch.randn(5, 3, 20))])
    left, right = up.mT @ up, down @ down.mT
    assert torch.allclose(left, right, atol=1e-10)
    assert torch.allclose(left, torch.diag_embed(left.diagonal(dim1=1, dim2=2)), atol=1e-10)


def test_balance_alone_leaves_signs_free_and_alignment_does_not() -> None:
    layout = layout_of(4)
    factors = balanced(members(layout, 1, 3))
    turned = [
        (up * torch.tensor([1.0, -1, 1, -1]), down * torch.tensor([1.0, -1, 1, -1])[:, None]) for up, down in factors
    ]
    reference = [(up[0], down[0]) for up, down in members(layout, 1, 4)]
    assert worst(layout.flatten(turned), layout.flatten(factors)) > 0.5
    assert worst(layout.flatten(aligned(turned, reference)), layout.flatten(aligned(factors, reference))) < 1e-12


def test_alignment_is_the_nearest_of_all_rotations() -> None:
    drawn = torch.Generator().manual_seed(5)
    factors = balanced([(torch.randn(1, 12, 3, generator=drawn), torch.randn(1, 3, 20, generator=drawn))])
    first, second = (
        torch.randn(12, 3, dtype=torch.float64, generator=drawn),
        torch.randn(3, 20, dtype=torch.float64, generator=drawn),
    )

    def distance(up: torch.Tensor, down: torch.Tensor) -> float:
        return float((up - first).square().sum() + (down - second).square().sum())

    ((up, down),) = aligned(factors, [(first, second)])
    least = distance(up[0], down[0])
    for _ in range(200):
        turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=drawn))
        assert distance(factors[0][0][0] @ turn, turn.mT @ factors[0][1][0]) >= least - 1e-12


def test_ranks_that_are_not_there_become_zero() -> None:
    drawn = torch.Generator().manual_seed(2)
    up, down = torch.randn(2, 6, 4, generator=drawn), torch.randn(2, 4, 3, generator=drawn)
    up[1, :, 2:] = 0
    ((left, right),) = balanced([(up, down)])
    assert left.shape == (2, 6, 4)
    assert right.shape == (2, 4, 3)
    assert not left[0, :, 3:].any()  # a matrix of three columns has no fourth
    assert not left[1, :, 2:].any()
    assert not right[1, 2:].any()
    assert worst((left @ right).flatten(1), (up @ down).double().flatten(1)) < 1e-6


def test_inner_products_are_those_of_the_changes() -> None:
    layout = layout_of(4)
    a, b = members(layout, 3, 1), members(layout, 5, 2)
    dense = [torch.cat([(up @ down).flatten(1) for up, down in factors], 1) for factors in (a, b)]
    assert torch.allclose(delta_gram(a, b), dense[0] @ dense[1].mT, rtol=1e-12, atol=1e-9)
    assert torch.allclose(delta_norms(a), torch.linalg.vector_norm(dense[0], dim=1), rtol=1e-12)
