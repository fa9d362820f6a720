"""A real, tiny BLIP captions a folder: broken images are named, what is done is kept, datasets loads the result."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import CLI

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from commandline import STYLES, harmful, weightops_here

from weightops.cli import render
from weightops.diffusion.blip import MODEL
from weightops.diffusion.caption import CaptionReport, caption
from weightops.diffusion.tiny import tiny_blip
from weightops.errors import (
    FormatError,
    Interrupted,
    MemoryRefused,
    MismatchError,
    NetworkError,
    OutputError,
    UsageError,
    WeightopsError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    BLIP = transformers.BlipForConditionalGeneration
    Image = pytest.importorskip("PIL.Image")
torch.set_num_threads(1)

WORDS = 6  # tokens of a caption, to be quick


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_blip(tmp_path_factory.mktemp("models") / "blip")


def drawing(seed: int, width: int = 300, height: int = 260) -> Any:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    found = np.stack([x * 200 // width, y * 200 // height, (x + y) % 200], axis=-1).astype(np.uint8)
    rng = np.random.default_rng(seed)
    for left, top in zip(rng.integers(0, width, 9), rng.integers(0, height, 9), strict=True):
        found[top : top + height // 3, left : left + width // 3] = rng.integers(0, 256, 3)
    return Image.fromarray(found)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five different images, one of them deeper."""
    made = tmp_path / "images"
    (made / "deep").mkdir(parents=True)
    for seed, name in enumerate(("a.png", "b.png", "c.png", "d.png", "deep/e.png")):
        drawing(seed).save(made / name)
    return made


def rows(folder: Path) -> dict[str, str]:
    with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
        return {row["file_name"]: row["caption"] for row in csv.DictReader(file)}


def go(folder: Path, blip: Path, **more: Any) -> CaptionReport:
    return caption(folder, model=blip, max_tokens=WORDS, **more)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many images the model was given, each time."""
    counts: list[int] = []
    real = BLIP.generate

    def generate(self: Any, pixel_values: Any, **more: Any) -> Any:
        counts.append(len(pixel_values))
        return real(self, pixel_values, **more)

    monkeypatch.setattr(BLIP, "generate", generate)
    return counts


# ------------------------------------------------------------------------------------------------ the whole way


@pytest.mark.filterwarnings("ignore::DeprecationWarning:datasets", "ignore::DeprecationWarning:multiprocess")
def test_a_folder_with_bad_images_is_captioned_and_loads_as_an_imagefolder(
    folder: Path, blip: Path, tmp_path: Path
) -> None:
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "page.jpg").write_text("<html>404 Not Found</html>")
    (folder / "copy.png").write_bytes(whole)
    drawing(9, 40, 30).save(folder / "small.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    drawing(7).save(folder / "turned.jpg", exif=exif)
    (folder / "notes.md").write_text("mine")

    report = go(folder, blip, query="sprite", batch=3)
    used = ["a.png", "b.png", "c.png", "copy.png", "d.png", "deep/e.png", "small.png", "turned.jpg"]
    assert list(report.captions) == used
    assert report.broken == [
        ("cut.png", "truncated: its data end before the image does"),
        ("page.jpg", "a web page, expected BMP, GIF, JPEG, PNG, TIFF or WEBP"),
    ]
    assert report.duplicates == [("a.png", "copy.png", 0)]
    assert [p.name for p in report.tiny] == ["small.png"]
    assert report.found.ignored == ["notes.md"]
    assert (report.written, report.warnings, report.kept) == ([str(folder / "metadata.csv")], [], 0)
    assert rows(folder) == report.captions
    assert all(text.startswith("sprite, ") for text in report.captions.values())
    assert len(set(report.captions.values())) > 3, "this model tells images apart"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        loaded = datasets.load_dataset(
            "imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "c")
        )
        assert loaded.column_names == ["image", "caption"]
        assert loaded["caption"] == [report.captions[name] for name in used]
        assert [image.size for image in loaded["image"]][-2:] == [(40, 30), (260, 300)]


def test_captions_are_those_of_the_library_whatever_the_batch(folder: Path, blip: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = BLIP.from_pretrained(blip)
        words = transformers.AutoTokenizer.from_pretrained(blip)
        processor = transformers.BlipImageProcessorPil.from_pretrained(blip)
        expected = {}
        for name in ("a.png", "b.png", "c.png", "d.png", "deep/e.png"):
            pixels = processor(images=Image.open(folder / name).convert("RGB"), return_tensors="pt").pixel_values
            found = model.generate(pixel_values=pixels, max_new_tokens=WORDS, do_sample=False, num_beams=1)
            expected[name] = words.decode(found[0], skip_special_tokens=True).strip()
    for batch in (1, 2, 8):
        assert go(folder, blip, batch=batch, force=True).captions == expected


def test_the_model_sees_images_upright(tmp_path: Path, blip: Path) -> None:
    folder = tmp_path / "turned"
    folder.mkdir()
    exif = Image.Exif()
    for turn, orientation in ((Image.Transpose.ROTATE_90, 6), (Image.Transpose.ROTATE_270, 8)):
        drawing(3).save(folder / f"{orientation}-upright.png")
        drawing(3).transpose(turn).save(folder / f"{orientation}-sideways.png")
        exif[0x0112] = orientation
        drawing(3).transpose(turn).save(folder / f"{orientation}-turned.png", exif=exif)
    said = go(folder, blip).captions
    for orientation in (6, 8):
        assert said[f"{orientation}-turned.png"] == said[f"{orientation}-upright.png"]
        assert said[f"{orientation}-turned.png"] != said[f"{orientation}-sideways.png"]


def test_prompt_trigger_and_beams_do_what_they_say(folder: Path, blip: Path) -> None:
    plain = go(folder, blip).captions
    prompted = go(folder, blip, prompt="a blue ball", trigger="sks", force=True).captions
    assert all(text.startswith("sks, a blue ball") for text in prompted.values())
    assert prompted == rows(folder)
    assert go(folder, blip, dtype="bf16", force=True).captions.keys() == plain.keys()
    searched = go(folder, blip, beams=4, force=True).captions
    assert searched != plain
    assert go(folder, blip, prompt="red", query="red", force=True).captions["a.png"].startswith("red ")


# ------------------------------------------------------------------------------------------------ what is kept


def test_a_run_that_was_stopped_goes_on_where_it_was(folder: Path, blip: Path, seen: list[int]) -> None:
    go(folder, blip, batch=2, query="sprite")
    whole = (folder / "metadata.csv").read_bytes()
    (folder / "metadata.csv").unlink()
    seen.clear()

    def stop(done: int, _total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        go(folder, blip, batch=2, query="sprite", on_progress=stop)
    assert str(caught.value) == f"{folder}: interrupted: 2 of 5 captions are written"
    assert caught.value.hint == "the same command goes on with the others"
    assert list(rows(folder)) == ["a.png", "b.png"]
    assert seen == [2]

    report = go(folder, blip, batch=2, query="sprite")
    assert seen == [2, 2, 1]
    assert (list(report.captions), report.kept) == (["c.png", "d.png", "deep/e.png"], 2)
    assert (folder / "metadata.csv").read_bytes() == whole

    with pytest.raises(Interrupted) as caught:
        go(folder, blip, batch=2, force=True, on_progress=stop)
    assert caught.value.hint == "with --force it begins anew; without, those that have a caption keep it"


def test_a_finished_folder_needs_no_model_and_is_not_touched(folder: Path, blip: Path, seen: list[int]) -> None:
    go(folder, blip)
    seen.clear()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    report = go(folder, blip)
    assert (report.kept, report.captions, report.written, seen) == (5, {}, [], [])
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_captions_of_ones_own_stay_and_force_makes_them_anew(folder: Path, blip: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,caption,seed\nb.png,my own words,7\na.png,,8\n")
    report = go(folder, blip)
    assert (report.kept, list(report.captions)) == (1, ["a.png", "c.png", "d.png", "deep/e.png"])
    assert rows(folder)["b.png"] == "my own words"
    forced = go(folder, blip, force=True)
    assert (forced.kept, len(forced.captions)) == (0, 5)
    lines = (folder / "metadata.csv").read_text().splitlines()
    assert lines[:3] == [
        "file_name,caption,seed", f"a.png,{forced.captions['a.png']},8", f"b.png,{forced.captions['b.png']},7",
    ]  # fmt: skip


def test_words_stand_beside_the_images_if_so_asked(folder: Path, blip: Path) -> None:
    report = go(folder, blip, write="txt")
    assert not (folder / "metadata.csv").exists()
    assert report.output == str(folder)
    for name, text in report.captions.items():
        assert (folder / name).with_suffix(".txt").read_text() == text + "\n"


def test_captions_that_are_there_are_written_in_the_other_form_without_a_model(
    folder: Path, blip: Path, seen: list[int]
) -> None:
    (folder / "metadata.csv").write_text("".join(["file_name,caption\n", *(f"{n}.png,words of {n}\n" for n in "abcd")]))
    (folder / "a.txt").write_text("other words")
    (folder / "deep" / "e.txt").write_text("words of e")
    report = go(folder, blip, write="both")
    assert (report.kept, report.captions, seen) == (5, {}, [])
    assert report.written == [str(folder / name) for name in ("metadata.csv", "b.txt", "c.txt", "d.txt")]
    assert rows(folder)["deep/e.png"] == "words of e"
    assert (folder / "b.txt").read_text() == "words of b\n"
    assert (folder / "a.txt").read_text() == "other words", "what someone wrote is not replaced"


def test_a_dry_run_loads_no_model_and_writes_nothing(folder: Path) -> None:
    (folder / "a.txt").write_text("mine")
    before = sorted(folder.rglob("*"))
    report = caption(folder, dry_run=True, min_side=0)  # of a model that is not here
    assert (report.todo, report.kept) == (["b.png", "c.png", "d.png", "deep/e.png"], 1)
    assert (report.captions, report.written, report.tiny) == ({}, [], [])
    assert sorted(folder.rglob("*")) == before


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_an_image_that_is_gone_when_its_turn_comes_is_named(folder: Path, blip: Path) -> None:
    def remove(done: int, total: int) -> None:
        if done == total:
            (folder / "b.png").unlink()

    report = go(folder, blip, on_look=remove)
    assert report.broken == [("b.png", "cannot be read: No such file or directory")]
    assert list(rows(folder)) == ["a.png", "c.png", "d.png", "deep/e.png"]


def test_a_model_that_says_nothing_is_told_of(folder: Path, blip: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = BLIP.from_pretrained(blip)
        model.text_decoder.cls.predictions.bias.data[model.config.text_config.sep_token_id] = 1e6
        shutil.copytree(blip, tmp_path / "mute")
        model.save_pretrained(tmp_path / "mute")
    report = go(folder, tmp_path / "mute")
    said = "the model said nothing of 'a.png', 'b.png', 'c.png', 'd.png', 'deep/e.png'"
    assert (report.captions, report.written, report.warnings) == ({}, [], [said])
    assert go(folder, tmp_path / "mute", query="sprite").captions["a.png"] == "sprite"


def test_what_imagefolder_would_stumble_over_is_said(folder: Path, blip: Path) -> None:
    (folder / "page.png").write_text("<html>")
    (folder / "metadata.csv").write_text("file_name,caption\npage.png,x\ngone.png,y\n")
    for name in ("train_1.png", "my test.png", "deep/trained.png", "latest.png"):
        (folder / name).write_bytes((folder / "a.png").read_bytes())
    assert caption(folder, dry_run=True).warnings == [
        "metadata.csv names a file that is not there, where imagefolder stops: 'gone.png'",
        "metadata.csv names broken images, where imagefolder stops: 'page.png'",
        "imagefolder makes a split of its own, without captions, of what is named 'my test.png', 'train_1.png': rename "
        "it, or load the folder with data_files={'train': '**'}",
    ]


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")],
    ids=["CUDA", "Python", "CPU"],
)  # fmt: skip
def test_want_of_memory_is_told_with_its_remedy(
    folder: Path, blip: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def generate(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(BLIP, "generate", generate)
    for batch, hint in ((4, "--batch 2 takes less"), (1, "--dtype bf16 takes half of it")):
        with pytest.raises(MemoryRefused) as caught:
            go(folder, blip, batch=batch)
        images = "4 images at once" if batch == 4 else "1 image"
        assert (str(caught.value), caught.value.hint) == (f"caption: too little memory for {images}", hint)


def test_a_mistake_of_ours_in_the_model_is_not_hidden(
    folder: Path, blip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*_: Any, **__: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(BLIP, "generate", generate)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        go(folder, blip)


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ({"write": "json"}, "--write: found 'json', expected csv, txt or both", None),
        ({"dtype": "int8"}, "--dtype: found 'int8', expected auto, fp32, fp16 or bf16", None),
        ({"batch": 0}, "--batch: found 0, expected a whole number, 1 or more", None),
        ({"max_tokens": -1}, "--max-tokens: found -1, expected a whole number, 1 or more", None),
        ({"beams": 0}, "--beams: found 0, expected a whole number, 1 or more", None),
        ({"min_side": -1}, "--min-side: found -1, expected a whole number, 0 or more", None),
        ({"query": " \n"}, "--query: found ' \\n', expected words", None),
        ({"trigger": ""}, "--trigger: found '', expected words", None),
        ({"prompt": ""}, "--prompt: found '', expected words", None),
        ({"template": "{query}"}, "--template: has no {caption}, so that all images would be captioned alike", None),
        ({"max_tokens": 64}, "--max-tokens: found 64, expected at most 63 in this model", None),
        ({"max_tokens": 64, "prompt": "red ball"},
         "--max-tokens: found 64, expected at most 61 in this model, after the 3 of --prompt", None),
        ({"model": "no-such"}, "no-such: no such folder, and no name of a model on the hub (owner/name)", None),
        ({"model": "../a/b"}, "../a/b: no such folder, and no name of a model on the hub (owner/name)", None),
        ({"model": "hf://a/b/c"}, "hf://a/b/c: expected hf://owner/name[@revision], without a path", None),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_words_that_mean_nothing_are_refused(
    folder: Path, blip: Path, words: dict[str, Any], message: str, hint: str | None
) -> None:
    with pytest.raises(UsageError) as caught:
        caption(folder, **{"model": blip, **words})
    assert (str(caught.value), caught.value.hint) == (message, hint)
    assert not (folder / "metadata.csv").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path: Path, blip: Path) -> None:
    with pytest.raises(UsageError) as caught:
        caption(tmp_path / "nowhere", model=blip, device="cuda")
    assert str(caught.value) == "--device: 'cuda' was asked for, but this torch sees no CUDA device"


EXPECTED = f"expected a captioning model of BLIP, such as {MODEL}"


def without(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def config(**changed: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def lack(*ending: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = model / "model.safetensors"
        save_file({k: v for k, v in load_file(path).items() if not k.endswith(ending)}, path, {"format": "pt"})

    return change


def cut_weights(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def few_words(model: Path) -> None:
    words = transformers.BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5})
    words.save_pretrained(model)


NOT_BLIP: list[tuple[Callable[[Path], Any], type[WeightopsError], str]] = [
    (without("config.json"), FormatError, f"holds no config.json, {EXPECTED}"),
    (lambda m: (m / "config.json").write_text("{"), FormatError, "its config.json is no JSON object"),
    (config(model_type="clip"), MismatchError, f"a model of type 'clip', {EXPECTED}"),
    (config(architectures=["BlipForQuestionAnswering"]), MismatchError,
     f"a BlipForQuestionAnswering of BLIP, {EXPECTED}"),
    (without("tokenizer.json"), FormatError, "holds no tokenizer.json, expected a tokenizer"),
    (without("processor_config.json"), FormatError,
     "holds no preprocessor_config.json, expected what makes tensors of images"),
    (without("model.safetensors"), FormatError, "holds no model.safetensors, expected weights"),
    (cut_weights, FormatError, "cannot be loaded as a captioning model of BLIP: Error while deserializing header: "),
    (lack("class_embedding"), MismatchError,
     "its weights lack 1 that a captioning model of BLIP has: 'vision_model.embeddings.class_embedding'"),
    (few_words, MismatchError, "its tokenizer has 6 tokens, its model "),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "kind", "message"), NOT_BLIP, ids=[message[:30] for *_, message in NOT_BLIP])
def test_a_model_that_is_not_one_is_refused(
    folder: Path, blip: Path, tmp_path: Path, spoil: Callable[[Path], Any], kind: type[WeightopsError], message: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(blip, model)
    spoil(model)
    with pytest.raises(kind) as caught:
        go(folder, model)
    found = str(caught.value)
    assert found == f"{model}: {message}" or (message.endswith(" ") and found.startswith(f"{model}: {message}"))
    assert "\n" not in found
    assert not (folder / "metadata.csv").exists()


def test_a_file_is_no_model(folder: Path, blip: Path) -> None:
    with pytest.raises(UsageError) as caught:
        go(folder, blip / "config.json")
    assert caught.value.what == "is a file, expected a model's folder, or a name on the hub"


def test_a_folder_that_cannot_be_written_to_is_said(folder: Path, blip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OutputError) as caught:
        go(folder, blip)
    assert str(caught.value) == f"{folder / 'metadata.csv'}: cannot be written: Permission denied"


# ------------------------------------------------------------------------------------------------ the hub


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["owner/blip", "hf://owner/blip", "hf://owner/blip@main"])
def test_a_model_by_its_name_on_the_hub_comes_from_the_cache(folder: Path, blip: Path, cache: Path, name: str) -> None:
    place = cache / "models--owner--blip"
    shutil.copytree(blip, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    found = caption(folder, model=name, max_tokens=WORDS).captions
    assert found == go(folder, blip, force=True).captions


@pytest.mark.usefixtures("cache")
def test_a_model_that_cannot_be_fetched_is_one_line_with_the_way_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, errors

    away = "where there is a network: hf download owner/blip --local-dir FOLDER; then --model FOLDER"
    with pytest.raises(NetworkError) as caught:
        caption(folder, model="owner/blip")
    said = "owner/blip: is not in the cache, and HF_HUB_OFFLINE forbids to fetch it"
    assert (str(caught.value), caught.value.hint) == (said, away)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.test")
    answer: Any = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
    for error, message in (
        (errors.LocalEntryNotFoundError("no network\nat all"), "cannot be fetched: https://hub.test gives no answer"),
        (errors.RepositoryNotFoundError("404\n", response=answer),
         "there is no such model on https://hub.test, or none that can be seen without a token"),
        (errors.GatedRepoError("403", response=answer), "is gated"),
        (errors.EntryNotFoundError("404"), f"holds no config.json, {EXPECTED}"),
        (errors.HfHubHTTPError("500\nserver", response=answer), "cannot be fetched: 500 server"),
        (OSError(28, "No space left on device"), "cannot be fetched: [Errno 28] No space left on device"),
    ):  # fmt: skip

        def fetch(*_: Any, error: Exception = error, **__: Any) -> str:
            raise error

        monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
        with pytest.raises(WeightopsError) as caught:
            caption(folder, model="owner/blip")
        assert str(caught.value) == f"owner/blip: {message}"
    assert not (folder / "metadata.csv").exists()


# ------------------------------------------------------------------------------------------------ the command line


def test_the_report_is_short_and_says_what_matters(folder: Path, blip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder / "page.jpg").write_text("<html>")
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    words = ("caption", "images", "--model", blip, "--max-tokens", WORDS, "--query", "sprite")
    done = weightops_here(*words)
    assert (done.code, done.err) == (0, "")
    said = rows(folder)
    lines = done.out.splitlines()
    assert [line.rstrip() for line in lines[:6]] == [
        "captioned 6 images", "", "images", "that can be read  6", "broken            1", "near-duplicates   1",
    ]  # fmt: skip
    assert [line.rstrip() for line in lines[6:-1]] == [
        "", "captions", *(f"  {name}  {said[name]}" for name in list(said)[:5]), "  and 1 more (-v names them)",
        "", "broken", "  page.jpg: a web page, expected BMP, GIF, JPEG, PNG, TIFF or WEBP",
        "", "near-duplicates", "  a.png and copy.png: 0 of 64 bits apart", "", "wrote  images/metadata.csv",
    ]  # fmt: skip
    again = weightops_here(*words)
    assert (again.code, again.err) == (0, "")
    assert again.out.splitlines()[0] == "nothing to caption: all images have one"
    assert "wrote" not in again.out
    assert weightops_here(*words, "-q") == (0, "", "")
    assert weightops_here(*words, "-v").out.count("near-duplicates") == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_counts_pieces_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = []
    for stream, quiet in ((Terminal(), False), (Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with render.counting("looking", quiet=quiet) as on_progress:
            on_progress(1, 4)
            on_progress(2, 3, title="captioning")
        shown.append(STYLES.sub("", stream.getvalue()))
    assert re.search(r"captioning .* 2/3 ", shown[0])
    assert shown[1:] == ["", ""]


def test_json_is_the_report(folder: Path, blip: Path) -> None:
    (folder / "page.jpg").write_text("<html>")
    done = weightops_here("caption", folder, "--model", blip, "--max-tokens", WORDS, "--write", "both", "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    said = rows(folder)
    assert (found["command"], found["pictures"], found["captioned"], found["kept"]) == ("caption", 5, 5, 0)
    assert found["captions"] == [{"file": name, "caption": text} for name, text in said.items()]
    files = [folder / "metadata.csv", *((folder / name).with_suffix(".txt") for name in said)]
    assert found["written"] == [str(path) for path in files]
    assert found["bytes_written"] == sum(path.stat().st_size for path in files)
    assert found["broken"] == [{"file": "page.jpg", "reason": "a web page, expected BMP, GIF, JPEG, PNG, TIFF or WEBP"}]
    assert [entry["path"] for entry in found["inputs"]] == [str(folder), str(blip)]
    assert found["inputs"][0]["bytes"] == sum((folder / name).stat().st_size for name in said)
    assert found["inputs"][0]["hash"].startswith("xxh3_128:")
    assert found["dry_run"] is False


def test_a_dry_run_says_what_there_is_and_imports_no_torch(folder: Path) -> None:
    drawing(9, 40, 30).save(folder / "small.png")
    program = (
        f"import sys; sys.path.insert(0, {str(CLI.parent)!r})\n"
        "from weightops.cli.main import run\n"
        f"try: run(['caption', {str(folder)!r}, '--dry-run'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert lines[0] == "would caption 6 images"
    assert lines[lines.index("to caption") + 1 :] == [
        "  a.png", "  b.png", "  c.png", "  d.png", "  deep/e.png", "  and 1 more (-v names them)",
        "", "tiny", "  small.png  40 × 30",
    ]  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="Windows allows no such file names")
def test_names_and_captions_do_not_act_on_the_terminal(folder: Path, blip: Path) -> None:
    name = "\x1b[31mred\u202e\n[bold].png"
    (folder / name).write_bytes((folder / "a.png").read_bytes())
    (folder / f"x{name}").write_text("<html>")
    (folder / "metadata.csv").write_text("file_name,caption\n\x1b[2J,x\n")
    done = weightops_here("caption", folder, "--model", blip, "--max-tokens", WORDS, "--trigger", "[red]", "-v")
    assert done.code == 0
    assert harmful(done.out + done.err) == set()
    assert "\\x1b[31mred\\u202e\\n[bold].png  [red], " in done.out
    assert rows(folder)[name].startswith("[red], ")


def test_refusals_are_one_line_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for words, code, lines in (
        (["empty"], 2, ["error: empty: holds no image", "hint: images are bmp, gif, jpeg, jpg, png, tif, tiff, webp"]),
        (["none"], 2, ["error: none: no such folder"]),
        (["empty", "--model", "empty"], 1, [f"error: empty: holds no config.json, {EXPECTED}"]),
        (["empty", "--batch", "0"], 2, ["error: --batch: found 0, expected a whole number, 1 or more"]),
    ):
        done = weightops_here("caption", *words)
        assert (done.code, done.out, done.err.splitlines()) == (code, "", lines)
