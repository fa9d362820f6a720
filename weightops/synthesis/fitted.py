"""Fitted: a space as it was learnt, components, autoencoder, denoiser and baselines, as a value and as one file.

The file is a .safetensors with JSON in its metadata. It says for which space it is; what it refuses, it refuses whole.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.errors import FormatError, MismatchError, UsageError, quote
from weightops.synthesis.baselines import Nearest, Ridge
from weightops.synthesis.gram import DeltaPca, cut
from weightops.synthesis.layout import Layout
from weightops.synthesis.pca import Pca
from weightops.synthesis.tensor_file import FORMAT, read_tensors, write_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from torch import Tensor

    from weightops.synthesis.denoiser import Denoiser
    from weightops.synthesis.layout import Factors
    from weightops.synthesis.space import Space
    from weightops.synthesis.vae import Vae

KINDS = ("pca", "vae", "diffusion")
GEOMETRIES = ("rows", "delta")


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """What was learnt of a space, and of which members. kind: "pca", "vae" or "diffusion".

    geometry: "rows" (with `pca`) or "delta" (with `delta`, which needs the space for all that it makes). latents
    [n, m] float32: of the trained members, in their order; of the VAE where there is one, else the coefficients.
    members: how many the space had. space: where it is open; it is not part of the file.
    """

    kind: str
    geometry: str
    layout: Layout
    form: str
    reference: Tensor | None
    space_digest: str
    members: int
    trained: tuple[int, ...]
    trained_names: tuple[str, ...]
    held_out: tuple[int, ...]
    held_out_names: tuple[str, ...]
    latents: Tensor
    pca: Pca | None = None
    delta: DeltaPca | None = None
    vae: Vae | None = None
    denoiser: Denoiser | None = None
    ridge: Ridge | None = None
    nearest: Nearest | None = None
    condition_names: tuple[str, ...] = ()
    condition_source: Mapping[str, Any] | None = None
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    space: Space | None = None
    label: str = "the fitted model"

    # -------------------------------------------------------------------------------------------- numbers of it

    @property
    def size(self) -> int:
        """Latents of one LoRA."""
        return self.latents.shape[1]

    @property
    def components(self) -> int:
        """Coefficients of one LoRA, from which the latents are made."""
        return self._axes.components

    @property
    def explained(self) -> Tensor:
        """The share of the training members' variance that the first 1, 2, … components have [k]."""
        return self._axes.explained

    @property
    def _axes(self) -> Pca | DeltaPca:
        found = self.pca if self.geometry == "rows" else self.delta
        assert found is not None
        return found

    @property
    def numbers(self) -> int:
        """How many numbers a LoRA is made of: those of the basis, or of the members whose sum it is."""
        return self.pca.basis.numel() if self.pca is not None else len(self.trained) * self.layout.width

    @property
    def latent_mean(self) -> Tensor:
        """Of the trained members' latents [m]."""
        return self.latents.mean(0)

    @property
    def latent_deviation(self) -> Tensor:
        """Of the trained members' latents [m]."""
        return self.latents.std(0, correction=0)

    @property
    def condition_mean(self) -> np.ndarray | None:
        return None if self.nearest is None else self.nearest.standard.mean

    @property
    def condition_std(self) -> np.ndarray | None:
        return None if self.nearest is None else self.nearest.standard.deviation

    # -------------------------------------------------------------------------------------------- there and back

    def coefficients_of(self, rows: Tensor, space: Space | None = None) -> Tensor:
        """The coefficients [n, k] of rows [n, d] of the space, float32."""
        if self.pca is not None:
            return self.pca.coefficients(rows)
        assert self.delta is not None
        return self.delta.coefficients(self.layout.unflatten(rows), self._needed(space)).float()

    def latents_of(self, rows: Tensor, space: Space | None = None) -> Tensor:
        """The latents [n, m] of rows [n, d] of the space, float32."""
        found = self.coefficients_of(rows, space)
        return found if self.vae is None else self.vae.encode(found)

    def decoded(self, latents: Tensor) -> Tensor:
        """The coefficients [..., k] of latents [..., m]; differentiable."""
        return latents if self.vae is None else self.vae.decode(latents)

    def rows_of(self, latents: Tensor, space: Space | None = None) -> Tensor:
        """The rows [..., d] of latents [..., m], float32; in the geometry of rows differentiable.

        In that of ΔW: the canonical rows of the changes, cut to the space's ranks.
        """
        if self.pca is not None:
            return self.pca.rows(self.decoded(latents))
        found = self._needed(space)
        ranks = [module.rank for module in self.layout.modules]
        factors = self._delta_factors(latents, found, ranks)
        return found.canonical(_as_wide(factors, ranks)).float()

    def factors_of(
        self, latents: Tensor, space: Space | None = None, rank: int | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """The factors [..., out, r] of latents [..., m], float32; differentiable in the geometry of rows without rank.

        rank: cut to it, each module at its best. None: rows have the space's ranks, and changes are exact, of the
        ranks that they take.
        """
        if self.pca is None:
            return self._delta_factors(latents, self._needed(space), rank)
        found = self.layout.unflatten(self.rows_of(latents))
        return found if rank is None else cut(found, [min(rank, m.out, m.n) for m in self.layout.modules])

    def _delta_factors(
        self, latents: Tensor, space: Space, rank: int | Sequence[int] | None
    ) -> list[tuple[Tensor, Tensor]]:
        assert self.delta is not None
        return self.delta.factors(self.decoded(latents), space, rank)

    # -------------------------------------------------------------------------------------------- its space

    def _needed(self, space: Space | None) -> Space:
        found = space if space is not None else self.space
        if found is None:
            what = "is learnt from ΔW, so that its components are sums of the space's LoRAs, and needs the space"
            raise UsageError(self.label, what, "name the space's folder beside it")
        if found is not self.space:
            self.check_space(found)
        return found

    def check_space(self, space: Space) -> None:
        """Raises MismatchError for another space than that of which this was learnt; it may have grown since."""
        if len(space) < self.members or space.digest_of(self.members) != self.space_digest:
            what = f"was learnt from another space than {space.label}, of {self.members:,} LoRAs with the digest "
            what += f"{self.space_digest[:12]}…; {space.label} has {len(space):,}"
            raise MismatchError(self.label, what, "fit it again on this space")

    def with_space(self, space: Space) -> Fitted:
        """The same, with its space open, which knows where its conditions' embedder is. Raises MismatchError."""
        self.check_space(space)
        source = self.condition_source
        if source is not None and source == _without_place(space.condition_source):
            source = space.condition_source
        return replace(self, space=space, condition_source=source)

    # -------------------------------------------------------------------------------------------- as a file

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> int:
        """Write it to a file, which appears whole or not at all; the bytes that it has. Raises OutputError."""
        tensors, parts = self._parts()
        said = {
            "format": FORMAT, "kind": self.kind, "geometry": self.geometry, "form": self.form,
            "layout": self.layout.to_json(), "space": self.space_digest, "members": self.members,
            "trained_names": self.trained_names, "held_out_names": self.held_out_names,
            "condition_names": self.condition_names, "condition_source": _without_place(self.condition_source),
            "seed": self.seed,
            "settings": dict(self.settings), "parts": parts,
        }  # fmt: skip
        return write_tensors(path, tensors, said, force=force)

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
        import torch

        tensors = {
            "trained": torch.tensor(self.trained, dtype=torch.int64),
            "held_out": torch.tensor(self.held_out, dtype=torch.int64), "latents": self.latents,
        }  # fmt: skip
        if self.reference is not None:
            tensors["reference"] = self.reference
        parts: dict[str, dict[str, Any]] = {}
        for name in _PARTS:
            part = getattr(self, name)
            if part is not None:
                tensors |= {f"{name}.{key}": tensor for key, tensor in part.tensors().items()}
                parts[name] = part.settings()
        return tensors, parts


def _without_place(source: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What made the conditions, without where it is: a fitted model goes to other machines."""
    return None if source is None else {key: value for key, value in source.items() if key != "embedder"}


_PARTS = ("pca", "delta", "vae", "denoiser", "ridge", "nearest")


def _as_wide(factors: Factors, ranks: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Factors with exactly so many ranks: those that are not there are zero."""
    from torch.nn.functional import pad

    return [
        (pad(up, (0, rank - up.shape[-1])), pad(down, (0, 0, 0, rank - down.shape[-2])))
        for (up, down), rank in zip(factors, ranks, strict=True)
    ]


def load_fitted(path: str | os.PathLike[str], space: Space | None = None) -> Fitted:
    """What `save` wrote. space: the one that it must be of.

    Raises UsageError, FormatError, ValueRefused for NaN or Inf, MismatchError for another space.
    """
    label = os.fspath(path)
    if Path(label).is_dir():
        raise UsageError(label, "is a folder, expected a file that weightops synth fit wrote")
    tensors, said = read_tensors(label)
    if said.get("kind") not in KINDS or said.get("geometry") not in GEOMETRIES:
        raise FormatError(label, f"is of the kind {quote(said.get('kind'))}, expected {', '.join(KINDS)}")
    layout = Layout.of_json(said.get("layout"), label)
    try:
        parts = {
            name: _part(name, settings, _under(tensors, name), label) for name, settings in said["parts"].items()
        }  # fmt: skip
        made = Fitted(
            said["kind"], said["geometry"], layout, str(said["form"]), tensors.get("reference"), str(said["space"]),
            int(said["members"]), tuple(tensors["trained"].tolist()), tuple(said["trained_names"]),
            tuple(tensors["held_out"].tolist()), tuple(said["held_out_names"]), tensors["latents"],
            condition_names=tuple(said["condition_names"]), condition_source=said["condition_source"],
            seed=int(said["seed"]), settings=said["settings"], label=label, **parts,
        )  # fmt: skip
        _check_parts(made)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as e:
        what = f"is no whole fitted model: {type(e).__name__} {quote(str(e))}"
        raise FormatError(label, what, "fit it again with weightops synth fit") from None
    return made if space is None else made.with_space(space)


def _part(name: str, settings: Mapping[str, Any], tensors: dict[str, Tensor], label: str) -> Any:
    if name == "pca":
        return Pca.of(tensors, settings)
    if name == "delta":
        return DeltaPca.of(tensors, settings)
    if name == "ridge":
        return Ridge.of(tensors, settings, where=label)
    if name == "nearest":
        return Nearest.of(tensors, settings, where=label)
    if name == "vae":
        from weightops.synthesis.vae import Vae

        return Vae.of(tensors, settings, where=label)
    if name == "denoiser":
        from weightops.synthesis.denoiser import Denoiser

        return Denoiser.of(tensors, settings, where=label)
    raise ValueError(f"an unknown part {name}")


def _under(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    start = f"{name}."
    return {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}


def _check_parts(made: Fitted) -> None:
    """Raises ValueError where the parts do not fit together."""
    if (made.pca is not None) != (made.geometry == "rows") or (made.delta is not None) != (made.geometry == "delta"):
        raise ValueError(f"the geometry {made.geometry} lacks its components")
    if made.form == "aligned" and (made.reference is None or made.reference.shape != (made.layout.width,)):
        raise ValueError("rows that are aligned, and no reference of as many features")
    if not all(0 <= i < made.members for i in (*made.trained, *made.held_out)):
        raise ValueError(f"members beyond the {made.members}")
    if made.pca is not None and made.pca.mean.shape != (made.layout.width,):
        raise ValueError(f"components of {len(made.pca.mean)} features for {made.layout.width}")
    if (made.kind == "vae" and made.vae is None) or (made.kind == "diffusion" and made.denoiser is None):
        raise ValueError(f"the kind {made.kind} lacks its network")
    size = made.vae.latents if made.vae is not None else made.components
    if made.latents.shape != (len(made.trained), size) or len(made.trained_names) != len(made.trained):
        raise ValueError(f"{list(made.latents.shape)} latents of {len(made.trained)} members")
    if made.vae is not None and made.vae.components != made.components:
        raise ValueError(f"a VAE of {made.vae.components} coefficients, and {made.components} components")
    if made.denoiser is not None and len(made.denoiser.means) != size:
        raise ValueError(f"a denoiser of {len(made.denoiser.means)} latents, and {size}")
    if made.ridge is not None and made.ridge.intercept.shape != (size,):
        raise ValueError(f"a ridge regression of {len(made.ridge.intercept)} latents, and {size}")
    for part in (made.ridge, made.nearest):
        if part is not None and len(part.standard.mean) != len(made.condition_names):
            raise ValueError(f"conditions of {len(part.standard.mean)} numbers, and {len(made.condition_names)} names")
    if made.nearest is not None and len(made.nearest.points) != len(made.trained):
        raise ValueError(f"conditions of {len(made.nearest.points)} members, and {len(made.trained)}")
