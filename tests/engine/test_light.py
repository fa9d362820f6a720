"""Headers are enough to plan, and bytes are enough to copy: neither ever loads torch."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from conftest import CLI, save_raw

if TYPE_CHECKING:
    from pathlib import Path

BEGINNING = "import sys; sys.path.insert(0, {root!r}); "
END = "; print([m for m in ('torch', 'numpy', 'rich') if m in sys.modules])"


def loaded(folder: Path, code: str) -> str:
    """Which of the heavy modules are loaded after this code has run."""
    words = [sys.executable, "-c", BEGINNING.format(root=str(CLI.parent)) + code + END]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        save_raw(tmp_path / f"{name}.safetensors", {"w": ("F16", [300, 2], bytes(1200)), "n": ("I64", [], bytes(8))})
        codes = {
            "model.diffusion_model.w": ("U8", [1 << 21], bytes(1 << 21)),
            "cond_stage_model.v": ("F4", [2], b"x"),
        }
        save_raw(tmp_path / f"codes_{name}.safetensors", codes)
    return tmp_path


def test_the_engine_and_the_planners_import_nothing_heavy(folder: Path) -> None:
    code = "import weightops.engine.run, weightops.ops.merge, weightops.ops.inspect, weightops.files.checkpoint"
    assert loaded(folder, code) == "[]"


def test_planning_a_merge_needs_headers_alone(folder: Path) -> None:
    code = "import weightops; weightops.merge('a.safetensors', 'b.safetensors', output='o.safetensors', dry_run=True)"
    assert loaded(folder, code) == "[]"
    assert not (folder / "o.safetensors").exists()


def test_a_plan_of_copies_never_loads_torch(folder: Path) -> None:
    code = (
        "from pathlib import Path; from weightops.engine.run import run; from weightops.plan import *; "
        "from weightops.files.checkpoint import open_checkpoint; c = open_checkpoint('a.safetensors'); "
        "t = tuple(Task(k, (Input(0, c.slot(k)),), (c.slot(k),)) for k in c.tensors); "
        "run(Plan((c,), {k: i.spec for k, i in c.tensors.items()}, t), Path('o.safetensors'), memory=1 << 24)"
    )
    assert loaded(folder, code) == "[]"
    assert (folder / "o.safetensors").read_bytes().endswith(bytes(1208))


def test_planning_a_fuse_needs_headers_alone(folder: Path) -> None:
    save_raw(folder / "base.safetensors", {"x.weight": ("F16", [30, 20], bytes(1200))})
    factors = {"lora_unet_x.lora_up.weight": ("F16", [30, 2], bytes(120)),
               "lora_unet_x.lora_down.weight": ("F16", [2, 20], bytes(80))}  # fmt: skip
    save_raw(folder / "lora.safetensors", factors)
    code = "import weightops; weightops.fuse('base.safetensors', 'lora.safetensors:0.5', dry_run=True)"
    assert loaded(folder, code) == "[]"
    assert "torch" in loaded(folder, code.replace(", dry_run=True", ""))


def test_a_merge_that_only_copies_never_loads_torch(folder: Path) -> None:
    code = (
        "import weightops; "
        "weightops.merge('codes_a.safetensors', 'codes_b.safetensors', text_encoder='2', output='o.safetensors')"
    )
    assert "torch" not in loaded(folder, code)
    assert (folder / "o.safetensors").exists()


def test_inspect_never_loads_torch_or_numpy(folder: Path) -> None:
    code = "import weightops; weightops.inspect('a.safetensors', tensors='*', hashes=True)"
    assert loaded(folder, code) == "[]"
