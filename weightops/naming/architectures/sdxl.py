"""Stable Diffusion XL, base. Source: FORMATS §2 to §4; generative-models (SGM), Stability AI."""

from weightops.naming.keymap import Architecture, Component, Network, Spelling, Variant, move, register, under
from weightops.naming.parts import ATTENTION, RESNET

RULES = (
    move("time_embed.0", "time_embedding.linear_1"),
    move("time_embed.2", "time_embedding.linear_2"),
    move("input_blocks.0.0", "conv_in"),
    *under("input_blocks.1.0", "down_blocks.0.resnets.0", RESNET),
    *under("input_blocks.2.0", "down_blocks.0.resnets.1", RESNET),
    move("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
    *under("input_blocks.4.0", "down_blocks.1.resnets.0", RESNET),
    *under("input_blocks.4.1", "down_blocks.1.attentions.0", ATTENTION),
    *under("input_blocks.5.0", "down_blocks.1.resnets.1", RESNET),
    *under("input_blocks.5.1", "down_blocks.1.attentions.1", ATTENTION),
    move("input_blocks.6.0.op", "down_blocks.1.downsamplers.0.conv"),
    *under("input_blocks.7.0", "down_blocks.2.resnets.0", RESNET),
    *under("input_blocks.7.1", "down_blocks.2.attentions.0", ATTENTION),
    *under("input_blocks.8.0", "down_blocks.2.resnets.1", RESNET),
    *under("input_blocks.8.1", "down_blocks.2.attentions.1", ATTENTION),
    *under("middle_block.0", "mid_block.resnets.0", RESNET),
    *under("middle_block.1", "mid_block.attentions.0", ATTENTION),
    *under("middle_block.2", "mid_block.resnets.1", RESNET),
    *under("output_blocks.0.0", "up_blocks.0.resnets.0", RESNET),
    *under("output_blocks.0.1", "up_blocks.0.attentions.0", ATTENTION),
    *under("output_blocks.1.0", "up_blocks.0.resnets.1", RESNET),
    *under("output_blocks.1.1", "up_blocks.0.attentions.1", ATTENTION),
    *under("output_blocks.2.0", "up_blocks.0.resnets.2", RESNET),
    *under("output_blocks.2.1", "up_blocks.0.attentions.2", ATTENTION),
    move("output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
    *under("output_blocks.3.0", "up_blocks.1.resnets.0", RESNET),
    *under("output_blocks.3.1", "up_blocks.1.attentions.0", ATTENTION),
    *under("output_blocks.4.0", "up_blocks.1.resnets.1", RESNET),
    *under("output_blocks.4.1", "up_blocks.1.attentions.1", ATTENTION),
    *under("output_blocks.5.0", "up_blocks.1.resnets.2", RESNET),
    *under("output_blocks.5.1", "up_blocks.1.attentions.2", ATTENTION),
    move("output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
    *under("output_blocks.6.0", "up_blocks.2.resnets.0", RESNET),
    *under("output_blocks.7.0", "up_blocks.2.resnets.1", RESNET),
    *under("output_blocks.8.0", "up_blocks.2.resnets.2", RESNET),
    move("out.0", "conv_norm_out"),
    move("out.2", "conv_out"),
    move("label_emb.0.0", "add_embedding.linear_1"),
    move("label_emb.0.2", "add_embedding.linear_2"),
)

BLOCKS = (
    ("IN00", ("conv_in", "time_embedding", "add_embedding")),
    ("IN01", ("down_blocks.0.resnets.0",)),
    ("IN02", ("down_blocks.0.resnets.1",)),
    ("IN03", ("down_blocks.0.downsamplers.0",)),
    ("IN04", ("down_blocks.1.resnets.0", "down_blocks.1.attentions.0")),
    ("IN05", ("down_blocks.1.resnets.1", "down_blocks.1.attentions.1")),
    ("IN06", ("down_blocks.1.downsamplers.0",)),
    ("IN07", ("down_blocks.2.resnets.0", "down_blocks.2.attentions.0")),
    ("IN08", ("down_blocks.2.resnets.1", "down_blocks.2.attentions.1")),
    ("M00", ("mid_block",)),
    ("OUT00", ("up_blocks.0.resnets.0", "up_blocks.0.attentions.0")),
    ("OUT01", ("up_blocks.0.resnets.1", "up_blocks.0.attentions.1")),
    ("OUT02", ("up_blocks.0.resnets.2", "up_blocks.0.attentions.2", "up_blocks.0.upsamplers.0")),
    ("OUT03", ("up_blocks.1.resnets.0", "up_blocks.1.attentions.0")),
    ("OUT04", ("up_blocks.1.resnets.1", "up_blocks.1.attentions.1")),
    ("OUT05", ("up_blocks.1.resnets.2", "up_blocks.1.attentions.2", "up_blocks.1.upsamplers.0")),
    ("OUT06", ("up_blocks.2.resnets.0",)),
    ("OUT07", ("up_blocks.2.resnets.1",)),
    ("OUT08", ("up_blocks.2.resnets.2", "conv_norm_out", "conv_out")),
)

register(
    Network(
        name="sdxl_unet",
        role="unet",
        spellings=(Spelling("original", RULES),),
        variants=(
            Variant(
                "sdxl",
                {
                    "conv_in.weight": (320, 4, 3, 3),
                    "add_embedding.linear_1.weight": (1280, 2816),
                    "down_blocks.1.attentions.{}.transformer_blocks.{}.attn1.to_q.weight": (640, 640),
                    "down_blocks.1.attentions.{}.transformer_blocks.{}.attn2.to_k.weight": (640, 2048),
                    "down_blocks.1.attentions.{}.transformer_blocks.{}.attn2.to_v.weight": (640, 2048),
                    "down_blocks.2.attentions.{}.transformer_blocks.{}.attn1.to_q.weight": (1280, 1280),
                    "down_blocks.2.attentions.{}.transformer_blocks.{}.attn2.to_k.weight": (1280, 2048),
                    "down_blocks.2.attentions.{}.transformer_blocks.{}.attn2.to_v.weight": (1280, 2048),
                    "mid_block.attentions.0.transformer_blocks.{}.attn2.to_k.weight": (1280, 2048),
                    "up_blocks.0.attentions.{}.transformer_blocks.{}.attn2.to_k.weight": (1280, 2048),
                    "up_blocks.1.attentions.{}.transformer_blocks.{}.attn2.to_k.weight": (640, 2048),
                    "down_blocks.1.resnets.{}.conv2.weight": (640, 640, 3, 3),
                    "up_blocks.1.resnets.{}.conv2.weight": (640, 640, 3, 3),
                },
                {
                    "down_blocks.1.attentions.0.transformer_blocks.{}": 2,
                    "down_blocks.2.attentions.0.transformer_blocks.{}": 10,
                },
            ),
        ),
        blocks=BLOCKS,
    ),
    Architecture(
        name="sdxl",
        title="Stable Diffusion XL",
        components=(
            Component(
                "unet", "sdxl_unet", prefix="model.diffusion_model.", kohya="lora_unet", kohya_spelling="original",
            ),
            Component("vae", "autoencoder_kl", prefix="first_stage_model.", variant="sd_vae"),
            Component(
                "text_encoder", "clip", prefix="conditioner.embedders.0.transformer.", spelling="transformers",
                kohya="lora_te1", variant="clip_l",
            ),
            Component(
                "text_encoder_2", "clip", prefix="conditioner.embedders.1.model.", spelling="openclip",
                kohya="lora_te2", variant="clip_bigg", omits=("logit_scale",),
            ),
        ),
    ),
)  # fmt: skip
