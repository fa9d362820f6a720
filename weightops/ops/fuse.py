"""fuse: LoRAs, of any family and dialect, into a checkpoint of any architecture and spelling, in one pass over it."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.engine.chunks import DEFAULT_MEMORY, memory_for
from weightops.engine.run import Outcome, Progress, ignore, import_torch_ahead
from weightops.errors import Interrupted, UsageError, WeightopsError, quote
from weightops.files.checkpoint import open_checkpoint
from weightops.files.held import Held
from weightops.merging.rounding import ROUNDINGS
from weightops.naming.blocks import parse_blocks
from weightops.ops.embeddings import plan_embeddings
from weightops.ops.folders import into_folder
from weightops.ops.fuse_plan import BESIDE, Wish, plan_fuse
from weightops.ops.produce import check_words, named, on_disk, produce, stem
from weightops.ops.undo import Undo

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from weightops.files.checkpoint import Named
    from weightops.ops.report import Report
    from weightops.ops.survival import Survival

_STRENGTH = re.compile(r"(?P<file>.+):(?P<strength>[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)")


def fuse(
    checkpoint: Named,
    *loras: str | os.PathLike[str] | tuple[str | os.PathLike[str], float],
    output: Named | None = None,
    text_encoder: float | None = None,
    blocks: str | None = None,
    undo: str | os.PathLike[str] | None = None,
    embeddings: str | os.PathLike[str] | None = None,
    dtype: str = "keep",
    rounding: str = "nearest",
    seed: int = 0,
    strict: bool = False,
    allow_nonfinite: bool = False,
    lokr_rank: int | None = None,
    memory: int | None = None,
    threads: int | None = None,
    device: str = "auto",
    force: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    on_progress: Progress = ignore,
) -> Report:
    """Write `checkpoint` with LoRAs in it to the file `output` (None: a name built from theirs; a Held: into memory).

    loras: files, or "file:0.8", or (file, 0.8): a strength of s adds s·ΔW, whatever the family, rank and alpha; where a
    family is no addition (DoRA, OFT, …) it is W + s·(W' − W), W' always from the original W. text_encoder: the strength
    of all LoRAs in text encoders, in place of their own. blocks: factors of the strengths, by blocks and layers
    ("OUT=0.5, attn.q=0"; see weightops.naming.blocks), 1 where it says nothing. undo: a second file to write, from
    which and the output `unfuse` makes `checkpoint` again, byte for byte. embeddings: a new folder for the
    textual-inversion embeddings that the LoRAs carry along, which no weight can hold. dtype: keep, or what floating
    tensors become. rounding: nearest, or stochastic, drawn from `seed`. strict: refuse where a key of a LoRA is not
    used. lokr_rank: divide the alpha of LoKr modules of two whole factors by it, as some trainers mean it (None: they
    are as strong as they stand, as LyCORIS, ComfyUI and diffusers have it; what PEFT's adapter_config.json says is
    followed). memory: bytes in flight (None: 128 MiB, and up to 512 MiB for a matrix that is needed whole). Raises
    WeightopsError.

    The report's `details["modules"]` says for each module how much of what was meant the rounding left (`survived`),
    and how far the result is off, relative to it (`residual`).
    """
    asked = _asked(loras, text_encoder, dtype, rounding, lokr_rank)
    weights = None if blocks is None else parse_blocks(blocks)
    with contextlib.ExitStack() as stack:
        if not dry_run:
            import_torch_ahead()
        opened = stack.enter_context(open_checkpoint(checkpoint))
        files = [stack.enter_context(open_checkpoint(file)) for file, _ in asked]
        said: dict[str, Any] = {"strengths": [s for _, s in asked], "text_encoder": text_encoder, "rounding": rounding}
        said |= {"seed": seed} if rounding == "stochastic" else {}
        said |= {} if lokr_rank is None else {"lokr_rank": lokr_rank}
        said |= {} if blocks is None else {"blocks": blocks}
        strengths = _Strengths([s for _, s in asked], text_encoder)
        drawn = seed if rounding == "stochastic" else None
        wish = Wish(strengths, dtype, drawn, strict, allow_nonfinite, lokr_rank, embeddings is not None, weights, said)
        planned, modules = plan_fuse(opened, files, wish)
        if text_encoder is not None and not strengths.of_text:
            planned.warnings.append("--text-encoder changes nothing: no LoRA here is known to change a text encoder")
        planned.summary = _in_words(stem(opened), [(stem(f), s) for f, (_, s) in zip(files, asked, strict=True)])
        planned.summary += "" if blocks is None else f", blocks {quote(blocks, 60)}"
        stems = [stem(f)[:60] + ("" if s == 1 else f"-{s:g}") for f, (_, s) in zip(files, asked, strict=True)]
        target = named(output, "+".join([stem(opened)[:60], *stems]))
        planned.plan, target = into_folder(opened, planned.plan, target, asked=output is not None)

        def then(outcome: Outcome, report: Report) -> None:
            dtypes = [planned.plan.tasks[number].outputs[0].spec.dtype for number in modules]
            _say_what_survived(outcome, modules, dtypes, rounding, report)

        planned.then = then
        beside = None
        if undo is not None:
            on_disk(output, "--undo")
            assert isinstance(target, Path)
            beside = stack.enter_context(Undo(Path(undo), planned.plan, target, force=force))
            planned.plan = beside.plan
        bundled = None
        if embeddings is not None:
            given = [checkpoint, *(file for file, _ in asked), target, *([] if undo is None else [undo])]
            _check_apart(Path(embeddings), [Path(place) for place in given if not isinstance(place, Held)])
            bundled = functools.partial(
                produce, "fuse", plan_embeddings(files), Path(embeddings), memory=DEFAULT_MEMORY, device="cpu",
                threads=1, force=force, check=False, on_progress=ignore,
            )  # fmt: skip
            bundled(dry_run=True)
        report = produce(
            "fuse", planned, target, memory=memory_for(planned.plan, memory), device=device, threads=threads,
            force=force, dry_run=dry_run, check=verify, on_progress=on_progress, beside=beside,
        )  # fmt: skip
        if bundled is not None:
            told = bundled(dry_run=True) if dry_run else _after(str(report.output), lambda: bundled(dry_run=False))
            report.details["embeddings"] = {"output": str(embeddings), "bytes_written": told.bytes_written}
        if beside is not None:
            report.details["undo"] = {
                "output": str(undo), "bytes_written": beside.largest_nbytes if dry_run else beside.written,
            }  # fmt: skip
        return report


def _asked(
    loras: Sequence[str | os.PathLike[str] | tuple[str | os.PathLike[str], float]], text_encoder: float | None,
    dtype: str, rounding: str, lokr_rank: int | None,
) -> list[tuple[str | os.PathLike[str], float]]:  # fmt: skip
    """The LoRAs and their strengths, and all words checked. Raises UsageError."""
    check_words(dtype, ())
    if rounding not in ROUNDINGS:
        raise UsageError("--rounding", f"found {quote(rounding)}, expected {' or '.join(ROUNDINGS)}")
    if not loras:
        raise UsageError("fuse", "found no LoRA, expected one or more after the checkpoint")
    asked = [parse(lora) for lora in loras]
    if text_encoder is not None and not math.isfinite(text_encoder):
        raise UsageError("--text-encoder", f"found {text_encoder}, expected a finite number")
    if lokr_rank is not None and lokr_rank < 1:
        raise UsageError("--lokr-rank", f"found {lokr_rank}, expected a whole number, 1 or more")
    return asked


@dataclass(slots=True)
class _Strengths:
    """Each LoRA's strength in a component and canonical module. of_text: is any in a text encoder asked for?"""

    of_files: Sequence[float]
    text_encoder: float | None
    of_text: bool = False

    def __call__(self, number: int, component: str, _module: str) -> float:
        if self.text_encoder is None or not component.startswith("text_encoder"):
            return self.of_files[number]
        self.of_text = True
        return self.text_encoder


def parse(lora: str | os.PathLike[str] | tuple[str | os.PathLike[str], float]) -> tuple[str | os.PathLike[str], float]:
    """FILE[:STRENGTH] as a file and a number; a Windows drive letter is no strength."""
    if isinstance(lora, tuple):
        file, strength = lora
    else:
        file, strength = lora, 1.0
        found = _STRENGTH.fullmatch(lora) if isinstance(lora, str) else None
        if found is not None:
            file, strength = found["file"], float(found["strength"])
    if not math.isfinite(strength):
        raise UsageError(str(file), f"found strength {strength}, expected a finite number")
    return file, strength


def _check_apart(folder: Path, others: Sequence[Path]) -> None:
    """Refuse a folder for embeddings in which something else of this work lies: --force would replace all of it."""
    with contextlib.suppress(OSError, ValueError):
        whole = folder.resolve()
        for other in others:
            if whole in (other.resolve(), *other.resolve().parents):
                raise UsageError("--embeddings", f"{str(folder)!r} holds {str(other)!r}", "name a new folder")


def _after(output: str, copy_out: Callable[[], Report]) -> Report:
    """What follows when the output is written; an error says that it is."""
    try:
        return copy_out()
    except (Interrupted, KeyboardInterrupt):
        what = f"interrupted while embeddings were copied out; {output!r} is written, and whole"
        raise Interrupted("--embeddings", what) from None
    except WeightopsError as e:
        raise type(e)(e.where, f"{e.what}; {output!r} is written, and whole", e.hint) from None


def _in_words(base: str, loras: Sequence[tuple[str, float]]) -> str:
    return base + "".join(f" {'+' if s >= 0 else '−'} {abs(s):.6g} × {name}" for name, s in loras)


# ------------------------------------------------------------------------------------------------ what survived


def _say_what_survived(
    outcome: Outcome, modules: Mapping[int, str], dtypes: Sequence[str], rounding: str, report: Report
) -> None:
    """Each module's figures into the report, and all of them in one line."""
    rows: list[dict[str, Any]] = []
    total = [0.0] * 5
    for number, name in modules.items():
        values: list[Survival] = outcome.values.get(number, [])
        meant, along = math.fsum(v.meant for v in values), math.fsum(v.along for v in values)
        off, weight = math.fsum(v.off for v in values), math.fsum(v.weight for v in values)
        if not meant:
            rows.append(
                {"name": name, "delta_norm": 0.0, "weight_norm": math.sqrt(weight), "survived": None, "residual": None}
            )
            continue
        rows.append({
            "name": name, "delta_norm": math.sqrt(meant), "weight_norm": math.sqrt(weight),
            "survived": along / meant, "residual": math.sqrt(off / meant),
        })  # fmt: skip
        beside_along = math.fsum(v.other[0] if v.other is not None else v.along for v in values)
        beside_off = math.fsum(v.other[1] if v.other is not None else v.off for v in values)
        total = [a + b for a, b in zip(total, (meant, along, off, beside_along, beside_off), strict=True)]
    report.details["modules"] = rows
    if total[0]:
        report.details["survived"] = total[1] / total[0]
        report.details["residual"] = math.sqrt(total[2] / total[0])
        report.details["line"] = _line(rows, dtypes, total, rounding)


# What the dtypes that are tried beside the one that is written are called on the command line.
_WORDS = {"float16": "--dtype fp16", "bfloat16": "--dtype bf16", "float32": "--dtype fp32"}


def _line(rows: Sequence[dict[str, Any]], dtypes: Sequence[str], total: Sequence[float], rounding: str) -> str:
    meant, along, off, beside, _ = total
    found = [(r["survived"], d) for r, d in zip(rows, dtypes, strict=True) if r["survived"] is not None]
    low = [(survived, dtype) for survived, dtype in found if survived < 0.9]
    written = " and ".join(sorted({dtype for _, dtype in found}))
    said = f"{_percent(along / meant)} of the LoRA survived the rounding to {written}, "
    said += f"residual {_percent(math.sqrt(off / meant))}"
    if low:
        worst, _ = min(low)
        said += f"; in {len(low):,} of {len(rows):,} tensors less than 90 %, down to {_percent(worst)}"
        if beside / meant > along / meant + 0.005:
            tried = {BESIDE.get(dtype) for _, dtype in low}
            wider = _WORDS.get(tried.pop() or "") if len(tried) == 1 else None
            said += f". {wider or 'A wider --dtype'} keeps {_percent(beside / meant)}"
        if rounding == "nearest":
            said += "; --rounding stochastic keeps all of it on average, with more noise"
    return said


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")
