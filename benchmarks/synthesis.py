#!/usr/bin/env python3
"""A made space whose components are known, and the fit of it as a whole process: time, bytes, memory, and the angle.

    python benchmarks/synthesis.py pca --members 20000 --features 20000 --components 64 --rows fp32

Rows are X = U S Vᵀ + E + mean: U and V orthonormal and drawn, S falling by a half, and E normal noise whose part along
U, V and the mean is taken away, so that V are the components exactly, with noise of full rank behind them; the least
of S lies above the noise's edge by --gap. They are written block by block into a folder of a space, and fitted by
`weightops synth fit pca`, whose peak memory is the system's word (wait4). It ends with exit code 1 where that is above
--limit, or the angle to V above 1e-6 (of 16-bit rows, more: rounding turns them).

The projection is a sum of parts, and stands beside what it says of the run that was measured:
    seconds = passes (bytes / read rate + 4 N d l / flop rate) + passes 12 d l² / flop rate64 + 2 N d k / flop rate32
with l the dimensions of the subspace; rates are measured on blocks of the made space, by one process of the threads
that the fit has. From the page cache: a disk that reads more slowly adds its own time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from weightops.synthesis.layout import Layout, Module
from weightops.synthesis.pca import plan_pca
from weightops.synthesis.space import INDEX, MEMBERS, WIDTHS, open_space, rows_path, torch_dtype

HERE = Path(__file__).resolve()
LARGE = (64_974, 99_648)  # the source's space
# Of the angle to the components that the rows have before they are rounded, which itself turns them.
GOALS = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 1e-2}
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pca", "space"], help="space: make one in --folder, and leave it there")
    parser.add_argument("--members", type=int, default=20_000)
    parser.add_argument("--features", type=int, default=20_000)
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--rows", choices=list(WIDTHS), default="fp32")
    parser.add_argument("--gap", type=float, default=1.5, help="the last component's size over the noise's edge")
    parser.add_argument("--memory", default="1GiB", help="what the fit is given, torch itself not counted")
    parser.add_argument("--limit", type=int, default=2048, help="MiB that its process may have")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where to make the space (default: temporary)")
    args = parser.parse_args()
    if args.what == "space":
        made_space(args.folder, args)
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        return bench(Path(temporary), args)


def bench(folder: Path, args: argparse.Namespace) -> int:
    began = time.perf_counter()
    space = folder / "space"
    # By a process of its own: what this one had in memory would count as the fit's, which is forked from it.
    words = [
        f"--{name}={getattr(args, name)}" for name in ("members", "features", "components", "rows", "gap", "threads")
    ]
    subprocess.run([sys.executable, str(HERE), "space", "--folder", str(space), *words], check=True)
    nbytes = args.members * args.features * WIDTHS[args.rows]
    print(f"made {args.members:,} x {args.features:,} {args.rows}, {nbytes / 1e9:.2f} GB: "
          f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
    report, wall, cpu, peak = fitted(space, args)
    import torch

    torch.set_num_threads(args.threads)
    angle = angle_of(space)
    rates = measured_rates(space, args)
    print(
        f"fit: {wall:.1f} s ({cpu:.1f} s of CPU), {report['passes']} passes, {report['bytes_read'] / 1e9:.1f} GB read"
    )
    print(f"     by {report['route']}, bound of the sine {report['reached']:.1e}; measured {angle:.1e}")
    print(f"     explained {report['explained']:.4f}, noise alone {report['noise_null']:.4f}")
    print(f"     peak memory {peak:,.0f} MiB, limit {args.limit:,} MiB")
    print("rates: " + ", ".join(f"{name} {value / 1e9:.1f} G/s" for name, value in rates.items()))
    half = report["passes"] / 2
    said = seconds_of(args.members, args.features, args.components, args.rows, half, half, rates)
    print(f"the formula says {said:.1f} s for this fit, without starting up")
    for components in (args.components, 2_000):
        project(components, report["passes"], rates)
    good = peak <= args.limit and angle <= GOALS[args.rows]
    print("good" if good else "NOT good: too much memory, or too large an angle")
    return 0 if good else 1


# ------------------------------------------------------------------------------------------------ a space that is known


def made_space(folder: Path, args: argparse.Namespace) -> None:
    """The space, and in known.npy the components [k, d] float64 that its rows have."""
    import numpy as np
    import torch

    torch.set_num_threads(args.threads)
    folder.mkdir()
    n, d, k = args.members, args.features, args.components
    draw = np.random.default_rng((7, 0))
    first = torch.from_numpy(np.concatenate([np.ones((n, 1)), draw.standard_normal((n, k))], 1))
    left = torch.linalg.qr(first).Q  # its first column is the mean's direction
    right = torch.linalg.qr(torch.from_numpy(draw.standard_normal((d, k)))).Q
    edge = math.sqrt(n) + math.sqrt(d)  # of the singular values of noise
    sizes = torch.linspace(2 * args.gap * edge, args.gap * edge, k, dtype=torch.float64)
    mean = torch.from_numpy(draw.standard_normal(d))
    inner = torch.zeros(k + 1, d, dtype=torch.float64)
    for rows, noise in noises(n, d):
        inner += left[rows].T @ noise
    norms = []
    with rows_path(folder, args.rows).open("wb") as file:
        for rows, noise in noises(n, d):
            rest = noise - left[rows] @ inner
            rest -= (rest @ right) @ right.T
            made = (left[rows, 1:] * sizes) @ right.T + rest + mean
            made = made.to(torch_dtype(args.rows))
            half = made.double().split([d // 2, d - d // 2], 1)
            norms += (half[0].norm(dim=1) * half[1].norm(dim=1)).tolist()
            file.write(made.contiguous().view(torch.uint8).numpy().data)
    layout = Layout("sd15", (Module("unet", "made", (d // 2, d - d // 2), 1),))
    index = {
        "format": 1, "members": n, "dtype": args.rows, "form": "svd", "layout": layout.to_json(), "conditions": None,
    }  # fmt: skip
    with (folder / MEMBERS).open("w") as lines:
        for number, norm in enumerate(norms):
            lines.write(json.dumps({"name": f"made-{number:06d}", "hash": f"{number:032x}", "norm": norm}) + "\n")
    (folder / INDEX).write_text(json.dumps(index))
    np.save(folder / "known.npy", right.T.numpy())


def noises(n: int, d: int) -> Any:
    """Normal noise [n, d], the same each time, a few rows at a time."""
    import numpy as np
    import torch

    height = max(1, (32 << 20) // (8 * d))
    for number, start in enumerate(range(0, n, height)):
        rows = slice(start, min(start + height, n))
        drawn = np.random.default_rng((7, 1, number)).standard_normal((rows.stop - start, d), dtype=np.float32)
        yield rows, torch.from_numpy(drawn).double()


def angle_of(space: Path) -> float:
    """The sine of the largest angle between the fitted components and the known ones."""
    import numpy as np
    import torch

    from weightops.synthesis.fitted import load_fitted

    known = torch.from_numpy(np.load(space / "known.npy"))
    pca = load_fitted(space / "pca.safetensors").pca
    assert pca is not None
    basis = pca.basis.double()
    return float(torch.linalg.matrix_norm(basis - (basis @ known.T) @ known, 2))


# ------------------------------------------------------------------------------------------------ the fit, measured


def fitted(space: Path, args: argparse.Namespace) -> tuple[dict[str, Any], float, float, float]:
    """The report, seconds of wall and of CPU, and the peak memory in MiB, of the fit as a process of its own."""
    words = [
        sys.executable, "-m", "weightops.cli", "synth", "fit", "pca", str(space), "--components", str(args.components),
        "--held-out", "0", "--memory", args.memory, "--device", "cpu", "--json",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": str(args.threads)}
    started = time.perf_counter()
    with (space / "report.json").open("wb") as out:
        process = subprocess.Popen(words, stdout=out, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"the fit ended with {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    report = json.loads((space / "report.json").read_text())
    return report, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / MIB


def measured_rates(space: Path, args: argparse.Namespace) -> dict[str, float]:
    """Bytes per second of reading rows as a fit does, and floating point operations per second of its products."""
    import torch

    opened = open_space(space)
    width = min(args.components + args.components // 8 + 16, args.members - 1, args.features)
    some = list(range(min(len(opened), max(64, (256 << 20) // (4 * opened.width)))))
    began = time.perf_counter()
    blocks = [rows for _, rows in opened.blocks(some)]
    rates = {"read, bytes": len(some) * opened.width * WIDTHS[args.rows] / (time.perf_counter() - began)}
    for name, dtype in (("float32, flop", torch.float32), ("float64, flop", torch.float64)):
        basis = torch.randn(opened.width, width, dtype=dtype)
        total = torch.zeros_like(basis)
        for _ in range(2):  # the first time warms up
            began, count = time.perf_counter(), 0
            for rows in blocks:
                apart = rows.to(dtype).sub_(0.5)
                total.addmm_(apart.mT, apart @ basis)
                count += 4 * rows.numel() * width
            rates[name] = count / (time.perf_counter() - began)
    return rates


def seconds_of(
    n: int, d: int, k: int, rows: str, narrow: float, fine: float, rates: dict[str, float]
) -> float:  # fmt: skip
    """The formula: narrow and fine are the passes in float32 and in float64."""
    width = min(k + k // 8 + 16, n - 1, d)
    passes = narrow + fine
    reading = (passes + 1) * n * d * WIDTHS[rows] / rates["read, bytes"]
    products = 4 * n * d * width * (narrow / rates["float32, flop"] + fine / rates["float64, flop"])
    turning = passes * 12 * d * width**2 / rates["float64, flop"]
    return reading + products + turning + 2 * n * d * k / rates["float32, flop"]


def project(components: int, passes: int, rates: dict[str, float]) -> None:
    """One line: the source's space, at these rates."""
    n, d = LARGE
    for rows in ("fp32", "fp16"):
        seconds = seconds_of(n, d, components, rows, passes / 2, passes / 2, rates)
        nbytes = n * d * WIDTHS[rows]
        plan = plan_pca(n, d, components, 1 << 40)
        least = plan.nbytes - 6 * plan.block + 6 * (16 << 20)
        print(f"{n:,} x {d:,} {rows}, {components:,} components: {nbytes / 1e9:.1f} GB on disk, "
              f"{(passes + 1) * nbytes / 1e9:,.0f} GB read, {least / 2**30:.1f} GiB of memory, "
              f"{seconds / 60:,.0f} minutes")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
