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
