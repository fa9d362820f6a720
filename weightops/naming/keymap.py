"""Names as tables: how each spelling of a network calls each of its tensors. Pure strings and shapes.

A name is looked up, never taken apart by guess: a table's templates hold `{}` where a number stands, and a key is
found by its words and the numbers that the template fixes. kohya's underscored names are looked up in the same
templates with their dots written as underscores, built forward from the table. Source: FORMATS §0.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from weightops.registry import Registry

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

    def tables(self) -> Mapping[str, Table]:
        """Every spelling, compiled, the canonical one included."""
        return _tables(self.name)


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

    pipeline: diffusers' model_index.json and schedulers, where a single file can carry the whole pipeline.
    """

    name: str
    title: str
    components: tuple[Component, ...]
    pipeline: Pipeline | None = None


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


class _Entry(NamedTuple):
    rule: Rule
    names: tuple[str, ...]


class Table:
    """One spelling of a network, compiled: key -> Claim, canonical name -> key."""

    def __init__(self, network: str, spelling: str, rules: Sequence[Rule], extras: Sequence[str] = ()) -> None:
        self.network = network
        self.spelling = spelling
        self.rules = tuple(rules)
        self._extras = frozenset(extras)
        self._dotted: dict[bool, _Lookup] = {True: _Lookup("."), False: _Lookup(".")}
        self._flat = _Lookup("_")
        self._flat_tensors = _Lookup("_")
        self._squashed: dict[str, list[tuple[re.Pattern[str], Rule, str]]] | None = None
        self._written = _Lookup(".")
        self._written_tensors = _Lookup(".")
        for rule in self.rules:
            self._dotted[rule.exact].add(rule.key, rule, f"{network}, {spelling}")
            if rule.exact:
                stem, _, leaf = rule.key.rpartition(".")
                if leaf == "weight":  # the module of a norm, as LoRA files name it
                    self._flat_tensors.add(stem.replace(".", "_"), rule, f"{network}, {spelling}, flattened")
            else:
                self._flat.add(rule.key.replace(".", "_"), rule, f"{network}, {spelling}, flattened")
            written = self._written_tensors if rule.exact else self._written
            for name in rule.names:
                written.add(name, rule, "", first=True)

    def claim(self, key: str) -> Claim | None:
        """What the tensor `key` is, or None."""
        found = self._dotted[True].find(key)
        if found is not None:
            return Claim(found.rule, found.names, "")
        stem, _, leaf = key.rpartition(".")
        if leaf in LEAVES:
            found = self._dotted[False].find(stem)
            if found is not None:
                return Claim(found.rule, tuple(f"{n}.{leaf}" for n in found.names), leaf)
        sidecar = _SIDECARS.search(key)
        if sidecar is not None:
            suffix = sidecar.group()
            found = self._dotted[False].find(key[: -len(suffix)])
            if found is not None:
                return Claim(found.rule, tuple(n + suffix for n in found.names), "", suffix)
        return None

    def is_extra(self, key: str) -> bool:
        return key in self._extras

    def module(self, name: str) -> Claim | None:
        """What the module `name` is: as `claim`, without a leaf. A norm known by its tensor alone counts too."""
        found = self._dotted[False].find(name)
        if found is None:
            exact = self._dotted[True].find(name + ".weight")
            if exact is None or not all(n.endswith(".weight") for n in exact.names):
                return None
            found = _Entry(exact.rule, tuple(n.removesuffix(".weight") for n in exact.names))
        return Claim(found.rule, found.names, "")

    def flattened(self, name: str) -> Claim | None:
        """What kohya's underscored module name is."""
        found = self._flat.find(name)
        if found is not None:
            return Claim(found.rule, found.names, "")
        found = self._flat_tensors.find(name)
        if found is None or not all(n.endswith(".weight") for n in found.names):
            return None
        return Claim(found.rule, tuple(n.removesuffix(".weight") for n in found.names), "")

    def squashed(self, key: str) -> Claim | None:
        """What the key of an LDM average is, from which all dots were removed."""
        if self._squashed is None:
            self._squashed = {}
            for rule in self.rules:
                for leaf in ("",) if rule.exact else LEAVES:
                    text = (rule.key + leaf).replace(".", "")
                    pattern = re.compile(re.escape(text).replace(r"\{\}", r"(\d+)"))
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
        found = self._written.match(stem) if leaf else None
        if found is None:
            return None
        rule, numbers = found
        return rule, _fill(rule.key, numbers) + leaf, tuple(_fill(n, numbers) + leaf for n in rule.names)

    def spelled_module(self, name: str) -> tuple[Rule, str, tuple[str, ...]] | None:
        """How this table writes the canonical module `name`: (rule, module, the modules that it packs), or None."""
        found = self._written.match(name)
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
    return re.sub(r"\d+", "#", text)


def _fill(template: str, numbers: Sequence[str]) -> str:
    return template.format(*numbers) if numbers else template


class _Lookup:
    """Templates by their words; of the numbers in a name some are fixed by the template, the others are free."""

    def __init__(self, separator: str) -> None:
        self.separator = separator
        # words with every number as # -> the places of the fixed numbers -> these numbers -> (template, rule)
        self._forms: dict[str, dict[tuple[int, ...], dict[tuple[str, ...], tuple[str, Rule]]]] = {}

    def add(self, template: str, rule: Rule, where: str, *, first: bool = False) -> None:
        """Raises ValueError when two templates are one, unless the `first` is to stay."""
        form, numbers = _normal(template.replace("{}", "0"), self.separator)
        _, marked = _normal(template, self.separator, placeholder=True)
        fixed = tuple(place for place, number in enumerate(marked) if number != "{}")
        held = self._forms.setdefault(form, {}).setdefault(fixed, {})
        literal = tuple(numbers[place] for place in fixed)
        if literal in held:
            if first:
                return
            raise ValueError(f"{where}: {template!r} and {held[literal][0]!r} are one name")
        held[literal] = (template, rule)
        # The name in which more numbers are fixed is the more particular one, and is tried first.
        self._forms[form] = dict(sorted(self._forms[form].items(), key=lambda item: -len(item[0])))

    def match(self, name: str) -> tuple[Rule, tuple[str, ...]] | None:
        """The rule, and the numbers that fill its placeholders."""
        form, numbers = _normal(name, self.separator)
        for fixed, held in self._forms.get(form, {}).items():
            found = held.get(tuple(numbers[place] for place in fixed))
            if found is not None:
                free = tuple(n for place, n in enumerate(numbers) if place not in fixed)
                return found[1], free
        return None

    def find(self, name: str) -> _Entry | None:
        found = self.match(name)
        if found is None:
            return None
        rule, numbers = found
        return _Entry(rule, tuple(_fill(n, numbers) for n in rule.names))


@functools.lru_cache(maxsize=1 << 15)
def _normal(name: str, separator: str, placeholder: bool = False) -> tuple[str, tuple[str, ...]]:
    """The words of a name with every number as #, and the numbers."""
    words, numbers = [], []
    for word in name.split(separator):
        # 007 is no number that any file writes, and ² is none at all.
        number = (word.isascii() and word.isdigit() and (word == "0" or word[0] != "0")) or (
            placeholder and word == "{}"
        )
        words.append("#" if number else word)
        if number:
            numbers.append(word)
    return separator.join(words), tuple(numbers)


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
