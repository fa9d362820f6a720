"""Many LoRAs at once on one network: each part of a batch goes through its own, and the weights stay as they are.

Knows modules and factors; not what is trained or measured with them.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

from weightops.errors import MismatchError, quote

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import Tensor, nn

    from weightops.synthesis.layout import Factors, Layout, Module


class Stacked:
    """Forward hooks on the layout's modules, linear ones and convolutions, by which a module answers W·x + up·down·x.

    A batch has L·b samples: sample i goes through LoRA i // b. Gradients flow to the factors as to any tensor; weights
    and buffers of the networks are not touched, and `close` (or the end of a `with`) takes the hooks away.
    """

    def __init__(
        self, networks: Mapping[str, nn.Module], layout: Layout, *, device: torch.device | str | None = None
    ) -> None:
        """networks: by component. device: of the factors, None: of each module's weight. Raises MismatchError."""
        self._layout = layout
        self._device = device
        found = [_module_of(networks, module) for module in layout.modules]
        self._factors: list[tuple[Tensor, Tensor] | None] = [None] * len(found)
        self._strength = 1.0
        self._places = [module.weight.device for module in found]
        self._handles = [module.register_forward_hook(self._hook(n)) for n, module in enumerate(found)]

    def put(self, factors: Factors | None, strength: float = 1.0) -> None:
        """These LoRAs from now on: for each module up [L, out, r] and down [L, r, n]; None: none at all.

        Of the rank that they have, which may be another than the layout's. Raises ValueError for other shapes.
        """
        if factors is None:
            self._factors = [None] * len(self._places)
            return
        modules = self._layout.modules
        if len(factors) != len(modules):
            raise ValueError(f"factors of {len(factors)} modules, expected {len(modules)}")
        stacked = {len(up) for up, _ in factors} | {len(down) for _, down in factors}
        for module, (up, down) in zip(modules, factors, strict=True):
            out, n = module.shape[0], math.prod(module.shape[1:])
            if up.ndim != 3 or down.ndim != 3 or (up.shape[1], *down.shape[1:]) != (out, up.shape[2], n):
                found = f"found up {list(up.shape)}, down {list(down.shape)}, expected [L, {out}, r], [L, r, {n}]"
                raise ValueError(f"{module.component}.{module.name}: {found}")
        if len(stacked) != 1:
            raise ValueError(f"factors of {sorted(stacked)} LoRAs, expected one number for all modules")
        self._strength = float(strength)
        devices = self._places if self._device is None else [self._device] * len(self._places)
        self._factors = [(up.to(d), down.to(d)) for (up, down), d in zip(factors, devices, strict=True)]

    def close(self) -> None:
        """The networks are again what they were."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.put(None)

    def __enter__(self) -> Stacked:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hook(self, place: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            pair = self._factors[place]
            if pair is None or self._strength == 0:
                return None
            up, down = (factor.to(output.dtype) for factor in pair)
            if len(output) % len(up):
                raise ValueError(f"a batch of {len(output)} cannot be shared out to {len(up)} LoRAs")
            change = _linear if module.weight.ndim == 2 else _convolution
            return change(module, inputs[0].to(output.dtype), output, up, down, self._strength)

        return add


def _linear(module: Any, inputs: Tensor, output: Tensor, up: Tensor, down: Tensor, strength: float) -> Tensor:
    """output [L·b, …, out] + strength · inputs [L·b, …, in] through down and up."""
    import torch

    count = len(up)
    hidden = torch.bmm(inputs.reshape(count, -1, inputs.shape[-1]), down.mT)
    whole = torch.baddbmm(output.reshape(count, -1, output.shape[-1]), hidden, up.mT, alpha=strength)
    return whole.reshape(output.shape)


def _convolution(module: Any, inputs: Tensor, output: Tensor, up: Tensor, down: Tensor, strength: float) -> Tensor:
    """output [L·b, out, …] + strength · inputs [L·b, in, …] through down, as the module goes over them, and up."""
    import torch

    count, rank = down.shape[:2]
    if math.prod(module.kernel_size) == 1 and math.prod(module.stride) == 1 and not _padded(module):
        hidden = torch.matmul(down[:, None], inputs.reshape(count, -1, inputs.shape[1], inputs[0, 0].numel()))
    else:
        kernel = down.reshape(count * rank, *module.weight.shape[1:])
        convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[module.weight.ndim - 3]
        # LoRAs stand side by side as groups of channels.
        beside = inputs.reshape(count, -1, *inputs.shape[1:]).transpose(0, 1).flatten(1, 2)
        answer = convolve(beside, kernel, None, module.stride, module.padding, module.dilation, count)
        hidden = answer.reshape(len(answer), count, rank, -1).transpose(0, 1)
    added = torch.matmul(up[:, None], hidden)  # [L, b, out, pixels]
    return torch.add(output, added.reshape(output.shape), alpha=strength)


def _padded(module: Any) -> bool:
    return isinstance(module.padding, str) or any(module.padding)


def _module_of(networks: Mapping[str, nn.Module], wanted: Module) -> Any:
    """The module that the layout means. Raises MismatchError."""
    from torch import nn

    network = networks.get(wanted.component)
    if network is None:
        raise MismatchError(wanted.component, f"the model has no such network, which {quote(wanted.name)} is of")
    # transformers ≥ 5.6 calls a CLIP's modules without `text_model.`; files have it.
    for name in (wanted.name, wanted.name.removeprefix("text_model.")):
        with contextlib.suppress(AttributeError):
            found: Any = network.get_submodule(name)
            break
    else:
        raise MismatchError(wanted.component, f"the model has no module {quote(wanted.name)}")
    if not isinstance(found, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        what = f"{quote(wanted.name)} is a {type(found).__name__}, which carries no LoRA"
        raise MismatchError(wanted.component, what)
    if tuple(found.weight.shape) != tuple(wanted.shape):
        what = f"{quote(wanted.name)} is {list(found.weight.shape)} in the model, but {list(wanted.shape)} in the LoRAs"
        raise MismatchError(wanted.component, what, "they are of another base")
    if not isinstance(found, nn.Linear) and (found.groups != 1 or found.padding_mode != "zeros"):
        raise MismatchError(wanted.component, f"{quote(wanted.name)} is a convolution in groups, or padded otherwise")
    return found
