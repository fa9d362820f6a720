"""A variational autoencoder of PCA coefficients, linear or an MLP: few latents for many coefficients, and back.

It sees coefficients divided by ONE number, so that their geometry stays: over an orthonormal basis, squared errors of
coefficients are those of rows. Knows no file and no LoRA.

The loss of a member is  1/2 Σ_k (c_k − ĉ_k)² / s² + β · 1/2 Σ_m (μ_m² + σ_m² − log σ_m² − 1):  the sum over all
coefficients of squared errors in units of s², their mean variance (one number), and the KL divergence from N(0, I),
summed over latents. So β = 1 is the evidence bound of a decoder whose noise has the variance s², and of a linear VAE
the axes with less variance than β·s² vanish (Lucas et al. 2019, arXiv:1911.02469). Both sums are of one member; the
loss of a step is their mean over members. Source: Kingma & Welling 2013, arXiv:1312.6114; Higgins et al. 2017 (β).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.errors import FormatError, UsageError, ValueRefused, quote
from weightops.synthesis.descent import Pace, descend, kept, length, normal, starting

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from weightops.diffusion.processes import Processes
    from weightops.synthesis.descent import State, Weights

LAYERS = ("linear", "mlp")
_STEPS = 800
_RATES = {"linear": 1e-2, "mlp": 1e-3}
PARTS = ("loss", "reconstruction", "kl")
# The two maps of the MLP, and the random numbers that each begins with.
_MAPS = ("encoder", "decoder")
# Latents whose deviation would be less than this say nothing; a logarithm beyond it would leave float32.
_LOGARITHMS = (-16.0, 8.0)


@dataclass(frozen=True, slots=True)
class Vae:
    """Weights by name, float32; layers: "linear" or "mlp"; scale: the one number that coefficients are divided by.

    means, deviations: [m], of the latents of what it was trained on; the prior is N(0, I).
    """

    layers: str
    scale: float
    weights: Mapping[str, Tensor]
    means: Tensor
    deviations: Tensor

    @property
    def latents(self) -> int:
        return len(self.means)

    @property
    def components(self) -> int:
        return self.weights["encoder.straight"].shape[0]

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.weights.values())

    def encode(self, coefficients: Tensor) -> Tensor:
        """The latents' means [..., m] of coefficients [..., k]."""
        return encoded(self.weights, coefficients / self.scale)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """The coefficients [..., k] of latents [..., m]; differentiable."""
        return decoded(self.weights, latents) * self.scale

    def tensors(self) -> dict[str, Tensor]:
        """For a file."""
        return {**self.weights, "means": self.means, "deviations": self.deviations}

    def settings(self) -> dict[str, Any]:
        """For a file's metadata."""
        return {"layers": self.layers, "scale": self.scale}

    @staticmethod
    def of(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], *, where: str = "vae") -> Vae:
        """What `tensors` and `settings` gave. Raises FormatError where they are not of one VAE."""
        try:
            layers, scale = settings["layers"], float(settings["scale"])
            if layers not in LAYERS or not 0 < scale < math.inf:
                raise ValueError(f"its layers are {quote(layers)}, its scale {scale:g}")
            means, deviations = tensors["means"], tensors["deviations"]
            components, m = tensors["encoder.straight"].shape
            hidden = tensors["encoder.in"].shape[1] if layers == "mlp" else 0
            shapes = shapes_of(layers, components, m, hidden)
        except (KeyError, ValueError, IndexError, TypeError) as e:
            raise FormatError(where, f"is no whole VAE: {e}") from None
        for name, shape in {**shapes, "means": (m,), "deviations": (m,)}.items():
            found = tuple(tensors[name].shape) if name in tensors else None
            if found != shape:
                raise FormatError(where, f"holds {quote(name)} as {found}, but this VAE needs {shape}")
        return Vae(layers, scale, {name: tensors[name] for name in shapes}, means, deviations)


def shapes_of(layers: str, components: int, latents: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """The weights' names and shapes."""
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.straight": (components, latents),
        "encoder.bias": (latents,),
        "encoder.logarithms": (latents,),
        "decoder.straight": (latents, components),
        "decoder.bias": (components,),
    }
    if layers == "mlp":
        for name, width, outputs in (("encoder", components, 2 * latents), ("decoder", latents, components)):
            shapes[f"{name}.in"] = (width, hidden)
            shapes[f"{name}.in-bias"] = (hidden,)
            shapes[f"{name}.middle"] = (hidden, hidden)
            shapes[f"{name}.middle-bias"] = (hidden,)
            shapes[f"{name}.out"] = (hidden, outputs)
    return shapes


def encoded(weights: Mapping[str, Tensor], scaled: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Means and logarithms of variances, each [..., m], of scaled coefficients [..., k]; kept: [..., 2 hidden]."""
    means = scaled @ weights["encoder.straight"] + weights["encoder.bias"]
    logarithms = weights["encoder.logarithms"].expand_as(means)
    if "encoder.out" in weights:
        more, spread = _bent(weights, "encoder", scaled, kept).chunk(2, dim=-1)
        means, logarithms = means + more, logarithms + spread
    return means, logarithms.clamp(*_LOGARITHMS)


def decoded(weights: Mapping[str, Tensor], latents: Tensor, kept: Tensor | None = None) -> Tensor:
    """Scaled coefficients [..., k] of latents [..., m]; kept: [..., 2 hidden]."""
    straight = latents @ weights["decoder.straight"] + weights["decoder.bias"]
    return straight + _bent(weights, "decoder", latents, kept) if "decoder.out" in weights else straight


def _bent(weights: Mapping[str, Tensor], name: str, x: Tensor, kept: Tensor | None) -> Tensor:
    """What the MLP adds to the straight map: two hidden layers, the second beside a way around it."""
    from torch.nn.functional import silu

    hidden = weights[f"{name}.middle"].shape[0]
    first = silu(x @ weights[f"{name}.in"] + weights[f"{name}.in-bias"])
    first = first if kept is None else first * kept[:, :hidden]
    second = first + silu(first @ weights[f"{name}.middle"] + weights[f"{name}.middle-bias"])
    return (second if kept is None else second * kept[:, hidden:]) @ weights[f"{name}.out"]


def losses(
    weights: Mapping[str, Tensor], scaled: Tensor, noise: Tensor, beta: float, kept: Tensor | None = None
) -> Tensor:
    """The loss and its two parts, [3], summed over members [b, k]; noise: [b, m]; kept: [b, 4 hidden], of dropout."""
    import torch

    in_encoder, in_decoder = (None, None) if kept is None else kept.chunk(2, dim=-1)
    means, logarithms = encoded(weights, scaled, in_encoder)
    found = decoded(weights, means + noise * (0.5 * logarithms).exp(), in_decoder)
    reconstruction = 0.5 * (found - scaled).square().sum()
    kl = 0.5 * (means.square() + logarithms.exp() - logarithms - 1).sum()
    return torch.stack([reconstruction + beta * kl, reconstruction, kl])


def made_vae(
    coefficients: Tensor,
    *,
    latents: int = 64,
    hidden: int = 256,
    layers: str = "mlp",
    beta: float = 0.01,
    dropout: float = 0.5,
    steps: int | None = None,
    lr: float | None = None,
    batch: int = 64,
    weight_decay: float = 0.01,
    average: float = 0.99,
    seed: int = 0,
    where: str = "vae",
    device: str = "cpu",
    processes: Processes | None = None,
    state: State | None = None,
    keep: Callable[[State], None] | None = None,
    on_progress: Callable[[int, int, float | None], None] | None = None,
) -> tuple[Vae, dict[str, float]]:
    """A VAE of coefficients [n, k], and the running means of its losses at the end.

    It begins at the data's own first axes, each of variance 1; what the MLP adds to that begins as nothing. steps: 800
    if nothing is said, or thirty times each member if that is more. lr: 0.01 of a linear one, 0.001 of an MLP. dropout:
    of the MLP's hidden numbers, without which it learns few members by heart. average: of the weights' running mean,
    which is kept. The rest is `descend`'s.
    Raises UsageError, ValueRefused.
    """
    import torch

    n, components = coefficients.shape
    if layers not in LAYERS:
        raise UsageError("--layers", f"found {quote(layers)}, expected {' or '.join(LAYERS)}")
    if not 1 <= latents <= components:
        what = f"found {latents:,}, expected 1 to {components:,}: the coefficients that there are"
        raise UsageError("--latents", what)
    if hidden < 1:
        raise UsageError("--hidden", f"found {hidden}, expected a whole number, 1 or more")
    if not 0 <= beta < math.inf:
        raise UsageError("--beta", f"found {beta:g}, expected 0 or more")
    if not 0 <= dropout < 1:
        raise UsageError("--dropout", f"found {dropout:g}, expected 0 or more, and less than 1")
    rate = _RATES[layers] if lr is None else lr
    pace = Pace(length(steps, n, batch, least=_STEPS), rate, batch, weight_decay, average, seed).check()
    coefficients = coefficients.to(torch.float32)
    scale = _scale(coefficients, where)
    scaled = coefficients / scale
    start = _start(layers, scaled, latents, hidden, seed)
    there = scaled.to(device)

    size = min(n, batch)
    width, drop = (4 * hidden, dropout) if layers == "mlp" else (0, 0.0)

    def loss(weights: Weights, members: Tensor, slots: slice, step: int) -> Tensor:
        noise = normal(seed, step, slots, latents, batch=size).to(device)
        factors = kept(seed, step, slots, width, batch=size, drop=drop)
        return losses(weights, there[members], noise, beta, None if factors is None else factors.to(device))

    weights, found = descend(
        loss, start, n, pace, parts=PARTS, where=where, device=device, processes=processes, state=state, keep=keep,
        on_progress=on_progress,
    )  # fmt: skip
    means = encoded(weights, scaled)[0]
    return Vae(layers, scale, weights, means.mean(0), means.std(0, correction=0)), found


def _scale(coefficients: Tensor, where: str) -> float:
    """The root of the coefficients' mean variance. Raises ValueRefused where that is no number to divide by."""
    if len(coefficients) < 2:
        raise ValueRefused(where, f"found {len(coefficients)} members, expected 2 or more")
    found = float(coefficients.double().var(0, correction=0).mean().sqrt())
    if not 0 < found < math.inf:
        raise ValueRefused(where, f"the coefficients' deviation is {found}, expected a number above 0")
    return found


def _start(layers: str, scaled: Tensor, latents: int, hidden: int, seed: int) -> Weights:
    """The data's first axes: a VAE learns these first, and slowly."""
    import torch

    zero = frozenset(f"{name}.out" for name in _MAPS)
    weights = starting(shapes_of(layers, scaled.shape[1], latents, hidden), seed, zero=zero)
    mean = scaled.double().mean(0)
    _, values, axes = torch.linalg.svd(scaled.double() - mean, full_matrices=True)
    # An axis and its opposite are as good: rounding, as of another number of processes, is not to choose between them.
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = axes * largest.sign()
    deviations = torch.ones(latents, dtype=torch.float64)
    known = min(latents, len(values))
    # An axis without variance stays as it is: nothing would be divided by.
    small = 1e-3
    deviations[:known] = (values[:known] / math.sqrt(len(scaled))).clamp_min(small)
    straight = axes[:latents].T / deviations
    weights["encoder.straight"] = straight.float()
    weights["encoder.bias"] = -(mean @ straight).float()
    weights["encoder.logarithms"] = torch.full((latents,), -3.0)
    weights["decoder.straight"] = (deviations[:, None] * axes[:latents]).float()
    weights["decoder.bias"] = mean.float()
    return weights
