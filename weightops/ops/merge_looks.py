"""What a merge must know of all its models before it begins: looks that take a pass of their own."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weightops.engine.run import run
from weightops.merging.recipe import merges
from weightops.ops.merge_plan import plan_merge
from weightops.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightops.files.checkpoint import Checkpoint
    from weightops.merging.recipe import Merge, Recipe
    from weightops.ops.merge_plan import Wish
    from weightops.ops.produce import Bar


def passes(recipe: Recipe) -> list[Merge]:
    """The methods that look at everything first, each in a pass over the models, in order."""
    return [node for node in merges(recipe.root) if any(look.everywhere for look in node.method.looks)]


def looked_everywhere(
    recipe: Recipe, files: Mapping[str, Checkpoint], wish: Wish, *, dry_run: bool, bar: Bar, **running: Any
) -> Wish:
    """The wish, with what these methods found. Without a run, what they will find stands for itself."""
    nodes = passes(recipe)
    known: dict[int, Mapping[str, Any]] = {}
    for number, node in enumerate(nodes):
        if dry_run:
            known[id(node)] = defaultdict(tuple)
            continue
        made = plan_merge(recipe, files, replace(wish, known=known))
        tasks, labels = [], {}
        for piece in made.pieces:
            tasks += made.compiler.tasks(piece, looks_of=node)
            labels[len(tasks) - 1] = piece.label
        plan = Plan(made.planned.plan.sources, {}, tuple(tasks))
        share = len(nodes) + 1
        outcome = run(plan, None, on_progress=bar.part(number / share, (number + 1) / share), **running)
        found = {label: outcome.found[n] for n, label in labels.items() if n in outcome.found}
        everywhere = next(look.everywhere for look in node.method.looks if look.everywhere is not None)
        known[id(node)] = everywhere(found, **node.parameters)
    return replace(wish, known=known)
