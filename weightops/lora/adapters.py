"""An adapter file's keys, grouped into adapters, each resolved to the modules it changes. Reads names and shapes."""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from weightops.errors import FormatError, MismatchError, listing, quote
from weightops.files.source import read
from weightops.lora.dialects import Beginning, beginning_of, ending_of
from weightops.lora.family import FAMILIES, MODIFIERS, Family, Told
from weightops.lora.settings import SCALED, alpha_in, read_settings, rotation, whole_rank
from weightops.lora.targets import Look, Target, resolve

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightops.files.checkpoint import Checkpoint
    from weightops.files.tensor import TensorInfo

Shape = tuple[int, ...]

# Families, each with those of a module's parts that are its.
Chosen = tuple[tuple[Family, frozenset[str]], ...]

_INDEXED = re.compile(r"(unet|text_encoder):(\d+):(up|down)")
_EMBEDDING = re.compile(r"bundle_emb\..+|<.+>|emb_params|clip_[lg]")
# The endings of mangled names that were met, and the scheme that they come from.
_MANGLED = re.compile(r"_lora_(up|down)[._]weight$|_lora_[AB][._]weight$|lora_(up|down)$")


@dataclass(frozen=True, slots=True)
class Adapter:
    """One module's change: the file's name for it, its family, part -> key, and what it changes.

    `components` is the diffusers name of the part of the pipeline, None where it is not known.
    """

    name: str
    beginning: Beginning
    body: str
    family: Family
    keys: Mapping[str, str]
    shapes: Mapping[str, Shape]
    target: Target | None = None
    component: str | None = None

    @property
    def rank(self) -> int | None:
        return self.family.rank(self.shapes) if self.family.form(self.keys) is not None else None

    @property
    def label(self) -> str:
        """The family in words of the report: dora is a LoRA with a magnitude."""
        if "dora_scale" not in self.keys:
            return self.family.name
        return "dora" if self.family.name == "lora" else f"{self.family.name}+dora"


class Problem(NamedTuple):
    """Something that keeps a file from being used as a whole: whose key or module, and what is wrong."""

    name: str
    what: str


@dataclass(slots=True)
class AdapterFile:
    """What an adapter file holds. Every key is in an adapter, an embedding, `left` or `indexed`."""

    label: str
    adapters: list[Adapter] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    indexed: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    architecture: str | None = None
    spelling: str | None = None
    variant: str | None = None
    possible: tuple[str, ...] = ()
    schemes: Counter[str] = field(default_factory=Counter)

    @property
    def dialect(self) -> str | None:
        """The dialect of the file, or of most of it."""
        if self.indexed:
            return "cloneofsimo"
        return self.schemes.most_common(1)[0][0] if self.schemes else None

    def check(self) -> None:
        """Refuse what cannot be used as a whole. Raises FormatError, MismatchError."""
        if self.indexed:
            raise MismatchError(
                self.label,
                f"names its modules by number ({quote(self.indexed[0])}), in the order in which the trainer's own copy "
                "of the model listed them, and that order cannot be proved from the file",
                "the scripts of cloneofsimo/lora can still apply it, with a diffusers of its time",
            )
        if self.problems:
            first = self.problems[0]
            more = f" (and {len(self.problems) - 1:,} more)" if len(self.problems) > 1 else ""
            raise FormatError(self.label, f"{quote(first.name)} {first.what}{more}", "it may be cut short or mangled")
        if self.left:
            raise FormatError(self.label, f"keys of no known scheme: {listing(self.left)}", nearest(self.left[0]))
        lost = [a.name for a in self.adapters if a.target is None]
        if not lost:
            return
        if self.architecture is None:
            if not self.possible:
                raise MismatchError(self.label, f"no known architecture has modules of these names: {listing(lost)}")
            raise MismatchError(
                self.label,
                f"cannot tell which model it is for: {', '.join(self.possible)} have modules of these names and sizes",
                f"--architecture {self.possible[0]} says which",
            )
        raise MismatchError(self.label, f"{self.architecture} has no modules of these names: {listing(lost)}")


def nearest(key: str) -> str:
    """A hint: which known scheme a strange key looks most like."""
    if key.startswith(("lora_", "lycoris_", "oft_unet_")) or _MANGLED.search(key):
        return "kohya's names are nearest: lora_unet_<module>.lora_down.weight, .lora_up.weight and .alpha"
    if ".processor." in key:
        return "diffusers' names to 0.24 are nearest: <module>.processor.to_q_lora.down.weight"
    return "PEFT's names are nearest: <module>.lora_A.weight and .lora_B.weight"


def read_adapters(opened: Checkpoint, *, architecture: str | None = None) -> AdapterFile:
    """Group and resolve the keys of an adapter file, from its header alone. Never raises for what is odd in it.

    architecture: the one that is meant, where names and shapes leave a choice.
    """
    found = group(opened.label, opened.tensors)
    looks = [_look(a) for a in found.adapters]
    # XLabs trained Flux alone, whose blocks are named and sized as Chroma's are; no metadata of theirs says so.
    hint = "flux1" if found.dialect == "xlabs" else _base_said(opened.metadata)
    resolved = resolve(looks, found.left, hint=hint, architecture=architecture)
    found.adapters = [
        Adapter(a.name, a.beginning, a.body, a.family, a.keys, a.shapes, target, target.component if target else None)
        for a, target in zip(found.adapters, resolved.targets, strict=True)
    ]
    found.architecture, found.possible = resolved.architecture, resolved.possible
    found.spelling, found.variant = resolved.spelling, resolved.variant
    _set_weights(found, resolved.tensors, opened.tensors)
    for adapter in found.adapters:
        _check_shapes(found, adapter)
    return found


def _base_said(metadata: Mapping[str, str]) -> str:
    """What a trainer wrote of the base model."""
    return metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture", "")


def _look(adapter: Adapter) -> Look:
    shape = adapter.family.shape(adapter.shapes) if adapter.family.form(adapter.keys) else None
    return Look(adapter.beginning, adapter.body, shape, adapter.family.flat)


# ------------------------------------------------------------------------------------------------ keys into modules


def group(label: str, tensors: Mapping[str, TensorInfo]) -> AdapterFile:
    """The keys by module and family, not yet resolved."""
    found = AdapterFile(label)
    modules: dict[str, tuple[Beginning, str, dict[str, str]]] = {}
    for key in tensors:
        if _INDEXED.fullmatch(key) or (key.isdecimal() and len(tensors[key].spec.shape) in (2, 4)):
            found.indexed.append(key)
            continue
        ending = ending_of(key)
        if ending is None and key.endswith(".weight") and key[:-7] + ".on_input" in tensors:
            part, scheme, stem = "ia3", "lycoris", key[: -len(".weight")]
        elif ending is None:
            (found.embeddings if _EMBEDDING.fullmatch(key) else found.left).append(key)
            continue
        else:
            part, scheme, stem = ending.part, ending.scheme, key[: -len(ending.text)] + ending.body
        if stem not in modules:
            begins = beginning_of(stem)
            modules[stem] = begins, stem[len(begins.text) :], {}
        beginning, _, parts = modules[stem]
        if part in parts:
            found.problems.append(Problem(key, f"says the same as {quote(parts[part])}"))
            continue
        parts[part] = key
        if part not in MODIFIERS:
            found.schemes[_dialect(beginning, scheme)] += 1
    known: dict[frozenset[str], Chosen] = {}  # the modules of a file are much alike
    for name, (beginning, body, parts) in modules.items():
        own = frozenset(part for part in parts if part not in MODIFIERS)
        if own not in known:
            known[own] = _choose(own)
        _families(found, name, beginning, body, parts, known[own], tensors)
    return found


def _dialect(beginning: Beginning, scheme: str) -> str:
    """The dialect that a beginning and an ending together make."""
    if scheme in ("diffusers processor", "diffusers 0.25", "diffusers text encoder", "xlabs", "mochi"):
        return scheme
    if beginning.dialect == "bare":
        return {"kohya": "bare, kohya endings", "peft": "bare", "peft default": "bare"}.get(scheme, "bare")
    return beginning.dialect


def _choose(own: frozenset[str]) -> Chosen:
    """The families that these parts are of; each with the parts that are its."""
    found = []
    for _, family in FAMILIES:
        mine = own & family.parts
        if mine and (family.form(dict.fromkeys(mine)) is not None or not _claimed_elsewhere(family, mine, own)):
            found.append((family, mine))
    return tuple(found)


def _families(
    found: AdapterFile, name: str, beginning: Beginning, body: str, parts: dict[str, str], families: Chosen,
    tensors: Mapping[str, TensorInfo],
) -> None:  # fmt: skip
    """Which family a module's parts are of; a difference of the bias may stand beside another family."""
    own = {part: key for part, key in parts.items() if part not in MODIFIERS}
    modifiers = {part: key for part, key in parts.items() if part in MODIFIERS}
    chosen = [(family, {part: key for part, key in own.items() if part in mine}) for family, mine in families]
    taken = {part for _, mine in chosen for part in mine}
    if not chosen or taken != own.keys():
        lost = sorted(own.keys() - taken) or sorted(modifiers)
        found.problems.append(Problem(name, f"has {', '.join(lost)}, and nothing that it belongs to"))
        found.left.extend(parts[part] for part in [*lost, *modifiers])
        if not chosen:
            return
    main = [family.name for family, mine in chosen if set(mine) - {"diff_b", "b_norm", "set_bias"}]
    if len(main) > 1:
        found.problems.append(Problem(name, f"is of {len(main)} families at once: {', '.join(main)}"))
    home = main[0] if main else chosen[0][0].name
    for family, mine in chosen:
        keys = mine | (modifiers if family.name == home else {})
        if family.form(mine) is None:
            lacking = _lacking(family, mine)
            found.problems.append(Problem(name, f"has {listing(sorted(mine))}, but no {lacking}"))
        shapes = {part: tensors[key].spec.shape for part, key in keys.items()}
        found.adapters.append(Adapter(name, beginning, body, family, keys, shapes))


def _claimed_elsewhere(family: Family, mine: frozenset[str], own: frozenset[str]) -> bool:
    """Is what there is of this family a whole of another one?"""
    whole = dict.fromkeys(own)
    return any(other.name != family.name and mine <= other.parts and other.form(whole) for _, other in FAMILIES)


def _lacking(family: Family, parts: Mapping[str, str]) -> str:
    nearest_form = min(family.forms, key=lambda form: (len(set(form) - parts.keys()), len(form)))
    return ", ".join(part for part in nearest_form if part not in parts)


def _set_weights(found: AdapterFile, tensors: Mapping[str, Target], infos: Mapping[str, TensorInfo]) -> None:
    """Whole weights of the model among the adapters: they are set, as in BFL's control LoRAs."""
    for key, target in tensors.items():
        leaf = "set_bias" if target.names[0].endswith(".bias") else "set_weight"
        names = tuple(n.removesuffix(".weight").removesuffix(".bias") for n in target.names)
        whole = Target(names, target.rule, target.component, target.spelling, key)
        family = FAMILIES.get("set")
        shape = infos[key].spec.shape
        found.adapters.append(
            Adapter(key, beginning_of(key), key, family, {leaf: key}, {leaf: shape}, whole, target.component)
        )
        found.left.remove(key)


def _check_shapes(found: AdapterFile, adapter: Adapter) -> None:
    """Factors that cannot be multiplied: the file is refused, but still inspected."""
    shapes = adapter.shapes
    form = adapter.family.form(adapter.keys)
    if form is not None and not adapter.family.meet(shapes):
        said = ", ".join(f"{part} {list(shapes[part])}" for part in form)
        found.problems.append(Problem(adapter.name, f"has factors that do not meet: {said}"))
    if adapter.rank == 0:
        found.problems.append(Problem(adapter.name, "has rank 0"))
    for part, shape in shapes.items():
        if adapter.rank != 0 and not math.prod(shape):
            found.problems.append(Problem(adapter.name, f"has an empty {part}, {list(shape)}"))
        elif not shape and part in (*adapter.family.rows, "dora_scale"):
            found.problems.append(Problem(adapter.name, f"has a {part} of one number, expected one for each output"))
    alpha = shapes.get("alpha")
    if alpha is not None and math.prod(alpha) != 1:
        found.problems.append(Problem(adapter.name, f"has an alpha of shape {list(alpha)}, expected one number"))


# ------------------------------------------------------------------------------------------------ alpha


_FLOATS = {"F16": "<e", "F32": "<f", "F64": "<d", "I8": "<b", "U8": "<B", "I16": "<h", "I32": "<i", "I64": "<q"}


def read_number(opened: Checkpoint, key: str) -> float:
    """The one number of a tensor. Raises FormatError for a dtype that holds no numbers."""
    info = opened.tensors[key]
    data = read(opened.files[info.shard], info.start, info.stop - info.start)
    if info.spec.dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    code = _FLOATS.get(info.spec.dtype)
    if code is None or struct.calcsize(code) != len(data):
        raise FormatError(opened.label, f"{quote(key)} is {info.spec}, expected one number")
    return float(struct.unpack(code, data)[0])


def alphas(opened: Checkpoint, found: AdapterFile) -> dict[str, float | None]:
    """Module name -> alpha, so that its strength is alpha / rank; None: it has none, and is as strong as it stands.

    From the alpha tensor, or else from diffusers' header or PEFT's adapter_config.json. Raises FormatError, also for
    what settings say and no tensor can.
    """
    values: dict[str, float | None] = {}
    for name, (alpha, told) in strengths(opened, found).items():
        whole = told.full_rank is not None
        if whole and alpha not in (None, told.full_rank):
            raise FormatError(
                opened.label,
                f"{quote(name)} has two whole LoKr factors, whose strength is 1 to all but PEFT: "
                "its settings say otherwise (alpha / r)",
            )
        if not whole and told != Told():
            raise FormatError(
                opened.label,
                f"{quote(name)} is turned as PEFT's settings say (use_cayley_neumann, num_cayley_neumann_terms, coft), "
                "and no tensor can",
                "fuse follows them",
            )
        values[name] = None if whole else alpha
    return values


def strengths(opened: Checkpoint, found: AdapterFile) -> dict[str, tuple[float | None, Told]]:
    """Module name -> its alpha, and what else settings tell of it, for an arithmetic that follows them."""
    settings = read_settings(opened)
    values: dict[str, tuple[float | None, Told]] = {}
    for adapter in found.adapters:
        key = adapter.keys.get("alpha")
        if key is not None:
            if math.prod(adapter.shapes["alpha"]) == 1:
                values[adapter.name] = read_number(opened, key), Told()
        elif adapter.name not in values or values[adapter.name] == (None, Told()):
            values[adapter.name] = _from_settings(adapter, settings, opened.label)
    return values


def _from_settings(
    adapter: Adapter, settings: Mapping[str, Mapping[str, Any]], label: str
) -> tuple[float | None, Told]:
    config = settings.get(adapter.beginning.text.partition(".")[0])
    if adapter.beginning.dialect in ("peft", "bare") and config is None:
        config = settings.get("")
    if config is not None and adapter.family.name == "oftv2":
        return None, rotation(config, label)
    if config is None or adapter.family.name not in SCALED:
        return None, Told()
    if adapter.rank is not None:
        return alpha_in(config, adapter.body, adapter.rank, label), Told()
    # Whole factors of LoKr: PEFT alone divides alpha by a rank that they do not have.
    rank = whole_rank(config, adapter.body, label)
    return (None, Told()) if rank is None else (alpha_in(config, adapter.body, 1, label), Told(full_rank=rank))
