"""merge --grid: variants of one merge, each in a file of its own in one folder, from inputs read for all at once.

Each variant is planned as if it were alone. Tasks of theirs that read the same are then made one, with an output for
each variant, so that what is written is byte for byte what so many merges would write.
"""

from __future__ import annotations

import csv
import inspect
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.engine.chunks import memory_for, smallest_memory
from weightops.errors import UsageError, quote
from weightops.files.folder import OutputFile, replace_small
from weightops.merging.recipe import merges
from weightops.ops.folders import into_folder
from weightops.ops.merge_looks import looked_everywhere, passes
from weightops.ops.merge_plan import plan_merge
from weightops.ops.produce import Bar, Planned, output_nbytes, produce
from weightops.plan import Plan, Task

if TYPE_CHECKING:
    from torch import Tensor

    from weightops.files.checkpoint import Checkpoint
    from weightops.files.tensor import Slot
    from weightops.merging.method import Look, MergeMethod
    from weightops.merging.recipe import Recipe
    from weightops.ops.merge_plan import Wish
    from weightops.ops.report import Report
    from weightops.plan import Block

MOST = 100  # variants

TABLE = "grid.csv"

Score = Callable[[Path], Mapping[str, float]]

# Looks of so many variants share one reading of a tensor: what they keep of its blocks until it is whole is little,
# but of all variants together it could be more than what is in flight.
_LOOKS_AT_ONCE = 4

_SAYS = "NAME=LO..HI:N, as alpha=0.1..0.9:9, or NAME=X,Y,…"


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the merges. name: of its file, without a suffix. settings: those in which variants differ."""

    name: str
    settings: Mapping[str, float]
    recipe: Recipe


# ------------------------------------------------------------------------------------------------ which variants


def read_grid(words: Sequence[str]) -> dict[str, list[float]]:
    """What --grid says, NAME=LO..HI:N (N values, both ends among them) or NAME=X,Y,…: values by name.

    Raises UsageError.
    """
    found: dict[str, list[float]] = {}
    for word in words:
        name, equals, said = word.partition("=")
        if not equals or not name:
            raise UsageError("--grid", f"found {quote(word)}, expected {_SAYS}")
        if name in found:
            raise UsageError("--grid", f"found {quote(name)} twice", "a list says several values: NAME=X,Y,…")
        found[name] = _range(name, said) if ".." in said else [_number(name, number) for number in said.split(",")]
    return found


def _number(name: str, word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError("--grid", f"found {quote(word)} for {name}, expected a number: {_SAYS}")
    return number


def _range(name: str, said: str) -> list[float]:
    low, _, rest = said.partition("..")
    high, colon, count = rest.partition(":")
    if not colon or not (count.isascii() and count.isdecimal() and len(count) < 10):
        raise UsageError("--grid", f"found {quote(said)} for {name}, expected {_SAYS}")
    first, last, number = _number(name, low), _number(name, high), int(count)
    least = 1 if first == last else 2
    if first > last:
        raise UsageError("--grid", f"found {quote(said)} for {name}, expected the smaller number first")
    if not least <= number <= MOST:
        what = f"found {number:,} values from {first:g} to {last:g} for {name}"
        raise UsageError("--grid", f"{what}, expected {least} to {MOST}, both ends among them")
    # As decimals, so that the third of 0.1..0.9:9 is 0.3, and no number next to it.
    start, end = Fraction(repr(first)), Fraction(repr(last))
    return [float(start + (end - start) * n / max(number - 1, 1)) for n in range(number)]


def variants_of(
    grid: Mapping[str, Sequence[float]],
    method: MergeMethod,
    make: Callable[[float | None, Mapping[str, Any]], Recipe],
    *,
    alpha: float | None,
    parameters: Mapping[str, Any],
) -> list[Variant]:
    """Every combination of the values, in their order, the last name's first. make: the recipe, of alpha and settings.

    Raises UsageError for names that are no numbers of the method or are said elsewhere, for values that make no sense
    or are equal, and for too many variants.
    """
    if not grid:
        raise UsageError("--grid", f"says nothing, expected {_SAYS}")
    axes = {name: _axis(name, values, method) for name, values in grid.items()}
    for name in axes:
        if name in parameters or (name == "alpha" and alpha is not None):
            option = "--set" if name in parameters else "--alpha"
            raise UsageError("--grid", f"found {name}, of which {option} says a number", "say it in one place")
    count = math.prod(map(len, axes.values()))
    if count > MOST:
        said = " × ".join(str(len(values)) for values in axes.values())
        shown = f"{said} = {count:,}" if len(axes) > 1 else said
        raise UsageError("--grid", f"found {shown} variants, expected at most {MOST}")
    texts = {name: _texts(values) for name, values in axes.items()}
    found = []
    for numbers in itertools.product(*(range(len(values)) for values in axes.values())):
        chosen = dict(zip(axes, numbers, strict=True))
        settings = {name: axes[name][n] for name, n in chosen.items()}
        own = {name: value for name, value in settings.items() if name != "alpha"}
        recipe = make(settings.get("alpha", alpha), {**parameters, **own})
        found.append(Variant("_".join(f"{name}-{texts[name][n]}" for name, n in chosen.items()), settings, recipe))
    return found


def _axis(name: str, values: Sequence[float], method: MergeMethod) -> list[float]:
    """The values, as the setting has them."""
    kinds = {p.name: p.kind for p in method.parameters if p.kind in ("float", "int", "Share")}
    if name not in ("alpha", *kinds):
        known = ", ".join(dict.fromkeys(["alpha", *kinds]))
        raise UsageError("--grid", f"{method.name} has no number {quote(name)}", f"a grid may be of {known}")
    if not values:
        raise UsageError("--grid", f"found no value for {name}")
    numbers = [_number(name, str(value)) for value in values]
    if kinds.get(name) == "int":
        broken = next((number for number in numbers if number != int(number)), None)
        if broken is not None:
            raise UsageError("--grid", f"found {broken:g} for {name}, expected whole numbers")
        numbers = [int(number) for number in numbers]
    twice = next((number for n, number in enumerate(numbers) if number in numbers[:n]), None)
    if twice is not None:
        raise UsageError("--grid", f"found {twice:g} twice for {name}, expected different values")
    return numbers


def _texts(values: Sequence[float]) -> list[str]:
    """The values as they stand in names: of so few digits that they remain different."""
    texts: list[str] = []
    for digits in range(6, 18):
        texts = [str(value) if isinstance(value, int) else f"{value:.{digits}g}" for value in values]
        if len(set(texts)) == len(texts):
            break
    return texts


# ------------------------------------------------------------------------------------------------ the merge


def merge_grid(
    variants: Sequence[Variant], files: Mapping[str, Checkpoint], target: Path, wish: Wish, *, score: Score | None,
    memory: int | None, threads: int | None, device: str, force: bool, dry_run: bool, check: bool,
    bar: Bar,
) -> Report:  # fmt: skip
    """Write all variants into the folder `target`, with a table of them, and say what they are and take.

    score: is called with each, once the folder is there, so that one that fails loses nothing; its numbers join the
    table, which is written anew after each.
    """
    running: dict[str, Any] = {"threads": threads, "device": device}
    wishes, looked = _looked(variants, files, wish, dry_run=dry_run, bar=bar, memory=memory, **running)
    plans: list[Planned] = []
    for variant, own in zip(variants, wishes, strict=True):
        planned = plan_merge(variant.recipe, files, own).planned
        like = files[variant.recipe.like.file]
        planned.plan, _ = into_folder(like, planned.plan, Path(variant.name), asked=True)
        plans.append(planned)
    rows = _rows(variants, [planned.plan for planned in plans])
    plan = joined([p.plan for p in plans], [v.name for v in variants], _classes([_looks(v.recipe) for v in variants]))
    plan = replace(plan, extras={**plan.extras, TABLE: table(rows)})
    memory = memory_for(plan, memory)
    report = produce(
        "merge", _said(plans, plan), target, force=force, dry_run=dry_run, check=check,
        on_progress=bar.part(bar.shown / bar.total, 1.0), memory=memory, **running,
    )  # fmt: skip
    apart = [bytes_to_read(planned.plan) for planned in plans]
    report.details |= {
        "grid": rows,
        "reads": {"bytes": bytes_to_read(plan), "one": max(apart), "apart": sum(apart)},
        "passes": 1 + looked,
        "looks": sum(1 for task in plan.tasks if task.gather is not None),
        "memory": {"bytes": memory, "least": smallest_memory(plan)[0]},
    }
    if score is not None and not dry_run:
        _score(score, target, rows, report)
    return report


def _said(plans: Sequence[Planned], plan: Plan) -> Planned:
    """What is said of all variants: the account of the one that uses the most."""
    most = max(plans, key=lambda planned: len(planned.account.used))
    first, last = plans[0].summary, plans[-1].summary
    words = {1: first, 2: f"{first}, and {last}"}.get(len(plans), f"{len(plans)} variants: {first}, … {last}")
    warnings = list(dict.fromkeys(text for planned in plans for text in planned.warnings))
    return Planned(plan, most.account, words, most.groups, warnings)


def bytes_to_read(plan: Plan) -> int:
    """The bytes that its tasks read, each as often as they do."""
    return sum(entry.slot.spec.nbytes for task in plan.tasks for entry in task.inputs)


# ------------------------------------------------------------------------------------------------ looks


def _looked(
    variants: Sequence[Variant], files: Mapping[str, Checkpoint], wish: Wish, *, dry_run: bool, bar: Bar, **running: Any
) -> tuple[list[Wish], int]:
    """The wish of each variant, with what looks at everything found, and how many passes these took."""
    nodes = [passes(variant.recipe) for variant in variants]
    numbers = _classes([_looks(variant.recipe) if own else [] for variant, own in zip(variants, nodes, strict=True)])
    firsts = [numbers.index(n) for n in range(max(numbers) + 1)]
    found: list[Wish] = []
    for n, first in enumerate(firsts):
        start = bar.shown / bar.total
        part = Bar(bar.part(start, start + (1 - start) / (len(firsts) + 1 - n)))
        part.total = bar.total
        found.append(looked_everywhere(variants[first].recipe, files, wish, dry_run=dry_run, bar=part, **running))
    wishes = []
    for number, own in zip(numbers, nodes, strict=True):
        known = found[number].known
        theirs = (known[id(node)] for node in nodes[firsts[number]])
        wishes.append(replace(wish, known=dict(zip(map(id, own), theirs, strict=True))))
    return wishes, sum(len(nodes[first]) for first in firsts)


def _looks(recipe: Recipe) -> list[Any]:
    """All on which looks depend: their methods, what these are given, and the settings that the looks take."""
    found = []
    for node in merges(recipe.root):
        if node.method.looks:
            taken = {name for look in node.method.looks for name in _settings_of(look, node.parameters)}
            settings = {name: node.parameters[name] for name in sorted(taken)}
            found.append((node.method.name, node.inputs, settings, node.statistics))
    return found


def _settings_of(look: Look, names: Mapping[str, Any]) -> set[str]:
    """The settings that a look takes: those that its functions name, and all of them where one hands them on.

    What a function leaves unused of what it is given, its signature calls **_parameters.
    """
    found = set()
    for function in (look.block, look.together, look.everywhere):
        for p in inspect.signature(function).parameters.values() if function is not None else ():
            if p.kind is p.VAR_KEYWORD and not p.name.startswith("_"):
                return set(names)
            if p.kind is p.KEYWORD_ONLY and p.name in names:
                found.add(p.name)
    return found


def _classes(things: Sequence[Any]) -> list[int]:
    """Numbers, the same for equal things: 0 for the first, 1 for the first other one, and so on."""
    kinds: list[Any] = []
    numbers = []
    for thing in things:
        if thing not in kinds:
            kinds.append(thing)
        numbers.append(kinds.index(thing))
    return numbers


# ------------------------------------------------------------------------------------------------ one plan of many


def joined(plans: Sequence[Plan], names: Sequence[str], classes: Sequence[int]) -> Plan:
    """One plan that writes what all of these write: a file of each name, or a folder, in one folder.

    classes: of each plan, which share looks have the same number. The plans are of the same keys of the same sources.
    """
    units = [_units(plan) for plan in plans]
    copies: list[Task] = []
    rest: list[Task] = []
    for place in units[0]:
        groups: list[list[_Member]] = []
        for own, name, number in zip(units, names, classes, strict=True):
            member = _Member(own[place], name, number)
            group = next((g for g in groups if _read_alike(g[0].tasks, member.tasks)), None)
            if group is None:
                groups.append([member])
            else:
                group.append(member)
        for group in groups:
            (copies if group[0].tasks[-1].compute is None else rest).extend(_together(group))
    files, extras = _files(plans, names)
    return Plan(
        plans[0].sources,
        {_key(n, key): spec for plan, n in zip(plans, names, strict=True) for key, spec in plan.outputs.items()},
        (*copies, *rest),
        refuse_nonfinite=plans[0].refuse_nonfinite,
        files=files,
        extras=extras,
        variants=tuple(plans),
    )


def _key(name: str, key: str) -> str:
    """What a tensor of a variant is called among those of all; it stands so in messages."""
    return f"{name}: {key}"


def _files(plans: Sequence[Plan], names: Sequence[str]) -> tuple[tuple[OutputFile, ...], dict[str, bytes]]:
    files: list[OutputFile] = []
    extras: dict[str, bytes] = {}
    for plan, name in zip(plans, names, strict=True):
        if not plan.files:
            files.append(OutputFile(f"{name}.safetensors", {_key(name, key): key for key in plan.outputs}))
        for file in plan.files:
            keys = {_key(name, key): inside for key, inside in file.keys.items()}
            files.append(OutputFile(f"{name}/{file.path}", keys))
        extras |= {f"{name}/{path}": data for path, data in plan.extras.items()}
    return tuple(files), extras


@dataclass(frozen=True, slots=True)
class _Member:
    """What fills one tensor, or one band of it, in one variant: looks, and the task that follows them."""

    tasks: tuple[Task, ...]
    name: str
    looks: int


def _units(plan: Plan) -> dict[tuple[str, Any], tuple[Task, ...]]:
    """The tasks of a plan, by what they fill; with each the looks before it."""
    found: dict[tuple[str, Any], tuple[Task, ...]] = {}
    before: list[Task] = []
    for task in plan.tasks:
        before.append(task)
        if task.outputs:
            (slot,) = task.outputs
            found[slot.key, slot.bands] = tuple(before)
            before = []
    return found


def _read_alike(tasks: Sequence[Task], others: Sequence[Task]) -> bool:
    """Do they read and fill the same, in blocks of the same height?"""

    def shape(task: Task) -> tuple[Any, ...]:
        return task.inputs, task.grain, task.compute is None, tuple(slot.spec for slot in task.outputs)

    return len(tasks) == len(others) and all(shape(a) == shape(b) for a, b in zip(tasks, others, strict=True))


def _together(group: Sequence[_Member]) -> list[Task]:
    """The tasks that do what those of all members do, and read it once; looks of a few kinds at a time."""
    fills = [member.tasks[-1] for member in group]
    outputs = tuple(_renamed(member.tasks[-1].outputs[0], member.name) for member in group)
    first = fills[0]
    if first.compute is None:
        return [Task(first.name, first.inputs, outputs)]
    kinds = {member.looks: member.tasks[:-1] for member in reversed(group)}
    numbers = sorted(kinds)
    lots = [numbers[n : n + _LOOKS_AT_ONCE] for n in range(0, len(numbers), _LOOKS_AT_ONCE)]
    count = len(group[0].tasks) - 1
    looks = [_look_together([kinds[number][stage] for number in lot]) for lot in lots for stage in range(count)]
    # Of each member: where among all that was found stands what its own looks have.
    places = [
        [(lot * count + stage, lots[lot].index(member.looks)) for stage in range(count)]
        for member in group
        for lot in [numbers.index(member.looks) // _LOOKS_AT_ONCE]
    ]
    fill = replace(
        first, outputs=outputs, compute=_each(fills, places), work_nbytes=max(task.work_nbytes for task in fills),
        tolerance=max(task.tolerance for task in fills), follows=len(looks),
    )  # fmt: skip
    return [*looks, fill]


def _renamed(slot: Slot, name: str) -> Slot:
    return replace(slot, key=_key(name, slot.key))


def _each(fills: Sequence[Task], places: Sequence[Sequence[tuple[int, int]]]) -> Callable[..., None]:
    computes: list[Callable[..., Any]] = [task.compute for task in fills if task.compute is not None]

    def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block, *found: Any) -> None:
        for own, out, looked in zip(computes, outputs, places, strict=True):
            own(inputs, [out], block, *(found[number][place] for number, place in looked))

    return compute


def _look_together(looks: Sequence[Task]) -> Task:
    """One look in place of several; it finds a tuple of what they find, and is handed such ones."""
    computes: list[Callable[..., Any]] = [task.compute for task in looks if task.compute is not None]
    gathers = [task.gather for task in looks if task.gather is not None]

    def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block, *before: Any) -> list[Any]:
        return [own(inputs, outputs, block, *(b[n] for b in before)) for n, own in enumerate(computes)]

    def gather(values: Sequence[list[Any]], *before: Any) -> tuple[Any, ...]:
        return tuple(own([v[n] for v in values], *(b[n] for b in before)) for n, own in enumerate(gathers))

    work = max(task.work_nbytes for task in looks)
    return replace(looks[0], compute=compute, gather=gather, work_nbytes=work)


# ------------------------------------------------------------------------------------------------ the table


def _rows(variants: Sequence[Variant], plans: Sequence[Plan]) -> list[dict[str, Any]]:
    return [
        {
            "file": variant.name if plan.files else f"{variant.name}.safetensors",
            "settings": dict(variant.settings),
            "bytes": output_nbytes(plan, Path(variant.name)),
        }
        for variant, plan in zip(variants, plans, strict=True)
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The rows as CSV: the file, its settings, its bytes, and its scores, as far as there are any."""
    scores = dict.fromkeys(name for row in rows for name in row.get("scores", ()))
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    write(["file", *rows[0]["settings"], "bytes", *scores])
    for row in rows:
        found = row.get("scores", {})
        write([row["file"], *row["settings"].values(), row["bytes"], *(found.get(name, "") for name in scores)])
    return text.getvalue().encode()


def _score(score: Score, target: Path, rows: list[dict[str, Any]], report: Report) -> None:
    taken = {"file", "bytes", *rows[0]["settings"]}
    for row in rows:
        found = {str(name): float(value) for name, value in score(target / row["file"]).items()}
        if clash := sorted(taken & found.keys()):
            what = f"found the name {quote(clash[0])}, which is a column of {TABLE}"
            raise UsageError("score", what, "the models are written; call the number otherwise")
        before = len(table(rows))
        row["scores"] = found
        data = table(rows)
        replace_small(target / TABLE, data)
        report.bytes_written += len(data) - before
