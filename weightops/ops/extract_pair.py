"""Two checkpoints lined up: the matrices, biases and norms that both have, under a dialect's names; the rest by reason.

From headers alone.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from weightops.errors import MismatchError, UsageError, quote
from weightops.files.dtypes import ARITHMETIC
from weightops.lora.dialects import DIALECTS, Dialect
from weightops.lora.pieces import within
from weightops.lora.units import Target
from weightops.naming.identify import Identity, identify, quantised
from weightops.naming.keymap import ARCHITECTURES, IN, Architecture, Rule, swaps
from weightops.naming.slots import Place, place
from weightops.ops.align import Name
from weightops.ops.report import Account, Unused
from weightops.ops.respell import becomes
from weightops.plan import Input

if TYPE_CHECKING:
    from collections.abc import Set

    from weightops.files.checkpoint import Checkpoint
    from weightops.files.tensor import TensorSpec

# Tables that are looked up in, and multiplied by nothing: no tool applies a LoRA to them.
_LOOKED_UP = ("token_embedding", "position_embedding", "embed_tokens", "shared", "relative_attention_bias")

# Where both are about as large, factors are read by more tools than a whole difference.
_SMALLER = 0.95


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked of an extraction, the ranks apart."""

    dialect: str = "kohya"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    biases: bool = False
    convolutions: bool = True
    dtype: str = "keep"
    seed: int = 0
    clamp_quantile: float | None = None
    strict: bool = False
    allow_nonfinite: bool = False
    said: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Common:
    """A tensor of both models as the dialect names it: one canonical module's, or those that it packs, in order.

    names: of the canonical modules. tuned, base: where each of them is, its rows in the dialect's order. shape: of the
    whole, as the dialect has it.
    """

    component: str
    prefix: str
    module: str
    names: tuple[str, ...]
    tuned: tuple[Place, ...]
    base: tuple[Place, ...]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.prefix + self.module

    @property
    def dtype(self) -> str:
        return self.tuned[0].slot.spec.dtype

    @property
    def is_double(self) -> bool:
        return any(at.slot.spec.dtype == "F64" for at in (*self.tuned, *self.base))

    def written(self, dtype: str) -> str:
        """The dtype of what is written: eight bits would leave little of it."""
        if dtype == "keep" and self.dtype.startswith("F8"):
            return "F16"
        return becomes(self.tuned[0].slot.spec, dtype).dtype

    def inputs(self) -> tuple[Input, ...]:
        return (*(Input(0, at.slot) for at in self.tuned), *(Input(1, at.slot) for at in self.base))


@dataclass(frozen=True, slots=True)
class Matrix(Common):
    """A weight with inputs and outputs."""

    @property
    def out(self) -> int:
        return self.shape[0]

    @property
    def n(self) -> int:
        """Inputs, times the kernel."""
        return math.prod(self.shape[1:])

    @property
    def is_convolution(self) -> bool:
        return any(size > 1 for size in self.shape[2:])


@dataclass(frozen=True, slots=True)
class Vector(Common):
    """A bias, or a norm's weight or bias. part: of an adapter, that its difference is. unsaid: why it cannot be."""

    part: str
    unsaid: str | None


@dataclass(slots=True)
class Pair:
    """Two checkpoints, and what they have in common.

    left: (0 for the finetune and 1 for the base, key) -> why it is left out, and whether that was asked for. equal:
    matrices that do not differ. homes: output key -> its component. left_out: how many vectors differ, and are not
    written.
    """

    opened: Checkpoint
    base: Checkpoint
    identity: Identity
    dialect: Dialect
    wish: Wish
    known: Architecture | None
    matrices: list[Matrix] = field(default_factory=list)
    vectors: list[Vector] = field(default_factory=list)
    equal: list[Matrix] = field(default_factory=list)
    left: dict[tuple[int, str], tuple[str, bool]] = field(default_factory=dict)
    homes: dict[str, str] = field(default_factory=dict)
    left_out: int = 0

    @property
    def architecture(self) -> Architecture:
        assert self.known is not None
        return self.known

    @property
    def has_vectors(self) -> bool:
        """Can the dialect say differences of biases and norms?"""
        return self.dialect.alpha == "tensor"

    def is_whole(self, matrix: Matrix, rank: int) -> bool:
        """Is the difference itself written, for it takes fewer bytes than factors of this rank?"""
        smaller = matrix.out * matrix.n < _SMALLER * rank * (matrix.out + matrix.n)
        return smaller and self.has_vectors  # the others have no differences

    @property
    def said_vectors(self) -> list[Vector]:
        """The biases and norms whose differences are written, as far as is known."""
        return [v for v in self.vectors if v.unsaid is None] if self.wish.biases else []

    def leave(
        self, tuned: Sequence[Place], base: Sequence[Place], reason: str, other: str | None = None, *,
        asked: bool = True, over: bool = False,
    ) -> None:  # fmt: skip
        """Say why these are left out; other: of the base's, where that is another reason.

        What was not asked for goes before what was, and over: before any other.
        """
        for number, places in enumerate((tuned, base)):
            for at in places:
                if over or not asked or (number, at.slot.key) not in self.left:
                    self.left[number, at.slot.key] = (other or reason) if number else reason, asked

    def leave_vector(self, vector: Vector) -> None:
        """A bias or a norm that is not written: nobody asked for it, or the dialect cannot say it."""
        asked = not self.wish.biases or vector.unsaid is None
        self.leave(vector.tuned, vector.base, vector.unsaid or "--biases would take it", asked=asked, over=True)

    def account(self, ranks: Sequence[int] | None = None) -> Account:
        """Each key of both models once: used where something is written of it, else with the reason why not.

        ranks: of the matrices, where these are known.
        """
        account = Account()
        written = [m for n, m in enumerate(self.matrices) if ranks is None or ranks[n]]
        items: list[Common] = [*written, *self.said_vectors]
        reasons = {(n, at.slot.key): ("the rule leaves it no rank", True)
                   for m in self.matrices for n, side in enumerate((m.tuned, m.base)) for at in side}  # fmt: skip
        reasons |= self.left
        for number, opened in enumerate((self.opened, self.base)):
            used = {at.slot.key for item in items for at in (item.base if number else item.tuned)}
            account.used += sorted(used)
            for key in opened.tensors:
                if key not in used:
                    reason, asked = reasons.get((number, key), ("no LoRA changes it", True))
                    account.unused.append(Unused(key, opened.label, reason, asked))
            account.unused.extend(Unused(path, opened.label, why, asked=True) for path, why in opened.left_out)
        return account


def pair(tuned: Checkpoint, base: Checkpoint, wish: Wish) -> Pair:
    """Line up two checkpoints, and name what only one of them has. Raises MismatchError, UsageError."""
    identity, other = _identified(tuned), _identified(base)
    if identity.architecture != other.architecture:
        what = f"is {_called(identity)}, but {base.label} is {_called(other)}"
        raise MismatchError(tuned.label, what, "a LoRA is extracted of a finetune and its base")
    known = next((a for name, a in ARCHITECTURES if name == identity.architecture), None)
    found = Pair(tuned, base, identity, DIALECTS[wish.dialect], wish, known)
    if known is None and wish.dialect not in ("kohya", "comfy"):
        what = f"is of no known model: {wish.dialect} has no names for its modules"
        raise MismatchError(tuned.label, what, "kohya and comfy take the model's own")
    if known is not None:
        _line_up_known(found, other)
    else:
        _line_up_own(found)
    _globs(found)
    if not found.matrices and not found.said_vectors:
        reasons = list(dict.fromkeys(u.reason for u in found.account().unused if u.source == tuned.label))
        what = f"has no matrix in common with {base.label} of which a LoRA could be made"
        raise MismatchError(tuned.label, what, "; ".join(reasons[:3]) or None)
    return found


def _identified(opened: Checkpoint) -> Identity:
    """What it is. Raises MismatchError for what no LoRA is extracted of."""
    if not opened.tensors:
        raise MismatchError(opened.label, "holds no tensors")
    key = quantised(opened.tensors)
    if key is not None:
        what = f"is quantised: {quote(key)} scales weights that mean nothing without it"
        raise MismatchError(opened.label, what, "take the fp16, bf16 or fp32 release instead")
    identity = identify(opened.tensors)
    if identity.kind in ("lora", "vae", "text_encoder", "embedding"):
        kinds = {"lora": "a LoRA", "vae": "a VAE", "text_encoder": "a text encoder", "embedding": "an embedding"}
        what = f"is {kinds[identity.kind]}, expected a checkpoint"
        raise MismatchError(opened.label, what, "TUNED and BASE are two whole models")
    return identity


def _called(identity: Identity) -> str:
    return identity.architecture or f"a {identity.kind} of no known model".replace("a unknown of", "of")


# ------------------------------------------------------------------------------------------------ what both have

Places = Mapping[Name, Place]


class _Named(NamedTuple):
    """A module in the dialect: its name, the rule that it follows, the canonical modules that it packs."""

    prefix: str
    module: str
    rule: Rule
    names: tuple[str, ...]


def _line_up_known(found: Pair, other: Identity) -> None:
    """By canonical names, as the dialect packs them."""
    mine, theirs = _places(found, 0, found.identity), _places(found, 1, other)
    target = Target(found.dialect, found.architecture, found.identity.variant, found.opened.label)
    components = {c.name: c for c in found.architecture.components}

    def named(component: str, module: str) -> _Named | str:
        at = components[component]
        if found.dialect.name == "kohya" and not at.kohya:
            return f"kohya has no names for the {component}"
        spelled = target.table(at).spelled_module(module)
        if spelled is None:
            return f"has no name in {found.dialect.name}'s spelling"
        rule, own, names = spelled
        return _Named(target.prefix(at), own.replace(".", "_") if found.dialect.flat else own, rule, names)

    _line_up(found, mine, theirs, components.keys(), named)


def _places(found: Pair, number: int, identity: Identity) -> Places:
    """Where a model has each canonical tensor, averages apart; what its tables do not place is left with the reason."""
    opened = found.base if number else found.opened
    places: dict[Name, Place] = {}
    for component, part in identity.parts.items():
        if component == "ema":
            continue
        if part.match is None:
            for key in part.bodies if component != "vae" else ():
                found.left[number, key] = f"is of a {component} that no table names", False
            continue
        placing = place(part.match.table, part.bodies, opened.tensors)
        places |= {(component, name): at for name, at in placing.places.items()}
        for key, why in placing.left.items():
            if component != "vae" and not part.match.table.is_extra(part.bodies[key]):
                found.left[number, key] = why, False
    return places


def _line_up_own(found: Pair) -> None:
    """An unknown architecture, by the model's own names."""
    mine, theirs = ({("", key): Place(o.slot(key)) for key in o.tensors} for o in (found.opened, found.base))
    beginning = own_beginning({key.rpartition(".")[0] for _, key in mine if key.endswith((".weight", ".bias"))})
    prefix = "lora_unet_" if found.dialect.flat else "diffusion_model."
    seen: dict[str, str] = {}

    def named(_component: str, module: str) -> _Named:
        body = module.removeprefix(beginning)
        own = body.replace(".", "_") if found.dialect.flat else body
        if seen.setdefault(own, module) != module:
            raise MismatchError(
                found.opened.label, f"{quote(seen[own])} and {quote(module)} would both be called {quote(own)}",
                "--dialect comfy keeps them apart",
            )  # fmt: skip
        return _Named(prefix, own, Rule(body, (body,)), (module,))

    _line_up(found, mine, theirs, {""}, named)


def own_beginning(modules: Set[str]) -> str:
    """What stands before all names of a model, and in no LoRA's."""
    for beginning in ("model.diffusion_model.", "diffusion_model."):
        if modules and all(m.startswith(beginning) for m in modules):
            return beginning
    return ""


def _line_up(
    found: Pair, mine: Places, theirs: Places, components: Set[str], named: Callable[[str, str], _Named | str]
) -> None:
    """Take in each tensor of the finetune, and name those of the base that it lacks."""
    done: set[Name] = set()
    for name, at in mine.items():
        if name in done:
            continue
        component, (module, _, leaf) = name[0], name[1].rpartition(".")
        beside = [theirs[name]] if name in theirs else []
        reason = _why_no_part(name, components, at.spec)
        if reason is not None:
            found.leave([at], beside, reason[0], asked=reason[1])
            continue
        told = named(component, module)
        if isinstance(told, str) and len(at.spec.shape) > 1:
            found.leave([at], beside, told, asked=False)
            continue
        # Biases and norms without a name are compared all the same, so that it is known whether they differ.
        unsaid = told if isinstance(told, str) else None
        own = _Named("", module, Rule(module, (module,)), (module,)) if isinstance(told, str) else told
        names = [(component, f"{n}.{leaf}") for n in own.names]
        done.update(names)
        tuned, base = ([places[n] for n in names if n in places] for places in (mine, theirs))
        weight = mine.get((component, f"{own.names[0]}.weight"))
        if _are_alike(found, own, tuned, base):
            _take(found, component, own, leaf, tuned, base, weight.spec if weight is not None else None, unsaid)
    for name, at in theirs.items():
        if name not in mine:
            reason = _why_no_part(name, components, at.spec) or (f"{found.opened.label} has no such tensor", False)
            found.leave([], [at], reason[0], asked=reason[1])


def _take(
    found: Pair, component: str, own: _Named, leaf: str, tuned: Sequence[Place], base: Sequence[Place],
    weight: TensorSpec | None, unsaid: str | None,
) -> None:  # fmt: skip
    """Take in what both models have. weight: of the module, or of the first that it packs, if there is one."""
    shape = (sum(at.spec.rows for at in tuned), *tuned[0].spec.shape[1:])
    features = weight.shape[1] if weight is not None and len(weight.shape) > 1 else None
    if len(own.names) == 1 and unsaid is None and swaps(own.rule, shape[0], features):
        tuned, base = ([_swapped(at) for at in places] for places in (tuned, base))
    common = (component, own.prefix, own.module, own.names, tuple(tuned), tuple(base), shape)
    if len(shape) == 1:
        is_norm = weight is not None and len(weight.shape) == 1
        part = "diff_b" if not is_norm else "w_norm" if leaf == "weight" else "b_norm"
        found.vectors.append(Vector(*common, part, unsaid or _why_unsaid(found, own.rule)))
        found.leave_vector(found.vectors[-1])
    elif not found.wish.convolutions and any(size > 1 for size in shape[2:]):
        found.leave(tuned, base, "--conv-rank 0")
    else:
        found.matrices.append(Matrix(*common))


def _why_no_part(name: Name, components: Set[str], spec: TensorSpec) -> tuple[str, bool] | None:
    """Why a LoRA has no part for this tensor, if it has none; and whether nobody would expect it to."""
    component, (module, _, leaf) = name[0], name[1].rpartition(".")
    if component not in components or component == "vae":
        return f"no LoRA changes the {component}", True
    if not module or leaf not in ("weight", "bias") or not spec.shape or (leaf == "bias" and len(spec.shape) > 1):
        return "is no matrix, bias or norm of a module", True
    if module.rpartition(".")[2] in _LOOKED_UP:
        return "is a table of embeddings, which no LoRA changes", True
    if not spec.values:
        return "is empty", True
    return None if spec.dtype in ARITHMETIC else (f"is {spec.dtype}", False)


def _are_alike(found: Pair, told: _Named, mine: Sequence[Place], theirs: Sequence[Place]) -> bool:
    """Have both models all of a module's tensors, in one shape each? Otherwise they are left, with the reason."""
    names = (found.opened.label, found.base.label)
    other: str | None
    packs = f"{told.module} packs {len(told.names)} tensors"
    other = None
    if len(mine) < len(told.names):
        reason = f"{packs}, of which {len(mine)} are there"
        other = f"{packs}, of which {names[0]} has {len(mine)}"
    elif not theirs:
        reason = f"{names[1]} has no such tensor"
    elif len(theirs) < len(told.names):
        reason = f"{packs}, of which {names[1]} has {len(theirs)}"
        other = f"{packs}, of which {len(theirs)} are there"
    elif any(a.spec.shape != b.spec.shape for a, b in zip(mine, theirs, strict=True)):
        shapes = [f"is {list(at.spec.shape)}" for at in (mine[0], theirs[0])]
        reason, other = (f"{shapes[n]}, and {shapes[1 - n].removeprefix('is ')} in {names[1 - n]}" for n in (0, 1))
    elif len({at.spec.shape[1:] for at in mine}) > 1 or len({at.spec.dtype for at in mine}) > 1:
        reason = f"{told.module} packs tensors of several widths or dtypes"
    elif odd := {at.spec.dtype for at in (*mine, *theirs)} - ARITHMETIC:
        reason = f"is {' or '.join(sorted(odd))} in one of the two"
    elif told.rule.swapped and mine[0].spec.rows % 2:
        reason = f"its {mine[0].spec.rows} rows have no halves to trade places"
    else:
        return True
    found.leave(mine, theirs, reason, other, asked=False)
    return False


def _why_unsaid(found: Pair, rule: Rule) -> str | None:
    """Why the dialect cannot say a bias's difference, if it cannot."""
    if not found.has_vectors:
        return f"{found.dialect.name} has no differences of biases and norms"
    if rule.swapped_when is not None or IN in rule.heights:
        return "which of its rows are whose its weight would tell, and no bias does"
    return None


def _swapped(at: Place) -> Place:
    """The same rows, the second half first."""
    rows = at.slot.spec.rows
    bands = within(at.slot.bands, ((rows // 2, rows), (0, rows // 2)))
    return replace(at, slot=replace(at.slot, bands=bands))


# ------------------------------------------------------------------------------------------------ what was asked for


def _globs(found: Pair) -> None:
    """Keep what --include names, less what --exclude names. Raises UsageError for a glob that names nothing."""
    items: list[Common] = [*found.matrices, *found.vectors]
    for option, globs in (("--include", found.wish.include), ("--exclude", found.wish.exclude)):
        for glob in globs:
            if not any(_is_named(glob, item) for item in items):
                hint = f"names are such as {items[0].name}" if items else None
                raise UsageError(option, f"{quote(glob)} is the name of no module", hint)

    def keeps(item: Common) -> bool:
        included = not found.wish.include or any(_is_named(g, item) for g in found.wish.include)
        return included and not any(_is_named(g, item) for g in found.wish.exclude)

    for item in items:
        if not keeps(item):
            found.leave(item.tuned, item.base, "--include and --exclude leave it out", over=True)
    found.matrices = [m for m in found.matrices if keeps(m)]
    found.vectors = [v for v in found.vectors if keeps(v)]


def _is_named(glob: str, item: Common) -> bool:
    """A glob may be over the adapter's own name, or over the canonical one with its component before it."""
    qualified = (f"{item.component}.{n}" if item.component else n for n in item.names)
    return any(fnmatch.fnmatchcase(n, glob) for n in (item.name, *item.names, *qualified))
