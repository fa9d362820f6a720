"""Files of prompts: four forms, one meaning, and every mistake with its line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from weightops.diffusion.prompts import FIELDS, Prompt, parse_size, read_prompts
from weightops.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

LIKE = Prompt("", negative="blurred", seed=7, steps=20)


def refusal(path: Path) -> tuple[str, str | None]:
    with pytest.raises(UsageError) as e:
        read_prompts(path, LIKE)
    return str(e.value).replace(str(path), path.name), e.value.hint


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", 'prompt,seed,guidance,size\n"a cat, asleep",3,4.5,64x32\n\na dog,,,\n'),
        (
            "p.jsonl",
            '{"prompt": "a cat, asleep", "seed": 3, "guidance": 4.5, "size": "64x32"}\n\n{"prompt": "a dog"}\n',
        ),
        ("p.yaml", "- {prompt: 'a cat, asleep', seed: 3, guidance: 4.5, size: 64x32}\n- a dog\n"),
    ],
)
def test_every_form_says_the_same(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    first, second = read_prompts(tmp_path / name, LIKE)
    said = frozenset({"prompt", "seed", "guidance", "size"})
    assert first == Prompt(
        "a cat, asleep", negative="blurred", seed=3, steps=20, guidance=4.5, size=(64, 32), said=said
    )  # fmt: skip
    assert second == Prompt("a dog", negative="blurred", seed=7, steps=20, said=frozenset({"prompt"}))


def test_text_has_a_prompt_in_each_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffa cat\n\n# not this\n  ein Häuschen  \n", encoding="utf-8")
    assert [p.prompt for p in read_prompts(tmp_path / "p.txt", LIKE)] == ["a cat", "ein Häuschen"]


def test_every_field_can_be_said(tmp_path: Path) -> None:
    row = {
        "prompt": "a", "prompt_2": "b", "negative": "c", "negative_2": "d", "seed": 1, "steps": 2, "guidance": 3,
        "size": 512, "images": 4,
    }  # fmt: skip
    assert tuple(row) == FIELDS
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    assert read_prompts(tmp_path / "p.jsonl", LIKE) == [
        Prompt("a", "b", "c", "d", 1, 2, 3.0, (512, 512), 4, frozenset(row))
    ]


@pytest.mark.parametrize(
    ("name", "text", "error", "hint"),
    [
        ("p.csv", "prompt,sed\na,1\n", "p.csv, line 1: unknown column 'sed'", "did you mean 'seed'?"),
        ("p.csv", "prompt,prompt\na,b\n", "p.csv, line 1: the column prompt stands twice", None),
        ("p.csv", "prompt,seed\na,1\nb, c,2\n", "p.csv, line 3: found 3 cells, expected 2: prompt, seed",
         "a prompt with commas stands in quotes"),
        ("p.csv", "prompt,seed\n\na,x\n", "p.csv, line 3: found 'x' for seed, expected a whole number", None),
        ("p.csv", "seed\n1\n", "p.csv, line 2: has no prompt", None),
        ("p.csv", 'prompt\n"a\n', "p.csv, line 2: cannot be read as CSV: unexpected end of data", None),
        ("p.csv", "prompt,steps\na,2000\n", "p.csv, line 2, steps: found 2,000, expected 1 to 1,000", None),
        ("p.csv", "prompt,seed\na,9223372036854775807\n",
         "p.csv, line 2, seed: found 9,223,372,036,854,775,807, expected 0 to 9,223,372,036,854,775,806", None),
        ("p.csv", "prompt,guidance\na,nan\n", "p.csv, line 2: found 'nan' for guidance, expected a number", None),
        ("p.csv", "prompt,size\na,4x4\n",
         "p.csv, line 2, size: found '4x4', expected pixels as 512x768, each side 8 to 8,192", None),
        ("p.csv", "", "p.csv: holds no prompt", None),
        ("p.txt", "# a\n", "p.txt: holds no prompt", None),
        ("p.jsonl", '{"prompt": "a"}\n{prompt}\n',
         "p.jsonl, line 2: cannot be read as JSON: Expecting property name enclosed in double quotes", None),
        ("p.jsonl", '["a"]\n', "p.jsonl, line 1: found ['a'], expected an object with a prompt", None),
        ("p.jsonl", '{"prompt": 3}\n', "p.jsonl, line 1: found 3 for prompt, expected a text", None),
        ("p.jsonl", '{"prompt": "a", "seed": true}\n',
         "p.jsonl, line 1: found True for seed, expected a whole number", None),
        ("p.yaml", "prompt: a\n", "p.yaml, line 1: found keys with values, expected a list of prompts", None),
        ("p.yaml", "- a\n- [b]\n", "p.yaml, line 2: found a list, expected a prompt", None),
        ("p.yaml", "- {promt: a}\n", "p.yaml, line 1: unknown column 'promt'", "did you mean 'prompt'?"),
        ("p.md", "a", "p.md: expected prompts in a file that ends in .txt, .csv, .jsonl, .yaml, .yml", None),
    ],
)  # fmt: skip
def test_every_mistake_is_named_with_its_line(
    tmp_path: Path, name: str, text: str, error: str, hint: str | None
) -> None:
    (tmp_path / name).write_text(text)
    assert refusal(tmp_path / name) == (error, hint)


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.txt") == ("none.txt: cannot be read: No such file or directory", None)
    (tmp_path / "b.txt").write_bytes(b"a\xff")
    assert refusal(tmp_path / "b.txt") == ("b.txt: is no UTF-8 text: byte 1 is 0xff", None)
    (tmp_path / "deep.jsonl").write_text("[" * 200_000)
    assert refusal(tmp_path / "deep.jsonl") == ("deep.jsonl, line 1: cannot be read as JSON: nested too deep", None)


def test_sizes_are_width_by_height_or_a_square() -> None:
    assert parse_size("512x768") == (512, 768)
    assert parse_size("512×768") == (512, 768)
    assert parse_size("640") == (640, 640)
    assert parse_size((64, 32)) == (64, 32)
    with pytest.raises(UsageError, match="--size: found '512x', expected pixels as 512x768, each side 8 to 8,192"):
        parse_size("512x")
