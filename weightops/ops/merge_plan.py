"""The plan of a merge: what becomes of each key of each model. From headers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.errors import MismatchError, UsageError, listing, quote
from weightops.files.dtypes import ARITHMETIC, DTYPE_WORDS
from weightops.files.tensor import Slot, TensorSpec
from weightops.naming.identify import (
    MARKER_METADATA,
    MARKERS,
    body_of,
    family_of,
    identify,
    quantised,
)
from weightops.ops.align import Alignment, Spot, same_cut
from weightops.ops.produce import Planned, cast, kept_metadata, stem
from weightops.ops.report import Account, Unused, tensors
from weightops.plan import Block, Compute, Grain, Input, Plan, Task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from weightops.files.checkpoint import Checkpoint
    from weightops.merging.method import MergeMethod


# How the first model was merged, in other tools' words: of the result it would be untrue.
ANCESTRY = frozenset({"sd_merge_recipe", "sd_merge_models", "modelspec.merged_from"})


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user asked of a merge, checked; see `merge` for the meaning of each."""

    method: MergeMethod
    parameters: Mapping[str, Any]
    weights: tuple[float, ...] | None
    vae: str = "1"
    text_encoder: str = "merge"
    dtype: str = "keep"
    drop: tuple[str, ...] = ()
    on_mismatch: str = "error"
    strict: bool = False
    allow_nonfinite: bool = False


def in_words(settings: Settings, opened: Sequence[Checkpoint]) -> str:
    """The formula with the files' own names: people read alpha both ways."""
    names = [stem(c) for c in opened]
    if len(set(names)) < len(names):  # x/model and y/model
        names = [c.label for c in opened]
    if settings.weights is None:
        return f"{settings.method.name}({', '.join(names)})"
    if settings.method.name == "add_difference":
        base, others, weights = names[0], names[1:], settings.weights
        start = base
        if len(others) > 1 and weights[0] == 1:  # a + α(b − c), as everyone writes it
            start, others, weights = others[0], others[1:], weights[1:]
        return start + "".join(
            f" {'+' if w >= 0 else '−'} {abs(w):.6g} × ({n} − {base})" for n, w in zip(others, weights, strict=True)
        )
    signs = [("" if w >= 0 else "−") if i == 0 else ("+ " if w >= 0 else "− ") for i, w in enumerate(settings.weights)]
    terms = [f"{s}{abs(w):.6g} × {n}" for s, w, n in zip(signs, settings.weights, names, strict=True)]
    return " ".join(terms)


# ------------------------------------------------------------------------------------------------ the plan


def plan_merge(opened: Sequence[Checkpoint], settings: Settings, *, vae_file: Checkpoint | None = None) -> Planned:
    """The plan of a merge of `opened` (the base first, where the method needs one), from headers alone."""
    return _Planner(opened, settings, vae_file).plan()


# What the markers in metadata say of an ordinary model, which the others do not say at all.
_ORDINARY = frozenset({"", "none", "false", "epsilon"})

_WORDS = {"vae": "VAE", "text_encoder": "text encoder"}

# What a trainer leaves beside the weights; it says nothing of what a file is.
_TRAINING = frozenset({"ema", "optimizer"})

# Components that are no weights: an average of two noise schedules, or of two markers, is neither.
_COPIED = frozenset({"schedule", "marker"})


def _which(keys: Sequence[str], components: Mapping[str, str]) -> str:
    """The first few of the keys by name, and of many keys also how many stand in which component."""
    counts = Counter(components.get(key, "other") for key in keys)
    several = ", ".join(f"{count:,} {component}" for component, count in counts.most_common())
    return f"{f' ({several})' if len(keys) > 5 else ''}: {listing(keys)}"


def option_of(family: str) -> str:
    return f"--{family.replace('_', '-')}"


class _Planner:
    """The state of planning one merge: what becomes of each key of each model."""

    def __init__(self, opened: Sequence[Checkpoint], settings: Settings, vae_file: Checkpoint | None) -> None:
        self.opened = list(opened)
        self.settings = settings
        self.vae_file = vae_file
        self.models = self.opened[1:] if settings.method.needs_base else self.opened
        self.first = self.models[0]
        self.identities = [identify(c.tensors) for c in self.opened]
        self.components = [i.components for i in self.identities]
        self.alignment = Alignment(self.first, self.identities[self.opened.index(self.first)])
        for number, (model, identity) in enumerate(zip(self.opened, self.identities, strict=True)):
            self.alignment.add(number, model, identity)
        self.first_components = self.components[self.opened.index(self.first)]
        self.account = Account()
        self.warnings: list[str] = []
        self.outputs: dict[str, TensorSpec] = {}
        self.copies: list[Task] = []
        self.merges: list[Task] = []
        self.counts: dict[str, dict[str, int]] = {}
        self.compute = _compute(settings)
        self.kept: set[str] = set()
        self.gone: set[tuple[int, str]] = set()  # of `account.unused`, by number of the model: labels may repeat
        # A file that is only a VAE, or only a text encoder, is simply merged.
        alone = len(set(self.first_components.values()) - _TRAINING) == 1
        self.chosen = {} if alone else {"vae": settings.vae}
        if settings.text_encoder != "merge":
            self.chosen["text_encoder"] = settings.text_encoder

    def plan(self) -> Planned:
        self._check_models()
        self._check_architectures()
        self._check_markers()
        self._check_chosen()
        replaced = self._vae_from_file() if self.vae_file is not None else {}
        for key in sorted(self.first.tensors, key=lambda k: self.first.tensors[k][1:3]):
            self._place(key, replaced)
        self._account_for_the_rest()
        self._check_outcome()
        self._warn()
        if self.settings.strict:
            self.account.refuse_surprises()
        sources = (*self.opened, *([self.vae_file] if self.vae_file is not None else []))
        plan = Plan(
            sources=sources,
            outputs=self.outputs,
            tasks=(*self.copies, *self.merges),  # copies first: they need no torch, which is imported meanwhile
            metadata=kept_metadata(self.first, less=ANCESTRY),
            recipe=self._recipe(),
            refuse_nonfinite=not self.settings.allow_nonfinite,
        )
        groups = [{"component": name, **count} for name, count in self.counts.items()]
        return Planned(plan, self.account, in_words(self.settings, self.opened), groups, self.warnings)

    # -------------------------------------------------------------- one key

    def _place(self, key: str, replaced: Mapping[str, tuple[Spot, ...]]) -> None:
        """Decide what becomes of a key of the first model."""
        component = self.first_components[key]
        count = self.counts.setdefault(component, {"tensors": 0, "merged": 0, "copied": 0, "dropped": 0})
        count["tensors"] += 1
        family = family_of(component)
        if family in self.settings.drop:
            count["dropped"] += 1
            self._leave(self.opened.index(self.first), key, f"--drop {family}", asked=True)
            return
        spec = self.first.tensors[key].spec
        chosen = self.chosen.get(family)
        if key in replaced and self.vae_file is not None:
            self._copy(key, self.vae_file, replaced[key], count)
            self._leave(self.opened.index(self.first), key, "the VAE is taken from --vae", asked=True)
        elif chosen is not None and chosen.isdecimal():
            self._copy_chosen(key, int(chosen) - 1, family, count)
        elif spec.dtype not in ARITHMETIC or component in _COPIED:
            self._keep_unmergeable(key, spec, count)
        else:
            self._merge(key, spec, count)

    def _find(self, model: Checkpoint, key: str) -> tuple[Spot, ...] | None:
        return self.alignment.find(self.opened.index(model), model, key)

    def _copy(self, key: str, source: Checkpoint, spots: tuple[Spot, ...], count: dict[str, int]) -> None:
        self._add(key, [(source, spots)], None)
        self.account.copied.append(key)
        count["copied"] += 1

    def _copy_chosen(self, key: str, number: int, family: str, count: dict[str, int]) -> None:
        source = self.models[number]
        spots = self._find(source, key)
        if spots is None:
            raise MismatchError(
                source.label,
                f"has no tensor {quote(key)}, so its {_WORDS[family]} cannot take the place of the first's",
                f"{option_of(family)} 1 keeps the first model's",
            )
        self._copy(key, source, spots, count)

    def _keep_unmergeable(self, key: str, spec: TensorSpec, count: dict[str, int]) -> None:
        """Integers, booleans, codes, and what is no weight are copied from the first model."""
        for other in self.opened:
            spots = self._find(other, key)
            if spots is None and key.endswith("position_ids"):
                continue
            if spots is None or not self._fits(key, spec, spots):
                what = f"not in {other.label}" if spots is None else self._differs(other, spots, spec)
                self._keep(key, what, count)
                return
        self._copy(key, self.first, self._whole(key), count)

    def _whole(self, key: str) -> tuple[Spot, ...]:
        spec = self.first.tensors[key].spec
        return (Spot(Slot(key, spec), spec.shape),)

    def _fits(self, key: str, spec: TensorSpec, spots: tuple[Spot, ...]) -> bool:
        """Are these of the shapes that the first model's tensor, or its pieces, have?"""
        if spots[0].slot.key == key:
            return spots[0].shape == spec.shape
        return all(s.shape == p.spec.shape for s, p in zip(spots, self.alignment.pieces(key), strict=True))

    def _differs(self, other: Checkpoint, spots: tuple[Spot, ...], spec: TensorSpec) -> str:
        found = " and ".join(str(s.slot.spec) for s in spots)
        return f"{found} in {other.label}, {spec} in {self.first.label}"

    def _merge(self, key: str, spec: TensorSpec, count: dict[str, int]) -> None:
        found = [(c, self._find(c, key)) for c in self.opened]
        lacking = [c.label for c, spots in found if spots is None]
        if lacking:
            self._keep(key, f"not in {', '.join(lacking)}", count)
            return
        parts = [(c, spots) for c, spots in found if spots is not None]
        for other, spots in parts:
            if self._fits(key, spec, spots) and all(s.slot.spec.dtype in ARITHMETIC for s in spots):
                continue
            if self.settings.on_mismatch == "keep-first":
                self._keep(key, self._differs(other, spots, spec), count)
                return
            raise MismatchError(
                other.label,
                f"tensor {quote(spots[0].slot.key)} is {spots[0].slot.spec}, but {spec} in {self.first.label}",
                "--on-mismatch keep-first takes such tensors from the first model",
            )
        self._add(key, parts, self.compute)
        self.account.used.append(key)
        count["merged"] += 1

    def _keep(self, key: str, reason: str, count: dict[str, int]) -> None:
        self._add(key, [(self.first, self._whole(key))], None)
        self.account.kept.append((key, reason))
        self.kept.add(key)
        count["copied"] += 1

    def _add(self, key: str, parts: list[tuple[Checkpoint, tuple[Spot, ...]]], compute: Compute | None) -> None:
        """The tasks that fill the output tensor `key` from these tensors: one, or one for each band."""
        first = self.first.tensors[key].spec
        dtype = parts[0][1][0].slot.spec.dtype if compute is None else first.dtype
        if self.settings.dtype != "keep" and dtype in ARITHMETIC:
            dtype = DTYPE_WORDS[self.settings.dtype]
        simple = all(self._is_whole(key, first, source, spots) for source, spots in parts)
        self.outputs[key] = TensorSpec(dtype, parts[0][1][0].shape if simple else first.shape)
        if simple:
            self._add_task(key, [(c, spots[0]) for c, spots in parts], Slot(key, self.outputs[key]), compute)
            return
        pieces = self.alignment.pieces(key)
        cut = [(c, same_cut(spots, pieces)) for c, spots in parts]
        for number, piece in enumerate(pieces):
            slot = Slot(key, TensorSpec(dtype, piece.spec.shape), piece.bands)
            self._add_task(key, [(c, spots[number]) for c, spots in cut], slot, compute)

    def _is_whole(self, key: str, first: TensorSpec, source: Checkpoint, spots: tuple[Spot, ...]) -> bool:
        """Is it one tensor, all of it, as it stands?"""
        if spots[0].slot.key == key and spots[0].slot.bands is None:
            return True
        spot = spots[0]
        if len(spots) > 1 or spot.transposed or any(p.bands is not None for p in self.alignment.pieces(key)):
            return False
        return spot.slot.bands is None and source.tensors[spot.slot.key].spec.shape == first.shape

    def _add_task(self, key: str, parts: list[tuple[Checkpoint, Spot]], slot: Slot, compute: Compute | None) -> None:
        if compute is None and (slot.spec.dtype != parts[0][1].slot.spec.dtype or parts[0][1].transposed):
            compute = cast
        sources = [*self.opened, *([self.vae_file] if self.vae_file is not None else [])]
        elementwise = compute is not None and self.settings.method.grain is Grain.ROWS
        grain = Grain.ROWS if compute in (None, cast) else self.settings.method.grain
        whole = slot.bands is None and all(s.slot.bands is None and not s.transposed for _, s in parts)
        turned = [n for n, (_, s) in enumerate(parts) if s.transposed]
        inputs = tuple(
            Input(
                next(i for i, s in enumerate(sources) if s is source),
                Slot(s.slot.key, s.slot.spec.flat()) if elementwise and whole else s.slot,
            )
            for source, s in parts
        )
        if turned and compute is not None:
            compute, grain = _turning(compute, turned), Grain.TENSOR
        flat = elementwise and whole
        work = 0 if compute is None else self.settings.method.work_nbytes(len(parts), slot.spec.values, flat=flat)
        out = Slot(key, slot.spec.flat()) if flat else slot
        task = Task(key, inputs, (out,), compute, grain, work_nbytes=work)
        (self.copies if compute is None else self.merges).append(task)

    def _leave(self, number: int, key: str, reason: str, *, asked: bool) -> None:
        """Key of model number `number` (of `opened`) is not used, and why."""
        self.gone.add((number, key))
        self.account.unused.append(Unused(key, self.opened[number].label, reason, asked))

    # -------------------------------------------------------------- the models as wholes

    def _check_models(self) -> None:
        """Refuse what is no plain weights: their numbers can be averaged, but the average means nothing."""
        for model, identity in zip(self.opened, self.identities, strict=True):
            if not model.tensors:
                raise MismatchError(model.label, "holds no tensors: nothing to merge")
            if identity.kind == "lora":
                raise MismatchError(
                    model.label,
                    "is a LoRA: a sum of factors is not the sum of what they do, and merge takes checkpoints",
                )
            key = quantised(model.tensors)
            if key is not None:
                raise MismatchError(
                    model.label,
                    f"is quantised: {quote(key)} scales weights that mean nothing without it",
                    "merge the fp16, bf16 or fp32 release instead",
                )
        for other in self.opened:
            alike = self.alignment.counterparts(self.opened.index(other))
            if other.tensors.keys().isdisjoint(self.first.tensors) and not alike:
                raise MismatchError(
                    other.label,
                    f"has no tensor name in common with {self.first.label}: nothing to merge",
                    "these seem to be different architectures, or different spellings of one",
                )

    def _check_chosen(self) -> None:
        """A component that another model is to give must have its place in the first."""
        families = {family_of(component) for component in self.first_components.values()}
        for family, chosen in self.chosen.items():
            if chosen.isdecimal() and int(chosen) > 1 and family not in families:
                raise MismatchError(
                    self.first.label, f"holds no {_WORDS[family]} that {option_of(family)} could replace"
                )

    def _check_outcome(self) -> None:
        """Refuse a merge that is none."""
        if not self.outputs:
            raise UsageError("--drop", f"leaves nothing of {self.first.label} to write")
        given = {i.source for t in (*self.copies, *self.merges) for i in t.inputs} & set(range(len(self.opened)))
        if given - {self.opened.index(self.first)}:
            return
        other = self.models[-1] if len(self.models) > 1 else self.opened[0]
        reasons = sorted({u.reason for u in self.account.unused if u.source == other.label})
        raise MismatchError(
            other.label,
            f"nothing of it can be merged into {self.first.label}: the result would be a copy",
            "; ".join(reasons[:3]) or None,
        )

    def _check_architectures(self) -> None:
        known = {
            c.label: i.architecture
            for c, i in zip(self.opened, self.identities, strict=True)
            if i.architecture is not None
        }
        if len(set(known.values())) > 1:
            found = ", ".join(f"{label} is {a}" for label, a in known.items())
            labels = iter(known)
            first = known[next(labels)]
            other = next(label for label in labels if known[label] != first)
            raise MismatchError(other, f"different architectures cannot be merged: {found}")

    def _check_markers(self) -> None:
        """v-prediction and zero-terminal-SNR markers say how a model must be sampled; a mixture of both is neither."""
        found = []
        for model in self.models:
            tensors = {key for key in MARKERS if key in model.tensors}
            said = {k: model.metadata.get(k, "").lower() for k in MARKER_METADATA}
            found.append((tensors, {k: v for k, v in said.items() if v not in _ORDINARY}))
        for other, marks in zip(self.models[1:], found[1:], strict=True):
            if marks == found[0]:
                continue
            names = sorted(
                (marks[0] ^ found[0][0]) | {k for k in MARKER_METADATA if marks[1].get(k) != found[0][1].get(k)}
            )
            text = (
                f"{other.label} and {self.first.label} differ in {listing(names)}: one may predict v "
                "and the other noise, and a mixture samples badly"
            )
            if self.settings.strict:
                raise MismatchError("--strict", text)
            self.warnings.append(text)

    def _vae_from_file(self) -> dict[str, tuple[Spot, ...]]:
        """The first model's VAE keys -> where the --vae file has what takes their place."""
        assert self.vae_file is not None
        label = self.vae_file.label
        identity = identify(self.vae_file.tensors)
        theirs = identity.components
        bodies = {body_of(key): key for key, component in theirs.items() if component == "vae"}
        wanted = [key for key, component in self.first_components.items() if component == "vae"]
        if not wanted:
            raise MismatchError(self.first.label, "holds no VAE that --vae could replace")
        if not bodies:
            raise MismatchError(label, "holds no VAE, expected a VAE or a checkpoint with one")
        self.alignment.add(-1, self.vae_file, identity)
        replaced, missing = {}, []
        for key in wanted:
            spots = self._vae_spots(key, bodies)
            if spots is None:
                missing.append(key)
            else:
                replaced[key] = spots
        if missing:
            raise MismatchError(
                label, f"lacks {len(missing)} of {len(wanted)} VAE tensors: {listing(missing)}",
                "it may be of another architecture",
            )  # fmt: skip
        for key, spots in replaced.items():
            mine = self.first.tensors[key].spec
            whole = len(spots) == 1 and spots[0].slot.bands is None
            if (
                spots[0].shape != mine.shape
                if whole and not self.alignment.pieces(key)
                else not self._fits(key, mine, spots)
            ):
                its = spots[0].slot
                raise MismatchError(label, f"tensor {quote(its.key)} is {its.spec}, but {mine} in {self.first.label}")
        used = {spot.slot.key for spots in replaced.values() for spot in spots}
        for key in self.vae_file.tensors:
            if key not in used:
                beside = theirs[key] != "vae"
                reason = "only the VAE is taken from --vae" if beside else f"not in {self.first.label}"
                self.account.unused.append(Unused(key, label, reason, asked=beside))
        self.account.unused.extend(Unused(path, label, why, asked=True) for path, why in self.vae_file.left_out)
        return replaced

    def _vae_spots(self, key: str, bodies: Mapping[str, str]) -> tuple[Spot, ...] | None:
        assert self.vae_file is not None
        other = bodies.get(body_of(key))
        if other is None:
            return self.alignment.find(-1, self.vae_file, key)
        spec = self.vae_file.tensors[other].spec
        return (Spot(Slot(other, spec), spec.shape),)

    def _account_for_the_rest(self) -> None:
        """Each key of each model that is neither read nor gone yet: why it is not used."""
        read = {(i.source, i.slot.key) for t in (*self.copies, *self.merges) for i in t.inputs}
        for number, model in enumerate(self.opened):
            for key in model.tensors:
                if (number, key) not in read and (number, key) not in self.gone:
                    reason, asked = self._why_unused(key, model, self.components[number][key])
                    self._leave(number, key, reason, asked=asked)
            for path, reason in model.left_out:
                self.account.unused.append(Unused(path, model.label, reason, asked=True))

    def _why_unused(self, key: str, model: Checkpoint, component: str) -> tuple[str, bool]:
        """The reason, and whether the user's own words or plain sense ask for it."""
        family = family_of(component)
        if family in self.settings.drop:
            return f"--drop {family}", True
        chosen = self.chosen.get(family, "merge")
        mine = self.alignment.counterparts(self.opened.index(model)).get(key, key)
        if chosen != "merge" and (model is self.first or mine in self.first.tensors):
            whose = f"model {chosen}" if chosen.isdecimal() else "--vae"
            return f"the {_WORDS[family]} is taken from {whose}", True
        if mine not in self.first.tensors:
            # Positions are counted from 0 by whoever loads them: some files hold them, and nothing is lost with them.
            return f"not in {self.first.label}", key.endswith("position_ids")
        if mine in self.kept:
            return f"kept from {self.first.label}", False
        if component in _COPIED:
            return f"the {component} is copied from {self.first.label}", True
        return f"{self.first.tensors[mine].spec.dtype} is not averaged: copied from {self.first.label}", True

    def _warn(self) -> None:
        keys = [key for key, _ in self.account.kept if self.first_components[key] not in _TRAINING]
        if keys:
            which = _which(keys, self.first_components)
            self.warnings.append(f"{tensors(len(keys))} kept from {self.first.label} unmerged{which}")
        left = [u for u in self.account.unused if not u.asked]
        components = {model.label: found for model, found in zip(self.opened, self.components, strict=True)}
        for label in dict.fromkeys(u.source for u in left):
            keys = [u.key for u in left if u.source == label]
            which = _which(keys, components.get(label, {}))
            self.warnings.append(f"{tensors(len(keys))} of {label} left out{which}")
        whole = sum(spec.nbytes for spec in self.outputs.values())
        for component in ("ema", "optimizer"):
            keys = [key for key in self.outputs if self.first_components[key] == component]
            if keys:
                share = sum(self.outputs[key].nbytes for key in keys) / max(whole, 1)
                unmerged = f" kept from {self.first.label} unmerged" if self.kept.intersection(keys) else ""
                self.warnings.append(
                    f"{tensors(len(keys), component)}{unmerged}, {share:.0%} of the output; "
                    f"--drop {component} leaves them out"
                )

    def _recipe(self) -> dict[str, Any]:
        s = self.settings
        recipe: dict[str, Any] = {
            "command": "merge",
            "version": __version__,
            "method": s.method.name,
            "parameters": dict(s.parameters),
            "vae": s.vae if self.vae_file is None else "file",  # the last of the inputs
            "text_encoder": s.text_encoder,
            "dtype": s.dtype,
            "drop": list(s.drop),
            "on_mismatch": s.on_mismatch,
        }
        return recipe


def _turning(compute: Compute, turned: Sequence[int]) -> Compute:
    """The same, with these inputs transposed first."""

    def compute_turned(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block) -> None:
        compute([t.T.contiguous() if n in turned else t for n, t in enumerate(inputs)], outputs, block)

    return compute_turned


def _compute(settings: Settings) -> Compute:
    method, parameters = settings.method, settings.parameters

    def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block) -> None:
        method.apply(inputs, outputs[0], parameters)

    return compute
