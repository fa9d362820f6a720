"""Contracts that every merge method keeps, over the registry: a new method is tested the moment it exists."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from applying import DTYPES, applied, assert_near, looked, random, same_bits, ulp
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weightops.errors import MismatchError, UsageError
from weightops.merging.expression import Applied, Given, Program, stages
from weightops.merging.method import (
    HANDED,
    KINDS,
    METHODS,
    ROLES,
    MergeMethod,
    Weights,
    merge_method,
    store,
)
from weightops.plan import Grain
from weightops.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Generator, Tensor

    from weightops.merging.method import Delta, Share


ALL = [method for _, method in METHODS]
every_method = pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)

FLOATS = {
    "F64": torch.float64,
    **DTYPES,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
every_dtype = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["F16", "BF16"])
ALPHAS = [0.0, 0.3, 0.5, 0.7, 1.0, -1.0, 2.5]
# More values than are computed in float64 whatever their dtype.
LARGE = (260, 256)

# What these do depends on the order of the models, beside their weights.
ORDERED = {"orthogonal"}
# What these do at --alpha 0 is not the first model.
NOT_THE_FIRST_AT_0 = {
    "cosine_a",  # more of the first, where they are alike
    "cosine_b",
    "extract_features",  # from there on it is weighted by what they share
    "multiply_difference",  # in the signs of the sum, which beta weights
    "rotate",  # alpha is of what the rotation leaves
    "sum_twice",  # beta still blends the third in
    "triple_sum",
}
# What these do at --alpha 1 is the second model.
THE_SECOND_AT_1 = {"crossover", "distribution_crossover", "euclidean_add", "geometric_sum"}
# These take each value from one model alone: NaN in the other is not seen.
TAKE_FROM_ONE = {"tensor_sum"}


def count_for(method: MergeMethod) -> int:
    """How many models to give it: three where it takes any number, or as many as it does take."""
    counts = [method.fixed + n for n in (3, 2, 1)] if method.is_open else [method.fixed]
    for count in counts:
        try:
            method.check(required(method), count)
        except UsageError:
            continue
        return count
    raise AssertionError("no number of models will do")


def required(method: MergeMethod) -> dict[str, Any]:
    """Parameters that must be given: one half, one, yes."""
    values: dict[str, Any] = {"float": 0.5, "Share": 0.5, "int": 1, "bool": True}
    return {p.name: values[p.kind] for p in method.parameters if p.default is None and p.kind != "Weights"}


def models_of(method: MergeMethod, shape: Sequence[int], dtype: torch.dtype, count: int | None = None) -> list[Tensor]:
    """Random tensors; differences are smaller than models."""
    count = count or count_for(method)
    scales = [0.25 if method.role(n) == "Delta" else 1.0 for n in range(count)]
    return [random(shape, dtype, seed, scale) for seed, scale in enumerate(scales)]


def statistics_of(method: MergeMethod, shape: Sequence[int], count: int) -> list[Tensor]:
    """Such as files of statistics hold: squares of each value, or inner products of the inputs."""
    if not method.needs_statistics:
        return []
    if method.grain is Grain.VALUES:
        return [random(shape, seed=90 + n).square() for n in range(count)]
    inputs = math.prod(shape[1:])
    seen = [random((2 * inputs, inputs), seed=90 + n) for n in range(count)]
    return [x.T @ x for x in seen]


def made(method: MergeMethod, models: Sequence[Tensor], dtype: torch.dtype | None = None, **given: Any) -> Tensor:
    """What it makes of these, at its defaults and with statistics, where it takes such."""
    statistics = given.pop("statistics", None) or statistics_of(method, models[0].shape, len(models))
    return applied(method.name, models, dtype=dtype, statistics=statistics, **{**required(method), **given})


def called(method: MergeMethod, models: Sequence[Tensor], **handed: Any) -> Tensor:
    """Its function, on these tensors as they are."""
    if method.draws:
        handed["random"] = torch.Generator().manual_seed(1)
    if method.needs_statistics:
        of_shape = statistics_of(method, models[0].shape, len(models))
        handed["statistics"] = [s.to(models[0].dtype) for s in of_shape]
    return method.function(*models, **method.check(required(method), len(models)), **handed)


# ------------------------------------------------------------------------------------------------ declarations


@every_method
def test_a_method_is_what_its_signature_says(method: MergeMethod) -> None:
    signature = inspect.signature(method.function)
    positional = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    settings = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY and p.name not in HANDED]
    assert [name.lstrip("*") for name in method.models] == [p.name for p in positional]
    assert [name.startswith("*") for name in method.models] == [p.kind is p.VAR_POSITIONAL for p in positional]
    assert all(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in positional)
    assert [(p.name, p.kind) for p in method.parameters] == [(p.name, p.annotation) for p in settings]
    assert all(p.kind in KINDS for p in method.parameters)
    assert list(method.roles) == [p.annotation for p in positional]
    assert method.result == signature.return_annotation
    assert {*method.roles, method.result} <= set(ROLES)
    assert method.name == method.function.__name__.rstrip("_")
    assert bool(method.looks) == ("found" in signature.parameters)
    assert list(method.handed) == [name for name in HANDED if name in signature.parameters]


@every_method
def test_what_comes_in_and_out_of_a_method_fits_together(method: MergeMethod) -> None:
    if method.needs_base:
        assert method.roles[method.models.index("base")] == "Tensor"
    if method.result == "Either":
        assert set(method.roles) == {"Either"}
    else:
        assert "Either" not in method.roles
    if method.result == "Tensor":
        assert method.roles[0] == "Tensor"
    weights = [p for p in method.parameters if p.kind == "Weights"]
    assert len(weights) <= method.is_open
    assert all(p.default is None for p in weights)


@every_method
def test_a_method_says_what_it_does_and_where_it_is_from(method: MergeMethod) -> None:
    assert method.summary.endswith(".")
    assert len(method.summary.splitlines()) <= 2
    assert "Source: " in inspect.getdoc(method.function)


# ------------------------------------------------------------------------------------------------ what comes out


def one_model(method: MergeMethod, model: Tensor) -> list[Tensor]:
    """The same model in every place, so that every difference of models is nothing."""
    nothing = torch.zeros_like(model)
    return [nothing if method.role(n) == "Delta" else model for n in range(count_for(method))]


@every_method
@every_dtype
def test_models_that_are_equal_give_themselves(method: MergeMethod, dtype: torch.dtype) -> None:
    for shape in [(5, 7), (3,), (4, 3, 3, 3)] + ([LARGE] if dtype is torch.bfloat16 else []):
        model = random(shape, dtype, 1)
        found = made(method, one_model(method, model))
        exact = torch.zeros_like(model) if method.result == "Delta" else model
        # Of float64, which is computed in itself, some last places may be lost.
        step = 8 * ulp(model.double(), dtype) if dtype is torch.float64 else 0.0
        assert ((found.double() - exact.double()).abs() <= step).all()


@every_method
def test_a_method_on_differences_adds_nothing_to_a_base_that_all_models_are(method: MergeMethod) -> None:
    """As the command makes it: base + method(model − base, …)."""
    if method.result != "Delta" or set(method.roles) != {"Delta"}:
        pytest.skip("not of differences")
    base, count = random((40, 48), torch.bfloat16), count_for(method)
    differences = tuple(Applied(METHODS.get("difference"), (Given(n + 1), Given(0)), {}, "") for n in range(count))
    parameters = method.check(required(method), count)
    tree = Applied(
        METHODS.get("add"), (Given(0), Applied(method, differences, parameters, "0")), {"weights": (1.0,)}, "1"
    )  # fmt: skip
    flat = tree.grain is Grain.VALUES
    shape = (base.numel(),) if flat else tuple(base.shape)
    out = torch.empty(shape, dtype=base.dtype)
    program = Program(tree, "", 0, shape, tree.grain, wide=False, stages=stages(tree))
    program.run([base.reshape(shape)] * (count + 1), out)
    assert same_bits(out, base.reshape(shape))


@every_method
def test_one_model_alone_is_that_model(method: MergeMethod) -> None:
    """And one difference alone, where all of it is kept."""
    if method.fixed or method.draws or method.name in {"smooth_add"}:
        pytest.skip("takes more than one, or drops by chance, or is a filter of each")
    kept = {"density": 1.0, "gamma": 0.0, "epsilon": 0.0, "threshold": 0.0}
    given = {p.name: kept[p.name] for p in method.parameters if p.name in kept}
    try:
        method.check({**required(method), **given}, 1)
    except UsageError:
        pytest.skip("takes more than one")
    for dtype in DTYPES.values():
        model = random((40, 48), dtype, 3)
        assert same_bits(made(method, [model], **given), model)


@every_method
def test_alpha_0_is_the_first_model_and_alpha_1_the_second_where_they_are_blended(method: MergeMethod) -> None:
    if "alpha" not in [p.name for p in method.parameters]:
        pytest.skip("has no alpha")
    for shape in ((40, 48), (16, 8, 3, 3), (40,)):
        models = models_of(method, shape, torch.float32)
        if method.name not in NOT_THE_FIRST_AT_0:
            assert_near(made(method, models, alpha=0), models[0].double(), models)
        if method.name in THE_SECOND_AT_1:
            assert_near(made(method, models, alpha=1), models[1].double(), models)


def open_models(method: MergeMethod, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    if not method.is_open or count_for(method) < method.fixed + 2:
        pytest.skip("does not take any number of models")
    return models_of(method, shape, dtype)


def own_weights(method: MergeMethod, *weights: float) -> dict[str, Any]:
    return {p.name: weights for p in method.parameters if p.kind == "Weights"}


@every_method
def test_models_may_change_places_with_their_weights(method: MergeMethod) -> None:
    models = open_models(method, (40, 48), torch.float32)
    if method.draws or method.name in ORDERED:
        pytest.skip("each place draws by itself, or comes after the one before it")
    statistics = statistics_of(method, (40, 48), len(models))
    weights = [1.0, 0.5, 0.25][: len(models) - method.fixed]
    found = made(method, models, statistics=statistics, **own_weights(method, *weights))
    turned = made(
        method, models[: method.fixed] + models[method.fixed :][::-1],
        statistics=statistics[: method.fixed] + statistics[method.fixed :][::-1],
        **own_weights(method, *weights[::-1]),
    )  # fmt: skip
    assert_near(turned, found, models, ulps=2)


@every_method
def test_a_weight_of_0_leaves_its_model_out(method: MergeMethod) -> None:
    models = open_models(method, (40, 48), torch.float32)
    count = len(models) - method.fixed
    if not own_weights(method, 1.0):
        pytest.skip("has no weights")
    weights = [1.0, 0.5][: count - 1]
    try:
        method.check({**required(method), **own_weights(method, *weights)}, len(models) - 1)
    except UsageError:
        weights, alone = [1.0, 0.0], models[-2]  # there must be two: of one alone nothing else is known
        assert_near(made(method, models, **own_weights(method, *weights)), alone.double(), models)
        return
    statistics = statistics_of(method, (40, 48), len(models))
    found = made(method, models, statistics=statistics, **own_weights(method, *weights, 0.0))
    without = made(method, models[:-1], statistics=statistics[:-1], **own_weights(method, *weights))
    assert_near(found, without, models, ulps=2)


@pytest.mark.parametrize("method", [m for m in ALL if m.linear], ids=lambda m: m.name)
def test_a_linear_method_is_a_combination_of_its_models(method: MergeMethod) -> None:
    """Its coefficients are what it makes of the unit vectors."""
    models = [m.double() for m in models_of(method, (40, 48), torch.float32)]
    parameters = method.check(required(method), len(models))
    found = looked(method, models, parameters)
    units = torch.eye(len(models), dtype=torch.float64)
    coefficients = method.function(*units, **parameters, **found)
    combined = sum(c * m for c, m in zip(coefficients, models, strict=True))
    assert torch.allclose(method.function(*models, **parameters, **found), combined, rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------------------------------------ precision, parts


@every_method
@every_dtype
def test_every_method_is_within_one_last_place_of_its_own_float64(method: MergeMethod, dtype: torch.dtype) -> None:
    if method.decides:
        pytest.skip("the last bit of a value may decide")
    models = models_of(method, LARGE, dtype)
    exact = made(method, [m.double() for m in models])
    assert_near(made(method, models), exact, models)


@pytest.mark.parametrize("method", [m for m in ALL if m.grain is not Grain.TENSOR], ids=lambda m: m.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["F32", "F64"])
def test_parts_are_parts_of_the_whole(method: MergeMethod, dtype: torch.dtype) -> None:
    """Given what was found in the whole, and in its last bit: it does not depend on where a value stands."""
    if method.draws:
        pytest.skip("draws for each block")
    rows = method.grain is Grain.ROWS
    shape = (37, 11, 3) if rows else (1221,)
    models = models_of(method, shape, dtype)
    found = looked(method, models, method.check(required(method), len(models)))
    statistics = statistics_of(method, shape, len(models))

    def of(rows: slice) -> Tensor:
        handed = {"statistics": [s[rows].to(dtype) for s in statistics]} if statistics else {}
        parameters = method.check(required(method), len(models))
        return method.function(*(m[rows] for m in models), **parameters, **found, **handed)

    whole = of(slice(None))
    for height in (1, 8, 36) if rows else (100, 1001):
        parts = [of(slice(i, i + height)) for i in range(0, shape[0], height)]
        assert same_bits(torch.cat(parts), whole)


@pytest.mark.parametrize("method", [m for m in ALL if m.looks], ids=lambda m: m.name)
@pytest.mark.parametrize("shape", [(300, 40, 3, 3), (500, 200), (70_000,)], ids=str)
def test_looks_at_blocks_are_looks_at_the_whole(method: MergeMethod, shape: tuple[int, ...]) -> None:
    models = models_of(method, shape, torch.float16)
    parameters = method.check(required(method), len(models))
    whole = looked(method, models, parameters)
    flat = method.grain is Grain.VALUES
    blocks = looked(method, models, parameters, rows=math.prod(shape) // 4 if flat else 70)
    seen = [m.double().reshape(-1)[:900] if flat else m.double()[:7] for m in models]
    results = [called(method, seen, **found) for found in (whole, blocks)]
    assert torch.allclose(*results, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "method", [m for m in ALL if any(look.everywhere for look in m.looks)], ids=lambda m: m.name
)  # fmt: skip
def test_everywhere_is_one_tensor_where_there_is_no_other(method: MergeMethod) -> None:
    models = models_of(method, (40, 48), torch.float32)
    parameters = method.check(required(method), len(models))
    found = looked(method, models, parameters)["found"]
    everywhere = next(look.everywhere for look in method.looks if look.everywhere)({"only": found}, **parameters)
    results = [called(method, models, found=f) for f in (found, everywhere["only"])]
    assert same_bits(*results)


@every_method
def test_the_same_call_gives_the_same_bits(method: MergeMethod) -> None:
    models = models_of(method, (64, 32), torch.bfloat16)
    assert same_bits(made(method, models), made(method, models))


@every_method
@pytest.mark.parametrize("out", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_dtypes_may_be_mixed(method: MergeMethod, out: torch.dtype) -> None:
    mixture = [torch.float16, torch.bfloat16, torch.float32, torch.float8_e5m2]
    models = [m.to(mixture[i % 4]) for i, m in enumerate(models_of(method, (40, 48), torch.float32))]
    exact = made(method, [m.double() for m in models])
    found = made(method, models, out)
    held = exact.abs() <= torch.finfo(out).max
    assert_near(found[held], exact[held], [m[held] for m in models])


# ------------------------------------------------------------------------------------------------ edges


@every_method
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (1,), (2, 3, 1, 1)], ids=str)
def test_every_shape_is_kept_and_filled(method: MergeMethod, shape: tuple[int, ...]) -> None:
    found = made(method, models_of(method, shape, torch.float16))
    assert found.shape == torch.Size(shape)
    assert not (found == 77.0).any()


def edges(method: MergeMethod, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Finite models at which quotients, roots, norms and angles are in danger."""
    shape, info = (12, 3, 2), torch.finfo(dtype)
    models = models_of(method, shape, dtype)
    some, zero = models[0], torch.zeros(shape, dtype=dtype)
    count = len(models)
    half = torch.cat([models[0][:6], zero[6:]])
    return {
        "zeros": [zero] * count,
        "negative zeros": [-zero] * count,
        **{f"zero {n}": [*models[:n], zero, *models[n + 1 :]] for n in range(count)},
        "one alone": [some] + [zero] * (count - 1),
        "equal": [some] * count,
        "opposite": [some, *[-some] * (count - 1)],
        "opposite in turn": [some if n % 2 == 0 else -some for n in range(count)],
        "multiples": [(some.float() * (n + 1)).to(dtype) for n in range(count)],
        "half zero": [half, *models[1:]],
        "zero columns": [torch.cat([m[..., :1], zero[..., 1:]], -1) for m in models],
        "constant": [torch.full(shape, n + 1.0).to(dtype) for n in range(count)],
        "small": [torch.full(shape, float(info.smallest_normal)).to(dtype) * (n - 1) for n in range(count)],
        "subnormal": [(m.double().sign() * float(info.smallest_normal) / 4).to(dtype) for m in models],
        "large": [(m.double().clamp(-1, 1) * min(float(info.max) / 64, 1e15)).to(dtype) for m in models],
        "far apart": [(m.double() * 10.0 ** (3 * (n % 2))).to(dtype) for n, m in enumerate(models)],
    }


@every_method
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_what_is_finite_stays_finite(method: MergeMethod, dtype: torch.dtype) -> None:
    cases = edges(method, dtype)
    bad = []
    for name, models in cases.items():
        for given in (models, [m[:1, 0, 0] for m in models]):
            try:
                found = made(method, given)
            except MismatchError:
                # There is no one way from a direction to the opposite one.
                assert "erp" in method.name or method.name == "karcher"
                assert name.startswith(("opposite", "small")) or len(given[0]) == 1
                continue
            if not found.isfinite().all():
                bad.append(name)
    assert bad == []


@every_method
def test_nan_in_a_model_is_nan_in_the_result(method: MergeMethod) -> None:
    count = count_for(method)
    for shape in ((12, 6), (70,)):
        models = models_of(method, shape, torch.float32)
        places = range(count) if method.name not in TAKE_FROM_ONE and not method.draws else []
        for place in [*places, None]:
            spoilt = [m.clone() for m in models]
            for n in range(count):
                if place in (n, None):
                    spoilt[n][3] = math.nan
            assert made(method, spoilt)[3].isnan().all(), f"NaN in {place}"


@every_method
def test_models_are_never_changed(method: MergeMethod) -> None:
    for dtype in FLOATS.values():
        models = models_of(method, (16, 8), dtype)
        statistics = statistics_of(method, (16, 8), len(models))
        before = [t.clone() for t in (*models, *statistics)]
        made(method, models, statistics=statistics)
        assert all(map(same_bits, (*models, *statistics), before))


@every_method
def test_a_result_is_never_one_of_the_models(method: MergeMethod) -> None:
    """For it may be written over."""
    for count in {count_for(method), method.fixed + 1 if method.is_open else method.fixed}:
        try:
            parameters = method.check(required(method), count)
        except UsageError:
            continue
        models = models_of(method, (16, 8), torch.float32, count)
        found = looked(method, models, parameters)
        if method.grain is Grain.VALUES:
            models = [m.reshape(-1) for m in models]
        result = called(method, models, **found)
        assert all(result.data_ptr() != m.data_ptr() for m in models)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch sees no CUDA device")
@every_method
def test_a_method_computes_where_its_models_are(method: MergeMethod) -> None:
    for shape in (LARGE, (16, 8, 3, 3), (70,)):
        models = models_of(method, shape, torch.float32)
        parameters = method.check(required(method), len(models))
        given = [m.reshape(-1) if method.grain is Grain.VALUES else m for m in models]
        handed = looked(method, models, parameters)
        there = looked(method, [m.cuda() for m in models], parameters)
        if method.needs_statistics:
            handed["statistics"] = statistics_of(method, given[0].shape, len(models))
            there["statistics"] = [s.cuda() for s in handed["statistics"]]
        results = []
        for tensors, found in ((given, handed), ([m.cuda() for m in given], there)):
            random = {"random": torch.Generator().manual_seed(1)} if method.draws else {}
            results.append(method.function(*tensors, **parameters, **found, **random))
        assert results[1].is_cuda
        alike = torch.isclose(*(r.cpu() for r in results), rtol=1e-4, atol=1e-4)
        assert alike.double().mean() >= (0.99 if method.decides else 1.0)


class Held(TorchDispatchMode):
    """The most bytes at a time of tensors that are made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: (ref, n) for key, (ref, n) in self._alive.items() if not ref.expired()}
        self.most = max(self.most, sum(n for _, n in self._alive.values()))
        return result


@every_method
def test_a_method_holds_no_more_copies_than_it_says(method: MergeMethod) -> None:
    shape = (2000, 500) if method.grain is Grain.TENSOR else (512, 256)
    models = [m.double() if method.double else m for m in models_of(method, shape, torch.float32)]
    found = looked(method, models, method.check(required(method), len(models)))
    if method.grain is Grain.VALUES:
        models = [m.reshape(-1) for m in models]
    if method.draws:
        found["random"] = torch.Generator().manual_seed(1)
    if method.needs_statistics:
        found["statistics"] = [s.to(models[0].dtype) for s in statistics_of(method, models[0].shape, len(models))]
    parameters = method.check(required(method), len(models))
    with Held() as held:
        method.function(*models, **parameters, **found)
    beside = 0 if method.beside is None else method.beside(models[0].shape)
    copies = (held.most - beside) / models[0].nbytes
    assert copies <= method.copies + method.each * len(models) + 0.1


def test_what_a_dtype_cannot_hold_is_inf_or_nan_and_never_clipped() -> None:
    """torch 2.13 casts Inf, and everything above 448, to 448 in F8_E4M3."""
    beyond = torch.tensor([1e6, -1e6, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    for name in ("F16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        out = torch.ones(5).to(FLOATS[name])
        store(beyond, out)
        assert not out.float().isfinite().any(), name
    out = torch.ones(4).to(torch.float8_e4m3fn)
    store(torch.tensor([448.0, 464.0, 464.1, -464.1]), out)
    assert out.float()[:2].tolist() == [448.0, 448.0]
    assert out.float()[2:].isnan().all()


# ------------------------------------------------------------------------------------------------ parameters


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> MergeMethod:
    """A method with one parameter of each kind, in a registry of its own."""
    registry: Registry[MergeMethod] = Registry("merge method", "weightops.merging.methods")
    monkeypatch.setattr("weightops.merging.method.METHODS", registry)

    @merge_method(Grain.TENSOR)
    def made_up(
        a: Tensor, b: Tensor, /, *, share: float, steps: int = 2, exact: bool = False, weights: Weights = (1.0, 2.0)
    ) -> Tensor:
        """Nothing of use.

        More than one line.
        """
        return a

    return registry._members["made_up"]


def test_a_new_method_is_read_from_its_signature(other: MergeMethod) -> None:
    assert other.models == ("a", "b")
    assert other.grain is Grain.TENSOR
    assert other.summary == "Nothing of use."
    assert [(p.name, p.kind, p.default) for p in other.parameters] == [
        ("share", "float", None),
        ("steps", "int", 2),
        ("exact", "bool", False),
        ("weights", "Weights", (1.0, 2.0)),
    ]


def test_parameters_come_as_words_or_as_values(other: MergeMethod) -> None:
    said = {"share": "0.25", "steps": "3", "exact": "yes", "weights": "1, 2.5"}
    meant = {"share": 0.25, "steps": 3, "exact": True, "weights": (1.0, 2.5)}
    assert other.check(said) == other.check(meant) == meant
    assert other.check({"share": 1}) == {"share": 1.0, "steps": 2, "exact": False, "weights": (1.0, 2.0)}
    assert other.check({"share": 1, "exact": "False"})["exact"] is False


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ({"share": "much"}, "made_up, share: found 'much', expected a number", None),
        ({"share": "nan"}, "made_up, share: found 'nan', expected a number", None),
        ({"share": float("inf")}, "made_up, share: found inf, expected a number", None),
        ({"share": [1]}, "made_up, share: found [1], expected a number", None),
        ({"share": 1, "steps": 2.5}, "made_up, steps: found 2.5, expected a whole number", None),
        ({"share": 1, "steps": "inf"}, "made_up, steps: found 'inf', expected a whole number", None),
        ({"share": 1, "exact": "perhaps"}, "made_up, exact: found 'perhaps', expected true or false", None),
        ({"share": 1, "weights": "1,x"}, "made_up, weights: found '1,x', expected numbers", None),
        ({"share": 1, "weights": "1,nan"}, "made_up, weights: found '1,nan', expected numbers", None),
        ({"share": 1, "weights": 3}, "made_up, weights: found 3, expected numbers", None),
        ({}, "--set: made_up needs the parameter 'share'", None),
        ({"shar": 1}, "--set: made_up has no parameter 'shar'", "it has share, steps, exact, weights"),
    ],
)
def test_a_senseless_parameter_is_refused(
    other: MergeMethod, given: dict[str, Any], message: str, hint: str | None
) -> None:
    with pytest.raises(UsageError) as caught:
        other.check(given)
    assert str(caught.value) == message
    assert caught.value.hint == hint


def test_a_parameter_of_an_unknown_kind_is_refused_when_the_method_is_written() -> None:
    def wrong(a: Tensor, /, *, name: str = "x") -> Tensor:
        return a

    with pytest.raises(TypeError, match="wrong, name: found 'str', expected"):
        merge_method(Grain.ROWS)(wrong)


def test_a_model_that_is_neither_tensor_nor_difference_is_refused_when_the_method_is_written() -> None:
    def wrong(a: Tensor, b: Sequence[Tensor], /) -> Tensor:
        return a

    with pytest.raises(TypeError, match=r"wrong: found 'Sequence\[Tensor\]', expected"):
        merge_method(Grain.ROWS)(wrong)


@pytest.fixture
def starred(monkeypatch: pytest.MonkeyPatch) -> MergeMethod:
    """A method that takes any number of models, each with its weight."""
    registry: Registry[MergeMethod] = Registry("merge method", "weightops.merging.methods")
    monkeypatch.setattr("weightops.merging.method.METHODS", registry)

    def refuse(count: int, parameters: Mapping[str, Any]) -> None:
        if count > 3:
            raise UsageError("starred", f"found {count} models, expected three at most")

    @merge_method(Grain.VALUES, refuse=refuse)
    def starred_(base: Tensor, /, *deltas: Delta, weights: Weights, share: Share = 0.5, random: Generator) -> Tensor:
        """Nothing of use."""
        return base

    return registry._members["starred"]


def test_what_is_given_is_told_from_what_is_handed(starred: MergeMethod) -> None:
    assert starred.models == ("base", "*deltas")
    assert starred.roles == ("Tensor", "Delta")
    assert [starred.role(n) for n in range(4)] == ["Tensor", "Delta", "Delta", "Delta"]
    assert [p.name for p in starred.parameters] == ["weights", "share"]
    assert starred.draws
    assert not starred.needs_statistics
    assert starred.needs_base
    assert (starred.fixed, starred.is_open) == (1, True)
    assert starred.check({}, 3) == {"weights": (1.0, 1.0), "share": 0.5}


@pytest.mark.parametrize(
    ("count", "given", "message"),
    [
        (1, {}, "starred: takes the models base, *deltas, found 1"),
        (3, {"weights": "1"}, "starred, weights: found 1 weights for 2 models, expected one for each"),
        (4, {}, "starred: found 4 models, expected three at most"),
        (2, {"share": 0}, "starred, share: found 0, expected a number above 0 and at most 1"),
        (2, {"share": 1.5}, "starred, share: found 1.5, expected a number above 0 and at most 1"),
    ],
)
def test_models_and_weights_that_do_not_fit_are_refused(
    starred: MergeMethod, count: int, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        starred.check(given, count)
    assert str(caught.value) == message


def test_an_unknown_method_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError) as caught:
        METHODS.get("weigthed_sum")
    assert str(caught.value) == "unknown merge method 'weigthed_sum'"
    assert caught.value.hint == "did you mean 'weighted_sum'?"
