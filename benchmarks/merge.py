#!/usr/bin/env python3
"""merge against the copy floor and the usual script, side by side.

    python benchmarks/merge.py                        SD1.5 (2 x 2.1 GB) and SDXL (2 x 6.9 GB), 25 GB of disk
    python benchmarks/merge.py --scale 0.01           the same, small
    python benchmarks/merge.py --device cuda          weightops on the GPU beside weightops on the CPU

Each contender runs as a whole process, in turn, round after round; each ends with an fsync of its output, and both
inputs are read into the page cache before each run. Wall, CPU and peak memory are medians; ratios are medians of the
ratios within a round, for these are what a noisy machine leaves comparable.

    floor      read both files, write one of their size, fsync: two threads, preallocated, no arithmetic
    usual      load both with safetensors.torch, loop over the keys, save, fsync: what most scripts do
    weightops  weightops merge A B --alpha 0.7
    torch      import torch and nothing else, which every contender with arithmetic pays
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve()
LAYOUTS = {
    "sd15": HERE.parents[1] / "weightops" / "cli" / "sd15.json.gz",
    "sdxl": HERE.parents[1] / "fixtures" / "headers" / "sdxl.json.gz",
}

USUAL = """
import os, sys
from safetensors.torch import load_file, save_file
a, b = load_file(sys.argv[1]), load_file(sys.argv[2])
merged = {k: a[k] * 0.3 + b[k] * 0.7 if a[k].is_floating_point() else a[k] for k in a}
save_file(merged, sys.argv[3])
fd = os.open(sys.argv[3], os.O_RDWR)
os.fsync(fd)
"""


class Figures(NamedTuple):
    wall: float
    cpu: float
    peak_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the real size")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to make the files, and keep them (default: temporary)")
    parser.add_argument("--device", default="cpu", help="with cuda: weightops on it as one more contender")
    parser.add_argument("--skip", nargs="*", default=[], help="contenders to leave out")
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)  # a contender or a helper of this file's own
    args = parser.parse_args()
    if args.only:
        {"floor": copy_floor, "make": make_pair, "touch": touch}[args.only[0]](*args.only[1:])
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for model in args.models:
            bench(model, folder, args)


def bench(model: str, folder: Path, args: argparse.Namespace) -> None:
    a, b = (folder / f"{model}_{letter}_{args.scale:g}.safetensors" for letter in "ab")
    # In a process of its own: what this one holds would count as the peak of every process that it starts.
    helper("make", model, str(a), str(b), str(args.scale))
    out = folder / "out.safetensors"
    merge = [sys.executable, "-m", "weightops.cli", "merge", str(a), str(b), "--alpha", "0.7", "-o", str(out), "-q"]
    contenders = {
        "floor": [sys.executable, str(HERE), "--only", "floor", str(a), str(b), str(out)],
        "usual": [sys.executable, "-c", USUAL, str(a), str(b), str(out)],
        "weightops": [*merge, "--device", "cpu"],
        "torch": [sys.executable, "-c", "import torch"],
    }
    if args.device != "cpu":
        contenders[args.device] = [*merge, "--device", args.device]
    for name in args.skip:
        contenders.pop(name, None)
    print(f"\n{model}: 2 x {a.stat().st_size / 1e9:.2f} GB, {args.runs} rounds", flush=True)
    rounds: list[dict[str, Figures]] = []
    for _ in range(args.runs):
        figures = {}
        for name, command in contenders.items():
            out.unlink(missing_ok=True)
            os.sync()  # what an earlier contender left to write is not this one's to wait for
            warm(a)
            warm(b)
            helper("touch", str(int(args.scale * 2.5 * a.stat().st_size)))
            figures[name] = measure(command)
        rounds.append(figures)
    out.unlink(missing_ok=True)
    show(rounds)
    if not args.folder:
        a.unlink()
        b.unlink()


def show(rounds: list[dict[str, Figures]]) -> None:
    print(f"{'':12}{'wall s':>9}{'cpu s':>9}{'peak MiB':>10}   wall of each round")
    for name in rounds[0]:
        median = [statistics.median(r[name][i] for r in rounds) for i in range(3)]
        walls = "  ".join(f"{r[name].wall:.2f}" for r in rounds)
        print(f"{name:12}{median[0]:9.2f}{median[1]:9.2f}{median[2]:10.0f}   {walls}")

    def ratio(text: str, top: str, bottom: str, less: str | None = None) -> None:
        if {top, bottom} <= set(rounds[0]) and (less is None or less in rounds[0]):
            found = [(r[top].wall - (r[less].wall if less else 0)) / r[bottom].wall for r in rounds]
            print(f"{text:40}{statistics.median(found):6.2f}   ({min(found):.2f} to {max(found):.2f})")

    ratio("weightops / usual", "weightops", "usual")
    ratio("weightops / floor", "weightops", "floor")
    ratio("(weightops - import torch) / floor", "weightops", "floor", "torch")
    ratio("cuda / weightops", "cuda", "weightops")


def measure(command: list[str]) -> Figures:
    """Wall and CPU seconds and peak MiB of one whole process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with exit code {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Figures(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 2**20)


def helper(*words: str) -> None:
    subprocess.run([sys.executable, str(HERE), "--only", *words], check=True)


def touch(nbytes: str) -> None:
    """Fill and free memory, as much as is free at most.

    Under a hypervisor that takes free memory back, whoever asks for it first waits for it: without this, the same
    command took from one to four times its time.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    with mmap.mmap(-1, max(min(int(nbytes), int(0.8 * free)), 1)) as memory:
        part = bytes(1 << 20)
        for _ in range(len(memory) >> 20):
            memory.write(part)


def warm(path: Path) -> None:
    buffer = bytearray(8 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def copy_floor(a: str, b: str, out: str) -> None:
    """Read both files and write one, in two threads, with an fsync: no merge can do less."""
    first, second = os.open(a, os.O_RDONLY), os.open(b, os.O_RDONLY)
    target = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    size, step = os.fstat(first).st_size, 256 << 10  # larger steps measured slower
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(target, 0, size)

    def work(number: int) -> None:
        x, y = memoryview(bytearray(step)), memoryview(bytearray(step))
        for position in range(number * step, size, 2 * step):
            nbytes = min(step, size - position)
            os.preadv(first, [x[:nbytes]], position)
            os.preadv(second, [y[:nbytes]], position)
            os.pwrite(target, x[:nbytes], position)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.fsync(target)


def make_pair(model: str, first: str, second: str, scale: str) -> None:
    """Two fp16 checkpoints with the model's real names and, at scale 1, its real shapes; random values."""
    import numpy as np

    layout = json.loads(gzip.decompress(LAYOUTS[model].read_bytes()))
    shrink = math.sqrt(float(scale))
    shapes = {key: [max(1, int(d * shrink)) if d >= 64 else d for d in shape] for key, (_, shape) in layout.items()}
    rng = np.random.default_rng(0)
    pool = (0.03 * rng.standard_normal(1 << 24, dtype=np.float32)).astype(np.float16)
    for path in (Path(first), Path(second)):
        if path.exists():
            continue
        head: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for key, (dtype, _) in layout.items():
            nbytes = math.prod(shapes[key]) * (8 if dtype == "I64" else 2)
            head[key] = {"dtype": dtype, "shape": shapes[key], "data_offsets": [position, position + nbytes]}
            position += nbytes
        text = json.dumps(head, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for key, (dtype, _) in layout.items():
                values = math.prod(shapes[key])
                if dtype == "I64":
                    file.write(np.arange(values, dtype=np.int64).tobytes())
                    continue
                while values:
                    start = int(rng.integers(0, len(pool) // 2))
                    part = pool[start : start + values]
                    file.write(part.tobytes())
                    values -= len(part)


if __name__ == "__main__":
    main()
