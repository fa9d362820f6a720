"""Modules that are alike, done at once as on a CUDA device: here on the CPU, which is told that it is one.

What one by one makes of them, at once makes too.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from loras import Maker, delta, modules_of, named, save

import weightops
from weightops.engine.chunks import at_once as at_once_of
from weightops.engine.chunks import check_memory, memory_for
from weightops.errors import ValueRefused
from weightops.files.checkpoint import open_checkpoint
from weightops.ops import cutting, factor_plan
from weightops.ops.extract_pair import Wish, pair
from weightops.ops.extract_plan import plan_extract
from weightops.ops.resize import resize

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

OUT, IN = 96, 80
# Of SD1.5's UNet: ten modules that are alike, of each family.
NAMES = [
    f"{way}_blocks.{block}.attentions.{n}.transformer_blocks.0.attn1.to_{to}"
    for way, blocks in (("down", (0, 1, 2)), ("up", (1, 2, 3))) for block in blocks for n in (0, 1) for to in "qkv"
]  # fmt: skip
FAMILIES = ("lora", "lokr", "loha", "full", "oft", "dora")


def flat(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


def made(family: str, maker: Maker) -> dict[str, Tensor]:
    if family == "lora":
        return maker.lora(OUT, IN, 12, 6.0)
    if family == "dora":
        return maker.lora(OUT, IN, 3, 3.0) | {".dora_scale": maker(OUT, 1).abs() + 0.5}
    if family == "lokr":
        return {".lokr_w1": maker(8, 8), ".lokr_w2": maker(12, 10)}
    if family == "loha":
        return {".hada_w1_a": maker(OUT, 4), ".hada_w1_b": maker(4, IN), ".hada_w2_a": maker(OUT, 4),
                ".hada_w2_b": maker(4, IN), ".alpha": torch.tensor(2.0)}  # fmt: skip
    return {".diff": maker(OUT, IN)} if family == "full" else {".oft_blocks": 0.1 * maker(12, 8, 8)}


def write(seed: int = 0, dtype: torch.dtype = torch.float32, families: tuple[str, ...] = FAMILIES) -> None:
    """a.safetensors and b.safetensors, of all families and of LoRAs alone, and the model that they are for."""
    maker = Maker(seed)
    base = {f"{name}.weight": maker(OUT, IN) for name in NAMES}
    base |= {"conv_in.weight": maker(32, 4, 3, 3), "conv_norm_out.weight": maker(32)}
    base["down_blocks.0.attentions.0.proj_in.weight"] = maker(32, 32, 1, 1)
    save(Path("base.safetensors"), {key: tensor.to(dtype) for key, tensor in base.items()})
    for file, kinds in (("a", families), ("b", ("lora",))):
        modules = {flat(name): made(kinds[n % len(kinds)], maker) for n, name in enumerate(NAMES)}
        save(Path(f"{file}.safetensors"), {key: tensor.to(dtype) for key, tensor in named(modules).items()})


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """From its first call on the CPU is a device that does many at once; returns how many modules each task had."""
    built: list[Any] = []

    def build(*given: Any, **words: Any) -> Any:
        built.append(factor_plan.build(*given, **words))
        return built[-1]

    def begin() -> list[int]:
        monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        monkeypatch.setattr(cutting, "is_cuda", lambda device: True)
        monkeypatch.setattr(cutting, "build", build)
        return [len(group) for b in built for group in b.groups]

    return begin


VERBS: dict[str, Callable[..., Any]] = {
    "resize": lambda **rest: resize("a.safetensors", rank=4, base="base.safetensors", **rest),
    "resize by energy": lambda **rest: resize("a.safetensors", rank="energy:0.6", base="base.safetensors", **rest),
    "resize, without a base": lambda **rest: resize("b.safetensors", rank=5, **rest),
    "convert": lambda **rest: weightops.convert("a.safetensors", to="lora", rank=6, base="base.safetensors", **rest),
    "combine": lambda **rest: weightops.combine(
        "a.safetensors:0.7", "b.safetensors:-0.3", rank=8, base="base.safetensors", **rest
    ),
    "combine, exactly": lambda **rest: weightops.combine(
        "b.safetensors", "b2.safetensors:0.5", exact=True, architecture="sd15", **rest
    ),
    "combine by ties": lambda **rest: weightops.combine(
        "a.safetensors:0.7", "b.safetensors", method="ties", rank=8, base="base.safetensors", **rest
    ),
    "combine by dare": lambda **rest: weightops.combine(
        "b.safetensors:0.7", "b2.safetensors", method="dare", seed=3, rank=8, architecture="sd15", **rest
    ),
    "combine by orthogonal": lambda **rest: weightops.combine(
        "b.safetensors:0.7", "b2.safetensors", method="orthogonal", rank=8, architecture="sd15", **rest
    ),
}

# Sums that are not cut, and what is no sum.
ONE_BY_ONE = ("combine, exactly", "combine by ties", "combine by dare", "combine by orthogonal")


def changes(path: Path) -> dict[str, Tensor]:
    return {name: delta(parts, alpha).flatten(1) for name, (parts, alpha) in modules_of(path).items()}


def assert_same(one: tuple[Any, Path], other: tuple[Any, Path], tolerance: float) -> None:
    """The same modules, changes and errors, to rounding."""
    (first, mine), (second, theirs) = one, other
    ours, found = changes(mine), changes(theirs)
    assert ours.keys() == found.keys()
    rows = {row["name"]: row for row in second.details["modules"]}
    for row in first.details["modules"]:
        name, again = row["name"], rows[row["name"]]
        assert (row["rank"], row["rank_before"], row["method"]) == (
            again["rank"],
            again["rank_before"],
            again["method"],
        )
        assert math.isclose(row["delta_norm"], again["delta_norm"], rel_tol=tolerance)
        if row["method"] == "randomised":  # a group goes on until its last has converged
            assert math.isclose(row["error"], again["error"], rel_tol=6e-3), name
            continue
        for field in ("error", "energy"):
            assert math.isclose(row[field], again[field], rel_tol=1e-3, abs_tol=tolerance), (name, field)
        assert float((ours[name] - found[name]).norm()) <= 10 * tolerance * row["delta_norm"], name
    assert math.isclose(first.details["error"], second.details["error"], rel_tol=6e-3, abs_tol=tolerance)
    assert first.verified["modules"] == second.verified["modules"] == 16


def prepare(dtype: torch.dtype = torch.float32) -> None:
    write(dtype=dtype)
    maker = Maker(9)
    save(Path("b2.safetensors"), {k: t.to(dtype) for k, t in named(
        {flat(name): maker.lora(OUT, IN, 6, 3.0) for name in NAMES}).items()})  # fmt: skip


def made_by(verb: str, name: str, device: str) -> tuple[Any, Path]:
    return VERBS[verb](output=f"{name}.safetensors", device=device, threads=1, verify=True), Path(f"{name}.safetensors")


@pytest.mark.parametrize("verb", VERBS)
def test_at_once_is_as_one_by_one(
    verb: str, at_once: Callable[[], list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare()
    one = made_by(verb, "one", device="cpu")
    at_once()
    other = made_by(verb, "all", device="auto")
    assert_same(one, other, 1e-6)
    assert (max(at_once()) > 1) == (verb not in ONE_BY_ONE)


def test_a_module_that_needs_more_care_gets_it_within_its_group(
    at_once: Callable[[], list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has factors that nearly cancel, one has fewer ranks than it seems, one is nothing at all."""
    monkeypatch.chdir(tmp_path)
    prepare()
    maker = Maker(2)
    modules = {flat(name): maker.lora(OUT, IN, 12, 6.0) for name in NAMES[:16]}
    names = list(modules)
    up, down = modules[names[1]][".lora_up.weight"], modules[names[1]][".lora_down.weight"]
    up[:, 6:], down[6:] = -up[:, :6], down[:6] + 1e-6 * down[6:]
    modules[names[2]][".lora_down.weight"][:] = modules[names[2]][".lora_down.weight"][:1].clone()
    modules[names[4]][".lora_up.weight"].zero_()
    save(Path("b.safetensors"), named(modules))
    words = {"rank": 4, "threads": 1, "verify": True}
    one = resize("b.safetensors", output="one.safetensors", device="cpu", **words), Path("one.safetensors")
    at_once()
    other = resize("b.safetensors", output="all.safetensors", **words), Path("all.safetensors")
    assert at_once()[-1] == 16
    assert {row["method"] for row in one[0].details["modules"]} == {"gram", "qr"}
    assert_same(one, other, 1e-6)


@pytest.mark.parametrize("family", ["lora", "lokr", "loha", "full"])
def test_a_module_that_is_not_finite_is_named_within_its_group(
    family: str, at_once: Callable[[], list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    maker = Maker(3)
    modules = {flat(name): made(family, maker) for name in NAMES[:5]}
    next(iter(modules[flat(NAMES[3])].values()))[1, 1] = math.nan
    save(Path("a.safetensors"), named(modules))
    at_once()
    for verb in (resize, lambda *given, **rest: weightops.convert(*given, to="lora", **rest)):
        if family == "lora" and verb is not resize:
            continue
        with pytest.raises(ValueRefused) as refused:
            verb("a.safetensors", rank=3, output="x.safetensors")
        assert flat(NAMES[3]) in str(refused.value)
        assert str(refused.value).startswith("a.safetensors: ")
    assert not Path("x.safetensors").exists()


def test_how_many_are_done_at_once_follows_from_their_size() -> None:
    found = [at_once_of(values, nbytes) for values, nbytes in (
        (1, 1), (1280 * 1280, 10 << 20), (1280 * 1280, 45 << 20), (3072 * 3072, 10 << 20), (1, 1 << 40), (1 << 40, 1),
    )]  # fmt: skip
    assert found == [16, 16, 5, 3, 1, 1]


def test_a_group_fits_the_memory_that_is_taken_where_none_is_said(
    at_once: Callable[[], list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much each of them takes: what one by one can do, at once can."""
    monkeypatch.chdir(tmp_path)
    maker = Maker(4, torch.float16)
    side = 1280
    base = {f"block.{n}.weight": maker(side, side) for n in range(16)}
    save(Path("base.safetensors"), base)
    save(Path("tuned.safetensors"), {key: tensor + 0.01 for key, tensor in base.items()})
    save(Path("a.safetensors"), {f"lora_unet_block_{n}.diff": t for n, t in enumerate(base.values())})
    at_once()
    resize("a.safetensors", rank=16, output="x.safetensors", dry_run=True)
    assert max(at_once()) > 1
    with open_checkpoint("tuned.safetensors") as tuned, open_checkpoint("base.safetensors") as other:
        planned, lots = plan_extract(pair(tuned, other, Wish()), [16] * 16, together=True)
        assert max(map(len, lots)) > 1
        check_memory(planned.plan, memory_for(planned.plan, None))
