"""collect: LoRAs of one base as rows of one space, in one gauge, so that they can be compared, averaged and learnt."""

from __future__ import annotations

import math
import os
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion.extras import need
from weightops.diffusion.threads import one_thread
from weightops.engine.run import Progress, ignore
from weightops.errors import Interrupted, MismatchError, UsageError, ValueRefused, WeightopsError, listing, quote
from weightops.lora.settings import FILE
from weightops.naming.keymap import ARCHITECTURES
from weightops.ops.report import peak_memory_bytes
from weightops.synthesis.collection import Collection, check_replaceable
from weightops.synthesis.gauge import aligned, balanced, delta_norms
from weightops.synthesis.members import Member, Reader, check_fits, layout_of
from weightops.synthesis.space import FORMS, INDEX, WIDTHS, Space, open_space

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from torch import Tensor

    from weightops.synthesis.layout import Factors, Layout

OTHERS = ("refuse", "skip", "pad")
_NETWORKS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_REFERENCE_NBYTES = 256 << 20  # of the members, in float32, whose mean the reference is
_ROUNDS = 100
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


def collect(
    *loras: str | os.PathLike[str],
    output: str | os.PathLike[str],
    conditions: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    embedder: str | os.PathLike[str] | None = None,
    others: str = "refuse",
    form: str | None = None,
    dtype: str | None = None,
    architecture: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    on_progress: Progress = ignore,
) -> CollectReport:
    """Make a space of these LoRAs in the folder `output`, or add them to the one that is there.

    loras: files, PEFT folders, or folders of LoRAs. conditions: a CSV or NPZ file with numbers for each; or images:
    a folder with an image or a folder of images for each, which `embedder` turns into numbers. others: what becomes
    of a LoRA that has other modules or ranks: refuse the collection, skip it (one that holds NaN, too), or pad what it
    lacks with zeros. form:
    aligned (balanced by singular values, and turned to a reference that is kept), svd (balanced alone), raw (factors
    as they are); None: that of the space, aligned for a new one. dtype of the rows: fp32, fp16, bf16; likewise fp32.
    architecture: the LoRAs', where names and shapes fit several. force: begin anew in place of a space.

    What is collected stands: the same call goes on after an interruption. Raises WeightopsError.
    """
    started = time.perf_counter()
    need("synth collect", "torch", extra="synthesis")
    with one_thread():
        report = _collected(
            loras, Path(output), conditions, images, embedder, others, form, dtype, architecture, on_progress,
            force=force, dry_run=dry_run,
        )  # fmt: skip
    report.seconds = time.perf_counter() - started
    report.peak_memory_bytes = peak_memory_bytes()
    return report


def _collected(
    loras: Sequence[str | os.PathLike[str]], target: Path, conditions: Any, images: Any, embedder: Any, others: str,
    form: str | None, dtype: str | None, architecture: str | None, on_progress: Progress, *, force: bool, dry_run: bool,
) -> CollectReport:  # fmt: skip
    _check_words(others, form, dtype, images, embedder, conditions)
    _check_architecture(architecture)
    files = _files(loras)
    before = None if force or not (target / INDEX).exists() else open_space(target)
    if before is None:
        if not target.name or target.name == "..":
            hint = "-o DIR names a folder that is new, empty, or a space"
            raise UsageError(str(target), "is no name that a new folder could have", hint)
        check_replaceable(target, replace=force)
    report = CollectReport(str(target), [label for _, label in files], dry_run=dry_run)
    progress = _Progress(on_progress, len(files))
    kept, layout = _look(files, before, report, others, architecture, progress)
    if architecture not in (None, layout.architecture):
        what = f"found {quote(architecture)}, but names and shapes of these LoRAs are those of {layout.architecture}"
        raise UsageError("--architecture", what, "leave it out")
    form, dtype = _like_before(before, form, dtype)
    made = _Made(target, layout, form, dtype, others, before, report, progress, force)
    told = _conditions(before, kept, conditions, images, embedder, report)
    report.architecture, report.modules, report.features = layout.architecture, len(layout.modules), layout.width
    report.ranks, report.form, report.dtype = tuple(sorted({m.rank for m in layout.modules})), form, dtype
    if dry_run:
        there = set(before.names) if before is not None else set()
        report.there = sum(name in there for name, _ in kept)
        report.added = len(kept) - report.there
        report.members = report.added + len(there)
        report.nbytes = report.members * layout.width * WIDTHS[dtype]
    else:
        made.write(kept, told)
    if report.unsettled:
        some = "a module has" if report.unsettled == 1 else f"{report.unsettled:,} modules have"
        report.warnings.append(f"{some} not settled after {_ROUNDS} rounds of alignment")
    return report


# ------------------------------------------------------------------------------------------------ what is asked for


def _check_words(
    others: str, form: str | None, dtype: str | None, images: Any, embedder: Any, conditions: Any
) -> None:  # fmt: skip
    for option, word, known in (("--others", others, OTHERS), ("--form", form, FORMS), ("--dtype", dtype, WIDTHS)):
        if word is not None and word not in known:
            raise UsageError(option, f"found {quote(word)}, expected {', '.join(known)}")
    if images is not None and conditions is not None:
        raise UsageError("--images", "and --conditions both say what each LoRA is of", "take one of the two")
    if (images is None) != (embedder is None):
        where = "--embedder" if images is None else "--images"
        raise UsageError(where, "is one half: --images DIR and --embedder FILE go together")


def _check_architecture(architecture: str | None) -> None:
    if architecture is None:
        return
    try:
        ARCHITECTURES.get(architecture)
    except UsageError as e:
        raise UsageError("--architecture", e.what, e.hint) from None


def _files(loras: Sequence[str | os.PathLike[str]]) -> list[tuple[str, str]]:
    """A name and a path for each LoRA; folders of LoRAs in the order of their names. Raises UsageError."""
    found: list[tuple[str, str]] = []
    for lora in loras:
        label, path = os.fspath(lora), Path(lora)
        if label.startswith("hf://") or not path.is_dir() or _is_peft(path):
            found.append((_stem(path.name), label))
            continue
        inside = [p for p in path.iterdir() if not p.name.startswith(".")]
        inside = [p for p in inside if p.suffix == ".safetensors" or _is_peft(p)]
        if not inside:
            raise UsageError(label, "holds no LoRAs: no .safetensors files and no PEFT folders")
        found += [(_stem(p.name), str(p)) for p in sorted(inside, key=lambda p: _natural(p.name))]
    if not found:
        raise UsageError("synth collect", "found no LoRAs, expected files or folders of them")
    twice = [name for name, count in Counter(name for name, _ in found).items() if count > 1]
    if twice:
        what = f"{len(twice):,} names stand for several LoRAs: {listing(twice)}"
        raise UsageError("synth collect", what, "a member is known by its file's name: rename one of them")
    return found


def _is_peft(path: Path) -> bool:
    """Is the folder one LoRA of PEFT's, of one network or of several?"""
    return any((path / name / FILE).exists() for name in ("", *_NETWORKS))


def _stem(name: str) -> str:
    """The file's name, without the ending of its kind. What is no Unicode is replaced, as in any text."""
    for ending in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        if name.lower().endswith(ending) and len(name) > len(ending):
            name = name[: -len(ending)]
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _natural(name: str) -> list[Any]:
    """lora-9 before lora-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _like_before(before: Space | None, form: str | None, dtype: str | None) -> tuple[str, str]:
    if before is None:
        return form or "aligned", dtype or "fp32"
    for option, asked, there in (("--form", form, before.form), ("--dtype", dtype, before.dtype)):
        if asked not in (None, there):
            raise UsageError(option, f"found {asked}, but the rows of {before.label} are {there}", "leave it out")
    return before.form, before.dtype


# ------------------------------------------------------------------------------------------------ from headers


def _look(
    files: Sequence[tuple[str, str]], before: Space | None, report: CollectReport, others: str,
    architecture: str | None, progress: _Progress,
) -> tuple[list[tuple[str, str]], Layout]:  # fmt: skip
    """The LoRAs that are taken, and the modules of the space, from headers alone. Raises MismatchError."""
    asked = before.layout.architecture if before is not None else architecture
    members = _headers(files, asked, report, others, progress)
    wrong: list[WeightopsError] = []
    layout = before.layout if before is not None else _common_layout(members, others)
    kept = []
    for name, path in files:
        if name not in members:
            continue
        try:
            check_fits(members[name], layout, pad=others == "pad")
            kept.append((name, path))
        except MismatchError as e:
            wrong.append(e)
            report.left_out.append((path, e.what))
    if wrong and others != "skip":
        more = f" (and {len(wrong) - 1:,} more do not fit)" if len(wrong) > 1 else ""
        hint = f"{wrong[0].hint}; --others skip leaves out what does not fit"
        raise type(wrong[0])(wrong[0].where, f"{wrong[0].what}{more}", hint)
    if before is None:
        _check_several(len(kept))
    whole = {(m.component, m.name): m.rank for m in layout.modules}
    report.padded = sum({p: m.rank for p, m in members[name].modules.items()} != whole for name, _ in kept)
    for path, reason in report.left_out:
        report.warnings.append(f"{path}: left out: {reason}")
    return kept, layout


def _check_several(count: int) -> None:
    if count < 2:
        what = f"found {count} LoRA{'' if count == 1 else 's'} to collect, expected at least 2"
        raise UsageError("synth collect", what, "a space is what several LoRAs of one base have in common")


def _headers(
    files: Sequence[tuple[str, str]], asked: str | None, report: CollectReport, others: str, progress: _Progress
) -> dict[str, Member]:
    """What each LoRA changes. What could be for several models is for that of most of the others."""
    members: dict[str, Member] = {}
    doubted: list[tuple[str, str, WeightopsError]] = []
    reader = Reader(asked)
    for name, path in files:
        try:
            members[name] = reader.member(path)
        except WeightopsError as e:
            doubted.append((name, path, e))
        progress.step("headers")
    kinds = Counter(m.architecture for m in members.values())
    again = Reader(kinds.most_common(1)[0][0] if kinds else None)
    for name, path, first in doubted:
        try:
            if asked is not None or not kinds or not isinstance(first, MismatchError):
                raise first
            members[name] = again.member(path)
        except WeightopsError as e:
            if others != "skip":
                raise
            report.left_out.append((path, e.what))
    return members


def _common_layout(members: Mapping[str, Member], others: str) -> Layout:
    """What most of them are like; to pad: all that any of the most common architecture has."""
    if not members:
        raise UsageError("synth collect", "none of the LoRAs can be taken", "without --others skip the first says why")
    kinds = Counter(m.architecture for m in members.values())
    same = [m for m in members.values() if m.architecture == kinds.most_common(1)[0][0]]
    if others == "pad":
        return layout_of(same)
    # Those that change the same share one mapping, of which there are few.
    kinds_of = {id(m.modules): m for m in same}
    layouts: Counter[Layout] = Counter()
    for held, count in Counter(id(m.modules) for m in same).items():
        layouts[layout_of([kinds_of[held]])] += count
    return layouts.most_common(1)[0][0]


def _conditions(
    before: Space | None, kept: Sequence[tuple[str, str]], conditions: Any, images: Any, embedder: Any,
    report: CollectReport,
) -> tuple[np.ndarray, tuple[str, ...], dict[str, Any]] | None:  # fmt: skip
    """The conditions of the LoRAs that are taken, the names of the numbers, and where they are from."""
    names = [name for name, _ in kept]
    given = conditions if conditions is not None else images
    if before is not None and (before.conditions is None) != (given is None):
        has = "has no conditions" if before.conditions is None else "has conditions"
        hint = "collect it anew to give it some" if before.conditions is None else "--conditions or --images says them"
        raise UsageError(before.label, f"{has}, and the LoRAs to add {'have' if given is not None else 'none'}", hint)
    if given is None:
        return None
    from weightops.synthesis.conditions import for_members, of_images, read_conditions

    found = read_conditions(conditions) if conditions is not None else of_images(images, embedder, names)
    numbers, warnings = for_members(found, names)
    report.warnings += warnings
    if before is not None and tuple(found.names) != before.condition_names:
        what = f"has the numbers {listing(found.names)}, and the space {listing(before.condition_names)}"
        raise MismatchError(os.fspath(given), what)
    report.condition_names = tuple(found.names)
    return numbers, tuple(found.names), dict(found.source)


# ------------------------------------------------------------------------------------------------ values


@dataclass(slots=True)
class _Progress:
    """Of each LoRA its header, and its values."""

    on_progress: Progress
    count: int
    done: int = 0

    def step(self, _what: str) -> None:
        self.done += 1
        self.on_progress(self.done, 2 * self.count)


@dataclass(slots=True)
class _Made:
    """The space that is made, or added to."""

    target: Path
    layout: Layout
    form: str
    dtype: str
    others: str
    before: Space | None
    report: CollectReport
    progress: _Progress
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
        _check_several(len(collection.lines))
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
        _check_several(count)
        parts = [self._settled(up, down) for up, down in self.layout.unflatten(rows[:count])]
        found = self.layout.flatten(parts)
        collection.keep_reference(found)
        return found

    def _settled(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of a module's factors [n, …], all turned towards it, in float64."""

        up, down = up.double(), down.double()
        mean = _begun(up, down)
        for number in range(1, _ROUNDS + 1):
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
