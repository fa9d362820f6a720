"""The image autoencoders of LDM: of SD1, SD2 and SDXL, of Flux and SD3, of Flux.2, of the x4 upscaler.

The decoder's levels are counted from the other end than diffusers counts them, so that a table holds for one number
of levels: the networks here have four, and `autoencoder_kl_f4` three.
Source: FORMATS §3; latent-diffusion (LDM), taming-transformers; ComfyUI comfy/sd.py for Flux.2's quant convolutions.
"""

from typing import Any

from weightops.naming.keymap import (
    Config,
    Dim,
    Has,
    Network,
    Rule,
    Spelling,
    Variant,
    move,
    register,
    same,
    tensor,
    under,
)
from weightops.naming.parts import AUTOENCODER_BLOCKS
from weightops.naming.permutations import Group, inputs, outputs, within

RESNET = (
    *same("norm1", "conv1", "norm2", "conv2"),
    move("nin_shortcut", "conv_shortcut"),
)

ATTENTION = (
    move("norm", "group_norm"),
    Rule("q", ("to_q",), squared=True),
    Rule("k", ("to_k",), squared=True),
    Rule("v", ("to_v",), squared=True),
    Rule("proj_out", ("to_out.0",), squared=True),
)

QUANT = same("quant_conv", "post_quant_conv")

# What has the same names at any number of levels.
ENDS = (
    *same("encoder.conv_in"),
    *under("encoder.mid.block_1", "encoder.mid_block.resnets.0", RESNET),
    *under("encoder.mid.attn_1", "encoder.mid_block.attentions.0", ATTENTION),
    *under("encoder.mid.block_2", "encoder.mid_block.resnets.1", RESNET),
    move("encoder.norm_out", "encoder.conv_norm_out"),
    *same("encoder.conv_out"),
    *same("decoder.conv_in"),
    *under("decoder.mid.block_1", "decoder.mid_block.resnets.0", RESNET),
    *under("decoder.mid.attn_1", "decoder.mid_block.attentions.0", ATTENTION),
    *under("decoder.mid.block_2", "decoder.mid_block.resnets.1", RESNET),
    move("decoder.norm_out", "decoder.conv_norm_out"),
    *same("decoder.conv_out"),
)

FOUR_LEVELS = (
    *under("encoder.down.0.block.{}", "encoder.down_blocks.0.resnets.{}", RESNET),
    move("encoder.down.0.downsample.conv", "encoder.down_blocks.0.downsamplers.0.conv"),
    *under("encoder.down.1.block.{}", "encoder.down_blocks.1.resnets.{}", RESNET),
    move("encoder.down.1.downsample.conv", "encoder.down_blocks.1.downsamplers.0.conv"),
    *under("encoder.down.2.block.{}", "encoder.down_blocks.2.resnets.{}", RESNET),
    move("encoder.down.2.downsample.conv", "encoder.down_blocks.2.downsamplers.0.conv"),
    *under("encoder.down.3.block.{}", "encoder.down_blocks.3.resnets.{}", RESNET),
    *under("decoder.up.3.block.{}", "decoder.up_blocks.0.resnets.{}", RESNET),
    move("decoder.up.3.upsample.conv", "decoder.up_blocks.0.upsamplers.0.conv"),
    *under("decoder.up.2.block.{}", "decoder.up_blocks.1.resnets.{}", RESNET),
    move("decoder.up.2.upsample.conv", "decoder.up_blocks.1.upsamplers.0.conv"),
    *under("decoder.up.1.block.{}", "decoder.up_blocks.2.resnets.{}", RESNET),
    move("decoder.up.1.upsample.conv", "decoder.up_blocks.2.upsamplers.0.conv"),
    *under("decoder.up.0.block.{}", "decoder.up_blocks.3.resnets.{}", RESNET),
)

THREE_LEVELS = (
    *under("encoder.down.0.block.{}", "encoder.down_blocks.0.resnets.{}", RESNET),
    move("encoder.down.0.downsample.conv", "encoder.down_blocks.0.downsamplers.0.conv"),
    *under("encoder.down.1.block.{}", "encoder.down_blocks.1.resnets.{}", RESNET),
    move("encoder.down.1.downsample.conv", "encoder.down_blocks.1.downsamplers.0.conv"),
    *under("encoder.down.2.block.{}", "encoder.down_blocks.2.resnets.{}", RESNET),
    *under("decoder.up.2.block.{}", "decoder.up_blocks.0.resnets.{}", RESNET),
    move("decoder.up.2.upsample.conv", "decoder.up_blocks.0.upsamplers.0.conv"),
    *under("decoder.up.1.block.{}", "decoder.up_blocks.1.resnets.{}", RESNET),
    move("decoder.up.1.upsample.conv", "decoder.up_blocks.1.upsamplers.0.conv"),
    *under("decoder.up.0.block.{}", "decoder.up_blocks.2.resnets.{}", RESNET),
)

# diffusers' own names, and those of its attention until version 0.14, which many files on the hub still have.
DIFFUSERS_RESNET = same("norm1", "conv1", "norm2", "conv2", "conv_shortcut")
DIFFUSERS_ATTENTION = same("group_norm", "to_q", "to_k", "to_v", "to_out.0")
OLD_ATTENTION = (
    *same("group_norm"),
    move("query", "to_q"),
    move("key", "to_k"),
    move("value", "to_v"),
    move("proj_attn", "to_out.0"),
)

DIFFUSERS_ENDS = (
    *same("encoder.conv_in", "encoder.conv_norm_out", "encoder.conv_out"),
    *under("encoder.mid_block.resnets.{}", "encoder.mid_block.resnets.{}", DIFFUSERS_RESNET),
    *same("decoder.conv_in", "decoder.conv_norm_out", "decoder.conv_out"),
    *under("decoder.mid_block.resnets.{}", "decoder.mid_block.resnets.{}", DIFFUSERS_RESNET),
)

DIFFUSERS_FOUR_LEVELS = (
    *under("encoder.down_blocks.0.resnets.{}", "encoder.down_blocks.0.resnets.{}", DIFFUSERS_RESNET),
    *under("encoder.down_blocks.1.resnets.{}", "encoder.down_blocks.1.resnets.{}", DIFFUSERS_RESNET),
    *under("encoder.down_blocks.2.resnets.{}", "encoder.down_blocks.2.resnets.{}", DIFFUSERS_RESNET),
    *under("encoder.down_blocks.3.resnets.{}", "encoder.down_blocks.3.resnets.{}", DIFFUSERS_RESNET),
    *same(
        "encoder.down_blocks.0.downsamplers.0.conv",
        "encoder.down_blocks.1.downsamplers.0.conv",
        "encoder.down_blocks.2.downsamplers.0.conv",
    ),
    *under("decoder.up_blocks.0.resnets.{}", "decoder.up_blocks.0.resnets.{}", DIFFUSERS_RESNET),
    *under("decoder.up_blocks.1.resnets.{}", "decoder.up_blocks.1.resnets.{}", DIFFUSERS_RESNET),
    *under("decoder.up_blocks.2.resnets.{}", "decoder.up_blocks.2.resnets.{}", DIFFUSERS_RESNET),
    *under("decoder.up_blocks.3.resnets.{}", "decoder.up_blocks.3.resnets.{}", DIFFUSERS_RESNET),
    *same(
        "decoder.up_blocks.0.upsamplers.0.conv",
        "decoder.up_blocks.1.upsamplers.0.conv",
        "decoder.up_blocks.2.upsamplers.0.conv",
    ),
)

DIFFUSERS_THREE_LEVELS = (
    *under("encoder.down_blocks.0.resnets.{}", "encoder.down_blocks.0.resnets.{}", DIFFUSERS_RESNET),
    *under("encoder.down_blocks.1.resnets.{}", "encoder.down_blocks.1.resnets.{}", DIFFUSERS_RESNET),
    *under("encoder.down_blocks.2.resnets.{}", "encoder.down_blocks.2.resnets.{}", DIFFUSERS_RESNET),
    *same("encoder.down_blocks.0.downsamplers.0.conv", "encoder.down_blocks.1.downsamplers.0.conv"),
    *under("decoder.up_blocks.0.resnets.{}", "decoder.up_blocks.0.resnets.{}", DIFFUSERS_RESNET),
    *under("decoder.up_blocks.1.resnets.{}", "decoder.up_blocks.1.resnets.{}", DIFFUSERS_RESNET),
    *under("decoder.up_blocks.2.resnets.{}", "decoder.up_blocks.2.resnets.{}", DIFFUSERS_RESNET),
    *same("decoder.up_blocks.0.upsamplers.0.conv", "decoder.up_blocks.1.upsamplers.0.conv"),
)

NEW_MIDDLES = (
    *under("encoder.mid_block.attentions.0", "encoder.mid_block.attentions.0", DIFFUSERS_ATTENTION),
    *under("decoder.mid_block.attentions.0", "decoder.mid_block.attentions.0", DIFFUSERS_ATTENTION),
)

OLD_MIDDLES = (
    *under("encoder.mid_block.attentions.0", "encoder.mid_block.attentions.0", OLD_ATTENTION),
    *under("decoder.mid_block.attentions.0", "decoder.mid_block.attentions.0", OLD_ATTENTION),
)

# Latents are normalised by the running statistics of a batch norm without weights.
BATCH_NORM = (
    tensor("bn.running_mean"),
    tensor("bn.running_var"),
    tensor("bn.num_batches_tracked"),
)

# The Flux.2 authors put the quant convolutions into encoder and decoder; other tools leave them where LDM has them.
INNER_QUANT = (
    move("encoder.quant_conv", "quant_conv"),
    move("decoder.post_quant_conv", "post_quant_conv"),
)

SHAPES = {
    "encoder.conv_in.weight": (128, 3, 3, 3),
    "encoder.down_blocks.0.resnets.{}.conv2.weight": (128, 128, 3, 3),
    "encoder.down_blocks.1.resnets.{}.conv2.weight": (256, 256, 3, 3),
    "encoder.down_blocks.2.resnets.{}.conv2.weight": (512, 512, 3, 3),
    "encoder.mid_block.resnets.{}.conv2.weight": (512, 512, 3, 3),
    "decoder.mid_block.resnets.{}.conv2.weight": (512, 512, 3, 3),
    "decoder.up_blocks.0.resnets.{}.conv2.weight": (512, 512, 3, 3),
    "decoder.conv_out.weight": (3, 128, 3, 3),
}

FOUR_LEVEL_SHAPES = {
    **SHAPES,
    "encoder.down_blocks.3.resnets.{}.conv2.weight": (512, 512, 3, 3),
    "decoder.up_blocks.1.resnets.{}.conv2.weight": (512, 512, 3, 3),
    "decoder.up_blocks.2.resnets.{}.conv2.weight": (256, 256, 3, 3),
    "decoder.up_blocks.3.resnets.{}.conv2.weight": (128, 128, 3, 3),
}

THREE_LEVEL_SHAPES = {
    **SHAPES,
    "decoder.up_blocks.1.resnets.{}.conv2.weight": (256, 256, 3, 3),
    "decoder.up_blocks.2.resnets.{}.conv2.weight": (128, 128, 3, 3),
}

FOUR_LATENTS = {
    "encoder.conv_out.weight": (8, 512, 3, 3),
    "decoder.conv_in.weight": (512, 4, 3, 3),
    "quant_conv.weight": (8, 8, 1, 1),
    "post_quant_conv.weight": (4, 4, 1, 1),
}

SIXTEEN_LATENTS = {
    "encoder.conv_out.weight": (32, 512, 3, 3),
    "decoder.conv_in.weight": (512, 16, 3, 3),
}

THIRTY_TWO_LATENTS = {
    "encoder.conv_out.weight": (64, 512, 3, 3),
    "decoder.conv_in.weight": (512, 32, 3, 3),
    "quant_conv.weight": (64, 64, 1, 1),
    "post_quant_conv.weight": (32, 32, 1, 1),
}

CONFIG: dict[str, Any] = {
    "act_fn": "silu",
    "in_channels": Dim("encoder.conv_in.weight", 1),
    "latent_channels": Dim("decoder.conv_in.weight", 1),
    "layers_per_block": 2,
    "mid_block_add_attention": Has("decoder.mid_block.attentions.0.to_q.weight"),
    "norm_num_groups": 32,
    "out_channels": Dim("decoder.conv_out.weight", 0),
    "use_post_quant_conv": Has("post_quant_conv.weight"),
    "use_quant_conv": Has("quant_conv.weight"),
}

FOUR_LEVEL_CONFIG: dict[str, Any] = {
    "block_out_channels": [
        Dim("encoder.down_blocks.0.resnets.0.conv1.weight", 0),
        Dim("encoder.down_blocks.1.resnets.0.conv1.weight", 0),
        Dim("encoder.down_blocks.2.resnets.0.conv1.weight", 0),
        Dim("encoder.down_blocks.3.resnets.0.conv1.weight", 0),
    ],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
}

THREE_LEVEL_CONFIG: dict[str, Any] = {
    "block_out_channels": [
        Dim("encoder.down_blocks.0.resnets.0.conv1.weight", 0),
        Dim("encoder.down_blocks.1.resnets.0.conv1.weight", 0),
        Dim("encoder.down_blocks.2.resnets.0.conv1.weight", 0),
    ],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
}

# What lies between a resnet's convolutions, where its second norm has 32 groups, whose channels stay together; and
# within the one head of the attention.
RESNET_CHANNELS = (Group("", ((*outputs("conv1", "norm2"), *inputs("conv2")),), blocks=32),)
ATTENTION_CHANNELS = (Group("", (outputs("to_q", "to_k"), (*outputs("to_v"), *inputs("to_out.0")))),)

PERMUTATIONS = (
    *within("encoder.down_blocks.{}.resnets.{}", RESNET_CHANNELS),
    *within("encoder.mid_block.resnets.{}", RESNET_CHANNELS),
    *within("encoder.mid_block.attentions.{}", ATTENTION_CHANNELS),
    *within("decoder.mid_block.resnets.{}", RESNET_CHANNELS),
    *within("decoder.mid_block.attentions.{}", ATTENTION_CHANNELS),
    *within("decoder.up_blocks.{}.resnets.{}", RESNET_CHANNELS),
)

# How latents are scaled is in no tensor. These are SD1's and SD2's numbers; the components of SDXL, Flux and SD3 say
# theirs.
SCALING: dict[str, Any] = {
    "force_upcast": True,
    "latents_mean": None,
    "latents_std": None,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "shift_factor": None,
}

register(
    Network(
        name="autoencoder_kl",
        role="vae",
        spellings=(
            Spelling("original", (*ENDS, *FOUR_LEVELS, *QUANT)),
            Spelling("diffusers", (*DIFFUSERS_ENDS, *NEW_MIDDLES, *DIFFUSERS_FOUR_LEVELS, *QUANT)),
            Spelling("diffusers_old", (*DIFFUSERS_ENDS, *OLD_MIDDLES, *DIFFUSERS_FOUR_LEVELS, *QUANT)),
        ),
        variants=(
            Variant("sd_vae", {**FOUR_LEVEL_SHAPES, **FOUR_LATENTS}),
            Variant(
                "flux_vae", {**FOUR_LEVEL_SHAPES, **SIXTEEN_LATENTS},
                lacks=("quant_conv.weight", "post_quant_conv.weight"),
            ),
        ),
        blocks=AUTOENCODER_BLOCKS,
        config=Config("AutoencoderKL", {**CONFIG, **FOUR_LEVEL_CONFIG, **SCALING}),
        permutations=PERMUTATIONS,
    ),
    Network(
        name="autoencoder_kl_f4",
        role="vae",
        spellings=(
            Spelling("original", (*ENDS, *THREE_LEVELS, *QUANT)),
            Spelling("diffusers", (*DIFFUSERS_ENDS, *NEW_MIDDLES, *DIFFUSERS_THREE_LEVELS, *QUANT)),
            Spelling("diffusers_old", (*DIFFUSERS_ENDS, *OLD_MIDDLES, *DIFFUSERS_THREE_LEVELS, *QUANT)),
        ),
        variants=(Variant("upscaler_vae", {**THREE_LEVEL_SHAPES, **FOUR_LATENTS}),),
        blocks=AUTOENCODER_BLOCKS,
        config=Config("AutoencoderKL", {**CONFIG, **THREE_LEVEL_CONFIG, **SCALING, "scaling_factor": 0.08333}),
    ),
    Network(
        name="autoencoder_kl_flux2",
        role="vae",
        spellings=(
            Spelling("original", (*ENDS, *FOUR_LEVELS, *INNER_QUANT, *QUANT, *BATCH_NORM)),
            Spelling("diffusers", (*DIFFUSERS_ENDS, *NEW_MIDDLES, *DIFFUSERS_FOUR_LEVELS, *QUANT, *BATCH_NORM)),
        ),
        variants=(
            Variant("flux2_vae", {
                **FOUR_LEVEL_SHAPES,
                **THIRTY_TWO_LATENTS,
                "bn.running_mean": (128,),
                "bn.running_var": (128,),
            }),
        ),
        blocks=AUTOENCODER_BLOCKS,
        has=("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"),
        config=Config(
            "AutoencoderKLFlux2",
            {
                **CONFIG,
                **FOUR_LEVEL_CONFIG,
                "batch_norm_eps": 0.0001,
                "batch_norm_momentum": 0.1,
                "patch_size": [2, 2],
                "sample_size": 1024,
            },
        ),
    ),
)  # fmt: skip
