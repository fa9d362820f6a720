"""From a file's spelling to canonical names and back, as Slots: bands of rows, and a mark for the one transposition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightops.files.dtypes import DTYPES
from weightops.files.tensor import Slot, TensorInfo, TensorSpec
from weightops.naming.keymap import Claim, Rule, Table, heights, swaps

if TYPE_CHECKING:
    from collections.abc import Mapping

Bands = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a canonical tensor is: a slot of the file, whose rows are the tensor's; or, `transposed`, all of a key.

    `slot.spec` has the tensor's own shape, and where it is transposed the stored one.
    """

    slot: Slot
    transposed: bool = False

    @property
    def spec(self) -> TensorSpec:
        spec = self.slot.spec
        return TensorSpec(spec.dtype, spec.shape[::-1]) if self.transposed else spec


@dataclass(frozen=True, slots=True)
class Placing:
    """places: canonical name -> where it is. left: keys that the table does not place, with reasons."""

    places: Mapping[str, Place]
    left: Mapping[str, str]


def place(table: Table, bodies: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> Placing:
    """Where the file has each canonical tensor. bodies: key -> its name within the component."""
    specs = {body: tensors[key].spec for key, body in bodies.items()}
    places: dict[str, Place] = {}
    left: dict[str, str] = {}
    for key, body in bodies.items():
        claim = table.claim(body)
        if claim is None:
            left[key] = f"no tensor of {table.network} is called so"
            continue
        found = _bands(claim, body, specs)
        if isinstance(found, str):
            left[key] = found
            continue
        spec = _unsquared(claim.rule, specs[body])
        for name, bands in zip(claim.names, found, strict=True):
            if name in places:
                left[key] = f"says the same as {places[name].slot.key}"
                continue
            own = spec if bands is None else spec.with_rows(sum(stop - start for start, stop in bands))
            places[name] = Place(Slot(key, own, bands), claim.rule.transposed)
    return Placing(places, left)


def _bands(claim: Claim, body: str, specs: Mapping[str, TensorSpec]) -> list[Bands | None] | str:
    """The rows of each canonical tensor within a stored one; a reason where they cannot be told."""
    rule, spec = claim.rule, specs[body]
    if claim.suffix:
        return [None] * len(claim.names)
    weight = specs.get(body.removesuffix("bias") + "weight", spec)
    features = weight.shape[1] if len(weight.shape) > 1 else None
    swapped = swaps(rule, spec.rows, features)
    if swapped is None:
        return "its weight, which would tell whether its halves trade places, is not there"
    if len(claim.names) == 1 and not swapped:
        return [None]
    if spec.rows * spec.row_nbytes != spec.nbytes or DTYPES[spec.dtype].bits % 8:
        return f"its {spec.dtype} rows do not fill whole bytes, and cannot be taken apart"
    if swapped:
        half, odd = divmod(spec.rows, 2)
        return f"{spec.rows} rows have no halves" if odd else [((half, spec.rows), (0, half))]
    bands = heights(rule, spec.rows, features)
    if bands is None:
        return f"{spec.rows} rows cannot be cut into {', '.join(n.rpartition('.')[0] for n in claim.names)}"
    found: list[Bands | None] = []
    start = 0
    for height in bands:
        found.append(((start, start + height),))
        start += height
    return found


def _unsquared(rule: Rule, spec: TensorSpec) -> TensorSpec:
    """A 1x1 convolution as the matrix that it is; the bytes are the same."""
    square = rule.squared and len(spec.shape) == 4 and spec.shape[2:] == (1, 1)
    return TensorSpec(spec.dtype, spec.shape[:2]) if square else spec


@dataclass(frozen=True, slots=True)
class Written:
    """Tensors in another spelling. outputs: name in it -> spec. places: canonical name -> where it goes.

    left: canonical names that the spelling cannot write, with reasons.
    """

    outputs: Mapping[str, TensorSpec]
    places: Mapping[str, Place]
    left: Mapping[str, str]


def write(table: Table, specs: Mapping[str, TensorSpec]) -> Written:
    """How the table writes canonical tensors of these specs."""
    outputs: dict[str, TensorSpec] = {}
    places: dict[str, Place] = {}
    left: dict[str, str] = {}
    for name, spec in specs.items():
        if name in places or name in left:
            continue
        spelled = table.spelled(name)
        if spelled is None:
            left[name] = f"{table.network} has no such tensor in the spelling {table.spelling}"
            continue
        rule, key, names = spelled
        parts = {n: specs[n] for n in names if n in specs}
        reason = _why_not(rule, key, names, parts)
        if reason is not None:
            left |= dict.fromkeys(parts, reason)
            continue
        if len(names) == 1:
            outputs[key], places[name] = _whole(rule, key, name, spec, specs)
            continue
        start = 0
        if not spec.shape or _is_sidecar(name):
            outputs[key] = spec  # one scale for all of them: the planner checks that it is one
            places[names[0]] = Place(Slot(key, spec))
            left |= dict.fromkeys(names[1:], f"packed into {key}")
            continue
        whole = spec.with_rows(sum(s.rows for s in parts.values()))
        outputs[key] = whole
        for n, part in parts.items():
            places[n] = Place(Slot(key, part, ((start, start + part.rows),)))
            start += part.rows
    return Written(outputs, places, left)


def _why_not(rule: Rule, key: str, names: tuple[str, ...], parts: Mapping[str, TensorSpec]) -> str | None:
    """Why the tensors that one key packs cannot be put together, if they cannot."""
    if len(parts) < len(names):
        missing = ", ".join(n for n in names if n not in parts)
        return f"{key} packs it with {missing}, which is not there"
    if len({(p.dtype, p.shape[1:]) for p in parts.values()}) > 1:
        return f"{key} packs {len(parts)} tensors, whose dtypes or widths differ"
    if len(names) > 1 and DTYPES[next(iter(parts.values())).dtype].bits % 8:
        return f"{key} packs tensors whose rows do not fill whole bytes"
    return None


def _whole(
    rule: Rule, key: str, name: str, spec: TensorSpec, specs: Mapping[str, TensorSpec]
) -> tuple[TensorSpec, Place]:
    if rule.transposed:
        stored = TensorSpec(spec.dtype, spec.shape[::-1])
        return stored, Place(Slot(key, stored), transposed=True)
    if rule.squared and len(spec.shape) == 2:
        return TensorSpec(spec.dtype, (*spec.shape, 1, 1)), Place(Slot(key, spec))
    weight = specs.get(name.removesuffix("bias") + "weight", spec)
    features = weight.shape[1] if len(weight.shape) > 1 else None
    if not _is_sidecar(name) and swaps(rule, spec.rows, features) and spec.rows % 2 == 0:
        half = spec.rows // 2
        return spec, Place(Slot(key, spec, ((half, spec.rows), (0, half))))
    return spec, Place(Slot(key, spec))


def _is_sidecar(name: str) -> bool:
    return name.rpartition(".")[2] not in ("weight", "bias") and name.endswith(
        ("scale_weight", "scale_input", "weight_scale", "weight_scale_2", "input_scale")
    )
