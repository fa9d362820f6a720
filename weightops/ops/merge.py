"""merge: models, LoRAs and differences into one model, by a recipe. Plans from headers alone."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.engine.chunks import memory_for, smallest_memory
from weightops.engine.run import Progress, ignore
from weightops.errors import UsageError, listing, quote
from weightops.files.checkpoint import open_checkpoint
from weightops.merging.method import METHODS, cancel_out, checked
from weightops.merging.recipe import Model, Recipe, Varied, kind_of, leaves, merged, merges, over, references_of
from weightops.ops.folders import into_folder
from weightops.ops.merge_grid import merge_grid, variants_of
from weightops.ops.merge_looks import found_orders, looked_everywhere, passes, rebased
from weightops.ops.merge_plan import Wish, option_of, plan_merge
from weightops.ops.produce import Bar, check_words, named, on_disk, produce, stem
from weightops.ops.recipe_words import drawn

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from weightops.files.checkpoint import Checkpoint, Named
    from weightops.files.held import Held
    from weightops.merging.method import MergeMethod
    from weightops.merging.recipe import Node
    from weightops.ops.merge_grid import Score
    from weightops.ops.recipe_words import Drawn
    from weightops.ops.report import Report


def merge(
    *models: str | os.PathLike[str],
    output: Named | None = None,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    alpha: float | None = None,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    base: str | os.PathLike[str] | None = None,
    method: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    blocks: str | None = None,
    statistics: Sequence[str | os.PathLike[str]] = (),
    ema: bool = False,
    rebasin: bool = False,
    seed: int = 0,
    vae: str | int | os.PathLike[str] = "1",
    text_encoder: str | int = "merge",
    dtype: str = "keep",
    drop: Sequence[str] = (),
    on_mismatch: str = "error",
    grid: Mapping[str, Sequence[float]] | None = None,
    score: Score | None = None,
    strict: bool = False,
    allow_nonfinite: bool = False,
    memory: int | None = None,
    threads: int | None = None,
    device: str = "auto",
    force: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    on_progress: Progress = ignore,
) -> Report:
    """Merge models into the file `output` (None: a name built from theirs, in this folder; a Held: into memory).

    recipe: a tree of models, LoRAs, differences and methods, a YAML file or as a value, in place of `models` and all
    that is said of them. alpha: for two models, (1−α)·A + α·B; with `base` C, A + α·(B − C). weights: one per model,
    normalised to a sum of one; with `base`, base + Σ wᵢ·(modelᵢ − base), as they are given. normalize: False takes them
    as they are in every method that would normalise them.
    method: another way; of one of differences, `base` is taken from each model, and alpha times the result added to it.
    blocks: other numbers in place of alpha for some tensors, in the words of --blocks. statistics: a file per model,
    for methods that weigh by such. ema: take the averages that training kept (model_ema.*) for the weights. rebasin:
    bring the channels of the other models, and of the base, into the order of the first's before (git re-basin). seed:
    of methods that draw. A diffusers folder as the first model makes one, unless `output` ends in .safetensors.
    vae: the number of the model whose VAE is kept, "merge", or a file. text_encoder: a number, or "merge".
    dtype: keep (the first model's, tensor by tensor), fp32, fp16, bf16, fp8_e4m3, fp8_e5m2. drop: components
    to leave out. on_mismatch: "error" or "keep-first" for tensors of different shapes. strict: refuse
    whatever would be left out or kept unasked. memory: bytes in flight (None: 128 MiB, and up to 512 MiB for a matrix
    that is needed whole). verify: read samples back and compare.
    grid: values for alpha and the method's numbers; each combination is merged into a file of its own in the folder
    `output`, from one reading. score: called with the path of each once all are written; what it returns joins the
    folder's table, and the report's `details["grid"]`.
    Raises WeightopsError, whose kinds are drawn in `weightops.errors`.
    """

    def made(alpha: float | None, parameters: Mapping[str, Any]) -> Recipe:
        return recipe_of(
            models, alpha=alpha, weights=weights, normalize=normalize, base=base, method=method,
            parameters=parameters, blocks=blocks, statistics=statistics, ema=ema, rebasin=rebasin, seed=seed, vae=vae,
            text_encoder=text_encoder, dtype=dtype, drop=drop, on_mismatch=on_mismatch,
        )  # fmt: skip

    variants = []
    if grid is not None:
        if recipe is not None:
            raise UsageError("--grid", "found --recipe beside it, which says every setting", "say the merge in words")
        variants = variants_of(grid, _method_of(method, base), made, alpha=alpha, parameters=parameters or {})
        asked = variants[0].recipe
    elif score is not None:
        raise UsageError("score", "is called with the variants of a grid, found no grid")
    elif recipe is None:
        asked = made(alpha, parameters or {})
    elif isinstance(recipe, Recipe):
        asked = recipe
    else:
        asked = read_recipe(recipe)
    check_recipe(asked)
    with contextlib.ExitStack() as stack:
        files = {file: stack.enter_context(open_checkpoint(file)) for file in files_of(asked)}
        bar = Bar(on_progress)
        bar.total = max(sum(opened.nbytes for opened in files.values()), 1)
        running: dict[str, Any] = {"memory": memory, "threads": threads, "device": device}
        wish, moved = Wish(strict, allow_nonfinite), list[dict[str, Any]]()
        if not dry_run:
            orders, moved = found_orders(asked, files, bar=bar, **running)
            wish = replace(wish, orders=orders)
        if variants:
            folder = named(on_disk(output, "--grid"), _name(asked, files)[0], "-grid")
            report = merge_grid(
                variants, files, folder if output is not None else folder.with_suffix(""), wish, score=score,
                force=force, dry_run=dry_run, check=verify, bar=bar, **running,
            )  # fmt: skip
            report.warnings += [_left(each) for each in moved if each["left"]]
            report.details |= _told(moved)
            return report
        wish = looked_everywhere(asked, files, wish, dry_run=dry_run, bar=bar, **running)
        planned = plan_merge(asked, files, wish).planned
        planned.warnings += [_left(each) for each in moved if each["left"]]
        memory = running["memory"] = memory_for(planned.plan, memory)
        target: Path | Held = named(output, *_name(asked, files))
        planned.plan, target = into_folder(files[asked.like.file], planned.plan, target, asked=output is not None)
        report = produce(
            "merge", planned, target, force=force, dry_run=dry_run, check=verify,
            on_progress=bar.part(bar.shown / bar.total, 1.0), **running,
        )  # fmt: skip
        report.details |= {
            "tree": _tree(drawn(asked)),
            "passes": 1 + len(passes(asked)),
            "rebased": [files[leaf.file].label for leaf in rebased(asked)],
            "looks": sum(1 for task in planned.plan.tasks if task.gather is not None),
            "memory": {"bytes": memory, "least": smallest_memory(planned.plan)[0]},
        }
        report.details |= _told(moved)
        return report


def _told(moved: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"rebasin": moved, "line": "; ".join(map(_moved, moved))} if moved else {}


def _moved(each: Mapping[str, Any]) -> str:
    said = f"{each['moved']:,} of {each['channels']:,} channels of {each['model']} moved"
    return f"{said}; its likeness to {each['to']} was {each['before']:.3f}, and is {each['after']:.3f}"


def _left(each: Mapping[str, Any]) -> str:
    names = sorted(each["left"])
    return f"{each['model']}: channels left in their order: {listing(names)}: {each['left'][names[0]]}"


def _tree(node: Drawn) -> dict[str, Any]:
    return {"node": node[0], "inputs": [_tree(child) for child in node[1]]}


def files_of(recipe: Recipe) -> list[str]:
    """Every file that a recipe names, each once."""
    found = [leaf.file for leaf in leaves(recipe.root)] + [recipe.like.file, *(m.file for m in recipe.numbered)]
    found += [model.file for model in references_of(recipe)]
    found += [file for node in merges(recipe.root) for file in node.statistics]
    if recipe.vae != "merge" and not recipe.vae.isdecimal():
        found.append(recipe.vae)
    return list(dict.fromkeys(found))


def read_recipe(file: str | os.PathLike[str]) -> Recipe:
    """The recipe of a YAML file. Raises UsageError, with the line and the reason."""
    from weightops.ops.recipe_file import parse_recipe

    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(str(file), f"cannot be read: {e.strerror if isinstance(e, OSError) else e}") from None
    return parse_recipe(text, label=str(file), folder=path.parent)


def _name(recipe: Recipe, files: Mapping[str, Checkpoint]) -> tuple[str, str]:
    """What a file is called that this makes: the stems, and what follows them."""
    stems = [stem(files[file])[:60] for file in dict.fromkeys(leaf.file for leaf in leaves(recipe.root))]
    weights = getattr(recipe.root, "parameters", {}).get("weights", ())
    last = ""
    if len(stems) == 2 and weights and all(isinstance(w, float) for w in weights):
        share = recipe.root.parameters.get("normalize") and math.fsum(weights)  # type: ignore[union-attr]
        last = f"-{weights[-1] / (share or 1.0):g}"
    return "+".join(stems), last


# ------------------------------------------------------------------------------------------------ what was asked


def _method_of(method: str | None, base: str | os.PathLike[str] | None) -> MergeMethod:
    return METHODS.get(method or ("weighted_sum" if base is None else "add_difference"))


def recipe_of(
    models: Sequence[str | os.PathLike[str]],
    *,
    alpha: float | None,
    weights: Sequence[float] | None,
    normalize: bool,
    base: str | os.PathLike[str] | None,
    method: str | None,
    parameters: Mapping[str, Any],
    blocks: str | None,
    statistics: Sequence[str | os.PathLike[str]],
    ema: bool,
    rebasin: bool,
    **rest: Any,
) -> Recipe:
    """The recipe that the command line's own words mean. Raises UsageError."""
    count, has_base = len(models), base is not None
    if count + has_base < 2 and not (ema and count == 1):
        found = count + has_base
        raise UsageError("merge", f"found {found} model{'s' * (found != 1)}, expected two or more, or a recipe")
    chosen = _method_of(method, base)
    differences = all(role != "Tensor" for role in chosen.roles) and (has_base or "Delta" in chosen.roles)
    if (chosen.needs_base or differences) != has_base:
        need = "needs a base" if chosen.needs_base or differences else "takes no base"
        raise UsageError("--base", f"{chosen.name} {need}", "--list-methods shows what each method takes")
    to = Model(str(models[0]), ema) if rebasin else None
    leaves_: list[Node] = [Model(str(m), ema, to if n else None) for n, m in enumerate(models)]
    of_base = None if base is None else Model(str(base), to=to)
    inputs: list[Node] = list(leaves_)
    if of_base is not None and chosen.needs_base:
        inputs.insert(chosen.models.index("base"), of_base)
    settings, strength = _settings(
        chosen, count, alpha, weights, parameters, blocks, has_base=has_base, over_base=differences
    )
    normalised = _normalised(chosen, settings, normalize=normalize)
    if chosen.name == "weighted_sum" and weights is not None and normalised and cancel_out(weights):
        raise UsageError("--weights", "the weights sum to 0 and cannot be normalised", "add --no-normalize")
    if not normalised:
        settings["normalize"] = False
    given = [str(file) for file in statistics]
    if of_base is not None and differences:
        root: Node = over(of_base, chosen.name, leaves_, settings, strength, statistics=given)
    elif count == 1 and not has_base:
        root = leaves_[0]
    else:
        root = merged(chosen.name, inputs, settings, statistics=given)
    numbered = tuple(leaf for leaf in leaves_ if isinstance(leaf, Model))
    said = {key: str(rest[key]) for key in ("vae", "text_encoder", "dtype", "on_mismatch")}
    return Recipe(root, numbered[0], numbered, drop=tuple(rest["drop"]), seed=rest["seed"], **said)


def _normalised(chosen: MergeMethod, settings: Mapping[str, Any], *, normalize: bool) -> bool:
    """Are the weights normalised, where the method does that? normalize: False for --no-normalize."""
    own = [p for p in chosen.parameters if p.name == "normalize"]
    if not own:
        if not normalize:
            what = f"{chosen.name} has no setting normalize"
            raise UsageError("--no-normalize", what, "--list-methods shows what each method has")
        return True
    if "normalize" not in settings:
        return normalize
    said: bool = checked(chosen.name, own, {"normalize": settings["normalize"]})["normalize"]
    if said and not normalize:
        raise UsageError("--no-normalize", "found --set normalize beside it, which says otherwise")
    return said


def _settings(
    chosen: MergeMethod, count: int, alpha: float | None, weights: Sequence[float] | None,
    parameters: Mapping[str, Any], blocks: str | None, *, has_base: bool, over_base: bool,
) -> tuple[dict[str, Any], Any]:  # fmt: skip
    """The method's settings, and how strongly a result that is a difference is added to the base."""
    values = dict(parameters)
    if alpha is not None and not math.isfinite(alpha):
        raise UsageError("--alpha", f"found {alpha}, expected a finite number")
    if alpha is not None and weights is not None:
        raise UsageError("--alpha", "given together with --weights, expected one of the two")
    if "weights" in values:
        raise UsageError("--set", "found weights, which are given with --weights")
    takes_weights = any(p.kind == "Weights" for p in chosen.parameters)
    takes_alpha = any(p.name == "alpha" for p in chosen.parameters)
    strength: Any = 1.0
    if weights is not None:
        if not takes_weights:
            raise UsageError("--weights", f"{chosen.name} takes no weights", "--list-methods shows what it takes")
        if len(weights) != count:
            raise UsageError("--weights", f"found {len(weights)} weights for {count} models, expected one for each")
        if not all(map(math.isfinite, weights)):
            raise UsageError("--weights", "found a weight that is not a finite number")
        values["weights"] = tuple(float(w) for w in weights)
    varied = blocks is not None
    if alpha is None and not varied:
        return values, strength
    if takes_alpha:
        default = next(p.default for p in chosen.parameters if p.name == "alpha")
        alpha = alpha if alpha is not None else default
        values["alpha"] = Varied(alpha, blocks) if blocks is not None else alpha
    elif over_base:
        alpha = 1.0 if alpha is None else alpha
        strength = Varied(alpha, blocks) if blocks is not None else alpha
    elif takes_weights and weights is None:
        values["weights"] = _weights_of_alpha(chosen, count, alpha, blocks, has_base)
    else:
        option = "--blocks" if varied else "--alpha"
        what = f"{chosen.name} takes no alpha" if weights is None else "says numbers for --alpha, found --weights"
        raise UsageError(option, what, "--list-methods shows what each method takes")
    return values, strength


def _weights_of_alpha(
    chosen: MergeMethod, count: int, alpha: float | None, blocks: str | None, has_base: bool
) -> tuple[Any, ...]:
    """The weights that --alpha and --blocks mean."""
    if has_base:
        if count > 2:
            raise UsageError("--alpha", f"says nothing for {count} models and a base", "give --weights, one per model")
        alpha = 1.0 if alpha is None else alpha
        last: Any = alpha if blocks is None else Varied(alpha, blocks)
        return (1.0, last) if count == 2 else (last,)
    if count != 2:
        raise UsageError("--alpha", f"is for two models, found {count}", "give --weights, one per model")
    alpha = 0.5 if alpha is None else alpha
    if blocks is None:
        return (1.0 - alpha, alpha)
    return (Varied(alpha, blocks, complement=True), Varied(alpha, blocks))


def check_recipe(recipe: Recipe) -> None:
    """Refuse what a recipe says of its output, where it makes no sense."""
    check_words(recipe.dtype, recipe.drop)
    if "vae" in recipe.drop and recipe.vae != "merge" and not recipe.vae.isdecimal():
        raise UsageError("--drop", f"drops the VAE that --vae takes from {quote(recipe.vae)}")
    if recipe.on_mismatch not in ("error", "keep-first"):
        raise UsageError("--on-mismatch", f"found {quote(recipe.on_mismatch)}, expected error or keep-first")
    for leaf in leaves(recipe.root):
        if isinstance(leaf, Model) and leaf.to is not None and leaf.to.to is not None:
            what = f"{quote(leaf.to.file)} is itself matched to another, expected a model whose channels stay"
            raise UsageError("--rebasin", what)
    count = len(recipe.numbered)
    for option, value in (("vae", recipe.vae), ("text_encoder", recipe.text_encoder)):
        if value.isdecimal() and not (len(value) < 10 and 1 <= int(value) <= count):
            raise UsageError(option_of(option), f"there is no model {value[:20]}, expected 1 to {count}")
        if option == "text_encoder" and value != "merge" and not value.isdecimal():
            raise UsageError("--text-encoder", f"found {quote(value)}, expected the number of a model, or merge")
    if kind_of(recipe.root) != "model":
        hint = "add: [model, difference] makes a model of it"
        raise UsageError("merge", "the recipe makes a difference, expected a model", hint)
