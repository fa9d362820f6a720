"""One name, many shapes on disk: a file, shards, a diffusers folder; and everything that is none of them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import save_raw

from weightops.errors import FormatError, TruncatedError, UnsafeError, UsageError, WeightopsError
from weightops.files.checkpoint import Checkpoint, open_checkpoint
from weightops.files.tensor import Slot, TensorSpec

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such thing")


def put(path: Path, metadata: dict[str, str] | None = None, **tensors: str) -> Path:
    """A file whose tensors hold these texts as bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_raw(path, {k: ("U8", [len(v)], v.encode()) for k, v in tensors.items()}, metadata)


def put_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def content(opened: Checkpoint) -> dict[str, str]:
    found = {}
    for key, info in opened.tensors.items():
        out = bytearray(info.spec.nbytes)
        opened.read_bytes(opened.slot(key), 0, len(out), memoryview(out))
        found[key] = out.decode()
    return found


def open_files() -> set[str]:
    known = Path("/proc/self/fd")
    return {path.name for path in known.iterdir()} if known.is_dir() else set()


def refusal(label: Path | str, error: type[WeightopsError] = FormatError) -> tuple[str, str | None]:
    """What is said, without the label at its beginning, and the hint; no file stays open."""
    before = open_files()
    with pytest.raises(WeightopsError) as caught:
        open_checkpoint(label)
    assert type(caught.value) is error
    assert caught.value.exit_code == (2 if error is UsageError else 1)
    assert str(caught.value).isprintable()
    assert open_files() == before
    return str(caught.value).removeprefix(f"{label}"), caught.value.hint


# ------------------------------------------------------------------------------------------------ one file


def test_a_file_is_a_checkpoint(tmp_path: Path) -> None:
    path = put(tmp_path / "a.safetensors", {"format": "pt"}, w="weights", v="more")
    with open_checkpoint(str(path)) as opened:
        assert opened.container == "safetensors"
        assert opened.label == str(path)
        assert opened.name == "a.safetensors"
        assert opened.nbytes == path.stat().st_size
        assert opened.metadata == {"format": "pt"}
        assert (opened.left_out, opened.components) == ([], ())
        assert content(opened) == {"w": "weights", "v": "more"}
        assert opened.slot("w") == Slot("w", TensorSpec("U8", (7,)))
        opened.check_unchanged()


def test_a_path_does_as_well_as_a_text(tmp_path: Path) -> None:
    with open_checkpoint(put(tmp_path / "a.safetensors", w="weights")) as opened:
        assert opened.label == str(tmp_path / "a.safetensors")


def test_any_part_of_a_slot_can_be_read(tmp_path: Path) -> None:
    with open_checkpoint(put(tmp_path / "a.safetensors", v="xxxx", w="abcdefghij")) as opened:
        bands = Slot("w", TensorSpec("U8", (6,)), ((7, 10), (1, 4)))
        for start in range(6):
            for stop in range(start, 7):
                out = bytearray(stop - start)
                opened.read_bytes(bands, start, stop, memoryview(out))
                assert out.decode() == "hijbcd"[start:stop]
        opened.will_need([(bands, 0, 6), (opened.slot("v"), 0, 4)])
        assert opened.fetches_ahead == hasattr(os, "posix_fadvise")


@pytest.mark.parametrize("name", ["model.bin", "model.ckpt", "MODEL.PT", "model.pth"])
def test_a_safetensors_file_under_a_pickles_name_is_read_as_what_it_is(tmp_path: Path, name: str) -> None:
    with open_checkpoint(put(tmp_path / name, w="weights")) as opened:
        assert opened.container == "safetensors"
        assert content(opened) == {"w": "weights"}


def test_a_file_of_another_name_is_expected_to_be_safetensors(tmp_path: Path) -> None:
    with open_checkpoint(put(tmp_path / "model.sft", w="weights")) as opened:
        assert opened.container == "safetensors"
    (tmp_path / "model.txt").write_text("hello, world: this is a text")
    message, _ = refusal(tmp_path / "model.txt")
    assert message.startswith(": says that its header holds ")


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("a.safetensors", "a.safetensors"),
        ("sub/a.safetensors", "a.safetensors"),
        ("sub//folder/", "folder"),
        ("C:\\models\\a.safetensors", "a.safetensors"),
        ("/", "/"),
        (".", "."),
    ],
)
def test_the_name_is_without_folders(label: str, name: str) -> None:
    assert Checkpoint(label, "safetensors", [], {}).name == name


# ------------------------------------------------------------------------------------------------ no file


def test_nothing_of_this_name(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.safetensors", UsageError) == (": no such file", None)


@pytest.mark.parametrize(("label", "shown"), [("", "''"), ("a\0b", "'a\\x00b'")])
def test_no_file_has_such_a_name(label: str, shown: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_checkpoint(label)
    assert str(caught.value) == f"{shown}: no file has this name"


def test_a_name_that_is_too_long_is_refused_in_one_line(tmp_path: Path) -> None:
    label = tmp_path / ("n" * 300 + ".safetensors")
    message, _ = refusal(label, UsageError)
    assert message == ": cannot be opened: File name too long"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_searched_is_refused_in_one_line(tmp_path: Path) -> None:
    path = put(tmp_path / "closed" / "a.safetensors", w="x")
    path.parent.chmod(0o600)
    try:
        assert refusal(path, UsageError) == (": cannot be opened: Permission denied", None)
    finally:
        path.parent.chmod(0o700)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth"])
def test_a_web_page_under_a_pickles_name_is_told_as_such(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_text("<!DOCTYPE html><html><body>404</body></html>")
    assert refusal(path) == (
        ": a web page, expected a PyTorch file",
        "a download page or an error message was saved under this name; fetch the file itself",
    )


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            "a git-LFS pointer, not the file itself",
        ),
        (b"GGUF" + bytes(60), "a GGUF file"),
        (bytes(5000), "holds only zero bytes at its beginning"),
    ],
)
def test_other_impostors_under_a_pickles_name_are_told_as_such(tmp_path: Path, start: bytes, what: str) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(start)
    assert refusal(path)[0] == f": {what}, expected a PyTorch file"


def test_an_empty_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"")
    message, _ = refusal(tmp_path / "model.ckpt")
    assert message.startswith(": ")


def test_a_pickle_that_asks_for_more_is_unsafe(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"\x80\x02cos\nsystem\nq\x00X\x02\x00\x00\x00lsq\x01\x85q\x02Rq\x03.")
    with pytest.raises((UnsafeError, FormatError)):
        open_checkpoint(tmp_path / "model.pt")


# ------------------------------------------------------------------------------------------------ shards


def shards(folder: Path, table: dict[str, Any] | None = None, **files: dict[str, str]) -> Path:
    """Files one, two, … of a folder, and the index that tells of them (or tells `table`)."""
    told = {}
    for name, tensors in files.items():
        put(folder / f"{name}.safetensors", **tensors)
        told.update(dict.fromkeys(tensors, f"{name}.safetensors"))
    weight_map = told if table is None else table
    return put_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    index = shards(tmp_path, one={"a": "first", "b": "x"}, two={"c": "second"})
    for label in (index, tmp_path):
        with open_checkpoint(label) as opened:
            assert opened.container == "shards"
            assert opened.label == str(label)
            assert opened.name == label.name
            assert len(opened.files) == 2
            assert content(opened) == {"a": "first", "b": "x", "c": "second"}
            assert opened.nbytes == sum((tmp_path / f"{n}.safetensors").stat().st_size for n in ("one", "two"))
            opened.will_need([(opened.slot("a"), 0, 5), (opened.slot("c"), 0, 6)])
            opened.check_unchanged()


def test_metadata_of_all_shards_are_kept(tmp_path: Path) -> None:
    index = shards(tmp_path, one={"a": "first"}, two={"c": "second"})
    put(tmp_path / "one.safetensors", {"format": "pt"}, a="first")
    put(tmp_path / "two.safetensors", {"format": "pt", "more": "yes"}, c="second")
    with open_checkpoint(index) as opened:
        assert opened.metadata == {"format": "pt", "more": "yes"}


@pytest.mark.parametrize("name", ["sub/one.safetensors", "sub\\one.safetensors", "./sub//one.safetensors"])
def test_a_shard_may_lie_in_a_folder_below(tmp_path: Path, name: str) -> None:
    put(tmp_path / "sub" / "one.safetensors", a="first", b="second")
    index = shards(tmp_path, {"a": name, "b": "sub/one.safetensors"})
    with open_checkpoint(index) as opened:
        assert content(opened) == {"a": "first", "b": "second"}
        assert len(opened.files) == 1


@posix
def test_a_shard_may_be_a_link(tmp_path: Path) -> None:
    """As in the cache of a hub, where every file is a link to a blob elsewhere."""
    index = shards(tmp_path / "snapshot", one={"a": "first"})
    shutil.move(tmp_path / "snapshot" / "one.safetensors", tmp_path / "blob")
    (tmp_path / "snapshot" / "one.safetensors").symlink_to("../blob")
    with open_checkpoint(index) as opened:
        assert content(opened) == {"a": "first"}


def test_an_error_in_a_shard_names_the_shard(tmp_path: Path) -> None:
    index = shards(tmp_path, one={"a": "first"}, two={"c": "second"})
    os.truncate(tmp_path / "two.safetensors", (tmp_path / "two.safetensors").stat().st_size - 1)
    message, hint = refusal(index, TruncatedError)
    size = (tmp_path / "two.safetensors").stat().st_size
    assert message == f" (two.safetensors): tensor 'c' ends at byte {size + 1:,}, but the file holds {size:,}"
    assert hint == "the download may have been cut off; fetch the file again"


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    index = shards(tmp_path, one={"a": "first"}, two={"c": "second"})
    (tmp_path / "two.safetensors").unlink()
    assert refusal(index) == (": the shard 'two.safetensors' is missing", "fetch all shards beside the index")
    (tmp_path / "two.safetensors").mkdir()
    assert refusal(index) == (": the shard 'two.safetensors' is missing", "fetch all shards beside the index")


@pytest.mark.parametrize(
    "name",
    [
        "../one.safetensors",
        "sub/../../one.safetensors",
        "..\\one.safetensors",
        "/etc/passwd",
        "\\\\server\\share\\one.safetensors",
        "C:\\one.safetensors",
        "c:one.safetensors",
        "..",
        "",
        "one\0.safetensors",
    ],
)
def test_a_shard_outside_the_folder_is_not_read(tmp_path: Path, name: str) -> None:
    put(tmp_path / "one.safetensors", a="first")
    index = shards(tmp_path / "sub", {"a": name})
    shown = repr(name)
    assert refusal(index) == (f": the shard {shown} lies outside the index's folder, and is not read", None)


@pytest.mark.parametrize(
    ("value", "shown"), [(3, "3"), (None, "None"), (["one.safetensors"], "['one.safetensors']"), ({}, "{}")]
)
def test_a_shard_must_be_named_by_a_text(tmp_path: Path, value: Any, shown: str) -> None:
    index = shards(tmp_path, {"a": value}, one={"a": "first"})
    assert refusal(index) == (f": the index names {shown} as a shard, expected a file name", None)


@pytest.mark.parametrize("name", ["n" * 300, "\ud800", "a\nb\x1b[31m"])
def test_a_shard_that_cannot_be_is_missing(tmp_path: Path, name: str) -> None:
    index = shards(tmp_path, {"a": name})
    message, hint = refusal(index)
    assert message.startswith(": the shard '")
    assert message.endswith("' is missing")
    assert len(message) < 140
    assert hint == "fetch all shards beside the index"


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    index = shards(tmp_path, one={"a": "first", "b": "x"}, two={"b": "y"})
    put_json(index, {"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}})
    put(tmp_path / "two.safetensors", b="y", c="z")
    assert refusal(index) == (": tensor 'b' stands in two shards, 'one.safetensors' and 'two.safetensors'", None)


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(tmp_path: Path) -> None:
    index = shards(tmp_path, {"a": "two.safetensors", "b": "one.safetensors"}, one={"a": "first"}, two={"b": "second"})
    assert refusal(index) == (
        ": tensor 'a' stands in 'one.safetensors', but the index says 'two.safetensors'",
        None,
    )


def test_a_tensor_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    index = shards(tmp_path, {"a": "one.safetensors"}, one={"a": "first", "b": "x"})
    assert refusal(index) == (": tensor 'b' stands in 'one.safetensors', but the index says nowhere", None)


@pytest.mark.parametrize(
    ("count", "told"),
    [(1, "'n0'"), (5, "'n0', 'n1', 'n2', 'n3', 'n4'"), (7, "'n0', 'n1', 'n2', 'n3', 'n4' (and 2 more)")],
)
def test_tensors_that_no_shard_holds_are_refused(tmp_path: Path, count: int, told: str) -> None:
    table = {"a": "one.safetensors", **{f"n{n}": "one.safetensors" for n in range(count)}}
    index = shards(tmp_path, table, one={"a": "first"})
    assert refusal(index) == (f": the index names tensors that no shard holds: {told}", None)


@pytest.mark.parametrize(
    "value", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}, {"other": {"a": "b"}}]
)
def test_an_index_without_a_table_is_refused(tmp_path: Path, value: Any) -> None:
    index = put_json(tmp_path / "model.safetensors.index.json", value)
    assert refusal(index) == (
        ": has no 'weight_map', expected an index of shards: {tensor name: file name}",
        None,
    )


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ('"x"', "str"), ("3", "int"), ("null", "NoneType")])
def test_an_index_that_is_no_object_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    assert refusal(index) == (f": model.safetensors.index.json holds a JSON {kind}, expected an object", None)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "expecting value"),
        (b"{", "expecting property name enclosed in double quotes"),
        (b'{"weight_map": {"a": 1}} trailing', "extra data"),
        (b"<html>", "expecting value"),
        (b'{"a": "\xff"}', "'utf-8' codec can't decode byte 0xff in position 7"),
        (b"[" * 100_000, "too deeply nested"),
        (b'{"a": ' * 100_000, "too deeply nested"),
        (b"9" * 5000, "exceeds the limit (4300 digits) for integer string conversion"),
    ],
)
def test_an_index_that_is_no_json_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(data)
    message, hint = refusal(index)
    assert message == f": model.safetensors.index.json is no JSON: {reason}"
    assert hint is None


def test_an_index_of_senseless_size_is_not_read(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.touch()
    os.truncate(index, 100 << 20)
    assert refusal(index) == (
        ": model.safetensors.index.json holds 104,857,600 bytes, expected at most 67,108,864",
        None,
    )


def test_a_missing_index_is_no_such_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "model.safetensors.index.json", UsageError) == (": no such file", None)


# ------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.safetensors", "model.safetensors", "adapter_model.safetensors", "odd.safetensors"]
)
def test_a_folder_of_one_file_is_that_file(tmp_path: Path, name: str) -> None:
    put(tmp_path / "unet" / name, w="weights")
    (tmp_path / "unet" / "config.json").write_text("{}")
    with open_checkpoint(tmp_path / "unet") as opened:
        assert opened.container == "safetensors"
        assert opened.label == str(tmp_path / "unet")
        assert opened.name == "unet"
        assert [f.label for f in opened.files] == [f"{tmp_path / 'unet'} ({name})"]
        assert content(opened) == {"w": "weights"}


def test_of_several_copies_the_most_exact_is_taken(tmp_path: Path) -> None:
    put(tmp_path / "model.fp16.safetensors", w="half")
    put(tmp_path / "model.safetensors", w="full")
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle of the same")
    with open_checkpoint(tmp_path) as opened:
        assert content(opened) == {"w": "full"}
    (tmp_path / "model.safetensors").unlink()
    with open_checkpoint(tmp_path) as opened:
        assert content(opened) == {"w": "half"}


@pytest.mark.parametrize("index", ["odd.safetensors.index.json", "odd.safetensors.index.fp16.json"])
def test_a_folder_of_shards_is_found_by_its_index(tmp_path: Path, index: str) -> None:
    shards(tmp_path, one={"a": "first"}, two={"b": "second"}).rename(tmp_path / index)
    with open_checkpoint(tmp_path) as opened:
        assert opened.container == "shards"
        assert content(opened) == {"a": "first", "b": "second"}


def test_shards_without_their_index_are_refused(tmp_path: Path) -> None:
    for n in (1, 2):
        put(tmp_path / f"model-0000{n}-of-00002.safetensors", **{f"w{n}": "x"})
    assert refusal(tmp_path, UsageError) == (
        ": a folder of shards without their index: "
        "'model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'",
        "fetch the index beside them",
    )


def test_a_folder_of_several_models_is_refused(tmp_path: Path) -> None:
    for n in range(7):
        put(tmp_path / f"{n}.safetensors", w="x")
    assert refusal(tmp_path, UsageError) == (
        ": a folder with several models: '0.safetensors', '1.safetensors', '2.safetensors', '3.safetensors', "
        "'4.safetensors' (and 2 more)",
        "name one of them",
    )


@pytest.mark.parametrize(
    ("held", "hint"), [([], "it is empty"), (["notes.txt", "b.gguf"], "it holds 'b.gguf', 'notes.txt'")]
)
def test_a_folder_without_weights_is_refused(tmp_path: Path, held: list[str], hint: str) -> None:
    for name in held:
        (tmp_path / name).write_text("x")
    assert refusal(tmp_path, UsageError) == (
        ": a folder without weights, expected a diffusers folder, shards with their index, or one file",
        hint,
    )


def test_an_error_in_a_folders_file_begins_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.safetensors").write_bytes(b"")
    assert refusal(tmp_path / "unet") == ("/model.safetensors: an empty file, expected safetensors", None)


# ------------------------------------------------------------------------------------------------ diffusers

UNET = ["diffusers", "UNet2DConditionModel"]
VAE = ["diffusers", "AutoencoderKL"]
TEXT = ["transformers", "CLIPTextModel"]
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": TEXT,
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": UNET,
    "vae": VAE,
}


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A diffusers folder: a sharded unet, a VAE, a text encoder, and components without weights."""
    folder = tmp_path / "pipe"
    put_json(folder / "model_index.json", INDEX)
    unet = shards(folder / "unet", one={"conv_in.weight": "in"}, two={"conv_out.weight": "out"})
    unet.rename(folder / "unet" / "diffusion_pytorch_model.safetensors.index.json")
    put(folder / "vae" / "diffusion_pytorch_model.safetensors", {"format": "pt"}, **{"conv_in.weight": "vae in"})
    put(folder / "text_encoder" / "model.safetensors", **{"embeddings.weight": "text"})
    put_json(folder / "scheduler" / "scheduler_config.json", {})
    put_json(folder / "tokenizer" / "tokenizer_config.json", {})
    return folder


def test_a_diffusers_folder_is_one_checkpoint_of_its_components(pipeline: Path) -> None:
    with open_checkpoint(pipeline) as opened:
        assert opened.container == "diffusers"
        assert opened.label == str(pipeline)
        assert opened.name == "pipe"
        assert opened.components == ("text_encoder", "unet", "vae")
        assert opened.left_out == []
        assert content(opened) == {
            "text_encoder.embeddings.weight": "text",
            "unet.conv_in.weight": "in",
            "unet.conv_out.weight": "out",
            "vae.conv_in.weight": "vae in",
        }
        assert {f.label for f in opened.files} == {f"{pipeline} ({c})" for c in opened.components}
        assert len(opened.files) == 4


@pytest.mark.parametrize("missing", ["the folder", "the file"])
def test_a_component_without_its_weights_is_left_out_and_named(pipeline: Path, missing: str) -> None:
    if missing == "the folder":
        shutil.rmtree(pipeline / "vae")
    else:
        (pipeline / "vae" / "diffusion_pytorch_model.safetensors").rename(pipeline / "vae" / "weights.old")
    with open_checkpoint(pipeline) as opened:
        assert opened.components == ("text_encoder", "unet")
        assert opened.left_out == [("vae", "a 'AutoencoderKL' without weights in its folder")]
        assert not any(key.startswith("vae.") for key in opened.tensors)


@pytest.mark.parametrize(
    "kind",
    [
        "EulerDiscreteScheduler", "CLIPTokenizer", "T5TokenizerFast", "CLIPFeatureExtractor", "CLIPImageProcessor",
        "CLIPImageProcessorFast", "Qwen2VLProcessor", "VaeImageProcessor",
    ],
)  # fmt: skip
def test_components_that_have_no_weights_are_not_missed(pipeline: Path, kind: str) -> None:
    put_json(pipeline / "model_index.json", {**INDEX, "helper": ["transformers", kind]})
    with open_checkpoint(pipeline) as opened:
        assert opened.left_out == []


def test_a_component_folder_is_a_checkpoint_of_its_own(pipeline: Path) -> None:
    with open_checkpoint(pipeline / "unet") as opened:
        assert opened.container == "shards"
        assert opened.name == "unet"
        assert content(opened) == {"conv_in.weight": "in", "conv_out.weight": "out"}
    assert refusal(pipeline / "scheduler", UsageError)[1] == "it holds 'scheduler_config.json'"


def test_an_error_in_a_component_names_the_component(pipeline: Path) -> None:
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert refusal(pipeline) == (" (vae): an empty file, expected safetensors", None)
    put(pipeline / "vae" / "diffusion_pytorch_model.safetensors", w="x")
    (pipeline / "unet" / "two.safetensors").unlink()
    assert refusal(pipeline) == (
        " (unet): the shard 'two.safetensors' is missing",
        "fetch all shards beside the index",
    )


def test_a_component_with_several_models_is_refused(pipeline: Path) -> None:
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").rename(pipeline / "vae" / "a.safetensors")
    put(pipeline / "vae" / "b.safetensors", w="x")
    assert refusal(pipeline, UsageError) == (
        " (vae): a folder with several models: 'a.safetensors', 'b.safetensors'",
        "name one of them",
    )


@pytest.mark.parametrize("name", ["../../etc", "/etc", "unet/..", "", "a b", "..", "un\u202eet", "unet\0"])
def test_a_component_that_leaves_the_folder_is_refused(pipeline: Path, name: str) -> None:
    put_json(pipeline / "model_index.json", {**INDEX, name: UNET})
    assert refusal(pipeline) == (
        f": model_index.json names a component {name!r}, expected a plain folder name",
        None,
    )


@pytest.mark.parametrize("value", [[], [3, "x"], ["x", None], {"a": "b"}, "text", True, 3, None])
def test_values_that_name_no_component_are_passed_over(pipeline: Path, value: Any) -> None:
    put_json(pipeline / "model_index.json", {**INDEX, "something": value})
    with open_checkpoint(pipeline) as opened:
        assert opened.components == ("text_encoder", "unet", "vae")


def test_a_diffusers_folder_without_any_weights_is_refused(tmp_path: Path) -> None:
    put_json(tmp_path / "model_index.json", INDEX)
    assert refusal(tmp_path) == (": a diffusers folder without weights", "fetch the folders of its components too")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[1, 2]", "model_index.json holds a JSON list, expected an object"),
        ("{", "model_index.json is no JSON: expecting property name enclosed in double quotes"),
        ("[" * 50_000, "model_index.json is no JSON: too deeply nested"),
    ],
)
def test_a_broken_model_index_is_refused(pipeline: Path, text: str, what: str) -> None:
    (pipeline / "model_index.json").write_text(text)
    assert refusal(pipeline) == (f": {what}", None)


def test_an_error_while_reading_names_the_component(pipeline: Path) -> None:
    with open_checkpoint(pipeline) as opened:
        os.truncate(pipeline / "vae" / "diffusion_pytorch_model.safetensors", 50)
        with pytest.raises(TruncatedError) as caught:
            content(opened)
        assert str(caught.value).startswith(f"{pipeline} (vae): ends at byte 50, ")
        with pytest.raises(FormatError) as changed:
            opened.check_unchanged()
        assert str(changed.value) == f"{pipeline} (vae): was changed while it was read"
