"""What is taken where models vary, where one alone has changed, or where it matters: each against numpy's float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from applying import DTYPES, SHAPES, applied, assert_near, looked, random, same_bits
from torch.profiler import ProfilerActivity, profile

from weightops.errors import UsageError
from weightops.merging.method import METHODS
from weightops.plan import Grain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.float64]

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
NAMES = ("sce", "ram", "ram_plus", "arcee_fusion")
ON_DELTAS = NAMES[:3]
every_method = pytest.mark.parametrize("name", NAMES)
on_deltas = pytest.mark.parametrize("name", ON_DELTAS)


def sparse(shape: Sequence[int], dtype: torch.dtype = torch.float32, count: int = 3) -> list[Tensor]:
    """Differences of models of which each has changed its own two thirds of the values."""
    found = []
    for n in range(count):
        here = torch.rand(tuple(shape), generator=torch.Generator().manual_seed(50 + n)) < 2 / 3
        found.append((random(shape, seed=n, scale=0.01 * (n + 1)) * here).to(dtype))
    return found


def wide(models: Sequence[Tensor]) -> list[Array]:
    return [m.double().numpy() for m in models]


# ------------------------------------------------------------------------------------------------ sce


def sce(deltas: Sequence[Array], weights: Sequence[float], density: float) -> Array:
    table = np.stack(deltas)
    varied = table.var(0)
    least = np.sort(varied, axis=None)[::-1][max(1, round(density * varied.size)) - 1]
    table = np.where(varied >= least, table, 0.0)
    means = (table**2).reshape(len(deltas), -1).mean(1)
    signed = np.array(weights).reshape(-1, *[1] * (table.ndim - 1)) * table
    sign = np.sign(signed.sum(0))
    agree = (np.sign(signed) == sign) & (sign != 0)
    total = sum(m * np.where(a, s, 0.0) for m, a, s in zip(means, agree, signed, strict=True))
    share = sum(m * abs(w) * a for m, w, a in zip(means, weights, agree, strict=True))
    return np.divide(total, share, out=np.zeros_like(total), where=total != 0)


@every_shape
@every_dtype
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_sce_selects_calculates_and_erases(shape: tuple[int, ...], dtype: torch.dtype, density: float) -> None:
    deltas = sparse(shape, dtype)
    for weights in [(1.0, 1.0, 1.0), (0.5, 1.25, -0.75)]:
        found = applied("sce", deltas, weights=weights, density=density)
        exact = torch.from_numpy(sce(wide(deltas), weights, density))
        # In float32 a variance may be off by its last bit, and on the other side of the limit.
        off = (found.double() - exact).abs() > 0.05 * exact.abs().max()
        assert off.sum() <= (0 if density == 1 or found.numel() < 1000 else 4)
        assert_near(torch.where(off, exact.to(dtype), found), exact, [d * 3 for d in deltas])


def test_sce_weighs_small_differences_too() -> None:
    """mergekit's takes all for equal whose mean squares sum to less than a millionth."""
    a, b = torch.tensor([[3e-4, 3e-4]]), torch.tensor([[1e-4, 1e-4]])
    assert applied("sce", [a, b])[0].tolist() == pytest.approx([(9 * 3e-4 + 1e-4) / 10] * 2)


def test_what_varies_as_much_as_the_least_that_is_kept_is_kept_by_sce() -> None:
    a, b = torch.tensor([[1.0, 2.0, 3.0, 2.0]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert applied("sce", [a, b], density=0.5).tolist() == [[0.0, 2.0, 3.0, 2.0]]
    assert (applied("sce", [a, a], density=0.1) == a).all(), "nothing varies: all is kept"


# ------------------------------------------------------------------------------------------------ ram


def counts(deltas: Sequence[Array], weights: Sequence[float], threshold: float) -> tuple[Array, Array]:
    changed = np.stack([(np.abs(d) > threshold) & (w != 0) for d, w in zip(deltas, weights, strict=True)])
    return changed, changed.sum(0)


def ram(
    deltas: Sequence[Array], weights: Sequence[float], threshold: float = 1e-5, factors: Sequence[float] = (1, 1, 1)
) -> Array:
    changed, count = counts(deltas, weights, threshold)
    found = np.zeros_like(deltas[0])
    for delta, weight, own, factor in zip(deltas, weights, changed, factors, strict=True):
        found += np.where(own & (count == 1), factor * weight * delta, 0.0)
        found += np.where(own & (count > 1), weight * delta / np.maximum(count, 1), 0.0)
    return found


def ram_plus(deltas: Sequence[Array], weights: Sequence[float], rescale: float, limit: float) -> Array:
    changed, count = counts(deltas, weights, 1e-5)
    factors = []
    for own in changed:
        shared, alone = (own & (count > 1)).sum(), (own & (count == 1)).sum()
        factors.append(1 + rescale * min(shared / alone, limit) if alone else 1.0)
    return ram(deltas, weights, factors=factors)


@every_shape
@every_dtype
def test_ram_keeps_what_one_has_changed_and_averages_what_several_have(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    deltas = sparse(shape, dtype)
    for weights in [(1.0, 1.0, 1.0), (0.5, 0.0, -0.75)]:
        given = wide(deltas)
        assert_near(applied("ram", deltas, weights=weights), ram(given, weights), [d * 3 for d in deltas])
        found = applied("ram", deltas, weights=weights, threshold=0.01)
        assert_near(found, ram(given, weights, 0.01), [d * 3 for d in deltas])
        found = applied("ram_plus", deltas, weights=weights, rescale=0.5, limit=3.0)
        assert_near(found, ram_plus(given, weights, 0.5, 3.0), [d * 4 for d in deltas])
        found = applied("ram_plus", deltas, weights=weights)
        assert_near(found, ram_plus(given, weights, 0.1, 0.2), [d * 4 for d in deltas])


def test_ram_plus_counts_over_whole_models() -> None:
    """Each tensor is handed the counts of all of them together."""
    method = METHODS.get("ram_plus")
    settings = method.check({"rescale": 1.0, "limit": 10.0}, 2)
    tensors = {
        "a": [torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0])],
        "b": [torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 2.0])],
    }
    found = {name: looked(method, models, settings)["found"] for name, models in tensors.items()}
    assert found == {"a": [[1, 1], [1, 1]], "b": [[3, 0], [3, 0]]}
    (look,) = method.looks
    assert look.everywhere is not None
    known = look.everywhere(found, **settings)
    assert known == {"a": [[4, 1], [4, 1]], "b": [[4, 1], [4, 1]]}
    assert method.function(*tensors["a"], found=known["a"], **settings).tolist() == [1.0, 5.0, 5.0]
    assert method.function(*tensors["b"], found=known["b"], **settings).tolist() == [1.0, 1.0, 2.0]
    assert look.everywhere({}, **settings) == {}


# ------------------------------------------------------------------------------------------------ arcee fusion


def rows_of(model: Array) -> Array:
    return model.reshape(1, -1) if model.ndim < 2 else model.reshape(len(model), -1)


def importance(a: Array, b: Array) -> Array:
    def softmax(rows: Array) -> Array:
        powers = np.exp(rows - rows.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    p, q = softmax(rows_of(b)), softmax(rows_of(a))
    divergence = np.maximum((p * np.log(p / q)).sum(1, keepdims=True), 0)
    return (np.abs(rows_of(b) - rows_of(a)) * divergence).reshape(a.shape)


@every_shape
@every_dtype
@pytest.mark.parametrize("fence", [1.5, 0.0])
def test_arcee_fusion_takes_what_matters_most(shape: tuple[int, ...], dtype: torch.dtype, fence: float) -> None:
    a = random(shape, dtype, 1, 0.05)
    # Of convolutions and of rows that change by different amounts.
    amount = torch.linspace(0.1, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    b = (a.float() + 0.01 * amount * random(shape, seed=2)).to(dtype)
    found = applied("arcee_fusion", [a, b], fence=fence)
    scores = importance(*wide([a, b])).astype(np.float32)
    low, median, high = np.quantile(scores.astype(np.float64), [0.25, 0.5, 0.75])
    exact = np.where(scores >= np.float32(median + fence * (high - low)), *wide([b, a]))
    off = found.double().numpy() != exact
    assert off.sum() <= (0 if found.numel() < 10_000 else 3), "an importance that is rounded the other way"
    assert ((found == a) | (found == b)).all()
    if fence == 0 and len(shape) == 2:
        assert (found == b).double().mean() == pytest.approx(0.5, abs=0.1)


def test_arcee_fusion_sees_divergences_that_float32_does_not() -> None:
    """Of two rows that change alike in size, it takes the one in which the change tells."""
    a = random((2, 4096), scale=0.02)
    b = a.clone()
    b[0] += 1e-4  # the softmax of a row does not change with a constant
    b[1] += 1e-4 * torch.where(random((4096,), seed=3) > 0, 1.0, -1.0)
    found = applied("arcee_fusion", [a, b], fence=0.0)
    assert (found[0] == a[0]).float().mean() > 0.9
    assert torch.equal(found[1], b[1])


def test_arcee_fusion_of_one_value_is_the_second_model() -> None:
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [2.0]])
    assert torch.equal(applied("arcee_fusion", [a, b]), b)


# ------------------------------------------------------------------------------------------------ what all of them keep


def pair(name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [m + (1 if name == "arcee_fusion" else 0) for m in sparse(shape, dtype, 2)]


@every_method
@every_dtype
def test_models_that_are_equal_give_themselves(name: str, dtype: torch.dtype) -> None:
    for shape in [(5, 7), (3,), (1,), (300, 500)]:
        model, _ = pair(name, shape, dtype)
        assert torch.equal(applied(name, [model, model], **({"threshold": 0} if "ram" in name else {})), model)


@on_deltas
def test_one_change_is_itself_and_zeros_give_zero(name: str) -> None:
    (delta,) = sparse((9, 7), count=1)
    settings = {"threshold": 0} if "ram" in name else {}
    assert torch.equal(applied(name, [delta], **settings), delta)
    assert torch.equal(applied(name, [delta], weights=[-1.0], **settings), -delta)
    zero = torch.zeros(9, 7)
    assert (applied(name, [zero, zero]) == 0).all()
    assert torch.equal(applied(name, [delta, zero], **settings), delta)


@every_method
def test_opposite_models_and_large_ones_stay_finite(name: str) -> None:
    for scale in (1.0, 1e-30, 1e30):
        model = random((40, 40), scale=scale)
        assert applied(name, [model, -model]).isfinite().all()


@on_deltas
def test_weights_are_strengths_or_shares(name: str) -> None:
    once, twice = (applied(name, sparse((12, 10), count=2), weights=w) for w in ([0.75, 0.5], [1.5, 1.0]))
    assert torch.equal(twice, once if name == "sce" else 2 * once)


@every_method
def test_what_is_not_a_number_is_not_lost(name: str) -> None:
    for shape, at in [((6, 6), (2, 3)), ((600, 500), (411, 7))]:
        for number in (0, 1):
            models = pair(name, shape, torch.float16)
            models[number][at] = math.nan
            assert applied(name, models)[at].isnan()
            if name != "sce":  # there the whole tensor is weighed by it
                assert applied(name, models).isnan().nonzero().tolist() == [list(at)]


@every_method
def test_models_are_never_changed(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        models = [m.to(dtype) for m in pair(name, (8, 8))]
        before = [m.clone() for m in models]
        method = METHODS.get(name)
        settings = method.check({}, 2)
        method.function(*models, **settings, **looked(method, models, settings))
        assert all(map(same_bits, models, before))


@every_method
def test_bits_do_not_depend_on_the_height_of_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models, found = pair(name, (370, 211), torch.float16), []
    settings: dict[str, Any] = {"density": 0.3} if name == "sce" else {}
    for values in (211 * 4, 211 * 64, 1 << 20):
        monkeypatch.setattr("weightops.merging.expression.WORKING_VALUES", values)
        found.append(applied(name, models, **settings))
    assert all(same_bits(found[0], other) for other in found[1:])


@every_method
def test_looks_at_blocks_find_what_a_look_at_all_finds(name: str) -> None:
    method, models = METHODS.get(name), pair(name, (500, 700), torch.float16)
    if not method.looks:
        assert name == "ram"
        return
    settings = method.check({"density": 0.37} if name == "sce" else {}, 2)
    rows = 77 if method.grain is Grain.ROWS else 77 * 700
    assert looked(method, models, settings) == looked(method, models, settings, rows=rows)


@every_method
def test_no_more_memory_is_taken_than_is_said(name: str) -> None:
    """Neither by the function, nor by its looks."""
    method = METHODS.get(name)
    for count in (2, 4) if method.is_open else (2,):
        models = [m.double() for m in sparse((64, 512), count=count)]
        settings = method.check({"density": 0.5} if name == "sce" else {}, count)
        handed = looked(method, models, settings)
        said = (method.copies + method.each * count) * models[0].nbytes
        most = taken(lambda: method.function(*models, **settings, **handed))  # noqa: B023
        assert most <= said + 4096
        assert said <= 2 * most
        for look in method.looks[-1:] if name != "arcee_fusion" else method.looks[:1]:
            before = handed["found"][0] if name == "sce" else None
            assert taken(lambda: look.block(*models, found=before, **settings)) <= said + (1 << 18)  # noqa: B023


def taken(do: Any) -> int:
    """The most bytes of torch's that are alive at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        do()
    now = most = 0
    for event in found.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("ram", {"threshold": -1}, "ram, threshold: found -1, expected 0 or more"),
        ("ram_plus", {"threshold": -1}, "ram_plus, threshold: found -1, expected 0 or more"),
        ("ram_plus", {"rescale": -0.1}, "ram_plus, rescale: found -0.1, expected 0 or more"),
        ("ram_plus", {"limit": -2}, "ram_plus, limit: found -2, expected 0 or more"),
        ("sce", {"density": 0}, "sce, density: found 0, expected a number above 0 and at most 1"),
    ],
)
def test_senseless_settings_are_refused(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        METHODS.get(name).check(given, 2)
    assert str(caught.value) == message


@pytest.mark.cuda
@every_method
def test_a_gpu_gives_the_same(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for shape in [(300, 40), (900, 500)]:
        models = pair(name, shape, torch.float16)
        settings: dict[str, Any] = {"density": 0.3} if name == "sce" else {}
        there, here = applied(name, [m.cuda() for m in models], **settings).cpu(), applied(name, models, **settings)
        assert ((there - here).abs() > 1e-5).sum() <= 4
