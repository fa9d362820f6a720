"""Tiny models are whole: the libraries load them and sample, and weightops knows their classic ones."""

from __future__ import annotations

import csv
import hashlib
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

from weightops import convert, inspect
from weightops.diffusion.sprites import COLOURS, GROUNDS, SHAPES, STYLES, WORDS
from weightops.diffusion.tiny import TINY, sprites, tiny_blip, tiny_model, tiny_vae
from weightops.errors import OutputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    Image = pytest.importorskip("PIL.Image")
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny folder of an architecture, made once."""
    root = tmp_path_factory.mktemp("tiny")

    def made(name: str) -> Path:
        return root / name if (root / name).exists() else tiny_model(name, root / name)

    return made


def loaded(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = diffusers.DiffusionPipeline.from_pretrained(path, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
            # Aligned in memory as a new model's: a product may round otherwise where operands lie otherwise in a file.
            parameter.data = parameter.data.clone()
    return pipe


def sampled(pipe: Any, prompt: str) -> Any:
    words: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
    words["generator"] = torch.Generator().manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "Video" in type(pipe).__name__:
            image = Image.new("RGB", (64, 64), prompt)
            return pipe(image, num_frames=4, decode_chunk_size=2, **words).frames
        return pipe(prompt, **words).images


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_folder_loads_and_samples_what_was_asked_for(name: str, folder: Callable[[str], Path]) -> None:
    pipe = loaded(folder(name))
    one, other = sampled(pipe, "red"), sampled(pipe, "blue")
    assert one.shape == ((1, 4, 3, 64, 64) if name == "svd" else (1, 3, 64, 64))
    assert torch.isfinite(one).all()
    assert one.std() > 0.05
    assert not torch.equal(one, other)
    assert torch.equal(one, sampled(pipe, "red"))
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl", "sd3", "flux"])
def test_weightops_knows_them(name: str, folder: Callable[[str], Path]) -> None:
    assert inspect(folder(name)).architecture == name


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
def test_there_and_back_is_the_same_model(name: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    convert(folder(name), to="original", output=tmp_path / "one.safetensors")
    convert(tmp_path / "one.safetensors", to="diffusers", like=folder(name), output=tmp_path / "back")
    before, after = loaded(folder(name)), loaded(tmp_path / "back")
    assert torch.equal(sampled(before, "red"), sampled(after, "red"))
    assert before.scheduler.config.prediction_type == after.scheduler.config.prediction_type
    assert before.scheduler.config.prediction_type == ("v_prediction" if name == "sd2" else "epsilon")


def test_text_encoders_are_written_in_the_old_form(folder: Callable[[str], Path]) -> None:
    from safetensors import safe_open

    for name, part in (("sd15", "text_encoder"), ("sdxl", "text_encoder_2"), ("flux", "text_encoder")):
        with safe_open(folder(name) / part / "model.safetensors", "pt") as file:
            keys = set(file.keys())
        assert "text_model.embeddings.token_embedding.weight" in keys
        assert all(key.startswith(("text_model.", "text_projection.")) for key in keys)


def test_a_seed_is_a_model_and_leaves_the_other_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    digests = []
    for n, seed in enumerate((0, 0, 1)):
        path = tiny_vae(tmp_path / str(n), seed=seed) / "diffusion_pytorch_model.safetensors"
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(torch.rand(1), expected)


def test_a_tiny_blip_says_words_that_depend_upon_the_image(tmp_path: Path) -> None:
    path = tiny_blip(tmp_path / "blip")
    processor = transformers.BlipProcessor.from_pretrained(path)
    model = transformers.BlipForConditionalGeneration.from_pretrained(path)
    pictures = [Image.open(file) for file in sorted(sprites(tmp_path / "pictures", count=4).glob("*.png"))]
    with torch.no_grad():
        said = model.generate(**processor(images=pictures, return_tensors="pt"), max_new_tokens=8)
    captions = [processor.decode(tokens, skip_special_tokens=True) for tokens in said]
    assert len(set(captions)) > 1
    assert {word for caption in captions for word in caption.split()} <= set(WORDS)


def test_sprites_are_what_their_captions_say(tmp_path: Path) -> None:
    path = sprites(tmp_path / "s", count=20, seed=4)
    rows = list(csv.DictReader((path / "metadata.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["file_name"] for row in rows] == sorted(file.name for file in path.glob("*.png"))
    for row in rows:
        _, side, colour, shape, on, ground = row["caption"].split()
        assert (side in ("small", "big"), on) == (True, "on")
        assert shape in SHAPES
        image = Image.open(path / row["file_name"])
        assert image.size == (64, 64)
        found = {value for _, value in image.getcolors(4096)}
        assert GROUNDS[ground] in found
        assert tuple(round(v * 0.95) for v in COLOURS[colour]) in found


def test_styles_share_captions_and_no_picture(tmp_path: Path) -> None:
    made = {style: sprites(tmp_path / style, count=6, seed=2, style=style) for style in STYLES}
    assert len({(path / "metadata.csv").read_bytes() for path in made.values()}) == 1
    for n in range(6):
        assert len({(path / f"sprite-{n:03d}.png").read_bytes() for path in made.values()}) == len(STYLES)
    again = sprites(tmp_path / "again", count=6, seed=2, style="dusk", captions=False)
    assert all((again / f.name).read_bytes() == f.read_bytes() for f in made["dusk"].glob("*.png"))
    assert not (again / "metadata.csv").exists()


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"unknown architecture 'sd14'"):
        tiny_model("sd14", tmp_path / "x")
    with pytest.raises(OutputError, match="full: exists"):
        tiny_model("sd15", tmp_path / "full")
    with pytest.raises(OutputError, match="full: exists"):
        sprites(tmp_path / "full", count=1)
    with pytest.raises(UsageError, match=r"unknown style 'cubist'"):
        sprites(tmp_path / "x", count=1, style="cubist")
    with pytest.raises(UsageError, match="expected 1 or more"):
        sprites(tmp_path / "x", count=0)
    with pytest.raises(UsageError, match="multiple of 16"):
        sprites(tmp_path / "x", count=1, size=40)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_a_folder_that_is_not_whole_has_not_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_path: Path) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr("weightops.diffusion.tiny._old_form", fails)
    with pytest.raises(RuntimeError, match="no room"):
        tiny_model("sd15", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_importing_it_costs_nothing_heavy() -> None:
    program = "import sys, weightops.diffusion.tiny; print(sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "transformers", "PIL"} & set(done.stdout.replace("'", " ").split())


def test_a_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr("diffusers.models.modeling_utils.safetensors.torch.save_file", full)
    with pytest.raises(OutputError, match=r"vae: cannot be written: .*No space left on device"):
        tiny_vae(tmp_path / "vae")
    assert list(tmp_path.iterdir()) == []
