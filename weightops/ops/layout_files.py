"""The files of a layout: a diffusers folder with what stands beside the weights, or a single file, or its shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightops.files.checkpoint import WEIGHTLESS
from weightops.files.folder import shards
from weightops.ops.folders import component_config, pipeline_folder
from weightops.ops.prediction import sample_size
from weightops.ops.report import Unused

if TYPE_CHECKING:
    from weightops.ops.components import Member
    from weightops.ops.layout import Layout
    from weightops.ops.respell import Respelled

_WHOLE = 1 << 62  # no file is larger


def lay_folder(found: Layout) -> None:
    """Lay the components out in folders, with their settings, and say where it is no whole pipeline."""
    channels: dict[str, int | None] = {}
    for member, (_, done) in zip(found.members, found.done, strict=True):
        _component(found, member, done)
        first = done.shapes.get("conv_in.weight", ())
        channels[member.name] = first[1] if member.match.network.role == "unet" and len(first) == 4 else None
    for name in found.opened.components:
        if name not in channels and not found.drops(name):
            channels[name] = None
            _as_it_is(found, name)
    if found.alone or found.architecture is None:
        return
    prediction = found.prediction
    beside = pipeline_folder(
        found.architecture, channels, found.like, tokenizer=found.wish.tokenizer,
        prediction=prediction.scheduler if prediction is not None else {},
    )  # fmt: skip
    found.whole = not beside.missing
    found.extras |= beside.files
    found.warnings += beside.warnings
    if beside.missing:
        found.warnings.append(f"{beside.missing}: a folder of components, each of which can be loaded by itself")
    elif prediction is not None and not prediction.by:
        other = "epsilon" if prediction.kind == "v_prediction" else "v_prediction"
        found.warnings.append(
            f"nothing in the file says what it predicts; {prediction.kind} is assumed, and --prediction {other} "
            f"says otherwise"
        )


def _component(found: Layout, member: Member, done: Respelled) -> None:
    """A component's weights and config.json, in its folder; alone, right in the output."""
    network, component = member.match.network, member.component
    stem = "model" if network.role == "text_encoder" else "diffusion_pytorch_model"
    folder = "" if found.alone else member.name
    size = found.wish.shard_size or _WHOLE
    files, index = shards(done.outputs, stem, size, folder=folder, names=done.names)
    more = dict(component.config) if component is not None else {}
    if found.architecture is not None and network.role == "unet":
        more |= sample_size(found.architecture.name, found.prediction)
    path = f"{folder}/config.json" if folder else "config.json"
    usual = f"{component.name if component is not None else member.name}/config.json"
    config = component_config(network, more, done.shapes, found.like, (path, usual), found.opened.label)
    found.files += files
    found.extras |= {**index, path: config}


def _as_it_is(found: Layout, name: str) -> None:
    """A component of a diffusers folder that is not known, from folder to folder."""
    opened = found.opened
    names = {key: key.removeprefix(f"{name}.") for key in opened.tensors if key.startswith(f"{name}.")}
    found.carry(names)
    library = ((opened.json_beside("model_index.json") or {}).get(name) or [""])[0]
    stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
    outputs = {key: found.outputs[key] for key in names}
    files, index = shards(outputs, stem, found.wish.shard_size or _WHOLE, folder=name, names=names)
    config = opened.bytes_beside(f"{name}/config.json")
    found.files += files
    found.extras |= {**index, **({} if config is None else {f"{name}/config.json": config})}


def lay_single(found: Layout) -> None:
    """Lay everything out in one file, or in shards of it."""
    opened = found.opened
    if not found.was_folder:
        held = {key for member in found.members for key in member.part.bodies}
        components = found.identity.components
        found.carry(key for key in opened.tensors if key not in held and not found.drops(components[key]))
    if found.architecture is not None and found.prediction is not None:
        markers = found.prediction.markers(found.architecture.name)
        found.outputs |= {name: spec for name, spec in markers.items() if name not in found.outputs}
    if found.wish.shard_size is not None:
        files, index = shards(found.outputs, "model", found.wish.shard_size)
        found.files += files
        found.extras |= index
    for path in _settings(found):
        found.left.append(Unused(path, opened.label, "a single file holds weights, not settings", asked=True))


def _settings(found: Layout) -> list[str]:
    """What stands beside the weights of the folder that is converted."""
    opened = found.opened
    if not found.was_folder:
        return ["config.json"] if found.alone and found.like is opened else []
    paths = ["model_index.json"]
    for name, value in (opened.json_beside("model_index.json") or {}).items():
        if name in opened.components:
            paths.append(f"{name}/config.json")
        elif isinstance(value, list) and value and str(value[-1]).endswith(WEIGHTLESS):
            paths.append(f"{name}/")
    return paths
