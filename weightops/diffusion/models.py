"""Any model that we read as a diffusers pipeline: a file, a folder, a repository or a recipe, swapped VAE and all."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from weightops.diffusion.extras import hushed, need
from weightops.engine.run import Progress, ignore
from weightops.errors import (
    FormatError,
    MemoryRefused,
    MismatchError,
    NetworkError,
    UsageError,
    WeightopsError,
    listing,
    quote,
)
from weightops.files.checkpoint import open_checkpoint
from weightops.files.held import Held
from weightops.merging.recipe import Model, Recipe
from weightops.naming.identify import identify
from weightops.naming.keymap import ARCHITECTURES
from weightops.ops.components import members_of
from weightops.ops.convert import convert
from weightops.ops.folders import TOKENIZER
from weightops.ops.merge import merge, read_recipe
from weightops.ops.prediction import KINDS, prediction_of

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    import torch

    from weightops.files.checkpoint import Checkpoint, Named
    from weightops.ops.report import Report

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
FLOW = ("sd3", "flux", "flux2", "chroma", "qwen_image", "z_image", "lumina2", "wan", "hunyuan_video")
# What SD3 makes images without, if its folder says so: zeros stand in place of its T5.
_OPTIONAL = ("text_encoder_3", "tokenizer_3")
# Where a folder names these, many lack them.
_SAFETY = ("safety_checker", "feature_extractor")
# A LoRA as a user names it: "FILE:0.5", or the file and its strength.
LoraName = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]


@dataclass(frozen=True, slots=True)
class Worn:
    """A LoRA on a pipeline. way: "adapter" (beside the weights, by peft) or "fused" (into them, by our engine)."""

    file: str
    strength: float
    way: str
    modules: int
    reason: str = ""


@dataclass(slots=True)
class Loaded:
    """A pipeline, its networks on `device` in `dtype`, in eval mode, no parameter of them asking for gradients.

    architecture: as `inspect` calls it, "" where it is not known. label: what the user typed. hashes: of each file that
    was read, by its name. source: what our verbs read for the weights; like: where configurations and tokenizers are.
    """

    pipe: Any
    architecture: str
    label: str
    device: torch.device
    dtype: torch.dtype
    source: Named
    like: str | None = None
    own: tuple[str, ...] = ()  # the components of `source`, where it lacks some, which are those of `like`
    hashes: dict[str, str] = field(default_factory=dict)
    loras: tuple[Worn, ...] = ()
    touched: bool = False  # are the weights others than those of `source`?
    warnings: list[str] = field(default_factory=list)


def load(
    model: str | os.PathLike[str],
    *,
    where: str,
    loras: Sequence[LoraName] = (),
    vae: str | os.PathLike[str] | None = None,
    like: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    prediction: str | None = None,
    on_progress: Progress = ignore,
) -> Loaded:
    """The pipeline of `model`: a file, diffusers folder, hf://owner/name[/file], or a recipe merged in memory (.yaml).

    where: the command, for errors. loras: worn on it (`adapters.wear`). vae: another VAE in place of its own. like: a
    folder with configurations and tokenizers, and with the components that a file of one network lacks. dtype: auto,
    fp32, fp16 or bf16; auto is fp32 on the CPU, and on CUDA 16 bits: those of the file, else bf16 for flow matching,
    fp16 for others. prediction: epsilon or v_prediction, where the file does not say. Raises WeightopsError.
    """
    need(where, "torch", "diffusers", "transformers")
    from weightops.engine.tensors import resolve_device

    if dtype not in ("auto", *DTYPES):
        raise UsageError("--dtype", f"found {quote(dtype)}, expected auto, {', '.join(DTYPES)}")
    place = resolve_device(device)
    label, like = os.fspath(model), None if like is None else _at_hand(os.fspath(like), folder=True)
    hashes: dict[str, str] = {}
    warnings: list[str] = []
    source = _source(label, None if vae is None else os.fspath(vae), hashes, warnings, on_progress)
    with open_checkpoint(source) as opened:
        architecture = _architecture(opened, label)
        _check_prediction(prediction, architecture, label)
        kind = _dtype(dtype, place, architecture, opened)
        _check_room(opened, label, kind, place)
        whole = opened.container == "diffusers" and not isinstance(source, Held)
        said = prediction_of(opened, architecture, None, asked=prediction, like=None)
    own: tuple[str, ...] = ()
    with hushed():
        if whole:
            pipe = _from_folder(str(source), label, kind)
            hashes |= _hashes(str(source), label)
        else:
            made = diffusers_weights(source, label, like, prediction, hashes, warnings, on_progress)
            own = _own_components(made, like, label)
            pipe = _from_weights(made, label, like, own, kind, hashes)
    _check_tokenizers(pipe, label)
    if said is not None and ((whole and prediction is not None) or (own and said.by)):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **said.scheduler)
    loaded = Loaded(
        pipe, architecture, label, _torch_device(place), _torch_dtype(kind), source, like, own, hashes,
        warnings=warnings,
    )  # fmt: skip
    settle(loaded)
    if loras:
        from weightops.diffusion.adapters import wear

        wear(loaded, loras)
    return loaded


def settle(loaded: Loaded) -> None:
    """Everything on the device, for inference; what lies beside the weights in the dtype, too.

    The weights are in it since they were read, but for those that their class keeps in float32, as T5 does.
    """
    with hushed():
        for network in networks(loaded.pipe).values():
            network.to(device=loaded.device)
            for name, parameter in network.named_parameters():
                if ".lora_" in name and parameter.is_floating_point():
                    parameter.data = parameter.data.to(loaded.dtype)
            network.eval()
            network.requires_grad_(False)
            if loaded.device.type == "cpu":
                _own(network)
    loaded.pipe.set_progress_bar_config(disable=True)


def _own(network: Any) -> None:
    """Each weight in memory of its own, aligned as a new one's.

    Within a mapped file it lies anywhere, and a matrix product rounds by where its operands lie: the same weights would
    make other images from a folder than from a file.
    """
    for parameter in network.parameters():
        if parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def networks(pipe: Any) -> dict[str, Any]:
    """The pipeline's components that have weights, by name."""
    import torch

    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


# ------------------------------------------------------------------------------------------------ where it is


def _source(
    label: str, vae: str | None, hashes: dict[str, str], warnings: list[str], on_progress: Progress
) -> Named:  # fmt: skip
    """What verbs can read: a path on this machine, or a merge in memory."""
    recipe = None
    if label.lower().endswith((".yaml", ".yml")):
        recipe = read_recipe(label)
    elif vae is not None:
        here = Model(_at_hand(label))
        recipe = Recipe(here, here, (here,))
    if recipe is None:
        return _at_hand(label)
    if vae is not None:
        recipe = replace(recipe, vae=_at_hand(vae))
    held = Held(label)
    report = merge(recipe=recipe, output=held, on_progress=on_progress)
    _note(hashes, report)
    warnings += report.warnings
    return held


def _note(hashes: dict[str, str], report: Report) -> None:
    """The hashes of what was read, by name; a second file of one name by its folder's too."""
    for entry in report.inputs:
        path, hashed = PurePath(entry["path"]), str(entry["hash"])
        name = path.name or str(path)
        if hashes.get(name, hashed) != hashed:
            name = "/".join(path.parts[-2:])
        hashes[name] = hashed


def _at_hand(label: str, *, folder: bool = False) -> str:
    """A path on this machine: what is on a hub is fetched into the library's cache first."""
    if label.startswith("hf://"):
        return _fetched(label)
    there = os.path.exists(label)  # noqa: PTH110 - pathlib's raises for a name that is too long
    if not there and label.count("/") == 1 and not label.lower().endswith((".safetensors", ".ckpt")):
        raise UsageError(label, "no such file or folder", f"a repository is named hf://{label}")
    if folder and not os.path.isdir(label):  # noqa: PTH112
        raise UsageError("--like", f"no such folder: {label}", "name a diffusers folder, or hf://owner/name")
    return label


def _fetched(label: str) -> str:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    from weightops.files.hub import parse_address

    address = parse_address(label)
    try:
        if address.path.lower().endswith((".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".json")):
            return huggingface_hub.hf_hub_download(address.repo, address.path, revision=address.revision)
        if not address.path:
            with hushed():
                return str(_pipelines().download(address.repo, revision=address.revision))
        patterns = f"{address.path}/*"
        root = huggingface_hub.snapshot_download(address.repo, revision=address.revision, allow_patterns=patterns)
        return str(Path(root, address.path))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise NetworkError(label, f"cannot be fetched: {reason}", "name a file or a folder on this machine") from None


def _architecture(opened: Checkpoint, label: str) -> str:
    """The architecture's name, "" for a diffusers folder that we do not know. Raises MismatchError, FormatError."""
    if not opened.tensors:
        raise FormatError(label, "holds no tensors, expected a model")
    identity = identify(opened.tensors)
    if identity.kind in ("lora", "embedding", "controlnet"):
        hint = "--lora FILE puts it on a model" if identity.kind == "lora" else None
        raise MismatchError(label, f"expected a model, found: {identity.kind}", hint)
    try:
        found, _ = members_of(opened, identity, drop=(), carried=tuple(opened.components))
    except MismatchError:
        if opened.container == "diffusers":
            return ""
        raise
    if found is None and opened.container != "diffusers":
        raise MismatchError(label, f"expected a model, found: {identity.kind}", "a VAE is swapped in with --vae FILE")
    return "" if found is None else found.name


def _check_prediction(asked: str | None, architecture: str, label: str) -> None:
    """Refuse what the model cannot predict. Raises UsageError."""
    if asked is not None and asked not in KINDS:
        raise UsageError("--prediction", f"found {quote(asked)}, expected {' or '.join(KINDS)}")
    if asked is not None and architecture in FLOW:
        raise UsageError("--prediction", f"found {asked}, but {label} is trained by flow matching")


def _dtype(asked: str, place: str, architecture: str, opened: Checkpoint) -> str:
    if asked != "auto":
        return DTYPES[asked]
    if place == "cpu":
        return "float32"
    held: dict[str, int] = {}
    for info in opened.tensors.values():
        held[info.spec.dtype] = held.get(info.spec.dtype, 0) + info.spec.nbytes
    most = max(held, key=lambda code: held[code])
    return {"BF16": "bfloat16", "F16": "float16"}.get(most, "bfloat16" if architecture in FLOW else "float16")


def _check_room(opened: Checkpoint, label: str, kind: str, place: str) -> None:
    """Refuse a model that cannot fit, before a byte of it is read."""
    import torch

    width = 4 if kind == "float32" else 2
    needed = width * sum(info.spec.values for info in opened.tensors.values() if info.spec.dtype not in ("I64", "I32"))
    free = torch.cuda.mem_get_info(place)[0] if place != "cpu" else _free_memory()
    if free is not None and needed > free:
        what = f"takes {needed / 2**30:.1f} GiB in {kind}, and {free / 2**30:.1f} GiB are free"
        hint = "--dtype bf16 takes half" if width == 4 else "close what else runs, or use a smaller model"
        raise MemoryRefused(label, what, hint)


def _free_memory() -> int | None:
    """Bytes that the system can still give, None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _torch_device(place: str) -> torch.device:
    import torch

    return torch.device(place)


def _torch_dtype(kind: str) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, kind)
    return found


def _pipelines() -> Any:
    """diffusers' class that reads any folder; it carries no types."""
    return importlib.import_module("diffusers").DiffusionPipeline


# ------------------------------------------------------------------------------------------------ a whole folder


def _from_folder(folder: str, label: str, kind: str, parts: Mapping[str, Any] | None = None) -> Any:
    """The pipeline of a folder, these parts in place of its own. Raises FormatError, MemoryRefused."""
    parts = {} if parts is None else parts
    with open_checkpoint(folder) as opened:
        others = {name: None for name in _left_out(opened, folder, label) if name not in parts}
        # Many folders hold half precision alone, under this name.
        variant = "fp16" if any(".fp16." in path.name for path in _paths(opened)) else None
    given = {"dtype": _torch_dtype(kind), "variant": variant, "local_files_only": True}
    try:
        pipe = _pipelines().from_pretrained(folder, **parts, **others, **given)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RuntimeError, ImportError) as e:
        raise _not_loaded(label, e) from None
    _check_read(pipe, folder, label, but=parts)
    return pipe


def _not_loaded(label: str, error: Exception) -> WeightopsError:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return MemoryRefused(label, "the device has too little memory for it", "--dtype bf16 takes half of fp32")
    return FormatError(label, f"diffusers cannot load it: {' '.join(str(error).split())[:300]}")


def _left_out(opened: Checkpoint, folder: str, label: str) -> list[str]:
    """What the pipeline of a folder is to be made without. Raises FormatError where it lacks what it cannot be without.

    A safety checker may be missing; what else model_index.json names may not.
    """
    index = opened.json_beside("model_index.json") or {}
    found = []
    for name, value in index.items():
        if not (isinstance(value, list) and len(value) == 2 and name.isidentifier() and name[0] != "_"):
            continue
        if value[0] is None:
            found += [name] if name in _OPTIONAL else []
        elif not Path(folder, name).is_dir():
            if name not in _SAFETY or "safety_checker" not in index:
                raise FormatError(label, f"its model_index.json names {quote(name)}, of which there is no folder")
            found.append(name)
    return found


def _check_read(pipe: Any, folder: str, label: str, *, but: Container[str]) -> None:
    """Refuse a folder that lacks weights: the libraries leave some empty, and fill others with random numbers.

    but: components that are not of this folder. Raises FormatError.
    """
    with open_checkpoint(folder) as opened:
        tensors = opened.tensors
    for component, network in networks(pipe).items():
        if component in but:
            continue
        lacks = [name for name, parameter in network.named_parameters() if parameter.is_meta]
        if type(network).__name__.startswith(("CLIPText", "T5Encoder")):
            spelled: dict[int, list[str]] = {}  # a tied weight has several names, of which a file may hold one
            for name, parameter in network.named_parameters(remove_duplicate=False):
                spelled.setdefault(id(parameter), []).extend(_spellings(name))
            lacks += [n[0] for n in spelled.values() if not any(f"{component}.{name}" in tensors for name in n)]
        if lacks:
            what = f"its {component} lacks {len(lacks):,} tensor{'' if len(lacks) == 1 else 's'}: {listing(lacks)}"
            raise FormatError(label, what, "it may be cut short or mangled")


def _check_tokenizers(pipe: Any, label: str) -> None:
    """Refuse tokenizers that the library made of nothing, for want of their files: to them all prompts are alike."""
    for name, tokenizer in pipe.components.items():
        encoder = pipe.components.get(name.replace("tokenizer", "text_encoder"))
        known = getattr(getattr(encoder, "config", None), "vocab_size", None)
        if not name.startswith("tokenizer") or tokenizer is None or not isinstance(known, int):
            continue
        if len(tokenizer) < known / 2:
            what = f"its {name} has {len(tokenizer):,} tokens, its text encoder {known:,}: files of it are missing"
            raise FormatError(label, what, f"bring the files of {name}/, from where the model came from")


def _paths(opened: Checkpoint) -> list[Path]:
    """The files of a checkpoint."""
    return [Path(str(getattr(file, "path", file.label))) for file in opened.files]


def _hashes(folder: str, label: str) -> dict[str, str]:
    """The XXH3-128 of the folder's weights, all of them as one."""
    import xxhash

    total = xxhash.xxh3_128()
    with open_checkpoint(folder) as opened:
        paths = sorted(_paths(opened))
    for path in paths:
        with path.open("rb") as file:
            while data := file.read(4 << 20):
                total.update(data)
    return {Path(label).name or label: f"xxh3_128:{total.hexdigest()}"}


# ------------------------------------------------------------------------------------------------ from weights


def diffusers_weights(
    source: Named, label: str, like: str | None, prediction: str | None, hashes: dict[str, str], warnings: list[str],
    on_progress: Progress = ignore, *, tokenizer: bool = True,
) -> Held:  # fmt: skip
    """The weights under diffusers' names, in memory, with the configurations and tokenizers of a diffusers folder.

    hashes, warnings: what is read, and what there is to say of it, is added.
    """
    held = Held(label)
    if like is None and tokenizer:
        _fetch_tokenizers(source)
    try:
        report = convert(
            source, to="diffusers", output=held, like=like, prediction=prediction, no_tokenizer=not tokenizer,
            on_progress=on_progress,
        )  # fmt: skip
    except UsageError as e:
        if e.hint and "--no-tokenizer" in e.hint:
            raise UsageError(e.where, e.what, e.hint.partition("; --no-tokenizer")[0]) from None
        raise
    if not isinstance(source, Held):
        _note(hashes, report)
    if "model_index.json" in held.extras:  # of another folder it is said how to use its parts, which is done here
        warnings += report.warnings
    return held


def _fetch_tokenizers(source: Named) -> None:
    """Have the hub's cache hold the tokenizers that a single file's architecture names, where a hub can be reached."""
    import contextlib

    import huggingface_hub
    from huggingface_hub import constants, try_to_load_from_cache

    with open_checkpoint(source) as opened:
        if constants.HF_HUB_OFFLINE or opened.container == "diffusers":
            return
        found = next((a for a in (_architecture(opened, opened.label),) if a), "")
    pipeline = ARCHITECTURES.get(found).pipeline if found else None
    for places in (pipeline.tokenizers if pipeline is not None else {}).values():
        for place in places:
            owner, name, *folders = place.split("/")
            files = ["/".join([*folders, file]) for file in TOKENIZER]
            if any(isinstance(try_to_load_from_cache(f"{owner}/{name}", file), str) for file in files):
                break
            with contextlib.suppress(Exception):  # whatever it is, convert says that no tokenizer is at hand
                huggingface_hub.snapshot_download(f"{owner}/{name}", allow_patterns=files, etag_timeout=5)
                break


def _own_components(held: Held, like: str | None, label: str) -> tuple[str, ...]:
    """What is held of a pipeline whose other components are those of the folder `like`; () if it is whole.

    A network alone takes the place of the component that has its class. Raises MismatchError.
    """
    if "model_index.json" in held.extras:
        return ()
    if like is None or not Path(like, "model_index.json").is_file():
        what = "is no whole pipeline: it lacks components that one needs to make images"
        raise MismatchError(label, what, "--like FOLDER takes the others of a diffusers folder")
    if any("/" in file.path for file in held.files):
        return tuple(states(held))
    kind = json.loads(held.extras["config.json"]).get("_class_name")
    with open_checkpoint(like) as opened:
        index = opened.json_beside("model_index.json") or {}
    found = [name for name, value in index.items() if isinstance(value, list) and value[-1:] == [kind]]
    if len(found) != 1:
        what = f"is not for this model: of its components {len(found) or 'none'} are of the class {quote(str(kind))}"
        raise MismatchError(like, what, f"name a diffusers folder into which {label} fits")
    return (found[0],)


def _from_weights(
    held: Held, label: str, like: str | None, own: Sequence[str], kind: str, hashes: dict[str, str]
) -> Any:  # fmt: skip
    """A pipeline of what is held: its `own` components, if they are not all; the rest is of the folder `like`."""
    small = held.extras
    if own and like is not None:
        hashes |= {name: hashed for name, hashed in _hashes(like, like).items() if name not in hashes}
    with tempfile.TemporaryDirectory(prefix="weightops-") as name:
        folder = Path(name)
        for path, data in small.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        parts = {
            component: _network(folder if "config.json" in small else folder / component, component, state, label, kind)
            for component, state in states(held, own).items()
        }
        if own and like is not None:
            return _from_folder(like, like, kind, parts)
        try:
            return _pipelines().from_pretrained(str(folder), **parts, dtype=_torch_dtype(kind), local_files_only=True)
        except (OSError, ValueError, AttributeError, KeyError, TypeError, RuntimeError, ImportError) as e:
            raise _not_loaded(label, e) from None


def states(held: Held, own: Sequence[str] = ()) -> dict[str, dict[str, torch.Tensor]]:
    """Each component's weights by their names in it, over the bytes that are held. own: what a network alone is."""
    from weightops.engine.tensors import as_tensor

    found: dict[str, dict[str, torch.Tensor]] = {}
    names = held.names()
    alone = None if any("/" in file.path for file in held.files) else own[0]
    for key, spec in held.specs.items():
        component, _, name = names[key].partition(".") if alone is None else (alone, "", names[key])
        start, stop = held.places[key]
        found.setdefault(component, {})[name] = as_tensor(held.data[start:stop], spec)
    return found


def _network(folder: Path, component: str, state: dict[str, torch.Tensor], label: str, kind: str) -> Any:
    """A network of the class that its config.json says, with these weights: strictly these."""
    init_empty_weights: Any = importlib.import_module("accelerate").init_empty_weights
    wanted = _torch_dtype(kind)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "_class_name" in config:
            cls: Any = getattr(importlib.import_module("diffusers"), config["_class_name"])
            with init_empty_weights(include_buffers=False):
                network = cls.from_config(config)
            kept = cls._keep_in_fp32_modules or ()
            network.load_state_dict({n: _cast(n, t, wanted, kept) for n, t in state.items()}, strict=True, assign=True)
            return network
        cls = getattr(importlib.import_module("transformers"), config["architectures"][0])
        settings = cls.config_class.from_pretrained(folder)
        network, report = cls.from_pretrained(
            None, config=settings, state_dict=state, dtype=wanted, output_loading_info=True
        )
    except (OSError, ValueError, AttributeError, LookupError, TypeError, RuntimeError) as e:
        raise _not_loaded(f"{label} ({component})", e) from None
    missing = sorted(report["missing_keys"]) + [str(m[0]) for m in report["mismatched_keys"]]
    if missing:
        raise FormatError(f"{label} ({component})", f"lacks {len(missing):,} tensors, the first is {quote(missing[0])}")
    return network


def _cast(name: str, tensor: torch.Tensor, wanted: torch.dtype, kept: Iterable[str]) -> torch.Tensor:
    """In the dtype that is asked for; in float32 what its class keeps in that, as diffusers itself has it."""
    import torch

    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.float32 if any(module in name.split(".") for module in kept) else wanted)


def put(network: Any, state: Mapping[str, torch.Tensor], label: str) -> None:
    """These weights in place of the network's own, value by value, in its dtype and on its device."""
    import torch

    own = network.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            spelled = next((n for n in _spellings(name) if n in own), None)
            if spelled is not None:
                own[spelled].copy_(tensor)
            elif not name.endswith("position_ids"):
                raise FormatError(label, f"the network has no tensor {quote(name)}")


def _spellings(name: str) -> Iterable[str]:
    """transformers ≥ 5.6 calls the weights of a CLIPTextModel without the `text_model.` that files have."""
    return name, name.removeprefix("text_model."), f"text_model.{name}"
