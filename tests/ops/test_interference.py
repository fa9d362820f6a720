"""How LoRAs get in each other's way, as combine tells it: against dense matrices in float64."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from combining import OUT, accounted, combined
from locon import KERNEL, KEY, MODULES, POINT, QUERY, locon
from loras import Maker, deltas, named, save

from weightops.errors import OutputError, ValueRefused

if TYPE_CHECKING:
    from torch import Tensor


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# A kernel whose changes have 16 rows: the signs of all of them are compared.
SMALL = "lora_unet_up_blocks_3_resnets_0_conv1"
SHAPES = {QUERY: (32, 32), KEY: (32, 24), POINT: (32, 32, 1, 1), SMALL: (16, 6, 3, 3)}


def files(dtype: torch.dtype = torch.float32, *, odd: bool = False) -> list[Path]:
    """Three LoRAs, some of whose modules are alike; one lacks a module. odd: one has a whole difference and a LoHa."""
    a = locon(SHAPES, rank=4, alpha=2.0, seed=1, dtype=dtype)
    b = locon({k: v for k, v in SHAPES.items() if k != POINT}, rank=6, alpha=12.0, seed=2, dtype=dtype)
    c = locon(SHAPES, rank=3, alpha=None, seed=3, dtype=dtype)
    b[f"{QUERY}.lora_up.weight"] += torch.cat([a[f"{QUERY}.lora_up.weight"]] * 2, 1)[:, :6]
    for side in ("up", "down"):  # it lies along the first
        c[f"{KEY}.lora_{side}.weight"] = a[f"{KEY}.lora_{side}.weight"][: 3 if side == "down" else 32]
    c[f"{KEY}.lora_up.weight"] = -c[f"{KEY}.lora_up.weight"][:, :3].contiguous()
    if odd:
        t = Maker(5, dtype)
        c = {k: x for k, x in c.items() if not k.startswith((QUERY, SMALL))} | {f"{QUERY}.diff": t(32, 32)}
        c |= named(
            {SMALL: {".hada_w1_a": t(16, 3), ".hada_w1_b": t(3, 54), ".hada_w2_a": t(16, 3), ".hada_w2_b": t(3, 54)}}
        )
    return [save(Path(f"{name}.safetensors"), tensors) for name, tensors in zip("abc", (a, b, c), strict=True)]


def told(paths: list[Path], weights: tuple[float, ...], **words: Any) -> dict[str, Any]:
    report = combined(*zip(paths, weights, strict=True), interference_only=True, **words)
    found: dict[str, Any] = report.details["interference"]
    return found


def dense(paths: list[Path], weights: tuple[float, ...]) -> list[dict[str, Tensor]]:
    """What each file adds to each module."""
    return [{m: w * d.flatten(1) for m, d in deltas(p).items()} for p, w in zip(paths, weights, strict=True)]


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def angles(a: Tensor, b: Tensor) -> list[float]:
    """Between the column spaces, in degrees; of directions that rounding made, none."""
    bases = []
    for delta in (a, b):
        u, values, _ = torch.linalg.svd(delta, full_matrices=False)
        bases.append(u[:, values > 1e-5 * values[0]])
    return [math.degrees(math.acos(min(1.0, float(c)))) for c in torch.linalg.svdvals(bases[0].T @ bases[1])]


def conflicts(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The share of values of opposite signs; and of the smaller of two magnitudes."""
    both, against = (a != 0) & (b != 0), a.sign() * b.sign() < 0
    smaller = torch.minimum(a.abs(), b.abs())
    return float(against.sum() / both.sum()), float(smaller[against].sum() / smaller[both].sum())


WEIGHTS = [(1.0, 1.0, 1.0), (0.7, -0.5, 1.2), (-1.0, -2.0, 0.25)]


@pytest.mark.parametrize("odd", [False, True], ids=["factors", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_number_is_that_of_the_dense_changes(weights: tuple[float, ...], dtype: torch.dtype, odd: bool) -> None:
    paths = files(dtype, odd=odd)
    found, changes = told(paths, weights), dense(paths, weights)
    near = 1e-6 if dtype is torch.float32 else 1e-5
    modules = {m["name"]: m for m in found["modules"]}
    assert set(modules) == {m for m in SHAPES if sum(m in c for c in changes) > 1}
    for name, module in modules.items():
        mine = {file: c[name] for file, c in zip("abc", changes, strict=True) if name in c}
        total = sum(mine.values())
        for file, delta in mine.items():
            acts = float((total * delta).sum() / (delta * delta).sum())
            assert module["strengths"][file] == pytest.approx(acts, abs=near)
        assert [(p["a"], p["b"]) for p in module["pairs"]] == list(itertools.combinations(mine, 2))
        for pair in module["pairs"]:
            a, b = mine[pair["a"]], mine[pair["b"]]
            assert pair["cosine"] == pytest.approx(cosine(a, b), abs=near)
            if odd and name == QUERY:
                assert pair["smallest_angle"] is None
                assert pair["shared"] is None
            else:
                between = angles(a, b)
                assert pair["smallest_angle"] == pytest.approx(min(between), abs=0.02)
                shared = sum(math.cos(math.radians(x)) ** 2 for x in between) / len(between)
                assert pair["shared"] == pytest.approx(shared, abs=1e-5)
            share, cancelled = conflicts(a, b)
            if name == SMALL:  # as many rows as are looked at
                assert pair["sign_conflicts"] == pytest.approx(share, abs=0.002)
                assert pair["cancelled"] == pytest.approx(cancelled, abs=near)
            assert pair["sign_conflicts"] == pytest.approx(share, abs=0.15)
            assert pair["cancelled"] == pytest.approx(cancelled, abs=0.15)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_the_whole_is_all_modules_together(weights: tuple[float, ...]) -> None:
    """Of what a file does not change, nothing; strengths and cosines as of one long vector."""
    paths = files()
    found, changes = told(paths, weights), dense(paths, weights)
    names = list(SHAPES)
    vectors = [torch.cat([c.get(m, torch.zeros(SHAPES[m][0], math.prod(SHAPES[m][1:]))).flatten() for m in names])
               for c in changes]  # fmt: skip
    total = sum(vectors)
    for file, vector, weight in zip("abc", vectors, weights, strict=True):
        assert found["strengths"][file] == pytest.approx(float(total @ vector / (vector @ vector)), abs=1e-6)
        assert found["norms"][file] == pytest.approx(float(vector.norm()) / abs(weight), rel=1e-6)
    for pair, (a, b) in zip(found["pairs"], itertools.combinations(range(3), 2), strict=True):
        assert (pair["a"], pair["b"]) == ("abc"[a], "abc"[b])
        assert pair["cosine"] == pytest.approx(cosine(vectors[a], vectors[b]), abs=1e-6)


def test_a_negative_strength_turns_cosines_and_conflicts() -> None:
    paths = files()
    plus, minus = told(paths, (1.0, 1.0, 1.0)), told(paths, (1.0, -1.0, 1.0))
    for before, after in zip(plus["modules"], minus["modules"], strict=True):
        for a, b in zip(before["pairs"], after["pairs"], strict=True):
            turned = "b" in (a["a"], a["b"])
            assert b["cosine"] == pytest.approx(-a["cosine"] if turned else a["cosine"])
            for share in ("sign_conflicts", "cancelled"):
                assert b[share] == pytest.approx(1 - a[share] if turned else a[share], abs=1e-6)
            assert b["smallest_angle"] == a["smallest_angle"]
            assert b["shared"] == a["shared"]


def test_the_same_file_twice_is_the_same_and_against_itself_nothing_is_left() -> None:
    (a, *_) = files()
    found = told([a, a], (1.0, 1.0))
    assert set(found["strengths"]) == {"a (1)", "a (2)"}
    assert all(s == pytest.approx(2) for s in found["strengths"].values())
    for module in found["modules"]:
        (pair,) = module["pairs"]
        assert pair["cosine"] == pytest.approx(1)
        assert pair["smallest_angle"] == pytest.approx(0, abs=0.01)
        assert pair["shared"] == pytest.approx(1)
        assert pair["sign_conflicts"] == pair["cancelled"] == 0
    found = told([a, a], (1.0, -1.0))
    assert all(s == pytest.approx(0, abs=1e-9) for s in found["strengths"].values())
    for (pair,) in (module["pairs"] for module in found["modules"]):
        assert pair["cosine"] == pytest.approx(-1)
        assert pair["sign_conflicts"] == pair["cancelled"] == 1


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, -1.0), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["factors", "whole"])
def test_what_is_nothing_meets_nothing(weights: tuple[float, ...], whole: bool) -> None:
    """A change of zeros, and changes of rows that the other leaves alone."""
    t = Maker(1)
    upper, lower = t.lora(32, 32, 3), t.lora(32, 32, 3)
    upper[".lora_up.weight"][16:] = 0
    lower[".lora_up.weight"][:16] = 0
    nothing = {k: x * 0 if "up" in k else x for k, x in t.lora(32, 24, 3).items()}
    if whole:
        nothing = {".diff": torch.zeros(32, 24)}
        lower = {".diff": lower[".lora_up.weight"] @ lower[".lora_down.weight"]}
    a = save(Path("a.safetensors"), named({QUERY: upper, KEY: t.lora(32, 24, 3)}))
    b = save(Path("b.safetensors"), named({QUERY: lower, KEY: nothing}))
    modules = {m["name"]: m for m in told([a, b], weights)["modules"]}
    for name in (QUERY, KEY):
        (pair,) = modules[name]["pairs"]
        assert pair["cosine"] == pytest.approx(0, abs=1e-12)
        assert pair["sign_conflicts"] == pair["cancelled"] == 0
    assert modules[KEY]["strengths"] == {"a": 1.0 if weights[0] else None, "b": None}
    assert modules[KEY]["pairs"][0]["smallest_angle"] is None
    assert modules[QUERY]["strengths"] == {"a": pytest.approx(1.0) if weights[0] else None, "b": pytest.approx(1.0)}
    json.dumps(told([a, b], weights), allow_nan=False)


def test_changes_of_many_ranks_are_compared_without_their_factors() -> None:
    """Of LoHas the ranks multiply: 256 of them, of a matrix of 32 rows."""
    t = Maker(2)
    shapes = {".hada_w1_a": (32, 16), ".hada_w1_b": (16, 24), ".hada_w2_a": (32, 16), ".hada_w2_b": (16, 24)}
    paths = [save(Path(f"{name}.safetensors"), named({KEY: {k: t(*s) for k, s in shapes.items()}})) for name in "ab"]
    found, (a, b) = told(paths, (1.0, -0.5)), (c[KEY] for c in dense(paths, (1.0, -0.5)))
    (pair,) = found["modules"][0]["pairs"]
    assert pair["cosine"] == pytest.approx(cosine(a, b), abs=1e-6)
    assert found["strengths"]["a"] == pytest.approx(float(((a + b) * a).sum() / (a * a).sum()), abs=1e-6)


def test_dense_changes_are_the_same_band_by_band(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = files(odd=True)
    whole = told(paths, WEIGHTS[1])
    for values in (1, 100, 500):
        monkeypatch.setattr("weightops.ops.sums._BAND", values)
        found = told(paths, WEIGHTS[1])
        for before, after in zip(whole["modules"], found["modules"], strict=True):
            assert after["strengths"] == pytest.approx(before["strengths"], rel=1e-12)
            for a, b in zip(before["pairs"], after["pairs"], strict=True):
                for number in ("cosine", "sign_conflicts", "cancelled"):
                    assert b[number] == pytest.approx(a[number], rel=1e-12)
        assert found["norms"] == pytest.approx(whole["norms"], rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_dense_changes_that_are_not_finite_are_refused(value: float) -> None:
    paths = files()
    diff = torch.zeros(*SHAPES[QUERY])
    diff[31, 31] = value
    other = save(Path("d.safetensors"), {f"{QUERY}.diff": diff})
    with pytest.raises(ValueRefused, match="holds NaN or Inf"):
        told([paths[0], other], (1.0, 1.0))


# ------------------------------------------------------------------------------------------------ the report


def test_to_look_is_to_write_nothing() -> None:
    """Nor is a rank asked for what comes in without one, or a place to write to."""
    paths = files(odd=True)
    before = sorted(p.name for p in Path.cwd().iterdir())
    OUT.write_bytes(b"mine")
    report = combined(*paths, interference_only=True, force=False)
    assert OUT.read_bytes() == b"mine"
    OUT.unlink()
    assert sorted(p.name for p in Path.cwd().iterdir()) == before
    assert report.output is None
    assert report.bytes_written == 0
    assert report.bytes_read > 0
    accounted(report, *paths)
    assert combined(*paths, interference_only=True, output="nowhere/out.safetensors").output is None
    report = combined(*paths, interference_only=True, dry_run=True)
    assert "interference" not in report.details
    with pytest.raises(OutputError):
        combined(*paths, rank=4, output="nowhere/out.safetensors")


def test_fields_are_those_that_scripts_rely_on() -> None:
    paths = files()
    only = combined(*paths, interference_only=True).to_dict()
    whole = combined(*paths, rank=4).to_dict()
    assert only["interference"] == whole["interference"]
    found = only["interference"]
    assert set(found) == {"modules", "pairs", "strengths", "norms"}
    assert {frozenset(m) for m in found["modules"]} == {frozenset({"name", "strengths", "pairs"})}
    pairs = [pair for m in found["modules"] for pair in m["pairs"]]
    assert {frozenset(p) for p in pairs} == {
        frozenset({"a", "b", "cosine", "smallest_angle", "shared", "sign_conflicts", "cancelled"})
    }
    assert {frozenset(p) for p in found["pairs"]} == {frozenset({"a", "b", "cosine"})}
    assert (only["output"], only["bytes_written"]) == (None, 0)
    json.dumps(only, allow_nan=False)


def test_what_a_file_alone_changes_counts_in_its_norm_and_meets_nobody() -> None:
    a = save(Path("a.safetensors"), locon({QUERY: MODULES[QUERY]}, seed=1))
    b = save(Path("b.safetensors"), locon({KERNEL: MODULES[KERNEL]}, seed=2))
    found = told([a, b], (1.0, 1.0))
    assert found["modules"] == []
    assert found["pairs"] == [{"a": "a", "b": "b", "cosine": 0.0}]
    assert found["strengths"] == {"a": 1.0, "b": 1.0}
    assert found["norms"]["a"] == pytest.approx(float(deltas(a)[QUERY].norm()), rel=1e-6)
