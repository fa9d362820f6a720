"""extract: the factors are the best of their rank, of every module that both models have, in every dialect."""

from __future__ import annotations

import json
import math
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save
from safetensors.torch import load_file
from tiny import checkpoint, pipeline, single_file
from torch import Tensor

from weightops.errors import MemoryRefused, MismatchError, OutputError, UsageError, ValueRefused, WeightopsError
from weightops.files.checkpoint import open_checkpoint
from weightops.lora.adapters import alphas, read_adapters
from weightops.ops.convert import convert
from weightops.ops.extract import extract
from weightops.ops.fuse import fuse

sys.path.insert(0, str(Path(__file__).parents[1] / "naming"))

from tagged import from_canonical, needs_lists, shapes_of, to_canonical

FLUX = "orig_flux_dev_bfl"
UNET = "model.diffusion_model."
QUERY = UNET + "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
KERNEL = UNET + "input_blocks.4.0.in_layers.2.weight"
KOHYA_QUERY = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
KOHYA_KERNEL = "lora_unet_down_blocks_1_resnets_0_conv1"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# Blocks that hold every kind of module that there is; the others are more of the same.
LEFT_OUT = re.compile(
    r"model\.diffusion_model\.(input_blocks\.([5-9]|1[01])|output_blocks\.([0-46-9]|10))\.|first_stage_model\..*(down|up|mid)\."
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Stable Diffusion 1 with a third of its blocks."""
    tensors = load_file(checkpoint("sd15", tmp_path_factory.mktemp("sd15"))[1])
    return {key: tensor for key, tensor in tensors.items() if not LEFT_OUT.match(key)}


def finetuned(base: dict[str, Tensor], *, size: float = 0.05, rank: int | None = None) -> dict[str, Tensor]:
    """Every weight but the VAE's moved by this share of its norm: by matrices of a rank, or by all directions."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for key, tensor in base.items():
        if key.startswith("first_stage_model") or not tensor.is_floating_point():
            found[key] = tensor
            continue
        flat = tensor.reshape(len(tensor) if tensor.ndim else 1, -1).double()
        least = min(flat.shape)
        count = least if rank is None else min(rank, least)
        spectrum = torch.arange(1, count + 1, dtype=torch.float64) ** -1.0
        up, down = (torch.randn(n, count, generator=generator, dtype=torch.float64) for n in flat.shape)
        delta = (up * spectrum) @ down.T
        scale = size * max(float(flat.norm()), 1.0) / max(float(delta.norm()), 1e-9)
        found[key] = (flat + scale * delta).reshape(tensor.shape).to(tensor.dtype)
    return found


def delta_of(a: dict[str, Tensor], b: dict[str, Tensor], key: str) -> Tensor:
    return (a[key].double() - b[key].double()).flatten(1)


def product(lora: dict[str, Tensor], module: str) -> Tensor:
    """up · down · alpha / rank of kohya's names."""
    up, down = (lora[f"{module}.lora_{side}.weight"].double().flatten(1) for side in ("up", "down"))
    return float(lora[f"{module}.alpha"]) / len(down) * up @ down


def optimum(delta: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(delta)[rank:].square().sum().sqrt())


# ------------------------------------------------------------------------------------------------ exactness


def test_every_module_is_the_best_of_its_rank(base: dict[str, Tensor]) -> None:
    tuned = finetuned(base)
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), tuned)
    report = extract("b.safetensors", "a.safetensors", rank=6, conv_rank=3, output="lora.safetensors", verify=True)
    lora = load_file("lora.safetensors")
    with open_checkpoint("lora.safetensors") as opened:
        found = read_adapters(opened)
        found.check()
        assert found.architecture == "sd15"
        assert set(alphas(opened, found).values()) <= {3.0, 4.0, 6.0}
    modules = {m["name"]: m for m in report.details["modules"]}
    # Of the UNet and the text encoder every matrix but the tables of embeddings.
    matrices = [k for k, t in tuned.items() if t.ndim > 1 and "first_stage" not in k and "embedding" not in k]
    assert len(modules) == len(matrices)
    for module, key in ((KOHYA_QUERY, QUERY), (KOHYA_KERNEL, KERNEL)):
        delta = delta_of(tuned, base, key)
        rank = 3 if key == KERNEL else 6
        best = optimum(delta, rank)
        off = float((delta - product(lora, module)).norm())
        assert best <= off <= 1.005 * best
        assert modules[module]["rank"] == rank
        assert math.isclose(modules[module]["error"], off / float(delta.norm()), rel_tol=1e-4)
        energy = 1 - (best / float(delta.norm())) ** 2
        assert math.isclose(modules[module]["energy"], energy, rel_tol=1e-3)
        assert math.isclose(modules[module]["delta_norm"], float(delta.norm()), rel_tol=1e-5)
        assert math.isclose(modules[module]["weight_norm"], float(base[key].double().norm()), rel_tol=1e-5)
    assert report.verified is not None
    assert report.verified["modules"] == 16


def test_values_are_split_evenly_and_alpha_is_the_rank(base: dict[str, Tensor]) -> None:
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), finetuned(base))
    extract("b.safetensors", "a.safetensors", rank=5, include=[KOHYA_QUERY], output="lora.safetensors")
    lora = load_file("lora.safetensors")
    assert sorted(lora) == [f"{KOHYA_QUERY}{end}" for end in (".alpha", ".lora_down.weight", ".lora_up.weight")]
    up, down = (lora[f"{KOHYA_QUERY}.lora_{side}.weight"] for side in ("up", "down"))
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-4, atol=0)
    assert float(lora[f"{KOHYA_QUERY}.alpha"]) == 5.0


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft", "comfy", "onetrainer"])
def test_what_was_fused_comes_back_in_every_dialect(base: dict[str, Tensor], dialect: str) -> None:
    """A finetune that is a LoRA of rank 4 is extracted at rank 4, and fused again gives the finetune."""
    tuned = finetuned(base, rank=4)
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), tuned)
    out = Path("lora" if dialect == "peft" else "lora.safetensors")
    report = extract("b.safetensors", "a.safetensors", rank=4, dialect=dialect, biases=dialect in ("kohya", "comfy"),
                     output=out)  # fmt: skip
    assert report.details["error"] < 1e-5
    fuse("a.safetensors", out, output="back.safetensors")
    back = load_file("back.safetensors")
    for key, tensor in tuned.items():
        if "first_stage" in key or (tensor.ndim < 2 and dialect not in ("kohya", "comfy")) or "embedding" in key:
            continue
        delta = tensor.double() - base[key].double()
        assert float((back[key].double() - tensor.double()).norm()) <= 1e-4 * float(delta.norm()) + 1e-7, key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_noise_floor_is_the_error_that_rounding_leaves(base: dict[str, Tensor], dtype: torch.dtype) -> None:
    stored = {k: t.to(dtype) for k, t in base.items()}
    save(Path("a.safetensors"), stored)
    save(Path("b.safetensors"), finetuned(stored, size=0.1, rank=4))
    report = extract("b.safetensors", "a.safetensors", rank=4, dtype="fp32", output="lora.safetensors")
    assert report.details["noise"] > 1e-3
    # A few of the noise's own directions lie within the rank.
    assert 0.8 * report.details["noise"] < report.details["error"] < 1.1 * report.details["noise"]
    more = extract("b.safetensors", "a.safetensors", rank=16, dtype="fp32", output="more.safetensors")
    above = {m["ranks_above_noise"] for m in more.details["modules"] if m["rank"] == 16}
    assert above == {4}
    assert "--rank 4 holds all that is not" in more.details["line"]


def test_factors_rounded_to_half_precision_are_in_the_error(base: dict[str, Tensor]) -> None:
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), finetuned(base, rank=4))
    report = extract("b.safetensors", "a.safetensors", rank=4, dtype="bf16", output="lora.safetensors", verify=True)
    assert 1e-3 < report.details["error"] < 5e-3
    assert load_file("lora.safetensors")[f"{KOHYA_QUERY}.lora_up.weight"].dtype is torch.bfloat16


def test_the_bytes_do_not_depend_on_memory_or_threads(base: dict[str, Tensor]) -> None:
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), finetuned(base))
    found = set()
    for number, (memory, threads) in enumerate(((24 << 20, 1), (400 << 20, 2))):
        out = Path(f"{number}.safetensors")
        extract("b.safetensors", "a.safetensors", rank="energy:0.8", output=out, memory=memory, threads=threads)
        found.add(out.read_bytes())
    assert len(found) == 1
    with pytest.raises(MemoryRefused, match="alone takes"):
        extract("b.safetensors", "a.safetensors", output="x.safetensors", memory=1 << 20)


# ------------------------------------------------------------------------------------------------ rules


def total_error(report: Any) -> float:
    squares = [(m["error"] * m["delta_norm"]) ** 2 for m in report.details["modules"]]
    return math.sqrt(math.fsum(squares) / math.fsum(m["delta_norm"] ** 2 for m in report.details["modules"]))


def test_the_rules_do_what_they_say(base: dict[str, Tensor]) -> None:
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), finetuned(base))
    words = {"exclude": ["lora_te_*"]}
    by_energy = extract("b.safetensors", "a.safetensors", rank="energy:0.7", output="1.safetensors", **words)
    for m in by_energy.details["modules"]:
        assert m["energy"] >= 0.7 - 1e-5
    by_error = extract("b.safetensors", "a.safetensors", rank="error:0.4", output="2.safetensors", **words)
    assert 0.38 < total_error(by_error) <= 0.4 + 1e-5
    extract("b.safetensors", "a.safetensors", rank="size:300kB", output="3.safetensors", **words)
    assert 290_000 < Path("3.safetensors").stat().st_size <= 300_000
    same = extract("b.safetensors", "a.safetensors", rank="size:300kB", conv_rank=1, output="4.safetensors", **words)
    kernels = {m["rank"] for m in same.details["modules"] if m["name"].endswith(("conv1", "conv2"))}
    assert kernels <= {0, 1}
    capped = extract("b.safetensors", "a.safetensors", rank="energy:0.99", conv_rank=2, output="5.safetensors", **words)
    assert {m["rank"] for m in capped.details["modules"] if m["name"] == KOHYA_KERNEL} == {2}


def test_a_difference_that_is_smaller_whole_is_written_whole(base: dict[str, Tensor]) -> None:
    save(Path("a.safetensors"), base)
    tuned = finetuned(base)
    save(Path("b.safetensors"), tuned)
    report = extract("b.safetensors", "a.safetensors", rank=64, include=[KOHYA_QUERY, KOHYA_KERNEL],
                     output="lora.safetensors", verify=True)  # fmt: skip
    lora = load_file("lora.safetensors")
    assert f"{KOHYA_QUERY}.diff" in lora
    assert f"{KOHYA_QUERY}.alpha" not in lora
    torch.testing.assert_close(lora[f"{KOHYA_QUERY}.diff"], (tuned[QUERY].double() - base[QUERY].double()).float())
    assert report.details["modules"][0]["method"] in ("whole", "exact")


def test_convolutions_are_left_out_on_request(base: dict[str, Tensor]) -> None:
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), finetuned(base))
    report = extract("b.safetensors", "a.safetensors", rank=2, conv_rank=0, output="lora.safetensors")
    assert not any(t.ndim == 4 and t.shape[2] > 1 for t in load_file("lora.safetensors").values())
    assert {u.reason for u in report.account.unused if u.key == KERNEL} == {"--conv-rank 0"}


def test_a_clamp_is_that_of_others_and_its_error_is_told(base: dict[str, Tensor]) -> None:
    save(Path("a.safetensors"), base)
    tuned = finetuned(base)
    save(Path("b.safetensors"), tuned)
    plain = extract("b.safetensors", "a.safetensors", rank=6, include=[KOHYA_QUERY], output="1.safetensors")
    report = extract("b.safetensors", "a.safetensors", rank=6, include=[KOHYA_QUERY], clamp_quantile=0.98,
                     output="2.safetensors", verify=True)  # fmt: skip
    delta = delta_of(tuned, base, QUERY)
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    up, down = u[:, :6] * s[:6], vh[:6]
    high = torch.quantile(torch.cat([up.flatten(), down.flatten()]), 0.98)
    wanted = float((delta - up.clamp(-high, high) @ down.clamp(-high, high)).norm() / delta.norm())
    # A singular vector's sign is free, and the quantile is of signed values.
    assert math.isclose(report.details["error"], wanted, rel_tol=0.1)
    assert report.details["error"] > 1.02 * plain.details["error"]


# ------------------------------------------------------------------------------------------------ spellings


def test_spellings_line_up(tmp_path: Path) -> None:
    """A diffusers folder and a single file, packed projections of OpenCLIP among them: the same bytes."""
    path = checkpoint("sdxl", tmp_path, layers_per_block=1)[1]
    base = load_file(path)
    tuned = finetuned(base)
    save(Path("b.safetensors"), tuned)
    convert("b.safetensors", to="diffusers", no_tokenizer=True, output="b")
    convert(path, to="diffusers", no_tokenizer=True, output="a")
    words: dict[str, Any] = {"rank": 3}
    for number, (mine, theirs) in enumerate((("b.safetensors", path), ("b", path), ("b.safetensors", "a"))):
        extract(mine, theirs, output=f"{number}.safetensors", **words)
    first, *others = (load_file(f"{n}.safetensors") for n in range(3))
    assert any(k.startswith("lora_te2_") for k in first)
    for other in others:
        assert other.keys() == first.keys()
        for key, tensor in first.items():
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=0)
    fuse(path, "1.safetensors", output="back.safetensors")
    back = load_file("back.safetensors")
    packed = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    assert float((back[packed] - base[packed]).norm()) > 0.5 * float((tuned[packed] - base[packed]).norm())


@needs_lists
def test_kohyas_packed_modules_of_flux_are_extracted_whole() -> None:
    shapes = {k: tuple(n if n <= 8 else n // 32 for n in s) for k, s in shapes_of(FLUX).items()}
    shapes = {k: s for k, s in shapes.items() if not any(f"_blocks.{n}." in k for n in range(2, 40)) and all(s)}
    generator = torch.Generator().manual_seed(1)
    base = {k: 0.03 * torch.randn(s, generator=generator) for k, s in shapes.items()}
    tuned = finetuned(base, rank=4)
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), tuned)
    for name, weights in (("x", base), ("y", tuned)):
        canonical = to_canonical("flux_transformer", "original", weights)
        save(Path(f"{name}.safetensors"), from_canonical("flux_transformer", "diffusers", canonical))
    extract("b.safetensors", "a.safetensors", rank=4, output="1.safetensors")
    extract("y.safetensors", "x.safetensors", rank=4, output="2.safetensors")
    one, two = load_file("1.safetensors"), load_file("2.safetensors")
    assert one["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape[0] == 4
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=0)
    for dialect in ("kohya", "diffusers"):
        extract("y.safetensors", "a.safetensors", rank=4, dialect=dialect, force=True, output="lora.safetensors")
        fuse("a.safetensors", "lora.safetensors", output="back.safetensors", force=True)
        back = load_file("back.safetensors")
        for key, tensor in tuned.items():
            if tensor.ndim > 1:
                moved = float((tensor - base[key]).norm())
                assert float((back[key] - tensor).norm()) < 1e-4 * moved + 1e-6, key


MODELS = {
    "flux": "orig_flux_dev_bfl",
    "flux, a whole bundle": "sdmecha_flux-flux",
    "flux, diffusers": "diffusers_flux_dev",
    "flux2": "orig_comfy_flux2_dev",
    "flux2, diffusers": "diffusers_flux2_klein_4b",
    "chroma": "orig_chroma_bfl",
    "sd3, a whole bundle": "sdmecha_sd3-comfyui",
    "sd3, diffusers": "diffusers_sd35_large",
    "wan": "orig_comfy_wan21_i2v_14b",
    "wan, diffusers": "diffusers_wan21_t2v_1_3b",
    "qwen_image": "diffusers_qwen_image",
    "z_image": "orig_comfy_z_image",
    "z_image, diffusers": "diffusers_z_image",
    "hunyuan_video": "orig_hunyuan_video_tencent",
    "hunyuan_video, diffusers": "diffusers_hunyuan_video",
    "lumina2": "orig_comfy_lumina2",
    "sd2": "toolkit_UNET-v2-SD",
}
# What no LoRA holds, whatever the dialect.
NEVER = re.compile(r"no LoRA changes (it|the vae)|is no matrix, bias or norm of a module|is a table of embeddings.*")


def small(name: str) -> dict[str, Tensor]:
    """A model of these names, of two blocks of a kind, and a thirty-second of the width."""
    shapes = shapes_of(name)
    more = re.compile(r"(blocks|layers|refiner|block)\.([2-9]|[1-9][0-9]+)\.")
    if name == "toolkit_UNET-v2-SD":
        more = re.compile(LEFT_OUT.pattern + r"|.*\.resblocks\.([2-9]|[1-9][0-9]+)\.")
        shapes = {UNET + k: s for k, s in shapes.items()}
        shapes |= {f"cond_stage_model.model.{k}": s for k, s in shapes_of("toolkit_CLIP-v2-SD").items()}
    shapes = {k: s for k, s in shapes.items() if not more.search(k)}
    generator = torch.Generator().manual_seed(1)
    return {
        k: 0.03 * torch.randn(tuple(n if n <= 16 else n // 32 for n in s), generator=generator)
        for k, s in shapes.items() if all(s)
    }  # fmt: skip


@needs_lists
@pytest.mark.parametrize("name", MODELS.values(), ids=MODELS)
def test_every_architecture_comes_back_in_every_dialect(name: str) -> None:
    """What is used of a finetune of low rank is had again by fusing; what is not, is named with its reason."""
    base = small(name)
    tuned = finetuned(base, rank=2)
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), tuned)
    dialects = ("kohya", "comfy", "onetrainer", "diffusers", "peft")
    for dialect in dialects[::4] if name.startswith("diffusers_") else dialects:
        out = Path("lora" if dialect == "peft" else "lora.safetensors")
        biases = dialect not in ("peft", "diffusers")
        report = extract(
            "b.safetensors", "a.safetensors", rank=8, dialect=dialect, biases=biases, output=out, force=True
        )
        fuse("a.safetensors", out, output="back.safetensors", force=True)
        back = load_file("back.safetensors")
        unused = {u.key: u.reason for u in report.account.unused if u.source == "b.safetensors"}
        assert len(report.account.unused) + len(report.account.used) == 2 * len(base)
        for key, tensor in tuned.items():
            if key in unused:
                assert tensor.ndim == 1 or NEVER.fullmatch(unused[key]), (key, unused[key])
                continue
            moved = float((tensor - base[key]).norm())
            assert float((back[key] - tensor).norm()) <= 2e-3 * moved + 1e-7, (dialect, key)


@pytest.mark.parametrize("dialect", ["kohya", "comfy"])
def test_an_unknown_architecture_goes_by_its_own_names(dialect: str) -> None:
    generator = torch.Generator().manual_seed(1)
    base = {
        f"{m}.{leaf}": torch.randn(s, generator=generator)
        for m in ("tower.0.mix", "tower.1.mix", "head")
        for leaf, s in (("weight", (24, 16)), ("bias", (24,)))
    }
    save(Path("a.safetensors"), base)
    tuned = finetuned(base, rank=2)
    save(Path("b.safetensors"), tuned)
    extract("b.safetensors", "a.safetensors", rank=2, biases=True, dialect=dialect, output="lora.safetensors")
    fuse("a.safetensors", "lora.safetensors", output="back.safetensors")
    for key, tensor in load_file("back.safetensors").items():
        torch.testing.assert_close(tensor, tuned[key], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_diffusers_loads_it_and_draws_the_finetune(dialect: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pipe = pipeline(name, tmp_path)
    base = single_file(name, pipe)
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), finetuned(base, rank=3))
    extract("b.safetensors", "a.safetensors", rank=4, dialect=dialect, output="lora.safetensors")
    fuse("a.safetensors", "lora.safetensors", output="fused.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_lora_weights(".", weight_name="lora.safetensors")
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    theirs, ours = single_file(name, pipe), load_file("fused.safetensors")
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-4, atol=1e-6, msg=key)


# ------------------------------------------------------------------------------------------------ what is said


def test_what_is_equal_in_both_is_left_out(base: dict[str, Tensor]) -> None:
    tuned = finetuned(base)
    tuned |= {k: t for k, t in base.items() if k.startswith("cond_stage_model")}
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), tuned)
    report = extract("b.safetensors", "a.safetensors", rank=2, output="lora.safetensors")
    assert not any(k.startswith("lora_te") for k in load_file("lora.safetensors"))
    key = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
    assert [u.reason for u in report.account.unused if u.key == key] == [
        "equal in a.safetensors",
        "equal in b.safetensors",
    ]
    save(Path("c.safetensors"), base, {"other": "words"})
    with pytest.raises(MismatchError, match="there is nothing to extract"):
        extract("c.safetensors", "a.safetensors", output="x.safetensors")
    assert not Path("x.safetensors").exists()


def test_one_value_that_differs_is_seen(base: dict[str, Tensor]) -> None:
    """A first look takes a sample, and what looks equal is compared whole."""
    tuned = {k: t.clone() for k, t in base.items()}
    tuned[KERNEL].view(-1)[-1] += 1.0
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), tuned)
    report = extract("b.safetensors", "a.safetensors", rank=2, output="lora.safetensors")
    assert [m["name"] for m in report.details["modules"]] == [KOHYA_KERNEL]
    assert report.details["error"] < 1e-6


def test_two_that_are_not_finetune_and_base_are_refused(base: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(9)
    other = {k: t.std().nan_to_num(0.0) * torch.randn(t.shape, generator=generator) for k, t in base.items()}
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), other)
    with pytest.raises(MismatchError, match=r"not finetune and base: they differ by 1[0-9][0-9] % of their norm"):
        extract("b.safetensors", "a.safetensors", output="x.safetensors")
    assert not Path("x.safetensors").exists()
    report = extract("b.safetensors", "a.safetensors", allow_unrelated=True, rank=2, output="x.safetensors")
    assert report.details["error"] > 0.5


def test_biases_that_differ_are_named_or_taken(base: dict[str, Tensor]) -> None:
    tuned = finetuned(base)
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), tuned)
    report = extract("b.safetensors", "a.safetensors", rank=2, output="1.safetensors")
    assert any("biases and norms differ and would come with --biases" in w for w in report.warnings)
    extract("b.safetensors", "a.safetensors", rank=2, biases=True, output="2.safetensors")
    lora = load_file("2.safetensors")
    norm = "model.diffusion_model.input_blocks.4.1.norm"
    wanted = (tuned[f"{norm}.weight"].double() - base[f"{norm}.weight"].double()).float()
    torch.testing.assert_close(lora["lora_unet_down_blocks_1_attentions_0_norm.w_norm"], wanted)
    assert "lora_unet_down_blocks_1_attentions_0_norm.b_norm" in lora
    assert f"{KOHYA_KERNEL}.diff_b" in lora


def test_every_key_of_both_is_accounted_for(base: dict[str, Tensor]) -> None:
    tuned = {k: t for k, t in finetuned(base).items() if k != QUERY}
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), {**tuned, "model.diffusion_model.strange.weight": torch.ones(3, 3)})
    report = extract("b.safetensors", "a.safetensors", rank=2, output="lora.safetensors")
    for label, keys in (("a.safetensors", base), ("b.safetensors", [*tuned, "model.diffusion_model.strange.weight"])):
        unused = [u.key for u in report.account.unused if u.source == label]
        assert len(unused) == len(set(unused))
        assert set(keys) <= {*unused, *report.account.used}


def test_what_kohyas_metadata_says_is_true(base: dict[str, Tensor]) -> None:
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), finetuned(base))
    extract("b.safetensors", "a.safetensors", rank=4, output="lora.safetensors")
    with open_checkpoint("lora.safetensors") as opened:
        said = dict(opened.metadata)
    assert said["ss_network_module"] == "networks.lora"
    assert (said["ss_base_model_version"], said["ss_v2"]) == ("sd_v1", "False")
    assert len(said["sshs_model_hash"]) == 64
    recipe = json.loads(said["weightops"])
    assert recipe["command"] == "extract"
    assert [i["name"] for i in recipe["inputs"]] == ["b.safetensors", "a.safetensors"]


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"rank": 0}, "--rank: found 0, expected a rank of 1 or more"),
        ({"rank": "energi:0.9"}, "--rank: found 'energi:0.9'"),
        ({"conv_rank": "size:1MB"}, "--conv-rank: size: is of the whole file"),
        ({"rank": "error:0.1", "conv_rank": "energy:0.5"}, "--conv-rank: beside --rank error:0.1 it is a number"),
        ({"dialect": "koya"}, "--dialect: unknown dialect 'koya'"),
        ({"dtype": "fp8_e4m3"}, "--dtype: fp8_e4m3 would leave little"),
        ({"clamp_quantile": 0.2}, "--clamp-quantile: found 0.2"),
        ({"include": ["nothing*"]}, "--include: 'nothing*' is the name of no module"),
        ({"exclude": ["nothing*"]}, "--exclude: 'nothing*' is the name of no module"),
    ],
    ids=str,
)
def test_wrong_words_are_refused(base: dict[str, Tensor], words: dict[str, Any], error: str) -> None:
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), base)
    with pytest.raises(UsageError, match=re.escape(error)):
        extract("b.safetensors", "a.safetensors", output="x.safetensors", **words)


def test_wrong_files_are_refused(base: dict[str, Tensor], tmp_path: Path) -> None:
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), finetuned(base))
    extract("b.safetensors", "a.safetensors", rank=2, output="lora.safetensors")
    with pytest.raises(MismatchError, match="is a LoRA, expected a checkpoint"):
        extract("lora.safetensors", "a.safetensors", output="x.safetensors")
    other = checkpoint("sdxl", tmp_path / "xl")[1]
    with pytest.raises(MismatchError, match=r"is sd15, but .* is sdxl"):
        extract("b.safetensors", other, output="x.safetensors")
    broken = finetuned(base)
    broken[QUERY] = broken[QUERY].clone()
    broken[QUERY][0, 0] = math.nan
    save(Path("n.safetensors"), broken)
    with pytest.raises(ValueRefused, match="NaN or Inf"):
        extract("n.safetensors", "a.safetensors", rank=2, output="x.safetensors")
    scaled = {**base, "scaled_fp8": torch.zeros(2), QUERY.replace("weight", "scale_weight"): torch.ones(())}
    save(Path("s.safetensors"), scaled)
    with pytest.raises(MismatchError, match="is quantised"):
        extract("s.safetensors", "a.safetensors", output="x.safetensors")
    shapes = {**finetuned(base), QUERY: torch.zeros(3, 3)}
    save(Path("t.safetensors"), shapes)
    with pytest.raises(WeightopsError, match="--strict"):
        extract("t.safetensors", "a.safetensors", rank=2, strict=True, output="x.safetensors")
    assert not Path("x.safetensors").exists()


def test_a_dry_run_writes_nothing_and_says_the_size(base: dict[str, Tensor]) -> None:
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), finetuned(base))
    dry = extract("b.safetensors", "a.safetensors", rank=4, output="x.safetensors", dry_run=True)
    assert not Path("x.safetensors").exists()
    done = extract("b.safetensors", "a.safetensors", rank=4, output="x.safetensors")
    assert dry.bytes_written == done.bytes_written == Path("x.safetensors").stat().st_size
    most = extract("b.safetensors", "a.safetensors", rank="energy:0.5", output="y.safetensors", dry_run=True)
    assert any("the largest that it can be" in w for w in most.warnings)


# ------------------------------------------------------------------------------------------------ odd models


def plain(**more: Tensor) -> dict[str, Tensor]:
    """A model of no known architecture."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"t.0.weight": (24, 16), "t.0.bias": (24,), "t.1.weight": (24, 16), "c.weight": (8, 4, 3, 3)}
    return {k: torch.randn(s, generator=generator) for k, s in shapes.items()} | more


def pulled(base: dict[str, Tensor], size: float = 0.02) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {k: (t + size * torch.randn(t.shape, generator=generator)).to(t.dtype) for k, t in base.items()}


def reasons(report: Any, label: str) -> dict[str, str]:
    return {u.key: u.reason for u in report.account.unused if u.source == label}


def test_what_is_no_matrix_is_named() -> None:
    base = plain(**{"e.weight": torch.zeros(0, 5), "s.weight": torch.tensor(1.0), "weight": torch.ones(3, 3)})
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), pulled(base))
    report = extract("b.safetensors", "a.safetensors", rank=2, biases=True, output="lora.safetensors")
    no_part = "is no matrix, bias or norm of a module"
    wanted = {"e.weight": "is empty", "s.weight": no_part, "weight": no_part}
    assert reasons(report, "b.safetensors") == reasons(report, "a.safetensors") == wanted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("rank", [2, 16, "energy:0.5"])
def test_other_dtypes_are_subtracted_too(dtype: torch.dtype, rank: int | str) -> None:
    base = {k: t.to(dtype) for k, t in plain().items()}
    tuned = {k: t.to(dtype) for k, t in pulled({k: t.double() for k, t in base.items()}, 0.3).items()}
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), tuned)
    report = extract("b.safetensors", "a.safetensors", rank=rank, biases=True, output="lora.safetensors", verify=True)
    assert report.verified is not None
    lora = load_file("lora.safetensors")
    assert lora["lora_unet_t_0.diff_b"].dtype is (dtype if dtype is torch.float64 else torch.float16)
    found = lora["lora_unet_t_0.diff"].double() if rank == 16 else product(lora, "lora_unet_t_0")
    delta = tuned["t.0.weight"].double() - base["t.0.weight"].double()
    error = next(m["error"] for m in report.details["modules"] if m["name"] == "lora_unet_t_0")
    assert math.isclose(float((found - delta).norm() / delta.norm()), error, rel_tol=1e-3, abs_tol=1e-6)


def test_equal_values_of_another_dtype_are_left_out() -> None:
    half = {k: t.half() for k, t in plain().items()}
    save(Path("a.safetensors"), {k: t.float() for k, t in half.items()})
    save(Path("b.safetensors"), half)
    with pytest.raises(MismatchError, match="there is nothing to extract"):
        extract("b.safetensors", "a.safetensors", output="lora.safetensors")
    save(Path("b.safetensors"), half | {"t.0.weight": pulled(half)["t.0.weight"]})
    report = extract("b.safetensors", "a.safetensors", rank=2, output="lora.safetensors")
    assert [m["name"] for m in report.details["modules"]] == ["lora_unet_t_0"]
    assert reasons(report, "b.safetensors")["t.1.weight"] == "equal in a.safetensors"


def test_modules_without_a_rank_are_lost_and_told_so() -> None:
    base = plain()
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), pulled(base))
    report = extract("b.safetensors", "a.safetensors", rank="error:0.9", output="lora.safetensors")
    none = [m for m in report.details["modules"] if not m["rank"]]
    assert [(m["error"], m["energy"]) for m in none] == [(1.0, 0.0)] * len(none)
    assert none
    assert math.isclose(report.details["error"], total_error(report), rel_tol=1e-6)
    assert report.details["error"] <= 0.9
    assert "the rule leaves it no rank" in reasons(report, "b.safetensors").values()
    for rank in ("size:200B", "error:1"):
        with pytest.raises(UsageError, match=f"--rank: {rank} leaves no module a rank"):
            extract("b.safetensors", "a.safetensors", rank=rank, output="x.safetensors")
    dry = extract("b.safetensors", "a.safetensors", rank="size:1500B", output="x.safetensors", dry_run=True)
    done = extract("b.safetensors", "a.safetensors", rank="size:1500B", output="x.safetensors")
    assert done.bytes_written == Path("x.safetensors").stat().st_size <= dry.bytes_written == 1500


@pytest.mark.parametrize("rank", [2, 300, "energy:0.5"])
def test_a_matrix_that_is_not_finite_is_refused_by_name(rank: int | str) -> None:
    base = plain(**{"big.weight": torch.ones(300, 300)})
    tuned = pulled(base)
    tuned["big.weight"][0, 0] = math.inf  # where the first look does not look
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), tuned)
    with pytest.raises(ValueRefused, match="'lora_unet_big' holds NaN or Inf") as refused:
        extract("b.safetensors", "a.safetensors", rank=rank, allow_nonfinite=True, output="x.safetensors")
    assert refused.value.hint == "--exclude 'lora_unet_big' leaves it out"
    extract("b.safetensors", "a.safetensors", rank=rank, exclude=["lora_unet_big"], output="x.safetensors")


def test_strict_minds_what_one_model_lacks() -> None:
    base = plain()
    tuned = pulled(base)
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), {k: t for k, t in tuned.items() if k != "c.weight"})
    report = extract("b.safetensors", "a.safetensors", rank=2, output="lora.safetensors")
    assert reasons(report, "a.safetensors")["c.weight"] == "b.safetensors has no such tensor"
    for one, other in (("b.safetensors", "a.safetensors"), ("a.safetensors", "b.safetensors")):
        with pytest.raises(MismatchError, match=r"--strict: 1 tensor would be left out: 'c.weight'"):
            extract(one, other, rank=2, strict=True, output="x.safetensors")


def test_biases_that_a_dialect_cannot_say_are_told(base: dict[str, Tensor]) -> None:
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), finetuned(base))
    with pytest.raises(UsageError, match="--biases: diffusers has no differences of biases and norms"):
        extract("b.safetensors", "a.safetensors", dialect="diffusers", biases=True, output="x.safetensors")
    report = extract("b.safetensors", "a.safetensors", rank=2, dialect="diffusers", output="x.safetensors")
    assert any("biases and norms differ, and diffusers has no differences of them" in w for w in report.warnings)


def test_what_headers_tell_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    save(Path("a.safetensors"), plain())
    save(Path("b.safetensors"), pulled(plain()))
    save(Path("there.safetensors"), plain())
    monkeypatch.setattr("weightops.ops.extract._look", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(OutputError, match="exists"):
        extract("b.safetensors", "a.safetensors", rank="energy:0.5", output="there.safetensors")
    for rank in (2, "energy:0.5"):
        with pytest.raises(MemoryRefused, match="alone takes"):
            extract("b.safetensors", "a.safetensors", rank=rank, memory=1 << 16, output="x.safetensors")


@pytest.mark.parametrize("rank", [2, "energy:0.5"])
def test_progress_never_goes_back(rank: int | str) -> None:
    base = plain(**{"same.weight": torch.ones(64, 64)})
    save(Path("a.safetensors"), base)
    save(Path("b.safetensors"), pulled(base) | {"same.weight": base["same.weight"]})
    shown: list[tuple[int, int]] = []
    extract("b.safetensors", "a.safetensors", rank=rank, output="x.safetensors",
            on_progress=lambda done, total: shown.append((done, total)))  # fmt: skip
    assert len({total for _, total in shown}) == 1
    assert [done for done, _ in shown] == sorted(done for done, _ in shown)
    assert shown[-1][0] == shown[-1][1]
