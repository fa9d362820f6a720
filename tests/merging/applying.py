"""Merge methods applied to whole tensors, as a merge applies them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from weightops.merging.expression import Applied, Given, Program, apply, stages
from weightops.merging.method import METHODS, SMALL, MergeMethod
from weightops.plan import Block, Grain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

torch.set_num_threads(1)

SHAPES = [(40, 48), (16, 8, 3, 3), (40,), (1,), (1100, 1024)]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def random(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def applied(
    name: str, models: Sequence[Tensor], *, dtype: torch.dtype | None = None,
    statistics: Sequence[Tensor | None] = (), seed: int = 0, **given: Any,
) -> Tensor:  # fmt: skip
    """What a method makes of whole tensors, in their dtype or this one."""
    method = METHODS.get(name)
    out = torch.full(models[0].shape, 77.0).to(dtype or models[0].dtype)
    apply(method, models, out, method.check(given, len(models)), statistics=statistics, seed=seed)
    return out


def looked(
    method: MergeMethod, models: Sequence[Tensor], parameters: dict[str, Any], *, rows: int | None = None
) -> dict[str, Any]:
    """What a method is handed as `found`, if anything; rows: it looks at blocks of so many, not at all in one."""
    if not method.looks:
        return {}
    node = Applied(method, tuple(Given(n) for n in range(len(models))), parameters, "0")
    shape = (models[0].numel(),) if method.grain is Grain.VALUES else tuple(models[0].shape)
    given = [m.reshape(shape) for m in models]
    wide = models[0].numel() <= SMALL or method.double or models[0].dtype in (torch.float32, torch.float64)
    program = Program(node, "", 0, shape, node.grain, wide, stages=stages(node))
    step = rows or shape[0] or 1
    blocks = [Block(n, i, min(i + step, shape[0])) for n, i in enumerate(range(0, max(shape[0], 1), step))]
    found: list[Any] = []
    for number in range(len(program.stages)):
        values = [program.look(number, [g[b.start : b.stop] for g in given], b, *found) for b in blocks]
        found.append(program.gather(number, values, *found))
    return {"found": found[-1]}


def assert_near(found: Tensor, exact: Any, operands: Sequence[Tensor], ulps: float = 1.0) -> None:
    """One unit in the last place of the result; where operands cancel out, what float32 keeps of the larger one."""
    exact = torch.as_tensor(exact, dtype=torch.float64)
    assert found.shape == exact.shape
    largest = torch.stack([m.double().abs() for m in operands]).amax(0)
    kept = 2.0**-51 if found.dtype is torch.float64 else 2.0**-23
    unit = torch.maximum(ulp(exact, found.dtype), largest * kept) * ulps
    distance = (found.double() - exact).abs() / unit
    distance[(found.double() == exact) | (found.isnan() & exact.isnan())] = 0
    worst = distance.argmax()
    assert distance.flatten()[worst] <= 1.0, f"{found.flatten()[worst]} for {exact.flatten()[worst]}"


# The distance from 1 to the next value; of two of them torch.finfo says another.
_STEPS = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
    torch.float8_e4m3fn: 2.0**-3,
    torch.float8_e5m2: 2.0**-2,
    torch.float8_e4m3fnuz: 2.0**-3,
    torch.float8_e5m2fnuz: 2.0**-2,
}


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place of `dtype` at the magnitude of each value, down to the smallest subnormal."""
    normal = torch.finfo(dtype).smallest_normal
    return torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(normal)))) * _STEPS[dtype]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
