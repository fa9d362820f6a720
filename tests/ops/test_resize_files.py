"""resize: a file keeps its dialect, its names and its settings; what is not cut goes along; what is broken is named."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from locon import BLOCK, ENCODER, KERNEL, KEY, LAST, MODULES, POINT, QUERY, locon, matrices, off, product
from loras import Maker, convert, header, metadata_of, named, raw, save, target, tensors_of
from torch import Tensor, nn

from weightops.errors import FormatError, MismatchError, OutputError, UsageError, ValueRefused, WeightopsError
from weightops.files.checkpoint import open_checkpoint
from weightops.lora.adapters import read_adapters
from weightops.ops import cutting
from weightops.ops.resize import resize


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(report: Any) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report.details["modules"]}


def strength_stays(report: Any, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """What the report says of each module is true of what two files hold, in their own settings' terms."""
    assert before.keys() >= after.keys()
    for name, row in rows(report).items():
        key = next(k for k in before if k == name or k.replace("/", ".") == name)
        assert math.isclose(row["error"], off(before[key], after.get(key)), rel_tol=1e-3, abs_tol=1e-6), name
        assert math.isclose(row["delta_norm"], float(before[key].norm()), rel_tol=1e-5), name
    assert report.details["error"] > 0.05


# ------------------------------------------------------------------------------------------------ dialects

UNET = {m: MODULES[m] for m in MODULES if not m.startswith("lora_te")}


@pytest.mark.parametrize("rule", [4, "energy:0.9"])
@pytest.mark.parametrize("alpha", [12.0, 5.0, -1.0])
@pytest.mark.parametrize("dialect", ["kohya", "onetrainer", "comfy", "diffusers", "peft", "peft, one component"])
def test_every_dialect_stays_what_it_is(dialect: str, alpha: float, rule: int | str) -> None:
    to = dialect.partition(",")[0]
    modules = UNET if "," in dialect else MODULES
    Path("in").mkdir()
    source = target(Path("in"), to)
    convert(save(Path("lora.safetensors"), locon(modules, alpha=alpha)), to, source)
    out = Path("out") if to == "peft" else Path("out.safetensors")
    report = resize(source, rank=rule, output=out, verify=True)
    assert report.verified["modules"] == len(modules)
    first, second = raw(source), raw(out)
    if rule == 4:
        assert first.keys() == second.keys()
    assert second.keys() <= first.keys()
    # Settings that say another rank than the factors have are no settings: `deltas` looks at them.
    strength_stays(report, matrices(source), matrices(out))
    with open_checkpoint(out) as opened, open_checkpoint(source) as was:
        found, old = read_adapters(opened), read_adapters(was)
        found.check()
        assert (found.dialect, found.architecture) == (old.dialect, old.architecture)
        assert {k for k in opened.metadata if k != "weightops"} == {k for k in was.metadata if k != "weightops"}
    if to == "peft":
        assert sorted(p.relative_to(out) for p in out.rglob("*")) == sorted(
            p.relative_to(source) for p in source.rglob("*")
        )


def test_settings_in_diffusers_header_say_ranks_and_alphas() -> None:
    source = Path("in.safetensors")
    convert(save(Path("lora.safetensors"), locon(alpha=6.0)), "diffusers", source)
    report = resize(source, rank="energy:0.9", output="out.safetensors")
    flat = json.loads(metadata_of(Path("out.safetensors"))["lora_adapter_metadata"])
    assert {key.partition(".")[0] for key in flat} == {"unet", "text_encoder"}
    for name, row in rows(report).items():
        component, _, module = name.partition(".")
        module = module.removeprefix("text_model.")
        assert flat[f"{component}.rank_pattern"].get(module, flat[f"{component}.r"]) == row["rank"]
        assert flat[f"{component}.alpha_pattern"].get(module, flat[f"{component}.lora_alpha"]) == row["rank"] / 2


def test_a_header_that_speaks_of_one_component_says_nothing_of_the_other() -> None:
    source = Path("in.safetensors")
    convert(save(Path("lora.safetensors"), locon(alpha=6.0)), "diffusers", source)
    flat = json.loads(metadata_of(source)["lora_adapter_metadata"])
    flat = {k: v for k, v in flat.items() if k.startswith("unet.")}
    save(source, tensors_of(source), {"lora_adapter_metadata": json.dumps(flat)})
    report = resize(source, rank=5, output="out.safetensors")
    strength_stays(report, matrices(source), matrices(Path("out.safetensors")))
    written = json.loads(metadata_of(Path("out.safetensors"))["lora_adapter_metadata"])
    assert {key.partition(".")[0] for key in written} == {"unet"}


# What stands before and after a module's name in files that nobody writes any more, or a single tool does.
STYLES = {
    "diffusers 0.19": ("", ".attn1.processor.to_q_lora.{}.weight", ("up", "down")),
    "diffusers 0.20": ("unet.", ".attn1.processor.to_q_lora.{}.weight", ("up", "down")),
    "diffusers 0.25": ("unet.", ".attn1.to_q.lora.{}.weight", ("up", "down")),
    "bare, kohya's endings": ("", ".attn1.to_q.lora_{}.weight", ("up", "down")),
    "bare": ("", ".attn1.to_q.lora_{}.weight", ("B", "A")),
    "default": ("base_model.model.", ".attn1.to_q.lora_{}.default.weight", ("B", "A")),
    "mochi": ("", ".attn1.to_q.lora_{}", ("B", "A")),
    "of nobody": ("lora_unet_", "_tower_attn1_mix.lora_{}.weight", ("up", "down")),
    "comfy, of nobody": ("diffusion_model.", ".tower.attn1.mix.lora_{}.weight", ("B", "A")),
}


@pytest.mark.parametrize("style", STYLES)
def test_names_stay_what_they_are_whoever_knows_them(style: str) -> None:
    """Without an alpha, such a file is as strong as it stands, and so is what is written."""
    before, after, sides = STYLES[style]
    blocks = ["down_blocks.0.attentions.0.transformer_blocks.0", "down_blocks.1.attentions.0.transformer_blocks.0"]
    tensors = {}
    for number, block in enumerate(blocks):
        pair = product(torch.Generator().manual_seed(number), (32, 24), [0.7**i for i in range(9)])
        name = block.replace(".", "_") if before == "lora_unet_" else block
        tensors |= {before + name + after.format(side): t for side, t in zip(sides, pair, strict=True)}
    source = save(Path("lora.safetensors"), tensors)
    report = resize(source, rank="energy:0.9", output="out.safetensors", verify=True)
    written = tensors_of(Path("out.safetensors"))
    assert written.keys() == tensors.keys()
    ups = sorted(k for k in tensors if k.endswith(after.format(sides[0])))
    for key, row in zip(ups, sorted(report.details["modules"], key=lambda row: row["name"]), strict=True):
        other = key[: -len(after.format(sides[0]))] + after.format(sides[1])
        was, now = (found[key].double() @ found[other].double() for found in (tensors, written))
        assert row["rank"] == len(written[other]) < 9
        assert math.isclose(row["error"], off(was, now), rel_tol=1e-3)


# ------------------------------------------------------------------------------------------------ PEFT


class Tower(nn.Module):
    """Names that nobody knows, one of which ends another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = {
            "to_q": nn.Linear(24, 32),
            "to_k": nn.Linear(24, 32),
            "conv": nn.Conv2d(8, 16, 3),
            "proj": nn.Linear(16, 8),
        }
        self.blocks = nn.ModuleList([nn.ModuleDict(block)])
        self.proj = nn.Linear(16, 12)
        self.dummy = nn.Linear(24, 32)


def trained(config: Any, folder: Path) -> dict[str, Tensor]:
    """An adapter of the tower as PEFT saves it, with values that fall; and what PEFT says that it changes."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Tower(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(mark in name for mark in ("lora_A", "lora_B", "hada_", "lokr_")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
                axis = 0 if "lora_A" in name else 1
                if "lora_" in name:
                    falling = 0.6 ** torch.arange(parameter.shape[axis])
                    parameter.mul_(falling.reshape([-1 if a == axis else 1 for a in range(parameter.ndim)]))
    model.save_pretrained(str(folder))
    return changes(model)


def changes(model: Any) -> dict[str, Tensor]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double().flatten(1)
        for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    }  # fmt: skip


TARGETS = ["blocks.0.to_q", "blocks.0.to_k", "blocks.0.conv", "blocks.0.proj"]
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "alpha for all": ("LoraConfig", {"r": 8, "lora_alpha": 4}),
    "rank-stabilised": ("LoraConfig", {"r": 7, "lora_alpha": 3, "use_rslora": True}),
    "patterns": ("LoraConfig", {"r": 8, "lora_alpha": 16, "rank_pattern": {"to_q": 3, "conv": 6},
                                "alpha_pattern": {"to_k": 1, "blocks.0.conv": 0.1}}),
    "rank-stabilised patterns": ("LoraConfig", {"r": 8, "lora_alpha": 16, "rank_pattern": {"to_q": 3, "conv": 6},
                                                "alpha_pattern": {"to_k": 1}, "use_rslora": True}),
    "loha": ("LoHaConfig", {"r": 3, "alpha": 5}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 5}),
    "lokr, whole": ("LoKrConfig", {"r": 64, "alpha": 5}),
}  # fmt: skip


@pytest.mark.parametrize("rule", [4, "energy:0.95"])
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_loads_its_folder_again_and_acts_as_the_report_says(name: str, rule: int | str) -> None:
    peft = pytest.importorskip("peft")
    cls, words = CONFIGS[name]
    # A LoHa's kernel is flat in the file, and no table has this tower's.
    targets = [m for m in TARGETS if name != "loha" or m != "blocks.0.conv"]
    before = trained(getattr(peft, cls)(target_modules=targets, **words), Path("saved"))
    report = resize("saved", rank=rule, output="out", verify=True)
    after = changes(peft.PeftModel.from_pretrained(Tower(), "out"))
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["use_rslora"] is False
    assert before.keys() == after.keys() == set(targets)
    for key, row in rows(report).items():
        module = key.removeprefix("base_model.model.")
        assert math.isclose(row["delta_norm"], float(before[module].norm()), rel_tol=1e-5), module
        assert math.isclose(row["error"], off(before[module], after[module]), rel_tol=1e-3, abs_tol=1e-6), module
    given = json.loads(Path("saved/adapter_config.json").read_text())
    same = {"base_model_name_or_path", "task_type", "inference_mode", "revision", "auto_mapping"} & given.keys()
    assert {k: config[k] for k in same} == {k: given[k] for k in same}


def test_pefts_targets_are_the_modules_that_are_left_and_no_others() -> None:
    """`proj` is also the end of a name that is dropped: a plain list would mean both."""
    peft = pytest.importorskip("peft")
    folder = Path("saved")
    trained(peft.LoraConfig(target_modules=r"proj|blocks\.0\.proj", r=6, lora_alpha=6), folder)
    file = folder / "adapter_model.safetensors"
    tensors = tensors_of(file)
    key = "base_model.model.blocks.0.proj.lora_B.weight"
    save(file, tensors | {key: tensors[key] * 1e-4})
    report = resize(folder, rank="error:0.3", output="out")
    assert {k.removeprefix("base_model.model."): row["rank"] > 0 for k, row in rows(report).items()} == {
        "proj": True, "blocks.0.proj": False,
    }  # fmt: skip
    assert changes(peft.PeftModel.from_pretrained(Tower(), "out")).keys() == {"proj"}


def test_pefts_dora_keeps_its_magnitudes() -> None:
    peft = pytest.importorskip("peft")
    trained(peft.LoraConfig(target_modules=TARGETS[:2], r=6, lora_alpha=6, use_dora=True), Path("saved"))
    report = resize("saved", rank=2, output="out")
    assert json.loads(Path("out/adapter_config.json").read_text())["use_dora"] is True
    first, second = raw(Path("saved")), raw(Path("out"))
    keys = [key for key in first if "magnitude" in key]
    assert len(keys) == 2
    assert [first[key] for key in keys] == [second[key] for key in keys]
    assert report.warnings == ["magnitudes (DoRA) are kept, and the errors are those of ΔW without them"]
    changes(peft.PeftModel.from_pretrained(Tower(), "out"))


def test_a_base_of_other_names_does_not_tell_what_is_changed() -> None:
    peft = pytest.importorskip("peft")
    trained(peft.LoraConfig(target_modules=TARGETS[:2], r=6, lora_alpha=6, use_dora=True), Path("saved"))
    base = save(Path("base.safetensors"), Tower().state_dict())
    with pytest.raises(MismatchError, match=r"^base.safetensors: cannot tell which of its weights '.*' changes$"):
        resize("saved", rank=2, base=base, output="out")


def test_a_folder_is_named_after_its_input() -> None:
    convert(save(Path("lora.safetensors"), locon()), "peft", Path("style"))
    assert resize("style", rank=4).output == "style-4"
    assert sorted(p.name for p in Path("style-4").rglob("*.json")) == ["adapter_config.json"] * 2
    with pytest.raises(UsageError, match="a folder is written here"):
        resize("style", rank=4, output="x.safetensors")
    with pytest.raises(OutputError, match="exists"):
        resize("style", rank=4)
    resize("style", rank=4, force=True)


# ------------------------------------------------------------------------------------------------ what goes along


def test_what_is_no_factor_goes_along_to_the_bit() -> None:
    """Biases, norms, embeddings; and the bias of `up`, which is as strong as ΔW is."""
    t = Maker(2)
    more = {
        f"{KERNEL}.diff_b": t(32), f"{BLOCK}_norm.w_norm": t(320), f"{BLOCK}_norm.b_norm": t(320),
        f"{QUERY}.lora_up.bias": t(32), "bundle_emb.cat.string_to_param.*": t(2, 768), "emb_params": t(1, 768),
    }  # fmt: skip
    source = save(Path("lora.safetensors"), locon() | more)
    report = resize(source, rank="size:20kB", output="out.safetensors")
    first, second = raw(source), raw(Path("out.safetensors"))
    assert {k: second[k] for k in more} == {k: first[k] for k in more}
    assert set(report.account.copied) == set(more)
    assert rows(report)[QUERY]["rank"] >= 1
    alpha = tensors_of(Path("out.safetensors"))[f"{QUERY}.alpha"]
    assert math.isclose(float(alpha) / rows(report)[QUERY]["rank"], 0.5, rel_tol=1e-6)
    resize(source, rank=4, dtype="bf16", output="half.safetensors")
    assert {t.dtype for k, t in tensors_of(Path("half.safetensors")).items() if k in more} == {torch.bfloat16}


def test_a_module_stays_where_only_a_bias_of_it_is_left() -> None:
    tensors = locon() | {f"{QUERY}.lora_up.bias": torch.ones(32)}
    tensors[f"{QUERY}.lora_up.weight"] = tensors[f"{QUERY}.lora_up.weight"] * 1e-5
    report = resize(save(Path("lora.safetensors"), tensors), rank="error:0.2", output="out.safetensors")
    assert rows(report)[QUERY]["rank"] == 1


METADATA = {
    "ss_network_dim": "12", "ss_network_alpha": "6.0", "ss_network_module": "networks.lora", "ss_network_args": "{}",
    "ss_output_name": "style", "sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8,
    "modelspec.hash_sha256": "0x" + "0" * 64, "modelspec.title": "Style", "format": "pt",
}  # fmt: skip


def test_kohyas_metadata_is_true_of_what_is_written() -> None:
    source = save(Path("lora.safetensors"), locon(UNET), METADATA)
    resize(source, rank=4, output="out.safetensors")
    said = metadata_of(Path("out.safetensors"))
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("4", "2")
    assert (said["ss_network_module"], said["ss_network_args"]) == ("networks.lora", "{}")
    assert (said["ss_output_name"], said["modelspec.title"]) == ("style", "Style")
    digest = hashlib.sha256(header(Path("out.safetensors"))[1]).hexdigest()
    assert said["sshs_model_hash"] == digest
    assert said["modelspec.hash_sha256"] == f"0x{digest}"
    assert "sshs_legacy_hash" not in said
    recipe = json.loads(said["weightops"])
    assert (recipe["command"], recipe["rank"], recipe["inputs"][0]["name"]) == ("resize", "4", "lora.safetensors")
    resize(source, rank="energy:0.9", output="dynamic.safetensors")
    said = metadata_of(Path("dynamic.safetensors"))
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    # Where nothing is cut, what was said stays as it was spelled.
    resize(save(source, locon({QUERY: (32, 32)}), METADATA), rank=12, output="same.safetensors")
    said = metadata_of(Path("same.safetensors"))
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("12", "6.0")


def test_a_trainers_family_is_not_said_of_what_became_lora() -> None:
    t = Maker(3)
    parts = {".hada_w1_a": t(32, 2), ".hada_w1_b": t(2, 32), ".hada_w2_a": t(32, 2), ".hada_w2_b": t(2, 32)}
    source = save(Path("lora.safetensors"), named({QUERY: parts}), METADATA | {"ss_network_module": "lycoris.kohya"})
    resize(source, rank=3, output="out.safetensors")
    said = metadata_of(Path("out.safetensors"))
    assert said.keys().isdisjoint({"ss_network_module", "ss_network_args"})
    assert (said["ss_network_dim"], said["ss_output_name"]) == ("3", "style")


def test_a_file_of_whole_differences_alone_has_no_rank_to_say() -> None:
    source = save(Path("lora.safetensors"), {f"{QUERY}.diff": Maker(1)(32, 32)}, METADATA)
    report = resize(source, rank=30, output="out.safetensors", verify=True)
    assert raw(Path("out.safetensors")) == raw(source)
    assert rows(report)[QUERY]["method"] == "whole"
    assert metadata_of(Path("out.safetensors"))["ss_network_dim"] == "12"


# ------------------------------------------------------------------------------------------------ what is refused


def broken() -> dict[str, tuple[dict[str, Tensor], str]]:
    """Files that cannot be used as a whole, and what is said of them."""
    whole = locon()
    lacking = {k: t for k, t in whole.items() if k != f"{KERNEL}.lora_down.weight"}
    return {
        "lacks a factor": (lacking, rf"{KERNEL!r} has \['up'\].*but no down|{KERNEL!r} has 'up', but no down"),
        "do not meet": (whole | {f"{KERNEL}.lora_down.weight": torch.ones(5, 16, 3, 3)},
                        f"{KERNEL!r} has factors that do not meet: up .*, down"),
        "empty": (whole | {f"{KEY}.lora_down.weight": torch.ones(12, 0)}, f"{KEY!r} has an empty down"),
        "rank 0": (whole | {f"{KEY}.lora_down.weight": torch.ones(0, 24), f"{KEY}.lora_up.weight": torch.ones(32, 0)},
                   f"{KEY!r} has rank 0"),
        "two alphas": (whole | {f"{KEY}.alpha": torch.ones(2)}, rf"{KEY!r} has an alpha of shape \[2\]"),
        "an alpha that is none": (whole | {f"{KEY}.alpha": torch.tensor(math.nan)}, f"{KEY!r} has alpha nan"),
        "stranger": (whole | {"what.is.this": torch.ones(2)}, "keys of no known scheme: 'what.is.this'"),
        "checkpoint": ({"model.diffusion_model.out.2.weight": torch.ones(4, 32, 3, 3)}, "lora.safetensors: "),
        "by number": ({"unet:0:up": torch.ones(4, 2), "unet:0:down": torch.ones(2, 4)}, "names its modules by number"),
        "embedding": ({"emb_params": torch.ones(1, 768)}, "holds no adapter modules"),
        "norms": ({f"{BLOCK}_norm.w_norm": torch.ones(320)}, "has no module that can be cut to a rank"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", broken())
def test_what_is_broken_is_named(kind: str) -> None:
    tensors, message = broken()[kind]
    source = save(Path("lora.safetensors"), tensors)
    for words in ({"rank": 4}, {"rank": "energy:0.9"}, {"plan": True}):
        with pytest.raises((FormatError, MismatchError), match=message) as caught:
            resize(source, **words, **({} if "plan" in words else {"output": "out.safetensors"}))
        assert str(caught.value).startswith("lora.safetensors: ")
    assert not Path("out.safetensors").exists()


def test_a_file_that_is_cut_short_is_named() -> None:
    source = save(Path("lora.safetensors"), locon())
    source.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"^lora.safetensors: tensor '.*' ends at byte 60,044, but the file holds "):
        resize(source, rank=4, output="out.safetensors")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({}, "--rank: found none, expected a number or a rule"),
        ({"rank": 0}, "--rank: found 0, expected a rank of 1 or more"),
        ({"rank": "energi:0.9"}, "--rank: found 'energi:0.9'"),
        ({"rank": "energy:1.5"}, "--rank: found 'energy:1.5', expected energy:E"),
        ({"rank": 4, "conv_rank": "size:1MB"}, "--conv-rank: size: is of the whole file"),
        ({"rank": "size:1MB", "conv_rank": "energy:0.5"}, "--conv-rank: beside --rank size:1MB it is a number"),
        ({"rank": "error:0.1", "conv_rank": "knee"}, "--conv-rank: beside --rank error:0.1 it is a number"),
        ({"rank": 4, "dtype": "fp8_e4m3"}, "--dtype: fp8_e4m3 would leave little"),
        ({"rank": 4, "dtype": "fp12"}, "--dtype: unknown dtype 'fp12'"),
        ({"rank": 4, "device": "tpu"}, "--device"),
        ({"rank": 4, "output": "out.bin"}, "out.bin: the output's name must end in .safetensors"),
    ],
    ids=str,
)
def test_wrong_words_are_refused(words: dict[str, Any], error: str) -> None:
    source = save(Path("lora.safetensors"), locon())
    with pytest.raises(UsageError) as caught:
        resize(source, **({"output": "out.safetensors"} | words))
    assert str(caught.value).startswith(error)
    assert [p.name for p in Path().iterdir()] == ["lora.safetensors"]


def test_nothing_is_read_before_an_output_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(Path("lora.safetensors"), locon())
    save(Path("there.safetensors"), locon())
    monkeypatch.setattr(cutting, "run", lambda *_, **__: pytest.fail("it was read"))
    for rule in (4, "energy:0.9"):
        with pytest.raises(OutputError, match=r"^there.safetensors: exists"):
            resize(source, rank=rule, output="there.safetensors")
        with pytest.raises(OutputError, match=r"is also an input"):
            resize(source, rank=rule, output="lora.safetensors")
        with pytest.raises(OutputError, match="the folder 'no' does not exist"):
            resize(source, rank=rule, output="no/out.safetensors")


def test_with_force_a_file_may_take_its_own_place() -> None:
    source = save(Path("lora.safetensors"), locon())
    resize(source, rank="energy:0.9", output="out.safetensors")
    resize(source, rank="energy:0.9", output="lora.safetensors", force=True)
    assert raw(source) == raw(Path("out.safetensors"))


@pytest.mark.parametrize("rule", [4, "energy:0.9", "size:20kB"])
def test_a_dry_run_writes_nothing_and_says_the_size(rule: int | str) -> None:
    source = save(Path("lora.safetensors"), locon())
    dry = resize(source, rank=rule, output="out.safetensors", dry_run=True)
    assert [p.name for p in Path().iterdir()] == ["lora.safetensors"]
    done = resize(source, rank=rule, output="out.safetensors")
    size = Path("out.safetensors").stat().st_size
    assert done.bytes_written == size <= dry.bytes_written
    if rule == 4:
        assert dry.bytes_written == size
    else:
        (warning,) = (w for w in dry.warnings if w not in done.warnings)
        assert warning.startswith("the size is the largest that it can be: what --rank ")
        assert warning.endswith("keeps depends on the data")
    if rule == "size:20kB":
        assert dry.bytes_written == 20_000
    with pytest.raises(OutputError, match="exists"):
        resize(source, rank=rule, output="out.safetensors", dry_run=True)


@pytest.mark.parametrize("rule", [4, "energy:0.9"])
@pytest.mark.parametrize("part", ["up", "down", "alpha"])
def test_verify_sees_what_is_not_as_it_was_said(part: str, rule: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(Path("lora.safetensors"), locon({QUERY: (32, 32)}))
    genuine = cutting.produce

    def tampered(*arguments: Any, **words: Any) -> Any:
        report = genuine(*arguments, **words)
        if not words["dry_run"]:
            tensors = tensors_of(Path("out.safetensors"))
            key = f"{QUERY}.alpha" if part == "alpha" else f"{QUERY}.lora_{part}.weight"
            tensors[key] = tensors[key] * 1.1
            save(Path("out.safetensors"), tensors)
        return report

    monkeypatch.setattr(cutting, "produce", tampered)
    with pytest.raises(ValueRefused, match=f"out.safetensors: {QUERY!r} is off by .* of its norm, and .* was computed"):
        resize(source, rank=rule, output="out.safetensors", verify=True)
    resize(source, rank=rule, output="out.safetensors", force=True)


def test_verify_looks_at_what_was_kept_too() -> None:
    tensors = locon({m: MODULES[m] for m in (POINT, LAST, ENCODER)}, rank=3, alpha=None)
    report = resize(
        save(Path("lora.safetensors"), tensors), rank=6, output="out.safetensors", verify=True, dtype="bf16"
    )
    assert report.verified["modules"] == 3
    assert report.verified["largest_difference"] < 1e-6


def test_settings_that_are_no_numbers_are_refused() -> None:
    source = Path("in")
    convert(save(Path("lora.safetensors"), locon(UNET)), "peft", source)
    config = json.loads((source / "adapter_config.json").read_text())
    for wrong in ({"lora_alpha": "much"}, {"alpha_pattern": {"(a+)+": 1}}, {"lora_alpha": math.nan}):
        shutil.rmtree("torn", ignore_errors=True)
        shutil.copytree(source, "torn")
        Path("torn/adapter_config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(WeightopsError, match="alpha"):
            resize("torn", rank=4, output="out")
