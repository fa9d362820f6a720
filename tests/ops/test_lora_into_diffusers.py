"""What convert writes for diffusers and PEFT is what they load: tiny models of the real classes, fused, ΔW compared."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from loras import Maker, convert, delta, deltas, metadata_of, named, save, tensors_of
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import BaseTunerLayer

    _EAGER = (  # imported when first asked for
        transformers.CLIPTextModel, diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline,
        diffusers.FluxPipeline, diffusers.WanPipeline, diffusers.QwenImagePipeline, diffusers.ZImagePipeline,
    )  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

pytestmark = [
    # PEFT warns of target_modules where it is told by a state dict, and of its own renaming.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


def clip(width: int, projected: bool = False) -> Any:
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(
        transformers.CLIPTextConfig(
            vocab_size=64, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16, projection_dim=width, bos_token_id=0, eos_token_id=1,
        )
    ).eval()  # fmt: skip


def sd15() -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8, 16, 16), cross_attention_dim=12, attention_head_dim=4,
        norm_num_groups=4,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=clip(16), tokenizer=None, unet=unet, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl() -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16, 16), cross_attention_dim=12, attention_head_dim=(1, 2, 2),
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        transformer_layers_per_block=(1, 1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=None, text_encoder=clip(16), text_encoder_2=clip(32, projected=True), tokenizer=None, tokenizer_2=None,
        unet=unet, scheduler=diffusers.EulerDiscreteScheduler(),
    )  # fmt: skip


def flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), in_channels=4, guidance_embeds=True,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip


def wan() -> Any:
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2
    )
    return diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
    )  # fmt: skip


def qwen_image() -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        transformer=transformer,
    )  # fmt: skip


def z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 4, 8], axes_lens=[16, 16, 16],
    )  # fmt: skip
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        transformer=transformer,
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "flux": flux,
    "wan": wan,
    "qwen_image": qwen_image,
    "z_image": z_image,
}
# Chroma's blocks are called as Flux' are.
SAID = {"flux": {"architecture": "flux"}}


def layers(pipeline: Any) -> Iterator[tuple[str, str, nn.Linear | nn.Conv2d]]:
    """Component, name within it, and module, of all that a LoRA may be for."""
    for component in COMPONENTS:
        model = getattr(pipeline, component, None)
        for name, module in model.named_modules() if model is not None else ():
            if isinstance(module, nn.Linear | nn.Conv2d):
                yield component, name, module


def written_name(component: str, name: str) -> str:
    """transformers ≥ 5.6 calls a CLIP's modules without "text_model.": files have it."""
    flattened = component.startswith("text_encoder") and not name.startswith("text_")
    return f"{component}.text_model.{name}" if flattened else f"{component}.{name}"


def made(
    pipeline: Any, alphas: tuple[float, ...] = (1.0, 4.0, 0.5, 6.0), only: str = ""
) -> tuple[dict[str, dict[str, Tensor]], dict[tuple[str, str], Tensor]]:
    """A LoRA of all these layers, of several ranks and alphas; and the ΔW that each should get."""
    maker, found, wanted = Maker(1), {}, {}
    for number, (component, name, module) in enumerate(layers(pipeline)):
        if only not in name and not component.startswith("text_encoder"):
            continue
        out, features, *kernel = module.weight.shape
        alpha = alphas[number % len(alphas)]
        parts = maker.lora(out, features, (2, 3, 4)[number % 3], alpha, kernel)
        found[written_name(component, name)] = parts
        plain = {"down": parts[".lora_down.weight"], "up": parts[".lora_up.weight"]}
        wanted[component, name] = delta(plain, alpha)
    return found, wanted


def fused(pipeline: Any, path: Path) -> dict[tuple[str, str], Tensor]:
    """How diffusers changes each layer's weight, in float32, when it loads and fuses the file."""
    before = {(c, n): m.weight.detach().clone() for c, n, m in layers(pipeline)}
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    pipeline.fuse_lora(components=[c for c in COMPONENTS if getattr(pipeline, c, None) is not None])
    pipeline.unload_lora_weights()
    return {(c, n): m.weight.detach().double() - before[c, n].double() for c, n, m in layers(pipeline)}


def assert_changed(found: Mapping[Any, Tensor], wanted: Mapping[Any, Tensor]) -> None:
    assert wanted
    for place, change in found.items():
        right = wanted.get(place, torch.zeros_like(change))
        error = (change - right).abs().max() / max(1.0, float(right.abs().max()))
        assert error < 1e-6, f"{place}: {error}"
    assert found.keys() >= wanted.keys()


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """transformers and diffusers log what is not there."""
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.mark.parametrize("alpha", ["carry", "fold"])
@pytest.mark.parametrize("architecture", PIPELINES)
def test_diffusers_fuses_what_is_written_for_it(architecture: str, alpha: str, tmp_path: Path) -> None:
    pipeline = PIPELINES[architecture]()
    modules, wanted = made(pipeline)
    source = save(tmp_path / "lora.safetensors", named(modules))
    convert(source, "diffusers", tmp_path / "out.safetensors", alpha=alpha, **SAID.get(architecture, {}))
    assert ("lora_adapter_metadata" in metadata_of(tmp_path / "out.safetensors")) == (alpha == "carry")
    assert_changed(fused(pipeline, tmp_path / "out.safetensors"), wanted)


def test_a_wrong_alpha_would_be_seen(tmp_path: Path) -> None:
    pipeline = wan()
    modules, wanted = made(pipeline)
    source = save(tmp_path / "lora.safetensors", named(modules))
    convert(source, "diffusers", tmp_path / "out.safetensors")
    told = json.loads(metadata_of(tmp_path / "out.safetensors")["lora_adapter_metadata"])
    some = next(iter(told["transformer.alpha_pattern"]))
    told["transformer.alpha_pattern"][some] *= 1.001
    changed = {"lora_adapter_metadata": json.dumps(told)}
    save(tmp_path / "out.safetensors", tensors_of(tmp_path / "out.safetensors"), changed)
    with pytest.raises(AssertionError, match="transformer"):
        assert_changed(fused(pipeline, tmp_path / "out.safetensors"), wanted)


# Of Wan diffusers looks at blocks alone in kohya's names; Z-Image's fused `attention.qkv` with lora_A it does not know.
@pytest.mark.parametrize(
    ("architecture", "to", "only"),
    [
        ("sd15", "kohya", ""), ("sdxl", "kohya", ""), ("wan", "kohya", "blocks"), ("qwen_image", "kohya", ""),
        ("z_image", "kohya", ""), ("wan", "comfy", "blocks"), ("qwen_image", "comfy", ""),
    ],
)  # fmt: skip
def test_diffusers_fuses_kohyas_and_comfys_names_where_it_reads_them(
    architecture: str, to: str, only: str, tmp_path: Path
) -> None:
    pipeline = PIPELINES[architecture]()
    # Of several alphas in one file of Stable Diffusion diffusers loses those of attentions: see below.
    modules, wanted = made(pipeline, (1.5,) if architecture.startswith("sd") else (1.0, 4.0, 0.5, 6.0), only)
    source = save(tmp_path / "lora.safetensors", named(modules))
    convert(source, to, tmp_path / "out.safetensors")
    assert_changed(fused(pipeline, tmp_path / "out.safetensors"), wanted)


def test_diffusers_itself_loses_alphas_of_attentions_in_kohyas_names(tmp_path: Path) -> None:
    """Its patterns keep `processor.to_k_lora.down.weight`; once mended, several alphas belong into the test above."""
    pipeline = sd15()
    modules, _ = made(pipeline)
    source = save(tmp_path / "lora.safetensors", named(modules))
    convert(source, "kohya", tmp_path / "out.safetensors")
    with pytest.raises(RuntimeWarning, match=r"alpha_pattern keys did not match.*to_k_lora\.down"):
        fused(pipeline, tmp_path / "out.safetensors")


@pytest.mark.parametrize("architecture", ["sd15", "flux"])
def test_diffusers_normalises_magnitudes_as_they_were_meant(architecture: str, tmp_path: Path) -> None:
    """DoRA: W' = m (W + sΔ) / ‖W + sΔ‖, a norm for each output. Source: Liu et al. 2024, arXiv:2402.09353."""
    pipeline = PIPELINES[architecture]()
    for encoder in ("text_encoder", "text_encoder_2"):
        setattr(pipeline, encoder, None)
    modules, wanted = made(pipeline)
    maker = Maker(2)
    goals = {}
    for component, name, module in layers(pipeline):
        weight = module.weight.detach().double()
        magnitude = maker(len(weight)).abs() + 0.1
        modules[f"{component}.{name}"][".dora_scale"] = magnitude.reshape(-1, *[1] * (weight.dim() - 1))
        turned = weight + wanted[component, name]
        norm = turned.flatten(1).norm(dim=1)
        goals[component, name] = turned * (magnitude / norm).reshape(-1, *[1] * (weight.dim() - 1)) - weight
    source = save(tmp_path / "lora.safetensors", named(modules))
    convert(source, "diffusers", tmp_path / "out.safetensors", **SAID.get(architecture, {}))
    found = fused(pipeline, tmp_path / "out.safetensors")
    for place, goal in goals.items():
        assert torch.allclose(found[place], goal, atol=1e-5), place


# ------------------------------------------------------------------------------------------------ PEFT


def changes_of(model: Any) -> dict[str, Tensor]:
    """What PEFT's layers add to the weights."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


@pytest.mark.parametrize("architecture", ["sd15", "flux", "wan", "z_image"])
def test_peft_loads_the_folder(architecture: str, tmp_path: Path) -> None:
    pipeline = PIPELINES[architecture]()
    modules, wanted = made(pipeline)
    source = save(tmp_path / "lora.safetensors", named(modules))
    convert(source, "peft", tmp_path / "out", **SAID.get(architecture, {}))
    for component in dict.fromkeys(component for component, _ in wanted):
        several = (tmp_path / "out" / component).is_dir()
        folder = tmp_path / "out" / component if several else tmp_path / "out"
        if component == "text_encoder":
            # transformers ≥ 5.6 itself knows that files have its "text_model."; PEFT alone does not, and only warns.
            loaded = getattr(pipeline, component)
            loaded.load_adapter(str(folder), adapter_name="default")
        else:
            loaded = peft.PeftModel.from_pretrained(getattr(pipeline, component), str(folder))
        goals = {name: change for (place, name), change in wanted.items() if place == component}
        found = changes_of(loaded)
        assert found.keys() == goals.keys()
        assert_changed(found, goals)


def trained(config: Any, folder: Path) -> dict[str, Tensor]:
    """An adapter as PEFT saves it, of random values; and what PEFT says that it changes."""
    torch.manual_seed(3)
    model = peft.get_peft_model(flux().transformer, config)
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in ("lora_", "hada_", "lokr_")):
            nn.init.normal_(parameter)
    model.save_pretrained(str(folder))
    return changes_of(model)


CONFIGS = {
    "alpha for all": {"r": 4, "lora_alpha": 8},
    "rank-stabilised": {"r": 5, "lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 2, "^single_transformer_blocks.0.attn.to_k": 3},
        "alpha_pattern": {"attn.to_q": 5, "^proj_out": 1, "transformer_blocks.0.attn.to_out.0": 0.1},
    },
    "expressions": {
        "r": 4, "lora_alpha": 8,
        "alpha_pattern": {r"single_transformer_blocks\.\d+\.attn\.(to_q|to_k)": 2, r"^transformer_blocks.*to_v": 3},
    },
}  # fmt: skip


@pytest.mark.parametrize("to", ["diffusers", "comfy", "onetrainer", "peft"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_that_peft_saved_means_the_same_elsewhere(name: str, to: str, tmp_path: Path) -> None:
    targets = r"(.*\.(to_q|to_k|to_v|to_out\.0|proj_mlp|norm\.linear|ff\.net\.0\.proj)|proj_out)"
    wanted = trained(peft.LoraConfig(target_modules=targets, **CONFIGS[name]), tmp_path / "saved")
    out = tmp_path / ("out" if to == "peft" else "out.safetensors")
    convert(tmp_path / "saved", "diffusers", tmp_path / "split.safetensors", architecture="flux")
    found = deltas(tmp_path / "split.safetensors")
    assert_changed({k.removeprefix("transformer."): v for k, v in found.items()}, wanted)
    if to == "diffusers":
        return
    # There and back: packs joined and taken apart keep ΔW.
    convert(tmp_path / "saved", to, out, architecture="flux")
    convert(out, "diffusers", tmp_path / "back.safetensors", architecture="flux")
    found = deltas(tmp_path / "back.safetensors")
    assert_changed({k.removeprefix("transformer."): v for k, v in found.items()}, wanted)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(
            r=3, alpha=2, target_modules=["to_q", "norm.linear"], rank_pattern={"to_q": 2}, init_weights=False
        ),
        peft.LoKrConfig(r=2, alpha=3, target_modules=["to_q", "norm.linear"], decompose_factor=4, init_weights=False),
        peft.LoKrConfig(r=1, alpha=3, target_modules=["to_q", "proj_mlp"], decompose_both=True, init_weights=False),
        peft.LoKrConfig(r=16, alpha=16, target_modules=["to_q", "proj_mlp"], init_weights=False),
    ],
    ids=["LoHa", "LoKr", "LoKr of both", "LoKr, whole"],
)
def test_other_families_of_peft_go_through_other_dialects_and_back(config: Any, tmp_path: Path) -> None:
    wanted = trained(config, tmp_path / "saved")
    convert(tmp_path / "saved", "diffusers", tmp_path / "out.safetensors", architecture="flux")
    assert_changed({k.removeprefix("transformer."): v for k, v in deltas(tmp_path / "out.safetensors").items()}, wanted)
    report = convert(tmp_path / "out.safetensors", "peft", tmp_path / "back", architecture="flux")
    assert not report.warnings
    loaded = peft.PeftModel.from_pretrained(flux().transformer, str(tmp_path / "back"))
    assert_changed(changes_of(loaded), wanted)


def test_diffusers_loads_kronecker_products_whose_alpha_is_folded(tmp_path: Path) -> None:
    """Of Z-Image and Flux.2, it takes LoKr in its own names without alphas, and makes their settings from shapes."""
    pipeline = z_image()
    maker = Maker(5)
    modules = {
        f"diffusion_model.layers.{n}.attention.to_{name}": {
            ".lokr_w1": maker(4, 4), ".lokr_w2_a": maker(8, 2), ".lokr_w2_b": maker(2, 8), ".alpha": torch.tensor(1.0),
        }
        for n in range(2) for name in ("q", "k", "v")
    }  # fmt: skip
    source = save(tmp_path / "lora.safetensors", named(modules))
    report = convert(source, "diffusers", tmp_path / "carried.safetensors")
    assert report.warnings == ["diffusers itself loads LoKr of this model without alphas: --alpha fold"]
    report = convert(source, "diffusers", tmp_path / "out.safetensors", alpha="fold")
    assert not report.warnings
    wanted = {("transformer", k.removeprefix("diffusion_model.")): change for k, change in deltas(source).items()}
    pipeline.load_lora_weights(str(tmp_path), weight_name="out.safetensors", adapter_name="default")
    found = {("transformer", name): change for name, change in changes_of(pipeline.transformer).items()}
    assert_changed(found, wanted)
