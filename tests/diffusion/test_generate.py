"""Images: diffusers' own to the last bit, each from its own seed whatever stands beside it, each saying how it came."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import save

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from commandline import weightops_here

from weightops import __version__
from weightops.diffusion import generate as module
from weightops.diffusion.extras import hushed
from weightops.diffusion.generate import generate
from weightops.diffusion.grids import Grid, lay_out
from weightops.diffusion.models import networks
from weightops.diffusion.png_text import read_recipe_of_png, read_texts
from weightops.diffusion.prompts import Prompt
from weightops.diffusion.sampling import Sampled, Sampling
from weightops.diffusion.tiny import tiny_model
from weightops.errors import Interrupted, MemoryRefused, MismatchError, OutputError, UsageError, WeightopsError, quote
from weightops.lineage import read_recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightops.diffusion.generate import GenerateReport

with hushed():
    diffusers = pytest.importorskip("diffusers")
    Image = pytest.importorskip("PIL.Image")

torch.set_num_threads(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' schedulers
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SMALL: dict[str, Any] = {"prompt": "a cat", "steps": 1, "size": (64, 64)}


def lora(path: Path, seed: int, scale: float = 2.0, *, steps: int | None = None, loha: bool = False) -> Path:
    """Of the attentions in the UNet of the tiny SD1.5, strong enough to be seen."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for block, width in (("down_blocks_0", 32), ("down_blocks_2", 64), ("mid_block", 64), ("up_blocks_3", 32)):
        for layer in ("to_q", "to_v", "to_out_0"):
            key = f"lora_unet_{block}_attentions_0_transformer_blocks_0_attn1_{layer}"
            up, down = (torch.randn(width, 4, generator=draw), torch.randn(4, width, generator=draw))
            if loha:
                found |= {f"{key}.hada_w1_a": up * scale, f"{key}.hada_w1_b": down, f"{key}.hada_w2_a": up.roll(1, 0),
                          f"{key}.hada_w2_b": down.roll(1, 0)}  # fmt: skip
            else:
                found |= {f"{key}.lora_up.weight": up * scale, f"{key}.lora_down.weight": down * width**-0.5}
            found[f"{key}.alpha"] = torch.tensor(2.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(path, found, None if steps is None else {"ss_steps": str(steps)})


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, LoRAs of several families, and what a training leaves."""
    root = tmp_path_factory.mktemp("generate")
    tiny_model("sd15", root / "sd15", seed=1)
    lora(root / "style.safetensors", 1, steps=30)
    lora(root / "person.safetensors", 2)
    lora(root / "odd.safetensors", 3, 1.0, loha=True)
    for step in (10, 20):
        lora(root / f"style-train/checkpoints/step-{step:06d}/lora.safetensors", 1, 2.0 * step / 30, steps=step)
        (root / f"style-train/checkpoints/step-{step:06d}/state.pt").touch()
    return root


@pytest.fixture(autouse=True)
def _in_a_folder(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in here.iterdir():
        (tmp_path / path.name).symlink_to(path)


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    """Tests of anything but loading share one model: its weights are its own again after LoRAs."""
    if not _LOADED:
        _LOADED["sd15"] = module.load(here / "sd15", where="generate")
    first = _LOADED["sd15"]
    own = _LOADED.setdefault("scheduler", first.pipe.scheduler)

    def load(model: str, **_words: Any) -> Any:
        first.pipe.scheduler, first.label, first.warnings = own, model, []
        return first

    monkeypatch.setattr(module, "load", load)


_LOADED: dict[str, Any] = {}


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened)


def made(report: GenerateReport) -> dict[tuple[str, int], np.ndarray]:
    """The images by column and seed."""
    return {(row["column"], row["seed"]): pixels(f"{report.output}/{row['file']}") for row in report.images}


def compared() -> tuple[np.ndarray, np.ndarray]:
    """The image without a LoRA, and that with the style, made once."""
    if "compared" not in _LOADED:
        found = made(generate("sd15", **SMALL, loras=["style.safetensors"], grid_over="lora", output="compared"))
        _LOADED["compared"] = found["no LoRA", 0], found["style", 0]
    return _LOADED["compared"]


def refusal(call: Callable[[], Any], kind: type[WeightopsError] = UsageError) -> tuple[str, str | None]:
    with pytest.raises(kind) as e:
        call()
    return str(e.value), e.value.hint


# ------------------------------------------------------------------------------------------------ one image


def test_an_image_is_the_one_that_diffusers_makes(tmp_path: Path) -> None:
    report = generate("sd15", **SMALL, seed=5, negative="blurred", guidance=4.0, output="cat.png")
    with hushed():
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "sd15")
        for network in networks(pipe).values():
            for parameter in network.parameters():  # aligned in memory: a product may round otherwise where it is not
                parameter.data = parameter.data.clone()
        theirs = pipe(
            "a cat", negative_prompt="blurred", guidance_scale=4.0, num_inference_steps=1, width=64, height=64,
            generator=torch.Generator().manual_seed(5),
        )  # fmt: skip
    assert (pixels("cat.png") == np.asarray(theirs.images[0])).all()
    assert (report.output, report.summary) == ("cat.png", "1 image of 64x64")
    assert [row["file"] for row in report.images] == ["cat.png"]
    assert not (tmp_path / "images.json").exists()
    assert report.bytes_written == (tmp_path / "cat.png").stat().st_size
    assert report.inputs[0]["hash"].startswith("xxh3_128:")


@pytest.mark.usefixtures("loaded_once")
def test_the_same_words_make_the_same_bytes_and_a_seed_the_same_image() -> None:
    generate("sd15", **SMALL, images=3, seed=4, output="three")
    generate("sd15", **SMALL, images=3, seed=4, output="again")
    for name in ("0001-a-cat.png", "0002-a-cat.png", "0003-a-cat.png", "images.json"):
        assert _read(f"three/{name}") == _read(f"again/{name}"), name
    generate("sd15", **SMALL, seed=6, output="alone.png")
    assert _read("alone.png") == _read("three/0003-a-cat.png")
    assert (pixels("three/0001-a-cat.png") != pixels("three/0002-a-cat.png")).any()


def _read(name: str) -> bytes:
    return Path(name).read_bytes()


@pytest.mark.usefixtures("loaded_once")
def test_a_batch_makes_the_same_images_but_for_the_last_bits() -> None:
    words = {**SMALL, "prompt": ["a cat", "a dog"], "images": 2}
    single = generate("sd15", **words, output="single")
    batch = generate("sd15", **words, batch=3, output="batch")
    for one, other in zip(single.images, batch.images, strict=True):
        difference = pixels(f"single/{one['file']}").astype(int) - pixels(f"batch/{other['file']}")
        assert abs(difference).max() <= 1
    assert read_recipe_of_png(f"batch/{batch.images[0]['file']}")["batch"] == 3
    assert "batch" not in read_recipe_of_png(f"single/{single.images[0]['file']}")


@pytest.mark.usefixtures("loaded_once")
def test_an_image_says_how_it_was_made(tmp_path: Path) -> None:
    loras = [(tmp_path / "style.safetensors", 0.5), "odd.safetensors"]
    generate("sd15", **SMALL, negative="blurred", loras=loras, scheduler="dpmpp-2m-karras", seed=3, output="a.png")
    data = _read("style.safetensors")
    short = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()[:12]
    texts = read_texts("a.png")
    head, tail = texts["parameters"].split("Lora hashes: ")
    assert head == (
        "a cat <lora:style:0.5> <lora:odd:1>\nNegative prompt: blurred\nSteps: 1, Sampler: DPM++ 2M, "
        "Schedule type: Karras, CFG scale: 7.5, Seed: 3, Size: 64x64, Model: sd15, RNG: CPU, "
    )
    assert tail.startswith(f'"style: {short}, odd: ')
    recipe = read_recipe_of_png("a.png")
    assert recipe == read_recipe(texts["weightops"], "a.png")
    assert [entry["name"] for entry in recipe["inputs"]] == ["sd15", "style.safetensors", "odd.safetensors"]
    assert len({entry["hash"] for entry in recipe["inputs"]}) == 3
    assert recipe["loras"] == [
        {"name": "style", "strength": 0.5, "way": "adapter"}, {"name": "odd", "strength": 1.0, "way": "fused"}
    ]  # fmt: skip
    assert recipe["scheduler"] == {"name": "dpmpp-2m-karras", "class": "DPMSolverMultistepScheduler"}
    assert set(recipe["versions"]) == {"weightops", "torch", "diffusers", "transformers", "peft"}
    known = {"command": "generate", "prompt": "a cat", "negative": "blurred", "seed": 3, "steps": 1, "guidance": 7.5}
    known |= {"size": [64, 64], "model": "sd15", "architecture": "sd15", "device": "cpu", "dtype": "float32"}
    assert {name: recipe[name] for name in known} == known
    assert str(tmp_path).encode() not in _read("a.png")


# ------------------------------------------------------------------------------------------------ grids


def test_loras_stand_beside_no_lora_and_are_what_they_are_alone(tmp_path: Path) -> None:
    words: dict[str, Any] = {**SMALL, "images": 2, "loras": ["style.safetensors:0.5", "odd.safetensors"]}
    report = generate("sd15", **words, grid_over="lora", output="grid")
    found = made(report)
    assert list(dict.fromkeys(column for column, _ in found)) == ["no LoRA", "style:0.5", "odd"]
    alone = generate("sd15", **{**words, "loras": ["style.safetensors:0.5"]}, output="alone")
    for n, row in enumerate(alone.images):
        assert (found["style:0.5", n] == pixels(f"alone/{row['file']}")).all()
    for column in ("style:0.5", "odd"):
        assert (found[column, 0] != found["no LoRA", 0]).any()
    assert [(row["name"], row["way"], row["modules"], row["reason"]) for row in report.loras] == [
        ("style", "adapter", 12, ""), ("odd", "fused", 12, "diffusers does not apply loha as it is meant")
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "grid").iterdir()) == [
        "0001-no-lora-a-cat.png", "0002-style-0-5-a-cat.png", "0003-odd-a-cat.png", "0004-no-lora-a-cat.png",
        "0005-style-0-5-a-cat.png", "0006-odd-a-cat.png", "grid.png", "images.json",
    ]  # fmt: skip
    listed = json.loads(_read("grid/images.json"))
    assert listed["finished"] is True
    assert listed["images"] == report.images
    assert listed["grid"] == report.grid == {
        "file": "grid.png", "over": "lora", "columns": ["no LoRA", "style:0.5", "odd"], "rows": ["seed 0", "seed 1"]
    }  # fmt: skip


@pytest.mark.usefixtures("loaded_once")
def test_a_grid_shows_its_images_where_its_labels_say() -> None:
    report = generate("sd15", **{**SMALL, "prompt": ["a cat", "ein Häuschen"]}, images=2, grid_over="seed", output="g")
    drawn = pixels("g/grid.png")
    cells = [[Image.new("RGB", (64, 64))] * 2] * 2
    note = "sd15 · 1 step · guidance 7.5"
    layout = lay_out(Grid(cells, ["seed 0", "seed 1"], ["a cat", "ein Häuschen"], "", note))
    assert drawn.shape[:2] == layout.size[::-1]
    for row in report.images:
        place = (["a cat", "ein Häuschen"].index(row["row"]), ["seed 0", "seed 1"].index(row["column"]))
        left, top, right, bottom = next(box for r, c, box in layout.cells if (r, c) == place)
        shown = drawn[top:bottom:3, left:right:3]  # three times as large
        assert (shown == pixels(f"g/{row['file']}")).all()
    recipe = read_recipe_of_png("g/grid.png")
    assert recipe["grid"] == {**(report.grid or {}), "images": [row["file"] for row in report.images]}


@pytest.mark.usefixtures("loaded_once")
def test_strengths_begin_at_no_lora_and_end_at_all_of_it() -> None:
    strengths = generate(
        "sd15", **SMALL, loras=["style.safetensors"], grid_over="strength", values="0..1:3", output="s"
    )
    by_strength = made(strengths)
    without, style = compared()
    assert (by_strength["strength 0", 0] == without).all()
    assert (by_strength["strength 1", 0] == style).all()
    assert (by_strength["strength 0.5", 0] != style).any()


@pytest.mark.usefixtures("loaded_once")
def test_steps_are_the_checkpoints_of_a_training() -> None:
    steps = made(generate("sd15", **SMALL, loras=["style.safetensors"], grid_over="step", output="steps"))
    assert [column for column, _ in steps] == ["step 0 (base)", "step 10", "step 20", "step 30"]
    without, style = compared()
    assert (steps["step 0 (base)", 0] == without).all()
    off = [int(abs(steps[column, 0].astype(int) - style).sum()) for column, _ in steps]
    assert off[0] > 0
    assert off[2] > 0 == off[3]
    names = [entry["name"] for entry in read_recipe_of_png("steps/grid.png")["inputs"]]
    assert names == ["sd15", "lora.safetensors", "style-step-000020", "style.safetensors"]


def test_models_stand_side_by_side(here: Path) -> None:
    if not (here / "other").exists():
        tiny_model("sd15", here / "other", seed=2)
    models = [here / "sd15", here / "other"]
    report = generate(models, **SMALL, grid_over="model", output="models")
    assert (report.grid or {})["columns"] == ["sd15", "other"]
    found = made(report)
    assert (found["sd15", 0] != found["other", 0]).any()
    assert len({entry["hash"] for entry in report.inputs}) == 2


@pytest.mark.usefixtures("loaded_once")
def test_prompts_are_columns_or_rows_and_a_file_says_more_of_them(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,steps,guidance,negative\na dog,2,2,\na house,,,bad\n")
    report = generate("sd15", **SMALL, prompts="p.csv", grid_over="prompt", output="prompts")
    assert (report.grid or {})["columns"] == ["a cat", "a dog", "a house"]
    assert [(row["steps"], row["guidance"], row.get("negative")) for row in report.images] == [
        (1, 7.5, None), (2, 2.0, None), (1, 7.5, "bad")
    ]  # fmt: skip
    plain = generate("sd15", **SMALL, prompts="p.csv", output="plain")
    assert [row["file"] for row in plain.images] == ["0001-a-cat.png", "0002-a-dog.png", "0003-a-house.png"]
    for row in plain.images:
        assert (pixels(f"plain/{row['file']}") == pixels(f"prompts/{row['file']}")).all()
    assert plain.grid is None
    assert not (tmp_path / "plain" / "grid.png").exists()


# ------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.usefixtures("loaded_once")
def test_what_an_earlier_run_made_is_replaced_when_asked_and_nothing_else(tmp_path: Path) -> None:
    generate("sd15", **SMALL, images=2, grid_over="seed", output="out")
    (tmp_path / "out" / "mine.txt").write_text("x")
    (tmp_path / "out" / "0009-mine.png").write_text("x")
    assert refusal(lambda: generate("sd15", **SMALL, output="out"), OutputError) == (
        "out: exists", "choose another name, or replace it with --force"
    )  # fmt: skip
    generate("sd15", **{**SMALL, "prompt": "a dog"}, output="out", force=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "0001-a-dog.png", "0009-mine.png", "images.json", "mine.txt"
    ]  # fmt: skip


@pytest.mark.usefixtures("loaded_once")
def test_an_interrupted_run_leaves_whole_images_and_says_so(tmp_path: Path) -> None:
    def on_progress(done: int, total: int) -> None:
        assert total == 4
        if done == 3:
            raise Interrupted("", "interrupted: nothing was written, and no input was changed")

    with pytest.raises(Interrupted) as e:
        generate("sd15", **SMALL, images=4, grid_over="seed", output="out", on_progress=on_progress)
    assert str(e.value) == "interrupted: 2 of 4 images are whole in 'out', without a grid"
    names = ["0001-seed-0-a-cat.png", "0002-seed-1-a-cat.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*names, "images.json"]
    listed = json.loads(_read("out/images.json"))
    assert (listed["finished"], [row["file"] for row in listed["images"]]) == (False, names)
    assert read_recipe_of_png("out/0002-seed-1-a-cat.png")["seed"] == 1


@pytest.mark.usefixtures("loaded_once")
def test_a_run_that_makes_nothing_leaves_nothing(tmp_path: Path) -> None:
    def on_progress(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"^interrupted: no image was made, and no input was changed$"):
        generate("sd15", **SMALL, images=2, output="out", on_progress=on_progress)
    assert refusal(lambda: generate("sd15", **{**SMALL, "size": (68, 64)}, images=2, output="out")) == (
        "--size: found 68x64, expected multiples of 8 for sd15", None
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("loaded_once")
def test_too_little_memory_is_a_sentence_with_the_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = type(_LOADED["sd15"].pipe).__call__

    def call(self: Any, *words: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, *words, **more)

    call.__signature__ = inspect.signature(real)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(_LOADED["sd15"].pipe), "__call__", call)
    error, hint = refusal(lambda: generate("sd15", **SMALL, images=3, output="out"), MemoryRefused)
    assert error == "sd15: not enough memory for 1 image of 64x64 at once"
    assert hint == (
        "less is needed with --dtype fp16 or bf16, --offload, --tiling, --batch 1, or a smaller --size; "
        "1 of 3 images are whole in 'out'"
    )


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize(
    ("sampled", "dtype", "warning"),
    [
        (Sampled(np.zeros((8, 8, 3), np.uint8), True, True, True), "float32",
         "'0001-a-cat.png', '0002-a-cat.png': blanked by the safety checker that the model brings"),
        (Sampled(np.zeros((8, 8, 3), np.uint8), True, False, False), "float16",
         "'0001-a-cat.png', '0002-a-cat.png': values that are no numbers (NaN) were drawn black; --dtype fp32 is the "
         "remedy"),
        (Sampled(np.zeros((8, 8, 3), np.uint8), True, False, False), "float32",
         "'0001-a-cat.png', '0002-a-cat.png': values that are no numbers (NaN) were drawn black; the model or a LoRA "
         "is broken"),
        (Sampled(np.zeros((8, 8, 3), np.uint8), True, True, False), "float16",
         "'0001-a-cat.png', '0002-a-cat.png': is black all over; --dtype fp32 may be the remedy"),
    ],
)  # fmt: skip
def test_black_images_are_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, sampled: Sampled, dtype: str, warning: str
) -> None:
    monkeypatch.setattr(Sampling, "sample", lambda self, prompts, seeds, on_step: [sampled] * len(seeds))
    real = module.row_of
    monkeypatch.setattr(module, "row_of", lambda *words, **more: {**real(*words, **more), "dtype": dtype})
    assert generate("sd15", **SMALL, images=2, output="out").warnings == [warning]


def test_nan_and_black_are_seen_in_what_a_pipeline_returns() -> None:
    from weightops.diffusion.sampling import _checked

    values = np.full((2, 2, 3), 0.5, np.float32)
    assert _checked(values, blanked=False).pixels.tolist() == np.full((2, 2, 3), 128).tolist()
    values[0, 0, 0] = np.nan
    broken = _checked(values, blanked=False)
    assert (broken.finite, broken.black, broken.pixels[0, 0].tolist()) == (False, False, [0, 128, 128])
    assert _checked(np.zeros((2, 2, 3)), blanked=True).black


@pytest.mark.usefixtures("loaded_once")
def test_what_a_prompt_cannot_say_is_told() -> None:
    text = "a (cat:1.2) <lora:x:1> " + "word " * 20
    report = generate("sd15", **{**SMALL, "prompt": text}, output="a.png")
    assert [warning.removeprefix(f"{quote(text, 60)}: ") for warning in report.warnings] == [
        "<lora:…> is read as plain words; --lora FILE puts one on the model",
        "(words:1.2) is read as plain words, without the weight",
        f"takes {2 + len(text.replace(' ', ''))} tokens, and the model reads 77: the end is not seen",
    ]


def test_offloading_loads_into_the_cpus_memory_and_moves_one_network_at_a_time(
    monkeypatch: pytest.MonkeyPatch, loaded_once: None
) -> None:
    said: list[Any] = []
    shared = module.load

    def load(model: str, **words: Any) -> Any:
        said.append((words["device"], words["dtype"]))
        loaded = shared(model)
        monkeypatch.setattr(loaded.pipe, "remove_all_hooks", lambda: said.append("hooks off"))
        monkeypatch.setattr(loaded.pipe, "enable_model_cpu_offload", lambda device: said.append(device))
        return loaded

    monkeypatch.setattr(module, "load", load)
    monkeypatch.setattr(module, "cuda_of", lambda device: "cuda:0")
    report = generate(
        "sd15", **SMALL, loras=["style.safetensors"], grid_over="lora", offload=True, tiling=True, output="out"
    )  # fmt: skip
    _LOADED["sd15"].pipe.vae.disable_tiling()
    # fp16, as `load` would have chosen for a CUDA device; anew around each set of LoRAs.
    assert said == [("cpu", "fp16"), "hooks off", "cuda:0", "hooks off", "cuda:0"]
    assert report.device == "cuda:0"
    recipe = read_recipe_of_png("out/0001-no-lora-a-cat.png")
    assert (recipe["offload"], recipe["tiling"]) == (True, True)


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        ({"prompt": ()}, "generate: found no prompt, expected --prompt TEXT or --prompts FILE", None),
        ({"model": ()}, "generate: found no model, expected --model MODEL", None),
        ({"seed": -1}, "--seed: found -1, expected 0 to 9,223,372,036,854,775,806", None),
        ({"steps": 0}, "--steps: found 0, expected 1 to 1,000", None),
        ({"images": 0}, "--images: found 0, expected 1 to 1,000", None),
        ({"guidance": float("nan")}, "--guidance: found nan, expected 0 to 100", None),
        ({"batch": 0}, "--batch: found 0, expected 1 to 256", None),
        ({"scheduler": "eulr"}, "--scheduler: unknown scheduler 'eulr'", "did you mean euler?"),
        ({"output": "a.jpg"}, "a.jpg: images are written as PNG, which carries how they were made", "name it .png"),
        ({"output": "a.png", "images": 2}, "a.png: names one image, but 2 are to be made", "name a folder"),
        ({"output": "a.png", "images": 2, "grid_over": "seed"},
         "a.png: names one image, but 2 and a grid are to be made", "name a folder"),
        ({"output": "none/a.png"}, "none/a.png: the folder 'none' does not exist", "make it first"),
        ({"model": "no.safetensors"}, "no.safetensors: no such file", None),
        ({"loras": ["no.safetensors"]}, "no.safetensors: no such file", None),
        ({"loras": [("style.safetensors", float("inf"))]},
         "style.safetensors: found strength inf, expected a finite number", None),
        ({"prompt_2": "x"}, "--prompt-2: StableDiffusionPipeline takes no such word: it has no prompt_2", None),
        ({"negative_2": "x"},
         "--negative-2: StableDiffusionPipeline takes no such word: it has no negative_prompt_2", None),
        ({"true_guidance": 2.0},
         "--true-guidance: StableDiffusionPipeline takes no such word: it has no true_cfg_scale", None),
        ({"negative": "x", "guidance": 1.0},
         "--negative: found --guidance 1, with which no negative prompt is read", "--guidance above 1 reads it"),
        ({"steps": 1000}, "--steps: found 1000, which PNDMScheduler would count beyond the model's 1000 times of noise",
         "fewer do as well"),
        ({"offload": True}, "--offload: needs a CUDA device, found the CPU alone", None),
    ],
)  # fmt: skip
def test_every_wrong_word_has_its_sentence(words: dict[str, Any], error: str, hint: str | None) -> None:
    said: dict[str, Any] = {"model": "sd15", **SMALL, "output": "out.png", "device": "cpu", **words}
    model = said.pop("model")
    assert refusal(lambda: generate(model, **said), WeightopsError) == (error, hint)


# ------------------------------------------------------------------------------------------------ other pipelines


class Distilled:
    """What Flux's pipeline can be told; schnell has no place for a scale of guidance."""

    vae_scale_factor = 8
    vae = None

    def __init__(self, guided: bool) -> None:
        self.transformer = type("Transformer", (), {"config": {"guidance_embeds": guided}})()

    def __call__(
        self, prompt: Any = None, prompt_2: Any = None, negative_prompt: Any = None, true_cfg_scale: float = 1.0,
        guidance_scale: float = 3.5, num_inference_steps: int = 28,
    ) -> None: ...  # fmt: skip


class FromAnImage:
    vae = None

    def __call__(self, prompt: Any = None, image: Any = None) -> None: ...


class MadeImg2Img(FromAnImage):
    pass


def test_negative_prompts_of_distilled_models_want_a_scale_of_their_own() -> None:
    dev = Sampling(Distilled(guided=True), "flux", None)
    assert refusal(lambda: dev.check(Prompt("a", negative="b"))) == (
        "--negative: Distilled has its guidance distilled, and reads no negative prompt",
        "--true-guidance 2 reads it, and takes twice as long",
    )
    replace(dev, true_guidance=2.0).check(Prompt("a", negative="b"))
    assert refusal(lambda: replace(dev, true_guidance=2.0).check(Prompt("a")))[0] == (
        "--true-guidance: needs a --negative to guide away from; it may be empty"
    )
    assert (dev.steps(Prompt("a")), dev.guidance(Prompt("a")), dev.true_scale()) == (28, 3.5, 1.0)


def test_guidance_that_would_be_ignored_is_refused() -> None:
    schnell = Sampling(Distilled(guided=False), "schnell", None)
    assert refusal(lambda: schnell.check(Prompt("a", guidance=4.0)))[0] == (
        "--guidance: schnell was trained without a scale of guidance, and ignores it"
    )
    assert schnell.guidance(Prompt("a")) is None
    assert refusal(lambda: schnell.check(Prompt("a", size=(64, 72))))[0] == (
        "--size: found 64x72, expected multiples of 16 for schnell"
    )


def test_models_that_begin_with_an_image_are_refused() -> None:
    assert refusal(lambda: Sampling(MadeImg2Img(), "refiner", None).check(Prompt("a")), MismatchError) == (
        "refiner: is a MadeImg2Img, which makes no images from text alone", None
    )  # fmt: skip


def test_a_flux_makes_images_with_and_without_a_negative_prompt(here: Path) -> None:
    if not (here / "flux").exists():
        tiny_model("flux", here / "flux", seed=1)
    words = {**SMALL, "steps": 1}
    plain = generate(here / "flux", **words, output="plain.png")
    guided = generate(
        here / "flux", **words, negative="a dog", true_guidance=3.0, scheduler="euler", output="guided.png"
    )  # fmt: skip
    assert (pixels("plain.png") != pixels("guided.png")).any()
    assert (plain.images[0]["guidance"], plain.images[0]["true_guidance"]) == (3.5, 1.0)
    assert guided.images[0]["true_guidance"] == 3.0
    assert "CFG scale: 3, Distilled CFG Scale: 3.5" in read_texts("guided.png")["parameters"]


# ------------------------------------------------------------------------------------------------ the command line


@pytest.mark.usefixtures("loaded_once")
def test_the_command_line_says_what_was_made_and_which_way_loras_went() -> None:
    words = ["generate", "--model", "sd15", "--prompt", "a cat", "--steps", 1, "--size", "64x64", "-o", "out"]
    loras = ["--lora", "style.safetensors:0.5", "--lora", "odd.safetensors", "-n", 2, "--grid-over", "lora"]
    done = weightops_here(*words, *loras)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "6 images of 64x64, a grid over lora: 3 columns, 2 rows"
    assert lines[2:4] == [
        "style: beside the weights, by diffusers",
        "odd: fused into the weights: diffusers does not apply loha as it is meant",
    ]
    assert lines[5].split() == ["image", "seed", "column", "prompt"]
    assert lines[7].split() == ["0002-style-0-5-a-cat.png", "0", "style:0.5", "a", "cat"]
    assert any(line.startswith("wrote  out  ") for line in lines)
    assert " s an image, " in lines[-1]


@pytest.mark.usefixtures("loaded_once")
def test_json_is_one_document_and_quiet_is_quiet() -> None:
    words = ["generate", "--model", "sd15", "--prompt", "a (cat:1.1)", "--steps", 1, "--size", "64x64"]
    done = weightops_here(*words, "--json", "-o", "a.png")
    found = json.loads(done.out)
    assert (found["command"], found["version"], found["output"]) == ("generate", __version__, "a.png")
    assert found["images"][0]["seed"] == 0
    quiet = weightops_here(*words, "-q")
    assert quiet.out == ""
    assert quiet.err == (
        "warning: 'a (cat:1.1)': (words:1.2) is read as plain words, without the weight\n"
    )  # fmt: skip
    assert _read("sd15-a-cat-1-1-0.png") == _read("a.png")


def test_a_dry_run_reads_headers_alone(tmp_path: Path) -> None:
    words = ["generate", "--model", "sd15", "--prompt", "a cat", "--lora", "style.safetensors", "--dry-run"]
    done = weightops_here(*words, "--grid-over", "step", "--values", "0,20")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "would make 2 images, a grid over step: 2 columns, 1 row"
    assert lines[4].split() == ["0002-step-20-a-cat.png", "0", "step", "20", "a", "cat"]
    assert lines[-1] == "would write sd15-a-cat"
    assert not (tmp_path / "sd15-a-cat").exists()
    assert weightops_here("generate", "--model", "no", "--prompt", "a", "--dry-run").err == "error: no: no such file\n"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["a cat"], "error: generate: found 'a cat', expected options\nhint: a prompt stands after --prompt, a model "
         "after --model; videos are made by generate video\n"),
        (["--seed", "1", "video", "a.png", "--model", "m"],
         "error: generate video: found --seed before it\nhint: say its options after video\n"),
        ([], "error: generate: found no model, expected --model MODEL\n"),
        (["--model", "sd15", "--prompt", "a", "--grid-over", "prompt"],
         "error: --grid-over: found 1 column for a grid over prompt, expected 2 to 100\n"
         "hint: --prompt TEXT may be said several times, --prompts FILE lists them\n"),
    ],
)  # fmt: skip
def test_wrong_use_is_told_in_a_line(words: list[str], error: str) -> None:
    assert weightops_here("generate", *words) == (2, "", error)
