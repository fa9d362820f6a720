"""OFT and BOFT: W' = R W with orthogonal blocks. Qiu et al. 2023, arXiv:2306.07280; Liu et al. 2023, arXiv:2311.06243.

Each block is the Cayley transform of a skew matrix. Diag-OFT (LyCORIS, kohya) turns the outputs by Rᵀ, BOFT (LyCORIS)
by R, and PEFT's second version (Qiu et al. 2025, arXiv:2506.19847) the inputs: W' = W Rᵀ.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weightops.lora.family import FAMILIES, Family, Parts, Shape, Shapes

if TYPE_CHECKING:
    from torch import Tensor


def _fits(shapes: Shapes, shape: Shape) -> bool:
    blocks = shapes["oft_blocks"]
    if len(blocks) not in (3, 4) or blocks[-1] != blocks[-2] or len(shape) < 2 or blocks[-3] * blocks[-1] != shape[0]:
        return False
    if math.prod(shapes.get("rescale", shape[:1])) != shape[0]:
        return False
    # Each stage pairs blocks twice as far apart as the one before.
    size = blocks[-1]
    return len(blocks) == 3 or (size % 2 == 0 and shape[0] % (2 ** (blocks[0] - 1) * size) == 0)


def _apply(weight: Tensor, p: Parts, rows: slice) -> Tensor:
    """Diag-OFT's blocks are [n, size, size], BOFT's [stages, n, size, size]. rescale is each output's, afterwards."""
    turns = _rotations(p["oft_blocks"], p.alpha, p.shape[0])
    turned = _butterfly(weight, turns) if turns.ndim == 4 else _diagonal(weight, turns)
    if "rescale" not in p:
        return turned
    return turned * p["rescale"].reshape(-1, *[1] * (weight.ndim - 1))


def _rotations(blocks: Tensor, alpha: float | None, out: int) -> Tensor:
    """(I + Q)(I − Q)⁻¹, with Q skew and, where alpha is positive, ‖Q‖ no more than alpha·out.

    The norm runs over all blocks together. kohya and LyCORIS multiply by `out` (the paper by out²), ComfyUI does not.
    """
    import torch

    q = blocks - blocks.mT
    if alpha is not None and alpha > 0:
        q = q * (alpha * out / torch.linalg.vector_norm(q)).clamp(max=1)
    unit = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    turns: Tensor = torch.linalg.solve(unit - q, unit + q)  # the two commute
    return turns


def _diagonal(weight: Tensor, turns: Tensor) -> Tensor:
    import torch

    blocks = weight.reshape(*turns.shape[:2], *weight.shape[1:])
    return torch.einsum("knm,kn...->km...", turns, blocks).reshape(weight.shape)


def _butterfly(weight: Tensor, turns: Tensor) -> Tensor:
    """Stage i turns blocks of rows that lie 2^i·size/2 apart, as in a fast Fourier transform."""
    import torch

    size, rest = turns.shape[-1], weight.shape[1:]
    for i, turn in enumerate(turns):
        apart = 2**i * (size // 2)
        blocks = weight.reshape(-1, 2, apart, *rest).transpose(1, 2).reshape(-1, size, *rest)
        blocks = torch.einsum("bij,bj...->bi...", turn, blocks)
        weight = blocks.reshape(-1, apart, 2, *rest).transpose(1, 2).reshape(-1, *rest)
    return weight


# kohya's OFT for Flux turns the queries, keys, values and the MLP of a packed weight one by one.
_BANDS = ("oft_blocks.0", "oft_blocks.1", "oft_blocks.2", "oft_blocks.3")


def _fits_bands(shapes: Shapes, shape: Shape) -> bool:
    blocks = [shapes[part] for part in _BANDS if part in shapes]
    whole = all(len(b) == 3 and b[1] == b[2] for b in blocks)
    return whole and len(shape) > 1 and sum(b[0] * b[1] for b in blocks) == shape[0]


def _apply_bands(weight: Tensor, p: Parts, rows: slice) -> Tensor:
    """Diag-OFT of each band, whose constraint is alpha times its own height."""
    import torch

    found, start = [], 0
    for blocks in (p[part] for part in _BANDS if part in p):
        height = blocks.shape[0] * blocks.shape[1]
        found.append(_diagonal(weight[start : start + height], _rotations(blocks, p.alpha, height)))
        start += height
    return torch.cat(found)


def _size(values: int) -> int | None:
    """Of a skew matrix whose upper triangle has so many values."""
    size = (1 + math.isqrt(1 + 8 * values)) // 2
    return size if size > 1 and size * (size - 1) // 2 == values else None


def _fits_inputs(shapes: Shapes, shape: Shape) -> bool:
    """One block alone is shared by all (PEFT's block_share)."""
    if len(shapes["oft_R"]) != 2 or len(shape) < 2:
        return False
    count, values = shapes["oft_R"]
    size, features = _size(values), math.prod(shape[1:])
    return size is not None and features % size == 0 and count in (1, features // size)


def _apply_inputs(weight: Tensor, p: Parts, rows: slice) -> Tensor:
    """W Rᵀ, block by block of in·k·k; Q is given by its upper triangle, row by row.

    PEFT's constraint (coft) is on each block alone; that of Diag-OFT is on all together.
    """
    import torch

    triangle = p["oft_R"]
    size = _size(triangle.shape[1])
    assert size is not None
    q = triangle.new_zeros(len(triangle), size, size)
    i, j = torch.triu_indices(size, size, 1, device=triangle.device)
    q[:, i, j] = triangle
    q = q - q.mT
    if p.told.coft is not None:
        length = torch.linalg.matrix_norm(q, keepdim=True)
        q = q * (p.told.coft / math.sqrt(len(q)) / length.clamp_min(torch.finfo(q.dtype).tiny)).clamp(max=1)
    turns = _neumann(q, p.told.neumann) if p.told.neumann is not None else _exact(q)
    count = math.prod(p.shape[1:]) // size
    blocks = weight.reshape(len(weight), count, size)
    return torch.einsum("ork,rck->orc", blocks, turns.expand(count, -1, -1)).reshape(weight.shape)


def _neumann(q: Tensor, terms: int) -> Tensor:
    """The series of (I + Q)(I − Q)⁻¹, cut as PEFT cuts it: I + 2Q + … + 2Qⁿ⁻² + Qⁿ⁻¹, but I + 2Q of 2 terms, 3 of 4."""
    import torch

    total = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)
    if terms < 2:
        return total
    total = total + 2 * q
    if terms < 3:
        return total
    power = q @ q
    total = total + 2 * power
    for _ in range(3, terms - 1):
        power = power @ q
        total = total + 2 * power
    return total + power @ q


def _exact(q: Tensor) -> Tensor:
    """PEFT's exact transform, (I − Q)(I + Q)⁻¹: the inverse of what the series tends to, so the setting matters."""
    import torch

    unit = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    turns: Tensor = torch.linalg.solve(unit + q, unit - q)
    return turns


FAMILIES.register(
    "oft",
    Family(
        "oft",
        forms=(("oft_blocks",), ("oft_blocks", "rescale")),
        fits=_fits,
        apply=_apply,
        grain="tensor",
    ),
)
FAMILIES.register(
    "oft_bands",
    Family(
        "oft_bands",
        forms=(_BANDS[:1], _BANDS[:3], _BANDS),
        fits=_fits_bands,
        apply=_apply_bands,
        grain="tensor",
    ),
)
# PEFT's second version keeps the upper triangles of skew matrices, and turns the inputs: row by row.
FAMILIES.register("oftv2", Family("oftv2", forms=(("oft_R",),), fits=_fits_inputs, apply=_apply_inputs))
