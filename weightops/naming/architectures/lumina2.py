"""Lumina-Image 2.0. Source: FORMATS §1, §5; Alpha-VLLM, diffusers, ComfyUI."""

from weightops.naming.keymap import (
    EQUAL,
    IN,
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
    under,
)

# Keys and values have fewer heads than queries: 2304 rows, then 768 and 768.
REFINER = (
    pack("attention.qkv", "attn.to_q", "attn.to_k", "attn.to_v", heights=(IN, EQUAL, EQUAL)),
    move("attention.out", "attn.to_out.0"),
    move("attention.q_norm", "attn.norm_q"),
    move("attention.k_norm", "attn.norm_k"),
    move("attention_norm1", "norm1"),
    move("attention_norm2", "norm2"),
    move("feed_forward.w1", "feed_forward.linear_1"),
    move("feed_forward.w2", "feed_forward.linear_2"),
    move("feed_forward.w3", "feed_forward.linear_3"),
    *same("ffn_norm1"),
    *same("ffn_norm2"),
)

# As above, but the first norm is modulated by the time.
LAYER = (
    pack("attention.qkv", "attn.to_q", "attn.to_k", "attn.to_v", heights=(IN, EQUAL, EQUAL)),
    move("attention.out", "attn.to_out.0"),
    move("attention.q_norm", "attn.norm_q"),
    move("attention.k_norm", "attn.norm_k"),
    move("adaLN_modulation.1", "norm1.linear"),
    move("attention_norm1", "norm1.norm"),
    move("attention_norm2", "norm2"),
    move("feed_forward.w1", "feed_forward.linear_1"),
    move("feed_forward.w2", "feed_forward.linear_2"),
    move("feed_forward.w3", "feed_forward.linear_3"),
    *same("ffn_norm1"),
    *same("ffn_norm2"),
)

ORIGINAL = (
    *same("x_embedder"),
    move("cap_embedder.0", "time_caption_embed.caption_embedder.0"),
    move("cap_embedder.1", "time_caption_embed.caption_embedder.1"),
    move("t_embedder.mlp.0", "time_caption_embed.timestep_embedder.linear_1"),
    move("t_embedder.mlp.2", "time_caption_embed.timestep_embedder.linear_2"),
    *under("noise_refiner.{}", "noise_refiner.{}", LAYER),
    *under("context_refiner.{}", "context_refiner.{}", REFINER),
    *under("layers.{}", "layers.{}", LAYER),
    move("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
    move("final_layer.linear", "norm_out.linear_2"),
)

register(
    Network(
        name="lumina2_transformer",
        role="transformer",
        # A norm that the authors' code declares and never calls.
        spellings=(Spelling("original", ORIGINAL, extras=("norm_final.weight",)),),
        variants=(
            Variant(
                "lumina2",
                {
                    "x_embedder.weight": (2304, 64),
                    "time_caption_embed.caption_embedder.1.weight": (2304, 2304),
                    "time_caption_embed.timestep_embedder.linear_1.weight": (1024, 256),
                    "noise_refiner.{}.attn.to_q.weight": (2304, 2304),
                    "noise_refiner.{}.attn.to_k.weight": (768, 2304),
                    "noise_refiner.{}.attn.to_v.weight": (768, 2304),
                    "noise_refiner.{}.attn.to_out.0.weight": (2304, 2304),
                    "noise_refiner.{}.feed_forward.linear_1.weight": (9216, 2304),
                    "noise_refiner.{}.feed_forward.linear_2.weight": (2304, 9216),
                    "noise_refiner.{}.feed_forward.linear_3.weight": (9216, 2304),
                    "noise_refiner.{}.norm1.linear.weight": (9216, 1024),
                    "context_refiner.{}.attn.to_q.weight": (2304, 2304),
                    "context_refiner.{}.attn.to_k.weight": (768, 2304),
                    "context_refiner.{}.attn.to_v.weight": (768, 2304),
                    "context_refiner.{}.attn.to_out.0.weight": (2304, 2304),
                    "context_refiner.{}.feed_forward.linear_1.weight": (9216, 2304),
                    "context_refiner.{}.feed_forward.linear_2.weight": (2304, 9216),
                    "context_refiner.{}.feed_forward.linear_3.weight": (9216, 2304),
                    "layers.{}.attn.to_q.weight": (2304, 2304),
                    "layers.{}.attn.to_k.weight": (768, 2304),
                    "layers.{}.attn.to_v.weight": (768, 2304),
                    "layers.{}.attn.to_out.0.weight": (2304, 2304),
                    "layers.{}.feed_forward.linear_1.weight": (9216, 2304),
                    "layers.{}.feed_forward.linear_2.weight": (2304, 9216),
                    "layers.{}.feed_forward.linear_3.weight": (9216, 2304),
                    "layers.{}.norm1.linear.weight": (9216, 1024),
                    "norm_out.linear_1.weight": (2304, 1024),
                    "norm_out.linear_2.weight": (64, 2304),
                },
                {"noise_refiner.{}": 2, "context_refiner.{}": 2, "layers.{}": 26},
            ),
        ),
        blocks=(
            ("in", ("x_embedder", "time_caption_embed")),
            ("noise_refiner.{}", ("noise_refiner.{}",)),
            ("context_refiner.{}", ("context_refiner.{}",)),
            ("layer.{}", ("layers.{}",)),
            ("out", ("norm_out",)),
        ),
        config=Config(
            "Lumina2Transformer2DModel",
            {
                "sample_size": 128,
                "patch_size": 2,
                "in_channels": Dim("x_embedder.weight", 1, 4),
                "out_channels": None,
                "hidden_size": Dim("x_embedder.weight", 0),
                "num_layers": Count("layers.{}"),
                "num_refiner_layers": Count("noise_refiner.{}"),
                "num_attention_heads": Dim("layers.0.attn.to_q.weight", 0, 96),
                "num_kv_heads": Dim("layers.0.attn.to_k.weight", 0, 96),
                "multiple_of": 256,
                "ffn_dim_multiplier": None,
                "norm_eps": 1e-05,
                "scaling_factor": 1.0,
                "axes_dim_rope": [32, 32, 32],
                "axes_lens": [300, 512, 512],
                "cap_feat_dim": Dim("time_caption_embed.caption_embedder.1.weight", 1),
            },
        ),
    ),
    Architecture(
        name="lumina2",
        title="Lumina-Image 2.0",
        hints=("lumina",),
        components=(
            Component(
                "transformer", "lumina2_transformer", prefix="model.diffusion_model.", kohya="lora_unet",
                kohya_spelling="original",
            ),
            Component(
                "vae", "autoencoder_kl", prefix="vae.", variant="flux_vae",
                config={"scaling_factor": 0.3611, "shift_factor": 0.1159},
            ),
        ),
    ),
)  # fmt: skip
