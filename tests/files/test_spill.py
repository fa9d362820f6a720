"""Spill: what is appended from many threads is there, and nothing is left of it."""

from __future__ import annotations

import os
import tempfile
import threading
from typing import TYPE_CHECKING

import pytest

from weightops.errors import OutputError
from weightops.files.source import read
from weightops.files.spill import Spill

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("naming", ["unnamed", "named"])
def test_what_was_appended_by_many_is_there_and_then_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, naming: str
) -> None:
    if naming == "named":
        monkeypatch.setattr(tempfile, "_O_TMPFILE_WORKS", False, raising=False)
    spill = Spill(tmp_path / "undo.safetensors")
    found: dict[bytes, int] = {}

    def append(number: int) -> None:
        for n in range(50):
            data = bytes([number, n]) * (1 + 37 * n)
            found[data] = spill.append(data)

    threads = [threading.Thread(target=append, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert spill.size == sum(map(len, found))
    assert all(read(spill, start, len(data)) == data for data, start in found.items())
    if os.name != "nt":
        assert [*tmp_path.iterdir()] == []
    with pytest.raises(OutputError, match=r"undo\.safetensors: ends at byte"):
        read(spill, spill.size - 1, 5)
    spill.close()
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"undo\.safetensors: cannot be written: No such file or directory"):
        Spill(tmp_path / "none" / "undo.safetensors")
