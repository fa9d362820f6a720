"""Stable Diffusion 1.x, its inpainting and instruct-pix2pix models. Source: FORMATS §2 to §4; latent-diffusion (LDM)."""

from weightops.naming.keymap import Architecture, Component, Network, Spelling, Variant, register
from weightops.naming.parts import LDM_BLOCKS, LDM_UNET

# Rows of every SD1 UNet, for each level and for LoRAs of parts of it.
_SHAPES = {
    "down_blocks.0.attentions.{}.transformer_blocks.{}.attn1.to_q.weight": (320, 320),
    "down_blocks.0.attentions.{}.transformer_blocks.{}.attn2.to_k.weight": (320, 768),
    "down_blocks.0.attentions.{}.transformer_blocks.{}.attn2.to_v.weight": (320, 768),
    "down_blocks.1.attentions.{}.transformer_blocks.{}.attn1.to_q.weight": (640, 640),
    "down_blocks.1.attentions.{}.transformer_blocks.{}.attn2.to_k.weight": (640, 768),
    "down_blocks.1.attentions.{}.transformer_blocks.{}.attn2.to_v.weight": (640, 768),
    "down_blocks.2.attentions.{}.transformer_blocks.{}.attn2.to_k.weight": (1280, 768),
    "down_blocks.2.attentions.{}.transformer_blocks.{}.attn2.to_v.weight": (1280, 768),
    "mid_block.attentions.0.transformer_blocks.{}.attn2.to_k.weight": (1280, 768),
    "mid_block.attentions.0.transformer_blocks.{}.attn2.to_v.weight": (1280, 768),
    "up_blocks.1.attentions.{}.transformer_blocks.{}.attn2.to_k.weight": (1280, 768),
    "up_blocks.1.attentions.{}.transformer_blocks.{}.attn2.to_v.weight": (1280, 768),
    "up_blocks.2.attentions.{}.transformer_blocks.{}.attn2.to_k.weight": (640, 768),
    "up_blocks.2.attentions.{}.transformer_blocks.{}.attn2.to_v.weight": (640, 768),
    "up_blocks.3.attentions.{}.transformer_blocks.{}.attn2.to_k.weight": (320, 768),
    "up_blocks.3.attentions.{}.transformer_blocks.{}.attn2.to_v.weight": (320, 768),
}

register(
    Network(
        name="sd15_unet",
        role="unet",
        spellings=(Spelling("original", LDM_UNET),),
        # SD1 projects with 1x1 convolutions, SD2 with matrices.
        needs={
            "down_blocks.{}.attentions.{}.proj_in.weight": (None, None, 1, 1),
            "down_blocks.{}.attentions.{}.proj_out.weight": (None, None, 1, 1),
            "mid_block.attentions.{}.proj_in.weight": (None, None, 1, 1),
            "mid_block.attentions.{}.proj_out.weight": (None, None, 1, 1),
            "up_blocks.{}.attentions.{}.proj_in.weight": (None, None, 1, 1),
            "up_blocks.{}.attentions.{}.proj_out.weight": (None, None, 1, 1),
        },
        variants=(
            Variant("sd15", {"conv_in.weight": (320, 4, 3, 3), **_SHAPES}),
            Variant("sd15_inpaint", {"conv_in.weight": (320, 9, 3, 3), **_SHAPES}),
            Variant("sd15_pix2pix", {"conv_in.weight": (320, 8, 3, 3), **_SHAPES}),
        ),
        blocks=LDM_BLOCKS,
    ),
    Architecture(
        name="sd15",
        title="Stable Diffusion 1.x",
        components=(
            Component("unet", "sd15_unet", prefix="model.diffusion_model.", kohya="lora_unet", kohya_spelling="diffusers"),
            Component("vae", "autoencoder_kl", prefix="first_stage_model.", variant="sd_vae"),
            Component(
                "text_encoder", "clip", prefix="cond_stage_model.transformer.", spelling="transformers",
                kohya="lora_te", variant="clip_l",
            ),
        ),
    ),
)  # fmt: skip
