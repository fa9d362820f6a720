"""The plan of a fuse: which adapter changes which band of which tensor. From headers, alphas and settings alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.errors import FormatError, MismatchError, quote
from weightops.files.dtypes import ARITHMETIC
from weightops.files.tensor import Slot, TensorSpec
from weightops.lora.adapters import Adapter, AdapterFile, alphas, read_adapters
from weightops.lora.family import can_change, grain_of
from weightops.lora.pieces import Piece, Source, take_apart
from weightops.naming.identify import Identity, identify, quantised
from weightops.naming.keymap import Rule, Table
from weightops.naming.slots import Place, place
from weightops.ops.changes import BAND_VALUES, Change, fused
from weightops.ops.produce import Planned, kept_metadata, stem
from weightops.ops.report import Account, Unused
from weightops.ops.respell import becomes, carry
from weightops.plan import Grain, Input, Plan, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightops.files.checkpoint import Checkpoint

Name = tuple[str, str]

# What another dtype would keep is worth saying where the one that is written keeps little.
_BESIDE = {"BF16": "float16", "F16": "float32", "F8_E4M3": "bfloat16", "F8_E5M2": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked of a fuse. strength: of a LoRA (its number) in a component and canonical module."""

    strength: Callable[[int, str, str], float]
    dtype: str = "keep"
    seed: int | None = None
    strict: bool = False
    allow_nonfinite: bool = False
    said: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Job:
    """A change of one tensor by a piece of LoRA number `lora`."""

    lora: int
    piece: Piece
    strength: float
    of_bias: bool


@dataclass(slots=True)
class _State:
    opened: Checkpoint
    identity: Identity
    loras: Sequence[Checkpoint]
    wish: Wish
    places: dict[Name, Place] = field(default_factory=dict)
    own: Table | None = None
    jobs: dict[Name, list[Job]] = field(default_factory=dict)
    account: Account = field(default_factory=Account)
    outputs: dict[str, TensorSpec] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def plan_fuse(opened: Checkpoint, loras: Sequence[Checkpoint], wish: Wish) -> tuple[Planned, list[str]]:
    """The plan, and for each of its first tasks the module that it changes. Raises WeightopsError."""
    identity = identify(opened.tensors)
    _check(opened, identity)
    state = _State(opened, identity, loras, wish)
    _place(state)
    for number, lora in enumerate(loras):
        _take(state, number, lora)
    if not state.jobs:
        reasons = list(dict.fromkeys(u.reason for u in state.account.unused))
        raise MismatchError(
            ", ".join(lora.label for lora in loras),
            f"changes nothing of {opened.label}: the result would be a copy",
            "; ".join(reasons[:3]) or None,
        )
    _write(state)
    state.account.unused.extend(Unused(path, opened.label, why, asked=True) for path, why in opened.left_out)
    if wish.strict:
        state.account.refuse_surprises("--strict")
    recipe = {"command": "fuse", "version": __version__, "dtype": wish.dtype, **wish.said}
    plan = Plan(
        (opened, *loras), state.outputs, tuple(state.tasks), kept_metadata(opened), recipe,
        refuse_nonfinite=not wish.allow_nonfinite,
    )  # fmt: skip
    words = f"{stem(opened)} + " + " + ".join(stem(lora) for lora in loras)
    return Planned(plan, state.account, words, _groups(state), state.warnings), state.modules


def _check(opened: Checkpoint, identity: Identity) -> None:
    if not opened.tensors:
        raise MismatchError(opened.label, "holds no tensors: nothing to fuse into")
    if identity.kind == "lora":
        raise MismatchError(opened.label, "is a LoRA, expected a checkpoint", "the checkpoint comes first")
    key = quantised(opened.tensors)
    if key is not None:
        raise MismatchError(
            opened.label,
            f"is quantised: {quote(key)} scales weights that mean nothing without it",
            "fuse into the fp16, bf16 or fp32 release instead",
        )


# ------------------------------------------------------------------------------------------------ where things are


def _place(state: _State) -> None:
    """Where the checkpoint has each canonical tensor; of an unknown one, its own names are the table."""
    for component, part in state.identity.parts.items():
        if part.match is not None and component != "ema":
            for name, found in place(part.match.table, part.bodies, state.opened.tensors).places.items():
                state.places[component, name] = found
    if state.identity.architecture is None or not state.places:
        modules = {key.rpartition(".")[0] for key in state.opened.tensors if key.endswith((".weight", ".bias"))}
        for beginning in ("model.diffusion_model.", "diffusion_model.", ""):
            if beginning == "" or all(m.startswith(beginning) for m in modules):
                break
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
        found.check()
        if found.architecture not in (None, state.identity.architecture):
            raise MismatchError(
                lora.label, f"is for {found.architecture}, but {state.opened.label} is {state.identity.architecture}"
            )
    else:
        _check_generic(found)
    strengths = alphas(lora, found)
    specs = {key: info.spec for key, info in lora.tensors.items()}
    for key in found.embeddings:
        state.account.unused.append(Unused(key, lora.label, "an embedding: prompts use it, no weight holds it", False))
    for adapter in found.adapters:
        alpha = strengths.get(adapter.name)
        if alpha is not None and not math.isfinite(alpha):
            raise FormatError(lora.label, f"{quote(adapter.name)} has alpha {alpha}, expected a finite number")
        pieces = _pieces(state, adapter, alpha, specs, lora.label)
        if isinstance(pieces, str):
            _unused(state, lora, adapter, pieces)
            continue
        reasons = [_job(state, number, lora, piece) for piece in pieces]
        if all(reason is not None for reason in reasons):
            _unused(state, lora, adapter, next(r for r in reasons if r is not None))
        else:
            state.account.used.extend(adapter.keys.values())
    state.account.unused.extend(Unused(path, lora.label, why, asked=True) for path, why in lora.left_out)


def _check_generic(found: AdapterFile) -> None:
    """Refuse what is wrong with the file itself; whose names these are, the checkpoint will say."""
    if found.indexed or found.problems or found.left:
        found.check()


def _unused(state: _State, lora: Checkpoint, adapter: Adapter, reason: str) -> None:
    state.account.unused.extend(Unused(key, lora.label, reason, asked=False) for key in adapter.keys.values())


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
        parts = {part: Source(key, specs[key]) for part, key in adapter.keys.items() if part != "alpha"}
        return [Piece("", claim.names[0], adapter.family, parts, alpha, adapter.name)]
    if adapter.target is None or adapter.component is None:
        return "its module is not known"
    if all((adapter.component, f"{n}.{leaf}") not in state.places for n in adapter.target.names for leaf in _LEAVES):
        held = any(component == adapter.component for component, _ in state.places)
        return f"{state.opened.label} has no {adapter.target.names[0] if held else adapter.component}"
    return take_apart(adapter, alpha, specs, lambda _key, _bands: _Dense(), label)


_LEAVES = ("weight", "bias")


def _job(state: _State, number: int, lora: Checkpoint, piece: Piece) -> str | None:
    """Put the piece to the tensors that it changes; the reason where there is none."""
    strength = state.wish.strength(number, piece.component, piece.name)
    reason: str | None = f"{state.opened.label} has no {piece.name}"
    for leaf, does in (("weight", piece.family.changes_weight), ("bias", piece.family.changes_bias)):
        if not does(piece.parts):
            continue
        name = (piece.component, f"{piece.name}.{leaf}")
        at = state.places.get(name)
        if at is None:
            reason = f"{state.opened.label} has no {piece.name}.{leaf}"
            if leaf == "bias":
                state.warnings.append(f"{lora.label}: {piece.adapter} changes a bias, and {reason}")
            continue
        if leaf == "weight" and not can_change(piece.family, piece.shapes, at.spec.shape):
            shapes = {part: list(shape) for part, shape in piece.shapes.items()}
            raise MismatchError(
                lora.label, f"{quote(piece.adapter)} {shapes} does not fit {at.slot.key} {list(at.spec.shape)}"
            )
        if at.spec.dtype not in ARITHMETIC:
            raise MismatchError(state.opened.label, f"{quote(at.slot.key)} is {at.spec.dtype}, and cannot be changed")
        state.jobs.setdefault(name, []).append(Job(number, piece, strength, leaf == "bias"))
        reason = None
    return reason


# ------------------------------------------------------------------------------------------------ tasks


def _write(state: _State) -> None:
    """A task for each band that changes, and copies of all else."""
    by_key: dict[str, list[tuple[Name, Place]]] = {}
    for name, at in state.places.items():
        by_key.setdefault(at.slot.key, []).append((name, at))
    copies: list[Task] = []
    for key in sorted(state.opened.tensors, key=lambda k: state.opened.tensors[k][1:3]):
        spec = state.opened.tensors[key].spec
        places = by_key.get(key, [])
        state.outputs[key] = becomes(spec, state.wish.dtype)
        if not any(name in state.jobs for name, _ in places):
            copies.append(carry(key, spec, key, state.wish.dtype))
            (state.account.copied if not copies[-1].needs_torch else state.account.used).append(key)
            continue
        state.account.used.append(key)
        for name, at in places:
            slot = Slot(key, becomes(at.slot.spec, state.wish.dtype), at.slot.bands)
            if name in state.jobs:
                state.tasks.append(_task(state, name, at, slot))
                state.modules.append(".".join(filter(None, name)))
            else:
                copies.append(_band(at.slot, slot))
    # Copies last: torch is imported while the first weights are read, and they are what the time goes into.
    state.tasks = [*state.tasks, *copies]


def _band(given: Slot, slot: Slot) -> Task:
    from weightops.ops.produce import cast

    return Task(slot.key, (Input(0, given),), (slot,), None if given.spec.dtype == slot.spec.dtype else cast)


def _task(state: _State, name: Name, at: Place, slot: Slot) -> Task:
    jobs = state.jobs[name]
    spec = at.spec
    whole = at.transposed or any(
        not job.of_bias and grain_of(job.piece.family, job.piece.shapes, spec.shape) == "tensor" for job in jobs
    )
    inputs = [Input(0, at.slot)]
    changes = []
    work = 0
    for job in jobs:
        piece = job.piece
        # Rows of a part that are rows of the weight come with each block; other parts come whole.
        cut = set() if whole or piece.family.uniform_rows else {*piece.family.rows, "dora_scale"}
        if any(piece.parts[part].spec.rows != spec.rows for part in cut & piece.parts.keys()):
            cut = set()
        stored = state.loras[job.lora].tensors
        for source_part, source in piece.parts.items():
            slot_in = source.rows(stored[source.key].spec)
            shared = source_part not in cut
            inputs.append(Input(job.lora + 1, slot_in, shared=shared))
            work += slot_in.spec.values if shared else 0
        columns = {part: s.columns for part, s in piece.parts.items() if s.columns is not None}
        changes.append(
            Change(
                piece.family, tuple(piece.parts), frozenset(cut & piece.parts.keys()), columns, piece.alpha,
                job.strength, spec.shape, job.of_bias,
            )
        )  # fmt: skip
    # Six copies of what is changed at a stroke, in float32 or float64.
    values = spec.values if whole else min(spec.values, max(BAND_VALUES, spec.row_values))
    size = 8 if {at.spec.dtype, slot.spec.dtype} & {"F32", "F64"} else 4
    label = ".".join(filter(None, name))
    other = _BESIDE.get(slot.spec.dtype)
    compute = fused(
        changes, name=label, seed=state.wish.seed, other=other, whole=whole, transposed=at.transposed,
    )  # fmt: skip
    return Task(
        label, tuple(inputs), (slot,), compute, Grain.TENSOR if whole else Grain.ROWS,
        work_nbytes=size * (work + 6 * values),
    )  # fmt: skip


def _groups(state: _State) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    changed = {state.places[name].slot.key for name in state.jobs}
    for key, component in state.identity.components.items():
        entry = found.setdefault(component, {"component": component, "tensors": 0, "fused": 0, "cast": 0, "copied": 0})
        entry["tensors"] += 1
        same = state.outputs[key].dtype == state.opened.tensors[key].spec.dtype
        entry["fused" if key in changed else "copied" if same else "cast"] += 1
    return list(found.values())
