"""One module of a combination: the terms of its weight, and the changes of its bias or norm. From headers alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from weightops.errors import FormatError, MismatchError, quote
from weightops.lora.compat import Part, Shapes, check, gains, what_differs
from weightops.lora.family import Description, Told
from weightops.lora.pieces import sources as parts_of
from weightops.lora.targets import unflattened
from weightops.lora.units import Target, rows_of_pack
from weightops.naming.keymap import Rule, swaps
from weightops.ops.adapter_modules import Base, dtype_of
from weightops.ops.factor_plan import Module
from weightops.ops.lined_up import FileKey, LinedUp, Share, Summand, Vector
from weightops.ops.sums import Placement, Sum, Term

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightops.lora.adapters import Adapter

Shape = tuple[int, ...]


def combine_module(
    lined: LinedUp, component: str, prefix: str, module: str, packed: Sequence[Sequence[Share]],
    spelled: tuple[Target, Rule, tuple[str, ...]] | None, base: Base | None,
) -> None:  # fmt: skip
    """One module of the output: those of the canonical ones that it packs, in order."""
    starts, rows = _starts(lined, prefix + module, packed, spelled)
    placed: dict[int, tuple[Share, list[Placement]]] = {}
    for shares, start in zip(packed, starts, strict=True):
        for share in shares:
            _, places = placed.setdefault(id(share.adapter), (share, []))
            at = start
            for low, high in share.bands:
                places.append((low, high, at))
                at += high - low
    if spelled is not None and len(packed) == 1:
        placed = {
            n: (share, _swapped(places, spelled[1], share, rows, lined.files[share.file].label))
            for n, (share, places) in placed.items()
        }  # fmt: skip
    terms: list[Term] = []
    keys: list[FileKey] = []
    vectors: dict[str, list[Summand]] = {}
    for share, places in sorted(placed.values(), key=lambda entry: entry[0].file):
        merged = _joined(places)
        term = _term(lined, share, merged, rows, base)
        if term is not None:
            terms.append(term)
            family = share.adapter.family
            keys += [(share.file, key) for part, key in share.adapter.keys.items() if part not in family.of_bias]
        _vectors(lined, share, merged, vectors, has_factors=term is not None)
    if terms:
        lined.modules.append(_module(lined, component, prefix, module, terms, rows))
        lined.keys[lined.name(component, prefix, module)] = keys
        lined.used.update(keys)
    is_norm = any(share.adapter.family.name == "norm" for share, _ in placed.values())
    for kind, summands in vectors.items():
        _vector(
            lined, component, prefix, module, kind, summands, rows, has_factors=bool(terms),
            is_norm=is_norm and not terms,
        )  # fmt: skip


def _starts(
    lined: LinedUp, name: str, packed: Sequence[Sequence[Share]],
    spelled: tuple[Target, Rule, tuple[str, ...]] | None,
) -> tuple[list[int], int]:  # fmt: skip
    """The first row of each canonical module in the one that packs them, and the rows of that."""
    found: list[int | None] = []
    for shares in packed:
        sizes = {share.rows for share in shares}
        if len(sizes) > 1:
            said = ", ".join(f"{lined.files[s.file].label}: {s.rows}" for s in shares)
            raise MismatchError(lined.opened.label, f"{quote(name)} has not the same rows in all files ({said})")
        found.append(sizes.pop() if sizes else None)
    if None in found:
        assert spelled is not None
        target, rule, names = spelled
        there = next(share for shares in packed for share in shares)
        shape = shape_of(there.adapter)
        features = shape[1] if len(shape) > 1 else None
        place = target.place(there.adapter.component or "")
        found = [
            rows_of_pack(target, place, names, found, features, rule, n) if rows is None else rows
            for n, rows in enumerate(found)
        ]
    if None in found:
        what = f"{quote(name)} packs modules that no file changes, and their sizes are not known"
        raise MismatchError(lined.opened.label, what, "--dialect diffusers needs no packing")
    tall = [rows or 0 for rows in found]
    return [sum(tall[:n]) for n in range(len(tall))], sum(tall)


def _swapped(places: list[Placement], rule: Rule, share: Share, rows: int, label: str) -> list[Placement]:
    """The same, in a spelling whose halves stand the other way round."""
    shape = shape_of(share.adapter)
    if not swaps_of(rule, share.adapter, rows, shape[1] if len(shape) > 1 else None, label):
        return places
    half, found = rows // 2, []
    for start, stop, to in places:
        for low, high in ((0, half), (half, rows)):
            a, b = max(low, to), min(high, to + stop - start)
            if a < b:
                found.append((start + a - to, start + b - to, a + half if low == 0 else a - half))
    return sorted(found, key=lambda place: place[2])


def _joined(places: Sequence[Placement]) -> tuple[Placement, ...]:
    """Rows that follow each other on both sides, as one stretch."""
    found: list[Placement] = []
    for start, stop, to in places:
        if found and found[-1][1] == start and found[-1][2] + found[-1][1] - found[-1][0] == to:
            found[-1] = (found[-1][0], stop, found[-1][2])
        else:
            found.append((start, stop, to))
    return tuple(found)


def _term(lined: LinedUp, share: Share, placed: tuple[Placement, ...], rows: int, base: Base | None) -> Term | None:
    """The adapter's change of the weight; None: it changes the bias, or a norm, alone."""
    adapter, label = share.adapter, lined.files[share.file].label
    family, keys = adapter.family, adapter.keys
    alpha, told = _strength(lined, share)
    specs = {key: lined.files[share.file].tensors[key].spec for key in keys.values()}
    parts = parts_of(adapter, specs)
    shape = family.shape(adapter.shapes)
    if not family.changes_weight(keys) or (shape is not None and len(shape) < 2):
        return None
    depends = "dora_scale" in keys or family.delta is None
    if "reshape_weight" in keys:
        raise MismatchError(label, f"{quote(adapter.name)} gives its weight another shape, and is not to be combined")
    strength = 1.0 if _is_blended(lined) else lined.wish.strengths[share.file]
    mine = {part: source for part, source in parts.items() if part not in family.of_bias}
    if depends:
        if base is None:
            raise needs_base(label, adapter)
        frame = base.frame(adapter)
        whole = (sum(slot.spec.rows for slot in frame), *frame[0].spec.shape[1:])
        at = None if placed == ((0, whole[0], 0),) and whole[0] == rows else placed
        return Term(share.file, adapter.name, family, mine, alpha, told, strength, whole, placed=at, frame=frame,
                    base=base.number)  # fmt: skip
    assert shape is not None
    if family.flat and len(shape) == 2 and adapter.target is not None and lined.known is not None:
        place = next(c for c in lined.known.components if c.name == adapter.component)
        shape = unflattened(shape, adapter.target.names[0], place)
    at = None if placed == ((0, shape[0], 0),) and shape[0] == rows else placed
    return Term(share.file, adapter.name, family, mine, alpha, told, strength, shape, placed=at)


def _is_blended(lined: LinedUp) -> bool:
    return lined.wish.blend is not None


def _strength(lined: LinedUp, share: Share) -> tuple[float | None, Told]:
    alpha, told = lined.values[share.file].get(share.adapter.name, (None, Told()))
    if alpha is not None and not math.isfinite(alpha):
        what = f"{quote(share.adapter.name)} has alpha {alpha}, expected a finite number"
        raise FormatError(lined.files[share.file].label, what)
    return alpha, told


def _module(lined: LinedUp, component: str, prefix: str, module: str, terms: Sequence[Term], rows: int) -> Module:
    """The module that these terms make, which are in the order of their files."""
    name = lined.name(component, prefix, module)
    widths = {term.n for term in terms}
    if len(widths) > 1:
        said = ", ".join(f"{lined.files[t.source].label}: {list(t.shape)}" for t in terms)
        raise MismatchError(lined.opened.label, f"{quote(name)} has not the same inputs in all files ({said})")
    # Some files have a kernel flat: its axes are in the others.
    shape = (rows, *max((term.shape[1:] for term in terms), key=len))
    blend = lined.wish.blend
    if blend is not None and len({term.source for term in terms}) == 1:  # nothing to combine it with
        terms = [replace(term, strength=blend.alone(term.source)) for term in terms]
        blend = None
    elif blend is not None:
        blend.check(term.source for term in terms)
    of = Sum(name, tuple(terms), shape, blend)
    parts = ["up", "down", *(["alpha"] if _says_alpha(lined) else []), *(["diff"] if _says_diff(lined) else [])]
    keys = {part: lined.claim(component, prefix, module, part) for part in parts}
    lined.names[name] = (prefix, module)
    found = Module(of, component, keys, dtype_of(terms[0].parts), module)
    if lined.wish.compat is not None:
        return _as_peer(lined, found)
    return replace(found, exact=lined.wish.exact, incoming=_incoming(of) if of.is_product else None)


def _incoming(of: Sum) -> int:
    """The largest rank that a file comes in with: of what is packed here, those of its parts together."""
    ranks = (sum(min(t.product_rank, t.out, t.n) for t in of.terms if t.source == file) for file in of.files)
    return min(max(ranks), of.out, of.n)


def _as_peer(lined: LinedUp, module: Module) -> Module:
    """The module as sd-scripts' merge_lora.py would make it, with `exact` its --concat. Raises MismatchError."""
    concat, terms = lined.wish.exact, module.of.terms
    for term in terms:
        if term.family.name != "lora" or "mid" in term.parts or term.placed is not None or not term.is_product:
            label = lined.files[term.source].label
            raise MismatchError(label, f"{quote(term.name)} is nothing that sd-scripts' merge_lora.py can merge")
    given = [Shapes(t.parts["up"].spec.shape, t.parts["down"].spec.shape, t.alpha) for t in terms]
    check(given, concat=concat, label=lined.files[terms[0].source].label, module=module.of.name)
    rank = sum(shapes.rank for shapes in given) if concat else given[0].rank
    scale = given[0].strength / rank
    return replace(module, scale=scale, incoming=rank, peer="concat" if concat else "ratio")


def warn_of_peer(lined: LinedUp) -> None:
    """Say by an example in what the peer's numbers are not the sum: by a module that several files change, if any."""
    found = [[Part(t.strength, t.product_rank) for t in m.of.terms] for m in lined.modules]
    other = [parts for parts in found if gains(parts, concat=False) != tuple(part.ratio for part in parts)]
    parts = next((parts for parts in found if len(parts) > 1), next(iter(other), None))
    if parts is not None:
        lined.warnings.append(what_differs(parts, concat=lined.wish.exact and len(parts) > 1))


def _says_alpha(lined: LinedUp) -> bool:
    """Does alpha stand among the tensors? It is the rank, so that nothing is lost where it does not; but a peer's."""
    if lined.dialect is None:
        return lined.wish.compat is not None or any("alpha" in adapter.keys for adapter in lined.found[0].adapters)
    return lined.dialect.alpha == "tensor"


def _says_diff(lined: LinedUp) -> bool:
    return lined.dialect is None or lined.dialect.alpha == "tensor"


# ------------------------------------------------------------------------------------------------ biases and norms

# What the adapter's parts change that are no matrices.
_CHANGED = {
    "bias": "bias",
    "diff_b": "bias",
    "b_norm": "bias",
    "diff": "norm",
    "w_norm": "norm",
}


def _vectors(
    lined: LinedUp, share: Share, placed: tuple[Placement, ...], vectors: dict[str, list[Summand]], *,
    has_factors: bool,
) -> None:  # fmt: skip
    """What the adapter changes beside a matrix: the bias, the norm."""
    adapter, family, number = share.adapter, share.adapter.family, share.file
    alpha, told = _strength(lined, share)
    specs = {key: lined.files[number].tensors[key].spec for key in adapter.keys.values()}
    scale = family.scale(Description(adapter.shapes, alpha, told)) if family.name == "lora" else 1.0
    taken = set()
    for part, source in parts_of(adapter, specs).items():
        if family.sets or not (part in family.of_bias or (part in _CHANGED and len(source.spec.shape) == 1)):
            continue
        factor = (1.0 if _is_blended(lined) else lined.wish.strengths[number]) * scale
        vectors.setdefault(_CHANGED[part], []).append(Summand(number, source, factor, placed))
        taken.add(part)
    for part, key in adapter.keys.items():
        if part in taken or (part == "alpha" and taken):
            lined.used.add((number, key))
        elif not has_factors or part in family.of_bias:
            what = "it sets a bias or a norm" if family.sets else "it changes neither a matrix nor a bias"
            lined.lost[number, key] = f"{what}, which no sum of changes can say"


def _vector(
    lined: LinedUp, component: str, prefix: str, module: str, kind: str, summands: Sequence[Summand], rows: int, *,
    has_factors: bool, is_norm: bool,
) -> None:  # fmt: skip
    """A bias's or a norm's change; of dialects that have none, those of modules without factors are left out."""
    beside = None
    if _says_diff(lined):
        part = ("w_norm" if is_norm else "diff") if kind == "norm" else "b_norm" if is_norm else "diff_b"
    elif kind == "bias" and has_factors:
        part, beside = "bias", lined.name(component, prefix, module)
    else:
        assert lined.dialect is not None
        why = f"{lined.dialect.name} has no differences of biases and norms"
        lined.lost |= {(summand.file, summand.source.key): why for summand in summands}
        return
    key = lined.claim(component, prefix, module, part)
    if lined.wish.blend is not None:
        lined.wish.blend.check(summand.file for summand in summands)
    lined.vectors.append(Vector(key, summands[0].source.spec.dtype, rows, tuple(summands), beside))


# ------------------------------------------------------------------------------------------------ adapters


def swaps_of(rule: Rule, adapter: Adapter, rows: int, features: int | None, label: str) -> bool:
    swapped = swaps(rule, rows, features)
    if swapped is None or (swapped and rows % 2):
        what = f"{quote(adapter.name)}: its halves may have to trade places, and its shapes do not tell"
        raise MismatchError(label, what)
    return swapped


def needs_base(label: str, adapter: Adapter) -> MismatchError:
    kind = f"a {adapter.family.name}" if adapter.family.delta is None else "a magnitude (DoRA)"
    return MismatchError(
        label, f"{quote(adapter.name)} is {kind}, whose change depends on the model's weights",
        "--base CHECKPOINT, the model that the LoRAs are for, makes a LoRA of it",
    )  # fmt: skip


def shape_of(adapter: Adapter) -> Shape:
    """Of what it changes, where its parts tell: the weight, or the bias alone."""
    shape = adapter.family.shape(adapter.shapes)
    if shape is None:
        shape = next((adapter.shapes[part] for part in adapter.family.of_bias if part in adapter.shapes), ())
    return shape
