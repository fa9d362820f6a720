#!/usr/bin/env python3
"""fuse, extract, resize and combine, beside another tool's script where its command is given, side by side.

    python benchmarks/lora.py fuse --checkpoint model.safetensors --lora style.safetensors --runs 3
    python benchmarks/lora.py extract --tuned tuned.safetensors --base base.safetensors --rank 32 --runs 3
    python benchmarks/lora.py resize --lora style.safetensors --rank 32 --runs 3
    python benchmarks/lora.py combine --a one.safetensors --b two.safetensors --weights 0.7 0.5 --rank 32 --runs 3
    python benchmarks/lora.py fuse … --peer 'python merge.py {checkpoint} {lora} {out}' --peer-runs 1
    python benchmarks/lora.py extract … --device cuda      weightops on the GPU beside weightops on the CPU

Each contender runs as a whole process, in turn, round after round; each ends with an fsync of its output, and both
inputs are read into the page cache before each run. Wall, CPU and peak memory are medians; ratios are medians of the
ratios within a round, for these are what a noisy machine leaves comparable, or, where the peer had fewer rounds than
the others, ratios of medians.

    weightops  weightops fuse CHECKPOINT LORA, or weightops extract TUNED BASE --rank R --conv-rank C, or
               weightops resize LORA --rank R, or weightops combine A:0.7 B:0.5 --rank R
    peer       any command that does the same: {checkpoint} {lora} {out}, or {tuned} {base} {out}, or {lora} {out}, or
               {a} {b} {out}, stand for the files
    torch      import torch and nothing else, which every contender with arithmetic pays

After the last round of extract, what each wrote is held against the best that the rank allows (Eckart & Young): of
some layers of every shape, among those that all wrote, |dW - up @ down| over the least error of any matrix of that
rank, in float64. After resize and combine, the same of every layer, against the sum of weight · dW of what came in,
from the factors alone; and of all layers together, the error over the norm.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from merge import Figures, helper, measure, show, warm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from weightops.files.checkpoint import Checkpoint
    from weightops.lora.adapters import Adapter
    from weightops.naming.slots import Place

HERE = Path(__file__).resolve()

# A component and the canonical modules that one layer of a LoRA changes.
Layer = tuple[str, tuple[str, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # a helper of this file's own
    verbs = parser.add_subparsers(dest="verb", metavar="fuse|extract|resize|combine")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--runs", type=int, default=5)
    common.add_argument("--peer", metavar="COMMAND", help="of another tool, with {names} for the files")
    common.add_argument("--peer-runs", type=int, metavar="N", help="rounds in which the peer runs (default: all)")
    common.add_argument("--folder", type=Path, help="where the outputs are written (default: temporary)")
    common.add_argument("--device", default="cpu", help="with cuda: weightops on it as one more contender")
    verb = verbs.add_parser("fuse", parents=[common])
    verb.add_argument("--checkpoint", type=Path, required=True)
    verb.add_argument("--lora", type=Path, required=True)
    verb = verbs.add_parser("extract", parents=[common])
    verb.add_argument("--tuned", type=Path, required=True)
    verb.add_argument("--base", type=Path, required=True)
    verb.add_argument("--rank", type=int, default=32)
    verb.add_argument("--conv-rank", type=int, help="of convolutions larger than 1x1 (default: --rank)")
    verb.add_argument("--layers", type=int, default=2, help="of each shape, whose error is computed")
    verb = verbs.add_parser("resize", parents=[common])
    verb.add_argument("--lora", type=Path, required=True)
    verb.add_argument("--rank", type=int, default=32)
    verb.add_argument("--conv-rank", type=int, help="of convolutions larger than 1x1 (default: --rank)")
    verb = verbs.add_parser("combine", parents=[common])
    verb.add_argument("--a", type=Path, required=True)
    verb.add_argument("--b", type=Path, required=True)
    verb.add_argument("--weights", type=float, nargs=2, default=[1.0, 1.0], help="of a and of b")
    verb.add_argument("--rank", type=int, default=32)
    verb.add_argument("--conv-rank", type=int, help="of convolutions larger than 1x1 (default: --rank)")
    args = parser.parse_args()
    if args.only:
        {"synced": synced, "check": check, "check_sum": check_sum}[args.only[0]](*args.only[1:])
        return
    if args.verb is None:
        parser.error("fuse, extract, resize or combine?")
    if args.peer and "{out}" not in args.peer:
        parser.error("--peer needs {out} where the name of its output is to stand")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        {"fuse": fuse, "extract": extract, "resize": resize, "combine": combine}[args.verb](folder, args)


def fuse(folder: Path, args: argparse.Namespace) -> None:
    given = {"checkpoint": args.checkpoint, "lora": args.lora}
    bench(["fuse", *map(str, given.values())], given, folder, args, keep=False)


def extract(folder: Path, args: argparse.Namespace) -> None:
    given = {"tuned": args.tuned, "base": args.base}
    files = [str(path) for path in given.values()]
    ranks = [str(args.rank), str(args.rank if args.conv_rank is None else args.conv_rank)]
    command = ["extract", *files, "--rank", ranks[0], "--conv-rank", ranks[1]]
    outputs = bench(command, given, folder, args, keep=True)
    this = [sys.executable, str(HERE), "--only", "check"]
    subprocess.run([*this, *files, *ranks, str(args.layers), *map(str, outputs)], check=True)
    for out in outputs:
        out.unlink()


def resize(folder: Path, args: argparse.Namespace) -> None:
    outputs = bench(["resize", str(args.lora), *_ranks(args)], {"lora": args.lora}, folder, args, keep=True)
    _hold_against([f"{args.lora}:1"], outputs, args)


def combine(folder: Path, args: argparse.Namespace) -> None:
    given = {"a": args.a, "b": args.b}
    summands = [f"{path}:{weight}" for path, weight in zip(given.values(), args.weights, strict=True)]
    outputs = bench(["combine", *summands, *_ranks(args)], given, folder, args, keep=True)
    _hold_against(summands, outputs, args)


def _ranks(args: argparse.Namespace) -> list[str]:
    words = ["--rank", str(args.rank)]
    return words if args.conv_rank is None else [*words, "--conv-rank", str(args.conv_rank)]


def _hold_against(summands: Sequence[str], outputs: Sequence[Path], args: argparse.Namespace) -> None:
    ranks = [str(args.rank), str(args.rank if args.conv_rank is None else args.conv_rank)]
    this = [sys.executable, str(HERE), "--only", "check_sum", *ranks, str(len(summands))]
    subprocess.run([*this, *summands, *map(str, outputs)], check=True)
    for out in outputs:
        out.unlink()


# ------------------------------------------------------------------------------------------------ time and memory


def bench(
    verb: list[str], given: Mapping[str, Path], folder: Path, args: argparse.Namespace, *, keep: bool
) -> list[Path]:
    """Every contender in every round. The outputs of the last one, where they are to be kept."""
    contenders, outs = _contenders(verb, given, folder, args)
    sizes = " + ".join(f"{path.stat().st_size / 1e9:.2f} GB" for path in given.values())
    print(f"{verb[0]} of {', '.join(p.name for p in given.values())}: {sizes}, {args.runs} rounds", flush=True)
    rounds: list[dict[str, Figures]] = []
    for number in range(args.runs):
        figures = {}
        for name, command in contenders.items():
            if name == "peer" and number >= args.runs_of_peer:
                continue
            out = outs.get(name)
            if out is not None:
                out.unlink(missing_ok=True)
            os.sync()  # what an earlier contender left to write is not this one's to wait for
            for path in given.values():
                warm(path)
            helper("touch", str(3 * sum(path.stat().st_size for path in given.values())))
            figures[name] = measure(command)
            if out is not None and not keep:
                out.unlink()
        rounds.append(figures)
    show([{name: f for name, f in r.items() if name != "peer"} for r in rounds])
    if "peer" in contenders:
        _beside(rounds, args)
    return [out for out in outs.values() if keep]


def _contenders(
    verb: list[str], given: Mapping[str, Path], folder: Path, args: argparse.Namespace
) -> tuple[dict[str, list[str]], dict[str, Path]]:
    """Commands by name, and the file that each writes; torch writes none."""
    contenders, outs = {}, {}
    for name, device in {"weightops": "cpu", args.device: args.device}.items():
        if name == "cpu":
            continue
        outs[name] = folder / f"{name}.safetensors"
        ours = [sys.executable, "-m", "weightops.cli", *verb, "-o", str(outs[name]), "-q"]
        contenders[name] = [*ours, "--device", device]
    args.runs_of_peer = args.runs if args.peer_runs is None else min(args.peer_runs, args.runs)
    if args.peer and args.runs_of_peer:
        outs["peer"] = folder / "peer.safetensors"
        words = shlex.split(args.peer)
        for name, path in {**given, "out": outs["peer"]}.items():
            words = [word.replace(f"{{{name}}}", str(path)) for word in words]
        contenders["peer"] = [sys.executable, str(HERE), "--only", "synced", str(outs["peer"]), *words]
    contenders["torch"] = [sys.executable, "-c", "import torch"]
    return contenders, outs


def _beside(rounds: Sequence[Mapping[str, Figures]], args: argparse.Namespace) -> None:
    """The peer's figures, and what they are to ours."""
    both = [r for r in rounds if "peer" in r]
    print(f"\npeer: {args.peer}")
    show([{"peer": r["peer"]} for r in both])
    for name in (n for n in rounds[0] if n not in ("peer", "torch")):
        text = f"peer / {name}"
        if len(both) == len(rounds):
            found = [r["peer"].wall / r[name].wall for r in rounds]
            print(f"{text:40}{statistics.median(found):6.2f}   ({min(found):.2f} to {max(found):.2f})")
        else:
            theirs, ours = (statistics.median(r[n].wall for r in of) for n, of in (("peer", both), (name, rounds)))
            print(f"{text:40}{theirs / ours:6.2f}   (of medians, {len(both)} and {len(rounds)} rounds)")


def synced(out: str, *command: str) -> None:
    """Another tool's command, quiet unless it fails, and then an fsync of what it wrote."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed with exit code {done.returncode}\n{done.stderr[-4000:]}")
    descriptor = os.open(out, os.O_RDWR)
    os.fsync(descriptor)


# ------------------------------------------------------------------------------------------------ error


class Written(NamedTuple):
    """A LoRA file: the layers that it has as two factors, each with its alpha, and how many it has otherwise."""

    opened: Checkpoint
    layers: Mapping[Layer, tuple[Adapter, float | None]]
    others: int


class Errors(NamedTuple):
    """Of one layer: the norm of dW, the least error that the rank allows, and that of each file."""

    name: str
    norm: float
    least: float
    found: tuple[float, ...]


def check(tuned: str, base: str, rank: str, conv_rank: str, layers: str, *outputs: str) -> None:
    """Print each file's error over the optimum: the worst layer, the median, and the total over the sample."""
    from weightops.files.checkpoint import open_checkpoint
    from weightops.naming.identify import identify
    from weightops.ops.align import places_of

    with ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(path)) for path in (tuned, base)]
        identities = [identify(model.tensors) for model in opened]
        places = [places_of(model, identity) for model, identity in zip(opened, identities, strict=True)]
        files = {
            Path(path).stem: _read(stack.enter_context(open_checkpoint(path)), identities[0].architecture)
            for path in outputs
        }
        errors = []
        for layer in _sample(list(files.values()), places, int(layers)):
            delta, other = (_weight(model, at, layer) for model, at in zip(opened, places, strict=True))
            delta -= other
            adapter, _ = next(iter(files.values())).layers[layer]
            least = _least(delta, _rank_of(adapter, int(rank), int(conv_rank)))
            made = (float((delta - _product(file, layer)).norm()) for file in files.values())
            errors.append(Errors(adapter.name, float(delta.norm()), least, tuple(made)))
    _show(files, errors)


def check_sum(rank: str, conv_rank: str, count: str, *files: str) -> None:
    """Print each file's error against the sum of the first `count`, each given as PATH:WEIGHT, of every layer."""
    from weightops.files.checkpoint import open_checkpoint

    with ExitStack() as stack:
        texts = [text.rpartition(":") for text in files[: int(count)]]
        summands = [(_read(stack.enter_context(open_checkpoint(p)), None), float(weight)) for p, _, weight in texts]
        outputs = {Path(p).stem: _read(stack.enter_context(open_checkpoint(p)), None) for p in files[int(count) :]}
        every = [*(file for file, _ in summands), *outputs.values()]
        errors = []
        for layer in dict.fromkeys(layer for file in every for layer in file.layers):
            adapter, _ = next(file.layers[layer] for file in every if layer in file.layers)
            exact = [_factors(file, layer, weight) for file, weight in summands if layer in file.layers]
            values = _values(exact)
            # A layer that an output lacks is one that it does not change.
            made = [[_factors(file, layer, -1.0)] if layer in file.layers else [] for file in outputs.values()]
            found = tuple(float(_values([*exact, *own]).norm()) for own in made)
            least = float(values[_rank_of(adapter, int(rank), int(conv_rank)) :].norm())
            errors.append(Errors(adapter.name, float(values.norm()), least, found))
    norm = sum(e.norm**2 for e in errors) ** 0.5
    print(f"\nerror / norm of the exact change, of {len(errors)} layers together:")
    for name, squares in {
        "least": [e.least**2 for e in errors],
        **{name: [e.found[number] ** 2 for e in errors] for number, name in enumerate(outputs)},
    }.items():
        print(f"{name:12}{sum(squares) ** 0.5 / norm:12.3e}")
    _show(outputs, errors)
    for (file, weight), (path, _, _) in zip(summands, texts, strict=True):
        print(
            f"given {Path(path).name} at {weight:g}: {len(file.layers)} layers as two factors, {file.others} otherwise"
        )


def _rank_of(adapter: Adapter, rank: int, conv_rank: int) -> int:
    kernel = (adapter.family.shape(adapter.shapes) or ())[2:]
    return conv_rank if any(size > 1 for size in kernel) else rank


def _values(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The singular values of a sum of products, from the triangles of its factors side by side; of none, none."""
    import torch

    if not parts:
        return torch.zeros(0, dtype=torch.float64)
    _, left = torch.linalg.qr(torch.cat([up for up, _ in parts], 1), mode="r")
    _, right = torch.linalg.qr(torch.cat([down for _, down in parts]).mT, mode="r")
    return torch.linalg.svdvals(left @ right.mT)


def _read(opened: Checkpoint, architecture: str | None) -> Written:
    """The layers of a LoRA file whose change is up @ down."""
    from weightops.lora.adapters import alphas, read_adapters

    found = read_adapters(opened, architecture=architecture)
    found.check()
    strengths = alphas(opened, found)
    layers = {
        (a.component or "", a.target.names): (a, strengths.get(a.name))
        for a in found.adapters
        if a.target is not None and a.keys.keys() - {"alpha"} == {"up", "down"}
    }
    return Written(opened, layers, len(found.adapters) - len(layers))


def _sample(files: Sequence[Written], places: Sequence[Mapping[tuple[str, str], Place]], count: int) -> list[Layer]:
    """As many layers of each shape, from end to end, of those that all files and both models have."""
    shapes: dict[tuple[int, ...] | None, list[Layer]] = {}
    for layer, (adapter, _) in files[0].layers.items():
        keys = [(layer[0], f"{name}.weight") for name in layer[1]]
        if all(layer in file.layers for file in files) and all(key in at for at in places for key in keys):
            shapes.setdefault(adapter.family.shape(adapter.shapes), []).append(layer)
    return [layer for same in shapes.values() for layer in same[:: -(-len(same) // count)]]


def _weight(opened: Checkpoint, places: Mapping[tuple[str, str], Place], layer: Layer) -> Tensor:
    """A layer's weight in float64, as a matrix: the modules that it packs, one above the other."""
    import torch

    component, names = layer
    return torch.cat([_matrix(opened, places[component, f"{name}.weight"]) for name in names])


def _matrix(opened: Checkpoint, at: Place) -> Tensor:
    from weightops.engine.tensors import as_tensor

    data = bytearray(at.slot.spec.nbytes)
    opened.read_bytes(at.slot, 0, len(data), memoryview(data))
    tensor = as_tensor(memoryview(data), at.slot.spec).double()
    return tensor.T if at.transposed else tensor.flatten(1)


def _product(file: Written, layer: Layer) -> Tensor:
    """What a file changes of a layer, its rows in the order of canonical modules."""
    up, down = _factors(file, layer, 1.0)
    return up @ down


def _factors(file: Written, layer: Layer, weight: float) -> tuple[Tensor, Tensor]:
    """What a file changes of a layer, as two factors; alpha and weight are in up."""
    from weightops.naming.keymap import swaps
    from weightops.naming.slots import Place

    adapter, alpha = file.layers[layer]
    up, down = (_matrix(file.opened, Place(file.opened.slot(adapter.keys[part]))) for part in ("up", "down"))
    up = up * (weight if alpha is None else weight * alpha / len(down))
    assert adapter.target is not None
    swapped = swaps(adapter.target.rule, len(up), adapter.shapes["down"][1])
    return (up.roll(len(up) // 2, 0) if swapped else up), down


def _least(matrix: Tensor, rank: int) -> float:
    """The distance to the nearest matrix of that rank. Source: Eckart & Young 1936."""
    import torch

    if rank >= min(matrix.shape):
        return 0.0
    flat = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    squares = torch.linalg.eigvalsh(flat @ flat.T).clamp(min=0)
    least = float(squares[: len(flat) - rank].sum().sqrt())
    if least < 1e-4 * float(matrix.norm()):
        # Squares of singular values this small are lost beside those of the large ones.
        least = float(torch.linalg.svdvals(matrix)[rank:].norm())
    return least


def _show(files: Mapping[str, Written], errors: Sequence[Errors]) -> None:
    """Ratios where there is something to miss; where the rank leaves nothing out, the error over the norm of dW."""
    held = [e for e in errors if e.least > 1e-9 * e.norm]
    whole = [e for e in errors if e.norm > 0 and e not in held]
    print(f"\nerror / optimum, of {len(held)} layers:")
    print(f"{'':12}{'worst':>9}{'median':>9}{'total':>9}   worst layer")
    for number, name in enumerate(files if held else ()):
        ratios = {e.name: e.found[number] / e.least for e in held}
        worst = max(ratios, key=lambda layer: ratios[layer])
        total = (sum(e.found[number] ** 2 for e in held) / sum(e.least**2 for e in held)) ** 0.5
        print(f"{name:12}{ratios[worst]:9.4f}{statistics.median(ratios.values()):9.4f}{total:9.4f}   {worst}")
    for number, name in enumerate(files if whole else ()):
        worst = max(e.found[number] / e.norm for e in whole)
        print(f"{name}: of {len(whole)} layers that the rank holds whole, error / norm at most {worst:.1e}")
    for name, file in files.items():
        print(f"{name}: {len(file.layers)} layers as two factors, {file.others} otherwise")


if __name__ == "__main__":
    main()
