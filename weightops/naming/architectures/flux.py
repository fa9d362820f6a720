"""Flux.1: dev, schnell, Kontext, Fill, Depth and Canny. Source: FORMATS §5; Black Forest Labs, ComfyUI, diffusers."""

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
    move,
    pack,
    register,
    swap,
    tensor,
)

RULES = (
    move("img_in", "x_embedder"),
    move("txt_in", "context_embedder"),
    move("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    move("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    move("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    move("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    move("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    move("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    move("double_blocks.{}.img_mod.lin", "transformer_blocks.{}.norm1.linear"),
    move("double_blocks.{}.txt_mod.lin", "transformer_blocks.{}.norm1_context.linear"),
    pack(
        "double_blocks.{}.img_attn.qkv",
        "transformer_blocks.{}.attn.to_q",
        "transformer_blocks.{}.attn.to_k",
        "transformer_blocks.{}.attn.to_v",
    ),
    pack(
        "double_blocks.{}.txt_attn.qkv",
        "transformer_blocks.{}.attn.add_q_proj",
        "transformer_blocks.{}.attn.add_k_proj",
        "transformer_blocks.{}.attn.add_v_proj",
    ),
    move("double_blocks.{}.img_attn.proj", "transformer_blocks.{}.attn.to_out.0"),
    move("double_blocks.{}.txt_attn.proj", "transformer_blocks.{}.attn.to_add_out"),
    move("double_blocks.{}.img_mlp.0", "transformer_blocks.{}.ff.net.0.proj"),
    move("double_blocks.{}.img_mlp.2", "transformer_blocks.{}.ff.net.2"),
    move("double_blocks.{}.txt_mlp.0", "transformer_blocks.{}.ff_context.net.0.proj"),
    move("double_blocks.{}.txt_mlp.2", "transformer_blocks.{}.ff_context.net.2"),
    move("single_blocks.{}.modulation.lin", "single_transformer_blocks.{}.norm.linear"),
    pack(
        "single_blocks.{}.linear1",
        "single_transformer_blocks.{}.attn.to_q",
        "single_transformer_blocks.{}.attn.to_k",
        "single_transformer_blocks.{}.attn.to_v",
        "single_transformer_blocks.{}.proj_mlp",
        heights=("in", "in", "in", "="),
    ),
    move("single_blocks.{}.linear2", "single_transformer_blocks.{}.proj_out"),
    swap("final_layer.adaLN_modulation.1", "norm_out.linear"),
    move("final_layer.linear", "proj_out"),
)

# The norms of queries and keys, in files of Black Forest Labs.
SCALES = (
    tensor("double_blocks.{}.img_attn.norm.query_norm.scale", "transformer_blocks.{}.attn.norm_q.weight"),
    tensor("double_blocks.{}.img_attn.norm.key_norm.scale", "transformer_blocks.{}.attn.norm_k.weight"),
    tensor("double_blocks.{}.txt_attn.norm.query_norm.scale", "transformer_blocks.{}.attn.norm_added_q.weight"),
    tensor("double_blocks.{}.txt_attn.norm.key_norm.scale", "transformer_blocks.{}.attn.norm_added_k.weight"),
    tensor("single_blocks.{}.norm.query_norm.scale", "single_transformer_blocks.{}.attn.norm_q.weight"),
    tensor("single_blocks.{}.norm.key_norm.scale", "single_transformer_blocks.{}.attn.norm_k.weight"),
)

# The same in what ComfyUI saves since 2026; it reads both.
WEIGHTS = (
    tensor("double_blocks.{}.img_attn.norm.query_norm.weight", "transformer_blocks.{}.attn.norm_q.weight"),
    tensor("double_blocks.{}.img_attn.norm.key_norm.weight", "transformer_blocks.{}.attn.norm_k.weight"),
    tensor("double_blocks.{}.txt_attn.norm.query_norm.weight", "transformer_blocks.{}.attn.norm_added_q.weight"),
    tensor("double_blocks.{}.txt_attn.norm.key_norm.weight", "transformer_blocks.{}.attn.norm_added_k.weight"),
    tensor("single_blocks.{}.norm.query_norm.weight", "single_transformer_blocks.{}.attn.norm_q.weight"),
    tensor("single_blocks.{}.norm.key_norm.weight", "single_transformer_blocks.{}.attn.norm_k.weight"),
)

# XLabs' adapters name the part of a single block's first matrix that they change.
XLABS = (
    pack(
        "single_blocks.{}.qkv",
        "single_transformer_blocks.{}.attn.to_q",
        "single_transformer_blocks.{}.attn.to_k",
        "single_transformer_blocks.{}.attn.to_v",
    ),
)

_SHAPES = {
    "context_embedder.weight": (3072, 4096),
    "time_text_embed.text_embedder.linear_1.weight": (3072, 768),
    "transformer_blocks.{}.norm1.linear.weight": (18432, 3072),
    "transformer_blocks.{}.norm1_context.linear.weight": (18432, 3072),
    "transformer_blocks.{}.attn.to_q.weight": (3072, 3072),
    "transformer_blocks.{}.attn.to_k.weight": (3072, 3072),
    "transformer_blocks.{}.attn.to_v.weight": (3072, 3072),
    "transformer_blocks.{}.attn.to_out.0.weight": (3072, 3072),
    "transformer_blocks.{}.attn.add_q_proj.weight": (3072, 3072),
    "transformer_blocks.{}.attn.add_k_proj.weight": (3072, 3072),
    "transformer_blocks.{}.attn.add_v_proj.weight": (3072, 3072),
    "transformer_blocks.{}.attn.to_add_out.weight": (3072, 3072),
    "transformer_blocks.{}.ff.net.0.proj.weight": (12288, 3072),
    "transformer_blocks.{}.ff.net.2.weight": (3072, 12288),
    "transformer_blocks.{}.ff_context.net.0.proj.weight": (12288, 3072),
    "transformer_blocks.{}.ff_context.net.2.weight": (3072, 12288),
    "single_transformer_blocks.{}.norm.linear.weight": (9216, 3072),
    "single_transformer_blocks.{}.attn.to_q.weight": (3072, 3072),
    "single_transformer_blocks.{}.attn.to_k.weight": (3072, 3072),
    "single_transformer_blocks.{}.attn.to_v.weight": (3072, 3072),
    "single_transformer_blocks.{}.proj_mlp.weight": (12288, 3072),
    "single_transformer_blocks.{}.proj_out.weight": (3072, 15360),
    "norm_out.linear.weight": (6144, 3072),
    "proj_out.weight": (64, 3072),
}
_COUNTS = {"transformer_blocks.{}": 19, "single_transformer_blocks.{}": 38}
_GUIDANCE = ("time_text_embed.guidance_embedder.linear_1.weight",)

register(
    Network(
        name="flux_transformer",
        role="transformer",
        spellings=(Spelling("original", RULES + SCALES), Spelling("comfy", RULES + WEIGHTS)),
        adapter_spellings=(Spelling("xlabs", RULES + SCALES + XLABS),),
        variants=(
            # Kontext has dev's names and shapes.
            Variant("flux_dev", {"x_embedder.weight": (3072, 64), **_SHAPES}, _COUNTS, has=_GUIDANCE),
            Variant("flux_schnell", {"x_embedder.weight": (3072, 64), **_SHAPES}, _COUNTS, lacks=_GUIDANCE),
            Variant("flux_fill", {"x_embedder.weight": (3072, 384), **_SHAPES}, _COUNTS, has=_GUIDANCE),
            # Depth and Canny alike.
            Variant("flux_control", {"x_embedder.weight": (3072, 128), **_SHAPES}, _COUNTS, has=_GUIDANCE),
        ),
        blocks=(
            ("in", ("x_embedder", "context_embedder", "time_text_embed")),
            ("double.{}", ("transformer_blocks.{}",)),
            ("single.{}", ("single_transformer_blocks.{}",)),
            ("out", ("norm_out", "proj_out")),
        ),
        config=Config(
            "FluxTransformer2DModel",
            {
                "attention_head_dim": 128,
                "axes_dims_rope": [16, 56, 56],
                "guidance_embeds": Has("time_text_embed.guidance_embedder.linear_1.weight"),
                "in_channels": Dim("x_embedder.weight", 1),
                "joint_attention_dim": Dim("context_embedder.weight", 1),
                "num_attention_heads": Dim("x_embedder.weight", 0, 128),
                "num_layers": Count("transformer_blocks.{}"),
                "num_single_layers": Count("single_transformer_blocks.{}"),
                "out_channels": Dim("proj_out.weight", 0),
                "patch_size": 1,
                "pooled_projection_dim": Dim("time_text_embed.text_embedder.linear_1.weight", 1),
            },
        ),
    ),
    Architecture(
        name="flux",
        title="Flux.1",
        hints=("flux1", "flux.1", "flux-1"),
        components=(
            Component(
                "transformer", "flux_transformer", prefix="model.diffusion_model.", comfy="model.diffusion_model.",
                comfy_spelling="comfy", kohya="lora_unet", kohya_spelling="original",
            ),
            Component(
                "vae", "autoencoder_kl", prefix="vae.", variant="flux_vae",
                config={"sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159},
            ),
            Component(
                "text_encoder", "clip", prefix="text_encoders.clip_l.transformer.", spelling="transformers",
                kohya="lora_te1", kohya_spelling="transformers", variant="clip_l",
                omits=("text_model.embeddings.position_ids", "text_projection", "logit_scale"),
            ),
            Component(
                "text_encoder_2", "t5", prefix="text_encoders.t5xxl.transformer.", spelling="transformers",
                kohya="lora_te3", kohya_spelling="transformers", variant="t5_xxl",
            ),
        ),
    ),
)  # fmt: skip
