"""The LoRA that trains: which modules it changes, at what rank and alpha, and its parameters by name. Knows no loop."""

from __future__ import annotations

import difflib
import functools
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.errors import MismatchError, UsageError, listing, quote

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

ADAPTER = "default"

# Attention, as the studies train it: of UNets, and of the transformers of two streams.
_UNET = ("to_q", "to_k", "to_v", "to_out.0")
_TWO_STREAMS = (*_UNET, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TARGETS: Mapping[str, tuple[str, ...]] = {
    "sd15": _UNET,
    "sd2": _UNET,
    "sdxl": _UNET,
    "sd3": _TWO_STREAMS,
    "flux": _TWO_STREAMS,
}
# What --conv-rank adds, as LoCon has it: a UNet's residual blocks, and what halves and doubles their resolution.
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")

INITS = ("gaussian", "kaiming")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a LoRA is like. targets: ends of module names; conv_rank: of kernels larger than 1×1, None: not asked for.

    init: of the down factors, gaussian (N(0, 1/rank)) or kaiming (uniform); up factors begin at zero.
    """

    targets: tuple[str, ...]
    rank: int
    alpha: float
    conv_rank: int | None
    conv_alpha: float | None
    dora: bool
    init: str


@dataclass(frozen=True, slots=True)
class Module:
    """A module that trains. size: of its weight."""

    name: str
    size: tuple[int, ...]
    rank: int
    alpha: float

    @property
    def is_large(self) -> bool:
        """Is it a convolution with a kernel larger than 1×1?"""
        return max(self.size[2:], default=1) > 1

    def parameters(self, *, dora: bool) -> int:
        """How many numbers train: down [rank, in·kernel], up [out, rank], and a magnitude for each output."""
        out, *rest = self.size
        return self.rank * (functools.reduce(int.__mul__, rest) + out) + (out if dora else 0)


# ------------------------------------------------------------------------------------------------ which modules


def choose_modules(sizes: Mapping[str, tuple[int, ...]], shape: Shape, *, network: str) -> list[Module]:
    """The modules among `sizes` (linear layers' and convolutions' names -> sizes of their weights) that are to train.

    Raises UsageError for a target that names none of them.
    """
    targets = dict.fromkeys(shape.targets)
    if shape.conv_rank is not None and not any(
        _is_named(name, targets) and len(size) == 4 for name, size in sizes.items()
    ):
        targets |= dict.fromkeys(CONVOLUTIONS)
    for target in shape.targets:
        if not any(_is_named(name, (target,)) for name in sizes):
            raise _unknown(target, sizes, network)
    found = []
    for name, size in sizes.items():
        if _is_named(name, targets):
            large = len(size) == 4 and max(size[2:]) > 1
            rank = shape.conv_rank if large and shape.conv_rank is not None else shape.rank
            alpha = shape.conv_alpha if large and shape.conv_alpha is not None else shape.alpha
            found.append(Module(name, size, rank, alpha))
    if shape.conv_rank is not None and not any(module.is_large for module in found):
        raise UsageError("--conv-rank", f"found no convolution larger than 1x1 to train in the {network}")
    for option, large in (("--rank", False), ("--rank" if shape.conv_rank is None else "--conv-rank", True)):
        those = [module for module in found if module.is_large == large]
        most = max((min(m.size[0], math.prod(m.size[1:])) for m in those), default=0)
        if those and min(m.rank for m in those) > most:
            what = f"found {those[0].rank:,}, but no module of the {network} that trains can have more than {most:,}"
            raise UsageError(option, what)
    return found


def _is_named(module: str, targets: Mapping[str, Any] | Sequence[str]) -> bool:
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _unknown(target: str, sizes: Mapping[str, Any], network: str) -> UsageError:
    """A target that fits nothing, and names that are near."""
    ends: dict[str, None] = {}
    for name in sizes:
        words = name.split(".")
        for n in range(len(words)):
            # Numbers of blocks say nothing here; one at the end belongs to the name: to_out.0.
            if not any(word.isdecimal() for word in words[n:-1]) and not words[n].isdecimal():
                ends[".".join(words[n:])] = None
    near = difflib.get_close_matches(target, ends, n=3)
    short = sorted(ends, key=lambda name: name.count("."))[:12]
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(short)} …"
    what = f"no linear layer or convolution of the {network} has a name that ends in {quote(target)}"
    return UsageError("--targets", what, hint)


def layers(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """The linear layers and convolutions of a network: name -> size of its weight."""
    from torch import nn

    return {
        name: tuple(module.weight.shape)
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


# ------------------------------------------------------------------------------------------------ attached


@dataclass(frozen=True, slots=True)
class Attached:
    """A network with its LoRA. component: as diffusers' folders call it."""

    component: str
    network: nn.Module
    modules: tuple[Module, ...]


@dataclass(frozen=True, slots=True)
class Lora:
    """All that trains. dora: with magnitudes."""

    parts: tuple[Attached, ...]
    dora: bool

    def named(self) -> Iterator[tuple[str, str, Tensor]]:
        """Component, name in it, and parameter, always in the same order."""
        for part in self.parts:
            for name, parameter in part.network.named_parameters():
                if parameter.requires_grad:
                    yield part.component, name, parameter

    def parameters(self, *components: str) -> list[Tensor]:
        """Those of these components; without any, all."""
        return [p for component, _, p in self.named() if not components or component in components]

    @property
    def count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def modules(self) -> int:
        return sum(len(part.modules) for part in self.parts)

    def state(self) -> dict[str, Tensor]:
        """Copies of the parameters on the CPU, as PEFT names them, each behind its component."""
        from peft import get_peft_model_state_dict

        found = {}
        for part in self.parts:
            of_part = get_peft_model_state_dict(part.network, adapter_name=ADAPTER)
            for name, tensor in of_part.items():
                found[f"{part.component}.{name}"] = tensor.detach().to("cpu", copy=True).contiguous()
        return found

    def load(self, state: Mapping[str, Tensor], *, where: str) -> None:
        """Put a state back, bit for bit. Raises MismatchError."""
        import torch
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        for part in self.parts:
            start = f"{part.component}."
            own = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            there = get_peft_model_state_dict(part.network, adapter_name=ADAPTER)
            strange = sorted(set(own.keys() ^ there.keys()))
            strange += [k for k in own.keys() & there.keys() if own[k].shape != there[k].shape]
            if strange:
                raise MismatchError(where, f"holds another LoRA than is trained: {listing(strange)}")
            set_peft_model_state_dict(part.network, own, adapter_name=ADAPTER)
        found = self.state()
        if not all(torch.equal(found[key], value) for key, value in state.items()):
            raise MismatchError(where, "cannot be put back as it was: its dtype is another")


def attach(pipe: Any, components: Sequence[str], shape: Shape, *, text_encoders: Sequence[str] = (), seed: int) -> Lora:
    """LoRAs into networks of the pipeline, through PEFT, in float32; everything else is frozen.

    The first factors are drawn from `seed`. Raises UsageError for a target that is none.
    """
    import torch

    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    parts = []
    text = Shape(TEXT_TARGETS, shape.rank, shape.alpha, None, None, shape.dora, shape.init)
    wanted = [(name, shape) for name in components] + [(name, text) for name in text_encoders]
    for component, of_part in wanted:
        network = getattr(pipe, component)
        modules = choose_modules(layers(network), of_part, network=component)
        _inject(network, modules, of_part, seed)
        parts.append(Attached(component, network, tuple(modules)))
    made = Lora(tuple(parts), shape.dora)
    check_frozen(pipe, made)
    return made


def _inject(network: nn.Module, modules: Sequence[Module], shape: Shape, seed: int) -> None:
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    others = [m for m in modules if (m.rank, m.alpha) != (shape.rank, shape.alpha)]
    alpha: Any = shape.alpha  # PEFT says int, and takes any number
    config = LoraConfig(
        r=shape.rank, lora_alpha=alpha, target_modules=[m.name for m in modules], use_dora=shape.dora,
        init_lora_weights="gaussian" if shape.init == "gaussian" else True,
        rank_pattern={re.escape(m.name): m.rank for m in others},
        alpha_pattern={re.escape(m.name): m.alpha for m in others},
    )  # fmt: skip
    # Drawn on the CPU, wherever the network lies: the same seed is the same LoRA on each process and each device.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def check_frozen(pipe: Any, lora: Lora) -> None:
    """Gradients are for the LoRA's parameters, all of them, and for nothing else in the pipeline."""
    import torch

    wanted = {
        f"{part.component}.{module.name}.{kind}.{ADAPTER}.weight"
        for part in lora.parts
        for module in part.modules
        for kind in ("lora_A", "lora_B", *(("lora_magnitude_vector",) if lora.dora else ()))
    }
    found = {
        f"{component}.{name}"
        for component, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
        for name, parameter in part.named_parameters()
        if parameter.requires_grad
    }
    if found != wanted:
        raise RuntimeError(f"what trains is not the LoRA alone: {listing(sorted(found ^ wanted))}")
