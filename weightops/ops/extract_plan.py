"""The plan of an extraction: which matrices two checkpoints both have, and the adapter that is written of them.

From headers alone, and from ranks where the data decide these.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.errors import MismatchError, UsageError, quote
from weightops.files.dtypes import ARITHMETIC
from weightops.files.tensor import Slot, TensorSpec
from weightops.lora.dialects import DIALECTS, Dialect
from weightops.lora.lowrank import factorise_nbytes
from weightops.lora.pieces import within
from weightops.lora.units import Target, Unit
from weightops.naming.identify import Identity, identify, quantised
from weightops.naming.keymap import ARCHITECTURES, Architecture, Rule, swaps
from weightops.naming.slots import Place
from weightops.ops.align import Name, places_of
from weightops.ops.dialect_settings import APART, folder_of, metadata_of
from weightops.ops.difference import extracted, subtracted
from weightops.ops.filling import constant
from weightops.ops.produce import Planned, stem
from weightops.ops.report import Account, Unused, modules
from weightops.ops.respell import becomes
from weightops.plan import Grain, Input, Plan, Task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightops.files.checkpoint import Checkpoint

# Tables that are looked up in, and multiplied by nothing: no tool applies a LoRA to them.
_LOOKED_UP = ("token_embedding", "position_embedding", "embed_tokens", "shared", "relative_attention_bias")

# kohya's word for the base model, by which others tell what a LoRA is for. Source: sd-scripts, library/train_util.py.
_VERSIONS = {"sd15": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "flux": "flux1"}

# Where both are about as large, factors are read by more tools than a whole difference.
_SMALLER = 0.95

# Matrices of one shape that are factorised together on a CUDA device, and the values they may have.
_TOGETHER = 16
_TOGETHER_VALUES = 32 << 20


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked of an extraction, the ranks apart."""

    dialect: str = "kohya"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    biases: bool = False
    convolutions: bool = True
    dtype: str = "keep"
    seed: int = 0
    clamp_quantile: float | None = None
    strict: bool = False
    allow_nonfinite: bool = False
    said: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight as the dialect names it: one canonical module, or those that it packs, in order.

    tuned, base: where each of them is, its rows in the dialect's order. shape: of the weight as the dialect has it.
    """

    component: str
    prefix: str
    module: str
    names: tuple[str, ...]
    tuned: tuple[Place, ...]
    base: tuple[Place, ...]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.prefix + self.module

    @property
    def out(self) -> int:
        return self.shape[0]

    @property
    def n(self) -> int:
        """Inputs, times the kernel."""
        count = 1
        for size in self.shape[1:]:
            count *= size
        return count

    @property
    def is_convolution(self) -> bool:
        return any(size > 1 for size in self.shape[2:])

    @property
    def dtype(self) -> str:
        return self.tuned[0].slot.spec.dtype

    def nbytes(self, dtype: str) -> int:
        """Of one rank, both factors together."""
        return (self.out + self.n) * TensorSpec(self.written(dtype), (1,)).nbytes

    def written(self, dtype: str) -> str:
        """The dtype of its factors: eight bits would leave little of them."""
        if dtype == "keep" and self.dtype.startswith("F8"):
            return "F16"
        return becomes(self.tuned[0].slot.spec, dtype).dtype


    def inputs(self) -> tuple[Input, ...]:
        return (*(Input(0, at.slot) for at in self.tuned), *(Input(1, at.slot) for at in self.base))


@dataclass(frozen=True, slots=True)
class Vector:
    """A bias, or a norm's weight or bias, and the part of an adapter that its difference is."""

    component: str
    prefix: str
    module: str
    part: str
    tuned: Place
    base: Place


@dataclass(slots=True)
class Pair:
    """Two checkpoints, and what they have in common.

    homes: output key -> its component. left_out: vectors that differ, and are not asked for.
    """

    opened: Checkpoint
    base: Checkpoint
    identity: Identity
    dialect: Dialect
    wish: Wish
    known: Architecture | None
    matrices: list[Matrix] = field(default_factory=list)
    vectors: list[Vector] = field(default_factory=list)
    account: Account = field(default_factory=Account)
    homes: dict[str, str] = field(default_factory=dict)
    left_out: int = 0

    def is_whole(self, matrix: Matrix, rank: int) -> bool:
        """Is the difference itself written, for it takes fewer bytes than factors of this rank?"""
        smaller = matrix.out * matrix.n < _SMALLER * rank * (matrix.out + matrix.n)
        return smaller and self.dialect.alpha == "tensor"  # the others have no differences

    @property
    def architecture(self) -> Architecture:
        assert self.known is not None
        return self.known


def pair(tuned: Checkpoint, base: Checkpoint, wish: Wish) -> Pair:
    """Line up two checkpoints, and name what only one of them has. Raises MismatchError, UsageError."""
    for opened in (tuned, base):
        _check(opened)
    identity, other = identify(tuned.tensors), identify(base.tensors)
    if "lora" in (identity.kind, other.kind):
        which = tuned if identity.kind == "lora" else base
        raise MismatchError(which.label, "is a LoRA, expected a checkpoint", "TUNED and BASE are two whole models")
    if identity.architecture != other.architecture:
        what = f"is {_called(identity)}, but {base.label} is {_called(other)}"
        raise MismatchError(tuned.label, what, "a LoRA is extracted of a finetune and its base")
    known = next((a for name, a in ARCHITECTURES if name == identity.architecture), None)
    found = Pair(tuned, base, identity, DIALECTS[wish.dialect], wish, known)
    if known is None and wish.dialect not in ("kohya", "comfy"):
        what = f"is of no known model: {wish.dialect} has no names for its modules"
        raise MismatchError(tuned.label, what, "kohya and comfy take the model's own")
    (_known if known is not None else _own)(found, other)
    _account(found)
    _globs(found)
    if not found.matrices and not found.vectors:
        reasons = list(dict.fromkeys(u.reason for u in found.account.unused))
        what = f"has no matrix in common with {base.label} of which a LoRA could be made"
        raise MismatchError(tuned.label, what, "; ".join(reasons[:3]) or None)
    return found


def _called(identity: Identity) -> str:
    return identity.architecture or f"a {identity.kind} of no known model".replace("a unknown of", "of")


def _check(opened: Checkpoint) -> None:
    if not opened.tensors:
        raise MismatchError(opened.label, "holds no tensors")
    key = quantised(opened.tensors)
    if key is not None:
        what = f"is quantised: {quote(key)} scales weights that mean nothing without it"
        raise MismatchError(opened.label, what, "take the fp16, bf16 or fp32 release instead")


# ------------------------------------------------------------------------------------------------ what both have


def _known(found: Pair, other: Identity) -> None:
    """Matrices and vectors by canonical names, as the dialect packs them."""
    mine, theirs = places_of(found.opened, found.identity), places_of(found.base, other)
    target = Target(found.dialect, found.architecture, found.identity.variant, found.opened.label)
    components = {c.name for c in found.architecture.components}
    done: set[Name] = set()
    for (component, name), at in mine.items():
        module, dot, leaf = name.rpartition(".")
        if (component, name) in done or not dot:
            continue
        reason = _why_no_part(component, components, module, leaf, at)
        place = next((c for c in found.architecture.components if c.name == component), None)
        table = target.table(place) if place is not None else None
        if reason is None and (place is None or table is None or (found.dialect.name == "kohya" and not place.kohya)):
            reason = f"{found.dialect.name} has no names for the {component}"
        if reason is not None or place is None or table is None:
            _leave(found, at, reason or "")
            continue
        spelled = table.spelled_module(module)
        if spelled is None:
            _leave(found, at, f"has no name in {found.dialect.name}'s spelling")
            continue
        rule, own, names = spelled
        prefix, own = target.prefix(place), own.replace(".", "_") if found.dialect.flat else own
        if leaf != "weight" or len(at.spec.shape) < 2:
            _vector(found, at, theirs.get((component, name)), component, prefix, own, leaf, packed=len(names) > 1,
                    norm=_is_norm(mine, component, module))  # fmt: skip
            continue
        keys = [(component, f"{n}.weight") for n in names]
        done.update(keys)
        _matrix(found, component, prefix, own, rule, names, [mine.get(k) for k in keys], [theirs.get(k) for k in keys])


def _why_no_part(component: str, components: set[str], module: str, leaf: str, at: Place) -> str | None:
    """Why a LoRA has no part for this tensor, if it has none."""
    if component not in components or component == "vae":
        return f"no LoRA changes the {component}"
    if leaf not in ("weight", "bias"):
        return "is no weight of a module"
    if module.rpartition(".")[2] in _LOOKED_UP:
        return "is a table of embeddings, which no LoRA changes"
    return f"is {at.spec.dtype}" if at.spec.dtype not in ARITHMETIC else None


def _is_norm(places: Mapping[Name, Place], component: str, module: str) -> bool:
    weight = places.get((component, f"{module}.weight"))
    return weight is not None and len(weight.spec.shape) == 1


def _matrix(
    found: Pair, component: str, prefix: str, module: str, rule: Rule, names: Sequence[str],
    tuned: Sequence[Place | None], base: Sequence[Place | None],
) -> None:  # fmt: skip
    mine, theirs = [at for at in tuned if at is not None], [at for at in base if at is not None]
    reason = None
    if len(mine) < len(names):
        reason = f"{module} packs {len(names)} weights, of which {len(mine)} are there"
    elif len(theirs) < len(names):
        reason = f"{found.base.label} has no such tensor"
    elif any(a.spec.shape != b.spec.shape for a, b in zip(mine, theirs, strict=True)):
        shapes = [list(at.spec.shape) for at in (mine[0], theirs[0])]
        reason = f"is {shapes[0]}, and in {found.base.label} {shapes[1]}"
    elif len({at.spec.shape[1:] for at in mine}) > 1 or len({at.spec.dtype for at in mine}) > 1:
        reason = f"{module} packs weights of several widths or dtypes"
    elif any(at.spec.dtype not in ARITHMETIC for at in theirs):
        reason = f"{found.base.label} has it as {theirs[0].spec.dtype}"
    if reason is not None:
        for at in mine:
            _leave(found, at, reason, asked=False)
        return
    rows = sum(at.spec.rows for at in mine)
    shape = (rows, *mine[0].spec.shape[1:])
    if not found.wish.convolutions and any(size > 1 for size in shape[2:]):
        for at in mine:
            _leave(found, at, "--conv-rank 0")
        return
    if len(names) == 1 and swaps(rule, rows, shape[1]):
        mine, theirs = [_swapped(mine[0])], [_swapped(theirs[0])]
    found.matrices.append(Matrix(component, prefix, module, tuple(names), tuple(mine), tuple(theirs), shape))


def _swapped(at: Place) -> Place:
    """The same rows, the second half first."""
    rows = at.slot.spec.rows
    bands = within(at.slot.bands, ((rows // 2, rows), (0, rows // 2)))
    return replace(at, slot=replace(at.slot, bands=bands))


def _vector(
    found: Pair, at: Place, base: Place | None, component: str, prefix: str, module: str, leaf: str, *,
    packed: bool, norm: bool,
) -> None:  # fmt: skip
    """A bias or a norm: a candidate for --biases, where both models have it and the dialect can say it."""
    if base is None or base.spec.shape != at.spec.shape:
        _leave(found, at, f"{found.base.label} has no such tensor", asked=False)
    elif packed or found.dialect.alpha != "tensor":
        _leave(found, at, f"{found.dialect.name} has no differences of biases and norms" if not packed else
               "is part of a packed bias, of which no part can be said alone")  # fmt: skip
    else:
        part = ("w_norm" if leaf == "weight" else "b_norm") if norm else "diff_b"
        found.vectors.append(Vector(component, prefix, module, part, at, base))


def _own(found: Pair, _other: Identity) -> None:
    """Matrices and vectors of an unknown architecture, by the model's own names."""
    mine = {key: Place(found.opened.slot(key)) for key in found.opened.tensors}
    theirs = {key: Place(found.base.slot(key)) for key in found.base.tensors}
    beginning = own_beginning({key.rpartition(".")[0] for key in mine if key.endswith((".weight", ".bias"))})
    prefix = "lora_unet_" if found.dialect.flat else "diffusion_model."
    seen: dict[str, str] = {}
    for key, at in mine.items():
        module, _, leaf = key.rpartition(".")
        reason = _why_no_part("", {""}, module, leaf, at)
        if reason is not None:
            _leave(found, at, reason)
            continue
        body = module.removeprefix(beginning)
        own = body.replace(".", "_") if found.dialect.flat else body
        if seen.setdefault(own, module) != module:
            raise MismatchError(
                found.opened.label, f"{quote(seen[own])} and {quote(module)} would both be called {quote(own)}",
                "--dialect comfy keeps them apart",
            )  # fmt: skip
        if leaf == "weight" and len(at.spec.shape) > 1:
            _matrix(found, "", prefix, own, Rule(body, (body,)), (module,), [at], [theirs.get(key)])
            continue
        norm = leaf == "weight" or len(mine.get(f"{module}.weight", at).spec.shape) == 1
        _vector(found, at, theirs.get(key), "", prefix, own, leaf, packed=False,
                norm=norm and f"{module}.weight" in mine)  # fmt: skip


def own_beginning(modules: set[str]) -> str:
    """What stands before all names of a model, and in no LoRA's."""
    for beginning in ("model.diffusion_model.", "diffusion_model."):
        if modules and all(m.startswith(beginning) for m in modules):
            return beginning
    return ""


# ------------------------------------------------------------------------------------------------ accounts


def _leave(found: Pair, at: Place, reason: str, *, asked: bool = True) -> None:
    found.account.unused.append(Unused(at.slot.key, found.opened.label, reason, asked))


def _account(found: Pair) -> None:
    """Each key once: used where a matrix or a vector reads it, else with the reason."""
    used = _used(found)
    for number, opened in enumerate((found.opened, found.base)):
        told = {u.key for u in found.account.unused if u.source == opened.label}
        other = found.base if number == 0 else found.opened
        for key, info in opened.tensors.items():
            if key in used[number] or key in told:
                continue
            reason = f"{other.label} makes no use of it" if number else "no LoRA changes it"
            found.account.unused.append(Unused(key, opened.label, f"is {info.spec.dtype}" if info.spec.dtype
                                               not in ARITHMETIC else reason, asked=True))  # fmt: skip
        found.account.unused.extend(Unused(path, opened.label, why, asked=True) for path, why in opened.left_out)


def _used(found: Pair) -> tuple[set[str], set[str]]:
    mine: set[str] = set()
    theirs: set[str] = set()
    for matrix in found.matrices:
        mine.update(at.slot.key for at in matrix.tuned)
        theirs.update(at.slot.key for at in matrix.base)
    for vector in found.vectors:
        mine.add(vector.tuned.slot.key)
        theirs.add(vector.base.slot.key)
    return mine, theirs


def _globs(found: Pair) -> None:
    """Keep what --include names, less what --exclude names. Raises UsageError for a glob that names nothing."""
    items: list[Matrix | Vector] = [*found.matrices, *found.vectors]
    for option, globs in (("--include", found.wish.include), ("--exclude", found.wish.exclude)):
        for glob in globs:
            if not any(_is_named(glob, item) for item in items):
                name = found.matrices[0].name if found.matrices else ""
                raise UsageError(option, f"{quote(glob)} is the name of no module", f"names are such as {name}")
    wanted = found.wish.include

    def keeps(item: Matrix | Vector) -> bool:
        named = not wanted or any(_is_named(g, item) for g in wanted)
        return named and not any(_is_named(g, item) for g in found.wish.exclude)

    for kept_out in [item for item in items if not keeps(item)]:
        places = kept_out.tuned if isinstance(kept_out, Matrix) else (kept_out.tuned,)
        for at in places:
            _leave(found, at, "--include and --exclude leave it out")
    found.matrices = [m for m in found.matrices if keeps(m)]
    found.vectors = [v for v in found.vectors if keeps(v)]


def _is_named(glob: str, item: Matrix | Vector) -> bool:
    """A glob may be over the adapter's own name, or over the canonical one with its component before it."""
    names = item.names if isinstance(item, Matrix) else ()
    qualified = (f"{item.component}.{n}" if item.component else n for n in names)
    return any(fnmatch.fnmatchcase(n, glob) for n in (item.prefix + item.module, *names, *qualified))


# ------------------------------------------------------------------------------------------------ the plan


def plan_extract(found: Pair, ranks: Sequence[int], *, together: bool = False) -> tuple[Planned, list[list[int]]]:
    """The plan, given a rank for each matrix; and for each of its first tasks the numbers of its matrices.

    together: matrices of one shape in one task, for a device that does them at once.
    """
    wish = found.wish
    outputs: dict[str, TensorSpec] = {}
    tasks: list[Task] = []
    groups = _together(found.matrices, ranks) if together else [[n] for n, rank in enumerate(ranks) if rank]
    units: list[Unit] = []
    tasks.extend(_task(found, group, ranks, outputs, units) for group in groups)
    for number in (n for group in groups for n in group):
        matrix = found.matrices[number]
        if found.dialect.alpha == "tensor" and not found.is_whole(matrix, ranks[number]):
            key = _key(found, outputs, matrix.component, matrix.name, "alpha")
            task, outputs[key] = constant(key, float(ranks[number]), matrix.written(wish.dtype))
            tasks.append(task)
    for vector in found.vectors if wish.biases else ():
        key = _key(found, outputs, vector.component, vector.prefix + vector.module, vector.part)
        outputs[key] = becomes(vector.tuned.spec, wish.dtype)
        inputs = (Input(0, vector.tuned.slot), Input(1, vector.base.slot))
        tasks.append(Task(key, inputs, (Slot(key, outputs[key]),), subtracted, work_nbytes=32 << 20))
    used = _used(found)
    found.account.used = sorted(used[0]) + sorted(used[1])
    metadata, headers = metadata_of(found, units) if found.known is not None else ({}, {})
    files, extras = folder_of(found, units) if found.known is not None else ((), {})
    recipe = {"command": "extract", "version": __version__, "dtype": wish.dtype, "dialect": wish.dialect, **wish.said}
    plan = Plan(
        (found.opened, found.base), outputs, tuple(tasks), {"format": "pt", **metadata, **headers, **_told(found)},
        recipe, refuse_nonfinite=not wish.allow_nonfinite, files=files, extras=extras,
        data_hashes={"sshs_model_hash": "{}"} if wish.dialect == "kohya" else {},
    )  # fmt: skip
    words = f"{stem(found.opened)} − {stem(found.base)}: {modules(len(units))}, {wish.dialect} names"
    return Planned(plan, found.account, words, _counts(found, ranks)), groups


def _together(matrices: Sequence[Matrix], ranks: Sequence[int]) -> list[list[int]]:
    """Matrices of one shape, dtype and rank: as many at once as their shape allows, whatever the memory."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for number, (matrix, rank) in enumerate(zip(matrices, ranks, strict=True)):
        if rank:
            kind = (matrix.out, matrix.n, matrix.dtype, matrix.base[0].slot.spec.dtype, rank)
            kinds.setdefault(kind, []).append(number)
    found = []
    for numbers in kinds.values():
        count = max(1, min(_TOGETHER, _TOGETHER_VALUES // (matrices[numbers[0]].out * matrices[numbers[0]].n)))
        found += [numbers[i : i + count] for i in range(0, len(numbers), count)]
    return found


def _task(
    found: Pair, group: Sequence[int], ranks: Sequence[int], outputs: dict[str, TensorSpec], units: list[Unit]
) -> Task:
    inputs: list[Input] = []
    slots: list[Slot] = []
    pieces = []
    for number in group:
        matrix, rank = found.matrices[number], ranks[number]
        parts = _parts(found, matrix, rank)
        for part, spec in parts.items():
            key = _key(found, outputs, matrix.component, matrix.name, part)
            outputs[key] = spec
            slots.append(Slot(key, spec))
        filled = {part: (spec, ()) for part, spec in parts.items()}
        whole = "diff" in parts
        units.append(
            Unit(matrix.component, matrix.prefix, matrix.module, "full" if whole else "lora", filled,
                 None if whole else float(rank), None if whole else rank, ())
        )  # fmt: skip
        inputs += matrix.inputs()
        pieces.append(matrix)
    rank = ranks[group[0]]
    compute = extracted(pieces, rank, seed=found.wish.seed, clamp_quantile=found.wish.clamp_quantile)
    first = pieces[0]
    size = 8 if {"F32", "F64"} & {at.slot.spec.dtype for at in (*first.tuned, *first.base)} and _is_double(first) else 4
    work = len(pieces) * size * first.out * first.n + factorise_nbytes(first.out, first.n, rank)
    return Task(first.name, tuple(inputs), tuple(slots), compute, Grain.TENSOR, work_nbytes=work)


def _is_double(matrix: Matrix) -> bool:
    return any(at.slot.spec.dtype == "F64" for at in (*matrix.tuned, *matrix.base))


def _parts(found: Pair, matrix: Matrix, rank: int) -> dict[str, TensorSpec]:
    """The tensors of one module: factors, or the difference itself where that is smaller."""
    dtype = matrix.written(found.wish.dtype)
    if found.is_whole(matrix, rank):
        return {"diff": TensorSpec(dtype, matrix.shape)}
    ones = (1,) * (len(matrix.shape) - 2)
    return {
        "down": TensorSpec(dtype, (rank, *matrix.shape[1:])),
        "up": TensorSpec(dtype, (matrix.out, rank, *ones)),
    }


def _key(found: Pair, outputs: Mapping[str, TensorSpec], component: str, name: str, part: str) -> str:
    key = name + found.dialect.endings[part]
    key = f"{component}{APART}{key}" if found.dialect.folder else key
    if key in outputs:
        raise MismatchError(found.opened.label, f"two of its tensors would be called {quote(key)}")
    found.homes[key] = component
    return key


def _told(found: Pair) -> dict[str, str]:
    """What kohya's metadata says of the base model and of convolutions, where the file is in these names."""
    if found.wish.dialect != "kohya":
        return {}
    told = {"ss_network_module": "networks.lora"}
    version = _VERSIONS.get(found.known.name) if found.known is not None else None
    if version is not None:
        told |= {"ss_base_model_version": version, "ss_v2": str(version == "sd_v2")}
    return told


def _counts(found: Pair, ranks: Sequence[int]) -> list[dict[str, Any]]:
    counted: dict[str, dict[str, Any]] = {}
    for matrix, rank in zip(found.matrices, ranks, strict=True):
        name = matrix.component or "model"
        entry = counted.setdefault(name, {"component": name, "modules": 0, "convolutions": 0, "whole": 0, "equal": 0})
        whole = found.is_whole(matrix, rank)
        entry[
            "equal" if not rank else "whole" if whole else "convolutions" if matrix.is_convolution else "modules"
        ] += 1
    return list(counted.values())
