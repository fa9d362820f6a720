"""Tiny models of the real classes with random weights, tokenizers and all: studies and tests run on them, offline.

What they draw is noise. Knows what the real ones are made of, and nothing about what is done with them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.diffusion.extras import hushed, need
from weightops.diffusion.sprites import WORDS, sprites
from weightops.errors import OutputError, UsageError, quote
from weightops.naming.keymap import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["TINY", "sprites", "tiny_blip", "tiny_model"]

IMAGE = 64  # pixels of a side: eight times the latents'
_CHANNELS = 16  # of the latents of SD3 and Flux; four in the others

# Widths are such that each configuration is the one that follows from shapes: heads of 64 (Flux: 128), groups of 32.
_UNET: Mapping[str, Any] = {"layers_per_block": 2, "sample_size": 8, "norm_num_groups": 32}
_SD: Mapping[str, Any] = {
    **_UNET,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64,
}
UNETS: Mapping[str, Mapping[str, Any]] = {
    "sd15": {**_SD, "block_out_channels": (32, 32, 64, 64), "attention_head_dim": 8},
    "sd2": {
        **_SD, "block_out_channels": (64, 64, 64, 128), "attention_head_dim": (1, 1, 1, 2),
        "use_linear_projection": True, "upcast_attention": True,
    },
    "sdxl": {
        **_UNET, "block_out_channels": (64, 64, 128), "attention_head_dim": (1, 1, 2), "cross_attention_dim": 192,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2), "projection_class_embeddings_input_dim": 128 + 6 * 256,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "use_linear_projection": True,
    },
}  # fmt: skip
_SVD_UNET: Mapping[str, Any] = {
    "sample_size": 8, "in_channels": 8, "out_channels": 4, "layers_per_block": 1,
    "block_out_channels": (32, 64), "num_attention_heads": (1, 2), "cross_attention_dim": 64,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 3 * 32, "num_frames": 4,
}  # fmt: skip
_SD3: Mapping[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": _CHANNELS, "out_channels": _CHANNELS, "num_layers": 2,
    "attention_head_dim": 64, "num_attention_heads": 1, "caption_projection_dim": 64, "pos_embed_max_size": 16,
    "joint_attention_dim": 192, "pooled_projection_dim": 192,
}  # fmt: skip
_FLUX: Mapping[str, Any] = {
    "in_channels": 4 * _CHANNELS, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128,
    "num_attention_heads": 1, "axes_dims_rope": (16, 56, 56), "joint_attention_dim": 64,
    "pooled_projection_dim": 64, "guidance_embeds": True,
}  # fmt: skip
VAES: Mapping[str, Mapping[str, Any]] = {
    "sd15": {"latent_channels": 4, "scaling_factor": 0.18215},
    "sd2": {"latent_channels": 4, "scaling_factor": 0.18215},
    "sdxl": {"latent_channels": 4, "scaling_factor": 0.13025},
    "sd3": {
        "latent_channels": _CHANNELS, "scaling_factor": 1.5305, "shift_factor": 0.0609,
        "use_quant_conv": False, "use_post_quant_conv": False,
    },
    "flux": {
        "latent_channels": _CHANNELS, "scaling_factor": 0.3611, "shift_factor": 0.1159,
        "use_quant_conv": False, "use_post_quant_conv": False,
    },
}  # fmt: skip
# SD2.1 predicts velocities, and its folder says so.
_SCHEDULERS: Mapping[str, Mapping[str, Any]] = {
    "sd15": {},
    "sd2": {"prediction_type": "v_prediction"},
    "sdxl": {},
}
# As the folders of SD3 medium, of Flux dev and of Stable Video Diffusion have them.
_FLOW_SD3: Mapping[str, Any] = {"num_train_timesteps": 1000, "shift": 3.0}
_FLOW_FLUX: Mapping[str, Any] = {
    "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
    "base_image_seq_len": 256, "max_image_seq_len": 4096,
}  # fmt: skip
_EULER: Mapping[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "interpolation_type": "linear",
    "num_train_timesteps": 1000, "prediction_type": "v_prediction", "sigma_max": 700.0, "sigma_min": 0.002,
    "steps_offset": 1, "timestep_spacing": "leading", "timestep_type": "continuous", "use_karras_sigmas": True,
}  # fmt: skip


def tiny_model(architecture: str, folder: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """A diffusers folder with everything that a model of this architecture has, in fp32, random weights from `seed`.

    architecture: one of TINY. It makes images of 64 pixels, and reads text letter by letter: at most 75 of them.
    The folder appears whole or not at all, and must not be there. Raises UsageError and OutputError.
    """
    if architecture not in TINY:
        raise UsageError("tiny", f"unknown architecture {quote(architecture)}", f"known are {', '.join(TINY)}")
    need("tiny", "diffusers", "transformers")
    with _new(folder) as made, _seeded(seed), hushed():
        pipe = TINY[architecture](architecture)
        pipe.save_pretrained(made, safe_serialization=True)
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            _old_form(made / name)
    return Path(folder)


def tiny_vae(folder: str | os.PathLike[str], *, architecture: str = "sd15", seed: int = 0) -> Path:
    """A folder with a VAE alone, such as a model's is swapped for."""
    if architecture not in VAES:
        raise UsageError("tiny", f"unknown architecture {quote(architecture)}", f"known are {', '.join(VAES)}")
    need("tiny", "diffusers", "transformers")
    with _new(folder) as made, _seeded(seed), hushed():
        _vae(architecture).save_pretrained(made, safe_serialization=True)
    return Path(folder)


def tiny_blip(folder: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """A folder with a BLIP that captions images, its processor beside it: words of the sprites', at random."""
    need("tiny", "diffusers", "transformers", "PIL")
    with _new(folder) as made, _seeded(seed), hushed():
        _, transformers = _libraries()
        marks = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
        letters = "abcdefghijklmnopqrstuvwxyz"
        # Words that are none of these are read letter by letter.
        pieces = [*marks, *WORDS, *(c for c in letters if c not in WORDS), *("##" + c for c in letters), ",", "."]
        words = transformers.BertTokenizer(
            vocab={piece: n for n, piece in enumerate(pieces)}, bos_token="[DEC]", model_max_length=64
        )
        ids = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
        text: dict[str, Any] = {
            "vocab_size": len(pieces), "hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 64,
            "projection_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
            "initializer_range": 0.2, "tie_word_embeddings": False, **ids,
        }  # fmt: skip
        # As wide as this, what is said depends upon the image.
        vision = {
            "hidden_size": 32, "intermediate_size": 64, "projection_dim": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "initializer_range": 0.5,
        }  # fmt: skip
        config = transformers.BlipConfig(
            text_config=text, vision_config=vision, projection_dim=32, image_text_hidden_size=32
        )
        model = transformers.BlipForConditionalGeneration(config).eval()
        # It says whole words alone, and ends.
        silent = [n for n, piece in enumerate(pieces) if piece not in (*WORDS, "[SEP]")]
        model.text_decoder.cls.predictions.bias.data[silent] = -1e4
        model.save_pretrained(made, safe_serialization=True)
        seen = transformers.BlipImageProcessorPil(size={"height": 32, "width": 32})
        transformers.BlipProcessor(seen, words).save_pretrained(made)
    return Path(folder)


# ------------------------------------------------------------------------------------------------ architectures


def _stable_diffusion(name: str) -> Any:
    diffusers, _ = _libraries()
    return diffusers.StableDiffusionPipeline(
        vae=_vae(name), text_encoder=_clip(64, "quick_gelu" if name == "sd15" else "gelu"), tokenizer=letters(),
        unet=diffusers.UNet2DConditionModel(**UNETS[name]).eval(), scheduler=_scheduler(name), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl(name: str) -> Any:
    diffusers, _ = _libraries()
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(name), text_encoder=_clip(64, "quick_gelu"), text_encoder_2=_clip(128, "gelu", projected=True),
        tokenizer=letters(), tokenizer_2=letters(), unet=diffusers.UNet2DConditionModel(**UNETS[name]).eval(),
        scheduler=_scheduler(name), add_watermarker=False,
    )  # fmt: skip


def _sd3(name: str) -> Any:
    diffusers, _ = _libraries()
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(**_SD3).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**_FLOW_SD3), vae=_vae(name),
        text_encoder=_clip(64, "quick_gelu", projected=True), text_encoder_2=_clip(128, "gelu", projected=True),
        text_encoder_3=_t5(192), tokenizer=letters(), tokenizer_2=letters(), tokenizer_3=_pieces(256),
    )  # fmt: skip


def _flux(name: str) -> Any:
    diffusers, _ = _libraries()
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(**_FLUX).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**_FLOW_FLUX), vae=_vae(name),
        text_encoder=_clip(64, "quick_gelu"), text_encoder_2=_t5(64), tokenizer=letters(), tokenizer_2=_pieces(512),
    )  # fmt: skip


def _svd(_name: str) -> Any:
    diffusers, transformers = _libraries()
    config = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, projection_dim=64, num_hidden_layers=1, num_attention_heads=1,
        image_size=224, patch_size=56,  # the pipeline scales to 224, whatever is said here
    )  # fmt: skip
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32, 32, 64), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1,
        latent_channels=4, sample_size=IMAGE, scaling_factor=0.18215,
    )  # fmt: skip
    size = {"height": 224, "width": 224}
    return diffusers.StableVideoDiffusionPipeline(
        vae=vae.eval(), image_encoder=transformers.CLIPVisionModelWithProjection(config).eval(),
        unet=diffusers.UNetSpatioTemporalConditionModel(**_SVD_UNET).eval(),
        scheduler=diffusers.EulerDiscreteScheduler(**_EULER),
        feature_extractor=_image_processor()(size=size, crop_size=size),
    )  # fmt: skip


# Each architecture, and what makes its pipeline.
TINY: Mapping[str, Callable[[str], Any]] = {
    "sd15": _stable_diffusion,
    "sd2": _stable_diffusion,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "svd": _svd,
}


# ------------------------------------------------------------------------------------------------ parts


def _libraries() -> tuple[Any, Any]:
    """diffusers and transformers, without the types that neither declares in full."""
    import diffusers
    import transformers

    return diffusers, transformers


def _vae(name: str) -> Any:
    diffusers, _ = _libraries()
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4, sample_size=IMAGE,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, norm_num_groups=32, **VAES[name],
    ).eval()  # fmt: skip


def _scheduler(name: str) -> Any:
    """The one that our tables name for the architecture."""
    diffusers, _ = _libraries()
    named = ARCHITECTURES.get(name).pipeline
    assert named is not None
    made = getattr(diffusers, str(named.classes["scheduler"][1]))
    return made.from_config({**named.scheduler, **_SCHEDULERS[name]})


def letters() -> Any:
    """CLIP's tokenizer with the 256 bytes alone, each within a word and at its end: 514 entries."""
    _, transformers = _libraries()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    bytes_ = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    words = [*bytes_, *(letter + "</w>" for letter in bytes_), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def _pieces(length: int) -> Any:
    """T5's tokenizer with the printable characters of ASCII alone; all others are unknown to it."""
    _, transformers = _libraries()
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab = [*marks, *((chr(n), -3.0) for n in range(33, 127))]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=length)


def _clip(width: int, act: str, *, projected: bool = False) -> Any:
    _, transformers = _libraries()
    # An eos_token_id of 2 is the old files': the place of the largest token is where the text ends.
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=width * 2, num_hidden_layers=2, num_attention_heads=width // 64,
        vocab_size=514, max_position_embeddings=77, projection_dim=width, hidden_act=act, bos_token_id=0,
        eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    made = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return made(config).eval()


def _t5(width: int) -> Any:
    _, transformers = _libraries()
    config = transformers.T5Config(
        d_model=width, d_ff=2 * width, d_kv=32, num_heads=2, num_layers=2, vocab_size=98, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return transformers.T5EncoderModel(config).eval()


def _image_processor() -> Any:
    """CLIP's, the one that needs no torchvision where there are two."""
    _, transformers = _libraries()
    return getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)


# ------------------------------------------------------------------------------------------------ written


def _old_form(folder: Path) -> None:
    """The text encoder's names begin with `text_model.`, as every published file has them: new transformers drop it."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    file = folder / "model.safetensors"
    if not file.is_file():
        return
    with safe_open(file, "pt") as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if "embeddings.token_embedding.weight" in found:
        save_file({f"text_model.{name}": tensor for name, tensor in found.items()}, file, {"format": "pt"})


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random weights from this seed; whoever draws numbers elsewhere draws what they would have drawn."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _new(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill, which has its name only when it is whole."""
    target = Path(folder)
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise OutputError(str(target), "exists", "name a folder that is not there yet")
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=target.parent))
    try:
        with _told(target):
            yield made
        made.chmod(0o777 & ~_umask())
        if target.exists():
            target.rmdir()
        made.replace(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def _told(target: Path) -> Iterator[None]:
    """A disk that is full, or that may not be written, in one line; the format's library has a kind of its own."""
    try:
        yield
    except OSError as e:
        raise OutputError(str(target), f"cannot be written: {e.strerror or e}") from None
    except Exception as e:
        if type(e).__name__ != "SafetensorError":
            raise
        raise OutputError(str(target), f"cannot be written: {' '.join(str(e).split())[:160]}") from None


def _umask() -> int:
    found = os.umask(0o022)
    os.umask(found)
    return found
