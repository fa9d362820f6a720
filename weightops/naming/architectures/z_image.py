"""Z-Image, its Turbo and Omni models. Source: FORMATS §1, §5; Tongyi-MAI (Alibaba), diffusers, ComfyUI.

The authors publish diffusers' names; the usual single file is ComfyUI's, with one matrix for queries, keys and values.
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
    pack,
    register,
    same,
    tensor,
    under,
)

REFINER = (
    pack("attention.qkv", "attention.to_q", "attention.to_k", "attention.to_v"),
    move("attention.out", "attention.to_out.0"),
    move("attention.q_norm", "attention.norm_q"),
    move("attention.k_norm", "attention.norm_k"),
    *same("attention_norm1"),
    *same("attention_norm2"),
    *same("feed_forward.w1"),
    *same("feed_forward.w2"),
    *same("feed_forward.w3"),
    *same("ffn_norm1"),
    *same("ffn_norm2"),
)

LAYER = (*REFINER, *same("adaLN_modulation.0"))

COMFY = (
    move("x_embedder", "all_x_embedder.2-1"),
    tensor("x_pad_token"),
    *same("cap_embedder.0"),
    *same("cap_embedder.1"),
    tensor("cap_pad_token"),
    *same("siglip_embedder.0"),
    *same("siglip_embedder.1"),
    tensor("siglip_pad_token"),
    *same("t_embedder.mlp.0"),
    *same("t_embedder.mlp.2"),
    *under("noise_refiner.{}", "noise_refiner.{}", LAYER),
    *under("context_refiner.{}", "context_refiner.{}", REFINER),
    *under("siglip_refiner.{}", "siglip_refiner.{}", REFINER),
    *under("layers.{}", "layers.{}", LAYER),
    move("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
    move("final_layer.linear", "all_final_layer.2-1.linear"),
)

register(
    Network(
        name="z_image_transformer",
        role="transformer",
        # A norm that the code of Lumina declares and never calls.
        spellings=(Spelling("comfy", COMFY, extras=("norm_final.weight",)),),
        variants=(
            Variant(
                "z_image",
                {
                    "all_x_embedder.2-1.weight": (3840, 64),
                    "cap_embedder.1.weight": (3840, 2560),
                    "t_embedder.mlp.2.weight": (256, 1024),
                    "noise_refiner.{}.attention.to_q.weight": (3840, 3840),
                    "noise_refiner.{}.attention.to_k.weight": (3840, 3840),
                    "noise_refiner.{}.attention.to_v.weight": (3840, 3840),
                    "noise_refiner.{}.attention.to_out.0.weight": (3840, 3840),
                    "noise_refiner.{}.feed_forward.w1.weight": (10240, 3840),
                    "noise_refiner.{}.feed_forward.w2.weight": (3840, 10240),
                    "noise_refiner.{}.feed_forward.w3.weight": (10240, 3840),
                    "noise_refiner.{}.adaLN_modulation.0.weight": (15360, 256),
                    "context_refiner.{}.attention.to_q.weight": (3840, 3840),
                    "context_refiner.{}.attention.to_k.weight": (3840, 3840),
                    "context_refiner.{}.attention.to_v.weight": (3840, 3840),
                    "context_refiner.{}.attention.to_out.0.weight": (3840, 3840),
                    "context_refiner.{}.feed_forward.w1.weight": (10240, 3840),
                    "context_refiner.{}.feed_forward.w2.weight": (3840, 10240),
                    "context_refiner.{}.feed_forward.w3.weight": (10240, 3840),
                    "layers.{}.attention.to_q.weight": (3840, 3840),
                    "layers.{}.attention.to_k.weight": (3840, 3840),
                    "layers.{}.attention.to_v.weight": (3840, 3840),
                    "layers.{}.attention.to_out.0.weight": (3840, 3840),
                    "layers.{}.feed_forward.w1.weight": (10240, 3840),
                    "layers.{}.feed_forward.w2.weight": (3840, 10240),
                    "layers.{}.feed_forward.w3.weight": (10240, 3840),
                    "layers.{}.adaLN_modulation.0.weight": (15360, 256),
                    "all_final_layer.2-1.adaLN_modulation.1.weight": (3840, 256),
                    "all_final_layer.2-1.linear.weight": (64, 3840),
                },
                {"noise_refiner.{}": 2, "context_refiner.{}": 2, "layers.{}": 30},
            ),
        ),
        blocks=(
            (
                "in",
                (
                    "all_x_embedder", "x_pad_token", "cap_embedder", "cap_pad_token", "siglip_embedder",
                    "siglip_pad_token", "t_embedder",
                ),
            ),
            ("noise_refiner.{}", ("noise_refiner.{}",)),
            ("context_refiner.{}", ("context_refiner.{}",)),
            ("siglip_refiner.{}", ("siglip_refiner.{}",)),
            ("layer.{}", ("layers.{}",)),
            ("out", ("all_final_layer",)),
        ),
        config=Config(
            "ZImageTransformer2DModel",
            {
                "all_patch_size": [2],
                "all_f_patch_size": [1],
                "in_channels": Dim("all_x_embedder.2-1.weight", 1, 4),
                "dim": Dim("all_x_embedder.2-1.weight", 0),
                "n_layers": Count("layers.{}"),
                "n_refiner_layers": Count("noise_refiner.{}"),
                "n_heads": Dim("layers.0.attention.to_q.weight", 0, 128),
                "n_kv_heads": Dim("layers.0.attention.to_k.weight", 0, 128),
                "norm_eps": 1e-05,
                "qk_norm": Has("layers.0.attention.norm_q.weight"),
                "cap_feat_dim": Dim("cap_embedder.1.weight", 1),
                "siglip_feat_dim": Has("siglip_embedder.1.weight", yes=Dim("siglip_embedder.1.weight", 1), no=None),
                "rope_theta": 256.0,
                "t_scale": 1000.0,
                "axes_dims": [32, 48, 48],
                "axes_lens": [1536, 512, 512],
            },
        ),
    ),
    Architecture(
        name="z_image",
        title="Z-Image",
        hints=("zimage", "z_image", "z-image"),
        components=(
            # kohya's trainer (musubi) is built on the authors' code, whose names are diffusers'.
            Component(
                "transformer", "z_image_transformer", prefix="model.diffusion_model.", spelling="comfy",
                kohya="lora_unet", kohya_spelling="diffusers",
            ),
            Component(
                "vae", "autoencoder_kl", prefix="vae.", variant="flux_vae",
                config={"scaling_factor": 0.3611, "shift_factor": 0.1159},
            ),
        ),
    ),
)  # fmt: skip
