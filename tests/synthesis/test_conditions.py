"""Conditions are read, matched by name and asked for as they are meant; what is wrong is said with its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from weightops.errors import FormatError, MismatchError, UsageError, ValueRefused, WeightopsError
from weightops.synthesis.conditions import condition_of, for_members, of_images, read_conditions

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Of:
    """A space, as far as its conditions go."""

    condition_names: tuple[str, ...] = ("hue", "size", "shape")
    condition_source: dict[str, Any] | None = field(default_factory=lambda: {"kind": "csv", "name": "conditions.csv"})
    label: str = "space"


def table(folder: Path, text: str, name: str = "conditions.csv") -> Path:
    (folder / name).write_bytes(text.encode())
    return folder / name


def mean_of_colours(path: Path, size: int = 4, names: str = '["red", "green", "blue"]') -> Path:
    """A linear map that is easy to check: the mean of each colour."""
    weight = np.zeros((3, 3 * size * size), dtype=np.float32)
    for n in range(3):
        weight[n, n * size * size : (n + 1) * size * size] = 1 / size**2
    said = {"weightops_embedder": "linear", "size": str(size), "names": names}
    save_file({"weight": weight, "bias": np.zeros(3, dtype=np.float32)}, path, said)
    return path


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (9, 6)) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", size, colour).save(path)
    return path


# ------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_names_loras_by_stem_by_file_or_by_path(delimiter: str, tmp_path: Path) -> None:
    lines = ["lora,hue,size", "cat,0.5,1", "dog.safetensors,-1e-3,2", r"C:\loras\v1.5.safetensors, 3 ,4", "", " ,, "]
    path = table(tmp_path, "\ufeff" + "\r\n".join(lines).replace(",", delimiter))
    found = read_conditions(path)
    assert found.names == ("hue", "size")
    assert {name: row.tolist() for name, row in found.rows.items()} == {
        "cat": [0.5, 1], "dog": [-1e-3, 2], "v1.5": [3, 4]
    }  # fmt: skip
    assert found.source["kind"] == "csv"
    assert found.source["digest"].startswith("xxh3_128:")
    assert str(tmp_path) not in str(found.source)


def test_an_npz_says_the_same(tmp_path: Path) -> None:
    values = np.array([[1, 2], [3, 4]], dtype=np.float32)
    np.savez(tmp_path / "a.npz", names=np.array(["cat.safetensors", "dog"]), conditions=values)
    np.savez(tmp_path / "b.npz", names=np.array(["cat", "dog"]), conditions=values, columns=np.array(["hue", "size"]))
    first, second = read_conditions(tmp_path / "a.npz"), read_conditions(tmp_path / "b.npz")
    assert first.rows.keys() == second.rows.keys() == {"cat", "dog"}
    assert (first.names, second.names) == (("c1", "c2"), ("hue", "size"))
    assert first.rows["dog"].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("", FormatError, "holds no rows"),
        ("name,hue\n", FormatError, "holds no rows"),
        ("name\ncat\n", FormatError, "its first line is 'name', with no numbers to name"),
        ("cat,0.5,1\ndog,1,2\n", FormatError, "its first line holds numbers: 'cat,0.5,1'"),
        ("name,hue,hue\ncat,1,2\n", FormatError, "its first line names a column 'hue', expected a name for each"),
        ("name,hue,\ncat,1,2\n", FormatError, "its first line names a column '', expected a name for each"),
        ("name,hue\ncat,1\ndog,1,2\n", FormatError, "line 3 has 3 cells, expected 2, as the first line has"),
        ("name,hue\ncat,1\n\ncat.safetensors,2\n", FormatError, "line 4 is a second row for 'cat'"),
        ("name,hue\ncat,blue\n", FormatError, "line 2, hue: found 'blue', expected a number"),
        ("name,hue\ncat,\n", FormatError, "line 2, hue: found '', expected a number"),
        ("name,hue\ncat,1\ndog,nan\n", ValueRefused, "line 3, hue: found 'nan', expected a finite number"),
        ("name,hue\ncat,1e999\n", ValueRefused, "line 2, hue: found '1e999', expected a finite number"),
        ('name,hue\n"cat,1\n', FormatError, "line 2 is no CSV: unexpected end of data"),
    ],
)
def test_what_is_wrong_in_a_csv_is_said_with_its_line(
    text: str, error: type[WeightopsError], said: str, tmp_path: Path
) -> None:
    path = table(tmp_path, text)
    with pytest.raises(error) as refused:
        read_conditions(path)
    assert refused.value.what == said
    assert refused.value.where == str(path)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"names": np.array(["a"])}, "holds 'names'"),
        ({"names": np.array(["a"]), "conditions": np.ones(1)}, "names <U1 [1], conditions float64 [1]"),
        ({"names": np.array([1]), "conditions": np.ones((1, 1))}, "names int64 [1], conditions float64 [1, 1]"),
        ({"names": np.array(["a"]), "conditions": np.ones((2, 1))}, "has 1 names and conditions of [2, 1]"),
        ({"names": np.array(["a"]), "conditions": np.full((1, 1), np.inf)}, "the row of 'a' holds NaN or Inf"),
        ({"names": np.array(["a", "a.pt"]), "conditions": np.ones((2, 1))}, "has a second row for 'a'"),
        ({"names": np.array(["a"]), "conditions": np.ones((1, 2)), "columns": np.array(["x"])},
         "names 1 columns, and has 2"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_an_npz_is_said(arrays: dict[str, Any], said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises((FormatError, ValueRefused)) as refused:
        read_conditions(tmp_path / "a.npz")
    assert refused.value.what == said


def test_an_npz_never_runs_what_a_pickle_asks_for(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", names=np.array([{"a": 1}], dtype=object), conditions=np.ones((1, 1)))
    with pytest.raises(FormatError, match=r"cannot be read: .*allow_pickle=False"):
        read_conditions(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(b"PK no archive")
    with pytest.raises(FormatError, match="cannot be read"):
        read_conditions(tmp_path / "b.npz")


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_conditions(tmp_path / "none.csv")
    with pytest.raises(UsageError, match=r"expected a \.csv or \.npz file of conditions"):
        read_conditions(table(tmp_path, "", "a.txt"))
    (tmp_path / "latin.csv").write_bytes(b"name,gr\xf6sse\n")
    with pytest.raises(FormatError, match="is no text in UTF-8"):
        read_conditions(tmp_path / "latin.csv")


# ------------------------------------------------------------------------------------------------ by name


def test_loras_get_their_rows_in_their_order_and_strangers_are_reported(tmp_path: Path) -> None:
    found = read_conditions(table(tmp_path, "name,hue\ncat,1\ndog,2\nowl,3\n"))
    numbers, warnings = for_members(found, ["dog", "cat"])
    assert numbers.tolist() == [[2], [1]]
    assert numbers.dtype == np.float64
    assert warnings == [f"{tmp_path / 'conditions.csv'}: 1 are of no LoRA that is collected: 'owl'"]
    assert for_members(found, ["owl", "dog", "cat"])[1] == []


def test_a_lora_without_a_row_is_refused_by_its_name(tmp_path: Path) -> None:
    found = read_conditions(table(tmp_path, "name,hue\ncat,1\n"))
    with pytest.raises(MismatchError, match="says nothing of 2 of 3 LoRAs: 'dog', 'owl'"):
        for_members(found, ["dog", "cat", "owl"])


# ------------------------------------------------------------------------------------------------ images


def test_images_become_the_numbers_of_their_lora_and_several_become_their_mean(tmp_path: Path) -> None:
    picture(tmp_path / "images/cat.png", (255, 0, 0))
    picture(tmp_path / "images/dog/1.png", (0, 0, 0))
    picture(tmp_path / "images/dog/2.png", (0, 255, 0))
    picture(tmp_path / "images/owl.png", (0, 0, 0))
    (tmp_path / "images/notes.txt").write_text("beside")
    embedder = mean_of_colours(tmp_path / "embedder.safetensors")
    found = of_images(tmp_path / "images", embedder, ["dog", "cat"])
    numbers, warnings = for_members(found, ["dog", "cat"])
    assert found.names == ("red", "green", "blue")
    assert numbers == pytest.approx(np.array([[-1, 0, -1], [1, -1, -1]]), abs=1e-6)
    assert warnings == [f"{tmp_path / 'images'}: 1 are of no LoRA that is collected: 'owl'"]
    assert found.source["kind"] == "images"
    with pytest.raises(MismatchError, match="says nothing of 1 of 2 LoRAs: 'bat'"):
        for_members(of_images(tmp_path / "images", embedder, ["cat", "bat"]), ["cat", "bat"])


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "images/cat.png", (1, 2, 3))
    picture(tmp_path / "images/cat/1.png", (1, 2, 3))
    with pytest.raises(FormatError, match=r"'cat' and 'cat\.png' are both of 'cat'"):
        of_images(tmp_path / "images", mean_of_colours(tmp_path / "e.safetensors"), ["cat"])
    with pytest.raises(UsageError, match="no such folder"):
        of_images(tmp_path / "none", mean_of_colours(tmp_path / "e.safetensors"), ["cat"])


# ------------------------------------------------------------------------------------------------ asked for


@pytest.mark.parametrize("words", ["0.1,-2,3e-1", "0.1 -2 0.3", "0.1, -2, 0.3"])
def test_numbers_are_a_condition(words: str) -> None:
    ((label, found),) = condition_of(words, Of())
    assert label == "condition"
    assert found.tolist() == [0.1, -2, 0.3]


def test_each_row_of_a_table_is_a_condition_in_the_order_of_the_spaces_columns(tmp_path: Path) -> None:
    path = table(tmp_path, "name,shape,hue,size\na,3,1,2\nb,6,4,5\n")
    assert [(label, row.tolist()) for label, row in condition_of(str(path), Of())] == [
        ("a", [1, 2, 3]), ("b", [4, 5, 6])
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("0.1,0.2", "--condition: found 2 numbers, expected 3 numbers (hue, size, shape)"),
        ("0.1,blue,0.3", "--condition: found '0.1,blue,0.3', expected numbers, a file or a folder"),
        ("nan,1,2", "--condition: found 'nan,1,2', expected finite numbers"),
        ("", "--condition: found 0 numbers, expected 3 numbers (hue, size, shape)"),
        ("none.csv", "none.csv: no such file"),
        ("none.png", "none.png: no such file"),
    ],
)
def test_a_condition_that_is_none_is_refused(words: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        condition_of(words, Of())
    assert str(refused.value) == said


def test_another_tables_columns_are_refused_by_name(tmp_path: Path) -> None:
    path = table(tmp_path, "name,hue,size\na,3,1\n")
    with pytest.raises(MismatchError, match=r"has 2 numbers \(hue, size\), expected 3 numbers \(hue, size, shape\)"):
        condition_of(str(path), Of())


def test_a_space_without_conditions_says_how_it_would_get_some() -> None:
    with pytest.raises(UsageError, match="--condition: space has no conditions to ask for") as refused:
        condition_of("1,2", Of((), None))
    assert "--conditions FILE" in str(refused.value.hint)


def test_an_image_is_asked_for_by_the_embedder_that_made_the_space(tmp_path: Path) -> None:
    embedder = mean_of_colours(tmp_path / "embedder.safetensors")
    picture(tmp_path / "images/cat.png", (255, 0, 0))
    made = of_images(tmp_path / "images", embedder, ["cat"])
    space = Of(made.names, dict(made.source))
    ((label, found),) = condition_of(str(tmp_path / "images/cat.png"), space)
    assert (label, found.tolist()) == ("cat", made.rows["cat"].tolist())
    ((label, found),) = condition_of(str(tmp_path / "images"), space)
    assert (label, found.tolist()) == ("images", made.rows["cat"].tolist())
    mean_of_colours(embedder, size=8)
    with pytest.raises(MismatchError, match="has changed since it made the conditions of space"):
        condition_of(str(tmp_path / "images/cat.png"), space)
    embedder.rename(tmp_path / "moved.safetensors")
    with pytest.raises(UsageError, match="the embedder 'embedder' is no longer where it was"):
        condition_of(str(tmp_path / "images/cat.png"), space)


def test_as_many_numbers_as_a_face_has_are_no_file_name() -> None:
    names = tuple(f"e{n}" for n in range(512))
    ((_, found),) = condition_of(",".join(f"{n / 512:.6f}" for n in range(512)), Of(names, None))
    assert found.shape == (512,)
    with pytest.raises(UsageError, match="found 511 numbers, expected 512 numbers"):
        condition_of(",".join(["0.5"] * 511), Of(names, None))


def test_without_its_place_an_embedder_is_asked_for(tmp_path: Path) -> None:
    path = str(picture(tmp_path / "cat.png", (255, 255, 255)))
    with pytest.raises(UsageError, match="the embedder 'clip' made its conditions, and not where it is") as refused:
        condition_of(path, Of(("e1",), {"kind": "images", "name": "clip", "digest": "xxh3_128:0"}))
    assert "--embedder FILE" in str(refused.value.hint)


def test_an_image_for_a_table_needs_an_embedder_of_the_same_numbers(tmp_path: Path) -> None:
    path = str(picture(tmp_path / "cat.png", (255, 255, 255)))
    with pytest.raises(UsageError, match=r"are from 'conditions.csv', and not made of images"):
        condition_of(path, Of())
    same = mean_of_colours(tmp_path / "same.safetensors", names='["hue", "size", "shape"]')
    assert condition_of(path, Of(), embedder=same)[0][1] == pytest.approx([1, 1, 1], abs=1e-6)
    with pytest.raises(MismatchError, match=r"makes 3 numbers \(red, green, blue\), expected 3 numbers \(hue, size"):
        condition_of(path, Of(), embedder=mean_of_colours(tmp_path / "other.safetensors"))
