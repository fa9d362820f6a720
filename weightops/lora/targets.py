"""What an adapter's module names stand for: which network, which modules of it. Names first; shapes where names tie."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from weightops.lora.dialects import MODEL, Beginning, beginning_of
from weightops.naming.keymap import (
    ARCHITECTURES,
    NETWORKS,
    Architecture,
    Claim,
    Component,
    Network,
    Rule,
    Table,
    Variant,
    heights,
)
from weightops.naming.recognise import Shape, fits, row_of, variant_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


class Look(NamedTuple):
    """A module as the file has it: its beginning, its name, the shape of what it changes if its factors tell."""

    beginning: Beginning
    body: str
    shape: Shape | None
    flat: bool


@dataclass(frozen=True, slots=True)
class Target:
    """The canonical modules that one adapter changes: several, where it changes a packed one.

    rule: how the file's name packs or rearranges them. component: diffusers' name of the part of the pipeline.
    """

    names: tuple[str, ...]
    rule: Rule
    component: str | None
    spelling: str
    key: str = ""


@dataclass(slots=True)
class Resolved:
    """targets: one for each look, None where no name fits. tensors: whole tensors of the model, by key."""

    targets: list[Target | None]
    tensors: dict[str, Target]
    architecture: str | None
    possible: tuple[str, ...]
    spelling: str | None
    variant: str | None


class _Fit(NamedTuple):
    network: Network
    table: Table
    claims: dict[int, tuple[Claim, str]]
    strangers: int
    fitting: bool
    complete: bool
    variant: str | None


# Of the modules of a file, at least this share must be known to the network that it is taken to be for.
_KNOWN = 0.9


def resolve(
    looks: Sequence[Look], others: Iterable[str], *, hint: str = "", architecture: str | None = None
) -> Resolved:
    """Find the network of each group of modules.

    others: keys that may be whole tensors of the diffusion model. hint: what the metadata says of the base model;
    architecture: what the user says; either counts only where names and shapes leave a choice.
    """
    model = [n for n, look in enumerate(looks) if look.beginning.part in (MODEL, "any")]
    result = Resolved([None] * len(looks), {}, None, (), None, None)
    fits_ = _best(looks, model, ("unet", "transformer")) if model else []
    parts = {looks[n].beginning.part for n in range(len(looks))} - {MODEL, "any"}
    encoders = {part: [n for n, look in enumerate(looks) if look.beginning.part == part] for part in sorted(parts)}
    if not fits_ and model and all(looks[n].beginning.part == "any" for n in model):
        encoders["any"] = model  # a text encoder's own adapter, in PEFT's folders
    texts = {part: _best(looks, numbers, ("text_encoder",)) for part, numbers in encoders.items()}
    candidates = _architectures(looks, fits_, texts, bool(model) and "any" not in encoders)
    told = [a for a in candidates if a.name == architecture] or [a for a in candidates if _hinted(a, hint)]
    chosen = told if len(told) == 1 else candidates
    if len(chosen) != 1:
        result.possible = tuple(sorted(a.name for a in candidates))
        return result
    found = chosen[0]
    result.architecture = found.name
    result.targets = _targets(looks, found, fits_, texts, result)
    fit = next((f for f in fits_ if f.network.name == found.components[0].network), None)
    if fit is not None:
        _whole_tensors(result, others, found.components[0], fit)
    return result


def _best(looks: Sequence[Look], numbers: Sequence[int], roles: tuple[str, ...]) -> list[_Fit]:
    """The networks that know the most of these modules, those of fitting sizes alone if there are such."""
    found = []
    for _, network in NETWORKS:
        if network.role in roles:
            fit = _fit(network, looks, numbers)
            if fit is not None:
                found.append(fit)
    if not found:
        return []
    least = min(f.strangers for f in found)
    found = [f for f in found if f.strangers == least]
    found = [f for f in found if f.fitting] or found
    # Flux and HunyuanVideo name their blocks alike: a file for all of one model's blocks, and no more, is for that one.
    return [f for f in found if f.complete] or found


def _fit(network: Network, looks: Sequence[Look], numbers: Sequence[int]) -> _Fit | None:
    best: tuple[Table, dict[int, tuple[Claim, str]]] | None = None
    allowed = int(len(numbers) * (1 - _KNOWN))
    tables = network.adapter_tables().values()
    firsts = Counter(_first_word(looks[n]) for n in numbers)
    for table in tables:
        claims: dict[int, tuple[Claim, str]] = {}
        strange = sum(count for (flat, word), count in firsts.items() if not _begins(table, flat, word))
        if best is not None and len(numbers) - strange <= len(best[1]):
            continue
        for n in numbers if strange < len(numbers) else ():
            claim = claim_of(table, looks[n])
            if claim is not None:
                claims[n] = claim, table.spelling
        if best is None or len(claims) > len(best[1]):
            best = table, claims
        if len(claims) == len(numbers):
            break
    assert best is not None
    table, claims = best
    for n in numbers:  # a file may mix spellings
        if n not in claims and len(claims) >= len(numbers) // 2:
            other = next(((c, t.spelling) for t in tables if (c := claim_of(t, looks[n])) is not None), None)
            if other is not None:
                claims[n] = other
    if not claims or len(numbers) - len(claims) > allowed:
        return None
    shapes: list[tuple[str, Shape | None]] = []
    for n, (claim, _) in claims.items():
        for name, shape in _target_shapes(claim, looks[n]):
            row = row_of(f"{name}.weight", network.needs)
            if row is not None and shape is not None and not looks[n].flat and not _agrees(shape, row):
                return None
            if looks[n].flat and shape is not None:
                shape = _as_wanted(shape, [row_of(f"{name}.weight", v.shapes) for v in network.variants])
            shapes.append((f"{name}.weight", shape))
    fitting = [v for v in network.variants if fits(v, shapes)]
    complete = any(_is_complete(v, {name for name, _ in shapes}) for v in fitting)
    variant = variant_of(network, shapes, whole=False)
    return _Fit(network, table, claims, len(numbers) - len(claims), bool(fitting), complete, variant)


def _first_word(look: Look) -> tuple[bool, str]:
    flat = look.beginning.flat
    return flat, look.body.partition("_" if flat else ".")[0]


def _begins(table: Table, flat: bool, word: str) -> bool:
    """Does any name of this table begin so?"""
    heads = table.flat_heads if flat else table.heads
    return word in heads or "{}" in heads


def _is_complete(variant: Variant, names: set[str]) -> bool:
    """Of the variant's numbered blocks, has each kind that these modules are in a module in every one?"""
    kinds = 0
    for template, count in variant.counts.items():
        before, _, after = template.partition("{}")
        there = [any(name.startswith(f"{before}{number}{after}.") for name in names) for number in range(count)]
        if any(there) and not all(there):
            return False
        kinds += any(there)
    return kinds > 0


def claim_of(table: Table, look: Look) -> Claim | None:
    return table.flattened(look.body) if look.beginning.flat else table.module(look.body)


def _target_shapes(claim: Claim, look: Look) -> list[tuple[str, Shape | None]]:
    shape = look.shape
    if not shape or len(claim.names) == 1:
        return [(name, shape) for name in claim.names]
    bands = heights(claim.rule, shape[0], shape[1] if len(shape) > 1 else None)
    if bands is None:
        return [(name, None) for name in claim.names]
    return [(name, (height, *shape[1:])) for name, height in zip(claim.names, bands, strict=True)]


def _agrees(shape: Shape, row: tuple[int | None, ...]) -> bool:
    return len(row) == len(shape) and all(w is None or s in (w, -1) for w, s in zip(row, shape, strict=True))


# Convolutions of UNets, by the ends of their names: of their sizes, tables have few.
_KERNELS = (
    ("conv_in", (3, 3)),
    ("conv_out", (3, 3)),
    ("conv1", (3, 3)),
    ("conv2", (3, 3)),
    ("conv_shortcut", (1, 1)),
    ("downsamplers.0.conv", (3, 3)),
    ("upsamplers.0.conv", (3, 3)),
)


def unflattened(shape: Shape, name: str, component: Component) -> Shape:
    """The shape of a module's weight, given as a matrix, with the kernel that the architecture tells of it."""
    network = NETWORKS.get(component.network)
    found = _as_wanted(shape, [row_of(f"{name}.weight", v.shapes) for v in network.variants])
    kernel = next((k for end, k in _KERNELS if f".{name}".endswith(f".{end}")), None)
    if len(found) > 2 or network.role != "unet" or kernel is None or shape[1] % math.prod(kernel):
        return found
    return (shape[0], shape[1] // math.prod(kernel), *kernel)


def _as_wanted(shape: Shape, wanted: Sequence[tuple[int | None, ...] | None]) -> Shape:
    """A flattened convolution's shape, as the table has it, where the two hold equally many values."""
    for row in wanted:
        whole = tuple(w for w in row or () if w is not None)
        if row and len(whole) == len(row) and row[0] == shape[0] and math.prod(whole) == math.prod(shape):
            return whole
    return shape


# ------------------------------------------------------------------------------------------------ architectures


def _architectures(
    looks: Sequence[Look], models: Sequence[_Fit], texts: dict[str, list[_Fit]], has_model: bool
) -> list[Architecture]:
    """Those whose networks know every group of modules."""
    if has_model and not models:
        return []
    found = []
    for _, architecture in ARCHITECTURES:
        if has_model and all(f.network.name != architecture.components[0].network for f in models):
            continue
        parts = [_component(architecture, part, fits_) for part, fits_ in texts.items()]
        if all(part is not None for part in parts) and (has_model or parts):
            found.append(architecture)
    if not has_model:
        # kohya's beginning of a text encoder's names tells some architectures from others.
        begins = {look.beginning.text.rstrip("_") for look in looks if look.beginning.dialect == "kohya"}
        exact = [a for a in found if begins and begins <= {c.kohya for c in a.components}]
        found = exact or found
    return found


def _component(architecture: Architecture, part: str, fits_: Sequence[_Fit]) -> tuple[Component, _Fit] | None:
    """Which text encoder of the architecture a group of modules belongs to."""
    encoders = [c for c in architecture.components if c.name.startswith("text_encoder")]
    number = {"te": 0, "te1": 0, "te2": 1, "te3": 2}.get(part)
    found = []
    for place, component in enumerate(encoders):
        for fit in fits_:
            if fit.network.name != component.network:
                continue
            if component.variant and fit.variant and component.variant != fit.variant:
                continue
            if part.startswith("te.") and component.variant and part != f"te.{component.variant}":
                continue
            named = component.kohya == f"lora_{part}" or component.name in (f"text_encoder_{part[2:]}",)
            found.append((not named, place != number, place, component, fit))
    if not found:
        return None
    found.sort(key=lambda entry: entry[:3])
    return found[0][3], found[0][4]


def _hinted(architecture: Architecture, hint: str) -> bool:
    """Metadata lies; it is asked only where names and shapes leave a choice."""
    return bool(hint) and hint.lower().startswith(architecture.hints)


def _targets(
    looks: Sequence[Look], architecture: Architecture, models: Sequence[_Fit], texts: dict[str, list[_Fit]],
    result: Resolved,
) -> list[Target | None]:  # fmt: skip
    targets: list[Target | None] = [None] * len(looks)
    model = next((f for f in models if f.network.name == architecture.components[0].network), None)
    groups = [(architecture.components[0], model)] if model is not None else []
    groups += [entry for part, fits_ in texts.items() if (entry := _component(architecture, part, fits_)) is not None]
    for component, fit in groups:
        for n, (claim, spelling) in fit.claims.items():
            targets[n] = Target(claim.names, claim.rule, component.name, spelling)
    if groups:
        result.spelling, result.variant = groups[0][1].table.spelling, groups[0][1].variant
    return targets


def _whole_tensors(result: Resolved, keys: Iterable[str], component: Component, fit: _Fit) -> None:
    claim_by: Callable[[str], Claim | None] = fit.table.claim
    for key in keys:
        beginning = beginning_of(key)
        if beginning.flat or beginning.part not in (MODEL, "any"):
            continue
        claim = claim_by(key[len(beginning.text) :])
        if claim is not None and not claim.suffix:
            result.tensors[key] = Target(claim.names, claim.rule, component.name, fit.table.spelling, key)
