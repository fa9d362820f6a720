"""Strengths that stand beside the tensors: PEFT's adapter_config.json, and diffusers' `lora_adapter_metadata`, alike.

Both are PEFT's LoraConfig: a rank and an alpha for all modules, and others by patterns over the ends of their names.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from weightops.errors import FormatError, quote
from weightops.lora.family import Told

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from weightops.files.checkpoint import Checkpoint

HEADER = "lora_adapter_metadata"
FILE = "adapter_config.json"

# PEFT's families whose strength is alpha / rank.
SCALED = ("lora", "loha", "lokr")

# Of a series, which is within a float32 of its limit long before.
MOST_TERMS = 1000

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


def whole_rank(config: Mapping[str, Any], module: str, label: str) -> int | None:
    """PEFT's rank of a LoKr of two whole factors, which stands in the configuration alone."""
    rank = config.get("r")
    patterns = config.get("rank_pattern")
    if isinstance(patterns, dict):
        rank = next((value for key, value in patterns.items() if is_named(module, key, label)), rank)
    return rank if isinstance(rank, int) and not isinstance(rank, bool) and rank > 0 else None


def rotation(config: Mapping[str, Any], label: str) -> Told:
    """How PEFT's second OFT makes rotations of its tensors. Raises FormatError for a number that is none."""
    terms, length = config.get("num_cayley_neumann_terms", 5), config.get("eps", 6e-5)
    if not isinstance(terms, int) or isinstance(terms, bool) or not 1 <= terms <= MOST_TERMS:
        raise FormatError(label, f"num_cayley_neumann_terms is {quote(terms)}, expected 1 to {MOST_TERMS}")
    if isinstance(length, bool) or not isinstance(length, int | float) or not 0 < length < math.inf:
        raise FormatError(label, f"eps is {quote(length)}, expected a number above 0")
    series = config.get("use_cayley_neumann", True) is not False
    return Told(neumann=terms if series else None, coft=float(length) if config.get("coft") is True else None)


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
    """One module of a configuration: its name, rank (None: of two whole LoKr factors), alpha; shapes of its parts."""

    name: str
    rank: int | None
    alpha: float | None
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def ranks(self) -> tuple[int, float]:
        """Rank and alpha, as PEFT wants them: whole are factors of a rank so high that a product would not pay."""
        rank = self.rank or max(self.shapes["lokr_w2"][:2], default=1)
        return rank, float(rank) if self.alpha is None or self.rank is None else self.alpha


def peft_config(family: str, modules: Sequence[Module], templates: Iterable[str]) -> dict[str, Any]:
    """PEFT's configuration of these modules: ranks and alphas, the commonest for all and the others by name.

    templates: of all names in the network, `{}` where a number stands: a name that others end with is anchored.
    """
    ends = {end for template in templates for end in _ends(template)}
    names = {m.name: _pattern(m.name) for m in modules}
    anchored = {name for name in names if _template(name) in ends}
    keys = {name: f"^{text}" if name in anchored else text for name, text in names.items()}
    rank, alpha = common(m.ranks[0] for m in modules), common(m.ranks[1] for m in modules)
    targets: Any = sorted(names.values())
    if anchored:  # a list would mean those others, too
        whole = (re.escape(text) if name in anchored else rf"(.*\.)?{re.escape(text)}" for name, text in names.items())
        targets = f"({'|'.join(sorted(whole))})"
    return {
        "r": rank,
        "lora_alpha" if family == "lora" else "alpha": plain(alpha),
        "rank_pattern": {keys[m.name]: m.ranks[0] for m in modules if m.ranks[0] != rank},
        "alpha_pattern": {keys[m.name]: plain(m.ranks[1]) for m in modules if m.ranks[1] != alpha},
        "target_modules": targets,
        **_PARTICULARS[family](modules),
    }


def _pattern(name: str) -> str:
    """transformers ≥ 5.6 calls a CLIP's modules without "text_model.", and older ones with it: the end fits both."""
    return name.removeprefix("text_model.")


def _ends(template: str) -> list[str]:
    """What may stand after a dot of it."""
    words = template.split(".")
    return [".".join(words[n:]) for n in range(1, len(words))]


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
        "decompose_factor": decompose_factor(modules) or -1,
    }


_PARTICULARS = {"lora": _lora, "loha": _loha, "lokr": _lokr}


def decompose_factor(modules: Sequence[Module]) -> int | None:
    """The setting with which PEFT makes factors of these shapes, which its files do not say; None: there is none."""
    sizes = [_kronecker(m.shapes) for m in modules]
    candidates = (-1, *sorted({first[0] for first, _ in sizes} | {first[1] for first, _ in sizes}))
    both = any("lokr_w1_a" in m.shapes for m in modules)
    if any(_is_whole(m, size, both=both) != ("lokr_w1" in m.shapes, "lokr_w2" in m.shapes)
           for m, size in zip(modules, sizes, strict=True)):  # fmt: skip
        return None
    return next((c for c in candidates if all(_is_factored(size, c) for size in sizes)), None)


def _kronecker(shapes: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of both factors, each multiplied out."""
    found = []
    for factor in ("lokr_w1", "lokr_w2"):
        if factor in shapes:
            found.append(shapes[factor][:2])
        else:
            out = shapes[f"{factor}_a"][1 if factor == "lokr_w2" and "lokr_t2" in shapes else 0]
            found.append((out, shapes[f"{factor}_b"][1]))
    return found[0], found[1]


def _is_whole(module: Module, size: tuple[tuple[int, ...], tuple[int, ...]], *, both: bool) -> tuple[bool, bool]:
    """Would PEFT keep the first factor whole, and the second?"""
    rank = module.ranks[0]
    return not (both and rank < max(size[0]) / 2), rank >= max(size[1]) / 2


def _is_factored(size: tuple[tuple[int, ...], tuple[int, ...]], factor: int) -> bool:
    (out_l, in_m), (out_k, in_n) = size
    # A kernel of 3 x 3 may be flattened into the inputs of the second factor.
    inputs = [in_n] if in_n % 9 else [in_n, in_n // 9]
    fits = any(_parts(in_m * n, factor) == (in_m, n) for n in inputs)
    return fits and _parts(out_l * out_k, factor) == (out_l, out_k)


def _parts(dimension: int, factor: int) -> tuple[int, int]:
    """Two factors of a number, as PEFT and LyCORIS choose them. Source: peft, tuners/lokr/layer.py, `factorization`."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    low, high = 1, dimension
    limit = dimension if factor == -1 else factor
    while low < high:
        following = next(n for n in range(low + 1, dimension + 1) if dimension % n == 0)
        if following > limit:
            break
        low, high = following, dimension // following
    return min(low, high), max(low, high)
