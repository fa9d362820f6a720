"""The trained LoRA as a file: in a dialect of the field, through the tables of `convert`, with metadata that is true.

Two runs of the same work write the same bytes: no date and no path stands in them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.engine.chunks import DEFAULT_MEMORY
from weightops.engine.run import ignore
from weightops.errors import UsageError, WeightopsError
from weightops.files.held import Held
from weightops.files.tensor import Slot, TensorSpec
from weightops.lineage import KEY, as_recorded
from weightops.lora.dialects import DIALECTS
from weightops.lora.units import Target
from weightops.naming.keymap import ARCHITECTURES
from weightops.ops.dialect import plan_dialect
from weightops.ops.dialect_settings import told_of_base
from weightops.ops.produce import produce

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from weightops.diffusion.lora_modules import Lora
    from weightops.ops.produce import Planned

# What a ModelSpec calls each base, and whose code's names its LoRAs have outside diffusers.
# Source: sd-scripts, library/sai_model_spec.py; Stability-AI/ModelSpec.
SPECS: Mapping[str, tuple[str, str]] = {
    "sd15": ("stable-diffusion-v1", "diffusers"),
    "sd2": ("stable-diffusion-v2-512", "diffusers"),
    "sd2 v": ("stable-diffusion-v2-768-v", "diffusers"),
    "sdxl": ("stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models"),
    "sd3": ("stable-diffusion-3", "diffusers"),
    "flux": ("flux-1-dev", "https://github.com/black-forest-labs/flux"),
    "flux schnell": ("flux-1-schnell", "https://github.com/black-forest-labs/flux"),
}
# kohya's modules that load such a file; magnitudes, and other ranks for convolutions, are LyCORIS' own.
NETWORK_MODULES: Mapping[str, str] = {"flux": "networks.lora_flux", "sd3": "networks.lora_sd3"}
DATA_HASHES = {"sshs_model_hash": "{}", "modelspec.hash_sha256": "0x{}"}


@dataclass(frozen=True, slots=True)
class Base:
    """The model that was trained on. variant: the architecture's, by its row in the table of ModelSpec."""

    architecture: str
    variant: str
    name: str
    hashes: Mapping[str, str]
    auto_v1: str | None
    prediction: str

    @property
    def is_velocity(self) -> bool:
        return self.prediction == "v_prediction"


@dataclass(frozen=True, slots=True)
class Told:
    """What the metadata says of a run, beside the base: kohya's words, as text, and our recipe."""

    base: Base
    title: str
    words: Mapping[str, str]
    recipe: Mapping[str, Any]
    resolution: tuple[int, int]


def write_lora(
    lora: Lora, told: Told, output: Path, *, dialect: str, steps: int, epoch: int, force: bool, dry_run: bool = False
) -> int:
    """Write the LoRA as it is now to `output` in the dialect (peft: a folder), and return the bytes written.

    steps, epoch: how far the training is. dry_run: find out whether it could be written, and how large it would be.
    Raises UsageError where the dialect cannot hold it; OutputError.
    """
    with threads_kept():
        planned = _planned(lora, told.base, dialect)
        metadata = {**planned.plan.metadata, **_metadata(lora, told, dialect, steps, epoch)}
        planned.plan = replace(planned.plan, metadata=metadata, recipe=None, data_hashes=DATA_HASHES)
        report = produce(
            "train", planned, output, memory=DEFAULT_MEMORY, device="cpu", threads=1, force=force, dry_run=dry_run,
            check=False, on_progress=ignore,
        )  # fmt: skip
    return report.bytes_written


def _planned(lora: Lora, base: Base, dialect: str) -> Planned:
    """The plan of the file. Where a dialect packs modules of which some do not train, these stand in it unchanged."""
    try:
        return plan_dialect(as_held(lora, base.name).open(), to=dialect, architecture=base.architecture)
    except WeightopsError as refused:
        beside = _packed_beside(lora, dialect, base.architecture)
        if not beside:
            raise not_held(dialect, refused) from None
    try:
        return plan_dialect(as_held(lora, base.name, beside).open(), to=dialect, architecture=base.architecture)
    except WeightopsError as e:
        raise not_held(dialect, e) from None


def not_held(dialect: str, e: WeightopsError) -> UsageError:
    return UsageError("--dialect", f"{dialect} cannot hold this LoRA: {e.what}", e.hint)


def as_held(lora: Lora, label: str, beside: Mapping[str, Tensor] | None = None) -> Held:
    """The LoRA in memory, under diffusers' names, each module's alpha beside its factors. beside: more tensors."""
    import torch

    tensors = {f"{c}.{spelled_in_files(c, name)}": t.float() for c, name, t in _split(lora.state())}
    tensors |= {
        f"{part.component}.{spelled_in_files(part.component, module.name)}.alpha": torch.tensor(
            module.alpha, dtype=torch.float32
        )
        for part in lora.parts
        for module in part.modules
    }
    return held_of({**tensors, **(beside or {})}, label)


def held_of(tensors: Mapping[str, Tensor], label: str) -> Held:
    """A LoRA's tensors in float32, by their keys in diffusers' names, as a file that is only in memory."""
    specs = {key: TensorSpec("F32", tuple(tensor.shape)) for key, tensor in tensors.items()}
    made = Held(label)
    made.begin(specs, (), {})
    for key, tensor in tensors.items():
        data = memoryview(tensor.contiguous().numpy().tobytes())
        made.write_bytes(Slot(key, specs[key]), 0, specs[key].nbytes, data)
    # Of kohya's dim and alpha what is true of the file is filled in when it is planned, whichever the dialect.
    made.commit({"format": "pt", "ss_network_dim": "", "ss_network_alpha": ""})
    return made


def _split(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    for key, tensor in state.items():
        component, _, name = key.partition(".")
        yield component, name, tensor


def _packed_beside(lora: Lora, dialect: str, architecture: str) -> dict[str, Tensor]:
    """LoRAs that change nothing, of modules that do not train but are packed with some that do.

    So the sizes of the pack are known, and with magnitudes (DoRA) those of the others are what they were.
    """
    import torch

    found: dict[str, Tensor] = {}
    target = Target(DIALECTS[dialect], ARCHITECTURES.get(architecture), None, "")
    for part in lora.parts:
        table = target.table(target.place(part.component))
        trained = {spelled_in_files(part.component, module.name): module for module in part.modules}
        for name, module in trained.items():
            spelled = table.spelled_module(name)
            for other in () if spelled is None else spelled[2]:
                if other in trained or f"{part.component}.{other}.alpha" in found:
                    continue
                weight = part.network.get_parameter(f"{other}.weight").detach().float().cpu()
                # As strong as its neighbour, for a pack has one strength: of rank 1, where that is exact.
                strength = module.alpha / module.rank
                rank, alpha = (1, strength) if strength * module.rank == module.alpha else (module.rank, module.alpha)
                start = f"{part.component}.{other}"
                found[f"{start}.lora_A.weight"] = torch.zeros(rank, *weight.shape[1:])
                found[f"{start}.lora_B.weight"] = torch.zeros(weight.shape[0], rank, *[1] * (weight.ndim - 2))
                found[f"{start}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
                if lora.dora:
                    found[f"{start}.lora_magnitude_vector"] = torch.linalg.norm(weight.flatten(1), dim=1)
    return found


def spelled_in_files(component: str, name: str) -> str:
    """transformers ≥ 5.6 calls a CLIP's modules without `text_model.`; files have it."""
    if component.startswith("text_encoder") and name.startswith("encoder."):
        return f"text_model.{name}"
    return name


@contextlib.contextmanager
def threads_kept() -> Iterator[None]:
    """Our engine shares its work out to threads of its own, and leaves torch one: training goes on with as many."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------ metadata


def _metadata(lora: Lora, told: Told, dialect: str, steps: int, epoch: int) -> dict[str, str]:
    base = told.base
    spec, implementation = SPECS[base.variant]
    found = {
        **told_of_base("kohya", base.architecture),
        **told.words,
        "ss_steps": str(steps),
        "ss_epoch": str(epoch),
        "ss_output_name": told.title,
        "ss_sd_model_name": as_recorded(base.name),
        **_network(lora, base),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{spec}/lora",
        "modelspec.implementation": "diffusers" if dialect in ("diffusers", "peft") else implementation,
        "modelspec.title": told.title,
        "modelspec.resolution": f"{told.resolution[1]}x{told.resolution[0]}",
    }
    if base.is_velocity:
        found["ss_v_parameterization"] = "True"
        if "ss_base_model_version" in found:
            found["ss_base_model_version"] += "_v"
    if base.auto_v1 is not None:
        found["ss_sd_model_hash"] = base.auto_v1
    if base.prediction != "flow":
        found["modelspec.prediction_type"] = {"epsilon": "epsilon", "v_prediction": "v"}.get(
            base.prediction, base.prediction
        )
    inputs = recipe_inputs(base.hashes)
    recipe = {"command": "train", "version": __version__, **told.recipe, "steps_done": steps, "inputs": inputs}
    found[KEY] = json.dumps(recipe, sort_keys=True, ensure_ascii=False)
    return found


def recipe_inputs(hashes: Mapping[str, str]) -> list[dict[str, str]]:
    """The files that a model was read from, as a recipe has them: bare names, and hashes where they are known."""
    return [
        {"name": as_recorded(Path(name).name)[:255], "hash": hashed}
        for name, hashed in hashes.items()
        if Path(name).name and hashed.startswith("xxh3_128:")
    ]


def _network(lora: Lora, base: Base) -> dict[str, str]:
    """Which of kohya's modules has such a file, and what it was told."""
    arguments: dict[str, str] = {}
    for part in lora.parts:
        for module in part.modules:
            if module.is_large:
                arguments = {"conv_dim": str(module.rank), "conv_alpha": f"{module.alpha:g}"}
    if lora.dora:
        return {
            "ss_network_module": "lycoris.kohya",
            "ss_network_args": json.dumps({"algo": "lora", "dora_wd": "True", **arguments}),
        }
    named = {"ss_network_module": NETWORK_MODULES.get(base.architecture, "networks.lora")}
    return named | ({"ss_network_args": json.dumps(arguments)} if arguments else {})


def base_of(loaded: Any, prediction: str) -> Base:
    """What there is to say of the model that was loaded."""
    variant = loaded.architecture
    if variant == "sd2" and prediction == "v_prediction":
        variant = "sd2 v"
    if variant == "flux" and not loaded.pipe.transformer.config.get("guidance_embeds"):
        variant = "flux schnell"
    name = os.path.basename(loaded.label.rstrip("/")) or loaded.label  # noqa: PTH119 - a label may be hf://…
    return Base(loaded.architecture, variant, name, dict(loaded.hashes), auto_v1(Path(loaded.label)), prediction)


def auto_v1(path: Path) -> str | None:
    """The short hash by which web UIs have known a file: of 64 KiB from its first MiB on; None of what is too short.

    Source: sd-scripts, library/train_util.py, `model_hash`.
    """
    with contextlib.suppress(OSError):
        if path.is_file() and path.stat().st_size >= 0x110000:
            with path.open("rb") as file:
                file.seek(0x100000)
                return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
    return None
