"""fuse and extract from the command line: words in, files and their reports out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commandline import weightops_here
from conftest import save
from safetensors.torch import load_file

QUERY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
LORA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(1)
    base = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(64, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": torch.ones(64, 64, 1, 1),
        "model.diffusion_model.input_blocks.1.1.proj_in.bias": torch.ones(64),
        "model.diffusion_model.input_blocks.10.0.in_layers.2.weight": torch.rand(64, 64, 3, 3, generator=generator),
        f"{QUERY}.weight": torch.randn(64, 64, generator=generator),
    }
    lora = {
        f"{LORA}.lora_down.weight": torch.randn(4, 64, generator=generator) * 0.05,
        f"{LORA}.lora_up.weight": torch.randn(64, 4, generator=generator) * 0.05,
        f"{LORA}.alpha": torch.tensor(2.0),
        "bundle_emb.cat.string_to_param.*": torch.ones(2, 8),
    }
    save(Path("base.safetensors"), base)
    save(Path("style.safetensors"), lora)


def fused(*words: str) -> torch.Tensor:
    done = weightops_here("fuse", "base.safetensors", *words, "-o", "out.safetensors", "--force")
    assert done.code == 0, done.err
    return load_file("out.safetensors")[f"{QUERY}.weight"]


def delta() -> torch.Tensor:
    lora = load_file("style.safetensors")
    return 0.5 * lora[f"{LORA}.lora_up.weight"] @ lora[f"{LORA}.lora_down.weight"]


# ------------------------------------------------------------------------------------------------ fuse


def test_a_strength_stands_after_the_file_and_names_the_output() -> None:
    done = weightops_here("fuse", "base.safetensors", "style.safetensors:0.8")
    assert done.code == 0, done.err
    base = load_file("base.safetensors")[f"{QUERY}.weight"]
    torch.testing.assert_close(load_file("base+style-0.8.safetensors")[f"{QUERY}.weight"], base + 0.8 * delta())
    lines = done.out.splitlines()
    assert lines[0] == "base + 0.8 × style"
    assert "4 used, 4 copied, 1 unused" in lines
    assert "       1  style.safetensors: an embedding: prompts use it, no weight holds it" in lines
    assert any(line.startswith("100.0 % of the LoRA survived the rounding") for line in lines), lines
    assert any(line.startswith("wrote  base+style-0.8.safetensors  ") for line in lines)


def test_every_option_of_fuse_reaches_the_work() -> None:
    base = load_file("base.safetensors")[f"{QUERY}.weight"]
    torch.testing.assert_close(fused("style.safetensors:2", "style.safetensors:-0.5"), base + 1.5 * delta())
    torch.testing.assert_close(fused("style.safetensors", "--text-encoder", "0"), base + delta())
    assert fused("style.safetensors", "--dtype", "bf16").dtype is torch.bfloat16
    first = fused("style.safetensors", "--dtype", "bf16", "--rounding", "stochastic", "--seed", "3")
    again = fused("style.safetensors", "--dtype", "bf16", "--rounding", "stochastic", "--seed", "3")
    other = fused("style.safetensors", "--dtype", "bf16", "--rounding", "stochastic", "--seed", "4")
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(
        fused("style.safetensors", "--verify", "--device", "cpu", "--threads", "1", "--memory", "64MiB"), base + delta()
    )
    done = weightops_here("fuse", "base.safetensors", "style.safetensors", "--strict", "-o", "x.safetensors")
    assert done.code == 1
    assert "bundle_emb.cat" in done.err
    done = weightops_here("fuse", "base.safetensors", "style.safetensors", "--lokr-rank", "4", "-o", "x.safetensors")
    assert (done.code, done.err.partition(":")[0]) == (2, "error"), done.err
    assert "--lokr-rank" in done.err


def test_embeddings_are_copied_out_on_request() -> None:
    words = ["fuse", "base.safetensors", "style.safetensors", "-o", "out.safetensors", "--embeddings", "words"]
    dry = weightops_here(*words, "--dry-run")
    assert dry.code == 0, dry.err
    assert not Path("words").exists()
    done = weightops_here(*words)
    assert done.code == 0, done.err
    assert [p.name for p in Path("words").iterdir()] == ["cat.safetensors"]
    torch.testing.assert_close(load_file("words/cat.safetensors")["emb_params"], torch.ones(2, 8))
    assert "0 unused" in done.out
    again = weightops_here(*words[:-2], "--force", "--embeddings", "words")
    assert again.code == 0, again.err
    Path("words/mine.txt").write_text("kept")
    refused = weightops_here(*words[:-2], "--force", "--embeddings", "words")
    assert refused.code == 1
    assert "mine.txt" in refused.err


def test_an_embedding_whose_name_leads_elsewhere_is_refused() -> None:
    lora = load_file("style.safetensors")
    lora["bundle_emb./tmp/x.clip_l"] = torch.ones(2, 8)
    save(Path("style.safetensors"), lora)
    words = ["fuse", "base.safetensors", "style.safetensors", "-o", "out.safetensors", "--embeddings", "words"]
    done = weightops_here(*words)
    assert done.code == 1
    assert "is no embedding's name that a file could bear" in done.err
    assert not Path("out.safetensors").exists()


def test_the_json_of_fuse_has_what_the_contract_names() -> None:
    done = weightops_here("fuse", "base.safetensors", "style.safetensors", "--json")
    found = json.loads(done.out)
    assert found["command"] == "fuse"
    assert [set(m) for m in found["modules"]] == [{"name", "delta_norm", "weight_norm", "survived", "residual"}]
    assert found["modules"][0]["survived"] == pytest.approx(1, abs=1e-4)
    assert found["keys"]["unused"][0]["key"] == "bundle_emb.cat.string_to_param.*"


def test_the_recipe_of_a_fuse_is_shown_in_words() -> None:
    weightops_here("fuse", "base.safetensors", "style.safetensors:0.8", "-o", "out.safetensors")
    done = weightops_here("inspect", "out.safetensors")
    assert "fuse, base.safetensors + 0.8 × style.safetensors" in done.out


# ------------------------------------------------------------------------------------------------ extract


def test_what_was_fused_is_extracted_and_reported() -> None:
    weightops_here("fuse", "base.safetensors", "style.safetensors", "-o", "tuned.safetensors")
    done = weightops_here("extract", "tuned.safetensors", "base.safetensors", "--rank", "4", "--verify", "-v")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == "tuned − base: 1 module, kohya names"
    assert any(line.startswith("wrote  tuned-base-lora.safetensors") for line in lines)
    assert any("verified: the error of 1 module is as computed" in line for line in lines), lines
    assert any(line.startswith(LORA) for line in lines)
    lora = load_file("tuned-base-lora.safetensors")
    torch.testing.assert_close(
        lora[f"{LORA}.lora_up.weight"] @ lora[f"{LORA}.lora_down.weight"], delta(), rtol=1e-3, atol=1e-6
    )
    shown = weightops_here("inspect", "tuned-base-lora.safetensors")
    assert "extract, tuned.safetensors − base.safetensors, rank 4" in shown.out


def test_every_option_of_extract_reaches_the_work() -> None:
    weightops_here("fuse", "base.safetensors", "style.safetensors", "-o", "tuned.safetensors")
    tuned = load_file("tuned.safetensors")
    tuned["model.diffusion_model.input_blocks.1.1.proj_in.bias"] += 0.01
    tuned["model.diffusion_model.input_blocks.10.0.in_layers.2.weight"] *= 1.01
    save(Path("tuned.safetensors"), tuned)

    def extracted(*words: str) -> dict[str, torch.Tensor]:
        out = ["-o", "lora.safetensors", "--force"]
        done = weightops_here("extract", "tuned.safetensors", "base.safetensors", *words, *out)
        assert done.code == 0, done.err
        return load_file("lora.safetensors")

    kernel = "lora_unet_down_blocks_3_resnets_0_conv1"
    both = extracted("--rank", "3", "--conv-rank", "2")
    assert both[f"{kernel}.lora_down.weight"].shape == (2, 64, 3, 3)
    assert both[f"{LORA}.lora_down.weight"].shape == (3, 64)
    assert kernel + ".alpha" not in extracted("--rank", "3", "--conv-rank", "0")
    assert kernel + ".alpha" not in extracted("--rank", "3", "--exclude", "*conv1")
    assert LORA + ".alpha" not in extracted("--rank", "3", "--include", "*conv1")
    assert any(k.endswith(".diff_b") for k in extracted("--rank", "3", "--biases"))
    assert any(k.endswith(".lora_B.weight") for k in extracted("--rank", "3", "--dialect", "diffusers"))
    assert extracted("--rank", "energy:0.5", "--dtype", "fp16")[f"{LORA}.lora_up.weight"].dtype is torch.float16
    extracted("--rank", "3", "--clamp-quantile", "0.99", "--allow-unrelated", "--seed", "2", "--threads", "1")
    extracted("--rank", "size:10kB", "--memory", "64MiB", "--device", "cpu")


def test_the_json_of_extract_has_what_the_contract_names() -> None:
    weightops_here("fuse", "base.safetensors", "style.safetensors", "-o", "tuned.safetensors")
    done = weightops_here("extract", "tuned.safetensors", "base.safetensors", "--rank", "2", "--json")
    found = json.loads(done.out)
    module = found["modules"][0]
    assert {"name", "rank_before", "rank", "energy", "error"} <= set(module)
    assert (module["name"], module["rank_before"], module["rank"]) == (LORA, 64, 2)
    assert found["error"] == pytest.approx(module["error"])
    assert found["energy"] + found["error"] ** 2 == pytest.approx(1, abs=1e-4)


def test_wrong_order_and_wrong_words_are_told_in_one_line() -> None:
    for words, code, error in (
        (["extract", "base.safetensors", "style.safetensors"], 1, "error: style.safetensors: is a LoRA, expected"),
        (["extract", "base.safetensors"], 2, "error: missing argument 'BASE'"),
        (["extract", "base.safetensors", "base.safetensors"], 1, "error: base.safetensors: has the very weights of"),
        (["extract", "base.safetensors", "x.safetensors"], 2, "error: x.safetensors: no such file"),
        (["fuse", "style.safetensors", "base.safetensors"], 1, "error: style.safetensors: is a LoRA, expected a"),
        (["fuse", "base.safetensors", "base.safetensors"], 1, "error: base.safetensors: holds no adapter modules"),
        (["fuse", "base.safetensors", "style.safetensors:1e999"], 2, "error: style.safetensors: found strength inf"),
    ):
        done = weightops_here(*words)
        assert done.code == code, done.err
        assert done.out == ""
        assert done.err.startswith(error), done.err
        assert len(done.err.splitlines()) <= 2
