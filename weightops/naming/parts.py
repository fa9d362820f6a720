"""Tables that several architectures share: blocks, sizes and settings of LDM and SGM UNets. Source: FORMATS §2."""

from __future__ import annotations

from typing import Any

from weightops.naming.keymap import Dim, move, same, under

RESNET = (
    move("in_layers.0", "norm1"),
    move("in_layers.2", "conv1"),
    move("emb_layers.1", "time_emb_proj"),
    move("out_layers.0", "norm2"),
    move("out_layers.3", "conv2"),
    move("skip_connection", "conv_shortcut"),
)

ATTENTION = same(
    "norm",
    "proj_in",
    "transformer_blocks.{}.norm1",
    "transformer_blocks.{}.attn1.to_q",
    "transformer_blocks.{}.attn1.to_k",
    "transformer_blocks.{}.attn1.to_v",
    "transformer_blocks.{}.attn1.to_out.0",
    "transformer_blocks.{}.norm2",
    "transformer_blocks.{}.attn2.to_q",
    "transformer_blocks.{}.attn2.to_k",
    "transformer_blocks.{}.attn2.to_v",
    "transformer_blocks.{}.attn2.to_out.0",
    "transformer_blocks.{}.norm3",
    "transformer_blocks.{}.ff.net.0.proj",
    "transformer_blocks.{}.ff.net.2",
    "proj_out",
)


def transformer_shapes(place: str, width: int, context: int) -> dict[str, tuple[int | None, ...]]:
    """What a variant says of every matrix that LoRAs change in the transformer at `place`."""
    return {
        f"{place}.transformer_blocks.{{}}.attn1.to_q.weight": (width, width),
        f"{place}.transformer_blocks.{{}}.attn1.to_k.weight": (width, width),
        f"{place}.transformer_blocks.{{}}.attn1.to_v.weight": (width, width),
        f"{place}.transformer_blocks.{{}}.attn1.to_out.0.weight": (width, width),
        f"{place}.transformer_blocks.{{}}.attn2.to_q.weight": (width, width),
        f"{place}.transformer_blocks.{{}}.attn2.to_k.weight": (width, context),
        f"{place}.transformer_blocks.{{}}.attn2.to_v.weight": (width, context),
        f"{place}.transformer_blocks.{{}}.attn2.to_out.0.weight": (width, width),
        f"{place}.transformer_blocks.{{}}.ff.net.0.proj.weight": (8 * width, width),
        f"{place}.transformer_blocks.{{}}.ff.net.2.weight": (width, 4 * width),
    }


# SD1 projects into and out of its transformers with 1x1 convolutions, the later UNets with matrices.
CONVOLUTIONS: dict[str, tuple[int | None, ...]] = {
    "down_blocks.{}.attentions.{}.proj_in.weight": (None, None, 1, 1),
    "down_blocks.{}.attentions.{}.proj_out.weight": (None, None, 1, 1),
    "mid_block.attentions.{}.proj_in.weight": (None, None, 1, 1),
    "mid_block.attentions.{}.proj_out.weight": (None, None, 1, 1),
    "up_blocks.{}.attentions.{}.proj_in.weight": (None, None, 1, 1),
    "up_blocks.{}.attentions.{}.proj_out.weight": (None, None, 1, 1),
}
MATRICES: dict[str, tuple[int | None, ...]] = {
    "down_blocks.{}.attentions.{}.proj_in.weight": (None, None),
    "down_blocks.{}.attentions.{}.proj_out.weight": (None, None),
    "mid_block.attentions.{}.proj_in.weight": (None, None),
    "mid_block.attentions.{}.proj_out.weight": (None, None),
    "up_blocks.{}.attentions.{}.proj_in.weight": (None, None),
    "up_blocks.{}.attentions.{}.proj_out.weight": (None, None),
}

# What the configurations of all these UNets have in common.
UNET_CONFIG: dict[str, Any] = {
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": Dim("conv_in.weight", 1),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": Dim("conv_out.weight", 0),
}

# Stable Diffusion 1 and 2: four levels, attention in the first three.
LDM_UNET = (
    move("time_embed.0", "time_embedding.linear_1"),
    move("time_embed.2", "time_embedding.linear_2"),
    move("input_blocks.0.0", "conv_in"),
    *under("input_blocks.1.0", "down_blocks.0.resnets.0", RESNET),
    *under("input_blocks.1.1", "down_blocks.0.attentions.0", ATTENTION),
    *under("input_blocks.2.0", "down_blocks.0.resnets.1", RESNET),
    *under("input_blocks.2.1", "down_blocks.0.attentions.1", ATTENTION),
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
    move("input_blocks.9.0.op", "down_blocks.2.downsamplers.0.conv"),
    *under("input_blocks.10.0", "down_blocks.3.resnets.0", RESNET),
    *under("input_blocks.11.0", "down_blocks.3.resnets.1", RESNET),
    *under("middle_block.0", "mid_block.resnets.0", RESNET),
    *under("middle_block.1", "mid_block.attentions.0", ATTENTION),
    *under("middle_block.2", "mid_block.resnets.1", RESNET),
    *under("output_blocks.0.0", "up_blocks.0.resnets.0", RESNET),
    *under("output_blocks.1.0", "up_blocks.0.resnets.1", RESNET),
    *under("output_blocks.2.0", "up_blocks.0.resnets.2", RESNET),
    move("output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
    *under("output_blocks.3.0", "up_blocks.1.resnets.0", RESNET),
    *under("output_blocks.3.1", "up_blocks.1.attentions.0", ATTENTION),
    *under("output_blocks.4.0", "up_blocks.1.resnets.1", RESNET),
    *under("output_blocks.4.1", "up_blocks.1.attentions.1", ATTENTION),
    *under("output_blocks.5.0", "up_blocks.1.resnets.2", RESNET),
    *under("output_blocks.5.1", "up_blocks.1.attentions.2", ATTENTION),
    move("output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
    *under("output_blocks.6.0", "up_blocks.2.resnets.0", RESNET),
    *under("output_blocks.6.1", "up_blocks.2.attentions.0", ATTENTION),
    *under("output_blocks.7.0", "up_blocks.2.resnets.1", RESNET),
    *under("output_blocks.7.1", "up_blocks.2.attentions.1", ATTENTION),
    *under("output_blocks.8.0", "up_blocks.2.resnets.2", RESNET),
    *under("output_blocks.8.1", "up_blocks.2.attentions.2", ATTENTION),
    move("output_blocks.8.2.conv", "up_blocks.2.upsamplers.0.conv"),
    *under("output_blocks.9.0", "up_blocks.3.resnets.0", RESNET),
    *under("output_blocks.9.1", "up_blocks.3.attentions.0", ATTENTION),
    *under("output_blocks.10.0", "up_blocks.3.resnets.1", RESNET),
    *under("output_blocks.10.1", "up_blocks.3.attentions.1", ATTENTION),
    *under("output_blocks.11.0", "up_blocks.3.resnets.2", RESNET),
    *under("output_blocks.11.1", "up_blocks.3.attentions.2", ATTENTION),
    move("out.0", "conv_norm_out"),
    move("out.2", "conv_out"),
)

# The skip connections tell models with one resnet to a level (BK-SDM), whose blocks are numbered otherwise.
LDM_SHAPES: dict[str, tuple[int | None, ...]] = {
    "down_blocks.0.resnets.{}.conv2.weight": (320, 320, 3, 3),
    "down_blocks.1.resnets.{}.conv2.weight": (640, 640, 3, 3),
    "down_blocks.2.resnets.{}.conv2.weight": (1280, 1280, 3, 3),
    "down_blocks.3.resnets.{}.conv2.weight": (1280, 1280, 3, 3),
    "mid_block.resnets.{}.conv2.weight": (1280, 1280, 3, 3),
    "up_blocks.0.resnets.{}.conv2.weight": (1280, 1280, 3, 3),
    "up_blocks.1.resnets.{}.conv2.weight": (1280, 1280, 3, 3),
    "up_blocks.2.resnets.{}.conv2.weight": (640, 640, 3, 3),
    "up_blocks.3.resnets.{}.conv2.weight": (320, 320, 3, 3),
    "up_blocks.1.resnets.1.conv1.weight": (1280, 2560, 3, 3),
    "up_blocks.2.resnets.1.conv1.weight": (640, 1280, 3, 3),
}

LDM_LEVELS: dict[str, Any] = {
    "block_out_channels": [
        Dim("down_blocks.0.resnets.0.conv1.weight", 0),
        Dim("down_blocks.1.resnets.0.conv1.weight", 0),
        Dim("down_blocks.2.resnets.0.conv1.weight", 0),
        Dim("down_blocks.3.resnets.0.conv1.weight", 0),
    ],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": Dim("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", 1),
}

# The names of block weights in every tool of the field. The first and the last level hold what stands before and after
# them. Source: METHODS, MBW block vectors.
LDM_BLOCKS = (
    ("IN00", ("conv_in", "time_embedding")),
    ("IN01", ("down_blocks.0.resnets.0", "down_blocks.0.attentions.0")),
    ("IN02", ("down_blocks.0.resnets.1", "down_blocks.0.attentions.1")),
    ("IN03", ("down_blocks.0.downsamplers.0",)),
    ("IN04", ("down_blocks.1.resnets.0", "down_blocks.1.attentions.0")),
    ("IN05", ("down_blocks.1.resnets.1", "down_blocks.1.attentions.1")),
    ("IN06", ("down_blocks.1.downsamplers.0",)),
    ("IN07", ("down_blocks.2.resnets.0", "down_blocks.2.attentions.0")),
    ("IN08", ("down_blocks.2.resnets.1", "down_blocks.2.attentions.1")),
    ("IN09", ("down_blocks.2.downsamplers.0",)),
    ("IN10", ("down_blocks.3.resnets.0",)),
    ("IN11", ("down_blocks.3.resnets.1",)),
    ("M00", ("mid_block",)),
    ("OUT00", ("up_blocks.0.resnets.0",)),
    ("OUT01", ("up_blocks.0.resnets.1",)),
    ("OUT02", ("up_blocks.0.resnets.2", "up_blocks.0.upsamplers.0")),
    ("OUT03", ("up_blocks.1.resnets.0", "up_blocks.1.attentions.0")),
    ("OUT04", ("up_blocks.1.resnets.1", "up_blocks.1.attentions.1")),
    ("OUT05", ("up_blocks.1.resnets.2", "up_blocks.1.attentions.2", "up_blocks.1.upsamplers.0")),
    ("OUT06", ("up_blocks.2.resnets.0", "up_blocks.2.attentions.0")),
    ("OUT07", ("up_blocks.2.resnets.1", "up_blocks.2.attentions.1")),
    ("OUT08", ("up_blocks.2.resnets.2", "up_blocks.2.attentions.2", "up_blocks.2.upsamplers.0")),
    ("OUT09", ("up_blocks.3.resnets.0", "up_blocks.3.attentions.0")),
    ("OUT10", ("up_blocks.3.resnets.1", "up_blocks.3.attentions.1")),
    ("OUT11", ("up_blocks.3.resnets.2", "up_blocks.3.attentions.2", "conv_norm_out", "conv_out")),
)

# Of VAEs, in the order in which an image passes through them. Wan's have norms of other names.
AUTOENCODER_BLOCKS = (
    ("encoder.in", ("encoder.conv_in",)),
    ("encoder.down.{}", ("encoder.down_blocks.{}",)),
    ("encoder.mid", ("encoder.mid_block",)),
    ("encoder.out", ("encoder.conv_norm_out", "encoder.norm_out", "encoder.conv_out", "quant_conv", "bn")),
    ("decoder.in", ("post_quant_conv", "decoder.conv_in")),
    ("decoder.mid", ("decoder.mid_block",)),
    ("decoder.up.{}", ("decoder.up_blocks.{}",)),
    ("decoder.out", ("decoder.conv_norm_out", "decoder.norm_out", "decoder.conv_out")),
)
