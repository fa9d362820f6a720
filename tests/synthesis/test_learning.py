"""fit vae and fit diffusion as verbs: what they report, what they refuse, and that no interruption changes a byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from made import made_space
from spaces import space_of

from weightops.cli import synth_fit
from weightops.errors import Interrupted, MismatchError, OutputError, UsageError, ValueRefused
from weightops.synthesis import kept_descent
from weightops.synthesis.fit import fit_pca
from weightops.synthesis.fitted import load_fitted
from weightops.synthesis.learning import fit_diffusion, fit_vae
from weightops.synthesis.space import open_space

if TYPE_CHECKING:
    from weightops.synthesis.space import Space

VAE: dict[str, Any] = {"latents": 3, "components": 6, "hidden": 16, "steps": 30, "device": "cpu"}
DIFFUSION: dict[str, Any] = {"components": 4, "width": 16, "steps": 30, "device": "cpu"}
# Enough steps, and members for more than one batch, to be interrupted in the middle.
BOTH = pytest.mark.parametrize(
    ("fit", "words"),
    [(fit_vae, {**VAE, "batch": 8}), (fit_diffusion, {**DIFFUSION, "conditioning": "adalora", "batch": 8})],
    ids=["vae", "diffusion"],
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def spaced(folder: Path, n: int = 40, *, conditions: bool = True) -> Space:
    """Rows that two numbers bend, in 20 dimensions; the conditions are those numbers."""
    random = np.random.default_rng(3)
    told = random.uniform(-1, 1, (n, 2))
    bent = np.concatenate([told, told**2, told[:, :1] * told[:, 1:]], 1)
    rows = bent @ random.standard_normal((5, 20)) + 0.05 * random.standard_normal((n, 20)) + 1.0
    return made_space(folder / "space", torch.from_numpy(rows).float(), conditions=told if conditions else None)


# ------------------------------------------------------------------------------------------------ what is reported


def test_a_vae_is_told_beside_pca(tmp_path: Path) -> None:
    space = spaced(tmp_path)
    report = fit_vae(space.folder, **VAE)
    assert (report.kind, report.members, report.trained, report.held_out) == ("vae", 40, 32, 8)
    assert (report.components, report.latents, report.steps, report.learnt_from) == (6, 3, 30, "made here")
    assert report.losses["loss"] == pytest.approx(
        report.losses["reconstruction"] + 0.01 * report.losses["kl"], rel=1e-4
    )
    assert report.bytes_written == (space.folder / "vae.safetensors").stat().st_size
    fitted = load_fitted(report.output, space)
    assert fitted.vae is not None
    assert fitted.pca is not None
    assert report.parameters == fitted.vae.parameters
    rows = space.rows(list(fitted.held_out))
    apart = rows - fitted.pca.mean
    basis = fitted.pca.basis[:3]
    assert report.left == pytest.approx(
        {
            "vae": float((rows - fitted.rows_of(fitted.latents_of(rows))).square().sum() / apart.square().sum()),
            "pca": float((apart - apart @ basis.T @ basis).square().sum() / apart.square().sum()),
        },
        rel=1e-4,
    )
    trained = fitted.latents_of(space.rows(list(fitted.trained)))
    assert torch.allclose(fitted.latents, trained, atol=1e-5)
    assert fitted.ridge is not None
    assert fitted.ridge.predict(np.zeros((1, 2))).shape == (1, 3)
    said = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert said["command"] == "synth fit"
    assert "process" not in said
    assert said["settings"]["beta"] == 0.01


def test_diffusion_is_told_beside_the_baselines(tmp_path: Path) -> None:
    space = spaced(tmp_path, 120)
    report = fit_diffusion(space.folder, **{**DIFFUSION, "width": 32, "steps": 350})
    assert (report.kind, report.components, report.latents) == ("diffusion", 4, 4)
    fitted = load_fitted(report.output, space)
    assert fitted.denoiser is not None
    assert fitted.ridge is not None
    assert fitted.nearest is not None
    assert space.conditions is not None
    asked, latents = space.conditions[list(fitted.held_out)], fitted.latents_of(space.rows(list(fitted.held_out)))
    ways = {
        "diffusion": fitted.denoiser.sample(24, asked, seed=0),
        "ridge": fitted.ridge.predict(asked),
        "nearest": fitted.latents[fitted.nearest.nearest(asked)],
    }
    whole = (latents - fitted.latents.mean(0)).square().sum()
    assert report.left == pytest.approx(
        {way: float((made - latents).square().sum() / whole) for way, made in ways.items()}, rel=1e-3
    )
    assert report.left["ridge"] < report.left["diffusion"] < 0.3
    assert report.parameters == fitted.denoiser.parameters
    assert report.losses["loss"] < 0.5


def test_without_conditions_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    space = spaced(tmp_path, conditions=False)
    report = fit_diffusion(space.folder, **DIFFUSION)
    assert report.left == {}
    assert report.left_out is None
    fitted = load_fitted(report.output, space)
    assert fitted.denoiser is not None
    assert fitted.denoiser.conditions == 0
    assert fitted.denoiser.sample(5, seed=0, steps=3).shape == (5, 4)


def test_nothing_held_out_leaves_nothing_to_measure_on(tmp_path: Path) -> None:
    space = spaced(tmp_path)
    for report in (fit_vae(space.folder, held_out=0, **VAE), fit_diffusion(space.folder, held_out=0, **DIFFUSION)):
        assert (report.trained, report.held_out, report.left) == (40, 0, {})


def test_in_the_geometry_of_delta_all_components_leave_what_pca_leaves(tmp_path: Path) -> None:
    space = space_of(tmp_path, 20)
    pca = fit_pca(space.folder, components=5, geometry="delta", output=tmp_path / "pca.safetensors", device="cpu")
    assert pca.explained_held_out is not None
    report = fit_vae(space.folder, **{**VAE, "components": 5, "latents": 5, "layers": "linear"}, geometry="delta")
    assert report.left["pca"] == pytest.approx(1 - pca.explained_held_out, rel=1e-3)
    assert report.left["pca"] < report.left["vae"] < 1
    fitted = load_fitted(report.output, space)
    assert fitted.delta is not None
    assert fitted.factors_of(fitted.latents[:1], rank=2)[0][0].shape[-1] == 2


# ---------------------------------------------------------------------------------------------- what it is learnt from


def test_the_components_of_the_space_are_taken_where_they_fit(tmp_path: Path) -> None:
    space = spaced(tmp_path)
    pca = fit_pca(space.folder, components=8, device="cpu").output
    kept = load_fitted(pca)
    report = fit_vae(space.folder, **{**VAE, "components": None})
    assert (report.learnt_from, report.components) == ("made here", 20)  # a row has no more features
    for fit, words, wanted in ((fit_vae, VAE, 6), (fit_diffusion, DIFFUSION, 4)):
        report = fit(space.folder, **words, output=tmp_path / f"{wanted}.safetensors")
        assert (report.learnt_from, report.components) == (pca, wanted)
        found = load_fitted(report.output)
        assert found.pca is not None
        assert kept.pca is not None
        assert torch.equal(found.pca.basis, kept.pca.basis[:wanted])
    assert torch.equal(found.latents, kept.latents[:, :4])
    for other in ({"components": 9}, {"seed": 1}, {"held_out": 0.3}, {"geometry": "delta"}):
        report = fit_vae(space.folder, **{**VAE, **other}, output=tmp_path / "other.safetensors", force=True)
        assert report.learnt_from == "made here"


def test_the_first_components_of_delta_are_those_that_would_be_made(tmp_path: Path) -> None:
    space = space_of(tmp_path, 20)
    words = {**VAE, "components": 4, "latents": 2, "layers": "linear", "geometry": "delta"}
    made = fit_vae(space.folder, **words, output=tmp_path / "made.safetensors")
    pca = fit_pca(space.folder, components=7, geometry="delta", device="cpu").output
    taken = fit_vae(space.folder, **words)
    assert (made.learnt_from, taken.learnt_from) == ("made here", pca)
    assert (made.components, taken.components) == (4, 4)
    assert taken.left == pytest.approx(made.left, rel=1e-3)
    one, other = (load_fitted(report.output, space) for report in (made, taken))
    for (up, down), (same_up, same_down) in zip(
        one.factors_of(one.latents[:2]), other.factors_of(other.latents[:2]), strict=True
    ):
        assert torch.allclose(up @ down, same_up @ same_down, atol=1e-4)


def test_diffusion_of_a_vae_has_its_latents_and_its_split(tmp_path: Path) -> None:
    space = spaced(tmp_path)
    vae = fit_vae(space.folder, **VAE, seed=5, held_out=12)
    words = {name: word for name, word in DIFFUSION.items() if name != "components"}
    report = fit_diffusion(space.folder, latents_of="vae", **words)
    assert (report.learnt_from, report.latents, report.components) == (vae.output, 3, 6)
    one, other = load_fitted(vae.output), load_fitted(report.output)
    assert other.held_out == one.held_out
    assert len(other.held_out) == 12
    assert torch.equal(one.latents, other.latents)
    assert other.vae is not None
    again = fit_diffusion(space.folder, latents_of=vae.output, **words, force=True)
    assert again.learnt_from == vae.output
    assert set(report.left) == {"diffusion", "ridge", "nearest"}


def test_latents_that_are_none_of_the_spaces_are_refused(tmp_path: Path) -> None:
    space = spaced(tmp_path)
    words = {name: word for name, word in DIFFUSION.items() if name != "components"}
    with pytest.raises(UsageError, match=r"^--latents-of: .*vae.safetensors is not there$"):
        fit_diffusion(space.folder, latents_of="vae", **words)
    fit_diffusion(space.folder, **DIFFUSION)
    with pytest.raises(MismatchError, match="is of the kind diffusion, expected pca or vae"):
        fit_diffusion(space.folder, latents_of=space.folder / "diffusion.safetensors", force=True, **words)
    with pytest.raises(UsageError, match="--components: found 4, but --latents-of brings its own"):
        fit_diffusion(space.folder, latents_of="vae", force=True, **DIFFUSION)
    other = made_space(tmp_path / "other", space.rows(range(40)) + 1)
    fit_vae(other.folder, **VAE)
    (other.folder / "vae.safetensors").rename(space.folder / "vae.safetensors")
    (space.folder / "members.jsonl").write_text(
        (space.folder / "members.jsonl").read_text().replace("member-0", "nobody")
    )
    with pytest.raises(MismatchError, match="was learnt from another space"):
        fit_diffusion(space.folder, latents_of="vae", force=True, **words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"components": 32}, "found 32 LoRAs to train on, expected at least 33 for 32 components"),
        ({"components": -1}, "--components: found -1, expected a whole number, 1 or more"),
        ({"latents": 7}, "--latents: found 7, expected 1 to 6"),
        ({"geometry": "flat"}, "--geometry: found 'flat', expected rows or delta"),
    ],
    ids=str,
)
def test_words_that_cannot_be_are_refused(tmp_path: Path, words: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        fit_vae(spaced(tmp_path).folder, **{**VAE, **words})
    assert not list((tmp_path / "space").glob("*unfinished*"))


def test_an_output_that_is_there_is_kept(tmp_path: Path) -> None:
    space = spaced(tmp_path)
    target = space.folder / "vae.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        fit_vae(space.folder, **VAE)
    assert target.read_bytes() == b"mine"
    fit_vae(space.folder, **VAE, force=True)
    assert load_fitted(target).kind == "vae"


def test_a_loss_that_is_no_number_is_refused(tmp_path: Path) -> None:
    space = spaced(tmp_path)
    with pytest.raises(ValueRefused, match=r"space: the loss is no number at step \d+ of 30"):
        fit_vae(space.folder, **VAE, lr=1e30)
    assert not (space.folder / "vae.safetensors").exists()


# ---------------------------------------------------------------------------------------------- interrupted, and shared


def interrupted(fit: Any, folder: Path, at: int, **words: Any) -> None:
    """A fit that Ctrl-C ends after step `at`."""

    def on_progress(done: int, _total: int, what: str | None = None) -> None:
        if what in ("the VAE", "diffusion") and done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(folder, **words, on_progress=on_progress)


@BOTH
def test_an_interrupted_fit_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fit: Any, words: dict[str, Any]
) -> None:
    monkeypatch.setattr(kept_descent, "EVERY", 7)
    space = spaced(tmp_path)
    whole = Path(fit(space.folder, **words, output=tmp_path / "whole.safetensors").output)
    target = tmp_path / "again.safetensors"
    interrupted(fit, space.folder, 17, **words, output=target)
    assert not target.exists()
    kept = tmp_path / "again-unfinished.safetensors"
    assert kept.exists()
    interrupted(fit, space.folder, 23, **words, output=target)
    report = fit(space.folder, **words, output=target)
    assert (report.resumed_at, report.steps, report.warnings) == (21, 30, [])
    assert target.read_bytes() == whole.read_bytes()
    assert not kept.exists()


@BOTH
def test_what_was_kept_of_other_words_or_is_cut_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fit: Any, words: dict[str, Any]
) -> None:
    monkeypatch.setattr(kept_descent, "EVERY", 7)
    space = spaced(tmp_path)
    target = tmp_path / "again.safetensors"
    kept = tmp_path / "again-unfinished.safetensors"
    whole = Path(fit(space.folder, **words, output=tmp_path / "whole.safetensors").output).read_bytes()
    interrupted(fit, space.folder, 9, **{**words, "lr": 0.005}, output=target)
    report = fit(space.folder, **words, output=target)
    assert report.warnings == [f"{kept}: begun anew: it is of another space, or of other words"]
    assert (report.resumed_at, target.read_bytes() == whole) == (0, True)
    interrupted(fit, space.folder, 9, **words, output=target, force=True)
    kept.write_bytes(kept.read_bytes()[:-40])
    report = fit(space.folder, **words, output=target, force=True)
    assert report.resumed_at == 0
    assert "begun anew" in report.warnings[0]
    assert target.read_bytes() == whole


_SHARED = """
import sys, torch
torch.set_num_threads(1)
from weightops.synthesis.learning import fit_diffusion, fit_vae
folder, out = sys.argv[1:]
vae = dict(latents=3, components=6, hidden=16, steps=30, device="cpu", batch=9)
diffusion = dict(components=4, width=16, steps=30, device="cpu", batch=9, conditioning="adalora")
for fit, words in ((fit_vae, vae), (fit_diffusion, diffusion)):
    report = fit(folder, **words, output=f"{out}-{fit.__name__}.safetensors")
    assert report.processes == 2, report.processes
"""


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """By torchrun and gloo, with a batch that two cannot halve."""
    space = spaced(tmp_path)
    script = tmp_path / "shared.py"
    script.write_text(_SHARED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    done = subprocess.run(
        [*launcher, str(script), str(space.folder), str(tmp_path / "two")],
        capture_output=True, text=True, check=False, env=environment, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = {"batch": 9}
    for fit, name in ((fit_vae, "vae"), (fit_diffusion, "denoiser")):
        more = VAE if fit is fit_vae else {**DIFFUSION, "conditioning": "adalora"}
        one = getattr(load_fitted(fit(space.folder, **more, **words).output), name)
        two = getattr(load_fitted(tmp_path / f"two-{fit.__name__}.safetensors"), name)
        for key, tensor in one.tensors().items():
            assert torch.allclose(two.tensors()[key], tensor, rtol=1e-4, atol=1e-4), key
        assert len(one.tensors()) > 10


@BOTH
def test_the_split_decides_what_is_learnt_from(tmp_path: Path, fit: Any, words: dict[str, Any]) -> None:
    """Whatever the held-out members are, the model is the same."""
    space = spaced(tmp_path)
    one = load_fitted(fit(space.folder, **words).output)
    rows = np.fromfile(space.path, "float32").reshape(40, 20)
    rows[list(one.held_out)] = 100.0
    rows.tofile(space.path)
    two = load_fitted(fit(space.folder, **words, force=True).output)
    assert torch.equal(one.latents, two.latents)
    network = "vae" if fit is fit_vae else "denoiser"
    for key, tensor in getattr(one, network).tensors().items():
        assert torch.equal(tensor, getattr(two, network).tensors()[key])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@BOTH
def test_a_gpu_learns_what_a_processor_does(tmp_path: Path, fit: Any, words: dict[str, Any]) -> None:
    space = spaced(tmp_path)
    found = []
    for device in ("cpu", "cuda"):
        report = fit(space.folder, **{**words, "device": device}, output=tmp_path / f"{device}.safetensors")
        fitted = load_fitted(report.output, open_space(space.folder))
        found.append((fitted.vae or fitted.denoiser).tensors())  # type: ignore[union-attr]
    for key, tensor in found[0].items():
        assert torch.allclose(found[1][key], tensor, rtol=1e-2, atol=1e-3), key


@pytest.mark.parametrize("begun", [False, True])
def test_the_command_says_where_a_stopped_fit_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    def stopped(_space: str, **_words: Any) -> None:
        if begun:
            (tmp_path / "vae-unfinished.safetensors").touch()
        raise Interrupted("", "interrupted: nothing was written, and no input was changed")

    monkeypatch.setattr(synth_fit, "fit_vae", stopped)
    with pytest.raises(Interrupted) as caught:
        CliRunner().invoke(synth_fit.command, ["vae", str(tmp_path)], standalone_mode=False)
    where = f"synth fit vae: interrupted; where it stands is kept in {tmp_path}/vae-unfinished.safetensors"
    assert str(caught.value) == (where if begun else "interrupted: nothing was written, and no input was changed")
    assert caught.value.hint == ("the same command goes on from there" if begun else None)
