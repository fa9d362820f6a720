"""Contracts that every merge method keeps, over the registry: a new method is tested the moment it exists."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest
import torch

from weightops.errors import UsageError
from weightops.merging.method import KINDS, METHODS, SMALL, MergeMethod, Weights, merge_method, store
from weightops.plan import Grain
from weightops.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

torch.set_num_threads(1)

ALL = [method for _, method in METHODS]
every_method = pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
every_dtype = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
# The distance from 1 to the next value; of the last of them torch.finfo says 0.125.
EPS = dict(zip(FLOATS.values(), [2.0**-52, 2.0**-23, 2.0**-10, 2.0**-7, 0.125, 0.25, 0.125, 0.25], strict=True))
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["F16", "BF16"])
ALPHAS = [0.0, 0.3, 0.5, 0.7, 1.0, -1.0, 2.5]

WEIGHTED_SUM = METHODS.get("weighted_sum")
ADD_DIFFERENCE = METHODS.get("add_difference")


def random(shape: Sequence[int], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def models_of(method: MergeMethod, shape: Sequence[int], dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    """Random tensors, as many as the method takes, or `count` where it takes any number."""
    fixed = [name for name in method.models if not name.startswith("*")]
    number = len(fixed) + (count if len(fixed) < len(method.models) else 0)
    return [random(shape, dtype, seed) for seed in range(number)]


def parameters_of(method: MergeMethod, models: Sequence[Tensor]) -> dict[str, Any]:
    """Each parameter at its default; where it has none, weights that sum to one, and one half."""
    count = len(models) - method.needs_base
    given = {
        p.name: {"Weights": [1 / count] * count, "bool": True, "int": 1, "float": 0.5}[p.kind]
        for p in method.parameters
        if p.default is None
    }
    return method.check(given)


def applied(method: MergeMethod, models: Sequence[Tensor], dtype: torch.dtype, **parameters: Any) -> Tensor:
    out = torch.full(models[0].shape, 77.0).to(dtype)
    method.apply(models, out, parameters or parameters_of(method, models))
    return out


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place of `dtype` at the magnitude of each value, down to the smallest subnormal."""
    normal, eps = torch.finfo(dtype).smallest_normal, EPS[dtype]
    return torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(normal)))) * eps


def assert_close(found: Tensor, exact: Tensor, models: Sequence[Tensor]) -> None:
    """One unit in the last place of the result; where operands cancel out, what float32 keeps of the larger one."""
    largest = torch.stack([m.double().abs() for m in models]).amax(0)
    kept = 2.0**-51 if found.dtype is torch.float64 else 2.0**-23
    unit = torch.maximum(ulp(exact, found.dtype), largest * kept)
    distance = (found.double() - exact).abs() / unit
    worst = distance.argmax()
    assert distance.max() <= 1.0, f"{found.flatten()[worst]} for {exact.flatten()[worst]}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# ------------------------------------------------------------------------------------------------ every method


@every_method
def test_a_method_is_what_its_signature_says(method: MergeMethod) -> None:
    signature = inspect.signature(method.function).parameters.values()
    positional = [p for p in signature if p.kind is not p.KEYWORD_ONLY]
    settings = [p for p in signature if p.kind is p.KEYWORD_ONLY]
    assert [name.lstrip("*") for name in method.models] == [p.name for p in positional]
    assert [name.startswith("*") for name in method.models] == [p.kind is p.VAR_POSITIONAL for p in positional]
    assert all(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in positional)
    assert [(p.name, p.kind) for p in method.parameters] == [(p.name, p.annotation) for p in settings]
    assert all(p.kind in KINDS for p in method.parameters)
    assert method.needs_base == (positional[0].name == "base")
    assert method.name == method.function.__name__


@every_method
def test_a_method_says_in_one_line_what_it_does(method: MergeMethod) -> None:
    assert method.summary
    assert method.summary.endswith(".")
    assert "\n\n" not in method.summary


@every_method
@every_dtype
def test_models_that_are_equal_give_themselves(method: MergeMethod, dtype: torch.dtype) -> None:
    for shape in [(5, 7), (3,), ()]:
        model = random(shape, dtype, 0)
        models = [model] * len(models_of(method, shape, dtype))
        found = applied(method, models, dtype)
        # The weights are thirds: of float64, which is computed in itself, a last place may be lost.
        step = ulp(model.double(), dtype) if dtype is torch.float64 else torch.zeros(())
        assert ((found.double() - model.double()).abs() <= step).all()


@every_method
@every_dtype
def test_every_method_is_within_one_last_place_of_its_own_float64(method: MergeMethod, dtype: torch.dtype) -> None:
    models = models_of(method, (257,), dtype)
    parameters = parameters_of(method, models)
    exact = method.function(*(m.double() for m in models), **parameters)
    assert_close(applied(method, models, dtype), exact, models)


@pytest.mark.parametrize("method", [m for m in ALL if m.grain is Grain.ROWS], ids=lambda m: m.name)
@every_dtype
def test_rows_one_by_one_are_the_rows_of_the_whole(method: MergeMethod, dtype: torch.dtype) -> None:
    for count in (1, 2, 3):
        models = models_of(method, (37, 11), dtype, count)
        whole = applied(method, models, dtype)
        for height in (1, 8, 36):
            bands = [applied(method, [m[i : i + height] for m in models], dtype) for i in range(0, 37, height)]
            assert same_bits(torch.cat([b.view(torch.uint8) for b in bands]), whole.view(torch.uint8))


@every_method
def test_models_are_never_changed(method: MergeMethod) -> None:
    for dtype in FLOATS.values():
        models = models_of(method, (64,), dtype)
        before = [m.clone() for m in models]
        applied(method, models, dtype)
        assert all(map(same_bits, models, before))


@every_method
def test_a_result_is_never_one_of_the_models(method: MergeMethod) -> None:
    models = models_of(method, (64,), torch.float32)
    found = method.function(*models, **parameters_of(method, models))
    assert all(found.data_ptr() != m.data_ptr() for m in models)


@every_method
@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0), (1,), (2, 3, 1, 1)])
def test_every_shape_is_kept_and_filled(method: MergeMethod, shape: tuple[int, ...]) -> None:
    models = models_of(method, shape, torch.float16)
    found = applied(method, models, torch.float16)
    assert found.shape == torch.Size(shape)
    assert not (found == 77.0).any()


@every_method
@pytest.mark.parametrize("out", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_dtypes_may_be_mixed(method: MergeMethod, out: torch.dtype) -> None:
    mixture = [torch.float16, torch.bfloat16, torch.float32, torch.float8_e5m2]
    models = [m.to(mixture[i % 4]) for i, m in enumerate(models_of(method, (300,), torch.float32, 4))]
    exact = method.function(*(m.double() for m in models), **parameters_of(method, models))
    assert_close(applied(method, models, out), exact, models)


@every_method
def test_the_same_call_gives_the_same_bits(method: MergeMethod) -> None:
    models = models_of(method, (1000,), torch.bfloat16)
    assert same_bits(applied(method, models, torch.bfloat16), applied(method, models, torch.bfloat16))


# ------------------------------------------------------------------------------------------------ weighted_sum


@halves
@pytest.mark.parametrize("alpha", ALPHAS)
def test_two_halves_are_within_one_last_place_of_float64(dtype: torch.dtype, alpha: float) -> None:
    for scale in (1e-6, 0.03, 1.0, 300.0):
        a, b = random((20_000,), dtype, 1, scale), random((20_000,), dtype, 2, scale)
        found = applied(WEIGHTED_SUM, [a, b], dtype, weights=(1 - alpha, alpha))
        assert_close(found, (1 - alpha) * a.double() + alpha * b.double(), [a, b])


@halves
@pytest.mark.parametrize("alpha", [a for a in ALPHAS if a])
def test_operands_that_cancel_out_leave_no_more_than_float32_does(dtype: torch.dtype, alpha: float) -> None:
    a = random((20_000,), dtype, 3, 100.0)
    b = (a.double() * (alpha - 1) / alpha).to(dtype)
    found = applied(WEIGHTED_SUM, [a, b], dtype, weights=(1 - alpha, alpha))
    assert_close(found, (1 - alpha) * a.double() + alpha * b.double(), [a, b])


@pytest.mark.parametrize("alpha", ALPHAS)
def test_float32_is_within_one_last_place_of_the_larger_operand(alpha: float) -> None:
    a, b = random((50_000,), torch.float32, 4), random((50_000,), torch.float32, 5)
    b[:1000] = -a[:1000] * 1.0000001
    found = applied(WEIGHTED_SUM, [a, b], torch.float32, weights=(1 - alpha, alpha))
    exact = (1 - alpha) * a.double() + alpha * b.double()
    larger = torch.maximum(torch.maximum(a.abs(), b.abs()).double(), exact.abs())
    assert ((found.double() - exact).abs() <= ulp(larger, torch.float32)).all()


@every_dtype
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_weight_of_one_gives_that_model_bit_for_bit(dtype: torch.dtype, alpha: float) -> None:
    if dtype in (torch.float32, torch.float64):
        tiny = torch.finfo(dtype).smallest_normal
        start = random((4096,), dtype, 6)
        every = torch.cat([start, start * tiny, torch.tensor([0.0, -0.0, tiny / 3, -tiny / 3], dtype=dtype)])
    elif dtype.itemsize == 2:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    every = every[every.double().isfinite()]
    backwards = every[torch.arange(len(every) - 1, -1, -1)]
    for other in (backwards, torch.ones_like(every), torch.full_like(every, -1.0)):
        pair = [every, other] if alpha == 0.0 else [other, every]
        assert same_bits(applied(WEIGHTED_SUM, pair, dtype, weights=(1 - alpha, alpha)), every)


@pytest.mark.parametrize("dtype", [d for d in FLOATS.values() if d.itemsize == 1], ids=str)
@pytest.mark.parametrize("alpha", [0.3, 0.5, -1.0])
def test_every_pair_of_fp8_values_gives_the_nearest_value(dtype: torch.dtype, alpha: float) -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    every = every[every.float().isfinite()]
    a, b = every.repeat_interleave(len(every)), every.repeat(len(every))
    found = applied(WEIGHTED_SUM, [a, b], dtype, weights=(1 - alpha, alpha))
    exact = (1 - alpha) * a.double() + alpha * b.double()
    held = exact.abs() <= torch.finfo(dtype).max
    assert_close(found[held], exact[held], [a[held], b[held]])
    over = exact.abs() > torch.finfo(dtype).max * 1.15
    assert not found[over].float().isfinite().any(), "an overflow must not pass for a value"


@pytest.mark.parametrize("weights", [(1.0,), (0.2, 0.3, 0.5), (0.25, 0.25, 0.25, 0.25), (2.0, -1.0, 3.0), (0.0, 1.0)])
@every_dtype
def test_weighted_sum_is_the_sum_of_weights_times_models(dtype: torch.dtype, weights: tuple[float, ...]) -> None:
    models = [random((5000,), dtype, seed) for seed in range(len(weights))]
    exact = torch.zeros(5000, dtype=torch.float64)
    for model, weight in zip(models, weights, strict=True):
        exact += weight * model.double()
    assert_close(applied(WEIGHTED_SUM, models, dtype, weights=weights), exact, [m.double() * 3 for m in models])


def test_weights_that_sum_to_nothing_give_zeros() -> None:
    models = [random((8,), torch.float16, 0), random((8,), torch.float16, 1)]
    assert (applied(WEIGHTED_SUM, models, torch.float16, weights=(0.0, 0.0)) == 0).all()


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


# ------------------------------------------------------------------------------------------------ add_difference


@pytest.mark.parametrize("weights", [(1.0,), (0.5,), (1.0, 0.7), (0.3, -0.4, 2.0)])
@every_dtype
def test_add_difference_is_the_base_and_the_weighted_differences(
    dtype: torch.dtype, weights: tuple[float, ...]
) -> None:
    base, *models = [random((5000,), dtype, seed) for seed in range(len(weights) + 1)]
    exact = base.double()
    for model, weight in zip(models, weights, strict=True):
        exact = exact + weight * (model.double() - base.double())
    found = applied(ADD_DIFFERENCE, [base, *models], dtype, weights=weights)
    assert_close(found, exact, [base.double() * 4, *(m.double() * 4 for m in models)])


def test_add_difference_with_weights_one_and_alpha_is_a_plus_alpha_times_b_less_c() -> None:
    c, a, b = (torch.tensor([v], dtype=torch.float32) for v in (1.0, 3.0, 5.0))
    assert applied(ADD_DIFFERENCE, [c, a, b], torch.float32, weights=(1.0, 0.5)).item() == 3.0 + 0.5 * (5.0 - 1.0)


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


def test_an_unknown_method_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError) as caught:
        METHODS.get("weigthed_sum")
    assert str(caught.value) == "unknown merge method 'weigthed_sum'"
    assert caught.value.hint == "did you mean 'weighted_sum'?"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alpha", [0.7, 0.3, 0.5, -0.4])
@pytest.mark.parametrize("scale", [0.02, 1.0, 300.0])
def test_models_that_cancel_are_within_one_unit_of_the_rounded_float64_result(
    dtype: torch.dtype, alpha: float, scale: float
) -> None:
    """However small the sum of two large values is: the literal promise, not one relative to the operands."""
    generator = torch.Generator().manual_seed(7)
    a = (torch.randn(4 * SMALL, generator=generator) * scale).to(dtype)
    b = (a.double() * (1 - alpha) / -alpha).to(dtype)
    b[::3] = (torch.randn(len(b[::3]), generator=generator) * scale).to(dtype)
    found = applied(METHODS.get("weighted_sum"), [a, b], dtype, weights=(1 - alpha, alpha))
    exact = ((1 - alpha) * a.double() + alpha * b.double()).to(dtype)
    assert int((ordered(found) - ordered(exact)).abs().max()) <= 1
    lerped = torch.lerp(a, b, alpha)
    if scale > 1 and alpha != 0.5:  # the case is real: torch's lerp alone is further off
        assert int((ordered(lerped) - ordered(exact)).abs().max()) > 1


def ordered(values: Tensor) -> Tensor:
    """Integers in the order of the values, one apart where the values are neighbours."""
    bits = values.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
