#!/usr/bin/env python3
"""Merges of more than two files: TIES over a base beside other tools, a recipe beside a plain merge and beside steps.

    python benchmarks/recipes.py ties --base base.safetensors --models a.safetensors b.safetensors --runs 3
    python benchmarks/recipes.py ties … --peer 'sd-mecha=python ties_mecha.py {base} {out} {a} {b}' --peer-runs 1
    python benchmarks/recipes.py recipe --models a.safetensors b.safetensors c.safetensors \\
        --loras one.safetensors two.safetensors --runs 3

Each contender runs as a whole process, in turn, round after round, the inputs in the page cache. Wall, CPU and peak
memory are medians; ratios are medians of the ratios within a round, or of medians, where a peer had fewer rounds.

ties: weightops merge A B --base BASE --method ties --set density=0.2; a peer is any command that does the same, with a
name.
recipe: a/4 + 3b/4 + 0.5·LoRA₁ − 0.3·LoRA₂ + 0.2·(c − a), in one pass, beside

    plain       weightops merge A B --alpha 0.75
    arithmetic  what the recipe computes beyond that, and nothing else: both LoRAs' products, on tensors of these shapes
    steps       the same in steps, with a file written after each: merge, fuse twice, merge; in fp32
    steps16     the same, each file in the first model's dtype

and, in the end, how far each result is off the same formula in float64, over every sixth tensor that a LoRA changes.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from merge import Figures, helper, measure, warm

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).resolve()
DENSITY = "0.2"
STRENGTHS = (0.5, -0.3, 0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # a helper of this file's own
    verbs = parser.add_subparsers(dest="verb")
    for name in ("ties", "recipe"):
        verb = verbs.add_parser(name)
        verb.add_argument("--models", type=Path, nargs="+", required=True)
        verb.add_argument("--runs", type=int, default=3)
        verb.add_argument("--folder", type=Path, help="where the outputs are written (default: temporary)")
        if name == "ties":
            verb.add_argument("--base", type=Path, required=True)
            verb.add_argument(
                "--peer", action="append", default=[], metavar="NAME=COMMAND", help="{base} {a} {b} {out}"
            )
            verb.add_argument("--peer-runs", type=int, metavar="N", help="rounds in which peers run (default: all)")
        else:
            verb.add_argument("--loras", type=Path, nargs=2, required=True)
    args = parser.parse_args()
    if args.only:
        {"arithmetic": arithmetic, "off": off}[args.only[0]](*args.only[1:])
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        {"ties": ties, "recipe": recipe}[args.verb](folder, args)


def weightops(*words: object) -> list[str]:
    return [sys.executable, "-m", "weightops.cli", *map(str, words), "-q", "--force"]


def ties(folder: Path, args: argparse.Namespace) -> None:
    given = {"base": args.base, **dict(zip("abcdefgh", args.models, strict=False))}
    out = folder / "out.safetensors"
    own = weightops("merge", *args.models, "--base", args.base, "--method", "ties", "--set", f"density={DENSITY}",
                    "-o", out)  # fmt: skip
    contenders = {"weightops": [own]}
    for said in args.peer:
        name, _, command = said.partition("=")
        for word, path in {**given, "out": out}.items():
            command = command.replace(f"{{{word}}}", str(path))
        contenders[name] = [["sh", "-c", command]]
    rounds = bench(contenders, list(given.values()), out, args.runs, set(contenders) - {"weightops"}, args)
    show(rounds, [(f"weightops / {name}", "weightops", name) for name in contenders if name != "weightops"])


def recipe(folder: Path, args: argparse.Namespace) -> None:
    a, b, c = args.models
    one, two = args.loras
    out, text = folder / "out.safetensors", folder / "recipe.yaml"
    text.write_text(
        "merge:\n"
        "  add:\n"
        f"    - {{weighted_sum: ['{a.resolve()}', '{b.resolve()}'], weights: [1, 3]}}\n"
        f"    - {{lora: '{one.resolve()}', strength: {STRENGTHS[0]}}}\n"
        f"    - {{lora: '{two.resolve()}', strength: {STRENGTHS[1]}}}\n"
        f"    - {{difference: ['{c.resolve()}', '{a.resolve()}'], strength: {STRENGTHS[2]}}}\n"
    )
    first, second = folder / "first.safetensors", folder / "second.safetensors"

    def steps(dtype: str, last: Path) -> list[list[str]]:
        fused = (f"{one}:{STRENGTHS[0]}", f"{two}:{STRENGTHS[1]}")
        return [
            weightops("merge", a, b, "--alpha", "0.75", "--dtype", dtype, "-o", first),
            weightops("fuse", first, *fused, "-o", second),
            weightops("merge", second, c, "--base", a, "--alpha", STRENGTHS[2], "--dtype", "fp16", "-o", last),
        ]

    own, exact, rough = (folder / f"{name}.safetensors" for name in ("recipe", "steps", "steps16"))
    contenders = {
        "plain": [weightops("merge", a, b, "--alpha", "0.75", "-o", out)],
        "recipe": [weightops("merge", "--recipe", text, "-o", own)],
        "arithmetic": [[sys.executable, str(HERE), "--only", "arithmetic", str(one), str(two)]],
        "steps": steps("fp32", exact),
        "steps16": steps("fp16", rough),
    }
    rounds = bench(contenders, [a, b, c, one, two], out, args.runs, set(), args)
    show(rounds, [("recipe / plain", "recipe", "plain"), ("recipe / steps", "recipe", "steps")])
    beyond = [(r["recipe"].wall - r["arithmetic"].wall) / r["plain"].wall for r in rounds]
    print(f"{'(recipe - arithmetic) / plain':40}{statistics.median(beyond):6.2f}   "
          f"({min(beyond):.2f} to {max(beyond):.2f})")  # fmt: skip
    this = [sys.executable, str(HERE), "--only", "off", *map(str, [a, b, c, one, two, own, exact, rough])]
    subprocess.run(this, check=True)
    for path in (out, text, first, second, own, exact, rough):
        path.unlink(missing_ok=True)


def bench(
    contenders: dict[str, list[list[str]]], inputs: Sequence[Path], out: Path, runs: int, peers: set[str],
    args: argparse.Namespace,
) -> list[dict[str, Figures]]:  # fmt: skip
    sizes = " + ".join(f"{path.stat().st_size / 1e9:.2f} GB" for path in inputs)
    print(f"{args.verb} of {', '.join(p.name for p in inputs)}: {sizes}, {runs} rounds", flush=True)
    rounds: list[dict[str, Figures]] = []
    most = getattr(args, "peer_runs", None) or runs
    for number in range(runs):
        figures = {}
        for name, commands in contenders.items():
            if name in peers and number >= most:
                continue
            os.sync()
            for path in inputs:
                warm(path)
            helper("touch", str(2 * max(path.stat().st_size for path in inputs)))
            each = [measure(command) for command in commands]
            figures[name] = Figures(
                sum(f.wall for f in each), sum(f.cpu for f in each), max(f.peak_mib for f in each)
            )  # fmt: skip
            if args.verb == "ties":
                out.unlink(missing_ok=True)
        rounds.append(figures)
    return rounds


def show(rounds: list[dict[str, Figures]], ratios: Sequence[tuple[str, str, str]]) -> None:
    print(f"{'':12}{'wall s':>9}{'cpu s':>9}{'peak MiB':>10}   wall of each round")
    walls = {}
    for name in rounds[0]:
        found = [r[name] for r in rounds if name in r]
        median = [statistics.median(f[i] for f in found) for i in range(3)]
        walls[name] = median[0]
        each = "  ".join(f"{f.wall:.2f}" for f in found)
        print(f"{name:12}{median[0]:9.2f}{median[1]:9.2f}{median[2]:10.0f}   {each}")
    for text, top, bottom in ratios:
        both = [r[top].wall / r[bottom].wall for r in rounds if bottom in r]
        found = statistics.median(both) if len(both) == len(rounds) else walls[top] / walls[bottom]
        print(f"{text:40}{found:6.2f}   ({min(both):.2f} to {max(both):.2f})")


# ------------------------------------------------------------------------------------------------ helpers


def arithmetic(*files: str) -> None:
    """Every ΔW of these LoRAs once, in float32, in two threads of one core each, as torch computes it; not kept."""
    import threading

    import torch
    from safetensors import safe_open

    torch.set_num_threads(1)
    work = []
    for file in files:
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                if key.endswith("lora_up.weight"):
                    up = opened.get_tensor(key).float().flatten(1)
                    down = opened.get_tensor(key.replace("lora_up", "lora_down")).float().flatten(1)
                    work.append((up, down))

    def multiply(number: int) -> None:
        for up, down in work[number::2]:
            torch.mm(up, down)

    threads = [threading.Thread(target=multiply, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def off(*paths: str) -> None:
    """How far each result is off the formula in float64, over every sixth tensor that the LoRAs change."""
    from safetensors import safe_open

    from weightops.files.checkpoint import open_checkpoint
    from weightops.lora.adapters import read_adapters, strengths
    from weightops.naming.identify import identify
    from weightops.ops.align import places_of

    a, b, c = (safe_open(path, "pt") for path in paths[:3])
    opened = open_checkpoint(paths[0])
    identity = identify(opened.tensors)
    places = places_of(opened, identity)
    changes: dict[str, list[tuple[float, str, str, float, tuple[tuple[int, int], ...] | None]]] = {}
    files = [(safe_open(path, "pt"), s, open_checkpoint(path)) for path, s in zip(paths[3:5], STRENGTHS, strict=False)]
    for number, (_, strength, lora) in enumerate(files):
        found = read_adapters(lora, architecture=identity.architecture)
        alphas = strengths(lora, found)
        for adapter in found.adapters:
            assert adapter.target is not None
            at = places[adapter.component, f"{adapter.target.names[0]}.weight"]
            alpha = alphas.get(adapter.name, (None, None))[0]
            scale = strength * (1.0 if alpha is None else alpha / adapter.rank)
            changes.setdefault(at.slot.key, []).append(
                (scale, adapter.keys["up"], adapter.keys["down"], number, at.slot.bands)
            )
    results = [safe_open(path, "pt") for path in paths[5:]]
    squares, total = [0.0] * len(results), 0.0
    for key, own in sorted(changes.items())[::6]:
        x, y, z = (f.get_tensor(key).double() for f in (a, b, c))
        exact = x / 4 + 3 * y / 4 + STRENGTHS[2] * (z - x)
        for scale, up, down, number, bands in own:
            lora = files[number][0]
            delta = lora.get_tensor(up).double().flatten(1) @ lora.get_tensor(down).double().flatten(1)
            target = exact if bands is None else exact[bands[0][0] : bands[0][1]]
            target += scale * delta.reshape(target.shape)
        total += float(exact.square().sum())
        for n, result in enumerate(results):
            squares[n] += float((result.get_tensor(key).double() - exact).square().sum())
        del exact
    for name, square in zip(("recipe", "steps", "steps16"), squares, strict=True):
        print(f"{name:12}off float64 by {math.sqrt(square / total):.3e} of the norm, every sixth tensor")


if __name__ == "__main__":
    main()
