"""combine: several LoRAs as one, Σ wᵢ·ΔWᵢ exactly or at the best approximation of a rank, or by other methods."""

from __future__ import annotations

import contextlib
import functools
import operator
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.engine.run import Progress, ignore, import_torch_ahead
from weightops.errors import UsageError, quote
from weightops.files.checkpoint import open_checkpoint
from weightops.files.tensor import Slot, TensorSpec
from weightops.lora.rank import RankRule, rules_for
from weightops.lora.units import Unit
from weightops.naming.keymap import ARCHITECTURES
from weightops.ops.adapter_modules import Base, settings_of
from weightops.ops.blend import Blend, way
from weightops.ops.combine_plan import line_up
from weightops.ops.cutting import Cutting
from weightops.ops.dialect_settings import folder_of, metadata_of, told_of_base
from weightops.ops.fuse import parse
from weightops.ops.interference import interference, meetings
from weightops.ops.lined_up import LinedUp, Vector, Wish
from weightops.ops.produce import Bar, Planned, check_words, named, stem
from weightops.ops.report import Account, Report, Unused, modules
from weightops.ops.respell import becomes, carry
from weightops.ops.snapshots import ema_weights
from weightops.plan import Grain, Input, Plan, Task

if TYPE_CHECKING:
    import os
    from collections.abc import Container, Mapping, Sequence

    from torch import Tensor

    from weightops.ops.factor_plan import Built, Module
    from weightops.plan import Block


# Another tool's arithmetic, for whoever must repeat its numbers.
PEERS = ("sd-scripts",)


def combine(
    *loras: str | os.PathLike[str] | tuple[str | os.PathLike[str], float],
    output: str | os.PathLike[str] | None = None,
    rank: int | str | None = None,
    conv_rank: int | str | None = None,
    max_rank: int | None = None,
    max_conv_rank: int | None = None,
    exact: bool = False,
    method: str = "sum",
    settings: Mapping[str, Any] | None = None,
    ema: str | float | None = None,
    compat: str | None = None,
    base: str | os.PathLike[str] | None = None,
    dialect: str | None = None,
    architecture: str | None = None,
    interference_only: bool = False,
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
    """Write several LoRAs as one LoRA, `output` (None: a name built from theirs), of alpha = rank.

    loras: files, or "file:0.8", or (file, 0.8), of any families, ranks, dialects and spellings of one architecture. The
    result is Σ wᵢ·ΔWᵢ; a module that only one of them has is that one's, at its strength. rank, conv_rank, max_rank,
    max_conv_rank: as of `resize` (None: of each module the largest rank that comes in). exact: the ranks add up, and
    nothing is cut. method: another way to combine than the sum (see weightops.ops.blend.ways), and its `settings`; to
    normalised ones strengths are shares. ema: an average of a training's snapshots, given in their order (see
    weightops.ops.snapshots). compat: "sd-scripts" repeats the numbers of its merge_lora.py, with `exact` those of its
    --concat. base: the model that they are for; with it, what depends on its weights (DoRA, OFT, …) takes part.
    dialect: whose names the result has (None: the first file's); architecture: where names and sizes fit several.
    interference_only: write nothing, and say how they get in each other's way. Raises WeightopsError.

    The report's `details["modules"]` is that of `resize`; `details["interference"]` has, of each pair of files and each
    module, the cosine, the angle between their column spaces, sign conflicts, and how strong each is in the sum.
    """
    started = time.perf_counter()
    check_words(dtype, ())
    asked = [parse(lora) for lora in loras]
    if len(asked) < 2:
        raise UsageError("combine", f"found {len(asked)} LoRA, expected two or more", "resize is for one")
    ranks = {"--rank": rank, "--conv-rank": conv_rank, "--max-rank": max_rank, "--max-conv-rank": max_conv_rank}
    ranked = next((option for option, value in ranks.items() if value is not None), None)
    _check(method, ema, compat, architecture, asked, exact=exact, ranked=ranked)
    if not dry_run:
        import_torch_ahead()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_checkpoint(file)) for file, _ in asked]
        weights = [w for _, w in asked] if ema is None else ema_weights(str(ema), [f.metadata for f in files])
        blend = None
        if method != "sum" or settings:
            blend = Blend.of(method, weights, settings or {}, seed)
        model = None if base is None else Base.of(stack.enter_context(open_checkpoint(base)), len(files))
        wish = Wish(weights, dialect, architecture, exact, blend, compat)
        lined = line_up(files, wish, model)
        said: dict[str, Any] = {"strengths": weights, "method": method, "exact": exact}
        for name, value in (("rank", rank), ("conv_rank", conv_rank), ("max_rank", max_rank), ("ema", ema),
                            ("max_conv_rank", max_conv_rank), ("compat", compat), ("dialect", dialect),
                            ("architecture", architecture)):  # fmt: skip
            said |= {name: value if isinstance(value, int) else str(value)} if value is not None else {}
        said |= {"settings": dict(blend.settings)} if blend is not None else {}
        drawn = blend is not None or any(not m.of.is_product for m in lined.modules)
        said |= {"seed": seed} if drawn else {}
        sources = (*files, *([] if model is None else [model.opened]))
        if strict:
            lined.account.refuse_surprises("would be left out", "left out")
        rule, conv_rule = None, None
        if not interference_only:
            rule, conv_rule = _rules(lined, rank, conv_rank, max_rank, max_conv_rank, exact=exact or compat is not None)
        file = _Combined(lined, sources, dtype, said)
        work = Cutting(
            "combine", file, lined.modules, sources, _target(lined, weights, output), rule, conv_rule, dtype, seed,
            memory, {"device": device, "threads": threads}, Bar(on_progress), force,
        )  # fmt: skip
        work.ahead = _meetings(work, weights)
        if interference_only:
            work.refuse_memory()
        elif not dry_run:
            work.write(dry_run=True, verify=False)  # refuses what headers tell, before anything is read
        if not dry_run:
            file.interference = _interference(work, lined, weights)
        report = file.reported(work) if interference_only else work.write(dry_run=dry_run, verify=verify)
        if file.interference is not None:
            report.details["interference"] = file.interference
    report.seconds = time.perf_counter() - started
    return report


def _check(
    method: str, ema: str | float | None, compat: str | None, architecture: str | None,
    asked: Sequence[tuple[Any, float]], *, exact: bool, ranked: str | None,
) -> None:  # fmt: skip
    """Refuse words that are unknown, or mean nothing together."""
    way(method)
    if architecture is not None:
        try:
            ARCHITECTURES.get(architecture)
        except UsageError as e:
            raise UsageError("--architecture", e.what, e.hint) from None
    if exact and ranked:
        raise UsageError("--exact", f"keeps every rank, and {ranked} says how many", "take one of the two")
    if ema is not None:
        if method != "sum" or compat is not None:
            raise UsageError("--ema", "is an average, and stands with no --method and no --compat")
        if any(strength != 1 for _, strength in asked):
            raise UsageError("--ema", "makes the strengths, and some are given with the files")
    if compat is None:
        return
    if compat not in PEERS:
        raise UsageError("--compat", f"found {quote(compat)}, expected {' or '.join(PEERS)}")
    if method != "sum":
        raise UsageError("--compat", f"{compat} has no method {method}")
    if ranked:
        raise UsageError("--compat", f"{compat} keeps the ranks, and {ranked} says others", "resize the result")


def _rules(
    lined: LinedUp, rank: int | str | None, conv_rank: int | str | None, cap: int | None, conv_cap: int | None, *,
    exact: bool,
) -> tuple[RankRule | None, RankRule | None]:  # fmt: skip
    """The rules; None: each module keeps the largest rank that comes in, or with `exact` all of them."""
    rules: tuple[RankRule | None, RankRule | None] = (None, None)
    if rank is not None:
        rules = rules_for(rank, conv_rank, cap=cap, conv_cap=conv_cap)
    elif conv_rank is not None:
        rules = (None, rules_for(1, conv_rank, conv_cap=conv_cap)[1])
    if exact:
        return RankRule("rank", 1 << 40), RankRule("rank", 1 << 40)
    if rank is None:
        whole = [m for m in lined.modules if m.incoming is None and not (m.of.is_convolution and conv_rank is not None)]
        if whole:
            raise UsageError(
                "--rank", f"found none, and {modules(len(whole))} come in without a rank: {quote(whole[0].of.name)}",
                "--rank 32, energy:0.99 or another rule says how near they are to be",
            )  # fmt: skip
        if cap is not None or (conv_cap is not None and conv_rank is None):
            where = "--max-rank" if cap is not None else "--max-conv-rank"
            raise UsageError(where, "is for a rule, and --rank has none", "--rank energy:0.99 is one")
    return rules


def _target(lined: LinedUp, weights: Sequence[float], output: str | os.PathLike[str] | None) -> Any:
    stems = [stem(f)[:60] + ("" if w == 1 else f"-{w:.4g}") for f, w in zip(lined.files, weights, strict=True)]
    more = [] if len(stems) <= 4 else [f"{len(stems) - 4} more"]
    target = named(output, "+".join([*stems[:4], *more]))
    is_folder = lined.is_folder or (lined.own is not None and lined.own.is_folder)
    return target.with_suffix("") if output is None and is_folder else target


def _interference(work: Cutting, lined: LinedUp, weights: Sequence[float]) -> dict[str, Any]:
    """The scan that comes first."""
    names = _names([stem(file) for file in lined.files])
    work.bar.total = max(2 * sum(file.nbytes for file in lined.files), 1)
    found = work.scan_values(work.ahead, work.bar.part(0.0, 0.3))
    met = {module.of.name: values[0] for module, values in zip(work.modules, found, strict=True)}
    return interference(met, weights, names)


def _meetings(work: Cutting, weights: Sequence[float]) -> list[Task]:
    sums = [replace(m.of, blend=None, terms=tuple(replace(t, strength=1.0) for t in m.of.terms)) for m in work.modules]
    return meetings(sums, work.sources, weights)


def _names(stems: Sequence[str]) -> list[str]:
    """A name for each file; those that are called alike are numbered."""
    found: list[str] = []
    for number, name in enumerate(stems, 1):
        alike = stems.count(name) > 1
        while alike or name in found:
            name, alike = f"{name} ({number})", False
        found.append(name)
    return found


@dataclass(slots=True)
class _Combined:
    """The file that is written: modules in the names of one dialect, biases and norms, embeddings."""

    lined: LinedUp
    sources: tuple[Any, ...]
    dtype: str
    said: Mapping[str, Any]
    interference: dict[str, Any] | None = None

    def planned(self, built: Built, ranks: Sequence[int]) -> Planned:
        lined = self.lined
        outputs: dict[str, TensorSpec] = dict(built.outputs)
        tasks = list(built.tasks)
        dropped = self._dropped(ranks)
        for vector in lined.vectors:
            if vector.beside in dropped:
                continue
            outputs[vector.key] = becomes(TensorSpec(vector.dtype, (vector.rows,)), self.dtype)
            tasks.append(_vector_task(vector, outputs[vector.key], self.sources, lined.wish.blend))
        for key, number in lined.embeddings.items():
            spec = lined.files[number].tensors[key].spec
            outputs[key] = becomes(spec, self.dtype)
            task = carry(key, spec, key, self.dtype)
            tasks.append(replace(task, inputs=tuple(replace(entry, source=number) for entry in task.inputs)))
        with_bias = {vector.beside for vector in lined.vectors}
        units = [self._unit(m, r, with_bias) for m, r in zip(lined.modules, ranks, strict=True) if r]
        metadata: dict[str, str] = {"format": "pt"}
        files: tuple[Any, ...] = ()
        extras: dict[str, bytes] = {}
        spelled = lined.spelled(outputs)
        if lined.own is not None:  # names of no known model, and what the first file says beside its tensors
            metadata, files, extras = settings_of(lined.own, built.settings, outputs)
            metadata = {"format": "pt", **metadata}
        if spelled is not None:
            files, extras = folder_of(spelled, units)
            found, headers = metadata_of(spelled, units)
            metadata |= told_of_base(spelled.dialect.name, spelled.architecture.name) | found | headers
        metadata |= _common(lined.files)
        is_kohya = lined.dialect is not None and lined.dialect.name == "kohya"
        plan = Plan(
            self.sources, outputs, tuple(tasks), metadata,
            {"command": "combine", "version": __version__, "dtype": self.dtype, **self.said}, refuse_nonfinite=True,
            files=files, extras=extras, data_hashes={"sshs_model_hash": "{}"} if is_kohya else {},
        )  # fmt: skip
        return Planned(plan, self.account(ranks), self.words(), self.groups(ranks), self.warnings(ranks))

    def _dropped(self, ranks: Sequence[int]) -> set[str]:
        return {m.of.name for m, rank in zip(self.lined.modules, ranks, strict=True) if not rank}

    def _unit(self, module: Module, rank: int, with_bias: Container[str | None]) -> Unit:
        prefix, name = self.lined.names[module.of.name]
        if module.is_whole(rank):
            spec = module.written(self.dtype, module.of.shape)
            return Unit(module.component, prefix, name, "full", {"diff": (spec, ())}, None, None, ())
        ones = (1,) * (len(module.of.shape) - 2)
        parts: dict[str, Any] = {
            "down": (module.written(self.dtype, (rank, *module.of.shape[1:])), ()),
            "up": (module.written(self.dtype, (module.of.out, rank, *ones)), ()),
        }
        if module.of.name in with_bias:
            parts["bias"] = (module.written(self.dtype, (module.of.out,)), ())
        return Unit(module.component, prefix, name, "lora", parts, module.alpha(rank), rank, ())

    def account(self, ranks: Sequence[int]) -> Account:
        """As it was lined up, less what modules alone have that are dropped."""
        lined, dropped = self.lined, self._dropped(ranks)
        account = replace(lined.account, used=list(lined.account.used), unused=list(lined.account.unused))
        kept = {entry for name, keys in lined.keys.items() if name not in dropped for entry in keys}
        gone = [entry for name in lined.keys if name in dropped for entry in lined.keys[name]]
        for vector in lined.vectors:
            entries = [(summand.file, summand.source.key) for summand in vector.summands]
            if vector.beside in dropped:
                gone += entries
            else:
                kept.update(entries)
        for file, key in dict.fromkeys(gone):
            if (file, key) not in kept and (file, key) not in lined.lost:
                account.used.remove(key)
                account.unused.append(Unused(key, lined.files[file].label, "rank 0: its module is dropped", asked=True))
        return account

    def words(self) -> str:
        how = {"sum": ""}.get(str(self.said["method"]), f" ({self.said['method']})")
        weights = list(self.said["strengths"])
        shown = [f"{abs(w):.6g} × {stem(f)}" for f, w in zip(self.lined.files, weights, strict=True)]
        signs = ["" if w >= 0 else "−" for w in weights]
        text = signs[0] + shown[0] + "".join(
            f" {sign or '+'} {one}" for sign, one in zip(signs[1:], shown[1:], strict=True)
        )  # fmt: skip
        return f"{text}{how}: {modules(len(self.lined.modules))}"

    def groups(self, ranks: Sequence[int]) -> list[dict[str, Any]]:
        """Of each component: modules, those that several files change, and those of rank 0."""
        found: dict[str, dict[str, Any]] = {}
        for module, rank in zip(self.lined.modules, ranks, strict=True):
            name = module.component or "model"
            entry = found.setdefault(name, {"component": name, "modules": 0, "shared": 0, "of one": 0})
            entry["modules"] += 1
            kind = "dropped" if not rank else "shared" if len(module.of.files) > 1 else "of one"
            entry[kind] = entry.get(kind, 0) + 1
        return list(found.values())

    def warnings(self, ranks: Sequence[int]) -> list[str]:
        found = list(self.lined.warnings)
        dropped = [m.of.name for m, rank in zip(self.lined.modules, ranks, strict=True) if not rank]
        if dropped:
            found.append(f"{modules(len(dropped))} of rank 0: dropped, {quote(dropped[0])} the first")
        blend = self.lined.wish.blend
        if blend is not None and blend.shares:
            what = "twice as much of all of them is the same, and what only one LoRA has is kept as it is"
            found.append(f"{blend.method.name} takes the strengths as shares: {what}")
        others = {t.family.name for m in self.lined.modules for t in m.of.terms} & {"loha", "lokr"}
        if others and "rank" not in self.said and not self.said["exact"]:
            most = max(ranks, default=0)
            who = " and ".join(sorted(others))
            found.append(f"{who} come in with all their ranks, up to {most}; --rank takes fewer")
        return found

    def line(self, report: Report) -> str:
        details = report.details
        ranks = [row["rank"] for row in details["modules"] if row["rank"]]
        said = f"ranks {min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else f"rank {ranks[0]}"
        if self.said.get("compat"):
            return f"As {self.said['compat']} has it, {said}; that is off the sum by {_percent(details['error'])}"
        what = "sum" if self.said["method"] == "sum" else f"result of {self.said['method']}"
        return (
            f"Holds {_percent(details['energy'])} of the energy of the {what}, relative error "
            f"{_percent(details['error'])}, {said}"
        )

    def reported(self, work: Cutting) -> Report:
        """The report of a look at the files that writes nothing."""
        planned, _ = work.planned([m.settled(m.rank_before) for m in self.lined.modules])
        report = work.foreseen(planned)
        report.output, report.bytes_written, report.bytes_read = None, 0, work.bytes_read
        return report


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


# Metadata of the base model, which is the result's where all files say the same.
_OF_THE_BASE = (
    "ss_base_model_version", "ss_v2", "modelspec.architecture", "modelspec.prediction_type", "modelspec.resolution",
    "modelspec.sai_model_spec",
)  # fmt: skip


def _common(files: Sequence[Any]) -> dict[str, str]:
    found = {key: {file.metadata.get(key) for file in files} for key in _OF_THE_BASE}
    return {key: value for key, values in found.items() if len(values) == 1 and (value := values.pop()) is not None}


def _vector_task(vector: Vector, spec: TensorSpec, sources: Sequence[Any], blend: Blend | None) -> Task:
    """Σ factor · rows, of biases and norms, or what else becomes of them."""
    inputs = tuple(Input(s.file, s.source.rows(sources[s.file].tensors[s.source.key].spec)) for s in vector.summands)
    compute = functools.partial(_added, vector, blend)
    work = 40 * spec.values * (1 + len({s.file for s in vector.summands}))
    return Task(vector.key, inputs, (Slot(vector.key, spec),), compute, Grain.TENSOR, work_nbytes=work)


def _added(
    vector: Vector, blend: Blend | None, inputs: Sequence[Tensor], outputs: Sequence[Tensor], _block: Block
) -> None:
    import torch

    from weightops.merging.method import store

    parts: dict[int, Any] = {}
    for summand, given in zip(vector.summands, inputs, strict=True):
        if summand.file not in parts:
            parts[summand.file] = torch.zeros(1, vector.rows, dtype=torch.float64, device=given.device)
        for start, stop, to in summand.placed:
            parts[summand.file][0, to : to + stop - start] += summand.factor * given.reshape(-1)[start:stop].double()
    if blend is None:
        found = functools.reduce(operator.add, parts.values())
    elif len(parts) == 1:
        found = next(part * blend.alone(file) for file, part in parts.items())
    else:
        found = blend.combined(vector.key, parts)
    store(found.reshape(outputs[0].shape), outputs[0])
