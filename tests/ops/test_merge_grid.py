"""merge --grid: what is written is what single merges write, byte for byte, of inputs that are read once."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import save
from conftest import weightops as command_line

import weightops
from weightops.engine import chunks
from weightops.errors import MemoryRefused, OutputError, UsageError, ValueRefused
from weightops.files.checkpoint import open_checkpoint
from weightops.merging.method import METHODS
from weightops.ops.merge_grid import MOST, read_grid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightops.ops.report import Report

UNET = "model.diffusion_model.out.2.weight"
SHAPES = {
    UNET: (40, 52),
    "model.diffusion_model.out.2.bias": (40,),
    "model.diffusion_model.middle_block.1.proj_in.weight": (8, 16, 3, 3),
    "first_stage_model.decoder.conv_in.weight": (12, 4, 3, 3),
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": (64,),
}
IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
A, B, C = "a.safetensors", "b.safetensors", "c.safetensors"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def models(dtype: torch.dtype = torch.float16) -> None:
    """Files a, b and c of one tiny checkpoint, with a VAE, a text encoder, and integers that are copied."""
    for seed, name in enumerate((A, B, C)):
        generator = torch.Generator().manual_seed(seed)
        tensors = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in SHAPES.items()}
        save(Path(name), {**tensors, IDS: torch.arange(7)[None]}, {"format": "pt", "title": name})


def grown(*files: str, grid: Mapping[str, Sequence[float]], **words: Any) -> Report:
    shutil.rmtree("grid", ignore_errors=True)
    return weightops.merge(*files, output="grid", grid=grid, **words)


def singles(*files: str, grid: Sequence[Mapping[str, float]], **words: Any) -> tuple[list[bytes], int]:
    """What merges one by one write, and the bytes that the one reads that reads the most."""
    found, most = [], 0
    for settings in grid:
        own = {key: value for key, value in settings.items() if key != "alpha"}
        given = {key: value for key, value in words.items() if key != "parameters"}
        parameters = {**words.get("parameters", {}), **own}
        alpha = {"alpha": settings["alpha"]} if "alpha" in settings else {}
        report = weightops.merge(*files, output="one.safetensors", force=True, parameters=parameters, **alpha, **given)
        found.append(Path("one.safetensors").read_bytes())
        most = max(most, report.bytes_read)
    return found, most


def written(report: Report) -> list[bytes]:
    return [(Path("grid") / row["file"]).read_bytes() for row in report.details["grid"]]


def same(*files: str, grid: Mapping[str, Sequence[float]], **words: Any) -> tuple[Report, int]:
    """Assert that a grid is what single merges are; the report, and what one merge reads."""
    report = grown(*files, grid=grid, **words)
    expected, most = singles(*files, grid=[row["settings"] for row in report.details["grid"]], **words)
    assert written(report) == expected
    assert len(set(expected)) == len(expected)
    return report, most


# ------------------------------------------------------------------------------------------------ what is written


def test_variants_are_what_single_merges_write_and_every_input_is_read_once() -> None:
    models()
    report, one = same(A, B, grid={"alpha": [0.1, 0.5, 0.9]})
    assert report.bytes_read == one
    assert report.details["reads"] == {"bytes": one, "one": one, "apart": 3 * one}
    assert [row["file"] for row in report.details["grid"]] == [f"alpha-{x}.safetensors" for x in (0.1, 0.5, 0.9)]
    assert report.bytes_written == sum(path.stat().st_size for path in Path("grid").iterdir())


def test_several_names_are_all_combinations() -> None:
    models()
    report, one = same(A, B, grid={"density": [0.2, 0.7], "alpha": [0.5, 1.0]}, base=C, method="dare", seed=3)
    assert [row["settings"] for row in report.details["grid"]] == [
        {"density": d, "alpha": a} for d in (0.2, 0.7) for a in (0.5, 1.0)
    ]
    assert report.details["grid"][1]["file"] == "density-0.2_alpha-1.safetensors"
    assert report.bytes_read == one


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "BLOCK_VALUES", 256)


def _number_of(name: str) -> dict[str, list[float]]:
    """Values of the first number of a method that may vary, else of alpha."""
    method = METHODS.get(name)
    for parameter in method.parameters:
        if parameter.kind in ("float", "Share", "int"):
            return {parameter.name: [2, 3] if parameter.kind == "int" else [0.3, 0.6]}
    return {"alpha": [0.3, 0.6]}


# Made of models and a base alone, and with a number that may vary.
_NAMES = [
    name for name, method in METHODS if not method.needs_statistics and name not in ("add", "difference", "n_average")
]


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.usefixtures("small_blocks")
def test_any_method_writes_in_a_grid_what_it_writes_alone(name: str) -> None:
    """In blocks, with looks in tasks of their own."""
    models()
    method = METHODS.get(name)
    count = 2 if method.is_open else len([m for m in method.models if m != "base"])
    words = {"base": C} if method.needs_base or "Delta" in method.roles else {}
    files = [A, B, C][:count]
    report = grown(*files, grid=_number_of(name), method=name, **words)
    rows = [row["settings"] for row in report.details["grid"]]
    expected, one = singles(*files, grid=rows, method=name, **words)
    assert written(report) == expected
    assert report.bytes_read == one


@pytest.mark.usefixtures("small_blocks")
def test_looks_that_are_the_same_for_all_are_made_once() -> None:
    """alpha is how strongly the result of ties is added, and how far slerp goes: neither changes what they see."""
    models()
    for words in ({"base": C, "method": "ties"}, {"method": "slerp"}):
        report, one = same(A, B, grid={"alpha": [0.3, 0.6, 0.9]}, **words)
        assert report.details["looks"] > 0
        assert report.bytes_read == one


@pytest.mark.usefixtures("small_blocks")
def test_looks_that_differ_are_made_a_few_at_a_time() -> None:
    models()
    densities = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    report, one = same(A, B, grid={"density": densities[:4]}, base=C, method="ties")
    assert report.bytes_read == one
    report, one = same(A, B, grid={"density": densities}, base=C, method="ties", verify=True)
    assert one < report.bytes_read < 2 * one
    assert report.verified is not None


@pytest.mark.usefixtures("small_blocks")
def test_methods_that_look_at_everything_do_so_once_where_they_see_the_same() -> None:
    models()
    report, one = same(A, B, grid={"alpha": [0.1, 0.2, 0.3]}, method="cosine_a")
    assert report.details["passes"] == 2
    assert report.bytes_read == one
    report, _ = same(A, B, grid={"threshold": [0.1, 0.5, 0.9]}, base=C, method="ram_plus")
    assert report.details["passes"] == 4


@pytest.mark.usefixtures("small_blocks")
def test_what_only_some_variants_read_counts_in_their_hashes_alone() -> None:
    """At alpha 0 nothing of the models is added: the base is copied, and the others are not read."""
    models()
    report, one = same(A, B, grid={"alpha": [0.0, 0.5, 1.0]}, base=C, method="ties")
    recipes = [json.loads(open_checkpoint(Path("grid") / row["file"]).metadata["weightops"])
               for row in report.details["grid"]]  # fmt: skip
    hashes = [[entry["hash"] for entry in recipe["inputs"]] for recipe in recipes]
    assert hashes[0] != hashes[1] == hashes[2]
    assert one < report.bytes_read < 2 * one
    assert report.account.copied != report.account.used  # those of a variant that merges


@pytest.mark.parametrize("words", [
    {"blocks": "OUT=0.25"}, {"vae": "merge"}, {"vae": "2", "text_encoder": "2"}, {"drop": ("vae",)}, {"dtype": "bf16"},
    {"base": C, "dtype": "fp32"},
], ids=str)  # fmt: skip
def test_the_other_words_of_a_merge_hold_for_all(words: dict[str, Any]) -> None:
    models()
    report, one = same(A, B, grid={"alpha": [0.4, 0.6]}, **words)
    assert report.bytes_read == one


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
@pytest.mark.usefixtures("small_blocks")
def test_bytes_do_not_depend_on_memory_or_threads(method: str) -> None:
    models()
    found = [
        written(grown(A, B, grid={"density": [0.3, 0.6], "alpha": [0.5, 1.0]}, base=C, method=method, **words))
        for words in ({"memory": 24 << 20, "threads": 3}, {"memory": 512 << 20, "threads": 1})
    ]
    assert found[0] == found[1]


def test_a_diffusers_folder_makes_a_folder_of_each() -> None:
    for seed, name in enumerate("ab"):
        tensors = {"conv_in.weight": torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))}
        folder = Path(name) / "unet"
        folder.mkdir(parents=True)
        (Path(name) / "model_index.json").write_text(
            '{"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"]}'
        )
        (folder / "config.json").write_text("{}")
        save(folder / "diffusion_pytorch_model.safetensors", tensors)
    report = weightops.merge("a", "b", output="grid", grid={"alpha": [0.25, 0.75]}, verify=True)
    assert [row["file"] for row in report.details["grid"]] == ["alpha-0.25", "alpha-0.75"]
    for row in report.details["grid"]:
        weightops.merge("a", "b", output="one", alpha=row["settings"]["alpha"], force=True)
        found, expected = (
            {p.relative_to(top).as_posix(): p.read_bytes() for p in Path(top).rglob("*") if p.is_file()}
            for top in (Path("grid") / row["file"], Path("one"))
        )
        assert found == expected
        assert sum(map(len, found.values())) == row["bytes"]


# ------------------------------------------------------------------------------------------------ all or nothing


def test_the_folder_appears_whole_or_not_at_all() -> None:
    models()
    save(Path(B), {**open_tensors(B), UNET: torch.full(SHAPES[UNET], 60000.0, dtype=torch.float16)})
    with pytest.raises(ValueRefused, match=r"alpha-2: .*out\.2\.weight: the result is too large for F16"):
        weightops.merge(A, B, output="grid", grid={"alpha": [0.5, 2.0]})
    assert sorted(path.name for path in Path().iterdir()) == [A, B, C]


def open_tensors(name: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(name)


def test_a_folder_that_is_there_is_replaced_with_force_alone() -> None:
    models()
    weightops.merge(A, B, output="grid", grid={"alpha": [0.5]})
    with pytest.raises(OutputError, match="grid: exists"):
        weightops.merge(A, B, output="grid", grid={"alpha": [0.5]})
    weightops.merge(A, B, output="grid", grid={"alpha": [0.5]}, force=True)
    Path("grid/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        weightops.merge(A, B, output="grid", grid={"alpha": [0.5]}, force=True)
    with pytest.raises(UsageError, match=r"must not end in \.safetensors"):
        weightops.merge(A, B, output="grid.safetensors", grid={"alpha": [0.5]})


def test_memory_that_holds_no_block_of_all_variants_is_refused_before_the_start() -> None:
    models()
    save(Path(A), {UNET: torch.zeros(1 << 20, dtype=torch.float16)})
    save(Path(B), {UNET: torch.ones(1 << 20, dtype=torch.float16)})
    values = [n / 20 for n in range(20)]
    weightops.merge(A, B, output="one.safetensors", memory=24 << 20)
    with pytest.raises(MemoryRefused) as caught:
        weightops.merge(A, B, output="grid", grid={"alpha": values}, memory=24 << 20)
    assert not Path("grid").exists()
    assert caught.value.hint is not None
    enough = int(caught.value.hint.split()[1].removesuffix("MiB"))
    assert 44 <= enough <= 64  # 2 inputs and 20 outputs of 2 MiB, and working copies
    report = weightops.merge(A, B, output="grid", grid={"alpha": values}, memory=enough << 20)
    assert report.bytes_read == 2 * (2 << 20)


# ------------------------------------------------------------------------------------------------ table, score, words


def table() -> list[list[str]]:
    with Path("grid/grid.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_a_table_names_each_variant_its_settings_and_its_bytes() -> None:
    models()
    grown(A, B, grid={"alpha": [1 / 3, 2 / 3]})
    size = str(Path("grid/alpha-0.333333.safetensors").stat().st_size)
    other = str(Path("grid/alpha-0.666667.safetensors").stat().st_size)
    assert table() == [
        ["file", "alpha", "bytes"],
        ["alpha-0.333333.safetensors", repr(1 / 3), size],
        ["alpha-0.666667.safetensors", repr(2 / 3), other],
    ]


def test_values_that_lie_close_together_have_names_of_their_own() -> None:
    models()
    report = grown(A, B, grid={"alpha": [0.5, 0.50000001]}, dry_run=True)
    assert [row["file"] for row in report.details["grid"]] == [
        "alpha-0.5.safetensors", "alpha-0.50000001.safetensors",
    ]  # fmt: skip


def test_scores_join_the_table() -> None:
    models()
    seen: list[Path] = []

    def score(path: Path) -> dict[str, float]:
        seen.append(path)
        with open_checkpoint(path) as opened:
            count = len(opened.tensors)
        return {"tensors": count, **({"late": 0.5} if len(seen) > 1 else {})}

    report = grown(A, B, grid={"alpha": [0.1, 0.9]}, score=score)
    assert seen == [Path("grid/alpha-0.1.safetensors"), Path("grid/alpha-0.9.safetensors")]
    assert [row["scores"] for row in report.details["grid"]] == [{"tensors": 6.0}, {"tensors": 6.0, "late": 0.5}]
    head, first, second = table()
    assert head == ["file", "alpha", "bytes", "tensors", "late"]
    assert (first[3:], second[3:]) == (["6.0", ""], ["6.0", "0.5"])
    assert report.bytes_written == sum(path.stat().st_size for path in Path("grid").iterdir())
    assert sorted(path.name for path in Path("grid").iterdir()) == sorted([*(p.name for p in seen), "grid.csv"])


def test_a_score_that_fails_loses_nothing() -> None:
    models()

    def score(path: Path) -> dict[str, float]:
        if "0.9" in path.name:
            raise RuntimeError("out of paint")
        return {"kid": 1.0}

    with pytest.raises(RuntimeError, match="out of paint"):
        grown(A, B, grid={"alpha": [0.1, 0.9]}, score=score)
    assert [row[3:] for row in table()] == [["kid"], ["1.0"], [""]]
    assert Path("grid/alpha-0.9.safetensors").exists()
    with pytest.raises(UsageError, match="'alpha', which is a column"):
        weightops.merge(A, B, output="other", grid={"alpha": [0.1]}, score=lambda _: {"alpha": 1.0})
    with pytest.raises(UsageError, match="found no grid"):
        weightops.merge(A, B, score=score)


def test_a_dry_run_says_what_would_be_written() -> None:
    models()
    words: dict[str, Any] = {"base": C, "method": "ram_plus"}
    planned = grown(A, B, grid={"limit": [0.1, 0.2]}, dry_run=True, score=lambda _: {"never": 1.0}, **words)
    assert not Path("grid").exists()
    report = grown(A, B, grid={"limit": [0.1, 0.2]}, verify=True, **words)
    assert planned.details == report.details
    assert planned.bytes_written == report.bytes_written
    assert report.verified is not None
    assert report.verified["blocks"] > 0


def test_what_is_verified_is_what_was_written() -> None:
    models()
    import weightops.ops.produce as produce

    def spoil(plan: Any, output: Path, *, label: str) -> dict[str, Any]:
        found = output / "alpha-0.9.safetensors"
        data = bytearray(found.read_bytes())
        data[-5:] = b"\x11" * 5
        found.write_bytes(data)
        return verify(plan, output, label=label)

    verify = produce.verify
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(produce, "verify", spoil)
        with pytest.raises(ValueRefused, match="off its float64 reference"):
            grown(A, B, grid={"alpha": [0.1, 0.5, 0.9]}, verify=True)


def test_the_name_is_made_of_the_models() -> None:
    models()
    report = weightops.merge(A, B, grid={"alpha": [0.5]})
    assert report.output == "a+b-grid"
    assert sorted(path.name for path in Path("a+b-grid").iterdir()) == ["alpha-0.5.safetensors", "grid.csv"]


def test_the_command_line_draws_the_table(tmp_path: Path) -> None:
    models()
    ran = command_line("merge", A, B, "--grid", "alpha=0.1..0.9:9", "-o", "grid", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert "alpha-0.3.safetensors    0.3" in ran.stdout
    assert sum(line.startswith("alpha-0.") for line in lines) == 9
    assert any(line.endswith("read for 9 variants, as for one") for line in lines)
    assert "9 variants: 0.9 × a + 0.1 × b, … 0.1 × a + 0.9 × b" in lines
    words = ("merge", A, B, "--base", C, "--method", "dare", "--grid", "density=0.2,0.5", "--grid", "alpha=1", "--json")
    ran = command_line(*words, "-o", "other", "--dry-run", cwd=tmp_path)
    assert [row["settings"] for row in json.loads(ran.stdout)["grid"]] == [
        {"density": 0.2, "alpha": 1.0}, {"density": 0.5, "alpha": 1.0},
    ]  # fmt: skip
    ran = command_line("merge", A, B, "--grid", "alpha=0.5", "--print-recipe", cwd=tmp_path)
    assert ran.stderr == "error: --print-recipe: found --grid beside it, expected one merge\n"


# ------------------------------------------------------------------------------------------------ refusals


def test_ranges_have_both_ends_and_no_number_next_to_what_is_meant() -> None:
    tenths = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert read_grid(["alpha=0.1..0.9:9", "rank=8,16"]) == {"alpha": tenths, "rank": [8, 16]}
    assert read_grid(["a=-1..1:3", "b=.5...5:1"]) == {"a": [-1, 0, 1], "b": [0.5]}


SAYS = "NAME=LO..HI:N, as alpha=0.1..0.9:9, or NAME=X,Y,…"


@pytest.mark.parametrize(("words", "message"), [
    (["alpha"], f"found 'alpha', expected {SAYS}"),
    (["=1,2"], f"found '=1,2', expected {SAYS}"),
    (["alpha=0..1"], f"found '0..1' for alpha, expected {SAYS}"),
    (["alpha=0..1:x"], f"found '0..1:x' for alpha, expected {SAYS}"),
    (["alpha=0..1:-3"], f"found '0..1:-3' for alpha, expected {SAYS}"),
    (["alpha=0..one:3"], f"found 'one' for alpha, expected a number: {SAYS}"),
    (["alpha=0..1e999:3"], f"found '1e999' for alpha, expected a number: {SAYS}"),
    (["alpha=0.5,"], f"found '' for alpha, expected a number: {SAYS}"),
    (["alpha=nan"], f"found 'nan' for alpha, expected a number: {SAYS}"),
    (["alpha=1..0:3"], "found '1..0:3' for alpha, expected the smaller number first"),
    (["alpha=0..1:0"], "found 0 values from 0 to 1 for alpha, expected 2 to 100, both ends among them"),
    (["alpha=0..1:1"], "found 1 values from 0 to 1 for alpha, expected 2 to 100, both ends among them"),
    (["alpha=1..1:0"], "found 0 values from 1 to 1 for alpha, expected 1 to 100, both ends among them"),
    (["alpha=0..1:999999999"],
     "found 999,999,999 values from 0 to 1 for alpha, expected 2 to 100, both ends among them"),
    (["alpha=1", "alpha=2"], "found 'alpha' twice"),
])  # fmt: skip
def test_words_that_are_no_grid_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_grid(words)
    assert str(caught.value) == f"--grid: {message}"


TIES: dict[str, Any] = {"base": C, "method": "ties"}


@pytest.mark.parametrize(("grid", "words", "message"), [
    ({}, {}, f"--grid: says nothing, expected {SAYS}"),
    ({"alpha": []}, {}, "--grid: found no value for alpha"),
    ({"alpha": [0.5, 0.25, 0.5]}, {}, "--grid: found 0.5 twice for alpha, expected different values"),
    ({"alpha": [0.0, -0.0]}, {}, "--grid: found -0 twice for alpha, expected different values"),
    ({"alpha": [1.0] * 4}, {}, "--grid: found 1 twice for alpha, expected different values"),
    ({"densty": [0.5]}, TIES, "--grid: ties has no number 'densty'"),
    ({"weights": [0.5]}, TIES, "--grid: ties has no number 'weights'"),
    ({"normalize": [0, 1]}, TIES, "--grid: ties has no number 'normalize'"),
    ({"density": [0.5, 1.5]}, TIES, "ties, density: found 1.5, expected a number above 0 and at most 1"),
    ({"max_iter": [1, 2.5]}, {"method": "karcher"}, "--grid: found 2.5 for max_iter, expected whole numbers"),
    ({"alpha": [0.5]}, {"alpha": 0.3}, "--grid: found alpha, of which --alpha says a number"),
    ({"density": [0.5]}, {**TIES, "parameters": {"density": 0.3}},
     "--grid: found density, of which --set says a number"),
    ({"alpha": [0.5]}, {"weights": (1, 2)}, "--alpha: given together with --weights, expected one of the two"),
    ({"alpha": [n / 100 for n in range(101)]}, {}, "--grid: found 101 variants, expected at most 100"),
    ({"alpha": [n / 11 for n in range(11)], "density": [n / 10 for n in range(1, 11)]}, TIES,
     "--grid: found 11 × 10 = 110 variants, expected at most 100"),
    ({"alpha": [0.5]}, {"recipe": "recipe.yaml"}, "--grid: found --recipe beside it, which says every setting"),
])  # fmt: skip
def test_grids_that_make_no_sense_are_refused(
    grid: dict[str, list[float]], words: dict[str, Any], message: str
) -> None:
    models()
    with pytest.raises(UsageError) as caught:
        weightops.merge(A, B, output="grid", grid=grid, **words)
    assert str(caught.value) == message
    assert not Path("grid").exists()


def test_unknown_names_are_told_the_known_ones() -> None:
    models()
    with pytest.raises(UsageError) as caught:
        grown(A, B, grid={"gama": [0.1]}, base=C, method="breadcrumbs")
    assert caught.value.hint == "a grid may be of alpha, density, gamma"
    assert MOST == 100
