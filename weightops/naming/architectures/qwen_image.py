"""Qwen-Image, its Edit and Layered models. Source: FORMATS §1, §5; Qwen (Alibaba), diffusers, ComfyUI.

The authors publish diffusers' names, so there is one spelling.
"""

from weightops.naming.keymap import (
    Architecture,
    Component,
    Config,
    Count,
    Dim,
    Has,
    Network,
    Spelling,
    Variant,
    register,
    same,
)

RULES = same(
    "img_in",
    "txt_norm",
    "txt_in",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "time_text_embed.addition_t_embedding",
    "transformer_blocks.{}.img_mod.1",
    "transformer_blocks.{}.txt_mod.1",
    "transformer_blocks.{}.attn.to_q",
    "transformer_blocks.{}.attn.to_k",
    "transformer_blocks.{}.attn.to_v",
    "transformer_blocks.{}.attn.to_out.0",
    "transformer_blocks.{}.attn.norm_q",
    "transformer_blocks.{}.attn.norm_k",
    "transformer_blocks.{}.attn.add_q_proj",
    "transformer_blocks.{}.attn.add_k_proj",
    "transformer_blocks.{}.attn.add_v_proj",
    "transformer_blocks.{}.attn.to_add_out",
    "transformer_blocks.{}.attn.norm_added_q",
    "transformer_blocks.{}.attn.norm_added_k",
    "transformer_blocks.{}.img_mlp.net.0.proj",
    "transformer_blocks.{}.img_mlp.net.2",
    "transformer_blocks.{}.txt_mlp.net.0.proj",
    "transformer_blocks.{}.txt_mlp.net.2",
    "norm_out.linear",
    "proj_out",
)

register(
    Network(
        name="qwen_image_transformer",
        role="transformer",
        # ComfyUI marks the files of Edit 2511 with an empty tensor.
        spellings=(Spelling("diffusers", RULES, extras=("__index_timestep_zero__",)),),
        variants=(
            Variant(
                "qwen_image",
                {
                    "img_in.weight": (3072, 64),
                    "txt_norm.weight": (3584,),
                    "txt_in.weight": (3072, 3584),
                    "time_text_embed.timestep_embedder.linear_1.weight": (3072, 256),
                    "transformer_blocks.{}.img_mod.1.weight": (18432, 3072),
                    "transformer_blocks.{}.txt_mod.1.weight": (18432, 3072),
                    "transformer_blocks.{}.attn.to_q.weight": (3072, 3072),
                    "transformer_blocks.{}.attn.to_k.weight": (3072, 3072),
                    "transformer_blocks.{}.attn.to_v.weight": (3072, 3072),
                    "transformer_blocks.{}.attn.to_out.0.weight": (3072, 3072),
                    "transformer_blocks.{}.attn.add_q_proj.weight": (3072, 3072),
                    "transformer_blocks.{}.attn.add_k_proj.weight": (3072, 3072),
                    "transformer_blocks.{}.attn.add_v_proj.weight": (3072, 3072),
                    "transformer_blocks.{}.attn.to_add_out.weight": (3072, 3072),
                    "transformer_blocks.{}.img_mlp.net.0.proj.weight": (12288, 3072),
                    "transformer_blocks.{}.img_mlp.net.2.weight": (3072, 12288),
                    "transformer_blocks.{}.txt_mlp.net.0.proj.weight": (12288, 3072),
                    "transformer_blocks.{}.txt_mlp.net.2.weight": (3072, 12288),
                    "norm_out.linear.weight": (6144, 3072),
                    "proj_out.weight": (64, 3072),
                },
                {"transformer_blocks.{}": 60},
            ),
        ),
        blocks=(
            ("in", ("img_in", "txt_norm", "txt_in", "time_text_embed")),
            ("block.{}", ("transformer_blocks.{}",)),
            ("out", ("norm_out", "proj_out")),
        ),
        config=Config(
            "QwenImageTransformer2DModel",
            {
                "patch_size": 2,
                "in_channels": Dim("img_in.weight", 1),
                "out_channels": Dim("proj_out.weight", 0, 4),
                "num_layers": Count("transformer_blocks.{}"),
                "attention_head_dim": 128,
                "num_attention_heads": Dim("img_in.weight", 0, 128),
                "joint_attention_dim": Dim("txt_in.weight", 1),
                "guidance_embeds": False,
                "axes_dims_rope": [16, 56, 56],
                # True of Edit 2511, whose weights are called and shaped as all others.
                "zero_cond_t": False,
                # Both belong to the Layered model alone.
                "use_additional_t_cond": Has("time_text_embed.addition_t_embedding.weight"),
                "use_layer3d_rope": Has("time_text_embed.addition_t_embedding.weight"),
            },
        ),
    ),
    Architecture(
        name="qwen_image",
        title="Qwen-Image",
        hints=("qwen",),
        components=(
            Component(
                "transformer", "qwen_image_transformer", prefix="model.diffusion_model.", spelling="diffusers",
                kohya="lora_unet", kohya_spelling="diffusers",
            ),
            Component("vae", "autoencoder_wan", prefix="vae.", config={"_class_name": "AutoencoderKLQwenImage"}),
        ),
    ),
)  # fmt: skip
