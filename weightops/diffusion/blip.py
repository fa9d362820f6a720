"""BLIP: a captioning model by folder or by name on the hub, checked, loaded and asked; knows of no files of images."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.diffusion.captions import clean
from weightops.errors import (
    FormatError,
    MemoryRefused,
    MismatchError,
    NetworkError,
    UsageError,
    WeightopsError,
    listing,
    printable,
    quote,
)
from weightops.files.hub import PREFIX, parse_address

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

MODEL = "Salesforce/blip-image-captioning-base"
DTYPES = ("auto", "fp32", "fp16", "bf16")

_ARCHITECTURE = "BlipForConditionalGeneration"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# What a folder holds beside its config.json: one file of each.
_PARTS = (
    ("what makes tensors of images", ("preprocessor_config.json", "processor_config.json")),
    ("a tokenizer", ("tokenizer.json", "vocab.txt")),
    ("weights", ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")),
)
_EXPECTED = f"expected a captioning model of BLIP, such as {MODEL}"


@dataclass(frozen=True, slots=True)
class Asked:
    """How to caption. prompt: how each caption begins; beams: how wide the search for a likely one is."""

    prompt: str | None
    batch: int
    max_tokens: int
    beams: int
    device: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model is: label is what was typed, source a folder or a hub's name."""

    label: str
    source: str
    revision: str | None
    local: bool


@dataclass(frozen=True, slots=True)
class Captioner:
    """BLIP, its tokenizer and what makes tensors of images."""

    model: Any
    tokenizer: Any
    processor: Any
    asked: Asked

    def captions(self, images: Sequence[Image]) -> list[str]:
        """What the model says of each image, on one line. Raises MemoryRefused."""
        import torch

        given: dict[str, Any] = {}
        try:
            pixels = self.processor(images=list(images), return_tensors="pt").pixel_values
            given["pixel_values"] = pixels.to(self.model.device, self.model.dtype)
            if self.asked.prompt is not None:
                words = self.tokenizer([clean(self.asked.prompt)] * len(images), return_tensors="pt")
                given["input_ids"] = words.input_ids.to(self.model.device)
                given["attention_mask"] = words.attention_mask.to(self.model.device)
            with torch.inference_mode():
                found = self.model.generate(
                    **given, max_new_tokens=self.asked.max_tokens, num_beams=self.asked.beams, do_sample=False
                )
        except (MemoryError, RuntimeError) as e:
            what = "1 image" if len(images) == 1 else f"{len(images)} images at once"
            raise _no_memory(e, what, self.model.device.type, len(images)) from None
        # The first token is the model's own beginning, which its tokenizer does not know.
        return [clean(text) for text in self.tokenizer.batch_decode(found[:, 1:], skip_special_tokens=True)]


def _no_memory(e: Exception, what: str, device: str, batch: int) -> Exception:
    """MemoryRefused, with the remedy, if it is want of memory; else the error itself."""
    import torch

    if not isinstance(e, (MemoryError, torch.cuda.OutOfMemoryError)) and "alloc" not in str(e):
        return e
    hint = "--dtype bf16 takes half of it" if device == "cpu" else "--device cpu uses the system's memory"
    if batch > 1:
        hint = f"--batch {batch // 2} takes less"
    return MemoryRefused("caption", f"too little memory for {what}", hint)


def locate(model: str) -> Place:
    """A folder that holds a captioning model of BLIP, or a hub's name. Raises WeightopsError."""
    if model.startswith(PREFIX):
        address = parse_address(model)
        if address.path:
            raise UsageError(model, f"expected {PREFIX}owner/name[@revision], without a path")
        return Place(model, address.repo, address.revision, local=False)
    if os.path.isdir(model):  # noqa: PTH112
        if not os.path.isfile(Path(model) / "config.json"):  # noqa: PTH113
            raise FormatError(model, f"holds no config.json, {_EXPECTED}")
        _check_config(model, Path(model) / "config.json")
        for what, names in _PARTS:
            if not any(os.path.isfile(Path(model) / name) for name in names):  # noqa: PTH113
                raise FormatError(model, f"holds no {names[0]}, expected {what}")
        return Place(model, model, None, local=True)
    if os.path.lexists(model):
        raise UsageError(model, "is a file, expected a model's folder, or a name on the hub")
    if not _HUB_NAME.fullmatch(model) or ".." in model:
        raise UsageError(model, "no such folder, and no name of a model on the hub (owner/name)")
    return Place(model, model, None, local=False)


def _check_config(label: str, path: Path) -> None:
    """Refuse what is no captioning model of BLIP, before its weights are touched. Raises WeightopsError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise FormatError(label, "its config.json is no JSON object")
    kind = config.get("model_type")
    if kind != "blip":
        raise MismatchError(label, f"a model of type {quote(kind)}, {_EXPECTED}")
    classes = config.get("architectures")
    if isinstance(classes, list) and classes and _ARCHITECTURE not in classes:
        raise MismatchError(label, f"a {printable(str(classes[0])[:60])} of BLIP, {_EXPECTED}")


def load(place: Place, asked: Asked) -> Captioner:
    """The model on its device, ready. Raises WeightopsError."""
    import torch
    import transformers

    from weightops.engine.tensors import resolve_device

    device = resolve_device(asked.device)
    revision = place.revision if place.local else _pin(place)
    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    types["auto"] = torch.float16 if device.startswith("cuda") else torch.float32
    given: dict[str, Any] = {"local_files_only": True} if place.local else {"revision": revision}
    # Without torchvision it has this name; before that had one, the other.
    processors = getattr(transformers, "BlipImageProcessorPil", None) or transformers.BlipImageProcessor
    try:
        processor = processors.from_pretrained(place.source, **given)
        # What a stranger's folder holds is not run, nor is anybody asked whether it may be.
        tokenizer = transformers.AutoTokenizer.from_pretrained(place.source, trust_remote_code=False, **given)
        loaded: Any = transformers.BlipForConditionalGeneration.from_pretrained(
            place.source, dtype=types[asked.dtype], output_loading_info=True, **given
        )
        model, about = loaded
        missing = sorted(about["missing_keys"])
        if missing:
            what = f"its weights lack {len(missing):,} that a captioning model of BLIP has: {listing(missing)}"
            raise MismatchError(place.label, what)
        model = model.to(device).eval()
    except WeightopsError:
        raise
    except Exception as e:  # the library raises of everything, for want of a file as for a damaged one
        told = _no_memory(e, f"the model on {device}", device, 1)
        if isinstance(told, MemoryRefused):
            raise told from None
        said = printable(" ".join(str(e).split())[:200]) or type(e).__name__
        raise FormatError(place.label, f"cannot be loaded as a captioning model of BLIP: {said}") from None
    return _checked(Captioner(model, tokenizer, processor, asked), place)


def _checked(captioner: Captioner, place: Place) -> Captioner:
    """Refuse what the model has no room for. Raises UsageError."""
    asked, text = captioner.asked, captioner.model.config.text_config
    # Without its files the library makes a tokenizer of nothing. A true one lacks two of the model's tokens.
    words = len(captioner.tokenizer)
    if not text.vocab_size / 2 <= words <= text.vocab_size:
        raise MismatchError(place.label, f"its tokenizer has {words:,} tokens, its model {text.vocab_size:,}")
    begin = 1 if asked.prompt is None else len(captioner.tokenizer(clean(asked.prompt)).input_ids) - 1
    room = text.max_position_embeddings - begin
    if asked.max_tokens > room:
        why = "" if asked.prompt is None else f", after the {begin} of --prompt"
        raise UsageError(
            "--max-tokens", f"found {asked.max_tokens}, expected at most {max(room, 0)} in this model{why}"
        )
    return captioner


def _pin(place: Place) -> str:
    """The commit of a model on the hub, whose configuration is fetched and checked. Raises WeightopsError."""
    from huggingface_hub import constants, errors, hf_hub_download
    from huggingface_hub.utils import logging

    away = f"where there is a network: hf download {place.source} --local-dir FOLDER; then --model FOLDER"
    log: Any = logging  # whose functions carry no types
    before = log.get_verbosity()
    try:
        log.set_verbosity_error()  # it tells of each attempt
        path = Path(hf_hub_download(place.source, "config.json", revision=place.revision))
    except errors.GatedRepoError:
        raise NetworkError(place.label, "is gated", "ask for access on the hub, then set HF_TOKEN") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        offline = "is not in the cache, and HF_HUB_OFFLINE forbids to fetch it"
        online = f"cannot be fetched: {constants.ENDPOINT} gives no answer"
        raise NetworkError(place.label, offline if constants.HF_HUB_OFFLINE else online, away) from None
    except errors.EntryNotFoundError:
        raise FormatError(place.label, f"holds no config.json, {_EXPECTED}") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        what = f"there is no such model on {constants.ENDPOINT}, or none that can be seen without a token"
        raise NetworkError(place.label, what, "check the name; what is private needs HF_TOKEN") from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as e:
        said = printable(" ".join(str(e).split())[:200])
        raise NetworkError(place.label, f"cannot be fetched: {said}", away) from None
    finally:
        log.set_verbosity(before)
    _check_config(place.label, path)
    return path.parent.name
