"""collect: LoRAs of one base as rows of one space, in one gauge, so that they can be compared, averaged and learnt."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.diffusion.extras import need
from weightops.diffusion.threads import one_thread
from weightops.engine.run import Progress, ignore
from weightops.errors import MismatchError, UsageError, WeightopsError, listing, quote
from weightops.lora.settings import FILE
from weightops.naming.keymap import ARCHITECTURES
from weightops.ops.report import peak_memory_bytes
from weightops.synthesis.collect_rows import ROUNDS, CollectProgress, CollectReport, Rows, check_several
from weightops.synthesis.collection import check_replaceable
from weightops.synthesis.members import Member, Reader, check_fits, layout_of
from weightops.synthesis.space import FORMS, INDEX, WIDTHS, Space, open_space

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from weightops.synthesis.layout import Layout

OTHERS = ("refuse", "skip", "pad")
_NETWORKS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


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
    lacks with zeros. form: aligned (balanced by singular values, and turned to a reference that is kept), svd (balanced
    alone), raw (factors as they are); None: that of the space, aligned for a new one. dtype of the rows: fp32, fp16,
    bf16; likewise fp32. architecture: the LoRAs', where names and shapes fit several. force: begin anew in place of a
    space.

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
    progress = CollectProgress(on_progress, len(files))
    kept, layout = _look(files, before, report, others, architecture, progress)
    if architecture not in (None, layout.architecture):
        what = f"found {quote(architecture)}, but names and shapes of these LoRAs are those of {layout.architecture}"
        raise UsageError("--architecture", what, "leave it out")
    form, dtype = _like_before(before, form, dtype)
    made = Rows(target, layout, form, dtype, others, before, report, progress, force)
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
        report.warnings.append(f"{some} not settled after {ROUNDS} rounds of alignment")
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
    architecture: str | None, progress: CollectProgress,
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
        check_several(len(kept))
    whole = {(m.component, m.name): m.rank for m in layout.modules}
    report.padded = sum({p: m.rank for p, m in members[name].modules.items()} != whole for name, _ in kept)
    for path, reason in report.left_out:
        report.warnings.append(f"{path}: left out: {reason}")
    return kept, layout


def _headers(
    files: Sequence[tuple[str, str]], asked: str | None, report: CollectReport, others: str, progress: CollectProgress
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
