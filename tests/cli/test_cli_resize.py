"""resize from the command line: words in, files and their reports out; sd-scripts' words, several files at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from commandline import weightops_here
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from locon import BLOCK, KERNEL, MODULES, QUERY, locon, matrices, off
from loras import header, raw, save


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("style.safetensors"), locon())


def resized(*words: object) -> dict[str, torch.Tensor]:
    """The tensors of what these words write."""
    done = weightops_here("resize", "style.safetensors", *words, "-o", "out.safetensors", "--force")
    assert done.code == 0, done.err
    return load_file("out.safetensors")


def ranks(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {k.partition(".")[0]: len(t) for k, t in tensors.items() if "lora_down" in k}


def test_a_rank_names_the_output_and_the_report_says_what_was_kept() -> None:
    done = weightops_here("resize", "style.safetensors", "--rank", "4")
    assert done.code == 0, done.err
    found = load_file("style-4.safetensors")
    assert set(ranks(found).values()) == {4}
    before, after = matrices(Path("style.safetensors")), matrices(Path("style-4.safetensors"))
    lost = sum(float((before[m] - after[m]).norm()) ** 2 for m in before)
    error = (lost / sum(float(d.norm()) ** 2 for d in before.values())) ** 0.5
    lines = done.out.splitlines()
    assert lines[0] == "style: 9 modules, rank 12 → rank 4"
    (line,) = (line for line in lines if line.startswith("Keeps "))
    assert line.startswith(f"Keeps {100 * (1 - error**2):.2f} % of the energy, relative error {100 * error:.2f} %")
    assert any(line.startswith("wrote  style-4.safetensors  ") for line in lines), lines


@pytest.mark.parametrize(
    ("rule", "name"),
    [("energy:0.98", "energy0.98"), ("size:20 kB", "size20kB"), ("knee", "knee"), ("ratio:10", "ratio10")],
)
def test_a_rule_names_the_output(rule: str, name: str) -> None:
    assert weightops_here("resize", "style.safetensors", "--rank", rule, "-q").code == 0
    assert Path(f"style-{name}.safetensors").is_file()


def test_every_option_reaches_the_work() -> None:
    assert set(ranks(resized("--rank", "6", "--conv-rank", "2")).items()) >= {(QUERY, 6), (KERNEL, 2)}
    assert max(ranks(resized("--rank", "energy:0.999", "--max-rank", "5")).values()) == 5
    capped = ranks(resized("--rank", "energy:0.999", "--max-rank", "5", "--max-conv-rank", "3"))
    assert set(capped.items()) >= {(QUERY, 5), (KERNEL, 3)}
    assert {t.dtype for t in resized("--rank", "4", "--dtype", "bf16").values() if t.ndim} == {torch.bfloat16}
    resized("--rank", "4", "--verify", "--device", "cpu", "--threads", "1", "--memory", "64MiB", "--seed", "3")
    size = Path("out.safetensors").stat().st_size
    done = weightops_here("resize", "style.safetensors", "--rank", "4", "--dry-run", "--json")
    assert (done.code, json.loads(done.out)["bytes_written"]) == (0, size)
    assert not Path("style-4.safetensors").exists()


def test_a_base_makes_a_lora_of_a_dora() -> None:
    shape = MODULES[QUERY]
    dora = locon({QUERY: shape, f"{BLOCK}_proj_in": MODULES[f"{BLOCK}_proj_in"]}, rank=3)
    save(Path("style.safetensors"), dora | {f"{QUERY}.dora_scale": torch.full((shape[0], 1), 2.0)})
    weight = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    base = {
        weight: torch.randn(shape, generator=torch.Generator().manual_seed(1)),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": torch.ones(32, 32, 1, 1),
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(32, 4, 3, 3),
    }
    save(Path("base.safetensors"), base)
    found = resized("--rank", "32", "--base", "base.safetensors")
    assert not any("dora" in key for key in found)
    product = dora[f"{QUERY}.lora_up.weight"].double() @ dora[f"{QUERY}.lora_down.weight"].double()
    changed = base[weight].double() + 6 / 3 * product
    changed *= 2 / changed.norm(dim=1, keepdim=True)
    delta = matrices(Path("out.safetensors"))[QUERY]
    assert off(changed - base[weight].double(), delta) < 1e-5


# ------------------------------------------------------------------------------------------------ sd-scripts' words


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["--new_rank", "4"], ["--rank", "4"]),
        (["--new_rank", "6", "--new_conv_rank", "2"], ["--rank", "6", "--conv-rank", "2", "--all-kernels"]),
        (["--dynamic_method", "sv_ratio", "--dynamic_param", "10"], ["--rank", "ratio:10"]),
        (
            ["--dynamic_method", "sv_fro", "--dynamic_param", "0.9", "--new_rank", "4"],
            ["--rank", "fro:0.9", "--max-rank", "4"],
        ),
        (
            ["--dynamic_method", "sv_cumulative", "--dynamic_param", ".8", "--new_rank", "5", "--new_conv_rank", "3"],
            ["--rank", "cumulative:0.8", "--max-rank", "5", "--max-conv-rank", "3", "--all-kernels"],
        ),
    ],
    ids=str,
)
def test_sd_scripts_words_give_the_same_bytes(theirs: list[str], ours: list[str]) -> None:
    found = []
    for words in (theirs, ours):
        resized(*words)
        found.append(Path("out.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "--rank: found none, expected a number or a rule"),
        (["--rank", "4", "--new_rank", "4"], "--new_rank: says what --rank says, and both are there"),
        (["--new_rank", "4", "--max-rank", "4"], "--new_rank: says what --max-rank says, and both are there"),
        (["--dynamic_method", "sv_ratio"], "--dynamic_method: stands with --dynamic_param, and it with that"),
        (["--dynamic_param", "3"], "--dynamic_method: stands with --dynamic_param, and it with that"),
        (["--new_conv_rank", "4"], "--new_conv_rank: stands with --new_rank"),
        (
            ["--dynamic_method", "sv_ratio", "--dynamic_param", "0.5"],
            "--rank: found 'ratio:0.5', expected ratio:T with",
        ),
        (["--rank", "0"], "--rank: found 0, expected a rank of 1 or more"),
        (["--rank", "enrgy:0.9"], "--rank: found 'enrgy:0.9', expected a rank such as 32"),
        (["--rank", "size:1MB", "--conv-rank", "knee"], "--conv-rank: beside --rank size:1MB it is a number"),
        (["--rank", "4", "--plot", "a.png"], "--plot: draws what --plan finds"),
        (["--rank", "4", "-o", "out.ckpt"], "out.ckpt: the output's name must end in .safetensors"),
        (["--rank", "4", "--memory", "1KiB"], "--memory: 1,024 bytes are too few"),
        (["--rank", "4", "--max-rank", "0"], "--max-rank"),
        (["--rank", "4", "--dtype", "fp8_e4m3"], "--dtype"),
        (["--dynamic_method", "sv_knee", "--dynamic_param", "1"], "--dynamic_method"),
    ],
    ids=str,
)
@pytest.mark.parametrize("files", [["style.safetensors"], ["style.safetensors", "more.safetensors"]], ids=len)
def test_wrong_words_are_refused_in_one_line(files: list[str], words: list[str], error: str) -> None:
    save(Path("more.safetensors"), locon())
    if len(files) > 1 and {"-o", "--memory"} & set(words):
        return  # of each file
    done = weightops_here("resize", *files, *words)
    assert (done.code, done.out) == (2, "")
    said = [line for line in done.err.splitlines() if not line.startswith("hint: ")]
    assert len(said) == 1, said
    assert said[0].startswith(f"error: {error}")
    assert sorted(p.name for p in Path().iterdir()) == ["more.safetensors", "style.safetensors"]


# ------------------------------------------------------------------------------------------------ several files


def test_several_files_are_written_beside_each_other_and_a_bad_one_does_not_keep_the_others() -> None:
    bad = locon()
    bad[f"{QUERY}.lora_up.weight"][0, 0] = torch.nan
    save(Path("bad.safetensors"), bad)
    Path("cut.safetensors").write_bytes(Path("style.safetensors").read_bytes()[:-8])
    save(Path("more.safetensors"), locon(seed=3))
    files = ["style.safetensors", "bad.safetensors", "cut.safetensors", "none.safetensors", "more.safetensors"]
    done = weightops_here("resize", *files, "--rank", "energy:0.9", "-o", "small")
    assert done.code == 2  # the worst of them: none.safetensors is not there
    assert sorted(p.name for p in Path("small").iterdir()) == [
        "more-energy0.9.safetensors",
        "style-energy0.9.safetensors",
    ]
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert [error.split()[1] for error in errors] == ["bad.safetensors:", "cut.safetensors:", "none.safetensors:"]
    assert QUERY in errors[0]
    assert sum(line.startswith("wrote  small/") for line in done.out.splitlines()) == 2
    del files[3]
    done = weightops_here("resize", *files, "--rank", "energy:0.9", "-o", "again", "--json")
    assert done.code == 1
    documents = json.loads(done.out)
    assert [isinstance(document["error"], str) for document in documents] == [False, True, True, False]
    assert [document.get("path") for document in documents[1:3]] == files[1:3]
    resized("--rank", "energy:0.9")
    alone = header(Path("out.safetensors"))[1]
    assert header(Path("small/style-energy0.9.safetensors"))[1] == alone
    assert raw(Path("again/more-energy0.9.safetensors")) == raw(Path("small/more-energy0.9.safetensors"))


def test_several_files_need_a_folder_and_without_one_stand_here() -> None:
    save(Path("more.safetensors"), locon(seed=3))
    files = ["style.safetensors", "more.safetensors"]
    done = weightops_here("resize", *files, "--rank", "4", "-o", "out.safetensors")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: --output: found 'out.safetensors' for several files, expected a folder\n"
    Path("file").write_text("")
    done = weightops_here("resize", *files, "--rank", "4", "-o", "file")
    assert (done.code, done.err) == (1, "error: file: cannot be made: File exists\n")
    assert weightops_here("resize", *files, "--rank", "4").code == 0
    assert Path("style-4.safetensors").is_file()
    assert Path("more-4.safetensors").is_file()
    done = weightops_here("resize", *files, "--rank", "4")
    assert done.code == 1
    assert [line.split()[1] for line in done.err.splitlines() if line.startswith("error")] == [
        "style-4.safetensors:", "more-4.safetensors:",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ what is said


def test_the_json_has_what_scripts_rely_on() -> None:
    done = weightops_here("resize", "style.safetensors", "--rank", "energy:0.9", "--json", "--verify")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["command"] == "resize"
    assert found["output"] == "style-energy0.9.safetensors"
    assert found["bytes_written"] == Path("style-energy0.9.safetensors").stat().st_size
    assert [i["path"] for i in found["inputs"]] == ["style.safetensors"]
    assert found["inputs"][0]["hash"]
    assert found["verified"]["modules"] == 9
    assert {m["name"] for m in found["modules"]} == set(MODULES)
    for row in found["modules"]:
        assert row.keys() >= {"name", "rank_before", "rank", "energy", "error", "delta_norm"}
        assert 0.9 <= row["energy"] <= 1
        assert row["rank"] <= row["rank_before"] == 12
    assert 0 < found["error"] < 0.32
    assert 0.9 < found["energy"] < 1


def test_a_plan_is_told_and_writes_nothing() -> None:
    done = weightops_here("resize", "style.safetensors", "--plan")
    assert done.code == 0, done.err
    assert "what each size costs in error" in done.out
    assert [p.name for p in Path().iterdir()] == ["style.safetensors"]
    done = weightops_here("resize", "style.safetensors", "--plan", "--json")
    points = json.loads(done.out)["plan"]
    assert [p["rank"] for p in points] == [1, 2, 4, 6, 8, 12]
    assert points[0].keys() >= {"rank", "bytes", "error", "shared_error"}


def test_what_is_dropped_is_warned_of_and_strict_minds_what_is_kept() -> None:
    done = weightops_here("resize", "style.safetensors", "--rank", "error:0.6", "-o", "out.safetensors")
    assert done.code == 0
    assert any("of rank 0: dropped, " in line for line in done.err.splitlines()), done.err
    save(Path("style.safetensors"), locon() | {"lora_unet_conv_in.oft_blocks": torch.zeros(4, 8, 8)})
    done = weightops_here("resize", "style.safetensors", "--rank", "4", "--strict")
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines()[0].startswith("error: --strict: 1 tensor would be kept as stored: ")
    done = weightops_here("resize", "style.safetensors", "--rank", "4")
    assert done.code == 0
    assert "1 tensor kept as stored: 'lora_unet_conv_in.oft_blocks'" in done.err


def test_a_single_file_goes_into_a_folder_too() -> None:
    weightops_here("resize", "style.safetensors", "--rank", "2", "-o", "small/")
    assert [path.name for path in Path("small").iterdir()] == ["style-2.safetensors"]


def test_two_files_of_one_name_do_not_become_one() -> None:
    Path("other").mkdir()
    Path("other/style.safetensors").write_bytes(Path("style.safetensors").read_bytes())
    done = weightops_here("resize", "style.safetensors", "other/style.safetensors", "--rank", "2", "-o", "small")
    assert (done.code, done.err) == (2, (
        "error: resize: found two files called 'style', whose results would have one name\nhint: one by one\n"
    ))  # fmt: skip
    assert not Path("small").exists()


@pytest.mark.parametrize("words", [["--rank", "2"], ["--max-rank", "2"], ["-o", "out.safetensors"], ["--verify"]])
def test_a_plan_takes_no_words_that_would_say_nothing(words: list[str]) -> None:
    done = weightops_here("resize", "style.safetensors", "--plan", *words)
    assert done.code == 2
    assert "says nothing with --plan" in done.err
