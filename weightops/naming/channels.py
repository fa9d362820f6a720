"""Which channels of LDM's and SGM's UNets may trade places: tables that these architectures share.

Not in these tables: the channels that resnets and transformers add up, and that pass on to later ones beside others.
Norms of several widths see them, whose groups overlap: only channels that share a group of each could trade places.
Source: latent-diffusion (LDM), generative-models (SGM); Ainsworth et al. 2022, Git Re-Basin, arXiv:2209.04836.
"""

from weightops.naming.permutations import Group, inputs, outputs, rows, within

# What lies between the two convolutions of a resnet. Its second norm has 32 groups, whose channels stay together.
RESNET_CHANNELS = (Group("", ((*outputs("conv1", "time_emb_proj", "norm2"), *inputs("conv2")),), blocks=32),)

# The channels on which a transformer's blocks add up, between its projections, and the hidden ones of its GEGLU, of
# which the values come first and their gates after. Its LayerNorms see all channels alike.
TRANSFORMER_CHANNELS = (
    Group("", ((
        *outputs("proj_in"),
        *outputs("transformer_blocks.{}.norm1"),
        *inputs("transformer_blocks.{}.attn1.to_q", "transformer_blocks.{}.attn1.to_k"),
        *inputs("transformer_blocks.{}.attn1.to_v"),
        *outputs("transformer_blocks.{}.attn1.to_out.0"),
        *outputs("transformer_blocks.{}.norm2"),
        *inputs("transformer_blocks.{}.attn2.to_q"),
        *outputs("transformer_blocks.{}.attn2.to_out.0"),
        *outputs("transformer_blocks.{}.norm3"),
        *inputs("transformer_blocks.{}.ff.net.0.proj"),
        *outputs("transformer_blocks.{}.ff.net.2"),
        *inputs("proj_out"),
    ),)),
    Group("transformer_blocks.{}.ff", ((
        *outputs("transformer_blocks.{}.ff.net.0.proj", copies=2),
        *inputs("transformer_blocks.{}.ff.net.2"),
    ),)),
)  # fmt: skip

# Heads trade places whole; within a head, the channels of queries and keys, and apart from them those of the values.
SELF_ATTENTION = (
    rows("transformer_blocks.{}.attn1.to_q", "transformer_blocks.{}.attn1.to_k"),
    (*rows("transformer_blocks.{}.attn1.to_v"), *inputs("transformer_blocks.{}.attn1.to_out.0")),
)
CROSS_ATTENTION = (
    rows("transformer_blocks.{}.attn2.to_q", "transformer_blocks.{}.attn2.to_k"),
    (*rows("transformer_blocks.{}.attn2.to_v"), *inputs("transformer_blocks.{}.attn2.to_out.0")),
)

# Stable Diffusion 1 has eight heads, however wide they are; the others have as many as are 64 wide.
EIGHT_HEADS = (
    Group("transformer_blocks.{}.attn1", SELF_ATTENTION, blocks=8),
    Group("transformer_blocks.{}.attn2", CROSS_ATTENTION, blocks=8),
)
HEADS_OF_64 = (
    Group("transformer_blocks.{}.attn1", SELF_ATTENTION, width=64),
    Group("transformer_blocks.{}.attn2", CROSS_ATTENTION, width=64),
)

# Where a number of the time becomes what every resnet takes in; and what that is.
TIME_CHANNELS = (
    Group("time_embedding.linear_1", ((*outputs("time_embedding.linear_1"), *inputs("time_embedding.linear_2")),)),
    Group("time_embedding", ((
        *outputs("time_embedding.linear_2"),
        *inputs("down_blocks.{}.resnets.{}.time_emb_proj"),
        *inputs("mid_block.resnets.{}.time_emb_proj"),
        *inputs("up_blocks.{}.resnets.{}.time_emb_proj"),
    ),)),
)  # fmt: skip

# What else is said of a picture, its size and its words, is added to that.
ADDED_TIME_CHANNELS = (
    Group("time_embedding.linear_1", ((*outputs("time_embedding.linear_1"), *inputs("time_embedding.linear_2")),)),
    Group("add_embedding.linear_1", ((*outputs("add_embedding.linear_1"), *inputs("add_embedding.linear_2")),)),
    Group("time_embedding", ((
        *outputs("time_embedding.linear_2", "add_embedding.linear_2"),
        *inputs("down_blocks.{}.resnets.{}.time_emb_proj"),
        *inputs("mid_block.resnets.{}.time_emb_proj"),
        *inputs("up_blocks.{}.resnets.{}.time_emb_proj"),
    ),)),
)  # fmt: skip

RESNETS_CHANNELS = (
    *within("down_blocks.{}.resnets.{}", RESNET_CHANNELS),
    *within("mid_block.resnets.{}", RESNET_CHANNELS),
    *within("up_blocks.{}.resnets.{}", RESNET_CHANNELS),
)

TRANSFORMERS_CHANNELS = (
    *within("down_blocks.{}.attentions.{}", TRANSFORMER_CHANNELS),
    *within("mid_block.attentions.{}", TRANSFORMER_CHANNELS),
    *within("up_blocks.{}.attentions.{}", TRANSFORMER_CHANNELS),
)

SD1_PERMUTATIONS = (
    *TIME_CHANNELS,
    *RESNETS_CHANNELS,
    *TRANSFORMERS_CHANNELS,
    *within("down_blocks.{}.attentions.{}", EIGHT_HEADS),
    *within("mid_block.attentions.{}", EIGHT_HEADS),
    *within("up_blocks.{}.attentions.{}", EIGHT_HEADS),
)

SDXL_PERMUTATIONS = (
    *ADDED_TIME_CHANNELS,
    *RESNETS_CHANNELS,
    *TRANSFORMERS_CHANNELS,
    *within("down_blocks.{}.attentions.{}", HEADS_OF_64),
    *within("mid_block.attentions.{}", HEADS_OF_64),
    *within("up_blocks.{}.attentions.{}", HEADS_OF_64),
)
