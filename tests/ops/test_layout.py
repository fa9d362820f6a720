"""convert --to: each key has its place, every byte comes back, and diffusers loads what is written."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import CLI, save
from safetensors.torch import load_file
from tiny import (
    PIPELINES,
    canonical,
    checkpoint,
    diffusers,
    from_canonical,
    from_single_file,
    image,
    loaded,
    single_file,
    words_of,
)

from weightops.errors import MismatchError, UsageError, ValueRefused, WeightopsError
from weightops.files.checkpoint import Checkpoint, open_checkpoint
from weightops.files.tensor import TensorInfo, TensorSpec
from weightops.naming.identify import identify
from weightops.naming.keymap import ARCHITECTURES
from weightops.ops.convert import convert
from weightops.ops.layout import Wish, plan_layout

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from weightops.ops.report import Report

NAMES = ["sd15", "sd2", "sdxl", "sdxl_refiner"]
every_model = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Each tiny pipeline with its single file, made once."""
    return {name: checkpoint(name, tmp_path_factory.mktemp(name)) for name in NAMES}


def to_folder(path: Path, output: Path, **rest: Any) -> Report:
    return convert(path, to="diffusers", output=output, **{"no_tokenizer": "like" not in rest, **rest})


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key]) for key, tensor in found.items()
    )


def text_of(error: WeightopsError) -> tuple[str, str | None]:
    return str(error), error.hint


# ------------------------------------------------------------------------------------------------ there and back


@every_model
def test_a_single_file_becomes_a_folder_and_comes_back_bit_for_bit(name: str, made: Any, tmp_path: Path) -> None:
    _, path = made[name]
    there = to_folder(path, tmp_path / "out", check=True)
    back = convert(tmp_path / "out", to="original", output=tmp_path / "back.safetensors", check=True)
    given = load_file(path)
    assert same(load_file(tmp_path / "back.safetensors"), given)
    nbytes = sum(t.numel() * t.element_size() for t in given.values())
    assert there.checked == {"tensors": len(given), "bytes": nbytes}
    assert back.checked is not None
    assert back.checked["bytes"] == nbytes


@every_model
def test_the_folder_holds_the_pipelines_own_tensors_by_name(name: str, made: Any, tmp_path: Path) -> None:
    pipe, path = made[name]
    to_folder(path, tmp_path / "out")
    for component in ARCHITECTURES.get(name).components:
        stem = "model" if component.name.startswith("text") else "diffusion_pytorch_model"
        found = load_file(tmp_path / "out" / component.name / f"{stem}.safetensors")
        assert same(found, canonical(getattr(pipe, component.name)))


@every_model
def test_from_pretrained_loads_the_folder_and_draws_the_same_image(name: str, made: Any, tmp_path: Path) -> None:
    """With configurations that follow from shapes alone: --like gives the tokenizers and nothing else."""
    pipe, path = made[name]
    words = {"prediction": "epsilon"} if name == "sd2" else {}
    report = to_folder(path, tmp_path / "out", like=words_of(pipe, tmp_path / "like"), **words)
    assert report.warnings == []
    found = loaded(tmp_path / "out", PIPELINES[name])
    assert (image(found) == image(pipe)).all()


@every_model
def test_from_single_file_loads_what_is_written_as_original(name: str, made: Any, tmp_path: Path) -> None:
    pipe, _ = made[name]
    pipe.save_pretrained(tmp_path / "ref")
    convert(tmp_path / "ref", to="original", output=tmp_path / "one.safetensors")
    found = from_single_file(tmp_path / "one.safetensors", PIPELINES[name], tmp_path / "ref")
    for component in ARCHITECTURES.get(name).components:
        assert same(getattr(found, component.name).state_dict(), getattr(pipe, component.name).state_dict())


def test_a_folder_that_diffusers_saved_keeps_its_settings_in_another_dtype(made: Any, tmp_path: Path) -> None:
    pipe, _ = made["sdxl"]
    pipe.save_pretrained(tmp_path / "ref")
    to_folder(tmp_path / "ref", tmp_path / "out", dtype="fp16", no_tokenizer=False)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "ref")
    for path in files_of(tmp_path / "out"):
        if path.endswith(".json"):
            assert (tmp_path / "out" / path).read_bytes() == (tmp_path / "ref" / path).read_bytes()
    found = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert same(found, {key: tensor.half() for key, tensor in canonical(pipe.unet).items()})


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# ------------------------------------------------------------------------------------------------ bytes


def test_a_conversion_and_its_check_never_import_torch(made: Any, tmp_path: Path) -> None:
    """SDXL's second text encoder is taken apart, and its projection transposed."""
    program = (
        f"import sys; sys.path.insert(0, {str(CLI.parent)!r}); from weightops.ops.convert import convert;"
        f"convert({str(made['sdxl'][1])!r}, to='diffusers', output='out', no_tokenizer=True, check=True);"
        "convert('out', to='original', output='back.safetensors', check=True, verify=True);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_bytes_depend_neither_on_memory_nor_on_threads(made: Any, tmp_path: Path) -> None:
    for number, (memory, threads) in enumerate([(4 << 20, 1), (256 << 20, 3)]):
        to_folder(made["sdxl"][1], tmp_path / str(number), memory=memory, threads=threads)
    assert files_of(tmp_path / "0") == files_of(tmp_path / "1")
    for path in files_of(tmp_path / "0"):
        assert (tmp_path / "0" / path).read_bytes() == (tmp_path / "1" / path).read_bytes()


def test_a_dry_run_writes_nothing_and_knows_the_size(made: Any, tmp_path: Path) -> None:
    dry = to_folder(made["sd15"][1], tmp_path / "out", dry_run=True, check=True)
    assert list(tmp_path.iterdir()) == []
    assert dry.checked is None
    assert dry.bytes_written == to_folder(made["sd15"][1], tmp_path / "out").bytes_written
    assert dry.bytes_written == sum((tmp_path / "out" / path).stat().st_size for path in files_of(tmp_path / "out"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_every_width_of_an_element_is_transposed(dtype: torch.dtype, made: Any, tmp_path: Path) -> None:
    given = {key: tensor.to(dtype) for key, tensor in load_file(made["sdxl"][1]).items()}
    to_folder(save(tmp_path / "a.safetensors", given), tmp_path / "out", check=True)
    found = load_file(tmp_path / "out" / "text_encoder_2" / "model.safetensors")["text_projection.weight"]
    key = "conditioner.embedders.1.model.text_projection"
    assert torch.equal(found.view(torch.uint8), given[key].T.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_a_cast_on_the_way_is_the_cast_of_what_arrives(dtype: str, made: Any, tmp_path: Path) -> None:
    to_folder(made["sdxl"][1], tmp_path / "plain")
    report = to_folder(made["sdxl"][1], tmp_path / "cast", dtype=dtype, verify=True)
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    for path in (p for p in files_of(tmp_path / "plain") if p.endswith(".safetensors")):
        expected = {key: tensor.to(kind) for key, tensor in load_file(tmp_path / "plain" / path).items()}
        assert same(load_file(tmp_path / "cast" / path), expected)
    assert bool(report.account.used) == (dtype != "fp32")


# ------------------------------------------------------------------------------------------------ --check


def broken_after(monkeypatch: pytest.MonkeyPatch, offset: int, path: str) -> None:
    """A disk that changes one byte of the file once it is written; offset: from its end."""
    from weightops.ops import convert as module

    real = module.produce

    def produce(command: str, planned: Any, output: Path, **rest: Any) -> Report:
        report = real(command, planned, output, **rest)
        file = output / path if path else output
        data = bytearray(file.read_bytes())
        data[-offset] ^= 1
        file.write_bytes(data)
        return report

    monkeypatch.setattr(module, "produce", produce)


HINT = "the disk or the memory of this machine may be failing; run again, and report it if it stays"


def test_one_flipped_bit_is_found_and_named(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_after(monkeypatch, 1, "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueRefused) as caught:
        to_folder(made["sd15"][1], tmp_path / "out", check=True)
    key = "up_blocks.3.resnets.2.time_emb_proj.weight"
    at = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")[key].numel() * 4 - 1
    assert text_of(caught.value) == (
        f"{tmp_path}/out: tensor 'model.diffusion_model.output_blocks.11.0.emb_layers.1.weight' comes back from "
        f"{key!r} with another byte at {at:,}",
        HINT,
    )


def test_a_flipped_bit_of_the_transposed_matrix_is_found(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_after(monkeypatch, 1, "text_encoder_2/model.safetensors")
    with pytest.raises(ValueRefused) as caught:
        to_folder(made["sdxl"][1], tmp_path / "out", check=True)
    assert text_of(caught.value) == (
        f"{tmp_path}/out: tensor 'conditioner.embedders.1.model.text_projection' comes back from "
        "'text_projection.weight' with other bytes",
        HINT,
    )


def test_a_flipped_bit_of_a_copy_under_the_same_names_is_found(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a.safetensors", {"x": torch.zeros(3, dtype=torch.int8)})
    broken_after(monkeypatch, 2, "")
    with pytest.raises(ValueRefused) as caught:
        convert(tmp_path / "a.safetensors", output=tmp_path / "b.safetensors", check=True)
    assert text_of(caught.value) == (
        f"{tmp_path}/b.safetensors: tensor 'x' comes back from 'x' with another byte at 1", HINT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "proj_out.bias"}, "tensor 'proj_out.bias' is missing in it"),
        (
            lambda t: t | {"proj_out.bias": t["proj_out.bias"].double()},
            "tensor 'final_layer.linear.bias' is F32, but comes back as F64",
        ),
        (
            lambda t: t | {"proj_out.bias": torch.cat([t["proj_out.bias"]] * 2)},
            "tensor 'final_layer.linear.bias' does not come back whole",
        ),
    ],
    ids=["missing", "another dtype", "another size"],
)
def test_an_output_that_is_another_file_is_found_out(
    change: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightops.ops import convert as module

    convert(save(tmp_path / "a.safetensors", flux()), to="original", output=tmp_path / "b.safetensors")
    real = module.produce

    def produce(command: str, planned: Any, output: Path, **rest: Any) -> Report:
        report = real(command, planned, output, **rest)
        file = output / "diffusion_pytorch_model.safetensors"
        save(file, change(load_file(file)))
        return report

    monkeypatch.setattr(module, "produce", produce)
    with pytest.raises(ValueRefused) as caught:
        to_folder(tmp_path / "b.safetensors", tmp_path / "out", check=True)
    assert text_of(caught.value) == (f"{tmp_path}/out: {message}", HINT)


def test_a_check_of_casts_is_wrong_use(made: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        to_folder(made["sd15"][1], tmp_path / "out", check=True, dtype="fp16")
    assert text_of(caught.value) == (
        f"--check: compares bytes, but --dtype fp16 changes those of {len(load_file(made['sd15'][1])):,} tensors",
        "check without --dtype, and cast the result; --verify compares what a cast should give",
    )
    assert list(tmp_path.iterdir()) == []
    assert to_folder(made["sd15"][1], tmp_path / "out", check=True, dtype="fp32").checked is not None


# ------------------------------------------------------------------------------------------------ shards


def test_shards_of_a_folder_are_opened_by_us_and_by_diffusers(made: Any, tmp_path: Path) -> None:
    pipe, path = made["sdxl"]
    to_folder(path, tmp_path / "out", shard_size=4 << 20, check=True, like=words_of(pipe, tmp_path / "like"))
    held = files_of(tmp_path / "out")
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in held
    assert sum(p.startswith("unet/diffusion_pytorch_model-0") for p in held) > 5
    assert "text_encoder/model.safetensors" in held
    with open_checkpoint(tmp_path / "out") as opened:
        assert opened.components == ("text_encoder", "text_encoder_2", "unet", "vae")
    found = loaded(tmp_path / "out", PIPELINES["sdxl"])
    assert same(found.unet.state_dict(), pipe.unet.state_dict())
    convert(tmp_path / "out", to="original", output=tmp_path / "back", shard_size=4 << 20, check=True)
    assert "model.safetensors.index.json" in files_of(tmp_path / "back")
    convert(tmp_path / "back", output=tmp_path / "one.safetensors")
    assert same(load_file(tmp_path / "one.safetensors"), load_file(path))


# ------------------------------------------------------------------------------------------------ what is lost


def with_all_that_real_files_hold(name: str, pipe: Any) -> dict[str, Tensor]:
    """An LDM file as it was trained: an average, a schedule, positions, the last text layer, a projection."""
    found = single_file(name, pipe)
    unet = {k.removeprefix("model."): v.clone() for k, v in found.items() if k.startswith("model.diffusion_model.")}
    found |= {f"model_ema.{k.replace('.', '')}": v for k, v in unet.items()}
    found |= {"betas": torch.rand(9), "alphas_cumprod": torch.rand(9), "model_ema.decay": torch.tensor(0.9)}
    if name == "sd15":
        found["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        return found
    before = "cond_stage_model.model.transformer.resblocks."
    for layer in range(2, 24):
        found |= {
            k.replace(f"{before}1.", f"{before}{layer}."): v.clone() for k, v in found.items() if f"{before}1." in k
        }
    found["cond_stage_model.model.text_projection"] = torch.rand(64, 64)
    found["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
    return found


LAST = [
    "attn.in_proj_bias", "attn.in_proj_weight", "attn.out_proj.bias", "attn.out_proj.weight", "ln_1.bias",
    "ln_1.weight", "ln_2.bias", "ln_2.weight", "mlp.c_fc.bias", "mlp.c_fc.weight", "mlp.c_proj.bias",
    "mlp.c_proj.weight",
]  # fmt: skip


def test_sd2_loses_its_last_text_layer_and_says_so(made: Any, tmp_path: Path) -> None:
    given = with_all_that_real_files_hold("sd2", made["sd2"][0])
    path = save(tmp_path / "a.safetensors", given)
    report = to_folder(path, tmp_path / "out", check=True, prediction="epsilon", drop=["ema"])
    why = "the class that loads it in diffusers has no place for it"
    lost = sorted(u.key for u in report.account.unused if u.reason == why)
    before = "cond_stage_model.model."
    assert lost == sorted(
        [
            f"{before}text_projection",
            f"{before}logit_scale",
            *(f"{before}transformer.resblocks.23.{leaf}" for leaf in LAST),
        ]
    )
    assert report.warnings[1:] == [
        f"lost: 14 tensors of text_encoder ({why}): '{before}logit_scale', '{before}text_projection', "
        f"'{before}transformer.resblocks.23.attn.in_proj_bias', "
        f"'{before}transformer.resblocks.23.attn.in_proj_weight', "
        f"'{before}transformer.resblocks.23.attn.out_proj.bias' (and 9 more)"
    ]
    assert all(not u.asked for u in report.account.unused if u.reason == why)
    found = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    assert max(int(k.split(".")[3]) for k in found if ".layers." in k) == 22
    convert(tmp_path / "out", to="original", output=tmp_path / "back.safetensors", check=True)
    gone = {*lost, "betas", "alphas_cumprod", *(k for k in given if k.startswith("model_ema."))}
    assert same(load_file(tmp_path / "back.safetensors"), {k: v for k, v in given.items() if k not in gone})


def test_what_sd2_loses_is_what_diffusers_own_loader_leaves_out(made: Any, tmp_path: Path) -> None:
    pipe = made["sd2"][0]
    path = save(tmp_path / "a.safetensors", with_all_that_real_files_hold("sd2", pipe))
    pipe.save_pretrained(tmp_path / "ref")
    config = json.loads((tmp_path / "ref" / "text_encoder" / "config.json").read_text())
    (tmp_path / "ref" / "text_encoder" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 23}))
    theirs = from_single_file(path, PIPELINES["sd2"], tmp_path / "ref")
    to_folder(path, tmp_path / "out", prediction="epsilon", drop=["ema"])
    ours = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    assert same(ours, canonical(theirs.text_encoder))


def test_every_key_is_accounted_for_once_with_its_reason(made: Any, tmp_path: Path) -> None:
    given = with_all_that_real_files_hold("sd15", made["sd15"][0])
    path = save(tmp_path / "a.safetensors", {**given, "first_stage_model.loss.weight": torch.ones(2)})
    report = to_folder(path, tmp_path / "out", check=True)
    account = report.account
    keys = [*account.used, *account.copied, *(k for k, _ in account.kept), *(u.key for u in account.unused)]
    assert sorted(keys) == sorted([*given, "first_stage_model.loss.weight"])
    averages = sum(key.startswith("model_ema.") for key in given)
    assert averages > 600
    reasons = {(u.reason, u.asked): 0 for u in account.unused}
    for u in account.unused:
        reasons[u.reason, u.asked] += 1
    assert reasons == {
        ("a diffusers folder has no place for an average of the weights", False): averages,
        ("a noise schedule, which a scheduler computes from its settings", True): 2,
        ("no tensor of autoencoder_kl is called so", False): 1,
        ("numbers counted from 0, which whoever loads it counts itself", True): 1,
    }

    def under(prefix: str) -> int:
        return sum(key.startswith(prefix) for key in given)

    counts = [(g["component"], g["tensors"], g["copied"], g["dropped"]) for g in report.groups]
    assert counts[:3] == [
        ("unet", under("model.diffusion_model."), under("model.diffusion_model."), 0),
        ("vae", under("first_stage_model.") + 1, under("first_stage_model."), 1),
        ("text_encoder", under("cond_stage_model."), under("cond_stage_model.") - 1, 1),
    ]
    assert sorted(counts[3:]) == [("ema", averages, 0, averages), ("schedule", 2, 0, 2)]


def test_strict_refuses_a_loss_but_not_what_is_needless(made: Any, tmp_path: Path) -> None:
    given = with_all_that_real_files_hold("sd15", made["sd15"][0])
    path = save(tmp_path / "a.safetensors", given)
    with pytest.raises(MismatchError) as caught:
        to_folder(path, tmp_path / "out", strict=True)
    averages = sum(key.startswith("model_ema.") for key in given)
    assert str(caught.value).startswith(
        f"--strict: {averages} tensors have no place in the diffusers layout: 'model_ema."
    )
    assert caught.value.hint == "a diffusers folder has no place for an average of the weights"
    to_folder(path, tmp_path / "out", strict=True, drop=["ema"])


def test_from_file_to_file_nothing_is_lost(made: Any, tmp_path: Path) -> None:
    """An average, a schedule, positions and strangers stand in a single file as well."""
    given = with_all_that_real_files_hold("sd15", made["sd15"][0])
    given["first_stage_model.loss.weight"] = torch.ones(2)
    path = save(tmp_path / "a.safetensors", given)
    report = convert(path, to="comfy", output=tmp_path / "b.safetensors", check=True)
    assert same(load_file(tmp_path / "b.safetensors"), given)
    assert report.account.unused == []
    assert report.account.kept == [("first_stage_model.loss.weight", "no tensor of autoencoder_kl is called so; kept")]
    assert report.checked is not None
    assert report.checked["tensors"] == len(given)


# ------------------------------------------------------------------------------------------------ parts of a model


def test_a_unet_with_its_prefix_becomes_a_folder_with_that_component(made: Any, tmp_path: Path) -> None:
    given = {k: v for k, v in load_file(made["sdxl"][1]).items() if k.startswith("model.diffusion_model.")}
    report = to_folder(save(tmp_path / "a.safetensors", given), tmp_path / "out", check=True)
    assert files_of(tmp_path / "out") == ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    assert report.warnings == [
        "no model_index.json, for there is no text_encoder, no text_encoder_2, no vae: a folder of components, each of "
        "which can be loaded by itself"
    ]
    found = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet")
    assert same(found.state_dict(), canonical(made["sdxl"][0].unet))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_component_alone_stands_right_in_the_folder_and_comes_back_bare(part: str, made: Any, tmp_path: Path) -> None:
    pipe = made["sdxl"][0]
    component = next(c for c in ARCHITECTURES.get("sdxl").components if c.name == part)
    given = from_canonical(component.network, component.spelling, canonical(getattr(pipe, part)))
    given = {key: tensor.contiguous() for key, tensor in given.items()}
    to_folder(save(tmp_path / "a.safetensors", given), tmp_path / "out", check=True)
    stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
    assert files_of(tmp_path / "out") == ["config.json", f"{stem}.safetensors"]
    model = getattr(pipe, part)
    found = type(model).from_pretrained(tmp_path / "out")
    assert same(found.state_dict(), model.state_dict())
    if part != "text_encoder":  # a CLIP of no released size may have either of two original spellings
        convert(tmp_path / "out", to="original", output=tmp_path / "back.safetensors", check=True)
        assert same(load_file(tmp_path / "back.safetensors"), given)


def test_what_looks_the_same_in_several_architectures_is_said_to_be_taken_for_one(made: Any, tmp_path: Path) -> None:
    vae = made["sdxl"][0].vae
    given = from_canonical("autoencoder_kl", "original", canonical(vae))
    path = save(tmp_path / "a.safetensors", given)
    report = to_folder(path, tmp_path / "out")
    assert len(report.warnings) == 1
    assert report.warnings[0].startswith("taken for the vae of ")
    assert report.warnings[0].endswith(" have it with other settings: --like FOLDER takes config.json from there")
    made["sdxl"][0].save_pretrained(tmp_path / "like")
    told = to_folder(path, tmp_path / "told", like=tmp_path / "like")
    assert told.warnings == []
    assert json.loads((tmp_path / "told" / "config.json").read_text())["scaling_factor"] == 0.13025


def test_a_component_that_is_not_known_goes_from_folder_to_folder_as_it_is(made: Any, tmp_path: Path) -> None:
    folder = tmp_path / "ref"
    made["sd15"][0].save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    given = {"vision.weight": torch.rand(3, 2), "concepts": torch.rand(4)}
    save(folder / "safety_checker" / "model.safetensors", given)
    to_folder(folder, tmp_path / "out", no_tokenizer=False, check=True)
    assert same(load_file(tmp_path / "out" / "safety_checker" / "model.safetensors"), given)
    assert json.loads((tmp_path / "out" / "model_index.json").read_text()) == index
    report = convert(folder, to="original", output=tmp_path / "one.safetensors")
    assert [u.key for u in report.account.unused if not u.asked] == [
        "safety_checker.concepts", "safety_checker.vision.weight",
    ]  # fmt: skip
    assert sorted(u.key for u in report.account.unused if u.asked) == [
        "model_index.json", "safety_checker/config.json", "scheduler/", "text_encoder/config.json", "tokenizer/",
        "unet/config.json", "vae/config.json",
    ]  # fmt: skip
    assert sorted(
        u.reason for u in convert(
            folder, to="original", output=tmp_path / "two.safetensors", drop=["safety_checker"], strict=True
        ).account.unused if u.key.startswith("safety_checker.")
    ) == ["--drop safety_checker"] * 2  # fmt: skip


def test_a_legacy_pickle_becomes_a_folder(made: Any, tmp_path: Path) -> None:
    given = load_file(made["sd15"][1])
    torch.save({"state_dict": given, "global_step": 7}, tmp_path / "a.ckpt")
    report = to_folder(tmp_path / "a.ckpt", tmp_path / "out", check=True)
    assert [u.key for u in report.account.unused] == ["global_step"]
    convert(tmp_path / "out", to="original", output=tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), given)


# ------------------------------------------------------------------------------------------------ what it predicts


@pytest.mark.parametrize(
    ("tensors", "metadata", "expected"),
    [
        (("v_pred",), {}, {"prediction_type": "v_prediction"}),
        (("v_pred", "ztsnr"), {}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        ((), {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ((), {"ss_v_parameterization": "True"}, {"prediction_type": "v_prediction"}),
        ((), {}, {"prediction_type": "epsilon"}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_mark_of_velocity_becomes_the_schedulers_setting(
    tensors: tuple[str, ...], metadata: dict[str, str], expected: dict[str, Any], made: Any, tmp_path: Path
) -> None:
    given = {**load_file(made["sdxl"][1]), **{name: torch.zeros(0) for name in tensors}}
    path = save(tmp_path / "a.safetensors", given, metadata)
    report = to_folder(path, tmp_path / "out", strict=True)
    found = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert expected.items() <= found.items()
    assert ("rescale_betas_zero_snr" in found) == ("ztsnr" in tensors)
    assert [u.key for u in report.account.unused] == list(tensors)
    convert(tmp_path / "out", to="original", output=tmp_path / "back.safetensors")
    with open_checkpoint(tmp_path / "back.safetensors") as back:
        wanted = {"v_pred"} if expected["prediction_type"] == "v_prediction" else set()
        assert back.tensors.keys() & {"v_pred", "ztsnr"} == wanted | set(tensors)
        assert back.metadata.get("modelspec.prediction_type") == ("v" if wanted else None)


def test_what_sd2_predicts_is_assumed_and_can_be_told(made: Any, tmp_path: Path) -> None:
    path = made["sd2"][1]
    report = to_folder(path, tmp_path / "assumed")
    assert report.warnings[1:] == [
        "nothing in the file says what it predicts; v_prediction is assumed, and --prediction epsilon says otherwise"
    ]
    assert to_folder(path, tmp_path / "told", prediction="epsilon").warnings[1:] == []
    found = {}
    for name in ("assumed", "told"):
        scheduler = json.loads((tmp_path / name / "scheduler" / "scheduler_config.json").read_text())
        unet = json.loads((tmp_path / name / "unet" / "config.json").read_text())
        found[name] = scheduler["prediction_type"], unet["sample_size"]
    assert found == {"assumed": ("v_prediction", 96), "told": ("epsilon", 64)}


def test_metadata_that_is_true_of_the_output_is_kept_and_no_other(made: Any, tmp_path: Path) -> None:
    metadata = {
        "modelspec.architecture": "stable-diffusion-xl-v1-base", "modelspec.hash_sha256": "0x00",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models", "title": "mine",
    }  # fmt: skip
    path = save(tmp_path / "a.safetensors", load_file(made["sdxl"][1]), metadata)
    to_folder(path, tmp_path / "out")
    with open_checkpoint(tmp_path / "out" / "vae") as opened:
        recipe = json.loads(opened.metadata.pop("weightops"))  # type: ignore[attr-defined]
        assert opened.metadata == {
            "format": "pt", "modelspec.architecture": "stable-diffusion-xl-v1-base",
            "modelspec.implementation": "diffusers", "title": "mine",
        }  # fmt: skip
    assert (recipe["command"], recipe["to"], recipe["inputs"][0]["name"]) == ("convert", "diffusers", "a.safetensors")


# ------------------------------------------------------------------------------------------------ packed and scaled


def flux(**rest: Any) -> dict[str, Tensor]:
    """A tiny Flux in the authors' names."""
    torch.manual_seed(1)
    config = {
        "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128, "num_attention_heads": 1, "in_channels": 8,
        "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (16, 56, 56), "guidance_embeds": True,
    }  # fmt: skip
    model = diffusers.FluxTransformer2DModel(**{**config, **rest})
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


PACKED = "double_blocks.0.img_attn.qkv"
PARTS = [f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv"]


def test_packed_and_swapped_tensors_are_split_and_fused_bit_for_bit(tmp_path: Path) -> None:
    given = flux()
    convert(save(tmp_path / "a.safetensors", given), to="original", output=tmp_path / "b.safetensors", check=True)
    original = load_file(tmp_path / "b.safetensors")
    assert torch.equal(original[f"{PACKED}.weight"], torch.cat([given[f"{part}.weight"] for part in PARTS]))
    shift, scale = given["norm_out.linear.weight"].chunk(2)
    assert torch.equal(original["final_layer.adaLN_modulation.1.weight"], torch.cat([scale, shift]))
    report = to_folder(tmp_path / "b.safetensors", tmp_path / "out", check=True)
    assert same(load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"), given)
    [group] = report.groups
    assert (group["component"], group["split"], group["dropped"]) == ("transformer", 6, 0)
    assert report.summary == f"Flux.1, original → diffusers: 1 component, {len(original):,} tensors"


def scaled(values: dict[str, float]) -> dict[str, Tensor]:
    """Our tiny Flux with a scale beside some of its weights, as ComfyUI has them."""
    given = {key: tensor.half() for key, tensor in flux().items()}
    return {
        **given,
        **{f"{name}.scale_weight": torch.tensor(value) for name, value in values.items()},
        "scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn),
    }


def test_a_scale_follows_its_module_and_is_copied_to_each_part(tmp_path: Path) -> None:
    given = scaled({**dict.fromkeys(PARTS, 0.5), "x_embedder": 0.25})
    convert(save(tmp_path / "a.safetensors", given), to="comfy", output=tmp_path / "b.safetensors", check=True)
    packed = load_file(tmp_path / "b.safetensors")
    before = "model.diffusion_model."
    assert packed[f"{before}{PACKED}.scale_weight"].item() == 0.5
    assert packed[f"{before}img_in.scale_weight"].item() == 0.25
    assert f"{before}scaled_fp8" in packed
    to_folder(tmp_path / "b.safetensors", tmp_path / "out", check=True)
    found = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == given.keys()
    assert [found[f"{part}.scale_weight"].item() for part in PARTS] == [0.5] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {f"{PARTS[2]}.scale_weight": torch.tensor(0.75)},
            f"transformer: {PACKED}.scale_weight is one for {PARTS[0]}.scale_weight, {PARTS[1]}.scale_weight, "
            f"{PARTS[2]}.scale_weight, but their scales differ",
        ),
        (
            lambda t: t | {f"{PARTS[1]}.scale_weight": torch.ones(128, 1)},
            f"tensor '{PARTS[1]}.scale_weight' holds 128 scales for {PARTS[1]}.weight, whose rows move; expected one",
        ),
        (
            lambda t: {k: v for k, v in t.items() if k != f"{PARTS[1]}.weight"},
            f"transformer: {PARTS[0]}.weight: {PACKED}.weight packs it with {PARTS[1]}.weight, which is not there",
        ),
        (
            lambda t: {k: v for k, v in t.items() if k != f"{PARTS[2]}.scale_weight"},
            f"transformer: {PARTS[0]}.scale_weight: {PACKED}.scale_weight packs it with {PARTS[2]}.scale_weight, "
            "which is not there",
        ),
        (
            lambda t: t | {f"{PARTS[1]}.weight": torch.rand(128, 128)},
            f"transformer: {PARTS[0]}.weight: {PACKED}.weight packs 3 tensors, whose dtypes or widths differ",
        ),
    ],
    ids=["scales differ", "a scale for each row", "a part missing", "a scale missing", "another dtype"],
)
def test_what_cannot_be_packed_is_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", change(scaled(dict.fromkeys(PARTS, 0.5))))
    with pytest.raises(MismatchError) as caught:
        convert(path, to="original", output=tmp_path / "b.safetensors")
    assert str(caught.value) == f"{path}: {message}"


def test_scaled_weights_are_not_cast(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", scaled({"x_embedder": 0.25}))
    with pytest.raises(UsageError) as caught:
        convert(path, to="original", output=tmp_path / "b.safetensors", dtype="fp32")
    assert str(caught.value) == (
        f"--dtype: {path} holds codes, whose values mean nothing without their scales ('x_embedder.scale_weight')"
    )


# ------------------------------------------------------------------------------------------------ refusals

KEEP = "without --to every name stays as it is"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"emb_params": (2, 768)}, "expected a checkpoint or a part of one, found: embedding"),
        ({"a.weight": (2,), "b": (3,)}, "it is no model that is known: 'a.weight', 'b'"),
        (
            {"model.diffusion_model.out.0.weight": (3,), "model.diffusion_model.mine": (2,)},
            "its model is no model that is known; the nearest is sdxl_unet with original names, to which 1 of its 2 "
            "tensors belong, but not 'mine'",
        ),
    ],
    ids=["embedding", "unknown", "half known"],
)
def test_what_is_no_known_checkpoint_is_refused(
    tensors: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "a.safetensors", {key: torch.zeros(shape) for key, shape in tensors.items()})
    with pytest.raises(MismatchError) as caught:
        to_folder(path, tmp_path / "out")
    assert text_of(caught.value) == (f"{path}: {message}", KEEP)


def test_parts_without_the_model_that_they_belong_to_are_refused(made: Any, tmp_path: Path) -> None:
    given = {k: v for k, v in load_file(made["sdxl"][1]).items() if not k.startswith("model.diffusion_model.")}
    path = save(tmp_path / "a.safetensors", given)
    with pytest.raises(MismatchError) as caught:
        to_folder(path, tmp_path / "out")
    assert text_of(caught.value) == (
        f"{path}: holds text_encoder, text_encoder_2, vae, but no diffusion model, which would tell what they belong "
        "to",
        KEEP,
    )


# ------------------------------------------------------------------------------------------------ real lists

LISTS = [
    ("orig_flux_dev_bfl", "diffusers_flux_dev"),
    ("orig_comfy_chroma", "diffusers_chroma1"),
    ("orig_flux2_dev", "diffusers_flux2_dev"),
    ("orig_hunyuan_video_tencent", "diffusers_hunyuan_video"),
    ("orig_comfy_hunyuan_video", "diffusers_hunyuan_video"),
    ("orig_comfy_lumina2", "diffusers_lumina2"),
    ("orig_comfy_qwen_image", "diffusers_qwen_image"),
    ("orig_comfy_z_image", "diffusers_z_image"),
    ("orig_sd35_large", "diffusers_sd35_large"),
    ("orig_sd3_medium", "diffusers_sd3_medium"),
    ("orig_wan21_t2v_14b", "diffusers_wan21_t2v_14b"),
    ("orig_comfy_wan21_i2v_14b", "diffusers_wan21_i2v_14b"),
    ("orig_wan21_vae", "diffusers_wan_vae"),
    ("toolkit_UNET-v1-SD", "diffusers_sd15_unet"),
    ("toolkit_UNET-v2-SD", "diffusers_sd21_unet"),
    ("toolkit_UNET-XL-SD", "diffusers_sdxl_unet"),
    ("toolkit_UNET-XL-Refiner", "diffusers_sdxl_refiner_unet"),
    ("toolkit_VAE-v1-SD", "diffusers_sd_vae"),
    ("toolkit_CLIP-XL-SD", "transformers_clip_bigG"),
]

# What the list holds beside the weights, and the one tensor that transformers has no place for.
NEEDLESS = ("norm_final.weight", "__index_timestep_zero__", "logit_scale")


def listed(shapes: dict[str, tuple[int, ...]], label: str) -> Checkpoint:
    """A checkpoint of these names and shapes, without its bytes."""
    tensors, position = {}, 0
    for key, shape in shapes.items():
        spec = TensorSpec("BF16", shape)
        tensors[key] = TensorInfo(spec, 0, position, position + spec.nbytes)
        position += spec.nbytes
    return Checkpoint(label, "safetensors", [], tensors)


def laid(opened: Checkpoint, to: str) -> dict[str, tuple[int, ...]]:
    planned, _ = plan_layout(opened, identify(opened.tensors), Wish(to, tokenizer=False))
    filled: dict[str, int] = {}
    for task in planned.plan.tasks:
        filled[task.outputs[0].key] = filled.get(task.outputs[0].key, 0) + task.outputs[0].spec.nbytes
    assert filled == {key: spec.nbytes for key, spec in planned.plan.outputs.items()}
    return {key: spec.shape for key, spec in planned.plan.outputs.items()}


@pytest.mark.parametrize(("original", "other"), LISTS, ids=lambda name: name)
def test_real_names_and_shapes_are_those_of_diffusers_and_come_back(original: str, other: str) -> None:
    from tagged import KEYS, shapes_of

    if not KEYS.is_dir():
        pytest.skip("the lists of real models (../shared/data) are not here")
    given, expected = shapes_of(original), shapes_of(other)
    there = laid(listed(given, original), "diffusers")
    assert there == expected
    to = "comfy" if original.startswith("orig_comfy_") else "original"
    back = laid(listed(there, other), to)
    assert identify(listed(back, other).tensors).architecture == identify(listed(given, original).tensors).architecture
    bare = {key.removeprefix("model.diffusion_model.").removeprefix("model.model."): s for key, s in back.items()}
    if original == "orig_comfy_hunyuan_video":  # whose norms are called weight, and written as scale: both are read
        given = {key.replace("_norm.weight", "_norm.scale"): shape for key, shape in given.items()}
    assert bare == {key: shape for key, shape in given.items() if key not in NEEDLESS}
