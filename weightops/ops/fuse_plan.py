"""The plan of a fuse: which adapter changes which band of which tensor. From headers, alphas and settings alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.errors import FormatError, MismatchError, UsageError, quote
from weightops.files.dtypes import ARITHMETIC
from weightops.files.tensor import Slot, TensorSpec
from weightops.lora.adapters import Adapter, AdapterFile, read_adapters, strengths
from weightops.lora.family import MODIFIERS, Told, changed_shape, grain_of
from weightops.lora.pieces import Piece, Window, sources, take_apart
from weightops.naming.identify import Identity, identify
from weightops.naming.keymap import Rule, Table, swaps
from weightops.naming.slots import Place, place
from weightops.ops.blocks import networks_of
from weightops.ops.changes import Change, fused, work_nbytes
from weightops.ops.extract_pair import own_beginning
from weightops.ops.fp8 import METADATA, Band, check_dtype, dequantising, is_mark, requantising, scales_of
from weightops.ops.produce import Planned, kept_metadata, stem
from weightops.ops.report import Account, Unused
from weightops.ops.respell import becomes, carry
from weightops.plan import Grain, Input, Plan, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from weightops.files.checkpoint import Checkpoint
    from weightops.lora.pieces import Bands
    from weightops.naming.blocks import Blocks

Name = tuple[str, str]
Shape = tuple[int, ...]

# What another dtype would keep is worth saying where the one that is written keeps little.
BESIDE = {"BF16": "float16", "F16": "float32", "F8_E4M3": "bfloat16", "F8_E5M2": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked of a fuse. strength: of a LoRA (its number) in a component and canonical module.

    lokr_rank: by which alpha is divided where a LoKr has two whole factors; None: these are as strong as they stand.
    embeddings: those that LoRAs carry along are copied elsewhere. blocks: factors of the strengths.
    """

    strength: Callable[[int, str, str], float]
    dtype: str = "keep"
    seed: int | None = None
    strict: bool = False
    allow_nonfinite: bool = False
    lokr_rank: int | None = None
    embeddings: bool = False
    blocks: Blocks | None = None
    said: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Job:
    """A change of one tensor by a piece of LoRA number `lora`. shape: that the tensor then has.

    frame: where the tensors are that together are the whole weight of a piece that is a window of it, if it is needed.
    """

    lora: int
    piece: Piece
    told: Told
    strength: float
    of_bias: bool
    shape: Shape
    frame: tuple[Slot, ...] = ()


@dataclass(slots=True)
class _State:
    opened: Checkpoint
    identity: Identity
    loras: Sequence[Checkpoint]
    wish: Wish
    scales: dict[str, str]
    places: dict[Name, Place] = field(default_factory=dict)
    own: Table | None = None
    factors: dict[Name, float] = field(default_factory=dict)
    jobs: dict[Name, list[Job]] = field(default_factory=dict)
    account: Account = field(default_factory=Account)
    outputs: dict[str, TensorSpec] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)
    modules: dict[int, str] = field(default_factory=dict)
    whole_lokrs: int = 0
    taken: dict[int, list[Adapter]] = field(default_factory=dict)
    partly: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def unscaled(self) -> bool:
        """Are weights written without the scales that they have?"""
        return self.wish.dtype != "keep"

    def scale(self, weight: str) -> Slot | None:
        return self.opened.slot(self.scales[weight]) if weight in self.scales else None


def plan_fuse(opened: Checkpoint, loras: Sequence[Checkpoint], wish: Wish) -> tuple[Planned, dict[int, str]]:
    """The plan, and the module that a task changes, by the number of each that does. Raises WeightopsError."""
    identity = identify(opened.tensors)
    _check(opened, identity)
    scales = scales_of(opened)
    if scales:
        check_dtype(opened, wish.dtype)
    state = _State(opened, identity, loras, wish, scales)
    _place(state)
    names = networks_of(identity, state.places)
    state.factors = {} if wish.blocks is None else wish.blocks.values(names)
    for number, lora in enumerate(loras):
        _take(state, number, lora)
    if wish.lokr_rank is not None and not state.whole_lokrs:
        labels = ", ".join(lora.label for lora in loras)
        raise UsageError(
            "--lokr-rank", f"{labels} has no LoKr of two whole factors and an alpha, which alone it is for"
        )
    if not state.jobs:
        reasons = list(dict.fromkeys(u.reason for u in state.account.unused))
        raise MismatchError(
            ", ".join(lora.label for lora in loras),
            f"changes nothing of {opened.label}: the result would be a copy",
            "; ".join(reasons[:3]) or None,
        )
    if wish.blocks is not None:
        wish.blocks.check_used(names, state.jobs, "the LoRAs")
    _write(state)
    state.account.unused.extend(Unused(path, opened.label, why, asked=True) for path, why in opened.left_out)
    if wish.strict:
        _refuse_surprises(state)
    recipe = {"command": "fuse", "version": __version__, "dtype": wish.dtype, **wish.said}
    plan = Plan(
        (opened, *loras), state.outputs, tuple(state.tasks),
        kept_metadata(opened, less=frozenset({METADATA} if state.unscaled else ())), recipe,
        refuse_nonfinite=not wish.allow_nonfinite,
    )  # fmt: skip
    words = f"{stem(opened)} + " + " + ".join(stem(lora) for lora in loras)
    return Planned(plan, state.account, words, _groups(state), [*state.partly, *state.warnings]), state.modules


@dataclass(frozen=True, slots=True)
class Changes:
    """What LoRAs change of a checkpoint, for who computes with it otherwise than `fuse` does."""

    _state: _State

    @property
    def account(self) -> Account:
        return self._state.account

    @property
    def by_key(self) -> bool:
        """Is nothing known of the checkpoint? Then a tensor's name is "" and its key."""
        return self._state.own is not None

    @property
    def taken(self) -> Mapping[int, Sequence[Adapter]]:
        """Every adapter of each LoRA."""
        return self._state.taken

    @property
    def warnings(self) -> list[str]:
        return [*self._state.partly, *self._state.warnings]

    def of(self, number: int, name: Name) -> tuple[tuple[Input, ...], tuple[Change, ...], bool] | None:
        """What LoRA number `number` does to a tensor: inputs, of sources numbered as the LoRAs are; the changes, at
        strength 1; and are all rows needed at once? None: nothing. Raises MismatchError for what only `fuse` can do.
        """
        state = self._state
        jobs = [job for job in state.jobs.get(name, []) if job.lora == number]
        if not jobs:
            return None
        at = state.places[name]
        if any(job.frame or math.prod(job.shape) != at.spec.values for job in jobs):
            what = f"{quote(jobs[0].piece.adapter)} changes more than one tensor, or its shape, at a stroke"
            raise MismatchError(state.loras[number].label, what, "fuse it into a checkpoint first, and merge that")
        inputs, changes, whole = _changes(state, jobs, at)
        return tuple(replace(entry, source=entry.source - 1) for entry in inputs), changes, whole


def changes_of(opened: Checkpoint, identity: Identity, loras: Sequence[Checkpoint]) -> Changes:
    """What these LoRAs change of `opened`, from headers, alphas and settings alone. Raises WeightopsError."""
    state = _State(opened, identity, loras, Wish(lambda _number, _component, _module: 1.0), {})
    _place(state)
    for number, lora in enumerate(loras):
        before = len(state.account.used)
        _take(state, number, lora)
        if len(state.account.used) == before:
            reasons = list(dict.fromkeys(u.reason for u in state.account.unused if u.source == lora.label))
            raise MismatchError(lora.label, f"changes nothing of {opened.label}", "; ".join(reasons[:3]) or None)
    return Changes(state)


def _refuse_surprises(state: _State) -> None:
    if state.partly:
        more = f" (and {len(state.partly) - 1:,} more)" if len(state.partly) > 1 else ""
        raise MismatchError("--strict", state.partly[0] + more, "without --strict it is left out, and named")
    state.account.refuse_surprises("would not be used", "left out")


def _check(opened: Checkpoint, identity: Identity) -> None:
    if not opened.tensors:
        raise MismatchError(opened.label, "holds no tensors: nothing to fuse into")
    if identity.kind == "lora":
        raise MismatchError(opened.label, "is a LoRA, expected a checkpoint", "the checkpoint comes first")


# ------------------------------------------------------------------------------------------------ where things are


def _place(state: _State) -> None:
    """Where the checkpoint has each canonical tensor; of an unknown one, its own names are the table."""
    for component, part in state.identity.parts.items():
        if part.match is not None and component != "ema":
            for name, found in place(part.match.table, part.bodies, state.opened.tensors).places.items():
                state.places[component, name] = found
    if state.identity.architecture is None or not state.places:
        state.places.clear()  # those of a known text encoder would be a second way to the same rows
        modules = {key.rpartition(".")[0] for key in state.opened.tensors if key.endswith((".weight", ".bias"))}
        beginning = own_beginning(modules)
        try:
            rules = [Rule(m.removeprefix(beginning), (m,)) for m in sorted(modules)]
            state.own = Table("the checkpoint", "its own", rules)
        except ValueError as e:
            raise MismatchError(state.opened.label, f"its modules cannot be told apart in kohya's names: {e}") from None
        for key in state.opened.tensors:
            state.places["", key] = Place(state.opened.slot(key))


def _take(state: _State, number: int, lora: Checkpoint) -> None:
    """The jobs of one LoRA file."""
    found = read_adapters(lora, architecture=state.identity.architecture)
    if not found.adapters and not found.indexed:
        raise MismatchError(lora.label, "holds no adapter modules", "inspect shows what it is")
    if state.own is None:
        if found.architecture is None and found.possible:
            what = (
                f"is for one of {', '.join(found.possible)}, but {state.opened.label} is {state.identity.architecture}"
            )
            raise MismatchError(lora.label, what)
        found.check()
        if found.architecture not in (None, state.identity.architecture):
            raise MismatchError(
                lora.label, f"is for {found.architecture}, but {state.opened.label} is {state.identity.architecture}"
            )
    else:
        _check_generic(found)
    alphas = strengths(lora, found)
    specs = {key: info.spec for key, info in lora.tensors.items()}
    if state.wish.embeddings:
        state.account.copied.extend(found.embeddings)
    else:
        why = "an embedding: prompts use it, no weight holds it"
        state.account.unused.extend(Unused(key, lora.label, why, asked=False) for key in found.embeddings)
    state.taken[number] = list(found.adapters)
    for adapter in found.adapters:
        alpha, told = alphas.get(adapter.name, (None, Told()))
        if adapter.family.name == "lokr" and adapter.rank is None and alpha is not None and state.wish.lokr_rank:
            told = told._replace(full_rank=state.wish.lokr_rank)
            state.whole_lokrs += 1
        if alpha is not None and not math.isfinite(alpha):
            raise FormatError(lora.label, f"{quote(adapter.name)} has alpha {alpha}, expected a finite number")
        pieces = _pieces(state, adapter, alpha, specs, lora.label)
        if isinstance(pieces, str):
            _unused(state, lora, adapter, pieces)
            continue
        names = [piece.name for piece in pieces]
        reasons = [_job(state, number, lora, piece, told, names) for piece in pieces]
        _account(state, lora, adapter, reasons)
    state.account.unused.extend(Unused(path, lora.label, why, asked=True) for path, why in lora.left_out)


def _check_generic(found: AdapterFile) -> None:
    """Refuse what is wrong with the file itself; whose names these are, the checkpoint will say."""
    if found.indexed or found.problems or found.left:
        found.check()


def _unused(state: _State, lora: Checkpoint, adapter: Adapter, reason: str) -> None:
    state.account.unused.extend(Unused(key, lora.label, reason, asked=False) for key in adapter.keys.values())


def _account(state: _State, lora: Checkpoint, adapter: Adapter, reasons: Sequence[dict[str, str]]) -> None:
    """Each key of an adapter: used where some leaf of some module takes it, else with the reason why none does.

    reasons: of each piece, the leaves that it does not change after all.
    """
    parts = {"weight": adapter.family.changes_weight(adapter.keys), "bias": adapter.family.changes_bias(adapter.keys)}
    leaves = [leaf for leaf, does in parts.items() if does]
    lost = {leaf: [found[leaf] for found in reasons if leaf in found] for leaf in leaves}
    whole = {leaf for leaf in leaves if len(lost[leaf]) == len(reasons)}
    if whole == set(leaves):
        _unused(state, lora, adapter, next((why for leaf in leaves for why in lost[leaf]), "changes nothing"))
        return
    for part, key in adapter.keys.items():
        leaf = "bias" if part in adapter.family.of_bias else "weight"
        if leaf in whole and part not in MODIFIERS:
            state.account.unused.append(Unused(key, lora.label, lost[leaf][0], asked=False))
        else:
            state.account.used.append(key)
    if "weight" in lost and "weight" not in whole:
        state.partly += [f"{lora.label}: a part of {adapter.name} is not used: {why}" for why in lost["weight"]]


class _Dense:
    """A matrix that says of itself that it is dense: its factors are shared, which is always exact."""

    def __getitem__(self, _: int) -> _Dense:
        return self

    def all(self) -> bool:
        return True


def _pieces(
    state: _State, adapter: Adapter, alpha: float | None, specs: dict[str, TensorSpec], label: str
) -> list[Piece] | str:
    """One for each canonical module, or the reason why there is none."""
    if state.own is not None:
        look = state.own.flattened if adapter.beginning.flat else state.own.module
        claim = look(adapter.body)
        if claim is None:
            return f"{state.opened.label} has no module {adapter.body}"
        return [Piece("", claim.names[0], adapter.family, sources(adapter, specs), alpha, adapter.name)]
    if adapter.target is None or adapter.component is None:
        return "its module is not known"
    if all((adapter.component, f"{n}.{leaf}") not in state.places for n in adapter.target.names for leaf in _LEAVES):
        held = any(component == adapter.component for component, _ in state.places)
        return f"{state.opened.label} has no {adapter.target.names[0] if held else adapter.component}"
    try:
        return take_apart(adapter, alpha, specs, lambda _key, _bands: _Dense(), label)
    except MismatchError:
        # Its tensors cannot be cut; what they make of the whole weight can be.
        windows = _windows(state, adapter, alpha, specs)
        if windows is None:
            raise
        return windows


_LEAVES = ("weight", "bias")


def _windows(state: _State, adapter: Adapter, alpha: float | None, specs: dict[str, TensorSpec]) -> list[Piece] | None:
    """A piece for each module that the adapter changes, each with all of the parts; None: it cannot be so."""
    target, parts = adapter.target, sources(adapter, specs)
    assert target is not None
    places = [state.places.get((adapter.component or "", f"{name}.weight")) for name in target.names]
    if any(at is None or at.transposed for at in places) or adapter.family.changes_bias(parts):
        return None
    shapes = [at.spec.shape for at in places if at is not None]
    rows, start, found = sum(shape[0] for shape in shapes), 0, []
    for name, shape in zip(target.names, shapes, strict=True):
        piece = Piece(adapter.component or "", name, adapter.family, parts, alpha, adapter.name)
        bands: Bands = ((start, start + shape[0]),)
        start += shape[0]
        if len(shapes) == 1:  # not packed, but its halves may trade places
            if not swaps(target.rule, rows, shape[1] if len(shape) > 1 else None):
                return [piece]
            if rows % 2:
                return None
            bands = ((rows // 2, rows), (0, rows // 2))
        found.append(replace(piece, window=Window(rows, bands)))
    return found


def _frame(state: _State, piece: Piece, names: Sequence[str], shape: Shape) -> tuple[Slot, ...]:
    """Where all the rows of the weight are that the piece is a window of, if each of its rows needs all of them."""
    if piece.window is None or not _needs_all(piece, shape):
        return ()
    return tuple(state.places[piece.component, f"{name}.weight"].slot for name in names)


def _needs_all(piece: Piece, shape: Shape) -> bool:
    whole = shape if piece.window is None else (piece.window.rows, *shape[1:])
    return grain_of(piece.family, piece.shapes, whole) == "tensor"


def _shape_then(state: _State, piece: Piece, at: Place) -> Shape | None:
    """The shape of a weight when the piece has changed it; None where it does not fit."""
    shape = at.spec.shape
    if piece.window is not None:
        whole = (piece.window.rows, *shape[1:])
        return shape if changed_shape(piece.family, piece.shapes, whole) == whole else None
    found = changed_shape(piece.family, piece.shapes, shape)
    wider = piece.shape
    if found is None and wider and (state.identity.architecture, piece.name) == _CONTROLLED:
        narrow = len(wider) == len(shape) and wider[0] == shape[0] and wider[1] > shape[1]
        found = wider if narrow else None
    if found in (None, shape):
        return found
    of_its_own = not at.transposed and at.slot.bands is None
    return found if found is not None and found[0] == shape[0] and of_its_own else None


# BFL's control LoRAs for Flux do not say that they are for a wider weight; ComfyUI and diffusers widen this one.
_CONTROLLED = ("flux", "x_embedder")


def _job(
    state: _State, number: int, lora: Checkpoint, piece: Piece, told: Told, names: Sequence[str]
) -> dict[str, str]:  # fmt: skip
    """Put the piece to the tensors that it changes; the leaves that are not there, with the reasons."""
    of_module = state.wish.strength(number, piece.component, piece.name)
    reasons: dict[str, str] = {}
    for leaf, does in (("weight", piece.family.changes_weight), ("bias", piece.family.changes_bias)):
        if not does(piece.parts):
            continue
        name = (piece.component, f"{piece.name}.{leaf}")
        at = state.places.get(name)
        if at is None:
            reasons[leaf] = f"{state.opened.label} has no {piece.name}.{leaf}"
            if leaf == "bias":
                state.warnings.append(f"{lora.label}: {piece.adapter} changes a bias, and {reasons[leaf]}")
            continue
        shape = _shape_then(state, piece, at) if leaf == "weight" else _shape_of_bias(piece, at)
        if shape is None:
            shapes = {part: list(shape) for part, shape in piece.shapes.items()}
            raise MismatchError(
                lora.label, f"{quote(piece.adapter)} {shapes} does not fit {at.slot.key} {list(at.spec.shape)}"
            )
        if shape != at.spec.shape:
            what = f"{at.slot.key} has {shape[1]:,} inputs now, and had {at.spec.shape[1]:,}"
            state.warnings.append(f"{lora.label}: is for a wider weight: {what}")
        if at.spec.dtype not in ARITHMETIC:
            raise MismatchError(state.opened.label, f"{quote(at.slot.key)} is {at.spec.dtype}, and cannot be changed")
        frame = () if leaf == "bias" else _frame(state, piece, names, shape)
        keys = {at.slot.key, *(slot.key for slot in frame)}
        if (len(keys) > 1 or at.transposed) and not keys.isdisjoint(state.scales):
            what = f"{quote(piece.adapter)} needs more than one scaled weight at once, {quote(at.slot.key)} among them"
            raise MismatchError(lora.label, what, "fuse into the fp16, bf16 or fp32 release instead")
        jobs = state.jobs.setdefault(name, [])
        other = next((j.piece for j in jobs if j.lora == number and j.piece.family is piece.family), None)
        if other is not None:
            what = f"{quote(other.adapter)} and {quote(piece.adapter)} both change {piece.name}"
            raise MismatchError(lora.label, what, "one of them would be added twice; take one of them out")
        strength = of_module * state.factors.get(name, 1.0)
        jobs.append(Job(number, piece, told, strength, leaf == "bias", shape, frame))
    return reasons


def _shape_of_bias(piece: Piece, at: Place) -> Shape | None:
    shape = at.spec.shape
    own = [piece.shapes[part] for part in piece.family.of_bias if part in piece.parts]
    return shape if all(len(s) == len(shape) == 1 and s == shape for s in own) else None


# ------------------------------------------------------------------------------------------------ tasks


def _write(state: _State) -> None:
    """A task for each band that changes, and copies of all else."""
    by_key: dict[str, list[tuple[Name, Place]]] = {}
    for name, at in state.places.items():
        by_key.setdefault(at.slot.key, []).append((name, at))
    touched = {state.places[name].slot.key for name in state.jobs}
    # Scales that are written with their weights, or not at all.
    gone = {scale for weight, scale in state.scales.items() if state.unscaled or weight in touched}
    copies: list[Task] = []
    for key in sorted(state.opened.tensors, key=lambda k: state.opened.tensors[k][1:3]):
        spec = state.opened.tensors[key].spec
        places = by_key.get(key, [])
        if state.unscaled and is_mark(key):
            reason = "says how fp8 codes are used, of which there are none any more"
            state.account.unused.append(Unused(key, state.opened.label, reason, asked=True))
            continue
        if key in gone:
            state.account.used.append(key)
            continue
        state.outputs[key] = becomes(spec, state.wish.dtype)
        scale = state.scale(key)
        if key not in touched:
            unscaled = scale is not None and state.unscaled
            copies.append(_band(state, state.opened.slot(key), Slot(key, state.outputs[key])) if unscaled
                          else carry(key, spec, key, state.wish.dtype))  # fmt: skip
            (state.account.copied if not copies[-1].needs_torch else state.account.used).append(key)
            continue
        state.account.used.append(key)
        if scale is not None and not state.unscaled:
            state.outputs[scale.key] = scale.spec
            _requantise(state, places, scale)
            continue
        for name, at in places:
            slot = Slot(key, becomes(at.slot.spec, state.wish.dtype), at.slot.bands)
            if name in state.jobs:
                slot = _widened(state, name, slot)
                state.tasks.append(_task(state, name, at, slot))
            else:
                copies.append(_band(state, at.slot, slot))
    # Bytes are copied while torch is imported.
    first = [task for task in copies if not task.needs_torch]
    state.modules = {number: task.name for number, task in enumerate(state.tasks, len(first))}
    state.tasks = [*first, *state.tasks, *(task for task in copies if task.needs_torch)]


def _widened(state: _State, name: Name, slot: Slot) -> Slot:
    """The slot with the inputs that jobs add to it."""
    wider = [job.shape for job in state.jobs[name] if math.prod(job.shape) > slot.spec.values]
    if not wider:
        return slot
    spec = TensorSpec(slot.spec.dtype, tuple(map(max, slot.spec.shape, *wider)))
    state.outputs[slot.key] = spec
    return Slot(slot.key, spec)


def _band(state: _State, given: Slot, slot: Slot) -> Task:
    from weightops.ops.produce import cast

    scale = state.scale(given.key)
    if scale is not None:
        return dequantising(given, scale, slot)
    return Task(slot.key, (Input(0, given),), (slot,), None if given.spec.dtype == slot.spec.dtype else cast)


def _requantise(state: _State, places: Sequence[tuple[Name, Place]], scale: Slot) -> None:
    """The task of a scaled key, in which several modules may be packed: they have one scale."""
    bands = []
    for name, at in places:
        slot = _widened(state, name, at.slot) if name in state.jobs else at.slot
        bands.append(Band(at.slot, slot, *_changes(state, state.jobs.get(name, []), at)))
    changed = [".".join(filter(None, name)) for name, _ in places if name in state.jobs]
    other = BESIDE.get(places[0][1].spec.dtype)
    state.tasks.append(requantising(", ".join(changed), bands, scale, seed=state.wish.seed, other=other))


def _changes(
    state: _State, jobs: Sequence[Job], at: Place
) -> tuple[tuple[Input, ...], tuple[Change, ...], bool]:  # fmt: skip
    """What the jobs do to a tensor: their inputs, the changes, and whether its rows depend on each other."""
    spec = at.spec
    whole = at.transposed or any(_needs_all(job.piece, spec.shape) for job in jobs if not job.of_bias)
    inputs = []
    changes = []
    for job in jobs:
        piece = job.piece
        # Rows of a part that are rows of the weight come with each block; other parts come whole.
        uncut = whole or piece.window is not None or piece.family.uniform_rows
        cut = set() if uncut else {*piece.family.rows, "dora_scale"}
        if any(piece.parts[part].spec.rows != spec.rows for part in cut & piece.parts.keys()):
            cut = set()
        stored = state.loras[job.lora].tensors
        for source_part, source in piece.parts.items():
            slot_in = source.rows(stored[source.key].spec)
            inputs.append(Input(job.lora + 1, slot_in, shared=source_part not in cut))
        inputs += [Input(0, slot_in, shared=True) for slot_in in job.frame]
        shape = job.shape if piece.window is None else (piece.window.rows, *spec.shape[1:])
        columns = {part: s.columns for part, s in piece.parts.items() if s.columns is not None}
        changes.append(
            Change(
                piece.family, tuple(piece.parts), frozenset(cut & piece.parts.keys()), columns, piece.alpha,
                job.told, job.strength, shape, job.of_bias, piece.window and piece.window.bands, len(job.frame),
            )
        )  # fmt: skip
    return tuple(inputs), tuple(changes), whole


def _task(state: _State, name: Name, at: Place, slot: Slot) -> Task:
    parts, changes, whole = _changes(state, state.jobs[name], at)
    scale = state.scale(at.slot.key)
    inputs = [Input(0, at.slot), *([] if scale is None else [Input(0, scale, shared=True)]), *parts]
    label = ".".join(filter(None, name))
    other = BESIDE.get(slot.spec.dtype)
    compute = fused(
        changes, name=label, seed=state.wish.seed, other=other, whole=whole, transposed=at.transposed,
        scaled=scale is not None,
    )  # fmt: skip
    return Task(
        label, tuple(inputs), (slot,), compute, Grain.TENSOR if whole else Grain.ROWS,
        work_nbytes=work_nbytes(
            changes, parts, at.spec, slot.spec, seed=state.wish.seed, whole=whole, scaled=scale is not None
        ),
    )  # fmt: skip


def _groups(state: _State) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    changed = {state.places[name].slot.key for name in state.jobs}
    changed |= {state.scales[key] for key in changed & state.scales.keys()}
    for key, component in state.identity.components.items():
        entry = found.setdefault(component, {"component": component, "tensors": 0, "fused": 0, "cast": 0, "copied": 0})
        entry["tensors"] += 1
        if key not in state.outputs:
            entry["dropped"] = entry.get("dropped", 0) + 1
            continue
        same = state.outputs[key].dtype == state.opened.tensors[key].spec.dtype
        entry["fused" if key in changed else "copied" if same else "cast"] += 1
    return list(found.values())
