"""What a merge must know of all its models before it begins: looks that take a pass of their own, and re-basin."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weightops.engine.chunks import memory_for
from weightops.engine.run import run
from weightops.merging.recipe import Model, leaves, merges
from weightops.ops.merge_plan import averaged, plan_merge
from weightops.ops.rebasin import find_permutations
from weightops.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightops.files.checkpoint import Checkpoint
    from weightops.merging.recipe import Merge, Recipe
    from weightops.ops.merge_plan import Orders, Wish
    from weightops.ops.produce import Bar


def passes(recipe: Recipe) -> list[Merge]:
    """The methods that look at everything first, each in a pass over the models, in order."""
    return [node for node in merges(recipe.root) if any(look.everywhere for look in node.method.looks)]


def rebased(recipe: Recipe) -> list[Model]:
    """The models whose channels are brought into the order of another's first."""
    return list(dict.fromkeys(leaf for leaf in leaves(recipe.root) if isinstance(leaf, Model) and leaf.to is not None))


# Sweeps over all groups of channels, at most. Source: Ainsworth et al. 2022, whose code also stops when nothing moves.
_SWEEPS = 10


def found_orders(
    recipe: Recipe, files: Mapping[str, Checkpoint], *, bar: Bar, **running: Any
) -> tuple[Orders, list[dict[str, Any]]]:
    """The orders of the channels of the models that are to be rebased, and what is to be said of each."""
    orders, said = {}, []
    share = 0.5 / max(len(rebased(recipe)), 1)
    for number, leaf in enumerate(rebased(recipe)):
        assert leaf.to is not None
        model, reference = (averaged(files[m.file]) if m.ema else files[m.file] for m in (leaf, leaf.to))
        found = find_permutations(
            model, reference, iterations=_SWEEPS, seed=recipe.seed,
            on_progress=bar.part(number * share, (number + 1) * share), **running,
        )  # fmt: skip
        orders[leaf] = found.permutations
        channels = sum(found.channels.values())
        weigh = {name: count / channels for name, count in found.channels.items()}
        said.append({
            "model": model.label, "to": reference.label, "channels": channels,
            "moved": sum(found.moved.values()), "sweeps": found.sweeps,
            "before": sum(weigh[name] * value for name, value in found.before.items()),
            "after": sum(weigh[name] * value for name, value in found.after.items()),
            "left": {" ".join(filter(None, name)): reason for name, reason in found.left.items()},
        })  # fmt: skip
    return orders, said


def looked_everywhere(
    recipe: Recipe, files: Mapping[str, Checkpoint], wish: Wish, *, dry_run: bool, bar: Bar,
    memory: int | None = None, **running: Any,
) -> Wish:  # fmt: skip
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
            looks = made.compiler.tasks(piece, looks_of=node)
            if looks:  # the method may have nothing to do here
                tasks += looks
                labels[len(tasks) - 1] = piece.label
        plan = Plan(made.planned.plan.sources, {}, tuple(tasks))
        start = bar.shown / bar.total
        stop = start + (1 - start) / (len(nodes) + 1 - number)
        outcome = run(plan, None, memory=memory_for(plan, memory), on_progress=bar.part(start, stop), **running)
        found = {label: outcome.found[n] for n, label in labels.items() if n in outcome.found}
        everywhere = next(look.everywhere for look in node.method.looks if look.everywhere is not None)
        known[id(node)] = everywhere(found, **node.parameters)
    return replace(wish, known=known)
