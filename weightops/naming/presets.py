"""Curves over the depth of a model, those that the community knows by name, and its lists. No names of tensors.

u is 0 at the first block and 1 at the last. A preset was published as 26 numbers for Stable Diffusion: BASE, then 25
blocks at u = i/24. Where these are a formula, the formula stands here and holds for any number of blocks: a SMOOTHSTEP
of 3 is the triangle wave of 3·S(u), one of a third is S of the triangle wave of 3·u. Plateaus are looked up at the
nearest of the 25 places, so that steps stay steps, and LOW_OFFSET_CUBIC_HERMITE, drawn by hand, between two of them.
Source: bbc-mc/sdweb-merge-block-weighted-gui (`csv/preset.tsv`), s1dlx/meh (`sd_meh/presets.py`).

Of a list, each number is for a block. Source: BLOCKID17, BLOCKID12 and BLOCKIDFLUX of
hako-mikan/sd-webui-lora-block-weight; `weighttoxl` of hako-mikan/sd-webui-supermerger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

Shape = Callable[[float], float]

# The places of the published tables, less one.
_LAST = 24


def smooth(u: float) -> float:
    """Hermite's step: flat at 0 and at 1."""
    return u * u * (3 - 2 * u)


def wave(x: float) -> float:
    """The triangle wave: 0 at even numbers, 1 at odd ones, straight between."""
    return abs((x + 1) % 2 - 1)


def _true_hermite(u: float) -> float:
    # As published: the cubic does not begin at 0, the table does.
    return ((77 / 12 * u - 77 / 8) * u + 25 / 6) * u + 1 / 24 if u > 0 else 0.0


def _fake_hermite(u: float) -> float:
    return ((19 / 3 * u - 19 / 2) * u + 25 / 6) * u


# Rising from 0 to 1.
RISING: Mapping[str, Shape] = {
    "linear": lambda u: u,
    "cosine": lambda u: (1 - math.cos(math.pi * u)) / 2,
    "smoothstep": smooth,
}

_FORMULAS: Mapping[str, Shape] = {
    "GRAD_V": lambda u: abs(1 - 2 * u),
    "GRAD_A": lambda u: 1 - abs(1 - 2 * u),
    "FLAT_25": lambda _: 0.25,
    "FLAT_75": lambda _: 0.75,
    "SMOOTHSTEP": smooth,
    "REVERSE_SMOOTHSTEP": lambda u: 1 - smooth(u),
    "2SMOOTHSTEP": lambda u: wave(2 * smooth(u)),
    "2R_SMOOTHSTEP": lambda u: 1 - wave(2 * smooth(u)),
    "3SMOOTHSTEP": lambda u: wave(3 * smooth(u)),
    "3R_SMOOTHSTEP": lambda u: 1 - wave(3 * smooth(u)),
    "4SMOOTHSTEP": lambda u: wave(4 * smooth(u)),
    "4R_SMOOTHSTEP": lambda u: 1 - wave(4 * smooth(u)),
    "HALF_SMOOTHSTEP": lambda u: smooth(wave(2 * u)),
    "HALF_R_SMOOTHSTEP": lambda u: 1 - smooth(wave(2 * u)),
    "ONE_THIRD_SMOOTHSTEP": lambda u: smooth(wave(3 * u)),
    "ONE_THIRD_R_SMOOTHSTEP": lambda u: 1 - smooth(wave(3 * u)),
    "ONE_FOURTH_SMOOTHSTEP": lambda u: smooth(wave(4 * u)),
    "ONE_FOURTH_R_SMOOTHSTEP": lambda u: 1 - smooth(wave(4 * u)),
    "COSINE": lambda u: (1 + math.cos(math.pi * u)) / 2,
    "REVERSE_COSINE": lambda u: (1 - math.cos(math.pi * u)) / 2,
    "TRUE_CUBIC_HERMITE": _true_hermite,
    "TRUE_REVERSE_CUBIC_HERMITE": lambda u: 1 - _true_hermite(u),
    "FAKE_CUBIC_HERMITE": _fake_hermite,
    "FAKE_REVERSE_CUBIC_HERMITE": lambda u: 1 - _fake_hermite(u),
    "ALL_A": lambda _: 0.0,
    "ALL_B": lambda _: 1.0,
}

# (value, how many of the 25 places have it), from the first on.
_PLATEAUS: Mapping[str, tuple[tuple[float, int], ...]] = {
    "WRAP08": ((1, 4), (0, 17), (1, 4)),
    "WRAP12": ((1, 6), (0, 13), (1, 6)),
    "WRAP14": ((1, 7), (0, 11), (1, 7)),
    "WRAP16": ((1, 8), (0, 9), (1, 8)),
    "MID12_50": ((0, 5), (0.5, 14), (0, 6)),
    "OUT07": ((0, 18), (1, 7)),
    "OUT12": ((0, 13), (1, 12)),
    "OUT12_5": ((0, 12), (0.5, 1), (1, 12)),
    "RING08_SOFT": ((0, 5), (0.5, 1), (1, 3), (0.5, 1), (0, 5), (0.5, 1), (1, 3), (0.5, 1), (0, 5)),
    "RING08_5": ((0, 6), (1, 4), (0, 5), (1, 4), (0, 6)),
    "RING10_5": ((0, 5), (1, 5), (0, 5), (1, 5), (0, 5)),
    "RING10_3": ((0, 6), (1, 5), (0, 3), (1, 5), (0, 6)),
}

_TABLES: Mapping[str, tuple[float, ...]] = {
    "LOW_OFFSET_CUBIC_HERMITE": (
        0, 0.099515938464506, 0.1628809799382715, 0.2123209635416665, 0.249228395061729, 0.274995780285494,
        0.291015625, 0.298680434992284, 0.2993827160493825, 0.294514973958333, 0.285469714506173, 0.273639443479938,
        0.261513611593364, 0.24938777970679, 0.245727237654321, 0.23763671875, 0.222901234567901, 0.224305796682099,
        0.234635416666667, 0.247675106095678, 0.273209876543211, 0.312024739583333, 0.360904706790124,
        0.422634789737655, 0.5,
    ),
}  # fmt: skip

PRESETS: tuple[str, ...] = (*_FORMULAS, *_PLATEAUS, *_TABLES)

# What supermerger calls some of them. Source: its `scripts/mbwpresets_master.txt`.
ALIASES: Mapping[str, str] = {
    "REVERSE-SMOOTHSTEP": "REVERSE_SMOOTHSTEP",
    "SMOOTHSTEP*2": "2SMOOTHSTEP",
    "R_SMOOTHSTEP*2": "2R_SMOOTHSTEP",
    "SMOOTHSTEP*3": "3SMOOTHSTEP",
    "R_SMOOTHSTEP*3": "3R_SMOOTHSTEP",
    "SMOOTHSTEP*4": "4SMOOTHSTEP",
    "R_SMOOTHSTEP*4": "4R_SMOOTHSTEP",
    "SMOOTHSTEP/2": "HALF_SMOOTHSTEP",
    "R_SMOOTHSTEP/2": "HALF_R_SMOOTHSTEP",
    "SMOOTHSTEP/3": "ONE_THIRD_SMOOTHSTEP",
    "R_SMOOTHSTEP/3": "ONE_THIRD_R_SMOOTHSTEP",
    "SMOOTHSTEP/4": "ONE_FOURTH_SMOOTHSTEP",
    "R_SMOOTHSTEP/4": "ONE_FOURTH_R_SMOOTHSTEP",
}


def preset(name: str, u: float) -> float:
    """The value of a preset at depth u."""
    if name in _FORMULAS:
        return _FORMULAS[name](u)
    place = round(_LAST * u, 9)
    if name in _PLATEAUS:
        # Half-way goes to the nearer end of the model, so that what was symmetric stays it.
        left = math.ceil(place - 0.5) if u < 0.5 else math.floor(place + 0.5)
        for value, count in _PLATEAUS[name]:
            left -= count
            if left < 0:
                return value
    row = _TABLES[name]
    before = min(int(place), _LAST - 1)
    share = place - before
    return (1 - share) * row[before] + share * row[before + 1]


def base(name: str) -> float:
    """What a preset says of all that is not the diffusion model: the first of its 26 numbers."""
    return 1.0 if name == "ALL_B" else 0.0


# ------------------------------------------------------------------------------------------------ lists

_IN = ("IN00", "IN01", "IN02", "IN03", "IN04", "IN05", "IN06", "IN07", "IN08", "IN09", "IN10", "IN11")
_OUT = ("OUT00", "OUT01", "OUT02", "OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11")
_SD_LORA = ("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *_OUT[3:])
_SDXL_LORA = ("BASE", "IN04", "IN05", "IN07", "IN08", "M00", *_OUT[:6])

# Lists for the blocks that a LoRA has, without convolutions.
OF_LORA = (_SD_LORA, _SDXL_LORA)
FLUX_ENCODERS = ("CLIP", "T5")

# By network: lists of other lengths than a number for each block, with BASE or without. SDXL's files and the list of 26
# go together in every tool, which uses the 20 that there are blocks for.
_LISTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "sd15_unet": (_SD_LORA,),
    "sd2_unet": (_SD_LORA,),
    "sdxl_unet": (_SDXL_LORA, (*_IN, "M00", *_OUT), ("BASE", *_IN, "M00", *_OUT)),
    "kolors_unet": (_SDXL_LORA, (*_IN, "M00", *_OUT), ("BASE", *_IN, "M00", *_OUT)),
}


def _lists(network: str | None, blocks: Sequence[str]) -> list[tuple[str, ...]]:
    found = [(*blocks,), ("BASE", *blocks), *_LISTS.get(network or "", ())]
    return [*found, (*FLUX_ENCODERS, *blocks)] if network == "flux_transformer" else found


def meaning(network: str | None, blocks: Sequence[str], count: int) -> tuple[str, ...] | None:
    """What each of so many numbers is for, in a network of these blocks; None: no list is so long."""
    return next((meant for meant in _lists(network, blocks) if len(meant) == count), None)


def list_lengths(network: str | None, blocks: Sequence[str]) -> list[int]:
    """How many numbers a list may have: one for each block, that with BASE before them, and those that tools know."""
    found = [len(meant) for meant in _lists(network, blocks)]
    return [*found[:2], *sorted(found[2:])]


def lengths(network: str | None, blocks: Sequence[str]) -> str:
    """The same in words."""
    own, with_base, *known = list_lengths(network, blocks)
    said = f"{own}, one for each block{f' of {network}' if network else ''}, or {with_base} with BASE first"
    return said + "".join(f", or {count}" for count in known)
