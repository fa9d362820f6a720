"""replay: what a recipe made it makes again, to the last bit; what has changed is named; no recipe is trusted."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import save
from loras import MODULE, UNET, kohya_file
from safetensors.torch import load_file

import weightops
from weightops import __version__
from weightops.errors import FormatError, MismatchError, OutputError, UsageError, WeightopsError
from weightops.files.checkpoint import open_checkpoint
from weightops.merging.method import METHODS
from weightops.ops import replay_inputs
from weightops.ops.merge_plan import Wish, plan_merge
from weightops.ops.replay_inputs import hash_of_source
from weightops.ops.replay_recipe import read_made

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightops.ops.report import Report

OUT = Path("out.safetensors")
PROJ, CONV = "layers.0.proj.weight", "layers.1.conv.weight"
IDENTICAL = "identical: 3 tensors and the header, byte for byte"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def model(name: str, seed: int) -> str:
    """Of no known architecture: a matrix, a convolution, a norm."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {PROJ: (32, 24), CONV: (8, 6, 3, 3), "norm.scale": (32,)}
    tensors = {key: torch.randn(shape, generator=generator).half() for key, shape in shapes.items()}
    Path(name).parent.mkdir(exist_ok=True)
    save(Path(name), tensors, {"format": "pt"})
    return name


def lora(name: str, seed: int, rank: int = 4) -> str:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, 24, generator=generator), torch.randn(32, rank, generator=generator)
    module = "lora_unet_layers_0_proj"
    parts = {".lora_down.weight": down, ".lora_up.weight": up, ".alpha": torch.tensor(2.0)}
    save(Path(name), {module + ending: tensor for ending, tensor in parts.items()})
    return name


def three() -> tuple[str, str, str]:
    return model("a.safetensors", 1), model("b.safetensors", 2), model("c.safetensors", 3)


def recipe(text: str) -> Report:
    Path("recipe.yaml").write_text(text)
    return weightops.merge(recipe="recipe.yaml", output=OUT)


def line(file: str | Path = OUT, *folders: str, **words: Any) -> str:
    """The answer, and that nothing is left behind."""
    before = sorted(Path.cwd().rglob("*"))
    report = weightops.replay(file, folders, **words)
    if "output" not in words:
        assert sorted(Path.cwd().rglob("*")) == before
    return str(report.details["line"])


def change(file: str, byte: int = -3) -> None:
    """One byte of one value."""
    data = bytearray(Path(file).read_bytes())
    data[byte] ^= 1
    Path(file).write_bytes(data)


def said(file: Path = OUT) -> dict[str, Any]:
    with open_checkpoint(file) as opened:
        found: dict[str, Any] = json.loads(opened.metadata["weightops"])
        return found


def say(recipe: Any, file: Path = OUT) -> None:
    """Other words in place of the recipe of a file."""
    text = recipe if isinstance(recipe, str) else json.dumps(recipe, sort_keys=True, ensure_ascii=False)
    tensors = load_file(file)
    save(file, tensors, {"format": "pt", "weightops": text})


# ------------------------------------------------------------------------------------------------ made again


def test_a_merged_file_is_made_again_bit_for_bit() -> None:
    a, b, _ = three()
    weightops.merge(a, b, alpha=0.3, output=OUT)
    report = weightops.replay(OUT)
    assert report.details["line"] == IDENTICAL
    assert report.details["identical"] is report.details["same"] is True
    assert [entry["path"] for entry in report.inputs] == [a, b]
    assert report.output is None
    assert report.warnings == []


def test_so_it_is_whatever_the_memory_and_the_threads() -> None:
    a, b, _ = three()
    weightops.merge(a, b, alpha=0.3, output=OUT)
    assert line(memory=1 << 20, threads=1) == IDENTICAL


@pytest.mark.parametrize("words", [
    {"alpha": 0.3, "blocks": "layers.1=0.9"}, {"weights": (1, -2), "normalize": False}, {"dtype": "bf16"},
    {"dtype": "fp32", "vae": "1"},
    {"alpha": 1, "blocks": "layers.1=0"}, {"base": "c.safetensors", "alpha": 0.7}, {"method": "slerp", "alpha": 0.25},
    {"method": "ties", "base": "c.safetensors", "parameters": {"density": 0.3}, "alpha": 0.8},
], ids=str)  # fmt: skip
def test_the_words_of_a_merge_are_those_of_its_recipe(words: dict[str, Any]) -> None:
    a, b, _ = three()
    weightops.merge(a, b, output=OUT, **words)
    assert line() == IDENTICAL


@pytest.mark.parametrize("name", [name for name, method in METHODS if method.draws])
def test_a_method_that_draws_draws_the_same_again(name: str) -> None:
    a, b, c = three()
    weightops.merge(a, b, base=c, method=name, seed=7, output=OUT)
    assert line() == IDENTICAL
    other = said() | {"seed": 8}
    say(other)
    assert "of 3 tensors differ, by up to " in line()


def test_a_recipe_with_a_lora_and_a_tree_is_made_again() -> None:
    three(), lora("l.safetensors", 5), lora("k.safetensors", 6, 2)
    recipe("""
        merge:
          add:
            - {slerp: [a.safetensors, b.safetensors], alpha: 0.4}
            - {lora: l.safetensors, strength: 0.6}
            - {ties: [{difference: [c.safetensors, a.safetensors]}, {lora: k.safetensors}], strength: -0.3}
        dtype: bf16
        """)
    assert line() == IDENTICAL
    shutil.move("k.safetensors", "other.safetensors")
    assert line() == IDENTICAL


def test_a_model_of_which_only_keys_and_dtypes_are_taken_is_read_as_it_was() -> None:
    three()
    key = "model.diffusion_model.out.2.weight"
    for n, name in enumerate("xyz"):
        tensors = {key: torch.full((3,), float(n)), "model_ema.diffusion_modelout2weight": torch.full((3,), 9.0 + n)}
        tensors["first_stage_model.decoder.conv_in.weight"] = torch.full((2,), float(n))
        save(Path(f"{name}.safetensors"), tensors)
    recipe("""
        merge: {weighted_sum: [x.safetensors, {model: y.safetensors, ema: true}]}
        like: {model: z.safetensors, ema: true}
        """)
    assert said()["like_ema"] is True
    assert line() == "identical: 2 tensors and the header, byte for byte"


def test_each_file_of_a_grid_is_made_again() -> None:
    a, b, _ = three()
    weightops.merge(a, b, grid={"alpha": [0.2, 0.4]}, output="grid")
    found = sorted(Path("grid").glob("*.safetensors"))
    assert [line(file, ".") for file in found] == [IDENTICAL] * 2


def test_nan_and_inf_are_made_again() -> None:
    a, b, _ = three()
    save(Path(b), load_file(b) | {"norm.scale": torch.full((32,), torch.nan, dtype=torch.float16)})
    weightops.merge(a, b, allow_nonfinite=True, output=OUT)
    assert line() == IDENTICAL


VERBS: dict[str, Callable[[], Any]] = {
    "fuse": lambda: weightops.fuse("a.safetensors", "l.safetensors:0.4", ("k.safetensors", -2), output=OUT),
    "fuse, drawn": lambda: weightops.fuse("a.safetensors", "l.safetensors", rounding="stochastic", seed=3, output=OUT),
    "fuse, by blocks": lambda: weightops.fuse("a.safetensors", "l.safetensors", blocks="layers.0=0.5", output=OUT),
    "extract": lambda: weightops.extract("a.safetensors", "b.safetensors", rank=3, allow_unrelated=True, output=OUT),
    "extract, by energy": lambda: weightops.extract(
        "a.safetensors", "b.safetensors", rank="energy:0.8", conv_rank=2, clamp_quantile=0.99, dtype="bf16",
        exclude=["*conv*"], allow_unrelated=True, output=OUT),
    "resize": lambda: weightops.resize("l.safetensors", rank=2, output=OUT),
    "resize, by energy": lambda: weightops.resize("l.safetensors", rank="energy:0.7", max_rank=3, output=OUT),
    "combine": lambda: weightops.combine("l.safetensors:0.4", "k.safetensors", output=OUT),
    "combine, exactly": lambda: weightops.combine("l.safetensors:0.4", "k.safetensors", exact=True, output=OUT),
    "combine, ties": lambda: weightops.combine(
        "l.safetensors", "k.safetensors", method="ties", settings={"density": 0.5}, rank=3, output=OUT),
    "combine, drawn": lambda: weightops.combine(
        "l.safetensors", "k.safetensors", method="dare", seed=4, rank=3, output=OUT),
    "combine, averaged": lambda: weightops.combine("l.safetensors", "k.safetensors", ema=0.5, output=OUT),
    "convert": lambda: weightops.convert("a.safetensors", output=OUT),
    "convert, to bf16": lambda: weightops.convert("a.safetensors", dtype="bf16", output=OUT),
    "convert, to a dialect": lambda: weightops.convert(
        "s.safetensors", to="diffusers", alpha="fold", architecture="sd15", output=OUT),
    "convert, to a folder": lambda: weightops.convert("s.safetensors", to="peft", output="folder"),
    "convert, to shards": lambda: weightops.convert("a.safetensors", shard_size=1000, output="folder"),
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_says_a_recipe_is_made_again(verb: str) -> None:
    three(), lora("l.safetensors", 5), lora("k.safetensors", 6, 2)
    kohya_file(Path("s.safetensors"), [4, 4, 4], [2.0, 2.0, 1.0], {"ss_steps": "7"})
    VERBS[verb]()
    file = "folder" if Path("folder").exists() else OUT
    assert line(file).startswith("identical: ")
    for old in ("a", "l", "s"):
        shutil.move(f"{old}.safetensors", f"{old}-old.safetensors")
    assert line(file).startswith("identical: ")


@pytest.mark.parametrize("verb", ["convert", "resize", "combine"])
def test_what_needs_the_model_beside_it_is_made_again_with_it(verb: str) -> None:
    generator, module = torch.Generator().manual_seed(1), MODULE.format("k")
    down, up = torch.randn(4, 768, generator=generator), torch.randn(320, 4, generator=generator)
    plain = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    save(Path("l.safetensors"), plain)
    save(Path("d.safetensors"), plain | {f"{module}.dora_scale": torch.full((1, 768), 3.0)})
    weights = {f"{UNET}.to_k.weight": torch.randn(320, 768, generator=generator)}
    weights |= {"conv_in.weight": torch.ones(320, 4, 3, 3), "conv_norm_out.weight": torch.ones(320)}
    save(Path("a.safetensors"), weights)
    words: dict[str, Any] = {"rank": "energy:0.9", "base": "a.safetensors", "output": OUT}
    if verb == "convert":
        weightops.convert("d.safetensors", to="lora", seed=4, **words)
    elif verb == "resize":
        weightops.resize("d.safetensors", **words)
    else:
        weightops.combine("d.safetensors:0.5", "l.safetensors", **words)
    assert len(said()["inputs"]) == 2 + (verb == "combine")
    assert line().startswith("identical: ")
    shutil.move("a.safetensors", "model.safetensors")
    assert line().startswith("identical: ")


def test_what_is_made_can_be_kept() -> None:
    a, b, _ = three()
    weightops.merge(a, b, output=OUT)
    assert line(output="again.safetensors") == IDENTICAL
    assert Path("again.safetensors").read_bytes() == OUT.read_bytes()
    with pytest.raises(OutputError, match=r"^again\.safetensors: exists"):
        line(output="again.safetensors")
    assert line(output="again.safetensors", force=True) == IDENTICAL
    with pytest.raises(UsageError, match=r"^-o: out\.safetensors is what is replayed"):
        line(output="out.safetensors", force=True)


# ------------------------------------------------------------------------------------------------ what is found


def test_an_input_that_changed_by_a_byte_is_named_with_both_hashes() -> None:
    a, b, _ = three()
    weightops.merge(a, b, output=OUT)
    was = said()["inputs"][1]["hash"]
    change(b)
    report = weightops.replay(OUT)
    assert report.details["changed"] == [b]
    assert not report.details["same"]
    found = report.inputs[1]["hash"]
    assert report.inputs[1]["recorded"] == was != found
    expected = f"'{b}' has changed: found {found}, expected {was}; 1 of 3 tensors differ, by up to "
    assert report.details["line"].startswith(expected)
    assert [entry["key"] for entry in report.details["differ"]["tensors"]] == ["norm.scale"]
    assert report.details["differ"]["metadata"] == []
    assert report.inputs[0]["recorded"] == report.inputs[0]["hash"]


def test_a_file_that_changed_itself_is_said_to_differ_by_tensor() -> None:
    a, b, _ = three()
    weightops.merge(a, b, output=OUT)
    change(str(OUT))
    report = weightops.replay(OUT)
    assert report.details["changed"] == []
    (different,) = report.details["differ"]["tensors"]
    assert (different["key"], different["values"]) == ("norm.scale", 1)
    assert different["reason"].startswith("1 of 32 values differ, by up to ")
    assert report.details["line"].startswith("1 of 3 tensors differ, by up to ")


def test_signs_of_zeros_and_other_tensors_are_told_apart() -> None:
    values = {"x": torch.zeros(4), "y": torch.ones(4), "z": torch.ones(3)}
    save(Path("a.safetensors"), values)
    weightops.convert("a.safetensors", output=OUT)
    own = json.dumps(said())
    save(OUT, {"x": torch.tensor([0.0, -0.0, 0.0, 0.0]), "y": torch.ones(2, 2), "w": torch.ones(1)},
         {"format": "pt", "weightops": own})  # fmt: skip
    found = {e["key"]: e["reason"] for e in weightops.replay(OUT).details["differ"]["tensors"]}
    assert found == {
        "w": "is not made again", "x": "signs of zeros, or bits of NaN, differ",
        "y": "is F32 [2, 2], and F32 [4] when it is made again", "z": "is not in the file",
    }  # fmt: skip


def test_another_version_is_said_and_compared_all_the_same() -> None:
    a, b, _ = three()
    weightops.merge(a, b, output=OUT)
    plain = OUT.read_bytes()
    OUT.write_bytes(plain.replace(f'"version\\": \\"{__version__}'.encode(), b'"version\\": \\"9.9.9'))
    assert OUT.read_bytes() != plain
    report = weightops.replay(OUT)
    assert report.warnings == [
        f"out.safetensors was made by weightops 9.9.9, and this is {__version__}: another version may round otherwise"
    ]
    assert report.details["made"] == {"command": "merge", "version": "9.9.9"}
    assert report.details["line"] == "the same: 3 tensors, bit for bit, but for the version in its recipe"
    assert report.details["same"] is True
    assert report.details["identical"] is False
    change(str(OUT))
    assert weightops.replay(OUT).details["same"] is False


def test_metadata_that_are_not_made_again_are_named() -> None:
    a, b, _ = three()
    weightops.merge(a, b, output=OUT)
    with open_checkpoint(OUT) as opened:
        metadata = dict(opened.metadata)
    save(OUT, load_file(OUT), metadata | {"note": "by hand"})
    assert line() == "3 tensors the same, bit for bit; 'note' is only in the file"
    save(OUT, load_file(OUT), {"weightops": metadata["weightops"], "format": "tf"})
    assert line() == "3 tensors the same, bit for bit; 'format' is 'tf', and 'pt' when it is made again"


# ------------------------------------------------------------------------------------------------ where inputs are


def test_inputs_are_found_by_name_in_folders_and_below() -> None:
    model("x/deep/a.safetensors".replace("/deep", ""), 1), model("b.safetensors", 2)
    weightops.merge("x/a.safetensors", "b.safetensors", output=OUT)
    with pytest.raises(UsageError) as e:
        weightops.replay(OUT)
    hashed = said()["inputs"][0]["hash"]
    where = "no file in '.' has the name, and none the hash"
    assert str(e.value) == f"out.safetensors: was made of 'a.safetensors' ({hashed}): {where}"
    assert e.value.hint == "--in FOLDER looks there, too, under whatever name it has now"
    Path("y").mkdir()
    shutil.move("x", "y/z")
    assert line(OUT, "y") == IDENTICAL
    Path("y/.hidden").mkdir()
    shutil.move("y/z", "y/.hidden/z")
    with pytest.raises(UsageError, match="was made of 'a"):
        weightops.replay(OUT, ["y"])
    with pytest.raises(UsageError, match=r"^--in: no such folder: nowhere$"):
        weightops.replay(OUT, ["nowhere"])


def test_inputs_under_other_names_are_found_by_their_hash() -> None:
    a, b, c = three()
    weightops.merge(a, b, alpha=0.3, output=OUT)
    for n in range(4):
        model(f"other-{n}.safetensors", 10 + n)
        lora(f"lora-{n}.safetensors", n)
    shutil.move(a, "new-a.safetensors")
    shutil.move(b, "new-b.safetensors")
    report = weightops.replay(OUT)
    assert report.details["line"] == IDENTICAL
    assert [entry["path"] for entry in report.inputs] == ["new-a.safetensors", "new-b.safetensors"]
    assert report.warnings == [f"'{n}.safetensors' is found by its hash: 'new-{n}.safetensors'" for n in "ab"]
    shutil.move("new-b.safetensors", a)  # a name that meant another file
    model(b, 4)
    assert line() == IDENTICAL
    assert c


def test_of_files_of_one_name_the_one_with_the_hash_is_taken() -> None:
    for n, folder in enumerate("xyz"):
        model(f"{folder}/m.safetensors", n)
    weightops.merge("y/m.safetensors", "z/m.safetensors", alpha=0.25, output=OUT)
    report = weightops.replay(OUT, ["x", "y", "z"])
    assert report.details["line"] == IDENTICAL
    assert [entry["path"] for entry in report.inputs] == ["y/m.safetensors", "z/m.safetensors"]


def test_one_file_under_two_names_and_two_files_that_are_equal_stay_two_inputs() -> None:
    a, b, _ = three()
    Path("d").mkdir()
    shutil.copy(a, "d")
    weightops.merge(a, b, f"d/{a}", weights=(1, 2, 3), output=OUT)
    assert len(said()["inputs"]) == 3
    assert line() == IDENTICAL
    assert line(OUT, "d") == IDENTICAL


def test_folders_that_hold_too_much_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, _ = three()
    weightops.merge(a, b, output=OUT)
    monkeypatch.setattr(replay_inputs, "MAX_ENTRIES", 3)
    with pytest.raises(UsageError, match=r"^--in: more than 3 files and folders lie there$"):
        weightops.replay(OUT, ["."])


def test_the_hash_of_one_source_alone_is_that_of_the_run() -> None:
    three(), lora("l.safetensors", 5)
    recipe("""
        merge: {add: [{ties: [a.safetensors, b.safetensors], base: c.safetensors}, {lora: l.safetensors}]}
        dtype: fp32
        """)
    made = read_made(said(), "out", None)
    files = ["c.safetensors", "a.safetensors", "b.safetensors", "l.safetensors"]
    files = [next(f for f in files if f == name) for name, _ in made.inputs]
    assert made.recipe is not None
    with contextlib.ExitStack() as stack:
        opened = {file: stack.enter_context(open_checkpoint(file)) for file in files}
        plan = plan_merge(made.recipe(files), opened, Wish()).planned.plan
        assert [hash_of_source(plan, n) for n in range(4)] == [hashed for _, hashed in made.inputs]


# ------------------------------------------------------------------------------------------------ ancestry


def test_the_recipes_of_inputs_stand_in_that_of_the_output() -> None:
    a, b, c = three()
    weightops.merge(a, b, alpha=0.3, output="ab.safetensors")
    weightops.convert("ab.safetensors", dtype="bf16", output="half.safetensors")
    weightops.merge("half.safetensors", c, output=OUT)
    first, last = said()["inputs"]
    assert "made" not in last
    assert first["made"]["command"] == "convert"
    assert first["made"]["inputs"][0]["made"] == said(Path("ab.safetensors"))
    assert line() == IDENTICAL
    assert weightops.inspect(OUT).to_dict()["lineage"] == said()
    assert "lineage" not in weightops.inspect(a).to_dict()


def test_folders_bring_their_recipes_along_under_their_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    kohya_file(Path("s.safetensors"), [4, 4, 4], [2.0, 2.0, 1.0], {})
    weightops.convert("s.safetensors", to="peft", output="folder")
    monkeypatch.chdir("folder")
    weightops.convert(".", to="kohya", output="../out.safetensors")
    monkeypatch.chdir("..")
    (entry,) = said()["inputs"]
    assert entry["name"] == "folder"
    assert entry["made"]["to"] == "peft"
    assert line() == "identical: 9 tensors and the header, byte for byte"


def test_an_input_whose_own_story_was_lost_gives_the_same_tensors_and_another_story() -> None:
    a, b, c = three()
    weightops.merge(a, b, output="ab.safetensors")
    weightops.merge("ab.safetensors", c, output=OUT)
    save(Path("ab.safetensors"), load_file("ab.safetensors"), {"format": "pt"})
    told = "its recipe: input 'ab.safetensors' says otherwise how it was made"
    assert line() == f"3 tensors the same, bit for bit; {told}"


# ------------------------------------------------------------------------------------------------ strangers


@pytest.mark.parametrize(("words", "error"), [
    ({"command": "train"}, "was made by 'train', of which there is no replay"),
    ({"new": 1}, "its recipe says 'new', which this version does not know"),
    ({"vae": "/etc/passwd"}, "its recipe has the vae '/etc/passwd', expected a number, merge, or a file"),
    ({"vae": "../x.safetensors"}, "its recipe has the vae '../x.safetensors', expected a number, merge, or a file"),
    ({"vae": {"file": 0}}, "its recipe takes input 0 for two things"),
    ({"vae": {"file": 2}}, "its recipe names input 2, expected 0 to 1"),
    ({"vae": "3"}, "its recipe asks for what merge refuses: --vae: there is no model 3, expected 1 to 2"),
    ({"like": "0"}, "its recipe has the like '0', expected a whole number"),
    ({"like": True}, "its recipe has the like True, expected a whole number"),
    ({"numbered": []}, "its recipe numbers 0 models, expected 1 or more"),
    ({"merge": {"model": 1}}, "the tree of its recipe takes its inputs in another order than they are listed"),
    ({"merge": {"lora": 0}}, "its recipe takes input 0 for two things"),
    ({"merge": {"method": "telepathy", "inputs": [], "parameters": {}}},
     "its recipe asks for what merge refuses: unknown merge method 'telepathy'"),
    ({"merge": {"method": "difference", "inputs": [{"model": 0}, {"model": 1}], "parameters": {}}},
     "the tree of its recipe makes a difference, expected a model"),
    ({"merge": {"model": 0, "path": "/etc"}}, "its recipe says 'path', which this version does not know"),
    ({"dtype": "fp17"}, "its recipe asks for what merge refuses: --dtype: unknown dtype 'fp17'"),
    ({"drop": "vae"}, "its recipe has the drop 'vae', expected texts"),
], ids=str)  # fmt: skip
def test_what_no_recipe_of_ours_says_is_refused_in_a_line(words: dict[str, Any], error: str) -> None:
    a, b, _ = three()
    weightops.merge(a, b, output=OUT)
    say(said() | words)
    with pytest.raises(FormatError) as e:
        weightops.replay(OUT)
    assert str(e.value) == f"out.safetensors: {error}"


def test_a_tree_without_end_is_refused() -> None:
    a, b, _ = three()
    weightops.merge(a, b, output=OUT)
    tree: Any = {"model": 0}
    for _ in range(60):
        tree = {"method": "weighted_sum", "inputs": [tree, {"model": 1}], "parameters": {}}
    say(said() | {"merge": tree})
    with pytest.raises(FormatError, match="nested more than 100 deep"):
        weightops.replay(OUT)
    wide = {"method": "weighted_sum", "inputs": [{"model": 0}] * 20_000, "parameters": {}}
    weightops.merge(a, b, output=OUT, force=True)
    say(said() | {"merge": wide})
    with pytest.raises(FormatError, match="the tree of its recipe is too large"):
        weightops.replay(OUT)


def test_a_file_without_a_recipe_and_one_of_an_earlier_form_are_refused_in_a_line() -> None:
    a, b, _ = three()
    with pytest.raises(MismatchError) as e:
        weightops.replay(a)
    assert str(e.value) == "a.safetensors: has no recipe of weightops in its metadata: it cannot be made again"
    weightops.merge(a, b, output=OUT)
    old = {k: v for k, v in said().items() if k in ("command", "version", "inputs")}
    say(old | {"method": "weighted_sum", "parameters": {"weights": [0.5, 0.5]}})
    with pytest.raises(FormatError, match="of an earlier version, which had no trees of methods"):
        weightops.replay(OUT)


def test_one_file_of_a_folder_is_told_from_the_folder() -> None:
    three()
    weightops.convert("a.safetensors", shard_size=1000, output="folder")
    shard = sorted(Path("folder").glob("*.safetensors"))[0]
    with pytest.raises(UsageError, match=r"is one file of a folder that was made$") as e:
        weightops.replay(shard, ["."])
    assert e.value.hint == "name the folder"
    assert line("folder/model.safetensors.index.json").startswith("identical: ")


ODD = (None, True, -1, 10**400, 1e308, "", "x" * 5000, "../../etc/passwd", [], {}, [[]], [{}], {"a": []}, "\0", 3, 0)


def odd_recipes(recipe: Any, seed: int) -> list[Any]:
    """The recipe with one value in it, however deep, replaced or gone."""
    found: list[Any] = []

    def walk(value: Any, put: Callable[[Any], Any]) -> None:
        chance = random.Random(f"{seed} {len(found)}")
        found.extend(put(chance.choice(ODD)) for _ in range(3))
        if isinstance(value, dict):
            for key, child in value.items():
                found.append(put({k: v for k, v in value.items() if k != key}))
                walk(child, lambda new, k=key, d=value: put({**d, k: new}))
        elif isinstance(value, list):
            for n, child in enumerate(value):
                walk(child, lambda new, n=n, d=value: put([*d[:n], new, *d[n + 1 :]]))

    walk(recipe, lambda new: new)
    return found


ODDLY = ("merge", "fuse", "extract, by energy", "resize, by energy", "combine, ties", "convert")


@pytest.mark.parametrize("verb", ODDLY)
def test_no_recipe_however_odd_is_more_than_a_line(verb: str) -> None:
    """It is made again, or refused: no other exception, and no file is opened but those that lie there."""
    three(), lora("l.safetensors", 5), lora("k.safetensors", 6, 2)
    if verb == "merge":
        recipe("""
            merge:
              add:
                - {ties: [a.safetensors, b.safetensors], base: c.safetensors, density: {layers.0: 0.3, default: 0.5}}
                - {lora: l.safetensors, strength: 0.6}
            """)
    else:
        VERBS[verb]()
    tensors, refused = load_file(OUT), 0
    for odd in odd_recipes(said(), 1):
        try:
            text = json.dumps(odd)
        except ValueError:  # more digits than Python writes
            continue
        save(OUT, tensors, {"weightops": text})
        error = ""
        try:
            weightops.replay(OUT)
        except WeightopsError as e:
            error = str(e)
        refused += bool(error)
        assert len(error.splitlines()) <= 1
        assert len(error) < 1000
    assert refused > 20
    assert not list(Path().glob("*replay*"))
