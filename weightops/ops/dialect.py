"""convert, for adapters: the same change of the same modules in another dialect. Factors are copied, cut or joined."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.errors import MismatchError, UsageError, ValueRefused, listing, quote
from weightops.files.dtypes import ARITHMETIC
from weightops.files.folder import OutputFile
from weightops.files.tensor import Slot, TensorSpec
from weightops.lora.adapters import AdapterFile, alphas, read_adapters
from weightops.lora.dialects import DIALECTS, Dialect
from weightops.lora.pieces import Joined, Piece, Source, cut_rows, join, take_apart
from weightops.naming.keymap import ARCHITECTURES, NETWORKS, Architecture, Component, Rule, Table, swaps
from weightops.naming.recognise import row_of
from weightops.ops.produce import Planned, kept_metadata, stem
from weightops.ops.report import Account, Unused
from weightops.plan import Block, Grain, Input, Plan, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from weightops.files.checkpoint import Checkpoint

Fill = tuple[int, tuple[int, int] | None, Source, float | None]

# ComfyUI's names of the text encoders within a model.
_COMFY_ENCODERS = {
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_h": "text_encoders.clip_h.transformer.",
    "clip_bigg": "text_encoders.clip_g.transformer.",
    "t5_xxl": "text_encoders.t5xxl.transformer.",
    "umt5_xxl": "text_encoders.umt5xxl.transformer.",
}

# Families whose strength is alpha / rank, and the part that a folded strength is multiplied into.
_SCALED = {"lora": ("up",), "loha": ("hada_w1_a",), "lokr": ("lokr_w1", "lokr_w1_a")}


@dataclass(slots=True)
class _Unit:
    """An adapter as it is to be written: its module's name in the target, and what fills each part."""

    component: str
    module: str
    family: str
    parts: dict[str, tuple[TensorSpec, tuple[Fill, ...]]]
    alpha: float | None
    rank: int | None
    pieces: tuple[Piece, ...]


@dataclass(slots=True)
class _State:
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
    counts: Counter[str] = field(default_factory=Counter)
    cache: dict[Source, bytes] = field(default_factory=dict)


def plan_dialect(
    opened: Checkpoint, *, to: str, alpha: str = "carry", drop: tuple[str, ...] = (), architecture: str | None = None
) -> Planned:
    """The plan of an adapter file in the dialect `to`. Reads some factors, to see which are shared.

    alpha: "carry" it to where the dialect keeps it, or "fold" the strength into the factors. architecture: the one
    that is meant, where names and shapes fit several; where all of those would be written alike it need not be said.
    Raises MismatchError and FormatError for what cannot be converted exactly.
    """
    found = read_adapters(opened, architecture=architecture)
    if found.architecture is None and found.possible:
        planned = [plan_dialect(opened, to=to, alpha=alpha, drop=drop, architecture=name) for name in found.possible]
        if all(_writes_the_same(p, planned[0]) for p in planned):
            planned[0].warnings.append(
                f"{' and '.join(found.possible)} have modules of these names and sizes, and are written alike"
            )
            return planned[0]
    found.check()
    if not found.adapters:
        raise MismatchError(opened.label, "holds no adapter modules, only embeddings: nothing to convert")
    dialect = DIALECTS[to]
    state = _State(opened, found, dialect, ARCHITECTURES.get(found.architecture or ""))
    pieces = _pieces(state)
    units = [
        unit for component, mine in _by_component(pieces, state).items() for unit in _units(state, component, mine)
    ]
    if drop:
        units = [u for u in units if not (u.component.startswith("text_encoder") and "text_encoder" in drop)]
    if alpha == "fold":
        units = [_folded(u) for u in units]
    for unit in units:
        _write(state, unit)
    account = _account(state, drop)
    metadata, headers = _metadata(state, units)
    files, extras = _files(state, units)
    recipe = {"command": "convert", "version": __version__, "to": to, "alpha": alpha}
    keep = kept_metadata(opened, less=frozenset({"lora_adapter_metadata", "ss_network_dim", "ss_network_alpha"}))
    hashes = {k: f for k, f in (("sshs_model_hash", "{}"), ("modelspec.hash_sha256", "0x{}")) if k in opened.metadata}
    plan = Plan(
        (opened,), state.outputs, tuple(state.tasks), {**keep, **metadata, **headers}, recipe,
        files=files, extras=extras, data_hashes=hashes,
    )  # fmt: skip
    return Planned(plan, account, _summary(state, units, alpha), _groups(units), _warnings(state, units))


def _writes_the_same(a: Planned, b: Planned) -> bool:
    """Do two plans write the same tensors from the same slots?"""

    def tasks(planned: Planned) -> list[Any]:
        return [(t.name, t.inputs, t.outputs) for t in planned.plan.tasks]

    return a.plan.outputs == b.plan.outputs and tasks(a) == tasks(b) and a.plan.extras == b.plan.extras


# ------------------------------------------------------------------------------------------------ what there is


def _pieces(state: _State) -> list[Piece]:
    scales = alphas(state.opened, state.found)
    specs = {key: info.spec for key, info in state.opened.tensors.items()}
    pieces: list[Piece] = []
    for adapter in state.found.adapters:
        strength = scales.get(adapter.name) if adapter.family.name in _SCALED or "alpha" in adapter.keys else None
        pieces += take_apart(adapter, strength, specs, lambda key: _matrix(state, key), state.opened.label)
    seen: dict[tuple[str, str, str], str] = {}
    for piece in pieces:
        place = piece.component, piece.name, piece.family.name
        if place in seen:
            raise MismatchError(
                state.opened.label, f"{quote(seen[place])} and {quote(piece.adapter)} both change {piece.name}"
            )
        seen[place] = piece.adapter
    return pieces


def _by_component(pieces: Iterable[Piece], state: _State) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.component, []).append(piece)
    order = [c.name for c in state.architecture.components]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def _matrix(state: _State, key: str) -> Any:
    """The bits of a matrix, as unsigned integers: enough to see its zeros."""
    import numpy as np

    spec = state.opened.tensors[key].spec
    data = _read(state, Source(key, spec))
    return np.frombuffer(data, dtype=f"u{len(data) // spec.values}").reshape(spec.rows, -1)


def _read(state: _State, source: Source) -> bytes:
    """All bytes of a source whose columns are whole."""
    if source not in state.cache:
        stored = state.opened.tensors[source.key].spec
        slot = source.rows(stored)
        data = bytearray(slot.spec.nbytes)
        state.opened.read_bytes(slot, 0, len(data), memoryview(data))
        found = bytes(data)
        if source.columns is not None:
            found = _columns(found, slot.spec, source.columns)
        state.cache[source] = found
    return state.cache[source]


def _columns(data: bytes, spec: TensorSpec, columns: tuple[int, int]) -> bytes:
    import numpy as np

    width = spec.row_nbytes // spec.shape[1]
    whole = np.frombuffer(data, dtype=np.uint8).reshape(spec.rows, -1)
    return whole[:, columns[0] * width : columns[1] * width].tobytes()


def _same(state: _State) -> Callable[[Source, Source], bool]:
    def same(a: Source, b: Source) -> bool:
        return a == b or (a.spec == b.spec and _read(state, a) == _read(state, b))

    return same


# ------------------------------------------------------------------------------------------------ in other words


def _units(state: _State, component: str, pieces: list[Piece]) -> list[_Unit]:
    """The pieces of a component under the names of the target, those that it packs together joined."""
    place = next(c for c in state.architecture.components if c.name == component)
    table = _table(state, place)
    prefix = _prefix(state, place)
    by_name = {(p.family.name, p.name): p for p in pieces}
    done: set[tuple[str, str]] = set()
    units = []
    for piece in pieces:
        if (piece.family.name, piece.name) in done:
            continue
        spelled = table.spelled_module(piece.name)
        if spelled is None:
            raise MismatchError(
                state.opened.label, f"{piece.name} of the {component} has no name in {state.dialect.name}'s spelling"
            )
        rule, module, names = spelled
        if state.dialect.name in ("kohya", "onetrainer"):
            module = module.replace(".", "_")
        if len(names) == 1:
            units.append(_single(state, piece, rule, prefix + module))
            continue
        group = [by_name.get((piece.family.name, name)) for name in names]
        done |= {(piece.family.name, name) for name in names}
        rows = [_rows_of(state, place, name, group, rule, n) for n, name in enumerate(names)]
        joined = join(group, rows, _same(state), state.opened.label, prefix + module)
        units.append(_joined(piece, prefix + module, joined, tuple(p for p in group if p is not None)))
        state.counts["joined"] += 1
        state.counts["folded"] += joined.folded
    return units


def _table(state: _State, place: Component) -> Table:
    network = NETWORKS.get(place.network)
    spelling = {
        "kohya": place.kohya_spelling,
        "comfy": place.comfy_spelling or place.spelling if not place.name.startswith("text_encoder") else "",
    }.get(state.dialect.name, "")
    return network.tables()[spelling or network.canonical]


def _prefix(state: _State, place: Component) -> str:
    """What stands before the names of a component's modules."""
    encoder = place.name.startswith("text_encoder")
    if state.dialect.name == "kohya":
        if not place.kohya:
            raise MismatchError(state.opened.label, f"kohya has no names for the {place.name} of {place.network}")
        return place.kohya + "_"
    if state.dialect.name == "onetrainer":
        encoders = [c.name for c in state.architecture.components if c.name.startswith("text_encoder")]
        number = str(encoders.index(place.name) + 1) if encoder and len(encoders) > 1 else ""
        return f"lora_te{number}_" if encoder else f"lora_{place.name}_"
    if state.dialect.name == "comfy":
        return _COMFY_ENCODERS[place.variant or place.network] if encoder else "diffusion_model."
    # Several components' folders may hold the same names: until they are written, a NUL keeps them apart.
    return f"{place.name}\0base_model.model." if state.dialect.name == "peft" else f"{place.name}."


def _single(state: _State, piece: Piece, rule: Rule, module: str) -> _Unit:
    parts = dict(piece.parts)
    if rule.swapped or rule.swapped_when is not None:
        shape = piece.family.shape({part: s.spec.shape for part, s in parts.items()})
        rows = shape[0] if shape else next(parts[p].spec.rows for p in piece.family.rows if p in parts)
        features = shape[1] if shape is not None and len(shape) > 1 else None
        swapped = swaps(rule, rows, features)
        if swapped is None:
            raise MismatchError(
                state.opened.label, f"{quote(piece.adapter)}: do its halves trade places? No shape tells"
            )
        if swapped:
            bands = ((rows // 2, rows), (0, rows // 2))
            parts = cut_rows(parts, piece.family, piece.adapter, bands, rows, state.opened.label)
    filled: dict[str, tuple[TensorSpec, tuple[Fill, ...]]] = {
        part: (source.spec, ((0, None, source, None),)) for part, source in parts.items()
    }
    return _Unit(piece.component, module, piece.family.name, filled, piece.alpha, piece.rank, (piece,))


def _joined(piece: Piece, module: str, joined: Joined, pieces: tuple[Piece, ...]) -> _Unit:
    parts = dict(joined.parts)
    rank = piece.family.rank({part: spec.shape for part, (spec, _) in parts.items()})
    return _Unit(piece.component, module, piece.family.name, parts, joined.alpha, rank, pieces)


def _rows_of(
    state: _State, place: Component, name: str, group: Sequence[Piece | None], rule: Rule, number: int
) -> int | None:
    """The rows of a module that the file does not change: from its equals in the pack, or the architecture's sizes."""
    there = next(p for p in group if p is not None)
    if group[number] is not None:
        return None
    shape = there.family.shape({part: s.spec.shape for part, s in there.parts.items()})
    if set(rule.heights) == {"="}:
        return shape[0] if shape is not None else None
    if rule.heights[number] == "in":
        return shape[1] if shape is not None and len(shape) > 1 else None
    network = NETWORKS.get(place.network)
    rows = {
        row[0]
        for v in network.variants
        if (row := row_of(f"{name}.weight", v.shapes)) is not None
        and (state.found.variant in (None, v.name))
        and (shape is None or len(row) < 2 or row[1] in (None, shape[1]))
    }
    return rows.pop() if len(rows) == 1 else None


def _folded(unit: _Unit) -> _Unit:
    """The strength alpha / rank multiplied into one factor, and no alpha."""
    if unit.family not in _SCALED or unit.alpha is None or not unit.rank:
        return unit if unit.family not in _SCALED else replace(unit, alpha=None)
    strength = unit.alpha / unit.rank
    parts = dict(unit.parts)
    for part in (*_SCALED[unit.family], "bias"):
        if part in parts and strength != 1.0:
            spec, fills = parts[part]
            parts[part] = spec, tuple((r, c, s, strength * (f or 1.0)) for r, c, s, f in fills)
    return replace(unit, parts=parts, alpha=None)


# ------------------------------------------------------------------------------------------------ tasks


def _write(state: _State, unit: _Unit) -> None:
    """The tasks that write an adapter."""
    for part, (spec, fills) in unit.parts.items():
        key = unit.module + _ending(state, unit, part)
        _claim_output(state, key, _written_shape(state, part, spec), unit)
        _fill(state, key, state.outputs[key] if len(fills) == 1 else spec, fills)
    in_config = state.dialect.alpha != "tensor" and unit.family == "lora"
    if in_config or (state.dialect.folder and unit.family in _SCALED):
        state.used |= {k for k in (_alpha_key(state, p) for p in unit.pieces) if k is not None}
        return
    value = unit.alpha
    if value is None and state.dialect.name in ("kohya", "onetrainer") and unit.family in _SCALED:
        value = unit.rank
    if value is not None:
        _write_alpha(state, unit, float(value))


def _ending(state: _State, unit: _Unit, part: str) -> str:
    return state.dialect.endings[part]


def _written_shape(state: _State, part: str, spec: TensorSpec) -> TensorSpec:
    """PEFT keeps a linear layer's magnitudes in one axis, and a convolution's as [1, out, 1, 1]."""
    if part != "dora_scale" or state.dialect.alpha == "tensor":
        return spec
    if spec.shape[:1] == (1,) and spec.values != 1:
        raise MismatchError(
            state.opened.label,
            f"a magnitude for each input, {list(spec.shape)}, has no place in {state.dialect.name}'s DoRA, "
            "which has one for each output",
            "kohya, comfy and onetrainer can hold it",
        )
    return TensorSpec(spec.dtype, (spec.values,) if len(spec.shape) < 3 else (1, spec.values, 1, 1))


def _claim_output(state: _State, key: str, spec: TensorSpec, unit: _Unit) -> None:
    if key in state.outputs:
        raise MismatchError(state.opened.label, f"two of its tensors would be called {quote(key)}")
    state.outputs[key] = spec
    state.homes[key] = unit.component


def _fill(state: _State, key: str, spec: TensorSpec, fills: Sequence[Fill]) -> None:
    placed = any(columns is not None or fold is not None or s.columns is not None for _, columns, s, fold in fills)
    keys = {source.key for _, _, source, _ in fills}
    if not placed:
        position = 0
        for row, _, source, _ in fills:
            if row > position:
                _zeros(state, key, spec, position, row)
            own = source.spec if len(fills) > 1 else spec
            bands = ((row, row + source.spec.rows),) if len(fills) > 1 else None
            stored = source.rows(state.opened.tensors[source.key].spec)
            state.tasks.append(Task(key, (Input(0, stored),), (Slot(key, own, bands),)))
            position = row + source.spec.rows
        if len(fills) > 1 and position < spec.rows:
            _zeros(state, key, spec, position, spec.rows)
        state.copied |= keys
        return
    state.used |= keys
    if any(fold is not None for *_, fold in fills) and spec.dtype not in ARITHMETIC:
        raise MismatchError(state.opened.label, f"{quote(key)} is {spec.dtype}, and cannot be multiplied")
    inputs = tuple(Input(0, s.rows(state.opened.tensors[s.key].spec)) for _, _, s, _ in fills)
    raw = all(fold is None for *_, fold in fills)
    compute = _placing(spec, fills) if raw else _placing_scaled(fills)
    state.tasks.append(
        Task(key, inputs, (Slot(key, spec),), compute, Grain.TENSOR, work_nbytes=8 * spec.values, raw=raw)
    )


def _zeros(state: _State, key: str, spec: TensorSpec, start: int, stop: int) -> None:
    def compute(_inputs: Sequence[memoryview], outputs: Sequence[memoryview], _block: Block) -> None:
        outputs[0][:] = bytes(len(outputs[0]))

    slot = Slot(key, spec.with_rows(stop - start), ((start, stop),))
    state.tasks.append(Task(key, (), (slot,), compute, Grain.TENSOR, raw=True))


def _placing(spec: TensorSpec, fills: Sequence[Fill]) -> Callable[[Any, Any, Block], None]:
    """Copy each source to its rows and columns of a matrix of zeros, as bytes."""

    def compute(inputs: Sequence[memoryview], outputs: Sequence[memoryview], _block: Block) -> None:
        import numpy as np

        size = spec.nbytes // spec.values
        whole = np.frombuffer(outputs[0], dtype=np.uint8).reshape(spec.rows, -1)
        whole[:] = 0
        for (row, columns, source, _), given in zip(fills, inputs, strict=True):
            values = np.frombuffer(given, dtype=np.uint8).reshape(source.spec.rows, -1)
            if source.columns is not None:
                values = values[:, source.columns[0] * size : source.columns[1] * size]
            start = columns[0] * size if columns is not None else 0
            whole[row : row + len(values), start : start + values.shape[1]] = values

    return compute


def _placing_scaled(fills: Sequence[Fill]) -> Callable[[Any, Any, Block], None]:
    """The same, each source multiplied by its strength, in float64 and rounded once."""

    def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block) -> None:
        from weightops.merging.method import store

        whole = outputs[0].zero_()
        for (row, columns, source, fold), given in zip(fills, inputs, strict=True):
            values = given if source.columns is None else given[:, source.columns[0] : source.columns[1]]
            rows = whole[row : row + len(values)]
            target = rows if columns is None else rows[:, columns[0] : columns[1]]
            store(values.double() * (1.0 if fold is None else fold), target)

    return compute


def _alpha_key(state: _State, piece: Piece) -> str | None:
    adapter = next(a for a in state.found.adapters if a.name == piece.adapter and a.family.name == piece.family.name)
    return adapter.keys.get("alpha")


def _write_alpha(state: _State, unit: _Unit, value: float) -> None:
    """Alpha as the file has it, where it stays; else in the factors' dtype, or in F32 where that cannot hold it."""
    key = unit.module + state.dialect.endings["alpha"]
    given = _alpha_key(state, unit.pieces[0])
    state.used |= {k for k in (_alpha_key(state, p) for p in unit.pieces) if k is not None}
    if given is not None and unit.pieces[0].alpha == value and unit.alpha == value:
        spec = state.opened.tensors[given].spec
        from weightops.lora.adapters import read_number

        if read_number(state.opened, given) == value:
            _claim_output(state, key, spec, unit)
            state.tasks.append(Task(key, (Input(0, Slot(given, spec)),), (Slot(key, spec),)))
            return
    factors = next(iter(unit.parts.values()))[0]
    data, dtype = encode_number(value, factors.dtype)
    spec = TensorSpec(dtype, ())

    def compute(_inputs: Sequence[memoryview], outputs: Sequence[memoryview], _block: Block) -> None:
        outputs[0][:] = data

    _claim_output(state, key, spec, unit)
    state.tasks.append(Task(key, (), (Slot(key, spec),), compute, Grain.TENSOR, raw=True))


def encode_number(value: float, dtype: str) -> tuple[bytes, str]:
    """The bytes of a number in `dtype` where that holds it exactly, else in F32 (or F64); and the dtype."""
    import struct

    short = struct.pack("<f", value)
    if dtype == "BF16" and short[:2] == b"\0\0" and struct.unpack("<f", short)[0] == value:
        return short[2:], "BF16"
    for name, code in (("F16", "<e"), ("F32", "<f"), ("F64", "<d")):
        if name == "F16" and dtype != "F16":
            continue
        try:
            data = struct.pack(code, value)
        except OverflowError:
            continue
        if struct.unpack(code, data)[0] == value:
            return data, name
    raise ValueRefused("alpha", f"found {value}, expected a finite number")


# ------------------------------------------------------------------------------------------------ metadata and files


def _common(values: Iterable[Any]) -> Any:
    counted = Counter(v for v in values if v is not None)
    return counted.most_common(1)[0][0] if counted else None


def _metadata(state: _State, units: Sequence[_Unit]) -> tuple[dict[str, str], dict[str, str]]:
    """kohya's dim and alpha, true of what is written; and diffusers' header."""
    found: dict[str, str] = {}
    if "ss_network_dim" in state.opened.metadata or state.dialect.name == "kohya":
        ranks = {u.rank for u in units if u.rank is not None}
        strengths = {u.alpha if u.alpha is not None else u.rank for u in units if u.rank is not None}
        if ranks:
            found["ss_network_dim"] = str(*ranks) if len(ranks) == 1 else "Dynamic"
            found["ss_network_alpha"] = f"{next(iter(strengths)):g}" if len(strengths) == 1 else "Dynamic"
    headers: dict[str, str] = {}
    if state.dialect.alpha == "header":
        flat: dict[str, Any] = {}
        for component in dict.fromkeys(u.component for u in units):
            mine = [u for u in units if u.component == component and u.family == "lora"]
            if mine and any(u.alpha is not None and u.alpha != u.rank for u in mine):
                flat |= {f"{component}.{k}": v for k, v in _peft_config(mine, f"{component}.").items()}
        if flat:
            headers["lora_adapter_metadata"] = json.dumps(flat, indent=2, sort_keys=True)
    return found, headers


def _peft_config(units: Sequence[_Unit], prefix: str) -> dict[str, Any]:
    """PEFT's LoraConfig of these modules: ranks and alphas, the commonest for all and the others by name."""
    rank = _common(u.rank for u in units)
    strengths = [u.alpha if u.alpha is not None else float(u.rank or 1) for u in units]
    alpha = _common(strengths)
    names = [u.module.removeprefix(prefix) for u in units]
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {n: u.rank for n, u in zip(names, units, strict=True) if u.rank != rank},
        "alpha_pattern": {n: _plain(a) for n, a in zip(names, strengths, strict=True) if a != alpha},
        "target_modules": sorted(names),
        "use_rslora": False,
        "use_dora": any("dora_scale" in u.parts for u in units),
        "lora_bias": any("bias" in u.parts for u in units),
        "bias": "none",
        "lora_dropout": 0.0,
    }


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


_PEFT_TYPES = {"lora": "LORA", "loha": "LOHA", "lokr": "LOKR", "oftv2": "OFT"}


def _files(state: _State, units: Sequence[_Unit]) -> tuple[tuple[OutputFile, ...], dict[str, bytes]]:
    """PEFT's folder: one component in it, or each in a folder of its own."""
    if not state.dialect.folder:
        return (), {}
    components = list(dict.fromkeys(u.component for u in units))
    files, extras = [], {}
    for component in components:
        mine = [u for u in units if u.component == component]
        families = {u.family for u in mine}
        if len(families) > 1 or not families <= _PEFT_TYPES.keys():
            raise MismatchError(
                state.opened.label, f"a PEFT folder holds one family of PEFT's, found {', '.join(sorted(families))}"
            )
        family = families.pop()
        config: dict[str, Any] = _peft_config(mine, f"{component}\0base_model.model.")
        if family != "lora":
            config = {"r": config["r"], "alpha": config["lora_alpha"], "rank_pattern": config["rank_pattern"],
                      "alpha_pattern": config["alpha_pattern"], "target_modules": config["target_modules"]}  # fmt: skip
        config |= {"peft_type": _PEFT_TYPES[family], "task_type": None, "inference_mode": True,
                   "base_model_name_or_path": None, "modules_to_save": None}  # fmt: skip
        folder = f"{component}/" if len(components) > 1 else ""
        keys = {key: key.partition("\0")[2] for key, home in state.homes.items() if home == component}
        files.append(OutputFile(f"{folder}adapter_model.safetensors", keys))
        extras[f"{folder}adapter_config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return tuple(files), extras


# ------------------------------------------------------------------------------------------------ what is said


def _account(state: _State, drop: tuple[str, ...]) -> Account:
    account = Account()
    label = state.opened.label
    for key in state.found.embeddings:
        if state.dialect.folder:
            account.unused.append(Unused(key, label, "an embedding has no place in a PEFT folder", asked=False))
            continue
        spec = state.opened.tensors[key].spec
        state.outputs[key] = spec
        state.tasks.append(Task(key, (Input(0, Slot(key, spec)),), (Slot(key, spec),)))
        state.copied.add(key)
    for key in state.opened.tensors:
        if key in state.used:
            account.used.append(key)
        elif key in state.copied:
            account.copied.append(key)
        elif all(key != u.key for u in account.unused):
            reason = "--drop text_encoder" if drop else "its strength is folded into the factors"
            account.unused.append(Unused(key, label, reason, asked=True))
    account.unused.extend(Unused(key, label, why, asked=False) for key, why in state.opened.left_out)
    return account


def _summary(state: _State, units: Sequence[_Unit], alpha: str) -> str:
    where = {"tensor": "beside the factors", "header": "in the header", "config": "in adapter_config.json"}
    places = {
        where["tensor" if state.dialect.alpha == "header" and u.family != "lora" else state.dialect.alpha]
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


def _groups(units: Sequence[_Unit]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for unit in units:
        entry = found.setdefault(unit.component, {"component": unit.component, "tensors": 0, "modules": 0, "joined": 0})
        entry["modules"] += 1
        entry["tensors"] += len(unit.parts)
        entry["joined"] += len(unit.pieces) > 1
    return list(found.values())


def _warnings(state: _State, units: Sequence[_Unit]) -> list[str]:
    found = []
    if state.counts["folded"]:
        found.append(
            f"{state.counts['folded']} modules that are packed together differ in strength: it is folded into their up"
        )
    families = {u.family for u in units} - {"lora"}
    if state.dialect.name == "diffusers" and families:
        found.append(f"diffusers itself loads no {listing(sorted(families))} in these names; weightops and ComfyUI do")
    return found


def check_words_of_dialect(to: str, alpha: str) -> None:
    """Refuse unknown words."""
    if to not in DIALECTS:
        raise UsageError("--to", f"unknown dialect {quote(to)}", f"known are {', '.join(DIALECTS)}")
    if alpha not in ("carry", "fold"):
        raise UsageError("--alpha", f"found {quote(alpha)}, expected carry or fold")
