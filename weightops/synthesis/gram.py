"""The geometry of ΔW itself: principal components by inner products of LoRAs, in which no gauge takes part.

A component is a weighted sum of the members' changes, ΔWᵢ − mean ΔW, so that it is kept as its weights. ⟨ΔWᵢ, ΔWⱼ⟩
comes from factors; of the members a block is in memory at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.errors import MemoryRefused
from weightops.lora.lowrank import LowRank, truncate
from weightops.synthesis.gauge import delta_gram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from weightops.diffusion.processes import Processes
    from weightops.synthesis.layout import Factors, Layout, Module
    from weightops.synthesis.space import Space

# What is no variance: of the largest eigenvalue, what rounding in float64 leaves of a component that is not there.
NO_VARIANCE = 1e-12
_MEMORY = 512 << 20


@dataclass(frozen=True, slots=True, eq=False)
class DeltaPca:
    """members: the trained ones' indices; component j is Σᵢ weights[i, j] (ΔWᵢ − mean ΔW), of norm 1. float64.

    own: the coefficients [n, k] of the members; offsets [k]: what `coefficients` takes off; deviations [k]; total:
    the whole variance.
    """

    members: tuple[int, ...]
    weights: Tensor
    own: Tensor
    offsets: Tensor
    deviations: Tensor
    total: float

    @property
    def components(self) -> int:
        return len(self.deviations)

    @property
    def explained(self) -> Tensor:
        """The share of the variance that the first 1, 2, … components have [k]."""
        return self.deviations.square().cumsum(0) / self.total

    def coefficients(self, factors: Factors, space: Space) -> Tensor:
        """The coefficients [n, k] of other LoRAs' factors [n, out, r], by inner products with every member."""
        products = products_with(factors, space, self.members)
        return products @ self.weights - self.offsets

    def mixture(self, coefficients: Tensor) -> Tensor:
        """The weights [..., n] that make of the members' ΔW the change with these coefficients [..., k]."""
        found = coefficients.double() @ self.weights.mT
        return found + (1 - found.sum(-1, keepdim=True)) / len(self.members)

    def factors(
        self, coefficients: Tensor, space: Space, rank: int | Sequence[int] | None = None, *, memory: int = _MEMORY
    ) -> list[tuple[Tensor, Tensor]]:
        """The factors [..., out, r] of coefficients [..., k], float32: exact, or cut to a rank at its best.

        rank: of all modules, or of each. One pass over the space for as many LoRAs as fit the memory, for ΔW itself is
        summed where the members' ranks together are more than a module has.
        """
        import torch

        mixture = self.mixture(coefficients)
        flat = mixture.reshape(-1, mixture.shape[-1])
        each = 8 * sum(min(m.out * m.n, len(self.members) * m.size) for m in space.layout.modules)
        step = max(1, memory // max(each, 1))
        ranks = _ranks(space.layout, rank)
        made = [
            each for start in range(0, len(flat), step)
            for each in _summed(flat[start : start + step], space, self.members, ranks)
        ]  # fmt: skip
        found = []
        for number, module in enumerate(space.layout.modules):
            pairs = [each[number] for each in made]
            ups = padded([up for up, _ in pairs], -1) if pairs else torch.zeros(0, module.out, module.rank)
            downs = padded([down for _, down in pairs], -2) if pairs else torch.zeros(0, module.rank, module.n)
            shape = mixture.shape[:-1]
            found.append((ups.reshape(*shape, *ups.shape[1:]), downs.reshape(*shape, *downs.shape[1:])))
        return found

    def tensors(self) -> dict[str, Tensor]:
        """For a file."""
        import torch

        return {
            "members": torch.tensor(self.members, dtype=torch.int64), "weights": self.weights, "own": self.own,
            "offsets": self.offsets, "deviations": self.deviations,
        }  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """For a file's metadata."""
        return {"total": self.total}

    @staticmethod
    def of(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> DeltaPca:
        """What `tensors` and `settings` gave. Raises KeyError, ValueError."""
        made = DeltaPca(
            tuple(tensors["members"].tolist()), tensors["weights"], tensors["own"], tensors["offsets"],
            tensors["deviations"], float(settings["total"]),
        )  # fmt: skip
        n, k = made.weights.shape
        if made.own.shape != (n, k) or len(made.members) != n or made.offsets.shape != (k,) or made.components != k:
            raise ValueError(f"weights of {n} members and {k} components, and others of another size")
        return made


def _ranks(layout: Layout, rank: int | Sequence[int] | None) -> list[int]:
    most = [min(m.out, m.n) for m in layout.modules]
    if rank is None:
        return most
    asked = [rank] * len(most) if isinstance(rank, int) else list(rank)
    return [min(a, b) for a, b in zip(asked, most, strict=True)]


def padded(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Factors of unlike ranks as one tensor: ranks that are not there are zero. dim: -1 of up, -2 of down."""
    import torch

    rank = max(1, *(t.shape[dim] for t in tensors)) if len(tensors) > 1 else max(1, tensors[0].shape[dim])
    pads = [(0, rank - t.shape[dim]) if dim == -1 else (0, 0, 0, rank - t.shape[dim]) for t in tensors]
    return torch.stack([torch.nn.functional.pad(t, pad) for t, pad in zip(tensors, pads, strict=True)])


def cut(factors: Factors, ranks: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Each ΔW of factors [..., out, r] at its best of a rank, module by module; padded where one has fewer."""
    found = []
    for (up, down), rank in zip(factors, ranks, strict=True):
        ups, downs = up.reshape(-1, *up.shape[-2:]), down.reshape(-1, *down.shape[-2:])
        pairs = [truncate(LowRank(a, b), rank).lowrank for a, b in zip(ups, downs, strict=True)]
        if not pairs:
            found.append((up[..., :rank], down[..., :rank, :]))
            continue
        a, b = padded([p.up for p in pairs], -1), padded([p.down for p in pairs], -2)
        found.append((a.reshape(*up.shape[:-2], *a.shape[-2:]), b.reshape(*down.shape[:-2], *b.shape[-2:])))
    return found


# ------------------------------------------------------------------------------------------------ sums of members


@dataclass(slots=True)
class _Sums:
    """Σᵢ aᵢ ΔWᵢ of one module for each mixture [L, n]: as factors while these are thinner than the matrix.

    whole [L, out, n] float64, or None; parts: of the members, where there is none.
    """

    mixture: Tensor
    module: Module
    whole: Tensor | None
    parts: list[tuple[slice, Tensor, Tensor]]

    @classmethod
    def of(cls, mixture: Tensor, module: Module) -> _Sums:
        thin = mixture.shape[1] * module.rank <= min(module.out, module.n)
        return cls(mixture, module, None if thin else mixture.new_zeros(len(mixture), module.out, module.n), [])

    def add(self, where: slice, up: Tensor, down: Tensor) -> None:
        """Members [b] that are in memory now."""
        if self.whole is None:
            self.parts.append((where, up.double(), down.double()))
            return
        flat = down.double().flatten(0, 1)  # [b·r, n]
        for total, weights in zip(self.whole, self.mixture[:, where], strict=True):
            total.addmm_((weights[:, None, None] * up).permute(1, 0, 2).flatten(1), flat)

    def cut(self, number: int, rank: int) -> tuple[Tensor, Tensor]:
        """The factors of this sum, at its best of a rank; float32."""
        import torch

        if self.whole is not None:
            out, n = self.whole.shape[1:]
            one = torch.eye(min(out, n), dtype=torch.float64)
            pair = LowRank(one, self.whole[number]) if out <= n else LowRank(self.whole[number], one)
        else:
            ups = torch.cat([self.mixture[number, where, None, None] * up for where, up, _ in self.parts])
            downs = torch.cat([down for _, _, down in self.parts])
            pair = LowRank(ups.permute(1, 0, 2).flatten(1), downs.flatten(0, 1))
        kept = truncate(pair, rank).lowrank
        return kept.up.float(), kept.down.float()


def _summed(
    mixture: Tensor, space: Space, members: Sequence[int], ranks: Sequence[int]
) -> list[list[tuple[Tensor, Tensor]]]:
    """Of each mixture [L, n] the factors of Σᵢ aᵢ ΔWᵢ, module by module, cut to the ranks."""
    sums = [_Sums.of(mixture, module) for module in space.layout.modules]
    for where, rows in space.blocks(list(members)):
        for each, (up, down) in zip(sums, space.layout.unflatten(rows), strict=True):
            each.add(where, up, down)
    return [[each.cut(i, rank) for each, rank in zip(sums, ranks, strict=True)] for i in range(len(mixture))]


def products_with(factors: Factors, space: Space, members: Sequence[int]) -> Tensor:
    """⟨ΔW, ΔWᵢ⟩ [n, members] in float64."""
    import torch

    found = torch.zeros(factors[0][0].shape[0], len(members), dtype=torch.float64)
    for where, rows in space.blocks(list(members)):
        found[:, where] = delta_gram(factors, space.layout.unflatten(rows))
    return found


# ------------------------------------------------------------------------------------------------ learning it


@dataclass(frozen=True, slots=True)
class Tiles:
    """How K [n, n] is computed: so many members are held, and so many come by at a time. nbytes: of memory in all."""

    held: int
    block: int
    nbytes: int

    @classmethod
    def plan(cls, space: Space, n: int, memory: int) -> Tiles:
        """Raises MemoryRefused, with what would do."""
        square = 40 * n * n  # K, its eigenvectors, and what decomposes it
        # A member's row, its factors in float64, and its products with another's in the widest module.
        rank = max(m.rank for m in space.layout.modules)
        each = 20 * space.width
        least = square + 2 * each + 24 * rank * rank
        if least > memory:
            what = f"the inner products of {n:,} LoRAs and two of these take {least / 2**20:,.0f} MiB"
            what += f", found {memory / 2**20:,.0f} MiB"
            hint = f"--memory {-(-least // 2**20)}MiB, or more held out; --geometry rows has no such limit"
            raise MemoryRefused("--memory", what, hint)
        room = memory - square
        held = max(1, min(n, room // 2 // each))
        block = max(1, min(held, 256, room // 4 // (each + 24 * rank * rank * held)))
        return cls(held, block, square + held * each + block * (each + 24 * rank * rank * held))


def inner_products(
    space: Space, members: Sequence[int], *, memory: int, processes: Processes, on_block: Callable[[int], None]
) -> Tensor:
    """⟨ΔWᵢ, ΔWⱼ⟩ [n, n] in float64, the same in each process. on_block: called with the bytes that are read."""
    import torch

    n = len(members)
    tiles = Tiles.plan(space, n, memory)
    found = torch.zeros(n, n, dtype=torch.float64)
    for number, start in enumerate(range(0, n, tiles.held)):
        if number % processes.count != processes.index:
            continue
        tile = slice(start, min(start + tiles.held, n))
        held = torch.cat([rows for _, rows in space.blocks(list(members[tile]), 4 * space.width * tiles.block)])
        on_block(held.numel())
        ours = space.layout.unflatten(held)
        for where, rows in _after(space, members, tile, held, tiles.block):
            if where.start >= tile.stop:
                on_block(rows.numel())
            found[tile, where] = delta_gram(ours, space.layout.unflatten(rows))
    found = processes.sum(found)
    return found.triu() + found.triu(1).mT


def _after(
    space: Space, members: Sequence[int], tile: slice, held: Tensor, height: int
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of the tile itself, and of all members behind it."""
    for start in range(0, len(held), height):
        rows = held[start : start + height]
        yield slice(tile.start + start, tile.start + start + len(rows)), rows
    for where, rows in space.blocks(list(members[tile.stop :]), 4 * space.width * height):
        yield slice(tile.stop + where.start, tile.stop + where.stop), rows


def delta_pca(products: Tensor, members: Sequence[int], components: int) -> DeltaPca:
    """The components of members whose inner products are `products` [n, n], at most as many as have any variance."""
    n = len(products)
    means = products.mean(1)
    centred = products - means[:, None] - means[None, :] + means.mean()
    values, vectors = _eigen(centred)
    kept = min(components, int((values > NO_VARIANCE * values[0].clamp_min(0)).sum()))
    values, vectors = values[:kept], vectors[:, :kept]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * largest.sign()
    roots = values.sqrt()
    weights = vectors / roots
    return DeltaPca(
        tuple(members), weights, vectors * roots, means @ weights, roots / (n - 1) ** 0.5,
        float(centred.trace()) / (n - 1),
    )  # fmt: skip


def _eigen(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the largest first, and their vectors."""
    import torch

    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(0), vectors.flip(1)
