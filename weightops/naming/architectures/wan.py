"""Wan 2.1 and 2.2, text and image to video. Source: FORMATS §1, §5; Wan-Video (Alibaba), diffusers, ComfyUI.

What is built around it (VACE, Animate, S2V, HuMo, camera control) brings blocks of its own, which stay strangers here.
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
    move,
    register,
    same,
    tensor,
    under,
)

# The authors' norm3, before the cross-attention, is diffusers' norm2; neither of the other two norms has weights.
BLOCK = (
    move("self_attn.q", "attn1.to_q"),
    move("self_attn.k", "attn1.to_k"),
    move("self_attn.v", "attn1.to_v"),
    move("self_attn.o", "attn1.to_out.0"),
    move("self_attn.norm_q", "attn1.norm_q"),
    move("self_attn.norm_k", "attn1.norm_k"),
    move("norm3", "norm2"),
    move("cross_attn.q", "attn2.to_q"),
    move("cross_attn.k", "attn2.to_k"),
    move("cross_attn.v", "attn2.to_v"),
    move("cross_attn.o", "attn2.to_out.0"),
    move("cross_attn.norm_q", "attn2.norm_q"),
    move("cross_attn.norm_k", "attn2.norm_k"),
    move("cross_attn.k_img", "attn2.add_k_proj"),
    move("cross_attn.v_img", "attn2.add_v_proj"),
    move("cross_attn.norm_k_img", "attn2.norm_added_k"),
    move("ffn.0", "ffn.net.0.proj"),
    move("ffn.2", "ffn.net.2"),
    tensor("modulation", "scale_shift_table"),
)

ORIGINAL = (
    *same("patch_embedding"),
    move("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    move("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    move("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    move("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    move("time_projection.1", "condition_embedder.time_proj"),
    tensor("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    move("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    move("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    move("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    move("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    *under("blocks.{}", "blocks.{}", BLOCK),
    tensor("head.modulation", "scale_shift_table"),
    move("head.head", "proj_out"),
)

_1_3B = {
    "condition_embedder.text_embedder.linear_1.weight": (1536, 4096),
    "condition_embedder.time_embedder.linear_1.weight": (1536, 256),
    "condition_embedder.time_proj.weight": (9216, 1536),
    "blocks.{}.attn1.to_q.weight": (1536, 1536),
    "blocks.{}.attn1.to_k.weight": (1536, 1536),
    "blocks.{}.attn1.to_v.weight": (1536, 1536),
    "blocks.{}.attn1.to_out.0.weight": (1536, 1536),
    "blocks.{}.attn2.to_q.weight": (1536, 1536),
    "blocks.{}.attn2.to_k.weight": (1536, 1536),
    "blocks.{}.attn2.to_v.weight": (1536, 1536),
    "blocks.{}.attn2.to_out.0.weight": (1536, 1536),
    "blocks.{}.ffn.net.0.proj.weight": (8960, 1536),
    "blocks.{}.ffn.net.2.weight": (1536, 8960),
    "proj_out.weight": (64, 1536),
}

_5B = {
    "condition_embedder.text_embedder.linear_1.weight": (3072, 4096),
    "condition_embedder.time_embedder.linear_1.weight": (3072, 256),
    "condition_embedder.time_proj.weight": (18432, 3072),
    "blocks.{}.attn1.to_q.weight": (3072, 3072),
    "blocks.{}.attn1.to_k.weight": (3072, 3072),
    "blocks.{}.attn1.to_v.weight": (3072, 3072),
    "blocks.{}.attn1.to_out.0.weight": (3072, 3072),
    "blocks.{}.attn2.to_q.weight": (3072, 3072),
    "blocks.{}.attn2.to_k.weight": (3072, 3072),
    "blocks.{}.attn2.to_v.weight": (3072, 3072),
    "blocks.{}.attn2.to_out.0.weight": (3072, 3072),
    "blocks.{}.ffn.net.0.proj.weight": (14336, 3072),
    "blocks.{}.ffn.net.2.weight": (3072, 14336),
    "proj_out.weight": (192, 3072),
}

_14B = {
    "condition_embedder.text_embedder.linear_1.weight": (5120, 4096),
    "condition_embedder.time_embedder.linear_1.weight": (5120, 256),
    "condition_embedder.time_proj.weight": (30720, 5120),
    "blocks.{}.attn1.to_q.weight": (5120, 5120),
    "blocks.{}.attn1.to_k.weight": (5120, 5120),
    "blocks.{}.attn1.to_v.weight": (5120, 5120),
    "blocks.{}.attn1.to_out.0.weight": (5120, 5120),
    "blocks.{}.attn2.to_q.weight": (5120, 5120),
    "blocks.{}.attn2.to_k.weight": (5120, 5120),
    "blocks.{}.attn2.to_v.weight": (5120, 5120),
    "blocks.{}.attn2.to_out.0.weight": (5120, 5120),
    "blocks.{}.ffn.net.0.proj.weight": (13824, 5120),
    "blocks.{}.ffn.net.2.weight": (5120, 13824),
    "proj_out.weight": (64, 5120),
}

# Only Wan 2.1 looks at the image through CLIP.
_IMAGE = {
    "condition_embedder.image_embedder.ff.net.0.proj.weight": (1280, 1280),
    "condition_embedder.image_embedder.ff.net.2.weight": (5120, 1280),
    "blocks.{}.attn2.add_k_proj.weight": (5120, 5120),
    "blocks.{}.attn2.add_v_proj.weight": (5120, 5120),
}

_CLIP = "condition_embedder.image_embedder.norm1.weight"
_LAST_FRAME = "condition_embedder.image_embedder.pos_embed"

register(
    Network(
        name="wan_transformer",
        role="transformer",
        spellings=(Spelling("original", ORIGINAL),),
        # LTX and PixArt have matrices of this name.
        needs={"patch_embedding.weight": (None, None, 1, 2, 2), "scale_shift_table": (1, None, None)},
        # Both experts of Wan 2.2 have these sizes, and its text to video those of 2.1.
        variants=(
            Variant(
                "wan_t2v_1_3b", {"patch_embedding.weight": (1536, 16, 1, 2, 2), **_1_3B}, {"blocks.{}": 30},
                lacks=(_CLIP,),
            ),
            Variant(
                "wan_t2v_14b", {"patch_embedding.weight": (5120, 16, 1, 2, 2), **_14B}, {"blocks.{}": 40},
                lacks=(_CLIP,),
            ),
            Variant(
                "wan21_i2v_14b", {"patch_embedding.weight": (5120, 36, 1, 2, 2), **_14B, **_IMAGE}, {"blocks.{}": 40},
                has=(_CLIP,), lacks=(_LAST_FRAME,),
            ),
            Variant(
                "wan21_flf2v_14b",
                {"patch_embedding.weight": (5120, 36, 1, 2, 2), **_14B, _LAST_FRAME: (1, 514, 1280)},
                {"blocks.{}": 40}, has=(_CLIP, _LAST_FRAME),
            ),
            Variant(
                "wan22_i2v_14b", {"patch_embedding.weight": (5120, 36, 1, 2, 2), **_14B}, {"blocks.{}": 40},
                lacks=(_CLIP,),
            ),
            Variant(
                "wan22_ti2v_5b", {"patch_embedding.weight": (3072, 48, 1, 2, 2), **_5B}, {"blocks.{}": 30},
                lacks=(_CLIP,),
            ),
        ),
        blocks=(
            ("in", ("patch_embedding", "condition_embedder")),
            ("block.{}", ("blocks.{}",)),
            ("out", ("scale_shift_table", "proj_out")),
        ),
        config=Config(
            "WanTransformer3DModel",
            {
                "patch_size": [
                    Dim("patch_embedding.weight", 2),
                    Dim("patch_embedding.weight", 3),
                    Dim("patch_embedding.weight", 4),
                ],
                "num_attention_heads": Dim("patch_embedding.weight", 0, 128),
                "attention_head_dim": 128,
                "in_channels": Dim("patch_embedding.weight", 1),
                "out_channels": Dim("proj_out.weight", 0, 4),
                "text_dim": Dim("condition_embedder.text_embedder.linear_1.weight", 1),
                "freq_dim": Dim("condition_embedder.time_embedder.linear_1.weight", 1),
                "ffn_dim": Dim("blocks.0.ffn.net.0.proj.weight", 0),
                "num_layers": Count("blocks.{}"),
                "cross_attn_norm": Has("blocks.0.norm2.weight"),
                "qk_norm": "rms_norm_across_heads",
                "eps": 1e-06,
                "image_dim": Has(_CLIP, yes=Dim(_CLIP, 0), no=None),
                "added_kv_proj_dim": Has(
                    "blocks.0.attn2.add_k_proj.weight", yes=Dim("blocks.0.attn2.add_k_proj.weight", 1), no=None
                ),
                "rope_max_seq_len": 1024,
                "pos_embed_seq_len": Has(_LAST_FRAME, yes=Dim(_LAST_FRAME, 1), no=None),
            },
        ),
    ),
    Architecture(
        name="wan",
        title="Wan 2.1 and 2.2",
        hints=("wan",),
        components=(
            Component(
                "transformer", "wan_transformer", prefix="model.diffusion_model.", kohya="lora_unet",
                kohya_spelling="original",
            ),
            Component("vae", "autoencoder_wan", prefix="vae."),
            Component("text_encoder", "umt5", prefix="text_encoders.umt5xxl.transformer.", spelling="transformers"),
        ),
    ),
)  # fmt: skip
