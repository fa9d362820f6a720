"""sd-scripts' arithmetic for LoRA + LoRA, for whoever must repeat its numbers: tensors in, tensors out.

It knows no file and no name. It is not the sum of the changes, and says by how much: `gains`, `what_differs`.
Source: the formulas of kohya-ss/sd-scripts, networks/merge_lora.py without --sd_model, read at 48d368f (2026-02-16).
"""

from __future__ import annotations

import functools
import math
import operator
from typing import TYPE_CHECKING, NamedTuple, Protocol

from weightops.errors import MismatchError, quote

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class CompatTerm(NamedTuple):
    """One LoRA's part in a module: its factors as its file holds them, its alpha (None: it has none), its ratio.

    up [out, rank, …] and down [rank, in, …], with ones or a kernel behind, or nothing.
    """

    up: Tensor
    down: Tensor
    alpha: float | None
    ratio: float

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def strength(self) -> float:
        """alpha, which is the rank where there is none."""
        return float(self.rank) if self.alpha is None else self.alpha


class Shapes(NamedTuple):
    """A LoRA's part in a module without its values: the shapes of up and down, and alpha (None: it has none)."""

    up: tuple[int, ...]
    down: tuple[int, ...]
    alpha: float | None

    @property
    def rank(self) -> int:
        return self.down[0]

    @property
    def strength(self) -> float:
        return float(self.rank) if self.alpha is None else self.alpha


class Part(NamedTuple):
    """A LoRA's ratio and its rank in a module: what its strength comes out as follows from these alone."""

    ratio: float
    rank: int


class _Weighed(Protocol):
    @property
    def ratio(self) -> float: ...
    @property
    def rank(self) -> int: ...


def merged(terms: Sequence[CompatTerm], *, concat: bool, label: str, module: str) -> tuple[Tensor, Tensor, float]:
    """up, down and alpha of one module, from the files that have it, in their order, as sd-scripts merges them.

    up = Σ |sᵢ| upᵢ, down = Σ sᵢ downᵢ and alpha = α₁, with sᵢ = ratioᵢ √(αᵢ/α₁); or, with concat, the same terms side
    by side, ranks added. Only down takes the sign of a ratio, so that of the product is the ratio's. In float32, which
    is sd-scripts' --precision float; in fp16 or bf16 it rounds each file's factors and alphas when it loads them, each
    term and each partial sum, and, of bf16, cannot read an alpha. --shuffle reorders the ranks and changes no product.

    label, module: of the refusals. Raises MismatchError where sd-scripts stops: at shapes that differ (ranks too,
    unless concat), and at alphas of which the root cannot be taken.
    """
    import torch

    shapes = [Shapes(tuple(term.up.shape), tuple(term.down.shape), term.alpha) for term in terms]
    check(shapes, concat=concat, label=label, module=module)
    first = terms[0].strength
    scales = [math.sqrt(term.strength / first) * term.ratio for term in terms]
    ups = [term.up.float() * abs(scale) for term, scale in zip(terms, scales, strict=True)]
    downs = [term.down.float() * scale for term, scale in zip(terms, scales, strict=True)]
    if concat:
        return torch.cat(ups, 1), torch.cat(downs, 0), first
    return functools.reduce(operator.add, ups), functools.reduce(operator.add, downs), first


def check(terms: Sequence[Shapes], *, concat: bool, label: str, module: str) -> None:
    """Raises MismatchError where sd-scripts stops; see `merged`."""
    ranks = [term.rank for term in terms]
    if len(set(ranks)) > 1 and not concat:
        what = f"{quote(module)} has ranks {_numbers(ranks)}, and sd-scripts adds factors of one rank alone"
        raise MismatchError(label, what, "concatenated, ranks may differ; the exact sum takes any")
    shapes = [(term.up[:1] + term.up[2:], term.down[1:]) for term in terms]
    other = next((term for term, shape in zip(terms, shapes, strict=True) if shape != shapes[0]), None)
    if other is not None:
        one, two = (f"{list(term.up)} and {list(term.down)}" for term in (terms[0], other))
        what = f"{quote(module)} has factors of {one} in one LoRA, and of {two} in another"
        raise MismatchError(label, what, "sd-scripts takes no linear layer for a 1x1 convolution")
    first = terms[0].strength
    if first == 0 or not all(0 <= term.strength / first < math.inf for term in terms):
        alphas = _numbers([term.strength for term in terms])
        what = f"{quote(module)} has alphas {alphas}, and sd-scripts takes the root of each over the first"
        raise MismatchError(label, what, "the exact sum takes any alpha")


def _numbers(values: Sequence[float]) -> str:
    """At most five, as they are typed: 0.7, 0.5 and 1."""
    shown = [f"{value:g}" for value in values[:5]]
    if len(values) > 5:
        return f"{', '.join(shown)} (and {len(values) - 5:,} more)"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


# ------------------------------------------------------------------------------------------------ what it is not


def gains(terms: Sequence[_Weighed], *, concat: bool) -> tuple[float, ...]:
    """How strong each LoRA's own change comes out; its ratio is what was asked for.

    Added, ratio·|ratio|, whatever the alphas: the first one's cancels. With concat, this times the share that a LoRA
    has of the ranks, for a change is alpha / rank of its factors, and the ranks are added where the alphas are not.
    """
    total = sum(term.rank for term in terms)
    return tuple(term.ratio * abs(term.ratio) * (term.rank / total if concat else 1.0) for term in terms)


def what_differs(terms: Sequence[_Weighed], *, concat: bool) -> str:
    """One sentence for a warning: in what these numbers are not Σ ratio · ΔW, with those of this module."""
    asked, got = _numbers([term.ratio for term in terms]), _numbers(gains(terms, concat=concat))
    squared = "sd-scripts multiplies both factors by the ratio"
    if concat:
        ranks = _numbers([term.rank for term in terms])
        return f"{squared} and keeps the first alpha for the ranks {ranks} together: {asked} act as {got}"
    if len(terms) == 1:
        return f"{squared}: {asked} acts as {got}"
    return f"{squared}, so that {asked} act as {got}, and adds factors, so that each up meets every other's down too"
