"""T5 text encoders: T5 v1.1, and UMT5, which has position biases in every block. Source: FORMATS §4; transformers.

The table of tokens may be stored under either of two names, which are one tensor: `shared` and `embed_tokens`.
Wan's own file has other names. Source: Wan-Video wan/modules/t5.py.
"""

from typing import Any

from weightops.naming.keymap import Config, Count, Dim, Network, Spelling, Variant, move, register, same

BLOCK = same(
    "encoder.block.{}.layer.0.SelfAttention.q",
    "encoder.block.{}.layer.0.SelfAttention.k",
    "encoder.block.{}.layer.0.SelfAttention.v",
    "encoder.block.{}.layer.0.SelfAttention.o",
    "encoder.block.{}.layer.0.layer_norm",
    "encoder.block.{}.layer.1.DenseReluDense.wi_0",
    "encoder.block.{}.layer.1.DenseReluDense.wi_1",
    "encoder.block.{}.layer.1.DenseReluDense.wo",
    "encoder.block.{}.layer.1.layer_norm",
)

TRANSFORMERS = (
    *same("shared", "encoder.embed_tokens"),
    *same("encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
    *BLOCK,
    *same("encoder.final_layer_norm"),
)

UMT5_TRANSFORMERS = (
    *same("shared", "encoder.embed_tokens"),
    *same("encoder.block.{}.layer.0.SelfAttention.relative_attention_bias"),
    *BLOCK,
    *same("encoder.final_layer_norm"),
)

WAN = (
    move("token_embedding", "shared"),
    move("blocks.{}.norm1", "encoder.block.{}.layer.0.layer_norm"),
    move("blocks.{}.attn.q", "encoder.block.{}.layer.0.SelfAttention.q"),
    move("blocks.{}.attn.k", "encoder.block.{}.layer.0.SelfAttention.k"),
    move("blocks.{}.attn.v", "encoder.block.{}.layer.0.SelfAttention.v"),
    move("blocks.{}.attn.o", "encoder.block.{}.layer.0.SelfAttention.o"),
    move("blocks.{}.pos_embedding.embedding", "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias"),
    move("blocks.{}.norm2", "encoder.block.{}.layer.1.layer_norm"),
    move("blocks.{}.ffn.gate.0", "encoder.block.{}.layer.1.DenseReluDense.wi_0"),
    move("blocks.{}.ffn.fc1", "encoder.block.{}.layer.1.DenseReluDense.wi_1"),
    move("blocks.{}.ffn.fc2", "encoder.block.{}.layer.1.DenseReluDense.wo"),
    move("norm", "encoder.final_layer_norm"),
)

# ComfyUI's bundles repeat CLIP's logit_scale beside every text encoder.
EXTRAS = ("logit_scale",)

XXL = {
    "encoder.block.{}.layer.0.SelfAttention.q.weight": (4096, 4096),
    "encoder.block.{}.layer.0.SelfAttention.k.weight": (4096, 4096),
    "encoder.block.{}.layer.0.SelfAttention.v.weight": (4096, 4096),
    "encoder.block.{}.layer.0.SelfAttention.o.weight": (4096, 4096),
    "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight": (10240, 4096),
    "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight": (10240, 4096),
    "encoder.block.{}.layer.1.DenseReluDense.wo.weight": (4096, 10240),
}

BLOCKS = (
    ("in", ("shared", "encoder.embed_tokens")),
    ("{}", ("encoder.block.{}",)),
    ("out", ("encoder.final_layer_norm",)),
)

CONFIG: dict[str, Any] = {
    "classifier_dropout": 0.0,
    "d_ff": Dim("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0),
    "d_kv": 64,
    "d_model": Dim("encoder.block.0.layer.0.layer_norm.weight", 0),
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "num_decoder_layers": Count("encoder.block.{}"),
    "num_heads": Dim("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 1),
    "num_layers": Count("encoder.block.{}"),
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": Dim("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 0),
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": Dim("shared.weight", 0),
}

register(
    Network(
        name="t5",
        role="text_encoder",
        canonical="transformers",
        spellings=(Spelling("transformers", TRANSFORMERS, extras=EXTRAS),),
        variants=(
            Variant(
                "t5_xxl",
                {"shared.weight": (32128, 4096), "encoder.embed_tokens.weight": (32128, 4096), **XXL},
                {"encoder.block.{}": 24},
            ),
        ),
        blocks=BLOCKS,
        config=Config(
            "T5EncoderModel",
            {**CONFIG, "architectures": ["T5EncoderModel"], "model_type": "t5"},
            library="transformers",
        ),
    ),
    Network(
        name="umt5",
        role="text_encoder",
        canonical="transformers",
        spellings=(
            Spelling("transformers", UMT5_TRANSFORMERS, extras=EXTRAS),
            Spelling("original", WAN),
        ),
        variants=(
            Variant(
                "umt5_xxl",
                {"shared.weight": (256384, 4096), "encoder.embed_tokens.weight": (256384, 4096), **XXL},
                {"encoder.block.{}": 24},
            ),
        ),
        blocks=BLOCKS,
        has=(
            "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.2.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.3.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.4.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.5.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.6.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.7.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.8.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.9.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.10.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.11.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.12.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.13.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.14.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.15.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.16.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.17.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.18.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.19.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.20.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.21.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.22.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.23.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        config=Config(
            "UMT5EncoderModel",
            {**CONFIG, "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "scalable_attention": True},
            library="transformers",
        ),
    ),
)
