"""The LoRA that is written is the factors that were given, in every dialect, for our reader, diffusers and fuse."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from weightops.errors import FormatError, OutputError, UsageError, ValueRefused
from weightops.files.checkpoint import open_checkpoint
from weightops.lineage import read_recipe
from weightops.lora.adapters import alphas, read_adapters
from weightops.lora.dialects import DIALECTS
from weightops.ops.inspect import inspect
from weightops.ops.replay import replay
from weightops.synthesis.layout import Layout, Module
from weightops.synthesis.lora_file import write_lora
from weightops.synthesis.members import read_factors

for _name in ("diffusers", "transformers", "peft"):
    pytest.importorskip(_name)
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning", "ignore:.*:UserWarning"
)

Factors = list[tuple[torch.Tensor, torch.Tensor]]
RECIPE = {"command": "synth sample", "inputs": [{"name": "pca.safetensors", "hash": "xxh3_128:" + "0" * 32}], "seed": 3}

# Of the tiny models: linear layers, a kernel of one place, one of nine, and text encoders.
_BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
_FLUX = "transformer_blocks.0.attn"
LAYOUTS = {
    "sd15": (
        Module("unet", f"{_BLOCK}.attn1.to_q", (32, 32), 3),
        Module("unet", f"{_BLOCK}.attn2.to_k", (32, 64), 2),
        Module("unet", "down_blocks.0.attentions.0.proj_in", (32, 32, 1, 1), 3),
        Module("unet", "down_blocks.0.resnets.0.conv1", (32, 32, 3, 3), 4),
        Module("text_encoder", "text_model.encoder.layers.1.self_attn.v_proj", (64, 64), 3),
        # diffusers knows what dialect a text encoder is in by this one alone.
        Module("text_encoder", "text_model.encoder.layers.1.self_attn.out_proj", (64, 64), 3),
    ),
    "sdxl": (
        Module("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k", (64, 64), 3),
        Module("unet", "down_blocks.1.downsamplers.0.conv", (64, 64, 3, 3), 2),
        Module("text_encoder", "text_model.encoder.layers.0.self_attn.k_proj", (64, 64), 3),
        Module("text_encoder_2", "text_model.encoder.layers.1.self_attn.v_proj", (128, 128), 2),
    ),
    "flux": (
        # A pack with one that does not change, and one that changes as a whole.
        Module("transformer", f"{_FLUX}.to_q", (128, 128), 3),
        Module("transformer", f"{_FLUX}.to_v", (128, 128), 2),
        Module("transformer", f"{_FLUX}.add_q_proj", (128, 128), 3),
        Module("transformer", f"{_FLUX}.add_k_proj", (128, 128), 3),
        Module("transformer", f"{_FLUX}.add_v_proj", (128, 128), 3),
        Module("transformer", f"{_FLUX}.to_out.0", (128, 128), 3),
    ),
}


def layout(architecture: str) -> Layout:
    return Layout(architecture, LAYOUTS[architecture])


def factors_of(architecture: str, seed: int = 0) -> Factors:
    made = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(m.out, m.rank, generator=made), torch.randn(m.rank, m.n, generator=made) / 8)
        for m in LAYOUTS[architecture]
    ]


def named(folder: Path, dialect: str) -> Path:
    return folder / (dialect if DIALECTS[dialect].folder else f"{dialect}.safetensors")


def write(path: Path, architecture: str = "sd15", **words: Any) -> Any:
    factors = words.pop("factors", None) or factors_of(architecture)
    return write_lora(path, layout(architecture), factors, **{"recipe": RECIPE, **words})


def apart(found: Factors, wanted: Factors) -> float:
    """The largest relative difference of a module's ΔW."""
    pairs = [(a[0].double() @ a[1].double(), b[0].double() @ b[1].double()) for a, b in zip(found, wanted, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def metadata(path: Path) -> dict[str, str]:
    with open_checkpoint(path) as opened:
        return dict(opened.metadata)


# ------------------------------------------------------------------------------------------------ the same change


@pytest.mark.parametrize("architecture", LAYOUTS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_holds_the_factors_that_were_given(dialect: str, architecture: str, tmp_path: Path) -> None:
    factors, path = factors_of(architecture), named(tmp_path, dialect)
    written = write(path, architecture, dialect=dialect)
    packs = architecture == "flux" and dialect in ("kohya", "comfy")  # whose ranks are those of what they pack
    with open_checkpoint(path) as opened:
        found = read_adapters(opened, architecture=architecture)
        found.check()
        assert found.architecture == architecture
        if not packs:
            read, _ = read_factors(path, layout(architecture))
            assert apart(read, factors) < 1e-6
    assert written.bytes_written == sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
    assert written.error == 0
    with_pad, _ = read_factors(path, widened(path, architecture), pad=True)
    assert apart([pair for pair in with_pad if float(pair[0].norm())], factors) < 1e-6


def widened(path: Path, architecture: str) -> Layout:
    """The layout that a file has, whose packs may name modules that do not change."""
    from weightops.synthesis.members import layout_of, read_member

    found = layout_of([read_member(path, architecture=architecture)])
    order = {m.key: n for n, m in enumerate(LAYOUTS[architecture])}
    return Layout(architecture, tuple(sorted(found.modules, key=lambda m: order.get(m.key, len(order)))))


@functools.cache
def pipeline(architecture: str) -> Any:
    import tempfile

    from weightops.diffusion.models import load
    from weightops.diffusion.tiny import tiny_model

    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        return load(tiny_model(architecture, Path(folder) / "model"), where="test", device="cpu").pipe


@pytest.mark.parametrize(
    ("architecture", "dialect"),
    [("sd15", "kohya"), ("sd15", "diffusers"), ("sd15", "onetrainer"), ("flux", "diffusers"), ("flux", "onetrainer")],
)
def test_diffusers_loads_it_and_changes_the_same_weights_by_as_much(
    architecture: str, dialect: str, tmp_path: Path
) -> None:
    from weightops.diffusion.extras import hushed

    pipe, path = pipeline(architecture), named(tmp_path, dialect)
    write(path, architecture, dialect=dialect)
    before = {m.key: weight(pipe, m).clone() for m in LAYOUTS[architecture]}
    with hushed():
        pipe.load_lora_weights(tmp_path, weight_name=path.name, local_files_only=True)
        pipe.fuse_lora(components=list(layout(architecture).components))
    try:
        for module, (up, down) in zip(LAYOUTS[architecture], factors_of(architecture), strict=True):
            change = weight(pipe, module) - before[module.key]
            assert float((change.flatten(1) - up @ down).norm() / (up @ down).norm()) < 1e-5, module.key
    finally:
        pipe.unfuse_lora(components=list(layout(architecture).components))
        pipe.unload_lora_weights()


def weight(pipe: Any, module: Module) -> torch.Tensor:
    network = getattr(pipe, module.component)
    for name in (module.name, module.name.removeprefix("text_model.")):
        for ending in (".weight", ".base_layer.weight"):
            if f"{name}{ending}" in dict(network.named_parameters()):
                return network.get_parameter(f"{name}{ending}").detach()  # type: ignore[no-any-return]
    raise AssertionError(module.key)


# ------------------------------------------------------------------------------------------------ rank and dtype


def test_a_rank_cuts_to_the_best_that_this_rank_can_be(tmp_path: Path) -> None:
    written = write(tmp_path / "a.safetensors", rank=2)
    assert written.ranks == {2: 6}
    cut = Layout("sd15", tuple(Module(m.component, m.name, m.shape, 2) for m in LAYOUTS["sd15"]))
    found, _ = read_factors(tmp_path / "a.safetensors", cut)
    lost = whole = 0.0
    for (up, down), (first, second) in zip(found, factors_of("sd15"), strict=True):
        change = first.double() @ second.double()
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        best = (u[:, :2] * s[:2]) @ v[:2]
        assert float((up @ down - best).norm() / change.norm()) < 1e-6
        lost, whole = lost + float((s[2:] ** 2).sum()), whole + float((s**2).sum())
    assert written.error == pytest.approx((lost / whole) ** 0.5, rel=1e-6)
    assert written.error > 0.1


def test_a_rank_above_what_is_there_changes_nothing(tmp_path: Path) -> None:
    written = write(tmp_path / "a.safetensors", rank=16)
    write(tmp_path / "b.safetensors")
    assert written.ranks == {2: 1, 3: 4, 4: 1}
    assert written.error == 0
    assert read_factors(tmp_path / "a.safetensors", layout("sd15"))[1] == read_factors(
        tmp_path / "b.safetensors", layout("sd15")
    )[1]  # fmt: skip


def test_a_module_that_does_not_change_stays_in_the_file(tmp_path: Path) -> None:
    factors = factors_of("sd15")
    factors[1] = (factors[1][0] * 0, factors[1][1])
    assert write(tmp_path / "a.safetensors", factors=factors, rank=1).ranks == {1: 6}
    found = inspect(tmp_path / "a.safetensors").to_dict()
    assert found["lora"]["ranks"] == {"1": 6}
    assert found["lora"]["alphas"] == {"1": 6}


def test_alpha_is_the_rank_and_of_several_ranks_in_a_unet_one_for_all(tmp_path: Path) -> None:
    """diffusers does not find the alphas of attention layers that differ from the others' in kohya's names."""
    for name, words in (("one", {"rank": 2}), ("several", {}), ("flux", {"architecture": "flux", "dialect": "peft"})):
        write(path := tmp_path / (name if name == "flux" else f"{name}.safetensors"), **words)
        with open_checkpoint(path) as opened:
            found = read_adapters(opened)
            said = [(alphas(opened, found)[a.name], a.rank) for a in found.adapters]
        assert {alpha for alpha, _ in said} == ({3} if name == "several" else {rank for _, rank in said}), name


@pytest.mark.parametrize(("dtype", "near"), [("fp16", 2e-3), ("bf16", 1e-2)])
def test_half_precision_is_written_as_half_precision(dtype: str, near: float, tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", dtype=dtype)
    found, _ = read_factors(tmp_path / "a.safetensors", layout("sd15"))
    assert 1e-6 < apart(found, factors_of("sd15")) < near
    with open_checkpoint(tmp_path / "a.safetensors") as opened:
        kinds = {info.spec.dtype for key, info in opened.tensors.items() if not key.endswith("alpha")}
    assert kinds == {"F16" if dtype == "fp16" else "BF16"}


# ------------------------------------------------------------------------------------------------ what it says


def test_the_same_factors_write_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        write(folder / "a.safetensors", rank=2)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "elsewhere/a.safetensors").read_bytes()


def test_the_metadata_says_what_it_is_for_and_how_it_was_made(tmp_path: Path) -> None:
    write(tmp_path / "new.safetensors", "sd15", rank=2)
    found = metadata(tmp_path / "new.safetensors")
    assert found.items() >= {
        "ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "2",
        "ss_base_model_version": "sd_v1", "ss_output_name": "new", "modelspec.title": "new",
        "ss_network_args": json.dumps({"conv_dim": "2", "conv_alpha": "2"}),
        "modelspec.architecture": "stable-diffusion-v1/lora",
    }.items()  # fmt: skip
    assert read_recipe(found["weightops"], "").items() >= RECIPE.items()
    assert str(tmp_path) not in json.dumps(found)
    write(tmp_path / "flux.safetensors", "flux")
    found = metadata(tmp_path / "flux.safetensors")
    assert (found["ss_network_module"], found["ss_base_model_version"]) == ("networks.lora_flux", "flux1")
    assert "modelspec.architecture" not in found  # dev's and schnell's LoRAs look alike


def test_replay_says_in_a_sentence_that_it_makes_no_such_file_again(tmp_path: Path) -> None:
    write(tmp_path / "new.safetensors")
    with pytest.raises(FormatError, match="was made by 'synth sample', of which there is no replay"):
        replay(tmp_path / "new.safetensors")


# ------------------------------------------------------------------------------------------------ refused


def test_an_existing_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        write(path)
    assert path.read_bytes() == b"mine"
    write(path, force=True)
    assert apart(read_factors(path, layout("sd15"))[0], factors_of("sd15")) < 1e-6


def test_a_dry_run_says_the_size_and_writes_nothing(tmp_path: Path) -> None:
    would = write(tmp_path / "a.safetensors", dry_run=True)
    assert not list(tmp_path.iterdir())
    assert would.bytes_written == write(tmp_path / "a.safetensors").bytes_written


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "fp32"), (float("inf"), "fp32"), (1e6, "fp16")])
def test_numbers_that_no_weight_should_be_are_refused(value: float, dtype: str, tmp_path: Path) -> None:
    factors = factors_of("sd15")
    factors[3][0][0, 0] = value
    with pytest.raises(ValueRefused, match=r"down_blocks.0.resnets.0.conv1|input_blocks|resnets_0_conv1"):
        write(tmp_path / "a.safetensors", factors=factors, dtype=dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"dialect": "koyha"}, "--dialect: found 'koyha', expected kohya, onetrainer, comfy, diffusers, peft"),
        ({"rank": 0}, "--rank: found 0, expected 1 or more"),
        ({"dtype": "fp8"}, "--dtype: found 'fp8', expected fp32, fp16, bf16"),
    ],
)
def test_unknown_words_are_refused(words: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        write(tmp_path / "a.safetensors", **words)
    assert str(refused.value) == said


def test_a_dialect_without_names_for_a_pack_says_so(tmp_path: Path) -> None:
    """The fourth of the modules that Flux' single blocks pack is of another size, which a tiny model does not tell."""
    module = Module("transformer", "single_transformer_blocks.0.attn.to_q", (128, 128), 2)
    alone, factors = Layout("flux", (module,)), [(torch.ones(128, 2), torch.ones(2, 128))]
    with pytest.raises(UsageError, match=r"--dialect: kohya cannot hold this LoRA: .*their sizes are not known"):
        write_lora(tmp_path / "a.safetensors", alone, factors, dialect="kohya", recipe=RECIPE)
    write_lora(tmp_path / "a.safetensors", alone, factors, dialect="diffusers", recipe=RECIPE)
    assert apart(read_factors(tmp_path / "a.safetensors", alone)[0], factors) < 1e-6
