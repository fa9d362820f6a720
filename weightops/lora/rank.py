"""RankRule: how many singular values to keep, of one matrix or of many that share a size. Plain numbers; no tensors."""

from __future__ import annotations

import bisect
import difflib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from weightops.errors import UsageError, quote

Values = Sequence[float]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30,
          "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}  # fmt: skip


class Kind(NamedTuple):
    """A way to choose: how it is written, what it may be set to, and the rank it gives (values, setting, energy)."""

    written: str
    low: float
    high: float
    choose: Callable[[Values, float, float], int] | None
    whole: bool = False  # needs every singular value, not only the largest


@dataclass(frozen=True, slots=True)
class RankRule:
    """`kind` and its setting `value`; never more than `cap` ranks, and never a singular value that is zero.

    So a matrix of zeros has rank 0, where sd-scripts keeps 1.
    """

    kind: str
    value: float
    cap: int | None = None

    @classmethod
    def parse(cls, text: str, *, cap: int | None = None, where: str = "--rank") -> RankRule:
        """A rule as it is typed, 32 or energy:0.98 or size:32MiB: see KINDS. Raises UsageError."""
        text = text.strip()
        if re.fullmatch(r"[0-9]{1,6}", text):
            return cls("rank", int(text), cap)
        name, colon, setting = text.partition(":")
        kind = KINDS.get(name)
        if kind is None or name == "rank":
            near = difflib.get_close_matches(name, KINDS, n=1)
            known = ", ".join(k.written for k in KINDS.values())
            hint = f"did you mean {near[0]!r}?" if near else None
            raise UsageError(where, f"found {quote(text)}, expected {known}", hint)
        value = _number(name, setting)
        if value is None or not kind.low < value <= kind.high or bool(colon) != (":" in kind.written):
            raise UsageError(where, f"found {quote(text)}, expected {kind.written}")
        return cls(name, value, cap)

    @property
    def said(self) -> str:
        """The rule as it can be typed."""
        if self.kind == "knee":
            return self.kind
        return ("" if self.kind == "rank" else f"{self.kind}:") + f"{self.value:.12g}"

    @property
    def needs_all(self) -> bool:
        """Does the choice need every singular value, however small?"""
        return KINDS[self.kind].whole or (self.cap is None and self.kind != "rank")

    def most(self, out: int, n: int) -> int:
        """The largest rank that this rule can give a matrix [out, n]."""
        bounds = [out, n, *([] if self.cap is None else [self.cap])]
        return min(*bounds, int(self.value)) if self.kind == "rank" else min(bounds)

    def choose(self, singular_values: Values, out: int, n: int, total_energy: float) -> int:
        """The rank for a matrix [out, n], from its singular values, largest first, and the sum of all their squares.

        The values may be the largest few alone, as many as `most` says, unless `needs_all`. Of a rule for many
        matrices, `size`, there is no rank for one: ValueError.
        """
        chooser = KINDS[self.kind].choose
        if chooser is None:
            raise ValueError(f"{self.kind} is for many matrices: allocate")
        there = sum(1 for v in singular_values if v > 0)
        if not there:
            return 0
        return max(0, min(chooser(singular_values, self.value, total_energy), self.most(out, n), there))


def rules_for(rank: int | str, conv_rank: int | str | None, *, cap: int | None = None, conv_cap: int | None = None
              ) -> tuple[RankRule, RankRule]:  # fmt: skip
    """The rules of --rank and --conv-rank (None: as --rank; 0: no convolutions). Raises UsageError.

    cap, conv_cap: the most ranks that a rule gives a matrix, a convolution (None: `cap`).
    """
    rule = RankRule.parse(str(rank), cap=cap)
    if rule.kind == "rank" and not rule.value:
        raise UsageError("--rank", "found 0, expected a rank of 1 or more, or a rule such as energy:0.9")
    conv_cap = cap if conv_cap is None else conv_cap
    if conv_rank is None:
        return rule, replace(rule, cap=conv_cap)
    conv_rule = RankRule.parse(str(conv_rank), where="--conv-rank", cap=conv_cap)
    if conv_rule.kind in OF_THE_FILE:
        raise UsageError("--conv-rank", f"{conv_rule.kind}: is of the whole file, and stands with --rank")
    if rule.kind in OF_THE_FILE and conv_rule.kind != "rank":
        raise UsageError("--conv-rank", f"beside --rank {rank} it is a number, the most that a convolution gets")
    return rule, conv_rule


def _number(name: str, setting: str) -> float | None:
    if name == "size":
        match = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)", setting.strip())
        if match is None or match.group(2).upper() not in _UNITS:
            return None
        return int(Fraction(match.group(1)) * _UNITS[match.group(2).upper()])
    if name == "knee":
        return 1.0 if not setting else None
    try:
        value = float(setting)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------------ one matrix


def _first(sums: Iterable[float], wanted: float) -> int:
    """The smallest rank whose sum reaches what is wanted; all of them, where none does."""
    rank = 0
    for reached in sums:
        rank += 1
        if reached >= wanted:
            break
    return rank


def _squares(values: Values) -> Iterable[float]:
    return itertools.accumulate(v * v for v in values)


def _rank(values: Values, setting: float, energy: float) -> int:
    """So many."""
    return int(setting)


def _energy(values: Values, share: float, energy: float) -> int:
    """The smallest r with Σ S[:r]² ≥ share · Σ S²."""
    return _first(_squares(values), share * energy)


def _error(values: Values, limit: float, energy: float) -> int:
    """The smallest r with √(Σ S[r:]² / Σ S²) ≤ limit."""
    return 0 if limit >= 1 else _first(_squares(values), (1 - limit * limit) * energy)


def _ratio(values: Values, t: float, energy: float) -> int:
    """#(S > S0/t): sd-scripts' sv_ratio since v0.11."""
    return sum(1 for v in values if v > values[0] / t)


def _cumulative(values: Values, t: float, energy: float) -> int:
    """searchsorted(cumsum(S)/ΣS, t) + 1: sd-scripts' sv_cumulative since v0.11."""
    total = math.fsum(values)
    return _first((s / total for s in itertools.accumulate(values)), t)


def _fro(values: Values, t: float, energy: float) -> int:
    """searchsorted(cumsum(S²)/ΣS², t²) + 1: sd-scripts' sv_fro since v0.11, where t is the share of the norm."""
    return _first((s / energy for s in _squares(values)), t * t)


def _knee(values: Values, setting: float, energy: float) -> int:
    """Up to the value farthest from the line between the first and the last: ComfyUI-KJNodes' sv_knee."""
    last = len(values) - 1
    if last < 2 or values[0] <= values[last]:
        return 1
    span = values[0] - values[last]
    distances = [abs(i / last + (v - values[last]) / span - 1) for i, v in enumerate(values)]
    return distances.index(max(distances)) + 1


KINDS: dict[str, Kind] = {
    "rank": Kind("a rank such as 32", 0, math.inf, _rank),
    "energy": Kind("energy:E with 0 < E <= 1, the share of the squared norm", 0, 1, _energy),
    "error": Kind("error:E with 0 < E <= 1, relative to the norm", 0, 1, _error),
    "size": Kind("size:BYTES such as size:32MiB, for the whole file", 0, 1 << 60, None),
    "ratio": Kind("ratio:T with T > 1, of the largest singular value to the smallest", 1, math.inf, _ratio),
    "cumulative": Kind("cumulative:T with 0 < T <= 1, the share of the sum", 0, 1, _cumulative, whole=True),
    "fro": Kind("fro:T with 0 < T <= 1, the share of the norm", 0, 1, _fro),
    "knee": Kind("knee", 0, math.inf, _knee, whole=True),
}


# Rules that share out ranks over the whole file.
OF_THE_FILE = ("size", "error")

# ------------------------------------------------------------------------------------------------ many matrices


@dataclass(frozen=True, slots=True)
class Spectrum:
    """A matrix among many: its singular values, largest first, the sum of all their squares, and what a rank costs.

    nbytes: of one rank, (out + n) · the bytes of a value. weight: how much its squared error counts beside the others'.
    """

    values: Values
    energy: float
    nbytes: int
    weight: float = 1.0

    def gain(self, rank: int) -> float:
        return self.weight * math.fsum(v * v for v in self.values[:rank])


def ranks_for(
    rules: Sequence[RankRule], given: Sequence[Spectrum], sizes: Sequence[tuple[int, int]],
    size_of: Callable[[Sequence[int]], int],
) -> list[int]:  # fmt: skip
    """A rank for each matrix [out, n] of `sizes`, by its own rule; a rule of the whole file is one for all.

    Beside such a rule, others are numbers: the most that theirs may get. size_of: the bytes of a file of these ranks,
    its header and all else included, to which `size` refers.
    """
    rule = next((r for r in rules if r.kind in OF_THE_FILE), None)
    if rule is None:
        return [
            r.most(*size) if r.kind == "rank" else r.choose(s.values, *size, s.energy)
            for r, s, size in zip(rules, given, sizes, strict=True)
        ]
    capped = [replace(s, values=s.values[: r.most(*size)]) for r, s, size in zip(rules, given, sizes, strict=True)]
    if rule.kind != "size":
        return allocate(replace(rule, cap=None), capped)
    return _fitting(int(rule.value), capped, size_of)


def _fitting(limit: int, spectra: Sequence[Spectrum], size_of: Callable[[Sequence[int]], int]) -> list[int]:
    """The ranks that keep the most in a file of so many bytes; none, where no rank fits."""
    found = [[0] * len(spectra)]
    low, high, left = 0, limit, limit  # bytes of factors with which the file fits; above which it does not; to try
    while low < high:
        ranks = allocate(RankRule("size", left), spectra)
        size = size_of(ranks) if any(ranks) else 0
        # What stands beside the factors, such as the header, grows a little with each rank or module.
        room = limit - (size - _nbytes(spectra, ranks))
        if size > limit:
            high = left - 1
        else:
            found.append(ranks)
            if room <= left:
                break
            low = left
        left = room if low < room <= high else (low + high + 1) // 2
    steps = range(1, 1 + max((len(s.values) for s in spectra), default=0))
    same = bisect.bisect_right(steps, limit, key=lambda rank: size_of(_uniform(spectra, rank)))
    if same:
        found.append(_uniform(spectra, same))
    return max(found, key=lambda ranks: _gain(spectra, ranks))


def weighted(spectrum: Spectrum, weight: float) -> Spectrum:
    """The same, of another weight."""
    return replace(spectrum, weight=weight)


def allocate(rule: RankRule, spectra: Sequence[Spectrum]) -> list[int]:
    """A rank for each matrix: `size` keeps the most energy in so many bytes, `error` the fewest bytes at that error.

    The error is that of all matrices together, √(Σ w·lost / Σ w·energy). Ranks are taken by their energy per
    byte, which is optimal up to the last one (Dantzig 1957, the knapsack's relaxation): the squares of one
    matrix fall, so its ranks come in order. One rank for all, and then the best, is tried too. An error that
    cannot be had within `cap`, or the values there are, gets all of them. Raises ValueError for another rule.
    """
    kept = [_usable(s, rule.cap) for s in spectra]
    steps = range(1 + max((len(s.values) for s in kept), default=0))
    if rule.kind == "size":
        same = bisect.bisect_right(steps, rule.value, key=lambda rank: _nbytes(kept, _uniform(kept, rank))) - 1
        starts = (_uniform(kept, 0), _uniform(kept, same))
        return max((_fill(kept, rule.value, start) for start in starts), key=lambda ranks: _gain(kept, ranks))
    if rule.kind != "error":
        raise ValueError(f"{rule.kind} is for one matrix: RankRule.choose")
    needed = (1 - rule.value**2) * math.fsum(s.weight * s.energy for s in spectra)
    same = bisect.bisect_left(steps, needed, key=lambda rank: _gain(kept, _uniform(kept, rank)))
    return min(_reach(kept, needed), _uniform(kept, same), key=lambda ranks: _nbytes(kept, ranks))


def _usable(spectrum: Spectrum, cap: int | None) -> Spectrum:
    return replace(spectrum, values=[v for v in spectrum.values[:cap] if v > 0 and spectrum.weight > 0])


def _gain(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> float:
    return math.fsum(s.gain(r) for s, r in zip(spectra, ranks, strict=True))


def _nbytes(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> int:
    return sum(s.nbytes * r for s, r in zip(spectra, ranks, strict=True))


def _best_first(spectra: Sequence[Spectrum]) -> list[int]:
    """The matrix of each rank, by energy per byte; one matrix's ranks stay in order."""
    items = [(-s.weight * v * v / s.nbytes, n) for n, s in enumerate(spectra) for v in s.values]
    return [n for _, n in sorted(items)]


def _fill(spectra: Sequence[Spectrum], nbytes: float, start: Sequence[int]) -> list[int]:
    """Beside those that are there at the start, the best first, past those that no longer fit."""
    ranks, seen = list(start), Counter[int]()
    left = nbytes - _nbytes(spectra, ranks)
    for number in _best_first(spectra):
        seen[number] += 1
        if seen[number] > start[number] and spectra[number].nbytes <= left:
            left -= spectra[number].nbytes
            ranks[number] += 1
    return ranks


def _reach(spectra: Sequence[Spectrum], needed: float) -> list[int]:
    """The best first, until their energy reaches what is needed."""
    order = _best_first(spectra)

    def ranks(count: int) -> list[int]:
        taken = Counter(order[:count])
        return [taken[number] for number in range(len(spectra))]

    return ranks(bisect.bisect_left(range(len(order)), needed, key=lambda count: _gain(spectra, ranks(count))))


def _uniform(spectra: Sequence[Spectrum], rank: int) -> list[int]:
    """One rank for all, or what each has."""
    return [min(rank, len(s.values)) for s in spectra]
