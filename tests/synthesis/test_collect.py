"""collect: LoRAs of any family and dialect become the same rows, and whatever happens nothing that stands is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from spaces import factors_of, family_of, layout_of, space_of, write_family

from weightops.errors import (
    FormatError,
    Interrupted,
    MismatchError,
    OutputError,
    UsageError,
    ValueRefused,
    WeightopsError,
)
from weightops.synthesis.collect import collect
from weightops.synthesis.collection import Collection
from weightops.synthesis.fit import fit_pca
from weightops.synthesis.lora_file import write_lora
from weightops.synthesis.members import read_factors
from weightops.synthesis.space import open_space, unfinished

DIALECTS = ("kohya", "diffusers", "peft", "comfy", "onetrainer")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(
        (torch.linalg.vector_norm(a.double() - b.double(), dim=-1) / torch.linalg.vector_norm(b, dim=-1)).max()
    )


def changes(factors: Any) -> torch.Tensor:
    return torch.cat([(up.double() @ down.double()).flatten(-2) for up, down in factors], -1)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)


# ------------------------------------------------------------------------------------------------ the rows


@pytest.mark.parametrize("form", ["aligned", "svd", "raw"])
def test_changes_are_those_of_the_files(tmp_path: Path, form: str) -> None:
    found = space_of(tmp_path, 8, form=form)
    members = family_of(found.layout, 8)
    rows = found.rows([found.position(f"lora-{n}") for n in range(8)])
    for number, factors in enumerate(members):
        made = changes(found.layout.unflatten(rows[number]))
        assert off(made, changes(factors)) < 1e-6
        assert found.norms[found.position(f"lora-{number}")] == pytest.approx(float(changes(factors).norm()), rel=1e-6)
    assert found.form == form


@pytest.mark.parametrize(("dtype", "most"), [("fp32", 1e-6), ("fp16", 2e-3), ("bf16", 2e-2)])
def test_rows_lie_in_the_file_as_numpy_maps_them(tmp_path: Path, dtype: str, most: float) -> None:
    found = space_of(tmp_path, 5, dtype=dtype)
    report = collect(tmp_path / "loras", output=tmp_path / "again", dtype=dtype)
    assert report.error is not None
    assert report.error < most
    rows = found.rows(range(5))
    kinds = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}
    mapped = np.memmap(found.path, kinds[dtype], mode="r").reshape(5, found.width)
    if dtype == "bf16":
        assert np.array_equal(mapped.astype(np.uint32) << 16, rows.numpy().view(np.uint32))
    else:
        assert np.array_equal(mapped.astype(np.float32), rows.numpy())
    exact = torch.stack([found.canonical(f) for f in family_of(found.layout, 5)])
    assert off(changes(found.layout.unflatten(rows)), changes(found.layout.unflatten(exact))) < most


def test_blocks_of_any_size_and_order_are_the_same_rows(tmp_path: Path) -> None:
    found = space_of(tmp_path, 7)
    order = [5, 6, 0, 3, 2, 1]
    rows = found.rows(order)
    for nbytes in (1, 4 * found.width, 9 * found.width, 1 << 20):
        parts = list(found.blocks(order, nbytes))
        assert torch.equal(torch.cat([part for _, part in parts]), rows)
        assert [w.start for w, _ in parts] == list(range(0, 6, parts[0][1].shape[0]))


def test_all_dialects_become_the_same_rows(tmp_path: Path) -> None:
    layout = layout_of(2, text=True)
    members = family_of(layout, 4)
    spaces = {}
    for dialect in DIALECTS:
        write_family(tmp_path / dialect, layout, members, dialect=dialect)
        collect(tmp_path / dialect, output=tmp_path / f"{dialect}-space", architecture="sd15")
        spaces[dialect] = open_space(tmp_path / f"{dialect}-space")
    for found in spaces.values():
        assert {m.key for m in found.layout.modules} == {m.key for m in layout.modules}
        assert off(found.rows(range(4)), spaces["kohya"].rows(range(4))) < 1e-6


def test_other_families_with_an_exact_product_are_taken(tmp_path: Path) -> None:
    """LoHa and LoKr, as what they add, and a strength other than 1."""
    drawn = torch.Generator().manual_seed(3)

    def some(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(*shape, generator=drawn)

    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    expected = {}
    for number in range(2):
        w = [some(16, 2), some(2, 16), some(16, 2), some(2, 16)]
        keys = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        file = tmp_path / "in" / f"loha-{number}.safetensors"
        file.parent.mkdir(exist_ok=True)
        write_tensors(
            file, {f"{name}.{k}": t for k, t in zip(keys, w, strict=True)} | {f"{name}.alpha": torch.tensor(1.0)}
        )
        expected[file.stem] = 0.5 * (w[0] @ w[1]) * (w[2] @ w[3])
    up, down = some(16, 4), some(4, 16)
    write_tensors(
        tmp_path / "in" / "plain.safetensors",
        {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(2.0)},
    )
    expected["plain"] = 0.5 * up @ down
    collect(tmp_path / "in", output=tmp_path / "space", architecture="sd15")
    found = open_space(tmp_path / "space")
    assert found.layout.modules[0].rank == 4
    for number, (member, rows) in enumerate(zip(found.names, found.rows(range(3)), strict=True)):
        assert off(changes(found.layout.unflatten(rows)), expected[member].flatten()) < 1e-6, number


def test_a_random_gauge_of_the_files_makes_the_same_rows(tmp_path: Path) -> None:
    layout = layout_of(2)
    members = family_of(layout, 6)
    drawn = torch.Generator().manual_seed(1)
    others = []
    for factors in members:
        gauge = [torch.randn(2, 2, generator=drawn, dtype=torch.float64) + 2 * torch.eye(2) for _ in factors]
        others.append([(u @ g, torch.linalg.inv(g) @ d) for (u, d), g in zip(factors, gauge, strict=True)])
    for name, made in (("a", members), ("b", others)):
        write_family(tmp_path / name, layout, made)
        collect(tmp_path / name, output=tmp_path / f"{name}-space")
    a, b = open_space(tmp_path / "a-space"), open_space(tmp_path / "b-space")
    assert off(b.rows(range(6)), a.rows(range(6))) < 1e-5


def test_the_same_work_makes_the_same_bytes(tmp_path: Path) -> None:
    space_of(tmp_path, 5)
    collect(tmp_path / "loras", output=tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "space")


def test_members_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    assert space_of(tmp_path, 12).names == tuple(f"lora-{n}" for n in range(12))


# ------------------------------------------------------------------------------------------------ adding


def test_more_are_added_behind_and_fall_into_the_same_place(tmp_path: Path) -> None:
    before = space_of(tmp_path, 6)
    rows, reference = before.rows(range(6)), before.reference
    write_family(tmp_path / "more", before.layout, family_of(before.layout, 9)[6:], start=6)
    report = collect(tmp_path / "loras", tmp_path / "more", output=tmp_path / "space")
    assert (report.added, report.there, report.members) == (3, 6, 9)
    after = open_space(tmp_path / "space")
    assert after.names == tuple(f"lora-{n}" for n in range(9))
    assert torch.equal(after.rows(range(6)), rows)
    assert reference is not None
    assert after.reference is not None
    assert torch.equal(after.reference, reference)
    for number, factors in enumerate(family_of(before.layout, 9)[6:], 6):
        assert off(after.rows([number])[0], before.canonical(factors)) < 1e-6
    assert after.digest != before.digest
    assert after.digest_of(6) == before.digest


def test_another_file_of_a_members_name_is_refused(tmp_path: Path) -> None:
    found = space_of(tmp_path, 3)
    write_family(tmp_path / "other", found.layout, [factors_of(found.layout, 77)])
    before = files_of(tmp_path / "space")
    with pytest.raises(MismatchError, match="is not the LoRA that the space has under the name 'lora-0'"):
        collect(tmp_path / "other", output=tmp_path / "space")
    assert open_space(tmp_path / "space").digest == found.digest
    assert {k: v for k, v in files_of(tmp_path / "space").items() if k in before and k != "collecting.json"} == before


def test_force_begins_anew_and_only_in_place_of_a_space(tmp_path: Path) -> None:
    found = space_of(tmp_path, 3)
    write_family(tmp_path / "other", found.layout, family_of(found.layout, 4, seed=5))
    collect(tmp_path / "other", output=tmp_path / "space", force=True)
    assert len(open_space(tmp_path / "space")) == 4
    with pytest.raises(OutputError, match=r"is no space of LoRAs: it holds 'lora-0\.safetensors'"):
        collect(tmp_path / "other", output=tmp_path / "loras", force=True)


def test_force_takes_fitted_models_along_and_refuses_what_else_lies_there(tmp_path: Path) -> None:
    space_of(tmp_path, 4)
    fit_pca(tmp_path / "space", components=2)
    collect(tmp_path / "loras", output=tmp_path / "space", force=True)
    assert not (tmp_path / "space/pca.safetensors").exists()
    kept = shutil.copy(tmp_path / "loras/lora-0.safetensors", tmp_path / "space/mine.safetensors")
    with pytest.raises(OutputError, match=r"what is not the space's, and would be lost: 'mine\.safetensors'"):
        collect(tmp_path / "loras", output=tmp_path / "space", force=True)
    assert Path(kept).read_bytes() == (tmp_path / "loras/lora-0.safetensors").read_bytes()


def test_the_folder_one_is_in_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space_of(tmp_path, 3)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UsageError, match="is no name that a new folder could have"):
        collect(tmp_path / "loras", output=".")
    monkeypatch.chdir(tmp_path / "space")
    assert collect(tmp_path / "loras", output=".").there == 3


def test_another_strength_of_the_same_tensors_is_another_lora(tmp_path: Path) -> None:
    found = space_of(tmp_path, 3)
    member = family_of(found.layout, 3)[0]
    one = tmp_path / "one" / "lora-0.safetensors"
    write_family(one.parent, found.layout, [member])
    assert collect(one, output=tmp_path / "space").there == 1
    with safe_open(one, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    write_tensors(one, {key: 2 * t if key.endswith(".alpha") else t for key, t in tensors.items()})
    with pytest.raises(MismatchError, match="is not the LoRA that the space has under the name 'lora-0'"):
        collect(one, output=tmp_path / "space")


def test_a_lora_without_a_module_does_not_decide_where_the_mean_begins(tmp_path: Path) -> None:
    layout = layout_of(2)
    members = family_of(layout, 6)
    members[0][1] = (torch.zeros_like(members[0][1][0]), torch.zeros_like(members[0][1][1]))
    drawn = torch.Generator().manual_seed(3)
    gauges = [torch.linalg.qr(torch.randn(2, 2, generator=drawn, dtype=torch.float64))[0] for _ in members]
    turned = [[(up @ g, g.mT @ down) for up, down in one] for one, g in zip(members, gauges, strict=True)]
    for name, family in (("a", members), ("b", turned)):
        write_family(tmp_path / name, layout, family)
        collect(tmp_path / name, output=tmp_path / f"space-{name}")
    first, second = (open_space(tmp_path / f"space-{name}") for name in "ab")
    assert off(first.rows(range(6)), second.rows(range(6))) < 1e-4


# ------------------------------------------------------------------------------------------------ at once


def test_rows_of_another_run_are_not_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = space_of(tmp_path, 4)
    members = family_of(found.layout, 8)
    write_family(tmp_path / "mine", found.layout, members[4:6], start=4)
    write_family(tmp_path / "theirs", found.layout, members[6:], start=6)
    real = Collection.held

    def held(self: Collection) -> Any:
        monkeypatch.setattr(Collection, "held", real)
        collect(tmp_path / "theirs", output=tmp_path / "space")
        return real(self)

    monkeypatch.setattr(Collection, "held", held)
    with pytest.raises(OutputError, match="another run has added to it meanwhile"):
        collect(tmp_path / "mine", output=tmp_path / "space")
    assert open_space(tmp_path / "space").names[4:] == ("lora-6", "lora-7")
    collect(tmp_path / "mine", output=tmp_path / "space")
    assert open_space(tmp_path / "space").names[4:] == ("lora-6", "lora-7", "lora-4", "lora-5")


def test_a_space_that_came_meanwhile_stays_and_the_work_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space_of(tmp_path, 4)
    there = files_of(tmp_path / "space")
    real = Collection.finish

    def finish(self: Collection, *words: Any, **more: Any) -> Any:
        shutil.copytree(tmp_path / "space", tmp_path / "new")
        return real(self, *words, **more)

    monkeypatch.setattr(Collection, "finish", finish)
    with pytest.raises(OutputError, match="new: exists"):
        collect(tmp_path / "loras", output=tmp_path / "new", form="svd")
    assert files_of(tmp_path / "new") == there
    monkeypatch.setattr(Collection, "finish", real)
    shutil.rmtree(tmp_path / "new")
    assert collect(tmp_path / "loras", output=tmp_path / "new", form="svd").taken_up == 4


# ------------------------------------------------------------------------------------------------ interrupted


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("appended", [False, True])
def test_what_is_interrupted_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, appended: bool
) -> None:
    layout = layout_of(2)
    members = family_of(layout, 9)
    write_family(tmp_path / "first", layout, members[:4])
    write_family(tmp_path / "then", layout, members[4:], start=4)
    asked = [tmp_path / "first", tmp_path / "then"]
    for name in ("whole", "space"):
        if appended:
            collect(asked[0], output=tmp_path / name)
    monkeypatch.setattr("weightops.synthesis.collect_rows._BATCH_NBYTES", 8 * layout.width)
    if not appended:
        collect(*asked, output=tmp_path / "whole")
    else:
        collect(*asked, output=tmp_path / "whole")
    real, count = Collection.add, [0]

    def add(self: Collection, *words: Any) -> Any:
        if count[0] == at:
            raise Interrupted("", "stopped")
        count[0] += 1
        return real(self, *words)

    monkeypatch.setattr(Collection, "add", add)
    with pytest.raises(
        Interrupted, match=rf"interrupted: {at} of 9 LoRAs are in, and no input was changed|interrupted: {at} of 5"
    ):
        collect(*asked, output=tmp_path / "space")
    monkeypatch.setattr(Collection, "add", real)
    if appended:
        assert len(open_space(tmp_path / "space")) == 4
    else:
        with pytest.raises(UsageError, match="no such folder"):
            open_space(tmp_path / "space")
    report = collect(*asked, output=tmp_path / "space")
    assert report.taken_up == at
    assert files_of(tmp_path / "space") == files_of(tmp_path / "whole")
    assert not unfinished(tmp_path / "space").exists()


def test_a_half_written_row_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = space_of(tmp_path, 4)
    whole = files_of(tmp_path / "space")
    real = Collection.finish
    monkeypatch.setattr(Collection, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted):
        collect(tmp_path / "loras", output=tmp_path / "again")
    work = unfinished(tmp_path / "again")
    rows = work / found.path.name
    rows.write_bytes(rows.read_bytes()[: 3 * 4 * found.width - 7])
    lines = (work / "members.jsonl").read_text()
    (work / "members.jsonl").write_text(lines[:-9])
    monkeypatch.setattr(Collection, "finish", real)
    assert collect(tmp_path / "loras", output=tmp_path / "again").taken_up == 2
    assert files_of(tmp_path / "again") == whole


@pytest.mark.parametrize("mended", [False, True])
def test_what_is_refused_late_goes_on_when_it_is_mended_or_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mended: bool
) -> None:
    layout = layout_of(2)
    files = write_family(tmp_path / "loras", layout, family_of(layout, 6))
    whole = files[4].read_bytes()
    files[4].write_bytes(whole[:-4] + np.float32(np.nan).tobytes())
    monkeypatch.setattr("weightops.synthesis.collect_rows._BATCH_NBYTES", 8 * layout.width)
    # The reference is made of the first alone.
    monkeypatch.setattr("weightops.synthesis.collect_rows._REFERENCE_NBYTES", 1)
    with pytest.raises(ValueRefused, match="lora-4") as caught:
        collect(tmp_path / "loras", output=tmp_path / "space")
    assert "4 LoRAs before it are in" in str(caught.value.hint)
    if mended:
        files[4].write_bytes(whole)
    else:
        files[4].unlink()
    report = collect(tmp_path / "loras", output=tmp_path / "space")
    assert report.taken_up == 4
    found = open_space(tmp_path / "space")
    assert found.names == tuple(f"lora-{n}" for n in range(6) if mended or n != 4)
    for name, row in zip(found.names, found.rows(range(len(found))), strict=True):
        assert off(row, found.canonical(family_of(layout, 6)[int(name[-1])])) < 1e-6


def test_a_file_that_was_changed_after_its_row_was_written_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(2)
    files = write_family(tmp_path / "loras", layout, family_of(layout, 4))
    real = Collection.finish
    monkeypatch.setattr(Collection, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted):
        collect(tmp_path / "loras", output=tmp_path / "space")
    monkeypatch.setattr(Collection, "finish", real)
    other = factors_of(layout, 99)
    write_lora(files[1], layout, other, recipe={"command": "test", "inputs": []}, force=True)
    assert collect(tmp_path / "loras", output=tmp_path / "space").taken_up == 0
    found = open_space(tmp_path / "space")
    assert off(found.rows([1])[0], found.canonical(other)) < 1e-6


def test_other_words_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space_of(tmp_path, 4)
    real = Collection.finish
    monkeypatch.setattr(Collection, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted):
        collect(tmp_path / "loras", output=tmp_path / "again", form="svd")
    monkeypatch.setattr(Collection, "finish", real)
    assert collect(tmp_path / "loras", output=tmp_path / "again").taken_up == 0
    assert files_of(tmp_path / "again") == files_of(tmp_path / "space")


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    layout = layout_of(2)
    write_family(tmp_path / "loras", layout, family_of(layout, 3))
    report = collect(tmp_path / "loras", output=tmp_path / "space", dry_run=True)
    assert (report.members, report.features, report.nbytes) == (3, layout.width, 3 * 4 * layout.width)
    assert [path.name for path in tmp_path.iterdir()] == ["loras"]
    collect(tmp_path / "loras", output=tmp_path / "space")
    write_family(tmp_path / "loras", layout, family_of(layout, 5)[3:], start=3)
    report = collect(tmp_path / "loras", output=tmp_path / "space", dry_run=True)
    assert (report.members, report.added, report.there) == (5, 2, 3)


# ------------------------------------------------------------------------------------------------ what does not fit


def refused(kind: type[WeightopsError], *asked: Path, output: Path, **words: Any) -> str:
    with pytest.raises(kind) as caught:
        collect(*asked, output=output, **words)
    assert not output.exists()
    assert not unfinished(output).exists()
    return f"{caught.value} | {caught.value.hint}"


def test_one_lora_is_no_space(tmp_path: Path) -> None:
    layout = layout_of(2)
    write_family(tmp_path / "loras", layout, family_of(layout, 1))
    assert refused(UsageError, tmp_path / "loras", output=tmp_path / "space") == (
        "synth collect: found 1 LoRA to collect, expected at least 2 | "
        "a space is what several LoRAs of one base have in common"
    )


def mixed(tmp_path: Path) -> Path:
    """Three of rank 2, one of rank 1, one of rank 3, one without a module."""
    layout = layout_of(2)
    write_family(tmp_path / "loras", layout, family_of(layout, 3))
    for rank, number in ((1, 3), (3, 4)):
        other = layout_of(rank)
        write_family(tmp_path / "loras", other, [factors_of(other, number)], start=number)
    less = type(layout)("sd15", layout.modules[1:])
    write_family(tmp_path / "loras", less, [factors_of(less, 5)], start=5)
    return tmp_path / "loras"


def test_mixed_ranks_and_modules_are_refused_by_name(tmp_path: Path) -> None:
    said = refused(MismatchError, mixed(tmp_path), output=tmp_path / "space")
    assert said.startswith(f"{tmp_path}/loras/lora-3.safetensors: unet.down_blocks.0.attentions.0")
    assert "has rank 1, and 2 in the space (and 2 more do not fit) | --others pad fills up lower ranks" in said


def test_mixed_ones_are_skipped_where_that_is_asked(tmp_path: Path) -> None:
    report = collect(mixed(tmp_path), output=tmp_path / "space", others="skip")
    assert open_space(tmp_path / "space").names == ("lora-0", "lora-1", "lora-2")
    assert [Path(path).stem for path, _ in report.left_out] == ["lora-3", "lora-4", "lora-5"]
    assert len(report.warnings) == 3


def test_mixed_ones_are_filled_up_where_that_is_asked(tmp_path: Path) -> None:
    report = collect(mixed(tmp_path), output=tmp_path / "space", others="pad")
    found = open_space(tmp_path / "space")
    assert len(found) == 6
    assert {m.rank for m in found.layout.modules} == {3}
    assert report.padded == 5
    members = family_of(layout_of(2), 3)
    for number in range(3):
        rows = found.rows([found.position(f"lora-{number}")])[0]
        assert off(changes(found.layout.unflatten(rows)), changes(members[number])) < 1e-6
    up, down = found.layout.unflatten(found.rows([found.position("lora-5")])[0])[0]
    assert not (up @ down).any()


def test_mixed_bases_are_refused(tmp_path: Path) -> None:
    layout = layout_of(2)
    write_family(tmp_path / "loras", layout, family_of(layout, 2))
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    write_tensors(
        tmp_path / "loras" / "other.safetensors",
        {f"{name}.lora_down.weight": torch.randn(2, 64), f"{name}.lora_up.weight": torch.randn(192, 2)},
    )
    said = refused(MismatchError, tmp_path / "loras", output=tmp_path / "space")
    assert "other.safetensors: is for sd3, and the space is of sd15" in said
    assert "a space holds LoRAs of one base model" in said


def test_what_could_be_for_several_models_is_for_that_of_the_others(tmp_path: Path) -> None:
    layout = layout_of(2, text=True)
    members = family_of(layout, 3)
    write_family(tmp_path / "loras", layout, members[:2])
    write_family(tmp_path / "loras", layout, members[2:], dialect="peft", start=2)
    collect(tmp_path / "loras", output=tmp_path / "space")
    write_family(tmp_path / "alone", layout, members, dialect="peft")
    said = refused(MismatchError, tmp_path / "alone", output=tmp_path / "other")
    assert "cannot tell which model it is for: sd15, sd2" in said
    assert "--architecture sd15 says which" in said


def test_what_is_no_product_is_refused(tmp_path: Path) -> None:
    layout = layout_of(2)
    files = write_family(tmp_path / "loras", layout, family_of(layout, 2))
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    write_tensors(
        files[1],
        {
            f"{name}.lora_up.weight": torch.randn(16, 2), f"{name}.lora_down.weight": torch.randn(2, 16),
            f"{name}.alpha": torch.tensor(2.0), f"{name}.dora_scale": torch.ones(16, 1),
        },
    )  # fmt: skip
    said = refused(MismatchError, tmp_path / "loras", output=tmp_path / "space", architecture="sd15")
    assert "has a magnitude (DoRA), and is no product of two factors | weightops convert --to lora --base" in said


def test_nan_is_refused_by_name(tmp_path: Path) -> None:
    layout = layout_of(2)
    files = write_family(tmp_path / "loras", layout, family_of(layout, 3))
    data = bytearray(files[1].read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    files[1].write_bytes(data)
    with pytest.raises(ValueRefused, match=r"lora-1\.safetensors: tensor 'lora_unet_.*' holds NaN or Inf"):
        collect(tmp_path / "loras", output=tmp_path / "space")
    assert not (tmp_path / "space").exists()


def test_nan_is_skipped_where_that_is_asked(tmp_path: Path) -> None:
    layout = layout_of(2)
    files = write_family(tmp_path / "loras", layout, family_of(layout, 4))
    data = bytearray(files[1].read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    files[1].write_bytes(data)
    report = collect(tmp_path / "loras", output=tmp_path / "space", others="skip")
    assert (report.added, report.members, [path for path, _ in report.left_out]) == (3, 3, [str(files[1])])
    assert ["holds NaN or Inf" in text for text in report.warnings] == [True]
    files[1].unlink()
    collect(tmp_path / "loras", output=tmp_path / "without")
    assert files_of(tmp_path / "space") == files_of(tmp_path / "without")


def test_a_value_beyond_fp16_is_refused(tmp_path: Path) -> None:
    layout = layout_of(2)
    write_family(tmp_path / "loras", layout, [factors_of(layout, n, 3e4 if n else 0.1) for n in range(2)])
    with pytest.raises(ValueRefused, match="fp16 cannot hold the row of 'lora-1'"):
        collect(tmp_path / "loras", output=tmp_path / "space", dtype="fp16", form="raw")
    collect(tmp_path / "loras", output=tmp_path / "space", dtype="bf16")


def test_names_that_stand_for_several_are_refused(tmp_path: Path) -> None:
    layout = layout_of(2)
    for folder in ("a", "b"):
        write_family(tmp_path / folder, layout, family_of(layout, 2))
    said = refused(UsageError, tmp_path / "a", tmp_path / "b", output=tmp_path / "space")
    assert said.startswith("synth collect: 2 names stand for several LoRAs: 'lora-0', 'lora-1'")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"others": "drop"}, "--others: found 'drop', expected refuse, skip, pad"),
        ({"form": "mean"}, "--form: found 'mean', expected aligned, svd, raw"),
        ({"dtype": "int8"}, "--dtype: found 'int8', expected fp32, fp16, bf16"),
        ({"architecture": "sd16"}, "--architecture: unknown architecture 'sd16' | did you mean 'sd15'?"),
        ({"images": "x"}, "--images: is one half: --images DIR and --embedder FILE go together"),
        ({"images": "x", "conditions": "y"}, "--images: and --conditions both say what each LoRA is of"),
    ],
)
def test_unknown_words_are_refused(tmp_path: Path, words: dict[str, Any], said: str) -> None:
    (tmp_path / "loras").mkdir()
    assert said in refused(UsageError, tmp_path / "loras", output=tmp_path / "space", **words)


def test_an_architecture_that_the_loras_are_not_of_is_refused(tmp_path: Path) -> None:
    layout = layout_of(2)
    write_family(tmp_path / "loras", layout, family_of(layout, 2))
    said = refused(UsageError, tmp_path / "loras", output=tmp_path / "space", architecture="sdxl")
    assert said.startswith("--architecture: found 'sdxl', but names and shapes of these LoRAs are those of sd15")
    collect(tmp_path / "loras", output=tmp_path / "space", architecture="sd15")


def test_an_empty_folder_holds_no_loras(tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    said = refused(UsageError, tmp_path / "loras", output=tmp_path / "space")
    assert f"{tmp_path}/loras: holds no LoRAs" in said


def test_a_space_keeps_its_form(tmp_path: Path) -> None:
    space_of(tmp_path, 3)
    with pytest.raises(UsageError, match=r"--form: found svd, but the rows of .*space are aligned"):
        collect(tmp_path / "loras", output=tmp_path / "space", form="svd")


# ------------------------------------------------------------------------------------------------ a damaged space


def test_what_is_no_space_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing: no such folder"):
        open_space(tmp_path / "nothing")
    with pytest.raises(UsageError, match="is no space of LoRAs"):
        open_space(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file, expected the folder of a space"):
        open_space(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("rows.fp32", lambda data: data[:-1], r"its rows\.fp32 holds 6,335 bytes, expected 6,336"),
        ("rows.fp32", None, r"its rows\.fp32 cannot be read"),
        ("members.jsonl", lambda data: data[: len(data) // 2], r"its members\.jsonl"),
        ("members.jsonl", lambda data: b"[]\n" * 3, r"its members\.jsonl"),
        ("space.json", lambda data: data[:-9], r"its space\.json cannot be read"),
        ("space.json", lambda data: b"[]", r"its space\.json is of format None, expected 1"),
        (
            "space.json",
            lambda data: data.replace(b'"members": 3', b'"members": -1'),
            r"its space\.json says -1 members",
        ),
        ("reference.safetensors", None, r"its reference\.safetensors is not there"),
        ("reference.safetensors", lambda data: data[:-8], r"reference\.safetensors"),
    ],
)
def test_a_damaged_space_is_refused(tmp_path: Path, name: str, harm: Any, said: str) -> None:
    space_of(tmp_path, 3)
    path = tmp_path / "space" / name
    if harm is None:
        path.unlink()
    else:
        path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(FormatError, match=said):
        open_space(tmp_path / "space")


def test_nan_in_a_row_names_its_lora(tmp_path: Path) -> None:
    found = space_of(tmp_path, 3)
    rows = np.memmap(found.path, np.float32, mode="r+").reshape(3, -1)
    rows[1, 7] = np.nan
    rows.flush()
    with pytest.raises(ValueRefused, match="the row of 'lora-1' holds NaN or Inf"):
        found.rows([0, 1])
    assert found.rows([0, 2]).isfinite().all()
    del rows


def test_what_stands_behind_the_members_is_not_read(tmp_path: Path) -> None:
    found = space_of(tmp_path, 3)
    with found.path.open("ab") as file:
        file.write(b"\xff" * 999)
    with (tmp_path / "space" / "members.jsonl").open("a") as text:
        text.write('{"name": "half')
    assert open_space(tmp_path / "space").digest == found.digest


def test_an_unknown_member_is_named_with_its_nearest(tmp_path: Path) -> None:
    found = space_of(tmp_path, 3)
    with pytest.raises(UsageError) as caught:
        found.position("lora-3")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("did you mean lora-")
    with pytest.raises(UsageError, match="has no LoRA 'x'"):
        found.position("x")


def test_a_read_lora_has_its_hash(tmp_path: Path) -> None:
    """The one that recipes have: of all tensors that were read."""
    found = space_of(tmp_path, 2)
    factors, hashed = read_factors(tmp_path / "loras" / "lora-1.safetensors", found.layout)
    assert hashed == found.hashes[1]
    assert hashed.startswith("xxh3_128:")
    write_lora(
        tmp_path / "x.safetensors",
        found.layout,
        [(u * 1.5, d) for u, d in factors],
        recipe={"command": "test", "inputs": []},
    )
    assert read_factors(tmp_path / "x.safetensors", found.layout)[1] != hashed
    shutil.copy(tmp_path / "loras" / "lora-1.safetensors", tmp_path / "y.safetensors")
    assert read_factors(tmp_path / "y.safetensors", found.layout)[1] == hashed


def test_the_index_says_what_each_feature_is(tmp_path: Path) -> None:
    found = space_of(tmp_path, 2)
    said = json.loads((tmp_path / "space" / "space.json").read_text())
    assert said["width"] == found.width
    starts = [module["start"] for module in said["layout"]["modules"]]
    assert starts == list(found.layout.starts)


# ------------------------------------------------------------------------------------------------ conditions


def table(path: Path, rows: dict[str, tuple[float, ...]], names: str = "hue,size") -> Path:
    lines = [f"name,{names}", *(f"{name},{','.join(map(str, numbers))}" for name, numbers in rows.items())]
    path.write_text("\n".join(lines))
    return path


def test_conditions_go_with_their_loras_also_with_those_that_are_added(tmp_path: Path) -> None:
    layout = layout_of(2)
    members = family_of(layout, 5)
    write_family(tmp_path / "first", layout, members[:3])
    write_family(tmp_path / "then", layout, members[3:], start=3)
    said = {f"lora-{n}": (n / 10, 1.0 - n) for n in (4, 2, 0, 1, 3)}
    words = {"output": tmp_path / "space", "conditions": table(tmp_path / "c.csv", said)}
    first = collect(tmp_path / "first", **words)  # type: ignore[arg-type]
    assert first.condition_names == ("hue", "size")
    assert ["2 are of no LoRA" in text for text in first.warnings] == [True]
    collect(tmp_path / "first", tmp_path / "then", **words)  # type: ignore[arg-type]
    found = open_space(tmp_path / "space")
    assert found.condition_names == ("hue", "size")
    assert found.conditions is not None
    assert found.conditions.tolist() == [list(said[f"lora-{n}"]) for n in range(5)]
    assert found.condition_source is not None
    assert found.condition_source["kind"] == "csv"
    changed = table(tmp_path / "changed.csv", said | {"lora-1": (9.0, 9.0)})
    report = collect(tmp_path / "first", output=tmp_path / "space", conditions=changed)
    assert "1 have other conditions there already, which stay: 'lora-1'" in report.warnings[-1]
    assert np.array_equal(open_space(tmp_path / "space").conditions, found.conditions)


def test_conditions_must_be_whole_and_of_one_kind(tmp_path: Path) -> None:
    layout = layout_of(2)
    write_family(tmp_path / "loras", layout, family_of(layout, 3))
    short = table(tmp_path / "short.csv", {"lora-0": (1, 2), "lora-2": (3, 4)})
    said = refused(MismatchError, tmp_path / "loras", output=tmp_path / "space", conditions=short)
    assert "short.csv: says nothing of 1 of 3 LoRAs: 'lora-1' | each LoRA needs its numbers" in said
    whole = table(tmp_path / "whole.csv", {f"lora-{n}": (n, n) for n in range(4)})
    collect(tmp_path / "loras", output=tmp_path / "space", conditions=whole)
    write_family(tmp_path / "more", layout, family_of(layout, 4)[3:], start=3)
    with pytest.raises(UsageError, match="space: has conditions, and the LoRAs to add none"):
        collect(tmp_path / "more", output=tmp_path / "space")
    other = table(tmp_path / "other.csv", {"lora-3": (1, 2)}, names="hue,weight")
    with pytest.raises(
        MismatchError, match=r"other\.csv: has the numbers 'hue', 'weight', and the space 'hue', 'size'"
    ):
        collect(tmp_path / "more", output=tmp_path / "space", conditions=other)
    collect(tmp_path / "loras", output=tmp_path / "bare")
    with pytest.raises(UsageError, match="bare: has no conditions, and the LoRAs to add have"):
        collect(tmp_path / "more", output=tmp_path / "bare", conditions=whole)


def test_damaged_conditions_are_refused(tmp_path: Path) -> None:
    layout = layout_of(2)
    write_family(tmp_path / "loras", layout, family_of(layout, 3))
    words = {"conditions": table(tmp_path / "c.csv", {f"lora-{n}": (n, n) for n in range(3)})}
    collect(tmp_path / "loras", output=tmp_path / "space", **words)
    path = tmp_path / "space" / "conditions.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-16])
    with pytest.raises(FormatError, match=r"its conditions\.npy"):
        open_space(tmp_path / "space")
    path.write_bytes(data[:-8] + np.float64(np.inf).tobytes())
    with pytest.raises(ValueRefused, match=r"its conditions\.npy holds NaN or Inf"):
        open_space(tmp_path / "space")
