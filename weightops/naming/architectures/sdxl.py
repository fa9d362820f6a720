"""Stable Diffusion XL, base. Source: FORMATS §2 to §4; generative-models (SGM), Stability AI."""

from weightops.naming.channels import SDXL_PERMUTATIONS
from weightops.naming.keymap import (
    Architecture,
    Component,
    Config,
    Count,
    Dim,
    Network,
    Pipeline,
    Spelling,
    Variant,
    move,
    register,
    same,
    under,
)
from weightops.naming.parts import ATTENTION, MATRICES, RESNET, UNET_CONFIG, transformer_shapes

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
    ("IN00", ("conv_in", "time_embedding", "add_embedding", "encoder_hid_proj")),
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

SHAPES = {
    "add_embedding.linear_1.weight": (1280, 2816),
    **transformer_shapes("down_blocks.1.attentions.{}", 640, 2048),
    **transformer_shapes("down_blocks.2.attentions.{}", 1280, 2048),
    **transformer_shapes("mid_block.attentions.0", 1280, 2048),
    **transformer_shapes("up_blocks.0.attentions.{}", 1280, 2048),
    **transformer_shapes("up_blocks.1.attentions.{}", 640, 2048),
    "down_blocks.0.resnets.{}.conv2.weight": (320, 320, 3, 3),
    "down_blocks.1.resnets.{}.conv2.weight": (640, 640, 3, 3),
    "down_blocks.2.resnets.{}.conv2.weight": (1280, 1280, 3, 3),
    "up_blocks.0.resnets.{}.conv2.weight": (1280, 1280, 3, 3),
    "up_blocks.1.resnets.{}.conv2.weight": (640, 640, 3, 3),
    "up_blocks.2.resnets.{}.conv2.weight": (320, 320, 3, 3),
    # Models with one resnet to a level (KOALA) have other skip connections, and number their blocks otherwise.
    "up_blocks.0.resnets.1.conv1.weight": (1280, 2560, 3, 3),
    "up_blocks.1.resnets.1.conv1.weight": (640, 1280, 3, 3),
}

DEPTHS = {
    "down_blocks.1.attentions.0.transformer_blocks.{}": 2,
    "down_blocks.2.attentions.0.transformer_blocks.{}": 10,
    "mid_block.attentions.0.transformer_blocks.{}": 10,
    "up_blocks.0.attentions.0.transformer_blocks.{}": 10,
    "up_blocks.1.attentions.0.transformer_blocks.{}": 2,
}

# Segmind's SSD-1B and Vega have the same names, but fewer blocks.
DEEPEST = (
    "mid_block.attentions.0.transformer_blocks.9.norm1.weight",
    "up_blocks.0.attentions.0.transformer_blocks.9.norm1.weight",
)

register(
    Network(
        name="sdxl_unet",
        role="unet",
        spellings=(Spelling("original", RULES),),
        needs=MATRICES,
        variants=(
            Variant("sdxl", {"conv_in.weight": (320, 4, 3, 3), **SHAPES}, DEPTHS, has=DEEPEST),
            Variant("sdxl_inpaint", {"conv_in.weight": (320, 9, 3, 3), **SHAPES}, DEPTHS, has=DEEPEST),
            Variant("sdxl_pix2pix", {"conv_in.weight": (320, 8, 3, 3), **SHAPES}, DEPTHS, has=DEEPEST),
        ),
        blocks=BLOCKS,
        config=Config(
            "UNet2DConditionModel",
            {
                **UNET_CONFIG,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "attention_head_dim": [
                    Dim("down_blocks.0.resnets.0.conv1.weight", 0, divide=64),
                    Dim("down_blocks.1.resnets.0.conv1.weight", 0, divide=64),
                    Dim("down_blocks.2.resnets.0.conv1.weight", 0, divide=64),
                ],
                "block_out_channels": [
                    Dim("down_blocks.0.resnets.0.conv1.weight", 0),
                    Dim("down_blocks.1.resnets.0.conv1.weight", 0),
                    Dim("down_blocks.2.resnets.0.conv1.weight", 0),
                ],
                "cross_attention_dim": Dim("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", 1),
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "projection_class_embeddings_input_dim": Dim("add_embedding.linear_1.weight", 1),
                "sample_size": 128,
                "transformer_layers_per_block": [
                    1,
                    Count("down_blocks.1.attentions.0.transformer_blocks.{}"),
                    Count("down_blocks.2.attentions.0.transformer_blocks.{}"),
                ],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "use_linear_projection": True,
            },
        ),
        permutations=SDXL_PERMUTATIONS,
    ),
    # Kwai's Kolors is this UNet with a projection before it; named here so that it is not taken for SDXL.
    Network(
        name="kolors_unet",
        role="unet",
        spellings=(Spelling("original", (*RULES, *same("encoder_hid_proj"))),),
        needs=MATRICES,
        has=("encoder_hid_proj.weight", "encoder_hid_proj.bias"),
        variants=(
            Variant("kolors", {
                "add_embedding.linear_1.weight": (1280, 5632), "encoder_hid_proj.weight": (2048, 4096),
            }),
        ),
        blocks=BLOCKS,
        permutations=SDXL_PERMUTATIONS,
    ),
    Architecture(
        name="sdxl",
        title="Stable Diffusion XL",
        hints=("sdxl", "stable-diffusion-xl"),
        components=(
            Component(
                "unet", "sdxl_unet", prefix="model.diffusion_model.", kohya="lora_unet", kohya_spelling="original",
            ),
            Component(
                "vae", "autoencoder_kl", prefix="first_stage_model.", variant="sd_vae",
                config={"sample_size": 1024, "scaling_factor": 0.13025},
            ),
            Component(
                "text_encoder", "clip", prefix="conditioner.embedders.0.transformer.", spelling="transformers",
                kohya="lora_te1", kohya_spelling="transformers", variant="clip_l",
                omits=("text_model.embeddings.position_ids", "text_projection", "logit_scale"),
            ),
            Component(
                "text_encoder_2", "clip", prefix="conditioner.embedders.1.model.", spelling="openclip",
                kohya="lora_te2", kohya_spelling="transformers", variant="clip_bigg",
                omits=("text_model.embeddings.position_ids", "logit_scale"),
                config={"architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu"},
            ),
        ),
        pipeline=Pipeline(
            class_name="StableDiffusionXLPipeline",
            classes={
                "feature_extractor": (None, None),
                "image_encoder": (None, None),
                "scheduler": ("diffusers", "EulerDiscreteScheduler"),
                "text_encoder": ("transformers", "CLIPTextModel"),
                "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
                "tokenizer": ("transformers", "CLIPTokenizer"),
                "tokenizer_2": ("transformers", "CLIPTokenizer"),
                "unet": ("diffusers", "UNet2DConditionModel"),
                "vae": ("diffusers", "AutoencoderKL"),
            },
            scheduler={
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "clip_sample": False,
                "interpolation_type": "linear",
                "num_train_timesteps": 1000,
                "prediction_type": "epsilon",
                "sample_max_value": 1.0,
                "set_alpha_to_one": False,
                "skip_prk_steps": True,
                "steps_offset": 1,
                "timestep_spacing": "leading",
                "trained_betas": None,
                "use_karras_sigmas": False,
            },
            tokenizers={
                "tokenizer": ("stabilityai/stable-diffusion-xl-base-1.0/tokenizer",),
                "tokenizer_2": ("stabilityai/stable-diffusion-xl-base-1.0/tokenizer_2",),
            },
            settings={"add_watermarker": None, "force_zeros_for_empty_prompt": True},
        ),
    ),
)  # fmt: skip
