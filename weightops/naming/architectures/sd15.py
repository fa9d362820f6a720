"""Stable Diffusion 1.x, inpainting and instruct-pix2pix too. Source: FORMATS §2 to §4; latent-diffusion (LDM)."""

from weightops.naming.channels import SD1_PERMUTATIONS
from weightops.naming.keymap import Architecture, Component, Config, Network, Pipeline, Spelling, Variant, register
from weightops.naming.parts import (
    CONVOLUTIONS,
    LDM_BLOCKS,
    LDM_LEVELS,
    LDM_SHAPES,
    LDM_UNET,
    UNET_CONFIG,
    transformer_shapes,
)

SHAPES = {
    **LDM_SHAPES,
    **transformer_shapes("down_blocks.0.attentions.{}", 320, 768),
    **transformer_shapes("down_blocks.1.attentions.{}", 640, 768),
    **transformer_shapes("down_blocks.2.attentions.{}", 1280, 768),
    **transformer_shapes("mid_block.attentions.0", 1280, 768),
    **transformer_shapes("up_blocks.1.attentions.{}", 1280, 768),
    **transformer_shapes("up_blocks.2.attentions.{}", 640, 768),
    **transformer_shapes("up_blocks.3.attentions.{}", 320, 768),
}

register(
    Network(
        name="sd15_unet",
        role="unet",
        spellings=(Spelling("original", LDM_UNET),),
        needs=CONVOLUTIONS,
        variants=(
            Variant("sd15", {"conv_in.weight": (320, 4, 3, 3), **SHAPES}),
            Variant("sd15_inpaint", {"conv_in.weight": (320, 9, 3, 3), **SHAPES}),
            Variant("sd15_pix2pix", {"conv_in.weight": (320, 8, 3, 3), **SHAPES}),
        ),
        blocks=LDM_BLOCKS,
        config=Config(
            "UNet2DConditionModel",
            {
                **UNET_CONFIG,
                **LDM_LEVELS,
                "attention_head_dim": 8,
                "sample_size": 64,
            },
        ),
        permutations=SD1_PERMUTATIONS,
    ),
    Architecture(
        name="sd15",
        title="Stable Diffusion 1.x",
        hints=("sd_v1", "sd_1.5", "stable-diffusion-v1"),
        components=(
            Component(
                "unet", "sd15_unet", prefix="model.diffusion_model.", kohya="lora_unet", kohya_spelling="diffusers",
            ),
            Component("vae", "autoencoder_kl", prefix="first_stage_model.", variant="sd_vae"),
            Component(
                "text_encoder", "clip", prefix="cond_stage_model.transformer.", spelling="transformers",
                kohya="lora_te", kohya_spelling="transformers", variant="clip_l",
                omits=("text_model.embeddings.position_ids", "text_projection", "logit_scale"),
            ),
        ),
        pipeline=Pipeline(
            class_name="StableDiffusionPipeline",
            classes={
                "feature_extractor": (None, None),
                "image_encoder": (None, None),
                "safety_checker": (None, None),
                "scheduler": ("diffusers", "PNDMScheduler"),
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
            tokenizers={
                "tokenizer": (
                    "stable-diffusion-v1-5/stable-diffusion-v1-5/tokenizer",
                    "CompVis/stable-diffusion-v1-4/tokenizer",
                    "openai/clip-vit-large-patch14",
                ),
            },
            settings={"requires_safety_checker": False},
        ),
    ),
)  # fmt: skip
