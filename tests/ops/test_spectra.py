"""inspect --spectrum: singular values, and what is said of them, against a dense SVD in float64."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from loras import MODULE, UNET_IN_LDM, Maker, deltas, named, save, tensors_of

import weightops
from weightops.errors import FormatError, MismatchError, UsageError, ValueRefused
from weightops.ops.spectra import effective_rank, rank_for

if TYPE_CHECKING:
    from torch import Tensor

Q, K, V = (MODULE.format(name) for name in "qkv")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def spectrum(path: Path, **options: Any) -> dict[str, Any]:
    lora = weightops.inspect(path, spectrum=True, **options).to_dict()["lora"]
    json.dumps(lora, allow_nan=False)
    found: dict[str, Any] = lora["spectrum"]
    return found


def families(dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """A module of each form that has a ΔW without a base."""
    make = Maker(3, dtype)
    return {
        "lora_unet_linear": make.lora(20, 12, 4, 2.0),
        "lora_unet_wider_than_it_is": make.lora(6, 30, 8, 8.0),
        "lora_unet_locon": make.lora(10, 6, 5, 1.0, (3, 3)),
        "lora_unet_tucker": {
            ".lora_up.weight": make(10, 4, 1, 1), ".lora_mid.weight": make(4, 4, 3, 3),
            ".lora_down.weight": make(4, 6, 1, 1), ".alpha": torch.tensor(2.0, dtype=dtype),
        },
        "lora_unet_loha": {
            ".hada_w1_a": make(20, 2), ".hada_w1_b": make(2, 12), ".hada_w2_a": make(20, 2), ".hada_w2_b": make(2, 12),
            ".alpha": torch.tensor(1.0, dtype=dtype),
        },
        "lora_unet_lokr": {".lokr_w1": make(2, 3), ".lokr_w2_a": make(8, 3), ".lokr_w2_b": make(3, 4),
                           ".alpha": torch.tensor(6.0, dtype=dtype)},
        "lora_unet_lokr_whole": {".lokr_w1": make(2, 2), ".lokr_w2": make(5, 4, 3, 3),
                                 ".alpha": torch.tensor(7.0, dtype=dtype)},
        "lora_unet_full": {".diff": make(14, 9)},
        "lora_unet_full_conv": {".diff": make(6, 5, 3, 3)},
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_spectra_are_those_of_a_dense_svd(dtype: torch.dtype) -> None:
    path = save(Path("a.safetensors"), named(families(dtype)))
    found = spectrum(path)
    exact = {name: d.flatten(1) for name, d in deltas(path).items()}
    assert {row["name"] for row in found["modules"]} == exact.keys()
    assert found["left_out"] == []
    for row in found["modules"]:
        delta = exact[row["name"]]
        values = torch.linalg.svdvals(delta)
        there = len(row["singular_values"])
        tolerance = 1e-6 * float(values[0])
        np.testing.assert_allclose(row["singular_values"], values[:there], rtol=1e-5, atol=tolerance)
        assert values[there:].sum() < tolerance
        assert row["shape"][0] == delta.shape[0]
        assert math.prod(row["shape"][1:]) == delta.shape[1]
        squares = values.square() / values.square().sum()
        shares = values[values > tolerance] / values[values > tolerance].sum()
        assert row["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
        assert row["effective_rank"] == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-4)
        assert row["stable_rank"] == pytest.approx(float(1 / squares[0]), rel=1e-5)
        for rank in (4, 8, 16, 32):
            assert row["energy"][str(rank)] == pytest.approx(float(squares[:rank].sum()), rel=1e-6)
        assert row["rank_for"]["0.9"] == 1 + int((squares.cumsum(0) < 0.9).sum())
        assert (row["weight_norm"], row["relative"]) == (None, None)
    ranks = {row["name"].removeprefix("lora_unet_"): row["rank"] for row in found["modules"]}
    assert ranks == {"linear": 4, "wider_than_it_is": 8, "locon": 5, "tucker": 4, "loha": 4, "lokr": 6,
                     "lokr_whole": 10, "full": 9, "full_conv": 6}  # fmt: skip


def test_the_totals_are_of_all_modules_together() -> None:
    path = save(Path("a.safetensors"), named(families(torch.float32)))
    found = spectrum(path)
    values = [torch.linalg.svdvals(d.flatten(1)) for d in deltas(path).values()]
    whole = math.fsum(float(v.square().sum()) for v in values)
    assert found["delta_norm"] == pytest.approx(math.sqrt(whole))
    for rank in (4, 8):
        kept = math.fsum(float(v[:rank].square().sum()) for v in values)
        assert found["energy"][str(rank)] == pytest.approx(kept / whole)
    rows = found["modules"]
    assert found["rank_for"] == {s: statistics.median_high(row["rank_for"][s] for row in rows) for s in ("0.9", "0.99")}
    assert found["effective_rank"] == statistics.median(row["effective_rank"] for row in rows)
    assert (found["weight_norm"], found["relative"]) == (None, None)


def test_the_effective_rank_counts_equal_values() -> None:
    assert effective_rank([3.0] * 7) == pytest.approx(7)
    assert effective_rank([5.0, 0.0]) == 1
    assert effective_rank([1.0, 1e-9]) == pytest.approx(1, abs=1e-6)
    assert (effective_rank([]), effective_rank([0.0])) == (0, 0)
    assert [rank_for([2.0, 1.0, 0.0], share) for share in (0.5, 0.8, 0.81, 1.0)] == [1, 1, 2, 2]
    assert (rank_for([], 0.9), rank_for([0.0, 0.0], 0.9)) == (0, 0)


def test_a_module_of_zeros_has_no_ranks_and_is_no_part_of_the_medians() -> None:
    zeros = {".lora_down.weight": torch.ones(4, 16), ".lora_up.weight": torch.zeros(16, 4)}
    one = Maker().lora(16, 16, 2, 2.0)
    found = spectrum(save(Path("a.safetensors"), named({Q: zeros, K: one})))
    row, other = sorted(found["modules"], key=lambda row: row["delta_norm"])
    assert (row["delta_norm"], row["effective_rank"], row["rank_for"]["0.9"]) == (0, 0, 0)
    assert row["energy"]["4"] == 1
    assert found["effective_rank"] == other["effective_rank"]
    nothing = spectrum(save(Path("b.safetensors"), named({Q: zeros})))
    assert (nothing["delta_norm"], nothing["effective_rank"], nothing["rank_for"]["0.99"]) == (0, 0, 0)


def test_a_spectrum_does_not_depend_on_memory_or_threads() -> None:
    path = save(Path("a.safetensors"), named(families(torch.float16)))
    first, *others = (
        spectrum(path, memory=memory, threads=n) for memory, n in ((64 << 20, 1), (1 << 28, 3), (None, None))
    )
    assert all(other == first for other in others)


# ------------------------------------------------------------------------------------------------ with a base


def base(path: Path = Path("base.safetensors"), names: str = "qkv") -> dict[str, Tensor]:
    make = Maker(9)
    tensors = {
        "model.diffusion_model.input_blocks.0.0.weight": make(16, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": make(16, 16, 1, 1),
        **{f"model.diffusion_model.{UNET_IN_LDM}.to_{name}.weight": make(16, 16) for name in names},
    }
    save(path, tensors)
    return {MODULE.format(name): tensors[f"model.diffusion_model.{UNET_IN_LDM}.to_{name}.weight"] for name in names}


def test_norms_stand_beside_those_of_the_base() -> None:
    weights = base()
    path = save(Path("a.safetensors"), named({Q: Maker(1).lora(16, 16, 4, 1.0), K: Maker(2).lora(16, 16, 4, 8.0)}))
    found = spectrum(path, base="base.safetensors")
    exact = deltas(path)
    for row in found["modules"]:
        weight = float(weights[row["name"]].norm())
        assert row["weight_norm"] == pytest.approx(weight)
        assert row["relative"] == pytest.approx(float(exact[row["name"]].norm()) / weight)
    together = math.hypot(*(float(weights[name].norm()) for name in (Q, K)))
    assert found["weight_norm"] == pytest.approx(together)
    assert found["relative"] == pytest.approx(found["delta_norm"] / together)
    assert {k: v for k, v in spectrum(path)["modules"][0].items() if k not in ("weight_norm", "relative")} == {
        k: v for k, v in found["modules"][0].items() if k not in ("weight_norm", "relative")
    }


def test_what_depends_on_the_weights_is_measured_with_them_and_named_without() -> None:
    weights = base()
    make = Maker(4)
    magnitude = make(16, 1).abs() * 4
    path = save(Path("a.safetensors"), named({
        Q: make.lora(16, 16, 4, 2.0) | {".dora_scale": magnitude},
        K: make.lora(16, 16, 4, 2.0),
        V: {".diff_b": make(16)},
    }))  # fmt: skip
    found = spectrum(path)
    assert [row["name"] for row in found["modules"]] == [K]
    assert sorted(found["left_out"], key=lambda entry: entry["name"]) == [
        {"name": Q, "reason": "it has a magnitude (DoRA), whose change depends on the model's weights"},
        {"name": V, "reason": "it changes no matrix, and has no ranks"},
    ]
    found = spectrum(path, base="base.safetensors")
    assert [entry["name"] for entry in found["left_out"]] == [V]
    row = next(row for row in found["modules"] if row["name"] == Q)
    file = {k: t.double() for k, t in tensors_of(path).items()}
    moved = weights[Q].double() + 0.5 * file[f"{Q}.lora_up.weight"] @ file[f"{Q}.lora_down.weight"]
    change = moved * (magnitude.double() / moved.norm(dim=1, keepdim=True)) - weights[Q].double()
    np.testing.assert_allclose(row["singular_values"], torch.linalg.svdvals(change), rtol=1e-4, atol=1e-5)
    assert row["relative"] == pytest.approx(float(change.norm() / weights[Q].norm()), rel=1e-5)


def test_a_weight_that_the_base_lacks_leaves_the_rest() -> None:
    base(names="q")
    path = save(Path("a.safetensors"), named({Q: Maker(1).lora(16, 16, 4), K: Maker(2).lora(16, 16, 4)}))
    found = spectrum(path, base="base.safetensors")
    relative = {row["name"]: row["relative"] for row in found["modules"]}
    assert relative[K] is None
    assert found["relative"] == relative[Q] is not None
    alone = save(Path("b.safetensors"), named({K: Maker(2).lora(16, 16, 4)}))
    with pytest.raises(MismatchError, match=r"base\.safetensors: has no .*to_k\.weight"):
        spectrum(alone, base="base.safetensors")


# ------------------------------------------------------------------------------------------------ refusals


def test_what_has_no_spectrum_is_refused_in_one_line() -> None:
    base()
    lora = save(Path("a.safetensors"), named({Q: Maker(1).lora(16, 16, 4)}))
    with pytest.raises(UsageError) as told:
        weightops.inspect("base.safetensors", spectrum=True)
    assert str(told.value) == "--spectrum: is of adapter files, and base.safetensors is a checkpoint"
    assert told.value.hint == "extract makes an adapter of the difference of two checkpoints"
    with pytest.raises(UsageError) as told:
        weightops.inspect(lora, base="base.safetensors")
    assert (str(told.value), told.value.hint) == (
        "--base: is what --spectrum measures by", "inspect LORA --spectrum --base CHECKPOINT",
    )  # fmt: skip
    with pytest.raises(MismatchError, match=r"a\.safetensors is no checkpoint"):
        weightops.inspect(lora, spectrum=True, base=lora)
    dora = save(Path("d.safetensors"), named({Q: Maker(1).lora(16, 16, 4) | {".dora_scale": torch.ones(16, 1)}}))
    with pytest.raises(
        UsageError, match=r"d.safetensors has no module with ranks: it has a magnitude \(DoRA\)"
    ) as told:
        weightops.inspect(dora, spectrum=True)
    assert told.value.hint == "--base CHECKPOINT, the model that it is for"


def test_a_damaged_adapter_is_refused_by_its_module() -> None:
    parts = Maker(1).lora(16, 16, 4)
    parts[".lora_up.weight"][3, 2] = math.nan
    with pytest.raises(ValueRefused, match=r"attn2_to_q.*NaN or Inf"):
        spectrum(save(Path("a.safetensors"), named({Q: parts})))
    with pytest.raises(FormatError, match=r"attn2_to_k' has 'up', but no down"):
        spectrum(save(Path("b.safetensors"), {f"{K}.lora_up.weight": torch.ones(16, 4)}))
