"""Videos of images: GIF and MP4 that others read, with the right frames, and every wrong word in a sentence."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from commandline import weightops_here

from weightops.diffusion import video as module
from weightops.diffusion.extras import hushed
from weightops.diffusion.tiny import tiny_model
from weightops.diffusion.video import encode_gif, generate_video
from weightops.errors import Interrupted, MemoryRefused, MismatchError, OutputError, UsageError, WeightopsError

if TYPE_CHECKING:
    from collections.abc import Callable

with hushed():
    diffusers = pytest.importorskip("diffusers")
    Image = pytest.importorskip("PIL.Image")
imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")

torch.set_num_threads(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' schedulers
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # imageio's pipes from ffmpeg
]

SMALL: dict[str, Any] = {"model": "svd", "size": "64x64", "steps": 1, "frames": 3}
_LOADED: dict[str, Any] = {}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("svd", tmp_path_factory.mktemp("video") / "svd", seed=1)


@pytest.fixture(autouse=True)
def _in_a_folder(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "svd").symlink_to(here)
    ramp = np.linspace(0, 255, 96 * 64 * 3).reshape(64, 96, 3).astype(np.uint8)
    Image.fromarray(ramp).save("cat.png")
    if not _LOADED:
        _LOADED["svd"] = module.loaded_for(str(here), where="x", device="cpu", dtype="auto", offload=False)

    def loaded_for(model: str, **_words: Any) -> Any:
        _LOADED["svd"].label = model
        return _LOADED["svd"]

    monkeypatch.setattr(module, "loaded_for", loaded_for)


def moving(frames: int = 10) -> np.ndarray:
    """A bright square that crosses a ramp of colours."""
    found = np.zeros((frames, 48, 64, 3), np.uint8)
    found[..., 0] = np.linspace(0, 255, 64)
    found[..., 1] = np.linspace(255, 0, 48)[:, None]
    for n in range(frames):
        found[n, 10:20, 4 * n : 4 * n + 10] = 255
    return found


def refusal(call: Callable[[], Any], kind: type[WeightopsError] = UsageError) -> tuple[str, str | None]:
    with pytest.raises(kind) as e:
        call()
    return str(e.value), e.value.hint


def frames_of(path: str | Path) -> list[tuple[np.ndarray, int]]:
    """The frames of a GIF, and how long each is shown, in milliseconds."""
    found = []
    with Image.open(path) as opened:
        for n in range(opened.n_frames):
            opened.seek(n)
            found.append((np.asarray(opened.convert("RGB")), opened.info["duration"]))
    return found


def read_mp4(path: str) -> tuple[dict[str, Any], np.ndarray]:
    reader = imageio_ffmpeg.read_frames(path)
    about = next(reader)
    width, height = about["size"]
    return about, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


# ------------------------------------------------------------------------------------------------ videos


def test_a_gif_has_the_frames_of_the_pipeline_and_says_how_it_was_made(tmp_path: Path) -> None:
    report = generate_video("cat.png", **SMALL, seed=4, fps=8, motion=99, output="a.gif")
    with hushed():
        pipe = _LOADED["svd"].pipe
        square = Image.open("cat.png").crop((16, 0, 80, 64))
        theirs = pipe(
            square, width=64, height=64, num_frames=3, num_inference_steps=1, fps=8, motion_bucket_id=99,
            generator=torch.Generator().manual_seed(4), output_type="np",
        ).frames[0]  # fmt: skip
    frames = frames_of("a.gif")
    assert len(frames) == 3
    assert [length for _, length in frames] == [120, 130, 130]  # hundredths of 3/8 seconds
    for (frame, _), their in zip(frames, theirs, strict=True):
        assert abs(frame / 255 - their).mean() < 0.05
    with Image.open("a.gif") as opened:
        assert opened.info["loop"] == 0
        recipe = json.loads(opened.info["comment"])
    known = {"command": "generate video", "seed": 4, "fps": 8, "motion": 99, "frames": 3, "image": "cat.png"}
    assert {name: recipe[name] for name in known} == known
    assert recipe["inputs"][0]["hash"].startswith("xxh3_128:")
    assert str(tmp_path) not in json.dumps(recipe)
    assert report.warnings == ["cat.png: is 96x64: scaled, and cut about its middle, to 64x64"]
    assert report.videos[0]["frames"] == 3


def test_an_mp4_is_read_by_ffmpeg_and_the_same_each_time() -> None:
    for name in ("a.mp4", "b.mp4"):
        generate_video("cat.png", **SMALL, output=name)
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    count, seconds = imageio_ffmpeg.count_frames_and_secs("a.mp4")
    assert (count, seconds) == (3, pytest.approx(3 / 7, abs=0.02))
    about, frames = read_mp4("a.mp4")
    assert (about["fps"], about["size"], len(frames)) == (7, (64, 64), 3)


def test_pixels_survive_in_both_forms(tmp_path: Path) -> None:
    frames = moving()
    (tmp_path / "a.gif").write_bytes(encode_gif(frames, 25, "{}"))
    drawn = np.stack([frame for frame, _ in frames_of("a.gif")])
    assert drawn.shape == frames.shape
    assert abs(drawn.astype(int) - frames).mean() < 6
    module._write_mp4(tmp_path / "a.mp4", frames, 25, "{}")
    _, read = read_mp4("a.mp4")
    assert read.shape == frames.shape
    assert abs(read.astype(int) - frames).mean() < 6


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_an_mp4_that_ffmpeg_cannot_write_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(words: list[str], **more: Any) -> Any:
        return popen([*words[:-1], "-f", "mpegts", "/dev/full"], **more)

    popen = module.subprocess.Popen
    monkeypatch.setattr(module.subprocess, "Popen", full)
    with pytest.raises(OutputError, match=r"^a\.mp4: cannot be written: No space left on device$"):
        generate_video("cat.png", **SMALL, output="a.mp4")
    assert sorted(path.name for path in Path().iterdir()) == ["cat.png", "svd"]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("fps", [1, 7, 24, 30, 50])
def test_a_gif_runs_as_long_as_its_frames_say(fps: int) -> None:
    Path("a.gif").write_bytes(encode_gif(moving(), fps, "{}"))
    lengths = [length for _, length in frames_of("a.gif")]
    assert sum(lengths) == pytest.approx(1000 * 10 / fps, abs=5)
    assert max(lengths) - min(lengths) <= 10


def test_several_images_go_into_a_folder() -> None:
    Image.new("RGB", (64, 64), "red").save("Röt fox.png")
    steps: list[tuple[int, int]] = []
    report = generate_video("cat.png", "Röt fox.png", **SMALL, on_progress=lambda *now: steps.append(now))
    assert sorted(path.name for path in Path("videos").iterdir()) == ["0001-cat.gif", "0002-rot-fox.gif"]
    assert [row["file"] for row in report.videos] == ["0001-cat.gif", "0002-rot-fox.gif"]
    assert steps == [(1, 2), (2, 2)]


def test_an_interrupted_run_leaves_whole_videos_and_says_so() -> None:
    def on_progress(done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"^interrupted: 1 video of 2: '0001-cat.gif'$"):
        generate_video("cat.png", "cat.png", **SMALL, output="out", on_progress=on_progress)
    assert [path.name for path in Path("out").iterdir()] == ["0001-cat.gif"]


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        ({"frames": 1}, "--frames: found 1, expected 2 to 250", None),
        ({"fps": 60}, "--fps: found 60, expected 1 to 50 in a GIF", None),
        ({"motion": 256}, "--motion: found 256, expected 1 to 255", None),
        ({"noise": float("nan")}, "--noise: found nan, expected 0 to 10", None),
        ({"decode_chunk": 0}, "--decode-chunk: found 0, expected 1 to 250", None),
        ({"output": "a.webm"}, "a.webm: expected a name that ends in .gif or .mp4", None),
        ({"form": "avi"}, "--form: found 'avi', expected gif or mp4", None),
        ({"size": "72x64"}, "--size: found 72x64, expected multiples of 16 for svd", None),
        ({"output": "no/a.gif"}, "no/a.gif: the folder 'no' does not exist", "make it first"),
        ({"offload": True, "device": "cpu"}, "--offload: needs a CUDA device, found the CPU alone", None),
    ],
)  # fmt: skip
def test_every_wrong_word_has_its_sentence(words: dict[str, Any], error: str, hint: str | None) -> None:
    assert refusal(lambda: generate_video("cat.png", **{**SMALL, **words}), WeightopsError) == (error, hint)


def test_images_that_are_none_are_refused() -> None:
    assert refusal(lambda: generate_video(**SMALL))[0] == "generate video: found no image, expected one or more"
    Path("page.png").write_text("<html>")
    with pytest.raises(WeightopsError, match=r"page\.png: "):
        generate_video("page.png", **SMALL)
    assert refusal(lambda: generate_video("cat.png", "cat.png", **SMALL, output="a.gif")) == (
        "a.gif: names one video, but 2 are to be made", "name a folder"
    )  # fmt: skip


def test_an_image_is_never_written_over() -> None:
    Path("a.gif").write_bytes(encode_gif(moving(), 7, "{}"))
    before = Path("a.gif").read_bytes()
    assert refusal(lambda: generate_video("a.gif", **SMALL, output="a.gif", force=True), OutputError) == (
        "a.gif: is also an input, and an input is never written", "choose another name"
    )  # fmt: skip
    assert refusal(lambda: generate_video("cat.png", **SMALL, output="a.gif"), OutputError)[0] == "a.gif: exists"
    assert Path("a.gif").read_bytes() == before


def test_a_model_of_images_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class StableDiffusionPipeline:
        pass

    loaded = type("Loaded", (), {"pipe": StableDiffusionPipeline(), "label": "sd15"})()
    monkeypatch.setattr(module, "loaded_for", lambda *_, **__: loaded)
    assert refusal(lambda: generate_video("cat.png", **SMALL), MismatchError) == (
        "sd15: is a StableDiffusionPipeline, expected a Stable Video Diffusion",
        "stabilityai/stable-video-diffusion-img2vid-xt is one, as a folder or with hf:// before it",
    )


def test_too_little_memory_is_a_sentence_with_the_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*_words: Any, **_more: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    pipe = _LOADED["svd"].pipe
    # Its own words are asked for first.
    call.__signature__ = inspect.signature(type(pipe).__call__)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(pipe), "__call__", call)
    assert refusal(lambda: generate_video("cat.png", **SMALL, output="a.gif"), MemoryRefused) == (
        "svd: not enough memory for 3 frames of 64x64",
        "--decode-chunk 2 needs less, and so do --dtype fp16, --offload, fewer --frames and a smaller --size",
    )
    assert not Path("a.gif").exists()


def test_black_videos_and_nan_are_named() -> None:
    values = np.full((2, 2, 2, 3), 0.5)
    assert module._checked(values, "float16")[1] == ""
    assert module._checked(values * 0, "float16")[1] == "is black all over"
    values[0, 0, 0] = np.nan
    pixels, fault = module._checked(values, "float16")
    assert fault == "values that are no numbers (NaN) were drawn black; --dtype fp32 is the remedy"
    assert pixels[0, 0, 0].tolist() == [0, 0, 0]


def test_without_ffmpeg_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from weightops.diffusion import extras

    real = extras.importlib.util.find_spec
    monkeypatch.setattr(
        extras.importlib.util, "find_spec", lambda name: None if name == "imageio_ffmpeg" else real(name)
    )
    assert refusal(lambda: generate_video("cat.png", **SMALL, output="a.mp4")) == (
        "generate video: needs imageio-ffmpeg, which is not installed", "pip install 'weightops[video]'"
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ the command line


def test_the_command_line_makes_videos() -> None:
    words = ["generate", "video", "cat.png", "--model", "svd", "--frames", 2, "--steps", 1, "--size", "64x64"]
    done = weightops_here(*words)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == "1 video"
    assert lines[3].split() == ["cat.gif", "cat.png", "2", "7", "64x64"]
    assert done.err == "warning: cat.png: is 96x64: scaled, and cut about its middle, to 64x64\n"
    found = json.loads(weightops_here(*words, "-o", "b.gif", "--json").out)
    assert (found["command"], found["videos"][0]["file"]) == ("generate video", "b.gif")
    planned = weightops_here(*words, "-o", "c.gif", "--dry-run")
    assert planned.out.splitlines()[0] == "would make 1 video"
    assert not Path("c.gif").exists()
