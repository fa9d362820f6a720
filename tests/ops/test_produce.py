"""produce(): a plan becomes a file or a folder and its report; a dry run says the same and writes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from conftest import save_raw

from weightops.engine.run import ignore
from weightops.errors import OutputError, UsageError
from weightops.files.checkpoint import open_checkpoint
from weightops.files.folder import OutputFile
from weightops.ops.produce import Planned, produce
from weightops.ops.report import Account
from weightops.plan import Input, Plan, Task

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from weightops.files.checkpoint import Checkpoint
    from weightops.ops.report import Report


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Checkpoint]:
    given = {"a": ("U8", [1000], bytes(1000)), "b": ("F16", [3, 2], bytes(range(12)))}
    with open_checkpoint(save_raw(tmp_path / "in.safetensors", given)) as opened:
        yield opened


def plan_of(source: Checkpoint, *, folder: bool, hashes: bool = False) -> Plan:
    tasks = tuple(Task(k, (Input(0, source.slot(k)),), (source.slot(k),)) for k in source.tensors)
    plan = Plan(
        (source,), {k: i.spec for k, i in source.tensors.items()}, tasks, {"format": "pt"}, {"command": "test"},
        data_hashes={"modelspec.hash_sha256": "0x{}"} if hashes else {},
    )  # fmt: skip
    files = (OutputFile("x/a.safetensors", {"a": "w"}), OutputFile("b.safetensors", {"b": "b"}, {"more": "texts"}))
    return replace(plan, files=files, extras={"config.json": b"{}\n"}) if folder else plan


def make(plan: Plan, output: Path, **rest: Any) -> Report:
    given = {"memory": 1 << 24, "device": "cpu", "threads": 1, "force": False, "dry_run": False, "check": False}
    return produce("test", Planned(plan, Account(), "words"), output, **{**given, **rest}, on_progress=ignore)


def nbytes(path: Path) -> int:
    return sum(p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file())


@pytest.mark.parametrize("hashes", [False, True])
@pytest.mark.parametrize("folder", [False, True])
def test_a_dry_run_tells_the_bytes_that_a_run_writes(
    source: Checkpoint, tmp_path: Path, folder: bool, hashes: bool
) -> None:
    plan = plan_of(source, folder=folder, hashes=hashes)
    output = tmp_path / ("out" if folder else "out.safetensors")
    dry = make(plan, output, dry_run=True)
    assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]
    assert dry.dry_run
    report = make(plan, output, check=True)
    assert dry.bytes_written == report.bytes_written == nbytes(output)
    assert report.output == str(output)
    assert report.verified == {"blocks": 2, "values": 1012, "largest_ulp": 0.0}


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_name_tells_whether_a_file_or_a_folder_is_written(source: Checkpoint, tmp_path: Path, dry_run: bool) -> None:
    for name, folder, what in (
        ("out", False, "the output's name must end in .safetensors"),
        ("out.SafeTensors", True, "a folder is written here; its name must not end in .safetensors"),
    ):
        with pytest.raises(UsageError) as caught:
            make(plan_of(source, folder=folder), tmp_path / name, dry_run=dry_run)
        assert str(caught.value) == f"{tmp_path / name}: {what}"
    assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_existing_folder_is_refused_and_replaced_with_force(
    source: Checkpoint, tmp_path: Path, dry_run: bool
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    old = output / "model-00001-of-00009.safetensors"
    old.write_bytes(b"old")
    with pytest.raises(OutputError, match=r"out: exists$"):
        make(plan_of(source, folder=True), output, dry_run=dry_run)
    make(plan_of(source, folder=True), output, dry_run=dry_run, force=True)
    assert old.exists() == dry_run
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors", "out"]


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("mine", ["notes.txt", "style.safetensors", "unet/deep/model.ckpt"])
def test_force_removes_no_folder_in_which_something_else_lies(
    source: Checkpoint, tmp_path: Path, mine: str, dry_run: bool
) -> None:
    """Of all that a user keeps in one folder of models, --force would leave nothing."""
    output = tmp_path / "out"
    (output / mine).parent.mkdir(parents=True)
    (output / mine).write_bytes(b"mine")
    (output / "config.json").write_bytes(b"{}")
    with pytest.raises(OutputError) as caught:
        make(plan_of(source, folder=True), output, dry_run=dry_run, force=True)
    what = f"holds what --force would remove with it, and does not write anew: '{mine}'"
    assert str(caught.value).partition("\n")[0] == f"{output}: {what}"
    assert (output / mine).read_bytes() == b"mine"


def test_a_layout_that_contradicts_itself_is_found_by_a_dry_run(source: Checkpoint, tmp_path: Path) -> None:
    plan = plan_of(source, folder=True)
    with pytest.raises(ValueError, match=r"expected each tensor in one file of the folder, but not so 'b'$"):
        make(replace(plan, files=plan.files[:1]), tmp_path / "out", dry_run=True)
