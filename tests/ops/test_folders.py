"""What stands beside the weights: config.json from shapes, a pipeline's index, scheduler and tokenizers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from conftest import save
from huggingface_hub import constants
from safetensors.torch import load_file
from tiny import PIPELINES, checkpoint, diffusers, image, loaded, pipeline, single_file, words_of

from weightops.errors import FormatError, MismatchError, UsageError, WeightopsError
from weightops.naming.keymap import ARCHITECTURES, NETWORKS, Config, Count, Dim, Has, Which
from weightops.ops.convert import convert
from weightops.ops.folders import component_config, config_values, open_like

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return checkpoint("sdxl", tmp_path_factory.mktemp("sdxl"))


def text_of(error: WeightopsError) -> tuple[str, str | None]:
    return str(error), error.hint


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# ------------------------------------------------------------------------------------------------ config.json

SHAPES = {
    "in.weight": (128, 4),
    "pos": (1, 49),
    "blocks.0.a": (2,),
    "blocks.1.a": (2,),
    "blocks.1.b": (2,),
    "blocks.x": (),
}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, 7),
        (None, None),
        (Dim("in.weight", 0), 128),
        (Dim("in.weight", 0, 64), 2),
        (Dim("pos", 1, root=True), 7),
        (Count("blocks.{}"), 2),
        (Count("heads.{}"), 0),
        (Has("pos"), True),
        (Has("neg"), False),
        (Has("pos", yes=Dim("in.weight", 1), no=None), 4),
        (Has("neg", yes=Dim("neg", 1), no=None), None),
        (Which("blocks.{}.a"), [0, 1]),
        (Which("blocks.{}.b"), [1]),
        ([1, Dim("in.weight", 1), [Has("pos")]], [1, 4, [True]]),
        ({"a": Dim("in.weight", 1)}, {"a": 4}),
    ],
    ids=str,
)
def test_a_value_is_itself_or_what_the_shapes_say(value: Any, expected: Any) -> None:
    assert config_values(Config("Class", {"key": value}), SHAPES, "file")["key"] == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Dim("out.weight", 0), "file: has no tensor out.weight, from which its config.json follows"),
        (Dim("in.weight", 2), "file: has no tensor in.weight, from which its config.json follows"),
        (Dim("in.weight", 1, 64), "file: in.weight is [128, 4]: 4 is no multiple of 64"),
        (Dim("in.weight", 0, root=True), "file: in.weight is [128, 4]: 128 is no square"),
    ],
    ids=str,
)
def test_shapes_that_say_nothing_are_refused(value: Any, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        config_values(Config("Class", {"key": value}), SHAPES, "file")
    assert str(caught.value) == message


def test_each_library_finds_its_class() -> None:
    assert config_values(Config("A", {"k": 1}), {}, "")["_class_name"] == "A"
    assert config_values(Config("A", {"k": 1}, library="transformers"), {}, "") == {"architectures": ["A"], "k": 1}


def test_a_network_whose_configuration_does_not_follow_takes_it_from_elsewhere(tmp_path: Path) -> None:
    kolors = NETWORKS.get("kolors_unet")
    with pytest.raises(UsageError) as caught:
        component_config(kolors, {}, {}, None, ("config.json",), "a.safetensors")
    assert text_of(caught.value) == (
        "a.safetensors: what config.json of its kolors_unet should say does not follow from the tensors",
        "--like FOLDER takes it from a diffusers folder",
    )
    (tmp_path / "config.json").write_text('{"mine": 1}')
    like = open_like(str(tmp_path))
    assert component_config(kolors, {}, {}, like, ("unet/config.json", "config.json"), "a") == b'{"mine": 1}'


def test_values_of_four_bits_hide_the_shapes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not follow from the tensors"):
        component_config(NETWORKS.get("clip"), {}, {"x.weight.absmax": (4,)}, None, ("config.json",), "a.safetensors")


# ------------------------------------------------------------------------------------------------ --like


def test_settings_of_like_are_taken_as_they_are(made: Any, tmp_path: Path) -> None:
    pipe, path = made
    pipe.save_pretrained(tmp_path / "like")
    scheduler = tmp_path / "like" / "scheduler" / "scheduler_config.json"
    scheduler.write_text('{ "_class_name":"DDIMScheduler", "mine": 1 }')
    report = convert(path, to="diffusers", output=tmp_path / "out", like=tmp_path / "like")
    assert report.warnings == []
    for name in (
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "tokenizer_2/tokenizer.json",
        "vae/config.json",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "like" / name).read_bytes()


def test_settings_that_contradict_the_tensors_are_refused_with_numbers(made: Any, tmp_path: Path) -> None:
    pipe, path = made
    pipe.save_pretrained(tmp_path / "like")
    config = read(tmp_path / "like" / "unet" / "config.json")
    config |= {"block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "sample_size": 99}
    (tmp_path / "like" / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError) as caught:
        convert(path, to="diffusers", output=tmp_path / "out", like=tmp_path / "like")
    assert text_of(caught.value) == (
        f"{tmp_path}/like (unet/config.json): is not the configuration of {path}: block_out_channels is "
        "[320, 640, 1280], but the tensors say [64, 64, 128]; cross_attention_dim is 2048, but the tensors say 192",
        "name a folder of the same model",
    )


def test_settings_of_another_class_are_refused(made: Any, tmp_path: Path) -> None:
    (tmp_path / "like" / "vae").mkdir(parents=True)
    (tmp_path / "like" / "vae" / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    with pytest.raises(MismatchError) as caught:
        convert(made[1], to="diffusers", output=tmp_path / "out", like=tmp_path / "like", no_tokenizer=True)
    assert str(caught.value) == (
        f"{tmp_path}/like (vae/config.json): is not the configuration of {made[1]}: its class is 'AutoencoderTiny', "
        "expected AutoencoderKL"
    )


def test_one_number_for_all_levels_is_no_contradiction(made: Any, tmp_path: Path) -> None:
    (tmp_path / "like" / "unet").mkdir(parents=True)
    (tmp_path / "like" / "unet" / "config.json").write_text('{"attention_head_dim": 1}')
    with pytest.raises(MismatchError, match=r"attention_head_dim is 1, but the tensors say \[1, 1, 2\]"):
        convert(made[1], to="diffusers", output=tmp_path / "out", like=tmp_path / "like", no_tokenizer=True)
    (tmp_path / "like" / "unet" / "config.json").write_text('{"layers_per_block": [2, 2], "in_channels": [4]}')
    convert(made[1], to="diffusers", output=tmp_path / "out", like=tmp_path / "like", no_tokenizer=True)


def test_a_like_that_is_not_there_is_wrong_use(made: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        convert(made[1], to="diffusers", output=tmp_path / "out", like=tmp_path / "none")
    assert text_of(caught.value) == (
        f"--like: no such folder: {tmp_path}/none", "name a diffusers folder, or hf://owner/name",
    )  # fmt: skip


def test_names_in_a_hostile_index_are_no_paths(made: Any, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "preprocessor_config.json").write_text("{}")
    words_of(made[0], tmp_path / "like")
    index = {
        "_class_name": "StableDiffusionXLPipeline", "../secret": ["transformers", "CLIPImageProcessor"],
        "unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", 5], "odd": {"a": 1}, "short": [],
    }  # fmt: skip
    (tmp_path / "like" / "model_index.json").write_text(json.dumps(index))
    convert(made[1], to="diffusers", output=tmp_path / "out", like=tmp_path / "like")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["like", "out", "secret"]
    assert not list((tmp_path / "out").rglob("preprocessor_config.json"))


# ------------------------------------------------------------------------------------------------ tokenizers


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_without_a_tokenizer_nothing_is_begun(made: Any, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(UsageError) as caught:
        convert(made[1], to="diffusers", output=tmp_path / "out")
    assert text_of(caught.value) == (
        "Stable Diffusion XL: tokenizer: the pipeline needs a tokenizer, and none is at hand",
        "--like FOLDER takes it from a diffusers folder or hf://owner/name; --no-tokenizer does without",
    )
    assert list(tmp_path.iterdir()) == []


def test_tokenizers_in_the_hubs_local_cache_are_found(made: Any, tmp_path: Path, cache: Path) -> None:
    pipe, path = made
    repository = cache / "models--stabilityai--stable-diffusion-xl-base-1.0"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    words_of(pipe, repository / "snapshots" / ("0" * 40))
    report = convert(path, to="diffusers", output=tmp_path / "out")
    assert report.warnings == []
    assert (image(loaded(tmp_path / "out", PIPELINES["sdxl"])) == image(pipe)).all()


def test_a_vocabulary_without_its_merges_is_no_tokenizer(made: Any, tmp_path: Path, cache: Path) -> None:
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / "like" / name).mkdir(parents=True)
        (tmp_path / "like" / name / "vocab.json").write_text("{}")
    with pytest.raises(UsageError, match="none is at hand"):
        convert(made[1], to="diffusers", output=tmp_path / "out", like=tmp_path / "like")
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / "like" / name / "merges.txt").write_text("#version: 0.2\n")
    convert(made[1], to="diffusers", output=tmp_path / "out", like=tmp_path / "like")
    assert (tmp_path / "out" / "tokenizer" / "merges.txt").read_text() == "#version: 0.2\n"


def test_a_tokenizer_of_files_that_we_do_not_know_is_taken_as_it_is(made: Any, tmp_path: Path) -> None:
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / "like" / name / "deep").mkdir(parents=True)
        (tmp_path / "like" / name / "words.bpe").write_bytes(b"\xff")
        (tmp_path / "like" / name / ".hidden").write_bytes(b"")
    convert(made[1], to="diffusers", output=tmp_path / "out", like=tmp_path / "like")
    assert [p.name for p in (tmp_path / "out" / "tokenizer_2").iterdir()] == ["words.bpe"]
    assert (tmp_path / "out" / "tokenizer" / "words.bpe").read_bytes() == b"\xff"


def test_components_that_make_no_pipeline_need_no_tokenizer(made: Any, tmp_path: Path, cache: Path) -> None:
    report = convert(made[1], to="diffusers", output=tmp_path / "out", drop=["text_encoder"])
    assert report.warnings == [
        "no model_index.json, for there is no text_encoder, no text_encoder_2: a folder of components, each of which "
        "can be loaded by itself"
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["unet", "vae"]


def test_without_tokenizers_the_folder_says_what_it_lacks(made: Any, tmp_path: Path) -> None:
    report = convert(made[1], to="diffusers", output=tmp_path / "out", no_tokenizer=True)
    assert report.warnings == [
        "from_pretrained does not load this folder without its tokenizers, which --no-tokenizer left out"
    ]
    assert not (tmp_path / "out" / "tokenizer").exists()
    assert read(tmp_path / "out" / "model_index.json")["tokenizer"] == ["transformers", "CLIPTokenizer"]


# ------------------------------------------------------------------------------------------------ the pipeline


def test_the_index_names_what_is_there_and_diffusers_agrees(made: Any, tmp_path: Path) -> None:
    pipe, path = made
    convert(path, to="diffusers", output=tmp_path / "out", no_tokenizer=True)
    pipe.save_pretrained(tmp_path / "ref")
    ours, theirs = read(tmp_path / "out" / "model_index.json"), read(tmp_path / "ref" / "model_index.json")
    folders = {name for name, value in theirs.items() if isinstance(value, list)}
    assert {name: ours[name] for name in folders} == {name: theirs[name] for name in folders}
    assert ours["_class_name"] == theirs["_class_name"]


@pytest.mark.parametrize(
    ("name", "channels", "expected"),
    [
        ("sd15", 9, "StableDiffusionInpaintPipeline"),
        ("sd15", 8, "StableDiffusionInstructPix2PixPipeline"),
        ("sdxl", 9, "StableDiffusionXLInpaintPipeline"),
        ("sdxl", 8, "StableDiffusionXLInstructPix2PixPipeline"),
    ],
)
def test_a_unet_that_sees_more_than_the_latent_has_the_pipeline_for_it(
    name: str, channels: int, expected: str, tmp_path: Path
) -> None:
    pipe = pipeline(name, tmp_path, in_channels=channels)
    path = save(tmp_path / "a.safetensors", single_file(name, pipe))
    convert(path, to="diffusers", output=tmp_path / "out", like=words_of(pipe, tmp_path / "like"))
    found = loaded(tmp_path / "out", expected)
    assert type(found).__name__ == expected
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")) is type(found)
    assert found.unet.config.in_channels == channels


def test_a_scheduler_of_like_is_taken_with_what_the_file_says_it_predicts(made: Any, tmp_path: Path) -> None:
    import torch

    pipe, path = made
    pipe.save_pretrained(tmp_path / "like")
    marked = save(tmp_path / "a.safetensors", {**load_file(path), "v_pred": torch.zeros(0)})
    report = convert(marked, to="diffusers", output=tmp_path / "out", like=tmp_path / "like")
    assert report.warnings == [
        f"the scheduler of {tmp_path}/like is taken with prediction_type v_prediction in place of epsilon"
    ]
    ours = read(tmp_path / "out" / "scheduler" / "scheduler_config.json")
    theirs = read(tmp_path / "like" / "scheduler" / "scheduler_config.json")
    assert ours == {**theirs, "prediction_type": "v_prediction"}


def test_every_pipeline_that_a_single_file_can_carry_is_one_that_diffusers_has() -> None:
    for _, architecture in ARCHITECTURES:
        known = architecture.pipeline
        if known is None:
            continue
        assert hasattr(diffusers, known.class_name)
        weights = {component.name for component in architecture.components}
        named = {name for name, (_, kind) in known.classes.items() if kind is not None}
        assert weights <= named
        assert {name for name in named - weights if name != "scheduler"} == set(known.tokenizers)


def test_an_index_of_like_makes_a_pipeline_where_we_know_none(tmp_path: Path) -> None:
    """Flux, of which weightops has no pipeline: from folder to file, and back with --like."""
    import torch
    from test_layout import flux

    tensors = {f"model.diffusion_model.{k}": v for k, v in flux().items()}
    vae = single_file("sdxl", pipeline("sdxl", tmp_path))
    tensors |= {k.replace("first_stage_model.", "vae."): v for k, v in vae.items() if k.startswith("first_stage")}
    path = save(tmp_path / "a.safetensors", tensors)
    alone = convert(path, to="diffusers", output=tmp_path / "alone")
    assert alone.warnings == [
        "no model_index.json, which --like FOLDER gives for Flux.1: a folder of components, each of which can be "
        "loaded by itself"
    ]
    (tmp_path / "like" / "scheduler").mkdir(parents=True)
    (tmp_path / "like" / "scheduler" / "scheduler_config.json").write_text("{}")
    index = {
        "_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }  # fmt: skip
    (tmp_path / "like" / "model_index.json").write_text(json.dumps(index))
    report = convert(path, to="diffusers", output=tmp_path / "out", like=tmp_path / "like", check=True)
    assert report.warnings == []
    assert read(tmp_path / "out" / "model_index.json") == index
    assert torch.is_tensor(
        load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors")["quant_conv.bias"]
    )
