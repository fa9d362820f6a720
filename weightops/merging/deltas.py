"""Ways to combine several changes of one weight into one: functions whose signature and docstring declare them.

A change is a matrix: ΔW of a LoRA, or a model's difference from its base. Knows no files, no names and no factors.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from weightops.errors import MismatchError, UsageError
from weightops.merging.method import Parameter, Share, Weights, checked, parameters_of, summary_of
from weightops.registry import Registry

if TYPE_CHECKING:
    from torch import Generator, Tensor

Gram = Sequence[Sequence[float]]
Random = Callable[[int], "Generator"]

BAND_VALUES = 256 * 1024  # at a time, or one row: their working copies stay in the cache

_PARALLEL = 1e-7  # the sine of an angle below which slerp is lerp, to float64's last digits
_OPPOSITE = 1e-3  # the sine of an angle beyond which the rounding of factors would decide which way slerp goes
_DEPENDENT = 1e-12  # the share of a squared norm that the rounding of factors leaves of a change that is no news

DELTA_METHODS: Registry[DeltaMethod] = Registry("way to combine", "weightops.merging.methods")


class Delta(Protocol):
    """A change [out, n] that gives its rows, in float32 or float64: the same bits each time it is asked for them."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def rows(self, rows: slice) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class DeltaMethod:
    """A way to combine changes, of one of two kinds, which its function's first parameter tells.

    linear: `function(gram, *, weights, **settings)` gives numbers c, and the result is Σ cᵢ·Δᵢ. gram holds the
    Frobenius inner products of the changes, so that none is ever built. Elementwise, else:
    `function(deltas, out, *, weights, **settings)` fills `out`, in whose dtype it computes.
    draws: it also needs random=…. count: of the changes that it takes, None for any.
    refuse: raises UsageError for weights and settings that do not go together.
    """

    name: str
    function: Callable[..., Any]
    linear: bool
    draws: bool
    parameters: tuple[Parameter, ...]
    summary: str
    count: int | None
    refuse: Callable[[Weights, Mapping[str, Any]], None] | None

    def check(self, given: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
        """All settings with their values, checked. Raises UsageError for these, and for weights that it cannot use."""
        values = checked(self.name, self.parameters, given)
        if self.count not in (None, len(weights)):
            raise UsageError(self.name, f"found {len(weights)} to combine, expected {self.count}")
        if self.refuse is not None:
            self.refuse(weights, values)
        return values

    def coefficients(self, gram: Gram, weights: Weights, settings: Mapping[str, Any]) -> list[float]:
        """The numbers c of a linear one. Raises MismatchError where these changes have no such combination."""
        found: list[float] = self.function(gram, weights=weights, **settings)
        return found

    def fill(
        self, deltas: Sequence[Delta], out: Tensor, *, weights: Weights, settings: Mapping[str, Any], random: Random
    ) -> None:
        """Fill `out` [out, n], contiguous, float32 or float64, by an elementwise one.

        random: the generator of a block of rows, by its number. Blocks, which are the bands, follow from the shape.
        """
        shapes = {tuple(d.shape) for d in deltas} | {tuple(out.shape)}
        if len(shapes) != 1 or len(deltas) != len(weights):
            raise ValueError(f"{len(deltas)} changes with {len(weights)} weights, of shapes {sorted(shapes)}")
        handed = {"random": random} if self.draws else {}
        self.function(deltas, out, weights=weights, **settings, **handed)

    def nbytes(self, out: int, n: int, count: int, *, size: int = 4) -> int:
        """The most that `fill` takes beside `out`, whose values have `size` bytes, and beside what the changes hold."""
        if self.linear:
            return 0
        # Each weighted change, and where signs are elected or magnitudes ranked, up to four copies more; beside a
        # change's own rows, which may be in float64, random numbers and their comparison; or the places of a sort.
        return min(_height(n), out) * n * (size * (count + 4) + 8 + 8)


def delta_method(
    *, count: int | None = None, refuse: Callable[[Weights, Mapping[str, Any]], None] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as a way to combine changes, under its name (without an underscore at its end).

    Its first parameter, gram or deltas, tells its kind; weights and random are handed in, the others are settings.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(function).parameters)
        method = DeltaMethod(
            name=function.__name__.rstrip("_"),
            function=function,
            linear=names[0] == "gram",
            draws="random" in names,
            parameters=parameters_of(function, handed=("weights", "random")),
            summary=summary_of(function),
            count=count,
            refuse=refuse,
        )
        DELTA_METHODS.register(method.name, method)
        return function

    return register


# ------------------------------------------------------------------------------------------------ linear


@delta_method()
def sum_(gram: Gram, /, *, weights: Weights) -> list[float]:
    """Σ wᵢ·Δᵢ: every change at its strength.

    Source: Ilharco et al. 2023, arXiv:2212.04089 (task arithmetic). Weights are used as they are given, of products:
    tools that add up factors, each times its weight, get w² and mixed terms.
    """
    return list(weights)


def _refuse_shares(weights: Weights, _settings: Mapping[str, Any]) -> None:
    for weight in weights:
        if weight < 0:
            raise UsageError("slerp, weights", f"found {weight:g}, expected none below 0")
    if not math.fsum(weights):
        raise UsageError("slerp, weights", "found 0 for both, expected one above 0")


@delta_method(count=2, refuse=_refuse_shares)
def slerp(gram: Gram, /, *, weights: Weights) -> list[float]:
    """Two changes: a direction on the arc between theirs, a length between theirs, t = w₂ / (w₁ + w₂) of the way.

    Weights are shares, not strengths: doubled, they give the same. Where one change is zero, the other's direction is
    kept, and all is linear.
    Source: Shoemake 1985, Animating rotation with quaternion curves. sd-mecha's slerp is this one. mergekit's slerp and
    nuslerp weigh the changes themselves by the two sines, not their directions, so that the longer one pulls more; its
    slerp is linear wherever |cos| is over 0.9995. Opposite directions, between which there is no one arc, all of them
    take linearly, which leaves next to nothing of both; here they are refused.
    """
    a, b = math.sqrt(max(gram[0][0], 0.0)), math.sqrt(max(gram[1][1], 0.0))
    t = weights[1] / math.fsum(weights)
    first, second = 1 - t, t
    if not (a and b):
        return [first, second]
    length = (1 - t) * a + t * b
    angle = math.acos(max(-1.0, min(1.0, gram[0][1] / (a * b))))
    sine = math.sin(angle)
    if gram[0][1] < 0 and sine < _OPPOSITE:
        what = "two changes point in opposite directions, and no arc between them is shorter than the others"
        raise MismatchError("slerp", what, "leave this one out, or combine by sum")
    if sine > _PARALLEL:
        first, second = math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine
    return [first * length / a, second * length / b]


@delta_method()
def orthogonal(gram: Gram, /, *, weights: Weights) -> list[float]:
    """Σ wᵢ·Δᵢ', where Δᵢ' is what is new in Δᵢ: what those before it span is taken away, so that order counts.

    Of a change that is a sum of those before it nothing is left.
    Source: Gram-Schmidt, with the Frobenius inner product of whole matrices. sd-mecha's perpendicular is the case of
    two.
    """

    def inner(x: Sequence[float], y: Sequence[float]) -> float:
        return math.fsum(p * g * q for p, row in zip(x, gram, strict=True) for g, q in zip(row, y, strict=True))

    kept: list[tuple[list[float], float]] = []
    total = [0.0] * len(weights)
    for i, weight in enumerate(weights):
        new = [float(i == j) for j in range(len(weights))]
        for other, squared in kept:
            share = inner(new, other) / squared
            new = [x - share * y for x, y in zip(new, other, strict=True)]
        squared = inner(new, new)
        if squared > _DEPENDENT * gram[i][i]:
            kept.append((new, squared))
            total = [x + weight * y for x, y in zip(total, new, strict=True)]
    return total


# ------------------------------------------------------------------------------------------------ elementwise


@delta_method()
def magnitude(deltas: Sequence[Delta], out: Tensor, /, *, weights: Weights, density: Share = 0.5) -> None:
    """Σ wᵢ·δᵢ, where δᵢ keeps the largest values of Δᵢ, so many that their share of all is `density`.

    What equals the smallest value that is kept is kept too. As PEFT's magnitude_prune, which rounds the number of
    values down and of equal ones keeps some; nothing is rescaled, where mergekit can restore the sum of magnitudes.
    """
    for rows, changes in _trimmed(deltas, out, weights, density):
        _add_up(changes, out[rows])


@delta_method()
def ties(
    deltas: Sequence[Delta], out: Tensor, /, *, weights: Weights, density: Share = 0.2, count_votes: bool = False,
    normalize: bool = True,
) -> None:  # fmt: skip
    """Trimmed as by magnitude; then for each value a sign is elected, and the mean taken of those that agree.

    The sign is that of Σ wᵢ·δᵢ, or, with count_votes, that of most wᵢ·δᵢ. The mean is weighted, so that weights are
    shares and not strengths: doubled, they give the same. Without normalize it is the sum, and they are strengths.
    Under a negative weight a change votes as what it would add, and stands in the mean with |w|. A tie leaves 0.
    Source: Yadav et al. 2023, arXiv:2306.01708, without weights. mergekit keeps all by default (density 1), divides by
    the sum of signed weights, and as PEFT gives a tie to the positive; PEFT votes without weights and divides by the
    number of those that agree; sd-mecha counts votes by default.
    """
    for rows, changes in _trimmed(deltas, out, weights, density):
        _elect(changes, out[rows], weights, count_votes=count_votes, normalize=normalize)


@delta_method()
def dare(deltas: Sequence[Delta], out: Tensor, /, *, weights: Weights, random: Random, density: Share = 0.5) -> None:
    """Σ wᵢ·δᵢ, where δᵢ keeps each value of Δᵢ by chance, `density` of them, divided by density: Σ wᵢ·Δᵢ on average.

    Source: Yu et al. 2023, arXiv:2311.03099, who drop up to 0.9 and more. PEFT's dare_linear is the same; mergekit
    rescales so that the sum of magnitudes is as before. sd-mecha's ties_sum_with_dropout drops 0.9 by default.
    """
    for rows, changes in _dropped(deltas, out, weights, random, density):
        _add_up(changes, out[rows])


@delta_method()
def dare_ties(
    deltas: Sequence[Delta], out: Tensor, /, *, weights: Weights, random: Random, density: Share = 0.5,
    count_votes: bool = False, normalize: bool = True,
) -> None:  # fmt: skip
    """Dropped as by dare; then for each value a sign is elected, and the mean taken of those that agree, as by ties.

    The mean is of those that were kept, so that it is larger than without dropping wherever several agree; without
    normalize, which is mergekit's default here, it is not.
    Source: Yu et al. 2023, arXiv:2311.03099, and Yadav et al. 2023, arXiv:2306.01708.
    """
    for rows, changes in _dropped(deltas, out, weights, random, density):
        _elect(changes, out[rows], weights, count_votes=count_votes, normalize=normalize)


def _refuse_epsilon(_weights: Weights, settings: Mapping[str, Any]) -> None:
    density, epsilon = settings["density"], settings["epsilon"]
    if epsilon < 0:
        raise UsageError("della, epsilon", f"found {epsilon:g}, expected 0 or more")
    if density < 1 and not epsilon < density <= 1 - epsilon + 1e-12:
        what = f"found {epsilon:g} with a density of {density:g}"
        raise UsageError("della, epsilon", f"{what}, expected less than {density:g} and at most {1 - density:g}")


@delta_method(refuse=_refuse_epsilon)
def della(
    deltas: Sequence[Delta], out: Tensor, /, *, weights: Weights, random: Random, density: Share = 0.5,
    epsilon: float = 0.15, count_votes: bool = False, normalize: bool = True,
) -> None:  # fmt: skip
    """As dare_ties, but the larger a value is within its row, the likelier it is kept: density ± epsilon, by rank.

    Each is divided by its own chance. With a density of 1 all are kept, whatever epsilon is.
    Source: Deep et al. 2024, arXiv:2406.11617; the range is that of its authors' code (whose epsilon is 0.05), and of
    mergekit (0.15), which divides not by the chance but restores the sum of magnitudes. sd-mecha ranks the whole
    matrix, in a range half as wide, and divides all by the density.
    """
    for rows, changes in _dropped(deltas, out, weights, random, density, epsilon if density < 1 else 0.0):
        _elect(changes, out[rows], weights, count_votes=count_votes, normalize=normalize)


# ------------------------------------------------------------------------------------------------ bands of rows


def _height(n: int) -> int:
    return max(1, BAND_VALUES // max(n, 1))


def _bands(out: Tensor) -> Iterator[slice]:
    """Bands of rows whose height follows from the shape alone: so do products of matrices, and random numbers."""
    height = _height(out.shape[1])
    return (slice(start, start + height) for start in range(0, len(out), height))


def _trimmed(
    deltas: Sequence[Delta], out: Tensor, weights: Weights, density: float
) -> Iterator[tuple[slice, Iterator[Tensor]]]:
    """Each band of rows, and there wᵢ·δᵢ of each change in turn: 0 where |Δᵢ| is not among its largest."""
    limits = [_limit(delta, out, density) for delta in deltas]

    def trimmed(rows: slice) -> Iterator[Tensor]:
        for delta, weight, limit in zip(deltas, weights, limits, strict=True):
            change = delta.rows(rows).to(out.dtype)
            # NaN is not below any limit: it stays, to be found in the result.
            yield (change * weight).masked_fill_(change.abs() < limit, 0.0)

    for rows in _bands(out):
        yield rows, trimmed(rows)


def _limit(delta: Delta, out: Tensor, density: float) -> float:
    """The smallest of the largest magnitudes, of which there are density · values, rounded, and at least one.

    Exact: `out` holds them all, as scratch.
    """
    import torch

    below = out.numel() - max(1, round(density * out.numel()))
    if below <= 0:
        return 0.0
    for rows in _bands(out):
        torch.abs(delta.rows(rows).to(out.dtype), out=out[rows])
    values = out.view(-1)
    if out.device.type != "cpu":
        return float(values.kthvalue(below + 1).values)
    # In place and in half the time of torch's, which takes a copy and as many indices.
    values.numpy().partition(below)
    return float(values[below])


def _dropped(
    deltas: Sequence[Delta], out: Tensor, weights: Weights, random: Random, density: float, epsilon: float = 0.0
) -> Iterator[tuple[slice, Iterator[Tensor]]]:
    """Each band of rows, and there wᵢ·δᵢ of each change in turn: 0 where it was dropped by chance, else rescaled."""
    import torch

    def dropped(rows: slice, generator: Generator) -> Iterator[Tensor]:
        for delta, weight in zip(deltas, weights, strict=True):
            change = delta.rows(rows).to(out.dtype)
            # In float32 whatever `out` is: the same values are kept. 2⁻²⁴ is fine enough a step of chances.
            drawn = torch.rand(change.shape, generator=generator, device=generator.device, dtype=torch.float32)
            chance = _chances(change, density, epsilon) if epsilon else density
            yield (change * weight).div_(chance).masked_fill_(drawn.to(change.device) >= chance, 0.0)

    for block, rows in enumerate(_bands(out)):
        yield rows, dropped(rows, random(block))


def _chances(change: Tensor, density: float, epsilon: float) -> Tensor:
    """The chance of each value to be kept: density ± epsilon, evenly by the rank of its magnitude in its row."""
    import torch

    order = change.abs().argsort(dim=1, stable=True)
    n = change.shape[1]
    low, high = (density - epsilon, density + epsilon) if n > 1 else (density, density)
    ramp = torch.linspace(low, high, n, dtype=change.dtype, device=change.device)
    return torch.empty_like(change).scatter_(1, order, ramp.expand_as(change))


def _add_up(changes: Iterable[Tensor], out: Tensor) -> None:
    out.zero_()
    for change in changes:
        out.add_(change)


def _elect(changes: Iterable[Tensor], out: Tensor, weights: Weights, *, count_votes: bool, normalize: bool) -> None:
    """Of weighted changes, those of the elected sign, added up; or over the |w| of these, which makes it their mean."""
    import torch

    changes = list(changes)
    _add_up((c.sign() for c in changes) if count_votes else changes, out)
    elected = out.sign()
    share = torch.zeros_like(out)
    out.zero_()
    for change, weight in zip(changes, weights, strict=True):
        against = change * elected <= 0
        out.add_(change.masked_fill_(against, 0.0))
        share.add_(against.logical_not_(), alpha=abs(weight))
    if normalize:
        out.div_(share.masked_fill_(share == 0, 1.0))
