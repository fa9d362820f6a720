"""What stands beside the weights of a diffusers folder: config.json from shapes, model_index, scheduler, tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.errors import FormatError, MismatchError, UsageError, quote
from weightops.files.checkpoint import WEIGHTLESS, Checkpoint
from weightops.files.folder import OutputFile
from weightops.files.held import Held
from weightops.naming.keymap import Count, Dim, Has, Which

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightops.files.tensor import TensorSpec
    from weightops.naming.keymap import Architecture, Config, Network, Pipeline
    from weightops.plan import Plan

Shapes = Mapping[str, tuple[int, ...]]

# Readers compare it with the versions that changed the layout; this one has the layout that is written here.
_VERSION = "0.30.0"

# A tokenizer's files, as far as they are there.
TOKENIZER = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_SCHEDULER = "scheduler/scheduler_config.json"
# Any of these sets is a tokenizer.
_VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("tokenizer.model",),
    ("vocab.txt",),
)

# The pipeline of a UNet that sees more than the latent: by the class without, and its number of input channels.
_CLASSES = {
    ("StableDiffusionPipeline", 8): "StableDiffusionInstructPix2PixPipeline",
    ("StableDiffusionPipeline", 9): "StableDiffusionInpaintPipeline",
    ("StableDiffusionXLPipeline", 8): "StableDiffusionXLInstructPix2PixPipeline",
    ("StableDiffusionXLPipeline", 9): "StableDiffusionXLInpaintPipeline",
}


@dataclass(slots=True)
class Folder:
    """Small files by path, which of the components they make a pipeline of, and what is to be said about them.

    missing: why it is no whole pipeline, "" where it is one.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    missing: str = ""
    warnings: list[str] = field(default_factory=list)


def open_like(label: str) -> Checkpoint:
    """The folder that --like names, on disk or on a hub, for its small files; it may be without weights."""
    if label.startswith("hf://"):
        from weightops.files.hub import locate

        place = locate(label)
    else:
        place = Path(label)
    if not place.is_dir():
        raise UsageError("--like", f"no such folder: {label}", "name a diffusers folder, or hf://owner/name")
    return Checkpoint(label, "folder", [], {}, place=place)


def text(document: Mapping[str, Any]) -> bytes:
    """JSON in the form of the libraries' own files."""
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


# ------------------------------------------------------------------------------------------------ config.json


def config_values(config: Config, shapes: Shapes, where: str) -> dict[str, Any]:
    """config.json of a network with tensors of these shapes. Raises FormatError, which begins with `where`."""
    values = {key: _resolved(value, shapes, where) for key, value in config.values.items()}
    if config.library == "diffusers":
        return {"_class_name": config.class_name, "_diffusers_version": _VERSION, **values}
    return {"architectures": [config.class_name], **values}


def _resolved(value: Any, shapes: Shapes, where: str) -> Any:
    """A value of a table, with what it says about shapes looked up in them."""
    match value:
        case Dim(name, axis, divide, root):
            if name not in shapes or axis >= len(shapes[name]):
                raise FormatError(where, f"has no tensor {name}, from which its config.json follows")
            size, rest = divmod(shapes[name][axis], divide)
            number = round(size**0.5) if root else size
            if rest or (root and number * number != size):
                what = "is no square" if root else f"is no multiple of {divide}"
                raise FormatError(where, f"{name} is {list(shapes[name])}: {shapes[name][axis]} {what}")
            return number
        case Count(template):
            return len(_numbers(template, shapes))
        case Has(name, yes, no):
            return _resolved(yes if name in shapes else no, shapes, where)
        case Which(template):
            return _numbers(template, shapes)
        case list() | tuple():
            return [_resolved(v, shapes, where) for v in value]
        case dict():
            return {k: _resolved(v, shapes, where) for k, v in value.items()}
    return value


def _numbers(template: str, shapes: Shapes) -> list[int]:
    """The numbers that stand in the template's place among the names, in order."""
    before, _, after = template.partition("{}")
    found = set()
    for name in shapes:
        number, dot, rest = name[len(before) :].partition(".")
        if name.startswith(before) and number.isdecimal() and (dot + rest).startswith(after):
            found.add(int(number))
    return sorted(found)


def _follows(value: Any) -> bool:
    """Does the value follow from shapes?"""
    if isinstance(value, list | tuple):
        return any(_follows(v) for v in value)
    return isinstance(value, Dim | Count | Has | Which)


def refuse_contradictions(
    config: Config, ours: Mapping[str, Any], theirs: Mapping[str, Any], *, where: str, what: str
) -> None:
    """Refuse a config.json, `where`, whose class or numbers are not those of the tensors of `what`."""
    wrong = [
        f"{key} is {quote(theirs[key])}, but the tensors say {ours[key]}"
        for key, value in config.values.items()
        # null: the class's own default, which follows from the others, as of Flux' out_channels
        if theirs.get(key) is not None and _follows(value) and not _alike(ours[key], theirs[key])
    ]
    name = theirs.get("_class_name") if config.library == "diffusers" else None
    expected = config.values.get("_class_name", config.class_name)
    if name not in (None, expected):
        wrong.insert(0, f"its class is {quote(name)}, expected {expected}")
    if wrong:
        shown = "; ".join(wrong[:5]) + (f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else "")
        raise MismatchError(where, f"is not the configuration of {what}: {shown}", "name a folder of the same model")


def _alike(ours: Any, theirs: Any) -> bool:
    """One number, or as many of it as there are levels, say the same."""
    if isinstance(ours, list) != isinstance(theirs, list):
        many, one = (ours, theirs) if isinstance(ours, list) else (theirs, ours)
        return all(v == one for v in many)
    return bool(ours == theirs)


def component_config(
    network: Network, more: Mapping[str, Any], shapes: Shapes, like: Checkpoint | None, paths: Sequence[str], label: str
) -> bytes:
    """config.json of a component: that of `like`, which must not contradict the tensors, else what these say.

    more: what goes before the network's own values. paths: where it may stand in `like`.
    """
    config = None if network.config is None else replace(network.config, values={**network.config.values, **more})
    if any(name.endswith(".absmax") for name in shapes):
        config = None  # values of 4 bits stand in bytes, in rows of other lengths
    for path in paths:
        theirs = like.json_beside(path) if like is not None else None
        if like is None or theirs is None:
            continue
        if config is not None:
            ours = config_values(config, shapes, label)
            refuse_contradictions(config, ours, theirs, where=f"{like.label} ({path})", what=label)
        return like.bytes_beside(path) or b""
    if config is None:
        what = f"what config.json of its {network.name} should say does not follow from the tensors"
        raise UsageError(label, what, "--like FOLDER takes it from a diffusers folder")
    return text(config_values(config, shapes, label))


# ------------------------------------------------------------------------------------------------ a pipeline


def pipeline_folder(
    architecture: Architecture, components: Mapping[str, int | None], like: Checkpoint | None, *,
    tokenizer: bool, prediction: Mapping[str, Any],
) -> Folder:  # fmt: skip
    """model_index.json and the folders without weights, for components with weights (name -> input channels).

    prediction: what the scheduler's settings are to say of what the model predicts. Raises UsageError where there is
    no tokenizer to be had.
    """
    found = Folder()
    index = _index(architecture, components, like)
    if index is None:
        found.missing = f"no model_index.json, which --like FOLDER gives for {architecture.title}"
        return found
    missing = {n for n, kind in _classes(index).items() if n not in components and not kind.endswith(WEIGHTLESS)}
    optional = {n for n in missing if _is_optional(n, architecture.pipeline)}
    if missing != optional:
        found.missing = f"no model_index.json, for there is no {', no '.join(sorted(missing - optional))}"
        return found
    index |= {name: [None, None] for name in optional}
    for name, kind in _classes(index).items():
        if name == "scheduler":
            found.files[_SCHEDULER] = _scheduler(architecture.pipeline, kind, like, prediction, found)
        elif name.startswith("tokenizer"):
            found.files |= _tokenizer(name, architecture, like) if tokenizer else {}
        elif name not in components:
            files = _small_files(name, like)
            found.files |= files
            index[name] = index[name] if files else [None, None]
    if not tokenizer and any(name.startswith("tokenizer") for name in _classes(index)):
        found.warnings.append(
            "from_pretrained does not load this folder without its tokenizers, which --no-tokenizer left out"
        )
    if "requires_safety_checker" in index and "safety_checker" not in _classes(index):
        index["requires_safety_checker"] = False
    found.files["model_index.json"] = text(index)
    return found


def _classes(index: Mapping[str, Any]) -> dict[str, str]:
    """Folder -> class, of those that the pipeline has. A name that is no plain folder's comes from a hostile file."""
    return {
        name: value[-1]
        for name, value in index.items()
        if name.isidentifier() and name[0] != "_" and isinstance(value, list) and value and isinstance(value[-1], str)
    }


def _index(
    architecture: Architecture, components: Mapping[str, int | None], like: Checkpoint | None
) -> dict[str, Any] | None:
    """model_index.json: of `like` where it has one, else as the architecture's pipeline says."""
    theirs = like.json_beside("model_index.json") if like is not None else None
    pipeline = architecture.pipeline
    if theirs is not None or pipeline is None:
        return theirs
    channels = components.get(architecture.components[0].name)
    name = _CLASSES.get((pipeline.class_name, channels or 0), pipeline.class_name)
    classes = {folder: list(kind) for folder, kind in pipeline.classes.items()}
    return {"_class_name": name, "_diffusers_version": _VERSION, **pipeline.settings, **classes}


def _is_optional(name: str, pipeline: Pipeline | None) -> bool:
    return pipeline is not None and pipeline.classes.get(name, ("", ""))[1] is None


def _scheduler(
    pipeline: Pipeline | None, kind: str, like: Checkpoint | None, prediction: Mapping[str, Any], found: Folder
) -> bytes:
    theirs = like.bytes_beside(_SCHEDULER) if like is not None else None
    if theirs is None:
        settings = pipeline.scheduler if pipeline is not None else {}
        return text({"_class_name": kind, "_diffusers_version": _VERSION, **settings, **prediction})
    assert like is not None
    said = like.json_beside(_SCHEDULER) or {}
    if all(said.get(key) == value for key, value in prediction.items()):
        return theirs
    other = {key: value for key, value in prediction.items() if said.get(key) != value}
    changed = ", ".join(f"{key} {value} in place of {said.get(key)}" for key, value in other.items())
    found.warnings.append(f"the scheduler of {like.label} is taken with {changed}")
    return text({**said, **prediction})


def _tokenizer(name: str, architecture: Architecture, like: Checkpoint | None) -> dict[str, bytes]:
    """A tokenizer's files: of `like`, else from the local cache of the hub, which is not asked."""
    files = _small_files(name, like)
    sources = architecture.pipeline.tokenizers.get(name, ()) if architecture.pipeline is not None else ()
    for source in () if _is_tokenizer(name, files) else sources:
        files = _cached(name, source)
        if _is_tokenizer(name, files):
            break
    if _is_tokenizer(name, files):
        return files
    raise UsageError(
        f"{architecture.title}: {name}",
        "the pipeline needs a tokenizer, and none is at hand",
        "--like FOLDER takes it from a diffusers folder or hf://owner/name; --no-tokenizer does without",
    )


def _is_tokenizer(name: str, files: Mapping[str, bytes]) -> bool:
    """Is one of the known vocabularies whole, or is there something else, of which we know nothing?"""
    whole = any(all(f"{name}/{file}" in files for file in needed) for needed in _VOCABULARIES)
    return whole or any(path.removeprefix(f"{name}/") not in TOKENIZER for path in files)


def _cached(name: str, source: str) -> dict[str, bytes]:
    """Files of the repository that huggingface_hub has fetched before."""
    from huggingface_hub import try_to_load_from_cache

    owner, repository, *folders = source.split("/")
    files: dict[str, bytes] = {}
    for file in TOKENIZER:
        found = try_to_load_from_cache(f"{owner}/{repository}", "/".join([*folders, file]))
        if isinstance(found, str):
            data = Checkpoint(source, "folder", [], {}, place=Path(found).parent).bytes_beside(file)
            files |= {} if data is None else {f"{name}/{file}": data}
    return files


# How the names of weight files end, and of what says which of them there are.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx")


def _is_weights(name: str) -> bool:
    return name.endswith(_WEIGHTS) or (name.endswith(".json") and ".index." in name)


def _small_files(name: str, like: Checkpoint | None) -> dict[str, bytes]:
    """The files right in a folder, hidden ones and weights apart."""
    if like is None or like.place is None:
        return {}
    paths = [p for p in (like.place / name).glob("*") if p.name[0] != "." and not _is_weights(p.name.lower())]
    names = sorted(path.name for path in paths if path.is_file())
    found = {file: like.bytes_beside(f"{name}/{file}") for file in names}
    return {f"{name}/{file}": data for file, data in found.items() if data is not None}


def same_folder(
    opened: Checkpoint, outputs: Mapping[str, TensorSpec]
) -> tuple[tuple[OutputFile, ...], dict[str, bytes]]:
    """The files of a diffusers folder with other weights: one for each component, and the small ones as they are.

    outputs: keys as the folder's are, `component.name`.
    """
    files = []
    for component in opened.components:
        prefix = f"{component}."
        keys = {key: key[len(prefix) :] for key in outputs if key.startswith(prefix)}
        stem = "diffusion_pytorch_model" if component.startswith(("unet", "transformer", "vae")) else "model"
        if keys:
            files.append(OutputFile(f"{component}/{stem}.safetensors", keys, {"format": "pt"}))
    index = opened.bytes_beside("model_index.json") or b"{}"
    small = {"model_index.json": index}
    for name in _classes(json.loads(index)):
        small |= _small_files(name, opened)
    return tuple(files), small


def into_folder(first: Checkpoint, plan: Plan, target: Path | Held, *, asked: bool) -> tuple[Plan, Path | Held]:
    """The plan, and where it writes: a diffusers folder becomes one again, unless a single file was asked for.

    first: the checkpoint whose names the outputs have.
    """
    if isinstance(target, Held):
        if first.container != "diffusers":
            return plan, target
        files, extras = same_folder(first, plan.outputs)
        return replace(plan, files=files, extras=extras), target
    single = target.suffix.lower() == ".safetensors"
    if first.container != "diffusers" or (asked and single):
        return plan, target
    files, extras = same_folder(first, plan.outputs)
    return replace(plan, files=files, extras=extras), target if asked else target.with_suffix("")
