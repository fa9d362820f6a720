"""Coefficients learnt from images lower the loss of a LoRA file that any tool reads; each learns as it would alone."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from little_base import Base, little_base, little_space

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from commandline import weightops_here

from weightops.diffusion.adapters import wear
from weightops.diffusion.dataset import Framing, read_examples
from weightops.diffusion.encoding import encode
from weightops.diffusion.objectives import held_out_loss
from weightops.errors import FormatError, MismatchError, OutputError, UsageError, WeightopsError
from weightops.files.checkpoint import open_checkpoint
from weightops.lineage import KEY
from weightops.synthesis.coordinates import coordinates, coordinates_of, learn_coefficients, learn_plain
from weightops.synthesis.fit import fit_pca
from weightops.synthesis.fit_images import fit_images
from weightops.synthesis.fitted import load_fitted
from weightops.synthesis.gap import Losses
from weightops.synthesis.image_descent import Course
from weightops.synthesis.own_images import OwnImages, list_images
from weightops.synthesis.vae import made_vae

if TYPE_CHECKING:
    from weightops.synthesis.space import Space

pytest.importorskip("diffusers")
torch.set_num_threads(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' schedulers
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

COUNTS = {"ada": 2, "bob": 1, "cleo": 2}
COURSE = Course(steps=4, lr=0.3, batch=2, seed=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return little_base(tmp_path_factory.getbasetemp() / "little-base")


@pytest.fixture(scope="module")
def space(base: Base) -> Space:
    return little_space(base)


@pytest.fixture(scope="module")
def fitted(base: Base, space: Space) -> Path:
    fit_pca(space.folder, components=5, output=base.folder / "pca.safetensors")
    return base.folder / "pca.safetensors"


@pytest.fixture(scope="module")
def images(base: Base) -> OwnImages:
    return OwnImages(base.loaded, list_images(base.images("few", COUNTS), list(COUNTS), option="--few"))


def test_the_loss_falls_and_the_file_has_what_was_learnt(base: Base, fitted: Path, images: OwnImages) -> None:
    output = base.folder / "ada.safetensors"
    report = fit_images(base.folder / "few" / "ada", fitted, model=base.model, output=output, steps=8, device="cpu")
    assert report.loss["last"] < min(report.loss["first"], report.loss["base"])
    assert report.learnt == 5
    assert 0 < report.distance < 3
    assert report.nearest["name"] in load_fitted(fitted).trained_names
    wear(base.loaded, [str(output)])
    try:
        examples = read_examples(base.folder / "few" / "ada", where="test").examples
        encoded = encode(base.loaded, examples, Framing((64, 64), center_crop=True))
        worn = held_out_loss(base.loaded, images.encoding, encoded, images.objective, pairs=8, seed=0)
    finally:
        wear(base.loaded, ())
    assert worn.mean == pytest.approx(report.loss["last"], abs=1e-5)
    said = json.loads(json.dumps(report.to_dict()))
    assert said["command"] == "synth fit-images"
    assert said["inputs"][1]["hash"].startswith("xxh3_128:")


def test_the_same_words_make_the_same_bytes(base: Base, fitted: Path) -> None:
    made = []
    for _ in range(2):
        output = base.folder / "same.safetensors"
        fit_images(base.folder / "few" / "bob", fitted, model=base.model, output=output, steps=2, force=True)
        made.append(output.read_bytes())
    assert made[0] == made[1]


def test_each_lora_learns_as_it_would_alone(fitted: Path, images: OwnImages) -> None:
    of = coordinates_of(load_fitted(fitted), components=2)
    together, curves = learn_coefficients(images, of, ["ada", "cleo", "bob"], COURSE)
    for place, name in enumerate(("ada", "cleo", "bob")):
        alone, curve = learn_coefficients(images, of, [name], COURSE)
        # Adam divides by the gradient's own size, and with it by that of its rounding.
        assert torch.allclose(alone[0], together[place], atol=0.01)
        assert np.allclose(curve[:, 0], curves[:, place], atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.05)


def test_a_gaussian_prior_holds_coefficients_together(fitted: Path, images: OwnImages) -> None:
    of = coordinates_of(load_fitted(fitted))
    free, _ = learn_coefficients(images, of, ["ada"], COURSE)
    held, _ = learn_coefficients(images, of, ["ada"], replace(COURSE, l2=10.0))
    assert held.norm() < 0.5 * free.norm()


def test_what_is_frozen_gets_no_gradient(base: Base, fitted: Path, images: OwnImages) -> None:
    before = {name: parameter.clone() for name, parameter in base.loaded.pipe.unet.named_parameters()}
    learn_coefficients(images, coordinates_of(load_fitted(fitted)), ["bob"], COURSE)
    for name, parameter in base.loaded.pipe.unet.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_latents_of_a_vae_are_learnt_through_its_decoder(space: Space, fitted: Path, images: OwnImages) -> None:
    made = load_fitted(fitted)
    assert made.pca is not None
    vae, _ = made_vae(made.latents, latents=2, hidden=8, steps=20)
    of = coordinates(made.layout, made.pca, vae.encode(made.latents), vae=vae)
    c, curve = learn_coefficients(images, of, ["ada", "bob"], COURSE)
    assert c.shape == (2, 2)
    assert c.abs().max() > 0.05
    rows = made.pca.rows(vae.decode(of.latents(c)))
    assert torch.allclose(made.layout.flatten(of.factors(c)), rows, atol=1e-6)
    assert curve.shape == (COURSE.steps, 2)


def test_plain_training_begins_at_the_model_alone_and_learns(base: Base, images: OwnImages) -> None:
    names = ["ada", "bob"]
    none, _ = learn_plain(images, base.layout(), names, replace(COURSE, steps=1, lr=1e-12))
    learnt, _ = learn_plain(images, base.layout(), names, replace(COURSE, steps=8, lr=0.03))
    with Losses(images, base.layout(), pairs=4) as losses:
        plain = losses.of(names, None)
        assert np.allclose(losses.of(names, none), plain, atol=1e-5)
        assert (losses.of(names, learnt) < plain - 0.01).all()


def recipe_of(path: Path) -> str:
    with open_checkpoint(path) as opened:
        return opened.metadata[KEY]


def test_a_condition_says_where_to_begin(base: Base, fitted: Path, tmp_path: Path) -> None:
    made = load_fitted(fitted)
    assert made.ridge is not None
    output = tmp_path / "new.safetensors"
    words = {"model": base.model, "output": output, "steps": 1, "lr": 1e-9, "condition": "1.5,0,-1"}
    report = fit_images(base.folder / "few" / "bob", fitted, **words)  # type: ignore[arg-type]
    assert '"condition": "1.5,0,-1"' in recipe_of(output)
    table = tmp_path / "asked.csv"
    table.write_text(f"name,{','.join(made.condition_names)}\nbob,1.5,0,-1\n")
    fit_images(base.folder / "few" / "bob", fitted, **(words | {"condition": str(table), "force": True}))  # type: ignore[arg-type]
    assert '"condition": "asked.csv"' in recipe_of(output)
    assert str(tmp_path) not in recipe_of(output)
    assert report.start == "ridge regression on the condition"
    c = coordinates_of(made).of_latents(made.ridge.predict(np.array([[1.5, 0, -1]])))
    assert report.distance == pytest.approx(float(c.square().mean().sqrt()), rel=1e-4)
    with pytest.raises(UsageError, match="found 2 numbers, expected 3 numbers"):
        fit_images(base.folder / "few" / "bob", fitted, **(words | {"condition": "1,2", "force": True}))  # type: ignore[arg-type]


def test_the_first_components_alone(fitted: Path) -> None:
    made = load_fitted(fitted)
    few, all_of_them = coordinates_of(made, components=2), coordinates_of(made)
    c = torch.tensor([[0.5, -1.0]])
    padded = torch.cat([c, torch.zeros(1, 3)], 1)
    # What the others have in the mean is nothing.
    assert torch.allclose(
        made.layout.flatten(few.factors(c)), made.layout.flatten(all_of_them.factors(padded)), atol=1e-5
    )
    assert few.nbytes == 4 * 3 * made.layout.width


def test_nothing_is_written_by_a_dry_run(base: Base, fitted: Path, tmp_path: Path) -> None:
    report = fit_images(
        base.folder / "few" / "ada", fitted, model="is not looked at", output=tmp_path / "a.safetensors", dry_run=True
    )
    assert report.dry_run
    assert report.bytes_written > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ({"steps": 0}, UsageError, "--steps: found 0, expected 1 to 1,000,000"),
        ({"lr": -1.0}, UsageError, "--lr: found -1, expected a number above 0"),
        ({"l2": -1.0}, UsageError, "--l2: found -1, expected 0 or more"),
        ({"components": 9}, UsageError, "--components: found 9, expected 1 to 5, of which .*pca.safetensors is"),
        ({"output": "x.ckpt"}, UsageError, "x.ckpt: the output's name must end in .safetensors"),
        ({"dialect": "peft", "output": "x.safetensors"}, UsageError, "a folder is written here"),
        ({"model_dtype": "fp16"}, UsageError, "--model-dtype: found 'fp16', expected fp32 or bf16"),
        ({"model": "nowhere"}, WeightopsError, "nowhere"),
        ({"prompt": " "}, UsageError, "--prompt: found ' ', expected words"),
    ],
)
def test_wrong_words_are_refused(
    base: Base, fitted: Path, tmp_path: Path, words: dict[str, object], kind: type[WeightopsError], message: str
) -> None:
    given = {"model": base.model, "output": tmp_path / "x.safetensors", "steps": 1} | words
    with pytest.raises(kind, match=message):
        fit_images(base.folder / "few" / "ada", fitted, **given)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_wrong_inputs_are_refused(base: Base, space: Space, fitted: Path, tmp_path: Path) -> None:
    few, output = base.folder / "few" / "ada", tmp_path / "x.safetensors"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty"):
        fit_images(tmp_path / "empty", fitted, model=base.model, output=output)
    (tmp_path / "silent").mkdir()
    shutil.copy(next(few.glob("*.png")), tmp_path / "silent")
    with pytest.raises(UsageError, match="no caption") as caught:
        fit_images(tmp_path / "silent", fitted, model=base.model, output=output)
    hint = f"--prompt TEXT says one for all; weightops caption {tmp_path}/silent writes what is missing"
    assert caught.value.hint == hint
    (tmp_path / "cut.safetensors").write_bytes(fitted.read_bytes()[:-10])
    with pytest.raises(FormatError, match="but the file holds"):
        fit_images(few, tmp_path / "cut.safetensors", model=base.model, output=output)
    fit_pca(space.folder, components=3, geometry="delta", output=tmp_path / "delta.safetensors")
    with pytest.raises(UsageError, match="is learnt from ΔW"):
        fit_images(few, tmp_path / "delta.safetensors", model=base.model, output=output)
    output.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        fit_images(few, fitted, model=base.model, output=output)
    assert output.read_bytes() == b"mine"
    with pytest.raises(OutputError, match="is also an input"):
        fit_images(few, fitted, model=base.model, output=fitted, force=True)


def test_a_model_of_another_kind_is_refused(base: Base, fitted: Path, tmp_path: Path) -> None:
    from weightops.diffusion.tiny import tiny_model

    other = tiny_model("sdxl", tmp_path / "sdxl")
    with pytest.raises(MismatchError, match=r"its LoRAs are of 'sd15', and .* is 'sdxl'"):
        fit_images(base.folder / "few" / "ada", fitted, model=other, output=tmp_path / "x.safetensors")


def test_the_command_says_what_it_learnt(base: Base, fitted: Path, tmp_path: Path) -> None:
    words = [
        str(base.folder / "few" / "bob"),
        str(fitted),
        "--model",
        str(base.model),
        "-o",
        str(tmp_path / "b.safetensors"),
    ]
    done = weightops_here("synth", "fit-images", *words, "--steps", "2")
    assert done.code == 0, done.err
    assert "5 numbers learnt from 1 image in 2 steps" in done.out
    assert "begun at the mean LoRA" in done.out
    again = weightops_here("synth", "fit-images", *words)
    assert again.code != 0
    assert again.err.startswith("error: ")
