"""Draws what `inspect` found: what a file is, its components, tensors, statistics and spectra."""

from __future__ import annotations

import itertools
import json
import math
from typing import TYPE_CHECKING, Any

from weightops.cli.lineage import lineage
from weightops.cli.render import console, dtypes, number, size, table
from weightops.errors import listing, printable, quote
from weightops.ops.report import modules

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from rich.console import Console

    from weightops.files.tensor import TensorSpec
    from weightops.ops.inspect import Inspection, Stats


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
    if found.lineage is not None:
        out.print()
        lineage(out, found.lineage, verbose=verbose)
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
        if "merge" in recipe:
            return f"merge of {names} (weightops {recipe['version']})"
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
        for place, (part, child) in enumerate(node.items(), 1):
            last = place == len(node)
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
