"""Which kind of layer is this tensor? attn.q, cross_attn, mlp, norm, …: by the words of its canonical name.

A tensor may be of several kinds (the norm of the queries: attn and norm), and of none. One that packs attention and
MLP (`to_qkv_mlp_proj` of Flux.2; what leaves a single block of Flux) is of both, and of no single one of q, k, v, out.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightops.naming.keymap import Network

# Names are looked at between dots, in small letters: ".blocks.0.attn1.to_q.weight.".
_ATTENTION = re.compile(
    r"\.(attn[12]?|attention|self_attn|cross_attn|selfattention)\.|\.attentions\.\d+\.(to_[qkv]|to_qkv|to_out|proj)\."
)
# What leaves a single block: one matrix for attention and MLP.
_SINGLE_OUT = re.compile(r"\.single_transformer_blocks\.\d+\.(attn\.to_out|proj_out)\.")
_CROSS = re.compile(r"\.(attn2|cross_attn)\.")
_EMBEDDING = re.compile(r"\.\w*embed\w*\.|\.(img_in|txt_in|shared|label_emb|encoder_hid_proj|\w+_pad_token)\.")
_REFINER = re.compile(r"\.refiner_blocks\.\d+\.")
_MLP = re.compile(r"\.(ff|ff_context|ffn|mlp|img_mlp|txt_mlp|feed_forward|densereludense|proj_mlp|to_qkv_mlp_proj)\.")
_NORM = re.compile(r"\.\w*norm\w*\.(?!linear)|\.bn\.")
_MODULATION = re.compile(
    r"\.\w*norm\w*\.linear(_1)?\.|\.\w*modulation\w*\.|\.(img_mod|txt_mod|scale_shift_table|time_proj)\."
    r"|\.distilled_guidance_layer\."
)
_CONV = re.compile(r"\.(conv|conv[12]|conv_in|conv_out|conv_shortcut|quant_conv|post_quant_conv|time_conv|resample)\.")
_ROLES: Mapping[str, re.Pattern[str]] = {
    "q": re.compile(r"\.(to_q|add_q_proj|q_proj|q|wq)\."),
    "k": re.compile(r"\.(to_k|add_k_proj|k_proj|k|wk)\."),
    "v": re.compile(r"\.(to_v|add_v_proj|v_proj|v|wv)\."),
    "out": re.compile(r"\.(to_out|to_add_out|out_proj|o|wo|proj)\."),
}

_ATTENTIONS = ("attn", "self_attn", "cross_attn")

KINDS: tuple[str, ...] = (
    "attn", "attn.q", "attn.k", "attn.v", "attn.out",
    "self_attn", "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.out",
    "cross_attn", "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.out",
    "mlp", "norm", "modulation", "embedding", "conv", "bias",
)  # fmt: skip


def is_kind(kind: str, name: str, network: Network | None) -> bool:
    """Is the tensor, given by its canonical name within its network, of this kind (one of KINDS)?"""
    name = f".{name.lower()}."
    attention, _, role = kind.partition(".")
    if attention in _ATTENTIONS:
        if not _of_attention(attention, name, network):
            return False
        # Flux names what leaves a single block proj_out, Flux.2 to_out: either holds the MLP too.
        return not role or (_ROLES[role].search(name) is not None and _SINGLE_OUT.search(name) is None)
    if kind == "mlp":
        return (_MLP.search(name) is not None and not _embeds(name)) or _SINGLE_OUT.search(name) is not None
    if kind == "embedding":
        return _embeds(name)
    if kind == "bias":
        return name.endswith(".bias.")
    return {"norm": _NORM, "modulation": _MODULATION, "conv": _CONV}[kind].search(name) is not None


def _of_attention(which: str, name: str, network: Network | None) -> bool:
    if _ATTENTION.search(name) is None and _SINGLE_OUT.search(name) is None:
        return False
    # The second attention of SD3.5's blocks is of the image to itself. Joint attention counts as that, too.
    cross = _CROSS.search(name) is not None and (network is None or network.name != "sd3_transformer")
    return which == "attn" or cross is (which == "cross_attn")


def _embeds(name: str) -> bool:
    # HunyuanVideo's embedder of texts has blocks of its own.
    return _EMBEDDING.search(name) is not None and _REFINER.search(name) is None
