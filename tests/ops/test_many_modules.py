"""Of a file of many modules no more is in memory than of one of few: what is kept of each is a row of the report."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import save

SIDE, RANK = 1024, 32
FEW, MANY = 24, 384
NBYTES = 2 * 2 * SIDE * RANK  # of a module's factors

PEAK = """
import sys
import weightops
verb, *words = sys.argv[1:]
weightops.{}
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
VERBS = {
    "resize": "resize('{}.safetensors', rank=8, output='out.safetensors', memory=32 << 20, threads=2)",
    "resize by energy": "resize('{}.safetensors', rank='energy:0.5', output='out.safetensors', memory=32 << 20, threads=2)",
    "combine": "combine('{0}.safetensors:0.7', '{0}.safetensors:0.2', rank=8, output='out.safetensors', memory=32 << 20, threads=2)",
}


def peak(verb: str, file: str) -> int:
    """The most bytes that a process of its own had in memory."""
    script = PEAK.replace("{}", VERBS[verb].format(file))
    done = subprocess.run([sys.executable, "-c", script, verb], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    Path("out.safetensors").unlink()
    return 1024 * int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("verb", VERBS)
def test_memory_does_not_grow_with_the_modules(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(1)
    down, up = (torch.randn(shape, generator=generator).half() for shape in ((RANK, SIDE), (SIDE, RANK)))
    for file, count in (("few", FEW), ("many", MANY)):
        tensors = {}
        for n in range(count):
            name = f"lora_unet_blocks_{n}_attn_to_q"
            tensors |= {f"{name}.lora_down.weight": down.clone(), f"{name}.lora_up.weight": up.clone()}
        save(Path(f"{file}.safetensors"), tensors)
    few, many = (min(peak(verb, file) for _ in range(1)) for file in ("few", "many"))
    print(verb, few/1e6, many/1e6, (many-few)/1e6, (MANY-FEW)*NBYTES/1e6)
    assert 0
