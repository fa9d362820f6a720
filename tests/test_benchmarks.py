"""Each benchmark runs once, at toy size; its figures are not judged here."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIDES = {"down": (4, 64), "up": (64, 4)}  # of a LoRA of the tiny text encoder


@pytest.mark.skipif(not hasattr(__import__("os"), "wait4"), reason="whole processes are measured with wait4")
def test_merge_benchmark_runs_and_prints_its_ratios(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "merge.py"), "--models", "sd15", "--scale", "0.0005", "--runs", "1"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "weightops / usual" in done.stdout
    assert "(weightops - import torch) / floor" in done.stdout
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.skipif(not hasattr(__import__("os"), "wait4"), reason="whole processes are measured with wait4")
def test_convert_benchmark_runs_and_prints_its_ratios(tmp_path):
    sys.path.insert(0, str(Path(__file__).parent / "ops"))
    from tiny import checkpoint

    _, path = checkpoint("sd15", tmp_path)
    command = [sys.executable, str(BENCHMARKS / "convert.py"), "--file", str(path), "--runs", "1"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "weightops / floor" in done.stdout
    assert "torch imported: no" in done.stdout
    assert not (tmp_path / "out").exists()
    assert path.is_file()


def finetune(folder: Path) -> tuple[Path, Path]:
    """A tiny checkpoint, and one that is a little different throughout."""
    sys.path.insert(0, str(Path(__file__).parent / "ops"))
    import torch
    from conftest import save
    from safetensors.torch import load_file
    from tiny import checkpoint

    _, base = checkpoint("sd15", folder)
    generator = torch.Generator().manual_seed(5)
    changed = {
        key: t + 0.01 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for key, t in load_file(base).items()
    }
    return base, save(folder / "tuned.safetensors", changed)


@pytest.mark.skipif(not hasattr(__import__("os"), "wait4"), reason="whole processes are measured with wait4")
def test_fuse_benchmark_runs_beside_a_peer(tmp_path):
    import torch
    from conftest import save

    base, _ = finetune(tmp_path)
    module = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    factors = {f"{module}.lora_{side}.weight": torch.randn(shape) for side, shape in SIDES.items()}
    lora = save(tmp_path / "lora.safetensors", factors)
    peer = shlex.join([sys.executable, "-m", "weightops.cli", "fuse", "{checkpoint}", "{lora}", "-o", "{out}"])
    command = [sys.executable, str(BENCHMARKS / "lora.py"), "fuse", "--checkpoint", str(base), "--lora", str(lora)]
    words = ["--runs", "2", "--peer", peer, "--peer-runs", "1", "--folder", str(tmp_path / "out")]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"peer: {peer}" in done.stdout
    assert "(of medians, 1 and 2 rounds)" in done.stdout
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(not hasattr(__import__("os"), "wait4"), reason="whole processes are measured with wait4")
def test_extract_benchmark_holds_what_is_written_against_the_optimum(tmp_path):
    """The peer writes half the rank that is asked for, which is told from its errors."""
    base, tuned = finetune(tmp_path)
    words = ["extract", "{tuned}", "{base}", "--rank", "2", "--conv-rank", "2", "-o", "{out}"]
    peer = shlex.join([sys.executable, "-m", "weightops.cli", *words])
    command = [sys.executable, str(BENCHMARKS / "lora.py"), "extract", "--tuned", str(tuned), "--base", str(base)]
    words = ["--rank", "4", "--runs", "1", "--layers", "1", "--peer", peer, "--folder", str(tmp_path / "out")]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "peer / weightops" in done.stdout
    _, _, errors = done.stdout.partition("error / optimum")
    ours, theirs = (
        [float(word) for word in next(line for line in errors.splitlines() if line.startswith(f"{name} ")).split()[1:4]]
        for name in ("weightops", "peer")
    )
    assert ours[0] < theirs[0]
    assert ours[1] < theirs[1]
    assert 0.9999 <= ours[2] < theirs[2]
    assert not list((tmp_path / "out").iterdir())


def loras(folder: Path) -> tuple[Path, Path, dict[str, tuple]]:
    """Two LoRAs, of a matrix and of a convolution that only the first has; and 0.7 of the one less half the other."""
    import torch
    from conftest import save

    generator = torch.Generator().manual_seed(5)
    shapes = {"attentions_0_proj_in": (40, 40, 1, 1), "resnets_0_conv1": (40, 40, 3, 3)}
    files, sums = ({}, {}), {}
    for number, weight in enumerate((0.7, -0.5)):
        for name, (out, features, *kernel) in shapes.items():
            if "conv1" in name and number:
                continue
            module = f"lora_unet_down_blocks_0_{name}"
            up = torch.randn(out, 6, *[1] * len(kernel), generator=generator)
            down = torch.randn(6, features, *kernel, generator=generator)
            alpha = 3.0 + number
            files[number].update(
                {
                    f"{module}.lora_up.weight": up,
                    f"{module}.lora_down.weight": down,
                    f"{module}.alpha": torch.tensor(alpha),
                }
            )
            change = weight * alpha / 6 * up.double().flatten(1) @ down.double().flatten(1)
            sums[module] = sums[module] + change if module in sums else change
    return *(save(folder / f"{'ab'[n]}.safetensors", file) for n, file in enumerate(files)), sums


def ratios_of(printed: str) -> dict[str, float]:
    """File -> error / optimum in total."""
    _, _, table = printed.partition("error / optimum")
    rows = [line.split() for line in table.splitlines()]
    return {row[0]: float(row[3]) for row in rows if len(row) == 5 and row[0] != "worst"}


def test_the_check_of_a_sum_tells_the_errors_that_dense_matrices_tell(tmp_path):
    """Held against it: a file that lacks the convolution, and one that is the best of the ranks."""
    import torch
    from conftest import save

    a, b, sums = loras(tmp_path)
    ranks = {module: 3 if "conv1" in module else 4 for module in sums}
    best, squares = {}, {}
    for module, matrix in sums.items():
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        rank = ranks[module]
        kernel = (3, 3) if "conv1" in module else (1, 1)
        best[f"{module}.lora_up.weight"] = (u[:, :rank] * s[:rank]).float().reshape(40, rank, 1, 1)
        best[f"{module}.lora_down.weight"] = v[:rank].float().reshape(rank, 40, *kernel)
        squares[module] = float(s.square().sum()), float(s[rank:].square().sum())
    best = {key: tensor.contiguous() for key, tensor in best.items()}
    whole = save(tmp_path / "whole.safetensors", best)
    lacking = save(tmp_path / "lacking.safetensors", {k: t for k, t in best.items() if "conv1" not in k})
    command = [sys.executable, str(BENCHMARKS / "lora.py"), "--only", "check_sum", "4", "3", "2"]
    words = [f"{a}:0.7", f"{b}:-0.5", str(whole), str(lacking)]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    norm = sum(total for total, _ in squares.values())
    least = sum(tail for _, tail in squares.values())
    without = sum(total if "conv1" in module else tail for module, (total, tail) in squares.items())
    told = {row[0]: float(row[1]) for row in rows if len(row) == 2}
    expected = {"least": least, "whole": least, "lacking": without}
    assert told == pytest.approx({name: (square / norm) ** 0.5 for name, square in expected.items()}, rel=1e-3)
    assert ratios_of(done.stdout) == pytest.approx({"whole": 1.0, "lacking": (without / least) ** 0.5}, rel=1e-3)


@pytest.mark.skipif(not hasattr(__import__("os"), "wait4"), reason="whole processes are measured with wait4")
@pytest.mark.parametrize("verb", ["resize", "combine"])
def test_resize_and_combine_benchmarks_hold_what_is_written_against_the_optimum(tmp_path, verb):
    """The peer writes half the rank that is asked for, which is told from its errors."""
    a, b, _ = loras(tmp_path)
    given = ["--lora", str(a)] if verb == "resize" else ["--a", str(a), "--b", str(b), "--weights", "0.7", "-0.5"]
    summands = ["{lora}"] if verb == "resize" else ["{a}:0.7", "{b}:-0.5"]
    peer = shlex.join([sys.executable, "-m", "weightops.cli", verb, *summands, "--rank", "2", "-o", "{out}"])
    command = [sys.executable, str(BENCHMARKS / "lora.py"), verb, *given, "--rank", "4", "--runs", "1"]
    done = subprocess.run(
        [*command, "--peer", peer, "--folder", str(tmp_path / "out")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "peer / weightops" in done.stdout
    ratios = ratios_of(done.stdout)
    assert 0.9999 <= ratios["weightops"] < 1.001 < ratios["peer"]
    assert not list((tmp_path / "out").iterdir())
