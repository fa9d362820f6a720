"""fit: the components of a space of LoRAs, streamed, with the baselines beside them.

`fit_pca` is the verb; `made_pca` makes the same value of a space without any file.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.diffusion.extras import need
from weightops.diffusion.processes import Processes, join, started
from weightops.diffusion.threads import one_thread
from weightops.errors import MemoryRefused, UsageError, ValueRefused, quote
from weightops.files.writer import check_target
from weightops.ops.report import peak_memory_bytes
from weightops.synthesis.baselines import fit_nearest, fit_ridge
from weightops.synthesis.fit_report import Course, FitReport, reported
from weightops.synthesis.fitted import GEOMETRIES, Fitted
from weightops.synthesis.gauge import delta_norms
from weightops.synthesis.gram import Tiles, delta_pca, inner_products, products_with
from weightops.synthesis.pca import DEFAULT_MEMORY, PASSES, TOLERANCE, as_pca, principal
from weightops.synthesis.places import keep_inputs
from weightops.synthesis.space import REFERENCE, open_space
from weightops.synthesis.split import split
from weightops.synthesis.sweep import Sweep, share, unseen
from weightops.synthesis.unfinished_fit import KeptIteration, digest_of

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from weightops.synthesis.gram import DeltaPca
    from weightops.synthesis.pca import Pca
    from weightops.synthesis.space import Space
    from weightops.synthesis.subspace import Keep
    from weightops.synthesis.sweep import Tick


def fit_pca(
    space: str | os.PathLike[str],
    *,
    components: int = 64,
    held_out: float = 0.2,
    seed: int = 0,
    geometry: str = "rows",
    output: str | os.PathLike[str] | None = None,
    tolerance: float = TOLERANCE,
    passes: int = PASSES,
    device: str = "auto",
    memory: int = DEFAULT_MEMORY,
    force: bool = False,
    on_progress: Tick = unseen,
) -> FitReport:
    """Learn the first components of a space's rows, or of its ΔW, and write them to `output`, with the baselines.

    held_out: a share of the LoRAs, or so many, that nothing is learnt from; drawn by `seed`. geometry: rows, or delta
    (inner products of ΔW, which need no gauge). tolerance: of the sine of the angle to the true subspace, within
    `passes`, where the rows are too many for an exact way. memory: bytes in flight. Interrupted, the same call goes on
    from the last pass. Started by torchrun, processes share the rows. Raises WeightopsError.
    """
    began = time.perf_counter()
    need("synth fit", "torch", extra="synthesis")
    opened = open_space(space)
    target = target_of(opened, output, "pca", force=force)
    _check_words(components, geometry, tolerance, passes)
    trained, apart = split(opened, held_out, seed)
    check_enough(opened, trained, components)
    processes, device = meet(device)
    keep = None
    if geometry == "rows":
        words = {"trained": digest_of(trained), "components": components, "seed": seed}
        keep = KeptIteration(target, opened, words)
    with enough_memory(device):
        fitted, course = made_pca(
            opened, trained, apart, components=components, seed=seed, geometry=geometry, tolerance=tolerance,
            passes=passes, device=device, memory=memory, processes=processes, keep=keep, on_progress=on_progress,
        )  # fmt: skip
    report = reported(opened, fitted, course, target, components, tolerance)
    if keep is not None:
        report.resumed_at = keep.resumed_at
        report.warnings += keep.warnings
    if processes.is_main:
        report.bytes_written = fitted.save(target, force=force)
        if keep is not None:
            keep.remove()
    processes.wait()
    report.processes, report.process, report.device = processes.count, processes.index, device
    report.peak_memory_bytes, report.seconds = peak_memory_bytes(), time.perf_counter() - began
    return report


def made_pca(
    space: Space,
    trained: Sequence[int],
    held_out: Sequence[int],
    *,
    components: int,
    seed: int = 0,
    geometry: str = "rows",
    tolerance: float = TOLERANCE,
    passes: int = PASSES,
    device: str = "cpu",
    memory: int = DEFAULT_MEMORY,
    processes: Processes | None = None,
    keep: Keep | None = None,
    on_progress: Tick = unseen,
) -> tuple[Fitted, Course]:
    """The components of the trained members and the baselines, and how they came about; no file is written."""
    together = processes or Processes()
    made: dict[str, Any]
    with one_thread(len(trained) * space.width):
        if geometry == "delta":
            made, latents, course = _delta(space, trained, held_out, components, memory, together, on_progress)
        else:
            found, plan, values = principal(
                space, trained, space.width, components, memory=memory, tolerance=tolerance, passes=passes, seed=seed,
                device=device, processes=together, keep=keep, tick=on_progress,
            )  # fmt: skip
            _check_varied(space, found.total)
            pca = as_pca(found)
            sweep = Sweep(space, trained, plan.block, plan.band, device, together, on_progress)
            latents, _ = _coefficients(pca, sweep, trained)
            explained = _coefficients(pca, sweep, held_out)[1] if held_out else None
            course = Course(
                plan.route, found.passes, found.reached, found.change, values + sweep.values, plan.nbytes, explained
            )  # fmt: skip
            made = {"pca": pca}
    fitted = Fitted(
        "pca", geometry, space.layout, space.form, space.reference, space.digest, len(space), tuple(trained),
        tuple(space.names[i] for i in trained), tuple(held_out), tuple(space.names[i] for i in held_out), latents,
        seed=seed, settings={"components": components, "tolerance": tolerance, "passes": passes}, space=space,
        **made, **baselines(space, trained, latents),
    )  # fmt: skip
    return fitted, course


def baselines(space: Space, trained: Sequence[int], latents: Tensor) -> dict[str, Any]:
    """Fields of a Fitted: ridge regression of latents [n, m] and the nearest neighbour, where there are conditions."""
    if space.conditions is None:
        return {}
    conditions = space.conditions[list(trained)]
    return {
        "ridge": fit_ridge(conditions, latents), "nearest": fit_nearest(conditions),
        "condition_names": space.condition_names, "condition_source": space.condition_source,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ the two geometries


def _delta(
    space: Space, trained: Sequence[int], held_out: Sequence[int], components: int, memory: int,
    processes: Processes, on_progress: Tick,
) -> tuple[dict[str, Any], Tensor, Course]:  # fmt: skip
    n, read = len(trained), 0
    tiles = Tiles.plan(space, n, memory)

    def on_block(values: int) -> None:
        nonlocal read
        read += values
        # Each tile reads itself and what is behind it; how many tiles there are, the memory decides.
        on_progress(min(read // space.width, n), n, "inner products")

    products = inner_products(space, trained, memory=memory, processes=processes, on_block=on_block)
    found = delta_pca(products, trained, components)
    _check_varied(space, found.total)
    explained = None
    if held_out:
        explained = _explained(found, products, space, held_out)
        read += (len(held_out) + n) * space.width
    course = Course("gram", 1, 0.0, 0.0, read, tiles.nbytes, explained)
    return {"delta": found}, found.own.float(), course


def _explained(found: DeltaPca, products: Tensor, space: Space, held_out: Sequence[int]) -> float | None:
    """The share of the held-out changes' squared distance from the mean that the components have."""
    mean = float(products.mean())
    caught = whole = 0.0
    for _, rows in space.blocks(list(held_out)):
        factors = space.layout.unflatten(rows)
        with_members = products_with(factors, space, found.members)
        coefficients = with_members @ found.weights - found.offsets
        caught += float(coefficients.square().sum())
        whole += float((delta_norms(factors).square() - 2 * with_members.mean(1) + mean).sum())
    return caught / whole if whole > 0 else None


def _coefficients(pca: Pca, sweep: Sweep, members: Sequence[int]) -> tuple[Tensor, float | None]:
    """[n, k] float32 on the CPU, and the share of the members' squared distance from the mean that they have."""
    import torch

    processes = sweep.processes
    mean, basis = pca.mean.to(sweep.device), pca.basis.to(sweep.device)
    found = torch.zeros(len(members), pca.components, device=sweep.device)
    whole = torch.zeros(1, dtype=torch.float64, device=sweep.device)
    first, own = share(members, processes)
    for where, rows in sweep.blocks("coefficients", own):
        apart = rows.sub_(mean)
        found[first + where.start : first + where.stop] = apart @ basis.mT
        whole += torch.linalg.vector_norm(apart, dtype=torch.float64).square()
    found, distance = sweep.summed(found).cpu(), float(sweep.summed(whole))
    caught = float(torch.linalg.vector_norm(found, dtype=torch.float64).square())
    return found, caught / distance if distance > 0 else None


def _check_varied(space: Space, total: float) -> None:
    if not total > 0:
        what = "its LoRAs to train on are all the same, so that there is nothing to learn"
        raise ValueRefused(space.label, what, "collect LoRAs that differ")


# ------------------------------------------------------------------------------------------------ before and after


def target_of(space: Space, output: str | os.PathLike[str] | None, kind: str, *, force: bool) -> Path:
    """Where the fitted model goes: into the space's folder if nothing else is said. Raises UsageError, OutputError."""
    target = space.folder / f"{kind}.safetensors" if output is None else Path(output)
    if target.suffix != ".safetensors":
        raise UsageError(str(target), "the output's name must end in .safetensors")
    check_target(target, 0, force=force, inputs=())
    # Without it none of the rows could be read again.
    keep_inputs(target, space.folder / REFERENCE)
    return target


def check_enough(space: Space, trained: Sequence[int], components: int) -> None:
    """Raises UsageError for fewer LoRAs to train on than components need."""
    if len(trained) < 2:
        what = f"found {len(trained):,} LoRA to train on, expected 2 or more"
        raise UsageError(space.label, what, "collect more LoRAs, or hold out fewer")
    if len(trained) <= components:
        what = f"found {len(trained):,} LoRAs to train on, expected at least {components + 1:,} for {components:,} "
        hint = f"--components {len(trained) - 1}, or collect more LoRAs, or hold out fewer"
        raise UsageError(space.label, f"{what}components", hint)
    if components > space.width:
        raise UsageError("--components", f"found {components:,}, expected at most {space.width:,}, a row's features")


def _check_words(components: int, geometry: str, tolerance: float, passes: int) -> None:
    if components < 1:
        raise UsageError("--components", f"found {components}, expected a whole number, 1 or more")
    if geometry not in GEOMETRIES:
        raise UsageError("--geometry", f"found {quote(geometry)}, expected {' or '.join(GEOMETRIES)}")
    if not 0 < tolerance < 1:
        raise UsageError("--tolerance", f"found {tolerance:g}, expected a number between 0 and 1")
    if passes < 2:
        raise UsageError("--passes", f"found {passes}, expected 2 or more")


@contextlib.contextmanager
def enough_memory(device: str) -> Iterator[None]:
    """Raises MemoryRefused where a device turns out to have too little."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        hint = "fewer --components, or --device cpu; what was interrupted goes on where it was"
        raise MemoryRefused("--device", f"{device} has too little memory for this", hint) from None


def meet(device: str) -> tuple[Processes, str]:
    """The other processes, if torchrun started any, and the device of this one. Raises UsageError."""
    from weightops.engine.tensors import resolve_device

    found = resolve_device(device)
    if started() == 1:
        return Processes(), found
    need("synth fit", "accelerate", extra="synthesis")
    if ":" in found:
        what = f"found {quote(device)}, but each of {started()} processes has its own"
        raise UsageError("--device", what, "use --device cuda")
    processes = join(cpu=found == "cpu")
    return processes, f"cuda:{processes.local}" if found == "cuda" else found
