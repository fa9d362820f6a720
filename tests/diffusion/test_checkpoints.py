"""A run that was stopped and goes on ends with the bytes of one that was not; what is half there is not there."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from trained import images, model, quietly, root, train

from weightops.diffusion.checkpoints import State, keep_newest, load, newest, save, steps_in
from weightops.diffusion.sprites import sprites
from weightops.errors import FormatError, Interrupted, OutputError, UsageError, WeightopsError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = quietly


def stopping(step: int, error: type[BaseException] = KeyboardInterrupt) -> Callable[..., None]:
    """Progress that breaks a run off after so many steps."""

    def show(what: str, done: int, _total: int, _loss: float | None) -> None:
        if (what, done) == ("training", step):
            raise error

    return show


def read(folder: Path) -> dict[str, bytes]:
    """What a run leaves that is to be the same, bit for bit."""
    return {
        name: (folder / name).read_bytes()
        for name in ("lora.safetensors", "lora-train/loss.csv", "lora-train/loss.png")
    }


# ------------------------------------------------------------------------------------------------ bit for bit

RUNS: dict[str, dict[str, Any]] = {
    "plain": {"architecture": "flux", "steps": 4, "checkpoint_every": 1},
    "all at once": {
        "architecture": "sd15", "steps": 4, "schedule": "cosine", "warmup": 1, "batch": 2, "accumulate": 2,
        "train_text_encoder": True, "text_encoder_lr": 1e-3, "flip": True, "noise_offset": 0.1, "snr_gamma": 5.0,
        "dora": True, "targets": ("attn2.to_k",),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_resumed_at_half_is_uninterrupted_bit_for_bit(name: str, tmp_path: Path) -> None:
    words = {**RUNS[name], "lr": 1e-2}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    train(whole / "lora.safetensors", **words)
    with pytest.raises(Interrupted) as told:
        train(broken / "lora.safetensors", **words, on_progress=stopping(2))
    assert str(told.value) == f"train: interrupted after step 2 of 4, which is kept in {broken / 'lora-train'}"
    assert told.value.hint == "--resume, beside the same words, goes on from there"
    assert not (broken / "lora.safetensors").exists()
    assert (broken / "lora-train/loss.png").is_file()
    report = train(broken / "lora.safetensors", **words, resume=True)
    assert (report.resumed_at, report.steps) == (2, 4)
    assert read(broken) == read(whole)
    last = [load(folder / "lora-train/checkpoints/step-000004") for folder in (whole, broken)]
    assert last[0].parameters.keys() == last[1].parameters.keys()
    for key, tensor in last[0].parameters.items():
        assert torch.equal(tensor, last[1].parameters[key]), key
    # It did learn something in between.
    assert any(tensor.any() for key, tensor in last[0].parameters.items() if "lora_B" in key)


def test_a_run_that_was_killed_goes_on_from_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    """As after kill -9: a log that went on, a checkpoint that is half there."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
        train(folder / "lora.safetensors", steps=3, checkpoint_every=1)
    checkpoints = broken / "lora-train/checkpoints"
    shutil.rmtree(checkpoints / "step-000003")
    (checkpoints / "step-000002").rename(checkpoints / ".part-x")
    (broken / "lora.safetensors").unlink()
    with (broken / "lora-train/loss.csv").open("a") as file:
        file.write("4,0.2")
    assert train(broken / "lora.safetensors", steps=3, checkpoint_every=1, resume=True).resumed_at == 1
    assert read(broken) == read(whole)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000001", "step-000002", "step-000003"]


def test_a_run_may_be_made_longer_where_its_schedule_looks_not_ahead(tmp_path: Path) -> None:
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    for folder in (whole, longer):
        folder.mkdir()
    train(whole / "lora.safetensors", steps=3)
    train(longer / "lora.safetensors", steps=2)
    train(longer / "lora.safetensors", steps=3, resume=True, force=True)
    assert read(longer) == read(whole)
    with pytest.raises(UsageError, match=r"--resume: step-000003 has more steps than the 1 that are asked for"):
        train(longer / "lora.safetensors", steps=1, resume=True, force=True)


# ------------------------------------------------------------------------------------------------ refused


@pytest.fixture(scope="module")
def done() -> Path:
    """A run of two steps that is over. Not to be changed."""
    folder = root() / "over"
    folder.mkdir()
    train(folder / "lora.safetensors", schedule="cosine")
    return folder


def test_going_on_with_other_words_images_or_model_names_what_differs(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "run")
    output = tmp_path / "run/lora.safetensors"
    same: dict[str, Any] = {"schedule": "cosine", "resume": True, "force": True}
    before = read(tmp_path / "run")
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"rank": 8}, "--resume: rank was 4, and is 8; alpha was 4.0, and is 8.0"),
        ({"lr": 1e-3}, "--resume: lr was 0.0001, and is 0.001"),
        ({"steps": 3}, "--resume: steps was 2, and is 3"),
        ({"seed": 1, "flip": True}, "--resume: flip was False, and is True; seed was 42, and is 1"),
        ({"batch": 2}, "--resume: batch was 1, and is 2; slots a step was 1, and is 2"),
        ({"folder": sprites(tmp_path / "others", count=3)}, "--resume: data was 'xxh3_128:"),
        ({"model": model("sd3")}, "--resume: model was ['xxh3_128:"),
    )
    for words, message in cases:
        with pytest.raises(UsageError) as told:
            train(output, **{**same, **words})
        assert str(told.value).startswith(message)
        assert told.value.hint is not None
        assert "begin anew in another place" in told.value.hint
    assert read(tmp_path / "run") == before


def test_words_that_change_nothing_that_is_learnt_may_differ(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "run")
    report = train(
        tmp_path / "run/lora.safetensors", schedule="cosine", resume=True, force=True, log_every=5, keep_checkpoints=1,
        gradient_checkpointing=True, checkpoint_every=1, cache=tmp_path / "cache", preset="style", batch=1, flip=False,
    )  # fmt: skip
    assert report.resumed_at == 2
    assert report.first_loss is not None
    assert read(tmp_path / "run") == read(done)


def test_there_must_be_something_to_go_on_from_and_nothing_to_overwrite(done: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--resume: found no checkpoint in .*none-train/checkpoints'$"):
        train(tmp_path / "none.safetensors", resume=True)
    shutil.copytree(done, tmp_path / "run")
    (tmp_path / "run/lora.safetensors").unlink()
    with pytest.raises(OutputError, match=r"lora-train: holds checkpoints of another run, to step-000002$") as told:
        train(tmp_path / "run/lora.safetensors", rank=2)
    assert told.value.hint == "--resume goes on from there, and --force begins anew without them"
    assert train(tmp_path / "run/lora.safetensors", rank=2, steps=1, force=True).resumed_at == 0
    assert list(steps_in(tmp_path / "run/lora-train")) == [1]
    (tmp_path / "file-train").write_text("")
    with pytest.raises(OutputError, match=r"file-train: is a file, expected a folder"):
        train(tmp_path / "file.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "checkpoints/step-000002/state.pt").write_bytes(b"no"), r"state\.pt: cannot be read back"),
        (lambda run: (run / "settings.json").write_text("[]"), r"settings\.json: cannot be read: it is not what"),
        (lambda run: (run / "settings.json").unlink(), r"settings\.json: cannot be read: No such file"),
        (lambda run: (run / "loss.csv").write_text("step\na,b,c,d\n"), r"loss\.csv: is not the log that weightops"),
    ],
    ids=["state", "settings", "no settings", "log"],
)  # fmt: skip
def test_damage_has_its_sentence(spoil: Callable[[Path], Any], message: str, done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "run")
    spoil(tmp_path / "run/lora-train")
    with pytest.raises(FormatError, match=message):
        train(tmp_path / "run/lora.safetensors", schedule="cosine", resume=True, force=True)


def test_a_checkpoint_runs_nothing_that_stands_in_it(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (exec, ("raise SystemExit",))

    torch.save({"step": Evil()}, tmp_path / "state.pt")
    with pytest.raises(FormatError, match="cannot be read back"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------ whole or not at all


def state(step: int) -> State:
    return State(step, 0.5, {"a": torch.ones(2)}, {}, {}, {})


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path) -> None:
    def put(folder: Path) -> None:
        (folder / "lora.safetensors").write_text("x")

    def fail(folder: Path) -> None:
        put(folder)
        raise OutputError("lora", "no room")

    save(tmp_path, state(1), put)
    for failing in (fail, stopping_in_the_middle):
        with pytest.raises((WeightopsError, KeyboardInterrupt)):
            save(tmp_path, state(2), failing)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    found = load(save(tmp_path, state(2), put))
    assert (found.step, found.smoothed) == (2, 0.5)
    assert torch.equal(found.parameters["a"], torch.ones(2))
    # One of the same step is replaced.
    save(tmp_path, state(2), lambda folder: (folder / "other").write_text(""))
    assert {path.name for path in (tmp_path / "checkpoints/step-000002").iterdir()} == {"other", "state.pt"}


def stopping_in_the_middle(_folder: Path) -> None:
    raise KeyboardInterrupt


def test_the_newest_ones_are_kept_by_their_steps(tmp_path: Path) -> None:
    for step in (5, 20, 100, 1_000_000):
        save(tmp_path, state(step), lambda folder: None)
    (tmp_path / "checkpoints/step-000999").mkdir()  # without a state it is none
    assert list(steps_in(tmp_path)) == [5, 20, 100, 1_000_000]
    keep_newest(tmp_path, 2)
    assert list(steps_in(tmp_path)) == [100, 1_000_000]
    found = newest(tmp_path)
    assert found is not None
    assert found.name == "step-1000000"
    assert newest(tmp_path / "nowhere") is None


def test_checkpoints_are_kept_as_asked_and_hold_loras_that_load(tmp_path: Path) -> None:
    report = train(tmp_path / "peft", dialect="peft", steps=4, checkpoint_every=1, keep_checkpoints=2)
    assert [path.rpartition("/")[2] for path in report.checkpoints] == ["step-000003", "step-000004"]
    for path in report.checkpoints:
        assert (tmp_path / path / "lora/adapter_config.json").is_file()
    settings = json.loads((tmp_path / "peft-train/settings.json").read_text())
    assert settings["words"]["targets"][:2] == ["to_q", "to_k"]
    assert settings["images"] == len(list(images().glob("*.png")))
