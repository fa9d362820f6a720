"""inspect and merge from the command line: words in, report out."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commandline import STYLES, weightops_here
from conftest import CLI, save
from safetensors.torch import load_file

from weightops import __version__
from weightops.cli import render
from weightops.merging.method import METHODS

UNET = "model.diffusion_model.out.2.weight"
VAE = "first_stage_model.decoder.conv_in.weight"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("a", 1.0), ("b", 3.0), ("c", 8.0)):
        save(Path(f"{name}.safetensors"), {UNET: torch.full((4,), value), VAE: torch.full((2,), value)}, {"of": name})


def merged(*words: object) -> dict[str, list[float]]:
    done = weightops_here("merge", *words, "-o", "out.safetensors", "--force")
    assert done.code == 0, done.err
    return {key: tensor.tolist() for key, tensor in load_file("out.safetensors").items()}


# ------------------------------------------------------------------------------------------------ merge


def test_the_command_that_everyone_types_works_just_so() -> None:
    """In a process of its own, in a folder, without any other word."""
    words = [sys.executable, str(CLI), "merge", "a.safetensors", "b.safetensors", "--alpha", "0.75"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert load_file("a+b-0.75.safetensors")[UNET].tolist() == [2.5] * 4
    assert load_file("a+b-0.75.safetensors")[VAE].tolist() == [1.0] * 2
    lines = done.stdout.splitlines()
    assert lines[0] == "0.25 × a + 0.75 × b"
    assert "1 used, 1 copied, 1 unused" in lines
    assert "       1  b.safetensors: the VAE is taken from model 1" in lines
    assert any(re.fullmatch(r"wrote  a\+b-0\.75\.safetensors  [0-9.]+ k?B", line) for line in lines)
    assert re.search(r"[0-9.]+ s, .*/s, peak memory [0-9]+ MiB", done.stdout)


@pytest.mark.parametrize(
    ("words", "unet", "vae"),
    [
        (["--weights", "1,3"], 2.5, 1.0),
        (["--weights", "1,3", "--no-normalize"], 10.0, 1.0),
        (["--base", "c.safetensors"], -4.0, 1.0),
        (["--base", "c.safetensors", "--alpha", "-1"], 6.0, 1.0),
        (["--vae", "2"], 2.0, 3.0),
        (["--vae", "merge"], 2.0, 2.0),
        (["--vae", "c.safetensors"], 2.0, 8.0),
        (["--method", "weighted_sum", "--alpha", "1"], 3.0, 1.0),
        (["--device", "cpu", "--threads", "2", "--memory", "64MiB"], 2.0, 1.0),
        (["--text-encoder", "merge", "--on-mismatch", "keep-first", "--strict", "--verify"], 2.0, 1.0),
        (["--dtype", "fp16"], 2.0, 1.0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_option_reaches_the_work(words: list[str], unet: float, vae: float) -> None:
    assert merged("a.safetensors", "b.safetensors", *words) == {UNET: [unet] * 4, VAE: [vae] * 2}


def test_several_components_are_dropped_at_once() -> None:
    assert merged("a.safetensors", "b.safetensors", "--drop", "vae, ema").keys() == {UNET}


def test_a_dry_run_writes_nothing_and_says_the_size() -> None:
    before = sorted(Path().iterdir())
    done = weightops_here("merge", "a.safetensors", "b.safetensors", "--dry-run", "-o", "out.safetensors")
    assert (done.code, done.err) == (0, "")
    assert sorted(Path().iterdir()) == before
    real = weightops_here("merge", "a.safetensors", "b.safetensors", "-o", "out.safetensors", "--json")
    size = json.loads(real.out)["bytes_written"]
    assert size == Path("out.safetensors").stat().st_size
    assert f"would write out.safetensors  {size} B" in done.out.splitlines()
    dry = weightops_here("merge", "a.safetensors", "b.safetensors", "--dry-run", "-o", "new.safetensors", "--json")
    assert json.loads(dry.out)["dry_run"] is True


def test_an_existing_file_is_replaced_only_when_forced() -> None:
    Path("out.safetensors").write_text("mine")
    words = ["merge", "a.safetensors", "b.safetensors", "-o", "out.safetensors"]
    done = weightops_here(*words)
    assert (done.code, done.err.splitlines()[0]) == (1, "error: out.safetensors: exists")
    assert Path("out.safetensors").read_text() == "mine"
    assert weightops_here(*words, "--force").code == 0
    assert load_file("out.safetensors")[UNET].tolist() == [2.0] * 4


def test_json_is_one_document_and_nothing_else() -> None:
    done = weightops_here("merge", "a.safetensors", "b.safetensors", "--json", "--verify")
    found = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert found.keys() >= {
        "command", "version", "inputs", "output", "bytes_written", "keys", "seconds", "peak_memory_bytes", "warnings",
    }  # fmt: skip
    assert (found["command"], found["version"]) == ("merge", __version__)
    assert all(entry.keys() == {"path", "hash", "bytes"} for entry in found["inputs"])
    assert found["keys"].keys() >= {"used", "copied", "unused"}
    assert all(entry.keys() >= {"key", "reason"} for entry in found["keys"]["unused"])
    assert found["verified"]["largest_ulp"] <= 1.0


def test_a_quiet_merge_says_nothing_but_what_is_wrong() -> None:
    assert weightops_here("merge", "a.safetensors", "b.safetensors", "-q") == (0, "", "")
    save(Path("d.safetensors"), {UNET: torch.ones(4), "new": torch.ones(1)})
    done = weightops_here("merge", "a.safetensors", "d.safetensors", "-q")
    assert (done.code, done.out) == (0, "")
    assert (
        done.err.splitlines()
        == [
            f"warning: 1 tensor kept from a.safetensors unmerged: '{VAE}'",
            "warning: 1 tensor of d.safetensors left out: 'new'",
        ]
        or VAE not in done.err
    )
    assert weightops_here("merge", "a.safetensors", "a.safetensors", "b.safetensors", "--alpha", "1", "-q").code == 2


def test_a_talkative_merge_names_every_key_and_hash() -> None:
    words = ["merge", "a.safetensors", "b.safetensors", "-o", "out.safetensors", "--force"]
    plain, talkative = weightops_here(*words), weightops_here(*words, "-v")
    assert VAE not in plain.out
    assert VAE in talkative.out
    assert len(re.findall("xxh3_128:[0-9a-f]{32}", talkative.out)) == 2
    assert "xxh3_128" not in plain.out


def test_verify_says_how_close_the_result_is() -> None:
    done = weightops_here("merge", "a.safetensors", "b.safetensors", "--verify")
    assert re.search(r"verified: 2 samples, [0-9,]+ values, at most 0\.[0-9]{2} ulp from float64", done.out)


def test_the_methods_are_listed_without_any_model() -> None:
    done = weightops_here("merge", "--list-methods")
    assert (done.code, done.err) == (0, "")
    for name, method in METHODS:
        assert name in done.out
        assert method.summary.split()[0] in done.out
        assert all(parameter.name in done.out for parameter in method.parameters)


def test_settings_reach_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr("weightops.cli.merge.merge", lambda *models, **words: found.append(words["parameters"]))
    monkeypatch.setattr("weightops.cli.render.report", lambda *_, **__: None)
    weightops_here("merge", "a", "b", "--set", "share=0.5", "--set", "name=x=y")
    assert found == [{"share": "0.5", "name": "x=y"}]


# ------------------------------------------------------------------------------------------------ inspect


def test_inspect_says_what_a_file_is() -> None:
    done = weightops_here("inspect", "a.safetensors")
    assert (done.code, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["a.safetensors"]
    assert lines[1][0] == "checkpoint"
    assert ["model", "1", "4", "16", "B", "F32"] in lines
    assert ["vae", "1", "2", "8", "B", "F32"] in lines
    assert next(line for line in lines if line[:1] == ["total"])[:3] == ["total", "2", "6"]
    assert ["of", "a"] in lines


def test_inspect_draws_a_tree_of_the_tensors_asked_for() -> None:
    done = weightops_here("inspect", "a.safetensors", "--tensors", "*conv_in*")
    assert "1 tensor" in done.out.splitlines()
    assert "F32 [2]" in done.out
    assert "F32 [4]" not in done.out
    everything = weightops_here("inspect", "a.safetensors", "--tensors")
    assert "F32 [4]" in everything.out


def test_the_tree_joins_single_children_and_wraps_nothing() -> None:
    tensors = {
        "a.b.c.x": torch.ones(2),
        "a.b.c.y": torch.ones(3).half(),
        "a.d": torch.ones(1),
        "z" * 300: torch.ones(1),
    }
    save(Path("t.safetensors"), tensors)
    done = weightops_here("inspect", "t.safetensors", "--tensors", "*")
    assert done.out.split("\n\n")[-1].splitlines() == [
        "4 tensors",
        "├── a.",
        "│   ├── b.c.",
        "│   │   ├── x  F32 [2]",
        "│   │   └── y  F16 [3]",
        "│   └── d  F32 [1]",
        f"└── {'z' * 300}  F32 [1]",
    ]


def test_inspect_names_what_is_not_finite() -> None:
    save(Path("bad.safetensors"), {"x": torch.tensor([1.0, torch.nan, torch.inf]), "y": torch.ones(2)})
    done = weightops_here("inspect", "bad.safetensors", "--stats")
    assert "x: norm 1, 1 … 1, NaN 1, Inf 1" in done.out
    assert "y:" not in done.out
    assert "no NaN, no Inf" in weightops_here("inspect", "a.safetensors", "--stats").out


def zeros(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {key: torch.zeros(shape) for key, shape in shapes.items()}


def described(words: list[str], *more: str) -> list[str]:
    """What inspect says of a file between its name and its tables."""
    done = weightops_here("inspect", *words, *more)
    assert (done.code, done.err) == (0, "")
    return done.out.split("\n\n")[0].splitlines()[1:]


def test_inspect_says_whose_names_the_tensors_bear() -> None:
    save(Path("sd.safetensors"), {"model.diffusion_model.input_blocks.1.1.proj_in.weight": torch.ones(2, 2, 1, 1)})
    assert described(["sd.safetensors"]) == [
        "checkpoint · sd15 · original names",
        "safetensors · 4 parameters · 144 B",
    ]


def test_inspect_names_the_variant_where_it_says_more_than_the_architecture() -> None:
    conv = {"input_blocks.0.0.weight": (320, 9, 3, 3), "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1)}
    save(Path("inpaint.safetensors"), zeros(conv))
    done = weightops_here("inspect", "inpaint.safetensors")
    assert "checkpoint · sd15 (sd15_inpaint) · original names" in done.out.splitlines()
    assert ["unet", "sd15_inpaint", "2"] in [line.split()[:3] for line in done.out.splitlines()]
    save(
        Path("vae.safetensors"),
        zeros({"decoder.conv_in.weight": (512, 16, 3, 3), "encoder.conv_out.weight": (32, 512, 3, 3)}),
    )
    assert described(["vae.safetensors"])[0] == "vae · flux_vae · original names"


def test_inspect_says_what_it_cannot_tell() -> None:
    save(Path("x.safetensors"), zeros({"transformer_blocks.0.norm1.linear.weight": (18432, 3072)}))
    assert described(["x.safetensors"])[0] == "unknown · cannot tell: flux or hunyuan_video"
    table = weightops_here("inspect", "x.safetensors", "a.safetensors").out.splitlines()
    assert "flux or hunyuan_video" in table[1]


ATTN = "transformer_blocks_0_attn"


def lora(**ranks: int) -> dict[str, torch.Tensor]:
    """A LoRA for Stable Diffusion 1: module -> rank; each alpha is half of it."""
    found = {}
    for name, rank in ranks.items():
        width = 768 if "attn2_to_k" in name else 320
        found |= zeros({f"{name}.lora_down.weight": (rank, width), f"{name}.lora_up.weight": (320, rank)})
        found[f"{name}.alpha"] = torch.tensor(rank / 2)
    return found


NAMES = [f"lora_unet_down_blocks_0_attentions_{i}_{ATTN}{j}_to_{x}" for i in (0, 1) for j in (1, 2) for x in "qk"]


def test_inspect_says_in_a_line_what_a_lora_is() -> None:
    save(Path("l.safetensors"), lora(**dict.fromkeys(NAMES, 16)))
    assert described(["l.safetensors"]) == [
        "sd15 LoRA · kohya · lora · rank 16 (8 modules) · alpha 8 · unet 8",
        "safetensors · 96.3 k parameters · 388.5 kB · F32",
    ]


def test_inspect_counts_what_not_all_modules_of_a_lora_have() -> None:
    tensors = lora(**dict.fromkeys(NAMES, 16)) | lora(**{NAMES[0]: 8})
    del tensors[f"{NAMES[1]}.alpha"]
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors |= zeros({f"{text}.lokr_w1": (4, 4), f"{text}.lokr_w2": (192, 192)})
    save(Path("l.safetensors"), tensors)
    assert described(["l.safetensors"])[0] == (
        "sd15 LoRA · kohya · lora 8, lokr 1 · rank 16 (7), 8 (1) · alpha 8 (6), 4 (1) · unet 8, text_encoder 1"
    )
    save(Path("many.safetensors"), lora(**{name: 2 * i + 2 for i, name in enumerate(NAMES)}))
    assert described(["many.safetensors"])[0] == (
        "sd15 LoRA · kohya · lora · ranks 2 to 16 (8 modules) · alphas 1 to 8 · unet 8"
    )


def test_inspect_says_which_models_a_lora_may_be_for() -> None:
    factors = {"lora_A.weight": (4, 3072), "lora_B.weight": (3072, 4)}
    save(Path("l.safetensors"), zeros({f"transformer.transformer_blocks.0.norm1_context.linear.{k}": s for k, s in
                                       {**factors, "lora_B.weight": (18432, 4)}.items()}))  # fmt: skip
    assert described(["l.safetensors"])[0] == (
        "LoRA · cannot tell: flux or hunyuan_video · diffusers · lora · rank 4 (1 module) · no alpha"
    )
    save(Path("u.safetensors"), zeros({f"diffusion_model.nothing.known.{k}": s for k, s in factors.items()}))
    assert described(["u.safetensors"]) == [
        "LoRA · of no known model · comfy · lora · rank 4 (1 module) · no alpha",
        "safetensors · 24.6 k parameters · 98.5 kB · F32",
        "1 module of no known name: 'diffusion_model.nothing.known'",
    ]
    save(Path("c.safetensors"), zeros({"unet:0:up": (320, 4), "unet:0:down": (4, 320)}))
    assert described(["c.safetensors"])[0] == "LoRA · cloneofsimo · 1 module"


def test_inspect_names_at_most_five_of_what_is_strange_and_all_of_it_with_v() -> None:
    tensors = lora(**dict.fromkeys(NAMES, 16))
    for name in NAMES[:7]:
        del tensors[f"{name}.lora_up.weight"]
    tensors |= {f"odd.{i}": torch.ones(1) for i in range(7)} | {"<token>": torch.ones(4)}
    save(Path("l.safetensors"), tensors)
    lines = described(["l.safetensors"])[2:]
    assert lines[0] == "7 keys of no known scheme: 'odd.0', 'odd.1', 'odd.2', 'odd.3', 'odd.4' (and 2 more)"
    assert lines[1] == "1 embedding: '<token>'"
    assert sum(line.startswith("problem: 'lora_unet_down_blocks_0_attentions_") for line in lines[2:7]) == 5
    assert lines[7:] == ["(and 2 more problems; -v shows them)"]
    talkative = described(["l.safetensors"], "-v")[2:]
    assert talkative[0].endswith("'odd.5', 'odd.6'")
    assert sum(line.startswith("problem: ") for line in talkative) == 7


def test_inspect_names_strange_keys_of_a_known_model() -> None:
    blocks = {f"double_blocks.{i}.img_mod.lin.weight": (8, 4) for i in range(20)}
    known = {"img_in.weight": (4, 4), "guidance_in.in_layer.weight": (4, 4)}
    save(Path("m.safetensors"), zeros({**blocks, **known, "strange.weight": (1,), "odd": (1,)}))
    assert described(["m.safetensors"])[2:] == ["2 strange keys: 'odd', 'strange.weight'"]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_on_a_terminal_lines_are_broken_between_words(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    save(Path("l.safetensors"), lora(**dict.fromkeys(NAMES, 16)))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(width))
    lines = STYLES.sub("", weightops_here("inspect", "l.safetensors").out).splitlines()[1:]
    assert max(map(len, lines)) <= width
    assert len(lines) == (4 if width == 40 else 2)
    assert " · ".join(lines) == (
        "sd15 LoRA · kohya · lora · rank 16 (8 modules) · alpha 8 · unet 8 · "
        "safetensors · 96.3 k parameters · 388.5 kB · F32"
    )


def test_the_norm_of_very_large_values_is_still_a_number() -> None:
    save(Path("huge.safetensors"), {"x": torch.full((4,), 1e300, dtype=torch.float64)})
    done = weightops_here("inspect", "huge.safetensors", "--stats")
    assert (done.code, done.err) == (0, "")
    assert "1 floating tensors: norm 2e+300" in done.out


def test_in_a_pipe_every_row_is_one_line() -> None:
    name = "long-" * 40 + ".safetensors"
    for path in (Path(name), Path("x.safetensors")):
        save(path, {"x": torch.ones(4)})
    assert sum(name in line for line in weightops_here("inspect", name, "x.safetensors").out.splitlines()) == 1


def test_the_progress_bar_waits_for_something_to_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal := io.StringIO())
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    with render.progress("merging", quiet=False) as on_progress:
        assert "merging" not in terminal.getvalue()
        on_progress(1, 2)
    assert "merging" in terminal.getvalue()


def test_inspect_as_json_is_one_object_or_an_array() -> None:
    one = json.loads(weightops_here("inspect", "a.safetensors", "--json").out)
    assert one.keys() >= {
        "path", "kind", "architecture", "spelling", "tensors", "parameters", "bytes", "dtypes", "components",
        "metadata",
    }  # fmt: skip
    assert all(entry.keys() >= {"tensors", "parameters", "dtypes"} for entry in one["components"].values())
    several = json.loads(weightops_here("inspect", "a.safetensors", "b.safetensors", "--json").out)
    assert several == [one, {**one, "path": "b.safetensors", "metadata": {"of": "b"}}]
    all_of_it = json.loads(weightops_here("inspect", "a.safetensors", "--json", "--stats", "--hash", "--tensors").out)
    assert all_of_it.keys() - one.keys() == {"tensor_list", "stats", "hashes"}


def test_several_files_are_one_table_or_each_in_full() -> None:
    table = weightops_here("inspect", "a.safetensors", "b.safetensors").out.splitlines()
    assert len(table) == 3
    assert table[0].split() == ["file", "kind", "architecture", "tensors", "parameters", "size", "dtypes"]
    full = weightops_here("inspect", "a.safetensors", "b.safetensors", "--hash").out
    assert full.count("sha256") == 2


# ------------------------------------------------------------------------------------------------ colours


def test_there_are_no_colours_in_a_pipe_and_none_where_NO_COLOR_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["merge", "a.safetensors", "b.safetensors", "-o", "out.safetensors", "--force"]
    assert "\x1b" not in weightops_here(*words).out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = weightops_here(*words).out
    assert "\x1b[32m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    plain = weightops_here(*words).out
    found = {code for style in STYLES.findall(plain) for code in style[2:-1].split(";")}
    assert not {code for code in found if code not in ("", "0", "1", "2")}


def test_what_is_strange_is_coloured_and_without_colour_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    save(Path("l.safetensors"), lora(**dict.fromkeys(NAMES, 16)) | {"odd": torch.ones(1)})
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = weightops_here("inspect", "l.safetensors").out
    assert "\x1b[33m1 key of no known scheme: 'odd'\x1b[0m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    plain = weightops_here("inspect", "l.safetensors").out
    assert "\x1b[33m" not in plain
    assert STYLES.sub("", plain) == STYLES.sub("", coloured)
