"""Torch has one thread where matrices are small, as many as before afterwards, and keeps them for what is large."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from learnt import learnt

from weightops.diffusion import threads
from weightops.diffusion.threads import SMALL, one_thread
from weightops.synthesis import edit as editing
from weightops.synthesis import sample as sampling
from weightops.synthesis.collect import collect
from weightops.synthesis.fit import fit_pca
from weightops.synthesis.learning import fit_diffusion, fit_vae

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return learnt(tmp_path_factory.mktemp("learnt"), count=16, components=4)


def test_one_for_what_is_small_and_as_many_as_before_afterwards() -> None:
    for size, count in ((0, 1), (SMALL, 1), (SMALL + 1, 2)):
        with one_thread(size):
            assert torch.get_num_threads() == count
        assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError), one_thread():
        1 // 0  # noqa: B018
    assert torch.get_num_threads() == 2


def test_the_verbs_take_one_where_a_space_is_small(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[int]] = {}

    def noting(name: str, real: Any = lambda *_: None) -> Any:
        def noted(*words: Any, **more: Any) -> Any:
            seen.setdefault(name, set()).add(torch.get_num_threads())
            return real(*words, **more)

        return noted

    collect(there / "loras", output=tmp_path / "space", on_progress=noting("collect"))
    fit_pca(tmp_path / "space", components=4, on_progress=noting("small"))
    with monkeypatch.context() as large:
        large.setattr(threads, "SMALL", 1)
        fit_pca(tmp_path / "space", components=4, on_progress=noting("large"), force=True)
    fit_vae(tmp_path / "space", latents=2, components=4, steps=2, on_progress=noting("vae"))
    fit_diffusion(
        there / "space", output=tmp_path / "d.safetensors", components=4, steps=2, on_progress=noting("noise")
    )
    monkeypatch.setattr(sampling, "drawn_of", noting("drawn", sampling.drawn_of))
    monkeypatch.setattr(sampling, "write_lora", noting("sample", sampling.write_lora))
    sampling.sample(there / "space/diffusion.safetensors", output=tmp_path / "new.safetensors")
    monkeypatch.setattr(editing, "write_lora", noting("edit", editing.write_lora))
    editing.edit(
        "lora-2", there / "space/pca.safetensors", label="hue", strength=1.0, output=tmp_path / "e.safetensors"
    )
    assert seen.pop("large") == {2}
    assert seen == {name: {1} for name in ("collect", "small", "vae", "noise", "drawn", "sample", "edit")}
    assert torch.get_num_threads() == 2
