"""merge: two or more models into one. Plans from headers alone; the arithmetic is a merge method's."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

from weightops.engine.chunks import DEFAULT_MEMORY
from weightops.engine.run import Progress, ignore
from weightops.errors import UsageError, quote
from weightops.files.checkpoint import open_checkpoint
from weightops.merging.method import METHODS
from weightops.ops.folders import into_folder
from weightops.ops.merge_plan import Settings, option_of, plan_merge
from weightops.ops.produce import check_words, named, produce, stem

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from weightops.ops.report import Report


def merge(
    *models: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    alpha: float | None = None,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    base: str | os.PathLike[str] | None = None,
    method: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    vae: str | int | os.PathLike[str] = "1",
    text_encoder: str | int = "merge",
    dtype: str = "keep",
    drop: Sequence[str] = (),
    on_mismatch: str = "error",
    strict: bool = False,
    allow_nonfinite: bool = False,
    memory: int = DEFAULT_MEMORY,
    threads: int | None = None,
    device: str = "auto",
    force: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    on_progress: Progress = ignore,
) -> Report:
    """Merge two or more models into the file `output` (None: a name built from theirs, in the current folder).

    alpha: for two models, (1−α)·A + α·B; with `base` C, A + α·(B − C). weights: one per model, normalised to
    a sum of one unless `normalize` is False; with `base`, base + Σ wᵢ·(modelᵢ − base), as they are given.
    A diffusers folder as the first model makes one, unless `output` ends in .safetensors.
    vae: the number of the model whose VAE is kept, "merge", or a file. text_encoder: a number, or "merge".
    dtype: keep (the first model's, tensor by tensor), fp32, fp16, bf16, fp8_e4m3, fp8_e5m2. drop: components
    to leave out. on_mismatch: "error" or "keep-first" for tensors of different shapes. strict: refuse
    whatever would be left out or kept unasked. memory: bytes in flight. verify: read samples back and compare.
    Raises WeightopsError, whose kinds are drawn in `weightops.errors`.
    """
    vae, text_encoder = str(vae), str(text_encoder)
    settings = _settings(
        len(models), alpha, weights, normalize, base is not None, method, parameters or {},
        vae=vae, text_encoder=text_encoder, dtype=dtype, drop=tuple(drop), on_mismatch=on_mismatch,
        strict=strict, allow_nonfinite=allow_nonfinite,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        files = [*([base] if base is not None else []), *models]
        opened = [stack.enter_context(open_checkpoint(m)) for m in files]
        extra = None
        if vae != "merge" and not vae.isdecimal():
            extra = stack.enter_context(open_checkpoint(vae))
        planned = plan_merge(opened, settings, vae_file=extra)
        last = f"-{settings.weights[-1]:g}" if settings.weights and len(opened) == 2 else ""
        target = named(output, "+".join(stem(c)[:60] for c in opened), last)
        first = opened[1] if base is not None and settings.method.needs_base else opened[0]
        planned.plan, target = into_folder(first, planned.plan, target, asked=output is not None)
        return produce(
            "merge", planned, target, memory=memory, device=device, threads=threads,
            force=force, dry_run=dry_run, check=verify, on_progress=on_progress,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ what was asked


def _settings(
    count: int,
    alpha: float | None,
    weights: Sequence[float] | None,
    normalize: bool,
    has_base: bool,
    method: str | None,
    parameters: Mapping[str, Any],
    **rest: Any,
) -> Settings:
    if count + has_base < 2:
        raise UsageError("merge", f"found {count + has_base} model, expected two or more")
    chosen = METHODS.get(method or ("add_difference" if has_base else "weighted_sum"))
    if chosen.needs_base != has_base:
        need = "needs a base" if chosen.needs_base else "takes no base"
        raise UsageError("--base", f"{chosen.name} {need}", "--list-methods shows what each method takes")
    fixed = [name for name in chosen.models if not name.startswith("*")]
    if count + has_base < len(fixed) or (count + has_base > len(fixed) and len(fixed) == len(chosen.models)):
        raise UsageError(chosen.name, f"takes the models {', '.join(chosen.models)}, found {count + has_base}")
    values = dict(parameters)
    if any(p.kind == "Weights" for p in chosen.parameters):
        if "weights" in values:
            raise UsageError("--set", "found weights, which are given with --weights")
        values["weights"] = _weights(count, alpha, weights, normalize and not has_base, has_base)
    elif alpha is not None or weights is not None:
        if weights is not None or all(p.name != "alpha" for p in chosen.parameters):
            raise UsageError("--weights", f"{chosen.name} takes no weights", "--list-methods shows what it takes")
        values["alpha"] = alpha
    check_words(rest["dtype"], rest["drop"])
    if "vae" in rest["drop"] and rest["vae"] != "merge" and not rest["vae"].isdecimal():
        raise UsageError("--drop", f"drops the VAE that --vae takes from {quote(rest['vae'])}")
    if rest["on_mismatch"] not in ("error", "keep-first"):
        raise UsageError("--on-mismatch", f"found {quote(rest['on_mismatch'])}, expected error or keep-first")
    checked = chosen.check(values)
    for option in ("vae", "text_encoder"):
        value = rest[option]
        if value.isdecimal() and not (len(value) < 10 and 1 <= int(value) <= count):
            raise UsageError(option_of(option), f"there is no model {value[:20]}, expected 1 to {count}")
        if option == "text_encoder" and value != "merge" and not value.isdecimal():
            raise UsageError("--text-encoder", f"found {quote(value)}, expected the number of a model, or merge")
    return Settings(chosen, checked, checked.get("weights"), **rest)


def _weights(
    count: int, alpha: float | None, weights: Sequence[float] | None, normalize: bool, has_base: bool
) -> tuple[float, ...]:
    if alpha is not None and weights is not None:
        raise UsageError("--alpha", "given together with --weights, expected one of the two")
    if weights is not None:
        if len(weights) != count:
            raise UsageError("--weights", f"found {len(weights)} weights for {count} models, expected one for each")
        if not all(map(math.isfinite, weights)):
            raise UsageError("--weights", "found a weight that is not a finite number")
        if not normalize:
            return tuple(weights)
        total = math.fsum(weights)
        # 0.1, 0.2 and -0.3 sum to 3e-17: normalised, they would be weights of 3e15.
        if abs(total) <= 1e-9 * math.fsum(map(abs, weights)):
            raise UsageError("--weights", "the weights sum to 0 and cannot be normalised", "add --no-normalize")
        return tuple(w / total for w in weights)
    if alpha is None:
        return (1.0,) * count if has_base else (1.0 / count,) * count
    if not math.isfinite(alpha):
        raise UsageError("--alpha", f"found {alpha}, expected a finite number")
    if has_base:
        if count > 2:
            raise UsageError("--alpha", f"says nothing for {count} models and a base", "give --weights, one per model")
        return (1.0, alpha) if count == 2 else (alpha,)
    if count != 2:
        raise UsageError("--alpha", f"is for two models, found {count}", "give --weights, one per model")
    return (1.0 - alpha, alpha)
