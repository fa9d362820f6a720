"""Which network, in which spelling and size, has tensors of these names and shapes? "Cannot tell" is an answer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from weightops.naming.keymap import NETWORKS, Claim, Network, Sizes, Table, Variant, heights

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Shape = tuple[int, ...]

# A file may hold a few tensors that are no part of its network; a relative of a network holds many.
STRANGERS = 2


@dataclass(frozen=True, slots=True)
class Match:
    """A network, the spelling of its names, its variant (None: not to be told, or of no released size)."""

    network: Network
    spelling: str
    variant: str | None
    strangers: tuple[str, ...] = ()

    @property
    def table(self) -> Table:
        return self.network.tables()[self.spelling]


@dataclass(frozen=True, slots=True)
class Unsure:
    """Several networks have these names and shapes, or (none given) no network has."""

    possible: tuple[str, ...] = ()


def recognise(shapes: Mapping[str, Shape | None], roles: Iterable[str]) -> Match | Unsure:
    """The network whose tensors these are: names without a component's prefix -> shapes (None: not known).

    Names decide; shapes only where several networks have the names. A network with fewer unknown names wins.
    """
    wanted = frozenset(roles)
    heads = Counter(name.partition(".")[0] for name in shapes)
    found: dict[int, list[tuple[Network, str, dict[str, Claim], list[str]]]] = {}
    allowed = STRANGERS if len(shapes) > 10 * STRANGERS else 0
    for _, network in NETWORKS:
        if network.role not in wanted:
            continue
        best: tuple[str, dict[str, Claim], list[str]] | None = None
        for spelling, table in network.tables().items():
            if sum(heads[head] for head in heads.keys() - table.heads) > allowed and "{}" not in table.heads:
                continue
            claims, strangers = _claims(table, shapes, allowed)
            if len(strangers) <= allowed and claims and (best is None or len(strangers) < len(best[2])):
                best = spelling, claims, strangers
        if best is not None and is_marked(network, best[1].values()):
            found.setdefault(len(best[2]), []).append((network, *best))
    if not found:
        return Unsure()
    candidates = []
    for network, spelling, claims, strangers in found[min(found)]:
        canonical = canonical_shapes(claims, shapes)
        if all(agrees(name, shape, network.needs) for name, shape in canonical):
            candidates.append((network, spelling, strangers, canonical, _fitting(network, canonical)))
    # Of no released size: where one network alone has the names, they tell.
    chosen = [c for c in candidates if c[4] or not c[0].variants] or (candidates if len(candidates) == 1 else [])
    if len(chosen) == 1:
        network, spelling, strangers, canonical, fitting = chosen[0]
        names = [name for name, _ in canonical]
        if any(fit.shaped for fit in fitting.values()) or _has_an_end(network, names):
            return Match(network, spelling, _one_of(network, fitting, set(names), whole=True), tuple(strangers))
    return Unsure(tuple(sorted(c[0].name for c in (chosen or candidates))))


def _stands_once(name: str) -> bool:
    """Is it before or after the blocks, whose names have numbers?"""
    return not any(word.isdecimal() or word == "{}" for word in name.split("."))


def _has_an_end(network: Network, names: Iterable[str]) -> bool:
    """A model of a size of its own has one of these; a piece of something else, blocks alone, has none."""
    return any(_stands_once(name) or row_of(name, network.needs) is not None for name in names)


def _is_whole(variants: Sequence[Variant], names: set[str]) -> bool:
    """Are all tensors there that stand once in a model of one of these variants?"""
    return not variants or any(names.issuperset(n for n in v.shapes if _stands_once(n)) for v in variants)


def _claims(table: Table, names: Iterable[str], allowed: int) -> tuple[dict[str, Claim], list[str]]:
    """What the table knows of the names; given up when more than `allowed` are strangers to it."""
    claims: dict[str, Claim] = {}
    strangers: list[str] = []
    for name in names:
        claim = table.claim(name)
        if claim is not None:
            claims[name] = claim
        elif not table.is_extra(name):
            strangers.append(name)
            if len(strangers) > allowed:
                break
    return claims, strangers


def is_marked(network: Network, claims: Iterable[Claim]) -> bool:
    """Is there a tensor that tells this network from another that has all its other names?"""
    return not network.has or any(name in network.has for claim in claims for name in claim.names)


def canonical_shapes(claims: Mapping[str, Claim], shapes: Mapping[str, Shape | None]) -> list[tuple[str, Shape | None]]:
    """Canonical names with their shapes; None for what a packed or rearranged tensor holds."""
    found: list[tuple[str, Shape | None]] = []
    for key, claim in claims.items():
        rule = claim.rule
        plain = len(claim.names) == 1 and not (rule.squared or rule.transposed)
        shape = shapes[key]
        if len(claim.names) > 1 and shape and not rule.transposed:  # () is a scale that the parts have in common
            bands = heights(rule, shape[0], shape[1] if len(shape) > 1 else None)
            if bands is not None:
                found.extend((name, (h, *shape[1:])) for name, h in zip(claim.names, bands, strict=True))
                continue
        found.extend((name, shape if plain else None) for name in claim.names)
    return found


def agrees(name: str, shape: Shape | None, wanted: Mapping[str, tuple[int | None, ...]]) -> bool:
    """Does the shape contradict none that its name should have?"""
    row = row_of(name, wanted)
    return row is None or shape is None or _meets(shape, row)


def _meets(shape: Shape, row: tuple[int | None, ...]) -> bool:
    # A factor of a LoRA of unknown rank is written as -1.
    return len(row) == len(shape) and all(w is None or s in (w, -1) for w, s in zip(row, shape, strict=True))


def fits(variant: Variant, canonical: Iterable[tuple[str, Shape | None]]) -> bool:
    """Does every tensor that the variant speaks of have its shape and number, and is there at least one?"""
    found = _fit(variant, canonical)
    return found is not None and found.shaped > 0


class _Fit(NamedTuple):
    """Of how many tensors a variant speaks, and of how many of these the shape is known."""

    named: int
    shaped: int


def _fit(variant: Variant, canonical: Iterable[tuple[str, Shape | None]]) -> _Fit | None:
    """None where a tensor has another shape, or another number, than it has in the variant."""
    counts = [(*template.partition("{}")[::2], count) for template, count in variant.counts.items()]
    beginnings = tuple(before for before, _, _ in counts)
    named = shaped = 0
    for name, shape in canonical:
        row = row_of(name, variant.shapes)
        if row is not None:
            named += 1
            if shape is not None:
                if not _meets(shape, row):
                    return None
                shaped += 1
        if name.startswith(beginnings):
            for before, after, count in counts:
                number = name[len(before) :].partition(".")[0] if name.startswith(before) else ""
                if number.isdecimal() and name.startswith(after, len(before) + len(number)) and int(number) >= count:
                    return None
    return _Fit(named, shaped)


def _fitting(network: Network, canonical: Sequence[tuple[str, Shape | None]]) -> dict[str, _Fit]:
    """The variants that no tensor contradicts."""
    found = ((variant.name, _fit(variant, canonical)) for variant in network.variants)
    return {name: fit for name, fit in found if fit is not None}


def variant_of(network: Network, canonical: Iterable[tuple[str, Shape | None]], *, whole: bool = True) -> str | None:
    """The one variant that the shapes fit; `whole`: of a checkpoint, whose absent tensors say something too."""
    listed = list(canonical)
    return _one_of(network, _fitting(network, listed), {name for name, _ in listed}, whole=whole)


def _one_of(network: Network, fitting: Mapping[str, _Fit], names: set[str], *, whole: bool) -> str | None:
    # What a piece of a file lacks says nothing.
    complete = whole and _is_whole(network.variants, names)
    found: dict[str, int] = {}
    for variant in network.variants:
        fit = fitting.get(variant.name)
        if fit is None or not fit.shaped or (whole and not names.isdisjoint(variant.lacks)):
            continue
        if not complete or names.issuperset(variant.has):
            found[variant.name] = fit.named
    best = [name for name, named in found.items() if named == max(found.values())]
    return best[0] if len(best) == 1 else None


def row_of(name: str, wanted: Mapping[str, tuple[int | None, ...]]) -> tuple[int | None, ...] | None:
    """The shape that a table of templates gives the name."""
    return (wanted if isinstance(wanted, Sizes) else Sizes(wanted)).row(name)
