"""Strengths beside the tensors: PEFT's configuration, read as PEFT reads it, written to mean its modules alone."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

import pytest
from loras import Maker, convert, named, save

from weightops.errors import FormatError
from weightops.files.checkpoint import open_checkpoint
from weightops.lora.adapters import read_adapters, strengths
from weightops.lora.family import Told
from weightops.lora.settings import Module, alpha_in, decompose_factor, is_named, peft_config

if TYPE_CHECKING:
    from pathlib import Path

NAMES = (
    "transformer_blocks.0.attn.to_q", "transformer_blocks.10.attn.to_q", "single_transformer_blocks.0.attn.to_q",
    "single_transformer_blocks.0.proj_out", "proj_out", "text_model.encoder.layers.0.mlp.fc1",
    "down_blocks.0.attentions.0.proj_in",
)  # fmt: skip
PATTERNS = (
    "to_q", "attn.to_q", r"attn\.to_q", "^proj_out", "proj_out", "^proj_out$", "transformer_blocks.0.attn.to_q",
    "^transformer_blocks.0.attn.to_q", r"transformer_blocks\.\d+\.attn\.to_q", r".*\.to_q", "(to_q|to_k)",
    "fc1|proj_in",
    r"transformer_blocks\.[0-9]\..*", "(?:proj_in|proj_out)", "q", "blocks.0", "^attn.to_q",
)  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_means_what_it_means_to_peft(pattern: str) -> None:
    """Source: peft, utils/other.py, `get_pattern_key`."""
    for name in NAMES:
        assert is_named(name, pattern, "a") == (re.match(rf"(.*\.)?({pattern})$", name) is not None), name


@pytest.mark.parametrize("pattern", ["(a+)+", "a{9}", r"\bq", ".*.*.*.*", "(to_q)*", "(?=x)", "x y", r"(\1)", "a**"])
def test_a_pattern_that_could_take_for_ever_or_be_misread_is_refused(pattern: str) -> None:
    with pytest.raises(FormatError) as caught:
        is_named("transformer_blocks.0.attn.to_q", pattern, "a.safetensors")
    assert str(caught.value) == (f"a.safetensors: alpha_pattern {pattern!r} is more than a name, and not understood")


def test_brackets_that_do_not_close_are_refused() -> None:
    with pytest.raises(FormatError) as caught:
        is_named("x", "(to_q", "a.safetensors")
    assert str(caught.value) == "a.safetensors: alpha_pattern '(to_q' is no regular expression"


@pytest.mark.parametrize("alpha", ["8", True, [8], {}, float("nan"), float("inf"), 10**400])
def test_an_alpha_that_is_no_number_is_refused(alpha: Any) -> None:
    with pytest.raises(FormatError, match=r"^a: alpha of 'x' is .*, expected a finite number$"):
        alpha_in({"lora_alpha": alpha}, "x", 4, "a")


def test_the_rank_stabilised_alpha_is_the_one_that_makes_alpha_over_rank_right() -> None:
    assert alpha_in({"lora_alpha": 3, "use_rslora": True}, "x", 4, "a") == 6.0  # 3 / √4 = 6 / 4
    assert alpha_in({"lora_alpha": 3, "use_rslora": False}, "x", 4, "a") == 3.0
    assert alpha_in({"lora_alpha": 3, "alpha_pattern": {"x": 1}, "use_rslora": True}, "x", 4, "a") == 2.0
    assert alpha_in({}, "x", 4, "a") is None


def test_the_commonest_rank_and_alpha_are_for_all_and_others_by_name() -> None:
    shapes = {"up": (8, 4), "down": (4, 8)}
    modules = [Module(f"blocks.{n}.to_q", 4, 2.0, shapes) for n in range(3)] + [Module("blocks.3.to_q", 8, 1.5, shapes)]
    config = peft_config("lora", modules, ["blocks.{}.to_q"])
    assert (config["r"], config["lora_alpha"]) == (4, 2)
    assert config["rank_pattern"] == {"blocks.3.to_q": 8}
    assert config["alpha_pattern"] == {"blocks.3.to_q": 1.5}
    assert config["target_modules"] == [m.name for m in modules]


def test_a_name_that_others_end_with_means_itself_alone() -> None:
    shapes = {"up": (8, 4), "down": (4, 8)}
    modules = [Module("proj_out", 8, 1.0, shapes), Module("blocks.0.proj_out", 4, 4.0, shapes),
               Module("blocks.1.proj_out", 4, 4.0, shapes)]  # fmt: skip
    config = peft_config("lora", modules, ["proj_out", "blocks.{}.proj_out"])
    assert config["rank_pattern"] == {"^proj_out": 8}
    assert config["alpha_pattern"] == {"^proj_out": 1}
    for name, meant in (("proj_out", True), ("blocks.0.proj_out", True), ("blocks.2.proj_out", False)):
        assert (re.fullmatch(config["target_modules"], name) is not None) == meant


def test_a_clips_modules_are_meant_with_and_without_their_prefix() -> None:
    name = "text_model.encoder.layers.0.mlp.fc1"
    config = peft_config(
        "lora", [Module(name, 4, 2.0, {}), Module("text_model.encoder.layers.1.mlp.fc1", 2, 2.0, {})], []
    )
    (pattern,) = config["rank_pattern"]
    for written in ("text_model.encoder.layers.1.mlp.fc1", "encoder.layers.1.mlp.fc1"):
        assert is_named(written, pattern, "a")
        assert any(written == t or written.endswith("." + t) for t in config["target_modules"])


def test_a_kronecker_product_that_peft_would_share_out_otherwise_has_no_setting() -> None:
    fit = {"lokr_w1": (2, 2), "lokr_w2_a": (24, 1), "lokr_w2_b": (1, 8)}
    assert decompose_factor([Module("x", 1, 1.0, fit)]) == 2
    square = {"lokr_w1": (4, 4), "lokr_w2_a": (8, 1), "lokr_w2_b": (1, 8)}
    assert decompose_factor([Module("x", 1, 1.0, square)]) == -1
    odd = {"lokr_w1": (8, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 8)}
    assert decompose_factor([Module("x", 1, 1.0, odd)]) is None


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "'lora_adapter_metadata' in its header is no JSON"),
        ("[" * 100_000, "'lora_adapter_metadata' in its header is no JSON"),
        ("[]", "'lora_adapter_metadata' in its header is no object"),
        ('{"unet.lora_alpha": NaN}', "alpha of 'mid_block.attentions.0.proj_in' is nan, expected a finite number"),
    ],
)
def test_a_header_that_says_nothing_is_refused(text: str, what: str, tmp_path: Path) -> None:
    parts = {".lora_A.weight": Maker()(2, 8, 1, 1), ".lora_B.weight": Maker()(8, 2, 1, 1)}
    source = save(
        tmp_path / "a.safetensors",
        named({"unet.mid_block.attentions.0.proj_in": parts}),
        {"lora_adapter_metadata": text},
    )
    with pytest.raises(FormatError) as caught:
        convert(source, "kohya", tmp_path / "out.safetensors", architecture="sd15")
    assert str(caught.value) == f"{source}: {what}"


def oft(folder: Path, **config: object) -> Path:
    """A PEFT folder with an OFT of the second version."""
    save(folder / "adapter_model.safetensors", {f"{OFT}.oft_R.weight": Maker()(4, 1)})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "OFT", **config}))
    return folder


OFT = "base_model.model.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, Told()),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 3}, Told(neumann=3)),
        ({"use_cayley_neumann": False, "num_cayley_neumann_terms": 3}, Told(neumann=None)),
        ({"coft": True, "eps": 0.5}, Told(coft=0.5)),
        ({"coft": True}, Told(coft=6e-5)),
        ({"coft": False, "eps": 0.5}, Told()),
    ],
    ids=str,
)
def test_how_pefts_oft_turns_is_read_from_its_settings_and_no_other_dialect_can_say_it(
    config: dict[str, object], told: Told, tmp_path: Path
) -> None:
    source = oft(tmp_path / "peft", **config)
    with open_checkpoint(source) as opened:
        assert strengths(opened, read_adapters(opened)) == {OFT: (None, told)}
    if told == Told():
        convert(source, "kohya", tmp_path / "out.safetensors", architecture="qwen_image")
        return
    with pytest.raises(FormatError) as caught:
        convert(source, "kohya", tmp_path / "out.safetensors", architecture="qwen_image")
    assert str(caught.value) == (
        f"{source}: {OFT!r} is turned as PEFT's settings say (use_cayley_neumann, num_cayley_neumann_terms, coft), "
        "and no tensor can"
    )
    assert caught.value.hint == "fuse follows them"


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms is 0, expected 1 to 1000"),
        ({"num_cayley_neumann_terms": 10**9}, "num_cayley_neumann_terms is 1000000000, expected 1 to 1000"),
        ({"num_cayley_neumann_terms": True}, "num_cayley_neumann_terms is True, expected 1 to 1000"),
        ({"eps": "much"}, "eps is 'much', expected a number above 0"),
        ({"eps": -1}, "eps is -1, expected a number above 0"),
        ({"eps": math.nan}, "eps is nan, expected a number above 0"),
    ],
    ids=str,
)
def test_settings_of_an_oft_that_mean_nothing_are_refused(config: dict[str, object], what: str, tmp_path: Path) -> None:
    source = oft(tmp_path / "peft", **config)
    with open_checkpoint(source) as opened, pytest.raises(FormatError) as caught:
        strengths(opened, read_adapters(opened))
    assert str(caught.value) == f"{source}: {what}"


def test_whole_kronecker_factors_have_the_strength_that_peft_alone_gives_them_or_are_refused(tmp_path: Path) -> None:
    parts = {".lokr_w1": Maker()(2, 2), ".lokr_w2": Maker()(4, 4)}
    folder = tmp_path / "peft"
    save(folder / "adapter_model.safetensors", named({"base_model.model.transformer_blocks.0.attn.to_q": parts}))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": 8, "alpha": 8}))
    convert(folder, "kohya", tmp_path / "out.safetensors", architecture="qwen_image")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": 8, "alpha": 4}))
    with pytest.raises(FormatError) as caught:
        convert(folder, "kohya", tmp_path / "no.safetensors", architecture="qwen_image")
    assert str(caught.value) == (
        f"{folder}: 'base_model.model.transformer_blocks.0.attn.to_q' has two whole LoKr factors, whose strength is 1 "
        "to all but PEFT: its settings say otherwise (alpha / r)"
    )
