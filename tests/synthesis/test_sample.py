"""New LoRAs are what was asked for: of the space's spread, of a condition, between two, around one; and say how new."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import weightops
from learnt import NAMES, conditions_of, learnt

from weightops.cli.synth_sample import command
from weightops.errors import FormatError, Interrupted, OutputError, UsageError, WeightopsError
from weightops.files.checkpoint import open_checkpoint
from weightops.lineage import read_recipe
from weightops.ops.replay import replay
from weightops.synthesis import sample as verb
from weightops.synthesis.draws import Asked, Drawn, drawn_of
from weightops.synthesis.fitted import Fitted, load_fitted
from weightops.synthesis.members import read_factors
from weightops.synthesis.memorised import Members
from weightops.synthesis.memorised import relative as relatives
from weightops.synthesis.sample import SampleReport, sample
from weightops.synthesis.space import open_space

torch.set_num_threads(1)

KINDS = ("pca", "delta", "vae", "diffusion")
CONDITION = "0.5,0.2,-0.3"


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learnt(tmp_path_factory.mktemp("learnt"))


def fitted(there: Path, kind: str = "pca") -> Fitted:
    return load_fitted(there / f"space/{kind}.safetensors", open_space(there / "space"))


def made(there: Path, kind: str, output: Path, **words: Any) -> SampleReport:
    return sample(there / f"space/{kind}.safetensors", output=output, **words)


def factors(path: Path, there: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(up[None], down[None]) for up, down in read_factors(path, open_space(there / "space").layout)[0]]


def relative(made: list[tuple[torch.Tensor, torch.Tensor]], other: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    return relatives(made, other)[0]


def asked(**words: Any) -> Asked:
    nothing: dict[str, Any] = dict.fromkeys(Asked.__slots__)
    return Asked(**{**nothing, "count": 1, "seed": 0, **words})


# ------------------------------------------------------------------------------------------------ drawn


def test_gaussian_latents_have_the_mean_and_the_deviations_of_the_members(there: Path) -> None:
    model = fitted(there)
    found = drawn_of(model, asked(count=3000)).latents
    assert found.mean(0) == pytest.approx(model.latent_mean, abs=0.08 * float(model.latent_deviation.max()))
    assert (found.std(0) / model.latent_deviation).numpy() == pytest.approx(1, abs=0.06)


def test_a_vae_is_drawn_from_its_prior(there: Path) -> None:
    drawn = drawn_of(fitted(there, "vae"), asked(count=3000))
    assert drawn.by == "prior"
    assert drawn.latents.mean(0).numpy() == pytest.approx(0, abs=0.08)
    assert drawn.latents.std(0).numpy() == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize(("kind", "by"), [("pca", "gaussian"), ("vae", "prior"), ("diffusion", "diffusion")])
def test_a_lora_is_the_same_however_many_are_drawn_with_it(kind: str, by: str, there: Path) -> None:
    model = fitted(there, kind)
    few, many = (drawn_of(model, asked(count=count, seed=5)) for count in (2, 40))
    assert few.by == by
    assert torch.equal(few.latents, many.latents[:2])
    assert not torch.equal(few.latents, drawn_of(model, asked(count=2, seed=6)).latents)


def test_the_same_seed_writes_the_same_bytes(there: Path, tmp_path: Path) -> None:
    for n, seed in enumerate((3, 3, 4)):
        made(there, "pca", tmp_path / str(n), count=2, seed=seed)
    data = [(tmp_path / str(n) / "0002-pca.safetensors").read_bytes() for n in range(3)]
    assert data[0] == data[1] != data[2]


def test_the_mean_is_the_mean(there: Path, tmp_path: Path) -> None:
    made(there, "pca", tmp_path / "mean.safetensors", by="mean")
    model = fitted(there)
    assert model.pca is not None
    rows = model.layout.unflatten(model.pca.mean[None].float())
    assert relative(factors(tmp_path / "mean.safetensors", there), rows) < 1e-5


# ------------------------------------------------------------------------------------------------ of a condition


def test_of_a_condition_it_is_diffusion_where_there_is_one_and_else_regression(there: Path, tmp_path: Path) -> None:
    found = {kind: made(there, kind, tmp_path / f"{kind}.safetensors", condition=CONDITION).by for kind in KINDS}
    assert found == {"pca": "ridge", "delta": "ridge", "vae": "ridge", "diffusion": "diffusion"}


@pytest.mark.parametrize("kind", ["pca", "delta"])
def test_held_out_loras_come_back_from_their_conditions_better_than_baselines(
    kind: str, there: Path, tmp_path: Path
) -> None:
    model = fitted(there, kind)
    errors: dict[str, list[float]] = {}
    for name in model.held_out_names[:4]:
        row = conditions_of(40)[int(name.partition("-")[2])]
        words = ",".join(map(str, row))
        for by in ("ridge", "nearest", "mean"):
            path = tmp_path / f"{name}-{by}.safetensors"
            made(there, kind, path, by=by, **({} if by == "mean" else {"condition": words}))
            truth = factors(there / f"loras/{name}.safetensors", there)
            errors.setdefault(by, []).append(relative(factors(path, there), truth))
    mean = {by: float(np.mean(found)) for by, found in errors.items()}
    assert mean["ridge"] < 0.5 * mean["nearest"]
    assert mean["ridge"] < 0.5 * mean["mean"]


def test_each_row_of_a_table_makes_its_lora_and_diffusion_several(there: Path, tmp_path: Path) -> None:
    (tmp_path / "people.csv").write_text(f"name,{','.join(NAMES)}\nann,0.1,0.2,0.3\nbob,0.3,0.2,0.1\n")
    report = made(there, "diffusion", tmp_path / "new", condition=str(tmp_path / "people.csv"), count=2)
    names = ["0001-ann", "0002-ann", "0003-bob", "0004-bob"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [f"{name}.safetensors" for name in names]
    assert [row["label"] for row in report.files] == ["ann", "ann", "bob", "bob"]
    with open_checkpoint(tmp_path / "new/0003-bob.safetensors") as opened:
        assert read_recipe(opened.metadata["weightops"], "")["condition"] == [0.3, 0.2, 0.1]
    data = [path.read_bytes() for path in sorted((tmp_path / "new").iterdir())]
    assert len(set(data)) == 4


def test_guidance_moves_a_lora_further_towards_its_condition(there: Path) -> None:
    model = fitted(there, "diffusion")
    one, two = (drawn_of(model, asked(condition=CONDITION, guidance=g, steps=20)).latents for g in (1.0, 3.0))
    assert float((one - two).norm()) > 0.1 * float(one.norm())


def test_a_condition_like_none_that_was_learnt_from_is_warned_of(there: Path, tmp_path: Path) -> None:
    report = made(there, "pca", tmp_path / "a.safetensors", condition="5,0,0")
    assert any("hue is" in text and "nothing like it was learnt from" in text for text in report.warnings)
    assert made(there, "pca", tmp_path / "b.safetensors", condition=CONDITION).warnings == []


# ------------------------------------------------------------------------------------------------ between and around


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_between_two_are_what_the_model_makes_of_them(kind: str, there: Path, tmp_path: Path) -> None:
    model = fitted(there, kind)
    a, b = model.trained_names[1], model.trained_names[5]
    report = made(there, kind, tmp_path / "new", between=(a, b), at=(0, 0.5, 1))
    ends = model.layout.unflatten(model.rows_of(model.latents[[1, 5]]))
    paths = [row["path"] for row in report.files]
    for path, end in ((paths[0], 0), (paths[2], 1)):
        own = [(up[end : end + 1], down[end : end + 1]) for up, down in ends]
        assert relative(factors(path, there), own) < 1e-4
    middle = [row["distance"] for row in report.files]
    assert max(middle[0], middle[2]) < 1e-6 < middle[1]
    assert [row["nearest"] for row in report.files][::2] == [a, b]


def test_a_file_stands_where_its_member_stands(there: Path, tmp_path: Path) -> None:
    model = fitted(there)
    name = model.trained_names[0]
    file = there / f"loras/{name}.safetensors"
    drawn = drawn_of(model, asked(between=(name, str(file)), at=(0.0, 1.0)))
    assert float((drawn.latents[0] - drawn.latents[1]).norm() / drawn.latents[0].norm()) < 1e-5
    report = made(there, "pca", tmp_path / "a.safetensors", around=str(file), spread=0)
    assert report.files[0]["nearest"] == name
    assert report.files[0]["distance"] < 1e-4
    with open_checkpoint(tmp_path / "a.safetensors") as opened:
        said = read_recipe(opened.metadata["weightops"], "")
    assert [entry["name"] for entry in said["inputs"]] == ["pca.safetensors", name]
    assert str(there) not in json.dumps(said)


def test_a_member_that_was_held_out_has_a_place_too(there: Path) -> None:
    model = fitted(there)
    name = model.held_out_names[0]
    by_name = drawn_of(model, asked(between=(name, name), at=(0.0,))).latents
    by_file = drawn_of(model, asked(between=(str(there / f"loras/{name}.safetensors"),) * 2, at=(0.0,))).latents
    assert float((by_name - by_file).norm() / by_name.norm()) < 1e-5


def test_around_a_lora_others_are_as_far_as_they_are_spread(there: Path) -> None:
    model = fitted(there)
    found = [
        drawn_of(model, asked(around=model.trained_names[2], spread=spread, count=400)).latents - model.latents[2]
        for spread in (0.0, 0.5, 1.0)
    ]
    assert float(found[0].abs().max()) == 0
    assert (found[1].std(0) / model.latent_deviation).numpy() == pytest.approx(0.5, abs=0.06)
    assert found[2].numpy() == pytest.approx(2 * found[1].numpy(), abs=1e-5)


# ------------------------------------------------------------------------------------------------ new or remembered


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_given_back_is_at_distance_zero_and_another_is_not(kind: str, there: Path) -> None:
    model = fitted(there, kind)
    members = Members(model)
    near = members.nearest(model.latents[3], model.layout.unflatten(model.rows_of(model.latents[3])))
    assert (near.name, near.distance) == (model.trained_names[3], pytest.approx(0, abs=1e-6))
    assert near.to_file is not None
    assert 0 < near.to_file < 0.5  # what the model leaves out of it
    assert 0.05 < members.usual < 2


def test_the_usual_distance_is_the_median_to_the_nearest_other_member(there: Path) -> None:
    model = fitted(there)
    rows = model.layout.unflatten(model.rows_of(model.latents))
    count = len(model.trained)
    every = [
        min(
            relative([(u[i : i + 1], d[i : i + 1]) for u, d in rows], [(u[j : j + 1], d[j : j + 1]) for u, d in rows])
            for j in range(count)
            if j != i
        )
        for i in range(count)
    ]
    assert Members(model).usual == pytest.approx(float(np.median(every)), rel=0.05)


def test_a_lora_that_is_a_member_given_back_is_warned_of(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Drawn("gaussian", ("pca",), fitted(there).latents[[7]])
    monkeypatch.setattr(verb, "drawn_of", lambda model, asked: drawn)
    report = made(there, "pca", tmp_path / "a.safetensors")
    name = fitted(there).trained_names[7]
    assert len(report.warnings) == 1
    assert report.warnings[0].startswith(
        f"1 of 1 are nearly members that were learnt from: 'pca' is {report.files[0]['distance']:.3g} from {name!r}"
    )


def test_without_the_space_distances_are_the_same_but_for_those_to_files(there: Path, tmp_path: Path) -> None:
    shutil.copy(there / "space/pca.safetensors", tmp_path / "pca.safetensors")
    alone = sample(tmp_path / "pca.safetensors", output=tmp_path / "a.safetensors", seed=2)
    beside = made(there, "pca", tmp_path / "b.safetensors", seed=2)
    assert alone.files[0]["distance"] == beside.files[0]["distance"]
    assert alone.files[0]["distance_to_file"] is None
    assert beside.files[0]["distance_to_file"] > 0
    found = sample(tmp_path / "pca.safetensors", output=tmp_path / "c.safetensors", seed=2, space=there / "space")
    assert found.files[0]["distance_to_file"] == beside.files[0]["distance_to_file"]


# ------------------------------------------------------------------------------------------------ files


def test_rank_dialect_and_dtype_are_the_files(there: Path, tmp_path: Path) -> None:
    report = made(there, "pca", tmp_path / "a.safetensors", rank=1, dtype="fp16", dialect="diffusers")
    assert report.files[0]["ranks"] == {"1": 4}
    assert 0 < report.files[0]["error"] < 1
    with open_checkpoint(tmp_path / "a.safetensors") as opened:
        keys = {key: info.spec.dtype for key, info in opened.tensors.items()}
    assert set(keys.values()) == {"F16"}
    assert all(key.startswith("unet.") for key in keys)
    folder = made(there, "pca", tmp_path / "peft", dialect="peft", count=2)
    assert [row["path"] for row in folder.files] == [str(tmp_path / f"peft/000{n}-pca") for n in (1, 2)]
    assert (tmp_path / "peft/0002-pca/adapter_model.safetensors").is_file()


def test_a_sum_of_changes_can_have_more_ranks_than_rows_have(there: Path, tmp_path: Path) -> None:
    cut = made(there, "delta", tmp_path / "a.safetensors").files[0]
    whole = made(there, "delta", tmp_path / "b.safetensors", rank=8).files[0]
    assert (cut["ranks"], whole["ranks"]) == ({"2": 4}, {"8": 4})
    found = made(there, "pca", tmp_path / "c.safetensors", rank=8)
    assert found.files[0]["ranks"] == {"2": 4}
    assert found.warnings == ["--rank 8: LoRAs of this space have rank 2, and no more is written"]


def test_a_file_that_is_there_is_kept_and_a_dry_run_writes_none(there: Path, tmp_path: Path) -> None:
    would = made(there, "pca", tmp_path / "new", count=2, dry_run=True)
    assert not list(tmp_path.iterdir())
    assert would.bytes_written == made(there, "pca", tmp_path / "new", count=2).bytes_written
    before = (tmp_path / "new/0001-pca.safetensors").read_bytes()
    with pytest.raises(OutputError, match=r"0001-pca\.safetensors: exists"):
        made(there, "pca", tmp_path / "new", count=2, seed=9)
    assert (tmp_path / "new/0001-pca.safetensors").read_bytes() == before
    made(there, "pca", tmp_path / "new", count=2, seed=9, force=True)
    assert (tmp_path / "new/0001-pca.safetensors").read_bytes() != before


def test_an_input_is_never_replaced(there: Path, tmp_path: Path) -> None:
    model, lora = tmp_path / "pca.safetensors", tmp_path / "lora-1.safetensors"
    shutil.copy(there / "space/pca.safetensors", model)
    shutil.copy(there / "loras/lora-1.safetensors", lora)
    table = shutil.copy(there / "conditions.csv", tmp_path / "one.csv")
    Path(table).write_text("\n".join(Path(table).read_text().splitlines()[:2]))
    asked = {"condition": str(table), "by": "ridge"}
    for output, words in ((model, {}), (lora, {"around": str(lora)}), (Path(table), asked)):
        before = output.read_bytes()
        with pytest.raises(OutputError, match="is an input, and inputs are never replaced"):
            sample(model, output=output, force=True, **words)  # type: ignore[arg-type]
        assert output.read_bytes() == before


def test_replay_says_in_a_sentence_that_there_is_none(there: Path, tmp_path: Path) -> None:
    made(there, "pca", tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="was made by 'synth sample', of which there is no replay"):
        replay(tmp_path / "a.safetensors")


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        ("pca", {"between": ("a", "b"), "around": "c"}, "--around: and --between ask for different things"),
        ("pca", {"at": 0.5}, "--at: says something only with --between"),
        ("pca", {"spread": 0.5}, "--spread: says something only with --around"),
        ("pca", {"embedder": "e.onnx"}, "--embedder: says something only with --condition"),
        ("pca", {"by": "magic"}, "--by: found 'magic', expected gaussian, prior, diffusion, ridge, nearest, mean"),
        ("pca", {"by": "mean", "around": "lora-1"}, "--by: says nothing with --around, which begins at LoRAs"),
        ("pca", {"by": "mean", "condition": CONDITION}, "--by: mean makes nothing of a condition"),
        ("pca", {"by": "ridge"}, "--by: ridge makes a LoRA of a condition"),
        ("pca", {"count": 0}, "--count: found 0, expected 1 to 10,000"),
        ("diffusion", {"steps": 0}, "--steps: found 0, expected 1 or more"),
        ("pca", {"count": 2, "by": "mean"}, "--count: found 2, but --by mean makes one alone"),
        ("pca", {"count": 2, "condition": CONDITION}, "--count: found 2, but ridge makes one LoRA of a condition"),
        ("pca", {"seed": -1}, "--seed: found -1, expected 0 to 9,223,372,036,854,775,807"),
        ("pca", {"spread": -1.0, "around": "lora-1"}, "--spread: found -1.0, expected a finite number, 0 or more"),
        ("pca", {"steps": 5}, "--steps: is of diffusion, and these are made by gaussian"),
        ("diffusion", {"guidance": 2.0}, "--guidance: is towards a condition, and none is asked for"),
        ("diffusion", {"steps": 5000}, "--steps: found 5000, expected 1 to 1000"),
        ("pca", {"condition": "1,2"}, "--condition: found 2 numbers, expected 3 numbers (hue, size, shape)"),
        ("pca", {"dialect": "koyha"}, "--dialect: found 'koyha', expected kohya, onetrainer, comfy, diffusers, peft"),
    ],
)  # fmt: skip
def test_words_that_make_no_sense_together_are_refused(
    kind: str, words: dict[str, Any], said: str, there: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as refused:
        made(there, kind, tmp_path / "a.safetensors", **words)
    assert str(refused.value) == said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        ({"by": "diffusion"}, "it is a pca without diffusion", "weightops synth fit diffusion makes one that has"),
        ({"by": "prior"}, "it is a pca without prior", "weightops synth fit vae makes one that has"),
        ({"around": "lora-99"}, "is no LoRA that", "did you mean lora-"),
        ({"count": 2}, "names one file, but 2 LoRAs are to be made", "name a folder"),
    ],
)
def test_what_a_model_lacks_is_refused_with_a_hint(
    words: dict[str, Any], said: str, hint: str, there: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as refused:
        made(there, "pca", tmp_path / "a.safetensors", **words)
    assert said in str(refused.value)
    assert str(refused.value.hint).startswith(hint)


def test_changes_need_their_space_and_a_space_without_conditions_says_so(there: Path, tmp_path: Path) -> None:
    shutil.copy(there / "space/delta.safetensors", tmp_path / "delta.safetensors")
    with pytest.raises(UsageError, match="is learnt from ΔW, so that a new LoRA is a sum of the space's") as refused:
        sample(tmp_path / "delta.safetensors", output=tmp_path / "a.safetensors")
    assert refused.value.hint == "--space DIR names its folder"
    sample(tmp_path / "delta.safetensors", output=tmp_path / "a.safetensors", space=there / "space")
    plain = load_fitted(there / "space/pca.safetensors")
    from dataclasses import replace

    replace(plain, ridge=None, nearest=None, condition_names=()).save(tmp_path / "plain.safetensors")
    with pytest.raises(UsageError, match="makes none by ridge: its LoRAs had no conditions") as refused:
        sample(tmp_path / "plain.safetensors", output=tmp_path / "b.safetensors", condition=CONDITION)
    assert refused.value.where == "--condition"


def test_a_lora_of_other_modules_has_no_place(there: Path, tmp_path: Path) -> None:
    from spaces import factors_of, layout_of, write_family

    other = layout_of(3)
    (path,) = write_family(tmp_path, other, [factors_of(other, 1)])
    with pytest.raises(WeightopsError, match="has rank 3, and 2 in the space"):
        made(there, "pca", tmp_path / "a.safetensors", around=str(path))


# ------------------------------------------------------------------------------------------------ the command line


def test_the_command_says_what_it_made(there: Path, tmp_path: Path) -> None:
    model = there / "space/pca.safetensors"
    done = weightops(
        "synth", "sample", model, "--between", "lora-1", "lora-2", "--at", "0,1", "-o", "new", cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 LoRAs, by between" in done.stdout
    assert "0001-lora-1-to-lora-2-0.safetensors" in done.stdout
    done = weightops("synth", "sample", model, "--condition", "1,2", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: --condition: found 2 numbers, expected 3 numbers (hue, size, shape)"


def test_the_commands_document_is_one_and_the_output_has_a_name(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(command, [str(there / "space/pca.safetensors"), "--condition", CONDITION, "--json"])
    document = json.loads(done.stdout)
    assert document["files"][0]["path"] == document["output"] == "pca-condition.safetensors"
    assert (tmp_path / "pca-condition.safetensors").is_file()


def test_an_interruption_says_how_many_stand(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = verb.write_lora, []

    def stopped(path: Path, *given: Any, **words: Any) -> Any:
        if len(written) == 2:
            raise Interrupted("", "interrupted: nothing was written, and no input was changed")
        written.append(path)
        return write(path, *given, **words)

    monkeypatch.setattr(verb, "write_lora", stopped)
    with pytest.raises(Interrupted, match="new: interrupted: 2 of 3 LoRAs are written, each of them whole") as caught:
        made(there, "pca", tmp_path / "new", count=3)
    assert caught.value.hint == "--force makes all of them anew"
    assert sorted((tmp_path / "new").iterdir()) == written
