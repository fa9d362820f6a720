"""The plan of a merge: what becomes of each key of each model. From headers alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from weightops.errors import MismatchError, UsageError, listing, quote
from weightops.files.dtypes import ARITHMETIC, DTYPE_WORDS
from weightops.files.tensor import Slot, TensorSpec
from weightops.merging.recipe import (
    Lora,
    Model,
    Recipe,
    Varied,
    bases_of,
    leaves,
    merges,
    models_of,
    references_of,
)
from weightops.naming.blocks import parse_blocks
from weightops.naming.identify import (
    body_of,
    family_of,
    identify,
)
from weightops.ops.align import Alignment, Spot, same_cut
from weightops.ops.fuse_plan import changes_of
from weightops.ops.merge_checks import check_models, differing_markers
from weightops.ops.merge_tasks import Compiler, Piece
from weightops.ops.merge_words import in_words, said
from weightops.ops.produce import Planned, cast, kept_metadata
from weightops.ops.report import Account, Unused, tensors
from weightops.plan import Grain, Input, Plan, Task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from weightops.files.checkpoint import Checkpoint
    from weightops.naming.slots import Place
    from weightops.ops.align import Name
    from weightops.plan import Block


# How the first model was merged, in other tools' words: of the result it would be untrue.
ANCESTRY = frozenset({"sd_merge_recipe", "sd_merge_models", "modelspec.merged_from"})

# Of a model's rows and columns: in which order they are to be taken.
Orders = Mapping[Model, Mapping["Name", tuple[tuple[int, Any], ...]]]


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of a merge beside its recipe, and what passes before this one found: see `Compiler`."""

    strict: bool = False
    allow_nonfinite: bool = False
    orders: Orders = field(default_factory=dict)
    known: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------ the plan


@dataclass(slots=True)
class MergePlan:
    """What was planned, and what plans of earlier passes need: the pieces, by label, and how they are compiled."""

    planned: Planned
    pieces: list[Piece]
    compiler: Compiler


def plan_merge(recipe: Recipe, opened: Mapping[str, Checkpoint], wish: Wish) -> MergePlan:
    """The plan of a recipe over these files, by what they are called in it, from headers alone."""
    return _Planner(recipe, opened, wish).plan()


def averaged(opened: Checkpoint) -> Checkpoint:
    """The checkpoint with the averages that training kept (model_ema.*) in place of the weights.

    Source: CompVis' latent-diffusion, whose LitEma names an average as its weight, less the dots.
    """
    found = {}
    for key, info in opened.tensors.items():
        at = "model_ema." + key.removeprefix("model.").replace(".", "")
        if key.startswith("model.diffusion_model.") and at in opened.tensors:
            found[key] = opened.tensors[at]
        elif not key.startswith("model_ema."):
            found[key] = info
    if found.keys() == opened.tensors.keys():
        raise MismatchError(opened.label, "holds no averaged weights (model_ema.*)", "merge it without --ema")
    return replace(opened, tensors=found)


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

    def __init__(self, recipe: Recipe, opened: Mapping[str, Checkpoint], wish: Wish) -> None:
        in_tree = [leaf for leaf in leaves(recipe.root) if isinstance(leaf, Model)]
        if not _is_number(recipe.vae) and Model(recipe.vae) in in_tree:  # a model of the tree: not read as another file
            recipe = replace(recipe, numbered=(*recipe.numbered, Model(recipe.vae)), vae=f"{len(recipe.numbered) + 1}")
        self.recipe = recipe
        self.wish = wish
        self.files = opened
        self.leaves: list[Model] = list(dict.fromkeys([*in_tree, recipe.like]))
        self.opened = [averaged(opened[m.file]) if m.ema else opened[m.file] for m in self.leaves]
        self.numbered = [self.opened[self.leaves.index(m)] for m in recipe.numbered]
        self.first = self.opened[self.leaves.index(recipe.like)]
        if recipe.like.to is not None:
            what = "its channels are to be reordered, but what is not merged is kept from it as it is"
            raise UsageError(self.first.label, what, "match the other models to it")
        self.vae_file = None if _is_number(recipe.vae) else opened[recipe.vae]
        self.loras = list(dict.fromkeys(leaf for leaf in leaves(recipe.root) if isinstance(leaf, Lora)))
        references = references_of(recipe)
        start = len(self.opened) + (self.vae_file is not None)
        self.references = {model: start + n for n, model in enumerate(references)}
        statistics = [file for node in merges(recipe.root) for file in node.statistics]
        self.statistics = list(dict.fromkeys(statistics))
        if statistics and any(leaf.to is not None for leaf in self.leaves):
            what = "statistics are in the order of the channels that their models have"
            raise UsageError("--rebasin", what, "merge without, or with another method")
        self.sources: list[Checkpoint] = [
            *self.opened,
            *([self.vae_file] if self.vae_file is not None else []),
            *(opened[model.file] for model in references),
            *(opened[lora.file] for lora in self.loras),
            *(opened[file] for file in self.statistics),
        ]
        self.identities = [identify(c.tensors) for c in self.opened]
        self.components = [i.components for i in self.identities]
        self.identity = self.identities[self.opened.index(self.first)]
        self.alignment = Alignment(self.first, self.identity)
        for number, (model, identity) in enumerate(zip(self.opened, self.identities, strict=True)):
            self.alignment.add(number, model, identity)
        self.first_components = self.components[self.opened.index(self.first)]
        self.account = Account()
        self.warnings: list[str] = []
        self.outputs: dict[str, TensorSpec] = {}
        self.copies: list[Task] = []
        self.merges: list[Task] = []
        self.pieces: list[Piece] = []
        self.counts: dict[str, dict[str, int]] = {}
        self.without: dict[str, set[str]] = {}  # by file of statistics: tensors of which it has none
        self.by_key = False  # of a model of which nothing is known, tensors are what its keys say
        self.kept: set[str] = set()
        self.gone: set[tuple[int, str]] = set()  # of `account.unused`, by number of the model: labels may repeat
        # A file that is only a VAE, or only a text encoder, is simply merged.
        alone = len(set(self.first_components.values()) - _TRAINING) == 1
        self.chosen = {} if alone else {"vae": recipe.vae}
        if recipe.text_encoder != "merge":
            self.chosen["text_encoder"] = recipe.text_encoder
        self._varied: dict[Varied, dict[Name, float]] = {}
        methods = [node.method for node in merges(recipe.root)]
        # Where a tensor that packs several is one thing, and where it is several.
        self.apart = any(m.looks or m.grain is not Grain.VALUES for m in methods) or bool(self.loras or wish.orders)
        self.apart = self.apart or any(_varies(v) for node in merges(recipe.root) for v in node.parameters.values())

    def plan(self) -> MergePlan:
        check_models(self.opened, self.identities, self.alignment)
        bases = bases_of(self.recipe.root)
        mixed = [m for m in models_of(self.recipe.root) if m not in bases and m != self.recipe.like]
        for text in differing_markers([self.first, *(self.opened[self.leaves.index(m)] for m in mixed)]):
            if self.wish.strict:
                raise MismatchError("--strict", text)
            self.warnings.append(text)
        self._check_chosen()
        changes = None
        if self.loras:
            changes = changes_of(self.first, self.identity, [self.files[lora.file] for lora in self.loras])
        beside = len(self.opened) + (self.vae_file is not None) + len(self.references)
        self.compiler = Compiler(
            self.recipe.root, self.recipe.seed, self._setting, changes,
            {lora: (n, beside + n) for n, lora in enumerate(self.loras)}, self.wish.orders, self.wish.known,
        )  # fmt: skip
        self.by_key = changes is not None and changes.by_key
        replaced = self._vae_from_file() if self.vae_file is not None else {}
        self._vary(replaced)
        for key in sorted(self.first.tensors, key=lambda k: self.first.tensors[k][1:3]):
            self._place(key, replaced)
        self._account_for_the_rest()
        self._account_for_loras(beside)
        self._account_for_statistics()
        self._check_outcome()
        self._warn()
        if self.wish.strict:
            self.account.refuse_surprises()
        plan = Plan(
            sources=tuple(self.sources),
            outputs=self.outputs,
            tasks=(*self.copies, *self.merges),  # copies first: they need no torch, which is imported meanwhile
            metadata=kept_metadata(self.first, less=ANCESTRY),
            recipe=said(self.recipe, self._numbers(), self.leaves, self.references),
            refuse_nonfinite=not self.wish.allow_nonfinite,
        )
        groups = [{"component": name, **count} for name, count in self.counts.items()]
        words = in_words(self.recipe, self.files)
        return MergePlan(Planned(plan, self.account, words, groups, self.warnings), self.pieces, self.compiler)

    # -------------------------------------------------------------- settings that vary

    def _vary(self, replaced: Mapping[str, Any]) -> None:
        """The numbers of every setting that varies, for the canonical tensors that are merged."""
        varied = [v for node in merges(self.recipe.root) for p in node.parameters.values() for v in _varied_in(p)]
        if not varied:
            return
        names: dict[Name, Any] = {}
        for key, component in self.first_components.items():
            family = family_of(component)
            merged = self.chosen.get(family, "merge") == "merge" and family not in self.recipe.drop
            if not merged or key in replaced or self.first.tensors[key].spec.dtype not in ARITHMETIC:
                continue
            match = self.identity.parts[component].match if component in self.identity.parts else None
            for name in self._names(key):
                names[name] = None if match is None else match.network
        for each in varied:
            self._varied[each] = parse_blocks(each.spec, where=each.where).values(names)

    def _setting(self, varied: Varied, name: Name) -> Any:
        found = self._varied[varied].get(name)
        return varied.otherwise if found is None else 1.0 - found if varied.complement else found

    def _names(self, key: str) -> list[Name]:
        """The canonical tensors that a key of the first model holds; where these are unknown, its own name."""
        return [name for name, _ in self.alignment.names(key)] or [(self.first_components[key], body_of(key))]

    # -------------------------------------------------------------- one key

    def _place(self, key: str, replaced: Mapping[str, tuple[Spot, ...]]) -> None:
        """Decide what becomes of a key of the first model."""
        component = self.first_components[key]
        count = self.counts.setdefault(component, {"tensors": 0, "merged": 0, "copied": 0, "dropped": 0})
        count["tensors"] += 1
        family = family_of(component)
        if family in self.recipe.drop:
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
        self._add(key, source, spots)
        self.account.copied.append(key)
        count["copied"] += 1

    def _copy_chosen(self, key: str, number: int, family: str, count: dict[str, int]) -> None:
        source = self.numbered[number]
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
            self._keep(key, f"not in {', '.join(dict.fromkeys(lacking))}", count)
            return
        parts = [(c, spots) for c, spots in found if spots is not None]
        for other, spots in parts:
            if self._fits(key, spec, spots) and all(s.slot.spec.dtype in ARITHMETIC for s in spots):
                continue
            if self.recipe.on_mismatch == "keep-first":
                self._keep(key, self._differs(other, spots, spec), count)
                return
            raise MismatchError(
                other.label,
                f"tensor {quote(spots[0].slot.key)} is {spots[0].slot.spec}, but {spec} in {self.first.label}",
                "--on-mismatch keep-first takes such tensors from the first model",
            )
        before = len(self.merges)
        self._add_merged(key, spec, parts)
        merged = len(self.merges) > before
        (self.account.used if merged else self.account.copied).append(key)
        count["merged" if merged else "copied"] += 1

    def _add_merged(self, key: str, spec: TensorSpec, parts: list[tuple[Checkpoint, tuple[Spot, ...]]]) -> None:
        """The tasks that fill the output tensor `key` by the recipe: of it as a whole, or of each of its bands."""
        names = [] if self.by_key else self.alignment.names(key)
        simple = all(self._is_whole(key, spec, source, spots) for source, spots in parts)
        dtype = self._dtype(spec.dtype)
        self.outputs[key] = TensorSpec(dtype, spec.shape)
        # Where rows, columns or the whole of a tensor count, they are those of the canonical one.
        otherwise = len(names) > 1 or any(
            at.transposed or at.slot.bands is not None or at.slot.spec.shape != spec.shape for _, at in names
        )
        if simple and not (self.apart and otherwise):
            place = names[0][1] if len(names) == 1 else None
            own = [(c, spots[0]) for c, spots in parts]
            self._add_piece(key, self._names(key)[0], Slot(key, self.outputs[key]), own, place)
            return
        pieces = self.alignment.pieces(key)
        cut = [(c, same_cut(spots, pieces)) for c, spots in parts]
        for number, ((name, place), piece) in enumerate(zip(names, pieces, strict=True)):
            slot = Slot(key, TensorSpec(dtype, piece.spec.shape), piece.bands)
            self._add_piece(f"{key} ({name[1]})" if len(names) > 1 else key, name, slot,
                            [(c, spots[number]) for c, spots in cut], place)  # fmt: skip

    def _add_piece(
        self, label: str, name: Name, slot: Slot, spots: list[tuple[Checkpoint, Spot]], place: Place | None
    ) -> None:
        found = {leaf: (n, spot) for n, (leaf, (_, spot)) in enumerate(zip(self.leaves, spots, strict=True))}
        turned = self.apart and place is not None and place.transposed
        piece = Piece(label, name, slot, found, place, self._statistics, turned)
        model = self.compiler.alone(piece)
        if model is not None:
            source, spot = found[model]
            self._add_task(slot.key, [(self.opened[source], spot)], slot)
            return
        self.pieces.append(piece)
        self.merges.extend(self.compiler.tasks(piece))

    def _statistics(self, file: str, slot: Slot, model: int, by_value: bool) -> tuple[int, Slot] | None:
        """Where a file has the statistics of what a model has in this slot: under the model's own key.

        by_value: they are numbers for each value, of which the slot's bands are taken; else they are of its inputs.
        """
        held = self.files[file].tensors.get(slot.key)
        shape, stored = slot.spec.shape, self.opened[model].tensors[slot.key].spec.shape
        if held is None or held.spec.dtype not in ARITHMETIC:
            if by_value or len(shape) > 1:
                self.without.setdefault(file, set()).add(slot.key)
            return None
        inner = math.prod(shape[1:])
        fits = held.spec.shape == stored if by_value else len(shape) > 1 and held.spec.shape == (inner, inner)
        if not fits:
            expected = stored if by_value else (inner, inner)
            what = f"the statistics of {quote(slot.key)} are {held.spec}, expected {list(expected)}"
            raise MismatchError(self.files[file].label, what)
        source = len(self.sources) - len(self.statistics) + self.statistics.index(file)
        if not by_value:
            return source, Slot(slot.key, held.spec)
        return source, Slot(slot.key, TensorSpec(held.spec.dtype, shape), slot.bands)

    def _dtype(self, dtype: str) -> str:
        return DTYPE_WORDS[self.recipe.dtype] if self.recipe.dtype != "keep" and dtype in ARITHMETIC else dtype

    def _keep(self, key: str, reason: str, count: dict[str, int]) -> None:
        self._add(key, self.first, self._whole(key))
        self.account.kept.append((key, reason))
        self.kept.add(key)
        count["copied"] += 1

    def _add(self, key: str, source: Checkpoint, spots: tuple[Spot, ...]) -> None:
        """The tasks that copy these into the output tensor `key`: one, or one for each band."""
        first = self.first.tensors[key].spec
        simple = self._is_whole(key, first, source, spots)
        dtype = self._dtype(spots[0].slot.spec.dtype)
        self.outputs[key] = TensorSpec(dtype, spots[0].shape if simple else first.shape)
        if simple:
            self._add_task(key, [(source, spots[0])], Slot(key, self.outputs[key]))
            return
        pieces = self.alignment.pieces(key)
        for piece, spot in zip(pieces, same_cut(spots, pieces), strict=True):
            self._add_task(key, [(source, spot)], Slot(key, TensorSpec(dtype, piece.spec.shape), piece.bands))

    def _is_whole(self, key: str, first: TensorSpec, source: Checkpoint, spots: tuple[Spot, ...]) -> bool:
        """Is it one tensor, all of it, as it stands?"""
        if spots[0].slot.key == key and spots[0].slot.bands is None:
            return True
        spot = spots[0]
        if len(spots) > 1 or spot.transposed or any(p.bands is not None for p in self.alignment.pieces(key)):
            return False
        return spot.slot.bands is None and source.tensors[spot.slot.key].spec.shape == first.shape

    def _add_task(self, key: str, parts: list[tuple[Checkpoint, Spot]], slot: Slot) -> None:
        """A copy, in another dtype where it must be."""
        ((source, spot),) = parts
        given = Input(next(n for n, s in enumerate(self.sources) if s is source), spot.slot)
        if spot.transposed:
            work = 2 * 8 * slot.spec.values
            self.copies.append(Task(key, (given,), (slot,), _cast_turned, Grain.TENSOR, work))
        elif slot.spec.dtype == spot.slot.spec.dtype:
            self.copies.append(Task(key, (given,), (slot,)))
        else:
            whole = slot.bands is None and spot.slot.bands is None
            inputs = Input(given.source, Slot(spot.slot.key, spot.slot.spec.flat())) if whole else given
            self.copies.append(Task(key, (inputs,), (Slot(key, slot.spec.flat()) if whole else slot,), cast))

    def _leave(self, number: int, key: str, reason: str, *, asked: bool) -> None:
        """Key of model number `number` (of `opened`) is not used, and why."""
        self.gone.add((number, key))
        self.account.unused.append(Unused(key, self.opened[number].label, reason, asked))

    # -------------------------------------------------------------- the models as wholes

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
        given = {i.source for t in (*self.copies, *self.merges) for i in t.inputs}
        if given - {self.opened.index(self.first)} or any(leaf.ema for leaf in self.leaves) or len(self.sources) == 1:
            return
        other = next((c for c in reversed(self.opened) if c is not self.first), self.first)
        reasons = sorted({u.reason for u in self.account.unused if u.source == other.label})
        raise MismatchError(
            other.label,
            f"nothing of it can be merged into {self.first.label}: the result would be a copy",
            "; ".join(reasons[:3]) or None,
        )

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
        if family in self.recipe.drop:
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
        if self.first.tensors[mine].spec.dtype in ARITHMETIC:
            return "its weight is 0 there", True
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

    def _account_for_loras(self, beside: int) -> None:
        """Keys of LoRAs: used, or why not; what they would change may be kept, or taken from elsewhere, after all."""
        changes = self.compiler.changes
        if changes is None:
            return
        read = {(i.source, i.slot.key) for t in self.merges for i in t.inputs}
        self.account.unused.extend(changes.account.unused)
        self.warnings.extend(changes.warnings)
        gone = {(u.source, u.key) for u in changes.account.unused}
        for number, lora in enumerate(self.loras):
            label = self.files[lora.file].label
            for adapter in changes.taken[number]:
                keys = [key for key in adapter.keys.values() if (label, key) not in gone]
                if any((beside + number, key) in read for key in keys):
                    self.account.used.extend(keys)
                    continue
                reason = "what it would change is kept or taken from elsewhere, or its strength is 0 there"
                self.account.unused.extend(Unused(key, label, reason, asked=False) for key in keys)

    def _account_for_statistics(self) -> None:
        """Keys of files of statistics, and tensors of which these have none."""
        beside = len(self.sources) - len(self.statistics)
        read = {(i.source, i.slot.key) for t in self.merges for i in t.inputs}
        for number, file in enumerate(self.statistics):
            opened = self.files[file]
            for key in opened.tensors:
                if (beside + number, key) in read:
                    self.account.used.append(key)
                else:
                    reason = "no tensor that is merged takes these statistics"
                    self.account.unused.append(Unused(key, opened.label, reason, asked=False))
            lacking = self.without.get(file)
            if lacking:
                text = f"{opened.label} has no statistics of {tensors(len(lacking))}: {listing(sorted(lacking))}"
                if self.wish.strict:
                    raise MismatchError("--strict", text, "without --strict these are averaged by weight")
                self.warnings.append(f"{text}; averaged by weight")

    def _numbers(self) -> dict[str, int]:
        """Of all files but the models of the tree, in which place among the inputs each is."""
        found = {leaf.file: n for n, leaf in enumerate(self.leaves) if leaf == Model(leaf.file)}
        if self.vae_file is not None:
            found[self.recipe.vae] = len(self.opened)
        beside = len(self.opened) + (self.vae_file is not None) + len(self.references)
        others = [lora.file for lora in self.loras] + self.statistics
        return {**{file: beside + n for n, file in enumerate(others)}, **found}


def _cast_turned(inputs: Sequence[Tensor], outputs: Sequence[Tensor], block: Block) -> None:
    """The compute function of a copy of what is stored transposed."""
    cast([inputs[0].T], outputs, block)


def _is_number(word: str) -> bool:
    return word == "merge" or word.isdecimal()


def _varies(value: Any) -> bool:
    return bool(_varied_in(value))


def _varied_in(value: Any) -> list[Varied]:
    if isinstance(value, Varied):
        return [value]
    return [v for v in value if isinstance(v, Varied)] if isinstance(value, tuple) else []
