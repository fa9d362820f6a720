"""Strengths that stand beside the tensors: PEFT's adapter_config.json, and diffusers' `lora_adapter_metadata`, alike.

Both are PEFT's LoraConfig: a rank and an alpha for all modules, and others by patterns over the ends of their names.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from weightops.errors import FormatError, quote

if TYPE_CHECKING:
    from weightops.files.checkpoint import Checkpoint

HEADER = "lora_adapter_metadata"
FILE = "adapter_config.json"

# PEFT's families whose strength is alpha / rank.
SCALED = ("lora", "loha", "lokr")

# ------------------------------------------------------------------------------------------------ reading


def read_settings(opened: Checkpoint) -> dict[str, dict[str, Any]]:
    """Component ("" for all) -> what PEFT's configuration says of it. Raises FormatError."""
    found: dict[str, dict[str, Any]] = {}
    text = opened.metadata.get(HEADER)
    if text is not None:
        try:
            flat = json.loads(text)
        except (ValueError, RecursionError):
            raise FormatError(opened.label, f"{HEADER!r} in its header is no JSON") from None
        if not isinstance(flat, dict):
            raise FormatError(opened.label, f"{HEADER!r} in its header is no object")
        for key, value in flat.items():
            component, _, name = key.partition(".")
            found.setdefault(component, {})[name] = value
    for component in opened.components or ("",):
        config = opened.json_beside(f"{component}/{FILE}" if component else FILE)
        if config is not None:
            found[component] = config
    return found


def alpha_in(config: Mapping[str, Any], module: str, rank: int, label: str) -> float | None:
    """The module's alpha, so that alpha / rank is its strength; None where the configuration says nothing.

    Raises FormatError for a number that is none, and for a pattern that is more than a name.
    """
    alpha = config.get("lora_alpha", config.get("alpha"))
    patterns = config.get("alpha_pattern")
    if isinstance(patterns, dict):
        alpha = next((value for key, value in patterns.items() if is_named(module, key, label)), alpha)
    if alpha is None:
        return None
    try:
        number = math.nan if isinstance(alpha, bool | str) else float(alpha)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise FormatError(label, f"alpha of {quote(module)} is {quote(alpha)}, expected a finite number")
    # PEFT divides by the root of the rank instead; LyCORIS, too, stores the alpha that makes alpha / rank right.
    return number * math.sqrt(rank) if config.get("use_rslora") is True else number


def whole_strength(config: Mapping[str, Any], module: str, label: str) -> float:
    """PEFT's strength of a LoKr of two whole factors, whose rank stands in the configuration alone."""
    rank = config.get("r")
    patterns = config.get("rank_pattern")
    if isinstance(patterns, dict):
        rank = next((value for key, value in patterns.items() if is_named(module, key, label)), rank)
    alpha = alpha_in(config, module, 1, label)
    if alpha is None or not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        return 1.0
    return alpha / rank


# What may stand in a pattern: names, alternatives, a few stretches of anything. Nothing that could take for ever.
_UNDERSTOOD = re.compile(r"(?:[\w.\-^$|)]|\((?:\?:)?|\\[.d]|\[0-9\]|[*+](?![*+?]))*")
_REPEATED_GROUP = re.compile(r"\)[*+?]")


def is_named(module: str, pattern: str, label: str) -> bool:
    """Is the module meant by PEFT's pattern, a regular expression over the end of its name? Raises FormatError."""
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if re.fullmatch(r"[\w.\-]+", name):
        return module == name or (not pattern.startswith("^") and module.endswith("." + name))
    understood = _UNDERSTOOD.fullmatch(pattern) and not _REPEATED_GROUP.search(pattern)
    if not understood or pattern.count("*") + pattern.count("+") > 3:
        raise FormatError(label, f"alpha_pattern {quote(pattern)} is more than a name, and not understood")
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        raise FormatError(label, f"alpha_pattern {quote(pattern)} is no regular expression") from None


# ------------------------------------------------------------------------------------------------ writing


class Module(NamedTuple):
    """One module of a configuration: its name, rank, and alpha; shapes of its parts."""

    name: str
    rank: int
    alpha: float
    shapes: Mapping[str, tuple[int, ...]]


def peft_config(family: str, modules: Sequence[Module], templates: Iterable[str]) -> dict[str, Any]:
    """PEFT's configuration of these modules: ranks and alphas, the commonest for all and the others by name.

    templates: of all names in the network, `{}` where a number stands: a name that others end with is anchored.
    """
    rank, alpha = common(m.rank for m in modules), common(m.alpha for m in modules)
    written = {m.name: _pattern(m.name) for m in modules}
    ends = {name for name in written if any(t.endswith("." + _template(name)) for t in set(templates))}
    anchored = {name: f"^{text}" if name in ends else text for name, text in written.items()}
    targets: Any = sorted(written.values())
    if ends:  # a list would mean those others, too
        targets = "(" + "|".join(rf"(.*\.)?{re.escape(t)}" if n not in ends else re.escape(t)
                                 for n, t in sorted(written.items())) + ")"  # fmt: skip
    config = {
        "r": rank,
        "lora_alpha" if family == "lora" else "alpha": plain(alpha),
        "rank_pattern": {anchored[m.name]: m.rank for m in modules if m.rank != rank},
        "alpha_pattern": {anchored[m.name]: plain(m.alpha) for m in modules if m.alpha != alpha},
        "target_modules": targets,
    }
    return config | _PARTICULARS[family](modules) if family in _PARTICULARS else config


def _pattern(name: str) -> str:
    """transformers ≥ 5.6 calls a CLIP's modules without "text_model.", and older ones with it: the end fits both."""
    return name.removeprefix("text_model.")


def _template(name: str) -> str:
    return ".".join("{}" if word.isdigit() else word for word in name.split("."))


def common(values: Iterable[Any]) -> Any:
    """The commonest of them, the first of several."""
    return Counter(values).most_common(1)[0][0]


def plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _lora(modules: Sequence[Module]) -> dict[str, Any]:
    return {
        "use_rslora": False,
        "use_dora": any("dora_scale" in m.shapes for m in modules),
        "lora_bias": any("bias" in m.shapes for m in modules),
        "bias": "none",
        "lora_dropout": 0.0,
    }


def _loha(modules: Sequence[Module]) -> dict[str, Any]:
    return {"use_effective_conv2d": any("hada_t1" in m.shapes for m in modules)}


def _lokr(modules: Sequence[Module]) -> dict[str, Any]:
    return {
        "use_effective_conv2d": any("lokr_t2" in m.shapes for m in modules),
        "decompose_both": any("lokr_w1_a" in m.shapes for m in modules),
    }


_PARTICULARS = {"lora": _lora, "loha": _loha, "lokr": _lokr}
