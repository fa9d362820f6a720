"""A LoRA that is moved along a label becomes what it would be with more of it, and stays what it is beside that."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import weightops
from learnt import NAMES, conditions_of, learnt
from spaces import factors_of, family_of, layout_of

from weightops.cli.synth_edit import command
from weightops.errors import OutputError, UsageError
from weightops.files.checkpoint import open_checkpoint
from weightops.lineage import read_recipe
from weightops.synthesis.directions import directions_of
from weightops.synthesis.edit import EditReport, edit
from weightops.synthesis.fitted import load_fitted
from weightops.synthesis.members import read_factors
from weightops.synthesis.memorised import relative as relatives

if TYPE_CHECKING:
    from pathlib import Path

torch.set_num_threads(1)

Factors = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learnt(tmp_path_factory.mktemp("learnt"))


def moved(there: Path, output: Path, kind: str = "pca", lora: str = "lora-2", **words: Any) -> EditReport:
    given = {"label": "hue", "strength": 1.0, **words}
    return edit(there / f"loras/{lora}.safetensors", there / f"space/{kind}.safetensors", output=output, **given)


def read(path: Path) -> Factors:
    return [(up[None], down[None]) for up, down in read_factors(path, layout_of(2))[0]]


def relative(made: Factors, other: Factors) -> float:
    return relatives(made, other)[0]


# ------------------------------------------------------------------------------------------------ directions


def drawn(n: int = 400, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels [n, 3] of which the first two go together, what each does for one deviation [3, 5], and latents."""
    made = np.random.default_rng(1)
    labels = made.normal(size=(n, 3))
    labels[:, 1] = 0.8 * labels[:, 0] + 0.6 * labels[:, 1]
    labels *= (2.0, 0.1, 30)
    labels += (5, -1, 0)
    effects = made.normal(size=(3, 5))
    latents = (labels - labels.mean(0)) / labels.std(0) @ effects + noise * made.normal(size=(n, 5))
    return labels, effects, latents


def test_a_direction_holds_nothing_of_what_its_label_shares_with_another() -> None:
    labels, effects, latents = drawn()
    found = directions_of(torch.from_numpy(latents), labels, NAMES, where="test")
    assert np.stack([d.latents for d in found]) == pytest.approx(effects, abs=0.1)
    assert [d.deviation for d in found] == pytest.approx(labels.std(0).tolist())
    alone = directions_of(torch.from_numpy(latents), labels[:, :1], NAMES[:1], where="test")[0]
    assert alone.latents == pytest.approx(effects[0] + 0.8 * effects[1], abs=0.15)  # which one label alone would


def test_the_share_is_what_the_label_adds_to_the_others() -> None:
    labels, _, latents = drawn()
    found = directions_of(torch.from_numpy(latents), labels, NAMES, where="test")
    centred, standard = latents - latents.mean(0), labels - labels.mean(0)

    def left(columns: list[int]) -> float:
        some = standard[:, columns]
        return float(((centred - some @ np.linalg.lstsq(some, centred, rcond=None)[0]) ** 2).sum())

    for j, direction in enumerate(found):
        added = left([i for i in range(3) if i != j]) - left([0, 1, 2])
        assert direction.share == pytest.approx(added / float((centred**2).sum()), rel=1e-9)
        assert not direction.is_chance


def test_a_label_that_says_nothing_is_above_the_null_as_seldom_as_it_should_be() -> None:
    made = np.random.default_rng(0)
    _, _, latents = drawn(60)
    above = 0
    for _ in range(60):
        labels = made.normal(size=(60, 2))
        above += sum(not d.is_chance for d in directions_of(torch.from_numpy(latents), labels, ("a", "b"), where=""))
    assert 0 < above < 18  # of 120; 6 are to be expected


def test_binary_labels_are_labels_and_those_that_never_change_are_none() -> None:
    labels, effects, latents = drawn()
    labels[:, 2] = labels[:, 2] > 0
    labels = np.concatenate([labels, np.full((400, 1), 0.1)], 1)
    found = directions_of(torch.from_numpy(latents), labels, (*NAMES, "flat"), where="test")
    assert [d.label for d in found] == list(NAMES)
    assert found[2].latents == pytest.approx(effects[2] * (2 / np.pi) ** 0.5, abs=0.15)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: np.concatenate([x, x[:, :1] - 3 * x[:, 1:2]], 1), "the other labels say all that"),
        (lambda x: x[:5], "found 5 LoRAs with 3 labels, expected at least 6: least squares takes more LoRAs"),
    ],
)
def test_labels_that_least_squares_cannot_tell_apart_are_refused(change: Any, said: str) -> None:
    labels, _, latents = drawn()
    labels = change(labels)
    with pytest.raises(UsageError, match=said):
        directions_of(torch.from_numpy(latents[: len(labels)]), labels, (*NAMES, "sum")[: labels.shape[1]], where="x")


# ------------------------------------------------------------------------------------------------ a LoRA


@pytest.mark.parametrize("kind", ["pca", "delta", "vae", "diffusion"])
@pytest.mark.parametrize(("label", "strength"), [("hue", 1.0), ("shape", -0.5)])
def test_a_lora_becomes_what_it_would_be_with_more_of_the_label(
    kind: str, label: str, strength: float, there: Path, tmp_path: Path
) -> None:
    report = moved(there, tmp_path / "a.safetensors", kind, label=label, strength=strength)
    layout = layout_of(2)
    own, part = family_of(layout, 3)[2], factors_of(layout, 1 + NAMES.index(label))
    truth = [
        (up + report.amount * a, down + report.amount * b) for (up, down), (a, b) in zip(own, part, strict=True)
    ]  # fmt: skip
    wanted = [(up[None], down[None]) for up, down in truth]
    before = relative(read(there / "loras/lora-2.safetensors"), wanted)
    after = relative(read(tmp_path / "a.safetensors"), wanted)
    assert after < (0.4 if kind in ("pca", "diffusion") else 0.65) * before
    assert report.change == pytest.approx(
        relative(read(tmp_path / "a.safetensors"), read(there / "loras/lora-2.safetensors")), rel=1e-4
    )


@pytest.mark.parametrize("kind", ["pca", "delta"])
def test_what_the_model_leaves_out_of_a_lora_stays(kind: str, there: Path, tmp_path: Path) -> None:
    model = load_fitted(there / "space/pca.safetensors")
    lora = model.held_out_names[0]
    own = read(there / f"loras/{lora}.safetensors")
    report = moved(there, tmp_path / "a.safetensors", kind, lora, strength=0.0)
    assert relative(read(tmp_path / "a.safetensors"), own) < 1e-5
    assert report.change < 1e-5
    assert report.ranks == {2: 4}


def test_twice_as_far_is_twice_the_way(there: Path, tmp_path: Path) -> None:
    rows = []
    for strength in (0.0, 0.01, 0.02):
        moved(there, tmp_path / f"{strength}.safetensors", strength=strength)
        rows.append(torch.cat([(up @ down).flatten() for up, down in read(tmp_path / f"{strength}.safetensors")]))
    assert float((rows[2] - rows[0] - 2 * (rows[1] - rows[0])).norm() / (rows[2] - rows[0]).norm()) < 0.02


def test_the_file_says_what_was_done(there: Path, tmp_path: Path) -> None:
    moved(there, tmp_path / "a.safetensors", strength=-0.5, rank=1, dialect="diffusers", dtype="bf16")
    with open_checkpoint(tmp_path / "a.safetensors") as opened:
        said = read_recipe(opened.metadata["weightops"], "")
        dtypes = {info.spec.dtype for info in opened.tensors.values()}
    assert (said["command"], said["settings"]["label"], said["settings"]["strength"]) == ("synth edit", "hue", -0.5)
    assert [entry["name"] for entry in said["inputs"]] == ["pca.safetensors", "lora-2"]
    assert str(there) not in json.dumps(said)
    assert dtypes == {"BF16"}
    twice = moved(there, tmp_path / "b.safetensors", strength=-0.5, rank=1, dialect="diffusers", dtype="bf16")
    assert twice.ranks == {1: 4}
    assert twice.error > 0
    data = [(tmp_path / name).read_bytes() for name in ("a.safetensors", "b.safetensors")]
    assert data[0][-400:] == data[1][-400:]


def test_an_input_is_never_replaced(there: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora-1.safetensors"
    shutil.copy(there / "loras/lora-1.safetensors", lora)
    with pytest.raises(OutputError, match="is an input, and inputs are never replaced"):
        edit(lora, there / "space/pca.safetensors", label="hue", strength=1, output=lora, force=True)
    assert lora.read_bytes() == (there / "loras/lora-1.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------ labels


def test_labels_may_come_from_a_file_for_some_of_the_loras(there: Path, tmp_path: Path) -> None:
    model = load_fitted(there / "space/pca.safetensors")
    names = model.trained_names[3:]
    lines = [f"{name},{int(conditions_of(40)[int(name.partition('-')[2])][0] > 0)}" for name in names]
    (tmp_path / "warm.csv").write_text("\n".join(["name,warm", *lines]))
    report = edit(None, there / "space/pca.safetensors", labels=tmp_path / "warm.csv")
    assert [row["label"] for row in report.labels] == ["warm"]
    assert report.loras == len(names)
    assert report.warnings == [f"{tmp_path / 'warm.csv'}: says nothing of 3 LoRAs, which are left out"]
    found = moved(there, tmp_path / "a.safetensors", label="warm", labels=tmp_path / "warm.csv")
    assert found.amount == pytest.approx(report.labels[0]["deviation"])


def test_a_label_that_explains_no_more_than_chance_is_warned_of(there: Path, tmp_path: Path) -> None:
    made = np.random.default_rng(3)
    lines = [f"lora-{n},{made.normal()}" for n in range(40)]
    (tmp_path / "luck.csv").write_text("\n".join(["name,luck", *lines]))
    found = moved(there, tmp_path / "a.safetensors", label="luck", labels=tmp_path / "luck.csv")
    assert len(found.warnings) == 1
    assert found.warnings[0].endswith("no more than chance")
    assert moved(there, tmp_path / "b.safetensors").warnings == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"label": "hew"}, "--label: found 'hew', expected one of 'hue', 'size', 'shape'"),
        ({"strength": None}, "--strength: is lacking, expected a number of the label's deviations, such as 1 or -0.5"),
        ({"strength": float("inf")}, "--strength: found inf, expected a number of the label's deviations, "
                                     "such as 1 or -0.5"),
        ({"label": None}, "--label: is lacking: along what?"),
        ({"labels": "none.csv"}, "none.csv: no such file"),
    ],
)  # fmt: skip
def test_what_is_asked_for_and_is_not_there_is_refused(
    words: dict[str, Any], said: str, there: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as refused:
        moved(there, tmp_path / "a.safetensors", **words)
    assert str(refused.value) == said
    assert not list(tmp_path.iterdir())


def test_a_label_that_never_changes_is_refused(there: Path, tmp_path: Path) -> None:
    lines = [f"lora-{n},1,{n}" for n in range(40)]
    (tmp_path / "flat.csv").write_text("\n".join(["name,flat,number", *lines]))
    with pytest.raises(UsageError, match="'flat' is the same for all LoRAs, and tells none from another"):
        moved(there, tmp_path / "a.safetensors", label="flat", labels=tmp_path / "flat.csv")


def test_a_name_alone_and_a_model_without_labels_say_what_they_lack(there: Path, tmp_path: Path) -> None:
    shutil.copy(there / "space/pca.safetensors", tmp_path / "pca.safetensors")
    name = load_fitted(tmp_path / "pca.safetensors").trained_names[0]
    with pytest.raises(UsageError, match="is a member by its name alone, of which the model has but a part"):
        edit(name, tmp_path / "pca.safetensors", label="hue", strength=1, output=tmp_path / "a.safetensors")
    by_name = edit(name, there / "space/pca.safetensors", label="hue", strength=1, output=tmp_path / "a.safetensors")
    by_file = moved(there, tmp_path / "b.safetensors", lora=name)
    assert by_name.change == pytest.approx(by_file.change, rel=1e-4)
    bare = replace(load_fitted(tmp_path / "pca.safetensors"), ridge=None, nearest=None, condition_names=())
    bare.save(tmp_path / "bare.safetensors")
    with pytest.raises(UsageError, match="has no conditions that could be labels") as refused:
        edit(None, tmp_path / "bare.safetensors")
    assert str(refused.value.hint).startswith("--labels FILE.csv")


# ------------------------------------------------------------------------------------------------ the command line


def test_the_command_lists_labels_and_moves_a_lora(there: Path, tmp_path: Path) -> None:
    model = there / "space/pca.safetensors"
    done = weightops("synth", "edit", model, "--list", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 labels of 32 LoRAs" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[3:6]] == list(NAMES)
    words = ("--label", "hue", "--strength", "-1.5", "--json")
    done = weightops("synth", "edit", there / "loras/lora-3.safetensors", model, *words, cwd=tmp_path)
    document = json.loads(done.stdout)
    assert document["output"] == "lora-3-hue-1.5.safetensors"
    assert (tmp_path / "lora-3-hue-1.5.safetensors").is_file()
    refused = CliRunner().invoke(command, [str(model)]).exception
    assert str(refused) == "synth edit: found 1 file, expected LORA and FITTED"
