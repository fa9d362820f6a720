"""Which images a grid is made of: its columns, its rows, the checkpoints of a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import save

from weightops.diffusion.axes import Shots, lora_name, parse_values, plan_shots, stem_of, training_steps
from weightops.diffusion.prompts import Prompt
from weightops.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

A, B = ("a.safetensors", 1.0), ("b.safetensors", 0.5)


def plan(
    *loras: tuple[str, float], models: Any = ("m",), prompts: Any = None, over: Any = None, values: Any = None
) -> Shots:
    return plan_shots(models, loras, prompts or [Prompt("x", images=2)], over=over, values=values)


def refusal(call: Any) -> tuple[str, str | None]:
    with pytest.raises(UsageError) as e:
        call()
    return str(e.value), e.value.hint


def run_of(folder: Path, *steps: int, final: int | None = 30) -> Path:
    """A LoRA, and the folder of its training, as `train` writes them."""
    for step in steps:
        place = folder / "cat-train" / "checkpoints" / f"step-{step:06d}"
        place.mkdir(parents=True)
        (place / "state.pt").touch()
        save(place / "lora.safetensors", {"x": torch.ones(1)}, {"ss_steps": str(step)})
    return save(folder / "cat.safetensors", {"x": torch.ones(1)}, None if final is None else {"ss_steps": str(final)})


# ------------------------------------------------------------------------------------------------ columns and rows


def test_without_a_grid_there_is_every_prompt_with_every_seed() -> None:
    shots = plan(A, B, prompts=[Prompt("x", seed=5, images=2), Prompt("y", seed=5)])
    assert [(s.prompt.prompt, s.seed, s.loras) for s in shots.shots] == [
        ("x", 5, (A, B)), ("x", 6, (A, B)), ("y", 5, (A, B))
    ]  # fmt: skip
    assert (shots.over, shots.columns, shots.rows) == (None, (), ())


def test_over_loras_there_is_none_and_then_each_alone() -> None:
    shots = plan(A, B, over="lora")
    assert shots.columns == ("no LoRA", "a", "b:0.5")
    assert shots.rows == ("seed 0", "seed 1")
    assert [(s.row, s.column, s.seed, s.loras) for s in shots.shots] == [
        (0, 0, 0, ()), (0, 1, 0, (A,)), (0, 2, 0, (B,)), (1, 0, 1, ()), (1, 1, 1, (A,)), (1, 2, 1, (B,))
    ]  # fmt: skip


def test_over_models_all_have_the_loras() -> None:
    shots = plan(A, models=("x/m.safetensors", "y/m.safetensors", "hf://o/n@v1"), over="model")
    assert shots.columns == ("x/m", "y/m", "n")
    assert {s.loras for s in shots.shots} == {(A,)}
    assert [s.model for s in shots.shots[:3]] == ["x/m.safetensors", "y/m.safetensors", "hf://o/n@v1"]


def test_over_strengths_each_value_multiplies_all() -> None:
    shots = plan(A, over="strength", values="0,0.25..1")
    assert shots.columns == ("strength 0", "strength 0.25", "strength 0.5", "strength 0.75", "strength 1")
    assert [s.loras for s in shots.shots[:3]] == [(), (("a.safetensors", 0.25),), (("a.safetensors", 0.5),)]
    both = plan(A, B, over="strength", values=[-1, 2])
    assert both.columns == ("strengths times -1", "strengths times 2")
    assert both.shots[1].loras == (("a.safetensors", 2.0), ("b.safetensors", 1.0))


def test_over_seeds_rows_are_prompts() -> None:
    shots = plan(over="seed", prompts=[Prompt("x", seed=3, images=2), Prompt("y", seed=3, images=2)])
    assert (shots.columns, shots.rows) == (("seed 3", "seed 4"), ("x", "y"))
    assert [s.seed for s in shots.shots] == [3, 4, 3, 4]
    chosen = plan(over="seed", prompts=[Prompt("x")], values="9,1")
    assert (chosen.columns, [s.seed for s in chosen.shots]) == (("seed 9", "seed 1"), [9, 1])


def test_over_prompts_rows_are_seeds() -> None:
    shots = plan(over="prompt", prompts=[Prompt("x", images=2), Prompt("y", images=2, steps=5)])
    assert (shots.columns, shots.rows) == (("x", "y"), ("seed 0", "seed 1"))
    assert [(s.prompt.prompt, s.prompt.steps, s.seed) for s in shots.shots] == [
        ("x", None, 0), ("y", 5, 0), ("x", None, 1), ("y", 5, 1)
    ]  # fmt: skip


def test_rows_name_what_varies() -> None:
    two = [Prompt("x", images=2), Prompt("y")]
    assert plan(A, over="lora", prompts=two).rows == ("x\nseed 0", "x\nseed 1", "y")
    assert plan(A, over="lora", prompts=[Prompt("x")]).rows == ("seed 0",)


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        ({"models": ("m", "n")}, "--model: found 2 models", "--grid-over model compares them"),
        ({"values": "1,2"}, "--values: found no --grid-over beside it", "--grid-over strength takes values"),
        ({"over": "lora"}, "--grid-over: lora needs one or more --lora FILE", None),
        ({"over": "lora", "values": "1"}, "--values: found it beside --grid-over lora",
         "strength, seed and step take values"),
        ({"over": "model"}, "--grid-over: found 1 column for a grid over model, expected 2 to 100",
         "--model FILE may be said several times"),
        ({"over": "model", "models": ("m", "m")}, "--model: found 'm' twice", None),
        ({"over": "seed", "models": ("m", "n")}, "--model: found 2 models beside --grid-over seed, expected one", None),
        ({"over": "seed", "prompts": [Prompt("x")]},
         "--grid-over: found 1 column for a grid over seed, expected 2 to 100",
         "-n 4 makes four, --values 1,2,3 chooses them"),
        ({"over": "seed", "values": "1,2"}, "--values: found --images 2 beside it", "each value is one seed"),
        ({"over": "seed", "values": "0.5,1", "prompts": [Prompt("x")]},
         "--values: found 0.5, expected seeds: whole numbers from 0", None),
        ({"over": "seed", "prompts": [Prompt("x", said=frozenset({"seed"}))]},
         "--grid-over: seed, but the file of prompts has its own column seed", None),
        ({"over": "prompt", "prompts": [Prompt("x"), Prompt("y", seed=1)]},
         "--grid-over: prompt, but the prompts have different seeds", "rows are the seeds"),
        ({"over": "prompt", "prompts": [Prompt("x"), Prompt("y", images=2)]},
         "--grid-over: prompt, but the prompts have different numbers of images", None),
        ({"over": "step"}, "--grid-over: step needs the one --lora of a training run, found no LoRA", None),
        ({"over": "strength", "values": "1,2"}, "--grid-over: strength needs one or more --lora FILE", None),
        ({"over": "colour"},
         "--grid-over: found 'colour', expected lora, model, step, strength, seed or prompt", None),
        ({"prompts": [Prompt("x", images=1000)] * 10},
         "generate: found 10,000 images to make, expected at most 9,999", None),
        ({"over": "model", "models": ("m", "n"), "prompts": [Prompt("x", images=101)]},
         "--grid-over: found 101 rows of prompts and seeds, expected at most 100", None),
    ],
)  # fmt: skip
def test_words_that_do_not_go_together_are_refused(words: dict[str, Any], error: str, hint: str | None) -> None:
    assert refusal(lambda: plan(**words)) == (error, hint)


def test_strengths_are_said() -> None:
    assert refusal(lambda: plan(A, over="strength")) == (
        "--grid-over: strength needs --values", "as --values 0,0.5,1 or --values 0..1:5"
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("1", [1]), ("-0.5,2e1", [-0.5, 20]), ("0..1:5", [0, 0.25, 0.5, 0.75, 1]),
        ("0,0.25..1", [0, 0.25, 0.5, 0.75, 1]), ("1,0.5..-0.5", [1, 0.5, 0, -0.5]),
        ("0..1:11", [n / 10 for n in range(11)]), ("5,0..0.2:3", [5, 0, 0.1, 0.2]),
        ([0.1, 3], [0.1, 3]),
    ],
)  # fmt: skip
def test_values_are_numbers_or_ranges_of_them(said: Any, found: list[float]) -> None:
    assert parse_values(said) == found


@pytest.mark.parametrize("said", ["", "a", "1,,2", "nan", "inf", "0..1", "0..1:1", "0..1:x", "0,0.1..-1", "0,1..1e9"])
def test_what_is_no_number_is_refused(said: str) -> None:
    error, _ = refusal(lambda: parse_values(said))
    assert error.startswith("--values: found ")
    assert error.endswith("expected numbers as 0,0.5,1 or 0..1:5 (five of them, both ends among them) or 0,0.25..1")


def test_a_count_too_large_is_told_the_most() -> None:
    assert refusal(lambda: parse_values("0..1:101"))[0] == "--values: found '0..1:101', expected at most 100 numbers"
    assert refusal(lambda: parse_values("0..1:100000"))[0].endswith("expected at most 100 numbers")


def test_a_value_stands_once() -> None:
    assert refusal(lambda: parse_values("0.1,1e-1"))[0] == "--values: found 0.1 twice"


def test_names_lose_the_suffix_of_their_kind() -> None:
    said = {
        "x/a.safetensors": "a", "a.b.ckpt": "a.b", "hf://owner/sd-1.5": "sd-1.5", "hf://o/n@main": "n",
        "sd-1.5/": "sd-1.5", "a@b.safetensors": "a@b", "r.yaml": "r", ".safetensors": ".safetensors",
    }  # fmt: skip
    assert {label: stem_of(label) for label in said} == said


def test_loras_that_are_called_as_all_are_have_the_names_of_their_folders() -> None:
    said = {
        "x/style.safetensors": "style", "x/cat-train/checkpoints/step-000100/lora.safetensors": "cat-step-000100",
        "cat-train/checkpoints/step-000100/lora": "cat-step-000100",
        "out/checkpoint-500/pytorch_lora_weights.safetensors": "out-checkpoint-500",
        "hf://owner/name/pytorch_lora_weights.safetensors": "name", "lora.safetensors": "lora",
    }  # fmt: skip
    assert {label: lora_name(label) for label in said} == said


# ------------------------------------------------------------------------------------------------ training runs


def test_the_checkpoints_of_a_training_lie_beside_its_lora(tmp_path: Path) -> None:
    lora = run_of(tmp_path, 10, 20)
    found = training_steps(str(lora))
    assert [(label, step) for label, step, _ in found] == [("step 10", 10), ("step 20", 20), ("step 30", 30)]
    assert found[0][2].endswith("step-000010/lora.safetensors")
    assert found[-1][2] == str(lora)
    for other in (tmp_path / "cat-train", tmp_path / "cat-train" / "checkpoints"):
        assert training_steps(str(other)) == found


def test_the_end_of_a_training_is_no_column_twice(tmp_path: Path) -> None:
    assert [step for _, step, _ in training_steps(str(run_of(tmp_path, 10, 30)))] == [10, 30]


def test_an_end_that_says_no_steps_is_the_last_column(tmp_path: Path) -> None:
    lora = run_of(tmp_path, 10, final=None)
    shots = plan((str(lora), 0.5), over="step", prompts=[Prompt("x")])
    assert shots.columns == ("step 0 (base)", "step 10", "final")
    assert [s.loras and s.loras[0][1] for s in shots.shots] == [(), 0.5, 0.5]


def test_steps_can_be_chosen(tmp_path: Path) -> None:
    lora = run_of(tmp_path, 10, 20)
    assert plan((str(lora), 1.0), over="step", values="0,20").columns == ("step 0 (base)", "step 20")
    assert refusal(lambda: plan((str(lora), 1.0), over="step", values="0,15")) == (
        "--values: there is no checkpoint of step 15", "there are 0, 10, 20, 30"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("files", "labels"),
    [
        (["checkpoint-500/pytorch_lora_weights.safetensors", "checkpoint-1000/pytorch_lora_weights.safetensors"],
         ["step 500", "step 1000"]),
        (["style-step00000100.safetensors", "style-step00000200.safetensors", "style.safetensors"],
         ["step 100", "step 200", "final"]),
        (["style-000002.safetensors", "style-000010.safetensors"], ["2", "10"]),
        (["step-000100/adapter_model.safetensors", "step_200/other.safetensors", "notes.txt"],
         ["step 100", "step 200"]),
    ],
)  # fmt: skip
def test_folders_of_other_trainers_are_read(tmp_path: Path, files: list[str], labels: list[str]) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path / name, {"x": torch.ones(1)})
    assert [label for label, _, _ in training_steps(str(tmp_path))] == labels


def test_what_holds_no_checkpoints_is_refused(tmp_path: Path) -> None:
    alone = save(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    assert refusal(lambda: training_steps(str(alone))) == (
        f"{alone}: found no checkpoints beside it, expected them in 'a-train/checkpoints'",
        "train --checkpoint-every N writes them; --lora FOLDER names another place",
    )
    assert refusal(lambda: training_steps(str(tmp_path / "no")))[0] == f"{tmp_path}/no: no such file or folder"
    save(tmp_path / "b.safetensors", {"x": torch.ones(1)})
    assert refusal(lambda: training_steps(str(tmp_path)))[0] == (
        f"{tmp_path}: found 2 files without a number of steps: 'a.safetensors', 'b.safetensors', expected one at most"
    )
    (tmp_path / "e" / "step-3").mkdir(parents=True)
    assert refusal(lambda: training_steps(str(tmp_path / "e")))[0] == (
        f"{tmp_path}/e/step-3: found 0 safetensors files, expected the one of a LoRA"
    )
