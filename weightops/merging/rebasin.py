"""Git re-basin by weight matching: the order in which a model's channels are most like another's. Knows tensors only.

The order of a group's channels for which ⟨A, B in that order⟩ is the largest is a linear assignment, solved exactly,
while all other groups stand. Source: Ainsworth et al. 2022, Git Re-Basin: merging models modulo permutation symmetries,
arXiv:2209.04836, §3.2; Crouse 2016, On implementing 2D rectangular assignment algorithms (scipy's solver).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    # Which channel of the other model lies, or is to lie, in each place.
    Order = NDArray[np.int64]
    Matrix = NDArray[np.floating[Any]]

# Values of each model that are looked at in one stroke, whatever the memory: sums depend on it.
STRIP = 1 << 20
# Products of so few channels cost nothing in float64.
SMALL = 512
# What sums of products may be off, relative to the norms of what was multiplied: a smaller gain is none.
ROUNDING = 2.0**-17


def check_scipy() -> None:
    """Raises UsageError where scipy, which is an extra, is not installed."""
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        raise UsageError("--rebasin", "needs scipy", 'pip install "weightops[rebasin]"') from None


# ------------------------------------------------------------------------------------------------ likeness


@dataclass(slots=True)
class Products:
    """⟨channel i of A, channel j of B⟩ of one lane, as far as they are summed up; and ‖channel‖² of each, alike."""

    inner: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def zeros(cls, size: int, device: Any) -> Products:
        import torch

        dtype = torch.float64 if size <= SMALL else torch.float32
        inner = torch.zeros((size, size), dtype=dtype, device=device)
        return cls(inner, *(torch.zeros(size, dtype=torch.float64, device=device) for _ in range(2)))

    def add(self, a: Tensor, b: Tensor, axis: int, copies: int, other: Order | None) -> None:
        """Take in what two tensors of one shape say, whose channels lie along `axis`, `copies` times.

        other: the order in which b is taken along its other axis, of the first two (None: as it is).
        """
        import torch

        a, b = _three(a, axis), _three(b, axis)
        size, across = len(self.first), a.shape[1]
        taken = None if other is None else torch.from_numpy(other).to(b.device)
        step = max(1, STRIP // max(size * a.shape[2], 1))
        for copy in range(copies):
            part = slice(copy * size, (copy + 1) * size)
            for start in range(0, across, step):
                x = a[part, start : start + step]
                strip = slice(start, start + step)
                y = b[part, strip] if taken is None else _selected(b[part], 1, taken[strip])
                x, y = (v.to(self.inner.dtype).reshape(size, -1) for v in (x, y))
                self.inner.addmm_(x, y.T)
                self.first += x.square().sum(1, dtype=torch.float64)
                self.second += y.square().sum(1, dtype=torch.float64)

    def plus(self, other: Products) -> Products:
        """This, with what was summed up apart from it."""
        self.inner += other.inner
        self.first += other.first
        self.second += other.second
        return self

    def to(self, device: str) -> Products:
        return Products(self.inner.to(device), self.first.to(device), self.second.to(device))


def _three(x: Tensor, axis: int) -> Tensor:
    """[channels, the other of the first two axes, what a kernel has]."""
    x = x.reshape(x.shape[0], x.shape[1] if x.ndim > 1 else 1, -1)
    return x.transpose(0, 1) if axis else x


def _selected(x: Tensor, axis: int, taken: Tensor) -> Tensor:
    """`index_select`, also of codes of one byte, which torch does not index."""
    import torch

    if x.element_size() > 1:
        return x.index_select(axis, taken)
    return x.view(torch.uint8).index_select(axis, taken).view(x.dtype)


def products_nbytes(size: int) -> int:
    """Of one Products."""
    return (8 if size <= SMALL else 4) * size * size + 16 * size


def strip_nbytes(size: int, kernel: int, other: int) -> int:
    """Of the working copies of `Products.add`, at most: of both, as they are stored and twice wide; one squared."""
    values = size * kernel * max(1, min(other, STRIP // max(size * kernel, 1)))
    return values * (2 * 8 + 5 * (8 if size <= SMALL else 4))


def alike(a: Tensor, b: Tensor, orders: tuple[Order | None, Order | None]) -> tuple[float, float, float, float]:
    """⟨A, B⟩, ⟨A, B in these orders along its first two axes⟩, ‖A‖², ‖B‖², in float64."""
    import torch

    a, b = _three(a, 0), _three(b, 0)
    step = max(1, STRIP // max(a.shape[1] * a.shape[2], 1))
    first, second = (None if order is None else torch.from_numpy(order).to(b.device) for order in orders)
    found = torch.zeros(4, dtype=torch.float64, device=a.device)
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        moved = b[rows] if first is None else _selected(b, 0, first[rows])
        moved = (moved if second is None else _selected(moved, 1, second)).double()
        x, y = a[rows].double(), b[rows].double()
        found += torch.stack([(x * y).sum(), (x * moved).sum(), x.square().sum(), y.square().sum()])
    before, after, of_a, of_b = found.tolist()
    return before, after, of_a, of_b


def alike_nbytes(shape: Sequence[int]) -> int:
    """Of the working copies of `alike`, at most."""
    values = 1
    for length in shape:
        values *= length
    row = values // shape[0] if shape and shape[0] else 1
    return 56 * max(min(values, STRIP), row)


# ------------------------------------------------------------------------------------------------ the best order


def match(lanes: Sequence[Products], now: Sequence[Order], blocks: int) -> tuple[Order, ...]:
    """The orders of a group's lanes that make A and B most alike, exactly, where the rest of both stands.

    Channels lie in blocks: a block may trade places with a block, in all lanes alike, and within a block any channel
    with any other. Where a change of `now` gains no more than rounding, there is none.
    """
    if blocks == 1:
        return tuple(_matched(lane, order) for lane, order in zip(lanes, now, strict=True))
    return _Blocks(lanes, now, blocks).orders()


def _matched(lane: Products, now: Order) -> Order:
    """The best order of channels that know no blocks."""
    import numpy as np

    inner, first, second = _arrays(lane)
    best = _assignment(inner)
    rows = np.arange(len(now))
    gain = inner[rows, best].astype(np.float64) - inner[rows, now]
    return _worth(best, now, gain, ROUNDING * first * (second[best] + second[now]))


def _arrays(lane: Products) -> tuple[Matrix, Matrix, Matrix]:
    """The products, and the norms of the channels of both."""
    return lane.inner.numpy(force=True), lane.first.sqrt().numpy(force=True), lane.second.sqrt().numpy(force=True)


def _assignment(inner: Matrix) -> Order:
    """For each row the column, each taken once, such that the sum is the largest."""
    import numpy as np

    best: Order = inner.argmax(axis=1).astype(np.int64)
    if len(np.unique(best)) == len(best):  # every row has its largest: no sum is larger
        return best
    from scipy.optimize import linear_sum_assignment

    # In float64, which it would make of it all the same; not `maximize`, which makes another copy.
    best = linear_sum_assignment(np.negative(inner, dtype=np.float64))[1].astype(np.int64)
    return best


def match_nbytes(sizes: Sequence[int], blocks: int) -> int:
    """Of the working copies of `match`, at most: the largest assignment in float64, and what is kept by channel."""
    largest = max(sizes) // blocks
    return 8 * largest * largest + 8 * blocks * blocks * 4 + sum(256 * size for size in sizes)


def _worth(best: Order, now: Order, gain: Matrix, rounding: Matrix) -> Order:
    """`best`, but for the cycles of trades, from `now` on, that gain no more than rounding: there, `now`."""
    import numpy as np

    where = np.empty_like(now)
    where[now] = np.arange(len(now))
    trades = where[best]  # the place from which each place takes
    found = best.copy()
    seen = trades == np.arange(len(trades))
    for start in np.flatnonzero(~seen).tolist():
        if seen[start]:
            continue
        cycle = []
        place = start
        while not seen[place]:
            seen[place] = True
            cycle.append(place)
            place = int(trades[place])
        if gain[cycle].sum() <= rounding[cycle].sum():
            found[cycle] = now[cycle]
    return found


class _Blocks:
    """The assignment of blocks, each pair of which is an assignment of its own, or one for each lane."""

    def __init__(self, lanes: Sequence[Products], now: Sequence[Order], blocks: int) -> None:
        import numpy as np

        self.blocks = blocks
        self.now = now
        self.widths = [len(order) // blocks for order in now]
        self.arrays = [_arrays(lane) for lane in lanes]
        self.cut = [
            inner.reshape(blocks, width, blocks, width)
            for (inner, _, _), width in zip(self.arrays, self.widths, strict=True)
        ]
        self.standing: Order = now[0][:: self.widths[0]] // self.widths[0]
        self.inside: dict[tuple[int, int], list[Order]] = {}
        # No order within two blocks gives more than every row's largest, nor more than every column's.
        self.worth: Matrix = np.zeros((blocks, blocks))
        for cut in self.cut:
            by_rows = cut.max(axis=3).sum(axis=1, dtype=np.float64)
            by_columns = cut.max(axis=1).sum(axis=2, dtype=np.float64)
            self.worth += np.minimum(by_rows, by_columns)

    def orders(self) -> tuple[Order, ...]:
        import numpy as np

        rows = np.arange(self.blocks)
        for i, j in zip(rows.tolist(), self.standing.tolist(), strict=True):
            self._look(i, j)
        # Bounds that are too high only ask for a closer look: where an assignment rests on none, it is the best.
        while True:
            best = _assignment(self.worth)
            unknown = [pair for pair in zip(rows.tolist(), best.tolist(), strict=True) if pair not in self.inside]
            if not unknown:
                break
            for pair in unknown:
                self._look(*pair)
        gain = self.worth[rows, best] - self.worth[rows, self.standing]
        first, second = (np.sqrt(sum(self._squares(n, lane) for lane in range(len(self.cut)))) for n in (1, 2))
        chosen = _worth(best, self.standing, gain, ROUNDING * first * (second[best] + second[self.standing]))
        return tuple(
            np.concatenate([j * width + self.inside[i, j][lane] for i, j in enumerate(chosen.tolist())])
            for lane, width in enumerate(self.widths)
        )

    def _squares(self, number: int, lane: int) -> Matrix:
        """‖block‖² of A (1) or B (2)."""
        squares: Matrix = (self.arrays[lane][number] ** 2).reshape(self.blocks, -1).sum(axis=1)
        return squares

    def _look(self, i: int, j: int) -> None:
        """The best order within A's block i and B's block j, and what it is worth."""
        import numpy as np

        total = 0.0
        inside = []
        for cut, order, width, (_, first, second) in zip(self.cut, self.now, self.widths, self.arrays, strict=True):
            inner = cut[i, :, j]
            rows = np.arange(width)
            now = order[i * width : (i + 1) * width] - j * width if self.standing[i] == j else rows
            best = _assignment(inner)
            gain = inner[rows, best].astype(np.float64) - inner[rows, now]
            norms = second[j * width : (j + 1) * width]
            rounding = ROUNDING * first[i * width : (i + 1) * width] * (norms[best] + norms[now])
            inside.append(_worth(best, now, gain, rounding))
            total += float(inner[rows, inside[-1]].sum(dtype=np.float64))
        self.inside[i, j] = inside
        self.worth[i, j] = total


def expanded(order: Order, copies: int) -> Order:
    """The order of an axis in which the channels lie so many times."""
    import numpy as np

    return np.concatenate([order + copy * len(order) for copy in range(copies)])
