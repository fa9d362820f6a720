"""Captions are read as people and trainers leave them, written whole or not at all, and put together."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

import pytest

from weightops.diffusion.captions import (
    Captions,
    check_beside,
    check_template,
    clean,
    clear_leftovers,
    fold,
    read_captions,
    write_beside,
    write_table,
)
from weightops.diffusion.pictures import Picture
from weightops.errors import FormatError, OutputError, UsageError
from weightops.files.writer import PART_SUFFIX

FOLDED = "{query}, {caption}"


def pictures(folder: Path, *names: str) -> list[Picture]:
    """Files that stand for images: nothing here looks into them."""
    found = []
    for name in names or ("a.png", "b.png", "c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
        found.append(Picture(folder / name, name, 8, 8, 0, "", b""))
    return found


def read(folder: Path, *names: str, **files: str) -> Captions:
    """The captions of a folder with these files; `_` in a name stands for its dot."""
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8", newline="")
    return read_captions(folder, pictures(folder, *names))


# ------------------------------------------------------------------------------------------------ reading


def test_a_table_of_captions_is_read_by_its_columns(tmp_path: Path) -> None:
    found = read(tmp_path, metadata_csv='file_name,seed,caption\na.png,1,"a cat, red"\nc.png,2,\n')
    assert found.texts == found.in_table == {"a.png": "a cat, red"}
    assert (found.missing, found.strangers, found.warnings) == (["b.png", "c.png"], [], [])


@pytest.mark.parametrize(
    "text",
    [
        "file_name,text\na.png,a cat\n",
        "\ufefffile_name,caption\r\na.png,a cat\r\n",
        "caption,file_name\na cat,./a.png\n\n",
        'file_name,caption,text\na.png,"a\ncat",a dog\n',
        "file_name,caption\na.png,  a\u2028 cat\x00\x1b\t\n",
    ],
    ids=["text", "BOM", "order", "two", "control characters"],
)
def test_tables_of_other_hands_are_read(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, metadata_csv=text).texts == {"a.png": "a cat"}


def test_lines_of_json_are_read(tmp_path: Path) -> None:
    lines = '{"file_name": "a.png", "text": "a cat"}\n\n{"text": null, "file_name": "b.png", "seed": 3}\n'
    found = read(tmp_path, metadata_jsonl=lines)
    assert (found.texts, found.missing) == ({"a.png": "a cat"}, ["b.png", "c.png"])


def test_captions_beside_the_images_are_read(tmp_path: Path) -> None:
    found = read(tmp_path, a_txt="\ufeffa cat\r\n", b_caption="a dog\n", c_txt=" \n")
    assert (found.texts, found.missing) == ({"a.png": "a cat", "b.png": "a dog"}, ["c.png"])
    assert (found.beside, found.in_table, found.warnings) == ({"a.png": "a cat"}, {}, [])


def test_the_table_goes_before_what_stands_beside_and_a_difference_is_said(tmp_path: Path) -> None:
    text = "file_name,caption\na.png,a cat\nb.png,one\n"
    found = read(tmp_path, metadata_csv=text, a_txt="a  cat\n", b_txt="two", b_caption="3")
    assert found.texts == {"a.png": "a cat", "b.png": "one"}
    assert found.warnings == [
        "1 picture has different captions, of which the first of metadata.csv, .txt, .caption counts: 'b.png'"
    ]


def test_rows_of_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    text = "file_name,caption\na.png,a cat\nz.png,gone\n../b.png,out\n/etc/passwd,far\n"
    found = read(tmp_path, metadata_csv=text)
    assert found.strangers == ["z.png", "../b.png", "/etc/passwd"]
    assert found.warnings == [
        "metadata.csv names 3 files that are not there, where imagefolder stops: 'z.png', '../b.png', '/etc/passwd'"
    ]


def test_tables_of_deeper_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "metadata.csv").write_text("file_name,caption\n")
    assert read(tmp_path).warnings == ["not read, for a table stands in the folder itself: 'sub/metadata.csv'"]


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes there")
def test_a_pipe_beside_an_image_is_no_caption(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    assert read(tmp_path).missing == ["a.png", "b.png", "c.png"]


QUOTES = 'put a caption with commas in it between "quotes"'
HEAD = "its first line is to read file_name,caption"


@pytest.mark.parametrize(
    ("name", "data", "message", "hint"),
    [
        ("metadata.csv", b"file_name,caption\na.png,a cat\nb.png,a dog\na.png,x\n",
         "line 4 is about 'a.png', as line 2 is already", None),
        ("metadata.csv", b'file_name,caption\na.png,"a\ncat"\n./a.png,x\n',
         "line 4 is about './a.png', as line 2 is already", None),
        ("metadata.csv", b"file_name,caption\na.png,a cat, red\n",
         "line 2 has 3 cells, expected 2 (file_name, caption)", QUOTES),
        ("metadata.csv", b'file_name,caption\na.png,"a cat\n',
         "line 2 is no line of a CSV file: unexpected end of data", None),
        ("metadata.csv", b"file_name,caption\na.png," + b"x" * 200_000 + b"\n",
         "line 2 is no line of a CSV file: field larger than field limit (131072)", None),
        ("metadata.csv", b"file,caption\na.png,x\n",
         "has the columns 'file', 'caption', expected file_name and caption", HEAD),
        ("metadata.csv", b"file_name;caption\na.png;x\n",
         "has the columns 'file_name;caption', expected file_name and caption", HEAD),
        ("metadata.csv", b"file_name,text,text\n", "has two columns 'text'", None),
        ("metadata.csv", b"file_name,caption\n,x\n", "line 2 has no file_name", None),
        ("metadata.csv", b"file_name,caption\na\0.png,x\n",
         "line 2 names 'a\\x00.png', which no file can be called", None),
        ("metadata.csv", b"file_name,caption\na.png,caf\xe9\n", "is not UTF-8, at byte 27", "save it as UTF-8"),
        ("metadata.jsonl", b'{"file_name": "a.png"}\n{"file_name"\n',
         "line 2 is no JSON: Expecting ':' delimiter", None),
        ("metadata.jsonl", b"[" * 100_000, "line 1 is no JSON: it cannot be read", None),
        ("metadata.jsonl", b"[1]\n", "line 1 is a JSON list, expected an object", None),
        ("metadata.jsonl", b'{"file_name": 7}\n', "line 1 has no file_name", None),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": 7}\n',
         "line 1 has a JSON int for text, expected text", None),
        ("metadata.parquet", b"PAR1", "captions in Parquet are not read here",
         "save it as metadata.csv or metadata.jsonl, and move it away"),
        ("a.txt", b"\xff\xfea\0", "is not UTF-8, at byte 0", "save it as UTF-8"),
        ("a.txt", b"x" * 2_000_000, "holds 2,000,000 bytes, expected a caption", None),
    ],
)  # fmt: skip
def test_what_is_wrong_with_captions_is_said(
    tmp_path: Path, name: str, data: bytes, message: str, hint: str | None
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FormatError) as caught:
        read_captions(tmp_path, pictures(tmp_path))
    assert (str(caught.value), caught.value.hint) == (f"{tmp_path / name}: {message}", hint)


def test_two_tables_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        read(tmp_path, metadata_csv="", metadata_jsonl="")
    said = "holds metadata.csv and metadata.jsonl, of which datasets reads one alone"
    assert (str(caught.value), caught.value.hint) == (f"{tmp_path}: {said}", "remove the other")


# ------------------------------------------------------------------------------------------------ writing


def test_a_new_table_is_sorted_and_read_again(tmp_path: Path) -> None:
    found = read(tmp_path)
    texts = {"c.png": 'a "cat", red', "a.png": "ein Hund ß 猫"}
    assert write_table(found.table, texts)
    with (tmp_path / "metadata.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["file_name", "caption"], *([n, texts[n]] for n in ("a.png", "c.png"))]
    assert read(tmp_path).texts == texts


def test_what_else_a_table_holds_is_kept(tmp_path: Path) -> None:
    text = 'seed,file_name,text,note\n1,b.png,old,"x, y"\n2,gone.png,stays,\n3,a.png\n'
    found = read(tmp_path, metadata_csv=text)
    assert write_table(found.table, {"a.png": "a cat", "c.png": "new"})
    assert (tmp_path / "metadata.csv").read_text() == (
        'seed,file_name,text,note\n3,a.png,a cat,\n1,b.png,old,"x, y"\n,c.png,new,\n2,gone.png,stays,\n'
    )


def test_a_table_without_a_column_of_captions_gets_one(tmp_path: Path) -> None:
    found = read(tmp_path, metadata_csv="file_name,seed\na.png,1\n")
    assert found.missing == ["a.png", "b.png", "c.png"]
    assert write_table(found.table, {"a.png": "a cat"})
    assert (tmp_path / "metadata.csv").read_text() == "file_name,seed,caption\na.png,1,a cat\n"


def test_lines_of_json_stay_lines_of_json(tmp_path: Path) -> None:
    found = read(tmp_path, metadata_jsonl='{"file_name": "b.png", "text": "b", "box": [1, 2]}\n')
    assert write_table(found.table, {"a.png": "ü"})
    lines = (tmp_path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[0] == '{"file_name": "a.png", "text": "ü"}'
    assert json.loads(lines[1]) == {"file_name": "b.png", "text": "b", "box": [1, 2]}
    assert not (tmp_path / "metadata.csv").exists()


def test_a_table_that_says_it_already_is_not_touched(tmp_path: Path) -> None:
    found = read(tmp_path, metadata_csv='"file_name","caption"\r\n"a.png","a cat"\r\n')
    before = (tmp_path / "metadata.csv").read_bytes()
    assert not write_table(found.table, {"a.png": "a cat"})
    assert (tmp_path / "metadata.csv").read_bytes() == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_write_that_fails_leaves_the_table_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    found = read(tmp_path, metadata_csv="file_name,caption\na.png,a cat\n")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises((OutputError, KeyboardInterrupt)) as caught:
        write_table(found.table, {"b.png": "x"})
    if isinstance(error, OSError):
        assert str(caught.value) == f"{tmp_path / 'metadata.csv'}: cannot be written: No space left on device"
    assert (tmp_path / "metadata.csv").read_text() == "file_name,caption\na.png,a cat\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "c.png", "metadata.csv"]


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    found = read(tmp_path)
    (tmp_path / f".metadata.csv.0123abcd{PART_SUFFIX}").write_text("half")
    (tmp_path / ".metadata.csv.other").write_text("not ours")
    clear_leftovers(found.table)
    assert sorted(p.name for p in tmp_path.glob(".*")) == [".metadata.csv.other"]


def test_a_caption_beside_its_image_is_read_again(tmp_path: Path) -> None:
    (picture,) = pictures(tmp_path, "sub/a.b.png")
    assert write_beside(picture, "a cat") == tmp_path / "sub" / "a.b.txt"
    assert read_captions(tmp_path, [picture]).texts == {"sub/a.b.png": "a cat"}


def test_two_images_cannot_share_a_file_of_words(tmp_path: Path) -> None:
    check_beside(pictures(tmp_path, "a.png", "sub/a.png", "ab.png"))
    with pytest.raises(UsageError) as caught:
        check_beside(pictures(tmp_path, "a.jpg", "a.png"))
    assert str(caught.value) == "--write: 'a.jpg' and 'a.png' would share 'a.txt'"
    assert caught.value.hint == "rename one of them, or write csv"


# ------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("template", "query", "caption", "folded"),
    [
        (FOLDED, "red panda", "a bear on a branch", "red panda, a bear on a branch"),
        (FOLDED, "red panda", "a Red Panda on a branch", "a Red Panda on a branch"),
        (FOLDED, "red panda", "a red-panda", "a red-panda"),
        (FOLDED, "cat", "two cats", "cat, two cats"),
        (FOLDED, "cat", "cattle", "cat, cattle"),
        (FOLDED, "a.c", "abc", "a.c, abc"),
        (FOLDED, "★", "a ★", "a ★"),
        (FOLDED, "cat", "", "cat"),
        (FOLDED, " cat\n", " a  dog ", "cat, a dog"),
        (FOLDED, "{caption}", "a dog", "{caption}, a dog"),
        ("{caption}", None, "a dog", "a dog"),
        ("{caption}, {query}", "cat", "a cat", "a cat"),
        ("{caption} ({query}).", "cat", "a cat", "a cat."),
        ("{caption}, {query}.", "cat", "a cat", "a cat."),
        ("{caption}, {query}.", "cat", "a dog", "a dog, cat."),
        ("photo of {query}, {caption}", "cat", "a cat", "photo of a cat"),
        ("art, {query}, {caption}, {query}, fine", "cat", "a cat", "art, a cat, fine"),
        ("{{{caption}}}", None, "a cat", "{a cat}"),
        ("{caption}, in pixels", None, "", "in pixels"),
    ],
)
def test_the_query_is_folded_in_and_said_once(template: str, query: str | None, caption: str, folded: str) -> None:
    check_template(template, query)
    assert fold(template, query, caption) == folded


@pytest.mark.parametrize(
    ("caption", "folded"),
    [
        ("a dog", "sks, a dog"),
        ("sks, a dog", "sks, a dog"),
        ("SKS dog", "SKS dog"),
        ("a photo of sks", "sks, a photo of"),
        ("a dog, sks, red", "sks, a dog, red"),
        ("a sksdog", "sks, a sksdog"),
        ("", "sks"),
    ],
)
def test_the_trigger_stands_first_and_once(caption: str, folded: str) -> None:
    assert fold("{caption}", None, caption, "sks") == folded


def test_query_and_trigger_go_together() -> None:
    assert fold(FOLDED, "dog", "a brown dog", "sks") == "sks, a brown dog"
    assert fold(FOLDED, "sks dog", "an animal", "sks") == "sks dog, an animal"


@pytest.mark.parametrize(
    ("template", "query", "message", "hint"),
    [
        ("{prompt}, {caption}", None, "has the placeholder {prompt}, expected {query} or {caption}", None),
        ("{caption.__class__}", None, "has the placeholder {caption.__class__}, expected {query} or {caption}", None),
        ("{caption!r}", None, "has the placeholder {caption!r}, expected {query} or {caption}", None),
        ("{}", None, "has the placeholder {}, expected {query} or {caption}", None),
        ("{caption", None, "cannot be read: expected '}' before end of string",
         "a brace of its own is written twice, {{"),
        ("cat", None, "has no {caption}, so that all images would be captioned alike", None),
        (FOLDED, None, "asks for {query}, but no query is given", "give it with --query"),
        ("{caption}", "cat", "has no {query}, which is given with --query", None),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_filled_is_refused(
    template: str, query: str | None, message: str, hint: str | None
) -> None:
    with pytest.raises(UsageError) as caught:
        check_template(template, query)
    assert (str(caught.value), caught.value.hint) == (f"--template: {message}", hint)


def test_words_are_one_clean_line() -> None:
    assert clean("\ufeff a\r\n\tb\x00\x1b[31m c\u2029d \ud800") == "a b [31m c d"
    assert clean("👩‍🚀 é") == "👩‍🚀 é"  # a zero-width joiner is part of a word
