"""Of a file of many modules no more is in memory than of one of few: what is kept of each is a row of the report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import save

SIDE, RANK = 1024, 32
FEW, MANY = 16, 272
NBYTES = 2 * 2 * SIDE * RANK  # of a module's factors

PEAK = """
import weightops
weightops.{}
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
RUNNING = "output='out.safetensors', memory=32 << 20, threads=2"
VERBS = {
    "resize": f"resize('FILE.safetensors', rank='energy:0.5', {RUNNING})",
    "combine": f"combine('FILE.safetensors:0.7', 'FILE.safetensors:0.2', rank=8, {RUNNING})",
}


def peak(verb: str, file: str) -> int:
    """The most bytes that a process of its own had in memory."""
    script = PEAK.replace("{}", VERBS[verb].replace("FILE", file))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    Path("out.safetensors").unlink()
    return 1024 * int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("verb", VERBS)
def test_memory_does_not_grow_with_the_modules(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 more of them, of 34 MB; measured, 2 to 6 MB more are taken."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(1)
    down, up = (torch.randn(shape, generator=generator).half() for shape in ((RANK, SIDE), (SIDE, RANK)))
    peaks = []
    for file, count in (("few", FEW), ("many", MANY)):
        names = [f"lora_unet_blocks_{n}_attn_to_q" for n in range(count)]
        tensors = {f"{name}.lora_down.weight": down.clone() for name in names}
        save(Path(f"{file}.safetensors"), tensors | {f"{name}.lora_up.weight": up.clone() for name in names})
        peaks.append(peak(verb, file))
    assert peaks[1] - peaks[0] < (MANY - FEW) * NBYTES // 2, peaks
