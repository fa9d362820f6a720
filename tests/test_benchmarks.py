"""Each benchmark runs once, at toy size; its figures are not judged here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


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
