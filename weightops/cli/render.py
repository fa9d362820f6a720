"""Draws answers: tables, trees, the progress bar. Imports rich inside its functions only."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from weightops.errors import listing, printable, quote
from weightops.ops.report import modules

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from weightops.files.tensor import TensorSpec
    from weightops.ops.inspect import Inspection, Stats
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
    if "line" in found.details:
        out.print()
        out.print(printable(found.details["line"]), soft_wrap=True)
    if verbose and found.details.get("modules"):
        _modules(out, found.details["modules"])
    for text in found.warnings:
        print_warning(text)
    undo, bundled = found.details.get("undo"), found.details.get("embeddings")
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


# ------------------------------------------------------------------------------------------------ inspect


def inspection(found: Inspection, *, verbose: bool) -> None:
    out = console()
    out.print(printable(found.path), style="bold", soft_wrap=True)
    _dotted(out, _lora_words(found, found.lora) if found.lora is not None else _kind_words(found))
    held = [found.container, f"{number(found.parameters)} parameters", size(found.nbytes)]
    _dotted(out, [*held, dtypes(found.dtypes)] if found.lora is not None else held)
    for line in _oddities(found, verbose):
        out.print(line, style="yellow", soft_wrap=True)
    if found.components and found.lora is None:
        out.print()
        _components(out, found)
    if found.metadata:
        out.print()
        drawn = table("metadata", "")
        for key, value in found.metadata.items():
            known = {"weightops": recipe_words, "weightops-undo": undo_words}.get(key)
            words = known(value) if known is not None and not verbose else None
            drawn.add_row(folded(key, verbose), folded(words or value, verbose))
        out.print(drawn)
    if found.left_out:
        out.print()
        drawn = table("left out", "")
        shown = found.left_out if verbose else found.left_out[:10]
        for path, reason in shown:
            drawn.add_row(folded(path, verbose), folded(reason, verbose))
        out.print(drawn)
        if len(shown) < len(found.left_out):
            out.print(f"(and {len(found.left_out) - len(shown):,} more; -v shows them)", style="dim")
    if found.hashes is not None:
        out.print()
        drawn = table("hash", "")
        for entry in found.hashes:
            for name, value in entry.items():
                drawn.add_row(name, printable(value))
        out.print(drawn)
    if found.lora is not None and "spectrum" in found.lora:
        _spectrum(out, found.lora["spectrum"], verbose)
    if found.tensors is not None:
        out.print()
        tree(out, found.tensors, found.stats)
    elif found.stats is not None:
        _stats_summary(out, found)


def _spectrum(out: Console, said: Mapping[str, Any], verbose: bool) -> None:
    """The modules that change most, or all of them with -v, and the whole file."""
    rows, relative = said["modules"], said["relative"] is not None
    most = max(row["rank"] for row in rows)
    ranks = [rank for rank in said["energy"] if int(rank) < most]
    column = "relative" if relative else "delta_norm"
    shown = rows if verbose else sorted(rows, key=lambda row: -(row[column] or 0.0))[:_SHOWN]
    if out.width < 100 and not verbose:
        ranks = ranks[::2]  # for the names' sake
    heads = ["rank", "effective", *(f"% in {r}" if r == ranks[0] else r for r in ranks), "‖ΔW‖"]
    heads += ["of ‖W‖"] if relative else []
    cells = [[f"{row['rank']:,}", f"{row['effective_rank']:.1f}", *_shares(row, ranks, relative)] for row in shown]
    total = ["", "", *_shares(said, ranks, relative)]
    wide = sum(max(map(len, values)) + 2 for values in zip(heads, total, *cells, strict=True))
    names = fitted([printable(row["name"]) for row in shown], max(out.width - wide - 2, 20), whole=verbose)
    out.print()
    drawn = table("module", *heads, right=tuple(range(1, len(heads) + 1)))
    for name, values in zip(names, cells, strict=True):
        drawn.add_row(name, *values)
    if len(rows) > 1:
        drawn.add_row(f"all {len(rows):,}", *total, style="dim")
    out.print(drawn)
    if len(shown) < len(rows):
        out.print(f"(the {len(shown)} that change most; -v shows all {len(rows):,})", style="dim")
    needed = ", ".join(f"{100 * float(share):g} % in {rank:,}" for share, rank in said["rank_for"].items())
    out.print()
    out.print(f"medians: effective rank {said['effective_rank']:.1f}; of ‖ΔW‖², {needed} ranks", soft_wrap=True)
    _left_out(out, said, verbose)


_SHOWN = 20  # modules, unless all are asked for


def _shares(row: Mapping[str, Any], ranks: Sequence[str], relative: bool) -> list[str]:
    """Energies and norms, of a module or of all."""
    cells = [f"{100 * row['energy'][rank]:.1f}" for rank in ranks]
    cells.append(f"{row['delta_norm']:.3g}")
    if relative:
        share = 100 * (row["relative"] or 0.0)
        cells.append("-" if row["relative"] is None else f"{share:.1f} %" if share >= 1 else f"{share:.2g} %")
    return cells


def _left_out(out: Console, said: Mapping[str, Any], verbose: bool) -> None:
    """What has no spectrum, or no weight in the base."""
    reasons: dict[str, list[str]] = {}
    for entry in said["left_out"]:
        reasons.setdefault(entry["reason"], []).append(entry["name"])
    if said["relative"] is not None:
        away = [row["name"] for row in said["modules"] if row["weight_norm"] is None]
        reasons |= {"the base has no such weight": away} if away else {}
    for reason, names in reasons.items():
        listed = ", ".join(map(quote, names)) if verbose else listing(names)
        out.print(f"{modules(len(names))}: {printable(reason)}: {listed}", style="yellow", soft_wrap=True)


def fitted(names: Sequence[str], width: int, *, whole: bool) -> list[str]:
    """Names that are too long without what all begin with, and then without their middle."""
    if whole or max(map(len, names)) <= width:
        return list(names)
    start, found = len(shared_start(names)), []
    for name in (name[start:] or name for name in names):
        tail = (width - 1) // 2
        found.append(name if len(name) <= width else f"{name[: width - 1 - tail]}…{name[-tail:]}")
    return found


def shared_start(names: Sequence[str]) -> str:
    """What different names all begin with, up to a dot or a low line."""
    first, last = min(names, default=""), max(names, default="")
    if first == last:
        return ""
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    return first[: max(first.rfind("_", 0, same), first.rfind(".", 0, same)) + 1]


def _dotted(out: Console, words: Iterable[str]) -> None:
    """The words in one line, or, where that is too narrow, in several, broken between two of them."""
    line = ""
    for word in filter(None, words):
        if line and len(line) + 3 + len(word) > out.width:
            out.print(line, soft_wrap=True)
            line = ""
        line = f"{line} · {word}" if line else word
    out.print(line, soft_wrap=True)


def _kind_words(found: Inspection) -> list[str]:
    """checkpoint, sd15 (sd15_inpaint), original names; or what it may be."""
    words = [found.kind]
    if found.architecture is not None:
        variant = found.variant if found.variant not in (None, found.architecture) else None
        words.append(f"{found.architecture} ({variant})" if variant else found.architecture)
    elif found.possible:
        words.append(f"cannot tell: {_either(found.possible)}")
    return [*words, f"{found.spelling} names"] if found.spelling else words


def _lora_words(found: Inspection, lora: Mapping[str, Any]) -> list[str]:
    """sdxl LoRA, kohya, lora, rank 16 (722 modules), alpha 8, unet 722."""
    words = [f"{found.architecture} LoRA" if found.architecture else "LoRA"]
    if found.possible:
        words.append(f"cannot tell: {_either(found.possible)}")
    elif not found.architecture and lora["dialect"] != "cloneofsimo":
        words.append("of no known model")
    words += [", ".join(lora["dialects"])] if lora["dialects"] else [lora["dialect"]] if lora["dialect"] else []
    count = modules(lora["modules"])
    if lora["families"]:
        words.append(_counted(lora["families"], lora["modules"]))
    words.append(_sizes("rank", lora["ranks"], lora["modules"]) or count)
    if lora["ranks"]:
        words[-1] = words[-1] if "(" in words[-1] else f"{words[-1]} ({count})"
        words.append(_sizes("alpha", lora["alphas"], lora["modules"]) or "no alpha")
    if lora["targets"]:
        words.append(", ".join(f"{name} {count:,}" for name, count in lora["targets"].items()))
    return words


def _either(names: tuple[str, ...]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _counted(found: Mapping[str, int], total: int) -> str:
    """Names, each with its count, unless it is all there is."""
    return ", ".join(name if count == total else f"{name} {count:,}" for name, count in found.items())


def _sizes(word: str, found: Mapping[str, int], total: int) -> str:
    """A few numbers, each with its count unless all modules have it; of many, the least and the largest."""
    if len(found) > 3:
        numbers = sorted(found, key=float)
        return f"{word}s {numbers[0]} to {numbers[-1]}"
    counts = (value if count == total else f"{value} ({count:,})" for value, count in found.items())
    return f"{word} {', '.join(counts)}" if found else ""


def _oddities(found: Inspection, verbose: bool) -> Iterator[str]:
    """What is strange in the file, by name: at most five of each kind, all of them with -v."""

    def named(names: Sequence[str]) -> str:
        return ", ".join(map(quote, names)) if verbose else listing(names)

    def counted(names: Sequence[str], one: str, several: str) -> str:
        return f"{len(names):,} {one if len(names) == 1 else several}: {named(names)}"

    if found.strangers:
        yield counted(found.strangers, "strange key", "strange keys")
    lora = found.lora
    if lora is None:
        return
    if lora["unresolved"] and not found.possible:
        where = f"that {found.architecture} does not have" if found.architecture else "of no known name"
        yield counted(lora["unresolved"], f"module {where}", f"modules {where}")
    if lora["unknown"]:
        yield counted(lora["unknown"], "key of no known scheme", "keys of no known scheme")
    if lora["embeddings"]:
        yield counted(lora["embeddings"], "embedding", "embeddings")
    shown = lora["problems"] if verbose else lora["problems"][:5]
    for problem in shown:
        yield f"problem: {quote(problem['name'])} {printable(problem['what'])}"
    if len(shown) < len(lora["problems"]):
        yield f"(and {len(lora['problems']) - len(shown):,} more problems; -v shows them)"


def _components(out: Console, found: Inspection) -> None:
    known = any("network" in entry for entry in found.components.values())
    names = ("component", *(["network"] if known else []), "tensors", "parameters", "size", "dtypes")
    drawn = table(*names, right=tuple(names.index(n) for n in ("tensors", "parameters", "size")))
    for name, entry in found.components.items():
        drawn.add_row(
            name,
            *([entry.get("network", "-")] if known else []),
            f"{entry['tensors']:,}",
            number(entry["parameters"]),
            size(entry["bytes"]),
            dtypes(entry["dtypes"]),
        )
    if len(found.components) > 1:
        total = (f"{found.count:,}", number(found.parameters), size(found.nbytes), dtypes(found.dtypes))
        drawn.add_row("total", *([""] if known else []), *total, style="dim")
    out.print(drawn)


def recipe_words(text: str) -> str | None:
    """A recipe of ours in words, or None where it is not one: it comes from a file, and may hold anything."""
    try:
        recipe: Any = json.loads(text) if len(text) < 1_000_000 else None
        names = ", ".join(str(entry["name"]) for entry in recipe["inputs"])
        if recipe["command"] == "fuse":
            base, *loras = (str(entry["name"]) for entry in recipe["inputs"])
            added = "".join(f" + {float(s):g} × {n}" for s, n in zip(recipe["strengths"], loras, strict=True))
            return f"fuse, {base}{added} (weightops {recipe['version']})"
        if recipe["command"] == "extract":
            tuned, base = (entry["name"] for entry in recipe["inputs"])
            return f"extract, {tuned} − {base}, rank {recipe['rank']} (weightops {recipe['version']})"
        if recipe["command"] == "convert":
            to = f", to {recipe['to']}" if "to" in recipe else ""
            return f"convert of {names}{to}, dtype {recipe['dtype']} (weightops {recipe['version']})"
        parameters = recipe["parameters"].items()
        settings = ", ".join(
            f"{k} {', '.join(f'{x:g}' for x in v) if isinstance(v, list) else v}" for k, v in parameters
        )
        return f"{recipe['command']}, {recipe['method']} of {names}; {settings} (weightops {recipe['version']})"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def undo_words(text: str) -> str | None:
    """What an undo file is for, or None where it is none: it comes from a file, and may hold anything."""
    try:
        said: Any = json.loads(text)
        return f"of {said['fused']['name']}: unfuse makes it {said['original']['name']} again"
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def folded(text: str, whole: bool, limit: int = 160) -> str:
    """A value from a file: harmless, on one line, and of bounded length unless all of it is asked for."""
    if whole or len(text) <= limit:
        return printable(text)
    return f"{printable(text[:limit])}… ({len(text):,} characters; -v shows them)"


def inspections(found: list[Inspection]) -> None:
    """Several files as one table."""
    drawn = table("file", "kind", "architecture", "tensors", "parameters", "size", "dtypes", right=(3, 4, 5))
    for one in found:
        drawn.add_row(
            printable(one.path), one.kind, one.architecture or (_either(one.possible) if one.possible else "-"),
            f"{one.count:,}", number(one.parameters),
            size(one.nbytes), dtypes(one.dtypes),
        )  # fmt: skip
    console().print(drawn)


def tree(out: Console, tensors: Mapping[str, TensorSpec], stats: Mapping[str, Stats] | None) -> None:
    """The names as a tree of their dotted parts; a part with a single child is joined with it."""
    from rich.text import Text

    root: dict[str, Any] = {}
    for name, spec in tensors.items():
        at = root
        # No model has names of so many parts; a hostile one would be a tree too deep to draw.
        *path, leaf = name.split(".", 20)
        for part in path:
            at = at.setdefault(part + ".", {})
        at[leaf] = (name, spec)

    lines = [Text(f"{len(tensors):,} tensor{'' if len(tensors) == 1 else 's'}", style="dim")]

    def draw(node: Mapping[str, Any], indent: str) -> None:
        for number, (part, child) in enumerate(node.items(), 1):
            last = number == len(node)
            line = Text(f"{indent}{'└── ' if last else '├── '}", style="dim")
            lines.append(line)
            if isinstance(child, tuple):
                name, spec = child
                line.append(f"{printable(part) or '(no name)'}  ", style="not dim")
                line.append(f"{spec.dtype} {list(spec.shape)}")
                if stats and name in stats:
                    line.append(f"  {stats_words(stats[name])}", style="red" if bad(stats[name]) else "cyan")
                continue
            while len(child) == 1 and isinstance(next(iter(child.values())), dict):
                (more, child), *_ = child.items()
                part += more
            line.append(printable(part), style="not dim")
            draw(child, indent + ("    " if last else "│   "))

    draw(root, "")
    # Not rich's own tree, which folds what is wider than the terminal, so that no line could be found by a search.
    out.print(Text("\n").join(lines), soft_wrap=True)


def stats_words(s: Stats) -> str:
    words = f"norm {s.norm:.4g}"
    if s.low is not None:
        words += f", {s.low:.4g} … {s.high:.4g}"
    return words + (f", NaN {s.nan:,}" if s.nan else "") + (f", Inf {s.inf:,}" if s.inf else "")


def bad(s: Stats) -> bool:
    return bool(s.nan or s.inf)


def _stats_summary(out: Console, found: Inspection) -> None:
    """The largest values, and everything that is not finite, by name."""
    assert found.stats is not None
    out.print()
    broken = {name: s for name, s in found.stats.items() if bad(s)}
    finite = [s for s in found.stats.values() if s.low is not None]
    if finite:
        low, high = min(s.low for s in finite if s.low is not None), max(s.high for s in finite if s.high is not None)
        norm = math.hypot(*(s.norm for s in finite))
        zero = sum(s.norm == 0 for s in finite)
        words = f"{len(found.stats):,} floating tensors: norm {norm:.5g}, values {low:.4g} … {high:.4g}"
        out.print(words + (f", {zero:,} all zero" if zero else ""))
    if not broken:
        out.print("no NaN, no Inf", style="green")
    for name, s in broken.items():
        out.print(f"{printable(name)}: {stats_words(s)}", style="red", soft_wrap=True)
