"""Draws answers: tables, trees, the progress bar. Imports rich inside its functions only."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import click

from weightops.errors import printable
from weightops.ops.report import modules

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from weightops.ops.report import Report

Progress = Callable[[int, int], None]


def console(*, error: bool = False) -> Console:
    from rich.console import Console

    # Names from files are data: markup, emoji codes and highlighting are off, so that none of it is acted on.
    found = Console(stderr=error, markup=False, emoji=False, highlight=False, soft_wrap=False)
    if not found.is_terminal:
        found.width = 1000  # in a pipe or a file a row stays one line, which can be searched
    return found


def table(*columns: str, right: tuple[int, ...] = ()) -> Table:
    from rich.table import Table

    drawn = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for number, name in enumerate(columns):
        drawn.add_column(name, justify="right" if number in right else "left", overflow="fold", no_wrap=number in right)
    return drawn


def size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def number(count: float) -> str:
    """1,066,235,384 as 1.07 B, the way model sizes are spoken of."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}" if count / limit < 999.5 else f"{count / limit:.0f} {unit}"
    return str(int(count))


def dtypes(found: Mapping[str, int]) -> str:
    return ", ".join(code if len(found) == 1 else f"{code} x{count:,}" for code, count in found.items())


@contextlib.contextmanager
def progress(title: str, *, quiet: bool) -> Iterator[Progress]:
    """A progress bar on stderr, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(), console=console(error=True), transient=True,
    )  # fmt: skip
    with bar:
        # Hidden while headers are read and torch is imported: until then there is nothing to count.
        task = bar.add_task(title, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


class Counting(Protocol):
    """Called with how many pieces of how many are done; title: what is done to them, where that is not as before."""

    def __call__(self, done: int, total: int, title: str | None = None) -> None: ...


@contextlib.contextmanager
def counting(title: str, *, quiet: bool) -> Iterator[Counting]:
    """A progress bar that counts pieces (images, steps), with pieces per second, on stderr, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total, title=None: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.1f}/s")

    bars = Bars(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), Speed(),
        TimeRemainingColumn(), console=console(error=True), transient=True,
    )  # fmt: skip
    with bars:
        task = bars.add_task(title, total=None, visible=False)
        shown = title

        def on_progress(done: int, total: int, title: str | None = None) -> None:
            nonlocal shown
            if title is not None and title != shown:  # the speed of the one says nothing of the other
                shown = title
                bars.reset(task, description=title)
            bars.update(task, completed=done, total=total, visible=True)

        yield on_progress


# ------------------------------------------------------------------------------------------------ reports


def emit_json(document: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(document, ensure_ascii=True, indent=2, allow_nan=False))


def finished(found: Report, *, as_json: bool, quiet: bool, verbose: bool) -> None:
    """The report of a verb that wrote a file, in the way that was asked for."""
    if as_json:
        emit_json(found.to_dict())
    elif not quiet:
        report(found, verbose=verbose)
    else:
        for text in found.warnings:
            print_warning(text)


def report(found: Report, *, verbose: bool) -> None:
    out = console()
    if found.summary:
        out.print(printable(found.summary), style="bold", soft_wrap=True)
    planned = "plan" in found.details or (found.command == "combine" and found.output is None)
    if "interference" in found.details:
        _interference(out, found.details["interference"], verbose)
    if found.groups and not planned:
        out.print()
        known = (
            "tensors", "merged", "fused", "cast", "copied", "split", "dropped",
            "modules", "shared", "of one", "convolutions", "cut", "made LoRA", "kept", "whole", "equal",
        )  # fmt: skip
        counts = [k for k in known if any(g.get(k) for g in found.groups)]
        drawn = table("component", *counts, right=tuple(range(1, len(counts) + 1)))
        for group in found.groups:
            drawn.add_row(group["component"], *(f"{group[k]:,}" if group.get(k) else "-" for k in counts))
        out.print(drawn)
    if "plan" in found.details:
        _plan(out, found.details["plan"])
    if not planned:
        _unused(out, found, verbose)
    if "grid" in found.details:
        _grid(out, found.details)
    if "line" in found.details:
        out.print()
        out.print(printable(found.details["line"]), soft_wrap=True)
    if verbose and found.details.get("modules"):
        _modules(out, found.details["modules"])
    for text in found.warnings:
        print_warning(text)
    undo, bundled = found.details.get("undo"), found.details.get("embeddings")
    if found.dry_run and "tree" in found.details:
        _recipe(out, found.details)
    out.print()
    for entry in found.inputs:
        hashed = f"  {entry['hash']}" if entry["hash"] and verbose else ""
        verb = "would read " if found.dry_run and not planned else "read "
        out.print(f"{verb:<7}{printable(entry['path'])}  {size(entry['bytes'])}{hashed}", soft_wrap=True)
    if found.dry_run and not planned:
        out.print(f"would write {printable(found.output or '')}  {size(found.bytes_written)}", soft_wrap=True)
        if undo is not None:
            most = size(undo["bytes_written"])
            out.print(f"would write {printable(undo['output'])}  at most {most}", soft_wrap=True)
        if bundled is not None:
            out.print(f"would write {printable(bundled['output'])}  {size(bundled['bytes_written'])}", soft_wrap=True)
        return
    if found.output is not None:
        wrote(found.output, found.bytes_written)
    for beside in (undo, bundled):
        if beside is not None:
            wrote(beside["output"], beside["bytes_written"])
    speed = size((found.bytes_read + found.bytes_written) / max(found.seconds, 1e-9))
    peak = f", peak memory {found.peak_memory_bytes / 2**20:.0f} MiB" if found.peak_memory_bytes else ""
    out.print(f"       {found.seconds:.2f} s, {speed}/s{peak}", style="dim")
    if found.verified is not None:
        v = found.verified
        if "modules" in v:
            said = f"the error of {modules(v['modules'])} is as computed, within {v['largest_difference']:.1e}"
        else:
            said = f"{v['blocks']} samples, {v['values']:,} values, at most {v['largest_ulp']:.2f} ulp from float64"
        out.print(f"       verified: {said}")
    if found.checked is not None:
        out.print(f"       checked: {found.checked['tensors']:,} tensors came back, {size(found.checked['bytes'])}, "
                  f"byte for byte")  # fmt: skip


def _grid(out: Console, found: Mapping[str, Any]) -> None:
    """The variants of a merge, and how much is read for all of them."""
    out.print()
    rows, reads = found["grid"], found["reads"]
    names = list(rows[0]["settings"])
    scores = list(dict.fromkeys(name for row in rows for name in row.get("scores", ())))
    columns = ("file", *names, "size", *scores)
    drawn = table(*columns, right=tuple(range(1, len(columns))))
    for row in rows:
        own = row.get("scores", {})
        shown = (f"{own[name]:.6g}" if name in own else "-" for name in scores)
        drawn.add_row(row["file"], *(f"{row['settings'][name]:.6g}" for name in names), size(row["bytes"]), *shown)
    out.print(drawn)
    out.print()
    said = f"{size(reads['bytes'])} read for {len(rows)} variants"
    said += ", as for one" if reads["bytes"] == reads["one"] else f"; one merge reads {size(reads['one'])}"
    out.print(said, soft_wrap=True)


def _recipe(out: Console, found: Mapping[str, Any]) -> None:
    """The tree of a merge, in how many passes it is made, and the memory that it takes."""
    from rich.tree import Tree

    def add(at: Tree, node: Mapping[str, Any]) -> Tree:
        for child in node["inputs"]:
            add(at.add(printable(child["node"])), child)
        return at

    out.print()
    out.print(add(Tree(printable(found["tree"]["node"]), guide_style="dim"), found["tree"]))
    out.print()
    passes, looks, memory = found["passes"], found["looks"], found["memory"]
    said = "one pass" if passes == 1 else f"{passes} passes over the models, the last of which writes"
    if found["rebased"]:
        said += f", after the channels of {', '.join(map(printable, found['rebased']))} are matched"
    said += f"; {looks:,} tensors are looked at before they are written" if looks else ""
    out.print(f"{said}; {memory['bytes'] / 2**20:.0f} MiB in flight, of which it needs {memory['least'] / 2**20:.0f}")


def wrote(name: str, nbytes: int) -> None:
    console().print(f"wrote  {printable(name)}  {size(nbytes)}", style="green", soft_wrap=True)


def _interference(out: Console, found: Mapping[str, Any], verbose: bool) -> None:
    """How LoRAs that are combined lie to each other: over all modules, and with -v in each."""
    out.print()
    drawn = table("LoRA", "norm", "acts in the sum at", right=(1, 2))
    for name, strength in found["strengths"].items():
        acts = "-" if strength is None else f"{100 * strength:.1f} %"
        drawn.add_row(printable(name), f"{found['norms'][name]:.4g}", acts)
    out.print(drawn)
    for pair in found["pairs"]:
        met = [p for m in found["modules"] for p in m["pairs"] if (p["a"], p["b"]) == (pair["a"], pair["b"])]
        said = f"cosine {pair['cosine']:+.3f}"
        if met:
            cancelled = sum(p["cancelled"] for p in met) / len(met)
            worst = min(met, key=lambda p: p["cosine"])["cosine"]
            said += f", {worst:+.3f} at the lowest of {modules(len(met))} that both change; "
            said += f"{100 * cancelled:.0f} % of what they have in common cancels"
        else:
            said += ": no module in common"
        out.print(f"{printable(pair['a'])} and {printable(pair['b'])}: {said}", soft_wrap=True)
    if not verbose or not found["modules"]:
        return
    out.print()
    columns = ("module", "pair", "cosine", "smallest angle", "shared", "signs apart", "cancelled")
    drawn = table(*columns, right=(2, 3, 4, 5, 6))
    for module in found["modules"]:
        for pair in module["pairs"]:
            angle = "-" if pair["smallest_angle"] is None else f"{pair['smallest_angle']:.1f}°"
            shared = "-" if pair["shared"] is None else f"{100 * pair['shared']:.0f} %"
            drawn.add_row(
                printable(module["name"]), printable(f"{pair['a']}, {pair['b']}"), f"{pair['cosine']:+.3f}", angle,
                shared, f"{100 * pair['sign_conflicts']:.0f} %", f"{100 * pair['cancelled']:.0f} %",
            )  # fmt: skip
    out.print(drawn)


def _plan(out: Console, points: Sequence[Mapping[str, Any]]) -> None:
    """What each size costs: one rank for all modules, and as many bytes shared out."""
    out.print()
    names = ("rank for all", "size", "error", "shared out: error", "ranks")
    drawn = table(*names, right=tuple(range(len(names))))
    for point in points:
        low, high = point["shared_ranks"]
        drawn.add_row(
            str(point["rank"]), size(point["bytes"]), f"{100 * point['error']:.2f} %",
            f"{100 * point['shared_error']:.2f} %", str(low) if low == high else f"{low} to {high}",
        )  # fmt: skip
    out.print(drawn)


def _modules(out: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """What a verb has to say of each module, a column for each field."""
    out.print()
    fields = list(rows[0])
    drawn = table("module", *(f.replace("_", " ") for f in fields[1:]), right=tuple(range(1, len(fields))))
    for module in rows:
        values = (module[f] for f in fields[1:])
        shown = ("-" if v is None else v if isinstance(v, str) else f"{v:.4g}" for v in values)
        drawn.add_row(printable(module["name"]), *shown)
    out.print(drawn)


def _unused(out: Console, found: Report, verbose: bool) -> None:
    """used, copied and unused in one line; the unused and the kept by reason, or by name with -v."""
    account = found.account
    copied = len(account.copied) + len(account.kept)
    out.print()
    out.print(f"{len(account.used):,} used, {copied:,} copied, {len(account.unused):,} unused")
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in account.unused:
        reasons.setdefault((entry.source, entry.reason), []).append(entry.key)
    for key, reason in account.kept:
        reasons.setdefault(("kept", reason), []).append(key)
    for (source, reason), keys in reasons.items():
        out.print(f"  {len(keys):>6,}  {printable(source)}: {printable(reason)}", style="dim", soft_wrap=True)
        if verbose:
            for key in keys:
                out.print(f"          {printable(key)}", style="dim", soft_wrap=True)


def methods(rows: Iterable[tuple[str, str, Sequence[Any], str]]) -> None:
    """A table of methods: name, the models that it takes, parameters, what it does."""
    drawn = table("method", "models", "parameters", "what it does")
    for name, models, parameters, summary in rows:
        said = ", ".join(p.name if p.default is None else f"{p.name}={p.default}" for p in parameters)
        drawn.add_row(name, models, said, " ".join(summary.split()))
    console().print(drawn)


def print_warning(text: str) -> None:
    console(error=True).print(f"warning: {printable(text)}", style="yellow", soft_wrap=True)
