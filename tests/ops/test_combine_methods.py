"""combine by other ways than the sum: each method as on dense matrices in float64; and sd-scripts' numbers repeated."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from combining import NEEDED, OUT, accounted, combined, matrices, optimum, rows, settings_for, takes
from locon import KERNEL, KEY, MODULES, POINT, QUERY, locon, off, values_of
from loras import Maker, deltas, metadata_of, modules_of, named, save, tensors_of

from weightops.errors import MemoryRefused, MismatchError, UsageError
from weightops.lora.dialects import DIALECTS
from weightops.merging.expression import apply
from weightops.merging.method import METHODS
from weightops.merging.rounding import generator_for
from weightops.ops.blend import Blend, ways

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------------------ the methods, restated

Weights = tuple[float, ...]


def drawn(name: str, count: int, shape: tuple[int, int], seed: int) -> list[Tensor]:
    """The random numbers of a module: of its first block of rows, one change after the other."""
    generator = generator_for(seed, f"{name}\0000", 0)
    return [torch.rand(shape, generator=generator).double() for _ in range(count)]


def trimmed(delta: Tensor, density: float) -> Tensor:
    limit = delta.abs().flatten().sort(descending=True).values[round(density * delta.numel()) - 1]
    return delta * (delta.abs() >= limit)


def elected(changes: Sequence[Tensor], weights: Weights, *, count: bool = False, mean: bool = True) -> Tensor:
    """Of changes that have their weights already."""
    stack = torch.stack(list(changes))
    sign = (stack.sign() if count else stack).sum(0).sign()
    agree = (stack.sign() == sign) & (sign != 0)
    share = (agree * torch.tensor(weights, dtype=torch.float64).abs()[:, None, None]).sum(0)
    found = (stack * agree).sum(0)
    return found / share.where(share > 0, 1.0) if mean else found


def slerp(deltas: Sequence[Tensor], weights: Weights, **_: Any) -> Tensor:
    (a, b), t = deltas, weights[1] / sum(weights)
    angle = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
    length = (1 - t) * a.norm() + t * b.norm()
    return length * (math.sin((1 - t) * angle) * a / a.norm() + math.sin(t * angle) * b / b.norm()) / math.sin(angle)


def orthogonal(deltas: Sequence[Tensor], weights: Weights, **_: Any) -> Tensor:
    kept: list[Tensor] = []
    for delta in deltas:
        kept.append(delta - sum((k * (delta * k).sum() / (k * k).sum() for k in kept), torch.zeros_like(delta)))
    return sum((w * k for w, k in zip(weights, kept, strict=True)), torch.zeros_like(deltas[0]))


def dropped(deltas: Sequence[Tensor], weights: Weights, name: str, seed: int, density: float = 0.5) -> list[Tensor]:
    masks = [r < density for r in drawn(name, len(deltas), tuple(deltas[0].shape), seed)]  # type: ignore[arg-type]
    return [w * d * m / density for w, d, m in zip(weights, deltas, masks, strict=True)]


def della(deltas: Sequence[Tensor], weights: Weights, *, name: str, seed: int, **_: Any) -> Tensor:
    changes = []
    for weight, delta, r in zip(weights, deltas, drawn(name, len(deltas), tuple(deltas[0].shape), seed), strict=True):  # type: ignore[arg-type]
        rank = delta.abs().argsort(dim=1, stable=True).argsort(dim=1)
        chance = 0.5 - 0.15 + 0.3 * rank / (delta.shape[1] - 1)
        changes.append(weight * delta / chance * (r < chance))
    return elected(changes, weights)


REFERENCES: dict[str, Callable[..., Tensor]] = {
    "sum": lambda deltas, weights, **_: sum(w * d for w, d in zip(weights, deltas, strict=True)),
    "slerp": slerp,
    "orthogonal": orthogonal,
    "magnitude": lambda deltas, weights, **_: sum(w * trimmed(d, 0.5) for w, d in zip(weights, deltas, strict=True)),
    "ties": lambda deltas, weights, **_: elected(
        [w * trimmed(d, 0.2) for w, d in zip(weights, deltas, strict=True)], weights
    ),
    "dare": lambda deltas, weights, name, seed: sum(dropped(deltas, weights, name, seed)),
    "dare_ties": lambda deltas, weights, name, seed: elected(dropped(deltas, weights, name, seed), weights),
    "della": della,
}
SETTINGS: list[tuple[str, dict[str, Any], Callable[..., Tensor]]] = [
    ("magnitude", {"density": "0.1"},
     lambda d, w, **_: sum(x * trimmed(y, 0.1) for x, y in zip(w, d, strict=True))),
    ("ties", {"density": 0.7, "count_votes": "yes", "normalize": "false"},
     lambda d, w, **_: elected([x * trimmed(y, 0.7) for x, y in zip(w, d, strict=True)], w, count=True, mean=False)),
    ("dare", {"density": "0.25"}, lambda d, w, name, seed: sum(dropped(d, w, name, seed, 0.25))),
    ("dare_ties", {"normalize": False},
     lambda d, w, name, seed: elected(dropped(d, w, name, seed), w, mean=False)),
]  # fmt: skip
ALL = [name for name, _ in ways()]
# Whose strengths are shares, unless they are told not to normalise.
SHARED = (
    "breadcrumbs_ties", "dare_ties", "della", "geometric_median", "karcher", "multislerp", "nuslerp", "nuslerp_rows",
    "sce", "slerp", "ties", "weighted_sum",
)  # fmt: skip
PLAIN = {QUERY: MODULES[QUERY], KEY: MODULES[KEY], KERNEL: MODULES[KERNEL]}


def files(method: str, dtype: torch.dtype = torch.float32) -> tuple[list[Path], Weights]:
    """Two or three files, with a module that one alone has, and weights; a LoHa among them, and a whole difference."""
    t = Maker(9, dtype)
    first = locon(PLAIN, rank=6, seed=1, dtype=dtype)
    second = locon({QUERY: MODULES[QUERY], KERNEL: MODULES[KERNEL], POINT: MODULES[POINT]}, rank=4, seed=2, dtype=dtype)
    loha = {".hada_w1_a": t(32, 2), ".hada_w1_b": t(2, 24), ".hada_w2_a": t(32, 2), ".hada_w2_b": t(2, 24)}
    second |= named({KEY: {ending: 0.2 * tensor for ending, tensor in loha.items()}})
    third = locon({QUERY: MODULES[QUERY]}, rank=3, seed=3, dtype=dtype) | {f"{KEY}.diff": 0.1 * t(32, 24)}
    weights = next(w for w in STRENGTHS if takes(METHODS.get(method), w))
    given = [first, second, third][: len(weights)]
    return [save(Path(f"{name}.safetensors"), found) for name, found in zip("abc", given, strict=False)], weights


STRENGTHS: list[Weights] = [(0.8, -0.6, 1.2), (0.8, 0.6, 1.2), (0.8, -0.6), (0.8, 0.6)]


def merged(method: str) -> Callable[..., Tensor]:
    """What a merge makes of dense matrices; by a method that has no weights for them, of these at their strengths."""

    def do(deltas: Sequence[Tensor], weights: Weights, *, name: str, seed: int) -> Tensor:
        found, out = METHODS.get(method), torch.empty_like(deltas[0])
        own = any(p.kind == "Weights" for p in found.parameters)
        given = deltas if own else [w * d for w, d in zip(weights, deltas, strict=True)]
        apply(found, given, out, settings_for(found, weights), seed=seed, name=name)
        return out

    return do


def expected(
    paths: Sequence[Path], weights: Weights, do: Callable[..., Tensor], seed: int, *, shares: bool, every: bool = False
) -> dict[str, Tensor]:
    """Each module by the reference; what one file alone has, at its strength, or as it is with shares.

    every: what a file does not change is a change of nothing.
    """
    by_file = [{name: delta.flatten(1) for name, delta in deltas(path).items()} for path in paths]
    found = {}
    for name in dict.fromkeys(name for changes in by_file for name in changes):
        mine = [(changes[name], w) for changes, w in zip(by_file, weights, strict=True) if name in changes]
        if len(mine) == 1:
            found[name] = mine[0][0] * (math.copysign(1, mine[0][1]) if shares else mine[0][1])
        elif every:
            nothing = torch.zeros_like(mine[0][0])
            whole = [changes.get(name, nothing) for changes in by_file]
            found[name] = do(whole, weights, name=name, seed=seed)
        else:
            found[name] = do([d for d, _ in mine], tuple(w for _, w in mine), name=name, seed=seed)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ALL)
def test_each_method_is_what_it_is_on_dense_matrices(method: str, dtype: torch.dtype) -> None:
    """At all ranks it is that matrix; at fewer, its best approximation, and nothing has less of an error."""
    paths, weights = files(method, dtype)
    do, every = REFERENCES.get(method, merged(method)), not METHODS.get(method).is_open
    goal = expected(paths, weights, do, 5, shares=method in SHARED, every=every)
    loras = list(zip(paths, weights, strict=True))
    more = {"settings": NEEDED.get(method)}
    report = combined(*loras, method=method, rank=99, dtype="fp32", seed=5, **more)
    found = matrices()
    assert found.keys() == goal.keys()
    for name, delta in goal.items():
        assert off(delta, found[name]) < 2e-6, name
    report = combined(*loras, method=method, rank=3, dtype="fp32", seed=5, **more)
    for name, delta in goal.items():
        least = optimum(values_of(delta), 3)
        assert math.isclose(off(delta, matrices()[name]), least, rel_tol=1e-5, abs_tol=2e-6), name
        assert math.isclose(rows(report)[name]["error"], least, rel_tol=1e-5, abs_tol=2e-6), name
        assert rows(report)[name]["rank"] == 3
    accounted(report, *paths)


@pytest.mark.parametrize(
    ("method", "settings", "do"), SETTINGS, ids=lambda value: None if callable(value) else str(value)[:40]
)
def test_a_methods_settings_reach_it(method: str, settings: dict[str, Any], do: Callable[..., Tensor]) -> None:
    paths, weights = files(method)
    combined(*zip(paths, weights, strict=True), method=method, settings=settings, rank=99, seed=2)
    shares = method in SHARED and settings.get("normalize", True) in (True, "true", "yes")
    for name, delta in expected(paths, weights, do, 2, shares=shares).items():
        assert off(delta, matrices()[name]) < 2e-6, name


@pytest.mark.parametrize("method", [name for name, found in ways() if found.draws])
def test_chance_depends_on_the_seed_alone(method: str) -> None:
    paths, weights = files(method, torch.float16)
    found: dict[int, set[bytes]] = {0: set(), 7: set()}
    for seed, made in found.items():
        for memory, threads in ((40 << 20, 1), (400 << 20, 3)):
            combined(
                *zip(paths, weights, strict=True), method=method, rank=4, seed=seed, memory=memory, threads=threads
            )
            made.add(OUT.read_bytes())
        assert len(made) == 1
    assert found[0] != found[7]


@pytest.mark.parametrize("method", [name for name, found in ways() if found.linear and takes(found, (0.8, 0.6))])
def test_linear_methods_keep_their_ranks_exactly(method: str) -> None:
    """They are sums with other numbers: no rank need be asked for, and all of them may be kept."""
    paths = [save(Path(f"{name}.safetensors"), locon(PLAIN, rank=4, seed=n)) for n, name in enumerate("ab")]
    goal = expected(paths, (0.8, 0.6), REFERENCES.get(method, merged(method)), 0, shares=method in SHARED)
    report = combined(*zip(paths, (0.8, 0.6), strict=True), method=method, exact=True)
    for name, delta in goal.items():
        assert off(delta, matrices()[name]) < 2e-6
        assert rows(report)[name]["rank"] == 8
    report = combined(*zip(paths, (0.8, 0.6), strict=True), method=method)
    for name, delta in goal.items():
        assert rows(report)[name]["rank"] == 4
        assert math.isclose(off(delta, matrices()[name]), optimum(values_of(delta), 4), rel_tol=1e-5, abs_tol=2e-6)


@pytest.mark.parametrize("method", ALL)
def test_the_largest_matrices_of_models_fit_into_the_default_memory(method: str) -> None:
    """SD1.5's largest kernel, and Flux' packed linear1: a method holds one matrix, and not one for each file."""
    t = Maker(1, torch.float16)
    kernel = {"lora_unet_up_blocks_0_resnets_0_conv1": t.lora(1280, 2560, 4, kernel=(3, 3))}
    linear1 = {"lora_unet_single_blocks_1_linear1": t.lora(21504, 3072, 4)}
    count = next(count for count in (2, 3) if takes(METHODS.get(method), [1.0] * count))
    for modules, architecture in ((kernel, "sd15"), (linear1, "flux")):
        paths = [save(Path(f"{n}.safetensors"), named(modules)) for n in range(count)]
        words = {"method": method, "architecture": architecture, "dry_run": True, "settings": NEEDED.get(method)}
        combined(*paths, rank=32, **words)
        if architecture == "sd15" or METHODS.get(method).linear:
            combined(*paths, rank="energy:0.9", **words)
        else:  # all singular values of it are another matter, and told of at once
            with pytest.raises(MemoryRefused, match=r"^--memory: 419,430,400 bytes are too few: "):
                combined(*paths, rank="energy:0.9", memory=400 << 20, **words)


def test_methods_refuse_what_they_cannot_do() -> None:
    paths, weights = files("ties")
    loras = list(zip(paths, weights, strict=True))
    with pytest.raises(UsageError) as caught:
        combined(*paths, method="slerp", rank=4)
    assert str(caught.value) == "slerp: found 3 models, expected two"
    with pytest.raises(UsageError, match=r"^slerp, weights: found -0\.6, expected none below 0$"):
        combined(*loras[:2], method="slerp", rank=4)
    with pytest.raises(
        UsageError, match=r"^della, epsilon: found 0\.6 with a density of 0\.5, expected less than 0\.5"
    ):
        combined(*loras, method="della", settings={"epsilon": 0.6}, rank=4)
    save(Path("b.safetensors"), {k: -t if "lora_up" in k else t for k, t in locon(PLAIN, seed=1).items()})
    save(Path("a.safetensors"), locon(PLAIN, seed=1))
    with pytest.raises(MismatchError, match="models point in opposite directions"):
        combined("a.safetensors", "b.safetensors", method="slerp")
    with pytest.raises(UsageError, match=r"^--rank: found none, and 3 modules come in without a rank"):
        combined(*loras, method="ties")
    assert not OUT.exists()


def test_methods_that_need_more_than_changes_are_refused() -> None:
    paths, _ = files("sum")
    for method in ("fisher", "arcee_fusion", "ram_plus", "truncate_rank", "add", "rotate"):
        with pytest.raises(UsageError) as caught:
            combined(*paths, method=method)
        assert str(caught.value) == f"--method: {method} merges models, and cannot combine LoRAs"
        assert caught.value.hint == "--list-methods shows what can"
    with pytest.raises(UsageError) as caught:
        combined(*paths, method="tise")
    assert str(caught.value) == "unknown merge method 'tise'"
    assert caught.value.hint == "did you mean 'ties'?"
    with pytest.raises(UsageError, match=r"^--set: the weights are the strengths of the files$"):
        combined(*paths, method="ties", settings={"weights": "1,2,3"})
    with pytest.raises(UsageError, match=r"^--set: sum has no parameter 'density'$"):
        combined(*paths, settings={"density": 1})
    with pytest.raises(UsageError, match=r"^euclidean_add: takes the models a, b, found 3$"):
        combined(*paths, method="euclidean_add")
    assert not OUT.exists()


def test_strengths_that_cancel_out_in_one_module_are_refused_from_headers() -> None:
    """Of all three they are shares; of the two files that change one of the modules they sum to nothing."""
    paths, _ = files("weighted_sum")
    with pytest.raises(UsageError, match=r"^weighted_sum, weights: they sum to 0 and cannot be normalised$"):
        combined((paths[0], 0.5), (paths[1], -0.5), (paths[2], 1.0), method="weighted_sum", rank=4, dry_run=True)


@pytest.mark.parametrize("method", ALL)
def test_strengths_are_shares_where_it_is_said(method: str) -> None:
    """And only there: a method that has no weights for the changes takes each at its strength."""
    found = METHODS.get(method)
    weights = next(w for w in STRENGTHS if takes(found, w))
    matrices = [Maker(n)(12, 10).double() for n in range(len(weights))]
    once, twice = (merged(method)(matrices, tuple(times * w for w in weights), name="", seed=0) for times in (1.0, 2.0))
    blend = Blend.of(method, weights, NEEDED.get(method, {}), 0)
    assert blend.shares == (method in SHARED) == torch.allclose(once, twice, rtol=1e-9)
    assert [blend.alone(n) for n in range(len(weights))] == (
        [math.copysign(1, w) for w in weights] if blend.shares else list(weights)
    )


def test_changes_of_two_shapes_are_our_own_mistake() -> None:
    blend = Blend.of("ties", (1.0, 1.0), {}, 0)
    with pytest.raises(ValueError, match=r"^changes of shapes \[\(2, 3\), \(3, 2\)\] are no changes of one weight$"):
        blend.combined("a weight", {0: torch.zeros(2, 3), 1: torch.zeros(3, 2)})


def test_each_block_of_rows_has_its_own_numbers_and_bits_do_not_depend_on_the_blocks_that_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {n: Maker(n)(60, 50) for n in range(3)}
    for method in ("ties", "sce", "magnitude"):
        blend, found = Blend.of(method, (1.0, 0.5, -0.7), {"density": 0.4}, 0), []
        for values in (1, 700, 1 << 20):
            monkeypatch.setattr("weightops.ops.blend.BLOCK_VALUES", values)
            found.append(blend.combined("a weight", dict(changes)))
        assert all(torch.equal(found[0], other) for other in found[1:])
    monkeypatch.setattr("weightops.ops.blend.BLOCK_VALUES", 1000)
    found = Blend.of("dare", (1.0,), {}, 0).combined("a weight", {0: torch.ones(60, 50)})
    blocks = (found != 0).split(20)
    assert not torch.equal(blocks[0], blocks[1])
    again = torch.rand(20, 50, generator=generator_for(0, "a weight\0000", 1)) < 0.5
    assert torch.equal(blocks[1], again)


def test_the_readme_names_the_methods() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (named,) = re.findall(r"^`combine --method` takes (.*?), as `merge` does", readme, re.DOTALL | re.MULTILINE)
    assert re.findall(r"`([a-z_]+)`", named) == ALL


def test_shares_are_told_of() -> None:
    paths, weights = files("ties")
    report = combined(*zip(paths, weights, strict=True), method="ties", rank=4)
    assert report.warnings[0] == (
        "ties takes the strengths as shares: twice as much of all of them is the same, "
        "and what only one LoRA has is kept as it is"
    )
    assert report.summary.endswith(" (ties): 4 modules")
    report = combined(*zip(paths, weights, strict=True), method="ties", rank=4, settings={"normalize": "no"})
    assert not any("shares" in text for text in report.warnings)


@pytest.mark.parametrize(("method", "settings"), [("dare", {"density": 1}), ("orthogonal", {}), ("slerp", {})])
def test_biases_are_combined_as_matrices_are(method: str, settings: dict[str, float]) -> None:
    modules = [named({QUERY: Maker(n).lora(32, 32, 3) | {".diff_b": Maker(n + 9)(32)}}) for n in range(2)]
    paths = [save(Path(f"{n}.safetensors"), tensors) for n, tensors in enumerate(modules)]
    combined((paths[0], 0.5), (paths[1], 2.0), method=method, settings=settings, rank=4)
    a, b = (tensors[f"{QUERY}.diff_b"].double() for tensors in modules)
    if method == "dare":
        wanted = 0.5 * a + 2.0 * b
    elif method == "orthogonal":
        wanted = 0.5 * a + 2.0 * (b - a * float(a @ b / (a @ a)))
    else:
        share, angle = 0.8, float(torch.acos(a @ b / a.norm() / b.norm()))
        arc = math.sin((1 - share) * angle) * a / a.norm() + math.sin(share * angle) * b / b.norm()
        wanted = arc / math.sin(angle) * ((1 - share) * a.norm() + share * b.norm())
    torch.testing.assert_close(tensors_of(OUT)[f"{QUERY}.diff_b"].double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["ties", "slerp"])
def test_shares_scale_nothing(method: str) -> None:
    """The same LoRA twice is that LoRA, whatever its strengths, its biases and what only one of the two has."""
    both = named({QUERY: Maker(1).lora(32, 32, 3) | {".diff_b": Maker(2)(32)}})
    more = named({KEY: Maker(3).lora(32, 48, 3)})
    save(Path("a.safetensors"), both)
    save(Path("b.safetensors"), both | more)
    words = {"settings": {"density": 1}} if method == "ties" else {}
    combined(("a.safetensors", 3.0), ("b.safetensors", 3.0), method=method, rank=4, **words)
    found, given = matrices(OUT), matrices(Path("b.safetensors"))
    assert found.keys() == given.keys() == {QUERY, KEY}
    assert all(off(given[name], found[name]) < 1e-5 for name in given)
    torch.testing.assert_close(tensors_of(OUT)[f"{QUERY}.diff_b"], both[f"{QUERY}.diff_b"], rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ sd-scripts


def peer(paths: Sequence[Path], ratios: Sequence[float], *, concat: bool) -> dict[str, Tensor]:
    """ΔW of each module as merge_lora.py makes it, restated: both factors times the ratio, the first one's alpha."""
    merged: dict[str, tuple[Tensor, Tensor, float]] = {}
    for path, ratio in zip(paths, ratios, strict=True):
        for name, (parts, alpha) in modules_of(path).items():
            up, down = parts["up"].double().flatten(1), parts["down"].double().flatten(1)
            own = float(len(down)) if alpha is None else alpha
            first = merged[name][2] if name in merged else own
            scale = math.sqrt(own / first) * ratio
            if name not in merged:
                merged[name] = abs(scale) * up, scale * down, first
            elif concat:
                before = merged[name]
                merged[name] = torch.cat([before[0], abs(scale) * up], 1), torch.cat([before[1], scale * down]), first
            else:
                before = merged[name]
                merged[name] = before[0] + abs(scale) * up, before[1] + scale * down, first
    return {name: alpha / len(down) * up @ down for name, (up, down, alpha) in merged.items()}


ALPHAS: list[tuple[float | None, float | None]] = [(6.0, 6.0), (4.0, 0.5), (None, 3.0), (2.0, None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("ratios", [(0.7, 0.5), (0.7, -0.4), (1.0, 1.0)], ids=str)
@pytest.mark.parametrize("alphas", ALPHAS, ids=str)
@pytest.mark.parametrize("concat", [False, True], ids=["added", "concatenated"])
def test_sd_scripts_numbers_are_repeated(
    concat: bool, alphas: tuple[float | None, float | None], ratios: tuple[float, float], dtype: torch.dtype
) -> None:
    """To the rounding of the factors; what that is off the sum by is said, and true."""
    ranks = (6, 4) if concat else (6, 6)
    shapes = [PLAIN, {k: v for k, v in MODULES.items() if k != KEY}]
    paths = [
        save(Path(f"{n}.safetensors"), locon(shape, rank=rank, alpha=alpha, seed=n, dtype=dtype))
        for n, (shape, rank, alpha) in enumerate(zip(shapes, ranks, alphas, strict=True))
    ]
    report = combined(*zip(paths, ratios, strict=True), compat="sd-scripts", exact=concat)
    theirs, found = peer(paths, ratios, concat=concat), matrices()
    assert found.keys() == theirs.keys()
    sums = expected(paths, ratios, REFERENCES["sum"], 0, shares=False)
    for name, delta in theirs.items():
        assert off(delta, found[name]) < (1e-6 if dtype is torch.float32 else 1e-3), name
        told = rows(report)[name]
        assert math.isclose(told["error"], off(sums[name], found[name]), rel_tol=1e-4, abs_tol=1e-6), name
        assert math.isclose(told["delta_norm"], float(sums[name].norm()), rel_tol=1e-5), name
    assert report.warnings[0].startswith("sd-scripts multiplies both factors by the ratio")
    assert report.details["line"].startswith("As sd-scripts has it, rank")
    accounted(report, *paths)
    if not concat:
        assert {row["rank"] for row in rows(report).values()} == {6}


@pytest.mark.parametrize("to", DIALECTS)
@pytest.mark.parametrize("concat", [False, True], ids=["added", "concatenated"])
def test_sd_scripts_alphas_stand_in_every_dialect(to: str, concat: bool) -> None:
    paths = [save(Path(f"{n}.safetensors"), locon(PLAIN, rank=4, alpha=1.0 + n, seed=n)) for n in range(2)]
    out = Path("out") if to == "peft" else OUT
    combined(*paths, compat="sd-scripts", exact=concat, dialect=to, output=out)
    theirs = sorted(float(d.norm()) for d in peer(paths, (1, 1), concat=concat).values())
    assert sorted(float(d.norm()) for d in matrices(out).values()) == pytest.approx(theirs, rel=1e-5)
    if to == "diffusers":
        assert "lora_adapter_metadata" in metadata_of(OUT)


def test_sd_scripts_numbers_of_a_model_that_is_not_known_have_their_alpha() -> None:
    t = Maker(1)
    paths = [save(Path(f"{n}.safetensors"), named({"lora_unet_tower_0_mix": t.lora(8, 6, 2)})) for n in range(2)]
    combined(*paths, compat="sd-scripts", exact=True)
    (found,) = matrices().values()
    assert off(peer(paths, (1, 1), concat=True)["lora_unet_tower_0_mix"], found) < 1e-6


def test_what_differs_is_told_by_a_module_that_shows_it() -> None:
    a = save(Path("a.safetensors"), locon({QUERY: MODULES[QUERY]}, rank=4))
    b = save(Path("b.safetensors"), locon({KEY: MODULES[KEY]}, rank=4))
    report = combined((a, 1.0), (b, 0.5), compat="sd-scripts", exact=True)
    assert report.warnings == ["sd-scripts multiplies both factors by the ratio: 0.5 acts as 0.25"]
    assert combined(a, b, compat="sd-scripts").warnings == []


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (lambda t: {QUERY: {".hada_w1_a": t(32, 2), ".hada_w1_b": t(2, 32), ".hada_w2_a": t(32, 2),
                            ".hada_w2_b": t(2, 32)}}, "is nothing that sd-scripts' merge_lora.py can merge"),
        (lambda t: {QUERY: {".diff": t(32, 32)}}, "is nothing that sd-scripts' merge_lora.py can merge"),
        (lambda t: {QUERY: t.lora(32, 32, 5)}, "has ranks 4 and 5, and sd-scripts adds factors of one rank alone"),
        (lambda t: {QUERY: t.lora(32, 32, 4, -1.0)}, "has alphas 6 and -1, and sd-scripts takes the root of each over"),
        (lambda t: {POINT: t.lora(32, 32, 4, kernel=(1, 1)), QUERY: t.lora(32, 32, 4, kernel=(1, 1))},
         "has factors of [32, 4] and [4, 32] in one LoRA, and of [32, 4, 1, 1] and [4, 32, 1, 1] in another"),
    ],
    ids=["LoHa", "whole", "ranks", "alphas", "kernel"],
)  # fmt: skip
def test_what_sd_scripts_cannot_merge_is_refused_from_headers(tensors: Any, said: str) -> None:
    a = save(Path("a.safetensors"), locon({QUERY: MODULES[QUERY]}, rank=4))
    b = save(Path("b.safetensors"), named(tensors(Maker(1))))
    for dry_run in (True, False):
        with pytest.raises(MismatchError) as caught:
            combined(a, b, compat="sd-scripts", dry_run=dry_run)
        assert f"{QUERY!r} {said}" in str(caught.value)
        assert str(caught.value).startswith(("a.safetensors: ", "b.safetensors: "))
    assert not OUT.exists()
