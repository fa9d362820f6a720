"""A study runs what is not done, leaves alone what is, goes on where it was stopped, and refuses before it begins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import save

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from commandline import weightops_here

from weightops.diffusion import study_verbs
from weightops.diffusion.study import study
from weightops.diffusion.study_file import read_study
from weightops.diffusion.study_inputs import Tiny, read_tiny
from weightops.diffusion.study_state import Hashes
from weightops.diffusion.study_steps import VERBS
from weightops.diffusion.study_verbs import words_of
from weightops.errors import Interrupted, MismatchError, OutputError, UsageError, WeightopsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightops.diffusion.study import StudyReport

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("PIL")
    pytest.importorskip("diffusers")
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

# That of synthesis needs more verbs, and is tested with them.
EXAMPLES = sorted(set((Path(__file__).parents[2] / "examples").glob("*-study.yaml")) - {
    Path(__file__).parents[2] / "examples" / "synthesis-study.yaml"
})  # fmt: skip

TWO_BRANCHES = """\
title: Two merges
about: |
  What is < said here is text.
inputs:
  a: {path: a.safetensors}
  b: b.safetensors
steps:
  half:
    merge: {models: [$a, $b], alpha: 0.5}
    text: The mean of both.
  quarter:
    merge: {models: [$a, $half], alpha: 0.25}
  other:
    merge: {models: [$b, $a], alpha: 0.1}
  look:
    inspect: {path: $quarter}
  page:
    page: {}
"""
NAMES = ["half", "quarter", "other", "look", "page"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two models and a study of them, in which we stand."""
    made(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(folder: Path, text: str = TWO_BRANCHES) -> None:
    save(folder / "a.safetensors", {"w": torch.ones(4, 4)})
    save(folder / "b.safetensors", {"w": torch.zeros(4, 4)})
    (folder / "two.yaml").write_text(text)


def states(report: StudyReport) -> dict[str, str]:
    return {step.name: step.state for step in report.steps}


def run_of(report: StudyReport) -> list[str]:
    return [step.name for step in report.steps if step.state == "run"]


def reasons(report: StudyReport) -> dict[str, str]:
    return {step.name: step.reason for step in report.steps if step.reason}


def tensor(path: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(path)["w"]


# ------------------------------------------------------------------------------------------------ what is run


def test_a_study_runs_its_steps_and_then_nothing(folder: Path) -> None:
    first = study("two.yaml")
    assert run_of(first) == NAMES
    assert torch.equal(tensor(folder / "two/half/half.safetensors"), torch.full((4, 4), 0.5))
    assert torch.equal(tensor(folder / "two/quarter/quarter.safetensors"), torch.full((4, 4), 0.875))
    assert json.loads((folder / "two/look/report.json").read_bytes())["tensors"] == 1
    before = {path: path.stat().st_mtime_ns for path in (folder / "two").rglob("*.safetensors")}
    second = study("two.yaml")
    assert run_of(second) == []
    assert states(second) == dict.fromkeys(NAMES, "unchanged")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert second.page == first.page == "two/page/index.html"


def test_a_changed_word_runs_its_step_and_what_depends_on_it(folder: Path) -> None:
    study("two.yaml")
    made(folder, TWO_BRANCHES.replace("alpha: 0.5", "alpha: 0.75"))
    again = study("two.yaml")
    assert run_of(again) == ["half", "quarter", "look", "page"]
    assert reasons(again)["half"] == "alpha changed"
    assert reasons(again)["quarter"] == "models changed"
    assert torch.equal(tensor(folder / "two/quarter/quarter.safetensors"), torch.full((4, 4), 0.8125))


def test_a_word_that_changes_no_byte_runs_no_other_step(folder: Path) -> None:
    study("two.yaml")
    made(folder, TWO_BRANCHES.replace("alpha: 0.5", "alpha: 0.5, threads: 1"))
    assert run_of(study("two.yaml")) == ["half", "page"]


def test_an_input_counts_by_its_content_and_not_by_its_date(folder: Path) -> None:
    study("two.yaml")
    os.utime(folder / "a.safetensors", ns=(1, 1))
    assert run_of(study("two.yaml")) == []
    save(folder / "b.safetensors", {"w": torch.full((4, 4), 2.0)})
    again = study("two.yaml")
    assert run_of(again) == ["half", "quarter", "other", "look", "page"]
    assert torch.equal(tensor(folder / "two/half/half.safetensors"), torch.full((4, 4), 1.5))


def test_what_was_tampered_with_or_taken_away_is_made_again(folder: Path) -> None:
    study("two.yaml")
    save(folder / "two/other/other.safetensors", {"w": torch.ones(1)})
    (folder / "two/look/report.json").unlink()
    again = study("two.yaml")
    assert run_of(again) == ["other", "look"]
    assert set(reasons(again).values()) == {"what it made is not there as it was"}
    assert torch.equal(tensor(folder / "two/other/other.safetensors"), torch.full((4, 4), 0.1))


def test_what_a_desktop_leaves_behind_runs_nothing_again(folder: Path) -> None:
    study("two.yaml")
    (folder / "two/half/.DS_Store").write_text("x")
    (folder / "two/half/notes.txt").write_text("mine")
    assert run_of(study("two.yaml")) == []
    hashes = Hashes(folder / "hashes.json")
    before = hashes.of(folder / "two/half")
    (folder / "two/half/Thumbs.db").write_text("x")
    assert hashes.of(folder / "two/half") == before


def test_from_runs_a_step_and_all_below_it(folder: Path) -> None:
    study("two.yaml")
    assert run_of(study("two.yaml", start="other")) == ["other", "look", "page"]
    assert run_of(study("two.yaml", force=True)) == NAMES
    with pytest.raises(UsageError, match="there is no step 'ohter'") as refused:
        study("two.yaml", start="ohter")
    assert refused.value.hint == "did you mean 'other'?"


def test_a_dry_run_says_what_would_be_done_and_does_nothing(folder: Path) -> None:
    report = study("two.yaml", dry_run=True)
    assert set(states(report).values()) == {"would run"}
    assert not (folder / "two").exists()
    study("two.yaml")
    made(folder, TWO_BRANCHES.replace("alpha: 0.25", "alpha: 0.3"))
    report = study("two.yaml", dry_run=True)
    assert states(report) == {
        "half": "unchanged", "quarter": "would run", "other": "unchanged", "look": "would run", "page": "would run"
    }  # fmt: skip
    assert reasons(report) == {"quarter": "alpha changed", "look": "after 'quarter'", "page": "after 'quarter', 'look'"}
    assert torch.equal(tensor(folder / "two/quarter/quarter.safetensors"), torch.full((4, 4), 0.875))


def test_a_step_that_fails_says_which_it_is_and_leaves_nothing(folder: Path) -> None:
    made(folder, TWO_BRANCHES.replace("models: [$b, $a], alpha: 0.1", "models: [$b, $a], alpha: 0.1, method: nothing"))
    with pytest.raises(WeightopsError) as refused:
        study("two.yaml")
    assert str(refused.value) == "two.yaml, line 13: step 'other': unknown merge method 'nothing'"
    assert refused.value.exit_code == 2
    assert not (folder / "two/other").exists()
    assert not (folder / "two/.study/unfinished/other").exists()
    made(folder)
    assert run_of(study("two.yaml")) == ["other", "look", "page"]


def test_a_stopped_study_goes_on_where_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise Interrupted("", "interrupted: nothing was written")

    with monkeypatch.context() as patched:
        patched.setattr("weightops.ops.inspect.inspect", stopped)
        with pytest.raises(Interrupted, match="interrupted in the step 'look'; what is done above it stands"):
            study("two.yaml")
    assert not (folder / "two/look").exists()
    assert run_of(study("two.yaml")) == ["look", "page"]


def test_a_crash_between_a_step_and_its_record_is_mended(folder: Path) -> None:
    study("two.yaml")
    record = folder / "two/.study/records/half.json"
    before = json.loads(record.read_bytes())
    record.write_text(json.dumps({**before, "made_of": {}, "outputs": {}}))
    again = study("two.yaml")
    assert run_of(again) == ["half"]
    assert reasons(again)["half"] == "it was not finished"


def test_another_version_makes_everything_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study("two.yaml")
    monkeypatch.setattr("weightops.diffusion.study_runner.__version__", "9.9.9")
    again = study("two.yaml")
    assert run_of(again) == NAMES
    assert "it was made by weightops " in reasons(again)["half"]


def test_strange_files_are_never_replaced(folder: Path) -> None:
    (folder / "two/half").mkdir(parents=True)
    (folder / "two/half/mine.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(OutputError, match=r"two/half: holds what this study did not make: 'mine\.txt'"):
            study("two.yaml", force=force)
    assert [path.name for path in (folder / "two/half").iterdir()] == ["mine.txt"]
    (folder / "two/half/mine.txt").unlink()
    study("two.yaml")
    (folder / "two/half/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"two/half: holds what this study did not make: 'notes\.txt'"):
        study("two.yaml", force=True)
    assert (folder / "two/half/notes.txt").read_text() == "mine"
    assert (folder / "two/half/half.safetensors").is_file()
    (folder / "two/other").rename(folder / "away")
    (folder / "two/other").write_text("mine")
    (folder / "two/half/notes.txt").unlink()
    with pytest.raises(OutputError, match="two/other: is no folder"):
        study("two.yaml")
    (folder / "file").write_text("")
    with pytest.raises(UsageError, match="file: is a file, expected the study's folder"):
        study("two.yaml", output="file")
    with pytest.raises(UsageError, match="is the folder of the study's file"):
        study("two.yaml", output=".")


def test_two_runs_do_not_work_in_one_folder(folder: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    study("two.yaml")
    with (folder / "two/.study/lock").open("r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="two: another run of a study is at work in it"):
            study("two.yaml")
    assert run_of(study("two.yaml")) == []


def test_several_processes_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="study: found 2 processes, expected one"):
        study("two.yaml")


def test_inputs_are_not_changed(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    study("two.yaml", output="out")
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(p.name for p in folder.iterdir()) == ["a.safetensors", "b.safetensors", "out", "two.yaml"]


def test_an_input_is_where_the_user_says(folder: Path) -> None:
    save(folder / "c.safetensors", {"w": torch.full((4, 4), 8.0)})
    study("two.yaml", inputs={"b": "c.safetensors"})
    assert torch.equal(tensor(folder / "two/half/half.safetensors"), torch.full((4, 4), 4.5))
    with pytest.raises(UsageError, match="--input: there is no input 'c'"):
        study("two.yaml", inputs={"c": "c.safetensors"})
    with pytest.raises(UsageError, match=r"--input: b: 'd\.safetensors' is not there"):
        study("two.yaml", inputs={"b": "d.safetensors"})


# ------------------------------------------------------------------------------------------------ hashes


def test_a_hash_is_that_of_the_content_however_it_came_there(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"one")
    hashes = Hashes(tmp_path / "hashes.json")
    first = hashes.of(file)
    hashes.save()
    stat = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a tool that keeps dates does
    again = Hashes(tmp_path / "hashes.json")
    assert again.of(file) != first
    file.write_bytes(b"one")
    assert again.of(file) == first
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x").write_bytes(b"one")
    before = again.of(tmp_path / "d")
    (tmp_path / "d/x").rename(tmp_path / "d/y")
    assert again.of(tmp_path / "d") != before


def test_what_was_not_touched_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"one")
    hashes = Hashes(tmp_path / "hashes.json")
    first = hashes.of(file)
    hashes.save()

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("it is read again")

    again = Hashes(tmp_path / "hashes.json")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/f").write_bytes(b"two")
    within = again.within(tmp_path / "d")
    (tmp_path / "d").rename(tmp_path / "e")
    again.moved(tmp_path / "d", tmp_path / "e")
    monkeypatch.setattr(Path, "open", read)
    assert again.of(file) == first
    assert again.within(tmp_path / "e") == within


def test_a_damaged_index_is_no_more_than_forgotten(folder: Path) -> None:
    study("two.yaml")
    (folder / "two/.study/hashes.json").write_text("{")
    assert run_of(study("two.yaml")) == []


# ------------------------------------------------------------------------------------------------ references


def test_references_name_files_with_strengths_and_one_of_several(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Mapping[str, Any]] = []

    def several(verb: study_verbs.Verb, job: study_verbs.Job) -> study_verbs.Made:
        seen.append(dict(job.words))
        for name in ("x", "y"):
            (job.work / name).write_text(name + str(job.words.get("alpha")))
        return study_verbs.Made({"": "x", "checkpoints": {"10": "x", "20": "y"}}, [])

    verb = study_verbs.Verb(
        "merge", "weightops.ops.merge", "merge", several, fields=("checkpoints",), several=("checkpoints",)
    )  # fmt: skip
    monkeypatch.setattr("weightops.diffusion.study_file.VERBS", {**VERBS, "merge": verb})
    text = """\
inputs: {a: a.safetensors}
steps:
  one:
    merge: {models: [$a], alpha: 1}
  two:
    merge: {models: [$one:0.5, $one.checkpoints.20, $one.checkpoints], method: $$5, drop: vae}
"""
    (folder / "refer.yaml").write_text(text)
    study("refer.yaml")
    assert seen[1]["models"] == [("refer/one/x", 0.5), "refer/one/y", "refer/one/x", "refer/one/y"]
    assert (seen[1]["method"], seen[1]["drop"]) == ("$5", ["vae"])
    (folder / "refer.yaml").write_text(text.replace(".20", ".30"))
    with pytest.raises(UsageError) as refused:
        study("refer.yaml")
    assert str(refused.value) == "refer.yaml, line 6: $one.checkpoints.30: the step 'one' made no '30'"
    assert refused.value.hint == "there are 10, 20"


@pytest.mark.parametrize(
    ("was", "now", "message", "hint"),
    [
        ("alpha: 0.5", "alhpa: 0.5", "line 9: unknown word 'alhpa' of merge", "did you mean 'alpha'?"),
        ("inspect:", "inspekt:", "line 16: unknown verb 'inspekt'", "did you mean 'inspect'?"),
        ("[$b, $a]", "[$b, $c]", "line 14: unknown name $c", "known are a, b, half, quarter"),
        ("[$b, $a]", "[$b, $haf]", "line 14: unknown name $haf", "did you mean 'half'?"),
        ("[$b, $a]", "[$b, $look]", "line 14: $look stands further below",
         "a step may refer to those above it: move it up"),
        ("[$b, $a]", "[$b, $other]", "line 14: $other refers to the step in which it stands", None),
        ("[$a, $half]", "[$a, $half.lora]", "line 12: $half.lora: merge makes no 'lora'", "did you mean '$half'?"),
        ("[$a, $half]", "[$a, $half.3]", "line 12: found '$half.3', expected $name, $name.thing or $name.thing.one",
         "a text that begins with $ is written with two: $$"),
        ("[$a, $half]", "[$a.lora, $half]", "line 12: $a.lora: an input is one thing", "say $a"),
        ("[$a, $half]", "[$a, $ half]", "line 12: found '$ half', expected $name, $name.thing or $name.thing.one",
         "a text that begins with $ is written with two: $$"),
        ("alpha: 0.5", "alpha: much", "line 9: alpha: found 'much', expected a number", None),
        ("alpha: 0.5", "strict: 1", "line 9: strict: found 1, expected true or false", None),
        ("alpha: 0.5", "weights: [1, x]", "line 9: weights: found a list, expected a list, each a number", None),
        ("alpha: 0.5", "output: x", "line 9: merge: the study itself says 'output'",
         "what a step makes stands in the study's folder, under the step's name"),
        ("{path: $quarter}", "{}", "line 15: step 'look' says no path, which inspect needs", None),
        ("alpha: 0.5}", "alpha: 0.5}\n    fuse: {}",
         "line 8: step 'half': found the verbs 'merge', 'fuse', expected one", None),
        ("  b: b.safetensors", "  b: [b]",
         "line 6: input 'b': found a list, expected a path, or the keys path, how, tiny", None),
        ("  b: b.safetensors", "  b: {how: x}", "line 6: input 'b' says neither path nor tiny", None),
        ("  b: b.safetensors", "  b: {tiny: sd15}",
         "line 9: $b: the input, in line 6, is there with --tiny only: it has no path", None),
        ("  b: b.safetensors", "  b: {path: x, tiny: sd16}", "line 6: tiny: found 'sd16', expected a model or pictures",
         "did you mean 'sd15'?"),
        ("b.safetensors", "c.safetensors", "line 6: input 'b': 'c.safetensors' is not there",
         "--input b=FILE says where it is"),
        ("  other:", "  a:", "line 13: step 'a': an input has the name 'a'", None),
        ("  other:", "  Half:", "line 13: step 'Half': a step has the name 'half'", None),
        ("  other:", "  'o/t':", "line 13: found 'o/t' as the name of a step, expected a letter, then letters, "
         "digits, - and _", None),
        ("  other:", "  inputs:", "line 13: 'inputs' cannot be the name of a step: the inputs' folder has it", None),
        ("page: {}", "page: {leave_out: [othre]}", "line 18: leave_out: there is no step 'othre' above",
         "did you mean 'other'?"),
        ("title:", "titel:", "line 1: unknown key 'titel' of a study", "did you mean 'title'?"),
        ("[$a, $half]", "[a.safetensors, $half]", "line 12: models: found 'a.safetensors', which is a file here",
         "name it under inputs, and say $name: then it counts by its content"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_runs(
    was: str, now: str, message: str, hint: str | None, folder: Path
) -> None:
    assert was in TWO_BRANCHES
    made(folder, TWO_BRANCHES.replace(was, now, 1))
    with pytest.raises(UsageError) as refused:
        study("two.yaml")
    assert str(refused.value) == f"two.yaml, {message}"
    if hint is not None or refused.value.hint is None or not refused.value.hint.startswith("known are"):
        assert refused.value.hint == hint
    assert not (folder / "two").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: found nothing, expected a study: the keys title, about, inputs, steps"),
        ("steps: {}", "line 1: steps: found none, expected at least one"),
        ("steps: [merge]", "line 1: steps: found a list, expected names, each with its verb"),
        ("a: &x [*x]", "line 1: an alias stands in what it repeats"),
        ("steps: {one: merge}", "line 1: step 'one': found 'merge', expected a verb with its words"),
        ("inputs: 3\nsteps: {}", "line 1: inputs: found 3, expected names, each with its path"),
    ],
)
def test_what_is_no_study_is_refused(text: str, message: str, folder: Path) -> None:
    (folder / "x.yaml").write_text(text)
    with pytest.raises(UsageError) as refused:
        study("x.yaml")
    assert str(refused.value) == f"x.yaml, {message}"
    with pytest.raises(UsageError, match=r"none\.yaml: cannot be read: No such file or directory"):
        study("none.yaml")


def test_a_wrong_word_of_a_training_is_found_before_the_hours_above_it(folder: Path) -> None:
    for was, now, message in (
        ("rank: 2", "rank: 0", "--rank: found 0, expected a whole number, 1 or more"),
        ("rank: 2", "schedule: cosin", "--schedule: found 'cosin', expected constant or "),
        ("resolution: 64", "resolution: 5x", "--resolution: found '5x', expected a number of pixels, or WIDTHxHEIGHT"),
        ("rank: 2", "instance_prompt: a sks", "--instance-prompt: says something only in train dreambooth"),
        ("page: {}", "generate: {model: $base, prompt: x, scheduler: eular}", "--scheduler: "),
        ("page: {}", "generate: {model: $base, prompt: x, size: big}", "--size: found 'big'"),
        ("page: {}", "generate: {model: $base, prompt: x, grid_over: rank}", "--grid-over: found 'rank', expected "),
    ):  # fmt: skip
        (folder / "x.yaml").write_text(TINY.replace(was, now))
        with pytest.raises(UsageError) as refused:
            study("x.yaml", tiny=True)
        name = "page" if was == "page: {}" else "style"
        assert f": step {name!r}: {message}" in str(refused.value)
        assert str(refused.value).startswith("x.yaml, line ")
    assert not (folder / "x-tiny").exists()


def test_every_verb_has_words_and_none_that_the_study_says_itself() -> None:
    for verb in VERBS.values():
        words = words_of(verb)
        assert not set(words) & {"output", "force", "dry_run", "on_progress", "on_look", "resume"}
        assert set(verb.several) <= set(verb.fields)


# ------------------------------------------------------------------------------------------------ tiny inputs


@pytest.mark.parametrize(
    ("text", "tiny"),
    [
        ("sd15", Tiny("model", "sd15")),
        ("flux seed 3", Tiny("model", "flux", 3)),
        ("sdxl checkpoint seed 2", Tiny("checkpoint", "sdxl", 2)),
        ("vae sdxl seed 1", Tiny("vae", "sdxl", 1)),
        ("blip", Tiny("blip")),
        ("sprites 12 outlined seed 5", Tiny("sprites", seed=5, count=12, style="outlined")),
        ("sprites 3 uncaptioned", Tiny("sprites", count=3, captions=False)),
    ],
)
def test_words_of_tiny_inputs(text: str, tiny: Tiny) -> None:
    assert read_tiny(text, "x", 1) == tiny


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "tiny: found nothing, expected a model or pictures"),
        ("flux checkpoint", "tiny: there is no flux in one file; known are sd15, sd2, sdxl"),
        ("sprites", "tiny: sprites: found nothing, expected how many, 1 to 1,000"),
        ("sprites 0", "tiny: sprites: found '0', expected how many, 1 to 1,000"),
        ("sd15 seed", "tiny: seed: found nothing, expected a whole number"),
        ("sprites 4 outlinde", "tiny: sprites: unknown word 'outlinde'"),
        ("blip outlined", "tiny: blip: unknown word 'outlined'"),
    ],
)
def test_wrong_words_of_tiny_inputs(text: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        read_tiny(text, "x", 7)
    assert str(refused.value) == f"x, line 7: {message}"


TINY = """\
inputs:
  base: {path: nowhere, tiny: sd15 seed 1}
  images: {path: nowhere either, tiny: sprites 4 outlined uncaptioned}
  real: {path: nowhere as well, tiny: sprites 1 outlined seed 7}
  blip: {tiny: blip}
steps:
  captioned:
    caption: {folder: $images, query: a sprite}
    tiny: {model: $blip, min_side: 32, max_tokens: 5}
  style:
    train text-to-image: {folder: $captioned, model: $base, steps: 600, rank: 2}
    tiny: {steps: 4, resolution: 64, batch: 2, checkpoint_every: 2}
  grid:
    generate: {model: $base, loras: [$style], grid_over: step, prompt: "a sprite, red"}
    tiny: {steps: 1, scheduler: ddim, size: 64}
  measured:
    evaluate: {folder: $real, generated: [$grid], model: $base, loras: [$style.run], pairs: 16}
    tiny: {pairs: 1, resolution: 64}
  page: {page: {}}
"""


def test_a_tiny_study_captions_trains_draws_measures_and_goes_on_within_a_training(folder: Path) -> None:
    (folder / "train.yaml").write_text(TINY)
    whole = study("train.yaml", tiny=True, output="whole")
    assert run_of(whole) == ["captioned", "style", "grid", "measured", "page"]
    assert not list((folder / "whole/inputs/images").rglob("metadata.csv")), "an input was changed"
    captions = (folder / "whole/captioned/captioned/metadata.csv").read_text()
    assert captions.count("a sprite") == 4
    page = (folder / "whole/page/index.html").read_text(encoding="utf-8")
    for said in ("This is a run with --tiny", "made: sprites 4 outlined uncaptioned", "a sprite, ", "loras: [$style]",
                 "LoRA</dt><dd>128 modules, rank 2, alpha 2", "A grid over step.", "PSNR of generated against real",
                 "Held-out denoising loss", "they are no measure of quality"):  # fmt: skip
        assert said in page, said
    names = sorted(path.name for path in (folder / "whole/style/style-train/checkpoints").iterdir())
    assert names == ["step-000002", "step-000004"]
    columns = json.loads((folder / "whole/grid/images/images.json").read_bytes())["grid"]["columns"]
    assert columns == ["step 0 (base)", "step 2", "step 4"]
    assert run_of(study("train.yaml", tiny=True, output="whole")) == []

    def stops(what: str, done: int, _total: int, _value: float | None) -> None:
        if what == "training" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="interrupted in the step 'style'"):
        study("train.yaml", tiny=True, output="again", on_progress=stops)
    assert not (folder / "again/style").exists()
    (folder / "train.yaml").write_text(TINY[: TINY.index("  grid:")])
    seen: list[int] = []

    def counts(what: str, done: int, _total: int, _value: float | None) -> None:
        seen.extend([done] if what == "training" else [])

    assert run_of(study("train.yaml", tiny=True, output="again", on_progress=counts)) == ["style"]
    assert seen == [3, 4]
    for name in ("style.safetensors", "style-train/loss.csv", "style-train/loss.png"):
        assert (folder / "again/style" / name).read_bytes() == (folder / "whole/style" / name).read_bytes()


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_tells_what_was_done_and_is_the_same_everywhere(folder: Path, tmp_path: Path) -> None:
    study("two.yaml")
    text = (folder / "two/page/index.html").read_text(encoding="utf-8")
    for said in ("<h1>Two merges</h1>", "What is &lt; said here is text.", "The mean of both.", "alpha: 0.5",
                 "[$a, $half]", "0.5 × a + 0.5 × b", "half.safetensors", "a.safetensors, xxh3_128 "):  # fmt: skip
        assert said in text, said
    assert str(tmp_path) not in text
    assert "two/" not in text
    study("two.yaml", output="elsewhere")
    assert (folder / "elsewhere/page/index.html").read_text(encoding="utf-8") == text
    study("two.yaml", force=True)
    assert (folder / "two/page/index.html").read_text(encoding="utf-8") == text


def test_a_page_leaves_out_what_it_is_told_to(folder: Path) -> None:
    made(folder, TWO_BRANCHES.replace("page: {}", "page: {title: Mine, leave_out: [other]}"))
    study("two.yaml")
    text = (folder / "two/page/index.html").read_text(encoding="utf-8")
    assert "<h1>Mine</h1>" in text
    assert ">Other</h2>" not in text
    assert ">Quarter</h2>" in text


# ------------------------------------------------------------------------------------------------ command line


def test_the_command_says_what_it_does_step_by_step(folder: Path) -> None:
    done = weightops_here("study", "two.yaml")
    assert (done.code, done.err) == (0, "")
    assert [line.split()[0] for line in done.out.splitlines()[:5]] == ["run"] * 5
    assert "half (merge): first run" in done.out
    again = weightops_here("study", "two.yaml")
    assert [line.split()[0] for line in again.out.splitlines()[:5]] == ["unchanged"] * 5
    assert "nothing to do: 5 steps unchanged" in again.out
    assert "page   two/page/index.html" in again.out
    assert weightops_here("study", "two.yaml", "-q").out == ""


def test_the_command_answers_in_json(folder: Path) -> None:
    done = weightops_here("study", "two.yaml", "--json", "-o", "out", "--input", "b=a.safetensors")
    found = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    first = found["steps"][0]
    assert (first["name"], first["verb"], first["state"]) == ("half", "merge", "run")
    assert (found["command"], found["output"], found["page"]) == ("study", "out", "out/page/index.html")
    assert [entry["path"] for entry in found["inputs"]] == ["a.safetensors", "a.safetensors"]
    assert all(entry["hash"].startswith("xxh3_128:") for entry in found["inputs"])


def test_the_command_refuses_in_one_line(folder: Path) -> None:
    (folder / "a.safetensors").unlink()
    done = weightops_here("study", "two.yaml")
    assert done.code == 2
    assert done.err == (
        "error: two.yaml, line 5: input 'a': 'a.safetensors' is not there\nhint: --input a=FILE says where it is\n"
    )
    assert weightops_here("study", "two.yaml", "--input", "a").err.startswith(
        "error: --input: found 'a', expected NAME=FILE\n"
    )


def test_a_study_that_is_done_imports_nothing_heavy(folder: Path) -> None:
    study("two.yaml")
    program = (
        "import sys; from weightops.diffusion.study import study; r = study('two.yaml')\n"
        "print([s.state for s in r.steps], sorted({m.split('.')[0] for m in sys.modules}))"
    )
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=folder, env=env
    )
    assert done.stdout.startswith(str(["unchanged"] * 5))
    assert not {"torch", "diffusers", "transformers", "numpy"} & set(done.stdout.replace("'", " ").split())


def test_an_error_keeps_its_kind(folder: Path) -> None:
    save(folder / "b.safetensors", {"v": torch.zeros(3)})
    with pytest.raises(MismatchError, match=r"^two\.yaml, line 8: step 'half': "):
        study("two.yaml")


# ------------------------------------------------------------------------------------------------ examples


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_whole(path: Path, tmp_path: Path) -> None:
    assert len(EXAMPLES) == 4
    for tiny in (False, True):
        found = read_study(path, tiny=tiny)
        assert found.steps[-1].verb.name == "page"
        assert found.used
    report = study(path, tiny=True, output=tmp_path / "out", dry_run=True)
    assert set(states(report).values()) == {"would run"}
    with pytest.raises(UsageError, match=r"line \d+: input .* is not there"):
        study(path, output=tmp_path / "out")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("inputs: {a: {tiny: sd15}}\nsteps: {looked: {inspect: {path: $a}}}\n")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"a cat")
    with pytest.raises(UsageError, match=r"photos: is no study's folder: it holds 'cat.png'"):
        study(path, tiny=True, output=tmp_path / "photos")
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.png"]
