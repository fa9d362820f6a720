"""The textual-inversion embeddings that a LoRA file carries along, copied out: no weight can hold them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from weightops.errors import FormatError, UsageError, quote
from weightops.files.folder import OutputFile
from weightops.files.tensor import Slot
from weightops.lora.adapters import read_adapters
from weightops.ops.produce import Planned, stem
from weightops.ops.report import Account
from weightops.plan import Input, Plan, Task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightops.files.checkpoint import Checkpoint
    from weightops.files.tensor import TensorSpec

# bundle_emb.NAME.PART. Source: AUTOMATIC1111's webui, extensions-builtin/Lora/networks.py; LyCORIS; OneTrainer.
_KEY = re.compile(r"bundle_emb\.([^.]+)\.(.+)", re.DOTALL)
# A name that is a file's on any system, and leads nowhere else.
_SAFE = re.compile(r"[\w\- ()+,!#'@\[\]]{1,120}")
# How a safetensors file of one encoder calls what a pickle calls so.
_RENAMED = {"string_to_param.*": "emb_params"}


def plan_embeddings(loras: Sequence[Checkpoint]) -> Planned:
    """A folder with NAME.safetensors for each embedding of these files. Raises UsageError where there is none."""
    outputs: dict[str, TensorSpec] = {}
    tasks: list[Task] = []
    files: dict[str, dict[str, str]] = {}
    account = Account()
    for number, lora in enumerate(loras):
        for key in read_adapters(lora).embeddings:
            match = _KEY.fullmatch(key)
            if match is None or not _SAFE.fullmatch(match[1]):
                raise FormatError(lora.label, f"{quote(key)} is no embedding's name that a file could bear")
            name, part = match[1], _RENAMED.get(match[2], match[2])
            output = f"{name}.{part}"
            if output in outputs:
                raise FormatError(lora.label, f"a second embedding {quote(name)}", "copy them out one LoRA at a time")
            spec = outputs[output] = lora.tensors[key].spec
            tasks.append(Task(key, (Input(number, Slot(key, spec)),), (Slot(output, spec),)))
            files.setdefault(name, {})[output] = part
            account.copied.append(key)
    if not tasks:
        what = f"{', '.join(lora.label for lora in loras)} carries no embeddings"
        raise UsageError("--embeddings", what)
    folder = tuple(OutputFile(f"{name}.safetensors", keys, {"format": "pt"}) for name, keys in files.items())
    plan = Plan(tuple(loras), outputs, tuple(tasks), files=folder)
    return Planned(plan, account, f"{len(files):,} embeddings of {', '.join(map(stem, loras))}")
