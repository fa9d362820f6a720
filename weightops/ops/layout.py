"""The plan of a checkpoint in another layout: what each component becomes, and what stands beside the weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.errors import MismatchError, UsageError, listing, quote
from weightops.files.checkpoint import WEIGHTLESS
from weightops.files.folder import OutputFile, shards
from weightops.naming.identify import Identity, family_of, quantised
from weightops.ops.components import MODELS, Member, assumed, members_of
from weightops.ops.folders import component_config, pipeline_folder
from weightops.ops.prediction import Prediction, prediction_of, sample_size
from weightops.ops.produce import Planned, kept_metadata
from weightops.ops.report import Account, Unused, tensors
from weightops.ops.respell import Respelled, Respelling, becomes, carry, respell
from weightops.plan import Plan

if TYPE_CHECKING:
    from weightops.files.checkpoint import Checkpoint
    from weightops.files.tensor import TensorSpec
    from weightops.naming.keymap import Architecture
    from weightops.plan import Task

LAYOUTS = ("original", "diffusers", "comfy")
WHOLE = 1 << 62  # no file is larger


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
class _Layout:
    """A layout in the making. lost, needless: input key -> why it has no place; what is needless is not lost."""

    opened: Checkpoint
    wish: Wish
    identity: Identity
    architecture: Architecture | None
    members: list[Member]
    prediction: Prediction | None = None
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
    def like(self) -> Checkpoint | None:
        """Where settings come from: --like, else the folder that is converted."""
        if self.wish.like is not None or self.was_folder:
            return self.wish.like or self.opened
        match = self.members[0].match
        if not self.alone or match.spelling != match.network.canonical:
            return None
        beside = self.opened.json_beside("config.json") or {}
        return self.opened if {"_class_name", "architectures"} & beside.keys() else None

    @property
    def title(self) -> str:
        match = self.members[0].match
        return self.architecture.title if self.architecture is not None else match.variant or match.network.name


def plan_layout(opened: Checkpoint, identity: Identity, wish: Wish) -> tuple[Planned, Way]:
    """The plan, from headers and small files alone, and the way back. Raises WeightopsError."""
    carried = opened.components if wish.to == "diffusers" else ()
    architecture, members = members_of(opened, identity, drop=wish.drop, carried=carried)
    scale = quantised(opened.tensors) if wish.dtype != "keep" else None
    if scale is not None:
        what = f"{opened.label} holds codes, whose values mean nothing without their scales ({quote(scale)})"
        raise UsageError("--dtype", what)
    found = _Layout(opened, wish, identity, architecture, members)
    if architecture is None:
        _assume(found)
    else:
        settings = found.like if found.in_folder else None
        found.prediction = prediction_of(
            opened, architecture.name, members[0].match.variant, asked=wish.prediction, like=settings
        )
    for member in found.members:
        _respell(found, member)
    whole = _folder(found) if found.in_folder else _single(found)
    _rest(found, whole)
    return _planned(found), Way(tuple(found.done), found.carried)


# ------------------------------------------------------------------------------------------------ the components


def _assume(found: _Layout) -> None:
    member, taken = assumed(found.members[0], for_folder=found.in_folder)
    found.members = [member]
    if taken and found.in_folder and found.wish.like is None:
        found.warnings.append(f"{taken}: --like FOLDER takes config.json from there")


def _respell(found: _Layout, member: Member) -> None:
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


def _target(found: _Layout, member: Member) -> tuple[str, str]:
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


# ------------------------------------------------------------------------------------------------ the files


def _folder(found: _Layout) -> bool:
    """Lay the components out in folders; is it a whole pipeline, with its scheduler?"""
    size = found.wish.shard_size or WHOLE
    channels: dict[str, int | None] = {}
    for member, (way, done) in zip(found.members, found.done, strict=True):
        role = member.match.network.role
        stem = "model" if role == "text_encoder" else "diffusion_pytorch_model"
        folder = "" if found.alone else member.name
        files, index = shards(done.outputs, stem, size, folder=folder, names=done.names)
        found.files += files
        more = {**(member.component.config if member.component is not None else {})}
        more |= sample_size(found.architecture.name, found.prediction) if found.architecture and role == "unet" else {}
        path = f"{folder}/config.json" if folder else "config.json"
        config = component_config(member.match.network, more, done.shapes, found.like, path, found.opened.label)
        found.extras |= {**index, path: config}
        first = done.shapes.get("conv_in.weight", ())
        channels[way.name] = first[1] if role == "unet" and len(first) == 4 else None
    for name in found.opened.components:
        if name not in channels and family_of(name) not in found.wish.drop:
            channels[name] = None
            _as_it_is(found, name)
    if found.alone or found.architecture is None:
        return False
    prediction = found.prediction.scheduler if found.prediction is not None else {}
    folder_ = pipeline_folder(
        found.architecture, channels, found.like, tokenizer=found.wish.tokenizer, prediction=prediction
    )
    found.extras |= folder_.files
    found.warnings += folder_.warnings
    if folder_.missing:
        found.warnings.append(f"{folder_.missing}: a folder of components, each of which can be loaded by itself")
    elif found.prediction is not None and not found.prediction.by:
        other = "epsilon" if found.prediction.kind == "v_prediction" else "v_prediction"
        found.warnings.append(
            f"nothing in the file says what it predicts; {found.prediction.kind} is assumed, and --prediction {other} "
            f"says otherwise"
        )
    return not folder_.missing


def _as_it_is(found: _Layout, name: str) -> None:
    """A component of a diffusers folder that is not known, from folder to folder."""
    opened = found.opened
    keys = [key for key in opened.tensors if key.startswith(f"{name}.")]
    names = {key: key.removeprefix(f"{name}.") for key in keys}
    _carry(found, keys)
    library = ((opened.json_beside("model_index.json") or {}).get(name) or [""])[0]
    stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
    outputs = {key: found.outputs[key] for key in keys}
    files, index = shards(outputs, stem, found.wish.shard_size or WHOLE, folder=name, names=names)
    config = opened.bytes_beside(f"{name}/config.json")
    found.files += files
    found.extras |= {**index, **({} if config is None else {f"{name}/config.json": config})}


def _single(found: _Layout) -> bool:
    """Lay everything out in one file, or in shards of it; there is no pipeline."""
    opened = found.opened
    if not found.was_folder:
        held = {key for member in found.members for key in member.part.bodies}
        dropped = {key for key, c in found.identity.components.items() if family_of(c) in found.wish.drop}
        _carry(found, [key for key in opened.tensors if key not in held | dropped])
    if found.architecture is not None and found.prediction is not None:
        markers = found.prediction.markers(found.architecture.name)
        found.outputs |= {name: spec for name, spec in markers.items() if name not in found.outputs}
    if found.wish.shard_size is not None:
        files, index = shards(found.outputs, "model", found.wish.shard_size)
        found.files += files
        found.extras |= index
    index_ = opened.json_beside("model_index.json") if found.was_folder else None
    for name, value in (index_ or {}).items():
        if name in opened.components:
            settings = f"{name}/config.json"
        elif isinstance(value, list) and str(value[-1:]).rstrip("']").endswith(WEIGHTLESS):
            settings = f"{name}/"
        else:
            continue
        found.left.append(Unused(settings, opened.label, "a single file holds weights, not settings", asked=True))
    return False


def _carry(found: _Layout, keys: list[str]) -> None:
    """Tensors that go under their own names."""
    for key in keys:
        if key in found.outputs:
            found.lost[key] = "another tensor has its name"
            continue
        spec = found.opened.tensors[key].spec
        found.outputs[key] = becomes(spec, found.wish.dtype)
        found.tasks.append(carry(key, spec, key, found.wish.dtype))
        found.carried[key] = key


# Why what is part of no component has no place in a folder.
_NO_PLACE = {
    "ema": "a diffusers folder has no place for an average of the weights",
    "optimizer": "a diffusers folder has no place for the state of an optimizer",
    "marker": "the mark of a noise schedule that the scheduler has not; --like FOLDER may bring one",
}
_SCHEDULE = "a noise schedule, which a scheduler computes from its settings"
_MARKER = "a mark; scheduler_config.json says it"


def _rest(found: _Layout, whole: bool) -> None:
    """The keys of no member that are not carried: dropped, or without a place; whole: there is a scheduler."""
    held = {key for member in found.members for key in member.part.bodies} | found.carried.keys()
    for key, component in found.identity.components.items():
        if family_of(component) in found.wish.drop:
            reason = f"--drop {family_of(component)}"
            found.left.append(Unused(key, found.opened.label, reason, asked=True))
        elif key in held or key in found.lost:
            continue
        elif component == "schedule":
            found.needless[key] = _SCHEDULE
        elif key in ("v_pred", "ztsnr") and whole:
            found.needless[key] = _MARKER
        else:
            where = "folder" if found.in_folder else "single file"
            found.lost[key] = _NO_PLACE.get(component, f"a {where} of {found.title} has no place for it")


# ------------------------------------------------------------------------------------------------ the plan


def _planned(found: _Layout) -> Planned:
    opened, wish = found.opened, found.wish
    account = _account(found)
    recipe: dict[str, Any] = {
        "command": "convert", "version": __version__, "dtype": wish.dtype, "drop": list(wish.drop), "to": wish.to,
    }  # fmt: skip
    recipe |= {"prediction": wish.prediction} if wish.prediction is not None else {}

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
    was = found.members[0].match.spelling
    summary = f"{found.title}, {was} → {wish.to}: {count}, {tensors(used)}"
    return Planned(plan, account, summary, _groups(found, account), [*found.warnings, *_losses(found)])


def _metadata(found: _Layout) -> dict[str, str]:
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


def _account(found: _Layout) -> Account:
    opened = found.opened
    account = Account()
    account.unused += [Unused(key, opened.label, why, asked=False) for key, why in opened.left_out]
    account.unused += found.left
    account.unused += [Unused(key, opened.label, why, asked=True) for key, why in found.needless.items()]
    account.unused += [Unused(key, opened.label, why, asked=False) for key, why in found.lost.items()]
    strange = {key: why for _, done in found.done for key, why in done.strange.items()}
    account.kept += strange.items()
    gone = {u.key for u in account.unused} | strange.keys()
    for key, info in opened.tensors.items():
        if key not in gone:
            is_cast = becomes(info.spec, found.wish.dtype).dtype != info.spec.dtype
            (account.used if is_cast else account.copied).append(key)
    return account


def _groups(found: _Layout, account: Account) -> list[dict[str, Any]]:
    """Input keys by component. `split` and `fused` are among the copied and the cast."""
    outcomes = dict.fromkeys((*account.copied, *(key for key, _ in account.kept)), "copied")
    outcomes |= dict.fromkeys(account.used, "cast")
    counts: dict[str, Counter[str]] = {}
    for key, component in found.identity.components.items():
        counts.setdefault(component, Counter())[outcomes.get(key, "dropped")] += 1
    for way, done in found.done:
        pairs = {(task.inputs[0].slot.key, task.outputs[0].key) for task in done.tasks}
        leaving, arriving = Counter(key for key, _ in pairs), Counter(key for _, key in pairs)
        counts[way.name]["split"] = sum(count > 1 for count in leaving.values())
        counts[way.name]["fused"] = sum(arriving[key] > 1 for _, key in pairs)
    groups = []
    for name, count in counts.items():
        count["tensors"] = count["copied"] + count["cast"] + count["dropped"]
        columns = ("tensors", "copied", "cast", "split", "fused", "dropped")
        groups.append({"component": name} | {column: count[column] for column in columns})
    return groups


def _losses(found: _Layout) -> list[str]:
    """One line for each reason that weights are lost for."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for key, reason in found.lost.items():
        reasons.setdefault((found.identity.components[key], reason), []).append(key)
    return [
        f"lost: {tensors(len(keys))} of {component} ({reason}): {listing(keys)}"
        for (component, reason), keys in reasons.items()
    ]
