"""fit vae and fit diffusion: networks on the components of a space of LoRAs, with the baselines beside them.

`fit_vae` and `fit_diffusion` are the verbs; the networks themselves are made by `vae.made_vae` and
`denoiser.made_denoiser`, of numbers in memory.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.diffusion.extras import need
from weightops.errors import MismatchError, UsageError
from weightops.ops.report import peak_memory_bytes
from weightops.synthesis.components import components_for, distances_of
from weightops.synthesis.denoiser import made_denoiser
from weightops.synthesis.fit import baselines, check_enough, enough_memory, meet, target_of
from weightops.synthesis.fitted import load_fitted
from weightops.synthesis.kept_descent import KeptDescent
from weightops.synthesis.pca import DEFAULT_MEMORY
from weightops.synthesis.space import open_space
from weightops.synthesis.split import split
from weightops.synthesis.sweep import unseen
from weightops.synthesis.vae import made_vae

if TYPE_CHECKING:
    from torch import Tensor

    from weightops.diffusion.processes import Processes
    from weightops.synthesis.fitted import Fitted
    from weightops.synthesis.space import Space
    from weightops.synthesis.sweep import Tick


@dataclass(slots=True)
class LearnReport:
    """What was learnt, and how well. losses: the running means of the last steps, by name.

    left: of the held-out members' squared distance from the trained mean, the share that is left by each way of making
    them, 0 exact, 1 no better than the mean. Of a VAE: its own, and that of as many components. Of diffusion with
    conditions: of its samples for their conditions, of ridge regression, and of the nearest trained member, all within
    its latents. learnt_from: the file of the PCA or VAE, or "made here". left_out: as of `FitReport`.
    """

    kind: str
    space: str
    output: str
    geometry: str
    form: str
    members: int
    trained: int
    held_out: int
    features: int
    components: int
    learnt_from: str
    latents: int
    parameters: int
    steps: int
    losses: dict[str, float]
    left: dict[str, float]
    left_out: float | None
    seed: int
    settings: dict[str, Any]
    resumed_at: int = 0
    bytes_written: int = 0
    warnings: list[str] = field(default_factory=list)
    device: str = ""
    processes: int = 1
    process: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON document that scripts may rely on."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "process"}
        return {"command": "synth fit", "version": __version__, "inputs": [{"path": self.space}], **found}


def fit_vae(
    space: str | os.PathLike[str],
    *,
    latents: int = 64,
    layers: str = "mlp",
    hidden: int = 256,
    beta: float = 0.01,
    dropout: float = 0.5,
    components: int | None = None,
    steps: int | None = None,
    lr: float | None = None,
    batch: int = 64,
    weight_decay: float = 0.01,
    held_out: float = 0.2,
    seed: int = 0,
    geometry: str = "rows",
    output: str | os.PathLike[str] | None = None,
    device: str = "auto",
    memory: int = DEFAULT_MEMORY,
    force: bool = False,
    on_progress: Tick = unseen,
) -> LearnReport:
    """Learn a variational autoencoder of a space's components, and write it to `output`, with the baselines.

    The components are those of the space's pca.safetensors where that is of the same LoRAs, the same split, and has
    enough of them; else they are made here. components: how many the VAE sees (None: all that are there, or twice the
    latents). layers: linear or mlp, of the width `hidden`; beta, dropout: see `vae`. steps (None: 800, or thirty times
    each member if that is more), lr (None: 0.01 of a linear one, 0.001 of an MLP), batch, weight_decay: of the descent.
    Interrupted, the same call goes on, to the same bytes. Started by torchrun, processes share each step. Raises
    WeightopsError.
    """
    began = time.perf_counter()
    need("synth fit", "torch", extra="synthesis")
    opened = open_space(space)
    target = target_of(opened, output, "vae", force=force)
    trained, apart = split(opened, held_out, seed)
    check_enough(opened, trained, 1)
    processes, device = meet(device)
    wanted = min(max(64, 2 * latents), len(trained) - 1, opened.width) if components is None else components
    axes, source = components_for(
        opened, trained, apart, wanted, seed=seed, geometry=geometry, exact=components is not None, device=device,
        memory=memory, processes=processes, on_progress=on_progress,
    )  # fmt: skip
    words: dict[str, Any] = {
        "latents": latents, "layers": layers, "hidden": hidden, "beta": beta, "dropout": dropout, "steps": steps,
        "lr": lr, "batch": batch, "weight_decay": weight_decay,
    }  # fmt: skip
    kept = KeptDescent(target, axes.latents, {"kind": "vae", "seed": seed, **words}, processes)
    with enough_memory(device):
        vae, losses = made_vae(
            axes.latents, **words, seed=seed, where=opened.label, device=device, processes=processes,
            state=kept.load(), keep=kept.save, on_progress=lambda done, total, _: on_progress(done, total, "the VAE"),
        )  # fmt: skip
    found = vae.encode(axes.latents)
    settings = {"components": axes.components, **words, "learnt_from": Path(source).name}
    fitted = replace(
        axes, kind="vae", vae=vae, latents=found, settings=settings, **baselines(opened, trained, found)
    )  # fmt: skip
    report = _reported(opened, fitted, target, losses, vae.parameters, kept, source)
    if apart:
        coefficients, whole = distances_of(axes, opened, apart)
        report.left = _left_by_vae(fitted, coefficients, whole, latents)
    return _ended(report, fitted, kept, target, processes, device, began, force=force)


def fit_diffusion(
    space: str | os.PathLike[str],
    *,
    latents_of: str | os.PathLike[str] = "pca",
    components: int | None = None,
    prediction: str = "x0",
    conditioning: str = "adanorm",
    width: int = 128,
    rank: int = 4,
    drop: float = 0.1,
    dropout: float = 0.3,
    steps: int | None = None,
    lr: float = 2e-3,
    batch: int = 128,
    weight_decay: float = 0.1,
    held_out: float = 0.2,
    seed: int = 0,
    geometry: str = "rows",
    output: str | os.PathLike[str] | None = None,
    device: str = "auto",
    memory: int = DEFAULT_MEMORY,
    force: bool = False,
    on_progress: Tick = unseen,
) -> LearnReport:
    """Learn diffusion in a space's latents, on its conditions if it has any, and write it, with the baselines.

    latents_of: "pca" (the coefficients of the space's pca.safetensors, as `fit_vae` has them), "vae" (the space's
    vae.safetensors), or the path of either; a VAE and a path bring their own split, components and geometry.
    components: of the PCA, 64 or as many as there are if nothing is said. prediction: x0 or v; conditioning: adanorm,
    or adalora, with matrices of `rank`; width: of the network; drop: how often the condition is not seen, for guidance.
    steps (None: 1,500, or thirty times each member if that is more), lr, batch, weight_decay, dropout: of the descent.
    Interrupted, the same call goes on, to the same bytes. Started by torchrun, processes share each step. Raises
    WeightopsError.
    """
    began = time.perf_counter()
    need("synth fit", "torch", extra="synthesis")
    opened = open_space(space)
    target = target_of(opened, output, "diffusion", force=force)
    processes, device = meet(device)
    if os.fspath(latents_of) == "pca":
        trained, apart = split(opened, held_out, seed)
        check_enough(opened, trained, 1)
        wanted = min(64, len(trained) - 1, opened.width) if components is None else components
        before, source = components_for(
            opened, trained, apart, wanted, seed=seed, geometry=geometry, exact=components is not None, device=device,
            memory=memory, processes=processes, on_progress=on_progress,
        )  # fmt: skip
    else:
        before, source = _named_latents(latents_of, opened, components)
    words: dict[str, Any] = {
        "prediction": prediction, "conditioning": conditioning, "width": width, "rank": rank, "drop": drop,
        "dropout": dropout, "steps": steps, "lr": lr, "batch": batch, "weight_decay": weight_decay,
    }  # fmt: skip
    conditions = None if opened.conditions is None else opened.conditions[list(before.trained)]
    kept = KeptDescent(target, before.latents, {"kind": "diffusion", "seed": seed, **words}, processes, conditions)
    with enough_memory(device):
        denoiser, losses = made_denoiser(
            before.latents, conditions, **words, seed=seed, where=opened.label, device=device, processes=processes,
            state=kept.load(), keep=kept.save, on_progress=lambda done, total, _: on_progress(done, total, "diffusion"),
        )  # fmt: skip
    settings = {"components": before.components, **words, "learnt_from": Path(source).name}
    fitted = replace(
        before, kind="diffusion", denoiser=denoiser, seed=seed, settings=settings,
        **baselines(opened, before.trained, before.latents),
    )  # fmt: skip
    report = _reported(opened, fitted, target, losses, denoiser.parameters, kept, source)
    if fitted.held_out and opened.conditions is not None:
        report.left = _left_by_conditions(fitted, opened)
    return _ended(report, fitted, kept, target, processes, device, began, force=force)


def _named_latents(name: str | os.PathLike[str], space: Space, components: int | None) -> tuple[Fitted, str]:
    """The PCA or VAE of a file, and which. Raises WeightopsError where it is of another space, or is diffusion."""
    if components is not None:
        what = f"found {components:,}, but --latents-of brings its own"
        raise UsageError("--components", what, "leave it out, or use --latents-of pca")
    path = os.fspath(space.folder / "vae.safetensors" if os.fspath(name) == "vae" else name)
    if os.fspath(name) == "vae" and not os.path.exists(path):  # noqa: PTH110 - a label
        raise UsageError("--latents-of", f"{path} is not there", f"weightops synth fit vae {space.label} makes it")
    found = load_fitted(path, space)
    if found.kind == "diffusion":
        raise MismatchError(path, "is of the kind diffusion, expected pca or vae: diffusion has no latents of its own")
    return found, path


# ------------------------------------------------------------------------------------------------ what is told


def _left_by_vae(fitted: Fitted, coefficients: Tensor, whole: float, latents: int) -> dict[str, float]:
    """Of the members' squared distance `whole`, what is left by the VAE, and by as many components."""
    assert fitted.vae is not None
    outside = whole - float(coefficients.double().square().sum())
    made = fitted.vae.decode(fitted.vae.encode(coefficients))
    missed = float((made - coefficients).double().square().sum())
    beyond = float(coefficients[:, latents:].double().square().sum())
    return {"vae": (outside + missed) / whole, "pca": (outside + beyond) / whole} if whole > 0 else {}


def _left_by_conditions(fitted: Fitted, space: Space) -> dict[str, float]:
    """Of the held-out latents' squared distance from the trained mean, what each way from a condition leaves."""
    assert space.conditions is not None
    assert fitted.denoiser is not None
    assert fitted.ridge is not None
    assert fitted.nearest is not None
    coefficients, _ = distances_of(fitted, space, fitted.held_out)
    latents = coefficients if fitted.vae is None else fitted.vae.encode(coefficients)
    asked = space.conditions[list(fitted.held_out)]
    whole = float((latents - fitted.latents.mean(0)).square().sum())
    found = {
        "diffusion": fitted.denoiser.sample(len(asked), asked, seed=fitted.seed),
        "ridge": fitted.ridge.predict(asked),
        "nearest": fitted.latents[fitted.nearest.nearest(asked)],
    }
    return {name: float((made - latents).square().sum()) / whole for name, made in found.items()} if whole > 0 else {}


def _reported(
    space: Space, fitted: Fitted, target: Path, losses: dict[str, float], parameters: int, kept: KeptDescent,
    source: str,
) -> LearnReport:  # fmt: skip
    return LearnReport(
        fitted.kind, space.label, str(target), fitted.geometry, space.form, len(space), len(fitted.trained),
        len(fitted.held_out), space.width, fitted.components, source, fitted.size, parameters,
        kept.step, losses, {}, None if fitted.ridge is None else fitted.ridge.left_out, fitted.seed,
        dict(fitted.settings), resumed_at=kept.resumed_at, warnings=list(kept.warnings),
    )  # fmt: skip


def _ended(
    report: LearnReport, fitted: Fitted, kept: KeptDescent, target: Path, processes: Processes, device: str,
    began: float, *, force: bool,
) -> LearnReport:  # fmt: skip
    """The file is written by the first of the processes, and what was kept on the way goes."""
    if processes.is_main:
        report.bytes_written = fitted.save(target, force=force)
        kept.remove()
    processes.wait()
    report.processes, report.process, report.device = processes.count, processes.index, device
    report.peak_memory_bytes, report.seconds = peak_memory_bytes(), time.perf_counter() - began
    return report
