"""CLIP text encoders: CLIP-L, OpenCLIP ViT-H and ViT-bigG. Source: FORMATS §4; OpenAI CLIP, open_clip, transformers."""

from weightops.naming.keymap import Config, Count, Dim, Network, Rule, Spelling, Variant, move, register, tensor
from weightops.naming.permutations import Group, inputs, outputs, within

OPENCLIP = (
    move("token_embedding", "text_model.embeddings.token_embedding"),
    tensor("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    move("transformer.resblocks.{}.ln_1", "text_model.encoder.layers.{}.layer_norm1"),
    Rule(
        "transformer.resblocks.{}.attn.in_proj_weight",
        (
            "text_model.encoder.layers.{}.self_attn.q_proj.weight",
            "text_model.encoder.layers.{}.self_attn.k_proj.weight",
            "text_model.encoder.layers.{}.self_attn.v_proj.weight",
        ),
        heights=("=", "=", "="),
        exact=True,
    ),
    Rule(
        "transformer.resblocks.{}.attn.in_proj_bias",
        (
            "text_model.encoder.layers.{}.self_attn.q_proj.bias",
            "text_model.encoder.layers.{}.self_attn.k_proj.bias",
            "text_model.encoder.layers.{}.self_attn.v_proj.bias",
        ),
        heights=("=", "=", "="),
        exact=True,
    ),
    move("transformer.resblocks.{}.attn.out_proj", "text_model.encoder.layers.{}.self_attn.out_proj"),
    move("transformer.resblocks.{}.ln_2", "text_model.encoder.layers.{}.layer_norm2"),
    move("transformer.resblocks.{}.mlp.c_fc", "text_model.encoder.layers.{}.mlp.fc1"),
    move("transformer.resblocks.{}.mlp.c_proj", "text_model.encoder.layers.{}.mlp.fc2"),
    move("ln_final", "text_model.final_layer_norm"),
    Rule("text_projection", ("text_projection.weight",), transposed=True, exact=True),
    tensor("logit_scale"),
)

# Since 5.6 transformers writes CLIPTextModel without "text_model.", and some SD1 files lack it as well.
FLAT = (
    move("embeddings.token_embedding", "text_model.embeddings.token_embedding"),
    move("embeddings.position_embedding", "text_model.embeddings.position_embedding"),
    tensor("embeddings.position_ids", "text_model.embeddings.position_ids"),
    move("encoder.layers.{}.layer_norm1", "text_model.encoder.layers.{}.layer_norm1"),
    move("encoder.layers.{}.self_attn.q_proj", "text_model.encoder.layers.{}.self_attn.q_proj"),
    move("encoder.layers.{}.self_attn.k_proj", "text_model.encoder.layers.{}.self_attn.k_proj"),
    move("encoder.layers.{}.self_attn.v_proj", "text_model.encoder.layers.{}.self_attn.v_proj"),
    move("encoder.layers.{}.self_attn.out_proj", "text_model.encoder.layers.{}.self_attn.out_proj"),
    move("encoder.layers.{}.layer_norm2", "text_model.encoder.layers.{}.layer_norm2"),
    move("encoder.layers.{}.mlp.fc1", "text_model.encoder.layers.{}.mlp.fc1"),
    move("encoder.layers.{}.mlp.fc2", "text_model.encoder.layers.{}.mlp.fc2"),
    move("final_layer_norm", "text_model.final_layer_norm"),
)

TRANSFORMERS = (
    move("text_model.embeddings.token_embedding", "text_model.embeddings.token_embedding"),
    move("text_model.embeddings.position_embedding", "text_model.embeddings.position_embedding"),
    tensor("text_model.embeddings.position_ids"),
    move("text_model.encoder.layers.{}.layer_norm1", "text_model.encoder.layers.{}.layer_norm1"),
    move("text_model.encoder.layers.{}.self_attn.q_proj", "text_model.encoder.layers.{}.self_attn.q_proj"),
    move("text_model.encoder.layers.{}.self_attn.k_proj", "text_model.encoder.layers.{}.self_attn.k_proj"),
    move("text_model.encoder.layers.{}.self_attn.v_proj", "text_model.encoder.layers.{}.self_attn.v_proj"),
    move("text_model.encoder.layers.{}.self_attn.out_proj", "text_model.encoder.layers.{}.self_attn.out_proj"),
    move("text_model.encoder.layers.{}.layer_norm2", "text_model.encoder.layers.{}.layer_norm2"),
    move("text_model.encoder.layers.{}.mlp.fc1", "text_model.encoder.layers.{}.mlp.fc1"),
    move("text_model.encoder.layers.{}.mlp.fc2", "text_model.encoder.layers.{}.mlp.fc2"),
    move("text_model.final_layer_norm", "text_model.final_layer_norm"),
    move("text_projection", "text_projection"),
    tensor("logit_scale"),
)

# Heads of 64, and the hidden channels of the MLP. The channels that layers add up are what a text encoder puts out.
LAYER_CHANNELS = (
    Group(
        "self_attn",
        (
            outputs("self_attn.q_proj", "self_attn.k_proj"),
            (*outputs("self_attn.v_proj"), *inputs("self_attn.out_proj")),
        ),
        width=64,
    ),
    Group("mlp", ((*outputs("mlp.fc1"), *inputs("mlp.fc2")),)),
)


def _sizes(width: int, inner: int) -> dict[str, tuple[int | None, ...]]:
    return {
        "text_model.embeddings.token_embedding.weight": (49408, width),
        "text_model.encoder.layers.{}.self_attn.q_proj.weight": (width, width),
        "text_model.encoder.layers.{}.self_attn.k_proj.weight": (width, width),
        "text_model.encoder.layers.{}.self_attn.v_proj.weight": (width, width),
        "text_model.encoder.layers.{}.self_attn.out_proj.weight": (width, width),
        "text_model.encoder.layers.{}.mlp.fc1.weight": (inner, width),
        "text_model.encoder.layers.{}.mlp.fc2.weight": (width, inner),
    }


register(
    Network(
        name="clip",
        role="text_encoder",
        canonical="transformers",
        spellings=(Spelling("transformers", TRANSFORMERS), Spelling("flat", FLAT), Spelling("openclip", OPENCLIP)),
        variants=(
            Variant("clip_l", _sizes(768, 3072), {"text_model.encoder.layers.{}": 12}),
            Variant("clip_h", _sizes(1024, 4096), {"text_model.encoder.layers.{}": 24}),
            Variant("clip_bigg", _sizes(1280, 5120), {"text_model.encoder.layers.{}": 32}),
        ),
        blocks=(
            ("in", ("text_model.embeddings",)),
            ("{}", ("text_model.encoder.layers.{}",)),
            ("out", ("text_model.final_layer_norm", "text_projection", "logit_scale")),
        ),
        # CLIP-L's; the components of other text encoders say what is different.
        config=Config(
            "CLIPTextModel",
            {
                "architectures": ["CLIPTextModel"],
                "attention_dropout": 0.0,
                "bos_token_id": 0,
                "dropout": 0.0,
                "eos_token_id": 2,
                "hidden_act": "quick_gelu",
                "hidden_size": Dim("text_model.embeddings.token_embedding.weight", 1),
                "initializer_factor": 1.0,
                "initializer_range": 0.02,
                "intermediate_size": Dim("text_model.encoder.layers.0.mlp.fc1.weight", 0),
                "layer_norm_eps": 1e-05,
                "max_position_embeddings": Dim("text_model.embeddings.position_embedding.weight", 0),
                "model_type": "clip_text_model",
                "num_attention_heads": Dim("text_model.embeddings.token_embedding.weight", 1, divide=64),
                "num_hidden_layers": Count("text_model.encoder.layers.{}"),
                "pad_token_id": 1,
                "projection_dim": Dim("text_model.embeddings.token_embedding.weight", 1),
                "vocab_size": Dim("text_model.embeddings.token_embedding.weight", 0),
            },
            library="transformers",
        ),
        permutations=within("text_model.encoder.layers.{}", LAYER_CHANNELS),
    ),
)
