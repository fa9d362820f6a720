"""Block weights: one number for each tensor that a text speaks of, in models of every architecture. Pure grammar.

A spec is rules, separated by commas, semicolons or newlines; where several speak of a tensor, the last one counts.

    0,0.1,…,1                  the lists of other tools: 26, 25, 20, 19, 17 or 12 numbers for UNets, 61 for Flux, and
                               for any model one number for each of its blocks, with BASE before them or not
    GRAD_V  SMOOTHSTEP(0..0.5) a preset (weightops.naming.presets), between 0 and 1 or between these
    linear(0.2..0.8)           a curve from the model's first block to its last; also cosine, smoothstep
    OUT05=0.5                  SELECTOR=VALUE, where VALUE is a number, a curve or a preset
    OUT05:attn1:0.5            the same, as supermerger writes it: BLOCKS:ELEMENTS:VALUE

A selector is parts, joined by `:`, that all have to hold; a part is one word or several, separated by spaces, of which
one has to hold, or none after `NOT`. Small and capital letters are the same. A word is one of these, in this order:

    *                          everything; so is a part of nothing
    unet vae text_encoder_2    a component; CLIP and T5 the text encoders of these kinds
    BASE                       all that is not the diffusion model: text encoders, VAE
    attn.q cross_attn mlp …    a kind of layer (weightops.naming.layer_kinds)
    IN04  double.3  D03        a block; `weightops blocks FILE` lists them
    OUT  single  text_encoder  all blocks of a kind
    IN04-M00  double.0-9       the blocks between two, with both
    *attn2*  single.1?         a pattern for canonical tensor names and names of blocks
    attn2.to_k  proj           words, or parts of them (proj_in), at which one begins, in canonical tensor names

BASE is what it is in all tools: text encoders (the VAE, too, where it is merged). `time_embed` and `label_emb` are
IN00, `out.` is the last OUT. The lists of 17 and 12, LoRA's, say 0 for the blocks that they leave out, as
sd-webui-lora-block-weight does (sd-scripts leaves those alone); of 26 numbers SDXL uses those that it has blocks for.
Over which blocks a curve runs is what the parts that name blocks or components say: `double=cosine(1..0)` runs over
the double blocks, and `attn.q=cosine(1..0)` over all. `cosine(a..b)` begins at a and ends at b, whereas COSINE(a..b) is
the preset COSINE, which falls, between a and b.

Source: hako-mikan/sd-webui-supermerger (`blockfromkey`, elemental merge), hako-mikan/sd-webui-lora-block-weight,
bbc-mc/sdweb-merge-block-weighted-gui, s1dlx/meh (`merge_key`), kohya-ss/sd-scripts (`svd_merge_lora.py`).
"""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from weightops.errors import UsageError, quote
from weightops.naming.block_layout import Name, blocks_of, lay_out
from weightops.naming.block_rules import Curve, Reader, Rule, Selector, said, there
from weightops.naming.presets import ALIASES, PRESETS, RISING, base, preset

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from weightops.naming.keymap import Network

__all__ = ["Blocks", "blocks_of", "parse_blocks"]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Block weights, as the user said them, and as rules."""

    text: str
    where: str
    rules: tuple[Rule, ...]

    def values(self, names: Mapping[Name, Network | None]) -> dict[Name, float]:
        """The number of each tensor that a rule speaks of; the last rule that does counts.

        names: (component, canonical name) -> its network, None for an unknown one, whose tensors may come under the
        keys of their file. Raises UsageError for a rule that matches nothing.
        """
        found: dict[Name, float] = {}
        for _, numbers in self.by_rule(names):
            found |= numbers
        return found

    def by_rule(self, names: Mapping[Name, Network | None]) -> list[tuple[Rule, dict[Name, float]]]:
        """The same, rule by rule."""
        reader = Reader(lay_out(names), self.where)
        return [(rule, reader.read(rule)) for rule in self.rules]

    def check_used(self, names: Mapping[Name, Network | None], changed: Collection[Name], by: str) -> dict[Name, float]:
        """The values. Raises UsageError for a rule that matches nothing of what is `changed`; by: what changes it."""
        found: dict[Name, float] = {}
        for rule, numbers in self.by_rule(names):
            if not any(name in changed for name in numbers):
                hint = f"they change {there(lay_out({name: names[name] for name in names if name in changed}))}"
                raise UsageError(self.where, f"{said(rule)} matches nothing that {by} change", hint)
            found |= numbers
        return found


# ------------------------------------------------------------------------------------------------ parsing


class _Item(NamedTuple):
    """What stands between two separators. before: the separator before it."""

    text: str
    where: int
    before: str


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?")
_CALL = re.compile(r"(?P<name>[^()]+?)\s*\(\s*(?P<low>[^()]*?)\s*\.\.\s*(?P<high>[^()]*?)\s*\)")
_BRACKETED = re.compile(r"\s*\[([^\[\]=:]*)\]\s*")
_CHANCE = frozenset({"R", "U", "X", "D", "ER", "EU", "EX"})


def parse_blocks(text: str, *, where: str = "--blocks") -> Blocks:
    """A spec as rules. Raises UsageError, with the place and the reason, for one that cannot be read."""
    bracketed = _BRACKETED.fullmatch(text)
    items = list(_items(" " * bracketed.start(1) + bracketed[1] if bracketed else text))
    rules: list[Rule] = []
    numbers: list[_Item] = []
    for item, following in zip(items, [*items[1:], None], strict=True):
        if _NUMBER.fullmatch(item.text):
            if rules:
                raise UsageError(where, f"{_at(item)} is a number for nothing", "say what it is for: OUT05=0.5, *=0.5")
            numbers.append(item)
            continue
        if not item.text:
            if item.before != ";" and following is not None and following.before == ",":
                raise UsageError(where, f"nothing stands before the comma at character {following.where - 1}")
            continue
        rule = _rule(item, where)
        if numbers and not rules:
            rules.append(_row(numbers, where))
        rules.append(rule)
    if numbers and not rules:
        rules.append(_row(numbers, where))
    if not rules:
        raise UsageError(where, f"found {quote(text)}, expected rules such as OUT05=0.5, a preset or a list of numbers")
    return Blocks(text, where, tuple(rules))


def _items(text: str) -> Iterator[_Item]:
    """The text between commas, semicolons and newlines; numbers may stand with nothing but spaces between them."""
    start, before = 0, ""
    for end in [*(m.start() for m in re.finditer(r"[,;\n]", text)), len(text)]:
        part = text[start:end]
        words = list(re.finditer(r"\S+", part))
        if len(words) > 1 and all(_NUMBER.fullmatch(word[0]) for word in words):
            yield from (_Item(word[0], start + word.start() + 1, before) for word in words)
        else:
            yield _Item(part.strip(), start + len(part) - len(part.lstrip()) + 1, before)
        start, before = end + 1, text[end : end + 1]


def _at(item: _Item) -> str:
    return f"{quote(item.text, 60)} (character {item.where})"


def _row(items: Sequence[_Item], where: str) -> Rule:
    if len(items) == 1:
        raise UsageError(where, f"{_at(items[0])} is a number for nothing", f"*={items[0].text} is for everything")
    text = ",".join(item.text for item in items)
    return Rule(text, items[0].where, None, tuple(float(item.text) for item in items))


def _rule(item: _Item, where: str) -> Rule:
    selector, equals, value = item.text.rpartition("=")
    if not equals:
        selector, colon, value = item.text.rpartition(":")
        if not colon:
            return Rule(item.text, item.where, None, _value(item, item.text, where, alone=True))
    elif not selector.strip():
        raise UsageError(where, f"{_at(item)} has nothing before its '='", "OUT05=0.5; *=0.5 is for everything")
    selectors = []
    for part in selector.split(":"):
        words = part.split()
        without = bool(words) and words[0].lower() == "not"
        if without and len(words) == 1:
            raise UsageError(where, f"{_at(item)} says NOT of nothing", "NOT IN00-IN03=0.5")
        selectors.append(Selector(tuple(words[without:]) or ("*",), without))
    return Rule(item.text, item.where, tuple(selectors), _value(item, value.strip(), where, alone=False))


def _value(item: _Item, text: str, where: str, *, alone: bool) -> float | Curve:
    """A number, a curve or a preset; alone: without a selector."""
    if _NUMBER.fullmatch(text):
        return float(text)
    call = _CALL.fullmatch(text)
    name, low, high = (call["name"], call["low"], call["high"]) if call else (text, "0", "1")
    name = ALIASES.get(name.upper(), name)
    for end in (low, high):
        if not _NUMBER.fullmatch(end):
            raise UsageError(where, f"{_at(item)}: found {quote(end)}, expected a number, as in {name}(0.2..0.8)")
    first, last = float(low), float(high)
    if name in RISING:
        if call is None:
            raise UsageError(where, f"{_at(item)}: {name} needs its two ends", f"{name}(0..1)")
        return Curve(functools.partial(_between, RISING[name], first, last))
    if name in PRESETS:
        of = functools.partial(preset, name)
        return Curve(functools.partial(_between, of, first, last), _between(lambda _: base(name), first, last, 0))
    raise UsageError(where, f"{_at(item)}: {_wrong_value(text, name, alone=alone)}", _value_hint(name))


def _between(shape: Callable[[float], float], low: float, high: float, u: float) -> float:
    """The shape, from 0 and 1 to low and high; these two come out exactly."""
    share = shape(u)
    return (1 - share) * low + share * high


def _wrong_value(text: str, name: str, *, alone: bool) -> str:
    if text.upper() in _CHANCE:
        return f"{text} draws a number by chance, which could not be done twice; write the number"
    if not text:
        return "found nothing, expected a number, a curve or a preset"
    if "(" in text and name == text:
        return f"found {quote(text)}, expected two ends in parentheses, as in linear(0.2..0.8)"
    expected = "SELECTOR=VALUE, a curve or a preset" if alone else "a number, a curve or a preset"
    return f"found {quote(text)}, expected {expected}"


def _value_hint(name: str) -> str:
    known = [*RISING, *PRESETS]
    same = [k for k in known if k.lower() == name.lower()]
    if same:
        return f"{' or '.join(same)}: curves are written small, presets in capitals"
    near = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(name.upper(), known, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"curves are {', '.join(f'{k}(a..b)' for k in RISING)}; presets {', '.join(PRESETS[:4])}, …"
