"""A fitted space as a value and as a file: what comes back, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from made import low_dimensional, made_space
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from spaces import space_of

from weightops.errors import FormatError, MismatchError, OutputError, TruncatedError, UsageError, ValueRefused
from weightops.synthesis.fit import made_pca
from weightops.synthesis.fitted import Fitted, load_fitted
from weightops.synthesis.split import split
from weightops.synthesis.tensor_file import KEY
from weightops.synthesis.vae import made_vae

if TYPE_CHECKING:
    from pathlib import Path

    from weightops.synthesis.space import Space


def fitted_of(space: Space, components: int = 3, geometry: str = "rows") -> Fitted:
    return made_pca(space, *split(space, 0.2, 0), components=components, geometry=geometry)[0]


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Space:
    torch.set_num_threads(1)
    return space_of(tmp_path_factory.mktemp("fitted"), 15)


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory: pytest.TempPathFactory) -> Space:
    torch.set_num_threads(1)
    conditions = np.random.default_rng(0).standard_normal((30, 4))
    return made_space(tmp_path_factory.mktemp("made") / "space", low_dimensional(30, 40, 3), conditions=conditions)


def same(a: Fitted, b: Fitted) -> None:
    assert (a.kind, a.geometry, a.form, a.layout, a.space_digest, a.members) == (
        b.kind, b.geometry, b.form, b.layout, b.space_digest, b.members
    )  # fmt: skip
    assert (a.trained, a.trained_names, a.held_out, a.held_out_names) == (
        b.trained, b.trained_names, b.held_out, b.held_out_names
    )  # fmt: skip
    assert (a.seed, dict(a.settings), a.condition_names, a.condition_source) == (
        b.seed, dict(b.settings), b.condition_names, b.condition_source
    )  # fmt: skip
    assert torch.equal(a.latents, b.latents)
    for name in ("pca", "delta", "vae", "ridge", "nearest"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert one.settings() == other.settings()
            assert all(torch.equal(t, other.tensors()[key]) for key, t in one.tensors().items())


@pytest.mark.parametrize("geometry", ["rows", "delta"])
def test_all_of_it_comes_back_and_the_same_bytes_are_written(space: Space, geometry: str, tmp_path: Path) -> None:
    made = fitted_of(space, geometry=geometry)
    nbytes = made.save(tmp_path / "a.safetensors")
    assert nbytes == (tmp_path / "a.safetensors").stat().st_size
    found = load_fitted(tmp_path / "a.safetensors", space)
    same(made, found)
    assert found.label == str(tmp_path / "a.safetensors")
    found.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with pytest.raises(OutputError, match="exists"):
        found.save(tmp_path / "b.safetensors")
    found.save(tmp_path / "b.safetensors", force=True)


def test_baselines_come_with_conditions_and_come_back(conditioned: Space, space: Space, tmp_path: Path) -> None:
    made = fitted_of(conditioned)
    assert made.ridge is not None
    assert made.nearest is not None
    assert made.condition_names == ("c0", "c1", "c2", "c3")
    made.save(tmp_path / "a.safetensors")
    found = load_fitted(tmp_path / "a.safetensors")
    same(made, found)
    assert conditioned.conditions is not None
    asked = conditioned.conditions[:5]
    assert found.ridge is not None
    assert torch.equal(found.ridge.predict(asked), made.ridge.predict(asked))
    assert found.condition_mean == pytest.approx(conditioned.conditions[list(found.trained)].mean(0))
    assert found.condition_std == pytest.approx(conditioned.conditions[list(found.trained)].std(0))
    without = fitted_of(space)
    assert (without.ridge, without.nearest, without.condition_mean, without.condition_std) == (None,) * 4


def test_no_place_goes_into_the_file_and_the_space_brings_it_back(conditioned: Space, tmp_path: Path) -> None:
    source = {"kind": "images", "embedder": "/home/me/clip", "name": "clip", "digest": "xxh3_128:0"}
    space = replace(conditioned, condition_source=source)
    made = fitted_of(space)
    assert made.condition_source == source
    made.save(tmp_path / "a.safetensors")
    assert b"/home/me" not in (tmp_path / "a.safetensors").read_bytes()
    found = load_fitted(tmp_path / "a.safetensors")
    assert found.condition_source == {k: v for k, v in source.items() if k != "embedder"}
    assert found.with_space(space).condition_source == source
    other = replace(space, condition_source=source | {"digest": "xxh3_128:1"})
    assert found.with_space(other).condition_source == found.condition_source


def test_rows_there_and_back(space: Space) -> None:
    made = fitted_of(space, 5)
    rows = space.rows(list(made.trained))
    latents = made.latents_of(rows)
    assert torch.allclose(latents, made.latents, atol=1e-5)
    assert (made.size, made.components) == (5, 5)
    assert torch.allclose(made.latents_of(made.rows_of(latents)), latents, atol=1e-5)
    left = (rows - made.rows_of(latents)).square().sum() / (rows - rows.mean(0)).square().sum()
    assert float(made.explained[-1]) == pytest.approx(1 - float(left), abs=1e-5)
    assert torch.equal(space.layout.flatten(made.factors_of(latents)), made.rows_of(latents))
    assert [up.shape[-1] for up, _ in made.factors_of(latents[0], rank=1)] == [1] * 4
    asked = torch.zeros(5, requires_grad=True)
    sum(up.sum() for up, _ in made.factors_of(asked)).backward()  # type: ignore[union-attr]
    assert asked.grad is not None
    assert bool(asked.grad.any())


def test_changes_there_and_back(space: Space) -> None:
    """With as many components as there are, a trained member comes back whole, whatever its rows' gauge."""
    made = fitted_of(space, 11, "delta")
    rows = space.rows(list(made.trained))
    assert torch.allclose(made.latents_of(rows), made.latents, atol=1e-5)
    for (up, down), (wanted_up, wanted_down) in zip(
        made.factors_of(made.latents), space.layout.unflatten(rows), strict=True
    ):
        assert torch.allclose(up @ down, wanted_up @ wanted_down, atol=1e-5)
    assert torch.allclose(made.rows_of(made.latents), rows, atol=1e-4)
    assert made.rows_of(made.latents[0]).shape == (space.width,)


def test_the_geometry_of_changes_needs_its_space(space: Space, conditioned: Space, tmp_path: Path) -> None:
    made = fitted_of(space, geometry="delta")
    made.save(tmp_path / "a.safetensors")
    found = load_fitted(tmp_path / "a.safetensors")
    for ask in (lambda: found.factors_of(found.latents), lambda: found.latents_of(space.rows([0]))):
        with pytest.raises(UsageError, match=r"a\.safetensors: is learnt from ΔW, .* needs the space"):
            ask()
    with pytest.raises(MismatchError, match="was learnt from another space"):
        found.factors_of(found.latents, conditioned)
    assert torch.equal(found.latents_of(space.rows([0]), space), found.with_space(space).latents_of(space.rows([0])))


def test_an_autoencoder_has_its_place(space: Space, tmp_path: Path) -> None:
    made = fitted_of(space, 5)
    vae, _ = made_vae(made.latents, latents=2, layers="linear", steps=3)
    whole = replace(made, kind="vae", vae=vae, latents=vae.encode(made.latents))
    whole.save(tmp_path / "vae.safetensors")
    found = load_fitted(tmp_path / "vae.safetensors", space)
    same(whole, found)
    rows = space.rows([0, 1])
    assert torch.equal(found.latents_of(rows), vae.encode(made.latents_of(rows)))
    assert torch.equal(found.rows_of(found.latents[:2]), made.rows_of(vae.decode(whole.latents[:2])))


def test_a_space_that_has_grown_is_still_its_own(tmp_path: Path) -> None:
    rows = low_dimensional(20, 40, 3)
    before = made_space(tmp_path / "before", rows[:15])
    fitted_of(before).save(tmp_path / "a.safetensors")
    assert load_fitted(tmp_path / "a.safetensors", made_space(tmp_path / "grown", rows)).members == 15
    for name, other in (("fewer", rows[:14]), ("fp16", None)):
        wrong = made_space(
            tmp_path / name, rows[:15] if other is None else other, dtype="fp16" if other is None else "fp32"
        )
        with pytest.raises(MismatchError) as caught:
            load_fitted(tmp_path / "a.safetensors", wrong)
        assert caught.value.what.startswith(f"was learnt from another space than {wrong.folder}, of 15 LoRAs with the")
        assert caught.value.hint == "fit it again on this space"


# ------------------------------------------------------------------------------------------------ refusals


def changed(path: Path, tmp_path: Path, *, tensors: dict[str, torch.Tensor | None], said: dict[str, object]) -> str:
    """The same file, but for some tensors (None: gone), and for what it says."""
    with safe_open(path, "pt") as opened:
        metadata = dict(opened.metadata())
    held = {**load_file(path), **tensors}
    metadata[KEY] = json.dumps({**json.loads(metadata[KEY]), **said})
    save_file(
        {key: tensor for key, tensor in held.items() if tensor is not None}, tmp_path / "changed.safetensors", metadata
    )
    return str(tmp_path / "changed.safetensors")


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=r"x\.safetensors: is no fitted model of a space of LoRAs"):
        load_fitted(tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="no such file"):
        load_fitted(tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match="is a folder, expected a file"):
        load_fitted(tmp_path)


def test_a_cut_file_is_refused(space: Space, tmp_path: Path) -> None:
    fitted_of(space).save(tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    for size in (len(data) - 1, len(data) // 2, 100):
        (tmp_path / "cut.safetensors").write_bytes(data[:size])
        with pytest.raises((TruncatedError, FormatError), match=r"cut\.safetensors: "):
            load_fitted(tmp_path / "cut.safetensors")


def test_a_nan_is_refused_by_name(conditioned: Space, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    fitted_of(conditioned).save(path)
    for key in ("pca.basis", "latents", "ridge.weights"):
        tensor = load_file(path)[key]
        tensor.view(-1)[-1] = float("nan")
        with pytest.raises(ValueRefused, match=f"tensor '{key}' holds NaN or Inf"):
            load_fitted(changed(path, tmp_path, tensors={key: tensor}, said={}))


def test_what_does_not_fit_together_is_refused(space: Space, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    fitted_of(space).save(path)
    with pytest.raises(FormatError, match=r"is of the format 99, expected 1"):
        load_fitted(changed(path, tmp_path, tensors={}, said={"format": 99}))
    with pytest.raises(FormatError, match="is of the kind 'gan', expected pca, vae, diffusion"):
        load_fitted(changed(path, tmp_path, tensors={}, said={"kind": "gan"}))
    wrong: list[tuple[dict[str, torch.Tensor | None], dict[str, object]]] = [
        ({"pca.basis": None}, {}),
        ({"pca.basis": torch.zeros(3, 7)}, {}),
        ({"latents": torch.zeros(2, 3)}, {}),
        ({"trained": None}, {}),
        ({}, {"parts": {}}),
        ({}, {"parts": {"future": {}}}),
        ({}, {"kind": "vae"}),
        ({}, {"geometry": "delta"}),
    ]
    for tensors, said in wrong:
        with pytest.raises(FormatError, match="is no whole fitted model"):
            load_fitted(changed(path, tmp_path, tensors=tensors, said=said))
