"""The plan of a checkpoint in another layout: what each component becomes, and what has no place there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.errors import MismatchError, UsageError, listing, quote
from weightops.naming.identify import family_of, quantised
from weightops.ops.components import MODELS, Member, assumed, members_of
from weightops.ops.layout_account import account_of, groups_of, losses_of
from weightops.ops.layout_files import lay_folder, lay_single
from weightops.ops.prediction import Prediction, prediction_of
from weightops.ops.produce import Planned, kept_metadata
from weightops.ops.report import Unused, tensors
from weightops.ops.respell import Respelled, Respelling, becomes, carry, respell
from weightops.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weightops.files.checkpoint import Checkpoint
    from weightops.files.folder import OutputFile
    from weightops.files.tensor import TensorSpec
    from weightops.naming.identify import Identity
    from weightops.naming.keymap import Architecture
    from weightops.plan import Task

LAYOUTS = ("original", "diffusers", "comfy")

# Why what is part of no component has no place in a folder.
_NO_PLACE = {
    "ema": "a diffusers folder has no place for an average of the weights",
    "optimizer": "a diffusers folder has no place for the state of an optimizer",
    "marker": "a mark of how to sample, which no scheduler that is written here says",
}
_SCHEDULE = "a noise schedule, which a scheduler computes from its settings"
_MARKER = "a mark; scheduler_config.json says it"


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked for. like: a folder whose settings and tokenizers are taken; shard_size: bytes, or None."""

    to: str
    dtype: str = "keep"
    drop: tuple[str, ...] = ()
    shard_size: int | None = None
    like: Checkpoint | None = None
    tokenizer: bool = True
    prediction: str | None = None
    allow_nonfinite: bool = False


@dataclass(frozen=True, slots=True)
class Way:
    """What it takes to go the way back: each component's respelling; input key -> output key, of what is carried."""

    components: tuple[tuple[Respelling, Respelled], ...] = ()
    carried: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Layout:
    """A layout in the making. lost, needless: input key -> why it has no place; what is needless is not lost.

    whole: it is a pipeline, with its scheduler.
    """

    opened: Checkpoint
    wish: Wish
    identity: Identity
    architecture: Architecture | None
    members: list[Member]
    prediction: Prediction | None = None
    whole: bool = False
    done: list[tuple[Respelling, Respelled]] = field(default_factory=list)
    outputs: dict[str, TensorSpec] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)
    carried: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    needless: dict[str, str] = field(default_factory=dict)
    left: list[Unused] = field(default_factory=list)
    files: list[OutputFile] = field(default_factory=list)
    extras: dict[str, bytes] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def in_folder(self) -> bool:
        return self.wish.to == "diffusers"

    @property
    def was_folder(self) -> bool:
        return self.opened.container == "diffusers"

    @property
    def alone(self) -> bool:
        """Is it one component without a prefix?"""
        return len(self.members) == 1 and self.members[0].is_bare

    @property
    def title(self) -> str:
        match = self.members[0].match
        return self.architecture.title if self.architecture is not None else match.variant or match.network.name

    @property
    def like(self) -> Checkpoint | None:
        """Where settings come from: --like, else the folder that is converted."""
        if self.wish.like is not None or self.was_folder:
            return self.wish.like or self.opened
        match = self.members[0].match
        if not self.alone or match.spelling != match.network.canonical:
            return None
        beside = self.opened.json_beside("config.json") or {}
        return self.opened if {"_class_name", "architectures"} & beside.keys() else None

    def drops(self, component: str) -> bool:
        return family_of(component) in self.wish.drop

    def carry(self, keys: Iterable[str]) -> None:
        """Let tensors go under their own names."""
        for key in keys:
            if key in self.outputs:
                self.lost[key] = "another tensor has its name"
                continue
            spec = self.opened.tensors[key].spec
            self.outputs[key] = becomes(spec, self.wish.dtype)
            self.tasks.append(carry(key, spec, key, self.wish.dtype))
            self.carried[key] = key


def plan_layout(opened: Checkpoint, identity: Identity, wish: Wish) -> tuple[Planned, Way]:
    """The plan, from headers and small files alone, and the way back. Raises WeightopsError."""
    carried = opened.components if wish.to == "diffusers" else ()
    architecture, members = members_of(opened, identity, drop=wish.drop, carried=carried)
    scale = quantised(opened.tensors) if wish.dtype != "keep" else None
    if scale is not None:
        what = f"{opened.label} holds codes, whose values mean nothing without their scales ({quote(scale)})"
        raise UsageError("--dtype", what)
    found = Layout(opened, wish, identity, architecture, members)
    if architecture is None:
        _assume(found)
    else:
        settings = found.like if found.in_folder else None
        found.prediction = prediction_of(
            opened, architecture.name, members[0].match.variant, asked=wish.prediction, like=settings
        )
    for member in found.members:
        _respell(found, member)
    if found.in_folder:
        lay_folder(found)
    else:
        lay_single(found)
    _rest(found)
    return _planned(found), Way(tuple(found.done), found.carried)


def _assume(found: Layout) -> None:
    member, taken = assumed(found.members[0], for_folder=found.in_folder)
    found.members = [member]
    if taken and found.in_folder and found.like is None:
        found.warnings.append(f"{taken}: --like FOLDER takes config.json from there")


def _respell(found: Layout, member: Member) -> None:
    spelling, before = _target(found, member)
    way = Respelling(
        member.name, member.match.table, member.match.network.tables()[spelling], member.part.bodies, before,
        omits=member.component.omits if member.component is not None and found.in_folder else (),
        keeps=not found.in_folder and not found.was_folder,
    )  # fmt: skip
    done = respell(found.opened, way, found.wish.dtype)
    taken = sorted(found.outputs.keys() & done.outputs.keys())
    if taken:
        raise MismatchError(found.opened.label, f"two components have tensors of one name: {listing(taken)}")
    found.done.append((way, done))
    found.outputs |= done.outputs
    found.tasks += done.tasks
    found.lost |= done.lost
    found.needless |= done.needless


def _target(found: Layout, member: Member) -> tuple[str, str]:
    """The spelling of a component in the output, and what stands before its names there."""
    network, component = member.match.network, member.component
    if found.in_folder:
        return network.canonical, "" if found.alone else f"{member.name}."
    if component is None:
        if not found.alone:
            what = f"a single file of {found.title} has no place for its {member.name}"
            raise MismatchError(found.opened.label, what, "convert the folder of each component by itself")
        known = list(network.tables())
        return "original" if "original" in known else known[0], ""
    if found.wish.to == "original":
        return component.spelling, "" if found.alone else component.prefix
    # ComfyUI's own files name the diffusion model even where it is alone.
    bare = found.alone and network.role not in MODELS
    return component.comfy_spelling or component.spelling, "" if bare else component.comfy or component.prefix


def _rest(found: Layout) -> None:
    """The keys of no member that are not carried: dropped, or without a place."""
    held = {key for member in found.members for key in member.part.bodies} | found.carried.keys() | found.lost.keys()
    for key, component in found.identity.components.items():
        if found.drops(component):
            reason = f"--drop {family_of(component)}"
            found.left.append(Unused(key, found.opened.label, reason, asked=True))
        elif key in held:
            continue
        elif component == "schedule":
            found.needless[key] = _SCHEDULE
        elif key in ("v_pred", "ztsnr") and found.whole:
            found.needless[key] = _MARKER
        else:
            where = "folder" if found.in_folder else "single file"
            found.lost[key] = _NO_PLACE.get(component, f"a {where} of {found.title} has no place for it")


def _planned(found: Layout) -> Planned:
    opened, wish = found.opened, found.wish
    account = account_of(found)
    recipe: dict[str, Any] = {
        "command": "convert", "version": __version__, "dtype": wish.dtype, "drop": list(wish.drop), "to": wish.to,
    }  # fmt: skip
    asked = {"prediction": wish.prediction, "shard_size": wish.shard_size}
    recipe |= {key: value for key, value in asked.items() if value is not None}

    def position(task: Task) -> tuple[object, ...]:
        slot = task.inputs[0].slot
        return task.needs_torch, *opened.tensors[slot.key][1:3], slot.bands or ()

    plan = Plan(
        (opened,), found.outputs, tuple(sorted(found.tasks, key=position)), _metadata(found), recipe,
        refuse_nonfinite=any(task.needs_torch for task in found.tasks) and not wish.allow_nonfinite,
        files=tuple(found.files), extras=found.extras,
    )  # fmt: skip
    used = len(account.used) + len(account.copied) + len(account.kept)
    count = f"{len(found.members)} component{'' if len(found.members) == 1 else 's'}"
    summary = f"{found.title}, {found.members[0].match.spelling} → {wish.to}: {count}, {tensors(used)}"
    return Planned(plan, account, summary, groups_of(found, account), [*found.warnings, *losses_of(found)])


def _metadata(found: Layout) -> dict[str, str]:
    """The metadata of the file, as far as it is true of the output."""
    metadata = kept_metadata(found.opened)
    if "modelspec.implementation" in metadata:
        if found.in_folder:
            metadata["modelspec.implementation"] = "diffusers"
        elif metadata["modelspec.implementation"] == "diffusers":
            del metadata["modelspec.implementation"]
    said = found.prediction.metadata if found.prediction is not None and found.prediction.by else {}
    for key, value in said.items():
        if key in metadata or (value != "epsilon" and not found.in_folder):
            metadata[key] = value
    return metadata
