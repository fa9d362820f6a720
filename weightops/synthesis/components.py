"""The components that a network learns from: a file's, where they are of the same members, or made anew.

Also how far members are from the trained mean, and what the components catch of that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weightops.errors import UsageError, WeightopsError, quote
from weightops.synthesis.fit import check_enough, made_pca
from weightops.synthesis.fitted import GEOMETRIES, load_fitted
from weightops.synthesis.gauge import delta_norms
from weightops.synthesis.gram import products_with

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from weightops.diffusion.processes import Processes
    from weightops.synthesis.fitted import Fitted
    from weightops.synthesis.gram import DeltaPca
    from weightops.synthesis.space import Space
    from weightops.synthesis.sweep import Tick

MADE = "made here"


def components_for(
    space: Space,
    trained: Sequence[int],
    held_out: Sequence[int],
    components: int,
    *,
    seed: int,
    geometry: str,
    exact: bool,
    device: str,
    memory: int,
    processes: Processes,
    on_progress: Tick,
) -> tuple[Fitted, str]:
    """A Fitted of kind "pca", and the file that it is of, or "made here".

    The space's pca.safetensors is taken where it is of this space and these members, and has enough components. exact:
    so many of them, and not all that it has. Raises WeightopsError.
    """
    if components < 1:
        raise UsageError("--components", f"found {components}, expected a whole number, 1 or more")
    if geometry not in GEOMETRIES:
        raise UsageError("--geometry", f"found {quote(geometry)}, expected {' or '.join(GEOMETRIES)}")
    check_enough(space, trained, components)
    path = space.folder / "pca.safetensors"
    try:
        found = load_fitted(path, space) if path.is_file() else None
    except WeightopsError:  # of another space, or damaged: it is nothing to take from, and nothing is written there
        found = None
    if found is not None and found.kind == "pca" and found.geometry == geometry:
        same = found.trained == tuple(trained) and found.held_out == tuple(held_out)
        if same and found.components >= components:
            return (first_of(found, components) if exact else found), str(path)
    made, _ = made_pca(
        space, trained, held_out, components=components, seed=seed, geometry=geometry, device=device, memory=memory,
        processes=processes, on_progress=on_progress,
    )  # fmt: skip
    return made, MADE


def first_of(fitted: Fitted, components: int) -> Fitted:
    """The same PCA with its first components alone. Its baselines are of all, and left out."""
    k = components
    axes: dict[str, Any] = {}
    if fitted.pca is not None:
        pca = fitted.pca
        axes["pca"] = replace(pca, basis=pca.basis[:k].contiguous(), deviations=pca.deviations[:k].contiguous())
    if fitted.delta is not None:
        delta = fitted.delta
        parts = {name: getattr(delta, name)[..., :k].contiguous() for name in ("weights", "own", "offsets")}
        axes["delta"] = replace(delta, **parts, deviations=delta.deviations[:k].contiguous())
    return replace(fitted, latents=fitted.latents[:, :k].contiguous(), ridge=None, nearest=None, **axes)


def distances_of(fitted: Fitted, space: Space, members: Sequence[int]) -> tuple[Tensor, float]:
    """The members' coefficients [n, k], float32, and the sum of their squared distances from the trained mean.

    Of rows in the geometry of rows, of ΔW in that of ΔW.
    """
    import torch

    parts, whole = [], 0.0
    square = _square_of_mean(fitted.delta, space) if fitted.delta is not None else 0.0
    for _, rows in space.blocks(list(members)):
        if fitted.pca is not None:
            apart = rows - fitted.pca.mean
            parts.append(apart @ fitted.pca.basis.mT)
            whole += float(torch.linalg.vector_norm(apart, dtype=torch.float64).square())
        else:
            assert fitted.delta is not None
            factors = space.layout.unflatten(rows)
            products = products_with(factors, space, fitted.delta.members)
            parts.append((products @ fitted.delta.weights - fitted.delta.offsets).float())
            whole += float((delta_norms(factors).square() - 2 * products.mean(1) + square).sum())
    return torch.cat(parts), whole


def _square_of_mean(delta: DeltaPca, space: Space) -> float:
    """‖mean ΔW‖² of the trained members: what their mean square has beyond their variance."""
    n, total = len(delta.members), 0.0
    for _, rows in space.blocks(list(delta.members)):
        total += float(delta_norms(space.layout.unflatten(rows)).square().sum())
    return total / n - delta.total * (n - 1) / n
