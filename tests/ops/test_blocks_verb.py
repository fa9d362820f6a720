"""blocks says what --blocks knows of a file; fuse --blocks is the same as as many LoRAs, each at its own strength."""

from __future__ import annotations

import gzip
import json
import math
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import save_raw
from loras import Maker, named, raw, save

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
sys.path.insert(0, str(Path(__file__).parents[1] / "naming"))
import tiny
from commandline import weightops_here
from test_light import loaded

import weightops
from weightops.errors import MismatchError, UsageError
from weightops.naming.blocks import blocks_of
from weightops.naming.keymap import NETWORKS
from weightops.ops.blocks import blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

ROOT = Path(__file__).parents[2]
WIDTHS = {"F16": 2, "BF16": 2, "F32": 4, "I64": 8}


@pytest.fixture(scope="module")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A pipeline of SD1.5, and its file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tiny.checkpoint("sd15", tmp_path_factory.mktemp("sd15"))


@pytest.fixture
def sd15(tiny_sd15: tuple[Any, Path]) -> Path:
    return tiny_sd15[1]


@pytest.fixture
def pipe(tiny_sd15: tuple[Any, Path]) -> Any:
    return tiny_sd15[0]


def model(cls: str, **words: Any) -> dict[str, Tensor]:
    """A tiny model of diffusers, by its own names, which are the canonical ones."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {k: t.detach().clone() for k, t in getattr(tiny.diffusers, cls)(**words).state_dict().items()}


def flux() -> dict[str, Tensor]:
    return model("FluxTransformer2DModel", num_layers=2, num_single_layers=3, attention_head_dim=16,
                 num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
                 in_channels=4, guidance_embeds=True)  # fmt: skip


def wan() -> dict[str, Tensor]:
    return model("WanTransformer3DModel", num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=32,
                 ffn_dim=32, num_layers=3)  # fmt: skip


def sparse(path: Path, header: Mapping[str, tuple[str, list[int]]]) -> Path:
    """A file of these names, dtypes and shapes, whose values take no room."""
    head, position = {}, 0
    for key, (dtype, shape) in header.items():
        nbytes = WIDTHS[dtype] * math.prod(shape)
        head[key] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(head).encode()
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + position)
    return path


def fixture(name: str) -> dict[str, tuple[str, list[int]]]:
    with gzip.open(ROOT / name) as f:
        found: dict[str, tuple[str, list[int]]] = json.load(f)
    return found


# ------------------------------------------------------------------------------------------------ blocks


@pytest.mark.parametrize("name", ["weightops/cli/sd15.json.gz", "fixtures/headers/sdxl.json.gz"])
def test_every_tensor_of_a_checkpoint_is_counted_in_one_block(name: str, tmp_path: Path) -> None:
    header = fixture(name)
    path = sparse(tmp_path / "model.safetensors", header)
    found = blocks(path)
    assert found.components[0].component == "unet"
    rows = [row for held in found.components for row in held.blocks]
    assert sum(row.tensors for row in rows) == len(header)
    assert sum(row.parameters for row in rows) == sum(math.prod(shape) for _, shape in header.values())
    assert sum(row.nbytes for row in rows) == sum(WIDTHS[dtype] * math.prod(shape) for dtype, shape in header.values())
    unet = found.components[0]
    count = 9 if "sdxl" in name else 12
    halves = [f"{half}{n:02}" for half in ("IN", "OUT") for n in range(count)]
    assert [row.name for row in unet.blocks] == [*halves[:count], "M00", *halves[count:]]
    assert unet.lists == ((19, 20, 12, 25, 26) if "sdxl" in name else (25, 26, 17))
    in_original = {f"model.diffusion_model.input_blocks.4.{n}." for n in range(3)}
    assert unet.blocks[4].tensors == sum(key.startswith(tuple(in_original)) for key in header)
    names = [row.name for held in found.components[1:] for row in held.blocks]
    assert len(set(names)) == len(names)
    assert {"text_encoder.in", "text_encoder.11", "vae.encoder.down.3", "vae.decoder.out"} <= set(names)


def test_a_lora_has_the_blocks_that_it_changes(tmp_path: Path) -> None:
    """kohya's LoRA for Flux: packed modules stand where what they pack stands."""
    header = fixture("fixtures/headers/flux_lora_kohya.json.gz")
    found = blocks(sparse(tmp_path / "lora.safetensors", header))
    (held,) = found.components
    assert (found.kind, found.architecture, held.network, held.lists) == ("lora", "flux", "flux_transformer", ())
    assert [row.name for row in held.blocks] == [f"double.{n}" for n in range(19)] + [f"single.{n}" for n in range(38)]
    assert {(len(row.modules), row.tensors) for row in held.blocks} == {(10, 30), (3, 9)}
    assert sum(row.tensors for row in held.blocks) == len(header)
    document = found.to_dict()
    assert document["components"]["transformer"]["blocks"][0] == {
        "name": "double.0", "tensors": 30, "parameters": held.blocks[0].parameters, "bytes": held.blocks[0].nbytes,
        "modules": 10,
    }  # fmt: skip


def test_of_an_unknown_model_the_numbers_are_the_blocks(tmp_path: Path) -> None:
    keys = ["x_in.weight", "stack.0.attn.qkv.weight", "stack.1.attn.qkv.weight", "stack.1.attn.qkv.bias"]
    path = save_raw(tmp_path / "a.safetensors", {f"model.diffusion_model.{k}": ("F16", [2], bytes(4)) for k in keys})
    (held,) = blocks(path).components
    assert [(row.name, row.tensors) for row in held.blocks] == [("stack.0", 1), ("stack.1", 2), ("x_in", 1)]
    assert (held.component, held.lists) == ("model", (2, 3))
    for prefix, dots in (("lora_unet_", False), ("diffusion_model.", True)):
        modules = {}
        for n in range(2):
            name = prefix + (f"stack.{n}.attn.qkv" if dots else f"stack_{n}_attn_qkv")
            modules[name] = Maker().lora(8, 8, 2)
        (held,) = blocks(save(tmp_path / "lora.safetensors", named(modules))).components
        assert [(row.name, len(row.modules)) for row in held.blocks] == [("stack.0", 1), ("stack.1", 1)]


def test_a_lora_that_fits_several_models_is_for_the_one_that_is_named(tmp_path: Path) -> None:
    modules = {f"transformer.transformer_blocks.{n}.attn.to_q": Maker().lora(3072, 3072, 1) for n in range(2)}
    path = save(tmp_path / "lora.safetensors", named(modules))
    with pytest.raises(MismatchError, match="cannot tell which model it is for: chroma, flux"):
        blocks(path)
    assert [row.name for row in blocks(path, architecture="flux").components[0].blocks] == ["double.0", "double.1"]
    assert [row.name for row in blocks(path, architecture="qwen_image").components[0].blocks] == ["block.0", "block.1"]
    with pytest.raises(UsageError, match="unknown architecture 'flix'"):
        blocks(path, architecture="flix")
    with pytest.raises(UsageError, match="is what a LoRA is for"):
        blocks(save_raw(tmp_path / "b.safetensors", {"w": ("F16", [2], bytes(4))}), architecture="flux")


def test_the_command_shows_them_and_says_what_a_list_has(sd15: Path) -> None:
    done = weightops_here("blocks", sd15)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[:2] == [str(sd15), "checkpoint · sd15"]
    assert re.fullmatch(r"unet +IN00 +6 +[\d.]+ k +[\d.]+ kB", lines[4].strip())
    assert "unet: a list has 25 numbers, 26 with BASE first, or 17" in lines
    found = json.loads(weightops_here("blocks", sd15, "--json").out)
    assert found == blocks(sd15).to_dict()
    assert found["components"].keys() == {"unet", "vae", "text_encoder"}


def test_headers_are_enough_for_blocks(tmp_path: Path) -> None:
    sparse(tmp_path / "model.safetensors", fixture("fixtures/headers/sdxl.json.gz"))
    assert loaded(tmp_path, "import weightops; weightops.blocks('model.safetensors')") == "[]"


# ------------------------------------------------------------------------------------------------ fuse --blocks


def kohya(body: str) -> str:
    return f"lora_unet_{body.replace('.', '_')}"


def of_everything(weights: Mapping[str, Tensor], spelled: Callable[[str], str], rank: int = 2) -> dict[str, Any]:
    """LoRA modules for every matrix and convolution: canonical name -> parts."""
    maker, found = Maker(3), {}
    for key, weight in weights.items():
        if key.endswith(".weight") and weight.dim() > 1:
            out, features, *kernel = weight.shape
            found[spelled(key.removesuffix(".weight"))] = maker.lora(out, features, rank, 1.5, kernel)
    return found


def in_parts(modules: Mapping[str, Any], number: Callable[[str], float], folder: Path) -> list[tuple[Path, float]]:
    """The modules as several LoRAs, each of those that a spec should give one number."""
    shares: dict[float, dict[str, Any]] = {}
    for name, parts in modules.items():
        shares.setdefault(number(name), {})[name] = parts
    assert len(shares) > 1
    return [(save(folder / f"part{n}.safetensors", named(of)), s) for n, (s, of) in enumerate(shares.items())]


def test_factors_by_block_are_as_many_loras_each_at_its_strength(sd15: Path, pipe: Any, tmp_path: Path) -> None:
    """Stable Diffusion in LDM's names, text encoder and convolutions included; factors multiply a LoRA's strength."""
    modules = of_everything(tiny.canonical(pipe.unet), kohya)
    modules |= of_everything(tiny.canonical(pipe.text_encoder), lambda n: f"lora_te_{n.replace('.', '_')}")
    some = re.compile("embedding|to_[kv]$|[kv]_proj$|proj_(in|out)$|ff_net_|fc1|conv2|shortcut|time_emb")
    modules = {name: parts for name, parts in modules.items() if not some.search(name)}
    names = {("unet", f"{n}.weight"): NETWORKS.get("sd15_unet") for n in map(_body, tiny.canonical(pipe.unet))}
    where = {kohya(n[1].removesuffix(".weight")): block for n, block in blocks_of(names).items()}
    numbers = {f"IN{n:02}": (n % 4) / 2 for n in range(12)} | {"M00": -1.0}
    numbers |= {f"OUT{n:02}": 1 - (n % 5) / 4 for n in range(12)}
    lora = save(tmp_path / "lora.safetensors", named(modules))
    parts = in_parts(modules, lambda name: 0.5 * (numbers[where[name]] if name in where else 0.25), tmp_path)
    wanted = weightops.fuse(sd15, *parts, output=tmp_path / "wanted.safetensors")
    spec = ",".join(map(str, [0.25, *numbers.values()]))
    found = weightops.fuse(sd15, (lora, 0.5), blocks=spec, output=tmp_path / "found.safetensors")
    assert raw(tmp_path / "found.safetensors") == raw(tmp_path / "wanted.safetensors") != raw(sd15)
    assert sorted(found.account.used) == sorted(set(found.account.used))
    assert wanted.account.unused == found.account.unused == []
    # The same in rules, as words of the grammar and as supermerger writes them.
    rules = "; ".join(f"{block}={number}" for block, number in numbers.items()) + "; BASE=0.25"
    theirs = "\n".join(f"{block}::{number}" for block, number in numbers.items()) + "\ntext_encoder::0.25"
    for n, text in enumerate((rules, theirs)):
        weightops.fuse(sd15, (lora, 0.5), blocks=text, output=tmp_path / f"{n}.safetensors")
        assert raw(tmp_path / f"{n}.safetensors") == raw(tmp_path / "found.safetensors"), text


def _body(key: str) -> str:
    return key.removesuffix(".weight").removesuffix(".bias")


def test_fluxs_blocks_and_layers_have_their_own_strengths(tmp_path: Path) -> None:
    weights = flux()
    base = save(tmp_path / "base.safetensors", weights)
    modules = of_everything(weights, lambda n: f"transformer.{n}")
    lora = save(tmp_path / "lora.safetensors", named(modules))

    def number(name: str) -> float:
        name = name.removeprefix("transformer.")
        if name.startswith("transformer_blocks.1.") and re.search(r"\.(to_q|add_q_proj)$", name):
            return 0.125
        single = re.match(r"single_transformer_blocks\.(\d)\.", name)
        return 1 - int(single[1]) / 2 if single else 0.75 if name.startswith("transformer_blocks") else 1.0

    weightops.fuse(base, *in_parts(modules, number, tmp_path), output=tmp_path / "wanted.safetensors")
    text = "double=0.75, D01:attn.q=0.125, single.*=linear(1..0)"
    report = weightops.fuse(base, lora, blocks=text, output=tmp_path / "found.safetensors")
    assert raw(tmp_path / "found.safetensors") == raw(tmp_path / "wanted.safetensors")
    assert report.summary == f"base + 1 × lora, blocks {text!r}"
    kept = json.loads(raw_metadata(tmp_path / "found.safetensors")["weightops"])
    assert kept["blocks"] == text
    assert "blocks" not in json.loads(raw_metadata(tmp_path / "wanted.safetensors")["weightops"])


def raw_metadata(path: Path) -> dict[str, str]:
    return weightops.inspect(path).metadata


def test_wans_kinds_of_attention_have_their_own_strengths_also_of_a_bias(tmp_path: Path) -> None:
    weights = wan()
    base = save(tmp_path / "base.safetensors", weights)
    modules = of_everything({k: t for k, t in weights.items() if t.dim() == 2}, lambda n: f"diffusion_model.{n}")
    maker = Maker(9)
    biased = "diffusion_model.blocks.1.attn2.to_q"
    bias = {".diff_b": maker(len(weights["blocks.1.attn2.to_q.bias"]))}
    lora = save(tmp_path / "lora.safetensors", named({**modules, biased: {**modules[biased], **bias}}))

    def number(name: str) -> float:
        return 0.5 if ".attn2." in name else 0.0 if "blocks.2.ffn" in name else 2.0

    parts = in_parts(modules, number, tmp_path)
    parts.append((save(tmp_path / "bias.safetensors", named({biased: bias})), -1.0))
    weightops.fuse(base, *parts, output=tmp_path / "wanted.safetensors")
    text = "*=2, cross_attn=0.5, block.2:mlp=0, bias=-1"
    weightops.fuse(base, lora, blocks=text, output=tmp_path / "found.safetensors")
    assert raw(tmp_path / "found.safetensors") == raw(tmp_path / "wanted.safetensors")


def test_an_unknown_model_has_blocks_by_its_numbers(tmp_path: Path) -> None:
    weights = {f"stack.{n}.mix.weight": Maker(n)(8, 6) for n in range(4)}
    base = save(tmp_path / "base.safetensors", weights)
    modules = of_everything(weights, kohya)
    lora = save(tmp_path / "lora.safetensors", named(modules))
    parts = in_parts(modules, lambda name: {"0": 1.0, "1": 0.5, "2": 0.5, "3": -2.0}[name.split("_")[3]], tmp_path)
    weightops.fuse(base, *parts, output=tmp_path / "wanted.safetensors")
    for n, text in enumerate(("stack.1-2=0.5, stack.3=-2", "1,.5,.5,-2", "*mix*:NOT stack.0=0.5; stack.3=-2")):
        weightops.fuse(base, lora, blocks=text, output=tmp_path / f"{n}.safetensors")
        assert raw(tmp_path / f"{n}.safetensors") == raw(tmp_path / "wanted.safetensors"), text


def test_a_rule_for_what_no_lora_changes_is_refused(tmp_path: Path) -> None:
    weights = flux()
    base = save(tmp_path / "base.safetensors", weights)
    modules = of_everything({k: t for k, t in weights.items() if "single" in k}, lambda n: f"transformer.{n}")
    lora = save(tmp_path / "lora.safetensors", named(modules))
    for text, what, hint in (
        ("single=1, double.1=0", "'double.1=0' (character 11) matches nothing that the LoRAs change",
         "they change single.0-2"),
        ("single.3=1", "'single.3=1' (character 1) matches nothing: no block, layer or tensor is called 'single.3'",
         "did you mean single.2? there are in, double.0-1, single.0-2, out"),
    ):  # fmt: skip
        with pytest.raises(UsageError) as e:
            weightops.fuse(base, lora, blocks=text, output=tmp_path / "out.safetensors")
        assert (str(e.value), e.value.hint) == (f"--blocks: {what}", hint)
    done = weightops_here("fuse", base, lora, "--blocks", "double=0", "-o", tmp_path / "out.safetensors")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(
        "error: --blocks: 'double=0' (character 1) matches nothing that the LoRAs change\nhint: "
    )
    assert not (tmp_path / "out.safetensors").exists()


def test_the_command_takes_them_and_keeps_the_text_encoders_own_strength(sd15: Path, pipe: Any, tmp_path: Path) -> None:
    unet = {k: t for k, t in tiny.canonical(pipe.unet).items() if "mid_block" in k and t.dim() == 2}
    modules = of_everything(unet, kohya)
    text = {k: t for k, t in tiny.canonical(pipe.text_encoder).items() if ".1.mlp." in k}
    encoders = of_everything(text, lambda n: f"lora_te_{n.replace('.', '_')}")
    lora = save(tmp_path / "lora.safetensors", named(modules | encoders))
    words = ["--blocks", "M00=0.5,text_encoder.1=0.25", "--text-encoder", "2", "-o", tmp_path / "found.safetensors"]
    done = weightops_here("fuse", sd15, f"{lora}:0.8", *words)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("sd15 + 0.8 × lora, blocks 'M00=0.5,text_encoder.1=0.25'\n")
    parts = [(save(tmp_path / "a.safetensors", named(modules)), 0.8 * 0.5)]
    parts.append((save(tmp_path / "b.safetensors", named(encoders)), 2 * 0.25))
    weightops.fuse(sd15, *parts, output=tmp_path / "wanted.safetensors")
    assert raw(tmp_path / "found.safetensors") == raw(tmp_path / "wanted.safetensors")
