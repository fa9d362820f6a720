"""Tables keep every digit, round only where they are drawn, and recompute the printed means of the studies."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weightops.diffusion.metrics import psnr
from weightops.diffusion.tables import Table, measured, with_means, write_whole
from weightops.errors import MismatchError, OutputError, UsageError

STUDY = json.loads((Path(__file__).parents[2] / "fixtures/study_tables.json").read_text())
NAMES = [f"image{n}" for n in range(1, 6)]
ODD = Table(
    "a|title",
    ("of", "a|b", "n"),
    (
        ("x|y\\", 1 / 3, 2),
        ("<i>*_z_*", None, 10),
        ("a_b\n\x1b[31m", math.inf, 7),
        ("tiny", 2.5e-7, 0),
        ("none", 0.0, 1),
    ),
    note="It | says [little].",
)


# ------------------------------------------------------------------------------------------------ means


@pytest.mark.parametrize("name", STUDY)
def test_the_printed_means_of_the_study_recompute(name: str) -> None:
    rows = {label: row["images"] for label, row in STUDY[name].items()}
    table = with_means(rows, title=name, names=NAMES, of="step")
    assert table.columns == ("step", *NAMES, "mean")
    assert [row[0] for row in table.rows] == list(rows)
    for row, printed in zip(table.rows, STUDY[name].values(), strict=True):
        assert list(row[1:-1]) == printed["images"]
        assert row[-1] == pytest.approx(printed["mean"], abs=1e-3)


def test_the_study_is_there_with_all_its_rows() -> None:
    assert {name: len(rows) for name, rows in STUDY.items()} == {
        "psnr_style": 7, "ssim_style": 7, "psnr_character": 6, "ssim_character": 6,
    }  # fmt: skip


def images(seed: int, count: int) -> list[Any]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 12, 16, 3), dtype=np.uint8))


def test_each_image_is_measured_against_the_real_one_of_its_number() -> None:
    real, rows = images(0, 3), {"0": images(1, 3), "100": [*images(2, 2), images(0, 3)[2]]}
    table = measured(real, rows, psnr, title="PSNR", names=["a", "b", "c"], of="step", note="says little")
    assert (table.title, table.columns, table.note) == ("PSNR", ("step", "a", "b", "c", "mean"), "says little")
    values = [psnr(a, b) for a, b in zip(real, rows["0"], strict=True)]
    assert table.rows[0] == ("0", *values, pytest.approx(sum(values) / 3, rel=1e-12))
    assert table.rows[1][3:] == (math.inf, math.inf)
    brightness = measured(real, rows, lambda a, _: float(a.mean()), title="", names="abc", of="")
    assert [row[1] for row in brightness.rows] == [real[0].mean()] * 2, "the real image comes first"


def test_rows_that_do_not_fit_are_refused() -> None:
    def found(rows: dict[str, Any], count: int = 3) -> MismatchError | UsageError:
        names = NAMES[:count]
        with pytest.raises((MismatchError, UsageError)) as told:
            measured(images(0, count), rows, psnr, title="PSNR", names=names, of="step")
        return told.value

    told = found({"0": images(1, 3), "100": images(1, 2)})
    assert (type(told), str(told)) == (MismatchError, "100: found 2 images, expected 3: one for each real image")
    empty = "PSNR: found nothing to measure, expected at least one image in at least one row"
    for told in (found({}), found({"0": []}, 0)):
        assert (type(told), str(told)) == (UsageError, empty)
    with pytest.raises(ValueError, match="2 names for 3 images"):
        measured(images(0, 3), {}, psnr, title="", names=["a", "b"], of="")


def test_a_row_has_a_cell_for_each_column() -> None:
    with pytest.raises(ValueError, match="row 1 has 1 cells under 2 columns"):
        Table("", ("a", "b"), ((1, 2), (3,)))


# ------------------------------------------------------------------------------------------------ forms


def test_numbers_are_rounded_only_where_they_are_drawn() -> None:
    assert ODD.drawn() == [
        ["x|y\\", "0.333", "2"], ["<i>*_z_*", "", "10"], ["a_b\\n\\x1b[31m", "inf", "7"], ["tiny", "2.5e-07", "0"],
        ["none", "0.000", "1"],
    ]  # fmt: skip
    assert ODD.rows[0][1] == 1 / 3
    few = Table("", ("a",), ((1 / 3,), (-0.04,), (0.96,)), decimals=1)
    assert few.drawn() == [["0.3"], ["-0.04"], ["1.0"]]
    assert Table("", ("a",), ((1.5,), (0.4,)), decimals=0).drawn() == [["2"], ["0.4"]]
    assert ODD.numeric == (False, True, True)
    assert Table("", ("a", "b"), ((None, "x"),)).numeric == (False, False)


def test_csv_keeps_every_digit(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    values = (0.1 + 0.2, np.float64(1) / 3, 5e-324, -math.inf, 12345678.9)
    rows = [(f'a,"{n}"\nb', value) for n, value in enumerate(values)]
    table = Table("title", ("of", "v"), (*rows, ("猫\udcff", None), ("n", 3)))
    table.to_csv(path)
    with path.open(newline="", encoding="utf-8") as file:
        header, *found = csv.reader(file)
    assert header == ["of", "v"]
    assert [float(row[1]) for row in found[:5]] == list(values)
    assert [row[0] for row in found[:2]] == ['a,"0"\nb', 'a,"1"\nb']
    assert found[5:] == [["猫\\udcff", ""], ["n", "3"]]
    ODD.to_csv(path)
    assert path.read_text().startswith("of,a|b,n\nx|y\\,0.3333333333333333,2\n")
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_markdown_has_a_cell_for_each_column_whatever_a_cell_holds() -> None:
    assert ODD.to_markdown() == (
        "**a\\|title**\n\n"
        "| of | a\\|b | n |\n"
        "| --- | ---: | ---: |\n"
        "| x\\|y\\\\ | 0.333 | 2 |\n"
        "| \\<i>\\*\\_z\\_\\* |  | 10 |\n"
        "| a_b\\\\n\\\\x1b\\[31m | inf | 7 |\n"
        "| tiny | 2.5e-07 | 0 |\n"
        "| none | 0.000 | 1 |\n"
        "\nIt \\| says \\[little\\].\n"
    )
    for line in ODD.to_markdown().splitlines()[2:9]:
        assert len(re.findall(r"(?<!\\)\|", line)) == 4
    assert Table("t", ("a",), ()).to_markdown() == "**t**\n\n| a |\n| --- |\n"


def test_the_document_of_a_table_is_json() -> None:
    document = json.loads(json.dumps(ODD.to_dict(), allow_nan=False))
    assert (document["title"], document["columns"], document["note"]) == ("a|title", ["of", "a|b", "n"], ODD.note)
    assert document["rows"] == [[cell if cell != math.inf else "inf" for cell in row] for row in ODD.rows]


# ------------------------------------------------------------------------------------------------ files


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for owner, name in ((os, "replace"), (Path, "write_bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(OutputError) as told:
                write_whole(path, b"three")
        assert str(told.value) == f"{path}: cannot be written: No space left on device"
        assert path.read_bytes() == b"two"
        assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]
    with pytest.raises(OutputError, match="does not exist"):
        ODD.to_csv(tmp_path / "none" / "a.csv")
