"""Which components of which architecture a checkpoint holds, as another layout needs to know; refuses to guess."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from weightops.errors import MismatchError, listing
from weightops.naming.identify import DROPPABLE, Identity, Part, architecture_with, family_of
from weightops.naming.keymap import ARCHITECTURES, NETWORKS, Architecture, Component
from weightops.naming.recognise import Match, Unsure

if TYPE_CHECKING:
    from weightops.files.checkpoint import Checkpoint

KEEP = "without --to every name stays as it is"
MODELS = ("unet", "transformer")


@dataclass(frozen=True, slots=True)
class Member:
    """A component of the file that goes into the output. `component`: what its architecture says of it, if it does."""

    name: str
    part: Part
    match: Match
    component: Component | None

    @property
    def is_bare(self) -> bool:
        """Does nothing stand before its names?"""
        return all(key == body for key, body in self.part.bodies.items())


def members_of(
    opened: Checkpoint, identity: Identity, *, drop: tuple[str, ...], carried: tuple[str, ...]
) -> tuple[Architecture | None, list[Member]]:
    """The architecture (None: one component alone, which may be of several), and its components, in its order.

    carried: components that need not be known. Raises MismatchError for what is no checkpoint, or not known.
    """
    if identity.kind in ("lora", "embedding", "controlnet"):
        raise MismatchError(opened.label, f"expected a checkpoint or a part of one, found: {identity.kind}", KEEP)
    parts = {n: p for n, p in identity.parts.items() if n != "ema" and family_of(n) not in drop}
    for name, part in parts.items():
        if isinstance(part.found, Unsure) and name not in carried:
            family = family_of(name)
            hint = f"--drop {family} leaves it out; {KEEP}" if family in DROPPABLE else KEEP
            raise MismatchError(opened.label, _unknown(name, part, part.found), hint)
    matches = {name: part.match for name, part in parts.items() if part.match is not None}
    models = [match.network.name for match in matches.values() if match.network.role in MODELS]
    architecture = architecture_with(models[0]) if models else None
    if not matches or (architecture is None and len(matches) > 1):
        what = "holds no component that is known"
        if matches:
            what = f"holds {', '.join(sorted(matches))}, but no diffusion model, which would tell what they belong to"
        raise MismatchError(opened.label, what, KEEP)
    if architecture is None:
        return None, [Member(name, parts[name], match, None) for name, match in matches.items()]
    known = {c.name: c for c in architecture.components}
    for name, match in matches.items():
        if name in known and known[name].network != match.network.name:
            what = f"its {name} is a {match.network.name}, but {architecture.title} has a {known[name].network} there"
            raise MismatchError(opened.label, what, KEEP)
    ordered = sorted(matches, key=lambda name: list(known).index(name) if name in known else len(known))
    return architecture, [Member(name, parts[name], matches[name], known.get(name)) for name in ordered]


def _unknown(name: str, part: Part, found: Unsure) -> str:
    """What to say of a component whose network cannot be told."""
    which = "it" if name == "other" else f"its {name}"
    if found.possible:
        return f"{which} may be {' or '.join(found.possible)}: names and shapes cannot tell"
    known, network, spelling = max(
        (sum(table.claim(body) is not None for body in part.bodies.values()), network.name, spelling)
        for _, network in NETWORKS
        for spelling, table in network.tables().items()
    )
    table = NETWORKS.get(network).tables()[spelling]
    strange = [body for body in part.bodies.values() if table.claim(body) is None]
    what = f"{which} is no model that is known"
    if not strange:
        return f"{what}: it has the names of {network}, but not its shapes"
    if 2 * known < len(part.bodies):
        return f"{what}: {listing(part.bodies.values())}"
    return (
        f"{what}; the nearest is {network} with {spelling} names, to which {known:,} of its {len(part.bodies):,} "
        f"tensors belong, but not {listing(strange)}"
    )


def assumed(member: Member, *, for_folder: bool) -> tuple[Member, str]:
    """The component that a VAE or a text encoder alone is taken for, and in words which others look the same.

    Those come first that have a place for most of its tensors; for a single file, those with other names than now.
    """
    match = member.match
    names = [n for body in member.part.bodies.values() if (claim := match.table.claim(body)) for n in claim.names]
    rows: list[tuple[int, bool, Architecture, Component]] = []
    for _, architecture in ARCHITECTURES:
        for c in architecture.components:
            if c.network != match.network.name or (match.variant and c.variant not in (None, match.variant)):
                continue
            if "Projection" in str(c.config.get("architectures")) and "text_projection.weight" not in names:
                continue
            lost = sum(n.startswith(c.omits) for n in names if not n.endswith("position_ids"))
            rows.append((lost, not for_folder and c.spelling == match.spelling, architecture, c))
    if not rows:
        return member, ""
    rows.sort(key=lambda row: row[:2])
    fewest, _, _, component = rows[0]
    alike: dict[bool, list[str]] = {True: [], False: []}
    for lost, _, architecture, c in rows:
        if lost == fewest:
            alike[dict(c.config) == dict(component.config)].append(architecture.title)
    taken = f"taken for the {component.name} of {' or '.join(dict.fromkeys(alike[True]))}; "
    taken += f"{', '.join(dict.fromkeys(alike[False]))} have it with other settings"
    return replace(member, component=component), taken if alike[False] else ""
