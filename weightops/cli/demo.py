"""The command `demo`: the main job on two small checkpoints, made and checked on the spot."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightops.cli import render
from weightops.cli.main import main
from weightops.errors import ValueRefused
from weightops.files.checkpoint import Checkpoint, open_checkpoint
from weightops.files.tensor import Slot, TensorSpec
from weightops.files.writer import SafetensorsWriter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

ALPHA = 0.7
SHRINK = 16  # every dimension of 64 or more is divided by this


def sd15_layout(shrink: int = SHRINK) -> dict[str, TensorSpec]:
    """The names and shapes of an SD1.5 single file, the wide dimensions divided by `shrink`."""
    text = gzip.decompress((files("weightops.cli") / "sd15.json.gz").read_bytes())
    return {
        key: TensorSpec(dtype, tuple(d // shrink if d >= 64 else d for d in shape))
        for key, (dtype, shape) in json.loads(text).items()
    }


@click.command("demo", short_help="A small real merge.")
@click.option("--folder", metavar="DIR", help="Keep the files here.  [default: a temporary folder]")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else there.")
def command(folder: str | None, as_json: bool) -> None:
    """A small real merge: two checkpoints in the SD1.5 layout, merged, inspected, and checked by plain arithmetic.

    \b
    weightops demo
    weightops demo --folder demo-files
    """
    with contextlib.ExitStack() as stack:
        if folder is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            place = Path(folder)
            place.mkdir(parents=True, exist_ok=True)
        stack.enter_context(contextlib.chdir(place))
        _demo(as_json)


def _demo(as_json: bool) -> None:
    out = None if as_json else render.console()
    layout = sd15_layout()
    _say(out, "1", f"Two checkpoints with the {len(layout):,} names of SD1.5, {SHRINK} times narrower")
    started = time.perf_counter()
    _make_pair(layout)
    if out is not None:
        nbytes = Path("anime.safetensors").stat().st_size
        seconds = time.perf_counter() - started
        out.print(f"anime.safetensors, photo.safetensors  {render.size(nbytes)} each, {seconds:.1f} s")

    _say(out, "2", "Merge them: 0.3 of the first, 0.7 of the second")
    _run(
        out,
        "merge",
        "anime.safetensors",
        "photo.safetensors",
        "--alpha",
        str(ALPHA),
        "-o",
        "merged.safetensors",
        "--force",
    )

    _say(out, "3", "Look at the result")
    _run(out, "inspect", "merged.safetensors")

    _say(out, "4", "Check every value by plain arithmetic in float64")
    found = _compare()
    if as_json:
        render.emit_json({"command": "demo", "alpha": ALPHA, **found})
        return
    assert out is not None
    out.print(f"{found['merged_values']:,} merged values: at most {found['largest_ulp']:.2f} ulp from 0.3·a + 0.7·b")
    out.print(f"{found['copied_bytes']:,} bytes of the VAE: the first model's, bit for bit")
    out.print("all as it should be", style="bold green")


def _say(out: Console | None, step: str, text: str) -> None:
    if out is not None:
        out.print(f"\n{step}. {text}", style="bold magenta")


def _run(out: Console | None, *words: str) -> None:
    """Run a command of ours just as it would be typed."""
    if out is None:
        words = (*words, "-q") if words[0] == "merge" else ()
    else:
        out.print(f"$ weightops {' '.join(words)}\n", style="cyan")
    if words:
        main.main(list(words), prog_name="weightops", standalone_mode=False)


def _make_pair(layout: Mapping[str, TensorSpec]) -> None:
    """Normal weights of standard deviation 1/√fan_in; the second model is the first and a finetune's difference."""
    import numpy as np

    rng = np.random.default_rng(1)
    first: dict[str, Any] = {}
    second: dict[str, Any] = {}
    for key, spec in layout.items():
        if spec.dtype == "I64":
            first[key] = second[key] = np.arange(spec.values, dtype=np.int64).reshape(spec.shape)
            continue
        scale = 1 / math.sqrt(max(math.prod(spec.shape[1:]), 1)) if len(spec.shape) > 1 else 0.1
        base = rng.standard_normal(spec.shape, dtype=np.float32) * np.float32(scale)
        delta = rng.standard_normal(spec.shape, dtype=np.float32) * np.float32(0.2 * scale)
        first[key], second[key] = base.astype(np.float16), (base + delta).astype(np.float16)
    for name, tensors in (("anime", first), ("photo", second)):
        writer = SafetensorsWriter(f"{name}.safetensors", layout, {"format": "pt"}, force=True)
        try:
            for key, array in tensors.items():
                writer.write_bytes(Slot(key, layout[key]), 0, array.nbytes, memoryview(array.tobytes()))
            writer.commit({"format": "pt"})
        finally:
            writer.close()


def _compare() -> dict[str, Any]:
    """Every value of the merged file against numpy's float64; raises ValueRefused if one is off."""
    import numpy as np

    worst, values, copied = 0.0, 0, 0
    with (
        open_checkpoint("anime.safetensors") as a,
        open_checkpoint("photo.safetensors") as b,
        open_checkpoint("merged.safetensors") as m,
    ):
        for key in m.tensors:
            x, y, z = (_array(c, key) for c in (a, b, m))
            if key.startswith("first_stage_model.") or z.dtype == np.int64:
                if x.tobytes() != z.tobytes():
                    raise ValueRefused("merged.safetensors", f"tensor {key!r} is not the first model's")
                copied += z.nbytes if key.startswith("first_stage_model.") else 0
                continue
            exact = (1 - ALPHA) * x.astype(np.float64) + ALPHA * y.astype(np.float64)
            distance = np.abs(z.astype(np.float64) - exact) / np.spacing(np.abs(exact).astype(np.float16)).astype(float)
            worst, values = max(worst, float(distance.max(initial=0))), values + z.size
    if worst > 1:
        raise ValueRefused("merged.safetensors", f"a value is {worst:.2f} ulp off, expected at most 1")
    return {"merged_values": values, "largest_ulp": round(worst, 4), "copied_bytes": copied}


def _array(source: Checkpoint, key: str) -> Any:
    import numpy as np

    spec = source.tensors[key].spec
    buffer = bytearray(spec.nbytes)
    source.read_bytes(source.slot(key), 0, spec.nbytes, memoryview(buffer))
    return np.frombuffer(buffer, np.int64 if spec.dtype == "I64" else np.float16).reshape(spec.shape)
