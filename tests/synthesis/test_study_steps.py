"""The verbs of synthesis as steps of a study: the example is whole, and what a step makes can be named by the next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from spaces import family_of, layout_of, write_family

from weightops.diffusion.study import RUN, STANDS, study
from weightops.diffusion.study_file import read_study
from weightops.diffusion.study_verbs import words_of
from weightops.errors import UsageError
from weightops.synthesis.lora_file import write_lora
from weightops.synthesis.members import read_factors
from weightops.synthesis.study_steps import VERBS

EXAMPLE = Path(__file__).parents[2] / "examples" / "synthesis-study.yaml"
STEPS = """\
inputs:
  loras: loras
  conditions: conditions.csv
steps:
  space:
    synth collect: {loras: $loras, conditions: $conditions}
  pca:
    synth fit pca: {space: $space, components: 3}
  drawn:
    synth sample: {fitted: $pca, space: $space, count: 2, by: gaussian}
  asked:
    synth sample: {fitted: $pca, space: $space, condition: "0.1,0.2", by: ridge}
  between:
    synth sample: {fitted: $pca, space: $space, between: [lora-0, lora-1], at: [0.25, 0.75]}
  moved:
    synth edit: {lora: $asked, fitted: $pca, space: $space, label: hue, strength: 1}
  measured:
    synth evaluate: {spaces: $space, components: [2], latents: [2], conditioned: [2], seeds: 1, methods: [pca, ridge]}
  page:
    page: {}
"""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("tiny", [False, True])
def test_the_example_is_whole(tiny: bool, tmp_path: Path) -> None:
    found = read_study(EXAMPLE, tiny=tiny, more=VERBS)
    assert found.steps[-1].verb.name == "page"
    assert {step.verb.name for step in found.steps} >= VERBS.keys() - {"synth fit vae", "synth edit"}
    report = study(EXAMPLE, tiny=tiny, output=tmp_path / "out", dry_run=True, verbs=VERBS)
    assert {step.state for step in report.steps} == {"would run"}
    assert not (tmp_path / "out").exists()


def test_without_these_verbs_a_study_does_not_know_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown verb 'synth family'"):
        study(EXAMPLE, output=tmp_path / "out", dry_run=True)


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_each_verb_has_words(verb: object) -> None:
    assert words_of(verb)  # type: ignore[arg-type]


def test_what_a_step_makes_the_next_can_name(tmp_path: Path) -> None:
    layout = layout_of(2)
    write_family(tmp_path / "loras", layout, family_of(layout, 10))
    lines = ["name,hue,size", *(f"lora-{n},{n / 10},{n * n % 7 / 7}" for n in range(10))]
    (tmp_path / "conditions.csv").write_text("\n".join(lines))
    (tmp_path / "study.yaml").write_text(STEPS)
    words = {"output": tmp_path / "out", "verbs": VERBS}
    report = study(tmp_path / "study.yaml", **words)  # type: ignore[arg-type]
    assert [step.state for step in report.steps] == [RUN] * 8
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.safetensors")}
    assert {"pca/pca.safetensors", "asked/asked.safetensors", "moved/moved.safetensors"} <= files
    assert sum(name.startswith("drawn/drawn/") for name in files) == 2
    assert sum(name.startswith("between/between/") for name in files) == 2
    for record in (tmp_path / "out" / ".study" / "records").glob("*.json"):
        for made in json.loads(record.read_text())["outputs"].values():
            for name in made.values() if isinstance(made, dict) else [made]:
                assert (tmp_path / "out" / record.stem / name).exists()
    page = (tmp_path / "out" / "page" / "index.html").read_text()
    assert "explained" in page
    assert str(tmp_path) not in page
    again = study(tmp_path / "study.yaml", **words)  # type: ignore[arg-type]
    assert [step.state for step in again.steps] == [STANDS] * 8


def test_another_lora_runs_what_depends_on_it(tmp_path: Path) -> None:
    layout = layout_of(2)
    files = write_family(tmp_path / "loras", layout, family_of(layout, 6))
    (tmp_path / "study.yaml").write_text("inputs: {loras: loras}\nsteps:\n  space: {synth collect: {loras: $loras}}\n")
    words = {"output": tmp_path / "out", "verbs": VERBS}
    study(tmp_path / "study.yaml", **words)  # type: ignore[arg-type]
    factors, _ = read_factors(files[0], layout)
    write_lora(files[0], layout, [(2 * u, d) for u, d in factors], recipe={"command": "test", "inputs": []}, force=True)
    report = study(tmp_path / "study.yaml", **words)  # type: ignore[arg-type]
    assert [(step.state, step.reason) for step in report.steps] == [(RUN, "loras changed")]
