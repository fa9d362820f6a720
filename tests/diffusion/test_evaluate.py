"""Tables recompute from the images, losses from `objectives`, norms from dense float64; same words, same bytes."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from loras import Maker, deltas, named, save

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from commandline import STYLES, harmful, weightops_here

import weightops
from weightops.diffusion import drift as drifting
from weightops.diffusion import held_out as holding
from weightops.diffusion import image_pairs
from weightops.diffusion.adapters import wear
from weightops.diffusion.compared import compared_of
from weightops.diffusion.dataset import Framing, read_examples
from weightops.diffusion.encoding import encode, encoding_of
from weightops.diffusion.evaluate import EvaluateReport, evaluate, held_out_score
from weightops.diffusion.figures import curve
from weightops.diffusion.findings import with_each
from weightops.diffusion.metrics import psnr, ssim
from weightops.diffusion.models import load
from weightops.diffusion.objectives import held_out_loss, objective_of
from weightops.diffusion.sprites import sprites
from weightops.diffusion.tiny import tiny_model
from weightops.diffusion.trained_images import trained_on
from weightops.errors import FormatError, MismatchError, OutputError, UsageError, ValueRefused, WeightopsError
from weightops.lineage import KEY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightops.diffusion.models import Loaded

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")
torch.set_num_threads(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' schedulers
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

IMAGES = 3
PAIRS = 4


# ------------------------------------------------------------------------------------------------ what is measured


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluated")


@pytest.fixture(scope="module")
def model(root: Path) -> Path:
    return tiny_model("sd15", root / "sd15", seed=1)


@pytest.fixture(scope="module")
def loaded(model: Path) -> Loaded:
    return load(model, where="evaluate")


@pytest.fixture(scope="module")
def unseen(root: Path) -> Path:
    return sprites(root / "unseen", count=IMAGES, seed=4)


def modules(loaded: Loaded) -> dict[str, Any]:
    """kohya's names and the modules: two attentions of the UNet, a convolution, and a text encoder's layer."""
    ends = ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "up_blocks.1.attentions.2.proj_out")
    found = {
        f"lora_unet_{name.replace('.', '_')}": module
        for name, module in loaded.pipe.unet.named_modules() if name in (*ends, "down_blocks.0.resnets.1.conv1")
    }  # fmt: skip
    for name, module in loaded.pipe.text_encoder.named_modules():
        if name.endswith("layers.1.self_attn.q_proj"):
            found[f"lora_te_text_model_{name.removeprefix('text_model.').replace('.', '_')}"] = module
    assert len(found) == 4
    return found


def lora(path: Path, loaded: Loaded, *, size: float, seed: int = 3, metadata: Mapping[str, str] | None = None) -> Path:
    """A LoRA of rank 8 and alpha 4."""
    maker, found = Maker(seed), {}
    for name, module in modules(loaded).items():
        out, features, *kernel = module.weight.shape
        parts = maker.lora(out, features, 8, 4.0, kernel)
        found[name] = {key: value if key == ".alpha" else value * size for key, value in parts.items()}
    return save(path, named(found), metadata)


@pytest.fixture(scope="module")
def style(root: Path, loaded: Loaded) -> Path:
    return lora(root / "style.safetensors", loaded, size=0.1)


@pytest.fixture(scope="module")
def run(root: Path, loaded: Loaded, style: Path) -> Path:
    """What a training leaves beside its LoRA: two checkpoints, of which the last is `style`."""
    folder = root / "cat-train"
    for step in (20, 100):
        place = folder / "checkpoints" / f"step-{step:06d}"
        place.mkdir(parents=True)
        (place / "state.pt").write_bytes(b"")
    lora(folder / "checkpoints" / "step-000020" / "lora.safetensors", loaded, size=0.01 * math.sqrt(20))
    shutil.copy(style, folder / "checkpoints" / "step-000100" / "lora.safetensors")
    return folder


@pytest.fixture(scope="module")
def prompts(root: Path) -> Path:
    path = root / "prompts.txt"
    path.write_text("a tree\n")
    return path


@pytest.fixture(scope="module")
def words(model: Path, unseen: Path, run: Path, prompts: Path) -> dict[str, Any]:
    return {
        "folder": unseen, "model": model, "loras": [f"{run}:-0.5"], "resolution": 64, "pairs": PAIRS, "seed": 5,
        "trained_on": unseen, "drift_prompts": prompts, "steps": 1, "prompt": "a big red ball",
    }  # fmt: skip


@pytest.fixture(scope="module")
def report(root: Path, words: dict[str, Any]) -> EvaluateReport:
    return evaluate(**words, output=root / "evaluation")


LABELS = ("cat:-0.5 step 20", "cat:-0.5 step 100")


def rows(table: Any) -> dict[str, tuple[Any, ...]]:
    return {row[0]: row[1:] for row in table.rows}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


# ------------------------------------------------------------------------------------------------ held-out loss


def test_held_out_losses_are_those_of_the_objective(
    report: EvaluateReport, loaded: Loaded, unseen: Path, run: Path
) -> None:
    examples = read_examples(unseen, where="test").examples
    encoded = encode(loaded, examples, Framing((64, 64), center_crop=True), cache_texts=False)
    encoding, objective = encoding_of(loaded, where="test"), objective_of(loaded)
    table = report.tables["held-out"]
    assert table.columns == (
        "model", "t 0-249", "t 250-499", "t 500-749", "t 750-999", "mean", "against base, %", "±, %"
    )  # fmt: skip
    found = rows(table)
    assert tuple(found) == ("base", *LABELS)
    by_image = report.tables["held-out-images"]
    assert by_image.columns == ("image", "base", *LABELS)
    losses = {}
    worn = (None, *(run / "checkpoints" / name / "lora.safetensors" for name in ("step-000020", "step-000100")))
    for number, (label, file) in enumerate(zip(found, worn, strict=True), 1):
        wear(loaded, () if file is None else [(file, -0.5)])
        losses[label] = held_out_loss(loaded, encoding, encoded, objective, pairs=PAIRS, seed=5, batch=4)
        assert found[label][:5] == (*losses[label].losses, losses[label].mean)
        assert tuple(row[number] for row in by_image.rows) == losses[label].examples
    wear(loaded, ())
    assert found["base"][5:] == (None, None)
    for label in LABELS:
        apart = np.array(losses[label].examples) - np.array(losses["base"].examples)
        percent, error = found[label][5:]
        assert percent == pytest.approx(100 * (losses[label].mean / losses["base"].mean - 1), rel=1e-9)
        assert error == pytest.approx(100 * apart.std(ddof=1) / math.sqrt(IMAGES) / losses["base"].mean, rel=1e-9)
    assert len({losses[label].mean for label in found}) == 3


def test_losses_by_steps_begin_with_the_model_alone(report: EvaluateReport) -> None:
    found = rows(report.tables["held-out"])
    lines = {"cat:-0.5": ([0.0, 20.0, 100.0], [found[label][4] for label in ("base", *LABELS)])}
    drawing = report.findings[0].drawings["held-out"]
    assert drawing.data == curve(lines, title=drawing.words, x="steps", y="mean loss")
    assert (Path(report.output) / "held-out.png").read_bytes() == drawing.data


def test_of_one_image_there_is_no_standard_error(root: Path, loaded: Loaded, style: Path) -> None:
    examples = read_examples(sprites(root / "one", count=1), where="test")
    done: list[int] = []
    compared = compared_of([style])
    measure = holding.HeldOutLoss(loaded, examples, compared, holding.Fixed(1, 0, (64, 64)), done.append)
    (found,) = with_each(loaded, compared, [measure])
    table = found.tables["held-out"]
    assert table.columns[1:3] == ("t 0-999", "mean")
    assert table.rows[1][-1] is None
    assert table.rows[1][-2] is not None
    assert table.note.endswith("Of one image there is no standard error.")
    assert done == [1, 1, 1]
    assert loaded.loras == ()


def test_a_loss_that_is_no_number_is_refused(root: Path, loaded: Loaded, unseen: Path, model: Path) -> None:
    broken = compared_of([lora(root / "broken.safetensors", loaded, size=1e18)])
    examples = read_examples(unseen, where="test")
    said = rf"{re.escape(str(model))}: its held-out loss with broken\.safetensors is (nan|inf), expected a number"
    measure = holding.HeldOutLoss(loaded, examples, broken, holding.Fixed(1, 0, (64, 64)), lambda _: None)
    with pytest.raises(ValueRefused, match=said):
        with_each(loaded, broken, [measure])
    assert loaded.loras == ()


def test_images_that_were_trained_on_are_named(tmp_path: Path, loaded: Loaded, unseen: Path) -> None:
    read = read_examples(unseen, where="test")
    base = {"name": "sd15", "hash": "xxh3_128:" + "0" * 32}
    recipe = {"command": "train", "version": "0.1.0", "inputs": [base], "data": read.data_hash}
    known = lora(tmp_path / "known.safetensors", loaded, size=0.1, metadata={KEY: json.dumps(recipe)})
    said = read_examples(unseen, where="test", prompt="sks ball").data_hash
    place = tmp_path / "subject-train" / "checkpoints" / "step-000010"
    place.mkdir(parents=True)
    (place / "state.pt").write_bytes(b"")
    lora(place / "lora.safetensors", loaded, size=0.1)
    settings = {"command": "train dreambooth", "data": said, "words": {"instance_prompt": "sks ball"}}
    (tmp_path / "subject-train" / "settings.json").write_text(json.dumps(settings))
    other = lora(tmp_path / "other.safetensors", loaded, size=0.1, metadata={KEY: json.dumps({**recipe, "data": "x"})})
    trained = sprites(tmp_path / "trained", count=2, seed=9)
    shutil.copy(unseen / "sprite-001.png", trained / "again.png")
    bright = Image.open(unseen / "sprite-002.png").convert("RGB").point(lambda v: min(255, v + 4))
    bright.save(trained / "brighter.png")
    names = "'sprite-000.png', 'sprite-001.png', 'sprite-002.png'"
    found = compared_of([known, tmp_path / "subject-train", other])
    assert trained_on(read, found, str(trained)) == [
        f"known, subject step 10: trained on these very images, which are not held out: {names}",
        "--trained-on: 1 of 3 images was trained on, and not held out: 'sprite-001.png'",
        "--trained-on: 1 of 3 images looks like one that was trained on: 'sprite-002.png'",
    ]
    assert trained_on(read, found[2:], None) == []


# ------------------------------------------------------------------------------------------------ norms


def block_of(name: str) -> str:
    blocks = {
        "down_blocks_1_attentions_0": "IN04", "up_blocks_1_attentions_2": "OUT05", "down_blocks_0_resnets_1": "IN02",
        "lora_te_": "text_encoder.1",
    }  # fmt: skip
    return next(block for part, block in blocks.items() if part in name)


def test_norms_are_those_of_dense_float64(report: EvaluateReport, loaded: Loaded, style: Path) -> None:
    weights = {name: module.weight.detach().double() for name, module in modules(loaded).items()}
    made = {name: delta.double() * -0.5 for name, delta in deltas(style).items()}
    assert {name: tuple(delta.shape) for name, delta in made.items()} == {n: tuple(w.shape) for n, w in weights.items()}
    whole = rows(report.tables["norms"])[LABELS[1]]
    delta = math.sqrt(sum(float(d.square().sum()) for d in made.values()))
    weight = math.sqrt(sum(float(w.square().sum()) for w in weights.values()))
    assert whole[:3] == (-0.5, 4, "8")
    assert whole[3:6] == pytest.approx((delta, weight, 100 * delta / weight), rel=1e-5)
    by_block, changes = (rows(report.tables[name]) for name in ("norms-by-block", "changes-by-block"))
    assert list(by_block) == list(changes) == ["IN02", "IN04", "OUT05", "text_encoder.1"]
    shares = {}
    for name, d in made.items():
        block = block_of(name)
        shares[block] = 100 * float(d.norm()) / float(weights[name].norm())
        assert by_block[block][1] == pytest.approx(float(d.norm()), rel=1e-5)
        assert changes[block][1] == pytest.approx(shares[block], rel=1e-5)
    assert whole[6] == max(shares, key=lambda block: shares[block])
    first = rows(report.tables["norms"])[LABELS[0]]
    assert first[3:6] == pytest.approx((delta * 0.2, weight, 20 * delta / weight), rel=1e-5)


def test_norms_stand_alone_without_a_model_and_need_no_pipeline(
    tmp_path: Path, style: Path, model: Path, report: EvaluateReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightops.diffusion.evaluate.load", None)
    alone = evaluate(loras=[(style, -0.5)], output=tmp_path / "alone")
    beside = evaluate(loras=[(style, -0.5)], model=model, output=tmp_path / "beside")
    (row,), (other,) = alone.tables["norms"].rows, beside.tables["norms"].rows
    assert row[:5] == other[:5] == (row[0], *report.tables["norms"].rows[1][1:5])
    assert row[5:7] == (None, None)
    assert other[5:] == report.tables["norms"].rows[1][5:]
    assert "changes-by-block" not in alone.tables
    assert alone.tables["norms"].note.endswith("‖W‖ is not known: --model gives it.")
    assert [left.part for left in alone.left_out] == [
        "PSNR and SSIM", "LPIPS", "CLIP similarity", "held-out loss", "drift"
    ]  # fmt: skip


def test_what_has_no_norm_is_named(tmp_path: Path, loaded: Loaded, model: Path) -> None:
    name, module = next(iter(modules(loaded).items()))
    out, features, *kernel = module.weight.shape
    parts = Maker(2).lora(out, features, 4, 4.0, kernel)
    parts[".dora_scale"] = module.weight.detach().flatten(1).norm(dim=1).reshape(-1, *[1] * (module.weight.dim() - 1))
    dora = save(tmp_path / "dora.safetensors", named({name: parts}))
    alone = evaluate(loras=[dora], output=tmp_path / "alone")
    assert alone.tables["norms"].rows == (("dora", 1.0, 0, "", None, None, None, None),)
    assert len(alone.warnings) == 1
    assert alone.warnings[0].startswith("dora: no norm is known: ")
    assert "its change depends" in alone.warnings[0] or "whose change depends" in alone.warnings[0]
    beside = evaluate(loras=[dora], model=model, output=tmp_path / "beside")
    row = beside.tables["norms"].rows[0]
    weight = module.weight.detach().double()
    product = (parts[".lora_up.weight"].flatten(1) @ parts[".lora_down.weight"].flatten(1)).double()
    whole = weight + product.reshape(weight.shape)
    changed = whole / whole.flatten(1).norm(dim=1).reshape(-1, *[1] * (whole.dim() - 1)) * parts[".dora_scale"].double()
    assert row[4] == pytest.approx(float((changed - weight).norm()), rel=1e-4)
    assert beside.warnings == []


# ------------------------------------------------------------------------------------------------ drift


def test_drift_is_that_of_the_images_that_generate_makes(
    tmp_path: Path, report: EvaluateReport, model: Path, style: Path, prompts: Path
) -> None:
    made = {}
    for name, loras in (("without", []), ("with", [(style, -0.5)])):
        texts = ["a tree", "a big red ball"]
        weightops.generate(model, prompt=texts, loras=loras, steps=1, seed=5, size=(64, 64), output=tmp_path / name)
        made[name] = [pixels(path) for path in sorted((tmp_path / name).glob("*.png"))]
    pairs = list(zip(made["without"], made["with"], strict=True))
    found = [(psnr(a, b), ssim(a, b), float(np.sqrt(((a / 1.0 - b) ** 2).mean()))) for a, b in pairs]
    table = report.tables["drift"]
    names = ("PSNR in dB", "SSIM", "RMS")
    assert table.columns[1:] == tuple(f"{kind}: {name}" for kind in ("unrelated", "subject") for name in names)
    expected = [*found[0], *found[1]]
    assert rows(table)[LABELS[1]] == pytest.approx(expected, rel=1e-9)
    assert 0 < found[0][2] < 128
    by_image = [row for row in report.tables["drift-images"].rows if row[0] == LABELS[1]]
    assert [row[1:4] for row in by_image] == [
        ("a tree", "unrelated", 5), ("a big red ball", "subject", 5)
    ]  # fmt: skip
    assert [row[4:] for row in by_image] == [pytest.approx(pair) for pair in found]


def test_a_lora_of_no_strength_does_not_drift(tmp_path: Path, model: Path, style: Path, prompts: Path) -> None:
    found = evaluate(model=model, loras=[(style, 0.0)], drift_prompts=prompts, steps=1, output=tmp_path / "out")
    assert rows(found.tables["drift"])["style:0"] == (math.inf, 1.0, 0.0)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["tables"]["drift"]["rows"] == [
        ["style:0", "inf", 1.0, 0.0]
    ]
    assert found.to_dict()["tables"]["drift"]["rows"][0][1] == "inf"


def test_there_are_prompts_that_nobody_has_to_write() -> None:
    shown = drifting.shown_of([], None, images=2, seed=4, steps=None, guidance=None, size=None)
    assert [one.seed for one in shown] == [4, 5] * len(drifting.PROMPTS)
    assert list(dict.fromkeys(one.prompt.prompt for one in shown)) == list(drifting.PROMPTS)
    assert all(one.unrelated for one in shown)


# ------------------------------------------------------------------------------------------------ images


def picture(path: Path, seed: int, size: tuple[int, int] = (64, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def listed(folder: Path, over: str | None, columns: Sequence[str], labels: Sequence[str], **more: Any) -> Path:
    """A folder as generate leaves it: a grid of labels × columns, or without `over` one image of each label."""
    images = []
    for row, label in enumerate(labels):
        for column, name in enumerate(columns if over else [""]):
            file = f"{len(images) + 1:04}-{name.replace(' ', '-')}.png"
            picture(folder / file, seed=100 * row + column + 7)
            place = {"row": label, "column": name} if over else {}
            images.append({"file": file, "prompt": f"prompt {label}", **place})
    if over:
        picture(folder / "grid.png", 1, (200, 200))
    grid = {"over": over, "columns": list(columns), "rows": list(labels)} if over else None
    document = {"command": "generate", "finished": True, "images": images, "grid": grid, **more}
    (folder / "images.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def real(tmp_path: Path) -> Path:
    for number, (name, size) in enumerate({"x.png": (64, 64), "y.png": (96, 64), "z.png": (150, 200)}.items()):
        picture(tmp_path / "real" / name, number, size)
    return tmp_path / "real"


def fitted(path: Path) -> np.ndarray:
    """The middle square, scaled to 64 × 64."""
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS, box=box))


def test_tables_of_a_grid_recompute_from_its_images(tmp_path: Path, real: Path) -> None:
    steps = ["step 0 (base)", "step 20", "final"]
    grid = listed(tmp_path / "grid", "step", steps, ["a", "b", "c"])
    found = evaluate(real, generated=grid, output=tmp_path / "out")
    for name, metric in (("psnr", psnr), ("ssim", ssim)):
        table = found.tables[name]
        assert table.columns == ("generated", "x.png", "y.png", "z.png", "mean")
        assert [row[0] for row in table.rows] == steps
        for column, row in enumerate(table.rows):
            made = [pixels(grid / f"{3 * n + column + 1:04}-{steps[column].replace(' ', '-')}.png") for n in range(3)]
            against = [fitted(path) for path in sorted(real.glob("*.png"))]
            expected = [metric(a, b) for a, b in zip(against, made, strict=True)]
            assert row[1:4] == pytest.approx(expected, rel=1e-9)
            assert row[4] == pytest.approx(np.mean(expected), rel=1e-9)
        assert table.note == (
            "Images were put together in the order of their names. Of the real images 'y.png', 'z.png' were of another "
            "size: cut about their middles and scaled to 64x64 (Lanczos)."
        )
        with (tmp_path / "out" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            read = list(csv.reader(file))
        assert [float(cell) for cell in read[1][1:]] == list(table.rows[0][1:])
        assert (tmp_path / "out" / f"{name}.md").read_text() == table.to_markdown()
    assert {"psnr.png", "ssim.png"} <= set(found.files), "the means are drawn against steps"
    assert [entry["path"] for entry in found.inputs] == [str(real), str(grid)]


def test_of_a_grid_over_prompts_the_rows_are_rows(tmp_path: Path, real: Path) -> None:
    grid = listed(tmp_path / "grid", "prompt", ["a", "b", "c"], ["seed 1", "seed 2"])
    found = evaluate(real, generated=grid, output=tmp_path / "out")
    assert [row[0] for row in found.tables["psnr"].rows] == ["seed 1", "seed 2"]
    second = [pixels(path) for path in sorted(grid.glob("000[456]-*.png"))]
    expected = [psnr(fitted(a), b) for a, b in zip(sorted(real.glob("*.png")), second, strict=True)]
    assert found.tables["psnr"].rows[1][1:4] == pytest.approx(expected)


def test_folders_that_end_in_numbers_are_steps_in_their_order(tmp_path: Path, real: Path) -> None:
    for step in (100, 0, 20):
        for number in range(3):
            picture(tmp_path / f"cat{step}" / f"{number}.png", step + number)
    folders = [tmp_path / f"cat{step}" for step in (100, 0, 20)]
    found = evaluate(real, generated=folders, output=tmp_path / "out")
    assert [row[0] for row in found.tables["ssim"].rows] == ["cat0", "cat20", "cat100"]
    assert "ssim.png" in found.files
    shutil.copytree(tmp_path / "cat0", tmp_path / "plain")
    found = evaluate(real, generated=[*folders, tmp_path / "plain"], output=tmp_path / "other")
    assert [row[0] for row in found.tables["ssim"].rows] == ["cat100", "cat0", "cat20", "plain"]
    assert "ssim.png" not in found.files
    for version in (2, 1):
        shutil.copytree(tmp_path / "plain", tmp_path / f"style-v{version}")
    found = evaluate(real, generated=[tmp_path / "style-v2", tmp_path / "style-v1"], output=tmp_path / "versions")
    assert [row[0] for row in found.tables["ssim"].rows] == ["style-v2", "style-v1"]
    assert "ssim.png" not in found.files


def test_images_of_one_name_are_put_together_and_the_others_named(tmp_path: Path, real: Path) -> None:
    for seed, name in enumerate(("z.png", "x.jpg", "w.png")):
        picture(tmp_path / "made" / name, seed + 20, (48, 40))
    found = evaluate(real, generated=tmp_path / "made", output=tmp_path / "out")
    table = found.tables["psnr"]
    assert table.columns == ("generated", "x.png", "z.png", "mean")
    x = ImageOps.fit(Image.open(real / "x.png").convert("RGB"), (48, 40), Image.Resampling.LANCZOS)
    assert table.rows[0][1] == pytest.approx(psnr(np.asarray(x), pixels(tmp_path / "made" / "x.jpg")))
    assert table.note == (
        "Images were put together by their names. The real images were of another size: cut about their middles and "
        "scaled to 48x40 (Lanczos)."
    )
    assert found.warnings == [
        f"{real}: without a counterpart everywhere, and left out: 'y.png'",
        "made: without a counterpart everywhere, and left out: 'w.png'",
    ]


def test_clip_is_given_each_image_with_its_prompt(
    tmp_path: Path, real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    grid = listed(tmp_path / "grid", "lora", ["no LoRA", "cat"], ["a", "b"])
    asked: list[Any] = []

    def similarity(images: Sequence[Any], texts: Sequence[str], *, model: str, device: str) -> tuple[float, ...]:
        asked.append(([np.asarray(image) for image in images], tuple(texts), model, device))
        return tuple(0.1 * n + 0.2 * len(asked) for n in range(len(texts)))

    monkeypatch.setattr(image_pairs, "clip_similarity", similarity)
    found = evaluate(generated=grid, clip="some/clip", device="cpu", output=tmp_path / "out")
    assert [call[1:] for call in asked] == [(("prompt a", "prompt b"), "some/clip", "cpu")] * 2
    assert all(np.array_equal(a, pixels(grid / f"{n:04}-cat.png")) for a, n in zip(asked[1][0], (2, 4), strict=True))
    assert [row[:3] for row in found.tables["clip"].rows] == [
        ("no LoRA", 2, pytest.approx(0.25)), ("cat", 2, pytest.approx(0.45))
    ]  # fmt: skip
    assert found.tables["clip"].rows[0][3] == pytest.approx(0.05)
    assert found.tables["clip-images"].rows[3] == ("cat", "0004-cat.png", "prompt b", pytest.approx(0.5))


def test_lpips_is_measured_where_it_is_asked_for(
    tmp_path: Path, real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    grid = listed(tmp_path / "grid", "lora", ["no LoRA", "cat"], ["a", "b", "c"])
    monkeypatch.setattr(image_pairs, "lpips", lambda a, b, device="cpu": float(np.abs(a / 255 - b / 255).mean()))
    found = evaluate(real, generated=grid, lpips=True, output=tmp_path / "out")
    made, against = pixels(grid / "0002-cat.png"), fitted(real / "x.png")
    assert found.tables["lpips"].rows[1][1] == pytest.approx(np.abs(made / 255 - against / 255).mean())
    assert found.tables["lpips"].columns[-1] == "mean"


# ------------------------------------------------------------------------------------------------ the folder


def test_the_same_words_are_the_same_bytes(report: EvaluateReport, words: dict[str, Any], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    again = evaluate(**words, output=tmp_path / "again", on_progress=lambda *shown: seen.append(shown))
    assert seen == sorted(seen)
    assert seen[-1] == (IMAGES * (1 + 3 * PAIRS) + 2 + 2 * 3, seen[0][1]) == (seen[0][1],) * 2
    for name in report.files:
        assert (Path(report.output) / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == again.files == report.files
    assert again.bytes_written == sum(path.stat().st_size for path in (tmp_path / "again").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["again"], "nothing is left beside it"


def test_the_folder_says_all_that_the_report_says(report: EvaluateReport, root: Path) -> None:
    folder = Path(report.output)
    document = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    told = json.loads(json.dumps(report.to_dict()))
    assert told["command"] == document["command"] == "evaluate"
    assert told["version"] == document["version"] == weightops.__version__
    for name in ("parts", "tables", "left_out", "warnings"):
        assert document[name] == told[name]
    bare = [{"name": Path(entry["path"]).name, "hash": entry["hash"]} for entry in told["inputs"]]
    assert document["inputs"] == bare
    assert all(re.fullmatch("xxh3_128:[0-9a-f]{32}", entry["hash"]) for entry in told["inputs"])
    assert [Path(entry["path"]).name for entry in told["inputs"]][:2] == ["unseen", "sd15"]
    assert str(root) not in json.dumps(document), "no place stands in it"
    page = (folder / "evaluation.html").read_text(encoding="utf-8")
    for finding in report.findings:
        assert finding.says.replace("'", "&#x27;") in page
        for stem, table in finding.tables.items():
            assert table.title.replace("'", "&#x27;") in page
            assert {f"{stem}.csv", f"{stem}.md"} <= set(report.files)
    assert str(root) not in page
    assert page.count("data:image/png;base64,") == sum(len(finding.drawings) for finding in report.findings) == 5
    assert [finding.part for finding in report.findings] == ["held-out loss", "adapter norms", "drift"]
    names = "'sprite-000.png', 'sprite-001.png', 'sprite-002.png'"
    assert report.warnings == [f"--trained-on: 3 of 3 images were trained on, and not held out: {names}"]


def test_force_replaces_an_evaluation_and_nothing_else(tmp_path: Path, style: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    evaluate(loras=[style], output=target)  # what is empty is as if it were not there
    (target / "old.txt").write_text("old")
    with pytest.raises(OutputError, match="exists"):
        evaluate(loras=[style], output=target)
    evaluate(loras=[style], output=target, force=True)
    assert not (target / "old.txt").exists()
    shutil.copy(style, target / "held.safetensors")
    assert refusal(OutputError, loras=[target / "held.safetensors"], output=target, force=True) == (
        f"{target}: holds inputs, which --force would remove: {str(target / 'held.safetensors')!r}"
    )
    photos = tmp_path / "photos"
    picture(photos / "a.png", 1)
    assert refusal(OutputError, loras=[style], output=photos, force=True) == (
        f"{photos}: is no evaluation: it has no evaluation.json, and --force would remove all that is in it"
    )
    assert (photos / "a.png").exists()


# ------------------------------------------------------------------------------------------------ refusals


def refusal(kind: type[WeightopsError], **words: Any) -> str:
    with pytest.raises(WeightopsError) as told:
        evaluate(**words)
    assert type(told.value) is kind
    return str(told.value)


def test_there_has_to_be_something_to_measure(tmp_path: Path, unseen: Path, model: Path) -> None:
    nothing = "evaluate: found nothing that can be measured with what is given"
    assert refusal(UsageError) == nothing
    assert refusal(UsageError, folder=unseen) == nothing
    assert refusal(UsageError, model=model) == nothing
    with pytest.raises(UsageError) as told:
        evaluate(unseen)
    assert told.value.hint == (
        "PSNR and SSIM: needs --generated FOLDER; held-out loss: needs --model; adapter norms: needs --lora"
    )


def test_words_that_would_do_nothing_are_refused(unseen: Path, style: Path, model: Path) -> None:
    for words, message in (
        ({"pairs": 0}, "--pairs: found 0, expected 1 to 1,000"),
        ({"batch": 257}, "--batch: found 257, expected 1 to 256"),
        ({"seed": -1}, "--seed: found -1, expected 0 to 9,223,372,036,854,775,807"),
        ({"resolution": "large"}, "--resolution: found 'large', expected a number of pixels, or WIDTHxHEIGHT"),
        ({"drift": 0, "model": model}, "--drift: found 0, expected 1 or more images of each prompt"),
        ({"drift": 1}, "--drift: needs a --model and a --lora to compare it with"),
        ({"prompt": "a cat"}, "--prompt: is of the images of --drift, which is not asked for"),
        ({"steps": 3}, "--steps: is of the images of --drift, which is not asked for"),
        ({"clip": "some/clip"}, "--clip: needs --generated FOLDER, of weightops generate"),
        ({"lpips": True}, "--lpips: needs DIR with real images, and --generated FOLDER"),
        ({"trained_on": unseen}, "--trained-on: needs DIR and --model: it is for the held-out loss"),
        ({"drift": 1, "model": model, "resolution": 8},
         "--drift: found 8x8 pixels, expected at least 11x11, the least that SSIM can see"),
    ):  # fmt: skip
        assert refusal(UsageError, loras=[style], **words) == message  # type: ignore[arg-type]


def test_images_that_are_not_there_are_refused(tmp_path: Path, real: Path, model: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refusal(UsageError, folder=empty, model=model) == f"{empty}: holds no image"
    assert refusal(UsageError, folder=real, generated=empty) == f"{empty}: holds no image"
    assert refusal(UsageError, folder=tmp_path / "no", model=model) == f"{tmp_path / 'no'}: no such folder"
    for number in range(2):
        picture(tmp_path / "two" / f"{number}.png", number)
    assert refusal(MismatchError, folder=real, generated=tmp_path / "two") == (
        f"--generated: found 2 images in 'two', but 3 images in {real}"
    )
    for number in range(3):
        picture(tmp_path / "small" / f"{number}.png", number, (64, 10))
    assert refusal(UsageError, folder=real, generated=tmp_path / "small") == (
        "small: '0.png' has 64x10 pixels, expected at least 11x11, the least that SSIM can see"
    )
    picture(tmp_path / "twins" / "x.png", 1)
    picture(tmp_path / "twins" / "x.jpg", 2)
    assert refusal(MismatchError, folder=real, generated=tmp_path / "twins") == (
        "twins: 'x.jpg' and 'x.png' have one name without their suffixes"
    )
    picture(tmp_path / "y" / "y.png", 1)
    picture(tmp_path / "x" / "x.png", 1)
    assert refusal(MismatchError, folder=real, generated=[tmp_path / "x", tmp_path / "y"]) == (
        f"--generated: no image of {real} has one of its name in every row"
    )
    assert refusal(UsageError, folder=real, generated=[tmp_path / "x", tmp_path / "x"]) == (
        "--generated: found 'x x' twice"
    )


def test_without_captions_there_is_no_held_out_loss(tmp_path: Path, real: Path, model: Path, style: Path) -> None:
    missing = "3 of 3 pictures have no caption: 'x.png', 'y.png', 'z.png'"
    assert refusal(UsageError, folder=real, model=model) == f"{real}: {missing}"
    grid = listed(tmp_path / "grid", "lora", ["no LoRA", "cat"], ["a", "b", "c"])
    found = evaluate(real, generated=grid, model=model, output=tmp_path / "out")
    assert [f.part for f in found.findings] == ["PSNR and SSIM"]
    needs = {left.part: left.needs for left in found.left_out}
    assert needs["held-out loss"] == f"needs captions of DIR: {missing}"


def test_a_list_that_generate_did_not_write_is_refused(tmp_path: Path, real: Path) -> None:
    wrong = [{"images": [{"file": "a.png"}]}, {"images": []}, {"images": {}}]
    for number, change in enumerate([*wrong, {"grid": {"columns": [1]}}, {"grid": {"over": "step"}}]):
        folder = listed(tmp_path / f"grid{number}", "step", ["0", "1"], ["a", "b", "c"], **change)
        assert refusal(FormatError, folder=real, generated=folder) == (
            f"{folder}/images.json: is not the list that weightops generate writes"
        )
    folder = listed(tmp_path / "gone", "step", ["0", "1"], ["a", "b", "c"])
    (folder / "0001-0.png").unlink()
    assert refusal(FormatError, folder=real, generated=folder) == (
        f"{folder}/images.json: names images that are not there, or are broken: '0001-0.png'"
    )
    stopped = listed(tmp_path / "stopped", "step", ["0", "1"], ["a", "b", "c"], finished=False)
    found = evaluate(real, generated=stopped, output=tmp_path / "out")
    assert found.warnings == [f"{stopped}: the run that made these images was stopped before its end"]
    plain = tmp_path / "plain"
    picture(plain / "x.png", 1)
    assert refusal(UsageError, generated=plain, clip="some/clip") == (
        f"--clip: needs the prompts of the images in {plain}, expected images.json in it"
    )


def test_loras_that_do_not_fit_are_refused(
    tmp_path: Path, root: Path, unseen: Path, model: Path, style: Path, real: Path
) -> None:
    assert refusal(MismatchError, loras=[model]) == f"{model}: is a checkpoint, no LoRA"
    assert refusal(UsageError, loras=[style, style]) == f"--lora: found '{root.name}/style' twice"
    assert refusal(UsageError, loras=[real]) == (
        f"{real}: found no checkpoints: folders step-*/ or checkpoint-*/, or files with a number of steps"
    )
    base = shutil.copy(style, tmp_path / "base.safetensors")
    assert refusal(UsageError, loras=[base]) == (
        "--lora: found 'base' as a LoRA's name, which stands for the model alone"
    )
    flux = save(
        tmp_path / "flux.safetensors",
        named({"lora_unet_double_blocks_0_img_attn_proj": Maker(1).lora(3072, 3072, 4, 4.0)}),
    )  # fmt: skip
    assert refusal(MismatchError, folder=unseen, model=model, loras=[flux], resolution=64, pairs=1) == (
        f"{flux}: is for one of chroma, flux, flux2, hunyuan_video, but {model} is sd15"
    )


def test_models_whose_loss_is_not_known_are_refused(tmp_path: Path, unseen: Path, model: Path, style: Path) -> None:
    svd = tiny_model("svd", tmp_path / "svd")
    assert refusal(UsageError, folder=unseen, model=svd) == (
        f"{svd}: its architecture is not known, expected one of sd15, sd2, sdxl, sd3, flux"
    )
    assert refusal(MismatchError, loras=[style], model=svd, drift=1) == (
        f"{svd}: is a StableVideoDiffusionPipeline, which makes no images from text alone"
    )
    assert refusal(UsageError, folder=unseen, model=model, resolution=60) == (
        "--resolution: found 60 × 60 pixels, expected multiples of 8 for sd15"
    )
    assert refusal(MismatchError, folder=unseen, model=style) == f"{style}: expected a model, found: lora"


# ------------------------------------------------------------------------------------------------ LoRAs by name


def test_a_lora_knows_its_steps_and_names_are_told_apart(tmp_path: Path, loaded: Loaded, run: Path) -> None:
    lora(tmp_path / "a" / "cat.safetensors", loaded, size=0.1, metadata={"ss_steps": "40"})
    lora(tmp_path / "b" / "cat.safetensors", loaded, size=0.1)
    found = compared_of([str(tmp_path / "a" / "cat.safetensors"), (tmp_path / "b" / "cat.safetensors", 0.5), run])
    assert [(one.label, one.step, one.run) for one in found] == [
        ("cat", 40, "cat"), ("cat:0.5", None, "cat:0.5"), ("cat step 20", 20, "cat"), ("cat step 100", 100, "cat"),
    ]  # fmt: skip
    found = compared_of([tmp_path / "a" / "cat.safetensors", tmp_path / "b" / "cat.safetensors"])
    assert [one.label for one in found] == ["a/cat", "b/cat"]
    assert [(one.label, one.strength) for one in compared_of([f"{run}:0.5"])] == [
        ("cat:0.5 step 20", 0.5), ("cat:0.5 step 100", 0.5)
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ a score


def test_the_score_of_a_merge_is_the_held_out_loss_of_each_variant(
    root: Path, tmp_path: Path, model: Path, unseen: Path, loaded: Loaded
) -> None:
    other = tiny_model("sd15", root / "other", seed=2)
    score = held_out_score(unseen, pairs=2, resolution=64)
    report = weightops.merge(model, other, grid={"alpha": [0, 0.5]}, score=score, output=tmp_path / "grid")
    found = [row["scores"] for row in report.details["grid"]]
    examples, fixed = read_examples(unseen, where="test"), holding.Fixed(2, 0, (64, 64))
    loss = holding.prepare(loaded, examples, fixed).measure().mean
    assert [list(row) for row in found] == [["held_out_loss"]] * 2
    assert found[0]["held_out_loss"] == loss != found[1]["held_out_loss"]
    with (tmp_path / "grid" / "grid.csv").open(newline="", encoding="utf-8") as file:
        assert [float(row["held_out_loss"]) for row in csv.DictReader(file)] == [row["held_out_loss"] for row in found]
    with pytest.raises(UsageError, match="--pairs: found 0, expected 1 to 1,000"):
        held_out_score(unseen, pairs=0)
    with pytest.raises(UsageError, match="holds no image"):
        held_out_score(tmp_path / "grid")


# ------------------------------------------------------------------------------------------------ the command line


def test_the_command_draws_tables_and_what_they_say(
    tmp_path: Path, real: Path, style: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    grid = listed(tmp_path / "grid\x1b[31m", "lora", ["no LoRA", "c\x1b[2Jat"], ["a", "b", "c"])
    done = weightops_here("evaluate", real, "--generated", grid, "--lora", f"{style}:0.5", "-o", "out")
    assert (done.code, done.err) == (0, "")
    assert not harmful(done.out)
    shown = STYLES.sub("", done.out)
    for text in (
        "measured PSNR and SSIM, adapter norms; left out LPIPS, CLIP similarity, held-out loss, drift",
        "PSNR of generated against real images, in dB", "c\\x1b[2Jat", "x.png", "they are no measure of quality",
        "How much each LoRA changes", "not how well", "needs --model",
        "wrote  out",
    ):  # fmt: skip
        assert text in shown, text
    again = weightops_here("evaluate", real, "--generated", grid, "-o", "out")
    assert again == (1, "", "error: out: exists\nhint: choose another name, or replace it with --force\n")
    done = weightops_here("evaluate", real, "--generated", grid, "--force", "-o", "out", "--json")
    assert (done.code, done.err) == (0, "")
    told = json.loads(done.out)
    assert told["output"] == "out"
    assert told["tables"]["psnr"]["columns"][-1] == "mean"
    done = weightops_here("evaluate", "--lora", style, "-q")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert (tmp_path / "style-evaluation" / "evaluation.html").is_file()


def test_a_dry_run_says_what_would_be_measured_and_writes_nothing(
    tmp_path: Path, unseen: Path, model: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("weightops.diffusion.evaluate.load", None)
    done = weightops_here("evaluate", unseen, "--model", model, "--lora", run, "--drift", "1", "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert "would measure held-out loss, adapter norms, drift; left out PSNR and SSIM" in done.out
    assert f"would read {model}" in done.out
    assert "would write cat-evaluation" in done.out
    assert list(tmp_path.iterdir()) == []
