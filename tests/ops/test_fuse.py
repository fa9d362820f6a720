"""fuse: exactly what was asked is added, whatever the spelling; and how much of it survives is what is said."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import save
from safetensors.torch import load_file
from torch import Tensor

from weightops.errors import MismatchError, UsageError, WeightopsError
from weightops.ops.fuse import fuse, parse

sys.path.insert(0, str(Path(__file__).parents[1] / "naming"))

from tagged import from_canonical, needs_lists, shapes_of, to_canonical

FLUX = "orig_flux_dev_bfl"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tiny(name: str) -> dict[str, tuple[int, ...]]:
    """The list's names, every width a 32nd of the real one; blocks beyond the second are left out."""
    shapes = {k: tuple(n if n <= 8 else n // 32 for n in s) for k, s in shapes_of(name).items()}
    return {k: s for k, s in shapes.items() if not any(f"_blocks.{n}." in k for n in range(2, 40)) and all(s)}


def weights(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: (0.03 * torch.randn(shape, generator=generator)).to(dtype) for key, shape in shapes.items()}


def flux_lora(modules: list[str], *, rank: int = 4, alpha: float = 2.0, size: float = 0.02) -> dict[str, Tensor]:
    """kohya's names over BFL's modules, packed ones among them."""
    shapes, found = tiny(FLUX), {}
    generator = torch.Generator().manual_seed(7)
    for module in modules:
        out, features = shapes[f"{module}.weight"]
        name = "lora_unet_" + module.replace(".", "_")
        found[f"{name}.lora_down.weight"] = torch.randn(rank, features, generator=generator) * size
        found[f"{name}.lora_up.weight"] = torch.randn(out, rank, generator=generator)
        found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


MODULES = [
    "double_blocks.0.img_attn.qkv",
    "double_blocks.1.txt_mlp.2",
    "single_blocks.0.linear1",
    "single_blocks.1.linear2",
    "final_layer.adaLN_modulation.1",
    "img_in",
]


def delta(lora: dict[str, Tensor], module: str) -> Tensor:
    name = "lora_unet_" + module.replace(".", "_")
    up, down = (lora[f"{name}.lora_{side}.weight"].double() for side in ("up", "down"))
    return lora[f"{name}.alpha"].double() / len(down) * up @ down


@needs_lists
@pytest.mark.parametrize("spelling", ["original", "diffusers", "comfy"])
@pytest.mark.parametrize("strength", [0.5, -1.25])
def test_half_a_lora_adds_half_of_its_delta_in_every_spelling(spelling: str, strength: float) -> None:
    """Packed projections are split as the checkpoint needs it, and swapped halves find their places."""
    base, lora = weights(tiny(FLUX), torch.float32), flux_lora(MODULES)
    save(Path("lora.safetensors"), lora)
    canonical = to_canonical("flux_transformer", "original", base)
    own = {k: t.contiguous() for k, t in from_canonical("flux_transformer", spelling, canonical).items()}
    save(Path("base.safetensors"), own)
    report = fuse("base.safetensors", f"lora.safetensors:{strength}", output="out.safetensors", verify=True)
    back = to_canonical("flux_transformer", spelling, load_file("out.safetensors"))
    found = from_canonical("flux_transformer", "original", back)
    for key, tensor in base.items():
        module = key.removesuffix(".weight")
        expected = tensor.double() + (strength * delta(lora, module) if module in MODULES else 0.0)
        assert torch.allclose(found[key].double(), expected, rtol=0, atol=2e-7), key
        assert module in MODULES or torch.equal(found[key], tensor)
    assert report.account.unused == []
    assert set(lora) <= set(report.account.used)
    assert report.details["survived"] == pytest.approx(1.0, abs=1e-5)


@needs_lists
def test_fused_and_taken_out_again_it_is_the_checkpoint() -> None:
    base = weights(tiny(FLUX), torch.float32)
    save(Path("base.safetensors"), base)
    save(Path("lora.safetensors"), flux_lora(MODULES))
    fuse("base.safetensors", "lora.safetensors:0.8", output="out.safetensors")
    fuse("out.safetensors", "lora.safetensors:-0.8", output="back.safetensors")
    for key, tensor in load_file("back.safetensors").items():
        assert torch.allclose(tensor, base[key], rtol=0, atol=1e-6)


@needs_lists
def test_several_loras_add_up_in_any_order_and_any_memory() -> None:
    save(Path("base.safetensors"), weights(tiny(FLUX), torch.bfloat16))
    save(Path("a.safetensors"), flux_lora(MODULES))
    save(Path("b.safetensors"), flux_lora(MODULES[:3], rank=6, alpha=6.0))
    fuse("base.safetensors", "a.safetensors:0.5", "b.safetensors:0.25", output="one.safetensors")
    for memory, threads in ((32 << 20, 1), (256 << 20, 3)):
        fuse(
            "base.safetensors", "a.safetensors:0.5", "b.safetensors:0.25", output="two.safetensors",
            memory=memory, threads=threads, force=True,
        )  # fmt: skip
        assert Path("two.safetensors").read_bytes() == Path("one.safetensors").read_bytes()
    base, lora_a = load_file("base.safetensors"), load_file("a.safetensors")
    lora_b = load_file("b.safetensors")
    key = "double_blocks.0.img_attn.qkv"
    exact = base[f"{key}.weight"].double() + 0.5 * delta(lora_a, key) + 0.25 * delta(lora_b, key)
    found = load_file("one.safetensors")[f"{key}.weight"].double()
    assert ((found - exact).abs() <= 2.0**-8 * exact.abs()).all()  # one rounding, to the nearest


@needs_lists
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_survival_is_that_of_a_float64_computation(dtype: torch.dtype, rounding: str) -> None:
    base, lora = weights(tiny(FLUX), dtype), flux_lora(MODULES, size=3e-5)
    save(Path("base.safetensors"), base)
    save(Path("lora.safetensors"), lora)
    report = fuse("base.safetensors", "lora.safetensors", output="out.safetensors", rounding=rounding, seed=3)
    out = load_file("out.safetensors")
    sums = [0.0, 0.0, 0.0]
    for module in MODULES:
        key = f"{module}.weight"
        meant = delta(lora, module)
        added = out[key].double() - base[key].double()
        sums[0] += float(meant.square().sum())
        sums[1] += float((added * meant).sum())
        sums[2] += float((added - meant).square().sum())
    assert report.details["survived"] == pytest.approx(sums[1] / sums[0], abs=2e-4)
    assert report.details["residual"] == pytest.approx(math.sqrt(sums[2] / sums[0]), rel=2e-3)
    if rounding == "stochastic":
        assert report.details["survived"] == pytest.approx(1.0, abs=0.05)
    elif dtype is torch.bfloat16:
        assert report.details["survived"] < 0.9
        assert "--rounding stochastic" in report.details["line"]


@needs_lists
def test_stochastic_rounding_depends_on_the_seed_and_not_on_threads() -> None:
    save(Path("base.safetensors"), weights(tiny(FLUX), torch.bfloat16))
    save(Path("lora.safetensors"), flux_lora(MODULES))
    made = []
    for seed, threads in ((1, 1), (1, 4), (2, 1)):
        fuse(
            "base.safetensors", "lora.safetensors", output="o.safetensors", rounding="stochastic", seed=seed,
            threads=threads, force=True,
        )  # fmt: skip
        made.append(Path("o.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]


def test_an_unknown_architecture_takes_a_lora_by_its_own_names() -> None:
    base = {"layers.0.proj.weight": torch.randn(8, 6), "layers.0.proj.bias": torch.randn(8)}
    save(Path("base.safetensors"), base)
    up, down = torch.randn(8, 2), torch.randn(2, 6)
    save(Path("dotted.safetensors"), {"diffusion_model.layers.0.proj.lora_A.weight": down,
                                      "diffusion_model.layers.0.proj.lora_B.weight": up})  # fmt: skip
    save(Path("flat.safetensors"), {"lora_unet_layers_0_proj.lora_down.weight": down,
                                    "lora_unet_layers_0_proj.lora_up.weight": up})  # fmt: skip
    for lora in ("dotted.safetensors", "flat.safetensors"):
        fuse("base.safetensors", (lora, 0.5), output="out.safetensors", force=True)
        found = load_file("out.safetensors")
        assert torch.allclose(found["layers.0.proj.weight"], base["layers.0.proj.weight"] + 0.5 * up @ down, atol=1e-6)
        assert torch.equal(found["layers.0.proj.bias"], base["layers.0.proj.bias"])


@needs_lists
def test_what_the_checkpoint_lacks_is_named_and_nothing_used_is_an_error() -> None:
    shapes = {k: s for k, s in tiny(FLUX).items() if not k.startswith("img_in")}
    save(Path("base.safetensors"), weights(shapes, torch.float32))
    save(Path("lora.safetensors"), flux_lora(MODULES))
    report = fuse("base.safetensors", "lora.safetensors", output="out.safetensors")
    assert {u.key for u in report.account.unused} == {
        f"lora_unet_img_in.{e}" for e in ("alpha", "lora_down.weight", "lora_up.weight")
    }
    assert {u.reason for u in report.account.unused} == {"base.safetensors has no x_embedder"}
    with pytest.raises(WeightopsError):
        fuse("base.safetensors", "lora.safetensors", output="strict.safetensors", strict=True)
    save(Path("only.safetensors"), flux_lora(["img_in"]))
    with pytest.raises(MismatchError, match=r"changes nothing of base\.safetensors: the result would be a copy"):
        fuse("base.safetensors", "only.safetensors", output="none.safetensors")
    assert not Path("strict.safetensors").exists()
    assert not Path("none.safetensors").exists()


@needs_lists
def test_a_lora_of_other_shapes_or_for_another_model_is_refused() -> None:
    base = weights(tiny(FLUX), torch.float32)
    save(Path("base.safetensors"), base)
    lora = flux_lora(MODULES)
    lora["lora_unet_img_in.lora_up.weight"] = torch.randn(5, 4)
    save(Path("lora.safetensors"), lora)
    with pytest.raises(MismatchError, match=r"does not fit img_in\.weight"):
        fuse("base.safetensors", "lora.safetensors", output="out.safetensors")
    module = "lora_unet_down_blocks_0_attentions_0_proj_in"
    factors = {"down": torch.randn(4, 320, 1, 1), "up": torch.randn(320, 4, 1, 1)}
    save(Path("sd.safetensors"), {f"{module}.lora_{side}.weight": tensor for side, tensor in factors.items()})
    with pytest.raises(MismatchError, match=r"is for sd15, but base\.safetensors is flux"):
        fuse("base.safetensors", "sd.safetensors", output="out.safetensors")


@pytest.mark.parametrize(
    ("text", "file", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-.5", "a.safetensors", -0.5),
        ("C:/a.safetensors", "C:/a.safetensors", 1.0),
        ("C:/a.safetensors:2", "C:/a.safetensors", 2.0),
        ("hf://o/n@r/a.safetensors:1e-1", "hf://o/n@r/a.safetensors", 0.1),
    ],
)
def test_a_strength_stands_after_a_colon_and_a_drive_letter_is_none(text: str, file: str, strength: float) -> None:
    assert parse(text) == (file, strength)


def test_strengths_are_finite_numbers() -> None:
    with pytest.raises(UsageError, match="found strength nan, expected a finite number"):
        parse(("a.safetensors", math.nan))
