"""generate video: a short video of each image, by Stable Video Diffusion, as GIF or MP4."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import subprocess
import time
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion.axes import stem_of
from weightops.diffusion.extras import hushed, need
from weightops.diffusion.generate import cuda_of, loaded_for
from weightops.diffusion.image_folder import slug
from weightops.diffusion.image_records import inputs_of, versions_of
from weightops.diffusion.pictures import open_picture
from weightops.diffusion.prompts import MAX_SEED, MAX_STEPS, parse_size
from weightops.diffusion.sampling import refused
from weightops.engine.run import Progress, ignore
from weightops.errors import Interrupted, MismatchError, OutputError, UsageError, WeightopsError, listing, quote
from weightops.files.folder import replace_small
from weightops.files.writer import check_target, part_name
from weightops.ops.report import peak_memory_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from PIL.Image import Image

    from weightops.diffusion.models import Loaded

FORMATS = ("gif", "mp4")

MAX_FRAMES = 250
_MOST = {"gif": 50, "mp4": 120}  # frames in a second: a GIF counts hundredths, and programs slow down below two of them


@dataclass(slots=True)
class VideoReport:
    """What was made. output: the file, or the folder of several. videos: a row for each: file, image, frames, fps, …"""

    output: str
    inputs: list[dict[str, Any]] = field(default_factory=list)
    videos: list[dict[str, Any]] = field(default_factory=list)
    summary: str = ""
    device: str = ""
    dtype: str = ""
    bytes_written: int = 0
    seconds: float = 0.0
    seconds_per_video: float = 0.0
    peak_memory_bytes: int | None = None
    warnings: list[str] = field(default_factory=list)
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The JSON document that scripts may rely on."""
        return {
            "command": "generate video",
            "version": __version__,
            "inputs": self.inputs,
            "output": self.output,
            "bytes_written": self.bytes_written,
            "summary": self.summary,
            "videos": self.videos,
            "device": self.device,
            "dtype": self.dtype,
            "seconds": round(self.seconds, 3),
            "seconds_per_video": round(self.seconds_per_video, 3),
            "peak_memory_bytes": self.peak_memory_bytes,
            "warnings": self.warnings,
            "dry_run": self.dry_run,
        }


@dataclass(frozen=True, slots=True)
class Shooting:
    """How a video is made. None: as the pipeline has it. size: width, height."""

    frames: int | None
    fps: int
    motion: int
    noise: float
    decode_chunk: int | None
    steps: int | None
    seed: int
    size: tuple[int, int] | None


def generate_video(
    *pictures: str | os.PathLike[str],
    model: str | os.PathLike[str],
    frames: int | None = None,
    fps: int = 7,
    motion: int = 127,
    noise: float = 0.02,
    decode_chunk: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    size: str | tuple[int, int] | None = None,
    form: str = "gif",
    output: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offload: bool = False,
    force: bool = False,
    dry_run: bool = False,
    on_progress: Progress = ignore,
) -> VideoReport:
    """Make a video of each picture, with a Stable Video Diffusion in a diffusers folder or a repository.

    frames, steps, size: the pipeline's own where they are None. The picture is scaled and cut about its middle to the
    size. fps: frames in a second, of which the model is told, too. motion: how much moves, 1 to 255. noise: what is
    added to the picture; more of it frees the video from it. decode_chunk: frames decoded at once (None: all); fewer
    need less memory. seed: of every video; it is drawn on the CPU. form: gif or mp4. output: FILE.gif or FILE.mp4 for
    one picture, which then says the form; a folder for several; None: the picture's name, or the model's.
    offload: keep on the CUDA device only the network at work. Each video is written whole, as soon as it is made.
    on_progress counts steps. Raises WeightopsError.
    """
    started = time.perf_counter()
    pixels = None if size is None else parse_size(size)
    shooting = Shooting(frames, fps, motion, noise, decode_chunk, steps, seed, pixels)
    files = [Path(picture) for picture in pictures]
    if not files:
        raise UsageError("generate video", "found no image, expected one or more")
    targets, folder, form = _targets(files, output, form)
    _check_words(shooting, form)
    check_target(targets[0] if folder is None else folder, 0, force=force, inputs=(), folder=folder is not None)
    _check_apart(files, targets)
    need("generate video", "PIL")
    opened = [open_picture(file) for file in files]
    report = VideoReport(str(targets[0] if folder is None else folder), dry_run=dry_run)
    report.inputs = [{"path": str(file), "hash": None, "bytes": file.stat().st_size} for file in files]
    if dry_run:
        report.videos = [{"file": target.name, "image": str(file)} for target, file in zip(targets, files, strict=True)]
        report.summary = f"would make {_videos(len(files))}"
        return report
    need("generate video", "torch", "diffusers", "transformers", "accelerate")
    if form == "mp4":
        need("generate video", "imageio_ffmpeg", extra="video")
    place = cuda_of(device) if offload else device
    loaded = loaded_for(str(model), where="generate video", device=place, dtype=dtype, offload=offload)
    _check_pipe(loaded, shooting)
    if offload:
        loaded.pipe.enable_model_cpu_offload(device=place)
    report.inputs += [{"path": name, "hash": hashed, "bytes": None} for name, hashed in loaded.hashes.items()]
    report.device, report.dtype = place if offload else str(loaded.device), str(loaded.dtype).removeprefix("torch.")
    try:
        _make(opened, files, targets, loaded, shooting, report, on_progress)
    except (Interrupted, KeyboardInterrupt) as e:
        how = str(e).partition(":")[0] if isinstance(e, Interrupted) else "interrupted"
        whole = [row["file"] for row in report.videos]
        said = f"{_videos(len(whole))} of {len(files):,}: {listing(whole)}" if whole else "no video was made"
        raise Interrupted("", f"{how}: {said}") from None
    report.summary = _videos(len(files))
    report.seconds = time.perf_counter() - started
    report.seconds_per_video = report.seconds_per_video / len(files)
    report.peak_memory_bytes = peak_memory_bytes()
    return report


# ------------------------------------------------------------------------------------------------ words


def _targets(
    files: Sequence[Path], output: str | os.PathLike[str] | None, form: str
) -> tuple[list[Path], Path | None, str]:
    """A file for each video, the folder for several (None for one), and the form."""
    if form not in FORMATS:
        raise UsageError("--form", f"found {quote(form, 60)}, expected gif or mp4")
    if len(files) == 1:
        target = Path(f"{slug(files[0].stem, 80)}.{form}") if output is None else Path(output)
        if target.suffix.lower() not in (".gif", ".mp4"):
            raise UsageError(str(target), "expected a name that ends in .gif or .mp4")
        return [target], None, target.suffix.lower()[1:]
    folder = Path("videos") if output is None else Path(output)
    if folder.suffix.lower() in (".gif", ".mp4"):
        raise UsageError(str(folder), f"names one video, but {len(files)} are to be made", "name a folder")
    names = [f"{number:04}-{slug(file.stem, 80)}.{form}" for number, file in enumerate(files, 1)]
    return [folder / name for name in names], folder, form


def _check_words(shooting: Shooting, form: str) -> None:
    most = _MOST[form]
    bounds: tuple[tuple[str, float | None, float, float], ...] = (
        ("--frames", shooting.frames, 2, MAX_FRAMES), ("--fps", shooting.fps, 1, most),
        ("--motion", shooting.motion, 1, 255), ("--noise", shooting.noise, 0, 10),
        ("--decode-chunk", shooting.decode_chunk, 1, MAX_FRAMES), ("--steps", shooting.steps, 1, MAX_STEPS),
        ("--seed", shooting.seed, 0, MAX_SEED),
    )  # fmt: skip
    for option, value, least, highest in bounds:
        if value is not None and not least <= value <= highest:
            found = f"{value:,}" if isinstance(value, int) else f"{value:g}"
            what = f"found {found}, expected {least:,} to {highest:,}"
            raise UsageError(option, f"{what}{' in a GIF' if option == '--fps' and form == 'gif' else ''}")


def _check_apart(files: Sequence[Path], targets: Sequence[Path]) -> None:
    """Refuse to write over a picture: with --force a GIF of its own name would take its place."""
    for target in targets:
        for file in files:
            with contextlib.suppress(OSError):
                if target.exists() and file.samefile(target):
                    what = "is also an input, and an input is never written"
                    raise OutputError(str(target), what, "choose another name")


def _check_pipe(loaded: Loaded, shooting: Shooting) -> None:
    """Refuse a model that makes no videos of images, and sizes that it cannot have."""
    name = type(loaded.pipe).__name__
    if name != "StableVideoDiffusionPipeline":
        hint = "stabilityai/stable-video-diffusion-img2vid-xt is one, as a folder or with hf:// before it"
        raise MismatchError(loaded.label, f"is a {name}, expected a Stable Video Diffusion", hint)
    if shooting.size is not None:
        # Its network halves the latents between levels, and does not mend an odd side.
        side = int(loaded.pipe.vae_scale_factor) << (len(loaded.pipe.unet.config.block_out_channels) - 1)
        if any(length % side for length in shooting.size):
            found = f"{shooting.size[0]}x{shooting.size[1]}"
            raise UsageError("--size", f"found {found}, expected multiples of {side} for {loaded.label}")


def _videos(count: int) -> str:
    return f"{count:,} video{'' if count == 1 else 's'}"


# ------------------------------------------------------------------------------------------------ making


def _make(
    pictures: Sequence[Image], files: Sequence[Path], targets: Sequence[Path], loaded: Loaded, shooting: Shooting,
    report: VideoReport, on_progress: Progress,
) -> None:  # fmt: skip
    import inspect

    said = {name: p.default for name, p in inspect.signature(type(loaded.pipe).__call__).parameters.items()}
    width, height = shooting.size or (int(said["width"]), int(said["height"]))
    steps = int(said["num_inference_steps"]) if shooting.steps is None else shooting.steps
    frames = int(loaded.pipe.unet.config.num_frames) if shooting.frames is None else shooting.frames
    versions = versions_of("torch", "diffusers", "transformers")
    with contextlib.suppress(FileExistsError):
        if not targets[0].parent.exists():
            targets[0].parent.mkdir()
    for number, (picture, file, target) in enumerate(zip(pictures, files, targets, strict=True)):
        began = time.perf_counter()
        fitted = _fitted(picture, width, height)
        if picture.size != (width, height):
            found = f"{picture.width}x{picture.height}"
            report.warnings.append(f"{file}: is {found}: scaled, and cut about its middle, to {width}x{height}")

        def on_step(share: float, done: int = number) -> None:
            on_progress(round((done + share) * steps), len(files) * steps)

        values = _sample(loaded, fitted, frames, steps, shooting, on_step)
        report.seconds_per_video += time.perf_counter() - began
        pixels, fault = _checked(values, report.dtype)
        row = {
            "frames": len(pixels), "fps": shooting.fps, "size": [width, height], "steps": steps, "seed": shooting.seed,
            "motion": shooting.motion, "noise": shooting.noise, "model": stem_of(loaded.label),
            "device": loaded.device.type, "dtype": report.dtype,
        }  # fmt: skip
        row |= {} if shooting.decode_chunk is None else {"decode_chunk": shooting.decode_chunk}
        recipe = {
            "command": "generate video", "version": __version__, "inputs": inputs_of(loaded.hashes.items()),
            "image": file.name, **row, "versions": versions,
        }  # fmt: skip
        report.bytes_written += _write(target, pixels, shooting.fps, recipe)
        report.videos.append({"file": target.name, "image": str(file), **row})
        if fault:
            report.warnings.append(f"{target.name}: {fault}")


def _fitted(picture: Image, width: int, height: int) -> Image:
    """The picture scaled until it covers the size, and cut about its middle."""
    from PIL import Image as pillow

    scale = max(width / picture.width, height / picture.height)
    wide, tall = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    scaled = picture.resize((wide, tall), pillow.Resampling.LANCZOS) if (wide, tall) != picture.size else picture
    left, top = (wide - width) // 2, (tall - height) // 2
    return scaled.crop((left, top, left + width, top + height))


def _sample(
    loaded: Loaded, picture: Image, frames: int, steps: int, shooting: Shooting, on_step: Callable[[float], None]
) -> np.ndarray:
    """The frames, [frames, height, width, 3] from 0 to 1."""
    import torch

    def on_step_end(pipe: Any, step: int, _timestep: Any, found: dict[str, Any]) -> dict[str, Any]:
        on_step((step + 1) / pipe.num_timesteps)
        return found

    try:
        with hushed():
            made = loaded.pipe(
                picture, width=picture.width, height=picture.height, num_frames=frames, num_inference_steps=steps,
                fps=shooting.fps, motion_bucket_id=shooting.motion, noise_aug_strength=shooting.noise,
                decode_chunk_size=shooting.decode_chunk, generator=torch.Generator("cpu").manual_seed(shooting.seed),
                output_type="np", callback_on_step_end=on_step_end,
            )  # fmt: skip
    except Exception as e:
        error = refused(e, loaded.label, f"{frames} frames of {picture.width}x{picture.height}")
        if isinstance(error, WeightopsError) and error.hint:
            raise type(error)(error.where, error.what, f"--decode-chunk 2 needs less, and so do {_LESS}") from None
        raise error from None
    found: np.ndarray = made.frames[0]
    return found


_LESS = "--dtype fp16, --offload, fewer --frames and a smaller --size"


def _checked(values: np.ndarray, dtype: str) -> tuple[np.ndarray, str]:
    """Bytes, and what is the matter with them."""
    import numpy as np

    pixels = (np.nan_to_num(values, nan=0.0, posinf=1.0, neginf=0.0) * 255).round().astype(np.uint8)
    if not np.isfinite(values).all():
        remedy = "; --dtype fp32 is the remedy" if dtype != "float32" else "; the model is broken"
        return pixels, f"values that are no numbers (NaN) were drawn black{remedy}"
    return pixels, "" if pixels.any() else "is black all over"


# ------------------------------------------------------------------------------------------------ writing


def _write(target: Path, pixels: np.ndarray, fps: int, recipe: Mapping[str, Any]) -> int:
    """Write the video whole; its bytes. Raises OutputError."""
    comment = json.dumps(recipe, sort_keys=True)
    if target.suffix.lower() == ".gif":
        data = encode_gif(pixels, fps, comment)
        replace_small(target, data)
        return len(data)
    part = part_name(target, ".part.mp4")
    try:
        _write_mp4(part, pixels, fps, comment)
        part.replace(target)
    except OSError as e:
        raise OutputError(str(target), f"cannot be written: {e.strerror or e}") from None
    finally:
        part.unlink(missing_ok=True)
    return target.stat().st_size


def encode_gif(pixels: np.ndarray, fps: int, comment: str) -> bytes:
    """A GIF that runs for ever, in the 256 colours that fit all frames best, so that nothing flickers.

    A GIF counts hundredths of a second: the frames' lengths differ by one, so that all of them together are right.
    """
    import numpy as np
    from PIL import Image

    images = [Image.fromarray(frame) for frame in pixels]
    # The colours are those of a million pixels, out of all frames.
    every = math.ceil(math.sqrt(pixels.size / 3 / 2**20))
    seen = Image.fromarray(np.concatenate([frame[::every, ::every] for frame in pixels]))
    colours = seen.quantize(256, method=Image.Quantize.MEDIANCUT)
    drawn = [image.quantize(palette=colours, dither=Image.Dither.FLOYDSTEINBERG) for image in images]
    ends = [round(100 * (number + 1) / fps) for number in range(len(drawn))]
    lengths = [10 * (end - start) for start, end in zip([0, *ends], ends, strict=False)]
    out = BytesIO()
    drawn[0].save(
        out, "GIF", save_all=True, append_images=drawn[1:], duration=lengths, loop=0, comment=comment.encode(),
        optimize=False,
    )  # fmt: skip
    return out.getvalue()


def _write_mp4(path: Path, pixels: np.ndarray, fps: int, comment: str) -> None:
    """H.264 as every browser plays it, good enough that the loss is not seen. Raises OSError with what ffmpeg says."""
    import imageio_ffmpeg  # type: ignore[import-untyped]

    words = [
        imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error",
        "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{pixels.shape[2]}x{pixels.shape[1]}", "-r", str(fps), "-i", "-",
        "-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "17", "-preset", "slow", "-movflags", "+faststart",
        # The colours of HD, said so: players guess by the size, and guess differently.
        "-vf", "scale=out_color_matrix=bt709:out_range=tv", "-colorspace", "bt709", "-color_primaries", "bt709",
        "-color_trc", "bt709",
        # Without ffmpeg's version and the time of day in the file.
        "-fflags", "+bitexact", "-flags:v", "+bitexact", "-metadata", f"comment={comment}", str(path),
    ]  # fmt: skip
    # imageio's own writer does not tell whether ffmpeg could write the file.
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as ffmpeg:
        assert ffmpeg.stdin is not None
        assert ffmpeg.stderr is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                for frame in pixels:
                    ffmpeg.stdin.write(frame.tobytes())
                ffmpeg.stdin.flush()
            with contextlib.suppress(BrokenPipeError):
                ffmpeg.stdin.close()
            said = ffmpeg.stderr.read().decode(errors="replace")
        except BaseException:
            ffmpeg.kill()
            raise
    if ffmpeg.returncode != 0:
        full = os.strerror(errno.ENOSPC)
        raise OSError(full if full in said else f"ffmpeg refuses it: {' '.join(said.split())[:200]}")
