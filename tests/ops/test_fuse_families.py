"""fuse, through files: every form of every family, as its library wrote it, into checkpoints of every dtype.

The adapters and what their libraries make of W are those of tests/lora/test_arithmetic, in files of their own dialects.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import save
from loras import convert, metadata_of
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import load_file

from weightops.engine import chunks
from weightops.errors import MemoryRefused, MismatchError, UsageError
from weightops.lora import family as families
from weightops.lora.family import FAMILIES, change
from weightops.ops import changes
from weightops.ops.fuse import fuse

sys.path.insert(0, str(Path(__file__).parents[1] / "lora"))
sys.path.insert(0, str(Path(__file__).parents[1] / "naming"))

from tagged import from_canonical, needs_lists, shapes_of, to_canonical
from test_arithmetic import CASES, SOURCES, TOLERANCE, Case, close, every_case, every_source, kohya_oft, lycoris
from test_fuse import FLUX, tiny, weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

NUMBERS = {case: number for number, case in enumerate(CASES)}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def module_of(case: Case) -> str:
    """The module that the case changes, in a checkpoint of no known architecture."""
    return f"blocks.{NUMBERS[case]}.layer"


def stored_name(case: Case) -> str:
    """The module's name in the files of the library that wrote the adapter."""
    flat = module_of(case).replace(".", "_")
    if case.made().config is not None:
        return f"base_model.model.{module_of(case)}"
    if case.family == "set":
        return f"diffusion_model.{module_of(case)}"
    return f"oft_unet_{flat}" if "kohya" in case.name else f"lora_unet_{flat}"


def write(folder: Path, cases: Sequence[Case], dtype: torch.dtype) -> tuple[Path, list[Path]]:
    """A checkpoint with a module for each case, and the adapters: PEFT's folders, and files of the others."""
    base: dict[str, Tensor] = {}
    files: dict[Path, dict[str, Tensor]] = {}
    for case in cases:
        made = case.made(dtype)
        base[f"{module_of(case)}.weight"] = made.weight.to(dtype)
        assert made.bias is not None
        base[f"{module_of(case)}.bias"] = made.bias.to(dtype)
        path = folder / f"{stored_name(case).partition('_')[0]}.safetensors"
        if made.config is not None:
            path = folder / str(NUMBERS[case]) / "adapter_model.safetensors"
            made.config.save_pretrained(path.parent)
        tensors = {f"{stored_name(case)}.{key}": tensor for key, tensor in made.stored.items()}
        files.setdefault(path, {}).update(tensors)
    for path, tensors in files.items():
        save(path, tensors)
    loras = [path.parent if path.name == "adapter_model.safetensors" else path for path in files]
    return save(folder / "base.safetensors", base), loras


def fused(base: Path, loras: Sequence[Path], strength: float, output: str, **options: Any) -> dict[str, Tensor]:
    fuse(base, *((lora, strength) for lora in loras), output=output, threads=1, device="cpu", force=True, **options)
    return load_file(output)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[torch.dtype, float], dict[str, Tensor]]:
    """All cases at once, for each dtype and strength."""
    found = {}
    for dtype in SOURCES.values():
        folder = tmp_path_factory.mktemp("families")
        base, loras = write(folder, CASES, dtype)
        for strength in (1.0, 0.5):
            found[dtype, strength] = fused(base, loras, strength, str(folder / f"{strength}.safetensors"))
    return found


def rounded(found: Tensor, wanted: Tensor, precision: torch.dtype) -> None:
    """Is this what was wanted, rounded once to its dtype, and off no more than the reference may be itself?"""
    assert found.shape == wanted.shape
    wanted = wanted.double()
    ulp = torch.finfo(found.dtype).eps / 2 * wanted.abs() + torch.finfo(found.dtype).smallest_normal
    arithmetic = max(TOLERANCE[precision], 1e-12 if found.dtype is torch.float32 else 1e-6) * wanted.abs().max()
    assert ((found.double() - wanted).abs() <= ulp * 1.001 + arithmetic).all()


@every_case
def test_a_fused_file_holds_what_the_library_makes_of_the_weight(
    case: Case, results: Mapping[tuple[torch.dtype, float], dict[str, Tensor]]
) -> None:
    """In float32, float16 and bfloat16; at half the strength, half the way from W to that: W + λ(W' − W)."""
    for (source, strength), found in results.items():
        made = case.made(source)
        assert made.references
        assert made.bias is not None
        for wanted, wanted_bias in made.references.values():
            wanted = made.weight + strength * (wanted - made.weight)
            rounded(found[f"{module_of(case)}.weight"], wanted, made.precision)
            moved = made.bias if wanted_bias is None else made.bias + strength * (wanted_bias - made.bias)
            rounded(found[f"{module_of(case)}.bias"], moved, made.precision)


@every_source
def test_bands_of_a_few_rows_give_the_same_in_any_memory(
    source: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    results: Mapping[tuple[torch.dtype, float], dict[str, Tensor]],
) -> None:  # fmt: skip
    """Real weights are cut into blocks, and these into bands; here they are so small that these are, too."""
    base, loras = write(tmp_path, CASES, source)
    calls = []
    monkeypatch.setattr(families, "change", lambda *given: calls.append(given[-1]) or change(*given))
    monkeypatch.setattr(chunks, "BLOCK_VALUES", 1000)
    monkeypatch.setattr(chunks, "CHUNK_MIN", 1)
    monkeypatch.setattr(changes, "BAND_VALUES", 300)
    with pytest.raises(MemoryRefused) as caught:
        fused(base, loras, 0.5, "no.safetensors", memory=1)
    least = int(re.findall(r"takes ([\d,]+)", str(caught.value))[0].replace(",", ""))
    found = fused(base, loras, 0.5, "small.safetensors", memory=least)
    fused(base, loras, 0.5, "large.safetensors", memory=1 << 30)
    assert Path("small.safetensors").read_bytes() == Path("large.safetensors").read_bytes()
    size = torch.finfo(source).eps
    for key, whole in results[source, 0.5].items():
        close(found[key], whole, size, whole)
    assert sum(rows is not None and rows.start > 0 for rows in calls) > len(CASES)


def test_what_is_added_is_taken_out_again(tmp_path: Path) -> None:
    """Every additive family, through files in float32: at s and then at −s."""
    additive = [c for c in CASES if FAMILIES.get(c.family).delta is not None and "dora_scale" not in c.made().parts]
    base, loras = write(tmp_path, additive, torch.float32)
    there = fused(base, loras, 0.7, "there.safetensors")
    back = fused(Path("there.safetensors"), loras, -0.7, "back.safetensors")
    before = load_file(base)
    for case in additive:
        for leaf in ("weight", "bias"):
            key = f"{module_of(case)}.{leaf}"
            close(back[key], before[key], 1e-6, there[key])
        assert not all(torch.equal(there[f"{module_of(case)}.{n}"], before[f"{module_of(case)}.{n}"]) for n in (
            "weight", "bias"
        ))  # fmt: skip


# ------------------------------------------------------------------------------------------------ packed weights

# Of Flux as Black Forest Labs spells it: three and four modules in one, and halves that other spellings swap.
PACKED = {
    "double_blocks.0.img_attn.qkv": (96, 96, 96),
    "single_blocks.0.linear1": (96, 96, 96, 384),
    "final_layer.adaLN_modulation.1": (192,),
}
WHOLE: dict[str, Any] = {
    "LoCon": functools.partial(lycoris, LoConModule, lora_dim=4),
    "DoRA of outputs": functools.partial(lycoris, LoConModule, lora_dim=4, weight_decompose=True),
    "DoRA of inputs": functools.partial(lycoris, LoConModule, lora_dim=4, weight_decompose=True, wd_on_out=False),
    "LoHa": functools.partial(lycoris, LohaModule, lora_dim=4),
    "LoKr": functools.partial(lycoris, LokrModule, lora_dim=2, alpha=1.0),
    "LoKr of whole factors": functools.partial(lycoris, LokrModule, full_matrix=True, factor=16),
    "GLoRA": functools.partial(lycoris, GLoRAModule, lora_dim=4, alpha=2.0),
    "IA3 of outputs": functools.partial(lycoris, IA3Module),
    "IA3 of inputs": functools.partial(lycoris, IA3Module, train_on_input=True),
    "Diag-OFT": functools.partial(lycoris, DiagOFTModule, lora_dim=4, constraint=2**-8, rescaled=True),
    "BOFT": functools.partial(lycoris, ButterflyOFTModule, lora_dim=64),
    "diff": functools.partial(lycoris, FullModule),
}


def packed(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], torch.dtype]:
    """A tiny Flux as its makers spell it, an adapter of its packed modules, and what the library makes of these."""
    base, lora, wanted = weights(tiny(FLUX), torch.float32), {}, {}
    precision = torch.float64
    for module, heights in PACKED.items():
        if name == "kohya's OFT":
            made = kohya_oft("linear", torch.float32, alpha=2**-8, heights=heights, features=96)
        else:
            made = WHOLE[name]("linear", torch.float32, out=sum(heights), features=96)
        assert made.bias is not None
        base |= {f"{module}.weight": made.weight.float(), f"{module}.bias": made.bias.float()}
        prefix = "oft_unet_" if "kohya" in name else "lora_unet_"
        lora |= {f"{prefix}{module.replace('.', '_')}.{key}": tensor for key, tensor in made.stored.items()}
        changed, bias = next(iter(made.references.values()))
        wanted |= {f"{module}.weight": changed, f"{module}.bias": made.bias if bias is None else bias}
        precision = made.precision
    return base, lora, wanted, precision


def respelled(spelling: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    canonical = to_canonical("flux_transformer", "original", dict(tensors))
    return {k: t.contiguous() for k, t in from_canonical("flux_transformer", spelling, canonical).items()}


def in_original(spelling: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return from_canonical("flux_transformer", "original", to_canonical("flux_transformer", spelling, dict(tensors)))


@needs_lists
@pytest.mark.parametrize("name", [*WHOLE, "kohya's OFT"])
@pytest.mark.parametrize("spelling", ["original", "diffusers"])
def test_an_adapter_of_a_packed_weight_is_exact_whether_or_not_the_checkpoint_packs_it(
    spelling: str, name: str
) -> None:
    """Even where its tensors cannot be cut, as LoKr's whose rows do not meet the seams, and where rows mix (OFT)."""
    base, lora, wanted, precision = packed(name)
    save(Path("lora.safetensors"), lora)
    save(Path("base.safetensors"), respelled(spelling, base))
    report = fuse("base.safetensors", "lora.safetensors:0.5", output="out.safetensors", strict=True)
    assert report.account.unused == []
    found = in_original(spelling, load_file("out.safetensors"))
    for key, tensor in base.items():
        goal = tensor if key not in wanted else tensor + 0.5 * (wanted[key] - tensor)
        rounded(found[key], goal.double(), precision)


@needs_lists
@pytest.mark.parametrize("name", ["Diag-OFT", "IA3 of outputs", "IA3 of inputs", "GLoRA", "DoRA of inputs"])
@pytest.mark.parametrize("spelling", ["original", "diffusers"])
def test_halves_trade_places_in_the_last_block_of_sd3_and_in_no_other(spelling: str, name: str) -> None:
    """Of families whose own tensors do not tell which block it is, the checkpoint's do."""
    shapes = {k: tuple(n // 32 if n > 16 else n for n in s) for k, s in shapes_of("orig_sd3_medium").items()}
    base, lora, wanted, precision = weights(shapes, torch.float32), {}, {}, torch.float64
    for block in (0, 23):
        module = f"joint_blocks.{block}.context_block.adaLN_modulation.1"
        out, features = shapes[f"{module}.weight"]
        made = WHOLE[name]("linear", torch.float32, out=out, features=features)
        assert made.bias is not None
        base |= {f"{module}.weight": made.weight.float(), f"{module}.bias": made.bias.float()}
        lora |= {f"lora_unet_{module.replace('.', '_')}.{key}": tensor for key, tensor in made.stored.items()}
        wanted[f"{module}.weight"] = next(iter(made.references.values()))[0]
        precision = made.precision
    save(Path("lora.safetensors"), lora)
    own = from_canonical("sd3_transformer", spelling, to_canonical("sd3_transformer", "original", base))
    save(Path("base.safetensors"), {key: tensor.contiguous() for key, tensor in own.items()})
    fuse("base.safetensors", "lora.safetensors", output="out.safetensors", strict=True)
    back = to_canonical("sd3_transformer", spelling, load_file("out.safetensors"))
    found = from_canonical("sd3_transformer", "original", back)
    for key, tensor in base.items():
        rounded(found[key], wanted.get(key, tensor).double(), precision)


@needs_lists
def test_a_packed_adapter_and_one_of_a_part_each_change_the_original_weight() -> None:
    base, lora, wanted, precision = packed("Diag-OFT")
    save(Path("oft.safetensors"), lora)
    up, down = torch.randn(96, 2), torch.randn(2, 96)
    query = "transformer.transformer_blocks.0.attn.to_q"
    save(Path("q.safetensors"), {f"{query}.lora_B.weight": up, f"{query}.lora_A.weight": down})
    save(Path("base.safetensors"), base)
    key = "double_blocks.0.img_attn.qkv.weight"
    goal = wanted[key].double()
    goal[:96] += 0.5 * (up.double() @ down.double())
    for loras in (("oft.safetensors", "q.safetensors:0.5"), ("q.safetensors:0.5", "oft.safetensors")):
        fuse("base.safetensors", *loras, output="out.safetensors", force=True)
        rounded(load_file("out.safetensors")[key], goal, precision)


@needs_lists
@pytest.mark.parametrize("name", ["Diag-OFT", "LoKr", "DoRA of inputs"])
def test_what_cannot_be_cut_is_refused_by_name_where_the_rest_of_the_weight_is_not_there(name: str) -> None:
    base, lora, _, _ = packed(name)
    save(Path("lora.safetensors"), {key: t for key, t in lora.items() if "img_attn_qkv" in key})
    own = respelled("diffusers", base)
    del own["transformer_blocks.0.attn.to_k.weight"]
    save(Path("base.safetensors"), own)
    says = {
        "Diag-OFT": "is a oft, which cannot be taken apart by rows",
        "LoKr": "lokr_w1 has 16 rows for 288, which cannot be cut at ((0, 96),)",
        "DoRA of inputs": "has a magnitude for each input, [1, 96]: its norms run over all the rows of the packed "
        "weight, and cannot be taken apart",
    }[name]
    module = "'lora_unet_double_blocks_0_img_attn_qkv'"
    for refused in (
        lambda: fuse("base.safetensors", "lora.safetensors", output="out.safetensors"),
        lambda: convert(Path("lora.safetensors"), "diffusers", Path("out.safetensors"), architecture="flux"),
    ):
        with pytest.raises(MismatchError) as caught:
            refused()
        assert str(caught.value).startswith(f"lora.safetensors: {module}")
        assert str(caught.value).endswith(says)
        assert caught.value.hint == "fuse can still add it to a checkpoint that holds all of these weights"
    assert not Path("out.safetensors").exists()


@needs_lists
def test_kohyas_oft_of_sdxl_is_found_by_its_own_beginning() -> None:
    """networks/oft.py writes "oft_unet_", and means alpha times the outputs by its constraint."""
    shapes = {k: s for k, s in shapes_of("sdmecha_sdxl-sgm").items() if k.startswith("model.diffusion_model.")}
    shapes = {k: tuple(n if n <= 9 else n // 32 for n in s) for k, s in shapes.items()}
    base = weights(shapes, torch.float32)
    modules = ("input_blocks.4.1.transformer_blocks.0.attn1.to_q", "middle_block.1.transformer_blocks.9.attn2.to_out.0")
    lora = {}
    for module in modules:
        made = kohya_oft(
            "linear", torch.float32, alpha=2**-6, features=shapes[f"model.diffusion_model.{module}.weight"][1],
            out=shapes[f"model.diffusion_model.{module}.weight"][0],
        )  # fmt: skip
        base[f"model.diffusion_model.{module}.weight"] = made.weight.float()
        lora |= {f"oft_unet_{module.replace('.', '_')}.{key}": tensor for key, tensor in made.stored.items()}
        wanted = made.references["restated"][0], made.half
        base |= {f"{module} {n}": t for n, t in enumerate(wanted) if t is not None}
    goals = {key: base.pop(key) for key in list(base) if " " in key}
    save(Path("base.safetensors"), base)
    save(Path("lora.safetensors"), lora)
    for number, strength in enumerate((1.0, 0.5)):
        fuse("base.safetensors", ("lora.safetensors", strength), output="out.safetensors", strict=True, force=True)
        found = load_file("out.safetensors")
        for key, tensor in base.items():
            module = key.removeprefix("model.diffusion_model.").removesuffix(".weight")
            rounded(found[key], goals.get(f"{module} {number}", tensor), torch.float64)


# ------------------------------------------------------------------------------------------------ wider weights


def control(*, says: bool) -> dict[str, Tensor]:
    """A control LoRA as BFL writes them: factors and biases of all matrices, norms as they are to be.

    says: as ComfyUI has them, with the new shape beside.
    """
    generator = torch.Generator().manual_seed(11)
    found = {}
    for key, shape in tiny(FLUX).items():
        module = key.removesuffix(".weight")
        if key.endswith("norm.scale"):
            found[key] = torch.rand(shape, generator=generator)
        elif key.endswith(".weight") and len(shape) == 2:
            features = shape[1] * (2 if module == "img_in" else 1)
            found[f"{module}.lora_A.weight"] = torch.randn(2, features, generator=generator)
            found[f"{module}.lora_B.weight"] = torch.randn(shape[0], 2, generator=generator)
            found[f"{module}.lora_B.bias"] = torch.randn(shape[0], generator=generator)
    if says:
        found = {f"diffusion_model.{key}": tensor for key, tensor in found.items()}
        rows, features = tiny(FLUX)["img_in.weight"]
        found["diffusion_model.img_in.reshape_weight"] = torch.tensor([rows, 2 * features])
    return found


@needs_lists
@pytest.mark.parametrize("says", [False, True], ids=["as BFL writes it", "as ComfyUI has it"])
@pytest.mark.parametrize("spelling", ["original", "diffusers"])
def test_a_control_lora_widens_the_input_sets_the_norms_and_moves_the_biases(spelling: str, says: bool) -> None:
    base, lora = weights(tiny(FLUX), torch.float32), control(says=says)
    save(Path("lora.safetensors"), lora)
    save(Path("base.safetensors"), respelled(spelling, base))
    report = fuse("base.safetensors", "lora.safetensors:0.5", output="out.safetensors")
    assert "has 4 inputs now, and had 2" in "".join(report.warnings)
    found = in_original(spelling, load_file("out.safetensors"))
    own = {key.removeprefix("diffusion_model."): tensor.double() for key, tensor in lora.items()}
    for key, tensor in base.items():
        module, leaf = key.rpartition(".")[::2]
        goal = tensor.double()
        if key in own:
            goal = goal + 0.5 * (own[key] - goal)
        elif f"{module}.lora_A.weight" in own and leaf == "weight":
            delta = own[f"{module}.lora_B.weight"] @ own[f"{module}.lora_A.weight"]
            goal = torch.nn.functional.pad(goal, (0, delta.shape[1] - goal.shape[1])) + 0.5 * delta
        elif f"{module}.lora_A.weight" in own:
            goal = goal + 0.5 * own[f"{module}.lora_B.bias"]
        rounded(found[key], goal, torch.float64)


def test_a_weight_is_widened_as_diffusers_widens_it() -> None:
    """Its control LoRAs for Flux: zeros for the new inputs, and then the LoRA."""
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders import FluxLoraLoaderMixin

    torch.manual_seed(5)
    made = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    save(Path("base.safetensors"), made.state_dict())
    lora = {
        "transformer.x_embedder.lora_A.weight": torch.randn(2, 8),
        "transformer.x_embedder.lora_B.weight": torch.randn(16, 2),
    }
    save(Path("lora.safetensors"), lora)
    fuse("base.safetensors", "lora.safetensors", output="out.safetensors")
    FluxLoraLoaderMixin._maybe_expand_transformer_param_shape_or_error_(made, dict(lora), {}, "transformer")
    made.load_lora_adapter(lora, prefix="transformer")
    made.fuse_lora()
    wanted = made.x_embedder.base_layer.weight.detach()
    close(load_file("out.safetensors")["x_embedder.weight"], wanted, 1e-6)


@needs_lists
def test_no_other_weight_is_widened_unless_the_adapter_says_so() -> None:
    base = weights(tiny(FLUX), torch.float32)
    save(Path("base.safetensors"), base)
    lora = {
        "lora_unet_txt_in.lora_down.weight": torch.randn(2, 129),
        "lora_unet_txt_in.lora_up.weight": torch.randn(96, 2),
    }
    save(Path("lora.safetensors"), lora)
    with pytest.raises(MismatchError, match=r"does not fit txt_in\.weight \[96, 128\]"):
        fuse("base.safetensors", "lora.safetensors", output="out.safetensors")


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"set_weight": (7, 5)}, "'m' {'set_weight': [7, 5]} does not fit m.weight [6, 5]"),
        ({"set_weight": (6, 4)}, "'m' {'set_weight': [6, 4]} does not fit m.weight [6, 5]"),
        ({"set_weight": (1, 5)}, "'m' {'set_weight': [1, 5]} does not fit m.weight [6, 5]"),
        ({"set_bias": (1,)}, "'m' {'set_bias': [1]} does not fit m.bias [6]"),
        ({"diff_b": (1,)}, "'m' {'diff_b': [1]} does not fit m.bias [6]"),
        ({"diff_b": (6, 1)}, "'m' {'diff_b': [6, 1]} does not fit m.bias [6]"),
    ],
    ids=str,
)
def test_what_is_set_or_added_has_the_shape_of_what_is_there(parts: dict[str, tuple[int, ...]], says: str) -> None:
    """It is never broadcast, and refused before anything is written."""
    save(Path("base.safetensors"), {"m.weight": torch.ones(6, 5), "m.bias": torch.ones(6)})
    save(Path("lora.safetensors"), {f"m.{part}": torch.ones(shape) for part, shape in parts.items()})
    with pytest.raises(MismatchError) as caught:
        fuse("base.safetensors", "lora.safetensors", output="out.safetensors")
    assert str(caught.value) == f"lora.safetensors: {says}"
    assert not Path("out.safetensors").exists()


# ------------------------------------------------------------------------------------------------ what is told beside


def recipe_of(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(metadata_of(Path(path))["weightops"])
    return found


def test_alpha_is_divided_by_the_rank_that_is_named_where_both_factors_of_a_lokr_are_whole() -> None:
    """Else they are as strong as they stand: LyCORIS, ComfyUI, diffusers."""
    w, w1, w2 = torch.randn(8, 12), torch.randn(2, 3), torch.randn(4, 4)
    save(Path("base.safetensors"), {"m.weight": w, "n.weight": w.clone()})
    parts = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(3.0)}
    half = {
        "lokr_w1": w1.clone(),
        "lokr_w2_a": torch.randn(4, 1),
        "lokr_w2_b": torch.randn(1, 4),
        "alpha": torch.tensor(3.0),
    }
    lora = {f"lora_unet_m.{k}": t for k, t in parts.items()} | {f"lora_unet_n.{k}": t for k, t in half.items()}
    save(Path("lora.safetensors"), lora)
    delta = torch.kron(w1.double(), w2.double())
    for rank, scale in ((None, 1.0), (8, 3 / 8), (3, 1.0)):
        fuse("base.safetensors", "lora.safetensors:0.5", output="out.safetensors", lokr_rank=rank, force=True)
        found = load_file("out.safetensors")
        rounded(found["m.weight"], w.double() + 0.5 * scale * delta, torch.float64)
        product = half["lokr_w2_a"].double() @ half["lokr_w2_b"].double()
        rounded(found["n.weight"], w.double() + 0.5 * 3.0 * torch.kron(w1.double(), product), torch.float64)
        assert recipe_of("out.safetensors").get("lokr_rank", None) == rank
        assert ("lokr_rank" in recipe_of("out.safetensors")) == (rank is not None)


def test_a_rank_for_lokr_is_a_number_that_something_is_divided_by() -> None:
    save(Path("base.safetensors"), {"m.weight": torch.ones(8, 12)})
    whole = {"lora_unet_m.lokr_w1": torch.ones(2, 3), "lora_unet_m.lokr_w2": torch.ones(4, 4)}
    save(Path("bare.safetensors"), whole)
    save(Path("lora.safetensors"), {"m.lora_A.weight": torch.ones(2, 12), "m.lora_B.weight": torch.ones(8, 2)})
    for rank in (0, -4):
        with pytest.raises(UsageError) as caught:
            fuse("base.safetensors", "bare.safetensors", output="out.safetensors", lokr_rank=rank)
        assert str(caught.value) == f"--lokr-rank: found {rank}, expected a whole number, 1 or more"
    for lora in ("bare.safetensors", "lora.safetensors"):
        with pytest.raises(UsageError) as caught:
            fuse("base.safetensors", lora, output="out.safetensors", lokr_rank=8)
        says = f"--lokr-rank: {lora} has no LoKr of two whole factors and an alpha, which alone it is for"
        assert str(caught.value) == says
    assert not Path("out.safetensors").exists()


def test_bundled_embeddings_are_named_and_no_weight_is_changed_by_them() -> None:
    """As OneTrainer and LyCORIS put textual inversions beside the factors; nothing is lost without a word."""
    save(Path("base.safetensors"), {"m.weight": torch.ones(8, 12)})
    lora = {"m.lora_A.weight": torch.ones(2, 12), "m.lora_B.weight": torch.ones(8, 2)}
    words = {
        "bundle_emb.cat.string_to_param.*": torch.ones(2, 768),
        "bundle_emb.dog.clip_l": torch.ones(2, 768),
        "bundle_emb.dog.clip_g": torch.ones(2, 1280),
    }
    save(Path("lora.safetensors"), lora | words)
    report = fuse("base.safetensors", "lora.safetensors", output="out.safetensors")
    assert torch.equal(load_file("out.safetensors")["m.weight"], torch.full((8, 12), 3.0))
    assert {u.key for u in report.account.unused} == set(words)
    assert {u.reason for u in report.account.unused} == {"an embedding: prompts use it, no weight holds it"}
    assert set(report.account.used) >= set(lora)
