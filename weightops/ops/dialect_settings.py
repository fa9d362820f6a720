"""What a dialect keeps beside the factors: PEFT's settings, in a folder or in a header, and kohya's metadata."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from weightops.errors import MismatchError, listing, quote
from weightops.files.folder import OutputFile
from weightops.lora.settings import FILE, HEADER, Module, peft_config, plain
from weightops.lora.units import STRENGTH_GOES_INTO, Unit
from weightops.naming.keymap import NETWORKS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from weightops.files.checkpoint import Checkpoint
    from weightops.lora.dialects import Dialect
    from weightops.naming.keymap import Architecture


class State(Protocol):
    """What is known of an adapter file that is being planned. homes: output key -> its component."""

    @property
    def dialect(self) -> Dialect: ...
    @property
    def architecture(self) -> Architecture: ...
    @property
    def opened(self) -> Checkpoint: ...
    @property
    def homes(self) -> dict[str, str]: ...


# kohya's word for the base model, by which others tell what a LoRA is for. Source: sd-scripts, library/train_util.py.
_VERSIONS = {"sd15": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "flux": "flux1"}

# Several components' files may hold the same names: until they are written, this keeps them apart.
APART = "\0"


def is_beside(dialect: Dialect, family: str) -> bool:
    """Does alpha of this family stand beside the tensors? diffusers' header is for LoRA alone."""
    return family in STRENGTH_GOES_INTO if dialect.alpha == "config" else dialect.alpha == "header" and family == "lora"


def refuse_what_peft_lacks(state: State, units: Sequence[Unit]) -> None:
    """PEFT's magnitudes (DoRA) are for LoRA alone, one for each output, in every module or in none; no Tucker cores."""
    name = state.dialect.name
    for unit in units:
        if "dora_scale" not in unit.parts:
            continue
        spec, module = unit.parts["dora_scale"][0], quote(unit.pieces[0].adapter)
        if unit.family != "lora":
            _refuse(state, f"{module} is a {unit.family} with magnitudes, and {name} has them for LoRA alone")
        if spec.rows == 1 and spec.values != 1:
            what = f"{module} has a magnitude for each input, {list(spec.shape)}"
            _refuse(state, f"{what}, and {name}'s DoRA one for each output")
        beside = [u for u in units if u.component == unit.component and u.family == "lora"]
        without = [u.pieces[0].adapter for u in beside if "dora_scale" not in u.parts]
        if without:
            what = f"has magnitudes (DoRA) for some modules, and none for {listing(without)}"
            _refuse(state, f"{what}: {name} has them for all or none")
    cores = [u.pieces[0].adapter for u in units if u.family == "lora" and "mid" in u.parts]
    if cores:
        _refuse(state, f"{name} has no Tucker cores (lora_mid): {listing(cores)}")


def _refuse(state: State, what: str) -> NoReturn:
    raise MismatchError(state.opened.label, what, "kohya, comfy and onetrainer can hold it")


def metadata_of(state: State, units: Sequence[Unit]) -> tuple[dict[str, str], dict[str, str]]:
    """kohya's dim and alpha, true of what is written; and diffusers' header."""
    found: dict[str, str] = {}
    ranks = [u for u in units if u.rank is not None]
    if ranks and ("ss_network_dim" in state.opened.metadata or state.dialect.name == "kohya"):
        found["ss_network_dim"] = told(state.opened.metadata, "ss_network_dim", {u.rank or 0 for u in ranks})
        found["ss_network_alpha"] = told(state.opened.metadata, "ss_network_alpha", {_alpha(u) for u in ranks})
    flat: dict[str, Any] = {}
    if state.dialect.alpha == "header":
        for component in dict.fromkeys(u.component for u in units):
            mine = [u for u in units if u.component == component and u.family == "lora"]
            if any(u.alpha is not None and u.alpha != u.rank for u in mine):
                flat |= {f"{component}.{k}": v for k, v in _config(state, component, "lora", mine).items()}
    return found, {HEADER: json.dumps(flat, indent=2, sort_keys=True)} if flat else {}


def told(metadata: Mapping[str, str], key: str, values: set[int] | set[float]) -> str:
    """The one number that is true of all modules, spelled as it was; "Dynamic", in kohya's word, for several."""
    if len(values) > 1:
        return "Dynamic"
    value = values.pop()
    given = metadata.get(key, "")
    try:
        return given if float(given) == value else str(plain(value))
    except ValueError:
        return str(plain(value))


def _alpha(unit: Unit) -> float:
    return float(unit.rank or 1) if unit.alpha is None else unit.alpha


def _config(state: State, component: str, family: str, units: Sequence[Unit]) -> dict[str, Any]:
    place = next(c for c in state.architecture.components if c.name == component)
    network = NETWORKS.get(place.network)
    templates = [rule.key for rule in network.tables()[network.canonical].rules]
    return peft_config(family, modules_of(units), templates)


def modules_of(units: Iterable[Unit]) -> list[Module]:
    """The units as PEFT's configuration speaks of them."""
    return [Module(u.module, u.rank, u.alpha, {part: s.shape for part, (s, _) in u.parts.items()}) for u in units]


_PEFT_TYPES = {"lora": "LORA", "loha": "LOHA", "lokr": "LOKR"}


def folder_of(state: State, units: Sequence[Unit]) -> tuple[tuple[OutputFile, ...], dict[str, bytes]]:
    """PEFT's folder: one component in it, or each in a folder of its own."""
    if not state.dialect.folder:
        return (), {}
    components = list(dict.fromkeys(u.component for u in units))
    files, extras = [], {}
    for component in components:
        mine = [u for u in units if u.component == component]
        families = {u.family for u in mine}
        if len(families) > 1 or not families <= _PEFT_TYPES.keys():
            what = f"a PEFT folder holds one family of PEFT's, found {', '.join(sorted(families))}"
            raise MismatchError(state.opened.label, what)
        family = families.pop()
        config = _config(state, component, family, mine)
        config |= {"peft_type": _PEFT_TYPES[family], "task_type": None, "inference_mode": True,
                   "base_model_name_or_path": None, "modules_to_save": None}  # fmt: skip
        folder = f"{component}/" if len(components) > 1 else ""
        keys = {key: key.partition(APART)[2] for key, home in state.homes.items() if home == component}
        files.append(OutputFile(f"{folder}adapter_model.safetensors", keys))
        extras[f"{folder}{FILE}"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return tuple(files), extras


def told_of_base(dialect: str, architecture: str | None) -> dict[str, str]:
    """What kohya's metadata says of a new LoRA and of its base model, where the file is in these names."""
    if dialect != "kohya":
        return {}
    found = {"ss_network_module": "networks.lora"}
    version = _VERSIONS.get(architecture or "")
    if version is not None:
        found |= {"ss_base_model_version": version, "ss_v2": str(version == "sd_v2")}
    return found
