"""Law 5: every key of every input is used, copied on purpose, kept, or unused with a reason; nothing is skipped."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from hypothesis import event, example, given, settings

from weightops.errors import MismatchError, UsageError
from weightops.files.checkpoint import Checkpoint
from weightops.files.dtypes import ARITHMETIC
from weightops.files.tensor import TensorInfo, TensorSpec
from weightops.merging.recipe import Model, Recipe, merged
from weightops.naming.identify import DROPPABLE
from weightops.ops.merge import check_recipe
from weightops.ops.merge_plan import Wish, plan_merge

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightops.ops.produce import Planned

NAMES = [
    "model.diffusion_model.a",
    "model.diffusion_model.b",
    "model.diffusion_model.c",
    "first_stage_model.a",
    "first_stage_model.b",
    "cond_stage_model.a",
    "conditioner.embedders.1.b",
    "model_ema.a",
    "optimizer_states.0",
    "betas",
    "v_pred",
    "stranger",
]
SPECS = [
    TensorSpec("F32", (4,)),
    TensorSpec("F16", (4,)),
    TensorSpec("BF16", (2, 2)),
    TensorSpec("I64", (4,)),
    TensorSpec("F8_E8M0", (4,)),
    TensorSpec("F32", ()),
]
headers = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(SPECS), min_size=1)
# Mostly the same shape in every model: others are refused, or never merged.
seldom = st.sampled_from([False] * 9 + [True])


@dataclass
class Asked:
    """Two or three headers, one of a base or of a VAE perhaps, and the words of a merge."""

    models: list[dict[str, TensorSpec]]
    base: dict[str, TensorSpec] | None
    vae_file: dict[str, TensorSpec] | None
    words: dict[str, Any]


@st.composite
def askings(draw: st.DrawFn) -> Asked:
    first = draw(headers) | {NAMES[0]: SPECS[0]}
    others = [
        {key: draw(st.sampled_from(SPECS)) if draw(seldom) else spec for key, spec in first.items() if not draw(seldom)}
        | (draw(headers) if draw(seldom) else {})
        for _ in range(draw(st.integers(2, 4)))
    ]
    *models, base, vae_file = [first, *others] if len(others) > 2 else [first, *others, {}]
    number = st.just("1") | st.sampled_from([str(i + 1) for i in range(len(models))])
    words = {
        "vae": "vae.safetensors" if vae_file else draw(number | st.just("merge")),
        "text_encoder": draw(st.just("merge") | number),
        "drop": tuple(draw(st.lists(st.sampled_from(DROPPABLE), max_size=2, unique=True))) if draw(seldom) else (),
        "on_mismatch": "error" if draw(seldom) else "keep-first",
        "dtype": draw(st.sampled_from(["keep", "fp16"])),
        "strict": False,
        "allow_nonfinite": False,
    }
    return Asked(models, base if draw(st.booleans()) else None, vae_file or None, words)


def opened(label: str, specs: Mapping[str, TensorSpec]) -> Checkpoint:
    position, tensors = 0, {}
    for key, spec in specs.items():
        tensors[key] = TensorInfo(spec, 0, position, position + spec.nbytes)
        position += spec.nbytes
    return Checkpoint(label, "safetensors", [], tensors)


def planned(asked: Asked) -> tuple[Planned, list[Checkpoint]]:
    files = {f"m{i}": opened(f"m{i}", m) for i, m in enumerate(asked.models)}
    models = [Model(name) for name in files]
    words = {key: value for key, value in asked.words.items() if key not in ("strict", "allow_nonfinite")}
    root = merged("weighted_sum", models)
    if asked.base is not None:
        files = {"base": opened("base", asked.base), **files}
        root = merged("add_difference", [Model("base"), *models])
    if asked.vae_file is not None:
        files["vae.safetensors"] = opened("vae", asked.vae_file)
    recipe = Recipe(root, models[0], tuple(models), **words)
    check_recipe(recipe)
    return plan_merge(recipe, files, Wish(asked.words["strict"])).planned, list(files.values())


ASKED = {
    "vae": "1", "text_encoder": "merge", "drop": (), "on_mismatch": "error", "dtype": "keep", "strict": False,
    "allow_nonfinite": False,
}  # fmt: skip
ALL = dict.fromkeys(NAMES, SPECS[0])


@given(askings())
@example(Asked([ALL, ALL], None, None, ASKED))
@example(Asked([ALL, ALL, ALL], ALL, ALL, {**ASKED, "vae": "vae.safetensors", "text_encoder": "2"}))
@settings(max_examples=150, deadline=None)
def test_every_key_of_every_input_is_accounted_for_once(asked: Asked) -> None:
    try:
        found, sources = planned(asked)
    except (MismatchError, UsageError):
        event("refused")
        return
    event("planned")
    plan, account = found.plan, found.account

    # The output: each tensor is filled by one task, and is in one list.
    kept = [key for key, _ in account.kept]
    assert Counter([*account.used, *account.copied, *kept]) == Counter(list(plan.outputs))
    assert Counter(task.name for task in plan.tasks) == Counter(list(plan.outputs))

    # The inputs: each key is read for its own name, or unused with a reason, and never both.
    read = {(entry.source, entry.slot.key): task.name for task in plan.tasks for entry in task.inputs}
    unused = Counter((u.source, u.key) for u in account.unused)
    assert max(unused.values(), default=1) == 1
    for number, source in enumerate(sources):
        for key in source.tensors:
            assert ((number, key) in read) != ((source.label, key) in unused), (source.label, key)
    assert all(u.reason for u in account.unused)
    assert len(read) + len(unused) == sum(len(source.tensors) for source in sources)

    # What is used is read from every model; what is kept, from the first alone; no integer is averaged.
    vae_file = sources[-1] if asked.vae_file is not None else None
    models = [number for number, source in enumerate(sources) if source is not vae_file]
    first = models[1] if asked.base is not None else models[0]
    for task in plan.tasks:
        numbers = [entry.source for entry in task.inputs]
        assert numbers == (models if task.name in account.used else numbers[:1])
        if task.name in kept:
            assert numbers == [first]
        if task.name in account.used:
            assert all(entry.slot.spec.dtype in ARITHMETIC for entry in task.inputs)

    # The table by component counts the same.
    counts = Counter()
    for group in found.groups:
        counts.update({k: v for k, v in group.items() if k != "component"})
    assert counts["tensors"] == len(sources[first].tensors) == counts["merged"] + counts["copied"] + counts["dropped"]
    assert counts["merged"] == len(account.used)


@given(askings())
@settings(max_examples=100, deadline=None)
def test_strict_refuses_exactly_when_something_was_kept_or_left_out_unasked(asked: Asked) -> None:
    try:
        found, _ = planned(asked)
    except (MismatchError, UsageError):
        event("refused")
        return
    event("planned")
    markers = any("differ in" in text for text in found.warnings)
    surprised = bool(found.account.kept) or any(not u.asked for u in found.account.unused)
    asked.words["strict"] = True
    if not (surprised or markers):
        planned(asked)
        return
    with pytest.raises(MismatchError) as caught:
        planned(asked)
    assert caught.value.where == "--strict"
    named = [repr(key) for key in found.account.surprises()]
    assert markers or all(name in caught.value.what for name in named[:5])
