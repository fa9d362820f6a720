"""resize: every module at the best approximation that its rank allows, at its own strength, by every rule."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from locon import (
    BLOCK,
    ENCODER,
    KERNEL,
    KEY,
    LAST,
    MODULES,
    POINT,
    QUERY,
    WIDE,
    locon,
    matrices,
    off,
    product,
    values_of,
)
from loras import Maker, metadata_of, named, raw, save, tensors_of
from test_fuse import FLUX, flux_lora, tiny, weights
from test_fuse import MODULES as PACKED
from torch import Tensor

from weightops.errors import MemoryRefused, MismatchError, UsageError, ValueRefused
from weightops.ops import factor_plan
from weightops.ops.fuse import fuse
from weightops.ops.resize import resize

sys.path.insert(0, str(Path(__file__).parents[1] / "naming"))
from tagged import from_canonical, needs_lists, to_canonical

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def resized(tensors: dict[str, Tensor], **words: Any) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """The report, and ΔW of every module before and after."""
    source = save(Path("lora.safetensors"), tensors)
    words = {"output": "out.safetensors", "force": True} | words
    return resize(source, **words), matrices(source), matrices(Path(words["output"]))


def rows(report: Any) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report.details["modules"]}


def ranks(report: Any) -> dict[str, int]:
    return {name: row["rank"] for name, row in rows(report).items()}


# ------------------------------------------------------------------------------------------------ the rules, restated


def wanted(rule: str, values: list[float]) -> int:
    """The rank that a rule gives one matrix, by the rule's definition over its singular values."""
    kind, _, setting = rule.partition(":")
    every = range(1, len(values) + 1)
    squares = [v * v for v in values]
    if kind == "energy":
        return next(r for r in every if sum(squares[:r]) >= float(setting) * sum(squares))
    if kind == "fro":
        return next(r for r in every if math.sqrt(sum(squares[:r]) / sum(squares)) >= float(setting))
    if kind == "cumulative":
        return next(r for r in every if sum(values[:r]) / sum(values) >= float(setting))
    if kind == "ratio":
        return sum(v > values[0] / float(setting) for v in values)
    if kind == "knee":
        (x1, y1), (x2, y2) = (0, values[0]), (len(values) - 1, values[-1])
        away = [abs((x2 - x1) * (y1 - v) - (x1 - i) * (y2 - y1)) for i, v in enumerate(values)]
        return away.index(max(away)) + 1
    return min(int(kind), len(values))


def error_of(spectra: dict[str, list[float]], chosen: dict[str, int], weights: dict[str, float] | None = None) -> float:
    """√(Σ w·lost / Σ w·all) of these ranks."""
    weight = weights or dict.fromkeys(spectra, 1.0)
    lost = sum(weight[m] * sum(v * v for v in values[chosen[m] :]) for m, values in spectra.items())
    return math.sqrt(lost / sum(weight[m] * sum(v * v for v in values) for m, values in spectra.items()))


def shared(
    spectra: dict[str, list[float]], sides: dict[str, int], limit: float, caps: dict[str, int]
) -> dict[str, int]:
    """The ranks of error:E, from sorting: what tells most per byte comes first, until what is left is little enough."""
    order = sorted(
        ((-v * v / sides[m], m) for m, values in spectra.items() for v in values[: caps.get(m)]),
        key=lambda pair: pair[0],
    )
    greedy = dict.fromkeys(spectra, 0)
    for _, name in order:
        if error_of(spectra, greedy) <= limit:
            break
        greedy[name] += 1
    most = max(map(len, spectra.values()))
    alike = [{m: min(r, len(values[: caps.get(m)])) for m, values in spectra.items()} for r in range(most + 1)]
    uniform = next((found for found in alike if error_of(spectra, found) <= limit), alike[-1])
    return min(greedy, uniform, key=lambda found: sum(sides[m] * r for m, r in found.items()))


def is_convolution(name: str) -> bool:
    return math.prod(MODULES[name][2:]) > 1


RULES: list[tuple[str, dict[str, Any]]] = [
    ("5", {}),
    ("5", {"conv_rank": 2}),
    ("6", {"conv_rank": "energy:0.8"}),
    ("energy:0.9", {}),
    ("energy:0.999", {"max_rank": 6}),
    ("energy:0.95", {"conv_rank": "knee", "max_rank": 4, "max_conv_rank": 2}),
    ("error:0.1", {}),
    ("error:0.2", {"conv_rank": 3}),
    ("ratio:6", {}),
    ("ratio:6", {"conv_rank": 3}),
    ("cumulative:0.8", {}),
    ("cumulative:0.8", {"max_rank": 3}),
    ("fro:0.95", {}),
    ("fro:0.95", {"max_conv_rank": 1}),
    ("knee", {}),
]


@every_dtype
@pytest.mark.parametrize(("rule", "words"), RULES, ids=str)
def test_each_rule_chooses_what_it_says_and_the_optimum_is_written(
    rule: str, words: dict[str, Any], dtype: torch.dtype
) -> None:
    """Against the float64 SVD of the dense ΔW: ranks, singular values and errors."""
    report, before, after = resized(locon(dtype=dtype), rank=rule, **words, dtype="fp32")
    spectra = {name: values_of(delta, 12) for name, delta in before.items()}
    most = {m: words.get("max_rank", 99) for m in MODULES}
    most |= {m: words.get("max_conv_rank", most[m]) for m in MODULES if is_convolution(m)}
    if rule.startswith("error"):
        caps = {m: words["conv_rank"] for m in MODULES if is_convolution(m) and "conv_rank" in words}
        goals = shared(spectra, {m: sum(d.shape) for m, d in before.items()}, float(rule[6:]), caps)
    else:
        own = {m: str(words.get("conv_rank", rule)) if is_convolution(m) else rule for m in MODULES}
        goals = {m: min(wanted(own[m], values), most[m]) for m, values in spectra.items()}
    assert ranks(report) == goals
    for name, values in spectra.items():
        rank, row = goals[name], rows(report)[name]
        kept = values_of(after[name], rank) if rank else []
        assert max((abs(a - b) for a, b in zip(kept, values, strict=False)), default=0) <= 1e-5 * values[0], name
        optimum = math.sqrt(sum(v * v for v in values[rank:]) / sum(v * v for v in values))
        assert math.isclose(row["error"], optimum, rel_tol=1e-5, abs_tol=1e-5), name
        assert math.isclose(off(before[name], after.get(name)), optimum, rel_tol=1e-5, abs_tol=1e-5), name
        assert math.isclose(row["energy"], 1 - optimum**2, rel_tol=1e-5), name
        assert math.isclose(row["delta_norm"], float(before[name].norm()), rel_tol=1e-6), name
        assert row["rank_before"] == 12
    assert math.isclose(report.details["error"], error_of(spectra, goals), rel_tol=1e-5, abs_tol=1e-6)


@every_dtype
def test_rounding_is_in_the_error_that_is_said(dtype: torch.dtype) -> None:
    """The factors are rounded to the file's own dtype, and what they then lack is computed in float64."""
    report, before, after = resized(locon(dtype=dtype), rank="error:0.01", verify=True)
    assert {t.dtype for t in tensors_of(Path("out.safetensors")).values() if t.ndim} == {dtype}
    for name, row in rows(report).items():
        assert math.isclose(row["error"], off(before[name], after[name]), rel_tol=1e-3, abs_tol=1e-7), name
    assert report.verified["modules"] == len(MODULES)


# ------------------------------------------------------------------------------------------------ strength


@pytest.mark.parametrize("alpha", [12.0, 6.0, 1 / 48, 1.0, -3.0, 1000.0, None], ids=str)
@pytest.mark.parametrize("rule", [5, "energy:0.9"])
def test_the_strength_stays(alpha: float | None, rule: int | str) -> None:
    tensors = locon(alpha=alpha)
    report, before, after = resized(tensors, rank=rule, verify=True)
    written = tensors_of(Path("out.safetensors"))
    for name, row in rows(report).items():
        assert row["delta_norm"] > 0
        assert math.isclose(row["error"], off(before[name], after[name]), rel_tol=1e-3, abs_tol=1e-7), name
        up, down = written[f"{name}.lora_up.weight"].double(), written[f"{name}.lora_down.weight"].double()
        assert len(down) == up.shape[1] == row["rank"]
        if alpha is None:
            assert f"{name}.alpha" not in written
            by_hand = up.flatten(1) @ down.flatten(1)
        else:
            found = float(written[f"{name}.alpha"])
            assert math.isclose(found, alpha / 12 * row["rank"], rel_tol=1e-6)
            by_hand = found / len(down) * up.flatten(1) @ down.flatten(1)
        assert off(after[name], by_hand) < 1e-12
    assert 0 < report.details["error"] < 0.4


def test_ranks_do_not_depend_on_the_strength() -> None:
    for rule in ("energy:0.9", "ratio:6", "cumulative:0.8", "knee", "error:0.2"):
        found = [ranks(resized(locon(alpha=alpha), rank=rule)[0]) for alpha in (12.0, -0.25, None)]
        assert found[0] == found[1] == found[2]


def test_a_strength_of_zero_keeps_its_module_where_a_number_is_asked_for() -> None:
    tensors = locon() | {f"{QUERY}.alpha": torch.tensor(0.0)}
    report, _, after = resized(tensors, rank=4, verify=True)
    assert rows(report)[QUERY] | {"method": ""} == {
        "name": QUERY, "rank_before": 12, "rank": 4, "energy": rows(report)[QUERY]["energy"], "error": 0.0,
        "delta_norm": 0.0, "method": "",
    }  # fmt: skip
    assert float(tensors_of(Path("out.safetensors"))[f"{QUERY}.alpha"]) == 0
    assert not after[QUERY].any()
    report, _, after = resized(tensors, rank="energy:0.9")
    assert ranks(report)[QUERY] == 0
    assert QUERY not in after


def test_alphas_of_some_modules_stay_theirs() -> None:
    """Without one a module is as strong as it stands; what is not cut gets none."""
    tensors = locon() | {f"{KEY}.alpha": torch.tensor(3.0)}
    small = locon({ENCODER: MODULES[ENCODER]}, rank=2)
    tensors = {k: t for k, t in tensors.items() if not k.startswith(ENCODER)} | small
    for gone in (QUERY, ENCODER):
        del tensors[f"{gone}.alpha"]
    report, before, after = resized(tensors, rank=4)
    written = tensors_of(Path("out.safetensors"))
    assert f"{ENCODER}.alpha" not in written
    assert math.isclose(float(written[f"{KEY}.alpha"]), 1.0)
    assert float(written.get(f"{QUERY}.alpha", 4.0)) == 4.0
    for name, row in rows(report).items():
        assert math.isclose(row["error"], off(before[name], after[name]), rel_tol=1e-3, abs_tol=1e-7), name


# ------------------------------------------------------------------------------------------------ what is not cut


def test_a_module_of_lower_rank_keeps_its_own_bytes() -> None:
    small = locon({m: MODULES[m] for m in (KEY, KERNEL)}, rank=3, seed=7, dtype=torch.float16)
    tensors = locon(dtype=torch.float16) | small
    report, *_ = resized(tensors, rank=6)
    before, after = raw(Path("lora.safetensors")), raw(Path("out.safetensors"))
    for key in small:
        assert after[key] == before[key]
    assert {m: row["method"] for m, row in rows(report).items() if row["method"] == "kept"} == {
        KEY: "kept",
        KERNEL: "kept",
    }
    assert set(report.account.copied) == set(small)
    assert set(report.account.used) == set(tensors) - set(small)
    assert report.account.unused == []
    assert ranks(report) == dict.fromkeys(MODULES, 6) | {KEY: 3, KERNEL: 3, LAST: 4}


def test_all_ranks_are_the_file_again() -> None:
    """But for conv_out, which has four outputs and 12 ranks: four hold all of it."""
    for rank in (12, "energy:1"):
        report, before, after = resized(locon(), rank=rank)
        assert ranks(report) == dict.fromkeys(MODULES, 12) | {LAST: 4}
        assert off(before[LAST], after[LAST]) < 1e-6
        files = [raw(Path(name)) for name in ("lora.safetensors", "out.safetensors")]
        first, second = ({k: v for k, v in tensors.items() if not k.startswith(LAST)} for tensors in files)
        assert first == second


@pytest.mark.parametrize("words", [{"rank": "error:0.6"}, {"rank": 4, "conv_rank": 0}], ids=str)
def test_rank_zero_drops_a_module_and_says_so(words: dict[str, Any]) -> None:
    tensors = locon()
    for side in ("up", "down"):  # one module that nearly does nothing
        tensors[f"{KERNEL}.lora_{side}.weight"] *= 0.01
    report, before, after = resized(tensors, **words, verify=True)
    gone = {m for m, rank in ranks(report).items() if not rank}
    assert KERNEL in gone
    assert after.keys() == before.keys() - gone
    first = next(m for m in ranks(report) if m in gone)
    plural = "s" if len(gone) > 1 else ""
    assert report.warnings == [f"{len(gone)} module{plural} of rank 0: dropped, {first!r} the first"]
    assert {u.key for u in report.account.unused} == {k for k in tensors if k.partition(".")[0] in gone}
    assert {u.reason for u in report.account.unused} == {"rank 0: its module is dropped"}
    for name in gone:
        row = rows(report)[name]
        assert (row["error"], row["energy"]) == (1.0, 0.0)
        assert math.isclose(row["delta_norm"], float(before[name].norm()), rel_tol=1e-6)
    lost = sum(float((d - after.get(m, torch.zeros_like(d))).norm()) ** 2 for m, d in before.items())
    whole = sum(float(d.norm()) ** 2 for d in before.values())
    assert math.isclose(report.details["error"], math.sqrt(lost / whole), rel_tol=1e-5)


# ------------------------------------------------------------------------------------------------ other families


def made(kind: str) -> tuple[str, dict[str, Tensor]]:
    """A module, and the parts of an adapter of it; all are random, and of no round numbers."""
    t = Maker(len(kind))
    kernel = (3, 3)
    kinds: dict[str, tuple[str, Any]] = {
        "loha": (QUERY, lambda: {".hada_w1_a": t(32, 3), ".hada_w1_b": t(3, 32), ".hada_w2_a": t(32, 3),
                                 ".hada_w2_b": t(3, 32)}),
        "loha, ranks above the sides": (LAST, lambda: {
            ".hada_w1_a": t(4, 3), ".hada_w1_b": t(3, 288), ".hada_w2_a": t(4, 3), ".hada_w2_b": t(3, 288)}),
        "loha, tucker": (KERNEL, lambda: {
            ".hada_w1_a": t(3, 32), ".hada_w1_b": t(3, 16), ".hada_t1": t(3, 3, *kernel), ".hada_w2_a": t(3, 32),
            ".hada_w2_b": t(3, 16), ".hada_t2": t(3, 3, *kernel)}),
        "lokr": (QUERY, lambda: {".lokr_w1": t(4, 4), ".lokr_w2": t(8, 8)}),
        "lokr, second factorised": (QUERY, lambda: {".lokr_w1": t(4, 4), ".lokr_w2_a": t(8, 2), ".lokr_w2_b": t(2, 8)}),
        "lokr, first factorised": (KEY, lambda: {".lokr_w1_a": t(4, 2), ".lokr_w1_b": t(2, 3), ".lokr_w2": t(8, 8)}),
        "lokr, both factorised": (KEY, lambda: {".lokr_w1_a": t(4, 2), ".lokr_w1_b": t(2, 3), ".lokr_w2_a": t(8, 2),
                                                ".lokr_w2_b": t(2, 8)}),
        "lokr, kernel": (KERNEL, lambda: {".lokr_w1": t(4, 2), ".lokr_w2": t(8, 8, *kernel)}),
        "lokr, kernel factorised": (KERNEL, lambda: {".lokr_w1": t(4, 2), ".lokr_w2_a": t(8, 3),
                                                     ".lokr_w2_b": t(3, 8, *kernel)}),
        "lokr, tucker": (KERNEL, lambda: {".lokr_w1": t(4, 2), ".lokr_w2_a": t(3, 8), ".lokr_w2_b": t(3, 8),
                                          ".lokr_t2": t(3, 3, *kernel)}),
        "lokr, tucker, both": (KERNEL, lambda: {
            ".lokr_w1_a": t(4, 1), ".lokr_w1_b": t(1, 2), ".lokr_w2_a": t(3, 8), ".lokr_w2_b": t(3, 8),
            ".lokr_t2": t(3, 3, *kernel)}),
        "lora, tucker": (KERNEL, lambda: {".lora_up.weight": t(32, 6, 1, 1), ".lora_down.weight": t(6, 16, 1, 1),
                                          ".lora_mid.weight": t(6, 6, *kernel)}),
        "lora, uneven tucker": (KERNEL, lambda: {".lora_up.weight": t(32, 4, 1, 1), ".lora_down.weight": t(7, 16, 1, 1),
                                                 ".lora_mid.weight": t(4, 7, *kernel)}),
        "full": (QUERY, lambda: {".diff": t(32, 32)}),
        "full, kernel": (KERNEL, lambda: {".diff": t(32, 16, *kernel)}),
    }  # fmt: skip
    name, parts = kinds[kind]
    return name, parts()


KINDS = (
    "loha", "loha, ranks above the sides", "loha, tucker", "lokr", "lokr, second factorised", "lokr, first factorised",
    "lokr, both factorised", "lokr, kernel", "lokr, kernel factorised", "lokr, tucker", "lokr, tucker, both",
    "lora, tucker", "lora, uneven tucker", "full", "full, kernel",
)  # fmt: skip


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_becomes_the_best_lora_of_its_exact_change(kind: str, dtype: torch.dtype) -> None:
    name, parts = made(kind)
    tensors = {k: t.to(dtype) for k, t in named({name: parts | {".alpha": torch.tensor(1.5)}}).items()}
    shape = MODULES[name]
    values: list[float] = []
    for rule in ("3", "energy:0.6", "ratio:2", "cumulative:0.5", "fro:0.8", "error:0.5"):
        report, before, after = resized(tensors, rank=rule, dtype="fp32", verify=True)
        values = values or values_of(before[name])
        rank = wanted("energy:0.75" if rule == "error:0.5" else rule, values)
        row = rows(report)[name]
        if 0.95 * math.prod(shape) <= rank * (shape[0] + math.prod(shape[1:])) and kind.startswith("full"):
            assert (row["rank"], row["method"]) == (min(shape[0], math.prod(shape[1:])), "whole")
            assert tensors_of(Path("out.safetensors"))[f"{name}.diff"].shape == shape
            assert off(before[name], after[name]) == row["error"] == 0
            continue
        assert row["rank"] == rank
        written = {k: tuple(t.shape) for k, t in tensors_of(Path("out.safetensors")).items() if t.ndim}
        axes = shape if "above" not in kind else (shape[0], math.prod(shape[1:]))  # its factors tell of no kernel
        down, up = (rank, *axes[1:]), (shape[0], rank, *[1] * (len(axes) - 2))
        assert written == {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        kept = values_of(after[name], rank)
        assert max(abs(a - b) for a, b in zip(kept, values, strict=False)) <= 1e-5 * values[0]
        optimum = math.sqrt(sum(v * v for v in values[rank:]) / sum(v * v for v in values))
        assert math.isclose(row["error"], optimum, rel_tol=1e-5, abs_tol=1e-5)
        assert math.isclose(off(before[name], after[name]), optimum, rel_tol=1e-5, abs_tol=1e-5)
        assert math.isclose(row["delta_norm"], float(before[name].norm()), rel_tol=1e-5)
        assert math.isclose(row["energy"], 1 - optimum**2, rel_tol=1e-5)


SHORTCUT = "lora_unet_down_blocks_1_resnets_0_conv_shortcut"


@pytest.mark.parametrize(("name", "kernel"), [(KERNEL, (3, 3)), (SHORTCUT, (1, 1)), (QUERY, ())], ids=str)
def test_a_kernel_that_was_factorised_flat_gets_its_axes_from_the_model(name: str, kernel: tuple[int, ...]) -> None:
    """Real LoKr files have conv1 of SD1.5 as [320, 2880]; the LoRA that is made of it has windows of 3 × 3."""
    t = Maker(1)
    parts = {".lokr_w1_a": t(4, 2), ".lokr_w1_b": t(2, 12), ".lokr_w2_a": t(8, 2), ".lokr_w2_b": t(2, 12)}
    report, before, after = resized(named({name: parts}) | locon({POINT: MODULES[POINT]}), rank=3)
    written = tensors_of(Path("out.safetensors"))
    assert written[f"{name}.lora_down.weight"].shape == (3, 144 // math.prod(kernel), *kernel)
    assert written[f"{name}.lora_up.weight"].shape == (32, 3, *[1] * len(kernel))
    values = values_of(before[name])
    optimum = math.sqrt(sum(v * v for v in values[3:]) / sum(v * v for v in values))
    assert math.isclose(off(before[name], after[name]), optimum, rel_tol=1e-5)
    assert math.isclose(rows(report)[name]["error"], optimum, rel_tol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_change_that_is_resized_is_lycoris(kind: str) -> None:
    """All ranks of it, against LyCORIS' own functions."""
    functional = pytest.importorskip("lycoris.functional")
    name, parts = made(kind)
    _, _, after = resized(named({name: parts | {".alpha": torch.tensor(1.5)}}), rank=99)
    p = {key.removeprefix(".").removesuffix(".weight"): tensor for key, tensor in parts.items()}
    if kind.startswith("full"):
        found = p["diff"]
    elif kind.startswith("lora"):
        scale = 1.5 / len(p["lora_down"])
        found = functional.locon.diff_weight(p["lora_down"], p["lora_up"], p["lora_mid"], gamma=scale)
    elif kind.startswith("loha"):
        keys = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a", "hada_t1", "hada_t2")
        found = functional.loha.diff_weight(*(p.get(key) for key in keys), gamma=1.5 / len(p["hada_w1_b"]))
    else:
        keys = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
        found = functional.lokr.diff_weight(*(p.get(key) for key in keys), gamma=1.0)
        # It divides by a rank of its own, of a Tucker product by w2_a's outputs: its modules do not.
        found = found * (float(after[name].norm()) / float(found.norm()))
    assert off(found.flatten(1).double(), after[name]) < 1e-5


# ------------------------------------------------------------------------------------------------ with a base

# kohya's names -> those of SD1.5's single file.
WEIGHTS = {
    QUERY: "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    KEY: "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k",
    POINT: "model.diffusion_model.input_blocks.1.1.proj_in",
    KERNEL: "model.diffusion_model.input_blocks.1.0.in_layers.2",
    WIDE: "model.diffusion_model.output_blocks.9.0.out_layers.3",
    LAST: "model.diffusion_model.out.2",
}
NORM = f"{BLOCK}_norm"


def model(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A few weights of SD1.5, each of another size."""
    maker = Maker(11)
    found = {
        f"{WEIGHTS[m]}.weight": maker(*MODULES[m]) * (0.02 * 2**number) for number, m in enumerate(WEIGHTS)
    }  # fmt: skip
    found["model.diffusion_model.input_blocks.0.0.weight"] = maker(32, 4, 3, 3)
    found["model.diffusion_model.input_blocks.1.1.norm.weight"] = maker(32)
    return {k: t.to(dtype) for k, t in found.items()}


def based(tensors: dict[str, Tensor], **words: Any) -> tuple[Any, dict[str, Tensor]]:
    """The report, and ΔW of what was written, of a resize with the model at hand."""
    save(Path("base.safetensors"), model())
    save(Path("lora.safetensors"), tensors)
    words = {"output": "out.safetensors", "force": True} | words
    return resize("lora.safetensors", base="base.safetensors", **words), matrices(Path(words["output"]))


def changed(weight: Tensor, kind: str, parts: dict[str, Tensor]) -> Tensor:
    """W', by the definition of each family, in float64."""
    w = weight.double()
    p = {key.removeprefix(".").removesuffix(".weight"): tensor.double() for key, tensor in parts.items()}
    if kind.startswith("dora"):
        rank = len(p["lora_down"]) if "lora_down" in p else len(p["hada_w1_b"])
        if "lora_down" in p:
            delta = (p["lora_up"].flatten(1) @ p["lora_down"].flatten(1)).reshape(w.shape)
        else:
            delta = (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
        v = w + float(p["alpha"]) / rank * delta
        axes = [a for a in range(w.ndim) if a != (1 if "inputs" in kind else 0)]
        return v * p["dora_scale"] / torch.linalg.vector_norm(v, dim=axes, keepdim=True)
    if kind == "glora":
        mixed = p["b1"] @ p["b2"] + w @ p["a1"] @ p["a2"]
        return w + float(p["alpha"]) / p["b2"].shape[0] * mixed
    if kind == "ia3":
        return w * (1 + p["weight"])
    if kind == "oft":
        count, size = p["oft_blocks"].shape[:2]
        q = p["oft_blocks"] - p["oft_blocks"].mT
        unit = torch.eye(size, dtype=torch.float64)
        turn = (unit + q) @ torch.linalg.inv(unit - q)
        return torch.einsum("kop,koi->kpi", turn, w.reshape(count, size, -1)).reshape(w.shape)
    return p["set_weight"]


def dependent(kind: str) -> tuple[str, dict[str, Tensor]]:
    """A module and an adapter of it whose change depends on the weight."""
    t = Maker(len(kind))
    if kind.startswith("dora"):
        name = KERNEL if "kernel" in kind else KEY
        out, features, *kernel = MODULES[name]
        magnitude = (1, features) if "inputs" in kind else (out, 1)
        parts = t.lora(out, features, 3, 1.5, kernel)
        if "loha" in kind:
            parts = {".hada_w1_a": t(out, 3), ".hada_w1_b": t(3, features), ".hada_w2_a": t(out, 3),
                     ".hada_w2_b": t(3, features), ".alpha": torch.tensor(1.5)}  # fmt: skip
        parts = {key: 0.1 * tensor if tensor.ndim else tensor for key, tensor in parts.items()}
        return name, parts | {".dora_scale": t(*magnitude, *[1] * len(kernel)).abs() + 0.5}
    kinds = {
        "glora": lambda: {".a1.weight": t(24, 3), ".a2.weight": t(3, 24), ".b1.weight": t(32, 3),
                          ".b2.weight": t(3, 24), ".alpha": torch.tensor(1.5)},
        "ia3": lambda: {".weight": 0.3 * t(1, 24), ".on_input": torch.tensor(True)},
        "oft": lambda: {".oft_blocks": 0.1 * t(4, 8, 8)},
        "set": lambda: {".set_weight": t(32, 24)},
    }  # fmt: skip
    return KEY, kinds[kind]()


DORAS = ("dora", "dora, inputs", "dora, kernel", "dora, kernel, inputs", "dora, loha", "dora, loha, inputs")
DEPENDENT = (*DORAS, "glora", "ia3", "oft", "set")


@pytest.mark.parametrize("kind", DEPENDENT)
@pytest.mark.parametrize("rule", ["5", "energy:0.6", "fro:0.7"])
def test_what_depends_on_the_weight_becomes_a_lora_of_its_true_change(kind: str, rule: str) -> None:
    name, parts = dependent(kind)
    report, after = based(named({name: parts}), rank=rule, verify=True)
    weight = model()[f"{WEIGHTS[name]}.weight"]
    delta = (changed(weight, kind, parts) - weight.double()).flatten(1)
    values = values_of(delta)
    rank = wanted(rule, values)
    row = rows(report)[name]
    optimum = math.sqrt(sum(v * v for v in values[rank:]) / sum(v * v for v in values))
    written = tensors_of(Path("out.safetensors"))
    assert row["rank"] == rank
    assert {k.removeprefix(name) for k in written} <= {".lora_up.weight", ".lora_down.weight", ".alpha"}
    assert (f"{name}.alpha" in written) == (".alpha" in parts)
    assert written[f"{name}.lora_down.weight"].shape == (rank, *MODULES[name][1:])
    assert math.isclose(row["error"], optimum, rel_tol=1e-5, abs_tol=1e-5)
    assert math.isclose(row["delta_norm"], float(delta.norm()), rel_tol=1e-5)
    assert math.isclose(off(delta, after[name]), optimum, rel_tol=1e-5, abs_tol=1e-5)
    # Other hands: the file that was, fused, is the file that is, fused, but for that error.
    fuse("base.safetensors", "lora.safetensors", output="was.safetensors", force=True)
    was = tensors_of(Path("was.safetensors"))[f"{WEIGHTS[name]}.weight"].double()
    assert off(was.flatten(1) - weight.flatten(1), delta) < 1e-4
    assert report.warnings == []
    assert report.account.copied == []


@pytest.mark.parametrize("kind", [kind for kind in DORAS if "kernel" not in kind])
def test_without_a_base_a_magnitude_goes_along_to_the_bit(kind: str) -> None:
    name, parts = dependent(kind)
    report, before, after = resized(named({name: parts}), rank=2, verify=True)
    key = f"{name}.dora_scale"
    assert raw(Path("out.safetensors"))[key] == raw(Path("lora.safetensors"))[key]
    assert report.warnings == ["magnitudes (DoRA) are kept, and the errors are those of ΔW without them"]
    values = values_of(before[name])
    optimum = math.sqrt(sum(v * v for v in values[2:]) / sum(v * v for v in values))
    assert math.isclose(rows(report)[name]["error"], optimum, rel_tol=1e-5)
    assert math.isclose(off(before[name], after[name]), optimum, rel_tol=1e-5)
    assert report.account.copied == [key]


def test_a_magnitude_keeps_one_rank_beside_it() -> None:
    """Without any, it would be no DoRA; with a rule that would drop it, one rank stays."""
    name, parts = dependent("dora")
    tensors = locon() | named({name: {k: t * 1e-4 if "lora_up" in k else t for k, t in parts.items()}})
    del tensors[f"{name}.lora_up.weight"]
    tensors[f"{name}.lora_up.weight"] = parts[".lora_up.weight"] * 1e-4
    report, *_ = resized(tensors, rank="size:12kB")
    assert ranks(report)[name] == 1
    assert Path("out.safetensors").stat().st_size <= 12_000


@pytest.mark.parametrize("kind", ["glora", "ia3", "oft", "set"])
def test_what_depends_on_the_weight_is_kept_without_a_base(kind: str) -> None:
    name, parts = dependent(kind)
    others = {k: t for k, t in locon().items() if not k.startswith(name)}
    tensors = others | named({name: parts})
    source = save(Path("lora.safetensors"), tensors)
    report = resize(source, rank=3, output="out.safetensors")
    before, after = raw(source), raw(Path("out.safetensors"))
    keys = sorted(k for k in tensors if k.startswith(name))
    assert [after[key] for key in keys] == [before[key] for key in keys]
    assert sorted(report.account.copied) == keys
    said = f"kept as stored: {report.account.copied[0]!r}, its family is {kind}, whose change "
    said += "depends on the model's weights"
    count = f"{len(keys)} tensor{'s' if len(keys) > 1 else ''}"
    assert report.warnings == [f"{count} {said}; --base CHECKPOINT makes a LoRA of them"]
    with pytest.raises(MismatchError, match=f"--strict: {count} would be {said}"):
        resize(source, rank=3, strict=True)
    save(source, named({name: parts}))
    with pytest.raises(MismatchError, match="has no module that can be cut to a rank") as refused:
        resize(source, rank=3)
    assert refused.value.hint == "--base CHECKPOINT, the model that it is for, makes a LoRA of it"
    save(Path("base.safetensors"), model())
    report = resize(source, rank=3, base="base.safetensors", strict=True, output="x.safetensors")
    assert ranks(report) == {name: 3}


def test_a_set_norm_is_no_matrix_and_stays_set() -> None:
    """Control LoRAs set the scales of norms: no rank is in a vector."""
    tensors = locon() | {f"{NORM}.set_weight": torch.ones(32), f"{NORM}.set_bias": torch.zeros(32)}
    source = save(Path("lora.safetensors"), tensors)
    save(Path("base.safetensors"), model())
    report = resize(source, rank=3, base="base.safetensors", output="out.safetensors")
    before, after = raw(source), raw(Path("out.safetensors"))
    for key in (f"{NORM}.set_weight", f"{NORM}.set_bias"):
        assert after[key] == before[key]
    assert NORM not in ranks(report)


def test_a_bias_of_a_dora_is_as_strong_as_it_was() -> None:
    """Its strength is alpha / rank, which a LoRA made with the base does not have any more."""
    name, parts = dependent("dora")
    tensors = named({name: parts | {".lora_up.bias": Maker(9)(32)}})
    save(Path("lora.safetensors"), tensors)
    base = model() | {f"{WEIGHTS[name]}.bias": torch.zeros(32)}
    save(Path("base.safetensors"), base)
    resize("lora.safetensors", rank=3, base="base.safetensors", output="out.safetensors")
    biases = []
    for lora in ("lora", "out"):
        fuse("base.safetensors", f"{lora}.safetensors", output=f"{lora}-fused.safetensors")
        biases.append(tensors_of(Path(f"{lora}-fused.safetensors"))[f"{WEIGHTS[name]}.bias"])
    torch.testing.assert_close(*biases)


@pytest.mark.parametrize("rule", ["error:0.2", "size:14kB"])
def test_with_a_base_a_change_weighs_by_how_large_it_is_beside_its_weight(rule: str) -> None:
    tensors = locon({m: MODULES[m] for m in WEIGHTS})
    report, after = based(tensors, rank=rule)
    before = matrices(Path("lora.safetensors"))
    spectra = {m: values_of(d, 12) for m, d in before.items()}
    weights = {m: 1 / float(model()[f"{w}.weight"].double().norm()) ** 2 for m, w in WEIGHTS.items()}
    sides = {m: sum(d.shape) for m, d in before.items()}
    plain, *_ = resized(tensors, rank=rule)
    found, other = ranks(report), ranks(plain)
    assert found != other
    if rule.startswith("error"):
        scaled = {m: [v * weights[m] ** 0.5 for v in values] for m, values in spectra.items()}
        assert found == shared(scaled, sides, 0.2, {})
        assert error_of(spectra, found, weights) <= 0.2 < report.details["error"]
    else:
        assert Path("out.safetensors").stat().st_size <= 14_000
        assert error_of(spectra, found, weights) < error_of(spectra, other, weights)
        assert error_of(spectra, found) > error_of(spectra, other)
    for name, row in rows(report).items():
        assert math.isclose(row["error"], off(before[name], after.get(name)), rel_tol=1e-3, abs_tol=1e-6)


def test_a_base_that_is_none_is_refused() -> None:
    name, parts = dependent("dora")
    source = save(Path("lora.safetensors"), named({name: parts}))
    key = f"{WEIGHTS[name]}.weight"
    cases: dict[str, tuple[dict[str, Tensor], str]] = {
        "a LoRA": (locon(), "--base: base.safetensors is no checkpoint"),
        "lacking": ({k: t for k, t in model().items() if k != key}, f"has no .* which {name!r} changes"),
        "another shape": (model() | {key: torch.ones(32, 48)}, r"does not fit its weight, \[32, 48\]"),
        "scaled": (model() | {key: model()[key].to(torch.float8_e4m3fn), key.replace("weight", "scale_weight"):
                              torch.tensor(2.0)}, "--base: base.safetensors has weights in scaled fp8"),
    }  # fmt: skip
    for base, message in cases.values():
        save(Path("base.safetensors"), base)
        with pytest.raises(MismatchError, match=message):
            resize(source, rank=3, base="base.safetensors", output="out.safetensors")
    assert not Path("out.safetensors").exists()


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.12, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("rank", [12, 30])
def test_a_size_is_reached_from_below_by_less_than_a_rank(seed: int, share: float, rank: int) -> None:
    tensors = locon(seed=seed, rank=rank, dtype=torch.float16)
    whole = save(Path("lora.safetensors"), tensors).stat().st_size
    limit = int(share * whole)
    report, before, _ = resized(tensors, rank=f"size:{limit}", verify=True)
    size = Path("out.safetensors").stat().st_size
    largest = max(2 * sum(d.shape) for d in before.values())
    assert size <= limit
    # A module more is three entries more in the header.
    assert limit - largest - 512 < size or all(r >= min(rank, *before[m].shape) for m, r in ranks(report).items())
    assert report.bytes_written == size


@pytest.mark.parametrize("seed", range(3))
def test_no_one_rank_for_all_loses_less_in_as_many_bytes(seed: int) -> None:
    tensors = locon(seed=seed)
    spectra = {m: values_of(d, 12) for m, d in (resized(tensors, rank=12)[1]).items()}
    for rank in (1, 2, 3, 5, 8, 11):
        uniform, *_ = resized(tensors, rank=rank)
        size = Path("out.safetensors").stat().st_size
        report, *_ = resized(tensors, rank=f"size:{size}")
        assert Path("out.safetensors").stat().st_size <= size
        assert error_of(spectra, ranks(report)) <= error_of(spectra, ranks(uniform)) * (1 + 1e-9)
        assert report.details["error"] <= uniform.details["error"] * (1 + 1e-6)


def test_a_size_beside_what_is_not_cut_counts_it_too() -> None:
    """Magnitudes, norms, embeddings: the file's bytes are all that is in it."""
    name, parts = dependent("dora")
    others = {k: t for k, t in locon().items() if not k.startswith(name)}
    more = {"bundle_emb.cat.string_to_param.*": torch.ones(2, 768), f"{NORM}.w_norm": torch.ones(320)}
    resized_, *_ = resized(others | named({name: parts}), rank="size:20kB")
    assert 19_000 < Path("out.safetensors").stat().st_size <= 20_000
    source = save(Path("lora.safetensors"), others | named({name: parts}) | more)
    report = resize(source, rank="size:20kB", output="more.safetensors")
    assert 19_000 < Path("more.safetensors").stat().st_size <= 20_000
    assert sum(ranks(report).values()) < sum(ranks(resized_).values())


def test_a_size_that_holds_all_is_all_and_one_too_small_is_refused_with_numbers() -> None:
    tensors = locon()
    report, *_ = resized(tensors, rank="size:1MiB")
    assert ranks(report) == dict.fromkeys(MODULES, 12) | {LAST: 4}
    with pytest.raises(UsageError, match=r"^--rank: size:500 leaves no module a rank: there is nothing to write$") as e:
        resize("lora.safetensors", rank="size:500", output="x.safetensors")
    assert e.value.hint == "one rank of the smallest module takes 192 bytes, beside the header"
    assert not Path("x.safetensors").exists()


# ------------------------------------------------------------------------------------------------ the curve


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_the_curve_is_what_the_sizes_then_cost(dtype: str) -> None:
    tensors = locon(dtype=torch.float32)
    source = save(Path("lora.safetensors"), tensors)
    before = matrices(source)
    spectra = {m: values_of(d, 12) for m, d in before.items()}
    report = resize(source, plan=True, dtype=dtype)
    points = report.details["plan"]
    assert [p["rank"] for p in points] == [1, 2, 4, 6, 8, 12]
    for point in points:
        goals = {m: min(point["rank"], len(values)) for m, values in spectra.items()}
        assert math.isclose(point["error"], error_of(spectra, goals), rel_tol=1e-5, abs_tol=1e-7)
        resize(source, rank=point["rank"], dtype=dtype, output="out.safetensors", force=True)
        # The recipe in the header has the rank in words, and is padded to eight bytes.
        assert abs(point["bytes"] - Path("out.safetensors").stat().st_size) <= 16
        done = resize(source, rank=f"size:{point['bytes'] + 16}", dtype=dtype, output="out.safetensors", force=True)
        assert abs(point["shared_bytes"] - Path("out.safetensors").stat().st_size) <= 16
        assert point["shared_ranks"] == [min(ranks(done).values()), max(ranks(done).values())]
        assert math.isclose(point["shared_error"], error_of(spectra, ranks(done)), rel_tol=1e-5, abs_tol=1e-7)
        assert point["shared_error"] <= point["error"]
    assert {p.name for p in Path().iterdir()} == {"lora.safetensors", "out.safetensors"}
    assert (report.output, report.bytes_written) == (None, 0)


def test_a_curve_needs_no_place_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the search for a size look at any file but the output."""
    source = save(tmp_path / "lora.safetensors", locon())
    (tmp_path / "here" / "lora-resized.safetensors").mkdir(parents=True)
    (tmp_path / "here" / "lora-None.safetensors").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert len(resize(source, plan=True).details["plan"]) == 6
    resize(source, rank="size:20kB", output=tmp_path / "out.safetensors")


# ------------------------------------------------------------------------------------------------ how it runs


@pytest.mark.parametrize("rule", ["5", "energy:0.9", "size:30kB"])
def test_bytes_do_not_depend_on_memory_or_threads(rule: str) -> None:
    name, parts = made("loha")
    source = save(Path("lora.safetensors"), locon() | named({f"{name}_x": parts}))
    found = set()
    for memory, threads in ((20 << 20, 1), (64 << 20, 2), (1 << 30, 4), (None, None)):
        resize(source, rank=rule, output="out.safetensors", memory=memory, threads=threads, force=True)
        found.add(Path("out.safetensors").read_bytes())
    assert len(found) == 1


@pytest.mark.parametrize("rule", ["5", "energy:0.9"])
def test_too_little_memory_is_refused_with_a_number(rule: str) -> None:
    source = save(Path("lora.safetensors"), locon())
    with pytest.raises(
        MemoryRefused, match=r"^--memory: 65,536 bytes are too few: '.*' alone takes [0-9,]+$"
    ) as refused:
        resize(source, rank=rule, output="out.safetensors", memory=1 << 16)
    assert refused.value.hint is not None
    enough = int(refused.value.hint.split()[1].removesuffix("MiB")) << 20
    assert not Path("out.safetensors").exists()
    resize(source, rank=rule, output="out.safetensors", memory=enough)
    with pytest.raises(MemoryRefused, match="alone takes"):
        resize(source, plan=True, memory=1 << 16)


@pytest.mark.parametrize("rule", [4, "energy:0.9", "size:20kB"])
def test_progress_never_goes_back(rule: int | str) -> None:
    source = save(Path("lora.safetensors"), locon())
    shown: list[tuple[int, int]] = []
    resize(source, rank=rule, output="x.safetensors", on_progress=lambda done, total: shown.append((done, total)))
    assert len({total for _, total in shown}) == 1
    assert [done for done, _ in shown] == sorted(done for done, _ in shown)
    assert shown[-1][0] == shown[-1][1]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "keep"])
def test_the_dtype_of_factors_is_the_one_asked_for(dtype: str) -> None:
    small = locon({KEY: MODULES[KEY]}, rank=3)
    report, before, after = resized(locon() | small, rank=6, dtype=dtype, verify=True)
    wanted_ = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "keep": torch.float32}[dtype]
    assert {t.dtype for t in tensors_of(Path("out.safetensors")).values() if t.ndim} == {wanted_}
    for name, row in rows(report).items():
        assert math.isclose(row["error"], off(before[name], after[name]), rel_tol=1e-3, abs_tol=1e-7), name
    assert (rows(report)[KEY]["error"] > 0) == (dtype in ("fp16", "bf16"))


def test_factors_of_other_dtypes_are_cut_and_kept_too() -> None:
    """float64 in its own precision; two dtypes in one module; fp8, whose cut factors are fp16."""
    tensors = {k: t.double() if t.ndim else t for k, t in locon({QUERY: (32, 32)}).items()}
    tensors |= {k: t.to(torch.float8_e4m3fn) for k, t in locon({POINT: (32, 32, 1, 1)}).items() if t.ndim}
    tensors |= {k: t.to(torch.float8_e4m3fn) for k, t in locon({WIDE: MODULES[WIDE]}, rank=4).items() if t.ndim}
    for name in (KEY, ENCODER):
        mixed = locon({name: MODULES[name]}, rank=12 if name == KEY else 4)
        mixed[f"{name}.lora_up.weight"] = mixed[f"{name}.lora_up.weight"].half()
        tensors |= mixed
    source = save(Path("lora.safetensors"), tensors)
    report = resize(source, rank=6, output="out.safetensors", verify=True)
    written, first, second = tensors_of(Path("out.safetensors")), raw(source), raw(Path("out.safetensors"))
    assert written[f"{QUERY}.lora_up.weight"].dtype is torch.float64
    assert written[f"{POINT}.lora_up.weight"].dtype is torch.float16
    for key in tensors:
        if key.startswith((WIDE, ENCODER)):
            assert second[key] == first[key]
    before, after = matrices(source), matrices(Path("out.safetensors"))
    for name, row in rows(report).items():
        assert math.isclose(row["error"], off(before[name], after[name]), rel_tol=1e-3, abs_tol=1e-9), name
    values = values_of(before[QUERY])
    optimum = math.sqrt(sum(v * v for v in values[6:]) / sum(v * v for v in values))
    assert math.isclose(off(before[QUERY], after[QUERY]), optimum, rel_tol=1e-9)


# ------------------------------------------------------------------------------------------------ broken modules


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", ["4", "energy:0.9", "99"])
@pytest.mark.parametrize("side", ["up", "down"])
def test_a_module_that_is_not_finite_is_named(value: float, rule: str, side: str) -> None:
    tensors = locon()
    tensors[f"{KERNEL}.lora_{side}.weight"].view(-1)[5] = value
    source = save(Path("lora.safetensors"), tensors)
    with pytest.raises(ValueRefused, match=f"^lora.safetensors: {KERNEL!r} holds NaN or Inf"):
        resize(source, rank=rule, output="out.safetensors")
    assert not Path("out.safetensors").exists()


def test_a_result_that_its_dtype_cannot_hold_is_refused() -> None:
    up, down = product(torch.Generator().manual_seed(1), (32, 32), [3e10, 1e10, 1.0])
    source = save(Path("lora.safetensors"), {f"{QUERY}.lora_up.weight": up, f"{QUERY}.lora_down.weight": down})
    with pytest.raises(ValueRefused, match=QUERY):
        resize(source, rank=2, dtype="fp16", output="out.safetensors")
    assert not Path("out.safetensors").exists()


def test_equal_and_zero_and_cancelling_factors_have_the_ranks_that_they_have() -> None:
    """Of rank 12 by their shapes; some hold nothing, one direction, or two that all but cancel."""
    tensors = locon()
    one = tensors[f"{KEY}.lora_down.weight"][:1]
    tensors[f"{KEY}.lora_down.weight"] = one.expand(12, -1).clone()
    tensors[f"{QUERY}.lora_up.weight"] = torch.zeros(32, 12)
    up, down = (tensors[f"{ENCODER}.lora_{side}.weight"] for side in ("up", "down"))
    tensors[f"{ENCODER}.lora_up.weight"] = torch.cat([up[:, :6], -up[:, :6]], 1)
    tensors[f"{ENCODER}.lora_down.weight"] = torch.cat([down[:6], down[:6] + 1e-3 * down[6:]], 0)
    for rule in ("error:0.001", "energy:0.999999", "ratio:1000000"):
        report, before, after = resized(tensors, rank=rule, verify=True)
        assert ranks(report)[KEY] == 1
        assert ranks(report)[QUERY] == 0
        if rule != "error:0.001":
            assert ranks(report)[ENCODER] == min(wanted(rule, values_of(before[ENCODER])), 6)
        assert off(before[KEY], after[KEY]) < 1e-5
    report, before, after = resized(tensors, rank=4, verify=True)
    assert ranks(report)[QUERY] == 4
    assert not after[QUERY].any()
    assert rows(report)[QUERY]["error"] == 0


# ------------------------------------------------------------------------------------------------ packed weights


def magnified(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """LoRAs as DoRAs, whose magnitudes are of outputs."""
    sizes = {k.partition(".")[0]: len(t) for k, t in tensors.items() if "lora_up" in k}
    return tensors | {
        f"{name}.dora_scale": 0.5 + torch.rand(size, 1, generator=torch.Generator().manual_seed(size))
        for name, size in sizes.items()
    }


@needs_lists
@pytest.mark.parametrize("spelling", ["original", "diffusers"])
def test_a_packed_weight_is_found_in_every_spelling_of_the_base(spelling: str) -> None:
    """kohya's names of Flux over BFL's modules: q, k and v as one, halves of a modulation the other way round."""
    base = weights(tiny(FLUX), torch.float32)
    if spelling == "diffusers":
        base = from_canonical("flux_transformer", "diffusers", to_canonical("flux_transformer", "original", base))
    save(Path("base.safetensors"), base)
    source = save(Path("lora.safetensors"), magnified(flux_lora(PACKED)))
    report = resize(source, rank=999, base="base.safetensors", output="out.safetensors", verify=True)
    assert report.details["error"] < 1e-5
    for name in ("lora", "out"):
        fuse("base.safetensors", f"{name}.safetensors", output=f"{name}-fused.safetensors")
    first, second = (tensors_of(Path(f"{name}-fused.safetensors")) for name in ("lora", "out"))
    moved = 0
    for key, tensor in base.items():
        delta = first[key].double() - tensor.double()
        moved += bool(delta.any())
        assert off(delta.flatten(), (second[key].double() - tensor.double()).flatten()) < 1e-4, key
    assert moved >= len(PACKED)


def test_a_plan_with_a_base_weighs_as_the_sizes_do() -> None:
    save(Path("base.safetensors"), model())
    source = save(Path("lora.safetensors"), locon({m: MODULES[m] for m in WEIGHTS}))
    spectra = {m: values_of(d, 12) for m, d in matrices(source).items()}
    norms = {m: 1 / float(model()[f"{w}.weight"].double().norm()) ** 2 for m, w in WEIGHTS.items()}
    for point in resize(source, plan=True, base="base.safetensors").details["plan"]:
        goals = {m: min(point["rank"], len(values)) for m, values in spectra.items()}
        assert math.isclose(point["error"], error_of(spectra, goals, norms), rel_tol=1e-5, abs_tol=1e-7)
        assert point["shared_error"] <= point["error"]


@pytest.mark.parametrize("rule", ["5", "energy:0.9"])
def test_modules_that_are_done_together_are_each_its_own(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device, where those of one shape go at once: the same factors, alphas and report."""
    alike = {f"{BLOCK}_transformer_blocks_0_attn1_to_{part}": (32, 32) for part in ("q", "k", "v", "out_0")}
    tensors = locon(MODULES | alike) | {f"{QUERY}.alpha": torch.tensor(-1.0)}
    tensors |= named({f"{BLOCK}_transformer_blocks_0_attn2_to_q": made("loha")[1]})
    report, *_ = resized(tensors, rank=rule)
    alone = raw(Path("out.safetensors"))
    monkeypatch.setattr("weightops.ops.cutting.is_cuda", lambda device: True)
    groups = []
    build = factor_plan.build

    def watched(*arguments: Any, **words: Any) -> Any:
        built = build(*arguments, **words)
        groups.append(max(map(len, built.groups)))
        return built

    monkeypatch.setattr("weightops.ops.cutting.build", watched)
    together, *_ = resized(tensors, rank=rule, verify=True)
    assert raw(Path("out.safetensors")) == alone
    assert together.details["modules"] == report.details["modules"]
    assert groups[-1] > 1 or rule != "5"


@pytest.mark.parametrize("rule", ["energy:1", 32])
def test_a_bias_beside_a_magnitude_can_be_read_back(rule: int | str) -> None:
    """At all ranks it stays a LoRA: a whole difference would have no place beside the bias."""
    name, parts = dependent("dora")
    given = {**parts, ".lora_up.bias": torch.ones(len(parts[".lora_up.weight"]))}
    report, _ = based(named({name: given}), rank=rule, verify=True)
    assert report.verified["modules"] == 1
    kept = {key.removeprefix(name) for key in tensors_of(Path("out.safetensors"))}
    assert kept - {".alpha"} == {".lora_down.weight", ".lora_up.bias", ".lora_up.weight"}


def test_what_changes_an_empty_weight_is_not_dropped() -> None:
    """It weighs as if its weight were the smallest of the others."""
    tensors = locon({m: MODULES[m] for m in WEIGHTS})
    save(Path("lora.safetensors"), tensors)
    name, weight = next(iter(WEIGHTS.items()))
    empty = model()
    empty[f"{weight}.weight"] = torch.zeros_like(empty[f"{weight}.weight"])
    save(Path("base.safetensors"), empty)
    report = resize("lora.safetensors", rank="error:0.1", base="base.safetensors", output="out.safetensors")
    assert rows(report)[name]["error"] < 0.2
    assert 0.05 < report.details["weighted_error"] <= 0.1
    assert sum(1 for row in rows(report).values() if row["rank"]) > 1


def test_nothing_is_lost_of_nothing() -> None:
    """An alpha of 0 is a strength of 0: the file is right, whatever its factors would be."""
    tensors = locon({QUERY: MODULES[QUERY], KEY: MODULES[KEY]}, rank=6, alpha=3.0)
    tensors[f"{KEY}.alpha"] = torch.tensor(0.0)
    report = resize(save(Path("lora.safetensors"), tensors), rank=2, output="out.safetensors", verify=True)
    assert (rows(report)[KEY]["delta_norm"], rows(report)[KEY]["energy"], rows(report)[KEY]["error"]) == (0, 1, 0)


def test_the_seed_is_told_where_it_decides() -> None:
    resize(save(Path("lora.safetensors"), locon(rank=4)), rank=2, seed=7, output="out.safetensors")
    assert "seed" not in json.loads(metadata_of(Path("out.safetensors"))["weightops"])
    tensors = {f"{QUERY}.diff": Maker(1)(*MODULES[QUERY])}
    resize(save(Path("whole.safetensors"), tensors), rank=2, seed=7, output="other.safetensors")
    assert json.loads(metadata_of(Path("other.safetensors"))["weightops"])["seed"] == 7
