"""LoRAs on a pipeline: plain ones beside the weights, by peft; every other family fused into them by our engine."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.diffusion.extras import hushed, need
from weightops.diffusion.models import DTYPES, Worn, diffusers_weights, networks, put, settle, states
from weightops.errors import FormatError, MismatchError, UsageError, listing
from weightops.files.checkpoint import open_checkpoint
from weightops.files.held import Held
from weightops.lora.adapters import alphas, read_adapters
from weightops.ops.convert import convert
from weightops.ops.fuse import fuse, parse

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from weightops.diffusion.models import Loaded, LoraName
    from weightops.files.checkpoint import Named

    Asked = tuple[str | os.PathLike[str], float]

# The networks of a pipeline that a LoRA can change.
_CHANGED = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def wear(loaded: Loaded, loras: Sequence[LoraName]) -> None:
    """Have exactly these LoRAs on the pipeline, whatever was on it before; none: its own weights again, bit for bit.

    A strength of s adds s·ΔW, whatever the family, rank and alpha. A plain LoRA goes beside the weights where diffusers
    takes all of it, at the strength that it has; every other is fused into them by our engine, in the pipeline's dtype.
    `loaded.loras` says which way each went. Raises MismatchError for a LoRA of another model, UsageError, FormatError.
    """
    asked = [parse(lora) for lora in loras]
    if asked:
        need("--lora", "peft")
        _check_fit(loaded, asked)
    _take_off(loaded)
    fused: dict[int, str] = {}
    with tempfile.TemporaryDirectory(prefix="weightops-") as name, hushed():
        folder = Path(name)
        for number, (file, _) in enumerate(asked):
            reason = _respelled(loaded, file, folder / f"lora{number}.safetensors")
            fused |= {number: reason} if reason else {}
        # Whatever diffusers does not take as it is meant is seen by what it made of it: then all is done again.
        while True:
            _fuse(loaded, [asked[number] for number in sorted(fused)])
            beside = [number for number in range(len(asked)) if number not in fused]
            wrong = {number: reason for number in beside if (reason := _beside(loaded, folder, number))}
            if not wrong:
                break
            fused |= wrong
            _take_off(loaded)
        if beside:
            loaded.pipe.set_adapters([f"lora{n}" for n in beside], [asked[n][1] for n in beside])
    worn = []
    for number, (file, strength) in enumerate(asked):
        with open_checkpoint(file) as opened:
            modules = len(read_adapters(opened, architecture=loaded.architecture or None).adapters)
        way = "fused" if number in fused else "adapter"
        worn.append(Worn(Path(file).name, strength, way, modules, fused.get(number, "")))
    loaded.loras = tuple(worn)
    settle(loaded)


def _check_fit(loaded: Loaded, asked: Sequence[Asked]) -> None:
    """Refuse LoRAs that are not for this model, and say which of their keys nothing can be done with."""
    if not loaded.architecture:
        raise UsageError("--lora", f"LoRAs for {loaded.label} are not known: its architecture is not")
    report = fuse(loaded.source, *asked, dry_run=True, output=Held(loaded.label))
    if loaded.own and loaded.like is not None:  # the other components that LoRAs change are there
        report = fuse(loaded.like, *asked, dry_run=True, output=Held(loaded.like))
    lost: dict[tuple[str, str], list[str]] = {}
    for unused in report.account.unused:
        lost.setdefault((unused.source, unused.reason), []).append(unused.key)
    for (source, reason), keys in lost.items():
        what = "1 key is" if len(keys) == 1 else f"{len(keys):,} keys are"
        text = f"{source}: {what} not used: {listing(keys)}: {reason}"
        if source not in (loaded.label, loaded.like) and text not in loaded.warnings:
            loaded.warnings.append(text)


def _respelled(loaded: Loaded, file: str | os.PathLike[str], place: Path) -> str:
    """Write the LoRA as diffusers reads it; or why it has to be fused."""
    with open_checkpoint(file) as opened:
        found = read_adapters(opened, architecture=loaded.architecture or None)
        others = sorted({adapter.label for adapter in found.adapters} - {"lora"})
        if others:
            return f"diffusers does not apply {', '.join(others)} as it is meant"
        if any("mid" in part for adapter in found.adapters for part in adapter.keys):
            return "diffusers does not apply Tucker cores"
    try:
        convert(file, to="diffusers", output=place, architecture=loaded.architecture or None)
    except (MismatchError, FormatError) as e:
        return e.what
    return ""


def _beside(loaded: Loaded, folder: Path, number: int) -> str:
    """Load a LoRA beside the weights at strength 1; or why that is not what the file means."""
    file, name = f"lora{number}.safetensors", f"lora{number}"
    with open_checkpoint(folder / file) as opened:
        found = read_adapters(opened, architecture=loaded.architecture or None)
        meant = alphas(opened, found)
        scales = sorted((meant[a.name] or float(a.rank or 1)) / (a.rank or 1) for a in found.adapters)
    try:
        loaded.pipe.load_lora_weights(folder, weight_name=file, adapter_name=name, local_files_only=True)
    except (ValueError, RuntimeError, KeyError, AttributeError, TypeError) as e:
        return f"diffusers refuses it: {' '.join(str(e).split())[:160]}"
    layers: Any = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
    there = sorted(
        float(module.scaling[name])
        for part, network in networks(loaded.pipe).items() if part in _CHANGED
        for module in network.modules() if isinstance(module, layers) and name in module.scaling
    )  # fmt: skip
    if len(there) != len(scales):
        return f"diffusers takes {len(there):,} of its {len(scales):,} modules"
    if any(abs(a - b) > 1e-6 * abs(b) for a, b in zip(there, scales, strict=True)):
        return "diffusers takes it with other alphas"
    return ""


def _take_off(loaded: Loaded) -> None:
    """The pipeline's own weights, and nothing beside them."""
    if any(getattr(network, "peft_config", None) for network in networks(loaded.pipe).values()):
        with hushed():
            loaded.pipe.unload_lora_weights()
    if loaded.touched:
        for source, own in _sources(loaded):
            _write(loaded, diffusers_weights(source, loaded.label, loaded.like, None, {}, [], tokenizer=False), own)
    loaded.touched, loaded.loras = False, ()


def _fuse(loaded: Loaded, loras: Sequence[Asked]) -> None:
    """Fuse into the pipeline's own weights, as they are in what it was made of."""
    if not loras:
        return
    import torch

    words = {f"torch.{name}": word for word, name in DTYPES.items()}
    # What some classes keep in float32 is not rounded on its way.
    kept = {p.dtype for network in networks(loaded.pipe).values() for p in network.parameters()} - {loaded.dtype}
    word = "fp32" if torch.float32 in kept else words[str(loaded.dtype)]
    for source, own in _sources(loaded):
        if own != loaded.own and not fuse(loaded.source, *loras, dry_run=True, output=Held("")).account.unused:
            continue
        fused = Held(loaded.label)
        fuse(source, *loras, output=fused, dtype=word)
        loaded.touched = True
        _write(loaded, diffusers_weights(fused, loaded.label, loaded.like, None, {}, [], tokenizer=False), own)


def _sources(loaded: Loaded) -> list[tuple[Named, tuple[str, ...]]]:
    """What the pipeline was made of, with its own components where they are not all: then the rest is of `like`."""
    rest: list[tuple[Named, tuple[str, ...]]] = [(loaded.like, ())] if loaded.own and loaded.like is not None else []
    return [(loaded.source, loaded.own), *rest]


def _write(loaded: Loaded, held: Held, own: tuple[str, ...]) -> None:
    found = networks(loaded.pipe)
    for component, state in states(held, own).items():
        if component in _CHANGED and component in found and (own or component not in loaded.own):
            put(found[component], state, loaded.label)
