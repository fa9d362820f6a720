"""convert, for adapters: the same change of the same modules in another dialect. Factors are copied, cut or joined."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.errors import FormatError, MismatchError, UsageError, listing, quote
from weightops.files.tensor import Slot, TensorSpec
from weightops.lora.adapters import AdapterFile, alphas, read_adapters, read_number
from weightops.lora.dialects import DIALECTS, Dialect
from weightops.lora.pieces import Piece, Source, take_apart
from weightops.lora.settings import HEADER, decompose_factor
from weightops.lora.units import STRENGTH_GOES_INTO, Target, Unit, folded, units_of
from weightops.naming.keymap import ARCHITECTURES, Architecture
from weightops.ops.dialect_settings import APART, folder_of, is_beside, metadata_of, modules_of, refuse_what_peft_lacks
from weightops.ops.filling import constant, copies, fill
from weightops.ops.produce import Planned, kept_metadata, stem
from weightops.ops.report import Account, Unused
from weightops.ops.respell import becomes
from weightops.plan import Input, Plan, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from weightops.files.checkpoint import Checkpoint


@dataclass(slots=True)
class State:
    """The state of planning one conversion."""

    opened: Checkpoint
    found: AdapterFile
    dialect: Dialect
    architecture: Architecture
    outputs: dict[str, TensorSpec] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    copied: set[str] = field(default_factory=set)
    homes: dict[str, str] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    dtype: str = "keep"


def plan_dialect(
    opened: Checkpoint, *, to: str, alpha: str = "carry", drop: tuple[str, ...] = (),
    architecture: str | None = None, dtype: str = "keep",
) -> Planned:  # fmt: skip
    """The plan of an adapter file in the dialect `to`. Reads some factors, to see which are shared.

    alpha: "carry" it to where the dialect keeps it, or "fold" the strength into the factors. architecture: the one
    that is meant, where names and shapes fit several; where all of those would be written alike it need not be said.
    Raises MismatchError and FormatError for what cannot be converted exactly.
    """
    found = read_adapters(opened, architecture=architecture)
    if found.architecture is None and found.possible and not found.problems:
        alike = _alike(opened, to, alpha, drop, found.possible, dtype)
        if alike is not None:
            return alike
    found.check()
    if not found.adapters:
        raise MismatchError(opened.label, "holds no adapter modules, only embeddings: nothing to convert")
    state = State(opened, found, DIALECTS[to], ARCHITECTURES.get(found.architecture or ""), dtype=dtype)
    units = _units(state, drop)
    if not units:
        raise UsageError("--drop", f"leaves nothing of {opened.label} to write")
    if alpha == "fold":
        units = [folded(u) for u in units]
    if state.dialect.alpha != "tensor":
        refuse_what_peft_lacks(state, units)
    for unit in units:
        _write(state, unit)
    account = _account(state)
    metadata, headers = metadata_of(state, units)
    files, extras = folder_of(state, units)
    recipe: dict[str, Any] = {"command": "convert", "version": __version__, "to": to, "alpha": alpha, "dtype": dtype}
    recipe |= {"drop": list(drop)} if drop else {}
    recipe |= {"architecture": architecture} if architecture is not None else {}
    keep = kept_metadata(opened, less=frozenset({HEADER, "ss_network_dim", "ss_network_alpha"}))
    hashes = {k: f for k, f in (("sshs_model_hash", "{}"), ("modelspec.hash_sha256", "0x{}")) if k in opened.metadata}
    plan = Plan(
        (opened,), state.outputs, tuple(state.tasks), {**keep, **metadata, **headers}, recipe,
        files=files, extras=extras, data_hashes=hashes,
    )  # fmt: skip
    return Planned(plan, account, _summary(state, units, alpha), _groups(units), _warnings(state, units))


def _alike(
    opened: Checkpoint, to: str, alpha: str, drop: tuple[str, ...], possible: tuple[str, ...], dtype: str
) -> Planned | None:
    """The plan for any of these architectures, where all of them would be written alike."""
    planned = []
    for name in possible:
        try:
            planned.append(plan_dialect(opened, to=to, alpha=alpha, drop=drop, architecture=name, dtype=dtype))
        except MismatchError:
            return None
    first = planned[0].plan
    for other in (p.plan for p in planned[1:]):
        if first.outputs != other.outputs or first.extras != other.extras or first.metadata != other.metadata:
            return None
        if [(t.name, t.inputs, t.outputs) for t in first.tasks] != [(t.name, t.inputs, t.outputs) for t in other.tasks]:
            return None
    planned[0].warnings.append(f"{' and '.join(possible)} have modules of these names and sizes, and are written alike")
    return planned[0]


# ------------------------------------------------------------------------------------------------ what there is


def _units(state: State, drop: tuple[str, ...]) -> list[Unit]:
    """What is to be written, component by component in the architecture's order."""
    target = Target(state.dialect, state.architecture, state.found.variant, state.opened.label)
    found: dict[str, list[Piece]] = {}
    for piece in pieces_of(state, drop):
        found.setdefault(piece.component, []).append(piece)
    order = [c.name for c in state.architecture.components]
    components = sorted(found, key=order.index)
    return [unit for name in components for unit in units_of(target, name, found[name], _same(state))]


def pieces_of(state: State, drop: tuple[str, ...]) -> list[Piece]:
    scales = alphas(state.opened, state.found)
    specs = {key: info.spec for key, info in state.opened.tensors.items()}
    pieces: list[Piece] = []
    for adapter in state.found.adapters:
        if "text_encoder" in drop and (adapter.component or "").startswith("text_encoder"):
            state.dropped.update(adapter.keys.values())
            continue
        scaled = adapter.family.name in STRENGTH_GOES_INTO or "alpha" in adapter.keys
        strength = scales.get(adapter.name) if scaled else None
        if strength is not None and not math.isfinite(strength):
            what = f"{quote(adapter.name)} has alpha {strength}, expected a finite number"
            raise FormatError(state.opened.label, what)
        pieces += take_apart(adapter, strength, specs, lambda key, rows: _filled(state, key, rows), state.opened.label)
    seen: dict[tuple[str, str, str], str] = {}
    for piece in pieces:
        place = piece.component, piece.name, piece.family.name
        if place in seen:
            what = f"{quote(seen[place])} and {quote(piece.adapter)} both change {piece.name}"
            raise MismatchError(state.opened.label, what)
        seen[place] = piece.adapter
    return pieces


def _filled(state: State, key: str, rows: int) -> Any:
    """The first rows of a matrix, true where a value is not zero to the bit."""
    import numpy as np

    spec = state.opened.tensors[key].spec.with_rows(rows)
    data = read_source(state, Source(key, spec, ((0, rows),)))
    return np.frombuffer(data, dtype=np.uint8).reshape(rows, spec.shape[1], -1).any(axis=2)


def read_source(state: State, source: Source) -> bytes:
    """All bytes of a source."""
    slot = source.rows(state.opened.tensors[source.key].spec)
    data = bytearray(slot.spec.nbytes)
    state.opened.read_bytes(slot, 0, len(data), memoryview(data))
    return bytes(data) if source.columns is None else _columns(data, slot.spec, source.columns)


def _columns(data: bytearray, spec: TensorSpec, columns: tuple[int, int]) -> bytes:
    import numpy as np

    width = spec.row_nbytes // spec.shape[1]
    whole = np.frombuffer(data, dtype=np.uint8).reshape(spec.rows, -1)
    return whole[:, columns[0] * width : columns[1] * width].tobytes()


def _same(state: State) -> Callable[[Source, Source], bool]:
    """Do two factors that packed modules may share hold the same bytes?"""

    def same(a: Source, b: Source) -> bool:
        return a == b or (a.spec == b.spec and read(a) == read(b))

    # Each is compared with its neighbours alone; kept for longer, all factors of an adapter would fill the memory.
    read = functools.lru_cache(maxsize=4)(lambda source: read_source(state, source))
    return same


# ------------------------------------------------------------------------------------------------ tasks


def _write(state: State, unit: Unit) -> None:
    """The tasks that write an adapter."""
    for part, (spec, fills) in unit.parts.items():
        key = _key(state, unit, part)
        written = becomes(_written_spec(state, part, spec), state.dtype)
        spec = becomes(spec, state.dtype)
        if any(f.source.spec.dtype != spec.dtype for f in fills):
            fills = tuple(f._replace(strength=1.0 if f.strength is None else f.strength) for f in fills)
        state.outputs[key] = written
        state.tasks += fill(key, written if len(fills) == 1 else spec, fills, state.opened.tensors, state.opened.label)
        (state.copied if copies(fills) else state.used).update(f.source.key for f in fills)
    given = {p.alpha_key for p in unit.pieces if p.alpha_key is not None}
    value = unit.alpha
    if is_beside(state.dialect, unit.family):
        state.used |= given if unit.rank is not None else set()
        return
    if value is None and state.dialect.flat and unit.family in STRENGTH_GOES_INTO:
        value = unit.rank
    if value is not None:
        state.used |= given
        _write_alpha(state, unit, float(value))


def _key(state: State, unit: Unit, part: str) -> str:
    """The name of a part in the output, claimed for it."""
    key = unit.name + state.dialect.endings[part]
    key = f"{unit.component}{APART}{key}" if state.dialect.folder else key
    if key in state.outputs:
        raise MismatchError(state.opened.label, f"two of its tensors would be called {quote(key)}")
    state.homes[key] = unit.component
    return key


def _written_spec(state: State, part: str, spec: TensorSpec) -> TensorSpec:
    """PEFT keeps a linear layer's magnitudes in one axis, and a convolution's as [1, out, 1, 1]."""
    if part != "dora_scale" or state.dialect.alpha == "tensor":
        return spec
    return TensorSpec(spec.dtype, (spec.values,) if len(spec.shape) < 3 else (1, spec.values, 1, 1))


def _write_alpha(state: State, unit: Unit, value: float) -> None:
    """Alpha as the file has it, where it stays; else in the factors' dtype, or in F32 where that cannot hold it."""
    key = _key(state, unit, "alpha")
    given = unit.pieces[0].alpha_key
    if given is not None and unit.pieces[0].alpha == value == read_number(state.opened, given):
        spec = state.opened.tensors[given].spec
        state.outputs[key] = spec
        state.tasks.append(Task(key, (Input(0, Slot(given, spec)),), (Slot(key, spec),)))
        return
    task, spec = constant(key, value, becomes(next(iter(unit.parts.values()))[0], state.dtype).dtype)
    state.outputs[key] = spec
    state.tasks.append(task)


# ------------------------------------------------------------------------------------------------ what is said


def _account(state: State) -> Account:
    account = Account()
    label = state.opened.label
    embeddings = set(state.found.embeddings)
    for key in state.found.embeddings if not state.dialect.folder else ():
        spec = state.opened.tensors[key].spec
        state.outputs[key] = spec
        state.tasks.append(Task(key, (Input(0, Slot(key, spec)),), (Slot(key, spec),)))
        state.copied.add(key)
    for key in state.opened.tensors:
        if key in state.used:
            account.used.append(key)
        elif key in state.copied:
            account.copied.append(key)
        elif key in state.dropped:
            account.unused.append(Unused(key, label, "--drop text_encoder", asked=True))
        elif key in embeddings:
            account.unused.append(Unused(key, label, "an embedding has no place in a PEFT folder", asked=False))
        else:
            account.unused.append(Unused(key, label, _why_no_alpha(state, key), asked=True))
    account.unused.extend(Unused(key, label, why, asked=False) for key, why in state.opened.left_out)
    return account


def _why_no_alpha(state: State, key: str) -> str:
    ranked = any(key == a.keys.get("alpha") and a.rank is not None for a in state.found.adapters)
    return "its strength is folded into the factors" if ranked else "two whole LoKr factors have strength 1"


def _summary(state: State, units: Sequence[Unit], alpha: str) -> str:
    where = {"tensor": "beside the factors", "header": "in the header", "config": "in adapter_config.json"}
    places = {
        where[state.dialect.alpha if is_beside(state.dialect, u.family) else "tensor"]
        for u in units
        if u.alpha is not None
    }
    said = f"alpha carried {' and '.join(sorted(places))}" if places else "no alpha: strength 1"
    if alpha == "fold":
        said = "alpha folded into the factors"
    return (
        f"{stem(state.opened)}, {state.architecture.title}: {len(units):,} modules, "
        f"{state.found.dialect} → {state.dialect.name}, {said}"
    )


def _groups(units: Iterable[Unit]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for unit in units:
        entry = found.setdefault(unit.component, {"component": unit.component, "tensors": 0, "modules": 0, "joined": 0})
        entry["modules"] += 1
        entry["tensors"] += len(unit.parts)
        entry["joined"] += len(unit.pieces) > 1
    return list(found.values())


def _warnings(state: State, units: Sequence[Unit]) -> list[str]:
    found = []
    count = sum(u.folded for u in units)
    if count:
        found.append(f"{count} modules that are packed together differ in strength: it is folded into their up")
    if state.dialect.folder and any(u.family == "lokr" for u in units) and decompose_factor(modules_of(units)) is None:
        found.append("PEFT would share out these LoKr modules to other factors, and cannot load them; weightops can")
    families = {u.family for u in units} - {"lora"}
    if state.dialect.name == "diffusers" and families == {"lokr"} and state.architecture.name in _LOKR_IN_DIFFUSERS:
        if any(u.alpha is not None for u in units):
            found.append("diffusers itself loads LoKr of this model without alphas: --alpha fold")
    elif state.dialect.name == "diffusers" and families:
        found.append(f"diffusers itself loads no {listing(sorted(families))} in these names; weightops and ComfyUI do")
    return found


# Source: diffusers 0.42, loaders/lora_pipeline.py.
_LOKR_IN_DIFFUSERS = ("flux2", "z_image")
