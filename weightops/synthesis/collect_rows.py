"""LoRAs as rows of a space: read, brought into its form, and written some at a time, with the reference first.

What they are, and whether they fit, is known by then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.errors import (
    Interrupted,
    MismatchError,
    UsageError,
    ValueRefused,
    WeightopsError,
    listing,
    quote,
)
from weightops.synthesis.collection import Collection
from weightops.synthesis.gauge import aligned, balanced, delta_norms
from weightops.synthesis.members import Reader

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from torch import Tensor

    from weightops.engine.run import Progress
    from weightops.synthesis.layout import Factors, Layout
    from weightops.synthesis.space import Space

ROUNDS = 100  # of alignment
_REFERENCE_NBYTES = 256 << 20  # of the members, in float32, whose mean the reference is
_SETTLED = 1e-9  # change of the reference, over its norm
_BATCH_NBYTES = 16 << 20  # of rows in float64; what is made of them takes some eight times as much


@dataclass(slots=True)
class CollectReport:
    """What a space holds now. added, there: LoRAs that are new in it, and that were in it already.

    left_out: those that were skipped, and why. error: the largest relative change of a ΔW by the rounding of its row.
    rounds: of the alignment, of the module that took the most; unsettled: modules that had not settled. nbytes: of the
    space's files.
    """

    output: str
    inputs: list[str] = field(default_factory=list)
    added: int = 0
    there: int = 0
    taken_up: int = 0
    members: int = 0
    features: int = 0
    modules: int = 0
    ranks: tuple[int, ...] = ()
    architecture: str = ""
    form: str = ""
    dtype: str = ""
    padded: int = 0
    rounds: int = 0
    unsettled: int = 0
    error: float | None = None
    condition_names: tuple[str, ...] = ()
    left_out: list[tuple[str, str]] = field(default_factory=list)
    nbytes: int = 0
    dry_run: bool = False
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "command": "synth collect", "version": __version__, "inputs": [{"path": path} for path in self.inputs],
            "output": self.output, "bytes_written": self.nbytes, "members": self.members, "added": self.added,
            "already_there": self.there, "taken_up": self.taken_up, "features": self.features,
            "modules": self.modules, "ranks": list(self.ranks), "architecture": self.architecture, "form": self.form,
            "dtype": self.dtype, "padded": self.padded, "alignment_rounds": self.rounds,
            "alignment_unsettled": self.unsettled, "rounding_error": self.error,
            "conditions": list(self.condition_names),
            "left_out": [{"path": path, "reason": reason} for path, reason in self.left_out],
            "seconds": round(self.seconds, 3), "peak_memory_bytes": self.peak_memory_bytes,
            "warnings": self.warnings, "dry_run": self.dry_run,
        }  # fmt: skip


def check_several(count: int) -> None:
    """Raises UsageError where there are fewer than two LoRAs."""
    if count < 2:
        what = f"found {count} LoRA{'' if count == 1 else 's'} to collect, expected at least 2"
        raise UsageError("synth collect", what, "a space is what several LoRAs of one base have in common")


@dataclass(slots=True)
class CollectProgress:
    """Of each LoRA its header, and its values."""

    on_progress: Progress
    count: int
    done: int = 0

    def step(self, _what: str) -> None:
        self.done += 1
        self.on_progress(self.done, 2 * self.count)


@dataclass(slots=True)
class Rows:
    """The space that is made, or added to."""

    target: Path
    layout: Layout
    form: str
    dtype: str
    others: str
    before: Space | None
    report: CollectReport
    progress: CollectProgress
    replace: bool
    reader: Reader = field(init=False)
    pad: bool = field(init=False)
    skip: bool = field(init=False)

    def __post_init__(self) -> None:
        self.reader = Reader(self.layout.architecture)
        self.pad, self.skip = self.others == "pad", self.others == "skip"

    def write(self, kept: Sequence[tuple[str, str]], told: Any) -> None:
        """Read, bring into the form, and write, some LoRAs at a time."""
        count = len(self.before) if self.before is not None else 0
        made_of = {
            "version": __version__, "layout": self.layout.to_json(), "form": self.form, "dtype": self.dtype,
            "before": count, "files": [[name, *_mark(path)] for name, path in kept],
        }  # fmt: skip
        collection = Collection(self.target, self.layout, self.dtype, self.form, count, made_of)
        try:
            with collection.held():
                self.report.taken_up = len(collection.lines) - count
                self._fill(collection, kept)
                conditions, said = self._together(collection, kept, told)
                nbytes = collection.finish(conditions, said, replace=self.replace)
        except (Interrupted, KeyboardInterrupt):
            done = len(collection.lines) - count
            what = f"interrupted: {done:,} of {len(kept):,} LoRAs are in, and no input was changed"
            raise Interrupted(str(self.target), what, "the same command goes on from there") from None
        except WeightopsError as e:
            collection.drop()
            done = len(collection.lines) - count
            if not done or not isinstance(e, ValueRefused):
                raise
            hint = f"{done:,} LoRAs before it are in: mend it or leave it out, and the same command goes on from there"
            raise type(e)(e.where, e.what, hint) from None
        self.report.members, self.report.nbytes = len(collection.lines), nbytes

    def _fill(self, collection: Collection, kept: Sequence[tuple[str, str]]) -> None:
        known = {line["name"]: (place, line) for place, line in enumerate(collection.lines)}
        new = [(name, path) for name, path in kept if name not in known]
        for name, path in kept:
            if name not in known:
                continue
            place, line = known[name]
            if place < collection.before:
                self._check_same(path, line)
                self.report.there += 1
            self.progress.step("values")
        reference = self._reference(collection, kept) if self.form == "aligned" else None
        height = max(1, _BATCH_NBYTES // (8 * self.layout.width))
        for start in range(0, len(new), height):
            part = new[start : start + height]
            factors, taken = self._read(part)
            if taken:
                self._add(collection, taken, factors, reference)
            for _ in part:
                self.progress.step("values")
        check_several(len(collection.lines))
        self.report.added = len(collection.lines) - collection.before

    def _check_same(self, path: str, line: Mapping[str, Any]) -> None:
        factors, hashed = self.reader.factors(path, self.layout, pad=self.pad)
        norm = float(delta_norms(factors))  # an alpha is in no hash
        if hashed != line["hash"] or not math.isclose(norm, line["norm"], rel_tol=1e-6, abs_tol=1e-300):
            what = f"is not the LoRA that the space has under the name {quote(line['name'])}"
            raise MismatchError(path, what, "rename it, or begin anew with --force")

    def _read(self, files: Sequence[tuple[str, str]]) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[str, str]]]:
        """The factors of these LoRAs, stacked: up [n, out, r], down [n, r, in], and the name and hash of each.

        Those whose values cannot be taken are left out where that is asked.
        """
        import torch

        found, kept = [], []
        for name, path in files:
            try:
                factors, hashed = self.reader.factors(path, self.layout, pad=self.pad)
            except ValueRefused as e:
                if not self.skip:
                    raise
                if (path, e.what) not in self.report.left_out:
                    self.report.left_out.append((path, e.what))
                    self.report.warnings.append(f"{path}: left out: {e.what}")
                continue
            found.append(factors)
            kept.append((name, hashed))
        stacked = [
            (torch.stack([f[number][0] for f in found]), torch.stack([f[number][1] for f in found]))
            for number in range(len(self.layout.modules) if found else 0)
        ]
        return stacked, kept

    def _add(
        self, collection: Collection, taken: Sequence[tuple[str, str]], factors: Factors, reference: Tensor | None
    ) -> None:
        norms = delta_norms(factors)
        made = list(factors)
        if self.form != "raw":
            made = balanced(made)
        if reference is not None:
            made = aligned(made, self.layout.unflatten(reference))
        rows = self.layout.flatten(made)
        lines = [
            {"name": name, "hash": hashed, "norm": float(norm)}
            for (name, hashed), norm in zip(taken, norms, strict=True)
        ]
        stored = collection.add(rows, lines)
        error = _difference(made, self.layout.unflatten(stored)) / norms.clamp_min(1e-300)
        self.report.error = max(self.report.error or 0.0, float(error.max()))

    def _reference(self, collection: Collection, files: Sequence[tuple[str, str]]) -> Tensor:
        """The row that all are aligned to: the space's own, or the mean of aligned members, found by turns.

        Of as many members, evenly spread, as fit the memory that is meant for it.
        Source: Gower 1975, Generalized Procrustes analysis.
        """
        if self.before is not None:
            assert self.before.reference is not None
            return self.before.reference
        found = collection.reference()
        if found is not None:
            return found
        import torch

        most = max(2, _REFERENCE_NBYTES // (4 * self.layout.width))
        step = max(1, -(-len(files) // most))
        chosen = files[::step]
        rows, count = torch.empty(len(chosen), self.layout.width), 0
        for file in chosen:
            factors, taken = self._read([file])
            if taken:
                rows[count] = self.layout.flatten(balanced(factors))[0].float()
                count += 1
        check_several(count)
        parts = [self._settled(up, down) for up, down in self.layout.unflatten(rows[:count])]
        found = self.layout.flatten(parts)
        collection.keep_reference(found)
        return found

    def _settled(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of a module's factors [n, …], all turned towards it, in float64."""

        up, down = up.double(), down.double()
        mean = _begun(up, down)
        for number in range(1, ROUNDS + 1):
            ((ups, downs),) = aligned([(up, down)], [mean])
            before, mean = mean, (ups.mean(0), downs.mean(0))
            change = sum(float((a - b).square().sum()) for a, b in zip(mean, before, strict=True))
            size = sum(float(a.square().sum()) for a in mean)
            self.report.rounds = max(self.report.rounds, number)
            if change <= _SETTLED**2 * size:
                return mean
        self.report.unsettled += 1
        return mean

    def _together(
        self, collection: Collection, kept: Sequence[tuple[str, str]], told: Any
    ) -> tuple[np.ndarray | None, dict[str, Any] | None]:  # fmt: skip
        """The conditions of all members in their order, and what space.json says of them."""
        import numpy as np

        if told is None:
            return None, None
        numbers, names, source = told
        rows = dict(zip((name for name, _ in kept), numbers, strict=True))
        before = self.before
        if before is not None:
            assert before.conditions is not None
            held = dict(zip(before.names, before.conditions, strict=True))
            other = [name for name, row in rows.items() if name in held and not np.allclose(row, held[name])]
            if other:
                what = f"{len(other):,} have other conditions there already, which stay: {listing(other)}"
                self.report.warnings.append(f"{before.label}: {what}")
            rows |= held
            source = before.condition_source or source
        found = np.stack([rows[line["name"]] for line in collection.lines])
        return found, {"names": list(names), "source": source}


def _begun(ups: Tensor, downs: Tensor) -> tuple[Tensor, Tensor]:
    """Where the mean of balanced factors [n, …] begins: at the first LoRA that has the most ranks.

    One that has fewer would leave the others' turns free, and the mean to their gauges. The largest entry in each row
    of down is positive, so that the start does not hang on a gauge either.
    """
    import torch

    ranks = downs.abs().amax(-1).gt(0).sum(-1).tolist()
    first = ranks.index(max(ranks))
    up, down = ups[first], downs[first]
    largest = down.gather(1, down.abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(down.dtype)
    return up * sign.mT, down * sign


def _mark(path: str) -> list[Any]:
    """By what a file is known again: its size, and when it was written."""
    at = Path(path)
    if not at.exists():
        return [path]
    files = sorted(p for p in at.iterdir() if p.is_file()) if at.is_dir() else [at]
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def _difference(a: Factors, b: Factors) -> Tensor:
    """‖ΔA − ΔB‖ [n], exactly: of the factors side by side. Nearly equal ones leave 1e-8 of their norm, not less."""
    import torch

    return delta_norms(
        [(torch.cat([x, -y], -1), torch.cat([p, q], -2)) for (x, p), (y, q) in zip(a, b, strict=True)]
    )  # fmt: skip
