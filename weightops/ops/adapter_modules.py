"""An adapter file as modules that can be cut to a rank, under the names that it has; and a base, where it takes one."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from weightops.errors import FormatError, MismatchError, quote
from weightops.files.dtypes import ARITHMETIC
from weightops.files.folder import OutputFile
from weightops.lora.adapters import Adapter, AdapterFile, read_adapters, strengths
from weightops.lora.dialects import DIALECTS, ending_of
from weightops.lora.family import Description, Told, changed_shape
from weightops.lora.pieces import sources, within
from weightops.lora.settings import FILE, HEADER, peft_config, read_settings
from weightops.lora.targets import unflattened
from weightops.naming.identify import identify
from weightops.naming.keymap import ARCHITECTURES, NETWORKS, swaps
from weightops.ops.align import Name, places_of
from weightops.ops.dialect_settings import told
from weightops.ops.factor_plan import Module
from weightops.ops.fp8 import scales_of
from weightops.ops.sums import Sum, Term

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from weightops.files.checkpoint import Checkpoint
    from weightops.files.tensor import Slot
    from weightops.lora.family import Shape
    from weightops.lora.pieces import Source
    from weightops.lora.settings import Module as Setting
    from weightops.naming.slots import Place


class Kept(NamedTuple):
    """A key that is copied as it is, and why it is no part of what is cut; no reason for what has no rank."""

    key: str
    reason: str | None = None


@dataclass
class OwnModules:
    """modules: what can be cut. keys, homes: of each those that it takes, and the part of the pipeline that it is in.

    kept: keys that are copied. frames: where a module's weight is in the base.
    """

    opened: Checkpoint
    found: AdapterFile
    modules: list[Module] = field(default_factory=list)
    keys: list[list[str]] = field(default_factory=list)
    homes: list[str] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    frames: dict[str, tuple[Slot, ...]] = field(default_factory=dict)

    @property
    def has_alphas(self) -> bool:
        return any("alpha" in adapter.keys for adapter in self.found.adapters)

    @functools.cached_property
    def has_settings(self) -> bool:
        """Do strengths stand beside the tensors, in the header or in a file?"""
        return bool(read_settings(self.opened))

    @property
    def is_folder(self) -> bool:
        """Is there a file of settings, so that what is written is a folder with one?"""
        components = self.opened.components or ("",)
        return any(self.opened.json_beside(f"{c}/{FILE}" if c else FILE) is not None for c in components)

    @property
    def uncut(self) -> list[Kept]:
        """Keys of what changes weights, and cannot be cut."""
        return [entry for entry in self.kept if entry.reason is not None]


@dataclass(slots=True)
class Base:
    """A checkpoint for which adapters were made: where it has the weights that they change."""

    opened: Checkpoint
    number: int
    architecture: str | None
    places: Mapping[Name, Place]

    @classmethod
    def of(cls, opened: Checkpoint, number: int) -> Base:
        """Raises MismatchError for what is no checkpoint, or none whose weights can be read as they stand."""
        identity = identify(opened.tensors)
        if identity.kind == "lora" or not opened.tensors:
            raise MismatchError("--base", f"{opened.label} is no checkpoint", "it is the model that the LoRA changes")
        if scales_of(opened):
            hint = "the fp16, bf16 or fp32 release has plain weights"
            raise MismatchError("--base", f"{opened.label} has weights in scaled fp8", hint)
        return cls(opened, number, identity.architecture, places_of(opened, identity))

    def frame(self, adapter: Adapter) -> tuple[Slot, ...]:
        """Where the weight is that the adapter changes, its rows in the adapter's order. Raises MismatchError."""
        target = adapter.target
        if target is None:
            raise MismatchError(self.opened.label, f"cannot tell which of its weights {quote(adapter.name)} changes")
        found = []
        for name in target.names:
            at = self.places.get((adapter.component or "", f"{name}.weight"))
            if at is None or at.transposed:
                why = "has no" if at is None else "has, lying across what the LoRA changes, the"
                raise MismatchError(self.opened.label, f"{why} {name}.weight, which {quote(adapter.name)} changes")
            found.append(at.slot)
        rows = sum(slot.spec.rows for slot in found)
        features = found[0].spec.shape[1] if len(found[0].spec.shape) > 1 else None
        if len(found) == 1 and swaps(target.rule, rows, features):
            bands = within(found[0].bands, ((rows // 2, rows), (0, rows // 2)))
            found = [replace(found[0], bands=bands)]
        whole = (rows, *found[0].spec.shape[1:])
        if changed_shape(adapter.family, adapter.shapes, whole) != whole:
            shapes = {part: list(shape) for part, shape in adapter.shapes.items()}
            raise MismatchError(
                self.opened.label, f"{quote(adapter.name)} {shapes} does not fit its weight, {list(whole)}"
            )
        return tuple(found)


def read_own(opened: Checkpoint, *, architecture: str | None = None) -> AdapterFile:
    """The adapters of a file whose names need not be those of a known model. Raises FormatError, MismatchError."""
    found = read_adapters(opened, architecture=architecture)
    check_held(opened, found)
    if found.indexed or found.problems or found.left:
        found.check()
    return found


def check_held(opened: Checkpoint, found: AdapterFile) -> None:
    """Refuse a file of which nothing is an adapter. Raises MismatchError."""
    if found.adapters or found.indexed or found.problems:
        return
    kind = identify(opened.tensors).kind
    if kind in ("lora", "unknown") and found.left:  # names that are nearly those of adapters
        found.check()
    told = kind in ("checkpoint", "vae", "text_encoder", "controlnet")
    what = f"is a {kind.replace('_', ' ')}, no LoRA" if told else "holds no adapter modules"
    raise MismatchError(opened.label, what, "inspect shows what it is")


def modules_of(
    opened: Checkpoint, found: AdapterFile, *, base: Base | None = None, frames: bool = False, plain: bool = False
) -> OwnModules:
    """What of the file can be cut to a rank, and what goes along.

    base: makes plain LoRAs of what depends on its weights (DoRA, OFT, GLoRA, IA3, set weights). frames: find every
    module's weight in it. plain: no magnitude is kept (it is reported as uncut, without a base), nor a Tucker core.
    Raises FormatError, MismatchError.
    """
    if base is not None and found.architecture not in (None, base.architecture):
        raise MismatchError(
            opened.label, f"is for {found.architecture}, but {base.opened.label} is {base.architecture or 'not known'}"
        )
    own = OwnModules(opened, found)
    values = strengths(opened, found)
    endings = endings_of(found)
    for adapter in found.adapters:
        alpha, more = values.get(adapter.name, (None, Told()))
        if alpha is not None and not math.isfinite(alpha):
            raise FormatError(opened.label, f"{quote(adapter.name)} has alpha {alpha}, expected a finite number")
        module = _module(own, adapter, alpha, more, endings, base, plain=plain)
        if module is None:
            continue
        own.modules.append(module)
        own.homes.append(adapter.component or adapter.beginning.text.strip("._") or "model")
        kept = {entry.key for entry in own.kept}
        own.keys.append([key for key in adapter.keys.values() if key not in kept])
        if frames and base is not None and module.of.name not in own.frames:
            given = module.of.terms[0].frame
            own.frames[module.of.name] = given or base.frame(adapter)
    return own


def endings_of(found: AdapterFile) -> dict[str, str]:
    """What a LoRA's parts are called in this file: as one that it has, or else as its dialect has them."""
    dialect = DIALECTS.get(found.dialect or "")
    if dialect is None:
        names = "peft" if found.schemes.keys() & {"bare", "peft"} else "kohya"
        dialect = DIALECTS[names]
    endings = dict(dialect.endings)
    for adapter in found.adapters:
        if adapter.family.name == "lora" and "up" in adapter.keys and "down" in adapter.keys:
            own = {part: ending_of(adapter.keys[part]) for part in ("up", "down")}
            if all(e is not None and not e.body for e in own.values()):
                return endings | {part: e.text for part, e in own.items() if e is not None}
    return endings


def _module(
    own: OwnModules, adapter: Adapter, alpha: float | None, told: Told, endings: Mapping[str, str], base: Base | None,
    *, plain: bool,
) -> Module | None:  # fmt: skip
    """The module, if the adapter can be cut; what of it is not a part of that is kept."""
    family, keys = adapter.family, adapter.keys
    specs = {key: own.opened.tensors[key].spec for key in keys.values()}
    parts = sources(adapter, specs)
    shape = family.shape(adapter.shapes)
    if not family.changes_weight(keys) or (shape is not None and len(shape) < 2):
        own.kept += [Kept(key) for key in keys.values()]
        return None
    form = family.form(keys) or ()
    dora = "dora_scale" in keys
    depends = dora or family.delta is None
    component = adapter.beginning.text.partition(".")[0]
    if depends and base is not None:
        frame = base.frame(adapter)
        rest = {part: s for part, s in parts.items() if part not in family.of_bias}
        biases = [part for part in keys if part in family.of_bias]
        own.kept += [Kept(keys[part]) for part in biases]
        whole = (sum(slot.spec.rows for slot in frame), *frame[0].spec.shape[1:])
        # lora_up's bias is multiplied by alpha / rank, and so cannot stand alone, nor beside another strength.
        bound = {part: adapter.shapes[part] for part in biases if part in family.optional}
        scale = (family.scale(Description(adapter.shapes, alpha, told)) or 1.0) if bound else 1.0
        term = Term(0, adapter.name, family, rest, alpha, told, 1 / scale, whole, frame=frame, base=base.number)
        name = _of_a_lora(own, adapter)
        return Module(Sum(name, (term,), whole), component, _names(own, adapter, endings, name),
                      dtype_of(parts), adapter.body, scale, kept=bound)  # fmt: skip
    if family.delta is None or (dora and (plain or family.lowrank is None)):
        why = "it has a magnitude (DoRA)" if dora and family.delta is not None else f"its family is {family.name}"
        own.kept += [Kept(key, f"{why}, whose change depends on the model's weights") for key in keys.values()]
        return None
    assert shape is not None
    if family.flat and len(shape) == 2:
        shape = _with_kernel(own, adapter, shape, base)
    mine = {part: s for part, s in parts.items() if part in form and part not in family.of_bias}
    along = {part: key for part, key in keys.items() if part not in mine and part != "alpha"}
    own.kept += [Kept(key) for key in along.values()]
    scale = family.scale(Description(adapter.shapes, alpha, told))
    term = Term(0, adapter.name, family, mine, alpha, told, 1.0, shape, apart=True)
    is_lora = family.name == "lora" and not (plain and "mid" in mine)
    stored = {part: key for part, key in keys.items() if part in mine or part == "alpha"} if is_lora else {}
    return Module(
        Sum(adapter.name, (term,), shape), component, _names(own, adapter, endings, adapter.name) | dict(stored),
        dtype_of(parts), adapter.body, scale, stored, adapter.rank if is_lora else None,
        {part: adapter.shapes[part] for part in along},
    )  # fmt: skip


def _with_kernel(own: OwnModules, adapter: Adapter, shape: Shape, base: Base | None) -> Shape:
    """The shape of a weight whose kernel may be flattened: as the base has it, or else as the architecture tells."""
    if base is not None:
        with contextlib.suppress(MismatchError):  # it is not needed for more
            frame = base.frame(adapter)
            return (sum(slot.spec.rows for slot in frame), *frame[0].spec.shape[1:])
    if adapter.target is None or own.found.architecture is None:
        return shape
    architecture = ARCHITECTURES.get(own.found.architecture)
    place = next(c for c in architecture.components if c.name == adapter.component)
    return unflattened(shape, adapter.target.names[0], place)


def dtype_of(parts: Mapping[str, Source]) -> str:
    """That of the parts, the first of those that hold values."""
    return next(source.spec.dtype for source in parts.values() if source.spec.dtype in ARITHMETIC)


def _of_a_lora(own: OwnModules, adapter: Adapter) -> str:
    """What it is called as a LoRA: kohya's OFT alone begins with oft_unet_, where no tool looks for one."""
    if adapter.beginning.text != "oft_unet_":
        return adapter.name
    found = f"lora_unet_{adapter.body}"
    return adapter.name if any(other.name == found for other in own.found.adapters) else found


def _names(own: OwnModules, adapter: Adapter, endings: Mapping[str, str], name: str) -> dict[str, str]:
    """The keys of a LoRA in the adapter's place; one for alpha where this file has alphas among its tensors."""
    parts = ["up", "down"]
    dialect = DIALECTS.get(own.found.dialect or "")
    if (dialect is None or dialect.alpha == "tensor") and not own.is_folder:  # PEFT and diffusers have no whole ones
        parts.append("diff")
    if "alpha" in adapter.keys or (own.has_alphas and not own.has_settings):
        parts.append("alpha")
    return {part: name + endings[part] for part in parts}


# ------------------------------------------------------------------------------------------------ what is said beside


def settings_of(
    own: OwnModules, written: Sequence[tuple[str, Setting]], outputs: Iterable[str]
) -> tuple[dict[str, str], tuple[OutputFile, ...], dict[str, bytes]]:
    """The metadata, files and texts that say the ranks and alphas of what is written, where the file says them so.

    written: of each LoRA its component, as its name begins, and what settings say of it.
    """
    opened, metadata = own.opened, {}
    settings = read_settings(opened)
    by_component: dict[str, list[Setting]] = {}
    for component, module in written:
        by_component.setdefault(component if component in settings else "", []).append(module)
    header = opened.metadata.get(HEADER)
    known = _known(own) if settings else []
    configs = {
        name: _config(settings[name], modules, known) for name, modules in by_component.items() if name in settings
    }
    if header is not None:
        flat = {f"{name}.{k}": v for name, config in configs.items() for k, v in config.items()}
        metadata[HEADER] = json.dumps(flat, indent=2, sort_keys=True)
    if written and "ss_network_dim" in opened.metadata:
        metadata |= _kohya(opened.metadata, [module for _, module in written])
    if not own.is_folder:
        return metadata, (), {}
    files, extras = [], {}
    for component in opened.components or ("",):
        folder = f"{component}/" if component else ""
        start = f"{component}." if component else ""
        keys = {key: key.removeprefix(start) for key in outputs if key.startswith(start)}
        if keys:
            files.append(OutputFile(f"{folder}adapter_model.safetensors", keys))
            config = configs.get(component, settings.get(component, {}))
            extras[f"{folder}{FILE}"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return metadata, tuple(files), extras


def _kohya(metadata: Mapping[str, str], written: Sequence[Setting]) -> dict[str, str]:
    """kohya's ranks and alphas; those of larger kernels stand apart where they did, among a network's arguments."""
    try:
        arguments = json.loads(metadata.get("ss_network_args", ""))
    except ValueError:
        arguments = None
    apart = isinstance(arguments, dict) and "conv_dim" in arguments
    kernels = [m for m in written if apart and math.prod(m.shapes["down"][2:]) > 1]
    rest = [m for m in written if m not in kernels] or kernels
    found = {
        "ss_network_dim": told(metadata, "ss_network_dim", {m.ranks[0] for m in rest}),
        "ss_network_alpha": told(metadata, "ss_network_alpha", {m.ranks[1] for m in rest}),
    }
    if apart and not kernels:
        rest_of = {key: value for key, value in arguments.items() if key not in ("conv_dim", "conv_alpha")}
        found["ss_network_args"] = json.dumps(rest_of)
    elif kernels:
        given = {key: str(arguments.get(key, "")) for key in ("conv_dim", "conv_alpha")}
        said = {"conv_dim": told(given, "conv_dim", {m.ranks[0] for m in kernels})}
        if "conv_alpha" in arguments:
            said["conv_alpha"] = told(given, "conv_alpha", {m.ranks[1] for m in kernels})
        found["ss_network_args"] = json.dumps({**arguments, **said})
    return found


def _known(own: OwnModules) -> list[str]:
    """Names that the network has, as far as they are known: those of the file, and its architecture's."""
    found = [adapter.body for adapter in own.found.adapters]
    if own.found.architecture is not None:
        for component in ARCHITECTURES.get(own.found.architecture).components:
            network = NETWORKS.get(component.network)
            found += [rule.key for rule in network.tables()[network.canonical].rules]
    return found


def _config(given: Mapping[str, Any], modules: Sequence[Setting], known: Sequence[str]) -> dict[str, Any]:
    """PEFT's configuration of LoRAs of these ranks, and all else that the given one says."""
    made = peft_config("lora", modules, known)
    made = {k: v for k, v in made.items() if k not in given or k not in ("lora_dropout", "bias")}
    others = {k: v for k, v in given.items() if k not in _OF_OTHERS}
    return {**others, **made, **({"peft_type": "LORA"} if "peft_type" in given else {})}


# What settings of other families than LoRA say beside rank and alpha: LoHa, LoKr, OFT.
_OF_OTHERS = frozenset({
    "alpha", "init_weights", "use_effective_conv2d", "decompose_both", "decompose_factor", "module_dropout",
    "rank_dropout", "rank_dropout_scale", "oft_block_size", "eps", "coft", "block_share", "use_cayley_neumann",
    "num_cayley_neumann_terms",
})  # fmt: skip
