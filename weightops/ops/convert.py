"""convert: a checkpoint in another layout, in another dtype, in shards; bytes stay unless a dtype is asked for."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.engine.chunks import DEFAULT_MEMORY
from weightops.engine.run import Progress, ignore
from weightops.errors import FormatError, Interrupted, MismatchError, UsageError, listing, quote
from weightops.files.checkpoint import Checkpoint, open_checkpoint
from weightops.files.folder import shards
from weightops.files.held import Held
from weightops.lora.dialects import DIALECTS
from weightops.naming.identify import family_of, identify
from weightops.ops.convert_adapter import (
    TO_LORA,
    LoraWish,
    Words,
    check_kind,
    check_words_of_adapters,
    convert_adapter,
    convert_to_lora,
)
from weightops.ops.folders import open_like
from weightops.ops.layout import LAYOUTS, Way, Wish, plan_layout
from weightops.ops.prediction import KINDS
from weightops.ops.produce import Planned, check_words, kept_metadata, named, on_disk, produce, stem
from weightops.ops.report import Account, Report, Unused, peak_memory_bytes, tensors
from weightops.ops.respell import becomes, carry
from weightops.ops.roundtrip import check as check_bytes
from weightops.plan import Plan

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from weightops.files.checkpoint import Named
    from weightops.files.tensor import TensorSpec


def convert(
    path: Named,
    *,
    to: str | None = None,
    output: Named | None = None,
    dtype: str = "keep",
    drop: Sequence[str] = (),
    shard_size: int | None = None,
    like: str | os.PathLike[str] | None = None,
    no_tokenizer: bool = False,
    prediction: str | None = None,
    alpha: str = "carry",
    rank: int | str | None = None,
    conv_rank: int | str | None = None,
    base: str | os.PathLike[str] | None = None,
    seed: int = 0,
    architecture: str | None = None,
    check: bool = False,
    verify: bool = False,
    strict: bool = False,
    allow_nonfinite: bool = False,
    memory: int | None = None,
    threads: int | None = None,
    device: str = "auto",
    force: bool = False,
    dry_run: bool = False,
    on_progress: Progress = ignore,
) -> Report:
    """Write the tensors of `path` in another layout, or under the names that they have.

    output: a file or folder; None: named after `path`; a Held: into memory.

    to: of a checkpoint diffusers (a folder, with its settings), original or comfy (a file); of a LoRA kohya, diffusers,
    peft (a folder), comfy or onetrainer; lora, of which every family becomes one, under the file's own names: exactly
    where its algebra allows, else at `rank` and `conv_rank` (see `resize`), with `base`, the model that the file is
    for, where its change depends on that. alpha: of a LoRA, "carry" it to where the dialect keeps it, or "fold" it into
    the factors; architecture: which one a LoRA is for, where its names and sizes fit several. dtype: keep, or what
    floating tensors become; drop: components to leave out; shard_size: bytes of tensors a file, in a folder of files.
    like: a folder whose settings and tokenizers are taken; prediction: what the model predicts. check: read the output
    back, and compare every byte with the input; verify: samples of it. strict: refuse to lose anything. Without a
    dtype the bytes are copied, and torch is never imported. Raises WeightopsError.
    """
    check_words(dtype, drop)
    _check_words(to, prediction, shard_size, like=like is not None, no_tokenizer=no_tokenizer)
    check_words_of_adapters(alpha, architecture)
    for option, given in (("--rank", rank), ("--conv-rank", conv_rank), ("--base", base), ("--seed", seed or None)):
        if given is not None and to != TO_LORA:
            raise UsageError(option, "says something only with --to lora")
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(open_checkpoint(path))
        if not opened.tensors:
            raise FormatError(opened.label, "holds no tensors: nothing to write")
        identity = identify(opened.tensors)
        words = Words(to, alpha, architecture, dtype, tuple(drop), check, strict, allow_nonfinite)
        of_checkpoints = {
            "--like": like is not None, "--no-tokenizer": no_tokenizer, "--prediction": prediction is not None,
            "--shard-size": shard_size is not None, "--drop": bool(set(drop) - {"text_encoder"}),
        }  # fmt: skip
        check_kind(opened.label, identity.kind, to, of_checkpoints, words)
        if identity.kind == "lora" and to == TO_LORA:
            return convert_to_lora(
                opened, words, LoraWish(rank, conv_rank, base, seed), on_disk(output, "a LoRA"), memory=memory,
                device=device, threads=threads, force=force, dry_run=dry_run, check=verify, on_progress=on_progress,
            )  # fmt: skip
        if identity.kind == "lora" and to is not None:
            return convert_adapter(
                opened, words, on_disk(output, "a LoRA"), memory=memory or DEFAULT_MEMORY, device=device,
                threads=threads, force=force, dry_run=dry_run, check=verify, on_progress=on_progress,
            )  # fmt: skip
        wish = Wish(
            to or "", dtype, tuple(drop), shard_size, None if like is None else open_like(str(like)),
            tokenizer=not no_tokenizer, prediction=prediction, allow_nonfinite=allow_nonfinite,
        )  # fmt: skip
        planned, way = plan_convert(opened, wish)
        if strict:
            _refuse_losses(planned.account, to)
        if check:
            on_disk(output, "--check")
            _refuse_casts(planned.account, dtype)
        written = _named(output, opened, planned, to)
        report = produce(
            "convert", planned, written, memory=memory or DEFAULT_MEMORY, device=device, threads=threads, force=force,
            dry_run=dry_run, check=verify, on_progress=on_progress,
        )  # fmt: skip
        if check and not dry_run and not isinstance(written, Held):
            try:
                report.checked = check_bytes(opened, planned.plan, way, written, on_progress=on_progress)
            except (Interrupted, KeyboardInterrupt):
                what = "interrupted while it was checked; it is written, and whole"
                raise Interrupted(str(written), what) from None
            report.peak_memory_bytes = peak_memory_bytes()
        return report


def plan_convert(opened: Checkpoint, wish: Wish) -> tuple[Planned, Way]:
    """The plan of a conversion, from headers alone, and the way back."""
    if not wish.to:
        return _plan_container(opened, wish)
    return plan_layout(opened, identify(opened.tensors), wish)


def _plan_container(opened: Checkpoint, wish: Wish) -> tuple[Planned, Way]:
    """The same names in one safetensors file, or in shards of it."""
    account = Account()
    account.unused.extend(Unused(key, opened.label, why, asked=False) for key, why in opened.left_out)
    components = identify(opened.tensors).components
    outputs: dict[str, TensorSpec] = {}
    counts: dict[str, dict[str, int]] = {}
    tasks = []
    for key in sorted(opened.tensors, key=lambda k: opened.tensors[k][1:3]):
        count = counts.setdefault(components[key], {"tensors": 0, "merged": 0, "cast": 0, "copied": 0, "dropped": 0})
        count["tensors"] += 1
        if family_of(components[key]) in wish.drop:
            reason = f"--drop {family_of(components[key])}"
            account.unused.append(Unused(key, opened.label, reason, asked=True))
            count["dropped"] += 1
            continue
        spec = opened.tensors[key].spec
        outputs[key] = becomes(spec, wish.dtype)
        tasks.append(carry(key, spec, key, wish.dtype))
        is_copy = outputs[key].dtype == spec.dtype
        (account.copied if is_copy else account.used).append(key)
        count["copied" if is_copy else "cast"] += 1
    if not outputs:
        raise UsageError("--drop", f"leaves nothing of {opened.label} to write")
    recipe: dict[str, Any] = {
        "command": "convert", "version": __version__, "dtype": wish.dtype, "drop": list(wish.drop),
    }  # fmt: skip
    recipe |= {"shard_size": wish.shard_size} if wish.shard_size is not None else {}
    files, extras = shards(outputs, "model", wish.shard_size) if wish.shard_size is not None else ((), {})
    plan = Plan(
        (opened,), outputs, tuple(sorted(tasks, key=lambda task: task.needs_torch)), kept_metadata(opened), recipe,
        refuse_nonfinite=bool(account.used) and not wish.allow_nonfinite, files=files, extras=extras,
    )  # fmt: skip
    where = "in one safetensors file" if not files else f"in {len(files):,} safetensors file{'s'[: len(files) > 1]}"
    words = f"{stem(opened)}, {'as it is' if wish.dtype == 'keep' else f'as {wish.dtype}'}, {where}"
    groups = [{"component": name, **count} for name, count in counts.items()]
    return Planned(plan, account, words, groups), Way(carried={key: key for key in outputs})


def _check_words(
    to: str | None, prediction: str | None, shard_size: int | None, *, like: bool, no_tokenizer: bool
) -> None:
    """Refuse unknown words, and those that mean nothing together."""
    known = dict.fromkeys([*LAYOUTS, *DIALECTS, TO_LORA])
    if to is not None and to not in known:
        raise UsageError("--to", f"unknown layout {quote(to)}", f"known are {', '.join(known)}")
    if prediction is not None and prediction not in KINDS:
        raise UsageError("--prediction", f"unknown word {quote(prediction)}", f"known are {', '.join(KINDS)}")
    if shard_size is not None and shard_size < 1:
        raise UsageError("--shard-size", f"found {shard_size:,}, expected a number of bytes")
    if prediction is not None and to is None:
        raise UsageError("--prediction", "says something only with --to")
    for given, option in ((like, "--like"), (no_tokenizer, "--no-tokenizer")):
        if given and to != "diffusers":
            raise UsageError(option, "says something only with --to diffusers")


def _named(output: Named | None, opened: Checkpoint, planned: Planned, to: str | None) -> Path | Held:
    """The output that was asked for, or a name after the input's, which it never is."""
    if isinstance(output, Held):
        return output
    name = stem(opened)
    if to == "diffusers":
        return Path(output) if output is not None else named(None, name, "-diffusers").with_suffix("")
    if planned.plan.files:
        return Path(output) if output is not None else named(None, name, "-sharded").with_suffix("")
    return named(output, name, f"-{to}" if to is not None and opened.name == f"{name}.safetensors" else "")


def _refuse_losses(account: Account, to: str | None) -> None:
    if to is None:
        account.refuse_surprises()
        return
    found = account.surprises()
    if found:
        reasons = dict.fromkeys([r for _, r in account.kept] + [u.reason for u in account.unused if not u.asked])
        what = f"{tensors(len(found))} {'has' if len(found) == 1 else 'have'} no place in the {to} layout"
        raise MismatchError("--strict", f"{what}: {listing(found)}", f"{'; '.join(list(reasons)[:3])}")


def _refuse_casts(account: Account, dtype: str) -> None:
    if account.used:
        raise UsageError(
            "--check",
            f"compares bytes, but --dtype {dtype} changes those of {tensors(len(account.used))}",
            "check without --dtype, and cast the result; --verify compares what a cast should give",
        )
