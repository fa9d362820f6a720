"""combine: Σ w·ΔW, as it is computed densely in float64 by other hands: exactly, or at the best that a rank allows."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from combining import OUT, ROUNDING, accounted, combined, matrices, optimum, rows, sizes, weighted
from locon import BLOCK, ENCODER, KERNEL, KEY, MODULES, POINT, QUERY, locon, off, values_of
from loras import Maker, deltas, header, metadata_of, named, raw, save, tensors_of
from torch import Tensor

from weightops.errors import (
    FormatError,
    MemoryRefused,
    MismatchError,
    OutputError,
    UsageError,
    ValueRefused,
    WeightopsError,
)
from weightops.ops.combine import combine

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------------------ files


def family(kind: str, t: Maker, shape: tuple[int, ...], rank: int) -> dict[str, Tensor]:
    """An adapter of a family, of values that are about as large in all of them."""
    (out, features, *k), r = shape, rank
    ones = (1,) * len(k)
    parts: dict[str, Tensor] = {
        "lora": lambda: {".lora_up.weight": t(out, r, *ones), ".lora_down.weight": t(r, features, *k)},
        "lora, tucker": lambda: {".lora_up.weight": t(out, r, *ones), ".lora_down.weight": t(r + 1, features, *ones),
                                 ".lora_mid.weight": t(r, r + 1, *k)},
        "loha": lambda: {".hada_w1_a": t(out, r), ".hada_w1_b": t(r, math.prod(shape[1:])), ".hada_w2_a": t(out, r),
                         ".hada_w2_b": t(r, math.prod(shape[1:]))},
        "loha, tucker": lambda: {".hada_w1_a": t(r, out), ".hada_w1_b": t(r, features), ".hada_t1": t(r, r, *k),
                                 ".hada_w2_a": t(r, out), ".hada_w2_b": t(r, features), ".hada_t2": t(r, r, *k)},
        "lokr": lambda: {".lokr_w1": t(4, 4), ".lokr_w2": t(out // 4, features // 4, *k)},
        "lokr, second": lambda: {".lokr_w1": t(4, 4), ".lokr_w2_a": t(out // 4, r),
                                 ".lokr_w2_b": t(r, features // 4, *k)},
        "lokr, first": lambda: {".lokr_w1_a": t(4, 2), ".lokr_w1_b": t(2, 4),
                                ".lokr_w2": t(out // 4, features // 4, *k)},
        "lokr, both": lambda: {".lokr_w1_a": t(4, 2), ".lokr_w1_b": t(2, 4), ".lokr_w2_a": t(out // 4, r),
                               ".lokr_w2_b": t(r, features // 4, *k)},
        "lokr, tucker": lambda: {".lokr_w1": t(4, 4), ".lokr_w2_a": t(r, out // 4), ".lokr_w2_b": t(r, features // 4),
                                 ".lokr_t2": t(r, r, *k)},
        "full": lambda: {".diff": t(*shape)},
    }[kind]()  # fmt: skip
    return parts


OF_MATRICES = ("lora", "loha", "lokr", "lokr, second", "lokr, first", "lokr, both", "full")
OF_KERNELS = ("lora", "lora, tucker", "loha, tucker", "lokr", "lokr, second", "lokr, first", "lokr, tucker", "full")


def kind_of(name: str, number: int) -> str:
    kinds = OF_KERNELS if name == KERNEL else OF_MATRICES
    return kinds[number % len(kinds)]


SHAPES = {name: MODULES[name] for name in (QUERY, KEY, POINT, KERNEL, ENCODER)}
STRENGTHS = (0.7, -0.45, 1.3, 1.0, -2.0, 0.25, 0.5, 0.9, -0.1, 0.33)


def file_of(number: int, kinds: dict[str, str], dtype: torch.dtype, alpha: float | None = None) -> Path:
    """A file that changes these modules, each as a family does; ranks and alphas differ from file to file."""
    maker = Maker(100 + number)
    modules = {}
    for name, kind in kinds.items():
        parts = family(kind, maker, SHAPES[name], 2 + number % 3)
        if kind != "full":
            parts[".alpha"] = torch.tensor(0.5 + number if alpha is None else alpha)
        modules[name] = {ending: tensor.to(dtype) for ending, tensor in parts.items()}
    return save(Path(f"{number}.safetensors"), named(modules))


def assert_sum(report: Any, *loras: tuple[Path, float], tolerance: float) -> None:
    """What is written is the sum, and what the report says of its error is true."""
    expected, size, found = weighted(*loras), sizes(*loras), matrices()
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert float((found[name] - delta).norm()) <= tolerance * size[name], name
        row = rows(report)[name]
        assert math.isclose(row["delta_norm"], float(delta.norm()), rel_tol=1e-5), name
        assert math.isclose(row["error"], off(delta, found[name]), rel_tol=0.02, abs_tol=1e-6), name


# ------------------------------------------------------------------------------------------------ exactly the sum


@every_dtype
@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_exact_sum_is_that_of_dense_matrices(count: int, dtype: torch.dtype) -> None:
    """Of LoRAs of several ranks: their factors side by side, rounded to the dtype, whatever the sign of a strength."""
    files = [file_of(n, dict.fromkeys(SHAPES, "lora"), dtype) for n in range(count)]
    loras = list(zip(files, STRENGTHS, strict=False))
    report = combined(*loras, exact=True)
    assert_sum(report, *loras, tolerance=ROUNDING[dtype])
    written = tensors_of(OUT)
    assert {t.dtype for key, t in written.items() if not key.endswith(".alpha")} == {dtype}
    for name, shape in SHAPES.items():
        rank = min(sum(2 + n % 3 for n in range(count)), shape[0], math.prod(shape[1:]))
        assert written[f"{name}.lora_down.weight"].shape == (rank, *shape[1:])
        assert written[f"{name}.lora_up.weight"].shape == (shape[0], rank, *[1] * len(shape[2:]))
        assert float(written[f"{name}.alpha"]) == rank == rows(report)[name]["rank"]
    accounted(report, *files)


@every_dtype
@pytest.mark.parametrize("turn", range(8))
def test_the_exact_sum_of_any_two_families_is_that_of_dense_matrices(turn: int, dtype: torch.dtype) -> None:
    """Each family stands beside each: with whole differences the sum is one, else a product."""
    files = []
    for number in range(2):
        kinds = {
            name: kind_of(name, place + (1 + turn) * number) for place, name in enumerate(SHAPES, turn)
        }  # fmt: skip
        files.append(file_of(number, kinds, dtype))
    loras = list(zip(files, STRENGTHS, strict=False))
    report = combined(*loras, exact=True)
    assert_sum(report, *loras, tolerance=ROUNDING[dtype])
    accounted(report, *files)


def test_ten_files_of_all_families_are_added_exactly() -> None:
    files = [
        file_of(n, {name: kind_of(name, n + place) for place, name in enumerate(SHAPES)}, torch.float32)
        for n in range(10)
    ]
    loras = list(zip(files, STRENGTHS, strict=True))
    report = combined(*loras, exact=True)
    assert_sum(report, *loras, tolerance=ROUNDING[torch.float32])
    assert {key.rpartition(".")[2] for key in raw(OUT)} == {"diff"}  # of ten, one is always whole
    accounted(report, *files)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_another_dtype_is_rounded_to_once(dtype: torch.dtype) -> None:
    files = [file_of(n, dict.fromkeys(SHAPES, "lora"), dtype) for n in range(2)]
    loras = list(zip(files, STRENGTHS, strict=False))
    report = combined(*loras, exact=True, dtype="fp32")
    assert_sum(report, *loras, tolerance=ROUNDING[torch.float32])
    report = combined(files[0], file_of(5, dict.fromkeys(SHAPES, "lora"), torch.float32), exact=True)
    assert {t.dtype for key, t in tensors_of(OUT).items() if not key.endswith(".alpha")} == {dtype}  # the first's


@pytest.mark.parametrize("strength", [1.0, -1.0, 0.0, 1e-4, 300.0])
def test_any_strength_of_any_sign_is_exact(strength: float) -> None:
    """A strength that is small in half precision is shared out to both factors."""
    files = [file_of(n, dict.fromkeys(SHAPES, "lora"), torch.float16) for n in range(2)]
    loras = [(files[0], 0.0), (files[1], strength)]
    report = combined(*loras, exact=True)
    assert_sum(report, *loras, tolerance=ROUNDING[torch.float16])


@every_dtype
def test_what_nearly_cancels_has_an_error_that_is_told(dtype: torch.dtype) -> None:
    """Roundings are small beside the terms, and large beside what is left of them: verified all the same."""
    a = file_of(0, dict.fromkeys(SHAPES, "lora"), dtype)
    loras = ((a, 1.0), (a, -0.999))
    expected, size = weighted(*loras), sizes(*loras)
    for words in ({"exact": True}, {"rank": 2}):
        report = combined(*loras, **words)
        for name, delta in matrices().items():
            told = rows(report)[name]["error"]
            assert math.isclose(told, off(expected[name], delta), rel_tol=0.02, abs_tol=1e-3), name
            assert "rank" in words or told <= ROUNDING[dtype] * size[name] / float(expected[name].norm())


def test_more_ranks_than_half_precision_counts_are_said_exactly() -> None:
    """bfloat16 has no 257: alpha is written wider."""
    shape = (288, 288)
    tensors = [locon({QUERY: shape}, rank=rank, alpha=None, seed=rank, dtype=torch.bfloat16) for rank in (128, 129)]
    files = [save(Path(f"{n}.safetensors"), found) for n, found in enumerate(tensors)]
    combined(*files, exact=True)
    assert float(tensors_of(OUT)[f"{QUERY}.alpha"]) == 257


# ------------------------------------------------------------------------------------------------ dialects

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
ATTENTION_IN_LDM = "input_blocks.1.1.transformer_blocks.0.attn2"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
# What the test calls a module -> its shape, and its component and name in diffusers and in the original.
PLACES: dict[str, tuple[tuple[int, ...], str, str, str]] = {
    "to_q": ((16, 16), "unet", f"{ATTENTION}.to_q", f"{ATTENTION_IN_LDM}.to_q"),
    "to_k": ((16, 24), "unet", f"{ATTENTION}.to_k", f"{ATTENTION_IN_LDM}.to_k"),
    "to_out.0": ((16, 16), "unet", f"{ATTENTION}.to_out.0", f"{ATTENTION_IN_LDM}.to_out.0"),
    "conv": ((16, 8, 3, 3), "unet", "down_blocks.0.resnets.0.conv1", "input_blocks.1.0.in_layers.2"),
    "text": ((12, 12), "text_encoder", TEXT, TEXT),
}
UP_DOWN = {"kohya": (".lora_up.weight", ".lora_down.weight"), "peft": (".lora_B.weight", ".lora_A.weight")}


def spelled(scheme: str, place: str) -> tuple[str, str, str]:
    """The name of a module in a scheme, and the endings of up and down."""
    _, component, name, original = PLACES[place]
    is_text = component == "text_encoder"
    if scheme in ("kohya", "onetrainer", "lycoris"):
        beginning = "lycoris" if scheme == "lycoris" else "lora_te" if is_text else "lora_unet"
        return (f"{beginning}_{name.replace('.', '_')}", *UP_DOWN["kohya"])
    if scheme == "kohya, LDM":
        return (f"lora_{'te' if is_text else 'unet'}_{original.replace('.', '_')}", *UP_DOWN["kohya"])
    if scheme == "comfy":
        beginning = "text_encoders.clip_l.transformer" if is_text else "diffusion_model"
        return (f"{beginning}.{original}", *UP_DOWN["peft"])
    if scheme == "diffusers":
        return (f"{component}.{name}", *UP_DOWN["peft"])
    if scheme == "peft":
        return (f"{component}/base_model.model.{name}", *UP_DOWN["peft"])
    assert scheme == "processor", scheme  # diffusers to 0.24
    stem, _, last = name.rpartition(".attn2.")
    return f"{component}.{stem}.attn2.processor.{last.removesuffix('.0')}_lora", ".up.weight", ".down.weight"


HELD = {
    "kohya": tuple(PLACES),
    "kohya, LDM": tuple(PLACES),
    "onetrainer": tuple(PLACES),
    "lycoris": tuple(place for place in PLACES if place != "text"),
    "comfy": tuple(PLACES),
    "diffusers": tuple(PLACES),
    "peft": tuple(PLACES),
    "processor": ("to_q", "to_k", "to_out.0"),
}  # fmt: skip


def in_scheme(scheme: str, seed: int) -> tuple[Path, dict[str, Tensor]]:
    """A file, or a folder, of this scheme; and ΔW of its modules, whose strength stands where the scheme has it."""
    maker, rank, alpha = Maker(seed), 2 + seed % 3, 0.75 * (1 + seed)
    tensors: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for place in HELD[scheme]:
        out, features, *kernel = PLACES[place][0]
        up, down = maker(out, rank, *[1] * len(kernel)), maker(rank, features, *kernel)
        stem, up_ends, down_ends = spelled(scheme, place)
        tensors |= {stem + up_ends: up, stem + down_ends: down}
        if scheme.startswith(("kohya", "onetrainer", "lycoris")):
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        scale = {"comfy": 1.0, "processor": 1.0, "peft": alpha / math.sqrt(rank)}.get(scheme, alpha / rank)
        changes[place] = scale * up.double().flatten(1) @ down.double().flatten(1)
    path = Path(f"{scheme}.safetensors")
    if scheme == "diffusers":
        told = {f"{c}.{k}": v for c in ("unet", "text_encoder") for k, v in
                {"r": rank, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}}.items()}  # fmt: skip
        return save(path, tensors, {"lora_adapter_metadata": json.dumps(told)}), changes
    if scheme != "peft":
        return save(path, tensors), changes
    for component in ("unet", "text_encoder"):
        mine = {k.partition("/")[2]: t for k, t in tensors.items() if k.startswith(component + "/")}
        save(Path("peft", component, "adapter_model.safetensors"), mine)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": True, "rank_pattern": {},
                  "alpha_pattern": {}, "target_modules": ["to_q"]}  # fmt: skip
        Path("peft", component, "adapter_config.json").write_text(json.dumps(config))
    return Path("peft"), changes


@pytest.mark.parametrize("to", ["kohya", "onetrainer", "comfy", "diffusers", "peft"])
def test_files_of_all_dialects_add_up_in_each(to: str) -> None:
    """With their strengths, from wherever these stand: alphas, a header, a folder's settings, nowhere."""
    made = [in_scheme(scheme, seed) for seed, scheme in enumerate(HELD)]
    loras = [(path, STRENGTHS[n]) for n, (path, _) in enumerate(made)]
    expected: dict[str, Tensor] = {}
    for (_, strength), (_, changes) in zip(loras, made, strict=True):
        for place, change in changes.items():
            expected[place] = expected.get(place, 0.0) + strength * change
    out = Path("out") if to == "peft" else OUT
    report = combined(*loras, exact=True, dialect=to, architecture="sd15", output=out)
    found = matrices(out)
    assert set(found) == {spelled(to, place)[0] for place in PLACES}
    for place, delta in expected.items():
        assert off(delta, found[spelled(to, place)[0]]) < 1e-6, place
    accounted(report, *(path for path, _ in made))
    if to == "diffusers":  # alpha is the rank, so that there is nothing to say
        assert "lora_adapter_metadata" not in metadata_of(OUT)


@pytest.mark.parametrize(("first", "to"), [("processor", "diffusers"), ("lycoris", "kohya"), ("comfy", "comfy"),
                                           ("peft", "peft"), ("diffusers", "diffusers")])  # fmt: skip
def test_the_first_file_gives_the_dialect(first: str, to: str) -> None:
    a, _ = in_scheme(first, 0)
    b, _ = in_scheme("kohya", 1)
    out = Path("out") if to == "peft" else OUT
    combined(a, b, output=out, architecture="sd15")
    assert set(deltas(out)) == {spelled(to, place)[0] for place in PLACES}


# ------------------------------------------------------------------------------------------------ ranks


def three(dtype: torch.dtype = torch.float32, **words: Any) -> list[tuple[Path, float]]:
    """LoRAs of three ranks whose spectra fall; the second lacks a module, and the third has few."""
    given = [
        locon(rank=12, alpha=6.0, seed=1, dtype=dtype, **words),
        locon({k: v for k, v in MODULES.items() if k != KEY}, rank=5, alpha=10.0, seed=2, dtype=dtype),
        locon({k: MODULES[k] for k in (QUERY, KERNEL)}, rank=8, alpha=None, seed=3, dtype=dtype),
    ]
    files = [save(Path(f"{name}.safetensors"), tensors) for name, tensors in zip("abc", given, strict=True)]
    return list(zip(files, STRENGTHS, strict=False))


def wanted(rule: str, values: list[float]) -> int:
    """The rank that a rule gives one matrix, by the rule's definition over its singular values."""
    kind, _, setting = rule.partition(":")
    squares = [v * v for v in values]
    if kind == "energy":
        return next(r for r in range(1, 1 + len(values)) if sum(squares[:r]) >= float(setting) * sum(squares))
    if kind == "ratio":
        return sum(v > values[0] / float(setting) for v in values)
    return min(int(kind), len(values))


@every_dtype
@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("4", {}), ("20", {}), ("6", {"conv_rank": 2}), ("energy:0.9", {}), ("energy:0.99", {"max_rank": 6}),
        ("energy:0.9", {"conv_rank": "3"}), ("ratio:5", {"max_conv_rank": 2}),
    ],
    ids=str,
)  # fmt: skip
def test_each_module_is_the_optimum_of_its_rank(rule: str, words: dict[str, Any], dtype: torch.dtype) -> None:
    """Against the SVD of the dense sum, in float64: the rule's rank, and the error that no other has less of."""
    loras = three(dtype)
    report = combined(*loras, rank=rule, **words, dtype="fp32")
    expected, size, found = weighted(*loras), sizes(*loras), matrices()
    ranks = {"a": 12, "b": 5, "c": 8}
    for name, delta in expected.items():
        most = sum(r for file, r in ranks.items() if name in deltas(Path(f"{file}.safetensors")))
        values = values_of(delta, most)
        is_convolution = math.prod(MODULES[name][2:]) > 1
        own = str(words.get("conv_rank", rule)) if is_convolution else rule
        cap = words.get("max_conv_rank", words.get("max_rank", 99)) if is_convolution else words.get("max_rank", 99)
        rank = min(wanted(own, values), cap)
        row = rows(report)[name]
        assert row["rank"] == rank, name
        least = optimum(values, rank)
        assert math.isclose(row["error"], least, rel_tol=1e-5, abs_tol=1e-6 * size[name] / float(delta.norm())), name
        assert math.isclose(off(delta, found[name]), least, rel_tol=1e-5, abs_tol=1e-6), name
        assert math.isclose(row["energy"], 1 - least**2, rel_tol=1e-5), name
        assert float(tensors_of(OUT)[f"{name}.alpha"]) == rank
    lost = sum(float((found[m] - delta).norm()) ** 2 for m, delta in expected.items())
    whole = sum(float(delta.norm()) ** 2 for delta in expected.values())
    assert math.isclose(report.details["error"], math.sqrt(lost / whole), rel_tol=1e-4, abs_tol=1e-6)


@every_dtype
def test_by_default_a_module_has_the_largest_rank_that_comes_in(dtype: torch.dtype) -> None:
    loras = three(dtype)
    report = combined(*loras, dtype="fp32")
    expected, found = weighted(*loras), matrices()
    for name, delta in expected.items():
        row = rows(report)[name]
        assert row["rank"] == row["rank_before"] == min(12, *delta.shape), name
        assert math.isclose(off(delta, found[name]), optimum(values_of(delta), row["rank"]), rel_tol=1e-5, abs_tol=1e-6)
        assert tensors_of(OUT)[f"{name}.alpha"] == row["rank"]
    few = [(loras[2][0], 1.0), (loras[1][0], 1.0)]
    assert {m: row["rank"] for m, row in rows(combined(*few)).items()} == {
        m: {QUERY: 8, KERNEL: 8}.get(m, min(5, *delta.shape)) for m, delta in weighted(*few).items()
    }


def test_a_rule_of_the_whole_file_shares_ranks_out() -> None:
    loras = three()
    for limit in (0.05, 0.2):
        report = combined(*loras, rank=f"error:{limit}")
        assert 0.8 * limit < report.details["error"] <= limit
    report = combined(*loras, rank="size:20kB")
    assert 19_000 < report.bytes_written == OUT.stat().st_size <= 20_000


def test_ranks_that_cancel_are_dropped_and_said() -> None:
    """A module of which nothing is left has no rank, where data decide; where a number was asked for it has zeros."""
    a = save(Path("a.safetensors"), locon())
    opposite = {k: -t if k.startswith(KEY) and "lora_up" in k else t for k, t in locon().items()}
    b = save(Path("b.safetensors"), opposite)
    report = combined(a, b, rank="energy:0.9")
    assert KEY not in deltas(OUT)
    assert rows(report)[KEY]["rank"] == 0
    assert report.warnings == [f"1 module of rank 0: dropped, {KEY!r} the first"]
    assert Counter(u.reason for u in report.account.unused) == {"rank 0: its module is dropped": 6}
    accounted(report, a, b)
    report = combined(a, b, rank=3)
    assert float(deltas(OUT)[KEY].norm()) < 1e-6
    accounted(report, a, b)


def test_what_comes_in_without_a_rank_needs_one() -> None:
    files = [file_of(n, {QUERY: kind}, torch.float32) for n, kind in enumerate(("lora", "full"))]
    with pytest.raises(UsageError) as caught:
        combined(*files)
    assert str(caught.value) == f"--rank: found none, and 1 module come in without a rank: {QUERY!r}"
    assert not OUT.exists()
    report = combined(*files, rank=3)
    delta = weighted(*((file, 1.0) for file in files))[QUERY]
    assert math.isclose(off(delta, matrices()[QUERY]), optimum(values_of(delta), 3), rel_tol=1e-5)
    assert math.isclose(rows(report)[QUERY]["error"], optimum(values_of(delta), 3), rel_tol=1e-5)
    report = combined(*files, rank=31)  # the difference itself is smaller
    assert list(raw(OUT)) == [f"{QUERY}.diff"]


# ------------------------------------------------------------------------------------------------ with a base

WEIGHTS = {
    QUERY: "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    KEY: "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k",
    KERNEL: "model.diffusion_model.input_blocks.1.0.in_layers.2",
}


def model() -> dict[str, Tensor]:
    maker = Maker(11)
    found = {f"{WEIGHTS[m]}.weight": 0.3 * maker(*MODULES[m]) for m in WEIGHTS}
    found["model.diffusion_model.input_blocks.0.0.weight"] = maker(32, 4, 3, 3)
    found["model.diffusion_model.input_blocks.1.1.proj_in.weight"] = maker(32, 32, 1, 1)
    return found | {"model.diffusion_model.input_blocks.10.0.in_layers.2.weight": maker(32, 32, 3, 3)}


def dora(weight: Tensor, parts: dict[str, Tensor], alpha: float) -> Tensor:
    """W' by the paper, of a magnitude for each output or each input."""
    up, down, magnitude = (parts[k].double() for k in (".lora_up.weight", ".lora_down.weight", ".dora_scale"))
    v = weight + alpha / len(down) * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    axes = [a for a in range(v.ndim) if a != (1 if magnitude.shape[0] == 1 else 0)]
    return v * magnitude / v.square().sum(axes, keepdim=True).sqrt()


def oft(weight: Tensor, blocks: Tensor) -> Tensor:
    """W' with its rows turned by the Cayley transform of each block."""
    count, size = blocks.shape[:2]
    q = blocks.double() - blocks.double().mT
    unit = torch.eye(size, dtype=torch.float64)
    turn = (unit + q) @ torch.linalg.inv(unit - q)
    return torch.einsum("kop,koi->kpi", turn, weight.reshape(count, size, -1)).reshape(weight.shape)


def test_what_depends_on_the_weights_takes_part_with_a_base() -> None:
    """DoRA of either axis and OFT, at strengths, beside plain LoRAs and each other: W + w(W' − W)."""
    t, base = Maker(3), save(Path("base.safetensors"), model())
    w = {m: model()[f"{WEIGHTS[m]}.weight"].double() for m in WEIGHTS}
    scaled = {
        QUERY: t.lora(32, 32, 3, 2.0) | {".dora_scale": t(32, 1).abs() + 0.5},
        KEY: t.lora(32, 24, 3, 2.0) | {".dora_scale": t(1, 24).abs() + 0.5},
        KERNEL: t.lora(32, 16, 3, 2.0, (3, 3)) | {".dora_scale": t(32, 1, 1, 1).abs() + 0.5},
    }
    blocks = {QUERY: 0.1 * t(4, 8, 8), KEY: 0.1 * t(8, 4, 4)}
    a = save(Path("a.safetensors"), named(scaled))
    b = save(Path("b.safetensors"), named({m: {".oft_blocks": found} for m, found in blocks.items()}))
    c = save(Path("c.safetensors"), locon({m: MODULES[m] for m in WEIGHTS}, rank=4))
    report = combined((a, 0.6), (b, -0.7), c, exact=True, base=base)
    plain = deltas(c)
    for name, weight in w.items():
        expected = 0.6 * (dora(weight, scaled[name], 2.0) - weight) + plain[name]
        if name in blocks:
            expected = expected - 0.7 * (oft(weight, blocks[name]) - weight)
        assert off(expected.flatten(1), matrices()[name]) < 1e-6, name
        assert rows(report)[name]["error"] < 1e-6
    accounted(report, a, b, c)
    report = combined((a, 0.6), c, rank=5, base=base)
    for name, weight in w.items():
        expected = 0.6 * (dora(weight, scaled[name], 2.0) - weight) + plain[name]
        least = optimum(values_of(expected.flatten(1)), 5)
        assert math.isclose(off(expected.flatten(1), matrices()[name]), least, rel_tol=1e-5), name
        assert math.isclose(rows(report)[name]["error"], least, rel_tol=1e-5), name


def test_magnitudes_in_pefts_shape_are_those_of_outputs() -> None:
    t, base = Maker(4), save(Path("base.safetensors"), model())
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    parts = t.lora(32, 32, 3)
    tensors = {f"{name}.lora_A.weight": parts[".lora_down.weight"], f"{name}.lora_B.weight": parts[".lora_up.weight"],
               f"{name}.lora_magnitude_vector": t(32).abs() + 0.5}  # fmt: skip
    a, b = save(Path("a.safetensors"), tensors), save(Path("b.safetensors"), locon({QUERY: MODULES[QUERY]}))
    combined((a, -0.5), b, exact=True, base=base, dialect="kohya")
    weight = model()[f"{WEIGHTS[QUERY]}.weight"].double()
    magnitude = {".dora_scale": tensors[f"{name}.lora_magnitude_vector"][:, None]}
    expected = deltas(b)[QUERY] - 0.5 * (dora(weight, parts | magnitude, 3.0) - weight)
    assert off(expected, matrices()[QUERY]) < 1e-6


@pytest.mark.parametrize("kind", ["dora", "oft", "ia3"])
@pytest.mark.parametrize("place", [0, 1])
def test_without_a_base_it_is_refused_by_name(kind: str, place: int) -> None:
    t = Maker(1)
    parts = {"dora": lambda: t.lora(32, 32, 2) | {".dora_scale": t(32, 1)}, "oft": lambda: {".oft_blocks": t(4, 8, 8)},
             "ia3": lambda: {".weight": t(32), ".on_input": torch.tensor(False)}}[kind]()  # fmt: skip
    files = [save(Path("odd.safetensors"), named({QUERY: parts})), save(Path("plain.safetensors"), locon())]
    with pytest.raises(MismatchError) as caught:
        combined(*(files if place == 0 else files[::-1]))
    said = {"dora": "a magnitude (DoRA)"}.get(kind, f"a {kind}")
    assert str(caught.value) == (f"odd.safetensors: {QUERY!r} is {said}, whose change depends on the model's weights")
    assert caught.value.hint == "--base CHECKPOINT, the model that the LoRAs are for, makes a LoRA of it"
    assert not OUT.exists()


def test_a_base_of_another_architecture_is_refused_by_name() -> None:
    maker = Maker(1)
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    flux = named({stem: maker.lora(3072, 3072, 1), "lora_unet_img_in": maker.lora(3072, 64, 1)})
    for name in ("a", "b"):
        save(Path(f"{name}.safetensors"), flux)
    save(Path("base.safetensors"), model())
    with pytest.raises(MismatchError, match=r"^base\.safetensors: is for sd15, but a\.safetensors is for flux$"):
        combined("a.safetensors", "b.safetensors", base="base.safetensors", architecture="flux")
    with pytest.raises(MismatchError, match=r"^--base: a\.safetensors is no checkpoint$"):
        combined("a.safetensors", "b.safetensors", base="a.safetensors", architecture="flux")


# ------------------------------------------------------------------------------------------------ what else there is


def test_what_only_one_has_is_kept_at_its_strength() -> None:
    a = save(Path("a.safetensors"), locon({QUERY: MODULES[QUERY], KERNEL: MODULES[KERNEL]}, rank=4, seed=1))
    b = save(Path("b.safetensors"), locon({KEY: MODULES[KEY], ENCODER: MODULES[ENCODER]}, rank=3, seed=2))
    for words in ({}, {"exact": True}, {"method": "dare", "rank": 20}):
        report = combined((a, -0.7), (b, 1.5), **words)
        expected = weighted((a, -0.7), (b, 1.5))
        assert {m: off(expected[m], delta) < 1e-6 for m, delta in matrices().items()} == dict.fromkeys(expected, True)
        assert {m: row["rank"] for m, row in rows(report).items()} == {QUERY: 4, KERNEL: 4, KEY: 3, ENCODER: 3}


NORM = f"{BLOCK}_norm"
NORM_1 = f"{BLOCK}_transformer_blocks_0_norm1"


def with_vectors(seed: int, norm: dict[str, str]) -> dict[str, Tensor]:
    """Biases beside factors, of a LoRA (scaled as it) and as differences; norms, whose parts are called by `norm`."""
    t = Maker(seed)
    return named({
        QUERY: t.lora(32, 32, 4, 2.0) | {".lora_up.bias": t(32)},
        KERNEL: t.lora(32, 16, 3, 1.0, (3, 3)) | {".diff_b": t(32)},
        POINT: {".diff_b": t(32)},
        NORM: {norm["weight"]: t(32), norm["bias"]: t(32)},
        NORM_1: {norm["weight"]: t(32)},
    })  # fmt: skip


DIFFS, NORMS = {"weight": ".diff", "bias": ".diff_b"}, {"weight": ".w_norm", "bias": ".b_norm"}


@pytest.mark.parametrize("others", [DIFFS, NORMS], ids=["alike", "LyCORIS' norms"])
@pytest.mark.parametrize("first", [DIFFS, NORMS], ids=["differences", "norms"])
def test_biases_and_norms_are_summed_with_their_strengths(first: dict[str, str], others: dict[str, str]) -> None:
    a, b = with_vectors(1, first), with_vectors(2, others)
    loras = [(save(Path("a.safetensors"), a), 0.7), (save(Path("b.safetensors"), b), -1.5)]
    report = combined(*loras, exact=True)
    found = tensors_of(OUT)
    by_hand = {
        f"{QUERY}.diff_b": 0.7 * a[f"{QUERY}.lora_up.bias"] / 2 - 1.5 * b[f"{QUERY}.lora_up.bias"] / 2,
        f"{KERNEL}.diff_b": 0.7 * a[f"{KERNEL}.diff_b"] - 1.5 * b[f"{KERNEL}.diff_b"],
        f"{POINT}.diff_b": 0.7 * a[f"{POINT}.diff_b"] - 1.5 * b[f"{POINT}.diff_b"],
    }  # fmt: skip
    mixed = first != others
    for part in ("weight", "bias"):
        key = f"{NORM}{(NORMS if mixed else first)[part]}"
        by_hand[key] = 0.7 * a[f"{NORM}{first[part]}"] - 1.5 * b[f"{NORM}{others[part]}"]
    weight = f"{NORM_1}{(NORMS if mixed else first)['weight']}"
    by_hand[weight] = 0.7 * a[f"{NORM_1}{first['weight']}"] - 1.5 * b[f"{NORM_1}{others['weight']}"]
    assert {k for k in found if ".lora_" not in k and not k.endswith(".alpha")} == set(by_hand)
    for key, tensor in by_hand.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6)
    accounted(report, *(path for path, _ in loras))
    assert report.account.unused == []


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_what_a_dialect_cannot_say_is_named_and_strict_refuses_it(to: str) -> None:
    """PEFT has a bias beside factors, and no other differences of biases and norms."""
    a, b = with_vectors(1, NORMS), with_vectors(2, DIFFS)
    loras = [(save(Path("a.safetensors"), a), 0.7), (save(Path("b.safetensors"), b), -1.5)]
    out = Path("out") if to == "peft" else OUT
    report = combined(*loras, dialect=to, output=out)
    lost = {f"{NORM}.w_norm", f"{NORM}.b_norm", f"{NORM_1}.w_norm", f"{POINT}.diff_b"}
    lost |= {f"{NORM}.diff", f"{NORM}.diff_b", f"{NORM_1}.diff"}
    assert {u.key for u in report.account.unused} == lost
    assert {u.reason for u in report.account.unused} == {f"{to} has no differences of biases and norms"}
    accounted(report, *(path for path, _ in loras))
    written = tensors_of(out / "adapter_model.safetensors" if to == "peft" else OUT)
    biases = {k: t for k, t in written.items() if k.endswith(".bias")}
    assert len(biases) == 2
    for name in (QUERY, KERNEL):
        stem = "attn1.to_q.lora_B.bias" if name == QUERY else "conv1.lora_B.bias"
        part, scale = (".lora_up.bias", 0.5) if name == QUERY else (".diff_b", 1.0)
        tensor = next(t for k, t in biases.items() if k.endswith(stem))
        torch.testing.assert_close(tensor, scale * (0.7 * a[name + part] - 1.5 * b[name + part]), rtol=0, atol=1e-6)
    if to == "peft":
        assert json.loads((out / "adapter_config.json").read_text())["lora_bias"] is True
    with pytest.raises(MismatchError, match=r"^--strict: 7 tensors would be left out: "):
        combined(*loras, dialect=to, output="strict" + out.suffix, strict=True)
    assert not Path("strict" + out.suffix).exists()


def test_a_bias_goes_with_its_module() -> None:
    """Where a dialect has biases beside factors alone, one without them would be no adapter."""
    tensors = named({QUERY: Maker(1).lora(32, 32, 4) | {".lora_up.bias": Maker(2)(32)}, KEY: Maker(3).lora(32, 24, 4)})
    tensors[f"{QUERY}.lora_up.weight"] *= 0
    a, b = save(Path("a.safetensors"), tensors), save(Path("b.safetensors"), locon({KEY: MODULES[KEY]}))
    for to, out in (("peft", Path("out")), ("diffusers", OUT)):
        report = combined(a, b, rank="energy:0.9", dialect=to, output=out)
        assert set(deltas(out)) == {k for k in deltas(out) if k.endswith("attn2.to_k")} != set()
        assert {u.key for u in report.account.unused} == {k for k in tensors if k.startswith(QUERY)}
        accounted(report, a, b)
    report = combined(a, b, rank="energy:0.9")
    torch.testing.assert_close(tensors_of(OUT)[f"{QUERY}.diff_b"], tensors[f"{QUERY}.lora_up.bias"])
    assert {u.key for u in report.account.unused} == {f"{QUERY}.lora_up.weight", f"{QUERY}.lora_down.weight"}
    accounted(report, a, b)


def test_embeddings_are_copied_once() -> None:
    cat, dog = {"bundle_emb.cat.string_to_param.*": torch.ones(2, 8)}, {"bundle_emb.dog.clip_l": torch.ones(1, 8)}
    a = save(Path("a.safetensors"), locon() | cat)
    b = save(Path("b.safetensors"), locon(seed=1) | {k: 2 * t for k, t in cat.items()} | dog)
    report = combined(a, b)
    found = tensors_of(OUT)
    assert torch.equal(found["bundle_emb.cat.string_to_param.*"], torch.ones(2, 8))
    assert torch.equal(found["bundle_emb.dog.clip_l"], torch.ones(1, 8))
    assert sorted(report.account.copied) == sorted([*cat, *dog])
    assert [(u.key, u.source, u.reason) for u in report.account.unused] == [
        (*cat, "b.safetensors", "a.safetensors has one of its name")
    ]
    accounted(report, a, b)
    report = combined(a, b, dialect="peft", output="out")
    assert {u.reason for u in report.account.unused} == {"an embedding has no place in a PEFT folder"}
    accounted(report, a, b)


def test_a_set_bias_is_no_part_of_a_sum() -> None:
    odd = {f"{POINT}.set_bias": torch.ones(32), f"{NORM}.set_weight": torch.ones(32)}
    a = save(Path("a.safetensors"), locon() | odd)
    b = save(Path("b.safetensors"), locon(seed=1))
    report = combined(a, b)
    why = "it sets a bias or a norm, which no sum of changes can say"
    assert {u.key: u.reason for u in report.account.unused} == dict.fromkeys(odd, why)
    accounted(report, a, b)


def test_files_of_norms_alone_have_nothing_to_combine() -> None:
    for name in "ab":
        save(Path(f"{name}.safetensors"), {f"{NORM}.w_norm": torch.ones(32), f"{NORM_1}.w_norm": torch.ones(32)})
    with pytest.raises(MismatchError) as caught:
        combined("a.safetensors", "b.safetensors", architecture="sd15")
    assert str(caught.value) == "a.safetensors, b.safetensors: change no matrix, and have no ranks to combine"


@pytest.mark.parametrize("name", [KERNEL, "lora_unet_tower_0_conv"], ids=["known", "not known"])
def test_a_flat_kernel_gets_its_axes_from_the_model_or_from_who_has_them(name: str) -> None:
    t = Maker(1)
    shapes = {".hada_w1_a": (32, 2), ".hada_w1_b": (2, 144), ".hada_w2_a": (32, 2), ".hada_w2_b": (2, 144)}
    flat = save(Path("a.safetensors"), named({name: {ending: t(*shape) for ending, shape in shapes.items()}}))
    kernel = save(Path("b.safetensors"), named({name: t.lora(32, 16, 2, kernel=(3, 3))}))
    for files in ((flat, kernel), (kernel, flat)):
        combined(*files, exact=True)
        assert tensors_of(OUT)[f"{name}.lora_down.weight"].shape == (6, 16, 3, 3)
        assert tensors_of(OUT)[f"{name}.lora_up.weight"].shape == (32, 6, 1, 1)
        assert off(weighted((flat, 1.0), (kernel, 1.0))[name], matrices()[name]) < 1e-6


# ------------------------------------------------------------------------------------------------ architectures


def test_files_of_two_architectures_are_refused_by_name() -> None:
    save(Path("a.safetensors"), locon())
    wan = named({"lora_unet_blocks_0_cross_attn_k": Maker(1).lora(16, 16, 2)})
    save(Path("b.safetensors"), wan)
    with pytest.raises(MismatchError, match=r"^b\.safetensors: is for wan, but a\.safetensors is for sd15$"):
        combined("a.safetensors", "b.safetensors")


def unknown(seed: int, names: tuple[str, ...], endings: tuple[str, str] = UP_DOWN["peft"]) -> dict[str, Tensor]:
    t = Maker(seed)
    return {name + ending: t(*shape) for name in names for ending, shape in zip(endings, ((9, 2), (2, 7)), strict=True)}


def test_of_a_model_that_is_not_known_names_that_are_the_same_are_combined() -> None:
    a = save(Path("a.safetensors"), unknown(1, ("model.tower.0.mix", "model.tower.1.mix")))
    b = save(Path("b.safetensors"), unknown(2, ("model.tower.1.mix", "model.tower.2.mix")))
    c = save(Path("c.safetensors"), unknown(3, ("model.tower.2.mix", "model.tower.3.mix")))
    report = combined((a, 0.5), (b, -2.0), c, exact=True)
    expected = weighted((a, 0.5), (b, -2.0), (c, 1.0))
    assert matrices().keys() == expected.keys()
    assert all(off(expected[name], delta) < 1e-6 for name, delta in matrices().items())
    assert set(raw(OUT)) == set(unknown(1, tuple(expected)))
    accounted(report, a, b, c)


def test_of_a_model_that_is_not_known_other_names_are_refused() -> None:
    save(Path("a.safetensors"), unknown(1, ("model.tower.0.mix",)))
    save(Path("b.safetensors"), unknown(2, ("model.spire.0.mix",)))
    save(Path("c.safetensors"), unknown(2, ("model.tower.0.mix", "model.tower.1.mix")))
    said = "has no module of a name that {} has, and no known model has them"
    with pytest.raises(MismatchError) as caught:
        combined("a.safetensors", "b.safetensors")
    assert str(caught.value) == "b.safetensors: " + said.format("a.safetensors")
    with pytest.raises(MismatchError) as caught:
        combined("a.safetensors", "c.safetensors", "b.safetensors")
    assert str(caught.value) == "b.safetensors: " + said.format("those before it").replace("it has", "it have")
    with pytest.raises(UsageError, match=r"^--dialect: a\.safetensors is for a model that is not known"):
        combined("a.safetensors", "c.safetensors", dialect="kohya")
    save(Path("sd15.safetensors"), locon())
    with pytest.raises(MismatchError, match=r"^a\.safetensors: no known architecture has modules of these names: "):
        combined("sd15.safetensors", "a.safetensors")


def test_names_that_fit_two_models_ask_which() -> None:
    """Of Flux and of Chroma some blocks are called alike; the other file may tell, or a word."""
    t = Maker(2)
    either = {"lora_unet_double_blocks_0_img_attn_proj": t.lora(3072, 3072, 1)}
    flux = either | {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": t.lora(3072, 768, 1),
        "lora_te3_encoder_block_3_layer_0_SelfAttention_q": t.lora(4096, 4096, 1),
    }
    for name, modules in (("a", either), ("b", either), ("c", flux)):
        save(Path(f"{name}.safetensors"), named(modules))
    with pytest.raises(MismatchError) as caught:
        combined("a.safetensors", "b.safetensors", architecture=None)
    assert "cannot tell which model it is for: chroma, flux" in str(caught.value)
    assert caught.value.hint == "--architecture chroma says which"
    assert rows(combined("a.safetensors", "b.safetensors", architecture="flux"))
    assert rows(combined("a.safetensors", "c.safetensors", architecture=None))
    assert metadata_of(OUT)["ss_base_model_version"] == "flux1"


# ------------------------------------------------------------------------------------------------ refusals


def plain(*names: str, **words: Any) -> list[Path]:
    return [save(Path(f"{name}.safetensors"), locon(seed=seed, **words)) for seed, name in enumerate(names)]


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        ({"exact": True, "rank": 4}, "--exact: keeps every rank, and --rank says how many", "take one of the two"),
        ({"exact": True, "conv_rank": 4}, "--exact: keeps every rank, and --conv-rank says how many", None),
        ({"exact": True, "max_rank": 4}, "--exact: keeps every rank, and --max-rank says how many", None),
        ({"max_rank": 4}, "--max-rank: is for a rule, and --rank has none", "--rank energy:0.99 is one"),
        ({"max_conv_rank": 4}, "--max-conv-rank: is for a rule, and --rank has none", None),
        ({"rank": 0}, "--rank: found 0, expected a rank of 1 or more, or a rule such as energy:0.9", None),
        ({"rank": "enrgy:0.5"}, "--rank: found 'enrgy:0.5', expected", "did you mean 'energy'?"),
        ({"method": "tise"}, "unknown merge method 'tise'", "did you mean 'ties'?"),
        ({"settings": {"density": 0.5}}, "--set: sum has no parameter 'density'", "it has none"),
        ({"method": "ties", "settings": {"densty": 1}}, "--set: ties has no parameter 'densty'", "it has density, "),
        ({"method": "ties", "settings": {"density": 2}}, "ties, density: found 2, expected a number above 0", None),
        ({"dtype": "fp7"}, "--dtype: unknown dtype 'fp7'", None),
        ({"dialect": "khoya"}, "--dialect: unknown dialect 'khoya'", "known are kohya, onetrainer, comfy"),
        ({"architecture": "fluxx"}, "--architecture: unknown architecture 'fluxx'", "did you mean 'flux'?"),
        ({"ema": "0.9", "method": "ties"}, "--ema: is an average, and stands with no --method and no --compat", None),
        ({"ema": "0.9", "compat": "sd-scripts"}, "--ema: is an average", None),
        ({"compat": "kohya"}, "--compat: found 'kohya', expected sd-scripts", None),
        ({"compat": "sd-scripts", "method": "dare"}, "--compat: sd-scripts has no method dare", None),
        ({"compat": "sd-scripts", "rank": 4}, "--compat: sd-scripts keeps the ranks, and --rank says", "resize "),
        ({"compat": "sd-scripts", "max_rank": 4}, "--compat: sd-scripts keeps the ranks, and --max-rank says", None),
    ],
    ids=str,
)  # fmt: skip
def test_words_that_mean_nothing_together_are_refused(words: dict[str, Any], said: str, hint: str | None) -> None:
    plain("a", "b")
    with pytest.raises(UsageError) as caught:
        combined("a.safetensors", "b.safetensors", **words)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
    if hint is not None:
        assert (caught.value.hint or "").startswith(hint)
    assert sorted(p.name for p in Path.cwd().iterdir()) == ["a.safetensors", "b.safetensors"]


def test_one_file_is_for_resize_and_none_is_nothing() -> None:
    plain("a")
    for files in (["a.safetensors"], []):
        with pytest.raises(UsageError) as caught:
            combined(*files)
        assert str(caught.value) == f"combine: found {len(files)} LoRA, expected two or more"
        assert caught.value.hint == "resize is for one"


@pytest.mark.parametrize("strength", [math.nan, math.inf, "nan", "1e999"])
def test_a_strength_that_is_no_number_is_refused(strength: Any) -> None:
    plain("a", "b")
    lora = ("b.safetensors", strength) if isinstance(strength, float) else f"b.safetensors:{strength}"
    with pytest.raises((UsageError, OutputError, WeightopsError)) as caught:
        combined("a.safetensors", lora)
    assert str(caught.value).startswith("b.safetensors")


@every_dtype
@pytest.mark.parametrize("words", [{"exact": True}, {}, {"rank": "energy:0.9"}, {"method": "ties", "rank": 3},
                                   {"interference_only": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("shared", [True, False], ids=["of both", "of one"])
def test_what_is_no_number_is_refused_with_its_module(
    shared: bool, value: float, words: dict[str, Any], dtype: torch.dtype
) -> None:
    a, b = plain("a", "b", dtype=dtype)
    tensors = tensors_of(b)
    tensors[f"{KEY}.lora_down.weight"][3, 5] = value
    save(b, tensors)
    if not shared:
        save(a, {k: t for k, t in tensors_of(a).items() if not k.startswith(KEY)})
    with pytest.raises(ValueRefused) as caught:
        combined(a, b, **words)
    assert KEY in str(caught.value)
    assert "holds NaN or Inf" in str(caught.value)
    assert sorted(p.name for p in Path.cwd().iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_bias_that_is_no_number_is_refused_with_its_name() -> None:
    a, b = plain("a", "b")
    save(b, tensors_of(b) | {f"{POINT}.diff_b": torch.tensor([math.nan] * 32)})
    with pytest.raises(ValueRefused, match=rf"{POINT}\.diff_b"):
        combined(a, b)
    assert not OUT.exists()


def test_a_result_too_large_for_half_precision_is_refused() -> None:
    a, b = plain("a", "b", dtype=torch.float16)
    with pytest.raises(ValueRefused, match="too large for F16"):
        combined((a, 1e12), b, exact=True)
    assert not OUT.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{KEY}.lora_up.weight": (32, 7)}, "has factors that do not meet: up [32, 7], down [12, 24]"),
        ({f"{KEY}.lora_up.weight": None}, "has ['down'], but no up"),
        ({f"{KEY}.alpha": (2,)}, "has an alpha of shape [2], expected one number"),
    ],
    ids=str,
)
def test_a_damaged_file_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    a, b = plain("a", "b")
    tensors = tensors_of(b) | {k: torch.ones(shape) for k, shape in change.items() if shape is not None}
    save(b, {k: t for k, t in tensors.items() if change.get(k, 0) is not None})
    with pytest.raises(FormatError) as caught:
        combined(a, b)
    assert str(caught.value).startswith(f"b.safetensors: {KEY!r} has ")
    assert not OUT.exists()


def test_modules_of_two_shapes_are_refused_with_both() -> None:
    a, b = plain("a", "b")
    save(b, tensors_of(b) | named({KEY: Maker(1).lora(32, 40, 3)}))
    with pytest.raises(MismatchError) as caught:
        combined(a, b)
    sides = "a.safetensors: [32, 24], b.safetensors: [32, 40]"
    assert str(caught.value) == f"a.safetensors: {KEY!r} has not the same inputs in all files ({sides})"
    save(b, tensors_of(b) | named({KEY: Maker(1).lora(48, 24, 3)}))
    with pytest.raises(MismatchError) as caught:
        combined(a, b)
    assert str(caught.value) == (
        f"a.safetensors: {KEY!r} has not the same rows in all files (a.safetensors: 32, b.safetensors: 48)"
    )


def test_an_output_that_is_there_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = plain("a", "b")
    OUT.write_bytes(b"mine")

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("weightops.ops.cutting.run", read)
    with pytest.raises(OutputError, match=r"^out\.safetensors: exists$"):
        combined(a, b, force=False)
    with pytest.raises(OutputError, match=r"is also an input"):
        combined(a, b, output=a, force=False)
    with pytest.raises(UsageError, match="the output's name must end in"):
        combined(a, b, output="out.txt")
    with pytest.raises(UsageError, match="a folder is written here"):
        combined(a, b, dialect="peft")
    with pytest.raises(MemoryRefused, match=r"^--memory: 1,000 bytes are too few: .* alone takes [\d,]+$"):
        combined(a, b, memory=1000)
    assert OUT.read_bytes() == b"mine"


# ------------------------------------------------------------------------------------------------ sizes and bytes


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft", "comfy"])
@pytest.mark.parametrize("words", [{"exact": True}, {}, {"rank": 5, "conv_rank": 2}], ids=str)
def test_a_dry_run_foretells_the_size(words: dict[str, Any], to: str) -> None:
    files = plain("a", "b")
    out = Path("out") if to == "peft" else OUT
    told = combined(*files, **words, dialect=to, output=out, dry_run=True)
    assert not out.exists()
    report = combined(*files, **words, dialect=to, output=out)
    size = sum(p.stat().st_size for p in out.rglob("*.*")) if out.is_dir() else out.stat().st_size
    assert told.bytes_written == report.bytes_written == size
    assert told.account == report.account
    assert told.summary == report.summary


def test_a_dry_run_of_a_rule_says_the_most_that_it_can_be() -> None:
    files = plain("a", "b")
    told = combined(*files, rank="energy:0.9", dry_run=True)
    report = combined(*files, rank="energy:0.9")
    assert report.bytes_written <= told.bytes_written
    assert any("depends on the data" in warning for warning in told.warnings)


METHODS = ("sum", "slerp", "orthogonal", "ties", "dare", "della")


@pytest.mark.parametrize(
    "words",
    [{"exact": True}, {}, {"rank": "energy:0.9"}, *({"method": m, "rank": 6} for m in METHODS)],
    ids=str,
)  # fmt: skip
def test_the_bytes_do_not_depend_on_memory_or_threads(words: dict[str, Any]) -> None:
    files = plain("a", "b", dtype=torch.float16)
    found = set()
    for memory, threads in ((24 << 20, 1), (40 << 20, 3), (400 << 20, 2), (None, None)):
        combined(*files, **words, memory=memory, threads=threads)
        found.add(OUT.read_bytes())
    assert len(found) == 1


def test_no_more_memory_is_in_flight_than_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from weightops.engine import run as engine
    from weightops.ops import cutting

    peaks = []

    def watched(*args: Any, **words: Any) -> Any:
        outcome = engine.run(*args, **words)
        peaks.append(outcome.peak_in_flight)
        return outcome

    monkeypatch.setattr(cutting, "run", watched)
    monkeypatch.setattr("weightops.ops.produce.run", watched)
    files = plain("a", "b")
    for memory in (12 << 20, 64 << 20):
        combined(*files, rank="energy:0.9", memory=memory, threads=3)
        assert len(peaks) == 3
        assert 0 < max(peaks) <= memory
        peaks.clear()


def test_verify_notices_what_was_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    files = plain("a", "b")
    report = combined(*files, exact=True)
    assert report.verified is not None
    assert report.verified["modules"] == len(MODULES)
    from weightops.ops import cutting

    def tampered(modules: Any, sources: Any, written: Path, said: Any) -> Any:
        head, data = header(written)
        at = head[f"{KEY}.lora_down.weight"]["data_offsets"][0]
        whole = bytearray(written.read_bytes())
        start = len(whole) - len(data) + at
        whole[start : start + 4] = b"\0\0\x80\x40"
        written.write_bytes(whole)
        return check(modules, sources, written, said)

    check = cutting.check_factors
    monkeypatch.setattr(cutting, "check_factors", tampered)
    with pytest.raises(ValueRefused, match=rf"{KEY}.* is off by"):
        combined(*files, exact=True)


# ------------------------------------------------------------------------------------------------ metadata


def test_metadata_is_of_the_result_and_of_what_all_files_agree_on() -> None:
    common = {"ss_base_model_version": "sd_v1", "modelspec.architecture": "stable-diffusion-v1/lora", "ss_v2": "False"}
    trained = {"ss_network_dim": "12", "ss_network_alpha": "6.0", "ss_network_module": "lycoris.kohya",
               "ss_network_args": '{"algo": "locon"}', "ss_tag_frequency": "{}", "ss_output_name": "mine",
               "sshs_model_hash": "0" * 64, "modelspec.title": "mine", "modelspec.hash_sha256": "0x00",
               "modelspec.resolution": "512x512", "modelspec.prediction_type": "epsilon"}  # fmt: skip
    a = save(Path("a.safetensors"), locon(seed=1), common | trained)
    b = save(Path("b.safetensors"), locon(seed=2), common | trained | {"modelspec.resolution": "768x768"})
    combined((a, 0.8), (b, -0.5), rank=4, max_rank=4, conv_rank="2", dialect="kohya", architecture="sd15")
    found = metadata_of(OUT)
    recipe = json.loads(found.pop("weightops"))
    hashed = found.pop("sshs_model_hash")
    assert hashed == hashlib.sha256(header(OUT)[1]).hexdigest()
    assert found == common | {
        "format": "pt", "ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic",
        "ss_network_module": "networks.lora", "modelspec.prediction_type": "epsilon",
    }  # fmt: skip
    assert {k: v for k, v in recipe.items() if k not in ("inputs", "version")} == {
        "command": "combine", "dtype": "keep", "strengths": [0.8, -0.5], "method": "sum", "exact": False, "rank": 4,
        "max_rank": 4, "conv_rank": "2", "dialect": "kohya", "architecture": "sd15",
    }  # fmt: skip
    assert [entry["name"] for entry in recipe["inputs"]] == ["a.safetensors", "b.safetensors"]
    assert all(entry["hash"] for entry in recipe["inputs"])
    combined(a, b, rank=4)
    assert {k: metadata_of(OUT)[k] for k in ("ss_network_dim", "ss_network_alpha")} == {
        "ss_network_dim": "4", "ss_network_alpha": "4",
    }  # fmt: skip


def test_metadata_of_models_that_differ_is_the_architectures() -> None:
    a = save(Path("a.safetensors"), locon(seed=1), {"ss_base_model_version": "sd_v1"})
    b = save(Path("b.safetensors"), locon(seed=2), {"ss_base_model_version": "sd_1.5"})
    combined(a, b, method="ties", rank=4, settings={"density": "0.4"}, seed=3)
    assert metadata_of(OUT)["ss_base_model_version"] == "sd_v1"
    recipe = json.loads(metadata_of(OUT)["weightops"])
    assert recipe["method"] == "ties"
    assert recipe["settings"] == {"density": 0.4, "count_votes": False, "normalize": True}
    assert recipe["seed"] == 3
    combined(a, b, dialect="diffusers")
    assert not {k for k in metadata_of(OUT) if k.startswith("ss_")}


def test_the_name_is_made_of_the_files_and_their_strengths() -> None:
    a, b = plain("a", "b")
    assert combine(a, (b, 0.5)).output == "a+b-0.5.safetensors"
    more = plain("c", "d", "e", "f")
    assert combine(a, b, *more, dialect="peft").output == "a+b+c+d+2 more.safetensors".removesuffix(".safetensors")


def test_the_report_says_what_was_done() -> None:
    a, b = plain("a", "b")
    report = combined((a, 0.7), (b, -0.5), rank=6)
    assert report.summary == f"0.7 × a − 0.5 × b: {len(MODULES)} modules"
    assert report.details["line"].startswith("Holds ")
    assert [entry["path"] for entry in report.inputs] == ["a.safetensors", "b.safetensors"]
    assert report.bytes_written == OUT.stat().st_size
    assert {"modules", "energy", "error", "interference"} <= report.to_dict().keys()
    assert {"name", "rank_before", "rank", "energy", "error"} <= report.details["modules"][0].keys()


def test_a_folder_of_an_unknown_model_stays_a_folder_with_settings() -> None:
    t = Maker(5)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    given = []
    for folder in "uv":
        Path(folder).mkdir()
        factors = t(4, 16), t(24, 4)
        given.append(2.0 * factors[1].double() @ factors[0].double())
        tensors = dict(zip((f"{name}.lora_A.weight", f"{name}.lora_B.weight"), factors, strict=True))
        save(Path(folder) / "adapter_model.safetensors", tensors)
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        Path(folder, "adapter_config.json").write_text(json.dumps(config))
    combine(("u", 0.7), ("v", -0.3), exact=True, output="out")
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (8, 8, "CAUSAL_LM")
    found = tensors_of(Path("out/adapter_model.safetensors"))
    product = found[f"{name}.lora_B.weight"].double() @ found[f"{name}.lora_A.weight"].double()
    torch.testing.assert_close(product, 0.7 * given[0] - 0.3 * given[1], rtol=0, atol=1e-5)
