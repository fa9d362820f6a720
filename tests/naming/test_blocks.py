"""Block weights: every tensor has its block, the lists and curves of the field mean what they mean there."""

from __future__ import annotations

import functools
import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tagged import needs_lists, shapes_of

from weightops.errors import UsageError
from weightops.files.tensor import TensorInfo, TensorSpec
from weightops.naming.block_layout import blocks_in, ranges
from weightops.naming.blocks import blocks_of, parse_blocks
from weightops.naming.identify import identify
from weightops.naming.keymap import NETWORKS, Network
from weightops.naming.layer_kinds import KINDS, is_kind
from weightops.naming.presets import ALIASES, PRESETS, base, preset
from weightops.naming.slots import place

ROOT = Path(__file__).parents[2]
HEADERS = {"sd15": ROOT / "weightops/cli/sd15.json.gz", "sdxl": ROOT / "fixtures/headers/sdxl.json.gz"}
PUBLISHED = json.loads((ROOT / "fixtures/block_presets.json").read_text())

Name = tuple[str, str]
Names = dict[Name, Network | None]


def placed(shapes: dict[str, tuple[int, ...]]) -> Names:
    """The canonical tensors of a file, each with its network; of an unknown model, its keys."""
    tensors = {key: TensorInfo(TensorSpec("F16", shape), 0, 0, 0) for key, shape in shapes.items()}
    identity = identify(tensors)
    if identity.architecture is None:
        return {("", key): None for key in tensors}
    found: Names = {}
    for component, part in identity.parts.items():
        if part.match is not None and component != "ema":
            places = place(part.match.table, part.bodies, tensors).places
            found |= dict.fromkeys(((component, name) for name in places), part.match.network)
    return found


@functools.cache
def listed(name: str) -> Names:
    if name not in HEADERS:
        return placed(shapes_of(name))
    with gzip.open(HEADERS[name]) as f:
        return placed({key: tuple(shape) for key, (_, shape) in json.load(f).items()})


def made(network: str, *bodies: str, component: str = "transformer") -> Names:
    return {(component, body): NETWORKS.get(network) for body in bodies}


def flux(double: int = 19, single: int = 38) -> Names:
    """A Flux of so many blocks, a few tensors of each, and its text encoders."""
    bodies = ["x_embedder.weight", "time_text_embed.text_embedder.linear_1.weight", "proj_out.weight"]
    for n in range(double):
        bodies += [f"transformer_blocks.{n}.attn.{w}.weight" for w in ("to_q", "add_k_proj", "to_out.0", "norm_q")]
        bodies += [f"transformer_blocks.{n}.ff.net.2.bias", f"transformer_blocks.{n}.norm1.linear.weight"]
    bodies += [f"single_transformer_blocks.{n}.{w}.weight" for n in range(single) for w in ("attn.to_q", "proj_out")]
    return {
        **made("flux_transformer", *bodies),
        **made("clip", "text_model.encoder.layers.3.mlp.fc1.weight", component="text_encoder"),
        **made("t5", "shared.weight", "encoder.block.7.layer.0.SelfAttention.q.weight", component="text_encoder_2"),
    }


def by_block(text: str, names: Names) -> dict[str, set[float]]:
    """The numbers that a spec gives, by blocks."""
    blocks, found = blocks_of(names), dict[str, set[float]]()
    for name, number in parse_blocks(text).values(names).items():
        found.setdefault(blocks[name], set()).add(number)
    return found


def said(text: str, names: Names) -> set[str]:
    """The tensors that a spec speaks of."""
    return {".".join(name) for name in parse_blocks(text).values(names)}


def row(count: int) -> tuple[str, list[float]]:
    numbers = [n / 64 for n in range(count)]
    return ",".join(map(str, numbers)), numbers


# ------------------------------------------------------------------------------------------------ every tensor, a block


@pytest.mark.parametrize("name", [name for name, _ in NETWORKS])
def test_every_tensor_of_every_network_stands_in_one_block(name: str) -> None:
    network = NETWORKS.get(name)
    names = {n if rule.exact else f"{n}.weight" for s in network.spellings for rule in s.rules for n in rule.names}
    assert names
    for filled in (n.format(*["0"] * n.count("{}")) for n in names):
        assert len(blocks_in(network, filled)) == 1, filled


def test_no_two_blocks_of_a_network_have_one_name() -> None:
    for _, network in NETWORKS:
        names = [block for block, _ in network.blocks]
        assert len(set(names)) == len(names) > 1
        prefixes = Counter(prefix for _, of in network.blocks for prefix in of)
        assert max(prefixes.values()) == 1


COUNTS = {
    "diffusers_chroma1": 59, "diffusers_flux2_dev": 58, "diffusers_flux2_klein_4b": 27, "diffusers_flux_dev": 59,
    "diffusers_hunyuan_video": 62, "diffusers_lumina2": 32, "diffusers_qwen_image": 62, "diffusers_sd15_unet": 25,
    "diffusers_sd21_unet": 25, "diffusers_sd35_large": 40, "diffusers_sd3_medium": 26, "diffusers_sdxl_unet": 19,
    "diffusers_sdxl_refiner_unet": 25, "diffusers_wan21_i2v_14b": 42, "diffusers_wan21_t2v_1_3b": 32,
    "diffusers_z_image": 36, "orig_comfy_hunyuan_video": 62, "orig_comfy_z_image": 36, "orig_flux_dev_bfl": 59,
    "orig_wan22_i2v_14b": 42, "transformers_clip_l": 14, "transformers_t5_xxl_enc": 26, "diffusers_wan_vae": 21,
    "diffusers_flux_vae": 14,
}  # fmt: skip


@needs_lists
@pytest.mark.parametrize("name", COUNTS)
def test_every_tensor_of_a_real_model_stands_in_a_block(name: str) -> None:
    names = listed(name)
    blocks = blocks_of(names)
    assert blocks.keys() == names.keys()
    assert len(set(blocks.values())) == COUNTS[name]


@pytest.mark.parametrize("name", HEADERS)
def test_the_blocks_of_unets_are_the_numbers_of_ldm(name: str) -> None:
    """IN is input_blocks, OUT output_blocks; time_embed and label_emb are IN00 in every tool, `out.` the last OUT."""
    names = listed(name)
    blocks = blocks_of(names)
    last = max(blocks[n] for n in names if n[0] == "unet" and blocks[n].startswith("OUT"))
    seen = Counter[str]()
    for name_ in names:
        if name_[0] != "unet":
            assert blocks[name_].startswith(f"{name_[0]}.")
            continue
        spelled = NETWORKS.get(f"{name}_unet").tables()["original"].spelled(name_[1])
        assert spelled is not None
        words = spelled[1].split(".")
        wanted = {"input_blocks": f"IN{int(words[1]) if words[1].isdigit() else 0:02}", "middle_block": "M00",
                  "output_blocks": f"OUT{int(words[1]) if words[1].isdigit() else 0:02}", "time_embed": "IN00",
                  "label_emb": "IN00", "out": last}[words[0]]  # fmt: skip
        assert blocks[name_] == wanted, name_
        seen[wanted] += 1
    assert len(seen) == {"sd15": 25, "sdxl": 19}[name]


def test_of_an_unknown_model_what_has_a_number_is_a_block() -> None:
    keys = ["x_in.weight", "time_embed.0.weight", "time_embed.2.weight", "stack.0.a.weight", "stack.1.a.weight",
            "stack.1.table", "head.adaLN.1.weight", "pad_token"]  # fmt: skip
    names: Names = {("", f"model.diffusion_model.{key}"): None for key in keys}
    names |= {
        ("", "cond_stage_model.model.layers.0.q.weight"): None,
        ("", "cond_stage_model.model.layers.1.q.weight"): None,
    }
    found = {name[1]: block for name, block in blocks_of(names).items()}
    assert list(found.values()) == ["x_in", "time_embed", "time_embed", "stack.0", "stack.1", "stack.1", "head",
                                    "text_encoder.layers.0", "text_encoder.layers.1"]  # fmt: skip
    assert by_block("linear(0..1)", names) == {"stack.0": {0.0}, "stack.1": {1.0}}
    assert by_block("0.25,0.75", names) == {"stack.0": {0.25}, "stack.1": {0.75}}
    assert by_block("BASE=2, stack.1=3, *adaLN*=4", names) == {
        "text_encoder.layers.0": {2.0}, "text_encoder.layers.1": {2.0}, "stack.1": {3.0}, "head": {4.0},
    }  # fmt: skip


def test_numbers_that_no_model_has_are_no_matter() -> None:
    """A file may say anything: nothing is counted up to them, and no digits are too many."""
    numbers = ["0", "999999", "9" * 5000, "\u0663"]
    names = made("wan_transformer", *(f"blocks.{n}.attn1.to_q.weight" for n in numbers))
    assert set(blocks_of(names).values()) == {"block.0", "block.999999"}
    assert by_block("linear(0..1)", names) == {"block.0": {1 / 3}, "block.999999": {2 / 3}}
    unknown: Names = {("", f"stack.{n}.a.weight"): None for n in numbers}
    assert set(blocks_of(unknown).values()) == {"stack.0", "stack.999999", "stack"}


def test_names_of_blocks_are_told_in_few_words() -> None:
    assert ranges(["IN00", "IN01", "M00", "OUT00"]) == ["IN00-IN01", "M00", "OUT00"]
    assert ranges(["in", "double.0", "double.1", "double.3", "vae.mid"]) == ["in", "double.0-1", "double.3", "vae.mid"]


# ------------------------------------------------------------------------------------------------ presets


def test_every_preset_of_the_field_is_known() -> None:
    assert {*PUBLISHED, "LOW_OFFSET_CUBIC_HERMITE"} == set(PRESETS)


def test_presets_are_what_was_published() -> None:
    """As exactly as it was written: GRAD_V and GRAD_A with 10 digits."""
    for name, numbers in PUBLISHED.items():
        found = [base(name), *(preset(name, n / 24) for n in range(25))]
        digits = 10 if name.startswith("GRAD") else 14
        assert found == pytest.approx(numbers, abs=0.51 * 10.0**-digits, rel=0), name


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("blocks", [2, 19, 32, 59, 62])
def test_presets_hold_for_any_number_of_blocks(name: str, blocks: int) -> None:
    found = [preset(name, n / (blocks - 1)) for n in range(blocks)]
    published = PUBLISHED[name][1:]
    assert (found[0], found[-1]) == pytest.approx((published[0], published[-1]), abs=1e-12)
    assert all(-1e-12 <= number <= 1 + 1e-12 for number in found)
    if name.startswith(("WRAP", "RING", "OUT", "MID")):
        assert set(found) <= set(published), "steps stay steps"
    if published == published[::-1]:
        assert found == pytest.approx(found[::-1], abs=1e-12), "what is symmetric stays it"


def test_a_preset_is_its_list_of_26_numbers() -> None:
    names = listed("sd15")
    for name in PUBLISHED:
        by_name = parse_blocks(name).values(names)
        by_list = parse_blocks(",".join(map(repr, PUBLISHED[name]))).values(names)
        assert by_name == pytest.approx(by_list, abs=1e-10)
    assert all(parse_blocks(a).values(names) == parse_blocks(b).values(names) for a, b in ALIASES.items())


def test_a_preset_between_two_numbers() -> None:
    found = by_block("GRAD_V(0.2..0.8)", flux())
    assert (found["in"], found["out"], found["text_encoder_2.7"]) == ({0.8}, {0.8}, {0.2})
    assert min(n for block, numbers in found.items() if block[0] in "ds" for n in numbers) == pytest.approx(0.2)


def test_curves_begin_and_end_exactly_where_they_are_told() -> None:
    for curve in ("linear", "cosine", "smoothstep"):
        found = by_block(f"{curve}(0.1..0.7)", flux())
        assert (found["in"], found["out"]) == ({0.1}, {0.7})
        assert "text_encoder.3" not in found
        numbers = [max(found[f"double.{n}"]) for n in range(19)] + [max(found[f"single.{n}"]) for n in range(38)]
        assert numbers == sorted(numbers)
    assert [*by_block("linear(0.1..0.7)", flux())["single.9"]] == pytest.approx([0.4])
    assert [*by_block("cosine(0..1)", flux(2, 0))["double.0"]] == pytest.approx([0.25])


def test_a_curve_runs_over_the_blocks_that_are_named_and_of_layers_over_all() -> None:
    found = by_block("double.*=linear(1..0)", flux(5, 3))
    assert found == {f"double.{n}": {1 - n / 4} for n in range(5)}
    assert by_block("double.1-3:attn.q=linear(0..1)", flux(5, 3)) == {
        "double.1": {0.0}, "double.2": {0.5}, "double.3": {1.0},
    }  # fmt: skip
    whole, layers = by_block("linear(0..1)", flux(5, 3)), by_block("attn.q=linear(0..1)", flux(5, 3))
    assert all(numbers == layers[block] for block, numbers in whole.items() if block[0] in "ds")
    assert by_block("double.2=linear(0.3..1)", flux(5, 3)) == {"double.2": {0.3}}


# ------------------------------------------------------------------------------------------------ lists

SD_LORA = [
    "BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", "OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08",
    "OUT09", "OUT10", "OUT11",
]  # fmt: skip
SDXL_LORA = [
    "BASE", "IN04", "IN05", "IN07", "IN08", "M00", "OUT00", "OUT01", "OUT02", "OUT03", "OUT04", "OUT05",
]  # fmt: skip
ALL = ["BASE", *(f"IN{n:02}" for n in range(12)), "M00", *(f"OUT{n:02}" for n in range(12))]
ALL_XL = ["BASE", *(f"IN{n:02}" for n in range(9)), "M00", *(f"OUT{n:02}" for n in range(9))]


@pytest.mark.parametrize(
    ("model", "meant"),
    [("sd15", ALL), ("sd15", ALL[1:]), ("sd15", SD_LORA), ("sdxl", ALL_XL), ("sdxl", ALL_XL[1:]), ("sdxl", ALL),
     ("sdxl", ALL[1:]), ("sdxl", SDXL_LORA)],
    ids=lambda value: value if isinstance(value, str) else str(len(value)),
)  # fmt: skip
def test_each_number_of_a_published_list_is_for_its_block(model: str, meant: list[str]) -> None:
    text, numbers = row(len(meant))
    found = by_block(text, listed(model))
    wanted = dict(zip(meant, numbers, strict=True))
    of_lora = len(meant) in (17, 12)
    for name, block in blocks_of(listed(model)).items():
        if name[0] == "unet":
            assert found[block] == {wanted.get(block, 0.0)}
            assert block in wanted or of_lora
        elif "BASE" in wanted:
            assert found[block] == {wanted["BASE"]}
        else:
            assert block not in found


def test_a_list_for_any_model_has_a_number_for_each_block_and_may_have_one_for_the_rest() -> None:
    names = {n: network for n, network in flux(3, 2).items() if n[0] == "transformer"}
    wan = made("wan_transformer", "patch_embedding.weight", "blocks.0.attn1.to_q.weight", "blocks.1.ffn.net.2.bias",
               "proj_out.weight")  # fmt: skip
    for found, blocks in ((names, ["in", "double.0", "double.1", "double.2", "single.0", "single.1", "out"]),
                          (wan, ["in", "block.0", "block.1", "out"])):  # fmt: skip
        text, numbers = row(len(blocks))
        assert by_block(text, found) == {b: {n} for b, n in zip(blocks, numbers, strict=True)}
        assert by_block(f"9,{text}", found) == {b: {n} for b, n in zip(blocks, numbers, strict=True)}
    assert by_block("9," + row(7)[0], flux(3, 2))["text_encoder.3"] == {9.0}


def test_fluxs_list_of_61_has_a_number_for_each_text_encoder() -> None:
    """sd-webui-lora-block-weight: CLIP, T5, IN, D00 to D18, S00 to S37, OUT."""
    text, numbers = row(61)
    found = by_block(text, flux())
    assert found.pop("text_encoder.3") == {numbers[0]}
    assert found.pop("text_encoder_2.7") == found.pop("text_encoder_2.in") == {numbers[1]}
    blocks = ["in", *(f"double.{n}" for n in range(19)), *(f"single.{n}" for n in range(38)), "out"]
    assert found == {block: {n} for block, n in zip(blocks, numbers[2:], strict=True)}


def test_lists_are_read_as_they_are_pasted() -> None:
    names, text = listed("sd15"), row(26)[0]
    wanted = parse_blocks(text).values(names)
    for other in (f"[{text}]", f" {text}, ", text.replace(",", " "), text.replace(",", "\n"), text.replace(",", ", ")):
        assert parse_blocks(other).values(names) == wanted
    assert parse_blocks(f"{text}; OUT05=9").values(names) == wanted | parse_blocks("OUT05=9").values(names)


# ------------------------------------------------------------------------------------------------ rules


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("OUT03=0.5", r"unet\.up_blocks\.1\.(resnets|attentions)\.0\."),
        ("in4=0.5", r"unet\.down_blocks\.1\.(resnets|attentions)\.0\."),
        ("IN=0.5", r"unet\.(down_blocks|conv_in|time_embedding)"),
        ("MID=0.5", r"unet\.mid_block\."),
        ("IN03-IN06=1", r"unet\.down_blocks\.(0\.downsamplers|1)\."),
        ("IN06-IN03=1", r"unet\.down_blocks\.(0\.downsamplers|1)\."),
        ("IN03-6=1", r"unet\.down_blocks\.(0\.downsamplers|1)\."),
        ("IN11-OUT00=1", r"unet\.(down_blocks\.3\.resnets\.1|mid_block|up_blocks\.0\.resnets\.0)\."),
        ("unet:attn2=1", r"unet\..*\.attn2\."),
        ("*ATTN2*=1", r".*\.attn2\."),
        ("unet.mid_block.*=1", r"unet\.mid_block\."),
        ("OUT0[3-5]:attn1.to_q=1", r"unet\.up_blocks\.1\..*attn1\.to_q\."),
        ("text_encoder.3=1", r"text_encoder\.text_model\.encoder\.layers\.3\."),
        ("text_encoder.0-2:mlp=1", r"text_encoder\.text_model\.encoder\.layers\.[012]\.mlp\."),
        ("BASE=1", r"(text_encoder|vae)\."),
        ("CLIP=1", r"text_encoder\."),
        ("vae.decoder.up.1=1", r"vae\.decoder\.up_blocks\.1\."),
        ("M00:attn.out:0.5", r"unet\.mid_block\..*\.to_out\.0\."),
        # As supermerger writes it: blocks, elements, ratio; words by spaces, NOT before them.
        ("OUT03 OUT04:attn2 attn1.to_out:0.5", r"unet\.up_blocks\.1\.attentions\.[01]\..*(attn2|attn1\.to_out)\."),
        (":attn1.to_k:0.5", r"unet\..*\.attn1\.to_k\."),
        ("M00::0.5", r"unet\.mid_block\."),
        ("NOT BASE IN OUT:attn1:1", r"unet\.mid_block\..*\.attn1\."),
        ("M00:NOT attn1 resnets:1", r"unet\.mid_block\.attentions\.0\.(?!.*attn1)"),
        ("OUT05:skip_connection in_layers.2:1", r"unet\.up_blocks\.1\.resnets\.2\.conv(_shortcut|1)\."),
        ("M00:proj:1", r"unet\.mid_block\..*\.proj(_in|_out)?\."),
        ("time_embed=1", r"unet\.time_embedding\."),
        ("unet:op=1", r"unet\..*\.downsamplers\."),
    ],
)  # fmt: skip
def test_a_rule_speaks_of_what_it_says(text: str, wanted: str) -> None:
    names = listed("sd15")
    assert said(text, names) == {n for n in map(".".join, names) if re.match(wanted, n)}


def test_blocks_have_the_names_that_other_tools_give_them() -> None:
    names = flux()
    assert parse_blocks("D03-D05=1, S00=2").values(names) == parse_blocks("double.3-5=1;single.0=2").values(names)
    assert by_block("D18-S01=1", names) == {"double.18": {1.0}, "single.0": {1.0}, "single.1": {1.0}}
    assert by_block("IN=1,OUT=2,T5=3", names) == {
        "in": {1.0}, "out": {2.0}, "text_encoder_2.7": {3.0}, "text_encoder_2.in": {3.0},
    }  # fmt: skip


def test_numbers_are_whole_words() -> None:
    names = made("wan_transformer", *(f"blocks.{n}.attn1.to_q.weight" for n in range(12)))
    for word in ("block.1", "blocks.1", "*blocks.1.*"):
        assert by_block(f"{word}=1", names) == {"block.1": {1.0}}, word


def test_two_models_of_one_kind_are_told_apart_by_component() -> None:
    body = "blocks.3.attn1.to_q.weight"
    names = made("wan_transformer", body) | made("wan_transformer", body, component="transformer_2")
    assert said("block.3=1", names) == {f"transformer.{body}", f"transformer_2.{body}"}
    assert said("transformer_2:block.3=1", names) == {f"transformer_2.{body}"}


RULES = st.sampled_from(
    ["*=0.5", "OUT03=0.1", "IN=0.2", "attn.q=0.3", "NOT norm=0.7", "*conv*=0.4", "GRAD_V", "M00-OUT05:mlp=cosine(0..1)",
     "BASE=0", "linear(0..1)", "text_encoder.3:0.9"]
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.lists(RULES, min_size=1, max_size=4), st.sampled_from([",", ";", "\n", " ,\n"]))
def test_later_rules_win(rules: list[str], separator: str) -> None:
    found: dict[Name, float] = {}
    for rule in rules:
        found |= parse_blocks(rule).values(listed("sd15"))
    assert parse_blocks(separator.join(rules)).values(listed("sd15")) == found


@pytest.mark.parametrize("selector", ["OUT", "attn.q", "*attn2*", "IN04-IN08", "CLIP", "proj attn"])
def test_not_is_all_the_rest(selector: str) -> None:
    names = listed("sd15")
    some, rest = said(f"{selector}=1", names), said(f"NOT {selector}=1", names)
    assert not some & rest
    assert some | rest == set(map(".".join, names)) == said("*=1", names)


# ------------------------------------------------------------------------------------------------ kinds of layers

# By network: canonical tensors, and all kinds that each is of.
LAYERS: dict[str, dict[str, str]] = {
    "sdxl_unet": {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight": "attn attn.q self_attn self_attn.q",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0.bias":
            "attn attn.out cross_attn cross_attn.out bias",
        "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": "mlp",
        "down_blocks.1.attentions.0.transformer_blocks.0.norm3.bias": "norm bias",
        "down_blocks.1.attentions.0.proj_in.weight": "",
        "down_blocks.1.resnets.0.conv_shortcut.weight": "conv",
        "down_blocks.1.resnets.0.time_emb_proj.weight": "",
        "down_blocks.0.downsamplers.0.conv.weight": "conv",
        "time_embedding.linear_1.weight": "embedding",
        "add_embedding.linear_1.weight": "embedding",
        "conv_norm_out.weight": "norm",
    },
    "flux_transformer": {
        "transformer_blocks.0.attn.add_k_proj.weight": "attn attn.k self_attn self_attn.k",
        "transformer_blocks.0.attn.to_add_out.weight": "attn attn.out self_attn self_attn.out",
        "transformer_blocks.0.attn.norm_added_q.weight": "attn self_attn norm",
        "transformer_blocks.0.ff_context.net.2.bias": "mlp bias",
        "transformer_blocks.0.norm1_context.linear.weight": "modulation",
        "single_transformer_blocks.0.attn.to_v.weight": "attn attn.v self_attn self_attn.v",
        "single_transformer_blocks.0.proj_mlp.weight": "mlp",
        "single_transformer_blocks.0.proj_out.weight": "attn self_attn mlp",
        "time_text_embed.guidance_embedder.linear_1.weight": "embedding",
        "norm_out.linear.weight": "modulation",
        "proj_out.weight": "",
    },
    "flux2_transformer": {
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight": "attn self_attn mlp",
        "single_transformer_blocks.0.attn.to_out.weight": "attn self_attn mlp",
        "transformer_blocks.0.attn.to_out.0.weight": "attn attn.out self_attn self_attn.out",
        "double_stream_modulation_img.linear.weight": "modulation",
    },
    "chroma_transformer": {
        "distilled_guidance_layer.norms.0.weight": "norm modulation",
        "single_transformer_blocks.0.proj_out.bias": "attn self_attn mlp bias",
    },
    "sd3_transformer": {
        "transformer_blocks.0.attn2.to_q.weight": "attn attn.q self_attn self_attn.q",
        "pos_embed.pos_embed": "embedding",
    },
    "wan_transformer": {
        "blocks.0.attn2.add_v_proj.weight": "attn attn.v cross_attn cross_attn.v",
        "blocks.0.attn1.norm_q.weight": "attn self_attn norm",
        "blocks.0.ffn.net.2.weight": "mlp",
        "blocks.0.scale_shift_table": "modulation",
        "condition_embedder.time_proj.weight": "modulation embedding",
        "condition_embedder.image_embedder.ff.net.2.weight": "embedding",
    },
    "qwen_image_transformer": {
        "transformer_blocks.0.img_mod.1.weight": "modulation",
        "transformer_blocks.0.txt_mlp.net.2.weight": "mlp",
        "txt_norm.weight": "norm",
        "txt_in.bias": "embedding bias",
    },
    "z_image_transformer": {
        "layers.0.attention.to_q.weight": "attn attn.q self_attn self_attn.q",
        "layers.0.attention_norm1.weight": "norm",
        "layers.0.feed_forward.w2.weight": "mlp",
        "layers.0.adaLN_modulation.0.bias": "modulation bias",
        "t_embedder.mlp.0.weight": "embedding",
        "cap_pad_token": "embedding",
    },
    "lumina2_transformer": {
        "layers.0.norm1.linear.weight": "modulation",
        "layers.0.norm1.norm.weight": "norm",
        "layers.0.ffn_norm1.weight": "norm",
        "norm_out.linear_2.weight": "",
        "time_caption_embed.caption_embedder.0.weight": "embedding",
    },
    "hunyuan_video_transformer": {
        "context_embedder.token_refiner.refiner_blocks.0.attn.to_q.weight": "attn attn.q self_attn self_attn.q",
        "context_embedder.token_refiner.refiner_blocks.0.ff.net.2.weight": "mlp",
        "context_embedder.token_refiner.refiner_blocks.0.norm_out.linear.weight": "modulation",
        "context_embedder.proj_in.weight": "embedding",
        "single_transformer_blocks.0.proj_out.weight": "attn self_attn mlp",
    },
    "clip": {
        "text_model.encoder.layers.0.self_attn.out_proj.bias": "attn attn.out self_attn self_attn.out bias",
        "text_model.encoder.layers.0.mlp.fc1.weight": "mlp",
        "text_model.encoder.layers.0.layer_norm1.weight": "norm",
        "text_model.embeddings.token_embedding.weight": "embedding",
    },
    "t5": {
        "encoder.block.0.layer.0.SelfAttention.o.weight": "attn attn.out self_attn self_attn.out",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "attn self_attn",
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": "mlp",
        "encoder.block.0.layer.1.layer_norm.weight": "norm",
        "shared.weight": "embedding",
    },
    "autoencoder_kl": {
        "decoder.mid_block.attentions.0.to_q.weight": "attn attn.q self_attn self_attn.q",
        "decoder.mid_block.attentions.0.group_norm.weight": "norm",
        "encoder.conv_in.bias": "conv bias",
    },
    "autoencoder_wan": {
        "encoder.mid_block.attentions.0.to_qkv.weight": "attn self_attn",
        "encoder.mid_block.attentions.0.proj.weight": "attn attn.out self_attn self_attn.out",
        "encoder.norm_out.gamma": "norm",
    },
}  # fmt: skip


@pytest.mark.parametrize("network", LAYERS)
def test_layers_are_of_their_kinds(network: str) -> None:
    of = NETWORKS.get(network)
    table = of.tables()[of.canonical]
    for name, wanted in LAYERS[network].items():
        assert table.claim(name) is not None, f"{name} is no tensor of {network}"
        assert {kind for kind in KINDS if is_kind(kind, name, of)} == set(wanted.split()), name


@pytest.mark.parametrize("name", [name for name, network in NETWORKS if network.role in ("unet", "transformer")])
def test_queries_keys_values_and_outputs_come_in_fours(name: str) -> None:
    """Of each attention of a diffusion model, in its canonical names, there is one of each, but for packed ones."""
    network = NETWORKS.get(name)
    modules = {n for s in network.spellings for rule in s.rules if not rule.exact for n in rule.names}
    names = {f"{n.format(*'0' * n.count('{}'))}.weight" for n in modules}
    found = Counter(role for n in names for role in ["q", "k", "v", "out"] if is_kind(f"attn.{role}", n, network))
    assert found["q"] > 0
    assert found["k"] == found["v"]
    # Wan's attention to an image has keys and values of its own; Flux's single blocks an output that is packed.
    assert 0 <= found["k"] - found["q"] <= (name == "wan_transformer")
    packed = {"flux_transformer": 1, "chroma_transformer": 1, "hunyuan_video_transformer": 1}
    assert found["q"] - found["out"] == packed.get(name, 0)
    halves = Counter(which for n in names for which in ("self_attn", "cross_attn") if is_kind(which, n, network))
    assert halves["self_attn"] + halves["cross_attn"] == sum(is_kind("attn", n, network) for n in names)


# ------------------------------------------------------------------------------------------------ refusals

THERE = "there are in, double.0-18, single.0-37, out, text_encoder.3, text_encoder_2.in, text_encoder_2.7"


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("", "found '', expected rules such as OUT05=0.5, a preset or a list of numbers", None),
        (" \n ; ", "found ' \\n ; ', expected rules such as OUT05=0.5, a preset or a list of numbers", None),
        ("0.5", "'0.5' (character 1) is a number for nothing", "*=0.5 is for everything"),
        ("in=1, 0.5", "'0.5' (character 7) is a number for nothing", "say what it is for: OUT05=0.5, *=0.5"),
        ("1,,2", "nothing stands before the comma at character 3", None),
        (",1,2", "nothing stands before the comma at character 1", None),
        ("in=high", "'in=high' (character 1): found 'high', expected a number, a curve or a preset",
         "curves are linear(a..b), cosine(a..b), smoothstep(a..b); presets GRAD_V, GRAD_A, FLAT_25, FLAT_75, …"),
        ("in=", "'in=' (character 1): found nothing, expected a number, a curve or a preset", "curves are"),
        ("in=nan", "'in=nan' (character 1): found 'nan', expected a number, a curve or a preset", "curves are"),
        ("in:attn", "'in:attn' (character 1): found 'attn', expected a number, a curve or a preset", "curves are"),
        ("=1", "'=1' (character 1) has nothing before its '='", "OUT05=0.5; *=0.5 is for everything"),
        ("out=1;NOT=1", "'NOT=1' (character 7) says NOT of nothing", "NOT IN00-IN03=0.5"),
        ("GRAD-V", "'GRAD-V' (character 1): found 'GRAD-V', expected SELECTOR=VALUE, a curve or a preset",
         "did you mean GRAD_V?"),
        ("Cosine(0..1)", "'Cosine(0..1)' (character 1): found 'Cosine(0..1)', expected SELECTOR=VALUE, a curve or a "
         "preset", "cosine or COSINE: curves are written small, presets in capitals"),
        ("linear", "'linear' (character 1): linear needs its two ends", "linear(0..1)"),
        ("linear(0.2,0.8)", "'linear(0.2' (character 1): found 'linear(0.2', expected two ends in parentheses, as in "
         "linear(0.2..0.8)", "did you mean linear?"),
        ("linear(a..1)", "'linear(a..1)' (character 1): found 'a', expected a number, as in linear(0.2..0.8)", None),
        ("1,R,1", "'R' (character 3): R draws a number by chance, which could not be done twice; write the number",
         "curves are"),
        ("1,2,3", "found 3 numbers (character 1), expected 59, one for each block of flux_transformer, or 60 with BASE "
         "first, or 61", THERE),
        ("double.19=1", "'double.19=1' (character 1) matches nothing: no block, layer or tensor is called 'double.19'",
         f"did you mean double.9? {THERE}"),
        ("in=1,  a=1", "'a=1' (character 8) matches nothing: no block, layer or tensor is called 'a'", THERE),
        ("double.3-77=1", "'double.3-77=1' (character 1): there is no block 'double.77'", "did you mean double."),
        ("in-text_encoder.3=1", "'in-text_encoder.3=1' (character 1): 'in' and 'text_encoder.3' are of two components",
         None),
        ("cross_attn.q=1", "'cross_attn.q=1' (character 1) matches nothing: no layer here is cross_attn.q", THERE),
        ("unet=1", "'unet=1' (character 1) matches nothing: there is no unet, but 'transformer', 'text_encoder', "
         "'text_encoder_2'", THERE),
        ("single.3:norm=1", "'single.3:norm=1' (character 1) matches nothing: no tensor is 'norm' and all before it",
         "what is before it has attn, attn.q, self_attn, self_attn.q, mlp"),
        ("in out:NOT embedding bias *=1", "'in out:NOT embedding bias *=1' (character 1) matches nothing: no tensor is "
         "'NOT embedding bias *' and all before it", "what is before it has embedding"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_its_place(text: str, what: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as e:
        parse_blocks(text).values(flux())
    assert str(e.value) == f"--blocks: {what}"
    assert (e.value.hint or "").startswith(hint or "")
    assert bool(e.value.hint) is bool(hint)


def test_a_list_needs_a_diffusion_model() -> None:
    names = made("clip", "text_model.encoder.layers.3.mlp.fc1.weight", component="text_encoder")
    with pytest.raises(UsageError, match=r"^recipe: '1.0,2.0'|recipe: '1,2' .*is a number for each block of a diff"):
        parse_blocks("1,2", where="recipe").values(names)
    with pytest.raises(UsageError, match="there is no text encoder or VAE"):
        parse_blocks("BASE=1").values(made("wan_transformer", "proj_out.weight"))


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="INOUTM0123456789=:,;*.-()[] attnqNOTGRAD_V\n+e?", max_size=24))
def test_any_text_is_understood_or_refused(text: str) -> None:
    try:
        found = parse_blocks(text).values(flux(2, 2))
    except UsageError:
        return
    assert found
    assert all(isinstance(number, float) and abs(number) < float("inf") for number in found.values())
