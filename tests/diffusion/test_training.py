"""The loop: gradients for the LoRA alone, the same step however it is shared out, an end that says what happened."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from trained import images, model, quietly, train, train_and_look

from weightops.diffusion import train as verb
from weightops.diffusion import training
from weightops.diffusion.checkpoints import load as load_checkpoint
from weightops.diffusion.models import load, networks
from weightops.diffusion.processes import Processes
from weightops.diffusion.sprites import sprites
from weightops.diffusion.training import Course, Training, put_off
from weightops.errors import Interrupted, MemoryRefused, UsageError, ValueRefused

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from commandline import weightops_here

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = quietly


def losses(output: Path) -> list[float]:
    with (output.parent / f"{output.stem}-train/loss.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


# ------------------------------------------------------------------------------------------------ what learns


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("sd15", {"train_text_encoder": True, "dora": True, "targets": ("attn2.to_k", "conv1")}),
        ("sdxl", {"train_text_encoder": True, "targets": ("attn2.to_v",)}),
        ("flux", {}),
    ],
)
def test_the_base_is_what_it_was_bit_for_bit_and_the_lora_alone_got_gradients(
    architecture: str, words: dict[str, Any], tmp_path: Path
) -> None:
    run = train_and_look(tmp_path / "lora.safetensors", architecture, lr=1e-2, **words)
    before = networks(load(model(architecture), where="test", device="cpu").pipe)
    count = 0
    for component, network in networks(run.loaded.pipe).items():
        own = dict(before[component].named_parameters())
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                # The last layer of SDXL's first text encoder is not looked at: nothing depends on it.
                unused = (architecture, component) == ("sdxl", "text_encoder") and "layers.1." in name
                assert (parameter.grad is None) == unused, name
                assert parameter.dtype == torch.float32
                count += parameter.numel()
                continue
            assert parameter.grad is None, name
            assert not parameter.requires_grad
            assert torch.equal(parameter, own.pop(name.replace("base_layer.", ""))), name
        assert own == {}
    assert count == run.report.parameters
    learnt = [bool(tensor.any()) for key, tensor in run.lora.state().items() if "lora_B" in key]
    assert sum(learnt) > 0.8 * len(learnt)


def test_whatever_else_would_train_is_our_own_mistake(tmp_path: Path) -> None:
    run = train_and_look(tmp_path / "lora.safetensors")
    from weightops.diffusion.lora_modules import check_frozen

    run.loaded.pipe.vae.decoder.conv_in.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"what trains is not the LoRA alone: 'vae\.decoder\.conv_in\.weight'"):
        check_frozen(run.loaded.pipe, run.lora)


def test_a_seed_is_a_lora_and_another_seed_another(tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(7)  # whatever else is drawn in the process
        found.append(train(tmp_path / f"{name}.safetensors", seed=seed).loss)
    assert found[0] == found[1] != found[2]


# ------------------------------------------------------------------------------------------------ the same step

# Four slots of a step. Plain descent, for AdamW makes steps of one size of rounding errors, too; and 128 pixels: at 64
# the lowest level of the tiny UNet is one pixel, and its group norms, of two values, turn on their last bits.
SHARED = {
    "lr": 0.1, "optimizer": "torch.optim.SGD", "steps": 3, "snr_gamma": 5.0, "targets": ("attn2.to_k",),
    "resolution": 128,
}  # fmt: skip


def test_a_step_is_the_same_however_it_is_cut(tmp_path: Path) -> None:
    for batch, accumulate in ((4, 1), (2, 2)):
        train(tmp_path / f"{batch}.safetensors", "sd15", batch=batch, accumulate=accumulate, **SHARED)
    whole = losses(tmp_path / "4.safetensors")
    assert len(set(whole)) == 3
    assert losses(tmp_path / "2.safetensors") == pytest.approx(whole, rel=1e-6)
    a, b = (flat(tmp_path / f"{batch}-train/checkpoints/step-000003") for batch in (4, 2))
    assert float((a - b).norm() / a.norm()) < 1e-5


def flat(checkpoint: Path) -> torch.Tensor:
    """The up factors of a checkpoint, as one row."""
    parameters = load_checkpoint(checkpoint).parameters
    return torch.cat([tensor.reshape(-1) for key, tensor in parameters.items() if "lora_B" in key])


def test_two_processes_learn_what_one_does_with_the_same_effective_batch(tmp_path: Path) -> None:
    """By torchrun and gloo; the command line, for each process speaks for itself."""
    words = [
        "train", "text-to-image", images(), "--model", model("flux"), "--steps", 3, "--resolution", 64, "--rank", 2,
        "--lr", 1e-3, "--device", "cpu", "--json", "--cache", tmp_path / "cache",
    ]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    environment = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    done = subprocess.run(
        [*launcher, "weightops.cli", *map(str, words), "-o", str(tmp_path / "two.safetensors")],
        capture_output=True, text=True, check=False, env=environment, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"command"') == 1
    assert '"processes": 2' in done.stdout
    train(tmp_path / "one.safetensors", batch=2, steps=3, rank=2, lr=1e-3)
    one, two = losses(tmp_path / "one.safetensors"), losses(tmp_path / "two.safetensors")
    assert len(set(one)) == 3
    assert two == pytest.approx(one, abs=1e-4)
    a, b = (flat(tmp_path / f"{name}-train/checkpoints/step-000003") for name in ("one", "two"))
    assert float((a - b).norm() / a.norm()) < 1e-2


def test_each_process_adds_its_share_of_the_gradient(tmp_path: Path) -> None:
    """Two processes in one, by turns: the sum of what they find is what one finds."""
    run: dict[str, Any] = {}

    def keep(*given: Any, **more: Any) -> Training:
        run["training"] = Training(*given, **more)
        return run["training"]

    with mock.patch("weightops.diffusion.training_run.Training", keep):
        train(tmp_path / "lora.safetensors", batch=2, steps=1)
    whole: Training = run["training"]
    whole.step, limit = 0, whole.words.clip
    mean = whole.gradients()
    wanted = [p.grad.clone() for p in whole.lora.parameters() if p.grad is not None]
    found, sums = [], []
    for index in range(2):
        one = Training(
            whole.loaded, whole.encoding, whole.objective, whole.encoded, whole.lora, replaced(whole.words, batch=1),
            whole.course, alone(index), whole.optimizer, whole.schedule,
        )  # fmt: skip
        sums.append(one.gradients())
        found.append([p.grad.clone() for p in whole.lora.parameters() if p.grad is not None])
    assert sum(sums) == pytest.approx(mean, rel=1e-6)
    assert limit == 1.0
    for a, b, both in zip(*found, wanted, strict=True):
        assert torch.allclose(a + b, both, atol=1e-6)


def replaced(words: Any, **more: Any) -> Any:
    from dataclasses import replace

    return replace(words, **more, clip=0.0)


def alone(index: int) -> Processes:
    """One of two that hears nothing of the other."""
    made = mock.Mock(spec=Processes)
    made.index, made.count, made.is_main = index, 2, index == 0
    made.sum = lambda tensor: tensor
    found: Processes = made
    return found


# ------------------------------------------------------------------------------------------------ a class beside it


def test_images_of_the_class_are_made_where_they_are_missing_and_are_the_same_ones_again(tmp_path: Path) -> None:
    classes = tmp_path / "class"
    words: dict[str, Any] = {
        "kind": "dreambooth", "instance_prompt": "a sks toy", "class_prompt": "a toy", "class_folder": classes,
        "class_images": 3, "sample_steps": 1,
    }  # fmt: skip
    report = train(tmp_path / "a.safetensors", **words)
    assert (report.class_images, report.class_images_made) == (3, 3)
    first = {path.name: path.read_bytes() for path in sorted(classes.iterdir())}
    assert list(first) == ["class-00000.png", "class-00001.png", "class-00002.png"]
    assert len(set(first.values())) == 3
    (classes / "class-00001.png").unlink()
    again = train(tmp_path / "b.safetensors", **words)
    assert again.class_images_made == 1
    assert {path.name: path.read_bytes() for path in classes.iterdir()} == first
    assert again.loss == report.loss
    # What is kept of the class counts as it is told to.
    without = train(tmp_path / "d.safetensors", **{**words, "class_prompt": None, "class_folder": None,
                                                   "class_images": None})  # fmt: skip
    twice = train(tmp_path / "e.safetensors", **words, prior_weight=2.0)
    learnt, kept = without.first_loss, report.first_loss - without.first_loss
    assert kept > 0.1
    assert twice.first_loss == pytest.approx(learnt + 2 * kept, rel=1e-5)


def test_images_of_one_class_are_not_taken_for_those_of_another(tmp_path: Path) -> None:
    """Beside the checkpoints, where an earlier run may have left some."""
    words: dict[str, Any] = {
        "kind": "dreambooth", "instance_prompt": "a sks toy", "class_images": 1, "sample_steps": 1, "steps": 1,
        "force": True,
    }  # fmt: skip
    made = [
        train(tmp_path / "lora.safetensors", class_prompt=prompt, seed=3, **words).class_images_made
        for prompt in ("a toy", "a tree", "a toy")
    ]
    assert made == [1, 1, 0]
    assert len(list((tmp_path / "lora-train").glob("class-images-*/*.png"))) == 2


def test_a_class_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class/notes.txt").write_text("no images")
    words = {"instance_prompt": "a sks toy", "class_prompt": "a toy", "class_folder": tmp_path / "class"}
    with pytest.raises(UsageError, match=r"--class-folder: "):
        train(tmp_path / "lora.safetensors", kind="dreambooth", **words)


def test_one_prompt_stands_for_all_images_of_a_subject(tmp_path: Path) -> None:
    bare = sprites(tmp_path / "bare", count=2, captions=False)
    report = train(tmp_path / "lora.safetensors", folder=bare, kind="dreambooth", instance_prompt="a sks toy", epochs=2)
    assert (report.steps, report.steps_per_epoch, report.images, report.epochs) == (4, 2, 2, 2.0)


# ------------------------------------------------------------------------------------------------ words of the course


def test_an_epoch_is_a_turn_of_all_images() -> None:
    """As the study has it: 112 images in 28 steps of four, 40 times."""
    course = Course(112, 0, 4, 1120, 28)
    assert course.epochs == 40
    assert [course.epoch(step) for step in (0, 1, 28, 29, 1120)] == [1, 1, 1, 2, 40]


def test_any_optimizer_has_its_own_settings_and_the_schedule_its_rates(tmp_path: Path) -> None:
    train(
        tmp_path / "lora.safetensors", steps=4, schedule="linear", warmup=2, lr=0.5, optimizer="torch.optim.SGD",
        optimizer_set={"momentum": "0.25", "nesterov": "true"}, weight_decay=0.125,
    )  # fmt: skip
    kept = load_checkpoint(tmp_path / "lora-train/checkpoints/step-000004").optimizer["param_groups"][0]
    assert (kept["momentum"], kept["nesterov"], kept["weight_decay"]) == (0.25, True, 0.125)
    rates = [line.split(",")[2] for line in (tmp_path / "lora-train/loss.csv").read_text().splitlines()[1:]]
    assert [float(rate) for rate in rates] == [0.0, 0.25, 0.5, 0.25]


def test_warmth_without_a_schedule_is_constant_after_it(tmp_path: Path) -> None:
    report = train(tmp_path / "lora.safetensors", steps=3, warmup=2, lr=0.5)
    assert report.settings["schedule"] == "constant_with_warmup"
    rates = [line.split(",")[2] for line in (tmp_path / "lora-train/loss.csv").read_text().splitlines()[1:]]
    assert [float(rate) for rate in rates] == [0.0, 0.25, 0.5]


def test_sixteen_bits_and_recomputing_learn_nearly_the_same(tmp_path: Path) -> None:
    plain = train_and_look(tmp_path / "a.safetensors", lr=1e-3)
    half = train_and_look(tmp_path / "b.safetensors", lr=1e-3, mixed_precision="bf16")
    assert half.loaded.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in half.lora.parameters())
    assert half.report.loss == pytest.approx(plain.report.loss, rel=0.02)
    assert half.report.loss != plain.report.loss
    again = train(tmp_path / "c.safetensors", lr=1e-3, gradient_checkpointing=True)
    assert again.loss == plain.report.loss


@pytest.fixture
def _half_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 is refused where there is no GPU: slow as it is, its losses are scaled here, too."""
    monkeypatch.setattr(verb, "_meet", lambda device, words: (Processes(), "cpu"))


@pytest.mark.usefixtures("_half_on_the_processor")
def test_in_fp16_losses_are_scaled_and_the_scale_is_kept(tmp_path: Path) -> None:
    words: dict[str, Any] = {"mixed_precision": "fp16", "steps": 3, "lr": 1e-3, "schedule": "linear"}
    for folder in ("whole", "broken"):
        (tmp_path / folder).mkdir()
    whole, broken = tmp_path / "whole/lora.safetensors", tmp_path / "broken/lora.safetensors"
    train(whole, **words)
    plain = train(tmp_path / "plain.safetensors", **{**words, "mixed_precision": "no"})

    def show(what: str, done: int, _total: int, _loss: float | None) -> None:
        if (what, done) == ("training", 2):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        train(broken, **words, on_progress=show)
    again = train(broken, **words, resume=True)
    assert broken.read_bytes() == whole.read_bytes()
    assert load_checkpoint(Path(again.checkpoints[-1])).scaler["_growth_tracker"] == 3
    assert again.loss == pytest.approx(plain.loss, rel=0.01)


@pytest.mark.usefixtures("_half_on_the_processor")
def test_a_step_whose_scaled_gradients_overflow_is_left_out(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    with mock.patch.object(torch.amp, "GradScaler", return_value=scaler):
        run = train_and_look(
            tmp_path / "lora.safetensors", mixed_precision="fp16", steps=2, lr=0.5, schedule="linear"
        )  # fmt: skip
    assert scaler.get_scale() == 2.0**38
    assert not any(tensor.any() for key, tensor in run.lora.state().items() if "lora_B" in key)
    assert [line.split(",")[2] for line in (tmp_path / "lora-train/loss.csv").read_text().splitlines()[1:]] == [
        "0.5"
    ] * 2


def test_samples_are_of_the_same_noise_and_change_with_the_lora(tmp_path: Path) -> None:
    report = train(
        tmp_path / "lora.safetensors", steps=3, lr=0.1, sample_prompt=["a red ball", "a tree"], sample_every=2,
        sample_steps=1, log_every=2,
    )  # fmt: skip
    names = [Path(path).name for path in report.samples]
    assert names == [f"step-00000{step}-{number}.png" for step in (0, 2, 3) for number in (1, 2)]
    assert len({Path(path).read_bytes() for path in report.samples}) == 6
    lines = (tmp_path / "lora-train/loss.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "2", "3"]
    from weightops.diffusion.png_text import read_recipe_of_png

    recipe = read_recipe_of_png(report.samples[3])
    assert (recipe["prompt"], recipe["seed"], recipe["step"]) == ("a tree", 42, 2)


# ------------------------------------------------------------------------------------------------ ends


def test_ctrl_c_in_a_step_waits_until_it_is_whole() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: heard.append(number))
    try:
        with put_off():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert heard == []
        assert heard == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert len(heard) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_within_a_step_leaves_that_step_whole(tmp_path: Path) -> None:
    """The optimizer is interrupted where it would hurt most: half of the parameters are changed."""
    applied = Training.apply

    def struck(self: Training, mean: float) -> Any:
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)
        return applied(self, mean)

    with mock.patch.object(Training, "apply", struck), pytest.raises(Interrupted) as told:
        train(tmp_path / "a.safetensors", steps=4)
    assert told.value.what.startswith("interrupted after step 2 of 4")
    assert told.value.exit_code == 1
    train(tmp_path / "b.safetensors", steps=2)
    end, wanted = (load_checkpoint(tmp_path / f"{n}-train/checkpoints/step-000002").parameters for n in ("a", "b"))
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in end.items())


def test_interrupted_before_the_first_step_there_is_nothing(tmp_path: Path) -> None:
    def show(what: str, _done: int, _total: int, _loss: float | None) -> None:
        if what == "training":
            raise Interrupted("", "stopped by SIGTERM: nothing was written, and no input was changed")

    with pytest.raises(
        Interrupted, match=r"^train: stopped by SIGTERM before the first step: there is nothing to keep"
    ):
        train(tmp_path / "lora.safetensors", on_progress=show)
    assert not (tmp_path / "lora-train/checkpoints").exists()
    assert train(tmp_path / "lora.safetensors").steps == 2


@pytest.mark.parametrize(("every", "kept"), [(1, "step-000001"), (None, None)])
def test_a_loss_that_is_no_number_names_the_step_and_what_is_kept(
    every: int | None, kept: str | None, tmp_path: Path
) -> None:
    measured: Callable[..., Any] = training.loss

    def broken(*given: Any, **more: Any) -> Any:
        found = measured(*given, **more)
        return found * float("nan") if calls.pop() else found

    calls = [True, False]
    with mock.patch.object(training, "loss", broken), pytest.raises(ValueRefused) as told:
        train(tmp_path / "lora.safetensors", steps=3, checkpoint_every=every)
    said = f"the last good checkpoint is {kept}" if kept else "no checkpoint was written before"
    assert str(told.value) == f"train: the loss of step 2 is nan; {said}"
    assert told.value.hint == "a lower --lr may help, or --mixed-precision bf16 or no"
    assert not (tmp_path / "lora.safetensors").exists()


def test_a_rate_that_is_much_too_high_ends_before_the_lora_is_spoilt(tmp_path: Path) -> None:
    with pytest.raises(ValueRefused, match=r"^train: the (loss|gradient) of step [2-9] is (nan|inf); no checkpoint"):
        train(tmp_path / "lora.safetensors", steps=9, lr=1e30, clip=0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
    ids=["CUDA", "Python", "torch"],
)
def test_want_of_memory_is_one_sentence_with_the_remedy(error: BaseException, tmp_path: Path) -> None:
    with mock.patch.object(Training, "gradients", side_effect=error), pytest.raises(MemoryRefused) as told:
        train(tmp_path / "lora.safetensors", batch=2, rank=8)
    assert str(told.value) == "train: the device has too little memory for this"
    assert told.value.hint == (
        "what helps: --batch 1, --gradient-checkpointing, --mixed-precision bf16, a lower --resolution, a lower --rank"
    )
    assert not (tmp_path / "lora.safetensors").exists()


def test_any_other_error_is_ours_and_keeps_its_traceback(tmp_path: Path) -> None:
    broken = mock.patch.object(Training, "gradients", side_effect=RuntimeError("shapes"))
    with broken, pytest.raises(RuntimeError, match="shapes"):
        train(tmp_path / "lora.safetensors")


def test_sigterm_on_the_command_line_keeps_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    applied = Training.apply

    def struck(self: Training, mean: float) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return applied(self, mean)

    monkeypatch.chdir(tmp_path)
    words = ("text-to-image", images(), "--model", model("flux"), "--resolution", 64, "--steps", 3, "--device", "cpu")
    with mock.patch.object(Training, "apply", struck):
        done = weightops_here("train", *words, "-o", "lora.safetensors")
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines() == [
        "error: train: stopped by SIGTERM after step 1 of 3, which is kept in lora-train",
        "hint: --resume, beside the same words, goes on from there",
    ]
    assert weightops_here("train", *words, "-o", "lora.safetensors", "--resume").code == 0
    assert (tmp_path / "lora.safetensors").is_file()


# ------------------------------------------------------------------------------------------------ the benchmark


def test_the_benchmark_of_learning_runs_at_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its figures are not judged here: that takes it minutes."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import learning

    words = ["--pretrain", "1", "--steps", "1", "--seeds", "1", "--images", "2", "--held-out", "2", "--pairs", "1"]
    assert learning.main(["--folder", str(tmp_path), *words]) in (0, 1)
    assert "held-out loss on" in capsys.readouterr().out
    assert (tmp_path / "learning.png").is_file()
    found = json.loads((tmp_path / "learning.json").read_text())
    assert set(found["own"]) == set(found["other"]) == set(found["base"]) == {"striped", "dusk"}
    assert list(found["own"]["dusk"][0]) == ["0", "1"]
