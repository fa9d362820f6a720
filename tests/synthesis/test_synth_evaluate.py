"""An evaluation's numbers recompute from dense matrices; it goes on where it was broken off, and says what it lacks."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from little_base import Base, factors_of, little_base, little_space

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from commandline import weightops_here

from weightops.errors import Interrupted, MismatchError, OutputError, UsageError
from weightops.synthesis import evaluation_conditioned
from weightops.synthesis.evaluate import EvaluateReport, evaluate
from weightops.synthesis.evaluation_cells import Cell, Cells, Measured, mean_and_spread, spread_table
from weightops.synthesis.evaluation_measures import among, delta_error, distances, nearest_distances
from weightops.synthesis.gap import Losses
from weightops.synthesis.null import noise_null
from weightops.synthesis.own_images import OwnImages, list_images
from weightops.synthesis.space import open_space
from weightops.synthesis.split import split

if TYPE_CHECKING:
    from weightops.synthesis.space import Space

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
torch.set_num_threads(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' schedulers
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SMALL: dict[str, Any] = {
    "components": (1, 3), "latents": (2,), "betas": (0.01,), "conditioned": (2,), "seeds": 2, "held_out": 3,
    "vae_steps": 5, "diffusion_steps": 5,
}  # fmt: skip
WHOLE: dict[str, Any] = {
    **SMALL, "pairs": 1, "steps": 2, "few_images": 1, "learners": 2, "plain_lrs": (0.001, 0.01), "generate": 1,
    "shown": 2, "sampling_steps": 2, "strengths": (1.0, 1.5),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return little_base(tmp_path_factory.getbasetemp() / "little-base")


@pytest.fixture(scope="module")
def space(base: Base) -> Space:
    return little_space(base)


@pytest.fixture(scope="module")
def inputs(base: Base, space: Space) -> dict[str, Any]:
    """The model, images of each LoRA, and an embedder that makes three numbers of an image."""
    from safetensors.torch import save_file

    drawn = torch.Generator().manual_seed(0)
    tensors = {"weight": 0.1 * torch.randn(3, 3 * 8 * 8, generator=drawn), "bias": torch.zeros(3)}
    save_file(tensors, base.folder / "map.safetensors", {"weightops_embedder": "linear", "size": "8"})
    return {
        "model": base.model, "images": base.images("unseen", dict.fromkeys(space.names, 2)),
        "few": base.images("few", dict.fromkeys(space.names, 1)), "embedder": base.folder / "map.safetensors",
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(base: Base, space: Space, inputs: dict[str, Any]) -> EvaluateReport:
    return evaluate(space.folder, **inputs, **WHOLE, output=base.folder / "whole")


def column(report: EvaluateReport, table: str, name: str) -> dict[tuple[Any, ...], Any]:
    found = report.tables[table]
    place = found.columns.index(name)
    return {row[:2]: row[place] for row in found.rows}


# ------------------------------------------------------------------------------------------------ the numbers


def dense(factors: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """ΔW of all modules in one row [n, …]."""
    return torch.cat([(up.double() @ down.double()).flatten(1) for up, down in factors], 1)


def test_distances_are_those_of_dense_matrices(space: Space) -> None:
    factors = factors_of(space.layout, 3, seed=1, size=0.05)
    members = [4, 0, 7]
    others = dense(space.layout.unflatten(space.rows(members)))
    expected = torch.cdist(dense(factors), others).numpy()
    assert np.allclose(distances(factors, space, members), expected, rtol=1e-6)
    unit = others.norm(dim=1).mean()
    found = nearest_distances(factors, space, members)
    assert found["least"] == pytest.approx(float(expected.min() / unit), rel=1e-6)
    assert found["nearest"] == pytest.approx(float(np.median(expected.min(1)) / unit), rel=1e-6)
    apart = torch.cdist(others, others).fill_diagonal_(math.inf).min(1).values / unit
    assert among(space, members)["nearest"] == pytest.approx(float(apart.median()), rel=1e-6)
    true = factors_of(space.layout, 3, seed=2)
    wrong = (dense(factors) - dense(true)).norm() / dense(true).norm()
    assert delta_error(factors, true) == pytest.approx(float(wrong), rel=1e-9)


def test_reconstruction_is_that_of_a_singular_value_decomposition(
    base: Base, space: Space, inputs: dict[str, Any], whole: EvaluateReport
) -> None:
    explained: dict[int, list[float]] = {1: [], 3: []}
    errors: dict[int, list[float]] = {1: [], 3: []}
    gaps: dict[int, list[float]] = {1: [], 3: []}
    for seed in range(2):
        trained, held = split(space, 3, seed)
        rows, own = space.rows(trained).double(), space.rows(held).double()
        mean = rows.mean(0)
        _, values, axes = torch.linalg.svd(rows - mean, full_matrices=False)
        names = [space.names[index] for index in held]
        images = OwnImages(base.loaded, list_images(inputs["images"], names, option="--images"))
        for count in (1, 3):
            made = mean + (own - mean) @ axes[:count].mT @ axes[:count]
            explained[count].append(float(values[:count].square().sum() / values.square().sum()))
            true = dense(space.layout.unflatten(own))
            errors[count].append(float((dense(space.layout.unflatten(made)) - true).norm() / true.norm()))
            with Losses(images, space.layout, pairs=1) as losses:
                plain = losses.of(names, None)
                gained = plain - losses.of(names, space.layout.unflatten(own.float()))
                gaps[count].append(
                    float((plain - losses.of(names, space.layout.unflatten(made.float()))).sum() / gained.sum())
                )
    for count in (1, 3):
        row = ("space", str(count))
        assert column(whole, "reconstruction", "explained")[row] == pytest.approx(np.mean(explained[count]), rel=1e-5)
        assert column(whole, "reconstruction", "ΔW error")[row] == pytest.approx(np.mean(errors[count]), rel=1e-4)
        assert column(whole, "reconstruction", "gap")[row] == pytest.approx(np.mean(gaps[count]), abs=2e-3)
        assert column(whole, "reconstruction", "± gap")[row] == pytest.approx(np.std(gaps[count], ddof=1), abs=3e-3)
        null = noise_null(len(trained), space.width, count)
        assert column(whole, "reconstruction", "of noise")[row] == pytest.approx(null)


def test_changes_themselves_are_made_from_their_own_components(space: Space, whole: EvaluateReport) -> None:
    explained = []
    errors = []
    for seed in range(2):
        trained, held = split(space, 3, seed)
        rows, own = (dense(space.layout.unflatten(space.rows(part).double())) for part in (trained, held))
        mean = rows.mean(0)
        axes = torch.linalg.svd(rows - mean, full_matrices=False)[2][:3]
        made = mean + (own - mean) @ axes.mT @ axes
        explained.append(1 - float((own - made).square().sum() / (own - mean).square().sum()))
        errors.append(float((own - made).norm() / own.norm()))
    assert column(whole, "reconstruction", "held out")["ΔW", "3"] == pytest.approx(np.mean(explained), rel=1e-5)
    assert column(whole, "reconstruction", "ΔW error")["ΔW", "3"] == pytest.approx(np.mean(errors), rel=1e-4)


def test_every_claim_stands_beside_its_baselines(whole: EvaluateReport) -> None:
    conditioned = {row[0] for row in whole.tables["conditioned"].rows}
    assert {"the mean LoRA", "nearest neighbour", "ridge regression"} < conditioned
    assert {f"diffusion, {p}, {c}" for p in ("x0", "v") for c in ("AdaNorm", "AdaLoRA")} < conditioned
    learnt = [row[0] for row in whole.tables["learnt"].rows]
    assert learnt[0] == "the mean LoRA, nothing learnt"
    assert learnt.count("plain training") == 1
    rates = whole.tables["learnt-rates"]
    assert [row[1] for row in rates.rows] == ["0.001", "0.01"]
    best = max(column(whole, "learnt-rates", "gap").values())
    assert [row[2] for row in whole.tables["learnt"].rows if row[0] == "plain training"] == [best]
    shown = [row[0] for row in whole.tables["shown"].rows]
    assert shown[0] == "the model alone"
    assert shown[-5:] == [
        "coefficients from 1 image", "coefficients from 1 image, at 1.5", "the LoRA that was trained",
        "the LoRA that was trained, at 1.5", "held-out pictures",
    ]  # fmt: skip
    assert {row[0] for row in whole.tables["latents"].rows} == {"PCA", "VAE, linear, β 0.01", "VAE, MLP, β 0.01"}
    assert column(whole, "copies-conditioned", "nearest of all")["nearest neighbour", ""] == pytest.approx(0, abs=1e-3)
    for finding in whole.findings:
        assert len(finding.says) > 200
    assert not whole.left_out


def test_the_folder_holds_tables_plots_and_a_page(base: Base, whole: EvaluateReport) -> None:
    folder = base.folder / "whole"
    document = json.loads((folder / "evaluation.json").read_text())
    assert sorted(document["files"]) == sorted(path.name for path in folder.iterdir() if path.is_file())
    assert document["words"]["components"] == [1, 3]
    with (folder / "reconstruction.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == whole.tables["reconstruction"].columns
    page = (folder / "evaluation.html").read_text()
    assert page.count("<table>") == len(whole.tables)
    assert page.count("data:image/png") == sum(len(finding.drawings) for finding in whole.findings)
    assert {"reconstruction-gap.png", "learnt.png", "shown.png"} < set(document["files"])
    assert str(base.folder) not in json.dumps(document)
    assert json.loads(json.dumps(whole.to_dict(), allow_nan=False))["command"] == "synth evaluate"


# ------------------------------------------------------------------------------------------------ going on


def test_what_was_measured_is_not_measured_again(
    base: Base, space: Space, inputs: dict[str, Any], whole: EvaluateReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in (base.folder / "whole").iterdir() if path.is_file()}
    with pytest.raises(OutputError, match="an evaluation is there already"):
        evaluate(space.folder, **inputs, **WHOLE, output=base.folder / "whole")
    copy = base.folder / "copy"
    shutil.copytree(base.folder / "whole", copy)
    monkeypatch.setattr("weightops.synthesis.evaluation_fits.principal", None)  # nothing is fitted
    again = evaluate(space.folder, **inputs, **WHOLE, output=copy, force=True)
    assert again.taken == again.cells == whole.cells
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()} == before


def test_an_interrupted_evaluation_goes_on(space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(space.folder, **SMALL, output=tmp_path / "whole")
    asked = evaluation_conditioned.rows_by

    def broken(*words: Any) -> Any:
        if words[2].label == "ridge regression":
            raise KeyboardInterrupt
        return asked(*words)

    monkeypatch.setattr(evaluation_conditioned, "rows_by", broken)
    with pytest.raises(Interrupted, match=r"interrupted after .* pieces, which are kept in"):
        evaluate(space.folder, **SMALL, output=tmp_path / "broken")
    assert not (tmp_path / "broken" / "evaluation.json").exists()
    kept = len(list((tmp_path / "broken" / "cells").iterdir()))
    assert 0 < kept < whole.cells
    monkeypatch.setattr(evaluation_conditioned, "rows_by", asked)
    done = evaluate(space.folder, **SMALL, output=tmp_path / "broken")
    assert done.taken == kept
    for name in done.files:
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_words_are_measured_anew(space: Space, tmp_path: Path) -> None:
    few = SMALL | {"methods": ("pca",), "seeds": 1}
    evaluate(space.folder, **few, output=tmp_path / "a")
    more = evaluate(space.folder, **(few | {"held_out": 4}), output=tmp_path / "a", force=True)
    assert more.taken == 0
    assert "nearest" not in (tmp_path / "a" / "reconstruction.csv").read_text()


def test_cells_that_cannot_be_read_are_measured_again(tmp_path: Path) -> None:
    calls = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"x": 2.0}

    cell = Cell("part", ("row",), 0, {"of": 1}, measure)
    for _ in range(2):
        Cells(tmp_path, {}).measure([cell], lambda *_: None)
    assert len(calls) == 1
    (path,) = (tmp_path / "cells").iterdir()
    path.write_bytes(b'{"x": 2')
    Cells(tmp_path, {}).measure([cell], lambda *_: None)
    assert len(calls) == 2
    Cells(tmp_path, {"other": 1}).measure([cell], lambda *_: None)
    assert len(calls) == 3


def test_a_spread_is_the_deviation_over_seeds(tmp_path: Path) -> None:
    assert mean_and_spread([]) == (None, None)
    assert mean_and_spread([2.0]) == (2.0, None)
    assert mean_and_spread([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7)))
    cells = Cells(tmp_path, {})
    made = [Cell("p", ("a", "b"), seed, {}, lambda s=seed: {"x": s, "y": None}) for seed in (1, 3)]
    cells.measure(made, lambda *_: None)
    table = spread_table(cells, "p", title="t", heads=("one", "two"), columns=(Measured("x", "X"), Measured("y", "Y")))
    assert table.columns == ("one", "two", "X", "± X")
    assert table.rows == (("a", "b", 2.0, pytest.approx(math.sqrt(2))),)
    one = Cells(tmp_path / "one", {})
    one.measure(made[:1], lambda *_: None)
    assert spread_table(one, "p", title="t", heads=("one", "two"), columns=(Measured("x", "X"),)).columns[2:] == ("X",)


# ------------------------------------------------------------------------------------------------ what is lacking


def test_what_cannot_be_measured_is_named(space: Space, tmp_path: Path) -> None:
    report = evaluate(space.folder, **SMALL, output=tmp_path / "a", dry_run=True)
    needs = {left.part: left.needs for left in report.left_out}
    assert needs["learnt from a few images"] == "needs --model and --images and --few"
    assert needs["the gap of every LoRA"] == "needs --model and --images"
    assert needs["images of the synthesised LoRAs"] == "not asked for: --generate N"
    assert report.cells > 0
    assert not (tmp_path / "a").exists()
    few = evaluate(space.folder, **SMALL, methods=("pca",), output=tmp_path / "a", dry_run=True)
    assert {"latents", "from a condition"} < {left.part for left in few.left_out}


def test_spaces_of_the_same_loras_are_compared(base: Base, space: Space, tmp_path: Path) -> None:
    raw = little_space(base, "raw", form="raw")
    words = SMALL | {"methods": ("pca",), "seeds": 1}
    report = evaluate([space.folder, raw.folder], **words, output=tmp_path / "a")
    assert [row[:2] for row in report.tables["reconstruction"].rows] == [
        ("space", "1"), ("space", "3"), ("raw", "1"), ("raw", "3"),
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"found the space '.*raw' twice"):
        evaluate([raw.folder, raw.folder], **words, output=tmp_path / "b")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"methods": ("pac",)}, "--methods: found 'pac', expected pca, delta"),
        ({"seeds": 0}, "--seeds: found 0, expected 1 or more"),
        ({"components": ()}, "--components: found 0, expected 1 or more"),
        ({"held_out": 0.0}, "of 12 LoRAs none is held out"),
        ({"held_out": 11}, "1 LoRAs are left to learn from, expected 3 or more"),
        ({"plain_lrs": (0.0,)}, "--plain-lrs: found 0.0, expected numbers above 0"),
    ],
)
def test_wrong_words_are_refused(space: Space, tmp_path: Path, words: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(space.folder, **(SMALL | words), output=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_folder_of_something_else_is_left_alone(space: Space, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("notes")
    for force in (False, True):
        with pytest.raises(OutputError, match="holds something else than an evaluation of spaces"):
            evaluate(space.folder, **SMALL, output=tmp_path, force=force)
    with pytest.raises(OutputError):
        evaluate(space.folder, **SMALL, output=space.folder, force=True)
    assert open_space(space.folder).names == space.names


def test_spaces_of_other_loras_and_embedders_of_other_numbers_are_refused(
    base: Base, space: Space, inputs: dict[str, Any], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    from weightops.synthesis.collect import collect

    collect(
        sorted((base.folder / "loras").iterdir())[0],
        sorted((base.folder / "loras").iterdir())[1],
        output=tmp_path / "two",
    )
    with pytest.raises(MismatchError, match=r"found 2 LoRAs, of which 2 are in .*, which has 12"):
        evaluate([space.folder, tmp_path / "two"], **SMALL, output=tmp_path / "a")
    tensors = {"weight": torch.zeros(2, 3 * 8 * 8), "bias": torch.zeros(2)}
    save_file(tensors, tmp_path / "map.safetensors", {"weightops_embedder": "linear", "size": "8"})
    with pytest.raises(MismatchError, match="makes 2 numbers of an image, and the conditions have 3"):
        evaluate(space.folder, **(inputs | {"embedder": tmp_path / "map.safetensors"}), **WHOLE, output=tmp_path / "a")


def test_the_command_draws_tables_and_says_json(space: Space, tmp_path: Path) -> None:
    words = ["synth", "evaluate", space.folder, "--components", "2", "--seeds", "1", "--methods", "pca,ridge"]
    words += ["--conditioned", "2", "--held-out", "3", "-o", tmp_path / "a"]
    done = weightops_here(*words)
    assert done.code == 0, done.err
    assert "Held-out LoRAs, made from components" in done.out
    assert "One seed: no spread is known" in done.out
    again = weightops_here(*words, "--force", "--json")
    found = json.loads(again.out)
    assert found["taken"] == found["cells"]
    assert weightops_here(*words[:3], "--components", "two").err.startswith("error: --components: found 'two'")
