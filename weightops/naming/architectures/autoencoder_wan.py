"""The video autoencoders of Wan 2.1 (which Qwen-Image has as well) and of Wan 2.2 5B.

Source: FORMATS §3; Wan-Video wan/modules/vae.py and vae2_2.py; diffusers scripts/convert_wan_to_diffusers.py.
"""

from typing import Any

from weightops.naming.keymap import Config, Dim, Has, Network, Spelling, Variant, move, register, same, tensor, under
from weightops.naming.parts import AUTOENCODER_BLOCKS

RESNET = (
    tensor("residual.0.gamma", "norm1.gamma"),
    move("residual.2", "conv1"),
    tensor("residual.3.gamma", "norm2.gamma"),
    move("residual.6", "conv2"),
    move("shortcut", "conv_shortcut"),
)

ATTENTION = (
    tensor("norm.gamma"),
    *same("to_qkv", "proj"),
)

ENDS = (
    move("encoder.conv1", "encoder.conv_in"),
    *under("encoder.middle.0", "encoder.mid_block.resnets.0", RESNET),
    *under("encoder.middle.1", "encoder.mid_block.attentions.0", ATTENTION),
    *under("encoder.middle.2", "encoder.mid_block.resnets.1", RESNET),
    tensor("encoder.head.0.gamma", "encoder.norm_out.gamma"),
    move("encoder.head.2", "encoder.conv_out"),
    move("conv1", "quant_conv"),
    move("conv2", "post_quant_conv"),
    move("decoder.conv1", "decoder.conv_in"),
    *under("decoder.middle.0", "decoder.mid_block.resnets.0", RESNET),
    *under("decoder.middle.1", "decoder.mid_block.attentions.0", ATTENTION),
    *under("decoder.middle.2", "decoder.mid_block.resnets.1", RESNET),
    tensor("decoder.head.0.gamma", "decoder.norm_out.gamma"),
    move("decoder.head.2", "decoder.conv_out"),
)

# Wan 2.1 numbers resnets and resamplings alike: two resnets to a level down, which diffusers keeps, and three up.
WAN21 = (
    *ENDS,
    *under("encoder.downsamples.{}", "encoder.down_blocks.{}", RESNET),
    move("encoder.downsamples.{}.resample.1", "encoder.down_blocks.{}.resample.1"),
    move("encoder.downsamples.{}.time_conv", "encoder.down_blocks.{}.time_conv"),
    *under("decoder.upsamples.0", "decoder.up_blocks.0.resnets.0", RESNET),
    *under("decoder.upsamples.1", "decoder.up_blocks.0.resnets.1", RESNET),
    *under("decoder.upsamples.2", "decoder.up_blocks.0.resnets.2", RESNET),
    move("decoder.upsamples.3.resample.1", "decoder.up_blocks.0.upsamplers.0.resample.1"),
    move("decoder.upsamples.3.time_conv", "decoder.up_blocks.0.upsamplers.0.time_conv"),
    *under("decoder.upsamples.4", "decoder.up_blocks.1.resnets.0", RESNET),
    *under("decoder.upsamples.5", "decoder.up_blocks.1.resnets.1", RESNET),
    *under("decoder.upsamples.6", "decoder.up_blocks.1.resnets.2", RESNET),
    move("decoder.upsamples.7.resample.1", "decoder.up_blocks.1.upsamplers.0.resample.1"),
    move("decoder.upsamples.7.time_conv", "decoder.up_blocks.1.upsamplers.0.time_conv"),
    *under("decoder.upsamples.8", "decoder.up_blocks.2.resnets.0", RESNET),
    *under("decoder.upsamples.9", "decoder.up_blocks.2.resnets.1", RESNET),
    *under("decoder.upsamples.10", "decoder.up_blocks.2.resnets.2", RESNET),
    move("decoder.upsamples.11.resample.1", "decoder.up_blocks.2.upsamplers.0.resample.1"),
    move("decoder.upsamples.11.time_conv", "decoder.up_blocks.2.upsamplers.0.time_conv"),
    *under("decoder.upsamples.12", "decoder.up_blocks.3.resnets.0", RESNET),
    *under("decoder.upsamples.13", "decoder.up_blocks.3.resnets.1", RESNET),
    *under("decoder.upsamples.14", "decoder.up_blocks.3.resnets.2", RESNET),
)

# Wan 2.2 numbers them within each level. Qwen-Image 2.1's, which has five levels and other widths, is another network.
WAN22 = (
    *ENDS,
    *under("encoder.downsamples.0.downsamples.{}", "encoder.down_blocks.0.resnets.{}", RESNET),
    move("encoder.downsamples.0.downsamples.2.resample.1", "encoder.down_blocks.0.downsampler.resample.1"),
    move("encoder.downsamples.0.downsamples.2.time_conv", "encoder.down_blocks.0.downsampler.time_conv"),
    *under("encoder.downsamples.1.downsamples.{}", "encoder.down_blocks.1.resnets.{}", RESNET),
    move("encoder.downsamples.1.downsamples.2.resample.1", "encoder.down_blocks.1.downsampler.resample.1"),
    move("encoder.downsamples.1.downsamples.2.time_conv", "encoder.down_blocks.1.downsampler.time_conv"),
    *under("encoder.downsamples.2.downsamples.{}", "encoder.down_blocks.2.resnets.{}", RESNET),
    move("encoder.downsamples.2.downsamples.2.resample.1", "encoder.down_blocks.2.downsampler.resample.1"),
    move("encoder.downsamples.2.downsamples.2.time_conv", "encoder.down_blocks.2.downsampler.time_conv"),
    *under("encoder.downsamples.3.downsamples.{}", "encoder.down_blocks.3.resnets.{}", RESNET),
    *under("decoder.upsamples.0.upsamples.{}", "decoder.up_blocks.0.resnets.{}", RESNET),
    move("decoder.upsamples.0.upsamples.3.resample.1", "decoder.up_blocks.0.upsampler.resample.1"),
    move("decoder.upsamples.0.upsamples.3.time_conv", "decoder.up_blocks.0.upsampler.time_conv"),
    *under("decoder.upsamples.1.upsamples.{}", "decoder.up_blocks.1.resnets.{}", RESNET),
    move("decoder.upsamples.1.upsamples.3.resample.1", "decoder.up_blocks.1.upsampler.resample.1"),
    move("decoder.upsamples.1.upsamples.3.time_conv", "decoder.up_blocks.1.upsampler.time_conv"),
    *under("decoder.upsamples.2.upsamples.{}", "decoder.up_blocks.2.resnets.{}", RESNET),
    move("decoder.upsamples.2.upsamples.3.resample.1", "decoder.up_blocks.2.upsampler.resample.1"),
    move("decoder.upsamples.2.upsamples.3.time_conv", "decoder.up_blocks.2.upsampler.time_conv"),
    *under("decoder.upsamples.3.upsamples.{}", "decoder.up_blocks.3.resnets.{}", RESNET),
)

CONFIG: dict[str, Any] = {
    "attn_scales": [],
    "base_dim": Dim("encoder.conv_in.weight", 0),
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "num_res_blocks": 2,
    "z_dim": Dim("decoder.conv_in.weight", 1),
}

register(
    Network(
        name="autoencoder_wan",
        role="vae",
        spellings=(Spelling("original", WAN21),),
        variants=(
            Variant("wan21_vae", {
                "encoder.conv_in.weight": (96, 3, 3, 3, 3),
                "encoder.conv_out.weight": (32, 384, 3, 3, 3),
                "encoder.mid_block.resnets.{}.conv2.weight": (384, 384, 3, 3, 3),
                "decoder.conv_in.weight": (384, 16, 3, 3, 3),
                "decoder.conv_out.weight": (3, 96, 3, 3, 3),
                "decoder.mid_block.resnets.{}.conv2.weight": (384, 384, 3, 3, 3),
            }),
        ),
        blocks=AUTOENCODER_BLOCKS,
        config=Config(
            "AutoencoderKLWan",
            {
                **CONFIG,
                "latents_mean": [
                    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
                ],
                "latents_std": [
                    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
                ],
                "temperal_downsample": [
                    Has("encoder.down_blocks.2.time_conv.weight"),
                    Has("encoder.down_blocks.5.time_conv.weight"),
                    Has("encoder.down_blocks.8.time_conv.weight"),
                ],
            },
        ),
    ),
    Network(
        name="autoencoder_wan22",
        role="vae",
        spellings=(Spelling("original", WAN22),),
        variants=(
            Variant("wan22_vae", {
                "encoder.conv_in.weight": (160, 12, 3, 3, 3),
                "encoder.conv_out.weight": (96, 640, 3, 3, 3),
                "encoder.mid_block.resnets.{}.conv2.weight": (640, 640, 3, 3, 3),
                "decoder.conv_in.weight": (1024, 48, 3, 3, 3),
                "decoder.conv_out.weight": (12, 256, 3, 3, 3),
                "decoder.mid_block.resnets.{}.conv2.weight": (1024, 1024, 3, 3, 3),
            }),
        ),
        blocks=AUTOENCODER_BLOCKS,
        config=Config(
            "AutoencoderKLWan",
            {
                **CONFIG,
                "decoder_base_dim": Dim("decoder.conv_out.weight", 1),
                "in_channels": Dim("encoder.conv_in.weight", 1),
                "is_residual": True,
                "latents_mean": [
                    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
                    -0.1382, 0.0542, 0.2813, 0.0891, 0.157, -0.0098, 0.0375, -0.1825,
                    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
                    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123,
                    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748,
                    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
                ],
                "latents_std": [
                    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013,
                    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
                    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
                    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
                    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
                    0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
                ],
                "out_channels": Dim("decoder.conv_out.weight", 0),
                "patch_size": 2,
                "scale_factor_spatial": 16,
                "scale_factor_temporal": 4,
                "temperal_downsample": [
                    Has("encoder.down_blocks.0.downsampler.time_conv.weight"),
                    Has("encoder.down_blocks.1.downsampler.time_conv.weight"),
                    Has("encoder.down_blocks.2.downsampler.time_conv.weight"),
                ],
            },
        ),
    ),
)  # fmt: skip
