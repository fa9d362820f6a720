"""What is held in memory is read as what is written to the disk."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import save

import weightops
from weightops.errors import UsageError
from weightops.files.checkpoint import open_checkpoint
from weightops.files.held import Held
from weightops.files.source import read

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))


def everything(place: str | Path | Held) -> dict[str, bytes]:
    with open_checkpoint(place) as opened:
        return {
            key: read(opened.files[info.shard], info.start, info.stop - info.start)
            for key, info in opened.tensors.items()
        }


def test_a_merge_into_memory_is_the_merge_on_the_disk(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    files = [
        save(
            tmp_path / f"{n}.safetensors", {k: torch.randn(9, 5, generator=generator) for k in ("x.weight", "y.weight")}
        )
        for n in "ab"
    ]
    held = Held("merged")
    report = weightops.merge(*files, alpha=0.3, output=held)
    weightops.merge(*files, alpha=0.3, output=tmp_path / "out.safetensors")
    assert everything(held) == everything(tmp_path / "out.safetensors")
    with open_checkpoint(tmp_path / "out.safetensors") as opened:
        assert held.metadata == opened.metadata
    assert report.output is None
    assert report.bytes_written >= 2 * 9 * 5 * 4
    weightops.convert(held, dtype="fp16", output=tmp_path / "half.safetensors")
    weightops.convert(tmp_path / "out.safetensors", dtype="fp16", output=tmp_path / "same.safetensors")
    assert everything(tmp_path / "half.safetensors") == everything(tmp_path / "same.safetensors")


def test_a_folder_in_memory_is_the_folder_on_the_disk(tmp_path: Path) -> None:
    import tiny

    pipe, file = tiny.checkpoint("sd15", tmp_path)
    words = tiny.words_of(pipe, tmp_path / "words")
    held = Held("folder")
    weightops.convert(file, to="diffusers", like=words, prediction="epsilon", output=held)
    weightops.convert(file, to="diffusers", like=words, prediction="epsilon", output=tmp_path / "out")
    assert everything(held) == everything(tmp_path / "out")
    with open_checkpoint(held) as ours, open_checkpoint(tmp_path / "out") as theirs:
        assert (ours.container, set(ours.components)) == (theirs.container, set(theirs.components))
        for name in ("model_index.json", "unet/config.json", "tokenizer/vocab.json", "nothing.json"):
            assert ours.bytes_beside(name) == theirs.bytes_beside(name)
    weightops.convert(held, to="original", output=tmp_path / "back.safetensors")
    assert everything(tmp_path / "back.safetensors") == everything(file)


def test_what_failed_holds_nothing(tmp_path: Path) -> None:
    file = save(tmp_path / "a.safetensors", {"x.weight": torch.tensor([[float("nan")]])})
    held = Held("nothing")
    with pytest.raises(UsageError, match="nothing: holds nothing yet"):
        open_checkpoint(held)
    with pytest.raises(weightops.errors.ValueRefused):
        weightops.convert(file, dtype="fp16", output=held)
    with pytest.raises(UsageError, match="nothing: holds nothing yet"):
        open_checkpoint(held)


@pytest.mark.parametrize("words", [{"verify": True}, {"check": True}])
def test_what_reads_the_output_back_needs_a_file(words: dict[str, bool], tmp_path: Path) -> None:
    file = save(tmp_path / "a.safetensors", {"x.weight": torch.ones(2, 2)})
    with pytest.raises(UsageError, match=r"memory: --\w+ needs a file for the output, found one in memory"):
        weightops.convert(file, output=Held("memory"), **words)
