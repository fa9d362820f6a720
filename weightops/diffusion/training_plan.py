"""What a run would train, from a model's header alone: modules, parameters, and the memory that is known beforehand."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightops.diffusion.encoding import ENCODINGS
from weightops.diffusion.lora_modules import TARGETS, TEXT_TARGETS, Module, Shape, choose_modules
from weightops.errors import UsageError
from weightops.files.checkpoint import open_checkpoint
from weightops.naming.identify import identify
from weightops.naming.recognise import canonical_shapes
from weightops.ops.merge import read_recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightops.diffusion.training_words import Words
    from weightops.files.checkpoint import Checkpoint

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# In float32: the parameter, its gradient, and two running means of AdamW.
_TRAINED = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """modules: by component. nbytes_frozen: all of the model's weights in their dtype; nbytes_trained: of the LoRA,
    its gradients and the two means that AdamW keeps. What a step computes in between comes on top."""

    architecture: str
    targets: tuple[str, ...]
    modules: Mapping[str, tuple[Module, ...]]
    parameters: int
    nbytes_frozen: int
    nbytes_trained: int

    @property
    def count(self) -> int:
        return sum(len(modules) for modules in self.modules.values())


def lora_shape(words: Words, architecture: str) -> Shape:
    """What the LoRA is to be like on a model of this architecture."""
    assert words.rank is not None
    assert words.alpha is not None
    return Shape(
        words.targets or TARGETS[architecture], words.rank, words.alpha, words.conv_rank, words.conv_alpha,
        words.dora, words.init,
    )  # fmt: skip


def text_shape(shape: Shape) -> Shape:
    """Of the text encoders: the same in their attention."""
    return Shape(TEXT_TARGETS, shape.rank, shape.alpha, None, None, shape.dora, shape.init)


def plan_training(model: str, words: Words) -> Plan:
    """What would be trained of a file, a folder, a repository or a recipe: of this the model whose sizes it takes.

    Raises UsageError, and whatever opening does.
    """
    file = read_recipe(model).like.file if model.lower().endswith((".yaml", ".yml")) else model
    with open_checkpoint(file) as opened:
        sizes, architecture, values = _sizes(opened)
    if architecture not in ENCODINGS:
        found = f"its architecture is {architecture}" if architecture else "its architecture is not known"
        raise UsageError(os.fspath(model), f"{found}, expected one of {', '.join(ENCODINGS)}")
    encoding = ENCODINGS[architecture]
    shape = lora_shape(words, architecture)
    wanted = {encoding.denoiser: shape}
    if words.train_text_encoder:
        wanted |= dict.fromkeys(encoding.text_encoders, text_shape(shape))
    found_modules = {
        name: tuple(choose_modules(sizes[name], of_part, network=name))
        for name, of_part in wanted.items()
        if name in sizes
    }
    parameters = sum(m.parameters(dora=words.dora) for part in found_modules.values() for m in part)
    frozen = values * _BYTES.get(words.dtype, 4)
    return Plan(architecture, shape.targets, found_modules, parameters, frozen, parameters * _TRAINED)


def _sizes(opened: Checkpoint) -> tuple[dict[str, dict[str, tuple[int, ...]]], str, int]:
    """The weights of two axes or four, by component and diffusers' name; the architecture; how many values in all."""
    identity = identify(opened.tensors)
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, part in identity.parts.items():
        if part.match is None or name == "ema":
            continue
        shapes = {body: opened.tensors[key].spec.shape for key, body in part.bodies.items()}
        claims = {body: claim for body in shapes if (claim := part.match.table.claim(body)) is not None}
        found[name] = {
            key.removesuffix(".weight"): shape
            for key, shape in canonical_shapes(claims, shapes)
            if shape is not None and key.endswith(".weight") and len(shape) in (2, 4)
        }
    values = sum(info.spec.values for info in opened.tensors.values())
    return found, identity.architecture or "", values
