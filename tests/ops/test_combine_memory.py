"""combine, law 2: what is taken beside inputs and outputs is no more than the plan says, as torch counts it."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from combining import NEEDED, takes
from conftest import save
from test_fuse_memory import taken
from test_resize_memory import KERNEL, KERNELS, MODULE, WEIGHTS, WIDE, adapter, others, told

from weightops.engine.chunks import LARGEST_DEFAULT, smallest_memory
from weightops.errors import MemoryRefused
from weightops.files.checkpoint import open_checkpoint
from weightops.ops.adapter_modules import Base
from weightops.ops.blend import Blend, way, ways
from weightops.ops.combine import combine
from weightops.ops.combine_plan import line_up
from weightops.ops.factor_plan import build, scans
from weightops.ops.interference import meetings
from weightops.ops.lined_up import Wish
from weightops.plan import Plan

torch.set_num_threads(1)

NARROW = (512, 1280)
F16, F32 = torch.float16, torch.float32

# Several adapters of one module: of few ranks and many, products and whole ones, and what depends on the weight.
CASES: list[tuple[tuple[str, ...], tuple[int, ...], torch.dtype]] = [
    (("lora", "lora"), WIDE, F16),
    (("lora", "lora"), WIDE, F32),
    (("lora of many ranks",) * 4, (320, 2560), F16),
    (("lora of more ranks than sides", "lora"), NARROW, F16),
    (("loha of many ranks",) * 3, (320, 320), F32),
    (("lora of more ranks than sides",) * 4, (512, 512), F16),
    (("loha", "lora", "factors of lokr"), WIDE, F16),
    (("lokr", "lokr", "lora"), NARROW, F32),
    (("full", "lora"), NARROW, F16),
    (("full", "lora", "lora", "lora", "loha"), NARROW, F16),
    (("full", "full", "full"), NARROW, F32),
    (("dora", "lora", "lora"), NARROW, F16),
    (("dora", "dora"), WIDE, F16),
    (("dora", "dora of loha", "glora", "ia3"), WIDE, F32),
    (("lora", "dora of inputs", "oft"), NARROW, F32),
    (("dora of inputs", "oft", "dora"), WIDE, F16),
    (("lora", "tucker"), KERNELS, F16),
    (("tucker loha", "full"), KERNELS, F16),
]


def modules(kinds: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype, wish: Wish) -> Any:
    """The modules that are lined up, and the open files."""
    stack = contextlib.ExitStack()
    files = []
    for number, kind in enumerate(kinds):
        save(Path(f"{number}.safetensors"), adapter(kind, shape, dtype))
        files.append(stack.enter_context(open_checkpoint(f"{number}.safetensors")))
    base = stack.enter_context(open_checkpoint("base.safetensors"))
    lined = line_up(files, wish, Base.of(base, len(files)))
    return stack, lined.modules, (*files, base)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)


def based(shape: tuple[int, ...]) -> None:
    weight = WEIGHTS[KERNEL if len(shape) > 2 else MODULE]
    save(Path("base.safetensors"), {weight: torch.randn(shape).to(torch.float16)} | others())


def assert_kept(tasks: Any, sources: Any, outputs: Any, *said: Any) -> None:
    for task in tasks:
        most = taken(Plan(sources, outputs, tuple(tasks)), task)
        assert 0 < most <= task.work_nbytes, (*said, f"{most / task.work_nbytes:.2f}")


@pytest.mark.parametrize(("kinds", "shape", "dtype"), CASES, ids=lambda value: str(value)[:60])
def test_sums_and_how_they_meet_take_no_more_than_the_plan_says(
    kinds: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    based(shape)
    wish = Wish([0.7 - 0.3 * n for n in range(len(kinds))], architecture="sd15")
    stack, (module,), sources = modules(kinds, shape, dtype, wish)
    with stack:
        ranks = (8, module.of.most)
        for variant, rank in [*((module, rank) for rank in ranks), (replace(module, exact=True), module.of.most)]:
            built = build([variant], [rank], sources, dtype="keep", seed=0, together=False)
            assert_kept(built.tasks[:1], sources, built.outputs, rank, variant.exact)
        assert_kept(scans([module], sources, "keep"), sources, {}, "spectra")
        assert_kept(meetings([module.of], sources, wish.strengths), sources, {}, "meetings")


MIXED: list[tuple[tuple[str, ...], tuple[int, ...], torch.dtype]] = [
    (("full", "lora"), NARROW, F32),
    (("lora", "lora of many ranks"), NARROW, F16),
    (("lora", "lora"), WIDE, F32),
    (("dora", "oft"), WIDE, F16),
    (("lora", "tucker"), KERNELS, F16),
]


@pytest.mark.parametrize(
    ("method", "kinds", "shape", "dtype"),
    # Of those that take most, and one that is linear, in all; the others where changes are products, and where not.
    [
        (name, *case)
        for name, method in ways()
        for case in MIXED[: 5 if method.draws or name in ("ties", "sce", "slerp", "nuslerp_rows") else 2]
    ],
    ids=lambda value: str(value)[:60],
)
def test_methods_take_no_more_than_the_plan_says(
    kinds: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype, method: str
) -> None:
    based(shape)
    weights = next(w for w in ([0.7, 0.4], [0.7, 0.4, 0.2]) if takes(way(method), w))
    kinds = (*kinds, kinds[0])[: len(weights)]
    blend = Blend.of(method, weights, NEEDED.get(method, {}), 0)
    stack, (module,), sources = modules(kinds, shape, dtype, Wish(weights, architecture="sd15", blend=blend))
    with stack:
        for rank in (8, min(200, module.of.most)):
            built = build([module], [rank], sources, dtype="keep", seed=0, together=False)
            assert_kept(built.tasks[:1], sources, built.outputs, rank)
        assert_kept(scans([module], sources, "keep"), sources, {}, "spectra")


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("kind", "count"), [("lora", 2), ("lora of many ranks", 4), ("lora of more ranks than sides", 2)]
)
def test_a_peers_numbers_take_no_more_than_the_plan_says(kind: str, count: int, exact: bool) -> None:
    shape = (320, 320)
    based(shape)
    wish = Wish([0.7] * count, architecture="sd15", exact=exact, compat="sd-scripts")
    stack, (module,), sources = modules((kind,) * count, shape, F32, wish)
    with stack:
        built = build([module], [module.rank_before], sources, dtype="keep", seed=0, together=False)
        assert_kept(built.tasks[:1], sources, built.outputs)


def test_two_of_the_largest_doras_of_sdxl_are_combined_in_the_memory_that_is_taken_by_default() -> None:
    shape = (10240, 1280)
    based(shape)
    stack, (module,), sources = modules(("dora", "dora"), shape, F16, Wish([1.0, 1.0], architecture="sd15"))
    with stack:
        built = build([module], [64], sources, dtype="keep", seed=0, together=False)
        assert smallest_memory(Plan(sources, built.outputs, tuple(built.tasks)))[0] <= LARGEST_DEFAULT // 2
        for tasks in (scans([module], sources, "keep"), meetings([module.of], sources, [1.0, 1.0])):
            assert smallest_memory(Plan(sources, {}, tuple(tasks)))[0] <= LARGEST_DEFAULT // 2


@pytest.mark.parametrize("words", [{"rank": 4}, {"rank": "energy:1"}, {"interference_only": True}], ids=str)
@pytest.mark.parametrize("kinds", [("lora of many ranks", "lora"), ("dora", "lora")], ids=" + ".join)
def test_the_memory_that_is_told_first_suffices(kinds: tuple[str, ...], words: dict[str, Any]) -> None:
    """For what is looked at first, too; and a dry run tells the same."""
    shape = (40, 2000)
    based(shape)
    files = [save(Path(f"{n}.safetensors"), adapter(kind, shape, F16)) for n, kind in enumerate(kinds)]

    def combined(memory: int, *, dry_run: bool) -> None:
        combine(
            *files, base="base.safetensors", output="out.safetensors", memory=memory, dry_run=dry_run, **words,
            architecture="sd15", force=True,
        )  # fmt: skip

    with pytest.raises(MemoryRefused) as refused:
        combined(1, dry_run=True)
    enough = told(refused.value)
    for dry_run in (True, False):
        with pytest.raises(MemoryRefused) as refused:
            combined(enough - 1, dry_run=dry_run)
        assert told(refused.value) == enough
        combined(enough, dry_run=dry_run)
