"""fuse: exactly what was asked is added, whatever the spelling; and how much of it survives is what is said."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import save
from safetensors.torch import load_file
from torch import Tensor

from weightops.errors import Interrupted, MismatchError, OutputError, UsageError, WeightopsError
from weightops.files.checkpoint import open_checkpoint
from weightops.naming.identify import identify
from weightops.ops import produce
from weightops.ops.fuse import fuse, parse
from weightops.ops.fuse_plan import Wish, plan_fuse

sys.path.insert(0, str(Path(__file__).parents[1] / "naming"))

from tagged import from_canonical, needs_lists, shapes_of, to_canonical

if TYPE_CHECKING:
    from weightops.plan import Plan

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


# ------------------------------------------------------------------------------------------------ every key


def small(*, bias: bool = True) -> dict[str, Tensor]:
    found = {"layers.0.proj.weight": torch.randn(8, 6)}
    return {**found, "layers.0.proj.bias": torch.randn(8)} if bias else found


def small_lora(
    name: str = "lora_unet_layers_0_proj", down: str = "lora_down", up: str = "lora_up"
) -> dict[str, Tensor]:
    return {f"{name}.{down}.weight": torch.randn(2, 6), f"{name}.{up}.weight": torch.randn(8, 2)}


@pytest.mark.parametrize("family", ["diff", "lora"])
def test_of_a_module_without_its_bias_the_weight_is_used_and_the_bias_is_not(family: str) -> None:
    save(Path("base.safetensors"), small(bias=False))
    bias, lora = {
        "diff": ("lora_unet_layers_0_proj.diff_b", {"lora_unet_layers_0_proj.diff": torch.randn(8, 6)}),
        "lora": (
            "base_model.model.layers.0.proj.lora_B.bias",
            small_lora("base_model.model.layers.0.proj", "lora_A", "lora_B"),
        ),
    }[family]
    save(Path("lora.safetensors"), {**lora, bias: torch.randn(8)})
    report = fuse("base.safetensors", "lora.safetensors", output="out.safetensors")
    assert not torch.equal(load_file("out.safetensors")["layers.0.proj.weight"],
                           load_file("base.safetensors")["layers.0.proj.weight"])  # fmt: skip
    assert [(u.key, u.reason) for u in report.account.unused] == [(bias, "base.safetensors has no layers.0.proj.bias")]
    assert set(lora) <= set(report.account.used)
    assert report.warnings
    with pytest.raises(MismatchError, match=f"--strict: 1 tensor would not be used: '{bias}'"):
        fuse("base.safetensors", "lora.safetensors", output="strict.safetensors", strict=True)


def clip(start: str) -> dict[str, Tensor]:
    """A tiny CLIP's names, all of them after `start`."""
    base = {}
    for layer in range(2):
        at = f"{start}.encoder.layers.{layer}"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            base |= {f"{at}.{name}.weight": torch.randn(16, 16), f"{at}.{name}.bias": torch.randn(16)}
        for name, (out, features) in {"mlp.fc1": (32, 16), "mlp.fc2": (16, 32)}.items():
            base |= {f"{at}.{name}.weight": torch.randn(out, features), f"{at}.{name}.bias": torch.randn(out)}
        for name in ("layer_norm1", "layer_norm2"):
            base |= {f"{at}.{name}.weight": torch.randn(16), f"{at}.{name}.bias": torch.randn(16)}
    base |= {f"{start}.final_layer_norm.{leaf}": torch.randn(16) for leaf in ("weight", "bias")}
    base |= {f"{start}.embeddings.{n}_embedding.weight": torch.randn(77, 16) for n in ("token", "position")}
    return base


@needs_lists
def test_of_a_packed_projection_a_module_that_is_not_there_is_named() -> None:
    base = weights(tiny(FLUX), torch.float32)
    own = from_canonical("flux_transformer", "diffusers", to_canonical("flux_transformer", "original", base))
    lost = "transformer_blocks.0.attn.to_v"
    save(Path("base.safetensors"), {k: t.contiguous() for k, t in own.items() if not k.startswith(f"{lost}.")})
    save(Path("lora.safetensors"), flux_lora(["double_blocks.0.img_attn.qkv"]))
    report = fuse("base.safetensors", "lora.safetensors", output="out.safetensors")
    assert report.warnings == [
        "lora.safetensors: a part of lora_unet_double_blocks_0_img_attn_qkv is not used: "
        f"base.safetensors has no {lost}.weight"
    ]
    with pytest.raises(MismatchError, match="--strict: lora\\.safetensors: a part of lora_unet_double"):
        fuse("base.safetensors", "lora.safetensors", output="x.safetensors", strict=True)


def test_a_known_part_of_an_unknown_model_is_written_once() -> None:
    """Its text encoder has canonical names too; by these it would be copied over what was fused."""
    start = "cond_stage_model.transformer.text_model"
    base = {"model.diffusion_model.strange.proj.weight": torch.randn(8, 6), **clip(start)}
    save(Path("base.safetensors"), base)
    module = f"{start}.encoder.layers.0.self_attn.q_proj"
    up, down = torch.randn(16, 2), torch.randn(2, 16)
    save(Path("lora.safetensors"), {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up})
    opened, lora = open_checkpoint("base.safetensors"), open_checkpoint("lora.safetensors")
    with opened, lora:
        assert identify(opened.tensors).architecture is None
        assert identify(opened.tensors).parts["text_encoder"].match is not None
        planned, _ = plan_fuse(opened, [lora], Wish(lambda *_: 1.0))
    filled = [slot.key for task in planned.plan.tasks for slot in task.outputs]
    assert sorted(filled) == sorted(base)
    fuse("base.safetensors", "lora.safetensors", output="out.safetensors")
    found = load_file("out.safetensors")[f"{module}.weight"]
    assert torch.allclose(found, base[f"{module}.weight"] + up @ down, atol=1e-5)


def test_a_lora_of_other_models_is_refused_with_no_word_of_options_that_fuse_lacks() -> None:
    save(Path("clip.safetensors"), clip("text_model"))
    module = "text_model.encoder.layers.0.self_attn.q_proj"
    save(Path("lora.safetensors"), {f"{module}.lora_A.weight": torch.randn(2, 16),
                                    f"{module}.lora_B.weight": torch.randn(16, 2)})  # fmt: skip
    with pytest.raises(MismatchError, match=r"is for one of flux, .*, but clip\.safetensors is clip") as caught:
        fuse("clip.safetensors", "lora.safetensors", output="out.safetensors")
    assert caught.value.hint is None


def test_a_lora_that_names_a_module_in_two_ways_is_refused() -> None:
    save(Path("base.safetensors"), small())
    other = small_lora("diffusion_model.layers.0.proj", "lora_A", "lora_B")
    save(Path("lora.safetensors"), {**small_lora(), **other})
    with pytest.raises(MismatchError, match=r"lora\.safetensors: 'diffusion_model\.layers\.0\.proj' and "
                       r"'lora_unet_layers_0_proj' both change layers\.0\.proj"):  # fmt: skip
        fuse("base.safetensors", "lora.safetensors", output="out.safetensors")
    save(Path("one.safetensors"), small_lora())
    fuse("base.safetensors", "one.safetensors:0.5", "one.safetensors:0.5", output="twice.safetensors")
    fuse("base.safetensors", "one.safetensors", output="once.safetensors")
    once, twice = (load_file(f"{name}.safetensors")["layers.0.proj.weight"] for name in ("once", "twice"))
    assert torch.allclose(once, twice, atol=1e-6)


def test_a_strength_for_text_encoders_that_changes_nothing_is_said() -> None:
    save(Path("base.safetensors"), small())
    save(Path("lora.safetensors"), small_lora())
    report = fuse("base.safetensors", "lora.safetensors", text_encoder=0.0, output="out.safetensors")
    said = "--text-encoder changes nothing: no LoRA here is known to change a text encoder"
    assert report.warnings == [said]


# ------------------------------------------------------------------------------------------------ embeddings


def bundle() -> dict[str, Tensor]:
    return {**small_lora(), "bundle_emb.cat.string_to_param.*": torch.randn(2, 4)}


def test_embeddings_that_are_copied_out_are_used_also_when_strict() -> None:
    save(Path("base.safetensors"), small())
    save(Path("lora.safetensors"), bundle())
    with pytest.raises(MismatchError, match="--strict"):
        fuse("base.safetensors", "lora.safetensors", output="out.safetensors", strict=True)
    report = fuse("base.safetensors", "lora.safetensors", output="out.safetensors", strict=True, embeddings="words")
    assert report.account.unused == []
    assert "bundle_emb.cat.string_to_param.*" in report.account.copied
    assert list(load_file("words/cat.safetensors")) == ["emb_params"]


@pytest.mark.parametrize("output", ["words/model.safetensors", "out.safetensors"])
def test_no_folder_of_embeddings_replaces_what_belongs_to_the_work(output: str) -> None:
    """With --force the folder would be replaced by one of embeddings alone."""
    Path("words").mkdir()
    base = Path("words/model.safetensors") if output == "out.safetensors" else Path("base.safetensors")
    save(base, small())
    save(Path("lora.safetensors"), bundle())
    with pytest.raises(UsageError, match=r"--embeddings: 'words' holds 'words/model\.safetensors'"):
        fuse(base, "lora.safetensors", output=output, embeddings="words", force=True)
    assert base.exists()


@pytest.mark.parametrize(
    "error",
    [OutputError("words", "no room"), KeyboardInterrupt(), Interrupted("", "interrupted: nothing was written")],
    ids=lambda e: type(e).__name__,
)
def test_an_error_after_the_output_is_written_says_so(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    save(Path("base.safetensors"), small())
    save(Path("lora.safetensors"), bundle())
    inner = produce.run

    def fails_then(plan: Plan, output: Path, **words: Any) -> Any:
        if plan.files:
            raise error
        return inner(plan, output, **words)

    monkeypatch.setattr(produce, "run", fails_then)
    with pytest.raises((WeightopsError, Interrupted), match=r"'out\.safetensors' is written, and whole"):
        fuse("base.safetensors", "lora.safetensors", output="out.safetensors", embeddings="words")
    assert Path("out.safetensors").exists()
    assert not Path("words").exists()
