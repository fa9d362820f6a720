"""fit pca as a verb: what it reports, what it refuses, and what an interrupted one leaves."""

from __future__ import annotations

import inspect
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
from conftest import weightops
from made import low_dimensional, made_space
from spaces import space_of

from weightops.cli import synth_fit
from weightops.errors import MemoryRefused, OutputError, UsageError, ValueRefused
from weightops.synthesis.fit import fit_pca
from weightops.synthesis.fitted import load_fitted
from weightops.synthesis.learning import fit_diffusion, fit_vae
from weightops.synthesis.null import noise_null
from weightops.synthesis.space import open_space
from weightops.synthesis.split import split, split_count

if TYPE_CHECKING:
    from weightops.synthesis.fit_report import FitReport


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def fit(space: Path, **words: Any) -> FitReport:
    return fit_pca(space, **{"components": 3, "device": "cpu", **words})


# ------------------------------------------------------------------------------------------------ the split


def test_a_split_is_the_seeds_and_nothing_is_in_both(tmp_path: Path) -> None:
    space = made_space(tmp_path / "space", low_dimensional(40, 10, 2))
    trained, held_out = split(space, 0.25, 3)
    assert len(held_out) == 10
    assert sorted(trained + held_out) == list(range(40))
    assert trained == sorted(trained)
    assert split(space, 0.25, 3) == split(space, 10, 3) == (trained, held_out)
    assert split(space, 0.25, 4) != (trained, held_out)
    assert split(space, 0, 3) == (list(range(40)), [])


@pytest.mark.parametrize("held_out", [-0.1, 1.5, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(held_out: float) -> None:
    with pytest.raises(UsageError, match=r"--held-out: found .*, expected a share below 1"):
        split_count(40, held_out, 0, label="space")


def test_all_held_out_is_refused() -> None:
    with pytest.raises(UsageError, match="space: holds 40 LoRAs, and 40 held out leave none to train on"):
        split_count(40, 40, 0, label="space")
    with pytest.raises(UsageError, match="--seed: found -1"):
        split_count(40, 4, -1, label="space")


# ------------------------------------------------------------------------------------------------ the report


@pytest.mark.parametrize("geometry", ["rows", "delta"])
def test_it_says_what_was_found_beside_what_noise_would_be(tmp_path: Path, geometry: str) -> None:
    space = space_of(tmp_path, 20)
    report = fit(space.folder, geometry=geometry)
    assert (report.members, report.trained, report.held_out, report.components) == (20, 16, 4, 3)
    assert report.features == (space.width if geometry == "rows" else sum(m.out * m.n for m in space.layout.modules))
    assert report.noise_null == noise_null(16, report.features, 3)
    assert report.noise_null < report.explained < 1
    assert report.route == "gram"
    assert report.reached == 0
    assert report.output == str(space.folder / "pca.safetensors")
    assert report.bytes_written == (space.folder / "pca.safetensors").stat().st_size
    assert report.warnings == []
    said = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert said["command"] == "synth fit"
    assert "process" not in said
    fitted = load_fitted(report.output, space)
    assert report.explained == pytest.approx(float(fitted.explained[-1]))
    rows = space.rows(list(fitted.held_out))
    if geometry == "rows":
        assert fitted.pca is not None
        apart = (rows - fitted.pca.mean).square().sum()
        left = (rows - fitted.rows_of(fitted.latents_of(rows))).square().sum()
    else:
        made, whole, trained = (
            torch.cat([(up.double() @ down.double()).flatten(-2) for up, down in factors], -1)
            for factors in (
                fitted.factors_of(fitted.latents_of(rows)), space.layout.unflatten(rows),
                space.layout.unflatten(space.rows(list(fitted.trained))),
            )
        )  # fmt: skip
        apart, left = (whole - trained.mean(0)).square().sum(), (whole - made).square().sum()
    assert report.explained_held_out == pytest.approx(1 - float(left / apart), abs=1e-5)


def test_with_conditions_the_baselines_are_fitted(tmp_path: Path) -> None:
    rows = low_dimensional(60, 40, 3)
    conditions = (rows.double() - rows.double().mean(0)).numpy()[:, :4]
    space = made_space(tmp_path / "space", rows, conditions=conditions)
    report = fit(space.folder)
    assert report.left_out is not None
    assert report.left_out < 0.01  # four features of a row tell where it is in three dimensions
    fitted = load_fitted(report.output, space)
    assert fitted.ridge is not None
    assert fitted.nearest is not None
    held_out = list(fitted.held_out)
    found = fitted.ridge.predict(conditions[held_out])
    wanted = fitted.latents_of(space.rows(held_out))
    assert float((found - wanted).square().sum() / wanted.square().sum()) < 0.01
    assert fitted.nearest.nearest(conditions[list(fitted.trained)]).tolist() == list(range(48))


def test_noise_and_raw_rows_are_warned_of(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    noise = made_space(tmp_path / "noise", torch.from_numpy(draw.standard_normal((40, 60))).float(), form="raw")
    warnings = fit(noise.folder).warnings
    assert len(warnings) == 2
    assert "pure noise of this size has" in warnings[0]
    assert "explained variance says nothing across gauges" in warnings[1]


def test_components_without_variance_are_left_out_and_said(tmp_path: Path) -> None:
    rows = low_dimensional(8, 30, 5).repeat(4, 1)
    report = fit(made_space(tmp_path / "space", rows).folder, components=12, held_out=0)
    assert report.components == 7
    assert report.explained == pytest.approx(1)
    assert report.explained_held_out is None
    assert "only 7 of 12 components have any variance" in report.warnings[0]


# ------------------------------------------------------------------------------------------------ refusals


def test_too_few_loras_are_refused(tmp_path: Path) -> None:
    made_space(tmp_path / "one", low_dimensional(1, 30, 1))
    made_space(tmp_path / "few", low_dimensional(15, 30, 3))
    with pytest.raises(UsageError, match="one: found 1 LoRA to train on, expected 2 or more"):
        fit(tmp_path / "one")
    with pytest.raises(UsageError) as caught:
        fit(tmp_path / "few", components=64)
    assert caught.value.what == "found 12 LoRAs to train on, expected at least 65 for 64 components"
    assert caught.value.hint == "--components 11, or collect more LoRAs, or hold out fewer"
    with pytest.raises(UsageError, match="15 held out leave none to train on"):
        fit(tmp_path / "few", held_out=15)
    assert sorted(path.name for path in (tmp_path / "few").iterdir()) == ["members.jsonl", "rows.fp32", "space.json"]


def test_a_nan_is_refused_by_the_members_name(tmp_path: Path) -> None:
    rows = low_dimensional(20, 30, 3)
    rows[7, 3] = float("nan")
    made_space(tmp_path / "space", rows)
    for geometry in ("rows", "delta"):
        with pytest.raises(ValueRefused, match="space: the row of 'member-7' holds NaN or Inf"):
            fit(tmp_path / "space", held_out=0, geometry=geometry)


def test_loras_that_are_all_the_same_are_refused(tmp_path: Path) -> None:
    made_space(tmp_path / "space", torch.ones(20, 30))
    for geometry in ("rows", "delta"):
        with pytest.raises(ValueRefused, match="are all the same"):
            fit(tmp_path / "space", geometry=geometry)


def test_the_reference_of_a_space_is_never_replaced(tmp_path: Path) -> None:
    space = space_of(tmp_path, 6)
    with pytest.raises(OutputError, match=r"reference\.safetensors: is an input, and inputs are never replaced"):
        fit_pca(space.folder, components=2, output=space.folder / "reference.safetensors", force=True)
    assert open_space(space.folder).digest == space.digest


def test_no_fitted_file_says_where_anything_lies(tmp_path: Path) -> None:
    conditions = np.random.default_rng(0).standard_normal((30, 2))
    space = made_space(tmp_path / "space", low_dimensional(30, 40, 3), conditions=conditions).folder
    fit(space)
    fit_vae(space, latents=2, components=3, steps=2)
    fit_diffusion(space, latents_of=space / "vae.safetensors", steps=2)
    for kind, source in (("pca", None), ("vae", "pca.safetensors"), ("diffusion", "vae.safetensors")):
        path = space / f"{kind}.safetensors"
        assert str(tmp_path).encode() not in path.read_bytes()
        assert load_fitted(path).settings.get("learnt_from") == source


def test_wrong_words_are_refused(tmp_path: Path) -> None:
    space = made_space(tmp_path / "space", low_dimensional(20, 30, 3)).folder
    for words, said in (
        ({"components": 0}, "--components: found 0"),
        ({"components": 31}, "found 16 LoRAs to train on"),
        ({"geometry": "weights"}, "--geometry: found 'weights', expected rows or delta"),
        ({"tolerance": 0.0}, "--tolerance: found 0, expected"),
        ({"passes": 1}, "--passes: found 1, expected 2 or more"),
        ({"output": tmp_path / "a.bin"}, r"a\.bin: the output's name must end in \.safetensors"),
    ):
        with pytest.raises(UsageError, match=said):
            fit(space, **words)
    with pytest.raises(MemoryRefused, match=r"3 components of 16 rows of 30 features take 1 MiB, found 0 MiB"):
        fit(space, memory=100)
    fit(space)
    with pytest.raises(OutputError, match="exists"):
        fit(space)
    assert fit(space, force=True).components == 3


# ------------------------------------------------------------------------------------------------ interrupted


def large(folder: Path) -> Path:
    """Many rows and many features: the iteration is the cheapest way."""
    return made_space(folder, low_dimensional(500, 420, 3, noise=4.0), dtype="fp16").folder


def interrupted(space: Path, at: int, **words: Any) -> None:
    def stop(_done: int, _total: int, title: str | None = None) -> None:
        if title == f"pass {at}":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(space, on_progress=stop, **words)


def test_an_interrupted_fit_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    space = large(tmp_path / "space")
    whole = fit(space, output=tmp_path / "whole.safetensors")
    assert whole.route == "iteration"
    assert whole.passes > 4
    assert whole.reached <= 1e-6
    interrupted(space, 4)
    assert not (space / "pca.safetensors").exists()
    assert (space / "pca-unfinished.safetensors").is_file()
    again = fit(space)
    assert again.resumed_at == 3
    assert again.passes == whole.passes
    assert (space / "pca.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not (space / "pca-unfinished.safetensors").exists()


def test_another_fit_is_begun_anew_and_says_so(tmp_path: Path) -> None:
    space = large(tmp_path / "space")
    interrupted(space, 3)
    report = fit(space, components=4)
    assert report.resumed_at == 0
    assert report.warnings == [
        f"{space / 'pca-unfinished.safetensors'}: begun anew: it is of another space, or of other words"
    ]
    interrupted(space, 3, force=True)
    kept = space / "pca-unfinished.safetensors"
    kept.write_bytes(kept.read_bytes()[:-100])
    report = fit(space, force=True)
    assert report.resumed_at == 0
    assert report.warnings[0].startswith(f"{kept}: begun anew: ")
    assert not kept.exists()


def test_passes_are_a_limit_that_is_said(tmp_path: Path) -> None:
    report = fit(large(tmp_path / "space"), passes=2)
    assert report.passes == 2
    assert "after 2 passes the components are sure to" in report.warnings[0]


# ------------------------------------------------------------------------------------------------ the command line


def test_the_command_says_it_for_people_and_for_scripts(tmp_path: Path) -> None:
    space = space_of(tmp_path, 12)
    done = weightops("synth", "fit", "pca", "space", "--components", 2, "--held-out", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 components of 9 LoRAs (rows, aligned); 3 held out" in done.stdout
    assert "of pure noise of this size" in done.stdout
    assert "wrote  space/pca.safetensors" in done.stdout
    words = ["--geometry", "delta", "-o", "delta.safetensors", "--json", "--components", 2]
    done = weightops("synth", "fit", "pca", "space", *words, cwd=tmp_path)
    assert json.loads(done.stdout)["geometry"] == "delta"
    assert load_fitted(tmp_path / "delta.safetensors", open_space(space.folder)).components == 2
    done = weightops("synth", "fit", "pca", "space", "--held-out", "some", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --held-out: found 'some', expected a share below 1")


@pytest.mark.parametrize(("name", "verb"), [("pca", fit_pca), ("vae", fit_vae), ("diffusion", fit_diffusion)])
def test_every_word_of_a_verb_is_an_option_with_its_default(name: str, verb: Any) -> None:
    given = synth_fit.command.commands[name].make_context(name, ["folder"]).params
    words = {word: p.default for word, p in inspect.signature(verb).parameters.items() if word != "on_progress"}
    assert given == {**words, "space": "folder", "as_json": False, "quiet": False, "verbose": False}


def test_networks_are_fitted_from_the_command_line(tmp_path: Path) -> None:
    conditions = np.random.default_rng(0).standard_normal((30, 3))
    space = made_space(tmp_path / "space", low_dimensional(30, 40, 5), conditions=conditions)
    runner, words = CliRunner(), ["--components", "4", "--steps", "5", "--device", "cpu"]
    vae = runner.invoke(synth_fit.command, ["vae", str(space.folder), "--latents", "2", *words])
    assert vae.exit_code == 0, vae.output
    assert "a VAE, 2 latents, 4 components, of 24 LoRAs (rows, svd); 6 held out" in vae.output
    assert load_fitted(space.folder / "vae.safetensors", space).kind == "vae"
    diffusion = runner.invoke(synth_fit.command, ["diffusion", str(space.folder), *words, "--json"])
    assert diffusion.exit_code == 0, diffusion.output
    assert json.loads(diffusion.stdout)["kind"] == "diffusion"
    assert load_fitted(space.folder / "diffusion.safetensors", space).denoiser is not None


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="whole processes are measured with wait4")
def test_the_benchmark_finds_the_components_it_has_planted(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "synthesis.py"
    words = ["pca", "--members", "900", "--features", "800", "--components", "4", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, str(script), *words, "--folder", str(tmp_path)], capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "by iteration" in done.stdout
    assert "64,974 x 99,648 fp16, 2,000 components: 12.9 GB on disk" in done.stdout
    assert done.stdout.endswith("good\n")
    assert list(tmp_path.iterdir()) == []
