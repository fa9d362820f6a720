"""Recipes: trees of methods over models, LoRAs and differences, in one pass, against arithmetic done step by step."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import save
from safetensors.torch import load_file
from test_align import NOT_WEIGHTS
from test_fuse import FLUX, delta, flux_lora, tiny, weights

import weightops
from weightops.engine import chunks
from weightops.errors import MismatchError, UsageError
from weightops.merging.expression import apply
from weightops.merging.method import METHODS
from weightops.merging.recipe import Lora, Model, Recipe, Varied, merged, over

sys.path.insert(0, str(Path(__file__).parents[1] / "naming"))

from tagged import from_canonical, needs_lists, shapes_of, to_canonical

if TYPE_CHECKING:
    from torch import Tensor

    from weightops.merging.method import MergeMethod
    from weightops.merging.recipe import Node
    from weightops.ops.report import Report

QKV, PROJ = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj"
pytestmark = needs_lists


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def models(dtype: torch.dtype = torch.float16, *, blocks: int = 2) -> dict[str, dict[str, Tensor]]:
    """A tiny Flux, of so many blocks of a kind, and two that were made of it, in files a, b and c."""
    shapes = {k: s for k, s in tiny(FLUX).items() if blocks == 2 or "_blocks.1." not in k}
    base = weights(shapes, torch.float32)
    found = {}
    for number, name in enumerate("abc"):
        generator = torch.Generator().manual_seed(number)
        size = 0.0 if name == "c" else 0.02
        own = {k: (v + size * torch.randn(v.shape, generator=generator)).to(dtype) for k, v in base.items()}
        save(Path(f"{name}.safetensors"), own)
        found[name] = own
    return found


def small(name: str) -> dict[str, tuple[int, ...]]:
    """A list's names, every width a 64th of the real one."""
    shapes = {k: tuple(n if n <= 8 else max(n // 64, 4) for n in s) for k, s in shapes_of(name).items()}
    return {k: s for k, s in shapes.items() if s and "position_ids" not in k and not k.startswith(NOT_WEIGHTS)}


def M(name: str, **words: Any) -> Model:
    return Model(f"{name}.safetensors", **words)


def made(root: Node, **words: Any) -> tuple[Report, dict[str, Tensor]]:
    inputs = words.pop("numbered", (M("a"),))
    asked = {key: words.pop(key) for key in ("vae", "dtype", "seed", "drop", "text_encoder") if key in words}
    recipe = Recipe(root, inputs[0], inputs, **asked)
    report = weightops.merge(recipe=recipe, output="out.safetensors", force=True, **words)
    return report, load_file("out.safetensors")


def close(found: Tensor, exact: Tensor) -> bool:
    """Within one last place of F16."""
    unit = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(2.0**-14)))) * 2.0**-10
    return bool(((found.double() - exact).abs() <= 0.51 * unit).all())


# ------------------------------------------------------------------------------------------------ trees


def test_a_tree_of_models_loras_and_differences_is_its_formula() -> None:
    given = models()
    lora = flux_lora([QKV, PROJ])
    save(Path("style.safetensors"), lora)
    style = Lora("style.safetensors")
    left = merged("add", [M("b"), style], {"weights": (0.6,)})
    blend = merged("weighted_sum", [M("a"), left], {"weights": (1.0, 3.0)})
    root = merged("add", [blend, style, merged("difference", [M("a"), M("c")])], {"weights": (0.5, -0.3)})
    report, found = made(root, verify=True)
    assert report.verified is not None
    assert report.verified["largest_ulp"] <= 1
    assert report.account.unused == []
    assert found.keys() == given["a"].keys()
    for key, value in found.items():
        a, b, c = (given[n][key].double() for n in "abc")
        module = key.removesuffix(".weight")
        change = delta(lora, module).double() if module in (QKV, PROJ) and key.endswith("weight") else torch.zeros(())
        exact = 0.25 * a + 0.75 * (b + 0.6 * change) + 0.5 * change - 0.3 * (a - c)
        assert close(value, exact), key


def test_what_no_lora_changes_and_no_method_merges_is_copied_byte_by_byte() -> None:
    given = models()
    save(Path("style.safetensors"), flux_lora([PROJ]))
    report, found = made(merged("add", [M("a"), Lora("style.safetensors")]))
    changed = [key for key in found if not torch.equal(found[key], given["a"][key])]
    assert changed == [f"{PROJ}.weight"]
    assert len(report.account.copied) == len(found) - 1
    assert report.groups[0]["merged"] == 1


def test_adding_a_lora_is_fusing_it() -> None:
    models()
    save(Path("style.safetensors"), flux_lora([QKV, PROJ]))
    _, found = made(merged("add", [M("a"), Lora("style.safetensors")], {"weights": (0.7,)}))
    weightops.fuse("a.safetensors", "style.safetensors:0.7", output="fused.safetensors")
    fused = load_file("fused.safetensors")
    for key, value in fused.items():  # each rounds once, after sums in float32 or better
        assert torch.allclose(found[key].double(), value.double(), rtol=2.0**-10, atol=0), key


def test_a_lora_that_depends_on_the_weight_changes_the_one_beside_it() -> None:
    """A DoRA in a method of differences is W' − W of the base's W; in add, of what it is added to."""
    given = models(torch.float32)
    lora = flux_lora([PROJ])
    rows = given["a"][f"{PROJ}.weight"].shape[0]
    lora[f"lora_unet_{PROJ.replace('.', '_')}.dora_scale"] = torch.linspace(0.5, 2, rows)[:, None]
    save(Path("dora.safetensors"), lora)
    dora = Lora("dora.safetensors")
    half = merged("weighted_sum", [M("a"), M("b")])
    _, found = made(merged("add", [half, dora]))
    weightops.merge("a.safetensors", "b.safetensors", output="half.safetensors")
    weightops.fuse("half.safetensors", "dora.safetensors", output="fused.safetensors")
    assert torch.allclose(found[f"{PROJ}.weight"], load_file("fused.safetensors")[f"{PROJ}.weight"], atol=1e-6)
    _, found = made(over(M("c"), "sum", [M("a"), dora], {"weights": (1.0, 1.0)}), numbered=(M("a"),))
    weightops.fuse("c.safetensors", "dora.safetensors", output="fused.safetensors", force=True)
    changed = load_file("fused.safetensors")[f"{PROJ}.weight"].double() - given["c"][f"{PROJ}.weight"].double()
    exact = given["a"][f"{PROJ}.weight"].double() + changed
    assert torch.allclose(found[f"{PROJ}.weight"].double(), exact, atol=1e-6)


def test_a_lora_for_another_model_is_refused() -> None:
    models()
    save(Path("other.safetensors"), {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight": torch.ones(320, 4),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": torch.ones(4, 320),
    })  # fmt: skip
    with pytest.raises(MismatchError, match=r"other\.safetensors"):
        made(merged("add", [M("a"), Lora("other.safetensors")]))


def test_a_lora_of_which_nothing_is_known_here_is_refused() -> None:
    models()
    save(Path("style.safetensors"), flux_lora([PROJ]))
    with pytest.raises(MismatchError, match="is a LoRA"):
        made(merged("weighted_sum", [M("a"), M("style")]))


# ------------------------------------------------------------------------------------------------ kinds


def test_a_difference_stands_only_where_one_is_meant() -> None:
    style = Lora("style.safetensors")
    with pytest.raises(UsageError) as caught:
        merged("add", [style, M("a")])
    assert str(caught.value) == "add: takes a model there, found a difference: 'style.safetensors'"
    with pytest.raises(UsageError) as caught:
        merged("add", [M("a"), M("b")])
    assert str(caught.value) == "add: takes a difference there, found a model: 'b.safetensors'"
    assert caught.value.hint == "difference: [model, base] makes one of two models; or say which base"
    with pytest.raises(UsageError) as caught:
        merged("weighted_sum", [M("a"), style])
    assert str(caught.value) == (
        "weighted_sum: takes models or differences, all alike, found both: 'style.safetensors' is a difference"
    )
    with pytest.raises(UsageError) as caught:
        made(merged("difference", [M("a"), M("b")]))
    assert str(caught.value) == "merge: the recipe makes a difference, expected a model"


# ------------------------------------------------------------------------------------------------ looks, packs, law 3


def bytes_of(root: Node, **words: Any) -> bytes:
    made(root, **words)
    return Path("out.safetensors").read_bytes()


TREES = {
    "ties": lambda: over(M("c"), "ties", [M("a"), M("b")], {"density": 0.3}),
    "slerp": lambda: merged("slerp", [M("a"), M("b")], {"weights": (0.3, 0.7)}),
    "dare": lambda: over(M("c"), "dare", [M("a"), M("b")], {"density": 0.5}),
    "nested": lambda: merged(
        "slerp", [over(M("c"), "ties", [M("a"), M("b")], {"density": 0.3}), over(M("c"), "dare", [M("a")], {})],
        {"weights": (0.5, 0.5)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("tree", TREES)
def test_the_bytes_do_not_depend_on_memory_or_threads(tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where looks and what they are for are tasks of their own: with blocks so small that tensors have many."""
    models(blocks=1)
    monkeypatch.setattr(chunks, "BLOCK_VALUES", 1 << 13)
    written = {
        bytes_of(TREES[tree](), memory=memory << 20, threads=threads)
        for memory in (96, 512) for threads in (1, 3)
    }  # fmt: skip
    assert len(written) == 1
    report, _ = made(TREES[tree](), verify=True)
    assert report.verified is not None


@pytest.mark.parametrize("tree", ["ties", "slerp"])
def test_many_blocks_are_one(tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a look finds is of the whole tensor, however it is cut."""
    models(blocks=1)
    whole = made(TREES[tree]())[1]
    monkeypatch.setattr(chunks, "BLOCK_VALUES", 1 << 13)
    cut = made(TREES[tree]())[1]
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.parametrize("tree", ["ties", "slerp"])
def test_packed_projections_are_merged_as_if_they_were_apart(tree: str) -> None:
    """A method that looks at whole tensors gives the same whether a file packs q, k and v or not."""
    given = models(blocks=1)
    _, packed = made(TREES[tree]())
    apart = to_canonical("flux_transformer", "original", packed)
    for name, tensors in given.items():
        canonical = to_canonical("flux_transformer", "original", tensors)
        own = from_canonical("flux_transformer", "diffusers", canonical)
        save(Path(f"{name}.safetensors"), {k: v.contiguous() for k, v in own.items()})
    _, found = made(TREES[tree]())
    assert found.keys() == apart.keys()
    assert all(torch.equal(found[key], apart[key]) for key in found)


def test_a_method_that_draws_depends_on_its_seed_alone() -> None:
    models(blocks=1)
    first, again = (bytes_of(TREES["dare"](), seed=1) for _ in range(2))
    assert first == again
    assert bytes_of(TREES["dare"](), seed=2) != first


# ------------------------------------------------------------------------------------------------ every method


def words_for(method: MergeMethod) -> tuple[list[str], dict[str, Any]]:
    """Models and words with which the command line's merge runs this method on the files of `models`."""
    names = [name for name in method.models if name != "base"]
    count = max(len(names), 2) if method.is_open else len(names)
    words: dict[str, Any] = {"method": method.name}
    if method.needs_base or "Delta" in method.roles:
        words["base"] = "c.safetensors"
    needed = {"threshold": 0.01} if method.name == "nearswap" else {}
    words["parameters"] = needed
    if method.needs_statistics:
        words["statistics"] = [f"{method.name}-{n}.safetensors" for n in range(count)]
    return [f"{name}.safetensors" for name in "abd"[:count]], words


@pytest.mark.parametrize("name", [name for name, m in METHODS if m.name not in ("add", "difference")])
def test_every_method_merges_files_and_is_as_it_is_alone(name: str) -> None:
    """Through slots, parts and packs as on whole tensors; --verify, which does it again, agrees."""
    given = models(blocks=1)
    save(Path("d.safetensors"), {k: (v.float() * 0.9 + 0.01).half() for k, v in given["a"].items()})
    method = METHODS.get(name)
    files, words = words_for(method)
    for number, file in enumerate(words.get("statistics", [])):
        generator = torch.Generator().manual_seed(number)
        own = {}
        for key, value in given["a"].items():
            if name == "fisher":
                own[key] = torch.rand(value.shape, generator=generator)
            elif value.ndim == 2:
                x = torch.randn(64, value.shape[1], generator=generator)
                own[key] = x.T @ x
        save(Path(file), own)
    report = weightops.merge(*files, output="out.safetensors", verify=True, **words)
    assert report.verified is not None
    assert report.groups[0]["merged"] == len(given["a"])
    found = load_file("out.safetensors")
    assert all(bool(value.isfinite().all()) for value in found.values())
    if "Delta" in method.roles or method.needs_base or method.looks or method.draws or method.needs_statistics:
        return
    for key in ("double_blocks.0.img_attn.proj.weight", "img_in.bias"):
        exact = torch.empty(found[key].shape, dtype=torch.float64)
        own = [load_file(file)[key].double() for file in files]
        apply(method, own, exact, method.check(words["parameters"], len(own)))
        assert torch.allclose(found[key].double(), exact, rtol=2.0**-10, atol=2.0**-14), key


# ------------------------------------------------------------------------------------------------ settings that vary


def test_a_setting_may_be_another_number_in_each_block_and_layer() -> None:
    given = models()
    _, found = made(
        merged("weighted_sum", [M("a"), M("b")], {
            "weights": (Varied(0.5, "double.0=0.25,single.*:*proj_mlp*=1", complement=True),
                        Varied(0.5, "double.0=0.25,single.*:*proj_mlp*=1")),
        }),
        numbered=(M("a"), M("b")),
    )  # fmt: skip
    canonical = {n: to_canonical("flux_transformer", "original", t) for n, t in given.items()}
    for name, value in to_canonical("flux_transformer", "original", found).items():
        alpha = 0.25 if name.startswith("transformer_blocks.0.") else 0.5
        if name.startswith("single_transformer_blocks.") and "proj_mlp" in name:
            alpha = 1.0
        a, b = (canonical[n][name].double() for n in "ab")
        assert close(value, (1 - alpha) * a + alpha * b), name
    assert any("proj_mlp" in n for n in canonical["a"])


@pytest.mark.parametrize("words", [
    {"alpha": 0.3, "blocks": "double=0.8"},
    {"base": "c.safetensors", "blocks": "double=0.8"},
    {"base": "c.safetensors", "method": "ties", "blocks": "double=0.8", "parameters": {"density": 0.5}},
])  # fmt: skip
def test_blocks_say_other_numbers_for_alpha(words: dict[str, Any]) -> None:
    models()
    weightops.merge("a.safetensors", "b.safetensors", output="out.safetensors", **words)
    plain = {key: value for key, value in words.items() if key != "blocks"}
    weightops.merge("a.safetensors", "b.safetensors", output="low.safetensors", **plain)
    weightops.merge("a.safetensors", "b.safetensors", output="high.safetensors", **{**plain, "alpha": 0.8})
    found, low, high = (load_file(f"{n}.safetensors") for n in ("out", "low", "high"))
    assert all(torch.equal(v, (high if k.startswith("double_blocks") else low)[k]) for k, v in found.items())
    assert not all(torch.equal(v, low[k]) for k, v in found.items())


VECTOR = [0.0, *(n / 24 for n in range(25))]  # BASE, IN00-IN11, M00, OUT00-OUT11
ALIKE = {
    "sdmecha_sd1-ldm": (
        ",".join(map(str, VECTOR)),
        "BASE=0, linear(0..1), BASE=0",
    ),
    "orig_wan21_t2v_1_3b": ("block.0-9=0.2, attn.q=0.9", "*=0.5; block.0-9=0.2; *to_q*=0.9"),
    "orig_flux_dev_bfl": (
        "double=0.2, single.10-37=0.9",
        "double.0-18=0.2\nsingle.1?=0.9;single.2?=0.9, single.3?=0.9",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_a_list_and_the_same_in_words_give_identical_files(name: str) -> None:
    """supermerger's 26 numbers for Stable Diffusion; blocks, ranges, kinds and patterns for others."""
    shapes = small(name)
    for file, seed in (("a", 1), ("b", 2)):
        save(Path(f"{file}.safetensors"), weights(shapes, torch.float16, seed))
    first, second = ALIKE[name]
    weightops.merge("a.safetensors", "b.safetensors", blocks=first, output="first.safetensors")
    weightops.merge("a.safetensors", "b.safetensors", blocks=second, output="second.safetensors")
    weightops.merge("a.safetensors", "b.safetensors", output="plain.safetensors")
    one, two, plain = (load_file(f"{n}.safetensors") for n in ("first", "second", "plain"))
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    assert any(not torch.equal(one[key], plain[key]) for key in one)


def test_supermergers_numbers_are_the_alphas_of_its_blocks() -> None:
    shapes = small("sdmecha_sd1-ldm")
    given = {}
    for file, seed in (("a", 1), ("b", 2)):
        given[file] = weights(shapes, torch.float16, seed)
        save(Path(f"{file}.safetensors"), given[file])
    said = ",".join(map(str, VECTOR))
    weightops.merge("a.safetensors", "b.safetensors", blocks=said, output="out.safetensors")
    found = load_file("out.safetensors")
    unet = "model.diffusion_model."
    places = {f"{unet}input_blocks.{n}.": 1 + n for n in range(12)} | {f"{unet}middle_block.": 13}
    places |= {f"{unet}output_blocks.{n}.": 14 + n for n in range(12)}
    places |= {f"{unet}time_embed.": 1, f"{unet}out.": 25, "cond_stage_model.": 0}
    for key, value in found.items():
        if key.startswith("first_stage_model.") or not value.is_floating_point():
            assert torch.equal(value, given["a"][key])
            continue
        alpha = VECTOR[next(at for begin, at in places.items() if key.startswith(begin))]
        assert close(value, (1 - alpha) * given["a"][key].double() + alpha * given["b"][key].double()), key


def test_a_rule_that_matches_nothing_is_an_error() -> None:
    models()
    with pytest.raises(UsageError, match="IN04"):
        weightops.merge("a.safetensors", "b.safetensors", output="out.safetensors", blocks="IN04=0.8")


def test_a_number_that_makes_no_sense_somewhere_is_an_error() -> None:
    models()
    with pytest.raises(UsageError, match="density"):
        made(over(M("c"), "ties", [M("a"), M("b")], {"density": Varied(0.5, "double=1.5")}))


# ------------------------------------------------------------------------------------------------ what the file says


def test_the_recipe_is_written_as_a_tree_over_the_inputs() -> None:
    models()
    save(Path("style.safetensors"), flux_lora([PROJ]))
    root = merged("add", [over(M("c"), "ties", [M("a"), M("b")], {"density": Varied(0.3, "double=0.5")}),
                          Lora("style.safetensors")], {"weights": (0.5,)})  # fmt: skip
    report = made(root, numbered=(M("a"), M("b"), M("c")))[0]
    from safetensors import safe_open

    with safe_open("out.safetensors", "pt") as file:
        said = json.loads(file.metadata()["weightops"])
    assert [entry["name"] for entry in said["inputs"]] == [f"{n}.safetensors" for n in ("c", "a", "b", "style")]
    assert [entry["hash"] for entry in said["inputs"]] == [entry["hash"] for entry in report.inputs]
    ties = said["merge"]["inputs"][0]["inputs"][1]
    assert said["merge"]["inputs"][1] == {"lora": 3}
    assert ties["inputs"][0] == {"method": "difference", "inputs": [{"model": 1}, {"model": 0}], "parameters": {}}
    assert ties["parameters"]["density"] == {"default": 0.3, "blocks": "double=0.5"}
    assert said["like"] == 1


def test_the_averages_of_training_take_the_place_of_the_weights() -> None:
    unet = "model.diffusion_model.input_blocks.0.0.weight"
    plain = {unet: torch.ones(4, 4), "model.diffusion_model.out.2.bias": torch.zeros(3)}
    ema = {"model_ema.diffusion_modelinput_blocks00weight": torch.full((4, 4), 3.0), "model_ema.decay": torch.ones(())}
    save(Path("a.safetensors"), {**plain, **ema})
    weightops.merge("a.safetensors", ema=True, output="out.safetensors")
    found = load_file("out.safetensors")
    assert found.keys() == plain.keys()
    assert torch.equal(found[unet], torch.full((4, 4), 3.0))
    save(Path("b.safetensors"), plain)
    with pytest.raises(MismatchError, match=r"b\.safetensors: holds no averaged weights"):
        weightops.merge("b.safetensors", ema=True, output="none.safetensors")
