"""HunyuanVideo, text and image to video. Source: FORMATS §1, §5; Tencent, diffusers, ComfyUI.

HunyuanVideo 1.5 and HunyuanImage are other networks: they have no pooled text, and patches of one latent pixel.
"""

from weightops.naming.keymap import (
    EQUAL,
    IN,
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
    same,
    swap,
    tensor,
    under,
)

REFINER = (
    *same("norm1"),
    pack("self_attn_qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    move("self_attn_proj", "attn.to_out.0"),
    *same("norm2"),
    move("mlp.fc1", "ff.net.0.proj"),
    move("mlp.fc2", "ff.net.2"),
    move("adaLN_modulation.1", "norm_out.linear"),
)

DOUBLE = (
    move("img_mod.linear", "norm1.linear"),
    pack("img_attn_qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    move("img_attn_q_norm", "attn.norm_q"),
    move("img_attn_k_norm", "attn.norm_k"),
    move("img_attn_proj", "attn.to_out.0"),
    move("img_mlp.fc1", "ff.net.0.proj"),
    move("img_mlp.fc2", "ff.net.2"),
    move("txt_mod.linear", "norm1_context.linear"),
    pack("txt_attn_qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    move("txt_attn_q_norm", "attn.norm_added_q"),
    move("txt_attn_k_norm", "attn.norm_added_k"),
    move("txt_attn_proj", "attn.to_add_out"),
    move("txt_mlp.fc1", "ff_context.net.0.proj"),
    move("txt_mlp.fc2", "ff_context.net.2"),
)

SINGLE = (
    move("modulation.linear", "norm.linear"),
    pack("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", heights=(IN, IN, IN, EQUAL)),
    move("q_norm", "attn.norm_q"),
    move("k_norm", "attn.norm_k"),
    move("linear2", "proj_out"),
)

ORIGINAL = (
    move("img_in.proj", "x_embedder.proj"),
    move("time_in.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    move("time_in.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    move("guidance_in.mlp.0", "time_text_embed.guidance_embedder.linear_1"),
    move("guidance_in.mlp.2", "time_text_embed.guidance_embedder.linear_2"),
    move("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    move("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    move("txt_in.input_embedder", "context_embedder.proj_in"),
    move("txt_in.t_embedder.mlp.0", "context_embedder.time_text_embed.timestep_embedder.linear_1"),
    move("txt_in.t_embedder.mlp.2", "context_embedder.time_text_embed.timestep_embedder.linear_2"),
    move("txt_in.c_embedder.linear_1", "context_embedder.time_text_embed.text_embedder.linear_1"),
    move("txt_in.c_embedder.linear_2", "context_embedder.time_text_embed.text_embedder.linear_2"),
    *under(
        "txt_in.individual_token_refiner.blocks.{}", "context_embedder.token_refiner.refiner_blocks.{}", REFINER,
    ),
    *under("double_blocks.{}", "transformer_blocks.{}", DOUBLE),
    *under("single_blocks.{}", "single_transformer_blocks.{}", SINGLE),
    swap("final_layer.adaLN_modulation.1", "norm_out.linear"),
    move("final_layer.linear", "proj_out"),
)  # fmt: skip

COMFY_REFINER = (
    *same("norm1"),
    pack("self_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    move("self_attn.proj", "attn.to_out.0"),
    *same("norm2"),
    move("mlp.0", "ff.net.0.proj"),
    move("mlp.2", "ff.net.2"),
    move("adaLN_modulation.1", "norm_out.linear"),
)

# Norms are called .scale in files, and .weight in what ComfyUI of 2026 holds; that reads both.
COMFY_DOUBLE = (
    move("img_mod.lin", "norm1.linear"),
    pack("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    tensor("img_attn.norm.query_norm.scale", "attn.norm_q.weight"),
    tensor("img_attn.norm.query_norm.weight", "attn.norm_q.weight"),
    tensor("img_attn.norm.key_norm.scale", "attn.norm_k.weight"),
    tensor("img_attn.norm.key_norm.weight", "attn.norm_k.weight"),
    move("img_attn.proj", "attn.to_out.0"),
    move("img_mlp.0", "ff.net.0.proj"),
    move("img_mlp.2", "ff.net.2"),
    move("txt_mod.lin", "norm1_context.linear"),
    pack("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    tensor("txt_attn.norm.query_norm.scale", "attn.norm_added_q.weight"),
    tensor("txt_attn.norm.query_norm.weight", "attn.norm_added_q.weight"),
    tensor("txt_attn.norm.key_norm.scale", "attn.norm_added_k.weight"),
    tensor("txt_attn.norm.key_norm.weight", "attn.norm_added_k.weight"),
    move("txt_attn.proj", "attn.to_add_out"),
    move("txt_mlp.0", "ff_context.net.0.proj"),
    move("txt_mlp.2", "ff_context.net.2"),
)

COMFY_SINGLE = (
    move("modulation.lin", "norm.linear"),
    pack("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", heights=(IN, IN, IN, EQUAL)),
    tensor("norm.query_norm.scale", "attn.norm_q.weight"),
    tensor("norm.query_norm.weight", "attn.norm_q.weight"),
    tensor("norm.key_norm.scale", "attn.norm_k.weight"),
    tensor("norm.key_norm.weight", "attn.norm_k.weight"),
    move("linear2", "proj_out"),
)

COMFY = (
    move("img_in.proj", "x_embedder.proj"),
    move("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    move("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    move("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    move("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    move("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    move("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    move("txt_in.input_embedder", "context_embedder.proj_in"),
    move("txt_in.t_embedder.in_layer", "context_embedder.time_text_embed.timestep_embedder.linear_1"),
    move("txt_in.t_embedder.out_layer", "context_embedder.time_text_embed.timestep_embedder.linear_2"),
    move("txt_in.c_embedder.in_layer", "context_embedder.time_text_embed.text_embedder.linear_1"),
    move("txt_in.c_embedder.out_layer", "context_embedder.time_text_embed.text_embedder.linear_2"),
    *under(
        "txt_in.individual_token_refiner.blocks.{}", "context_embedder.token_refiner.refiner_blocks.{}", COMFY_REFINER,
    ),
    *under("double_blocks.{}", "transformer_blocks.{}", COMFY_DOUBLE),
    *under("single_blocks.{}", "single_transformer_blocks.{}", COMFY_SINGLE),
    swap("final_layer.adaLN_modulation.1", "norm_out.linear"),
    move("final_layer.linear", "proj_out"),
)  # fmt: skip

_SHAPES = {
    "time_text_embed.timestep_embedder.linear_1.weight": (3072, 256),
    "time_text_embed.text_embedder.linear_1.weight": (3072, 768),
    "context_embedder.proj_in.weight": (3072, 4096),
    "context_embedder.token_refiner.refiner_blocks.{}.attn.to_q.weight": (3072, 3072),
    "context_embedder.token_refiner.refiner_blocks.{}.attn.to_k.weight": (3072, 3072),
    "context_embedder.token_refiner.refiner_blocks.{}.attn.to_v.weight": (3072, 3072),
    "context_embedder.token_refiner.refiner_blocks.{}.attn.to_out.0.weight": (3072, 3072),
    "context_embedder.token_refiner.refiner_blocks.{}.ff.net.0.proj.weight": (12288, 3072),
    "context_embedder.token_refiner.refiner_blocks.{}.ff.net.2.weight": (3072, 12288),
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

_COUNTS = {
    "context_embedder.token_refiner.refiner_blocks.{}": 2,
    "transformer_blocks.{}": 20,
    "single_transformer_blocks.{}": 40,
}

register(
    Network(
        name="hunyuan_video_transformer",
        role="transformer",
        spellings=(Spelling("original", ORIGINAL), Spelling("comfy", COMFY)),
        # The refiner of HunyuanImage has no names but these; its patches are of one latent pixel.
        needs={"x_embedder.proj.weight": (None, None, 1, 2, 2)},
        variants=(
            Variant("hunyuan_video", {"x_embedder.proj.weight": (3072, 16, 1, 2, 2), **_SHAPES}, _COUNTS),
            Variant("hunyuan_video_i2v", {"x_embedder.proj.weight": (3072, 33, 1, 2, 2), **_SHAPES}, _COUNTS),
            Variant("skyreels_v1_i2v", {"x_embedder.proj.weight": (3072, 32, 1, 2, 2), **_SHAPES}, _COUNTS),
        ),
        blocks=(
            ("in", ("x_embedder", "time_text_embed", "context_embedder")),
            ("double.{}", ("transformer_blocks.{}",)),
            ("single.{}", ("single_transformer_blocks.{}",)),
            ("out", ("norm_out", "proj_out")),
        ),
        config=Config(
            "HunyuanVideoTransformer3DModel",
            {
                "in_channels": Dim("x_embedder.proj.weight", 1),
                "out_channels": Dim("proj_out.weight", 0, 4),
                "num_attention_heads": Dim("x_embedder.proj.weight", 0, 128),
                "attention_head_dim": 128,
                "num_layers": Count("transformer_blocks.{}"),
                "num_single_layers": Count("single_transformer_blocks.{}"),
                "num_refiner_layers": Count("context_embedder.token_refiner.refiner_blocks.{}"),
                "mlp_ratio": 4.0,
                "patch_size": 2,
                "patch_size_t": 1,
                "qk_norm": "rms_norm",
                "guidance_embeds": Has("time_text_embed.guidance_embedder.linear_1.weight"),
                "text_embed_dim": Dim("context_embedder.proj_in.weight", 1),
                "pooled_projection_dim": Dim("time_text_embed.text_embedder.linear_1.weight", 1),
                "rope_theta": 256.0,
                "rope_axes_dim": [16, 56, 56],
                # Not to be told from shapes: "token_replace" has those of text to video.
                "image_condition_type": None,
            },
        ),
    ),
    Architecture(
        name="hunyuan_video",
        title="HunyuanVideo",
        hints=("hunyuan",),
        components=(
            Component(
                "transformer", "hunyuan_video_transformer", prefix="model.diffusion_model.", comfy="model.model.",
                comfy_spelling="comfy", kohya="lora_unet", kohya_spelling="original",
            ),
            Component(
                "text_encoder_2", "clip", prefix="text_encoders.clip_l.transformer.", spelling="transformers",
                variant="clip_l",
            ),
        ),
    ),
)  # fmt: skip
