"""Re-basin over two checkpoints: what was shuffled is brought back, in any spelling; nothing moves without a gain."""

from __future__ import annotations

import functools
import gzip
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import save
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "naming"))
import tiny
from shuffled import groups_of as groups_in
from shuffled import shuffled
from tagged import from_canonical

import weightops
from weightops.engine.run import ignore
from weightops.errors import MemoryRefused, MismatchError, UsageError, ValueRefused
from weightops.files.checkpoint import Checkpoint, open_checkpoint
from weightops.files.tensor import TensorInfo, TensorSpec
from weightops.merging.rebasin import Products, match
from weightops.naming.keymap import ARCHITECTURES
from weightops.ops import rebasin_groups
from weightops.ops.rebasin import Found, _Descent, find_permutations
from weightops.ops.rebasin_groups import groups_of, needed_nbytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

pytest.importorskip("scipy")

Weights = dict[str, dict[str, "Tensor"]]
ROOT = Path(__file__).parents[2]


@functools.cache
def weights_of(name: str) -> Weights:
    """The weights of a tiny pipeline by component, all of them random, in half precision."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        pipe = tiny.pipeline(name, Path(folder))
    torch.manual_seed(1)
    found = {}
    for component in ARCHITECTURES.get(name).components:
        tensors = tiny.canonical(getattr(pipe, component.name))
        found[component.name] = {key: (t + 0.05 * torch.randn(t.shape)).half() for key, t in tensors.items()}
    return found


def networks(name: str) -> dict[str, str]:
    return {component.name: component.network for component in ARCHITECTURES.get(name).components}


@functools.cache
def moved(name: str) -> Weights:
    return {c: shuffled(network, weights_of(name)[c], seed=7) for c, network in networks(name).items()}


def noisy(weights: Weights, share: float) -> Weights:
    torch.manual_seed(2)
    return {c: {k: t * (1 + share * torch.randn(t.shape)).half() for k, t in ts.items()} for c, ts in weights.items()}


def only(weights: Weights, *components: str) -> Weights:
    return {c: weights[c] for c in components}


def original(name: str, weights: Weights) -> dict[str, Tensor]:
    """As LDM and SGM spell a whole checkpoint: queries, keys and values packed, convolutions for matrices."""
    found: dict[str, Tensor] = {}
    for c in ARCHITECTURES.get(name).components:
        if c.name in weights:
            written = from_canonical(c.network, c.spelling, weights[c.name])
            found |= {c.prefix + key: t.contiguous() for key, t in written.items()}
    return found


def diffusers(name: str, weights: Weights) -> dict[str, Tensor]:
    return {f"{c}.{key}": tensor.contiguous() for c, tensors in weights.items() for key, tensor in tensors.items()}


def find(model: Path, reference: Path, **words: Any) -> Found:
    words = {"iterations": 10, "seed": 0, "memory": None, "threads": 2, "device": "cpu", "on_progress": ignore} | words
    with open_checkpoint(model) as a, open_checkpoint(reference) as b:
        return find_permutations(a, b, **words)


def applied(weights: Weights, found: Found) -> Weights:
    made: Weights = {}
    for component, tensors in weights.items():
        made[component] = {}
        for name, tensor in tensors.items():
            result = tensor
            for axis, order in found.permutations.get((component, name), ()):
                result = result.index_select(axis, torch.from_numpy(order))
            made[component][name] = result
    return made


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for component, tensors in found.items():
        assert tensors.keys() == expected[component].keys()
        assert not [k for k, t in tensors.items() if not torch.equal(t, expected[component][k])]


def same(a: Found, b: Found) -> bool:
    if a.permutations.keys() != b.permutations.keys():
        return False
    pairs = zip(a.permutations.values(), (b.permutations[key] for key in a.permutations), strict=True)
    return all(
        x[0] == y[0] and np.array_equal(x[1], y[1]) for p, q in pairs for x, y in zip(p, q, strict=True)
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ what was shuffled


@pytest.mark.parametrize(("name", "spell"), [("sd15", diffusers), ("sdxl", original)])
def test_a_shuffled_model_is_brought_back_bit_by_bit(name: str, spell: Any, tmp_path: Path) -> None:
    reference = save(tmp_path / "a.safetensors", original(name, weights_of(name)))
    model = save(tmp_path / "b.safetensors", spell(name, moved(name)))
    found = find(model, reference)
    assert not found.left
    assert_same(applied(moved(name), found), weights_of(name))
    assert {c for c, _ in found.moved} == set(networks(name))
    assert all(count > 1 for count in found.moved.values())
    assert all(n <= found.channels[key] for key, n in found.moved.items())
    assert max(found.before.values()) < 0.99
    assert min(found.after.values()) == pytest.approx(1.0, abs=1e-6)


def test_noise_does_not_hide_the_order(tmp_path: Path) -> None:
    """A tenth of every weight is more than what most finetunes change."""
    both, shuffled = (only(weights, "unet", "text_encoder") for weights in (weights_of("sd15"), moved("sd15")))
    reference = save(tmp_path / "a.safetensors", original("sd15", both))
    noise = {**noisy(only(shuffled, "unet"), 0.1), **noisy(only(shuffled, "text_encoder"), 1e-3)}
    found = find(save(tmp_path / "b.safetensors", diffusers("sd15", noise)), reference)
    assert_same(applied(shuffled, found), both)


@pytest.fixture(scope="module")
def unets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A shuffled UNet, and as it was."""
    folder = tmp_path_factory.mktemp("unets")
    reference = save(folder / "a.safetensors", original("sd15", only(weights_of("sd15"), "unet")))
    return save(folder / "b.safetensors", original("sd15", only(moved("sd15"), "unet"))), reference


@pytest.fixture(scope="module")
def brought_back(unets: tuple[Path, Path]) -> tuple[Found, list[tuple[int, int]]]:
    """What is found of them, and the progress that was shown."""
    shown: list[tuple[int, int]] = []
    return find(*unets, on_progress=lambda done, total: shown.append((done, total))), shown


Brought = tuple[Found, list[tuple[int, int]]]


def test_what_is_found_depends_neither_on_memory_nor_on_threads(
    unets: tuple[Path, Path], brought_back: Brought
) -> None:
    assert same(brought_back[0], find(*unets, memory=needed(*unets), threads=1))


def needed(model: Path, reference: Path) -> int:
    with open_checkpoint(model) as a, open_checkpoint(reference) as b:
        return needed_nbytes(groups_of(a, b)[0])[0]


def test_groups_that_are_read_in_parts_are_solved_alike(
    unets: tuple[Path, Path], brought_back: Brought, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebasin_groups, "_WHOLE", 1 << 15)
    monkeypatch.setattr(rebasin_groups, "_PART", 1 << 14)
    with open_checkpoint(unets[0]) as a, open_checkpoint(unets[1]) as b:
        parts = [len(rebasin_groups.parts_of(group.terms)) for group in groups_of(a, b)[0]]
    assert 1 in parts
    assert max(parts) > 4
    assert same(brought_back[0], find(*unets, memory=needed(*unets)))


def test_memory_that_is_too_little_is_refused_before_anything_is_read(unets: tuple[Path, Path]) -> None:
    least = needed(*unets)
    with pytest.raises(MemoryRefused) as caught:
        find(*unets, memory=least - 1)
    assert f"{least - 1:,} bytes are too few" in str(caught.value)
    assert caught.value.hint == f"--memory {-(-least // (1 << 20))}MiB would do"


def test_the_seed_decides_the_order_of_the_work_alone(unets: tuple[Path, Path], brought_back: Brought) -> None:
    assert same(brought_back[0], find(*unets, seed=1))


def test_progress_never_goes_back_and_ends_whole(brought_back: Brought) -> None:
    shown = brought_back[1]
    assert shown == sorted(shown)
    assert shown[-1][0] == shown[-1][1]
    assert len(shown) > 3


# ------------------------------------------------------------------------------------------------ what stays


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_model_and_its_finetune_lie_alike_and_one_sweep_tells(share: float, tmp_path: Path) -> None:
    both = only(weights_of("sd15"), "unet", "text_encoder")
    reference = save(tmp_path / "a.safetensors", original("sd15", both))
    model = save(tmp_path / "b.safetensors", diffusers("sd15", noisy(both, share)))
    found = find(model, reference)
    assert found.sweeps == 1
    assert not found.permutations
    assert set(found.moved.values()) == {0}
    assert found.before == pytest.approx(found.after)


def test_models_that_know_nothing_of_each_other_are_more_alike_after(tmp_path: Path) -> None:
    torch.manual_seed(9)
    strange = {"unet": {k: torch.randn(t.shape).half() for k, t in weights_of("sd15")["unet"].items()}}
    reference = save(tmp_path / "a.safetensors", original("sd15", only(weights_of("sd15"), "unet")))
    model = save(tmp_path / "b.safetensors", original("sd15", strange))
    found = find(model, reference, iterations=3)
    assert 1 < found.sweeps <= 3
    assert all(abs(b) < 0.3 for b in found.before.values())
    assert sum(found.after.values()) > sum(found.before.values())
    # A move is a member of the group: every order holds every channel once.
    for orders in found.permutations.values():
        assert all(np.array_equal(np.sort(order), np.arange(len(order))) for _, order in orders)


def test_in_the_end_no_group_alone_could_be_more_alike(tmp_path: Path) -> None:
    """Of models that have half of their weights in common, so that what one group gains others can lose."""
    both = only(weights_of("sd15"), "unet")
    torch.manual_seed(4)
    half = {k: t if torch.rand(()) < 0.5 else torch.randn(t.shape).half() for k, t in moved("sd15")["unet"].items()}
    reference = save(tmp_path / "a.safetensors", original("sd15", both))
    model = save(tmp_path / "b.safetensors", original("sd15", {"unet": half}))
    found = find(model, reference, iterations=50)
    assert found.sweeps < 50
    a, b = both["unet"], applied({"unet": half}, found)["unet"]
    for group in groups_in("sd15_unet", a):
        lanes = [Products.zeros(size, "cpu") for size in group.sizes]
        for lane, axes in zip(lanes, group.lanes, strict=True):
            for axis in axes:
                lane.add(a[axis.name], b[axis.name], axis.axis, axis.copies, None)
        now = [np.arange(size) for size in group.sizes]
        assert [o.tolist() for o in match(lanes, now, group.blocks)] == [o.tolist() for o in now], group.name


def test_where_all_together_would_be_less_alike_everything_goes_back(unets: tuple[Path, Path]) -> None:
    _, reference = unets
    with open_checkpoint(reference) as one, open_checkpoint(reference) as other:
        groups, _ = groups_of(one, other)
        work = _Descent(one, other, groups, 0, 1 << 30, 2, "cpu")
        before = work.measure(work.tensors, ignore)
        first = groups[0]
        first.orders = (np.roll(first.orders[0], 1),)
        assert {name for name, _ in work.permutations()} == {"unet"}
        assert work.keep_gains(before, ignore) == before
        assert not work.permutations()


def test_a_part_that_only_one_file_has_is_left_alone(tmp_path: Path) -> None:
    reference = save(tmp_path / "a.safetensors", original("sd15", weights_of("sd15")))
    model = save(tmp_path / "b.safetensors", original("sd15", only(moved("sd15"), "unet")))
    found = find(model, reference)
    assert {component for component, _ in found.moved} == {"unet"}
    assert_same(applied(only(moved("sd15"), "unet"), found), only(weights_of("sd15"), "unet"))


def edited(weights: Mapping[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    found = {**weights, **{key: t for key, t in changes.items() if t is not None}}
    return {key: t for key, t in found.items() if changes.get(key, t) is not None}


BLOCK = "model.diffusion_model.input_blocks.1"


def test_a_group_that_differs_in_shape_is_left_with_its_reason(unets: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = original("sd15", only(moved("sd15"), "unet"))
    ff = "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net"
    wider = {f"{ff}.0.proj.weight": (520, 64), f"{ff}.0.proj.bias": (520,), f"{ff}.2.weight": (64, 260)}
    model = save(tmp_path / "c.safetensors", edited(tensors, **{k: torch.zeros(s).half() for k, s in wider.items()}))
    found = find(model, unets[1])
    name = "mid_block.attentions.0.transformer_blocks.0.ff"
    # The channels between its blocks lie in the same tensors.
    assert set(found.left) == {("unet", name), ("unet", "mid_block.attentions.0")}
    assert found.left["unet", name] == (
        f"{name}.net.0.proj.weight is F16 [520, 64], and F16 [512, 64] in the reference"
    )
    assert found.moved["unet", "mid_block.attentions.0.transformer_blocks.0.attn2"] > 0


def test_what_is_no_part_of_a_network_may_know_its_channels(tmp_path: Path) -> None:
    tensors = original("sd15", moved("sd15")) | {f"{BLOCK}.1.adapter.weight": torch.zeros(4, 32).half()}
    whole = save(tmp_path / "a.safetensors", original("sd15", weights_of("sd15")))
    found = find(save(tmp_path / "c.safetensors", tensors), whole)
    assert set(found.left) == {("unet", "")}
    assert "may know its channels: 'input_blocks.1.1.adapter.weight'" in found.left["unet", ""]
    assert "unet" not in {component for component, _ in found.moved}


# ------------------------------------------------------------------------------------------------ refusals


def test_codes_with_scales_are_no_numbers_to_compare(unets: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = original("sd15", only(moved("sd15"), "unet")) | {f"{BLOCK}.scale_weight": torch.ones(())}
    with pytest.raises(MismatchError) as caught:
        find(save(tmp_path / "c.safetensors", tensors), unets[1])
    assert "has no channels that could be brought into the order of" in str(caught.value)
    assert "scales weights that mean nothing without it" in str(caught.value.hint)


def test_a_network_without_a_table_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path / "a.safetensors", {"some.weight": torch.ones(2, 2)})
    with pytest.raises(MismatchError, match="has no channels") as caught:
        find(file, file)
    assert caught.value.hint == "the networks of Stable Diffusion 1 and XL have such channels"


@pytest.mark.parametrize("number", [0, 1])
def test_nan_is_like_nothing(number: int, unets: tuple[Path, Path], tmp_path: Path) -> None:
    key = f"{BLOCK}.0.in_layers.2.bias"
    tensors = original("sd15", only(moved("sd15"), "unet"))
    bad = save(tmp_path / "bad.safetensors", edited(tensors, **{key: torch.full_like(tensors[key], float("nan"))}))
    files = [*unets]
    files[number] = bad
    with pytest.raises(ValueRefused) as caught:
        find(*files)
    assert str(caught.value) == (
        f"{bad}: tensor 'down_blocks.0.resnets.0.conv1.bias' holds NaN or Inf, and is like no other"
    )


def test_no_sweep_at_all_is_refused(unets: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="found 0 iterations, expected one or more"):
        find(*unets, iterations=0)


def test_without_scipy_nothing_begins(unets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UsageError, match="needs scipy"):
        find(*unets)


# ------------------------------------------------------------------------------------------------ real sizes


@pytest.mark.parametrize("dtype", ["F16", "F32"])
@pytest.mark.parametrize(
    ("file", "count"),
    [("weightops/cli/sd15.json.gz", 88 + 26 + 2 * 12), ("fixtures/headers/sdxl.json.gz", 241 + 26 + 2 * (12 + 32))],
)
def test_the_default_memory_does_for_every_group_of_the_real_models(file: str, count: int, dtype: str) -> None:
    with gzip.open(ROOT / file) as f:
        header = json.load(f)
    tensors = {k: TensorInfo(TensorSpec(dtype, tuple(shape)), 0, 0, 0) for k, (_, shape) in header.items()}
    whole = Checkpoint(file, "safetensors", [], tensors)
    groups, left = groups_of(whole, whole)
    assert not left
    assert len(groups) == count
    assert needed_nbytes(groups)[0] <= 512 << 20


# ------------------------------------------------------------------------------------------------ merging


def test_a_merge_with_a_rebased_model_is_the_merge_with_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that were matched channel by channel are merged as if nobody had moved them."""
    monkeypatch.chdir(tmp_path)
    mine = only(weights_of("sd15"), "unet", "text_encoder")
    other = noisy(mine, 0.05)
    apart = {c: shuffled(networks("sd15")[c], other[c], seed=7) for c in other}
    for file, weights in (("a", mine), ("b", other), ("moved", apart)):
        save(Path(f"{file}.safetensors"), original("sd15", weights))
    words: dict[str, Any] = {"alpha": 0.3, "force": True}
    weightops.merge("a.safetensors", "b.safetensors", output="plain.safetensors", **words)
    report = weightops.merge("a.safetensors", "moved.safetensors", output="out.safetensors", rebasin=True, verify=True,
                             **words)  # fmt: skip
    found, plain = load_file("out.safetensors"), load_file("plain.safetensors")
    assert [key for key in plain if not torch.equal(found[key], plain[key])] == []
    told = report.details["rebasin"][0]
    assert told["moved"] > 0.5 * told["channels"]
    assert told["after"] > 0.99 > told["before"]
    assert "channels of moved.safetensors moved" in report.details["line"]
    weightops.merge("a.safetensors", "moved.safetensors", output="apart.safetensors", **words)
    worse = load_file("apart.safetensors")
    assert any(not torch.equal(worse[key], plain[key]) for key in plain)


def test_differences_from_a_base_are_taken_in_one_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = only(weights_of("sd15"), "text_encoder")
    b, c = noisy(text, 0.05), noisy(text, 0.02)
    network = networks("sd15")["text_encoder"]
    for file, weights in (("a", text), ("b", b), ("c", c)):
        save(Path(f"{file}.safetensors"), weights["text_encoder"])
    for file, weights, seed in (("b2", b, 3), ("c2", c, 4)):
        save(Path(f"{file}.safetensors"), shuffled(network, weights["text_encoder"], seed=seed))
    words: dict[str, Any] = {"method": "ties", "parameters": {"density": 0.5}}
    weightops.merge("a.safetensors", "b.safetensors", base="c.safetensors", output="plain.safetensors", **words)
    weightops.merge("a.safetensors", "b2.safetensors", base="c2.safetensors", rebasin=True, output="out.safetensors",
                    **words)  # fmt: skip
    found, plain = load_file("out.safetensors"), load_file("plain.safetensors")
    assert [key for key in plain if not torch.equal(found[key], plain[key])] == []
