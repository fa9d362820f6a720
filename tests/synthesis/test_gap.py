"""Losses of many LoRAs at once are those of each alone, fused by hand; the gap is what it says."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from little_base import Base, factors_of, little_base

from weightops.diffusion.dataset import Framing, read_examples
from weightops.diffusion.encoding import encode
from weightops.diffusion.models import networks
from weightops.diffusion.objectives import held_out_loss
from weightops.errors import MismatchError, UsageError, ValueRefused
from weightops.synthesis.gap import Gap, Losses, check_base, stacked_factors
from weightops.synthesis.layout import Layout, Module
from weightops.synthesis.own_images import OwnImages, list_images

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("diffusers")
torch.set_num_threads(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' schedulers
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

COUNTS = {"ada": 2, "bob": 3, "cleo": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return little_base(tmp_path_factory.getbasetemp() / "little-base")


@pytest.fixture(scope="module")
def folder(base: Base) -> Path:
    return base.images("unseen", COUNTS)


def own(base: Base, folder: Path, *, text: bool = False) -> OwnImages:
    return OwnImages(base.loaded, list_images(folder, list(COUNTS), option="--images"), keep_texts=not text)


def by_hand(
    base: Base, folder: Path, layout: Layout, factors: list[tuple[torch.Tensor, torch.Tensor]], which: int
) -> float:
    """The loss of weights that are changed in place, by what `weightops evaluate` measures with."""
    name = list(COUNTS)[which]
    parts = networks(base.loaded.pipe)
    before = []
    for module, (up, down) in zip(layout.modules, factors, strict=True):
        weight = parts[module.component].get_submodule(module.name.removeprefix("text_model.")).weight
        before.append((weight, weight.data))
        weight.data = weight.data + (up[which] @ down[which]).reshape(weight.shape)
    try:
        examples = read_examples(folder / name, where="test").examples
        encoded = encode(base.loaded, examples, Framing((64, 64), center_crop=True), cache_texts=False)
        mine = own(base, folder, text=True)
        return held_out_loss(base.loaded, mine.encoding, encoded, mine.objective, pairs=2, seed=3).mean
    finally:
        for weight, data in before:
            weight.data = data


@pytest.mark.parametrize("text", [False, True])
def test_the_losses_of_many_are_those_of_each_fused_alone(base: Base, folder: Path, text: bool) -> None:
    layout = base.layout(text=text)
    factors = factors_of(layout, 3, seed=1)
    with Losses(own(base, folder, text=text), layout, pairs=2, seed=3) as losses:
        found = losses.of(list(COUNTS), factors)
        plain = losses.of(list(COUNTS), None)
    expected = [by_hand(base, folder, layout, factors, which) for which in range(3)]
    assert np.allclose(found, expected, rtol=0, atol=2e-6)
    assert np.abs(found - plain).min() > 1e-3


def test_a_loss_does_not_depend_on_the_others_in_a_batch(base: Base, folder: Path) -> None:
    layout = base.layout()
    factors = factors_of(layout, 3, seed=2)
    images = own(base, folder)
    with Losses(images, layout, pairs=2) as losses, Losses(images, layout, pairs=2, batch=1) as one_by_one:
        together = losses.of(list(COUNTS), factors)
        alone = losses.of(["cleo"], [(up[2:], down[2:]) for up, down in factors])
        assert np.allclose(together[2:], alone, rtol=0, atol=1e-5)
        assert np.allclose(one_by_one.of(list(COUNTS), factors), together, rtol=0, atol=1e-5)


def test_the_model_is_as_before_when_losses_are_closed(base: Base, folder: Path) -> None:
    layout = base.layout()
    hooks = [len(module._forward_hooks) for module in base.loaded.pipe.unet.modules()]
    with Losses(own(base, folder), layout, pairs=1) as losses:
        first = losses.of(["ada"], None)
        losses.of(["ada"], factors_of(layout, 1, seed=3))
        assert np.array_equal(losses.of(["ada"], None), first)
    assert [len(module._forward_hooks) for module in base.loaded.pipe.unet.modules()] == hooks


def test_factors_of_unlike_ranks_come_as_a_list(base: Base, folder: Path) -> None:
    wide = factors_of(base.layout(rank=3), 1, seed=4)
    thin = factors_of(base.layout(rank=1), 1, seed=5)
    listed = [[(up[0], down[0]) for up, down in own_factors] for own_factors in (wide, thin)]
    stacked = stacked_factors(listed, 2)
    for (up, down), (a, b), (c, d) in zip(stacked, wide, thin, strict=True):
        assert torch.allclose(up @ down, torch.cat([a @ b, c @ d]), atol=1e-6)
    with Losses(own(base, folder), base.layout(rank=3), pairs=1) as losses:
        assert np.allclose(losses.of(["ada", "cleo"], listed)[0], losses.of(["ada"], wide)[0], atol=1e-6)
    with pytest.raises(ValueError, match="factors of 2 LoRAs, expected 3"):
        stacked_factors(listed, 3)


def test_the_gap_is_a_ratio_of_means() -> None:
    names = ("a", "b", "c")
    lost, trained, found = np.array([1.0, 2.0, 3.0]), np.array([0.5, 1.0, 3.0]), np.array([0.75, 1.5, 2.0])
    assert Gap(names, lost, trained, lost).value == 0
    assert Gap(names, lost, trained, trained).value == 1
    gap = Gap(names, lost, trained, found)
    assert gap.value == pytest.approx(1.75 / 1.5)
    assert gap.each[:2].tolist() == [0.5, 0.5]
    assert math.isnan(gap.each[2])  # its training gave nothing, and nothing can be a share of it


def test_the_error_of_a_gap_is_that_of_leaving_one_out() -> None:
    numbers = np.random.default_rng(0)
    lost = 1 + numbers.random(6)
    trained, found = lost - 0.3 - 0.1 * numbers.random(6), lost - 0.3 * numbers.random(6)
    names = tuple("abcdef")
    kept = [
        Gap(names[:-1], *(np.delete(losses, n) for losses in (lost, trained, found))).value for n in range(len(names))
    ]
    expected = math.sqrt(5 / 6 * sum((value - np.mean(kept)) ** 2 for value in kept))
    assert Gap(names, lost, trained, found).error == pytest.approx(expected)
    assert Gap(names[:1], lost[:1], trained[:1], found[:1]).error is None


def test_a_loss_that_is_no_number_is_refused(base: Base, folder: Path) -> None:
    layout = base.layout()
    factors = factors_of(layout, 1, seed=6)
    factors[-1][0][0, 0, 0] = math.inf
    with Losses(own(base, folder), layout, pairs=1) as losses, pytest.raises(ValueRefused, match="'bob' is no number"):
        losses.of(["bob"], factors)


def test_loras_of_another_base_are_refused(base: Base) -> None:
    other = Layout("sdxl", base.layout().modules)
    with pytest.raises(MismatchError, match=r"its LoRAs are of 'sdxl', and .* is 'sd15'"):
        check_base("space", other, base.loaded)
    strange = Layout("sd15", (Module("unet", "conv_in", (8, 8), 2),))
    with pytest.raises(MismatchError, match="in the model"):
        check_base("space", strange, base.loaded)


def test_a_lora_without_images_is_named(folder: Path) -> None:
    with pytest.raises(UsageError, match="has no folder of images for 1 of 2 LoRAs: 'dan'"):
        list_images(folder, ["ada", "dan"], option="--images")


def test_one_prompt_stands_for_captions_and_few_images_for_all(folder: Path) -> None:
    listed = list_images(folder, ["bob"], option="--few", prompt="a thing", limit=2)
    assert [example.caption for example in listed.examples["bob"]] == ["a thing"] * 2
    assert listed.digest(["bob"]) != list_images(folder, ["bob"], option="--few").digest(["bob"])
