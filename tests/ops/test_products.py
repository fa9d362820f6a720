"""The tiled product of LoRAs: what the formula says, whatever the tiles; and what survives is what float64 says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weightops.lora.family import FAMILIES, Told
from weightops.merging.rounding import generator_for
from weightops.ops import products
from weightops.ops.changes import Change
from weightops.ops.products import add_products, are_products, factors

torch.set_num_threads(1)


def change(shape: tuple[int, ...], *, parts: tuple[str, ...] = ("up", "down"), strength: float = 1.0,
           alpha: float | None = None, columns: dict[str, tuple[int, int]] | None = None) -> Change:  # fmt: skip
    family = FAMILIES.get("lora")
    return Change(family, parts, frozenset({"up"}), columns or {}, alpha, Told(), strength, shape, of_bias=False)


def made(out: int, n: int, rank: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    weight = (0.03 * torch.randn(out, n, generator=generator)).to(dtype)
    up, down = (0.02 * torch.randn(*shape, generator=generator) for shape in ((out, rank), (rank, n)))
    return weight, up.to(dtype), down.to(dtype)


def direct(weight: Tensor, up: Tensor, down: Tensor, written: Tensor) -> tuple[float, float, float, float]:
    """‖Δ‖², ⟨added, Δ⟩, ‖added − Δ‖² and ‖W‖² in float64."""
    delta = up.double() @ down.double()
    added = written.double() - weight.double()
    return tuple(float(v) for v in ((delta**2).sum(), (added * delta).sum(), ((added - delta) ** 2).sum(),
                                    (weight.double() ** 2).sum()))  # type: ignore[return-value]  # fmt: skip


@pytest.mark.parametrize("shape", [(40, 30), (3, 700), (700, 3), (1, 1), (64, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tiles_make_what_one_product_makes(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "TILE_VALUES", 256)
    monkeypatch.setattr(products, "_TILE_COLUMNS", 50)
    weight, up, down = made(*shape, 4, dtype=dtype)
    out = torch.full_like(weight, 7.0)
    found = add_products(weight, out, up.float(), down.float(), generator=None, other="float32")
    exact = weight.double() + up.double() @ down.double()
    off = (out.double() - exact).abs()
    half = torch.finfo(dtype).eps / 2
    assert bool((off <= exact.abs() * half * 1.0001 + 1e-7).all())
    wanted = direct(weight, up, down, out)
    torch.testing.assert_close(torch.tensor(found[:4]).double(), torch.tensor(wanted).double(), rtol=2e-4, atol=1e-9)


def test_several_loras_are_one_product_and_strengths_are_in_it() -> None:
    _, up, down = made(20, 12, 3, dtype=torch.float32)
    _, up_b, down_b = made(20, 12, 5, seed=1, dtype=torch.float32)
    changes = [change((20, 12), strength=0.5, alpha=6.0), change((20, 12), strength=-2.0)]
    assert are_products(changes)
    left, right = factors(changes, [up, down, up_b, down_b])
    assert (left.shape, right.shape) == ((20, 8), (8, 12))
    torch.testing.assert_close(left @ right, 0.5 * 2.0 * up @ down - 2.0 * up_b @ down_b)


def test_a_packed_modules_own_columns_alone_are_taken() -> None:
    _, up, down = made(20, 12, 6, dtype=torch.float32)
    own = change((20, 12), columns={"up": (2, 5)})
    left, right = factors([own], [up, down[:3]])
    torch.testing.assert_close(left @ right, up[:, 2:5] @ down[:3])


def test_what_is_no_plain_product_is_left_to_others() -> None:
    assert not are_products([change((20, 12), parts=("up", "down", "dora_scale"))])
    assert not are_products([change((20, 12), parts=("up", "down", "reshape_weight"))])
    assert are_products([change((20, 12), parts=("up", "down", "mid"))])


def test_little_that_survives_is_tried_in_another_dtype() -> None:
    weight, up, down = made(128, 128, 4, dtype=torch.bfloat16)
    up *= 0.01
    out = torch.empty_like(weight)
    found = add_products(weight, out, up.float(), down.float(), generator=None, other="float16")
    assert found.along < 0.9 * found.meant
    assert found.other is not None
    tried = (weight.float() + up.float() @ down.float()).half()
    _, along, off, _ = direct(weight, up, down, tried)
    assert found.other == (pytest.approx(along, rel=1e-3), pytest.approx(off, rel=1e-3))
    assert found.other[0] > found.along
    large = add_products(weight, out, 100 * up.float(), down.float(), generator=None, other="float16")
    assert large.other is None


def test_chance_is_fair_in_every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "TILE_VALUES", 4096)
    weight, up, down = made(512, 512, 4, dtype=torch.bfloat16)
    up *= 0.02
    out = torch.empty_like(weight)
    found = add_products(weight, out, up.float(), down.float(), generator=generator_for(1, "x", 0), other=None)
    assert found.along / found.meant == pytest.approx(1, abs=0.05)
    again = torch.empty_like(weight)
    add_products(weight, again, up.float(), down.float(), generator=generator_for(1, "x", 0), other=None)
    assert torch.equal(out, again)
