"""merge: LoRAs, statistics and looks where tensors are packed, swapped, spelled otherwise, or not changed at all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import save
from safetensors.torch import load_file
from test_align import folder, random, respelled
from test_align import tiny as tiny_of
from test_fuse import FLUX, delta, flux_lora, tiny, weights
from test_fuse_memory import taken

import weightops
from weightops.engine import chunks
from weightops.errors import UsageError, WeightopsError
from weightops.files.checkpoint import open_checkpoint
from weightops.merging.expression import apply
from weightops.merging.method import METHODS
from weightops.merging.recipe import Lora, Model, Recipe, Varied, merged, over
from weightops.ops.merge import files_of, read_recipe, recipe_of
from weightops.ops.merge_plan import Wish, plan_merge
from weightops.ops.recipe_file import recipe_text

sys.path.insert(0, str(Path(__file__).parents[1] / "naming"))

from tagged import from_canonical, needs_lists, to_canonical

if TYPE_CHECKING:
    from torch import Tensor

    from weightops.merging.recipe import Node
    from weightops.ops.report import Report

QKV, PROJ = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj"
FINAL = "final_layer.adaLN_modulation.1"
UNET = "model.diffusion_model."
pytestmark = needs_lists


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def models() -> dict[str, dict[str, Tensor]]:
    """A tiny Flux and two that were made of it, in files c, a and b."""
    base = weights(tiny(FLUX), torch.float32)
    found = {}
    for number, name in enumerate("abc"):
        generator = torch.Generator().manual_seed(number)
        size = 0.0 if name == "c" else 0.02
        found[name] = {k: v + size * torch.randn(v.shape, generator=generator) for k, v in base.items()}
        save(Path(f"{name}.safetensors"), found[name])
    return found


def M(name: str) -> Model:
    return Model(f"{name}.safetensors")


def L(name: str) -> Lora:
    return Lora(f"{name}.safetensors")


def made(root: Node, like: str = "a", **words: bool) -> tuple[Report, dict[str, Tensor]]:
    recipe = Recipe(root, M(like), (M(like),))
    report = weightops.merge(recipe=recipe, output="out.safetensors", force=True, **words)
    return report, load_file("out.safetensors")


def statistics(given: dict[str, Tensor], name: str, seed: int) -> str:
    """A file of Fisher information: a number for each value."""
    generator = torch.Generator().manual_seed(seed)
    save(Path(f"{name}.safetensors"), {k: torch.rand(v.shape, generator=generator) for k, v in given.items()})
    return f"{name}.safetensors"


# ------------------------------------------------------------------------------------------------ LoRAs


def test_a_lora_finds_halves_that_trade_places() -> None:
    """Flux's last layer, which packs nothing, but whose halves stand the other way round in the original spelling."""
    given, lora = models(), flux_lora([FINAL])
    save(Path("style.safetensors"), lora)
    _, found = made(merged("add", [M("a"), L("style")]))
    exact = given["a"][f"{FINAL}.weight"].double() + delta(lora, FINAL)
    assert torch.allclose(found[f"{FINAL}.weight"].double(), exact, atol=1e-6)


@pytest.mark.parametrize("strength", [0.0, Varied(1.0, "double.0=0")], ids=["everywhere", "in a block"])
def test_a_lora_of_strength_0_changes_nothing(strength: float | Varied) -> None:
    given = models()
    save(Path("style.safetensors"), flux_lora([QKV, PROJ]))
    half = merged("weighted_sum", [M("a"), M("b")])
    _, found = made(merged("add", [half, L("style")], {"weights": (strength,)}))
    exact = (given["a"][f"{PROJ}.weight"].double() + given["b"][f"{PROJ}.weight"].double()) / 2
    assert torch.allclose(found[f"{PROJ}.weight"].double(), exact, atol=1e-6)


def test_what_no_method_takes_is_not_among_the_inputs_of_a_task() -> None:
    """A difference of weight 0: it is not read for nothing."""
    models()
    nothing = merged("difference", [M("b"), M("c")])
    save(Path("style.safetensors"), flux_lora([PROJ]))
    recipe = Recipe(merged("add", [M("a"), nothing, L("style")], {"weights": (0.0, 1.0)}), M("a"), (M("a"),))
    opened = {file: open_checkpoint(file) for file in files_of(recipe)}
    plan = plan_merge(recipe, opened, Wish()).planned.plan
    assert {plan.sources[i.source].label for t in plan.tasks for i in t.inputs} == {
        "a.safetensors", "style.safetensors",
    }  # fmt: skip


def test_a_lora_changes_a_model_of_which_nothing_is_known_or_is_refused() -> None:
    """As fuse does, by the model's own names; at the least it is not left out in silence."""
    generator = torch.Generator().manual_seed(0)
    for name in "xy":
        save(Path(f"{name}.safetensors"), {"proj.weight": torch.randn(8, 8, generator=generator)})
    save(Path("own.safetensors"), {
        "lora_unet_proj.lora_up.weight": torch.ones(8, 2), "lora_unet_proj.lora_down.weight": torch.ones(2, 8),
    })  # fmt: skip
    root = merged("add", [merged("weighted_sum", [M("x"), M("y")]), L("own")])
    try:
        _, found = made(root, "x", strict=True)
    except WeightopsError:
        return
    x, y = (load_file(f"{name}.safetensors")["proj.weight"] for name in "xy")
    assert torch.allclose(found["proj.weight"], (x + y) / 2 + 2.0)


def test_every_key_of_a_lora_is_accounted_for() -> None:
    models()
    lora = flux_lora([QKV, PROJ])
    save(Path("style.safetensors"), lora)
    report, _ = made(merged("add", [M("a"), L("style")]))
    assert set(lora) <= {*report.account.used, *(u.key for u in report.account.unused)}


# ------------------------------------------------------------------------------------------------ looks at everything


def _ram_plus(inputs: list[Node]) -> Node:
    return over(M("c"), "ram_plus", inputs, {"threshold": 0.001, "rescale": 1.0, "limit": 10.0})


def _alike(found: dict[str, Tensor], exact: dict[str, Tensor]) -> bool:
    return all(torch.allclose(found[key], exact[key], atol=1e-6) for key in exact)


def test_a_look_of_its_own_pass_sees_what_a_dora_does_to_the_base() -> None:
    given = models()
    lora = flux_lora([PROJ], size=0.0005)
    weight = given["c"][f"{PROJ}.weight"]
    scale = weight.norm(dim=1, keepdim=True) * torch.linspace(0.9, 1.1, len(weight))[:, None]
    lora[f"lora_unet_{PROJ.replace('.', '_')}.dora_scale"] = scale
    save(Path("dora.safetensors"), lora)
    _, found = made(_ram_plus([M("a"), L("dora")]))
    weightops.fuse("c.safetensors", "dora.safetensors", output="d.safetensors")
    _, exact = made(_ram_plus([M("a"), M("d")]))
    assert _alike(found, exact)


def test_a_look_of_its_own_pass_sees_all_rows_where_all_that_it_reads_is_shared() -> None:
    """A LoKr's factors come whole to each block: they do not say how many rows there are."""
    given, name = models(), f"lora_unet_{PROJ.replace('.', '_')}"
    out, features = given["a"][f"{PROJ}.weight"].shape
    generator = torch.Generator().manual_seed(3)
    for file in ("k", "l"):
        save(Path(f"{file}.safetensors"), {
            f"{name}.lokr_w1": 0.1 * torch.randn(4, 4, generator=generator),
            f"{name}.lokr_w2": 0.05 * torch.randn(out // 4, features // 4, generator=generator),
        })  # fmt: skip
        weightops.fuse("c.safetensors", f"{file}.safetensors", output=f"c{file}.safetensors")
    _, found = made(_ram_plus([L("k"), L("l")]))
    _, exact = made(_ram_plus([M("ck"), M("cl")]))
    assert _alike(found, exact)


def test_a_look_of_its_own_pass_passes_over_what_no_lora_changes() -> None:
    models()
    save(Path("k.safetensors"), flux_lora([QKV, PROJ]))
    save(Path("l.safetensors"), flux_lora([QKV]))
    _, found = made(merged("weighted_sum", [M("a"), _ram_plus([L("k"), L("l")])]))
    for name in "kl":
        weightops.fuse("c.safetensors", f"{name}.safetensors", output=f"c{name}.safetensors")
    _, exact = made(merged("weighted_sum", [M("a"), _ram_plus([M("ck"), M("cl")])]))
    assert _alike(found, exact)


@pytest.mark.parametrize("words", [{"method": "cosine_a"}, {"method": "ram_plus", "base": "x.safetensors"}], ids=str)
def test_a_look_of_its_own_pass_passes_over_tensors_of_no_values(words: dict[str, str]) -> None:
    for number, name in enumerate("xy"):
        generator = torch.Generator().manual_seed(number)
        save(Path(f"{name}.safetensors"), {"w.weight": torch.randn(8, 8, generator=generator), "e": torch.zeros(0, 4)})
    weightops.merge("x.safetensors", "y.safetensors", output="out.safetensors", method=words["method"],
                    base=words.get("base"))  # fmt: skip
    assert load_file("out.safetensors")["e"].shape == (0, 4)


# ------------------------------------------------------------------------------------------------ statistics


def test_statistics_count_in_a_packed_tensor_too_that_is_merged_apart() -> None:
    """--blocks has each projection merged by itself; its rows of the statistics go with it."""
    given = models()
    files = [statistics(given["a"], f"f{n}", n) for n in range(2)]
    words = {"method": "fisher", "statistics": files}
    weightops.merge("a.safetensors", "b.safetensors", output="plain.safetensors", **words)  # type: ignore[arg-type]
    weightops.merge("a.safetensors", "b.safetensors", output="blocks.safetensors", blocks="double.1=0.5", **words)  # type: ignore[arg-type]
    plain, blocks = load_file("plain.safetensors"), load_file("blocks.safetensors")
    assert [key for key in plain if not torch.allclose(plain[key], blocks[key], atol=1e-6)] == []


def test_statistics_of_the_inputs_count_in_each_band_of_a_packed_weight() -> None:
    """q, k and v have the same inputs: the inner products that stand under their one name are those of each."""
    given, weight = models(), f"{QKV}.weight"
    files = []
    for n in range(2):
        x = torch.randn(200, given["a"][weight].shape[1], generator=torch.Generator().manual_seed(n))
        save(Path(f"g{n}.safetensors"), {weight: x.T @ x})
        files.append(f"g{n}.safetensors")
    weightops.merge("a.safetensors", "b.safetensors", output="out.safetensors", method="regmean", statistics=files)
    method = METHODS.get("regmean")
    exact = torch.empty_like(given["a"][weight])
    inner = [load_file(file)[weight] for file in files]
    apply(method, [given["a"][weight], given["b"][weight]], exact, method.check({}, 2), statistics=inner)
    assert torch.allclose(load_file("out.safetensors")[weight], exact, atol=1e-5)


def test_statistics_have_the_names_of_their_own_model() -> None:
    given = models()
    canonical = to_canonical("flux_transformer", "original", given["b"])
    other = {k: v.contiguous() for k, v in from_canonical("flux_transformer", "diffusers", canonical).items()}
    save(Path("d.safetensors"), other)
    own = [statistics(given["a"], "f0", 0), statistics(other, "f1", 1)]
    weightops.merge("a.safetensors", "d.safetensors", output="out.safetensors", method="fisher", statistics=own)
    twin = to_canonical("flux_transformer", "diffusers", load_file("f1.safetensors"))
    back = from_canonical("flux_transformer", "original", twin)
    save(Path("f2.safetensors"), {key: value.contiguous() for key, value in back.items()})
    weightops.merge("a.safetensors", "b.safetensors", output="twin.safetensors", method="fisher",
                    statistics=["f0.safetensors", "f2.safetensors"])  # fmt: skip
    found, exact = load_file("out.safetensors"), load_file("twin.safetensors")
    assert [key for key in exact if not torch.allclose(found[key], exact[key], atol=1e-6)] == []


def test_keys_of_statistics_that_no_tensor_takes_are_named() -> None:
    given = models()
    files = [statistics({**given["a"], "strange": torch.ones(3)}, f"f{n}", n) for n in range(2)]
    report = weightops.merge("a.safetensors", "b.safetensors", output="out.safetensors", method="fisher",
                             statistics=files)  # fmt: skip
    assert [u.source for u in report.account.unused if u.key == "strange"] == files


def test_what_inner_products_take_is_counted() -> None:
    """Law 2: of a convolution they are many times as large as the weight."""
    shape = (32, 64, 3, 3)
    for n, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(n)
        save(Path(f"{name}.safetensors"), {"w.weight": torch.randn(shape, generator=generator)})
        x = torch.randn(8, 576, generator=generator)
        save(Path(f"g{n}.safetensors"), {"w.weight": x.T @ x})
    root = merged("regmean", [M("a"), M("b")], statistics=["g0.safetensors", "g1.safetensors"])
    recipe = Recipe(root, M("a"), (M("a"),))
    opened = {file: open_checkpoint(file) for file in files_of(recipe)}
    plan = plan_merge(recipe, opened, Wish()).planned.plan
    (task,) = plan.tasks
    assert taken(plan, task) <= task.work_nbytes


def test_what_smoothing_a_convolution_takes_is_counted() -> None:
    for n, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(n)
        save(Path(f"{name}.safetensors"), {"w.weight": torch.randn((64, 64, 3, 3), generator=generator)})
    recipe = Recipe(over(M("b"), "smooth_add", [M("a"), M("a")], {}), M("a"), (M("a"),))
    opened = {file: open_checkpoint(file) for file in files_of(recipe)}
    plan = plan_merge(recipe, opened, Wish()).planned.plan
    (task,) = plan.tasks
    assert taken(plan, task) <= task.work_nbytes


# ------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize("words", [
    {"method": "ties", "base": "c.safetensors"}, {"method": "weighted_sum", "base": "c.safetensors"},
], ids=str)  # fmt: skip
def test_weights_that_are_not_to_be_normalised_are_taken_as_they_are(words: dict[str, str]) -> None:
    """--no-normalize, beside every method that has the setting; or else it is refused."""
    models()
    two = ("a.safetensors", "b.safetensors")
    try:
        weightops.merge(*two, output="x.safetensors", weights=[1, 1], normalize=False, **words)  # type: ignore[arg-type]
    except UsageError:
        return
    plain = {"normalize": False}
    weightops.merge(*two, output="y.safetensors", weights=[1, 1], parameters=plain, **words)  # type: ignore[arg-type]
    x, y = load_file("x.safetensors"), load_file("y.safetensors")
    assert all(torch.equal(x[key], y[key]) for key in y)


def test_a_setting_says_the_same_as_its_own_option() -> None:
    given = models()
    weightops.merge("a.safetensors", "b.safetensors", output="x.safetensors", weights=[1, 1],
                    parameters={"normalize": "false"})  # fmt: skip
    exact = given["a"]["img_in.weight"] + given["b"]["img_in.weight"]
    assert torch.allclose(load_file("x.safetensors")["img_in.weight"], exact, atol=1e-6)


@pytest.mark.parametrize(("words", "error"), [
    ({"base": "c.safetensors"}, "--no-normalize: add_difference has no setting normalize"),
    ({"parameters": {"normalize": "true"}}, "--no-normalize: found --set normalize beside it, which says otherwise"),
], ids=str)  # fmt: skip
def test_no_normalize_is_refused_where_it_means_nothing_or_something_else(words: dict[str, Any], error: str) -> None:
    models()
    with pytest.raises(UsageError) as caught:
        weightops.merge("a.safetensors", "b.safetensors", output="x.safetensors", normalize=False, **words)
    assert str(caught.value).startswith(error)


def test_a_base_says_nothing_of_how_the_result_is_sampled_however_it_is_said() -> None:
    """A v-prediction base: neither the words nor the recipe of them warn of it."""
    models()
    save(Path("c.safetensors"), load_file("c.safetensors"), {"modelspec.prediction_type": "v"})
    two = ["a.safetensors", "b.safetensors"]
    words = weightops.merge(*two, base="c.safetensors", output="x.safetensors", strict=True)
    Path("r.yaml").write_text(recipe_text(_asked(two, base="c.safetensors")))
    recipe = weightops.merge(recipe="r.yaml", output="y.safetensors", strict=True)
    assert words.warnings == recipe.warnings == []
    report = weightops.merge("a.safetensors", "c.safetensors", output="z.safetensors")
    assert "differ in 'modelspec.prediction_type'" in report.warnings[0]


def _asked(models_: list[str], **words: object) -> Recipe:
    usual: dict[str, object] = {
        "alpha": None, "weights": None, "normalize": True, "base": None, "method": None, "parameters": {},
        "blocks": None, "statistics": (), "ema": False, "rebasin": False, "vae": "1", "text_encoder": "merge",
        "dtype": "keep", "drop": (), "on_mismatch": "error", "seed": 0,
    }  # fmt: skip
    return recipe_of(models_, **{**usual, **words})  # type: ignore[arg-type]


@pytest.mark.parametrize("words", [{}, {"base": "c.safetensors"}], ids=str)
def test_a_recipe_that_is_printed_makes_the_same_bytes(words: dict[str, str]) -> None:
    models()
    two = ["a.safetensors", "b.safetensors"]
    weightops.merge(*two, output="x.safetensors", **words)  # type: ignore[arg-type]
    Path("r.yaml").write_text(recipe_text(_asked(two, **words)))
    weightops.merge(recipe="r.yaml", output="y.safetensors")
    assert read_recipe("r.yaml").root == _asked(two, **words).root
    assert Path("x.safetensors").read_bytes() == Path("y.safetensors").read_bytes()


def test_a_recipe_is_not_printed_of_words_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="no model 7"):
        recipe_text(_asked(["a.safetensors", "b.safetensors"], vae="7"))


# ------------------------------------------------------------------------------------------------ Stable Diffusion


def test_averages_are_brought_into_the_order_of_the_first_models() -> None:
    pytest.importorskip("scipy")
    shapes = {k: s for k, s in tiny_of("sdmecha_sd1-ldm").items() if k.startswith(UNET)}
    for seed, name in enumerate("ab"):
        own = random(shapes, seed)
        own |= {f"model_ema.{k.removeprefix('model.').replace('.', '')}": v + 1 for k, v in own.items()}
        save(Path(f"{name}.safetensors"), own)
    report = weightops.merge("a.safetensors", "b.safetensors", ema=True, rebasin=True, output="out.safetensors")
    assert report.details["rebased"] == ["b.safetensors"]


def test_averages_matched_to_averages_are_the_same_by_their_recipe_and_again() -> None:
    pytest.importorskip("scipy")
    shapes = {k: s for k, s in tiny_of("sdmecha_sd1-ldm").items() if k.startswith(f"{UNET}input_blocks")}
    for seed, name in enumerate("abc"):
        own = random(shapes, seed)
        own |= {f"model_ema.{k.removeprefix('model.').replace('.', '')}": v + 1 for k, v in own.items()}
        save(Path(f"{name}.safetensors"), own)
    two = ["a.safetensors", "b.safetensors"]
    weightops.merge(*two, ema=True, rebasin=True, output="x.safetensors")
    Path("r.yaml").write_text(recipe_text(_asked(two, ema=True, rebasin=True)))
    weightops.merge(recipe="r.yaml", output="y.safetensors")
    assert Path("x.safetensors").read_bytes() == Path("y.safetensors").read_bytes()
    assert weightops.replay("x.safetensors").details["line"].startswith("identical")
    for to in ("c.safetensors", "{model: c.safetensors, ema: true}"):  # a model that is nothing else in the recipe
        Path("r.yaml").write_text(f"merge:\n  n_average: [a.safetensors, {{model: b.safetensors, rebasin: {to}}}]\n")
        report = weightops.merge(recipe="r.yaml", output="z.safetensors", force=True)
        assert report.details["rebasin"][0]["to"] == "c.safetensors"
        assert report.details["rebasin"][0]["moved"] > 0
        assert [Path(each["path"]).stem for each in report.inputs] == ["a", "b", "c"]
        assert weightops.replay("z.safetensors").details["line"].startswith("identical")


def test_a_number_means_a_model_even_where_a_model_is_called_so() -> None:
    shapes = tiny_of("sdmecha_sd1-ldm")
    for name, seed in (("2", 1), ("1", 2)):
        save(Path("x.safetensors"), random(shapes, seed))
        folder(name, respelled("x.safetensors", {}))
    weightops.merge("2", "1", output="out.safetensors")  # whose VAE is the first model's
    key = "decoder.conv_in.weight"
    first = load_file("2/vae/model.safetensors")[key]
    assert torch.equal(load_file("out.safetensors")[f"vae.{key}"], first)


def test_a_row_is_all_that_leads_to_one_output_where_a_weight_is_stored_transposed() -> None:
    projection = "conditioner.embedders.1.model.text_projection"
    shapes = {k: s for k, s in tiny_of("sdmecha_sdxl-sgm").items() if k.startswith(("conditioner", UNET))}
    for name, seed in (("x", 1), ("y", 2)):
        save(Path(f"{name}.safetensors"), random(shapes, seed))
    weightops.merge("x.safetensors", "y.safetensors", method="nuslerp_rows", output="out.safetensors")
    given = [load_file(f"{name}.safetensors")[projection].T.contiguous().float() for name in "xy"]
    method = METHODS.get("nuslerp_rows")
    exact = torch.empty(given[0].shape)
    apply(method, given, exact, method.check({}, 2))
    found = load_file("out.safetensors")[projection].T.float()
    assert torch.allclose(found, exact, atol=1e-2)


@pytest.mark.parametrize("method", ["slerp", "cosine_a"])
def test_what_a_look_saw_is_not_said_to_be_too_large(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in one block makes the numbers of the whole tensor NaN: the model that holds it is named."""
    monkeypatch.setattr(chunks, "BLOCK_VALUES", 1 << 12)
    x = {"w.weight": torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).half()}
    save(Path("x.safetensors"), x)
    y = x["w.weight"] + 0.1
    y[-1, -1] = torch.nan
    save(Path("y.safetensors"), {"w.weight": y})
    with pytest.raises(WeightopsError) as caught:
        weightops.merge("x.safetensors", "y.safetensors", method=method, output="out.safetensors", threads=1)
    assert str(caught.value) == "y.safetensors: tensor 'w.weight' holds NaN or Inf"


def test_statistics_are_brought_into_the_order_of_the_first_with_their_model() -> None:
    """Or are refused beside --rebasin: in their old order they speak of other channels."""
    pytest.importorskip("scipy")
    from shuffled import shuffled
    from test_rebasin_finder import diffusers, networks, noisy, only, weights_of

    first = only(weights_of("sd15"), "unet")
    network = networks("sd15")["unet"]
    generator = torch.Generator().manual_seed(0)
    own, other = (
        {"unet": {k: torch.rand(t.shape, generator=generator) for k, t in first["unet"].items()}} for _ in range(2)
    )
    second = noisy(first, 0.05)
    for name, values in {"a": first, "b": second, "fa": own, "fb": other}.items():
        save(Path(f"{name}.safetensors"), diffusers("sd15", values))
    for name, values in {"s": second, "fs": other}.items():
        save(Path(f"{name}.safetensors"), diffusers("sd15", {"unet": shuffled(network, values["unet"], seed=7)}))
    words = {"method": "fisher", "output": "x.safetensors"}
    weightops.merge("a.safetensors", "b.safetensors", statistics=["fa.safetensors", "fb.safetensors"], **words)
    words["output"] = "y.safetensors"
    files = ["fa.safetensors", "fs.safetensors"]
    try:
        weightops.merge("a.safetensors", "s.safetensors", statistics=files, rebasin=True, **words)
    except UsageError:
        return
    x, y = load_file("x.safetensors"), load_file("y.safetensors")
    assert [key for key in x if not torch.equal(x[key], y[key])] == []
