"""Chroma: Flux.1 schnell without its modulations, which one small network makes. Source: FORMATS §5; lodestone-rock."""

from weightops.naming.keymap import (
    Architecture,
    Component,
    Config,
    Count,
    Dim,
    Network,
    Spelling,
    Variant,
    move,
    pack,
    register,
    same,
    tensor,
)

RULES = (
    move("img_in", "x_embedder"),
    move("txt_in", "context_embedder"),
    *same("distilled_guidance_layer.in_proj"),
    move("distilled_guidance_layer.layers.{}.in_layer", "distilled_guidance_layer.layers.{}.linear_1"),
    move("distilled_guidance_layer.layers.{}.out_layer", "distilled_guidance_layer.layers.{}.linear_2"),
    *same("distilled_guidance_layer.out_proj"),
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
    pack(
        "single_blocks.{}.linear1",
        "single_transformer_blocks.{}.attn.to_q",
        "single_transformer_blocks.{}.attn.to_k",
        "single_transformer_blocks.{}.attn.to_v",
        "single_transformer_blocks.{}.proj_mlp",
        heights=("in", "in", "in", "="),
    ),
    move("single_blocks.{}.linear2", "single_transformer_blocks.{}.proj_out"),
    move("final_layer.linear", "proj_out"),
)

# The norms, in the author's files.
SCALES = (
    tensor("distilled_guidance_layer.norms.{}.scale", "distilled_guidance_layer.norms.{}.weight"),
    tensor("double_blocks.{}.img_attn.norm.query_norm.scale", "transformer_blocks.{}.attn.norm_q.weight"),
    tensor("double_blocks.{}.img_attn.norm.key_norm.scale", "transformer_blocks.{}.attn.norm_k.weight"),
    tensor("double_blocks.{}.txt_attn.norm.query_norm.scale", "transformer_blocks.{}.attn.norm_added_q.weight"),
    tensor("double_blocks.{}.txt_attn.norm.key_norm.scale", "transformer_blocks.{}.attn.norm_added_k.weight"),
    tensor("single_blocks.{}.norm.query_norm.scale", "single_transformer_blocks.{}.attn.norm_q.weight"),
    tensor("single_blocks.{}.norm.key_norm.scale", "single_transformer_blocks.{}.attn.norm_k.weight"),
)

# The same in what ComfyUI saves since 2026; it reads both.
WEIGHTS = (
    tensor("distilled_guidance_layer.norms.{}.weight"),
    tensor("double_blocks.{}.img_attn.norm.query_norm.weight", "transformer_blocks.{}.attn.norm_q.weight"),
    tensor("double_blocks.{}.img_attn.norm.key_norm.weight", "transformer_blocks.{}.attn.norm_k.weight"),
    tensor("double_blocks.{}.txt_attn.norm.query_norm.weight", "transformer_blocks.{}.attn.norm_added_q.weight"),
    tensor("double_blocks.{}.txt_attn.norm.key_norm.weight", "transformer_blocks.{}.attn.norm_added_k.weight"),
    tensor("single_blocks.{}.norm.query_norm.weight", "single_transformer_blocks.{}.attn.norm_q.weight"),
    tensor("single_blocks.{}.norm.key_norm.weight", "single_transformer_blocks.{}.attn.norm_k.weight"),
)

_SHAPES = {
    "x_embedder.weight": (3072, 64),
    "context_embedder.weight": (3072, 4096),
    "distilled_guidance_layer.in_proj.weight": (5120, 64),
    "distilled_guidance_layer.layers.{}.linear_1.weight": (5120, 5120),
    "distilled_guidance_layer.layers.{}.linear_2.weight": (5120, 5120),
    "distilled_guidance_layer.out_proj.weight": (3072, 5120),
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
    "single_transformer_blocks.{}.attn.to_q.weight": (3072, 3072),
    "single_transformer_blocks.{}.attn.to_k.weight": (3072, 3072),
    "single_transformer_blocks.{}.attn.to_v.weight": (3072, 3072),
    "single_transformer_blocks.{}.proj_mlp.weight": (12288, 3072),
    "single_transformer_blocks.{}.proj_out.weight": (3072, 15360),
    "proj_out.weight": (64, 3072),
}
_COUNTS = {"transformer_blocks.{}": 19, "single_transformer_blocks.{}": 38, "distilled_guidance_layer.layers.{}": 5}

register(
    Network(
        name="chroma_transformer",
        role="transformer",
        spellings=(Spelling("original", RULES + SCALES), Spelling("comfy", RULES + WEIGHTS)),
        variants=(Variant("chroma1", _SHAPES, _COUNTS),),
        blocks=(
            ("in", ("x_embedder", "context_embedder", "distilled_guidance_layer")),
            ("double.{}", ("transformer_blocks.{}",)),
            ("single.{}", ("single_transformer_blocks.{}",)),
            ("out", ("proj_out",)),
        ),
        config=Config(
            "ChromaTransformer2DModel",
            {
                "approximator_hidden_dim": Dim("distilled_guidance_layer.in_proj.weight", 0),
                "approximator_layers": Count("distilled_guidance_layer.layers.{}"),
                "approximator_num_channels": Dim("distilled_guidance_layer.in_proj.weight", 1),
                "attention_head_dim": 128,
                "axes_dims_rope": [16, 56, 56],
                "in_channels": Dim("x_embedder.weight", 1),
                "joint_attention_dim": Dim("context_embedder.weight", 1),
                "num_attention_heads": Dim("x_embedder.weight", 0, 128),
                "num_layers": Count("transformer_blocks.{}"),
                "num_single_layers": Count("single_transformer_blocks.{}"),
                "out_channels": Dim("proj_out.weight", 0),
                "patch_size": 1,
            },
        ),
    ),
    Architecture(
        name="chroma",
        title="Chroma",
        hints=("chroma",),
        components=(
            Component(
                "transformer", "chroma_transformer", prefix="model.diffusion_model.", comfy="model.diffusion_model.",
                comfy_spelling="comfy", kohya="lora_unet", kohya_spelling="original",
            ),
            Component(
                "vae", "autoencoder_kl", prefix="vae.", variant="flux_vae",
                config={"sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159},
            ),
            # kohya trains Flux and Chroma with one script, which counts the CLIP that Chroma lacks.
            Component(
                "text_encoder", "t5", prefix="text_encoders.t5xxl.transformer.", spelling="transformers",
                kohya="lora_te3", kohya_spelling="transformers", variant="t5_xxl",
            ),
        ),
    ),
)  # fmt: skip
