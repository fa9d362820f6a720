"""fuse into fp8: the codes are dequantised, changed and quantised anew, and what survives is what a reader sees."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import save, save_raw
from safetensors import safe_open
from safetensors.torch import load_file
from test_fuse import FLUX, MODULES, delta, flux_lora, tiny, weights

from weightops.errors import FormatError, MemoryRefused, MismatchError, UsageError, ValueRefused
from weightops.files.checkpoint import open_checkpoint
from weightops.naming.identify import identify
from weightops.ops.fuse import fuse

sys.path.insert(0, str(Path(__file__).parents[1] / "naming"))

from tagged import from_canonical, needs_lists, shapes_of, to_canonical

if TYPE_CHECKING:
    from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CODES = [E4M3, E5M2]
ALL = [torch.float16, torch.bfloat16, *CODES]
PREFIX = "model.diffusion_model."
QKV = "double_blocks.0.img_attn.qkv"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def largest(codes: torch.dtype) -> float:
    return float(torch.finfo(codes).max)


def scale_of(tensors: dict[str, Tensor], key: str) -> Tensor | None:
    """The scale beside a weight, in either spelling."""
    stem = key.removesuffix("weight")
    return next((tensors[stem + e] for e in ("scale_weight", "weight_scale") if stem + e in tensors), None)


def value(tensors: dict[str, Tensor], key: str) -> Tensor:
    """What a reader sees, in float64."""
    scale = scale_of(tensors, key)
    return tensors[key].double() * (1.0 if scale is None else scale.double().reshape(()))


def quantise(
    tensors: dict[str, Tensor], keys: list[str], codes: torch.dtype, *, ending: str = "scale_weight",
    dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (), room: float = 1.0,
) -> dict[str, Tensor]:  # fmt: skip
    """These weights as codes with one scale each; room: how much larger than it need be."""
    found = dict(tensors)
    for key in keys:
        scale = (tensors[key].abs().max().double() / largest(codes) * room).to(dtype)
        found[key] = (tensors[key].float() / scale.float()).to(codes)
        found[key.removesuffix("weight") + ending] = scale.reshape(shape)
    return found


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def nearest_codes(codes: torch.dtype) -> Tensor:
    """Every finite value of the dtype."""
    table = torch.arange(256, dtype=torch.uint8).view(codes).double()
    return table[table.isfinite()].unique()


def assert_nearest(found: Tensor, exact: Tensor, scale: Tensor) -> None:
    """Each code is the nearest there is to the exact value, which float32 may miss by a hair."""
    table = nearest_codes(found.dtype)
    wanted = exact / scale.double().reshape(())
    place = torch.searchsorted(table, wanted.contiguous()).clamp(1, len(table) - 1)
    best = torch.minimum((table[place] - wanted).abs(), (table[place - 1] - wanted).abs())
    assert ((found.double() - wanted).abs() <= best + 1e-5 * wanted.abs() + 1e-9).all()


def layer(dtype: torch.dtype, *, scaled: bool, relative: float, size: int = 384) -> tuple[Tensor, Tensor]:
    """base.safetensors, one matrix of an unknown model, and lora.safetensors: its values, and what the LoRA adds."""
    generator = torch.Generator().manual_seed(1)
    base = {"proj.weight": 0.03 * torch.randn(size, size, generator=generator)}
    base = quantise(base, ["proj.weight"], dtype) if scaled else {"proj.weight": base["proj.weight"].to(dtype)}
    up, down = torch.randn(size, 8, generator=generator), torch.randn(8, size, generator=generator)
    before = value(base, "proj.weight")
    down *= relative * float(before.norm() / (up.double() @ down.double()).norm())
    save(Path("base.safetensors"), base)
    save(Path("lora.safetensors"), {"proj.lora_A.weight": down, "proj.lora_B.weight": up})
    return before, up.double() @ down.double()


def figures(added: Tensor, meant: Tensor) -> tuple[float, float]:
    return float((added * meant).sum() / meant.square().sum()), float((added - meant).norm() / meant.norm())


# ------------------------------------------------------------------------------------------------ what survives


@pytest.mark.parametrize("relative", [1e-2, 1e-3])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("dtype", "scaled"), [*((d, False) for d in ALL), *((d, True) for d in CODES)])
def test_both_figures_are_those_of_a_float64_computation(
    dtype: torch.dtype, scaled: bool, rounding: str, relative: float
) -> None:
    before, meant = layer(dtype, scaled=scaled, relative=relative)
    report = fuse("base.safetensors", "lora.safetensors", output="out.safetensors", rounding=rounding, verify=True)
    out = load_file("out.safetensors")
    assert out["proj.weight"].dtype is dtype
    survived, residual = figures(value(out, "proj.weight") - before, meant)
    assert report.details["survived"] == pytest.approx(survived, abs=5e-4)
    assert report.details["residual"] == pytest.approx(residual, rel=2e-3)
    if rounding == "stochastic":  # unbiased: off by what chance makes of so many values, at most
        assert survived == pytest.approx(1.0, abs=4 * residual / math.sqrt(meant.numel()))
    if scaled and rounding == "nearest":
        assert_nearest(out["proj.weight"], before + meant, out["proj.scale_weight"])


def test_a_weak_lora_half_survives_in_bf16_and_wholly_by_chance() -> None:
    before, meant = layer(torch.bfloat16, scaled=False, relative=1e-3)
    found = {}
    for rounding in ("nearest", "stochastic"):
        report = fuse("base.safetensors", "lora.safetensors", output="o.safetensors", rounding=rounding, force=True)
        found[rounding] = figures(load_file("o.safetensors")["proj.weight"].double() - before, meant)[0]
        assert report.details["survived"] == pytest.approx(found[rounding], abs=5e-4)
    assert 0.98 <= found["stochastic"] <= 1.02
    assert 0.4 <= found["nearest"] <= 0.65


@pytest.mark.parametrize(("dtype", "wider"), [(torch.bfloat16, "fp16"), (E4M3, "bf16")])
def test_what_is_said_names_the_dtype_and_the_ways_out(dtype: torch.dtype, wider: str) -> None:
    layer(dtype, scaled=dtype is E4M3, relative=1e-3)
    line = fuse("base.safetensors", "lora.safetensors", output="o.safetensors").details["line"]
    code = {torch.bfloat16: "BF16", E4M3: "F8_E4M3"}[dtype]
    assert f" % of the LoRA survived the rounding to {code}, residual " in line
    kept = float(line.partition(f". --dtype {wider} keeps ")[2].partition(" %")[0])
    assert kept > 90
    assert line.endswith("; --rounding stochastic keeps all of it on average, with more noise")
    made = fuse("base.safetensors", "lora.safetensors", output="o.safetensors", dtype=wider, force=True)
    assert made.details["survived"] == pytest.approx(kept / 100, abs=1e-3)


# ------------------------------------------------------------------------------------------------ a real layout


def scaled_flux(codes: torch.dtype = E4M3, **how: Any) -> dict[str, Tensor]:
    """BFL's names as ComfyUI has them, the matrices of the blocks in fp8 and all else in bf16."""
    base = {PREFIX + key: tensor for key, tensor in weights(tiny(FLUX), torch.bfloat16).items()}
    scaled = [k for k, t in base.items() if "_blocks." in k and k.endswith(".weight") and t.dim() == 2]
    found = quantise(base, scaled, codes, **how)
    found |= {f"{k.removesuffix('weight')}scale_input": torch.tensor(0.5) for k in scaled[:3]}
    return found | {f"{PREFIX}scaled_fp8": torch.zeros(2).to(codes)}


@needs_lists
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_scaled_flux_fuses_and_reads_back(codes: torch.dtype, ending: str, rounding: str) -> None:
    """Packed projections have one scale for all their parts; what no LoRA touches stays as it is, scales too."""
    base, lora = scaled_flux(codes, ending=ending), flux_lora(MODULES, size=0.001)
    save(Path("base.safetensors"), base)
    save(Path("lora.safetensors"), lora)
    report = fuse(
        "base.safetensors",
        "lora.safetensors:0.8",
        output="out.safetensors",
        rounding=rounding,
        verify=True,
        strict=True,
    )
    out = load_file("out.safetensors")
    assert {k: (t.dtype, t.shape) for k, t in out.items()} == {k: (t.dtype, t.shape) for k, t in base.items()}
    with open_checkpoint("out.safetensors") as opened:
        assert identify(opened.tensors).architecture == "flux"
    sums = [0.0, 0.0, 0.0]
    for module in MODULES:
        key = f"{PREFIX}{module}.weight"
        before, meant = value(base, key), 0.8 * delta(lora, module)
        added = value(out, key) - before
        parts = (meant.square(), added * meant, (added - meant).square())
        sums = [a + float(b.sum()) for a, b in zip(sums, parts, strict=True)]
        scale = scale_of(out, key)
        assert (scale is not None) == ("_blocks." in key)
        if scale is not None:
            room = largest(codes) * float(scale) / float((before + meant).abs().max())
            assert room == pytest.approx(1.0, abs=1e-6)
            if rounding == "nearest":
                assert_nearest(out[key], before + meant, scale)
    assert report.details["survived"] == pytest.approx(sums[1] / sums[0], abs=5e-4)
    assert report.details["residual"] == pytest.approx(math.sqrt(sums[2] / sums[0]), rel=2e-3)
    touched = {f"{PREFIX}{module}.{leaf}" for module in MODULES for leaf in ("weight", ending)}
    for key in base.keys() - touched:
        assert same_bytes(out[key], base[key]), key
    assert report.account.unused == []
    [group] = report.groups
    assert group["fused"] == len(touched & base.keys())
    assert touched & base.keys() <= set(report.account.used)
    assert {m["name"] for m in report.details["modules"]} >= {
        ", ".join(f"transformer.transformer_blocks.0.attn.to_{part}.weight" for part in "qkv")
    }


@needs_lists
def test_a_scaled_single_file_of_sdxl_fuses_under_kohya_names() -> None:
    """Three components in one file; the attention of the UNet and of a text encoder is scaled."""
    shapes = {k: tuple(n if n <= 8 else n // 32 for n in s) for k, s in shapes_of("sdmecha_sdxl-sgm").items()}
    base = weights({k: s for k, s in shapes.items() if all(s)}, torch.float16)
    scaled = [k for k, t in base.items() if ("attn" in k or "q_proj" in k) and k.endswith(".weight") and t.dim() == 2]
    base = quantise(base, scaled, E4M3, shape=(1,)) | {"scaled_fp8": torch.zeros(0).to(E4M3)}
    modules = {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q"
        ),
        "lora_te1_text_model_encoder_layers_3_self_attn_q_proj": (
            "conditioner.embedders.0.transformer.text_model.encoder.layers.3.self_attn.q_proj"
        ),
    }
    lora, generator = {}, torch.Generator().manual_seed(3)
    for name, module in modules.items():
        out, features = base[f"{module}.weight"].shape
        lora[f"{name}.lora_up.weight"] = torch.randn(out, 2, generator=generator) * 0.01
        lora[f"{name}.lora_down.weight"] = torch.randn(2, features, generator=generator)
    save(Path("base.safetensors"), base)
    save(Path("lora.safetensors"), lora)
    report = fuse("base.safetensors", "lora.safetensors", output="out.safetensors", verify=True)
    found = load_file("out.safetensors")
    assert report.account.unused == []
    for name, module in modules.items():
        key = f"{module}.weight"
        assert found[f"{module}.scale_weight"].shape == (1,)
        exact = value(base, key) + lora[f"{name}.lora_up.weight"].double() @ lora[f"{name}.lora_down.weight"].double()
        assert_nearest(found[key], exact, found[f"{module}.scale_weight"])
    changed = {k for k in base if not same_bytes(found[k], base[k])}
    assert changed == {f"{m}.{leaf}" for m in modules.values() for leaf in ("weight", "scale_weight")}


@needs_lists
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_bytes_do_not_depend_on_memory_or_threads(rounding: str) -> None:
    save(Path("base.safetensors"), scaled_flux())
    save(Path("lora.safetensors"), flux_lora(MODULES))
    made = []
    for memory, threads in ((20 << 20, 1), (256 << 20, 4)):
        fuse(
            "base.safetensors", "lora.safetensors", output="o.safetensors", rounding=rounding, memory=memory,
            threads=threads, force=True,
        )  # fmt: skip
        made.append(Path("o.safetensors").read_bytes())
    assert made[0] == made[1]
    with pytest.raises(MemoryRefused):
        fuse("base.safetensors", "lora.safetensors", output="no.safetensors", memory=2 << 20, rounding=rounding)


@needs_lists
def test_what_is_changed_in_part_takes_the_new_scale_as_a_whole() -> None:
    """A LoRA of one of three packed projections: the others are quantised anew, and their noise is in the residual."""
    base = scaled_flux(room=1.01)
    name, height = "transformer_blocks.0.attn.to_q", len(base[f"{PREFIX}{QKV}.weight"]) // 3
    features = base[f"{PREFIX}{QKV}.weight"].shape[1]
    up, down = torch.randn(height, 2) * 0.01, torch.randn(2, features)
    save(Path("base.safetensors"), base)
    save(Path("lora.safetensors"), {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up})
    report = fuse("base.safetensors", "lora.safetensors", output="out.safetensors", verify=True)
    out, key = load_file("out.safetensors"), f"{PREFIX}{QKV}.weight"
    meant = torch.zeros(3 * height, features, dtype=torch.float64)
    meant[:height] = up.double() @ down.double()
    assert_nearest(out[key], value(base, key) + meant, scale_of(out, key))
    survived, residual = figures(value(out, key) - value(base, key), meant)
    assert report.details["survived"] == pytest.approx(survived, abs=5e-4)
    assert report.details["residual"] == pytest.approx(residual, rel=2e-3)
    [row] = report.details["modules"]
    assert row["name"] == "transformer.transformer_blocks.0.attn.to_q.weight"


@needs_lists
def test_at_strength_nought_no_byte_changes() -> None:
    base = scaled_flux(room=1.3)
    save(Path("base.safetensors"), base)
    save(Path("lora.safetensors"), flux_lora(MODULES))
    for rounding in ("nearest", "stochastic"):
        fuse("base.safetensors", "lora.safetensors:0", output="out.safetensors", rounding=rounding, force=True,
             verify=True)  # fmt: skip
        for key, tensor in load_file("out.safetensors").items():
            assert same_bytes(tensor, base[key]), key


def test_a_change_that_needs_the_whole_matrix_is_made_on_its_values() -> None:
    """DoRA as kohya has it, of the norm of each column: the scale is that of the result."""
    layer(E4M3, scaled=True, relative=0.05, size=96)
    lora = load_file("lora.safetensors")
    up, down = lora["proj.lora_B.weight"], lora["proj.lora_A.weight"]
    base = load_file("base.safetensors")
    before = value(base, "proj.weight")
    magnitude = 1.2 * before.norm(dim=0, keepdim=True).float()
    save(
        Path("lora.safetensors"),
        {
            "lora_unet_proj.lora_up.weight": up, "lora_unet_proj.lora_down.weight": down,
            "lora_unet_proj.dora_scale": magnitude,
        },
    )  # fmt: skip
    fuse("base.safetensors", "lora.safetensors", output="out.safetensors", verify=True)
    out = load_file("out.safetensors")
    turned = before + up.double() @ down.double()
    exact = turned * magnitude.double() / turned.norm(dim=0, keepdim=True)
    assert_nearest(out["proj.weight"], exact, out["proj.scale_weight"])
    assert 448 * float(out["proj.scale_weight"]) == pytest.approx(float(exact.abs().max()), rel=1e-6)


@needs_lists
@pytest.mark.parametrize("dtype", ["keep", "fp32"])
def test_a_change_of_packed_weights_as_a_whole_is_made_on_their_values(dtype: str) -> None:
    """The same, where the norm is that of the queries, keys and values together; with its scale, and without."""
    base, lora = scaled_flux(), flux_lora([QKV])
    key = f"{PREFIX}{QKV}.weight"
    before, meant = value(base, key), delta(lora, QKV)
    magnitude = 1.1 * before.norm(dim=0, keepdim=True)
    lora["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"] = magnitude.float()
    save(Path("base.safetensors"), base)
    save(Path("lora.safetensors"), lora)
    fuse("base.safetensors", "lora.safetensors", output="out.safetensors", dtype=dtype, verify=True)
    out = load_file("out.safetensors")
    turned = before + meant
    exact = turned * magnitude / turned.norm(dim=0, keepdim=True)
    if dtype == "keep":
        assert_nearest(out[key], exact, out[f"{PREFIX}{QKV}.scale_weight"])
    else:
        assert torch.allclose(out[key].double(), exact, rtol=1e-5, atol=1e-8)


@needs_lists
def test_what_needs_several_scaled_weights_at_once_is_refused() -> None:
    base = to_canonical("flux_transformer", "original", weights(tiny(FLUX), torch.float32))
    base = {k: t.contiguous() for k, t in from_canonical("flux_transformer", "diffusers", base).items()}
    parts = [f"transformer_blocks.0.attn.to_{part}.weight" for part in "qkv"]
    lora = flux_lora([QKV])
    lora["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"] = torch.ones(1, base[parts[0]].shape[1])
    save(Path("base.safetensors"), quantise(base, parts[1:], E4M3))
    save(Path("lora.safetensors"), lora)
    with pytest.raises(MismatchError) as caught:
        fuse("base.safetensors", "lora.safetensors", output="out.safetensors")
    assert str(caught.value) == (
        "lora.safetensors: 'lora_unet_double_blocks_0_img_attn_qkv' needs more than one scaled weight at once, "
        "'transformer_blocks.0.attn.to_q.weight' among them"
    )


# ------------------------------------------------------------------------------------------------ scales


BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("codes", CODES)
def test_a_scale_is_the_least_of_its_own_dtype_that_holds_the_largest_value(
    dtype: torch.dtype, codes: torch.dtype
) -> None:
    """Rounded down, it would let the largest value overflow."""
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        base = {"proj.weight": torch.randn(16, 16, generator=generator)}
        base = quantise(base, ["proj.weight"], codes, dtype=dtype, room=1.02)
        up, down = torch.randn(16, 1, generator=generator), torch.randn(1, 16, generator=generator)
        save(Path("base.safetensors"), base)
        save(Path("lora.safetensors"), {"proj.lora_A.weight": down, "proj.lora_B.weight": up})
        fuse("base.safetensors", "lora.safetensors", output="out.safetensors", force=True, verify=True,
             rounding="stochastic" if number % 2 else "nearest")  # fmt: skip
        out = load_file("out.safetensors")
        scale, codes_out = out["proj.scale_weight"], out["proj.weight"].double()
        assert scale.dtype is dtype
        assert codes_out.isfinite().all()
        assert codes_out.abs().max() == largest(codes) or dtype is torch.float16  # whose small numbers are far apart
        top = float((value(base, "proj.weight") + up.double() @ down.double()).abs().max())
        below = (scale.view(BITS[dtype]) - 1).view(dtype)
        assert float(below) * (1 - 1e-6) < top / largest(codes) <= float(scale) * (1 + 1e-6)


def test_zeros_keep_their_scale() -> None:
    base = {
        "proj.weight": torch.zeros(8, 8).to(E4M3), "proj.scale_weight": torch.tensor(0.25),
        "other.weight": torch.ones(8, 8).to(E4M3), "other.scale_weight": torch.tensor(0.0),
    }  # fmt: skip
    lora = {}
    for name, size in (("proj", 0.0), ("other", 1.0)):
        lora |= {f"{name}.lora_A.weight": torch.ones(1, 8), f"{name}.lora_B.weight": torch.full((8, 1), size)}
    save(Path("base.safetensors"), base)
    save(Path("lora.safetensors"), lora)
    fuse("base.safetensors", "lora.safetensors", output="out.safetensors", verify=True)
    out = load_file("out.safetensors")
    assert out["proj.scale_weight"].item() == 0.25
    assert not out["proj.weight"].float().any()
    assert value(out, "other.weight").numpy() == pytest.approx(1.0, rel=1e-6)  # a scale of nothing is given one
    fuse("out.safetensors", "lora.safetensors:-1", output="back.safetensors", verify=True)
    assert value(load_file("back.safetensors"), "other.weight").abs().max() < 1e-6  # as far as float32 tells


def test_nan_is_refused_and_where_it_is_allowed_decides_no_scale() -> None:
    codes = torch.tensor([[0.0, math.nan], [0.0, 0.0]])
    base = {"proj.weight": codes.to(E4M3), "proj.scale_weight": torch.tensor(0.25)}
    save(Path("base.safetensors"), base)
    for size, least in ((0.0, 0.25), (44.8, 0.1)):
        lora = {"proj.lora_A.weight": torch.tensor([[1.0, 0.0]]), "proj.lora_B.weight": torch.tensor([[0.0], [size]])}
        save(Path("lora.safetensors"), lora)
        with pytest.raises(ValueRefused, match=r"tensor 'proj.weight' holds NaN or Inf"):
            fuse("base.safetensors", "lora.safetensors", output="no.safetensors")
        fuse("base.safetensors", "lora.safetensors", output="out.safetensors", allow_nonfinite=True, force=True)
        out = load_file("out.safetensors")
        assert float(out["proj.scale_weight"]) == pytest.approx(least, rel=1e-6)
        exact = [[0.0, math.nan], [size, 0.0]]
        assert value(out, "proj.weight").numpy() == pytest.approx(torch.tensor(exact).numpy(), rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("at", ["codes", "scale"])
def test_verify_sees_what_is_wrong_with_codes_and_scales(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import weightops.ops.produce as module

    layer(E4M3, scaled=True, relative=0.01, size=64)
    verify = module.verify

    def after_damage(plan: Any, path: Path, *, label: str) -> Any:
        with open_checkpoint(path) as written:
            info = written.tensors["proj.weight" if at == "codes" else "proj.scale_weight"]
        data = bytearray(path.read_bytes())
        data[info.start + (100 if at == "codes" else 1)] ^= 0x10
        path.write_bytes(data)
        return verify(plan, path, label=label)

    monkeypatch.setattr(module, "verify", after_damage)
    with pytest.raises(
        ValueRefused, match=r"tensor 'proj.weight' is .* units in the last place off its float64 reference"
    ):
        fuse("base.safetensors", "lora.safetensors", output="out.safetensors", verify=True)


def test_plain_codes_that_overflow_are_refused() -> None:
    save(Path("base.safetensors"), {"proj.weight": torch.full((4, 4), 440.0).to(E4M3)})
    lora = {"proj.lora_A.weight": torch.ones(1, 4), "proj.lora_B.weight": torch.full((4, 1), 100.0)}
    save(Path("lora.safetensors"), lora)
    for rounding in ("nearest", "stochastic"):
        with pytest.raises(ValueRefused) as caught:
            fuse("base.safetensors", "lora.safetensors", output="out.safetensors", rounding=rounding)
        assert str(caught.value) == "proj.weight: the result is too large for F8_E4M3, though every input is finite"
        assert caught.value.hint == "--dtype bf16 or --dtype fp32 can hold it"
    save(Path("base.safetensors"), quantise({"proj.weight": torch.full((4, 4), 440.0)}, ["proj.weight"], E4M3))
    fuse("base.safetensors", "lora.safetensors", output="out.safetensors", verify=True)
    assert value(load_file("out.safetensors"), "proj.weight").numpy() == pytest.approx(540.0, rel=1e-6)


# ------------------------------------------------------------------------------------------------ another dtype


@needs_lists
@pytest.mark.parametrize(("word", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_in_another_dtype_there_are_no_scales(word: str, dtype: torch.dtype) -> None:
    base, lora = scaled_flux(), flux_lora(MODULES[:3])
    blob = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    base[f"{PREFIX}{MODULES[1]}.comfy_quant"] = blob
    layers = {f"{PREFIX}{QKV}": {"format": "float8_e4m3fn"}}
    save(Path("base.safetensors"), base, {"_quantization_metadata": json.dumps({"layers": layers}), "title": "tiny"})
    save(Path("lora.safetensors"), lora)
    report = fuse(
        "base.safetensors", "lora.safetensors", output="out.safetensors", dtype=word, verify=True, strict=True
    )
    out = load_file("out.safetensors")
    marks = {k for k in base if k.endswith(("scale_input", "scaled_fp8", "comfy_quant"))}
    assert len(marks) == 5
    assert {u.key for u in report.account.unused} == marks
    scales = {k for k in base if k.endswith("scale_weight")}
    assert scales <= set(report.account.used)
    assert out.keys() == base.keys() - marks - scales
    [group] = report.groups
    assert group["dropped"] == len(marks | scales)
    for key, tensor in out.items():
        module = key.removeprefix(PREFIX).removesuffix(".weight")
        exact = value(base, key) + (delta(lora, module) if module in MODULES[:3] else 0.0)
        assert tensor.dtype is dtype
        assert torch.allclose(tensor.double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.001, atol=1e-8), key
    with safe_open("out.safetensors", "pt") as opened:
        assert opened.metadata()["title"] == "tiny"
        assert "_quantization_metadata" not in opened.metadata()
    fuse("base.safetensors", "lora.safetensors", output="keep.safetensors", verify=True)
    with safe_open("keep.safetensors", "pt") as opened:
        assert "_quantization_metadata" in opened.metadata()


def test_codes_without_their_scales_are_refused() -> None:
    layer(E4M3, scaled=True, relative=0.01, size=16)
    with pytest.raises(UsageError) as caught:
        fuse("base.safetensors", "lora.safetensors", output="out.safetensors", dtype="fp8_e5m2")
    assert str(caught.value) == (
        "--dtype: base.safetensors holds fp8 weights with scales, and fp8_e5m2 without a scale would lose what is small"
    )
    assert caught.value.hint == "--dtype keep writes new scales; fp16, bf16 and fp32 need none"


# ------------------------------------------------------------------------------------------------ refusals

F8 = ("F8_E4M3", [4, 4], bytes(16))
ONE = ("F32", [], bytes(4))


def said(text: str) -> tuple[str, list[int], bytes]:
    return ("U8", [len(text)], text.encode())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"p.weight": F8, "p.scale_weight": ("F32", [4, 1], bytes(16))},
            "'p.scale_weight' holds 4 scales of 'p.weight', expected one",
        ),
        (
            {"p.weight": F8, "p.weight_scale": ("U8", [1], bytes(1))},
            "'p.weight_scale' is U8, expected one of F64, F32, F16, BF16",
        ),
        (
            {"p.weight": ("I8", [4, 4], bytes(16)), "p.weight_scale": ONE},
            "'p.weight_scale' scales 'p.weight', which is I8, expected F8_E4M3 or F8_E5M2",
        ),
        (
            {"p.weight": ("F8_E4M3FNUZ", [4, 4], bytes(16)), "p.weight_scale": ONE},
            "'p.weight_scale' scales 'p.weight', which is F8_E4M3FNUZ, expected F8_E4M3 or F8_E5M2",
        ),
        ({"q.weight": F8, "p.weight_scale": ONE}, "'p.weight_scale' scales 'p.weight', which is not there"),
        (
            {"p.weight": F8, "p.scale_weight": ONE, "p.weight_scale": ONE},
            "'p.scale_weight' and 'p.weight_scale' both scale 'p.weight'",
        ),
        (
            {"p.weight": F8, "p.weight_scale_inv": ("F32", [1, 1], bytes(4))},
            "'p.weight_scale_inv' scales weights that mean nothing without it",
        ),
        (
            {"p.weight": ("U8", [8, 1], bytes(8)), "p.weight.absmax": ("F32", [1], bytes(4))},
            "'p.weight.absmax' scales weights that mean nothing without it",
        ),
        (
            {"p.weight": F8, "p.weight_scale_2": ONE},
            "'p.weight_scale_2' scales weights that mean nothing without it",
        ),
        (
            {"p.weight": F8, "p.weight_scale": ONE, "p.comfy_quant": said('{"format": "mxfp8"}')},
            """'p' holds codes of F8_E4M3 in the format '{"format": "mxfp8"}'""",
        ),
        (
            {"p.weight": F8, "p.weight_scale": ONE, "p.comfy_quant": said('{"format":"float8_e4m3fn","convrot":true}')},
            """'p' holds codes of F8_E4M3 in the format '{"format": "float8_e4m3fn", "convrot": true}'""",
        ),
        (
            {"p.weight": F8, "p.weight_scale": ONE, "p.comfy_quant": said('{"format": "float8_e5m2"}')},
            """'p' holds codes of F8_E4M3 in the format '{"format": "float8_e5m2"}'""",
        ),
    ],
)  # fmt: skip
def test_codes_of_any_other_kind_are_refused_by_name(
    tensors: dict[str, tuple[str, list[int], bytes]], message: str
) -> None:
    save_raw(Path("base.safetensors"), tensors)
    save(Path("lora.safetensors"), {"p.lora_A.weight": torch.ones(1, 4), "p.lora_B.weight": torch.ones(4, 1)})
    with pytest.raises(MismatchError) as caught:
        fuse("base.safetensors", "lora.safetensors", output="out.safetensors")
    assert str(caught.value) == f"base.safetensors: is quantised: {message}"
    assert caught.value.hint == "fuse into the fp16, bf16 or fp32 release instead"


def test_words_about_codes_that_cannot_be_read_are_refused() -> None:
    base = {"p.weight": F8, "p.weight_scale": ONE, "p.comfy_quant": said("{")}
    save_raw(Path("base.safetensors"), base)
    save(Path("lora.safetensors"), {"p.lora_A.weight": torch.ones(1, 4), "p.lora_B.weight": torch.ones(4, 1)})
    with pytest.raises(FormatError) as caught:
        fuse("base.safetensors", "lora.safetensors", output="out.safetensors")
    assert str(caught.value) == "base.safetensors: 'p.comfy_quant' is no JSON: b'{'"
    del base["p.comfy_quant"]
    words = json.dumps({"layers": {"p": {"format": "nvfp4"}}})
    save_raw(Path("base.safetensors"), base, {"_quantization_metadata": words})
    with pytest.raises(MismatchError, match="'p' holds codes of F8_E4M3 in the format"):
        fuse("base.safetensors", "lora.safetensors", output="out.safetensors")
