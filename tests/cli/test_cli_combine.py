"""combine from the command line: words in, a file and its report out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commandline import Done, weightops_here
from conftest import save
from safetensors.torch import load_file

from weightops.ops.blend import ways

QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
POINT = "lora_unet_down_blocks_0_attentions_0_proj_in"
KERNEL = "lora_unet_down_blocks_0_resnets_0_conv1"
BUNDLE = "bundle_emb.cat.string_to_param.*"


def lora(seed: int, rank: int, alpha: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (out, features, *kernel) in {QUERY: (32, 32), POINT: (32, 32, 1, 1), KERNEL: (32, 16, 3, 3)}.items():
        found[f"{name}.lora_down.weight"] = torch.randn(rank, features, *kernel, generator=generator)
        found[f"{name}.lora_up.weight"] = torch.randn(out, rank, *[1] * len(kernel), generator=generator)
        found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("style.safetensors"), lora(1, 4, 2.0) | {BUNDLE: torch.ones(2, 8)}, {"ss_steps": "100"})
    save(Path("person.safetensors"), lora(2, 3, 3.0) | {f"{QUERY}.diff_b": torch.ones(32)}, {"ss_steps": "200"})


def change(path: str, name: str = QUERY) -> torch.Tensor:
    tensors = {k.replace("lora_B", "lora_up").replace("lora_A", "lora_down"): t for k, t in load_file(path).items()}
    up, down = (tensors[f"{name}.lora_{side}.weight"].double().flatten(1) for side in ("up", "down"))
    alpha = tensors.get(f"{name}.alpha")
    return (1.0 if alpha is None else float(alpha) / len(down)) * up @ down


def done(*words: object, code: int = 0) -> Done:
    found = weightops_here("combine", "style.safetensors:0.7", "person.safetensors:-0.5", *words)
    assert found.code == code, found.err
    return found


def rank(name: str = QUERY, path: str = "out.safetensors") -> int:
    return len(load_file(path)[f"{name}.lora_down.weight"])


OUT = ("-o", "out.safetensors", "--force")


# ------------------------------------------------------------------------------------------------ what is written


def test_strengths_stand_after_the_files_and_name_the_output() -> None:
    found = done("--exact", "--verify")
    out = "style-0.7+person--0.5.safetensors"
    torch.testing.assert_close(change(out), 0.7 * change("style.safetensors") - 0.5 * change("person.safetensors"))
    lines = found.out.splitlines()
    assert lines[0] == "0.7 × style − 0.5 × person: 3 modules"
    assert any(
        line.startswith("Holds 100.00 % of the energy of the sum, relative error 0.00 %, rank 7") for line in lines
    )
    assert any(line.startswith(f"wrote  {out}  ") for line in lines), lines
    assert any("the error of 3 modules is as computed" in line for line in lines), lines
    assert "19 used, 1 copied, 0 unused" in found.out
    assert found.err == ""


def test_every_option_of_ranks_reaches_the_work() -> None:
    done(*OUT)
    assert (rank(), rank(KERNEL)) == (4, 4)
    done(*OUT, "--rank", 2)
    assert (rank(), rank(KERNEL)) == (2, 2)
    done(*OUT, "--rank", 5, "--conv-rank", 3)
    assert (rank(), rank(KERNEL)) == (5, 3)
    done(*OUT, "--rank", "energy:0.999", "--max-rank", 3, "--max-conv-rank", 2)
    assert (rank(), rank(KERNEL)) == (3, 2)
    done(*OUT, "--exact")
    assert (rank(), rank(KERNEL)) == (7, 7)
    done(*OUT, "--rank", "size:6kB")
    assert Path("out.safetensors").stat().st_size <= 6000


def test_methods_and_their_settings_reach_the_work() -> None:
    made = {}
    for words in (("ties",), ("ties", "--set", "density=0.5"), ("dare",), ("dare", "--seed", "3"), ("slerp",)):
        command = (
            "combine",
            "style.safetensors:0.7",
            "person.safetensors:0.5",
            "--method",
            *words,
            "--rank",
            "8",
            *OUT,
        )
        assert weightops_here(*command).code == 0
        made[words] = Path("out.safetensors").read_bytes()
    assert len(set(made.values())) == 5
    recipe = json.loads(done("--method", "ties", "--set", "density=0.5", "--rank", 8, *OUT, "--json").out)
    assert recipe["warnings"] == [
        "ties takes the strengths as shares: twice as much of all of them is the same, "
        "and what only one LoRA has is kept as it is"
    ]


def test_every_other_option_reaches_the_work() -> None:
    done(*OUT, "--dialect", "diffusers", "--architecture", "sd15")
    assert all(key.startswith(("unet.", "bundle_emb")) for key in load_file("out.safetensors"))
    done("-o", "folder", "--dialect", "peft")
    assert Path("folder/adapter_config.json").exists()
    done(*OUT, "--dtype", "bf16", "--threads", 1, "--memory", "64MiB", "--device", "cpu")
    assert load_file("out.safetensors")[f"{QUERY}.lora_up.weight"].dtype is torch.bfloat16
    done("-o", "peer.safetensors", "--compat", "sd-scripts", "--exact")
    assert float(load_file("peer.safetensors")[f"{QUERY}.alpha"]) == 2
    weightops_here("combine", "style.safetensors", "person.safetensors", "--ema", "0.9", "--exact", *OUT)
    torch.testing.assert_close(
        change("out.safetensors"), 0.9 * change("style.safetensors") + 0.1 * change("person.safetensors")
    )
    before = Path("out.safetensors").read_bytes()
    assert "would write" in done(*OUT, "--dry-run").out
    assert Path("out.safetensors").read_bytes() == before
    assert done(*OUT, "-q").out == ""


def test_a_base_makes_loras_of_what_depends_on_it() -> None:
    stem = "model.diffusion_model.input_blocks.1.1"
    weights = {
        f"{stem}.transformer_blocks.0.attn1.to_q.weight": torch.randn(32, 32),
        f"{stem}.proj_in.weight": torch.ones(32, 32, 1, 1),
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(32, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": torch.ones(32, 16, 3, 3),
    }  # fmt: skip
    save(Path("base.safetensors"), weights)
    save(Path("style.safetensors"), lora(1, 4, 2.0) | {f"{QUERY}.dora_scale": torch.ones(32, 1)})
    found = done("--rank", 4, *OUT, code=1)
    assert found.err.splitlines() == [
        f"error: style.safetensors: {QUERY!r} is a magnitude (DoRA), whose change depends on the model's weights",
        "hint: --base CHECKPOINT, the model that the LoRAs are for, makes a LoRA of it",
    ]
    done("--rank", 4, "--base", "base.safetensors", *OUT, "--verify")
    assert rank() == 4
    assert not any("dora_scale" in key for key in load_file("out.safetensors"))


# ------------------------------------------------------------------------------------------------ what is said


def test_the_methods_are_listed_with_their_settings() -> None:
    found = weightops_here("combine", "--list-methods")
    assert found.code == 0, found.err
    assert len(ways()) > 25
    for name, method in ways():
        assert name in found.out
        assert all(parameter.name in found.out for parameter in method.parameters if parameter.kind != "Weights")
    assert "fisher" not in found.out
    assert "weights," not in found.out, "they are the files' strengths"


def test_to_look_writes_nothing() -> None:
    before = sorted(Path.cwd().iterdir())
    found = done("--interference", "-v")
    assert sorted(Path.cwd().iterdir()) == before
    assert "acts in the sum at" in found.out
    assert "style and person: cosine" in found.out
    assert QUERY in found.out
    assert "wrote" not in found.out
    whole = json.loads(done("--interference", "--json").out)
    assert whole["output"] is None
    assert {m["name"] for m in whole["interference"]["modules"]} == {QUERY, POINT, KERNEL}


def test_the_json_has_what_the_contract_names() -> None:
    found = json.loads(done("--rank", 3, *OUT, "--json").out)
    assert {"command", "version", "inputs", "output", "bytes_written", "keys", "seconds", "peak_memory_bytes",
            "warnings", "modules", "energy", "error", "interference"} <= found.keys()  # fmt: skip
    assert found["command"] == "combine"
    assert [entry["path"] for entry in found["inputs"]] == ["style.safetensors", "person.safetensors"]
    assert all(entry["hash"] for entry in found["inputs"])
    assert found["keys"] | {"unused": [], "kept": []} == {"used": 19, "copied": 1, "kept": [], "unused": []}
    module = next(entry for entry in found["modules"] if entry["name"] == QUERY)
    assert {"name", "rank_before", "rank", "energy", "error"} <= module.keys()
    assert (module["rank_before"], module["rank"]) == (4, 3)
    assert found["energy"] + found["error"] ** 2 == pytest.approx(1, abs=1e-5)


def test_the_recipe_is_shown_in_words() -> None:
    done(*OUT)
    assert "combine" in weightops_here("inspect", "out.safetensors").out


def test_strict_refuses_what_would_be_left_out() -> None:
    save(Path("person.safetensors"), lora(2, 3, 3.0) | {f"{POINT}.set_bias": torch.ones(32)})
    found = done("--strict", *OUT, code=1)
    assert found.err.startswith(
        f"error: --strict: 1 tensor would be left out: '{POINT}.set_bias'\nhint: it sets a bias"
    )
    assert not Path("out.safetensors").exists()
    assert "1 unused" in done(*OUT).out


BOTH = ("style.safetensors", "person.safetensors")


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (["style.safetensors"], 2, "error: combine: found 1 LoRA, expected two or more"),
        ([], 2, "error: missing argument"),
        (["style.safetensors", "nothing.safetensors"], 2, "error: nothing.safetensors: no such file"),
        (["style.safetensors", "person.safetensors:1e999"], 2, "error: person.safetensors: found strength inf"),
        ([*BOTH, "--exact", "--rank", "4"], 2, "error: --exact: keeps every rank"),
        ([*BOTH, "--method", "tise"], 2, "error: unknown merge method 'tise'"),
        ([*BOTH, "--set", "density"], 2, "error: --set: found 'density', expected"),
        ([*BOTH, "--rank", "many"], 2, "error: --rank: found 'many', expected"),
        ([*BOTH, "--memory", "1kB"], 2, "error: --memory: 1,000 bytes are too few"),
        ([*BOTH, "--ema", "2"], 2, "error: --ema: found '2', expected a decay"),
        ([*BOTH, "-o", "style.safetensors"], 1, "error: style.safetensors: is also"),
        ([*BOTH, "--method", "ties"], 2, "error: --rank: found none, and 3 modules"),
        (["style.safetensors", "empty.safetensors"], 1, "error: empty.safetensors: holds no adapter modules"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_told_in_a_line_and_a_hint(words: list[str], code: int, error: str) -> None:
    save(Path("empty.safetensors"), {BUNDLE: torch.ones(2, 8)})
    before = {path.name: path.read_bytes() for path in Path.cwd().iterdir()}
    found = weightops_here("combine", *words)
    assert (found.code, found.out) == (code, ""), found.err
    assert found.err.startswith(error), found.err
    assert len(found.err.splitlines()) <= 2
    assert {path.name: path.read_bytes() for path in Path.cwd().iterdir()} == before
