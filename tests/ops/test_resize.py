"""resize: every module at the best approximation that its rank allows, at its own strength, by every rule."""

from __future__ import annotations

import math
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
from loras import Maker, deltas, named, raw, save, tensors_of
from torch import Tensor

from weightops.errors import MemoryRefused, MismatchError, UsageError, ValueRefused
from weightops.ops.fuse import fuse
from weightops.ops.resize import resize

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


def shared(spectra: dict[str, list[float]], sides: dict[str, int], limit: float, caps: dict[str, int]) -> dict[str, int]:
    """The ranks of error:E, from sorting: what tells most per byte comes first, until what is left is little enough."""
    order = sorted(
        ((-v * v / sides[m], m) for m, values in spectra.items() for v in values[: caps.get(m)]), key=lambda pair: pair[0]
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
    assert {m: row["method"] for m, row in rows(report).items() if row["method"] == "kept"} == {KEY: "kept", KERNEL: "kept"}
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


def test_a_kernel_that_was_factorised_flat_gets_its_axes_from_the_model() -> None:
    """Real LoKr files have conv1 of SD1.5 as [320, 2880]; the LoRA that is made of it has 3 × 3 windows."""
    t = Maker(1)
    parts = {".lokr_w1": t(16, 16), ".lokr_w2_a": t(20, 1), ".lokr_w2_b": t(1, 180)}
    tensors = named({KERNEL: parts}) | locon({POINT: (320, 320, 1, 1)})
    report, before, after = resized(tensors, rank=3)
    written = tensors_of(Path("out.safetensors"))
    assert written[f"{KERNEL}.lora_down.weight"].shape == (3, 320, 3, 3)
    assert written[f"{KERNEL}.lora_up.weight"].shape == (320, 3, 1, 1)
    values = values_of(before[KERNEL])
    optimum = math.sqrt(sum(v * v for v in values[3:]) / sum(v * v for v in values))
    assert math.isclose(off(before[KERNEL], after[KERNEL]), optimum, rel_tol=1e-5)
    assert math.isclose(rows(report)[KERNEL]["error"], optimum, rel_tol=1e-5)


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
        found = functional.locon.diff_weight(p["lora_up"], p["lora_down"], p["lora_mid"], gamma=scale)
    elif kind.startswith("loha"):
        keys = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a", "hada_t1", "hada_t2")
        found = functional.loha.diff_weight(*(p.get(key) for key in keys), gamma=1.5 / len(p["hada_w1_b"]))
    else:
        keys = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
        factor = p.get("lokr_w2_b", p.get("lokr_w1_b"))
        scale = 1.0 if factor is None else 1.5 / len(factor)
        found = functional.lokr.diff_weight(*(p.get(key) for key in keys), gamma=scale)
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
    ENCODER: "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj",
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
        return v * p["dora_scale"] / v.norm(dim=axes, keepdim=True)
    if kind == "glora":
        mixed = p["b1"] @ p["b2"] + w @ p["a1"] @ p["a2"]
        return w + float(p["alpha"]) / p["b2"].shape[0] * mixed
    if kind == "ia3":
        return w * (1 + p["weight"]) if bool(p["on_input"]) else w * (1 + p["weight"])
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
@pytest.mark.parametrize("rule", ["5", "energy:0.9", "fro:0.7"])
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
