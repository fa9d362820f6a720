"""Names as tables: how each spelling of a network calls each of its tensors. Pure strings and shapes.

A name is looked up, never taken apart by guess: a table's templates hold `{}` where a number stands, and a key is
found by its words and the numbers that the template fixes. kohya's underscored names are looked up in the same
templates with their dots written as underscores, built forward from the table. Source: FORMATS §0.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from weightops.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from weightops.naming.permutations import Group

# The parameters of a module, where a rule does not say otherwise.
LEAVES = ("weight", "bias")

# Heights of the bands of a packed tensor: an equal share of what is left; the module's number of input features.
EQUAL = "="
IN = "in"


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of a table: `key` in this spelling is `names` in the canonical one (diffusers' names).

    Both are templates of a module, whose `.weight` and `.bias` follow; `exact`: of a whole tensor instead.
    Several names: the tensor packs theirs, in this order, along axis 0, in bands of these `heights`.
    swapped: its two halves along axis 0 stand the other way round. swapped_when: they do, but only where the
    module has this many times as many outputs as inputs (see `swaps`). squared: a weight [C, C, 1, 1] here,
    [C, C] there. transposed: [a, b] here, [b, a] there. Of several keys for one name the first is written.
    """

    key: str
    names: tuple[str, ...]
    heights: tuple[str, ...] = ()
    swapped: bool = False
    squared: bool = False
    transposed: bool = False
    exact: bool = False
    swapped_when: int | None = None


def same(*keys: str) -> tuple[Rule, ...]:
    """Modules that bear their canonical names."""
    return tuple(Rule(key, (key,)) for key in keys)


def move(key: str, name: str) -> Rule:
    """A module of another name."""
    return Rule(key, (name,))


def tensor(key: str, name: str | None = None) -> Rule:
    """One tensor, given by its whole name."""
    return Rule(key, (name or key,), exact=True)


def pack(key: str, *names: str, heights: tuple[str, ...] = ()) -> Rule:
    """A module that packs several along its outputs; equal heights unless told."""
    return Rule(key, names, heights or (EQUAL,) * len(names))


def swap(key: str, name: str, *, when: int | None = None) -> Rule:
    """A module whose outputs' halves, shift and scale, stand the other way round: always, or `when` (see Rule)."""
    return Rule(key, (name,), swapped=when is None, swapped_when=when)


def under(key: str, name: str, rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """A block: its rules, below these two prefixes."""
    return tuple(
        Rule(f"{key}.{r.key}", tuple(f"{name}.{n}" for n in r.names), r.heights, r.swapped, r.squared,
             r.transposed, r.exact, r.swapped_when)
        for r in rules
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Spelling:
    """A scheme of tensor names: original (the authors'), comfy, diffusers, transformers, …

    `extras`: whole keys that files in this spelling may hold beside the weights, and that mean nothing to others.
    """

    name: str
    rules: tuple[Rule, ...]
    extras: tuple[str, ...] = ()


class Sizes(dict[str, tuple[int | None, ...]]):
    """The shapes of tensors, None for any size of an axis, by templates of their names."""

    @functools.cached_property
    def _templates(self) -> _Lookup[tuple[int | None, ...]]:
        return _Lookup(".", self.items())

    def row(self, name: str) -> tuple[int | None, ...] | None:
        """The shape that a tensor of this name should have, None where nothing is said of it."""
        found = self._templates.match(name) if self else None
        return None if found is None else found[0]


@dataclass(frozen=True, slots=True)
class Variant:
    """One released size of a network: shapes of some canonical tensors (None: any), and how many of a block.

    The counts' templates have one `{}`: {"transformer_blocks.{}": 19}. `has` and `lacks`: canonical tensors by which
    a checkpoint, but not a LoRA for it, tells this variant from others of the same sizes.
    """

    name: str
    shapes: Mapping[str, tuple[int | None, ...]]
    counts: Mapping[str, int] = field(default_factory=dict)
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", Sizes(self.shapes))


@dataclass(frozen=True, slots=True)
class Dim:
    """A number of a configuration: axis `axis` of a canonical tensor's shape over `divide`, or its square root."""

    name: str
    axis: int
    divide: int = 1
    root: bool = False


@dataclass(frozen=True, slots=True)
class Count:
    """A number of a configuration: how many blocks there are of this template, which has one `{}` at its end."""

    template: str


@dataclass(frozen=True, slots=True)
class Has:
    """A switch of a configuration: `yes` where there is this canonical tensor, and otherwise `no`."""

    name: str
    yes: Any = True
    no: Any = False


@dataclass(frozen=True, slots=True)
class Which:
    """A list of a configuration: the numbers of the blocks that have this tensor (a template with one `{}`)."""

    template: str


@dataclass(frozen=True, slots=True)
class Config:
    """config.json of the class of diffusers or transformers that loads a network.

    values: what the file says; a Dim, a Count, a Has or a Which, also within a list, stands for what the shapes say.
    """

    class_name: str
    values: Mapping[str, Any]
    library: str = "diffusers"


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What makes a folder of components a pipeline that diffusers loads: model_index.json and what it names.

    classes: folder -> (library, class), of every entry of model_index.json. scheduler: scheduler_config.json.
    tokenizers: folder -> hub repositories, with the subfolder, that hold such a tokenizer ("owner/name/tokenizer").
    settings: further entries of model_index.json.
    """

    class_name: str
    classes: Mapping[str, tuple[str | None, str | None]]
    scheduler: Mapping[str, Any]
    tokenizers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Network:
    """One neural network: its names in each spelling, its variants, its blocks.

    role: unet, transformer, vae or text_encoder. The first spelling is the one that others are compared with:
    its canonical names, as they are, are the spelling `diffusers` (or `canonical`). `needs`: shapes (None: any)
    that canonical tensors have at any size, where another network has the same names. `blocks`: (name, prefixes
    of canonical names), in order, for block weights. `config`: how diffusers' config.json follows from shapes.
    `has`: canonical tensors of which one must be there, where another network has all the other names.
    `adapter_spellings`: in which adapters alone are written. `permutations`: channels that may trade places.
    """

    name: str
    role: str
    spellings: tuple[Spelling, ...]
    variants: tuple[Variant, ...] = ()
    needs: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    blocks: tuple[tuple[str, tuple[str, ...]], ...] = ()
    config: Config | None = None
    canonical: str = "diffusers"
    has: tuple[str, ...] = ()
    adapter_spellings: tuple[Spelling, ...] = ()
    permutations: tuple[Group, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", Sizes(self.needs))

    def tables(self) -> Mapping[str, Table]:
        """Every spelling, compiled, the canonical one included."""
        return _tables(self.name)

    def adapter_tables(self) -> Mapping[str, Table]:
        """Those, and the spellings of adapters alone."""
        return _adapter_tables(self.name)


@dataclass(frozen=True, slots=True)
class Component:
    """A part of an architecture: which network it is, and what stands before its names in which kind of file.

    name: diffusers' folder (unet, transformer, vae, text_encoder, …). prefix: in a single file, whose names are
    in `spelling`. comfy: the same in ComfyUI's bundles, in `comfy_spelling`. kohya: how names of LoRA modules
    begin, after which comes the flattened name in `kohya_spelling`. variant: the network's, where it must be one.
    omits: canonical names, or beginnings of them, that diffusers' class has no place for. config: constants of
    config.json that this architecture has in place of the network's own.
    """

    name: str
    network: str
    prefix: str
    spelling: str = "original"
    comfy: str = ""
    comfy_spelling: str = ""
    kohya: str = ""
    kohya_spelling: str = ""
    variant: str | None = None
    omits: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model as its users know it. `components[0]` is the diffusion model, which the architecture is known by.

    pipeline: diffusers' model_index.json and schedulers, where a single file can carry the whole pipeline. hints: how
    what trainers write of a LoRA's base model begins; it is asked only where names and shapes leave a choice.
    """

    name: str
    title: str
    components: tuple[Component, ...]
    pipeline: Pipeline | None = None
    hints: tuple[str, ...] = ()


NETWORKS: Registry[Network] = Registry("network", "weightops.naming.architectures")
ARCHITECTURES: Registry[Architecture] = Registry("architecture", "weightops.naming.architectures")


def register(*members: Network | Architecture) -> None:
    """Make networks and architectures known; called by each file of `architectures/`."""
    for member in members:
        if isinstance(member, Network):
            NETWORKS.register(member.name, member)
        else:
            ARCHITECTURES.register(member.name, member)


# ------------------------------------------------------------------------------------------------ looking up


class Claim(NamedTuple):
    """A key, found in a table: its rule, its canonical names, and its leaf ("" for an exact rule).

    `suffix` is what a quantiser hung on it (".scale_weight"), "" for a plain parameter.
    """

    rule: Rule
    names: tuple[str, ...]
    leaf: str
    suffix: str = ""


# What quantisers hang on a module beside its weight. Source: ComfyUI (scaled fp8), bitsandbytes.
_SIDECARS = re.compile(
    r"\.(scale_weight|scale_input|weight_scale(_2)?|input_scale|comfy_quant|weight\.(absmax|quant_map|nested_absmax"
    r"|nested_quant_map|quant_state\..+)|SCB)$"
)


# A number is a whole word: 007 is none that any file writes, and ² is none at all. In a template {} is one as well.
_NUMBERS = {
    ".": re.compile(r"(?<![^.])(0|[1-9][0-9]*)(?![^.])"),
    "_": re.compile(r"(?<![^_])(0|[1-9][0-9]*)(?![^_])"),
}
_PLACES = {
    ".": re.compile(r"(?<![^.])(0|[1-9][0-9]*|\{\})(?![^.])"),
    "_": re.compile(r"(?<![^_])(0|[1-9][0-9]*|\{\})(?![^_])"),
}
_DIGITS = re.compile(r"[0-9]+")

T = TypeVar("T")


class Table:
    """One spelling of a network, compiled: key -> Claim, canonical name -> key."""

    def __init__(self, network: str, spelling: str, rules: Sequence[Rule], extras: Sequence[str] = ()) -> None:
        self.network = network
        self.spelling = spelling
        self.rules = tuple(rules)
        self._extras = frozenset(extras)
        self._squashed: dict[str, list[tuple[re.Pattern[str], Rule, str]]] | None = None
        _refuse_twins(f"{network}, {spelling}", (r.key for r in self.rules if not r.exact))
        _refuse_twins(f"{network}, {spelling}", (r.key for r in self.rules if r.exact))
        _refuse_twins(f"{network}, {spelling}, flattened", (key for key, _ in self._flattened(exact=False)))
        _refuse_twins(f"{network}, {spelling}, flattened", (key for key, _ in self._flattened(exact=True)))

    def _flattened(self, *, exact: bool) -> Iterator[tuple[str, Rule]]:
        """kohya's names of modules; of whole tensors those of a weight, as the norm that LoRA files mean."""
        for rule in self.rules:
            if rule.exact is exact and (not exact or rule.key.endswith(".weight")):
                yield (rule.key.removesuffix(".weight") if exact else rule.key).replace(".", "_"), rule

    # Compiled when first asked for: most tables are looked at once, to see that a file is not theirs.

    @functools.cached_property
    def heads(self) -> frozenset[str]:
        """The first words of all that this table knows; "{}" where that may be a number."""
        return frozenset(key.partition(".")[0] for key in (*(r.key for r in self.rules), *self._extras))

    @functools.cached_property
    def flat_heads(self) -> frozenset[str]:
        return frozenset(r.key.replace(".", "_").partition("_")[0] for r in self.rules)

    @functools.cached_property
    def _modules(self) -> _Lookup[Rule]:
        return _Lookup(".", ((rule.key, rule) for rule in self.rules if not rule.exact))

    @functools.cached_property
    def _tensors(self) -> _Lookup[Rule]:
        return _Lookup(".", ((rule.key, rule) for rule in self.rules if rule.exact))

    @functools.cached_property
    def _tensor_leaves(self) -> frozenset[str]:
        return frozenset(rule.key.rpartition(".")[2] for rule in self.rules if rule.exact)

    @functools.cached_property
    def _flat_modules(self) -> _Lookup[Rule]:
        return _Lookup("_", self._flattened(exact=False))

    @functools.cached_property
    def _flat_tensors(self) -> _Lookup[Rule]:
        return _Lookup("_", self._flattened(exact=True))

    @functools.cached_property
    def _written_modules(self) -> _Lookup[Rule]:
        return _Lookup(".", ((name, rule) for rule in self.rules if not rule.exact for name in rule.names))

    @functools.cached_property
    def _written_tensors(self) -> _Lookup[Rule]:
        return _Lookup(".", ((name, rule) for rule in self.rules if rule.exact for name in rule.names))

    def claim(self, key: str) -> Claim | None:
        """What the tensor `key` is, or None."""
        stem, _, leaf = key.rpartition(".")
        # Few tensors are known by their whole names; the last word rules most keys out.
        if leaf in self._tensor_leaves or "{}" in self._tensor_leaves:
            found = _find(self._tensors, key)
            if found is not None:
                return Claim(*found, "")
        if leaf in LEAVES:
            found = _find(self._modules, stem, "." + leaf)
            if found is not None:
                return Claim(*found, leaf)
        sidecar = _SIDECARS.search(key)
        if sidecar is not None:
            suffix = sidecar.group()
            found = _find(self._modules, key[: -len(suffix)], suffix)
            if found is not None:
                return Claim(*found, "", suffix)
        return None

    def is_extra(self, key: str) -> bool:
        return key in self._extras

    def module(self, name: str) -> Claim | None:
        """What the module `name` is: as `claim`, without a leaf. A norm known by its tensor alone counts too."""
        found = _find(self._modules, name)
        if found is None:
            found = _of_weights(_find(self._tensors, name + ".weight"))
        return None if found is None else Claim(*found, "")

    def flattened(self, name: str) -> Claim | None:
        """What kohya's underscored module name is."""
        found = _find(self._flat_modules, name)
        if found is None:
            found = _of_weights(_find(self._flat_tensors, name))
        return None if found is None else Claim(*found, "")

    def squashed(self, key: str) -> Claim | None:
        """What the key of an LDM average is, from which all dots were removed."""
        if self._squashed is None:
            self._squashed = {}
            for rule in self.rules:
                for leaf in ("",) if rule.exact else LEAVES:
                    text = (rule.key + leaf).replace(".", "")
                    pattern = re.compile(re.escape(text).replace(r"\{\}", "([0-9]+)"))
                    self._squashed.setdefault(_letters(text.replace("{}", "0")), []).append((pattern, rule, leaf))
        for pattern, rule, leaf in self._squashed.get(_letters(key), ()):
            match = pattern.fullmatch(key)
            if match is not None:
                names = tuple(_fill(n, match.groups()) for n in rule.names)
                return Claim(rule, tuple(f"{n}.{leaf}" if leaf else n for n in names), leaf)
        return None

    def spelled(self, name: str) -> tuple[Rule, str, tuple[str, ...]] | None:
        """How this table writes the canonical tensor `name`: (rule, key, the names that the key packs), or None."""
        exact = self._written_tensors.match(name)
        if exact is not None:
            rule, numbers = exact
            return rule, _fill(rule.key, numbers), tuple(_fill(n, numbers) for n in rule.names)
        sidecar = _SIDECARS.search(name)
        stem, leaf = (name[: sidecar.start()], sidecar.group()) if sidecar else _parted(name)
        found = self._written_modules.match(stem) if leaf else None
        if found is None:
            return None
        rule, numbers = found
        return rule, _fill(rule.key, numbers) + leaf, tuple(_fill(n, numbers) + leaf for n in rule.names)

    def spelled_module(self, name: str) -> tuple[Rule, str, tuple[str, ...]] | None:
        """How this table writes the canonical module `name`: (rule, module, the modules that it packs), or None."""
        found = self._written_modules.match(name)
        if found is not None:
            rule, numbers = found
            return rule, _fill(rule.key, numbers), tuple(_fill(n, numbers) for n in rule.names)
        exact = self.spelled(name + ".weight")
        if exact is None or not exact[1].endswith(".weight"):
            return None
        rule, key, names = exact
        return rule, key.removesuffix(".weight"), tuple(n.removesuffix(".weight") for n in names)


def _parted(name: str) -> tuple[str, str]:
    stem, dot, leaf = name.rpartition(".")
    return (stem, dot + leaf) if leaf in LEAVES else (name, "")


def _letters(text: str) -> str:
    return _DIGITS.sub("#", text)


def _fill(template: str, numbers: Sequence[str]) -> str:
    return template.format(*numbers) if numbers else template


def _find(lookup: _Lookup[Rule], name: str, leaf: str = "") -> tuple[Rule, tuple[str, ...]] | None:
    """The rule of a name, and the names that it stands for, with `leaf` hung on each."""
    found = lookup.match(name)
    if found is None:
        return None
    rule, numbers = found
    return rule, tuple([_fill(n, numbers) + leaf for n in rule.names])


def _of_weights(found: tuple[Rule, tuple[str, ...]] | None) -> tuple[Rule, tuple[str, ...]] | None:
    """The modules of these tensors, if all of them are a module's weight."""
    if found is None or not all(n.endswith(".weight") for n in found[1]):
        return None
    return found[0], tuple(n.removesuffix(".weight") for n in found[1])


def _refuse_twins(where: str, templates: Iterable[str]) -> None:
    """Raises ValueError when two templates are one."""
    counted = Counter(templates)
    twins = [template for template, count in counted.items() if count > 1]
    if twins:
        raise ValueError(f"{where}: {twins[0]!r} stands for two rules")


class _Lookup(Generic[T]):
    """Templates by their words; of the numbers in a name some are fixed by the template, the others are free.

    Of several entries for one template the first stays.
    """

    def __init__(self, separator: str, entries: Iterable[tuple[str, T]]) -> None:
        self.separator = separator
        # what stands between the numbers -> places of the fixed numbers, of the free ones, these numbers -> entry
        self._forms: dict[tuple[str, ...], list[tuple[tuple[int, ...], tuple[int, ...], dict[tuple[str, ...], T]]]] = {}
        split = _PLACES[separator].split
        for template, entry in entries:
            parts = split(template)
            numbers = parts[1::2]
            fixed = tuple([place for place, number in enumerate(numbers) if number != "{}"])
            literal = tuple([numbers[place] for place in fixed])
            forms = self._forms.setdefault(tuple(parts[::2]), [])
            held = next((found for places, _, found in forms if places == fixed), None)
            if held is None:
                free = tuple([place for place, number in enumerate(numbers) if number == "{}"])
                forms.append((fixed, free, held := {}))
                # The name in which more numbers are fixed is the more particular one, and is tried first.
                forms.sort(key=lambda form: -len(form[0]))
            held.setdefault(literal, entry)

    def match(self, name: str) -> tuple[T, tuple[str, ...]] | None:
        """The entry of a name, and the numbers that fill its placeholders."""
        words, numbers = _split(name, self.separator)
        for fixed, free, held in self._forms.get(words, ()):
            found = held.get(tuple([numbers[place] for place in fixed]))
            if found is not None:
                return found, tuple([numbers[place] for place in free])
        return None


@functools.lru_cache(maxsize=1 << 15)
def _split(name: str, separator: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What stands between the numbers of a name, and the numbers: whole words that are numbers as files write them."""
    parts = _NUMBERS[separator].split(name)
    return tuple(parts[::2]), tuple(parts[1::2])


@functools.cache
def _tables(name: str) -> Mapping[str, Table]:
    network = NETWORKS.get(name)
    tables = {s.name: Table(name, s.name, s.rules, s.extras) for s in network.spellings}
    if network.canonical not in tables:
        # Dictionaries keep order and drop what several spellings have in common.
        names = {(n, r.exact): None for s in network.spellings for r in s.rules for n in r.names}
        rules = [Rule(n, (n,), exact=exact) for n, exact in names]
        extras = [e for s in network.spellings for e in s.extras]
        tables[network.canonical] = Table(name, network.canonical, rules, extras)
    return tables


@functools.cache
def _adapter_tables(name: str) -> Mapping[str, Table]:
    spellings = NETWORKS.get(name).adapter_spellings
    return {**_tables(name), **{s.name: Table(name, s.name, s.rules, s.extras) for s in spellings}}


def heights(rule: Rule, total: int, features: int | None) -> tuple[int, ...] | None:
    """The heights of a packed tensor's bands, of `total` rows, for a module of that many input features.

    None where they do not work out: rows that cannot be shared equally, or unknown features.
    """
    wanted = [features if h == IN else None for h in rule.heights]
    if IN in rule.heights and features is None:
        return None
    left = total - sum(w for w in wanted if w is not None)
    shares = wanted.count(None)
    if left < 0 or (shares and left % shares) or (not shares and left):
        return None
    return tuple(left // shares if w is None else w for w in wanted)


def swaps(rule: Rule, total: int, features: int | None) -> bool | None:
    """Do the halves of a tensor of `total` rows trade places, for a module of that many input features?

    The same answer holds both ways, for a bias (whose features are its weight's) and for the up of a LoRA (whose
    features are its down's). None where it takes the features to tell, and they are not known.
    """
    if rule.swapped_when is None:
        return rule.swapped
    return None if features is None else total == rule.swapped_when * features
