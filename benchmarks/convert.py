#!/usr/bin/env python3
"""convert --to diffusers against the copy floor, side by side.

    python benchmarks/convert.py                      an SDXL single file of 6.9 GB, 14 GB of disk
    python benchmarks/convert.py --file model.safetensors

Each contender runs as a whole process, in turn, round after round; each ends with an fsync of its output, and the
input is read into the page cache before each run. Wall, CPU and peak memory are medians; ratios are medians of the
ratios within a round, for these are what a noisy machine leaves comparable.

    cp         cp (of the bytes: no clone), sync; on Linux
    floor      read the file, write one of its size, fsync: two threads, preallocated
    weightops  weightops convert FILE --to diffusers --no-tokenizer; and is torch imported?
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import threading
from pathlib import Path

from merge import Figures, helper, measure, show, warm

HERE = Path(__file__).resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="a checkpoint (default: SDXL's real names and shapes, made)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to make the files, and keep them (default: temporary)")
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)  # a contender of this file's own
    args = parser.parse_args()
    if args.only:
        {"floor": copy_floor, "weightops": weightops}[args.only[0]](*args.only[1:])
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench(folder, args)


def bench(folder: Path, args: argparse.Namespace) -> None:
    given = args.file or folder / "sdxl.safetensors"
    if args.file is None:
        helper("make", "sdxl", str(given), str(given), "1")
    out, said = folder / "out", folder / "said"
    this = [sys.executable, str(HERE), "--only"]
    contenders = {
        "cp": ["sh", "-c", 'cp --reflink=never "$0" "$1" && sync "$1"', str(given), str(out)],
        "floor": [*this, "floor", str(given), str(out)],
        "weightops": [*this, "weightops", str(given), str(out), str(said)],
    }
    if sys.platform != "linux":
        del contenders["cp"]
    print(f"{given.name}: {given.stat().st_size / 1e9:.2f} GB, {args.runs} rounds", flush=True)
    rounds: list[dict[str, Figures]] = []
    for _ in range(args.runs):
        figures = {}
        for name, command in contenders.items():
            clear(out)
            os.sync()  # what an earlier contender left to write is not this one's to wait for
            warm(given)
            helper("touch", str(int(1.2 * given.stat().st_size)))
            figures[name] = measure(command)
        rounds.append(figures)
    clear(out)
    show(rounds)
    if "cp" in contenders:
        found = [r["weightops"].wall / r["cp"].wall for r in rounds]
        print(f"{'weightops / cp':40}{statistics.median(found):6.2f}   ({min(found):.2f} to {max(found):.2f})")
    print(f"torch imported: {said.read_text()}")
    said.unlink()


def clear(out: Path) -> None:
    if out.is_dir():
        shutil.rmtree(out)
    out.unlink(missing_ok=True)


def weightops(given: str, out: str, said: str) -> None:
    """The command line in this process, and whether torch came with it."""
    sys.path.insert(0, str(HERE.parents[1]))
    from weightops.cli.main import run

    code = None
    try:
        run(["convert", given, "--to", "diffusers", "--no-tokenizer", "-o", out, "-q"])
    except SystemExit as e:
        code = e.code
    Path(said).write_text("yes" if "torch" in sys.modules else "no")
    sys.exit(code)


def copy_floor(given: str, out: str) -> None:
    """Read a file and write one, in two threads, with an fsync."""
    source = os.open(given, os.O_RDONLY)
    target = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    size, step = os.fstat(source).st_size, 256 << 10
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(target, 0, size)

    def work(number: int) -> None:
        buffer = memoryview(bytearray(step))
        for position in range(number * step, size, 2 * step):
            nbytes = min(step, size - position)
            os.preadv(source, [buffer[:nbytes]], position)
            os.pwrite(target, buffer[:nbytes], position)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.fsync(target)


if __name__ == "__main__":
    main()
