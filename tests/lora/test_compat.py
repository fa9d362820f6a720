"""sd-scripts' LoRA + LoRA: the same numbers as its formula, restated here in float64; and what they are not."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import pytest
import torch

from weightops.errors import MismatchError
from weightops.lora.compat import CompatTerm, gains, merged, what_differs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

torch.set_num_threads(1)

MODULE = "lora_unet_mid_block_attentions_0_proj_in"

KERNELS = [(), (1, 1), (3, 3)]
RATIOS = [(1.0,), (0.7,), (-0.5,), (0.7, 0.5), (0.7, -0.4), (-1.2, 0.0), (0.5, 2.0, -0.3)]
ALPHAS = [(8.0, 8.0, 8.0), (4.0, 1.0, 0.3), (None, 2.0, None), (2.0, None, 0.0)]

every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=str)
every_ratio = pytest.mark.parametrize("ratios", RATIOS, ids=str)
every_alpha = pytest.mark.parametrize("alphas", ALPHAS, ids=str)
either_way = pytest.mark.parametrize("concat", [False, True], ids=["added", "concatenated"])


def terms_of(
    ratios: Sequence[float],
    alphas: Sequence[float | None],
    ranks: Sequence[int] = (4, 4, 4),
    kernel: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> list[CompatTerm]:
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    found = []
    for ratio, alpha, rank in zip(ratios, alphas, ranks, strict=False):
        up, down = random(12, rank, *[1] * len(kernel)), random(rank, 10, *kernel)
        found.append(CompatTerm(up, down, alpha, ratio))
    return found


def do(terms: Sequence[CompatTerm], *, concat: bool) -> tuple[Tensor, Tensor, float]:
    return merged(terms, concat=concat, label="a.safetensors", module=MODULE)


def restated(terms: Sequence[CompatTerm], concat: bool) -> tuple[Tensor, Tensor, float]:
    """Value by value, in float64: of the ranks of all files in a row where they are concatenated."""
    alphas = [t.down.shape[0] if t.alpha is None else t.alpha for t in terms]
    roots = [(a / alphas[0]) ** 0.5 for a in alphas]
    ranks = [t.down.shape[0] for t in terms]
    starts = [sum(ranks[:n]) if concat else 0 for n in range(len(terms))]
    total = sum(ranks) if concat else ranks[0]
    up = torch.zeros((terms[0].up.shape[0], total, *terms[0].up.shape[2:]), dtype=torch.float64)
    down = torch.zeros((total, *terms[0].down.shape[1:]), dtype=torch.float64)
    for t, root, start, rank in zip(terms, roots, starts, ranks, strict=True):
        for r in range(rank):
            magnitude = root * (t.ratio if t.ratio > 0 else -t.ratio)
            up[:, start + r] += magnitude * t.up[:, r].double()
            down[start + r] += root * t.ratio * t.down[r].double()
    return up, down, float(alphas[0])


def product(up: Tensor, down: Tensor, alpha: float | None) -> Tensor:
    """ΔW as every loader of the file makes it."""
    strength = 1.0 if alpha is None else alpha / down.shape[0]
    return strength * up.double().flatten(1) @ down.double().flatten(1)


def same(found: Tensor, expected: Tensor) -> None:
    """To float32's rounding of the largest value."""
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6 * max(1.0, float(expected.abs().max())))


# ------------------------------------------------------------------------------------------------ the same numbers


@either_way
@every_kernel
@every_alpha
@every_ratio
def test_numbers_are_those_of_the_formula(
    ratios: tuple[float, ...], alphas: tuple[float | None, ...], kernel: tuple[int, ...], concat: bool
) -> None:
    terms = terms_of(ratios, alphas, kernel=kernel)
    up, down, alpha = do(terms, concat=concat)
    expected = restated(terms, concat)
    same(up, expected[0])
    same(down, expected[1])
    assert alpha == expected[2]


@every_ratio
def test_ranks_may_differ_where_they_are_concatenated(ratios: tuple[float, ...]) -> None:
    terms = terms_of(ratios, (2.0, None, 5.0), ranks=(4, 1, 6), kernel=(3, 3))
    up, down, alpha = do(terms, concat=True)
    expected = restated(terms, True)
    same(up, expected[0])
    same(down, expected[1])
    assert (len(down), alpha) == (sum((4, 1, 6)[: len(ratios)]), 2.0)


@either_way
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_whatever_a_file_holds_the_arithmetic_is_float32(dtype: torch.dtype, concat: bool) -> None:
    terms = terms_of((0.7, 0.5), (4.0, 2.0), dtype=dtype)
    wide = [t._replace(up=t.up.float(), down=t.down.float()) for t in terms]
    for found, expected in zip(do(terms, concat=concat), do(wide, concat=concat), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ what they are not


@pytest.mark.parametrize("ratio", [0.7, -0.7, 1.0, -1.0, 0.0])
@either_way
def test_one_lora_comes_at_the_square_of_its_ratio_and_with_its_sign(ratio: float, concat: bool) -> None:
    """Down alone takes the sign: were it both factors, a negative ratio would act as a positive one."""
    [term] = terms_of((ratio,), (2.0,))
    expected = math.copysign(ratio**2, ratio) * product(term.up, term.down, term.alpha)
    torch.testing.assert_close(product(*do([term], concat=concat)), expected, rtol=0, atol=1e-6)


@every_alpha
@every_ratio
def test_gains_are_the_strengths_at_which_the_changes_come(
    ratios: tuple[float, ...], alphas: tuple[float | None, ...]
) -> None:
    terms = terms_of(ratios, alphas, ranks=(4, 2, 5))
    changes = [product(*term[:3]) for term in terms]
    expected = sum((g * c for g, c in zip(gains(terms, concat=True), changes, strict=True)), torch.zeros(12, 10))
    torch.testing.assert_close(product(*do(terms, concat=True)), expected, rtol=0, atol=1e-5)


def test_added_each_up_meets_every_down() -> None:
    """Beside the gains there are the products of one LoRA's up with another's down, at |ratioᵢ| ratioⱼ √(αᵢαⱼ)/rank."""
    terms = terms_of((0.7, -0.4, 1.2), (4.0, 2.0, None))
    expected = torch.zeros(12, 10, dtype=torch.float64)
    for (i, a), (j, b) in itertools.product(enumerate(terms), enumerate(terms)):
        strength = gains(terms, concat=False)[i] * a.strength / 4
        if i != j:
            strength = abs(a.ratio) * b.ratio * math.sqrt(a.strength * b.strength) / 4
        expected += strength * a.up.double() @ b.down.double()
    torch.testing.assert_close(product(*do(terms, concat=False)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("ratios", "ranks", "concat", "expected"),
    [
        (
            (0.7, 0.5),
            (4, 4),
            False,
            "sd-scripts multiplies both factors by the ratio, so that 0.7 and 0.5 act as 0.49 and 0.25, and adds "
            "factors, so that each up meets every other's down too",
        ),
        (
            (0.7, -0.3),
            (8, 8),
            True,
            "sd-scripts multiplies both factors by the ratio and keeps the first alpha for the ranks 8 and 8 together: "
            "0.7 and -0.3 act as 0.245 and -0.045",
        ),
        (
            (1, 1, 1),
            (1, 2, 1),
            True,
            "sd-scripts multiplies both factors by the ratio and keeps the first alpha for the ranks 1, 2 and 1 "
            "together: 1, 1 and 1 act as 0.25, 0.5 and 0.25",
        ),
        ((0.7,), (4,), False, "sd-scripts multiplies both factors by the ratio: 0.7 acts as 0.49"),
        (
            (0.5,) * 7,
            (4,) * 7,
            False,
            "sd-scripts multiplies both factors by the ratio, so that 0.5, 0.5, 0.5, 0.5, 0.5 (and 2 more) act as "
            "0.25, 0.25, 0.25, 0.25, 0.25 (and 2 more), and adds factors, so that each up meets every other's down too",
        ),
    ],
)
def test_the_difference_is_told_in_numbers(
    ratios: tuple[float, ...], ranks: tuple[int, ...], concat: bool, expected: str
) -> None:
    assert what_differs(terms_of(ratios, [1.0] * len(ratios), ranks), concat=concat) == expected


# ------------------------------------------------------------------------------------------------ refusals


def refusal(terms: Sequence[CompatTerm], *, concat: bool) -> str:
    with pytest.raises(MismatchError) as raised:
        do(terms, concat=concat)
    return str(raised.value)


def test_ranks_that_differ_are_not_added() -> None:
    assert refusal(terms_of((1, 1), (1.0, 1.0), ranks=(4, 6)), concat=False) == (
        f"a.safetensors: '{MODULE}' has ranks 4 and 6, and sd-scripts adds factors of one rank alone"
    )


@either_way
def test_factors_of_other_layers_are_refused(concat: bool) -> None:
    [a], [b] = terms_of((1,), (1.0,)), terms_of((1,), (1.0,), kernel=(1, 1))
    assert refusal([a, b], concat=concat) == (
        f"a.safetensors: '{MODULE}' has factors of [12, 4] and [4, 10] in one LoRA, "
        "and of [12, 4, 1, 1] and [4, 10, 1, 1] in another"
    )
    assert "[4, 10] in one LoRA" in refusal([a, a._replace(down=a.down[:, :9])], concat=concat)


@either_way
@pytest.mark.parametrize("alphas", [(0.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (1.0, math.nan), (0.0, 0.0), (1e-300, 1e30)])
def test_alphas_without_a_root_are_refused(alphas: tuple[float, float], concat: bool) -> None:
    shown = " and ".join(f"{alpha:g}" for alpha in alphas)
    assert refusal(terms_of((1, 1), alphas), concat=concat) == (
        f"a.safetensors: '{MODULE}' has alphas {shown}, and sd-scripts takes the root of each over the first"
    )


def test_alphas_that_are_both_negative_have_a_root() -> None:
    _, _, alpha = do(terms_of((1, 1), (-2.0, -1.0)), concat=False)
    assert alpha == -2.0
