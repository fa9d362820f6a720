"""replay: a file made again by the recipe in its metadata, and compared with itself, byte for byte."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from weightops import __version__
from weightops.engine.run import Progress, ignore
from weightops.errors import MismatchError, UsageError, listing, quote
from weightops.files.checkpoint import INDEX_SUFFIX, open_checkpoint
from weightops.lineage import KEY, read_recipe
from weightops.ops.produce import Bar
from weightops.ops.replay_compare import Comparison, compare
from weightops.ops.replay_inputs import Shelf
from weightops.ops.replay_recipe import Made, read_made
from weightops.ops.replay_search import Search
from weightops.ops.report import peak_memory_bytes, tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from weightops.files.checkpoint import Checkpoint
    from weightops.ops.report import Report


def replay(
    file: str | os.PathLike[str],
    folders: Sequence[str | os.PathLike[str]] = (),
    *,
    output: str | os.PathLike[str] | None = None,
    memory: int | None = None,
    threads: int | None = None,
    device: str = "auto",
    force: bool = False,
    on_progress: Progress = ignore,
) -> Report:
    """Make `file` again by the recipe in its metadata, and compare every tensor and the header with it.

    Its inputs are looked for in the folder where it lies, and in `folders` with all that is in them: by name, and where
    none of that name has the recorded hash, by the hash. output: where what is made is kept (None: it is removed; it
    stands in a hidden folder beside the file meanwhile). Raises WeightopsError: where it has no recipe, none that is
    known, or an input is not to be found.

    The report's `details` say whether the two are `identical`, or the `same` (the version of weightops and names that
    files had may be others), which inputs have `changed`, and which tensors and what of the metadata `differ`.
    """
    started = time.perf_counter()
    label = os.fspath(file)
    with open_checkpoint(file) as opened:
        made = _made(opened, label)
        folder = _folder(opened, label)
        places = _places(opened, folder, output)
    target = None if output is None else Path(output)
    apart = [Path(label), *([] if folder is None else [folder])]
    if target is not None and any(path.exists() and target.exists() and path.samefile(target) for path in apart):
        raise UsageError("-o", f"{label} is what is replayed, and is not replaced", "name another file")
    beside = folder.parent if folder is not None else None if label.startswith("hf://") else Path(label).parent
    shelf = Shelf(beside, folders, [*apart, *([] if target is None else [target])])
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(_hidden(places)))
        bar = Bar(on_progress)
        bar.total = max(opened.nbytes, 1)
        running = {"memory": memory, "threads": threads, "device": device}
        found = Search(made, shelf, work, folder is not None, target, force, running, bar)
        report = found.made_again()
        changed = found.changed()
        expected = {"version"} if made.version != __version__ else set()
        expected |= {"hash"} if changed else set()
        expected |= {"name"} if found.renamed() else set()
        mine = label if folder is None else str(folder)
        met = compare(
            mine, found.output, expected=expected, memory=memory, threads=threads, on_progress=bar.part(0.9, 1.0)
        )
    if not met.tensors:
        hint = "where it is one file of a folder that was written as one, name the folder"
        raise MismatchError(label, "has none of the tensors that its recipe makes", hint)
    return _told(report, made, met, found, changed, started)


def _made(opened: Checkpoint, label: str) -> Made:
    if KEY not in opened.metadata:
        hint = "weightops writes one into whatever it makes; unfuse gives back a file as it was"
        raise MismatchError(label, "has no recipe of weightops in its metadata: it cannot be made again", hint)
    said = read_recipe(opened.metadata[KEY], label)
    return read_made(said, label, None if opened.container != "diffusers" else label)


def _folder(opened: Checkpoint, label: str) -> Path | None:
    """The folder that was made, where it was no single file."""
    if label.startswith("hf://"):
        if len(opened.files) > 1:
            raise UsageError(label, "a folder on a hub, expected a file", "fetch the folder first")
        return None
    path = Path(label)
    if path.is_dir():
        return path.resolve()
    return path.parent.resolve() if path.name.endswith(INDEX_SUFFIX) else None


def _places(opened: Checkpoint, folder: Path | None, output: str | os.PathLike[str] | None) -> list[Path]:
    """Where there is room for what is made, most likely, the best first."""
    if output is not None:
        return [Path(output).absolute().parent]
    own = opened.place if folder is None else folder.parent
    return [own, Path.cwd()] if isinstance(own, Path) else [Path.cwd()]


@contextlib.contextmanager
def _hidden(places: Sequence[Path]) -> Iterator[str]:
    """A folder for what is made on the way, removed again."""
    made = None
    for place in places:
        with contextlib.suppress(OSError):
            made = tempfile.mkdtemp(prefix=".weightops-replay-", dir=place)
            break
    made = made or tempfile.mkdtemp(prefix="weightops-replay-")
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ the report


def _told(report: Report, made: Made, met: Comparison, found: Search, changed: Sequence[int], started: float) -> Report:
    """The report of the run, as one of a replay."""
    report.command = "replay"
    report.output = None if found.target is None else str(found.target)
    report.bytes_written = 0 if found.target is None else report.bytes_written
    report.seconds, report.peak_memory_bytes = time.perf_counter() - started, peak_memory_bytes()
    report.warnings = []
    if made.version != __version__:
        what = f"{made.label} was made by weightops {made.version}, and this is {__version__}"
        report.warnings.append(f"{what}: another version may round otherwise")
    for n in found.renamed():
        was, is_now = quote(made.inputs[n][0]), str(found.chosen[n])
        report.warnings.append(f"{was} is found by its hash: {quote(is_now)}")
    report.details = {
        "file": made.label, "made": {"command": made.command, "version": made.version},
        "identical": met.identical, "same": met.same and not changed, "tensors": met.tensors, "bytes": met.nbytes,
        "changed": [made.inputs[n][0] for n in changed],
        "differ": {"tensors": [each.to_dict() for each in met.different], "metadata": met.metadata},
    }  # fmt: skip
    report.details["line"] = _line(report, made, met, found, changed)
    return report


def _line(report: Report, made: Made, met: Comparison, found: Search, changed: Sequence[int]) -> str:
    """The answer in one line."""
    if report.details["identical"]:
        return f"identical: {tensors(met.tensors)} and the header, byte for byte"
    if report.details["same"]:
        others = [word for word, is_so in (("the version", made.version != __version__),
                                           ("names of inputs", bool(found.renamed()))) if is_so]  # fmt: skip
        but = f", but for {' and '.join(others)} in its recipe" if others else "; its header is written otherwise"
        return f"the same: {tensors(met.tensors)}, bit for bit{but}"
    said = []
    for n in changed:
        name, hashed = made.inputs[n]
        said.append(f"{quote(name)} has changed: found {found.found[n]}, expected {hashed}")
    if met.different:
        count = f"{len(met.different):,} of {tensors(met.tensors)} differ"
        largest = max((d.largest for d in met.different if d.largest is not None), default=None)
        said.append(f"{count}{'' if largest is None else f', by up to {largest:.3g}'}: "
                    f"{listing(d.key for d in met.different)}")  # fmt: skip
    elif not changed or met.metadata:
        said.append(f"{tensors(met.tensors)} the same, bit for bit")
    said += met.metadata[:5]
    return "; ".join(said)
