"""Tiny pipelines of the real classes, and their weights in a single file, written through our tables."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import save

sys.path.insert(0, str(Path(__file__).parents[1] / "naming"))
from tagged import from_canonical

from weightops.diffusion import tiny
from weightops.naming.keymap import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    # Its text encoders and pipelines, which the libraries import when they are first asked for.
    _EAGER = (transformers.CLIPTextModel, diffusers.StableDiffusionXLPipeline, diffusers.StableDiffusionPipeline)
torch.set_num_threads(1)

UNETS: dict[str, Mapping[str, Any]] = {
    **tiny.UNETS,
    "sdxl_refiner": {
        **tiny.UNETS["sdxl"], "block_out_channels": (64, 64, 64, 64), "attention_head_dim": (1, 1, 1, 1),
        "cross_attention_dim": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 1, "projection_class_embeddings_input_dim": 128 + 5 * 256,
    },
}  # fmt: skip
SCALING = {"sd15": 0.18215, "sd2": 0.18215, "sdxl": 0.13025, "sdxl_refiner": 0.13025}
PIPELINES = {
    "sd15": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl_refiner": "StableDiffusionXLImg2ImgPipeline",
}


def _text(width: int, act: str, *, projected: bool = False, layers: int = 2) -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=width * 2, num_hidden_layers=layers, num_attention_heads=width // 64,
        vocab_size=514, max_position_embeddings=77, projection_dim=width, hidden_act=act, bos_token_id=0,
        eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    made = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return made(config).eval()


def pipeline(name: str, folder: Path, **unet: Any) -> Any:
    """A pipeline of random weights, and `folder` for what is made of it; unet: what its configuration has otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4, sample_size=64,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, layers_per_block=2, norm_num_groups=32,
        scaling_factor=SCALING[name],
    )  # fmt: skip
    parts: dict[str, Any] = {
        "unet": diffusers.UNet2DConditionModel(**{**UNETS[name], **unet}).eval(),
        "vae": vae.eval(),
        "scheduler": scheduler(name),
    }
    words = tiny.letters()
    if name in ("sd15", "sd2"):
        encoder = _text(64, "quick_gelu" if name == "sd15" else "gelu")
        parts |= {"text_encoder": encoder, "tokenizer": words, "safety_checker": None, "feature_extractor": None}
        parts |= {"requires_safety_checker": False}
    else:
        base = name == "sdxl"
        parts |= {"text_encoder": _text(64, "quick_gelu") if base else None, "tokenizer": words if base else None}
        parts |= {"text_encoder_2": _text(128, "gelu", projected=True), "tokenizer_2": words}
        parts |= {"add_watermarker": False} | (
            {} if base else {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
        )
    return getattr(diffusers, PIPELINES[name])(**parts)


def scheduler(name: str) -> Any:
    """The one that our tables name for the architecture."""
    named = ARCHITECTURES.get(name).pipeline
    assert named is not None
    return getattr(diffusers, str(named.classes["scheduler"][1])).from_config(dict(named.scheduler))


def canonical(model: Any) -> dict[str, Tensor]:
    """A module's weights under their canonical names."""
    found = {key: value.detach().clone() for key, value in model.state_dict().items()}
    if type(model).__name__ == "CLIPTextModel" and "embeddings.token_embedding.weight" in found:
        found = {f"text_model.{key}": value for key, value in found.items()}
    return {key: value for key, value in found.items() if not key.endswith("position_ids")}


def single_file(name: str, pipe: Any) -> dict[str, Tensor]:
    """The pipeline's weights as one file has them."""
    found = {}
    for component in ARCHITECTURES.get(name).components:
        model = getattr(pipe, component.name)
        written = from_canonical(component.network, component.spelling, canonical(model))
        found.update({component.prefix + key: tensor.contiguous() for key, tensor in written.items()})
    return found


def checkpoint(name: str, folder: Path, **unet: Any) -> tuple[Any, Path]:
    """A pipeline, and a single file of it."""
    pipe = pipeline(name, folder, **unet)
    return pipe, save(folder / f"{name}.safetensors", single_file(name, pipe), {"format": "pt"})


def words_of(pipe: Any, folder: Path) -> Path:
    """A folder with the pipeline's tokenizers alone."""
    for name in ("tokenizer", "tokenizer_2"):
        if getattr(pipe, name, None) is not None:
            getattr(pipe, name).save_pretrained(folder / name)
    return folder


def loaded(folder: Path, cls: str) -> Any:
    """What the installed diffusers makes of the folder; its weights aligned in memory, as those of a new model are.

    A matrix product may round otherwise where its operands lie otherwise, as they do within a mapped file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = getattr(diffusers, cls).from_pretrained(folder, local_files_only=True)
    for part in pipe.components.values():
        for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
            parameter.data = parameter.data.clone()
    return pipe


def from_single_file(path: Path, cls: str, config: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(diffusers, cls).from_single_file(str(path), config=str(config), local_files_only=True)


def image(pipe: Any) -> Any:
    """Two steps, small."""
    pipe.set_progress_bar_config(disable=True)
    words = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "np"}
    words["generator"] = torch.Generator().manual_seed(3)
    if type(pipe).__name__ == PIPELINES["sdxl_refiner"]:
        words |= {"image": torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64), "strength": 0.9}
    else:
        words |= {"height": 64, "width": 64}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe(**words).images
