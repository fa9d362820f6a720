"""resize: a LoRA of fewer ranks, each module at the best approximation that its rank allows; any family goes in."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.engine.run import Progress, ignore, import_torch_ahead
from weightops.errors import MismatchError, UsageError, ValueRefused, quote
from weightops.files.checkpoint import open_checkpoint
from weightops.lora.rank import OF_THE_FILE, rules_for
from weightops.lora.settings import HEADER
from weightops.ops.adapter_modules import Base, OwnModules, modules_of, read_own, settings_of
from weightops.ops.cutting import Cutting
from weightops.ops.produce import Bar, Planned, check_words, kept_metadata, named, stem
from weightops.ops.report import Account, Unused, modules, tensors
from weightops.ops.respell import becomes, carry
from weightops.ops.size_curve import curve
from weightops.plan import Plan

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from weightops.files.checkpoint import Checkpoint
    from weightops.files.tensor import TensorSpec
    from weightops.lora.rank import RankRule
    from weightops.ops.factor_plan import Built
    from weightops.ops.report import Report


def resize(
    file: str | os.PathLike[str],
    *,
    rank: int | str | None = None,
    conv_rank: int | str | None = None,
    max_rank: int | None = None,
    max_conv_rank: int | None = None,
    all_kernels: bool = False,
    base: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    folder: Path | None = None,
    plan: bool = False,
    dtype: str = "keep",
    seed: int = 0,
    strict: bool = False,
    memory: int | None = None,
    threads: int | None = None,
    device: str = "auto",
    force: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    on_progress: Progress = ignore,
) -> Report:
    """Write the LoRA `file` with fewer ranks to `output` (None: a name built from its own and the rule, in `folder`).

    rank: a number, or a rule such as "energy:0.98" (see weightops.lora.rank.KINDS); "size:" and "error:" are of the
    whole file. conv_rank: of convolutions larger than 1×1 (None: as `rank`). max_rank, max_conv_rank: the most that a
    rule gives a module, a convolution; all_kernels: these words are for 1×1 ones, too, as in sd-scripts. A module that
    has fewer ranks keeps its own, as it is; the strength stays, in alphas where the file has them. LoHa and LoKr become
    LoRA, from their exact products; a magnitude (DoRA) goes along.
    base: the model that the file is for; what depends on its weights (DoRA, OFT, …) becomes LoRA with it, and what
    "size:" and "error:" weigh is then each module's change relative to its weight. plan: write nothing, and say what
    each size would cost in error. dtype: of the factors. seed: of what has no exact factors, and is approximated.
    memory: bytes in flight (None: 128 MiB, and up to 512 MiB for large matrices). Raises WeightopsError.

    The report's `details["modules"]` has for each module the rank before and after, the share of ‖ΔW‖² that is kept
    (`energy`), the relative error of what was written, and ‖ΔW‖.
    """
    started = time.perf_counter()
    check_words(dtype, ())
    if dtype.startswith("fp8"):
        raise UsageError("--dtype", f"{dtype} would leave little of the factors", "fp16 and bf16 are the usual ones")
    rule, conv_rule = rules_of(rank, conv_rank, max_rank, max_conv_rank, plan=plan)
    if not dry_run:
        import_torch_ahead()
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(open_checkpoint(file))
        model = None
        if base is not None:
            model = Base.of(stack.enter_context(open_checkpoint(base)), 1)
        found = read_own(opened, architecture=None if model is None else model.architecture)
        said: dict[str, Any] = {"rank": str(rank)}
        said |= {"conv_rank": str(conv_rank)} if conv_rank is not None else {}
        said |= {"max_rank": max_rank} if max_rank is not None else {}
        said |= {"max_conv_rank": max_conv_rank} if max_conv_rank is not None else {}
        said |= {"all_kernels": True} if all_kernels else {}
        weighs = model is not None and (plan or rule.kind in OF_THE_FILE)
        own = modules_of(opened, found, base=model, frames=weighs)
        said |= {} if all(m.of.is_product for m in own.modules) else {"seed": seed}
        check_own(own, base=model is not None, strict=strict)
        sources = (opened,) if model is None else (opened, model.opened)
        target = _target(own, output, "-" + str(rank).replace(":", "").replace(" ", ""), folder)
        work = Cutting(
            "resize", Own(own, sources, "resize", dtype, said), own.modules, sources, target, rule, conv_rule, dtype,
            seed, memory, {"device": device, "threads": threads}, Bar(on_progress), force, frames=own.frames,
            all_kernels=all_kernels,
        )  # fmt: skip
        try:
            report = _curve(work, own) if plan else work.write(dry_run=dry_run, verify=verify)
        except ValueRefused as e:  # a module is named where it is found, and the file here
            raise ValueRefused(e.where or opened.label, e.what, e.hint) from None
    report.seconds = time.perf_counter() - started
    return report


def rules_of(
    rank: int | str | None, conv_rank: int | str | None, max_rank: int | None, max_conv_rank: int | None, *, plan: bool
) -> tuple[RankRule, RankRule]:
    """The rules of modules and of convolutions. Raises UsageError."""
    if rank is None and not plan:
        raise UsageError("--rank", "found none, expected a number or a rule", "--plan shows what each size would cost")
    return rules_for(1 if rank is None else rank, conv_rank, cap=max_rank, conv_cap=max_conv_rank)


def _target(own: OwnModules, output: str | os.PathLike[str] | None, ending: str, folder: Path | None = None) -> Path:
    target = named(output, stem(own.opened), ending)
    target = target if folder is None or output is not None else folder / target
    return target.with_suffix("") if output is None and own.is_folder else target


def check_own(own: OwnModules, *, base: bool, strict: bool) -> None:
    """Refuse a file of which nothing can be cut, and with `strict` one of which something cannot."""
    opened, uncut = own.opened, own.uncut
    if not own.modules:
        hint = "--base CHECKPOINT, the model that it is for, makes a LoRA of it" if uncut and not base else None
        what = "has no module that can be cut to a rank" + (f": {uncut[0].reason}" if uncut else "")
        raise MismatchError(opened.label, what, hint)
    if strict and uncut:
        what = f"{tensors(len(uncut))} would be kept as stored: {quote(uncut[0].key)}, {uncut[0].reason}"
        raise MismatchError("--strict", what, "--base CHECKPOINT makes a LoRA of them")


@dataclass(slots=True)
class Own:
    """A file under its own names: modules of other ranks, and all else as it was."""

    own: OwnModules
    sources: tuple[Checkpoint, ...]
    command: str
    dtype: str
    said: Mapping[str, Any]

    def planned(self, built: Built, ranks: Sequence[int]) -> Planned:
        """The plan that writes these ranks."""
        own, opened = self.own, self.own.opened
        outputs: dict[str, TensorSpec] = dict(built.outputs)
        tasks = list(built.tasks)
        for key in [*(entry.key for entry in own.kept), *own.found.embeddings]:
            spec = opened.tensors[key].spec
            outputs[key] = becomes(spec, self.dtype)
            tasks.append(carry(key, spec, key, self.dtype))
        metadata, files, extras = settings_of(own, built.settings, outputs)
        remade = any(m.stored_rank is None and rank for m, rank in zip(own.modules, ranks, strict=True))
        kept = kept_metadata(opened, less=frozenset({HEADER, *(_STALE if remade else ())}))
        recipe = {"command": self.command, "version": __version__, "dtype": self.dtype, **self.said}
        hashes = {k: f for k, f in _HASHES.items() if k in opened.metadata}
        plan = Plan(
            self.sources, outputs, tuple(tasks), {**kept, **metadata}, recipe, refuse_nonfinite=True, files=files,
            extras=extras, data_hashes=hashes,
        )  # fmt: skip
        return Planned(plan, self.account(ranks), self.words(ranks), self.groups(ranks), self.warnings(ranks))

    # -------------------------------------------------------------------------------------------- what is said

    def account(self, ranks: Sequence[int]) -> Account:
        """Every key: used where its module is cut, copied where it keeps its rank or has none, else unused."""
        account, label = Account(), self.own.opened.label
        for module, keys, rank in zip(self.own.modules, self.own.keys, ranks, strict=True):
            if not rank:
                account.unused += [Unused(key, label, "rank 0: its module is dropped", asked=True) for key in keys]
            elif module.is_stored(rank):
                account.copied += keys
            else:
                account.used += keys
        account.copied += [entry.key for entry in self.own.kept]
        account.copied += self.own.found.embeddings
        account.unused += [Unused(path, label, why, asked=True) for path, why in self.own.opened.left_out]
        return account

    def words(self, ranks: Sequence[int]) -> str:
        before = Counter(m.rank_before for m in self.own.modules if m.stored_rank is not None)
        after = Counter(rank for rank in ranks if rank)
        return f"{stem(self.own.opened)}: {modules(len(self.own.modules))}, {_ranked(before)} → {_ranked(after)}"

    def groups(self, ranks: Sequence[int]) -> list[dict[str, Any]]:
        """Of each component: modules that are cut, those that keep their ranks, those that are made LoRA, dropped."""
        found: dict[str, dict[str, Any]] = {}
        for module, name, rank in zip(self.own.modules, self.own.homes, ranks, strict=True):
            kind = ("dropped" if not rank else "kept" if module.is_stored(rank) else "whole" if module.is_whole(rank)
                    else "cut" if module.stored_rank is not None else "made LoRA")  # fmt: skip
            entry = found.setdefault(name, {"component": name, "modules": 0, "cut": 0, "kept": 0})
            entry["modules"] += 1
            entry[kind] = entry.get(kind, 0) + 1
        return list(found.values())

    def warnings(self, ranks: Sequence[int]) -> list[str]:
        found = []
        dropped = [m.of.name for m, rank in zip(self.own.modules, ranks, strict=True) if not rank]
        if dropped:
            found.append(f"{modules(len(dropped))} of rank 0: dropped, {quote(dropped[0])} the first")
        uncut = self.own.uncut
        if uncut:
            hint = "; --base CHECKPOINT makes a LoRA of them" if len(self.sources) == 1 else ""
            found.append(f"{tensors(len(uncut))} kept as stored: {quote(uncut[0].key)}, {uncut[0].reason}{hint}")
        if any("dora_scale" in m.kept for m in self.own.modules):
            found.append("magnitudes (DoRA) are kept, and the errors are those of ΔW without them")
        return found

    def line(self, report: Report) -> str:
        details = report.details
        dropped = sum(1 for row in details["modules"] if not row["rank"])
        said = f"Keeps {100 * details['energy']:.2f} % of the energy, relative error {100 * details['error']:.2f} %"
        if "weighted_error" in details:
            said += f", {100 * details['weighted_error']:.2f} % where each weighs by its weight in the base"
        said += f"; {modules(dropped)} dropped" if dropped else ""
        return f"{said}; {self.own.opened.nbytes / 1e6:,.1f} MB → {report.bytes_written / 1e6:,.1f} MB"


def _ranked(ranks: Counter[int]) -> str:
    if not ranks:
        return "no rank"
    return f"rank {min(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"


# Metadata of a trainer's families, which are no longer those of the file; and hashes that are made anew.
_STALE = frozenset({"ss_network_module", "ss_network_args"})
_HASHES = {"sshs_model_hash": "{}", "modelspec.hash_sha256": "0x{}"}


def _curve(work: Cutting, own: OwnModules) -> Report:
    """What each size would cost in error; nothing is written."""
    work.bar.total = own.opened.nbytes
    given = work.scan(0.0, 1.0)
    planned, _ = work.planned([m.settled(m.of.most) for m in work.modules])
    report = work.foreseen(planned)
    report.output, report.bytes_written, report.bytes_read = None, 0, work.bytes_read
    report.details["plan"] = curve(given, [m.rank_before for m in work.modules], work.size_of)
    report.summary = f"{stem(own.opened)}: {modules(len(work.modules))}, what each size costs in error"
    return report
