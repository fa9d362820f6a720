"""What may be merged: plain weights, of one architecture, sampled in one way. Looks at models as wholes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightops.errors import MismatchError, listing, quote
from weightops.naming.identify import MARKER_METADATA, MARKERS, quantised

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightops.files.checkpoint import Checkpoint
    from weightops.naming.identify import Identity
    from weightops.ops.align import Alignment

# What the markers in metadata say of an ordinary model, which the others do not say at all.
_ORDINARY = frozenset({"", "none", "false", "epsilon"})


def check_models(opened: Sequence[Checkpoint], identities: Sequence[Identity], alignment: Alignment) -> None:
    """Refuse what is no plain weights: their numbers can be averaged, but the average means nothing."""
    for model, identity in zip(opened, identities, strict=True):
        if not model.tensors:
            raise MismatchError(model.label, "holds no tensors: nothing to merge")
        if identity.kind == "lora":
            raise MismatchError(
                model.label,
                "is a LoRA: a sum of factors is not the sum of what they do, and merge takes checkpoints",
                "in a recipe, lora: FILE adds one; combine makes one LoRA of several",
            )
        key = quantised(model.tensors)
        if key is not None:
            raise MismatchError(
                model.label,
                f"is quantised: {quote(key)} scales weights that mean nothing without it",
                "merge the fp16, bf16 or fp32 release instead",
            )
    first = alignment.first
    for number, other in enumerate(opened):
        if other.tensors.keys().isdisjoint(first.tensors) and not alignment.counterparts(number):
            raise MismatchError(
                other.label,
                f"has no tensor name in common with {first.label}: nothing to merge",
                "these seem to be different architectures, or different spellings of one",
            )
    _check_architectures(opened, identities)


def _check_architectures(opened: Sequence[Checkpoint], identities: Sequence[Identity]) -> None:
    known = {c.label: i.architecture for c, i in zip(opened, identities, strict=True) if i.architecture is not None}
    if len(set(known.values())) > 1:
        found = ", ".join(f"{label} is {a}" for label, a in known.items())
        labels = iter(known)
        first = known[next(labels)]
        other = next(label for label in labels if known[label] != first)
        raise MismatchError(other, f"different architectures cannot be merged: {found}")


def differing_markers(models: Sequence[Checkpoint]) -> list[str]:
    """Where markers of v-prediction and zero terminal SNR differ from the first model's, in words.

    They say how a model must be sampled, and a mixture of both is neither.
    """
    found = []
    for model in models:
        tensors = {key for key in MARKERS if key in model.tensors}
        said = {k: model.metadata.get(k, "").lower() for k in MARKER_METADATA}
        found.append((tensors, {k: v for k, v in said.items() if v not in _ORDINARY}))
    texts = []
    for other, marks in zip(models[1:], found[1:], strict=True):
        if marks != found[0]:
            names = sorted(
                (marks[0] ^ found[0][0]) | {k for k in MARKER_METADATA if marks[1].get(k) != found[0][1].get(k)}
            )
            texts.append(
                f"{other.label} and {models[0].label} differ in {listing(names)}: one may predict v "
                "and the other noise, and a mixture samples badly"
            )
    return texts
