"""convert: any file that can be read, as one safetensors file; names stay, bytes too unless a dtype is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightops import __version__
from weightops.engine.chunks import DEFAULT_MEMORY
from weightops.engine.run import Progress, ignore
from weightops.errors import FormatError, UsageError
from weightops.files.checkpoint import Checkpoint, open_checkpoint
from weightops.files.dtypes import ARITHMETIC, DTYPE_WORDS
from weightops.files.tensor import Slot, TensorSpec
from weightops.naming.identify import family_of, identify
from weightops.ops.produce import Planned, cast, check_words, kept_metadata, named, produce, stem
from weightops.ops.report import Account, Report, Unused
from weightops.plan import Input, Plan, Task

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence


def convert(
    path: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    dtype: str = "keep",
    drop: Sequence[str] = (),
    strict: bool = False,
    allow_nonfinite: bool = False,
    memory: int = DEFAULT_MEMORY,
    threads: int | None = None,
    device: str = "auto",
    force: bool = False,
    dry_run: bool = False,
    check: bool = False,
    on_progress: Progress = ignore,
) -> Report:
    """Write the tensors of `path` as one safetensors file (output None: named after it, in the current folder).

    dtype: keep, or what floating tensors become; drop: components to leave out; strict: refuse what the file
    holds beside tensors. Without a dtype the bytes are copied, and torch is never imported. Raises WeightopsError.
    """
    check_words(dtype, drop)
    with open_checkpoint(path) as opened:
        planned = plan_convert(opened, dtype=dtype, drop=tuple(drop), allow_nonfinite=allow_nonfinite)
        if strict:
            planned.account.refuse_surprises("--strict")
        return produce(
            "convert", planned, named(output, stem(opened)), memory=memory, device=device, threads=threads,
            force=force, dry_run=dry_run, check=check, on_progress=on_progress,
        )  # fmt: skip


def plan_convert(opened: Checkpoint, *, dtype: str, drop: tuple[str, ...], allow_nonfinite: bool = False) -> Planned:
    """The plan of a conversion, from headers alone."""
    if not opened.tensors:
        raise FormatError(opened.label, "holds no tensors: nothing to write")
    account = Account()
    account.unused.extend(Unused(key, opened.label, why, asked=False) for key, why in opened.left_out)
    components = identify(opened.tensors).components
    outputs: dict[str, TensorSpec] = {}
    counts: dict[str, dict[str, int]] = {}
    copies, casts = [], []
    for key in sorted(opened.tensors, key=lambda k: opened.tensors[k][1:3]):
        count = counts.setdefault(components[key], {"tensors": 0, "merged": 0, "cast": 0, "copied": 0, "dropped": 0})
        count["tensors"] += 1
        if family_of(components[key]) in drop:
            account.unused.append(Unused(key, opened.label, f"--drop {family_of(components[key])}", asked=True))
            count["dropped"] += 1
            continue
        spec = opened.tensors[key].spec
        becomes = DTYPE_WORDS[dtype] if dtype != "keep" and spec.dtype in ARITHMETIC else spec.dtype
        outputs[key] = TensorSpec(becomes, spec.shape)
        if becomes == spec.dtype:
            copies.append(Task(key, (Input(0, Slot(key, spec)),), (Slot(key, spec),)))
            account.copied.append(key)
            count["copied"] += 1
        else:
            casts.append(Task(key, (Input(0, Slot(key, spec.flat())),), (Slot(key, outputs[key].flat()),), cast))
            account.used.append(key)
            count["cast"] += 1
    if not outputs:
        raise UsageError("--drop", f"leaves nothing of {opened.label} to write")
    recipe = {"command": "convert", "version": __version__, "dtype": dtype, "drop": list(drop)}
    plan = Plan(
        (opened,), outputs, (*copies, *casts), kept_metadata(opened), recipe,
        refuse_nonfinite=bool(casts) and not allow_nonfinite,
    )  # fmt: skip
    words = f"{stem(opened)}, {'as it is' if dtype == 'keep' else f'as {dtype}'}, in one safetensors file"
    return Planned(plan, account, words, [{"component": name, **count} for name, count in counts.items()])
