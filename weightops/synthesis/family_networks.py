"""The networks of the family's base, untrained, and its folder: a Stable Diffusion of the real classes, but small."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from weightops.diffusion.tiny import letters
from weightops.errors import OutputError
from weightops.naming.keymap import ARCHITECTURES
from weightops.synthesis.family_pictures import SIDE

ARCHITECTURE = "sd15"
TOKENS = 16  # of a caption, which is read letter by letter: each of them costs time in every attention layer

# What follows from shapes elsewhere (heads of 64, groups of 32) would make it four times as large, and slow.
_WIDTHS = (16, 32, 32, 32)
_VAE_WIDTHS = (16, 24, 32)  # three levels: 8 latents a side for 32 pixels
_TEXT = 32


def vae() -> Any:
    from diffusers import AutoencoderKL

    levels = len(_VAE_WIDTHS)
    made: Any = AutoencoderKL
    return made(
        block_out_channels=_VAE_WIDTHS, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, layers_per_block=1, norm_num_groups=8, latent_channels=4,
        sample_size=SIDE, scaling_factor=0.18215,
    )  # fmt: skip


def unet() -> Any:
    from diffusers import UNet2DConditionModel

    made: Any = UNet2DConditionModel
    return made(
        block_out_channels=_WIDTHS, layers_per_block=1, norm_num_groups=8, attention_head_dim=2,
        cross_attention_dim=_TEXT, sample_size=SIDE >> len(_VAE_WIDTHS) - 1,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )  # fmt: skip


def text_encoder() -> Any:
    """CLIP's, with random weights: one caption needs no understanding."""
    import transformers

    config = transformers.CLIPTextConfig(
        hidden_size=_TEXT, intermediate_size=2 * _TEXT, num_hidden_layers=2, num_attention_heads=2, vocab_size=514,
        max_position_embeddings=TOKENS, projection_dim=_TEXT, hidden_act="quick_gelu", bos_token_id=0, eos_token_id=2,
        pad_token_id=1,
    )  # fmt: skip
    made: Any = transformers.CLIPTextModel
    return made(config).eval()


def tokenizer() -> Any:
    found = letters()
    found.model_max_length = TOKENS
    return found


def scheduler() -> Any:
    """That of the architecture, for a UNet that predicts velocities: what an image is made of is learnt evenly at all
    times, where noise that is predicted tells little of it."""
    import diffusers

    named = ARCHITECTURES.get(ARCHITECTURE).pipeline
    assert named is not None
    made: Any = getattr(diffusers, str(named.classes["scheduler"][1]))
    return made.from_config({**named.scheduler, "prediction_type": "v_prediction"})


def write_base(folder: Path, **parts: Any) -> None:
    """A diffusers folder of these components and the scheduler, whole or not at all. Raises OutputError."""
    import diffusers

    made: Any = diffusers.StableDiffusionPipeline
    pipe = made(
        **parts, scheduler=scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    whole = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        pipe.save_pretrained(whole, safe_serialization=True)
        _as_published(whole / "text_encoder" / "model.safetensors")
        whole.chmod(0o755)
        whole.replace(folder)
    except Exception as e:  # the format's library has a kind of its own
        if not isinstance(e, OSError) and type(e).__name__ != "SafetensorError":
            raise
        raise OutputError(str(folder), f"cannot be written: {' '.join(str(e).split())[:160]}") from None
    finally:
        shutil.rmtree(whole, ignore_errors=True)


def _as_published(file: Path) -> None:
    """The text encoder's names begin with `text_model.`, as every published file has them: new transformers drop it."""
    from safetensors.torch import load_file, save_file

    found = load_file(file)
    if not any(name.startswith("text_model.") for name in found):
        save_file({f"text_model.{name}": tensor for name, tensor in found.items()}, file, {"format": "pt"})
