"""The verb: its words, presets and dry run; and a sentence for everything that it cannot do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trained import images, model, quietly, train

from weightops.diffusion import train as verb
from weightops.diffusion.lora_modules import TARGETS, Shape, choose_modules
from weightops.diffusion.sprites import sprites
from weightops.diffusion.tiny import tiny_model
from weightops.diffusion.training_words import DEFAULTS, PRESETS, RESOLUTIONS, Words, resolution_of
from weightops.errors import FormatError, MismatchError, OutputError, UsageError, WeightopsError
from weightops.ops.inspect import inspect

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from commandline import weightops_here

pytestmark = quietly

NOTHING: dict[str, Any] = {
    "kind": "text-to-image", "dialect": "kohya", "preset": None, "instance_prompt": None, "class_prompt": None,
    "class_images": None, "prior_weight": 1.0, "rank": None, "alpha": None, "conv_rank": None, "conv_alpha": None,
    "targets": None, "train_text_encoder": False, "text_encoder_lr": None, "dora": False, "init": "gaussian",
    "steps": None, "epochs": None, "batch": None, "accumulate": 1, "lr": None, "schedule": "constant", "warmup": 0,
    "optimizer": "adamw", "optimizer_set": {}, "betas": None, "eps": None, "weight_decay": None, "clip": 1.0,
    "snr_gamma": None, "noise_offset": 0.0, "prediction": None, "shift": None, "weighting": None, "resolution": None,
    "center_crop": False, "flip": None, "seed": 42, "mixed_precision": "no", "dtype": "auto",
}  # fmt: skip


def settled(**words: Any) -> Words:
    return Words(**{**NOTHING, **words}).settled()


# ------------------------------------------------------------------------------------------------ words


def test_nothing_said_is_the_studies_lora() -> None:
    """Rank 4, alpha 4, Gaussian, 1e-4: AdamW with its betas, decay and eps are torch's to be told."""
    from weightops.diffusion.optimizers import optimizer_class, settings_of

    found = settled()
    assert (found.rank, found.alpha, found.steps, found.batch, found.lr, found.flip) == (4, 4.0, 600, 1, 1e-4, False)
    assert (found.init, found.seed, found.clip, found.schedule, found.dtype) == (
        "gaussian",
        42,
        1.0,
        "constant",
        "fp32",
    )
    assert settings_of(found, optimizer_class("adamw")) == {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
    assert TARGETS["sd15"] == ("to_q", "to_k", "to_v", "to_out.0")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_studys_parameters_and_words_by_hand_win(name: str) -> None:
    found = settled(preset=name)
    assert {key: getattr(found, key) for key in PRESETS[name]} == PRESETS[name]
    ranks = {"style": (4, 4.0, 600), "character": (8, 4.0, 250)}
    assert (found.rank, found.alpha, found.steps) == ranks[name]
    assert (found.batch, found.resolution, found.flip, found.lr) == (2, (1024, 1024), True, 1e-4)
    by_hand = settled(preset=name, rank=16, flip=False, epochs=3, resolution=(512, 512))
    # An alpha that was meant for another rank would be another strength.
    assert (by_hand.rank, by_hand.alpha, by_hand.flip, by_hand.resolution) == (16, 16.0, False, (512, 512))
    assert (by_hand.steps, by_hand.epochs, by_hand.batch) == (None, 3, 2)
    assert settled(preset=name, alpha=1.0).alpha == 1.0


def test_weights_are_frozen_in_what_is_computed_in() -> None:
    assert settled(mixed_precision="bf16").dtype == "bf16"
    assert settled(mixed_precision="fp16").dtype == "fp16"
    assert settled(mixed_precision="fp16", dtype="fp32").dtype == "fp32"


def test_sizes_are_width_by_height_and_kept_as_height_and_width() -> None:
    assert resolution_of("768x512") == (512, 768)
    assert resolution_of(512) == resolution_of("512") == (512, 512)
    assert resolution_of(None) is None
    assert RESOLUTIONS == {"sd15": 512, "sd2": 768, "sdxl": 1024, "sd3": 1024, "flux": 1024}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"rank": 0}, "--rank: found 0, expected a whole number, 1 or more"),
        ({"conv_rank": 0}, "--conv-rank: found 0, expected a whole number, 1 or more"),
        ({"alpha": 0.0}, "--alpha: found 0, expected a number above 0"),
        ({"lr": float("nan")}, "--lr: found nan, expected a number above 0"),
        ({"lr": 0.0}, "--lr: found 0, expected a number above 0"),
        ({"steps": 0}, "--steps: found 0, expected a whole number, 1 or more"),
        ({"text_encoder_lr": 0.0, "train_text_encoder": True}, "--text-encoder-lr: found 0, expected a number above 0"),
        ({"clip": -1.0}, "--clip: found -1, expected 0 or more"),
        ({"betas": (0.9,)}, "--betas: found (0.9,), expected two numbers from 0 to below 1, as 0.9,0.999"),
        ({"targets": ()}, "--targets: found none, expected ends of module names, as to_q,to_k,to_v,to_out.0"),
        ({"kind": "textual-inversion"}, "train: found 'textual-inversion', expected text-to-image or dreambooth"),
        ({"preset": "anime"}, "--preset: found 'anime', expected style or character"),
        ({"schedule": "warmup"}, "--schedule: found 'warmup', expected constant or constant_with_warmup or linear or "
                                 "cosine or cosine_with_restarts or polynomial"),
        ({"mixed_precision": "fp8"}, "--mixed-precision: found 'fp8', expected no or fp16 or bf16"),
        ({"steps": 5, "epochs": 2}, "--epochs: stands in place of --steps: found both"),
        ({"steps": 5, "warmup": 6}, "--warmup: found 6 steps, of 5 in all"),
        ({"dtype": "fp16"}, "--dtype: fp16 needs losses that are scaled, or small gradients vanish"),
        ({"conv_alpha": 1.0}, "--conv-alpha: stands with --conv-rank"),
        ({"text_encoder_lr": 1e-5}, "--text-encoder-lr: says something only with --train-text-encoder"),
        ({"class_images": 3}, "--class-images: stands with --class-prompt, the words for them"),
        ({"class_prompt": "a cat"}, "--class-prompt: says something only in train dreambooth"),
        ({"kind": "dreambooth"}, "--instance-prompt: is missing: dreambooth takes one prompt for all images"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_words_that_cannot_be_meant_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as told:
        settled(**words)
    assert str(told.value) == message


# ------------------------------------------------------------------------------------------------ modules

SIZES = {
    "down.0.attn1.to_q": (32, 16), "down.0.attn1.to_out.0": (16, 32), "down.0.conv1": (8, 4, 3, 3),
    "down.0.conv_shortcut": (8, 4, 1, 1), "up.10.attn1.to_q": (32, 16),
}  # fmt: skip


def shape(*targets: str, **words: Any) -> Shape:
    given = {"rank": 4, "alpha": 2.0, "conv_rank": None, "conv_alpha": None, "dora": False, "init": "gaussian", **words}
    return Shape(targets, **given)


def test_targets_are_ends_of_names_and_kernels_have_ranks_of_their_own() -> None:
    found = choose_modules(SIZES, shape("to_q", "to_out.0"), network="unet")
    assert [m.name for m in found] == ["down.0.attn1.to_q", "down.0.attn1.to_out.0", "up.10.attn1.to_q"]
    assert [m.parameters(dora=False) for m in found] == [4 * 48, 4 * 48, 4 * 48]
    assert found[0].parameters(dora=True) == 4 * 48 + 32
    # Convolutions that nobody named, and those that somebody did.
    found = choose_modules(SIZES, shape("to_q", conv_rank=2, conv_alpha=1.0), network="unet")
    assert {m.name: (m.rank, m.alpha) for m in found} == {
        "down.0.attn1.to_q": (4, 2.0), "up.10.attn1.to_q": (4, 2.0), "down.0.conv1": (2, 1.0),
        "down.0.conv_shortcut": (4, 2.0),
    }  # fmt: skip
    assert found[1].parameters(dora=False) == 2 * (4 * 9 + 8)
    found = choose_modules(SIZES, shape("conv1", conv_rank=2, conv_alpha=1.0), network="unet")
    assert [m.name for m in found] == ["down.0.conv1"]


@pytest.mark.parametrize(
    ("target", "what", "hint"),
    [
        ("to_w", "'to_w'", "did you mean to_q?"),
        ("attn1.to_qq", "'attn1.to_qq'", "did you mean attn1.to_q or attn1.to_out.0?"),
        ("x", "'x'", "it has to_q, conv1, conv_shortcut, attn1.to_q, to_out.0, attn1.to_out.0 …"),
        ("0", "'0'", None),
    ],
)
def test_a_target_that_is_none_is_named_with_its_neighbours(target: str, what: str, hint: str | None) -> None:
    if hint is None:  # to_out.0 ends so
        assert len(choose_modules(SIZES, shape(target), network="unet")) == 1
        return
    with pytest.raises(UsageError) as told:
        choose_modules(SIZES, shape("to_q", target), network="unet")
    assert str(told.value) == f"--targets: no linear layer or convolution of the unet has a name that ends in {what}"
    assert told.value.hint == hint


# ------------------------------------------------------------------------------------------------ a dry run

CASES: list[tuple[str, dict[str, Any]]] = [
    ("sd15", {"conv_rank": 2, "targets": ("attn2.to_k", "conv1"), "train_text_encoder": True, "dora": True}),
    ("sdxl", {"targets": ("to_v", "proj_in"), "rank": 2}),
    ("sd3", {}),
    ("flux", {"train_text_encoder": True}),
]


@pytest.mark.parametrize(("architecture", "words"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_dry_run_says_what_the_run_does(architecture: str, words: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "lora.safetensors"
    said = train(out, architecture, batch=3, epochs=1, dry_run=True, **words)
    assert list(tmp_path.iterdir()) == []
    done = train(out, architecture, batch=3, epochs=1, **words)
    for name in ("steps", "steps_per_epoch", "images", "modules", "parameters", "output", "folder", "data_hash"):
        assert getattr(said, name) == getattr(done, name), name
    assert said.settings == done.settings
    assert (done.steps, said.dry_run, done.dry_run) == (2, True, False)
    assert said.memory["trained"] == 16 * said.parameters
    assert said.memory["frozen"] == 4 * inspect(model(architecture)).parameters


def test_a_recipe_is_merged_in_memory_and_trained_on(tmp_path: Path) -> None:
    recipe = tmp_path / "merged.yaml"
    other = tiny_model("sd15", tmp_path / "other", seed=1)
    recipe.write_text(f"merge: {{weighted_sum: [{model('sd15')}, {other}]}}\n")
    words: dict[str, Any] = {"targets": ("attn2.to_k",), "steps": 1}
    said = train(tmp_path / "lora.safetensors", "sd15", dry_run=True, model=recipe, **words)
    done = train(tmp_path / "lora.safetensors", "sd15", model=recipe, like=model("sd15"), **words)
    alone = train(tmp_path / "alone.safetensors", "sd15", **words)
    assert (said.modules, said.parameters) == (done.modules, done.parameters) == (alone.modules, alone.parameters)
    assert done.loss != alone.loss
    assert [entry["path"] for entry in done.inputs] == ["sd15", "other"]


# ------------------------------------------------------------------------------------------------ refused


def no_images(folder: Path) -> dict[str, Any]:
    (folder / "none").mkdir()
    (folder / "none/notes.txt").write_text("x")
    return {"folder": folder / "none"}


def no_captions(folder: Path) -> dict[str, Any]:
    return {"folder": sprites(folder / "bare", count=2, captions=False)}


def broken(folder: Path) -> dict[str, Any]:
    (folder / "broken").mkdir()
    (folder / "broken/a.png").write_bytes(b"\x89PNG no")
    return {"folder": folder / "broken"}


def a_lora(folder: Path) -> dict[str, Any]:
    train(folder / "other.safetensors", steps=1)
    return {"model": folder / "other.safetensors"}


Given = dict[str, Any]
Case = tuple[Callable[[Path], Given] | Given, type[WeightopsError], str, str | None]

# What is wrong; the error, what its message has, and how its hint begins.
REFUSED: dict[str, Case] = {
    "no images": (no_images, UsageError, r"none: .*no (image|picture)", None),
    "no folder": (lambda f: {"folder": f / "gone"}, UsageError, r"gone: no such folder", None),
    "no captions": (no_captions, UsageError, r"bare: 2 of 2 pictures have no caption: 'sprite-000\.png'", "weightops"),
    "broken": (broken, FormatError, r"broken: .*'a\.png': no image", None),
    "a LoRA": (a_lora, MismatchError, r"other\.safetensors: expected a model, found: lora", None),
    "no model": (lambda f: {"model": f / "gone.safetensors"}, UsageError, r"gone\.safetensors: no such file", None),
    "video": ({"model": "svd"}, UsageError, r"svd: its architecture is not known, expected one of sd15", None),
    "rank": ({"rank": 0}, UsageError, r"^--rank: found 0", None),
    "target": ({"targets": ("to_quer",)}, UsageError, r"^--targets: .*transformer.*'to_quer'", "did you mean"),
    "kernels": ({"conv_rank": 4}, UsageError, r"^--conv-rank: found no convolution .* the transformer$", None),
    "no device": ({"device": "cuda:9"}, UsageError, r"^--device: ", None),
    "fp16": ({"mixed_precision": "fp16"}, UsageError, r"^--mixed-precision: fp16 needs a CUDA device", "use bf16 or"),
    "size": ({"resolution": "60"}, UsageError, r"^--resolution: found 60 × 60 pixels, expected multiples of", None),
    "no size": ({"resolution": "big"}, UsageError, r"^--resolution: found 'big', expected a number", None),
    "snr": ({"snr_gamma": 5.0}, UsageError, r"^--snr-gamma: is of DDPM objectives", None),
    "prediction": ({"prediction": "epsilon"}, UsageError, r"^--prediction: ", None),
    "name": ({"optimizer": "lion"}, UsageError, r"^--optimizer: found 'lion', expected adamw or an", "adamw, or a"),
    "module": ({"optimizer": "no.such.Class"}, UsageError, r"^--optimizer: .* cannot be imported: No", "adamw, or a"),
    "class": ({"optimizer": "torch.optim.AdamV"}, UsageError, r"^--optimizer: 'torch\.optim' has no class", None),
    "no optimizer": ({"optimizer": "pathlib.Path"}, UsageError, r"^--optimizer: 'pathlib' has no class 'Path'", None),
    "setting": ({"optimizer_set": {"bet": "1"}}, UsageError, r"^--optimizer-set: AdamW takes no 'bet'$", "it takes"),
    "rate": ({"optimizer_set": {"lr": "1"}}, UsageError, r"^--optimizer-set: found 'lr'$", "the learning rate is --lr"),
    "beta": (
        {"optimizer": "torch.optim.SGD", "betas": (0.9, 0.99)}, UsageError, r"^--betas: SGD takes no 'betas'$",
        "it takes momentum",
    ),
    "refused": (
        {"optimizer": "torch.optim.SGD", "optimizer_set": {"nesterov": "true"}}, UsageError,
        r"^--optimizer: SGD refuses its settings: Nesterov", None,
    ),
    "no plain step": ({"optimizer": "torch.optim.LBFGS"}, UsageError, r"^--optimizer: LBFGS ", None),
    "suffix": (lambda f: {"output": f / "a.ckpt"}, UsageError, r"a\.ckpt: the output's name must end in", None),
    "a folder's": ({"dialect": "peft"}, UsageError, r"lora\.safetensors: a folder is written here", None),
    "place": (lambda f: {"output": f / "no/a.safetensors"}, OutputError, r"the folder .* does not exist", None),
    "samples": ({"sample_every": 1}, UsageError, r"^--sample-every: stands with --sample-prompt", None),
    "images": (lambda f: {"class_folder": f}, UsageError, r"^--class-folder: stands with --class-prompt", None),
    "count": ({"checkpoint_every": 0}, UsageError, r"^--checkpoint-every: found 0, expected a whole", None),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_has_its_sentence_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    make, error, message, hint = REFUSED[name]
    words = make(tmp_path) if callable(make) else make
    words = {**words, "model": model("svd")} if words.get("model") == "svd" else words
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    given = {"output": tmp_path / "lora.safetensors", **words}
    with pytest.raises(error, match=message) as told:
        train(given.pop("output"), **given)
    assert "\n" not in str(told.value)
    if hint is not None:
        assert told.value.hint is not None
        assert told.value.hint.startswith(hint)
    after = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    assert [path for path in after if "lora-train" not in str(path)] == before
    assert not (tmp_path / "lora-train/checkpoints").exists()


def test_a_gpu_that_is_not_there_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"^--device: 'cuda' was asked for, but this torch sees no CUDA device$"):
        train(tmp_path / "lora.safetensors", device="cuda")


def test_a_text_encoder_that_cannot_learn_is_named(tmp_path: Path) -> None:
    report = train(tmp_path / "lora.safetensors", train_text_encoder=True)
    said = [text for text in report.warnings if text.startswith("--train-text-encoder")]
    assert said == ["--train-text-encoder trains text_encoder; text_encoder_2, a T5, stays as it is"]


def test_an_output_that_is_there_stays_without_force(tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        train(tmp_path / "lora.safetensors")
    assert (tmp_path / "lora.safetensors").read_bytes() == b"mine"


# ------------------------------------------------------------------------------------------------ the command line


def command(*words: object) -> Any:
    return weightops_here("train", *words)


def test_the_command_line_says_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("text-to-image", images(), "--model", model("flux"), "--resolution", 64, "--steps", 2, "--device", "cpu")
    done = command(*words, "--targets", "to_q, to_k", "--optimizer-set", "amsgrad=true", "--betas", "0.9,0.99")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "text-to-image, 4 images: 4 modules, 4,096 parameters, rank 4, alpha 4"
    assert lines[1] == "2 steps, 0.5 epochs of 4; 64 × 64 pixels"
    assert any(line.startswith("wrote  sprites-4-lora.safetensors  ") for line in lines)
    assert (tmp_path / "sprites-4-lora-train/loss.png").is_file()
    found = command(*words, "--json", "-o", "b.safetensors", "--preset", "character", "--no-flip", "--batch", 1)
    report = json.loads(found.out)
    assert report["command"] == "train"
    assert (report["steps"], report["settings"]["rank"], report["settings"]["alpha"]) == (2, 8, 4.0)
    assert report["settings"]["flip"] is False
    assert report["inputs"][0]["hash"].startswith("xxh3_128:")
    assert report["bytes_written"] == (tmp_path / "b.safetensors").stat().st_size


def test_the_command_line_refuses_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cases = (
        (("text-to-image", images()), "missing option '--model'"),
        (("text-to-image", images(), "--model", "x.safetensors", "--rank", 0), "--rank: found 0, expected a whole"),
        (("text-to-image", images(), "--model", "x", "--optimizer-set", "a"), "--optimizer-set: found 'a', expected"),
        (("dreambooth", images(), "--model", "x"), "missing option '--instance-prompt'"),
        (("textual-inversion", images()), "no such command 'textual-inversion'"),
    )
    for words, message in cases:
        done = command(*words)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"error: {message}")
        assert "Traceback" not in done.err


def test_a_dry_run_on_the_command_line_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = command("text-to-image", images(), "--model", model("sdxl"), "--dry-run", "--train-text-encoder", "-v")
    assert done.code == 0
    assert "600 steps, 150 epochs of 4; 1024 × 1024 pixels" in done.out
    frozen = 4 * inspect(model("sdxl")).parameters / 1e6
    assert f"\nmemory: {frozen:.1f} MB for the model's weights, 2.3 MB for the LoRA and its optimizer; " in done.out
    assert "would write sprites-4-lora.safetensors, and sprites-4-lora-train beside it" in done.out
    assert list(tmp_path.iterdir()) == []


def test_defaults_that_the_help_names_are_those_that_are_meant() -> None:
    text = command("dreambooth", "--help").out
    flat = " ".join(text.split())
    for name, value in DEFAULTS.items():
        if name != "flip":
            assert f"[default: {value}]" in flat, name


def test_the_report_counts_what_was_written(tmp_path: Path) -> None:
    report = train(tmp_path / "lora.safetensors")
    document = json.loads(json.dumps(report.to_dict()))
    assert document["bytes_written"] == (tmp_path / "lora.safetensors").stat().st_size
    assert document["loss"] == pytest.approx(report.loss)
    assert (document["processes"], document["resumed_at"], document["epochs"]) == (1, 0, 0.5)
    assert isinstance(report, verb.TrainReport)


def test_a_lora_is_never_written_over_what_it_is_trained_on(tmp_path: Path) -> None:
    import shutil

    base = shutil.copytree(model("sd15"), tmp_path / "base")
    with pytest.raises(OutputError, match="base: is also an input, and an input is never written"):
        train(base, model=base, dialect="peft", force=True, steps=1)
    other = shutil.copytree(model("sd15"), tmp_path / "other")
    with pytest.raises(OutputError, match="other: holds something else than a PEFT adapter"):
        train(other, model=base, dialect="peft", force=True, steps=1)
    assert (base / "unet").is_dir()
    assert (other / "unet").is_dir()


def test_a_rank_beyond_every_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"--rank: found 100,000, but no module of the transformer that trains can have more"
    ):
        train(tmp_path / "lora.safetensors", rank=100_000, steps=1)
